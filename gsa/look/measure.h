/* What heads do on a text: whom each token attends to, how widely and how far. Computed in double from queries and
   keys by the equations themselves, every mode of attention, whichever back end made q and k: slow, simple, and no
   part of training. */
#ifndef GSA_MEASURE_H
#define GSA_MEASURE_H

#include "../model.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Head (l, h) of the model with these flat parameters on a text of T tokens; q, k (T, HS) are its queries and keys
   before any feature map; log_forget (T): ln f of a gated head, else not looked at. */
typedef struct HeadWeights HeadWeights;
HeadWeights *head_weights_open(const Config *c, const float *params, int l, int h, const float *q, const float *k,
                               const float *log_forget, size_t T);
/* w (T): the weights of query i, o_i = sum_j w_j v_j: equation (4), (5) or (12), the latter two by |w_ij| and
   without the epsilon of the row sum. Not negative; their sum is 1, or all are 0 where every weight underflows. */
void head_weights_row(const HeadWeights *w, size_t i, double *row);
/* sum (S, T) grows by what each splat adds at each distance, the mean over the pairs of tokens that far apart: to the
   logit, A_s(i,j) of equation (3) in nats; of the linear mixer to the weight, its share of the row's sum. */
void head_offsets(const HeadWeights *w, double *sum);
void head_weights_close(HeadWeights *w);

/* r (T, S): responsibilities of a GSA head's splats for its queries or its keys x (T, HS), softmax over s of ln
   alpha_s + ln phi_s(x^), equation (11); 0 for dead slots. */
void head_responsibilities(const Config *c, const float *params, int l, int h, const float *x, size_t T, double *r);
/* The covariance of splat s of GSA head g, the inverse of its Lambda, in the plane of two directions (2, HS): xx,
   xy, yy. Returns its trace. */
double splat_covariance(const Config *c, const float *params, size_t g, size_t s, const float *directions,
                        double plane[3]);

/* With p_ij the weights of a sample of queries, spread evenly over the text. */
typedef struct {
    double entropy;  /* mean of -sum_j p_ij ln p_ij, in nats: exp of it is a number of tokens */
    double distance; /* mean of sum_j p_ij |i - j|, in tokens */
    double reach;    /* the smallest distance within which 90 % of all weight lies, in tokens */
} HeadMeasure;

/* Measures all heads: heads (L, config_heads) and their mean, whose reach is that of all heads' weight together.
   read copies a part (PART_...) of a head to out. T of at most MEASURE_TOKENS is enough. */
enum { MEASURE_TOKENS = 1024, MEASURE_QUERIES = 64 };
HeadMeasure measure_heads(const Config *c, const float *params, size_t T,
                          void (*read)(void *model, int l, int h, int part, float *out), void *model,
                          HeadMeasure *heads);

/* Operations of one token in training, as multiplications and additions: every weight of a matrix product once
   forward and twice backward; a softmax head likewise for the scores of the keys that it sees on average, and for
   their values; a scan head for its features and its state. */
double config_operations(const Config *c);
/* Likewise of all products of an update by Muon, equation (13); 0 by AdamW. */
double config_muon_operations(const Config *c);

#ifdef __cplusplus
}
#endif
#endif
