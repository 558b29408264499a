/* ---------------------------------------------------------------------- scan

   The linear mixer, equation (5), as a recurrence (MODEL.md 2.5): chunks of 64 tokens, and between them the state, H =
   sum f_k v^T (F, HS) and z = sum f_k (F), which decays and turns from chunk to chunk. Positions in a chunk count from
   its middle, so that exponentials stay below e^(32 delta) (MODEL.md 4.2).

   splat_forward leaves the responses r and phi (2, B, heads, T, SP). From them a block of threads makes the features of
   a chunk, equation (10): F = 3 SP columns. Column 8n + 2t + e is the constant part of splat 8n + 4e + t; columns SP +
   2s and SP + 2s + 1 are the cosine and the sine of splat s. In this order the columns that one lane holds of a product
   (mma_16x8x16) are all three parts of its splats, 4j + t for each j. Without a cosine two of three are zeros.

   A block of 4 warps walks one segment of one head of one sequence. Where B times heads does not fill a card, sequences
   are cut into segments: a first pass sums up each segment alone, scan_merge_kernel adds these sums one after the other
   to the states at the segments' starts, and a second pass walks all segments at once. Backward the same, in two
   sweeps (MODEL.md 3.2): scan_queries_kernel goes forwards with H, for the gradients of queries; scan_keys_kernel goes
   backwards with the gradient of H, for those of keys and values.

   A state in memory: number i of H of all 128 threads, for each i, then z. */

enum { CHUNK = 64, SCAN_BLOCK = 256, SCAN_SPLATS_MOST = 32, SCAN_SEGMENTS_MOST = 528 };
/* what scan_forward_kernel makes of its sums: see there */
enum { SCAN_SUMS, SCAN_ALONE, SCAN_FIRST, SCAN_SECOND, SCAN_MERGED };

/* MODEL.md 4.4; the gradient of the second, a millionth, is left out here. */
#define ROW_SUM_EPSILON 1e-6
#define ROW_SUM_ROUNDING 1e-6

typedef struct {
    const floatX *qkv, *responses;
    SplatTables tables;
    HeadList heads; /* of the launch; the first is GSA head first_head */
    size_t first_head, B, T, NH;
    size_t segment; /* tokens of one segment, a multiple of SCAN_BLOCK */
    int segments;
    int sweeps;   /* of a backward pass: 2 in each direction */
    int late;     /* query i meets keys j <= i - late only */
    bool reverse; /* from the end, and without the query's own key */
} ScanInput;

/* ---- the memory of a block of threads

   Sizes that follow from HS and SP. FROW, VROW, TROW: rows of features, of values and of the table, longer than they
   need to be so that neighbouring rows do not meet in a bank. TILES: of 8 columns of features; PAIRS: of 16; OWN: so
   many of these a warp has of z; M: how often the four warps' 64 rows are needed to cover the HS rows of H^T. */

template <int HS, int SP> struct ScanShape {
    static constexpr bool WIDE = sizeof(floatX) == 4;
    static constexpr int F = 3 * SP, PAD = WIDE ? 4 : 8, FROW = F + PAD, VROW = HS + PAD, TROW = F + 4, TILES = F / 8,
                         M = HS > 64 ? 2 : 1, PAIRS = TILES / 2, OWN = (PAIRS + 3) / 4;
    static constexpr int STAGES = WIDE ? 1 : 2, TASKS = SP / 16;
    static constexpr size_t STATE = 64 * M * F + F;
    /* in fp32 table, shift, lag, z, delta and rho; then features, state, r, and stages of `tiles` tiles of values */
    static constexpr size_t bytes(int tiles) {
        return (CHUNK * TROW + 6 * SP + F + 2 * CHUNK) * sizeof(float) +
               (2 * CHUNK * FROW + HS * FROW + CHUNK * SP + tiles * STAGES * CHUNK * VROW) * sizeof(floatX);
    }
};

/* So many blocks shall fit a multiprocessor at least, as their memory does: registers are limited to that. */
template <int HS, int SP> constexpr int scan_ctas = HS <= 64 && SP == 16 && sizeof(floatX) == 2 ? 3 : 1;

template <int HS, int SP> struct ScanRoom {
    float *table, *shift, *lag, *z, *delta, *rho;
    floatX *fq, *fk, *H, *r, *tiles;
};

template <int HS, int SP> __device__ static inline ScanRoom<HS, SP> scan_room(char *memory) {
    using Shape = ScanShape<HS, SP>;
    ScanRoom<HS, SP> m;
    m.table = (float *)memory;
    m.shift = m.table + CHUNK * Shape::TROW;
    m.lag = m.shift + 3 * SP;
    m.z = m.lag + 3 * SP;
    m.delta = m.z + Shape::F;
    m.rho = m.delta + CHUNK;
    m.fq = (floatX *)(m.rho + CHUNK);
    m.fk = m.fq + CHUNK * Shape::FROW;
    m.H = m.fk + CHUNK * Shape::FROW;
    m.r = m.H + HS * Shape::FROW;
    m.tiles = m.r + CHUNK * SP;
    return m;
}

/* shift (3, SP), what moving its origin by n tokens does to a state: decay, decay times cosine, decay times sine */
template <int SP>
__device__ static inline void scan_shift_table(float *shift, const ScanInput &in, size_t splats, size_t n) {
    for (int s = threadIdx.x; s < SP; s += 128) {
        float fade = expf(-in.tables.decay[splats + s] * (float)n), sine = 0, cosine = 1;
        if (in.tables.steps) fast_sincos(wave_angle(in.tables.steps[splats + s], n), &sine, &cosine);
        shift[s] = fade;
        shift[SP + s] = fade * cosine;
        shift[2 * SP + s] = fade * sine;
    }
}

/* table (CHUNK, TROW), what phi is multiplied by at each position a of a chunk, in the order of the features' columns:
   the growth e^(delta a) sqrt(1/2) (without waves 1 in place of the root), then the cosines and sines of theta a + psi,
   in a reversed scan theta a - psi. lag (3, SP) makes the queries' of it: their decay is lag[0] / growth, and their
   angle is further by theta late less the keys' psi. */
template <int HS, int SP>
__device__ static inline void scan_tables(const ScanRoom<HS, SP> &m, const ScanInput &in, size_t splats) {
    constexpr int TROW = ScanShape<HS, SP>::TROW;
    bool waves = in.tables.steps != NULL;
    auto phase = [&](int s) -> uint32_t {
        uint32_t psi = in.tables.phases ? in.tables.phases[splats + s] : 0;
        return in.reverse ? 0 - psi : psi;
    };
    for (int i = threadIdx.x; i < CHUNK * SP; i += 128) {
        int s = i % SP, a = i / SP, at = a - CHUNK / 2;
        float *pair = m.table + a * TROW + SP + 2 * s;
        m.table[a * TROW + s / 8 * 8 + s % 4 * 2 + s % 8 / 4] =
            (waves ? 0.70710678f : 1) * expf(in.tables.decay[splats + s] * (float)at);
        pair[0] = pair[1] = 0;
        /* a position before the middle is negative: as a phase it wraps (MODEL.md 4.1) */
        if (waves) fast_sincos(wave_angle(in.tables.steps[splats + s], (size_t)(uint32_t)at, phase(s)), pair + 1, pair);
    }
    for (int s = threadIdx.x; s < SP; s += 128) {
        m.lag[s] = (waves ? 0.5f : 1) * expf(-in.tables.decay[splats + s] * (float)in.late);
        m.lag[SP + s] = 1;
        m.lag[2 * SP + s] = 0;
        if (waves)
            fast_sincos(wave_angle(in.tables.steps[splats + s], (size_t)in.late, 0 - phase(s)), m.lag + 2 * SP + s,
                        m.lag + SP + s);
    }
}

/* Where a block works. Position p of a scan is token p, or where reversed the p-th token from the end; the key that
   arrives there is that of token p - late. */
struct ScanPlace {
    /* sequence, head, sequence x listed head, first splat in the tables, first number of the head's rows of one (B,
       NH, T) */
    size_t b, h, bh, splats, rows;
    int T, keys, start, chunks, late, g; /* keys: so many are ever met; g: the segment */
    int query0, key0, sign;              /* tokens of position 0, and the step to the next */
    bool turned;                         /* the queries' waves are not the keys': see scan_tables */
    /* the query's token at p; not in 0 .. T - 1: there is none */
    __device__ inline int query(int p) const { return query0 + sign * p; }
    __device__ inline int key(int p) const { return key0 + sign * p; } /* likewise, 0 .. keys - 1 */
    __device__ inline bool has_query(int token) const { return (unsigned)token < (unsigned)T; }
    __device__ inline bool has_key(int token) const { return (unsigned)token < (unsigned)keys; }
};

__device__ static inline ScanPlace scan_place(const ScanInput &in) {
    ScanPlace w;
    size_t i = blockIdx.x / in.segments % in.heads.count;
    w.bh = blockIdx.x / in.segments;
    w.g = (int)(blockIdx.x % in.segments);
    w.b = w.bh / in.heads.count;
    w.h = in.heads.head[i];
    w.splats = (in.first_head + i) * in.tables.SP;
    w.rows = (w.b * in.NH + w.h) * in.T;
    size_t first = w.g * in.segment, end = first + in.segment < in.T ? first + in.segment : in.T;
    w.T = (int)in.T;
    w.start = (int)first;
    w.chunks = first < end ? (int)CEIL_DIV(end - first, (size_t)CHUNK) : 0;
    w.late = in.late;
    w.turned = in.late > 0 || in.tables.phases;
    w.sign = in.reverse ? -1 : 1;
    w.query0 = in.reverse ? w.T - 1 : 0;
    w.key0 = in.reverse ? w.T - 1 : -w.late;
    w.keys = in.reverse ? w.T : w.late < w.T ? w.T - w.late : 0;
    return w;
}

/* The values (or dout) of one chunk into a tile, in the background; zeros where there is no token. base: the head's
   columns of the sequence's first token */
template <int HS, int SP, bool KEYS>
__device__ static inline void scan_load(floatX *tile, const floatX *base, size_t stride, const ScanPlace &w, int p0) {
    constexpr int ROWS = 128 / (HS / 8);
    int a = threadIdx.x / (HS / 8), c = threadIdx.x % (HS / 8) * 8, token = KEYS ? w.key(p0 + a) : w.query(p0 + a);
#pragma unroll
    for (int i = 0; i < CHUNK; i += ROWS, token += w.sign * ROWS) {
        bool inside = KEYS ? w.has_key(token) : w.has_query(token);
        copy_pack(tile + (a + i) * ScanShape<HS, SP>::VROW + c,
                  base + (size_t)(uint32_t)(inside ? token : 0) * (uint32_t)stride + c, inside);
    }
}

/* Responses on their way to features, in registers. A thread has row 16 warp + lane % 16 of a chunk and there every
   second group of eight splats, so that eight neighbouring lanes read eight rows, which do not meet in a bank. */
template <int SP> struct ScanResponses {
    Pack q[SP / 16], k[SP / 16];
    float rho;
};
__device__ static inline int scan_row(void) { return (int)threadIdx.x / 32 * 16 + (int)threadIdx.x % 16; }
__device__ static inline int scan_group(int u) { return (int)threadIdx.x % 32 / 16 + 2 * u; }

template <int SP>
__device__ static inline ScanResponses<SP> scan_fetch(const ScanInput &in, const ScanPlace &w, const float *rho,
                                                      int p0) {
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

/* Features (CHUNK, FROW) of the queries and of the keys of a chunk, each if wanted: responses (times rho, of queries)
   times the table. turned: the queries' waves are not the keys' */
template <int HS, int SP>
__device__ static inline void scan_features(const ScanRoom<HS, SP> &m, const ScanResponses<SP> &response, bool queries,
                                            bool keys, bool turned) {
    using Shape = ScanShape<HS, SP>;
    int a = scan_row();
#pragma unroll
    for (int u = 0; u < SP / 16; u++) {
        int group = scan_group(u);
        const float *table = m.table + a * Shape::TROW;
        float growth[8], waves[16], x[8], f[16];
        load_floats(growth, table + 8 * group);
        load_floats(waves, table + SP + 16 * group);
        load_floats(waves + 8, table + SP + 16 * group + 8);
        if (keys) {
            floatX *to = m.fk + a * Shape::FROW;
#pragma unroll
            for (int c = 0; c < 8; c++) { /* column c is the constant part of splat s */
                int s = c % 2 * 4 + c / 2;
                f[c] = x[s] = number(response.k[u], s) * growth[c];
            }
            *(Pack *)(to + 8 * group) = make_pack(f);
#pragma unroll
            for (int s = 0; s < 8; s++) {
                f[2 * s] = x[s] * waves[2 * s];
                f[2 * s + 1] = x[s] * waves[2 * s + 1];
            }
            *(Pack *)(to + SP + 16 * group) = make_pack(f);
            *(Pack *)(to + SP + 16 * group + 8) = make_pack(f + 8);
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
            if (turned) {
                float cosine[8], sine[8];
                load_floats(cosine, m.lag + SP + 8 * group);
                load_floats(sine, m.lag + 2 * SP + 8 * group);
#pragma unroll
                for (int s = 0; s < 8; s++) {
                    float c = waves[2 * s], z = waves[2 * s + 1];
                    waves[2 * s] = c * cosine[s] - z * sine[s];
                    waves[2 * s + 1] = z * cosine[s] + c * sine[s];
                }
            }
#pragma unroll
            for (int s = 0; s < 8; s++) {
                f[2 * s] = x[s] * waves[2 * s];
                f[2 * s + 1] = x[s] * waves[2 * s + 1];
            }
            *(Pack *)(to + SP + 16 * group) = make_pack(f);
            *(Pack *)(to + SP + 16 * group + 8) = make_pack(f + 8);
        }
    }
}

/* A warp's 16 rows of sums (16, HS) to memory, by way of its part of shared memory, so that rows leave in pieces of 16
   bytes. row(a): where row a of the chunk belongs, NULL: nowhere. add: what is there is kept, times keep(a), and x is
   added to it. */
template <int HS, int SP, typename Row, typename Keep>
__device__ static inline void scan_store_rows(floatX *room, float (&x)[HS / 8][4], bool add, Row row, Keep keep) {
    constexpr int ROWS = 256 / SP, TIMES = 16 / ROWS; /* rows at a time */
    int warp = warp_index(), lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, column = lane % (SP / 8) * 8;
    floatX *own = room + 16 * warp * SP, *to[TIMES];
    float factor[TIMES];
#pragma unroll
    for (int i = 0; i < TIMES; i++) {
        int a = lane / (SP / 8) + ROWS * i;
        to[i] = row(16 * warp + a);
        factor[i] = add ? keep(a) : 0;
    }
#pragma unroll
    for (int c = 0; c < HS; c += SP) {
        __syncwarp();
#pragma unroll
        for (int n = 0; n < SP / 8; n++) {
            store_two(own + g * SP + 8 * n + 2 * t, x[c / 8 + n][0], x[c / 8 + n][1]);
            store_two(own + (g + 8) * SP + 8 * n + 2 * t, x[c / 8 + n][2], x[c / 8 + n][3]);
        }
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

   In registers, as products of the tensor cores leave it: h[m][n] is the lane's part of rows 16 (warp + 4m) .. + 15 of
   H^T (HS, F), in tile n of its columns. z is dealt out by pairs of tiles: warp n % 4 has columns 16n .. 16n + 15, as a
   product whose 16 rows are all alike. */
template <int HS, int SP> struct ScanState {
    using Shape = ScanShape<HS, SP>;
    float h[Shape::M][Shape::TILES][4], z[Shape::OWN][2][4];

    __device__ inline void clear() {
#pragma unroll
        for (int i = 0; i < Shape::M * Shape::TILES * 4; i++)
            h[i / (Shape::TILES * 4)][i / 4 % Shape::TILES][i % 4] = 0;
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
            if (n < Shape::TILES)
                z[i / 8][i / 4 % 2][i % 4] = from[8 * n + 2 * t + i % 2] + (add ? z[i / 8][i / 4 % 2][i % 4] : 0);
        }
    }

    __device__ inline void put_z(float *to) const {
        int warp = warp_index(), lane = threadIdx.x % 32;
#pragma unroll
        for (int i = 0; i < Shape::OWN * 2; i++) {
            int n = 2 * (warp + 4 * (i / 2)) + i % 2;
            if (n < Shape::TILES && lane < 4)
                *(float2 *)(to + 8 * n + 2 * lane) = make_float2(z[i / 2][i % 2][0], z[i / 2][i % 2][1]);
        }
    }

    __device__ inline void store(float *to) const {
#pragma unroll
        for (int i = 0; i < Shape::M * Shape::TILES * 4; i++)
            to[i * 128 + threadIdx.x] = h[i / (Shape::TILES * 4)][i / 4 % Shape::TILES][i % 4];
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
                if (16 * (warp + 4 * i) < HS) {
                    store_two(to, h[i][n][0], h[i][n][1]);
                    store_two(to + 8 * Shape::FROW, h[i][n][2], h[i][n][3]);
                }
            }
        put_z(m.z);
    }

    /* Moves the origin by the tokens of the table; transposed: what that does to the gradient of a state. */
    __device__ inline void shift(const float *table, bool transposed) {
        int warp = warp_index(), t = threadIdx.x % 4;
        auto turn = [](float &x, float &y, float cosine, float sine) {
            float old = x;
            x = cosine * old + sine * y;
            y = cosine * y - sine * old;
        };
#pragma unroll
        /* splat 4j + t: its constant part is column j % 2 of tile j / 2, its waves are the pair of tile SP / 8 + j */
        for (int j = 0; j < SP / 4; j++) {
            float fade = table[4 * j + t], cosine = table[SP + 4 * j + t],
                  sine = transposed ? -table[2 * SP + 4 * j + t] : table[2 * SP + 4 * j + t];
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
                turn(x[0], x[1], cosine, sine);
                turn(x[2], x[3], cosine, sine);
            }
        }
    }

    /* h += tile^T features, z += weights^T features over the tokens of a chunk; weights NULL: ones. So that bf16 does
       not round them, weights are two numbers each: the rounded one and what rounding left. */
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
                rest = fill_fragment(w[0] - fragment_number(whole, 0), w[1] - fragment_number(whole, 1),
                                     w[8] - fragment_number(whole, 4), w[9] - fragment_number(whole, 5));
            } else whole = fill_fragment(1, 1, 1, 1);
#pragma unroll
            for (int n = 0; n < Shape::PAIRS; n++) {
                FragmentB b[2];
                load_b<true>(b, features, Shape::FROW, 16 * k, 16 * n);
#pragma unroll
                for (int m = 0; m < Shape::M; m++)
                    if (16 * (warp + 4 * m) < HS) {
                        mma_16x8x16(h[m][2 * n], a[m], b[0]);
                        mma_16x8x16(h[m][2 * n + 1], a[m], b[1]);
                    }
                if (n % 4 != warp) continue;
                mma_16x8x16(z[n / 4][0], whole, b[0]);
                mma_16x8x16(z[n / 4][1], whole, b[1]);
                if (weights) {
                    mma_16x8x16(z[n / 4][0], rest, b[0]);
                    mma_16x8x16(z[n / 4][1], rest, b[1]);
                }
            }
        }
    }
};

/* ---- kernels */

/* N = sum_j w_ij v_j and D = sum_j w_ij of each query, and from them out and rho, by mode:
     SCAN_ALONE   out = N / (D + eps), rho = 1 / (D + eps)
     SCAN_FIRST   the first of an encoder's two scans: out = N / D, rho = D
     SCAN_SECOND  the reversed one: from what the first left, out and rho of both together
     SCAN_MERGED  equation (12): from out and lse of the softmax nearby, those of both parts; rho = lambda / D
   SCAN_SUMS makes no output, only the state at the end of each segment, from zero at its start, into states. In all
   other modes states are those at the segments' starts; NULL: zero.
   Long, because its steps share what a lane holds of H, z, N and D in registers: one chunk is products with the keys of
   the chunk and with the state, the row sums, the output, and the update of the state. */
template <int HS, int SP>
__global__ static void __launch_bounds__(128, scan_ctas<HS, SP>)
    scan_forward_kernel(floatX *out, float *lse, float *rho, float *states, const float *log_far, int mode,
                        const __grid_constant__ ScanInput in) {
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
        /* the values have arrived, and all have finished with the chunk before (at first: the tables are there) */
        __syncthreads();
        scan_features(m, next, mode != SCAN_SUMS, true, w.turned);
        if (mode != SCAN_SUMS) state.share(m);
        next = scan_fetch<SP>(in, w, NULL, p0 + CHUNK);
        if (Shape::STAGES == 2 && c + 1 < w.chunks)
            scan_load<HS, SP, true>(m.tiles + (c + 1) % 2 * CHUNK * VROW, values, 3 * C, w, p0 + CHUNK);
        copies_commit();
        __syncthreads();
        if (mode != SCAN_SUMS) {
            /* p: of the weights; o: of N; sum, constant: of D and D0 (MODEL.md 4.4), in the thread's two rows */
            float p[8][4] = {}, o[HS / 8][4] = {}, sum[2] = {}, constant[2] = {};
#pragma unroll
            for (int k = 0; k < Shape::F / 16; k++) {
                FragmentA a = load_a<false>(m.fq, FROW, 16 * warp, 16 * k);
                FragmentB b[2];
#pragma unroll
                for (int n = 0; n < 8; n += 2)
                    if (n / 2 <= warp)
                        load_b<false>(b, m.fk, FROW, 8 * n, 16 * k), mma_16x8x16(p[n], a, b[0]),
                            mma_16x8x16(p[n + 1], a, b[1]);
#pragma unroll
                for (int n = 0; n < HS / 8; n += 2)
                    load_b<false>(b, m.H, FROW, 8 * n, 16 * k), mma_16x8x16(o[n], a, b[0]),
                        mma_16x8x16(o[n + 1], a, b[1]);
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
                            if (8 * (i / 4) + 2 * t + i % 2 + in.reverse <= g + i / 2 % 2 * 8)
                                constant[i / 2 % 2] += p[2 * n + i / 4][i % 4];
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
                for (int n = 0; n < HS / 8; n += 2)
                    load_b<true>(b, v, VROW, 16 * k, 8 * n), mma_16x8x16(o[n], a, b[0]), mma_16x8x16(o[n + 1], a, b[1]);
            }
            /* what an earlier kernel left of the row, and how much of its output stays */
            float before[2], keep[2] = {};
#pragma unroll
            for (int r = 0; r < 2; r++) {
                int token = w.query(p0 + 16 * warp + g + 8 * r);
                before[r] = mode < SCAN_SECOND || !w.has_query(token) ? 0
                            : mode == SCAN_SECOND                     ? rho[w.rows + token]
                                                                      : lse[w.rows + token];
            }
            __syncwarp(); /* all four lanes of a row have read it; one will overwrite it */
#pragma unroll
            for (int r = 0; r < 2; r++) {
                int token = w.query(p0 + 16 * warp + g + 8 * r);
                float D0 = quad_sum(constant[r]), D = quad_sum(sum[r]) + (float)ROW_SUM_ROUNDING * D0, left = before[r],
                      kept = 0, factor = 0;
#ifndef GSA_FP32
                D = fmaxf(D, D0 / 128); /* where cosines cancel only the rounding of features is left: MODEL.md 4.4 */
#endif
                if (mode == SCAN_ALONE) factor = kept = 1 / (D + (float)ROW_SUM_EPSILON);
                else if (mode == SCAN_FIRST) {
                    factor = D > 0 ? 1 / D : 0;
                    kept = D > 0 ? D : 0;
                } else if (mode == SCAN_SECOND) {
                    factor = kept = 1 / (left + D + (float)ROW_SUM_EPSILON);
                    keep[r] = left * factor;
                } else {
                    keep[r] = 1;
                    if (D > 0) {
                        float far = log_far[w.splats / in.tables.SP] + in.tables.key_scale[w.splats / in.tables.SP] +
                                    logf(D),
                              most = fmaxf(far, left);
                        left = most + logf(expf(far - most) + expf(left - most));
                        float share = expf(far - left);
                        factor = kept = share / D;
                        keep[r] = 1 - share;
                    }
                }
                if (t == 0 && w.has_query(token)) {
                    rho[w.rows + token] = kept;
                    if (mode == SCAN_MERGED) lse[w.rows + token] = left;
                }
#pragma unroll
                for (int n = 0; n < HS / 8; n++) {
                    o[n][2 * r] *= factor;
                    o[n][2 * r + 1] *= factor;
                }
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

/* states (B, heads, segments) from the sums of each segment alone: what has gathered before it; backward: from the end,
   the gradients of states */
template <int HS, int SP>
__global__ static void __launch_bounds__(128)
    scan_merge_kernel(float *__restrict__ states, const float *__restrict__ sums, bool backward,
                      const __grid_constant__ ScanInput in) {
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
template <int SP>
__device__ static inline float *scan_record_at(float *records, const ScanInput &in, const ScanPlace &w, int sweep) {
    return records + (((w.bh % in.heads.count * in.sweeps + 2 * in.reverse + sweep) * in.B + w.b) * in.segments + w.g) *
                         scan_sums_record(SP);
}

/* One record of a sweep: d ln alpha, d theta, d delta, d psi (SP each), d ln g, summed over the block's threads in a
   fixed order. */
template <int SP>
__device__ static inline void scan_record(float *record, float *shared, float (&amplitude)[SP / 4],
                                          float (&frequency)[SP / 4], float (&decay)[SP / 4], float (&psi)[SP / 4],
                                          float gain) {
    constexpr int RECORD = scan_sums_record(SP);
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    __syncthreads();
    auto put = [&](float x, int at, bool all) {
        if (all) x = quad_sum(x);
        for (int other = 4; other < 32; other *= 2) x += __shfl_xor_sync(~0u, x, other);
        if (all ? lane == 0 : lane < 4) shared[warp * RECORD + at + (all ? 0 : lane)] = x;
    };
#pragma unroll
    for (int j = 0; j < SP / 4; j++) {
        put(amplitude[j], 4 * j, false);
        put(frequency[j], SP + 4 * j, false);
        put(decay[j], 2 * SP + 4 * j, false);
        put(psi[j], 3 * SP + 4 * j, false);
    }
    put(gain, 4 * SP, true);
    __syncthreads();
    for (int i = threadIdx.x; i < RECORD; i += 128)
        record[i] = ((shared[i] + shared[RECORD + i]) + shared[2 * RECORD + i]) + shared[3 * RECORD + i];
}

/* A warp's 16 rows of gradients of responses, which it has put into columns 0 .. SP - 1 of its rows of the features, to
   memory. token(row): -1: there is none */
template <int HS, int SP, typename Token>
__device__ static inline void scan_store_gradients(floatX *to, const floatX *tile, bool add, Token token) {
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

/* The first sweep of the backward pass, forwards in time, for queries (MODEL.md 3.2, 3.3):
     dw_ij = rho_i (do_i . v_j - Delta_i), Delta_i = do_i . o_i (written to delta), df_q(i) = sum_j dw_ij f_k(j),
     Q = f_q df_q, dl = Q - r sum_u Q_u: into gradients (B, heads, T, SP), or added to it,
     and the queries' part of d theta and d delta. Positions count from the middle of spans of SCAN_BLOCK tokens.
   blocks: the state at the beginning of each span is kept there, for the second sweep's part of d theta and d delta.
   Long, because its steps share what a lane holds of H, z, df_q and the sums in registers. */
template <int HS, int SP>
__global__ static void __launch_bounds__(128, scan_ctas<HS, SP>)
    scan_queries_kernel(floatX *gradients, float *delta, float *blocks, float *records, const float *states,
                        const floatX *dout, const floatX *out, const float *rho, bool add,
                        const __grid_constant__ ScanInput in) {
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
    float amplitude[SP / 4] = {}, frequency[SP / 4] = {}, decay[SP / 4] = {}, psi[SP / 4] = {}, gain = 0;
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
        /* this thread's half of a row of dout and out */
        int a = threadIdx.x / 2, part = threadIdx.x % 2 * (HS / 2), token = w.query(p0 + a);
        Pack o[HS / 16];
#pragma unroll
        for (int k = 0; k < HS / 16; k++) {
            o[k] = Pack{};
            if (w.has_query(token)) o[k] = load_pack(out + in_out + (uint32_t)token * C + part + 8 * k);
        }
        float row_factor = w.has_query(token) ? rho[w.rows + token] : 0;
        copies_wait();
        __syncthreads();
        scan_features(m, next, true, true, w.turned);
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
            m.delta[a] = sum;
            m.rho[a] = row_factor;
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
                if (n / 2 <= warp)
                    load_b<false>(b, v, VROW, 8 * n, 16 * k), mma_16x8x16(dp[n], a, b[0]),
                        mma_16x8x16(dp[n + 1], a, b[1]);
#pragma unroll
            for (int n = 0; n < Shape::TILES; n += 2)
                load_b<true>(b, m.H, FROW, 16 * k, 8 * n), mma_16x8x16(df[n], a, b[0]), mma_16x8x16(df[n + 1], a, b[1]);
        }
        float row_delta[2] = {m.delta[16 * warp + g], m.delta[16 * warp + g + 8]},
              row_rho[2] = {m.rho[16 * warp + g], m.rho[16 * warp + g + 8]};
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
            for (int n = 0; n < Shape::TILES; n += 2)
                load_b<true>(b, m.fk, FROW, 16 * k, 8 * n), mma_16x8x16(df[n], a, b[0]),
                    mma_16x8x16(df[n + 1], a, b[1]);
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
                float q = (j % 2 ? constants.y : constants.x) * row_rho[r] * df[j / 2][2 * r + j % 2] + wave.x * dc +
                          wave.y * ds;
                frequency[j] += at * (wave.x * ds - wave.y * dc);
                decay[j] -= at * q;
                Q[r][j] = q;
                total += q;
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
        for (int i = 0; i < SP / 2; i++)
            m.fq[(16 * warp + g + i % 2 * 8) * FROW + i / 2 * 4 + t] = (floatX)Q[i % 2][i / 2];
        __syncwarp();
        scan_store_gradients<HS, SP>(gradients + w.bh * in.T * SP, m.fq, add,
                                     [&](int a) { return w.has_query(w.query(p0 + a)) ? w.query(p0 + a) : -1; });
        state.absorb(v, m.fk, NULL);
        state.shift(m.shift, false);
        if (Shape::STAGES == 1) {
            __syncthreads();
            if (c + 1 < w.chunks) load(0, p0 + CHUNK);
        }
    }
    scan_record<SP>(scan_record_at<SP>(records, in, w, 0), (float *)memory, amplitude, frequency, decay, psi, gain);
}

/* The second sweep, backwards in time, for keys and values (MODEL.md 3.2, 3.3). It carries the gradient of the state,
   dH = sum f_q rho do^T and dz = -sum f_q rho Delta, so f_q is made with its factor rho.
     df_k(j) = sum_i dw_ij f_q(i), K = f_k df_k: into gradients (B, heads, T, SP), or added to it where `add`;
     dv_j = sum_i w_ij rho_i do_i: into the third part of dqkv, or added to it where `add_values`;
     the keys' part of d theta and d delta, and d psi. Positions count within spans of SCAN_BLOCK tokens; what pairs of
     tokens in different spans add besides is SCAN_BLOCK times a product of H and dH at each border (MODEL.md 4.5).
   sums not NULL: none of this, only the gradient of the state at the start of each segment, from zero at its end.
   Long, because its steps share what a lane holds of dH, dz, df_k and the sums in registers. */
template <int HS, int SP>
__global__ static void __launch_bounds__(128, scan_ctas<HS, SP>)
    scan_keys_kernel(floatX *gradients, floatX *dqkv, float *sums, float *records, const float *states,
                     const float *blocks, const floatX *dout, const float *rho, const float *delta, bool add,
                     bool add_values, const __grid_constant__ ScanInput in) {
    using Shape = ScanShape<HS, SP>;
    constexpr int FROW = Shape::FROW, VROW = Shape::VROW;
    extern __shared__ __align__(1024) char memory[];
    ScanRoom<HS, SP> m = scan_room<HS, SP>(memory);
    ScanPlace w = scan_place(in);
    int warp = warp_index(), lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    size_t C = in.NH * HS, in_qkv = w.b * in.T * 3 * C + 2 * C + w.h * HS,
           block_count = CEIL_DIV(in.T, (size_t)SCAN_BLOCK);
    ScanState<HS, SP> state; /* the gradient of the state */
    state.clear();
    if (states) state.load(states + blockIdx.x * Shape::STATE, false);
    float amplitude[SP / 4] = {}, frequency[SP / 4] = {}, decay[SP / 4] = {}, psi[SP / 4] = {};
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
    if (w.chunks) {
        next = scan_fetch<SP>(in, w, rho, last);
        next_delta = fetch_delta(last);
        load(0, last);
    }
    copies_commit();
    __syncthreads(); /* the shift's table is there */
    for (int c = 0; c < w.chunks; c++) {
        int p0 = last - c * CHUNK;
        const floatX *v = m.tiles + c % Shape::STAGES * 2 * CHUNK * VROW, *d = v + CHUNK * VROW;
        if (!sums && p0 > 0 && p0 % SCAN_BLOCK == 0) /* to the cache: the state that the border below wants */
            for (size_t i = threadIdx.x * 32; i < Shape::STATE; i += 128 * 32)
                prefetch(blocks + (w.bh * block_count + p0 / SCAN_BLOCK) * Shape::STATE + i);
        state.shift(m.shift, true);
        copies_wait();
        __syncthreads();
        scan_features(m, next, true, !sums, w.turned);
        if (threadIdx.x < CHUNK) m.delta[threadIdx.x] = -next_delta;
        if (!sums) state.share(m);
        if (c + 1 < w.chunks) {
            next = scan_fetch<SP>(in, w, rho, p0 - CHUNK);
            next_delta = fetch_delta(p0 - CHUNK);
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
                        if (n / 2 >= warp)
                            load_b<false>(b, m.fq, FROW, 8 * n, 16 * k), mma_16x8x16(p[n], a, b[0]),
                                mma_16x8x16(p[n + 1], a, b[1]);
#pragma unroll
                    for (int n = 0; n < HS / 8; n += 2)
                        load_b<false>(b, m.H, FROW, 8 * n, 16 * k), mma_16x8x16(dv[n], a, b[0]),
                            mma_16x8x16(dv[n + 1], a, b[1]);
                }
#pragma unroll
                for (int k = 0; k < CHUNK / 16; k++) {
                    if (k < warp) continue;
                    if (k == warp)
#pragma unroll
                        for (int i = 0; i < 8; i++)
                            if (8 * (i / 4) + 2 * t + i % 2 < g + i / 2 % 2 * 8 + in.reverse)
                                p[2 * k + i / 4][i % 4] = 0;
                    FragmentA a = as_fragment(p[2 * k], p[2 * k + 1]);
#pragma unroll
                    for (int n = 0; n < HS / 8; n += 2)
                        load_b<true>(b, d, VROW, 16 * k, 8 * n), mma_16x8x16(dv[n], a, b[0]),
                            mma_16x8x16(dv[n + 1], a, b[1]);
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
                    if (n / 2 >= warp)
                        load_b<false>(b, d, VROW, 8 * n, 16 * k), mma_16x8x16(p[n], a, b[0]),
                            mma_16x8x16(p[n + 1], a, b[1]);
#pragma unroll
                for (int n = 0; n < Shape::TILES; n += 2)
                    load_b<true>(b, m.H, FROW, 16 * k, 8 * n), mma_16x8x16(df[n], a, b[0]),
                        mma_16x8x16(df[n + 1], a, b[1]);
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
                for (int n = 0; n < Shape::TILES; n += 2)
                    load_b<true>(b, m.fq, FROW, 16 * k, 8 * n), mma_16x8x16(df[n], a, b[0]),
                        mma_16x8x16(df[n + 1], a, b[1]);
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
                    K[r][j] =
                        (j % 2 ? constants.y : constants.x) * df[j / 2][2 * r + j % 2] + wave.x * dc + wave.y * ds;
                    float across = wave.x * ds - wave.y * dc;
                    frequency[j] += at * across;
                    psi[j] += in.reverse ? -across : across;
                    decay[j] += at * K[r][j];
                }
            }
            __syncwarp();
#pragma unroll
            for (int i = 0; i < SP / 2; i++)
                m.fk[(16 * warp + g + i % 2 * 8) * FROW + i / 2 * 4 + t] = (floatX)K[i % 2][i / 2];
            __syncwarp();
            scan_store_gradients<HS, SP>(gradients + w.bh * in.T * SP, m.fk, add,
                                         [&](int a) { return w.has_key(w.key(p0 + a)) ? w.key(p0 + a) : -1; });
        }
        state.absorb(d, m.fq, m.delta);
        if (!sums && p0 > 0 && p0 % SCAN_BLOCK == 0) {
            const float *H = blocks + (w.bh * block_count + p0 / SCAN_BLOCK) * Shape::STATE,
                        *z = H + 64 * Shape::M * Shape::F;
            auto at = [&](int i, int n, int e) { return H[((i * Shape::TILES + n) * 4 + e) * 128 + threadIdx.x]; };
#pragma unroll
            for (int j = 0; j < SP / 4; j++) {
                int tile = SP / 8 + j, n = j / 2;
                float along = 0, across = 0;
#pragma unroll
                for (int i = 0; i < Shape::M; i++)
#pragma unroll
                    for (int r = 0; r < 2; r++) {
                        float x = at(i, tile, 2 * r), y = at(i, tile, 2 * r + 1), dx = state.h[i][tile][2 * r],
                              dy = state.h[i][tile][2 * r + 1];
                        along += at(i, n, 2 * r + j % 2) * state.h[i][n][2 * r + j % 2] + x * dx + y * dy;
                        across += x * dy - y * dx;
                    }
                if (n / 2 % 4 == warp && g == 0) along += z[8 * n + 2 * t + j % 2] * state.z[n / 8][n % 2][j % 2];
                if (tile / 2 % 4 == warp && g == 0) {
                    float x = z[8 * tile + 2 * t], y = z[8 * tile + 2 * t + 1], dx = state.z[tile / 8][tile % 2][0],
                          dy = state.z[tile / 8][tile % 2][1];
                    along += x * dx + y * dy;
                    across += x * dy - y * dx;
                }
                decay[j] -= SCAN_BLOCK * along;
                frequency[j] -= SCAN_BLOCK * across;
            }
        }
        if (Shape::STAGES == 1) {
            __syncthreads();
            if (c + 1 < w.chunks) load(0, p0 - CHUNK);
        }
    }
    if (sums) state.store(sums + blockIdx.x * Shape::STATE);
    else scan_record<SP>(scan_record_at<SP>(records, in, w, 1), (float *)memory, amplitude, frequency, decay, psi, 0);
}

/* ---- launchers */

/* Segments of a sequence, for so many heads of all sequences: a power of two that fills a card, each at least one span
   of SCAN_BLOCK tokens. It decides the order of sums, so it depends on shapes alone (MODEL.md 5). */
static int scan_segments(size_t heads, size_t T) {
    int segments = 1;
    while (heads * segments < SCAN_SEGMENTS_MOST / 2 && (size_t)segments * SCAN_BLOCK < T) segments *= 2;
    return segments;
}

static size_t scan_splats(size_t S) { return S <= 16 ? 16 : 32; }
static size_t scan_state_size(size_t HS, size_t SP) { return ((HS > 64 ? 128 : 64) + 1) * 3 * SP; }

/* Calls a kernel with HS and SP as constants. */
#define BY_SCAN_SIZE(HS, ...)          \
    do {                               \
        if ((HS) == 32) {              \
            constexpr int H = 32;      \
            __VA_ARGS__;               \
        } else if ((HS) == 64) {       \
            constexpr int H = 64;      \
            __VA_ARGS__;               \
        } else {                       \
            constexpr int H = 128;     \
            __VA_ARGS__;               \
        }                              \
        cudaCheck(cudaGetLastError()); \
    } while (0)
#define BY_SCAN(HS, SP, ...)               \
    do {                                   \
        if ((SP) == 16) {                  \
            constexpr int W = 16;          \
            BY_SCAN_SIZE(HS, __VA_ARGS__); \
        } else {                           \
            constexpr int W = 32;          \
            BY_SCAN_SIZE(HS, __VA_ARGS__); \
        }                                  \
    } while (0)

#define SCAN_LAUNCH(kernel, tiles, ...)                                                       \
    cudaCheck(cudaFuncSetAttribute(kernel<H, W>, cudaFuncAttributeMaxDynamicSharedMemorySize, \
                                   (int)ScanShape<H, W>::bytes(tiles)));                      \
    kernel<H, W>                                                                              \
        <<<(unsigned)(in.B * in.heads.count * in.segments), 128, ScanShape<H, W>::bytes(tiles), stream>>>(__VA_ARGS__)

/* What a scan needs beside its input; sizes in numbers. */
typedef struct {
    float *states; /* (directions, B, heads, segments, state): kept from the forward pass for the backward pass */
    float *sums;   /* (2, B, heads, segments, state): scratch, like the rest */
    float *blocks; /* (B, heads, spans of SCAN_BLOCK tokens, state) */
    float *records;
    double *moments; /* (heads, scan_sums_record): see splat_gradients_kernel */
} ScanScratch;

/* Equation (5), or merged into what softmax has left in out and lse, equation (12). out (B, T, C), lse and rho (B,
   NH, T); log_far: of the listed heads. Without a causal mask two scans are added. */
static void scan_forward(floatX *out, float *lse, float *rho, const float *log_far, ScanScratch scratch, ScanInput in,
                         bool causal, bool merged, size_t HS, size_t SP, cudaStream_t stream) {
    size_t states = in.B * in.heads.count * in.segments * scan_state_size(HS, SP);
    for (int direction = 0; direction < (causal ? 1 : 2); direction++) {
        float *starts = in.segments > 1 ? scratch.states + direction * states : NULL;
        int mode = merged ? SCAN_MERGED : causal ? SCAN_ALONE : direction ? SCAN_SECOND : SCAN_FIRST;
        in.reverse = direction;
        if (starts) {
            BY_SCAN(HS, SP, SCAN_LAUNCH(scan_forward_kernel, 1, NULL, NULL, NULL, scratch.sums, NULL, SCAN_SUMS, in));
            BY_SCAN(HS, SP,
                    scan_merge_kernel<H, W>
                    <<<(unsigned)(in.B * in.heads.count), 128, 0, stream>>>(starts, scratch.sums, false, in));
        }
        BY_SCAN(HS, SP, SCAN_LAUNCH(scan_forward_kernel, 1, out, lse, rho, starts, log_far, mode, in));
    }
}

/* The gradients of the responses (2, B, heads, T, SP), the third part of dqkv (added to where merged),
   scratch.moments. delta (B, NH, T) is written. */
static void scan_backward(floatX *dresponses, floatX *dqkv, float *delta, const floatX *dout, const floatX *out,
                          const float *rho, ScanScratch scratch, ScanInput in, bool causal, bool merged, size_t HS,
                          size_t SP, cudaStream_t stream) {
    size_t states = in.B * in.heads.count * in.segments * scan_state_size(HS, SP), record = scan_sums_record(SP);
    floatX *dkeys = dresponses + in.B * in.heads.count * in.T * SP;
    float *sums = scratch.sums, *ends = in.segments > 1 ? sums + states : NULL;
    in.sweeps = causal ? 2 : 4;
    for (int direction = 0; direction < (causal ? 1 : 2); direction++) {
        const float *starts = ends ? scratch.states + direction * states : NULL;
        bool add = direction;
        in.reverse = direction;
        BY_SCAN(HS, SP,
                SCAN_LAUNCH(scan_queries_kernel, 2, dresponses, delta, scratch.blocks, scratch.records, starts, dout,
                            out, rho, add, in));
        if (ends) {
            BY_SCAN(HS, SP,
                    SCAN_LAUNCH(scan_keys_kernel, 2, NULL, NULL, sums, NULL, NULL, NULL, dout, rho, delta, false, false,
                                in));
            BY_SCAN(HS, SP,
                    scan_merge_kernel<H, W>
                    <<<(unsigned)(in.B * in.heads.count), 128, 0, stream>>>(ends, sums, true, in));
        }
        BY_SCAN(HS, SP,
                SCAN_LAUNCH(scan_keys_kernel, 2, dkeys, dqkv, NULL, scratch.records, ends, scratch.blocks, dout, rho,
                            delta, add, merged || add, in));
    }
    moments_sums_kernel<<<dim3((unsigned)CEIL_DIV(record, 32), (unsigned)in.heads.count), dim3(32, 16), 0, stream>>>(
        scratch.moments, scratch.records, in.sweeps * in.B * in.segments, record);
    cudaCheck(cudaGetLastError());
}
#undef SCAN_LAUNCH
