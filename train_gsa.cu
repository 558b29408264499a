/* train_gsa.cu: the network of train_gsa.c on the GPU. Same layers, same names, same order, plus a stream:
     matrix products -> encoder -> layernorm -> gelu -> matmul -> feature maps: rope and splats -> the two mixers:
     attention and scan -> classifier -> norm, bounds, AdamW, Muon -> the model: forward, backward, update -> main
   Read train_gsa.c first: it says what is computed; here the comments say how. What makes splats and the two mixers
   fast fills gsa/cuda/, behind six functions: splat_forward, attention_forward, scan_forward and their backwards.

   Numbers: activations and the weights that multiply them are floatX, bf16 or (with GSA_FP32, for checking) fp32; the
   master weights, gradients, Adam's moments, statistics and all splat parameters are fp32. A floatX weight is a rounded
   copy of its master, renewed by every update.

   Every result is the same bit for bit in every run: no atomics, every sum in an order that depends on shapes alone,
   and one algorithm of cuBLASLt per shape of product (see matmul_choose).

   Unless noted, a row of C numbers is worked on by one warp in packs of 8, and C is a multiple of 32. */

#include "gsa/run/train.h"

#include <cublasLt.h>
#include <cuda.h>
#include <cudaTypedefs.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>

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
    if (status != CUBLAS_STATUS_SUCCESS)
        die("cuBLASLt reports '%s' (%s:%d)", cublasLtGetStatusString(status), file, line);
}

/* Asked once: an answer takes milliseconds. */
static const cudaDeviceProp *cuda_device(void) {
    static cudaDeviceProp device;
    static bool known;
    int current;
    if (known) return &device;
    cudaError_t error = cudaGetDevice(&current);
    if (error != cudaSuccess)
        die("no NVIDIA GPU answers (%s); train_gsa is the program for the CPU", cudaGetErrorString(error));
    cudaCheck(cudaGetDeviceProperties(&device, current));
    known = true;
    return &device;
}

#define CEIL_DIV(a, b) (((a) + (b)-1) / (b))

/* 8 numbers, read and written at once: 16 bytes of bf16. */
#ifdef GSA_FP32
struct Pack {
    float4 half[2];
};
__device__ static inline float number(const Pack &p, int i) { return ((const float *)p.half)[i]; }
__device__ static inline Pack make_pack(const float v[8]) {
    return {{make_float4(v[0], v[1], v[2], v[3]), make_float4(v[4], v[5], v[6], v[7])}};
}
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
__device__ static inline Pack make_pack(const float v[8]) {
    return {make_uint4(make_pair(v[0], v[1]), make_pair(v[2], v[3]), make_pair(v[4], v[5]), make_pair(v[6], v[7]))};
}
#endif
__device__ static inline Pack load_pack(const floatX *from) { return *(const Pack *)from; }
/* to: in global memory; by the intrinsic, because a plain assignment may be taken apart into four stores */
__device__ static inline void store_whole(floatX *to, const Pack &p) {
#ifdef GSA_FP32
    __stwb((float4 *)to, p.half[0]);
    __stwb((float4 *)to + 1, p.half[1]);
#else
    __stwb((uint4 *)to, p.pairs);
#endif
}
__device__ static inline void store_pack(floatX *to, const float v[8]) { store_whole(to, make_pack(v)); }
__device__ static inline void load_floats(float v[8], const float *from) {
    float4 low = *(const float4 *)from, high = *(const float4 *)(from + 4);
    v[0] = low.x;
    v[1] = low.y;
    v[2] = low.z;
    v[3] = low.w;
    v[4] = high.x;
    v[5] = high.y;
    v[6] = high.z;
    v[7] = high.w;
}

/* 128 bytes */
__device__ static inline void prefetch(const void *line) { asm volatile("prefetch.global.L2 [%0];" ::"l"(line)); }

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

/* ---------------------------------------------------------------------- matrix products

   All large products are cuBLASLt's. It counts in columns, so a row-major (N, C) is its (C, N): D (m, n) = alpha
   op(A) op(B) + add C, where D's m is the contiguous dimension. An epilogue does what would else be a pass over memory
   of its own: the bias, GELU or its derivative. Where cuBLASLt has no algorithm with the epilogue, callers do that
   pass. */

typedef struct {
    int m, n, k;
    bool ta, tb, wide; /* wide: C and D are fp32 */
    float add;         /* what C is multiplied by; 0: there is none */
    int epilogue;
    int batch; /* products at once, each of the next matrices */
    int most;  /* of these: its algorithm serves, so that a product rounds alike however many go with it */
} MatmulShape;

typedef struct {
    MatmulShape shape;
    bool possible, tuned;
    cublasLtMatmulDesc_t description;
    cublasLtMatrixLayout_t a, b, d;
    cublasLtMatmulAlgo_t algorithm;
} MatmulPlan;

typedef struct {
    cublasLtHandle_t handle;
    void *workspace; /* that of `side` is behind it */
    /* apart: gradients of matrices and their biases are computed on the stream `side`, beside what the backward pass
       goes on with: they fill the device where one kernel ends and the next begins. */
    bool apart;
    cudaStream_t side;
    cudaEvent_t forked, joined[2];
    MatmulPlan *plans;
    int count, room;
    size_t tuned[2]; /* products over this many tokens get their algorithm by timing; 0: none do */
    char *notes;     /* the file that remembers the choices; NULL: nowhere, so nothing is timed */
    char *given;     /* choices of the run that goes on, or of rank 0, lines as in that file; NULL: none */
} Matmul;

enum { WORKSPACE = 32 << 20, CANDIDATES = 8 };

/* A line of the choices: the shape as text, then, unless NULL, the algorithm's bytes. Returns the length. */
enum { CHOICE_ROOM = 400 };
static size_t matmul_line(char line[CHOICE_ROOM], const MatmulShape *s, const cublasLtMatmulAlgo_t *algorithm) {
    int at = snprintf(line, CHOICE_ROOM, FLOATX_NAME " %d %d %d %d%d%d%d %d ", s->m, s->n, s->k, s->ta, s->tb, s->wide,
                      s->add != 0, s->epilogue);
    const unsigned char *bytes = (const unsigned char *)algorithm;
    for (size_t i = 0; algorithm && i < sizeof *algorithm; i++)
        at += snprintf(line + at, CHOICE_ROOM - (size_t)at, "%02x", bytes[i]);
    return (size_t)at;
}

/* Takes the algorithm of p's shape from lines of choices, if one of them has it and this library takes it. */
static bool matmul_take(const Matmul *mm, MatmulPlan *p, const char *choices) {
    char wanted[CHOICE_ROOM];
    size_t prefix = matmul_line(wanted, &p->shape, NULL), digits = 2 * sizeof p->algorithm;
    for (const char *line = choices, *next; *line; line = next) {
        size_t length = strcspn(line, "\n");
        next = line + length + (line[length] == '\n');
        if (length != prefix + digits || strncmp(line, wanted, prefix) != 0) continue;
        cublasLtMatmulAlgo_t algorithm;
        cublasLtMatmulHeuristicResult_t result;
        bool read = true;
        for (size_t i = 0; i < sizeof algorithm; i++)
            read = read && sscanf(line + prefix + 2 * i, "%2hhx", (unsigned char *)&algorithm + i) == 1;
        if (!read ||
            cublasLtMatmulAlgoCheck(mm->handle, p->description, p->a, p->b, p->d, p->d, &algorithm, &result) !=
                CUBLAS_STATUS_SUCCESS ||
            result.workspaceSize > WORKSPACE)
            continue;
        p->algorithm = algorithm;
        return true;
    }
    return false;
}

/* The fastest of cuBLASLt's first proposals, on this product's own data; milliseconds. */
static float matmul_time(Matmul *mm, MatmulPlan *p, const cublasLtMatmulHeuristicResult_t *proposals, int count,
                         void *D, const void *A, const void *B, const void *C, float alpha, cudaStream_t stream) {
    float beta = p->shape.add, best = INFINITY;
    void *into = D, *room = NULL;
    if (p->shape.add && C == D) { /* adding again and again would spoil D */
        size_t bytes = (size_t)p->shape.m * p->shape.n * (p->shape.wide ? sizeof(float) : sizeof(floatX));
        cudaCheck(cudaMalloc(&room, bytes));
        cudaCheck(cudaMemsetAsync(room, 0, bytes, stream));
        into = room;
        C = room;
    }
    cudaEvent_t start, end;
    cudaCheck(cudaEventCreate(&start));
    cudaCheck(cudaEventCreate(&end));
    cudaCheck(cudaDeviceSynchronize()); /* what else is under way would take its share */
    for (int i = 0; i < count; i++) {
        float fastest = INFINITY;
        for (int run = 0; run < 4; run++) {
            float ms;
            cudaCheck(cudaEventRecord(start, stream));
            if (cublasLtMatmul(mm->handle, p->description, &alpha, A, p->a, B, p->b, &beta, C, p->d, into, p->d,
                               &proposals[i].algo, mm->workspace, WORKSPACE, stream) != CUBLAS_STATUS_SUCCESS)
                break;
            cudaCheck(cudaEventRecord(end, stream));
            cudaCheck(cudaEventSynchronize(end));
            cudaCheck(cudaEventElapsedTime(&ms, start, end));
            if (run > 0 && ms < fastest) fastest = ms;
        }
        if (fastest < best) {
            best = fastest;
            p->algorithm = proposals[i].algo;
        }
    }
    cudaCheck(cudaEventDestroy(start));
    cudaCheck(cudaEventDestroy(end));
    cudaCheck(cudaFree(room));
    return best;
}

/* Opens the file that remembers the choices, alone: who else wants it waits, and then finds what was chosen here.
   *choices: what is in it, malloc'd. */
static FILE *open_notes(const char *path, char **choices) {
    size_t bytes;
    FILE *notes = fopen(path, "a");
    if (!notes)
        die("cannot write %s (%s), which remembers the fastest algorithm of each matrix product so that runs repeat "
            "bit for bit; make its folder writable",
            path, strerror(errno));
    while (flock(fileno(notes), LOCK_EX) != 0 && errno == EINTR)
        ; /* on file systems without locks: as if alone */
    *choices = read_file(path, &bytes);
    return notes;
}

/* Another algorithm would round differently. So one that was chosen by its time is remembered: in the run's state
   files, from where a run that goes on takes it (mm->given), and in a file of all runs, so that two runs on one
   machine agree bit for bit, the first of all included. */
static void matmul_choose(Matmul *mm, MatmulPlan *p, const cublasLtMatmulHeuristicResult_t *proposals, int count,
                          void *D, const void *A, const void *B, const void *C, float alpha, cudaStream_t stream) {
    char line[CHOICE_ROOM], *choices, how[64] = "remembered";
    if (mm->given && matmul_take(mm, p, mm->given)) snprintf(how, sizeof how, "the run's own");
    else if (!mm->notes) return; /* the first proposal */
    else {
        FILE *notes = open_notes(mm->notes, &choices);
        if (!matmul_take(mm, p, choices)) {
            float ms = matmul_time(mm, p, proposals, count, D, A, B, C, alpha, stream);
            matmul_line(line, &p->shape, &p->algorithm);
            size_t length = strlen(choices); /* who was killed may have left half a line */
            fprintf(notes, "%s%s\n", length && choices[length - 1] != '\n' ? "\n" : "", line);
            snprintf(how, sizeof how, "%.3f ms, %.0f TFLOP/s", ms, 2e-9 * p->shape.m * p->shape.n * p->shape.k / ms);
        }
        free(choices);
        if (fclose(notes) != 0) die("cannot write %s: %s", mm->notes, strerror(errno));
    }
    int id = 0, tile = 0, stages = 0, split = 0;
    cublasLtMatmulAlgoConfigGetAttribute(&p->algorithm, CUBLASLT_ALGO_CONFIG_ID, &id, sizeof id, NULL);
    cublasLtMatmulAlgoConfigGetAttribute(&p->algorithm, CUBLASLT_ALGO_CONFIG_TILE_ID, &tile, sizeof tile, NULL);
    cublasLtMatmulAlgoConfigGetAttribute(&p->algorithm, CUBLASLT_ALGO_CONFIG_STAGES_ID, &stages, sizeof stages, NULL);
    cublasLtMatmulAlgoConfigGetAttribute(&p->algorithm, CUBLASLT_ALGO_CONFIG_SPLITK_NUM, &split, sizeof split, NULL);
    printf("matmul        (%d, %d) x %d%s, epilogue %d: algorithm %d, tile %d, stages %d, split %d, %s\n", p->shape.n,
           p->shape.m, p->shape.k, p->shape.add ? " added" : "", p->shape.epilogue, id, tile, stages, split, how);
}

static int by_text(const void *a, const void *b) { return strcmp(*(char *const *)a, *(char *const *)b); }

/* The lines of all choices that hold for this run, sorted: its own, and those given that it has not needed yet. The
   caller frees it. */
static char *matmul_choices(const Matmul *mm) {
    char line[CHOICE_ROOM];
    int room = mm->count, count = 0;
    for (const char *p = mm->given; p && *p; p++) room += *p == '\n';
    char **lines = (char **)xmalloc((size_t)(room + 1) * sizeof *lines);
    for (int i = 0; i < mm->count; i++) {
        const MatmulPlan *p = &mm->plans[i];
        if (!p->possible || !p->tuned) continue;
        matmul_line(line, &p->shape, &p->algorithm);
        lines[count++] = xstrdup(line);
    }
    int own = count;
    for (const char *given = mm->given, *end; given && *given && (end = strchr(given, '\n')); given = end + 1) {
        char *other = xasprintf("%.*s", (int)(end - given), given), *bytes = strrchr(other, ' ');
        bool needed = bytes != NULL;
        for (int i = 0; needed && i < own; i++) needed = strncmp(lines[i], other, (size_t)(bytes - other) + 1) != 0;
        if (needed) lines[count++] = other;
        else free(other);
    }
    qsort(lines, (size_t)count, sizeof *lines, by_text);
    char *text = xstrdup("");
    for (int i = 0; i < count; i++) {
        char *longer = xasprintf("%s%s\n", text, lines[i]);
        free(text);
        free(lines[i]);
        text = longer;
    }
    free(lines);
    return text;
}

/* p is for so many products at once. */
static void matmul_batch(const MatmulPlan *p, int count) {
    const MatmulShape *s = &p->shape;
    const cublasLtMatrixLayout_t layouts[] = {p->a, p->b, p->d};
    const int64_t apart[] = {(int64_t)s->m * s->k, (int64_t)s->k * s->n, (int64_t)s->m * s->n};
    for (int i = 0; i < 3 && s->most > 1; i++) {
        cublasCheck(
            cublasLtMatrixLayoutSetAttribute(layouts[i], CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, &count, sizeof count));
        cublasCheck(cublasLtMatrixLayoutSetAttribute(layouts[i], CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, &apart[i],
                                                     sizeof apart[i]));
    }
}

/* D = alpha op(A) op(B) + add C with the epilogue of s; vector: bias; aux: what GELU was applied to. false: there is no
   algorithm for it and nothing was done. */
static bool matmul_run(Matmul *mm, MatmulShape s, void *D, const void *A, const void *B, const void *C,
                       const void *vector, const void *aux, float alpha, cudaStream_t stream) {
    MatmulPlan *p = NULL;
    bool fresh;
    for (int i = 0; i < mm->count && !p; i++) {
        const MatmulShape *o = &mm->plans[i].shape;
        if (o->m == s.m && o->n == s.n && o->k == s.k && o->ta == s.ta && o->tb == s.tb && o->wide == s.wide &&
            o->add == s.add && o->epilogue == s.epilogue && o->batch == s.batch && o->most == s.most)
            p = &mm->plans[i];
    }
    fresh = !p;
    if (!s.add) C = D;
    if (fresh) {
        if (mm->count == mm->room)
            mm->plans = (MatmulPlan *)xrealloc(mm->plans, (size_t)(mm->room = 2 * mm->room + 32) * sizeof *mm->plans);
        p = &mm->plans[mm->count++];
        p->shape = s;
        cublasOperation_t ta = s.ta ? CUBLAS_OP_T : CUBLAS_OP_N, tb = s.tb ? CUBLAS_OP_T : CUBLAS_OP_N;
        cudaDataType_t out = s.wide ? CUDA_R_32F : FLOATX_TYPE;
        int64_t aux_stride = s.m;
        cublasCheck(cublasLtMatmulDescCreate(&p->description, CUBLAS_COMPUTE_32F, CUDA_R_32F));
        cublasCheck(cublasLtMatmulDescSetAttribute(p->description, CUBLASLT_MATMUL_DESC_TRANSA, &ta, sizeof ta));
        cublasCheck(cublasLtMatmulDescSetAttribute(p->description, CUBLASLT_MATMUL_DESC_TRANSB, &tb, sizeof tb));
        cublasCheck(cublasLtMatmulDescSetAttribute(p->description, CUBLASLT_MATMUL_DESC_EPILOGUE, &s.epilogue,
                                                   sizeof s.epilogue));
        if (vector)
            cublasCheck(
                cublasLtMatmulDescSetAttribute(p->description, CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, &out, sizeof out));
        if (aux)
            cublasCheck(cublasLtMatmulDescSetAttribute(p->description, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD,
                                                       &aux_stride, sizeof aux_stride));
        cublasCheck(cublasLtMatrixLayoutCreate(&p->a, FLOATX_TYPE, (uint64_t)(s.ta ? s.k : s.m),
                                               (uint64_t)(s.ta ? s.m : s.k), s.ta ? s.k : s.m));
        cublasCheck(cublasLtMatrixLayoutCreate(&p->b, FLOATX_TYPE, (uint64_t)(s.tb ? s.n : s.k),
                                               (uint64_t)(s.tb ? s.k : s.n), s.tb ? s.n : s.k));
        cublasCheck(cublasLtMatrixLayoutCreate(&p->d, out, (uint64_t)s.m, (uint64_t)s.n, s.m));
        matmul_batch(p, s.most);
    }
    if (vector)
        cublasCheck(
            cublasLtMatmulDescSetAttribute(p->description, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &vector, sizeof vector));
    if (aux)
        cublasCheck(cublasLtMatmulDescSetAttribute(p->description, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, &aux,
                                                   sizeof aux));
    if (fresh) {
        cublasLtMatmulHeuristicResult_t proposals[CANDIDATES];
        cublasLtMatmulPreference_t preference;
        size_t workspace = WORKSPACE;
        uint32_t alignment = 16;
        int count = 0;
        cublasCheck(cublasLtMatmulPreferenceCreate(&preference));
        cublasCheck(cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                                                         &workspace, sizeof workspace));
        const cublasLtMatmulPreferenceAttributes_t aligned[] = {
            CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
            CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES};
        for (int i = 0; i < 4; i++)
            cublasCheck(cublasLtMatmulPreferenceSetAttribute(preference, aligned[i], &alignment, sizeof alignment));
        cublasStatus_t status = cublasLtMatmulAlgoGetHeuristic(mm->handle, p->description, p->a, p->b, p->d, p->d,
                                                               preference, CANDIDATES, proposals, &count);
        cublasCheck(cublasLtMatmulPreferenceDestroy(preference));
        p->possible = status == CUBLAS_STATUS_SUCCESS && count > 0;
        if (!p->possible && s.epilogue == CUBLASLT_EPILOGUE_DEFAULT)
            die("cuBLASLt has no algorithm for (%d, %d) x (%d, %d)", s.n, s.k, s.k, s.m);
        if (p->possible) p->algorithm = proposals[0].algo;
        matmul_batch(p, s.batch);
        p->tuned = false;
        for (int i = 0; i < 2; i++)
            p->tuned |= s.most == 1 && mm->tuned[i] && (mm->tuned[i] == (size_t)s.n || mm->tuned[i] == (size_t)s.k);
        if (p->possible && p->tuned) matmul_choose(mm, p, proposals, count, D, A, B, C, alpha, stream);
    }
    if (!p->possible) return false;
    float beta = s.add;
    void *workspace = (char *)mm->workspace + (stream == mm->side ? WORKSPACE : 0);
    cublasCheck(cublasLtMatmul(mm->handle, p->description, &alpha, A, p->a, B, p->b, &beta, C, p->d, D, p->d,
                               &p->algorithm, workspace, WORKSPACE, stream));
    return true;
}

/* What `side` gets from here on comes after what `stream` got so far. */
static cudaStream_t fork_side(Matmul *mm, cudaStream_t stream) {
    cudaCheck(cudaEventRecord(mm->forked, stream));
    cudaCheck(cudaStreamWaitEvent(mm->side, mm->forked, 0));
    return mm->side;
}
/* And the other way: mark i is what `side` got so far, and `stream` waits for it. */
static void mark_side(Matmul *mm, int i) {
    if (mm->apart) cudaCheck(cudaEventRecord(mm->joined[i], mm->side));
}
static void await_side(Matmul *mm, int i, cudaStream_t stream) {
    if (mm->apart) cudaCheck(cudaStreamWaitEvent(stream, mm->joined[i], 0));
}

static void join_side(Matmul *mm, cudaStream_t stream) {
    mark_side(mm, 0);
    await_side(mm, 0, stream);
}

static void matmul_create(Matmul *mm) {
    memset(mm, 0, sizeof *mm);
    cublasCheck(cublasLtCreate(&mm->handle));
    cudaCheck(cudaMalloc(&mm->workspace, 2 * WORKSPACE));
    cudaCheck(cudaStreamCreate(&mm->side));
    cudaCheck(cudaEventCreateWithFlags(&mm->forked, cudaEventDisableTiming));
    for (int i = 0; i < 2; i++) cudaCheck(cudaEventCreateWithFlags(&mm->joined[i], cudaEventDisableTiming));
}

static void matmul_destroy(Matmul *mm) {
    for (int i = 0; i < mm->count; i++) {
        cublasLtMatmulDescDestroy(mm->plans[i].description);
        cublasLtMatrixLayoutDestroy(mm->plans[i].a);
        cublasLtMatrixLayoutDestroy(mm->plans[i].b);
        cublasLtMatrixLayoutDestroy(mm->plans[i].d);
    }
    free(mm->plans);
    free(mm->notes);
    free(mm->given);
    cudaFree(mm->workspace);
    cudaStreamDestroy(mm->side);
    cudaEventDestroy(mm->forked);
    for (int i = 0; i < 2; i++) cudaEventDestroy(mm->joined[i]);
    cublasLtDestroy(mm->handle);
}

/* Column sums in two steps, each in a fixed order: SUM_BLOCKS partial sums of every column, then those added up. */
enum { SUM_BLOCKS = 396 };

/* partials[block] = column sums of every SUM_BLOCKS-th row of x (N, C); a block has 256 columns at a time, 8 a lane,
   its 8 warps take turns with the rows. */
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
        for (int e = 0; e < 8 && (int)threadIdx.y == y; e++)
            sums[threadIdx.x * 8 + e] = (y ? sums[threadIdx.x * 8 + e] : 0) + mine[e];
        __syncthreads();
    }
    if (threadIdx.y == 0 && c < C)
        for (int e = 0; e < 8; e++) partials[blockIdx.x * C + c + e] = sums[threadIdx.x * 8 + e];
}

/* Up to three vectors that lie side by side in a row of partials. */
typedef struct {
    float *to[3]; /* (C) each; NULL: none */
} SumVectors;

/* sums.to[i][c] += column i C + c of partials (SUM_BLOCKS, columns): a block owns 32 columns, its warps' sums are
   added in order */
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

/* ---------------------------------------------------------------------- encoder */

__global__ static void encoder_forward_kernel(floatX *out, const int *tokens, const floatX *wte, const floatX *wpe,
                                              size_t N, size_t T, size_t C, size_t first) {
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
static void encoder_forward(floatX *out, const int *tokens, const floatX *wte, const floatX *wpe, size_t B, size_t T,
                            size_t C, size_t first, cudaStream_t stream) {
    encoder_forward_kernel<<<CEIL_DIV(B * T * C / 8, 256), 256, 0, stream>>>(out, tokens, wte, wpe, B * T, T, C, first);
    cudaCheck(cudaGetLastError());
}

/* A frequent token has thousands of rows to add, most have one. The host sorts the positions by token and cuts each
   token's list into segments of at most SEGMENT rows; a token with several segments is finished from their sums. */
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

static void bucket_tokens(Buckets *b, const int *tokens, size_t N, size_t V /* all are below */,
                          int *starts /* scratch (V + 1) */) {
    memset(starts, 0, (V + 1) * sizeof *starts);
    for (size_t i = 0; i < N; i++) starts[tokens[i] + 1]++;
    b->segment_count = b->token_count = b->sum_count = 0;
    for (size_t v = 0; v < V; v++) {
        int count = starts[v + 1], first = starts[v];
        starts[v + 1] += first;
        bool several = count > SEGMENT;
        if (several) b->tokens[b->token_count++] = {b->sum_count, (int)CEIL_DIV(count, SEGMENT), 0, (int)v};
        for (int done = 0; done < count; done += SEGMENT)
            b->segments[b->segment_count++] = {first + done, count - done < SEGMENT ? count - done : SEGMENT,
                                               several ? b->sum_count++ : -1, (int)v};
    }
    for (size_t i = 0; i < N; i++) b->positions[starts[tokens[i]]++] = (int)i;
}
static size_t bucket_sums(size_t N) { return N / SEGMENT + N / (SEGMENT + 1) + 1; } /* rows of sums, at most */

/* One warp: a segment and 256 columns. */
__global__ static void encoder_backward_segments_kernel(float *dwte, float *sums, const floatX *dout,
                                                        const int *positions, const Bucket *segments, size_t C) {
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

__global__ static void encoder_backward_positions_kernel(float *dwpe, const floatX *dout, size_t B, size_t T,
                                                         size_t C) {
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
static void encoder_backward(float *dwte, float *dwpe, const floatX *dout, const Buckets *b, float *sums, size_t B,
                             size_t T, size_t C, cudaStream_t stream) {
    encoder_backward_segments_kernel<<<dim3((unsigned)b->segment_count, (unsigned)CEIL_DIV(C, 256)), 32, 0, stream>>>(
        dwte, sums, dout, b->positions, b->segments, C);
    cudaCheck(cudaGetLastError());
    if (b->token_count > 0)
        encoder_backward_tokens_kernel<<<dim3((unsigned)b->token_count, (unsigned)(C / 32)), dim3(32, 16), 0, stream>>>(
            dwte, sums, b->tokens, C);
    cudaCheck(cudaGetLastError());
    if (dwpe) encoder_backward_positions_kernel<<<CEIL_DIV(T * C / 8, 256), 256, 0, stream>>>(dwpe, dout, B, T, C);
    cudaCheck(cudaGetLastError());
}

/* ---------------------------------------------------------------------- layernorm */

#define LAYERNORM_EPSILON 1e-5
enum { LAYERNORM_CHANNELS = 4096 }; /* at most: a row is held in the registers of a warp */

/* Calls kernel<K> with the smallest K packs a lane that hold C numbers in a warp. */
#define BY_WIDTH(C, launch)              \
    do {                                 \
        size_t packs = CEIL_DIV(C, 256); \
        if (packs <= 1) {                \
            enum { K = 1 };              \
            launch;                      \
        } else if (packs <= 2) {         \
            enum { K = 2 };              \
            launch;                      \
        } else if (packs <= 3) {         \
            enum { K = 3 };              \
            launch;                      \
        } else if (packs <= 4) {         \
            enum { K = 4 };              \
            launch;                      \
        } else if (packs <= 8) {         \
            enum { K = 8 };              \
            launch;                      \
        } else {                         \
            enum { K = 16 };             \
            launch;                      \
        }                                \
        cudaCheck(cudaGetLastError());   \
    } while (0)

template <int K>
__global__ static void layernorm_forward_kernel(floatX *out, float *mean, float *rstd, const floatX *in,
                                                const float *weight, const float *bias, size_t N, size_t C) {
    size_t i = (size_t)blockIdx.x * blockDim.y + threadIdx.y;
    if (i >= N) return;
    float x[K][8], sum = 0, square = 0;
    for (int k = 0; k < K; k++) {
        size_t c = (size_t)(k * 32 + threadIdx.x) * 8;
        Pack p = {};
        if (c < C) p = load_pack(in + i * C + c);
        for (int e = 0; e < 8; e++) {
            x[k][e] = number(p, e);
            sum += x[k][e];
        }
    }
    float m = warp_sum(sum) / (float)C;
    for (int k = 0; k < K; k++)
        for (int e = 0; e < 8; e++)
            square += (size_t)(k * 32 + threadIdx.x) * 8 < C ? (x[k][e] - m) * (x[k][e] - m) : 0;
    float r = rsqrtf(warp_sum(square) / (float)C + (float)LAYERNORM_EPSILON);
    for (int k = 0; k < K; k++) {
        size_t c = (size_t)(k * 32 + threadIdx.x) * 8;
        if (c >= C) break;
        float w[8], b[8];
        load_floats(w, weight + c);
        load_floats(b, bias + c);
        for (int e = 0; e < 8; e++) x[k][e] = (x[k][e] - m) * r * w[e] + b[e];
        store_pack(out + i * C + c, x[k]);
    }
    if (threadIdx.x == 0) {
        mean[i] = m;
        rstd[i] = r;
    }
}

/* out (N, C) = (x - mean) / sqrt(var + 1e-5) * weight + bias, row by row; mean and rstd (N) are kept for the
   backward pass */
static void layernorm_forward(floatX *out, float *mean, float *rstd, const floatX *in, const float *weight,
                              const float *bias, size_t N, size_t C, cudaStream_t stream) {
    BY_WIDTH(C, (layernorm_forward_kernel<K>
                 <<<CEIL_DIV(N, 8), dim3(32, 8), 0, stream>>>(out, mean, rstd, in, weight, bias, N, C)));
}

/* A warp keeps its rows' sums for dweight, dbias and dsum in registers, a block adds its warps' in order and writes
   them to its row of partials (SUM_BLOCKS, 3C). */
template <int K>
__global__ static void __launch_bounds__(128, K > 3 ? 1 : 3)
    layernorm_backward_kernel(floatX *din, float *partials, const floatX *dout, const floatX *in, const float *weight,
                              const float *mean, const float *rstd, size_t N, size_t C) {
    extern __shared__ float sums[]; /* (3C) */
    float dw[K][8] = {}, db[K][8] = {}, ds[K][8] = {};
    for (size_t i = (size_t)blockIdx.x * 4 + threadIdx.y; i < N; i += (size_t)gridDim.x * 4) {
        Pack px[K], pd[K], old[K];
        float m = mean[i], r = rstd[i], sum = 0, sum_n = 0;
        for (int k = 0; k < K; k++) {
            size_t c = (size_t)(k * 32 + threadIdx.x) * 8;
            px[k] = pd[k] = old[k] = {};
            if (c < C) {
                px[k] = load_pack(in + i * C + c);
                pd[k] = load_pack(dout + i * C + c);
                old[k] = load_pack(din + i * C + c);
            }
        }
        for (int k = 0; k < K; k++) {
            size_t c = (size_t)(k * 32 + threadIdx.x) * 8;
            if (c >= C) break;
            float w[8];
            load_floats(w, weight + c);
            for (int e = 0; e < 8; e++) {
                float d = number(pd[k], e), n = (number(px[k], e) - m) * r, dn = d * w[e];
                sum += dn;
                sum_n += dn * n;
                dw[k][e] += d * n;
                db[k][e] += d;
            }
        }
        sum = warp_sum(sum) / (float)C;
        sum_n = warp_sum(sum_n) / (float)C;
        for (int k = 0; k < K; k++) {
            size_t c = (size_t)(k * 32 + threadIdx.x) * 8;
            if (c >= C) break;
            float w[8], dx[8];
            load_floats(w, weight + c);
            for (int e = 0; e < 8; e++) {
                dx[e] = number(old[k], e) + r * (number(pd[k], e) * w[e] - sum - (number(px[k], e) - m) * r * sum_n);
                ds[k][e] += dx[e];
            }
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

/* With n = (x - mean) rstd and dn = dout weight: dx = rstd (dn - mean(dn) - n mean(dn n)). Adds to din: the residual
   stream. dsum (C) += column sums of din then, which are the gradient of the bias of whatever was added to the
   stream before; NULL: not wanted. */
static void layernorm_backward(floatX *din, float *dweight, float *dbias, float *dsum, float *partials,
                               const floatX *dout, const floatX *in, const float *weight, const float *mean,
                               const float *rstd, size_t N, size_t C, cudaStream_t stream) {
    BY_WIDTH(C, (layernorm_backward_kernel<K><<<SUM_BLOCKS, dim3(32, 4), 3 * C * sizeof(float), stream>>>(
                    din, partials, dout, in, weight, mean, rstd, N, C)));
    add_partials({{dweight, dbias, dsum}}, 3, partials, C, stream);
}

/* ---------------------------------------------------------------------- gelu */

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

/* ---------------------------------------------------------------------- matmul */

__global__ static void add_bias_kernel(floatX *out, const floatX *bias, size_t N, size_t OC) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < N * OC) out[i] = (floatX)((float)out[i] + (float)bias[i % OC]);
}

/* Long sequences go through a matrix product in equal pieces of at most PIECE tokens: one choice of algorithms
   serves all lengths, no index within a product comes near 2^31, and sums over tokens do not depend on what is kept
   in memory. The MLP's hidden layer takes the same pieces, so that it need not exist as a whole; logits, the widest
   of all, take smaller ones when there are several. */
enum { PIECE = 65536, LOGITS_PIECE = 16384 };
static size_t piece_most = PIECE, logits_piece_most = LOGITS_PIECE; /* variables for the tests, which have few tokens */
static size_t piece_size(size_t N, size_t most) {
    return N <= most ? N : CEIL_DIV(CEIL_DIV(N, CEIL_DIV(N, most)), 16) * 16;
}
static size_t mlp_piece(size_t N) { return N < piece_most ? N : piece_most; } /* room for any smaller batch too */
/* for a model with room for N tokens; all of them where that is one piece, so that no logits are made twice */
static size_t logits_piece(size_t N) { return N <= piece_most ? N : logits_piece_most; }

/* out (N, OC) = in (N, C) weight^T + bias + add; weight (OC, C); bias, add NULL: none. With pre (N, OC) the sum goes
   there, and out = gelu(sum). */
static void matmul_forward(Matmul *mm, floatX *out, const floatX *in, const floatX *weight, const floatX *bias,
                           const floatX *add, floatX *pre, size_t N, size_t C, size_t OC, cudaStream_t stream) {
    size_t piece = piece_size(N, piece_most);
    if (piece < N) {
        for (size_t i = 0; i < N; i += piece)
            matmul_forward(mm, out + i * OC, in + i * C, weight, bias, add ? add + i * OC : NULL,
                           pre ? pre + i * OC : NULL, i + piece < N ? piece : N - i, C, OC, stream);
        return;
    }
    MatmulShape s = {(int)OC, (int)N, (int)C, true, false, false, add ? 1.0f : 0, CUBLASLT_EPILOGUE_DEFAULT, 1, 1};
    if (pre) s.epilogue = CUBLASLT_EPILOGUE_GELU_AUX_BIAS;
    else if (bias) s.epilogue = CUBLASLT_EPILOGUE_BIAS;
    if (matmul_run(mm, s, out, weight, in, add, bias, pre, 1, stream)) return;
    s.epilogue = CUBLASLT_EPILOGUE_DEFAULT;
    floatX *sum = pre ? pre : out;
    matmul_run(mm, s, sum, weight, in, add, NULL, NULL, 1, stream);
    add_bias_kernel<<<CEIL_DIV(N * OC, 256), 256, 0, stream>>>(sum, bias, N, OC);
    cudaCheck(cudaGetLastError());
    if (pre) gelu_forward(out, pre, N * OC, stream);
}

/* din (N, C), or where in = gelu(pre) the gradient of pre; adds to dweight and dbias (NULL: somebody else does), aside
   where mm->apart. All times scale. partials: scratch of add_column_sums. cuBLASLt's own epilogue for dbias makes the
   products of a layer 0.4 ms slower on an H100, which is more than to read dout again takes. */
static void matmul_backward(Matmul *mm, floatX *din, float *dweight, float *dbias, float *partials, const floatX *dout,
                            const floatX *in, const floatX *weight, const floatX *pre, float scale, size_t N, size_t C,
                            size_t OC, cudaStream_t stream) {
    size_t piece = piece_size(N, piece_most);
    if (piece < N) {
        for (size_t i = 0; i < N; i += piece)
            matmul_backward(mm, din + i * C, dweight, dbias, partials, dout + i * OC, in + i * C, weight,
                            pre ? pre + i * C : NULL, scale, i + piece < N ? piece : N - i, C, OC, stream);
        return;
    }
    cudaStream_t aside = mm->apart ? fork_side(mm, stream) : stream;
    MatmulShape s = {(int)C, (int)OC, (int)N, false, true, true, 1, CUBLASLT_EPILOGUE_DEFAULT, 1, 1};
    matmul_run(mm, s, dweight, in, dout, dweight, NULL, NULL, scale, aside);
    if (dbias) add_column_sums(dbias, partials, dout, N, OC, aside);
    s = {(int)C, (int)N, (int)OC, false, false, false, 0, pre ? CUBLASLT_EPILOGUE_DGELU : CUBLASLT_EPILOGUE_DEFAULT,
         1,      1};
    if (matmul_run(mm, s, din, weight, dout, NULL, NULL, pre, scale, stream)) return;
    s.epilogue = CUBLASLT_EPILOGUE_DEFAULT;
    matmul_run(mm, s, din, weight, dout, NULL, NULL, NULL, scale, stream);
    gelu_backward(din, din, pre, N * C, stream);
}

/* ---------------------------------------------------------------------- feature maps

   A head turns its queries and keys into features, and logits are f_q . f_k (times a scale per head). A standard
   head's features are q and k themselves, read where they lie in qkv, or q and k normalised and rotated (rope); a
   GSA head's are its splats' responses times their envelope (splat). features (B, T, 2C): f_q of all heads, then
   f_k. */

/* The heads of a layer that a launch is for. */
typedef struct {
    int count;
    unsigned char head[MAX_HEADS];
} HeadList;

#define SPHERE_EPSILON 1e-6

/* The angle of position t in a wave whose phase grows by step / 2^32 of a turn a position, from `phase` on; wraps
   exactly, as in train_gsa.c. */
__device__ static inline float wave_angle(uint32_t step, size_t t, uint32_t phase = 0) {
    return (float)(int32_t)(step * (uint32_t)t + phase) * (float)(3.141592653589793 / 2147483648.0);
}

/* an angle, such as that by which a wave turns a position, in 2^-32 turns */
__host__ __device__ static inline uint32_t wave_step(double theta) {
    return (uint32_t)llrint(theta / 6.283185307179586 * 4294967296.0);
}

/* What pairs of a head turn by: wave_step of each (HS/2), one set for all heads (apart 0) or one a listed head. */
typedef struct {
    const uint32_t *steps;
    size_t apart; /* from one head's set to the next */
} Rotations;

/* HS / 16 lanes share a row; each has 8 numbers of its first half and their partners in the second. */
template <int HS>
__global__ static void rope_forward_kernel(floatX *features, const floatX *qkv, Rotations turns,
                                           const __grid_constant__ HeadList heads, size_t N, size_t T, size_t C) {
    constexpr int LANES = HS / 16;
    size_t thread = (size_t)blockIdx.x * blockDim.x + threadIdx.x, row = thread / LANES;
    int k = (int)(thread % LANES) * 8;
    size_t n = row / (2 * heads.count), side = row / heads.count % 2,
           at = side * C + heads.head[row % heads.count] * HS + k;
    bool here = n < N;
    Pack a = {}, b = {};
    if (here) {
        a = load_pack(qkv + n * 3 * C + at);
        b = load_pack(qkv + n * 3 * C + at + HS / 2);
    }
    float square = 0, first[8], second[8];
    for (int i = 0; i < 8; i++) square += number(a, i) * number(a, i) + number(b, i) * number(b, i);
    for (int lane = LANES / 2; lane > 0; lane /= 2) square += __shfl_xor_sync(~0u, square, lane);
    float factor = rsqrtf(square + (float)SPHERE_EPSILON) * sqrtf(HS);
    const uint32_t *steps = turns.steps + row % heads.count * turns.apart;
    for (int i = 0; i < 8; i++) {
        float c, s, x = number(a, i) * factor, y = number(b, i) * factor;
        fast_sincos(wave_angle(steps[k + i], n % T), &s, &c);
        first[i] = x * c - y * s;
        second[i] = x * s + y * c;
    }
    if (!here) return;
    store_pack(features + n * 2 * C + at, first);
    store_pack(features + n * 2 * C + at + HS / 2, second);
}

/* dots (heads, N), NULL or f_q . df_q of the listed heads: what the gradient of their gain is the sum of. */
template <int HS>
__global__ static void rope_backward_kernel(floatX *dqkv, float *dots, const floatX *dfeatures, const floatX *qkv,
                                            Rotations turns, const __grid_constant__ HeadList heads, size_t N, size_t T,
                                            size_t C) {
    constexpr int LANES = HS / 16;
    size_t thread = (size_t)blockIdx.x * blockDim.x + threadIdx.x, row = thread / LANES;
    int k = (int)(thread % LANES) * 8;
    size_t n = row / (2 * heads.count), side = row / heads.count % 2,
           at = side * C + heads.head[row % heads.count] * HS + k;
    bool here = n < N;
    Pack a = {}, b = {}, da = {}, db = {};
    if (here) {
        a = load_pack(qkv + n * 3 * C + at);
        b = load_pack(qkv + n * 3 * C + at + HS / 2);
        da = load_pack(dfeatures + n * 2 * C + at);
        db = load_pack(dfeatures + n * 2 * C + at + HS / 2);
    }
    float square = 0, dot = 0, first[8], second[8];
    const uint32_t *steps = turns.steps + row % heads.count * turns.apart;
    for (int i = 0; i < 8; i++) {
        float c, s, x = number(da, i), y = number(db, i);
        fast_sincos(wave_angle(steps[k + i], n % T), &s, &c);
        first[i] = sqrtf(HS) * (x * c + y * s);
        second[i] = sqrtf(HS) * (y * c - x * s); /* the rotation back */
        square += number(a, i) * number(a, i) + number(b, i) * number(b, i);
        dot += number(a, i) * first[i] + number(b, i) * second[i];
    }
    for (int lane = LANES / 2; lane > 0; lane /= 2) {
        square += __shfl_xor_sync(~0u, square, lane);
        dot += __shfl_xor_sync(~0u, dot, lane);
    }
    float inverse = rsqrtf(square + (float)SPHERE_EPSILON), along = dot * inverse * inverse;
    if (dots && here && side == 0 && k == 0) dots[row % heads.count * N + n] = dot * inverse;
    for (int i = 0; i < 8; i++) {
        first[i] = inverse * (first[i] - number(a, i) * along);
        second[i] = inverse * (second[i] - number(b, i) * along);
    }
    if (!here) return;
    store_pack(dqkv + n * 3 * C + at, first);
    store_pack(dqkv + n * 3 * C + at + HS / 2, second);
}

/* Calls a kernel with HS as a constant. */
#define BY_HEAD_SIZE(HS, launch)       \
    do {                               \
        if ((HS) == 32) {              \
            constexpr int H = 32;      \
            launch;                    \
        } else if ((HS) == 64) {       \
            constexpr int H = 64;      \
            launch;                    \
        } else {                       \
            constexpr int H = 128;     \
            launch;                    \
        }                              \
        cudaCheck(cudaGetLastError()); \
    } while (0)

/* f = rotation by position of x^ sqrt(HS), pairs (k, k + HS/2), of q and k of the listed heads */
static void rope_forward(floatX *features, const floatX *qkv, Rotations turns, HeadList heads, size_t B, size_t T,
                         size_t NH, size_t HS, cudaStream_t stream) {
    size_t threads = B * T * 2 * heads.count * HS / 16;
    BY_HEAD_SIZE(HS, (rope_forward_kernel<H>
                      <<<CEIL_DIV(threads, 256), 256, 0, stream>>>(features, qkv, turns, heads, B * T, T, NH * HS)));
}

/* Learned rotations: steps from the logarithms of n frequencies. */
__global__ static void rope_steps_kernel(uint32_t *steps, const float *log_rope, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) steps[i] = wave_step(exp((double)log_rope[i]));
}

/* Records of dL / dtheta of the listed heads, records (heads, B, pieces, HS/2): the sum over a piece of a sequence's
   tokens, queries and keys, of t X_t,k with X = f_k df_(k + HS/2) - f_(k + HS/2) df_k, t from the middle of the
   sequence. A block is a piece of one head, small so that few heads and sequences keep a card busy too; HS / 16 lanes
   share a row, as above. Sums of a thread's few rows are fp32, those of the rows double. */
enum { ROPE_PIECE = 128, ROPE_THREADS = 128 };
template <int HS>
__global__ static void rope_frequencies_kernel(double *records, const floatX *dfeatures, const floatX *features,
                                               const __grid_constant__ HeadList heads, size_t B, size_t T, size_t C) {
    constexpr int LANES = HS / 16, ROWS = ROPE_THREADS / LANES;
    __shared__ float sums[ROWS][HS / 2];
    size_t pieces = CEIL_DIV(T, (size_t)ROPE_PIECE), piece = blockIdx.x % pieces, b = blockIdx.x / pieces % B,
           head = blockIdx.x / pieces / B;
    size_t end = (piece + 1) * ROPE_PIECE < T ? (piece + 1) * ROPE_PIECE : T;
    int row = threadIdx.x / LANES, k = threadIdx.x % LANES * 8;
    float sum[8] = {};
    for (size_t t = piece * ROPE_PIECE + row; t < end; t += ROWS)
        for (size_t side = 0; side < 2; side++) {
            size_t at = (b * T + t) * 2 * C + side * C + heads.head[head] * HS + k;
            Pack x = load_pack(features + at), y = load_pack(features + at + HS / 2), dx = load_pack(dfeatures + at),
                 dy = load_pack(dfeatures + at + HS / 2);
            float from = (float)t - 0.5f * (float)(T - 1);
            for (int i = 0; i < 8; i++) sum[i] += from * (number(x, i) * number(dy, i) - number(y, i) * number(dx, i));
        }
    for (int i = 0; i < 8; i++) sums[row][k + i] = sum[i];
    __syncthreads();
    if (threadIdx.x >= HS / 2) return;
    double total = 0;
    for (int r = 0; r < ROWS; r++) total += (double)sums[r][threadIdx.x];
    records[blockIdx.x * (HS / 2) + threadIdx.x] = total;
}

/* One warp a frequency: dlog_rope (heads, HS/2) += theta times the sum of n records of its head */
__global__ static void rope_gradients_kernel(float *dlog_rope, const float *log_rope, const double *records, size_t n,
                                             int half) {
    size_t head = blockIdx.x / half, k = blockIdx.x % half;
    double mine = 0;
    for (size_t i = threadIdx.x; i < n; i += 32) mine += records[(head * n + i) * half + k];
    mine = warp_sum(mine);
    if (threadIdx.x == 0) dlog_rope[blockIdx.x] += (float)(exp((double)log_rope[blockIdx.x]) * mine);
}

static size_t rope_records(size_t heads, size_t B, size_t T) { return heads * B * CEIL_DIV(T, (size_t)ROPE_PIECE); }

/* Gradients of the listed heads' rotations: dlog_rope, log_rope (heads, HS/2) of these heads. */
static void rope_frequencies_backward(float *dlog_rope, double *records, const float *log_rope, const floatX *dfeatures,
                                      const floatX *features, HeadList heads, size_t B, size_t T, size_t NH, size_t HS,
                                      cudaStream_t stream) {
    size_t n = rope_records(1, B, T);
    BY_HEAD_SIZE(HS, (rope_frequencies_kernel<H><<<(unsigned)(heads.count * n), ROPE_THREADS, 0, stream>>>(
                         records, dfeatures, features, heads, B, T, NH * HS)));
    rope_gradients_kernel<<<(unsigned)(heads.count * HS / 2), 32, 0, stream>>>(dlog_rope, log_rope, records, n,
                                                                               (int)HS / 2);
    cudaCheck(cudaGetLastError());
}

/* One thread a head (L, NH): scale = exp(log_gain) / sqrt(HS), equation (7c); gain_of: its gain, -1: it has none */
__global__ static void gain_scales_kernel(float *scale, const float *log_gain, const int *gain_of, int heads, int HS) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < heads && gain_of[i] >= 0) scale[i] = expf(log_gain[gain_of[i]]) / sqrtf((float)HS);
}

/* One block a head: dlog_gain (heads) += sum of dots (heads, N) */
__global__ static void __launch_bounds__(1024) gain_gradients_kernel(float *dlog_gain, const float *dots, size_t N) {
    __shared__ double partial[32];
    double mine = 0;
    for (size_t n = threadIdx.x; n < N; n += blockDim.x) mine += (double)dots[blockIdx.x * N + n];
    mine = warp_sum(mine);
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = mine;
    __syncthreads();
    if (threadIdx.x >= 32) return;
    mine = warp_sum(partial[threadIdx.x]);
    if (threadIdx.x == 0) dlog_gain[blockIdx.x] += (float)mine;
}

static void rope_backward(floatX *dqkv, float *dots, const floatX *dfeatures, const floatX *qkv, Rotations turns,
                          HeadList heads, size_t B, size_t T, size_t NH, size_t HS, cudaStream_t stream) {
    size_t threads = B * T * 2 * heads.count * HS / 16;
    BY_HEAD_SIZE(HS, (rope_backward_kernel<H><<<CEIL_DIV(threads, 256), 256, 0, stream>>>(
                         dqkv, dots, dfeatures, qkv, turns, heads, B * T, T, NH * HS)));
}

#include "gsa/cuda/tensor_core.cuh"
#include "gsa/cuda/splat.cuh"

#include "gsa/cuda/forget.cuh"
#include "gsa/cuda/attention.cuh"
#include "gsa/cuda/scan.cuh"
#include "gsa/cuda/ranks.cuh"

/* ---------------------------------------------------------------------- classifier */

/* One block a row. First pass: each thread's largest logit and its sum of exponentials relative to that, then the
   block's; second pass: the gradients, in place. Between the two the row is kept in shared memory, if there is room
   for it. */
__global__ static void __launch_bounds__(1024)
    classifier_kernel(floatX *logits, float *losses, const int *targets, float scale, size_t V, size_t Vp, bool keep) {
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
        if (here > most) {
            sum *= fast_exp(most - here);
            most = here;
        }
        for (int e = 0; e < 8; e++)
            if (v + e < V) sum += fast_exp(number(p, e) - most);
    }
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    float all = warp_max(most);
    sum = warp_sum(most == -INFINITY ? 0 : sum * fast_exp(most - all));
    if (lane == 0) {
        warp_most[warp] = all;
        warp_total[warp] = sum;
    }
    __syncthreads();
    bool there = lane < (int)blockDim.x / 32 && warp_most[lane] > -INFINITY;
    most = warp_max(there ? warp_most[lane] : -INFINITY);
    sum = warp_sum(there ? warp_total[lane] * fast_exp(warp_most[lane] - most) : 0);
    if (threadIdx.x == 0) losses[blockIdx.x] = most + logf(sum) - (float)row[target];
    __syncthreads(); /* the target's logit has been read */
    float factor = scale / sum;
    for (size_t v = threadIdx.x * 8; v < Vp; v += blockDim.x * 8) {
        Pack p = keep && v < V ? kept[v / 8] : load_pack(row + v);
        float d[8];
        for (int e = 0; e < 8; e++)
            d[e] = v + e < V ? factor * fast_exp(number(p, e) - most) - (v + e == (size_t)target ? scale : 0) : 0;
        store_pack(row + v, d);
    }
}

/* Bytes of shared memory, of `most` that a block can have, in which classifier_kernel keeps a row of Vp logits; 0: it
   does not, and reads the row twice. At most what leaves room for two blocks a multiprocessor of an H100. */
static size_t classifier_shared(size_t Vp, size_t most) {
    size_t bytes = Vp * sizeof(floatX), others = 2 * 32 * sizeof(float);
    return bytes <= 112 << 10 && bytes + others <= most ? bytes : 0;
}

/* losses (N) in nats; logits (N, Vp) become their gradients, (softmax - one at the target) scale, 0 in the padding.
   A target of -1 is left out: loss and gradients 0. */
static void fused_classifier(floatX *logits, float *losses, const int *targets, float scale, size_t N, size_t V,
                             size_t Vp, cudaStream_t stream) {
    /* four packs a thread, so that a multiprocessor has many rows under way */
    size_t threads = CEIL_DIV(Vp / 8, 4 * 32) * 32, kept = classifier_shared(Vp, cuda_device()->sharedMemPerBlockOptin);
    cudaCheck(cudaFuncSetAttribute(classifier_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)kept));
    classifier_kernel<<<(unsigned)N, (unsigned)(threads < 1024 ? threads : 1024), kept, stream>>>(
        logits, losses, targets, scale, V, Vp, kept > 0);
    cudaCheck(cudaGetLastError());
}

/* The sum of x (n), by a block of 1,024 threads, in double; its first warp gets it. */
template <typename Number> __device__ static inline double total(const Number *x, size_t n) {
    __shared__ double partial[32];
    double mine = 0;
    for (size_t i = threadIdx.x; i < n; i += 1024) mine += (double)x[i];
    mine = warp_sum(mine);
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = mine;
    __syncthreads();
    return threadIdx.x < 32 ? warp_sum(partial[threadIdx.x]) : 0;
}

/* The mean of the losses of what is predicted; added: to those of the step's passes before */
__global__ static void __launch_bounds__(1024)
    mean_loss_kernel(StepResult *step, const float *losses, size_t n, size_t predicted, bool added) {
    double sum = total(losses, n);
    if (threadIdx.x == 0) step->loss = (added ? step->loss : 0) + (predicted ? sum / (double)predicted : 0);
}

/* ---------------------------------------------------------------------- norm, bounds, AdamW, Muon */

enum { NORM_PIECE = 1 << 15 };

/* The sum over a block of 256 threads, in a fixed order; the first thread gets it. */
__device__ static inline double block_sum(double mine) {
    __shared__ double partial[8];
    mine = warp_sum(mine);
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = mine;
    __syncthreads();
    for (int i = 1; i < 8 && threadIdx.x == 0; i++) mine += partial[i];
    return mine;
}

/* Numbers that one launch works on, and by which blocks. */
typedef struct {
    size_t n, at, own, second; /* where they begin: in grads and weights, in params and adam_m, in adam_v */
    unsigned end;              /* the blocks before this one are theirs, and those of the parts before */
    int clip;
    bool decay;
} Part;
typedef struct {
    int count;
    Part parts[NUM_TENSORS];
} Parts;

/* The block's part; *piece: which of the part's blocks it is */
__device__ static inline Part block_part(const Parts &all, unsigned *piece) {
    int i = 0;
    while (blockIdx.x >= all.parts[i].end) i++;
    *piece = blockIdx.x - (i ? all.parts[i - 1].end : 0);
    return all.parts[i];
}

/* sums[block] = sum of squares of the block's piece of the gradients g; eight loads of a thread under way at once, or
   it waits for memory */
__global__ static void square_sums_kernel(double *sums, const float *g, const __grid_constant__ Parts all) {
    unsigned piece;
    Part part = block_part(all, &piece);
    size_t first = (size_t)piece * NORM_PIECE, count = part.n - first < NORM_PIECE ? part.n - first : NORM_PIECE;
    double mine = 0;
    g += part.at;
    for (size_t i = threadIdx.x; i < count; i += 8 * 256) {
        float x[8];
#pragma unroll
        for (int k = 0; k < 8; k++) x[k] = i + k * 256 < count ? g[first + i + k * 256] : 0;
#pragma unroll
        for (int k = 0; k < 8; k++) mine += (double)x[k] * (double)x[k];
    }
    mine = block_sum(mine);
    if (threadIdx.x == 0) sums[blockIdx.x] = mine;
}

/* A block for each clip group c, whose sums of squares are sums (count[0]) or those behind them: its norm, and what
   brings it down to `clip` */
typedef struct {
    size_t count[NUM_CLIPS];
} NormPieces;
__global__ static void __launch_bounds__(1024)
    norms_kernel(StepResult *step, float *scale, const double *sums, NormPieces pieces, double clip) {
    int c = blockIdx.x;
    double norm = sqrt(total(sums + (c == CLIP_WEIGHTS ? 0 : pieces.count[CLIP_WEIGHTS]), pieces.count[c]));
    if (threadIdx.x > 0) return;
    step->norms[c] = norm;
    scale[c] = (float)(clip > 0 && norm > clip ? clip / norm : 1);
}

__device__ static inline int clamp(float *x, float low, float high) { /* a NaN stays one, for the loss to report */
    float before = *x;
    *x = before < low ? low : before > high ? high : before;
    return *x != before && before == before;
}

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

/* Full precision: L such that the largest eigenvalue of L L^T, by power iteration as in train_gsa.c, is within
   bounds; slope = L L^T mu. */
__device__ static inline bool cholesky_bounds(float *slope, float *packed, const float *mu, float *x, float *y,
                                              bool bounded, int HS) {
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

/* the same angle within (-pi, pi] */
__device__ static float wrapped_phase(float psi) {
    const double turn = 6.283185307179586;
    return psi > (float)(turn / 2) || psi <= (float)(-turn / 2) ? (float)(psi - turn * ceil(psi / turn - 0.5)) : psi;
}

/* One warp a splat: back into its bounds, see gsa/model.h; clamped counts what was outside, by kind. */
__global__ static void splat_bounds_kernel(unsigned long long *clamped, SplatTensors w, int unbounded, bool linear,
                                           int P, int HS) {
    __shared__ float slope[128], x[128], y[128]; /* HS is at most 128 */
    const float low = (float)log(SPLAT_PRECISION_MIN), high = (float)log(SPLAT_PRECISION_MAX),
                range = (float)SPLAT_AMPLITUDE_RANGE;
    size_t s = blockIdx.x;
    float *mu = w.mu + s * HS, *log_precision = w.log_precision + s * P, square = 0, steep = 0, outside = 0;
    auto bounded = [&](int bound) { return !(unbounded >> bound & 1); };
    if (!(w.alive[s] > 0)) return;
    if (P > HS) outside = cholesky_bounds(slope, log_precision, mu, x, y, bounded(BOUND_PRECISION), HS);
    else {
        for (int k = threadIdx.x; k < P && bounded(BOUND_PRECISION); k += 32)
            outside += (float)clamp(&log_precision[k], low, high);
        outside = warp_sum(outside);
        __syncwarp();
        for (int k = threadIdx.x; k < HS; k += 32) slope[k] = mu[k] * expf(log_precision[P > 1 ? k : 0]);
    }
    for (int k = threadIdx.x; k < HS; k += 32) {
        square += mu[k] * mu[k];
        steep += slope[k] * slope[k];
    }
    float excess =
        fmaxf(sqrtf(warp_sum(square)) / (float)SPLAT_CENTRE_MAX, sqrtf(warp_sum(steep)) / (float)SPLAT_SLOPE_MAX);
    bool off_centre = excess > 1 && bounded(BOUND_CENTRE);
    if (off_centre)
        for (int k = threadIdx.x; k < HS; k += 32) mu[k] /= excess;
    if (threadIdx.x > 0) return;
    if (w.psi && !linear) w.psi[s] = wrapped_phase(w.psi[s]);
    int counts[NUM_BOUNDS] = {
        (int)outside,
        off_centre,
        bounded(BOUND_AMPLITUDE)
            ? clamp(&w.log_alpha[s], w.log_alpha_reference[s] - range, w.log_alpha_reference[s] + range)
            : 0,
        w.log_theta && bounded(BOUND_FREQUENCY) ? clamp(&w.log_theta[s], -INFINITY, (float)log(SPLAT_FREQUENCY_MAX))
                                                : 0,
        w.log_delta && bounded(BOUND_DECAY) ? clamp(&w.log_delta[s], -INFINITY, (float)log(SPLAT_DECAY_MAX)) : 0,
        0 /* gains: gain_bounds_kernel */,
        w.psi && linear && bounded(BOUND_PHASE) ? clamp(&w.psi[s], (float)-SPLAT_PHASE_MAX, (float)SPLAT_PHASE_MAX)
                                                : 0};
    for (int i = 0; i < NUM_BOUNDS; i++) /* whole numbers: the order does not matter */
        if (counts[i]) atomicAdd(&clamped[i], (unsigned long long)counts[i]);
}

/* x (n) back into [low, high]; clamped counts what was outside */
__global__ static void bounds_kernel(unsigned long long *clamped, float *x, float low, float high, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n && clamp(&x[i], low, high)) atomicAdd(clamped, 1ull);
}

/* What a step multiplies gradients by, of each clip group: `found` on the device, or where that is NULL `given`. */
typedef struct {
    float given[NUM_CLIPS];
    const float *found;
} Scales;
__device__ static inline float scale_of(const Scales &s, int clip) { return s.found ? s.found[clip] : s.given[clip]; }

typedef struct {
    float rate[NUM_CLIPS], decay, beta1, beta2, correct1, correct2;
    Scales scales;
} AdamW;

/* AdamW: m, v running means of g, g^2; p -= rate (m^ / (sqrt(v^) + 1e-8) + decay p), hats: times correct1, correct2.
   copies: p as floatX */
__global__ static void adamw_kernel(float *params, floatX *copies, float *adam_m, float *adam_v, const float *grads,
                                    const __grid_constant__ Parts all, const __grid_constant__ AdamW u) {
    unsigned piece;
    Part part = block_part(all, &piece);
    size_t i = (size_t)piece * blockDim.x + threadIdx.x;
    if (i >= part.n) return;
    float *m = adam_m + part.own, *v = adam_v + part.second, *p = params + part.own;
    float g = scale_of(u.scales, part.clip) * grads[part.at + i], first = u.beta1 * m[i] + (1 - u.beta1) * g,
          second = u.beta2 * v[i] + (1 - u.beta2) * g * g, weight = p[i];
    m[i] = first;
    v[i] = second;
    weight -= u.rate[part.clip] *
              (first * u.correct1 / (sqrtf(second * u.correct2) + 1e-8f) + (part.decay ? u.decay : 0) * weight);
    p[i] = weight;
    copies[part.at + i] = (floatX)weight;
}

/* Muon, for several matrices of n numbers one behind the other, see train_gsa.c. Row y of the grid has matrix y. */
enum { MUON_BLOCKS = 64 };

/* What becomes orthogonal: momentum runs ahead by one gradient. */
__device__ static inline float muon_ahead(float momentum, float g, float mean) {
    return mean * momentum + (1 - mean) * g;
}

/* momentum: the running mean of scale * grads; sums (matrices, MUON_BLOCKS): parts of the sum of squares of what
   becomes orthogonal */
__global__ static void muon_momentum_kernel(double *sums, float *momentum, const float *grads, size_t n, Scales scales,
                                            float mean) {
    float scale = scale_of(scales, CLIP_WEIGHTS);
    double mine = 0;
    for (size_t i = blockIdx.x * 256 + threadIdx.x; i < n; i += MUON_BLOCKS * 256) {
        size_t at = blockIdx.y * n + i;
        float g = scale * grads[at], now = mean * momentum[at] + (1 - mean) * g, x = muon_ahead(now, g, mean);
        momentum[at] = now;
        mine += (double)x * (double)x;
    }
    mine = block_sum(mine);
    if (threadIdx.x == 0) sums[blockIdx.y * MUON_BLOCKS + blockIdx.x] = mine;
}

/* x = what becomes orthogonal, divided by the root of its sum of squares */
__global__ static void muon_start_kernel(floatX *x, const double *sums, const float *momentum, const float *grads,
                                         size_t n, Scales scales, float mean) {
    float scale = scale_of(scales, CLIP_WEIGHTS);
    const double *parts = sums + blockIdx.y * MUON_BLOCKS + threadIdx.x % 32;
    double sum = warp_sum(parts[0] + parts[32]);
    float factor = sum > 0 ? (float)(1 / sqrt(sum)) : 0;
    for (size_t i = blockIdx.x * 256 + threadIdx.x; i < n; i += MUON_BLOCKS * 256) {
        size_t at = blockIdx.y * n + i;
        x[at] = (floatX)(factor * muon_ahead(momentum[at], scale * grads[at], mean));
    }
}

/* p -= rate (size orthogonal + decay p), all (n); copy: p as floatX */
__global__ static void muon_apply_kernel(float *p, floatX *copy, const floatX *orthogonal, size_t n, float rate,
                                         float size, float decay) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    float weight = p[i];
    weight -= rate * (size * (float)orthogonal[i] + decay * weight);
    p[i] = weight;
    copy[i] = (floatX)weight;
}

/* train_gsa.c's steps for each of `count` matrices x (rows, columns), which round alike whatever their number, up to
   `all`. y: as large as x; gram, square (count, least, least). Returns where the result is, x or y. Both halves of a
   symmetric product are computed, because cuBLASLt has no product that computes one. */
static floatX *muon_steps(Matmul *mm, floatX *x, floatX *y, floatX *gram, floatX *square, size_t rows, size_t columns,
                          size_t count, size_t all, cudaStream_t stream) {
    const float a = (float)MUON_A, b = (float)MUON_B, c = (float)MUON_C;
    bool tall = rows > columns;
    int r = (int)rows, k = (int)columns, least = tall ? k : r, longest = tall ? r : k, batch = (int)count,
        most = (int)all;
    MatmulShape inner = {least, least, longest, !tall, tall, false, 0, CUBLASLT_EPILOGUE_DEFAULT, batch, most},
                again = {least, least, least, false, false, false, b, CUBLASLT_EPILOGUE_DEFAULT, batch, most},
                outer = {k, r, least, false, false, false, a, CUBLASLT_EPILOGUE_DEFAULT, batch, most};
    for (int step = 0; step < MUON_STEPS; step++) {
        matmul_run(mm, inner, gram, x, x, NULL, NULL, NULL, 1, stream);
        matmul_run(mm, again, square, gram, gram, gram, NULL, NULL, c, stream);
        matmul_run(mm, outer, y, tall ? square : x, tall ? x : square, x, NULL, NULL, 1, stream);
        floatX *other = x;
        x = y;
        y = other;
    }
    return x;
}

/* ---------------------------------------------------------------------- the model */

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

/* Sizes that appear in every function, as size_t. A: channels of q, of k, of v and of attention's output. Of the
   linear mixer: scans, the most heads that a layer scans; W, their splats as padded; state, the numbers of a state;
   directions; segments, the most of all sequences and scanned heads of a layer together, where they are cut, for the
   largest batch or a smaller one. features: numbers a token, 0 if no head has a feature map. records: the most records
   of splat_backward in a layer. norm_pieces: of square_sums_kernel. gates: the most of a layer. muon_batch: the most
   matrices at once; muon, their numbers, and muon_gram, those of their products with themselves. */
typedef struct {
    size_t T, V, Vp, L, NH, C, A, HS, S, SP, P, G, scans, W, state, directions, segments, features, records,
        norm_pieces, gains, ropes, gates, muon_batch, muon, muon_gram;
} CudaSizes;

/* Of so many equal matrices Muon works on as many at once as fill the device. */
static size_t muon_batch(MuonMatrix x, size_t count) {
    const size_t most = (8 << 20) / (x.rows * x.columns);
    return most < 1 ? 1 : most < count ? most : count;
}

/* The heads of layer l of one kind; standard heads whose q and k are used as they are have no feature map. Nearby an
   extended head is a standard one. */
static HeadList head_list(const Config *c, size_t l, int kind) {
    HeadList list;
    list.count = 0;
    for (int h = 0; h < config_heads(c); h++) {
        int is = config_head_kind(c, (int)l, h);
        if (is == HEAD_EXTEND) is = HEAD_STANDARD;
        if (is == kind && !(kind == HEAD_STANDARD && c->position == POSITION_LEARNED))
            list.head[list.count++] = (unsigned char)h;
    }
    return list;
}

/* Those that scan, extended heads among them. */
static HeadList scan_list(const Config *c, size_t l) {
    HeadList list;
    list.count = 0;
    for (int h = 0; h < config_heads(c); h++)
        if (config_is_gsa(c, (int)l, h) && config_head_kind(c, (int)l, h) != HEAD_SPLAT)
            list.head[list.count++] = (unsigned char)h;
    return list;
}

static size_t layer_gates(const Config *c, size_t l) {
    return (size_t)(config_gates_before(c, (int)l + 1, 0) - config_gates_before(c, (int)l, 0));
}

static CudaSizes cuda_sizes(const Config *c, size_t B) {
    CudaSizes z;
    memset(&z, 0, sizeof z);
    z.T = c->T;
    z.V = c->V;
    z.Vp = c->Vp;
    z.L = c->L;
    z.NH = config_heads(c);
    z.C = c->C;
    z.A = config_width(c);
    z.HS = config_head_size(c);
    z.G = config_gsa_heads(c);
    z.S = z.G ? c->S : 0;
    z.SP = z.G ? splats_padded(z.S) : 0;
    z.P = config_precisions(c);
    z.gains = config_gains(c);
    z.ropes = config_ropes(c);
    z.directions = c->objective == OBJECTIVE_LM ? 1 : 2;
    size_t tiles = CEIL_DIV(B * z.T, 64);
    for (size_t l = 0; l < z.L; l++) {
        size_t scans = scan_list(c, l).count, splats = head_list(c, l, HEAD_SPLAT).count;
        if (splats || head_list(c, l, HEAD_STANDARD).count) z.features = 2 * z.A;
        if (scans > z.scans) z.scans = scans;
        if (layer_gates(c, l) > z.gates) z.gates = layer_gates(c, l);
        splats += scans;
        /* of any smaller batch too */
        size_t most = tiles * splats < SPLAT_BLOCKS + splats ? tiles * splats : SPLAT_BLOCKS + splats;
        if (most > z.records) z.records = most;
    }
    z.W = z.scans ? scan_splats(z.S) : 0;
    z.state = z.scans ? scan_state_size(z.HS, z.W) : 0;
    z.segments = B * z.scans * 2 * CEIL_DIV(z.T, (size_t)SCAN_BLOCK);
    if (z.segments > (size_t)SCAN_SEGMENTS_MOST) z.segments = SCAN_SEGMENTS_MOST;
    Tensor tensors[NUM_TENSORS];
    model_tensors(c, tensors);
    for (int i = 0; i < NUM_TENSORS; i++) {
        z.norm_pieces += CEIL_DIV(tensors[i].size, (size_t)NORM_PIECE);
        size_t count = config_muon_matrices(c, i);
        if (!count) continue;
        MuonMatrix x = config_muon_matrix(c, tensors, i, 0);
        size_t batch = muon_batch(x, count), least = x.rows < x.columns ? x.rows : x.columns;
        if (batch > z.muon_batch) z.muon_batch = batch;
        if (batch * x.rows * x.columns > z.muon) z.muon = batch * x.rows * x.columns;
        if (batch * least * least > z.muon_gram) z.muon_gram = batch * least * least;
    }
    return z;
}

/* THE table of activations: type, name, group of memory (gsa/run/train.h), unit, numbers per unit. Units:
     STREAM  a token at the input of each block and behind the last
     BLOCK   a token in each block whose activations are kept for the backward pass: all, or with --recompute one
     HIDDEN  likewise, but with --recompute the tokens of one piece of the MLP
     STATES  a block, whatever its tokens
     TOKEN   a token
     ONCE    all of it
   Where they lie, which of them are block l's and what they take of memory follows from it. B: largest batch. */
// clang-format off
#define CUDA_ACTIVATIONS(X) \
    X(int, x, WORKSPACE, TOKEN, 1) \
    X(int, y, WORKSPACE, TOKEN, 1) \
    X(floatX, residual, RESIDUAL, STREAM, z.C) \
    X(floatX, middle, RESIDUAL, BLOCK, z.C) /* the stream after attention */ \
    X(floatX, ln1, ATTENTION, BLOCK, z.C) \
    X(float, ln1_mean, ATTENTION, BLOCK, 1) \
    X(float, ln1_rstd, ATTENTION, BLOCK, 1) \
    X(floatX, qkv, ATTENTION, BLOCK, 3 * z.A) \
    X(floatX, features, ATTENTION, BLOCK, z.features) /* f_q, f_k: (B, T, 2A), see head_list */ \
    X(floatX, responses, ATTENTION, BLOCK, z.scans * 2 * z.W) /* of scans: (2, B, heads, T, W) */ \
    X(float, scan_rho, ATTENTION, BLOCK, z.scans ? z.NH : 0) /* (B, NH, T) */ \
    X(float, scan_states, STATES, STATES, z.directions * z.segments * z.state) /* at the start of each segment */ \
    X(double, forget, ATTENTION, BLOCK, z.gates) /* c of gated heads: (B, gates, T) */ \
    X(float, att_lse, ATTENTION, BLOCK, z.NH) /* (B, NH, T) */ \
    X(floatX, att, ATTENTION, BLOCK, z.A) \
    X(floatX, ln2, MLP, BLOCK, z.C) \
    X(float, ln2_mean, MLP, BLOCK, 1) \
    X(float, ln2_rstd, MLP, BLOCK, 1) \
    X(floatX, fc, MLP, HIDDEN, 4 * z.C) \
    X(floatX, gelu, MLP, HIDDEN, 4 * z.C) \
    X(floatX, lnf, LOGITS, TOKEN, z.C) \
    X(float, lnf_mean, LOGITS, TOKEN, 1) \
    X(float, lnf_rstd, LOGITS, TOKEN, 1) \
    X(floatX, logits, LOGITS, ONCE, logits_piece(B * z.T) * z.Vp) \
    X(float, losses, LOGITS, TOKEN, 1) \
    X(floatX, dresidual, BACKWARD, TOKEN, z.C) \
    X(floatX, dln, BACKWARD, TOKEN, z.C) \
    X(floatX, dfc, BACKWARD, ONCE, mlp_piece(B * z.T) * 4 * z.C) \
    X(floatX, datt, BACKWARD, TOKEN, z.A) \
    X(floatX, dqkv, BACKWARD, TOKEN, 3 * z.A) \
    X(floatX, dfeatures, BACKWARD, TOKEN, z.features) \
    X(floatX, dresponses, BACKWARD, TOKEN, z.scans * 2 * z.W) \
    X(float, scan_blocks, STATES, ONCE, B * z.scans * CEIL_DIV(z.T, SCAN_BLOCK) * z.state) \
    X(float, delta, BACKWARD, TOKEN, z.NH) \
    X(float, dforget, BACKWARD, TOKEN, z.gates) \
    X(float, forget_local, WORKSPACE, ONCE, B * z.gates * forget_row(z.T)) \
    X(float, forget_partials, WORKSPACE, ONCE, FORGET_PIECES * z.gates * (z.C + 1)) \
    X(float, partials, WORKSPACE, ONCE, SUM_BLOCKS * (3 * z.A > 4 * z.C ? 3 * z.A : 4 * z.C)) \
    X(float, side_partials, WORKSPACE, ONCE, SUM_BLOCKS * (3 * z.A > 4 * z.C ? 3 * z.A : 4 * z.C)) \
    X(float, scan_sums, WORKSPACE, ONCE, 2 * z.segments * z.state) \
    X(float, scan_records, WORKSPACE, ONCE, \
      2 * z.directions * (B * z.scans > z.segments ? B * z.scans : z.segments) * scan_sums_record(z.W)) \
    X(double, scan_moments, WORKSPACE, ONCE, z.scans * scan_sums_record(z.W)) \
    X(float, moments, WORKSPACE, ONCE, z.P > z.HS ? 0 : z.records * moments_record(z.S, z.P, z.HS)) \
    X(double, moments_sums, WORKSPACE, ONCE, (z.G ? z.NH : 0) * moments_record(z.S, z.P, z.HS)) \
    X(float, token_sums, WORKSPACE, ONCE, bucket_sums(B * z.T) * z.C) \
    X(int, positions, WORKSPACE, TOKEN, 1) \
    X(Bucket, segments, WORKSPACE, TOKEN, 1) \
    X(Bucket, bucket_tokens, WORKSPACE, ONCE, B * z.T / SEGMENT + 1) \
    X(double, sums, WORKSPACE, ONCE, z.norm_pieces) \
    X(double, muon_sums, WORKSPACE, ONCE, z.muon_batch * MUON_BLOCKS) \
    X(floatX, muon_x, WORKSPACE, ONCE, z.muon) \
    X(floatX, muon_y, WORKSPACE, ONCE, z.muon) \
    X(floatX, muon_gram, WORKSPACE, ONCE, z.muon_gram) \
    X(floatX, muon_square, WORKSPACE, ONCE, z.muon_gram) \
    X(float, slope, WORKSPACE, ONCE, z.P > z.HS ? 0 : z.G * z.SP * z.HS) \
    X(float, precision, WORKSPACE, ONCE, z.P > z.HS ? 0 : z.G * z.SP * z.P) \
    X(float, centre, WORKSPACE, ONCE, z.G * z.SP) \
    X(float, decay, WORKSPACE, ONCE, z.G * z.SP) \
    X(float, typical, WORKSPACE, ONCE, z.G * z.SP) \
    X(float, key_scale, WORKSPACE, ONCE, z.G) \
    X(float, log_alpha, WORKSPACE, ONCE, z.G * z.SP) \
    X(uint32_t, steps, WORKSPACE, ONCE, z.G * z.SP) \
    X(uint32_t, phases, WORKSPACE, ONCE, z.G * z.SP) \
    X(StepResult, result, WORKSPACE, ONCE, 1) \
    X(float, clip_scale, WORKSPACE, ONCE, NUM_CLIPS) \
    X(uint32_t, rope_steps, WORKSPACE, ONCE, (z.ropes ? z.ropes : 1) * z.HS / 2) \
    X(float, scale, WORKSPACE, ONCE, z.L * z.NH) \
    X(int, window, WORKSPACE, ONCE, z.L * z.NH) \
    X(int, from_features, WORKSPACE, ONCE, z.L * z.NH) \
    X(int, gain_of, WORKSPACE, ONCE, z.L * z.NH) /* -1: none */ \
    X(int, gate_of, WORKSPACE, ONCE, z.L * z.NH) /* which of its layer's; -1: none */ \
    X(float, dgains, WORKSPACE, TOKEN, z.gains ? z.NH : 0) /* see rope_backward */ \
    X(double, dropes, WORKSPACE, ONCE, z.ropes ? rope_records(z.NH, B, z.T) * z.HS / 2 : 0)
// clang-format on
enum { UNIT_STREAM, UNIT_BLOCK, UNIT_HIDDEN, UNIT_STATES, UNIT_TOKEN, UNIT_ONCE, NUM_UNITS };

typedef struct {
#define X(type, name, group, unit, size) type *name;
    CUDA_ACTIVATIONS(X)
#undef X
} CudaActivations;

/* What a forward pass and the backward pass after it read of the host. */
typedef struct {
    int *x; /* tokens, then targets */
    Buckets buckets;
    cudaEvent_t left; /* all of it has left the host */
} Batch;

typedef struct {
    Config config;
    size_t B; /* largest batch */
    CudaSizes sizes;
    Tensor tensors[NUM_TENSORS], seconds[NUM_TENSORS]; /* how the flat buffers lie on the host; seconds: of adam_v */
    size_t total, seconds_total;                       /* their lengths */
    float *params, *grads, *adam_m, *adam_v;           /* fp32; params are the masters */
    floatX *weights;                                   /* their copies */
    /* Of params, adam_m and adam_v this rank keeps numbers first[i] .. end[i] - 1 of tensor i, from kept[i] on; alone,
       or where the optimiser is not shared out, all, as in grads and weights. */
    size_t first[NUM_TENSORS], end[NUM_TENSORS], kept[NUM_TENSORS];
    size_t kept_seconds[NUM_TENSORS]; /* the same of adam_v, which has nothing of Muon's tensors */
    size_t unsent;             /* the gradients of matrices of blocks from here on are on their way to other ranks */
    bool share, sharing, late; /* share: the next backward pass sends them; sharing: the last one did; late: all
                                      at its end, to see what that takes */
    cudaEvent_t computed, arrived; /* gradients are ready to go, and are there */
    void *piece;                   /* LENT bytes; NULL where nothing needs it */
    MasterTensors p, dp;
    WeightTensors w;
    void *activations;
    CudaActivations a;
    Matmul matmul;
    cudaStream_t stream;
    size_t used_B, used_T; /* of the last forward pass */
    bool used_y;
    size_t predicted; /* its number of targets */
    /* scale of the backward pass that will follow the next forward pass; for which the logits' part is done; 0: none */
    double expected, done;
    size_t block;       /* whose activations are there with --recompute: the last one computed */
    size_t logits_rows; /* room for the logits of so many tokens */
    /* backward passes also sum |dL / d ln phi_s| into the gradients of `alive` */
    bool watch;
    /* deferred: a step's functions do not wait for the device (Backend.defer) */
    bool deferred;
    double clip;                  /* then */
    size_t passes;                /* forward passes since the gradients were zero */
    uint64_t steps, given;        /* deferred steps, and those whose results were given */
    cudaGraphExec_t pass, update; /* of deferred steps: a forward and a backward pass; an update */
    Parts normed, updated;
    NormPieces norm_pieces;
    /* on the host: */
    Batch batches[2];    /* of the last two forward passes */
    int batch;           /* the last one's */
    int *starts;         /* scratch of bucket_tokens */
    StepResult *results; /* on their way back: of the last two deferred steps, and of what is waited for */
    cudaEvent_t answered[2];
    cudaEvent_t passed[2]; /* of several GPUs: the passes of the last two steps */
    float *flat;           /* a whole buffer on its way back; allocated when first needed */
} CudaModel;

/* One function measures the activations (base NULL) and carves them from one piece of memory; returns its bytes, and
   adds them up by kind (bytes NULL: it does not). */
static size_t carve_activations(CudaActivations *a, char *base, const Config *c, size_t B, size_t *bytes) {
    CudaSizes z = cuda_sizes(c, B);
    size_t N = B * z.T, K = c->recompute ? 1 : z.L, at = 0;
    size_t units[NUM_UNITS] = {(z.L + 1) * N, K * N, c->recompute ? mlp_piece(N) : z.L * N, K, N, 1};
#define X(type, name, group, unit, size)                                   \
    a->name = base ? (type *)(base + at) : NULL;                           \
    at += CEIL_DIV(units[UNIT_##unit] * (size) * sizeof(type), 256) * 256; \
    if (bytes) bytes[MEMORY_##group] += CEIL_DIV(units[UNIT_##unit] * (size) * sizeof(type), 256) * 256;
    CUDA_ACTIVATIONS(X)
#undef X
    return at;
}

/* The activations, those that blocks keep being block l's; N tokens. With --recompute all blocks share one place. */
static CudaActivations block_activations(const CudaModel *m, size_t l, size_t N) {
    CudaSizes z = m->sizes;
    CudaActivations a = m->a;
    size_t B = m->B, k = m->config.recompute ? 0 : l, first[NUM_UNITS] = {l * N, k * N, k * N, k, 0, 0};
#define X(type, name, group, unit, size) a.name += first[UNIT_##unit] * (size);
    CUDA_ACTIVATIONS(X)
#undef X
    return a;
}

template <typename Tensors, typename Number>
static void point_parameters(Tensors *p, Number *flat, const Tensor *tensors) {
#define X(name, ...) p->name = tensors[TENSOR_##name].size ? flat + tensors[TENSOR_##name].offset : NULL;
    PARAMETERS(X)
#undef X
}

/* Where the parts that this rank keeps begin; returns how many numbers it keeps, padding included. */
static size_t keep_parts(const Config *c, const Tensor *tensors, size_t first[NUM_TENSORS], size_t end[NUM_TENSORS],
                         size_t kept[NUM_TENSORS], size_t kept_seconds[NUM_TENSORS], size_t *own_seconds) {
    size_t at = 0;
    *own_seconds = 0;
    ranks_cut(tensors, team.shard ? team_rank() : 0, team.shard ? team_count() : 1, first, end);
    for (int i = 0; i < NUM_TENSORS; i++) {
        size_t n = CEIL_DIV(end[i] - first[i], 32) * 32;
        kept[i] = at;
        kept_seconds[i] = *own_seconds;
        at += n;
        if (!config_muon_matrices(c, i)) *own_seconds += n;
    }
    return at;
}

/* Which blocks work on which tensors when all are normed, in the order of clip groups, and when AdamW updates them. */
static void list_parts(CudaModel *m) {
    unsigned blocks = 0;
    for (int c = 0; c < NUM_CLIPS; c++) {
        m->norm_pieces.count[c] = blocks;
        for (int i = 0; i < NUM_TENSORS; i++) {
            const Tensor *t = &m->tensors[i];
            if (!t->size || t->group == GROUP_FIXED || groups[t->group].clip != c) continue;
            blocks += (unsigned)CEIL_DIV(t->size, (size_t)NORM_PIECE);
            m->normed.parts[m->normed.count++] = {t->size, t->offset, 0, 0, blocks, c, false};
        }
        m->norm_pieces.count[c] = blocks - m->norm_pieces.count[c];
    }
    blocks = 0;
    for (int i = 0; i < NUM_TENSORS; i++) {
        const Group *group = &groups[m->tensors[i].group];
        size_t n = m->end[i] - m->first[i];
        if (!n || !group->trained || config_muon_matrices(&m->config, i)) continue;
        blocks += (unsigned)CEIL_DIV(n, 256);
        m->updated.parts[m->updated.count++] = {
            n, m->tensors[i].offset + m->first[i], m->kept[i], m->kept_seconds[i], blocks, group->clip, group->decay};
    }
}

static CudaModel *gsa_create_cuda(const Config *c, size_t B) {
    CudaModel *m = (CudaModel *)xcalloc(1, sizeof *m);
    CudaSizes z = cuda_sizes(c, B);
    size_t L = z.L, NH = z.NH, HS = z.HS, N = B * z.T;
    m->sizes = z;
    m->config = *c;
    m->B = B;
    m->logits_rows = logits_piece(N);
    m->total = model_tensors(c, m->tensors);
    m->seconds_total = model_second_moments(c, m->seconds);
    int low, high;
    cudaCheck(cudaDeviceGetStreamPriorityRange(&low, &high));
    /* before matmul.side, and behind what passes between GPUs */
    cudaCheck(cudaStreamCreateWithPriority(&m->stream, cudaStreamDefault, high < low ? low - 1 : low));
    size_t own_seconds, own = keep_parts(c, m->tensors, m->first, m->end, m->kept, m->kept_seconds, &own_seconds);
    float **buffers[] = {&m->params, &m->grads, &m->adam_m, &m->adam_v};
    for (int i = 0; i < 4; i++) {
        size_t bytes = (i == BUFFER_GRADS ? m->total : i == BUFFER_ADAM_V ? own_seconds : own) * sizeof(float);
        cudaCheck(cudaMalloc(buffers[i], bytes));
        cudaCheck(cudaMemsetAsync(*buffers[i], 0, bytes, m->stream));
    }
    cudaCheck(cudaEventCreateWithFlags(&m->computed, cudaEventDisableTiming));
    cudaCheck(cudaEventCreateWithFlags(&m->arrived, cudaEventDisableTiming));
    if (team.narrow || team.shard) cudaCheck(cudaMalloc(&m->piece, LENT));
    cudaCheck(cudaMalloc(&m->weights, m->total * sizeof(floatX)));
    cudaCheck(cudaMemsetAsync(m->weights, 0, m->total * sizeof(floatX), m->stream));
#define X(name, ...) m->p.name = m->tensors[TENSOR_##name].size ? m->params + m->kept[TENSOR_##name] : NULL;
    PARAMETERS(X) /* of those that are cut the masters are not read, but by the update */
#undef X
    point_parameters(&m->dp, m->grads, m->tensors);
    point_parameters(&m->w, m->weights, m->tensors);
    cudaCheck(cudaMalloc(&m->activations, carve_activations(&m->a, NULL, c, B, NULL)));
    carve_activations(&m->a, (char *)m->activations, c, B, NULL);
    matmul_create(&m->matmul);

    uint32_t *steps = (uint32_t *)xmalloc(HS * sizeof *steps);
    for (size_t k = 0; k < HS / 2; k++) steps[k] = wave_step(rope_frequency((int)k, (int)HS));
    float *scale = (float *)xmalloc(L * NH * sizeof *scale);
    int *window = (int *)xmalloc(4 * L * NH * sizeof *window), *from_features = window + L * NH,
        *gain_of = from_features + L * NH, *gate_of = gain_of + L * NH;
    for (size_t i = 0; i < L * NH; i++) {
        int l = (int)(i / NH), h = (int)(i % NH), kind = config_head_kind(c, l, h);
        bool standard = kind == HEAD_STANDARD || kind == HEAD_EXTEND;
        scale[i] = standard ? 1 / sqrtf((float)HS) : 1;
        window[i] = kind == HEAD_SCAN ? 0 : standard && c->window ? c->window : c->T;
        from_features[i] = !standard || c->position != POSITION_LEARNED;
        gain_of[i] = standard && z.gains ? config_standard_before(c, l, h) : -1;
        gate_of[i] = config_is_gated(c, l, h) ? config_gates_before(c, l, h) - config_gates_before(c, l, 0) : -1;
    }
    cudaCheck(cudaMemcpy(m->a.rope_steps, steps, HS / 2 * sizeof *steps, cudaMemcpyHostToDevice));
    cudaCheck(cudaMemcpy(m->a.scale, scale, L * NH * sizeof *scale, cudaMemcpyHostToDevice));
    cudaCheck(cudaMemcpy(m->a.window, window, L * NH * sizeof *window, cudaMemcpyHostToDevice));
    cudaCheck(cudaMemcpy(m->a.from_features, from_features, L * NH * sizeof *from_features, cudaMemcpyHostToDevice));
    cudaCheck(cudaMemcpy(m->a.gain_of, gain_of, L * NH * sizeof *gain_of, cudaMemcpyHostToDevice));
    cudaCheck(cudaMemcpy(m->a.gate_of, gate_of, L * NH * sizeof *gate_of, cudaMemcpyHostToDevice));
    free(steps);
    free(scale);
    free(window);

    for (int i = 0; i < 2; i++) {
        Batch *batch = &m->batches[i];
        cudaCheck(cudaMallocHost(&batch->x, 2 * N * sizeof(int)));
        cudaCheck(cudaMallocHost(&batch->buckets.positions, N * sizeof(int)));
        cudaCheck(cudaMallocHost(&batch->buckets.segments, N * sizeof(Bucket)));
        cudaCheck(cudaMallocHost(&batch->buckets.tokens, (N / SEGMENT + 1) * sizeof(Bucket)));
        cudaCheck(cudaEventCreateWithFlags(&batch->left, cudaEventDisableTiming));
        cudaCheck(cudaEventCreateWithFlags(&m->answered[i], cudaEventDisableTiming));
        cudaCheck(cudaEventCreateWithFlags(&m->passed[i], cudaEventDisableTiming));
    }
    cudaCheck(cudaMallocHost(&m->results, 3 * sizeof *m->results));
    cudaCheck(cudaMemsetAsync(m->a.result, 0, sizeof *m->results, m->stream)); /* it is read as a whole */
    list_parts(m);
    m->starts = (int *)xmalloc((z.Vp + 1) * sizeof(int));
    cudaCheck(cudaStreamSynchronize(m->stream));
    return m;
}

static void gsa_destroy(CudaModel *m) {
    float *buffers[] = {m->params, m->grads, m->adam_m, m->adam_v};
    for (int i = 0; i < 4; i++) cudaCheck(cudaFree(buffers[i]));
    cudaCheck(cudaFree(m->weights));
    cudaCheck(cudaFree(m->activations));
    cudaCheck(cudaFree(m->piece));
    cudaCheck(cudaEventDestroy(m->computed));
    cudaCheck(cudaEventDestroy(m->arrived));
    matmul_destroy(&m->matmul);
    for (int i = 0; i < 2; i++) {
        Batch *batch = &m->batches[i];
        cudaCheck(cudaFreeHost(batch->x));
        cudaCheck(cudaFreeHost(batch->buckets.positions));
        cudaCheck(cudaFreeHost(batch->buckets.segments));
        cudaCheck(cudaFreeHost(batch->buckets.tokens));
        cudaCheck(cudaEventDestroy(batch->left));
        cudaCheck(cudaEventDestroy(m->answered[i]));
        cudaCheck(cudaEventDestroy(m->passed[i]));
    }
    cudaCheck(cudaFreeHost(m->results));
    if (m->pass) cudaCheck(cudaGraphExecDestroy(m->pass));
    if (m->update) cudaCheck(cudaGraphExecDestroy(m->update));
    cudaCheck(cudaStreamDestroy(m->stream));
    free(m->starts);
    free(m->flat);
    free(m);
}

static SplatTables gsa_splats(const CudaModel *m) {
    CudaActivations a = m->a;
    SplatTables w = {a.slope,
                     a.precision,
                     a.centre,
                     a.log_alpha,
                     a.decay,
                     a.typical,
                     a.key_scale,
                     m->p.mu,
                     m->p.log_precision,
                     m->p.log_theta ? a.steps : NULL,
                     m->p.psi ? a.phases : NULL,
                     m->sizes.SP,
                     m->config.raw != 0};
    return w;
}

/* From GSA head g on: the rows in the parameters or the gradients t. */
static SplatTensors splat_tensors(const CudaModel *m, const MasterTensors &t, size_t g) {
    SplatTensors at;
#define X(name, ...) at.name = t.name ? t.name + g * tensor_row(&m->tensors[TENSOR_##name]) : NULL;
    SPLAT_TENSORS(X)
#undef X
    return at;
}

/* The scales of standard heads with a gain; all others have had theirs since gsa_create_cuda. */
static void gsa_scales(const CudaModel *m) {
    CudaSizes z = m->sizes;
    if (!z.gains) return;
    gain_scales_kernel<<<(unsigned)CEIL_DIV(z.L * z.NH, (size_t)256), 256, 0, m->stream>>>(
        m->a.scale, m->p.log_gain, m->a.gain_of, (int)(z.L * z.NH), (int)z.HS);
    cudaCheck(cudaGetLastError());
}

static void splat_tables(const CudaModel *m) {
    CudaSizes z = m->sizes;
    if (!z.G) return;
    splat_tables_kernel<<<(unsigned)(z.G * z.SP), 32, 0, m->stream>>>(gsa_splats(m), splat_tensors(m, m->p, 0),
                                                                      (int)z.S, (int)z.P, (int)z.HS);
    splat_key_scales_kernel<<<(unsigned)z.G, 32, 0, m->stream>>>(gsa_splats(m));
    cudaCheck(cudaGetLastError());
}

/* The rotations of layer l's standard heads; where they are fixed, they have stood there since gsa_create_cuda. */
static Rotations rotations(const CudaModel *m, size_t l) {
    CudaSizes z = m->sizes;
    if (!z.ropes) return {m->a.rope_steps, 0};
    return {m->a.rope_steps + (size_t)config_standard_before(&m->config, (int)l, 0) * z.HS / 2, z.HS / 2};
}

static void rope_tables(const CudaModel *m) {
    size_t n = m->sizes.ropes * m->sizes.HS / 2;
    if (n) rope_steps_kernel<<<CEIL_DIV(n, 256), 256, 0, m->stream>>>(m->a.rope_steps, m->p.log_rope, (int)n);
    cudaCheck(cudaGetLastError());
}

/* Features of the heads of layer l that have a feature map. */
static void features_forward(CudaModel *m, floatX *features, const floatX *qkv, size_t l, size_t B, size_t T) {
    CudaSizes z = m->sizes;
    HeadList rope = head_list(&m->config, l, HEAD_STANDARD), splat = head_list(&m->config, l, HEAD_SPLAT);
    size_t first = (size_t)config_gsa_before(&m->config, (int)l, 0);
    if (rope.count) rope_forward(features, qkv, rotations(m, l), rope, B, T, z.NH, z.HS, m->stream);
    if (splat.count)
        splat_forward(features, {}, qkv, gsa_splats(m), splat, first, B, T, z.NH, z.HS, z.S, z.P, m->stream);
}

/* The gradients of layer l's splats, from the moments of all its GSA heads; scan: from those of its scans too. */
static void splats_backward(CudaModel *m, size_t l, int heads, bool scan) {
    CudaSizes z = m->sizes;
    size_t first = (size_t)config_gsa_before(&m->config, (int)l, 0);
    splat_gradients_kernel<<<dim3((unsigned)z.S, (unsigned)heads), 32, 0, m->stream>>>(
        splat_tensors(m, m->dp, first), splat_tensors(m, m->p, first), m->a.moments_sums,
        scan ? m->a.scan_moments : NULL, z.W, (int)z.S, (int)z.P, (int)z.HS);
    cudaCheck(cudaGetLastError());
}

/* Where watched: sums of |G| of the listed heads into the gradients of `alive`. */
static void splats_watch(CudaModel *m, ScanResponsesAt scan, const floatX *dfeatures, const floatX *features,
                         HeadList heads, size_t first, size_t B, size_t T) {
    CudaSizes z = m->sizes;
    if (!m->watch) return;
    splat_watch_kernel<<<(unsigned)heads.count, 256, 0, m->stream>>>(m->dp.alive + first * z.S, scan, dfeatures,
                                                                     features, gsa_splats(m), heads, B * T, T,
                                                                     B * T < 2048 ? B * T : 2048, z.A, z.HS, (int)z.S);
    cudaCheck(cudaGetLastError());
}

/* Their part of dqkv; the gradients of layer l's splats. */
static void features_backward(CudaModel *m, floatX *dqkv, const floatX *dfeatures, const floatX *features,
                              const floatX *qkv, size_t l, size_t B, size_t T) {
    CudaSizes z = m->sizes;
    HeadList rope = head_list(&m->config, l, HEAD_STANDARD), splat = head_list(&m->config, l, HEAD_SPLAT);
    size_t first = (size_t)config_gsa_before(&m->config, (int)l, 0);
    if (rope.count) {
        float *dots = z.gains ? m->a.dgains : NULL;
        rope_backward(dqkv, dots, dfeatures, qkv, rotations(m, l), rope, B, T, z.NH, z.HS, m->stream);
        size_t standard = (size_t)config_standard_before(&m->config, (int)l, 0);
        if (dots)
            gain_gradients_kernel<<<(unsigned)rope.count, 1024, 0, m->stream>>>(m->dp.log_gain + standard, dots, B * T);
        cudaCheck(cudaGetLastError());
        if (z.ropes)
            rope_frequencies_backward(m->dp.log_rope + standard * z.HS / 2, m->a.dropes,
                                      m->p.log_rope + standard * z.HS / 2, dfeatures, features, rope, B, T, z.NH, z.HS,
                                      m->stream);
    }
    if (!splat.count) return;
    splat_backward(dqkv, m->a.moments, m->a.moments_sums, {}, dfeatures, features, qkv, gsa_splats(m), splat, first, B,
                   T, z.NH, z.HS, z.S, z.P, m->stream);
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
    in.qkv = block.qkv;
    in.responses = block.responses;
    in.tables = gsa_splats(m);
    in.heads = scan_list(&m->config, l);
    in.first_head = (size_t)config_gsa_before(&m->config, (int)l, 0);
    in.B = B;
    in.T = T;
    in.NH = (size_t)config_heads(&m->config);
    in.segments = scan_segments(B * in.heads.count, T);
    in.segment = CEIL_DIV(CEIL_DIV(T, (size_t)SCAN_BLOCK), (size_t)in.segments) * SCAN_BLOCK;
    in.late = m->config.attention == ATTENTION_EXTEND ? m->config.window : 0;
    return in;
}

/* The scan heads of layer l, and the far part of its extended heads, whose near part att (B, T, A) and lse (B, NH,
   T) hold already; block: the layer's activations */
static void scans_forward(CudaModel *m, CudaActivations block, size_t l, size_t B, size_t T) {
    CudaSizes z = m->sizes;
    ScanInput in = scan_input(m, block, l, B, T);
    bool merged = m->config.attention == ATTENTION_EXTEND;
    if (!in.heads.count) return;
    splat_forward(NULL, {block.responses, z.W, (size_t)in.late, merged}, block.qkv, in.tables, in.heads, in.first_head,
                  B, T, z.NH, z.HS, z.S, z.P, m->stream);
    scan_forward(block.att, block.att_lse, block.scan_rho, m->p.log_far, scan_scratch(block), in,
                 m->config.objective == OBJECTIVE_LM, merged, z.HS, z.W, m->stream);
}

/* Their part of dqkv; the gradients of layer l's splats. */
static void scans_backward(CudaModel *m, CudaActivations block, size_t l, size_t B, size_t T) {
    CudaSizes z = m->sizes;
    CudaActivations a = m->a;
    ScanInput in = scan_input(m, block, l, B, T);
    bool merged = m->config.attention == ATTENTION_EXTEND;
    if (!in.heads.count) return;
    scan_backward(a.dresponses, a.dqkv, a.delta, a.datt, block.att, block.scan_rho, scan_scratch(block), in,
                  m->config.objective == OBJECTIVE_LM, merged, z.HS, z.W, m->stream);
    splat_backward(a.dqkv, a.moments, a.moments_sums, {a.dresponses, z.W, (size_t)in.late, merged}, NULL, NULL,
                   block.qkv, in.tables, in.heads, in.first_head, B, T, z.NH, z.HS, z.S, z.P, m->stream);
    splats_backward(m, l, in.heads.count, true);
    splats_watch(m, {a.dresponses, z.W, (size_t)in.late, merged}, NULL, NULL, in.heads, in.first_head, B, T);
}

/* Is there a head in layer l with softmax? */
static bool attends(const CudaModel *m, size_t l) {
    return m->config.attention == ATTENTION_EXTEND || scan_list(&m->config, l).count < config_heads(&m->config);
}

static AttentionInput attention_input(const CudaModel *m, size_t l, size_t N) {
    CudaSizes z = m->sizes;
    AttentionInput in;
    CudaActivations a = block_activations(m, l, N);
    in.qkv = a.qkv;
    bool mapped = head_list(&m->config, l, HEAD_STANDARD).count || head_list(&m->config, l, HEAD_SPLAT).count;
    in.features = mapped ? a.features : NULL;
    in.from_features = m->a.from_features + l * z.NH;
    in.scale = m->a.scale + l * z.NH;
    in.window = m->a.window + l * z.NH;
    in.causal = m->config.objective == OBJECTIVE_LM;
    in.gates = (int)layer_gates(&m->config, l);
    in.forget = in.gates ? a.forget : NULL;
    in.forget_local = m->a.forget_local;
    in.gate = m->a.gate_of + l * z.NH;
    in.dforget = m->a.dforget;
    return in;
}

/* The forget gates of layer l from its normalised input. */
static void gates_forward(CudaModel *m, CudaActivations block, size_t l, size_t B, size_t T) {
    size_t count = layer_gates(&m->config, l), first = (size_t)config_gates_before(&m->config, (int)l, 0),
           C = m->sizes.C;
    if (count)
        forget_forward(block.forget, block.ln1, m->p.forgetw + first * C, m->p.forgetb + first, B, T, C, count,
                       m->stream);
}

/* Before attention: the workspace that kernels read of layer l's gates. */
static void gates_local(CudaModel *m, CudaActivations block, size_t l, size_t B, size_t T) {
    size_t count = layer_gates(&m->config, l);
    if (count) forget_local(m->a.forget_local, block.forget, B * count, T, m->stream);
}

/* Adds to dln what comes through the gates; their gradients. */
static void gates_backward(CudaModel *m, floatX *dln, CudaActivations block, size_t l, size_t B, size_t T) {
    size_t count = layer_gates(&m->config, l), first = (size_t)config_gates_before(&m->config, (int)l, 0),
           C = m->sizes.C;
    if (count)
        forget_backward(dln, m->dp.forgetw + first * C, m->dp.forgetb + first, m->a.forget_partials, m->a.dforget,
                        block.forget, block.ln1, m->p.forgetw + first * C, B, T, C, count, m->stream);
}

/* Block l from its input to the normalised stream before the MLP: all that the backward pass needs but for the MLP's
   hidden layer. */
static void block_forward(CudaModel *m, size_t l, size_t B, size_t T) {
    CudaSizes z = m->sizes;
    size_t C = z.C, A = z.A, N = B * T;
    MasterTensors p = m->p;
    WeightTensors w = m->w;
    CudaActivations a = block_activations(m, l, N);
    cudaStream_t stream = m->stream;
    m->block = l;
    layernorm_forward(a.ln1, a.ln1_mean, a.ln1_rstd, a.residual, p.ln1w + l * C, p.ln1b + l * C, N, C, stream);
    matmul_forward(&m->matmul, a.qkv, a.ln1, w.qkvw + l * 3 * A * C, w.qkvb + l * 3 * A, NULL, NULL, N, C, 3 * A,
                   stream);
    features_forward(m, a.features, a.qkv, l, B, T);
    gates_forward(m, a, l, B, T);
    gates_local(m, a, l, B, T);
    if (attends(m, l)) attention_forward(a.att, a.att_lse, attention_input(m, l, N), B, T, z.NH, z.HS, stream);
    scans_forward(m, a, l, B, T);
    matmul_forward(&m->matmul, a.middle, a.att, w.attprojw + l * C * A, w.attprojb + l * C, a.residual, NULL, N, A, C,
                   stream);
    layernorm_forward(a.ln2, a.ln2_mean, a.ln2_rstd, a.middle, p.ln2w + l * C, p.ln2b + l * C, N, C, stream);
}

/* The hidden layer of block l's MLP for n tokens from `first` on: gelu = gelu(fc), fc = ln2 W^T + b, all (n, 4C). */
static void hidden_forward(CudaModel *m, floatX *gelu, floatX *fc, const floatX *ln2, size_t l, size_t first,
                           size_t n) {
    size_t C = (size_t)m->config.C;
    matmul_forward(&m->matmul, gelu, ln2 + first * C, m->w.fcw + l * 4 * C * C, m->w.fcb + l * 4 * C, NULL, fc, n, C,
                   4 * C, m->stream);
}

/* May gradients of matrices be computed beside the rest of the backward pass? Not where pieces of activations take each
   other's place, nor where other GPUs wait for those of each block. */
static bool may_part(const CudaModel *m) {
    size_t N = m->used_B * m->used_T;
    return !m->config.recompute && team_count() == 1 && piece_size(N, piece_most) == N &&
           piece_size(N, m->logits_rows) == N;
}

/* Logits of n tokens from `first` on; they become their gradients in the same pass, and losses are stored. */
static void logits_forward(CudaModel *m, size_t first, size_t n) {
    CudaSizes z = m->sizes;
    CudaActivations a = m->a;
    matmul_forward(&m->matmul, a.logits, a.lnf + first * z.C, m->w.wte, NULL, NULL, NULL, n, z.C, z.Vp, m->stream);
    fused_classifier(a.logits, a.losses + first, a.y + first, 1 / (float)(m->predicted ? m->predicted : 1), n, z.V,
                     z.Vp, m->stream);
}

/* From the gradients of these logits: dln of their tokens, and adds to dwte. */
static void logits_backward(CudaModel *m, size_t first, size_t n, double scale) {
    CudaSizes z = m->sizes;
    CudaActivations a = m->a;
    matmul_backward(&m->matmul, a.dln + first * z.C, m->dp.wte, NULL, NULL, a.logits, a.lnf + first * z.C, m->w.wte,
                    NULL, (float)scale, n, z.C, z.Vp, m->stream);
}

static StepResult read_result(CudaModel *m) {
    StepResult *to = m->results + 2;
    cudaCheck(cudaMemcpyAsync(to, m->a.result, sizeof *to, cudaMemcpyDeviceToHost, m->stream));
    cudaCheck(cudaStreamSynchronize(m->stream));
    return *to;
}

/* The batch that the next pass may fill: what it had has left the host. */
static Batch *next_batch(CudaModel *m) {
    m->batch ^= 1;
    cudaCheck(cudaEventSynchronize(m->batches[m->batch].left));
    return &m->batches[m->batch];
}

/* Forward and backward pass of a deferred step are recorded, not launched one kernel after the other, and go to the
   device as one graph: its kernels follow each other more closely. So does the update. Not in the first step, which
   chooses algorithms, and where splats are watched, which now and then takes other kernels, and not with several GPUs,
   whose sums begin in the midst of it. */
static bool records(const CudaModel *m) { return m->deferred && m->steps > 0 && !m->watch && team_count() == 1; }
static void record(CudaModel *m) { cudaCheck(cudaStreamBeginCapture(m->stream, cudaStreamCaptureModeRelaxed)); }
/* What was recorded; *last: the graph of the same part of the step before, or NULL */
static void launch_recorded(CudaModel *m, cudaGraphExec_t *last) {
    cudaGraph_t graph;
    cudaGraphExecUpdateResultInfo info;
    cudaCheck(cudaStreamEndCapture(m->stream, &graph));
    if (*last && cudaGraphExecUpdate(*last, graph, &info) != cudaSuccess) { /* other kernels than those of the last */
        cudaGetLastError();
        cudaCheck(cudaGraphExecDestroy(*last));
        *last = NULL;
    }
    if (!*last) cudaCheck(cudaGraphInstantiate(last, graph, 0));
    cudaCheck(cudaGraphLaunch(*last, m->stream));
    cudaCheck(cudaGraphDestroy(graph));
}

/* x, y (B, T); a y of -1 is not predicted; y NULL: all but the loss. Returns the mean loss of what is predicted, in
   nats. */
static double gsa_forward(CudaModel *m, const int *x, const int *y, size_t B, size_t T) {
    CudaSizes z = m->sizes;
    size_t C = z.C, N = B * T, L = z.L, piece = piece_size(N, piece_most);
    MasterTensors p = m->p;
    WeightTensors w = m->w;
    CudaActivations a = m->a;
    cudaStream_t stream = m->stream;
    m->used_B = B;
    m->used_T = T;
    m->used_y = y != NULL;
    m->predicted = 0;
    m->done = 0;
    Batch *batch = next_batch(m);
    if (records(m)) record(m);
    memcpy(batch->x, x, N * sizeof(int));
    cudaCheck(cudaMemcpyAsync(a.x, batch->x, N * sizeof(int), cudaMemcpyHostToDevice, stream));
    if (y) {
        for (size_t i = 0; i < N; i++) m->predicted += y[i] >= 0;
        memcpy(batch->x + N, y, N * sizeof(int));
        cudaCheck(cudaMemcpyAsync(a.y, batch->x + N, N * sizeof(int), cudaMemcpyHostToDevice, stream));
    }
    if (!records(m)) cudaCheck(cudaEventRecord(batch->left, stream));
    splat_tables(m);
    rope_tables(m);
    gsa_scales(m);
    encoder_forward(a.residual, a.x, w.wte, w.wpe, B, T, C, 0, stream);
    for (size_t l = 0; l < L; l++) {
        CudaActivations block = block_activations(m, l, N);
        floatX *out = block.residual + N * C;
        block_forward(m, l, B, T);
        for (size_t i = 0; i < N; i += piece) {
            /* where the hidden layer is kept, or the next piece will overwrite it */
            size_t n = i + piece < N ? piece : N - i, at = m->config.recompute ? 0 : i * 4 * C;
            hidden_forward(m, block.gelu + at, block.fc + at, block.ln2, l, i, n);
            matmul_forward(&m->matmul, out + i * C, block.gelu + at, w.fcprojw + l * 4 * C * C, w.fcprojb + l * C,
                           block.middle + i * C, NULL, n, 4 * C, C, stream);
        }
    }
    layernorm_forward(a.lnf, a.lnf_mean, a.lnf_rstd, a.residual + L * N * C, p.lnfw, p.lnfb, N, C, stream);
    if (!y) {
        cudaCheck(cudaStreamSynchronize(stream));
        return 0;
    }
    size_t rows = piece_size(N, m->logits_rows);
    m->matmul.apart = may_part(m);
    for (size_t i = 0; i < N; i += rows) {
        size_t n = i + rows < N ? rows : N - i;
        logits_forward(m, i, n);
        /* while they are there: the next piece overwrites them */
        if (m->expected) logits_backward(m, i, n, m->expected);
    }
    m->matmul.apart = false; /* the backward pass waits for that too */
    m->done = m->expected;
    m->expected = 0;
    mean_loss_kernel<<<1, 1024, 0, stream>>>(a.result, a.losses, N, m->predicted, m->deferred && m->passes++ > 0);
    cudaCheck(cudaGetLastError());
    bucket_tokens(&batch->buckets, batch->x, N, z.Vp, m->starts); /* for the backward pass, while the device works */
    return m->deferred ? 0 : read_result(m).loss;
}

/* Sends the ranges' gradients, which the compute stream has made ready, to be added to those of other ranks. */
static void send_gradients(CudaModel *m, const Range *ranges, int count) {
    cudaCheck(cudaEventRecord(m->computed, m->stream));
    cudaCheck(cudaStreamWaitEvent(team.stream, m->computed, 0));
    if (team.narrow) sum_narrow(m->grads, m->piece, ranges, count);
    else sum_wide(m->grads, ranges, count);
}

static const int block_matrices[] = {TENSOR_qkvw, TENSOR_attprojw, TENSOR_fcw, TENSOR_fcprojw}; /* in their order */
enum { SENT_AT_ONCE = 8 << 20 }; /* numbers, at least: less would be more latency than traffic */

/* Those of the matrices of block l are ready, as are those of later blocks; they go when there are enough of them. */
static void send_block(CudaModel *m, size_t l) {
    Range ranges[4];
    size_t sum = 0;
    for (int i = 0; i < 4; i++) {
        const Tensor *t = &m->tensors[block_matrices[i]];
        ranges[i] = {t->offset + l * tensor_row(t), (m->unsent - l) * tensor_row(t)};
        sum += ranges[i].count;
    }
    if (l > 0 && (m->late || sum < SENT_AT_ONCE)) return;
    send_gradients(m, ranges, 4);
    m->unsent = l;
}

/* All others: what lies between these matrices. */
static void send_rest(CudaModel *m) {
    Range ranges[5];
    int count = 0;
    size_t from = 0;
    for (int i = 0; i <= 4; i++) {
        size_t to = i < 4 ? m->tensors[block_matrices[i]].offset : m->total;
        if (to > from) ranges[count++] = {from, to - from};
        if (i < 4) from = to + CEIL_DIV(m->tensors[block_matrices[i]].size, 32) * 32;
    }
    send_gradients(m, ranges, count);
    cudaCheck(cudaEventRecord(m->passed[m->steps % 2], m->stream));
    cudaCheck(cudaEventRecord(m->arrived, team.stream));
    m->share = false;
    m->sharing = true;
}

/* What the device does from here on comes after the sums. A host that waits for them finds out first whether its own
   GPU hangs in its passes, so that others are not blamed. */
static void await_gradients(CudaModel *m) {
    if (!m->deferred) {
        cudaCheck(cudaEventSynchronize(m->passed[m->steps % 2]));
        ranks_doing(team.ranks, RANKS_WAITING);
        cudaCheck(cudaEventSynchronize(m->arrived));
        ranks_doing(team.ranks, RANKS_WORKING);
    }
    cudaCheck(cudaStreamWaitEvent(m->stream, m->arrived, 0));
    m->sharing = false;
}

/* Each rank has updated its part of the matrices: now all get the copies of all parts. */
static void share_weights(CudaModel *m) {
    size_t first[NUM_TENSORS], end[NUM_TENSORS];
    cudaCheck(cudaEventRecord(m->computed, m->stream));
    cudaCheck(cudaStreamWaitEvent(team.stream, m->computed, 0));
    ncclCheck(nccl.GroupStart());
    for (int q = 0; q < team_count(); q++) {
        ranks_cut(m->tensors, q, team_count(), first, end);
        for (int i = 0; i < NUM_TENSORS; i++) {
            floatX *at = m->weights + m->tensors[i].offset + first[i];
            if (!ranks_cuts(i) || end[i] == first[i]) continue;
            ncclCheck(nccl.Broadcast(at, at, (end[i] - first[i]) * sizeof *at, NCCL_BYTES, q, team.comm, team.stream));
        }
    }
    ncclCheck(nccl.GroupEnd());
    cudaCheck(cudaEventRecord(m->arrived, team.stream));
    cudaCheck(cudaStreamWaitEvent(m->stream, m->arrived, 0));
}

/* Adds scale times the gradient of the last forward's mean loss to the gradients. */
static void gsa_backward(CudaModel *m, double scale) {
    CudaSizes z = m->sizes;
    size_t B = m->used_B, T = m->used_T, C = z.C, A = z.A, N = B * T, L = z.L, piece = piece_size(N, piece_most),
           rows = piece_size(N, m->logits_rows);
    MasterTensors p = m->p, dp = m->dp;
    WeightTensors w = m->w;
    CudaActivations a = m->a;
    cudaStream_t stream = m->stream;
    Matmul *mm = &m->matmul;
    mm->apart = may_part(m);
    if (m->done && m->done != scale)
        die("internal error: a backward pass by %g was announced, not by %g", m->done, scale);
    for (size_t i = 0; i < N && !m->done; i += rows) {
        size_t n = i + rows < N ? rows : N - i;
        if (rows < N) logits_forward(m, i, n); /* again */
        logits_backward(m, i, n, scale);
    }
    m->unsent = L;
    cudaCheck(cudaMemsetAsync(a.dresidual, 0, N * C * sizeof(floatX), stream));
    layernorm_backward(a.dresidual, dp.lnfw, dp.lnfb, L ? dp.fcprojb + (L - 1) * C : NULL, a.partials, a.dln,
                       a.residual + L * N * C, p.lnfw, a.lnf_mean, a.lnf_rstd, N, C, stream);
    /* the biases of attproj and fcproj get their gradients from the layernorm that follows them */
    for (size_t l = L; l-- > 0;) {
        if (m->config.recompute && m->block != l) block_forward(m, l, B, T);
        CudaActivations block = block_activations(m, l, N);
        for (size_t i = 0; i < N; i += piece) {
            size_t n = i + piece < N ? piece : N - i, at = m->config.recompute ? 0 : i * 4 * C;
            if (m->config.recompute) hidden_forward(m, block.gelu, block.fc, block.ln2, l, i, n);
            matmul_backward(mm, a.dfc, dp.fcprojw + l * 4 * C * C, NULL, NULL, a.dresidual + i * C, block.gelu + at,
                            w.fcprojw + l * 4 * C * C, block.fc + at, 1, n, 4 * C, C, stream);
            mark_side(mm, 0);
            matmul_backward(mm, a.dln + i * C, dp.fcw + l * 4 * C * C, dp.fcb + l * 4 * C, a.side_partials, a.dfc,
                            block.ln2 + i * C, w.fcw + l * 4 * C * C, NULL, 1, n, C, 4 * C, stream);
        }
        await_side(mm, 0, stream); /* fcproj's gradients come of dresidual as it is */
        layernorm_backward(a.dresidual, dp.ln2w + l * C, dp.ln2b + l * C, dp.attprojb + l * C, a.partials, a.dln,
                           block.middle, p.ln2w + l * C, block.ln2_mean, block.ln2_rstd, N, C, stream);
        matmul_backward(mm, a.datt, dp.attprojw + l * C * A, NULL, NULL, a.dresidual, block.att, w.attprojw + l * C * A,
                        NULL, 1, N, A, C, stream);
        mark_side(mm, 1);
        gates_local(m, block, l, B, T);
        if (attends(m, l))
            attention_backward(a.dqkv, a.dfeatures, a.delta, a.datt, block.att, block.att_lse, attention_input(m, l, N),
                               B, T, z.NH, z.HS, stream);
        features_backward(m, a.dqkv, a.dfeatures, block.features, block.qkv, l, B, T);
        scans_backward(m, block, l, B, T);
        matmul_backward(mm, a.dln, dp.qkvw + l * 3 * A * C, dp.qkvb + l * 3 * A, a.side_partials, a.dqkv, block.ln1,
                        w.qkvw + l * 3 * A * C, NULL, 1, N, C, 3 * A, stream);
        gates_backward(m, a.dln, block, l, B, T);
        await_side(mm, 1, stream); /* attproj's likewise, and before them dfc; dqkv is waited for by the next ln2 */
        layernorm_backward(a.dresidual, dp.ln1w + l * C, dp.ln1b + l * C, l ? dp.fcprojb + (l - 1) * C : NULL,
                           a.partials, a.dln, block.residual, p.ln1w + l * C, block.ln1_mean, block.ln1_rstd, N, C,
                           stream);
        if (m->share) send_block(m, l);
    }
    join_side(mm, stream);
    mm->apart = false;
    Buckets b = m->batches[m->batch].buckets;
    cudaCheck(cudaMemcpyAsync(a.positions, b.positions, N * sizeof(int), cudaMemcpyHostToDevice, stream));
    cudaCheck(cudaMemcpyAsync(a.segments, b.segments, (size_t)b.segment_count * sizeof(Bucket), cudaMemcpyHostToDevice,
                              stream));
    cudaCheck(cudaMemcpyAsync(a.bucket_tokens, b.tokens, (size_t)b.token_count * sizeof(Bucket), cudaMemcpyHostToDevice,
                              stream));
    b.positions = a.positions;
    b.segments = a.segments;
    b.tokens = a.bucket_tokens;
    encoder_backward(dp.wte, dp.wpe, a.dresidual, &b, a.token_sums, B, T, C, stream);
    if (records(m)) launch_recorded(m, &m->pass);
    cudaCheck(cudaEventRecord(m->batches[m->batch].left, stream));
    if (m->share) send_rest(m);
}

static void gsa_zero_gradients(CudaModel *m) {
    m->passes = 0;
    cudaCheck(cudaMemsetAsync(m->grads, 0, m->total * sizeof(float), m->stream));
}

/* The L2 norm of each clip group's gradients: sums of fixed pieces, in double, added in order. */
static void gsa_gradient_norms(CudaModel *m, double norms[NUM_CLIPS]) {
    CudaActivations a = m->a;
    if (m->sharing) await_gradients(m);
    square_sums_kernel<<<m->normed.parts[m->normed.count - 1].end, 256, 0, m->stream>>>(a.sums, m->grads, m->normed);
    norms_kernel<<<NUM_CLIPS, 1024, 0, m->stream>>>(a.result, a.clip_scale, a.sums, m->norm_pieces, m->clip);
    cudaCheck(cudaGetLastError());
    StepResult result = {};
    if (!m->deferred) result = read_result(m);
    memcpy(norms, result.norms, sizeof result.norms);
}

/* Puts splats, gains and learned rotations back into their bounds (gsa/model.h); counts what was outside, by kind. */
static void scalar_bounds(CudaModel *m) {
    CudaSizes z = m->sizes;
    unsigned long long *counts = (unsigned long long *)m->a.result->clamped;
    cudaCheck(cudaMemsetAsync(counts, 0, NUM_BOUNDS * sizeof(int64_t), m->stream));
    if (z.G)
        splat_bounds_kernel<<<(unsigned)(z.G * z.S), 32, 0, m->stream>>>(
            counts, splat_tensors(m, m->p, 0), m->config.unbounded, m->config.mixer == MIXER_LINEAR, (int)z.P,
            (int)z.HS);
    if (z.gains && config_bounded(&m->config, BOUND_GAIN))
        bounds_kernel<<<(unsigned)CEIL_DIV(z.gains, (size_t)256), 256, 0, m->stream>>>(
            counts + BOUND_GAIN, m->p.log_gain, (float)log(GAIN_MIN), (float)log(GAIN_MAX), (int)z.gains);
    size_t turns = z.ropes * z.HS / 2;
    if (turns && config_bounded(&m->config, BOUND_FREQUENCY))
        bounds_kernel<<<(unsigned)CEIL_DIV(turns, (size_t)256), 256, 0, m->stream>>>(
            counts + BOUND_FREQUENCY, m->p.log_rope, -INFINITY, (float)log(SPLAT_FREQUENCY_MAX), (int)turns);
    cudaCheck(cudaGetLastError());
}

/* Muon, for those matrices of the blocks that this rank keeps: as many at once as muon_batch says. */
static void muon_update(CudaModel *m, const Update *u, Scales scale) {
    CudaActivations a = m->a;
    float mean = (float)u->momentum;
    for (int i = 0; i < NUM_TENSORS; i++) {
        size_t count = config_muon_matrices(&m->config, i), batch;
        if (!count) continue;
        size_t each = m->tensors[i].size / count, end = m->end[i] / each; /* ranks_cut leaves matrices whole */
        for (size_t j = m->first[i] / each; j < end; j += batch) {
            MuonMatrix x = config_muon_matrix(&m->config, m->tensors, i, j);
            size_t most = muon_batch(x, count), own = m->kept[i] + j * each - m->first[i];
            batch = j + most < end ? most : end - j;
            dim3 grid(MUON_BLOCKS, (unsigned)batch);
            float *momentum = m->adam_m + own;
            const float *grads = m->grads + x.at;
            muon_momentum_kernel<<<grid, 256, 0, m->stream>>>(a.muon_sums, momentum, grads, each, scale, mean);
            muon_start_kernel<<<grid, 256, 0, m->stream>>>(a.muon_x, a.muon_sums, momentum, grads, each, scale, mean);
            cudaCheck(cudaGetLastError());
            const floatX *o = muon_steps(&m->matmul, a.muon_x, a.muon_y, a.muon_gram, a.muon_square, x.rows, x.columns,
                                         batch, most, m->stream);
            muon_apply_kernel<<<CEIL_DIV(batch * each, 256), 256, 0, m->stream>>>(
                m->params + own, m->weights + x.at, o, batch * each, (float)u->rate[CLIP_WEIGHTS],
                (float)muon_scale(x.rows, x.columns), (float)u->weight_decay);
            cudaCheck(cudaGetLastError());
        }
    }
}

/* AdamW and Muon, then the bounds */
static void gsa_update(CudaModel *m, const Update *u, int64_t clamped[NUM_BOUNDS]) {
    Scales scales = {{(float)u->scale[CLIP_WEIGHTS], (float)u->scale[CLIP_SPLATS]},
                     m->deferred ? m->a.clip_scale : NULL};
    AdamW adamw = {{(float)u->rate[CLIP_WEIGHTS], (float)u->rate[CLIP_SPLATS]},
                   (float)u->weight_decay,
                   (float)u->beta1,
                   (float)u->beta2,
                   (float)(1 / (1 - pow(u->beta1, (double)u->step))),
                   (float)(1 / (1 - pow(u->beta2, (double)u->step))),
                   scales};
    if (records(m)) record(m);
    adamw_kernel<<<m->updated.parts[m->updated.count - 1].end, 256, 0, m->stream>>>(
        m->params, m->weights, m->adam_m, m->adam_v, m->grads, m->updated, adamw);
    cudaCheck(cudaGetLastError());
    if (m->config.muon) muon_update(m, u, scales);
    if (team.shard) share_weights(m);
    scalar_bounds(m);
    if (records(m)) launch_recorded(m, &m->update);
    StepResult result = {};
    if (!m->deferred) result = read_result(m);
    memcpy(clamped, result.clamped, sizeof result.clamped);
}

/* ---------------------------------------------------------------------- the back end of gsa/run/train.h */

static float *cuda_buffer(CudaModel *m, int buffer) {
    float *all[] = {m->params, m->grads, m->adam_m, m->adam_v};
    return all[buffer];
}

/* How a whole buffer lies on the host, its length, and where this rank keeps its part of each tensor. */
static const Tensor *cuda_table(const CudaModel *m, int buffer) {
    return buffer == BUFFER_ADAM_V ? m->seconds : m->tensors;
}
static size_t cuda_length(const CudaModel *m, int buffer) {
    return buffer == BUFFER_ADAM_V ? m->seconds_total : m->total;
}
static size_t cuda_kept(const CudaModel *m, int buffer, int i) {
    return buffer == BUFFER_ADAM_V ? m->kept_seconds[i] : m->kept[i];
}

/* Where number `first` of a buffer lies; it is of a tensor that is not cut. */
static float *cuda_place(CudaModel *m, int buffer, size_t first) {
    int i = 0;
    if (buffer == BUFFER_GRADS) return m->grads + first;
    while (i + 1 < NUM_TENSORS && (!m->tensors[i].size || m->tensors[i].offset + m->tensors[i].size <= first)) i++;
    return cuda_buffer(m, buffer) + cuda_kept(m, buffer, i) + (first - m->tensors[i].offset);
}

/* Part of a buffer, of tensors that are not cut and lie side by side. */
static void cuda_put(void *model, int buffer, size_t first, size_t count, const float *from) {
    CudaModel *m = (CudaModel *)model;
    if (!count) return;
    float *to = cuda_place(m, buffer, first);
    cudaCheck(cudaMemcpyAsync(to, from, count * sizeof(float), cudaMemcpyHostToDevice, m->stream));
    if (buffer == BUFFER_PARAMS)
        convert_kernel<<<CEIL_DIV(count, 256), 256, 0, m->stream>>>(m->weights + first, to, count);
    cudaCheck(cudaGetLastError());
    cudaCheck(cudaStreamSynchronize(m->stream));
}

/* Tensor i where the optimiser is shared out: the rank's part, and copies of all weights. from: the tensor. */
static void write_part(CudaModel *m, int buffer, int i, const float *from) {
    const Tensor *t = &m->tensors[i];
    float *piece = (float *)m->piece;
    cudaCheck(cudaMemcpyAsync(cuda_buffer(m, buffer) + cuda_kept(m, buffer, i), from + m->first[i],
                              (m->end[i] - m->first[i]) * sizeof(float), cudaMemcpyHostToDevice, m->stream));
    for (size_t at = 0, n; at < t->size && buffer == BUFFER_PARAMS; at += n) {
        n = t->size - at < LENT / sizeof(float) ? t->size - at : LENT / sizeof(float);
        cudaCheck(cudaMemcpyAsync(piece, from + at, n * sizeof(float), cudaMemcpyHostToDevice, m->stream));
        convert_kernel<<<CEIL_DIV(n, 256), 256, 0, m->stream>>>(m->weights + t->offset + at, piece, n);
        cudaCheck(cudaGetLastError());
    }
    cudaCheck(cudaStreamSynchronize(m->stream));
}

static void cuda_write(void *model, int buffer, const float *from) {
    CudaModel *m = (CudaModel *)model;
    if (!team.shard) cuda_put(model, buffer, 0, cuda_length(m, buffer), from);
    for (int i = 0; i < NUM_TENSORS && team.shard; i++)
        if (cuda_table(m, buffer)[i].size) write_part(m, buffer, i, from + cuda_table(m, buffer)[i].offset);
}

/* Rank 0 gets tensor i from all ranks that keep parts of it. */
static void read_parts(CudaModel *m, int buffer, int i) {
    size_t first[NUM_TENSORS], end[NUM_TENSORS], most = LENT / sizeof(float);
    float *own = cuda_buffer(m, buffer) + cuda_kept(m, buffer, i),
          *to = m->flat ? m->flat + cuda_table(m, buffer)[i].offset : NULL;
    for (int q = 0; q < team_count(); q++) {
        ranks_cut(m->tensors, q, team_count(), first, end);
        for (size_t at = first[i], n; at < end[i]; at += n) {
            n = end[i] - at < most ? end[i] - at : most;
            float *from = q == team_rank() ? own + (at - m->first[i]) : (float *)m->piece;
            if (q) ncclCheck(nccl.Broadcast(from, m->piece, n, NCCL_FP32, q, team.comm, m->stream));
            if (to) cudaCheck(cudaMemcpyAsync(to + at, from, n * sizeof(float), cudaMemcpyDeviceToHost, m->stream));
        }
        if (!ranks_cuts(i)) break; /* rank 0 has it whole */
    }
}

static const float *cuda_read(void *model, int buffer) {
    CudaModel *m = (CudaModel *)model;
    if (!m->flat && !(team.shard && team_rank())) m->flat = (float *)xcalloc(m->total, sizeof(float));
    if (team.shard && buffer != BUFFER_GRADS)
        for (int i = 0; i < NUM_TENSORS; i++) {
            if (cuda_table(m, buffer)[i].size) read_parts(m, buffer, i);
        }
    else
        cudaCheck(cudaMemcpyAsync(m->flat, cuda_buffer(m, buffer), cuda_length(m, buffer) * sizeof(float),
                                  cudaMemcpyDeviceToHost, m->stream));
    cudaCheck(cudaStreamSynchronize(m->stream));
    return m->flat;
}

static void cuda_logits(void *model, int b, int t, float *out) {
    CudaModel *m = (CudaModel *)model;
    CudaSizes z = m->sizes;
    if (m->used_y) die("internal error: the logits of a forward pass with targets are their gradients");
    floatX *row = (floatX *)xmalloc(z.V * sizeof *row);
    matmul_forward(&m->matmul, m->a.logits, m->a.lnf + ((size_t)b * m->used_T + (size_t)t) * z.C, m->w.wte, NULL, NULL,
                   NULL, 1, z.C, z.Vp, m->stream);
    cudaCheck(cudaMemcpyAsync(row, m->a.logits, z.V * sizeof *row, cudaMemcpyDeviceToHost, m->stream));
    cudaCheck(cudaStreamSynchronize(m->stream));
    for (size_t v = 0; v < z.V; v++) out[v] = (float)row[v];
    free(row);
}

static void cuda_head(void *model, int l, int h, int part, int count, float *out) {
    CudaModel *m = (CudaModel *)model;
    CudaSizes z = m->sizes;
    size_t N = m->used_B * m->used_T, n = (size_t)count, size = z.HS * sizeof(floatX);
    if (m->config.recompute && m->block != (size_t)l) block_forward(m, (size_t)l, m->used_B, m->used_T);
    cudaCheck(cudaStreamSynchronize(m->stream));
    if (part == PART_FORGET) {
        size_t gates = layer_gates(&m->config, (size_t)l), T = m->used_T,
               gate = (size_t)(config_gates_before(&m->config, l, h) - config_gates_before(&m->config, l, 0));
        double *c = (double *)xmalloc(N * gates * sizeof(double));
        cudaCheck(cudaMemcpy(c, block_activations(m, (size_t)l, N).forget, N * gates * sizeof(double),
                             cudaMemcpyDeviceToHost));
        for (size_t i = 0; i < n; i++) {
            size_t token = i * (N / n), t = token % T;
            const double *at = c + (token / T * gates + gate) * T + t;
            out[i] = (float)(t ? at[0] - at[-1] : at[0]);
        }
        free(c);
        return;
    }
    floatX *part_of_head = (floatX *)xmalloc(n * size);
    cudaCheck(cudaMemcpy2D(part_of_head, size,
                           block_activations(m, (size_t)l, N).qkv + (size_t)part * z.A + (size_t)h * z.HS,
                           N / n * 3 * z.A * sizeof(floatX), size, n, cudaMemcpyDeviceToHost));
    for (size_t i = 0; i < n * z.HS; i++) out[i] = (float)part_of_head[i];
    free(part_of_head);
}

static void cuda_get(void *model, int buffer, size_t first, size_t count, float *to) {
    CudaModel *m = (CudaModel *)model;
    cudaCheck(
        cudaMemcpyAsync(to, cuda_place(m, buffer, first), count * sizeof(float), cudaMemcpyDeviceToHost, m->stream));
    cudaCheck(cudaStreamSynchronize(m->stream));
}

static void cuda_defer(void *model, bool on, double clip) {
    CudaModel *m = (CudaModel *)model;
    m->deferred = on;
    m->clip = clip;
    if (on) return;
    size_t i = m->steps++ % 2;
    cudaCheck(cudaMemcpyAsync(m->results + i, m->a.result, sizeof *m->results, cudaMemcpyDeviceToHost, m->stream));
    cudaCheck(cudaEventRecord(m->answered[i], m->stream));
}

/* Of the oldest of the last steps whose result was not given yet. */
static void cuda_result(void *model, StepResult *out) {
    CudaModel *m = (CudaModel *)model;
    size_t i = m->given++ % 2;
    if (team_count() > 1) { /* as await_gradients would have waited */
        cudaCheck(cudaEventSynchronize(m->passed[i]));
        ranks_doing(team.ranks, RANKS_WAITING);
    }
    cudaCheck(cudaEventSynchronize(m->answered[i]));
    if (team_count() > 1) ranks_doing(team.ranks, RANKS_WORKING);
    *out = m->results[i];
}

static void cuda_watch(void *model, bool on) { ((CudaModel *)model)->watch = on; }

static double cuda_forward(void *model, const int *x, const int *y, int B, int T) {
    return gsa_forward((CudaModel *)model, x, y, (size_t)B, (size_t)T);
}
static void cuda_backward(void *model, double scale) { gsa_backward((CudaModel *)model, scale); }
static void cuda_expect(void *model, double scale) { ((CudaModel *)model)->expected = scale; }
static void cuda_zero_gradients(void *model) { gsa_zero_gradients((CudaModel *)model); }
static void cuda_gradient_norms(void *model, double norms[NUM_CLIPS]) { gsa_gradient_norms((CudaModel *)model, norms); }
static void cuda_update(void *model, const Update *u, int64_t clamped[NUM_BOUNDS]) {
    gsa_update((CudaModel *)model, u, clamped);
}
static void cuda_destroy(void *model) { gsa_destroy((CudaModel *)model); }
static void cuda_share(void *model) { ((CudaModel *)model)->share = true; }

static int cuda_devices(void) {
    int count;
    return cudaGetDeviceCount(&count) == cudaSuccess ? count : 0;
}

static const char *cuda_name(void) {
    static char name[400];
    const cudaDeviceProp *d = cuda_device();
    if (d->major < 8)
        die("%s is of compute capability %d.%d; bf16 needs 8.0 (A100, RTX 30) or newer", d->name, d->major, d->minor);
    snprintf(name, sizeof name, "%.80s, %d multiprocessors, %.0f GiB, " FLOATX_NAME ", matrix products by cuBLASLt %zu",
             d->name, d->multiProcessorCount, (double)d->totalGlobalMem / (1 << 30), cublasLtGetVersion());
    return name;
}

/* Dense tensor-core peaks with fp32 sums, from the data sheets; 0: unknown. The fp32 build uses none of that. */
static double cuda_peak_flops(void) {
#ifndef GSA_FP32
    static const struct {
        const char *name;
        double flops;
    } peaks[] = {{"H100 PCIe", 756e12},  {"H100 NVL", 835e12},  {"H100", 989.4e12}, {"H200", 989.4e12},
                 {"GH200", 989.4e12},    {"A100", 312e12},      {"A10", 125e12},    {"L40S", 362e12},
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
    if (HS != 32 && HS != 64 && HS != 128)
        return "on the GPU heads have 32, 64 or 128 channels; change --channels or --heads";
    if (c->C > LAYERNORM_CHANNELS) return "on the GPU --channels is at most 4096";
    if (G && c->mixer == MIXER_LINEAR && c->S > SCAN_SPLATS_MOST)
        return "on the GPU a head of the linear mixer has at most 32 splats; lower --splats";
    if (G && c->S > SPLATS_MOST) return "on the GPU a head has at most 64 splats; lower --splats";
    return NULL;
}

/* Shared memory that a block takes of the largest kernel for S splats a head. */
template <int HS> static size_t shared_memory(const Config *c, int S) {
    bool diagonal = c->covariance == COVARIANCE_DIAG, full = c->covariance == COVARIANCE_FULL;
    size_t map, scan = 0;
    if (c->mixer == MIXER_LINEAR && S <= 16) {
        map = diagonal ? SplatBackwardShape<HS, 16, true, true>::bytes : SplatBackwardShape<HS, 16, false, true>::bytes;
        scan = ScanShape<HS, 16>::bytes(2);
    } else if (c->mixer == MIXER_LINEAR) {
        map = diagonal ? SplatBackwardShape<HS, 32, true, true>::bytes : SplatBackwardShape<HS, 32, false, true>::bytes;
        scan = ScanShape<HS, 32>::bytes(2);
    } else if (S <= 32) {
        map =
            diagonal ? SplatBackwardShape<HS, 32, true, false>::bytes : SplatBackwardShape<HS, 32, false, false>::bytes;
    } else {
        map =
            diagonal ? SplatBackwardShape<HS, 64, true, false>::bytes : SplatBackwardShape<HS, 64, false, false>::bytes;
    }
    if (full) map = full_bytes<HS>;
    return map > scan ? map : scan;
}
static size_t shared_memory(const Config *c, int HS, int S) {
    return HS == 32 ? shared_memory<32>(c, S) : HS == 64 ? shared_memory<64>(c, S) : shared_memory<128>(c, S);
}

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
    int n = snprintf(sentence, sizeof sentence,
                     "%d splats in heads of %d channels (--covariance %s) need %zu KiB of shared memory a block, and "
                     "this GPU has %zu; it has enough for",
                     c->S, HS, covariance, CEIL_DIV(shared_memory(c, HS, c->S), (size_t)1024), room / 1024);
    if (splats) n += snprintf(sentence + n, sizeof sentence - (size_t)n, " --splats %d", splats);
    if (heads)
        n += snprintf(sentence + n, sizeof sentence - (size_t)n, "%s heads of %d channels (--heads %d)",
                      splats ? " or" : "", heads, c->C / heads);
    if (!splats && !heads) snprintf(sentence + n, sizeof sentence - (size_t)n, " standard attention only");
    return sentence;
}

static void cuda_memory(const Config *c, int B, size_t bytes[NUM_MEMORY]) {
    Tensor tensors[NUM_TENSORS];
    CudaActivations a;
    const char *wrong = cuda_config_check(c);
    if (!wrong) wrong = cuda_shared_check(c, cuda_device()->sharedMemPerBlockOptin);
    if (wrong) die_usage("%s", wrong);
    if (c->products != PRODUCTS_UNSAID)
        die_usage("--products is of train_gsa's; this program multiplies what it was built for (make PRECISION=...)");
    if ((int64_t)B * c->T > INT32_MAX) die_usage("--batch %d times --seq %d is more than 2^31 tokens", B, c->T);
    size_t total = model_tensors(c, tensors), first[NUM_TENSORS], end[NUM_TENSORS], kept[NUM_TENSORS];
    size_t kept_seconds[NUM_TENSORS], own_seconds;
    size_t own = keep_parts(c, tensors, first, end, kept, kept_seconds, &own_seconds);
    memset(bytes, 0, NUM_MEMORY * sizeof *bytes);
    bytes[MEMORY_PARAMS] = own * sizeof(float) + total * sizeof(floatX);
    bytes[MEMORY_GRADS] = total * sizeof(float);
    bytes[MEMORY_OPTIMISER] = (own + own_seconds) * sizeof(float);
    bytes[MEMORY_WORKSPACE] = 2 * WORKSPACE + (team.narrow || team.shard ? LENT : 0);
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
    char *folder = cache && *cache ? xasprintf("%s/gsa.c", cache)
                   : home && *home ? xasprintf("%s/.cache/gsa.c", home)
                                   : NULL;
    if (!folder) {
        warn("neither XDG_CACHE_HOME nor HOME is set, so matrix products use cuBLASLt's first choice, which may be "
             "slower");
        return NULL;
    }
    make_folder(folder);
    char *path = xasprintf("%s/matmul %s %zu", folder, cuda_device()->name, cublasLtGetVersion());
    for (char *p = path + strlen(folder) + 1; *p; p++)
        if (*p == ' ' || *p == '/') *p = '-';
    free(folder);
    return path;
}

/* The card and the library that choices are for, as the first line of a state file's; static memory. */
static const char *cuda_machine(void) {
    static char machine[400];
    snprintf(machine, sizeof machine, "%.256s, cuBLASLt %zu\n", cuda_device()->name, cublasLtGetVersion());
    return machine;
}

static char *cuda_choices(void *model) {
    char *lines = matmul_choices(&((CudaModel *)model)->matmul), *text = xasprintf("%s%s", cuda_machine(), lines);
    free(lines);
    return text;
}

static void cuda_choose(void *model, const char *choices) {
    CudaModel *m = (CudaModel *)model;
    const char *machine = cuda_machine();
    size_t n = strlen(machine);
    free(m->matmul.given); /* those of the state file, where several ranks agree on the first one's */
    m->matmul.given = NULL;
    if (strncmp(choices, machine, n) == 0) m->matmul.given = xstrdup(choices + n);
    else
        warn("the run was saved on %.*s and goes on with %.*s: its numbers will differ from there in their last digits",
             (int)strcspn(choices, "\n"), choices, (int)n - 1, machine);
}

static void *cuda_create(const Config *c, int B) {
    CudaModel *m = gsa_create_cuda(c, (size_t)B);
    size_t N = (size_t)B * (size_t)c->T;
    m->matmul.tuned[0] = piece_size(N, piece_most);
    m->matmul.tuned[1] = piece_size(N, m->logits_rows);
    if (team_rank() == 0) m->matmul.notes = cuda_notes(); /* others take its choices */
    return m;
}

/* ---------------------------------------------------------------------- main */

#ifndef GSA_NO_MAIN

static Backend cuda_backend(void) {
    Backend b = {};
    b.name = cuda_name;
    b.memory = cuda_memory;
    b.free_memory = cuda_free_memory;
    b.create = cuda_create;
    b.destroy = cuda_destroy;
    b.write = cuda_write;
    b.read = cuda_read;
    b.put = cuda_put;
    b.get = cuda_get;
    b.forward = cuda_forward;
    b.backward = cuda_backward;
    b.zero_gradients = cuda_zero_gradients;
    b.gradient_norms = cuda_gradient_norms;
    b.update = cuda_update;
    b.logits = cuda_logits;
    b.head = cuda_head;
    b.watch = cuda_watch;
    b.peak_flops = cuda_peak_flops;
    b.expect = cuda_expect;
    b.choices = cuda_choices;
    b.choose = cuda_choose;
    b.devices = cuda_devices;
    b.join = cuda_join;
    b.share = cuda_share;
    b.defer = cuda_defer;
    b.result = cuda_result;
    return b;
}

int main(int argc, char **argv) {
    const Backend backend = cuda_backend();
    return train(argc, argv, &backend);
}

#endif
