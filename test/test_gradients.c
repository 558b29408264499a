/* Every gradient of train_gsa.c against central differences, with the program's own layers compiled in double: first
   the layers one by one, then whole models of every kind. A gradient passes where it is wrong by at most 1e-6 of its
   norm, in random directions and in single entries, and where that norm is not near zero. The checker itself is
   checked: it must refuse wrong gradients. */
#define GSA_DOUBLE
#include "network.h"

#include <stdarg.h>

#define TOLERANCE 1e-6
#define SMALLEST_NORM 5e-6 /* of a gradient that says something; the functions below have values of about 1 */

typedef double (*Function)(void *of); /* a function of numbers that the caller changes in place */

/* df/dh at x + h u, four points: the error is h^4 / 30 times the fifth derivative */
static double slope(Function f, void *of, real *x, const real *u, size_t n, double h) {
    const double at[4] = {-2, -1, 1, 2}, weight[4] = {1, -8, 8, -1};
    real *keep = (real *)xmalloc(n * sizeof(real));
    double sum = 0;
    memcpy(keep, x, n * sizeof(real));
    for (int i = 0; i < 4; i++) {
        for (size_t k = 0; k < n; k++) x[k] = keep[k] + at[i] * h * u[k];
        sum += weight[i] * f(of);
    }
    memcpy(x, keep, n * sizeof(real));
    free(keep);
    return sum / (12 * h);
}

static double norm(const real *x, size_t n) {
    double sum = 0;
    for (size_t k = 0; k < n; k++) sum += x[k] * x[k];
    return sqrt(sum);
}

/* The largest error of the gradient g of f at x, relative to the norm of g: along two random directions, whose
   entries have deviation 1, in the entry where g is largest and in two others. Infinite where g is not finite or
   near zero. */
static double gradient_error(Function f, void *of, real *x, const real *g, size_t n, double h) {
    uint64_t rng = n;
    double size = norm(g, n), worst = 0;
    if (!(size >= SMALLEST_NORM) || !isfinite(size)) return INFINITY;
    real *u = (real *)xcalloc(n, sizeof(real));
    for (int trial = 0; trial < 5; trial++) {
        double expected = 0;
        size_t entry = rng_below(&rng, n);
        if (trial == 2)
            for (size_t k = 0; k < n; k++) entry = fabs(g[k]) > fabs(g[entry]) ? k : entry;
        for (size_t k = 0; k < n; k++) {
            u[k] = trial < 2 ? rng_normal(&rng) : k == entry;
            expected += g[k] * u[k];
        }
        double error = fabs(slope(f, of, x, u, n, h) - expected) / size;
        if (!isfinite(error)) worst = INFINITY;
        if (error > worst) worst = error;
    }
    free(u);
    return worst;
}

#define CHECK_GRADIENT(f, of, x, g, n, h, ...) check_gradient(f, of, x, g, n, h, __LINE__, __VA_ARGS__)
__attribute__((format(printf, 8, 9))) static void check_gradient(Function f, void *of, real *x, const real *g, size_t n,
                                                                 double h, int line, const char *format, ...) {
    char what[256];
    va_list args;
    va_start(args, format);
    vsnprintf(what, sizeof what, format, args);
    va_end(args);
    double error = gradient_error(f, of, x, g, n, h);
    /* where the function bends sharply the step has to be smaller, where it is nearly flat, larger; a wrong gradient
       fits no step */
    for (int i = 0; i < 2 && !(error <= TOLERANCE); i++)
        error = fmin(error, gradient_error(f, of, x, g, n, i ? 8 * h : h / 8));
    check(error <= TOLERANCE, __FILE__, line, "%s: error %.1e of the gradient's norm %.1e", what, error, norm(g, n));
}

/* ---------------------------------------------------------------------- single layers */

/* A layer as a function: the dot product of its output with fixed random numbers dout, which so are the output's
   gradient. */
typedef struct Layer {
    void (*forward)(struct Layer *);
    real *in, *weight, *bias, *out, *dout, *scratch[2];
    const int *tokens;
    size_t outputs, B, T, N, C, OC, first, windows[2];
    Gates gates;
    bool causal;
} Layer;

static double layer_value(void *of) {
    Layer *l = (Layer *)of;
    double sum = 0;
    l->forward(l);
    for (size_t i = 0; i < l->outputs; i++) sum += l->out[i] * l->dout[i];
    return sum;
}

static void run_encoder(Layer *l) {
    encoder_forward(l->out, l->tokens, l->weight, l->bias, l->B, l->T, l->C, l->first);
}

static void test_encoder(void) {
    uint64_t rng = 1;
    enum { V = 9 };
    int tokens[14];
    random_tokens(tokens, 14, V, &rng);
    Layer l = {.forward = run_encoder, .B = 2, .T = 7, .C = 37, .tokens = tokens, .outputs = 14 * 37};
    l.weight = numbers(V * l.C, 1, &rng);
    l.bias = numbers(l.T * l.C, 1, &rng);
    l.out = numbers(l.outputs, 0, NULL);
    l.dout = numbers(l.outputs, 1, &rng);
    real *dwte = numbers(V * l.C, 0, NULL), *dwpe = numbers(l.T * l.C, 0, NULL), *alone = numbers(V * l.C, 0, NULL);
    encoder_backward(dwte, dwpe, l.dout, tokens, l.B, l.T, l.C);
    CHECK_GRADIENT(layer_value, &l, l.weight, dwte, V * l.C, 1e-2, "encoder, wte");
    CHECK_GRADIENT(layer_value, &l, l.bias, dwpe, l.T * l.C, 1e-2, "encoder, wpe");
    encoder_backward(alone, NULL, l.dout, tokens, l.B, l.T, l.C);
    CHECK(memcmp(alone, dwte, V * l.C * sizeof(real)) == 0, "encoder without positions: the same gradient of wte");
    free_numbers();
}

static void run_layernorm(Layer *l) {
    layernorm_forward(l->out, l->scratch[0], l->scratch[1], l->in, l->weight, l->bias, l->N, l->C);
}

static void test_layernorm(void) {
    uint64_t rng = 2;
    Layer l = {.forward = run_layernorm, .N = 5, .C = 67, .outputs = 5 * 67};
    l.in = numbers(l.outputs, 1, &rng);
    l.weight = numbers(l.C, 1, &rng);
    l.bias = numbers(l.C, 1, &rng);
    l.out = numbers(l.outputs, 0, NULL);
    l.dout = numbers(l.outputs, 1, &rng);
    l.scratch[0] = numbers(l.N, 0, NULL);
    l.scratch[1] = numbers(l.N, 0, NULL);
    real *din = numbers(l.outputs, 1, &rng), *before = numbers(l.outputs, 0, NULL), *dweight = numbers(l.C, 0, NULL),
         *dbias = numbers(l.C, 0, NULL);
    memcpy(before, din, l.outputs * sizeof(real));
    l.forward(&l);
    layernorm_backward(din, dweight, dbias, l.dout, l.in, l.weight, l.scratch[0], l.scratch[1], l.N, l.C);
    for (size_t i = 0; i < l.outputs; i++) din[i] -= before[i]; /* it adds to the residual stream's gradient */
    CHECK_GRADIENT(layer_value, &l, l.in, din, l.outputs, 1e-3, "layernorm, input");
    CHECK_GRADIENT(layer_value, &l, l.weight, dweight, l.C, 1e-2, "layernorm, weight");
    CHECK_GRADIENT(layer_value, &l, l.bias, dbias, l.C, 1e-2, "layernorm, bias");
    free_numbers();
}

static void run_matmul(Layer *l) { matmul_forward(l->out, l->in, l->weight, l->bias, l->N, l->C, l->OC); }

static void test_matmul(size_t N, size_t C, size_t OC) {
    uint64_t rng = 3;
    Layer l = {.forward = run_matmul, .N = N, .C = C, .OC = OC, .outputs = N * OC};
    l.in = numbers(N * C, 1, &rng);
    l.weight = numbers(OC * C, 1, &rng);
    l.bias = numbers(OC, 1, &rng);
    l.out = numbers(l.outputs, 0, NULL);
    l.dout = numbers(l.outputs, 1, &rng);
    /* what stands in din must not matter, nor in dweight if nothing is to be added */
    real *din = numbers(N * C, 1, &rng), *dweight = numbers(OC * C, 1, &rng), *dbias = numbers(OC, 0, NULL);
    matmul_backward(din, dweight, dbias, l.dout, l.in, l.weight, N, C, OC, false);
    CHECK_GRADIENT(layer_value, &l, l.in, din, N * C, 1e-2, "matmul (%zu, %zu, %zu), input", N, C, OC);
    CHECK_GRADIENT(layer_value, &l, l.weight, dweight, OC * C, 1e-2, "matmul (%zu, %zu, %zu), weight", N, C, OC);
    CHECK_GRADIENT(layer_value, &l, l.bias, dbias, OC, 1e-2, "matmul (%zu, %zu, %zu), bias", N, C, OC);
    real *twice = numbers(OC * C, 0, NULL);
    memcpy(twice, dweight, OC * C * sizeof *twice);
    matmul_backward(din, twice, dbias, l.dout, l.in, l.weight, N, C, OC, true);
    for (size_t i = 0; i < OC * C; i++) twice[i] /= 2;
    double error = relative_error_double(twice, dweight, OC * C);
    CHECK(error < 1e-12, "matmul (%zu, %zu, %zu), weight, added: %g", N, C, OC, error);
    free_numbers();
}

static void run_gelu(Layer *l) { gelu_forward(l->out, l->in, l->outputs); }

static void test_gelu(void) {
    uint64_t rng = 4;
    Layer l = {.forward = run_gelu, .outputs = 101};
    l.in = numbers(l.outputs, 2, &rng);
    l.out = numbers(l.outputs, 0, NULL);
    l.dout = numbers(l.outputs, 1, &rng);
    l.in[0] = 30;
    l.in[1] = -30;
    l.in[2] = 0;
    real *din = numbers(l.outputs, 0, NULL);
    gelu_backward(din, l.dout, l.in, l.outputs);
    CHECK_GRADIENT(layer_value, &l, l.in, din, l.outputs, 1e-3, "gelu");
    real *same = numbers(l.outputs, 0, NULL);
    memcpy(same, l.dout, l.outputs * sizeof(real));
    gelu_backward(same, same, l.in, l.outputs);
    CHECK(memcmp(same, din, l.outputs * sizeof(real)) == 0, "gelu's gradient in place");
    free_numbers();
}

/* V = C, Vp = OC; the value is the weighted sum of losses with one weight for all, as the backward pass has it. */
static void run_classifier(Layer *l) { classifier_forward(l->out, l->scratch[0], l->in, l->tokens, l->N, l->C, l->OC); }

static void test_classifier(void) {
    uint64_t rng = 5;
    int targets[6];
    random_tokens(targets, 6, 13, &rng);
    targets[5] = 12;
    Layer l = {.forward = run_classifier, .N = 6, .C = 13, .OC = 16, .outputs = 6, .tokens = targets};
    l.in = numbers(6 * 16, 2, &rng);
    l.out = numbers(6, 0, NULL);
    l.dout = numbers(6, 0, NULL);
    l.scratch[0] = numbers(6, 0, NULL);
    for (size_t i = 0; i < 6; i++) l.dout[i] = 0.7;
    real *gradient = numbers(6 * 16, 0, NULL);
    l.forward(&l);
    memcpy(gradient, l.in, 6 * 16 * sizeof(real));
    classifier_backward(gradient, l.scratch[0], targets, 0.7, 6, 13, 16);
    CHECK_GRADIENT(layer_value, &l, l.in, gradient, 6 * 16, 1e-3, "classifier");
    for (size_t i = 0; i < 6; i++)
        CHECK(gradient[i * 16 + 13] == 0 && gradient[i * 16 + 15] == 0, "classifier: no gradient in the padding");
    free_numbers();
}

/* x is a slice of rows of 3 HS numbers, as in qkv; what lies beside it must get no gradient. */
static void run_rope(Layer *l) { rope_forward(l->out, l->in + l->C, 3 * l->C, l->weight, l->T, l->C); }

static void test_rope(double deviation, double h) {
    uint64_t rng = 6;
    Layer l = {.forward = run_rope, .T = 7, .C = 10, .outputs = 70};
    l.in = numbers(7 * 30, deviation, &rng);
    l.out = numbers(70, 0, NULL);
    l.dout = numbers(70, 1, &rng);
    l.weight = numbers(70, 0, NULL);
    rope_table(l.weight, NULL, l.T, l.C, 5);
    real *din = numbers(7 * 30, 0, NULL);
    rope_backward(din + l.C, l.dout, l.in + l.C, 3 * l.C, l.weight, l.T, l.C);
    CHECK_GRADIENT(layer_value, &l, l.in, din, 7 * 30, h, "rope, inputs of deviation %g", deviation);
    free_numbers();
}

/* (B, T, NH, HS) = (2, 70, 2, 6): the scales of the two heads differ; fq in `in`, fk in `weight`, qkv in `bias`. */
static void run_attention(Layer *l) {
    attention_forward(l->out, l->scratch[0], l->in, l->weight, l->bias, l->scratch[1], l->windows, &l->gates, l->causal,
                      l->B, l->T, 2, l->C / 2);
}

static void test_attention(size_t T, size_t window, bool causal) {
    uint64_t rng = 7;
    Layer l = {.forward = run_attention,
               .B = 2,
               .T = T,
               .C = 12,
               .outputs = 2 * T * 12,
               .windows = {T, window},
               .causal = causal};
    l.in = numbers(l.outputs, 1, &rng);
    l.weight = numbers(l.outputs, 1, &rng);
    l.bias = numbers(3 * l.outputs, 1, &rng);
    l.out = numbers(l.outputs, 0, NULL);
    l.dout = numbers(l.outputs, 1, &rng);
    l.scratch[0] = numbers(l.B * 2 * T, 0, NULL);
    l.scratch[1] = numbers(2, 0, NULL);
    l.scratch[1][0] = 0.4;
    l.scratch[1][1] = 1;
    /* the second head has a gate where there is one direction */
    static const int none[] = {-1, -1}, second[] = {-1, 0};
    real *log_forget = numbers(l.B * T, 0.3, &rng), *dlog_forget = numbers(l.B * T, 1, &rng);
    for (size_t i = 0; i < l.B * T; i++) log_forget[i] = -fabs(log_forget[i]);
    l.gates = (Gates){log_forget, dlog_forget, causal ? second : none, causal};
    /* overwritten */
    real *dfq = numbers(l.outputs, 1, &rng), *dfk = numbers(l.outputs, 1, &rng),
         *dqkv = numbers(3 * l.outputs, 1, &rng);
    l.forward(&l);
    attention_backward(dfq, dfk, dqkv, l.dout, l.out, l.scratch[0], l.in, l.weight, l.bias, l.scratch[1], l.windows,
                       &l.gates, causal, l.B, T, 2, 6);
    /* the parts of q and k are not attention's */
    for (size_t i = 0; i < l.B * T; i++) memset(dqkv + i * 36, 0, 24 * sizeof(real));
    if (causal && T > 1)
        CHECK_GRADIENT(layer_value, &l, log_forget, dlog_forget, l.B * T, 1e-3, "attention, T = %zu, window %zu, ln f",
                       T, window);
    CHECK_GRADIENT(layer_value, &l, l.bias, dqkv, 3 * l.outputs, 1e-2, "attention, T = %zu, window %zu, %s, v", T,
                   window, causal ? "causal" : "both sides");
    if (T > 1) {
        CHECK_GRADIENT(layer_value, &l, l.in, dfq, l.outputs, 1e-3,
                       "attention, T = %zu, window %zu, %s, query features", T, window,
                       causal ? "causal" : "both sides");
        CHECK_GRADIENT(layer_value, &l, l.weight, dfk, l.outputs, 1e-3,
                       "attention, T = %zu, window %zu, %s, key features", T, window, causal ? "causal" : "both sides");
    } else {
        CHECK(norm(dfq, l.outputs) < 1e-14 && norm(dfk, l.outputs) < 1e-14,
              "attention to oneself alone: no gradient of query and key");
    }
    free_numbers();
}

/* ---------------------------------------------------------------------- splats */

/* One GSA head: B sequences of qkv (B, T, 3 HS), its splats, its output. Feature maps alone: only `query` or keys, B
   = 1. */
typedef struct {
    size_t B, T, HS, S, P, first;
    bool query, envelope;
    real *qkv, *mu, *log_precision, *log_alpha, *log_theta, *psi, *alive;
    real *theta, *waves, *fq, *fk, *lse, *out, *dout;
    real *dqkv, *dfq, *dfk, *moments_q, *moments_k, *dmu, *dlog_precision, *dlog_alpha, *dlog_theta, *dpsi;
    real one;
} Head;

static const char *const covariance_names[] = {"isotropic", "diagonal", "full"};

static Head make_head(size_t B, size_t T, size_t HS, size_t S, int covariance, bool envelope, uint64_t seed) {
    uint64_t rng = seed;
    Head h = {.B = B,
              .T = T,
              .HS = HS,
              .S = S,
              .P = covariance == COVARIANCE_ISO    ? 1
                   : covariance == COVARIANCE_DIAG ? HS
                                                   : HS * (HS + 1) / 2,
              .envelope = envelope,
              .one = 1};
    size_t n = B * T * HS, record = moments_size(S, h.P, HS);
    h.qkv = numbers(3 * n, 1, &rng);
    h.dout = numbers(n, 1, &rng);
    h.mu = numbers(S * HS, 0.4, &rng);
    h.log_precision = numbers(S * h.P, 0.5, &rng);
    h.log_alpha = numbers(S, 0.5, &rng);
    h.log_theta = numbers(S, 0.5, &rng);
    h.psi = numbers(S, 1, &rng);
    for (size_t s = 0; s < S; s++) /* precision 4: full precision keeps half its logarithm, on the diagonal */
        for (size_t i = 0; i < (covariance == COVARIANCE_FULL ? HS : h.P); i++)
            h.log_precision[s * h.P + (covariance == COVARIANCE_FULL ? i * (i + 3) / 2 : i)] +=
                covariance == COVARIANCE_FULL ? log(2) : log(4);
    h.alive = numbers(S, 0, NULL);
    for (size_t s = 0; s < S; s++) {
        h.log_alpha[s] += 2;
        h.log_theta[s] -= 1.5;
        h.alive[s] = 1;
    }
    h.theta = numbers(S, 0, NULL);
    h.waves = numbers(T * 2 * S, 0, NULL);
    h.fq = numbers(n, 0, NULL);
    h.fk = numbers(n, 0, NULL);
    h.lse = numbers(B * T, 0, NULL);
    h.out = numbers(n, 0, NULL);
    h.dqkv = numbers(3 * n, 0, NULL);
    h.dfq = numbers(n, 1, &rng);
    h.dfk = numbers(n, 1, &rng);
    h.moments_q = numbers(B * record, 0, NULL);
    h.moments_k = numbers(B * record, 0, NULL);
    h.dmu = numbers(S * HS, 0, NULL);
    h.dlog_precision = numbers(S * h.P, 0, NULL);
    h.dlog_alpha = numbers(S, 0, NULL);
    h.dlog_theta = numbers(S, 0, NULL);
    h.dpsi = numbers(S, 0, NULL);
    return h;
}

static Splats splats_of(const Head *h) {
    return (Splats){.mu = h->mu,
                    .log_precision = h->log_precision,
                    .log_alpha = h->log_alpha,
                    .log_theta = h->envelope ? h->log_theta : NULL,
                    .psi = h->envelope ? h->psi : NULL,
                    .alive = h->alive,
                    .S = h->S,
                    .P = h->P};
}
static SplatGradients gradients_of(const Head *h) {
    return (SplatGradients){.mu = h->dmu,
                            .log_precision = h->dlog_precision,
                            .log_alpha = h->dlog_alpha,
                            .log_theta = h->envelope ? h->dlog_theta : NULL,
                            .psi = h->envelope ? h->dpsi : NULL};
}

static const real *head_waves(Head *h) {
    if (!h->envelope) return NULL;
    for (size_t s = 0; s < h->S; s++) h->theta[s] = exp(h->log_theta[s]);
    wave_table(h->waves, h->theta, h->S, h->T, h->first);
    return h->waves;
}

/* The feature map alone, one sequence; its features' gradients are dfq or dfk. */
static double features_value(void *of) {
    Head *h = (Head *)of;
    Splats w = splats_of(h);
    real *f = h->query ? h->fq : h->fk, *df = h->query ? h->dfq : h->dfk;
    double sum = 0;
    splat_forward(f, h->qkv + (h->query ? 0 : h->HS), 3 * h->HS, &w, h->query, head_waves(h), h->T, h->HS);
    for (size_t i = 0; i < h->T * h->HS; i++) sum += f[i] * df[i];
    return sum;
}

static void test_splat_features(size_t T, size_t HS, size_t S, int covariance, bool envelope, bool query) {
    Head h = make_head(1, T, HS, S, covariance, envelope, 8);
    char what[128];
    snprintf(what, sizeof what, "splat %s, T = %zu, %zu splats of size %zu, %s, %s envelope", query ? "query" : "key",
             T, S, HS, covariance_names[covariance], envelope ? "cosine" : "no");
    h.query = query;
    /* The frequency's moment counts positions from the middle of the window, which is right for a whole head, where
       only distances count. For a map alone the origin has to be there: T is odd, and a phase may wrap. */
    h.first = (size_t)0 - (T - 1) / 2;
    features_value(&h);
    Splats w = splats_of(&h);
    size_t slice = query ? 0 : HS;
    splat_backward(h.dqkv + slice, h.moments_q, query ? h.dfq : h.dfk, query ? h.fq : h.fk, h.qkv + slice, 3 * HS, &w,
                   query, envelope, T, HS);
    SplatGradients d = gradients_of(&h);
    splat_gradients(&d, h.moments_q, 0, 1, &w, HS);
    CHECK_GRADIENT(features_value, &h, h.qkv, h.dqkv, T * 3 * HS, 1e-3, "%s, x", what);
    CHECK_GRADIENT(features_value, &h, h.mu, h.dmu, S * HS, 1e-3, "%s, mu", what);
    CHECK_GRADIENT(features_value, &h, h.log_precision, h.dlog_precision, S * h.P, 1e-3, "%s, ln p", what);
    if (query) CHECK_GRADIENT(features_value, &h, h.log_alpha, h.dlog_alpha, S, 1e-3, "%s, ln alpha", what);
    else CHECK(norm(h.dlog_alpha, S) == 0, "%s: keys have no amplitude", what);
    if (envelope && T > 1) CHECK_GRADIENT(features_value, &h, h.log_theta, h.dlog_theta, S, 1e-3, "%s, ln theta", what);
    if (envelope && !query) CHECK_GRADIENT(features_value, &h, h.psi, h.dpsi, S, 1e-3, "%s, psi", what);
    else CHECK(norm(h.dpsi, S) == 0, "%s: no phase", what);
    free_numbers();
}

static double head_value(void *of) {
    Head *h = (Head *)of;
    Splats w = splats_of(h);
    const real *waves = head_waves(h);
    double sum = 0;
    for (size_t b = 0; b < h->B; b++) {
        const real *x = h->qkv + b * h->T * 3 * h->HS;
        splat_forward(h->fq + b * h->T * h->HS, x, 3 * h->HS, &w, true, waves, h->T, h->HS);
        splat_forward(h->fk + b * h->T * h->HS, x + h->HS, 3 * h->HS, &w, false, waves, h->T, h->HS);
    }
    attention_forward(h->out, h->lse, h->fq, h->fk, h->qkv, &h->one, &h->T, NULL, true, h->B, h->T, 1, h->HS);
    for (size_t i = 0; i < h->B * h->T * h->HS; i++) sum += h->out[i] * h->dout[i];
    return sum;
}

static void head_backward(Head *h) {
    Splats w = splats_of(h);
    size_t record = moments_size(h->S, h->P, h->HS);
    real *added[] = {h->moments_q, h->moments_k, h->dmu, h->dlog_precision, h->dlog_alpha, h->dlog_theta, h->dpsi};
    const size_t sizes[] = {h->B * record, h->B * record, h->S * h->HS, h->S * h->P, h->S, h->S, h->S};
    for (int i = 0; i < 7; i++) memset(added[i], 0, sizes[i] * sizeof(real));
    head_value(h);
    attention_backward(h->dfq, h->dfk, h->dqkv, h->dout, h->out, h->lse, h->fq, h->fk, h->qkv, &h->one, &h->T, NULL,
                       true, h->B, h->T, 1, h->HS);
    for (size_t b = 0; b < h->B; b++) {
        size_t x = b * h->T * 3 * h->HS, f = b * h->T * h->HS;
        splat_backward(h->dqkv + x, h->moments_q + b * record, h->dfq + f, h->fq + f, h->qkv + x, 3 * h->HS, &w, true,
                       h->envelope, h->T, h->HS);
        splat_backward(h->dqkv + x + h->HS, h->moments_k + b * record, h->dfk + f, h->fk + f, h->qkv + x + h->HS,
                       3 * h->HS, &w, false, h->envelope, h->T, h->HS);
    }
    SplatGradients d = gradients_of(h);
    splat_gradients(&d, h->moments_q, record, h->B, &w, h->HS); /* two calls add */
    splat_gradients(&d, h->moments_k, record, h->B, &w, h->HS);
}

static void check_head(Head *h, double h_x, const char *what) {
    size_t n = h->B * h->T * h->HS;
    head_backward(h);
    CHECK_GRADIENT(head_value, h, h->qkv, h->dqkv, 3 * n, h_x, "%s, qkv", what);
    CHECK_GRADIENT(head_value, h, h->mu, h->dmu, h->S * h->HS, 3e-4, "%s, mu", what);
    CHECK_GRADIENT(head_value, h, h->log_precision, h->dlog_precision, h->S * h->P, 3e-4, "%s, ln p", what);
    CHECK_GRADIENT(head_value, h, h->log_alpha, h->dlog_alpha, h->S, 3e-4, "%s, ln alpha", what);
    if (h->envelope) CHECK_GRADIENT(head_value, h, h->log_theta, h->dlog_theta, h->S, 3e-5, "%s, ln theta", what);
    if (h->envelope) CHECK_GRADIENT(head_value, h, h->psi, h->dpsi, h->S, 3e-4, "%s, psi", what);
}

/* What holds exactly, whatever the loss: softmax does not see a common shift of a query's logits, and a head with
   this envelope sees only distances. */
static void check_identities(Head *h, const char *what) {
    size_t S = h->S, HS = h->HS, T = h->T, record = moments_size(S, h->P, HS), amplitude = S * (1 + HS + h->P),
           frequency = amplitude + S;
    for (size_t s = 0; s < S; s++) {
        double Q = 0, K = 0, sum_alpha = 0;
        for (size_t b = 0; b < h->B; b++) {
            Q += h->moments_q[b * record + s];
            K += h->moments_k[b * record + s];
            sum_alpha += h->moments_q[b * record + amplitude + s];
            CHECK(h->moments_k[b * record + amplitude + s] == 0, "%s: no amplitude from keys", what);
        }
        double size = 0; /* of the terms that were added */
        for (size_t i = 0; i < h->B * T; i++) {
            const size_t at = i * HS + s;
            size += fabs(h->fq[at] * h->dfq[at]) + fabs(h->fk[at] * h->dfk[at]);
        }
        CHECK(fabs(Q - K) <= 1e-12 * size, "%s, splat %zu: sum of Q %g = sum of K %g", what, s, Q, K);
        CHECK(fabs(Q - sum_alpha) <= 1e-12 * size && fabs(Q - h->dlog_alpha[s]) <= 1e-12 * size,
              "%s, splat %zu: d ln alpha = sum of Q", what, s);
    }
    double worst = 0; /* the unit vector has no radius: dx . x = 0 up to 1e-6 / |x|^2 */
    for (size_t i = 0; i < h->B * T * 2; i++) {
        const real *x = h->qkv + i / 2 * 3 * HS + i % 2 * HS, *dx = h->dqkv + i / 2 * 3 * HS + i % 2 * HS;
        double dot = 0;
        for (size_t k = 0; k < HS; k++) dot += x[k] * dx[k];
        double square = norm(x, HS) * norm(x, HS);
        double cosine = fabs(dot) / (norm(x, HS) * norm(dx, HS) + 1e-300) * square;
        if (cosine > worst) worst = cosine;
    }
    CHECK(worst < 3e-4, "%s: dx . x = 0 up to the epsilon, not %g", what, worst);
    if (!h->envelope) return;
    /* sum of X = 0: one more token without gradient moves the middle of the window by half a position, so the
       frequency's moment changes by half the sum of X */
    Splats w = splats_of(h);
    real *f = numbers((T + 1) * HS, 0, NULL), *df = numbers((T + 1) * HS, 0, NULL), *x = numbers((T + 1) * HS, 0, NULL),
         *dx = numbers((T + 1) * HS, 0, NULL);
    real *moments = numbers(record, 0, NULL), *longer = numbers(record, 0, NULL);
    for (int key = 0; key < 2; key++) { /* of the first sequence; only f and df matter to this moment */
        memcpy(f, key ? h->fk : h->fq, T * HS * sizeof(real));
        memcpy(df, key ? h->dfk : h->dfq, T * HS * sizeof(real));
        splat_backward(dx, moments, df, f, x, HS, &w, !key, true, T, HS);
        splat_backward(dx, longer, df, f, x, HS, &w, !key, true, T + 1, HS);
    }
    for (size_t s = 0; s < S; s++) {
        double size = 0;
        for (size_t t = 0; t < T; t++)
            for (size_t e = s; e < 2 * S; e += S)
                size += fabs(h->fq[t * HS + e] * h->dfq[t * HS + (s + S + s - e)]) +
                        fabs(h->fk[t * HS + e] * h->dfk[t * HS + (s + S + s - e)]);
        double sum = 2 * (moments[frequency + s] - longer[frequency + s]);
        CHECK(fabs(sum) <= 1e-11 * size * (double)T && size > 1e-6, "%s, splat %zu: sum of X = %g, its terms %g", what,
              s, sum, size);
    }
}

static void test_splat_head(size_t B, size_t T, size_t HS, size_t S, int covariance, bool envelope) {
    char what[128];
    snprintf(what, sizeof what, "head (%zu, %zu), %zu splats of size %zu, %s, %s envelope", B, T, S, HS,
             covariance_names[covariance], envelope ? "cosine" : "no");
    Head h = make_head(B, T, HS, S, covariance, envelope, 9);
    check_head(&h, 1e-3, what);
    head_backward(&h);
    check_identities(&h, what);
    /* constant v: o = v whatever the weights, so q and k have no gradient */
    for (size_t i = 0; i < B * T; i++)
        for (size_t k = 0; k < HS; k++) h.qkv[i * 3 * HS + 2 * HS + k] = 1 + (double)k;
    head_backward(&h);
    double off = 0, features = 0;
    for (size_t i = 0; i < B * T * HS; i++) {
        off = fmax(off, fabs(h.out[i] - (1 + (double)(i % HS))));
        features = fmax(features, fmax(fabs(h.dfq[i]), fabs(h.dfk[i])));
    }
    CHECK(off < 1e-13 && features < 1e-10, "%s: constant v: o = v up to %g, gradients of features up to %g", what, off,
          features);
    free_numbers();
}

static void test_splat_extremes(void) {
    char what[128];
    for (int diagonal = 0; diagonal < 2; diagonal++)
        for (int envelope = 0; envelope < 2; envelope++) {
            const char *kind = diagonal ? "diagonal" : "isotropic", *wave = envelope ? "cosine" : "no envelope";
            enum { T = 9, HS = 10, S = 3 };

            /* queries near zero: still smooth, see equation (1)'s epsilon */
            Head h = make_head(1, T, HS, S, diagonal, envelope, 10);
            for (size_t t = 0; t < T; t++) {
                double length = norm(h.qkv + t * 3 * HS, HS);
                for (size_t k = 0; k < HS; k++) h.qkv[t * 3 * HS + k] *= 1e-4 / length;
            }
            snprintf(what, sizeof what, "queries of length 1e-4, %s, %s", kind, wave);
            check_head(&h, 1e-6, what);
            for (size_t t = 0; t < T; t++) memset(h.qkv + t * 3 * HS, 0, HS * sizeof(real));
            head_backward(&h);
            CHECK(isfinite(norm(h.out, T * HS)) && isfinite(norm(h.dqkv, T * 3 * HS)) && isfinite(norm(h.dmu, S * HS)),
                  "queries of zeros, %s, %s: finite", kind, wave);
            free_numbers();

            /* all keys equal: without an envelope the weights are too */
            h = make_head(1, T, HS, S, diagonal, envelope, 11);
            for (size_t t = 1; t < T; t++) memcpy(h.qkv + t * 3 * HS + HS, h.qkv + HS, HS * sizeof(real));
            for (size_t s = 0; s < S; s++) h.log_alpha[s] += 3;
            snprintf(what, sizeof what, "equal keys, %s, %s", kind, wave);
            head_backward(&h);
            if (envelope) {
                check_head(&h, 1e-3, what);
            } else {
                CHECK_GRADIENT(head_value, &h, h.qkv, h.dqkv, T * 3 * HS, 1e-3, "%s, qkv", what);
                CHECK(norm(h.dlog_alpha, S) < 1e-13, "%s: amplitudes make no difference", what);
                double sum = 0;
                for (size_t t = 0; t < T; t++) sum += h.qkv[t * 3 * HS + 2 * HS] / T;
                CHECK(fabs(h.out[(T - 1) * HS] - sum) < 1e-13, "%s: the output is the mean of v", what);
            }
            free_numbers();

            /* narrowest splats; tokens near their centres, else nothing happens */
            h = make_head(1, T, HS, S, diagonal, envelope, 12);
            for (size_t i = 0; i < S * h.P; i++) h.log_precision[i] = log(SPLAT_PRECISION_MAX);
            for (size_t s = 0; s < S; s++) {
                double length = norm(h.mu + s * HS, HS);
                for (size_t k = 0; k < HS; k++) h.mu[s * HS + k] /= length;
            }
            for (size_t t = 0; t < T; t++)
                for (size_t k = 0; k < 2 * HS; k++)
                    h.qkv[t * 3 * HS + k] = 3 * h.mu[t % S * HS + k % HS] + 0.2 * h.qkv[t * 3 * HS + k];
            snprintf(what, sizeof what, "precision 40, %s, %s", kind, wave);
            check_head(&h, 1e-4, what);
            free_numbers();

            /* farthest centres: responses of e^-10, made up for by the amplitude */
            h = make_head(1, T, HS, S, diagonal, envelope, 13);
            for (size_t i = 0; i < S * h.P; i++) h.log_precision[i] = log(SPLAT_SLOPE_MAX / SPLAT_CENTRE_MAX);
            for (size_t s = 0; s < S; s++) {
                double length = norm(h.mu + s * HS, HS) / SPLAT_CENTRE_MAX;
                for (size_t k = 0; k < HS; k++) h.mu[s * HS + k] /= length;
                h.log_alpha[s] += 18;
            }
            for (size_t t = 0; t < T; t++)
                for (size_t k = 0; k < 2 * HS; k++)
                    h.qkv[t * 3 * HS + k] = 2 * h.mu[t % S * HS + k % HS] + 0.3 * h.qkv[t * 3 * HS + k];
            snprintf(what, sizeof what, "centres at 2, %s, %s", kind, wave);
            check_head(&h, 1e-4, what);
            free_numbers();
        }
}

/* ---------------------------------------------------------------------- whole models */

typedef struct {
    GSA *m;
    int x[2 * 70], y[2 * 70];
    size_t B, T;
} Run;

static double run_value(void *of) {
    Run *r = (Run *)of;
    return gsa_forward(r->m, r->x, r->y, r->B, r->T);
}

static Run make_run(const Config *c, size_t B, size_t T, uint64_t seed) {
    Run r = {.m = scattered_model(c, 2, seed), .B = B, .T = T};
    uint64_t rng = rng_mix(seed, 1);
    random_tokens(r.x, B * T, c->V, &rng);
    random_tokens(r.y, B * T, c->V, &rng);
    for (size_t i = 0; i < B * T && c->objective == OBJECTIVE_MLM; i++)
        if (i % 3) r.y[i] = -1; /* only some tokens are predicted */
    return r;
}

static void run_gradients(Run *r, double scale) {
    run_value(r);
    gsa_backward(r->m, scale);
}

static void check_model(const Config *c, size_t B, size_t T, const char *what) {
    Run r = make_run(c, B, T, 20);
    GSA *m = r.m;
    /* off the sphere points of any length are left to themselves: near the centres splats respond */
    for (size_t i = 0; i < m->tensors[TENSOR_qkvw].size && c->raw; i++) m->p.qkvw[i] *= 0.25;
    run_gradients(&r, 1);
    for (int i = 0; i < NUM_TENSORS; i++) {
        const Tensor *t = &m->tensors[i];
        if (t->group == GROUP_FIXED)
            CHECK(norm(m->grads + t->offset, t->size) == 0, "%s: %s has no gradient", what, t->name);
        else if (t->size)
            CHECK_GRADIENT(run_value, &r, m->params + t->offset, m->grads + t->offset, t->size,
                           i == TENSOR_log_theta || i == TENSOR_log_rope ? 3e-5 : 3e-4, "%s, %s", what, t->name);
    }
    for (int i = 0; i < NUM_TENSORS; i++) /* nobody writes between the tensors */
        for (size_t k = m->tensors[i].offset + m->tensors[i].size;
             k < (i + 1 < NUM_TENSORS ? m->tensors[i + 1].offset : m->total); k++)
            if (m->grads[k] != 0) CHECK(0, "%s: a gradient in the padding after %s", what, m->tensors[i].name);
    gsa_destroy(m);
}

/* Which combinations make no sense, in words of its own: what config_check must refuse, and nothing else. */
static bool makes_no_sense(int attention, int mixer, int envelope, int window, int objective) {
    bool decays = envelope == ENVELOPE_DECAY || envelope == ENVELOPE_RAISED;
    if (attention == ATTENTION_STANDARD) return false; /* no splats: mixer and envelope are not looked at */
    if (mixer == MIXER_LINEAR && envelope == ENVELOPE_COSINE) return true; /* weights below 0 in an average */
    if (mixer == MIXER_SOFTMAX && decays) return true;                     /* does not factor over positions */
    if (attention == ATTENTION_GSA && window) return true;                 /* no head to bound */
    return attention == ATTENTION_EXTEND && (mixer == MIXER_SOFTMAX || !window || objective == OBJECTIVE_MLM);
}

static void test_models(void) {
    static const struct {
        const char *name, *heads;
        int attention;
    } maps[] = {{"standard", NULL, ATTENTION_STANDARD}, {"gsa", NULL, ATTENTION_GSA},
                {"hybrid", NULL, ATTENTION_HYBRID},     {"hybrid 0:1,1:0", "0:1,1:0", ATTENTION_HYBRID},
                {"augment", NULL, ATTENTION_AUGMENT},   {"extend", NULL, ATTENTION_EXTEND},
                {"extend 1", "1", ATTENTION_EXTEND}};
    int refused = 0, passed = 0;
    for (size_t map = 0; map < sizeof maps / sizeof *maps; map++)
        for (int position = 0; position <= POSITION_BOTH; position++)
            for (int mixer = 0; mixer <= MIXER_LINEAR; mixer++)
                for (int covariance = 0; covariance <= COVARIANCE_FULL; covariance++)
                    for (int envelope = 0; envelope <= ENVELOPE_RAISED; envelope++)
                        for (int window = 0; window <= 9; window += 9)
                            for (int objective = 0; objective <= OBJECTIVE_MLM; objective++) {
                                char what[160], p[16], x[16], v[16], e[16];
                                /* no splats */
                                if (maps[map].attention == ATTENTION_STANDARD && (covariance || envelope || mixer))
                                    continue;
                                choice_name(POSITION_CHOICES, position, p, sizeof p);
                                choice_name(MIXER_CHOICES, mixer, x, sizeof x);
                                choice_name(COVARIANCE_CHOICES, covariance, v, sizeof v);
                                choice_name(ENVELOPE_CHOICES, envelope, e, sizeof e);
                                snprintf(what, sizeof what, "%s, positions %s, %s, %s, envelope %s, window %d, %s",
                                         maps[map].name, p, x, v, e, window, objective ? "mlm" : "lm");
                                Config c;
                                const char *problem = try_config(&c, maps[map].attention, maps[map].heads, position,
                                                                 mixer, covariance, envelope, window, objective);
                                bool no_sense = makes_no_sense(maps[map].attention, mixer, envelope, window, objective);
                                CHECK(!problem == !no_sense, "%s is %s", what, problem ? problem : "accepted");
                                refused += problem != NULL;
                                /* positions and objective meet the other choices in code that is the same for all
                                   covariances */
                                if (problem || (covariance && (position != POSITION_ROPE || objective))) continue;
                                check_model(&c, covariance == COVARIANCE_FULL || objective ? 1 : 2, 70, what);
                                passed++;
                            }
    printf("test_gradients: %d combinations checked, %d refused\n", passed, refused);
    Config c = small_config(ATTENTION_HYBRID, NULL, POSITION_BOTH, COVARIANCE_ISO, ENVELOPE_COSINE);
    check_model(&c, 1, 33, "a smaller batch of shorter sequences than the model has room for");
    c.S = 1;
    check_model(&c, 2, 13, "one splat");
}

/* Without the unit sphere |x|^2 is one more thing that the responses depend on. */
static void test_raw(void) {
    for (int attention = ATTENTION_GSA; attention <= ATTENTION_EXTEND; attention++)
        for (int mixer = 0; mixer <= MIXER_LINEAR; mixer++)
            for (int covariance = 0; covariance <= COVARIANCE_FULL; covariance++) {
                Config c;
                char what[80];
                if (try_config(&c, attention, NULL, POSITION_ROPE, mixer, covariance,
                               mixer ? ENVELOPE_RAISED : ENVELOPE_COSINE, attention == ATTENTION_EXTEND ? 9 : 0,
                               OBJECTIVE_LM))
                    continue;
                c.raw = 1;
                snprintf(what, sizeof what, "no sphere, attention %d, mixer %d, covariance %d", attention, mixer,
                         covariance);
                check_model(&c, 2, 30, what);
                free_numbers();
            }
}

/* A dead splat takes no part, in any mode: whatever its parameters are, the loss is the same to the bit and they
   have no gradient; the gradients of all others are right. The widest splat of a head may be the dead one: then the
   linear mixer must not measure its row sums against that splat's response. */
static void test_dead(void) {
    static const struct {
        int attention, mixer, envelope, window, objective;
    } kinds[] = {{ATTENTION_GSA, MIXER_SOFTMAX, ENVELOPE_NONE, 0, OBJECTIVE_LM},
                 {ATTENTION_GSA, MIXER_SOFTMAX, ENVELOPE_COSINE, 0, OBJECTIVE_LM},
                 {ATTENTION_GSA, MIXER_LINEAR, ENVELOPE_NONE, 0, OBJECTIVE_LM},
                 {ATTENTION_GSA, MIXER_LINEAR, ENVELOPE_DECAY, 0, OBJECTIVE_LM},
                 {ATTENTION_GSA, MIXER_LINEAR, ENVELOPE_RAISED, 0, OBJECTIVE_LM},
                 {ATTENTION_EXTEND, MIXER_LINEAR, ENVELOPE_RAISED, 9, OBJECTIVE_LM},
                 {ATTENTION_GSA, MIXER_SOFTMAX, ENVELOPE_COSINE, 0, OBJECTIVE_MLM},
                 {ATTENTION_GSA, MIXER_LINEAR, ENVELOPE_RAISED, 0, OBJECTIVE_MLM},
                 {ATTENTION_HYBRID, MIXER_LINEAR, ENVELOPE_RAISED, 9, OBJECTIVE_LM}};
    static const int splat[] = {TENSOR_mu,        TENSOR_log_precision, TENSOR_log_alpha,
                                TENSOR_log_theta, TENSOR_log_delta,     TENSOR_psi};
    for (size_t kind = 0; kind < sizeof kinds / sizeof *kinds; kind++)
        for (int covariance = 0; covariance <= COVARIANCE_FULL; covariance++) {
            char what[80];
            snprintf(what, sizeof what, "dead splats, kind %zu, covariance %d", kind, covariance);
            Config c;
            const char *problem =
                try_config(&c, kinds[kind].attention, NULL, POSITION_ROPE, kinds[kind].mixer, covariance,
                           kinds[kind].envelope, kinds[kind].window, kinds[kind].objective);
            if (problem) die("%s", problem);
            Run r = make_run(&c, 2, 30, 50);
            GSA *m = r.m;
            size_t S = (size_t)c.S, heads = (size_t)config_gsa_heads(&c);
            for (size_t g = 0; g < heads; g++) m->p.alive[g * S + g % S] = 0;
            double before = run_value(&r);
            for (int change = 0; change < 2; change++) { /* to a wide and strong splat, and to a narrow one */
                for (size_t i = 0; i < sizeof splat / sizeof *splat; i++) {
                    const Tensor *t = &m->tensors[splat[i]];
                    size_t row = t->size ? (size_t)t->shape[2] : 1;
                    for (size_t k = 0; k < t->size; k++)
                        if (!(m->p.alive[k / row] > 0)) m->params[t->offset + k] = change ? -1.5 : 3;
                }
                CHECK(run_value(&r) == before, "%s: the loss is %.17g, whatever their parameters %.17g", what,
                      run_value(&r), before);
            }
            run_gradients(&r, 1);
            for (int i = 0; i < NUM_TENSORS; i++) {
                const Tensor *t = &m->tensors[i];
                if (!t->size || t->group == GROUP_FIXED) continue;
                CHECK_GRADIENT(run_value, &r, m->params + t->offset, m->grads + t->offset, t->size,
                               i == TENSOR_log_theta ? 3e-5 : 3e-4, "%s, %s", what, t->name);
                double dead = 0;
                bool is_splat = tensor_is_splat(i) && i != TENSOR_log_far;
                for (size_t k = 0; k < t->size && is_splat; k++)
                    dead += m->p.alive[k / (size_t)t->shape[2]] > 0 ? 0 : fabs(m->grads[t->offset + k]);
                CHECK(dead == 0, "%s: gradient of %s is %g", what, t->name, dead);
            }
            gsa_destroy(m);
            free_numbers();
        }
}

/* Backward passes add up, each with its scale, and another batch's gradient does not stick to anything but the
   gradients. */
static void test_accumulation(void) {
    Config c = small_config(ATTENTION_HYBRID, NULL, POSITION_BOTH, COVARIANCE_DIAG, ENVELOPE_COSINE);
    c.gain = GAIN_HEAD, c.rope = ROPE_LEARNED, c.forget = FORGET_ALL; /* every tensor that a hybrid can have */
    Run a = make_run(&c, 2, 70, 30);
    GSA *m = a.m;
    Run b = a;
    uint64_t rng = 31;
    b.B = 1;
    b.T = 40;
    random_tokens(b.x, 40, c.V, &rng);
    random_tokens(b.y, 40, c.V, &rng);
    real *first = numbers(m->total, 0, NULL), *second = numbers(m->total, 0, NULL), *sum = numbers(m->total, 0, NULL);
    run_gradients(&a, 1);
    memcpy(first, m->grads, m->total * sizeof(real));
    gsa_zero_gradients(m);
    run_gradients(&b, 1);
    memcpy(second, m->grads, m->total * sizeof(real));
    gsa_zero_gradients(m);
    run_gradients(&a, 1);
    CHECK(memcmp(m->grads, first, m->total * sizeof(real)) == 0, "zeroed gradients: nothing of the last pass stays");
    gsa_zero_gradients(m);
    run_gradients(&a, 0.25);
    run_gradients(&b, -3);
    for (int i = 0; i < NUM_TENSORS; i++) {
        const Tensor *t = &m->tensors[i];
        for (size_t k = t->offset; k < t->offset + t->size; k++) sum[k] = 0.25 * first[k] - 3 * second[k];
        double error = t->size && t->group != GROUP_FIXED
                           ? relative_error_double(m->grads + t->offset, sum + t->offset, t->size)
                           : 0;
        CHECK(error < 1e-12, "two backward passes with scales add up in %s: %g", t->name, error);
    }
    gsa_destroy(m);
    free_numbers();
}

/* ---------------------------------------------------------------------- the checker */

/* The checks above are worth something only if they refuse what is wrong. */
static void test_checker(void) {
    Config c = small_config(ATTENTION_GSA, NULL, POSITION_ROPE, COVARIANCE_DIAG, ENVELOPE_COSINE);
    Run r = make_run(&c, 2, 20, 40);
    run_gradients(&r, 1);
    const int tensors[] = {TENSOR_wte,       TENSOR_ln1w,      TENSOR_qkvb, TENSOR_mu,     TENSOR_log_precision,
                           TENSOR_log_alpha, TENSOR_log_theta, TENSOR_psi,  TENSOR_fcprojw};
    for (size_t i = 0; i < sizeof tensors / sizeof *tensors; i++) {
        const Tensor *t = &r.m->tensors[tensors[i]];
        real *x = r.m->params + t->offset, *g = r.m->grads + t->offset, *wrong = numbers(t->size, 0, NULL);
        size_t n = t->size, largest = 0;
        for (size_t k = 0; k < n; k++) largest = fabs(g[k]) > fabs(g[largest]) ? k : largest;
        CHECK(gradient_error(run_value, &r, x, g, n, 3e-4) <= TOLERANCE, "%s: the gradient itself passes", t->name);
        for (int kind = 0; kind < 6; kind++) {
            static const char *const kinds[] = {"1 % too large",
                                                "one entry 1 % too large",
                                                "one entry 1e-4 of the norm off",
                                                "not a number in one entry",
                                                "infinite in one entry",
                                                "zero"};
            size_t other = (largest + n / 2) % n;
            for (size_t k = 0; k < n; k++) wrong[k] = kind == 0 ? 1.01 * g[k] : kind == 5 ? 0 : g[k];
            if (kind == 1) wrong[largest] *= 1.01;
            if (kind == 2) wrong[other] += 1e-4 * norm(g, n);
            if (kind == 3) wrong[other] = NAN;
            if (kind == 4) wrong[other] = INFINITY;
            CHECK(!(gradient_error(run_value, &r, x, wrong, n, 3e-4) <= TOLERANCE),
                  "%s: a gradient that is %s is refused", t->name, kinds[kind]);
        }
    }
    /* and what the loss does not depend on has no gradient to be compared with */
    CHECK(gradient_error(run_value, &r, r.m->params + c.V * c.C, r.m->grads + c.V * c.C, c.C, 3e-4) == INFINITY,
          "the padding of the vocabulary: a gradient of zeros is refused");
    gsa_destroy(r.m);
    free_numbers();
}

/* A scan head whose cosines nearly cancel: precision 40, theta close to pi, and keys that only queries at odd
   distances meet. There the part of a row sum that is relative to the constant parts counts, with its gradient. All
   inputs in one array x: q, k, v (T, 3 HS), then the splats. */
enum {
    CANCEL_T = 13,
    CANCEL_HS = 6,
    CANCEL_S = 2,
    CANCEL_QKV = CANCEL_T * 3 * CANCEL_HS,
    CANCEL_N = CANCEL_QKV + CANCEL_S * (CANCEL_HS + 4)
};
static double cancelling_scan(const real *x, const real *dout, real *g, bool causal, double *least) {
    enum { T = CANCEL_T, HS = CANCEL_HS, S = CANCEL_S };
    real out[T * HS], rho[T], alive[S] = {1, 1};
    const real *mu = x + CANCEL_QKV, *log_precision = mu + S * HS;
    Splats w = {.mu = mu,
                .log_precision = log_precision,
                .log_alpha = log_precision + S,
                .log_theta = log_precision + 2 * S,
                .log_delta = log_precision + 3 * S,
                .alive = alive,
                .S = S,
                .P = 1};
    scan_head_forward(out, HS, NULL, rho, x, x + HS, x + 2 * HS, 3 * HS, &w, 0, causal, 5, T, HS);
    double loss = 0;
    for (size_t i = 0; i < T * HS; i++) loss += out[i] * dout[i];
    for (size_t t = 0; t < T && least; t++) *least = fmin(*least, 1 / rho[t]);
    if (!g) return loss;
    real *record = (real *)xcalloc(moments_size(S, 1, HS), sizeof(real));
    memset(g, 0, CANCEL_N * sizeof(real));
    real *dmu = g + CANCEL_QKV, *dlog_precision = dmu + S * HS;
    SplatGradients d = {.mu = dmu,
                        .log_precision = dlog_precision,
                        .log_alpha = dlog_precision + S,
                        .log_theta = dlog_precision + 2 * S,
                        .log_delta = dlog_precision + 3 * S};
    scan_head_backward(g, g + HS, g + 2 * HS, record, dout, out, HS, rho, x, x + HS, x + 2 * HS, 3 * HS, &w, 0, causal,
                       false, 5, T, HS);
    splat_gradients(&d, record, 0, 1, &w, HS);
    free(record);
    return loss;
}

static void test_cancelling_scan(bool causal) {
    enum { T = CANCEL_T, HS = CANCEL_HS, S = CANCEL_S };
    uint64_t rng = 77;
    real x[CANCEL_N], g[CANCEL_N], y[CANCEL_N], dout[T * HS];
    for (size_t i = 0; i < CANCEL_N; i++) x[i] = 0.1 * rng_normal(&rng);
    for (size_t i = 0; i < T * HS; i++) dout[i] = rng_normal(&rng);
    real *mu = x + CANCEL_QKV, *log_precision = mu + S * HS;
    for (size_t s = 0; s < S; s++) {
        mu[s * HS] += 1;
        log_precision[s] = log(SPLAT_PRECISION_MAX);
        log_precision[2 * S + s] = log(SPLAT_FREQUENCY_MAX * (1 - 1e-3 * (double)(s + 1)));
        log_precision[3 * S + s] = log(0.05);
    }
    for (size_t t = 0; t < T; t++) {
        x[t * 3 * HS] += 1;
        x[t * 3 * HS + HS] += t % 2; /* near the splats: all queries, and keys at odd positions */
        for (size_t k = 0; k < HS; k++) x[t * 3 * HS + 2 * HS + k] = rng_normal(&rng);
    }
    double size = 0, worst = 0, least = INFINITY;
    cancelling_scan(x, dout, g, causal, &least);
    for (size_t i = 0; i < CANCEL_N; i++) size += g[i] * g[i];
    for (int direction = 0; direction < 8; direction++) {
        real along[CANCEL_N];
        double expected = 0, step = 1e-7, difference;
        for (size_t i = 0; i < CANCEL_N; i++) {
            along[i] = rng_normal(&rng);
            expected += along[i] * g[i];
        }
        for (size_t i = 0; i < CANCEL_N; i++) y[i] = x[i] + step * along[i];
        difference = cancelling_scan(y, dout, NULL, causal, NULL);
        for (size_t i = 0; i < CANCEL_N; i++) y[i] = x[i] - step * along[i];
        difference = (difference - cancelling_scan(y, dout, NULL, causal, NULL)) / (2 * step);
        worst = fmax(worst, fabs(difference - expected) / sqrt(size));
    }
    CHECK(worst < 1e-5 && least > 0,
          "a scan whose cosines cancel, both sides %d: gradient off by %g of its norm, row sums from %g on", !causal,
          worst, least);
}

int main(void) {
#ifdef _OPENMP
    omp_set_num_threads(1); /* thousands of tiny passes: starting threads would take longer than they save */
#endif
    test_encoder();
    test_layernorm();
    test_matmul(9, 37, 21);
    test_matmul(300, 70, 130);
    test_matmul(1, 1, 1);
    test_gelu();
    test_classifier();
    test_rope(1, 1e-3);
    test_rope(3e-5, 1e-6);
    test_attention(1, 1, true);
    test_attention(70, 70, true);
    test_attention(150, 17, true);
    test_attention(150, 65, true);
    test_attention(70, 70, false);
    test_attention(150, 17, false);
    for (int kind = 0; kind < 12; kind++) {
        int covariance = kind / 4;
        bool envelope = kind & 1, query = kind & 2;
        test_splat_features(9, 10, 3, covariance, envelope, query);
        test_splat_features(71, 18, envelope ? 9 : 18, covariance, envelope, query);
        test_splat_features(1, 4, 1, covariance, envelope, query);
    }
    for (int kind = 0; kind < 6; kind++) {
        test_splat_head(2, 70, 10, 3, kind / 2, kind & 1);
        test_splat_head(2, 9, 6, 1, kind / 2, kind & 1);
    }
    test_cancelling_scan(true);
    test_cancelling_scan(false);
    test_splat_extremes();
    test_models();
    test_raw();
    test_dead();
    test_accumulation();
    test_checker();
    return test_summary("test_gradients");
}
