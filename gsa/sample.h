/* The choice of the next token from logits. */
#ifndef GSA_SAMPLE_H
#define GSA_SAMPLE_H

#include "util.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
    double temperature; /* 0: always the most likely token (the smallest id of equals) */
    int top_k;          /* choose among the k most likely; 0: all */
    double top_p;       /* choose among the most likely that together have probability p; 1: all */
    uint64_t rng;
} Sampler;

/* logits (V); temperature, then top_k, then top_p, renormalised. */
int sample_token(Sampler *s, const float *logits, int V);

#ifdef __cplusplus
}
#endif
#endif
