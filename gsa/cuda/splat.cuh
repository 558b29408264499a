/* ---- splats

   What the kernels need of the splats of all G heads, made anew in each forward pass, with S padded to SP, a multiple
   of 32: slope = Lambda mu (G, SP, HS), precision (G, SP, P), centre = mu . Lambda mu (G, SP), log_alpha (G, SP),
   steps and phases (G, SP), which are frequencies and psi as integer phases (MODEL.md 4.1), decay = delta (G, SP),
   typical (G, SP) and key_scale = c (G) (MODEL.md 4.3). The centre of a dead splat and of padding is infinite: its
   responses, exp(-infinity), are 0. Kernels for full precision use neither slope nor precision: they read mu and
   log_precision, the parameters themselves. */
typedef struct {
    float *slope, *precision, *centre, *log_alpha, *decay, *typical, *key_scale;
    const float *mu, *log_precision;
    uint32_t *steps, *phases; /* NULL: no cosine; no psi in it */
    size_t SP;
    bool raw; /* x^ = x in place of equation (1) */
} SplatTables;
enum { SPLATS_MOST = 64 };
static size_t splats_padded(size_t S) { return S <= 32 ? 32 : 64; }

/* The rows of some GSA heads, one after the other, in each tensor of SPLAT_TENSORS (gsa/model.h); NULL where the model
   has none. */
typedef struct {
#define X(name, ...) float *name;
    SPLAT_TENSORS(X)
#undef X
} SplatTensors;

/* One warp a splat. */
__global__ static void splat_tables_kernel(SplatTables w, SplatTensors p, int S, int P, int HS) {
    int SP = (int)w.SP, s = blockIdx.x % SP;
    size_t to = blockIdx.x, from = (size_t)(blockIdx.x / SP) * S + s;
    bool lives = s < S && p.alive[from] > 0;
    float centre = 0, trace = 0;
    for (int k = threadIdx.x; k < HS && P <= HS; k += 32) {
        float precision = lives ? expf(p.log_precision[from * P + (P > 1 ? k : 0)]) : 0,
              mu = lives ? p.mu[from * HS + k] : 0;
        w.slope[to * HS + k] = precision * mu;
        if (P > 1 || k == 0) w.precision[to * P + k] = precision;
        centre += mu * precision * mu;
        trace += precision;
    }
    for (int k = threadIdx.x; k < HS && P > HS && lives; k += 32) { /* column k of L */
        float along = 0;
        for (int i = k; i < HS; i++) {
            float entry = p.log_precision[from * P + i * (i + 1) / 2 + k];
            if (i == k) entry = expf(entry);
            trace += entry * entry;
            along += entry * p.mu[from * HS + i];
        }
        centre += along * along;
    }
    centre = warp_sum(centre);
    trace = warp_sum(trace);
    if (threadIdx.x > 0) return;
    w.centre[to] = lives ? centre : INFINITY;
    w.typical[to] = lives ? -0.5f * (trace / (float)HS + centre) : -INFINITY;
    w.log_alpha[to] = lives ? p.log_alpha[from] : 0;
    w.decay[to] = lives && p.log_delta ? (float)exp((double)p.log_delta[from]) : 0;
    if (w.steps) w.steps[to] = lives ? wave_step(exp((double)p.log_theta[from])) : 0;
    if (w.phases) w.phases[to] = lives ? wave_step((double)p.psi[from]) : 0;
}

/* One warp a head. */
__global__ static void splat_key_scales_kernel(SplatTables w) {
    float most = -INFINITY;
    for (size_t s = threadIdx.x; s < w.SP; s += 32) most = fmaxf(most, w.typical[blockIdx.x * w.SP + s]);
    most = warp_max(most);
    if (threadIdx.x == 0) w.key_scale[blockIdx.x] = most;
}

/* How both kernels below share out their work. A block has 4 warps and works on tiles of 64 tokens of one head, first
   their queries, then their keys; a warp has 16 of the tokens.

   Lane 4g + t holds two tokens: splat_row(g) and splat_row(g) + 8 of its warp's 16. Of a token's channels it holds, in
   every 32, the eight from 8t on; of its splats, in every 4E, the E from E t on. So it loads and stores 16 bytes at a
   time, and the lanes of a warp meet in no bank of shared memory.

   A product of matrices does not depend on the order in which its terms are added, nor on which row or column is
   called the first. So the entries that the hardware wants of a lane (tensor_core.cuh) may be those that it holds
   anyway: column g of tile i stands for splat (or channel) E (g / 2) + 2i + g % 2, and terms t and t + 4 of step i are
   channels (or splats) E t + 2i and E t + 2i + 1, with E = 8 for channels. */
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
/* over the four lanes that share a row, 4g .. 4g + 3; so does quad_max */
__device__ static inline float quad_sum(float x) {
    x += __shfl_xor_sync(~0u, x, 1);
    return x + __shfl_xor_sync(~0u, x, 2);
}
__device__ static inline float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
    return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

/* For the scan splat_forward writes no features but responses: r of queries, equation (11), then phi(k^) exp(-c) of
   keys, (2, B, heads, T, SP). splat_backward takes G from the same places: dl of queries, K of keys (MODEL.md 3.3). */
typedef struct {
    floatX *responses; /* NULL: features */
    size_t SP;         /* 16 for up to 16 splats, else 32 */
    size_t late;       /* the last `late` keys of a sequence are never met */
    bool add;          /* dq, dk are added to: the softmax nearby has written them */
} ScanResponsesAt;
/* the row of responses of token n, of all B T, for a listed head */
__device__ static inline size_t response_row(size_t side, size_t n, size_t head, size_t heads, size_t N, size_t T) {
    return ((size_t)side * N + (uint32_t)n / (uint32_t)T * T) * heads + head * T + (uint32_t)n % (uint32_t)T;
}

/* A row's token and where its sequence begins, moved on from tile to tile by additions: divisions would take longer
   than the products. */
struct SplatToken {
    uint32_t n, start; /* its number among all B T, that of its sequence's first token */
    __device__ inline SplatToken(uint32_t n, uint32_t T) : n(n), start(n / T * T) {}
    __device__ inline void step(uint32_t tokens, uint32_t T) {
        for (n += tokens; n - start >= T;) start += T;
    }
    __device__ inline uint32_t position() const { return n - start; }
    /* its row of responses of a listed head */
    __device__ inline size_t response(size_t side, size_t head, size_t heads, size_t N, size_t T) const {
        return (side * N + start) * heads + head * T + position();
    }
};

template <int E> __device__ static inline void load_numbers(float *v, const floatX *from) { /* E: 4 or 8 */
    Pack p = {};
    if (E == 8) p = load_pack(from);
#ifdef GSA_FP32
    else p.half[0] = *(const float4 *)from;
#else
    else {
        p.pairs.x = ((const uint2 *)from)->x;
        p.pairs.y = ((const uint2 *)from)->y;
    }
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

/* So many blocks shall fit a multiprocessor at least: the compiler limits its registers to that. */
template <int HS, int SP, bool DIAGONAL>
constexpr int splat_forward_blocks = HS > 64 || DIAGONAL ? 1
                                     : SP == 16          ? 6
                                                         : 4;
template <int HS, int SP, bool DIAGONAL>
constexpr int splat_backward_blocks = HS > 64 || SP > 32 || DIAGONAL ? 1
                                      : SP == 16                     ? 5
                                                                     : 4;

/* Equations (1), (2), then (9), or for the scan the responses. ln phi is computed multiplied out (MODEL.md 4.6): Lambda
   mu . x and, where diagonal, x . Lambda x are products of matrices, with x^ = x / |x| put in afterwards. A block works
   on `tiles` tiles. Long, because the loads of the next tile, the products and the result of this one share what a lane
   holds in registers. */
template <int HS, int SP, bool DIAGONAL, bool SCAN>
__global__ static void __launch_bounds__(128, splat_forward_blocks<HS, SP, DIAGONAL>)
    splat_forward_kernel(floatX *__restrict__ features, const floatX *__restrict__ qkv, SplatTables w,
                         ScanResponsesAt scan, const __grid_constant__ HeadList heads, size_t first_head, size_t N,
                         size_t T, size_t C, int S, size_t tiles) {
    constexpr int P = DIAGONAL ? HS : 1, STEPS = HS / 8, E = SP < 32 ? 4 : 8, GROUP = 4 * E, GROUPS = SP / GROUP;
    extern __shared__ __align__(1024) char memory[];
    /* (GROUPS, STEPS, E / 4, 32 lanes): the terms t and t + 4 that a lane needs of its column in two tiles, 16 bytes,
       lane beside lane */
    float4 *slope = (float4 *)memory, *spreads = slope + SP * HS / 4;
    /* (SP) where not diagonal, (2, SP): of queries, of keys */
    float *precision = (float *)(slope + SP * HS / 4 * (DIAGONAL ? 2 : 1)), *constant = precision + SP;
    uint32_t *steps = (uint32_t *)(constant + 2 * SP), *phases = steps + SP;
    size_t h = heads.head[blockIdx.x], head = (first_head + blockIdx.x) * w.SP;
    int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    bool aligned = S % 8 == 0, envelope = w.steps != NULL && !SCAN, phased = w.phases != NULL && !SCAN;
    float key_scale = SCAN ? w.key_scale[first_head + blockIdx.x] : 0;
    for (int at = threadIdx.x; at < SP * HS / 4; at += 128) { /* at % 32 is the lane */
        int i = at / 32 % (E / 4) * 2, step = at / 32 / (E / 4) % STEPS,
            s = at / 32 / (E / 4) / STEPS * GROUP + E * (g / 2) + 2 * i + g % 2,
            k = step / 4 * 32 + 8 * t + step % 4 * 2;
        const float *m = w.slope + (head + s) * HS + k, *p = w.precision + (head + s) * HS + k;
        slope[at] = make_float4(round_tf32(m[0]), round_tf32(m[1]), round_tf32(m[2 * HS]), round_tf32(m[2 * HS + 1]));
        if (DIAGONAL)
            spreads[at] =
                make_float4(round_tf32(p[0]), round_tf32(p[1]), round_tf32(p[2 * HS]), round_tf32(p[2 * HS + 1]));
    }
    for (int i = threadIdx.x; i < SP; i += 128) {
        precision[i] = DIAGONAL ? 0 : w.precision[head * P + i];
        constant[i] = w.log_alpha[head + i] - 0.5f * w.centre[head + i];
        constant[SP + i] = -0.5f * w.centre[head + i] - key_scale;
        steps[i] = envelope ? w.steps[head + i] : 0;
        phases[i] = phased ? w.phases[head + i] : 0;
    }
    __syncthreads();

    size_t first = blockIdx.y * tiles * 64 + threadIdx.x / 32 * 16;
    if (first >= N) return;
    int passes = (int)(CEIL_DIV(N - first, (size_t)64) < tiles ? CEIL_DIV(N - first, (size_t)64) : tiles) * GROUPS * 2;
    SplatToken token[2] = {SplatToken((uint32_t)first + splat_row(g), (uint32_t)T),
                           SplatToken((uint32_t)first + splat_row(g) + 8, (uint32_t)T)};
    const floatX *from = qkv + token[0].n * 3 * C + h * HS + 8 * t;
    Pack next[2][HS / 32] = {};
    auto fetch = [&](int ahead, size_t side) { /* the rows of x, of the tile that is so many tokens ahead */
#pragma unroll
                                               for (int r = 0; r < 2; r++)
#pragma unroll
                                                   for (int j = 0; j < HS / 32; j++)
                                                       if (token[r].n + ahead < N)
                                                           next[r][j] = load_pack(from + (ahead + 8 * r) * 3 * C +
                                                                                  side * C + 32 * j);
    };
    fetch(0, 0);
    float wave_c[2][8], wave_s[2][8];
    for (int pass = 0; pass < passes; pass++) { /* for each tile, for each group of 4E splats: queries, then keys */
        int side = pass % 2, c = pass / 2 % GROUPS * GROUP;
        bool done = pass % (2 * GROUPS) == 2 * GROUPS - 1;
        if (!SCAN && (side == 0 || phased)) /* keys' waves are the queries' unless psi turns them, equation (7b) */
#pragma unroll
            for (int r = 0; r < 2; r++)
#pragma unroll
                for (int e = 0; e < E; e++) {
                    wave_c[r][e] = 1;
                    wave_s[r][e] = 0;
                    if (envelope)
                        fast_sincos(
                            wave_angle(steps[c + E * t + e], token[r].position(), side ? phases[c + E * t + e] : 0),
                            &wave_s[r][e], &wave_c[r][e]);
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
                mma_16x8x8(product[i], a, m.x, m.y);
                mma_16x8x8(product[i + 1], a, m.z, m.w);
                if (!DIAGONAL) continue;
                m = spreads[at];
                mma_16x8x8(spread[i], b, m.x, m.y);
                mma_16x8x8(spread[i + 1], b, m.z, m.w);
            }
        }
#pragma unroll
        for (int r = 0; r < 2; r++) {
            size_t n = token[r].n;
            float inverse = w.raw ? 1 : rsqrtf(square[r] + (float)SPHERE_EPSILON), unit = square[r] * inverse * inverse,
                  f_c[8] = {}, f_s[8] = {};
#pragma unroll
            for (int e = 0; e < E; e++) {
                float wide =
                    DIAGONAL ? spread[e / 2][2 * r + e % 2] * inverse * inverse : precision[c + E * t + e] * unit;
                f_c[e] = product[e / 2][2 * r + e % 2] * inverse - 0.5f * wide + constant[side * SP + c + E * t + e];
            }
            if (SCAN) { /* one group: four lanes have all splats of a row */
                float most = side ? 0 : -INFINITY, sum = 0;
#pragma unroll
                for (int e = 0; e < E; e++) most = side ? 0 : fmaxf(most, f_c[e]);
                if (!side) most = quad_max(most);
#pragma unroll
                for (int e = 0; e < E; e++) sum += f_c[e] = fast_exp(f_c[e] - most);
                sum = side ? 1 : 1 / quad_sum(sum);
#pragma unroll
                for (int e = 0; e < E; e++) f_c[e] *= sum;
                if (n < N)
                    store_numbers<E>(
                        scan.responses + token[r].response(side, blockIdx.x, heads.count, N, T) * SP + E * t, f_c);
            } else if (n < N) {
#pragma unroll
                for (int e = 0; e < E; e++) {
                    float f = fast_exp(f_c[e]);
                    f_c[e] = f * wave_c[r][e];
                    f_s[e] = f * wave_s[r][e];
                }
                floatX *row = features + n * 2 * C + side * C + h * HS;
                store_some(row, c + 8 * t, S, aligned, f_c);
                if (envelope) store_some(row + S, c + 8 * t, S, aligned, f_s);
                if (c == 0)
                    for (int k = (envelope ? 2 * S : S) + t; k < HS; k += 4) row[k] = (floatX)0.0f;
            }
        }
        if (done) {
            token[0].step(64, (uint32_t)T);
            token[1].step(64, (uint32_t)T);
            from += 64 * 3 * C;
        }
    }
}

/* Numbers in a head's record of moments (MODEL.md 3.4), in the order of train_gsa.c: M0 (S), M1 (S, HS), M2 (S) or (S,
   HS), d ln alpha (S), d theta (S), d psi (S) */
__host__ __device__ static inline size_t moments_record(size_t S, size_t P, size_t HS) { return S * (HS + P + 4); }
/* and in its record of the scan's own sums: d ln alpha, d theta, d delta, d psi (SP each), d ln g */
__host__ __device__ static constexpr size_t scan_sums_record(size_t SP) { return 4 * SP + 1; }

/* A block's shared memory: first tables of slope and precision in the order in which lanes read them (iso: slope, and
   the precisions as they are); then stages, each for a tile of 64 tokens: x, where diagonal also x .* x / |x|; G / |x|,
   in bf16 as two numbers, the rounded one and what rounding left; and for the scan G as it left it. Where two stages
   fit, the next tile arrives while one is worked on. */
template <int HS, int SP, bool DIAGONAL, bool SCAN> struct SplatBackwardShape {
    static constexpr bool WIDE = sizeof(floatX) == 4;
    static constexpr int STAGES = WIDE || HS * SP * (DIAGONAL ? 2 : 1) > 4096 ? 1 : 2, PAD = WIDE ? 4 : 8,
                         XROW = HS + PAD, GROW = SP + PAD, PARTS = WIDE ? 1 : 2, SUMS = 4 * SP * 5;
    static constexpr int X = 64 * XROW * (DIAGONAL ? 2 : 1), G = 64 * GROW * PARTS, RAW = SCAN ? 64 * SP : 0,
                         STAGE = X + G + RAW;
    static constexpr size_t TABLES = (SP * HS * (DIAGONAL ? 2 : 1) + SP) * sizeof(float),
                            TILES = STAGES * STAGE * sizeof(floatX);
    static constexpr size_t bytes = TABLES + (TILES > SUMS * sizeof(float) ? TILES : SUMS * sizeof(float));
};

/* The gradients of MODEL.md 3.3 and 3.4. For each tile of 64 tokens, queries then keys, lanes as above:
     G = f df, the gradient of ln phi, and its sums M0, d ln alpha, d theta and d psi: in the lanes that hold it;
     dL / dx^ = G slope - x^ .* (G precision), then dx: each warp for its own 16 tokens;
     M1 += G^T x^, M2 += G^T (x^ .* x^) over all 64 tokens: each warp has its own 16 x 16 blocks of the (SP, HS) sums.
   G is stored divided by |x|, so that plain x serves as x^. A block covers `tiles` tiles of one head and writes one
   record. For the scan G is read, and d ln alpha, d theta and d psi come from the scan's own sums. Long, because its
   sums live in registers through the whole loop: a function that had them would be this one. */
template <int HS, int SP, bool DIAGONAL, bool SCAN>
__global__ static void __launch_bounds__(128, splat_backward_blocks<HS, SP, DIAGONAL>)
    splat_backward_kernel(floatX *__restrict__ dqkv, float *records, const floatX *__restrict__ dfeatures,
                          const floatX *__restrict__ features, const floatX *__restrict__ qkv, SplatTables w,
                          ScanResponsesAt scan, const __grid_constant__ HeadList heads, size_t first_head, size_t N,
                          size_t T, size_t C, int S, size_t tiles) {
    using Shape = SplatBackwardShape<HS, SP, DIAGONAL, SCAN>;
    constexpr int XROW = Shape::XROW, GROW = Shape::GROW, P = DIAGONAL ? HS : 1, E = SP < 32 ? 4 : 8, GROUP = 4 * E,
                  GROUPS = SP / GROUP;
    constexpr int COLUMNS = HS / 16, BLOCKS = SP / 16 * COLUMNS, OWN = CEIL_DIV(BLOCKS, 4); /* of 16 x 16 sums */
    extern __shared__ __align__(1024) char memory[];
    /* (SP / 8, HS / 16, 32 lanes): the terms t and t + 4 that a lane needs of its column in two tiles */
    float4 *slope = (float4 *)memory, *spreads = slope + SP * HS / 4;
    float *precision = (float *)(slope + SP * HS / 4 * (DIAGONAL ? 2 : 1));
    floatX *stages = (floatX *)(precision + SP);
    size_t h = heads.head[blockIdx.x], head = (first_head + blockIdx.x) * w.SP;
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    bool aligned = S % 8 == 0, envelope = w.steps != NULL && !SCAN;
    for (int at = threadIdx.x; at < SP * HS / 4; at += 128) {
        int pair = at / 32 % (HS / 16), step = at / 32 / (HS / 16),
            s = step / (E / 2) * GROUP + E * t + step % (E / 2) * 2,
            k = pair / 2 * 32 + 8 * (g / 2) + pair % 2 * 4 + g % 2;
        const float *m = w.slope + (head + s) * HS + k, *p = w.precision + (head + s) * HS + k;
        slope[at] = make_float4(round_tf32(m[0]), round_tf32(m[HS]), round_tf32(m[2]), round_tf32(m[HS + 2]));
        if (DIAGONAL)
            spreads[at] = make_float4(round_tf32(p[0]), round_tf32(p[HS]), round_tf32(p[2]), round_tf32(p[HS + 2]));
    }
    for (int i = threadIdx.x; i < SP; i += 128) precision[i] = DIAGONAL ? 0 : w.precision[head + i];

    size_t first = blockIdx.y * tiles * 64;
    int passes = (int)(CEIL_DIV(N - first, (size_t)64) < tiles ? CEIL_DIV(N - first, (size_t)64) : tiles) * 2,
        own = warp * 16;
    SplatToken token[2] = {SplatToken((uint32_t)first + own + splat_row(g), (uint32_t)T),
                           SplatToken((uint32_t)first + own + splat_row(g) + 8, (uint32_t)T)};
    /* for copies from the scan: row lane / (SP / 8) of the warp's next tile; with SP = 32 also the row 8 further on */
    SplatToken scanned(0, 1);
    if (SCAN) scanned = SplatToken((uint32_t)first + own + lane / (SP / 8), (uint32_t)T);
    auto load =
        [&](int pass) { /* to the stage of this pass: each warp its own 16 rows */
                        floatX *X = stages + pass % Shape::STAGES * Shape::STAGE, *raw = X + Shape::X + Shape::G;
                        size_t tile = first + pass / 2 * 64 + own, side = pass % 2;
#pragma unroll
                        for (int i = lane; i < 16 * HS / 8; i += 32) {
                            int row = i / (HS / 8), k = i % (HS / 8) * 8;
                            bool inside = tile + row < N;
                            copy_pack(X + (own + row) * XROW + k,
                                      inside ? qkv + (tile + row) * 3 * C + side * C + h * HS + k : qkv, inside);
                        }
#pragma unroll
                        for (int i = 0; i < SP / 16 && SCAN; i++) {
                            int row = lane / (SP / 8) + 8 * i, s = lane % (SP / 8) * 8;
                            SplatToken token = scanned;
                            token.step(8 * i, (uint32_t)T);
                            bool met = token.n < N && !(side && token.position() + scan.late >= T);
                            copy_pack(raw + (own + row) * SP + s,
                                      met ? scan.responses + token.response(side, blockIdx.x, heads.count, N, T) * SP +
                                                s
                                          : scan.responses,
                                      met);
                        }
                        if (side && SCAN) scanned.step(64, (uint32_t)T);
                        copies_commit();
        };

    /* sums over this lane's tokens; M1 and M2: the warp's blocks */
    float M0[GROUPS][E] = {}, square_sum[GROUPS][E] = {}, amplitude[GROUPS][E] = {}, frequency[GROUPS][E] = {},
          psi[GROUPS][E] = {};
    float M1[OWN][2][4] = {}, M2[OWN][2][4] = {};
    if (Shape::STAGES == 2) {
        load(0);
        __syncthreads(); /* the precisions are there */
    }
#pragma unroll 1
    for (int pass = 0; pass < passes; pass++) {
        size_t side = pass % 2;
        floatX *X = stages + pass % Shape::STAGES * Shape::STAGE, *squares = X + 64 * XROW, *G = X + Shape::X,
               *raw = G + Shape::G;
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
            /* unit = |x^|^2 */
            float unit = w.raw ? square[r] : 1 - (float)SPHERE_EPSILON * inverse[r] * inverse[r],
                  middle = (float)token[r].position() - 0.5f * (float)(T - 1);
#pragma unroll
            for (int c = 0; c < GROUPS; c++) {
                int s = GROUP * c + E * t;
                float *of = gradient[r][c], scaled[E];
                if (SCAN) load_numbers<E>(of, raw + row * SP + s);
                else {
                    int some = n < N ? S : 0;
                    Pack f_c = load_some(features + at, s, some, aligned),
                         d_c = load_some(dfeatures + at, s, some, aligned), f_s = {}, d_s = {};
                    if (envelope) {
                        f_s = load_some(features + at + S, s, some, aligned);
                        d_s = load_some(dfeatures + at + S, s, some, aligned);
                    }
#pragma unroll
                    for (int e = 0; e < E; e++) {
                        float fc = number(f_c, e), fs = number(f_s, e), dc = number(d_c, e), ds = number(d_s, e);
                        of[e] = fc * dc + fs * ds;
                        frequency[c][e] += middle * (fc * ds - fs * dc);
                        if (side == 0) amplitude[c][e] += of[e];
                        else psi[c][e] += fc * ds - fs * dc;
                    }
                }
#pragma unroll
                for (int e = 0; e < E; e++) {
                    M0[c][e] += of[e];
                    if (!DIAGONAL) {
                        square_sum[c][e] += of[e] * unit;
                        total[r] += of[e] * precision[s + e];
                    }
                    scaled[e] = of[e] * inverse[r];
                    of[e] = round_tf32(of[e]);
                }
#pragma unroll
                for (int e = 0; e < E; e += 2) {
                    floatX *to = G + row * GROW + s + e;
                    store_two(to, scaled[e], scaled[e + 1]);
                    if (Shape::PARTS == 2)
                        store_two(to + 64 * GROW, scaled[e] - (float)(floatX)scaled[e],
                                  scaled[e + 1] - (float)(floatX)scaled[e + 1]);
                }
            }
            total[r] = quad_sum(total[r]);
        }
        __syncthreads(); /* all rows of G are there, and nobody reads the other stage any more */
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
                    mma_16x8x16(M1[i][0], a, x[0]);
                    mma_16x8x16(M1[i][1], a, x[1]);
                    if (DIAGONAL) {
                        mma_16x8x16(M2[i][0], a, xx[0]);
                        mma_16x8x16(M2[i][1], a, xx[1]);
                    }
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
                    mma_16x8x8(product[j][i], a, m.x, m.y);
                    mma_16x8x8(product[j][i + 1], a, m.z, m.w);
                    if (!DIAGONAL) continue;
                    m = spreads[at];
                    mma_16x8x8(spread[i], a, m.x, m.y);
                    mma_16x8x8(spread[i + 1], a, m.z, m.w);
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
                for (int e = 0; e < 8; e++)
                    dx[e] = inverse[r] * product[j][e / 2][2 * r + e % 2] - number(x, e) * along;
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

    float *record = records + (blockIdx.x * (size_t)gridDim.y + blockIdx.y) * moments_record(S, P, HS);
    float *to_M1 = record + S, *to_M2 = to_M1 + S * HS, *to_amplitude = to_M2 + S * P, *to_frequency = to_amplitude + S,
          *to_psi = to_frequency + S;
#pragma unroll
    for (int i = 0; i < OWN; i++)
#pragma unroll
        for (int e = 0; e < 8; e++) {
            int block = warp + 4 * i, s = block / COLUMNS * 16 + g + e % 4 / 2 * 8,
                column = block % COLUMNS * 16 + e / 4 * 8 + 2 * t + e % 2;
            if (s >= S || (BLOCKS % 4 && block >= BLOCKS)) continue;
            to_M1[s * HS + column] = M1[i][e / 4][e % 4];
            if (DIAGONAL) to_M2[s * HS + column] = M2[i][e / 4][e % 4];
        }
    float *sums = (float *)stages; /* (4 warps, SP, 5) */
    __syncthreads();
#pragma unroll
    for (int c = 0; c < GROUPS; c++)
#pragma unroll
        for (int e = 0; e < E; e++) {
            float all[5] = {M0[c][e], amplitude[c][e], frequency[c][e], square_sum[c][e], psi[c][e]};
#pragma unroll
            for (int i = 0; i < 5; i++) {
                for (int row = 4; row < 32; row *= 2) all[i] += __shfl_xor_sync(~0u, all[i], row);
                if (g == 0) sums[(warp * SP + GROUP * c + E * t + e) * 5 + i] = all[i];
            }
        }
    __syncthreads();
    for (int s = threadIdx.x; s < S; s += 128)
        for (int i = 0; i < 5; i++) {
            float sum = 0;
            for (int from = 0; from < 4; from++) sum += sums[(from * SP + s) * 5 + i];
            if (i == 0) record[s] = sum;
            if (i == 1) to_amplitude[s] = sum;
            if (i == 2) to_frequency[s] = sum;
            if (i == 3 && !DIAGONAL) to_M2[s] = sum;
            if (i == 4) to_psi[s] = sum;
        }
}

/* sums (heads, record) = sums of the records (heads, count, record), in a fixed order (MODEL.md 5), and in double, as
   M1 - M0 mu cancels (4.6) */
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

/* One warp a splat: adds to d the gradients of the parameters p that follow from its moments (MODEL.md 3.4), as
   splat_gradients in train_gsa.c. scan (heads, scan_sums_record): the scan's own sums; NULL: those for d ln alpha,
   d theta and d psi are among the moments. */
__global__ static void splat_gradients_kernel(SplatTensors d, SplatTensors p, const double *sums, const double *scan,
                                              size_t scan_SP, int S, int P, int HS) {
    size_t s = blockIdx.x, splat = (size_t)blockIdx.y * S + s;
    const double *M0 = sums + blockIdx.y * moments_record(S, P, HS), *M1 = M0 + S, *M2 = M1 + S * HS,
                 *amplitude = M2 + S * P, *frequency = amplitude + S, *decay = NULL, *psi = frequency + S;
    if (scan) {
        amplitude = scan + blockIdx.y * scan_sums_record(scan_SP);
        frequency = amplitude + scan_SP;
        decay = frequency + scan_SP;
        psi = decay + scan_SP;
    }
    double along = 0;
    for (int k = threadIdx.x; k < HS; k += 32) {
        double m = (double)p.mu[splat * HS + k], m1 = M1[s * HS + k],
               precision = P > HS ? 0 : (double)expf(p.log_precision[splat * P + (P > 1 ? k : 0)]);
        d.mu[splat * HS + k] += (float)(P > HS ? m1 : precision * (m1 - M0[s] * m));
        along += m * m1 - 0.5 * m * m * M0[s];
        if (P == HS)
            d.log_precision[splat * HS + k] +=
                (float)(-0.5 * precision * (M2[s * HS + k] - 2 * m * m1 + m * m * M0[s]));
    }
    for (int k = threadIdx.x; k < P && P > HS; k += 32) d.log_precision[splat * P + k] += (float)M2[s * P + k];
    along = warp_sum(along);
    if (threadIdx.x > 0) return;
    if (P == 1) d.log_precision[splat] += (float)((double)expf(p.log_precision[splat]) * (along - 0.5 * M2[s]));
    d.log_alpha[splat] += (float)amplitude[s];
    if (d.log_theta) d.log_theta[splat] += (float)(exp((double)p.log_theta[splat]) * frequency[s]);
    if (d.log_delta) d.log_delta[splat] += (float)(exp((double)p.log_delta[splat]) * decay[s]);
    if (d.psi) d.psi[splat] += (float)psi[s];
    if (d.log_far && s == 0) d.log_far[blockIdx.y] += (float)psi[scan_SP];
}

/* ---- full precision: Lambda = L L^T, ln phi = -1/2 |L^T (x^ - mu)|^2

   Correct, not fast: plain fp32 products in shared memory, on tiles of FULL_TOKENS tokens. Of the 128 threads thread i
   has column i % HS and, of the tokens or rows, one of 128 / HS equal parts. A row of L takes HS + 1 numbers, so that
   neither its rows nor its columns meet in a bank. */

enum { FULL_TOKENS = 32 };
template <int HS>
constexpr size_t full_bytes = (HS * (HS + 1) + 2 * FULL_TOKENS * (HS + 1) + HS + FULL_TOKENS * (SPLATS_MOST + 2)) *
                              sizeof(float);

template <int HS> struct FullRoom {
    /* (HS, HS + 1), (tokens, HS + 1) twice, (HS), (tokens, SPLATS_MOST), (tokens) */
    float *L, *x, *y, *mu, *response, *inverse;
};
template <int HS> __device__ static inline FullRoom<HS> full_room(float *shared) {
    FullRoom<HS> m;
    m.L = shared;
    m.x = m.L + HS * (HS + 1);
    m.y = m.x + FULL_TOKENS * (HS + 1);
    m.mu = m.y + FULL_TOKENS * (HS + 1);
    m.response = m.mu + HS;
    m.inverse = m.response + FULL_TOKENS * SPLATS_MOST;
    return m;
}

/* mu and L of a splat; its index counts S a head, without padding */
template <int HS>
__device__ static inline void full_load_splat(const FullRoom<HS> &m, const SplatTables &w, size_t splat) {
    constexpr int P = HS * (HS + 1) / 2;
    for (int i = threadIdx.x; i < HS * HS; i += 128) {
        int row = i / HS, k = i % HS;
        float entry = k > row ? 0 : w.log_precision[splat * P + row * (row + 1) / 2 + k];
        m.L[row * (HS + 1) + k] = row == k ? expf(entry) : entry;
    }
    for (int i = threadIdx.x; i < HS; i += 128) m.mu[i] = w.mu[splat * HS + i];
}

/* x^ of the tile's tokens, zeros from N on */
template <int HS>
__device__ static inline void full_load_tokens(const FullRoom<HS> &m, const floatX *x, size_t stride, size_t first,
                                               size_t N, bool raw) {
    for (int i = threadIdx.x; i < FULL_TOKENS * HS; i += 128)
        m.x[i / HS * (HS + 1) + i % HS] = first + i / HS < N ? (float)x[(first + i / HS) * stride + i % HS] : 0;
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
__global__ static void __launch_bounds__(128)
    splat_full_forward_kernel(floatX *features, const floatX *qkv, SplatTables w, ScanResponsesAt scan,
                              const __grid_constant__ HeadList heads, size_t first_head, size_t N, size_t T, size_t C,
                              int S) {
    extern __shared__ float shared[];
    FullRoom<HS> m = full_room<HS>(shared);
    size_t head = first_head + blockIdx.y, first = (size_t)blockIdx.x * FULL_TOKENS, side = blockIdx.z,
           column = side * C + heads.head[blockIdx.y] * HS;
    full_load_tokens(m, qkv + column, 3 * C, first, N, w.raw);
    for (int s = 0; s < S; s++) {
        full_load_splat(m, w, head * S + s);
        __syncthreads();
        full_across(m);
        __syncthreads();
        if (threadIdx.x < FULL_TOKENS) {
            float square = 0;
            for (int k = 0; k < HS; k++) square += m.y[threadIdx.x * (HS + 1) + k] * m.y[threadIdx.x * (HS + 1) + k];
            m.response[threadIdx.x * SPLATS_MOST + s] =
                isinf(w.centre[head * w.SP + s]) ? -INFINITY
                                                 : -0.5f * square + (side ? 0 : w.log_alpha[head * w.SP + s]);
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
        uint32_t phase = side && w.phases ? w.phases[head * w.SP + s] : 0;
        fast_sincos(wave_angle(w.steps[head * w.SP + s], (uint32_t)n % (uint32_t)T, phase), &sine, &cosine);
        to[s] = (floatX)(f * cosine);
        to[S + s] = (floatX)(f * sine);
    }
}

/* G of token n, side and splat s, and in cross X, the gradient of its angle (MODEL.md 3.3) */
__device__ static inline float full_gradient(float *cross, const floatX *dfeatures, const floatX *features,
                                             const SplatTables &w, const ScanResponsesAt &scan, size_t n, size_t side,
                                             size_t listed, size_t heads, size_t column, size_t N, size_t T, size_t C,
                                             int S, int s) {
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

/* One block a head: dalive (heads, S) += sum |dL / d ln phi_s| over the queries and keys of `count` evenly spaced
   tokens, scaled to all N. For adaptation; a kernel of its own, because it runs now and then and
   splat_backward_kernel has no register to spare. */
__global__ static void splat_watch_kernel(float *dalive, ScanResponsesAt scan, const floatX *dfeatures,
                                          const floatX *features, SplatTables w, const __grid_constant__ HeadList heads,
                                          size_t N, size_t T, size_t count, size_t C, size_t HS, int S) {
    __shared__ float partial[8][SPLATS_MOST];
    int row = threadIdx.x / 32;
    for (int s = threadIdx.x % 32; s < S; s += 32) {
        float sum = 0, cross;
        for (size_t i = row; i < 2 * count; i += 8)
            sum += fabsf(full_gradient(&cross, dfeatures, features, w, scan, i / 2 * (N / count), i % 2, blockIdx.x,
                                       heads.count, i % 2 * C + heads.head[blockIdx.x] * HS, N, T, C, S, s));
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
__global__ static void __launch_bounds__(128)
    splat_full_backward_kernel(floatX *dqkv, const floatX *dfeatures, const floatX *features, const floatX *qkv,
                               SplatTables w, ScanResponsesAt scan, const __grid_constant__ HeadList heads,
                               size_t first_head, size_t N, size_t T, size_t C, int S) {
    constexpr int PARTS = 128 / HS, ROWS = FULL_TOKENS / PARTS;
    extern __shared__ float shared[];
    FullRoom<HS> m = full_room<HS>(shared);
    size_t head = first_head + blockIdx.y, first = (size_t)blockIdx.x * FULL_TOKENS, side = blockIdx.z,
           column = side * C + heads.head[blockIdx.y] * HS;
    int k = threadIdx.x % HS, part = threadIdx.x / HS;
    float gradient[ROWS] = {}, cross;
    full_load_tokens(m, qkv + column, 3 * C, first, N, w.raw);
    for (int i = threadIdx.x; i < FULL_TOKENS * S; i += 128)
        m.response[i / S * SPLATS_MOST + i % S] =
            full_gradient(&cross, dfeatures, features, w, scan, first + i / S, side, blockIdx.y, heads.count, column, N,
                          T, C, S, i % S);
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
        for (int i = threadIdx.x % 32; i < HS; i += 32)
            to[i] = (floatX)(m.inverse[t] * (g[i] - x[i] * dot) + (scan.add ? (float)to[i] : 0));
    }
}

/* One block a splat: its sums over all tokens, in order: dmu, dL, d ln alpha, d theta, d psi */
template <int HS>
__global__ static void __launch_bounds__(128)
    splat_full_moments_kernel(double *sums, const floatX *dfeatures, const floatX *features, const floatX *qkv,
                              SplatTables w, ScanResponsesAt scan, const __grid_constant__ HeadList heads,
                              size_t first_head, size_t N, size_t T, size_t C, int S) {
    constexpr int P = HS * (HS + 1) / 2, PARTS = 128 / HS, ROWS = HS / PARTS;
    extern __shared__ float shared[];
    FullRoom<HS> m = full_room<HS>(shared);
    int s = blockIdx.x, k = threadIdx.x % HS, part = threadIdx.x / HS;
    size_t head = first_head + blockIdx.y;
    float dL[ROWS] = {}, sum = 0; /* of dL the part's rows in column k; the sum over tokens of dy_k */
    double amplitude = 0, frequency = 0, psi = 0;
    full_load_splat(m, w, head * S + s);
    for (size_t first = 0; first < N; first += FULL_TOKENS)
        for (size_t side = 0; side < 2; side++) {
            size_t column = side * C + heads.head[blockIdx.y] * HS;
            __syncthreads();
            full_load_tokens(m, qkv + column, 3 * C, first, N, w.raw);
            full_across(m);
            if (threadIdx.x < FULL_TOKENS) {
                size_t n = first + threadIdx.x;
                float cross, gradient = full_gradient(&cross, dfeatures, features, w, scan, n, side, blockIdx.y,
                                                      heads.count, column, N, T, C, S, s);
                m.response[threadIdx.x] = gradient;
                if (side == 0) amplitude += (double)gradient;
                else psi += (double)cross;
                frequency += ((double)((uint32_t)n % (uint32_t)T) - 0.5 * (double)(T - 1)) * (double)cross;
            }
            __syncthreads();
            for (int t = 0; t < FULL_TOKENS; t++) {
                float across = -m.response[t] * m.y[t * (HS + 1) + k];
                if (part == 0) sum += across;
#pragma unroll
                for (int i = 0; i < ROWS; i++)
                    dL[i] += (m.x[t * (HS + 1) + part * ROWS + i] - m.mu[part * ROWS + i]) * across;
            }
        }
    __syncthreads();
    if (part == 0) m.y[k] = sum;
    __syncthreads();
    double *M1 = sums + blockIdx.y * moments_record(S, P, HS) + S + s * HS, *M2 = M1 - s * HS + S * HS + (size_t)s * P,
           *to = M2 - (size_t)s * P + (size_t)S * P;
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
    amplitude = warp_sum(amplitude);
    frequency = warp_sum(frequency);
    psi = warp_sum(psi);
    if (threadIdx.x == 0) {
        to[s] = amplitude;
        to[S + s] = frequency;
        to[2 * S + s] = psi;
    }
}

template <int HS>
static void splat_full_forward(floatX *features, ScanResponsesAt scan, const floatX *qkv, SplatTables w, HeadList heads,
                               size_t first_head, size_t N, size_t T, size_t C, int S, cudaStream_t stream) {
    cudaCheck(cudaFuncSetAttribute(splat_full_forward_kernel<HS>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   (int)full_bytes<HS>));
    splat_full_forward_kernel<HS>
        <<<dim3((unsigned)CEIL_DIV(N, (size_t)FULL_TOKENS), (unsigned)heads.count, 2), 128, full_bytes<HS>, stream>>>(
            features, qkv, w, scan, heads, first_head, N, T, C, S);
}

template <int HS>
static void splat_full_backward(floatX *dqkv, double *sums, ScanResponsesAt scan, const floatX *dfeatures,
                                const floatX *features, const floatX *qkv, SplatTables w, HeadList heads,
                                size_t first_head, size_t N, size_t T, size_t C, int S, cudaStream_t stream) {
    cudaCheck(cudaFuncSetAttribute(splat_full_backward_kernel<HS>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   (int)full_bytes<HS>));
    cudaCheck(cudaFuncSetAttribute(splat_full_moments_kernel<HS>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   (int)full_bytes<HS>));
    splat_full_backward_kernel<HS>
        <<<dim3((unsigned)CEIL_DIV(N, (size_t)FULL_TOKENS), (unsigned)heads.count, 2), 128, full_bytes<HS>, stream>>>(
            dqkv, dfeatures, features, qkv, w, scan, heads, first_head, N, T, C, S);
    splat_full_moments_kernel<HS><<<dim3((unsigned)S, (unsigned)heads.count), 128, full_bytes<HS>, stream>>>(
        sums, dfeatures, features, qkv, w, scan, heads, first_head, N, T, C, S);
}

/* Calls LAUNCH(head size, splats, diagonal?, for the scan?) with constants. */
#define BY_COVARIANCE(HS, SP, diagonal, SCAN) \
    BY_HEAD_SIZE(HS, {                        \
        if (diagonal) {                       \
            LAUNCH(H, SP, true, SCAN);        \
        } else {                              \
            LAUNCH(H, SP, false, SCAN);       \
        }                                     \
    })
#define BY_SPLATS(HS, S, diagonal, scan)                                \
    do {                                                                \
        if ((scan) && (S) <= 16) BY_COVARIANCE(HS, 16, diagonal, true); \
        else if (scan) BY_COVARIANCE(HS, 32, diagonal, true);           \
        else if ((S) <= 32) BY_COVARIANCE(HS, 32, diagonal, false);     \
        else BY_COVARIANCE(HS, 64, diagonal, false);                    \
    } while (0)

/* Tiles of 64 tokens that a block works on, so that a layer has about SPLAT_BLOCKS blocks. It decides the order of
   sums, so it depends on shapes alone (MODEL.md 5). */
enum { SPLAT_BLOCKS = 1536 };
static size_t splat_tiles(size_t N, size_t heads) { return CEIL_DIV(CEIL_DIV(N, 64) * heads, (size_t)SPLAT_BLOCKS); }
/* per head */
static size_t splat_records(size_t N, size_t heads) { return CEIL_DIV(CEIL_DIV(N, 64), splat_tiles(N, heads)); }

/* Equations (2), (6), (7), (9): features of q and k of the listed heads, the first of which is GSA head first_head:
   f = [a phi_s(x^) cos(theta_s n), a phi_s(x^) sin(theta_s n), 0 ...], a = alpha_s for queries and 1 for keys, whose
   angles are theta_s n + psi_s; or the scan's responses. P: numbers per precision */
static void splat_forward(floatX *features, ScanResponsesAt scan, const floatX *qkv, SplatTables w, HeadList heads,
                          size_t first_head, size_t B, size_t T, size_t NH, size_t HS, size_t S, size_t P,
                          cudaStream_t stream) {
    bool diagonal = P > 1;
    if (P > HS) {
        BY_HEAD_SIZE(
            HS, (splat_full_forward<H>(features, scan, qkv, w, heads, first_head, B * T, T, NH * H, (int)S, stream)));
        return;
    }
    size_t N = B * T, tiles = splat_tiles(N, heads.count);
    /* heads first: blocks that run at one time read neighbours in memory */
    dim3 grid((unsigned)heads.count, (unsigned)splat_records(N, heads.count));
#define LAUNCH(H, SP, DIAGONAL, SCAN)                                                         \
    constexpr size_t bytes = (SP * H * (DIAGONAL ? 2 : 1) + 5 * SP) * sizeof(float);          \
    cudaCheck(cudaFuncSetAttribute(splat_forward_kernel<H, SP, DIAGONAL, SCAN>,               \
                                   cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes)); \
    splat_forward_kernel<H, SP, DIAGONAL, SCAN>                                               \
        <<<grid, 128, bytes, stream>>>(features, qkv, w, scan, heads, first_head, N, T, NH * HS, (int)S, tiles)
    BY_SPLATS(HS, S, diagonal, scan.responses);
#undef LAUNCH
}

/* dqkv of q and k of the listed heads; records (heads, splat_records, moments) and sums (heads, moments): see
   splat_gradients */
static void splat_backward(floatX *dqkv, float *records, double *sums, ScanResponsesAt scan, const floatX *dfeatures,
                           const floatX *features, const floatX *qkv, SplatTables w, HeadList heads, size_t first_head,
                           size_t B, size_t T, size_t NH, size_t HS, size_t S, size_t P, cudaStream_t stream) {
    bool diagonal = P > 1;
    if (P > HS) {
        BY_HEAD_SIZE(HS, (splat_full_backward<H>(dqkv, sums, scan, dfeatures, features, qkv, w, heads, first_head,
                                                 B * T, T, NH * H, (int)S, stream)));
        return;
    }
    size_t N = B * T, tiles = splat_tiles(N, heads.count), count = splat_records(N, heads.count),
           record = moments_record(S, diagonal ? HS : 1, HS);
    dim3 grid((unsigned)heads.count, (unsigned)count);
#define LAUNCH(H, SP, DIAGONAL, SCAN)                                                         \
    constexpr size_t bytes = SplatBackwardShape<H, SP, DIAGONAL, SCAN>::bytes;                \
    cudaCheck(cudaFuncSetAttribute(splat_backward_kernel<H, SP, DIAGONAL, SCAN>,              \
                                   cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes)); \
    splat_backward_kernel<H, SP, DIAGONAL, SCAN><<<grid, 128, bytes, stream>>>(               \
        dqkv, records, dfeatures, features, qkv, w, scan, heads, first_head, N, T, NH * HS, (int)S, tiles)
    BY_SPLATS(HS, S, diagonal, scan.responses);
#undef LAUNCH
    moments_sums_kernel<<<dim3((unsigned)CEIL_DIV(record, 32), (unsigned)heads.count), dim3(32, 16), 0, stream>>>(
        sums, records, count, record);
    cudaCheck(cudaGetLastError());
}
