/* ---------------------------------------------------------------------- forget gates

   A gated head lets go of a share of what lies before each token: f_t = sigmoid(w . x_t + b), x the block's
   layernormed input, and its logits get c_i - c_j, c_t the sum of ln f up to t (MODEL.md (4a)). c is double; kernels of
   attention take differences to the start of a tile, which are small where weights are not. */

#define FORGET_TILE 64 /* keys; every tile of attention starts at a multiple of it, or lies within one */

/* c (B, count, T) of a layer's gates */
__host__ __device__ static inline size_t forget_row(size_t T) {
    return (T + FORGET_TILE - 1) / FORGET_TILE * FORGET_TILE;
}

enum { FORGET_TOKENS = 4, FORGET_GATES = 4 }; /* of a warp or thread at a time, so that x and weights are read seldom */

/* One warp for 4 tokens: c (B, count, T) = ln sigmoid(w . x + b), not summed yet; x (N, C) */
__global__ static void forget_logs_kernel(double *c, const floatX *x, const float *weight, const float *bias, int N,
                                          int T, int C, int count) {
    int first = (blockIdx.x * 4 + threadIdx.x / 32) * FORGET_TOKENS, lane = threadIdx.x % 32;
    for (int gate0 = 0; gate0 < count && first < N; gate0 += FORGET_GATES) {
        float sum[FORGET_GATES][FORGET_TOKENS] = {}, mine = 0;
        for (int k = lane * 8; k < C; k += 256) {
            Pack p[FORGET_TOKENS] = {};
#pragma unroll
            for (int i = 0; i < FORGET_TOKENS; i++)
                if (first + i < N) p[i] = load_pack(x + (size_t)(first + i) * C + k);
#pragma unroll
            for (int g = 0; g < FORGET_GATES; g++) {
                if (gate0 + g >= count) break;
                float w[8];
                load_floats(w, weight + (size_t)(gate0 + g) * C + k);
                for (int i = 0; i < FORGET_TOKENS; i++)
                    for (int e = 0; e < 8; e++) sum[g][i] += number(p[i], e) * w[e];
            }
        }
        /* each sum to a lane of its own, which takes its logarithm */
#pragma unroll
        for (int g = 0; g < FORGET_GATES; g++)
            for (int i = 0; i < FORGET_TOKENS; i++) {
                float all = warp_sum(sum[g][i]);
                if (lane == g * FORGET_TOKENS + i) mine = all;
            }
        int gate = gate0 + lane / FORGET_TOKENS, n = first + lane % FORGET_TOKENS;
        if (lane >= FORGET_GATES * FORGET_TOKENS || gate >= count || n >= N) continue;
        double u = (double)(mine + bias[gate]);
        c[((size_t)(n / T) * count + gate) * T + n % T] = u > 0 ? -log1p(exp(-u)) : u - log1p(exp(u));
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

/* dx (N, C) += du W, du (B, count, T), W (count, C); a thread has 8 channels of 4 tokens */
__global__ static void forget_inputs_kernel(floatX *dx, const float *du, const float *weight, int N, int T, int C,
                                            int count) {
    int i = blockIdx.x * blockDim.x + threadIdx.x, first = i / (C / 8) * FORGET_TOKENS, k = i % (C / 8) * 8;
    if (first >= N) return;
    float sum[FORGET_TOKENS][8] = {};
    const float *du_of[FORGET_TOKENS];
#pragma unroll
    for (int t = 0; t < FORGET_TOKENS; t++) {
        int n = min(first + t, N - 1);
        Pack old = load_pack(dx + (size_t)n * C + k);
        for (int e = 0; e < 8; e++) sum[t][e] = number(old, e);
        du_of[t] = du + (size_t)(n / T) * count * T + n % T;
    }
    for (int gate = 0; gate < count; gate++) {
        float w[8];
        load_floats(w, weight + (size_t)gate * C + k);
#pragma unroll
        for (int t = 0; t < FORGET_TOKENS; t++) {
            float d = du_of[t][(size_t)gate * T];
            for (int e = 0; e < 8; e++) sum[t][e] += d * w[e];
        }
    }
#pragma unroll
    for (int t = 0; t < FORGET_TOKENS; t++)
        if (first + t < N) store_pack(dx + (size_t)(first + t) * C + k, sum[t]);
}

/* partials (pieces, count, C + 1): sums over a piece of the tokens of du x, and of du. A block has 256 channels, 8 a
   lane, and up to FORGET_GATES gates; its warps take turns at the tokens. */
enum { FORGET_PIECES = 256 };
__global__ static void __launch_bounds__(256)
    forget_weights_kernel(float *partials, const float *du, const floatX *x, int N, int T, int C, int count) {
    __shared__ float sums[FORGET_GATES][256];
    int piece = blockIdx.x, each = CEIL_DIV(N, FORGET_PIECES), gate0 = blockIdx.z * FORGET_GATES,
        end = min((piece + 1) * each, N), c0 = blockIdx.y * 256, lane = threadIdx.x % 32, warp = threadIdx.x / 32,
        gates = min(count - gate0, FORGET_GATES), k = c0 + lane * 8;
    float sum[FORGET_GATES][8] = {}, all[FORGET_GATES] = {};
#pragma unroll 4
    for (int n = piece * each + warp; n < end; n += 8) {
        Pack p = {};
        if (k < C) p = load_pack(x + (size_t)n * C + k);
        const float *du_of = du + ((size_t)(n / T) * count + gate0) * T + n % T;
#pragma unroll
        for (int g = 0; g < FORGET_GATES; g++) {
            float d = g < gates ? du_of[(size_t)g * T] : 0;
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
    partials += ((size_t)piece * count + gate0) * (C + 1);
    for (int g = 0; g < gates; g++)
        if (c0 + threadIdx.x < C) partials[(size_t)g * (C + 1) + c0 + threadIdx.x] = sums[g][threadIdx.x];
    __syncthreads();
    if (c0 > 0) return; /* the bias belongs to the first channels' block */
#pragma unroll
    for (int g = 0; g < FORGET_GATES; g++)
        if (lane == 0) sums[g][warp] = all[g];
    __syncthreads();
    if (threadIdx.x >= gates) return;
    float total = 0;
    for (int w = 0; w < 8; w++) total += sums[threadIdx.x][w];
    partials[(size_t)threadIdx.x * (C + 1) + C] = total;
}

/* dweight (count, C) and dbias (count) += sums of the pieces. A block has 32 numbers; its warps share out the
   pieces. */
__global__ static void __launch_bounds__(256)
    forget_weights_sum_kernel(float *dweight, float *dbias, const float *partials, int C, int count) {
    __shared__ double sums[8][32];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, i = blockIdx.x * 32 + lane, numbers = count * (C + 1);
    double sum = 0;
    for (int piece = warp; piece < FORGET_PIECES && i < numbers; piece += 8)
        sum += (double)partials[(size_t)piece * numbers + i];
    sums[warp][lane] = sum;
    __syncthreads();
    if (warp > 0 || i >= numbers) return;
    for (int w = 1; w < 8; w++) sum += sums[w][lane];
    int gate = i / (C + 1), k = i % (C + 1);
    if (k < C) dweight[(size_t)gate * C + k] += (float)sum;
    else dbias[gate] += (float)sum;
}

/* c (B, count, T) from x (N, C), weight (count, C), bias (count) */
static void forget_forward(double *c, const floatX *x, const float *weight, const float *bias, size_t B, size_t T,
                           size_t C, size_t count, cudaStream_t stream) {
    forget_logs_kernel<<<CEIL_DIV(B * T, 4 * FORGET_TOKENS), 128, 0, stream>>>(c, x, weight, bias, (int)(B * T), (int)T,
                                                                               (int)C, (int)count);
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
    int N = (int)(B * T), gates = (int)count;
    size_t threads = CEIL_DIV(B * T, FORGET_TOKENS) * (C / 8);
    forget_sums_backward_kernel<<<(unsigned)(B * count), FORGET_THREADS, 0, stream>>>(dc, c, T);
    forget_inputs_kernel<<<CEIL_DIV(threads, 256), 256, 0, stream>>>(dx, dc, weight, N, (int)T, (int)C, gates);
    dim3 grid(FORGET_PIECES, (unsigned)CEIL_DIV(C, (size_t)256), (unsigned)CEIL_DIV(count, FORGET_GATES));
    forget_weights_kernel<<<grid, 256, 0, stream>>>(partials, dc, x, N, (int)T, (int)C, gates);
    forget_weights_sum_kernel<<<CEIL_DIV(count * (C + 1), 32), 256, 0, stream>>>(dweight, dbias, partials, (int)C,
                                                                                 gates);
    cudaCheck(cudaGetLastError());
}
