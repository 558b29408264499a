/* Other starts for the centres of splats than random ones: from keys of real data, or from another model. */
#ifndef GSA_STARTS_H
#define GSA_STARTS_H

#include "../checkpoint.h"

#ifdef __cplusplus
extern "C" {
#endif

/* keys (n, d), of any length; they are used as unit vectors. mu (S, d) is written; n >= 1. k-means: k-means++
   seeding, then at most 25 rounds; an empty cluster takes the key farthest from its centre. Principal components:
   mean + and - sqrt(eigenvalue) along the first S / 2 eigenvectors of the keys' covariance (S odd: the mean as
   well). */
void start_kmeans(float *mu, int S, const float *keys, size_t n, int d, uint64_t seed);
void start_components(float *mu, int S, const float *keys, size_t n, int d, uint64_t seed);

/* owner (n): which centre of mu (S, d) each key, as a unit vector, is nearest to. */
void nearest_centres(int *owner, const float *mu, int S, const float *keys, size_t n, int d);

/* Copies the splats (all tensors of one line per GSA head) of another model into the flat buffer of c, head by head
   in order of layer and head. Dies with a sentence that names the tensor and both shapes where they differ. */
void start_from_file(const Config *c, float *params, const Checkpoint *other);

#ifdef __cplusplus
}
#endif
#endif
