#include "into_splats.h"

#include "../look/measure.h"
#include "starts.h"

#include <stdlib.h>

/* Tokens that heads are measured and fitted on, windows that tell how far heads attend, keys for k-means. */
enum { TOKENS = 16384, MEASURED = 8, KEYS = 4096 };
#define FIT_RATE 0.01 /* of Adam; over the second half of the steps it falls to 0 */

/* ---------------------------------------------------------------------- the divergence and its gradient */

size_t splats_room(const Config *c) { return (size_t)c->S * ((size_t)config_head_size(c) + 5); }

HeadSplats head_splats(const Config *c, float *room) {
    size_t S = (size_t)c->S;
    float *scalars = room + S * (size_t)config_head_size(c);
    return (HeadSplats){room, scalars, scalars + S, scalars + 2 * S, scalars + 3 * S, scalars + 4 * S};
}

/* e_s(n) and what it changes by with ln theta, ln delta and psi; n: how far the key lies before the query. */
typedef struct {
    double value, theta, delta, psi;
} Envelope;
static Envelope envelope(const Config *c, const HeadSplats *p, size_t s, double n) {
    Envelope e = {1, 0, 0, 0};
    double theta = exp((double)p->log_theta[s]), delta = exp((double)p->log_delta[s]),
           angle = theta * n - (double)p->psi[s], fade = config_has_decay(c) ? exp(-delta * fabs(n)) : 1;
    if (config_has_cosine(c)) {
        double share = c->mixer == MIXER_LINEAR ? 0.5 : 1; /* (1 + cos) / 2 or cos */
        e.value = share * cos(angle) + (1 - share);
        e.psi = share * sin(angle) * fade;
        e.theta = -e.psi * theta * n;
    }
    e.value *= fade;
    if (config_has_decay(c)) e.delta = -delta * fabs(n) * e.value;
    return e;
}

/* Unit vectors of n queries or keys x, and ln phi of all splats (S, n) there. */
static void respond(const Config *c, const HeadSplats *p, const float *x, size_t n, float *unit, float *log_phi) {
    size_t d = (size_t)config_head_size(c), S = (size_t)c->S;
    for (size_t t = 0; t < n; t++) {
        const float *from = x + t * d;
        float square = 1e-6f;
        for (size_t k = 0; k < d; k++) square += from[k] * from[k];
        for (size_t k = 0; k < d; k++) unit[t * d + k] = from[k] / sqrtf(square);
        for (size_t s = 0; s < S; s++) {
            float far = 0;
#pragma omp simd reduction(+ : far)
            for (size_t k = 0; k < d; k++) {
                float along = unit[t * d + k] - p->mu[s * d + k];
                far += along * along;
            }
            log_phi[s * n + t] = -0.5f * expf(p->log_precision[s]) * far;
        }
    }
}

/* d (S, n): gradients of ln phi, into those of centres and precisions */
static void respond_backward(const Config *c, const HeadSplats *p, const float *unit, const float *log_phi, size_t n,
                             const float *d_log_phi, const HeadSplats *g) {
    size_t d = (size_t)config_head_size(c);
    for (size_t s = 0; s < (size_t)c->S; s++) {
        float precision = expf(p->log_precision[s]);
        for (size_t t = 0; t < n; t++) {
            float pull = d_log_phi[s * n + t];
            g->log_precision[s] += pull * log_phi[s * n + t];
            for (size_t k = 0; k < d; k++) g->mu[s * d + k] += pull * precision * (unit[t * d + k] - p->mu[s * d + k]);
        }
    }
}

/* A row of weights from its sums A (n) over splats: the divergence from old (n); A becomes its gradient. */
static double row_divergence(bool softmax, float *A, const float *old, size_t n) {
    double sum = 0, loss = 0;
    float most = -INFINITY;
    for (size_t j = 0; j < n; j++) most = fmaxf(most, A[j]);
    double top = (double)most;
    for (size_t j = 0; j < n; j++) sum += softmax ? exp((double)A[j] - top) : (double)A[j];
    /* no splat responds to this query and its keys, or cosines have cancelled all: nothing to learn here */
    if (!(sum > 0)) {
        memset(A, 0, n * sizeof *A);
        return 0;
    }
    double log_sum = log(sum), least = softmax ? 0 : 1e-9 * sum;
    for (size_t j = 0; j < n; j++) {
        double p = (double)old[j], a = fmax((double)A[j], least),
               log_w = softmax ? (double)A[j] - top - log_sum : log(a) - log_sum;
        if (p > 0) loss += p * (log(p) - log_w);
        A[j] = (float)(softmax ? exp(log_w) - p : 1 / sum - p / a);
    }
    return loss;
}

/* uq, uk (S, T): what queries and keys bring into sums, from ln phi: of the linear mixer divided by their largest,
   which weights that are divided by their sum do not change with. */
static void strengths(const Config *c, const HeadSplats *p, const float *at_q, const float *at_k, size_t T, float *uq,
                      float *uk) {
    size_t S = (size_t)c->S;
    bool linear = c->mixer == MIXER_LINEAR;
    float most = linear ? -INFINITY : 0;
    for (size_t i = 0; linear && i < S * T; i++) most = fmaxf(most, at_k[i]);
    for (size_t i = 0; i < S * T; i++) uk[i] = expf(at_k[i] - most);
    for (size_t i = 0; i < T; i++) {
        most = linear ? -INFINITY : 0;
        for (size_t s = 0; s < S && linear; s++) most = fmaxf(most, p->log_alpha[s] + at_q[s * T + i]);
        for (size_t s = 0; s < S; s++) uq[s * T + i] = expf(p->log_alpha[s] + at_q[s * T + i] - most);
    }
}

double splats_divergence(const Config *c, const float *splats, const float *q, const float *k, const float *old,
                         size_t T, float *gradient) {
    /* R distances, backwards, so that they run along with a query's keys: e_s(i - j) is entry T - 1 - i + j */
    const bool causal = c->objective == OBJECTIVE_LM;
    const size_t d = (size_t)config_head_size(c), S = (size_t)c->S, R = causal ? T : 2 * T;
    HeadSplats p = head_splats(c, (float *)splats); /* only read */
    float *xq = (float *)xcalloc(2 * T * d + 6 * S * T + 2 * S * R + T, sizeof *xq), *xk = xq + T * d,
          *at_q = xk + T * d, *at_k = at_q + S * T, *uq = at_k + S * T, *uk = uq + S * T, *dq = uk + S * T,
          *dk = dq + S * T, *e = dk + S * T, *de = e + S * R, *A = de + S * R;
    Envelope *by = (Envelope *)xmalloc(S * R * sizeof *by);
    double loss = 0;
    respond(c, &p, q, T, xq, at_q);
    respond(c, &p, k, T, xk, at_k);
    strengths(c, &p, at_q, at_k, T, uq, uk);
    for (size_t i = 0; i < S * R; i++) {
        by[i] = envelope(c, &p, i / R, (double)T - 1 - (double)(i % R));
        e[i] = (float)by[i].value;
    }
    for (size_t i = 0; i < T; i++) {
        const size_t keys = causal ? i + 1 : T, shift = T - 1 - i;
        memset(A, 0, T * sizeof *A);
        for (size_t s = 0; s < S; s++) {
            const float u = uq[s * T + i], *of_keys = uk + s * T, *by_distance = e + s * R + shift;
            for (size_t j = 0; j < keys; j++) A[j] += u * of_keys[j] * by_distance[j];
        }
        loss += row_divergence(c->mixer == MIXER_SOFTMAX, A, old + i * T, keys) / (double)T;
        for (size_t s = 0; s < S && gradient; s++) {
            const float u = uq[s * T + i] / (float)T, *of_keys = uk + s * T, *by_distance = e + s * R + shift;
            float *to_keys = dk + s * T, *to_distance = de + s * R + shift, sum = 0;
#pragma omp simd reduction(+ : sum)
            for (size_t j = 0; j < keys; j++) {
                float along = A[j] * u * of_keys[j], whole = along * by_distance[j];
                to_keys[j] += whole;
                to_distance[j] += along;
                sum += whole;
            }
            dq[s * T + i] = sum;
        }
    }
    if (gradient) {
        HeadSplats g = head_splats(c, gradient);
        respond_backward(c, &p, xq, at_q, T, dq, &g);
        respond_backward(c, &p, xk, at_k, T, dk, &g);
        for (size_t i = 0; i < S * T; i++) g.log_alpha[i / T] += dq[i];
        for (size_t i = 0; i < S * R; i++) {
            g.log_theta[i / R] += (float)(by[i].theta * (double)de[i]);
            g.log_delta[i / R] += (float)(by[i].delta * (double)de[i]);
            g.psi[i / R] += c->phase ? (float)(by[i].psi * (double)de[i]) : 0;
        }
    }
    free(by);
    free(xq);
    return loss;
}

/* ---------------------------------------------------------------------- the fit */

static float within(float x, double low, double high) { return (float)fmin(fmax((double)x, low), high); }

/* The bounds that every update keeps (gsa/model.h); middle: of ln alpha. */
static void put_back(const Config *c, const HeadSplats *p, double middle) {
    size_t d = (size_t)config_head_size(c);
    for (size_t s = 0; s < (size_t)c->S; s++) {
        p->log_precision[s] = within(p->log_precision[s], log(SPLAT_PRECISION_MIN), log(SPLAT_PRECISION_MAX));
        double square = 0;
        for (size_t k = 0; k < d; k++) square += (double)p->mu[s * d + k] * (double)p->mu[s * d + k];
        double most = fmin(SPLAT_CENTRE_MAX, SPLAT_SLOPE_MAX / exp((double)p->log_precision[s]));
        for (size_t k = 0; k < d && sqrt(square) > most; k++) p->mu[s * d + k] *= (float)(most / sqrt(square));
        p->log_alpha[s] = within(p->log_alpha[s], middle - SPLAT_AMPLITUDE_RANGE, middle + SPLAT_AMPLITUDE_RANGE);
        p->log_theta[s] = within(p->log_theta[s], -INFINITY, log(SPLAT_FREQUENCY_MAX));
        p->log_delta[s] = within(p->log_delta[s], -INFINITY, log(SPLAT_DECAY_MAX));
        if (c->mixer == MIXER_LINEAR) p->psi[s] = within(p->psi[s], -SPLAT_PHASE_MAX, SPLAT_PHASE_MAX);
    }
}

/* What a head saw: queries and keys q, k (windows, T, d), whom it attended to, old (windows, T, T). */
typedef struct {
    size_t windows, T;
    float *q, *k, *log_forget; /* the last of gated heads, (windows, T) */
} Seen;

/* Adam on the splats until they attend as the old head did. before, after: the mean divergence of all windows. */
static void fit(const Config *c, float *splats, const Seen *seen, const float *old, int64_t steps, uint64_t rng,
                double *before, double *after) {
    const size_t room = splats_room(c), T = seen->T, size = T * (size_t)config_head_size(c);
    float *g = (float *)xcalloc(3 * room, sizeof *g), *m = g + room, *v = m + room;
    HeadSplats p = head_splats(c, splats);
    const double middle = (double)p.log_alpha[0];
    *before = *after = 0;
    for (size_t w = 0; w < seen->windows; w++)
        *before += splats_divergence(c, splats, seen->q + w * size, seen->k + w * size, old + w * T * T, T, NULL) /
                   (double)seen->windows;
    for (int64_t step = 1; step <= steps; step++) {
        size_t w = (size_t)rng_below(&rng, seen->windows);
        memset(g, 0, room * sizeof *g);
        splats_divergence(c, splats, seen->q + w * size, seen->k + w * size, old + w * T * T, T, g);
        double rate = FIT_RATE * fmin(1, 2 * (1 - (double)(step - 1) / (double)steps)),
               bias1 = 1 - pow(0.9, (double)step), bias2 = 1 - pow(0.999, (double)step);
        for (size_t i = 0; i < room; i++) {
            m[i] += 0.1f * (g[i] - m[i]);
            v[i] += 0.001f * (g[i] * g[i] - v[i]);
            splats[i] -= (float)(rate * ((double)m[i] / bias1) / (sqrt((double)v[i] / bias2) + 1e-8));
        }
        put_back(c, &p, middle);
    }
    for (size_t w = 0; w < seen->windows; w++)
        *after += splats_divergence(c, splats, seen->q + w * size, seen->k + w * size, old + w * T * T, T, NULL) /
                  (double)seen->windows;
    free(g);
}

/* ---------------------------------------------------------------------- the old model at work */

typedef struct {
    Run *run;
    Config config;
    float *params;
    void *model; /* the back end's, of one window */
    int tokens;  /* of a window */
} Old;

static void read_old(void *from, int l, int h, int part, float *out) {
    const Old *o = (const Old *)from;
    o->run->backend->head(o->model, l, h, part, o->tokens, out);
}

/* The next window of the training data through the old model. */
static void old_forward(Old *o, uint64_t draw) {
    int *x = (int *)xmalloc(2 * (size_t)o->config.T * sizeof *x);
    next_batch(o->run, o->run->train, x, x + o->config.T, 1, draw);
    o->run->backend->forward(o->model, x, NULL, 1, o->tokens);
    free(x);
}

/* distance (L, NH): how far heads attend, in tokens, the mean over some windows */
static void measure_distances(Old *o, size_t windows, double *distance) {
    size_t heads = (size_t)o->config.L * (size_t)o->config.NH;
    HeadMeasure *each = (HeadMeasure *)xmalloc(heads * sizeof *each);
    for (size_t w = 0; w < windows; w++) {
        old_forward(o, w);
        measure_heads(&o->config, o->params, (size_t)o->tokens, read_old, o, each);
        for (size_t h = 0; h < heads; h++) distance[h] += each[h].distance / (double)windows;
    }
    free(each);
}

/* The `count` heads of a layer from `first` to `end` that attend nearest, as bits. */
static uint64_t nearest_heads(const double *distance, int first, int end, int count) {
    uint64_t heads = 0;
    while (count-- > 0) {
        int nearest = -1;
        for (int h = first; h < end; h++)
            if (!(heads >> h & 1) && (nearest < 0 || distance[h] < distance[nearest])) nearest = h;
        heads |= 1ull << nearest;
    }
    return heads;
}

/* Of each layer as many heads as c has there, those that attend nearest. Where the first half of a layer's heads have
   forget gates, the first half of those that stay must be theirs: so many of either half go. */
static void choose_heads(Config *c, const double *distance) {
    for (int l = 0; l < c->L; l++, distance += c->NH) {
        int count = __builtin_popcountll(c->gsa_heads[l]), stay = c->NH - count, first = c->NH, of_first = count;
        if (c->forget == FORGET_HALF) {
            first = (c->NH + 1) / 2;
            of_first = first - (stay + 1) / 2;
        }
        c->gsa_heads[l] = nearest_heads(distance, 0, first, of_first);
        c->gsa_heads[l] |= nearest_heads(distance, first, c->NH, count - of_first);
    }
}

static void check_gates(const Config *c, const Config *old, const char *path) {
    for (int l = 0; l < c->L; l++)
        for (int h = 0; h < c->NH; h++)
            if (!config_is_gsa(c, l, h) && config_is_gated(c, l, h) != config_is_gated(old, l, h))
                die_usage(
                    "--gsa-heads: head %d:%d would %s a forget gate that it has %s in %s, because gates are in the "
                    "first half of the heads that stay; take as many heads of the first half as of the others",
                    l, h, config_is_gated(c, l, h) ? "get" : "lose", config_is_gated(c, l, h) ? "not" : "now", path);
}

/* All tensors but those of splats: of heads that stay their rows of gains, rotations and gates, of all else every
   number. */
static void keep(const Config *c, float *flat, const Config *old, const float *from) {
    Tensor to[NUM_TENSORS], was[NUM_TENSORS];
    model_tensors(c, to);
    model_tensors(old, was);
    for (int i = 0; i < NUM_TENSORS; i++) {
        size_t row = tensor_row(&to[i]);
        bool gates = i == TENSOR_forgetw || i == TENSOR_forgetb,
             rotations = i == TENSOR_log_gain || i == TENSOR_log_rope;
        if (tensor_is_splat(i) || !to[i].size) continue;
        if (!gates && !rotations) {
            memcpy(flat + to[i].offset, from + was[i].offset, to[i].size * sizeof *flat);
            continue;
        }
        for (int l = 0; l < c->L; l++)
            for (int h = 0; h < c->NH; h++) {
                if (config_is_gsa(c, l, h)) continue;
                int there = gates ? config_gates_before(c, l, h) : config_standard_before(c, l, h),
                    here = gates ? config_gates_before(old, l, h) : config_standard_before(old, l, h);
                memcpy(flat + to[i].offset + (size_t)there * row, from + was[i].offset + (size_t)here * row,
                       row * sizeof *flat);
            }
    }
}

/* Queries, keys and gates of all heads that get splats, in order of layer and head. */
static Seen *watch_heads(Old *o, const Config *c, size_t windows) {
    const size_t T = (size_t)o->tokens, size = T * (size_t)config_head_size(c);
    Seen *all = (Seen *)xcalloc((size_t)config_gsa_heads(c), sizeof *all);
    for (size_t w = 0; w < windows; w++) {
        old_forward(o, w);
        for (int l = 0; l < c->L; l++)
            for (int h = 0; h < c->NH; h++) {
                if (!config_is_gsa(c, l, h)) continue;
                Seen *seen = &all[config_gsa_before(c, l, h)];
                if (w == 0)
                    *seen = (Seen){windows, T, (float *)xmalloc(windows * size * sizeof(float)),
                                   (float *)xmalloc(windows * size * sizeof(float)),
                                   (float *)xmalloc(windows * T * sizeof(float))};
                read_old(o, l, h, PART_QUERIES, seen->q + w * size);
                read_old(o, l, h, PART_KEYS, seen->k + w * size);
                if (config_is_gated(&o->config, l, h)) read_old(o, l, h, PART_FORGET, seen->log_forget + w * T);
            }
    }
    return all;
}

/* One head's splats: from the tensors of flat, where they are as at the start of any run, to its keys' k-means, through
   the fit and back. divergence: before and after. */
static void head_into_splats(const Run *r, const Old *o, int l, int h, const Seen *seen, float *flat,
                             double divergence[2]) {
    static const int of[] = {TENSOR_mu,        TENSOR_log_precision, TENSOR_log_alpha,
                             TENSOR_log_theta, TENSOR_log_delta,     TENSOR_psi};
    const Config *c = &r->config;
    const size_t d = (size_t)config_head_size(c), S = (size_t)c->S, T = seen->T, g = (size_t)config_gsa_before(c, l, h),
                 tokens = seen->windows * T, every = (tokens + KEYS - 1) / KEYS, count = (tokens + every - 1) / every;
    float *splats = (float *)xcalloc(splats_room(c), sizeof *splats), *old = (float *)xmalloc(tokens * T * sizeof *old),
          *keys = (float *)xmalloc(count * d * sizeof *keys);
    HeadSplats p = head_splats(c, splats);
    float *const parts[] = {p.mu, p.log_precision, p.log_alpha, p.log_theta, p.log_delta, p.psi};
    double *row = (double *)xmalloc(T * sizeof *row);
    for (size_t w = 0; w < seen->windows; w++) {
        HeadWeights *weights = head_weights_open(&o->config, o->params, l, h, seen->q + w * T * d, seen->k + w * T * d,
                                                 seen->log_forget + w * T, T);
        for (size_t i = 0; i < T; i++) {
            head_weights_row(weights, i, row);
            for (size_t j = 0; j < T; j++) old[(w * T + i) * T + j] = (float)row[j];
        }
        head_weights_close(weights);
    }
    for (size_t i = 0; i < count; i++) memcpy(keys + i * d, seen->k + i * every * d, d * sizeof *keys);
    start_kmeans(flat + r->tensors[TENSOR_mu].offset + g * S * d, c->S, keys, count, (int)d,
                 rng_mix((uint64_t)r->settings->seed, g));
    for (int back = 0; back < 2; back++) {
        for (size_t i = 0; i < sizeof of / sizeof *of; i++) {
            const Tensor *t = &r->tensors[of[i]];
            float *there = flat + t->offset + g * tensor_row(t);
            if (t->size) memcpy(back ? there : parts[i], back ? parts[i] : there, tensor_row(t) * sizeof *there);
        }
        if (!back)
            fit(c, splats, seen, old, r->settings->fit, rng_mix((uint64_t)r->settings->seed, ~g), &divergence[0],
                &divergence[1]);
    }
    free(splats);
    free(old);
    free(keys);
    free(row);
}

static void print_layers(const Config *c, const double *distance, const double *divergence) {
    for (int l = 0; l < c->L; l++) {
        printf("into splats   layer %d:", l);
        for (int h = 0; h < c->NH; h++) {
            const double *of = divergence + 2 * config_gsa_before(c, l, h);
            if (config_is_gsa(c, l, h))
                printf(" head %d, distance %.1f, divergence %.3f, fitted %.3f;", h, distance[l * c->NH + h], of[0],
                       of[1]);
        }
        printf(" kept:");
        for (int h = 0; h < c->NH; h++)
            if (!config_is_gsa(c, l, h)) printf(" %d (%.1f)", h, distance[l * c->NH + h]);
        printf("\n");
    }
    fflush(stdout);
}

void into_splats(Run *r, const Checkpoint *start, float *flat) {
    Config *c = &r->config;
    if (r->ranks->count > 1)
        die_usage("--attention %s turns heads of %s into splats, which one process does: run this once with --steps 1 "
                  "on one GPU, and start from that model on all",
                  r->settings->attention, start->path);
    Old o = {.run = r, .config = start->config};
    o.config.T = c->T;
    o.tokens = c->T < MEASURE_TOKENS ? c->T : MEASURE_TOKENS;
    Tensor tensors[NUM_TENSORS];
    o.params = (float *)xcalloc(model_tensors(&o.config, tensors), sizeof *o.params);
    checkpoint_read_tensors(start, "", o.params);
    o.model = r->backend->create(&o.config, 1);
    r->backend->write(o.model, BUFFER_PARAMS, o.params);
    const size_t windows = (size_t)(TOKENS / o.tokens), measured = windows < MEASURED ? windows : MEASURED;
    double *distance = (double *)xcalloc((size_t)c->L * (size_t)c->NH, sizeof *distance);
    LoaderState before = loader_state(r->train);
    measure_distances(&o, measured, distance);
    if (!r->settings->gsa_heads || !strchr(r->settings->gsa_heads, ':')) choose_heads(c, distance);
    check_gates(c, &o.config, start->path);
    r->total = model_tensors(c, r->tensors);
    loader_set_state(r->train, before);
    Seen *seen = watch_heads(&o, c, windows);
    loader_set_state(r->train, before);
    r->backend->destroy(o.model);
    keep(c, flat, &o.config, o.params);
    const int heads = config_gsa_heads(c);
    double *divergence = (double *)xmalloc(2 * (size_t)heads * sizeof *divergence);
#pragma omp parallel for schedule(dynamic)
    for (int g = 0; g < heads; g++) {
        int l = 0, h = 0;
        while (!config_is_gsa(c, l, h) || config_gsa_before(c, l, h) != g) {
            h = (h + 1) % c->NH;
            l += h == 0;
        }
        head_into_splats(r, &o, l, h, &seen[g], flat, divergence + 2 * g);
        free(seen[g].q);
        free(seen[g].k);
        free(seen[g].log_forget);
    }
    print_layers(c, distance, divergence);
    free(seen);
    free(divergence);
    free(distance);
    free(o.params);
}
