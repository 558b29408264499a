/* train_gsa.c: a GPT whose attention heads are standard or Gaussian Splat Attention (GSA), on the CPU in plain C: the
   reference that everything else is checked against.

   In this file: the network's arithmetic, every layer forward and backward, and nothing else. Reading order:
     matrix products -> encoder -> layernorm -> gelu, residual -> matmul -> feature maps: rope and splats ->
     forget gates -> the two mixers: attention and scan -> classifier -> the model: forward, backward, update -> main
   Elsewhere: what a model is (gsa/model.h: configuration and parameter table), what a run does (gsa/run/train.c), and
   the mathematics (dev/MODEL.md: the equations whose numbers stand in comments, and how each gradient follows).

   Conventions: B sequences of T tokens, C channels, NH heads of size HS = C / NH, V tokens in the vocabulary padded to
   Vp, S splats a head. x_forward(out, in, weights, sizes), x_backward(d..., ...): gradients of parameters are added to,
   gradients of activations are overwritten, except the residual stream's, which is added to. Every number has one
   owner: a thread computes it alone in a fixed order, so results do not depend on the number of threads.

   Tests compile this file with GSA_DOUBLE, where all numbers are double, and check it against finite differences;
   GSA_NO_MAIN leaves main to the file that includes this one. */

#include "gsa/run/train.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#endif
#if defined(USE_DNNL) && defined(_OPENMP) && !defined(GSA_DOUBLE) /* without OpenMP its threads cannot be set */
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

static inline real exp_real(real x) {
#ifdef GSA_DOUBLE
    return exp(x);
#else
    return exp_float(x);
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

/* the sum of a times b (n); in lanes of its own, because what compilers do after a loop of one vector takes longer than
   the loop */
static inline real dot(const real *a, const real *b, size_t n) {
    enum { WIDE = 16 };
    real lane[WIDE] = {0}, rest = 0;
    size_t i = 0;
    for (; i + WIDE <= n; i += WIDE)
        for (int k = 0; k < WIDE; k++) lane[k] += a[i + k] * b[i + k];
    for (; i < n; i++) rest += a[i] * b[i];
    for (int half = WIDE / 2; half > 0; half /= 2)
        for (int k = 0; k < half; k++) lane[k] += lane[k + half];
    return lane[0] + rest;
}

/* ---------------------------------------------------------------------- matrix products */

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

/* C (rows, vectors * LANES) = A B, or += where add; A(i, k) = A[i * ai + k * ak], row k of B at B + k * ldb. With
   the sizes known at compile time all accumulators stay in registers. */
#define TILE(name, rows, vectors)                                                                              \
    static inline void name(size_t K, const real *A, size_t ai, size_t ak, const real *B, size_t ldb, real *C, \
                            size_t ldc, bool add) {                                                            \
        vector sum[rows][vectors];                                                                             \
        for (int i = 0; i < rows; i++)                                                                         \
            for (int j = 0; j < vectors; j++)                                                                  \
                sum[i][j] = add ? *(const vector *)(C + i * ldc + j * LANES) : (vector){0};                    \
        for (size_t k = 0; k < K; k++) {                                                                       \
            vector b[vectors];                                                                                 \
            for (int j = 0; j < vectors; j++) b[j] = *(const vector *)(B + k * ldb + j * LANES);               \
            for (int i = 0; i < rows; i++) {                                                                   \
                real a = A[i * ai + k * ak];                                                                   \
                for (int j = 0; j < vectors; j++) sum[i][j] += a * b[j];                                       \
            }                                                                                                  \
        }                                                                                                      \
        for (int i = 0; i < rows; i++)                                                                         \
            for (int j = 0; j < vectors; j++) *(vector *)(C + i * ldc + j * LANES) = sum[i][j];                \
    }
TILE(tile_rows_2, ROWS, 2)
TILE(tile_rows_1, ROWS, 1)
TILE(tile_1_2, 1, 2)
TILE(tile_1_1, 1, 1)

/* C (M, N) = A B, or += where add, on the calling thread; A(i, k) = A[i * ai + k * ak]: any layout, transposed too;
   rows of B and C are contiguous. For the small products inside attention and feature maps. */
static void product(size_t M, size_t N, size_t K, const real *A, size_t ai, size_t ak, const real *B, size_t ldb,
                    real *C, size_t ldc, bool add) {
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

#ifdef GEMM_DNNL
/* oneDNN is told to use one thread: the blocks are ours, so the result does not depend on their number. Being inside a
   parallel region does not say it: a team of one (OMP_THREAD_LIMIT=1, OMP_DYNAMIC=true) is none to OpenMP, and oneDNN
   would hand parts of the product to threads that it does not get. */
static int dnnl_begin(void) {
    const int threads = omp_get_max_threads(); /* of this thread's task alone: the others' are their own */
    omp_set_num_threads(1);
    return threads;
}
#endif

/* One block of the product below, on the calling thread. */
static void gemm_block(bool ta, bool tb, size_t M, size_t N, size_t K, const real *A, size_t lda, const real *B,
                       size_t ldb, real *C, size_t ldc, bool add) {
#ifdef GEMM_DNNL
    const int threads = dnnl_begin();
    if (dnnl_sgemm(ta ? 'T' : 'N', tb ? 'T' : 'N', (dnnl_dim_t)M, (dnnl_dim_t)N, (dnnl_dim_t)K, 1.0f, A,
                   (dnnl_dim_t)lda, B, (dnnl_dim_t)ldb, add ? 1.0f : 0.0f, C, (dnnl_dim_t)ldc) != dnnl_success)
        die("oneDNN could not multiply (%zu, %zu) by (%zu, %zu)", M, K, K, N);
    omp_set_num_threads(threads);
#else
    /* Panels of B, COLUMNS wide, and of A are packed, so that the inner loop reads memory in order and from the
       cache. */
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

/* ---- products of bf16 numbers (--products bf16): what is multiplied is rounded, sums stay fp32 */

typedef uint16_t bf16;

/* where gemm puts its rounded factors; NULL: it multiplies in fp32. The model at work sets it (use_products). */
static bf16 *bf16_room;

/* NULL where this program and CPU multiply bf16 numbers, else what lacks. */
static const char *bf16_missing(void) {
#ifdef GEMM_DNNL
    if ((dnnl_get_effective_cpu_isa() & dnnl_cpu_isa_avx512_core_bf16) == dnnl_cpu_isa_avx512_core_bf16) return NULL;
    return "this CPU multiplies no such numbers (it has neither AMX nor AVX512-BF16)";
#else
    return "this program was built without oneDNN";
#endif
}

#ifdef GEMM_DNNL
/* x to the nearest bf16, ties to even; a NaN stays one */
static inline bf16 bf16_round(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return x != x ? 0x7FC0 : (bf16)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

/* out (rows, columns) = x, whose rows are ldx apart */
static void bf16_rows(bf16 *out, const float *x, size_t ldx, size_t rows, size_t columns) {
#pragma omp parallel for
    for (size_t i = 0; i < rows; i++)
        for (size_t k = 0; k < columns; k++) out[i * columns + k] = bf16_round(x[i * ldx + k]);
}

static void dnnl_must(dnnl_status_t status) {
    if (status != dnnl_success) die("oneDNN could not multiply bf16 numbers (status %d)", (int)status);
}

static dnnl_engine_t dnnl_cpu_engine(void) { /* first called before there are threads: gsa_create */
    static dnnl_engine_t engine;
    if (!engine) dnnl_must(dnnl_engine_create(&engine, dnnl_cpu, 0));
    return engine;
}

/* One block, as gemm_block. oneDNN remembers the code that it makes for a shape. */
static void bf16_block(bool ta, bool tb, size_t M, size_t N, size_t K, const bf16 *A, size_t lda, const bf16 *B,
                       size_t ldb, float *C, size_t ldc, bool add) {
    enum { FIRST, SECOND, OUT, PARTS };
    const int threads = dnnl_begin();
    const int names[PARTS] = {DNNL_ARG_SRC, DNNL_ARG_WEIGHTS, DNNL_ARG_DST};
    const dnnl_data_type_t types[PARTS] = {dnnl_bf16, dnnl_bf16, dnnl_f32};
    const dnnl_dims_t dims[PARTS] = {
        {(dnnl_dim_t)M, (dnnl_dim_t)K}, {(dnnl_dim_t)K, (dnnl_dim_t)N}, {(dnnl_dim_t)M, (dnnl_dim_t)N}};
    const dnnl_dims_t strides[PARTS] = {{ta ? 1 : (dnnl_dim_t)lda, ta ? (dnnl_dim_t)lda : 1},
                                        {tb ? 1 : (dnnl_dim_t)ldb, tb ? (dnnl_dim_t)ldb : 1},
                                        {(dnnl_dim_t)ldc, 1}};
    void *data[PARTS] = {(void *)A, (void *)B, C};
    dnnl_memory_desc_t form[PARTS];
    dnnl_exec_arg_t arguments[PARTS];
    dnnl_post_ops_t after;
    dnnl_primitive_attr_t attributes;
    dnnl_primitive_desc_t description;
    dnnl_primitive_t primitive;
    dnnl_stream_t stream;
    dnnl_engine_t engine = dnnl_cpu_engine();
    dnnl_must(dnnl_post_ops_create(&after));
    dnnl_must(dnnl_primitive_attr_create(&attributes));
#if DNNL_VERSION_MAJOR < 3
    dnnl_matmul_desc_t matmul;
    if (add) dnnl_must(dnnl_post_ops_append_sum(after, 1.0f));
    dnnl_must(dnnl_primitive_attr_set_post_ops(attributes, after));
    for (int i = 0; i < PARTS; i++)
        dnnl_must(dnnl_memory_desc_init_by_strides(&form[i], 2, dims[i], types[i], strides[i]));
    dnnl_must(dnnl_matmul_desc_init(&matmul, &form[FIRST], &form[SECOND], NULL, &form[OUT]));
    dnnl_must(dnnl_primitive_desc_create(&description, &matmul, attributes, engine, NULL));
#else
    if (add) dnnl_must(dnnl_post_ops_append_sum(after, 1.0f, 0, dnnl_data_type_undef));
    dnnl_must(dnnl_primitive_attr_set_post_ops(attributes, after));
    for (int i = 0; i < PARTS; i++)
        dnnl_must(dnnl_memory_desc_create_with_strides(&form[i], 2, dims[i], types[i], strides[i]));
    dnnl_must(dnnl_matmul_primitive_desc_create(&description, engine, form[FIRST], form[SECOND], NULL, form[OUT],
                                                attributes));
#endif
    dnnl_must(dnnl_primitive_create(&primitive, description));
    dnnl_must(dnnl_stream_create(&stream, engine, dnnl_stream_default_flags));
    for (int i = 0; i < PARTS; i++) {
        arguments[i].arg = names[i];
#if DNNL_VERSION_MAJOR < 3
        dnnl_must(dnnl_memory_create(&arguments[i].memory, &form[i], engine, data[i]));
#else
        dnnl_must(dnnl_memory_create(&arguments[i].memory, form[i], engine, data[i]));
        dnnl_memory_desc_destroy(form[i]);
#endif
    }
    dnnl_must(dnnl_primitive_execute(primitive, stream, PARTS, arguments));
    dnnl_must(dnnl_stream_wait(stream));
    for (int i = 0; i < PARTS; i++) dnnl_memory_destroy(arguments[i].memory);
    dnnl_stream_destroy(stream);
    dnnl_primitive_destroy(primitive);
    dnnl_primitive_desc_destroy(description);
    dnnl_primitive_attr_destroy(attributes);
    dnnl_post_ops_destroy(after);
    omp_set_num_threads(threads);
}
#endif

/* The blocks (m, n) into which a product (M, N) is cut, by its shape alone: were it by the number of threads, sums
   would round differently with another number. At least 8 blocks, so that threads have work, where the product is large
   enough; of a large product more, as larger blocks gain nothing; among those the squarest, because a block begins with
   copies of its m rows of A and n columns of B. */
static void gemm_cut(size_t M, size_t N, size_t *m, size_t *n) {
    enum { LEAST = 48, MOST = 2048 * 768, BLOCKS = 8 };
    double least = INFINITY;
    *m = M < 64 ? M : 64;
    *n = N < 64 ? N : 64;
    for (size_t rows = 1, high = M; rows == 1 || high >= LEAST; rows *= 2, high = ((M + rows - 1) / rows + 7) / 8 * 8)
        for (size_t columns = 1, wide = N; columns == 1 || wide >= LEAST;
             columns *= 2, wide = ((N + columns - 1) / columns + 15) / 16 * 16) {
            size_t blocks = ((M + high - 1) / high) * ((N + wide - 1) / wide);
            double copies = 1 / (double)high + 1 / (double)wide;
            if (blocks < BLOCKS || high * wide > MOST || copies >= least) continue;
            least = copies;
            *m = high;
            *n = wide;
        }
}

/* C (M, N) = op(A) op(B), or += where add, rows contiguous; op transposes where ta, tb. */
static void gemm(bool ta, bool tb, size_t M, size_t N, size_t K, const real *A, size_t lda, const real *B, size_t ldb,
                 real *C, size_t ldc, bool add) {
    size_t m, n;
    gemm_cut(M, N, &m, &n);
    size_t rows = (M + m - 1) / m, columns = (N + n - 1) / n;
#ifdef GEMM_DNNL
    bf16 *a = bf16_room, *b = a + M * K;
    if (a) {
        bf16_rows(a, A, lda, ta ? K : M, ta ? M : K);
        bf16_rows(b, B, ldb, tb ? N : K, tb ? K : N);
    }
#endif
#pragma omp parallel for schedule(dynamic)
    for (size_t block = 0; block < rows * columns; block++) {
        size_t i = block % rows * m, j = block / rows * n, height = M - i < m ? M - i : m,
               width = N - j < n ? N - j : n;
#ifdef GEMM_DNNL
        if (a) {
            bf16_block(ta, tb, height, width, K, a + (ta ? i : i * K), ta ? M : K, b + (tb ? j * K : j), tb ? K : N,
                       C + i * ldc + j, ldc, add);
            continue;
        }
#endif
        gemm_block(ta, tb, height, width, K, A + (ta ? i : i * lda), lda, B + (tb ? j * ldb : j), ldb, C + i * ldc + j,
                   ldc, add);
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

/* ---------------------------------------------------------------------- encoder */

/* out (B, T, C) = wte[token] + wpe[position]; wpe NULL: no learned positions. Positions start at first. */
static void encoder_forward(real *out, const int *tokens, const real *wte, const real *wpe, size_t B, size_t T,
                            size_t C, size_t first) {
#pragma omp parallel for
    for (size_t i = 0; i < B * T; i++) {
        const real *token = wte + (size_t)tokens[i] * C, *position = wpe ? wpe + (first + i % T) * C : NULL;
        real *o = out + i * C;
        for (size_t c = 0; c < C; c++) o[c] = position ? token[c] + position[c] : token[c];
    }
}

static void encoder_backward(real *dwte, real *dwpe, const real *dout, const int *tokens, size_t B, size_t T,
                             size_t C) {
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

/* ---------------------------------------------------------------------- layernorm */

#define LAYERNORM_EPSILON 1e-5

/* out (N, C) = (x - mean) / sqrt(var + 1e-5) * weight + bias, row by row; mean and rstd (N) are kept for the
   backward pass */
static void layernorm_forward(real *out, real *mean, real *rstd, const real *in, const real *weight, const real *bias,
                              size_t N, size_t C) {
#pragma omp parallel for if (N > 1)
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
        mean[i] = m;
        rstd[i] = r;
    }
}

/* With n = (x - mean) rstd and dn = dout weight: dx = rstd (dn - mean(dn) - n mean(dn n)). Adds to din: the residual
   stream. */
static void layernorm_backward(real *din, real *dweight, real *dbias, const real *dout, const real *in,
                               const real *weight, const real *mean, const real *rstd, size_t N, size_t C) {
#pragma omp parallel for
    for (size_t i = 0; i < N; i++) {
        const real *x = in + i * C, *d = dout + i * C;
        real *dx = din + i * C, m = mean[i], r = rstd[i], sum = 0, sum_n = 0;
#pragma omp simd reduction(+ : sum, sum_n)
        for (size_t c = 0; c < C; c++) {
            real dn = d[c] * weight[c];
            sum += dn;
            sum_n += dn * ((x[c] - m) * r);
        }
        sum /= C;
        sum_n /= C;
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
        for (size_t c = 0; c < n; c++) {
            dweight[c0 + c] += dw[c];
            dbias[c0 + c] += db[c];
        }
    }
}

/* ---------------------------------------------------------------------- gelu, residual */

#define GELU_A 0.7978845608028654 /* sqrt(2 / pi) */
#define GELU_B 0.044715

/* tanh form: x/2 (1 + tanh u), u = sqrt(2/pi) (x + 0.044715 x^3), which is x / (1 + exp(-2u)) */
static inline real gelu(real x) {
    real u = (real)GELU_A * (x + (real)GELU_B * x * x * x);
    return x / (1 + exp_real(-2 * u));
}

static void gelu_forward(real *out, const real *in, size_t N) {
#pragma omp parallel for simd
    for (size_t i = 0; i < N; i++) out[i] = gelu(in[i]);
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

/* ---------------------------------------------------------------------- matmul */

/* out (N, OC) = in (N, C) weight^T + bias; weight (OC, C); bias NULL: none */
static void matmul_forward(real *out, const real *in, const real *weight, const real *bias, size_t N, size_t C,
                           size_t OC) {
    if (bias) {
#pragma omp parallel for
        for (size_t i = 0; i < N; i++) memcpy(out + i * OC, bias, OC * sizeof(real));
    }
    gemm(false, true, N, OC, C, in, C, weight, C, out, OC, bias != NULL);
}

/* din (N, C) = dout weight; dweight = dout^T in, or += where add; dbias += column sums of dout */
static void matmul_backward(real *din, real *dweight, real *dbias, const real *dout, const real *in, const real *weight,
                            size_t N, size_t C, size_t OC, bool add) {
    gemm(false, false, N, C, OC, dout, OC, weight, C, din, C, false);
    gemm(true, false, OC, C, N, dout, OC, in, C, dweight, C, add);
    if (dbias) add_column_sums(dbias, dout, N, OC);
}

/* ---------------------------------------------------------------------- feature maps

   A head turns its queries and keys into features, and logits are f_q . f_k (times a scale per head). A standard
   head's features are q and k themselves, or q and k normalised and rotated (rope); a GSA head's are its splats'
   responses times their envelope (splat). Both work on one head of one sequence: x has T rows of size HS, `stride`
   apart (a slice of qkv); features f (T, HS) are contiguous. */

/* n frequencies from their logarithms; double, because their rounding is multiplied by the distance */
static double *frequencies(const real *log_theta, size_t n) {
    double *theta = (double *)xmalloc(n * sizeof(double));
    for (size_t i = 0; i < n; i++) theta[i] = exp((double)log_theta[i]);
    return theta;
}

/* waves[t] = cos(theta_i n) for all i of `count`, then sin(theta_i n), n = first + t. The phase is kept as an
   integer fraction of a turn and wraps exactly, so that position 1,000,000 is as exact as position 1. */
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

/* out = waves (T, 2 count) with each angle turned on by sign psi (count), which makes keys' waves of equation (7b); psi
   NULL: as they are. out may be waves. */
static void wave_turn(real *out, const real *waves, const real *psi, int sign, size_t count, size_t T) {
    for (size_t i = 0; i < count; i++) {
        real cosine = psi ? (real)cos((double)psi[i]) : 1, sine = psi ? (real)(sign * sin((double)psi[i])) : 0;
        for (size_t t = 0; t < T; t++) {
            real c = waves[t * 2 * count + i], s = waves[t * 2 * count + count + i];
            out[t * 2 * count + i] = c * cosine - s * sine;
            out[t * 2 * count + count + i] = s * cosine + c * sine;
        }
    }
}

#define SPHERE_EPSILON 1e-6

/* equation (1): x^ = x / sqrt(|x|^2 + 1e-6), for any x smooth; returns the factor */
static inline real unit_vector(real *unit, const real *x, size_t HS) {
    real inverse = 1 / (real)sqrt(dot(x, x, HS) + SPHERE_EPSILON);
    for (size_t k = 0; k < HS; k++) unit[k] = x[k] * inverse;
    return inverse;
}

/* dx = inverse (g - x^ (x^ . g)), or += where add; g the gradient of x^ */
static inline void unit_vector_backward(real *dx, const real *g, const real *unit, real inverse, bool add, size_t HS) {
    real along = dot(unit, g, HS);
    for (size_t k = 0; k < HS; k++) dx[k] = (add ? dx[k] : 0) + inverse * (g[k] - unit[k] * along);
}

/* rope: f = rotation by position of x^ sqrt(HS), pairs (k, k + HS/2). waves (T, HS): cosines and sines of the
   positions. */
static void rope_forward(real *f, const real *x, size_t stride, const real *waves, size_t T, size_t HS) {
    size_t half = HS / 2;
    real size = (real)sqrt((double)HS);
    for (size_t t = 0; t < T; t++, f += HS, x += stride, waves += HS) {
        unit_vector(f, x, HS);
        for (size_t k = 0; k < half; k++) {
            real a = f[k] * size, b = f[half + k] * size, c = waves[k], s = waves[half + k];
            f[k] = a * c - b * s;
            f[half + k] = a * s + b * c;
        }
    }
}

static void rope_backward(real *dx, const real *df, const real *x, size_t stride, const real *waves, size_t T,
                          size_t HS) {
    size_t half = HS / 2;
    real size = (real)sqrt((double)HS), *unit = (real *)xmalloc(2 * HS * sizeof(real)), *g = unit + HS;
    for (size_t t = 0; t < T; t++, df += HS, x += stride, dx += stride, waves += HS) {
        for (size_t k = 0; k < half; k++) { /* the rotation back */
            real a = df[k], b = df[half + k], c = waves[k], s = waves[half + k];
            g[k] = size * (a * c + b * s);
            g[half + k] = size * (b * c - a * s);
        }
        real inverse = unit_vector(unit, x, HS);
        unit_vector_backward(dx, g, unit, inverse, false, HS);
    }
    free(unit);
}

/* d (HS/2) += dL / dtheta_k of f (T, HS), what rope_forward wrote: the sum of t X_t,k with X = f_k df_(k + HS/2) -
   f_(k + HS/2) df_k, the gradient of the angle. Terms grow with t and cancel: summed in double, from the middle of
   the window. */
static void rope_frequencies_backward(double *d, const real *df, const real *f, size_t T, size_t HS) {
    size_t half = HS / 2;
    for (size_t t = 0; t < T; t++, f += HS, df += HS)
        for (size_t k = 0; k < half; k++)
            d[k] += ((double)t - 0.5 * (double)(T - 1)) * (double)(f[k] * df[half + k] - f[half + k] * df[k]);
}

/* What follows from one head's splats alone. Full precision has only the key scale. */
typedef struct {
    real *slope, *slope_t;         /* Lambda mu (S, HS) and its transpose (HS, S) */
    real *precision, *precision_t; /* Lambda (S, P), and for diagonal precision its transpose (HS, S) */
    real *centre;                  /* mu . Lambda mu (S) */
    real key_scale;                /* see scan_key_scale */
} SplatConstants;

/* The splats of one head: its row of each tensor in SPLAT_TENSORS (gsa/model.h), NULL where the model has none. */
typedef struct {
#define X(name, ...) const real *name;
    SPLAT_TENSORS(X)
#undef X
    bool watch;                      /* the backward pass also sums |G| */
    size_t S, P;                     /* P: numbers per precision, 1 isotropic, HS diagonal, HS (HS + 1) / 2 full */
    bool raw;                        /* x^ = x in place of equation (1) */
    const SplatConstants *constants; /* NULL: made anew for each pass, as training changes the splats */
} Splats;

/* One head's splats over T tokens: what the forward and the backward pass share. Full precision uses only the first
   four, its own three, and works splat by splat. */
typedef struct {
    real *unit, *inverse, *response; /* x^ (T, HS), the factor (T), ln phi and later its gradient (T, S) */
    real *square;                    /* |x^|^2 (T) */
    SplatConstants c;
    bool own;                        /* c was made by splat_open */
    real *square_unit, *spread;      /* diagonal: x^ .* x^ (T, HS) and products with Lambda (T, max(S, HS)) */
    real *apart, *across, *cholesky; /* full: x^ - mu (T, HS), (x^ - mu) L (T, HS), L and its transpose (2, HS, HS) */
} SplatRoom;

static inline bool is_full(const Splats *w, size_t HS) { return w->P > HS; }

/* for isotropic and diagonal precision; free(c.slope) frees them all */
static SplatConstants splat_constants(const Splats *w, size_t HS) {
    size_t S = w->S, P = w->P;
    SplatConstants c;
    c.slope = (real *)xmalloc(S * (2 * HS + 2 * P + 1) * sizeof(real));
    c.slope_t = c.slope + S * HS;
    c.precision = c.slope_t + S * HS;
    c.precision_t = c.precision + S * P;
    c.centre = c.precision_t + S * P;
    c.key_scale = 0;
    for (size_t s = 0; s < S; s++) {
        c.centre[s] = 0;
        for (size_t k = 0; k < P; k++)
            c.precision[s * P + k] = c.precision_t[k * S + s] = exp_real(w->log_precision[s * P + k]);
        for (size_t k = 0; k < HS; k++) {
            real mu = w->mu[s * HS + k], slope = mu * c.precision[s * P + (P > 1 ? k : 0)];
            c.slope[s * HS + k] = c.slope_t[k * S + s] = slope;
            c.centre[s] += mu * slope;
        }
    }
    return c;
}

static SplatRoom splat_open(const Splats *w, const real *x, size_t stride, size_t T, size_t HS) {
    size_t S = w->S, widest = S > HS ? S : HS;
    bool full = is_full(w, HS), diagonal = !full && w->P > 1;
    SplatRoom r;
    memset(&r, 0, sizeof r);
    r.unit = (real *)xmalloc((T * (HS + 2 + S) + (full       ? 2 * T * HS + 2 * HS * HS
                                                  : diagonal ? T * (HS + widest)
                                                             : 0)) *
                             sizeof(real));
    r.inverse = r.unit + T * HS;
    r.square = r.inverse + T;
    r.response = r.square + T;
    for (size_t t = 0; t < T; t++) {
        real *unit = r.unit + t * HS;
        if (w->raw) memcpy(unit, x + t * stride, HS * sizeof(real));
        else r.inverse[t] = unit_vector(unit, x + t * stride, HS);
        r.square[t] = dot(unit, unit, HS);
    }
    if (full) {
        r.apart = r.response + T * S;
        r.across = r.apart + T * HS;
        r.cholesky = r.across + T * HS;
        return r;
    }
    r.own = !w->constants;
    r.c = r.own ? splat_constants(w, HS) : *w->constants;
    if (diagonal) {
        r.square_unit = r.response + T * S;
        r.spread = r.square_unit + T * HS;
        for (size_t i = 0; i < T * HS; i++) r.square_unit[i] = r.unit[i] * r.unit[i];
    }
    return r;
}

static void splat_close(SplatRoom *r) {
    free(r->unit);
    if (r->own) free(r->c.slope);
}

/* L of splat s from its packed rows, the diagonal as logarithms, then L^T: cholesky (2, HS, HS) */
static void cholesky_factor(real *cholesky, const real *packed, size_t HS) {
    real *L = cholesky, *Lt = cholesky + HS * HS;
    for (size_t i = 0; i < HS; i++)
        for (size_t k = 0; k < HS; k++) {
            real entry = k > i ? 0 : packed[i * (i + 1) / 2 + k];
            L[i * HS + k] = Lt[k * HS + i] = k == i ? exp_real(entry) : entry;
        }
}

/* the room's `apart` and `across` of splat s, for full precision */
static void splat_across(SplatRoom *r, const Splats *w, size_t s, size_t T, size_t HS) {
    cholesky_factor(r->cholesky, w->log_precision + s * w->P, HS);
    for (size_t t = 0; t < T; t++)
        for (size_t k = 0; k < HS; k++) r->apart[t * HS + k] = r->unit[t * HS + k] - w->mu[s * HS + k];
    product(T, HS, HS, r->apart, HS, 1, r->cholesky, HS, r->across, HS, false);
}

/* Equation (2), response (T, S) = ln phi_s(x^) = -1/2 (x^ - mu_s)^T Lambda_s (x^ - mu_s): for full precision, Lambda
   = L L^T, as -1/2 |L^T (x^ - mu)|^2; otherwise multiplied out, so that it is one matrix product for all splats:
   Lambda mu . x^ - 1/2 x^ . Lambda x^ - 1/2 mu . Lambda mu. */
static void splat_responses(SplatRoom *r, const Splats *w, size_t T, size_t HS) {
    size_t S = w->S;
    if (is_full(w, HS)) {
        for (size_t s = 0; s < S; s++) {
            splat_across(r, w, s, T, HS);
            for (size_t t = 0; t < T; t++)
                r->response[t * S + s] = (real)-0.5 * dot(r->across + t * HS, r->across + t * HS, HS);
        }
        return;
    }
    product(T, S, HS, r->unit, HS, 1, r->c.slope_t, S, r->response, S, false);
    if (w->P > 1) product(T, S, HS, r->square_unit, HS, 1, r->c.precision_t, S, r->spread, S, false);
    for (size_t t = 0; t < T; t++)
        for (size_t s = 0; s < S; s++) {
            real spread = w->P > 1 ? r->spread[t * S + s] : r->c.precision[s] * r->square[t];
            r->response[t * S + s] -= (real)0.5 * (spread + r->c.centre[s]);
        }
}

/* Sums over tokens from which the gradients of one head's splats follow without a second pass. With G = dL / d ln
   phi_s(x^): M0 = sum G (S), M1 = sum G x^ (S, HS), M2 = sum G |x^|^2 (S) or sum G x^ .* x^ (S, HS); for full
   precision M1 and M2 hold dmu and dL themselves. Then d ln alpha (S), d theta (S), d delta (S), d psi (S), and for
   adaptation, where watched, sum |G| (S); d ln g. One record per head and sequence. */
typedef struct {
    real *M0, *M1, *M2, *amplitude, *frequency, *decay, *psi, *absolute, *gain;
} Moments;

static size_t moments_size(size_t S, size_t P, size_t HS) { return S * (HS + P + 6) + 1; }

static Moments moments_at(real *record, size_t S, size_t P, size_t HS) {
    Moments m;
    m.M0 = record;
    m.M1 = m.M0 + S;
    m.M2 = m.M1 + S * HS;
    m.amplitude = m.M2 + S * P;
    m.frequency = m.amplitude + S;
    m.decay = m.frequency + S;
    m.psi = m.decay + S;
    m.absolute = m.psi + S;
    m.gain = m.absolute + S;
    return m;
}

/* dx (+= where add) from r->response = G (T, S), the gradient of ln phi; adds to the moments. */
static void splat_responses_backward(real *dx, Moments *m, SplatRoom *r, const Splats *w, size_t stride, bool add,
                                     size_t T, size_t HS) {
    size_t S = w->S, P = w->P;
    const real *G = r->response;
    real *g = (real *)xcalloc(T * HS, sizeof(real)); /* dL / dx^ = -sum_s G_s Lambda_s (x^ - mu_s) */
    for (size_t t = 0; t < T; t++)
        for (size_t s = 0; s < S; s++) m->M0[s] += G[t * S + s];
    for (size_t t = 0; t < T && w->watch; t++)
        for (size_t s = 0; s < S; s++) m->absolute[s] += G[t * S + s] < 0 ? -G[t * S + s] : G[t * S + s];
    if (is_full(w, HS)) {
        real *dL = (real *)xmalloc((HS * HS + HS) * sizeof(real)), *sum = dL + HS * HS;
        for (size_t s = 0; s < S; s++) {
            splat_across(r, w, s, T, HS);
            memset(sum, 0, HS * sizeof(real));
            for (size_t t = 0; t < T; t++) /* across is its own gradient now */
                for (size_t k = 0; k < HS; k++) sum[k] += r->across[t * HS + k] *= -G[t * S + s];
            product(HS, HS, T, r->apart, 1, HS, r->across, HS, dL, HS, false);
            for (size_t i = 0; i < HS; i++)
                for (size_t k = 0; k <= i; k++)
                    m->M2[s * P + i * (i + 1) / 2 + k] += dL[i * HS + k] * (k == i ? r->cholesky[i * HS + i] : 1);
            product(T, HS, HS, r->across, HS, 1, r->cholesky + HS * HS, HS, g, HS, true);
            for (size_t i = 0; i < HS; i++)
                for (size_t k = 0; k <= i; k++) m->M1[s * HS + i] -= r->cholesky[i * HS + k] * sum[k];
        }
        free(dL);
    } else {
        for (size_t t = 0; t < T; t++)
            for (size_t s = 0; s < S && P == 1; s++) m->M2[s] += G[t * S + s] * r->square[t];
        product(S, HS, T, G, 1, S, r->unit, HS, m->M1, HS, true);
        if (P > 1) {
            product(S, HS, T, G, 1, S, r->square_unit, HS, m->M2, HS, true);
            product(T, HS, S, G, S, 1, r->c.precision, HS, r->spread, HS, false);
        }
        product(T, HS, S, G, S, 1, r->c.slope, HS, g, HS, false);
        for (size_t t = 0; t < T; t++) {
            real total = P == 1 ? dot(G + t * S, r->c.precision, S) : 0;
            for (size_t k = 0; k < HS; k++)
                g[t * HS + k] -= r->unit[t * HS + k] * (P > 1 ? r->spread[t * HS + k] : total);
        }
    }
    for (size_t t = 0; t < T; t++) {
        real *d = dx + t * stride;
        if (!w->raw) unit_vector_backward(d, g + t * HS, r->unit + t * HS, r->inverse[t], add, HS);
        for (size_t k = 0; k < HS && w->raw; k++) d[k] = (add ? d[k] : 0) + g[t * HS + k];
    }
    free(g);
}

/* Equations (7), (9), features for the softmax mixer: f = [a phi_s(x^) cos(theta_s n), a phi_s(x^) sin(theta_s n), 0
   ...], a = alpha_s for queries and 1 for keys, whose angles are theta_s n + psi_s (7b). waves (T, 2S) as from
   wave_table; NULL: equation (6), no envelope, f = [a phi_s(x^), 0 ...]. */
static void splat_forward(real *f, const real *x, size_t stride, const Splats *w, bool query, const real *waves,
                          size_t T, size_t HS) {
    size_t S = w->S;
    SplatRoom r = splat_open(w, x, stride, T, HS);
    real *turned = NULL;
    if (waves && w->psi && !query) {
        turned = (real *)xmalloc(T * 2 * S * sizeof(real));
        wave_turn(turned, waves, w->psi, 1, S, T);
        waves = turned;
    }
    splat_responses(&r, w, T, HS);
    for (size_t t = 0; t < T; t++) {
        real *row = f + t * HS, *response = r.response + t * S;
        const real *wave = waves ? waves + t * 2 * S : NULL, *alive = w->alive, *log_alpha = w->log_alpha;
#pragma omp simd
        for (size_t s = 0; s < S; s++) {
            real feature = exp_real(response[s] + (query ? log_alpha[s] : 0));
            row[s] = alive[s] > 0 ? feature : 0;
        }
        if (waves)
            for (size_t s = 0; s < S; s++) {
                row[S + s] = row[s] * wave[S + s];
                row[s] *= wave[s];
            }
        for (size_t k = waves ? 2 * S : S; k < HS; k++) row[k] = 0;
    }
    free(turned);
    splat_close(&r);
}

/* dx from df and f (what splat_forward wrote); adds to the moments. All products are f df, never divided by phi, so
   that a response that underflows does no harm. */
static void splat_backward(real *dx, real *record, const real *df, const real *f, const real *x, size_t stride,
                           const Splats *w, bool query, bool envelope, size_t T, size_t HS) {
    size_t S = w->S;
    Moments m = moments_at(record, S, w->P, HS);
    SplatRoom r = splat_open(w, x, stride, T, HS);
    /* d theta and d psi. Terms of the first grow with t and cancel: summed in double, from the middle of the window */
    double *dtheta = (double *)xcalloc(2 * S, sizeof(double)), *dpsi = dtheta + S;
    for (size_t t = 0; t < T; t++) {
        const real *fc = f + t * HS, *fs = fc + S, *dc = df + t * HS, *ds = dc + S;
        for (size_t s = 0; s < S; s++) {
            real g = fc[s] * dc[s];
            if (envelope) {
                g += fs[s] * ds[s];
                double X = (double)(fc[s] * ds[s] - fs[s] * dc[s]);
                dtheta[s] += ((double)t - 0.5 * (double)(T - 1)) * X;
                if (!query) dpsi[s] += X;
            }
            r.response[t * S + s] = g;
            if (query) m.amplitude[s] += g;
        }
    }
    for (size_t s = 0; s < S; s++) {
        m.frequency[s] += (real)dtheta[s];
        m.psi[s] += (real)dpsi[s];
    }
    splat_responses_backward(dx, &m, &r, w, stride, false, T, HS);
    free(dtheta);
    splat_close(&r);
}

/* Where the gradients of one head's splats go. `alive` has none: its place takes sum |G| where watched. */
typedef struct {
#define X(name, ...) real *name;
    SPLAT_TENSORS(X)
#undef X
} SplatGradients;

/* Adds what follows from the moments, summed over sequences: B records, `apart` numbers from each other. */
static void splat_gradients(SplatGradients *d, const real *records, size_t apart, size_t B, const Splats *w,
                            size_t HS) {
    size_t S = w->S, P = w->P, n = moments_size(S, P, HS);
    double *sum = (double *)xcalloc(n, sizeof(double)); /* M1 - M0 mu cancels: in double it costs nothing here */
    for (size_t b = 0; b < B; b++)
        for (size_t i = 0; i < n; i++) sum[i] += (double)records[b * apart + i];
    const double *M0 = sum, *M1 = M0 + S, *M2 = M1 + S * HS, *amplitude = M2 + S * P, *frequency = amplitude + S,
                 *decay = frequency + S, *psi = decay + S, *absolute = psi + S, *gain = absolute + S;
    for (size_t s = 0; s < S; s++) {
        double along = 0, square = 0;
        for (size_t k = 0; k < HS; k++) {
            double mu = (double)w->mu[s * HS + k], m1 = M1[s * HS + k],
                   p = is_full(w, HS) ? 0 : (double)exp_real(w->log_precision[s * P + (P > 1 ? k : 0)]);
            d->mu[s * HS + k] += (real)(is_full(w, HS) ? m1 : p * (m1 - M0[s] * mu));
            along += mu * m1;
            square += mu * mu;
            if (P == HS && P > 1)
                d->log_precision[s * P + k] += (real)(-0.5 * p * (M2[s * P + k] - 2 * mu * m1 + mu * mu * M0[s]));
        }
        if (P == 1)
            d->log_precision[s] +=
                (real)((double)exp_real(w->log_precision[s]) * (along - 0.5 * (M2[s] + square * M0[s])));
        if (is_full(w, HS))
            for (size_t k = 0; k < P; k++) d->log_precision[s * P + k] += (real)M2[s * P + k];
        d->log_alpha[s] += (real)amplitude[s];
        if (w->watch) d->alive[s] += (real)absolute[s];
        if (d->log_theta) d->log_theta[s] += (real)(exp((double)w->log_theta[s]) * frequency[s]);
        if (d->log_delta) d->log_delta[s] += (real)(exp((double)w->log_delta[s]) * decay[s]);
        if (d->psi) d->psi[s] += (real)psi[s];
    }
    if (d->log_far) *d->log_far += (real)*gain;
    free(sum);
}

/* ---------------------------------------------------------------------- forget gates

   A gated head lets go of a share of what lies before each token: f_t = sigmoid(w . x_t + b), with x the block's
   layernormed input, and equation (4a): its logits z_ij get c_i - c_j, c_t = sum of ln f up to t. Only differences of
   c matter, and they are taken in double. */

/* Of one layer: ln f (B T, count), its gradient, and which column is that of head h (NH), -1: it has no gate. */
typedef struct {
    const real *log_forget;
    real *dlog_forget;
    const int *column;
    size_t count;
} Gates;

/* ln sigmoid(u), for any u */
static inline real log_sigmoid(real u) {
    double x = (double)u;
    return (real)(x > 0 ? -log1p(exp(-x)) : x - log1p(exp(x)));
}

/* ln f (N, count) from x (N, C), weight (count, C), bias (count) */
static void forget_forward(real *log_forget, const real *x, const real *weight, const real *bias, size_t N, size_t C,
                           size_t count) {
    matmul_forward(log_forget, x, weight, bias, N, C, count);
#pragma omp parallel for
    for (size_t i = 0; i < N * count; i++) log_forget[i] = log_sigmoid(log_forget[i]);
}

/* dx += ; dlog_forget is overwritten. d ln sigmoid(u) / du = 1 - f */
static void forget_backward(real *dx, real *dweight, real *dbias, real *dlog_forget, const real *log_forget,
                            const real *x, const real *weight, size_t N, size_t C, size_t count) {
#pragma omp parallel for
    for (size_t i = 0; i < N * count; i++) dlog_forget[i] *= (real)-expm1((double)log_forget[i]);
    gemm(false, false, N, C, count, dlog_forget, count, weight, C, dx, C, true);
    gemm(true, false, count, C, N, dlog_forget, count, x, C, dweight, C, true);
    add_column_sums(dbias, dlog_forget, N, count);
}

/* c (T) from ln f, `stride` apart; the caller frees it */
static double *forget_sums(const real *log_forget, size_t stride, size_t T) {
    double *c = (double *)xmalloc(T * sizeof(double)), sum = 0;
    for (size_t t = 0; t < T; t++) c[t] = sum += (double)log_forget[t * stride];
    return c;
}

/* d ln f (T), `stride` apart, from dc: c_t holds all ln f up to t */
static void forget_sums_backward(real *dlog_forget, size_t stride, const double *dc, size_t T) {
    double sum = 0;
    for (size_t t = T; t-- > 0;) dlog_forget[t * stride] = (real)(sum += dc[t]);
}

/* A query's scores s (n) get own - c_j: own is the query's c. A logit is scale times a score. */
static inline void forget_add(real *s, double own, const double *c, double scale, size_t n) {
    double inverse = 1 / scale;
#pragma omp simd
    for (size_t j = 0; j < n; j++) s[j] += (real)((own - c[j]) * inverse);
}

/* The gradients of own and c (n) from that of s; both are added to. */
static inline void forget_add_backward(double *down, double *dc, const real *ds, double scale, size_t n) {
    double inverse = 1 / scale, sum = 0;
#pragma omp simd reduction(+ : sum)
    for (size_t j = 0; j < n; j++) {
        double dz = (double)ds[j] * inverse;
        sum += dz;
        dc[j] -= dz;
    }
    *down += sum; /* the query's own key is one of them: dc holds it already */
}

/* ---------------------------------------------------------------------- attention

   The softmax mixer, equation (4), for standard and GSA heads alike: o_i = sum_j softmax_j(scale f_q(i) . f_k(j))
   v_j over the keys that query i may see: j in (i - window, i], or |i - j| < window where not causal. Works on BLOCK
   queries at a time, so no T x T matrix exists; the backward pass recomputes the weights from lse, the logarithm of
   their sum. */

enum { BLOCK = 64 };

/* out (columns, ldo), its numbers behind `rows` 0 up to ldo. Written row by row, in pieces whose inputs stay in the
   first-level cache. */
static void transpose(real *out, size_t ldo, const real *in, size_t ldi, size_t rows, size_t columns) {
    for (size_t i0 = 0; i0 < rows; i0 += BLOCK) {
        size_t n = rows - i0 < BLOCK ? rows - i0 : BLOCK;
        for (size_t j = 0; j < columns; j++) {
            real *o = out + j * ldo + i0;
            const real *x = in + i0 * ldi + j;
            for (size_t i = 0; i < n; i++) o[i] = x[i * ldi];
        }
    }
    for (size_t j = 0; j < columns && rows < ldo; j++) memset(out + j * ldo + rows, 0, (ldo - rows) * sizeof(real));
}

static inline size_t first_key(size_t i, size_t window) { return i + 1 > window ? i + 1 - window : 0; }
static inline size_t end_of_keys(size_t i, size_t window, bool causal, size_t T) {
    return causal ? i + 1 : i + window < T ? i + window : T;
}
static inline size_t round_up(size_t n) { return (n + COLUMNS - 1) / COLUMNS * COLUMNS; }

/* One head of one sequence: the queries at positions first .. T - 1, q, lse (T - first) and out (T - first, HS) with
   rows out_stride apart, over keys k (T, HS) and values v (T, HS) with rows v_stride apart. c (T): sums of ln f of a
   gated head, or NULL. */
static void attention_head_forward(real *out, size_t out_stride, real *lse, const real *q, const real *k, const real *v,
                                   size_t v_stride, real scale, const double *c, size_t window, bool causal,
                                   size_t first, size_t T, size_t HS) {
    size_t padded = round_up(T) + COLUMNS;
    /* (HS, padded), (BLOCK, padded) */
    real *kt = (real *)xmalloc((HS + BLOCK) * padded * sizeof(real)), *weights = kt + HS * padded;
    transpose(kt, padded, k, HS, T, HS);
    for (size_t i0 = first; i0 < T; i0 += BLOCK) {
        size_t rows = T - i0 < BLOCK ? T - i0 : BLOCK, low_key = first_key(i0, window),
               keys = end_of_keys(i0 + rows - 1, window, causal, T) - low_key;
        product(rows, round_up(keys), HS, q + (i0 - first) * HS, HS, 1, kt + low_key, padded, weights, padded, false);
        for (size_t r = 0; r < rows; r++) {
            size_t low = first_key(i0 + r, window) - low_key,
                   n = end_of_keys(i0 + r, window, causal, T) - low_key - low;
            real *row = weights + r * padded, *w = row + low, most, sum = 0;
            if (c) forget_add(w, c[i0 + r], c + low_key + low, (double)scale, n);
            most = largest(w, n);
#pragma omp simd reduction(+ : sum)
            for (size_t j = 0; j < n; j++) {
                w[j] = exp_real(scale * (w[j] - most));
                sum += w[j];
            }
            real inverse = 1 / sum;
            for (size_t j = 0; j < n; j++) w[j] *= inverse;
            for (size_t j = 0; j < low; j++) row[j] = 0;
            for (size_t j = low + n; j < keys; j++) row[j] = 0;
            lse[i0 - first + r] = scale * most + (real)log(sum);
        }
        product(rows, HS, keys, weights, padded, 1, v + low_key * v_stride, v_stride, out + (i0 - first) * out_stride,
                out_stride, false);
    }
    free(kt);
}

/* The sums of ln f of head h in sequence b, or NULL where it has no gate. */
static double *head_forget_sums(const Gates *gates, size_t b, size_t h, size_t T) {
    if (!gates || gates->column[h] < 0) return NULL;
    return forget_sums(gates->log_forget + b * T * gates->count + (size_t)gates->column[h], gates->count, T);
}

/* out (B, T, A), A = NH HS; lse (B, NH, T); fq, fk (B, NH, T, HS); v: the third part of qkv (B, T, 3A); scale,
   window (NH): a window of 0 leaves the head out; gates: NULL where no head has one */
static void attention_forward(real *out, real *lse, const real *fq, const real *fk, const real *qkv, const real *scale,
                              const size_t *window, const Gates *gates, bool causal, size_t B, size_t T, size_t NH,
                              size_t HS) {
    size_t A = NH * HS;
#pragma omp parallel for schedule(dynamic)
    for (size_t head = 0; head < B * NH; head++) {
        size_t b = head / NH, h = head % NH;
        if (window[h] == 0) continue;
        double *c = head_forget_sums(gates, b, h, T);
        attention_head_forward(out + b * T * A + h * HS, A, lse + head * T, fq + head * T * HS, fk + head * T * HS,
                               qkv + b * T * 3 * A + 2 * A + h * HS, 3 * A, scale[h], c, window[h], causal, 0, T, HS);
        free(c);
    }
}

/* dfq, dfk (B, NH, T, HS) and the third part of dqkv (B, T, 3A). With weights p_ij and delta_i = do_i . o_i: dv_j =
   sum_i p_ij do_i, dz_ij = p_ij (do_i . v_j - delta_i), df_q(i) = scale sum_j dz_ij f_k(j), df_k(j) = scale sum_i
   dz_ij f_q(i). out and lse need not be those of the weights alone: of a head that merges two mixers they are the
   merged ones. Gates get d ln f: dc_i is the sum of dz_ij over j, less that of dz_ji. */
static void attention_backward(real *dfq, real *dfk, real *dqkv, const real *dout, const real *out, const real *lse,
                               const real *fq, const real *fk, const real *qkv, const real *scale, const size_t *window,
                               const Gates *gates, bool causal, size_t B, size_t T, size_t NH, size_t HS) {
    size_t A = NH * HS, padded = round_up(T) + COLUMNS;
#pragma omp parallel for schedule(dynamic)
    for (size_t head = 0; head < B * NH; head++) {
        size_t b = head / NH, h = head % NH, W = window[h];
        const real *q = fq + head * T * HS, *k = fk + head * T * HS, *v = qkv + b * T * 3 * A + 2 * A + h * HS;
        real *dk = dfk + head * T * HS, *dv = dqkv + b * T * 3 * A + 2 * A + h * HS;
        if (W == 0) continue;
        const real factor = scale[h]; /* a copy: a load from memory that stores might change keeps loops scalar */
        real *kt = (real *)xmalloc((2 * HS + 2 * BLOCK) * padded * sizeof(real)), *vt = kt + HS * padded,
             *weights = vt + HS * padded, *dweights = weights + BLOCK * padded;
        double *c = head_forget_sums(gates, b, h, T), *dc = c ? (double *)xcalloc(T, sizeof(double)) : NULL;
        transpose(kt, padded, k, HS, T, HS);
        transpose(vt, padded, v, 3 * A, T, HS);
        memset(dk, 0, T * HS * sizeof(real)); /* every block adds to its keys */
        for (size_t t = 0; t < T; t++) memset(dv + t * 3 * A, 0, HS * sizeof(real));
        for (size_t i0 = 0; i0 < T; i0 += BLOCK) {
            size_t rows = T - i0 < BLOCK ? T - i0 : BLOCK, first = first_key(i0, W),
                   keys = end_of_keys(i0 + rows - 1, W, causal, T) - first;
            const real *d = dout + (b * T + i0) * A + h * HS, *o = out + (b * T + i0) * A + h * HS;
            product(rows, round_up(keys), HS, q + i0 * HS, HS, 1, kt + first, padded, weights, padded, false);
            product(rows, round_up(keys), HS, d, A, 1, vt + first, padded, dweights, padded, false);
            for (size_t r = 0; r < rows; r++) {
                size_t low = first_key(i0 + r, W) - first, high = end_of_keys(i0 + r, W, causal, T) - first;
                real *w = weights + r * padded, *dw = dweights + r * padded, delta = dot(d + r * A, o + r * A, HS),
                     l = lse[head * T + i0 + r];
                for (size_t j = 0; j < low; j++) w[j] = dw[j] = 0;
                if (c) forget_add(w + low, c[i0 + r], c + first + low, (double)factor, high - low);
#pragma omp simd
                for (size_t j = low; j < high; j++) {
                    w[j] = exp_real(factor * w[j] - l);
                    dw[j] = factor * w[j] * (dw[j] - delta);
                }
                if (c) forget_add_backward(&dc[i0 + r], dc + first + low, dw + low, (double)factor, high - low);
                for (size_t j = high; j < keys; j++) w[j] = dw[j] = 0;
            }
            product(rows, HS, keys, dweights, padded, 1, k + first * HS, HS, dfq + head * T * HS + i0 * HS, HS, false);
            product(keys, HS, rows, dweights, 1, padded, q + i0 * HS, HS, dk + first * HS, HS, true);
            product(keys, HS, rows, weights, 1, padded, d, A, dv + first * 3 * A, 3 * A, true);
        }
        if (c) forget_sums_backward(gates->dlog_forget + b * T * gates->count + gates->column[h], gates->count, dc, T);
        free(c);
        free(dc);
        free(kt);
    }
}

/* ---------------------------------------------------------------------- scan

   The linear mixer, equation (5), as a recurrence over chunks of tokens, O(T) in time: features f_q = r e^(-delta n)
   [1, cos theta n, sin theta n] / sqrt 2 and f_k = phi e^(+delta n) [1, cos, sin] / sqrt 2 (equation (10); without the
   cosine one component and no sqrt 2), of which only F = S or 3S sums over the past are needed: H = sum f_k v^T (F, HS)
   and z = sum f_k (F). Inside a chunk the positions n count from its start, so that no exponential grows; from chunk to
   chunk the state is decayed and turned.

   The sums run over keys before and at a query. A reversed scan takes the tokens from the end and leaves the query's
   own position out: both together are the sums without a causal mask; the distance i - j is negative there, so psi has
   the opposite sign. `late` delays the keys: query i meets only
   keys j <= i - late. `skip` is how many of the first positions have no key: `late`, or less where a sequence is
   continued. */

enum { CHUNK = 64 };

typedef struct {
    const Splats *w;
    size_t F, chunk, late;
    /* (chunk, F): what r and phi are multiplied by at each position of a chunk; back_table: phi of a reversed scan */
    real *q_table, *k_table, *back_table;
    real *fade, *turn; /* decay (S) and cosines, sines (2S) over `shift` positions */
    size_t shift;
} Scan;

static Scan scan_open(const Splats *w, size_t late, size_t chunk) {
    size_t S = w->S, n = w->log_theta ? 3 : 1;
    Scan c;
    c.w = w;
    c.F = n * S;
    c.chunk = chunk;
    c.late = late;
    c.shift = 0;
    c.q_table = (real *)xmalloc((3 * chunk * c.F + 3 * S) * sizeof(real));
    c.k_table = c.q_table + chunk * c.F;
    c.back_table = c.k_table + chunk * c.F;
    c.fade = c.back_table + chunk * c.F;
    c.turn = c.fade + S;
    real *q_waves = (real *)xmalloc(6 * chunk * S * sizeof(real)), *k_waves = q_waves + 2 * chunk * S,
         *back_waves = k_waves + 2 * chunk * S;
    if (n == 3) {
        double *theta = frequencies(w->log_theta, S);
        wave_table(q_waves, theta, S, chunk, late);
        wave_table(k_waves, theta, S, chunk, 0);
        wave_turn(back_waves, k_waves, w->psi, -1, S, chunk);
        wave_turn(k_waves, k_waves, w->psi, 1, S, chunk);
        free(theta);
    }
    for (size_t a = 0; a < chunk; a++)
        for (size_t s = 0; s < S; s++) {
            double delta = w->log_delta ? exp((double)w->log_delta[s]) : 0, half = n == 3 ? sqrt(0.5) : 1;
            real *q = c.q_table + a * c.F + s, *k = c.k_table + a * c.F + s, *back = c.back_table + a * c.F + s;
            q[0] = (real)(half * exp(-delta * (double)(a + late)));
            k[0] = back[0] = (real)(half * exp(delta * (double)a));
            if (n == 1) continue;
            q[S] = q[0] * q_waves[a * 2 * S + s];
            q[2 * S] = q[0] * q_waves[a * 2 * S + S + s];
            k[S] = k[0] * k_waves[a * 2 * S + s];
            k[2 * S] = k[0] * k_waves[a * 2 * S + S + s];
            back[S] = k[0] * back_waves[a * 2 * S + s];
            back[2 * S] = k[0] * back_waves[a * 2 * S + S + s];
        }
    free(q_waves);
    return c;
}

static void scan_close(Scan *c) { free(c->q_table); }

/* Sets fade and turn for a shift by n tokens. */
static void scan_turn(Scan *c, size_t n) {
    size_t S = c->w->S;
    if (c->shift == n) return;
    c->shift = n;
    for (size_t s = 0; s < S; s++)
        c->fade[s] = c->w->log_delta ? (real)exp(-exp((double)c->w->log_delta[s]) * (double)n) : 1;
    if (!c->w->log_theta) return;
    double *theta = frequencies(c->w->log_theta, S);
    wave_table(c->turn, theta, S, 1, n);
    free(theta);
}

/* state (F, HS + 1): H, then z. Moves its origin n tokens on; transposed: what that does to its gradient. */
static void scan_shift(Scan *c, real *state, size_t n, bool transposed, size_t HS) {
    size_t S = c->w->S;
    scan_turn(c, n);
    for (size_t s = 0; s < S; s++) {
        real fade = c->fade[s], cosine = 0, sine = 0;
        if (c->w->log_theta) {
            cosine = fade * c->turn[s];
            sine = transposed ? -fade * c->turn[S + s] : fade * c->turn[S + s];
        }
        for (size_t e = 0; e <= HS; e++) { /* e == HS: z */
            real *one = e < HS ? state + s * HS + e : state + c->F * HS + s;
            *one *= fade;
            if (!c->w->log_theta) continue;
            real *x = e < HS ? state + (S + s) * HS + e : state + c->F * HS + S + s, *y = e < HS ? x + S * HS : x + S;
            real turned = cosine * *x + sine * *y;
            *y = cosine * *y - sine * *x;
            *x = turned;
        }
    }
}

/* The tokens of one chunk in the order of the scan, gathered; n of them from position t0 on. */
typedef struct {
    real *fq, *fk, *fk_t, *v, *P; /* (n, F), (n, F), (F, chunk), (n, HS), (n, chunk) */
} ScanChunk;

static ScanChunk scan_chunk_room(const Scan *c, size_t HS) {
    ScanChunk g;
    size_t n = c->chunk, wide = round_up(n);
    g.fq = (real *)xcalloc(2 * n * c->F + c->F * wide + n * HS + n * wide, sizeof(real));
    g.fk = g.fq + n * c->F;
    g.fk_t = g.fk + n * c->F;
    g.v = g.fk_t + c->F * wide;
    g.P = g.v + n * HS;
    return g;
}

static inline size_t scan_row(size_t t, bool reverse, size_t T) { return reverse ? T - 1 - t : t; }

/* Fills g; P (n, wide) = f_q f_k^T where the key is before the query, or at it unless reversed; 0 elsewhere. */
static void scan_gather(const Scan *c, ScanChunk *g, const real *r, const real *phi, const real *v, size_t v_stride,
                        size_t t0, size_t n, size_t skip, bool reverse, size_t T, size_t HS) {
    size_t S = c->w->S, F = c->F, wide = round_up(c->chunk);
    const real *k_table = reverse ? c->back_table : c->k_table;
    for (size_t a = 0; a < n; a++) {
        size_t row = scan_row(t0 + a, reverse, T), key = row - skip; /* skip > 0 only forwards */
        bool has_key = t0 + a >= skip;
        for (size_t f = 0; f < F; f++) {
            g->fq[a * F + f] = r[row * S + f % S] * c->q_table[a * F + f];
            g->fk[a * F + f] = g->fk_t[f * wide + a] = has_key ? phi[key * S + f % S] * k_table[a * F + f] : 0;
        }
        if (has_key) memcpy(g->v + a * HS, v + key * v_stride, HS * sizeof(real));
        else memset(g->v + a * HS, 0, HS * sizeof(real));
    }
    product(n, round_up(n), F, g->fq, F, 1, g->fk_t, wide, g->P, wide, false);
    for (size_t a = 0; a < n; a++)
        for (size_t j = reverse ? a : a + 1; j < n; j++) g->P[a * wide + j] = 0;
}

/* state += f_k [v, 1]^T */
static void scan_absorb(const Scan *c, const ScanChunk *g, real *state, size_t n, size_t HS) {
    product(c->F, HS, n, g->fk, 1, c->F, g->v, HS, state, HS, true);
    for (size_t a = 0; a < n; a++)
        for (size_t f = 0; f < c->F; f++) state[c->F * HS + f] += g->fk[a * c->F + f];
}

/* constant (S) += the constant parts of the key features that row a of a chunk sees and row a - 1 did not; row 0
   starts them. Returns those of query a times these and the state's. */
static real scan_constant(const Scan *c, const ScanChunk *g, real *constant, size_t a, bool reverse, const real *state,
                          size_t HS) {
    size_t S = c->w->S, F = c->F;
    real sum = 0;
    for (size_t s = 0; s < S; s++) {
        if (a == 0) constant[s] = 0;
        if (!reverse || a > 0) constant[s] += g->fk[(a - reverse) * F + s];
        sum += g->fq[a * F + s] * (state[F * HS + s] + constant[s]);
    }
    return sum;
}

/* The row sum is D = sum_j w_ij + 1e-6 D0, D0 what the constant parts of the features add to it: a raised cosine is
   never negative, but where cosines cancel the constant part rounding may leave less than nothing, in proportion to
   D0. */
#define ROW_SUM_ROUNDING 1e-6

/* N (T, HS) and D (T): sum_j w_ij v_j and the row sums are added to them. r, phi (T, S), v (T, HS) rows v_stride
   apart. state: of the tokens before, and afterwards of all; NULL: none before. states: NULL, or (chunks, F, HS +
   1), the state at the entry of each chunk. */
static void scan_forward(Scan *c, real *N, real *D, const real *r, const real *phi, const real *v, size_t v_stride,
                         size_t skip, bool reverse, real *state, real *states, size_t T, size_t HS) {
    size_t F = c->F, size = F * (HS + 1), wide = round_up(c->chunk);
    ScanChunk g = scan_chunk_room(c, HS);
    real *own = NULL, *o = (real *)xmalloc((c->chunk * HS + c->w->S) * sizeof(real)), *constant = o + c->chunk * HS;
    if (!state) state = own = (real *)xcalloc(size, sizeof(real));
    for (size_t t0 = 0; t0 < T; t0 += c->chunk) {
        size_t n = T - t0 < c->chunk ? T - t0 : c->chunk;
        if (states) memcpy(states + t0 / c->chunk * size, state, size * sizeof(real));
        scan_gather(c, &g, r, phi, v, v_stride, t0, n, skip, reverse, T, HS);
        product(n, HS, n, g.P, wide, 1, g.v, HS, o, HS, false);
        product(n, HS, F, g.fq, F, 1, state, HS, o, HS, true);
        for (size_t a = 0; a < n; a++) {
            size_t row = scan_row(t0 + a, reverse, T);
            real sum = 0;
            for (size_t j = 0; j < n; j++) sum += g.P[a * wide + j];
            for (size_t f = 0; f < F; f++) sum += g.fq[a * F + f] * state[F * HS + f];
            D[row] += sum + (real)ROW_SUM_ROUNDING * scan_constant(c, &g, constant, a, reverse, state, HS);
            for (size_t e = 0; e < HS; e++) N[row * HS + e] += o[a * HS + e];
        }
        scan_absorb(c, &g, state, n, HS);
        scan_shift(c, state, n, false, HS);
    }
    free(g.fq);
    free(o);
    free(own);
}

/* The gradients of ln r and ln phi, Q and K (T, S), of v (dv, rows v_stride apart), and of theta, delta and psi (S, in
   double: terms of the first two grow with position and cancel) from dN (T, HS) and dD (T). All are added to. */
static void scan_backward(Scan *c, real *Q, real *K, real *dv, double *dtheta, double *ddelta, double *dpsi,
                          const real *dN, const real *dD, const real *r, const real *phi, const real *v,
                          size_t v_stride, size_t skip, bool reverse, const real *states, size_t T, size_t HS) {
    size_t S = c->w->S, F = c->F, size = F * (HS + 1), wide = round_up(c->chunk), chunk = c->chunk;
    ScanChunk g = scan_chunk_room(c, HS);
    real *dstate =
        (real *)xcalloc(2 * size + 2 * chunk * F + 2 * chunk * HS + HS * wide + chunk * wide + chunk + S, sizeof(real));
    real *state_t = dstate + size, *dfq = state_t + size, *dfk = dfq + chunk * F; /* state_t: H^T or dH^T (HS, F) */
    real *dn = dfk + chunk * F, *dvs = dn + chunk * HS, *v_t = dvs + chunk * HS, *dP = v_t + HS * wide,
         *dd = dP + chunk * wide, *constant = dd + chunk;
    for (size_t i = (T + chunk - 1) / chunk; i-- > 0;) {
        size_t t0 = i * chunk, n = T - t0 < chunk ? T - t0 : chunk;
        const real *state = states + i * size;
        scan_gather(c, &g, r, phi, v, v_stride, t0, n, skip, reverse, T, HS);
        for (size_t a = 0; a < n; a++) {
            size_t row = scan_row(t0 + a, reverse, T);
            memcpy(dn + a * HS, dN + row * HS, HS * sizeof(real));
            dd[a] = dD[row];
        }
        transpose(v_t, wide, g.v, HS, n, HS);
        /* dP_aj = dN_a . v_j + dD_a under the mask */
        product(n, round_up(n), HS, dn, HS, 1, v_t, wide, dP, wide, false);
        for (size_t a = 0; a < n; a++) {
            size_t keys = reverse ? a : a + 1;
            for (size_t j = 0; j < keys; j++) dP[a * wide + j] += dd[a];
            for (size_t j = keys; j < n; j++) dP[a * wide + j] = 0;
        }
        scan_shift(c, dstate, n, true, HS); /* of the state after this chunk, seen from its start */
        product(n, F, n, dP, wide, 1, g.fk, F, dfq, F, false);
        transpose(state_t, F, state, HS, F, HS);
        product(n, F, HS, dn, HS, 1, state_t, F, dfq, F, true);
        product(n, F, n, dP, 1, wide, g.fq, F, dfk, F, false);
        transpose(state_t, F, dstate, HS, F, HS);
        product(n, F, HS, g.v, HS, 1, state_t, F, dfk, F, true);
        product(n, HS, n, g.P, 1, wide, dn, HS, dvs, HS, false);
        product(n, HS, F, g.fk, F, 1, dstate, HS, dvs, HS, true);
        for (size_t a = n; a-- > 0;) /* D0 reaches the key features from the queries that see them */
            for (size_t s = 0; s < S; s++) {
                real *later = &constant[s], mine = (real)ROW_SUM_ROUNDING * g.fq[a * F + s] * dd[a];
                if (a == n - 1) *later = 0;
                if (!reverse) *later += mine;
                dfk[a * F + s] += *later;
                if (reverse) *later += mine;
            }
        for (size_t a = 0; a < n; a++) {
            size_t row = scan_row(t0 + a, reverse, T), key = row - skip;
            bool has_key = t0 + a >= skip;
            double at = (double)(t0 + a) - 0.5 * (double)T, late = (double)c->late;
            const real *fq = g.fq + a * F, *fk = g.fk + a * F;
            real *xq = dfq + a * F, *xk = dfk + a * F;
            scan_constant(c, &g, constant, a, reverse, state, HS);
            for (size_t f = 0; f < F; f++) {
                xq[f] += dd[a] * state[F * HS + f];
                xk[f] += dstate[F * HS + f];
                if (f < S) xq[f] += (real)ROW_SUM_ROUNDING * dd[a] * (state[F * HS + f] + constant[f]);
            }
            for (size_t s = 0; s < S; s++) {
                real q = fq[s] * xq[s], k = fk[s] * xk[s];
                if (c->w->log_theta) {
                    q += fq[S + s] * xq[S + s] + fq[2 * S + s] * xq[2 * S + s];
                    k += fk[S + s] * xk[S + s] + fk[2 * S + s] * xk[2 * S + s];
                    double of_key = (double)(fk[S + s] * xk[2 * S + s] - fk[2 * S + s] * xk[S + s]);
                    dtheta[s] +=
                        (at + late) * (double)(fq[S + s] * xq[2 * S + s] - fq[2 * S + s] * xq[S + s]) + at * of_key;
                    dpsi[s] += reverse ? -of_key : of_key;
                }
                ddelta[s] += at * (double)k - (at + late) * (double)q;
                Q[row * S + s] += q;
                if (has_key) K[key * S + s] += k;
            }
            for (size_t e = 0; has_key && e < HS; e++) dv[key * v_stride + e] += dvs[a * HS + e];
        }
        product(F, HS, n, g.fq, 1, F, dn, HS, dstate, HS, true);
        for (size_t a = 0; a < n; a++)
            for (size_t f = 0; f < F; f++)
                dstate[F * HS + f] += g.fq[a * F + f] * dd[a] * (f < S ? 1 + (real)ROW_SUM_ROUNDING : 1);
    }
    free(g.fq);
    free(dstate);
}

/* Added to a row sum, for keys that no splat responds to. c below depends on the splats too, but cancels up to the
   epsilon, so its gradient, of relative size epsilon / D, is left out; in double, where gradients are compared with
   differences, the epsilon is small enough for that not to show. */
#ifdef GSA_DOUBLE
#define ROW_SUM_EPSILON 1e-16
#else
#define ROW_SUM_EPSILON 1e-6
#endif

/* c of the key features' factor exp(-c), which cancels in equation (5): the largest typical ln phi over the living
   splats, so that the sums keep clear of the epsilon and of underflow, whatever the precision. Typical: of a random
   unit vector. */
static real scan_key_scale(const Splats *w, size_t HS) {
    real most = -INFINITY;
    for (size_t s = 0; s < w->S; s++) {
        if (!(w->alive[s] > 0)) continue;
        double trace = 0, centre = 0;
        const real *p = w->log_precision + s * w->P, *mu = w->mu + s * HS;
        for (size_t k = 0; k < HS; k++) {
            if (is_full(w, HS)) { /* column k of L: |L|^2 and (L^T mu)_k */
                double along = 0;
                for (size_t i = k; i < HS; i++) {
                    double entry = (double)p[i * (i + 1) / 2 + k];
                    if (i == k) entry = exp(entry);
                    trace += entry * entry;
                    along += entry * (double)mu[i];
                }
                centre += along * along;
            } else {
                double precision = exp((double)p[w->P > 1 ? k : 0]);
                trace += precision;
                centre += precision * (double)(mu[k] * mu[k]);
            }
        }
        real typical = (real)(-0.5 * (trace / (double)HS + centre));
        most = typical > most ? typical : most;
    }
    return most;
}

/* Room for one head's q and k: responsibilities r = softmax_s(ln alpha + ln phi(q^)), equation (11), in q.response
   and phi(k^) exp(-c) in k.response. */
typedef struct {
    SplatRoom q, k;
    real key_scale;
} ScanHead;

static ScanHead scan_head_open(const real *q, const real *k, size_t stride, const Splats *w, size_t T, size_t HS) {
    size_t S = w->S;
    ScanHead s;
    s.q = splat_open(w, q, stride, T, HS);
    s.k = splat_open(w, k, stride, T, HS);
    s.key_scale = w->constants ? w->constants->key_scale : scan_key_scale(w, HS);
    splat_responses(&s.q, w, T, HS);
    splat_responses(&s.k, w, T, HS);
    for (size_t t = 0; t < T; t++) {
        real *r = s.q.response + t * S, most = -INFINITY, sum = 0;
        for (size_t i = 0; i < S; i++) {
            r[i] = w->alive[i] > 0 ? r[i] + w->log_alpha[i] : -INFINITY;
            most = r[i] > most ? r[i] : most;
        }
        for (size_t i = 0; i < S; i++) sum += r[i] = exp_real(r[i] - most);
        for (size_t i = 0; i < S; i++) r[i] /= sum;
    }
    for (size_t t = 0; t < T; t++)
        for (size_t i = 0; i < S; i++)
            s.k.response[t * S + i] = w->alive[i] > 0 ? exp_real(s.k.response[t * S + i] - s.key_scale) : 0;
    return s;
}

static void scan_head_close(ScanHead *s) {
    splat_close(&s->q);
    splat_close(&s->k);
}

/* From the sums of one token to its output. Alone: o = N / (D + 1e-6), rho = 1 / (D + 1e-6). Merged with softmax
   nearby (lse given, o and lse are those of the near part before and of both after), equation (12): with LSE_f = ln
   g + c + ln D and lambda = exp(LSE_f - LSE), o = (1 - lambda) o_near + lambda N / D, rho = lambda / D. */
static void scan_output(real *o, real *lse, real *rho, const real *N, real D, const Splats *w, real key_scale,
                        size_t HS) {
    if (!lse) {
        *rho = 1 / (D + (real)ROW_SUM_EPSILON);
        for (size_t e = 0; e < HS; e++) o[e] = N[e] * *rho;
        return;
    }
    *rho = 0;
    if (!(D > 0)) return; /* nothing is far yet */
    real far = *w->log_far + key_scale + (real)log(D), near = *lse, most = far > near ? far : near;
    *lse = most + (real)log(exp_real(far - most) + exp_real(near - most));
    real share = exp_real(far - *lse);
    *rho = share / D;
    for (size_t e = 0; e < HS; e++) o[e] = (1 - share) * o[e] + *rho * N[e];
}

/* One head of one sequence. q, k, v: slices of qkv, rows `stride` apart; out rows A apart; lse (T): NULL for a scan
   head; rho (T). */
static void scan_head_forward(real *out, size_t A, real *lse, real *rho, const real *q, const real *k, const real *v,
                              size_t stride, const Splats *w, size_t late, bool causal, size_t chunk, size_t T,
                              size_t HS) {
    ScanHead s = scan_head_open(q, k, stride, w, T, HS);
    Scan c = scan_open(w, late, chunk);
    size_t skip = late < T ? late : T;
    real *N = (real *)xcalloc(T * (HS + 1), sizeof(real)), *D = N + T * HS;
    scan_forward(&c, N, D, s.q.response, s.k.response, v, stride, skip, false, NULL, NULL, T, HS);
    if (!causal) scan_forward(&c, N, D, s.q.response, s.k.response, v, stride, 0, true, NULL, NULL, T, HS);
    for (size_t t = 0; t < T; t++)
        scan_output(out + t * A, lse ? lse + t : NULL, rho + t, N + t * HS, D[t], w, s.key_scale, HS);
    free(N);
    scan_close(&c);
    scan_head_close(&s);
}

/* dq, dk (+= where merged: the near part has written them), dv (+=), the moments. dout, out rows A apart; rho as the
   forward pass left it. */
static void scan_head_backward(real *dq, real *dk, real *dv, real *record, const real *dout, const real *out, size_t A,
                               const real *rho, const real *q, const real *k, const real *v, size_t stride,
                               const Splats *w, size_t late, bool causal, bool merged, size_t chunk, size_t T,
                               size_t HS) {
    size_t S = w->S, chunks = (T + chunk - 1) / chunk, skip = late < T ? late : T;
    ScanHead s = scan_head_open(q, k, stride, w, T, HS);
    Scan c = scan_open(w, late, chunk);
    Moments m = moments_at(record, S, w->P, HS);
    /* N, D: not used, only the states are */
    real *N = (real *)xcalloc(2 * T * (HS + 1) + 2 * T * S + chunks * c.F * (HS + 1), sizeof(real)), *D = N + T * HS;
    real *dN = D + T, *dD = dN + T * HS, *Q = dD + T, *K = Q + T * S, *states = K + T * S;
    double *dtheta = (double *)xcalloc(3 * S, sizeof(double)), *ddelta = dtheta + S, *dpsi = ddelta + S;
    for (size_t t = 0; t < T; t++) { /* the gradient of N / D: rho do, and -rho do . o */
        real delta = 0;
        for (size_t e = 0; e < HS; e++) {
            delta += dout[t * A + e] * out[t * A + e];
            dN[t * HS + e] = rho[t] * dout[t * A + e];
        }
        dD[t] = -rho[t] * delta;
    }
    for (int reverse = 0; reverse < (causal ? 1 : 2); reverse++) {
        scan_forward(&c, N, D, s.q.response, s.k.response, v, stride, reverse ? 0 : skip, reverse, NULL, states, T, HS);
        scan_backward(&c, Q, K, dv, dtheta, ddelta, dpsi, dN, dD, s.q.response, s.k.response, v, stride,
                      reverse ? 0 : skip, reverse, states, T, HS);
    }
    /* through the softmax of r: dl_s = Q_s - r_s sum_u Q_u; the sum is the gradient of the far part's mass */
    for (size_t t = 0; t < T; t++) {
        real *r = s.q.response + t * S, sum = 0;
        for (size_t i = 0; i < S; i++) sum += Q[t * S + i];
        for (size_t i = 0; i < S; i++) {
            r[i] = Q[t * S + i] - r[i] * sum;
            m.amplitude[i] += r[i];
        }
        *m.gain += sum;
    }
    memcpy(s.k.response, K, T * S * sizeof(real));
    for (size_t i = 0; i < S; i++) {
        m.frequency[i] += (real)dtheta[i];
        m.decay[i] += (real)ddelta[i];
        m.psi[i] += (real)dpsi[i];
    }
    splat_responses_backward(dq, &m, &s.q, w, stride, merged, T, HS);
    splat_responses_backward(dk, &m, &s.k, w, stride, merged, T, HS);
    free(dtheta);
    free(N);
    scan_close(&c);
    scan_head_close(&s);
}

/* ---------------------------------------------------------------------- classifier */

/* losses (N) = lse - logit of the target, in nats; lse (N) = ln sum_{v < V} exp(logit); logits (N, Vp). A target of
   -1 is left out: loss 0. */
static void classifier_forward(real *losses, real *lse, const real *logits, const int *targets, size_t N, size_t V,
                               size_t Vp) {
#pragma omp parallel for
    for (size_t i = 0; i < N; i++) {
        const real *l = logits + i * Vp;
        real most = largest(l, V), sum = 0;
#pragma omp simd reduction(+ : sum)
        for (size_t v = 0; v < V; v++) sum += exp_real(l[v] - most);
        lse[i] = most + (real)log(sum);
        losses[i] = targets[i] < 0 ? 0 : lse[i] - l[targets[i]];
    }
}

/* logits become their gradients: (softmax - one at the target) scale; 0 in the padding */
static void classifier_backward(real *logits, const real *lse, const int *targets, real scale, size_t N, size_t V,
                                size_t Vp) {
#pragma omp parallel for
    for (size_t i = 0; i < N; i++) {
        real *l = logits + i * Vp;
        if (targets[i] < 0) {
            memset(l, 0, Vp * sizeof(real));
            continue;
        }
#pragma omp simd
        for (size_t v = 0; v < V; v++) l[v] = scale * exp_real(l[v] - lse[i]);
        l[targets[i]] -= scale;
        for (size_t v = V; v < Vp; v++) l[v] = 0;
    }
}

/* ---------------------------------------------------------------------- the model */

typedef struct {
#define X(name, ...) real *name;
    PARAMETERS(X)
#undef X
} ParameterTensors;

/* THE table of activations: name, group of memory (gsa/run/train.h), unit, numbers per unit. Units:
     STREAM  a token at the input of each block and behind the last
     BLOCK   a token in each block whose activations are kept for the backward pass: all, or with --recompute one
     TOKEN   a token
     ONCE    all of it
   Where they lie, which of them are block l's and what they take of memory follows from it. */
// clang-format off
#define ACTIVATIONS(X) \
    X(residual, RESIDUAL, STREAM, z.C) \
    X(middle, RESIDUAL, BLOCK, z.C) /* the stream after attention */ \
    X(ln1, ATTENTION, BLOCK, z.C) \
    X(ln1_mean, ATTENTION, BLOCK, 1) \
    X(ln1_rstd, ATTENTION, BLOCK, 1) \
    X(qkv, ATTENTION, BLOCK, 3 * z.A) \
    X(fq, ATTENTION, BLOCK, z.A) /* (B, NH, T, HS) */ \
    X(fk, ATTENTION, BLOCK, z.A) \
    X(log_forget, ATTENTION, BLOCK, z.F) /* of gated heads, see Gates */ \
    X(att_lse, ATTENTION, BLOCK, z.NH) /* (B, NH, T) */ \
    X(scan_rho, ATTENTION, BLOCK, z.G ? z.NH : 0) /* (B, NH, T) */ \
    X(att, ATTENTION, BLOCK, z.A) \
    X(ln2, MLP, BLOCK, z.C) \
    X(ln2_mean, MLP, BLOCK, 1) \
    X(ln2_rstd, MLP, BLOCK, 1) \
    X(fc, MLP, BLOCK, 4 * z.C) \
    X(gelu, MLP, BLOCK, 4 * z.C) \
    X(lnf, LOGITS, TOKEN, z.C) \
    X(lnf_mean, LOGITS, TOKEN, 1) \
    X(lnf_rstd, LOGITS, TOKEN, 1) \
    X(logits, LOGITS, TOKEN, z.Vp) \
    X(losses, LOGITS, TOKEN, 1) \
    X(lse, LOGITS, TOKEN, 1) \
    X(splat_waves, WORKSPACE, ONCE, z.G * z.T * 2 * z.S) /* (G, T, 2S): cosines and sines of the envelope */ \
    X(dresidual, BACKWARD, TOKEN, z.C) \
    X(dln, BACKWARD, TOKEN, z.C) \
    X(dfc, BACKWARD, TOKEN, 4 * z.C) \
    X(datt, BACKWARD, TOKEN, z.A) \
    X(dqkv, BACKWARD, TOKEN, 3 * z.A) \
    X(dfq, BACKWARD, TOKEN, z.A) \
    X(dfk, BACKWARD, TOKEN, z.A) \
    X(dlog_forget, BACKWARD, TOKEN, z.F) \
    X(moments, WORKSPACE, ONCE, B * z.NH * moments_size(z.S, z.P, z.HS)) \
    X(dgains, WORKSPACE, ONCE, config_gains(c) ? B * z.NH : 0) /* (B, NH): of one layer by sequence */ \
    X(dropes, WORKSPACE, ONCE, config_ropes(c) ? B * z.NH * z.HS / 2 : 0) /* (B, NH, HS/2) likewise, of frequencies */ \
    X(rope_waves, WORKSPACE, ONCE, z.R * z.T * z.HS) /* (R, T, HS): cosines and sines of rotations */ \
    X(bf16_room, WORKSPACE, ONCE, bf16_numbers(c, N) / 2) /* both factors of any product, as bf16 */
// clang-format on
enum { UNIT_STREAM, UNIT_BLOCK, UNIT_TOKEN, UNIT_ONCE, NUM_UNITS };

typedef struct {
#define X(name, group, unit, size) real *name;
    ACTIVATIONS(X)
#undef X
} ActivationTensors;

/* sizes that appear in every function, as size_t */
typedef struct {
    size_t T, V, Vp, L, NH, C, HS, A, S, P, G; /* NH: all heads, extra ones too; A = NH HS; G: heads with splats */
    size_t R; /* tables of rotations: one of each head that learns its frequencies, or one for all */
    size_t F; /* the most gated heads of a layer */
} Sizes;

static Sizes config_sizes(const Config *c) {
    Sizes z;
    z.T = c->T;
    z.V = c->V;
    z.Vp = c->Vp;
    z.L = c->L;
    z.NH = config_heads(c);
    z.C = c->C;
    z.HS = config_head_size(c);
    z.A = config_width(c);
    z.G = config_gsa_heads(c);
    z.S = z.G ? c->S : 0;
    z.P = config_precisions(c);
    z.R = config_ropes(c) ? config_ropes(c) : 1;
    z.F = 0;
    for (int l = 0; l < c->L && c->forget; l++) {
        size_t count = (size_t)(config_gates_before(c, l + 1, 0) - config_gates_before(c, l, 0));
        if (count > z.F) z.F = count;
    }
    return z;
}

typedef struct {
    Config config;
    size_t B;                                         /* largest batch */
    Tensor tensors[NUM_TENSORS], second[NUM_TENSORS]; /* second: where adam_v has them */
    size_t total, seconds;                            /* lengths of the flat buffers; of adam_v */
    real *params, *grads, *adam_m, *adam_v;           /* the last three are allocated when they are first needed */
    bool fresh;                                       /* gradients of matrices count as zero, whatever they are */
    ParameterTensors p, dp;
    real *activations;
    ActivationTensors a;
    real *scale;                      /* (L, NH): head_scale of all heads in the last forward pass */
    size_t *window;                   /* (L, NH): how far softmax reaches; 0: the head has none */
    int *gate;                        /* (L, NH): which of its layer's gates is the head's; -1: none */
    size_t used_B, used_T, predicted; /* of the last forward pass: its sizes and number of targets */
    size_t block;                     /* whose activations are there with --recompute: the last one computed */
    bool watch;                       /* backward passes also sum |dL / d ln phi_s| into the gradients of `alive` */
    int *x, *y;                       /* its tokens */
} GSA;

/* With --products bf16: at least the numbers in both factors of any product over N tokens; a multiple of 2. */
static size_t bf16_numbers(const Config *c, size_t N) {
    Sizes z = config_sizes(c);
    size_t wide = 4 * z.C > 3 * z.A ? 4 * z.C : 3 * z.A, narrow = z.C > z.A ? z.C : z.A;
    if (z.Vp > wide) wide = z.Vp;
    return c->products == PRODUCTS_BF16 ? (N * (wide + narrow) + wide * narrow) / 2 * 2 + 2 : 0;
}

/* One function measures the activations (base NULL) and carves them from one piece of memory; returns their number,
   and adds their bytes up by kind (bytes NULL: it does not). */
static size_t carve_activations(ActivationTensors *a, real *base, const Config *c, size_t B, size_t *bytes) {
    Sizes z = config_sizes(c);
    size_t N = B * z.T, at = 0, units[NUM_UNITS] = {(z.L + 1) * N, (c->recompute ? 1 : z.L) * N, N, 1};
#define X(name, group, unit, size)                      \
    a->name = base ? base + at : NULL;                  \
    at += (units[UNIT_##unit] * (size) + 31) / 32 * 32; \
    if (bytes) bytes[MEMORY_##group] += (units[UNIT_##unit] * (size) + 31) / 32 * 32 * sizeof(real);
    ACTIVATIONS(X)
#undef X
    return at;
}

/* The activations, those that blocks keep being block l's; N tokens. With --recompute all blocks share one place. */
static ActivationTensors block_activations(const GSA *m, size_t l, size_t N) {
    Sizes z = config_sizes(&m->config);
    ActivationTensors a = m->a;
    const Config *c = &m->config;
    size_t B = m->B, first[NUM_UNITS] = {l * N, c->recompute ? 0 : l * N, 0, 0};
#define X(name, group, unit, size) a.name += first[UNIT_##unit] * (size);
    ACTIVATIONS(X)
#undef X
    return a;
}

/* Numbers that a thread allocates for a while, at most, when it works on one head: attention's backward pass (its
   head's keys and values transposed, a block of rows of the weights and of their gradients, sums of a gate) or the
   scan's (both sides' splats, sums, gradients, states). */
static size_t head_workspace(const Config *c) {
    Sizes z = config_sizes(c);
    size_t attention = 2 * (z.HS + BLOCK) * (round_up(z.T) + COLUMNS) + (z.F ? 4 * z.T : 0),
           side = z.HS + 2 + z.S + (z.P > 1 ? 2 * z.HS : 0);
    size_t scan = z.T * (2 * side + 2 * (z.HS + 1) + 2 * z.S + z.HS) + (z.T / CHUNK + 1) * 3 * z.S * (z.HS + 1);
    return z.G && c->mixer == MIXER_LINEAR && scan > attention ? scan : attention;
}

static void point_parameters(ParameterTensors *p, real *flat, const Tensor *tensors) {
#define X(name, ...) p->name = tensors[TENSOR_##name].size ? flat + tensors[TENSOR_##name].offset : NULL;
    PARAMETERS(X)
#undef X
}

/* Rotation angles of rope for positions first .. first + T - 1: waves (T, HS), theta_k = exp(log_rope_k), or where
   log_rope is NULL 10000^(-2k / HS) */
static void rope_table(real *waves, const real *log_rope, size_t T, size_t HS, size_t first) {
    double *theta = log_rope ? frequencies(log_rope, HS / 2) : (double *)xmalloc(HS / 2 * sizeof(double));
    for (size_t k = 0; k < HS / 2 && !log_rope; k++) theta[k] = rope_frequency((int)k, (int)HS);
    wave_table(waves, theta, HS / 2, T, first);
    free(theta);
}

/* Which of the R tables of rotations is that of head (l, h). */
static size_t rope_index(const Config *c, size_t l, size_t h) {
    return config_ropes(c) ? (size_t)config_standard_before(c, (int)l, (int)h) : 0;
}

/* waves (R, T, HS): the rotations at positions first .. first + T - 1 */
static void gsa_rope_waves(const GSA *m, real *waves, size_t T, size_t first) {
    Sizes z = config_sizes(&m->config);
    if (m->config.position == POSITION_LEARNED) return;
#pragma omp parallel for schedule(dynamic)
    for (size_t r = 0; r < z.R; r++)
        rope_table(waves + r * T * z.HS, m->p.log_rope ? m->p.log_rope + r * z.HS / 2 : NULL, T, z.HS, first);
}

/* What f_q . f_k of head (l, h) is multiplied by: for standard heads exp(log_gain) / sqrt(HS), equation (7c). */
static real head_scale(const GSA *m, size_t l, size_t h) {
    int kind = config_head_kind(&m->config, (int)l, (int)h);
    if (kind == HEAD_SPLAT || kind == HEAD_SCAN) return 1;
    real one = 1 / (real)sqrt((double)config_head_size(&m->config));
    return m->p.log_gain ? one * exp_real(m->p.log_gain[config_standard_before(&m->config, (int)l, (int)h)]) : one;
}

static void gsa_scales(GSA *m) {
    size_t NH = (size_t)config_heads(&m->config);
    for (size_t i = 0; i < NH * (size_t)m->config.L; i++) m->scale[i] = head_scale(m, i / NH, i % NH);
}

/* Before products of this model. */
static void use_products(const GSA *m) {
    bf16_room = m->config.products == PRODUCTS_BF16 ? (bf16 *)m->a.bf16_room : NULL;
}

static GSA *gsa_create(const Config *c, size_t B) {
    GSA *m = (GSA *)xcalloc(1, sizeof *m);
    size_t NH = config_heads(c), L = c->L;
    m->config = *c;
    m->B = B;
    m->total = model_tensors(c, m->tensors);
    m->seconds = model_second_moments(c, m->second);
    m->params = (real *)xcalloc(m->total, sizeof(real));
    point_parameters(&m->p, m->params, m->tensors);
    size_t count = carve_activations(&m->a, NULL, c, B, NULL);
    m->activations = (real *)xcalloc(count, sizeof(real));
    carve_activations(&m->a, m->activations, c, B, NULL);
    m->scale = (real *)xmalloc(L * NH * sizeof(real));
    m->window = (size_t *)xmalloc(L * NH * sizeof(size_t));
    m->gate = (int *)xmalloc(L * NH * sizeof(int));
    for (size_t i = 0; i < L * NH; i++) {
        int l = (int)(i / NH), h = (int)(i % NH), kind = config_head_kind(c, l, h);
        m->gate[i] = config_is_gated(c, l, h) ? config_gates_before(c, l, h) - config_gates_before(c, l, 0) : -1;
        m->window[i] = kind == HEAD_SCAN ? 0 : kind == HEAD_SPLAT || !c->window ? (size_t)c->T : (size_t)c->window;
    }
    gsa_scales(m);
    gsa_rope_waves(m, m->a.rope_waves, (size_t)c->T, 0); /* where they are fixed they serve any T */
    m->x = (int *)xmalloc(2 * B * c->T * sizeof(int));
    m->y = m->x + B * c->T;
    return m;
}

static void gsa_destroy(GSA *m) {
    free(m->params);
    free(m->grads);
    free(m->adam_m);
    free(m->adam_v);
    free(m->activations);
    free(m->scale);
    free(m->window);
    free(m->gate);
    free(m->x);
    free(m);
}

/* The splats of head (l, h) and where their gradients go. */
static Splats head_splats(const GSA *m, size_t l, size_t h) {
    Sizes z = config_sizes(&m->config);
    size_t g = (size_t)config_gsa_before(&m->config, (int)l, (int)h);
    Splats w;
#define X(name, ...) w.name = m->p.name ? m->p.name + g * tensor_row(&m->tensors[TENSOR_##name]) : NULL;
    SPLAT_TENSORS(X)
#undef X
    w.watch = m->watch;
    w.S = z.S;
    w.P = z.P;
    w.raw = m->config.raw;
    w.constants = NULL;
    return w;
}

static SplatGradients head_splat_gradients(const GSA *m, size_t l, size_t h) {
    size_t g = (size_t)config_gsa_before(&m->config, (int)l, (int)h);
    SplatGradients d;
#define X(name, ...) d.name = m->dp.name ? m->dp.name + g * tensor_row(&m->tensors[TENSOR_##name]) : NULL;
    SPLAT_TENSORS(X)
#undef X
    return d;
}

/* waves (G, T, 2S): the cosine envelopes of all splat heads at positions first .. first + T - 1 */
static void gsa_splat_waves(const GSA *m, real *waves, size_t T, size_t first) {
    Sizes z = config_sizes(&m->config);
    if (m->config.envelope != ENVELOPE_COSINE) return;
#pragma omp parallel for schedule(dynamic)
    for (size_t g = 0; g < z.G; g++) {
        double *theta = frequencies(m->p.log_theta + g * z.S, z.S);
        wave_table(waves + g * T * 2 * z.S, theta, z.S, T, first);
        free(theta);
    }
}

/* Features f (T, HS) of one head from its queries or keys x, rows 3A apart. waves: of its splats w (T, 2S), or of
   rope (T, HS). A scan makes its own. */
static void head_features(const GSA *m, real *f, const real *x, int kind, const Splats *w, bool query, size_t T,
                          const real *waves) {
    size_t HS = (size_t)config_head_size(&m->config), stride = 3 * (size_t)config_width(&m->config);
    if (kind == HEAD_SPLAT) {
        splat_forward(f, x, stride, w, query, w->log_theta ? waves : NULL, T, HS);
    } else if (m->config.position == POSITION_LEARNED) {
        for (size_t t = 0; t < T; t++) memcpy(f + t * HS, x + t * stride, HS * sizeof(real));
    } else {
        rope_forward(f, x, stride, waves, T, HS);
    }
}

/* Features of all heads of layer l: fq, fk (B, NH, T, HS) from qkv (B, T, 3A). rope_waves (R, T, HS), splat_waves
   (G, T, 2S). */
static void features_forward(const GSA *m, real *fq, real *fk, const real *qkv, size_t l, size_t B, size_t T,
                             const real *rope_waves, const real *splat_waves) {
    Sizes z = config_sizes(&m->config);
    size_t NH = z.NH, HS = z.HS, A = z.A;
#pragma omp parallel for schedule(dynamic)
    for (size_t i = 0; i < B * NH * 2; i++) {
        size_t head = i / 2, b = head / NH, h = head % NH, key = i % 2;
        int kind = config_head_kind(&m->config, (int)l, (int)h);
        const real *waves = kind == HEAD_SPLAT
                                ? splat_waves + (size_t)config_gsa_before(&m->config, (int)l, (int)h) * T * 2 * z.S
                                : rope_waves + rope_index(&m->config, l, h) * T * HS;
        Splats w;
        memset(&w, 0, sizeof w);
        if (kind == HEAD_SPLAT) w = head_splats(m, l, h);
        if (kind != HEAD_SCAN)
            head_features(m, (key ? fk : fq) + head * T * HS, qkv + b * T * 3 * A + key * A + h * HS, kind, &w, !key, T,
                          waves);
    }
}

/* The first two parts of dqkv from dfq, dfk; the moments of layer l's splats. */
static void features_backward(GSA *m, real *dqkv, const real *dfq, const real *dfk, const real *fq, const real *fk,
                              const real *qkv, size_t l, size_t B, size_t T) {
    Sizes z = config_sizes(&m->config);
    size_t NH = z.NH, HS = z.HS, A = z.A, record = moments_size(z.S, z.P, HS);
#pragma omp parallel for schedule(dynamic)
    for (size_t head = 0; head < B * NH; head++) { /* queries, then keys: both add to the head's moments */
        size_t b = head / NH, h = head % NH;
        int kind = config_head_kind(&m->config, (int)l, (int)h);
        for (size_t key = 0; key < 2 && kind != HEAD_SCAN; key++) {
            const real *x = qkv + b * T * 3 * A + key * A + h * HS, *df = (key ? dfk : dfq) + head * T * HS,
                       *f = (key ? fk : fq) + head * T * HS;
            real *dx = dqkv + b * T * 3 * A + key * A + h * HS;
            if (kind == HEAD_SPLAT) {
                Splats w = head_splats(m, l, h);
                splat_backward(dx, m->a.moments + head * record, df, f, x, 3 * A, &w, !key, w.log_theta != NULL, T, HS);
            } else if (m->config.position == POSITION_LEARNED) {
                for (size_t t = 0; t < T; t++) memcpy(dx + t * 3 * A, df + t * HS, HS * sizeof(real));
            } else {
                rope_backward(dx, df, x, 3 * A, m->a.rope_waves + rope_index(&m->config, l, h) * T * HS, T, HS);
            }
        }
        if (m->dp.log_rope && kind != HEAD_SPLAT && kind != HEAD_SCAN) {
            double *sum = (double *)xcalloc(HS / 2, sizeof(double));
            rope_frequencies_backward(sum, dfq + head * T * HS, fq + head * T * HS, T, HS);
            rope_frequencies_backward(sum, dfk + head * T * HS, fk + head * T * HS, T, HS);
            for (size_t k = 0; k < HS / 2; k++) m->a.dropes[head * HS / 2 + k] = (real)sum[k];
            free(sum);
        }
        if (m->dp.log_gain && kind != HEAD_SPLAT && kind != HEAD_SCAN) {
            /* a logit is exp(log_gain) f_q . f_k: sum of its gradient times itself over all keys is f_q . df_q */
            const real *f = fq + head * T * HS, *df = dfq + head * T * HS;
            m->a.dgains[head] = dot(f, df, T * HS);
        }
    }
    for (size_t head = 0; head < B * NH && (m->dp.log_gain || m->dp.log_rope); head++) {
        int h = (int)(head % NH), kind = config_head_kind(&m->config, (int)l, h);
        if (kind == HEAD_SPLAT || kind == HEAD_SCAN) continue;
        size_t i = (size_t)config_standard_before(&m->config, (int)l, h);
        if (m->dp.log_gain) m->dp.log_gain[i] += m->a.dgains[head];
        for (size_t k = i * HS / 2; k < (i + 1) * HS / 2 && m->dp.log_rope; k++)
            m->dp.log_rope[k] += exp_real(m->p.log_rope[k]) * m->a.dropes[head * HS / 2 + k - i * HS / 2];
    }
}

/* The gates of layer l, whose activations these are; count 0: it has none. */
static Gates layer_gates(const GSA *m, const ActivationTensors *block, size_t l) {
    const Config *c = &m->config;
    Gates gates = {block->log_forget, block->dlog_forget, m->gate + l * (size_t)config_heads(c),
                   (size_t)(config_gates_before(c, (int)l + 1, 0) - config_gates_before(c, (int)l, 0))};
    return gates;
}

/* The scan heads of layer l, and the far part of its extend heads, whose near part att (B, T, A) and lse (B, NH, T)
   hold already. */
static void scans_forward(const GSA *m, real *att, real *lse, real *rho, const real *qkv, size_t l, size_t B,
                          size_t T) {
    Sizes z = config_sizes(&m->config);
    size_t NH = z.NH, HS = z.HS, A = z.A;
#pragma omp parallel for schedule(dynamic)
    for (size_t head = 0; head < B * NH; head++) {
        size_t b = head / NH, h = head % NH;
        int kind = config_head_kind(&m->config, (int)l, (int)h);
        if (kind != HEAD_SCAN && kind != HEAD_EXTEND) continue;
        const real *q = qkv + b * T * 3 * A + h * HS;
        Splats w = head_splats(m, l, h);
        scan_head_forward(att + b * T * A + h * HS, A, kind == HEAD_EXTEND ? lse + head * T : NULL, rho + head * T, q,
                          q + A, q + 2 * A, 3 * A, &w, kind == HEAD_EXTEND ? (size_t)m->config.window : 0,
                          m->config.objective == OBJECTIVE_LM, CHUNK, T, HS);
    }
}

static void scans_backward(GSA *m, real *dqkv, const real *datt, const real *att, const real *rho, const real *qkv,
                           size_t l, size_t B, size_t T) {
    Sizes z = config_sizes(&m->config);
    size_t NH = z.NH, HS = z.HS, A = z.A, record = moments_size(z.S, z.P, HS);
#pragma omp parallel for schedule(dynamic)
    for (size_t head = 0; head < B * NH; head++) {
        size_t b = head / NH, h = head % NH, at = b * T * 3 * A + h * HS;
        int kind = config_head_kind(&m->config, (int)l, (int)h);
        if (kind != HEAD_SCAN && kind != HEAD_EXTEND) continue;
        bool merged = kind == HEAD_EXTEND;
        Splats w = head_splats(m, l, h);
        /* the near part has written it */
        for (size_t t = 0; t < T && !merged; t++) memset(dqkv + at + 2 * A + t * 3 * A, 0, HS * sizeof(real));
        scan_head_backward(dqkv + at, dqkv + at + A, dqkv + at + 2 * A, m->a.moments + head * record,
                           datt + b * T * A + h * HS, att + b * T * A + h * HS, A, rho + head * T, qkv + at,
                           qkv + at + A, qkv + at + 2 * A, 3 * A, &w, merged ? (size_t)m->config.window : 0,
                           m->config.objective == OBJECTIVE_LM, merged, CHUNK, T, HS);
    }
}

/* The gradients of layer l's splats from the moments that features_backward and scans_backward gathered. */
static void splats_backward(GSA *m, size_t l, size_t B) {
    Sizes z = config_sizes(&m->config);
    size_t record = moments_size(z.S, z.P, z.HS);
#pragma omp parallel for schedule(dynamic)
    for (size_t h = 0; h < z.NH; h++) {
        if (!config_is_gsa(&m->config, (int)l, (int)h)) continue;
        Splats w = head_splats(m, l, h);
        SplatGradients d = head_splat_gradients(m, l, h);
        splat_gradients(&d, m->a.moments + h * record, z.NH * record, B, &w, z.HS);
    }
}

/* Block l from its input to the MLP's hidden layer: all that the backward pass needs of it. */
static void block_forward(GSA *m, size_t l, size_t B, size_t T) {
    Sizes z = config_sizes(&m->config);
    size_t C = z.C, A = z.A, N = B * T;
    m->block = l;
    bool causal = m->config.objective == OBJECTIVE_LM;
    ParameterTensors p = m->p;
    ActivationTensors a = block_activations(m, l, N);
    layernorm_forward(a.ln1, a.ln1_mean, a.ln1_rstd, a.residual, p.ln1w + l * C, p.ln1b + l * C, N, C);
    matmul_forward(a.qkv, a.ln1, p.qkvw + l * 3 * A * C, p.qkvb + l * 3 * A, N, C, 3 * A);
    features_forward(m, a.fq, a.fk, a.qkv, l, B, T, a.rope_waves, a.splat_waves);
    Gates gates = layer_gates(m, &a, l);
    size_t gate = (size_t)config_gates_before(&m->config, (int)l, 0);
    if (gates.count) forget_forward(a.log_forget, a.ln1, p.forgetw + gate * C, p.forgetb + gate, N, C, gates.count);
    attention_forward(a.att, a.att_lse, a.fq, a.fk, a.qkv, m->scale + l * z.NH, m->window + l * z.NH, &gates, causal, B,
                      T, z.NH, z.HS);
    scans_forward(m, a.att, a.att_lse, a.scan_rho, a.qkv, l, B, T);
    matmul_forward(a.middle, a.att, p.attprojw + l * C * A, p.attprojb + l * C, N, A, C);
    residual_forward(a.middle, a.residual, N * C);
    layernorm_forward(a.ln2, a.ln2_mean, a.ln2_rstd, a.middle, p.ln2w + l * C, p.ln2b + l * C, N, C);
    matmul_forward(a.fc, a.ln2, p.fcw + l * 4 * C * C, p.fcb + l * 4 * C, N, C, 4 * C);
    gelu_forward(a.gelu, a.fc, N * 4 * C);
}

/* From the input of block l, which is there already, to the logits. */
static void forward_from(GSA *m, size_t l, size_t B, size_t T) {
    Sizes z = config_sizes(&m->config);
    size_t C = z.C, N = B * T, L = z.L;
    ParameterTensors p = m->p;
    ActivationTensors a = m->a;
    use_products(m);
    for (; l < L; l++) {
        ActivationTensors block = block_activations(m, l, N);
        real *out = block.residual + N * C;
        block_forward(m, l, B, T);
        matmul_forward(out, block.gelu, p.fcprojw + l * 4 * C * C, p.fcprojb + l * C, N, 4 * C, C);
        residual_forward(out, block.middle, N * C);
    }
    layernorm_forward(a.lnf, a.lnf_mean, a.lnf_rstd, a.residual + L * N * C, p.lnfw, p.lnfb, N, C);
    matmul_forward(a.logits, a.lnf, p.wte, NULL, N, C, z.Vp);
}

/* x, y (B, T); a y of -1 is not predicted; y NULL: logits only. Returns the mean loss of what is predicted, in nats. */
static double gsa_forward(GSA *m, const int *x, const int *y, size_t B, size_t T) {
    Sizes z = config_sizes(&m->config);
    size_t N = B * T;
    ParameterTensors p = m->p;
    ActivationTensors a = m->a;
    m->used_B = B;
    m->used_T = T;
    memcpy(m->x, x, N * sizeof(int));
    if (y) memcpy(m->y, y, N * sizeof(int));
    gsa_splat_waves(m, a.splat_waves, T, 0);
    if (p.log_rope) gsa_rope_waves(m, a.rope_waves, T, 0);
    gsa_scales(m);
    encoder_forward(a.residual, m->x, p.wte, p.wpe, B, T, z.C, 0);
    forward_from(m, 0, B, T);
    if (!y) return 0;
    classifier_forward(a.losses, a.lse, a.logits, m->y, N, z.V, z.Vp);
    double loss = 0;
    m->predicted = 0;
    for (size_t i = 0; i < N; i++) {
        loss += (double)a.losses[i];
        m->predicted += m->y[i] >= 0;
    }
    return m->predicted ? loss / (double)m->predicted : 0;
}

/* Adds scale times the gradient of the last forward's mean loss to the gradients. The logits are overwritten. */
static void gsa_backward(GSA *m, double scale) {
    Sizes z = config_sizes(&m->config);
    size_t B = m->used_B, T = m->used_T, C = z.C, A = z.A, N = B * T, L = z.L, record = moments_size(z.S, z.P, z.HS);
    bool causal = m->config.objective == OBJECTIVE_LM;
    if (!m->grads) {
        m->grads = (real *)xcalloc(m->total, sizeof(real));
        m->fresh = true;
        point_parameters(&m->dp, m->grads, m->tensors);
    }
    bool add = !m->fresh;
    ParameterTensors p = m->p, dp = m->dp;
    ActivationTensors a = m->a;
    use_products(m);
    classifier_backward(a.logits, a.lse, m->y, (real)(scale / (double)(m->predicted ? m->predicted : 1)), N, z.V, z.Vp);
    matmul_backward(a.dln, dp.wte, NULL, a.logits, a.lnf, p.wte, N, C, z.Vp, add);
    memset(a.dresidual, 0, N * C * sizeof(real));
    layernorm_backward(a.dresidual, dp.lnfw, dp.lnfb, a.dln, a.residual + L * N * C, p.lnfw, a.lnf_mean, a.lnf_rstd, N,
                       C);
    for (size_t l = L; l-- > 0;) {
        if (m->config.recompute && m->block != l) block_forward(m, l, B, T);
        ActivationTensors block = block_activations(m, l, N);
        matmul_backward(a.dfc, dp.fcprojw + l * 4 * C * C, dp.fcprojb + l * C, a.dresidual, block.gelu,
                        p.fcprojw + l * 4 * C * C, N, 4 * C, C, add);
        gelu_backward(a.dfc, a.dfc, block.fc, N * 4 * C);
        matmul_backward(a.dln, dp.fcw + l * 4 * C * C, dp.fcb + l * 4 * C, a.dfc, block.ln2, p.fcw + l * 4 * C * C, N,
                        C, 4 * C, add);
        layernorm_backward(a.dresidual, dp.ln2w + l * C, dp.ln2b + l * C, a.dln, block.middle, p.ln2w + l * C,
                           block.ln2_mean, block.ln2_rstd, N, C);
        matmul_backward(a.datt, dp.attprojw + l * C * A, dp.attprojb + l * C, a.dresidual, block.att,
                        p.attprojw + l * C * A, N, A, C, add);
        memset(a.moments, 0, B * z.NH * record * sizeof(real));
        Gates gates = layer_gates(m, &block, l);
        attention_backward(a.dfq, a.dfk, a.dqkv, a.datt, block.att, block.att_lse, block.fq, block.fk, block.qkv,
                           m->scale + l * z.NH, m->window + l * z.NH, &gates, causal, B, T, z.NH, z.HS);
        features_backward(m, a.dqkv, a.dfq, a.dfk, block.fq, block.fk, block.qkv, l, B, T);
        scans_backward(m, a.dqkv, a.datt, block.att, block.scan_rho, block.qkv, l, B, T);
        splats_backward(m, l, B);
        matmul_backward(a.dln, dp.qkvw + l * 3 * A * C, dp.qkvb + l * 3 * A, a.dqkv, block.ln1, p.qkvw + l * 3 * A * C,
                        N, C, 3 * A, add);
        size_t gate = (size_t)config_gates_before(&m->config, (int)l, 0);
        if (gates.count)
            forget_backward(a.dln, dp.forgetw + gate * C, dp.forgetb + gate, a.dlog_forget, block.log_forget, block.ln1,
                            p.forgetw + gate * C, N, C, gates.count);
        layernorm_backward(a.dresidual, dp.ln1w + l * C, dp.ln1b + l * C, a.dln, block.residual, p.ln1w + l * C,
                           block.ln1_mean, block.ln1_rstd, N, C);
    }
    encoder_backward(dp.wte, dp.wpe, a.dresidual, m->x, B, T, C);
    m->fresh = false;
}

/* The next backward pass begins anew: it writes the gradients of matrices, which come from matmul_backward, and adds to
   the others. Until then those of matrices are the old ones. To store zeros there and add to them would move another 8
   bytes a parameter, where AdamW moves 28. */
static void gsa_zero_gradients(GSA *m) {
    if (!m->grads) return;
    m->fresh = true;
    for (int i = 0; i < NUM_TENSORS; i++)
        if (!tensor_is_matrix(i)) memset(m->grads + m->tensors[i].offset, 0, m->tensors[i].size * sizeof(real));
}

/* The L2 norm of each clip group's gradients: sums of fixed pieces, in double, added in order. */
static void gsa_gradient_norms(GSA *m, double norms[NUM_CLIPS]) {
    enum { PIECE = 1 << 15 };
    double *sums = (double *)xmalloc((m->total / PIECE + 1) * sizeof(double));
    for (int c = 0; c < NUM_CLIPS; c++) norms[c] = 0;
    for (int i = 0; i < NUM_TENSORS; i++) {
        const real *g = m->grads + m->tensors[i].offset;
        if (m->tensors[i].group == GROUP_FIXED) continue;
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

/* The largest eigenvalue of Lambda = L L^T by power iteration. */
static real largest_precision(real *cholesky, const real *packed, size_t HS) {
    real *x = (real *)xmalloc(2 * HS * sizeof(real)), *y = x + HS, norm = 0;
    cholesky_factor(cholesky, packed, HS);
    /* along no axis and no diagonal */
    for (size_t k = 0; k < HS; k++) x[k] = 1 / (real)sqrt((double)HS) * (k % 3 == 2 ? -1 : 1);
    for (int step = 0; step < 8; step++) {
        product(1, HS, HS, x, HS, 1, cholesky, HS, y, HS, false);           /* L^T x */
        product(1, HS, HS, y, HS, 1, cholesky + HS * HS, HS, x, HS, false); /* L L^T x */
        norm = 0;
        for (size_t k = 0; k < HS; k++) norm += x[k] * x[k];
        norm = (real)sqrt(norm);
        for (size_t k = 0; k < HS && norm > 0; k++) x[k] /= norm;
    }
    free(x);
    return norm;
}

static int64_t clamp(real *x, real low, real high) { /* a NaN stays one, for the loss to report */
    real before = *x;
    *x = before < low ? low : before > high ? high : before;
    return *x != before && before == before;
}

/* the same angle within (-pi, pi] */
static real wrapped_phase(real psi) {
    const double turn = 6.283185307179586;
    return psi > (real)(turn / 2) || psi <= (real)(-turn / 2) ? (real)(psi - turn * ceil(psi / turn - 0.5)) : psi;
}

/* Puts splats, gains and learned rotations back into their bounds (gsa/model.h); counts what was outside, by kind. */
static void scalar_bounds(GSA *m, int64_t clamped[NUM_BOUNDS]) {
    const Config *c = &m->config;
    Sizes z = config_sizes(&m->config);
    ParameterTensors p = m->p;
    const real range = (real)SPLAT_AMPLITUDE_RANGE;
    real *cholesky = (real *)xmalloc(2 * z.HS * z.HS * sizeof(real)), *slope = (real *)xmalloc(2 * z.HS * sizeof(real)),
         *along = slope + z.HS;
    for (size_t s = 0; s < z.G * z.S; s++) {
        real *mu = p.mu + s * z.HS, *log_precision = p.log_precision + s * z.P;
        if (!(p.alive[s] > 0)) continue;
        if (c->covariance == COVARIANCE_FULL) {
            real most = largest_precision(cholesky, log_precision, z.HS);
            if (most > (real)SPLAT_PRECISION_MAX && config_bounded(c, BOUND_PRECISION)) {
                real factor = (real)sqrt(SPLAT_PRECISION_MAX / (double)most);
                for (size_t i = 0; i < z.HS; i++)
                    for (size_t k = 0; k <= i; k++) {
                        real *entry = log_precision + i * (i + 1) / 2 + k;
                        *entry = i == k ? *entry + (real)log((double)factor) : *entry * factor;
                    }
                cholesky_factor(cholesky, log_precision, z.HS);
                clamped[BOUND_PRECISION]++;
            }
            product(1, z.HS, z.HS, mu, z.HS, 1, cholesky, z.HS, along, z.HS, false);
            product(1, z.HS, z.HS, along, z.HS, 1, cholesky + z.HS * z.HS, z.HS, slope, z.HS, false);
        } else {
            for (size_t k = 0; k < z.P && config_bounded(c, BOUND_PRECISION); k++)
                clamped[BOUND_PRECISION] +=
                    clamp(&log_precision[k], (real)log(SPLAT_PRECISION_MIN), (real)log(SPLAT_PRECISION_MAX));
            for (size_t k = 0; k < z.HS; k++) slope[k] = mu[k] * exp_real(log_precision[z.P > 1 ? k : 0]);
        }
        real square = 0, steep = 0;
        for (size_t k = 0; k < z.HS; k++) {
            square += mu[k] * mu[k];
            steep += slope[k] * slope[k];
        }
        real far = (real)sqrt(square) / (real)SPLAT_CENTRE_MAX, excess = (real)sqrt(steep) / (real)SPLAT_SLOPE_MAX;
        if (far > excess) excess = far;
        if (excess > 1 && config_bounded(c, BOUND_CENTRE)) {
            for (size_t k = 0; k < z.HS; k++) mu[k] /= excess;
            clamped[BOUND_CENTRE]++;
        }
        if (config_bounded(c, BOUND_AMPLITUDE))
            clamped[BOUND_AMPLITUDE] +=
                clamp(&p.log_alpha[s], p.log_alpha_reference[s] - range, p.log_alpha_reference[s] + range);
        if (p.log_theta && config_bounded(c, BOUND_FREQUENCY))
            clamped[BOUND_FREQUENCY] += clamp(&p.log_theta[s], -INFINITY, (real)log(SPLAT_FREQUENCY_MAX));
        if (p.log_delta && config_bounded(c, BOUND_DECAY))
            clamped[BOUND_DECAY] += clamp(&p.log_delta[s], -INFINITY, (real)log(SPLAT_DECAY_MAX));
        if (p.psi && c->mixer == MIXER_SOFTMAX) p.psi[s] = wrapped_phase(p.psi[s]);
        else if (p.psi && config_bounded(c, BOUND_PHASE))
            clamped[BOUND_PHASE] += clamp(&p.psi[s], (real)-SPLAT_PHASE_MAX, (real)SPLAT_PHASE_MAX);
    }
    free(cholesky);
    free(slope);
    for (size_t i = 0; i < m->tensors[TENSOR_log_gain].size && config_bounded(c, BOUND_GAIN); i++)
        clamped[BOUND_GAIN] += clamp(&p.log_gain[i], (real)log(GAIN_MIN), (real)log(GAIN_MAX));
    for (size_t i = 0; i < m->tensors[TENSOR_log_rope].size && config_bounded(c, BOUND_FREQUENCY); i++)
        clamped[BOUND_FREQUENCY] += clamp(&p.log_rope[i], -INFINITY, (real)log(SPLAT_FREQUENCY_MAX));
}

/* Numbers that muon_steps needs beside x (rows, columns) itself. */
static size_t muon_room(size_t rows, size_t columns) {
    size_t least = rows < columns ? rows : columns;
    return rows * columns + 2 * least * least;
}

/* Numbers that a thread needs for any of the matrices: itself and that room. 0: without Muon. */
static size_t muon_workspace(const Config *c) {
    Tensor tensors[NUM_TENSORS];
    size_t most = 0;
    model_tensors(c, tensors);
    for (int i = 0; i < NUM_TENSORS; i++) {
        if (!config_muon_matrices(c, i)) continue;
        MuonMatrix x = config_muon_matrix(c, tensors, i, 0);
        size_t room = x.rows * x.columns + muon_room(x.rows, x.columns);
        if (room > most) most = room;
    }
    return most;
}

/* All singular values of x (rows, columns), which is overwritten and where none exceeds 1, become about 1, by steps
   x <- a x + (b G + c G^2) x with G = x x^T, or from the right with x^T x where that is smaller: equation (13). On the
   calling thread. Returns where the result is: in x or in room. */
static const real *muon_steps(real *x, size_t rows, size_t columns, real *room) {
    const real a = (real)MUON_A, b = (real)MUON_B, c = (real)MUON_C;
    bool tall = rows > columns;
    size_t n = rows * columns, k = tall ? columns : rows;
    real *y = room, *gram = room + n, *square = gram + k * k;
    for (int step = 0; step < MUON_STEPS; step++) {
        gemm_block(tall, !tall, k, k, tall ? rows : columns, x, columns, x, columns, gram, k, false);
        gemm_block(false, false, k, k, k, gram, k, gram, k, square, k, false);
        for (size_t i = 0; i < k * k; i++) square[i] = b * gram[i] + c * square[i];
        for (size_t i = 0; i < n; i++) y[i] = a * x[i];
        if (tall) gemm_block(false, false, rows, k, k, x, columns, square, k, y, columns, true);
        else gemm_block(false, false, k, columns, k, square, k, x, columns, y, columns, true);
        real *other = x;
        x = y;
        y = other;
    }
    return x;
}

/* The same from any x on: no singular value exceeds the root of the sum of squares. */
static const real *muon_orthogonal(real *x, size_t rows, size_t columns, real *room) {
    size_t n = rows * columns;
    double sum = 0;
    for (size_t i = 0; i < n; i++) sum += (double)x[i] * (double)x[i];
    real scale = sum > 0 ? (real)(1 / sqrt(sum)) : 0;
    for (size_t i = 0; i < n; i++) x[i] *= scale;
    return muon_steps(x, rows, columns, room);
}

/* Muon, for each matrix of the blocks: u a running mean of g, p -= rate (0.2 sqrt(max(rows, columns)) O + decay p) with
   O the orthogonal matrix of momentum u + (1 - momentum) g. A matrix has one thread. */
static void muon_update(GSA *m, const Update *u) {
    const Config *c = &m->config;
    size_t first[NUM_TENSORS + 1] = {0}, room = muon_workspace(c); /* first: of all matrices, in order */
    for (int i = 0; i < NUM_TENSORS; i++) first[i + 1] = first[i] + config_muon_matrices(c, i);
    real mean = (real)u->momentum, scale = (real)u->scale[CLIP_WEIGHTS], decay = (real)u->weight_decay;
#pragma omp parallel
    {
        real *x = (real *)xmalloc(room * sizeof(real));
#pragma omp for schedule(dynamic)
        for (size_t left = first[NUM_TENSORS]; left > 0; left--) { /* the largest first */
            int i = NUM_TENSORS - 1;
            while (first[i] >= left) i--;
            MuonMatrix at = config_muon_matrix(c, m->tensors, i, left - 1 - first[i]);
            size_t n = at.rows * at.columns;
            real *p = m->params + at.at, *momentum = m->adam_m + at.at;
            const real *grads = m->grads + at.at;
            for (size_t k = 0; k < n; k++) {
                real g = scale * grads[k];
                momentum[k] = mean * momentum[k] + (1 - mean) * g;
                x[k] = mean * momentum[k] + (1 - mean) * g;
            }
            const real *o = muon_orthogonal(x, at.rows, at.columns, x + n);
            real rate = (real)u->rate[CLIP_WEIGHTS], step = (real)muon_scale(at.rows, at.columns);
            for (size_t k = 0; k < n; k++) p[k] -= rate * (step * o[k] + decay * p[k]);
        }
        free(x);
    }
}

/* AdamW and Muon, then the bounds. m, v running means of g, g^2; p -= rate (m^ / (sqrt(v^) + 1e-8) + decay p), hats:
   divided by 1 - beta^step */
static void gsa_update(GSA *m, const Update *u, int64_t clamped[NUM_BOUNDS]) {
    if (!m->adam_m) {
        m->adam_m = (real *)xcalloc(m->total, sizeof(real));
        m->adam_v = (real *)xcalloc(m->seconds, sizeof(real));
    }
    real beta1 = (real)u->beta1, beta2 = (real)u->beta2;
    real correct1 = (real)(1 / (1 - pow(u->beta1, (double)u->step))),
         correct2 = (real)(1 / (1 - pow(u->beta2, (double)u->step)));
    if (m->config.muon) muon_update(m, u);
    for (int i = 0; i < NUM_TENSORS; i++) {
        const Tensor *t = &m->tensors[i];
        const Group *group = &groups[t->group];
        if (!group->trained || config_muon_matrices(&m->config, i)) continue;
        real *p = m->params + t->offset, *am = m->adam_m + t->offset, *av = m->adam_v + m->second[i].offset;
        const real *grads = m->grads + t->offset;
        real rate = (real)u->rate[group->clip], decay = group->decay ? (real)u->weight_decay : 0,
             scale = (real)u->scale[group->clip];
#pragma omp parallel for simd
        for (size_t k = 0; k < t->size; k++) {
            real g = scale * grads[k];
            real first = beta1 * am[k] + (1 - beta1) * g, second = beta2 * av[k] + (1 - beta2) * g * g;
            am[k] = first;
            av[k] = second;
            p[k] -= rate * (first * correct1 / ((real)sqrt(second * correct2) + (real)1e-8) + decay * p[k]);
        }
    }
    memset(clamped, 0, NUM_BOUNDS * sizeof *clamped);
    scalar_bounds(m, clamped);
}

/* ---------------------------------------------------------------------- main */

#ifndef GSA_NO_MAIN

/* The back end of gsa/run/train.h, in terms of the functions above. */

static int cpu_threads(void) {
#ifdef _OPENMP
    return omp_get_max_threads() < omp_get_thread_limit() ? omp_get_max_threads() : omp_get_thread_limit();
#else
    return 1;
#endif
}

static const char *cpu_name(void) {
    static char name[128];
    int threads = cpu_threads();
#ifdef GEMM_DNNL
    snprintf(name, sizeof name, "CPU, %d thread%s, matrix products by oneDNN %d.%d", threads, threads == 1 ? "" : "s",
             dnnl_version()->major, dnnl_version()->minor);
#else
    snprintf(name, sizeof name, "CPU, %d thread%s, built-in matrix products", threads, threads == 1 ? "" : "s");
#endif
    return name;
}

static void cpu_memory(const Config *c, int B, size_t bytes[NUM_MEMORY]) {
    Tensor tensors[NUM_TENSORS], second[NUM_TENSORS];
    ActivationTensors a;
    if (c->products == PRODUCTS_BF16 && bf16_missing()) die_usage("--products bf16: %s; leave it out", bf16_missing());
    memset(bytes, 0, NUM_MEMORY * sizeof *bytes);
    bytes[MEMORY_PARAMS] = bytes[MEMORY_GRADS] = model_tensors(c, tensors) * sizeof(real);
    size_t room = head_workspace(c), muon = muon_workspace(c);
    bytes[MEMORY_OPTIMISER] = bytes[MEMORY_PARAMS] + model_second_moments(c, second) * sizeof(real);
    bytes[MEMORY_WORKSPACE] = (size_t)cpu_threads() * (room > muon ? room : muon) * sizeof(real);
    carve_activations(&a, NULL, c, (size_t)B, bytes);
}

static void *cpu_create(const Config *c, int B) { return gsa_create(c, (size_t)B); }
static void cpu_destroy(void *model) { gsa_destroy((GSA *)model); }

static size_t cpu_length(const GSA *m, int buffer) { return buffer == BUFFER_ADAM_V ? m->seconds : m->total; }
static real **cpu_buffer(GSA *m, int buffer) {
    real **all[] = {&m->params, &m->grads, &m->adam_m, &m->adam_v};
    if (!*all[buffer]) *all[buffer] = (real *)xcalloc(cpu_length(m, buffer), sizeof(real));
    if (buffer == BUFFER_GRADS) point_parameters(&m->dp, m->grads, m->tensors);
    return all[buffer];
}

static void cpu_write(void *model, int buffer, const float *from) {
    memcpy(*cpu_buffer((GSA *)model, buffer), from, cpu_length((GSA *)model, buffer) * sizeof(real));
}
static const float *cpu_read(void *model, int buffer) { return *cpu_buffer((GSA *)model, buffer); }
/* Where number `first` of the parameters has its like in a buffer. */
static real *cpu_place(GSA *m, int buffer, size_t first) {
    real *start = *cpu_buffer(m, buffer);
    return buffer == BUFFER_ADAM_V ? start + model_second_moment(m->tensors, m->second, first) : start + first;
}
static void cpu_put(void *model, int buffer, size_t first, size_t count, const float *from) {
    memcpy(cpu_place((GSA *)model, buffer, first), from, count * sizeof(float));
}
static void cpu_get(void *model, int buffer, size_t first, size_t count, float *to) {
    memcpy(to, cpu_place((GSA *)model, buffer, first), count * sizeof(float));
}
static void cpu_watch(void *model, bool on) { ((GSA *)model)->watch = on; }
static double cpu_forward(void *model, const int *x, const int *y, int B, int T) {
    return gsa_forward((GSA *)model, x, y, (size_t)B, (size_t)T);
}
static void cpu_backward(void *model, double scale) { gsa_backward((GSA *)model, scale); }
static void cpu_zero_gradients(void *model) { gsa_zero_gradients((GSA *)model); }
static void cpu_gradient_norms(void *model, double norms[NUM_CLIPS]) { gsa_gradient_norms((GSA *)model, norms); }
static void cpu_update(void *model, const Update *u, int64_t clamped[NUM_BOUNDS]) {
    gsa_update((GSA *)model, u, clamped);
}
static void cpu_logits(void *model, int b, int t, float *out) {
    const GSA *m = (const GSA *)model;
    memcpy(out, m->a.logits + ((size_t)b * m->used_T + (size_t)t) * m->config.Vp, m->config.V * sizeof(float));
}

static void cpu_head(void *model, int l, int h, int part, int count, float *out) {
    GSA *m = (GSA *)model;
    Sizes z = config_sizes(&m->config);
    size_t N = m->used_B * m->used_T;
    use_products(m);
    if (m->config.recompute && m->block != (size_t)l) block_forward(m, (size_t)l, m->used_B, m->used_T);
    ActivationTensors block = block_activations(m, (size_t)l, N);
    Gates gates = layer_gates(m, &block, (size_t)l);
    const real *qkv = block.qkv + (size_t)part * z.A + (size_t)h * z.HS;
    for (size_t i = 0, apart = N / (size_t)count; i < (size_t)count; i++)
        if (part == PART_FORGET) out[i] = gates.log_forget[i * apart * gates.count + (size_t)gates.column[h]];
        else memcpy(out + i * z.HS, qkv + i * apart * 3 * z.A, z.HS * sizeof(float));
}

static const Backend cpu_backend = {.name = cpu_name,
                                    .memory = cpu_memory,
                                    .free_memory = free_memory,
                                    .create = cpu_create,
                                    .destroy = cpu_destroy,
                                    .write = cpu_write,
                                    .read = cpu_read,
                                    .put = cpu_put,
                                    .get = cpu_get,
                                    .forward = cpu_forward,
                                    .backward = cpu_backward,
                                    .zero_gradients = cpu_zero_gradients,
                                    .gradient_norms = cpu_gradient_norms,
                                    .update = cpu_update,
                                    .logits = cpu_logits,
                                    .head = cpu_head,
                                    .watch = cpu_watch};

int main(int argc, char **argv) { return train(argc, argv, &cpu_backend); }

#endif
