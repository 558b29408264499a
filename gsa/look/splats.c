#include "splats.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* ---------------------------------------------------------------------- gathering */

SplatStudy *splats_open(const Config *c, size_t T, size_t windows, bool pairs) {
    SplatStudy *a = (SplatStudy *)xcalloc(1, sizeof *a);
    size_t G = (size_t)config_gsa_heads(c), S = (size_t)c->S;
    a->config = *c;
    a->T = T;
    a->room = windows * T;
    a->tokens = (int *)xmalloc(a->room * sizeof *a->tokens);
    a->queries = (float *)xmalloc((2 * G * a->room * S + 1) * sizeof *a->queries);
    a->keys = a->queries + G * a->room * S;
    if (!pairs) return a;
    a->offsets = (double *)xcalloc(G * S * (T + S) + 1, sizeof *a->offsets);
    a->met = a->offsets + G * S * T;
    return a;
}

void splats_close(SplatStudy *a) {
    free(a->tokens);
    free(a->queries);
    free(a->offsets);
    free(a);
}

/* met (S, S) grows by the weights of a sample of queries; q, k (T, S) are responsibilities. */
static void add_meetings(double *met, const HeadWeights *w, const float *q, const float *k, size_t T, size_t S) {
    size_t queries = T < MEASURE_QUERIES ? T : MEASURE_QUERIES;
    double *row = (double *)xmalloc((T + S) * sizeof *row), *given = row + T;
    for (size_t n = 0; n < queries; n++) {
        size_t i = (n + 1) * T / queries - 1;
        head_weights_row(w, i, row);
        memset(given, 0, S * sizeof *given);
        for (size_t j = 0; j < T; j++)
            for (size_t u = 0; u < S; u++) given[u] += row[j] * (double)k[j * S + u];
        for (size_t s = 0; s < S; s++)
            for (size_t u = 0; u < S; u++) met[s * S + u] += (double)q[i * S + s] * given[u];
    }
    free(row);
}

void splats_add(SplatStudy *a, const float *params, const int *x,
                void (*read)(void *model, int l, int h, int part, float *out), void *model) {
    const Config *c = &a->config;
    size_t T = a->T, S = (size_t)c->S, d = (size_t)config_head_size(c), NH = (size_t)config_heads(c);
    memcpy(a->tokens + a->N, x, T * sizeof *x);
#pragma omp parallel for schedule(dynamic)
    for (size_t i = 0; i < (size_t)c->L * NH; i++) {
        int l = (int)(i / NH), h = (int)(i % NH);
        if (!config_is_gsa(c, l, h)) continue;
        size_t g = (size_t)config_gsa_before(c, l, h);
        float *in = (float *)xmalloc((2 * d + 1) * T * sizeof *in), *log_forget = in + 2 * T * d;
        double *r = (double *)xmalloc(T * S * sizeof *r);
        for (int side = 0; side < 2; side++) {
            float *out = (side ? a->keys : a->queries) + (g * a->room + a->N) * S;
            read(model, l, h, side ? PART_KEYS : PART_QUERIES, in + (size_t)side * T * d);
            head_responsibilities(c, params, l, h, in + (size_t)side * T * d, T, r);
            for (size_t n = 0; n < T * S; n++) out[n] = (float)r[n];
        }
        if (a->offsets) {
            if (config_is_gated(c, l, h)) read(model, l, h, PART_FORGET, log_forget);
            HeadWeights *w = head_weights_open(c, params, l, h, in, in + T * d, log_forget, T);
            head_offsets(w, a->offsets + g * S * T);
            add_meetings(a->met + g * S * S, w, a->queries + (g * a->room + a->N) * S,
                         a->keys + (g * a->room + a->N) * S, T, S);
            head_weights_close(w);
        }
        free(in);
        free(r);
    }
    a->N += T;
}

size_t distance_bins(size_t T, size_t *first) {
    size_t bins = 0;
    for (size_t n = 0; n < T; n = n < 4 ? n + 1 : (n & (n - 1)) == 0 ? n / 2 * 3 : n / 3 * 4) first[bins++] = n;
    first[bins] = T;
    return bins;
}

void splat_offsets(const SplatStudy *a, size_t g, size_t s, const size_t *first, size_t bins, double *out) {
    const double *sum = a->offsets + (g * (size_t)a->config.S + s) * a->T;
    for (size_t b = 0; b < bins; b++) {
        out[b] = 0;
        for (size_t n = first[b]; n < first[b + 1]; n++) out[b] += sum[n] / (double)(first[b + 1] - first[b]);
        out[b] *= (double)a->T / (double)a->N;
    }
}

size_t splat_partners(const SplatStudy *a, size_t g, size_t s, size_t most, int *splats, float *shares) {
    size_t S = (size_t)a->config.S, count = 0;
    const double *met = a->met + (g * S + s) * S;
    double total = 0, before = INFINITY;
    for (size_t u = 0; u < S; u++) total += met[u];
    for (int last = -1; count < most; count++) { /* the largest below the last one; of equal ones the first */
        int best = -1;
        for (size_t u = 0; u < S; u++)
            if ((met[u] < before || (met[u] == before && (int)u > last)) && (best < 0 || met[u] > met[best]))
                best = (int)u;
        if (best < 0 || !(met[best] > 0.01 * total)) break;
        before = met[best];
        last = best;
        splats[count] = best;
        shares[count] = (float)(met[best] / total);
    }
    return count;
}

/* ---------------------------------------------------------------------- tokens of a splat */

void strongest_splats(const float *r, size_t N, size_t S, int *owner) {
    for (size_t i = 0; i < N; i++) {
        owner[i] = 0;
        for (size_t s = 1; s < S; s++)
            if (r[i * S + s] > r[i * S + (size_t)owner[i]]) owner[i] = (int)s;
    }
}

typedef struct {
    double value;
    size_t place;
} Ranked;

static int by_value(const void *a, const void *b) {
    const Ranked *x = (const Ranked *)a, *y = (const Ranked *)b;
    if (x->value != y->value) return x->value < y->value ? 1 : -1;
    return x->place < y->place ? -1 : x->place > y->place;
}

size_t splat_places(const float *r, const int *tokens, size_t N, size_t S, size_t s, size_t each, size_t most,
                    size_t *places) {
    Ranked *own = (Ranked *)xmalloc((N + 1) * sizeof *own);
    size_t owned = 0, count = 0;
    for (size_t i = 0; i < N; i++) {
        bool first = true;
        for (size_t u = 0; u < S; u++) first = first && r[i * S + u] <= r[i * S + s];
        own[owned].value = (double)r[i * S + s];
        own[owned].place = i;
        owned += first;
    }
    qsort(own, owned, sizeof *own, by_value);
    for (size_t i = 0; i < owned && count < most; i++) {
        size_t same = 0;
        for (size_t k = 0; k < count; k++) same += tokens[places[k]] == tokens[own[i].place];
        if (same < each) places[count++] = own[i].place;
    }
    free(own);
    return count;
}

size_t splat_tokens(const float *r, const int *tokens, size_t N, size_t S, size_t s, size_t V, size_t most, int *ids) {
    double *mass = (double *)xcalloc(2 * V, sizeof *mass), *seen = mass + V, total = 0;
    Ranked *typical = (Ranked *)xmalloc(V * sizeof *typical);
    size_t count = 0;
    for (size_t i = 0; i < N; i++) {
        mass[tokens[i]] += (double)r[i * S + s];
        total += (double)r[i * S + s];
        seen[tokens[i]]++;
    }
    for (size_t v = 0; v < V; v++) {
        typical[v].place = v;
        typical[v].value = (mass[v] + SPLAT_TOKEN_PRIOR * total / (double)N) / (seen[v] + SPLAT_TOKEN_PRIOR);
    }
    qsort(typical, V, sizeof *typical, by_value);
    while (count < most && count < V && typical[count].value > 1.0001 * total / (double)N) {
        ids[count] = (int)typical[count].place;
        count++;
    }
    free(mass);
    free(typical);
    return count;
}

/* ---------------------------------------------------------------------- information */

double mutual_information(const int *a, size_t A, const int *b, size_t B, size_t N) {
    double *both = (double *)xcalloc(A * B + A + B, sizeof *both), *of_a = both + A * B, *of_b = of_a + A, sum = 0;
    for (size_t i = 0; i < N; i++) {
        both[(size_t)a[i] * B + (size_t)b[i]]++;
        of_a[a[i]]++;
        of_b[b[i]]++;
    }
    for (size_t i = 0; i < A * B; i++)
        if (both[i] > 0) sum += both[i] / (double)N * log(both[i] * (double)N / (of_a[i / B] * of_b[i % B]));
    free(both);
    return sum;
}

double shuffled_information(const int *a, size_t A, const int *b, size_t B, size_t N, int shuffles, uint64_t seed) {
    int *mixed = (int *)xmalloc((N + 1) * sizeof *mixed);
    double sum = 0;
    memcpy(mixed, b, N * sizeof *mixed);
    for (int round = 0; round < shuffles; round++) {
        for (size_t i = N; i > 1; i--) {
            size_t other = (size_t)rng_below(&seed, i);
            int was = mixed[i - 1];
            mixed[i - 1] = mixed[other];
            mixed[other] = was;
        }
        sum += mutual_information(a, A, mixed, B, N) / shuffles;
    }
    free(mixed);
    return sum;
}
