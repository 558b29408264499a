/* infer measure and infer recall: silenced heads against heads whose values are zero, silenced splats against faint
   ones, losses with a shorter history against single passes, the places of told and asked words by hand. */
#define INFER_NO_MAIN
#include "network.h"

/* A head whose values are all 0 gives 0, whatever its weights: another way to take it out. */
static void zero_values(GSA *m, bool gsa) {
    Sizes z = config_sizes(&m->config);
    for (size_t l = 0; l < z.L; l++)
        for (size_t h = 0; h < z.NH; h++)
            for (size_t k = 0; k < z.HS && config_is_gsa(&m->config, (int)l, (int)h) == gsa; k++) {
                size_t row = l * 3 * z.A + 2 * z.A + h * z.HS + k;
                for (size_t c = 0; c < z.C; c++) m->p.qkvw[row * z.C + c] = 0;
                m->p.qkvb[row] = 0;
            }
}

static void test_silence(int attention, const char *heads, int mixer, int envelope, int window, const char *name) {
    Config c;
    const char *problem =
        try_config(&c, attention, heads, POSITION_ROPE, mixer, COVARIANCE_ISO, envelope, window, OBJECTIVE_LM);
    if (problem) die("%s", problem);
    uint64_t rng = 3;
    int windows[3 * 41];
    random_tokens(windows, 3 * 41, c.V, &rng);
    GSA *m = scattered_model(&c, 2, 4);
    double whole = window_loss(m, windows, 3, 40, 40, 40);
    for (int gsa = 0; gsa < 2; gsa++) {
        GSA *silent = scattered_model(&c, 2, 4), *zero = scattered_model(&c, 2, 4);
        size_t count = silence_heads(silent, gsa);
        zero_values(zero, gsa);
        double a = window_loss(silent, windows, 3, 40, 40, 40), b = window_loss(zero, windows, 3, 40, 40, 40);
        CHECK(count == (gsa ? (size_t)config_gsa_heads(&c) : (size_t)(c.L * config_heads(&c) - config_gsa_heads(&c))),
              "%s: %zu heads silenced", name, count);
        CHECK(isfinite(a) && fabs(a - b) < 1e-5 * b, "%s without %s heads: loss %.7f, with zero values %.7f", name,
              gsa ? "GSA" : "standard", a, b);
        CHECK((count == 0) == (fabs(a - whole) < 1e-4), "%s: silencing %zu heads changes the loss from %.7f to %.7f",
              name, count, whole, a);
        gsa_destroy(silent);
        gsa_destroy(zero);
    }
    gsa_destroy(m);
}

static void test_window_loss(void) {
    Config c = small_config(ATTENTION_HYBRID, NULL, POSITION_BOTH, COVARIANCE_ISO, ENVELOPE_COSINE);
    enum { T = 30, N = 5 };
    GSA *m = scattered_model(&c, 2, 6), *one = scattered_model(&c, 1, 6);
    int windows[N * (T + 1)];
    uint64_t rng = 7;
    random_tokens(windows, N * (T + 1), c.V, &rng);
    for (size_t length = 1; length <= T; length += 7)
        for (size_t counted = 1; counted <= length; counted += 3) {
            double sum = 0;
            for (size_t w = 0; w < N; w++) {
                const int *x = windows + w * (T + 1) + T - length;
                gsa_forward(one, x, x + 1, 1, length);
                for (size_t t = length - counted; t < length; t++) sum += (double)one->a.losses[t];
            }
            double loss = window_loss(m, windows, N, T, length, counted);
            CHECK(fabs(loss - sum / (double)(N * counted)) < 1e-5, "the last %zu of %zu tokens: %.6f, not %.6f",
                  counted, length, loss, sum / (double)(N * counted));
        }
    gsa_destroy(m);
    gsa_destroy(one);
}

/* A silenced splat, and blocks computed anew from its layer on, against the whole pass of a model whose splat has next
   to no amplitude: another way to take it out. */
static void test_silence_each(int attention, int mixer, int envelope, const char *name) {
    Config c;
    const char *problem =
        try_config(&c, attention, NULL, POSITION_ROPE, mixer, COVARIANCE_ISO, envelope, 0, OBJECTIVE_LM);
    if (problem) die("%s", problem);
    enum { N = 3 };
    size_t T = (size_t)c.T, splats = (size_t)(config_gsa_heads(&c) * c.S);
    int *windows = (int *)xmalloc(N * (T + 1) * sizeof *windows), *kind = (int *)xmalloc(N * T * sizeof *kind);
    uint64_t rng = 3;
    random_tokens(windows, N * (T + 1), c.V, &rng);
    GSA *m = scattered_model(&c, 2, 4);
    Silence a = {.kinds = 2, .splats = splats};
    a.count = (double *)xcalloc((2 + splats) * 2, sizeof *a.count);
    a.loss = a.count + 2;
    a.more = a.loss + 2;
    for (size_t i = 0; i < N * T; i++) {
        kind[i] = i % 5 == 0 ? 1 : i % 7 == 0 ? -1 : 0;
        if (kind[i] >= 0) a.count[kind[i]]++;
    }
    silence_each(m, &a, windows, N, kind);
    double largest = 0;
    for (size_t s = 0; s < splats; s++) {
        double want[2] = {0, 0};
        for (int faint = 0; faint < 2; faint++) {
            GSA *one = scattered_model(&c, 1, 4);
            if (!(one->p.alive[s] > 0)) continue;
            if (faint) one->p.log_alpha[s] = -80;
            for (size_t w = 0; w < N; w++) {
                gsa_forward(one, windows + w * (T + 1), windows + w * (T + 1) + 1, 1, T);
                for (size_t i = 0; i < T; i++)
                    if (kind[w * T + i] >= 0)
                        want[kind[w * T + i]] += (faint ? 1 : -1) * (double)one->a.losses[i] / a.count[kind[w * T + i]];
            }
            gsa_destroy(one);
        }
        for (int v = 0; v < 2; v++) {
            CHECK(fabs(a.more[s * 2 + (size_t)v] - want[v]) < 1e-5 + 1e-3 * fabs(want[v]),
                  "%s: without splat %zu kind %d loses %.6f, not %.6f", name, s, v, a.more[s * 2 + (size_t)v], want[v]);
            largest = fmax(largest, fabs(want[v]));
        }
    }
    CHECK(largest > 1e-3, "%s: silence does nothing, at most %.2e", name, largest);
    free(windows);
    free(kind);
    free(a.count);
    gsa_destroy(m);
}

/* One class is hit by one splat: it is found, and shuffled classes do not find it. */
static void test_selectivity(void) {
    enum { KINDS = 60 };
    int class_of[KINDS];
    double more[2 * KINDS], count[KINDS];
    uint64_t rng = 3;
    for (int v = 0; v < KINDS; v++) {
        class_of[v] = v % 4;
        count[v] = 10;
        more[v] = rng_normal(&rng);
        more[KINDS + v] = rng_normal(&rng) + (class_of[v] == 2 ? 3 : 0);
    }
    Silence a = {.kinds = KINDS, .splats = 2, .class_of = class_of, .count = count, .more = more};
    Effect effect[2];
    double t = all_effects(&a, class_of, 4, effect);
    CHECK(effect[1].class_of == 2 && effect[1].t == t && t > 5, "class %d, t %.2f", effect[1].class_of, effect[1].t);
    CHECK(effect[0].t < 3.5, "nothing there, but t %.2f", effect[0].t);
    for (int v = 0; v < KINDS; v++) class_of[v] = v / 15;
    CHECK(all_effects(&a, class_of, 4, effect) < 4, "other classes: t %.2f", effect[1].t);
    for (int v = 0; v < KINDS; v++) class_of[v] = v < 2;
    CHECK(isnan(selectivity(&a, more, class_of, 1)), "a class of two kinds has no t");
}

static void test_recall_line(void) {
    static const struct {
        const char *line, *text; /* NULL: refused */
        size_t from[2], to[2];
    } cases[] = {{"pairs\tka [salt] du corn ka [salt]", "ka salt du corn ka salt", {3, 19}, {7, 23}},
                 {"x\t[a] [b]", "a b", {0, 2}, {1, 3}},
                 {"x\tno brackets", NULL, {0}, {0}},
                 {"x\tone [a]", NULL, {0}, {0}},
                 {"x\t[a] [b] c", NULL, {0}, {0}},
                 {"x\t[a] [] ", NULL, {0}, {0}},
                 {"x\t[[a] b]", NULL, {0}, {0}},
                 {"x\t[a] ]b[", NULL, {0}, {0}},
                 {"x\t[a] [b] [c]", NULL, {0}, {0}},
                 {"no kind [a] [a]", NULL, {0}, {0}},
                 {"\t[a] [a]", NULL, {0}, {0}}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char *line = xstrdup(cases[i].line), *kind, *text;
        size_t from[2], to[2];
        const char *wrong = recall_line(line, &kind, &text, from, to);
        CHECK(!wrong == !!cases[i].text, "'%s' is %s", cases[i].line, wrong ? wrong : "taken");
        if (!wrong && cases[i].text)
            CHECK(strcmp(text, cases[i].text) == 0 && from[0] == cases[i].from[0] && from[1] == cases[i].from[1] &&
                      to[0] == cases[i].to[0] && to[1] == cases[i].to[1],
                  "'%s': '%s', %zu-%zu, %zu-%zu", cases[i].line, text, from[0], to[0], from[1], to[1]);
        free(line);
    }
}

int main(void) {
    test_silence(ATTENTION_HYBRID, NULL, MIXER_SOFTMAX, ENVELOPE_COSINE, 0, "hybrid");
    test_silence(ATTENTION_HYBRID, "0:1,1:0", MIXER_LINEAR, ENVELOPE_RAISED, 9, "window + linear");
    test_silence(ATTENTION_AUGMENT, NULL, MIXER_SOFTMAX, ENVELOPE_COSINE, 0, "augment");
    test_silence(ATTENTION_EXTEND, "1", MIXER_LINEAR, ENVELOPE_RAISED, 9, "extend");
    test_silence(ATTENTION_STANDARD, NULL, MIXER_SOFTMAX, ENVELOPE_NONE, 0, "standard");
    test_silence_each(ATTENTION_HYBRID, MIXER_SOFTMAX, ENVELOPE_COSINE, "hybrid");
    test_silence_each(ATTENTION_GSA, MIXER_LINEAR, ENVELOPE_RAISED, "linear");
    test_selectivity();
    test_window_loss();
    test_recall_line();
    return test_summary("study");
}
