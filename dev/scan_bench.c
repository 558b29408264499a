/* Time of the attention part (features, mixers, their backward passes) a token at several lengths with the number of
   tokens fixed: the scan's should not depend on the length, attention's grows with it.
     make build/release/dev/scan_bench && OMP_NUM_THREADS=1 build/release/dev/scan_bench [--rounds N] */
#define GSA_NO_MAIN
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-function"
#include "../train_gsa.c"
#pragma GCC diagnostic pop

#include "../gsa/flags.h"

enum { TOKENS = 8192, LENGTHS = 3, MIXERS = 2, MOST = 99 };
static const int lengths[LENGTHS] = {512, 2048, 8192};

static int by_size(const void *a, const void *b) {
    return *(const double *)a > *(const double *)b ? 1 : *(const double *)a < *(const double *)b ? -1 : 0;
}

/* Seconds of one pass forward and backward over the heads of a layer, as gsa_forward and gsa_backward run them. */
static double pass(GSA *m, size_t B, size_t T) {
    Sizes z = config_sizes(&m->config);
    ActivationTensors a = m->a;
    double start = now_seconds();
    gsa_splat_waves(m, a.splat_waves, T, 0);
    features_forward(m, a.fq, a.fk, a.qkv, 0, B, T, m->a.rope_waves, a.splat_waves);
    attention_forward(a.att, a.att_lse, a.fq, a.fk, a.qkv, m->scale, m->window, NULL, true, B, T, z.NH, z.HS);
    scans_forward(m, a.att, a.att_lse, a.scan_rho, a.qkv, 0, B, T);
    attention_backward(a.dfq, a.dfk, a.dqkv, a.datt, a.att, a.att_lse, a.fq, a.fk, a.qkv, m->scale, m->window, NULL,
                       true, B, T, z.NH, z.HS);
    features_backward(m, a.dqkv, a.dfq, a.dfk, a.fq, a.fk, a.qkv, 0, B, T);
    scans_backward(m, a.dqkv, a.datt, a.att, a.scan_rho, a.qkv, 0, B, T);
    return now_seconds() - start;
}

/* A model of one layer with this mixer, at this length, on random numbers. */
static GSA *make_model(int mixer, int T) {
    Config c;
    memset(&c, 0, sizeof c);
    c.T = T;
    c.V = c.Vp = 128;
    c.L = 1;
    c.NH = 2;
    c.C = 128;
    c.position = POSITION_ROPE;
    c.attention = ATTENTION_GSA;
    c.mixer = mixer;
    c.S = mixer == MIXER_LINEAR ? 16 : 32;
    c.envelope = mixer == MIXER_LINEAR ? ENVELOPE_RAISED : ENVELOPE_COSINE;
    config_head_map(&c, NULL);
    GSA *m = gsa_create(&c, (size_t)(TOKENS / T));
    model_start(&c, m->params, 1);
    uint64_t rng = 2;
    for (size_t k = 0; k < (size_t)TOKENS * 3 * 128; k++) m->a.qkv[k] = (real)rng_normal(&rng);
    for (size_t k = 0; k < (size_t)TOKENS * 128; k++) m->a.datt[k] = (real)rng_normal(&rng);
    pass(m, (size_t)(TOKENS / T), (size_t)T); /* touches its memory */
    return m;
}

int main(int argc, char **argv) {
    static GSA *models[MIXERS][LENGTHS];
    static double times[MIXERS][LENGTHS][MOST];
    int64_t rounds = 7;
    Flag flags[] = {{FLAG_INT, "rounds", &rounds, 1, MOST, NULL, "passes of each; their median is shown", false},
                    {FLAG_ROOM, NULL, NULL, 0, 0, NULL, NULL, false}};
    program_name(argv[0]);
    if (parse_flags(flags, argc, argv, "scan_bench [flags]: time of the attention part a token, by length\n\n") > 0)
        die_usage("'%s' is no flag; --help lists them all", argv[1]);
    for (int mixer = 0; mixer < MIXERS; mixer++)
        for (int i = 0; i < LENGTHS; i++) models[mixer][i] = make_model(mixer, lengths[i]);
    for (int round = 0; round < rounds; round++) /* in turn, so that what else the machine does meets all alike */
        for (int mixer = 0; mixer < MIXERS; mixer++)
            for (int i = 0; i < LENGTHS; i++)
                times[mixer][i][round] = pass(models[mixer][i], (size_t)(TOKENS / lengths[i]), (size_t)lengths[i]);
    for (int mixer = MIXERS - 1; mixer >= 0; mixer--) {
        double first = 0;
        printf("%-8s", mixer == MIXER_LINEAR ? "linear" : "softmax");
        for (int i = 0; i < LENGTHS; i++) {
            qsort(times[mixer][i], (size_t)rounds, sizeof(double), by_size);
            double median = times[mixer][i][rounds / 2];
            if (i == 0) first = median;
            printf("   T %d: %.2f us a token, %.2f times that of %d", lengths[i], 1e6 * median / TOKENS, median / first,
                   lengths[0]);
            gsa_destroy(models[mixer][i]);
        }
        printf("\n");
    }
    return 0;
}
