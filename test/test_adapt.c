/* Birth and death of splats: each rule on statistics made up for it, edits against the outputs of the network in
   double, the detector of shifts. */
#define GSA_DOUBLE
#include "network.h"

#include "../gsa/run/adapt.h"

enum { ROOM = 64 };
static AdaptEvent events[ROOM];

/* A model's splats as the host sees them, and a record in which nothing calls for an edit: all are old, equally
   active, with the same pull. */
typedef struct {
    Config c;
    Adapt *a;
    Tensor t[NUM_TENSORS];
    float *flat, *m, *v, *splats;
    AdaptRules rules;
} Scene;

static Scene make_scene(int mode, int mixer, int envelope, int covariance, int S) {
    Scene s;
    memset(&s, 0, sizeof s);
    const char *problem =
        try_config(&s.c, ATTENTION_GSA, NULL, POSITION_ROPE, mixer, covariance, envelope, 0, OBJECTIVE_LM);
    s.c.C = 128;
    s.c.S = S; /* heads of 64 */
    problem = problem ? problem : config_check(&s.c);
    if (problem) die("%s", problem);
    size_t total = model_tensors(&s.c, s.t);
    s.flat = (float *)xmalloc(3 * total * sizeof(float));
    s.m = s.flat + total;
    s.v = s.m + total;
    model_start(&s.c, s.flat, 3);
    s.a = adapt_create(&s.c, 5);
    s.splats = s.flat + s.a->first;
    for (size_t i = 0; i < 2 * total; i++) s.m[i] = 1; /* moments, to see which are forgotten */
    s.rules = adapt_rules_default();
    s.rules.mode = mode;
    s.rules.end = 10000;
    s.rules.every = 50;
    s.rules.activation = 0.05;
    uint64_t rng = 9;
    float *x = (float *)xmalloc(ADAPT_TOKENS * 64 * sizeof *x);
    for (int g = 0; g < config_gsa_heads(&s.c); g++)
        for (int part = 0; part < 2; part++) {
            for (size_t i = 0; i < ADAPT_TOKENS * 64; i++) x[i] = (float)rng_normal(&rng);
            adapt_sample(s.a, g, part, x, ADAPT_TOKENS);
        }
    free(x);
    s.a->numbers[ADAPT_COUNT_WINDOWS] = ADAPT_WINDOWS;
    for (size_t i = 0; i < s.a->G * s.a->S * ADAPT_WINDOWS; i++) {
        s.a->activation[i] = 1.0f / (float)S;
        s.a->pull[i] = 1;
    }
    return s;
}

static void free_scene(Scene *s) {
    adapt_free(s->a);
    free(s->flat);
}

static float *of(Scene *s, int tensor, size_t g, size_t slot) {
    return s->flat + s->t[tensor].offset + (g * (size_t)s->c.S + slot) * (size_t)s->t[tensor].shape[2];
}
static void set_rings(float *rings, const Scene *s, size_t g, size_t slot, double value) {
    for (int w = 0; w < ADAPT_WINDOWS; w++) rings[(g * s->a->S + slot) * ADAPT_WINDOWS + (size_t)w] = (float)value;
}
static int pass(Scene *s, int64_t step) {
    return adapt_pass(s->a, &s->rules, step, s->splats, s->m + s->a->first, s->v + s->a->first, events);
}

static void check_moments(Scene *s, size_t g, size_t slot, bool forgotten, const char *what) {
    static const int splat[] = {TENSOR_mu,        TENSOR_log_precision, TENSOR_log_alpha,
                                TENSOR_log_theta, TENSOR_log_delta,     TENSOR_psi};
    bool good = true;
    for (size_t i = 0; i < sizeof splat / sizeof *splat; i++) {
        const Tensor *t = &s->t[splat[i]];
        for (size_t k = 0; t->size && k < (size_t)t->shape[2]; k++) {
            size_t at = t->offset + (g * (size_t)s->c.S + slot) * (size_t)t->shape[2] + k;
            good &= s->m[at] == (forgotten ? 0 : 1) && s->v[at] == (forgotten ? 0 : 1);
        }
    }
    CHECK(good, "%s: Adam's moments of slot %zu are %s", what, slot, forgotten ? "zero" : "kept");
}

/* ---------------------------------------------------------------------- rules */

static void test_nothing_to_do(void) {
    for (int mode = ADAPT_RELOCATE; mode <= ADAPT_GROW; mode++) {
        Scene s = make_scene(mode, MIXER_SOFTMAX, ENVELOPE_COSINE, COVARIANCE_ISO, 16);
        CHECK(pass(&s, 1000) == 0, "even statistics give no event");
        for (size_t i = 0; i < s.a->G * s.a->S * ADAPT_WINDOWS; i++) s.a->pull[i] = 0;
        CHECK(pass(&s, 1000) == 0, "nor do gradients that have vanished");
        free_scene(&s);
    }
}

/* Three idle splats: at most two of them die in one pass, and what is young stays. */
static void test_death(void) {
    Scene s = make_scene(ADAPT_GROW, MIXER_SOFTMAX, ENVELOPE_COSINE, COVARIANCE_ISO, 32);
    for (size_t slot = 3; slot < 6; slot++) set_rings(s.a->activation, &s, 1, slot, 0.04 / 32 / (double)slot);
    s.a->born[s.a->S + 3] = 950;
    int n = pass(&s, 1000);
    CHECK(n == 4 && events[0].kind == ADAPT_DEATH && events[0].g == 1 && events[0].slot == 5 &&
              events[1].kind == ADAPT_DEATH && events[1].slot == 4,
          "the two most idle of old splats die, of head 1");
    CHECK(events[2].kind == ADAPT_BIRTH && events[3].kind == ADAPT_BIRTH && events[2].slot + events[3].slot == 9,
          "and free slots are filled (%d events, kind %d)", n, events[2].kind);
    check_moments(&s, 1, 5, true, "death and birth");
    check_moments(&s, 1, 6, false, "of others");
    double size = 0;
    for (int k = 0; k < 64; k++) size += of(&s, TENSOR_mu, 1, 5)[k] * of(&s, TENSOR_mu, 1, 5)[k];
    CHECK(fabs(size - 1) < 1e-5, "born on the unit sphere, |mu|^2 = %g", size);
    for (size_t slot = 0; slot < 32; slot++)
        CHECK(fabs(*of(&s, TENSOR_log_alpha, 1, slot) - config_amplitude_start(&s.c)) < 1e-5 &&
                  *of(&s, TENSOR_log_alpha_reference, 1, slot) == *of(&s, TENSOR_log_alpha, 1, slot),
              "amplitude of slot %zu", slot);
    s.a->born[s.a->S + 3] = 0;
    n = pass(&s, 1050);
    CHECK(n == 2 && events[0].kind == ADAPT_DEATH && events[0].slot == 3, "then the third one dies, no longer young");
    free_scene(&s);
}

/* However idle: no more die in a pass than come, in 32 passes; and the last splat of a head stays. */
static void test_survival(void) {
    Scene s = make_scene(ADAPT_GROW, MIXER_SOFTMAX, ENVELOPE_COSINE, COVARIANCE_ISO, 32);
    for (int step = 1000; step < 2600; step += 50) {
        for (size_t g = 0; g < s.a->G; g++)
            for (size_t slot = 1; slot < 32; slot++) {
                set_rings(s.a->activation, &s, g, slot, 1e-6);
                s.a->born[g * 32 + slot] = 0;
            }
        int n = pass(&s, step);
        CHECK(n == 4 * (int)s.a->G && adapt_alive(&s.c, 0, s.splats) == 32 && adapt_alive(&s.c, 1, s.splats) == 32,
              "step %d: %d events, %d alive", step, n, adapt_alive(&s.c, 0, s.splats));
    }
    free_scene(&s);

    for (int mode = ADAPT_RELOCATE; mode <= ADAPT_GROW; mode++) {
        s = make_scene(mode, MIXER_LINEAR, ENVELOPE_RAISED, COVARIANCE_ISO, 1);
        s.rules.activation = 1;
        set_rings(s.a->activation, &s, 0, 0, 0.5);
        CHECK(pass(&s, 1000) == 0 && adapt_alive(&s.c, 0, s.splats) == 1, "a head keeps its only splat");
        free_scene(&s);
    }
}

/* 4 of 32: full after 14 passes, each time with the amplitude of a head of so many. */
static void test_growth(void) {
    Scene s = make_scene(ADAPT_GROW, MIXER_SOFTMAX, ENVELOPE_COSINE, COVARIANCE_ISO, 32);
    adapt_start_alive(&s.c, 4, s.flat);
    *of(&s, TENSOR_log_alpha, 0, 0) += 0.5f; /* what one has learned stays */
    for (int i = 1; i <= 14; i++) {
        int n = pass(&s, 5 * i);
        CHECK(n == 2 * (int)s.a->G && adapt_alive(&s.c, 0, s.splats) == 4 + 2 * i, "pass %d: %d events, %d alive", i, n,
              adapt_alive(&s.c, 0, s.splats));
        double expected = splat_amplitude_start(4 + 2 * i, 64), worst = 0;
        for (size_t slot = 0; slot < 32; slot++)
            if (*of(&s, TENSOR_alive, 0, slot) > 0)
                worst = fmax(worst, fmax(fabs(*of(&s, TENSOR_log_alpha_reference, 0, slot) - expected),
                                         fabs(*of(&s, TENSOR_log_alpha, 0, slot) - expected - (slot ? 0 : 0.5))));
        CHECK(worst < 1e-5, "amplitudes of %d splats are off by %g", 4 + 2 * i, worst);
    }
    free_scene(&s);
}

/* A ball is spread out at once, and then nothing more happens. */
static void test_ball(void) {
    for (int mode = ADAPT_RELOCATE; mode <= ADAPT_GROW; mode++) {
        Scene s = make_scene(mode, MIXER_SOFTMAX, ENVELOPE_COSINE, COVARIANCE_ISO, 32);
        adapt_start_ball(&s.c, s.flat, 5);
        int n, passes = 0;
        while (passes < 100 && (n = pass(&s, 5 * ++passes)) > 0)
            for (int i = 0; i < n; i++)
                CHECK(mode == ADAPT_RELOCATE ? events[i].kind == ADAPT_MOVE
                                             : events[i].kind == ADAPT_DEATH || events[i].kind == ADAPT_BIRTH,
                      "mode %d, pass %d: event of kind %d", mode, passes, events[i].kind);
        CHECK(passes == 17, "31 of 32 leave the ball, two in a pass: nothing to do in pass %d", passes);
        double closest = 4;
        for (size_t one = 0; one < 32; one++)
            for (size_t two = one + 1; two < 32; two++) {
                double square = 0;
                for (int k = 0; k < 64; k++)
                    square += pow(of(&s, TENSOR_mu, 1, one)[k] - of(&s, TENSOR_mu, 1, two)[k], 2);
                closest = fmin(closest, square);
            }
        CHECK(closest > 0.5 && adapt_alive(&s.c, 1, s.splats) == 32, "the closest two centres are %g apart",
              sqrt(closest));
        CHECK(fabs(*of(&s, TENSOR_log_alpha, 1, 7) - config_amplitude_start(&s.c)) < 1e-5,
              "amplitudes are as at the start");
        free_scene(&s);
    }
}

/* Into the free slot whose frequency is farthest from all others. */
static void test_split(void) {
    Scene s = make_scene(ADAPT_GROW, MIXER_LINEAR, ENVELOPE_RAISED, COVARIANCE_DIAG, 16);
    *of(&s, TENSOR_alive, 0, 7) = 0;
    set_rings(s.a->pull, &s, 0, 4, 100);
    set_rings(s.a->activation, &s, 0, 4, 0.1);
    *of(&s, TENSOR_psi, 0, 4) = 0.75f;
    *of(&s, TENSOR_psi, 0, 7) = -1;
    int n = pass(&s, 1000);
    CHECK(*of(&s, TENSOR_psi, 0, 4) == 0.75f && *of(&s, TENSOR_psi, 0, 7) == 0.75f, "both have its phase");
    CHECK(n == 1 && events[0].kind == ADAPT_SPLIT && events[0].from == 4 && events[0].slot == 7,
          "the splat that is pulled most is split");
    check_moments(&s, 0, 4, true, "split");
    check_moments(&s, 0, 7, true, "split");
    float *a = of(&s, TENSOR_mu, 0, 4), *b = of(&s, TENSOR_mu, 0, 7), apart = 0;
    for (int k = 0; k < 64; k++) apart += (a[k] - b[k]) * (a[k] - b[k]);
    CHECK(apart > 0.01 && apart < 1, "the two are moved apart by %g", sqrt(apart));
    CHECK(fabs(*of(&s, TENSOR_log_alpha, 0, 4) - *of(&s, TENSOR_log_alpha, 0, 7)) < 1e-5 &&
              fabs(*of(&s, TENSOR_log_alpha, 0, 4) + log(2)) < 1e-5,
          "each has half of the amplitude");
    free_scene(&s);
}

/* Phases are angles: two near half a turn are alike on either side of it, and what is merged has that of the more
   active splat. */
static void test_merge_phases(void) {
    static const struct {
        float psi, other;
        bool alike;
    } pairs[] = {{1, 1.05f, true}, {1, 1.2f, false}, {3.12f, -3.12f, true}, {3, -3, false}};
    for (size_t i = 0; i < sizeof pairs / sizeof *pairs; i++)
        for (int second = 0; second < 2; second++) {
            Scene s = make_scene(ADAPT_GROW, MIXER_SOFTMAX, ENVELOPE_COSINE, COVARIANCE_ISO, 16);
            memcpy(of(&s, TENSOR_mu, 0, 6), of(&s, TENSOR_mu, 0, 5), 64 * sizeof(float));
            *of(&s, TENSOR_log_theta, 0, 6) = *of(&s, TENSOR_log_theta, 0, 5);
            *of(&s, TENSOR_psi, 0, 5) = pairs[i].psi;
            *of(&s, TENSOR_psi, 0, 6) = pairs[i].other;
            set_rings(s.a->activation, &s, 0, second ? 6 : 5, 0.1);
            int n = pass(&s, 1000);
            CHECK(n > 0 && events[0].kind == (pairs[i].alike ? ADAPT_MERGE : ADAPT_DEATH), "phases %g and %g are %s",
                  (double)pairs[i].psi, (double)pairs[i].other, pairs[i].alike ? "alike" : "not alike");
            size_t kept = second ? 6 : 5;
            CHECK(*of(&s, TENSOR_psi, 0, kept) == (second ? pairs[i].other : pairs[i].psi),
                  "the more active one's phase stays");
            free_scene(&s);
        }
    /* by hand: slot 5 takes in the more active slot 6, and has its phase */
    Scene s = make_scene(ADAPT_GROW, MIXER_SOFTMAX, ENVELOPE_COSINE, COVARIANCE_ISO, 16);
    for (int weight = 0; weight < 2; weight++) {
        *of(&s, TENSOR_psi, 0, 5) = 3;
        *of(&s, TENSOR_psi, 0, 6) = -3;
        *of(&s, TENSOR_alive, 0, 6) = 1;
        adapt_merge(&s.c, 0, 5, 6, weight ? 0.7 : 0.3, NULL, 0, s.splats);
        CHECK(*of(&s, TENSOR_psi, 0, 5) == (weight ? 3 : -3), "merged, the phase is that of the larger share");
    }
    free_scene(&s);
}

/* Only splats with envelopes alike are merged. */
static void test_merge(void) {
    Scene s = make_scene(ADAPT_GROW, MIXER_SOFTMAX, ENVELOPE_COSINE, COVARIANCE_FULL, 16);
    for (int twin = 2; twin < 12; twin += 8) {
        memcpy(of(&s, TENSOR_mu, 0, (size_t)twin + 1), of(&s, TENSOR_mu, 0, (size_t)twin), 64 * sizeof(float));
        *of(&s, TENSOR_log_theta, 0, (size_t)twin + 1) =
            *of(&s, TENSOR_log_theta, 0, (size_t)twin) + (twin == 2 ? 0 : -1);
    }
    int n = pass(&s, 1000);
    CHECK(n == 2 && events[0].kind == ADAPT_MERGE && events[0].slot == 3 && events[0].from == 2,
          "twins are merged, those of another frequency are not (%d events)", n);
    check_moments(&s, 0, 2, true, "merge");
    check_moments(&s, 0, 3, true, "merge");
    n = pass(&s, 1050);
    CHECK(n == 2 && events[0].kind == ADAPT_DEATH && events[0].slot == 11,
          "of two at one place with other frequencies one dies (%d events)", n);
    free_scene(&s);
}

static void test_move(void) {
    Scene s = make_scene(ADAPT_RELOCATE, MIXER_SOFTMAX, ENVELOPE_COSINE, COVARIANCE_ISO, 16);
    set_rings(s.a->activation, &s, 0, 9, 1e-5);
    set_rings(s.a->activation, &s, 1, 2, 1e-5);
    set_rings(s.a->pull, &s, 1, 8, 100);
    set_rings(s.a->activation, &s, 1, 8, 0.1);
    *of(&s, TENSOR_psi, 0, 9) = 1;
    *of(&s, TENSOR_psi, 1, 8) = 2;
    int n = pass(&s, 1000);
    CHECK(n == 2 && events[0].kind == ADAPT_MOVE && events[0].slot == 9 && events[0].from == -1,
          "an idle splat moves to a new place");
    CHECK(*of(&s, TENSOR_psi, 0, 9) == 0 && *of(&s, TENSOR_psi, 1, 2) == 2,
          "a new splat has no phase, half of a split one has its phase");
    CHECK(n == 2 && events[1].kind == ADAPT_MOVE && events[1].slot == 2 && events[1].from == 8,
          "or to the side of one that is pulled");
    CHECK(adapt_alive(&s.c, 0, s.splats) == 16 && adapt_alive(&s.c, 1, s.splats) == 16, "their number stays");
    free_scene(&s);
}

/* Keys are many and badly covered: half of them lie at one place, far from all splats. */
static void test_birth(void) {
    Scene s = make_scene(ADAPT_GROW, MIXER_SOFTMAX, ENVELOPE_COSINE, COVARIANCE_ISO, 16);
    float *x = (float *)xmalloc(ADAPT_TOKENS * 64 * sizeof *x), place[64];
    uint64_t rng = 4;
    for (int k = 0; k < 64; k++) place[k] = -of(&s, TENSOR_mu, 0, 0)[k];
    for (int i = 0; i < ADAPT_TOKENS * 64; i++)
        x[i] = i / 64 % 2 ? place[i % 64] + (float)(0.02 * rng_normal(&rng)) : (float)rng_normal(&rng);
    adapt_sample(s.a, 0, 1, x, ADAPT_TOKENS);
    *of(&s, TENSOR_alive, 0, 5) = 0;
    s.rules.coverage = 100;
    int n = pass(&s, 1000);
    double along = 0;
    for (int k = 0; k < 64; k++) along += of(&s, TENSOR_mu, 0, 5)[k] * place[k];
    CHECK(n == 1 && events[0].kind == ADAPT_BIRTH && fabs(events[0].activation - 0.5) < 0.02 && along > 0.9,
          "born among the keys: share %g, cosine %g", events[0].activation, along);
    free(x);
    free_scene(&s);
}

static void test_rules(void) {
    test_nothing_to_do();
    test_death();
    test_survival();
    test_growth();
    test_ball();
    test_split();
    test_merge();
    test_merge_phases();
    test_move();
    test_birth();
}

/* Windows with gradients of 0, many times those that are kept: rules of death do not feed on gradients, so the living
   stay. */
static void test_vanishing(void) {
    for (int mode = ADAPT_RELOCATE; mode <= ADAPT_GROW; mode++) {
        Scene s = make_scene(mode, MIXER_SOFTMAX, ENVELOPE_COSINE, COVARIANCE_ISO, 32);
        size_t slots = s.a->G * s.a->S;
        float *sums = (float *)xcalloc(slots, sizeof *sums);
        int count = 0, windows = 0;
        s.rules.activation = 0.3;
        s.rules.every = 5;
        s.a->numbers[ADAPT_NEXT] = 5;
        for (int64_t step = 1; step <= 2000; step++) {
            if (!adapt_due(s.a, &s.rules, step)) continue;
            for (size_t i = 0; i < slots; i++) sums[i] = windows < 20 ? 1 : 0;
            adapt_window(s.a, step, s.splats, sums);
            windows++;
            if (step < s.a->numbers[ADAPT_NEXT]) continue;
            count += pass(&s, step);
            adapt_schedule(s.a, &s.rules, step, false);
        }
        CHECK(count == 0 && adapt_alive(&s.c, 0, s.splats) == 32 && windows > 200,
              "no gradient for %d windows: %d events, %d alive", windows - 20, count, adapt_alive(&s.c, 0, s.splats));
        free(sums);
        free_scene(&s);
    }
}

static void test_window(void) {
    Scene s = make_scene(ADAPT_NONE, MIXER_SOFTMAX, ENVELOPE_COSINE, COVARIANCE_DIAG, 16);
    float sums[64], x[64];
    for (int i = 0; i < 64; i++) sums[i] = (float)i;
    *of(&s, TENSOR_alive, 0, 3) = 0;
    adapt_window(s.a, 10, s.splats, sums);
    CHECK(s.a->bands[0].count == 1 && s.a->bands[0].mean == s.a->coverage[0], "the band has seen one window");
    s.a->numbers[ADAPT_COUNT_WINDOWS]--;
    adapt_window(s.a, 12, s.splats, sums);
    CHECK(s.a->bands[0].count == 1, "windows between the tenth steps are not for the band");
    double total = 0, expected = 0, coverage = 0;
    const Adapt *a = s.a;
    for (size_t i = 0; i < 16; i++) total += a->activation[i * ADAPT_WINDOWS];
    CHECK(fabs(total - 1) < 1e-5 && a->activation[3 * ADAPT_WINDOWS] == 0 && a->pull[17 * ADAPT_WINDOWS] == 17,
          "activations of a head sum to 1 (%g), that of a dead splat is 0", total);
    for (int part = 0; part < 2; part++) /* of splat 5, by the formula */
        for (int i = 0; i < ADAPT_TOKENS; i++) {
            double own = 0, all = 0, phi = 0;
            memcpy(x, a->sample + (part * ADAPT_TOKENS + i) * 64, sizeof x);
            for (size_t slot = 0; slot < 16; slot++) {
                double square = 0;
                for (int k = 0; k < 64; k++)
                    square +=
                        exp(of(&s, TENSOR_log_precision, 0, slot)[k]) * pow(x[k] - of(&s, TENSOR_mu, 0, slot)[k], 2);
                if (slot == 3) continue;
                phi += exp(-0.5 * square);
                all += exp(*of(&s, TENSOR_log_alpha, 0, slot) - 0.5 * square);
                if (slot == 5) own = exp(*of(&s, TENSOR_log_alpha, 0, slot) - 0.5 * square);
            }
            expected += own / all / (2 * ADAPT_TOKENS);
            if (part) coverage += log(phi) / ADAPT_TOKENS;
        }
    CHECK(fabs(a->activation[5 * ADAPT_WINDOWS] / expected - 1) < 1e-5, "activation %g, by the formula %g",
          a->activation[5 * ADAPT_WINDOWS], expected);
    CHECK(fabs(a->coverage[0] - coverage) < 1e-4, "coverage %g, by the formula %g", a->coverage[0], coverage);
#ifdef _OPENMP
    float *before = (float *)xmalloc(a->G * a->S * ADAPT_WINDOWS * sizeof *before);
    memcpy(before, a->activation, a->G * a->S * ADAPT_WINDOWS * sizeof *before);
    omp_set_num_threads(4);
    s.a->numbers[ADAPT_COUNT_WINDOWS]--;
    adapt_window(s.a, 10, s.splats, sums);
    omp_set_num_threads(1);
    CHECK(memcmp(before, a->activation, a->G * a->S * ADAPT_WINDOWS * sizeof *before) == 0,
          "statistics do not depend on the number of threads");
    free(before);
#endif
    free_scene(&s);
}

/* ---------------------------------------------------------------------- edits against the network */

/* What all heads put out, before the projection: the largest difference relative to their norm, before and after an
   edit. */
static void test_preservation(int attention, int mixer, int envelope, int covariance, int window, int objective) {
    Config c;
    const char *problem =
        try_config(&c, attention, NULL, POSITION_ROPE, mixer, covariance, envelope, window, objective);
    c.S = 4;
    if (problem || (problem = config_check(&c))) die("%s", problem);
    GSA *m = scattered_model(&c, 1, 31);
    size_t total = m->total, heads = (size_t)config_gsa_heads(&c);
    float *flat = (float *)xmalloc(total * sizeof *flat);
    for (size_t g = 0; g < heads; g++) m->p.alive[g * 4 + 2] = 0;
    for (size_t i = 0; i < total; i++) m->params[i] = flat[i] = (float)m->params[i]; /* numbers that both have */
    int x[70];
    uint64_t rng = 32;
    random_tokens(x, 70, c.V, &rng);
    size_t n = (size_t)c.L * 70 * (size_t)config_width(&c);
    real *before = numbers(n, 0, NULL);
    gsa_forward(m, x, NULL, 1, 70);
    memcpy(before, m->a.att, n * sizeof(real));
    for (int edit = 0; edit < 2; edit++) {
        for (size_t g = 0; g < heads; g++) {
            if (edit == 0) adapt_split(&c, (int)g, 1, 2, flat + m->tensors[TENSOR_mu].offset);
            else adapt_merge(&c, (int)g, 2, 1, 0.3, NULL, 0, flat + m->tensors[TENSOR_mu].offset);
        }
        for (size_t i = 0; i < total; i++) m->params[i] = (real)flat[i];
        gsa_forward(m, x, NULL, 1, 70);
        double worst = relative_error_double(m->a.att, before, n);
        CHECK(worst < 1e-6, "attention %d, mixer %d, envelope %d, covariance %d: %s changes the heads' outputs by %.1e",
              attention, mixer, envelope, covariance, edit ? "merging again" : "splitting", worst);
        CHECK(adapt_alive(&c, 0, flat + m->tensors[TENSOR_mu].offset) == (edit ? 3 : 4),
              "and the number of the living");
    }
    size_t slot = 2; /* amplitude and reference are what they were */
    CHECK(fabs(flat[m->tensors[TENSOR_log_alpha].offset + slot] - (float)m->p.log_alpha[slot]) < 1e-6,
          "amplitudes add");
    CHECK(fabs(flat[m->tensors[TENSOR_log_alpha_reference].offset + slot] - config_amplitude_start(&c)) < 1e-5,
          "and so do the references: %g", flat[m->tensors[TENSOR_log_alpha_reference].offset + slot]);
    free(flat);
    gsa_destroy(m);
    free_numbers();
}

/* A head with a dead splat is a head that never had it. */
static void test_dead_is_absent(int mixer, int envelope) {
    Config c, less;
    const char *problem =
        try_config(&c, ATTENTION_GSA, NULL, POSITION_ROPE, mixer, COVARIANCE_DIAG, envelope, 0, OBJECTIVE_LM);
    if (problem) die("%s", problem);
    less = c;
    less.S = 2;
    GSA *m = scattered_model(&c, 1, 33), *n = scattered_model(&less, 1, 33);
    static const int splat[] = {TENSOR_mu,        TENSOR_log_precision, TENSOR_log_alpha,
                                TENSOR_log_theta, TENSOR_log_delta,     TENSOR_psi};
    for (int i = 0; i < NUM_TENSORS; i++) {
        const Tensor *t = &m->tensors[i], *u = &n->tensors[i];
        bool of_splat = false;
        for (size_t k = 0; k < sizeof splat / sizeof *splat; k++) of_splat |= i == splat[k];
        size_t w = (size_t)t->shape[2];
        if (!of_splat && t->group != GROUP_FIXED)
            memcpy(n->params + u->offset, m->params + t->offset, t->size * sizeof(real));
        for (size_t g = 0; of_splat && t->size && g < (size_t)config_gsa_heads(&c); g++) /* slots 0 and 2 */
            for (size_t slot = 0; slot < 2; slot++)
                memcpy(n->params + u->offset + (g * 2 + slot) * w, m->params + t->offset + (g * 3 + 2 * slot) * w,
                       w * sizeof(real));
    }
    for (int g = 0; g < config_gsa_heads(&c); g++) m->p.alive[g * 3 + 1] = 0;
    int x[70];
    uint64_t rng = 34;
    random_tokens(x, 70, c.V, &rng);
    gsa_forward(m, x, NULL, 1, 70);
    gsa_forward(n, x, NULL, 1, 70);
    CHECK(relative_error_double(m->a.logits, n->a.logits, 70 * (size_t)c.Vp) < 1e-12,
          "mixer %d: a dead splat of three leaves a model of two", mixer);
    gsa_destroy(m);
    gsa_destroy(n);
    free_numbers();
}

/* The sums that a watched backward pass leaves: |G| of one splat by moving ln alpha of its queries, and watching
   changes no gradient. */
static void test_watch(int attention, int mixer, int envelope, int window) {
    Config c;
    const char *problem =
        try_config(&c, attention, NULL, POSITION_ROPE, mixer, COVARIANCE_ISO, envelope, window, OBJECTIVE_LM);
    if (problem) die("%s", problem);
    GSA *m = scattered_model(&c, 2, 35);
    int x[140], y[140];
    uint64_t rng = 36;
    random_tokens(x, 140, c.V, &rng);
    random_tokens(y, 140, c.V, &rng);
    gsa_forward(m, x, y, 2, 70);
    gsa_backward(m, 1);
    double norms[2][NUM_CLIPS];
    real *plain = numbers(m->total, 0, NULL);
    memcpy(plain, m->grads, m->total * sizeof(real));
    gsa_gradient_norms(m, norms[0]);
    gsa_zero_gradients(m);
    m->watch = true;
    gsa_forward(m, x, y, 2, 70);
    gsa_backward(m, 1);
    gsa_gradient_norms(m, norms[1]);
    const Tensor *alive = &m->tensors[TENSOR_alive], *log_alpha = &m->tensors[TENSOR_log_alpha];
    bool same = memcmp(norms[0], norms[1], sizeof norms[0]) == 0, bounded = true;
    for (size_t i = 0; i < m->total; i++)
        same &= m->grads[i] == plain[i] || (i >= alive->offset && i < alive->offset + alive->size);
    /* sum |G| of queries and keys > |sum G of queries| */
    for (size_t i = 0; i < alive->size; i++)
        bounded &= m->grads[alive->offset + i] > fabs(m->grads[log_alpha->offset + i]);
    CHECK(same, "watching changes no gradient and no norm");
    CHECK(bounded, "sum |G| exceeds |sum G|");
    m->p.alive[1] = 0;
    gsa_zero_gradients(m);
    gsa_forward(m, x, y, 2, 70);
    gsa_backward(m, 1);
    CHECK(m->grads[alive->offset + 1] == 0, "of a dead splat it is 0");
    gsa_destroy(m);
    free_numbers();
}

/* ---------------------------------------------------------------------- shifts */

static void test_band(void) {
    int triggers = 0, late = 0;
    /* noise and a drift that slows down, as in training: no shift; then one */
    for (uint64_t seed = 1; seed <= 50; seed++) {
        AdaptBand b;
        memset(&b, 0, sizeof b);
        uint64_t rng = seed;
        for (int w = 0; w < 500; w++) triggers += adapt_band(&b, -1 + 2 * exp(-w / 100.0) + 0.05 * rng_normal(&rng));
        int w = 0;
        while (w < 10 && !adapt_band(&b, -0.5 + 0.05 * rng_normal(&rng))) w++;
        late += w >= 5;
        memset(&b, 0, sizeof b); /* as adapt_window does then */
        for (int after = 0; after < 200; after++) triggers += adapt_band(&b, -0.5 + 0.05 * rng_normal(&rng));
    }
    for (uint64_t seed = 1; seed <= 50; seed++) { /* noise that lasts for five or for twenty windows */
        AdaptBand b;
        memset(&b, 0, sizeof b);
        uint64_t rng = seed;
        double keep = seed % 2 ? 0.8 : 0.95, noise = 0;
        for (int w = 0; w < 500; w++) {
            noise = keep * noise + sqrt(1 - keep * keep) * 0.05 * rng_normal(&rng);
            triggers += adapt_band(&b, -1 + 2 * exp(-w / 100.0) + noise);
        }
    }
    CHECK(triggers == 0, "50,000 windows without a shift, 10,000 after one: %d triggers", triggers);
    CHECK(late == 0, "a shift by ten deviations shows within five windows, but for %d of 50", late);
    AdaptBand b;
    memset(&b, 0, sizeof b);
    for (int w = 0; w < 100; w++) triggers += adapt_band(&b, w % 2 ? 1.0 : 0.9);
    triggers += adapt_band(&b, 5);
    triggers += adapt_band(&b, 5);
    triggers += adapt_band(&b, 0.95);
    triggers += adapt_band(&b, 5);
    CHECK(triggers == 0, "two windows outside are not yet a shift");
}

static void test_schedule(void) {
    Scene s = make_scene(ADAPT_GROW, MIXER_SOFTMAX, ENVELOPE_COSINE, COVARIANCE_ISO, 8);
    s.rules.every = 5;
    int passes = 0, windows = 0;
    for (int64_t step = 1, last = 0, since = 0; step <= 3000; step++) {
        if (!adapt_due(s.a, &s.rules, step)) continue;
        windows++;
        CHECK(step - last <= ADAPT_SPACING &&
                  (step % ADAPT_SPACING == 0 || step - last <= (s.a->numbers[ADAPT_NEXT] - since) / 5 + 1),
              "step %d: %d since the window before", (int)step, (int)(step - last));
        last = step;
        bool shifted = step == 2000;
        if (step < s.a->numbers[ADAPT_NEXT] && !shifted) continue;
        adapt_schedule(s.a, &s.rules, step, shifted);
        int64_t so_far = step < 2000 ? step : step - 2000, expected = so_far < 50 ? 5 : so_far / 10;
        CHECK(s.a->numbers[ADAPT_NEXT] == step + expected, "after step %d the next pass is %d later", (int)step,
              (int)(s.a->numbers[ADAPT_NEXT] - step));
        passes++;
        since = step;
    }
    CHECK(passes > 80 && passes < 100 && windows > 500 && windows < 800, "%d passes, %d windows", passes, windows);
    s.rules.mode = ADAPT_NONE;
    windows = 0;
    for (int64_t step = 1; step <= 3000; step++) windows += adapt_due(s.a, &s.rules, step);
    CHECK(windows == 1 + 3000 / ADAPT_RARELY && adapt_due(s.a, &s.rules, ADAPT_SPACING),
          "without passes one after %d steps and every %d: %d windows", ADAPT_SPACING, ADAPT_RARELY, windows);
    free_scene(&s);
}

int main(void) {
#ifdef _OPENMP
    omp_set_num_threads(1);
#endif
    test_rules();
    test_window();
    test_vanishing();
    for (int covariance = 0; covariance <= COVARIANCE_FULL; covariance++) {
        test_preservation(ATTENTION_GSA, MIXER_SOFTMAX, ENVELOPE_COSINE, covariance, 0, OBJECTIVE_LM);
        test_preservation(ATTENTION_GSA, MIXER_SOFTMAX, ENVELOPE_NONE, covariance, 0, OBJECTIVE_MLM);
        test_preservation(ATTENTION_GSA, MIXER_LINEAR, ENVELOPE_RAISED, covariance, 0, OBJECTIVE_LM);
        test_preservation(ATTENTION_HYBRID, MIXER_LINEAR, ENVELOPE_DECAY, covariance, 9, OBJECTIVE_MLM);
        test_preservation(ATTENTION_EXTEND, MIXER_LINEAR, ENVELOPE_RAISED, covariance, 9, OBJECTIVE_LM);
    }
    test_dead_is_absent(MIXER_SOFTMAX, ENVELOPE_COSINE);
    test_dead_is_absent(MIXER_LINEAR, ENVELOPE_RAISED);
    test_watch(ATTENTION_GSA, MIXER_SOFTMAX, ENVELOPE_COSINE, 0);
    test_watch(ATTENTION_GSA, MIXER_LINEAR, ENVELOPE_RAISED, 0);
    test_watch(ATTENTION_EXTEND, MIXER_LINEAR, ENVELOPE_RAISED, 9);
    test_band();
    test_schedule();
    return test_summary("test_adapt");
}
