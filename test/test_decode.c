/* Reading a text in pieces of any sizes, token by token or side by side with other texts, gives what one pass over
   the whole text gives, at every position of every decoder. */
#define INFER_NO_MAIN
#include "network.h"

#include <sys/resource.h>

#ifdef __SANITIZE_ADDRESS__
const char *__asan_default_options(void);
/* freed memory that it keeps is not the program's */
const char *__asan_default_options(void) { return "quarantine_size_mb=1"; }
#endif

enum { T = 300 }; /* several chunks of the scan, blocks of queries and passes, beyond all windows here */

/* A model for infer.c on the parameters of one for training. */
static Model *model_on(const GSA *g) {
    Model *m = (Model *)xcalloc(1, sizeof *m);
    m->net.config = g->config;
    m->net.p = g->p;
    for (int i = 0; i < NUM_TENSORS; i++) {
        Matrix matrix = {TYPE_F32,
                         (size_t)(g->tensors[i].shape[2] > 1 ? g->tensors[i].shape[2] : g->tensors[i].shape[1]),
                         g->params + g->tensors[i].offset, NULL};
        m->matrix[i] = matrix;
    }
    model_prepare(m);
    return m;
}

typedef struct {
    const real *expected; /* (T, Vp) of the forward pass */
    size_t V, Vp, seen, worst_at;
    double worst;
} Comparison;

/* A LogitsSink: keeps the largest normalised squared error of a position. */
static void compare(void *context, size_t sample, size_t position, size_t rows, const real *logits) {
    Comparison *c = (Comparison *)context;
    (void)sample;
    for (size_t r = 0; r < rows; r++) {
        double difference = 0, square = 0;
        for (size_t v = 0; v < c->V; v++) {
            double a = (double)logits[r * c->Vp + v], b = (double)c->expected[(position + r) * c->Vp + v];
            difference += (a - b) * (a - b);
            square += b * b;
        }
        if (!(difference / square <= c->worst)) {
            c->worst = difference / square;
            c->worst_at = position + r;
        }
    }
    c->seen += rows;
}

static void check_decoder(const Config *c, const char *what) {
    GSA *g = scattered_model(c, 1, 40);
    Model *m = model_on(g);
    uint64_t rng = 41;
    size_t V = (size_t)c->V, Vp = (size_t)c->Vp;
    int x[T];
    random_tokens(x, T, c->V, &rng);
    gsa_forward(g, x, NULL, 1, T);
    const Comparison none = {g->a.logits, V, Vp, 0, 0, 0};

    /* token by token */
    Session *s = session_create(m, 6, model_endless(m) ? SIZE_MAX : T);
    Comparison found = none;
    for (size_t t = 0; t < T; t++) {
        session_run(s, NULL, 1, x + t, 1, NULL, NULL);
        compare(&found, 0, t, 1, session_logits(s, 0));
    }
    CHECK(found.worst <= 1e-9 && s->position[0] == T, "%s: decoding differs from the forward pass by %g at token %zu",
          what, found.worst, found.worst_at);

    /* pieces of many sizes, small steps between them */
    static const size_t pieces[][8] = {
        {T}, {64, 1, 63, 65, 1, 1, 105}, {1, 9, 10, 1, 129, 130, 20}, {257, 43}, {2, 2, 2, 2, 2, 2, 2, T - 14}};
    for (size_t split = 0; split < sizeof pieces / sizeof *pieces; split++) {
        found = none;
        session_reset(s, 1);
        for (size_t i = 0, at = 0; at < T; at += pieces[split][i++]) {
            size_t one = 1;
            session_run(s, &one, 1, x + at, pieces[split][i], compare, &found);
        }
        CHECK(found.worst <= 1e-9 && found.seen == T,
              "%s: split %zu differs from the forward pass by %g at token %zu of %zu", what, split, found.worst,
              found.worst_at, found.seen);
    }

    /* six texts, one of them at another place, side by side: to the bit what each is alone */
    enum { TEXTS = 6, STEPS = 40 };
    const size_t start = 70, order[TEXTS] = {1, 2, 0, 4, 3, 5};
    real *alone = numbers(2 * STEPS * V, 0, NULL);
    bool same = true;
    session_reset(s, 0);
    session_run(s, NULL, 1, x, start, NULL, NULL);
    session_copy(s, 2, 0);
    CHECK(memcmp(session_logits(s, 2), session_logits(s, 0), V * sizeof(real)) == 0,
          "%s: a copied session has the same logits", what);
    for (size_t t = 0; t < STEPS; t++) {
        session_run(s, NULL, 1, x + start + t, 1, NULL, NULL);
        memcpy(alone + t * V, session_logits(s, 0), V * sizeof(real));
    }
    session_reset(s, 0);
    for (size_t t = 0; t < STEPS; t++) {
        session_run(s, NULL, 1, x + t, 1, NULL, NULL);
        memcpy(alone + (STEPS + t) * V, session_logits(s, 0), V * sizeof(real));
    }
    for (size_t i = 0; i < TEXTS; i++)
        if (i != 2) session_reset(s, i);
    for (size_t t = 0; t < STEPS; t++) {
        int next[TEXTS];
        for (size_t i = 0; i < TEXTS; i++) next[i] = order[i] == 2 ? x[start + t] : x[t];
        session_run(s, order, TEXTS, next, 1, NULL, NULL);
        for (size_t i = 0; i < TEXTS; i++)
            same = same && memcmp(session_logits(s, i), alone + (i == 2 ? t : STEPS + t) * V, V * sizeof(real)) == 0;
    }
    CHECK(same, "%s: texts side by side are not what they are alone", what);
    session_free(s);
    free_numbers();
    model_close(m);
    gsa_destroy(g);
}

/* ---------------------------------------------------------------------- rounded weights */

/* A model with rounded matrices reads and steps as one for training does whose weights are what the rounding left;
   the rounding is as near as its type allows. */
static void check_rounded(Config c, int type, int channels) {
    c.C = channels;
    c.T = T;
    GSA *g = scattered_model(&c, 1, 50);
    Model *m = model_on(g);
    void *made[2 * NUM_TENSORS];
    int count = 0, x[T];
    uint64_t rng = 51;
    for (int i = 0; i < NUM_TENSORS; i++) {
        if (!tensor_is_matrix(i)) continue;
        Matrix *w = &m->matrix[i];
        real *exact = g->params + g->tensors[i].offset;
        size_t n = g->tensors[i].size, rows = n / w->columns;
        float *scales = (float *)(made[count++] = xmalloc(rows * sizeof(float))),
              *row = (float *)xmalloc(w->columns * sizeof(float));
        void *data = made[count++] = xmalloc(4 * n);
        w->type = type;
        CHECK(matrix_round(w, exact, rows, data, scales), "rounding");
        w->data = data;
        w->scales = type == TYPE_I8 ? scales : NULL;
        double worst = 0;
        for (size_t r = 0; r < rows; r++) {
            const float *rounded = matrix_row(w, r, row);
            float most = 0;
            for (size_t k = 0; k < w->columns; k++) most = fmaxf(most, fabsf(exact[r * w->columns + k]));
            for (size_t k = 0; k < w->columns; k++) {
                double value = (double)rounded[k] * (w->scales ? (double)w->scales[r] : 1),
                       allowed = type == TYPE_I8 ? (double)most / 254 : fabs((double)exact[r * w->columns + k]) / 256;
                worst = fmax(worst, fabs(value - (double)exact[r * w->columns + k]) / (allowed + 1e-30));
                exact[r * w->columns + k] = (real)value;
            }
        }
        CHECK(worst < 1.0001 && worst > 0.5, "type %d, tensor %s: rounded by %g of what is allowed", type,
              g->tensors[i].name, worst);
        free(row);
    }
    random_tokens(x, T, c.V, &rng);
    gsa_forward(g, x, NULL, 1, T);
    Comparison steps = {g->a.logits, (size_t)c.V, (size_t)c.Vp, 0, 0, 0}, pieces = steps;
    Session *s = session_create(m, 2, T);
    for (size_t t = 0; t < T; t++) {
        session_run(s, NULL, 1, x + t, 1, NULL, NULL);
        compare(&steps, 0, t, 1, session_logits(s, 0));
    }
    size_t one = 1;
    session_run(s, &one, 1, x, T, compare, &pieces);
    CHECK(steps.worst <= 1e-9 && pieces.worst <= 1e-9 && pieces.seen == T,
          "type %d, %d channels: %g in steps, %g in pieces", type, channels, steps.worst, pieces.worst);
    session_free(s);
    model_close(m);
    gsa_destroy(g);
    while (count > 0) free(made[--count]);
}

/* int8 rows times vectors of any length and size, against double: extremes at the longest row included, whole texts
   to the bit as each alone, and what is not finite stays so. */
static void check_bytes(void) {
    enum { TEXTS = 5, ROWS_OUT = 7 };
    static const size_t lengths[] = {1, 3, 15, 16, 17, 63, 64, 65, 200, 1024, 3072, 65536};
    uint64_t rng = 61;
    for (size_t i = 0; i < sizeof lengths / sizeof *lengths; i++)
        for (int kind = 0; kind < 3; kind++) {
            const size_t C = lengths[i];
            int8_t *w = (int8_t *)xmalloc(ROWS_OUT * C);
            float *scales = (float *)xmalloc(ROWS_OUT * sizeof *scales);
            real *x = numbers(TEXTS * C, 0, NULL), *out = numbers(TEXTS * ROWS_OUT, 0, NULL),
                 *alone = numbers(ROWS_OUT, 0, NULL), worst = 0;
            Matrix m = {TYPE_I8, C, w, scales};
            for (size_t k = 0; k < ROWS_OUT * C; k++)
                w[k] = kind == 0 ? (int8_t)rng_below(&rng, 256) : k / C % 2 ? 127 : -128;
            for (size_t k = 0; k < TEXTS * C; k++)
                x[k] = (real)(kind == 0   ? rng_normal(&rng) * pow(10, (double)(k / C) * 8 - 16)
                              : kind == 1 ? 1
                                          : 127.5 / 128 * (k % 3 ? 1 : -1));
            for (size_t r = 0; r < ROWS_OUT; r++) scales[r] = (float)(0.001 * (double)(r + 1));
            matrix_forward(out, ROWS_OUT, x, &m, 0, NULL, TEXTS, ROWS_OUT, THEN_NOTHING, true);
            bool same = true;
            for (size_t t = 0; t < TEXTS; t++) {
                double error = 0, square = 0;
                for (size_t r = 0; r < ROWS_OUT; r++) {
                    double sum = 0, size = 0;
                    for (size_t k = 0; k < C; k++) {
                        sum += (double)w[r * C + k] * (double)x[t * C + k] * (double)scales[r];
                        size += pow((double)w[r * C + k] * (double)x[t * C + k] * (double)scales[r], 2);
                    }
                    error += pow((double)out[t * ROWS_OUT + r] - sum, 2);
                    square += size;
                }
                /* sums of C equal terms round more */
                worst = (real)fmax((double)worst, sqrt(error / square) / sqrt((double)C));
                matrix_forward(alone, ROWS_OUT, x + t * C, &m, 0, NULL, 1, ROWS_OUT, THEN_NOTHING, true);
                same = same && memcmp(alone, out + t * ROWS_OUT, ROWS_OUT * sizeof(real)) == 0;
            }
            CHECK(worst <= 3e-6 && same, "int8, %zu columns, kind %d: off by %g%s", C, kind, (double)worst,
                  same ? "" : "; alone they differ");
            x[C / 2] = kind == 0 ? NAN : INFINITY;
            matrix_forward(out, ROWS_OUT, x, &m, 0, NULL, 1, ROWS_OUT, THEN_NOTHING, true);
            CHECK(!isfinite(out[0]), "int8, %zu columns: a number that is not finite gives %g", C, (double)out[0]);
            free(w);
            free(scales);
            free_numbers();
        }
}

/* ---------------------------------------------------------------------- for ever in constant memory */

static void check_endless(void) {
    enum { LENGTH = 100000 };
    Config c;
    for (int attention = 0; attention < 2; attention++) {
        const char *problem = try_config(&c, attention ? ATTENTION_EXTEND : ATTENTION_HYBRID, NULL, POSITION_ROPE,
                                         MIXER_LINEAR, COVARIANCE_ISO, ENVELOPE_RAISED, 8, OBJECTIVE_LM);
        if (problem) die("%s", problem);
        GSA *g = scattered_model(&c, 1, 60);
        Model *m = model_on(g);
        Session *s = session_create(m, 1, SIZE_MAX);
        Stream o;
        Texts stops = {{"never", "nor this"}, 2};
        Sampler sampler = {.repetition = 1.1, .temperature = 1, .top_p = 0.9, .rng = 3};
        struct rusage before, after;
        int token = 0;
        bool finite = model_endless(m);
        memset(&o, 0, sizeof o);
        for (size_t t = 0; t < LENGTH && finite; t++) {
            session_run(s, NULL, 1, &token, 1, NULL, NULL);
            token = sample_token(&sampler, session_logits(s, 0), c.V, &token, 1);
            finite = token >= 0 && !stream_add(&o, "ne\xC3", 3, &stops) && !stream_add(&o, "\xA4v", 2, &stops);
            o.ready_bytes = 0;
            if (t == 1000) getrusage(RUSAGE_SELF, &before);
        }
        getrusage(RUSAGE_SELF, &after);
        CHECK(finite && s->position[0] == LENGTH, "%zu of %d tokens were finite", s->position[0], LENGTH);
        CHECK(after.ru_maxrss - before.ru_maxrss < 1024, "the last 99,000 tokens took %ld KiB",
              after.ru_maxrss - before.ru_maxrss);
        free(o.held);
        free(o.ready);
        session_free(s);
        model_close(m);
        gsa_destroy(g);
    }
}

/* ---------------------------------------------------------------------- choice of tokens */

static void check_sampler(Sampler sampler, const char *what) {
    enum { N = 14, DRAWS = 40000 };
    float logits[N];
    double p[N], sum = 0, chi = 0;
    int order[N], counts[N] = {0}, recent[] = {2, 5, 2}, degrees = 0;
    bool never = true;
    uint64_t rng = 71;
    for (int v = 0; v < N; v++) logits[v] = (float)(1.5 * rng_normal(&rng));
    logits[7] = logits[3]; /* equal ones: the smaller id comes first */
    /* by definition: the tokens in order, then each rule on its own */
    for (int v = 0; v < N; v++) {
        double l = (double)logits[v];
        if (v == 2 || v == 5) l = l > 0 ? l / sampler.repetition : l * sampler.repetition;
        p[v] = exp(l / sampler.temperature);
        order[v] = v;
    }
    for (int i = 1; i < N; i++)
        for (int j = i; j > 0 && p[order[j]] > p[order[j - 1]]; j--) {
            int swap = order[j];
            order[j] = order[j - 1];
            order[j - 1] = swap;
        }
    for (int i = sampler.top_k; sampler.top_k && i < N; i++) p[order[i]] = 0;
    for (int v = 0; v < N; v++) sum += p[v];
    double kept = 0, most = p[order[0]];
    for (int i = 0; i < N; i++) {
        double mass = p[order[i]];
        if (kept >= sampler.top_p * sum) p[order[i]] = 0;
        kept += mass;
    }
    sum = 0;
    for (int v = 0; v < N; v++) sum += p[v] = p[v] < sampler.min_p * most ? 0 : p[v];
    for (int i = 0; i < DRAWS; i++) {
        int v = sample_token(&sampler, logits, N, recent, 3);
        never = never && v >= 0 && v < N && p[v] > 0;
        counts[v]++;
    }
    for (int v = 0; v < N; v++) {
        double expected = DRAWS * p[v] / sum;
        if (expected > 0) {
            chi += (counts[v] - expected) * (counts[v] - expected) / expected;
            degrees++;
        }
    }
    degrees--;
    CHECK(never, "%s: an impossible token was chosen", what);
    CHECK(chi <= degrees + 4.5 * sqrt(2.0 * degrees) + 5, "%s: chi-square %.1f with %d degrees of freedom", what, chi,
          degrees);
    Sampler greedy = sampler;
    greedy.temperature = 0;
    CHECK(sample_token(&greedy, logits, N, recent, 3) == order[0], "%s: greedy", what);
}

static void check_samplers(void) {
    static const struct {
        const char *what;
        Sampler sampler;
    } all[] = {{"plain", {1, 1, 0, 1, 0, 1}},
               {"temperature 0.5", {1, 0.5, 0, 1, 0, 2}},
               {"temperature 3", {1, 3, 0, 1, 0, 3}},
               {"top-k 1", {1, 1, 1, 1, 0, 4}},
               {"top-k 5", {1, 1, 5, 1, 0, 5}},
               {"top-k 20", {1, 1, 20, 1, 0, 6}},
               {"top-p 0.5", {1, 1, 0, 0.5, 0, 7}},
               {"top-p 0.95", {1, 1, 0, 0.95, 0, 8}},
               {"top-p 1e-9", {1, 1, 0, 1e-9, 0, 9}},
               {"min-p 0.1", {1, 1, 0, 1, 0.1, 10}},
               {"min-p 1", {1, 1, 0, 1, 1, 11}},
               {"repetition 1.5", {1.5, 1, 0, 1, 0, 12}},
               {"repetition 0.5", {0.5, 1, 0, 1, 0, 13}},
               {"all", {1.3, 0.8, 9, 0.9, 0.05, 14}},
               {"top-k 7, top-p 0.7", {1, 1.2, 7, 0.7, 0, 15}}};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) check_sampler(all[i].sampler, all[i].what);
    /* many tokens, most of them equally likely: the border of top-k and top-p among equals is by id */
    enum { MANY = 5000 };
    float *logits = (float *)xcalloc(MANY, sizeof(float));
    for (int top_p = 0; top_p < 2; top_p++) {
        Sampler s = {1, 1, top_p ? 0 : 100, top_p ? 0.02 : 1, 0, 16};
        int largest_token = 0;
        for (int i = 0; i < 3000; i++) {
            int v = sample_token(&s, logits, MANY, NULL, 0);
            largest_token = v > largest_token ? v : largest_token;
        }
        CHECK(largest_token == 99, "of 5000 equals the first 100 are left: %d", largest_token);
    }
    logits[4] = NAN;
    Sampler s = {1, 1, 0, 0.9, 0, 17};
    CHECK(sample_token(&s, logits, MANY, NULL, 0) == -1, "a logit that is not a number");
    logits[4] = INFINITY;
    CHECK(sample_token(&s, logits, MANY, NULL, 0) == -1, "a logit that is infinite");
    free(logits);
}

/* ---------------------------------------------------------------------- text that streams */

static bool is_utf8(const char *text, size_t n) {
    for (size_t at = 0; at < n;) {
        int length = utf8_length((const unsigned char *)text + at, n - at);
        if (length <= 0) return false;
        at += (size_t)length;
    }
    return true;
}

/* The text in pieces of 1 to 5 bytes: what comes out in the end, whole characters at every moment, nothing of a stop
   string ever. */
static void check_stream(const char *text, size_t bytes, Texts stops, const char *expected, bool stopped) {
    for (size_t piece = 1; piece <= 5; piece++) {
        Stream o;
        bool stop = false, whole = true, early = false;
        memset(&o, 0, sizeof o);
        for (size_t at = 0; at < bytes && !stop; at += piece) {
            stop = stream_add(&o, text + at, bytes - at < piece ? bytes - at : piece, &stops);
            whole = whole && is_utf8(o.ready, o.ready_bytes);
            early = early || o.ready_bytes > strlen(expected);
        }
        if (!stop) stream_release(&o, o.held_bytes, true);
        CHECK(stop == stopped && whole && !early && o.ready_bytes == strlen(expected) &&
                  (!o.ready_bytes || memcmp(o.ready, expected, o.ready_bytes) == 0),
              "'%s' in pieces of %zu: '%.*s'%s", text, piece, (int)o.ready_bytes, o.ready, stop ? ", stopped" : "");
        free(o.held);
        free(o.ready);
    }
}

static void check_streams(void) {
#define TEXT(text) text, sizeof text - 1
    const Texts none = {{NULL}, 0}, stops = {{"<end>", "\n\n", "zu Ende"}, 3};
    check_stream(TEXT("plain"), none, "plain", false);
    check_stream(TEXT("Gr\xC3\xBC\xC3\x9F"
                      "e, \xE2\x82\xAC 5, \xF0\x9F\x98\x80!"),
                 none,
                 "Gr\xC3\xBC\xC3\x9F"
                 "e, \xE2\x82\xAC 5, \xF0\x9F\x98\x80!",
                 false);
    check_stream(TEXT("half \xE2\x82"), none, "half \xEF\xBF\xBD", false);
    check_stream(TEXT("bad \xFF\x80 \xC0\xAF \xED\xA0\x80."), none,
                 "bad \xEF\xBF\xBD\xEF\xBF\xBD \xEF\xBF\xBD\xEF\xBF\xBD \xEF\xBF\xBD\xEF\xBF\xBD\xEF\xBF\xBD.", false);
    check_stream(TEXT("\xF0\x9F\x98 \xF4\x90\x80\x80"), none,
                 "\xEF\xBF\xBD\xEF\xBF\xBD\xEF\xBF\xBD \xEF\xBF\xBD\xEF\xBF\xBD\xEF\xBF\xBD\xEF\xBF\xBD", false);
    check_stream(TEXT("one <en<end> two"), stops, "one <en", true);
    check_stream(TEXT("one\ntwo\n\nthree"), stops, "one\ntwo", true);
    check_stream(TEXT("one <end"), stops, "one <end", false);
    check_stream(TEXT("sch\xC3\xB6n zu Ende"), stops, "sch\xC3\xB6n ", true);
    check_stream(TEXT("<end>"), stops, "", true);
}

int main(void) {
#ifdef _OPENMP
    omp_set_num_threads(1);
#endif
    static const struct {
        const char *name, *heads;
        int attention;
    } maps[] = {{"standard", NULL, ATTENTION_STANDARD},
                {"gsa", NULL, ATTENTION_GSA},
                {"hybrid 0:1,1:0", "0:1,1:0", ATTENTION_HYBRID},
                {"augment 1", "1", ATTENTION_AUGMENT},
                {"extend", NULL, ATTENTION_EXTEND},
                {"extend 1", "1", ATTENTION_EXTEND}};
    static const int windows[] = {0, 1, 9, 64, 130, T, T + 40};
    for (size_t map = 0; map < sizeof maps / sizeof *maps; map++)
        for (int position = 0; position <= POSITION_BOTH; position++)
            for (int mixer = 0; mixer <= MIXER_LINEAR; mixer++)
                for (int covariance = 0; covariance <= COVARIANCE_FULL; covariance++)
                    for (int envelope = 0; envelope <= ENVELOPE_RAISED; envelope++)
                        for (size_t w = 0; w < sizeof windows / sizeof *windows; w++) {
                            Config c;
                            char what[128];
                            if (try_config(&c, maps[map].attention, maps[map].heads, position, mixer, covariance,
                                           envelope, windows[w], OBJECTIVE_LM))
                                continue;
                            if (maps[map].attention == ATTENTION_STANDARD && (mixer || covariance || envelope))
                                continue;
                            if (covariance && (position != POSITION_ROPE || w % 2)) continue;
                            c.T = T;
                            if (w % 3 == 0) c.C = 72; /* long enough rows for the blocks of matrix_step, with a rest */
                            if (w % 3 == 1) c.C = 64;
                            snprintf(what, sizeof what,
                                     "%s, positions %d, mixer %d, covariance %d, envelope %d, window %d",
                                     maps[map].name, position, mixer, covariance, envelope, windows[w]);
                            check_decoder(&c, what);
                        }
    for (int type = TYPE_BF16; type <= TYPE_I8; type++)
        for (size_t map = 0; map < 2; map++) {
            Config c = small_config(map ? ATTENTION_HYBRID : ATTENTION_STANDARD, NULL, POSITION_BOTH, COVARIANCE_DIAG,
                                    ENVELOPE_COSINE);
            check_rounded(c, type, 20);
            check_rounded(c, type, 72);
            check_rounded(c, type, 256);
        }
    check_bytes();
    check_endless();
    check_samplers();
    check_streams();
    return test_summary("test_decode");
}
