/* The choice of the next token from logits. */
#ifndef GSA_SAMPLE_H
#define GSA_SAMPLE_H

#include "util.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Applied in this order; what is left is renormalised after each. Of equally likely tokens the smaller id comes
   first. */
typedef struct {
    /* logits of recent tokens are divided by it where positive, multiplied by it where negative; 1: none */
    double repetition;
    double temperature; /* logits are divided by it; 0: always the most likely token */
    int top_k;          /* choose among the k most likely; 0: all */
    double top_p;       /* choose among the fewest most likely that together have probability p; 1: all */
    double min_p;       /* choose among those at least p times as likely as the most likely; 0: all */
    uint64_t rng;
} Sampler;

/* logits (V); recent: the n tokens that the repetition penalty is for, in any order. -1 where the logits are not
   finite: not a usable model. */
int sample_token(Sampler *s, const float *logits, int V, const int *recent, size_t n);

#ifdef __cplusplus
}
#endif
#endif
