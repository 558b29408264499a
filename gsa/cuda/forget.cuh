/* ---------------------------------------------------------------------- forget gates

   A gated head lets go of a share of what lies before each token: f_t = sigmoid(w . x_t + b), x the block's
   layernormed input, and its logits get c_i - c_j, c_t the sum of ln f up to t (MODEL.md (4a)). c is double; kernels of
   attention take differences to the start of a tile, which are small where weights are not. */

#define FORGET_TILE 64 /* keys; every tile of attention starts at a multiple of it, or lies within one */

/* c (B, count, T) of a layer's gates */
__host__ __device__ static inline size_t forget_row(size_t T) {
    return (T + FORGET_TILE - 1) / FORGET_TILE * FORGET_TILE;
}

/* One warp for 4 tokens: c (B, count, T) = ln sigmoid(w . x + b), not summed yet; x (N, C) */
__global__ static void forget_logs_kernel(double *c, const floatX *x, const float *weight, const float *bias, size_t N,
                                          size_t T, size_t C, size_t count) {
    enum { TOKENS = 4 };
    size_t first = ((size_t)blockIdx.x * 4 + threadIdx.x / 32) * TOKENS;
    int lane = threadIdx.x % 32;
    for (size_t gate = 0; gate < count && first < N; gate++) {
        float sum[TOKENS] = {};
        for (size_t k = (size_t)lane * 8; k < C; k += 256) {
            float w[8];
            load_floats(w, weight + gate * C + k);
            for (int i = 0; i < TOKENS && first + i < N; i++) {
                Pack p = load_pack(x + (first + i) * C + k);
                for (int e = 0; e < 8; e++) sum[i] += number(p, e) * w[e];
            }
        }
        for (int i = 0; i < TOKENS && first + i < N; i++) {
            double u = (double)(warp_sum(sum[i]) + bias[gate]);
            size_t n = first + i;
            if (lane == 0) c[(n / T * count + gate) * T + n % T] = u > 0 ? -log1p(exp(-u)) : u - log1p(exp(u));
        }
    }
}

/* The sum of x over the block's threads before this one (BACK: after it), and over all of them. */
template <bool BACK> __device__ static inline double block_sums(double x, double *all) {
    __shared__ double warps[8];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    double sum = x;
    for (int apart = 1; apart < 32; apart *= 2) {
        double other = BACK ? __shfl_down_sync(~0u, sum, apart) : __shfl_up_sync(~0u, sum, apart);
        if (BACK ? lane + apart < 32 : lane >= apart) sum += other;
    }
    if (lane == (BACK ? 0 : 31)) warps[warp] = sum;
    __syncthreads();
    double before = 0, total = 0;
    for (int i = 0; i < 8; i++) {
        if (BACK ? i > warp : i < warp) before += warps[i];
        total += warps[i];
    }
    __syncthreads(); /* all have read */
    *all = total;
    return before + sum - x;
}

enum { FORGET_THREADS = 256, FORGET_EACH = 4 }; /* tokens of a thread side by side */

/* One block for a gate of a sequence: ln f become their sums, in place. */
__global__ static void __launch_bounds__(FORGET_THREADS) forget_sums_kernel(double *c, size_t T) {
    double carry = 0;
    c += blockIdx.x * T;
    for (size_t t0 = 0; t0 < T; t0 += FORGET_THREADS * FORGET_EACH) {
        size_t first = t0 + threadIdx.x * FORGET_EACH;
        double x[FORGET_EACH], mine = 0, all;
        for (int k = 0; k < FORGET_EACH; k++) mine += x[k] = first + k < T ? c[first + k] : 0;
        double sum = carry + block_sums<false>(mine, &all);
        for (int k = 0; k < FORGET_EACH && first + k < T; k++) c[first + k] = sum += x[k];
        carry += all;
    }
}

/* local (rows, forget_row(T)): c at the start of its tile less c, for `rows` rows of c; zeros from T on */
__global__ static void forget_local_kernel(float *local, const double *c, size_t rows, size_t T) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x, width = forget_row(T), row = i / width, t = i % width;
    if (row < rows) local[i] = t < T ? (float)(c[row * T + t / FORGET_TILE * FORGET_TILE] - c[row * T + t]) : 0;
}

/* One block for a gate of a sequence: dc (T) becomes the gradient of the gate's argument: (1 - f_t) times the sum of dc
   from t on. */
__global__ static void __launch_bounds__(FORGET_THREADS)
    forget_sums_backward_kernel(float *dc, const double *c, size_t T) {
    const size_t step = FORGET_THREADS * FORGET_EACH;
    double carry = 0;
    c += blockIdx.x * T;
    dc += blockIdx.x * T;
    for (size_t tile = (T + step - 1) / step; tile-- > 0;) {
        size_t first = tile * step + threadIdx.x * FORGET_EACH;
        double x[FORGET_EACH], mine = 0, all;
        for (int k = 0; k < FORGET_EACH; k++) mine += x[k] = first + k < T ? (double)dc[first + k] : 0;
        double sum = carry + block_sums<true>(mine, &all);
        for (int k = FORGET_EACH; k-- > 0;) {
            size_t t = first + k;
            if (t >= T) continue;
            sum += x[k];
            dc[t] = (float)(-expm1(c[t] - (t ? c[t - 1] : 0)) * sum);
        }
        carry += all;
    }
}

/* dx (N, C) += du W, du (B, count, T), W (count, C); a thread has 8 channels of a token */
__global__ static void forget_inputs_kernel(floatX *dx, const float *du, const float *weight, size_t N, size_t T,
                                            size_t C, size_t count) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x, n = i / (C / 8), k = i % (C / 8) * 8;
    if (n >= N) return;
    Pack old = load_pack(dx + n * C + k);
    float sum[8];
    for (int e = 0; e < 8; e++) sum[e] = number(old, e);
    for (size_t gate = 0; gate < count; gate++) {
        float w[8], d = du[(n / T * count + gate) * T + n % T];
        load_floats(w, weight + gate * C + k);
        for (int e = 0; e < 8; e++) sum[e] += d * w[e];
    }
    store_pack(dx + n * C + k, sum);
}

/* partials (pieces, count, C + 1): sums over a piece of the tokens of du x, and of du. A block has 256 channels, 8 a
   lane, and up to GATES gates; its warps take turns at the tokens. */
enum { FORGET_PIECES = 64, FORGET_GATES = 4 };
__global__ static void __launch_bounds__(256) forget_weights_kernel(float *partials, const float *du, const floatX *x,
                                                                    size_t N, size_t T, size_t C, size_t count) {
    __shared__ float sums[FORGET_GATES][256];
    size_t piece = blockIdx.x, each = CEIL_DIV(N, (size_t)FORGET_PIECES), gate0 = blockIdx.z * FORGET_GATES,
           end = (piece + 1) * each < N ? (piece + 1) * each : N, c0 = blockIdx.y * 256;
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32,
        gates = count - gate0 < FORGET_GATES ? count - gate0 : FORGET_GATES;
    size_t k = c0 + lane * 8;
    float sum[FORGET_GATES][8] = {}, all[FORGET_GATES] = {};
    for (size_t n = piece * each + warp; n < end; n += 8) {
        Pack p = {};
        if (k < C) p = load_pack(x + n * C + k);
#pragma unroll
        for (int g = 0; g < FORGET_GATES; g++) {
            float d = g < gates ? du[(n / T * count + gate0 + g) * T + n % T] : 0;
            all[g] += d;
            for (int e = 0; e < 8; e++) sum[g][e] += d * number(p, e);
        }
    }
    for (int w = 0; w < 8; w++) { /* one warp after the other */
        if (warp == w)
#pragma unroll
            for (int g = 0; g < FORGET_GATES; g++)
                for (int e = 0; e < 8; e++) sums[g][lane * 8 + e] = (w ? sums[g][lane * 8 + e] : 0) + sum[g][e];
        __syncthreads();
    }
    for (int g = 0; g < gates; g++)
        if (c0 + threadIdx.x < C)
            partials[(piece * count + gate0 + g) * (C + 1) + c0 + threadIdx.x] = sums[g][threadIdx.x];
    __syncthreads();
    if (c0 > 0) return; /* the bias belongs to the first channels' block */
#pragma unroll
    for (int g = 0; g < FORGET_GATES; g++)
        if (lane == 0) sums[g][warp] = all[g];
    __syncthreads();
    for (int g = 0; g < gates; g++) {
        float total = 0;
        for (int w = 0; w < 8 && threadIdx.x == 0; w++) total += sums[g][w];
        if (threadIdx.x == 0) partials[(piece * count + gate0 + g) * (C + 1) + C] = total;
    }
}

/* One thread a number: dweight (count, C) and dbias (count) += sums of the pieces */
__global__ static void forget_weights_sum_kernel(float *dweight, float *dbias, const float *partials, size_t C,
                                                 size_t count) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x, gate = i / (C + 1), k = i % (C + 1);
    if (gate >= count) return;
    double sum = 0;
    for (size_t piece = 0; piece < FORGET_PIECES; piece++) sum += (double)partials[piece * count * (C + 1) + i];
    if (k < C) dweight[gate * C + k] += (float)sum;
    else dbias[gate] += (float)sum;
}

/* c (B, count, T) from x (N, C), weight (count, C), bias (count) */
static void forget_forward(double *c, const floatX *x, const float *weight, const float *bias, size_t B, size_t T,
                           size_t C, size_t count, cudaStream_t stream) {
    forget_logs_kernel<<<CEIL_DIV(B * T, 16), 128, 0, stream>>>(c, x, weight, bias, B * T, T, C, count);
    forget_sums_kernel<<<(unsigned)(B * count), FORGET_THREADS, 0, stream>>>(c, T);
    cudaCheck(cudaGetLastError());
}

static void forget_local(float *local, const double *c, size_t rows, size_t T, cudaStream_t stream) {
    forget_local_kernel<<<CEIL_DIV(rows * forget_row(T), 256), 256, 0, stream>>>(local, c, rows, T);
    cudaCheck(cudaGetLastError());
}

/* dc (B, count, T) is overwritten; adds to dx, dweight, dbias. partials: FORGET_PIECES count (C + 1) numbers */
static void forget_backward(floatX *dx, float *dweight, float *dbias, float *partials, float *dc, const double *c,
                            const floatX *x, const float *weight, size_t B, size_t T, size_t C, size_t count,
                            cudaStream_t stream) {
    size_t N = B * T;
    forget_sums_backward_kernel<<<(unsigned)(B * count), FORGET_THREADS, 0, stream>>>(dc, c, T);
    forget_inputs_kernel<<<CEIL_DIV(N * (C / 8), 256), 256, 0, stream>>>(dx, dc, weight, N, T, C, count);
    dim3 grid(FORGET_PIECES, (unsigned)CEIL_DIV(C, (size_t)256), (unsigned)CEIL_DIV(count, (size_t)FORGET_GATES));
    forget_weights_kernel<<<grid, 256, 0, stream>>>(partials, dc, x, N, T, C, count);
    forget_weights_sum_kernel<<<CEIL_DIV(count * (C + 1), 256), 256, 0, stream>>>(dweight, dbias, partials, C, count);
    cudaCheck(cudaGetLastError());
}
