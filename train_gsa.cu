/* train_gsa.cu: the network of train_gsa.c on the GPU. Same layers, same names, same order, plus a stream:
     matrix products -> encoder -> layernorm -> matmul -> feature maps: rope and splat -> the two mixers: attention and scan ->
     gelu -> classifier -> the model: forward, backward, update -> main
   Read train_gsa.c first: it says what is computed; here the comments say how.

   Numbers: activations and the weights that multiply them are floatX, bf16 or (with GSA_FP32, for checking) fp32; the master
   weights, gradients, Adam's moments, statistics and all splat parameters are fp32. A floatX weight is a rounded copy of
   its master, renewed by every update.

   Every result is the same bit for bit in every run: no atomics, every sum in an order that depends on shapes alone, and one
   algorithm of cuBLASLt per shape of product (see matmul_choose).

   Unless noted, a row of C numbers is worked on by one warp in packs of 8, and C is a multiple of 32. */

#include "gsa/train.h"

#include <cublasLt.h>
#include <cuda.h>
#include <cudaTypedefs.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#ifdef GSA_FP32
typedef float floatX;
#define FLOATX_TYPE CUDA_R_32F
#define FLOATX_NAME "fp32"
#else
typedef __nv_bfloat16 floatX;
#define FLOATX_TYPE CUDA_R_16BF
#define FLOATX_NAME "bf16"
#endif

#define cudaCheck(call) cuda_check((call), __FILE__, __LINE__)
static void cuda_check(cudaError_t error, const char *file, int line) {
    if (error != cudaSuccess) die("the GPU reports '%s' (%s:%d)", cudaGetErrorString(error), file, line);
}

#define cublasCheck(call) cublas_check((call), __FILE__, __LINE__)
static void cublas_check(cublasStatus_t status, const char *file, int line) {
    if (status != CUBLAS_STATUS_SUCCESS) die("cuBLASLt reports '%s' (%s:%d)", cublasLtGetStatusString(status), file, line);
}

#define CEIL_DIV(a, b) (((a) + (b) - 1) / (b))

/* 8 numbers, read and written at once: 16 bytes of bf16. */
#ifdef GSA_FP32
struct Pack {
    float4 half[2];
};
__device__ static inline float number(const Pack &p, int i) { return ((const float *)p.half)[i]; }
__device__ static inline Pack make_pack(const float v[8]) { return {{make_float4(v[0], v[1], v[2], v[3]), make_float4(v[4], v[5], v[6], v[7])}}; }
#else
struct Pack {
    uint4 pairs;
};
__device__ static inline float number(const Pack &p, int i) { /* a bf16 is the upper half of an fp32 */
    uint32_t pair = i < 2 ? p.pairs.x : i < 4 ? p.pairs.y : i < 6 ? p.pairs.z : p.pairs.w;
    return __uint_as_float(i % 2 ? pair & 0xffff0000u : pair << 16);
}
__device__ static inline uint32_t make_pair(float first, float second) {
    uint32_t pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
    return pair;
}
__device__ static inline Pack make_pack(const float v[8]) { return {make_uint4(make_pair(v[0], v[1]), make_pair(v[2], v[3]), make_pair(v[4], v[5]), make_pair(v[6], v[7]))}; }
#endif
__device__ static inline Pack load_pack(const floatX *from) { return *(const Pack *)from; }
/* to: in global memory; by the intrinsic, because a plain assignment may be taken apart into four stores */
__device__ static inline void store_whole(floatX *to, const Pack &p) {
#ifdef GSA_FP32
    __stwb((float4 *)to, p.half[0]), __stwb((float4 *)to + 1, p.half[1]);
#else
    __stwb((uint4 *)to, p.pairs);
#endif
}
__device__ static inline void store_pack(floatX *to, const float v[8]) { store_whole(to, make_pack(v)); }
__device__ static inline void load_floats(float v[8], const float *from) {
    float4 low = *(const float4 *)from, high = *(const float4 *)(from + 4);
    v[0] = low.x, v[1] = low.y, v[2] = low.z, v[3] = low.w, v[4] = high.x, v[5] = high.y, v[6] = high.z, v[7] = high.w;
}

__device__ static inline void prefetch(const void *line) { asm volatile("prefetch.global.L2 [%0];" ::"l"(line)); } /* 128 bytes */

/* All 32 lanes get the sum, added pairwise: always in the same order. */
__device__ static inline float warp_sum(float x) {
    for (int lane = 16; lane > 0; lane /= 2) x += __shfl_xor_sync(~0u, x, lane);
    return x;
}
__device__ static inline float warp_max(float x) {
    for (int lane = 16; lane > 0; lane /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, lane));
    return x;
}
__device__ static inline double warp_sum(double x) {
    for (int lane = 16; lane > 0; lane /= 2) x += __shfl_xor_sync(~0u, x, lane);
    return x;
}

/* a thread's warp, as a number that the compiler knows to be the same in all its lanes */
__device__ static inline int warp_index(void) { return __shfl_sync(~0u, (int)threadIdx.x / 32, 0); }

#ifdef GSA_FP32
__device__ static inline float fast_reciprocal(float x) { return 1 / x; }
__device__ static inline float fast_exp(float x) { return expf(x); }
__device__ static inline void fast_sincos(float x, float *s, float *c) { sincosf(x, s, c); }
#else /* errors far below bf16's; angles here are within [-pi, pi] */
__device__ static inline float fast_reciprocal(float x) {
    asm("rcp.approx.ftz.f32 %0, %0;" : "+f"(x));
    return x;
}
__device__ static inline float fast_exp(float x) { return __expf(x); }
__device__ static inline void fast_sincos(float x, float *s, float *c) { __sincosf(x, s, c); }
#endif

__global__ static void convert_kernel(floatX *to, const float *from, size_t n) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) to[i] = (floatX)from[i];
}

/* ---------------------------------------------------------------------------------------------- matrix products

   All large products are cuBLASLt's. It counts in columns, so a row-major (N, C) is its (C, N): D (m, n) = alpha op(A) op(B) + C,
   where D's m is the contiguous dimension. An epilogue does what would else be a pass over memory of its own: the bias, GELU or
   its derivative. Where cuBLASLt has no algorithm with the epilogue, callers do that pass. */

typedef struct {
    int m, n, k;
    bool ta, tb, wide, add; /* wide: C and D are fp32; add: C is added, else there is none */
    int epilogue;
} MatmulShape;

typedef struct {
    MatmulShape shape;
    bool possible;
    cublasLtMatmulDesc_t description;
    cublasLtMatrixLayout_t a, b, d;
    cublasLtMatmulAlgo_t algorithm;
} MatmulPlan;

typedef struct {
    cublasLtHandle_t handle;
    void *workspace;
    MatmulPlan *plans;
    int count, room;
    size_t tuned[2]; /* products over this many tokens get their algorithm by timing; 0: none do */
    char *notes;  /* the file that remembers the choices; NULL: nowhere, so nothing is timed */
} Matmul;

enum { WORKSPACE = 32 << 20, CANDIDATES = 8 };

/* A line of the file of choices: the shape as text, then the algorithm's bytes. */
static void matmul_line(char line[400], const MatmulShape *s, const cublasLtMatmulAlgo_t *algorithm) {
    int at = snprintf(line, 400, FLOATX_NAME " %d %d %d %d%d%d%d %d ", s->m, s->n, s->k, s->ta, s->tb, s->wide, s->add, s->epilogue);
    if (!algorithm) return;
    const unsigned char *bytes = (const unsigned char *)algorithm;
    for (size_t i = 0; i < sizeof *algorithm; i++) at += snprintf(line + at, 400 - (size_t)at, "%02x", bytes[i]);
    snprintf(line + at, 400 - (size_t)at, "\n");
}

/* The remembered algorithm of a shape, if this library still takes it. */
static bool matmul_remembered(Matmul *mm, MatmulPlan *p) {
    char line[400];
    bool found = false;
    FILE *f = fopen(mm->notes, "r");
    if (!f) return false;
    size_t prefix;
    char wanted[400];
    matmul_line(wanted, &p->shape, NULL);
    prefix = strlen(wanted);
    while (!found && fgets(line, sizeof line, f)) {
        unsigned char *bytes = (unsigned char *)&p->algorithm;
        if (strncmp(line, wanted, prefix) != 0 || strlen(line) != prefix + 2 * sizeof p->algorithm + 1) continue;
        found = true;
        for (size_t i = 0; i < sizeof p->algorithm; i++) found &= sscanf(line + prefix + 2 * i, "%2hhx", &bytes[i]) == 1;
        cublasLtMatmulHeuristicResult_t result;
        found = found && cublasLtMatmulAlgoCheck(mm->handle, p->description, p->a, p->b, p->d, p->d, &p->algorithm, &result) == CUBLAS_STATUS_SUCCESS && result.workspaceSize <= WORKSPACE;
    }
    fclose(f);
    return found;
}

static void matmul_remember(Matmul *mm, const MatmulPlan *p) {
    char line[400];
    FILE *f = fopen(mm->notes, "a");
    matmul_line(line, &p->shape, &p->algorithm);
    if (!f || fputs(line, f) < 0 || fclose(f) != 0)
        die("cannot write %s (%s), which remembers the fastest algorithm of each matrix product so that runs repeat bit for bit; make its folder writable", mm->notes, strerror(errno));
}

/* The fastest of cuBLASLt's first proposals, timed once on this product's own data and remembered in a file, because another
   choice would round differently: two runs on one machine agree bit for bit, the first of all included. */
static void matmul_choose(Matmul *mm, MatmulPlan *p, const cublasLtMatmulHeuristicResult_t *proposals, int count, void *D, const void *A, const void *B, const void *C, float alpha,
                          cudaStream_t stream) {
    float beta = p->shape.add, best = INFINITY;
    void *into = D, *room = NULL;
    bool remembered = matmul_remembered(mm, p);
    if (!remembered) {
        if (p->shape.add && C == D) { /* adding again and again would spoil D */
            size_t bytes = (size_t)p->shape.m * p->shape.n * (p->shape.wide ? sizeof(float) : sizeof(floatX));
            cudaCheck(cudaMalloc(&room, bytes));
            cudaCheck(cudaMemsetAsync(room, 0, bytes, stream));
            into = room, C = room;
        }
        cudaEvent_t start, end;
        cudaCheck(cudaEventCreate(&start));
        cudaCheck(cudaEventCreate(&end));
        for (int i = 0; i < count; i++) {
            float fastest = INFINITY;
            for (int run = 0; run < 4; run++) {
                float ms;
                cudaCheck(cudaEventRecord(start, stream));
                if (cublasLtMatmul(mm->handle, p->description, &alpha, A, p->a, B, p->b, &beta, C, p->d, into, p->d, &proposals[i].algo, mm->workspace, WORKSPACE, stream) !=
                    CUBLAS_STATUS_SUCCESS)
                    break;
                cudaCheck(cudaEventRecord(end, stream));
                cudaCheck(cudaEventSynchronize(end));
                cudaCheck(cudaEventElapsedTime(&ms, start, end));
                if (run > 0 && ms < fastest) fastest = ms;
            }
            if (fastest < best) best = fastest, p->algorithm = proposals[i].algo;
        }
        cudaCheck(cudaEventDestroy(start));
        cudaCheck(cudaEventDestroy(end));
        cudaCheck(cudaFree(room));
        matmul_remember(mm, p);
    }
    int id = 0, tile = 0, stages = 0, split = 0;
    cublasLtMatmulAlgoConfigGetAttribute(&p->algorithm, CUBLASLT_ALGO_CONFIG_ID, &id, sizeof id, NULL);
    cublasLtMatmulAlgoConfigGetAttribute(&p->algorithm, CUBLASLT_ALGO_CONFIG_TILE_ID, &tile, sizeof tile, NULL);
    cublasLtMatmulAlgoConfigGetAttribute(&p->algorithm, CUBLASLT_ALGO_CONFIG_STAGES_ID, &stages, sizeof stages, NULL);
    cublasLtMatmulAlgoConfigGetAttribute(&p->algorithm, CUBLASLT_ALGO_CONFIG_SPLITK_NUM, &split, sizeof split, NULL);
    printf("matmul        (%d, %d) x %d%s, epilogue %d: algorithm %d, tile %d, stages %d, split %d", p->shape.n, p->shape.m, p->shape.k, p->shape.add ? " added" : "", p->shape.epilogue, id, tile,
           stages, split);
    if (remembered) printf(", remembered\n");
    else printf(", %.3f ms, %.0f TFLOP/s\n", best, 2e-9 * p->shape.m * p->shape.n * p->shape.k / best);
}

/* D = alpha op(A) op(B) + C with the epilogue of s; vector: bias; aux: what GELU was applied to. false: there is no
   algorithm for it and nothing was done. */
static bool matmul_run(Matmul *mm, MatmulShape s, void *D, const void *A, const void *B, const void *C, const void *vector, const void *aux, float alpha, cudaStream_t stream) {
    MatmulPlan *p = NULL;
    bool fresh;
    for (int i = 0; i < mm->count && !p; i++) {
        const MatmulShape *o = &mm->plans[i].shape;
        if (o->m == s.m && o->n == s.n && o->k == s.k && o->ta == s.ta && o->tb == s.tb && o->wide == s.wide && o->add == s.add && o->epilogue == s.epilogue) p = &mm->plans[i];
    }
    fresh = !p;
    if (!s.add) C = D;
    if (fresh) {
        if (mm->count == mm->room) mm->plans = (MatmulPlan *)xrealloc(mm->plans, (size_t)(mm->room = 2 * mm->room + 32) * sizeof *mm->plans);
        p = &mm->plans[mm->count++];
        p->shape = s;
        cublasOperation_t ta = s.ta ? CUBLAS_OP_T : CUBLAS_OP_N, tb = s.tb ? CUBLAS_OP_T : CUBLAS_OP_N;
        cudaDataType_t out = s.wide ? CUDA_R_32F : FLOATX_TYPE;
        int64_t aux_stride = s.m;
        cublasCheck(cublasLtMatmulDescCreate(&p->description, CUBLAS_COMPUTE_32F, CUDA_R_32F));
        cublasCheck(cublasLtMatmulDescSetAttribute(p->description, CUBLASLT_MATMUL_DESC_TRANSA, &ta, sizeof ta));
        cublasCheck(cublasLtMatmulDescSetAttribute(p->description, CUBLASLT_MATMUL_DESC_TRANSB, &tb, sizeof tb));
        cublasCheck(cublasLtMatmulDescSetAttribute(p->description, CUBLASLT_MATMUL_DESC_EPILOGUE, &s.epilogue, sizeof s.epilogue));
        if (vector) cublasCheck(cublasLtMatmulDescSetAttribute(p->description, CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, &out, sizeof out));
        if (aux) cublasCheck(cublasLtMatmulDescSetAttribute(p->description, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, &aux_stride, sizeof aux_stride));
        cublasCheck(cublasLtMatrixLayoutCreate(&p->a, FLOATX_TYPE, (uint64_t)(s.ta ? s.k : s.m), (uint64_t)(s.ta ? s.m : s.k), s.ta ? s.k : s.m));
        cublasCheck(cublasLtMatrixLayoutCreate(&p->b, FLOATX_TYPE, (uint64_t)(s.tb ? s.n : s.k), (uint64_t)(s.tb ? s.k : s.n), s.tb ? s.n : s.k));
        cublasCheck(cublasLtMatrixLayoutCreate(&p->d, out, (uint64_t)s.m, (uint64_t)s.n, s.m));
    }
    if (vector) cublasCheck(cublasLtMatmulDescSetAttribute(p->description, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &vector, sizeof vector));
    if (aux) cublasCheck(cublasLtMatmulDescSetAttribute(p->description, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, &aux, sizeof aux));
    if (fresh) {
        cublasLtMatmulHeuristicResult_t proposals[CANDIDATES];
        cublasLtMatmulPreference_t preference;
        size_t workspace = WORKSPACE;
        uint32_t alignment = 16;
        int count = 0;
        cublasCheck(cublasLtMatmulPreferenceCreate(&preference));
        cublasCheck(cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &workspace, sizeof workspace));
        const cublasLtMatmulPreferenceAttributes_t aligned[] = {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES,
                                                                CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES};
        for (int i = 0; i < 4; i++) cublasCheck(cublasLtMatmulPreferenceSetAttribute(preference, aligned[i], &alignment, sizeof alignment));
        cublasStatus_t status = cublasLtMatmulAlgoGetHeuristic(mm->handle, p->description, p->a, p->b, p->d, p->d, preference, CANDIDATES, proposals, &count);
        cublasCheck(cublasLtMatmulPreferenceDestroy(preference));
        p->possible = status == CUBLAS_STATUS_SUCCESS && count > 0;
        if (!p->possible && s.epilogue == CUBLASLT_EPILOGUE_DEFAULT) die("cuBLASLt has no algorithm for (%d, %d) x (%d, %d)", s.n, s.k, s.k, s.m);
        if (p->possible) p->algorithm = proposals[0].algo;
        bool tuned = false;
        for (int i = 0; i < 2; i++) tuned |= mm->tuned[i] && (mm->tuned[i] == (size_t)s.n || mm->tuned[i] == (size_t)s.k);
        if (p->possible && mm->notes && tuned) matmul_choose(mm, p, proposals, count, D, A, B, C, alpha, stream);
    }
    if (!p->possible) return false;
    float beta = s.add;
    cublasCheck(cublasLtMatmul(mm->handle, p->description, &alpha, A, p->a, B, p->b, &beta, C, p->d, D, p->d, &p->algorithm, mm->workspace, WORKSPACE, stream));
    return true;
}

static void matmul_create(Matmul *mm) {
    memset(mm, 0, sizeof *mm);
    cublasCheck(cublasLtCreate(&mm->handle));
    cudaCheck(cudaMalloc(&mm->workspace, WORKSPACE));
}

static void matmul_destroy(Matmul *mm) {
    for (int i = 0; i < mm->count; i++) {
        cublasLtMatmulDescDestroy(mm->plans[i].description);
        cublasLtMatrixLayoutDestroy(mm->plans[i].a), cublasLtMatrixLayoutDestroy(mm->plans[i].b), cublasLtMatrixLayoutDestroy(mm->plans[i].d);
    }
    free(mm->plans), free(mm->notes);
    cudaFree(mm->workspace);
    cublasLtDestroy(mm->handle);
}

/* Column sums in two steps, each in a fixed order: SUM_BLOCKS partial sums of every column, then those added up. */
enum { SUM_BLOCKS = 396 };

/* partials[block] = column sums of every SUM_BLOCKS-th row of x (N, C); a block has 256 columns at a time, 8 a lane, its 8 warps take
   turns with the rows. */
__global__ static void column_sums_kernel(float *partials, const floatX *x, size_t N, size_t C) {
    __shared__ float sums[256];
    size_t c = ((size_t)blockIdx.y * 32 + threadIdx.x) * 8;
    float mine[8] = {};
    if (c < C)
#pragma unroll 4
        for (size_t i = (size_t)blockIdx.x * 8 + threadIdx.y; i < N; i += SUM_BLOCKS * 8) {
            Pack p = load_pack(x + i * C + c);
            for (int e = 0; e < 8; e++) mine[e] += number(p, e);
        }
    for (int y = 0; y < 8; y++) {
        for (int e = 0; e < 8 && (int)threadIdx.y == y; e++) sums[threadIdx.x * 8 + e] = (y ? sums[threadIdx.x * 8 + e] : 0) + mine[e];
        __syncthreads();
    }
    if (threadIdx.y == 0 && c < C)
        for (int e = 0; e < 8; e++) partials[blockIdx.x * C + c + e] = sums[threadIdx.x * 8 + e];
}

/* Up to three vectors that lie side by side in a row of partials. */
typedef struct {
    float *to[3]; /* (C) each; NULL: none */
} SumVectors;

/* sums.to[i][c] += column i C + c of partials (SUM_BLOCKS, columns): a block owns 32 columns, its warps' sums are added in order */
__global__ static void add_partials_kernel(SumVectors sums, const float *partials, size_t C, size_t columns) {
    __shared__ float partial[16][32];
    size_t c = (size_t)blockIdx.x * 32 + threadIdx.x;
    float mine = 0;
    for (int i = threadIdx.y; i < SUM_BLOCKS; i += 16) mine += partials[(size_t)i * columns + c];
    partial[threadIdx.y][threadIdx.x] = mine;
    __syncthreads();
    float *to = c < C ? sums.to[0] : c < 2 * C ? sums.to[1] : sums.to[2];
    if (threadIdx.y > 0 || !to) return;
    for (int y = 1; y < 16; y++) mine += partial[y][threadIdx.x];
    to[c % C] += mine;
}

static void add_partials(SumVectors sums, int count, const float *partials, size_t C, cudaStream_t stream) {
    add_partials_kernel<<<(unsigned)(count * C / 32), dim3(32, 16), 0, stream>>>(sums, partials, C, count * C);
    cudaCheck(cudaGetLastError());
}

/* sum (C) += column sums of x (N, C); partials (SUM_BLOCKS, C): scratch */
static void add_column_sums(float *sum, float *partials, const floatX *x, size_t N, size_t C, cudaStream_t stream) {
    column_sums_kernel<<<dim3(SUM_BLOCKS, (unsigned)CEIL_DIV(C, 256)), dim3(32, 8), 0, stream>>>(partials, x, N, C);
    cudaCheck(cudaGetLastError());
    add_partials({{sum, NULL, NULL}}, 1, partials, C, stream);
}

/* ---------------------------------------------------------------------------------------------- encoder */

__global__ static void encoder_forward_kernel(floatX *out, const int *tokens, const floatX *wte, const floatX *wpe, size_t N, size_t T, size_t C, size_t first) {
    size_t at = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * 8, i = at / C, c = at % C;
    if (i >= N) return;
    Pack token = load_pack(wte + (size_t)tokens[i] * C + c);
    float sum[8];
    for (int k = 0; k < 8; k++) sum[k] = number(token, k);
    if (wpe) {
        Pack position = load_pack(wpe + (first + i % T) * C + c);
        for (int k = 0; k < 8; k++) sum[k] += number(position, k);
    }
    store_pack(out + at, sum);
}

/* out (B, T, C) = wte[token] + wpe[position]; wpe NULL: no learned positions. Positions start at first. */
static void encoder_forward(floatX *out, const int *tokens, const floatX *wte, const floatX *wpe, size_t B, size_t T, size_t C, size_t first, cudaStream_t stream) {
    encoder_forward_kernel<<<CEIL_DIV(B * T * C / 8, 256), 256, 0, stream>>>(out, tokens, wte, wpe, B * T, T, C, first);
    cudaCheck(cudaGetLastError());
}

/* A frequent token has thousands of rows to add, most have one. The host sorts the positions by token and cuts each token's
   list into segments of at most SEGMENT rows; a token with several segments is finished from their sums. */
enum { SEGMENT = 16 };
typedef struct {
    int first, count; /* of positions (a segment) or of segment sums (a token) */
    int to;           /* a segment: its sum's row in sums, or -1 for the token's own gradient; a token: unused */
    int token;
} Bucket;

typedef struct {
    int *positions;   /* (N) sorted by token */
    Bucket *segments; /* at most N */
    Bucket *tokens;   /* those of several segments, at most N / SEGMENT */
    int segment_count, token_count, sum_count;
} Buckets;

static void bucket_tokens(Buckets *b, const int *tokens, size_t N, size_t V /* all are below */, int *starts /* scratch (V + 1) */) {
    memset(starts, 0, (V + 1) * sizeof *starts);
    for (size_t i = 0; i < N; i++) starts[tokens[i] + 1]++;
    b->segment_count = b->token_count = b->sum_count = 0;
    for (size_t v = 0; v < V; v++) {
        int count = starts[v + 1], first = starts[v];
        starts[v + 1] += first;
        bool several = count > SEGMENT;
        if (several) b->tokens[b->token_count++] = {b->sum_count, (int)CEIL_DIV(count, SEGMENT), 0, (int)v};
        for (int done = 0; done < count; done += SEGMENT)
            b->segments[b->segment_count++] = {first + done, count - done < SEGMENT ? count - done : SEGMENT, several ? b->sum_count++ : -1, (int)v};
    }
    for (size_t i = 0; i < N; i++) b->positions[starts[tokens[i]]++] = (int)i;
}
static size_t bucket_sums(size_t N) { return N / SEGMENT + N / (SEGMENT + 1) + 1; } /* rows of sums, at most */

/* One warp: a segment and 256 columns. */
__global__ static void encoder_backward_segments_kernel(float *dwte, float *sums, const floatX *dout, const int *positions, const Bucket *segments, size_t C) {
    Bucket s = segments[blockIdx.x];
    size_t c = ((size_t)blockIdx.y * 32 + threadIdx.x) * 8;
    if (c >= C) return;
    float sum[8] = {0};
#pragma unroll 4
    for (int i = 0; i < s.count; i++) {
        Pack d = load_pack(dout + (size_t)positions[s.first + i] * C + c);
        for (int k = 0; k < 8; k++) sum[k] += number(d, k);
    }
    float *row = s.to < 0 ? dwte + (size_t)s.token * C + c : sums + (size_t)s.to * C + c;
    for (int k = 0; k < 8; k++) row[k] = s.to < 0 ? row[k] + sum[k] : sum[k];
}

/* One block: a token of several segments and 32 columns. */
__global__ static void encoder_backward_tokens_kernel(float *dwte, const float *sums, const Bucket *tokens, size_t C) {
    __shared__ float partial[16][32];
    Bucket t = tokens[blockIdx.x];
    size_t c = (size_t)blockIdx.y * 32 + threadIdx.x;
    float mine = 0;
    for (int i = threadIdx.y; i < t.count; i += 16) mine += sums[(size_t)(t.first + i) * C + c];
    partial[threadIdx.y][threadIdx.x] = mine;
    __syncthreads();
    if (threadIdx.y > 0) return;
    for (int y = 1; y < 16; y++) mine += partial[y][threadIdx.x];
    dwte[(size_t)t.token * C + c] += mine;
}

__global__ static void encoder_backward_positions_kernel(float *dwpe, const floatX *dout, size_t B, size_t T, size_t C) {
    size_t at = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * 8;
    if (at >= T * C) return;
    float sum[8] = {0};
    for (size_t b = 0; b < B; b++) {
        Pack d = load_pack(dout + b * T * C + at);
        for (int k = 0; k < 8; k++) sum[k] += number(d, k);
    }
    for (int k = 0; k < 8; k++) dwpe[at + k] += sum[k];
}

/* b: buckets of the tokens, whose arrays are on the device; sums (bucket_sums(B * T), C): scratch */
static void encoder_backward(float *dwte, float *dwpe, const floatX *dout, const Buckets *b, float *sums, size_t B, size_t T, size_t C, cudaStream_t stream) {
    encoder_backward_segments_kernel<<<dim3((unsigned)b->segment_count, (unsigned)CEIL_DIV(C, 256)), 32, 0, stream>>>(dwte, sums, dout, b->positions, b->segments, C);
    cudaCheck(cudaGetLastError());
    if (b->token_count > 0) encoder_backward_tokens_kernel<<<dim3((unsigned)b->token_count, (unsigned)(C / 32)), dim3(32, 16), 0, stream>>>(dwte, sums, b->tokens, C);
    cudaCheck(cudaGetLastError());
    if (dwpe) encoder_backward_positions_kernel<<<CEIL_DIV(T * C / 8, 256), 256, 0, stream>>>(dwpe, dout, B, T, C);
    cudaCheck(cudaGetLastError());
}

/* ---------------------------------------------------------------------------------------------- layernorm */

#define LAYERNORM_EPSILON 1e-5
enum { LAYERNORM_CHANNELS = 4096 };  /* at most: a row is held in the registers of a warp */

/* Calls kernel<K> with the smallest K packs a lane that hold C numbers in a warp. */
#define BY_WIDTH(C, launch)                      \
    do {                                         \
        size_t packs = CEIL_DIV(C, 256);         \
        if (packs <= 1) { enum { K = 1 }; launch; }       \
        else if (packs <= 2) { enum { K = 2 }; launch; }  \
        else if (packs <= 3) { enum { K = 3 }; launch; }  \
        else if (packs <= 4) { enum { K = 4 }; launch; }  \
        else if (packs <= 8) { enum { K = 8 }; launch; }  \
        else { enum { K = 16 }; launch; }        \
        cudaCheck(cudaGetLastError());           \
    } while (0)

template <int K>
__global__ static void layernorm_forward_kernel(floatX *out, float *mean, float *rstd, const floatX *in, const float *weight, const float *bias, size_t N, size_t C) {
    size_t i = (size_t)blockIdx.x * blockDim.y + threadIdx.y;
    if (i >= N) return;
    float x[K][8], sum = 0, square = 0;
    for (int k = 0; k < K; k++) {
        size_t c = (size_t)(k * 32 + threadIdx.x) * 8;
        Pack p = {};
        if (c < C) p = load_pack(in + i * C + c);
        for (int e = 0; e < 8; e++) x[k][e] = number(p, e), sum += x[k][e];
    }
    float m = warp_sum(sum) / (float)C;
    for (int k = 0; k < K; k++)
        for (int e = 0; e < 8; e++) square += (size_t)(k * 32 + threadIdx.x) * 8 < C ? (x[k][e] - m) * (x[k][e] - m) : 0;
    float r = rsqrtf(warp_sum(square) / (float)C + (float)LAYERNORM_EPSILON);
    for (int k = 0; k < K; k++) {
        size_t c = (size_t)(k * 32 + threadIdx.x) * 8;
        if (c >= C) break;
        float w[8], b[8];
        load_floats(w, weight + c), load_floats(b, bias + c);
        for (int e = 0; e < 8; e++) x[k][e] = (x[k][e] - m) * r * w[e] + b[e];
        store_pack(out + i * C + c, x[k]);
    }
    if (threadIdx.x == 0) mean[i] = m, rstd[i] = r;
}

/* out (N, C) = (x - mean) / sqrt(var + 1e-5) * weight + bias, row by row; mean and rstd (N) are kept for the backward pass */
static void layernorm_forward(floatX *out, float *mean, float *rstd, const floatX *in, const float *weight, const float *bias, size_t N, size_t C, cudaStream_t stream) {
    BY_WIDTH(C, (layernorm_forward_kernel<K><<<CEIL_DIV(N, 8), dim3(32, 8), 0, stream>>>(out, mean, rstd, in, weight, bias, N, C)));
}

/* A warp keeps its rows' sums for dweight, dbias and dsum in registers, a block adds its warps' in order and writes them to its row of
   partials (SUM_BLOCKS, 3C). */
template <int K>
__global__ static void __launch_bounds__(128, K > 3 ? 1 : 3)
    layernorm_backward_kernel(floatX *din, float *partials, const floatX *dout, const floatX *in, const float *weight, const float *mean, const float *rstd, size_t N, size_t C) {
    extern __shared__ float sums[]; /* (3C) */
    float dw[K][8] = {}, db[K][8] = {}, ds[K][8] = {};
    for (size_t i = (size_t)blockIdx.x * 4 + threadIdx.y; i < N; i += (size_t)gridDim.x * 4) {
        Pack px[K], pd[K], old[K];
        float m = mean[i], r = rstd[i], sum = 0, sum_n = 0;
        for (int k = 0; k < K; k++) {
            size_t c = (size_t)(k * 32 + threadIdx.x) * 8;
            px[k] = pd[k] = old[k] = {};
            if (c < C) px[k] = load_pack(in + i * C + c), pd[k] = load_pack(dout + i * C + c), old[k] = load_pack(din + i * C + c);
        }
        for (int k = 0; k < K; k++) {
            size_t c = (size_t)(k * 32 + threadIdx.x) * 8;
            if (c >= C) break;
            float w[8];
            load_floats(w, weight + c);
            for (int e = 0; e < 8; e++) {
                float d = number(pd[k], e), n = (number(px[k], e) - m) * r, dn = d * w[e];
                sum += dn, sum_n += dn * n;
                dw[k][e] += d * n, db[k][e] += d;
            }
        }
        sum = warp_sum(sum) / (float)C, sum_n = warp_sum(sum_n) / (float)C;
        for (int k = 0; k < K; k++) {
            size_t c = (size_t)(k * 32 + threadIdx.x) * 8;
            if (c >= C) break;
            float w[8], dx[8];
            load_floats(w, weight + c);
            for (int e = 0; e < 8; e++) dx[e] = number(old[k], e) + r * (number(pd[k], e) * w[e] - sum - (number(px[k], e) - m) * r * sum_n), ds[k][e] += dx[e];
            store_pack(din + i * C + c, dx);
        }
    }
    for (int y = 0; y < 4; y++) {
        if ((int)threadIdx.y == y)
            for (int k = 0; k < K; k++) {
                size_t c = (size_t)(k * 32 + threadIdx.x) * 8;
                if (c >= C) break;
                for (int e = 0; e < 8; e++) {
                    sums[c + e] = (y ? sums[c + e] : 0) + dw[k][e];
                    sums[C + c + e] = (y ? sums[C + c + e] : 0) + db[k][e];
                    sums[2 * C + c + e] = (y ? sums[2 * C + c + e] : 0) + ds[k][e];
                }
            }
        __syncthreads();
    }
    for (size_t c = threadIdx.y * 32 + threadIdx.x; c < 3 * C; c += 128) partials[blockIdx.x * 3 * C + c] = sums[c];
}

/* With n = (x - mean) rstd and dn = dout weight: dx = rstd (dn - mean(dn) - n mean(dn n)). Adds to din: the residual stream. dsum (C)
   += column sums of din then, which are the gradient of the bias of whatever was added to the stream before; NULL: not wanted. */
static void layernorm_backward(floatX *din, float *dweight, float *dbias, float *dsum, float *partials, const floatX *dout, const floatX *in, const float *weight, const float *mean,
                               const float *rstd, size_t N, size_t C, cudaStream_t stream) {
    BY_WIDTH(C, (layernorm_backward_kernel<K><<<SUM_BLOCKS, dim3(32, 4), 3 * C * sizeof(float), stream>>>(din, partials, dout, in, weight, mean, rstd, N, C)));
    add_partials({{dweight, dbias, dsum}}, 3, partials, C, stream);
}

/* ---------------------------------------------------------------------------------------------- gelu */

#define GELU_A 0.7978845608028654 /* sqrt(2 / pi) */
#define GELU_B 0.044715

/* These two run only where the matrix product has no such epilogue. */
__global__ static void gelu_forward_kernel(floatX *out, const floatX *in, size_t N) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= N) return;
    float x = (float)in[i], u = (float)GELU_A * (x + (float)GELU_B * x * x * x);
    out[i] = (floatX)(x / (1 + expf(-2 * u)));
}

__global__ static void gelu_backward_kernel(floatX *din, const floatX *dout, const floatX *in, size_t N) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= N) return;
    float x = (float)in[i], u = (float)GELU_A * (x + (float)GELU_B * x * x * x);
    float s = 1 / (1 + expf(-2 * u)), du = (float)GELU_A * (1 + 3 * (float)GELU_B * x * x);
    din[i] = (floatX)((float)dout[i] * (s + x * s * (1 - s) * 2 * du));
}

static void gelu_forward(floatX *out, const floatX *in, size_t N, cudaStream_t stream) {
    gelu_forward_kernel<<<CEIL_DIV(N, 256), 256, 0, stream>>>(out, in, N);
    cudaCheck(cudaGetLastError());
}

static void gelu_backward(floatX *din, const floatX *dout, const floatX *in, size_t N, cudaStream_t stream) {
    gelu_backward_kernel<<<CEIL_DIV(N, 256), 256, 0, stream>>>(din, dout, in, N);
    cudaCheck(cudaGetLastError());
}

/* ---------------------------------------------------------------------------------------------- matmul */

__global__ static void add_bias_kernel(floatX *out, const floatX *bias, size_t N, size_t OC) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < N * OC) out[i] = (floatX)((float)out[i] + (float)bias[i % OC]);
}

/* Long sequences go through a matrix product in equal pieces of at most PIECE tokens: one choice of algorithms serves all lengths, no
   index within a product comes near 2^31, and sums over tokens do not depend on what is kept in memory. The MLP's hidden layer
   takes the same pieces, so that it need not exist as a whole; logits, the widest of all, take smaller ones when there are several. */
enum { PIECE = 65536, LOGITS_PIECE = 16384 };
static size_t piece_most = PIECE, logits_piece_most = LOGITS_PIECE; /* variables for the tests, which have few tokens */
static size_t piece_size(size_t N, size_t most) { return N <= most ? N : CEIL_DIV(CEIL_DIV(N, CEIL_DIV(N, most)), 16) * 16; }
/* for a model with room for N tokens; all of them where that is one piece, so that no logits are made twice */
static size_t logits_piece(size_t N) { return N <= piece_most ? N : logits_piece_most; }

/* out (N, OC) = in (N, C) weight^T + bias + add; weight (OC, C); bias, add NULL: none. With pre (N, OC) the sum goes there, and
   out = gelu(sum). */
static void matmul_forward(Matmul *mm, floatX *out, const floatX *in, const floatX *weight, const floatX *bias, const floatX *add, floatX *pre, size_t N, size_t C, size_t OC,
                           cudaStream_t stream) {
    size_t piece = piece_size(N, piece_most);
    if (piece < N) {
        for (size_t i = 0; i < N; i += piece)
            matmul_forward(mm, out + i * OC, in + i * C, weight, bias, add ? add + i * OC : NULL, pre ? pre + i * OC : NULL, i + piece < N ? piece : N - i, C, OC, stream);
        return;
    }
    MatmulShape s = {(int)OC, (int)N, (int)C, true, false, false, add != NULL, pre ? CUBLASLT_EPILOGUE_GELU_AUX_BIAS : bias ? CUBLASLT_EPILOGUE_BIAS : CUBLASLT_EPILOGUE_DEFAULT};
    if (matmul_run(mm, s, out, weight, in, add, bias, pre, 1, stream)) return;
    s.epilogue = CUBLASLT_EPILOGUE_DEFAULT;
    floatX *sum = pre ? pre : out;
    matmul_run(mm, s, sum, weight, in, add, NULL, NULL, 1, stream);
    add_bias_kernel<<<CEIL_DIV(N * OC, 256), 256, 0, stream>>>(sum, bias, N, OC);
    cudaCheck(cudaGetLastError());
    if (pre) gelu_forward(out, pre, N * OC, stream);
}

/* din (N, C), or where in = gelu(pre) the gradient of pre; adds to dweight and dbias (NULL: somebody else does). All times scale.
   partials: scratch of add_column_sums. cuBLASLt's own epilogue for dbias makes the products of a layer 0.4 ms slower on an H100,
   which is more than to read dout again takes. */
static void matmul_backward(Matmul *mm, floatX *din, float *dweight, float *dbias, float *partials, const floatX *dout, const floatX *in, const floatX *weight, const floatX *pre, float scale,
                            size_t N, size_t C, size_t OC, cudaStream_t stream) {
    size_t piece = piece_size(N, piece_most);
    if (piece < N) {
        for (size_t i = 0; i < N; i += piece)
            matmul_backward(mm, din + i * C, dweight, dbias, partials, dout + i * OC, in + i * C, weight, pre ? pre + i * C : NULL, scale, i + piece < N ? piece : N - i, C, OC, stream);
        return;
    }
    MatmulShape s = {(int)C, (int)OC, (int)N, false, true, true, true, CUBLASLT_EPILOGUE_DEFAULT};
    matmul_run(mm, s, dweight, in, dout, dweight, NULL, NULL, scale, stream);
    if (dbias) add_column_sums(dbias, partials, dout, N, OC, stream);
    s = {(int)C, (int)N, (int)OC, false, false, false, false, pre ? CUBLASLT_EPILOGUE_DGELU : CUBLASLT_EPILOGUE_DEFAULT};
    if (matmul_run(mm, s, din, weight, dout, NULL, NULL, pre, scale, stream)) return;
    s.epilogue = CUBLASLT_EPILOGUE_DEFAULT;
    matmul_run(mm, s, din, weight, dout, NULL, NULL, NULL, scale, stream);
    gelu_backward(din, din, pre, N * C, stream);
}

/* ---------------------------------------------------------------------------------------------- feature maps

   A head turns its queries and keys into features, and logits are f_q . f_k (times a scale per head). A standard head's
   features are q and k themselves, read where they lie in qkv, or q and k normalised and rotated (rope); a GSA head's are its
   splats' responses times their envelope (splat). features (B, T, 2C): f_q of all heads, then f_k. */

/* The heads of a layer that a launch is for. */
typedef struct {
    int count;
    unsigned char head[MAX_HEADS];
} HeadList;

#define SPHERE_EPSILON 1e-6

/* The angle of position t in a wave whose phase grows by step / 2^32 of a turn a position; wraps exactly, as in train_gsa.c. */
__device__ static inline float wave_angle(uint32_t step, size_t t) { return (float)(int32_t)(step * (uint32_t)t) * (float)(3.141592653589793 / 2147483648.0); }

__host__ __device__ static inline uint32_t wave_step(double theta) { return (uint32_t)llrint(theta / 6.283185307179586 * 4294967296.0); }

/* HS / 16 lanes share a row; each has 8 numbers of its first half and their partners in the second. */
template <int HS>
__global__ static void rope_forward_kernel(floatX *features, const floatX *qkv, const uint32_t *steps, const __grid_constant__ HeadList heads, size_t N, size_t T, size_t C) {
    constexpr int LANES = HS / 16;
    size_t thread = (size_t)blockIdx.x * blockDim.x + threadIdx.x, row = thread / LANES;
    int k = (int)(thread % LANES) * 8;
    size_t n = row / (2 * heads.count), side = row / heads.count % 2, at = side * C + heads.head[row % heads.count] * HS + k;
    bool here = n < N;
    Pack a = {}, b = {};
    if (here) a = load_pack(qkv + n * 3 * C + at), b = load_pack(qkv + n * 3 * C + at + HS / 2);
    float square = 0, first[8], second[8];
    for (int i = 0; i < 8; i++) square += number(a, i) * number(a, i) + number(b, i) * number(b, i);
    for (int lane = LANES / 2; lane > 0; lane /= 2) square += __shfl_xor_sync(~0u, square, lane);
    float factor = rsqrtf(square + (float)SPHERE_EPSILON) * sqrtf(HS);
    for (int i = 0; i < 8; i++) {
        float c, s, x = number(a, i) * factor, y = number(b, i) * factor;
        fast_sincos(wave_angle(steps[k + i], n % T), &s, &c);
        first[i] = x * c - y * s, second[i] = x * s + y * c;
    }
    if (!here) return;
    store_pack(features + n * 2 * C + at, first);
    store_pack(features + n * 2 * C + at + HS / 2, second);
}

template <int HS>
__global__ static void rope_backward_kernel(floatX *dqkv, const floatX *dfeatures, const floatX *qkv, const uint32_t *steps, const __grid_constant__ HeadList heads, size_t N, size_t T, size_t C) {
    constexpr int LANES = HS / 16;
    size_t thread = (size_t)blockIdx.x * blockDim.x + threadIdx.x, row = thread / LANES;
    int k = (int)(thread % LANES) * 8;
    size_t n = row / (2 * heads.count), side = row / heads.count % 2, at = side * C + heads.head[row % heads.count] * HS + k;
    bool here = n < N;
    Pack a = {}, b = {}, da = {}, db = {};
    if (here) {
        a = load_pack(qkv + n * 3 * C + at), b = load_pack(qkv + n * 3 * C + at + HS / 2);
        da = load_pack(dfeatures + n * 2 * C + at), db = load_pack(dfeatures + n * 2 * C + at + HS / 2);
    }
    float square = 0, dot = 0, first[8], second[8];
    for (int i = 0; i < 8; i++) {
        float c, s, x = number(da, i), y = number(db, i);
        fast_sincos(wave_angle(steps[k + i], n % T), &s, &c);
        first[i] = sqrtf(HS) * (x * c + y * s), second[i] = sqrtf(HS) * (y * c - x * s); /* the rotation back */
        square += number(a, i) * number(a, i) + number(b, i) * number(b, i);
        dot += number(a, i) * first[i] + number(b, i) * second[i];
    }
    for (int lane = LANES / 2; lane > 0; lane /= 2) square += __shfl_xor_sync(~0u, square, lane), dot += __shfl_xor_sync(~0u, dot, lane);
    float inverse = rsqrtf(square + (float)SPHERE_EPSILON), along = dot * inverse * inverse;
    for (int i = 0; i < 8; i++) first[i] = inverse * (first[i] - number(a, i) * along), second[i] = inverse * (second[i] - number(b, i) * along);
    if (!here) return;
    store_pack(dqkv + n * 3 * C + at, first);
    store_pack(dqkv + n * 3 * C + at + HS / 2, second);
}

/* Calls a kernel with HS as a constant. */
#define BY_HEAD_SIZE(HS, launch)                                    \
    do {                                                            \
        if ((HS) == 32) { constexpr int H = 32; launch; }           \
        else if ((HS) == 64) { constexpr int H = 64; launch; }      \
        else { constexpr int H = 128; launch; }                     \
        cudaCheck(cudaGetLastError());                              \
    } while (0)

/* f = rotation by position of x^ sqrt(HS), pairs (k, k + HS/2), of q and k of the listed heads; steps (HS/2): wave_step of each pair */
static void rope_forward(floatX *features, const floatX *qkv, const uint32_t *steps, HeadList heads, size_t B, size_t T, size_t NH, size_t HS, cudaStream_t stream) {
    size_t threads = B * T * 2 * heads.count * HS / 16;
    BY_HEAD_SIZE(HS, (rope_forward_kernel<H><<<CEIL_DIV(threads, 256), 256, 0, stream>>>(features, qkv, steps, heads, B * T, T, NH * HS)));
}

static void rope_backward(floatX *dqkv, const floatX *dfeatures, const floatX *qkv, const uint32_t *steps, HeadList heads, size_t B, size_t T, size_t NH, size_t HS, cudaStream_t stream) {
    size_t threads = B * T * 2 * heads.count * HS / 16;
    BY_HEAD_SIZE(HS, (rope_backward_kernel<H><<<CEIL_DIV(threads, 256), 256, 0, stream>>>(dqkv, dfeatures, qkv, steps, heads, B * T, T, NH * HS)));
}

/* ---------------------------------------------------------------------------------------------- tensor cores

   What one warp multiplies, for splat maps and scans (softmax has its own, see there). */

/* The splat map's products run on the tensor cores in TF32: operands of 11 bits, which hold bf16 queries and keys exactly, and
   fp32 sums. Fragments of one 16 x 8 x 8 product, with g = lane / 4 and t = lane % 4: a = A(g, t), A(g+8, t), A(g, t+4), A(g+8, t+4);
   b = B(t, g), B(t+4, g); c = C(g, 2t), C(g, 2t+1), C(g+8, 2t), C(g+8, 2t+1). In the fp32 build the same fragments meet by
   shuffles and nothing is rounded. */
__device__ static inline void mma_16x8x8(float c[4], const float a[4], float b0, float b1) {
#ifdef GSA_FP32
    int lane = threadIdx.x % 32, t = lane % 4;
    for (int k = 0; k < 8; k++) {
        int from = (lane & 28) | (k & 3);
        float low = __shfl_sync(~0u, a[k < 4 ? 0 : 2], from), high = __shfl_sync(~0u, a[k < 4 ? 1 : 3], from);
        float left = __shfl_sync(~0u, k < 4 ? b0 : b1, 8 * t + (k & 3)), right = __shfl_sync(~0u, k < 4 ? b0 : b1, 8 * t + 4 + (k & 3));
        c[0] += low * left, c[1] += low * right, c[2] += high * left, c[3] += high * right;
    }
#else
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[2])), "r"(__float_as_uint(a[3])), "r"(__float_as_uint(b0)), "r"(__float_as_uint(b1)));
#endif
}
__device__ static inline float round_tf32(float x) { /* the product itself would cut the low bits off */
#ifdef GSA_FP32
    return x;
#else
    uint32_t rounded;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(x));
    return __uint_as_float(rounded);
#endif
}

/* In bf16, m16n8k16 tiles: with g = lane / 4, t = lane % 4 a thread has of A (16, 16) the pairs (g, 2t), (g + 8, 2t), (g, 2t + 8), (g + 8, 2t + 8), of B (16, 8)
   the pairs (2t, g), (2t + 8, g) down a column, of C (16, 8) the pairs (g, 2t), (g + 8, 2t). In the fp32 build the same tiles meet by shuffles. */
#ifdef GSA_FP32
struct FragmentA {
    float x[8];
};
struct FragmentB {
    float x[4];
};
__device__ __noinline__ static float4 product_16x8x16(float4 c, FragmentA a, FragmentB b) { /* inlined everywhere it takes minutes to compile */
    int lane = threadIdx.x % 32, t = lane % 4;
#pragma unroll
    for (int k = 0; k < 16; k++) {
        int from = (lane & 28) | (k % 8 / 2), at = k / 8 * 4 + k % 2, column = k % 8 / 2;
        float low = __shfl_sync(~0u, a.x[at], from), high = __shfl_sync(~0u, a.x[at + 2], from);
        float left = __shfl_sync(~0u, b.x[k / 8 * 2 + k % 2], 8 * t + column), right = __shfl_sync(~0u, b.x[k / 8 * 2 + k % 2], 8 * t + 4 + column);
        c.x += low * left, c.y += low * right, c.z += high * left, c.w += high * right;
    }
    return c;
}
__device__ static inline void mma_16x8x16(float c[4], const FragmentA &a, const FragmentB &b) {
    float4 sum = product_16x8x16(make_float4(c[0], c[1], c[2], c[3]), a, b);
    c[0] = sum.x, c[1] = sum.y, c[2] = sum.z, c[3] = sum.w;
}
/* A(i, k) = tile[row + i][column + k], or where TRANSPOSED tile[row + k][column + i] */
template <bool TRANSPOSED> __device__ static inline FragmentA load_a(const float *tile, int stride, int row, int column) {
    int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    FragmentA a;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        int y = g + i / 2 % 2 * 8, x = 2 * t + i % 2 + i / 4 * 8;
        a.x[i] = TRANSPOSED ? tile[(row + x) * stride + column + y] : tile[(row + y) * stride + column + x];
    }
    return a;
}
/* Two tiles side by side: B(k, j) = tile[row + j][column + k], or where TRANSPOSED tile[row + k][column + j], j < 16 */
template <bool TRANSPOSED> __device__ static inline void load_b(FragmentB b[2], const float *tile, int stride, int row, int column) {
    int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        int y = g + i / 4 * 8, x = 2 * t + i % 2 + i / 2 % 2 * 8;
        b[i / 4].x[i % 4] = TRANSPOSED ? tile[(row + x) * stride + column + y] : tile[(row + y) * stride + column + x];
    }
}
/* two neighbouring tiles of an accumulator as the A of a next product; they are rounded in place */
__device__ static inline FragmentA as_fragment(float first[4], float second[4]) { return {{first[0], first[1], first[2], first[3], second[0], second[1], second[2], second[3]}}; }
/* an A whose rows are all alike */
__device__ static inline FragmentA fill_fragment(float x0, float x1, float x8, float x9) { return {{x0, x1, x0, x1, x8, x9, x8, x9}}; }
__device__ static inline float fragment_number(const FragmentA &a, int i) { return a.x[i]; }
__device__ static inline void store_two(float *to, float first, float second) { *(float2 *)to = make_float2(first, second); }
__device__ static inline float2 load_two(const float *from) { return *(const float2 *)from; }
__device__ static inline void copy_pack(float *to, const float *from, bool inside) {
    float4 zero = make_float4(0, 0, 0, 0);
    ((float4 *)to)[0] = inside ? ((const float4 *)from)[0] : zero, ((float4 *)to)[1] = inside ? ((const float4 *)from)[1] : zero;
}
__device__ static inline void copies_commit() {}
__device__ static inline void copies_wait() {}
#else
__device__ inline uint32_t shared_address(const void *p) { return (uint32_t)__cvta_generic_to_shared(p); }
/* copies 16 bytes to shared memory in the background; zeros if not inside */
__device__ inline void copy_async(uint32_t to, const void *from, bool inside) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(inside ? 16 : 0) : "memory");
}
__device__ inline void copy_commit() { asm volatile("cp.async.commit_group;"); }
__device__ inline void copy_wait() { asm volatile("cp.async.wait_group 0;" ::: "memory"); }
/* four 8x8 matrices from shared memory; lane l gives the address of row l % 8 of matrix l / 8 */
template <bool TRANSPOSED> __device__ inline void load_matrices(uint32_t (&x)[4], uint32_t address) {
    if (TRANSPOSED) asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];" : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(address) : "memory");
    else asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];" : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(address) : "memory");
}

struct FragmentA {
    uint32_t x[4];
};
struct FragmentB {
    uint32_t x[2];
};
__device__ static inline void mma_16x8x16(float c[4], const FragmentA &a, const FragmentB &b) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a.x[0]), "r"(a.x[1]), "r"(a.x[2]), "r"(a.x[3]), "r"(b.x[0]), "r"(b.x[1]));
}
template <bool TRANSPOSED> __device__ static inline FragmentA load_a(const floatX *tile, int stride, int row, int column) {
    int lane = threadIdx.x % 32;
    FragmentA a;
    if (TRANSPOSED) load_matrices<true>(a.x, shared_address(tile + (row + lane % 8 + lane / 16 * 8) * stride + column + lane / 8 % 2 * 8));
    else load_matrices<false>(a.x, shared_address(tile + (row + lane % 16) * stride + column + lane / 16 * 8));
    return a;
}
template <bool TRANSPOSED> __device__ static inline void load_b(FragmentB b[2], const floatX *tile, int stride, int row, int column) {
    int lane = threadIdx.x % 32;
    uint32_t x[4];
    if (TRANSPOSED) load_matrices<true>(x, shared_address(tile + (row + lane % 16) * stride + column + lane / 16 * 8));
    else load_matrices<false>(x, shared_address(tile + (row + lane % 8 + lane / 16 * 8) * stride + column + lane / 8 % 2 * 8));
    b[0] = {{x[0], x[1]}}, b[1] = {{x[2], x[3]}};
}
__device__ static inline FragmentA as_fragment(float first[4], float second[4]) {
    FragmentA a = {{make_pair(first[0], first[1]), make_pair(first[2], first[3]), make_pair(second[0], second[1]), make_pair(second[2], second[3])}};
#pragma unroll
    for (int i = 0; i < 4; i++) { /* a bf16 is the upper half of an fp32 */
        float *of = i < 2 ? first : second;
        of[i % 2 * 2] = __uint_as_float(a.x[i] << 16), of[i % 2 * 2 + 1] = __uint_as_float(a.x[i] & 0xffff0000u);
    }
    return a;
}
__device__ static inline FragmentA fill_fragment(float x0, float x1, float x8, float x9) {
    uint32_t low = make_pair(x0, x1), high = make_pair(x8, x9);
    return {{low, low, high, high}};
}
__device__ static inline float fragment_number(const FragmentA &a, int i) { return __uint_as_float(i % 2 ? a.x[i / 2] & 0xffff0000u : a.x[i / 2] << 16); }
__device__ static inline void store_two(floatX *to, float first, float second) { *(uint32_t *)to = make_pair(first, second); }
__device__ static inline float2 load_two(const floatX *from) {
    uint32_t pair = *(const uint32_t *)from;
    return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
}
__device__ static inline void copy_pack(floatX *to, const floatX *from, bool inside) { copy_async(shared_address(to), from, inside); }
__device__ static inline void copies_commit() { copy_commit(); }
__device__ static inline void copies_wait() { copy_wait(); }
#endif

/* ---- splats

   What the kernels need of the splats of all G heads, renewed at each forward pass: S padded to SP, a multiple of 32.
   slope = Lambda mu (G, SP, HS), precision (G, SP, P), centre = mu . Lambda mu (G, SP), lnalpha (G, SP), steps (G, SP) of the waves, decay = delta (G, SP),
   typical (G, SP) and key_scale (G) as in train_gsa.c. The centre of a dead splat and of padding is infinite: its responses, exp(-infinity), are 0.
   Of full precision slope and precision are not used: its kernels read mu and lnp, which are the parameters themselves. */
typedef struct {
    float *slope, *precision, *centre, *lnalpha, *decay, *typical, *key_scale;
    const float *mu, *lnp;
    uint32_t *steps; /* NULL: no cosine */
    size_t SP;
    bool raw; /* x^ = x in place of equation (1) */
} SplatTables;
enum { SPLATS_MOST = 64 };
static size_t splats_padded(size_t S) { return S <= 32 ? 32 : 64; }

/* One warp a splat. */
__global__ static void splat_tables_kernel(SplatTables w, const float *lnalpha, const float *lntheta, const float *lndelta, const float *alive, int S, int P, int HS) {
    int SP = (int)w.SP, s = blockIdx.x % SP;
    size_t to = blockIdx.x, from = (size_t)(blockIdx.x / SP) * S + s;
    bool real = s < S && alive[from] > 0;
    float centre = 0, trace = 0;
    for (int k = threadIdx.x; k < HS && P <= HS; k += 32) {
        float p = real ? expf(w.lnp[from * P + (P > 1 ? k : 0)]) : 0, m = real ? w.mu[from * HS + k] : 0;
        w.slope[to * HS + k] = p * m;
        if (P > 1 || k == 0) w.precision[to * P + k] = p;
        centre += m * p * m, trace += p;
    }
    for (int k = threadIdx.x; k < HS && P > HS && real; k += 32) { /* column k of L */
        float along = 0;
        for (int i = k; i < HS; i++) {
            float entry = w.lnp[from * P + i * (i + 1) / 2 + k];
            if (i == k) entry = expf(entry);
            trace += entry * entry, along += entry * w.mu[from * HS + i];
        }
        centre += along * along;
    }
    centre = warp_sum(centre), trace = warp_sum(trace);
    if (threadIdx.x > 0) return;
    w.centre[to] = real ? centre : INFINITY;
    w.typical[to] = real ? -0.5f * (trace / (float)HS + centre) : -INFINITY;
    w.lnalpha[to] = real ? lnalpha[from] : 0;
    w.decay[to] = real && lndelta ? (float)exp((double)lndelta[from]) : 0;
    if (w.steps) w.steps[to] = real ? wave_step(exp((double)lntheta[from])) : 0;
}

/* One warp a head. */
__global__ static void splat_key_scales_kernel(SplatTables w) {
    float most = -INFINITY;
    for (size_t s = threadIdx.x; s < w.SP; s += 32) most = fmaxf(most, w.typical[blockIdx.x * w.SP + s]);
    most = warp_max(most);
    if (threadIdx.x == 0) w.key_scale[blockIdx.x] = most;
}

/* Both kernels below: a block has 4 warps and works on tiles of 64 tokens of one head, 16 a warp, queries then keys. Lane 4g + t has tokens splat_row(g) and
   splat_row(g) + 8 of its warp's, of their channels the eight from 8t of each 32, of their splats the E from E t of each 4E: loads and stores of 16 bytes, which do not
   meet in a bank. The order of a product's rows, terms and columns is free, so the fragments are dealt to fit: column g of tile i is number E (g / 2) + 2i + g % 2, and
   terms t and t + 4 of step i are numbers E t + 2i and E t + 2i + 1. */
__device__ static inline int splat_row(int g) { return g / 2 + g % 2 * 4; }

/* 8 numbers of a row of `count`, from i on; zeros beyond. aligned: count is a multiple of 8. */
__device__ static inline Pack load_some(const floatX *row, int i, int count, bool aligned) {
    if (aligned) return i < count ? load_pack(row + i) : Pack{};
    float v[8];
    for (int e = 0; e < 8; e++) v[e] = i + e < count ? (float)row[i + e] : 0;
    return make_pack(v);
}
__device__ static inline void store_some(floatX *row, int i, int count, bool aligned, const float v[8]) {
    if (aligned && i < count) store_pack(row + i, v);
    for (int e = 0; !aligned && e < 8; e++)
        if (i + e < count) row[i + e] = (floatX)v[e];
}
__device__ static inline float quad_sum(float x) {
    x += __shfl_xor_sync(~0u, x, 1);
    return x + __shfl_xor_sync(~0u, x, 2);
}
__device__ static inline float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
    return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

/* Where splat_forward puts its result: in features, or for the scan the responses r = softmax_s(ln alpha + ln phi(q^)) and phi(k^) exp(-c) themselves:
   (2, B, heads, T, SP), as splat_backward takes their gradients. */
typedef struct {
    floatX *responses; /* NULL: features */
    size_t SP;         /* 16 for up to 16 splats, else 32 */
    size_t late;       /* the last `late` keys of a sequence are never met */
    bool add;          /* dq, dk are added to: the softmax nearby has written them */
} ScanResponsesAt;
__device__ static inline size_t response_row(size_t side, size_t n, size_t head, size_t heads, size_t N, size_t T) { /* token n of a listed head */
    return ((size_t)side * N + (uint32_t)n / (uint32_t)T * T) * heads + head * T + (uint32_t)n % (uint32_t)T;
}

/* Where a row's token stands, kept up from tile to tile: divisions take longer than the products. */
struct SplatToken {
    uint32_t n, start; /* token of all, first token of its sequence */
    __device__ inline SplatToken(uint32_t n, uint32_t T) : n(n), start(n / T * T) {}
    __device__ inline void step(uint32_t tokens, uint32_t T) {
        for (n += tokens; n - start >= T;) start += T;
    }
    __device__ inline uint32_t position() const { return n - start; }
    __device__ inline size_t response(size_t side, size_t head, size_t heads, size_t N, size_t T) const { /* its row of responses of a listed head */
        return (side * N + start) * heads + head * T + position();
    }
};

template <int E> __device__ static inline void load_numbers(float *v, const floatX *from) { /* E: 4 or 8 */
    Pack p = {};
    if (E == 8) p = load_pack(from);
#ifdef GSA_FP32
    else p.half[0] = *(const float4 *)from;
#else
    else p.pairs.x = ((const uint2 *)from)->x, p.pairs.y = ((const uint2 *)from)->y;
#endif
#pragma unroll
    for (int e = 0; e < E; e++) v[e] = number(p, e);
}
template <int E> __device__ static inline void store_numbers(floatX *to, const float *v) {
    if (E == 8) return store_pack(to, v);
#ifdef GSA_FP32
    __stwb((float4 *)to, make_float4(v[0], v[1], v[2], v[3]));
#else
    __stwb((uint2 *)to, make_uint2(make_pair(v[0], v[1]), make_pair(v[2], v[3])));
#endif
}

/* at least so many blocks a multiprocessor, which limits registers */
template <int HS, int SP, bool DIAGONAL> constexpr int splat_forward_blocks = HS > 64 || DIAGONAL ? 1 : SP == 16 ? 6 : 4;
template <int HS, int SP, bool DIAGONAL> constexpr int splat_backward_blocks = HS > 64 || SP > 32 || DIAGONAL ? 1 : SP == 16 ? 5 : 4;

template <int HS, int SP, bool DIAGONAL, bool SCAN>
__global__ static void __launch_bounds__(128, splat_forward_blocks<HS, SP, DIAGONAL>) splat_forward_kernel(floatX *__restrict__ features, const floatX *__restrict__ qkv, SplatTables w, ScanResponsesAt scan, const __grid_constant__ HeadList heads,
                                                                   size_t first_head, size_t N, size_t T, size_t C, int S, size_t tiles) {
    constexpr int P = DIAGONAL ? HS : 1, STEPS = HS / 8, E = SP < 32 ? 4 : 8, GROUP = 4 * E, GROUPS = SP / GROUP;
    extern __shared__ __align__(1024) char memory[];
    /* (GROUPS, STEPS, E / 4, 32 lanes): a lane's terms t and t + 4 of its column of two tiles, beside the other lanes' */
    float4 *slope = (float4 *)memory, *spreads = slope + SP * HS / 4;
    float *precision = (float *)(slope + SP * HS / 4 * (DIAGONAL ? 2 : 1)), *constant = precision + SP; /* (SP) where not diagonal, (2, SP): of queries, of keys */
    uint32_t *steps = (uint32_t *)(constant + 2 * SP);
    size_t h = heads.head[blockIdx.x], head = (first_head + blockIdx.x) * w.SP;
    int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    bool aligned = S % 8 == 0, envelope = w.steps != NULL && !SCAN;
    float key_scale = SCAN ? w.key_scale[first_head + blockIdx.x] : 0;
    for (int at = threadIdx.x; at < SP * HS / 4; at += 128) { /* at % 32 is the lane */
        int i = at / 32 % (E / 4) * 2, step = at / 32 / (E / 4) % STEPS, s = at / 32 / (E / 4) / STEPS * GROUP + E * (g / 2) + 2 * i + g % 2, k = step / 4 * 32 + 8 * t + step % 4 * 2;
        const float *m = w.slope + (head + s) * HS + k, *p = w.precision + (head + s) * HS + k;
        slope[at] = make_float4(round_tf32(m[0]), round_tf32(m[1]), round_tf32(m[2 * HS]), round_tf32(m[2 * HS + 1]));
        if (DIAGONAL) spreads[at] = make_float4(round_tf32(p[0]), round_tf32(p[1]), round_tf32(p[2 * HS]), round_tf32(p[2 * HS + 1]));
    }
    for (int i = threadIdx.x; i < SP; i += 128) {
        precision[i] = DIAGONAL ? 0 : w.precision[head * P + i];
        constant[i] = w.lnalpha[head + i] - 0.5f * w.centre[head + i], constant[SP + i] = -0.5f * w.centre[head + i] - key_scale;
        steps[i] = envelope ? w.steps[head + i] : 0;
    }
    __syncthreads();

    size_t first = blockIdx.y * tiles * 64 + threadIdx.x / 32 * 16;
    if (first >= N) return;
    int passes = (int)(CEIL_DIV(N - first, (size_t)64) < tiles ? CEIL_DIV(N - first, (size_t)64) : tiles) * GROUPS * 2;
    SplatToken token[2] = {SplatToken((uint32_t)first + splat_row(g), (uint32_t)T), SplatToken((uint32_t)first + splat_row(g) + 8, (uint32_t)T)};
    const floatX *from = qkv + token[0].n * 3 * C + h * HS + 8 * t;
    Pack next[2][HS / 32] = {};
    auto fetch = [&](int ahead, size_t side) { /* of the tile so many tokens ahead */
#pragma unroll
        for (int r = 0; r < 2; r++)
#pragma unroll
            for (int j = 0; j < HS / 32; j++)
                if (token[r].n + ahead < N) next[r][j] = load_pack(from + (ahead + 8 * r) * 3 * C + side * C + 32 * j);
    };
    fetch(0, 0);
    float wave_c[2][8], wave_s[2][8];
    for (int pass = 0; pass < passes; pass++) { /* tiles, in these groups of splats, in these queries and keys */
        int side = pass % 2, c = pass / 2 % GROUPS * GROUP;
        bool done = pass % (2 * GROUPS) == 2 * GROUPS - 1;
        if (side == 0 && !SCAN)
#pragma unroll
            for (int r = 0; r < 2; r++)
#pragma unroll
                for (int e = 0; e < E; e++) {
                    wave_c[r][e] = 1, wave_s[r][e] = 0;
                    if (envelope) fast_sincos(wave_angle(steps[c + E * t + e], token[r].position()), &wave_s[r][e], &wave_c[r][e]);
                }
        float square[2] = {0, 0}, product[E / 2][4] = {}, spread[E / 2][4] = {};
        Pack x[2][HS / 32];
#pragma unroll
        for (int r = 0; r < 2; r++)
#pragma unroll
            for (int j = 0; j < HS / 32; j++) x[r][j] = next[r][j];
        if (pass + 1 < passes) fetch(done ? 64 : 0, 1 - side);
#pragma unroll
        for (int r = 0; r < 2; r++) {
#pragma unroll
            for (int j = 0; j < HS / 32; j++)
#pragma unroll
                for (int e = 0; e < 8; e++) square[r] += number(x[r][j], e) * number(x[r][j], e);
            square[r] = quad_sum(square[r]);
        }
#pragma unroll
        for (int step = 0; step < STEPS; step++) {
            int j = step / 4, k = step % 4 * 2;
            float a[4] = {number(x[0][j], k), number(x[1][j], k), number(x[0][j], k + 1), number(x[1][j], k + 1)}, b[4];
#pragma unroll
            for (int i = 0; i < 4; i++) b[i] = DIAGONAL ? round_tf32(a[i] * a[i]) : 0;
#pragma unroll
            for (int i = 0; i < E / 2; i += 2) {
                int at = ((c / GROUP * STEPS + step) * (E / 4) + i / 2) * 32 + lane;
                float4 m = slope[at];
                mma_16x8x8(product[i], a, m.x, m.y), mma_16x8x8(product[i + 1], a, m.z, m.w);
                if (!DIAGONAL) continue;
                m = spreads[at];
                mma_16x8x8(spread[i], b, m.x, m.y), mma_16x8x8(spread[i + 1], b, m.z, m.w);
            }
        }
#pragma unroll
        for (int r = 0; r < 2; r++) {
            size_t n = token[r].n;
            float inverse = w.raw ? 1 : rsqrtf(square[r] + (float)SPHERE_EPSILON), unit = square[r] * inverse * inverse, f_c[8] = {}, f_s[8] = {};
#pragma unroll
            for (int e = 0; e < E; e++) {
                float wide = DIAGONAL ? spread[e / 2][2 * r + e % 2] * inverse * inverse : precision[c + E * t + e] * unit;
                f_c[e] = product[e / 2][2 * r + e % 2] * inverse - 0.5f * wide + constant[side * SP + c + E * t + e];
            }
            if (SCAN) { /* all splats are in these four lanes */
                float most = side ? 0 : -INFINITY, sum = 0;
#pragma unroll
                for (int e = 0; e < E; e++) most = side ? 0 : fmaxf(most, f_c[e]);
                if (!side) most = quad_max(most);
#pragma unroll
                for (int e = 0; e < E; e++) sum += f_c[e] = fast_exp(f_c[e] - most);
                sum = side ? 1 : 1 / quad_sum(sum);
#pragma unroll
                for (int e = 0; e < E; e++) f_c[e] *= sum;
                if (n < N) store_numbers<E>(scan.responses + token[r].response(side, blockIdx.x, heads.count, N, T) * SP + E * t, f_c);
            } else if (n < N) {
#pragma unroll
                for (int e = 0; e < E; e++) {
                    float f = fast_exp(f_c[e]);
                    f_c[e] = f * wave_c[r][e], f_s[e] = f * wave_s[r][e];
                }
                floatX *row = features + n * 2 * C + side * C + h * HS;
                store_some(row, c + 8 * t, S, aligned, f_c);
                if (envelope) store_some(row + S, c + 8 * t, S, aligned, f_s);
                if (c == 0)
                    for (int k = (envelope ? 2 * S : S) + t; k < HS; k += 4) row[k] = (floatX)0.0f;
            }
        }
        if (done) token[0].step(64, (uint32_t)T), token[1].step(64, (uint32_t)T), from += 64 * 3 * C;
    }
}

/* Numbers in a head's record of moments, the layout of train_gsa.c: M0 (S), M1 (S, HS), M2 (S) or (S, HS), amplitude (S), frequency (S) */
__host__ __device__ static inline size_t moments_size(size_t S, size_t P, size_t HS) { return S * (HS + P + 3); }

/* A block's memory: slope and precision as the products of one warp want them (iso: the precisions alone), then stages of tiles of 64 tokens: x, and where diagonal
   x^2 / |x|; G / |x|, in bf16 as rounded and the rest; what the scan left of G. Where there is room the next tile arrives while one is worked on. */
template <int HS, int SP, bool DIAGONAL, bool SCAN> struct SplatBackwardShape {
    static constexpr bool WIDE = sizeof(floatX) == 4;
    static constexpr int STAGES = WIDE || HS * SP * (DIAGONAL ? 2 : 1) > 4096 ? 1 : 2, PAD = WIDE ? 4 : 8, XROW = HS + PAD, GROW = SP + PAD, PARTS = WIDE ? 1 : 2, SUMS = 4 * SP * 4;
    static constexpr int X = 64 * XROW * (DIAGONAL ? 2 : 1), G = 64 * GROW * PARTS, RAW = SCAN ? 64 * SP : 0, STAGE = X + G + RAW;
    static constexpr size_t TABLES = (SP * HS * (DIAGONAL ? 2 : 1) + SP) * sizeof(float), TILES = STAGES * STAGE * sizeof(floatX);
    static constexpr size_t bytes = TABLES + (TILES > SUMS * sizeof(float) ? TILES : SUMS * sizeof(float));
};

/* With G = f df = dL / d ln phi (lane 4g + t: as above), each tile of 64 tokens, queries then keys:
     dL / dx^ = G slope - x^ .* (G precision), on each warp's own 16 tokens;
     M1 += G^T x^, M2 += G^T x^2 on all 64 tokens, each warp for its own part of the (SP, HS) sums, kept in registers.
   G is stored divided by |x|, so that plain x serves as x^. A block covers `tiles` tiles of one head and writes one record. From the scan G itself comes,
   and amplitude and frequency come elsewhere. */
template <int HS, int SP, bool DIAGONAL, bool SCAN>
__global__ static void __launch_bounds__(128, splat_backward_blocks<HS, SP, DIAGONAL>) splat_backward_kernel(floatX *__restrict__ dqkv, float *records, const floatX *__restrict__ dfeatures, const floatX *__restrict__ features, const floatX *__restrict__ qkv, SplatTables w,
                                                                    ScanResponsesAt scan, const __grid_constant__ HeadList heads, size_t first_head, size_t N, size_t T, size_t C, int S, size_t tiles) {
    using Shape = SplatBackwardShape<HS, SP, DIAGONAL, SCAN>;
    constexpr int XROW = Shape::XROW, GROW = Shape::GROW, P = DIAGONAL ? HS : 1, E = SP < 32 ? 4 : 8, GROUP = 4 * E, GROUPS = SP / GROUP;
    constexpr int COLUMNS = HS / 16, BLOCKS = SP / 16 * COLUMNS, OWN = CEIL_DIV(BLOCKS, 4); /* of 16 x 16 sums */
    extern __shared__ __align__(1024) char memory[];
    /* (SP / 8, HS / 16, 32 lanes): a lane's terms t and t + 4 of its column of two tiles */
    float4 *slope = (float4 *)memory, *spreads = slope + SP * HS / 4;
    float *precision = (float *)(slope + SP * HS / 4 * (DIAGONAL ? 2 : 1));
    floatX *stages = (floatX *)(precision + SP);
    size_t h = heads.head[blockIdx.x], head = (first_head + blockIdx.x) * w.SP;
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    bool aligned = S % 8 == 0, envelope = w.steps != NULL && !SCAN;
    for (int at = threadIdx.x; at < SP * HS / 4; at += 128) {
        int pair = at / 32 % (HS / 16), step = at / 32 / (HS / 16), s = step / (E / 2) * GROUP + E * t + step % (E / 2) * 2, k = pair / 2 * 32 + 8 * (g / 2) + pair % 2 * 4 + g % 2;
        const float *m = w.slope + (head + s) * HS + k, *p = w.precision + (head + s) * HS + k;
        slope[at] = make_float4(round_tf32(m[0]), round_tf32(m[HS]), round_tf32(m[2]), round_tf32(m[HS + 2]));
        if (DIAGONAL) spreads[at] = make_float4(round_tf32(p[0]), round_tf32(p[HS]), round_tf32(p[2]), round_tf32(p[HS + 2]));
    }
    for (int i = threadIdx.x; i < SP; i += 128) precision[i] = DIAGONAL ? 0 : w.precision[head + i];

    size_t first = blockIdx.y * tiles * 64;
    int passes = (int)(CEIL_DIV(N - first, (size_t)64) < tiles ? CEIL_DIV(N - first, (size_t)64) : tiles) * 2, own = warp * 16;
    SplatToken token[2] = {SplatToken((uint32_t)first + own + splat_row(g), (uint32_t)T), SplatToken((uint32_t)first + own + splat_row(g) + 8, (uint32_t)T)};
    SplatToken scanned(0, 1); /* row lane / 2 of the warp's next tile, or lane / 4 and that of 8 rows on */
    if (SCAN) scanned = SplatToken((uint32_t)first + own + lane / (SP / 8), (uint32_t)T);
    auto load = [&](int pass) { /* a warp's own 16 rows */
        floatX *X = stages + pass % Shape::STAGES * Shape::STAGE, *raw = X + Shape::X + Shape::G;
        size_t tile = first + pass / 2 * 64 + own, side = pass % 2;
#pragma unroll
        for (int i = lane; i < 16 * HS / 8; i += 32) {
            int row = i / (HS / 8), k = i % (HS / 8) * 8;
            bool inside = tile + row < N;
            copy_pack(X + (own + row) * XROW + k, inside ? qkv + (tile + row) * 3 * C + side * C + h * HS + k : qkv, inside);
        }
#pragma unroll
        for (int i = 0; i < SP / 16 && SCAN; i++) {
            int row = lane / (SP / 8) + 8 * i, s = lane % (SP / 8) * 8;
            SplatToken token = scanned;
            token.step(8 * i, (uint32_t)T);
            bool met = token.n < N && !(side && token.position() + scan.late >= T);
            copy_pack(raw + (own + row) * SP + s, met ? scan.responses + token.response(side, blockIdx.x, heads.count, N, T) * SP + s : scan.responses, met);
        }
        if (side && SCAN) scanned.step(64, (uint32_t)T);
        copies_commit();
    };

    float M0[GROUPS][E] = {}, square_sum[GROUPS][E] = {}, amplitude[GROUPS][E] = {}, frequency[GROUPS][E] = {}; /* of this lane's tokens */
    float M1[OWN][2][4] = {}, M2[OWN][2][4] = {};
    if (Shape::STAGES == 2) {
        load(0);
        __syncthreads(); /* the precisions are there */
    }
#pragma unroll 1
    for (int pass = 0; pass < passes; pass++) {
        size_t side = pass % 2;
        floatX *X = stages + pass % Shape::STAGES * Shape::STAGE, *squares = X + 64 * XROW, *G = X + Shape::X, *raw = G + Shape::G;
        if (Shape::STAGES == 1) {
            __syncthreads(); /* the tile before is done with */
            load(pass);
        }
        copies_wait();
        __syncwarp();
        float inverse[2], square[2], total[2] = {0, 0}, gradient[2][GROUPS][E];
#pragma unroll
        for (int r = 0; r < 2; r++) {
            int row = own + splat_row(g) + 8 * r;
            square[r] = 0;
#pragma unroll
            for (int j = 0; j < HS / 32; j++) {
                Pack x = *(const Pack *)(X + row * XROW + 32 * j + 8 * t);
#pragma unroll
                for (int e = 0; e < 8; e++) square[r] += number(x, e) * number(x, e);
            }
            square[r] = quad_sum(square[r]);
            inverse[r] = w.raw ? 1 : rsqrtf(square[r] + (float)SPHERE_EPSILON);
#pragma unroll
            for (int j = 0; j < HS / 32 && DIAGONAL; j++) {
                Pack x = *(const Pack *)(X + row * XROW + 32 * j + 8 * t);
                float v[8];
#pragma unroll
                for (int e = 0; e < 8; e++) v[e] = number(x, e) * number(x, e) * inverse[r];
                *(Pack *)(squares + row * XROW + 32 * j + 8 * t) = make_pack(v);
            }
        }
#pragma unroll
        for (int r = 0; r < 2; r++) {
            int row = own + splat_row(g) + 8 * r;
            size_t n = token[r].n, at = n * 2 * C + side * C + h * HS;
            float unit = w.raw ? square[r] : 1 - (float)SPHERE_EPSILON * inverse[r] * inverse[r], middle = (float)token[r].position() - 0.5f * (float)(T - 1); /* unit = |x^|^2 */
#pragma unroll
            for (int c = 0; c < GROUPS; c++) {
                int s = GROUP * c + E * t;
                float *of = gradient[r][c], scaled[E];
                if (SCAN) load_numbers<E>(of, raw + row * SP + s);
                else {
                    int some = n < N ? S : 0;
                    Pack f_c = load_some(features + at, s, some, aligned), d_c = load_some(dfeatures + at, s, some, aligned), f_s = {}, d_s = {};
                    if (envelope) f_s = load_some(features + at + S, s, some, aligned), d_s = load_some(dfeatures + at + S, s, some, aligned);
#pragma unroll
                    for (int e = 0; e < E; e++) {
                        float fc = number(f_c, e), fs = number(f_s, e), dc = number(d_c, e), ds = number(d_s, e);
                        of[e] = fc * dc + fs * ds;
                        frequency[c][e] += middle * (fc * ds - fs * dc);
                        if (side == 0) amplitude[c][e] += of[e];
                    }
                }
#pragma unroll
                for (int e = 0; e < E; e++) {
                    M0[c][e] += of[e];
                    if (!DIAGONAL) square_sum[c][e] += of[e] * unit, total[r] += of[e] * precision[s + e];
                    scaled[e] = of[e] * inverse[r];
                    of[e] = round_tf32(of[e]);
                }
#pragma unroll
                for (int e = 0; e < E; e += 2) {
                    floatX *to = G + row * GROW + s + e;
                    store_two(to, scaled[e], scaled[e + 1]);
                    if (Shape::PARTS == 2) store_two(to + 64 * GROW, scaled[e] - (float)(floatX)scaled[e], scaled[e + 1] - (float)(floatX)scaled[e + 1]);
                }
            }
            total[r] = quad_sum(total[r]);
        }
        __syncthreads(); /* all rows are there, and the other stage is done with */
        if (Shape::STAGES == 2 && pass + 1 < passes) load(pass + 1);

#pragma unroll
        for (int k = 0; k < 64; k += 16)
#pragma unroll
            for (int i = 0; i < OWN; i++) {
                int block = warp + 4 * i, s = block / COLUMNS * 16, column = block % COLUMNS * 16;
                if (BLOCKS % 4 && block >= BLOCKS) continue;
                FragmentB x[2], xx[2];
                load_b<true>(x, X, XROW, k, column);
                if (DIAGONAL) load_b<true>(xx, squares, XROW, k, column);
#pragma unroll
                for (int part = 0; part < Shape::PARTS; part++) {
                    FragmentA a = load_a<true>(G + part * 64 * GROW, GROW, k, s);
                    mma_16x8x16(M1[i][0], a, x[0]), mma_16x8x16(M1[i][1], a, x[1]);
                    if (DIAGONAL) mma_16x8x16(M2[i][0], a, xx[0]), mma_16x8x16(M2[i][1], a, xx[1]);
                }
            }

        float product[HS / 32][4][4] = {}, dot[2] = {0, 0};
#pragma unroll
        for (int j = 0; j < HS / 32; j++) {
            float spread[4][4] = {};
#pragma unroll
            for (int step = 0; step < SP / 8; step++) {
                int c = step / (E / 2), e = step % (E / 2) * 2;
                float a[4] = {gradient[0][c][e], gradient[1][c][e], gradient[0][c][e + 1], gradient[1][c][e + 1]};
#pragma unroll
                for (int i = 0; i < 4; i += 2) {
                    int at = (step * (HS / 16) + 2 * j + i / 2) * 32 + lane;
                    float4 m = slope[at];
                    mma_16x8x8(product[j][i], a, m.x, m.y), mma_16x8x8(product[j][i + 1], a, m.z, m.w);
                    if (!DIAGONAL) continue;
                    m = spreads[at];
                    mma_16x8x8(spread[i], a, m.x, m.y), mma_16x8x8(spread[i + 1], a, m.z, m.w);
                }
            }
#pragma unroll
            for (int r = 0; r < 2; r++) {
                Pack x = *(const Pack *)(X + (own + splat_row(g) + 8 * r) * XROW + 32 * j + 8 * t);
#pragma unroll
                for (int e = 0; e < 8; e++) {
                    float unit = number(x, e) * inverse[r], &of = product[j][e / 2][2 * r + e % 2];
                    of -= unit * (DIAGONAL ? spread[e / 2][2 * r + e % 2] : total[r]);
                    dot[r] += unit * of;
                }
            }
        }
#pragma unroll
        for (int r = 0; r < 2; r++) {
            size_t n = token[r].n;
            float along = w.raw ? 0 : quad_sum(dot[r]) * inverse[r] * inverse[r];
#pragma unroll
            for (int j = 0; j < HS / 32; j++) {
                Pack x = *(const Pack *)(X + (own + splat_row(g) + 8 * r) * XROW + 32 * j + 8 * t);
                float dx[8];
#pragma unroll
                for (int e = 0; e < 8; e++) dx[e] = inverse[r] * product[j][e / 2][2 * r + e % 2] - number(x, e) * along;
                floatX *to = dqkv + n * 3 * C + side * C + h * HS + 32 * j + 8 * t;
                if (n < N && scan.add) {
                    Pack old = load_pack(to);
#pragma unroll
                    for (int e = 0; e < 8; e++) dx[e] += number(old, e);
                }
                if (n < N) store_pack(to, dx);
            }
            if (side) token[r].step(64, (uint32_t)T);
        }
    }

    float *record = records + (blockIdx.x * (size_t)gridDim.y + blockIdx.y) * moments_size(S, P, HS);
    float *to_M1 = record + S, *to_M2 = to_M1 + S * HS, *to_amplitude = to_M2 + S * P, *to_frequency = to_amplitude + S;
#pragma unroll
    for (int i = 0; i < OWN; i++)
#pragma unroll
        for (int e = 0; e < 8; e++) {
            int block = warp + 4 * i, s = block / COLUMNS * 16 + g + e % 4 / 2 * 8, column = block % COLUMNS * 16 + e / 4 * 8 + 2 * t + e % 2;
            if (s >= S || (BLOCKS % 4 && block >= BLOCKS)) continue;
            to_M1[s * HS + column] = M1[i][e / 4][e % 4];
            if (DIAGONAL) to_M2[s * HS + column] = M2[i][e / 4][e % 4];
        }
    float *sums = (float *)stages; /* (4 warps, SP, 4) */
    __syncthreads();
#pragma unroll
    for (int c = 0; c < GROUPS; c++)
#pragma unroll
        for (int e = 0; e < E; e++) {
            float all[4] = {M0[c][e], amplitude[c][e], frequency[c][e], square_sum[c][e]};
#pragma unroll
            for (int i = 0; i < 4; i++) {
                for (int row = 4; row < 32; row *= 2) all[i] += __shfl_xor_sync(~0u, all[i], row);
                if (g == 0) sums[(warp * SP + GROUP * c + E * t + e) * 4 + i] = all[i];
            }
        }
    __syncthreads();
    for (int s = threadIdx.x; s < S; s += 128)
        for (int i = 0; i < 4; i++) {
            float sum = 0;
            for (int from = 0; from < 4; from++) sum += sums[(from * SP + s) * 4 + i];
            if (i == 0) record[s] = sum;
            if (i == 1) to_amplitude[s] = sum;
            if (i == 2) to_frequency[s] = sum;
            if (i == 3 && !DIAGONAL) to_M2[s] = sum;
        }
}

/* sums (heads, record) = sums of the records (heads, count, record), in double: M1 - M0 mu cancels */
__global__ static void moments_sums_kernel(double *sums, const float *records, size_t count, size_t record) {
    __shared__ double partial[16][32];
    size_t c = (size_t)blockIdx.x * 32 + threadIdx.x;
    const float *from = records + blockIdx.y * count * record;
    double mine = 0;
    if (c < record)
        for (size_t i = threadIdx.y; i < count; i += 16) mine += (double)from[i * record + c];
    partial[threadIdx.y][threadIdx.x] = mine;
    __syncthreads();
    if (threadIdx.y > 0 || c >= record) return;
    for (int y = 1; y < 16; y++) mine += partial[y][threadIdx.x];
    sums[blockIdx.y * record + c] = mine;
}

/* Where the gradients of a layer's splats go, and the parameters: all at the first of its GSA heads; NULL where there are none. */
typedef struct {
    float *dmu, *dlnp, *dlnalpha, *dlntheta, *dlndelta, *dlng;
    const float *mu, *lnp, *lntheta, *lndelta;
} SplatGradients;

/* One warp a splat: adds the gradients that follow from its moments, as splat_gradients in train_gsa.c. scan (heads, 3 scan_SP + 1): the scan's own sums
   of amplitude, frequency, decay and gain; NULL: amplitude and frequency are among the moments. */
__global__ static void splat_gradients_kernel(SplatGradients d, const double *sums, const double *scan, size_t scan_SP, int S, int P, int HS) {
    size_t s = blockIdx.x, splat = (size_t)blockIdx.y * S + s;
    const double *M0 = sums + blockIdx.y * moments_size(S, P, HS), *M1 = M0 + S, *M2 = M1 + S * HS, *amplitude = M2 + S * P, *frequency = amplitude + S, *decay = NULL;
    if (scan) amplitude = scan + blockIdx.y * (3 * scan_SP + 1), frequency = amplitude + scan_SP, decay = frequency + scan_SP;
    double along = 0;
    for (int k = threadIdx.x; k < HS; k += 32) {
        double m = (double)d.mu[splat * HS + k], m1 = M1[s * HS + k], p = P > HS ? 0 : (double)expf(d.lnp[splat * P + (P > 1 ? k : 0)]);
        d.dmu[splat * HS + k] += (float)(P > HS ? m1 : p * (m1 - M0[s] * m));
        along += m * m1 - 0.5 * m * m * M0[s];
        if (P == HS) d.dlnp[splat * HS + k] += (float)(-0.5 * p * (M2[s * HS + k] - 2 * m * m1 + m * m * M0[s]));
    }
    for (int k = threadIdx.x; k < P && P > HS; k += 32) d.dlnp[splat * P + k] += (float)M2[s * P + k];
    along = warp_sum(along);
    if (threadIdx.x > 0) return;
    if (P == 1) d.dlnp[splat] += (float)((double)expf(d.lnp[splat]) * (along - 0.5 * M2[s]));
    d.dlnalpha[splat] += (float)amplitude[s];
    if (d.dlntheta) d.dlntheta[splat] += (float)(exp((double)d.lntheta[splat]) * frequency[s]);
    if (d.dlndelta) d.dlndelta[splat] += (float)(exp((double)d.lndelta[splat]) * decay[s]);
    if (d.dlng && s == 0) d.dlng[blockIdx.y] += (float)decay[scan_SP];
}

/* ---- full precision: Lambda = L L^T, ln phi = -1/2 |L^T (x^ - mu)|^2

   Off the fast path: plain fp32 products in shared memory, tiles of FULL_TOKENS tokens. 128 threads: thread i has column i % HS and every 128 / HS-th part of the
   tokens or rows. A row of L takes HS + 1 numbers, so that rows and columns are read alike. */

enum { FULL_TOKENS = 32 };
template <int HS> constexpr size_t full_bytes = (HS * (HS + 1) + 2 * FULL_TOKENS * (HS + 1) + HS + FULL_TOKENS * (SPLATS_MOST + 2)) * sizeof(float);

template <int HS> struct FullRoom {
    float *L, *x, *y, *mu, *response, *inverse; /* (HS, HS + 1), (tokens, HS + 1) twice, (HS), (tokens, SPLATS_MOST), (tokens) */
};
template <int HS> __device__ static inline FullRoom<HS> full_room(float *shared) {
    FullRoom<HS> m;
    m.L = shared, m.x = m.L + HS * (HS + 1), m.y = m.x + FULL_TOKENS * (HS + 1), m.mu = m.y + FULL_TOKENS * (HS + 1);
    m.response = m.mu + HS, m.inverse = m.response + FULL_TOKENS * SPLATS_MOST;
    return m;
}

/* mu and L of a splat, whose index counts those that exist */
template <int HS> __device__ static inline void full_load_splat(const FullRoom<HS> &m, const SplatTables &w, size_t splat) {
    constexpr int P = HS * (HS + 1) / 2;
    for (int i = threadIdx.x; i < HS * HS; i += 128) {
        int row = i / HS, k = i % HS;
        float entry = k > row ? 0 : w.lnp[splat * P + row * (row + 1) / 2 + k];
        m.L[row * (HS + 1) + k] = row == k ? expf(entry) : entry;
    }
    for (int i = threadIdx.x; i < HS; i += 128) m.mu[i] = w.mu[splat * HS + i];
}

/* x^ of the tile's tokens, zeros from N on */
template <int HS> __device__ static inline void full_load_tokens(const FullRoom<HS> &m, const floatX *x, size_t stride, size_t first, size_t N, bool raw) {
    for (int i = threadIdx.x; i < FULL_TOKENS * HS; i += 128) m.x[i / HS * (HS + 1) + i % HS] = first + i / HS < N ? (float)x[(first + i / HS) * stride + i % HS] : 0;
    __syncthreads();
    if (threadIdx.x < FULL_TOKENS) {
        float square = 0;
        for (int k = 0; k < HS; k++) square += m.x[threadIdx.x * (HS + 1) + k] * m.x[threadIdx.x * (HS + 1) + k];
        m.inverse[threadIdx.x] = raw ? 1 : rsqrtf(square + (float)SPHERE_EPSILON);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < FULL_TOKENS * HS; i += 128) m.x[i / HS * (HS + 1) + i % HS] *= m.inverse[i / HS];
    __syncthreads();
}

/* y = L^T (x^ - mu) of the tile's tokens */
template <int HS> __device__ static inline void full_across(const FullRoom<HS> &m) {
    constexpr int PARTS = 128 / HS, ROWS = FULL_TOKENS / PARTS;
    int k = threadIdx.x % HS, part = threadIdx.x / HS;
    float sum[ROWS] = {};
    for (int i = k; i < HS; i++) {
        float entry = m.L[i * (HS + 1) + k], centre = m.mu[i];
#pragma unroll
        for (int t = 0; t < ROWS; t++) sum[t] += entry * (m.x[(part * ROWS + t) * (HS + 1) + i] - centre);
    }
#pragma unroll
    for (int t = 0; t < ROWS; t++) m.y[(part * ROWS + t) * (HS + 1) + k] = sum[t];
}

/* One block: a head, a side (queries or keys) and a tile of tokens. */
template <int HS>
__global__ static void __launch_bounds__(128) splat_full_forward_kernel(floatX *features, const floatX *qkv, SplatTables w, ScanResponsesAt scan, const __grid_constant__ HeadList heads, size_t first_head,
                                                                        size_t N, size_t T, size_t C, int S) {
    extern __shared__ float shared[];
    FullRoom<HS> m = full_room<HS>(shared);
    size_t head = first_head + blockIdx.y, first = (size_t)blockIdx.x * FULL_TOKENS, side = blockIdx.z, column = side * C + heads.head[blockIdx.y] * HS;
    full_load_tokens(m, qkv + column, 3 * C, first, N, w.raw);
    for (int s = 0; s < S; s++) {
        full_load_splat(m, w, head * S + s);
        __syncthreads();
        full_across(m);
        __syncthreads();
        if (threadIdx.x < FULL_TOKENS) {
            float square = 0;
            for (int k = 0; k < HS; k++) square += m.y[threadIdx.x * (HS + 1) + k] * m.y[threadIdx.x * (HS + 1) + k];
            m.response[threadIdx.x * SPLATS_MOST + s] = isinf(w.centre[head * w.SP + s]) ? -INFINITY : -0.5f * square + (side ? 0 : w.lnalpha[head * w.SP + s]);
        }
        __syncthreads();
    }
    if (threadIdx.x >= FULL_TOKENS || first + threadIdx.x >= N) return;
    size_t n = first + threadIdx.x;
    float *x = m.response + threadIdx.x * SPLATS_MOST;
    if (scan.responses) {
        floatX *to = scan.responses + response_row(side, n, blockIdx.y, heads.count, N, T) * scan.SP;
        float most = side ? w.key_scale[head] : -INFINITY, sum = 0;
        for (int s = 0; s < S && !side; s++) most = fmaxf(most, x[s]);
        for (int s = 0; s < S; s++) sum += x[s] = fast_exp(x[s] - most);
        for (int s = 0; s < (int)scan.SP; s++) to[s] = (floatX)(s < S ? x[s] / (side ? 1 : sum) : 0);
        return;
    }
    floatX *to = features + n * 2 * C + column;
    for (int k = 0; k < HS; k++) to[k] = (floatX)0.0f;
    for (int s = 0; s < S; s++) {
        float f = fast_exp(x[s]), sine, cosine;
        to[s] = (floatX)f;
        if (!w.steps) continue;
        fast_sincos(wave_angle(w.steps[head * w.SP + s], (uint32_t)n % (uint32_t)T), &sine, &cosine);
        to[s] = (floatX)(f * cosine), to[S + s] = (floatX)(f * sine);
    }
}

/* G of token n, side and splat s; X in cross: what an angle adds to the gradient of theta, for each position */
__device__ static inline float full_gradient(float *cross, const floatX *dfeatures, const floatX *features, const SplatTables &w, const ScanResponsesAt &scan, size_t n, size_t side, size_t listed,
                                             size_t heads, size_t column, size_t N, size_t T, size_t C, int S, int s) {
    *cross = 0;
    if (n >= N) return 0;
    if (scan.responses) {
        if (side && (uint32_t)n % (uint32_t)T + scan.late >= T) return 0;
        return (float)scan.responses[response_row(side, n, listed, heads, N, T) * scan.SP + s];
    }
    const floatX *f = features + n * 2 * C + column + s, *d = dfeatures + n * 2 * C + column + s;
    float gradient = (float)f[0] * (float)d[0];
    if (!w.steps) return gradient;
    *cross = (float)f[0] * (float)d[S] - (float)f[S] * (float)d[0];
    return gradient + (float)f[S] * (float)d[S];
}

/* One block a head: dalive (heads, S) += sum |dL / d ln phi_s| over the queries and keys of `count` evenly spaced tokens, scaled to all N. For adaptation; a kernel
   of its own, because it runs now and then and splat_backward_kernel has no register to spare. */
__global__ static void splat_watch_kernel(float *dalive, ScanResponsesAt scan, const floatX *dfeatures, const floatX *features, SplatTables w, const __grid_constant__ HeadList heads, size_t N,
                                          size_t T, size_t count, size_t C, size_t HS, int S) {
    __shared__ float partial[8][SPLATS_MOST];
    int row = threadIdx.x / 32;
    for (int s = threadIdx.x % 32; s < S; s += 32) {
        float sum = 0, cross;
        for (size_t i = row; i < 2 * count; i += 8)
            sum += fabsf(full_gradient(&cross, dfeatures, features, w, scan, i / 2 * (N / count), i % 2, blockIdx.x, heads.count, i % 2 * C + heads.head[blockIdx.x] * HS, N, T, C, S, s));
        partial[row][s] = sum;
    }
    __syncthreads();
    for (int s = threadIdx.x; s < S; s += blockDim.x) {
        float sum = 0;
        for (int i = 0; i < 8; i++) sum += partial[i][s];
        dalive[blockIdx.x * (size_t)S + s] += sum * ((float)N / (float)count);
    }
}

/* dx, a block as above: dL / dx^ = -sum_s G_s L L^T (x^ - mu) */
template <int HS>
__global__ static void __launch_bounds__(128) splat_full_backward_kernel(floatX *dqkv, const floatX *dfeatures, const floatX *features, const floatX *qkv, SplatTables w, ScanResponsesAt scan,
                                                                         const __grid_constant__ HeadList heads, size_t first_head, size_t N, size_t T, size_t C, int S) {
    constexpr int PARTS = 128 / HS, ROWS = FULL_TOKENS / PARTS;
    extern __shared__ float shared[];
    FullRoom<HS> m = full_room<HS>(shared);
    size_t head = first_head + blockIdx.y, first = (size_t)blockIdx.x * FULL_TOKENS, side = blockIdx.z, column = side * C + heads.head[blockIdx.y] * HS;
    int k = threadIdx.x % HS, part = threadIdx.x / HS;
    float gradient[ROWS] = {}, cross;
    full_load_tokens(m, qkv + column, 3 * C, first, N, w.raw);
    for (int i = threadIdx.x; i < FULL_TOKENS * S; i += 128)
        m.response[i / S * SPLATS_MOST + i % S] = full_gradient(&cross, dfeatures, features, w, scan, first + i / S, side, blockIdx.y, heads.count, column, N, T, C, S, i % S);
    for (int s = 0; s < S; s++) {
        full_load_splat(m, w, head * S + s);
        __syncthreads();
        full_across(m);
        __syncthreads();
        float sum[ROWS] = {};
        for (int i = 0; i <= k; i++) {
            float entry = m.L[k * (HS + 1) + i];
#pragma unroll
            for (int t = 0; t < ROWS; t++) sum[t] += entry * m.y[(part * ROWS + t) * (HS + 1) + i];
        }
#pragma unroll
        for (int t = 0; t < ROWS; t++) gradient[t] -= m.response[(part * ROWS + t) * SPLATS_MOST + s] * sum[t];
        __syncthreads();
    }
#pragma unroll
    for (int t = 0; t < ROWS; t++) m.y[(part * ROWS + t) * (HS + 1) + k] = gradient[t];
    __syncthreads();
    for (int t = threadIdx.x / 32; t < FULL_TOKENS && first + t < N; t += 4) {
        const float *x = m.x + t * (HS + 1), *g = m.y + t * (HS + 1);
        floatX *to = dqkv + (first + t) * 3 * C + column;
        float dot = 0;
        for (int i = threadIdx.x % 32; i < HS; i += 32) dot += x[i] * g[i];
        dot = w.raw ? 0 : warp_sum(dot);
        for (int i = threadIdx.x % 32; i < HS; i += 32) to[i] = (floatX)(m.inverse[t] * (g[i] - x[i] * dot) + (scan.add ? (float)to[i] : 0));
    }
}

/* One block a splat: its moments over all tokens, in order: dmu, dL, amplitude, frequency */
template <int HS>
__global__ static void __launch_bounds__(128) splat_full_moments_kernel(double *sums, const floatX *dfeatures, const floatX *features, const floatX *qkv, SplatTables w, ScanResponsesAt scan,
                                                                        const __grid_constant__ HeadList heads, size_t first_head, size_t N, size_t T, size_t C, int S) {
    constexpr int P = HS * (HS + 1) / 2, PARTS = 128 / HS, ROWS = HS / PARTS;
    extern __shared__ float shared[];
    FullRoom<HS> m = full_room<HS>(shared);
    int s = blockIdx.x, k = threadIdx.x % HS, part = threadIdx.x / HS;
    size_t head = first_head + blockIdx.y;
    float dL[ROWS] = {}, sum = 0; /* rows part ROWS .. of column k; what column k of (x^ - mu) L sums up to */
    double amplitude = 0, frequency = 0;
    full_load_splat(m, w, head * S + s);
    for (size_t first = 0; first < N; first += FULL_TOKENS)
        for (size_t side = 0; side < 2; side++) {
            size_t column = side * C + heads.head[blockIdx.y] * HS;
            __syncthreads();
            full_load_tokens(m, qkv + column, 3 * C, first, N, w.raw);
            full_across(m);
            if (threadIdx.x < FULL_TOKENS) {
                size_t n = first + threadIdx.x;
                float cross, gradient = full_gradient(&cross, dfeatures, features, w, scan, n, side, blockIdx.y, heads.count, column, N, T, C, S, s);
                m.response[threadIdx.x] = gradient;
                if (side == 0) amplitude += (double)gradient;
                frequency += ((double)((uint32_t)n % (uint32_t)T) - 0.5 * (double)(T - 1)) * (double)cross;
            }
            __syncthreads();
            for (int t = 0; t < FULL_TOKENS; t++) {
                float across = -m.response[t] * m.y[t * (HS + 1) + k];
                if (part == 0) sum += across;
#pragma unroll
                for (int i = 0; i < ROWS; i++) dL[i] += (m.x[t * (HS + 1) + part * ROWS + i] - m.mu[part * ROWS + i]) * across;
            }
        }
    __syncthreads();
    if (part == 0) m.y[k] = sum;
    __syncthreads();
    double *M1 = sums + blockIdx.y * moments_size(S, P, HS) + S + s * HS, *M2 = M1 - s * HS + S * HS + (size_t)s * P, *to = M2 - (size_t)s * P + (size_t)S * P;
    if (part == 0) {
        double along = 0;
        for (int i = 0; i <= k; i++) along -= (double)m.L[k * (HS + 1) + i] * (double)m.y[i];
        M1[k] = along;
    }
#pragma unroll
    for (int i = 0; i < ROWS; i++) {
        int row = part * ROWS + i;
        if (row >= k) M2[row * (row + 1) / 2 + k] = (double)dL[i] * (row == k ? (double)m.L[k * (HS + 1) + k] : 1);
    }
    if (threadIdx.x >= 32) return;
    amplitude = warp_sum(amplitude), frequency = warp_sum(frequency);
    if (threadIdx.x == 0) to[s] = amplitude, to[S + s] = frequency;
}

template <int HS>
static void splat_full_forward(floatX *features, ScanResponsesAt scan, const floatX *qkv, SplatTables w, HeadList heads, size_t first_head, size_t N, size_t T, size_t C, int S, cudaStream_t stream) {
    cudaCheck(cudaFuncSetAttribute(splat_full_forward_kernel<HS>, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)full_bytes<HS>));
    splat_full_forward_kernel<HS><<<dim3((unsigned)CEIL_DIV(N, (size_t)FULL_TOKENS), (unsigned)heads.count, 2), 128, full_bytes<HS>, stream>>>(features, qkv, w, scan, heads, first_head, N, T, C, S);
}

template <int HS>
static void splat_full_backward(floatX *dqkv, double *sums, ScanResponsesAt scan, const floatX *dfeatures, const floatX *features, const floatX *qkv, SplatTables w, HeadList heads, size_t first_head,
                                size_t N, size_t T, size_t C, int S, cudaStream_t stream) {
    cudaCheck(cudaFuncSetAttribute(splat_full_backward_kernel<HS>, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)full_bytes<HS>));
    cudaCheck(cudaFuncSetAttribute(splat_full_moments_kernel<HS>, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)full_bytes<HS>));
    splat_full_backward_kernel<HS><<<dim3((unsigned)CEIL_DIV(N, (size_t)FULL_TOKENS), (unsigned)heads.count, 2), 128, full_bytes<HS>, stream>>>(dqkv, dfeatures, features, qkv, w, scan, heads,
                                                                                                                                                 first_head, N, T, C, S);
    splat_full_moments_kernel<HS><<<dim3((unsigned)S, (unsigned)heads.count), 128, full_bytes<HS>, stream>>>(sums, dfeatures, features, qkv, w, scan, heads, first_head, N, T, C, S);
}

/* Calls LAUNCH(head size, splats, diagonal?, for the scan?) with constants. */
#define BY_COVARIANCE(HS, SP, diagonal, SCAN)                                                                            \
    BY_HEAD_SIZE(HS, { if (diagonal) { LAUNCH(H, SP, true, SCAN); } else { LAUNCH(H, SP, false, SCAN); } })
#define BY_SPLATS(HS, S, diagonal, scan)                                                                                 \
    do {                                                                                                                 \
        if ((scan) && (S) <= 16) BY_COVARIANCE(HS, 16, diagonal, true);                                                  \
        else if (scan) BY_COVARIANCE(HS, 32, diagonal, true);                                                            \
        else if ((S) <= 32) BY_COVARIANCE(HS, 32, diagonal, false);                                                      \
        else BY_COVARIANCE(HS, 64, diagonal, false);                                                                     \
    } while (0)

/* Tiles of 64 tokens a block works on, so that a layer has about SPLAT_BLOCKS blocks: depends on shapes alone, as it is the order of sums. */
enum { SPLAT_BLOCKS = 1536 };
static size_t splat_tiles(size_t N, size_t heads) { return CEIL_DIV(CEIL_DIV(N, 64) * heads, (size_t)SPLAT_BLOCKS); }
static size_t splat_records(size_t N, size_t heads) { return CEIL_DIV(CEIL_DIV(N, 64), splat_tiles(N, heads)); } /* per head */

/* Equations (2), (6), (7), (9): features of q and k of the listed heads, the first of which is GSA head first_head:
   f = [a phi_s(x^) cos(theta_s n), a phi_s(x^) sin(theta_s n), 0 ...], a = alpha_s for queries and 1 for keys; or the scan's responses. P: numbers per precision */
static void splat_forward(floatX *features, ScanResponsesAt scan, const floatX *qkv, SplatTables w, HeadList heads, size_t first_head, size_t B, size_t T, size_t NH, size_t HS, size_t S,
                          size_t P, cudaStream_t stream) {
    bool diagonal = P > 1;
    if (P > HS) {
        BY_HEAD_SIZE(HS, (splat_full_forward<H>(features, scan, qkv, w, heads, first_head, B * T, T, NH * H, (int)S, stream)));
        return;
    }
    size_t N = B * T, tiles = splat_tiles(N, heads.count);
    dim3 grid((unsigned)heads.count, (unsigned)splat_records(N, heads.count)); /* heads first: neighbours in memory are read at one time */
#define LAUNCH(H, SP, DIAGONAL, SCAN)                                                                                                                                            \
    constexpr size_t bytes = (SP * H * (DIAGONAL ? 2 : 1) + 4 * SP) * sizeof(float);                                                                                          \
    cudaCheck(cudaFuncSetAttribute(splat_forward_kernel<H, SP, DIAGONAL, SCAN>, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes));                                      \
    splat_forward_kernel<H, SP, DIAGONAL, SCAN><<<grid, 128, bytes, stream>>>(features, qkv, w, scan, heads, first_head, N, T, NH * HS, (int)S, tiles)
    BY_SPLATS(HS, S, diagonal, scan.responses);
#undef LAUNCH
}

/* dqkv of q and k of the listed heads; records (heads, splat_records, moments) and sums (heads, moments): see splat_gradients */
static void splat_backward(floatX *dqkv, float *records, double *sums, ScanResponsesAt scan, const floatX *dfeatures, const floatX *features, const floatX *qkv, SplatTables w, HeadList heads,
                           size_t first_head, size_t B, size_t T, size_t NH, size_t HS, size_t S, size_t P, cudaStream_t stream) {
    bool diagonal = P > 1;
    if (P > HS) {
        BY_HEAD_SIZE(HS, (splat_full_backward<H>(dqkv, sums, scan, dfeatures, features, qkv, w, heads, first_head, B * T, T, NH * H, (int)S, stream)));
        return;
    }
    size_t N = B * T, tiles = splat_tiles(N, heads.count), count = splat_records(N, heads.count), record = moments_size(S, diagonal ? HS : 1, HS);
    dim3 grid((unsigned)heads.count, (unsigned)count);
#define LAUNCH(H, SP, DIAGONAL, SCAN)                                                                                                                                            \
    constexpr size_t bytes = SplatBackwardShape<H, SP, DIAGONAL, SCAN>::bytes;                                                                                                  \
    cudaCheck(cudaFuncSetAttribute(splat_backward_kernel<H, SP, DIAGONAL, SCAN>, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes));                                     \
    splat_backward_kernel<H, SP, DIAGONAL, SCAN><<<grid, 128, bytes, stream>>>(dqkv, records, dfeatures, features, qkv, w, scan, heads, first_head, N, T, NH * HS, (int)S, tiles)
    BY_SPLATS(HS, S, diagonal, scan.responses);
#undef LAUNCH
    moments_sums_kernel<<<dim3((unsigned)CEIL_DIV(record, 32), (unsigned)heads.count), dim3(32, 16), 0, stream>>>(sums, records, count, record);
    cudaCheck(cudaGetLastError());
}

/* ---------------------------------------------------------------------------------------------- attention

   The softmax mixer, equation (4), for standard and GSA heads alike, without a T x T matrix. */

/* C = NH HS; pointers are 16-byte aligned. */
struct AttentionInput {
    const floatX *qkv;        /* (B, T, 3C): q, k, v of all heads; head h at column h HS of each third */
    const floatX *features;   /* (B, T, 2C): f_q, f_k of the heads that have a feature map; NULL if none has */
    const int *from_features; /* (NH): 1 if head h takes its q and k from features; NULL: no head does */
    const float *scale;       /* (NH), > 0 */
    const int *window;        /* (NH): number of keys a query sees, itself included; >= T for all; 0 leaves the head out */
    bool causal;              /* query i sees keys i - window < j <= i, else |i - j| < window */
};

#ifdef GSA_FP32

/* The checking build: the plainest kernels, one warp a query or a key. */

/* Token t of sequence b: q of head h; k is C further. Strides: 2C or 3C. */
__device__ static inline size_t attention_at(const AttentionInput &in, size_t b, size_t t, size_t h, size_t T, size_t C, size_t HS, size_t *stride) {
    *stride = in.from_features && in.from_features[h] ? 2 * C : 3 * C;
    return (b * T + t) * *stride + h * HS;
}

template <int HS>
__global__ static void attention_forward_kernel(floatX *out, float *lse, AttentionInput in, size_t B, size_t T, size_t NH) {
    size_t row = (size_t)blockIdx.x * 4 + threadIdx.x / 32, h = row / T % NH, b = row / T / NH, i = row % T, C = NH * HS, stride;
    if (row >= B * NH * T || in.window[h] < 1) return;
    int lane = threadIdx.x % 32;
    size_t at = attention_at(in, b, 0, h, T, C, HS, &stride), window = (size_t)in.window[h];
    const floatX *q = (stride == 2 * C ? in.features : in.qkv) + at, *k = q + C, *v = in.qkv + b * T * 3 * C + 2 * C + h * HS;
    float most = -INFINITY, sum = 0, o[HS / 32] = {};
    size_t end = in.causal ? i + 1 : i + window < T ? i + window : T;
    for (size_t j0 = i < window ? 0 : i - window + 1; j0 < end; j0 += 32) {
        size_t j = j0 + lane;
        float z = -INFINITY;
        if (j < end) {
            z = 0;
            for (int e = 0; e < HS; e++) z += q[i * stride + e] * k[j * stride + e];
            z *= in.scale[h];
        }
        float higher = fmaxf(most, warp_max(z)), weight = expf(z - higher), keep = expf(most - higher);
        sum = sum * keep + warp_sum(weight), most = higher;
        for (int e = 0; e < HS / 32; e++) o[e] *= keep;
        for (int l = 0; l < 32 && j0 + l < end; l++) {
            float w = __shfl_sync(~0u, weight, l);
            for (int e = 0; e < HS / 32; e++) o[e] += w * v[(j0 + l) * 3 * C + lane + 32 * e];
        }
    }
    for (int e = 0; e < HS / 32; e++) out[(b * T + i) * C + h * HS + lane + 32 * e] = o[e] / sum;
    if (lane == 0) lse[row] = most + logf(sum);
}

/* QUERIES: dq and delta of one query; else dk and dv of one key. The sums over the other index are the same. */
template <int HS, bool QUERIES>
__global__ static void attention_backward_kernel(floatX *dqkv, floatX *dfeatures, float *delta, const floatX *dout, const floatX *out, const float *lse, AttentionInput in, size_t B,
                                                 size_t T, size_t NH) {
    size_t row = (size_t)blockIdx.x * 4 + threadIdx.x / 32, h = row / T % NH, b = row / T / NH, mine = row % T, C = NH * HS, stride;
    if (row >= B * NH * T || in.window[h] < 1) return;
    int lane = threadIdx.x % 32;
    size_t at = attention_at(in, b, 0, h, T, C, HS, &stride), window = (size_t)in.window[h];
    const floatX *q = (stride == 2 * C ? in.features : in.qkv) + at, *k = q + C, *v = in.qkv + b * T * 3 * C + 2 * C + h * HS, *d = dout + b * T * C + h * HS;
    floatX *dq = (stride == 2 * C ? dfeatures : dqkv) + at;
    const float *row_lse = lse + row - mine;
    float *row_delta = delta + row - mine, first[HS / 32] = {}, second[HS / 32] = {};
    if (QUERIES) {
        float sum = 0;
        for (int e = lane; e < HS; e += 32) sum += d[mine * C + e] * out[(b * T + mine) * C + h * HS + e];
        sum = warp_sum(sum);
        if (lane == 0) row_delta[mine] = sum;
        __syncwarp();
    }
    size_t before = mine < window ? 0 : mine - window + 1, after = mine + window < T ? mine + window : T;
    size_t start = QUERIES || !in.causal ? before : mine, end = QUERIES && in.causal ? mine + 1 : after;
    for (size_t o0 = start; o0 < end; o0 += 32) {
        size_t other = o0 + lane, i = QUERIES ? mine : other, j = QUERIES ? other : mine;
        float weight = 0, dz = 0;
        if (other < end) {
            float z = 0, dweight = 0;
            for (int e = 0; e < HS; e++) z += q[i * stride + e] * k[j * stride + e], dweight += d[i * C + e] * v[j * 3 * C + e];
            weight = expf(in.scale[h] * z - row_lse[i]);
            dz = in.scale[h] * weight * (dweight - row_delta[i]);
        }
        for (int l = 0; l < 32 && o0 + l < end; l++) {
            float w = __shfl_sync(~0u, weight, l), s = __shfl_sync(~0u, dz, l);
            for (int e = 0; e < HS / 32; e++) {
                first[e] += s * (QUERIES ? k : q)[(o0 + l) * stride + lane + 32 * e];
                if (!QUERIES) second[e] += w * d[(o0 + l) * C + lane + 32 * e];
            }
        }
    }
    for (int e = 0; e < HS / 32; e++) {
        dq[mine * stride + (QUERIES ? 0 : C) + lane + 32 * e] = first[e];
        if (!QUERIES) dqkv[(b * T + mine) * 3 * C + 2 * C + h * HS + lane + 32 * e] = second[e];
    }
}

/* out (B, T, C), lse (B, NH, T) */
static void attention_forward(floatX *out, float *lse, AttentionInput in, size_t B, size_t T, size_t NH, size_t HS, cudaStream_t stream) {
    BY_HEAD_SIZE(HS, (attention_forward_kernel<H><<<CEIL_DIV(B * NH * T, 4), 128, 0, stream>>>(out, lse, in, B, T, NH)));
}

/* Overwrites dv in dqkv, and dq, dk where the head's q, k came from. delta (B, NH, T): scratch */
static void attention_backward(floatX *dqkv, floatX *dfeatures, float *delta, const floatX *dout, const floatX *out, const float *lse, AttentionInput in, size_t B, size_t T, size_t NH,
                               size_t HS, cudaStream_t stream) {
    BY_HEAD_SIZE(HS, (attention_backward_kernel<H, true><<<CEIL_DIV(B * NH * T, 4), 128, 0, stream>>>(dqkv, dfeatures, delta, dout, out, lse, in, B, T, NH)));
    BY_HEAD_SIZE(HS, (attention_backward_kernel<H, false><<<CEIL_DIV(B * NH * T, 4), 128, 0, stream>>>(dqkv, dfeatures, delta, dout, out, lse, in, B, T, NH)));
}

#else

/* In bf16. Overwrites like the plain kernels above; delta (B, NH, T) is written, unless out is NULL: then it is read. Logits of 100
   and more are fine: fp32 scores, base-2 exponentials with the scale folded in, fp32 lse.

   The kernels differ from the textbook in two places:
   - The running maximum of the forward pass moves only when it is exceeded by more than 2^8. Until then the weights are at most
     256 instead of 1, which neither fp32 sums nor bf16's 8 exponent bits mind, and the accumulator needs no rescaling.
   - The backward pass runs twice over the scores, once per block of queries (dq) and once per block of keys (dk, dv). That is 7
     products instead of 5, but no kernel adds into another's sums. Both passes are one kernel text: see below. */

/* ---- one head, one tile

   A tile is some rows of one head in shared memory, HS bf16 each, in 16-byte chunks. Chunk c of a row is kept at place c ^ row mod 8,
   so that the same chunk of 8 consecutive rows (what the tensor cores read) lies in 8 different groups of banks. For HS = 64 this
   is the 128-byte swizzle of the bulk copy engine, for HS = 32 its 64-byte one. */

typedef __nv_bfloat16 bf16;
#define ATTENTION_LOG2E 1.4426950408889634f
#define ATTENTION_BLOCK 64 /* rows of the tiles that are streamed through shared memory */

/* head h of sequence b: its matrices at token 0, and what it sees: key j iff -behind <= j - i <= ahead */
struct AttentionHead {
    const bf16 *q, *k, *v;
    size_t qk_stride, v_stride; /* from token to token */
    float scale;
    int behind, ahead;
    bool from_features;
};

__device__ inline AttentionHead attention_head(const AttentionInput &in, size_t b, int h, int T, int NH, int HS) {
    AttentionHead head;
    size_t C = (size_t)NH * HS;
    head.from_features = in.from_features && in.from_features[h];
    head.qk_stride = head.from_features ? 2 * C : 3 * C;
    head.v_stride = 3 * C;
    head.q = (head.from_features ? in.features : in.qkv) + b * T * head.qk_stride + (size_t)h * HS;
    head.k = head.q + C;
    head.v = in.qkv + b * T * 3 * C + 2 * C + (size_t)h * HS;
    head.scale = in.scale[h];
    head.behind = min(in.window[h], T) - 1;
    head.ahead = in.causal ? 0 : head.behind;
    return head;
}

/* where chunk c of a row lies in its tile, in bytes */
template <int HS> __device__ inline uint32_t chunk_at(int row, int c) {
    return row * HS * 2 + ((c ^ (HS == 32 ? row >> 1 & 3 : row & 7)) << 4);
}

/* 2^x; the hardware's own, relative error 2^-22, 0 at -inf */
__device__ inline float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/* two floats as bf16, the first in the lower half */
__device__ inline uint32_t pack(float a, float b) {
    uint32_t packed;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(b), "f"(a));
    return packed;
}

/* tokens first .. first + rows - 1 of a matrix with HS columns into a tile; tokens from T on are zeros */
template <int HS> __device__ inline void load_tile(uint32_t tile, const bf16 *in, size_t stride, int first, int rows, int T) {
    for (int n = threadIdx.x; n < rows * (HS / 8); n += blockDim.x) {
        int row = n / (HS / 8), c = n % (HS / 8), token = first + row;
        copy_async(tile + chunk_at<HS>(row, c), in + (token < T ? token : 0) * stride + c * 8, token < T);
    }
}

/* ---- a warp's 16 rows

   Accumulators x[N][4] hold 16 rows and 8 N columns in the layout of the tensor cores: in block n a thread has columns
   8n + 2 (lane % 4) + {0, 1} of row lane / 4 as x[n][0..1], and of row lane / 4 + 8 as x[n][2..3]. wgmma's 64-row accumulator is
   four of these, one a warp, so everything in this part serves both kinds of kernels. */

/* Sets to -inf what a query does not see; rows are queries and columns keys, or the reverse for KEYS. (What keys from T on get there is
   never stored.) */
template <bool KEYS, int N> __device__ inline void hide(float (&s)[N][4], int row0, int column0, int behind, int ahead, int T) {
    int lane = threadIdx.x % 32;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        int row = row0 + lane / 4 + 8 * r, origin = column0 + lane % 4 * 2; /* columns low .. high from origin are seen */
        int low = row - (KEYS ? ahead : behind) - origin, high = (KEYS ? row + behind : min(row + ahead, T - 1)) - origin;
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int e = 0; e < 2; e++)
                if (8 * n + e < low || 8 * n + e > high) s[n][2 * r + e] = -INFINITY;
    }
}

/* does any of queries i0 .. i0 + ni - 1 see any of keys j0 .. j0 + nj - 1? do all see all of them? */
__device__ inline bool sees_any(int i0, int ni, int j0, int nj, int behind, int ahead) {
    return j0 <= i0 + ni - 1 + ahead && j0 + nj - 1 >= i0 - behind;
}
__device__ inline bool sees_all(int i0, int ni, int j0, int nj, int behind, int ahead, int T) {
    return j0 + nj - 1 <= i0 + ahead && j0 >= i0 + ni - 1 - behind && j0 + nj <= T;
}

/* Scores become weights relative to 2^m; true if some row of the warp moved its m: then the caller multiplies what it has
   accumulated by factor. m and sum belong to the thread's two rows; sum is the thread's own part until the end. */
template <int N> __device__ inline bool online_softmax(float (&s)[N][4], float (&m)[2], float (&sum)[2], float (&factor)[2], float scale2) {
    bool moved = false;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float most = -INFINITY;
#pragma unroll
        for (int n = 0; n < N; n++) most = fmaxf(most, fmaxf(s[n][2 * r], s[n][2 * r + 1]));
        most = quad_max(most) * scale2;
        float next = most > m[r] + 8 ? most : m[r], offset = next == -INFINITY ? 0 : next; /* a row may see nothing of its first tiles */
        moved |= next != m[r];
        factor[r] = exp2_fast(m[r] - offset);
        m[r] = next;
        float part = 0;
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int e = 2 * r; e < 2 * r + 2; e++) part += s[n][e] = exp2_fast(s[n][e] * scale2 - offset);
        sum[r] = sum[r] * factor[r] + part;
    }
    return __any_sync(~0u, moved);
}

/* an accumulator as the left operand of the next product, rounded to bf16: register 2 (n % 2) + r of operand n / 2 holds the thread's
   two columns of block n in its row r */
template <int N> __device__ inline void as_operands(uint32_t (&a)[N / 2][4], const float (&x)[N][4]) {
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
        for (int r = 0; r < 2; r++) a[n / 2][n % 2 * 2 + r] = pack(x[n][2 * r], x[n][2 * r + 1]);
}

/* 16 rows, times a factor each, to out from token row0 on, 16 bytes a thread by way of the warp's own 16 rows of a tile */
template <int HS> __device__ inline void store_rows(bf16 *out, size_t stride, int row0, int T, float (&x)[HS / 8][4], float factor0, float factor1, uint32_t tile, int tile_row) {
    int lane = threadIdx.x % 32, row = tile_row + lane / 4;
    __syncwarp(); /* the warp has read what was there */
#pragma unroll
    for (int n = 0; n < HS / 8; n++) {
        asm volatile("st.shared.b32 [%0], %1;" ::"r"(tile + chunk_at<HS>(row, n) + lane % 4 * 4), "r"(pack(x[n][0] * factor0, x[n][1] * factor0)) : "memory");
        asm volatile("st.shared.b32 [%0], %1;" ::"r"(tile + chunk_at<HS>(row + 8, n) + lane % 4 * 4), "r"(pack(x[n][2] * factor1, x[n][3] * factor1)) : "memory");
    }
    __syncwarp();
    for (int n = lane; n < 16 * (HS / 8); n += 32) {
        int r = n / (HS / 8), c = n % (HS / 8);
        uint4 v;
        asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(tile + chunk_at<HS>(tile_row + r, c)) : "memory");
        if (row0 + r < T) *(uint4 *)(out + (row0 + r) * stride + c * 8) = v;
    }
}

/* ---- mma.sync, any card since sm_80 */

/* d (16, 8) += a (16, 16) b (16, 8) */
__device__ inline void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/* s[m] = rows a_row + 16m .. of tile a, times rows b_row .. b_row + 8N - 1 of tile b transposed */
template <int HS, int M, int N> __device__ inline void product_rows(float (&s)[M][N][4], uint32_t a, int a_row, uint32_t b, int b_row) {
    int lane = threadIdx.x % 32;
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) s[m][n][e] = 0;
#pragma unroll
    for (int k = 0; k < HS / 16; k++) {
        uint32_t x[M][4], y[4];
#pragma unroll
        for (int m = 0; m < M; m++) load_matrices<false>(x[m], a + chunk_at<HS>(a_row + 16 * m + lane % 16, 2 * k + lane / 16));
#pragma unroll
        for (int n = 0; n < N; n += 2) {
            load_matrices<false>(y, b + chunk_at<HS>(b_row + 8 * n + lane % 8 + lane / 16 * 8, 2 * k + lane / 8 % 2));
#pragma unroll
            for (int m = 0; m < M; m++) mma(s[m][n], x[m], y[0], y[1]), mma(s[m][n + 1], x[m], y[2], y[3]);
        }
    }
}

/* o[m] += a[m] (16, 8N) times rows b_row .. b_row + 8N - 1 of tile b */
template <int HS, int M, int N> __device__ inline void product_columns(float (&o)[M][HS / 8][4], const uint32_t (&a)[M][N / 2][4], uint32_t b, int b_row) {
    int lane = threadIdx.x % 32;
#pragma unroll
    for (int k = 0; k < N / 2; k++)
#pragma unroll
        for (int n = 0; n < HS / 8; n += 2) {
            uint32_t y[4];
            load_matrices<true>(y, b + chunk_at<HS>(b_row + 16 * k + lane % 16, n + lane / 16));
#pragma unroll
            for (int m = 0; m < M; m++) mma(o[m][n], a[m][k], y[0], y[1]), mma(o[m][n + 1], a[m][k], y[2], y[3]);
        }
}

/* A CTA of 4 warps owns 128 queries of one head, a warp 32 of them, and streams the keys and values through two stages. Two tiles of 16
   queries a warp (M = 2) halve the shared memory traffic of the keys, which limits this kernel. All blocks of a head are neighbours in
   the grid, so that its keys stay in L2; the last blocks, which see the most keys, start first. */
template <int HS> __global__ void __launch_bounds__(128) attention_forward_mma(bf16 *out, float *lse, AttentionInput in, int T, int NH) {
    constexpr int M = 2, ROWS = 64 * M, KEYS = HS == 128 ? 32 : 64, TILE = KEYS * HS * 2;
    extern __shared__ __align__(1024) char memory[]; /* queries (ROWS, HS), then two stages of keys and values (KEYS, HS) each */
    int blocks = (T + ROWS - 1) / ROWS, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    size_t bh = blockIdx.x / blocks, b = bh / NH;
    int h = bh % NH, i0 = (blocks - 1 - blockIdx.x % blocks) * ROWS, row0 = i0 + warp * 16 * M;
    AttentionHead head = attention_head(in, b, h, T, NH, HS);
    if (head.behind < 0) return;
    int behind = head.behind, ahead = head.ahead, first = max(0, i0 - behind) / KEYS * KEYS, end = min(T, i0 + ROWS + ahead);
    uint32_t q_tile = shared_address(memory), stages = q_tile + ROWS * HS * 2;
    float scale2 = head.scale * ATTENTION_LOG2E;

    float o[M][HS / 8][4] = {}, m_row[M][2], sum[M][2] = {};
#pragma unroll
    for (int m = 0; m < M; m++) m_row[m][0] = m_row[m][1] = -INFINITY;

    load_tile<HS>(q_tile, head.q, head.qk_stride, i0, ROWS, T);
    load_tile<HS>(stages, head.k, head.qk_stride, first, KEYS, T);
    load_tile<HS>(stages + TILE, head.v, head.v_stride, first, KEYS, T);
    copy_commit();
    for (int j0 = first, stage = 0; j0 < end; j0 += KEYS, stage ^= 1) {
        copy_wait();
        __syncthreads(); /* this stage has arrived for all, and all have finished with the other */
        uint32_t k_tile = stages + stage * 2 * TILE, v_tile = k_tile + TILE;
        if (j0 + KEYS < end) {
            uint32_t other = stages + (stage ^ 1) * 2 * TILE;
            load_tile<HS>(other, head.k, head.qk_stride, j0 + KEYS, KEYS, T);
            load_tile<HS>(other + TILE, head.v, head.v_stride, j0 + KEYS, KEYS, T);
            copy_commit();
        }
        if (!sees_any(row0, 16 * M, j0, KEYS, behind, ahead)) continue;
        float s[M][KEYS / 8][4];
        uint32_t p[M][KEYS / 16][4];
        product_rows<HS, M, KEYS / 8>(s, q_tile, warp * 16 * M, k_tile, 0);
        if (!sees_all(row0, 16 * M, j0, KEYS, behind, ahead, T))
#pragma unroll
            for (int m = 0; m < M; m++) hide<false>(s[m], row0 + 16 * m, j0, behind, ahead, T);
#pragma unroll
        for (int m = 0; m < M; m++) {
            float factor[2];
            if (online_softmax(s[m], m_row[m], sum[m], factor, scale2))
#pragma unroll
                for (int n = 0; n < HS / 8; n++)
#pragma unroll
                    for (int e = 0; e < 4; e++) o[m][n][e] *= factor[e / 2];
            as_operands(p[m], s[m]);
        }
        product_columns<HS, M, KEYS / 8>(o, p, v_tile, 0);
    }
    size_t C = (size_t)NH * HS;
#pragma unroll
    for (int m = 0; m < M; m++) {
        float total[2] = {quad_sum(sum[m][0]), quad_sum(sum[m][1])};
#pragma unroll
        for (int r = 0; r < 2; r++) {
            int i = row0 + 16 * m + lane / 4 + 8 * r;
            if (lane % 4 == 0 && i < T) lse[bh * T + i] = (m_row[m][r] + log2f(total[r])) / ATTENTION_LOG2E;
        }
        store_rows<HS>(out + b * T * C + (size_t)h * HS, C, row0 + 16 * m, T, o[m], 1 / total[0], 1 / total[1], q_tile, (warp * M + m) * 16);
    }
}

/* Backward. One text for both passes: a CTA owns a block of rows and streams columns past it.
     KEYS false: rows are queries (q, do), columns keys (k, v):  dq += ds k
     KEYS true:  rows are keys (k, v), columns queries (q, do):  dk += ds^T q, dv += p^T do
   Either way scores = rows of the first matrix times columns of the first, and do . v = second times second. */

/* Pointwise on 16 rows, into operands: p from scores, then ds from do . v and p. lse2 (base 2) and delta belong to the queries: the
   thread's two rows, or for KEYS columns, in shared memory from the tile's first. ds takes p as rounded: it is at hand. */
template <bool KEYS, int N> __device__ inline void weights(uint32_t (&p)[N / 2][4], const float (&s)[N][4], float scale2, const float (&lse2)[2], const float *lse2_columns) {
#pragma unroll
    for (int n = 0; n < N; n++) {
        float2 l = KEYS ? *(const float2 *)(lse2_columns + 8 * n + threadIdx.x % 4 * 2) : make_float2(0, 0);
#pragma unroll
        for (int r = 0; r < 2; r++)
            p[n / 2][n % 2 * 2 + r] = pack(exp2_fast(s[n][2 * r] * scale2 - (KEYS ? l.x : lse2[r])), exp2_fast(s[n][2 * r + 1] * scale2 - (KEYS ? l.y : lse2[r])));
    }
}
template <bool KEYS, int N>
__device__ inline void score_gradients(uint32_t (&ds)[N / 2][4], const float (&dp)[N][4], const uint32_t (&p)[N / 2][4], const float (&delta)[2], const float *delta_columns) {
#pragma unroll
    for (int n = 0; n < N; n++) {
        float2 d = KEYS ? *(const float2 *)(delta_columns + 8 * n + threadIdx.x % 4 * 2) : make_float2(0, 0);
#pragma unroll
        for (int r = 0; r < 2; r++) {
            uint32_t both = p[n / 2][n % 2 * 2 + r]; /* the two halves are floats' upper halves */
            ds[n / 2][n % 2 * 2 + r] = pack(__uint_as_float(both << 16) * (dp[n][2 * r] - (KEYS ? d.x : delta[r])), __uint_as_float(both & 0xFFFF0000) * (dp[n][2 * r + 1] - (KEYS ? d.y : delta[r])));
        }
    }
}

/* delta of queries i0 .. i0 + rows - 1 of head bh to shared memory, computed and saved if out is given, otherwise read */
template <int HS> __device__ inline void row_deltas(float *shared_delta, float *delta, const bf16 *dout, const bf16 *out, size_t stride, int i0, int rows, int T) {
    constexpr int LANES = HS / 8; /* per row, 16 bytes each */
    for (int n = threadIdx.x; n < rows * LANES; n += blockDim.x) {
        int row = n / LANES, c = n % LANES, i = i0 + row;
        float sum = 0;
        if (i < T && out) {
            uint4 x = *(const uint4 *)(dout + i * stride + c * 8), y = *(const uint4 *)(out + i * stride + c * 8);
            const __nv_bfloat162 *x2 = (const __nv_bfloat162 *)&x, *y2 = (const __nv_bfloat162 *)&y;
#pragma unroll
            for (int e = 0; e < 4; e++) {
                float2 u = __bfloat1622float2(x2[e]), w = __bfloat1622float2(y2[e]);
                sum += u.x * w.x + u.y * w.y;
            }
        }
#pragma unroll
        for (int lanes = LANES / 2; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(~0u, sum, lanes);
        if (c == 0) {
            if (i < T && !out) sum = delta[i];
            else if (i < T) delta[i] = sum;
            shared_delta[row] = sum;
        }
    }
}

/* What thread t of 128 keeps of the queries from i0 on: t < 64: lse of query i0 + t in base 2; else delta of query i0 + t - 64. Zeros
   from T on: q and do are zeros there, so ds is zero. */
__device__ inline float column_statistic(const float *lse, const float *delta, int i0, int T) {
    int i = i0 + threadIdx.x % 64;
    return i >= T ? 0 : threadIdx.x < 64 ? lse[i] * ATTENTION_LOG2E : delta[i];
}

/* which of a head's gradients a block of rows writes, from token 0 on */
__device__ inline bf16 *gradient_of(bf16 *dqkv, bf16 *dfeatures, const AttentionHead &head, size_t b, int h, int part, int T, int NH, int HS) {
    size_t C = (size_t)NH * HS;
    bf16 *base = part < 2 && head.from_features ? dfeatures + b * T * 2 * C : dqkv + b * T * 3 * C;
    return base + part * C + (size_t)h * HS;
}

template <int HS, bool KEYS>
__global__ void __launch_bounds__(128) attention_backward_mma(bf16 *dqkv, bf16 *dfeatures, float *delta, const bf16 *dout, const bf16 *out, const float *lse, AttentionInput in, int T, int NH) {
    /* 16 M rows a warp; N * 8 columns at a time, so that scores and sums fit the registers */
    constexpr int M = HS == 128 ? 1 : 2, N = HS == 32 ? 8 : 4, ROWS = 64 * M, COLUMNS = ATTENTION_BLOCK, TILE = COLUMNS * HS * 2;
    extern __shared__ __align__(1024) char memory[]; /* two tiles (ROWS, HS), two stages of two tiles (COLUMNS, HS), lse and delta */
    int blocks = (T + ROWS - 1) / ROWS, warp = threadIdx.x / 32, lane = threadIdx.x % 32, block = blockIdx.x % blocks;
    size_t bh = blockIdx.x / blocks, b = bh / NH, C = (size_t)NH * HS;
    int h = bh % NH, r0 = (KEYS ? block : blocks - 1 - block) * ROWS, row0 = r0 + warp * 16 * M; /* the longest rows first */
    AttentionHead head = attention_head(in, b, h, T, NH, HS);
    if (head.behind < 0) return;
    int behind = head.behind, ahead = head.ahead, before = KEYS ? ahead : behind, after = KEYS ? behind : ahead;
    int first = max(0, r0 - before) / COLUMNS * COLUMNS, end = min(T, r0 + ROWS + after);
    const bf16 *dout_h = dout + b * T * C + (size_t)h * HS;
    const bf16 *rows1 = KEYS ? head.k : head.q, *rows2 = KEYS ? head.v : dout_h, *columns1 = KEYS ? head.q : head.k, *columns2 = KEYS ? dout_h : head.v;
    size_t rows2_stride = KEYS ? head.v_stride : C, columns2_stride = KEYS ? C : head.v_stride;
    uint32_t tile1 = shared_address(memory), tile2 = tile1 + ROWS * HS * 2, stages = tile2 + ROWS * HS * 2;
    float *statistics = (float *)(memory + 2 * ROWS * HS * 2 + 4 * TILE); /* KEYS: lse, delta of a stage's columns; else delta of the rows */
    float scale2 = head.scale * ATTENTION_LOG2E;
    lse += bh * T, delta += bh * T;

    auto load_columns = [&](int c0, int stage) {
        load_tile<HS>(stages + stage * 2 * TILE, columns1, head.qk_stride, c0, COLUMNS, T);
        load_tile<HS>(stages + stage * 2 * TILE + TILE, columns2, columns2_stride, c0, COLUMNS, T);
        copy_commit();
        if (KEYS) statistics[stage * 2 * COLUMNS + threadIdx.x] = column_statistic(lse, delta, c0, T);
    };
    load_tile<HS>(tile1, rows1, head.qk_stride, r0, ROWS, T);
    load_tile<HS>(tile2, rows2, rows2_stride, r0, ROWS, T);
    load_columns(first, 0);

    float lse2[M][2] = {}, delta_row[M][2] = {};
    if (!KEYS) {
        row_deltas<HS>(statistics, delta, dout_h, out ? out + b * T * C + (size_t)h * HS : NULL, C, r0, ROWS, T);
        __syncthreads();
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int r = 0; r < 2; r++) {
                int row = (warp * M + m) * 16 + lane / 4 + 8 * r;
                lse2[m][r] = r0 + row < T ? lse[r0 + row] * ATTENTION_LOG2E : 0;
                delta_row[m][r] = statistics[row];
            }
    }

    float sum1[M][HS / 8][4] = {}, sum2[M][HS / 8][4] = {}; /* dq, or dk and dv */
    for (int c0 = first, stage = 0; c0 < end; c0 += COLUMNS, stage ^= 1) {
        copy_wait();
        __syncthreads();
        if (c0 + COLUMNS < end) load_columns(c0 + COLUMNS, stage ^ 1);
        uint32_t stage1 = stages + stage * 2 * TILE, stage2 = stage1 + TILE;
#pragma unroll 1
        for (int part = 0; part < COLUMNS; part += 8 * N) {
            int column0 = c0 + part, i0 = KEYS ? column0 : row0, ni = KEYS ? 8 * N : 16 * M, j0 = KEYS ? row0 : column0, nj = KEYS ? 16 * M : 8 * N;
            if (!sees_any(i0, ni, j0, nj, behind, ahead)) continue;
            float s[M][N][4], dp[M][N][4];
            uint32_t p[M][N / 2][4], ds[M][N / 2][4];
            product_rows<HS, M, N>(s, tile1, warp * 16 * M, stage1, part);
            product_rows<HS, M, N>(dp, tile2, warp * 16 * M, stage2, part);
            if (!sees_all(i0, ni, j0, nj, behind, ahead, T))
#pragma unroll
                for (int m = 0; m < M; m++) hide<KEYS>(s[m], row0 + 16 * m, column0, behind, ahead, T);
            const float *lse_columns = statistics + stage * 2 * COLUMNS + part;
#pragma unroll
            for (int m = 0; m < M; m++) {
                weights<KEYS>(p[m], s[m], scale2, lse2[m], lse_columns);
                score_gradients<KEYS>(ds[m], dp[m], p[m], delta_row[m], lse_columns + COLUMNS);
            }
            product_columns<HS, M, N>(sum1, ds, stage1, part);
            if (KEYS) product_columns<HS, M, N>(sum2, p, stage2, part);
        }
    }
    bf16 *d1 = gradient_of(dqkv, dfeatures, head, b, h, KEYS ? 1 : 0, T, NH, HS), *d2 = gradient_of(dqkv, dfeatures, head, b, h, 2, T, NH, HS);
#pragma unroll
    for (int m = 0; m < M; m++) {
        store_rows<HS>(d1, head.qk_stride, row0 + 16 * m, T, sum1[m], head.scale, head.scale, tile1, (warp * M + m) * 16);
        if (KEYS) store_rows<HS>(d2, head.v_stride, row0 + 16 * m, T, sum2[m], 1, 1, tile2, (warp * M + m) * 16);
    }
}

/* ---- wgmma and bulk copies, sm_90a, HS = 64

   The same two kernels for Hopper: a warpgroup of 4 warps owns 64 rows, multiplies with wgmma straight from the swizzled tiles, and
   the bulk copy engine fills the tiles (zeros from T on). While one warpgroup of a multiprocessor computes exponentials, others keep
   the tensor cores busy: that is all the overlap there is, and the register counts are chosen for it, 4 warpgroups a multiprocessor at
   up to 128 registers or 3 at up to 168.

   Measured on one H100 (80 GB HBM3), 64 sequences of 1,024 tokens, 12 heads of 64, causal, ms, medians of 30 (once the card is warm and
   at its power limit everything takes up to 8 % longer):
                             forward   backward
       wgmma                   0.307      0.836    (dq 0.38, dk and dv 0.46)
       mma.sync                0.515      1.57
       PyTorch 2.11, cuDNN     0.293      1.084
       PyTorch 2.11, FA2       0.466      1.72
   No unit is saturated: tensor cores and exponentials are each busy half of the time, and take turns within a warpgroup. Starting and
   ending a CTA costs about 2.5 of 13 us in the forward pass: at T = 4096 it reaches 420 TFLOP/s instead of 335.
   Tried without gain. Forward: asking for the next scores before adding the values (0.327); that with the two warpgroups of a CTA
   taking turns at the tensor cores by named barriers (0.340); 5 or 6 stages (the same); a light and a heavy block of queries in one
   CTA, one after the other (0.318, and slower at T = 4096). Backward: asking for scores and do . v at once (dq 0.408 with 3 CTAs a
   multiprocessor, dk and dv 0.593 with 2); the next scores before the last product (dq 0.420, dk and dv 0.465); 3 stages instead of
   2 (the same). */

#define TILE64 (64 * 64 * 2) /* bytes of a tile: 64 rows of 64 */

struct AttentionMaps { /* (C columns, T, B) each, boxes of 64 columns of 64 tokens */
    CUtensorMap qkv, features, dout;
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
static __device__ int attention_has_wgmma = 1;

__device__ inline void barrier_init(uint32_t barrier, int arrivals) { asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory"); }
__device__ inline void barrier_arrive(uint32_t barrier) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory"); }
/* arrives, and lets the barrier wait for so many copied bytes too */
__device__ inline void barrier_expect(uint32_t barrier, int bytes) { asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory"); }
/* waits for the end of the phase with this parity: 0 for the first, 1 for the second, and so on */
__device__ inline void barrier_wait(uint32_t barrier, int parity) {
    asm volatile("{\n.reg .pred done;\nagain: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra again;\n}" ::"r"(barrier), "r"(parity) : "memory");
}
/* 64 columns of tokens t .. t + 63 of sequence b to a tile; the bytes count for the barrier */
__device__ inline void copy_tile(uint32_t tile, const CUtensorMap *map, int column, int t, int b, uint32_t barrier) {
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], [%5];" ::"r"(tile), "l"(map), "r"(column), "r"(t), "r"(b), "r"(barrier)
                 : "memory");
}

/* what wgmma knows of a tile: address, 1,024 bytes from 8 rows to the next, 128-byte swizzle. + 2: 16 columns on; + 128: 16 rows on */
__device__ inline uint64_t wgmma_tile(uint32_t tile) { return (uint64_t)(tile >> 4) | 1ull << 16 | 64ull << 32 | 1ull << 62; }
__device__ inline void wgmma_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

#define ROW4(x, n) "+f"(x[n][0]), "+f"(x[n][1]), "+f"(x[n][2]), "+f"(x[n][3])
#define ALL32(x) ROW4(x, 0), ROW4(x, 1), ROW4(x, 2), ROW4(x, 3), ROW4(x, 4), ROW4(x, 5), ROW4(x, 6), ROW4(x, 7)
#define NEW4(x, n) "=f"(x[n][0]), "=f"(x[n][1]), "=f"(x[n][2]), "=f"(x[n][3])
#define NEW32(x) NEW4(x, 0), NEW4(x, 1), NEW4(x, 2), NEW4(x, 3), NEW4(x, 4), NEW4(x, 5), NEW4(x, 6), NEW4(x, 7)
#define OUT32 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}"

/* Waits until at most PENDING groups of products are under way. x is what the caller reads next: naming it keeps the compiler from
   reading it earlier. A statement of its own, since its operands may be copied before it, when they must not be touched yet. */
template <int PENDING> __device__ inline void wgmma_wait(float (&x)[8][4]) {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
    asm volatile("" : ALL32(x)::"memory");
}

/* s (64, 64) = rows of tile a times rows of tile b; the first of four steps overwrites s */
__device__ inline void wgmma_rows(float (&s)[8][4], uint64_t a, uint64_t b) {
    asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, 0, 0;\nwgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " OUT32 ", %32, %33, add, 1, 1, 0, 0;\n}" : NEW32(s) : "l"(a), "l"(b));
#pragma unroll
    for (int k = 1; k < 4; k++) asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " OUT32 ", %32, %33, 1, 1, 1, 0, 0;" : ALL32(s) : "l"(a + 2 * k), "l"(b + 2 * k));
}

/* o (64, 64) += x (64, 64), in registers, times tile b, whose rows are x's columns */
__device__ inline void wgmma_columns(float (&o)[8][4], const uint32_t (&x)[4][4], uint64_t b) {
#pragma unroll
    for (int k = 0; k < 4; k++)
        asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " OUT32 ", {%32, %33, %34, %35}, %36, 1, 1, 1, 1;" : ALL32(o) : "r"(x[k][0]), "r"(x[k][1]), "r"(x[k][2]), "r"(x[k][3]), "l"(b + 128 * k));
}
#else
static __device__ int attention_has_wgmma = 0;
#endif

/* Two warpgroups with 64 queries each share the keys and values. Thread 0 orders the copies, LEAD blocks ahead: the stage it fills is
   that of STAGES - LEAD blocks before, so that the warpgroups may be a block apart without waiting for each other. (A ninth warp for
   this job would leave 96 registers to each thread instead of 128.) */
#define ATTENTION_FORWARD_STAGES 4
#define ATTENTION_FORWARD_BYTES ((2 + 2 * ATTENTION_FORWARD_STAGES) * TILE64 + 128)
__global__ void __launch_bounds__(256, 2) attention_forward_wgmma(bf16 *out, float *lse, AttentionInput in, const __grid_constant__ AttentionMaps maps, int T, int NH) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    constexpr int HS = 64, ROWS = 128, KEYS = 64, STAGES = ATTENTION_FORWARD_STAGES, LEAD = 2;
    extern __shared__ __align__(1024) char memory[]; /* two tiles of queries, stages of keys and values, barriers */
    int blocks = (T + ROWS - 1) / ROWS, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    size_t bh = blockIdx.x / blocks, b = bh / NH, C = (size_t)NH * HS;
    int h = bh % NH, i0 = (blocks - 1 - blockIdx.x % blocks) * ROWS;
    AttentionHead head = attention_head(in, b, h, T, NH, HS);
    if (head.behind < 0) return;
    int behind = head.behind, ahead = head.ahead, first = max(0, i0 - behind) / KEYS * KEYS, end = min(T, i0 + ROWS + ahead);
    uint32_t q_tiles = shared_address(memory), stages = q_tiles + 2 * TILE64, q_full = stages + 2 * STAGES * TILE64, full = q_full + 8, empty = full + 8 * STAGES;
    const CUtensorMap *qk_map = head.from_features ? &maps.features : &maps.qkv;
    auto copy_keys = [&](int block) { /* the block-th one of keys and values */
        int stage = block % STAGES;
        uint32_t k_tile = stages + stage * 2 * TILE64, barrier = full + 8 * stage;
        barrier_expect(barrier, 2 * TILE64);
        copy_tile(k_tile, qk_map, C + h * HS, first + block * KEYS, b, barrier);
        copy_tile(k_tile + TILE64, &maps.qkv, 2 * C + h * HS, first + block * KEYS, b, barrier);
    };
    if (threadIdx.x == 0) {
        barrier_init(q_full, 1);
        for (int stage = 0; stage < STAGES; stage++) barrier_init(full + 8 * stage, 1), barrier_init(empty + 8 * stage, 8); /* 8 warps */
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        barrier_expect(q_full, 2 * TILE64);
        copy_tile(q_tiles, qk_map, h * HS, i0, b, q_full);
        copy_tile(q_tiles + TILE64, qk_map, h * HS, i0 + 64, b, q_full);
        for (int block = 0; block < LEAD && first + block * KEYS < end; block++) copy_keys(block);
    }
    __syncthreads();

    int group = warp / 4, row0 = i0 + 16 * warp, block = 0;
    int group_end = min(end, i0 + 64 * (group + 1) + ahead); /* the first group may leave out the last block, whose stage is not needed again */
    float scale2 = head.scale * ATTENTION_LOG2E, o[8][4] = {}, m[2] = {-INFINITY, -INFINITY}, sum[2] = {};
    uint64_t q = wgmma_tile(q_tiles + group * TILE64);
    barrier_wait(q_full, 0);
    do {
        int stage = block % STAGES, j0 = first + block * KEYS;
        uint32_t k_tile = stages + stage * 2 * TILE64;
        float s[8][4];
        barrier_wait(full + 8 * stage, block / STAGES % 2);
        wgmma_begin();
        wgmma_rows(s, q, wgmma_tile(k_tile));
        wgmma_commit();
        wgmma_wait<0>(s); /* this includes the product with the values of the block before, whose stage is free now */
        if (block > 0 && lane == 0) barrier_arrive(empty + 8 * ((block - 1) % STAGES));
        if (threadIdx.x == 0 && j0 + LEAD * KEYS < end) {
            int before = block + LEAD - STAGES; /* the block that had the stage */
            if (before >= 0) barrier_wait(empty + 8 * (before % STAGES), before / STAGES % 2);
            copy_keys(block + LEAD);
        }
        __syncwarp();
        if (!sees_all(row0, 16, j0, KEYS, behind, ahead, T)) hide<false>(s, row0, j0, behind, ahead, T);
        float factor[2];
        if (online_softmax(s, m, sum, factor, scale2))
#pragma unroll
            for (int n = 0; n < 8; n++)
#pragma unroll
                for (int e = 0; e < 4; e++) o[n][e] *= factor[e / 2];
        uint32_t p[4][4];
        as_operands(p, s);
        wgmma_begin();
        wgmma_columns(o, p, wgmma_tile(k_tile + TILE64));
        wgmma_commit();
        block++;
    } while (first + block * KEYS < group_end); /* a plain loop could be skipped with o still zero: the compiler then waits after every product */
    wgmma_wait<0>(o);
    asm volatile("bar.sync %0, 128;" ::"r"(1 + group) : "memory"); /* nobody of the warpgroup reads the queries any more */
    float total[2] = {quad_sum(sum[0]), quad_sum(sum[1])};
#pragma unroll
    for (int r = 0; r < 2; r++) {
        int i = row0 + lane / 4 + 8 * r;
        if (lane % 4 == 0 && i < T) lse[bh * T + i] = (m[r] + log2f(total[r])) / ATTENTION_LOG2E;
    }
    store_rows<HS>(out + b * T * C + (size_t)h * HS, C, row0, T, o, 1 / total[0], 1 / total[1], q_tiles, warp * 16);
#endif
}

/* One warpgroup a CTA; thread 0 orders the copies, one block ahead. Rows and columns as in attention_backward_mma. do . v is asked for
   only when the scores have become weights: it then takes the registers of the scores, and one more warpgroup fits a multiprocessor. */
#define ATTENTION_BACKWARD_BYTES (6 * TILE64 + 2 * 128 * 4 + 64)
template <bool KEYS>
__global__ void __launch_bounds__(128, KEYS ? 3 : 4)
    attention_backward_wgmma(bf16 *dqkv, bf16 *dfeatures, float *delta, const bf16 *dout, const bf16 *out, const float *lse, AttentionInput in, const __grid_constant__ AttentionMaps maps, int T, int NH) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    constexpr int HS = 64, BLOCK = 64, STAGES = 2;
    extern __shared__ __align__(1024) char memory[]; /* two tiles of rows, stages of two tiles of columns, statistics, barriers */
    int blocks = (T + BLOCK - 1) / BLOCK, warp = threadIdx.x / 32, lane = threadIdx.x % 32, block = blockIdx.x % blocks;
    size_t bh = blockIdx.x / blocks, b = bh / NH, C = (size_t)NH * HS;
    int h = bh % NH, r0 = (KEYS ? block : blocks - 1 - block) * BLOCK, row0 = r0 + 16 * warp;
    AttentionHead head = attention_head(in, b, h, T, NH, HS);
    if (head.behind < 0) return;
    int behind = head.behind, ahead = head.ahead, before = KEYS ? ahead : behind, after = KEYS ? behind : ahead;
    int first = max(0, r0 - before) / BLOCK * BLOCK, end = min(T, r0 + BLOCK + after);
    uint32_t tile1 = shared_address(memory), tile2 = tile1 + TILE64, stages = tile2 + TILE64;
    float *statistics = (float *)(memory + (2 + 2 * STAGES) * TILE64); /* KEYS: lse, delta of a stage's columns; else delta of the rows */
    uint32_t rows_full = shared_address(statistics + 256), full = rows_full + 8;
    lse += bh * T, delta += bh * T;

    /* 64 tokens from t on of k and v, or of q and do, to two tiles */
    auto copy = [&](bool keys, int t, uint32_t tile, uint32_t barrier) {
        barrier_expect(barrier, 2 * TILE64);
        copy_tile(tile, head.from_features ? &maps.features : &maps.qkv, (keys ? C : 0) + h * HS, t, b, barrier);
        copy_tile(tile + TILE64, keys ? &maps.qkv : &maps.dout, (keys ? 2 * C : 0) + h * HS, t, b, barrier);
    };
    if (threadIdx.x == 0) {
        for (int stage = -1; stage < STAGES; stage++) barrier_init(full + 8 * stage, 1);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        copy(KEYS, r0, tile1, rows_full);
        copy(!KEYS, first, stages, full);
    }
    float lse2[2] = {}, delta_row[2] = {};
    if (KEYS) statistics[threadIdx.x] = column_statistic(lse, delta, first, T);
    else {
#pragma unroll
        for (int r = 0; r < 2; r++) {
            int i = row0 + lane / 4 + 8 * r;
            lse2[r] = i < T ? lse[i] * ATTENTION_LOG2E : 0;
        }
        row_deltas<HS>(statistics, delta, dout + b * T * C + (size_t)h * HS, out ? out + b * T * C + (size_t)h * HS : NULL, C, r0, BLOCK, T);
    }
    __syncthreads();
    if (!KEYS)
#pragma unroll
        for (int r = 0; r < 2; r++) delta_row[r] = statistics[16 * warp + lane / 4 + 8 * r];

    float scale2 = head.scale * ATTENTION_LOG2E, sum1[8][4] = {}, sum2[8][4] = {}; /* dq, or dk and dv */
    uint64_t rows1 = wgmma_tile(tile1), rows2 = wgmma_tile(tile2);
    barrier_wait(rows_full, 0);
    int c0 = first, stage = 0, parity = 0;
    do {
        uint64_t columns1 = wgmma_tile(stages + stage * 2 * TILE64), columns2 = wgmma_tile(stages + stage * 2 * TILE64 + TILE64);
        float s[8][4], dp[8][4], statistic = KEYS ? column_statistic(lse, delta, c0 + BLOCK, T) : 0; /* of the next block */
        barrier_wait(full + 8 * stage, parity);
        wgmma_begin();
        wgmma_rows(s, rows1, columns1);
        wgmma_commit();
        wgmma_wait<0>(s);
        __syncthreads(); /* all are done with the block before: its stage and its statistics are free */
        if (KEYS) statistics[(stage ^ 1) * 128 + threadIdx.x] = statistic;
        if (threadIdx.x == 0 && c0 + BLOCK < end) copy(!KEYS, c0 + BLOCK, stages + (stage ^ 1) * 2 * TILE64, full + 8 * (stage ^ 1));
        int i0 = KEYS ? c0 : row0, ni = KEYS ? BLOCK : 16, j0 = KEYS ? row0 : c0, nj = KEYS ? 16 : BLOCK;
        if (!sees_all(i0, ni, j0, nj, behind, ahead, T)) hide<KEYS>(s, row0, c0, behind, ahead, T);
        uint32_t p[4][4], ds[4][4];
        weights<KEYS>(p, s, scale2, lse2, statistics + stage * 128);
        wgmma_begin();
        wgmma_rows(dp, rows2, columns2);
        wgmma_commit();
        if (KEYS) {
            wgmma_columns(sum2, p, columns2);
            wgmma_commit();
        }
        wgmma_wait<KEYS>(dp);
        score_gradients<KEYS>(ds, dp, p, delta_row, statistics + stage * 128 + 64);
        wgmma_begin();
        wgmma_columns(sum1, ds, columns1);
        wgmma_commit();
        c0 += BLOCK, parity ^= stage, stage ^= 1;
    } while (c0 < end); /* not a plain loop: as in the forward pass */
    wgmma_wait<0>(sum1);
    if (KEYS) wgmma_wait<0>(sum2);
    __syncthreads();
    bf16 *d1 = gradient_of(dqkv, dfeatures, head, b, h, KEYS ? 1 : 0, T, NH, HS), *d2 = gradient_of(dqkv, dfeatures, head, b, h, 2, T, NH, HS);
    store_rows<HS>(d1, head.qk_stride, row0, T, sum1, head.scale, head.scale, tile1, 16 * warp);
    if (KEYS) store_rows<HS>(d2, head.v_stride, row0, T, sum2, 1, 1, tile2, 16 * warp);
#endif
}

/* ---- launchers */

template <int HS> static void attention_forward_launch(bf16 *out, float *lse, AttentionInput in, size_t B, int T, int NH, cudaStream_t stream) {
    int rows = 128, keys = HS == 128 ? 32 : 64, bytes = (rows + 4 * keys) * HS * 2;
    cudaCheck(cudaFuncSetAttribute(attention_forward_mma<HS>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
    attention_forward_mma<HS><<<(unsigned)(B * NH * ((T + rows - 1) / rows)), 128, bytes, stream>>>(out, lse, in, T, NH);
    cudaCheck(cudaGetLastError());
}

template <int HS>
static void attention_backward_launch(bf16 *dqkv, bf16 *dfeatures, float *delta, const bf16 *dout, const bf16 *out, const float *lse, AttentionInput in, size_t B, int T, int NH, cudaStream_t stream) {
    int rows = HS == 128 ? 64 : 128, bytes = (2 * rows + 4 * ATTENTION_BLOCK) * HS * 2 + 4 * ATTENTION_BLOCK * 4;
    unsigned grid = (unsigned)(B * NH * ((T + rows - 1) / rows));
    cudaCheck(cudaFuncSetAttribute(attention_backward_mma<HS, false>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
    cudaCheck(cudaFuncSetAttribute(attention_backward_mma<HS, true>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
    attention_backward_mma<HS, false><<<grid, 128, bytes, stream>>>(dqkv, dfeatures, delta, dout, out, lse, in, T, NH); /* writes delta */
    attention_backward_mma<HS, true><<<grid, 128, bytes, stream>>>(dqkv, dfeatures, delta, dout, out, lse, in, T, NH);
    cudaCheck(cudaGetLastError());
}

static bool attention_portable; /* for tests: the mma.sync kernels even where there are better ones */

/* does this program hold wgmma kernels for this card? The first call must not be part of a stream capture */
static bool attention_wgmma(void) {
    static int known = -1;
    if (known < 0) cudaCheck(cudaMemcpyFromSymbol(&known, attention_has_wgmma, sizeof(int)));
    return known && !attention_portable;
}

/* x (B, T, columns) in boxes of 64 tokens and 64 columns; the copy engine fills with zeros what lies beyond T */
static CUtensorMap attention_map(const bf16 *x, size_t B, size_t T, size_t columns) {
    static PFN_cuTensorMapEncodeTiled_v12000 encode;
    CUtensorMap map = {};
    if (!encode) {
        cudaDriverEntryPointQueryResult found;
        cudaCheck(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", (void **)&encode, 12000, cudaEnableDefault, &found));
    }
    if (!x) return map;
    cuuint64_t sizes[3] = {columns, T, B}, strides[2] = {columns * sizeof(bf16), T * columns * sizeof(bf16)};
    cuuint32_t box[3] = {64, 64, 1}, steps[3] = {1, 1, 1};
    CUresult result = encode(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 3, (void *)x, sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                             CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (result != CUDA_SUCCESS) die("the GPU driver refuses a map of (%zu, %zu, %zu) for the bulk copy engine, error %d", B, T, columns, (int)result);
    return map;
}

static void attention_forward_hopper(bf16 *out, float *lse, AttentionInput in, size_t B, size_t T, size_t NH, cudaStream_t stream) {
    AttentionMaps maps = {attention_map(in.qkv, B, T, 3 * NH * 64), attention_map(in.features, B, T, 2 * NH * 64), {}};
    cudaCheck(cudaFuncSetAttribute(attention_forward_wgmma, cudaFuncAttributeMaxDynamicSharedMemorySize, ATTENTION_FORWARD_BYTES));
    attention_forward_wgmma<<<(unsigned)(B * NH * ((T + 127) / 128)), 256, ATTENTION_FORWARD_BYTES, stream>>>(out, lse, in, maps, (int)T, (int)NH);
    cudaCheck(cudaGetLastError());
}

static void attention_backward_hopper(bf16 *dqkv, bf16 *dfeatures, float *delta, const bf16 *dout, const bf16 *out, const float *lse, AttentionInput in, size_t B, size_t T, size_t NH,
                                      cudaStream_t stream) {
    AttentionMaps maps = {attention_map(in.qkv, B, T, 3 * NH * 64), attention_map(in.features, B, T, 2 * NH * 64), attention_map(dout, B, T, NH * 64)};
    unsigned grid = (unsigned)(B * NH * ((T + 63) / 64));
    cudaCheck(cudaFuncSetAttribute(attention_backward_wgmma<false>, cudaFuncAttributeMaxDynamicSharedMemorySize, ATTENTION_BACKWARD_BYTES));
    cudaCheck(cudaFuncSetAttribute(attention_backward_wgmma<true>, cudaFuncAttributeMaxDynamicSharedMemorySize, ATTENTION_BACKWARD_BYTES));
    attention_backward_wgmma<false><<<grid, 128, ATTENTION_BACKWARD_BYTES, stream>>>(dqkv, dfeatures, delta, dout, out, lse, in, maps, (int)T, (int)NH); /* writes delta */
    attention_backward_wgmma<true><<<grid, 128, ATTENTION_BACKWARD_BYTES, stream>>>(dqkv, dfeatures, delta, dout, out, lse, in, maps, (int)T, (int)NH);
    cudaCheck(cudaGetLastError());
}

static void attention_forward(bf16 *out, float *lse, AttentionInput in, size_t B, size_t T, size_t NH, size_t HS, cudaStream_t stream) {
    if (HS == 64 && attention_wgmma()) attention_forward_hopper(out, lse, in, B, T, NH, stream);
    else if (HS == 32) attention_forward_launch<32>(out, lse, in, B, (int)T, (int)NH, stream);
    else if (HS == 64) attention_forward_launch<64>(out, lse, in, B, (int)T, (int)NH, stream);
    else if (HS == 128) attention_forward_launch<128>(out, lse, in, B, (int)T, (int)NH, stream);
    else die("internal error: attention has heads of 32, 64 and 128, not %zu", HS);
}

static void attention_backward(bf16 *dqkv, bf16 *dfeatures, float *delta, const bf16 *dout, const bf16 *out, const float *lse, AttentionInput in, size_t B, size_t T, size_t NH, size_t HS,
                               cudaStream_t stream) {
    if (HS == 64 && attention_wgmma()) attention_backward_hopper(dqkv, dfeatures, delta, dout, out, lse, in, B, T, NH, stream);
    else if (HS == 32) attention_backward_launch<32>(dqkv, dfeatures, delta, dout, out, lse, in, B, (int)T, (int)NH, stream);
    else if (HS == 64) attention_backward_launch<64>(dqkv, dfeatures, delta, dout, out, lse, in, B, (int)T, (int)NH, stream);
    else if (HS == 128) attention_backward_launch<128>(dqkv, dfeatures, delta, dout, out, lse, in, B, (int)T, (int)NH, stream);
    else die("internal error: attention has heads of 32, 64 and 128, not %zu", HS);
}

#endif

/* ---------------------------------------------------------------------------------------------- scan

   The linear mixer, equation (5), as in train_gsa.c: chunks of 64 tokens, and between them the state H = sum f_k v^T (F, HS), z = sum f_k (F), which is
   decayed and turned from chunk to chunk. Positions in a chunk count from its middle, so that exponentials stay below e^(32 delta).

   splat_forward leaves the responses r and phi (2, B, heads, T, SP), from which a CTA makes the features of a chunk: F = 3 SP columns, of which column
   8n + 2t + e holds the constant part of splat 8n + 4e + t and columns SP + 2s, SP + 2s + 1 the cosine and sine of splat s. So a thread of a
   tensor core's tile has all three parts of its splats (see mma_16x8x16). Without a cosine two of three are zeros.

   A CTA of 4 warps walks one segment of one head of one sequence. Where B times heads does not fill a card, sequences are cut into segments:
   first the sums of each, then their states at the start one after the other, then all segments at once. Backward the same, in two sweeps:
   scan_queries_kernel forwards, with H, for what belongs to queries; scan_keys_kernel backwards, with the gradient of H, for keys and values.

   A state in memory: the accumulators of the 128 threads as they stand, then z. */

enum { CHUNK = 64, SCAN_BLOCK = 256, SCAN_SPLATS_MOST = 32, SCAN_SEGMENTS_MOST = 528 };
enum { SCAN_SUMS, SCAN_ALONE, SCAN_FIRST, SCAN_SECOND, SCAN_MERGED }; /* what scan_forward_kernel makes of its sums, see there */

/* As in train_gsa.c; the gradient of the second, a millionth, is left out here. */
#define ROW_SUM_EPSILON 1e-6
#define ROW_SUM_ROUNDING 1e-6

typedef struct {
    const floatX *qkv, *responses;
    SplatTables tables;
    HeadList heads;      /* of the launch; the first is GSA head first_head */
    size_t first_head, B, T, NH;
    size_t segment;      /* tokens of one segment, a multiple of SCAN_BLOCK */
    int segments;
    int sweeps;          /* of a backward pass: 2 in each direction */
    int late;            /* query i meets keys j <= i - late only */
    bool reverse;        /* from the end, and without the query's own key */
} ScanInput;

/* ---- a CTA's memory */

template <int HS, int SP> struct ScanShape {
    static constexpr bool WIDE = sizeof(floatX) == 4;
    static constexpr int F = 3 * SP, PAD = WIDE ? 4 : 8, FROW = F + PAD, VROW = HS + PAD, TROW = F + 4, TILES = F / 8, M = HS > 64 ? 2 : 1, PAIRS = TILES / 2, OWN = (PAIRS + 3) / 4;
    static constexpr int STAGES = WIDE ? 1 : 2, TASKS = SP / 16, RECORD = 3 * SP + 1;
    static constexpr size_t STATE = 64 * M * F + F;
    /* table, shift, lag, z, delta and rho; features, state, r; stages of `tiles` tiles of values */
    static constexpr size_t bytes(int tiles) {
        return (CHUNK * TROW + 6 * SP + F + 2 * CHUNK) * sizeof(float) + (2 * CHUNK * FROW + HS * FROW + CHUNK * SP + tiles * STAGES * CHUNK * VROW) * sizeof(floatX);
    }
};

/* at least so many CTAs a multiprocessor: registers are limited to what their memory allows */
template <int HS, int SP> constexpr int scan_ctas = HS <= 64 && SP == 16 && sizeof(floatX) == 2 ? 3 : 1;

template <int HS, int SP> struct ScanRoom {
    float *table, *shift, *lag, *z, *delta, *rho;
    floatX *fq, *fk, *H, *r, *tiles;
};

template <int HS, int SP> __device__ static inline ScanRoom<HS, SP> scan_room(char *memory) {
    using Shape = ScanShape<HS, SP>;
    ScanRoom<HS, SP> m;
    m.table = (float *)memory, m.shift = m.table + CHUNK * Shape::TROW, m.lag = m.shift + 3 * SP;
    m.z = m.lag + 3 * SP, m.delta = m.z + Shape::F, m.rho = m.delta + CHUNK;
    m.fq = (floatX *)(m.rho + CHUNK), m.fk = m.fq + CHUNK * Shape::FROW, m.H = m.fk + CHUNK * Shape::FROW, m.r = m.H + HS * Shape::FROW, m.tiles = m.r + CHUNK * SP;
    return m;
}

/* shift (3, SP): what n tokens do to a state: decay, and decay times cosine and sine */
template <int SP> __device__ static inline void scan_shift_table(float *shift, const ScanInput &in, size_t splats, size_t n) {
    for (int s = threadIdx.x; s < SP; s += 128) {
        float fade = expf(-in.tables.decay[splats + s] * (float)n), sine = 0, cosine = 1;
        if (in.tables.steps) fast_sincos(wave_angle(in.tables.steps[splats + s], n), &sine, &cosine);
        shift[s] = fade, shift[SP + s] = fade * cosine, shift[2 * SP + s] = fade * sine;
    }
}

/* table (CHUNK, TROW), in the order of columns: growth e^(delta a) of the key features' constant parts at each position of a chunk, their sqrt 1/2 included; cosines and
   sines. lag (3, SP): what turns these into the queries': the factor of 1 / growth, and the cosine and sine of theta late. */
template <int HS, int SP> __device__ static inline void scan_tables(const ScanRoom<HS, SP> &m, const ScanInput &in, size_t splats) {
    constexpr int TROW = ScanShape<HS, SP>::TROW;
    bool waves = in.tables.steps != NULL;
    for (int i = threadIdx.x; i < CHUNK * SP; i += 128) {
        int s = i % SP, a = i / SP, at = a - CHUNK / 2;
        float *pair = m.table + a * TROW + SP + 2 * s;
        m.table[a * TROW + s / 8 * 8 + s % 4 * 2 + s % 8 / 4] = (waves ? 0.70710678f : 1) * expf(in.tables.decay[splats + s] * (float)at);
        pair[0] = pair[1] = 0;
        if (waves) fast_sincos(wave_angle(in.tables.steps[splats + s], (size_t)(uint32_t)at), pair + 1, pair); /* positions wrap as phases do */
    }
    for (int s = threadIdx.x; s < SP; s += 128) {
        m.lag[s] = (waves ? 0.5f : 1) * expf(-in.tables.decay[splats + s] * (float)in.late);
        m.lag[SP + s] = 1, m.lag[2 * SP + s] = 0;
        if (waves) fast_sincos(wave_angle(in.tables.steps[splats + s], (size_t)in.late), m.lag + 2 * SP + s, m.lag + SP + s);
    }
}

/* Where a CTA works. Scan position p is token p, or the p-th from the end; its key is that of token p - late. */
struct ScanPlace {
    size_t b, h, bh, splats, rows; /* sequence, head, sequence x listed head, first splat in the tables, first number of the head's rows of one (B, NH, T) */
    int T, keys, start, chunks, late, g; /* keys: so many are met */
    int query0, key0, sign;              /* tokens of scan position 0, and where the next is */
    __device__ inline int query(int p) const { return query0 + sign * p; } /* its token; not in 0 .. T - 1: there is none */
    __device__ inline int key(int p) const { return key0 + sign * p; }     /* not in 0 .. keys - 1: there is none */
    __device__ inline bool has_query(int token) const { return (unsigned)token < (unsigned)T; }
    __device__ inline bool has_key(int token) const { return (unsigned)token < (unsigned)keys; }
};

__device__ static inline ScanPlace scan_place(const ScanInput &in) {
    ScanPlace w;
    size_t i = blockIdx.x / in.segments % in.heads.count;
    w.bh = blockIdx.x / in.segments, w.g = (int)(blockIdx.x % in.segments);
    w.b = w.bh / in.heads.count, w.h = in.heads.head[i];
    w.splats = (in.first_head + i) * in.tables.SP, w.rows = (w.b * in.NH + w.h) * in.T;
    size_t first = w.g * in.segment, end = first + in.segment < in.T ? first + in.segment : in.T;
    w.T = (int)in.T, w.start = (int)first, w.chunks = first < end ? (int)CEIL_DIV(end - first, (size_t)CHUNK) : 0;
    w.late = in.late, w.sign = in.reverse ? -1 : 1, w.query0 = in.reverse ? w.T - 1 : 0, w.key0 = in.reverse ? w.T - 1 : -w.late;
    w.keys = in.reverse ? w.T : w.late < w.T ? w.T - w.late : 0;
    return w;
}

/* The values (or dout) of one chunk into a tile, in the background; zeros where there is no token. base: the head's columns of the sequence's first token */
template <int HS, int SP, bool KEYS> __device__ static inline void scan_load(floatX *tile, const floatX *base, size_t stride, const ScanPlace &w, int p0) {
    constexpr int ROWS = 128 / (HS / 8);
    int a = threadIdx.x / (HS / 8), c = threadIdx.x % (HS / 8) * 8, token = KEYS ? w.key(p0 + a) : w.query(p0 + a);
#pragma unroll
    for (int i = 0; i < CHUNK; i += ROWS, token += w.sign * ROWS) {
        bool inside = KEYS ? w.has_key(token) : w.has_query(token);
        copy_pack(tile + (a + i) * ScanShape<HS, SP>::VROW + c, base + (size_t)(uint32_t)(inside ? token : 0) * (uint32_t)stride + c, inside);
    }
}

/* Responses on their way to features: of its row of a chunk, 16 warp + lane % 16, a thread has every second group of eight splats. Eight neighbours' rows do not meet in a bank. */
template <int SP> struct ScanResponses {
    Pack q[SP / 16], k[SP / 16];
    float rho;
};
__device__ static inline int scan_row(void) { return (int)threadIdx.x / 32 * 16 + (int)threadIdx.x % 16; }
__device__ static inline int scan_group(int u) { return (int)threadIdx.x % 32 / 16 + 2 * u; }

template <int SP> __device__ static inline ScanResponses<SP> scan_fetch(const ScanInput &in, const ScanPlace &w, const float *rho, int p0) {
    ScanResponses<SP> x;
    const floatX *r = in.responses + w.bh * in.T * SP, *phi = r + in.B * in.heads.count * in.T * SP;
    int query = w.query(p0 + scan_row()), key = w.key(p0 + scan_row());
#pragma unroll
    for (int u = 0; u < SP / 16; u++) {
        x.q[u] = x.k[u] = Pack{};
        if (w.has_query(query)) x.q[u] = load_pack(r + (size_t)(uint32_t)query * SP + 8 * scan_group(u));
        if (w.has_key(key)) x.k[u] = load_pack(phi + (size_t)(uint32_t)key * SP + 8 * scan_group(u));
    }
    x.rho = !rho ? 1 : w.has_query(query) ? rho[w.rows + query] : 0;
    return x;
}

/* Features (CHUNK, FROW) of queries, where wanted, and of keys, where wanted: responses (queries': times rho) times what the table says. late: queries' differ from keys' */
template <int HS, int SP> __device__ static inline void scan_features(const ScanRoom<HS, SP> &m, const ScanResponses<SP> &response, bool queries, bool keys, bool late) {
    using Shape = ScanShape<HS, SP>;
    int a = scan_row();
#pragma unroll
    for (int u = 0; u < SP / 16; u++) {
        int group = scan_group(u);
        const float *table = m.table + a * Shape::TROW;
        float growth[8], waves[16], x[8], f[16];
        load_floats(growth, table + 8 * group), load_floats(waves, table + SP + 16 * group), load_floats(waves + 8, table + SP + 16 * group + 8);
        if (keys) {
            floatX *to = m.fk + a * Shape::FROW;
#pragma unroll
            for (int c = 0; c < 8; c++) { /* column c has splat s */
                int s = c % 2 * 4 + c / 2;
                f[c] = x[s] = number(response.k[u], s) * growth[c];
            }
            *(Pack *)(to + 8 * group) = make_pack(f);
#pragma unroll
            for (int s = 0; s < 8; s++) f[2 * s] = x[s] * waves[2 * s], f[2 * s + 1] = x[s] * waves[2 * s + 1];
            *(Pack *)(to + SP + 16 * group) = make_pack(f), *(Pack *)(to + SP + 16 * group + 8) = make_pack(f + 8);
        }
        if (queries) {
            floatX *to = m.fq + a * Shape::FROW;
            float lag[8];
            load_floats(lag, m.lag + 8 * group);
#pragma unroll
            for (int c = 0; c < 8; c++) {
                int s = c % 2 * 4 + c / 2;
                f[c] = x[s] = number(response.q[u], s) * response.rho * lag[s] * fast_reciprocal(growth[c]);
            }
            *(Pack *)(to + 8 * group) = make_pack(f);
            if (late) { /* turned on by theta late */
                float cosine[8], sine[8];
                load_floats(cosine, m.lag + SP + 8 * group), load_floats(sine, m.lag + 2 * SP + 8 * group);
#pragma unroll
                for (int s = 0; s < 8; s++) {
                    float c = waves[2 * s], z = waves[2 * s + 1];
                    waves[2 * s] = c * cosine[s] - z * sine[s], waves[2 * s + 1] = z * cosine[s] + c * sine[s];
                }
            }
#pragma unroll
            for (int s = 0; s < 8; s++) f[2 * s] = x[s] * waves[2 * s], f[2 * s + 1] = x[s] * waves[2 * s + 1];
            *(Pack *)(to + SP + 16 * group) = make_pack(f), *(Pack *)(to + SP + 16 * group + 8) = make_pack(f + 8);
        }
    }
}

/* A warp's 16 rows of an accumulator (16, HS) to memory, by way of its part of m.r, so that rows leave in pieces of 16 bytes. row(a): where row a of the chunk belongs, NULL:
   nowhere; keep(a): that much of what is there is added, where asked. */
template <int HS, int SP, typename Row, typename Keep> __device__ static inline void scan_store_rows(floatX *room, float (&x)[HS / 8][4], bool add, Row row, Keep keep) {
    constexpr int ROWS = 256 / SP, TIMES = 16 / ROWS; /* rows at a time */
    int warp = warp_index(), lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, column = lane % (SP / 8) * 8;
    floatX *own = room + 16 * warp * SP, *to[TIMES];
    float factor[TIMES];
#pragma unroll
    for (int i = 0; i < TIMES; i++) {
        int a = lane / (SP / 8) + ROWS * i;
        to[i] = row(16 * warp + a), factor[i] = add ? keep(a) : 0;
    }
#pragma unroll
    for (int c = 0; c < HS; c += SP) {
        __syncwarp();
#pragma unroll
        for (int n = 0; n < SP / 8; n++) store_two(own + g * SP + 8 * n + 2 * t, x[c / 8 + n][0], x[c / 8 + n][1]), store_two(own + (g + 8) * SP + 8 * n + 2 * t, x[c / 8 + n][2], x[c / 8 + n][3]);
        __syncwarp();
#pragma unroll
        for (int i = 0; i < TIMES; i++) {
            if (!to[i]) continue;
            Pack p = *(const Pack *)(own + (lane / (SP / 8) + ROWS * i) * SP + column);
            if (add) {
                Pack old = load_pack(to[i] + c + column);
                float v[8];
#pragma unroll
                for (int e = 0; e < 8; e++) v[e] = number(p, e) + factor[i] * number(old, e);
                p = make_pack(v);
            }
            store_whole(to[i] + c + column, p);
        }
    }
    __syncwarp();
}

/* ---- the state

   h[m][n]: rows 16 (warp + 4m) .. of H^T (HS, F), tile n of its columns; z of tiles 2n and 2n + 1 in warp n % 4, the same in all rows of the tile. */
template <int HS, int SP> struct ScanState {
    using Shape = ScanShape<HS, SP>;
    float h[Shape::M][Shape::TILES][4], z[Shape::OWN][2][4];

    __device__ inline void clear() {
#pragma unroll
        for (int i = 0; i < Shape::M * Shape::TILES * 4; i++) h[i / (Shape::TILES * 4)][i / 4 % Shape::TILES][i % 4] = 0;
#pragma unroll
        for (int i = 0; i < Shape::OWN * 8; i++) z[i / 8][i / 4 % 2][i % 4] = 0;
    }

    __device__ inline void load(const float *from, bool add) {
        int warp = warp_index(), t = threadIdx.x % 4;
#pragma unroll
        for (int i = 0; i < Shape::M * Shape::TILES * 4; i++) {
            float *to = &h[i / (Shape::TILES * 4)][i / 4 % Shape::TILES][i % 4];
            *to = from[i * 128 + threadIdx.x] + (add ? *to : 0);
        }
        from += 64 * Shape::M * Shape::F;
#pragma unroll
        for (int i = 0; i < Shape::OWN * 8; i++) {
            int n = 2 * (warp + 4 * (i / 8)) + i / 4 % 2;
            if (n < Shape::TILES) z[i / 8][i / 4 % 2][i % 4] = from[8 * n + 2 * t + i % 2] + (add ? z[i / 8][i / 4 % 2][i % 4] : 0);
        }
    }

    __device__ inline void put_z(float *to) const {
        int warp = warp_index(), lane = threadIdx.x % 32;
#pragma unroll
        for (int i = 0; i < Shape::OWN * 2; i++) {
            int n = 2 * (warp + 4 * (i / 2)) + i % 2;
            if (n < Shape::TILES && lane < 4) *(float2 *)(to + 8 * n + 2 * lane) = make_float2(z[i / 2][i % 2][0], z[i / 2][i % 2][1]);
        }
    }

    __device__ inline void store(float *to) const {
#pragma unroll
        for (int i = 0; i < Shape::M * Shape::TILES * 4; i++) to[i * 128 + threadIdx.x] = h[i / (Shape::TILES * 4)][i / 4 % Shape::TILES][i % 4];
        put_z(to + 64 * Shape::M * Shape::F);
    }

    /* H^T (HS, FROW) and z (F), for the products of a chunk */
    __device__ inline void share(const ScanRoom<HS, SP> &m) const {
        int warp = warp_index(), lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
        for (int i = 0; i < Shape::M; i++)
#pragma unroll
            for (int n = 0; n < Shape::TILES; n++) {
                floatX *to = m.H + (16 * (warp + 4 * i) + g) * Shape::FROW + 8 * n + 2 * t;
                if (16 * (warp + 4 * i) < HS) store_two(to, h[i][n][0], h[i][n][1]), store_two(to + 8 * Shape::FROW, h[i][n][2], h[i][n][3]);
            }
        put_z(m.z);
    }

    /* Moves the origin as scan_shift_table was asked to; transposed: what that does to a gradient. */
    __device__ inline void shift(const float *table, bool transposed) {
        int warp = warp_index(), t = threadIdx.x % 4;
        auto turn = [](float &x, float &y, float cosine, float sine) {
            float old = x;
            x = cosine * old + sine * y, y = cosine * y - sine * old;
        };
#pragma unroll
        for (int j = 0; j < SP / 4; j++) { /* splat 4j + t: column j % 2 of tile j / 2, and the pair of tile SP / 8 + j */
            float fade = table[4 * j + t], cosine = table[SP + 4 * j + t], sine = transposed ? -table[2 * SP + 4 * j + t] : table[2 * SP + 4 * j + t];
#pragma unroll
            for (int m = 0; m < Shape::M; m++)
#pragma unroll
                for (int r = 0; r < 2; r++) {
                    h[m][j / 2][2 * r + j % 2] *= fade;
                    turn(h[m][SP / 8 + j][2 * r], h[m][SP / 8 + j][2 * r + 1], cosine, sine);
                }
        }
#pragma unroll
        for (int i = 0; i < Shape::OWN * 2; i++) {
            int n = 2 * (warp + 4 * (i / 2)) + i % 2;
            float *x = z[i / 2][i % 2];
            if (n < SP / 8)
#pragma unroll
                for (int e = 0; e < 4; e++) x[e] *= table[8 * n + 4 * (e % 2) + t];
            else if (n < Shape::TILES) {
                int s = 4 * (n - SP / 8) + t;
                float cosine = table[SP + s], sine = transposed ? -table[2 * SP + s] : table[2 * SP + s];
                turn(x[0], x[1], cosine, sine), turn(x[2], x[3], cosine, sine);
            }
        }
    }

    /* h += tile^T features, z += weights^T features over the tokens of a chunk; weights NULL: ones. Weights go in two parts, as rounded and the rest. */
    __device__ inline void absorb(const floatX *tile, const floatX *features, const float *weights) {
        int warp = warp_index(), t = threadIdx.x % 4;
#pragma unroll
        for (int k = 0; k < CHUNK / 16; k++) {
            FragmentA a[Shape::M], whole, rest;
#pragma unroll
            for (int m = 0; m < Shape::M; m++)
                if (16 * (warp + 4 * m) < HS) a[m] = load_a<true>(tile, Shape::VROW, 16 * k, 16 * (warp + 4 * m));
            if (weights) {
                const float *w = weights + 16 * k + 2 * t;
                whole = fill_fragment(w[0], w[1], w[8], w[9]);
                rest = fill_fragment(w[0] - fragment_number(whole, 0), w[1] - fragment_number(whole, 1), w[8] - fragment_number(whole, 4), w[9] - fragment_number(whole, 5));
            } else whole = fill_fragment(1, 1, 1, 1);
#pragma unroll
            for (int n = 0; n < Shape::PAIRS; n++) {
                FragmentB b[2];
                load_b<true>(b, features, Shape::FROW, 16 * k, 16 * n);
#pragma unroll
                for (int m = 0; m < Shape::M; m++)
                    if (16 * (warp + 4 * m) < HS) mma_16x8x16(h[m][2 * n], a[m], b[0]), mma_16x8x16(h[m][2 * n + 1], a[m], b[1]);
                if (n % 4 != warp) continue;
                mma_16x8x16(z[n / 4][0], whole, b[0]), mma_16x8x16(z[n / 4][1], whole, b[1]);
                if (weights) mma_16x8x16(z[n / 4][0], rest, b[0]), mma_16x8x16(z[n / 4][1], rest, b[1]);
            }
        }
    }
};

/* ---- kernels */

/* Of each query: N = sum_j w_ij v_j and D = sum_j w_ij, hence out and rho, by mode:
     SCAN_ALONE   out = N / (D + eps), rho = 1 / (D + eps)
     SCAN_FIRST   of two scans: out = N / D, rho = D
     SCAN_SECOND  the other one: from what the first left, out and rho of both together
     SCAN_MERGED  equation (12): from out and lse of the softmax nearby, those of both; rho as there
   SCAN_SUMS: only the state at the end of each segment, from zero at its start, into states. Otherwise states are those at the segments' starts; NULL: zero. */
template <int HS, int SP>
__global__ static void __launch_bounds__(128, scan_ctas<HS, SP>) scan_forward_kernel(floatX *out, float *lse, float *rho, float *states, const float *lng, int mode, const __grid_constant__ ScanInput in) {
    using Shape = ScanShape<HS, SP>;
    constexpr int FROW = Shape::FROW, VROW = Shape::VROW;
    extern __shared__ __align__(1024) char memory[];
    ScanRoom<HS, SP> m = scan_room<HS, SP>(memory);
    ScanPlace w = scan_place(in);
    int warp = warp_index(), lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    size_t C = in.NH * HS;
    const floatX *values = in.qkv + w.b * in.T * 3 * C + 2 * C + w.h * HS;
    ScanState<HS, SP> state;
    state.clear();
    if (mode != SCAN_SUMS && states) state.load(states + blockIdx.x * Shape::STATE, false);
    scan_tables(m, in, w.splats);
    scan_shift_table<SP>(m.shift, in, w.splats, CHUNK);
    ScanResponses<SP> next = scan_fetch<SP>(in, w, NULL, w.start);
    scan_load<HS, SP, true>(m.tiles, values, 3 * C, w, w.start);
    copies_commit();
    for (int c = 0; c < w.chunks; c++) {
        int p0 = w.start + c * CHUNK;
        const floatX *v = m.tiles + c % Shape::STAGES * CHUNK * VROW;
        copies_wait();
        __syncthreads(); /* the values have arrived, and all have finished with the chunk before (at first: the tables are there) */
        scan_features(m, next, mode != SCAN_SUMS, true, w.late > 0);
        if (mode != SCAN_SUMS) state.share(m);
        next = scan_fetch<SP>(in, w, NULL, p0 + CHUNK);
        if (Shape::STAGES == 2 && c + 1 < w.chunks) scan_load<HS, SP, true>(m.tiles + (c + 1) % 2 * CHUNK * VROW, values, 3 * C, w, p0 + CHUNK);
        copies_commit();
        __syncthreads();
        if (mode != SCAN_SUMS) {
            float p[8][4] = {}, o[HS / 8][4] = {}, sum[2] = {}, constant[2] = {}; /* this thread's part of D and of D0 in its two rows */
#pragma unroll
            for (int k = 0; k < Shape::F / 16; k++) {
                FragmentA a = load_a<false>(m.fq, FROW, 16 * warp, 16 * k);
                FragmentB b[2];
#pragma unroll
                for (int n = 0; n < 8; n += 2)
                    if (n / 2 <= warp) load_b<false>(b, m.fk, FROW, 8 * n, 16 * k), mma_16x8x16(p[n], a, b[0]), mma_16x8x16(p[n + 1], a, b[1]);
#pragma unroll
                for (int n = 0; n < HS / 8; n += 2) load_b<false>(b, m.H, FROW, 8 * n, 16 * k), mma_16x8x16(o[n], a, b[0]), mma_16x8x16(o[n + 1], a, b[1]);
#pragma unroll
                for (int i = 0; i < 8; i++) {
                    float part = fragment_number(a, i) * m.z[16 * k + 2 * t + i % 2 + i / 4 * 8];
                    sum[i / 2 % 2] += part;
                    if (k < SP / 16) constant[i / 2 % 2] += part;
                }
                if (k != SP / 16 - 1) continue;
#pragma unroll
                for (int n = 0; n < 4; n++) {
                    if (n < warp)
#pragma unroll
                        for (int i = 0; i < 8; i++) constant[i / 2 % 2] += p[2 * n + i / 4][i % 4];
                    if (n == warp)
#pragma unroll
                        for (int i = 0; i < 8; i++)
                            if (8 * (i / 4) + 2 * t + i % 2 + in.reverse <= g + i / 2 % 2 * 8) constant[i / 2 % 2] += p[2 * n + i / 4][i % 4];
                }
            }
#pragma unroll
            for (int k = 0; k < CHUNK / 16; k++) {
                if (k > warp) continue;
                if (k == warp)
#pragma unroll
                    for (int i = 0; i < 8; i++)
                        if (8 * (i / 4) + 2 * t + i % 2 + in.reverse > g + i / 2 % 2 * 8) p[2 * k + i / 4][i % 4] = 0;
                FragmentA a = as_fragment(p[2 * k], p[2 * k + 1]);
                FragmentB b[2];
#pragma unroll
                for (int i = 0; i < 8; i++) sum[i / 2 % 2] += p[2 * k + i / 4][i % 4];
#pragma unroll
                for (int n = 0; n < HS / 8; n += 2) load_b<true>(b, v, VROW, 16 * k, 8 * n), mma_16x8x16(o[n], a, b[0]), mma_16x8x16(o[n + 1], a, b[1]);
            }
            float before[2], keep[2] = {}; /* what an earlier kernel left of the row, and how much of its output stays */
#pragma unroll
            for (int r = 0; r < 2; r++) {
                int token = w.query(p0 + 16 * warp + g + 8 * r);
                before[r] = mode < SCAN_SECOND || !w.has_query(token) ? 0 : mode == SCAN_SECOND ? rho[w.rows + token] : lse[w.rows + token];
            }
            __syncwarp(); /* one thread of four will overwrite it */
#pragma unroll
            for (int r = 0; r < 2; r++) {
                int token = w.query(p0 + 16 * warp + g + 8 * r);
                float D0 = quad_sum(constant[r]), D = quad_sum(sum[r]) + (float)ROW_SUM_ROUNDING * D0, left = before[r], kept = 0, factor = 0;
#ifndef GSA_FP32
                D = fmaxf(D, D0 / 128); /* where cosines cancel the rounding of features is left */
#endif
                if (mode == SCAN_ALONE) factor = kept = 1 / (D + (float)ROW_SUM_EPSILON);
                else if (mode == SCAN_FIRST) factor = D > 0 ? 1 / D : 0, kept = D > 0 ? D : 0;
                else if (mode == SCAN_SECOND) factor = kept = 1 / (left + D + (float)ROW_SUM_EPSILON), keep[r] = left * factor;
                else {
                    keep[r] = 1;
                    if (D > 0) {
                        float far = lng[w.splats / in.tables.SP] + in.tables.key_scale[w.splats / in.tables.SP] + logf(D), most = fmaxf(far, left);
                        left = most + logf(expf(far - most) + expf(left - most));
                        float share = expf(far - left);
                        factor = kept = share / D, keep[r] = 1 - share;
                    }
                }
                if (t == 0 && w.has_query(token)) {
                    rho[w.rows + token] = kept;
                    if (mode == SCAN_MERGED) lse[w.rows + token] = left;
                }
#pragma unroll
                for (int n = 0; n < HS / 8; n++) o[n][2 * r] *= factor, o[n][2 * r + 1] *= factor;
            }
            auto row = [&](int a) {
                int token = w.query(p0 + a);
                return w.has_query(token) ? out + (w.b * in.T + (uint32_t)token) * C + w.h * HS : NULL;
            };
            scan_store_rows<HS, SP>(m.r, o, mode >= SCAN_SECOND, row, [&](int a) {
                float low = __shfl_sync(~0u, keep[0], a % 8 * 4), high = __shfl_sync(~0u, keep[1], a % 8 * 4);
                return a < 8 ? low : high;
            });
        }
        state.absorb(v, m.fk, NULL);
        state.shift(m.shift, false);
        if (Shape::STAGES == 1) {
            __syncthreads();
            if (c + 1 < w.chunks) scan_load<HS, SP, true>(m.tiles, values, 3 * C, w, p0 + CHUNK);
        }
    }
    if (mode == SCAN_SUMS) state.store(states + blockIdx.x * Shape::STATE);
}

/* states (B, heads, segments) from the sums of segments: what has gathered before each; backward: from the end, the gradients */
template <int HS, int SP> __global__ static void __launch_bounds__(128) scan_merge_kernel(float *__restrict__ states, const float *__restrict__ sums, bool backward, const __grid_constant__ ScanInput in) {
    constexpr size_t STATE = ScanShape<HS, SP>::STATE;
    __shared__ float shift[3 * SP];
    ScanState<HS, SP> state;
    scan_shift_table<SP>(shift, in, (in.first_head + blockIdx.x % in.heads.count) * in.tables.SP, in.segment);
    __syncthreads();
    state.clear();
#pragma unroll 1
    for (int i = 0; i < in.segments; i++) {
        size_t at = ((size_t)blockIdx.x * in.segments + (backward ? in.segments - 1 - i : i)) * STATE;
        state.store(states + at);
        state.shift(shift, backward);
        state.load(sums + at, true);
    }
}

/* records (heads, sweeps, B, segments, record) */
template <int SP> __device__ static inline float *scan_record_at(float *records, const ScanInput &in, const ScanPlace &w, int sweep) {
    return records + (((w.bh % in.heads.count * in.sweeps + 2 * in.reverse + sweep) * in.B + w.b) * in.segments + w.g) * (3 * SP + 1);
}

/* One record of a sweep: d ln alpha (SP), d theta (SP), d delta (SP), d ln g, summed over the CTA's threads in a fixed order. */
template <int SP> __device__ static inline void scan_record(float *record, float *shared, float (&amplitude)[SP / 4], float (&frequency)[SP / 4], float (&decay)[SP / 4], float gain) {
    constexpr int RECORD = 3 * SP + 1;
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    __syncthreads();
    auto put = [&](float x, int at, bool all) {
        if (all) x = quad_sum(x);
        for (int other = 4; other < 32; other *= 2) x += __shfl_xor_sync(~0u, x, other);
        if (all ? lane == 0 : lane < 4) shared[warp * RECORD + at + (all ? 0 : lane)] = x;
    };
#pragma unroll
    for (int j = 0; j < SP / 4; j++) put(amplitude[j], 4 * j, false), put(frequency[j], SP + 4 * j, false), put(decay[j], 2 * SP + 4 * j, false);
    put(gain, 3 * SP, true);
    __syncthreads();
    for (int i = threadIdx.x; i < RECORD; i += 128) record[i] = ((shared[i] + shared[RECORD + i]) + shared[2 * RECORD + i]) + shared[3 * RECORD + i];
}

/* A warp's 16 rows of gradients of responses, from columns 0 .. SP - 1 of its rows of a tile of features, to memory. token(row): -1: none */
template <int HS, int SP, typename Token> __device__ static inline void scan_store_gradients(floatX *to, const floatX *tile, bool add, Token token) {
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (int i = lane; i < 16 * SP / 8; i += 32) {
        int a = 16 * warp + i / (SP / 8), c = i % (SP / 8) * 8, row = token(a);
        if (row < 0) continue;
        Pack p = *(const Pack *)(tile + a * ScanShape<HS, SP>::FROW + c), old = {};
        floatX *at = to + (size_t)row * SP + c;
        if (add) old = load_pack(at);
        float x[8];
        for (int e = 0; e < 8; e++) x[e] = number(p, e) + number(old, e);
        store_pack(at, x);
    }
}

/* Backward, forwards in time: with dw_ij = rho_i (do_i . v_j - Delta_i), Delta_i = do_i . o_i (written), df_q(i) = sum_j dw_ij f_k(j), Q = f_q df_q and X in the
   sums of theta and delta, which count positions from the middle of blocks of SCAN_BLOCK tokens: see scan_keys_kernel for the rest.
   gradients (B, heads, T, SP): those of the logits of r, dl = Q - r sum Q; added to where `add`. blocks: the states at the entry of each block are kept there. */
template <int HS, int SP>
__global__ static void __launch_bounds__(128, scan_ctas<HS, SP>) scan_queries_kernel(floatX *gradients, float *delta, float *blocks, float *records, const float *states, const floatX *dout, const floatX *out,
                                                                  const float *rho, bool add, const __grid_constant__ ScanInput in) {
    using Shape = ScanShape<HS, SP>;
    constexpr int FROW = Shape::FROW, VROW = Shape::VROW;
    extern __shared__ __align__(1024) char memory[];
    ScanRoom<HS, SP> m = scan_room<HS, SP>(memory);
    ScanPlace w = scan_place(in);
    int warp = warp_index(), lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    size_t C = in.NH * HS, in_out = w.b * in.T * C + w.h * HS, block_count = CEIL_DIV(in.T, (size_t)SCAN_BLOCK);
    const floatX *values = in.qkv + w.b * in.T * 3 * C + 2 * C + w.h * HS;
    ScanState<HS, SP> state;
    state.clear();
    if (states) state.load(states + blockIdx.x * Shape::STATE, false);
    float amplitude[SP / 4] = {}, frequency[SP / 4] = {}, decay[SP / 4] = {}, gain = 0;
    scan_tables(m, in, w.splats);
    scan_shift_table<SP>(m.shift, in, w.splats, CHUNK);
    auto load = [&](int stage, int p0) {
        floatX *tile = m.tiles + stage * 2 * CHUNK * VROW;
        scan_load<HS, SP, true>(tile, values, 3 * C, w, p0);
        scan_load<HS, SP, false>(tile + CHUNK * VROW, dout + in_out, C, w, p0);
    };
    ScanResponses<SP> next = scan_fetch<SP>(in, w, NULL, w.start);
    load(0, w.start);
    copies_commit();
    for (int c = 0; c < w.chunks; c++) {
        int p0 = w.start + c * CHUNK;
        const floatX *v = m.tiles + c % Shape::STAGES * 2 * CHUNK * VROW, *d = v + CHUNK * VROW;
        int a = threadIdx.x / 2, part = threadIdx.x % 2 * (HS / 2), token = w.query(p0 + a); /* this thread's half of a row of dout and out */
        Pack o[HS / 16];
#pragma unroll
        for (int k = 0; k < HS / 16; k++) {
            o[k] = Pack{};
            if (w.has_query(token)) o[k] = load_pack(out + in_out + (uint32_t)token * C + part + 8 * k);
        }
        float row_factor = w.has_query(token) ? rho[w.rows + token] : 0;
        copies_wait();
        __syncthreads();
        scan_features(m, next, true, true, w.late > 0);
#pragma unroll
        for (int u = 0; u < Shape::TASKS; u++) *(Pack *)(m.r + scan_row() * SP + 8 * scan_group(u)) = next.q[u];
        state.share(m);
        if (p0 % SCAN_BLOCK == 0) state.store(blocks + (w.bh * block_count + p0 / SCAN_BLOCK) * Shape::STATE);
        float sum = 0;
#pragma unroll
        for (int k = 0; k < HS / 16; k++) {
            Pack x = *(const Pack *)(d + a * VROW + part + 8 * k);
#pragma unroll
            for (int e = 0; e < 8; e++) sum += number(x, e) * number(o[k], e);
        }
        sum += __shfl_xor_sync(~0u, sum, 1);
        if (part == 0) {
            m.delta[a] = sum, m.rho[a] = row_factor;
            if (w.has_query(token)) delta[w.rows + token] = sum;
        }
        next = scan_fetch<SP>(in, w, NULL, p0 + CHUNK);
        if (Shape::STAGES == 2 && c + 1 < w.chunks) load((c + 1) % 2, p0 + CHUNK);
        copies_commit();
        __syncthreads();

        float dp[8][4] = {}, df[Shape::TILES][4] = {};
#pragma unroll
        for (int k = 0; k < HS / 16; k++) {
            FragmentA a = load_a<false>(d, VROW, 16 * warp, 16 * k);
            FragmentB b[2];
#pragma unroll
            for (int n = 0; n < 8; n += 2)
                if (n / 2 <= warp) load_b<false>(b, v, VROW, 8 * n, 16 * k), mma_16x8x16(dp[n], a, b[0]), mma_16x8x16(dp[n + 1], a, b[1]);
#pragma unroll
            for (int n = 0; n < Shape::TILES; n += 2) load_b<true>(b, m.H, FROW, 16 * k, 8 * n), mma_16x8x16(df[n], a, b[0]), mma_16x8x16(df[n + 1], a, b[1]);
        }
        float row_delta[2] = {m.delta[16 * warp + g], m.delta[16 * warp + g + 8]}, row_rho[2] = {m.rho[16 * warp + g], m.rho[16 * warp + g + 8]};
#pragma unroll
        for (int n = 0; n < Shape::TILES; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) df[n][i] -= row_delta[i / 2] * m.z[8 * n + 2 * t + i % 2];
#pragma unroll
        for (int k = 0; k < CHUNK / 16; k++) {
            if (k > warp) continue;
#pragma unroll
            for (int i = 0; i < 8; i++) dp[2 * k + i / 4][i % 4] -= row_delta[i / 2 % 2];
            if (k == warp)
#pragma unroll
                for (int i = 0; i < 8; i++)
                    if (8 * (i / 4) + 2 * t + i % 2 + in.reverse > g + i / 2 % 2 * 8) dp[2 * k + i / 4][i % 4] = 0;
            FragmentA a = as_fragment(dp[2 * k], dp[2 * k + 1]);
            FragmentB b[2];
#pragma unroll
            for (int n = 0; n < Shape::TILES; n += 2) load_b<true>(b, m.fk, FROW, 16 * k, 8 * n), mma_16x8x16(df[n], a, b[0]), mma_16x8x16(df[n + 1], a, b[1]);
        }
        float Q[2][SP / 4];
#pragma unroll
        for (int r = 0; r < 2; r++) {
            int a = 16 * warp + g + 8 * r;
            const floatX *f = m.fq + a * FROW;
            float at = (float)((p0 + a) % SCAN_BLOCK - SCAN_BLOCK / 2 + w.late), total = 0;
#pragma unroll
            for (int j = 0; j < SP / 4; j++) { /* splat 4j + t */
                float2 constants = load_two(f + j / 2 * 8 + 2 * t), wave = load_two(f + SP + 8 * j + 2 * t);
                float dc = row_rho[r] * df[SP / 8 + j][2 * r], ds = row_rho[r] * df[SP / 8 + j][2 * r + 1];
                float q = (j % 2 ? constants.y : constants.x) * row_rho[r] * df[j / 2][2 * r + j % 2] + wave.x * dc + wave.y * ds;
                frequency[j] += at * (wave.x * ds - wave.y * dc), decay[j] -= at * q;
                Q[r][j] = q, total += q;
            }
            gain += total;
            total = quad_sum(total);
#pragma unroll
            for (int j = 0; j < SP / 4; j++) {
                Q[r][j] -= (float)m.r[a * SP + 4 * j + t] * total;
                amplitude[j] += Q[r][j];
            }
        }
        __syncwarp(); /* the warp's rows of fq have been read */
#pragma unroll
        for (int i = 0; i < SP / 2; i++) m.fq[(16 * warp + g + i % 2 * 8) * FROW + i / 2 * 4 + t] = (floatX)Q[i % 2][i / 2];
        __syncwarp();
        scan_store_gradients<HS, SP>(gradients + w.bh * in.T * SP, m.fq, add, [&](int a) { return w.has_query(w.query(p0 + a)) ? w.query(p0 + a) : -1; });
        state.absorb(v, m.fk, NULL);
        state.shift(m.shift, false);
        if (Shape::STAGES == 1) {
            __syncthreads();
            if (c + 1 < w.chunks) load(0, p0 + CHUNK);
        }
    }
    scan_record<SP>(scan_record_at<SP>(records, in, w, 0), (float *)memory, amplitude, frequency, decay, gain);
}

/* Backward, backwards in time, with the gradient of the state: dH = sum f_q rho do^T, dz = -sum f_q rho Delta. Of each key df_k(j) = sum_i dw_ij f_q(i),
   K = f_k df_k, and dv_j = sum_i w_ij rho_i do_i. All products take f_q times rho.
     d delta = sum over tokens of n (K - Q) - 256 sum over block entries of dH . H,   d theta = sum n X - 256 sum (H_cos . dH_sin - H_sin . dH_cos)
   with n counted within blocks: with n over the whole sequence, rounded Q and K would be multiplied by all its length.
   gradients (B, heads, T, SP): K; dqkv: its third part. Both are added to where asked. sums instead of the rest: the gradient at the start of each segment. */
template <int HS, int SP>
__global__ static void __launch_bounds__(128, scan_ctas<HS, SP>) scan_keys_kernel(floatX *gradients, floatX *dqkv, float *sums, float *records, const float *states, const float *blocks, const floatX *dout,
                                                               const float *rho, const float *delta, bool add, bool add_values, const __grid_constant__ ScanInput in) {
    using Shape = ScanShape<HS, SP>;
    constexpr int FROW = Shape::FROW, VROW = Shape::VROW;
    extern __shared__ __align__(1024) char memory[];
    ScanRoom<HS, SP> m = scan_room<HS, SP>(memory);
    ScanPlace w = scan_place(in);
    int warp = warp_index(), lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    size_t C = in.NH * HS, in_qkv = w.b * in.T * 3 * C + 2 * C + w.h * HS, block_count = CEIL_DIV(in.T, (size_t)SCAN_BLOCK);
    ScanState<HS, SP> state; /* its gradient */
    state.clear();
    if (states) state.load(states + blockIdx.x * Shape::STATE, false);
    float amplitude[SP / 4] = {}, frequency[SP / 4] = {}, decay[SP / 4] = {};
    scan_tables(m, in, w.splats);
    scan_shift_table<SP>(m.shift, in, w.splats, CHUNK);
    auto load = [&](int stage, int p0) {
        floatX *tile = m.tiles + stage * 2 * CHUNK * VROW;
        if (!sums) scan_load<HS, SP, true>(tile, in.qkv + in_qkv, 3 * C, w, p0);
        scan_load<HS, SP, false>(tile + CHUNK * VROW, dout + w.b * in.T * C + w.h * HS, C, w, p0);
    };
    auto fetch_delta = [&](int p0) {
        int token = w.query(p0 + (int)threadIdx.x);
        return threadIdx.x < CHUNK && w.has_query(token) ? delta[w.rows + token] : 0;
    };
    int last = w.start + (w.chunks - 1) * CHUNK;
    ScanResponses<SP> next = {};
    float next_delta = 0;
    if (w.chunks) next = scan_fetch<SP>(in, w, rho, last), next_delta = fetch_delta(last), load(0, last);
    copies_commit();
    __syncthreads(); /* the shift */
    for (int c = 0; c < w.chunks; c++) {
        int p0 = last - c * CHUNK;
        const floatX *v = m.tiles + c % Shape::STAGES * 2 * CHUNK * VROW, *d = v + CHUNK * VROW;
        if (!sums && p0 > 0 && p0 % SCAN_BLOCK == 0) /* a state that this chunk's end will want */
            for (size_t i = threadIdx.x * 32; i < Shape::STATE; i += 128 * 32) prefetch(blocks + (w.bh * block_count + p0 / SCAN_BLOCK) * Shape::STATE + i);
        state.shift(m.shift, true);
        copies_wait();
        __syncthreads();
        scan_features(m, next, true, !sums, w.late > 0);
        if (threadIdx.x < CHUNK) m.delta[threadIdx.x] = -next_delta;
        if (!sums) state.share(m);
        if (c + 1 < w.chunks) {
            next = scan_fetch<SP>(in, w, rho, p0 - CHUNK), next_delta = fetch_delta(p0 - CHUNK);
            if (Shape::STAGES == 2) load((c + 1) % 2, p0 - CHUNK);
        }
        copies_commit();
        __syncthreads();
        if (!sums) {
            float p[8][4] = {};
            FragmentB b[2];
            {
                float dv[HS / 8][4] = {};
#pragma unroll
                for (int k = 0; k < Shape::F / 16; k++) {
                    FragmentA a = load_a<false>(m.fk, FROW, 16 * warp, 16 * k);
#pragma unroll
                    for (int n = 0; n < 8; n += 2)
                        if (n / 2 >= warp) load_b<false>(b, m.fq, FROW, 8 * n, 16 * k), mma_16x8x16(p[n], a, b[0]), mma_16x8x16(p[n + 1], a, b[1]);
#pragma unroll
                    for (int n = 0; n < HS / 8; n += 2) load_b<false>(b, m.H, FROW, 8 * n, 16 * k), mma_16x8x16(dv[n], a, b[0]), mma_16x8x16(dv[n + 1], a, b[1]);
                }
#pragma unroll
                for (int k = 0; k < CHUNK / 16; k++) {
                    if (k < warp) continue;
                    if (k == warp)
#pragma unroll
                        for (int i = 0; i < 8; i++)
                            if (8 * (i / 4) + 2 * t + i % 2 < g + i / 2 % 2 * 8 + in.reverse) p[2 * k + i / 4][i % 4] = 0;
                    FragmentA a = as_fragment(p[2 * k], p[2 * k + 1]);
#pragma unroll
                    for (int n = 0; n < HS / 8; n += 2) load_b<true>(b, d, VROW, 16 * k, 8 * n), mma_16x8x16(dv[n], a, b[0]), mma_16x8x16(dv[n + 1], a, b[1]);
                }
                auto row = [&](int a) {
                    int token = w.key(p0 + a);
                    return w.has_key(token) ? dqkv + in_qkv + (uint32_t)token * 3 * C : NULL;
                };
                scan_store_rows<HS, SP>(m.r, dv, add_values, row, [](int) { return 1.0f; });
            }
            float df[Shape::TILES][4];
#pragma unroll
            for (int n = 0; n < Shape::TILES; n++)
#pragma unroll
                for (int i = 0; i < 4; i++) df[n][i] = m.z[8 * n + 2 * t + i % 2];
#pragma unroll
            for (int i = 0; i < 32; i++) p[i / 4][i % 4] = 0;
#pragma unroll
            for (int k = 0; k < HS / 16; k++) {
                FragmentA a = load_a<false>(v, VROW, 16 * warp, 16 * k);
#pragma unroll
                for (int n = 0; n < 8; n += 2)
                    if (n / 2 >= warp) load_b<false>(b, d, VROW, 8 * n, 16 * k), mma_16x8x16(p[n], a, b[0]), mma_16x8x16(p[n + 1], a, b[1]);
#pragma unroll
                for (int n = 0; n < Shape::TILES; n += 2) load_b<true>(b, m.H, FROW, 16 * k, 8 * n), mma_16x8x16(df[n], a, b[0]), mma_16x8x16(df[n + 1], a, b[1]);
            }
#pragma unroll
            for (int k = 0; k < CHUNK / 16; k++) {
                if (k < warp) continue;
#pragma unroll
                for (int i = 0; i < 8; i++) p[2 * k + i / 4][i % 4] += m.delta[16 * k + 8 * (i / 4) + 2 * t + i % 2];
                if (k == warp)
#pragma unroll
                    for (int i = 0; i < 8; i++)
                        if (8 * (i / 4) + 2 * t + i % 2 < g + i / 2 % 2 * 8 + in.reverse) p[2 * k + i / 4][i % 4] = 0;
                FragmentA a = as_fragment(p[2 * k], p[2 * k + 1]);
#pragma unroll
                for (int n = 0; n < Shape::TILES; n += 2) load_b<true>(b, m.fq, FROW, 16 * k, 8 * n), mma_16x8x16(df[n], a, b[0]), mma_16x8x16(df[n + 1], a, b[1]);
            }
            float K[2][SP / 4];
#pragma unroll
            for (int r = 0; r < 2; r++) {
                int a = 16 * warp + g + 8 * r;
                const floatX *f = m.fk + a * FROW;
                float at = (float)((p0 + a) % SCAN_BLOCK - SCAN_BLOCK / 2);
#pragma unroll
                for (int j = 0; j < SP / 4; j++) {
                    float2 constants = load_two(f + j / 2 * 8 + 2 * t), wave = load_two(f + SP + 8 * j + 2 * t);
                    float dc = df[SP / 8 + j][2 * r], ds = df[SP / 8 + j][2 * r + 1];
                    K[r][j] = (j % 2 ? constants.y : constants.x) * df[j / 2][2 * r + j % 2] + wave.x * dc + wave.y * ds;
                    frequency[j] += at * (wave.x * ds - wave.y * dc), decay[j] += at * K[r][j];
                }
            }
            __syncwarp();
#pragma unroll
            for (int i = 0; i < SP / 2; i++) m.fk[(16 * warp + g + i % 2 * 8) * FROW + i / 2 * 4 + t] = (floatX)K[i % 2][i / 2];
            __syncwarp();
            scan_store_gradients<HS, SP>(gradients + w.bh * in.T * SP, m.fk, add, [&](int a) { return w.has_key(w.key(p0 + a)) ? w.key(p0 + a) : -1; });
        }
        state.absorb(d, m.fq, m.delta);
        if (!sums && p0 > 0 && p0 % SCAN_BLOCK == 0) {
            const float *H = blocks + (w.bh * block_count + p0 / SCAN_BLOCK) * Shape::STATE, *z = H + 64 * Shape::M * Shape::F;
            auto at = [&](int i, int n, int e) { return H[((i * Shape::TILES + n) * 4 + e) * 128 + threadIdx.x]; };
#pragma unroll
            for (int j = 0; j < SP / 4; j++) {
                int tile = SP / 8 + j, n = j / 2;
                float along = 0, across = 0;
#pragma unroll
                for (int i = 0; i < Shape::M; i++)
#pragma unroll
                    for (int r = 0; r < 2; r++) {
                        float x = at(i, tile, 2 * r), y = at(i, tile, 2 * r + 1), dx = state.h[i][tile][2 * r], dy = state.h[i][tile][2 * r + 1];
                        along += at(i, n, 2 * r + j % 2) * state.h[i][n][2 * r + j % 2] + x * dx + y * dy;
                        across += x * dy - y * dx;
                    }
                if (n / 2 % 4 == warp && g == 0) along += z[8 * n + 2 * t + j % 2] * state.z[n / 8][n % 2][j % 2];
                if (tile / 2 % 4 == warp && g == 0) {
                    float x = z[8 * tile + 2 * t], y = z[8 * tile + 2 * t + 1], dx = state.z[tile / 8][tile % 2][0], dy = state.z[tile / 8][tile % 2][1];
                    along += x * dx + y * dy, across += x * dy - y * dx;
                }
                decay[j] -= SCAN_BLOCK * along, frequency[j] -= SCAN_BLOCK * across;
            }
        }
        if (Shape::STAGES == 1) {
            __syncthreads();
            if (c + 1 < w.chunks) load(0, p0 - CHUNK);
        }
    }
    if (sums) state.store(sums + blockIdx.x * Shape::STATE);
    else scan_record<SP>(scan_record_at<SP>(records, in, w, 1), (float *)memory, amplitude, frequency, decay, 0);
}

/* ---- launchers */

/* Segments of a sequence, for so many heads of all sequences: a power of two that fills a card, each at least one block long. By shapes alone, as it is the
   order of sums. */
static int scan_segments(size_t heads, size_t T) {
    int segments = 1;
    while (heads * segments < SCAN_SEGMENTS_MOST / 2 && (size_t)segments * SCAN_BLOCK < T) segments *= 2;
    return segments;
}

static size_t scan_splats(size_t S) { return S <= 16 ? 16 : 32; }
static size_t scan_state_size(size_t HS, size_t SP) { return ((HS > 64 ? 128 : 64) + 1) * 3 * SP; }

/* Calls a kernel with HS and SP as constants. */
#define BY_SCAN_SIZE(HS, ...)                                                  \
    do {                                                                       \
        if ((HS) == 32) { constexpr int H = 32; __VA_ARGS__; }                 \
        else if ((HS) == 64) { constexpr int H = 64; __VA_ARGS__; }            \
        else { constexpr int H = 128; __VA_ARGS__; }                           \
        cudaCheck(cudaGetLastError());                                         \
    } while (0)
#define BY_SCAN(HS, SP, ...)                                                   \
    do {                                                                       \
        if ((SP) == 16) { constexpr int W = 16; BY_SCAN_SIZE(HS, __VA_ARGS__); } \
        else { constexpr int W = 32; BY_SCAN_SIZE(HS, __VA_ARGS__); }          \
    } while (0)

#define SCAN_LAUNCH(kernel, tiles, ...)                                                                                                                            \
    cudaCheck(cudaFuncSetAttribute(kernel<H, W>, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)ScanShape<H, W>::bytes(tiles)));                                  \
    kernel<H, W><<<(unsigned)(in.B * in.heads.count * in.segments), 128, ScanShape<H, W>::bytes(tiles), stream>>>(__VA_ARGS__)

/* What a scan needs beside its input; sizes in numbers. */
typedef struct {
    float *states; /* (directions, B, heads, segments, state): kept from the forward pass for the backward pass */
    float *sums;   /* (2, B, heads, segments, state): scratch, like the rest */
    float *blocks; /* (B, heads, blocks of SCAN_BLOCK, state) */
    float *records;
    double *moments; /* (heads, 3 SP + 1): amplitude, frequency, decay, gain, see splat_gradients_kernel */
} ScanScratch;

/* Equation (5), or merged into what softmax has left in out and lse, equation (12). out (B, T, C), lse and rho (B, NH, T); lng: of the listed heads. Without a
   causal mask two scans are added. */
static void scan_forward(floatX *out, float *lse, float *rho, const float *lng, ScanScratch scratch, ScanInput in, bool causal, bool merged, size_t HS, size_t SP, cudaStream_t stream) {
    size_t states = in.B * in.heads.count * in.segments * scan_state_size(HS, SP);
    for (int direction = 0; direction < (causal ? 1 : 2); direction++) {
        float *starts = in.segments > 1 ? scratch.states + direction * states : NULL;
        int mode = merged ? SCAN_MERGED : causal ? SCAN_ALONE : direction ? SCAN_SECOND : SCAN_FIRST;
        in.reverse = direction;
        if (starts) {
            BY_SCAN(HS, SP, SCAN_LAUNCH(scan_forward_kernel, 1, NULL, NULL, NULL, scratch.sums, NULL, SCAN_SUMS, in));
            BY_SCAN(HS, SP, scan_merge_kernel<H, W><<<(unsigned)(in.B * in.heads.count), 128, 0, stream>>>(starts, scratch.sums, false, in));
        }
        BY_SCAN(HS, SP, SCAN_LAUNCH(scan_forward_kernel, 1, out, lse, rho, starts, lng, mode, in));
    }
}

/* The gradients of the responses (2, B, heads, T, SP), the third part of dqkv (added to where merged), scratch.moments. delta (B, NH, T) is written. */
static void scan_backward(floatX *dresponses, floatX *dqkv, float *delta, const floatX *dout, const floatX *out, const float *rho, ScanScratch scratch, ScanInput in, bool causal, bool merged,
                          size_t HS, size_t SP, cudaStream_t stream) {
    size_t states = in.B * in.heads.count * in.segments * scan_state_size(HS, SP), record = 3 * SP + 1;
    floatX *dkeys = dresponses + in.B * in.heads.count * in.T * SP;
    float *sums = scratch.sums, *ends = in.segments > 1 ? sums + states : NULL;
    in.sweeps = causal ? 2 : 4;
    for (int direction = 0; direction < (causal ? 1 : 2); direction++) {
        const float *starts = ends ? scratch.states + direction * states : NULL;
        bool add = direction;
        in.reverse = direction;
        BY_SCAN(HS, SP, SCAN_LAUNCH(scan_queries_kernel, 2, dresponses, delta, scratch.blocks, scratch.records, starts, dout, out, rho, add, in));
        if (ends) {
            BY_SCAN(HS, SP, SCAN_LAUNCH(scan_keys_kernel, 2, NULL, NULL, sums, NULL, NULL, NULL, dout, rho, delta, false, false, in));
            BY_SCAN(HS, SP, scan_merge_kernel<H, W><<<(unsigned)(in.B * in.heads.count), 128, 0, stream>>>(ends, sums, true, in));
        }
        BY_SCAN(HS, SP, SCAN_LAUNCH(scan_keys_kernel, 2, dkeys, dqkv, NULL, scratch.records, ends, scratch.blocks, dout, rho, delta, add, merged || add, in));
    }
    moments_sums_kernel<<<dim3((unsigned)CEIL_DIV(record, 32), (unsigned)in.heads.count), dim3(32, 16), 0, stream>>>(scratch.moments, scratch.records, in.sweeps * in.B * in.segments, record);
    cudaCheck(cudaGetLastError());
}
#undef SCAN_LAUNCH

/* ---------------------------------------------------------------------------------------------- classifier */

/* One block a row. First pass: each thread's largest logit and its sum of exponentials relative to that, then the block's;
   second pass: the gradients, in place. Between the two the row is kept in shared memory, if there is room for it. */
__global__ static void __launch_bounds__(1024) classifier_kernel(floatX *logits, float *losses, const int *targets, float scale, size_t V, size_t Vp, bool keep) {
    extern __shared__ Pack kept[];
    __shared__ float warp_most[32], warp_total[32];
    floatX *row = logits + (size_t)blockIdx.x * Vp;
    int target = targets[blockIdx.x];
    if (target < 0) { /* left out */
        float nothing[8] = {};
        for (size_t v = threadIdx.x * 8; v < Vp; v += blockDim.x * 8) store_pack(row + v, nothing);
        if (threadIdx.x == 0) losses[blockIdx.x] = 0;
        return;
    }
    float most = -INFINITY, sum = 0;
    for (size_t v = threadIdx.x * 8; v < V; v += blockDim.x * 8) {
        Pack p = load_pack(row + v);
        if (keep) kept[v / 8] = p;
        float here = -INFINITY;
        for (int e = 0; e < 8; e++)
            if (v + e < V) here = fmaxf(here, number(p, e));
        if (here > most) sum *= fast_exp(most - here), most = here;
        for (int e = 0; e < 8; e++)
            if (v + e < V) sum += fast_exp(number(p, e) - most);
    }
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    float all = warp_max(most);
    sum = warp_sum(most == -INFINITY ? 0 : sum * fast_exp(most - all));
    if (lane == 0) warp_most[warp] = all, warp_total[warp] = sum;
    __syncthreads();
    bool real = lane < (int)blockDim.x / 32 && warp_most[lane] > -INFINITY;
    most = warp_max(real ? warp_most[lane] : -INFINITY);
    sum = warp_sum(real ? warp_total[lane] * fast_exp(warp_most[lane] - most) : 0);
    if (threadIdx.x == 0) losses[blockIdx.x] = most + logf(sum) - (float)row[target];
    __syncthreads(); /* the target's logit has been read */
    float factor = scale / sum;
    for (size_t v = threadIdx.x * 8; v < Vp; v += blockDim.x * 8) {
        Pack p = keep && v < V ? kept[v / 8] : load_pack(row + v);
        float d[8];
        for (int e = 0; e < 8; e++) d[e] = v + e < V ? factor * fast_exp(number(p, e) - most) - (v + e == (size_t)target ? scale : 0) : 0;
        store_pack(row + v, d);
    }
}

/* losses (N) in nats; logits (N, Vp) become their gradients, (softmax - one at the target) scale, 0 in the padding. A target of -1 is
   left out: loss and gradients 0. */
static void fused_classifier(floatX *logits, float *losses, const int *targets, float scale, size_t N, size_t V, size_t Vp, cudaStream_t stream) {
    size_t threads = CEIL_DIV(Vp / 8, 32) * 32, bytes = Vp * sizeof(floatX);
    bool keep = bytes <= 112 << 10; /* two blocks a multiprocessor */
    cudaCheck(cudaFuncSetAttribute(classifier_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, keep ? (int)bytes : 0));
    classifier_kernel<<<(unsigned)N, (unsigned)(threads < 1024 ? threads : 1024), keep ? bytes : 0, stream>>>(logits, losses, targets, scale, V, Vp, keep);
    cudaCheck(cudaGetLastError());
}

/* sum = all of x (n), by one block, in double */
template <typename Number>
__global__ static void __launch_bounds__(1024) total_kernel(double *sum, const Number *x, size_t n) {
    __shared__ double partial[32];
    double mine = 0;
    for (size_t i = threadIdx.x; i < n; i += 1024) mine += (double)x[i];
    mine = warp_sum(mine);
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = mine;
    __syncthreads();
    if (threadIdx.x >= 32) return;
    mine = warp_sum(partial[threadIdx.x]);
    if (threadIdx.x == 0) *sum = mine;
}

/* ---------------------------------------------------------------------------------------------- norm, bounds, AdamW */

enum { NORM_PIECE = 1 << 15 };

/* sums[block] = sum of squares of the block's piece of g (n); eight loads of a thread under way at once, or it waits for memory */
__global__ static void square_sums_kernel(double *sums, const float *g, size_t n) {
    __shared__ double partial[8];
    size_t first = (size_t)blockIdx.x * NORM_PIECE, count = n - first < NORM_PIECE ? n - first : NORM_PIECE;
    double mine = 0;
    for (size_t i = threadIdx.x; i < count; i += 8 * 256) {
        float x[8];
#pragma unroll
        for (int k = 0; k < 8; k++) x[k] = i + k * 256 < count ? g[first + i + k * 256] : 0;
#pragma unroll
        for (int k = 0; k < 8; k++) mine += (double)x[k] * (double)x[k];
    }
    mine = warp_sum(mine);
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = mine;
    __syncthreads();
    if (threadIdx.x > 0) return;
    for (int i = 1; i < 8; i++) mine += partial[i];
    sums[blockIdx.x] = mine;
}

__device__ static inline int clamp(float *x, float low, float high) { /* a NaN stays one, for the loss to report */
    float before = *x;
    *x = before < low ? low : before > high ? high : before;
    return *x != before && before == before;
}

/* Splats as the bounds see them; NULL where there are none of a kind. */
typedef struct {
    float *mu, *lnp, *lnalpha, *lntheta, *lndelta;
    const float *lnalpha0, *alive;
} SplatParameters;

/* x = L y, or L^T y, with L packed by rows and its diagonal as logarithms; one warp, x and y in shared memory */
__device__ static inline void cholesky_product(float *x, const float *packed, const float *y, bool transposed, int HS) {
    for (int i = threadIdx.x; i < HS; i += 32) {
        float sum = 0;
        for (int k = transposed ? i : 0; k < (transposed ? HS : i + 1); k++) {
            float entry = transposed ? packed[k * (k + 1) / 2 + i] : packed[i * (i + 1) / 2 + k];
            sum += (k == i ? expf(entry) : entry) * y[k];
        }
        x[i] = sum;
    }
    __syncwarp();
}

/* Full precision: L such that the largest eigenvalue of L L^T, by power iteration as in train_gsa.c, is within bounds; slope = L L^T mu. */
__device__ static inline bool cholesky_bounds(float *slope, float *packed, const float *mu, float *x, float *y, bool bounded, int HS) {
    float norm = 0;
    for (int k = threadIdx.x; k < HS; k += 32) x[k] = 1 / sqrtf((float)HS) * (k % 3 == 2 ? -1 : 1);
    __syncwarp();
    for (int step = 0; step < 8 && bounded; step++) {
        cholesky_product(y, packed, x, true, HS);
        cholesky_product(x, packed, y, false, HS);
        norm = 0;
        for (int k = threadIdx.x; k < HS; k += 32) norm += x[k] * x[k];
        norm = sqrtf(warp_sum(norm));
        for (int k = threadIdx.x; k < HS && norm > 0; k += 32) x[k] /= norm;
        __syncwarp();
    }
    bool outside = norm > (float)SPLAT_PRECISION_MAX;
    if (outside) {
        float factor = sqrtf((float)SPLAT_PRECISION_MAX / norm);
        for (int i = threadIdx.x; i < HS; i += 32)
            for (int k = 0; k <= i; k++) {
                float *entry = packed + i * (i + 1) / 2 + k;
                *entry = i == k ? *entry + logf(factor) : *entry * factor;
            }
        __syncwarp();
    }
    for (int k = threadIdx.x; k < HS; k += 32) x[k] = mu[k];
    __syncwarp();
    cholesky_product(y, packed, x, true, HS);
    cholesky_product(slope, packed, y, false, HS);
    return outside;
}

/* One warp a splat: back into its bounds, see gsa/model.h; clamped counts what was outside, by kind. */
__global__ static void splat_bounds_kernel(unsigned long long *clamped, SplatParameters w, int unbounded, int P, int HS) {
    __shared__ float slope[128], x[128], y[128]; /* HS is at most 128 */
    const float low = (float)log(SPLAT_PRECISION_MIN), high = (float)log(SPLAT_PRECISION_MAX), range = (float)SPLAT_AMPLITUDE_RANGE;
    size_t s = blockIdx.x;
    float *mu = w.mu + s * HS, *lnp = w.lnp + s * P, square = 0, steep = 0, outside = 0;
    auto bounded = [&](int bound) { return !(unbounded >> bound & 1); };
    if (!(w.alive[s] > 0)) return;
    if (P > HS) outside = cholesky_bounds(slope, lnp, mu, x, y, bounded(BOUND_PRECISION), HS);
    else {
        for (int k = threadIdx.x; k < P && bounded(BOUND_PRECISION); k += 32) outside += (float)clamp(&lnp[k], low, high);
        outside = warp_sum(outside);
        __syncwarp();
        for (int k = threadIdx.x; k < HS; k += 32) slope[k] = mu[k] * expf(lnp[P > 1 ? k : 0]);
    }
    for (int k = threadIdx.x; k < HS; k += 32) square += mu[k] * mu[k], steep += slope[k] * slope[k];
    float excess = fmaxf(sqrtf(warp_sum(square)) / (float)SPLAT_CENTRE_MAX, sqrtf(warp_sum(steep)) / (float)SPLAT_SLOPE_MAX);
    bool off_centre = excess > 1 && bounded(BOUND_CENTRE);
    if (off_centre)
        for (int k = threadIdx.x; k < HS; k += 32) mu[k] /= excess;
    if (threadIdx.x > 0) return;
    int counts[NUM_BOUNDS] = {(int)outside, off_centre, bounded(BOUND_AMPLITUDE) ? clamp(&w.lnalpha[s], w.lnalpha0[s] - range, w.lnalpha0[s] + range) : 0,
                              w.lntheta && bounded(BOUND_FREQUENCY) ? clamp(&w.lntheta[s], -INFINITY, (float)log(SPLAT_FREQUENCY_MAX)) : 0,
                              w.lndelta && bounded(BOUND_DECAY) ? clamp(&w.lndelta[s], -INFINITY, (float)log(SPLAT_DECAY_MAX)) : 0};
    for (int i = 0; i < NUM_BOUNDS; i++)
        if (counts[i]) atomicAdd(&clamped[i], (unsigned long long)counts[i]); /* whole numbers: the order does not matter */
}

/* AdamW: m, v running means of g, g^2; p -= rate (m^ / (sqrt(v^) + 1e-8) + decay p), hats: times correct1, correct2. copy: p as floatX */
__global__ static void adamw_kernel(float *p, floatX *copy, float *m, float *v, const float *grads, size_t n, float rate, float decay, float scale, float beta1, float beta2, float correct1,
                                    float correct2) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    float g = scale * grads[i], first = beta1 * m[i] + (1 - beta1) * g, second = beta2 * v[i] + (1 - beta2) * g * g, weight = p[i];
    m[i] = first, v[i] = second;
    weight -= rate * (first * correct1 / (sqrtf(second * correct2) + 1e-8f) + decay * weight);
    p[i] = weight, copy[i] = (floatX)weight;
}

/* ---------------------------------------------------------------------------------------------- the model */

/* The parameters as fp32 masters (or their gradients) and as the copies that matrix products read. */
typedef struct {
#define X(name, ...) float *name;
    PARAMETERS(X)
#undef X
} MasterTensors;
typedef struct {
#define X(name, ...) floatX *name;
    PARAMETERS(X)
#undef X
} WeightTensors;

/* sizes that appear in every function, as size_t; A: channels of q, of k, of v and of attention's output; of the linear mixer: scans, the most
   heads that a layer scans, W, their splats as padded, and the numbers of a state */
typedef struct {
    size_t T, V, Vp, L, NH, C, A, HS, S, SP, P, G, scans, W, state;
} CudaSizes;

/* The heads of layer l of one kind; standard heads whose q and k are used as they are have no feature map. Nearby an extended head is a standard one. */
static HeadList head_list(const Config *c, size_t l, int kind) {
    HeadList list;
    list.count = 0;
    for (int h = 0; h < config_heads(c); h++) {
        int is = config_head_kind(c, (int)l, h);
        if (is == HEAD_EXTEND) is = HEAD_STANDARD;
        if (is == kind && !(kind == HEAD_STANDARD && c->position == POSITION_LEARNED)) list.head[list.count++] = (unsigned char)h;
    }
    return list;
}

/* Those that scan, extended heads among them. */
static HeadList scan_list(const Config *c, size_t l) {
    HeadList list;
    list.count = 0;
    for (int h = 0; h < config_heads(c); h++)
        if (config_is_gsa(c, (int)l, h) && config_head_kind(c, (int)l, h) != HEAD_SPLAT) list.head[list.count++] = (unsigned char)h;
    return list;
}

static CudaSizes cuda_sizes(const Config *c) {
    CudaSizes z;
    z.T = c->T, z.V = c->V, z.Vp = c->Vp, z.L = c->L, z.NH = config_heads(c), z.C = c->C, z.A = config_width(c);
    z.HS = config_head_size(c), z.G = config_gsa_heads(c), z.S = z.G ? c->S : 0;
    z.SP = z.G ? splats_padded(z.S) : 0, z.P = config_precisions(c);
    z.scans = 0;
    for (size_t l = 0; l < z.L; l++)
        if ((size_t)scan_list(c, l).count > z.scans) z.scans = (size_t)scan_list(c, l).count;
    z.W = z.scans ? scan_splats(z.S) : 0, z.state = z.scans ? scan_state_size(z.HS, z.W) : 0;
    return z;
}

/* type, name, kind (gsa/train.h), size. K: the blocks whose activations are kept for the backward pass, after each other: L, or 1 with
   --recompute. N = B T; M: tokens of a piece of the MLP; F: N if any head has a feature map, else 0. */
#define CUDA_ACTIVATIONS(X)                                                                                                                  \
    X(int, x, WORKSPACE, N)                                                                                                                  \
    X(int, y, WORKSPACE, N)                                                                                                                  \
    X(floatX, residual, RESIDUAL, (L + 1) * N * C) /* the stream at the input of each block and after the last */                           \
    X(floatX, middle, RESIDUAL, K *N *C)           /* the stream after attention */                                                          \
    X(floatX, ln1, ATTENTION, K *N *C)                                                                                                       \
    X(float, ln1_mean, ATTENTION, K *N)                                                                                                      \
    X(float, ln1_rstd, ATTENTION, K *N)                                                                                                      \
    X(floatX, qkv, ATTENTION, K *N * 3 * A)                                                                                                  \
    X(floatX, features, ATTENTION, K *F * 2 * A) /* f_q, f_k: (B, T, 2A); columns of heads without a feature map are never touched */       \
    X(floatX, responses, ATTENTION, K *N *scans * 2 * W) /* of the scan: (2, B, heads, T, W) */                                              \
    X(float, scan_rho, ATTENTION, scans ? K * N * NH : 0) /* (B, NH, T) */                                                                   \
    X(float, scan_states, STATES, K *directions *segments_most *state)    /* at the start of each segment */                                 \
    X(float, att_lse, ATTENTION, K *N *NH)       /* (B, NH, T) */                                                                            \
    X(floatX, att, ATTENTION, K *N *A)                                                                                                       \
    X(floatX, ln2, MLP, K *N *C)                                                                                                             \
    X(float, ln2_mean, MLP, K *N)                                                                                                            \
    X(float, ln2_rstd, MLP, K *N)                                                                                                            \
    X(floatX, fc, MLP, (recompute ? M : L * N) * 4 * C)                                                                                      \
    X(floatX, gelu, MLP, (recompute ? M : L * N) * 4 * C)                                                                                    \
    X(floatX, lnf, LOGITS, N *C)                                                                                                             \
    X(float, lnf_mean, LOGITS, N)                                                                                                            \
    X(float, lnf_rstd, LOGITS, N)                                                                                                            \
    X(floatX, logits, LOGITS, logits_piece(N) * Vp)                                                                                              \
    X(float, losses, LOGITS, N)                                                                                                              \
    X(floatX, dresidual, BACKWARD, N *C)                                                                                                     \
    X(floatX, dln, BACKWARD, N *C)                                                                                                           \
    X(floatX, dfc, BACKWARD, M * 4 * C)                                                                                                      \
    X(floatX, datt, BACKWARD, N *A)                                                                                                          \
    X(floatX, dqkv, BACKWARD, N * 3 * A)                                                                                                     \
    X(floatX, dfeatures, BACKWARD, F * 2 * A)                                                                                                \
    X(floatX, dresponses, BACKWARD, N *scans * 2 * W)                                                                                        \
    X(float, scan_blocks, STATES, B *scans *CEIL_DIV(T, SCAN_BLOCK) * state)                                                               \
    X(float, delta, BACKWARD, N *NH)                                                                                                         \
    X(float, partials, WORKSPACE, SUM_BLOCKS * (3 * A > 4 * C ? 3 * A : 4 * C))                                                              \
    X(float, scan_sums, WORKSPACE, 2 * segments_most * state)                                                                                \
    X(float, scan_records, WORKSPACE, 2 * directions * (B * scans > segments_most ? B * scans : segments_most) * (3 * W + 1))                \
    X(double, scan_moments, WORKSPACE, scans *(3 * W + 1))                                                                                   \
    X(float, moments, WORKSPACE, P > HS ? 0 : layer_records * moments_size(S, P, HS))                                                                      \
    X(double, moments_sums, WORKSPACE, (G ? NH : 0) * moments_size(S, P, HS))                                                                \
    X(float, token_sums, WORKSPACE, bucket_sums(N) * C)                                                                                      \
    X(int, positions, WORKSPACE, N)                                                                                                          \
    X(Bucket, segments, WORKSPACE, N)                                                                                                        \
    X(Bucket, bucket_tokens, WORKSPACE, N / SEGMENT + 1)                                                                                     \
    X(double, sums, WORKSPACE, norm_pieces + 1)                                                                                              \
    X(float, slope, WORKSPACE, P > HS ? 0 : G * SP * HS)                                                                                                    \
    X(float, precision, WORKSPACE, P > HS ? 0 : G * SP * P)                                                                                                 \
    X(float, centre, WORKSPACE, G *SP)                                                                                                       \
    X(float, decay, WORKSPACE, G *SP)                                                                                                        \
    X(float, typical, WORKSPACE, G *SP)                                                                                                      \
    X(float, key_scale, WORKSPACE, G)                                                                                                        \
    X(float, lnalpha, WORKSPACE, G *SP)                                                                                                      \
    X(uint32_t, steps, WORKSPACE, G *SP)                                                                                                     \
    X(int64_t, clamped, WORKSPACE, NUM_BOUNDS)                                                                                               \
    X(uint32_t, rope_steps, WORKSPACE, HS / 2)                                                                                               \
    X(float, scale, WORKSPACE, L *NH)                                                                                                        \
    X(int, window, WORKSPACE, L *NH)                                                                                                         \
    X(int, from_features, WORKSPACE, L *NH)

typedef struct {
#define X(type, name, kind, size) type *name;
    CUDA_ACTIVATIONS(X)
#undef X
} CudaActivations;

typedef struct {
    Config config;
    size_t B;                               /* largest batch */
    Tensor tensors[NUM_TENSORS];
    size_t total;                           /* length of the flat buffers */
    float *params, *grads, *adam_m, *adam_v; /* fp32; params are the masters */
    floatX *weights;                        /* their copies */
    MasterTensors p, dp;
    WeightTensors w;
    void *activations;
    CudaActivations a;
    Matmul matmul;
    cudaStream_t stream;
    cudaEvent_t bucketed;                   /* the buckets have left the host */
    size_t used_B, used_T;                  /* of the last forward pass */
    bool used_y;
    size_t predicted;                       /* its number of targets */
    double expected, done;                  /* scale of the backward pass that will follow the next forward pass; for which the logits' part is done; 0: none */
    size_t block;                           /* whose activations are there with --recompute: the last one computed */
    size_t logits_rows;                     /* room for the logits of so many tokens */
    bool watch;                             /* backward passes also sum |dL / d ln phi_s| into the gradients of `alive` */
    /* on the host: */
    int *x;                                 /* tokens and targets on their way to the device */
    Buckets buckets;                        /* of the last forward's tokens */
    int *starts;                            /* scratch of bucket_tokens */
    double *results;                        /* numbers on their way back */
    float *flat;                            /* a whole buffer on its way back; allocated when first needed */
} CudaModel;

/* Segments of all sequences and scanned heads together where they are cut, for this or any smaller batch. */
static size_t scan_segments_most(const Config *c, size_t B) {
    size_t most = B * cuda_sizes(c).scans * 2 * CEIL_DIV((size_t)c->T, (size_t)SCAN_BLOCK);
    return most < (size_t)SCAN_SEGMENTS_MOST ? most : (size_t)SCAN_SEGMENTS_MOST;
}
static size_t scan_directions(const Config *c) { return c->objective == OBJECTIVE_LM ? 1 : 2; }

/* One function measures the activations (base NULL) and carves them from one piece of memory; returns its bytes, and adds them up by
   kind (bytes NULL: it does not). */
static size_t carve_activations(CudaActivations *a, char *base, const Config *c, size_t B, size_t *bytes) {
    CudaSizes z = cuda_sizes(c);
    Tensor tensors[NUM_TENSORS];
    bool recompute = c->recompute;
    size_t T = z.T, N = B * T, L = z.L, C = z.C, A = z.A, NH = z.NH, HS = z.HS, Vp = z.Vp, S = z.S, SP = z.SP, P = z.P, G = z.G, at = 0, layer_records = 0, F = 0, norm_pieces = 0;
    size_t scans = z.scans, W = z.W, state = z.state, segments_most = scan_segments_most(c, B), directions = scan_directions(c);
    size_t K = recompute ? 1 : L, M = N < piece_most ? N : piece_most; /* room for the pieces of any smaller batch too */
    model_tensors(c, tensors);
    for (int i = 0; i < NUM_TENSORS; i++) norm_pieces += CEIL_DIV(tensors[i].size, (size_t)NORM_PIECE);
    for (size_t l = 0; l < L; l++) {
        size_t splat_heads = head_list(c, l, HEAD_SPLAT).count;
        if (splat_heads || head_list(c, l, HEAD_STANDARD).count) F = N;
        splat_heads += scan_list(c, l).count;
        size_t most = CEIL_DIV(N, 64) * splat_heads < SPLAT_BLOCKS + splat_heads ? CEIL_DIV(N, 64) * splat_heads : SPLAT_BLOCKS + splat_heads; /* of any smaller batch too */
        if (most > layer_records) layer_records = most;
    }
#define X(type, name, kind, size)                   \
    a->name = base ? (type *)(base + at) : NULL; \
    at += CEIL_DIV((size) * sizeof(type), 256) * 256; \
    if (bytes) bytes[MEMORY_##kind] += CEIL_DIV((size) * sizeof(type), 256) * 256;
    CUDA_ACTIVATIONS(X)
#undef X
    return at;
}

template <typename Tensors, typename Number>
static void point_parameters(Tensors *p, Number *flat, const Tensor *tensors) {
#define X(name, ...) p->name = tensors[TENSOR_##name].size ? flat + tensors[TENSOR_##name].offset : NULL;
    PARAMETERS(X)
#undef X
}

static CudaModel *gsa_create_cuda(const Config *c, size_t B) {
    CudaModel *m = (CudaModel *)xcalloc(1, sizeof *m);
    CudaSizes z = cuda_sizes(c);
    size_t L = z.L, NH = z.NH, HS = z.HS, N = B * z.T;
    m->config = *c, m->B = B, m->logits_rows = logits_piece(N);
    m->total = model_tensors(c, m->tensors);
    cudaCheck(cudaStreamCreate(&m->stream));
    cudaCheck(cudaEventCreate(&m->bucketed));
    float **buffers[] = {&m->params, &m->grads, &m->adam_m, &m->adam_v};
    for (int i = 0; i < 4; i++) {
        cudaCheck(cudaMalloc(buffers[i], m->total * sizeof(float)));
        cudaCheck(cudaMemsetAsync(*buffers[i], 0, m->total * sizeof(float), m->stream));
    }
    cudaCheck(cudaMalloc(&m->weights, m->total * sizeof(floatX)));
    cudaCheck(cudaMemsetAsync(m->weights, 0, m->total * sizeof(floatX), m->stream));
    point_parameters(&m->p, m->params, m->tensors);
    point_parameters(&m->dp, m->grads, m->tensors);
    point_parameters(&m->w, m->weights, m->tensors);
    cudaCheck(cudaMalloc(&m->activations, carve_activations(&m->a, NULL, c, B, NULL)));
    carve_activations(&m->a, (char *)m->activations, c, B, NULL);
    matmul_create(&m->matmul);

    uint32_t *steps = (uint32_t *)xmalloc(HS * sizeof *steps);
    for (size_t k = 0; k < HS / 2; k++) steps[k] = wave_step(pow(10000, -2.0 * (double)k / (double)HS));
    float *scale = (float *)xmalloc(L * NH * sizeof *scale);
    int *window = (int *)xmalloc(2 * L * NH * sizeof *window), *from_features = window + L * NH;
    for (size_t i = 0; i < L * NH; i++) {
        int kind = config_head_kind(c, (int)(i / NH), (int)(i % NH));
        bool standard = kind == HEAD_STANDARD || kind == HEAD_EXTEND;
        scale[i] = standard ? 1 / sqrtf((float)HS) : 1;
        window[i] = kind == HEAD_SCAN ? 0 : standard && c->window ? c->window : c->T;
        from_features[i] = !standard || c->position != POSITION_LEARNED;
    }
    cudaCheck(cudaMemcpy(m->a.rope_steps, steps, HS / 2 * sizeof *steps, cudaMemcpyHostToDevice));
    cudaCheck(cudaMemcpy(m->a.scale, scale, L * NH * sizeof *scale, cudaMemcpyHostToDevice));
    cudaCheck(cudaMemcpy(m->a.window, window, L * NH * sizeof *window, cudaMemcpyHostToDevice));
    cudaCheck(cudaMemcpy(m->a.from_features, from_features, L * NH * sizeof *from_features, cudaMemcpyHostToDevice));
    free(steps), free(scale), free(window);

    cudaCheck(cudaMallocHost(&m->x, 2 * N * sizeof(int)));
    cudaCheck(cudaMallocHost(&m->buckets.positions, N * sizeof(int)));
    cudaCheck(cudaMallocHost(&m->buckets.segments, N * sizeof(Bucket)));
    cudaCheck(cudaMallocHost(&m->buckets.tokens, (N / SEGMENT + 1) * sizeof(Bucket)));
    cudaCheck(cudaMallocHost(&m->results, NUM_TENSORS * sizeof(double)));
    m->starts = (int *)xmalloc((z.Vp + 1) * sizeof(int));
    cudaCheck(cudaStreamSynchronize(m->stream));
    return m;
}

static void gsa_destroy(CudaModel *m) {
    float *buffers[] = {m->params, m->grads, m->adam_m, m->adam_v};
    for (int i = 0; i < 4; i++) cudaCheck(cudaFree(buffers[i]));
    cudaCheck(cudaFree(m->weights));
    cudaCheck(cudaFree(m->activations));
    matmul_destroy(&m->matmul);
    cudaCheck(cudaFreeHost(m->x));
    cudaCheck(cudaFreeHost(m->buckets.positions));
    cudaCheck(cudaFreeHost(m->buckets.segments));
    cudaCheck(cudaFreeHost(m->buckets.tokens));
    cudaCheck(cudaFreeHost(m->results));
    cudaCheck(cudaEventDestroy(m->bucketed));
    cudaCheck(cudaStreamDestroy(m->stream));
    free(m->starts), free(m->flat);
    free(m);
}

static SplatTables gsa_splats(const CudaModel *m) {
    CudaActivations a = m->a;
    SplatTables w = {a.slope, a.precision, a.centre, a.lnalpha, a.decay, a.typical, a.key_scale, m->p.mu, m->p.lnp, m->p.lntheta ? a.steps : NULL, cuda_sizes(&m->config).SP, m->config.raw != 0};
    return w;
}

static void splat_tables(const CudaModel *m) {
    CudaSizes z = cuda_sizes(&m->config);
    if (!z.G) return;
    splat_tables_kernel<<<(unsigned)(z.G * z.SP), 32, 0, m->stream>>>(gsa_splats(m), m->p.lnalpha, m->p.lntheta, m->p.lndelta, m->p.alive, (int)z.S, (int)z.P, (int)z.HS);
    splat_key_scales_kernel<<<(unsigned)z.G, 32, 0, m->stream>>>(gsa_splats(m));
    cudaCheck(cudaGetLastError());
}

/* Features of the heads of layer l that have a feature map. */
static void features_forward(CudaModel *m, floatX *features, const floatX *qkv, size_t l, size_t B, size_t T) {
    CudaSizes z = cuda_sizes(&m->config);
    HeadList rope = head_list(&m->config, l, HEAD_STANDARD), splat = head_list(&m->config, l, HEAD_SPLAT);
    size_t first = (size_t)config_gsa_before(&m->config, (int)l, 0);
    if (rope.count) rope_forward(features, qkv, m->a.rope_steps, rope, B, T, z.NH, z.HS, m->stream);
    if (splat.count) splat_forward(features, {}, qkv, gsa_splats(m), splat, first, B, T, z.NH, z.HS, z.S, z.P, m->stream);
}

/* The gradients of layer l's splats, from the moments of all its GSA heads; scan: from those of its scans too. */
static void splats_backward(CudaModel *m, size_t l, int heads, bool scan) {
    CudaSizes z = cuda_sizes(&m->config);
    size_t first = (size_t)config_gsa_before(&m->config, (int)l, 0), splats = first * z.S;
    MasterTensors p = m->p, d = m->dp;
    SplatGradients to = {d.mu + splats * z.HS, d.lnp + splats * z.P, d.lnalpha + splats, d.lntheta ? d.lntheta + splats : NULL, d.lndelta ? d.lndelta + splats : NULL, d.lng ? d.lng + first : NULL,
                         p.mu + splats * z.HS, p.lnp + splats * z.P, p.lntheta ? p.lntheta + splats : NULL, p.lndelta ? p.lndelta + splats : NULL};
    splat_gradients_kernel<<<dim3((unsigned)z.S, (unsigned)heads), 32, 0, m->stream>>>(to, m->a.moments_sums, scan ? m->a.scan_moments : NULL, z.W, (int)z.S, (int)z.P, (int)z.HS);
    cudaCheck(cudaGetLastError());
}

/* Where watched: sums of |G| of the listed heads into the gradients of `alive`. */
static void splats_watch(CudaModel *m, ScanResponsesAt scan, const floatX *dfeatures, const floatX *features, HeadList heads, size_t first, size_t B, size_t T) {
    CudaSizes z = cuda_sizes(&m->config);
    if (!m->watch) return;
    splat_watch_kernel<<<(unsigned)heads.count, 256, 0, m->stream>>>(m->dp.alive + first * z.S, scan, dfeatures, features, gsa_splats(m), heads, B * T, T, B * T < 2048 ? B * T : 2048, z.A, z.HS,
                                                                     (int)z.S);
    cudaCheck(cudaGetLastError());
}

/* Their part of dqkv; the gradients of layer l's splats. */
static void features_backward(CudaModel *m, floatX *dqkv, const floatX *dfeatures, const floatX *features, const floatX *qkv, size_t l, size_t B, size_t T) {
    CudaSizes z = cuda_sizes(&m->config);
    HeadList rope = head_list(&m->config, l, HEAD_STANDARD), splat = head_list(&m->config, l, HEAD_SPLAT);
    size_t first = (size_t)config_gsa_before(&m->config, (int)l, 0);
    if (rope.count) rope_backward(dqkv, dfeatures, qkv, m->a.rope_steps, rope, B, T, z.NH, z.HS, m->stream);
    if (!splat.count) return;
    splat_backward(dqkv, m->a.moments, m->a.moments_sums, {}, dfeatures, features, qkv, gsa_splats(m), splat, first, B, T, z.NH, z.HS, z.S, z.P, m->stream);
    splats_backward(m, l, splat.count, false);
    splats_watch(m, {}, dfeatures, features, splat, first, B, T);
}

static ScanScratch scan_scratch(CudaActivations block) {
    ScanScratch s = {block.scan_states, block.scan_sums, block.scan_blocks, block.scan_records, block.scan_moments};
    return s;
}

static ScanInput scan_input(const CudaModel *m, CudaActivations block, size_t l, size_t B, size_t T) {
    ScanInput in;
    memset(&in, 0, sizeof in);
    in.qkv = block.qkv, in.responses = block.responses, in.tables = gsa_splats(m), in.heads = scan_list(&m->config, l), in.first_head = (size_t)config_gsa_before(&m->config, (int)l, 0);
    in.B = B, in.T = T, in.NH = (size_t)config_heads(&m->config);
    in.segments = scan_segments(B * in.heads.count, T), in.segment = CEIL_DIV(CEIL_DIV(T, (size_t)SCAN_BLOCK), (size_t)in.segments) * SCAN_BLOCK;
    in.late = m->config.attention == ATTENTION_EXTEND ? m->config.window : 0;
    return in;
}

/* The scan heads of layer l, and the far part of its extended heads, whose near part att (B, T, A) and lse (B, NH, T) hold already; block: the layer's activations */
static void scans_forward(CudaModel *m, CudaActivations block, size_t l, size_t B, size_t T) {
    CudaSizes z = cuda_sizes(&m->config);
    ScanInput in = scan_input(m, block, l, B, T);
    bool merged = m->config.attention == ATTENTION_EXTEND;
    if (!in.heads.count) return;
    splat_forward(NULL, {block.responses, z.W, (size_t)in.late, merged}, block.qkv, in.tables, in.heads, in.first_head, B, T, z.NH, z.HS, z.S, z.P, m->stream);
    scan_forward(block.att, block.att_lse, block.scan_rho, m->p.lng, scan_scratch(block), in, m->config.objective == OBJECTIVE_LM, merged, z.HS, z.W, m->stream);
}

/* Their part of dqkv; the gradients of layer l's splats. */
static void scans_backward(CudaModel *m, CudaActivations block, size_t l, size_t B, size_t T) {
    CudaSizes z = cuda_sizes(&m->config);
    CudaActivations a = m->a;
    ScanInput in = scan_input(m, block, l, B, T);
    bool merged = m->config.attention == ATTENTION_EXTEND;
    if (!in.heads.count) return;
    scan_backward(a.dresponses, a.dqkv, a.delta, a.datt, block.att, block.scan_rho, scan_scratch(block), in, m->config.objective == OBJECTIVE_LM, merged, z.HS, z.W, m->stream);
    splat_backward(a.dqkv, a.moments, a.moments_sums, {a.dresponses, z.W, (size_t)in.late, merged}, NULL, NULL, block.qkv, in.tables, in.heads, in.first_head, B, T, z.NH, z.HS, z.S, z.P, m->stream);
    splats_backward(m, l, in.heads.count, true);
    splats_watch(m, {a.dresponses, z.W, (size_t)in.late, merged}, NULL, NULL, in.heads, in.first_head, B, T);
}

/* The activations, those that blocks keep being block l's; N tokens. With --recompute all blocks share one place. */
static CudaActivations block_activations(const CudaModel *m, size_t l, size_t N) {
    CudaSizes z = cuda_sizes(&m->config);
    CudaActivations a = m->a;
    size_t k = m->config.recompute ? 0 : l * N;
    a.residual += l * N * z.C;
    a.middle += k * z.C, a.ln1 += k * z.C, a.ln1_mean += k, a.ln1_rstd += k;
    a.qkv += k * 3 * z.A, a.features += k * 2 * z.A, a.att_lse += k * z.NH, a.att += k * z.A;
    a.responses += k * z.scans * 2 * z.W, a.scan_rho += k * z.NH, a.scan_states += k ? l * scan_directions(&m->config) * scan_segments_most(&m->config, m->B) * z.state : 0;
    a.ln2 += k * z.C, a.ln2_mean += k, a.ln2_rstd += k, a.fc += k * 4 * z.C, a.gelu += k * 4 * z.C;
    return a;
}

/* Is there a head in layer l with softmax? */
static bool attends(const CudaModel *m, size_t l) { return m->config.attention == ATTENTION_EXTEND || scan_list(&m->config, l).count < config_heads(&m->config); }

static AttentionInput attention_input(const CudaModel *m, size_t l, size_t N) {
    CudaSizes z = cuda_sizes(&m->config);
    AttentionInput in;
    CudaActivations a = block_activations(m, l, N);
    in.qkv = a.qkv;
    bool mapped = head_list(&m->config, l, HEAD_STANDARD).count || head_list(&m->config, l, HEAD_SPLAT).count;
    in.features = mapped ? a.features : NULL, in.from_features = m->a.from_features + l * z.NH;
    in.scale = m->a.scale + l * z.NH, in.window = m->a.window + l * z.NH;
    in.causal = m->config.objective == OBJECTIVE_LM;
    return in;
}

/* Block l from its input to the normalised stream before the MLP: all that the backward pass needs but for the MLP's hidden layer. */
static void block_forward(CudaModel *m, size_t l, size_t B, size_t T) {
    CudaSizes z = cuda_sizes(&m->config);
    size_t C = z.C, A = z.A, N = B * T;
    MasterTensors p = m->p;
    WeightTensors w = m->w;
    CudaActivations a = block_activations(m, l, N);
    cudaStream_t stream = m->stream;
    m->block = l;
    layernorm_forward(a.ln1, a.ln1_mean, a.ln1_rstd, a.residual, p.ln1w + l * C, p.ln1b + l * C, N, C, stream);
    matmul_forward(&m->matmul, a.qkv, a.ln1, w.qkvw + l * 3 * A * C, w.qkvb + l * 3 * A, NULL, NULL, N, C, 3 * A, stream);
    features_forward(m, a.features, a.qkv, l, B, T);
    if (attends(m, l)) attention_forward(a.att, a.att_lse, attention_input(m, l, N), B, T, z.NH, z.HS, stream);
    scans_forward(m, a, l, B, T);
    matmul_forward(&m->matmul, a.middle, a.att, w.attprojw + l * C * A, w.attprojb + l * C, a.residual, NULL, N, A, C, stream);
    layernorm_forward(a.ln2, a.ln2_mean, a.ln2_rstd, a.middle, p.ln2w + l * C, p.ln2b + l * C, N, C, stream);
}

/* The hidden layer of block l's MLP for n tokens from `first` on: gelu = gelu(fc), fc = ln2 W^T + b, all (n, 4C). */
static void hidden_forward(CudaModel *m, floatX *gelu, floatX *fc, const floatX *ln2, size_t l, size_t first, size_t n) {
    size_t C = (size_t)m->config.C;
    matmul_forward(&m->matmul, gelu, ln2 + first * C, m->w.fcw + l * 4 * C * C, m->w.fcb + l * 4 * C, NULL, fc, n, C, 4 * C, m->stream);
}

/* Logits of n tokens from `first` on; they become their gradients in the same pass, and losses are stored. */
static void logits_forward(CudaModel *m, size_t first, size_t n) {
    CudaSizes z = cuda_sizes(&m->config);
    CudaActivations a = m->a;
    matmul_forward(&m->matmul, a.logits, a.lnf + first * z.C, m->w.wte, NULL, NULL, NULL, n, z.C, z.Vp, m->stream);
    fused_classifier(a.logits, a.losses + first, a.y + first, 1 / (float)(m->predicted ? m->predicted : 1), n, z.V, z.Vp, m->stream);
}

/* From the gradients of these logits: dln of their tokens, and adds to dwte. */
static void logits_backward(CudaModel *m, size_t first, size_t n, double scale) {
    CudaSizes z = cuda_sizes(&m->config);
    CudaActivations a = m->a;
    matmul_backward(&m->matmul, a.dln + first * z.C, m->dp.wte, NULL, NULL, a.logits, a.lnf + first * z.C, m->w.wte, NULL, (float)scale, n, z.C, z.Vp, m->stream);
}

/* x, y (B, T); a y of -1 is not predicted; y NULL: all but the loss. Returns the mean loss of what is predicted, in nats. */
static double gsa_forward(CudaModel *m, const int *x, const int *y, size_t B, size_t T) {
    CudaSizes z = cuda_sizes(&m->config);
    size_t C = z.C, N = B * T, L = z.L, piece = piece_size(N, piece_most);
    MasterTensors p = m->p;
    WeightTensors w = m->w;
    CudaActivations a = m->a;
    cudaStream_t stream = m->stream;
    m->used_B = B, m->used_T = T, m->used_y = y != NULL, m->predicted = 0, m->done = 0;
    memcpy(m->x, x, N * sizeof(int));
    cudaCheck(cudaMemcpyAsync(a.x, m->x, N * sizeof(int), cudaMemcpyHostToDevice, stream));
    if (y) {
        for (size_t i = 0; i < N; i++) m->predicted += y[i] >= 0;
        memcpy(m->x + N, y, N * sizeof(int));
        cudaCheck(cudaMemcpyAsync(a.y, m->x + N, N * sizeof(int), cudaMemcpyHostToDevice, stream));
    }
    splat_tables(m);
    encoder_forward(a.residual, a.x, w.wte, w.wpe, B, T, C, 0, stream);
    for (size_t l = 0; l < L; l++) {
        CudaActivations block = block_activations(m, l, N);
        floatX *out = block.residual + N * C;
        block_forward(m, l, B, T);
        for (size_t i = 0; i < N; i += piece) {
            size_t n = i + piece < N ? piece : N - i, at = m->config.recompute ? 0 : i * 4 * C; /* where the hidden layer is kept, or the next piece will overwrite it */
            hidden_forward(m, block.gelu + at, block.fc + at, block.ln2, l, i, n);
            matmul_forward(&m->matmul, out + i * C, block.gelu + at, w.fcprojw + l * 4 * C * C, w.fcprojb + l * C, block.middle + i * C, NULL, n, 4 * C, C, stream);
        }
    }
    layernorm_forward(a.lnf, a.lnf_mean, a.lnf_rstd, a.residual + L * N * C, p.lnfw, p.lnfb, N, C, stream);
    if (!y) {
        cudaCheck(cudaStreamSynchronize(stream));
        return 0;
    }
    size_t rows = piece_size(N, m->logits_rows);
    for (size_t i = 0; i < N; i += rows) {
        size_t n = i + rows < N ? rows : N - i;
        logits_forward(m, i, n);
        if (m->expected) logits_backward(m, i, n, m->expected); /* while they are there: the next piece overwrites them */
    }
    m->done = m->expected, m->expected = 0;
    total_kernel<<<1, 1024, 0, stream>>>(a.sums, a.losses, N);
    cudaCheck(cudaGetLastError());
    cudaCheck(cudaMemcpyAsync(m->results, a.sums, sizeof(double), cudaMemcpyDeviceToHost, stream));
    cudaCheck(cudaEventSynchronize(m->bucketed));
    bucket_tokens(&m->buckets, m->x, N, z.Vp, m->starts); /* for the backward pass, while the device works */
    cudaCheck(cudaStreamSynchronize(stream));
    return m->predicted ? m->results[0] / (double)m->predicted : 0;
}

/* Adds scale times the gradient of the last forward's mean loss to the gradients. */
static void gsa_backward(CudaModel *m, double scale) {
    CudaSizes z = cuda_sizes(&m->config);
    size_t B = m->used_B, T = m->used_T, C = z.C, A = z.A, N = B * T, L = z.L, piece = piece_size(N, piece_most), rows = piece_size(N, m->logits_rows);
    MasterTensors p = m->p, dp = m->dp;
    WeightTensors w = m->w;
    CudaActivations a = m->a;
    cudaStream_t stream = m->stream;
    Matmul *mm = &m->matmul;
    if (m->done && m->done != scale) die("internal error: a backward pass by %g was announced, not by %g", m->done, scale);
    for (size_t i = 0; i < N && !m->done; i += rows) {
        size_t n = i + rows < N ? rows : N - i;
        if (rows < N) logits_forward(m, i, n); /* again */
        logits_backward(m, i, n, scale);
    }
    cudaCheck(cudaMemsetAsync(a.dresidual, 0, N * C * sizeof(floatX), stream));
    layernorm_backward(a.dresidual, dp.lnfw, dp.lnfb, L ? dp.fcprojb + (L - 1) * C : NULL, a.partials, a.dln, a.residual + L * N * C, p.lnfw, a.lnf_mean, a.lnf_rstd, N, C, stream);
    for (size_t l = L; l-- > 0;) { /* the biases of attproj and fcproj get their gradients from the layernorm that follows them */
        if (m->config.recompute && m->block != l) block_forward(m, l, B, T);
        CudaActivations block = block_activations(m, l, N);
        for (size_t i = 0; i < N; i += piece) {
            size_t n = i + piece < N ? piece : N - i, at = m->config.recompute ? 0 : i * 4 * C;
            if (m->config.recompute) hidden_forward(m, block.gelu, block.fc, block.ln2, l, i, n);
            matmul_backward(mm, a.dfc, dp.fcprojw + l * 4 * C * C, NULL, NULL, a.dresidual + i * C, block.gelu + at, w.fcprojw + l * 4 * C * C, block.fc + at, 1, n, 4 * C, C, stream);
            matmul_backward(mm, a.dln + i * C, dp.fcw + l * 4 * C * C, dp.fcb + l * 4 * C, a.partials, a.dfc, block.ln2 + i * C, w.fcw + l * 4 * C * C, NULL, 1, n, C, 4 * C, stream);
        }
        layernorm_backward(a.dresidual, dp.ln2w + l * C, dp.ln2b + l * C, dp.attprojb + l * C, a.partials, a.dln, block.middle, p.ln2w + l * C, block.ln2_mean, block.ln2_rstd, N, C, stream);
        matmul_backward(mm, a.datt, dp.attprojw + l * C * A, NULL, NULL, a.dresidual, block.att, w.attprojw + l * C * A, NULL, 1, N, A, C, stream);
        if (attends(m, l)) attention_backward(a.dqkv, a.dfeatures, a.delta, a.datt, block.att, block.att_lse, attention_input(m, l, N), B, T, z.NH, z.HS, stream);
        features_backward(m, a.dqkv, a.dfeatures, block.features, block.qkv, l, B, T);
        scans_backward(m, block, l, B, T);
        matmul_backward(mm, a.dln, dp.qkvw + l * 3 * A * C, dp.qkvb + l * 3 * A, a.partials, a.dqkv, block.ln1, w.qkvw + l * 3 * A * C, NULL, 1, N, C, 3 * A, stream);
        layernorm_backward(a.dresidual, dp.ln1w + l * C, dp.ln1b + l * C, l ? dp.fcprojb + (l - 1) * C : NULL, a.partials, a.dln, block.residual, p.ln1w + l * C, block.ln1_mean, block.ln1_rstd, N,
                           C, stream);
    }
    Buckets b = m->buckets;
    cudaCheck(cudaMemcpyAsync(a.positions, b.positions, N * sizeof(int), cudaMemcpyHostToDevice, stream));
    cudaCheck(cudaMemcpyAsync(a.segments, b.segments, (size_t)b.segment_count * sizeof(Bucket), cudaMemcpyHostToDevice, stream));
    cudaCheck(cudaMemcpyAsync(a.bucket_tokens, b.tokens, (size_t)b.token_count * sizeof(Bucket), cudaMemcpyHostToDevice, stream));
    cudaCheck(cudaEventRecord(m->bucketed, stream));
    b.positions = a.positions, b.segments = a.segments, b.tokens = a.bucket_tokens;
    encoder_backward(dp.wte, dp.wpe, a.dresidual, &b, a.token_sums, B, T, C, stream);
}

static void gsa_zero_gradients(CudaModel *m) { cudaCheck(cudaMemsetAsync(m->grads, 0, m->total * sizeof(float), m->stream)); }

/* The L2 norm of each clip group's gradients: sums of fixed pieces, in double, added in order. */
static void gsa_gradient_norms(CudaModel *m, double norms[NUM_CLIPS]) {
    double *sums = m->a.sums;
    for (int c = 0; c < NUM_CLIPS; c++) {
        size_t pieces = 0;
        for (int i = 0; i < NUM_TENSORS; i++) {
            size_t n = m->tensors[i].size;
            if (!n || m->tensors[i].group == GROUP_FIXED || groups[m->tensors[i].group].clip != c) continue;
            square_sums_kernel<<<(unsigned)CEIL_DIV(n, (size_t)NORM_PIECE), 256, 0, m->stream>>>(sums + 1 + pieces, m->grads + m->tensors[i].offset, n);
            cudaCheck(cudaGetLastError());
            pieces += CEIL_DIV(n, (size_t)NORM_PIECE);
        }
        total_kernel<<<1, 1024, 0, m->stream>>>(sums, sums + 1, pieces);
        cudaCheck(cudaGetLastError());
        cudaCheck(cudaMemcpyAsync(m->results + c, sums, sizeof(double), cudaMemcpyDeviceToHost, m->stream));
    }
    cudaCheck(cudaStreamSynchronize(m->stream));
    for (int c = 0; c < NUM_CLIPS; c++) norms[c] = sqrt(m->results[c]);
}

/* Puts the splats back into their bounds (gsa/model.h) and counts what was outside, by kind. */
static void splat_bounds(CudaModel *m, int64_t clamped[NUM_BOUNDS]) {
    CudaSizes z = cuda_sizes(&m->config);
    memset(clamped, 0, NUM_BOUNDS * sizeof *clamped);
    if (!z.G) return;
    cudaCheck(cudaMemsetAsync(m->a.clamped, 0, NUM_BOUNDS * sizeof(int64_t), m->stream));
    SplatParameters w = {m->p.mu, m->p.lnp, m->p.lnalpha, m->p.lntheta, m->p.lndelta, m->p.lnalpha0, m->p.alive};
    splat_bounds_kernel<<<(unsigned)(z.G * z.S), 32, 0, m->stream>>>((unsigned long long *)m->a.clamped, w, m->config.unbounded, (int)z.P, (int)z.HS);
    cudaCheck(cudaGetLastError());
    cudaCheck(cudaMemcpyAsync(clamped, m->a.clamped, NUM_BOUNDS * sizeof(int64_t), cudaMemcpyDeviceToHost, m->stream));
    cudaCheck(cudaStreamSynchronize(m->stream));
}

/* AdamW, then the bounds */
static void gsa_update(CudaModel *m, const Update *u, int64_t clamped[NUM_BOUNDS]) {
    float correct1 = (float)(1 / (1 - pow(u->beta1, (double)u->step))), correct2 = (float)(1 / (1 - pow(u->beta2, (double)u->step)));
    for (int i = 0; i < NUM_TENSORS; i++) {
        const Tensor *t = &m->tensors[i];
        const Group *group = &groups[t->group];
        if (!t->size || !group->trained) continue;
        adamw_kernel<<<CEIL_DIV(t->size, 256), 256, 0, m->stream>>>(m->params + t->offset, m->weights + t->offset, m->adam_m + t->offset, m->adam_v + t->offset, m->grads + t->offset, t->size,
                                                                    (float)u->rate[group->clip], group->decay ? (float)u->weight_decay : 0, (float)u->scale[group->clip],
                                                                    (float)u->beta1, (float)u->beta2, correct1, correct2);
        cudaCheck(cudaGetLastError());
    }
    splat_bounds(m, clamped);
}

/* ---------------------------------------------------------------------------------------------- the back end of gsa/train.h */

static float **cuda_buffer(CudaModel *m, int buffer) {
    float **all[] = {&m->params, &m->grads, &m->adam_m, &m->adam_v};
    return all[buffer];
}

static void cuda_put(void *model, int buffer, size_t first, size_t count, const float *from) {
    CudaModel *m = (CudaModel *)model;
    float *to = *cuda_buffer(m, buffer) + first;
    cudaCheck(cudaMemcpyAsync(to, from, count * sizeof(float), cudaMemcpyHostToDevice, m->stream));
    if (buffer == BUFFER_PARAMS && count) convert_kernel<<<CEIL_DIV(count, 256), 256, 0, m->stream>>>(m->weights + first, to, count);
    cudaCheck(cudaGetLastError());
    cudaCheck(cudaStreamSynchronize(m->stream));
}

static void cuda_write(void *model, int buffer, const float *from) { cuda_put(model, buffer, 0, ((CudaModel *)model)->total, from); }

static const float *cuda_read(void *model, int buffer) {
    CudaModel *m = (CudaModel *)model;
    if (!m->flat) m->flat = (float *)xmalloc(m->total * sizeof(float));
    cudaCheck(cudaMemcpyAsync(m->flat, *cuda_buffer(m, buffer), m->total * sizeof(float), cudaMemcpyDeviceToHost, m->stream));
    cudaCheck(cudaStreamSynchronize(m->stream));
    return m->flat;
}

static void cuda_logits(void *model, int b, int t, float *out) {
    CudaModel *m = (CudaModel *)model;
    CudaSizes z = cuda_sizes(&m->config);
    if (m->used_y) die("internal error: the logits of a forward pass with targets are their gradients");
    floatX *row = (floatX *)xmalloc(z.V * sizeof *row);
    matmul_forward(&m->matmul, m->a.logits, m->a.lnf + ((size_t)b * m->used_T + (size_t)t) * z.C, m->w.wte, NULL, NULL, NULL, 1, z.C, z.Vp, m->stream);
    cudaCheck(cudaMemcpyAsync(row, m->a.logits, z.V * sizeof *row, cudaMemcpyDeviceToHost, m->stream));
    cudaCheck(cudaStreamSynchronize(m->stream));
    for (size_t v = 0; v < z.V; v++) out[v] = (float)row[v];
    free(row);
}

static void cuda_head(void *model, int l, int h, int part, int count, float *out) {
    CudaModel *m = (CudaModel *)model;
    CudaSizes z = cuda_sizes(&m->config);
    size_t N = m->used_B * m->used_T, n = (size_t)count, size = z.HS * sizeof(floatX);
    if (m->config.recompute && m->block != (size_t)l) block_forward(m, (size_t)l, m->used_B, m->used_T);
    cudaCheck(cudaStreamSynchronize(m->stream));
    floatX *part_of_head = (floatX *)xmalloc(n * size);
    cudaCheck(cudaMemcpy2D(part_of_head, size, block_activations(m, (size_t)l, N).qkv + (size_t)part * z.A + (size_t)h * z.HS, N / n * 3 * z.A * sizeof(floatX), size, n, cudaMemcpyDeviceToHost));
    for (size_t i = 0; i < n * z.HS; i++) out[i] = (float)part_of_head[i];
    free(part_of_head);
}

static void cuda_get(void *model, int buffer, size_t first, size_t count, float *to) {
    CudaModel *m = (CudaModel *)model;
    cudaCheck(cudaMemcpyAsync(to, *cuda_buffer(m, buffer) + first, count * sizeof(float), cudaMemcpyDeviceToHost, m->stream));
    cudaCheck(cudaStreamSynchronize(m->stream));
}

static void cuda_watch(void *model, bool on) { ((CudaModel *)model)->watch = on; }

static double cuda_forward(void *model, const int *x, const int *y, int B, int T) { return gsa_forward((CudaModel *)model, x, y, (size_t)B, (size_t)T); }
static void cuda_backward(void *model, double scale) { gsa_backward((CudaModel *)model, scale); }
static void cuda_expect(void *model, double scale) { ((CudaModel *)model)->expected = scale; }
static void cuda_zero_gradients(void *model) { gsa_zero_gradients((CudaModel *)model); }
static void cuda_gradient_norms(void *model, double norms[NUM_CLIPS]) { gsa_gradient_norms((CudaModel *)model, norms); }
static void cuda_update(void *model, const Update *u, int64_t clamped[NUM_BOUNDS]) { gsa_update((CudaModel *)model, u, clamped); }
static void cuda_destroy(void *model) { gsa_destroy((CudaModel *)model); }

static const cudaDeviceProp *cuda_device(void) {
    static cudaDeviceProp device;
    int count;
    cudaError_t error = cudaGetDeviceCount(&count);
    if (error != cudaSuccess || count == 0) die("no NVIDIA GPU answers (%s); train_gsa is the program for the CPU", cudaGetErrorString(error));
    cudaCheck(cudaGetDeviceProperties(&device, 0));
    return &device;
}

static const char *cuda_name(void) {
    static char name[400];
    const cudaDeviceProp *d = cuda_device();
    if (d->major < 8) die("%s is of compute capability %d.%d; bf16 needs 8.0 (A100, RTX 30) or newer", d->name, d->major, d->minor);
    snprintf(name, sizeof name, "%.80s, %d multiprocessors, %.0f GiB, " FLOATX_NAME ", matrix products by cuBLASLt %zu", d->name, d->multiProcessorCount, (double)d->totalGlobalMem / (1 << 30),
             cublasLtGetVersion());
    return name;
}

/* Dense tensor-core peaks with fp32 sums, from the data sheets; 0: unknown. The fp32 build uses none of that. */
static double cuda_peak_flops(void) {
#ifndef GSA_FP32
    static const struct {
        const char *name;
        double flops;
    } peaks[] = {{"H100 PCIe", 756e12}, {"H100 NVL", 835e12}, {"H100", 989.4e12}, {"H200", 989.4e12}, {"GH200", 989.4e12}, {"A100", 312e12}, {"A10", 125e12}, {"L40S", 362e12},
                 {"RTX 4090", 165.2e12}, {"RTX 4080", 97.5e12}, {"RTX 3090", 71e12}};
    const cudaDeviceProp *d = cuda_device();
    for (size_t i = 0; i < sizeof peaks / sizeof *peaks; i++)
        if (strstr(d->name, peaks[i].name)) return peaks[i].flops;
#endif
    return 0;
}

/* NULL where this program can train the model, else a sentence. */
static const char *cuda_config_check(const Config *c) {
    size_t HS = config_head_size(c), G = config_gsa_heads(c);
    if (HS != 32 && HS != 64 && HS != 128) return "on the GPU heads have 32, 64 or 128 channels; change --channels or --heads";
    if (c->C > LAYERNORM_CHANNELS) return "on the GPU --channels is at most 4096";
    if (G && c->mixer == MIXER_LINEAR && c->S > SCAN_SPLATS_MOST) return "on the GPU a head of the linear mixer has at most 32 splats; lower --splats";
    if (G && c->S > SPLATS_MOST) return "on the GPU a head has at most 64 splats; lower --splats";
    return NULL;
}

/* Shared memory that a block takes of the largest kernel for S splats a head. */
template <int HS> static size_t shared_memory(const Config *c, int S) {
    bool diagonal = c->covariance == COVARIANCE_DIAG, full = c->covariance == COVARIANCE_FULL;
    size_t map, scan = 0;
    if (c->mixer == MIXER_LINEAR && S <= 16)
        map = diagonal ? SplatBackwardShape<HS, 16, true, true>::bytes : SplatBackwardShape<HS, 16, false, true>::bytes, scan = ScanShape<HS, 16>::bytes(2);
    else if (c->mixer == MIXER_LINEAR)
        map = diagonal ? SplatBackwardShape<HS, 32, true, true>::bytes : SplatBackwardShape<HS, 32, false, true>::bytes, scan = ScanShape<HS, 32>::bytes(2);
    else if (S <= 32) map = diagonal ? SplatBackwardShape<HS, 32, true, false>::bytes : SplatBackwardShape<HS, 32, false, false>::bytes;
    else map = diagonal ? SplatBackwardShape<HS, 64, true, false>::bytes : SplatBackwardShape<HS, 64, false, false>::bytes;
    if (full) map = full_bytes<HS>;
    return map > scan ? map : scan;
}
static size_t shared_memory(const Config *c, int HS, int S) { return HS == 32 ? shared_memory<32>(c, S) : HS == 64 ? shared_memory<64>(c, S) : shared_memory<128>(c, S); }

/* NULL where a GPU with so much shared memory a block can run the model's splats, else a sentence. */
static const char *cuda_shared_check(const Config *c, size_t room) {
    static char sentence[400];
    char covariance[16];
    int HS = config_head_size(c), splats = 0, heads = 0;
    if (!config_gsa_heads(c) || shared_memory(c, HS, c->S) <= room) return NULL;
    for (int S = 16; S < c->S; S *= 2)
        if (shared_memory(c, HS, S) <= room) splats = S;
    for (int size = HS / 2; size >= 32; size /= 2)
        if (!heads && shared_memory(c, size, c->S) <= room) heads = size;
    choice_name(COVARIANCE_CHOICES, c->covariance, covariance, sizeof covariance);
    int n = snprintf(sentence, sizeof sentence, "%d splats in heads of %d channels (--covariance %s) need %zu KiB of shared memory a block, and this GPU has %zu; it has enough for", c->S, HS,
                     covariance, CEIL_DIV(shared_memory(c, HS, c->S), (size_t)1024), room / 1024);
    if (splats) n += snprintf(sentence + n, sizeof sentence - (size_t)n, " --splats %d", splats);
    if (heads) n += snprintf(sentence + n, sizeof sentence - (size_t)n, "%s heads of %d channels (--heads %d)", splats ? " or" : "", heads, c->C / heads);
    if (!splats && !heads) snprintf(sentence + n, sizeof sentence - (size_t)n, " standard attention only");
    return sentence;
}

static void cuda_memory(const Config *c, int B, size_t bytes[NUM_MEMORY]) {
    Tensor tensors[NUM_TENSORS];
    CudaActivations a;
    const char *wrong = cuda_config_check(c);
    if (!wrong) wrong = cuda_shared_check(c, cuda_device()->sharedMemPerBlockOptin);
    if (wrong) die_usage("%s", wrong);
    if ((int64_t)B * c->T > INT32_MAX) die_usage("--batch %d times --seq %d is more than 2^31 tokens", B, c->T);
    size_t total = model_tensors(c, tensors);
    memset(bytes, 0, NUM_MEMORY * sizeof *bytes);
    bytes[MEMORY_PARAMS] = total * (sizeof(float) + sizeof(floatX));
    bytes[MEMORY_GRADS] = total * sizeof(float);
    bytes[MEMORY_OPTIMISER] = 2 * total * sizeof(float);
    bytes[MEMORY_WORKSPACE] = WORKSPACE;
    carve_activations(&a, NULL, c, (size_t)B, bytes);
}

static size_t cuda_free_memory(void) {
    size_t free_bytes, all, kept = (size_t)512 << 20; /* kernels and libraries take some */
    cuda_device();
    cudaCheck(cudaMemGetInfo(&free_bytes, &all));
    return free_bytes > kept ? free_bytes - kept : 0;
}

/* Where the choices of algorithms are kept: one file per card and library for all runs of this user. NULL: nowhere. */
static char *cuda_notes(void) {
    const char *cache = getenv("XDG_CACHE_HOME"), *home = getenv("HOME");
    char *folder = cache && *cache ? xasprintf("%s/gsa.c", cache) : home && *home ? xasprintf("%s/.cache/gsa.c", home) : NULL;
    if (!folder) {
        warn("neither XDG_CACHE_HOME nor HOME is set, so matrix products use cuBLASLt's first choice, which may be slower");
        return NULL;
    }
    make_folder(folder);
    char *path = xasprintf("%s/matmul %s %zu", folder, cuda_device()->name, cublasLtGetVersion());
    for (char *p = path + strlen(folder) + 1; *p; p++)
        if (*p == ' ' || *p == '/') *p = '-';
    free(folder);
    return path;
}

static void *cuda_create(const Config *c, int B) {
    CudaModel *m = gsa_create_cuda(c, (size_t)B);
    size_t N = (size_t)B * (size_t)c->T;
    m->matmul.tuned[0] = piece_size(N, piece_most), m->matmul.tuned[1] = piece_size(N, m->logits_rows);
    m->matmul.notes = cuda_notes();
    return m;
}

static const Backend cuda_backend = {cuda_name,     cuda_memory,         cuda_free_memory, cuda_create, cuda_destroy, cuda_write, cuda_read, cuda_put, cuda_get, cuda_forward,
                                     cuda_backward, cuda_zero_gradients, cuda_gradient_norms, cuda_update,  cuda_logits, cuda_head, cuda_watch, cuda_peak_flops, cuda_expect};

/* ---------------------------------------------------------------------------------------------- main */

#ifndef GSA_NO_MAIN
int main(int argc, char **argv) { return train(argc, argv, &cuda_backend); }
#endif
