/* ---------------------------------------------------------------------- attention

   The softmax mixer, equation (4), for standard and GSA heads alike, without a T x T matrix; its gradients: MODEL.md
   3.1. A score is f_q . f_k, a logit is scale times a score. */

/* C = NH HS; pointers are 16-byte aligned. */
struct AttentionInput {
    const floatX *qkv;        /* (B, T, 3C): q, k, v of all heads; head h at column h HS of each third */
    const floatX *features;   /* (B, T, 2C): f_q, f_k of the heads that have a feature map; NULL if none has */
    const int *from_features; /* (NH): 1 if head h takes its q and k from features; NULL: no head does */
    const float *scale;       /* (NH), > 0 */
    /* (NH): number of keys a query sees, itself included; >= T for all; 0 leaves the head out */
    const int *window;
    bool causal; /* query i sees keys i - window < j <= i, else |i - j| < window */
    /* forget gates: c and, where rounding to fp32 must not tell, what forget_local makes of it; all NULL: no head has
       one */
    const double *forget;      /* (B, gates, T) */
    const float *forget_local; /* (B, gates, forget_row(T)) */
    const int *gate;           /* (NH): which of the gates is head h's; -1: none */
    int gates;
    float *dforget; /* (B, gates, T): dc, which the backward pass overwrites */
};

/* The gate of one head of one sequence; c NULL: none. */
struct AttentionGate {
    const double *c;
    const float *local;
    float *dc;
};

__device__ static inline AttentionGate attention_gate(const AttentionInput &in, size_t b, size_t h, size_t T) {
    if (!in.forget || in.gate[h] < 0) return {NULL, NULL, NULL};
    size_t row = b * in.gates + in.gate[h];
    return {in.forget + row * T, in.forget_local + row * forget_row(T), in.dforget + row * T};
}

#ifdef GSA_FP32

/* The checking build: the plainest kernels, one warp a query or a key. */

/* where q of head h stands at token t of sequence b, k being C further on; stride: from token to token, 2C or 3C */
__device__ static inline size_t attention_at(const AttentionInput &in, size_t b, size_t t, size_t h, size_t T, size_t C,
                                             size_t HS, size_t *stride) {
    *stride = in.from_features && in.from_features[h] ? 2 * C : 3 * C;
    return (b * T + t) * *stride + h * HS;
}

template <int HS>
__global__ static void attention_forward_kernel(floatX *out, float *lse, AttentionInput in, size_t B, size_t T,
                                                size_t NH) {
    size_t row = (size_t)blockIdx.x * 4 + threadIdx.x / 32, h = row / T % NH, b = row / T / NH, i = row % T,
           C = NH * HS, stride;
    if (row >= B * NH * T || in.window[h] < 1) return;
    int lane = threadIdx.x % 32;
    size_t at = attention_at(in, b, 0, h, T, C, HS, &stride), window = (size_t)in.window[h];
    const floatX *q = (stride == 2 * C ? in.features : in.qkv) + at, *k = q + C,
                 *v = in.qkv + b * T * 3 * C + 2 * C + h * HS;
    AttentionGate gate = attention_gate(in, b, h, T);
    float most = -INFINITY, sum = 0, o[HS / 32] = {};
    size_t end = in.causal ? i + 1 : i + window < T ? i + window : T;
    for (size_t j0 = i < window ? 0 : i - window + 1; j0 < end; j0 += 32) {
        size_t j = j0 + lane;
        float z = -INFINITY;
        if (j < end) {
            z = 0;
            for (int e = 0; e < HS; e++) z += q[i * stride + e] * k[j * stride + e];
            z *= in.scale[h];
            if (gate.c) z += (float)(gate.c[i] - gate.c[j]);
        }
        float higher = fmaxf(most, warp_max(z)), weight = expf(z - higher), keep = expf(most - higher);
        sum = sum * keep + warp_sum(weight);
        most = higher;
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
__global__ static void attention_backward_kernel(floatX *dqkv, floatX *dfeatures, float *delta, const floatX *dout,
                                                 const floatX *out, const float *lse, AttentionInput in, size_t B,
                                                 size_t T, size_t NH) {
    size_t row = (size_t)blockIdx.x * 4 + threadIdx.x / 32, h = row / T % NH, b = row / T / NH, mine = row % T,
           C = NH * HS, stride;
    if (row >= B * NH * T || in.window[h] < 1) return;
    int lane = threadIdx.x % 32;
    size_t at = attention_at(in, b, 0, h, T, C, HS, &stride), window = (size_t)in.window[h];
    const floatX *q = (stride == 2 * C ? in.features : in.qkv) + at, *k = q + C,
                 *v = in.qkv + b * T * 3 * C + 2 * C + h * HS, *d = dout + b * T * C + h * HS;
    floatX *dq = (stride == 2 * C ? dfeatures : dqkv) + at;
    const float *row_lse = lse + row - mine;
    float *row_delta = delta + row - mine, first[HS / 32] = {}, second[HS / 32] = {}, gate_sum = 0;
    AttentionGate gate = attention_gate(in, b, h, T);
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
            for (int e = 0; e < HS; e++) {
                z += q[i * stride + e] * k[j * stride + e];
                dweight += d[i * C + e] * v[j * 3 * C + e];
            }
            z *= in.scale[h];
            if (gate.c) z += (float)(gate.c[i] - gate.c[j]);
            weight = expf(z - row_lse[i]);
            dz = in.scale[h] * weight * (dweight - row_delta[i]);
            gate_sum += weight * (dweight - row_delta[i]);
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
    if (!gate.c) return;
    gate_sum = warp_sum(gate_sum); /* dc: sums of dz over a query's keys, less those over a key's queries */
    if (lane == 0) gate.dc[mine] = QUERIES ? gate_sum : gate.dc[mine] - gate_sum;
}

/* out (B, T, C), lse (B, NH, T) */
static void attention_forward(floatX *out, float *lse, AttentionInput in, size_t B, size_t T, size_t NH, size_t HS,
                              cudaStream_t stream) {
    BY_HEAD_SIZE(HS,
                 (attention_forward_kernel<H><<<CEIL_DIV(B * NH * T, 4), 128, 0, stream>>>(out, lse, in, B, T, NH)));
}

/* Overwrites dv in dqkv, and dq, dk where the head's q, k came from, and in.dforget. delta (B, NH, T): scratch */
static void attention_backward(floatX *dqkv, floatX *dfeatures, float *delta, const floatX *dout, const floatX *out,
                               const float *lse, AttentionInput in, size_t B, size_t T, size_t NH, size_t HS,
                               cudaStream_t stream) {
    BY_HEAD_SIZE(HS, (attention_backward_kernel<H, true><<<CEIL_DIV(B * NH * T, 4), 128, 0, stream>>>(
                         dqkv, dfeatures, delta, dout, out, lse, in, B, T, NH)));
    BY_HEAD_SIZE(HS, (attention_backward_kernel<H, false><<<CEIL_DIV(B * NH * T, 4), 128, 0, stream>>>(
                         dqkv, dfeatures, delta, dout, out, lse, in, B, T, NH)));
}

#else

/* In bf16. Overwrites like the plain kernels above; delta (B, NH, T) is written, unless out is NULL: then it is read.
   Logits of 100 and more are fine: fp32 scores, base-2 exponentials with the scale folded in, fp32 lse.

   The kernels differ from the textbook in two places:
   - The running maximum of the forward pass moves only where a logit exceeds it by more than 8 in base 2. Until then
     weights are at most 2^8 = 256 instead of 1, which neither fp32 sums nor bf16's 8 exponent bits mind, and the output
     so far need not be rescaled.
   - The backward pass runs twice over the scores, once per block of queries (dq) and once per block of keys (dk, dv).
     That is 7 products instead of 5, but no block adds to another's sums, so their order is fixed (MODEL.md 5). Both
     passes are one kernel text: see below. */

/* ---- one head, one tile

   A tile is some rows of one head in shared memory, HS bf16 each, in 16-byte chunks. Chunk c of a row is kept at
   place c ^ row mod 8, so that the same chunk of 8 consecutive rows (what the tensor cores read) lies in 8 different
   groups of banks. For HS = 64 this is the 128-byte swizzle of the bulk copy engine, for HS = 32 its 64-byte one. */

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
template <int HS>
__device__ inline void load_tile(uint32_t tile, const bf16 *in, size_t stride, int first, int rows, int T) {
    for (int n = threadIdx.x; n < rows * (HS / 8); n += blockDim.x) {
        int row = n / (HS / 8), c = n % (HS / 8), token = first + row;
        copy_async(tile + chunk_at<HS>(row, c), in + (token < T ? token : 0) * stride + c * 8, token < T);
    }
}

/* ---- a warp's 16 rows

   x[N][4] is what a thread holds of 16 rows and 8 N columns of sums, in the tensor cores' own layout: in the n-th
   eight of columns it has columns 8n + 2 (lane % 4) + {0, 1} of row lane / 4 as x[n][0..1], and those of row lane / 4
   + 8 as x[n][2..3]. The 64 rows of a wgmma product are four of these, one a warp, so everything in this part serves
   both kinds of kernels. */

/* Sets to -inf what a query does not see; rows are queries and columns keys, or the reverse for KEYS. (What keys
   from T on get there is never stored.) */
template <bool KEYS, int N>
__device__ inline void hide(float (&s)[N][4], int row0, int column0, int behind, int ahead, int T) {
    int lane = threadIdx.x % 32;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        /* columns low .. high from origin are seen */
        int row = row0 + lane / 4 + 8 * r, origin = column0 + lane % 4 * 2;
        int low = row - (KEYS ? ahead : behind) - origin,
            high = (KEYS ? row + behind : min(row + ahead, T - 1)) - origin;
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

/* Gated heads, rows queries: adds c_i0 - c_j to the logits of keys j0 and on, as scores; inverse: 1 / scale; start:
   c_i0 less c of the tile that the keys lie in; local: gate.local from key j0 on. What c_i differs from c_i0, that of
   the block's first row, is the same for all keys of a row: it belongs to the lse. */
template <int N> __device__ inline void forget_keys(float (&s)[N][4], float start, const float *local, float inverse) {
    local += threadIdx.x % 4 * 2;
    start *= inverse;
#pragma unroll
    for (int n = 0; n < N; n++) {
        float2 d = *(const float2 *)(local + 8 * n);
        d.x = d.x * inverse + start;
        d.y = d.y * inverse + start;
        s[n][0] += d.x;
        s[n][1] += d.y;
        s[n][2] += d.x;
        s[n][3] += d.y;
    }
}
__device__ inline float forget_start(const AttentionGate &gate, double c_i0, int j0) {
    return gate.c ? (float)(c_i0 - gate.c[j0 / FORGET_TILE * FORGET_TILE]) : 0;
}

/* c of query i less that of row0: what forget_keys left to the lse; in the backward pass row0 may be a key */
__device__ inline float forget_rest(const AttentionGate &gate, int i, int row0) {
    return gate.c ? (float)(gate.c[i] - gate.c[row0]) : 0;
}

/* Scores s become weights 2^(scale2 s - m), where m is the row's running maximum as described above, in base 2. True if
   some row of the warp moved its m: then the caller multiplies the output that it has summed up so far by factor. m
   and sum belong to the thread's two rows; sum has only the thread's own columns until the end. */
template <int N>
__device__ inline bool online_softmax(float (&s)[N][4], float (&m)[2], float (&sum)[2], float (&factor)[2],
                                      float scale2) {
    bool moved = false;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float most = -INFINITY;
#pragma unroll
        for (int n = 0; n < N; n++) most = fmaxf(most, fmaxf(s[n][2 * r], s[n][2 * r + 1]));
        most = quad_max(most) * scale2;
        /* a row may see nothing of its first tiles */
        float next = most > m[r] + 8 ? most : m[r], offset = next == -INFINITY ? 0 : next;
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

/* sums as the left operand of the next product, rounded to bf16: register 2 (n % 2) + r of operand n / 2 holds the
   thread's two columns of the n-th eight in its row r */
template <int N> __device__ inline void as_operands(uint32_t (&a)[N / 2][4], const float (&x)[N][4]) {
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
        for (int r = 0; r < 2; r++) a[n / 2][n % 2 * 2 + r] = pack(x[n][2 * r], x[n][2 * r + 1]);
}

/* 16 rows, times a factor each, to out from token row0 on, 16 bytes a thread by way of the warp's own 16 rows of a
   tile */
template <int HS>
__device__ inline void store_rows(bf16 *out, size_t stride, int row0, int T, float (&x)[HS / 8][4], float factor0,
                                  float factor1, uint32_t tile, int tile_row) {
    int lane = threadIdx.x % 32, row = tile_row + lane / 4;
    __syncwarp(); /* the warp has read what was there */
#pragma unroll
    for (int n = 0; n < HS / 8; n++) {
        asm volatile("st.shared.b32 [%0], %1;" ::"r"(tile + chunk_at<HS>(row, n) + lane % 4 * 4),
                     "r"(pack(x[n][0] * factor0, x[n][1] * factor0))
                     : "memory");
        asm volatile("st.shared.b32 [%0], %1;" ::"r"(tile + chunk_at<HS>(row + 8, n) + lane % 4 * 4),
                     "r"(pack(x[n][2] * factor1, x[n][3] * factor1))
                     : "memory");
    }
    __syncwarp();
    for (int n = lane; n < 16 * (HS / 8); n += 32) {
        int r = n / (HS / 8), c = n % (HS / 8);
        uint4 v;
        asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                     : "r"(tile + chunk_at<HS>(tile_row + r, c))
                     : "memory");
        if (row0 + r < T) *(uint4 *)(out + (row0 + r) * stride + c * 8) = v;
    }
}

/* ---- mma.sync, any card since sm_80 */

/* d (16, 8) += a (16, 16) b (16, 8) */
__device__ inline void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/* s[m] = rows a_row + 16m .. of tile a, times rows b_row .. b_row + 8N - 1 of tile b transposed */
template <int HS, int M, int N>
__device__ inline void product_rows(float (&s)[M][N][4], uint32_t a, int a_row, uint32_t b, int b_row) {
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
        for (int m = 0; m < M; m++)
            load_matrices<false>(x[m], a + chunk_at<HS>(a_row + 16 * m + lane % 16, 2 * k + lane / 16));
#pragma unroll
        for (int n = 0; n < N; n += 2) {
            load_matrices<false>(y, b + chunk_at<HS>(b_row + 8 * n + lane % 8 + lane / 16 * 8, 2 * k + lane / 8 % 2));
#pragma unroll
            for (int m = 0; m < M; m++) {
                mma(s[m][n], x[m], y[0], y[1]);
                mma(s[m][n + 1], x[m], y[2], y[3]);
            }
        }
    }
}

/* o[m] += a[m] (16, 8N) times rows b_row .. b_row + 8N - 1 of tile b */
template <int HS, int M, int N>
__device__ inline void product_columns(float (&o)[M][HS / 8][4], const uint32_t (&a)[M][N / 2][4], uint32_t b,
                                       int b_row) {
    int lane = threadIdx.x % 32;
#pragma unroll
    for (int k = 0; k < N / 2; k++)
#pragma unroll
        for (int n = 0; n < HS / 8; n += 2) {
            uint32_t y[4];
            load_matrices<true>(y, b + chunk_at<HS>(b_row + 16 * k + lane % 16, n + lane / 16));
#pragma unroll
            for (int m = 0; m < M; m++) {
                mma(o[m][n], a[m][k], y[0], y[1]);
                mma(o[m][n + 1], a[m][k], y[2], y[3]);
            }
        }
}

/* A block of threads of 4 warps owns 128 queries of one head, a warp 32 of them. Keys and values come through two
   stages of shared memory: one is filled while the other is used. Two tiles of 16 queries a warp (M = 2) halve what is
   read of keys from shared memory, which limits this kernel. All blocks of a head are neighbours in the grid, so that
   its keys stay in the L2 cache; the last blocks, which see the most keys, start first. */
template <int HS, bool GATED>
__global__ void __launch_bounds__(128) attention_forward_mma(bf16 *out, float *lse, AttentionInput in, int T, int NH) {
    constexpr int M = 2, ROWS = 64 * M, KEYS = HS == 128 ? 32 : 64, TILE = KEYS * HS * 2;
    /* queries (ROWS, HS), then two stages of keys and values (KEYS, HS) each */
    extern __shared__ __align__(1024) char memory[];
    int blocks = (T + ROWS - 1) / ROWS, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    size_t bh = blockIdx.x / blocks, b = bh / NH;
    int h = bh % NH, i0 = (blocks - 1 - blockIdx.x % blocks) * ROWS, row0 = i0 + warp * 16 * M;
    AttentionHead head = attention_head(in, b, h, T, NH, HS);
    if (head.behind < 0) return;
    int behind = head.behind, ahead = head.ahead, first = max(0, i0 - behind) / KEYS * KEYS,
        end = min(T, i0 + ROWS + ahead);
    uint32_t q_tile = shared_address(memory), stages = q_tile + ROWS * HS * 2;
    float scale2 = head.scale * ATTENTION_LOG2E;
    AttentionGate gate = {};
    if (GATED) gate = attention_gate(in, b, h, T);

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
        if (GATED && gate.c)
#pragma unroll
            for (int m = 0; m < M; m++)
                forget_keys(s[m], forget_start(gate, gate.c[i0], j0), gate.local + j0, 1 / head.scale);
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
            if (lane % 4 == 0 && i < T)
                lse[bh * T + i] = (m_row[m][r] + log2f(total[r])) / ATTENTION_LOG2E + forget_rest(gate, i, i0);
        }
        store_rows<HS>(out + b * T * C + (size_t)h * HS, C, row0 + 16 * m, T, o[m], 1 / total[0], 1 / total[1], q_tile,
                       (warp * M + m) * 16);
    }
}

/* Backward. One text for both passes: a block of threads owns some rows, and all columns come past it.
     KEYS false: rows are queries (q, do), columns keys (k, v):  dq += ds k
     KEYS true:  rows are keys (k, v), columns queries (q, do):  dk += ds^T q, dv += p^T do
   Either way the scores are products of the first of each pair, q and k, and do . v those of the second, do and v. ds
   is dz of MODEL.md 3.1 without the scale, which multiplies the sums at the end. */

/* Entry by entry on 16 rows: weights p = exp(logit - lse) from scores, then ds = p (do . v - delta), both ready to be
   left operands of a product. lse2 (base 2) and delta belong to queries: to the thread's two rows, or where rows are
   KEYS to columns, in shared memory from the tile's first column on. ds uses p as rounded to bf16, which is at hand.
   GATED: sum gets the sums of ds of the thread's two rows, of its own columns. */
template <bool KEYS, int N>
__device__ inline void weights(uint32_t (&p)[N / 2][4], const float (&s)[N][4], float scale2, const float (&lse2)[2],
                               const float *lse2_columns) {
#pragma unroll
    for (int n = 0; n < N; n++) {
        float2 l = KEYS ? *(const float2 *)(lse2_columns + 8 * n + threadIdx.x % 4 * 2) : make_float2(0, 0);
#pragma unroll
        for (int r = 0; r < 2; r++)
            p[n / 2][n % 2 * 2 + r] = pack(exp2_fast(s[n][2 * r] * scale2 - (KEYS ? l.x : lse2[r])),
                                           exp2_fast(s[n][2 * r + 1] * scale2 - (KEYS ? l.y : lse2[r])));
    }
}
template <bool KEYS, bool GATED, int N>
__device__ inline void score_gradients(uint32_t (&ds)[N / 2][4], const float (&dp)[N][4], const uint32_t (&p)[N / 2][4],
                                       const float (&delta)[2], const float *delta_columns, float (&sum)[2]) {
#pragma unroll
    for (int n = 0; n < N; n++) {
        float2 d = KEYS ? *(const float2 *)(delta_columns + 8 * n + threadIdx.x % 4 * 2) : make_float2(0, 0);
#pragma unroll
        for (int r = 0; r < 2; r++) {
            uint32_t both = p[n / 2][n % 2 * 2 + r]; /* two bf16; each is the upper half of a float */
            float first = __uint_as_float(both << 16) * (dp[n][2 * r] - (KEYS ? d.x : delta[r])),
                  second = __uint_as_float(both & 0xFFFF0000) * (dp[n][2 * r + 1] - (KEYS ? d.y : delta[r]));
            ds[n / 2][n % 2 * 2 + r] = pack(first, second);
            if (GATED) sum[r] += first + second;
        }
    }
}

/* delta of queries i0 .. i0 + rows - 1 of head bh to shared memory, computed and saved if out is given, otherwise
   read */
template <int HS>
__device__ inline void row_deltas(float *shared_delta, float *delta, const bf16 *dout, const bf16 *out, size_t stride,
                                  int i0, int rows, int T) {
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

/* What thread t of 128 keeps of the queries from i0 on: t < 64: lse of query i0 + t in base 2; else delta of query
   i0 + t - 64. Zeros from T on: q and do are zeros there, so ds is zero. Gated: the lse of logits with c of key j0 in
   place of c_i. */
__device__ inline float column_statistic(const float *lse, const float *delta, const AttentionGate &gate, int j0,
                                         int i0, int T) {
    int i = i0 + threadIdx.x % 64;
    return i >= T ? 0 : threadIdx.x < 64 ? (lse[i] - forget_rest(gate, i, j0)) * ATTENTION_LOG2E : delta[i];
}

/* Gated heads, rows keys: c_r0 - c_j of the thread's two rows, as scores, and added to those. */
__device__ inline void forget_own(float (&own)[2], const AttentionGate &gate, int r0, int row0, float inverse, int T) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
        int j = row0 + threadIdx.x % 32 / 4 + 8 * r;
        own[r] = j < T ? -forget_rest(gate, j, r0) * inverse : 0;
    }
}
template <int N> __device__ inline void forget_add(float (&s)[N][4], const float (&own)[2]) {
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) s[n][e] += own[e / 2];
}

/* dc from the sums of ds of a thread's rows: queries first, then keys. Those of a query would be zero without rounding,
   as its weights sum to 1. They are taken all the same: in the sum of dc from t on every pair of tokens behind t counts
   once with either sign and leaves nothing, which holds for rounded ds too. */
template <bool KEYS>
__device__ inline void forget_store(const AttentionGate &gate, const float (&sum)[2], int row0, int T) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
        int t = row0 + threadIdx.x % 32 / 4 + 8 * r;
        float all = quad_sum(sum[r]);
        if (threadIdx.x % 4 == 0 && t < T) gate.dc[t] = KEYS ? gate.dc[t] - all : all;
    }
}

/* where a head's dq, dk, dv (part 0, 1, 2) go, from token 0 on */
__device__ inline bf16 *gradient_of(bf16 *dqkv, bf16 *dfeatures, const AttentionHead &head, size_t b, int h, int part,
                                    int T, int NH, int HS) {
    size_t C = (size_t)NH * HS;
    bf16 *base = part < 2 && head.from_features ? dfeatures + b * T * 2 * C : dqkv + b * T * 3 * C;
    return base + part * C + (size_t)h * HS;
}

template <int HS, bool KEYS, bool GATED>
__global__ void __launch_bounds__(128)
    attention_backward_mma(bf16 *dqkv, bf16 *dfeatures, float *delta, const bf16 *dout, const bf16 *out,
                           const float *lse, AttentionInput in, int T, int NH) {
    /* 16 M rows a warp; N * 8 columns at a time, so that scores and sums fit the registers */
    constexpr int M = HS == 128 ? 1 : 2, N = HS == 32 ? 8 : 4, ROWS = 64 * M, COLUMNS = ATTENTION_BLOCK,
                  TILE = COLUMNS * HS * 2;
    /* two tiles (ROWS, HS), two stages of two tiles (COLUMNS, HS), lse and delta */
    extern __shared__ __align__(1024) char memory[];
    int blocks = (T + ROWS - 1) / ROWS, warp = threadIdx.x / 32, lane = threadIdx.x % 32, block = blockIdx.x % blocks;
    size_t bh = blockIdx.x / blocks, b = bh / NH, C = (size_t)NH * HS;
    /* the longest rows first */
    int h = bh % NH, r0 = (KEYS ? block : blocks - 1 - block) * ROWS, row0 = r0 + warp * 16 * M;
    AttentionHead head = attention_head(in, b, h, T, NH, HS);
    if (head.behind < 0) return;
    int behind = head.behind, ahead = head.ahead, before = KEYS ? ahead : behind, after = KEYS ? behind : ahead;
    int first = max(0, r0 - before) / COLUMNS * COLUMNS, end = min(T, r0 + ROWS + after);
    const bf16 *dout_h = dout + b * T * C + (size_t)h * HS;
    const bf16 *rows1 = KEYS ? head.k : head.q, *rows2 = KEYS ? head.v : dout_h, *columns1 = KEYS ? head.q : head.k,
               *columns2 = KEYS ? dout_h : head.v;
    size_t rows2_stride = KEYS ? head.v_stride : C, columns2_stride = KEYS ? C : head.v_stride;
    uint32_t tile1 = shared_address(memory), tile2 = tile1 + ROWS * HS * 2, stages = tile2 + ROWS * HS * 2;
    /* KEYS: lse, delta of a stage's columns; else delta of the rows */
    float *statistics = (float *)(memory + 2 * ROWS * HS * 2 + 4 * TILE);
    float scale2 = head.scale * ATTENTION_LOG2E;
    AttentionGate gate = {};
    if (GATED) gate = attention_gate(in, b, h, T);
    lse += bh * T;
    delta += bh * T;

    auto load_columns = [&](int c0, int stage) {
        load_tile<HS>(stages + stage * 2 * TILE, columns1, head.qk_stride, c0, COLUMNS, T);
        load_tile<HS>(stages + stage * 2 * TILE + TILE, columns2, columns2_stride, c0, COLUMNS, T);
        copy_commit();
        if (KEYS) statistics[stage * 2 * COLUMNS + threadIdx.x] = column_statistic(lse, delta, gate, r0, c0, T);
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
                lse2[m][r] = r0 + row < T ? (lse[r0 + row] - forget_rest(gate, r0 + row, r0)) * ATTENTION_LOG2E : 0;
                delta_row[m][r] = statistics[row];
            }
    }

    float sum1[M][HS / 8][4] = {}, sum2[M][HS / 8][4] = {}; /* dq, or dk and dv */
    float gate_sum[M][2] = {}, own[M][2] = {};
#pragma unroll
    for (int m = 0; m < M && GATED && KEYS; m++) forget_own(own[m], gate, r0, row0 + 16 * m, 1 / head.scale, T);
    for (int c0 = first, stage = 0; c0 < end; c0 += COLUMNS, stage ^= 1) {
        copy_wait();
        __syncthreads();
        if (c0 + COLUMNS < end) load_columns(c0 + COLUMNS, stage ^ 1);
        uint32_t stage1 = stages + stage * 2 * TILE, stage2 = stage1 + TILE;
#pragma unroll 1
        for (int part = 0; part < COLUMNS; part += 8 * N) {
            int column0 = c0 + part, i0 = KEYS ? column0 : row0, ni = KEYS ? 8 * N : 16 * M, j0 = KEYS ? row0 : column0,
                nj = KEYS ? 16 * M : 8 * N;
            if (!sees_any(i0, ni, j0, nj, behind, ahead)) continue;
            float s[M][N][4], dp[M][N][4];
            uint32_t p[M][N / 2][4], ds[M][N / 2][4];
            product_rows<HS, M, N>(s, tile1, warp * 16 * M, stage1, part);
            product_rows<HS, M, N>(dp, tile2, warp * 16 * M, stage2, part);
            if (GATED && gate.c)
#pragma unroll
                for (int m = 0; m < M; m++) {
                    if (KEYS) forget_add(s[m], own[m]);
                    else
                        forget_keys(s[m], forget_start(gate, gate.c[r0], column0), gate.local + column0,
                                    1 / head.scale);
                }
            if (!sees_all(i0, ni, j0, nj, behind, ahead, T))
#pragma unroll
                for (int m = 0; m < M; m++) hide<KEYS>(s[m], row0 + 16 * m, column0, behind, ahead, T);
            const float *lse_columns = statistics + stage * 2 * COLUMNS + part;
#pragma unroll
            for (int m = 0; m < M; m++) {
                weights<KEYS>(p[m], s[m], scale2, lse2[m], lse_columns);
                score_gradients<KEYS, GATED>(ds[m], dp[m], p[m], delta_row[m], lse_columns + COLUMNS, gate_sum[m]);
            }
            product_columns<HS, M, N>(sum1, ds, stage1, part);
            if (KEYS) product_columns<HS, M, N>(sum2, p, stage2, part);
        }
    }
    bf16 *d1 = gradient_of(dqkv, dfeatures, head, b, h, KEYS ? 1 : 0, T, NH, HS),
         *d2 = gradient_of(dqkv, dfeatures, head, b, h, 2, T, NH, HS);
#pragma unroll
    for (int m = 0; m < M; m++) {
        if (GATED && gate.c) forget_store<KEYS>(gate, gate_sum[m], row0 + 16 * m, T);
        store_rows<HS>(d1, head.qk_stride, row0 + 16 * m, T, sum1[m], head.scale, head.scale, tile1,
                       (warp * M + m) * 16);
        if (KEYS) store_rows<HS>(d2, head.v_stride, row0 + 16 * m, T, sum2[m], 1, 1, tile2, (warp * M + m) * 16);
    }
}

/* ---- wgmma and bulk copies, sm_90a, HS = 64

   The same two kernels for Hopper. A warpgroup of 4 warps owns 64 rows and multiplies with wgmma straight from the
   tiles, which the bulk copy engine fills (zeros from T on). While one warpgroup of a multiprocessor computes
   exponentials, others keep the tensor cores busy. There is no other overlap, and registers are limited so that it
   happens: 4 warpgroups a multiprocessor with up to 128 registers a thread, or 3 with up to 168.

   Measured on one H100 (80 GB HBM3), 64 sequences of 1,024 tokens, 12 heads of 64, causal, ms, medians of 30 (once the
   card is warm and at its power limit everything takes up to 8 % longer):
                             forward   backward
       wgmma                   0.307      0.836    (dq 0.38, dk and dv 0.46)
       mma.sync                0.515      1.57
       PyTorch 2.11, cuDNN     0.293      1.084
       PyTorch 2.11, FA2       0.466      1.72
   No unit is saturated: tensor cores and exponentials are each busy half of the time, and take turns within a
   warpgroup. Starting and ending a block of threads costs about 2.5 of 13 us in the forward pass: at T = 4096 it
   reaches 420 TFLOP/s instead of 335. Tried without gain:
   - Forward: starting the product of the next scores before that with the values (0.327); that with the two warpgroups
     of a block taking turns at the tensor cores by named barriers (0.340); 5 or 6 stages (the same); in one block of
     threads queries with few keys and then queries with many (0.318, and slower at T = 4096).
   - Backward: starting the products for scores and do . v at once (dq 0.408 with 3 blocks a multiprocessor, dk and dv
     0.593 with 2); the next scores before the last product (dq 0.420, dk and dv 0.465); 3 stages instead of 2 (the
     same). */

#define TILE64 (64 * 64 * 2) /* bytes of a tile: 64 rows of 64 */

struct AttentionMaps { /* of qkv (B, T, 3C), features (B, T, 2C), dout (B, T, C); copied in boxes of 64 tokens x 64 */
    CUtensorMap qkv, features, dout;
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
static __device__ int attention_has_wgmma = 1;

__device__ inline void barrier_init(uint32_t barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
__device__ inline void barrier_arrive(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
/* arrives, and lets the barrier wait for so many copied bytes too */
__device__ inline void barrier_expect(uint32_t barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
/* waits for the end of the phase with this parity: 0 for the first, 1 for the second, and so on */
__device__ inline void barrier_wait(uint32_t barrier, int parity) {
    asm volatile(
        "{\n.reg .pred done;\nagain: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra again;\n}" ::
            "r"(barrier),
        "r"(parity)
        : "memory");
}
/* 64 columns of tokens t .. t + 63 of sequence b to a tile; the bytes count for the barrier */
__device__ inline void copy_tile(uint32_t tile, const CUtensorMap *map, int column, int t, int b, uint32_t barrier) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], [%5];" ::
            "r"(tile),
        "l"(map), "r"(column), "r"(t), "r"(b), "r"(barrier)
        : "memory");
}
/* so many bytes, a multiple of 16, to shared memory; they count for the barrier */
__device__ inline void copy_numbers(uint32_t to, const float *from, int bytes, uint32_t barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
                 "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(barrier)
                 : "memory");
}

/* A tile as wgmma wants it described: its address in units of 16 bytes, 1,024 bytes from 8 rows to the next 8, and the
   128-byte swizzle. Plus 2: 16 columns further on; plus 128: 16 rows further on. */
__device__ inline uint64_t wgmma_tile(uint32_t tile) {
    return (uint64_t)(tile >> 4) | 1ull << 16 | 64ull << 32 | 1ull << 62;
}
__device__ inline void wgmma_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

/* the 32 sums of a thread as operands of an asm statement: read and written (ALL32), only written (NEW32), by number */
#define ROW4(x, n) "+f"(x[n][0]), "+f"(x[n][1]), "+f"(x[n][2]), "+f"(x[n][3])
#define ALL32(x) ROW4(x, 0), ROW4(x, 1), ROW4(x, 2), ROW4(x, 3), ROW4(x, 4), ROW4(x, 5), ROW4(x, 6), ROW4(x, 7)
#define NEW4(x, n) "=f"(x[n][0]), "=f"(x[n][1]), "=f"(x[n][2]), "=f"(x[n][3])
#define NEW32(x) NEW4(x, 0), NEW4(x, 1), NEW4(x, 2), NEW4(x, 3), NEW4(x, 4), NEW4(x, 5), NEW4(x, 6), NEW4(x, 7)
#define OUT32                                                                                                         \
    "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, " \
    "%24, %25, %26, %27, %28, %29, %30, %31}"

/* Waits until at most PENDING groups of products are under way. x is what the caller reads next: the second statement
   names it, so that the compiler reads it no earlier. It is a second one, because a compiler may copy the operands of a
   statement before that statement, and before the wait they must not be touched. */
template <int PENDING> __device__ inline void wgmma_wait(float (&x)[8][4]) {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
    asm volatile("" : ALL32(x)::"memory");
}

/* s (64, 64) = rows of tile a times rows of tile b; the first of four steps overwrites s */
__device__ inline void wgmma_rows(float (&s)[8][4], uint64_t a, uint64_t b) {
    asm volatile(
        "{\n.reg .pred add;\nsetp.ne.b32 add, 0, 0;\nwgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " OUT32
        ", %32, %33, add, 1, 1, 0, 0;\n}"
        : NEW32(s)
        : "l"(a), "l"(b));
#pragma unroll
    for (int k = 1; k < 4; k++)
        asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " OUT32 ", %32, %33, 1, 1, 1, 0, 0;"
                     : ALL32(s)
                     : "l"(a + 2 * k), "l"(b + 2 * k));
}

/* o (64, 64) += x (64, 64), in registers, times tile b, whose rows are x's columns */
__device__ inline void wgmma_columns(float (&o)[8][4], const uint32_t (&x)[4][4], uint64_t b) {
#pragma unroll
    for (int k = 0; k < 4; k++)
        asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " OUT32
                     ", {%32, %33, %34, %35}, %36, 1, 1, 1, 1;"
                     : ALL32(o)
                     : "r"(x[k][0]), "r"(x[k][1]), "r"(x[k][2]), "r"(x[k][3]), "l"(b + 128 * k));
}
#else
static __device__ int attention_has_wgmma = 0;
#endif

/* Two warpgroups with 64 queries each share the keys and values. Thread 0 starts the copies, LEAD blocks of keys ahead.
   The stage that it fills is that of STAGES - LEAD blocks before, so the warpgroups may be a block apart without
   waiting for each other. (A ninth warp for this job would leave 96 registers to each thread instead of 128.) */
#define ATTENTION_FORWARD_STAGES 4
#define ATTENTION_FORWARD_BYTES ((2 + 2 * ATTENTION_FORWARD_STAGES) * TILE64 + ATTENTION_FORWARD_STAGES * 256 + 128)
template <bool GATED>
__global__ void __launch_bounds__(256, 2)
    attention_forward_wgmma(bf16 *out, float *lse, AttentionInput in, const __grid_constant__ AttentionMaps maps, int T,
                            int NH) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    constexpr int HS = 64, ROWS = 128, KEYS = 64, STAGES = ATTENTION_FORWARD_STAGES, LEAD = 2;
    /* two tiles of queries, stages of keys and values, what gates keep of a stage's keys, barriers */
    extern __shared__ __align__(1024) char memory[];
    int blocks = (T + ROWS - 1) / ROWS, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    size_t bh = blockIdx.x / blocks, b = bh / NH, C = (size_t)NH * HS;
    int h = bh % NH, i0 = (blocks - 1 - blockIdx.x % blocks) * ROWS;
    AttentionHead head = attention_head(in, b, h, T, NH, HS);
    if (head.behind < 0) return;
    int behind = head.behind, ahead = head.ahead, first = max(0, i0 - behind) / KEYS * KEYS,
        end = min(T, i0 + ROWS + ahead);
    const float *locals = (const float *)(memory + (2 + 2 * STAGES) * TILE64);
    uint32_t q_tiles = shared_address(memory), stages = q_tiles + 2 * TILE64,
             q_full = shared_address(locals + STAGES * KEYS), full = q_full + 8, empty = full + 8 * STAGES;
    AttentionGate gate = {};
    if (GATED) gate = attention_gate(in, b, h, T);
    double c_i0 = gate.c ? gate.c[i0] : 0;
    const CUtensorMap *qk_map = head.from_features ? &maps.features : &maps.qkv;
    /* the block-th one of keys and values, and what the gate keeps of its keys */
    auto copy_keys = [&](int block) {
        int stage = block % STAGES, j0 = first + block * KEYS;
        uint32_t k_tile = stages + stage * 2 * TILE64, barrier = full + 8 * stage;
        barrier_expect(barrier, 2 * TILE64 + (gate.c ? KEYS * 4 : 0));
        copy_tile(k_tile, qk_map, C + h * HS, j0, b, barrier);
        copy_tile(k_tile + TILE64, &maps.qkv, 2 * C + h * HS, j0, b, barrier);
        if (gate.c) copy_numbers(shared_address(locals + stage * KEYS), gate.local + j0, KEYS * 4, barrier);
    };
    if (threadIdx.x == 0) {
        barrier_init(q_full, 1);
        /* a stage is full when its copies have arrived, and empty when 8 warps have said so */
        for (int stage = 0; stage < STAGES; stage++) {
            barrier_init(full + 8 * stage, 1);
            barrier_init(empty + 8 * stage, 8);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        barrier_expect(q_full, 2 * TILE64);
        copy_tile(q_tiles, qk_map, h * HS, i0, b, q_full);
        copy_tile(q_tiles + TILE64, qk_map, h * HS, i0 + 64, b, q_full);
        for (int block = 0; block < LEAD && first + block * KEYS < end; block++) copy_keys(block);
    }
    __syncthreads();

    int group = warp / 4, row0 = i0 + 16 * warp, block = 0;
    /* the first group may leave out the last block, whose stage is not needed again */
    int group_end = min(end, i0 + 64 * (group + 1) + ahead);
    float scale2 = head.scale * ATTENTION_LOG2E, o[8][4] = {}, m[2] = {-INFINITY, -INFINITY}, sum[2] = {};
    uint64_t q = wgmma_tile(q_tiles + group * TILE64);
    barrier_wait(q_full, 0);
    do {
        int stage = block % STAGES, j0 = first + block * KEYS;
        uint32_t k_tile = stages + stage * 2 * TILE64;
        float s[8][4], start = forget_start(gate, c_i0, j0);
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
        if (gate.c) forget_keys(s, start, locals + stage * KEYS, 1 / head.scale);
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
        /* do, not while: if the loop could run zero times, the compiler would wait after every product for o */
    } while (first + block * KEYS < group_end);
    wgmma_wait<0>(o);
    /* nobody of the warpgroup reads the queries any more */
    asm volatile("bar.sync %0, 128;" ::"r"(1 + group) : "memory");
    float total[2] = {quad_sum(sum[0]), quad_sum(sum[1])};
#pragma unroll
    for (int r = 0; r < 2; r++) {
        int i = row0 + lane / 4 + 8 * r;
        if (lane % 4 == 0 && i < T)
            lse[bh * T + i] = (m[r] + log2f(total[r])) / ATTENTION_LOG2E + forget_rest(gate, i, i0);
    }
    store_rows<HS>(out + b * T * C + (size_t)h * HS, C, row0, T, o, 1 / total[0], 1 / total[1], q_tiles, warp * 16);
#endif
}

/* One warpgroup a block of threads; thread 0 starts the copies, one block of columns ahead. Rows and columns as in
   attention_backward_mma. The product do . v is started only when the scores have become weights: it then takes the
   registers of the scores, and one more warpgroup fits a multiprocessor. */
#define ATTENTION_BACKWARD_BYTES (6 * TILE64 + 2 * 128 * 4 + 64)
template <bool KEYS, bool GATED>
__global__ void __launch_bounds__(128, KEYS ? 3 : 4)
    attention_backward_wgmma(bf16 *dqkv, bf16 *dfeatures, float *delta, const bf16 *dout, const bf16 *out,
                             const float *lse, AttentionInput in, const __grid_constant__ AttentionMaps maps, int T,
                             int NH) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    constexpr int HS = 64, BLOCK = 64, STAGES = 2;
    /* two tiles of rows, stages of two tiles of columns, statistics, barriers */
    extern __shared__ __align__(1024) char memory[];
    int blocks = (T + BLOCK - 1) / BLOCK, warp = threadIdx.x / 32, lane = threadIdx.x % 32, block = blockIdx.x % blocks;
    size_t bh = blockIdx.x / blocks, b = bh / NH, C = (size_t)NH * HS;
    int h = bh % NH, r0 = (KEYS ? block : blocks - 1 - block) * BLOCK, row0 = r0 + 16 * warp;
    AttentionHead head = attention_head(in, b, h, T, NH, HS);
    if (head.behind < 0) return;
    int behind = head.behind, ahead = head.ahead, before = KEYS ? ahead : behind, after = KEYS ? behind : ahead;
    int first = max(0, r0 - before) / BLOCK * BLOCK, end = min(T, r0 + BLOCK + after);
    uint32_t tile1 = shared_address(memory), tile2 = tile1 + TILE64, stages = tile2 + TILE64;
    /* KEYS: lse, delta of a stage's columns; else delta of the rows, and in the second half of a stage's what the gate
       keeps of its columns */
    float *statistics = (float *)(memory + (2 + 2 * STAGES) * TILE64);
    uint32_t rows_full = shared_address(statistics + 256), full = rows_full + 8;
    AttentionGate gate = {};
    if (GATED) gate = attention_gate(in, b, h, T);
    lse += bh * T;
    delta += bh * T;

    double c_r0 = gate.c ? gate.c[r0] : 0;

    /* 64 tokens from t on of k and v, or of q and do, to two tiles; locals: what the gate keeps of keys goes there
       too */
    auto copy = [&](bool keys, int t, uint32_t tile, uint32_t barrier, const float *locals) {
        barrier_expect(barrier, 2 * TILE64 + (locals ? BLOCK * 4 : 0));
        copy_tile(tile, head.from_features ? &maps.features : &maps.qkv, (keys ? C : 0) + h * HS, t, b, barrier);
        copy_tile(tile + TILE64, keys ? &maps.qkv : &maps.dout, (keys ? 2 * C : 0) + h * HS, t, b, barrier);
        if (locals) copy_numbers(shared_address(locals), gate.local + t, BLOCK * 4, barrier);
    };
    auto locals_of = [&](int stage) { return !KEYS && gate.c ? statistics + stage * 128 + 64 : NULL; };
    if (threadIdx.x == 0) {
        for (int stage = -1; stage < STAGES; stage++) barrier_init(full + 8 * stage, 1);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        copy(KEYS, r0, tile1, rows_full, NULL);
        copy(!KEYS, first, stages, full, locals_of(0));
    }
    float lse2[2] = {}, delta_row[2] = {};
    if (KEYS) statistics[threadIdx.x] = column_statistic(lse, delta, gate, r0, first, T);
    else {
#pragma unroll
        for (int r = 0; r < 2; r++) {
            int i = row0 + lane / 4 + 8 * r;
            lse2[r] = i < T ? (lse[i] - forget_rest(gate, i, r0)) * ATTENTION_LOG2E : 0;
        }
        row_deltas<HS>(statistics, delta, dout + b * T * C + (size_t)h * HS,
                       out ? out + b * T * C + (size_t)h * HS : NULL, C, r0, BLOCK, T);
    }
    __syncthreads();
    if (!KEYS)
#pragma unroll
        for (int r = 0; r < 2; r++) delta_row[r] = statistics[16 * warp + lane / 4 + 8 * r];

    float scale2 = head.scale * ATTENTION_LOG2E, sum1[8][4] = {}, sum2[8][4] = {}; /* dq, or dk and dv */
    float gate_sum[2] = {}, own[2] = {};
    if (GATED && KEYS) forget_own(own, gate, r0, row0, 1 / head.scale, T);
    uint64_t rows1 = wgmma_tile(tile1), rows2 = wgmma_tile(tile2);
    barrier_wait(rows_full, 0);
    int c0 = first, stage = 0, parity = 0;
    do {
        uint64_t columns1 = wgmma_tile(stages + stage * 2 * TILE64),
                 columns2 = wgmma_tile(stages + stage * 2 * TILE64 + TILE64);
        /* of the next block */
        float s[8][4], dp[8][4], statistic = KEYS ? column_statistic(lse, delta, gate, r0, c0 + BLOCK, T) : 0,
                                 start = KEYS ? 0 : forget_start(gate, c_r0, c0);
        barrier_wait(full + 8 * stage, parity);
        wgmma_begin();
        wgmma_rows(s, rows1, columns1);
        wgmma_commit();
        wgmma_wait<0>(s);
        __syncthreads(); /* all are done with the block before: its stage and its statistics are free */
        if (KEYS) statistics[(stage ^ 1) * 128 + threadIdx.x] = statistic;
        if (threadIdx.x == 0 && c0 + BLOCK < end)
            copy(!KEYS, c0 + BLOCK, stages + (stage ^ 1) * 2 * TILE64, full + 8 * (stage ^ 1), locals_of(stage ^ 1));
        if (gate.c && KEYS) forget_add(s, own);
        if (gate.c && !KEYS) forget_keys(s, start, locals_of(stage), 1 / head.scale);
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
        score_gradients<KEYS, GATED>(ds, dp, p, delta_row, statistics + stage * 128 + 64, gate_sum);
        wgmma_begin();
        wgmma_columns(sum1, ds, columns1);
        wgmma_commit();
        c0 += BLOCK;
        parity ^= stage;
        stage ^= 1;
    } while (c0 < end); /* do, not while: as in the forward pass */
    wgmma_wait<0>(sum1);
    if (KEYS) wgmma_wait<0>(sum2);
    if (GATED && gate.c) forget_store<KEYS>(gate, gate_sum, row0, T);
    __syncthreads();
    bf16 *d1 = gradient_of(dqkv, dfeatures, head, b, h, KEYS ? 1 : 0, T, NH, HS),
         *d2 = gradient_of(dqkv, dfeatures, head, b, h, 2, T, NH, HS);
    store_rows<HS>(d1, head.qk_stride, row0, T, sum1, head.scale, head.scale, tile1, 16 * warp);
    if (KEYS) store_rows<HS>(d2, head.v_stride, row0, T, sum2, 1, 1, tile2, 16 * warp);
#endif
}

/* ---- launchers; GATED where some head has a gate */

template <int HS, bool GATED>
static void attention_forward_launch(bf16 *out, float *lse, AttentionInput in, size_t B, int T, int NH,
                                     cudaStream_t stream) {
    int rows = 128, keys = HS == 128 ? 32 : 64, bytes = (rows + 4 * keys) * HS * 2;
    auto kernel = attention_forward_mma<HS, GATED>;
    cudaCheck(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
    kernel<<<(unsigned)(B * NH * ((T + rows - 1) / rows)), 128, bytes, stream>>>(out, lse, in, T, NH);
    cudaCheck(cudaGetLastError());
}

template <int HS, bool GATED>
static void attention_backward_launch(bf16 *dqkv, bf16 *dfeatures, float *delta, const bf16 *dout, const bf16 *out,
                                      const float *lse, AttentionInput in, size_t B, int T, int NH,
                                      cudaStream_t stream) {
    int rows = HS == 128 ? 64 : 128, bytes = (2 * rows + 4 * ATTENTION_BLOCK) * HS * 2 + 4 * ATTENTION_BLOCK * 4;
    unsigned grid = (unsigned)(B * NH * ((T + rows - 1) / rows));
    auto queries = attention_backward_mma<HS, false, GATED>, keys = attention_backward_mma<HS, true, GATED>;
    cudaCheck(cudaFuncSetAttribute(queries, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
    cudaCheck(cudaFuncSetAttribute(keys, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
    /* writes delta */
    queries<<<grid, 128, bytes, stream>>>(dqkv, dfeatures, delta, dout, out, lse, in, T, NH);
    keys<<<grid, 128, bytes, stream>>>(dqkv, dfeatures, delta, dout, out, lse, in, T, NH);
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
        cudaCheck(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", (void **)&encode, 12000, cudaEnableDefault,
                                                   &found));
    }
    if (!x) return map;
    cuuint64_t sizes[3] = {columns, T, B}, strides[2] = {columns * sizeof(bf16), T * columns * sizeof(bf16)};
    cuuint32_t box[3] = {64, 64, 1}, steps[3] = {1, 1, 1};
    CUresult result = encode(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 3, (void *)x, sizes, strides, box, steps,
                             CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                             CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (result != CUDA_SUCCESS)
        die("the GPU driver refuses a map of (%zu, %zu, %zu) for the bulk copy engine, error %d", B, T, columns,
            (int)result);
    return map;
}

template <bool GATED>
static void attention_forward_hopper(bf16 *out, float *lse, AttentionInput in, size_t B, size_t T, size_t NH,
                                     cudaStream_t stream) {
    AttentionMaps maps = {attention_map(in.qkv, B, T, 3 * NH * 64), attention_map(in.features, B, T, 2 * NH * 64), {}};
    auto kernel = attention_forward_wgmma<GATED>;
    cudaCheck(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, ATTENTION_FORWARD_BYTES));
    kernel<<<(unsigned)(B * NH * ((T + 127) / 128)), 256, ATTENTION_FORWARD_BYTES, stream>>>(out, lse, in, maps, (int)T,
                                                                                             (int)NH);
    cudaCheck(cudaGetLastError());
}

template <bool GATED>
static void attention_backward_hopper(bf16 *dqkv, bf16 *dfeatures, float *delta, const bf16 *dout, const bf16 *out,
                                      const float *lse, AttentionInput in, size_t B, size_t T, size_t NH,
                                      cudaStream_t stream) {
    AttentionMaps maps = {attention_map(in.qkv, B, T, 3 * NH * 64), attention_map(in.features, B, T, 2 * NH * 64),
                          attention_map(dout, B, T, NH * 64)};
    unsigned grid = (unsigned)(B * NH * ((T + 63) / 64));
    auto queries = attention_backward_wgmma<false, GATED>, keys = attention_backward_wgmma<true, GATED>;
    const int bytes = ATTENTION_BACKWARD_BYTES;
    cudaCheck(cudaFuncSetAttribute(queries, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
    cudaCheck(cudaFuncSetAttribute(keys, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
    /* writes delta */
    queries<<<grid, 128, bytes, stream>>>(dqkv, dfeatures, delta, dout, out, lse, in, maps, (int)T, (int)NH);
    keys<<<grid, 128, bytes, stream>>>(dqkv, dfeatures, delta, dout, out, lse, in, maps, (int)T, (int)NH);
    cudaCheck(cudaGetLastError());
}

template <bool GATED>
static void attention_forward_by_size(bf16 *out, float *lse, AttentionInput in, size_t B, size_t T, size_t NH,
                                      size_t HS, cudaStream_t stream) {
    if (HS == 64 && attention_wgmma()) attention_forward_hopper<GATED>(out, lse, in, B, T, NH, stream);
    else if (HS == 32) attention_forward_launch<32, GATED>(out, lse, in, B, (int)T, (int)NH, stream);
    else if (HS == 64) attention_forward_launch<64, GATED>(out, lse, in, B, (int)T, (int)NH, stream);
    else if (HS == 128) attention_forward_launch<128, GATED>(out, lse, in, B, (int)T, (int)NH, stream);
    else die("internal error: attention has heads of 32, 64 and 128, not %zu", HS);
}

static void attention_forward(bf16 *out, float *lse, AttentionInput in, size_t B, size_t T, size_t NH, size_t HS,
                              cudaStream_t stream) {
    if (in.forget) attention_forward_by_size<true>(out, lse, in, B, T, NH, HS, stream);
    else attention_forward_by_size<false>(out, lse, in, B, T, NH, HS, stream);
}

template <bool GATED>
static void attention_backward_by_size(bf16 *dqkv, bf16 *dfeatures, float *delta, const bf16 *dout, const bf16 *out,
                                       const float *lse, AttentionInput in, size_t B, size_t T, size_t NH, size_t HS,
                                       cudaStream_t stream) {
    int t = (int)T, heads = (int)NH;
    if (HS == 64 && attention_wgmma())
        attention_backward_hopper<GATED>(dqkv, dfeatures, delta, dout, out, lse, in, B, T, NH, stream);
    else if (HS == 32)
        attention_backward_launch<32, GATED>(dqkv, dfeatures, delta, dout, out, lse, in, B, t, heads, stream);
    else if (HS == 64)
        attention_backward_launch<64, GATED>(dqkv, dfeatures, delta, dout, out, lse, in, B, t, heads, stream);
    else if (HS == 128)
        attention_backward_launch<128, GATED>(dqkv, dfeatures, delta, dout, out, lse, in, B, t, heads, stream);
    else die("internal error: attention has heads of 32, 64 and 128, not %zu", HS);
}

static void attention_backward(bf16 *dqkv, bf16 *dfeatures, float *delta, const bf16 *dout, const bf16 *out,
                               const float *lse, AttentionInput in, size_t B, size_t T, size_t NH, size_t HS,
                               cudaStream_t stream) {
    if (in.forget) attention_backward_by_size<true>(dqkv, dfeatures, delta, dout, out, lse, in, B, T, NH, HS, stream);
    else attention_backward_by_size<false>(dqkv, dfeatures, delta, dout, out, lse, in, B, T, NH, HS, stream);
}

#endif
