/* attention_bench.cu: checks the attention kernels against a naive reference in double and times them.

     nvcc -O3 -D_GNU_SOURCE -gencode arch=compute_90a,code=sm_90a dev/cuda/attention_bench.cu gsa/model.c gsa/util.c \
         -lcublasLt -o build/attention_bench && build/attention_bench --help

   Times are medians over events, with rotating buffers larger than L2. FLOP counts are those of a causal pass: 2
   products forward, 5 backward, half of each; our backward does 7. attention_bench.py times PyTorch's own kernels on
   the same shapes. */

#define GSA_NO_MAIN
#include "../../train_gsa.cu"
#include <algorithm>
#include <string.h>
#include <vector>

#define check(call) cudaCheck(call)

/* ---------------------------------------------------------------------- data */

/* standard normal numbers, reproducible: a hash of seed and index, then Box-Muller */
__device__ static float normal(uint64_t seed, uint64_t n) {
    uint64_t z = seed * 0x9E3779B97F4A7C15ull + n * 0xBF58476D1CE4E5B9ull;
    for (int i = 0; i < 3; i++) z = (z ^ (z >> 31)) * 0x94D049BB133111EBull;
    float u = ((uint32_t)(z >> 40) + 1) * 0x1p-24f, v = (uint32_t)(z & 0xFFFFFF) * 0x1p-24f;
    return sqrtf(-2 * logf(u)) * cospif(2 * v);
}

/* x (rows, width): columns below special have this mean and deviation, the others 0 and 1 */
__global__ void fill(bf16 *x, size_t rows, size_t width, size_t special, uint64_t seed, float mean, float deviation) {
    for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < rows * width;
         i += (size_t)gridDim.x * blockDim.x)
        x[i] = __float2bfloat16(i % width < special ? mean + deviation * normal(seed, i) : normal(seed, i));
}

template <typename X> static X *device(size_t n) {
    void *p;
    check(cudaMalloc(&p, n * sizeof(X)));
    return (X *)p;
}

template <typename X> static std::vector<X> host(const X *p, size_t n) {
    std::vector<X> v(n);
    check(cudaMemcpy(v.data(), p, n * sizeof(X), cudaMemcpyDeviceToHost));
    return v;
}

struct Case {
    size_t B, T, NH, HS;
    bool causal, large; /* large: logits of 100 and more */
    int window, source; /* window 0: none, -1: another for each head; source 0: qkv, 1: features, 2: both */
};

/* inputs, outputs and device memory of one problem */
struct Problem {
    Case c;
    size_t C, N;
    bf16 *qkv, *features, *dout, *out, *dqkv, *dfeatures;
    float *lse, *delta, *scale;
    int *window, *from_features;
    AttentionInput in;
};

static Problem problem_new(Case c, uint64_t seed) {
    Problem p = {};
    p.c = c;
    p.C = c.NH * c.HS;
    p.N = c.B * c.T;
    p.qkv = device<bf16>(p.N * 3 * p.C);
    p.features = device<bf16>(p.N * 2 * p.C);
    p.dqkv = device<bf16>(p.N * 3 * p.C);
    p.dfeatures = device<bf16>(p.N * 2 * p.C);
    p.dout = device<bf16>(p.N * p.C);
    p.out = device<bf16>(p.N * p.C);
    p.lse = device<float>(p.N * c.NH);
    p.delta = device<float>(p.N * c.NH);
    p.scale = device<float>(c.NH);
    p.window = device<int>(c.NH);
    p.from_features = device<int>(c.NH);
    /* large logits: a part common to all queries and keys, so that the softmax is not simply one-hot */
    float common = c.large ? sqrtf(110.0f / c.HS) : 0, deviation = c.large ? 0.3f : 1;
    fill<<<1024, 256>>>(p.qkv, p.N, 3 * p.C, 2 * p.C, seed, common, deviation);
    fill<<<1024, 256>>>(p.features, p.N, 2 * p.C, 2 * p.C, seed + 1, common, deviation);
    fill<<<1024, 256>>>(p.dout, p.N, p.C, 0, seed + 2, 0, 1);
    std::vector<float> scale(c.NH);
    std::vector<int> window(c.NH), from_features(c.NH);
    int windows[] = {1 << 30, 64, 17, 1, 100};
    for (size_t h = 0; h < c.NH; h++) {
        scale[h] = c.large ? 1.0f + 0.1f * h : (1.0f + 0.25f * h) / sqrtf((float)c.HS);
        window[h] = c.window < 0 ? windows[h % 5] : c.window ? c.window : (int)c.T;
        from_features[h] = c.source == 2 ? h % 2 == 0 : c.source;
    }
    check(cudaMemcpy(p.scale, scale.data(), c.NH * sizeof(float), cudaMemcpyHostToDevice));
    check(cudaMemcpy(p.window, window.data(), c.NH * sizeof(int), cudaMemcpyHostToDevice));
    check(cudaMemcpy(p.from_features, from_features.data(), c.NH * sizeof(int), cudaMemcpyHostToDevice));
    p.in.qkv = p.qkv; /* no head has a gate */
    p.in.features = c.source ? p.features : NULL;
    p.in.from_features = c.source ? p.from_features : NULL;
    p.in.scale = p.scale;
    p.in.window = p.window;
    p.in.causal = c.causal;
    return p;
}

static void problem_free(Problem p) {
    for (void *x :
         {(void *)p.qkv, (void *)p.features, (void *)p.dout, (void *)p.out, (void *)p.dqkv, (void *)p.dfeatures,
          (void *)p.lse, (void *)p.delta, (void *)p.scale, (void *)p.window, (void *)p.from_features})
        check(cudaFree(x));
}

/* one forward and backward pass over poisoned outputs */
static void problem_run(Problem p) {
    check(cudaMemset(p.out, 0xFF, p.N * p.C * sizeof(bf16)));
    check(cudaMemset(p.lse, 0xFF, p.N * p.c.NH * sizeof(float)));
    check(cudaMemset(p.delta, 0xFF, p.N * p.c.NH * sizeof(float)));
    check(cudaMemset(p.dqkv, 0xFF, p.N * 3 * p.C * sizeof(bf16)));
    check(cudaMemset(p.dfeatures, 0xFF, p.N * 2 * p.C * sizeof(bf16)));
    attention_forward(p.out, p.lse, p.in, p.c.B, p.c.T, p.c.NH, p.c.HS, 0);
    attention_backward(p.dqkv, p.dfeatures, p.delta, p.dout, p.out, p.lse, p.in, p.c.B, p.c.T, p.c.NH, p.c.HS, 0);
    check(cudaDeviceSynchronize());
}

/* ---------------------------------------------------------------------- reference: one block of threads a token */

struct Reference {
    double *out, *lse, *delta, *dqkv, *dfeatures;
};

__device__ static bool visible(const AttentionInput &in, int h, long i, long j) {
    return in.causal ? j <= i && j > i - in.window[h] : labs(i - j) < in.window[h];
}

__device__ static double dot(const bf16 *x, const bf16 *y, int n) {
    double sum = 0;
    for (int e = 0; e < n; e++) sum += (double)__bfloat162float(x[e]) * (double)__bfloat162float(y[e]);
    return sum;
}

__device__ static double block_reduce(double x, bool largest) {
    __shared__ double all[128];
    __syncthreads();
    all[threadIdx.x] = x;
    __syncthreads();
    double r = all[0];
    for (int t = 1; t < 128; t++) r = largest ? fmax(r, all[t]) : r + all[t];
    return r;
}

/* grid (T, NH, B), 128 threads, T doubles of shared memory */
__global__ void reference_forward(Reference r, AttentionInput in, int T, int NH, int HS) {
    extern __shared__ double w[];
    int i = blockIdx.x, h = blockIdx.y;
    size_t b = blockIdx.z, C = (size_t)NH * HS, row = (b * NH + h) * T + i;
    bool f = in.from_features && in.from_features[h];
    size_t stride = f ? 2 * C : 3 * C;
    const bf16 *q = (f ? in.features : in.qkv) + b * T * stride + h * HS, *k = q + C,
               *v = in.qkv + b * T * 3 * C + 2 * C + h * HS;
    double most = -INFINITY, sum = 0;
    for (int j = threadIdx.x; j < T; j += 128) {
        w[j] = visible(in, h, i, j) ? (double)in.scale[h] * dot(q + i * stride, k + j * stride, HS) : -INFINITY;
        most = fmax(most, w[j]);
    }
    most = block_reduce(most, true);
    for (int j = threadIdx.x; j < T; j += 128) sum += w[j] = exp(w[j] - most);
    sum = block_reduce(sum, false);
    if (threadIdx.x == 0) r.lse[row] = most + log(sum);
    for (int e = threadIdx.x; e < HS; e += 128) {
        double o = 0;
        for (int j = 0; j < T; j++) o += w[j] * (double)__bfloat162float(v[j * 3 * C + e]);
        r.out[(b * T + i) * C + h * HS + e] = o / sum;
    }
}

__global__ void reference_delta(Reference r, const bf16 *dout, int T, int NH, int HS) {
    size_t i = blockIdx.x, h = blockIdx.y, b = blockIdx.z, C = (size_t)NH * HS, at = (b * T + i) * C + h * HS;
    double part = threadIdx.x < HS ? (double)__bfloat162float(dout[at + threadIdx.x]) * r.out[at + threadIdx.x] : 0;
    part = block_reduce(part, false);
    if (threadIdx.x == 0) r.delta[(b * NH + h) * T + i] = part;
}

/* dq of query t and dk, dv of key t */
__global__ void reference_backward(Reference r, const bf16 *dout, AttentionInput in, int T, int NH, int HS) {
    extern __shared__ double w[]; /* ds (T), p (T) */
    int t = blockIdx.x, h = blockIdx.y;
    size_t b = blockIdx.z, C = (size_t)NH * HS, row = (b * NH + h) * T;
    bool f = in.from_features && in.from_features[h];
    size_t stride = f ? 2 * C : 3 * C;
    const bf16 *q = (f ? in.features : in.qkv) + b * T * stride + h * HS, *k = q + C,
               *v = in.qkv + b * T * 3 * C + 2 * C + h * HS, *d = dout + b * T * C + h * HS;
    double *g = (f ? r.dfeatures : r.dqkv) + b * T * stride + h * HS, *dv = r.dqkv + b * T * 3 * C + 2 * C + h * HS,
           scale = in.scale[h];
    for (int side = 0; side < 2; side++) {
        __syncthreads();
        for (int u = threadIdx.x; u < T; u += 128) {
            int i = side ? u : t, j = side ? t : u;
            double p = visible(in, h, i, j) ? exp(scale * dot(q + i * stride, k + j * stride, HS) - r.lse[row + i]) : 0;
            w[T + u] = p;
            w[u] = p ? p * (dot(d + i * C, v + j * 3 * C, HS) - r.delta[row + i]) : 0;
        }
        __syncthreads();
        for (int e = threadIdx.x; e < HS; e += 128) {
            double x = 0, y = 0;
            for (int u = 0; u < T; u++) {
                x += w[u] * (double)__bfloat162float(side ? q[u * stride + e] : k[u * stride + e]);
                if (side) y += w[T + u] * (double)__bfloat162float(d[u * C + e]);
            }
            g[t * stride + (side ? C : 0) + e] = scale * x;
            if (side) dv[t * 3 * C + e] = y;
        }
    }
}

/* ---------------------------------------------------------------------- checks */

static int failures, checks;

static void expect(bool good, const char *what, Case c, double value) {
    checks++;
    if (good) return;
    failures++;
    printf("FAILED %s (%g): B %zu T %zu NH %zu HS %zu window %d source %d%s%s\n", what, value, c.B, c.T, c.NH, c.HS,
           c.window, c.source, c.causal ? "" : " not causal", c.large ? " large" : "");
}

static float to_float(bf16 x) { return __bfloat162float(x); }
static float to_float(float x) { return x; }
static bool poisoned(bf16 x) { return !memcmp(&x, "\xFF\xFF", 2); }
static bool poisoned(float x) { return !memcmp(&x, "\xFF\xFF\xFF\xFF", 4); }

/* |x - y| / |y| over columns first .. first + n - 1 of each row; a reference of NaN means: not to be written. Where
   the true value is 0 (dq of a query that sees one key) the error is taken relative to an rms of 1e-3 */
template <typename X>
static double relative_error(const std::vector<X> &x, const std::vector<double> &y, size_t width, size_t first,
                             size_t n, bool *kept) {
    double difference = 0, norm = 0;
    size_t count = 0;
    for (size_t i = 0; i < y.size(); i++) {
        if (i % width < first || i % width >= first + n) continue;
        if (isnan(y[i])) {
            if (!poisoned(x[i])) *kept = false;
            continue;
        }
        double a = to_float(x[i]);
        if (!isfinite(a)) return INFINITY;
        difference += (a - y[i]) * (a - y[i]);
        norm += y[i] * y[i];
        count++;
    }
    return count ? sqrt(difference) / fmax(sqrt(norm), 1e-3 * sqrt((double)count)) : 0;
}

static double worst[2][6]; /* the largest errors, of cases with large logits apart */

static void check_case(Case c, uint64_t seed) {
    Problem p = problem_new(c, seed);
    Reference r = {device<double>(p.N * p.C), device<double>(p.N * c.NH), device<double>(p.N * c.NH),
                   device<double>(p.N * 3 * p.C), device<double>(p.N * 2 * p.C)};
    check(cudaMemset(r.dqkv, 0xFF, p.N * 3 * p.C * sizeof(double))); /* NaN */
    check(cudaMemset(r.dfeatures, 0xFF, p.N * 2 * p.C * sizeof(double)));
    dim3 grid((unsigned)c.T, (unsigned)c.NH, (unsigned)c.B);
    reference_forward<<<grid, 128, c.T * sizeof(double)>>>(r, p.in, (int)c.T, (int)c.NH, (int)c.HS);
    reference_delta<<<grid, 128>>>(r, p.dout, (int)c.T, (int)c.NH, (int)c.HS);
    reference_backward<<<grid, 128, 2 * c.T * sizeof(double)>>>(r, p.dout, p.in, (int)c.T, (int)c.NH, (int)c.HS);
    check(cudaDeviceSynchronize());
    problem_run(p);

    auto out = host(p.out, p.N * p.C), dqkv = host(p.dqkv, p.N * 3 * p.C), dfeatures = host(p.dfeatures, p.N * 2 * p.C);
    auto lse = host(p.lse, p.N * c.NH), delta = host(p.delta, p.N * c.NH);
    auto rout = host(r.out, p.N * p.C), rdqkv = host(r.dqkv, p.N * 3 * p.C),
         rdfeatures = host(r.dfeatures, p.N * 2 * p.C), rlse = host(r.lse, p.N * c.NH),
         rdelta = host(r.delta, p.N * c.NH);
    bool kept = true;
    double lse_error = 0;
    for (size_t i = 0; i < lse.size(); i++)
        lse_error = isfinite(lse[i]) ? fmax(lse_error, fabs(lse[i] - rlse[i])) : INFINITY;
    double e[6] = {relative_error(out, rout, 1, 0, 1, &kept),
                   lse_error,
                   relative_error(delta, rdelta, 1, 0, 1, &kept),
                   fmax(relative_error(dqkv, rdqkv, 3 * p.C, 0, p.C, &kept),
                        relative_error(dfeatures, rdfeatures, 2 * p.C, 0, p.C, &kept)),
                   fmax(relative_error(dqkv, rdqkv, 3 * p.C, p.C, p.C, &kept),
                        relative_error(dfeatures, rdfeatures, 2 * p.C, p.C, p.C, &kept)),
                   relative_error(dqkv, rdqkv, 3 * p.C, 2 * p.C, p.C, &kept)};
    const char *names[6] = {"out", "lse", "delta", "dq", "dk", "dv"};
    /* a large part common to all keys cancels in dq (sum_j ds_ij = 0) and amplifies what bf16 rounded in ds and out;
       likewise in dk */
    double loose = c.large ? 5e-2 : 2e-2, limits[6] = {1e-2, c.large ? 2e-4 : 5e-5, 2e-2, loose, loose, 2e-2};
    for (int n = 0; n < 6; n++) {
        expect(e[n] <= limits[n], names[n], c, e[n]);
        worst[c.large][n] = fmax(worst[c.large][n], e[n]);
    }
    expect(kept, "columns of the other source are left alone", c, 0);

    problem_run(p); /* again: bit for bit */
    auto same = [](const void *x, const void *y, size_t n) { return !memcmp(x, y, n); };
    expect(same(out.data(), host(p.out, out.size()).data(), out.size() * 2) &&
               same(lse.data(), host(p.lse, lse.size()).data(), lse.size() * 4) &&
               same(dqkv.data(), host(p.dqkv, dqkv.size()).data(), dqkv.size() * 2) &&
               same(dfeatures.data(), host(p.dfeatures, dfeatures.size()).data(), dfeatures.size() * 2),
           "repeatable", c, 0);
    /* delta given instead of computed */
    check(cudaMemset(p.dqkv, 0xFF, p.N * 3 * p.C * sizeof(bf16)));
    attention_backward(p.dqkv, p.dfeatures, p.delta, p.dout, NULL, p.lse, p.in, c.B, c.T, c.NH, c.HS, 0);
    expect(same(dqkv.data(), host(p.dqkv, dqkv.size()).data(), dqkv.size() * 2), "delta given", c, 0);

    if (c.causal && c.T > 1) { /* other tokens from t on: everything before stays, bit for bit */
        size_t t = c.T / 2;
        for (size_t b = 0; b < c.B; b++) {
            fill<<<64, 256>>>(p.qkv + (b * c.T + t) * 3 * p.C, c.T - t, 3 * p.C, 3 * p.C, seed + 7, 0, 2);
            fill<<<64, 256>>>(p.features + (b * c.T + t) * 2 * p.C, c.T - t, 2 * p.C, 2 * p.C, seed + 8, 0, 2);
        }
        problem_run(p);
        auto changed = host(p.out, out.size());
        bool causal = true, reacts = false;
        for (size_t b = 0; b < c.B; b++) {
            causal &= same(&out[b * c.T * p.C], &changed[b * c.T * p.C], t * p.C * 2);
            reacts |= !same(&out[(b * c.T + t) * p.C], &changed[(b * c.T + t) * p.C], (c.T - t) * p.C * 2);
        }
        expect(causal && reacts, "causal", c, 0);
    }
    for (double *x : {r.out, r.lse, r.delta, r.dqkv, r.dfeatures}) check(cudaFree(x));
    problem_free(p);
}

/* a sequence too long for the reference: the two kinds of kernels against each other (the same kind twice where
   there is only one) */
static void check_long(Case c, uint64_t seed) {
    Problem p = problem_new(c, seed);
    bool portable = attention_portable;
    std::vector<bf16> results[2][3];
    for (int n = 0; n < 2; n++) {
        attention_portable = n;
        problem_run(p);
        results[n][0] = host(p.out, p.N * p.C);
        results[n][1] = host(p.dqkv, p.N * 3 * p.C);
        results[n][2] = host(p.dfeatures, p.N * 2 * p.C);
    }
    attention_portable = portable;
    for (int n = 0; n < 3; n++) {
        double difference = 0, norm = 0;
        bool same_places = true;
        for (size_t i = 0; i < results[0][n].size(); i++) {
            if (poisoned(results[0][n][i]) || poisoned(results[1][n][i]))
                same_places &= poisoned(results[0][n][i]) && poisoned(results[1][n][i]);
            else {
                double x = to_float(results[0][n][i]), y = to_float(results[1][n][i]);
                difference += (x - y) * (x - y);
                norm += y * y;
            }
        }
        double error = norm ? sqrt(difference / norm) : 0;
        expect(error <= 1e-2 && same_places,
               n == 0   ? "long, out"
               : n == 1 ? "long, dqkv"
                        : "long, dfeatures",
               c, error);
    }
    problem_free(p);
}

static void check_all() {
    size_t lengths[] = {1, 63, 64, 65, 100, 128, 200, 1024}, sizes[] = {32, 64, 128};
    int windows[] = {0, 1, 17, 64, -1}, n = 0;
    for (size_t HS : sizes)
        for (size_t T : lengths)
            for (int window : windows) {
                n++;
                check_case(
                    {T == 1024 ? 1u : 1u + n % 3, T, T == 1024 ? 2u : 1u + n % 5, HS, true, n % 4 == 0, window, n % 3},
                    n);
                if (window == 0 || window == 17)
                    check_case({2, T, 3, HS, false, n % 4 == 1, window, (n + 1) % 3}, 1000 + n);
            }
    for (size_t HS : sizes) {
        check_case({2, 300, 5, HS, true, false, -1, 2}, 5000);
        check_case({1, 500, 5, HS, true, true, -1, 2}, 5001);
    }
    check_long({1, 20001, 2, 64, true, false, 0, 2}, 6000);
    check_long({1, 20001, 3, 64, true, false, -1, 0}, 6001);
    for (int n = 0; n < 2; n++)
        printf("largest errors%s: out %.1e lse %.1e (absolute) delta %.1e dq %.1e dk %.1e dv %.1e\n",
               n ? ", large logits" : "", worst[n][0], worst[n][1], worst[n][2], worst[n][3], worst[n][4], worst[n][5]);
    printf("checks %d, failures %d\n", checks, failures);
}

/* ---------------------------------------------------------------------- times */

template <typename F> static float median_ms(int repeats, F f) {
    std::vector<cudaEvent_t> events(repeats + 1);
    for (auto &e : events) check(cudaEventCreate(&e));
    for (int n = 0; n < 3; n++) f(n);
    check(cudaEventRecord(events[0]));
    for (int n = 0; n < repeats; n++) {
        f(n);
        check(cudaEventRecord(events[n + 1]));
    }
    check(cudaDeviceSynchronize());
    std::vector<float> ms(repeats);
    for (int n = 0; n < repeats; n++) check(cudaEventElapsedTime(&ms[n], events[n], events[n + 1]));
    for (auto &e : events) check(cudaEventDestroy(e));
    std::sort(ms.begin(), ms.end());
    return ms[repeats / 2];
}

static void time_case(const char *name, Case c) {
    Problem p[2] = {problem_new(c, 1), problem_new(c, 2)}; /* each set is several times L2 */
    float forward = median_ms(30, [&](int n) {
        Problem &x = p[n % 2];
        attention_forward(x.out, x.lse, x.in, c.B, c.T, c.NH, c.HS, 0);
    });
    float backward = median_ms(30, [&](int n) {
        Problem &x = p[n % 2];
        attention_backward(x.dqkv, x.dfeatures, x.delta, x.dout, x.out, x.lse, x.in, c.B, c.T, c.NH, c.HS, 0);
    });
    size_t seen = c.window > 0 && (size_t)c.window < c.T ? c.window : (c.T + 1) / 2;
    double product = 2.0 * c.B * c.T * c.NH * c.HS * seen;
    printf("%-34s %8.3f ms %5.0f TFLOP/s  %8.3f ms %5.0f TFLOP/s  %8.3f ms\n", name, forward,
           2 * product / forward * 1e-9, backward, 5 * product / backward * 1e-9, forward + backward);
    problem_free(p[0]);
    problem_free(p[1]);
}

static void time_all() {
    printf("%-34s %26s  %26s  %11s\n", "", "forward", "backward", "both");
    time_case("64 x 1024, 12 heads of 64", {64, 1024, 12, 64, true, false, 0, 0});
    time_case("the same again", {64, 1024, 12, 64, true, false, 0, 0});
    time_case("half the heads from features", {64, 1024, 12, 64, true, false, 0, 2});
    time_case("window 64", {64, 1024, 12, 64, true, false, 64, 0});
    time_case("16 x 4096, 12 heads of 64", {16, 4096, 12, 64, true, false, 0, 0});
    time_case("64 x 1024, 24 heads of 32", {64, 1024, 24, 32, true, false, 0, 0});
    time_case("64 x 1024, 6 heads of 128", {64, 1024, 6, 128, true, false, 0, 0});
}

static const char help[] =
    "attention_bench [portable] [check] [time]: checks the attention kernels, times them; without arguments both\n"
    "  check      against a naive reference in double; exit status 1 if any check fails\n"
    "  time       forward and backward passes at several shapes\n"
    "  portable   before them: the kernels for every card, not Hopper's own\n";

int main(int count, char **arguments) {
    program_name(arguments[0]);
    bool all = count == 1;
    for (int n = 1; n < count; n++) {
        if (!strcmp(arguments[n], "--help") || !strcmp(arguments[n], "-h")) {
            fputs(help, stdout);
            return 0;
        }
        if (strcmp(arguments[n], "portable") && strcmp(arguments[n], "check") && strcmp(arguments[n], "time"))
            die_usage("'%s' is none of portable, check and time", arguments[n]);
    }
    cudaDeviceProp device;
    check(cudaGetDeviceProperties(&device, 0));
    printf("%s\n", device.name);
    for (int n = 1; n < count || all; n++) {
        if (!all && !strcmp(arguments[n], "portable")) attention_portable = true;
        if (all || !strcmp(arguments[n], "check")) check_all();
        if (all || !strcmp(arguments[n], "time")) time_all();
        if (all) break;
    }
    return failures > 0;
}
