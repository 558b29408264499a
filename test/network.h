/* The network itself, inside a test program: train_gsa.c whole, and what tests of it share. With GSA_DOUBLE defined
   before, all its numbers are double; with INFER_NO_MAIN, infer.c and its decoder come along. */
#ifndef GSA_TEST_NETWORK_H
#define GSA_TEST_NETWORK_H

#define GSA_NO_MAIN
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-function" /* no test calls every layer */
#ifdef INFER_NO_MAIN
#include "../infer.c"
#else
#include "../train_gsa.c"
#endif
#pragma GCC diagnostic pop
#include "test.h"

/* Random arrays that live until the end of a test: one call frees them all. */
static void *test_memory[4096];
static int test_memory_count;

__attribute__((unused)) static real *numbers(size_t n, double deviation, uint64_t *rng) {
    real *x = (real *)xcalloc(n ? n : 1, sizeof(real));
    if (test_memory_count == (int)(sizeof test_memory / sizeof *test_memory)) die("a test makes too many arrays");
    test_memory[test_memory_count++] = x;
    if (deviation > 0)
        for (size_t i = 0; i < n; i++) x[i] = (real)(deviation * rng_normal(rng));
    return x;
}

__attribute__((unused)) static void free_numbers(void) {
    while (test_memory_count > 0) free(test_memory[--test_memory_count]);
}

/* NaN where one of them is */
__attribute__((unused)) static double max_of(double a, double b) { return a > b || a != a ? a : b; }

/* |a - b| / |b| as relative_error, b the formula's values in double */
__attribute__((unused)) static double error_of(const real *a, const double *b, size_t n) {
    double *wide = (double *)xmalloc(n * sizeof(double));
    for (size_t i = 0; i < n; i++) wide[i] = a[i];
    double error = relative_error_double(wide, b, n);
    free(wide);
    return error;
}

/* A small model of odd sizes: nothing is a multiple of a block or of a vector register, the splats do not fill a
   head, the vocabulary is padded. NULL, or the sentence that refuses the combination. heads: the text of --gsa-heads
   or NULL. */
static const char *try_config(Config *c, int attention, const char *heads, int position, int mixer, int covariance,
                              int envelope, int window, int objective) {
    memset(c, 0, sizeof *c);
    c->T = 70;
    c->V = 13;
    c->Vp = 16;
    c->L = 2;
    c->NH = 2;
    c->C = 20;
    c->S = 3;
    c->attention = attention;
    c->position = position;
    c->mixer = mixer;
    c->covariance = covariance;
    c->envelope = envelope;
    c->window = window;
    c->objective = objective;
    const char *problem = config_head_map(c, heads);
    c->gain = GAIN_HEAD; /* where there are heads for it */
    if (position == POSITION_LEARNED || config_gains(c) < 1) c->gain = GAIN_NONE;
    c->phase = config_has_cosine(c) && config_gsa_heads(c) ? PHASE_LEARNED : PHASE_NONE; /* where there are cosines */
    int gates[] = {FORGET_HALF, FORGET_ALL, FORGET_NONE}; /* by position, where they fit */
    c->forget = attention == ATTENTION_EXTEND || objective == OBJECTIVE_MLM ? FORGET_NONE : gates[position];
    if (config_gates(c) < 1) c->forget = FORGET_NONE;
    c->rope = position == POSITION_ROPE && c->gain ? ROPE_LEARNED : ROPE_FIXED;
    return problem ? problem : config_check(c);
}

__attribute__((unused)) static Config small_config(int attention, const char *heads, int position, int covariance,
                                                   int envelope) {
    Config c;
    const char *problem =
        try_config(&c, attention, heads, position, MIXER_SOFTMAX, covariance, envelope, 0, OBJECTIVE_LM);
    if (problem) die("%s", problem);
    return c;
}

/* A model far from its symmetric start: every gradient is generic, no tensor's is near zero, attention is not
   uniform. */
__attribute__((unused)) static GSA *scattered_model(const Config *c, size_t B, uint64_t seed) {
    GSA *m = gsa_create(c, B);
    float *start = (float *)xmalloc(m->total * sizeof(float));
    model_start(c, start, seed);
    uint64_t rng = rng_mix(seed, 1000);
    for (int i = 0; i < NUM_TENSORS; i++) {
        const Tensor *t = &m->tensors[i];
        size_t n = i == TENSOR_wte ? (size_t)c->V * c->C : t->size; /* the padding of the vocabulary stays 0 */
        double noise = t->group == GROUP_FIXED ? 0 : i == TENSOR_psi ? 0.5 : t->group == GROUP_MATRIX ? 0.3 : 0.2;
        for (size_t k = 0; k < n; k++)
            m->params[t->offset + k] = (real)(start[t->offset + k] + noise * rng_normal(&rng));
    }
    free(start);
    gsa_scales(m);
    gsa_rope_waves(m, m->a.rope_waves, (size_t)c->T, 0);
    return m;
}

__attribute__((unused)) static void random_tokens(int *tokens, size_t n, int V, uint64_t *rng) {
    for (size_t i = 0; i < n; i++) tokens[i] = (int)rng_below(rng, (uint64_t)V);
}

#endif
