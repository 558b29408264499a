/* The network in fp32, as it runs, against plain formulas in double written here from the equations: every layer,
   one head of each kind with its gradients, a whole model; then what must hold exactly: causality, independence of
   the number of threads, bounds. */
#include "network.h"

static int64_t clamped[NUM_BOUNDS]; /* of the last update */

static void widen(double *to, const real *from, size_t n) {
    for (size_t i = 0; i < n; i++) to[i] = from[i];
}

/* ---------------------------------------------------------------------- functions and products */

static void test_exp(void) {
    double worst = 0;
    for (int i = 0; i <= 400000; i++) {
        real x = (real)(-87.3 + i * (88.37 + 87.3) / 400000);
        double error = fabs(exp_real(x) / exp((double)x) - 1);
        if (!(error <= worst)) worst = error;
    }
    CHECK(worst < 2.5e-7, "exp over its range: %g", worst);
    CHECK(exp_real(0) == 1, "exp(0) = 1");
    const real small[] = {-87.4f, -88, -100, -127.3f, -1000, -31415.9f, -1e6f, -3e38f, -INFINITY},
               large[] = {88.4f, 88.8f, 89, 100, 1000, 27182.8f, 1e6f, 3e38f, INFINITY};
    for (size_t i = 0; i < sizeof small / sizeof *small; i++)
        CHECK(exp_real(small[i]) == 0, "exp(%g) = 0, not %g", small[i], exp_real(small[i]));
    for (size_t i = 0; i < sizeof large / sizeof *large; i++)
        CHECK(exp_real(large[i]) == INFINITY, "exp(%g) = inf, not %g", large[i], exp_real(large[i]));
    CHECK(isnan(exp_real(NAN)), "exp(nan)");
}

/* x as bf16, from what rounding to 8 binary digits means */
static double eight_digits(double x) {
    int exponent;
    double fraction = frexp(x, &exponent);
    return ldexp(nearbyint(ldexp(fraction, 8)), exponent - 8);
}

enum { PRODUCT_SMALL, PRODUCT_GEMM, PRODUCT_BF16 };

/* C = op(A) op(B) by all ways of laying them out; between the rows of C lie numbers that must stay. */
static void check_product(int kind, size_t M, size_t N, size_t K, bool ta, bool tb, bool add) {
    static const char *const name[] = {"small product", "matrix product", "product of bf16"};
    uint64_t rng = M * 1000003 + N * 1009 + K;
    size_t lda = (ta ? M : K) + 3, ldb = (tb ? K : N) + 2, ldc = N + 5;
    real *A = numbers((ta ? K : M) * lda, 1, &rng), *B = numbers((tb ? N : K) * ldb, 1, &rng),
         *C = numbers(M * ldc, 1, &rng);
    double difference = 0, size = 0;
    bool untouched = true;
    real *before = numbers(M * ldc, 0, NULL);
    memcpy(before, C, M * ldc * sizeof(real));
    if (kind == PRODUCT_BF16) {
        bf16_room = (bf16 *)numbers((M + N) * K, 0, NULL);
        for (size_t i = 0; i < (ta ? K : M) * lda; i++) A[i] = (real)ldexp((double)A[i], (int)(i % 30) - 15);
    }
    if (kind == PRODUCT_SMALL) product(M, N, K, A, ta ? 1 : lda, ta ? lda : 1, B, ldb, C, ldc, add);
    else gemm(ta, tb, M, N, K, A, lda, B, ldb, C, ldc, add);
    bf16_room = NULL;
    for (size_t i = 0; i < (ta ? K : M) * lda && kind == PRODUCT_BF16; i++) A[i] = (real)eight_digits((double)A[i]);
    for (size_t i = 0; i < (tb ? N : K) * ldb && kind == PRODUCT_BF16; i++) B[i] = (real)eight_digits((double)B[i]);
    for (size_t i = 0; i < M; i++) {
        for (size_t j = 0; j < N; j++) {
            double sum = add ? (double)before[i * ldc + j] : 0;
            size += sum * sum;
            for (size_t k = 0; k < K; k++) {
                double term =
                    (double)(ta ? A[k * lda + i] : A[i * lda + k]) * (double)(tb ? B[j * ldb + k] : B[k * ldb + j]);
                sum += term;
                size += term * term; /* the size of the terms: a single sum may cancel */
            }
            difference += (C[i * ldc + j] - sum) * (C[i * ldc + j] - sum);
        }
        untouched &= memcmp(C + i * ldc + N, before + i * ldc + N, (ldc - N) * sizeof(real)) == 0;
    }
    CHECK(sqrt(difference) <= 1e-6 * sqrt(size), "%s (%zu, %zu, %zu)%s%s%s: %g", name[kind], M, N, K, ta ? " A^T" : "",
          tb ? " B^T" : "", add ? " added" : "", sqrt(difference / size));
    CHECK(untouched, "product (%zu, %zu, %zu) writes nothing beside its rows", M, N, K);
    free_numbers();
}

static void test_products(void) {
    const size_t rows[] = {1, 7, 8, 9, 19}, columns[] = {1, 15, 16, 17, 31, 32, 33, 50, 67}, depths[] = {1, 6, 37};
    for (size_t m = 0; m < 5; m++)
        for (size_t n = 0; n < 9; n++)
            for (size_t k = 0; k < 3; k++)
                for (int way = 0; way < 8; way++) {
                    if (!(way & 2))
                        check_product(PRODUCT_SMALL, rows[m], columns[n], depths[k], way & 1, false, way & 4);
                    check_product(PRODUCT_GEMM, rows[m], columns[n], depths[k], way & 1, way & 2, way & 4);
                }
    for (int way = 0; way < 8; way++) { /* many blocks; deeper than one panel */
        check_product(PRODUCT_GEMM, 130, 300, 70, way & 1, way & 2, way & 4);
        check_product(PRODUCT_GEMM, 601, 33, 300, way & 1, way & 2, way & 4);
        check_product(PRODUCT_GEMM, 3, 1100, 513, way & 1, way & 2, way & 4);
    }
}

/* --products bf16: products whose factors are rounded, and nothing else; a model with them is near the same model
   without, does not equal it and does not depend on the number of threads. */
static void test_bf16(void) {
    if (bf16_missing()) {
        skip("products of bf16", bf16_missing());
        return;
    }
    for (int way = 0; way < 8; way++) {
        check_product(PRODUCT_BF16, 1, 1, 1, way & 1, way & 2, way & 4);
        check_product(PRODUCT_BF16, 19, 67, 37, way & 1, way & 2, way & 4);
        check_product(PRODUCT_BF16, 130, 300, 70, way & 1, way & 2, way & 4);
        check_product(PRODUCT_BF16, 601, 33, 300, way & 1, way & 2, way & 4);
        check_product(PRODUCT_BF16, 3, 1100, 513, way & 1, way & 2, way & 4);
    }
    real one[4] = {NAN, INFINITY, -3e38f, 1}, out[16];
    bf16 room[8];
    uint32_t silent = 0x7FFFFFFF; /* a NaN whose digits would round to -0 */
    memcpy(one, &silent, 4);
    bf16_room = room;
    gemm(false, false, 4, 4, 1, one, 1, one, 4, out, 4, false);
    bf16_room = NULL;
    CHECK(isnan(out[0]) && isnan(out[3]) && out[7] == INFINITY && out[10] == INFINITY && out[15] == 1,
          "products of bf16 keep what is no number: %g %g %g %g", out[3], out[7], out[10], out[15]);

    enum { B = 3, T = 67 };
    Config c = small_config(ATTENTION_HYBRID, NULL, POSITION_ROPE, COVARIANCE_ISO, ENVELOPE_COSINE);
    c.NH = 3;
    c.C = 48;
    c.V = 77;
    c.Vp = 80;
    config_head_map(&c, NULL);
    int x[B * T], y[B * T];
    uint64_t rng = 12;
    random_tokens(x, B * T, c.V, &rng);
    random_tokens(y, B * T, c.V, &rng);
    GSA *m[3]; /* without, with, with more threads */
    double loss[3];
    for (int i = 0; i < 3; i++) {
        c.products = i ? PRODUCTS_BF16 : PRODUCTS_FP32;
        m[i] = scattered_model(&c, B, 13);
#ifdef _OPENMP
        if (i == 2) omp_set_num_threads(3);
#endif
        loss[i] = gsa_forward(m[i], x, y, B, T);
        gsa_backward(m[i], 1);
#ifdef _OPENMP
        omp_set_num_threads(1);
#endif
    }
    CHECK(fabs(loss[1] - loss[0]) < 5e-3 * loss[0] && loss[1] != loss[0], "bf16: loss %.9g, in fp32 %.9g", loss[1],
          loss[0]);
    CHECK(loss[2] == loss[1] && memcmp(m[2]->grads, m[1]->grads, m[1]->total * sizeof(real)) == 0,
          "bf16: three threads as one");
    for (int i = 0; i < NUM_TENSORS; i++) {
        const Tensor *t = &m[0]->tensors[i];
        if (!t->size || t->group == GROUP_FIXED) continue;
        double error = relative_error(m[1]->grads + t->offset, m[0]->grads + t->offset, t->size);
        CHECK(error < 0.2, "bf16: gradient of %s off by %g of its norm", t->name, error); /* small sums cancel */
    }
    double error = relative_error(m[1]->grads, m[0]->grads, m[0]->total);
    CHECK(error > 1e-4 && error < 0.03, "bf16: gradients off by %g of their norm", error);
    for (int i = 0; i < 3; i++) gsa_destroy(m[i]);
}

/* ---------------------------------------------------------------------- layers by their formulas */

static double gelu_formula(double x) {
    return 0.5 * x * (1 + tanh(sqrt(2 / 3.141592653589793) * (x + 0.044715 * x * x * x)));
}

static void layernorm_formula(double *out, const double *x, const double *weight, const double *bias, size_t C) {
    double mean = 0, variance = 0;
    for (size_t c = 0; c < C; c++) mean += x[c] / (double)C;
    for (size_t c = 0; c < C; c++) variance += (x[c] - mean) * (x[c] - mean) / (double)C;
    for (size_t c = 0; c < C; c++) out[c] = (x[c] - mean) / sqrt(variance + 1e-5) * weight[c] + bias[c];
}

static void test_simple_layers(void) {
    uint64_t rng = 1;
    enum { N = 11, C = 67, V = 9 };
    int tokens[14];
    double wide[4][N * C];

    random_tokens(tokens, 14, V, &rng); /* encoder, at positions 3 .. 9 */
    real *wte = numbers(V * C, 1, &rng), *wpe = numbers(10 * C, 1, &rng), *out = numbers(14 * C, 0, NULL),
         *bare = numbers(14 * C, 0, NULL);
    encoder_forward(out, tokens, wte, wpe, 2, 7, C, 3);
    encoder_forward(bare, tokens, wte, NULL, 2, 7, C, 3);
    bool same = true;
    for (size_t i = 0; i < 14 * C; i++) {
        real token = wte[(size_t)tokens[i / C] * C + i % C], position = wpe[(3 + i / C % 7) * C + i % C];
        same &= out[i] == token + position && bare[i] == token;
    }
    CHECK(same, "encoder: token plus position, or token alone");

    real *x = numbers(N * C, 2, &rng), *y = numbers(N * C, 0, NULL), *weight = numbers(C, 1, &rng),
         *bias = numbers(C, 1, &rng), *mean = numbers(N, 0, NULL), *rstd = numbers(N, 0, NULL);
    for (size_t c = 0; c < C; c++) {
        x[c] = 100 + (real)0.01 * x[c];
        x[C + c] = 3;
    } /* far from 0; constant */
    widen(wide[0], x, N * C);
    widen(wide[1], weight, C);
    widen(wide[2], bias, C);
    for (size_t i = 0; i < N; i++) layernorm_formula(wide[3] + i * C, wide[0] + i * C, wide[1], wide[2], C);
    layernorm_forward(y, mean, rstd, x, weight, bias, N, C);
    CHECK(error_of(y + C, wide[3] + C, (N - 1) * C) < 1e-6, "layernorm: %g", error_of(y + C, wide[3] + C, (N - 1) * C));
    CHECK(error_of(y, wide[3], C) < 1e-3, "layernorm of 100 +- 0.02: %g", error_of(y, wide[3], C));

    for (size_t i = 0; i < N * C; i++) x[i] = (real)(-12 + 24.0 * i / (N * C)); /* gelu */
    gelu_forward(y, x, N * C);
    for (size_t i = 0; i < N * C; i++) wide[0][i] = gelu_formula(x[i]);
    CHECK(error_of(y, wide[0], N * C) < 1e-6, "gelu: %g", error_of(y, wide[0], N * C));
    for (size_t i = 0; i < N * C; i++) {
        bias[i % C] = 1;
        y[i] = 1;
    }
    gelu_backward(y, y, x, N * C);
    for (size_t i = 0; i < N * C; i++) wide[0][i] = (gelu_formula(x[i] + 1e-5) - gelu_formula(x[i] - 1e-5)) / 2e-5;
    CHECK(error_of(y, wide[0], N * C) < 1e-6, "gelu's gradient: %g", error_of(y, wide[0], N * C));
    real far[4] = {-50, 50, -3000, 3000}, there[4], slope[4] = {1, 1, 1, 1};
    gelu_forward(there, far, 4);
    gelu_backward(slope, slope, far, 4);
    CHECK(there[0] == 0 && there[1] == 50 && there[2] == 0 && there[3] == 3000, "gelu far out: %g %g %g %g", there[0],
          there[1], there[2], there[3]);
    CHECK(slope[0] == 0 && slope[1] == 1 && slope[2] == 0 && slope[3] == 1, "gelu's gradient far out: %g %g %g %g",
          slope[0], slope[1], slope[2], slope[3]);

    real *stream = numbers(N * C, 1, &rng), *plus = numbers(N * C, 1, &rng);
    memcpy(y, stream, N * C * sizeof(real));
    residual_forward(y, plus, N * C);
    same = true;
    for (size_t i = 0; i < N * C; i++) same &= y[i] == stream[i] + plus[i];
    CHECK(same, "residual");
    free_numbers();
}

static void test_classifier(void) {
    uint64_t rng = 2;
    enum { N = 5, V = 77, Vp = 80 };
    real *logits = numbers(N * Vp, 3, &rng), *losses = numbers(N, 0, NULL), *lse = numbers(N, 0, NULL);
    const int targets[N] = {0, 76, 40, 3, 5};
    /* padding means nothing */
    for (size_t i = 0; i < N; i++) {
        logits[i * Vp + V] = 1e6f;
        logits[i * Vp + V + 1] = NAN;
        logits[i * Vp + V + 2] = INFINITY;
    }
    logits[3 * Vp + 3] = 30000;
    logits[3 * Vp + 4] = 29999;  /* the largest by far, and a rival */
    logits[4 * Vp + 5] = -30000; /* hopeless */
    double expected[N], gradient[N * Vp] = {0};
    for (size_t i = 0; i < N; i++) {
        double most = -INFINITY, sum = 0;
        for (size_t v = 0; v < V; v++) most = max_of(most, logits[i * Vp + v]);
        for (size_t v = 0; v < V; v++) sum += exp(logits[i * Vp + v] - most);
        expected[i] = most + log(sum) - logits[i * Vp + (size_t)targets[i]];
        for (size_t v = 0; v < V; v++)
            gradient[i * Vp + v] = 0.25 * (exp(logits[i * Vp + v] - most) / sum - (v == (size_t)targets[i]));
    }
    classifier_forward(losses, lse, logits, targets, N, V, Vp);
    for (size_t i = 0; i < N; i++) /* lse has the rounding of the largest logit */
        CHECK(fabs(losses[i] - expected[i]) < 1e-6 * max_of(max_of(1, expected[i]), i == 3 ? 30000 : 0),
              "loss %zu: %g, by the formula %g", i, losses[i], expected[i]);
    classifier_backward(logits, lse, targets, 0.25f, N, V, Vp);
    for (size_t i = 0; i < N; i++) {
        double error = error_of(logits + i * Vp, gradient + i * Vp, Vp);
        CHECK(error < (i == 3 ? 2e-3 : 1e-6), "gradient of logits %zu: %g", i, error);
    }
    free_numbers();
}

/* ---------------------------------------------------------------------- heads and models by their formulas */

/* A model's configuration and parameters in double. */
typedef struct {
    Config c;
    Tensor tensors[NUM_TENSORS];
    double *params;
    const double *log_forget; /* (T, NH): ln f of the layer at hand, 0 of heads without a gate; NULL: none has one */
} Formula;

static Formula make_formula(const GSA *m) {
    Formula f = {.c = m->config};
    memcpy(f.tensors, m->tensors, sizeof f.tensors);
    f.params = (double *)xmalloc(m->total * sizeof(double));
    widen(f.params, m->params, m->total);
    return f;
}

/* part `index` of `parts` of a tensor: layers, or GSA heads */
static const double *part(const Formula *f, int tensor, size_t index, size_t parts) {
    return f->params + f->tensors[tensor].offset + f->tensors[tensor].size / parts * index;
}

/* What head h of layer l gives a query q and a key k `distance` tokens before it, as the exponent of softmax.
   epsilon: of equation (1). */
static double logit_formula(const Formula *f, int l, int h, const double *q, const double *k, double distance,
                            double epsilon) {
    const Config *c = &f->c;
    size_t d = (size_t)(c->C / c->NH), S = (size_t)c->S;
    double qq = epsilon, kk = epsilon, sum = 0;
    for (size_t i = 0; i < d; i++) {
        qq += q[i] * q[i];
        kk += k[i] * k[i];
    }
    double nq = sqrt(qq), nk = sqrt(kk);
    if (c->gsa_heads[l] >> h & 1) { /* equations (1) to (4), (6), (7), (7b) */
        size_t heads = 0, g = 0;
        for (int i = 0; i < c->L * c->NH; i++) {
            if (i == l * c->NH + h) g = heads;
            heads += c->gsa_heads[i / c->NH] >> (i % c->NH) & 1;
        }
        const double *mu = part(f, TENSOR_mu, g, heads), *log_precision = part(f, TENSOR_log_precision, g, heads),
                     *log_alpha = part(f, TENSOR_log_alpha, g, heads);
        for (size_t s = 0; s < S; s++) {
            double square_q = 0, square_k = 0;
            for (size_t i = 0; i < d; i++) {
                double p = exp(c->covariance == COVARIANCE_DIAG ? log_precision[s * d + i] : log_precision[s]),
                       m = mu[s * d + i];
                square_q += p * (q[i] / nq - m) * (q[i] / nq - m);
                square_k += p * (k[i] / nk - m) * (k[i] / nk - m);
            }
            double e = 1;
            if (c->envelope == ENVELOPE_COSINE)
                e = cos(exp(part(f, TENSOR_log_theta, g, heads)[s]) * distance - part(f, TENSOR_psi, g, heads)[s]);
            sum += exp(log_alpha[s]) * e * exp(-0.5 * square_q) * exp(-0.5 * square_k);
        }
        return sum;
    }
    if (c->position == POSITION_LEARNED) {
        for (size_t i = 0; i < d; i++) sum += q[i] * k[i];
        return sum / sqrt((double)d);
    }
    size_t index = 0; /* gains and frequencies of standard heads lie in the order of layer and head */
    for (int i = 0; i < l * c->NH + h; i++) index += !(c->gsa_heads[i / c->NH] >> (i % c->NH) & 1);
    for (size_t i = 0; i < d / 2; i++) { /* pairs as complex numbers: the real part of q k* exp(i theta distance) */
        double angle = distance * (c->rope ? exp(part(f, TENSOR_log_rope, 0, 1)[index * d / 2 + i])
                                           : pow(10000, -2.0 * (double)i / (double)d));
        double re = q[i] * k[i] + q[d / 2 + i] * k[d / 2 + i], im = q[d / 2 + i] * k[i] - q[i] * k[d / 2 + i];
        sum += re * cos(angle) - im * sin(angle);
    }
    double gain = c->gain ? exp(part(f, TENSOR_log_gain, 0, 1)[index]) : 1; /* equation (7c) */
    return gain * sum / (nq * nk) * sqrt((double)d);
}

/* out (T, C) of all heads of layer l from qkv (T, 3C): softmax over j <= i, for tokens i from `first` on */
static void attention_formula(const Formula *f, int l, double *out, const double *qkv, size_t first, size_t T,
                              double epsilon) {
    size_t C = (size_t)f->c.C, d = C / (size_t)f->c.NH;
    double *z = (double *)xmalloc(T * sizeof(double));
    for (size_t h = 0; h < (size_t)f->c.NH; h++)
        for (size_t i = first; i < T; i++) {
            double most = -INFINITY, sum = 0;
            for (size_t j = 0; j <= i; j++) {
                z[j] = logit_formula(f, l, (int)h, qkv + i * 3 * C + h * d, qkv + j * 3 * C + C + h * d,
                                     (double)(i - j), epsilon);
                for (size_t t = j + 1; t <= i && f->log_forget; t++) z[j] += f->log_forget[t * (size_t)f->c.NH + h];
                most = max_of(most, z[j]);
            }
            for (size_t j = 0; j <= i; j++) sum += z[j] = exp(z[j] - most);
            for (size_t k = 0; k < d; k++) {
                out[i * C + h * d + k] = 0;
                for (size_t j = 0; j <= i; j++)
                    out[i * C + h * d + k] += z[j] / sum * qkv[j * 3 * C + 2 * C + h * d + k];
            }
        }
    free(z);
}

/* The heads of a layer, as the model runs them, on qkv. */
static void run_heads(GSA *m, size_t l, real *out, const real *qkv, size_t B, size_t T) {
    gsa_splat_waves(m, m->a.splat_waves, T, 0);
    gsa_rope_waves(m, m->a.rope_waves, T, 0);
    features_forward(m, m->a.fq, m->a.fk, qkv, l, B, T, m->a.rope_waves, m->a.splat_waves);
    Gates gates = layer_gates(m, &m->a, l);
    attention_forward(out, m->a.att_lse, m->a.fq, m->a.fk, qkv, m->scale + l * (size_t)m->config.NH,
                      m->window + l * (size_t)m->config.NH, &gates, true, B, T, (size_t)m->config.NH,
                      (size_t)config_head_size(&m->config));
}

/* sum of out * dout by the formula, over the tokens from `first` on: those before it do not see what belongs to it */
static double heads_value(const Formula *f, const double *qkv, const double *dout, double *out, size_t first, size_t T,
                          double epsilon) {
    double sum = 0;
    attention_formula(f, 0, out, qkv, first, T, epsilon);
    for (size_t i = first * (size_t)f->c.C; i < T * (size_t)f->c.C; i++) sum += out[i] * dout[i];
    return sum;
}

/* A layer of one standard and one GSA head: output, and gradients against differences of the formula. length: of q
   and k */
static void check_heads(Config c, size_t T, double length, double epsilon, const char *what) {
    uint64_t rng = 3;
    c.T = (int)T;
    c.L = 1;
    memset(c.gsa_heads, 0, sizeof c.gsa_heads);
    config_head_map(&c, NULL);
    size_t C = (size_t)c.C, HS = (size_t)config_head_size(&c), NH = (size_t)c.NH;
    GSA *m = scattered_model(&c, 1, 4);
    real *qkv = numbers(T * 3 * C, 1, &rng), *dout = numbers(T * C, 1, &rng), *out = numbers(T * C, 0, NULL),
         *dqkv = numbers(T * 3 * C, 1, &rng);
    for (size_t i = 0; i < T * 3 * C; i++)
        if (i % (3 * C) < 2 * C) qkv[i] *= (real)length;
    Formula f = make_formula(m);
    double *x = (double *)xmalloc(T * 3 * C * sizeof(double)), *d = (double *)xmalloc(T * C * sizeof(double)),
           *o = (double *)xmalloc(T * C * sizeof(double));
    double *difference = (double *)xmalloc((m->total + T * 3 * C) * sizeof(double));
    widen(x, qkv, T * 3 * C);
    widen(d, dout, T * C);

    /* ln f of head 0, the only one with a gate, and of head 1 without */
    double *log_forget = (double *)xcalloc(T * NH, sizeof(double));
    for (size_t t = 0; t < T && c.forget; t++)
        log_forget[t * NH] = (double)(m->a.log_forget[t] = (real)(-0.2 * fabs(rng_normal(&rng))));
    if (c.forget) f.log_forget = log_forget;
    run_heads(m, 0, out, qkv, 1, T);
    attention_formula(&f, 0, o, x, 0, T, epsilon);
    double error = error_of(out, o, T * C);
    CHECK(error < 1e-5, "%s: output %g", what, error);

    m->grads = (real *)xcalloc(m->total, sizeof(real));
    point_parameters(&m->dp, m->grads, m->tensors);
    Gates gates = layer_gates(m, &m->a, 0);
    attention_backward(m->a.dfq, m->a.dfk, dqkv, dout, out, m->a.att_lse, m->a.fq, m->a.fk, qkv, m->scale, m->window,
                       &gates, true, 1, T, NH, HS);
    features_backward(m, dqkv, m->a.dfq, m->a.dfk, m->a.fq, m->a.fk, qkv, 0, 1, T);
    splats_backward(m, 0, 1);
    for (size_t i = 0; i < T * 3 * C; i++) {
        double keep = x[i], h = i % (3 * C) < 2 * C ? 1e-4 * length : 1e-4;
        x[i] = keep + h;
        difference[i] = heads_value(&f, x, d, o, i / (3 * C), T, epsilon) / (2 * h);
        x[i] = keep - h;
        difference[i] -= heads_value(&f, x, d, o, i / (3 * C), T, epsilon) / (2 * h);
        x[i] = keep;
    }
    error = error_of(dqkv, difference, T * 3 * C);
    CHECK(error < 5e-5, "%s: gradient of qkv %g", what, error);
    for (size_t t = 0; t < T && c.forget; t++) {
        double *p = &log_forget[t * NH], keep = *p, h = 1e-4;
        *p = keep + h;
        difference[t] = heads_value(&f, x, d, o, t, T, epsilon) / (2 * h);
        *p = keep - h;
        difference[t] -= heads_value(&f, x, d, o, t, T, epsilon) / (2 * h);
        *p = keep;
    }
    if (c.forget) {
        error = error_of(m->a.dlog_forget, difference, T);
        CHECK(error < 5e-5, "%s: gradient of ln f %g", what, error);
    }
    const int scalars[] = {TENSOR_mu,  TENSOR_log_precision, TENSOR_log_alpha, TENSOR_log_theta,
                           TENSOR_psi, TENSOR_log_gain,      TENSOR_log_rope};
    for (size_t i = 0; i < sizeof scalars / sizeof *scalars; i++) {
        const Tensor *t = &f.tensors[scalars[i]];
        if (!t->size) continue;
        for (size_t k = 0; k < t->size; k++) {
            double *p = &f.params[t->offset + k], keep = *p, h = 1e-4;
            *p = keep + h;
            difference[k] = heads_value(&f, x, d, o, 0, T, epsilon) / (2 * h);
            *p = keep - h;
            difference[k] -= heads_value(&f, x, d, o, 0, T, epsilon) / (2 * h);
            *p = keep;
        }
        error = error_of(m->grads + t->offset, difference, t->size);
        CHECK(error < (scalars[i] == TENSOR_log_theta ? 1e-3 : 1e-4), "%s: gradient of %s %g", what, t->name, error);
    }
    gsa_destroy(m);
    free(f.params);
    free(log_forget);
    free(x);
    free(d);
    free(o);
    free(difference);
    free_numbers();
}

static void test_heads(void) {
    char what[128];
    for (int position = 0; position <= POSITION_ROPE; position++)
        for (int kind = 0; kind < 4; kind++) {
            Config c = small_config(ATTENTION_HYBRID, NULL, position, kind & 1, kind >> 1);
            snprintf(what, sizeof what, "heads, standard (%s) and GSA (%s, %s)", position ? "rope" : "learned",
                     kind & 1 ? "diag" : "iso", kind >> 1 ? "cosine" : "no envelope");
            check_heads(c, 18, 1, 0, what);
            if (position == POSITION_ROPE) check_heads(c, 9, 1e-3, 1e-6, "q and k as small as the epsilon");
            c.C = 16;
            c.S = c.envelope ? 4 : 8; /* heads of size 8, filled by their splats */
            check_heads(c, 17, 3, 0, "heads filled by splats");
        }
}

/* ---------------------------------------------------------------------- phases */

enum { PHASE_T = 7, PHASE_HS = 8, PHASE_S = 3 };

/* Equation (7b) of one head of an encoder, in the plainest form: sum of out (T, HS) times dout. x (T, 3 HS): q, k, v.
   Logits (softmax) or weights (linear) are sum_s alpha e phi(q) phi(k), e = cos(theta (i - j) - psi), or
   exp(-delta |i - j|) (1 + that) / 2. */
static double phase_value(const GSA *m, const double *psi, const double *x, const double *dout, double *out) {
    enum { T = PHASE_T, HS = PHASE_HS, S = PHASE_S };
    bool linear = m->config.mixer == MIXER_LINEAR;
    double value = 0;
    for (int i = 0; i < T; i++) {
        double w[T], sum = 0, most = -INFINITY;
        for (int j = 0; j < T; j++) {
            const double *q = x + i * 3 * HS, *k = x + j * 3 * HS + HS;
            double qq = 1e-6, kk = 1e-6;
            for (int e = 0; e < HS; e++) qq += q[e] * q[e];
            for (int e = 0; e < HS; e++) kk += k[e] * k[e];
            w[j] = 0;
            for (int s = 0; s < S; s++) {
                double apart = 0, angle = exp((double)m->p.log_theta[s]) * (i - j) - psi[s];
                for (int e = 0; e < HS; e++) {
                    double mu = (double)m->p.mu[s * HS + e];
                    apart += pow(q[e] / sqrt(qq) - mu, 2) + pow(k[e] / sqrt(kk) - mu, 2);
                }
                double e = cos(angle);
                if (linear) e = exp(-exp((double)m->p.log_delta[s]) * abs(i - j)) * (1 + e) / 2;
                w[j] += e * exp((double)m->p.log_alpha[s] - 0.5 * exp((double)m->p.log_precision[s]) * apart);
            }
            most = max_of(most, w[j]);
        }
        for (int j = 0; j < T; j++) sum += w[j] = linear ? w[j] : exp(w[j] - most);
        for (int e = 0; e < HS; e++) {
            double o = 0;
            for (int j = 0; j < T; j++) o += w[j] / sum * x[j * 3 * HS + 2 * HS + e];
            value += o * dout[i * HS + e];
            if (out) out[i * HS + e] = o;
        }
    }
    return value;
}

/* An encoder's head sees keys on both sides, whose distances have opposite signs. One splat's psi is at the linear
   mixer's bound. */
static void test_phase(int mixer) {
    enum { T = PHASE_T, HS = PHASE_HS, S = PHASE_S };
    Config c;
    const char *problem = try_config(&c, ATTENTION_GSA, NULL, POSITION_ROPE, mixer, COVARIANCE_ISO,
                                     mixer ? ENVELOPE_RAISED : ENVELOPE_COSINE, 0, OBJECTIVE_MLM);
    if (problem) die("%s", problem);
    c.T = T;
    c.L = c.NH = 1;
    c.C = HS;
    c.gsa_heads[0] = 1;
    c.gsa_heads[1] = 0;
    GSA *m = scattered_model(&c, 1, 31);
    uint64_t rng = 32;
    m->p.psi[0] = (real)SPLAT_PHASE_MAX;
    m->p.psi[1] = -1.1f;
    m->p.psi[2] = 0.4f;
    real *qkv = numbers(T * 3 * HS, 1, &rng), *dout = numbers(T * HS, 1, &rng), *out = numbers(T * HS, 0, NULL),
         *dqkv = numbers(T * 3 * HS, 0, NULL);
    double x[T * 3 * HS], d[T * HS], o[T * HS], psi[S], difference[S], dx[T * 3 * HS];
    widen(x, qkv, T * 3 * HS);
    widen(d, dout, T * HS);
    widen(psi, m->p.psi, S);
    gsa_splat_waves(m, m->a.splat_waves, T, 0);
    features_forward(m, m->a.fq, m->a.fk, qkv, 0, 1, T, m->a.rope_waves, m->a.splat_waves);
    attention_forward(out, m->a.att_lse, m->a.fq, m->a.fk, qkv, m->scale, m->window, NULL, false, 1, T, 1, HS);
    scans_forward(m, out, m->a.att_lse, m->a.scan_rho, qkv, 0, 1, T);
    phase_value(m, psi, x, d, o);
    CHECK(error_of(out, o, T * HS) < 2e-5, "phases, mixer %d: output %g", mixer, error_of(out, o, T * HS));

    m->grads = (real *)xcalloc(m->total, sizeof(real));
    point_parameters(&m->dp, m->grads, m->tensors);
    attention_backward(m->a.dfq, m->a.dfk, dqkv, dout, out, m->a.att_lse, m->a.fq, m->a.fk, qkv, m->scale, m->window,
                       NULL, false, 1, T, 1, HS);
    features_backward(m, dqkv, m->a.dfq, m->a.dfk, m->a.fq, m->a.fk, qkv, 0, 1, T);
    scans_backward(m, dqkv, dout, out, m->a.scan_rho, qkv, 0, 1, T);
    splats_backward(m, 0, 1);
    for (int s = 0; s < S; s++) {
        double keep = psi[s], h = 1e-5;
        psi[s] = keep + h;
        difference[s] = phase_value(m, psi, x, d, NULL) / (2 * h);
        psi[s] = keep - h;
        difference[s] -= phase_value(m, psi, x, d, NULL) / (2 * h);
        psi[s] = keep;
    }
    for (int i = 0; i < T * 3 * HS; i++) {
        double keep = x[i], h = 1e-5;
        x[i] = keep + h;
        dx[i] = phase_value(m, psi, x, d, NULL) / (2 * h);
        x[i] = keep - h;
        dx[i] -= phase_value(m, psi, x, d, NULL) / (2 * h);
        x[i] = keep;
    }
    CHECK(error_of(m->dp.psi, difference, S) < 1e-4, "phases, mixer %d: gradient of psi %g", mixer,
          error_of(m->dp.psi, difference, S));
    CHECK(error_of(dqkv, dx, T * 3 * HS) < 1e-4, "phases, mixer %d: gradient of qkv %g", mixer,
          error_of(dqkv, dx, T * 3 * HS));
    gsa_destroy(m);
    free_numbers();
}

/* Attention alone, across its blocks of queries. */
static void test_attention(size_t T, double deviation) {
    uint64_t rng = T;
    enum { B = 2, NH = 2, HS = 10, C = NH * HS };
    real *fq = numbers(B * T * C, deviation, &rng), *fk = numbers(B * T * C, deviation, &rng),
         *qkv = numbers(B * T * 3 * C, 1, &rng), *out = numbers(B * T * C, 0, NULL),
         *lse = numbers(B * NH * T, 0, NULL);
    const real scale[NH] = {0.3f, 1};
    const size_t window[NH] = {T, T};
    double *expected = (double *)xcalloc(B * T * C, sizeof(double)),
           *ln_sum = (double *)xcalloc(B * NH * T, sizeof(double)), *z = (double *)xmalloc(T * sizeof(double));
    attention_forward(out, lse, fq, fk, qkv, scale, window, NULL, true, B, T, NH, HS);
    for (size_t i = 0; i < B * NH * T; i++) { /* (b, h, t) */
        size_t b = i / T / NH, h = i / T % NH, t = i % T;
        double most = -INFINITY, sum = 0;
        for (size_t j = 0; j <= t; j++) {
            z[j] = 0;
            for (size_t k = 0; k < HS; k++)
                z[j] += scale[h] * (double)fq[i * HS + k] * (double)fk[(i - t + j) * HS + k];
            most = max_of(most, z[j]);
        }
        for (size_t j = 0; j <= t; j++) sum += z[j] = exp(z[j] - most);
        ln_sum[i] = most + log(sum);
        for (size_t j = 0; j <= t; j++)
            for (size_t k = 0; k < HS; k++)
                expected[(b * T + t) * C + h * HS + k] += z[j] / sum * qkv[(b * T + j) * 3 * C + 2 * C + h * HS + k];
    }
    double tolerance = 1e-6 * max_of(5, 0.1 * deviation * deviation * HS); /* large logits have large roundings */
    CHECK(error_of(out, expected, B * T * C) < tolerance, "attention, T = %zu, features of deviation %g: %g", T,
          deviation, error_of(out, expected, B * T * C));
    CHECK(error_of(lse, ln_sum, B * NH * T) < 1e-6, "its log-sum-exp: %g", error_of(lse, ln_sum, B * NH * T));
    free(expected);
    free(ln_sum);
    free(z);
    free_numbers();
}

static void matmul_formula(double *out, const double *in, const double *weight, const double *bias, size_t C,
                           size_t OC) {
    for (size_t o = 0; o < OC; o++) {
        out[o] = bias ? bias[o] : 0;
        for (size_t c = 0; c < C; c++) out[o] += weight[o * C + c] * in[c];
    }
}

/* ln f (NH) of layer l for one token: of each gated head log sigmoid(w . x + b). The gates of all layers lie in the
   order of layer and head; of each layer the first half of the standard heads has one, rounded up, or all. */
static void forget_formula(const Formula *f, int l, double *log_forget, const double *x) {
    const Config *c = &f->c;
    size_t gate = 0, C = (size_t)c->C;
    for (int i = 0; i <= l; i++) {
        int standard = 0, seen = 0;
        for (int h = 0; h < c->NH; h++) standard += !(c->gsa_heads[i] >> h & 1);
        for (int h = 0; h < c->NH; h++) {
            bool gated = !(c->gsa_heads[i] >> h & 1) && (c->forget == FORGET_ALL || 2 * seen < standard);
            seen += !(c->gsa_heads[i] >> h & 1);
            if (i == l) log_forget[h] = 0;
            if (!gated) continue;
            double u = part(f, TENSOR_forgetb, 0, 1)[gate];
            for (size_t k = 0; k < C; k++) u += part(f, TENSOR_forgetw, 0, 1)[gate * C + k] * x[k];
            if (i == l) log_forget[h] = -log(1 + exp(-u));
            gate++;
        }
    }
}

/* GPT-2's network on one sequence, with the heads above: logits (T, V); returns the mean loss. */
static double model_formula(Formula *f, const int *x, const int *y, size_t T, double *logits) {
    size_t C = (size_t)f->c.C, L = (size_t)f->c.L, V = (size_t)f->c.V;
    double *stream = (double *)xmalloc((T * 5 * C + 9 * C + T * (size_t)f->c.NH) * sizeof(double)),
           *qkv = stream + T * C, *att = qkv + T * 3 * C, *norm = att + T * C, *wide = norm + C, *back = wide + 4 * C,
           *log_forget = back + 4 * C;
    f->log_forget = f->c.forget ? log_forget : NULL;
    const double *wte = part(f, TENSOR_wte, 0, 1);
    double loss = 0;
    for (size_t i = 0; i < T * C; i++)
        stream[i] =
            wte[(size_t)x[i / C] * C + i % C] + (f->c.position == POSITION_ROPE ? 0 : part(f, TENSOR_wpe, 0, 1)[i]);
    for (size_t l = 0; l < L; l++) {
#define P(name) part(f, TENSOR_##name, l, L)
        for (size_t t = 0; t < T; t++) {
            layernorm_formula(norm, stream + t * C, P(ln1w), P(ln1b), C);
            matmul_formula(qkv + t * 3 * C, norm, P(qkvw), P(qkvb), C, 3 * C);
            if (f->log_forget) forget_formula(f, (int)l, log_forget + t * (size_t)f->c.NH, norm);
        }
        attention_formula(f, (int)l, att, qkv, 0, T, 1e-6);
        for (size_t t = 0; t < T; t++) {
            matmul_formula(back, att + t * C, P(attprojw), P(attprojb), C, C);
            for (size_t c = 0; c < C; c++) stream[t * C + c] += back[c];
            layernorm_formula(norm, stream + t * C, P(ln2w), P(ln2b), C);
            matmul_formula(wide, norm, P(fcw), P(fcb), C, 4 * C);
            for (size_t c = 0; c < 4 * C; c++) wide[c] = gelu_formula(wide[c]);
            matmul_formula(back, wide, P(fcprojw), P(fcprojb), 4 * C, C);
            for (size_t c = 0; c < C; c++) stream[t * C + c] += back[c];
        }
#undef P
    }
    for (size_t t = 0; t < T; t++) {
        double sum = 0;
        layernorm_formula(norm, stream + t * C, part(f, TENSOR_lnfw, 0, 1), part(f, TENSOR_lnfb, 0, 1), C);
        matmul_formula(logits + t * V, norm, wte, NULL, C, V);
        for (size_t v = 0; v < V; v++) sum += exp(logits[t * V + v]);
        loss += (log(sum) - logits[t * V + (size_t)y[t]]) / (double)T;
    }
    free(stream);
    return loss;
}

/* Logits, loss and gradients of a whole fp32 model; the gradients along one random direction per tensor. */
static void test_model(int attention, const char *heads, int position, int covariance, int envelope) {
    Config c = small_config(attention, heads, position, covariance, envelope);
    enum { B = 2, T = 21 };
    GSA *m = scattered_model(&c, B, 5);
    Formula f = make_formula(m);
    uint64_t rng = 6;
    size_t V = (size_t)c.V;
    int x[B * T], y[B * T];
    random_tokens(x, B * T, c.V, &rng);
    random_tokens(y, B * T, c.V, &rng);
    double logits[B * T * 16], ours[B * T * 16], loss = 0;
    double value = gsa_forward(m, x, y, B, T);
    for (size_t b = 0; b < B; b++) loss += model_formula(&f, x + b * T, y + b * T, T, logits + b * T * V) / B;
    for (size_t i = 0; i < B * T; i++) widen(ours + i * V, m->a.logits + i * (size_t)c.Vp, V);
    char p[16], a[16];
    choice_name(POSITION_CHOICES, position, p, sizeof p);
    choice_name(ATTENTION_CHOICES, attention, a, sizeof a);
    CHECK(relative_error_double(ours, logits, B * T * V) < 2e-5, "model %s %s: logits %g", a, p,
          relative_error_double(ours, logits, B * T * V));
    CHECK(fabs(value - loss) < 1e-5 * loss, "model %s %s: loss %g, by the formula %g", a, p, value, loss);
    gsa_backward(m, 1);
    for (int i = 0; i < NUM_TENSORS; i++) {
        const Tensor *t = &m->tensors[i];
        double along = 0, size = 0, difference = 0, h = 1e-4;
        if (!t->size || t->group == GROUP_FIXED) continue; /* no gradient: never trained */
        double *u = (double *)xmalloc(t->size * sizeof(double));
        for (size_t k = 0; k < t->size; k++) {
            u[k] = rng_normal(&rng);
            along += u[k] * m->grads[t->offset + k];
            size += (double)m->grads[t->offset + k] * m->grads[t->offset + k];
        }
        for (int side = -1; side <= 1; side += 2) {
            for (size_t k = 0; k < t->size; k++) f.params[t->offset + k] = m->params[t->offset + k] + side * h * u[k];
            for (size_t b = 0; b < B; b++)
                difference += side * model_formula(&f, x + b * T, y + b * T, T, logits) / B / (2 * h);
        }
        widen(f.params + t->offset, m->params + t->offset, t->size);
        CHECK(fabs(difference - along) <= 1e-4 * sqrt(size), "model %s %s: gradient of %s off by %g of its norm %g", a,
              p, t->name, fabs(difference - along) / sqrt(size), sqrt(size));
        free(u);
    }
    gsa_destroy(m);
    free(f.params);
}

/* ---------------------------------------------------------------------- exact properties */

/* No token sees a later one: nothing before the change moves, not by a bit. */
static void test_causality(int attention, int position, int envelope) {
    Config c = small_config(attention, NULL, position, COVARIANCE_ISO, envelope);
    enum { B = 2, T = 70 };
    GSA *m = scattered_model(&c, B, 7);
    uint64_t rng = 8;
    size_t Vp = (size_t)c.Vp;
    int x[B * T];
    real *before = numbers(B * T * Vp, 0, NULL);
    random_tokens(x, B * T, c.V, &rng);
    gsa_forward(m, x, NULL, B, T);
    memcpy(before, m->a.logits, B * T * Vp * sizeof(real));
    const size_t places[] = {0, 1, 37, 63, 64, 69};
    for (size_t i = 0; i < sizeof places / sizeof *places; i++) {
        size_t t = places[i];
        int keep = x[t];
        x[t] = (keep + 1) % c.V;
        gsa_forward(m, x, NULL, B, T);
        CHECK(memcmp(m->a.logits, before, t * Vp * sizeof(real)) == 0,
              "attention %d, positions %d: logits before a changed token %zu", attention, position, t);
        CHECK(memcmp(m->a.logits + t * Vp, before + t * Vp, Vp * sizeof(real)) != 0,
              "a changed token %zu changes its own logits", t);
        CHECK(t == 69 || memcmp(m->a.logits + 69 * Vp, before + 69 * Vp, Vp * sizeof(real)) != 0,
              "a changed token %zu changes the last logits", t);
        CHECK(memcmp(m->a.logits + T * Vp, before + T * Vp, T * Vp * sizeof(real)) == 0, "the other sequence stays");
        x[t] = keep;
    }
    gsa_destroy(m);
    free_numbers();
}

/* Only distances count, so a million tokens further on heads give the same; and the waves' product is the cosine of
   the distance. */
static void test_shift(void) {
    Config c = small_config(ATTENTION_HYBRID, NULL, POSITION_ROPE, COVARIANCE_ISO, ENVELOPE_COSINE);
    enum { T = 70, FAR = 1000000 };
    uint64_t rng = 9;
    GSA *m = scattered_model(&c, 1, 9);
    size_t C = (size_t)c.C, HS = (size_t)config_head_size(&c), S = (size_t)c.S, NH = (size_t)c.NH;
    real *qkv = numbers(T * 3 * C, 1, &rng), *near = numbers(T * C, 0, NULL), *far = numbers(T * C, 0, NULL);
    real *rope = numbers(config_sizes(&c).R * T * HS, 0, NULL),
         *splat = numbers((size_t)config_gsa_heads(&c) * T * 2 * S, 0, NULL);
    run_heads(m, 0, near, qkv, 1, T);
    gsa_rope_waves(m, rope, T, FAR);
    gsa_splat_waves(m, splat, T, FAR);
    CHECK(memcmp(rope, m->a.rope_waves, T * HS * sizeof(real)) != 0 &&
              memcmp(splat, m->a.splat_waves, T * 2 * S * sizeof(real)) != 0,
          "waves depend on the position");
    features_forward(m, m->a.fq, m->a.fk, qkv, 0, 1, T, rope, splat);
    attention_forward(far, m->a.att_lse, m->a.fq, m->a.fk, qkv, m->scale, m->window, NULL, true, 1, T, NH, HS);
    CHECK(relative_error(far, near, T * C) < 2e-6, "heads a million tokens on: %g", relative_error(far, near, T * C));
    double worst = 0;
    for (size_t i = 0; i < T; i++)
        for (size_t k = 0; k < S; k++) {
            const real *a = splat + i * 2 * S + k, *b = splat + k;
            worst = max_of(worst, fabs((double)a[0] * b[0] + (double)a[S] * b[S] -
                                       cos(exp((double)m->p.log_theta[k]) * (double)i)));
        }
    CHECK(worst < 5e-7, "cosines of distances from waves at a million: %g", worst);
    gsa_destroy(m);
    free_numbers();
}

/* Logits, loss, gradients and an update have the same bits whatever the number of threads. */
static void test_threads(void) {
#ifdef _OPENMP
    Config c = small_config(ATTENTION_HYBRID, NULL, POSITION_BOTH, COVARIANCE_DIAG, ENVELOPE_COSINE);
    c.NH = 3;
    c.C = 48;
    c.V = 77;
    c.Vp = 80;
    c.muon = true;
    config_head_map(&c, NULL);
    enum { B = 3, T = 67 };
    int x[B * T], y[B * T], threads = omp_get_max_threads();
    uint64_t rng = 10;
    random_tokens(x, B * T, c.V, &rng);
    random_tokens(y, B * T, c.V, &rng);
    real *logits = NULL, *grads = NULL, *params = NULL;
    double loss = 0, norms[NUM_CLIPS] = {0};
    for (int count = 1; count <= 4; count++) {
        omp_set_num_threads(count < 4 ? count : 1); /* and the first again: two runs are the same */
        GSA *m = scattered_model(&c, B, 11);
        double value = gsa_forward(m, x, y, B, T), sizes[NUM_CLIPS];
        size_t n = B * T * (size_t)c.Vp;
        if (count == 1) {
            logits = numbers(n, 0, NULL);
            grads = numbers(m->total, 0, NULL);
            params = numbers(m->total, 0, NULL);
            loss = value;
        }
        if (count == 1) memcpy(logits, m->a.logits, n * sizeof(real));
        CHECK(memcmp(logits, m->a.logits, n * sizeof(real)) == 0 && value == loss,
              "logits and loss with %d threads as with one", count);
        gsa_backward(m, 1);
        gsa_gradient_norms(m, sizes);
        if (count == 1) {
            memcpy(grads, m->grads, m->total * sizeof(real));
            memcpy(norms, sizes, sizeof norms);
        }
        for (int i = 0; i < NUM_TENSORS; i++)
            CHECK(memcmp(grads + m->tensors[i].offset, m->grads + m->tensors[i].offset,
                         m->tensors[i].size * sizeof(real)) == 0,
                  "gradient of %s with %d threads as with one", m->tensors[i].name, count);
        CHECK(memcmp(norms, sizes, sizeof norms) == 0, "gradient norms with %d threads as with one", count);
        const Update u = {
            .rate = {1e-3, 1e-2}, .beta1 = 0.9, .beta2 = 0.95, .weight_decay = 0.1, .scale = {0.5, 0.5}, .step = 1};
        gsa_update(m, &u, clamped);
        if (count == 1) memcpy(params, m->params, m->total * sizeof(real));
        CHECK(memcmp(params, m->params, m->total * sizeof(real)) == 0, "an update with %d threads as with one", count);
        gsa_destroy(m);
    }
    omp_set_num_threads(threads);
    free_numbers();
#else
    skip("the number of threads", "built without OpenMP");
#endif
}

/* ---------------------------------------------------------------------- optimiser and bounds */

static bool named(const char *name, const char *names) { /* in a list "a b c" */
    size_t n = strlen(name);
    for (const char *p = names; (p = strstr(p, name)); p += n)
        if ((p == names || p[-1] == ' ') && (p[n] == ' ' || p[n] == 0)) return true;
    return false;
}

/* out (rows, columns) = a b, each number a sum of `inner` products; (b^T where tb) */
static void plain_product(double *out, const double *a, const double *b, size_t rows, size_t columns, size_t inner,
                          bool tb) {
    for (size_t i = 0; i < rows; i++)
        for (size_t j = 0; j < columns; j++) {
            double sum = 0;
            for (size_t k = 0; k < inner; k++) sum += a[i * inner + k] * b[tb ? j * inner + k : k * columns + j];
            out[i * columns + j] = sum;
        }
}

/* x (rows, columns) <- x times its steps' polynomial a + b G + c G^2, G = x x^T whatever the shape, from x / |x| on;
   until it stands still. */
static void plain_polynomial(double *x, size_t rows, size_t columns, double a, double b, double c, int steps) {
    size_t n = rows * columns;
    double *gram = (double *)xmalloc((rows * rows + 2 * n) * sizeof *gram), *first = gram + rows * rows,
           *second = first + n, sum = 0;
    for (size_t i = 0; i < n; i++) sum += x[i] * x[i];
    for (size_t i = 0; i < n && sum > 0; i++) x[i] /= sqrt(sum);
    double moved = INFINITY;
    for (int step = 0; step < steps && moved > 1e-24; step++) {
        plain_product(gram, x, x, rows, rows, columns, true);
        plain_product(first, gram, x, rows, columns, rows, false);
        plain_product(second, gram, first, rows, columns, rows, false);
        moved = 0;
        for (size_t i = 0; i < n; i++) {
            double next = a * x[i] + b * first[i] + c * second[i];
            moved += (next - x[i]) * (next - x[i]);
            x[i] = next;
        }
    }
    free(gram);
}

/* Muon's matrices by the same steps written apart, and against the orthogonal matrix itself: that of the singular
   vectors, by Newton's steps until they stand still. Both have these vectors, and where the singular values are 1 there
   they are about 1 here. */
static void test_orthogonal(void) {
    static const size_t shapes[][2] = {{20, 20}, {20, 80}, {80, 20}, {33, 7}, {64, 64}, {1, 9}, {9, 1}, {300, 70}};
    uint64_t rng = 41;
    for (size_t s = 0; s < sizeof shapes / sizeof *shapes; s++) {
        size_t rows = shapes[s][0], columns = shapes[s][1], n = rows * columns, least = rows < columns ? rows : columns;
        real *x = numbers(n, 1e-4, &rng), *room = numbers(muon_room(rows, columns), 0, NULL);
        double *steps = (double *)xmalloc((2 * n + rows * rows) * sizeof *steps), *exact = steps + n,
               *product = exact + n;
        widen(steps, x, n);
        widen(exact, x, n);
        plain_polynomial(steps, rows, columns, 3.4445, -4.7750, 2.0315, 5);
        plain_polynomial(exact, rows, columns, 1.5, -0.5, 0, 80);
        const real *o = muon_orthogonal(x, rows, columns, room);
        double error = error_of(o, steps, n), apart = 0, skew = 0;
        CHECK(error < 1e-5, "Newton-Schulz (%zu, %zu): %g", rows, columns, error);
        for (size_t i = 0; i < n; i++) apart += (o[i] - exact[i]) * (o[i] - exact[i]);
        CHECK(sqrt(apart) < 0.35 * sqrt((double)least), "(%zu, %zu): %g from orthogonal, of %g", rows, columns,
              sqrt(apart), sqrt((double)least));
        widen(steps, o, n); /* o exact^T = U diag(about 1) U^T: symmetric */
        plain_product(product, steps, exact, rows, rows, columns, true);
        for (size_t i = 0; i < rows; i++)
            for (size_t j = 0; j < i; j++) skew = fmax(skew, fabs(product[i * rows + j] - product[j * rows + i]));
        CHECK(isfinite(skew) && skew < 1e-5, "(%zu, %zu): other singular vectors, %g", rows, columns, skew);
        free(steps);
    }
    real *x = numbers(12, 0, NULL), *room = numbers(muon_room(3, 4), 0, NULL), most = 0;
    const real *o = muon_orthogonal(x, 3, 4, room);
    for (int i = 0; i < 12; i++) most = o[i] == 0 ? most : 1;
    CHECK(most == 0, "no gradient, no update");
    free_numbers();
}

/* One update of tensor t by Muon, matrix by matrix; its queries, keys and values apart. */
static void plain_muon(double *p, double *momentum, const real *grads, const Tensor *t, double scale, double rate,
                       double decay) {
    size_t parts = strcmp(t->name, "qkvw") == 0 ? 3 : 1, rows = (size_t)t->shape[1] / parts,
           columns = (size_t)t->shape[2], n = rows * columns;
    double *x = (double *)xmalloc(n * sizeof *x), size = 0.2 * sqrt((double)(rows > columns ? rows : columns));
    for (size_t at = t->offset; at < t->offset + t->size; at += n) {
        for (size_t k = 0; k < n; k++) {
            momentum[at + k] += 0.2 * (scale * grads[at + k] - momentum[at + k]);
            x[k] = 0.8 * momentum[at + k] + 0.2 * scale * grads[at + k];
        }
        plain_polynomial(x, rows, columns, 3.4445, -4.7750, 2.0315, 5);
        for (size_t k = 0; k < n; k++) p[at + k] -= rate * (size * x[k] + decay * p[at + k]);
    }
    free(x);
}

/* AdamW, and Muon, by their formulas: which tensors are whose, which decay, who has which rate and who is clipped with
   whom stands here once more, by name. */
static void test_update(int attention, bool muon) {
    static const char *const decaying = "wte wpe qkvw forgetw attprojw fcw fcprojw",
                             *const scalars = "log_precision log_alpha log_theta psi log_gain log_rope",
                             *const orthogonal = "qkvw attprojw fcw fcprojw";
    Config c = small_config(attention, NULL, POSITION_BOTH, COVARIANCE_ISO, ENVELOPE_COSINE);
    c.muon = muon;
    c.rope = ROPE_LEARNED;
    c.forget = FORGET_ALL;
    GSA *m = gsa_create(&c, 1);
    model_start(&c, m->params, 12);
    m->grads = (real *)xcalloc(m->total, sizeof(real));
    double *p = (double *)xmalloc(m->total * sizeof(double)), *first = (double *)xcalloc(m->total, sizeof(double)),
           *second = (double *)xcalloc(m->total, sizeof(double));
    widen(p, m->params, m->total);
    uint64_t rng = 13;
    for (int step = 1; step <= 5; step++) {
        /* Adam forgets a constant factor, so the scales change from step to step */
        const Update u = {.rate = {1e-3 * step, 7e-3},
                          .beta1 = 0.9,
                          .beta2 = 0.95,
                          .weight_decay = 0.5,
                          .scale = {1.0 / step, step == 2 ? 0.1 : 0.9},
                          .step = step,
                          .momentum = 0.8};
        double squares[NUM_CLIPS] = {0}, norms[NUM_CLIPS];
        for (int i = 0; i < NUM_TENSORS; i++) {
            const Tensor *t = &m->tensors[i];
            bool scalar = named(t->name, scalars), decay = named(t->name, decaying);
            int clip = scalar ? CLIP_SPLATS : CLIP_WEIGHTS;
            double rate = scalar ? 7e-3 : 1e-3 * step;
            if (named(t->name, "alive log_alpha_reference")) continue; /* never trained */
            for (size_t k = t->offset; k < t->offset + t->size; k++) {
                m->grads[k] = (real)(0.01 * rng_normal(&rng));
                double g = u.scale[clip] * m->grads[k];
                squares[clip] += (double)m->grads[k] * m->grads[k];
                if (muon && named(t->name, orthogonal)) continue;
                first[k] = 0.9 * first[k] + 0.1 * g;
                second[k] = 0.95 * second[k] + 0.05 * g * g;
                p[k] -= rate * (first[k] / (1 - pow(0.9, step)) / (sqrt(second[k] / (1 - pow(0.95, step))) + 1e-8) +
                                (decay ? 0.5 * p[k] : 0));
            }
            if (muon && named(t->name, orthogonal)) plain_muon(p, first, m->grads, t, u.scale[clip], rate, 0.5);
        }
        gsa_gradient_norms(m, norms);
        for (int clip = 0; clip < NUM_CLIPS; clip++)
            CHECK(fabs(norms[clip] / sqrt(squares[clip]) - 1) < 1e-10, "gradient norm of clip group %d", clip);
        gsa_update(m, &u, clamped);
    }
    for (int i = 0; i < NUM_TENSORS; i++) {
        const Tensor *t = &m->tensors[i];
        double error = t->size ? error_of(m->params + t->offset, p + t->offset, t->size) : 0;
        CHECK(error < 2e-6, "%s, 5 steps, %s: %g", muon ? "Muon" : "AdamW", t->name, error);
    }
    size_t without = 0; /* what Muon has no second moments for */
    for (int i = 0; i < NUM_TENSORS && muon; i++)
        if (named(m->tensors[i].name, orthogonal)) without += (m->tensors[i].size + 31) / 32 * 32;
    CHECK(m->seconds == m->total - without, "%zu second moments of %zu numbers", m->seconds, m->total);
    gsa_destroy(m);
    free(p);
    free(first);
    free(second);
}

static void check_bounds(const GSA *m, const char *what) {
    Sizes z = config_sizes(&m->config);
    double start = splat_amplitude_start((int)z.S, (int)z.HS);
    bool good = true;
    for (size_t s = 0; s < z.G * z.S; s++) {
        double square = 0, slope = 0;
        for (size_t k = 0; k < z.HS; k++) {
            double mu = m->p.mu[s * z.HS + k], p = exp(m->p.log_precision[s * z.P + (z.P > 1 ? k : 0)]);
            good &= p >= 0.4 * (1 - 1e-6) && p <= 40 * (1 + 1e-6);
            square += mu * mu;
            slope += p * mu * p * mu;
        }
        good &= sqrt(square) <= 2 * (1 + 1e-6) && sqrt(slope) <= 40 * (1 + 2e-6);
        good &= fabs(m->p.log_alpha[s] - start) <= log(10) * (1 + 1e-6);
        if (m->p.log_theta) good &= exp(m->p.log_theta[s]) <= 3.14159266;
        if (m->p.psi) good &= fabs((double)m->p.psi[s]) <= 3.1415928;
    }
    CHECK(good,
          "%s: precision in [0.4, 40], |mu| <= 2, |Lambda mu| <= 40, ln alpha within ln 10 of its start, theta and "
          "|psi| <= pi",
          what);
}

/* Each bound switched off: what is outside stays, all else is put back. */
static void test_unbounded(void) {
    Config c = small_config(ATTENTION_HYBRID, NULL, POSITION_ROPE, COVARIANCE_ISO, ENVELOPE_COSINE);
    c.mixer = MIXER_LINEAR;
    c.envelope = ENVELOPE_RAISED;
    GSA *m = gsa_create(&c, 1);
    static const int tensors[NUM_BOUNDS] = {TENSOR_log_precision, TENSOR_mu,       TENSOR_log_alpha, TENSOR_log_theta,
                                            TENSOR_log_delta,     TENSOR_log_gain, TENSOR_psi};
    for (int off = -1; off < NUM_BOUNDS; off++) {
        model_start(&c, m->params, 15);
        m->p.log_precision[0] = (real)log(60);
        m->p.mu[0] = 50;
        m->p.log_alpha[0] = 4;
        m->p.log_theta[0] = 2;
        m->p.log_delta[0] = -1;
        m->p.log_gain[0] = 3;
        m->p.psi[0] = 1.6f;
        m->p.log_rope[1] = 2; /* of a frequency too */
        m->config.unbounded = off < 0 ? 0 : 1 << off;
        int64_t outside[NUM_BOUNDS] = {0};
        scalar_bounds(m, outside);
        for (int b = 0; b < NUM_BOUNDS; b++) {
            static const double was[NUM_BOUNDS] = {4.0943445622221, 50, 4, 2, -1, 3, 1.6};
            bool same = fabs((double)m->params[m->tensors[tensors[b]].offset] - was[b]) < 1e-5;
            if (b == BOUND_FREQUENCY) same = same && m->p.log_rope[1] == 2;
            CHECK(outside[b] == (b != off) * (b == BOUND_FREQUENCY ? 2 : 1) && same == (b == off),
                  "bound %d where bound %d is off: %lld outside, %s", b, off, (long long)outside[b],
                  same ? "kept" : "put back");
        }
    }
    gsa_destroy(m);
}

static void test_bounds(int covariance, int envelope) {
    Config c = small_config(ATTENTION_GSA, NULL, POSITION_ROPE, covariance, envelope);
    GSA *m = gsa_create(&c, 1);
    Sizes z = config_sizes(&c);
    size_t splats = z.G * z.S;
    real *keep = numbers(m->total, 0, NULL), start = (real)splat_amplitude_start(c.S, config_head_size(&c));
    uint64_t rng = 14;
    model_start(&c, m->params, 15);
    memcpy(keep, m->params, m->total * sizeof(real));
    scalar_bounds(m, clamped);
    CHECK(memcmp(keep, m->params, m->total * sizeof(real)) == 0, "the start is within the bounds and stays");
    /* anywhere inside */
    for (size_t i = 0; i < splats * z.P; i++) m->p.log_precision[i] = (real)log(0.5 + 18 * rng_uniform(&rng));
    for (size_t s = 0; s < splats; s++) {
        real length = (real)(0.5 + 1.4 * rng_uniform(&rng));
        for (size_t k = 0; k < z.HS; k++) m->p.mu[s * z.HS + k] *= length;
        m->p.log_alpha[s] = start + (real)(2.3 * (2 * rng_uniform(&rng) - 1));
        if (envelope) m->p.log_theta[s] = (real)(1.14 - 12 * rng_uniform(&rng));
        if (envelope) m->p.psi[s] = (real)(6.28 * (rng_uniform(&rng) - 0.5));
    }
    memcpy(keep, m->params, m->total * sizeof(real));
    scalar_bounds(m, clamped);
    CHECK(memcmp(keep, m->params, m->total * sizeof(real)) == 0, "values inside the bounds stay to the bit");

    real *mu = m->p.mu, *log_precision = m->p.log_precision; /* one violation a splat */
    for (size_t k = 0; k < z.HS; k++) mu[k] *= 10;
    for (size_t i = 0; i < z.P; i++) {
        log_precision[z.P + i] = 9;
        log_precision[2 * z.P + i] = -9;
        log_precision[3 * z.P + i] = (real)log(39);
    }
    /* |mu| 1.99, slope 77 */
    for (size_t k = 0; k < z.HS; k++)
        mu[3 * z.HS + k] *= 1.99f / (real)sqrt((double)z.HS) / (real)fabs(mu[3 * z.HS + k]);
    m->p.log_alpha[4] = start + 5;
    m->p.log_alpha[5] = start - 5;
    if (envelope) m->p.log_theta[6] = 4;
    if (envelope) m->p.psi[7] = 16; /* no bound, but an angle that is written in another way */
    memcpy(keep, m->params, m->total * sizeof(real));
    scalar_bounds(m, clamped);
    check_bounds(m, "out of bounds");
    for (size_t s = 0; s < splats; s += 3) { /* centres keep their direction */
        const real *a = m->p.mu + s * z.HS, *b = keep + m->tensors[TENSOR_mu].offset + s * z.HS;
        double aa = 0, bb = 0, ab = 0;
        for (size_t k = 0; k < z.HS; k++) {
            aa += (double)a[k] * a[k];
            bb += (double)b[k] * b[k];
            ab += (double)a[k] * b[k];
        }
        CHECK(ab > (1 - 1e-6) * sqrt(aa * bb), "a centre that is pulled back keeps its direction");
        if (s == 0) CHECK(sqrt(aa) > 0.5 && sqrt(aa) < sqrt(bb), "a far centre is pulled back");
        if (s == 3)
            CHECK(sqrt(aa) > 0.95 && sqrt(aa) < 1.1, "|Lambda mu| from 77 to 40 with precision 39: |mu| = %g",
                  sqrt(aa));
    }
    CHECK(fabs(m->p.log_alpha[4] - start - log(10)) < 1e-6 && fabs(start - log(10) - m->p.log_alpha[5]) < 1e-6,
          "ln alpha at its bounds");
    CHECK(fabs(exp(log_precision[z.P]) - 40) < 1e-4 && fabs(exp(log_precision[2 * z.P]) - 0.4) < 1e-6,
          "precisions at their bounds");
    if (envelope) CHECK(fabs(exp(m->p.log_theta[6]) - 3.1415927) < 1e-6, "theta at its bound");
    if (envelope) CHECK(fabs((double)m->p.psi[7] - (16 - 6 * 3.141592653589793)) < 2e-6, "psi within half a turn");
    for (int i = 0; i < NUM_TENSORS; i++)
        if (!named(m->tensors[i].name, "mu log_precision log_alpha log_theta psi"))
            CHECK(memcmp(keep + m->tensors[i].offset, m->params + m->tensors[i].offset,
                         m->tensors[i].size * sizeof(real)) == 0,
                  "%s has no bounds", m->tensors[i].name);
    for (int step = 1; step <= 30; step++) { /* and an update never leaves them */
        if (!m->grads) m->grads = (real *)xcalloc(m->total, sizeof(real));
        for (size_t k = 0; k < m->total; k++) m->grads[k] = (real)(k % 2 ? 1 : -1);
        const Update u = {
            .rate = {0.05, 0.5}, .beta1 = 0.9, .beta2 = 0.95, .weight_decay = 0.1, .scale = {1, 1}, .step = step};
        gsa_update(m, &u, clamped);
    }
    check_bounds(m, "after large updates");
    gsa_destroy(m);
    free_numbers();
}

/* ---------------------------------------------------------------------- configuration, starting values */

static double deviation_of(const real *x, size_t n) {
    double sum = 0;
    for (size_t i = 0; i < n; i++) sum += (double)x[i] * x[i];
    return sqrt(sum / (double)n);
}

static void test_start(void) {
    Config c = small_config(ATTENTION_HYBRID, NULL, POSITION_BOTH, COVARIANCE_DIAG, ENVELOPE_COSINE);
    c.NH = 4;
    c.C = 64;
    c.V = 300;
    c.Vp = 320;
    c.S = 5;
    config_head_map(&c, NULL);
    Tensor t[NUM_TENSORS], other[NUM_TENSORS];
    size_t total = model_tensors(&c, t);
    /* what stands there before must not matter */
    real *a = numbers(total, 1, &(uint64_t){1}), *b = numbers(total, 0, NULL);
    model_start(&c, a, 5);
    model_start(&c, b, 5);
    CHECK(memcmp(a, b, total * sizeof(real)) == 0, "the same seed gives the same start");
    model_start(&c, b, 6);
    for (int i = 0; i < NUM_TENSORS; i++) {
        bool random = named(t[i].name, "wte wpe qkvw mu attprojw fcw fcprojw");
        CHECK((memcmp(a + t[i].offset, b + t[i].offset, t[i].size * sizeof(real)) != 0) == random, "%s %s the seed",
              t[i].name, random ? "depends on" : "does not depend on");
        double deviation = named(t[i].name, "attprojw fcprojw") ? 0.02 / 2 : 0.02; /* residual: / sqrt(2 L), L = 2 */
        size_t n = i == TENSOR_wte ? (size_t)c.V * (size_t)c.C : t[i].size;
        if (random && i != TENSOR_mu)
            CHECK(fabs(deviation_of(a + t[i].offset, n) / deviation - 1) < 0.05, "%s: standard deviation %g", t[i].name,
                  deviation_of(a + t[i].offset, n));
    }
    size_t size = model_parameters(&c), count = 0;
    for (int i = 0; i < NUM_TENSORS; i++) count += named(t[i].name, "alive log_alpha_reference") ? 0 : t[i].size;
    CHECK(size == count - 20 * 64, "parameters without the padding of the vocabulary");
    CHECK(deviation_of(a + t[TENSOR_wte].offset + 300 * 64, 20 * 64) == 0, "the padding of the vocabulary starts at 0");
    CHECK(deviation_of(a + t[TENSOR_qkvb].offset, t[TENSOR_qkvb].size) == 0 && a[t[TENSOR_ln1w].offset + 3] == 1,
          "biases 0, weights of layernorm 1");
    size_t HS = 16, S = 5, splats = t[TENSOR_mu].size / HS;
    CHECK(splats == 2 * 2 * S, "two GSA heads in each of two layers");
    for (size_t s = 0; s < splats; s++) {
        CHECK(fabs(deviation_of(a + t[TENSOR_mu].offset + s * HS, HS) * 4 - 1) < 1e-6, "centre %zu on the unit sphere",
              s);
        CHECK(fabs(a[t[TENSOR_log_theta].offset + s] + log(1000) * (double)(s % S) / (S - 1)) < 1e-5,
              "frequency %zu of 1 .. 1e-3", s);
        CHECK(fabs(exp(a[t[TENSOR_log_precision].offset + s * HS + s % HS]) - 4) < 1e-5, "precision 4");
        CHECK(fabs(a[t[TENSOR_log_alpha].offset + s] - splat_amplitude_start((int)S, (int)HS)) < 1e-6, "amplitude");
    }
    memcpy(b, a, total * sizeof(real));
    model_scale_amplitudes(&c, b, 0.05);
    double moved[2] = {0, 0};
    for (size_t k = 0; k < total; k++) {
        bool amplitude =
            (k >= t[TENSOR_log_alpha].offset && k < t[TENSOR_log_alpha].offset + splats) ||
            (k >= t[TENSOR_log_alpha_reference].offset && k < t[TENSOR_log_alpha_reference].offset + splats);
        moved[amplitude] = fmax(moved[amplitude], fabs(b[k] - a[k] - (amplitude ? log(0.05) : 0)));
    }
    CHECK(moved[0] == 0 && moved[1] < 1e-6,
          "amplitudes and what they are bounded by times 0.05: %g, all else as it was: %g", moved[1], moved[0]);
    Config mixed = c; /* of 4 heads: all of the first layer, half of the second */
    CHECK(!config_head_map(&mixed, "0:0-3,1:2-3"), "a layer of splats only");
    real *m = numbers(model_tensors(&mixed, other), 0, NULL);
    model_start(&mixed, m, 5);
    model_scale_amplitudes(&mixed, m, 0);
    size_t soft = other[TENSOR_log_alpha].offset, sharp = soft + 4 * S;
    double start = splat_amplitude_start((int)S, (int)HS);
    for (size_t k = soft; k < soft + 6 * S; k++)
        CHECK(fabs(m[k] - start - (k < sharp ? log(0.1) : 0)) < 1e-6, "a soft start in a layer of splats only: %g",
              m[k]);
    Config learned = c; /* a tensor more or less does not change the others */
    learned.position = POSITION_ROPE;
    model_tensors(&learned, other);
    model_start(&learned, b, 5);
    CHECK(other[TENSOR_wpe].size == 0 && other[TENSOR_fcw].offset != t[TENSOR_fcw].offset &&
              memcmp(a + t[TENSOR_fcw].offset, b + other[TENSOR_fcw].offset, t[TENSOR_fcw].size * sizeof(real)) == 0,
          "without learned positions the other tensors start the same");
    for (int i = 0; i < NUM_TENSORS; i++)
        CHECK(t[i].offset % 32 == 0, "%s starts at a multiple of 128 bytes", t[i].name);
    free_numbers();
}

/* Logits of random unit vectors through the formula: deviation 1 at the starting amplitude. */
static void test_amplitude(int S, int d) {
    enum { HEADS = 24, TOKENS = 150 };
    uint64_t rng = (uint64_t)(S * 1000 + d);
    double sum = 0, squares = 0, alpha = exp(splat_amplitude_start(S, d)), count = (double)HEADS * TOKENS * TOKENS;
    double *mu = (double *)xmalloc((size_t)(S * d) * sizeof(double)),
           *phi = (double *)xmalloc((size_t)(2 * TOKENS * S) * sizeof(double)),
           *x = (double *)xmalloc((size_t)d * sizeof(double));
    for (int head = 0; head < HEADS; head++) {
        for (int i = 0; i < S + 2 * TOKENS; i++) { /* centres, then queries and keys, all random unit vectors */
            double *v = i < S ? mu + i * d : x, square = 0;
            for (int k = 0; k < d; k++) {
                v[k] = rng_normal(&rng);
                square += v[k] * v[k];
            }
            for (int k = 0; k < d; k++) v[k] /= sqrt(square);
            for (int s = 0; i >= S && s < S; s++) {
                double distance = 0;
                for (int k = 0; k < d; k++) distance += (v[k] - mu[s * d + k]) * (v[k] - mu[s * d + k]);
                phi[(i - S) * S + s] = exp(-0.5 * 4 * distance);
            }
        }
        for (int i = 0; i < TOKENS; i++)
            for (int j = TOKENS; j < 2 * TOKENS; j++) {
                double z = 0;
                for (int s = 0; s < S; s++) z += alpha * phi[i * S + s] * phi[j * S + s];
                sum += z;
                squares += z * z;
            }
    }
    double deviation = sqrt(squares / count - sum / count * sum / count);
    CHECK(fabs(deviation - 1) < 0.1, "%d splats of size %d: logits at the start have deviation %g", S, d, deviation);
    free(mu);
    free(phi);
    free(x);
}

static void test_head_map(void) {
    static const struct {
        int attention;
        const char *text;
        bool good;
        uint64_t maps[3]; /* of three layers of six heads */
    } cases[] = {
        {ATTENTION_STANDARD, NULL, true, {0, 0, 0}},
        {ATTENTION_GSA, NULL, true, {63, 63, 63}},
        {ATTENTION_HYBRID, NULL, true, {56, 56, 56}},
        {ATTENTION_HYBRID, "0", true, {0, 0, 0}},
        {ATTENTION_HYBRID, "1", true, {32, 32, 32}},
        {ATTENTION_HYBRID, "6", true, {63, 63, 63}},
        {ATTENTION_HYBRID, "0:3", true, {8, 0, 0}},
        {ATTENTION_HYBRID, "0:3,2:1-4", true, {8, 0, 30}},
        {ATTENTION_HYBRID, "2:0-5,2:0,1:5-5", true, {0, 32, 63}},
        {ATTENTION_STANDARD, "2", false, {0}},
        {ATTENTION_GSA, "2", false, {0}},
        {ATTENTION_GSA, "0:1", false, {0}},
        {ATTENTION_HYBRID, "7", false, {0}},
        {ATTENTION_HYBRID, "-1", false, {0}},
        {ATTENTION_HYBRID, "99999999999999999999", false, {0}},
        {ATTENTION_HYBRID, "", false, {0}},
        {ATTENTION_HYBRID, "x", false, {0}},
        {ATTENTION_HYBRID, "2x", false, {0}},
        {ATTENTION_HYBRID, "0:", false, {0}},
        {ATTENTION_HYBRID, ":1", false, {0}},
        {ATTENTION_HYBRID, "0:6", false, {0}},
        {ATTENTION_HYBRID, "3:0", false, {0}},
        {ATTENTION_HYBRID, "-1:0", false, {0}},
        {ATTENTION_HYBRID, "0:-1", false, {0}},
        {ATTENTION_HYBRID, "0:4-3", false, {0}},
        {ATTENTION_HYBRID, "0:4-", false, {0}},
        {ATTENTION_HYBRID, "0:4-6", false, {0}},
        {ATTENTION_HYBRID, "0:1-2-3", false, {0}},
        {ATTENTION_HYBRID, "0:1,", false, {0}},
        {ATTENTION_HYBRID, "0:1;1:1", false, {0}},
        {ATTENTION_HYBRID, "0:1,2", false, {0}},
        {ATTENTION_HYBRID, "4294967296:0", false, {0}},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        Config c;
        memset(&c, 0, sizeof c);
        c.L = 3;
        c.NH = 6;
        c.C = 24;
        c.attention = cases[i].attention;
        const char *problem = config_head_map(&c, cases[i].text), *text = cases[i].text ? cases[i].text : "(none)";
        CHECK(!problem == cases[i].good, "--attention %d --gsa-heads '%s' %s: %s", cases[i].attention, text,
              cases[i].good ? "fits" : "is refused", problem ? problem : "fits");
        if (!problem && cases[i].good)
            for (int l = 0; l < 3; l++)
                CHECK(c.gsa_heads[l] == cases[i].maps[l], "--gsa-heads '%s', layer %d: %llx", text, l,
                      (unsigned long long)c.gsa_heads[l]);
        if (problem) CHECK(strstr(problem, "--gsa-heads") != NULL, "'%s' names its flag", problem);
    }
}

/* 64 heads: the whole word. */
static void test_head_map_full(void) {
    Config c;
    memset(&c, 0, sizeof c);
    c.L = 64;
    c.NH = 64;
    c.C = 128;
    c.attention = ATTENTION_HYBRID;
    CHECK(!config_head_map(&c, "0") && c.gsa_heads[0] == 0 && config_gsa_heads(&c) == 0, "none of 64 heads");
    CHECK(!config_head_map(&c, "64") && c.gsa_heads[63] == ~0ull && config_gsa_heads(&c) == 4096, "all of 64 heads");
    CHECK(!config_head_map(&c, "1:0,1:63,2:0-63") && c.gsa_heads[1] == (1ull << 63 | 1) && c.gsa_heads[2] == ~0ull,
          "first and last of 64 heads");
    CHECK(config_gsa_before(&c, 1, 0) == 0 && config_gsa_before(&c, 1, 1) == 1 && config_gsa_before(&c, 1, 63) == 1 &&
              config_gsa_before(&c, 2, 0) == 2 && config_gsa_before(&c, 2, 10) == 12,
          "the index of a head's splats");
}

static void test_choices(void) {
    CHECK(choice_index(ATTENTION_CHOICES, "hybrid") == ATTENTION_HYBRID &&
              choice_index(ATTENTION_CHOICES, "standard") == 0,
          "choices by name");
    static const char *const none[] = {"", "gs", "gsax", "Gsa", "sa", "standard|gsa", "|"};
    for (size_t i = 0; i < sizeof none / sizeof *none; i++)
        CHECK(choice_index(ATTENTION_CHOICES, none[i]) == -1, "'%s' is no choice", none[i]);
    char name[16];
    for (int i = 0; i <= POSITION_BOTH; i++) {
        choice_name(POSITION_CHOICES, i, name, sizeof name);
        CHECK(choice_index(POSITION_CHOICES, name) == i, "choice %d is %s", i, name);
    }
}

static void test_config_check(void) {
    const Config sound = small_config(ATTENTION_HYBRID, NULL, POSITION_BOTH, COVARIANCE_ISO, ENVELOPE_COSINE);
    CHECK(config_check(&sound) == NULL, "a sound configuration");
#define REFUSED(change, names)                                                                         \
    do {                                                                                               \
        Config c = sound;                                                                              \
        change;                                                                                        \
        const char *problem = config_check(&c);                                                        \
        CHECK(problem &&strstr(problem, names), "%s is refused: %s", #change, problem ? problem : ""); \
    } while (0)
    REFUSED(c.L = 0, "--layers");
    REFUSED(c.L = 65, "--layers");
    REFUSED(c.NH = 0, "--heads");
    REFUSED(c.NH = 65, "--heads");
    REFUSED(c.NH = -1, "--heads");
    REFUSED(c.C = 21, "--channels");
    REFUSED(c.C = 0, "--channels");
    REFUSED(c.C = -20, "--channels");
    REFUSED(c.C = 22, "even");
    REFUSED(c.T = 0, "--seq");
    REFUSED(c.T = -70, "--seq");
    REFUSED(c.T = 1 << 25, "--seq");
    REFUSED(c.V = 1, "vocabulary");
    REFUSED(c.Vp = 12, "vocabulary");
    REFUSED(c.Vp = 1 << 21, "vocabulary");
    REFUSED(c.position = 3, "position");
    REFUSED(c.position = -1, "position");
    REFUSED(c.attention = 3, "attention");
    REFUSED(c.envelope = 2, "envelope");
    REFUSED(c.covariance = -1, "covariance");
    REFUSED(c.S = 0, "--splats");
    REFUSED(c.S = -3, "--splats");
    REFUSED(c.S = 6, "--splats"); /* heads of size 10 hold 5 with an envelope */
    REFUSED((c.envelope = ENVELOPE_NONE, c.phase = PHASE_NONE, c.S = 11), "--splats");
    REFUSED(c.envelope = ENVELOPE_NONE, "--phase");
    REFUSED((c.mixer = MIXER_LINEAR, c.envelope = ENVELOPE_DECAY), "--phase");
    REFUSED(c.phase = 2, "phase");
    REFUSED(c.phase = -1, "phase");
    REFUSED(c.gsa_heads[0] = 4, "head");
    REFUSED(c.gsa_heads[2] = 1, "head");
#undef REFUSED
    Config c = sound;
    c.S = 5;
    CHECK(config_check(&c) == NULL, "half the head size in splats");
    c.S = 10;
    c.envelope = ENVELOPE_NONE;
    c.phase = PHASE_NONE;
    CHECK(config_check(&c) == NULL, "the head size in splats without an envelope");
    c.S = 0;
    c.attention = ATTENTION_STANDARD;
    config_head_map(&c, NULL);
    CHECK(config_check(&c) == NULL, "no splats in a model without GSA heads");
}

/* ---------------------------------------------------------------------- training */

/* All parts together learn: one batch by heart. */
static void test_overfit(int attention, int position, int covariance, int envelope) {
    Config c = small_config(attention, NULL, position, covariance, envelope);
    c.T = 16;
    c.C = 32;
    c.NH = 4;
    c.S = 4;
    c.V = 27;
    c.Vp = 32;
    config_head_map(&c, NULL);
    enum { B = 4, STEPS = 60 };
    int x[B * 16], y[B * 16];
    uint64_t rng = 16;
    random_tokens(x, B * 16, c.V, &rng);
    random_tokens(y, B * 16, c.V, &rng);
    GSA *m = gsa_create(&c, B);
    model_start(&c, m->params, 17);
    double first = 0, norms[NUM_CLIPS];
    for (int step = 1; step <= STEPS; step++) {
        double loss = gsa_forward(m, x, y, B, 16);
        if (step == 1) first = loss;
        gsa_zero_gradients(m);
        gsa_backward(m, 1);
        gsa_gradient_norms(m, norms);
        Update u = {.rate = {1e-2, 0.1}, .beta1 = 0.9, .beta2 = 0.95, .weight_decay = 0.1, .step = step};
        for (int i = 0; i < NUM_CLIPS; i++) u.scale[i] = norms[i] > 1 ? 1 / norms[i] : 1;
        gsa_update(m, &u, clamped);
    }
    double last = gsa_forward(m, x, y, B, 16);
    CHECK(fabs(first - log(27)) < 0.1, "attention %d: the first loss %g is about ln V = %g", attention, first, log(27));
    CHECK(last < 0.1, "attention %d, positions %d: %d steps on one batch bring the loss to %g", attention, position,
          STEPS, last);
    CHECK(deviation_of(m->p.wte + 27 * 32, 5 * 32) == 0, "the padding of the vocabulary is still 0");
    gsa_destroy(m);
}

int main(void) {
#ifdef _OPENMP
    /* thousands of tiny products: waiting for threads would take longer than they save; test_threads has more */
    omp_set_num_threads(1);
#endif
    test_exp();
    test_products();
    test_bf16();
    test_simple_layers();
    test_classifier();
    const size_t lengths[] = {1, 2, 63, 64, 65, 70, 130};
    for (size_t i = 0; i < sizeof lengths / sizeof *lengths; i++) test_attention(lengths[i], 1);
    test_attention(70, 30); /* logits up to thousands */
    test_heads();
    test_phase(MIXER_SOFTMAX);
    test_phase(MIXER_LINEAR);
    test_model(ATTENTION_STANDARD, NULL, POSITION_LEARNED, COVARIANCE_ISO, ENVELOPE_NONE);
    test_model(ATTENTION_GSA, NULL, POSITION_ROPE, COVARIANCE_ISO, ENVELOPE_NONE);
    test_model(ATTENTION_HYBRID, NULL, POSITION_ROPE, COVARIANCE_ISO, ENVELOPE_COSINE);
    test_model(ATTENTION_HYBRID, "0:1,1:0", POSITION_BOTH, COVARIANCE_DIAG, ENVELOPE_COSINE);
    for (int attention = 0; attention <= ATTENTION_HYBRID; attention++)
        test_causality(attention, attention, attention != ATTENTION_GSA);
    test_shift();
    test_threads();
    test_orthogonal();
    test_update(ATTENTION_HYBRID, false);
    test_update(ATTENTION_HYBRID, true);
    test_update(ATTENTION_AUGMENT, true); /* here W_o is not square */
    for (int kind = 0; kind < 4; kind++) test_bounds(kind & 1, kind >> 1);
    test_unbounded();
    test_start();
    test_amplitude(32, 64);
    test_amplitude(16, 64);
    test_amplitude(64, 64);
    test_amplitude(16, 32);
    test_amplitude(8, 16);
    test_amplitude(1, 8);
    test_head_map();
    test_head_map_full();
    test_choices();
    test_config_check();
    test_overfit(ATTENTION_HYBRID, POSITION_ROPE, COVARIANCE_DIAG, ENVELOPE_COSINE);
    test_overfit(ATTENTION_STANDARD, POSITION_LEARNED, COVARIANCE_ISO, ENVELOPE_NONE);
    test_overfit(ATTENTION_GSA, POSITION_BOTH, COVARIANCE_ISO, ENVELOPE_COSINE);
    return test_summary(__BASE_FILE__);
}
