#include "measure.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* ---------------------------------------------------------------------- weights of a head */

struct HeadWeights {
    int kind;
    bool causal;
    size_t T, d, S, window; /* window: of the softmax part; T where it sees all */
    double *q, *k;          /* softmax part: features (T, d) or (T, 2S), their product being the logit */
    double *forget;         /* of a gated head: sums of ln f (T), equation (4a) */
    size_t features;
    /* scan part: responsibilities (T, S) of queries, ln phi (T, S) of keys less its largest value */
    double *r, *phi;
    /* (2, T, S) by distance to keys before a query, then after it; ln g plus that largest value */
    double *envelope, gain;
};

/* x^ (d) by equation (1), or x itself */
static void point(double *out, const float *x, size_t d, bool sphere) {
    double square = 1e-6;
    for (size_t k = 0; k < d; k++) square += (double)x[k] * (double)x[k];
    for (size_t k = 0; k < d; k++) out[k] = sphere ? (double)x[k] / sqrt(square) : (double)x[k];
}

/* Equation (2): ln phi_s of one point, P numbers of precision a splat: 1, d or the rows of a Cholesky factor, its
   diagonal as logarithms */
static double log_response(const double *x, const float *mu, const float *log_precision, size_t P, size_t d) {
    double sum = 0;
    for (size_t k = 0; k < d; k++) {
        double along = (double)x[k] - (double)mu[k];
        if (P <= d) along *= exp(0.5 * (double)log_precision[P > 1 ? k : 0]);
        else {
            along *= exp((double)log_precision[k * (k + 1) / 2 + k]);
            for (size_t i = k + 1; i < d; i++)
                along += (double)log_precision[i * (i + 1) / 2 + k] * (x[i] - (double)mu[i]);
        }
        sum += along * along;
    }
    return -0.5 * sum;
}

/* r (S): the softmax of itself */
static void share_out(double *r, size_t S) {
    double top = -INFINITY, sum = 0;
    for (size_t s = 0; s < S; s++) top = fmax(top, r[s]);
    for (size_t s = 0; s < S; s++) sum += r[s] = exp(r[s] - top);
    for (size_t s = 0; s < S; s++) r[s] /= sum;
}

/* The parameters of a head's splats within the flat buffer; NULL where the model has none. */
static const float *of_head(const Tensor *tensors, const float *params, int tensor, size_t g) {
    const Tensor *t = &tensors[tensor];
    return t->size ? params + t->offset + g * (size_t)(t->shape[1] * t->shape[2]) : NULL;
}

HeadWeights *head_weights_open(const Config *c, const float *params, int l, int h, const float *q, const float *k,
                               const float *log_forget, size_t T) {
    HeadWeights *w = (HeadWeights *)xcalloc(1, sizeof *w);
    Tensor tensors[NUM_TENSORS];
    model_tensors(c, tensors);
    size_t d = (size_t)config_head_size(c), P = (size_t)config_precisions(c);
    w->kind = config_head_kind(c, l, h);
    w->causal = c->objective == OBJECTIVE_LM;
    w->T = T;
    w->d = d;
    w->window = w->kind == HEAD_SPLAT || !c->window ? T : (size_t)c->window;
    double *x = (double *)xmalloc(d * sizeof *x);
    if (config_is_gated(c, l, h)) {
        w->forget = (double *)xmalloc(T * sizeof(double));
        for (size_t t = 0; t < T; t++) w->forget[t] = (t ? w->forget[t - 1] : 0) + (double)log_forget[t];
    }
    if (w->kind == HEAD_STANDARD || w->kind == HEAD_EXTEND) {
        bool rope = c->position != POSITION_LEARNED;
        const float *log_gain = of_head(tensors, params, TENSOR_log_gain, (size_t)config_standard_before(c, l, h));
        const float *log_rope = of_head(tensors, params, TENSOR_log_rope, (size_t)config_standard_before(c, l, h));
        double gain = log_gain ? exp((double)*log_gain) : 1; /* equation (7c) */
        w->features = d;
        w->q = (double *)xmalloc(2 * T * d * sizeof(double));
        w->k = w->q + T * d;
        for (size_t t = 0; t < 2 * T; t++) {
            /* logits are divided by sqrt(d) */
            double *f = (t < T ? w->q : w->k) + t % T * d, size = t < T ? gain / sqrt((double)d) : 1;
            point(x, (t < T ? q : k) + t % T * d, d, rope);
            for (size_t i = 0; i < d / 2; i++) {
                double theta = log_rope ? exp((double)log_rope[i]) : rope_frequency((int)i, (int)d),
                       angle = rope ? theta * (double)(t % T) : 0, a = cos(angle), b = sin(angle),
                       norm = rope ? sqrt((double)d) * size : size;
                f[i] = norm * (x[i] * a - x[d / 2 + i] * b);
                f[d / 2 + i] = norm * (x[i] * b + x[d / 2 + i] * a);
            }
        }
    }
    if (w->kind == HEAD_STANDARD) {
        free(x);
        return w;
    }
    size_t S = w->S = (size_t)c->S, g = (size_t)config_gsa_before(c, l, h);
    const float *mu = of_head(tensors, params, TENSOR_mu, g),
                *log_precision = of_head(tensors, params, TENSOR_log_precision, g),
                *log_alpha = of_head(tensors, params, TENSOR_log_alpha, g);
    const float *log_theta = of_head(tensors, params, TENSOR_log_theta, g),
                *log_delta = of_head(tensors, params, TENSOR_log_delta, g),
                *psi = of_head(tensors, params, TENSOR_psi, g), *log_far = of_head(tensors, params, TENSOR_log_far, g),
                *alive = of_head(tensors, params, TENSOR_alive, g);
    /* ln alpha + ln phi of queries, ln phi of keys */
    double *response = (double *)xmalloc(2 * T * S * sizeof *response), *of_keys = response + T * S;
    for (size_t t = 0; t < 2 * T; t++) {
        point(x, (t < T ? q : k) + t % T * d, d, !c->raw);
        for (size_t s = 0; s < S; s++)
            response[t * S + s] = alive[s] > 0 ? (t < T ? (double)log_alpha[s] : 0) +
                                                     log_response(x, mu + s * d, log_precision + s * P, P, d)
                                               : -INFINITY;
    }
    free(x);
    if (w->kind == HEAD_SPLAT) { /* equation (9) */
        w->features = log_theta ? 2 * S : S;
        w->q = (double *)xmalloc(2 * T * w->features * sizeof(double));
        w->k = w->q + T * w->features;
        for (size_t t = 0; t < 2 * T; t++)
            for (size_t s = 0; s < S; s++) {
                double *f = (t < T ? w->q : w->k) + t % T * w->features,
                       angle = log_theta ? exp((double)log_theta[s]) * (double)(t % T) : 0,
                       size = exp(response[t * S + s]);
                if (psi && t >= T) angle += (double)psi[s]; /* equation (7b) */
                f[s] = size * cos(angle);
                if (log_theta) f[S + s] = size * sin(angle);
            }
        free(response);
        return w;
    }
    double most = -INFINITY; /* equations (11), (8) */
    for (size_t i = 0; i < T * S; i++) most = fmax(most, of_keys[i]);
    for (size_t i = 0; i < T * S; i++) of_keys[i] = exp(of_keys[i] - most);
    for (size_t t = 0; t < T; t++) share_out(response + t * S, S);
    w->r = response;
    w->phi = of_keys;
    w->gain = most + (log_far ? (double)*log_far : 0);
    w->envelope = (double *)xmalloc(2 * S * T * sizeof(double));
    for (size_t s = 0; s < S; s++)
        for (size_t n = 0; n < 2 * T; n++) {
            double apart = (double)(n % T), angle = log_theta ? exp((double)log_theta[s]) * apart : 0;
            if (psi) angle += n < T ? -(double)psi[s] : (double)psi[s];
            w->envelope[n * S + s] = (log_delta ? exp(-exp((double)log_delta[s]) * apart) : 1) * 0.5 * (1 + cos(angle));
        }
    return w;
}

void head_weights_close(HeadWeights *w) {
    free(w->q);
    free(w->forget);
    free(w->r);
    free(w->envelope);
    free(w);
}

void head_weights_row(const HeadWeights *w, size_t i, double *row) {
    size_t end = w->causal ? i + 1 : w->T;
    double most = -INFINITY, near = 0, far = 0;
    memset(row, 0, w->T * sizeof *row);
    for (size_t j = 0; j < end; j++) { /* logits within the window, weights beyond it */
        size_t n = i > j ? i - j : j - i;
        double sum = 0;
        if (w->kind != HEAD_SCAN && n < w->window) {
            for (size_t f = 0; f < w->features; f++) sum += w->q[i * w->features + f] * w->k[j * w->features + f];
            if (w->forget) sum += w->forget[i] - w->forget[j];
            most = fmax(most, row[j] = sum);
        } else if (w->kind == HEAD_SCAN || w->kind == HEAD_EXTEND) {
            const double *envelope = w->envelope + ((i < j ? w->T : 0) + n) * w->S;
            for (size_t s = 0; s < w->S; s++) sum += w->r[i * w->S + s] * envelope[s] * w->phi[j * w->S + s];
            far += row[j] = fabs(sum);
        }
    }
    for (size_t j = 0; j < end && w->kind != HEAD_SCAN; j++) {
        size_t n = i > j ? i - j : j - i;
        if (n < w->window) near += row[j] = exp(row[j] - most);
    }
    /* equation (12): g and the keys' scale, in units of the near part */
    double gain = w->kind == HEAD_EXTEND ? w->gain - most : 0, top = fmax(gain, 0);
    double near_share = w->kind == HEAD_SCAN ? 0 : exp(-top), far_share = exp(gain - top),
           sum = near * near_share + far * far_share;
    if (!(sum > 0)) sum = INFINITY;
    for (size_t j = 0; j < end; j++)
        row[j] *= (w->kind != HEAD_SCAN && (i > j ? i - j : j - i) < w->window ? near_share : far_share) / sum;
}

void head_offsets(const HeadWeights *w, double *sum) {
    size_t S = w->S, T = w->T;
    double *row = (double *)xmalloc((T * S + 1) * sizeof *row);
    for (size_t i = 0; i < T; i++) {
        size_t end = w->causal ? i + 1 : T;
        double total = w->kind == HEAD_SPLAT ? 1 : 0;
        for (size_t j = 0; j < end; j++)
            for (size_t s = 0; s < S; s++) {
                double *a = &row[j * S + s];
                if (w->kind == HEAD_SPLAT) {
                    const double *q = w->q + i * w->features, *k = w->k + j * w->features;
                    *a = q[s] * k[s] + (w->features > S ? q[S + s] * k[S + s] : 0);
                } else {
                    size_t n = i > j ? i - j : j - i;
                    *a = n < w->window && w->kind == HEAD_EXTEND
                             ? 0
                             : w->r[i * S + s] * w->envelope[((i < j ? T : 0) + n) * S + s] * w->phi[j * S + s];
                    total += *a;
                }
            }
        for (size_t j = 0; j < end && total > 0; j++) {
            size_t n = i > j ? i - j : j - i;
            double pairs = (double)(T - n) * (w->causal || n == 0 ? 1 : 2);
            for (size_t s = 0; s < S; s++) sum[s * T + n] += row[j * S + s] / total / pairs;
        }
    }
    free(row);
}

void head_responsibilities(const Config *c, const float *params, int l, int h, const float *x, size_t T, double *r) {
    Tensor tensors[NUM_TENSORS];
    model_tensors(c, tensors);
    size_t d = (size_t)config_head_size(c), P = (size_t)config_precisions(c), S = (size_t)c->S,
           g = (size_t)config_gsa_before(c, l, h);
    const float *mu = of_head(tensors, params, TENSOR_mu, g),
                *log_precision = of_head(tensors, params, TENSOR_log_precision, g);
    const float *log_alpha = of_head(tensors, params, TENSOR_log_alpha, g),
                *alive = of_head(tensors, params, TENSOR_alive, g);
    double *unit = (double *)xmalloc(d * sizeof *unit);
    for (size_t t = 0; t < T; t++) {
        point(unit, x + t * d, d, !c->raw);
        for (size_t s = 0; s < S; s++)
            r[t * S + s] = alive[s] > 0
                               ? (double)log_alpha[s] + log_response(unit, mu + s * d, log_precision + s * P, P, d)
                               : -INFINITY;
        share_out(r + t * S, S);
    }
    free(unit);
}

double splat_covariance(const Config *c, const float *params, size_t g, size_t s, const float *directions,
                        double plane[3]) {
    Tensor tensors[NUM_TENSORS];
    model_tensors(c, tensors);
    size_t d = (size_t)config_head_size(c), P = (size_t)config_precisions(c);
    const float *log_precision = of_head(tensors, params, TENSOR_log_precision, g) + s * P;
    double trace = 0;
    plane[0] = plane[1] = plane[2] = 0;
    for (size_t k = 0; k < d && P <= d; k++) {
        double variance = exp(-(double)log_precision[P > 1 ? k : 0]), x = (double)directions[k],
               y = (double)directions[d + k];
        plane[0] += x * x * variance;
        plane[1] += x * y * variance;
        plane[2] += y * y * variance;
        trace += variance;
    }
    if (P <= d) return trace;
    /* L^-1 u: products of two of them are those of the covariance; first of the directions, then of each axis */
    double *z = (double *)xmalloc(2 * d * sizeof *z);
    for (size_t u = 0; u < 2 + d; u++) {
        double *out = z + (u == 1 ? d : 0);
        for (size_t i = 0; i < d; i++) {
            const float *row = log_precision + i * (i + 1) / 2;
            double sum = u < 2 ? (double)directions[u * d + i] : i == u - 2;
            for (size_t k = 0; k < i; k++) sum -= (double)row[k] * out[k];
            out[i] = sum * exp(-(double)row[i]);
        }
        for (size_t k = 0; k < d; k++) {
            if (u == 1) {
                plane[0] += z[k] * z[k];
                plane[1] += z[k] * z[d + k];
                plane[2] += z[d + k] * z[d + k];
            }
            if (u > 1) trace += z[k] * z[k];
        }
    }
    free(z);
    return trace;
}

/* ---------------------------------------------------------------------- measures */

static double reach_of(const double *mass, size_t T) {
    double total = 0, sum = 0;
    for (size_t n = 0; n < T; n++) total += mass[n];
    for (size_t n = 0; n < T; n++)
        if ((sum += mass[n]) >= 0.9 * total) return (double)n;
    return (double)(T - 1);
}

HeadMeasure measure_heads(const Config *c, const float *params, size_t T,
                          void (*read)(void *model, int l, int h, int part, float *out), void *model,
                          HeadMeasure *heads) {
    size_t d = (size_t)config_head_size(c), queries = T < MEASURE_QUERIES ? T : MEASURE_QUERIES,
           NH = (size_t)config_heads(c), L = (size_t)c->L;
    float *q = (float *)xmalloc((2 * T * d + T) * sizeof *q), *k = q + T * d, *log_forget = k + T * d;
    /* mass by distance, of a head and of all */
    double *rows = (double *)xmalloc((queries + 2) * T * sizeof *rows), *mass = rows + queries * T, *all = mass + T;
    HeadMeasure mean = {0, 0, 0};
    memset(all, 0, T * sizeof *all);
    for (size_t l = 0; l < L; l++)
        for (size_t h = 0; h < NH; h++) {
            HeadMeasure *m = &heads[l * NH + h];
            read(model, (int)l, (int)h, PART_QUERIES, q);
            read(model, (int)l, (int)h, PART_KEYS, k);
            if (config_is_gated(c, (int)l, (int)h)) read(model, (int)l, (int)h, PART_FORGET, log_forget);
            HeadWeights *w = head_weights_open(c, params, (int)l, (int)h, q, k, log_forget, T);
#pragma omp parallel for schedule(dynamic)
            for (size_t n = 0; n < queries; n++) head_weights_row(w, (n + 1) * T / queries - 1, rows + n * T);
            head_weights_close(w);
            memset(m, 0, sizeof *m);
            memset(mass, 0, T * sizeof *mass);
            for (size_t n = 0; n < queries; n++)
                for (size_t j = 0, i = (n + 1) * T / queries - 1; j < T; j++) {
                    double p = rows[n * T + j];
                    size_t apart = i > j ? i - j : j - i;
                    if (p > 0) m->entropy -= p * log(p) / (double)queries;
                    m->distance += p * (double)apart / (double)queries;
                    mass[apart] += p;
                    all[apart] += p;
                }
            m->reach = reach_of(mass, T);
            mean.entropy += m->entropy / (double)(L * NH);
            mean.distance += m->distance / (double)(L * NH);
        }
    mean.reach = reach_of(all, T);
    free(q);
    free(rows);
    return mean;
}

double config_muon_operations(const Config *c) {
    Tensor tensors[NUM_TENSORS];
    double sum = 0;
    model_tensors(c, tensors);
    for (int i = 0; i < NUM_TENSORS; i++) {
        size_t count = config_muon_matrices(c, i);
        if (!count) continue;
        MuonMatrix x = config_muon_matrix(c, tensors, i, 0);
        double least = (double)(x.rows < x.columns ? x.rows : x.columns), all = (double)(x.rows * x.columns);
        sum += (double)count * MUON_STEPS * (4 * least * all + 2 * least * least * least);
    }
    return sum;
}

double config_operations(const Config *c) {
    double d = config_head_size(c), C = c->C, A = config_width(c), S = c->S, T = c->T,
           sum = c->L * (4 * A * C + 8 * C * C) + (double)c->V * C;
    bool causal = c->objective == OBJECTIVE_LM;
    sum += config_gates(c) * C;
    for (int l = 0; l < c->L; l++)
        for (int h = 0; h < config_heads(c); h++) {
            int kind = config_head_kind(c, l, h);
            double W = kind == HEAD_SPLAT || !c->window || c->window > c->T ? T : c->window,
                   keys = causal ? (W * (W + 1) / 2 + (T - W) * W) / T : 0;
            for (double t = 0; t < T && !causal; t++) keys += (fmin(t + W, T) - fmax(t - W + 1, 0)) / T;
            if (kind != HEAD_SCAN) sum += 2 * keys * d;
            if (kind == HEAD_STANDARD) continue;
            /* responses of a query and a key */
            sum += 2 * S * d * (c->covariance == COVARIANCE_FULL ? d : c->covariance == COVARIANCE_DIAG ? 2 : 1);
            if (kind == HEAD_SPLAT) continue;
            double F = config_has_cosine(c) ? 3 * S : S, pairs = 32.5; /* a chunk of 64 */
            /* scores and values within the chunk, the state read and written */
            sum += (causal ? 1 : 2) * (pairs * (F + d) + 2 * F * d);
        }
    return 6 * sum;
}
