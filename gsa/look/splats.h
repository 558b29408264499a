/* What splats stand for: which tokens of a text they own and where, what they add by distance, and how much they say
   about classes of tokens. Computed in double, from plain arrays. */
#ifndef GSA_SPLATS_H
#define GSA_SPLATS_H

#include "measure.h"

#ifdef __cplusplus
extern "C" {
#endif

/* What the splats of a model's G GSA heads do on windows of a text, S slots a head. */
typedef struct {
    Config config;
    size_t T, N, room; /* tokens of a window; seen so far; at most */
    int *tokens;       /* (N) */
    float *queries;    /* (G, room, S): responsibilities, equation (11); dead slots 0 */
    float *keys;       /* likewise */
    double *offsets;   /* (G, S, T): what a splat adds by distance, head_offsets, summed over the windows; or NULL */
    double *met;       /* (G, S, S): weight that queries give to keys, by the splats of both; or NULL */
} SplatStudy;

/* pairs: gather offsets and met too, which looks at all pairs of tokens in a window */
SplatStudy *splats_open(const Config *c, size_t T, size_t windows, bool pairs);
/* One window x (T) that the model has just seen: read copies a part (PART_...) of a head to out. */
void splats_add(SplatStudy *a, const float *params, const int *x,
                void (*read)(void *model, int l, int h, int part, float *out), void *model);
void splats_close(SplatStudy *a);
/* out (bins): the mean contribution of splat s of GSA head g at the distances of each bin */
void splat_offsets(const SplatStudy *a, size_t g, size_t s, const size_t *first, size_t bins, double *out);

/* Those splats whose keys the queries of splat s give most of their weight to, at least 1 % of it, with their shares;
   returns how many of `most` there are. */
size_t splat_partners(const SplatStudy *a, size_t g, size_t s, size_t most, int *splats, float *shares);

/* Distances below T in bins 0, 1, 2, 3, 4-5, 6-7, 8-11, 12-15, 16-23 ...: fills first (DISTANCE_BINS), the last one's
   end behind it; returns their number. */
enum { DISTANCE_BINS = 66 };
size_t distance_bins(size_t T, size_t *first);

/* r (N, S): responsibilities. Places where splat s is the strongest, those first where it has most, a token at most
   `each` times; returns how many of `most` there are. */
size_t splat_places(const float *r, const int *tokens, size_t N, size_t S, size_t s, size_t each, size_t most,
                    size_t *places);
/* The most typical tokens of V: those of whose places the splat has the largest mean share, where each token is
   counted at SPLAT_TOKEN_PRIOR places more with the mean of all, so that rare ones do not win by chance. Returns how
   many of `most` are above that mean. */
enum { SPLAT_TOKEN_PRIOR = 5 };
size_t splat_tokens(const float *r, const int *tokens, size_t N, size_t S, size_t s, size_t V, size_t most, int *ids);

/* owner (N): the strongest splat of each token */
void strongest_splats(const float *r, size_t N, size_t S, int *owner);
/* sum_ab p(a,b) ln(p(a,b) / (p(a) p(b))) in nats, of a (N) below A and b (N) below B */
double mutual_information(const int *a, size_t A, const int *b, size_t B, size_t N);
/* Its mean where b is shuffled, over so many shuffles: what N tokens show of it by chance. */
double shuffled_information(const int *a, size_t A, const int *b, size_t B, size_t N, int shuffles, uint64_t seed);

#ifdef __cplusplus
}
#endif
#endif
