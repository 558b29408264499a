/* Heads of a standard model become heads of splats: --init-from STANDARD with --attention hybrid or gsa.

   In each layer as many heads as --gsa-heads says (half), those that attend nearest on the first training windows, or
   the heads that it names, keep their queries, keys, values and projection, and lose their rotations, gain and gate.
   Their splats start at the k-means of their keys and are then fitted to whom the old head attended to, all other
   weights being as they are: least mean over queries of sum_j p_ij ln(p_ij / w_ij), p of the old head and w of the
   splats, equation (4) or (5). All other heads, and all else, stay bit for bit. */
#ifndef GSA_INTO_SPLATS_H
#define GSA_INTO_SPLATS_H

#include "run.h"

#ifdef __cplusplus
extern "C" {
#endif

/* start: the standard model. r->config is the new one's, of one precision a splat (iso) on the unit sphere; its
   gsa_heads and the tensors' table are set here. flat (r->total): a new model's weights, whose splats say how those
   here begin but for their centres; it gets all others. Draws tokens from r->train, whose place stays, and prints a
   line for each layer. */
void into_splats(Run *r, const Checkpoint *start, float *flat);

/* The splats of one head, numbers of which a model may have none being 0: centres (S, d), then (S) each of the others.
   All within one array of splats_room floats. */
typedef struct {
    float *mu, *log_precision, *log_alpha, *log_theta, *log_delta, *psi;
} HeadSplats;
size_t splats_room(const Config *c);
HeadSplats head_splats(const Config *c, float *room);

/* The divergence above in nats, mean over the queries of a window: queries and keys q, k (T, d), the old head's weights
   old (T, T). Adds its gradient to `gradient`, in the layout of splats, unless that is NULL. */
double splats_divergence(const Config *c, const float *splats, const float *q, const float *k, const float *old,
                         size_t T, float *gradient);

#ifdef __cplusplus
}
#endif
#endif
