#include "sample.h"

#include <stdlib.h>

typedef struct {
    float weight;
    int token;
} Candidate;

static inline bool before(Candidate a, Candidate b) {
    return a.weight > b.weight || (a.weight == b.weight && a.token < b.token);
}

/* Brings the fewest leading candidates that number `count` or weigh `mass` together to the front of c (n), in no
   order, and returns their number: a quicksort that follows only the part in which the border lies. */
static size_t leading(Candidate *c, size_t n, size_t count, double mass) {
    size_t low = 0, high = n; /* the border is above low and not above high */
    while (high - low > 1) {
        Candidate pivot = c[low + (high - low) / 2];
        double sum = 0;
        size_t k = low;
        for (size_t i = low; i < high; i++) {
            Candidate x = c[i];
            if (!before(x, pivot)) continue;
            sum += (double)x.weight;
            c[i] = c[k];
            c[k++] = x;
        }
        if (k > low && (k >= count || sum >= mass)) {
            high = k;
            continue;
        }
        for (size_t i = k;; i++) /* the pivot follows those before it */
            if (c[i].token == pivot.token) {
                c[i] = c[k];
                c[k++] = pivot;
                break;
            }
        mass -= sum + (double)pivot.weight;
        low = k;
        if (k >= count || mass <= 0) return k;
    }
    return high;
}

static Candidate last_of(const Candidate *c, size_t n) {
    Candidate last = c[0];
    for (size_t i = 1; i < n; i++)
        if (before(last, c[i])) last = c[i];
    return last;
}

int sample_token(Sampler *s, const float *given, int V, const int *recent, size_t recents) {
    float *weight = (float *)xmalloc((size_t)V * sizeof *weight), most;
    int best = 0, choice = -1;
    memcpy(weight, given, (size_t)V * sizeof *weight);
    for (size_t i = 0; i < recents && s->repetition != 1; i++)
        weight[recent[i]] = given[recent[i]] * (float)(given[recent[i]] > 0 ? 1 / s->repetition : s->repetition);
    float lane[16]; /* their largest: a plain loop must care for NaN, and compilers make no vectors of it */
    for (int k = 0; k < 16; k++) lane[k] = weight[0];
    for (int v = 0; v + 16 <= V; v += 16)
        for (int k = 0; k < 16; k++) lane[k] = weight[v + k] > lane[k] ? weight[v + k] : lane[k];
    for (int v = V - V % 16; v < V; v++) lane[0] = weight[v] > lane[0] ? weight[v] : lane[0];
    for (int k = 1; k < 16; k++) lane[0] = lane[k] > lane[0] ? lane[k] : lane[0];
    most = lane[0];
    while (best < V - 1 && weight[best] != most) best++;
    if (s->temperature <= 0) {
        bool finite = isfinite(most);
        for (int v = 0; v < V; v++) finite &= weight[v] <= most; /* NaN is not */
        free(weight);
        return finite ? best : -1;
    }
    const float inverse = (float)fmin(1 / s->temperature, 1e30);
    for (int v = 0; v < V; v++) weight[v] = exp_float((weight[v] - most) * inverse);
    double sum = 0;
    for (int v = 0; v < V; v++) sum += (double)weight[v];
    if (!isfinite(sum)) {
        free(weight);
        return -1;
    }
    Candidate border = {0, V}; /* the last token that may be chosen */
    if ((s->top_k > 0 && s->top_k < V) || s->top_p < 1) {
        Candidate *c = (Candidate *)xmalloc((size_t)V * sizeof *c);
        size_t n = 0;
        /* what is less likely than this does not reach 1 - top_p all together */
        float least = s->top_k > 0 ? 0 : (float)((1 - s->top_p) * sum / V * (1 - 1e-6));
        for (int v = 0; v < V; v++) {
            c[n].weight = weight[v];
            c[n].token = v;
            n += weight[v] >= least;
        }
        if (s->top_k > 0 && s->top_k < V) {
            n = leading(c, n, (size_t)s->top_k, INFINITY);
            sum = 0;
            for (size_t i = 0; i < n; i++) sum += (double)c[i].weight;
        }
        if (s->top_p < 1) n = leading(c, n, n, s->top_p * sum);
        border = last_of(c, n);
        free(c);
    }
    sum = 0;
    for (int v = 0; v < V; v++) {
        Candidate x = {weight[v], v};
        if (before(border, x) || (double)weight[v] < s->min_p) weight[v] = 0;
        sum += (double)weight[v];
    }
    double at = rng_uniform(&s->rng) * sum;
    for (int v = 0; v < V && at >= 0; v++)
        if (weight[v] > 0) {
            choice = v;
            at -= (double)weight[v];
        }
    free(weight);
    return choice;
}
