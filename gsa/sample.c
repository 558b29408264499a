#include "sample.h"

#include <math.h>
#include <stdlib.h>

typedef struct {
    double p;
    int token;
} Candidate;

static int by_probability(const void *a, const void *b) {
    const Candidate *x = (const Candidate *)a, *y = (const Candidate *)b;
    if (x->p != y->p) return x->p < y->p ? 1 : -1;
    return (x->token > y->token) - (x->token < y->token);
}

int sample_token(Sampler *s, const float *logits, int V) {
    int best = 0;
    for (int v = 1; v < V; v++)
        if (logits[v] > logits[best]) best = v;
    if (s->temperature <= 0) return best;
    Candidate *all = (Candidate *)xmalloc((size_t)V * sizeof *all);
    double sum = 0, kept = 0;
    int n = V;
    for (int v = 0; v < V; v++) {
        all[v].p = exp(((double)logits[v] - logits[best]) / s->temperature);
        all[v].token = v;
        sum += all[v].p;
    }
    if (s->top_k > 0 || s->top_p < 1) qsort(all, (size_t)V, sizeof *all, by_probability);
    if (s->top_k > 0 && s->top_k < V) {
        n = s->top_k, sum = 0;
        for (int i = 0; i < n; i++) sum += all[i].p;
    }
    if (s->top_p < 1) {
        int i = 0;
        while (i < n && kept < s->top_p * sum) kept += all[i++].p;
        n = i > 0 ? i : 1, sum = i > 0 ? kept : all[0].p;
    }
    double at = rng_uniform(&s->rng) * sum;
    int choice = n - 1;
    for (int i = 0; i < n; i++)
        if ((at -= all[i].p) < 0) {
            choice = i;
            break;
        }
    choice = all[choice].token;
    free(all);
    return choice;
}
