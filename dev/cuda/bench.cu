/* bench: what the kernels of train_gsa.cu take in one training step, beside what this card could do.

   First the kernels are checked against train_gsa.c at odd shapes (the layers of test/test_cuda.cu). Then the card's
   own speeds are measured: a large copy, a large matrix product. Then whole steps of a model are timed, and at last
   every layer with events on the model's own buffers, going from layer to layer, so that no input is in the cache by
   chance.

     make build/release/bench && build/release/bench --help

   roofline: the larger of bytes / copy speed and operations / matrix speed, as a share of the time taken. Bytes:
   each input read once, each output written once. Operations of attention: 2 products forward and 5 backward over
   the causal half. */
#define GSA_TEST_NO_MAIN
#include "../../test/test_cuda.cu"

#include "../../gsa/look/measure.h"
#include "bench_model.cuh"

#include <algorithm>
#include <functional>
#include <vector>

static cudaEvent_t start, end;

/* Median milliseconds of f(i), i counting up. */
static double time_of(const std::function<void(int)> &f, cudaStream_t stream, int runs) {
    std::vector<float> times((size_t)runs);
    f(0);
    f(1);
    for (int i = 0; i < runs; i++) {
        cudaCheck(cudaEventRecord(start, stream));
        f(i);
        cudaCheck(cudaEventRecord(end, stream));
        cudaCheck(cudaEventSynchronize(end));
        cudaCheck(cudaEventElapsedTime(&times[(size_t)i], start, end));
    }
    std::sort(times.begin(), times.end());
    return times[(size_t)runs / 2];
}

__global__ static void noise_kernel(floatX *x, size_t n, uint32_t seed) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    uint32_t h = (uint32_t)i * 2654435761u ^ seed;
    h ^= h >> 16;
    h *= 0x85ebca6bu;
    h ^= h >> 13;
    h *= 0xc2b2ae35u;
    h ^= h >> 16;
    x[i] = (floatX)((float)h / 2147483648.0f - 1);
}

/* bytes a second, operations a second */
static void card_speeds(Matmul *mm, double *copy, double *product) {
    enum { M = 8192 };
    size_t n = (size_t)M * M, bytes = (size_t)1 << 30;
    floatX *a = device_room<floatX>(n), *b = device_room<floatX>(n), *d = device_room<floatX>(n);
    char *from = device_room<char>(bytes), *to = device_room<char>(bytes);
    noise_kernel<<<CEIL_DIV(n, 256), 256>>>(a, n, 1);
    noise_kernel<<<CEIL_DIV(n, 256), 256>>>(b, n, 2);
    *copy = 2e3 * (double)bytes /
            time_of([&](int) { cudaCheck(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, 0)); }, 0, 20);
    MatmulShape s = {M, M, M, true, false, false, 0, CUBLASLT_EPILOGUE_DEFAULT, 1, 1};
    *product = 2e3 * M * M * M / time_of([&](int) { matmul_run(mm, s, d, a, b, NULL, NULL, NULL, 1, 0); }, 0, 20);
    free_all();
}

/* ---------------------------------------------------------------------- what is measured */

typedef struct {
    BenchModel model;
    bool profile, mixers;
} Options;

static Options read_options(int argc, char **argv) {
    static Options o = {bench_model_shape, false, false};
    o.model.position = "learned";
    static Flag flags[] = {
        BENCH_MODEL_FLAGS(o.model),
        {FLAG_SWITCH, "mixers", &o.mixers, 0, 0, NULL, "features, attention and scans only, unchecked", false},
        {FLAG_SWITCH, "profile", &o.profile, 0, 0, NULL, "three steps and nothing else, for a profiler", false},
        {FLAG_ROOM, NULL, NULL, 0, 0, NULL, NULL, false}};
    if (parse_flags(flags, argc, argv, "bench [flags]: the time of each kernel in a training step\n\n") > 0)
        die_usage("'%s' is no flag; --help lists them all", argv[1]);
    return o;
}

static void check_and_measure_card(bool check_kernels, double *copy, double *product) {
    Matmul mm;
    matmul_create(&mm);
    if (check_kernels) {
        test_encoder(96);
        test_layernorm(37, 768);
        test_matmul(&mm, 37, 96, 160, false);
        test_matmul(&mm, 70, 64, 256, true);
        test_classifier(50257, 50304);
        for (int k = 0; k < KINDS; k++) test_heads(k, 2, 70);
        printf("checked against the CPU: %d passed, %d failed\n", tests_passed, tests_failed);
    }
    card_speeds(&mm, copy, product);
    matmul_destroy(&mm);
    printf("copy %.0f GB/s, matrix product %.0f TFLOP/s\n", *copy * 1e-9, *product * 1e-12);
}

static void time_steps(CudaModel *m, const int *x, const int *y, size_t B, size_t T, int runs) {
    double N = (double)(B * T), last = 0;
    std::vector<double> times;
    for (int i = 0; i < runs + 3; i++) {
        StepResult result;
        bench_step(m, x, y, B, i + 1, false);
        if (i > 0) cuda_result(m, &result);
        double now = now_seconds();
        if (i > 2) times.push_back(1e3 * (now - last));
        last = now;
    }
    cudaCheck(cudaStreamSynchronize(m->stream));
    std::sort(times.begin(), times.end());
    double whole = times[times.size() / 2];
    printf("step: %.2f ms, %.0f tokens/s", whole, 1e3 * N / whole);
    if (cuda_peak_flops() > 0)
        printf(", %.1f %% of the data sheet's peak",
               1e5 * N / whole * config_operations(&m->config) / cuda_peak_flops());
    printf("\n");
}

/* ---------------------------------------------------------------------- layer by layer */

struct Item {
    const char *name;                  /* those of mixers begin with a blank */
    double count, numbers, flops;      /* calls in a step; floatX moved and operations of each */
    std::function<void(size_t l)> run; /* in layer l, where it belongs to one */
};

/* What the items share: the model's buffers by the names of train_gsa.cu, sizes, and counts of numbers as double. */
struct Bench {
    CudaModel *m;
    Matmul *mm;
    cudaStream_t s;
    CudaSizes z;
    CudaActivations a;
    MasterTensors p, dp;
    WeightTensors w;
    size_t B, T, N, C, A, L, R; /* R: rows of logits made at once; those of all but the last piece are made twice */
    double n, NC, NA, r, RC, logits, causal, share, scanned, softmax, responses;
    bool causal_mask, merged;

    Item product(const char *name, size_t in, size_t out, bool add, bool gelu, std::function<void(size_t)> run) {
        return {name, (double)L, n * (double)(in + out * (1 + add + gelu)) + (double)(in * out),
                2 * n * (double)(in * out), run};
    }
    /* in the order of a step */
    std::vector<Item> input_items();
    std::vector<Item> mixer_items();
    std::vector<Item> mlp_items();
    std::vector<Item> mlp_backward_items();
    std::vector<Item> mixer_backward_items();
    std::vector<Item> input_backward_items();
    std::vector<Item> update_items();
};

static Bench make_bench(CudaModel *m, size_t B, size_t T) {
    const Config &c = m->config;
    Bench b = {};
    b.m = m;
    b.mm = &m->matmul;
    b.s = m->stream;
    b.z = m->sizes;
    b.a = m->a;
    b.p = m->p;
    b.dp = m->dp;
    b.w = m->w;
    b.B = B;
    b.T = T;
    b.N = B * T;
    b.C = b.z.C;
    b.A = b.z.A;
    b.L = b.z.L;
    b.R = piece_size(b.N, m->logits_rows);
    b.n = (double)b.N;
    b.NC = b.n * (double)b.C;
    b.NA = b.n * (double)b.A;
    b.r = (double)b.R;
    b.RC = b.r * (double)b.C;
    b.logits = b.R < b.N ? 2 * (double)CEIL_DIV(b.N, b.R) - 1 : 1;
    b.causal = 2 * b.NA * (double)T / 2;
    int featured = head_list(&c, 0, HEAD_STANDARD).count + head_list(&c, 0, HEAD_SPLAT).count;
    b.share = (double)featured / (double)b.z.NH;
    b.scanned = (double)scan_list(&c, 0).count / (double)b.z.NH;
    b.softmax = attends(m, 0) ? 1 : 0;
    b.responses = 2 * b.n * (double)(b.z.scans * b.z.W);
    b.causal_mask = c.objective == OBJECTIVE_LM;
    b.merged = c.attention == ATTENTION_EXTEND;
    return b;
}

#define AT(name, size) (a.name + l * N * (size)) /* layer l's part of an activation, `size` numbers a token */

std::vector<Item> Bench::input_items() {
    return {
        {"encoder", 1, NC * 2, 0, [this](size_t) { encoder_forward(a.residual, a.x, w.wte, w.wpe, B, T, C, 0, s); }},
        {"layernorm", 2.0 * (double)L + 1, 2 * NC, 0,
         [this](size_t l) {
             layernorm_forward(AT(ln1, C), AT(ln1_mean, 1), AT(ln1_rstd, 1), AT(residual, C), p.ln1w, p.ln1b, N, C, s);
         }},
        product("matmul qkv", C, 3 * A, false, false,
                [this](size_t l) {
                    matmul_forward(mm, AT(qkv, 3 * A), AT(ln1, C), w.qkvw, w.qkvb, NULL, NULL, N, C, 3 * A, s);
                }),
    };
}

std::vector<Item> Bench::mixer_items() {
    return {
        {" features", (double)L, share * 4 * NA, 0,
         [this](size_t l) { features_forward(m, AT(features, 2 * A), AT(qkv, 3 * A), l, B, T); }},
        {" attention", (double)L, softmax * 4 * NA, softmax * 2 * causal,
         [this](size_t l) {
             attention_forward(AT(att, A), AT(att_lse, z.NH), attention_input(m, l, N), B, T, z.NH, z.HS, s);
         }},
        {" scan's responses", (double)L, scanned * 2 * NA + responses, 0,
         [this](size_t l) {
             CudaActivations k = block_activations(m, l, N);
             ScanInput in = scan_input(m, k, l, B, T);
             splat_forward(NULL, {k.responses, z.W, (size_t)in.late, merged}, k.qkv, in.tables, in.heads, in.first_head,
                           B, T, z.NH, z.HS, z.S, z.P, s);
         }},
        {" scan", (double)L, scanned * 2 * NA + responses, 0,
         [this](size_t l) {
             CudaActivations k = block_activations(m, l, N);
             scan_forward(k.att, k.att_lse, k.scan_rho, m->p.log_far, scan_scratch(k), scan_input(m, k, l, B, T),
                          causal_mask, merged, z.HS, z.W, s);
         }},
    };
}

std::vector<Item> Bench::mlp_items() {
    return {
        product("matmul attproj", A, C, true, false,
                [this](size_t l) {
                    matmul_forward(mm, AT(middle, C), AT(att, A), w.attprojw, w.attprojb, AT(residual, C), NULL, N, A,
                                   C, s);
                }),
        product("matmul fc, gelu", C, 4 * C, false, true,
                [this](size_t l) {
                    matmul_forward(mm, AT(gelu, 4 * C), AT(ln2, C), w.fcw, w.fcb, NULL, AT(fc, 4 * C), N, C, 4 * C, s);
                }),
        product("matmul fcproj", 4 * C, C, true, false,
                [this](size_t l) {
                    matmul_forward(mm, AT(residual, C) + N * C, AT(gelu, 4 * C), w.fcprojw, w.fcprojb, AT(middle, C),
                                   NULL, N, 4 * C, C, s);
                }),
        {"matmul logits", logits, RC + r * (double)z.Vp, 2 * RC * (double)z.Vp,
         [this](size_t) { matmul_forward(mm, a.logits, a.lnf, w.wte, NULL, NULL, NULL, R, C, z.Vp, s); }},
        {"classifier", logits, 2 * r * (double)z.Vp, 0,
         [this](size_t) { fused_classifier(a.logits, a.losses, a.y, 1 / (float)N, R, z.V, z.Vp, s); }},
    };
}

std::vector<Item> Bench::mlp_backward_items() {
    return {
        {"matmul logits, backward", (double)CEIL_DIV(N, R), 2 * (RC + r * (double)z.Vp), 4 * RC * (double)z.Vp,
         [this](size_t) {
             matmul_backward(mm, a.dln, dp.wte, NULL, NULL, a.logits, a.lnf, w.wte, NULL, 1, R, C, z.Vp, s);
         }},
        {"matmul fcproj, gelu, backward", (double)L, 12 * NC + NC + 4 * NC, 16 * NC * (double)C,
         [this](size_t l) {
             matmul_backward(mm, a.dfc, dp.fcprojw, NULL, NULL, a.dresidual, AT(gelu, 4 * C), w.fcprojw, AT(fc, 4 * C),
                             1, N, 4 * C, C, s);
         }},
        {"matmul fc, backward", (double)L, 14 * NC, 16 * NC * (double)C,
         [this](size_t l) {
             matmul_backward(mm, a.dln, dp.fcw, dp.fcb, a.partials, a.dfc, AT(ln2, C), w.fcw, NULL, 1, N, C, 4 * C, s);
         }},
        {"layernorm, backward", 2.0 * (double)L + 1, 4 * NC, 0,
         [this](size_t l) {
             layernorm_backward(a.dresidual, dp.ln1w, dp.ln1b, dp.attprojb, a.partials, a.dln, AT(residual, C), p.ln1w,
                                AT(ln1_mean, 1), AT(ln1_rstd, 1), N, C, s);
         }},
        {"matmul attproj, backward", (double)L, 2 * NC + 2 * NA, 4 * NC * (double)A,
         [this](size_t l) {
             matmul_backward(mm, a.datt, dp.attprojw, NULL, NULL, a.dresidual, AT(att, A), w.attprojw, NULL, 1, N, A, C,
                             s);
         }},
    };
}

std::vector<Item> Bench::mixer_backward_items() {
    const double featured = head_list(&m->config, 0, HEAD_SPLAT).count ? 8 : 6; /* numbers a channel of a head */
    return {
        {" attention, backward", (double)L, softmax * 8 * NA, softmax * 5 * causal,
         [this](size_t l) {
             attention_backward(a.dqkv, a.dfeatures, a.delta, a.datt, AT(att, A), AT(att_lse, z.NH),
                                attention_input(m, l, N), B, T, z.NH, z.HS, s);
         }},
        {" features, backward", (double)L, share * featured * NA, 0,
         [this](size_t l) { features_backward(m, a.dqkv, a.dfeatures, AT(features, 2 * A), AT(qkv, 3 * A), l, B, T); }},
        {" scan, backward", (double)L, scanned * 6 * NA + 3 * responses, 0,
         [this](size_t l) {
             CudaActivations k = block_activations(m, l, N);
             scan_backward(a.dresponses, a.dqkv, a.delta, a.datt, k.att, k.scan_rho, scan_scratch(k),
                           scan_input(m, k, l, B, T), causal_mask, merged, z.HS, z.W, s);
         }},
        {" scan's responses, backward", (double)L, scanned * 4 * NA + responses, 0,
         [this](size_t l) {
             CudaActivations k = block_activations(m, l, N);
             ScanInput in = scan_input(m, k, l, B, T);
             splat_backward(a.dqkv, a.moments, a.moments_sums, {a.dresponses, z.W, (size_t)in.late, merged}, NULL, NULL,
                            k.qkv, in.tables, in.heads, in.first_head, B, T, z.NH, z.HS, z.S, z.P, s);
         }},
    };
}

std::vector<Item> Bench::input_backward_items() {
    return {
        {"matmul qkv, backward", (double)L, 9 * NA + 2 * NC, 12 * NC * (double)A,
         [this](size_t l) {
             matmul_backward(mm, a.dln, dp.qkvw, dp.qkvb, a.partials, a.dqkv, AT(ln1, C), w.qkvw, NULL, 1, N, C, 3 * A,
                             s);
         }},
        {"encoder, backward", 1, 2 * NC, 0,
         [this](size_t) {
             Buckets b = m->batches[m->batch].buckets;
             b.positions = a.positions;
             b.segments = a.segments;
             b.tokens = a.bucket_tokens;
             encoder_backward(dp.wte, dp.wpe, a.dresidual, &b, a.token_sums, B, T, C, s);
         }},
    };
}

std::vector<Item> Bench::update_items() {
    return {
        {"zero gradients", 1, (double)m->total * 4 / sizeof(floatX), 0, [this](size_t) { gsa_zero_gradients(m); }},
        {"gradient norms", 1, (double)m->total * 4 / sizeof(floatX), 0,
         [this](size_t) {
             double norms[NUM_CLIPS];
             gsa_gradient_norms(m, norms);
         }},
        {"AdamW", 1, (double)m->total * (28 + sizeof(floatX)) / sizeof(floatX), 0,
         [this](size_t) {
             Update u = {{0, 0}, 0.9, 0.95, 0, {1, 1}, 1000, 0.95};
             int64_t clamped[NUM_BOUNDS];
             gsa_update(m, &u, clamped);
         }},
    };
}

/* A line an item; returns their milliseconds in one step. */
static double time_items(const std::vector<Item> &items, const Bench &b, bool mixers, double copy, double product) {
    double sum = 0;
    for (const Item &i : items) {
        if (i.numbers == 0 || (mixers && i.name[0] != ' ')) continue; /* no such layer in this model */
        double ms = time_of([&](int n) { i.run((size_t)n % b.L); }, b.s, 25), bytes = i.numbers * sizeof(floatX),
               floor = std::max(bytes / copy, i.flops / product);
        sum += ms * i.count;
        printf("%-30s %5.0f %9.4f %9.3f %8.0f %8.0f %7.0f %%\n", i.name, i.count, ms, ms * i.count, 1e-6 * bytes / ms,
               1e-9 * i.flops / ms, 1e5 * floor / ms);
    }
    return sum;
}

int main(int argc, char **argv) {
    program_name(argv[0]);
    Options o = read_options(argc, argv);
    printf("%s\n", cuda_name());
    cudaCheck(cudaEventCreate(&start));
    cudaCheck(cudaEventCreate(&end));
    Config c = bench_config(&o.model);
    size_t B = (size_t)o.model.batch, T = (size_t)o.model.seq;
    double copy = 0, product = 0;
    if (!o.profile) check_and_measure_card(!o.mixers, &copy, &product);

    int *x = (int *)xmalloc(2 * B * T * sizeof(int)), *y = x + B * T;
    CudaModel *m = bench_model(&c, B, 1, x, y);
    time_steps(m, x, y, B, T, o.profile || o.mixers ? 3 : 30);
    if (o.profile || o.model.recompute) return 0;

    Bench b = make_bench(m, B, T);
    printf("%-30s %5s %9s %9s %8s %8s %9s\n", "", "calls", "ms each", "ms a step", "GB/s", "TFLOP/s", "roofline");
    double sum = 0;
    for (const std::vector<Item> &items : {b.input_items(), b.mixer_items(), b.mlp_items(), b.mlp_backward_items(),
                                           b.mixer_backward_items(), b.input_backward_items(), b.update_items()})
        sum += time_items(items, b, o.mixers, copy, product);
    printf("%-30s %5s %9s %9.3f\n", "sum", "", "", sum);
    gsa_destroy(m);
    free(x);
    return tests_failed > 0;
}
