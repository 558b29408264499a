/* train_gsa.cu against train_gsa.c, both in this process: layers at odd shapes, then whole models of every kind the
   GPU has: logits, loss, every gradient by name, ten updates, 500 updates; then what must hold exactly. Compiled
   twice, for bf16 and for fp32. Errors are L2 norms relative to the CPU's result. Every buffer is full of NaN before
   it is written. */
#define GSA_NO_MAIN
#include "../train_gsa.cu"

#include <stdarg.h>
#include "test.h"
#ifdef _OPENMP
#include <omp.h>
#endif
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wextra" /* C code as C++ */
namespace cpu {
#include "network.h"
}
#pragma GCC diagnostic pop

/* The largest errors that pass. bf16 rounds to 2^-9 at every store; sums over many such numbers average that out. In
   whole models those of splats, frequencies and decays get twice as much: a splat's gradient is a sum of terms of
   both signs that mostly cancel, and all of them come through logits of ten and more, which rounded features move by
   0.02 (1.4e-1 seen, of decays over 67 tokens). Queries of scans get three times as much: where one splat takes
   nearly all of them, their gradients are differences of such noise (4e-2 seen; those of keys and values stay below
   6e-3). Over a million tokens the fp32 state's factor of each chunk, rounded once, has been applied 16,384 times. */
#ifdef GSA_FP32
static const char name[] = "cuda_fp32";
static const double OUTPUT = 1e-5, FEATURES = 1e-6, GRADIENT = 5e-5, QUERIES = 1e-4, SPLATS = 1e-4, WAVES = 1e-3,
                    LOSS = 1e-5, MODEL = 1e-4, COSINE = 0.999999, MODEL_SPLATS = 1e-4, MODEL_WAVES = 1e-3,
                    SPLATS_COSINE = 0.999999, STEPS = 1e-3, MILLION = 1e-4, ORTHOGONAL = 2e-4;
#else
static const char name[] = "cuda";
static const double OUTPUT = 1e-2, FEATURES = 1e-2, GRADIENT = 2e-2, QUERIES = 6e-2, SPLATS = 3e-2, WAVES = 1e-1,
                    LOSS = 5e-3, MODEL = 3e-2, COSINE = 0.999, MODEL_SPLATS = 6e-2, MODEL_WAVES = 2e-1,
                    SPLATS_COSINE = 0.998, STEPS = 5e-3, MILLION = 2e-2, ORTHOGONAL = 6e-2;
#endif

/* ---------------------------------------------------------------------- numbers here and there */

static void *device_memory[4096];
static int device_count;

template <typename Number> static Number *device_room(size_t n) { /* poisoned; lives until free_all */
    void *p;
    cudaCheck(cudaMalloc(&p, n * sizeof(Number)));
    cudaCheck(cudaMemset(p, 0xFF, n * sizeof(Number)));
    device_memory[device_count++] = p;
    return (Number *)p;
}

static void free_all(void) {
    while (device_count > 0) cudaCheck(cudaFree(device_memory[--device_count]));
    cpu::free_numbers();
}

static void round_numbers(float *x, size_t n) {
    for (size_t i = 0; i < n; i++) x[i] = (float)(floatX)x[i];
}

/* Random numbers that a floatX holds exactly. */
static float *numbers(size_t n, double deviation, uint64_t *rng) {
    float *x = cpu::numbers(n, deviation, rng);
    round_numbers(x, n);
    return x;
}

template <typename Number> static Number *upload(const float *x, size_t n) {
    Number *to = device_room<Number>(n), *rounded = (Number *)xmalloc(n * sizeof(Number));
    for (size_t i = 0; i < n; i++) rounded[i] = (Number)x[i];
    cudaCheck(cudaMemcpy(to, rounded, n * sizeof(Number), cudaMemcpyHostToDevice));
    free(rounded);
    return to;
}
static int *upload_ints(const int *x, size_t n) {
    int *to = device_room<int>(n);
    cudaCheck(cudaMemcpy(to, x, n * sizeof *x, cudaMemcpyHostToDevice));
    return to;
}

template <typename Number> static float *download(const Number *x, size_t n) {
    Number *raw = (Number *)xmalloc(n * sizeof(Number));
    float *to = cpu::numbers(n, 0, NULL);
    cudaCheck(cudaDeviceSynchronize());
    cudaCheck(cudaMemcpy(raw, x, n * sizeof(Number), cudaMemcpyDeviceToHost));
    for (size_t i = 0; i < n; i++) to[i] = (float)raw[i];
    free(raw);
    return to;
}

#define COMPARE(got, expected, n, limit, ...) compare(got, expected, n, limit, __LINE__, __VA_ARGS__)
__attribute__((format(printf, 6, 7))) static void compare(const float *got, const float *expected, size_t n,
                                                          double limit, int line, const char *format, ...) {
    char what[256];
    va_list args;
    va_start(args, format);
    vsnprintf(what, sizeof what, format, args);
    va_end(args);
    double error = relative_error(got, expected, n);
    check(error <= limit, __FILE__, line, "%s: error %.2e, limit %.0e", what, error, limit);
}

/* ---------------------------------------------------------------------- single layers */

static void test_encoder(size_t C) {
    uint64_t rng = 1;
    enum { B = 3, T = 67, V = 50, N = B * T };
    int tokens[N];
    /* one token is half of all: several segments */
    for (int i = 0; i < N; i++) tokens[i] = rng_below(&rng, 2) ? (int)rng_below(&rng, V) : 7;
    float *wte = numbers(V * C, 1, &rng), *wpe = numbers((T + 3) * C, 1, &rng), *out = cpu::numbers(N * C, 0, NULL);
    floatX *device = device_room<floatX>(N * C);
    encoder_forward(device, upload_ints(tokens, N), upload<floatX>(wte, V * C), upload<floatX>(wpe, (T + 3) * C), B, T,
                    C, 3, 0);
    cpu::encoder_forward(out, tokens, wte, wpe, B, T, C, 3);
    COMPARE(download(device, N * C), out, N * C, OUTPUT, "encoder, %zu channels", C);

    /* gradients are added to */
    float *dout = numbers(N * C, 1, &rng), *dwte = numbers(V * C, 1, &rng), *dwpe = numbers(T * C, 1, &rng);
    float *device_dwte = upload<float>(dwte, V * C), *device_dwpe = upload<float>(dwpe, T * C);
    int positions[N], starts[V + 1];
    Bucket segments[N], several[N / SEGMENT + 1];
    Buckets b = {positions, segments, several, 0, 0, 0};
    bucket_tokens(&b, tokens, N, V, starts);
    CHECK((size_t)b.sum_count <= bucket_sums(N) && b.token_count > 0, "encoder: %d sums", b.sum_count);
    Bucket *device_segments = device_room<Bucket>(N), *device_several = device_room<Bucket>(N / SEGMENT + 1);
    cudaCheck(cudaMemcpy(device_segments, segments, sizeof segments, cudaMemcpyHostToDevice));
    cudaCheck(cudaMemcpy(device_several, several, sizeof several, cudaMemcpyHostToDevice));
    b.positions = upload_ints(positions, N);
    b.segments = device_segments;
    b.tokens = device_several;
    encoder_backward(device_dwte, device_dwpe, upload<floatX>(dout, N * C), &b, device_room<float>(bucket_sums(N) * C),
                     B, T, C, 0);
    cpu::encoder_backward(dwte, dwpe, dout, tokens, B, T, C);
    COMPARE(download(device_dwte, V * C), dwte, V * C, 1e-6, "encoder, gradient of wte");
    COMPARE(download(device_dwpe, T * C), dwpe, T * C, 1e-6, "encoder, gradient of wpe");
    free_all();
}

static void test_layernorm(size_t N, size_t C) {
    uint64_t rng = 2;
    float *in = numbers(N * C, 1, &rng), *weight = numbers(C, 1, &rng), *bias = numbers(C, 1, &rng),
          *out = cpu::numbers(N * C, 0, NULL);
    float *mean = cpu::numbers(N, 0, NULL), *rstd = cpu::numbers(N, 0, NULL), *dout = numbers(N * C, 1, &rng),
          *din = numbers(N * C, 1, &rng);
    float *dweight = numbers(C, 1, &rng), *dbias = numbers(C, 1, &rng);
    for (size_t c = 0; c < C; c++) in[c] = 3; /* a constant row; one far from 0 */
    for (size_t c = 0; c < C && N > 1; c++) in[C + c] += 100;
    round_numbers(in, N * C);
    floatX *device = device_room<floatX>(N * C), *device_in = upload<floatX>(in, N * C),
           *device_din = upload<floatX>(din, N * C);
    float *device_mean = device_room<float>(N), *device_rstd = device_room<float>(N),
          *device_weight = upload<float>(weight, C);
    float *device_dweight = upload<float>(dweight, C), *device_dbias = upload<float>(dbias, C);
    layernorm_forward(device, device_mean, device_rstd, device_in, device_weight, upload<float>(bias, C), N, C, 0);
    cpu::layernorm_forward(out, mean, rstd, in, weight, bias, N, C);
    COMPARE(download(device, N * C), out, N * C, OUTPUT, "layernorm (%zu, %zu)", N, C);
    COMPARE(download(device_mean, N), mean, N, 1e-5, "layernorm (%zu, %zu), mean", N, C);
    COMPARE(download(device_rstd, N), rstd, N, 1e-4, "layernorm (%zu, %zu), rstd", N, C);
    float *sums = cpu::numbers(C, 0, NULL), *device_sums = upload<float>(sums, C);
    layernorm_backward(device_din, device_dweight, device_dbias, device_sums, device_room<float>(SUM_BLOCKS * 3 * C),
                       upload<floatX>(dout, N * C), device_in, device_weight, device_mean, device_rstd, N, C, 0);
    cpu::layernorm_backward(din, dweight, dbias, dout, in, weight, mean, rstd, N, C);
    /* that of a constant row is 300 times its neighbours' */
    COMPARE(download(device_din + C, (N - 1) * C), din + C, (N - 1) * C, GRADIENT, "layernorm (%zu, %zu), gradient", N,
            C);
    for (size_t i = 0; i < N * C; i++) sums[i % C] += din[i];
    COMPARE(download(device_sums, C), sums, C, 1e-4, "layernorm (%zu, %zu), sums of the stream's gradient", N, C);
    COMPARE(download(device_dweight, C), dweight, C, 1e-4, "layernorm (%zu, %zu), gradient of weight", N, C);
    COMPARE(download(device_dbias, C), dbias, C, 1e-5, "layernorm (%zu, %zu), gradient of bias", N, C);
    free_all();
}

/* gelu: the layer is followed, and in the backward pass preceded, by one. */
static void test_matmul(Matmul *mm, size_t N, size_t C, size_t OC, bool gelu) {
    uint64_t rng = 3;
    float *in = numbers(N * C, 1, &rng), *weight = numbers(OC * C, 0.1, &rng), *bias = numbers(OC, 1, &rng),
          *add = numbers(N * OC, 1, &rng), *out = cpu::numbers(N * OC, 0, NULL);
    float *pre = cpu::numbers(N * OC, 0, NULL);
    floatX *device = device_room<floatX>(N * OC), *device_in = upload<floatX>(in, N * C),
           *device_weight = upload<floatX>(weight, OC * C), *device_pre = device_room<floatX>(N * OC);
    matmul_forward(mm, device, device_in, device_weight, upload<floatX>(bias, OC),
                   gelu ? NULL : upload<floatX>(add, N * OC), gelu ? device_pre : NULL, N, C, OC, 0);
    cpu::matmul_forward(pre, in, weight, bias, N, C, OC);
    if (gelu) cpu::gelu_forward(out, pre, N * OC);
    for (size_t i = 0; i < N * OC && !gelu; i++) out[i] = pre[i] + add[i];
    COMPARE(download(device, N * OC), out, N * OC, OUTPUT, "matmul (%zu, %zu, %zu)%s", N, C, OC,
            gelu ? " with gelu" : "");
    if (gelu)
        COMPARE(download(device_pre, N * OC), pre, N * OC, OUTPUT, "matmul (%zu, %zu, %zu), before gelu", N, C, OC);

    float *dout = numbers(N * OC, 1, &rng), *before = numbers(N * C, 1, &rng), *din = cpu::numbers(N * C, 0, NULL),
          *dweight = numbers(OC * C, 1, &rng), *dbias = numbers(OC, 1, &rng);
    float *device_dweight = upload<float>(dweight, OC * C), *device_dbias = upload<float>(dbias, OC);
    floatX *device_din = device_room<floatX>(N * C);
    matmul_backward(mm, device_din, device_dweight, device_dbias, device_room<float>(SUM_BLOCKS * OC),
                    upload<floatX>(dout, N * OC), device_in, device_weight, gelu ? upload<floatX>(before, N * C) : NULL,
                    1, N, C, OC, 0);
    cpu::matmul_backward(din, dweight, dbias, dout, in, weight, N, C, OC, true);
    if (gelu) cpu::gelu_backward(din, din, before, N * C);
    COMPARE(download(device_din, N * C), din, N * C, GRADIENT, "matmul (%zu, %zu, %zu)%s, gradient", N, C, OC,
            gelu ? " with gelu" : "");
    COMPARE(download(device_dweight, OC * C), dweight, OC * C, GRADIENT, "matmul (%zu, %zu, %zu), gradient of weight",
            N, C, OC);
    COMPARE(download(device_dbias, OC), dbias, OC, GRADIENT, "matmul (%zu, %zu, %zu), gradient of bias", N, C, OC);
    free_all();
}

static void test_classifier(size_t V, size_t Vp) {
    uint64_t rng = 4;
    enum { N = 6 };
    float *logits = numbers(N * Vp, 3, &rng), *losses = cpu::numbers(N, 0, NULL), *lse = cpu::numbers(N, 0, NULL);
    int targets[N] = {0, (int)V - 1, 40, 3, 5, -1};
    for (size_t i = 0; i < N; i++)
        for (size_t v = V; v < Vp; v++) logits[i * Vp + v] = v % 2 ? NAN : INFINITY; /* padding means nothing */
    logits[3 * Vp + 3] = 300;
    logits[4 * Vp + 5] = -300;
    round_numbers(logits, N * Vp);
    floatX *device = upload<floatX>(logits, N * Vp);
    float *device_losses = device_room<float>(N);
    fused_classifier(device, device_losses, upload_ints(targets, N), 0.25f, N, V, Vp, 0);
    cpu::classifier_forward(losses, lse, logits, targets, N, V, Vp);
    cpu::classifier_backward(logits, lse, targets, 0.25f, N, V, Vp);
    COMPARE(download(device_losses, N), losses, N, 1e-6, "losses of %zu tokens", V);
    COMPARE(download(device, N * Vp), logits, N * Vp, OUTPUT, "gradients of %zu logits", Vp);
    free_all();
}

/* ---------------------------------------------------------------------- models */

static Config make_config(int attention, const char *heads, int position, int covariance, int envelope, int HS, int S,
                          int window, int mixer, int objective) {
    Config c;
    memset(&c, 0, sizeof c);
    c.T = 70;
    c.V = 77;
    c.Vp = 80;
    c.L = 2;
    c.NH = 3;
    c.C = 3 * HS;
    c.S = S;
    c.attention = attention;
    c.position = position;
    c.covariance = covariance;
    c.envelope = envelope;
    c.window = window;
    c.mixer = mixer;
    c.objective = objective;
    const char *problem = config_head_map(&c, heads);
    if (!problem) problem = config_check(&c);
    if (!problem) problem = cuda_config_check(&c);
    if (problem) die("%s", problem);
    return c;
}

static const struct {
    const char *name;
    int attention;
    const char *heads;
    int position, covariance, envelope, HS, S, window, mixer, objective, raw;
} kinds[] = {
    {"standard, learned", ATTENTION_STANDARD, NULL, POSITION_LEARNED, COVARIANCE_ISO, ENVELOPE_COSINE, 64, 1, 0,
     MIXER_SOFTMAX, OBJECTIVE_LM, 0},
    {"standard, rope", ATTENTION_STANDARD, NULL, POSITION_ROPE, COVARIANCE_ISO, ENVELOPE_COSINE, 32, 1, 0,
     MIXER_SOFTMAX, OBJECTIVE_LM, 0},
    {"standard, both, window", ATTENTION_STANDARD, NULL, POSITION_BOTH, COVARIANCE_ISO, ENVELOPE_COSINE, 128, 1, 19,
     MIXER_SOFTMAX, OBJECTIVE_LM, 0},
    {"gsa, cosine", ATTENTION_GSA, NULL, POSITION_ROPE, COVARIANCE_ISO, ENVELOPE_COSINE, 64, 32, 0, MIXER_SOFTMAX,
     OBJECTIVE_LM, 0},
    {"gsa, 5 splats, diagonal", ATTENTION_GSA, NULL, POSITION_LEARNED, COVARIANCE_DIAG, ENVELOPE_COSINE, 32, 5, 0,
     MIXER_SOFTMAX, OBJECTIVE_LM, 0},
    {"gsa, no envelope", ATTENTION_GSA, NULL, POSITION_ROPE, COVARIANCE_ISO, ENVELOPE_NONE, 64, 50, 0, MIXER_SOFTMAX,
     OBJECTIVE_LM, 0},
    {"gsa, large heads", ATTENTION_GSA, NULL, POSITION_ROPE, COVARIANCE_DIAG, ENVELOPE_COSINE, 128, 64, 0,
     MIXER_SOFTMAX, OBJECTIVE_LM, 0},
    {"hybrid, learned", ATTENTION_HYBRID, NULL, POSITION_LEARNED, COVARIANCE_ISO, ENVELOPE_COSINE, 64, 16, 0,
     MIXER_SOFTMAX, OBJECTIVE_LM, 0},
    {"hybrid, rope, map, window", ATTENTION_HYBRID, "0:0-1,1:2", POSITION_ROPE, COVARIANCE_DIAG, ENVELOPE_COSINE, 64,
     32, 33, MIXER_SOFTMAX, OBJECTIVE_LM, 0},
    {"augment", ATTENTION_AUGMENT, "2", POSITION_ROPE, COVARIANCE_ISO, ENVELOPE_COSINE, 32, 16, 0, MIXER_SOFTMAX,
     OBJECTIVE_LM, 0},
    {"gsa, full", ATTENTION_GSA, NULL, POSITION_ROPE, COVARIANCE_FULL, ENVELOPE_COSINE, 32, 8, 0, MIXER_SOFTMAX,
     OBJECTIVE_LM, 0},
    {"hybrid, full, no envelope", ATTENTION_HYBRID, NULL, POSITION_LEARNED, COVARIANCE_FULL, ENVELOPE_NONE, 64, 10, 0,
     MIXER_SOFTMAX, OBJECTIVE_LM, 0},
    {"linear", ATTENTION_GSA, NULL, POSITION_ROPE, COVARIANCE_ISO, ENVELOPE_RAISED, 64, 16, 0, MIXER_LINEAR,
     OBJECTIVE_LM, 0},
    {"linear, 5 splats, diagonal, decay", ATTENTION_GSA, NULL, POSITION_LEARNED, COVARIANCE_DIAG, ENVELOPE_DECAY, 32, 5,
     0, MIXER_LINEAR, OBJECTIVE_LM, 0},
    {"linear, map, window, large heads", ATTENTION_HYBRID, "0:0-1,1:2", POSITION_ROPE, COVARIANCE_ISO, ENVELOPE_RAISED,
     128, 32, 19, MIXER_LINEAR, OBJECTIVE_LM, 0},
    {"linear, decay, full, large heads", ATTENTION_AUGMENT, "1", POSITION_ROPE, COVARIANCE_FULL, ENVELOPE_DECAY, 128, 8,
     0, MIXER_LINEAR, OBJECTIVE_LM, 0},
    {"extend", ATTENTION_EXTEND, NULL, POSITION_ROPE, COVARIANCE_ISO, ENVELOPE_RAISED, 64, 8, 19, MIXER_LINEAR,
     OBJECTIVE_LM, 0},
    {"extend, map, learned, diagonal", ATTENTION_EXTEND, "0:1,1:0-1", POSITION_LEARNED, COVARIANCE_DIAG, ENVELOPE_NONE,
     64, 20, 33, MIXER_LINEAR, OBJECTIVE_LM, 0},
    {"encoder, hybrid, window", ATTENTION_HYBRID, NULL, POSITION_ROPE, COVARIANCE_ISO, ENVELOPE_COSINE, 64, 16, 19,
     MIXER_SOFTMAX, OBJECTIVE_MLM, 0},
    {"encoder, linear", ATTENTION_HYBRID, NULL, POSITION_ROPE, COVARIANCE_ISO, ENVELOPE_RAISED, 32, 16, 0, MIXER_LINEAR,
     OBJECTIVE_MLM, 0},
    {"encoder, linear, diagonal", ATTENTION_GSA, NULL, POSITION_LEARNED, COVARIANCE_DIAG, ENVELOPE_RAISED, 64, 32, 0,
     MIXER_LINEAR, OBJECTIVE_MLM, 0},
    {"no sphere, cosine", ATTENTION_GSA, NULL, POSITION_ROPE, COVARIANCE_ISO, ENVELOPE_COSINE, 64, 32, 0, MIXER_SOFTMAX,
     OBJECTIVE_LM, 1},
    {"no sphere, linear, diagonal", ATTENTION_HYBRID, NULL, POSITION_ROPE, COVARIANCE_DIAG, ENVELOPE_RAISED, 64, 16, 19,
     MIXER_LINEAR, OBJECTIVE_LM, 1},
    {"no sphere, linear, 20 splats", ATTENTION_GSA, NULL, POSITION_ROPE, COVARIANCE_ISO, ENVELOPE_DECAY, 32, 20, 0,
     MIXER_LINEAR, OBJECTIVE_LM, 1},
    {"no sphere, full", ATTENTION_HYBRID, NULL, POSITION_LEARNED, COVARIANCE_FULL, ENVELOPE_COSINE, 32, 8, 0,
     MIXER_SOFTMAX, OBJECTIVE_LM, 1},
};
enum { KINDS = sizeof kinds / sizeof *kinds };
static Config kind_config(int k) {
    Config c =
        make_config(kinds[k].attention, kinds[k].heads, kinds[k].position, kinds[k].covariance, kinds[k].envelope,
                    kinds[k].HS, kinds[k].S, kinds[k].window, kinds[k].mixer, kinds[k].objective);
    c.raw = kinds[k].raw;
    /* of all heads with rotations, but for kind 1, so that both are seen */
    c.gain = k != 1 && c.position != POSITION_LEARNED;
    if (c.gain && !config_gains(&c)) c.gain = GAIN_NONE;
    /* of all cosines, but for one kind of each mixer */
    c.phase = config_has_cosine(&c) && config_gsa_heads(&c) && k != 9 && k != 22 ? PHASE_LEARNED : PHASE_NONE;
    c.rope = c.gain && k != 2 ? ROPE_LEARNED : ROPE_FIXED;
    /* half and all in turn, where they fit, but for two linear kinds with few large heads, where bf16 leaves little of
       some gradients as it is; large heads with gates are kind 2 */
    bool fits = c.attention != ATTENTION_EXTEND && c.objective == OBJECTIVE_LM && k != 14 && k != 15;
    c.forget = !fits ? FORGET_NONE : k % 3 == 1 ? FORGET_HALF : FORGET_ALL;
    if (c.forget && !config_gates(&c)) c.forget = FORGET_NONE;
    return c;
}

/* Gradients whose terms nearly cancel, so that more of them is rounding. */
static bool is_wave(int tensor) {
    return tensor == TENSOR_log_theta || tensor == TENSOR_log_delta || tensor == TENSOR_psi ||
           tensor == TENSOR_log_rope;
}

/* Gradients of few numbers, each a sum over all tokens of terms of both signs, of which bf16 leaves less. */
static bool is_sum(const Tensor *t, int tensor) {
    return groups[t->group].clip == CLIP_SPLATS || t->group == GROUP_CENTRE || tensor == TENSOR_forgetb;
}

/* The same model in both programs, away from its symmetric start, and its tokens. What products read is rounded
   alike. */
typedef struct {
    cpu::GSA *c;
    CudaModel *g;
    int *x, *y;
    size_t B, T;
} Pair;

static Pair make_pair(const Config *c, size_t B, uint64_t seed) {
    Pair p;
    uint64_t rng = rng_mix(seed, 1000);
    p.B = B;
    p.T = c->T;
    p.c = cpu::gsa_create(c, B);
    p.g = gsa_create_cuda(c, B);
    /* all that a pass computes */
    cudaCheck(cudaMemset(p.g->a.residual, 0xFF, (size_t)((char *)p.g->a.result - (char *)p.g->a.residual)));
    model_start(c, p.c->params, seed);
    for (int i = 0; i < NUM_TENSORS; i++) {
        const Tensor *t = &p.c->tensors[i];
        float *w = p.c->params + t->offset;
        size_t n = i == TENSOR_wte ? (size_t)c->V * c->C : t->size; /* the padding of the vocabulary stays 0 */
        for (size_t k = 0; k < n && t->group != GROUP_FIXED; k++)
            w[k] += (float)((t->group == GROUP_MATRIX ? 0.05 : 0.2) * rng_normal(&rng));
        bool splat = groups[t->group].clip == CLIP_SPLATS || t->group == GROUP_CENTRE;
        if (!splat) round_numbers(w, n);
    }
    for (size_t i = 0; i < p.c->tensors[TENSOR_psi].size; i++) /* within the linear mixer's bound, and at it */
        p.c->p.psi[i] = (float)(i % (size_t)c->S ? 3 * rng_uniform(&rng) - 1.5 : SPLAT_PHASE_MAX);
    /* else logits are in the hundreds */
    for (size_t i = 0; c->raw && c->mixer == MIXER_SOFTMAX && i < p.c->tensors[TENSOR_log_alpha].size; i++)
        p.c->p.log_alpha[i] -= 5;
    /* |x|^2 is about HS: splats as much wider */
    for (size_t i = 0; c->raw && i < p.c->tensors[TENSOR_log_precision].size; i++) {
        size_t row = 0, k = i % (size_t)config_precisions(c), HS = (size_t)config_head_size(c);
        while (c->covariance == COVARIANCE_FULL && k > row) k -= ++row;
        if (c->covariance == COVARIANCE_FULL && k < row) p.c->p.log_precision[i] /= sqrtf((float)HS);
        else p.c->p.log_precision[i] -= (c->covariance == COVARIANCE_FULL ? 0.5f : 1) * logf((float)HS);
    }
    /* a dead splat in every head */
    for (int g = 0; g < config_gsa_heads(c) && c->S > 1; g++) p.c->p.alive[g * c->S + (g + 1) % c->S] = 0;
    cuda_write(p.g, BUFFER_PARAMS, p.c->params);
    cpu::gsa_scales(p.c);
    gsa_scales(p.g);
    cpu::gsa_rope_waves(p.c, p.c->a.rope_waves, p.T, 0);
    rope_tables(p.g);
    p.x = (int *)xmalloc(2 * B * p.T * sizeof(int));
    p.y = p.x + B * p.T;
    cpu::random_tokens(p.x, B * p.T, c->V, &rng);
    cpu::random_tokens(p.y, B * p.T, c->V, &rng);
    return p;
}
static void free_pair(Pair *p) {
    cpu::gsa_destroy(p->c);
    gsa_destroy(p->g);
    free(p->x);
    free_all();
}

/* (B, NH, T, HS) as the CPU has features, from columns of a device's rows */
static float *heads_first(const float *rows, size_t stride, size_t column, size_t B, size_t T, size_t NH, size_t HS) {
    float *to = cpu::numbers(B * NH * T * HS, 0, NULL);
    for (size_t i = 0; i < B * T; i++)
        for (size_t h = 0; h < NH; h++)
            memcpy(to + (((i / T) * NH + h) * T + i % T) * HS, rows + i * stride + column + h * HS, HS * sizeof(float));
    return to;
}

/* Softmax and scans of layer l. */
static void mixers_forward(CudaModel *g, size_t l, size_t B, size_t T) {
    CudaSizes z = g->sizes;
    CudaActivations block = block_activations(g, l, B * T);
    gates_local(g, block, l, B, T);
    if (attends(g, l))
        attention_forward(block.att, block.att_lse, attention_input(g, l, B * T), B, T, z.NH, z.HS, g->stream);
    scans_forward(g, block, l, B, T);
}

/* rows (B T, stride) -> the columns of head h from `column` on, (B, T, HS) */
static float *head_columns(const float *rows, size_t stride, size_t column, size_t B, size_t T, size_t HS) {
    return heads_first(rows, stride, column, B, T, 1, HS);
}

/* The gradients of layer l's splats, gains and rotations on both sides; limits are those of single kernels. A gain's is
   a sum over tokens whose terms nearly cancel, as those of frequencies do. */
static void compare_splats(const Pair *p, size_t l, const char *what) {
    const Config *c = &p->c->config;
    const float *grads = cuda_read(p->g, BUFFER_GRADS);
    size_t first = (size_t)config_gsa_before(c, (int)l, 0), heads = (size_t)config_gsa_before(c, (int)l + 1, 0) - first;
    size_t gain = (size_t)config_standard_before(c, (int)l, 0),
           gains = (size_t)config_standard_before(c, (int)l + 1, 0) - gain;
    if (c->gain && gains)
        COMPARE(grads + p->c->tensors[TENSOR_log_gain].offset + gain, p->c->dp.log_gain + gain, gains, WAVES,
                "%s, T %zu: gradient of log_gain", what, p->T);
    size_t half = (size_t)config_head_size(c) / 2;
    if (c->rope && gains)
        COMPARE(grads + p->c->tensors[TENSOR_log_rope].offset + gain * half, p->c->dp.log_rope + gain * half,
                gains * half, (p->T < 100 ? 3 : 1) * WAVES, "%s, T %zu: gradient of log_rope", what, p->T);
    size_t few = config_head_size(c) == 128 ? 200 : 100; /* tokens: of fewer bf16 leaves less */
    for (int i = 0; i < NUM_TENSORS && heads; i++) {
        const Tensor *t = &p->c->tensors[i];
        bool waves = is_wave(i);
        if (!t->size || t->group == GROUP_FIXED || !tensor_is_splat(i)) continue;
        size_t each = tensor_row(t);
        COMPARE(grads + t->offset + first * each, p->c->grads + t->offset + first * each, heads * each,
                waves ? (p->T < few ? 3 : 1) * WAVES : SPLATS, "%s, T %zu: gradient of %s", what, p->T, t->name);
    }
}

/* Feature maps, attention and scans of layer 1, by themselves: the same q, k, v to both programs. Each step compares
   what both made of the same input, then gives the GPU's result to the CPU, so that the next step is compared alone. */
typedef struct {
    Config config;
    const char *what;
    Pair p;
    CudaSizes z;
    CudaActivations block; /* layer l's on the GPU */
    size_t B, T, N, A, l;
    int kind_of[MAX_HEADS];
    bool from[MAX_HEADS]; /* its q and k come from features */
    bool mapped, causal;  /* mapped: some do */
    float *qkv, *dout;    /* (N, 3 A), (N, A) */
    float *input;         /* (N, C), of the gates */
    size_t gates;         /* of layer l */
    float *features;      /* (N, 2 A), the GPU's; NULL without mapped */
} HeadsTest;

static HeadsTest make_heads(int kind, size_t B, size_t T) {
    HeadsTest x;
    x.config = kind_config(kind);
    x.config.T = (int)T;
    x.what = kinds[kind].name;
    x.p = make_pair(&x.config, B, 7);
    x.z = x.p.g->sizes;
    x.causal = x.config.objective == OBJECTIVE_LM;
    x.B = B;
    x.T = T;
    x.N = B * T;
    x.A = x.z.A;
    x.l = 1;
    uint64_t rng = 5;
    x.qkv = numbers(x.N * 3 * x.A, 1, &rng);
    x.dout = numbers(x.N * x.A, 1, &rng);
    /* a short query; the first one has no gradient */
    for (size_t k = 0; k < x.z.HS; k++) x.qkv[(T > 9 ? 9 : 0) * 3 * x.A + k] *= 1e-3f;
    round_numbers(x.qkv, x.N * 3 * x.A);
    x.input = numbers(x.N * x.z.C, 1, &rng);
    x.gates = layer_gates(&x.config, x.l);
    x.block = block_activations(x.p.g, x.l, x.N);
    for (size_t h = 0; h < x.z.NH; h++) {
        x.kind_of[h] = config_head_kind(&x.config, (int)x.l, (int)h);
        x.from[h] = x.kind_of[h] == HEAD_SPLAT || (x.kind_of[h] != HEAD_SCAN && x.config.position != POSITION_LEARNED);
    }
    x.mapped = head_list(&x.config, x.l, HEAD_SPLAT).count || head_list(&x.config, x.l, HEAD_STANDARD).count;
    x.features = NULL;
    return x;
}

/* Head h of the CPU's features (B, NH, T, HS), for all sequences: (B, T, HS). */
static float *cpu_head(const HeadsTest *x, const float *features, size_t h) {
    size_t each = x->T * x->z.HS;
    float *to = cpu::numbers(x->B * each, 0, NULL);
    for (size_t b = 0; b < x->B; b++) memcpy(to + b * each, features + (b * x->z.NH + h) * each, each * sizeof(float));
    return to;
}

/* The CPU gets head h's features from the GPU's rows (N, 2 A); side 0: queries, 1: keys. */
static void set_cpu_head(const HeadsTest *x, float *features, const float *rows, size_t side, size_t h) {
    size_t T = x->T, HS = x->z.HS;
    for (size_t i = 0; i < x->N; i++)
        memcpy(features + (((i / T) * x->z.NH + h) * T + i % T) * HS, rows + i * 2 * x->A + side * x->A + h * HS,
               HS * sizeof(float));
}

static void check_features(HeadsTest *x) {
    cpu::GSA *c = x->p.c;
    CudaModel *g = x->p.g;
    size_t B = x->B, T = x->T, N = x->N, A = x->A, HS = x->z.HS;
    cpu::gsa_splat_waves(c, c->a.splat_waves, T, 0);
    cpu::features_forward(c, c->a.fq, c->a.fk, x->qkv, x->l, B, T, c->a.rope_waves, c->a.splat_waves);
    cudaCheck(cudaMemcpy(x->block.qkv, upload<floatX>(x->qkv, N * 3 * A), N * 3 * A * sizeof(floatX),
                         cudaMemcpyDeviceToDevice));
    splat_tables(g);
    if (x->mapped) cudaCheck(cudaMemset(x->block.features, 0xFF, N * 2 * A * sizeof(floatX)));
    features_forward(g, x->block.features, x->block.qkv, x->l, B, T);
    /* heads without a feature map have q and k themselves on the CPU */
    x->features = x->mapped ? download(x->block.features, N * 2 * A) : NULL;
    for (size_t h = 0; h < x->z.NH; h++)
        for (size_t side = 0; side < 2 && x->from[h]; side++)
            COMPARE(head_columns(x->features, 2 * A, side * A + h * HS, B, T, HS),
                    cpu_head(x, side ? c->a.fk : c->a.fq, h), N * HS,
                    FEATURES * (x->kind_of[h] != HEAD_SPLAT               ? 1
                                : x->config.covariance == COVARIANCE_FULL ? 10
                                                                          : 3),
                    "%s, T %zu: features of head %zu, %s", x->what, T, h, side ? "keys" : "queries");
    for (size_t h = 0; h < x->z.NH && x->mapped; h++)
        for (size_t side = 0; side < 2 && x->from[h]; side++)
            set_cpu_head(x, side ? c->a.fk : c->a.fq, x->features, side, h);
}

/* ln f (N, gates) as the CPU has it, from the GPU's c */
static float *device_gates(const HeadsTest *x) {
    size_t n = x->N * x->gates, T = x->T;
    double *c = (double *)xmalloc(n * sizeof(double));
    float *to = cpu::numbers(n, 0, NULL);
    cudaCheck(cudaDeviceSynchronize());
    cudaCheck(cudaMemcpy(c, x->block.forget, n * sizeof(double), cudaMemcpyDeviceToHost));
    for (size_t i = 0; i < n; i++) { /* (B, gates, T) */
        size_t t = i % T, gate = i / T % x->gates, b = i / T / x->gates;
        to[(b * T + t) * x->gates + gate] = (float)(t ? c[i] - c[i - 1] : c[i]);
    }
    free(c);
    return to;
}

static void check_gates(const HeadsTest *x) {
    cpu::GSA *c = x->p.c;
    size_t N = x->N, C = x->z.C, first = (size_t)config_gates_before(&x->config, (int)x->l, 0);
    if (!x->gates) return;
    cpu::forget_forward(c->a.log_forget, x->input, c->p.forgetw + first * C, c->p.forgetb + first, N, C, x->gates);
    cudaCheck(
        cudaMemcpy(x->block.ln1, upload<floatX>(x->input, N * C), N * C * sizeof(floatX), cudaMemcpyDeviceToDevice));
    gates_forward(x->p.g, x->block, x->l, x->B, x->T);
    gates_local(x->p.g, x->block, x->l, x->B, x->T);
    float *got = device_gates(x);
    COMPARE(got, c->a.log_forget, N * x->gates, 1e-5, "%s, T %zu: ln f", x->what, x->T);
    memcpy(c->a.log_forget, got, N * x->gates * sizeof(float));
}

/* d ln f times 1 - f, then the gradients of the gates' weights, biases and input. */
static void check_gates_backward(const HeadsTest *x) {
    cpu::GSA *c = x->p.c;
    CudaModel *g = x->p.g;
    size_t N = x->N, C = x->z.C, T = x->T, first = (size_t)config_gates_before(&x->config, (int)x->l, 0);
    if (!x->gates || T < 2) return;
    float *dx = cpu::numbers(N * C, 0, NULL), *du = cpu::numbers(N * x->gates, 0, NULL);
    cpu::forget_backward(dx, c->dp.forgetw + first * C, c->dp.forgetb + first, c->a.dlog_forget, c->a.log_forget,
                         x->input, c->p.forgetw + first * C, N, C, x->gates);
    cudaCheck(cudaMemset(g->a.dln, 0, N * C * sizeof(floatX)));
    gates_backward(g, g->a.dln, x->block, x->l, x->B, T);
    float *rows = download(g->a.dforget, N * x->gates);
    for (size_t i = 0; i < N * x->gates; i++)
        du[(i / T / x->gates * T + i % T) * x->gates + i / T % x->gates] = rows[i];
    COMPARE(du, c->a.dlog_forget, N * x->gates, WAVES, "%s, T %zu: gradient of gates", x->what, T);
    COMPARE(download(g->a.dln, N * C), dx, N * C, WAVES, "%s, T %zu: gradient of gates' input", x->what, T);
    const float *grads = cuda_read(g, BUFFER_GRADS);
    COMPARE(grads + c->tensors[TENSOR_forgetw].offset + first * C, c->dp.forgetw + first * C, x->gates * C, WAVES,
            "%s, T %zu: gradient of forgetw", x->what, T);
    COMPARE(grads + c->tensors[TENSOR_forgetb].offset + first, c->dp.forgetb + first, x->gates, WAVES,
            "%s, T %zu: gradient of forgetb", x->what, T);
}

static void check_attention(const HeadsTest *x) {
    cpu::GSA *c = x->p.c;
    CudaModel *g = x->p.g;
    size_t B = x->B, T = x->T, N = x->N, A = x->A, NH = x->z.NH, HS = x->z.HS, l = x->l;
    cpu::Gates gates = cpu::layer_gates(c, &c->a, l); /* as if the first block's numbers were this layer's */
    cpu::attention_forward(c->a.att, c->a.att_lse, c->a.fq, c->a.fk, x->qkv, c->scale + l * NH, c->window + l * NH,
                           &gates, x->causal, B, T, NH, HS);
    cudaCheck(cudaMemset(x->block.att, 0xFF, N * A * sizeof(floatX)));
    if (attends(g, l))
        attention_forward(x->block.att, x->block.att_lse, attention_input(g, l, N), B, T, NH, HS, g->stream);
    float *att = download(x->block.att, N * A), *lse = download(x->block.att_lse, N * NH);
    for (size_t h = 0; h < NH; h++) {
        if (x->kind_of[h] == HEAD_SCAN) continue;
        COMPARE(head_columns(att, A, h * HS, B, T, HS), head_columns(c->a.att, A, h * HS, B, T, HS), N * HS, OUTPUT,
                "%s, T %zu: attention, head %zu", x->what, T, h);
        for (size_t b = 0; b < B; b++)
            COMPARE(lse + (b * NH + h) * T, c->a.att_lse + (b * NH + h) * T, T, OUTPUT, "%s, T %zu: lse, head %zu",
                    x->what, T, h);
    }
    for (size_t i = 0; i < N * A; i++)
        if (isfinite(att[i])) c->a.att[i] = att[i];
    for (size_t i = 0; i < N * NH; i++)
        if (isfinite(lse[i])) c->a.att_lse[i] = lse[i];
}

static void check_scans(const HeadsTest *x) {
    cpu::GSA *c = x->p.c;
    size_t B = x->B, T = x->T, N = x->N, A = x->A, NH = x->z.NH, HS = x->z.HS;
    cpu::scans_forward(c, c->a.att, c->a.att_lse, c->a.scan_rho, x->qkv, x->l, B, T);
    scans_forward(x->p.g, x->block, x->l, B, T);
    float *att = download(x->block.att, N * A), *lse = download(x->block.att_lse, N * NH),
          *rho = scan_list(&x->config, x->l).count > 0 ? download(x->block.scan_rho, N * NH) : NULL;
    for (size_t h = 0; h < NH; h++) {
        if (x->kind_of[h] != HEAD_SCAN && x->kind_of[h] != HEAD_EXTEND) continue;
        COMPARE(head_columns(att, A, h * HS, B, T, HS), head_columns(c->a.att, A, h * HS, B, T, HS), N * HS, OUTPUT,
                "%s, T %zu: scan, head %zu", x->what, T, h);
        for (size_t b = 0; b < B; b++) {
            size_t row = (b * NH + h) * T;
            if (x->kind_of[h] == HEAD_EXTEND)
                COMPARE(lse + row, c->a.att_lse + row, T, OUTPUT, "%s, T %zu: merged lse, head %zu", x->what, T, h);
            if (x->kind_of[h] == HEAD_SCAN || T > (size_t)x->config.window)
                COMPARE(rho + row, c->a.scan_rho + row, T, 3 * OUTPUT, "%s, T %zu: rho, head %zu", x->what, T, h);
            memcpy(c->a.scan_rho + row, rho + row, T * sizeof(float));
        }
    }
    memcpy(c->a.att, att, N * A * sizeof(float));
    memcpy(c->a.att_lse, lse, N * NH * sizeof(float));
}

static void check_attention_backward(const HeadsTest *x) {
    cpu::GSA *c = x->p.c;
    CudaModel *g = x->p.g;
    size_t B = x->B, T = x->T, N = x->N, A = x->A, NH = x->z.NH, HS = x->z.HS, l = x->l;
    cpu::Gates gates = cpu::layer_gates(c, &c->a, l);
    cpu::attention_backward(c->a.dfq, c->a.dfk, c->a.dqkv, x->dout, c->a.att, c->a.att_lse, c->a.fq, c->a.fk, x->qkv,
                            c->scale + l * NH, c->window + l * NH, &gates, x->causal, B, T, NH, HS);
    cudaCheck(cudaMemset(g->a.dqkv, 0xFF, N * 3 * A * sizeof(floatX)));
    if (x->mapped) cudaCheck(cudaMemset(g->a.dfeatures, 0xFF, N * 2 * A * sizeof(floatX)));
    cudaCheck(cudaMemcpy(g->a.datt, upload<floatX>(x->dout, N * A), N * A * sizeof(floatX), cudaMemcpyDeviceToDevice));
    if (attends(g, l))
        attention_backward(g->a.dqkv, g->a.dfeatures, g->a.delta, g->a.datt, x->block.att, x->block.att_lse,
                           attention_input(g, l, N), B, T, NH, HS, g->stream);
    float *dqkv = download(g->a.dqkv, N * 3 * A), *drows = x->mapped ? download(g->a.dfeatures, N * 2 * A) : NULL;
    for (size_t h = 0; h < NH; h++) {
        if (x->kind_of[h] == HEAD_SCAN) continue;
        COMPARE(head_columns(dqkv, 3 * A, 2 * A + h * HS, B, T, HS),
                head_columns(c->a.dqkv, 3 * A, 2 * A + h * HS, B, T, HS), N * HS, GRADIENT,
                "%s, T %zu: attention, gradient of head %zu's values", x->what, T, h);
        for (size_t side = 0; side < 2; side++) {
            float *features = side ? c->a.dfk : c->a.dfq, *expected = cpu_head(x, features, h),
                  *got = head_columns(x->from[h] ? drows : dqkv, (x->from[h] ? 2 : 3) * A, side * A + h * HS, B, T, HS);
            if (T > 1)
                COMPARE(got, expected, N * HS, GRADIENT, "%s, T %zu: attention, gradient of head %zu's %s", x->what, T,
                        h, side ? "keys" : "queries");
            if (x->from[h]) set_cpu_head(x, features, drows, side, h);
        }
    }
}

static void check_features_backward(const HeadsTest *x) {
    cpu::GSA *c = x->p.c;
    CudaModel *g = x->p.g;
    size_t B = x->B, T = x->T, N = x->N, A = x->A, HS = x->z.HS;
    c->grads = (float *)xcalloc(c->total, sizeof(float));
    cpu::point_parameters(&c->dp, c->grads, c->tensors);
    memset(c->a.moments, 0, B * x->z.NH * cpu::moments_size(x->z.S, x->z.P, HS) * sizeof(float));
    cpu::features_backward(c, c->a.dqkv, c->a.dfq, c->a.dfk, c->a.fq, c->a.fk, x->qkv, x->l, B, T);
    features_backward(g, g->a.dqkv, g->a.dfeatures, x->block.features, x->block.qkv, x->l, B, T);
    float *dqkv = download(g->a.dqkv, N * 3 * A);
    for (size_t h = 0; h < x->z.NH && T > 1; h++)
        for (size_t side = 0; side < 2 && x->kind_of[h] != HEAD_SCAN; side++)
            COMPARE(head_columns(dqkv, 3 * A, side * A + h * HS, B, T, HS),
                    head_columns(c->a.dqkv, 3 * A, side * A + h * HS, B, T, HS), N * HS, GRADIENT,
                    "%s, T %zu: gradient of head %zu's %s", x->what, T, h, side ? "keys" : "queries");
    bool scans = scan_list(&x->config, x->l).count > 0; /* they add to the GPU's on both sides */
    for (size_t i = 0; i < N * 3 * A && scans; i++) c->a.dqkv[i] = isfinite(dqkv[i]) ? dqkv[i] : 0;
}

static void check_scans_backward(const HeadsTest *x) {
    cpu::GSA *c = x->p.c;
    size_t B = x->B, T = x->T, N = x->N, A = x->A, HS = x->z.HS;
    cpu::scans_backward(c, c->a.dqkv, x->dout, c->a.att, c->a.scan_rho, x->qkv, x->l, B, T);
    scans_backward(x->p.g, x->block, x->l, B, T);
    float *dqkv = download(x->p.g->a.dqkv, N * 3 * A);
    for (size_t h = 0; h < x->z.NH; h++)
        for (size_t part = 0; part < 3; part++)
            if ((T > 1 || part == 2) && (x->kind_of[h] == HEAD_SCAN || x->kind_of[h] == HEAD_EXTEND)) {
                float *got = head_columns(dqkv, 3 * A, part * A + h * HS, B, T, HS),
                      *expected = head_columns(c->a.dqkv, 3 * A, part * A + h * HS, B, T, HS);
                /* the short query, whose gradient is a thousand times the others' */
                size_t brief = (T > 9 ? 9 : 0) * HS;
                for (size_t k = 0; k < HS && h == 0 && part == 0 && !x->config.raw; k++) {
                    got[brief + k] *= 1e-3f;
                    expected[brief + k] *= 1e-3f;
                }
                COMPARE(got, expected, N * HS, part ? GRADIENT : QUERIES, "%s, T %zu: scan, gradient of head %zu's %s",
                        x->what, T, h,
                        part == 2 ? "values"
                        : part    ? "keys"
                                  : "queries");
            }
    cpu::splats_backward(c, x->l, B);
    if (T > 1 && !(x->config.attention == ATTENTION_EXTEND && T <= (size_t)x->config.window))
        compare_splats(&x->p, x->l, x->what);
}

static void test_heads(int kind, size_t B, size_t T) {
    HeadsTest x = make_heads(kind, B, T);
    check_features(&x);
    check_gates(&x);
    check_attention(&x);
    check_scans(&x);
    check_attention_backward(&x);
    check_features_backward(&x);
    check_gates_backward(&x);
    check_scans_backward(&x);
    free_pair(&x.p);
}

static double cosine(const float *a, const float *b, size_t n) {
    double ab = 0, aa = 0, bb = 0;
    for (size_t i = 0; i < n; i++) {
        ab += (double)a[i] * b[i];
        aa += (double)a[i] * a[i];
        bb += (double)b[i] * b[i];
    }
    return ab / sqrt(aa * bb);
}

/* Every gradient by its tensor's name: how far it is off, and in which direction. */
static void compare_gradients(const Pair *p, const char *what) {
    const float *grads = cuda_read(p->g, BUFFER_GRADS);
    for (int i = 0; i < NUM_TENSORS; i++) {
        const Tensor *t = &p->c->tensors[i];
        if (!t->size || t->group == GROUP_FIXED) continue;
        bool waves = is_wave(i), splat = is_sum(t, i);
        COMPARE(grads + t->offset, p->c->grads + t->offset, t->size,
                waves   ? MODEL_WAVES
                : splat ? MODEL_SPLATS
                        : MODEL,
                "%s: gradient of %s", what, t->name);
        double along = cosine(grads + t->offset, p->c->grads + t->offset, t->size);
        CHECK(along >= (waves   ? 1 - 10 * (1 - COSINE)
                        : splat ? SPLATS_COSINE
                                : COSINE),
              "%s: gradient of %s, cosine %.7f", what, t->name, along);
    }
}

/* What adaptation watches: sums of |dL / d ln phi|, of all tokens of so small a batch. */
static void compare_watched(const Pair *p, size_t B, size_t T, const char *what) {
    const Tensor *alive = &p->c->tensors[TENSOR_alive];
    if (!alive->size || B * T > 2048) return;
    p->c->watch = true;
    cuda_watch(p->g, true);
    cpu::gsa_zero_gradients(p->c);
    cuda_zero_gradients(p->g);
    cpu::gsa_forward(p->c, p->x, p->y, B, T);
    cuda_forward(p->g, p->x, p->y, (int)B, (int)T);
    cpu::gsa_backward(p->c, 0.5);
    cuda_backward(p->g, 0.5);
    COMPARE(cuda_read(p->g, BUFFER_GRADS) + alive->offset, p->c->grads + alive->offset, alive->size, 0.05,
            "%s: sums of absolute gradients of the splats", what);
    p->c->watch = false;
    cuda_watch(p->g, false);
}

/* The CPU's loss and gradients with what the GPU multiplies by: copies of the weights, rounded to a floatX. Many steps
   are below half a unit in their last place, so that copies stay behind their masters: on the CPU alone that moves the
   third loss of "standard, both, window" by 0.07 where steps are 3e-4. */
static double rounded_pass(const Pair *p, size_t B, size_t T) {
    static const int copied[] = {TENSOR_wte,      TENSOR_wpe, TENSOR_qkvw, TENSOR_qkvb,    TENSOR_attprojw,
                                 TENSOR_attprojb, TENSOR_fcw, TENSOR_fcb,  TENSOR_fcprojw, TENSOR_fcprojb};
    cpu::GSA *c = p->c;
    float *masters = (float *)xmalloc(c->total * sizeof(float));
    memcpy(masters, c->params, c->total * sizeof(float));
    for (int i : copied) round_numbers(c->params + c->tensors[i].offset, c->tensors[i].size);
    cpu::gsa_zero_gradients(c);
    double loss = cpu::gsa_forward(c, p->x, p->y, B, T);
    cpu::gsa_backward(c, 1);
    memcpy(c->params, masters, c->total * sizeof(float));
    free(masters);
    return loss;
}

/* Without the sphere steps of 1e-3 are chaotic: on the CPU alone noise of 1e-6 in the gradients of "no sphere, full"
   becomes 3.5e-3 of the tenth loss, 4e-7 at 3e-4. In bf16 1.4e-3 was seen at most, and 1.2e-2 where whole matrices are
   the precisions of heads of 128. */
static void compare_updates(const Pair *p, size_t B, size_t T, int updates, const char *what) {
    const Config *c = &p->c->config;
    bool shorter = c->raw,
         large = sizeof(floatX) == 2 && c->covariance == COVARIANCE_FULL && config_head_size(c) == 128;
    double limit = large ? 4 * STEPS : STEPS;
    for (int step = 1; step <= updates; step++) {
        Update u = {{shorter ? 3e-4 : 1e-3, shorter ? 3e-3 : 1e-2}, 0.9, 0.95, 0.1, {1, 1}, step, 0.95};
        int64_t clamped[NUM_BOUNDS], device_clamped[NUM_BOUNDS];
        cuda_zero_gradients(p->g);
        double loss = rounded_pass(p, B, T), device_loss = cuda_forward(p->g, p->x, p->y, (int)B, (int)T);
        /* below 2.5 the batch is being learned by heart, each step takes a good part of the loss, and its ratio says
           little */
        CHECK(fabs(device_loss - loss) <= limit * fmax(loss, 2.5), "%s: loss %.7f before update %d, CPU %.7f", what,
              device_loss, step, loss);
        cuda_backward(p->g, 1);
        cpu::gsa_update(p->c, &u, clamped);
        cuda_update(p->g, &u, device_clamped);
    }
}

/* Logits, loss, every gradient, gradient norms; then updates. */
static void test_model(int kind, int updates) {
    Config config = kind_config(kind);
    const char *what = kinds[kind].name;
    Pair p = make_pair(&config, 3, 11);
    size_t B = p.B, T = p.T - 3; /* smaller than what was asked for */
    float logits[128];
    double error = 0;
    cpu::gsa_forward(p.c, p.x, NULL, B, T);
    cuda_forward(p.g, p.x, NULL, (int)B, (int)T);
    for (size_t i = 0; i < B * T; i += 13) {
        cuda_logits(p.g, (int)(i / T), (int)(i % T), logits);
        double e = relative_error(logits, p.c->a.logits + i * config.Vp, config.V);
        if (!(e <= error)) error = e;
    }
    CHECK(error <= MODEL, "%s: logits, error %.2e", what, error);
    double loss = cpu::gsa_forward(p.c, p.x, p.y, B, T), device_loss = cuda_forward(p.g, p.x, p.y, (int)B, (int)T);
    CHECK(fabs(device_loss / loss - 1) <= LOSS, "%s: loss %.7f, CPU %.7f", what, device_loss, loss);
    for (int pass = 0; pass < 2; pass++) { /* twice: gradients are added up */
        if (pass) {
            cuda_forward(p.g, p.x, p.y, (int)B, (int)T);
            cpu::gsa_forward(p.c, p.x, p.y, B, T);
        }
        cpu::gsa_backward(p.c, 0.5);
        cuda_backward(p.g, 0.5);
    }
    compare_gradients(&p, what);
    compare_watched(&p, B, T, what);
    double norms[NUM_CLIPS], device_norms[NUM_CLIPS];
    cpu::gsa_gradient_norms(p.c, norms);
    cuda_gradient_norms(p.g, device_norms);
    for (int i = 0; i < NUM_CLIPS; i++)
        CHECK(norms[i] == device_norms[i] ||
                  fabs(device_norms[i] / norms[i] - 1) <= (i == CLIP_SPLATS ? MODEL_SPLATS : MODEL),
              "%s: gradient norm %g, CPU %g", what, device_norms[i], norms[i]);
    compare_updates(&p, B, T, updates, what);
    free_pair(&p);
}

/* ---------------------------------------------------------------------- Muon */

/* What is done to each number before these steps and after them; a matrix without gradients stays zero. */
static void test_muon_passes(size_t n) {
    enum { COUNT = 3 };
    uint64_t rng = 50;
    float *momentum = numbers(COUNT * n, 1e-3, &rng), *grads = numbers(COUNT * n, 1e-3, &rng),
          *p = numbers(COUNT * n, 1, &rng), *x = cpu::numbers(COUNT * n, 0, NULL);
    memset(momentum + n, 0, n * sizeof(float));
    memset(grads + n, 0, n * sizeof(float));
    float *device_momentum = upload<float>(momentum, COUNT * n), *device_grads = upload<float>(grads, COUNT * n),
          *device_p = upload<float>(p, COUNT * n);
    double *sums = device_room<double>(COUNT * MUON_BLOCKS);
    floatX *device_x = device_room<floatX>(COUNT * n), *copy = device_room<floatX>(COUNT * n);
    dim3 grid(MUON_BLOCKS, COUNT);
    Scales half = {{0.5f, 1}, NULL};
    muon_momentum_kernel<<<grid, 256>>>(sums, device_momentum, device_grads, n, half, 0.9f);
    muon_start_kernel<<<grid, 256>>>(device_x, sums, device_momentum, device_grads, n, half, 0.9f);
    muon_apply_kernel<<<CEIL_DIV(COUNT * n, 256), 256>>>(device_p, copy, device_x, COUNT * n, 0.1f, 3, 0.5f);
    for (size_t m = 0; m < COUNT; m++) {
        double sum = 0;
        for (size_t i = m * n; i < (m + 1) * n; i++) {
            momentum[i] = 0.9f * momentum[i] + 0.1f * 0.5f * grads[i];
            x[i] = 0.9f * momentum[i] + 0.1f * 0.5f * grads[i];
            sum += (double)x[i] * x[i];
        }
        for (size_t i = m * n; i < (m + 1) * n; i++) {
            x[i] = sum > 0 ? (float)(x[i] / sqrt(sum)) : 0;
            p[i] -= 0.1f * (3 * x[i] + 0.5f * p[i]);
        }
    }
    COMPARE(download(device_momentum, COUNT * n), momentum, COUNT * n, 1e-6, "momentum of %d times %zu", COUNT, n);
    COMPARE(download(device_x, COUNT * n), x, COUNT * n, FEATURES, "the start of %d times %zu", COUNT, n);
    COMPARE(download(device_p, COUNT * n), p, COUNT * n, 1e-2 * FEATURES + 1e-6, "the update of %d times %zu", COUNT,
            n);
    COMPARE(download(copy, COUNT * n), p, COUNT * n, FEATURES, "its copy, %d times %zu", COUNT, n);
    free_all();
}

static const floatX *muon_of(Matmul *mm, const float *x, size_t rows, size_t columns, size_t count, size_t most) {
    size_t n = count * rows * columns, least = rows < columns ? rows : columns, square = count * least * least;
    return muon_steps(mm, upload<floatX>(x, n), device_room<floatX>(n), device_room<floatX>(square),
                      device_room<floatX>(square), rows, columns, count, most, 0);
}

/* Several matrices at once against train_gsa.c's one by one; and the last one alone is the same bit for bit. */
static void test_muon_steps(Matmul *mm, size_t rows, size_t columns, size_t count) {
    uint64_t rng = 51;
    size_t n = rows * columns;
    float *x = numbers(count * n, 1, &rng), *room = cpu::numbers(cpu::muon_room(rows, columns), 0, NULL),
          *expected = cpu::numbers(count * n, 0, NULL);
    for (size_t i = 0; i < count * n; i++)
        x[i] /= 1.1f * sqrtf((float)n); /* about as long as muon_start_kernel makes it */
    round_numbers(x, count * n);
    const floatX *got = muon_of(mm, x, rows, columns, count, count),
                 *alone = muon_of(mm, x + (count - 1) * n, rows, columns, 1, count);
    for (size_t i = 0; i < count; i++)
        memcpy(expected + i * n, cpu::muon_steps(x + i * n, rows, columns, room), n * sizeof(float));
    const float *all = download(got, count * n);
    COMPARE(all, expected, count * n, ORTHOGONAL, "%zu orthogonal (%zu, %zu)", count, rows, columns);
    CHECK(memcmp(download(alone, n), all + (count - 1) * n, n * sizeof(float)) == 0,
          "one of %zu orthogonal (%zu, %zu), alone", count, rows, columns);
    free_all();
}

/* Updates by the same random gradients: momentum, steps and copies of all parameters; then by their own gradients. */
static void test_muon(int kind) {
    Config config = kind_config(kind);
    const char *what = kinds[kind].name;
    config.muon = true;
    Pair p = make_pair(&config, 3, 43);
    float *before = cpu::numbers(p.g->total, 0, NULL), *step = cpu::numbers(p.g->total, 0, NULL);
    uint64_t rng = 44;
    p.c->grads = (float *)xcalloc(p.c->total, sizeof(float));
    cpu::point_parameters(&p.c->dp, p.c->grads, p.c->tensors);
    memcpy(before, p.c->params, p.c->total * sizeof(float));
    for (int update = 1; update <= 3; update++) {
        Update u = {{1e-3, 1e-2}, 0.9, 0.95, 0.1, {1.0 / update, 1}, update, 0.9};
        int64_t clamped[NUM_BOUNDS];
        for (int i = 0; i < NUM_TENSORS; i++)
            for (size_t k = 0; k < p.c->tensors[i].size; k++)
                p.c->grads[p.c->tensors[i].offset + k] = (float)(1e-3 * rng_normal(&rng));
        cuda_write(p.g, BUFFER_GRADS, p.c->grads);
        cpu::gsa_update(p.c, &u, clamped);
        cuda_update(p.g, &u, clamped);
    }
    const float *params = cuda_read(p.g, BUFFER_PARAMS);
    for (size_t i = 0; i < p.g->total; i++) {
        step[i] = params[i] - before[i];
        before[i] = p.c->params[i] - before[i];
    }
    for (int i = 0; i < NUM_TENSORS; i++) {
        const Tensor *t = &p.c->tensors[i];
        if (!t->size || !groups[t->group].trained) continue;
        COMPARE(step + t->offset, before + t->offset, t->size, config_muon_matrices(&config, i) ? ORTHOGONAL : 2e-3,
                "%s: three updates of %s", what, t->name);
    }
    COMPARE(download(p.g->weights, p.g->total), params, p.g->total, OUTPUT, "%s: copies of the weights", what);
    COMPARE(cuda_read(p.g, BUFFER_ADAM_M), p.c->adam_m, p.g->total, 1e-6, "%s: momentum and first moments", what);
    COMPARE(cuda_read(p.g, BUFFER_ADAM_V), p.c->adam_v, p.g->seconds_total, 1e-6, "%s: second moments", what);
    compare_updates(&p, p.B, p.T, 10, what);
    free_pair(&p);
}

static void test_all_muon(void) {
    static const size_t shapes[][3] = {{96, 96, 9}, {384, 96, 3}, {96, 384, 2}, {64, 160, 1}, {768, 768, 4}};
    Matmul mm;
    matmul_create(&mm);
    test_muon_passes(96 * 32);
    test_muon_passes(320 * 192);
    for (size_t i = 0; i < 5; i++) test_muon_steps(&mm, shapes[i][0], shapes[i][1], shapes[i][2]);
    matmul_destroy(&mm);
    test_muon(1);
    test_muon(9);
}

/* ---------------------------------------------------------------------- what holds exactly */

/* From the same start the same bits, twice; and they survive the way to the host and back. */
static void test_determinism(int kind, bool muon) {
    Config config = kind_config(kind);
    config.muon = muon;
    Pair a = make_pair(&config, 3, 13), b = make_pair(&config, 3, 13);
    for (int step = 1; step <= 3; step++) {
        Update u = {{1e-3, 1e-2}, 0.9, 0.95, 0.1, {1, 1}, step, 0.95};
        int64_t clamped[NUM_BOUNDS];
        double loss[2];
        for (int i = 0; i < 2; i++) {
            CudaModel *g = i ? b.g : a.g;
            cuda_zero_gradients(g);
            loss[i] = cuda_forward(g, a.x, a.y, (int)a.B, (int)a.T);
            cuda_backward(g, 1);
            cuda_update(g, &u, clamped);
        }
        CHECK(loss[0] == loss[1], "%s: the same loss twice, %.9f and %.9f", kinds[kind].name, loss[0], loss[1]);
    }
    const int buffers[] = {BUFFER_PARAMS, BUFFER_GRADS, BUFFER_ADAM_M, BUFFER_ADAM_V};
    for (int i = 0; i < 4; i++) {
        const float *here = cuda_read(a.g, buffers[i]), *there = cuda_read(b.g, buffers[i]);
        size_t bytes = cuda_length(a.g, buffers[i]) * sizeof(float);
        CHECK(memcmp(here, there, bytes) == 0, "%s: buffer %d the same twice", kinds[kind].name, buffers[i]);
        cuda_write(b.g, buffers[i], here);
        CHECK(memcmp(here, cuda_read(b.g, buffers[i]), bytes) == 0, "%s: buffer %d to the host and back",
              kinds[kind].name, buffers[i]);
    }
    free_pair(&a);
    free_pair(&b);
}

/* One update by two batches. late: as a run does it whose results come a step later. */
static void one_step(CudaModel *g, const Pair *from, int step, bool late, StepResult *result) {
    const double clip = 0.05;
    Update u = {{1e-3, 1e-2}, 0.9, 0.95, 0.1, {1, 1}, step, 0.95};
    memset(result, 0, sizeof *result);
    if (late) cuda_defer(g, true, clip);
    cuda_watch(g, step == 3);
    cuda_zero_gradients(g);
    for (int i = 0; i < 2; i++) { /* other tokens each time */
        if (i) cuda_expect(g, 0.5);
        result->loss += cuda_forward(g, from->x + 5 * step + i, from->y + 5 * step, (int)from->B - 1, (int)from->T);
        cuda_backward(g, 0.5);
    }
    cuda_gradient_norms(g, result->norms);
    for (int c = 0; c < NUM_CLIPS && !late; c++) u.scale[c] = result->norms[c] > clip ? clip / result->norms[c] : 1;
    cuda_update(g, &u, result->clamped);
    if (late) cuda_defer(g, false, 0);
}

/* Steps whose results come one step later, and whose passes and updates are graphs, are those of one that waits, bit
   for bit; an evaluation between them changes nothing. */
static void test_late(int kind, bool muon) {
    enum { COUNT = 6 };
    Config config = kind_config(kind);
    config.muon = muon;
    Pair a = make_pair(&config, 3, 47), b = make_pair(&config, 3, 47);
    StepResult now[COUNT + 1], later[COUNT + 1], none;
    for (int step = 1; step <= COUNT; step++) {
        one_step(a.g, &a, step, false, &now[step]);
        one_step(b.g, &a, step, true, &none);
        if (step > 1) cuda_result(b.g, &later[step - 1]);
        if (step == 4) cuda_forward(b.g, a.y, a.x, 2, (int)a.T - 3);
    }
    cuda_result(b.g, &later[COUNT]);
    CHECK(b.g->pass && b.g->update, "%s: passes and updates go to the device as graphs", kinds[kind].name);
    for (int step = 1; step <= COUNT; step++)
        CHECK(isfinite(now[step].loss) && now[step].norms[CLIP_WEIGHTS] > 0.05 &&
                  memcmp(&now[step], &later[step], sizeof now[step]) == 0,
              "%s: step %d a step later: loss %.9f and %.9f, norms %g, %g and %g, %g", kinds[kind].name, step,
              now[step].loss, later[step].loss, now[step].norms[0], now[step].norms[1], later[step].norms[0],
              later[step].norms[1]);
    const int buffers[] = {BUFFER_PARAMS, BUFFER_GRADS, BUFFER_ADAM_M, BUFFER_ADAM_V};
    for (int i = 0; i < 4; i++)
        CHECK(memcmp(cuda_read(a.g, buffers[i]), cuda_read(b.g, buffers[i]),
                     cuda_length(a.g, buffers[i]) * sizeof(float)) == 0,
              "%s: buffer %d the same where results come later", kinds[kind].name, buffers[i]);
    free_pair(&a);
    free_pair(&b);
}

/* Token t changes nothing before t. */
static void check_causality(Pair *p, const char *what) {
    const Config *config = &p->c->config;
    size_t at = 41;
    float before[128], after[128];
    cuda_forward(p->g, p->x, NULL, 2, (int)p->T);
    cuda_logits(p->g, 1, (int)at - 1, before);
    p->x[p->T + at] = (p->x[p->T + at] + 1) % config->V;
    cuda_forward(p->g, p->x, NULL, 2, (int)p->T);
    cuda_logits(p->g, 1, (int)at - 1, after);
    CHECK((memcmp(before, after, config->V * sizeof(float)) == 0) == (config->objective == OBJECTIVE_LM),
          "%s: token %zu changes what is before it only where there is no mask", what, at);
}

/* The gradient dqkv of layer 0's queries is at right angles to them (x . dx = 0): feature maps see directions only. */
static void check_tangents(const CudaModel *g, const float *qkv, const float *dqkv, size_t N, const char *what) {
    CudaSizes z = g->sizes;
    size_t A = z.A;
    for (size_t h = 0; h < z.NH && !g->config.raw; h++) {
        int kind_of_head = config_head_kind(&g->config, 0, (int)h);
        if ((kind_of_head == HEAD_STANDARD || kind_of_head == HEAD_EXTEND) && g->config.position == POSITION_LEARNED)
            continue;
        double dots = 0, sizes = 0;
        for (size_t i = 0; i < N; i++) {
            double dot = 0, xx = 0, dd = 0;
            for (size_t k = 0; k < z.HS; k++) {
                double x = qkv[i * 3 * A + h * z.HS + k], d = dqkv[i * 3 * A + h * z.HS + k];
                dot += x * d;
                xx += x * x;
                dd += d * d;
            }
            dots += fabs(dot);
            sizes += sqrt(xx * dd);
        }
        CHECK(dots <= OUTPUT * sizes, "%s: gradients of head %zu are tangents, %.1e", what, h, dots / sizes);
    }
}

/* Sums over layer 0's tokens that must come out alike, or as 0. */
static void check_moments(const Config *config, const CudaModel *g, const char *what) {
    CudaSizes z = g->sizes;
    /* of softmax's heads: sum Q = sum K, that is M0 = 2 amplitude */
    if (head_list(config, 0, HEAD_SPLAT).count && g->p.log_theta && z.P <= z.HS) {
        size_t heads = head_list(config, 0, HEAD_SPLAT).count, record = moments_record(z.S, z.P, z.HS);
        double *sums = (double *)xmalloc(heads * record * sizeof *sums), wrong = 0, size = 0;
        cudaCheck(cudaMemcpy(sums, g->a.moments_sums, heads * record * sizeof *sums, cudaMemcpyDeviceToHost));
        for (size_t i = 0; i < heads * z.S; i++) {
            const double *r = sums + i / z.S * record, M0 = r[i % z.S], amplitude = r[z.S * (1 + z.HS + z.P) + i % z.S];
            wrong += (M0 - 2 * amplitude) * (M0 - 2 * amplitude);
            size += amplitude * amplitude;
        }
        CHECK(wrong <= (GRADIENT * GRADIENT) * size, "%s: queries and keys move ln phi alike, %.1e", what,
              sqrt(wrong / size));
        free(sums);
    }
    HeadList scans = scan_list(config, 0);
    /* a factor of all amplitudes cancels: sum of Q, and of d ln alpha, is 0 */
    for (int i = 0; i < scans.count && config->attention != ATTENTION_EXTEND; i++) {
        size_t record = scan_sums_record(z.W);
        double *sums = (double *)xmalloc(record * sizeof *sums), sum = 0, size = 0;
        cudaCheck(
            cudaMemcpy(sums, g->a.scan_moments + (size_t)i * record, record * sizeof *sums, cudaMemcpyDeviceToHost));
        for (size_t k = 0; k < z.S; k++) {
            sum += sums[k];
            size += fabs(sums[k]);
        }
        CHECK(fabs(sum) + fabs(sums[record - 1]) <= 10 * GRADIENT * size && size > 0,
              "%s: d ln alpha sum up to %.1e, Q to %.1e, their sizes to %.1e", what, sum, sums[record - 1], size);
        free(sums);
    }
}

/* Token t changes nothing before t; equal values come out of attention unchanged; gradients of feature maps are
   tangents. */
static void test_identities(int kind) {
    Config config = kind_config(kind);
    const char *what = kinds[kind].name;
    Pair p = make_pair(&config, 2, 17);
    CudaModel *g = p.g;
    CudaSizes z = g->sizes;
    size_t N = p.B * p.T, A = z.A;
    check_causality(&p, what);

    uint64_t rng = 6;
    float *qkv = numbers(N * 3 * A, 1, &rng), *dout = numbers(N * A, 1, &rng);
    for (size_t i = 0; i < N; i++) /* values depend on the channel alone */
        for (size_t k = 0; k < A; k++) qkv[i * 3 * A + 2 * A + k] = (float)k / 64;
    round_numbers(qkv, N * 3 * A);
    cudaCheck(
        cudaMemcpy(g->a.qkv, upload<floatX>(qkv, N * 3 * A), N * 3 * A * sizeof(floatX), cudaMemcpyDeviceToDevice));
    features_forward(g, g->a.features, g->a.qkv, 0, p.B, p.T);
    mixers_forward(g, 0, p.B, p.T);
    float *att = download(g->a.att, N * A), *values = cpu::numbers(N * A, 0, NULL);
    for (size_t i = 0; i < N; i++) memcpy(values + i * A, qkv + i * 3 * A + 2 * A, A * sizeof(float));
    /* a row sum's epsilon, 1e-6, is up to 1e-4 of the sum */
    COMPARE(att, values, N * A, OUTPUT / 2 + (scan_list(&config, 0).count ? 1e-4 : 0), "%s: equal values stay", what);

    for (size_t i = 0; i < N * A; i++) qkv[i / A * 3 * A + 2 * A + i % A] = (float)rng_normal(&rng);
    cudaCheck(
        cudaMemcpy(g->a.qkv, upload<floatX>(qkv, N * 3 * A), N * 3 * A * sizeof(floatX), cudaMemcpyDeviceToDevice));
    cudaCheck(cudaMemcpy(g->a.datt, upload<floatX>(dout, N * A), N * A * sizeof(floatX), cudaMemcpyDeviceToDevice));
    mixers_forward(g, 0, p.B, p.T);
    if (attends(g, 0))
        attention_backward(g->a.dqkv, g->a.dfeatures, g->a.delta, g->a.datt, g->a.att, g->a.att_lse,
                           attention_input(g, 0, N), p.B, p.T, z.NH, z.HS, g->stream);
    features_backward(g, g->a.dqkv, g->a.dfeatures, g->a.features, g->a.qkv, 0, p.B, p.T);
    scans_backward(g, g->a, 0, p.B, p.T);
    check_tangents(g, qkv, download(g->a.dqkv, N * 3 * A), N, what);
    check_moments(&config, g, what);
    free_pair(&p);
}

/* Blocks computed again in the backward pass change no bit; products, the MLP and logits in pieces change no more
   than rounding. */
static void test_recompute(int kind) {
    Config config = kind_config(kind);
    const float *whole = NULL;
    for (int pieces = 0; pieces < 2; pieces++) {
        piece_most = pieces ? 64 : PIECE;
        logits_piece_most = pieces ? 32 : LOGITS_PIECE;
        config.recompute = false;
        Pair kept = make_pair(&config, 3, 29);
        config.recompute = true;
        Pair again = make_pair(&config, 3, 29);
        for (int pass = 0; pass < 2; pass++) { /* the second adds to the first, on shorter sequences */
            int T = (int)kept.T - 5 * pass;
            if (pass) cuda_expect(again.g, 0.5); /* the classifier's part of the backward pass in the forward pass */
            double loss = cuda_forward(kept.g, kept.x, kept.y, 3, T),
                   same = cuda_forward(again.g, kept.x, kept.y, 3, T);
            CHECK(loss == same && isfinite(loss), "%s, pieces %d: loss %.9f, with --recompute %.9f", kinds[kind].name,
                  pieces, loss, same);
            cuda_backward(kept.g, 0.5);
            cuda_backward(again.g, 0.5);
        }
        const float *here = cuda_read(kept.g, BUFFER_GRADS), *there = cuda_read(again.g, BUFFER_GRADS);
        for (int i = 0; i < NUM_TENSORS; i++) {
            const Tensor *t = &kept.g->tensors[i];
            if (!t->size || t->group == GROUP_FIXED) continue;
            bool waves = is_wave(i), splat = is_sum(t, i);
            CHECK(memcmp(here + t->offset, there + t->offset, t->size * sizeof(float)) == 0,
                  "%s, pieces %d: the same gradient of %s with --recompute", kinds[kind].name, pieces, t->name);
            if (pieces)
                COMPARE(here + t->offset, whole + t->offset, t->size,
                        waves   ? MODEL_WAVES
                        : splat ? MODEL_SPLATS
                                : MODEL,
                        "%s: gradient of %s in pieces", kinds[kind].name, t->name);
        }
        float logits[2][128], *keys[2] = {cpu::numbers(3 * kept.T * (size_t)config_head_size(&config), 0, NULL),
                                          cpu::numbers(3 * kept.T * (size_t)config_head_size(&config), 0, NULL)};
        for (int i = 0; i < 2; i++) {
            CudaModel *g = i ? again.g : kept.g;
            cuda_forward(g, kept.x, NULL, 3, (int)kept.T);
            cuda_logits(g, 2, 60, logits[i]);
            cuda_head(g, 0, 1, 1, 3 * (int)kept.T, keys[i]);
        }
        CHECK(memcmp(logits[0], logits[1], config.V * sizeof(float)) == 0, "%s: the same logits with --recompute",
              kinds[kind].name);
        CHECK(memcmp(keys[0], keys[1], 3 * kept.T * config_head_size(&config) * sizeof(float)) == 0,
              "%s: the same keys with --recompute", kinds[kind].name);
        if (!pieces) {
            float *copy = (float *)xmalloc(kept.g->total * sizeof(float));
            memcpy(copy, here, kept.g->total * sizeof(float));
            whole = copy;
        }
        free_pair(&kept);
        free_pair(&again);
    }
    free((void *)whole);
    piece_most = PIECE;
    logits_piece_most = LOGITS_PIECE;
}

/* Splats that a smaller GPU has no shared memory for are refused, with flags that it has enough for. */
static void test_shared_memory(void) {
    const size_t rtx = 99 << 10, h100 = 227 << 10;
    for (int k = 0; k < KINDS; k++) {
        Config config = kind_config(k);
        const char *wrong = cuda_shared_check(&config, h100);
        CHECK(!wrong, "%s on an H100: %s", kinds[k].name, wrong);
        wrong = cuda_shared_check(&config, rtx);
        bool large = config_gsa_heads(&config) && shared_memory(&config, config_head_size(&config), config.S) > rtx;
        CHECK(!wrong == !large, "%s with 99 KiB: %s", kinds[k].name, wrong ? wrong : "not refused");
    }
    Config config = make_config(ATTENTION_GSA, NULL, POSITION_ROPE, COVARIANCE_ISO, ENVELOPE_RAISED, 128, 16, 0,
                                MIXER_LINEAR, OBJECTIVE_LM);
    const char *wrong = cuda_shared_check(&config, rtx);
    CHECK(wrong && strstr(wrong, "--heads 6"), "16 splats in heads of 128 channels: %s", wrong ? wrong : "not refused");
    config = make_config(ATTENTION_GSA, NULL, POSITION_ROPE, COVARIANCE_ISO, ENVELOPE_RAISED, 64, 32, 0, MIXER_LINEAR,
                         OBJECTIVE_LM);
    wrong = cuda_shared_check(&config, rtx);
    CHECK(!wrong || strstr(wrong, "--splats 16"), "32 splats in heads of 64 channels: %s", wrong);
    const size_t rows[] = {1024, 50304, 50688, 57344,
                           131072}; /* logits: what a row takes with the kernel's own 256 B */
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++)
        for (int card = 0; card < 2; card++) {
            size_t most = card ? h100 : rtx, bytes = rows[i] * sizeof(floatX), kept = classifier_shared(rows[i], most);
            CHECK(kept == 0 || (kept == bytes && kept + 256 <= most), "classifier, %zu of %zu", kept, most);
            CHECK(kept > 0 || bytes + 256 > most || bytes > 112 << 10, "classifier, %zu of %zu", bytes, most);
        }
}

/* What a model is said to take is what the device has less. */
static void test_memory(void) {
    for (int recompute = 0; recompute < 2; recompute++) {
        Config config = kind_config(8);
        /* longer than a piece */
        config.T = 40000;
        config.L = recompute ? 12 : 2;
        config.NH = 12;
        config.C = 768;
        config.recompute = recompute;
        config.muon = recompute;
        const char *wrong = config_head_map(&config, "4");
        if (wrong) die("%s", wrong);
        size_t bytes[NUM_MEMORY], said = 0, before, after, all;
        double taken, off;
        cuda_memory(&config, 2, bytes);
        for (int i = 0; i < NUM_MEMORY; i++) said += bytes[i];
        int tries = 0;
        do { /* another process on the card may take memory meanwhile */
            cudaCheck(cudaDeviceSynchronize());
            cudaCheck(cudaMemGetInfo(&before, &all));
            CudaModel *m = gsa_create_cuda(&config, 2);
            cudaCheck(cudaMemGetInfo(&after, &all));
            gsa_destroy(m);
            taken = (double)before - (double)after;
            off = fabs(taken / (double)said - 1);
        } while (off >= 0.01 && ++tries < 5);
        CHECK(off < 0.01, "memory: %.1f MiB said, %.1f taken", (double)said / (1 << 20), taken / (1 << 20));
    }
}

/* A million tokens, where indices pass 2^31: sixteen equal sequences give the loss and the gradients of one; one
   sequence of sixteen equal parts, of which each token sees the last few hundred, gives its last part the losses
   that it has alone. */
static void test_million(void) {
    Config config = kind_config(1);
    config.T = 1 << 16;
    config.NH = 12;
    config.C = 768;
    config.window = 200;
    config.recompute = true;
    const size_t T = 1 << 16, N = T << 4;
    const char *wrong = config_head_map(&config, NULL);
    if (wrong) die("%s", wrong);
    size_t bytes[NUM_MEMORY], needed = 0;
    cuda_memory(&config, 16, bytes);
    for (int i = 0; i < NUM_MEMORY; i++) needed += bytes[i];
    if (needed > cuda_free_memory()) {
        skip("a million tokens", "they need more memory than is free");
        return;
    }
    Pair p = make_pair(&config, 1, 31);
    int *x = (int *)xmalloc(2 * N * sizeof(int)), *y = x + N;
    for (size_t i = 0; i < N; i++) {
        x[i] = p.x[i % T];
        y[i] = p.x[(i + 1) % T];
    }
    double loss = cuda_forward(p.g, x, y, 1, (int)T), losses[2];
    float *alone = download(p.g->a.losses, T), *grads = cpu::numbers(p.g->total, 0, NULL);
    cuda_backward(p.g, 1);
    memcpy(grads, cuda_read(p.g, BUFFER_GRADS), p.g->total * sizeof(float));
    gsa_destroy(p.g);
    for (int one = 0; one < 2; one++) {
        if (one) config.T = (int)N;
        p.g = gsa_create_cuda(&config, one ? 1 : 16);
        cuda_write(p.g, BUFFER_PARAMS, p.c->params);
        losses[one] = cuda_forward(p.g, x, y, one ? 1 : 16, config.T);
        COMPARE(download(p.g->a.losses + N - T + 1000, T - 1000), alone + 1000, T - 1000, OUTPUT,
                "a million tokens in %d sequences: losses of the last ones", one ? 1 : 16);
        cuda_backward(p.g, 1);
        const float *got = cuda_read(p.g, BUFFER_GRADS);
        for (int i = 0; i < NUM_TENSORS; i++) {
            const Tensor *t = &p.g->tensors[i];
            if (t->size && t->group != GROUP_FIXED)
                COMPARE(got + t->offset, grads + t->offset, t->size, (one ? 5e-2 : MODEL) * (is_sum(t, i) ? 2 : 1),
                        "a million tokens in %d sequences: gradient of %s", one ? 1 : 16, t->name);
        }
        if (!one) gsa_destroy(p.g);
    }
    CHECK(fabs(losses[0] / loss - 1) < 1e-4 && fabs(losses[1] / loss - 1) < 5e-3,
          "a million tokens: losses %.6f and %.6f, of one part alone %.6f", losses[0], losses[1], loss);
    free(x);
    free_pair(&p);
}

/* One head of the linear mixer in double, token by token: of each splat the decayed sums of keys times [v, 1] so
   far, plain (A) and turned (B, complex), and those weighted with the distance (P, U), from which the gradients of
   decay and frequency follow, as that of psi does from B; then backwards those of queries times rho [do, -Delta].
   Responses are given. */
enum { MILLION_S = 8, MILLION_HS = 32, MILLION_D = MILLION_HS + 1 };
typedef struct {
    const float *r, *phi, *v, *dout;          /* (T, stride of responses), (T, stride of v) and (T, stride of dout) */
    size_t T, responses, values, outs, every; /* strides; what every how-manieth token has is kept */
    double lambda[MILLION_S], cosine[MILLION_S], sine[MILLION_S], psi[MILLION_S];
    float *out, *dv, *dr, *dphi; /* of the kept tokens: (kept, HS), (kept, HS), (kept, S), (kept, S) */
    double dtheta[MILLION_S], ddelta[MILLION_S], dpsi[MILLION_S];
} ScanReference;

static bool scan_kept(const ScanReference *x, size_t i) { return i % x->every == 0; }

static void scan_reference(ScanReference *x) {
    static const size_t S = MILLION_S, HS = MILLION_HS;
    double A[MILLION_S][MILLION_D] = {}, B[2][MILLION_S][MILLION_D] = {}, P[MILLION_S][MILLION_D] = {},
           U[2][MILLION_S][MILLION_D] = {}, *rows = (double *)xmalloc(x->T * MILLION_D * sizeof(double));
    memset(x->dtheta, 0, sizeof x->dtheta);
    memset(x->ddelta, 0, sizeof x->ddelta);
    memset(x->dpsi, 0, sizeof x->dpsi);
    for (size_t i = 0; i < x->T; i++) {
        const float *r = x->r + i * x->responses, *phi = x->phi + i * x->responses, *dout = x->dout + i * x->outs;
        double value[MILLION_D], N[MILLION_D] = {}, D0 = 0, Q[MILLION_S], total = 0, *row = rows + i * MILLION_D;
        for (size_t c = 0; c < HS; c++) value[c] = (double)x->v[i * x->values + c];
        value[HS] = 1;
        for (size_t s = 0; s < S; s++) {
            double fade = x->lambda[s], cosine = fade * x->cosine[s], sine = fade * x->sine[s];
            for (size_t c = 0; c <= HS; c++) {
                double pr = U[0][s][c] + B[0][s][c], pi = U[1][s][c] + B[1][s][c], br = B[0][s][c], bi = B[1][s][c],
                       key = (double)phi[s] * value[c];
                P[s][c] = fade * (P[s][c] + A[s][c]);
                U[0][s][c] = cosine * pr - sine * pi;
                U[1][s][c] = sine * pr + cosine * pi;
                A[s][c] = fade * A[s][c] + key;
                B[0][s][c] = cosine * br - sine * bi + key * cos(x->psi[s]);
                B[1][s][c] = sine * br + cosine * bi - key * sin(x->psi[s]);
                N[c] += (double)r[s] * 0.5 * (A[s][c] + B[0][s][c]);
            }
            D0 += (double)r[s] * 0.5 * A[s][HS];
        }
        double rho = 1 / (N[HS] + ROW_SUM_ROUNDING * D0 + ROW_SUM_EPSILON), delta = 0;
        for (size_t c = 0; c < HS; c++) {
            delta += (double)dout[c] * N[c] * rho;
            row[c] = rho * (double)dout[c];
        }
        row[HS] = -rho * delta;
        for (size_t s = 0; s < S; s++) {
            double q = 0, along = 0, across = 0, turned = 0;
            for (size_t c = 0; c <= HS; c++) {
                q += row[c] * (A[s][c] + B[0][s][c]);
                along += row[c] * (P[s][c] + U[0][s][c]);
                across += row[c] * U[1][s][c];
                turned += row[c] * B[1][s][c];
            }
            Q[s] = 0.5 * (double)r[s] * q;
            total += Q[s];
            x->ddelta[s] -= 0.5 * (double)r[s] * along;
            x->dtheta[s] -= 0.5 * (double)r[s] * across;
            x->dpsi[s] += 0.5 * (double)r[s] * turned;
        }
        for (size_t c = 0; c < HS && scan_kept(x, i); c++) x->out[i / x->every * HS + c] = (float)(N[c] * rho);
        for (size_t s = 0; s < S && scan_kept(x, i); s++)
            x->dr[i / x->every * S + s] = (float)(Q[s] - (double)r[s] * total);
    }
    memset(A, 0, sizeof A);
    memset(B, 0, sizeof B);
    for (size_t i = x->T; i-- > 0;) {
        const float *r = x->r + i * x->responses, *phi = x->phi + i * x->responses;
        const double *row = rows + i * MILLION_D;
        double dv[MILLION_D] = {};
        for (size_t s = 0; s < S; s++) {
            double fade = x->lambda[s], cosine = fade * x->cosine[s], sine = fade * x->sine[s], K = 0;
            for (size_t c = 0; c <= HS; c++) {
                double br = B[0][s][c], bi = B[1][s][c], query = (double)r[s] * row[c];
                A[s][c] = fade * A[s][c] + query;
                B[0][s][c] = cosine * br - sine * bi + query * cos(x->psi[s]);
                B[1][s][c] = sine * br + cosine * bi - query * sin(x->psi[s]);
                dv[c] += (double)phi[s] * 0.5 * (A[s][c] + B[0][s][c]);
            }
            for (size_t c = 0; c <= HS && scan_kept(x, i); c++)
                K += (c < HS ? (double)x->v[i * x->values + c] : 1) * (A[s][c] + B[0][s][c]);
            if (scan_kept(x, i)) x->dphi[i / x->every * S + s] = (float)(0.5 * (double)phi[s] * K);
        }
        for (size_t c = 0; c < HS && scan_kept(x, i); c++) x->dv[i / x->every * HS + c] = (float)dv[c];
    }
    free(rows);
}

/* Of so many tokens the CPU keeps what belongs to every MILLION_EVERY-th; there both sides are compared. */
enum { MILLION_T = 1 << 20, MILLION_EVERY = 1021, MILLION_KEPT = (MILLION_T + MILLION_EVERY - 1) / MILLION_EVERY };

/* The GPU's numbers on the host: the layer's input, output and gradients. */
typedef struct {
    CudaSizes z;
    const Tensor *tensors;
    float *params, *qkv, *dout;                 /* (T, 3 A), (T, A) */
    float *out, *responses, *dqkv, *dresponses; /* (T, A), (queries and keys, 2 heads, T, W), (T, 3 A) */
    const float *grads;
} MillionTokens;

static size_t million_index(const MillionTokens *m, int tensor, int h, int s) {
    return m->tensors[tensor].offset + h * MILLION_S + s;
}

static void million_reference(const MillionTokens *m, ScanReference *of, int h) {
    enum { T = MILLION_T, S = MILLION_S, HS = MILLION_HS, KEPT = MILLION_KEPT };
    size_t A = m->z.A, W = m->z.W;
    of->r = m->responses + h * T * W;
    of->phi = of->r + 2 * T * W;
    of->v = m->qkv + 2 * A + h * HS;
    of->dout = m->dout + h * HS;
    of->T = T;
    of->responses = W;
    of->values = 3 * A;
    of->outs = A;
    of->every = MILLION_EVERY;
    of->out = (float *)xmalloc(KEPT * (2 * HS + 2 * S) * sizeof(float));
    of->dv = of->out + KEPT * HS;
    of->dr = of->dv + KEPT * HS;
    of->dphi = of->dr + KEPT * S;
    for (int s = 0; s < S; s++) {
        double theta = (double)wave_step(exp((double)m->params[million_index(m, TENSOR_log_theta, h, s)])) *
                       (2 * M_PI / 4294967296.0);
        of->lambda[s] = exp(-(double)(float)exp((double)m->params[million_index(m, TENSOR_log_delta, h, s)]));
        of->cosine[s] = cos(theta);
        of->sine[s] = sin(theta);
        of->psi[s] = (double)m->params[million_index(m, TENSOR_psi, h, s)];
    }
    scan_reference(of);
}

static void million_compare(const MillionTokens *m, const ScanReference *x, int h) {
    enum { T = MILLION_T, S = MILLION_S, HS = MILLION_HS, KEPT = MILLION_KEPT };
    size_t A = m->z.A, W = m->z.W;
    float *got = cpu::numbers(KEPT * HS, 0, NULL), *gradient = cpu::numbers(KEPT * HS, 0, NULL),
          *dr = cpu::numbers(KEPT * S, 0, NULL), *dphi = cpu::numbers(KEPT * S, 0, NULL), waves[3][S], expected[3][S];
    for (size_t i = 0; i < KEPT; i++) {
        size_t n = i * MILLION_EVERY;
        memcpy(got + i * HS, m->out + n * A + h * HS, HS * sizeof(float));
        memcpy(gradient + i * HS, m->dqkv + n * 3 * A + 2 * A + h * HS, HS * sizeof(float));
        memcpy(dr + i * S, m->dresponses + (h * T + n) * W, S * sizeof(float));
        memcpy(dphi + i * S, m->dresponses + ((2 + h) * T + n) * W, S * sizeof(float));
    }
    for (int s = 0; s < S; s++) {
        size_t theta = million_index(m, TENSOR_log_theta, h, s), delta = million_index(m, TENSOR_log_delta, h, s);
        waves[0][s] = m->grads[theta];
        expected[0][s] = (float)(exp((double)m->params[theta]) * x->dtheta[s]);
        waves[1][s] = m->grads[delta];
        expected[1][s] = (float)(exp((double)m->params[delta]) * x->ddelta[s]);
        waves[2][s] = m->grads[million_index(m, TENSOR_psi, h, s)];
        expected[2][s] = (float)x->dpsi[s];
    }
    COMPARE(got, x->out, KEPT * HS, OUTPUT, "a million tokens: scan, head %d", h);
    COMPARE(gradient, x->dv, KEPT * HS, MILLION, "a million tokens: gradient of head %d's values", h);
    COMPARE(dr, x->dr, KEPT * S, MILLION, "a million tokens: gradient of ln r, head %d", h);
    COMPARE(dphi, x->dphi, KEPT * S, MILLION, "a million tokens: gradient of ln phi, head %d", h);
    COMPARE(waves[0], expected[0], S, WAVES, "a million tokens: gradient of log_theta, head %d", h);
    COMPARE(waves[1], expected[1], S, WAVES, "a million tokens: gradient of log_delta, head %d", h);
    COMPARE(waves[2], expected[2], S, WAVES, "a million tokens: gradient of psi, head %d", h);
}

/* Linear heads over a million tokens, one of their splats remembering all of them, against that: outputs, gradients
   of values and responses, and those of frequency and decay, in which a rounding of phases or states would be
   multiplied by the length. */
static void test_scan_million(void) {
    enum { T = MILLION_T, S = MILLION_S, HS = MILLION_HS };
    Config config = make_config(ATTENTION_GSA, NULL, POSITION_ROPE, COVARIANCE_ISO, ENVELOPE_RAISED, HS, S, 0,
                                MIXER_LINEAR, OBJECTIVE_LM);
    config.T = T;
    config.NH = 2;
    config.C = 2 * HS;
    config.L = 1;
    config.recompute = true;
    config.phase = PHASE_LEARNED;
    const char *wrong = config_head_map(&config, NULL);
    if (wrong) die("%s", wrong);
    size_t bytes[NUM_MEMORY], needed = 0;
    cuda_memory(&config, 1, bytes);
    for (int i = 0; i < NUM_MEMORY; i++) needed += bytes[i];
    if (needed > cuda_free_memory()) {
        skip("linear heads over a million tokens", "they need more memory than is free");
        return;
    }
    CudaModel *g = gsa_create_cuda(&config, 1);
    MillionTokens m;
    m.z = g->sizes;
    m.tensors = g->tensors;
    CudaActivations block = block_activations(g, 0, T);
    uint64_t rng = 43;
    size_t A = m.z.A, W = m.z.W;
    m.params = cpu::numbers(g->total, 0, NULL);
    m.qkv = numbers(T * 3 * A, 1, &rng);
    m.dout = numbers(T * A, 1, &rng);
    model_start(&config, m.params, 43);
    for (int h = 0; h < 2; h++) m.params[million_index(&m, TENSOR_log_delta, h, 0)] = (float)log(1e-6);
    for (int i = 0; i < 2 * S; i++)
        m.params[million_index(&m, TENSOR_psi, i / S, i % S)] = (float)(3 * rng_uniform(&rng) - 1.5);
    cuda_write(g, BUFFER_PARAMS, m.params);
    cudaCheck(
        cudaMemcpy(block.qkv, upload<floatX>(m.qkv, T * 3 * A), T * 3 * A * sizeof(floatX), cudaMemcpyDeviceToDevice));
    cudaCheck(cudaMemcpy(g->a.datt, upload<floatX>(m.dout, T * A), T * A * sizeof(floatX), cudaMemcpyDeviceToDevice));
    splat_tables(g);
    scans_forward(g, block, 0, 1, T);
    scans_backward(g, block, 0, 1, T);
    m.responses = download(block.responses, 2 * 2 * T * W);
    m.dresponses = download(g->a.dresponses, 2 * 2 * T * W);
    m.out = download(block.att, T * A);
    m.dqkv = download(g->a.dqkv, T * 3 * A);
    m.grads = cuda_read(g, BUFFER_GRADS);
    ScanReference x[2];
#pragma omp parallel for num_threads(2)
    for (int h = 0; h < 2; h++) million_reference(&m, &x[h], h);
    for (int h = 0; h < 2; h++) {
        million_compare(&m, &x[h], h);
        free(x[h].out);
    }
    gsa_destroy(g);
    free_all();
}

/* Splats at their bounds, and out of them. */
static void test_bounds(int kind) {
    Config config = kind_config(kind);
    Pair p = make_pair(&config, 3, 19);
    CudaSizes z = p.g->sizes;
    uint64_t rng = 8;
    for (size_t i = 0; i < z.G * z.S * z.HS; i++) p.c->p.mu[i] += (float)(0.3 * rng_normal(&rng));
    for (size_t i = 0; i < z.G * z.S * z.P; i++)
        p.c->p.log_precision[i] =
            z.P > z.HS ? p.c->p.log_precision[i] * (float)(1 + i / z.P % 3) : (float)(1.4 + 2.5 * rng_normal(&rng));
    for (size_t i = 0; i < z.G * z.S; i++) {
        p.c->p.log_alpha[i] += (float)(3 * rng_normal(&rng));
        if (p.c->p.log_theta) p.c->p.log_theta[i] += (float)rng_normal(&rng);
        if (p.c->p.log_delta) p.c->p.log_delta[i] += (float)(2 * rng_normal(&rng));
        if (p.c->p.psi) p.c->p.psi[i] += (float)(4 * rng_normal(&rng));
    }
    for (size_t i = 0; i < z.ropes * z.HS / 2; i++) p.c->p.log_rope[i] += (float)rng_normal(&rng);
    cuda_write(p.g, BUFFER_PARAMS, p.c->params);
    Update u = {{0, 0}, 0.9, 0.95, 0, {1, 1}, 1, 0};
    int64_t clamped[NUM_BOUNDS], device_clamped[NUM_BOUNDS];
    cpu::gsa_forward(p.c, p.x, p.y, p.B, p.T);
    cpu::gsa_backward(p.c, 1);
    cpu::gsa_zero_gradients(p.c);
    cpu::gsa_update(p.c, &u, clamped);
    cuda_update(p.g, &u, device_clamped);
    CHECK(memcmp(clamped, device_clamped, sizeof clamped) == 0 && clamped[BOUND_PRECISION] > 0 &&
              clamped[BOUND_CENTRE] > 0 && clamped[BOUND_AMPLITUDE] > 0 &&
              (!p.c->p.log_delta || clamped[BOUND_DECAY] > 0) &&
              (clamped[BOUND_PHASE] > 0) == (p.c->p.psi && config.mixer == MIXER_LINEAR),
          "%s: as many splats out of bounds on both", kinds[kind].name);
    COMPARE(cuda_read(p.g, BUFFER_PARAMS), p.c->params, p.c->total, 2e-6, "%s: parameters put back into bounds",
            kinds[kind].name);
    double loss = cpu::gsa_forward(p.c, p.x, p.y, p.B, p.T),
           device_loss = cuda_forward(p.g, p.x, p.y, (int)p.B, (int)p.T);
    /* where raised cosines cancel, rounding is what is left: see test_extremes */
    CHECK(fabs(device_loss / loss - 1) <= (kind == 12 ? 10 : 1) * LOSS,
          "%s, splats at their bounds: loss %.7f, CPU %.7f", kinds[kind].name, device_loss, loss);
    free_pair(&p);
}

/* The linear mixer where row sums cancel or vanish: all splats at the largest precision and frequency, or fading
   fast, or all but one dead; keys all alike, queries near zero. Everything stays finite and is the CPU's; where
   cosines cancel, what is left is mostly rounding, and in bf16 the gradient's limit says only that it is finite. */
static void test_extremes(void) {
    for (int extreme = 0; extreme < 5; extreme++) {
        Config config = kind_config(12);
        config.T = 130;
        Pair p = make_pair(&config, 2, 31);
        CudaSizes z = p.g->sizes;
        cpu::ParameterTensors w = p.c->p;
        for (size_t i = 0; i < z.G * z.S; i++) {
            if (extreme < 2) {
                w.log_precision[i] = (float)log(SPLAT_PRECISION_MAX);
                w.log_theta[i] = (float)log(SPLAT_FREQUENCY_MAX);
            }
            if (extreme == 1) w.log_delta[i] = (float)log(SPLAT_DECAY_MAX);
            if (extreme == 2) w.alive[i] = i % z.S == 3;
            w.log_alpha[i] = extreme == 4 ? (float)((i % 2 ? 1 : -1) * SPLAT_AMPLITUDE_RANGE) : w.log_alpha[i];
        }
        for (size_t l = 0; l < z.L && extreme >= 3; l++) /* q, k are their biases: keys all alike */
            for (size_t i = 0; i < 2 * z.A * z.C; i++) w.qkvw[(l * 3 * z.A * z.C) + i] = 0;
        for (size_t l = 0; l < z.L && extreme == 3; l++)
            for (size_t i = 0; i < z.A; i++) w.qkvb[l * 3 * z.A + i] = 0;
        cuda_write(p.g, BUFFER_PARAMS, p.c->params);
        double loss = cpu::gsa_forward(p.c, p.x, p.y, p.B, p.T),
               device_loss = cuda_forward(p.g, p.x, p.y, (int)p.B, (int)p.T);
        CHECK(fabs(device_loss / loss - 1) <= (extreme < 2 ? 10 : 1) * LOSS, "extreme %d: loss %.7f, CPU %.7f", extreme,
              device_loss, loss);
        cpu::gsa_backward(p.c, 1);
        cuda_backward(p.g, 1);
        const float *grads = cuda_read(p.g, BUFFER_GRADS);
        size_t bad = 0;
        for (size_t i = 0; i < p.g->total; i++) bad += !isfinite(grads[i]);
        CHECK(bad == 0, "extreme %d: %zu gradients are not finite", extreme, bad);
        const Tensor *t = &p.c->tensors[TENSOR_attprojw];
        COMPARE(grads + t->offset, p.c->grads + t->offset, t->size, (extreme < 2 ? 200 : 1) * MODEL,
                "extreme %d: gradient of %s", extreme, t->name);
        free_pair(&p);
    }
}

/* A sequence alone is cut into segments, among many it is not: the same numbers but for rounding. */
static void test_segments(void) {
    enum { T = 600, B = 88 };
    Config config = kind_config(12);
    config.T = T;
    Pair p = make_pair(&config, B, 37);
    CudaSizes z = p.g->sizes;
    for (size_t b = 1; b < B; b++) {
        memcpy(p.x + b * T, p.x, T * sizeof(int));
        memcpy(p.y + b * T, p.y, T * sizeof(int));
    }
    CHECK(scan_segments(z.NH, T) == 4 && scan_segments(B * z.NH, T) == 1, "segments: %d and %d", scan_segments(z.NH, T),
          scan_segments(B * z.NH, T));
    float *outs[2], *grads[2];
    for (int alone = 0; alone < 2; alone++) {
        cuda_zero_gradients(p.g);
        cuda_forward(p.g, p.x, p.y, alone ? 1 : B, T);
        cuda_backward(p.g, 1);
        outs[alone] = download(p.g->a.att, T * z.A);
        grads[alone] = cpu::numbers(p.g->total, 0, NULL);
        memcpy(grads[alone], cuda_read(p.g, BUFFER_GRADS), p.g->total * sizeof(float));
    }
    COMPARE(outs[1], outs[0], T * z.A, OUTPUT, "a sequence in segments");
    for (int i = 0; i < NUM_TENSORS; i++) {
        const Tensor *t = &p.c->tensors[i];
        if (!t->size || t->group == GROUP_FIXED) continue;
        bool waves = is_wave(i), splat = is_sum(t, i);
        COMPARE(grads[1] + t->offset, grads[0] + t->offset, t->size,
                waves   ? MODEL_WAVES
                : splat ? MODEL_SPLATS
                        : MODEL,
                "a sequence in segments: gradient of %s", t->name);
    }
    free_pair(&p);
}

/* A window as long as the sequence leaves nothing far: extended heads are standard ones, bit for bit. */
static void test_extend_limit(void) {
    Config extend = make_config(ATTENTION_EXTEND, NULL, POSITION_ROPE, COVARIANCE_ISO, ENVELOPE_RAISED, 64, 8, 70,
                                MIXER_LINEAR, OBJECTIVE_LM);
    Config standard = make_config(ATTENTION_STANDARD, NULL, POSITION_ROPE, COVARIANCE_ISO, ENVELOPE_RAISED, 64, 8, 0,
                                  MIXER_SOFTMAX, OBJECTIVE_LM);
    Pair a = make_pair(&extend, 2, 41), b = make_pair(&standard, 2, 41);
    float logits[2][128];
    for (int i = 0; i < NUM_TENSORS; i++) {
        const Tensor *from = &a.c->tensors[i], *to = &b.c->tensors[i];
        if (to->size) memcpy(b.c->params + to->offset, a.c->params + from->offset, to->size * sizeof(float));
    }
    cuda_write(b.g, BUFFER_PARAMS, b.c->params);
    for (int i = 0; i < 2; i++) {
        cuda_forward(i ? b.g : a.g, a.x, NULL, 2, 70);
        cuda_logits(i ? b.g : a.g, 1, 69, logits[i]);
    }
    CHECK(memcmp(logits[0], logits[1], extend.V * sizeof(float)) == 0,
          "extend with a window as long as the sequence is standard attention");
    free_pair(&a);
    free_pair(&b);
}

/* A sequence of one token; the mean loss of the last 50 of 500 updates. */
static void test_training(int kind) {
    Config config = kind_config(kind);
    config.T = 32;
    config.L = 1;
    Pair p = make_pair(&config, 4, 23);
    double one = cpu::gsa_forward(p.c, p.x, p.y, 1, 1), device_one = cuda_forward(p.g, p.x, p.y, 1, 1), sum = 0,
           device_sum = 0;
    CHECK(fabs(device_one / one - 1) <= LOSS, "one token: loss %.7f, CPU %.7f", device_one, one);
    uint64_t rng = 9;
    for (int step = 1; step <= 500; step++) {
        Update u = {{1e-3, 1e-2}, 0.9, 0.95, 0.1, {1, 1}, step, 0.95};
        int64_t clamped[NUM_BOUNDS];
        for (size_t i = 0; i < p.B * p.T; i++) { /* x counts up by steps that a sequence keeps; a tenth is noise */
            size_t b = i / p.T;
            p.x[i] = i % p.T == 0 ? (int)rng_below(&rng, config.V) : p.y[i - 1];
            p.y[i] = rng_below(&rng, 10) == 0 ? (int)rng_below(&rng, config.V) : (p.x[i] + 1 + (int)b) % config.V;
        }
        cpu::gsa_zero_gradients(p.c);
        cuda_zero_gradients(p.g);
        double loss = cpu::gsa_forward(p.c, p.x, p.y, p.B, p.T),
               device_loss = cuda_forward(p.g, p.x, p.y, (int)p.B, (int)p.T);
        if (step > 450) {
            sum += loss;
            device_sum += device_loss;
        }
        cpu::gsa_backward(p.c, 1);
        cuda_backward(p.g, 1);
        cpu::gsa_update(p.c, &u, clamped);
        cuda_update(p.g, &u, clamped);
    }
    CHECK(fabs(device_sum / sum - 1) <= 0.005, "the last 50 of 500 updates: mean loss %.6f, CPU %.6f", device_sum / 50,
          sum / 50);
    free_pair(&p);
}

#ifndef GSA_TEST_NO_MAIN
int main(int argc, char **argv) {
    int count = 0;
    program_name(argv[0]);
    if (cudaGetDeviceCount(&count) != cudaSuccess || count == 0) {
        skip("train_gsa.cu", "no NVIDIA GPU answers");
        return test_summary(name);
    }
    /* for compute-sanitizer: every kernel, few times; --kernels: without cuBLASLt's, which racecheck cannot run on
       an H100; --muon: what Muon does alone */
    bool kernels = argc > 1 && strcmp(argv[1], "--kernels") == 0, small = argc > 1 && strcmp(argv[1], "--small") == 0;
    if (kernels) {
        test_encoder(96);
        test_layernorm(37, 320);
        test_classifier(1000, 1024);
        test_muon_passes(96 * 32);
        for (int k = 0; k < KINDS; k++) test_heads(k, 2, 70);
        return test_summary(name);
    }
    if (argc > 1 && strcmp(argv[1], "--muon") == 0) {
        test_all_muon();
        return test_summary(name);
    }
    Matmul mm;
    matmul_create(&mm);
    test_encoder(96);
    test_encoder(544);
    const size_t widths[] = {32, 96, 320, 768, 1024, 1280, 4096};
    for (size_t i = 0; i < 7; i++) test_layernorm(37, widths[i]);
    test_matmul(&mm, 37, 96, 160, false);
    test_matmul(&mm, 70, 64, 256, true);
    test_matmul(&mm, 301, 256, 64, true);
    test_classifier(77, 80);
    test_classifier(1000, 1024);
    test_classifier(50257, 50304);
    test_classifier(65500, 65536); /* more than shared memory keeps, in bf16 too: the row is read twice */
    matmul_destroy(&mm);
    test_all_muon();
    for (int k = 0; k < KINDS; k += small ? 4 : 1) {
        test_heads(k, 2, 70);
        test_model(k, small ? 1 : 10);
        test_late(k, false);
        if (small) continue;
        test_heads(k, 1, 1);
        test_heads(k, 3, 129);
        test_heads(k, 2, 300);
        /* one token beyond a chunk; many segments */
        if (kinds[k].mixer == MIXER_LINEAR) {
            test_heads(k, 1, 65);
            test_heads(k, 1, 1100);
        }
        test_determinism(k, false);
        test_identities(k);
        test_recompute(k);
    }
    test_bounds(4);
    test_bounds(10);
    test_bounds(12);
    test_bounds(13);
    test_bounds(9);
    test_extremes();
    if (!small) {
        test_determinism(9, true);
        test_late(9, true);
        test_segments();
        test_extend_limit();
        test_shared_memory();
        test_memory();
        test_million();
        test_scan_million();
        test_training(7);
        test_training(12);
    }
    return test_summary(name);
}
#endif
