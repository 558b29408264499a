/* bench: what the kernels of train_gsa.cu take in one training step, beside what this card could do.

   First the kernels are checked against train_gsa.c at odd shapes (the layers of test/test_cuda.cu). Then the card's
   own speeds are measured: a large copy, a large matrix product. Then every layer of a model is timed with events on
   the model's own buffers, going from layer to layer, so that no input is in the cache by chance; and at last whole
   steps.

     bench [--attention standard|gsa|hybrid|augment|extend] [--mixer softmax|linear] [--splats N] [--pos
     learned|rope|both] [--batch 64] [--seq 1024] [--layers 12] [--heads 12]
           [--channels 768] [--covariance iso|diag] [--window 0] [--recompute] [--mixers] [--profile]

   roofline: the larger of bytes / copy speed and operations / matrix speed, as a share of the time taken. Bytes:
   each input read once, each output written once. Operations of attention: 2 products forward and 5 backward over
   the causal half. */
#define GSA_TEST_NO_MAIN
#include "../../test/test_cuda.cu"

#include "../../gsa/flags.h"
#include "../../gsa/look/measure.h"

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
    MatmulShape s = {M, M, M, true, false, false, false, CUBLASLT_EPILOGUE_DEFAULT};
    *product = 2e3 * M * M * M / time_of([&](int) { matmul_run(mm, s, d, a, b, NULL, NULL, NULL, 1, 0); }, 0, 20);
    free_all();
}

int main(int argc, char **argv) {
    const char *attention = "standard", *position = "learned", *covariance = "iso", *mixer = "softmax";
    int64_t batch = 64, seq = 1024, layers = 12, heads = 12, channels = 768, window = 0, splats = 0;
    bool profile = false, recompute = false, mixers = false;
    Flag flags[] = {
        {FLAG_CHOICE, "attention", &attention, 0, 0, ATTENTION_CHOICES, "kind of attention", false},
        {FLAG_CHOICE, "pos", &position, 0, 0, POSITION_CHOICES, "kind of positions", false},
        {FLAG_CHOICE, "mixer", &mixer, 0, 0, MIXER_CHOICES, "what mixes the values of GSA heads", false},
        {FLAG_INT, "splats", &splats, 0, 64, NULL, "splats a head; 0: 16 for the linear mixer, else half the head size",
         false},
        {FLAG_CHOICE, "covariance", &covariance, 0, 0, COVARIANCE_CHOICES, "a splat's precision", false},
        {FLAG_INT, "batch", &batch, 1, 65536, NULL, "sequences", false},
        {FLAG_INT, "seq", &seq, 1, 1 << 24, NULL, "tokens a sequence", false},
        {FLAG_INT, "layers", &layers, 1, MAX_LAYERS, NULL, "layers", false},
        {FLAG_INT, "heads", &heads, 1, MAX_HEADS, NULL, "heads", false},
        {FLAG_INT, "channels", &channels, 32, 65536, NULL, "channels", false},
        {FLAG_INT, "window", &window, 0, 1 << 24, NULL, "window of standard heads", false},
        {FLAG_SWITCH, "recompute", &recompute, 0, 0, NULL,
         "whole steps only, blocks computed again in the backward pass", false},
        {FLAG_SWITCH, "mixers", &mixers, 0, 0, NULL, "features, attention and scans only, unchecked", false},
        {FLAG_SWITCH, "profile", &profile, 0, 0, NULL, "three steps and nothing else, for a profiler", false},
        {FLAG_ROOM, NULL, NULL, 0, 0, NULL, NULL, false}};
    program_name(argv[0]);
    parse_flags(flags, argc, argv, "usage: %s [flags]\n");
    printf("%s\n", cuda_name());
    cudaCheck(cudaEventCreate(&start));
    cudaCheck(cudaEventCreate(&end));

    Config c;
    memset(&c, 0, sizeof c);
    c.T = (int)seq;
    c.V = 50257;
    c.Vp = 50304;
    c.L = (int)layers;
    c.NH = (int)heads;
    c.C = (int)channels;
    c.S = (int)(splats ? splats : channels / heads / 2);
    c.window = (int)window;
    c.recompute = recompute;
    c.position = choice_index(POSITION_CHOICES, position);
    c.attention = choice_index(ATTENTION_CHOICES, attention);
    c.mixer = choice_index(MIXER_CHOICES, mixer);
    c.envelope = c.mixer == MIXER_LINEAR ? ENVELOPE_RAISED : ENVELOPE_COSINE;
    if (c.mixer == MIXER_LINEAR && !splats) c.S = 16;
    c.covariance = choice_index(COVARIANCE_CHOICES, covariance);
    const char *wrong = config_head_map(&c, NULL);
    if (!wrong) wrong = config_check(&c);
    if (wrong) die_usage("%s", wrong);
    size_t B = (size_t)batch, T = (size_t)seq, N = B * T;

    double copy = 0, product = 0;
    if (!profile) {
        Matmul mm;
        matmul_create(&mm);
        if (!mixers) {
            test_encoder(96);
            test_layernorm(37, 768);
            test_matmul(&mm, 37, 96, 160, false);
            test_matmul(&mm, 70, 64, 256, true);
            test_classifier(50257, 50304);
        }
        for (int k = 0; k < KINDS && !mixers; k++) test_heads(k, 2, 70);
        if (!mixers) printf("checked against the CPU: %d passed, %d failed\n", tests_passed, tests_failed);
        card_speeds(&mm, &copy, &product);
        matmul_destroy(&mm);
        printf("copy %.0f GB/s, matrix product %.0f TFLOP/s\n", copy * 1e-9, product * 1e-12);
    }

    CudaModel *m = (CudaModel *)cuda_create(&c, (int)batch);
    CudaSizes z = m->sizes;
    CudaActivations a = m->a;
    float *params = (float *)xmalloc(m->total * sizeof(float));
    model_start(&c, params, 1);
    cuda_write(m, BUFFER_PARAMS, params);
    free(params);
    uint64_t rng = 1;
    int *x = (int *)xmalloc(2 * N * sizeof(int)), *y = x + N;
    for (size_t i = 0; i < N; i++) { /* frequent and rare tokens, roughly as in text */
        x[i] = (int)(50257 * pow(rng_uniform(&rng), 4));
        if (i > 0) y[i - 1] = x[i];
    }
    y[N - 1] = x[0];

    auto step = [&](int i) {
        Update u = {{1e-4, 1e-3}, 0.9, 0.95, 0.1, {1, 1}, i + 1};
        double norms[NUM_CLIPS];
        int64_t clamped[NUM_BOUNDS];
        gsa_zero_gradients(m);
        m->expected = 1;
        gsa_forward(m, x, y, B, T);
        gsa_backward(m, 1);
        gsa_gradient_norms(m, norms);
        gsa_update(m, &u, clamped);
    };
    step(0);
    double whole = time_of(step, m->stream, profile || mixers ? 3 : 15);
    printf("step: %.2f ms, %.0f tokens/s", whole, 1e3 * (double)N / whole);
    if (cuda_peak_flops() > 0)
        printf(", %.1f %% of the data sheet's peak",
               1e5 * (double)N / whole * config_operations(&c) / cuda_peak_flops());
    printf("\n");
    if (profile || recompute) return 0;

    struct Item {
        const char *name;             /* those of mixers begin with a blank */
        double count, numbers, flops; /* numbers: floatX moved */
        std::function<void(int)> run;
    };
    const size_t C = z.C, A = z.A, L = z.L;
    const double n = (double)N, NC = n * (double)C, NA = n * (double)A, causal = 2 * NA * (double)T / 2;
    /* logits are made in pieces; those of all but the last piece twice */
    const size_t R = piece_size(N, m->logits_rows);
    const double r = (double)R, RC = r * (double)C, logits = R < N ? 2 * (double)CEIL_DIV(N, R) - 1 : 1;
    HeadList mapped = head_list(&c, 0, HEAD_STANDARD), splat = head_list(&c, 0, HEAD_SPLAT);
    const double share = (double)(mapped.count + splat.count) / (double)z.NH;
    HeadList scans = scan_list(&c, 0);
    const double scanned = (double)scans.count / (double)z.NH, softmax = attends(m, 0) ? 1 : 0,
                 responses = 2 * n * (double)(z.scans * z.W);
    bool causal_mask = c.objective == OBJECTIVE_LM, merged = c.attention == ATTENTION_EXTEND;
    Matmul *mm = &m->matmul;
    cudaStream_t s = m->stream;
    MasterTensors p = m->p, dp = m->dp;
    WeightTensors w = m->w;
#define AT(name, size) (a.name + (size_t)l * N * (size))
    auto forward = [&](const char *name, size_t in, size_t out, bool add, bool gelu, std::function<void(int)> run) {
        return Item{name, (double)L, n * (double)(in + out * (1 + add + gelu)) + (double)(in * out),
                    2 * n * (double)(in * out), run};
    };
    std::vector<Item> items = {
        {"encoder", 1, NC * 2, 0, [&](int) { encoder_forward(a.residual, a.x, w.wte, w.wpe, B, T, C, 0, s); }},
        {"layernorm", 2.0 * (double)L + 1, 2 * NC, 0,
         [&](int i) {
             size_t l = (size_t)i % L;
             layernorm_forward(AT(ln1, C), AT(ln1_mean, 1), AT(ln1_rstd, 1), AT(residual, C), p.ln1w, p.ln1b, N, C, s);
         }},
        forward("matmul qkv", C, 3 * A, false, false,
                [&](int i) {
                    size_t l = (size_t)i % L;
                    matmul_forward(mm, AT(qkv, 3 * A), AT(ln1, C), w.qkvw, w.qkvb, NULL, NULL, N, C, 3 * A, s);
                }),
        {" features", (double)L, share * 4 * NA, 0,
         [&](int i) {
             size_t l = (size_t)i % L;
             features_forward(m, AT(features, 2 * A), AT(qkv, 3 * A), l, B, T);
         }},
        {" attention", (double)L, softmax * 4 * NA, softmax * 2 * causal,
         [&](int i) {
             size_t l = (size_t)i % L;
             attention_forward(AT(att, A), AT(att_lse, z.NH), attention_input(m, l, N), B, T, z.NH, z.HS, s);
         }},
        {" scan's responses", (double)L, scanned * 2 * NA + responses, 0,
         [&](int i) {
             size_t l = (size_t)i % L;
             CudaActivations k = block_activations(m, l, N);
             ScanInput in = scan_input(m, k, l, B, T);
             splat_forward(NULL, {k.responses, z.W, (size_t)in.late, merged}, k.qkv, in.tables, in.heads, in.first_head,
                           B, T, z.NH, z.HS, z.S, z.P, s);
         }},
        {" scan", (double)L, scanned * 2 * NA + responses, 0,
         [&](int i) {
             size_t l = (size_t)i % L;
             CudaActivations k = block_activations(m, l, N);
             scan_forward(k.att, k.att_lse, k.scan_rho, m->p.log_far, scan_scratch(k), scan_input(m, k, l, B, T),
                          causal_mask, merged, z.HS, z.W, s);
         }},
        forward("matmul attproj", A, C, true, false,
                [&](int i) {
                    size_t l = (size_t)i % L;
                    matmul_forward(mm, AT(middle, C), AT(att, A), w.attprojw, w.attprojb, AT(residual, C), NULL, N, A,
                                   C, s);
                }),
        forward("matmul fc, gelu", C, 4 * C, false, true,
                [&](int i) {
                    size_t l = (size_t)i % L;
                    matmul_forward(mm, AT(gelu, 4 * C), AT(ln2, C), w.fcw, w.fcb, NULL, AT(fc, 4 * C), N, C, 4 * C, s);
                }),
        forward("matmul fcproj", 4 * C, C, true, false,
                [&](int i) {
                    size_t l = (size_t)i % L;
                    matmul_forward(mm, AT(residual, C) + N * C, AT(gelu, 4 * C), w.fcprojw, w.fcprojb, AT(middle, C),
                                   NULL, N, 4 * C, C, s);
                }),
        {"matmul logits", logits, RC + r * (double)z.Vp, 2 * RC * (double)z.Vp,
         [&](int) { matmul_forward(mm, a.logits, a.lnf, w.wte, NULL, NULL, NULL, R, C, z.Vp, s); }},
        {"classifier", logits, 2 * r * (double)z.Vp, 0,
         [&](int) { fused_classifier(a.logits, a.losses, a.y, 1 / (float)N, R, z.V, z.Vp, s); }},
        {"matmul logits, backward", (double)CEIL_DIV(N, R), 2 * (RC + r * (double)z.Vp), 4 * RC * (double)z.Vp,
         [&](int) { matmul_backward(mm, a.dln, dp.wte, NULL, NULL, a.logits, a.lnf, w.wte, NULL, 1, R, C, z.Vp, s); }},
        {"matmul fcproj, gelu, backward", (double)L, 12 * NC + NC + 4 * NC, 16 * NC * (double)C,
         [&](int i) {
             size_t l = (size_t)i % L;
             matmul_backward(mm, a.dfc, dp.fcprojw, NULL, NULL, a.dresidual, AT(gelu, 4 * C), w.fcprojw, AT(fc, 4 * C),
                             1, N, 4 * C, C, s);
         }},
        {"matmul fc, backward", (double)L, 14 * NC, 16 * NC * (double)C,
         [&](int i) {
             size_t l = (size_t)i % L;
             matmul_backward(mm, a.dln, dp.fcw, dp.fcb, a.partials, a.dfc, AT(ln2, C), w.fcw, NULL, 1, N, C, 4 * C, s);
         }},
        {"layernorm, backward", 2.0 * (double)L + 1, 4 * NC, 0,
         [&](int i) {
             size_t l = (size_t)i % L;
             layernorm_backward(a.dresidual, dp.ln1w, dp.ln1b, dp.attprojb, a.partials, a.dln, AT(residual, C), p.ln1w,
                                AT(ln1_mean, 1), AT(ln1_rstd, 1), N, C, s);
         }},
        {"matmul attproj, backward", (double)L, 2 * NC + 2 * NA, 4 * NC * (double)A,
         [&](int i) {
             size_t l = (size_t)i % L;
             matmul_backward(mm, a.datt, dp.attprojw, NULL, NULL, a.dresidual, AT(att, A), w.attprojw, NULL, 1, N, A, C,
                             s);
         }},
        {" attention, backward", (double)L, softmax * 8 * NA, softmax * 5 * causal,
         [&](int i) {
             size_t l = (size_t)i % L;
             attention_backward(a.dqkv, a.dfeatures, a.delta, a.datt, AT(att, A), AT(att_lse, z.NH),
                                attention_input(m, l, N), B, T, z.NH, z.HS, s);
         }},
        {" features, backward", (double)L, share * (splat.count ? 8 : 6) * NA, 0,
         [&](int i) {
             size_t l = (size_t)i % L;
             features_backward(m, a.dqkv, a.dfeatures, AT(features, 2 * A), AT(qkv, 3 * A), l, B, T);
         }},
        {" scan, backward", (double)L, scanned * 6 * NA + 3 * responses, 0,
         [&](int i) {
             size_t l = (size_t)i % L;
             CudaActivations k = block_activations(m, l, N);
             scan_backward(a.dresponses, a.dqkv, a.delta, a.datt, k.att, k.scan_rho, scan_scratch(k),
                           scan_input(m, k, l, B, T), causal_mask, merged, z.HS, z.W, s);
         }},
        {" scan's responses, backward", (double)L, scanned * 4 * NA + responses, 0,
         [&](int i) {
             size_t l = (size_t)i % L;
             CudaActivations k = block_activations(m, l, N);
             ScanInput in = scan_input(m, k, l, B, T);
             splat_backward(a.dqkv, a.moments, a.moments_sums, {a.dresponses, z.W, (size_t)in.late, merged}, NULL, NULL,
                            k.qkv, in.tables, in.heads, in.first_head, B, T, z.NH, z.HS, z.S, z.P, s);
         }},
        {"matmul qkv, backward", (double)L, 9 * NA + 2 * NC, 12 * NC * (double)A,
         [&](int i) {
             size_t l = (size_t)i % L;
             matmul_backward(mm, a.dln, dp.qkvw, dp.qkvb, a.partials, a.dqkv, AT(ln1, C), w.qkvw, NULL, 1, N, C, 3 * A,
                             s);
         }},
        {"encoder, backward", 1, 2 * NC, 0,
         [&](int) {
             Buckets b = m->buckets;
             b.positions = a.positions;
             b.segments = a.segments;
             b.tokens = a.bucket_tokens;
             encoder_backward(dp.wte, dp.wpe, a.dresidual, &b, a.token_sums, B, T, C, s);
         }},
        {"zero gradients", 1, (double)m->total * 4 / sizeof(floatX), 0, [&](int) { gsa_zero_gradients(m); }},
        {"gradient norms", 1, (double)m->total * 4 / sizeof(floatX), 0,
         [&](int) {
             double norms[NUM_CLIPS];
             gsa_gradient_norms(m, norms);
         }},
        {"AdamW", 1, (double)m->total * (28 + sizeof(floatX)) / sizeof(floatX), 0,
         [&](int) {
             Update u = {{0, 0}, 0.9, 0.95, 0, {1, 1}, 1000};
             int64_t clamped[NUM_BOUNDS];
             gsa_update(m, &u, clamped);
         }},
    };
    double sum = 0;
    printf("%-30s %5s %9s %9s %8s %8s %9s\n", "", "calls", "ms each", "ms a step", "GB/s", "TFLOP/s", "roofline");
    for (const Item &i : items) {
        if (i.numbers == 0 || (mixers && i.name[0] != ' ')) continue; /* no such layer in this model */
        double ms = time_of(i.run, s, 25), bytes = i.numbers * sizeof(floatX),
               floor = std::max(bytes / copy, i.flops / product);
        sum += ms * i.count;
        printf("%-30s %5.0f %9.4f %9.3f %8.0f %8.0f %7.0f %%\n", i.name, i.count, ms, ms * i.count, 1e-6 * bytes / ms,
               1e-9 * i.flops / ms, 1e5 * floor / ms);
    }
    printf("%-30s %5s %9s %9.3f\n", "sum", "", "", sum);
    gsa_destroy(m);
    free(x);
    return tests_failed > 0;
}
