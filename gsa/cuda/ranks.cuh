/* ---------------------------------------------------------------------- several GPUs

   Sums and copies between the GPUs of a run, by NCCL. The library is loaded when it is needed: a run on one GPU does
   without it, and so does the build, which knows the few declarations below (of NCCL 2: their values never change). */

#include <dlfcn.h>

typedef struct {
    char bytes[128];
} NcclId;
typedef struct NcclConnection *NcclComm;
enum { NCCL_BYTES = 0, NCCL_FP32 = 7, NCCL_BF16 = 9, NCCL_SUM = 0 };

// clang-format off
#define NCCL_FUNCTIONS(X) \
    X(int, GetVersion, (int *version)) \
    X(int, GetUniqueId, (NcclId *id)) \
    X(int, CommInitRank, (NcclComm *comm, int count, NcclId id, int rank)) \
    X(int, AllReduce, (const void *from, void *to, size_t n, int type, int op, NcclComm comm, cudaStream_t stream)) \
    X(int, Broadcast, (const void *from, void *to, size_t n, int type, int root, NcclComm comm, cudaStream_t stream)) \
    X(int, GroupStart, (void)) \
    X(int, GroupEnd, (void)) \
    X(const char *, GetErrorString, (int result)) \
    X(const char *, GetLastError, (NcclComm comm))
// clang-format on
static struct {
#define X(type, name, arguments) type(*name) arguments;
    NCCL_FUNCTIONS(X)
#undef X
} nccl;

/* All GPUs of the run, as this process sees them. */
static struct {
    Ranks *ranks; /* NULL or of count 1: this process is alone */
    bool narrow;  /* gradients are added in bf16 */
    bool shard;   /* each rank keeps its part (ranks_cut) of the master weights and of AdamW's moments */
    NcclComm comm;
    cudaStream_t stream; /* what passes between GPUs, in the same order on all of them */
} team;

static int team_rank(void) { return team.ranks ? team.ranks->rank : 0; }
static int team_count(void) { return team.ranks ? team.ranks->count : 1; }

#define ncclCheck(call) nccl_check((call), __FILE__, __LINE__)
static void nccl_check(int result, const char *file, int line) {
    if (result != 0)
        die("NCCL reports '%s': %s (%s:%d); NCCL_DEBUG=INFO says more", nccl.GetErrorString(result),
            nccl.GetLastError(NULL), file, line);
}

static void load_nccl(void) {
    void *library = dlopen("libnccl.so.2", RTLD_NOW | RTLD_LOCAL);
    if (!library)
        die("several GPUs need NCCL: %s; install it (NVIDIA's package libnccl2, or nvidia-nccl-cu13 of pip) and put "
            "its folder into LD_LIBRARY_PATH",
            dlerror());
#define X(type, name, arguments)                                 \
    nccl.name = (type(*) arguments)dlsym(library, "nccl" #name); \
    if (!nccl.name) die("libnccl.so.2 has no function nccl" #name ": install a newer one");
    NCCL_FUNCTIONS(X)
#undef X
}

static void cuda_join(const Sharing *sharing) {
    Ranks *ranks = sharing->ranks;
    int devices, low, high;
    cudaError_t error = cudaGetDeviceCount(&devices);
    if (error != cudaSuccess || devices == 0)
        die("no NVIDIA GPU answers (%s); train_gsa is the program for the CPU", cudaGetErrorString(error));
    /* where each process is shown one GPU only, it is that */
    int device = devices == 1 ? 0 : ranks->local;
    if (device >= devices)
        die("process %d of this machine has no GPU: %d answer (CUDA_VISIBLE_DEVICES may hide some)", ranks->local,
            devices);
    cudaCheck(cudaSetDevice(device));
    team.ranks = ranks;
    if (ranks->count == 1) return;
    team.narrow = sharing->narrow;
    team.shard = sharing->shard;
    NcclId id = {};
    load_nccl();
    if (ranks->rank == 0) ncclCheck(nccl.GetUniqueId(&id));
    ranks_broadcast(ranks, &id, sizeof id, 0);
    ncclCheck(nccl.CommInitRank(&team.comm, ranks->count, id, ranks->rank));
    /* sums go before what the GPU computes meanwhile, which can wait */
    cudaCheck(cudaDeviceGetStreamPriorityRange(&low, &high));
    cudaCheck(cudaStreamCreateWithPriority(&team.stream, cudaStreamNonBlocking, high));
    /* connects them, before free memory is asked for */
    float *number;
    cudaCheck(cudaMalloc(&number, sizeof *number));
    cudaCheck(cudaMemsetAsync(number, 0, sizeof *number, team.stream));
    ncclCheck(nccl.AllReduce(number, number, 1, NCCL_FP32, NCCL_SUM, team.comm, team.stream));
    cudaCheck(cudaStreamSynchronize(team.stream));
    cudaCheck(cudaFree(number));
}

/* 8 numbers a thread, n a multiple of 8 */
__global__ static void narrow_kernel(__nv_bfloat162 *to, const float *from, size_t n) {
    size_t i = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * 8;
    if (i >= n) return;
    const float2 *pairs = (const float2 *)(from + i);
    for (int k = 0; k < 4; k++) to[i / 2 + k] = __float22bfloat162_rn(pairs[k]);
}
__global__ static void widen_kernel(float *to, const __nv_bfloat162 *from, size_t n) {
    size_t i = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * 8;
    if (i >= n) return;
    float2 *pairs = (float2 *)(to + i);
    for (int k = 0; k < 4; k++) pairs[k] = __bfloat1622float2(from[i / 2 + k]);
}

/* Of a flat buffer, count numbers from `first` on, both multiples of 8. */
typedef struct {
    size_t first, count;
} Range;

enum { LENT = 64 << 20 }; /* bytes of the room through which rounded gradients go, and what is shared out */

/* Adds the ranges of grads to those of all other ranks, as fp32: in place. */
static void sum_wide(float *grads, const Range *ranges, int count) {
    ncclCheck(nccl.GroupStart());
    for (int i = 0; i < count; i++) {
        float *at = grads + ranges[i].first;
        ncclCheck(nccl.AllReduce(at, at, ranges[i].count, NCCL_FP32, NCCL_SUM, team.comm, team.stream));
    }
    ncclCheck(nccl.GroupEnd());
}

/* The same, rounded to bf16 before each addition; as many ranges at once as fit into piece (LENT bytes). */
static void sum_narrow(float *grads, void *piece, const Range *ranges, int count) {
    enum { MOST = 16 };
    __nv_bfloat162 *pairs = (__nv_bfloat162 *)piece;
    size_t within = 0;
    for (int i = 0; i < count;) {
        Range parts[MOST];
        int n = 0;
        size_t at = 0;
        while (i < count && n < MOST && at < LENT / 2) {
            size_t left = ranges[i].count - within, take = left < LENT / 2 - at ? left : LENT / 2 - at;
            parts[n] = {ranges[i].first + within, take};
            narrow_kernel<<<(unsigned)CEIL_DIV(take, 2048), 256, 0, team.stream>>>(pairs + at / 2,
                                                                                   grads + parts[n].first, take);
            n++;
            at += take;
            within += take;
            if (within < ranges[i].count) continue;
            i++;
            within = 0;
        }
        ncclCheck(nccl.AllReduce(piece, piece, at, NCCL_BF16, NCCL_SUM, team.comm, team.stream));
        at = 0;
        for (int k = 0; k < n; at += parts[k++].count)
            widen_kernel<<<(unsigned)CEIL_DIV(parts[k].count, 2048), 256, 0, team.stream>>>(
                grads + parts[k].first, pairs + at / 2, parts[k].count);
        cudaCheck(cudaGetLastError());
    }
}
