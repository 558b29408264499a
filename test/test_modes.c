/* The linear mixer, windows, extended heads and encoders in fp32, as they run, against sums over all pairs of tokens
   in double, written here from the model's equations; then what holds exactly for every mode. */
#include "network.h"

#include "../gsa/run/starts.h"

#include <unistd.h>

/* ---------------------------------------------------------------------- one head, two ways */

/* What a head is computed from; x in double for the formula, r the same numbers for the code. */
enum { QKV, MU, LOG_PRECISION, LOG_ALPHA, LOG_THETA, LOG_DELTA, PSI, LOG_FAR, NUM_INPUTS };
static const char *const input_names[] = {"qkv",       "mu",        "log_precision", "log_alpha",
                                          "log_theta", "log_delta", "psi",           "log_far"};

typedef struct {
    size_t T, HS, S, P, W;  /* W: the window of the near part; 0: the head has none */
    bool far, causal, rope; /* far: the head has splats; rope: of the near part's q and k */
    double gain;            /* of the near part's logits */
    const real *log_rope;   /* (HS/2): of its rotations; NULL: the fixed ones */
    const double *forget;   /* (T): sums of ln f; NULL: no gate */
    int covariance, envelope;
    size_t n[NUM_INPUTS];
    double *x[NUM_INPUTS];
    real *r[NUM_INPUTS], *g[NUM_INPUTS]; /* g: gradients */
    real *alive, *out, *dout, *lse, *rho;
    double *expected, *expected_lse;
} Head;

static void take_numbers(Head *h) { /* the formula's inputs are the code's */
    for (int i = 0; i < NUM_INPUTS; i++)
        for (size_t k = 0; k < h->n[i]; k++) h->x[i][k] = (double)h->r[i][k];
}

static Head make_head(size_t T, size_t HS, size_t S, int covariance, int envelope, size_t W, bool far, bool causal,
                      uint64_t seed) {
    uint64_t rng = seed;
    Head h = {.T = T,
              .HS = HS,
              .S = S,
              .W = W,
              .far = far,
              .causal = causal,
              .rope = true,
              .gain = 1,
              .covariance = covariance,
              .envelope = envelope};
    h.P = covariance == COVARIANCE_ISO ? 1 : covariance == COVARIANCE_DIAG ? HS : HS * (HS + 1) / 2;
    const size_t waves = envelope == ENVELOPE_RAISED ? S : 0,
                 n[] = {T * 3 * HS, S * HS,          S * h.P, S, waves, envelope == ENVELOPE_NONE ? 0 : S,
                        waves,      W && far ? 1 : 0};
    const double deviation[] = {1, 1 / sqrt((double)HS), covariance == COVARIANCE_FULL ? 0.2 : 0.5, 0.5, 0, 0, 0, 0};
    for (int i = 0; i < NUM_INPUTS; i++) {
        h.n[i] = n[i];
        h.r[i] = numbers(n[i], deviation[i], &rng);
        h.g[i] = numbers(n[i], 0, NULL);
        h.x[i] = (double *)numbers(2 * n[i] + 1, 0, NULL);
    }
    for (size_t s = 0; s < S; s++) {
        double along = S > 1 ? (double)s / (double)(S - 1) : 0;
        for (size_t i = 0; i < (covariance == COVARIANCE_FULL ? HS : h.P); i++) /* precision about 4 */
            h.r[LOG_PRECISION][s * h.P + (covariance == COVARIANCE_FULL ? i * (i + 3) / 2 : i)] +=
                covariance == COVARIANCE_FULL ? (real)log(2) : (real)log(4);
        /* from one end of what is allowed to the other */
        if (n[LOG_THETA]) h.r[LOG_THETA][s] = (real)(log(SPLAT_FREQUENCY_MAX) * (1 - along) + log(1e-3) * along);
        if (n[LOG_DELTA])
            h.r[LOG_DELTA][s] = (real)(s == 1 ? log(1e-6) : log(SPLAT_DECAY_MAX) * (1 - along) + log(5e-4) * along);
    }
    for (size_t s = 0; s < n[PSI]; s++) h.r[PSI][s] = (real)(s == 2 ? SPLAT_PHASE_MAX : cos((double)(5 * s)));
    if (n[LOG_FAR]) h.r[LOG_FAR][0] = 0.7f;
    h.alive = numbers(S, 0, NULL);
    for (size_t s = 0; s < S; s++) h.alive[s] = 1;
    h.out = numbers(T * HS, 0, NULL);
    h.dout = numbers(T * HS, 1, &rng);
    h.lse = numbers(T, 0, NULL);
    h.rho = numbers(T, 0, NULL);
    h.expected = (double *)numbers(2 * T * HS, 0, NULL);
    h.expected_lse = (double *)numbers(2 * T, 0, NULL);
    take_numbers(&h);
    return h;
}

/* The inverse covariance of splat s, (HS, HS). */
static void formula_precision(const Head *h, size_t s, double *precision) {
    size_t d = h->HS;
    const double *p = h->x[LOG_PRECISION] + s * h->P;
    for (size_t i = 0; i < d; i++)
        for (size_t j = 0; j < d; j++) {
            double sum = 0;
            if (h->covariance != COVARIANCE_FULL) sum = i == j ? exp(p[h->covariance == COVARIANCE_DIAG ? i : 0]) : 0;
            else
                for (size_t k = 0; k <= (i < j ? i : j); k++) { /* L L^T */
                    double a = p[i * (i + 1) / 2 + k], b = p[j * (j + 1) / 2 + k];
                    sum += (i == k ? exp(a) : a) * (j == k ? exp(b) : b);
                }
            precision[i * d + j] = sum;
        }
}

static double quadratic(const double *matrix, const double *x, size_t d) {
    double sum = 0;
    for (size_t i = 0; i < d; i++)
        for (size_t j = 0; j < d; j++) sum += matrix[i * d + j] != 0 ? x[i] * matrix[i * d + j] * x[j] : 0;
    return sum;
}

/* out (T, HS) of the head by equations (1), (2), (8), (11) and then (5), (4) within a window, or (12). */
static void formula(const Head *h, double *out, double *lse) {
    size_t T = h->T, d = h->HS, S = h->S;
    double *unit = (double *)xmalloc((2 * T * d + 4 * T * S + d * d + 2 * d + 3 * T) * sizeof(double)),
           *q_phi = unit + 2 * T * d, *k_phi = q_phi + T * S, *e = k_phi + T * S, *precision = e + 2 * T * S;
    double *apart = precision + d * d, *z = apart + 2 * d, *w = z + T, *constant = w + T, typical = -INFINITY;
    for (size_t i = 0; i < 2 * T; i++) { /* queries, then keys */
        const double *x = h->x[QKV] + (i % T) * 3 * d + i / T * d;
        double square = 1e-6;
        for (size_t k = 0; k < d; k++) square += x[k] * x[k];
        for (size_t k = 0; k < d; k++) unit[i * d + k] = x[k] / sqrt(square);
    }
    for (size_t s = 0; s < S && h->far; s++) {
        const double *mu = h->x[MU] + s * d;
        double trace = 0;
        formula_precision(h, s, precision);
        for (size_t k = 0; k < d; k++) trace += precision[k * d + k];
        typical = max_of(typical, -0.5 * (trace / (double)d + quadratic(precision, mu, d)));
        for (size_t i = 0; i < 2 * T; i++) {
            for (size_t k = 0; k < d; k++) apart[k] = unit[i * d + k] - mu[k];
            (i < T ? q_phi : k_phi)[i % T * S + s] = -0.5 * quadratic(precision, apart, d);
        }
        for (size_t n = 0; n < 2 * T; n++) { /* distances to keys before the query, then to those after it */
            double distance = n < T ? (double)n : -(double)(n - T);
            e[n * S + s] = h->n[LOG_DELTA] ? exp(-exp(h->x[LOG_DELTA][s]) * fabs(distance)) : 1;
            if (h->n[LOG_THETA])
                e[n * S + s] *= (1 + cos(exp(h->x[LOG_THETA][s]) * distance - (h->n[PSI] ? h->x[PSI][s] : 0))) / 2;
        }
    }
    for (size_t i = 0; i < T && h->far; i++) { /* responsibilities */
        double sum = 0, most = -INFINITY, *r = q_phi + i * S;
        for (size_t s = 0; s < S; s++) most = max_of(most, r[s] += h->x[LOG_ALPHA][s]);
        for (size_t s = 0; s < S; s++) sum += r[s] = exp(r[s] - most);
        for (size_t s = 0; s < S; s++) r[s] /= sum;
    }
    for (size_t i = 0; i < T * S && h->far; i++) k_phi[i] = exp(k_phi[i]);
    for (size_t i = 0; i < T; i++) {
        double most = -INFINITY, sum = 0;
        size_t end = h->causal ? i + 1 : T;
        for (size_t j = 0; j < end; j++) {
            size_t n = i > j ? i - j : j - i;
            constant[j] = -INFINITY; /* what a raised cosine's constant half makes of the weight */
            if (h->W && n < h->W) {
                const double *a = h->rope ? unit + i * d : h->x[QKV] + i * 3 * d,
                             *b = h->rope ? unit + (T + j) * d : h->x[QKV] + j * 3 * d + d;
                double dot = 0;
                /* rotating both by their positions is rotating one by the distance */
                for (size_t k = 0; k < d / 2; k++) {
                    double theta = h->log_rope ? exp((double)h->log_rope[k]) : pow(10000, -2.0 * (double)k / (double)d);
                    double angle = h->rope ? theta * ((double)i - (double)j) : 0, c = cos(angle), sine = sin(angle);
                    dot += c * (a[k] * b[k] + a[d / 2 + k] * b[d / 2 + k]) -
                           sine * (a[d / 2 + k] * b[k] - a[k] * b[d / 2 + k]);
                }
                z[j] = h->gain * (h->rope ? (double)d : 1) * dot / sqrt((double)d);
                if (h->forget) z[j] += h->forget[i] - h->forget[j];
            } else if (h->far) {
                double weight = 0;
                double half = 0;
                for (size_t s = 0; s < S; s++) {
                    weight += q_phi[i * S + s] * k_phi[j * S + s] * e[((i < j ? T : 0) + n) * S + s];
                    half += q_phi[i * S + s] * k_phi[j * S + s] *
                            (h->n[LOG_DELTA] ? exp(-exp(h->x[LOG_DELTA][s]) * (double)n) : 1) *
                            (h->n[LOG_THETA] ? 0.5 : 1);
                }
                z[j] = h->W ? h->x[LOG_FAR][0] + log(weight) : log(weight);
                constant[j] = h->W ? h->x[LOG_FAR][0] + log(half) : log(half);
            } else z[j] = -INFINITY;
            most = max_of(most, z[j]);
        }
        if (!h->W) most = typical; /* equation (5) has its epsilon in units of the typical response */
        for (size_t j = 0; j < end; j++) sum += w[j] = exp(z[j] - most);
        for (size_t j = 0; j < end; j++) sum += 1e-6 * exp(constant[j] - most);
        lse[i] = most + log(sum);
        if (!h->W) sum += 1e-6;
        for (size_t k = 0; k < d; k++) {
            out[i * d + k] = 0;
            for (size_t j = 0; j < end; j++) out[i * d + k] += w[j] / sum * h->x[QKV][j * 3 * d + 2 * d + k];
        }
    }
    free(unit);
}

static Splats splats_of(const Head *h) {
    return (Splats){.mu = h->r[MU],
                    .log_precision = h->r[LOG_PRECISION],
                    .log_alpha = h->r[LOG_ALPHA],
                    .log_theta = h->n[LOG_THETA] ? h->r[LOG_THETA] : NULL,
                    .log_delta = h->n[LOG_DELTA] ? h->r[LOG_DELTA] : NULL,
                    .psi = h->n[PSI] ? h->r[PSI] : NULL,
                    .log_far = h->n[LOG_FAR] ? h->r[LOG_FAR] : NULL,
                    .alive = h->alive,
                    .S = h->S,
                    .P = h->P};
}

/* What the model does for such a head: forward, and backward where asked. */
static void run_head(Head *h, size_t chunk, bool backward) {
    size_t T = h->T, d = h->HS, n = T * d, record = moments_size(h->S, h->P, d);
    Splats w = splats_of(h);
    real *f = (real *)xcalloc(5 * n + record, sizeof(real)), *fq = f, *fk = fq + n, *dfq = fk + n, *dfk = dfq + n,
         *waves = dfk + n, *moments = waves + n;
    real *q = h->r[QKV], *dq = h->g[QKV], scale = 1 / (real)sqrt((double)d);
    bool merged = h->W && h->far;
    rope_table(waves, h->log_rope, T, d, 0);
    for (size_t t = 0; t < T && h->W && !h->rope; t++) {
        memcpy(fq + t * d, q + t * 3 * d, d * sizeof(real));
        memcpy(fk + t * d, q + t * 3 * d + d, d * sizeof(real));
    }
    if (h->W && h->rope) {
        rope_forward(fq, q, 3 * d, waves, T, d);
        rope_forward(fk, q + d, 3 * d, waves, T, d);
    }
    if (h->W) attention_forward(h->out, h->lse, fq, fk, q, &scale, &h->W, NULL, h->causal, 1, T, 1, d);
    if (h->far)
        scan_head_forward(h->out, d, merged ? h->lse : NULL, h->rho, q, q + d, q + 2 * d, 3 * d, &w, h->W, h->causal,
                          chunk, T, d);
    if (backward) {
        for (int i = 0; i < NUM_INPUTS; i++) memset(h->g[i], 0, h->n[i] * sizeof(real));
        if (h->W)
            attention_backward(dfq, dfk, dq, h->dout, h->out, h->lse, fq, fk, q, &scale, &h->W, NULL, h->causal, 1, T,
                               1, d);
        for (size_t t = 0; t < T && h->W && !h->rope; t++) {
            memcpy(dq + t * 3 * d, dfq + t * d, d * sizeof(real));
            memcpy(dq + t * 3 * d + d, dfk + t * d, d * sizeof(real));
        }
        if (h->W && h->rope) {
            rope_backward(dq, dfq, q, 3 * d, waves, T, d);
            rope_backward(dq + d, dfk, q + d, 3 * d, waves, T, d);
        }
        if (h->far) {
            SplatGradients g = {.mu = h->g[MU],
                                .log_precision = h->g[LOG_PRECISION],
                                .log_alpha = h->g[LOG_ALPHA],
                                .log_theta = h->n[LOG_THETA] ? h->g[LOG_THETA] : NULL,
                                .log_delta = h->n[LOG_DELTA] ? h->g[LOG_DELTA] : NULL,
                                .psi = h->n[PSI] ? h->g[PSI] : NULL,
                                .log_far = h->n[LOG_FAR] ? h->g[LOG_FAR] : NULL};
            scan_head_backward(dq, dq + d, dq + 2 * d, moments, h->dout, h->out, d, h->rho, q, q + d, q + 2 * d, 3 * d,
                               &w, h->W, h->causal, merged, chunk, T, d);
            splat_gradients(&g, moments, 0, 1, &w, d);
        }
    }
    free(f);
}

static const char *head_name(const Head *h) { /* static memory */
    static char text[160];
    char covariance[16], envelope[16];
    choice_name(COVARIANCE_CHOICES, h->covariance, covariance, sizeof covariance);
    choice_name(ENVELOPE_CHOICES, h->envelope, envelope, sizeof envelope);
    snprintf(text, sizeof text, "T %zu, size %zu, %zu splats, %s, envelope %s, window %zu%s%s", h->T, h->HS,
             h->far ? h->S : 0, covariance, envelope, h->W, h->causal ? "" : ", both sides",
             h->W && !h->rope ? ", no rope" : "");
    return text;
}

/* ---------------------------------------------------------------------- outputs and gradients by the formula */

static void check_forward(Head *h, double tolerance) {
    formula(h, h->expected, h->expected_lse);
    for (size_t chunk = 16; chunk <= 128; chunk += chunk == 16 ? 48 : 64) {
        run_head(h, chunk, false);
        double error = error_of(h->out, h->expected, h->T * h->HS);
        CHECK(error <= tolerance, "%s, chunk %zu: output off by %g", head_name(h), chunk, error);
        if (h->W) {
            double worst = 0;
            for (size_t t = 0; t < h->T; t++)
                worst = max_of(worst, fabs((double)h->lse[t] - h->expected_lse[t]) / (1 + fabs(h->expected_lse[t])));
            CHECK(worst < 1e-5, "%s, chunk %zu: log-sum-exp off by %g", head_name(h), chunk, worst);
        }
    }
}

static void test_forward(size_t T, size_t HS, size_t S, int covariance, int envelope, size_t W, bool far, bool causal) {
    Head h = make_head(T, HS, S, covariance, envelope, W, far, causal, 1);
    check_forward(&h, 1e-5);
    if (W && T < 300) {
        h.rope = false;
        check_forward(&h, 1e-5);
    }
    free_numbers();
}

/* Backward with other chunk sizes: the same up to rounding. */
static void test_chunks(size_t T, int covariance, int envelope, size_t W, bool causal) {
    Head h = make_head(T, 16, 6, covariance, envelope, W, true, causal, 2);
    real *first[NUM_INPUTS];
    run_head(&h, 64, true);
    for (int i = 0; i < NUM_INPUTS; i++) {
        first[i] = numbers(h.n[i], 0, NULL);
        memcpy(first[i], h.g[i], h.n[i] * sizeof(real));
    }
    for (size_t chunk = 16; chunk <= 128; chunk += 112) {
        run_head(&h, chunk, true);
        for (int i = 0; i < NUM_INPUTS; i++) {
            double error = h.n[i] ? relative_error(h.g[i], first[i], h.n[i]) : 0;
            CHECK(error <= (i == LOG_THETA || i == LOG_DELTA ? 1e-3
                            : i == QKV                       ? 5e-5
                                                             : 1e-4),
                  "%s: gradients of %s with chunks of %zu and of 64 differ by %g", head_name(&h), input_names[i], chunk,
                  error);
        }
    }
    free_numbers();
}

/* The gradient along a direction against the formula's difference quotient. `only`: a direction of one token, else
   of all. */
static void check_direction(Head *h, int input, int part, size_t only, double tolerance, uint64_t *rng) {
    size_t n = h->n[input], d = h->HS;
    double *direction = (double *)xcalloc(n, sizeof *direction),
           *shifted = (double *)xmalloc(2 * h->T * d * sizeof *shifted), value[2], length = 0, size = 0, along = 0;
    for (size_t k = 0; k < n; k++)
        if (input != QKV || (k / d % 3 == (size_t)part && (only == SIZE_MAX || k / (3 * d) == only)))
            direction[k] = rng_normal(rng);
    for (size_t k = 0; k < n; k++) {
        length += direction[k] * direction[k];
        if (direction[k] != 0) size += (double)h->g[input][k] * (double)h->g[input][k];
        along += direction[k] * (double)h->g[input][k];
    }
    const double step = 1e-5;
    for (int side = 0; side < 2; side++) {
        for (size_t k = 0; k < n; k++) h->x[input][k] = (double)h->r[input][k] + (side ? 1 : -1) * step * direction[k];
        formula(h, shifted, shifted + h->T * d);
        value[side] = 0;
        for (size_t k = 0; k < h->T * d; k++) value[side] += shifted[k] * (double)h->dout[k];
    }
    for (size_t k = 0; k < n; k++) h->x[input][k] = (double)h->r[input][k];
    double difference = (value[1] - value[0]) / (2 * step), scale = sqrt(length * size) / sqrt(n > 1 ? 4.0 : 1.0);
    static const char *const parts[] = {"q", "k", "v"};
    CHECK(fabs(along - difference) <= tolerance * scale && scale > 0,
          "%s: gradient of %s along a direction%s is %g, by differences %g", head_name(h),
          input == QKV ? parts[part] : input_names[input], only == SIZE_MAX ? "" : " of one token", along, difference);
    free(direction);
    free(shifted);
}

static void test_gradients(size_t T, size_t HS, size_t S, int covariance, int envelope, size_t W, bool far,
                           bool causal) {
    Head h = make_head(T, HS, S, covariance, envelope, W, far, causal, 3);
    uint64_t rng = 4;
    run_head(&h, 64, true);
    for (int part = 0; part < 3; part++)
        for (int which = 0; which < 4; which++) /* the first token, one at a chunk's end, the last, all */
            if (which != 0 || part == 2)
                check_direction(&h, QKV, part,
                                which == 0                ? 0
                                : which == 1              ? T / 2
                                : which == 2 && part == 0 ? T - 1
                                                          : SIZE_MAX,
                                2e-4, &rng);
    for (int i = MU; i < NUM_INPUTS && far; i++)
        if (h.n[i]) check_direction(&h, i, 0, SIZE_MAX, i == LOG_THETA || i == LOG_DELTA ? 1e-3 : 2e-4, &rng);
    free_numbers();
}

/* ---------------------------------------------------------------------- the scan alone */

/* Going on from a saved state gives what one pass gives, wherever the cut is; late: a key is met that many queries
   later. */
static void test_continued(size_t T, int envelope, size_t late) {
    Head h = make_head(T, 12, 5, COVARIANCE_ISO, envelope, 0, true, true, 5);
    uint64_t rng = 6;
    size_t d = h.HS, S = h.S, size = 3 * S * (d + 1), skip = late < T ? late : T;
    real *r = numbers(T * S, 1, &rng), *phi = numbers(T * S, 1, &rng), *v = numbers(T * d, 1, &rng);
    real *N = numbers(T * d, 0, NULL), *D = numbers(T, 0, NULL), *state = numbers(size, 0, NULL),
         *last = numbers(size, 0, NULL), *N2 = numbers(T * d, 0, NULL), *D2 = numbers(T, 0, NULL);
    double *exact = (double *)numbers(2 * T * (d + 1), 0, NULL);
    for (size_t i = 0; i < T * S; i++) {
        r[i] = fabsf(r[i]);
        phi[i] = fabsf(phi[i]);
    }
    for (size_t i = 0; i < T; i++)
        for (size_t j = 0; j + late <= i; j++) {
            double weight = 0;
            for (size_t s = 0; s < S; s++) {
                double e = h.n[LOG_DELTA] ? exp(-exp(h.x[LOG_DELTA][s]) * (double)(i - j)) : 1;
                if (h.n[LOG_THETA]) e *= (1 + cos(exp(h.x[LOG_THETA][s]) * (double)(i - j) - h.x[PSI][s])) / 2;
                weight += (double)r[i * S + s] * (double)phi[j * S + s] * e;
            }
            for (size_t k = 0; k < d; k++) exact[i * d + k] += weight * (double)v[j * d + k];
            exact[T * d + i] += weight;
        }
    Splats w = splats_of(&h);
    Scan c = scan_open(&w, late, 64);
    scan_forward(&c, N, D, r, phi, v, d, skip, false, last, NULL, T, d);
    if (late < T)
        CHECK(error_of(N, exact, T * d) < 5e-6 && error_of(D, exact + T * d, T) < 5e-6,
              "scan, T %zu, envelope %d, late %zu: sums off by %g, %g", T, envelope, late, error_of(N, exact, T * d),
              error_of(D, exact + T * d, T));
    const size_t cuts[] = {1, 17, 63, 64, 65, 100, 128, 199, T - 1};
    for (size_t i = 0; i < sizeof cuts / sizeof *cuts; i++) {
        size_t cut = cuts[i], keys = cut > late ? cut - late : 0;
        if (cut >= T) continue;
        memset(N2, 0, T * d * sizeof(real));
        memset(D2, 0, T * sizeof(real));
        memset(state, 0, size * sizeof(real));
        scan_forward(&c, N2, D2, r, phi, v, d, late < cut ? late : cut, false, state, NULL, cut, d);
        /* the second part's first queries meet keys of the first part, still on their way; while there are none,
           they are skipped */
        size_t none = late > cut ? late - cut : 0;
        scan_forward(&c, N2 + cut * d, D2 + cut, r + cut * S, phi + keys * S, v + keys * d, d,
                     none < T - cut ? none : T - cut, false, state, NULL, T - cut, d);
        double off = late < T ? max_of(relative_error(N2, N, T * d), relative_error(D2, D, T)) : 0,
               off_state = late < T ? relative_error(state, last, c.F * (d + 1)) : 0;
        CHECK(off < 2e-6 && off_state < 2e-6,
              "scan, T %zu, envelope %d, late %zu: cut at %zu: sums differ by %g, the last state by %g", T, envelope,
              late, cut, off, off_state);
    }
    scan_close(&c);
    free_numbers();
}

/* ---------------------------------------------------------------------- exact properties of one head */

static void test_running_mean(void) {
    enum { T = 150, HS = 8 };
    Head h = make_head(T, HS, 1, COVARIANCE_ISO, ENVELOPE_NONE, 0, true, true, 7);
    for (int equal = 0; equal < 2; equal++) {
        double sum[HS] = {0}, mass = 0, worst = 0;
        for (size_t t = 1; t < T && equal; t++) memcpy(h.r[QKV] + t * 3 * HS + HS, h.r[QKV] + HS, HS * sizeof(real));
        run_head(&h, 64, true);
        for (size_t t = 0; t < T; t++) {
            const real *k = h.r[QKV] + t * 3 * HS + HS;
            double square = 1e-6, far = 0;
            for (size_t e = 0; e < HS; e++) square += (double)k[e] * (double)k[e];
            for (size_t e = 0; e < HS; e++) far += pow((double)k[e] / sqrt(square) - (double)h.r[MU][e], 2);
            double phi = equal ? 1 : exp(-0.5 * exp((double)h.r[LOG_PRECISION][0]) * far);
            mass += phi;
            for (size_t e = 0; e < HS; e++) {
                sum[e] += phi * (double)k[HS + e];
                worst = max_of(worst, fabs((double)h.out[t * HS + e] - sum[e] / mass));
            }
        }
        CHECK(worst < 1e-5, "one splat, no envelope: the output is the %s mean of v: %g",
              equal ? "plain" : "phi-weighted", worst);
        double queries = 0, keys = 0;
        for (size_t i = 0; i < T * 3 * HS; i++) {
            if (i / HS % 3 == 0) queries = max_of(queries, fabs((double)h.g[QKV][i]));
            if (i / HS % 3 == 1) keys = max_of(keys, fabs((double)h.g[QKV][i]));
        }
        CHECK(queries == 0 && keys > 1e-3, "one splat: queries make no difference: %g, keys do: %g", queries, keys);
    }
    free_numbers();
}

/* Any common factor of the query side cancels, so the gradients of all ln alpha add up to 0; constant v comes out
   unchanged and q, k do not matter. */
static void test_identities(int covariance, int envelope, size_t W, bool far, bool causal) {
    enum { T = 130, HS = 16, S = 5 };
    Head h = make_head(T, HS, S, covariance, envelope, W, far, causal, 8);
    double sum = 0, size = 0, off = 0, gradient = 0, usual = 0;
    run_head(&h, 64, true);
    for (size_t s = 0; s < S; s++) {
        sum += (double)h.g[LOG_ALPHA][s];
        size += fabs((double)h.g[LOG_ALPHA][s]);
    }
    if (far)
        CHECK(fabs(sum) < 1e-4 * size && size > 1e-3, "%s: d ln alpha add up to %g of %g", head_name(&h), sum, size);
    for (size_t i = 0; i < T * 3 * HS; i++) usual = max_of(usual, i / HS % 3 < 2 ? fabs((double)h.g[QKV][i]) : 0);
    for (size_t i = 0; i < T * 3 * HS; i++)
        if (i / HS % 3 == 2) h.r[QKV][i] = 1 + (real)(i % HS);
    run_head(&h, 64, true);
    for (size_t i = 0; i < T * HS; i++) off = max_of(off, fabs((double)h.out[i] / (1 + (double)(i % HS)) - 1));
    for (size_t i = 0; i < T * 3 * HS; i++) gradient = max_of(gradient, i / HS % 3 < 2 ? fabs((double)h.g[QKV][i]) : 0);
    CHECK(off < 1e-5, "%s: constant v comes out changed by %g", head_name(&h), off);
    CHECK(gradient < 1e-3 * usual, "%s: constant v: gradient of q and k %g, usually %g", head_name(&h), gradient,
          usual);
    free_numbers();
}

/* Narrow splats: typical responses are e^-40, far below the epsilon; the key scale keeps the output what the formula
   says. */
static void test_narrow(int covariance, int envelope) {
    enum { T = 150, HS = 64, S = 8 };
    Head h = make_head(T, HS, S, covariance, envelope, 0, true, true, 9);
    for (size_t i = 0; i < h.n[LOG_PRECISION]; i++)
        h.r[LOG_PRECISION][i] = covariance == COVARIANCE_FULL ? 0 : (real)log(SPLAT_PRECISION_MAX);
    for (size_t s = 0; s < S; s++) {
        double square = 0;
        for (size_t k = 0; k < HS; k++) square += (double)h.r[MU][s * HS + k] * (double)h.r[MU][s * HS + k];
        for (size_t k = 0; k < HS; k++) h.r[MU][s * HS + k] /= (real)sqrt(square);
        for (size_t i = 0; i < HS && covariance == COVARIANCE_FULL; i++)
            h.r[LOG_PRECISION][s * h.P + i * (i + 3) / 2] = (real)(0.5 * log(SPLAT_PRECISION_MAX));
    }
    take_numbers(&h);
    check_forward(&h, 1e-4);
    double size = 0;
    for (size_t i = 0; i < T * HS; i++) size += (double)h.out[i] * (double)h.out[i];
    CHECK(size > 0.01 * T * HS, "%s, precision 40: output of size %g", head_name(&h), sqrt(size / (T * HS)));
    run_head(&h, 64, true);
    for (int i = 0; i < NUM_INPUTS; i++)
        for (size_t k = 0; k < h.n[i]; k++)
            if (!isfinite(h.g[i][k])) {
                CHECK(0, "%s, precision 40: gradient of %s", head_name(&h), input_names[i]);
                k = h.n[i];
            }
    free_numbers();
}

/* All splats at the largest precision and frequency, keys and queries near the centres: cosines cancel, and what
   rounding leaves of a row sum must not lose its sign, or outputs are no averages. */
static void test_cancelling(bool causal) {
    enum { T = 600, HS = 16, S = 8 };
    Head h = make_head(T, HS, S, COVARIANCE_ISO, ENVELOPE_RAISED, 0, true, causal, 12);
    uint64_t rng = 13;
    double most = 0, largest_value = 0;
    for (size_t s = 0; s < S; s++) {
        h.r[LOG_PRECISION][s] = (real)log(SPLAT_PRECISION_MAX);
        h.r[LOG_THETA][s] = (real)log(SPLAT_FREQUENCY_MAX);
        double square = 0;
        for (size_t k = 0; k < HS; k++) square += (double)h.r[MU][s * HS + k] * (double)h.r[MU][s * HS + k];
        for (size_t k = 0; k < HS; k++) h.r[MU][s * HS + k] /= (real)sqrt(square);
    }
    for (size_t i = 0; i < 2 * T; i++) { /* queries near any splat; keys of even positions far from all */
        const real *mu = h.r[MU] + rng_below(&rng, S) * HS;
        for (size_t k = 0; k < HS; k++)
            h.r[QKV][i / 2 * 3 * HS + i % 2 * HS + k] = mu[k] * (i % 4 == 1 ? -1 : 1) + (real)(0.05 * rng_normal(&rng));
    }
    run_head(&h, 64, true);
    bool positive = true, finite = true;
    for (size_t t = 0; t < T; t++) positive &= h.rho[t] > 0;
    for (size_t i = 0; i < T * HS; i++) {
        most = max_of(most, fabs((double)h.out[i]));
        largest_value = max_of(largest_value, fabs((double)h.r[QKV][i / HS * 3 * HS + 2 * HS + i % HS]));
    }
    for (int i = 0; i < NUM_INPUTS; i++)
        for (size_t k = 0; k < h.n[i]; k++) finite &= isfinite(h.g[i][k]);
    CHECK(positive && finite && most < 2 * largest_value,
          "cosines that cancel, both sides %d: row sums %s, outputs up to %g of values up to %g", !causal,
          positive ? "positive" : "negative", most, largest_value);
    free_numbers();
}

/* Keys that hardly any splat responds to: row sums far below what is typical, where the epsilon takes over and the
   output fades out, as the formula with the typical response in it says. */
static void test_unreached(int covariance) {
    enum { T = 40, HS = 8 };
    Head h = make_head(T, HS, 2, covariance, ENVELOPE_NONE, 0, true, true, 14);
    double least = INFINITY, most = 0;
    memset(h.r[MU], 0, 2 * HS * sizeof(real));
    /* precisions of many sizes, largest along the first axis; the second splat is typically the weaker one */
    for (size_t s = 0; s < 2; s++) {
        for (size_t i = 0; i < (covariance == COVARIANCE_FULL ? HS : h.P); i++) {
            real *entry = h.r[LOG_PRECISION] + s * h.P + (covariance == COVARIANCE_FULL ? i * (i + 3) / 2 : i),
                 along = (real)log(SPLAT_PRECISION_MAX * (i ? 0.1 + 0.1 * (double)i : 1 - 0.1 * (double)s));
            *entry = covariance == COVARIANCE_FULL ? along / 2 : along;
        }
    }
    for (size_t i = 0; i < T * 3 * HS; i++)
        if (i / HS % 3 == 2) h.r[QKV][i] = 1;
    h.r[MU][0] = h.r[MU][HS] = 0.8f;
    h.r[MU][1] = 0.6f;
    h.r[MU][HS + 1] = -0.6f;
    for (size_t t = 0; t < T; t++) { /* from opposite to the centres until in their midst */
        double angle = M_PI * (1 - (double)t / T);
        memset(h.r[QKV] + t * 3 * HS + HS, 0, HS * sizeof(real));
        h.r[QKV][t * 3 * HS + HS] = (real)cos(angle);
        h.r[QKV][t * 3 * HS + HS + 2] = (real)sin(angle);
    }
    take_numbers(&h);
    check_forward(&h, 1e-4);
    for (size_t t = 0; t < T; t++) { /* each row by itself: the first are tiny beside the last */
        CHECK(error_of(h.out + t * HS, h.expected + t * HS, HS) < 1e-4,
              "%s, keys far from all splats: row %zu is off by %g", head_name(&h), t,
              error_of(h.out + t * HS, h.expected + t * HS, HS));
        least = fmin(least, fabs((double)h.out[t * HS]));
        most = max_of(most, fabs((double)h.out[t * HS]));
    }
    CHECK(least < 0.5 && most > 0.99, "%s, keys far from all splats: outputs from %g to %g", head_name(&h), least,
          most);
    free_numbers();
}

static void test_tiny_queries(size_t W) {
    enum { T = 70, HS = 16 };
    Head h = make_head(T, HS, 5, COVARIANCE_DIAG, ENVELOPE_RAISED, W, true, true, 10);
    for (size_t t = 0; t < T; t++)
        for (size_t k = 0; k < HS; k++) h.r[QKV][t * 3 * HS + k] *= t % 3 ? (real)1e-5 : 0;
    take_numbers(&h);
    check_forward(&h, 1e-5);
    run_head(&h, 64, true);
    for (size_t i = 0; i < h.n[QKV]; i++)
        if (!isfinite(h.g[QKV][i])) {
            CHECK(0, "%s, queries near zero: gradient", head_name(&h));
            i = h.n[QKV];
        }
    free_numbers();
}

/* The window ends where it should: with values that are 1 at one key and 0 elsewhere the output is that key's
   weight. */
static void test_window_edges(bool far, bool causal) {
    enum { T = 90, HS = 8, W = 11, I = 70 };
    for (int gain = -1; gain <= 1; gain += 2) {
        Head h = make_head(T, HS, 4, COVARIANCE_ISO, ENVELOPE_DECAY, W, far, causal, 11);
        if (far) h.r[LOG_FAR][0] = (real)(60 * gain); /* only what is near, or hardly anything of it */
        for (size_t key = I - W - 1; key <= I + W + 1; key++) {
            for (size_t i = 0; i < T * 3 * HS; i++)
                if (i / HS % 3 == 2) h.r[QKV][i] = i / (3 * HS) == key;
            run_head(&h, 64, false);
            double weight = (double)h.out[I * HS];
            bool near = key <= I ? I - key < W : !causal && key - I < W;
            if (key > I && causal) CHECK(weight == 0, "window, far %d: a later key weighs %g", far, weight);
            else if (!far)
                CHECK(near ? weight > 1e-6 : weight == 0, "window of %d, both sides %d: key %zu of query %d weighs %g",
                      W, !causal, key, I, weight);
            else
                CHECK((near == (gain < 0)) == (weight > 1e-6),
                      "extended window of %d, ln g %d: key %zu of query %d weighs %g", W, 60 * gain, key, I, weight);
        }
        free_numbers();
    }
}

/* A window over everything is standard attention to the last bit; without gain the window alone remains. */
static void test_extend_limits(void) {
    enum { T = 100, HS = 16 };
    for (size_t W = T; W <= T + 30; W += 30) {
        Head h = make_head(T, HS, 5, COVARIANCE_ISO, ENVELOPE_RAISED, W, true, true, 12);
        real *out = numbers(T * HS, 0, NULL), *dqkv = numbers(h.n[QKV], 0, NULL);
        run_head(&h, 64, true);
        memcpy(out, h.out, T * HS * sizeof(real));
        memcpy(dqkv, h.g[QKV], h.n[QKV] * sizeof(real));
        for (int i = MU; i < NUM_INPUTS; i++)
            for (size_t k = 0; k < h.n[i]; k++)
                if (h.g[i][k] != 0) {
                    CHECK(0, "extend, T %d, window %zu: a gradient of %s", T, W, input_names[i]);
                    k = h.n[i];
                }
        h.far = false;
        h.W = T;
        run_head(&h, 64, true);
        CHECK(memcmp(out, h.out, T * HS * sizeof(real)) == 0, "extend, T %d, window %zu: standard attention", T, W);
        CHECK(memcmp(dqkv, h.g[QKV], h.n[QKV] * sizeof(real)) == 0,
              "extend, T %d, window %zu: standard attention's gradients", T, W);
        free_numbers();
    }
    Head h = make_head(T, HS, 5, COVARIANCE_ISO, ENVELOPE_RAISED, 9, true, true, 12);
    real *out = numbers(T * HS, 0, NULL), *dqkv = numbers(h.n[QKV], 0, NULL);
    h.r[LOG_FAR][0] = -60;
    run_head(&h, 64, true);
    memcpy(out, h.out, T * HS * sizeof(real));
    memcpy(dqkv, h.g[QKV], h.n[QKV] * sizeof(real));
    CHECK(fabs((double)h.g[LOG_FAR][0]) < 1e-15, "extend, no gain: its gradient %g", (double)h.g[LOG_FAR][0]);
    h.far = false;
    run_head(&h, 64, true);
    CHECK(relative_error(out, h.out, T * HS) < 1e-6 && relative_error(dqkv, h.g[QKV], h.n[QKV]) < 1e-6,
          "extend, no gain: the window alone");
    free_numbers();
}

/* Logits of +-200 nearby and gains of e^+-150: finite and as the formula in logarithms says. */
static void test_large_logits(void) {
    enum { T = 80, HS = 16 };
    const double gains[] = {2, 150, -150};
    for (int kind = 0; kind < 12; kind++) {
        Head h = make_head(T, HS, 5, COVARIANCE_ISO, kind % 2 ? ENVELOPE_RAISED : ENVELOPE_DECAY, 10, true, true, 13);
        int sign = kind / 2 % 2 ? 1 : -1;
        /* q along one direction, k along it or against it: q . k / sqrt(HS) about +-200, and keys in turn where both
           occur */
        for (size_t t = 0; t < T; t++)
            for (size_t k = 0; k < HS; k++) {
                h.r[QKV][t * 3 * HS + k] = 6 + h.r[QKV][t * 3 * HS + k];
                h.r[QKV][t * 3 * HS + HS + k] = (real)((t % 5 == 4 ? -sign : sign) * 8) + h.r[QKV][t * 3 * HS + HS + k];
            }
        h.rope = false;
        h.r[LOG_FAR][0] = (real)gains[kind / 4];
        take_numbers(&h);
        double most = 0;
        check_forward(&h, 3e-4);
        for (size_t t = 0; t < T; t++) most = max_of(most, fabs((double)h.lse[t]));
        CHECK(most > 140, "logits are as large as this test wants them: %g", most);
        run_head(&h, 64, true);
        for (int i = 0; i < NUM_INPUTS; i++)
            for (size_t k = 0; k < h.n[i]; k++)
                if (!isfinite(h.g[i][k])) {
                    CHECK(0, "%s, large logits: gradient of %s", head_name(&h), input_names[i]);
                    k = h.n[i];
                }
        free_numbers();
    }
}

/* ---------------------------------------------------------------------- whole models */

/* One of each kind; T is several chunks and blocks. */
static const struct {
    int attention;
    const char *heads;
    int position, mixer, covariance, envelope, window, objective;
} modes[] = {
    {ATTENTION_STANDARD, NULL, POSITION_LEARNED, 0, 0, 0, 0, OBJECTIVE_LM},
    {ATTENTION_STANDARD, NULL, POSITION_ROPE, 0, 0, 0, 20, OBJECTIVE_LM},
    {ATTENTION_STANDARD, NULL, POSITION_BOTH, 0, 0, 0, 20, OBJECTIVE_MLM},
    {ATTENTION_GSA, NULL, POSITION_ROPE, MIXER_SOFTMAX, COVARIANCE_FULL, ENVELOPE_COSINE, 0, OBJECTIVE_LM},
    {ATTENTION_GSA, NULL, POSITION_BOTH, MIXER_SOFTMAX, COVARIANCE_ISO, ENVELOPE_NONE, 0, OBJECTIVE_LM},
    {ATTENTION_GSA, NULL, POSITION_ROPE, MIXER_LINEAR, COVARIANCE_ISO, ENVELOPE_RAISED, 0, OBJECTIVE_LM},
    {ATTENTION_GSA, NULL, POSITION_LEARNED, MIXER_LINEAR, COVARIANCE_DIAG, ENVELOPE_DECAY, 0, OBJECTIVE_LM},
    {ATTENTION_GSA, NULL, POSITION_ROPE, MIXER_LINEAR, COVARIANCE_FULL, ENVELOPE_NONE, 0, OBJECTIVE_LM},
    {ATTENTION_GSA, NULL, POSITION_BOTH, MIXER_LINEAR, COVARIANCE_ISO, ENVELOPE_RAISED, 0, OBJECTIVE_MLM},
    {ATTENTION_HYBRID, NULL, POSITION_ROPE, MIXER_SOFTMAX, COVARIANCE_DIAG, ENVELOPE_COSINE, 20, OBJECTIVE_LM},
    {ATTENTION_HYBRID, "0:1,1:0", POSITION_ROPE, MIXER_LINEAR, COVARIANCE_ISO, ENVELOPE_RAISED, 20, OBJECTIVE_LM},
    {ATTENTION_HYBRID, NULL, POSITION_BOTH, MIXER_SOFTMAX, COVARIANCE_ISO, ENVELOPE_COSINE, 0, OBJECTIVE_MLM},
    {ATTENTION_AUGMENT, "1", POSITION_ROPE, MIXER_SOFTMAX, COVARIANCE_ISO, ENVELOPE_COSINE, 0, OBJECTIVE_LM},
    {ATTENTION_AUGMENT, "2", POSITION_ROPE, MIXER_LINEAR, COVARIANCE_DIAG, ENVELOPE_RAISED, 20, OBJECTIVE_LM},
    {ATTENTION_EXTEND, NULL, POSITION_ROPE, MIXER_LINEAR, COVARIANCE_ISO, ENVELOPE_RAISED, 20, OBJECTIVE_LM},
    {ATTENTION_EXTEND, "1", POSITION_LEARNED, MIXER_LINEAR, COVARIANCE_FULL, ENVELOPE_DECAY, 70, OBJECTIVE_LM},
    {ATTENTION_EXTEND, NULL, POSITION_BOTH, MIXER_LINEAR, COVARIANCE_DIAG, ENVELOPE_NONE, 1, OBJECTIVE_LM},
};
enum { MODES = sizeof modes / sizeof *modes, B = 2, T = 150 };

static Config mode_config(size_t i) {
    Config c;
    const char *problem = try_config(&c, modes[i].attention, modes[i].heads, modes[i].position, modes[i].mixer,
                                     modes[i].covariance, modes[i].envelope, modes[i].window, modes[i].objective);
    if (problem) die("%s", problem);
    c.T = T;
    return c;
}

/* Every head of a layer as the model runs it, its scale, window and splats, against the formula. Softmax over splats
   is test_layers' part. */
static void test_model_heads(size_t mode) {
    Config c = mode_config(mode);
    GSA *m = scattered_model(&c, B, 19);
    Sizes z = config_sizes(&c);
    bool causal = c.objective == OBJECTIVE_LM;
    size_t d = z.HS, A = z.A, L = z.L;
    uint64_t rng = 18;
    real *qkv = numbers(B * T * 3 * A, 1, &rng), *out = numbers(B * T * A, 0, NULL),
         *lse = numbers(B * z.NH * T, 0, NULL), *rho = numbers(B * z.NH * T, 0, NULL);
    gsa_splat_waves(m, m->a.splat_waves, T, 0);
    gsa_rope_waves(m, m->a.rope_waves, T, 0);
    for (size_t l = 0; l < L; l++) {
        features_forward(m, m->a.fq, m->a.fk, qkv, l, B, T, m->a.rope_waves, m->a.splat_waves);
        Gates gates = layer_gates(m, &m->a, l); /* as if their numbers were those of this layer */
        for (size_t i = 0; i < B * T * gates.count; i++) m->a.log_forget[i] = (real)(-0.1 * fabs(rng_normal(&rng)));
        attention_forward(out, lse, m->a.fq, m->a.fk, qkv, m->scale + l * z.NH, m->window + l * z.NH, &gates, causal, B,
                          T, z.NH, d);
        scans_forward(m, out, lse, rho, qkv, l, B, T);
        for (size_t i = 0; i < B * z.NH; i++) {
            size_t b = i / z.NH, n = i % z.NH, g = 0; /* g: which of all GSA heads it is */
            bool splats = c.gsa_heads[l] >> n & 1, extend = c.attention == ATTENTION_EXTEND;
            if (splats && c.mixer == MIXER_SOFTMAX) continue;
            for (size_t k = 0; k < l * z.NH + n; k++) g += c.gsa_heads[k / z.NH] >> k % z.NH & 1;
            Head h = make_head(T, d, splats ? z.S : 1, splats ? c.covariance : 0, splats ? c.envelope : 0,
                               splats && !extend ? 0
                               : c.window        ? (size_t)c.window
                                                 : T,
                               splats, causal, 17);
            h.rope = c.position != POSITION_LEARNED;
            size_t standard = extend ? l * z.NH + n : l * z.NH + n - g;
            if (c.gain && h.W) h.gain = exp((double)m->p.log_gain[standard]);
            if (c.rope && h.W) h.log_rope = m->p.log_rope + standard * d / 2;
            const real *from[NUM_INPUTS] = {NULL,           m->p.mu,        m->p.log_precision, m->p.log_alpha,
                                            m->p.log_theta, m->p.log_delta, m->p.psi,           m->p.log_far};
            for (int k = MU; k < NUM_INPUTS && splats; k++)
                if (h.n[k]) memcpy(h.r[k], from[k] + g * h.n[k], h.n[k] * sizeof(real));
            /* rows of q, k, v in turn */
            for (size_t t = 0; t < 3 * T; t++)
                memcpy(h.r[QKV] + t * d, qkv + b * T * 3 * A + t * A + n * d, d * sizeof(real));
            take_numbers(&h);
            double forget[T] = {0};
            size_t before = 0, all = 0; /* standard heads of the layer */
            for (size_t k = 0; k < z.NH; k++) {
                before += k < n && !(c.gsa_heads[l] >> k & 1);
                all += !(c.gsa_heads[l] >> k & 1);
            }
            bool gated = !splats && (c.forget == FORGET_ALL || (c.forget == FORGET_HALF && 2 * before < all));
            for (size_t t = 0; t < T && gated; t++)
                forget[t] = (t ? forget[t - 1] : 0) + (double)m->a.log_forget[(b * T + t) * gates.count + before];
            if (gated) h.forget = forget;
            formula(&h, h.expected, h.expected_lse);
            for (size_t t = 0; t < T; t++) memcpy(h.out + t * d, out + (b * T + t) * A + n * d, d * sizeof(real));
            double error = error_of(h.out, h.expected, T * d);
            CHECK(error <= 1e-5, "mode %zu, layer %zu, head %zu: %s: off by %g", mode, l, n, head_name(&h), error);
        }
    }
    gsa_destroy(m);
    free_numbers();
}

/* No token of a decoder sees a later one, nor another sequence, not by a bit; an encoder's tokens see each other,
   within their window. */
static void test_causality(size_t mode) {
    Config c = mode_config(mode);
    GSA *m = scattered_model(&c, B, 20);
    uint64_t rng = 21;
    size_t Vp = (size_t)c.Vp;
    int x[B * T];
    real *before = numbers(B * T * Vp, 0, NULL);
    random_tokens(x, B * T, c.V, &rng);
    gsa_forward(m, x, NULL, B, T);
    memcpy(before, m->a.logits, B * T * Vp * sizeof(real));
    const size_t places[] = {0, 1, 20, 63, 64, 128, T - 1};
    for (size_t i = 0; i < sizeof places / sizeof *places; i++) {
        size_t t = places[i];
        int keep = x[t];
        x[t] = (keep + 1) % c.V;
        gsa_forward(m, x, NULL, B, T);
        bool earlier = memcmp(m->a.logits, before, t * Vp * sizeof(real)) != 0;
        if (c.objective == OBJECTIVE_LM) CHECK(!earlier, "mode %zu: logits before a changed token %zu", mode, t);
        else CHECK(earlier == (t > 0), "mode %zu: an encoder's logits before a changed token %zu", mode, t);
        CHECK(memcmp(m->a.logits + t * Vp, before + t * Vp, Vp * sizeof(real)) != 0,
              "mode %zu: a changed token %zu changes its own logits", mode, t);
        /* two layers reach twice the window; splats reach everything, though by T the decayed share may be below
           rounding */
        bool all = !c.window || c.attention == ATTENTION_EXTEND;
        if (c.attention == ATTENTION_STANDARD || t + 30 > T)
            CHECK((memcmp(m->a.logits + (T - 1) * Vp, before + (T - 1) * Vp, Vp * sizeof(real)) != 0) ==
                      (all || config_gsa_heads(&c) || T - 1 - t <= 2 * ((size_t)c.window - 1)),
                  "mode %zu: how far a changed token %zu reaches", mode, t);
        CHECK(memcmp(m->a.logits + T * Vp, before + T * Vp, T * Vp * sizeof(real)) == 0,
              "mode %zu: the other sequence stays", mode);
        x[t] = keep;
    }
    gsa_destroy(m);
    free_numbers();
}

/* Blocks computed again in the backward pass change no bit, and take less memory. */
static void test_recompute(size_t mode) {
    Config c = mode_config(mode);
    int x[B * T], y[B * T];
    uint64_t rng = 24;
    random_tokens(x, B * T, c.V, &rng);
    random_tokens(y, B * T, c.V, &rng);
    GSA *models[2];
    size_t sizes[2];
    for (int recompute = 0; recompute < 2; recompute++) {
        ActivationTensors a;
        c.recompute = recompute;
        size_t bytes[NUM_MEMORY] = {0}, sum = 0;
        sizes[recompute] = carve_activations(&a, NULL, &c, B, bytes);
        for (int i = 0; i < NUM_MEMORY; i++) sum += bytes[i];
        CHECK(sum == sizes[recompute] * sizeof(real), "mode %zu: the groups make up the whole", mode);
        models[recompute] = scattered_model(&c, B, 25);
    }
    GSA *kept = models[0], *again = models[1];
    CHECK(sizes[1] < sizes[0], "mode %zu: less is kept", mode);
    for (int pass = 0; pass < 2; pass++) { /* the second adds to the first, on a shorter sequence */
        CHECK(gsa_forward(kept, x, y, B, T - 3 * (size_t)pass) == gsa_forward(again, x, y, B, T - 3 * (size_t)pass),
              "mode %zu: the same loss with --recompute", mode);
        gsa_backward(kept, 0.7);
        gsa_backward(again, 0.7);
        for (int i = 0; i < NUM_TENSORS; i++)
            CHECK(memcmp(kept->grads + kept->tensors[i].offset, again->grads + kept->tensors[i].offset,
                         kept->tensors[i].size * sizeof(real)) == 0,
                  "mode %zu: the same gradient of %s with --recompute", mode, kept->tensors[i].name);
    }
    gsa_destroy(kept);
    gsa_destroy(again);
}

#ifdef _OPENMP
static void test_threads(size_t mode) {
    Config c = mode_config(mode);
    int x[B * T], y[B * T];
    uint64_t rng = 22;
    random_tokens(x, B * T, c.V, &rng);
    random_tokens(y, B * T, c.V, &rng);
    for (size_t i = 0; i < B * T && c.objective == OBJECTIVE_MLM; i++)
        if (i % 3) y[i] = -1;
    real *logits = NULL, *grads = NULL, *params = NULL;
    for (int threads = 1; threads <= 3; threads++) {
        omp_set_num_threads(threads);
        GSA *m = scattered_model(&c, B, 23);
        size_t n = B * T * (size_t)c.Vp;
        gsa_forward(m, x, y, B, T);
        if (threads == 1) {
            logits = numbers(n, 0, NULL);
            grads = numbers(m->total, 0, NULL);
            params = numbers(m->total, 0, NULL);
            memcpy(logits, m->a.logits, n * sizeof(real));
        }
        CHECK(memcmp(logits, m->a.logits, n * sizeof(real)) == 0, "mode %zu: logits with %d threads", mode, threads);
        gsa_backward(m, 1);
        if (threads == 1) memcpy(grads, m->grads, m->total * sizeof(real));
        for (int i = 0; i < NUM_TENSORS; i++)
            CHECK(memcmp(grads + m->tensors[i].offset, m->grads + m->tensors[i].offset,
                         m->tensors[i].size * sizeof(real)) == 0,
                  "mode %zu: gradient of %s with %d threads", mode, m->tensors[i].name, threads);
        const Update u = {
            .rate = {1e-3, 1e-2}, .beta1 = 0.9, .beta2 = 0.95, .weight_decay = 0.1, .scale = {0.5, 0.5}, .step = 1};
        int64_t clamped[NUM_BOUNDS];
        gsa_update(m, &u, clamped);
        if (threads == 1) memcpy(params, m->params, m->total * sizeof(real));
        CHECK(memcmp(params, m->params, m->total * sizeof(real)) == 0, "mode %zu: an update with %d threads", mode,
              threads);
        gsa_destroy(m);
    }
    omp_set_num_threads(1);
    free_numbers();
}
#endif

/* ---------------------------------------------------------------------- starts from data */

static void test_kmeans(void) {
    enum { D = 8, CLUSTERS = 5, EACH = 60, N = CLUSTERS * EACH };
    uint64_t rng = 30;
    float true_centre[CLUSTERS][D] = {{0}}, keys[N * D], mu[CLUSTERS * D], again[CLUSTERS * D];
    for (int c = 0; c < CLUSTERS; c++) true_centre[c][c] = 1;
    for (int i = 0; i < N; i++) /* keys of any length around their directions */
        for (int k = 0; k < D; k++)
            keys[i * D + k] = (float)((1 + i % 7) * (true_centre[i % CLUSTERS][k] + 0.04 * rng_normal(&rng)));
    for (uint64_t seed = 0; seed < 5; seed++) {
        int found = 0;
        start_kmeans(mu, CLUSTERS, keys, N, D, seed);
        start_kmeans(again, CLUSTERS, keys, N, D, seed);
        CHECK(memcmp(mu, again, sizeof mu) == 0, "k-means: same seed, same centres");
        for (int c = 0; c < CLUSTERS; c++) {
            double mean[D] = {0}, best = INFINITY; /* the cluster's mean of unit vectors */
            for (int i = c; i < N; i += CLUSTERS) {
                double square = 0;
                for (int k = 0; k < D; k++) square += (double)keys[i * D + k] * keys[i * D + k];
                for (int k = 0; k < D; k++) mean[k] += keys[i * D + k] / sqrt(square) / EACH;
            }
            for (int s = 0; s < CLUSTERS; s++) {
                double far = 0;
                for (int k = 0; k < D; k++) far += (mu[s * D + k] - mean[k]) * (mu[s * D + k] - mean[k]);
                best = far < best ? far : best;
            }
            found += best < 1e-9;
        }
        CHECK(found == CLUSTERS, "k-means with seed %llu finds %d of %d clusters", (unsigned long long)seed, found,
              CLUSTERS);
    }
    /* without clusters: still each centre is the mean of the keys that are nearest to it */
    for (int i = 0; i < N * D; i++) keys[i] = (float)rng_normal(&rng);
    for (uint64_t seed = 0; seed < 3; seed++) {
        double sums[CLUSTERS][D + 1] = {{0}}, off = 0;
        int owners[N], other = 0;
        start_kmeans(mu, CLUSTERS, keys, N, D, seed);
        nearest_centres(owners, mu, CLUSTERS, keys, N, D);
        for (int i = 0; i < N; i++) {
            double square = 1e-6, nearest = INFINITY;
            int owner = 0;
            for (int k = 0; k < D; k++) square += (double)keys[i * D + k] * keys[i * D + k];
            for (int s = 0; s < CLUSTERS; s++) {
                double far = 0;
                for (int k = 0; k < D; k++) far += pow(keys[i * D + k] / sqrt(square) - mu[s * D + k], 2);
                if (far < nearest) {
                    nearest = far;
                    owner = s;
                }
            }
            other += owners[i] != owner;
            for (int k = 0; k < D; k++) sums[owner][k] += keys[i * D + k] / sqrt(square);
            sums[owner][D]++;
        }
        for (int s = 0; s < CLUSTERS; s++)
            for (int k = 0; k < D; k++) off = max_of(off, fabs(mu[s * D + k] - sums[s][k] / sums[s][D]));
        CHECK(off < 0.02, "k-means with seed %llu: centres are the means of their keys up to %g",
              (unsigned long long)seed, off);
        CHECK(other == 0, "%d of %d keys with another centre than the nearest", other, N);
    }
    start_kmeans(mu, CLUSTERS, keys, 2, D, 1); /* fewer keys than centres, and a key of zeros */
    memset(keys, 0, sizeof keys);
    start_kmeans(again, CLUSTERS, keys, 3, D, 1);
    for (int k = 0; k < CLUSTERS * D; k++)
        CHECK(isfinite(mu[k]) && isfinite(again[k]), "k-means of too few keys is finite");
}

static void test_components(void) {
    enum { D = 6, S = 5, N = 4000 };
    uint64_t rng = 31;
    static float keys[N * D];
    float mu[S * D], again[S * D];
    for (int i = 0; i < N; i++) { /* around the first axis, wide along the third, less so along the second */
        for (int k = 0; k < D; k++) keys[i * D + k] = (float)(0.01 * rng_normal(&rng));
        keys[i * D] += 1;
        keys[i * D + 2] += (float)(0.3 * rng_normal(&rng));
        keys[i * D + 1] += (float)(0.1 * rng_normal(&rng));
    }
    double mean[D] = {0}, covariance[D][D] = {{0}};
    for (int pass = 0; pass < 2; pass++)
        for (int i = 0; i < N; i++) {
            double square = 1e-6, x[D];
            for (int k = 0; k < D; k++) square += (double)keys[i * D + k] * keys[i * D + k];
            for (int k = 0; k < D; k++) x[k] = keys[i * D + k] / sqrt(square);
            for (int k = 0; k < D; k++) {
                if (pass == 0) mean[k] += x[k] / N;
                for (int j = 0; j < D && pass; j++) covariance[k][j] += (x[k] - mean[k]) * (x[j] - mean[j]) / N;
            }
        }
    start_components(mu, S, keys, N, D, 1);
    start_components(again, S, keys, N, D, 1);
    CHECK(memcmp(mu, again, sizeof mu) == 0, "components: same seed, same centres");
    for (int pair = 0; pair < 2; pair++) { /* mean + and - sqrt(value) vector, C vector = value vector */
        double v[D], value = 0, off = 0, middle = 0;
        int axis = pair ? 1 : 2;
        for (int k = 0; k < D; k++) {
            v[k] = 0.5 * (mu[2 * pair * D + k] - mu[(2 * pair + 1) * D + k]);
            middle = max_of(middle, fabs(0.5 * (mu[2 * pair * D + k] + mu[(2 * pair + 1) * D + k]) - mean[k]));
            value += v[k] * v[k];
        }
        for (int k = 0; k < D; k++) {
            double image = 0;
            for (int j = 0; j < D; j++) image += covariance[k][j] * v[j];
            off = max_of(off, fabs(image - value * v[k]));
        }
        CHECK(middle < 1e-6 && off < 1e-5 * pow(value, 1.5), "component %d: middle off by %g, eigenvector by %g of %g",
              pair, middle, off, pow(value, 1.5));
        CHECK(v[axis] * v[axis] > 0.98 * value, "component %d lies along axis %d: %g of %g", pair, axis,
              v[axis] * v[axis], value);
    }
    for (int k = 0; k < D; k++) CHECK(fabs(mu[4 * D + k] - mean[k]) < 1e-6, "the odd centre is the mean");
    start_components(mu, S, keys, 1, D, 1); /* one key: no spread at all */
    for (int k = 0; k < S * D; k++) CHECK(isfinite(mu[k]), "components of one key are finite");
}

/* The splats of another model arrive head by head, whatever else the models are; all other parameters stay. */
static void test_start_from_file(void) {
    Config from, to;
    try_config(&from, ATTENTION_HYBRID, "0:1,1:0", POSITION_ROPE, MIXER_LINEAR, COVARIANCE_FULL, ENVELOPE_RAISED, 20,
               OBJECTIVE_LM);
    try_config(&to, ATTENTION_HYBRID, "1:0-1", POSITION_BOTH, MIXER_LINEAR, COVARIANCE_FULL, ENVELOPE_RAISED, 0,
               OBJECTIVE_MLM);
    GSA *m = scattered_model(&from, 1, 50), *n = scattered_model(&to, 1, 51);
    Entry entries[NUM_TENSORS];
    const void *data[NUM_TENSORS];
    int count = 0;
    real *before = numbers(n->total, 0, NULL);
    memcpy(before, n->params, n->total * sizeof(real));
    char path[] = "/tmp/gsa_test_XXXXXX";
    int file = mkstemp(path);
    if (file < 0) die("cannot make a temporary file");
    close(file);
    checkpoint_add_tensors(&from, "", m->params, entries, data, &count);
    checkpoint_write(path, CHECKPOINT_MODEL, &from, 0, entries, data, count);
    Checkpoint *k = checkpoint_open(path, CHECKPOINT_MODEL);
    start_from_file(&to, n->params, k);
    for (int i = 0; i < NUM_TENSORS; i++) {
        const Tensor *t = &n->tensors[i];
        bool splats = tensor_is_splat(i);
        const real *expected = splats ? m->params + m->tensors[i].offset : before + t->offset;
        CHECK(memcmp(n->params + t->offset, expected, t->size * sizeof(real)) == 0, "splats of another model: %s %s",
              t->name, splats ? "arrives" : "stays");
    }
    checkpoint_close(k);
    unlink(path);
    gsa_destroy(m);
    gsa_destroy(n);
    free_numbers();
}

int main(void) {
    test_cancelling(true);
    test_cancelling(false);
#ifdef _OPENMP
    omp_set_num_threads(1);
#endif
    static const int envelopes[] = {ENVELOPE_NONE, ENVELOPE_DECAY, ENVELOPE_RAISED};
    for (int e = 0; e < 3; e++)
        for (int covariance = 0; covariance <= COVARIANCE_FULL; covariance++) {
            const size_t lengths[] = {1, 2, 16, 17, 64, 65, 129, 200};
            for (size_t i = 0; i < sizeof lengths / sizeof *lengths; i++) {
                test_forward(lengths[i], 16, 5, covariance, envelopes[e], 0, true, true);
                if (lengths[i] > 2 && lengths[i] < 200)
                    test_forward(lengths[i], 16, 5, covariance, envelopes[e], 0, true, false);
            }
            for (size_t W = 1; W <= 140; W = W == 1 ? 9 : W == 9 ? 64 : W == 64 ? 130 : 141)
                test_forward(135, 16, 4, covariance, envelopes[e], W, true, true);
            test_chunks(covariance ? 300 : 1000, covariance, envelopes[e], 0, true);
            test_chunks(300, covariance, envelopes[e], 0, false);
            test_chunks(300, covariance, envelopes[e], 20, true);
            test_gradients(135, 10, 4, covariance, envelopes[e], 0, true, true);
            test_gradients(135, 10, 4, covariance, envelopes[e], 0, true, false);
            test_gradients(135, 10, 4, covariance, envelopes[e], 21, true, true);
            test_identities(covariance, envelopes[e], 0, true, true);
            test_identities(covariance, envelopes[e], 0, true, false);
            test_identities(covariance, envelopes[e], 21, true, true);
            test_narrow(covariance, envelopes[e]);
        }
    for (int e = 0; e < 3; e++) {
        test_forward(1000, 32, 16, COVARIANCE_ISO, envelopes[e], 0, true, true);
        test_forward(1000, 32, 16, COVARIANCE_ISO, envelopes[e], 0, true, false);
        test_forward(1000, 32, 16, COVARIANCE_ISO, envelopes[e], 64, true, true);
        test_forward(4095, 16, 8, COVARIANCE_ISO, envelopes[e], 0, true, true);
        for (size_t late = 0; late <= 250; late += late == 0 ? 1 : late == 1 ? 69 : 180)
            test_continued(230, envelopes[e], late);
    }
    for (size_t W = 1; W <= 150; W = W == 1 ? 17 : W == 17 ? 64 : W == 64 ? 65 : W == 65 ? 150 : 151)
        for (int causal = 0; causal < 2; causal++) {
            test_forward(150, 16, 1, 0, 0, W, false, causal);
            if (W > 1) test_gradients(150, 10, 1, 0, 0, W, false, causal);
        }
    test_identities(COVARIANCE_ISO, ENVELOPE_NONE, 17, false, true);
    test_identities(COVARIANCE_ISO, ENVELOPE_NONE, 17, false, false);
    test_running_mean();
    for (int covariance = 0; covariance <= COVARIANCE_FULL; covariance++) test_unreached(covariance);
    test_tiny_queries(0);
    test_tiny_queries(9);
    for (int kind = 0; kind < 3; kind++) test_window_edges(kind == 2, kind > 0);
    test_extend_limits();
    test_large_logits();
    for (size_t i = 0; i < MODES; i++) {
        test_model_heads(i);
        test_causality(i);
        test_recompute(i);
    }
#ifdef _OPENMP
    for (size_t i = 0; i < MODES; i++) test_threads(i);
#else
    skip("the number of threads", "built without OpenMP");
#endif
    test_kmeans();
    test_components();
    test_start_from_file();
    return test_summary("test_modes");
}
