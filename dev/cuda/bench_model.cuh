/* What bench and ranks_bench share: the flags of a model, the model with random weights on random tokens, and a step of
   its training. Behind train_gsa.cu. */
#ifndef GSA_BENCH_MODEL_CUH
#define GSA_BENCH_MODEL_CUH

#include "../../gsa/flags.h"

typedef struct {
    const char *attention, *position, *covariance, *mixer;
    int64_t batch, seq, layers, heads, channels, vocab, window, splats;
    bool recompute, muon;
} BenchModel;

/* GPT-2's 124M shape */
static const BenchModel bench_model_shape = {"standard", "rope", "iso", "softmax", 64, 1024,  12,
                                             12,         768,    50257, 0,         0,  false, false};

// clang-format off
#define BENCH_MODEL_FLAGS(o) \
    {FLAG_CHOICE, "attention", &(o).attention, 0, 0, ATTENTION_CHOICES, "kind of attention", false}, \
    {FLAG_CHOICE, "pos", &(o).position, 0, 0, POSITION_CHOICES, "kind of positions", false}, \
    {FLAG_CHOICE, "mixer", &(o).mixer, 0, 0, MIXER_CHOICES, "what mixes the values of GSA heads", false}, \
    {FLAG_INT, "splats", &(o).splats, 0, 64, NULL, \
     "splats a head; 0: 16 for the linear mixer, else half the head size", false}, \
    {FLAG_CHOICE, "covariance", &(o).covariance, 0, 0, COVARIANCE_CHOICES, "a splat's precision", false}, \
    {FLAG_INT, "batch", &(o).batch, 1, 65536, NULL, "sequences of a GPU", false}, \
    {FLAG_INT, "seq", &(o).seq, 1, 1 << 24, NULL, "tokens a sequence", false}, \
    {FLAG_INT, "layers", &(o).layers, 1, MAX_LAYERS, NULL, "layers", false}, \
    {FLAG_INT, "heads", &(o).heads, 1, MAX_HEADS, NULL, "heads", false}, \
    {FLAG_INT, "channels", &(o).channels, 32, 65536, NULL, "channels", false}, \
    {FLAG_INT, "vocab", &(o).vocab, 256, 65536, NULL, "tokens of the vocabulary", false}, \
    {FLAG_INT, "window", &(o).window, 0, 1 << 24, NULL, "window of standard heads", false}, \
    {FLAG_SWITCH, "muon", &(o).muon, 0, 0, NULL, "the blocks' matrices are updated by Muon", false}, \
    {FLAG_SWITCH, "recompute", &(o).recompute, 0, 0, NULL, \
     "whole steps only, blocks computed again in the backward pass", false}
// clang-format on

static Config bench_config(const BenchModel *o) {
    Config c;
    memset(&c, 0, sizeof c);
    c.T = (int)o->seq;
    c.V = (int)o->vocab;
    c.Vp = CEIL_DIV(c.V, 128) * 128;
    c.L = (int)o->layers;
    c.NH = (int)o->heads;
    c.C = (int)o->channels;
    c.window = (int)o->window;
    c.recompute = o->recompute;
    c.muon = o->muon;
    c.position = choice_index(POSITION_CHOICES, o->position);
    c.attention = choice_index(ATTENTION_CHOICES, o->attention);
    c.mixer = choice_index(MIXER_CHOICES, o->mixer);
    c.envelope = c.mixer == MIXER_LINEAR ? ENVELOPE_RAISED : ENVELOPE_COSINE;
    c.S = (int)(o->splats ? o->splats : c.mixer == MIXER_LINEAR ? 16 : o->channels / o->heads / 2);
    c.covariance = choice_index(COVARIANCE_CHOICES, o->covariance);
    const char *wrong = config_head_map(&c, NULL);
    if (!wrong) wrong = config_check(&c);
    if (wrong) die_usage("%s", wrong);
    return c;
}

/* A model with tokens x (B, T), frequent and rare ones roughly as in text, and the tokens y that follow them. */
static CudaModel *bench_model(const Config *c, size_t B, uint64_t seed, int *x, int *y) {
    CudaModel *m = (CudaModel *)cuda_create(c, (int)B);
    size_t N = B * (size_t)c->T;
    float *params = (float *)xmalloc(m->total * sizeof(float));
    model_start(c, params, 1);
    cuda_write(m, BUFFER_PARAMS, params);
    free(params);
    for (size_t i = 0; i < N; i++) x[i] = (int)(c->V * pow(rng_uniform(&seed), 4));
    for (size_t i = 0; i < N; i++) y[i] = x[(i + 1) % N];
    return m;
}

/* Step 1, 2, ..., as a run's steps follow each other: cuda_result waits for it, after the next one at the latest. sums:
   of several GPUs, their gradients are added. */
static void bench_step(CudaModel *m, const int *x, const int *y, size_t B, int64_t step, bool sums) {
    Update u = {{1e-4, 1e-3}, 0.9, 0.95, 0.1, {1, 1}, step, 0.95};
    StepResult result;
    size_t T = (size_t)m->config.T;
    cuda_defer(m, true, 1);
    gsa_zero_gradients(m);
    m->expected = 1;
    gsa_forward(m, x, y, B, T);
    m->share = sums;
    gsa_backward(m, 1);
    gsa_gradient_norms(m, result.norms);
    gsa_update(m, &u, result.clamped);
    cuda_defer(m, false, 0);
}

#endif
