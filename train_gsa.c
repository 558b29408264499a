/* train_gsa.c: a GPT whose attention heads are standard or Gaussian Splat Attention (GSA), on the CPU in plain C: the
   reference that everything else is checked against.

   In this file: the network's arithmetic, every layer forward and backward, and nothing else. Reading order:
     matrix products -> encoder -> layernorm -> matmul -> feature maps: rope and splat -> attention -> gelu, residual ->
     classifier -> the model: forward, backward, update -> main
   Elsewhere: what a model is (gsa/model.h: configuration and parameter table), what a run does (gsa/train.c).

   Conventions: B sequences of T tokens, C channels, NH heads of size HS = C / NH, V tokens in the vocabulary padded to Vp, S
   splats a head. x_forward(out, in, weights, sizes), x_backward(d..., ...): gradients of parameters are added to, gradients
   of activations are overwritten, except the residual stream's, which is added to. Every number has one owner: a thread
   computes it alone in a fixed order, so results do not depend on the number of threads.

   Tests compile this file with GSA_DOUBLE, where all numbers are double, and check it against finite differences;
   GSA_NO_MAIN leaves main to the file that includes this one. */

#include "gsa/train.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#endif
#if defined(USE_DNNL) && !defined(GSA_DOUBLE)
#define GEMM_DNNL
#include <dnnl.h>
#endif

#ifdef GSA_DOUBLE
typedef double real;
typedef uint64_t phase; /* fractions of a turn, see wave_table */
enum { PHASE_BITS = 52 };
#else
typedef float real;
typedef uint32_t phase;
enum { PHASE_BITS = 32 };
#endif

/* exp. The C library's does not vectorise; this does, with an error below 2.5e-7 relative. 0 below exp(-87.3), infinite above
   exp(88.37). */
static inline real exp_real(real x) {
#ifdef GSA_DOUBLE
    return exp(x);
#else
    const float round_up = 12582912.0f; /* 1.5 * 2^23: adding it rounds to a whole number that stands in the low bits */
    float z = x * 1.44269504f + round_up, n = z - round_up;
    float r = (x - n * 0.693359375f) + n * 2.12194440e-4f; /* x - n ln 2, |r| <= 0.35, ln 2 in two parts */
    float p = 1.0f + r * (1.0f + r * (0.5f + r * (0.166666657f + r * (0.0416657962f + r * (0.00833345205f + r * 0.00138765418f)))));
    uint32_t bits;
    memcpy(&bits, &z, 4);
    bits = (bits << 23) + 0x3F800000; /* 2^n: n into the exponent */
    float scale;
    memcpy(&scale, &bits, 4);
    float y = p * scale;
    y = x > 88.37f ? INFINITY : y;
    return x < -87.3f ? 0.0f : y;
#endif
}

/* the largest of x (n); in lanes of its own, which compilers turn into vectors where a plain loop must care for NaN */
static inline real largest(const real *x, size_t n) {
    enum { WIDE = 16 };
    real lane[WIDE], most = -INFINITY;
    size_t i = 0;
    for (int k = 0; k < WIDE; k++) lane[k] = -INFINITY;
    for (; i + WIDE <= n; i += WIDE)
        for (int k = 0; k < WIDE; k++) lane[k] = x[i + k] > lane[k] ? x[i + k] : lane[k];
    for (; i < n; i++) most = x[i] > most ? x[i] : most;
    for (int k = 0; k < WIDE; k++) most = lane[k] > most ? lane[k] : most;
    return most;
}

/* ---------------------------------------------------------------------------------------------- matrix products */

/* One vector register of numbers; loads and stores need no alignment. */
#if defined(__AVX512F__)
enum { VECTOR_BYTES = 64, ROWS = 8 };
#elif defined(__AVX__)
enum { VECTOR_BYTES = 32, ROWS = 4 };
#else
enum { VECTOR_BYTES = 16, ROWS = 4 };
#endif
typedef real vector __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(real)), may_alias));
enum { LANES = VECTOR_BYTES / sizeof(real), COLUMNS = 2 * LANES };

/* C (rows, vectors * LANES) = A B, or += where add; A(i, k) = A[i * ai + k * ak], row k of B at B + k * ldb. With the sizes
   known at compile time all accumulators stay in registers. */
#define TILE(name, rows, vectors)                                                                                                            \
    static inline void name(size_t K, const real *A, size_t ai, size_t ak, const real *B, size_t ldb, real *C, size_t ldc, bool add) {       \
        vector sum[rows][vectors];                                                                                                           \
        for (int i = 0; i < rows; i++)                                                                                                       \
            for (int j = 0; j < vectors; j++) sum[i][j] = add ? *(const vector *)(C + i * ldc + j * LANES) : (vector){0};                    \
        for (size_t k = 0; k < K; k++) {                                                                                                     \
            vector b[vectors];                                                                                                               \
            for (int j = 0; j < vectors; j++) b[j] = *(const vector *)(B + k * ldb + j * LANES);                                             \
            for (int i = 0; i < rows; i++) {                                                                                                 \
                real a = A[i * ai + k * ak];                                                                                                 \
                for (int j = 0; j < vectors; j++) sum[i][j] += a * b[j];                                                                     \
            }                                                                                                                                \
        }                                                                                                                                    \
        for (int i = 0; i < rows; i++)                                                                                                       \
            for (int j = 0; j < vectors; j++) *(vector *)(C + i * ldc + j * LANES) = sum[i][j];                                              \
    }
TILE(tile_rows_2, ROWS, 2)
TILE(tile_rows_1, ROWS, 1)
TILE(tile_1_2, 1, 2)
TILE(tile_1_1, 1, 1)

/* C (M, N) = A B, or += where add, on the calling thread; A(i, k) = A[i * ai + k * ak]: any layout, transposed too; rows of
   B and C are contiguous. For the small products inside attention and feature maps. */
static void product(size_t M, size_t N, size_t K, const real *A, size_t ai, size_t ak, const real *B, size_t ldb, real *C, size_t ldc, bool add) {
    for (size_t j = 0; j < N;) {
        size_t n = N - j >= COLUMNS ? COLUMNS : N - j >= LANES ? LANES : 1;
        for (size_t i = 0; i < M;) {
            size_t m = n > 1 && M - i >= ROWS ? ROWS : 1;
            const real *a = A + i * ai, *b = B + j;
            real *c = C + i * ldc + j;
            if (n == 1) {
                real sum = add ? *c : 0;
                for (size_t k = 0; k < K; k++) sum += a[k * ak] * b[k * ldb];
                *c = sum;
            } else if (n == COLUMNS) {
                if (m == ROWS) tile_rows_2(K, a, ai, ak, b, ldb, c, ldc, add);
                else tile_1_2(K, a, ai, ak, b, ldb, c, ldc, add);
            } else {
                if (m == ROWS) tile_rows_1(K, a, ai, ak, b, ldb, c, ldc, add);
                else tile_1_1(K, a, ai, ak, b, ldb, c, ldc, add);
            }
            i += m;
        }
        j += n;
    }
}

/* One block of the product below, on the calling thread. */
static void gemm_block(bool ta, bool tb, size_t M, size_t N, size_t K, const real *A, size_t lda, const real *B, size_t ldb, real *C, size_t ldc, bool add) {
#ifdef GEMM_DNNL
    /* called inside a parallel region oneDNN uses one thread: the blocks are ours, so the result does not depend on their number */
    if (dnnl_sgemm(ta ? 'T' : 'N', tb ? 'T' : 'N', (dnnl_dim_t)M, (dnnl_dim_t)N, (dnnl_dim_t)K, 1.0f, A, (dnnl_dim_t)lda, B, (dnnl_dim_t)ldb, add ? 1.0f : 0.0f, C,
                   (dnnl_dim_t)ldc) != dnnl_success)
        die("oneDNN could not multiply (%zu, %zu) by (%zu, %zu)", M, K, K, N);
#else
    /* Panels of B, COLUMNS wide, and of A are packed, so that the inner loop reads memory in order and from the cache. */
    enum { DEPTH = 256 };
    real *a = (real *)xmalloc((M + COLUMNS) * DEPTH * sizeof(real)), *b = a + M * DEPTH;
    real edge[COLUMNS * ROWS];
    for (size_t k0 = 0; k0 < K; k0 += DEPTH) {
        size_t depth = K - k0 < DEPTH ? K - k0 : DEPTH;
        bool go_on = add || k0 > 0;
        for (size_t i = 0; i < M; i++)
            for (size_t k = 0; k < depth; k++) a[i * DEPTH + k] = ta ? A[(k0 + k) * lda + i] : A[i * lda + k0 + k];
        for (size_t j = 0; j < N; j += COLUMNS) {
            size_t n = N - j < COLUMNS ? N - j : COLUMNS;
            if (n < COLUMNS) memset(b, 0, depth * COLUMNS * sizeof(real));
            if (tb)
                for (size_t c = 0; c < n; c++)
                    for (size_t k = 0; k < depth; k++) b[k * COLUMNS + c] = B[(j + c) * ldb + k0 + k];
            else
                for (size_t k = 0; k < depth; k++) memcpy(b + k * COLUMNS, B + (k0 + k) * ldb + j, n * sizeof(real));
            for (size_t i = 0; i < M;) {
                size_t m = M - i >= ROWS ? ROWS : 1;
                real *c = C + i * ldc + j, *out = n < COLUMNS ? edge : c;
                size_t ldo = n < COLUMNS ? COLUMNS : ldc;
                if (n < COLUMNS && go_on)
                    for (size_t r = 0; r < m; r++) memcpy(edge + r * COLUMNS, c + r * ldc, n * sizeof(real));
                if (m == ROWS) tile_rows_2(depth, a + i * DEPTH, DEPTH, 1, b, COLUMNS, out, ldo, go_on);
                else tile_1_2(depth, a + i * DEPTH, DEPTH, 1, b, COLUMNS, out, ldo, go_on);
                if (n < COLUMNS)
                    for (size_t r = 0; r < m; r++) memcpy(c + r * ldc, edge + r * COLUMNS, n * sizeof(real));
                i += m;
            }
        }
    }
    free(a);
#endif
}

/* C (M, N) = op(A) op(B), or += where add, rows contiguous; op transposes where ta, tb. Cut into blocks by the shape
   alone, never by the number of threads. */
static void gemm(bool ta, bool tb, size_t M, size_t N, size_t K, const real *A, size_t lda, const real *B, size_t ldb, real *C, size_t ldc, bool add) {
    size_t m = M < 256 ? M : 256, n = N < 512 ? N : 512;
    while (((M + m - 1) / m) * ((N + n - 1) / n) < 8 && (m > 64 || n > 64)) { /* at least 8 blocks for the threads */
        if (n >= m) n = (n + 1) / 2;
        else m = (m + 1) / 2;
    }
    size_t rows = (M + m - 1) / m, columns = (N + n - 1) / n;
#pragma omp parallel for schedule(dynamic)
    for (size_t block = 0; block < rows * columns; block++) {
        size_t i = block % rows * m, j = block / rows * n;
        gemm_block(ta, tb, M - i < m ? M - i : m, N - j < n ? N - j : n, K, A + (ta ? i : i * lda), lda, B + (tb ? j * ldb : j), ldb, C + i * ldc + j, ldc, add);
    }
}

/* sum[c] += column sums of x (N, C): one owner per group of columns. */
static void add_column_sums(real *sum, const real *x, size_t N, size_t C) {
    enum { GROUP = 64 };
#pragma omp parallel for
    for (size_t c0 = 0; c0 < C; c0 += GROUP) {
        size_t n = C - c0 < GROUP ? C - c0 : GROUP;
        real local[GROUP] = {0};
        for (size_t i = 0; i < N; i++)
            for (size_t c = 0; c < n; c++) local[c] += x[i * C + c0 + c];
        for (size_t c = 0; c < n; c++) sum[c0 + c] += local[c];
    }
}

/* ---------------------------------------------------------------------------------------------- encoder */

/* out (B, T, C) = wte[token] + wpe[position]; wpe NULL: no learned positions. Positions start at first. */
static void encoder_forward(real *out, const int *tokens, const real *wte, const real *wpe, size_t B, size_t T, size_t C, size_t first) {
#pragma omp parallel for
    for (size_t i = 0; i < B * T; i++) {
        const real *token = wte + (size_t)tokens[i] * C, *position = wpe ? wpe + (first + i % T) * C : NULL;
        real *o = out + i * C;
        for (size_t c = 0; c < C; c++) o[c] = position ? token[c] + position[c] : token[c];
    }
}

static void encoder_backward(real *dwte, real *dwpe, const real *dout, const int *tokens, size_t B, size_t T, size_t C) {
    enum { GROUP = 32 }; /* a token may occur often: its row is owned by column, each thread adds in order of i */
#pragma omp parallel for
    for (size_t c0 = 0; c0 < C; c0 += GROUP) {
        size_t n = C - c0 < GROUP ? C - c0 : GROUP;
        for (size_t i = 0; i < B * T; i++) {
            const real *d = dout + i * C + c0;
            real *row = dwte + (size_t)tokens[i] * C + c0;
            for (size_t c = 0; c < n; c++) row[c] += d[c];
            if (!dwpe) continue;
            row = dwpe + i % T * C + c0;
            for (size_t c = 0; c < n; c++) row[c] += d[c];
        }
    }
}

/* ---------------------------------------------------------------------------------------------- layernorm */

#define LAYERNORM_EPSILON 1e-5

/* out (N, C) = (x - mean) / sqrt(var + 1e-5) * weight + bias, row by row; mean and rstd (N) are kept for the backward pass */
static void layernorm_forward(real *out, real *mean, real *rstd, const real *in, const real *weight, const real *bias, size_t N, size_t C) {
#pragma omp parallel for
    for (size_t i = 0; i < N; i++) {
        const real *x = in + i * C;
        real *o = out + i * C, sum = 0, square = 0;
#pragma omp simd reduction(+ : sum)
        for (size_t c = 0; c < C; c++) sum += x[c];
        real m = sum / C;
#pragma omp simd reduction(+ : square)
        for (size_t c = 0; c < C; c++) square += (x[c] - m) * (x[c] - m);
        real r = 1 / (real)sqrt(square / C + LAYERNORM_EPSILON);
        for (size_t c = 0; c < C; c++) o[c] = (x[c] - m) * r * weight[c] + bias[c];
        mean[i] = m, rstd[i] = r;
    }
}

/* With n = (x - mean) rstd and dn = dout weight: dx = rstd (dn - mean(dn) - n mean(dn n)). Adds to din: the residual stream. */
static void layernorm_backward(real *din, real *dweight, real *dbias, const real *dout, const real *in, const real *weight, const real *mean, const real *rstd, size_t N,
                               size_t C) {
#pragma omp parallel for
    for (size_t i = 0; i < N; i++) {
        const real *x = in + i * C, *d = dout + i * C;
        real *dx = din + i * C, m = mean[i], r = rstd[i], sum = 0, sum_n = 0;
#pragma omp simd reduction(+ : sum, sum_n)
        for (size_t c = 0; c < C; c++) {
            real dn = d[c] * weight[c];
            sum += dn, sum_n += dn * ((x[c] - m) * r);
        }
        sum /= C, sum_n /= C;
        for (size_t c = 0; c < C; c++) dx[c] += r * (d[c] * weight[c] - sum - (x[c] - m) * r * sum_n);
    }
    enum { GROUP = 64 };
#pragma omp parallel for
    for (size_t c0 = 0; c0 < C; c0 += GROUP) {
        size_t n = C - c0 < GROUP ? C - c0 : GROUP;
        real dw[GROUP] = {0}, db[GROUP] = {0};
        for (size_t i = 0; i < N; i++)
            for (size_t c = 0; c < n; c++) {
                real d = dout[i * C + c0 + c];
                dw[c] += d * (in[i * C + c0 + c] - mean[i]) * rstd[i];
                db[c] += d;
            }
        for (size_t c = 0; c < n; c++) dweight[c0 + c] += dw[c], dbias[c0 + c] += db[c];
    }
}

/* ---------------------------------------------------------------------------------------------- matmul */

/* out (N, OC) = in (N, C) weight^T + bias; weight (OC, C); bias NULL: none */
static void matmul_forward(real *out, const real *in, const real *weight, const real *bias, size_t N, size_t C, size_t OC) {
    if (bias) {
#pragma omp parallel for
        for (size_t i = 0; i < N; i++) memcpy(out + i * OC, bias, OC * sizeof(real));
    }
    gemm(false, true, N, OC, C, in, C, weight, C, out, OC, bias != NULL);
}

static void matmul_backward(real *din, real *dweight, real *dbias, const real *dout, const real *in, const real *weight, size_t N, size_t C, size_t OC) {
    gemm(false, false, N, C, OC, dout, OC, weight, C, din, C, false);
    gemm(true, false, OC, C, N, dout, OC, in, C, dweight, C, true);
    if (dbias) add_column_sums(dbias, dout, N, OC);
}

/* ---------------------------------------------------------------------------------------------- feature maps

   A head turns its queries and keys into features, and logits are f_q . f_k (times a scale per head). A standard head's
   features are q and k themselves, or q and k normalised and rotated (rope); a GSA head's are its splats' responses times
   their envelope (splat). Both work on one head of one sequence: x has T rows of size HS, `stride` apart (a slice of qkv);
   features f (T, HS) are contiguous. */

/* waves[t] = cos(theta_i n) for all i of `count`, then sin(theta_i n), n = first + t. The phase is kept as an integer fraction of a
   turn and wraps exactly, so that position 1,000,000 is as exact as position 1. */
static void wave_table(real *waves, const double *theta, size_t count, size_t T, size_t first) {
    const double turn = 6.283185307179586;
    for (size_t i = 0; i < count; i++) {
        phase step = (phase)llrint(ldexp(theta[i] / turn, PHASE_BITS));
        for (size_t t = 0; t < T; t++) {
            phase at = step * (phase)(first + t);
#ifdef GSA_DOUBLE
            at &= ((phase)1 << PHASE_BITS) - 1;
#endif
            double angle = turn * ldexp((double)at, -PHASE_BITS);
            waves[t * 2 * count + i] = (real)cos(angle);
            waves[t * 2 * count + count + i] = (real)sin(angle);
        }
    }
}

#define SPHERE_EPSILON 1e-6

/* equation (1): x^ = x / sqrt(|x|^2 + 1e-6), for any x smooth; returns the factor */
static inline real unit_vector(real *unit, const real *x, size_t HS) {
    real square = 0;
#pragma omp simd reduction(+ : square)
    for (size_t k = 0; k < HS; k++) square += x[k] * x[k];
    real inverse = 1 / (real)sqrt(square + SPHERE_EPSILON);
    for (size_t k = 0; k < HS; k++) unit[k] = x[k] * inverse;
    return inverse;
}

/* dx = inverse (g - x^ (x^ . g)), g the gradient of x^ */
static inline void unit_vector_backward(real *dx, const real *g, const real *unit, real inverse, size_t HS) {
    real dot = 0;
#pragma omp simd reduction(+ : dot)
    for (size_t k = 0; k < HS; k++) dot += unit[k] * g[k];
    for (size_t k = 0; k < HS; k++) dx[k] = inverse * (g[k] - unit[k] * dot);
}

/* rope: f = rotation by position of x^ sqrt(HS), pairs (k, k + HS/2). waves (T, HS): cosines and sines of the positions. */
static void rope_forward(real *f, const real *x, size_t stride, const real *waves, size_t T, size_t HS) {
    size_t half = HS / 2;
    real size = (real)sqrt((double)HS);
    for (size_t t = 0; t < T; t++, f += HS, x += stride, waves += HS) {
        unit_vector(f, x, HS);
        for (size_t k = 0; k < half; k++) {
            real a = f[k] * size, b = f[half + k] * size, c = waves[k], s = waves[half + k];
            f[k] = a * c - b * s, f[half + k] = a * s + b * c;
        }
    }
}

static void rope_backward(real *dx, const real *df, const real *x, size_t stride, const real *waves, size_t T, size_t HS) {
    size_t half = HS / 2;
    real size = (real)sqrt((double)HS), *unit = (real *)xmalloc(2 * HS * sizeof(real)), *g = unit + HS;
    for (size_t t = 0; t < T; t++, df += HS, x += stride, dx += stride, waves += HS) {
        for (size_t k = 0; k < half; k++) { /* the rotation back */
            real a = df[k], b = df[half + k], c = waves[k], s = waves[half + k];
            g[k] = size * (a * c + b * s), g[half + k] = size * (b * c - a * s);
        }
        real inverse = unit_vector(unit, x, HS);
        unit_vector_backward(dx, g, unit, inverse, HS);
    }
    free(unit);
}

/* The splats of one head. */
typedef struct {
    const real *mu, *lnp, *lnalpha; /* (S, HS), (S) or (S, HS), (S) */
    size_t S, P;                    /* P: precisions per splat, 1 isotropic or HS diagonal */
} Splats;

/* Room for one head's splats and T tokens: what splat_forward and splat_backward share. */
typedef struct {
    real *unit, *square, *inverse; /* x^ (T, HS), |x^|^2 (T), the factor (T) */
    real *slope, *slope_t;         /* Lambda mu (S, HS) and its transpose (HS, S) */
    real *precision, *precision_t; /* Lambda (S, P), and for P = HS its transpose (HS, S) */
    real *centre;                  /* mu . Lambda mu (S) */
    real *response;                /* ln phi, then its gradient (T, S) */
    real *square_unit, *spread;    /* x^ .* x^ (T, HS) and Lambda products (T, max(S, HS)): diagonal precision only */
} SplatRoom;

static SplatRoom splat_prepare(const Splats *w, const real *x, size_t stride, size_t T, size_t HS) {
    size_t S = w->S, P = w->P, widest = S > HS ? S : HS, diagonal = P > 1;
    SplatRoom r;
    r.unit = (real *)xmalloc((T * (HS + 2 + S) + S * (2 * HS + 2 * P + 1) + (diagonal ? T * (HS + widest) : 0)) * sizeof(real));
    r.square = r.unit + T * HS, r.inverse = r.square + T, r.response = r.inverse + T;
    r.slope = r.response + T * S, r.slope_t = r.slope + S * HS;
    r.precision = r.slope_t + S * HS, r.precision_t = r.precision + S * P;
    r.centre = r.precision_t + S * P;
    r.square_unit = r.centre + S, r.spread = r.square_unit + T * HS;
    for (size_t s = 0; s < S; s++) {
        r.centre[s] = 0;
        for (size_t k = 0; k < P; k++) r.precision[s * P + k] = r.precision_t[k * S + s] = exp_real(w->lnp[s * P + k]);
        for (size_t k = 0; k < HS; k++) {
            real mu = w->mu[s * HS + k], slope = mu * r.precision[s * P + (diagonal ? k : 0)];
            r.slope[s * HS + k] = r.slope_t[k * S + s] = slope;
            r.centre[s] += mu * slope;
        }
    }
    for (size_t t = 0; t < T; t++) {
        real *unit = r.unit + t * HS, square = 0;
        r.inverse[t] = unit_vector(unit, x + t * stride, HS);
        for (size_t k = 0; k < HS; k++) square += unit[k] * unit[k];
        r.square[t] = square;
        if (diagonal)
            for (size_t k = 0; k < HS; k++) r.square_unit[t * HS + k] = unit[k] * unit[k];
    }
    return r;
}

/* Equations (2), (7), (9): f = [a phi_s(x^) cos(theta_s n), a phi_s(x^) sin(theta_s n), 0 ...] with ln phi_s(x) = -1/2 (x - mu_s)^T Lambda_s
   (x - mu_s), multiplied out so that it is a matrix product: Lambda mu . x - 1/2 x . Lambda x - 1/2 mu . Lambda mu. a is alpha_s for
   queries and 1 for keys. waves (T, 2S) as from wave_table; NULL: equation (6), no envelope, f = [a phi_s(x^), 0 ...]. */
static void splat_forward(real *f, const real *x, size_t stride, const Splats *w, bool query, const real *waves, size_t T, size_t HS) {
    size_t S = w->S;
    SplatRoom r = splat_prepare(w, x, stride, T, HS);
    product(T, S, HS, r.unit, HS, 1, r.slope_t, S, r.response, S, false);
    if (w->P > 1) product(T, S, HS, r.square_unit, HS, 1, r.precision_t, S, r.spread, S, false);
    for (size_t t = 0; t < T; t++) {
        real *row = f + t * HS, *response = r.response + t * S;
        const real *wave = waves ? waves + t * 2 * S : NULL;
#pragma omp simd
        for (size_t s = 0; s < S; s++) {
            real spread = w->P > 1 ? r.spread[t * S + s] : r.precision[s] * r.square[t];
            real ln_a = query ? w->lnalpha[s] : 0;
            row[s] = exp_real(ln_a + response[s] - (real)0.5 * (spread + r.centre[s]));
        }
        if (waves)
            for (size_t s = 0; s < S; s++) row[S + s] = row[s] * wave[S + s], row[s] *= wave[s];
        for (size_t k = waves ? 2 * S : S; k < HS; k++) row[k] = 0;
    }
    free(r.unit);
}

/* Sums over tokens from which the gradients of one head's splats follow without a second pass; with G = dL / d ln phi_s(x^):
   M0 = sum G (S), M1 = sum G x^ (S, HS), M2 = sum G |x^|^2 (S) or sum G x^ .* x^ (S, HS), amplitude = sum of G of queries (S),
   frequency = dL / d theta_s (S). One record of floats per head and sequence. */
static size_t moments_size(size_t S, size_t P, size_t HS) { return S * (HS + P + 3); }

/* dx from df and f (what splat_forward wrote); adds to the record of moments. All products are f df, never divided by phi, so that
   a response that underflows does no harm. */
static void splat_backward(real *dx, real *moments, const real *df, const real *f, const real *x, size_t stride, const Splats *w, bool query, bool envelope, size_t T, size_t HS) {
    size_t S = w->S, P = w->P;
    SplatRoom r = splat_prepare(w, x, stride, T, HS);
    real *G = r.response, *M0 = moments, *M1 = M0 + S, *M2 = M1 + S * HS, *amplitude = M2 + S * P, *frequency = amplitude + S;
    double *X = (double *)xcalloc(S, sizeof(double)); /* terms grow with t and cancel: summed in double, from the middle of the window */
    for (size_t t = 0; t < T; t++) {
        const real *fc = f + t * HS, *fs = fc + S, *dc = df + t * HS, *ds = dc + S;
        for (size_t s = 0; s < S; s++) {
            real g = fc[s] * dc[s];
            if (envelope) {
                g += fs[s] * ds[s];
                X[s] += ((double)t - 0.5 * (double)(T - 1)) * (double)(fc[s] * ds[s] - fs[s] * dc[s]);
            }
            G[t * S + s] = g;
            M0[s] += g;
            if (query) amplitude[s] += g;
            if (P == 1) M2[s] += g * r.square[t];
        }
    }
    for (size_t s = 0; s < S; s++) frequency[s] += (real)X[s];
    product(S, HS, T, G, 1, S, r.unit, HS, M1, HS, true);
    if (P > 1) {
        product(S, HS, T, G, 1, S, r.square_unit, HS, M2, HS, true);
        product(T, HS, S, G, S, 1, r.precision, HS, r.spread, HS, false);
    }
    real *g = (real *)xmalloc(T * HS * sizeof(real)); /* dL / dx^ = sum_s G_s (Lambda_s mu_s - Lambda_s x^) */
    product(T, HS, S, G, S, 1, r.slope, HS, g, HS, false);
    for (size_t t = 0; t < T; t++) {
        real total = 0;
        if (P == 1)
            for (size_t s = 0; s < S; s++) total += G[t * S + s] * r.precision[s];
        for (size_t k = 0; k < HS; k++) g[t * HS + k] -= r.unit[t * HS + k] * (P > 1 ? r.spread[t * HS + k] : total);
        unit_vector_backward(dx + t * stride, g + t * HS, r.unit + t * HS, r.inverse[t], HS);
    }
    free(g);
    free(X);
    free(r.unit);
}

/* The gradients of one head's splats from its moments, summed over sequences (records `apart` numbers from each other, B of them). */
static void splat_gradients(real *dmu, real *dlnp, real *dlnalpha, real *dlntheta, const real *moments, size_t apart, size_t B, const Splats *w, const real *lntheta, size_t HS) {
    size_t S = w->S, P = w->P, n = moments_size(S, P, HS);
    double *sum = (double *)xcalloc(n, sizeof(double)); /* M1 - M0 mu cancels: in double it costs nothing here */
    for (size_t b = 0; b < B; b++)
        for (size_t i = 0; i < n; i++) sum[i] += (double)moments[b * apart + i];
    const double *M0 = sum, *M1 = M0 + S, *M2 = M1 + S * HS, *amplitude = M2 + S * P, *frequency = amplitude + S;
    for (size_t s = 0; s < S; s++) {
        double along = 0, square = 0;
        for (size_t k = 0; k < HS; k++) {
            double mu = (double)w->mu[s * HS + k], m1 = M1[s * HS + k], p = (double)exp_real(w->lnp[s * P + (P > 1 ? k : 0)]);
            dmu[s * HS + k] += (real)(p * (m1 - M0[s] * mu));
            along += mu * m1, square += mu * mu;
            if (P > 1) dlnp[s * HS + k] += (real)(-0.5 * p * (M2[s * HS + k] - 2 * mu * m1 + mu * mu * M0[s]));
        }
        if (P == 1) dlnp[s] += (real)((double)exp_real(w->lnp[s]) * (along - 0.5 * (M2[s] + square * M0[s])));
        dlnalpha[s] += (real)amplitude[s];
        if (dlntheta) dlntheta[s] += (real)(exp((double)lntheta[s]) * frequency[s]);
    }
    free(sum);
}

/* ---------------------------------------------------------------------------------------------- attention

   The softmax mixer, equation (4), for standard and GSA heads alike: o_i = sum_{j <= i} softmax_j(scale f_q(i) . f_k(j)) v_j. Works on BLOCK
   queries at a time, so no T x T matrix exists; the backward pass recomputes the weights from lse, the logarithm of their sum. */

enum { BLOCK = 64 };

static void transpose(real *out, size_t ldo, const real *in, size_t ldi, size_t rows, size_t columns) {
    for (size_t i = 0; i < rows; i++)
        for (size_t j = 0; j < columns; j++) out[j * ldo + i] = in[i * ldi + j];
}

/* out (B, T, C), lse (B, NH, T); fq, fk (B, NH, T, HS); v: the third part of qkv (B, T, 3C); scale (NH) */
static void attention_forward(real *out, real *lse, const real *fq, const real *fk, const real *qkv, const real *scale, size_t B, size_t T, size_t NH, size_t HS) {
    size_t C = NH * HS, padded = (T + COLUMNS - 1) / COLUMNS * COLUMNS;
#pragma omp parallel for schedule(dynamic)
    for (size_t head = 0; head < B * NH; head++) {
        size_t b = head / NH, h = head % NH;
        const real *q = fq + head * T * HS, *v = qkv + b * T * 3 * C + 2 * C + h * HS;
        real *kt = (real *)xcalloc((HS + BLOCK) * padded, sizeof(real)), *weights = kt + HS * padded; /* (HS, padded), (BLOCK, padded) */
        transpose(kt, padded, fk + head * T * HS, HS, T, HS);
        for (size_t i0 = 0; i0 < T; i0 += BLOCK) {
            size_t rows = T - i0 < BLOCK ? T - i0 : BLOCK, keys = i0 + rows, wide = (keys + COLUMNS - 1) / COLUMNS * COLUMNS;
            product(rows, wide, HS, q + i0 * HS, HS, 1, kt, padded, weights, padded, false);
            for (size_t r = 0; r < rows; r++) {
                size_t n = i0 + r + 1;
                real *w = weights + r * padded, most = largest(w, n), sum = 0;
#pragma omp simd reduction(+ : sum)
                for (size_t j = 0; j < n; j++) {
                    w[j] = exp_real(scale[h] * (w[j] - most));
                    sum += w[j];
                }
                for (size_t j = 0; j < n; j++) w[j] /= sum;
                for (size_t j = n; j < keys; j++) w[j] = 0;
                lse[head * T + i0 + r] = scale[h] * most + (real)log(sum);
            }
            product(rows, HS, keys, weights, padded, 1, v, 3 * C, out + (b * T + i0) * C + h * HS, C, false);
        }
        free(kt);
    }
}

/* dfq, dfk (B, NH, T, HS) and the third part of dqkv (B, T, 3C). With weights p_ij and delta_i = do_i . o_i:
   dv_j = sum_i p_ij do_i, dz_ij = p_ij (do_i . v_j - delta_i), df_q(i) = scale sum_j dz_ij f_k(j), df_k(j) = scale sum_i dz_ij f_q(i) */
static void attention_backward(real *dfq, real *dfk, real *dqkv, const real *dout, const real *out, const real *lse, const real *fq, const real *fk, const real *qkv,
                               const real *scale, size_t B, size_t T, size_t NH, size_t HS) {
    size_t C = NH * HS, padded = (T + COLUMNS - 1) / COLUMNS * COLUMNS;
#pragma omp parallel for schedule(dynamic)
    for (size_t head = 0; head < B * NH; head++) {
        size_t b = head / NH, h = head % NH;
        const real *q = fq + head * T * HS, *k = fk + head * T * HS, *v = qkv + b * T * 3 * C + 2 * C + h * HS;
        real *dk = dfk + head * T * HS, *dv = dqkv + b * T * 3 * C + 2 * C + h * HS;
        real *kt = (real *)xcalloc((2 * HS + 2 * BLOCK) * padded, sizeof(real)), *vt = kt + HS * padded, *weights = vt + HS * padded, *dweights = weights + BLOCK * padded;
        transpose(kt, padded, k, HS, T, HS);
        transpose(vt, padded, v, 3 * C, T, HS);
        for (size_t i0 = 0; i0 < T; i0 += BLOCK) {
            size_t rows = T - i0 < BLOCK ? T - i0 : BLOCK, keys = i0 + rows, wide = (keys + COLUMNS - 1) / COLUMNS * COLUMNS;
            const real *d = dout + (b * T + i0) * C + h * HS, *o = out + (b * T + i0) * C + h * HS;
            product(rows, wide, HS, q + i0 * HS, HS, 1, kt, padded, weights, padded, false);
            product(rows, wide, HS, d, C, 1, vt, padded, dweights, padded, false);
            for (size_t r = 0; r < rows; r++) {
                real *w = weights + r * padded, *dw = dweights + r * padded, delta = 0, l = lse[head * T + i0 + r];
                size_t n = i0 + r + 1;
                for (size_t e = 0; e < HS; e++) delta += d[r * C + e] * o[r * C + e];
#pragma omp simd
                for (size_t j = 0; j < n; j++) {
                    w[j] = exp_real(scale[h] * w[j] - l);
                    dw[j] = scale[h] * w[j] * (dw[j] - delta);
                }
                for (size_t j = n; j < keys; j++) w[j] = dw[j] = 0;
            }
            /* only the first block sees key 0 for the first time, but every block brings new keys: those start at 0 */
            for (size_t j = i0; j < keys; j++) {
                memset(dk + j * HS, 0, HS * sizeof(real));
                memset(dv + j * 3 * C, 0, HS * sizeof(real));
            }
            product(rows, HS, keys, dweights, padded, 1, k, HS, dfq + head * T * HS + i0 * HS, HS, false);
            product(keys, HS, rows, dweights, 1, padded, q + i0 * HS, HS, dk, HS, true);
            product(keys, HS, rows, weights, 1, padded, d, C, dv, 3 * C, true);
        }
        free(kt);
    }
}

/* ---------------------------------------------------------------------------------------------- gelu, residual */

#define GELU_A 0.7978845608028654 /* sqrt(2 / pi) */
#define GELU_B 0.044715

/* tanh form: x/2 (1 + tanh u), u = sqrt(2/pi) (x + 0.044715 x^3), which is x / (1 + exp(-2u)) */
static void gelu_forward(real *out, const real *in, size_t N) {
#pragma omp parallel for simd
    for (size_t i = 0; i < N; i++) {
        real x = in[i], u = (real)GELU_A * (x + (real)GELU_B * x * x * x);
        out[i] = x / (1 + exp_real(-2 * u));
    }
}

/* with s = 1 / (1 + exp(-2u)): d(x s) = s + x s (1 - s) 2u'; din may be dout */
static void gelu_backward(real *din, const real *dout, const real *in, size_t N) {
#pragma omp parallel for simd
    for (size_t i = 0; i < N; i++) {
        real x = in[i], u = (real)GELU_A * (x + (real)GELU_B * x * x * x);
        real s = 1 / (1 + exp_real(-2 * u)), du = (real)GELU_A * (1 + 3 * (real)GELU_B * x * x);
        din[i] = dout[i] * (s + x * s * (1 - s) * 2 * du);
    }
}

/* x += y; its backward pass is that both have the same gradient */
static void residual_forward(real *x, const real *y, size_t N) {
#pragma omp parallel for simd
    for (size_t i = 0; i < N; i++) x[i] += y[i];
}

/* ---------------------------------------------------------------------------------------------- classifier */

/* losses (N) = lse - logit of the target, in nats; lse (N) = ln sum_{v < V} exp(logit); logits (N, Vp) */
static void classifier_forward(real *losses, real *lse, const real *logits, const int *targets, size_t N, size_t V, size_t Vp) {
#pragma omp parallel for
    for (size_t i = 0; i < N; i++) {
        const real *l = logits + i * Vp;
        real most = largest(l, V), sum = 0;
#pragma omp simd reduction(+ : sum)
        for (size_t v = 0; v < V; v++) sum += exp_real(l[v] - most);
        lse[i] = most + (real)log(sum);
        losses[i] = lse[i] - l[targets[i]];
    }
}

/* logits become their gradients: (softmax - one at the target) scale; 0 in the padding */
static void classifier_backward(real *logits, const real *lse, const int *targets, real scale, size_t N, size_t V, size_t Vp) {
#pragma omp parallel for
    for (size_t i = 0; i < N; i++) {
        real *l = logits + i * Vp;
#pragma omp simd
        for (size_t v = 0; v < V; v++) l[v] = scale * exp_real(l[v] - lse[i]);
        l[targets[i]] -= scale;
        for (size_t v = V; v < Vp; v++) l[v] = 0;
    }
}

/* ---------------------------------------------------------------------------------------------- the model */

typedef struct {
#define X(name, ...) real *name;
    PARAMETERS(X)
#undef X
} ParameterTensors;

/* name, size; L layers after each other where there is a factor L. The last row is scratch of the backward pass. */
#define ACTIVATIONS(X)                                                                                                    \
    X(residual, (2 * L + 1) * B * T * C) /* the stream at the input, after attention and after the MLP of each layer */ \
    X(ln1, L * B * T * C)                                                                                                 \
    X(ln1_mean, L * B * T)                                                                                                \
    X(ln1_rstd, L * B * T)                                                                                                \
    X(qkv, L * B * T * 3 * C)                                                                                             \
    X(fq, L * B * T * C) /* (B, NH, T, HS) */                                                                             \
    X(fk, L * B * T * C)                                                                                                  \
    X(att_lse, L * B * NH * T)                                                                                            \
    X(att, L * B * T * C)                                                                                                 \
    X(ln2, L * B * T * C)                                                                                                 \
    X(ln2_mean, L * B * T)                                                                                                \
    X(ln2_rstd, L * B * T)                                                                                                \
    X(fc, L * B * T * 4 * C)                                                                                              \
    X(gelu, L * B * T * 4 * C)                                                                                            \
    X(lnf, B * T * C)                                                                                                     \
    X(lnf_mean, B * T)                                                                                                    \
    X(lnf_rstd, B * T)                                                                                                    \
    X(logits, B * T * Vp)                                                                                                 \
    X(losses, B * T)                                                                                                      \
    X(lse, B * T)                                                                                                         \
    X(splat_waves, G * T * 2 * S) /* cosines and sines of the envelope, per GSA head */                                  \
    X(dresidual, B * T * C)                                                                                               \
    X(dln, B * T * C)                                                                                                     \
    X(dfc, B * T * 4 * C)                                                                                                 \
    X(datt, B * T * C)                                                                                                    \
    X(dqkv, B * T * 3 * C)                                                                                                \
    X(dfq, B * T * C)                                                                                                     \
    X(dfk, B * T * C)                                                                                                     \
    X(moments, B * NH * moments_size(S, P, HS))

typedef struct {
#define X(name, size) real *name;
    ACTIVATIONS(X)
#undef X
} ActivationTensors;

/* sizes that appear in every function, as size_t */
typedef struct {
    size_t T, V, Vp, L, NH, C, HS, S, P, G;
} Sizes;

static Sizes config_sizes(const Config *c) {
    Sizes z;
    z.T = c->T, z.V = c->V, z.Vp = c->Vp, z.L = c->L, z.NH = c->NH, z.C = c->C;
    z.HS = config_head_size(c), z.G = config_gsa_heads(c), z.S = z.G ? c->S : 0;
    z.P = c->covariance == COVARIANCE_DIAG ? z.HS : 1;
    return z;
}

typedef struct {
    Config config;
    size_t B;                         /* largest batch */
    Tensor tensors[NUM_TENSORS];
    size_t total;                     /* length of the flat buffers */
    real *params, *grads, *adam_m, *adam_v; /* the last three are allocated when they are first needed */
    ParameterTensors p, dp;
    real *activations;
    ActivationTensors a;
    real *rope_waves;                 /* (T, HS) */
    real *scale;                      /* (L, NH): what f_q . f_k is multiplied by */
    size_t used_B, used_T;            /* of the last forward pass */
    int *x, *y;                       /* its tokens */
} GSA;

/* One function measures the activations (base NULL) and carves them from one piece of memory; returns their number. */
static size_t carve_activations(ActivationTensors *a, real *base, const Config *c, size_t B) {
    Sizes z = config_sizes(c);
    size_t T = z.T, L = z.L, C = z.C, NH = z.NH, Vp = z.Vp, HS = z.HS, S = z.S, P = z.P, G = c->envelope == ENVELOPE_COSINE ? z.G : 0, at = 0;
#define X(name, size)                     \
    a->name = base ? base + at : NULL; \
    at += ((size) + 31) / 32 * 32;
    ACTIVATIONS(X)
#undef X
    return at;
}

static void point_parameters(ParameterTensors *p, real *flat, const Tensor *tensors) {
#define X(name, ...) p->name = tensors[TENSOR_##name].size ? flat + tensors[TENSOR_##name].offset : NULL;
    PARAMETERS(X)
#undef X
}

/* Rotation angles of rope for positions first .. first + T - 1: waves (T, HS), theta_k = 10000^(-2k / HS) */
static void rope_table(real *waves, size_t T, size_t HS, size_t first) {
    double *theta = (double *)xmalloc(HS * sizeof(double));
    for (size_t k = 0; k < HS / 2; k++) theta[k] = pow(10000, -2.0 * (double)k / (double)HS);
    wave_table(waves, theta, HS / 2, T, first);
    free(theta);
}

static GSA *gsa_create(const Config *c, size_t B) {
    GSA *m = (GSA *)xcalloc(1, sizeof *m);
    size_t NH = c->NH, L = c->L, HS = config_head_size(c);
    m->config = *c, m->B = B;
    m->total = model_tensors(c, m->tensors);
    m->params = (real *)xcalloc(m->total, sizeof(real));
    point_parameters(&m->p, m->params, m->tensors);
    size_t count = carve_activations(&m->a, NULL, c, B);
    m->activations = (real *)xcalloc(count, sizeof(real));
    carve_activations(&m->a, m->activations, c, B);
    m->rope_waves = (real *)xmalloc((size_t)c->T * HS * sizeof(real));
    rope_table(m->rope_waves, c->T, HS, 0);
    m->scale = (real *)xmalloc(L * NH * sizeof(real));
    for (size_t i = 0; i < L * NH; i++) m->scale[i] = config_is_gsa(c, (int)(i / NH), (int)(i % NH)) ? 1 : 1 / (real)sqrt((double)HS);
    m->x = (int *)xmalloc(2 * B * c->T * sizeof(int)), m->y = m->x + B * c->T;
    return m;
}

static void gsa_destroy(GSA *m) {
    free(m->params), free(m->grads), free(m->adam_m), free(m->adam_v);
    free(m->activations), free(m->rope_waves), free(m->scale), free(m->x);
    free(m);
}

static Splats gsa_splats(const GSA *m, size_t g) {
    Sizes z = config_sizes(&m->config);
    Splats w;
    w.mu = m->p.mu + g * z.S * z.HS, w.lnp = m->p.lnp + g * z.S * z.P, w.lnalpha = m->p.lnalpha + g * z.S;
    w.S = z.S, w.P = z.P;
    return w;
}

/* waves (G, T, 2S): the envelopes of all GSA heads at positions first .. first + T - 1 */
static void gsa_splat_waves(const GSA *m, real *waves, size_t T, size_t first) {
    Sizes z = config_sizes(&m->config);
    if (!m->p.lntheta) return;
#pragma omp parallel for schedule(dynamic)
    for (size_t g = 0; g < z.G; g++) {
        double *theta = (double *)xmalloc(z.S * sizeof(double)); /* double: its rounding is multiplied by the distance */
        for (size_t s = 0; s < z.S; s++) theta[s] = exp((double)m->p.lntheta[g * z.S + s]);
        wave_table(waves + g * T * 2 * z.S, theta, z.S, T, first);
        free(theta);
    }
}

/* Features of all heads of layer l: fq, fk (B, NH, T, HS) from qkv (B, T, 3C). rope_waves (T, HS), splat_waves (G, T, 2S). */
static void features_forward(const GSA *m, real *fq, real *fk, const real *qkv, size_t l, size_t B, size_t T, const real *rope_waves, const real *splat_waves) {
    Sizes z = config_sizes(&m->config);
    size_t NH = z.NH, HS = z.HS, C = z.C;
#pragma omp parallel for schedule(dynamic)
    for (size_t i = 0; i < B * NH * 2; i++) {
        size_t head = i / 2, b = head / NH, h = head % NH, key = i % 2;
        const real *x = qkv + b * T * 3 * C + key * C + h * HS;
        real *f = (key ? fk : fq) + head * T * HS;
        if (config_is_gsa(&m->config, (int)l, (int)h)) {
            size_t g = config_gsa_before(&m->config, (int)l, (int)h);
            Splats w = gsa_splats(m, g);
            splat_forward(f, x, 3 * C, &w, !key, m->p.lntheta ? splat_waves + g * T * 2 * z.S : NULL, T, HS);
        } else if (m->config.position == POSITION_LEARNED) {
            for (size_t t = 0; t < T; t++) memcpy(f + t * HS, x + t * 3 * C, HS * sizeof(real));
        } else {
            rope_forward(f, x, 3 * C, rope_waves, T, HS);
        }
    }
}

/* The first two parts of dqkv from dfq, dfk; the gradients of layer l's splats. */
static void features_backward(GSA *m, real *dqkv, const real *dfq, const real *dfk, const real *fq, const real *fk, const real *qkv, size_t l, size_t B, size_t T) {
    Sizes z = config_sizes(&m->config);
    size_t NH = z.NH, HS = z.HS, C = z.C, S = z.S, record = moments_size(S, z.P, HS);
    bool envelope = m->p.lntheta != NULL;
    memset(m->a.moments, 0, B * NH * record * sizeof(real));
#pragma omp parallel for schedule(dynamic)
    for (size_t head = 0; head < B * NH; head++) { /* queries, then keys: both add to the head's moments */
        size_t b = head / NH, h = head % NH;
        for (size_t key = 0; key < 2; key++) {
            const real *x = qkv + b * T * 3 * C + key * C + h * HS, *df = (key ? dfk : dfq) + head * T * HS, *f = (key ? fk : fq) + head * T * HS;
            real *dx = dqkv + b * T * 3 * C + key * C + h * HS;
            if (config_is_gsa(&m->config, (int)l, (int)h)) {
                Splats w = gsa_splats(m, config_gsa_before(&m->config, (int)l, (int)h));
                splat_backward(dx, m->a.moments + head * record, df, f, x, 3 * C, &w, !key, envelope, T, HS);
            } else if (m->config.position == POSITION_LEARNED) {
                for (size_t t = 0; t < T; t++) memcpy(dx + t * 3 * C, df + t * HS, HS * sizeof(real));
            } else {
                rope_backward(dx, df, x, 3 * C, m->rope_waves, T, HS);
            }
        }
    }
#pragma omp parallel for schedule(dynamic)
    for (size_t h = 0; h < NH; h++) {
        if (!config_is_gsa(&m->config, (int)l, (int)h)) continue;
        size_t g = (size_t)config_gsa_before(&m->config, (int)l, (int)h);
        Splats w = gsa_splats(m, g);
        splat_gradients(m->dp.mu + g * S * HS, m->dp.lnp + g * S * z.P, m->dp.lnalpha + g * S, envelope ? m->dp.lntheta + g * S : NULL, m->a.moments + h * record, NH * record, B,
                        &w, envelope ? m->p.lntheta + g * S : NULL, HS);
    }
}

/* x, y (B, T); y NULL: logits only. Returns the mean loss in nats. */
static double gsa_forward(GSA *m, const int *x, const int *y, size_t B, size_t T) {
    Sizes z = config_sizes(&m->config);
    size_t C = z.C, N = B * T, L = z.L;
    ParameterTensors p = m->p;
    ActivationTensors a = m->a;
    m->used_B = B, m->used_T = T;
    memcpy(m->x, x, N * sizeof(int));
    if (y) memcpy(m->y, y, N * sizeof(int));
    gsa_splat_waves(m, a.splat_waves, T, 0);
    encoder_forward(a.residual, m->x, p.wte, p.wpe, B, T, C, 0);
    for (size_t l = 0; l < L; l++) {
        real *in = a.residual + 2 * l * N * C, *middle = in + N * C, *out = middle + N * C;
        layernorm_forward(a.ln1 + l * N * C, a.ln1_mean + l * N, a.ln1_rstd + l * N, in, p.ln1w + l * C, p.ln1b + l * C, N, C);
        matmul_forward(a.qkv + l * N * 3 * C, a.ln1 + l * N * C, p.qkvw + l * 3 * C * C, p.qkvb + l * 3 * C, N, C, 3 * C);
        features_forward(m, a.fq + l * N * C, a.fk + l * N * C, a.qkv + l * N * 3 * C, l, B, T, m->rope_waves, a.splat_waves);
        attention_forward(a.att + l * N * C, a.att_lse + l * N * z.NH, a.fq + l * N * C, a.fk + l * N * C, a.qkv + l * N * 3 * C, m->scale + l * z.NH, B, T, z.NH, z.HS);
        matmul_forward(middle, a.att + l * N * C, p.attprojw + l * C * C, p.attprojb + l * C, N, C, C);
        residual_forward(middle, in, N * C);
        layernorm_forward(a.ln2 + l * N * C, a.ln2_mean + l * N, a.ln2_rstd + l * N, middle, p.ln2w + l * C, p.ln2b + l * C, N, C);
        matmul_forward(a.fc + l * N * 4 * C, a.ln2 + l * N * C, p.fcw + l * 4 * C * C, p.fcb + l * 4 * C, N, C, 4 * C);
        gelu_forward(a.gelu + l * N * 4 * C, a.fc + l * N * 4 * C, N * 4 * C);
        matmul_forward(out, a.gelu + l * N * 4 * C, p.fcprojw + l * 4 * C * C, p.fcprojb + l * C, N, 4 * C, C);
        residual_forward(out, middle, N * C);
    }
    layernorm_forward(a.lnf, a.lnf_mean, a.lnf_rstd, a.residual + 2 * L * N * C, p.lnfw, p.lnfb, N, C);
    matmul_forward(a.logits, a.lnf, p.wte, NULL, N, C, z.Vp);
    if (!y) return 0;
    classifier_forward(a.losses, a.lse, a.logits, m->y, N, z.V, z.Vp);
    double loss = 0;
    for (size_t i = 0; i < N; i++) loss += (double)a.losses[i];
    return loss / (double)N;
}

/* Adds scale times the gradient of the last forward's mean loss to the gradients. The logits are overwritten. */
static void gsa_backward(GSA *m, double scale) {
    Sizes z = config_sizes(&m->config);
    size_t B = m->used_B, T = m->used_T, C = z.C, N = B * T, L = z.L;
    if (!m->grads) {
        m->grads = (real *)xcalloc(m->total, sizeof(real));
        point_parameters(&m->dp, m->grads, m->tensors);
    }
    ParameterTensors p = m->p, dp = m->dp;
    ActivationTensors a = m->a;
    classifier_backward(a.logits, a.lse, m->y, (real)(scale / (double)N), N, z.V, z.Vp);
    matmul_backward(a.dln, dp.wte, NULL, a.logits, a.lnf, p.wte, N, C, z.Vp);
    memset(a.dresidual, 0, N * C * sizeof(real));
    layernorm_backward(a.dresidual, dp.lnfw, dp.lnfb, a.dln, a.residual + 2 * L * N * C, p.lnfw, a.lnf_mean, a.lnf_rstd, N, C);
    for (size_t l = L; l-- > 0;) {
        const real *in = a.residual + 2 * l * N * C, *middle = in + N * C;
        matmul_backward(a.dfc, dp.fcprojw + l * 4 * C * C, dp.fcprojb + l * C, a.dresidual, a.gelu + l * N * 4 * C, p.fcprojw + l * 4 * C * C, N, 4 * C, C);
        gelu_backward(a.dfc, a.dfc, a.fc + l * N * 4 * C, N * 4 * C);
        matmul_backward(a.dln, dp.fcw + l * 4 * C * C, dp.fcb + l * 4 * C, a.dfc, a.ln2 + l * N * C, p.fcw + l * 4 * C * C, N, C, 4 * C);
        layernorm_backward(a.dresidual, dp.ln2w + l * C, dp.ln2b + l * C, a.dln, middle, p.ln2w + l * C, a.ln2_mean + l * N, a.ln2_rstd + l * N, N, C);
        matmul_backward(a.datt, dp.attprojw + l * C * C, dp.attprojb + l * C, a.dresidual, a.att + l * N * C, p.attprojw + l * C * C, N, C, C);
        attention_backward(a.dfq, a.dfk, a.dqkv, a.datt, a.att + l * N * C, a.att_lse + l * N * z.NH, a.fq + l * N * C, a.fk + l * N * C, a.qkv + l * N * 3 * C,
                           m->scale + l * z.NH, B, T, z.NH, z.HS);
        features_backward(m, a.dqkv, a.dfq, a.dfk, a.fq + l * N * C, a.fk + l * N * C, a.qkv + l * N * 3 * C, l, B, T);
        matmul_backward(a.dln, dp.qkvw + l * 3 * C * C, dp.qkvb + l * 3 * C, a.dqkv, a.ln1 + l * N * C, p.qkvw + l * 3 * C * C, N, C, 3 * C);
        layernorm_backward(a.dresidual, dp.ln1w + l * C, dp.ln1b + l * C, a.dln, in, p.ln1w + l * C, a.ln1_mean + l * N, a.ln1_rstd + l * N, N, C);
    }
    encoder_backward(dp.wte, dp.wpe, a.dresidual, m->x, B, T, C);
}

static void gsa_zero_gradients(GSA *m) {
    if (!m->grads) return; /* they are made as zeros */
#pragma omp parallel for
    for (size_t i = 0; i < m->total; i++) m->grads[i] = 0;
}

/* The L2 norm of each clip group's gradients: sums of fixed pieces, in double, added in order. */
static void gsa_gradient_norms(GSA *m, double norms[NUM_CLIPS]) {
    enum { PIECE = 1 << 15 };
    double *sums = (double *)xmalloc((m->total / PIECE + 1) * sizeof(double));
    for (int c = 0; c < NUM_CLIPS; c++) norms[c] = 0;
    for (int i = 0; i < NUM_TENSORS; i++) {
        const real *g = m->grads + m->tensors[i].offset;
        size_t n = m->tensors[i].size, pieces = (n + PIECE - 1) / PIECE;
#pragma omp parallel for
        for (size_t piece = 0; piece < pieces; piece++) {
            size_t end = (piece + 1) * PIECE < n ? (piece + 1) * PIECE : n;
            double sum = 0;
#pragma omp simd reduction(+ : sum)
            for (size_t k = piece * PIECE; k < end; k++) sum += (double)g[k] * (double)g[k];
            sums[piece] = sum;
        }
        for (size_t piece = 0; piece < pieces; piece++) norms[groups[m->tensors[i].group].clip] += sums[piece];
    }
    for (int c = 0; c < NUM_CLIPS; c++) norms[c] = sqrt(norms[c]);
    free(sums);
}

/* Puts the splats back into their bounds, see gsa/model.h. */
static void splat_bounds(GSA *m) {
    Sizes z = config_sizes(&m->config);
    ParameterTensors p = m->p;
    const real low = (real)log(SPLAT_PRECISION_MIN), high = (real)log(SPLAT_PRECISION_MAX), fastest = (real)log(SPLAT_FREQUENCY_MAX);
    const real start = z.G ? (real)splat_amplitude_start((int)z.S, (int)z.HS) : 0, range = (real)SPLAT_AMPLITUDE_RANGE;
#define CLAMP(x, least, most) ((x) < (least) ? (least) : (x) > (most) ? (most) : (x))
    for (size_t s = 0; s < z.G * z.S; s++) {
        real *mu = p.mu + s * z.HS, *lnp = p.lnp + s * z.P, square = 0, slope = 0;
        for (size_t k = 0; k < z.P; k++) lnp[k] = CLAMP(lnp[k], low, high);
        for (size_t k = 0; k < z.HS; k++) {
            real steep = mu[k] * exp_real(lnp[z.P > 1 ? k : 0]);
            square += mu[k] * mu[k], slope += steep * steep;
        }
        real far = (real)sqrt(square) / (real)SPLAT_CENTRE_MAX, steep = (real)sqrt(slope) / (real)SPLAT_SLOPE_MAX, excess = far > steep ? far : steep;
        if (excess > 1)
            for (size_t k = 0; k < z.HS; k++) mu[k] /= excess;
        p.lnalpha[s] = CLAMP(p.lnalpha[s], start - range, start + range);
        if (p.lntheta) p.lntheta[s] = p.lntheta[s] > fastest ? fastest : p.lntheta[s];
    }
#undef CLAMP
}

/* AdamW: m, v running means of g, g^2; p -= rate (m^ / (sqrt(v^) + 1e-8) + decay p), hats: divided by 1 - beta^step */
static void gsa_update(GSA *m, const Update *u) {
    if (!m->adam_m) {
        m->adam_m = (real *)xcalloc(m->total, sizeof(real));
        m->adam_v = (real *)xcalloc(m->total, sizeof(real));
    }
    real beta1 = (real)u->beta1, beta2 = (real)u->beta2;
    real correct1 = (real)(1 / (1 - pow(u->beta1, (double)u->step))), correct2 = (real)(1 / (1 - pow(u->beta2, (double)u->step)));
    for (int i = 0; i < NUM_TENSORS; i++) {
        const Tensor *t = &m->tensors[i];
        const Group *group = &groups[t->group];
        real *p = m->params + t->offset, *am = m->adam_m + t->offset, *av = m->adam_v + t->offset;
        const real *grads = m->grads + t->offset;
        real rate = (real)(u->rate * group->rate), decay = group->decay ? (real)u->weight_decay : 0, scale = (real)u->scale[group->clip];
#pragma omp parallel for simd
        for (size_t k = 0; k < t->size; k++) {
            real g = scale * grads[k];
            real first = beta1 * am[k] + (1 - beta1) * g, second = beta2 * av[k] + (1 - beta2) * g * g;
            am[k] = first, av[k] = second;
            p[k] -= rate * (first * correct1 / ((real)sqrt(second * correct2) + (real)1e-8) + decay * p[k]);
        }
    }
    splat_bounds(m);
}

/* ---------------------------------------------------------------------------------------------- main */

#ifndef GSA_NO_MAIN

/* The back end of gsa/train.h, in terms of the functions above. */

static const char *cpu_name(void) {
    static char name[128];
    int threads = 1;
#ifdef _OPENMP
    threads = omp_get_max_threads();
#endif
#ifdef GEMM_DNNL
    snprintf(name, sizeof name, "CPU, %d thread%s, matrix products by oneDNN %d.%d", threads, threads == 1 ? "" : "s", dnnl_version()->major, dnnl_version()->minor);
#else
    snprintf(name, sizeof name, "CPU, %d thread%s, built-in matrix products", threads, threads == 1 ? "" : "s");
#endif
    return name;
}

static void cpu_memory(const Config *c, int B, size_t bytes[NUM_MEMORY]) {
    Tensor tensors[NUM_TENSORS];
    ActivationTensors a;
    bytes[MEMORY_PARAMS] = bytes[MEMORY_GRADS] = model_tensors(c, tensors) * sizeof(real);
    bytes[MEMORY_OPTIMISER] = 2 * bytes[MEMORY_PARAMS];
    bytes[MEMORY_ACTIVATIONS] = carve_activations(&a, NULL, c, (size_t)B) * sizeof(real);
}

static void *cpu_create(const Config *c, int B) { return gsa_create(c, (size_t)B); }
static void cpu_destroy(void *model) { gsa_destroy((GSA *)model); }

static real **cpu_buffer(GSA *m, int buffer) {
    real **all[] = {&m->params, &m->grads, &m->adam_m, &m->adam_v};
    if (!*all[buffer]) *all[buffer] = (real *)xcalloc(m->total, sizeof(real));
    if (buffer == BUFFER_GRADS) point_parameters(&m->dp, m->grads, m->tensors);
    return all[buffer];
}

static void cpu_write(void *model, int buffer, const float *from) { memcpy(*cpu_buffer((GSA *)model, buffer), from, ((GSA *)model)->total * sizeof(real)); }
static const float *cpu_read(void *model, int buffer) { return *cpu_buffer((GSA *)model, buffer); }
static double cpu_forward(void *model, const int *x, const int *y, int B, int T) { return gsa_forward((GSA *)model, x, y, (size_t)B, (size_t)T); }
static void cpu_backward(void *model, double scale) { gsa_backward((GSA *)model, scale); }
static void cpu_zero_gradients(void *model) { gsa_zero_gradients((GSA *)model); }
static void cpu_gradient_norms(void *model, double norms[NUM_CLIPS]) { gsa_gradient_norms((GSA *)model, norms); }
static void cpu_update(void *model, const Update *u) { gsa_update((GSA *)model, u); }
static void cpu_logits(void *model, int b, int t, float *out) {
    const GSA *m = (const GSA *)model;
    memcpy(out, m->a.logits + ((size_t)b * m->used_T + (size_t)t) * m->config.Vp, m->config.V * sizeof(float));
}

int main(int argc, char **argv) {
    const Backend cpu = {cpu_name,     cpu_memory,         cpu_create,         cpu_destroy, cpu_write, cpu_read, cpu_forward,
                         cpu_backward, cpu_zero_gradients, cpu_gradient_norms, cpu_update,  cpu_logits};
    return train(argc, argv, &cpu);
}

#endif
