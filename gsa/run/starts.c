#include "starts.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static float *unit_keys(const float *keys, size_t n, int d) {
    float *unit = (float *)xmalloc(n * (size_t)d * sizeof *unit);
    for (size_t i = 0; i < n; i++) {
        double square = 1e-6;
        for (int k = 0; k < d; k++) square += (double)keys[i * d + k] * keys[i * d + k];
        for (int k = 0; k < d; k++) unit[i * d + k] = (float)(keys[i * d + k] / sqrt(square));
    }
    return unit;
}

static double distance(const float *a, const float *b, int d) {
    double sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int k = 0; k < d; k++) sum += ((double)a[k] - b[k]) * ((double)a[k] - b[k]);
    return sum;
}

/* The centre of mu (S, d) nearest to x (d), and its squared distance. */
static int nearest_of(const float *mu, int S, const float *x, int d, double *least) {
    int best = 0;
    *least = INFINITY;
    for (int s = 0; s < S; s++) {
        double far = distance(x, mu + (size_t)s * d, d);
        if (far < *least) {
            *least = far;
            best = s;
        }
    }
    return best;
}

void nearest_centres(int *owner, const float *mu, int S, const float *keys, size_t n, int d) {
    float *x = unit_keys(keys, n, d);
    double least;
    for (size_t i = 0; i < n; i++) owner[i] = nearest_of(mu, S, x + i * d, d, &least);
    free(x);
}

void start_kmeans(float *mu, int S, const float *keys, size_t n, int d, uint64_t seed) {
    float *x = unit_keys(keys, n, d);
    double *nearest = (double *)xmalloc(n * sizeof *nearest),
           *sums = (double *)xmalloc((size_t)S * (d + 1) * sizeof *sums);
    int *owner = (int *)xcalloc(n, sizeof *owner);
    uint64_t rng = seed;
    /* k-means++: the next centre is a key, chosen with probability proportional to its squared distance from the
       others */
    for (int s = 0; s < S; s++) {
        double total = 0;
        for (size_t i = 0; i < n; i++)
            total += nearest[i] = s ? fmin(nearest[i], distance(x + i * d, mu + (size_t)(s - 1) * d, d)) : 1;
        double at = rng_uniform(&rng) * total;
        size_t chosen = 0;
        while (chosen + 1 < n && (at -= nearest[chosen]) >= 0) chosen++;
        memcpy(mu + (size_t)s * d, x + chosen * d, (size_t)d * sizeof *mu);
    }
    for (int round = 0; round < 25; round++) {
        bool moved = round == 0;
        memset(sums, 0, (size_t)S * (d + 1) * sizeof *sums);
        for (size_t i = 0; i < n; i++) {
            int best = nearest_of(mu, S, x + i * d, d, &nearest[i]);
            moved = moved || best != owner[i];
            owner[i] = best;
            for (int k = 0; k < d; k++) sums[(size_t)best * (d + 1) + k] += x[i * d + k];
            sums[(size_t)best * (d + 1) + d]++;
        }
        if (!moved) break;
        for (int s = 0; s < S; s++) {
            double count = sums[(size_t)s * (d + 1) + d];
            size_t farthest = 0;
            for (size_t i = 1; i < n && count == 0; i++)
                if (nearest[i] > nearest[farthest]) farthest = i;
            for (int k = 0; k < d; k++)
                mu[(size_t)s * d + k] =
                    count > 0 ? (float)(sums[(size_t)s * (d + 1) + k] / count) : x[farthest * d + k];
            if (count == 0) nearest[farthest] = 0;
        }
    }
    free(x);
    free(nearest);
    free(sums);
    free(owner);
}

void start_components(float *mu, int S, const float *keys, size_t n, int d, uint64_t seed) {
    float *x = unit_keys(keys, n, d);
    int components = S / 2 < d ? S / 2 : d;
    double *mean = (double *)xcalloc((size_t)d, sizeof *mean),
           *covariance = (double *)xcalloc((size_t)d * d, sizeof *covariance);
    double *vectors = (double *)xmalloc((size_t)(components + 1) * d * sizeof *vectors),
           *image = vectors + (size_t)components * d;
    uint64_t rng = seed;
    for (size_t i = 0; i < n; i++)
        for (int k = 0; k < d; k++) mean[k] += x[i * d + k] / (double)n;
    for (size_t i = 0; i < n; i++)
        for (int j = 0; j < d; j++)
            for (int k = 0; k < d; k++)
                covariance[j * d + k] += (x[i * d + j] - mean[j]) * (x[i * d + k] - mean[k]) / (double)n;
    for (int s = 0; s < S; s++)
        for (int k = 0; k < d; k++) mu[(size_t)s * d + k] = (float)mean[k]; /* where S exceeds 2d, or is odd */
    for (int c = 0; c < components; c++) { /* power iteration, each vector kept orthogonal to those before it */
        double *v = vectors + (size_t)c * d, value = 0;
        for (int k = 0; k < d; k++) v[k] = rng_normal(&rng);
        for (int round = 0; round < 100; round++) {
            for (int j = 0; j < d; j++) {
                image[j] = 0;
                for (int k = 0; k < d; k++) image[j] += covariance[j * d + k] * v[k];
            }
            for (int b = 0; b < c; b++) {
                double dot = 0;
                for (int k = 0; k < d; k++) dot += image[k] * vectors[(size_t)b * d + k];
                for (int k = 0; k < d; k++) image[k] -= dot * vectors[(size_t)b * d + k];
            }
            value = 0;
            for (int k = 0; k < d; k++) value += image[k] * image[k];
            value = sqrt(value);
            for (int k = 0; k < d && value > 0; k++) v[k] = image[k] / value;
            if (!(value > 0)) break;
        }
        for (int side = 0; side < 2; side++)
            for (int k = 0; k < d && value > 0; k++)
                mu[(size_t)(2 * c + side) * d + k] = (float)(mean[k] + (side ? -1 : 1) * sqrt(value) * v[k]);
    }
    free(x);
    free(mean);
    free(covariance);
    free(vectors);
}

void start_from_file(const Config *c, float *params, const Checkpoint *other) {
    Tensor tensors[NUM_TENSORS];
    model_tensors(c, tensors);
    for (int i = 0; i < NUM_TENSORS; i++) {
        const Tensor *t = &tensors[i];
        if (!tensor_is_splat(i)) continue;
        if (!t->size && !checkpoint_has(other, t->name)) continue; /* neither model has it */
        if (i == TENSOR_psi && !other->config.phase) continue;     /* without phases they are 0, as at any start */
        memcpy(params + t->offset, checkpoint_find(other, t->name, TYPE_F32, 3, t->shape, NULL),
               t->size * sizeof *params);
    }
}
