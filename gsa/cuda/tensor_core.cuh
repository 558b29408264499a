/* ---------------------------------------------------------------------- tensor cores

   Products of small matrices by one warp, for the splat and the scan kernels. (Attention has its own, in
   attention.cuh.)

   The 32 lanes of a warp hold the tiles A, B and C of a product C += A B together. The hardware fixes which lane holds
   which entries, its "fragment"; below g = lane / 4 and t = lane % 4. There are products in TF32, where rounding to
   bf16 would hurt (MODEL.md 4.6), and in bf16. In the fp32 build, which is for checking, the lanes hand each other
   their entries by shuffles instead, and nothing is rounded. */

/* c (16, 8) += A (16, 8) B (8, 8) in TF32: operands of 11 significant bits, which hold bf16 queries and keys exactly,
   and fp32 sums. A lane holds a = A(g, t), A(g+8, t), A(g, t+4), A(g+8, t+4); b0, b1 = B(t, g), B(t+4, g); c = C(g,
   2t), C(g, 2t+1), C(g+8, 2t), C(g+8, 2t+1). */
__device__ static inline void mma_16x8x8(float c[4], const float a[4], float b0, float b1) {
#ifdef GSA_FP32
    int lane = threadIdx.x % 32, t = lane % 4;
    for (int k = 0; k < 8; k++) {
        int from = (lane & 28) | (k & 3);
        float low = __shfl_sync(~0u, a[k < 4 ? 0 : 2], from), high = __shfl_sync(~0u, a[k < 4 ? 1 : 3], from);
        float left = __shfl_sync(~0u, k < 4 ? b0 : b1, 8 * t + (k & 3)),
              right = __shfl_sync(~0u, k < 4 ? b0 : b1, 8 * t + 4 + (k & 3));
        c[0] += low * left;
        c[1] += low * right;
        c[2] += high * left;
        c[3] += high * right;
    }
#else
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[2])),
          "r"(__float_as_uint(a[3])), "r"(__float_as_uint(b0)), "r"(__float_as_uint(b1)));
#endif
}
__device__ static inline float round_tf32(float x) { /* to the nearest; the product itself would cut the low bits off */
#ifdef GSA_FP32
    return x;
#else
    uint32_t rounded;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(x));
    return __uint_as_float(rounded);
#endif
}

/* c (16, 8) += A (16, 16) B (16, 8) in bf16, with fp32 sums. A lane holds pairs of neighbouring entries, named here by
   their first one: of A those at (g, 2t), (g + 8, 2t), (g, 2t + 8), (g + 8, 2t + 8), side by side in a row; of B those
   at (2t, g), (2t + 8, g), one below the other in a column; of C those at (g, 2t), (g + 8, 2t), side by side. */
#ifdef GSA_FP32
struct FragmentA {
    float x[8];
};
struct FragmentB {
    float x[4];
};
/* a function of its own: with a copy at every use the fp32 build takes minutes to compile */
__device__ __noinline__ static float4 product_16x8x16(float4 c, FragmentA a, FragmentB b) {
    int lane = threadIdx.x % 32, t = lane % 4;
#pragma unroll
    for (int k = 0; k < 16; k++) {
        int from = (lane & 28) | (k % 8 / 2), at = k / 8 * 4 + k % 2, column = k % 8 / 2;
        float low = __shfl_sync(~0u, a.x[at], from), high = __shfl_sync(~0u, a.x[at + 2], from);
        float left = __shfl_sync(~0u, b.x[k / 8 * 2 + k % 2], 8 * t + column),
              right = __shfl_sync(~0u, b.x[k / 8 * 2 + k % 2], 8 * t + 4 + column);
        c.x += low * left;
        c.y += low * right;
        c.z += high * left;
        c.w += high * right;
    }
    return c;
}
__device__ static inline void mma_16x8x16(float c[4], const FragmentA &a, const FragmentB &b) {
    float4 sum = product_16x8x16(make_float4(c[0], c[1], c[2], c[3]), a, b);
    c[0] = sum.x;
    c[1] = sum.y;
    c[2] = sum.z;
    c[3] = sum.w;
}
/* A(i, k) = tile[row + i][column + k], or where TRANSPOSED tile[row + k][column + i] */
template <bool TRANSPOSED>
__device__ static inline FragmentA load_a(const float *tile, int stride, int row, int column) {
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
template <bool TRANSPOSED>
__device__ static inline void load_b(FragmentB b[2], const float *tile, int stride, int row, int column) {
    int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        int y = g + i / 4 * 8, x = 2 * t + i % 2 + i / 2 % 2 * 8;
        b[i / 4].x[i % 4] = TRANSPOSED ? tile[(row + x) * stride + column + y] : tile[(row + y) * stride + column + x];
    }
}
/* Two neighbouring (16, 8) tiles of sums as the A of a next product. In bf16 the sums are rounded in place too: who
   adds them up later adds what the product saw. */
__device__ static inline FragmentA as_fragment(float first[4], float second[4]) {
    return {{first[0], first[1], first[2], first[3], second[0], second[1], second[2], second[3]}};
}
/* an A whose 16 rows are all alike: the lane's entries 2t, 2t + 1, 2t + 8, 2t + 9 of such a row */
__device__ static inline FragmentA fill_fragment(float x0, float x1, float x8, float x9) {
    return {{x0, x1, x0, x1, x8, x9, x8, x9}};
}
__device__ static inline float fragment_number(const FragmentA &a, int i) { return a.x[i]; }
__device__ static inline void store_two(float *to, float first, float second) {
    *(float2 *)to = make_float2(first, second);
}
__device__ static inline float2 load_two(const float *from) { return *(const float2 *)from; }
__device__ static inline void copy_pack(float *to, const float *from, bool inside) {
    float4 zero = make_float4(0, 0, 0, 0);
    ((float4 *)to)[0] = inside ? ((const float4 *)from)[0] : zero;
    ((float4 *)to)[1] = inside ? ((const float4 *)from)[1] : zero;
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
    if (TRANSPOSED)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                     : "r"(address)
                     : "memory");
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                     : "r"(address)
                     : "memory");
}

struct FragmentA {
    uint32_t x[4];
};
struct FragmentB {
    uint32_t x[2];
};
__device__ static inline void mma_16x8x16(float c[4], const FragmentA &a, const FragmentB &b) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, "
        "%2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a.x[0]), "r"(a.x[1]), "r"(a.x[2]), "r"(a.x[3]), "r"(b.x[0]), "r"(b.x[1]));
}
template <bool TRANSPOSED>
__device__ static inline FragmentA load_a(const floatX *tile, int stride, int row, int column) {
    int lane = threadIdx.x % 32;
    FragmentA a;
    if (TRANSPOSED)
        load_matrices<true>(
            a.x, shared_address(tile + (row + lane % 8 + lane / 16 * 8) * stride + column + lane / 8 % 2 * 8));
    else load_matrices<false>(a.x, shared_address(tile + (row + lane % 16) * stride + column + lane / 16 * 8));
    return a;
}
template <bool TRANSPOSED>
__device__ static inline void load_b(FragmentB b[2], const floatX *tile, int stride, int row, int column) {
    int lane = threadIdx.x % 32;
    uint32_t x[4];
    if (TRANSPOSED) load_matrices<true>(x, shared_address(tile + (row + lane % 16) * stride + column + lane / 16 * 8));
    else
        load_matrices<false>(
            x, shared_address(tile + (row + lane % 8 + lane / 16 * 8) * stride + column + lane / 8 % 2 * 8));
    b[0] = {{x[0], x[1]}}, b[1] = {{x[2], x[3]}};
}
__device__ static inline FragmentA as_fragment(float first[4], float second[4]) {
    FragmentA a = {{make_pair(first[0], first[1]), make_pair(first[2], first[3]), make_pair(second[0], second[1]),
                    make_pair(second[2], second[3])}};
#pragma unroll
    for (int i = 0; i < 4; i++) { /* a bf16 is the upper half of an fp32 */
        float *of = i < 2 ? first : second;
        of[i % 2 * 2] = __uint_as_float(a.x[i] << 16);
        of[i % 2 * 2 + 1] = __uint_as_float(a.x[i] & 0xffff0000u);
    }
    return a;
}
__device__ static inline FragmentA fill_fragment(float x0, float x1, float x8, float x9) {
    uint32_t low = make_pair(x0, x1), high = make_pair(x8, x9);
    return {{low, low, high, high}};
}
__device__ static inline float fragment_number(const FragmentA &a, int i) {
    return __uint_as_float(i % 2 ? a.x[i / 2] & 0xffff0000u : a.x[i / 2] << 16);
}
__device__ static inline void store_two(floatX *to, float first, float second) {
    *(uint32_t *)to = make_pair(first, second);
}
__device__ static inline float2 load_two(const floatX *from) {
    uint32_t pair = *(const uint32_t *)from;
    return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
}
__device__ static inline void copy_pack(floatX *to, const floatX *from, bool inside) {
    copy_async(shared_address(to), from, inside);
}
__device__ static inline void copies_commit() { copy_commit(); }
__device__ static inline void copies_wait() { copy_wait(); }
#endif
