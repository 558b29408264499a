/* The commands of infer that look into a model: report and inspect show what its heads and splats do; measure says what
   each head does, how far the model looks back and which heads it needs; recall says what it remembers by distance.
   A part of infer.c in a file of its own, included there: it uses train_gsa.c's forward pass and infer.c's loading. */
#ifndef GSA_STUDY_H
#define GSA_STUDY_H

#include "meaning.h"
#include "measure.h"
#include "report.h"

/* ---------------------------------------------------------------------- report */

/* The heads that a list such as 0:3,2:1-4 (layer:head) names, as masks by layer. */
static void named_heads(uint64_t heads[MAX_LAYERS], const char *list, const Config *c) {
    int NH = config_heads(c);
    memset(heads, 0, MAX_LAYERS * sizeof *heads);
    for (const char *p = list;;) {
        int layer, first, last, used = 0, more = 0;
        if (sscanf(p, "%9d:%9d%n", &layer, &first, &used) != 2)
            die_usage("--heads '%.80s' is not a list such as 0:3,2:1-4 (layer:head)", list);
        last = first;
        p += used;
        if (sscanf(p, "-%9d%n", &last, &more) == 1) p += more;
        if (layer < 0 || layer >= c->L || first < 0 || last < first || last >= NH)
            die_usage("--heads '%.80s': the model has layers 0 to %d of heads 0 to %d", list, c->L - 1, NH - 1);
        for (int h = first; h <= last; h++) heads[layer] |= 1ull << h;
        if (*p == 0) return;
        if (*p++ != ',') die_usage("--heads '%.80s': entries are separated by commas", list);
    }
}

/* The text as tokens, at most as many as the page can hold; *note says so where it was longer. */
static int *report_tokens(const Options *o, const Config *c, const Tokenizer *t, const char *argument, size_t *count,
                          char **note) {
    size_t bytes, T = (size_t)o->tokens, heads = (size_t)c->L * (size_t)config_heads(c);
    char *text;
    int *x = given_tokens(argument, o->file, t, c->objective == OBJECTIVE_MLM, count, &text, &bytes);
    if (bytes == 0) die("%s is empty: the report needs a text to show", o->file ? o->file : "the text");
    free(text);
    while (T > 2 && heads * T * T > 24 << 20) T--; /* the page stays below some 40 MB */
    if (T > (size_t)c->T) T = (size_t)c->T;
    if (*count <= T) return x;
    *note = xasprintf("The text has %zu tokens, one for the start counted; the first %zu are shown (%s).", *count, T,
                      T == (size_t)c->T        ? "the model's context"
                      : T == (size_t)o->tokens ? "--tokens shows more"
                                               : "more of so many heads would make too large a page");
    fprintf(stderr, "%s\n", *note);
    *count = T;
    return x;
}

/* The likeliest tokens at place i. logits (V): those taken are crossed out. */
static void report_guesses(Report *r, size_t i, real *logits, const Tokenizer *t) {
    const int V = r->config.V;
    real top = largest(logits, (size_t)V), sum = 0;
    for (int v = 0; v < V; v++) sum += exp_real(logits[v] - top);
    for (size_t place = i * REPORT_GUESSES; place < (i + 1) * REPORT_GUESSES; place++) {
        size_t length;
        int best = 0;
        for (int v = 1; v < V; v++)
            if (logits[v] > logits[best]) best = v;
        const char *piece = tokenizer_piece(t, best, &length);
        r->guess[place] = token_label(piece, length);
        r->guess_share[place] = (float)(exp_real(logits[best] - top) / sum);
        logits[best] = -INFINITY;
    }
}

/* What the model does with these tokens; report_free leaves the texts of r->tokens and r->guess to the caller. */
static Report *report_gather(GSA *m, const Tokenizer *t, const int *x, size_t count, const char *path) {
    const Config *c = &m->config;
    bool decoder = c->objective == OBJECTIVE_LM;
    int *y = (int *)xmalloc(count * sizeof *y);
    for (size_t i = 0; i < count; i++) y[i] = i + 1 < count ? x[i + 1] : -1;
    gsa_forward(m, x, decoder ? y : NULL, 1, count);
    free(y);
    for (size_t i = 0; i < count * (size_t)c->Vp; i++)
        if (!isfinite(m->a.logits[i])) die("%s gives numbers that are not finite: it is not a usable model", path);
    Report *r = report_create(c, m->params, (int)count, report_head, m);
    for (size_t i = 0; i < count; i++) {
        size_t length;
        const char *piece = tokenizer_piece(t, x[i], &length);
        /* a vocabulary without it has it behind its end */
        r->tokens[i] = piece ? token_label(piece, length) : xstrdup("[MASK]");
        r->loss[i] = decoder && i > 0 ? m->a.losses[i - 1] : NAN;
        report_guesses(r, i, m->a.logits + i * (size_t)c->Vp, t);
    }
    return r;
}

enum { EXAMPLE_TOKENS = 16384 };

static int report(const Options *o, char **argv) {
    const char *path = argv[1];
    if ((argv[2] != NULL) == (o->file != NULL))
        die_usage(o->file ? "give the text as an argument or by --file, not both"
                          : "report needs a text to show the model: infer report MODEL TEXT");
    if (o->heads && !o->pictures) die_usage("--heads says which heads --pictures draws; give --pictures DIR as well");
    Checkpoint *k = checkpoint_open(path, CHECKPOINT_MODEL);
    const Config *c = &k->config;
    Tokenizer *t = checkpoint_tokenizer(k, o->tokenizer);
    uint64_t heads[MAX_LAYERS];
    for (int l = 0; l < MAX_LAYERS; l++) heads[l] = ~0ull;
    if (o->heads) named_heads(heads, o->heads, c);
    size_t count;
    char *note = NULL;
    int *x = report_tokens(o, c, t, argv[2], &count, &note);
    GSA *m = gsa_create(c, 1);
    checkpoint_read_tensors(k, "", m->params);
    Report *r = report_gather(m, t, x, count, path);
    if (config_gsa_heads(c)) {
        SplatStudy *a =
            o->examples ? study_text(m, t, o->examples, EXAMPLE_TOKENS) : study_splats(m, x, 1, count, 0, true);
        report_meaning(r, t, a);
        splats_close(a);
    }
    r->model = path;
    r->note = note;
    r->step = k->step;

    const char *slash = strrchr(path, '/'); /* the training's log lies beside the model */
    char *log = xasprintf("%.*smain.log", slash ? (int)(slash - path) + 1 : 0, path);
    struct stat st;
    bool there = stat(log, &st) == 0 && S_ISREG(st.st_mode) && access(log, R_OK) == 0;
    report_write(r, there ? log : NULL, o->out);
    fprintf(stderr, "%s: %zu tokens, %zu heads\n", o->out, count, (size_t)c->L * (size_t)config_heads(c));
    if (o->pictures) fprintf(stderr, "%s: %d pictures\n", o->pictures, report_pictures(r, heads, o->pictures));
    for (size_t i = 0; i < count * (1 + REPORT_GUESSES); i++) free((char *)r->tokens[i]);
    report_meaning_free(r);
    report_free(r);
    gsa_destroy(m);
    tokenizer_free(t);
    checkpoint_close(k);
    free(log);
    free(note);
    free(x);
    return 0;
}

/* ---------------------------------------------------------------------- inspect */

/* Mean of the diagonal of Lambda. */
static double mean_precision(const Config *c, const float *log_precision) {
    int d = config_head_size(c), P = config_precisions(c);
    double sum = 0;
    if (c->covariance != COVARIANCE_FULL)
        for (int k = 0; k < P; k++) sum += exp((double)log_precision[k]) / P;
    else
        for (int i = 0; i < d; i++)
            for (int k = 0; k <= i; k++)
                sum += pow(i == k ? exp((double)log_precision[i * (i + 1) / 2 + k])
                                  : (double)log_precision[i * (i + 1) / 2 + k],
                           2) /
                       d;
    return sum;
}

/* Keys (G, V, HS) of the first V tokens, each behind the token that begins a text. */
static float *vocabulary_keys(GSA *m, const Tokenizer *t, size_t V) {
    const Config *c = &m->config;
    size_t length = c->T > 1 ? 2 : 1, batch = (size_t)c->T / length, A = (size_t)config_width(c),
           HS = (size_t)config_head_size(c);
    float *keys = (float *)xmalloc((size_t)config_gsa_heads(c) * V * HS * sizeof *keys);
    int *x = (int *)xmalloc(batch * length * sizeof *x);
    for (size_t first = 0; first < V; first += batch) {
        size_t B = V - first < batch ? V - first : batch;
        for (size_t b = 0; b < B; b++) {
            x[b * length] = tokenizer_eot(t);
            x[b * length + length - 1] = (int)(first + b);
        }
        gsa_forward(m, x, NULL, B, length);
        for (size_t l = 0; l < (size_t)c->L; l++)
            for (int h = 0; h < config_heads(c); h++)
                for (size_t b = 0; b < B && config_is_gsa(c, (int)l, h); b++)
                    memcpy(keys + ((size_t)config_gsa_before(c, (int)l, h) * V + first + b) * HS,
                           m->a.qkv + ((l * B + b) * length + length - 1) * 3 * A + A + (size_t)h * HS,
                           HS * sizeof *keys);
        progress("keys", (double)(first + B), (double)V);
    }
    free(x);
    return keys;
}

/* The tokens whose keys splat s owns, those first of which it has most, from responsibilities r (V, S). */
static void print_owned_tokens(const Tokenizer *t, const double *r, size_t V, size_t S, size_t s, int64_t show) {
    double *nearness = (double *)xmalloc(V * sizeof *nearness); /* -1: not its own, or named already */
    for (size_t v = 0; v < V; v++) {
        nearness[v] = r[v * S + s];
        for (size_t u = 0; u < S; u++) nearness[v] = r[v * S + u] > r[v * S + s] ? -1 : nearness[v];
    }
    for (int64_t place = 0; place < show; place++) {
        size_t best = 0, bytes;
        for (size_t v = 1; v < V; v++) best = nearness[v] > nearness[best] ? v : best;
        if (nearness[best] < 0) break;
        nearness[best] = -1;
        const char *piece = tokenizer_piece(t, (int)best, &bytes);
        char *label = token_label(piece, bytes);
        printf(" %s", label);
        free(label);
    }
    free(nearness);
}

/* One splat of head g: share of the keys, of training where it kept statistics, amplitude, width, envelope, age. */
static void print_splat(const GSA *m, const Adapt *a, size_t g, size_t s, double share, long long step) {
    const Config *c = &m->config;
    size_t i = g * (size_t)c->S + s;
    bool tracked = a->numbers[ADAPT_COUNT_WINDOWS] > 0;
    printf(" %4zu %7.2f %6.2f %6.3f", s, 100 * (tracked ? adapt_activation(a, g, s) : share),
           exp((double)(m->p.log_alpha[i] - m->p.log_alpha_reference[i])),
           1 / sqrt(mean_precision(c, m->p.log_precision + i * (size_t)config_precisions(c))));
    if (m->p.log_theta) printf(" %8.1f", 6.283185307179586 / exp((double)m->p.log_theta[i]));
    if (m->p.log_delta) printf(" %8.1f", log(2) / exp((double)m->p.log_delta[i]));
    if (m->p.psi) printf(" %6.2f", (double)m->p.psi[i]);
    printf("   %7lld ", step - (long long)a->born[i]);
}

static int inspect(const Options *o, char **argv) {
    Checkpoint *k = checkpoint_open(argv[1], CHECKPOINT_MODEL);
    const Config *c = &k->config;
    Tokenizer *t = checkpoint_tokenizer(k, o->tokenizer);
    size_t G = (size_t)config_gsa_heads(c), S = (size_t)c->S, HS = (size_t)config_head_size(c),
           V = (size_t)(o->tokens < c->V ? o->tokens : c->V);
    if (!G) die("%s has standard heads only, and no splats to show", argv[1]);
    uint64_t heads[MAX_LAYERS];
    for (int l = 0; l < MAX_LAYERS; l++) heads[l] = ~0ull;
    if (o->heads) named_heads(heads, o->heads, c);
    bool splats = false;
    for (int l = 0; l < c->L; l++) splats = splats || heads[l] & c->gsa_heads[l];
    if (!splats) die_usage("--heads '%.80s' names standard heads only, which have no splats to show", o->heads);
    GSA *m = gsa_create(c, 1);
    checkpoint_read_tensors(k, "", m->params);
    if (o->text) {
        inspect_text(m, t, o, heads);
        gsa_destroy(m);
        tokenizer_free(t);
        checkpoint_close(k);
        return 0;
    }
    Adapt *a = adapt_create(c, 1);
    adapt_read(a, k, false);
    float *keys = vocabulary_keys(m, t, V);
    printf("%s: step %lld, %d layers, %zu GSA heads of %zu slots%s\n", argv[1], (long long)k->step, c->L, G, S,
           a->numbers[ADAPT_COUNT_WINDOWS] > 0
               ? ""
               : "; its training kept no statistics: activations are those of the keys looked at");
    double *r = (double *)xmalloc(V * S * sizeof *r);
    for (int i = 0; i < c->L * config_heads(c); i++) {
        int l = i / config_heads(c), h = i % config_heads(c);
        if (!config_is_gsa(c, l, h) || !(heads[l] >> h & 1)) continue;
        size_t g = (size_t)config_gsa_before(c, l, h);
        head_responsibilities(c, m->params, l, h, keys + g * V * HS, V, r);
        printf("\nlayer %d, head %d: %d of %zu alive\n slot   act %%    amp  width%s%s%s   %7s  tokens\n", l, h,
               adapt_alive(c, (int)g, m->params + a->first), S, m->p.log_theta ? "   period" : "",
               m->p.log_delta ? "     half" : "", m->p.psi ? "  phase" : "", "age");
        for (size_t s = 0; s < S; s++) {
            if (!(m->p.alive[g * S + s] > 0)) {
                printf(" %4zu   dead\n", s);
                continue;
            }
            double share = 0;
            for (size_t v = 0; v < V; v++) share += r[v * S + s] / (double)V;
            print_splat(m, a, g, s, share, (long long)k->step);
            print_owned_tokens(t, r, V, S, s, o->show);
            printf("\n");
        }
    }
    free(r);
    free(keys);
    adapt_free(a);
    gsa_destroy(m);
    tokenizer_free(t);
    checkpoint_close(k);
    return 0;
}

/* ---------------------------------------------------------------------- measure */

/* Takes the heads with splats, or those without, out of the model: the output projection does not read them any
   more. Returns how many. */
static size_t silence_heads(GSA *m, bool gsa) {
    Sizes z = config_sizes(&m->config);
    size_t count = 0;
    for (size_t l = 0; l < z.L; l++)
        for (size_t h = 0; h < z.NH; h++) {
            if (config_is_gsa(&m->config, (int)l, (int)h) != gsa) continue;
            for (size_t c = 0; c < z.C; c++)
                memset(m->p.attprojw + (l * z.C + c) * z.A + h * z.HS, 0, z.HS * sizeof(real));
            count++;
        }
    return count;
}

/* Mean loss of the last `counted` positions of windows (n, T + 1) when the model sees their last `length` tokens
   only. */
static double window_loss(GSA *m, const int *windows, size_t n, size_t T, size_t length, size_t counted) {
    int *x = (int *)xmalloc(2 * m->B * length * sizeof *x), *y = x + m->B * length;
    double sum = 0;
    for (size_t w = 0; w < n;) {
        size_t B = n - w < m->B ? n - w : m->B;
        for (size_t b = 0; b < B; b++) {
            const int *window = windows + (w + b) * (T + 1) + T - length;
            memcpy(x + b * length, window, length * sizeof *x);
            memcpy(y + b * length, window + 1, length * sizeof *y);
        }
        gsa_forward(m, x, y, B, length);
        for (size_t i = 0; i < B * length; i++) sum += i % length >= length - counted ? (double)m->a.losses[i] : 0;
        w += B;
    }
    free(x);
    return sum / (double)(n * counted);
}

/* The text's first `tokens` tokens or so as windows (n, T + 1), each with the token to predict after it. */
static int *text_windows(const Loaded *s, const char *path, size_t tokens, size_t *n) {
    size_t T = (size_t)s->model->config.T, wanted = (tokens + T - 1) / T, count, room = 0;
    int *out = NULL, last;
    TokenSource *source = source_open(path, s->tokenizer);
    count = source_read(source, &last, 1);
    for (*n = 0; *n < wanted; ++*n) {
        if (*n == room) out = (int *)xrealloc(out, (room = 2 * room + 64) * (T + 1) * sizeof *out);
        int *window = out + *n * (T + 1);
        window[0] = last; /* the last target is the next window's first input */
        size_t got = source_read(source, window + 1, T);
        count += got;
        if (got < T) break;
        last = window[T];
    }
    if (*n < 1)
        die("%s has %zu tokens; one window of this model is %zu, and one token to predict after it", source->name,
            count, T);
    source_close(source);
    return out;
}

/* Losses of the same tokens, the last of each window, with more and more history: 1, 2, 3, 4, 6, 8, 12 ... tokens. */
enum { HISTORIES = 128 };
typedef struct {
    size_t steps, length[HISTORIES];
    double loss[HISTORIES];
} History;

static History measure_history(GSA *m, const int *windows, size_t n) {
    History h = {0};
    size_t T = (size_t)m->config.T, counted = T < 32 ? (T + 3) / 4 : T < 128 ? 8 : T / 16, longest = T - counted + 1;
    for (size_t k = 1; k < longest && h.steps < HISTORIES - 1; k = (k & (k - 1)) == 0 && k > 1 ? k / 2 * 3
                                                                   : k == 1                    ? 2
                                                                                               : k / 3 * 4)
        h.length[h.steps++] = k;
    h.length[h.steps++] = longest;
    for (size_t i = h.steps; i-- > 0;) {
        h.loss[i] = window_loss(m, windows, n, T, h.length[i] + counted - 1, counted);
        progress("history", (double)(h.steps - i), (double)h.steps);
    }
    size_t effective = longest;
    for (size_t i = h.steps; i-- > 0 && h.loss[i] <= 1.01 * h.loss[h.steps - 1];) effective = h.length[i];
    printf("effective context %zu tokens (of %zu)\n", effective, longest);
    return h;
}

static void measure_sum(HeadMeasure *sum, const HeadMeasure *one, double n) {
    sum->entropy += one->entropy / n;
    sum->distance += one->distance / n;
    sum->reach += one->reach / n;
}

/* The measures of each head (L, NH), averaged over the first windows. */
static HeadMeasure *measure_each_head(GSA *m, const int *windows, size_t n) {
    const Config *c = &m->config;
    size_t T = (size_t)c->T, heads = (size_t)c->L * (size_t)config_heads(c);
    HeadMeasure *each = (HeadMeasure *)xmalloc(heads * sizeof *each), *sum = (HeadMeasure *)xcalloc(heads, sizeof *sum),
                mean = {0, 0, 0};
    size_t sampled = n < 4 ? n : 4, length = T < MEASURE_TOKENS ? T : MEASURE_TOKENS;
    for (size_t w = 0; w < sampled; w++) {
        gsa_forward(m, windows + w * (T + 1), NULL, 1, length);
        HeadMeasure all = measure_heads(c, m->params, length, report_head, m, each);
        for (size_t h = 0; h < heads; h++) measure_sum(&sum[h], &each[h], (double)sampled);
        measure_sum(&mean, &all, (double)sampled);
    }
    printf("attention entropy %.4f nats, distance %.2f, reach %.1f tokens\n", mean.entropy, mean.distance, mean.reach);
    free(each);
    return sum;
}

/* The loss without the heads that have splats, then without those that have none. */
static void measure_without(GSA *m, const int *windows, size_t n) {
    size_t T = (size_t)m->config.T;
    real *keep = (real *)xmalloc(m->total * sizeof *keep);
    memcpy(keep, m->params, m->total * sizeof *keep);
    for (int gsa = 1; gsa >= 0; gsa--) {
        size_t silent = silence_heads(m, gsa);
        if (silent)
            printf("loss without the %zu %s heads %.6f\n", silent, gsa ? "GSA" : "standard",
                   window_loss(m, windows, n, T, T, T));
        memcpy(m->params, keep, m->total * sizeof *keep);
    }
    free(keep);
}

static int measure(const Options *o, char **argv) {
    if (o->silence && !o->classes)
        die_usage("--silence compares classes of tokens; say which by --classes stories or --classes english");
    if (o->twin && !o->classes)
        die_usage("--twin is a control of --classes; say which by --classes stories or --classes english");
    Loaded s = load(argv[1], o->tokenizer, (size_t)o->batch, OBJECTIVE_LM);
    const Config *c = &s.model->config;
    size_t T = (size_t)c->T, n;
    if (o->classes && !config_gsa_heads(c)) die("--classes: %s has standard heads only, and no splats", argv[1]);
    Loaded twin = open_twin(o, c, argv[1]);
    int *windows = text_windows(&s, argv[2], (size_t)o->tokens, &n);
    double loss = window_loss(s.model, windows, n, T, T, T);
    if (!isfinite(loss)) die("%s gives a loss that is not finite on %s: it is not a usable model", argv[1], argv[2]);
    printf("tokens %zu, windows %zu of %zu\nloss %.6f nats per token\n", n * T, n, T, loss);
    History history = measure_history(s.model, windows, n);
    HeadMeasure *heads = measure_each_head(s.model, windows, n);
    measure_without(s.model, windows, n);

    printf("\nlayer head kind             entropy  distance     reach\n");
    static const char *const kinds[] = {"standard", "splats, softmax", "splats, linear", "extended"};
    for (int i = 0; i < c->L * config_heads(c); i++) {
        int l = i / config_heads(c), h = i % config_heads(c);
        printf("%5d %4d %-15s %8.3f %9.1f %9.1f\n", l, h, kinds[config_head_kind(c, l, h)], heads[i].entropy,
               heads[i].distance, heads[i].reach);
    }
    printf("\nhistory      loss\n");
    for (size_t i = 0; i < history.steps; i++) printf("%7zu %9.5f\n", history.length[i], history.loss[i]);
    if (o->classes) measure_classes(s.model, twin.model, s.tokenizer, o, windows, n);
    unload(s);
    if (twin.model) unload(twin);
    free(windows);
    free(heads);
    return 0;
}

/* ---------------------------------------------------------------------- recall */

/* A line of data/make_recall --ask: its kind, a tab, a text with two bracketed words. The brackets are taken out of
   the text, in place; from and to are the bytes between them. NULL, or what is wrong. */
static const char *recall_line(char *line, char **kind, char **text, size_t from[2], size_t to[2]) {
    char *tab = strchr(line, '\t'), *out;
    size_t opened = 0, closed = 0;
    if (!tab || tab == line) return "no kind and tab at its start";
    *tab = 0;
    *kind = line;
    *text = out = tab + 1;
    for (const char *in = *text; *in; in++) {
        if (*in == '[' && opened == closed && opened < 2) from[opened++] = (size_t)(out - *text);
        else if (*in == ']' && opened == closed + 1) to[closed++] = (size_t)(out - *text);
        else *out++ = *in;
    }
    *out = 0;
    if (opened != 2 || closed != 2) return "not two words in brackets";
    return from[0] >= to[0] || from[1] >= to[1] || to[1] != (size_t)(out - *text) ? "no answer in brackets at its end"
                                                                                  : NULL;
}

enum { RECALL_KINDS = 8, RECALL_OCTAVES = 64 };
typedef struct {
    double questions, right, distance, probability;
} Recalled;

typedef struct {
    size_t begin, end, distance; /* tokens of the answer; how far before it was told */
    int kind;
} Question;

/* A file of questions being asked, a batch at a time. */
typedef struct {
    Loaded loaded;
    const char *model, *path; /* of the files, for sentences */
    size_t lines, left_out;   /* read so far; of them not asked */
    int *x;                   /* (B, T): the texts of a batch; T apart until they are asked */
    Question *asked;          /* (B) */
    size_t waiting, most;     /* in the batch; tokens of the longest text */
    char *kinds[RECALL_KINDS];
    int kind_count;
    Recalled result[RECALL_KINDS][RECALL_OCTAVES];
} Recall;

static int recall_kind(Recall *r, char *kind) {
    int k = 0;
    while (k < r->kind_count && strcmp(r->kinds[k], kind) != 0) k++;
    if (k == RECALL_KINDS) die("%s, line %zu: more than %d kinds of questions", r->path, r->lines, RECALL_KINDS);
    if (k == r->kind_count) r->kinds[r->kind_count++] = kind;
    return k;
}

/* One line of the file joins the batch, where the model can be asked it. */
static void recall_add(Recall *r, char *line) {
    const Tokenizer *t = r->loaded.tokenizer;
    char *kind, *text;
    size_t T = (size_t)r->loaded.model->config.T, from[2], to[2], count = 1, room = 1024, at = 0, told = 0;
    const char *wrong = recall_line(line, &kind, &text, from, to);
    r->lines++;
    if (wrong) die("%s, line %zu: %s; it takes lines of data/make_recall --ask", r->path, r->lines, wrong);
    int *ids = (int *)xmalloc(room * sizeof *ids);
    ids[0] = tokenizer_eot(t);
    tokenizer_encode(t, text, strlen(text), false, &ids, &count, &room);
    Question q = {count, count, 0, recall_kind(r, kind)};
    for (size_t i = 1; i < count; i++) { /* the tokens that a bracketed word is in */
        size_t length;
        tokenizer_piece(t, ids[i], &length);
        if (at < to[0] && at + length > from[0] && !told) told = i;
        if (at + length > from[1] && i < q.begin) q.begin = i;
        at += length;
    }
    size_t left_out = count > T ? count - T : 0; /* of a longer text the beginning */
    if (q.begin <= told || left_out > told) {
        if (q.begin <= told)
            warn("%s, line %zu: the two words in brackets share a token: the question is left out", r->path, r->lines);
        else
            warn("%s, line %zu: the word was told %zu tokens ago; the model was trained for %zu: the question is left "
                 "out",
                 r->path, r->lines, q.begin - told, T);
        r->left_out++;
        free(ids);
        return;
    }
    q.distance = q.begin - told;
    q.begin -= left_out;
    q.end -= left_out;
    count -= left_out;
    for (size_t i = 0; i < T; i++) r->x[r->waiting * T + i] = i < count ? ids[left_out + i] : ids[0];
    r->most = count > r->most ? count : r->most;
    r->asked[r->waiting++] = q;
    free(ids);
}

/* Whether each token of an answer is the likeliest, and the probability of all. x, logits: from the text's start. */
static bool recall_answer(const Config *c, const Question *q, const int *x, const real *logits, double *probability) {
    bool right = true;
    *probability = 1;
    for (size_t i = q->begin; i < q->end; i++) {
        const real *l = logits + (i - 1) * (size_t)c->Vp;
        real top = largest(l, (size_t)c->V), sum = 0;
        for (int v = 0; v < c->V; v++) sum += exp_real(l[v] - top);
        right = right && l[x[i]] == top;
        *probability *= (double)(exp_real(l[x[i]] - top) / sum);
    }
    return right;
}

/* Asks the batch, and empties it. */
static void recall_ask(Recall *r) {
    GSA *m = r->loaded.model;
    const Config *c = &m->config;
    size_t T = (size_t)c->T, most = r->most;
    for (size_t b = 1; b < r->waiting; b++) memmove(r->x + b * most, r->x + b * T, most * sizeof *r->x);
    gsa_forward(m, r->x, NULL, r->waiting, most);
    for (size_t b = 0; b < r->waiting; b++) {
        const Question *q = &r->asked[b];
        double probability;
        bool right = recall_answer(c, q, r->x + b * most, m->a.logits + b * most * (size_t)c->Vp, &probability);
        if (!isfinite(probability)) die("%s gives logits that are not finite: it is not a usable model", r->model);
        Recalled *sum = &r->result[q->kind][(int)lround(2 * log2((double)q->distance))];
        sum->questions++;
        sum->right += right;
        sum->distance += (double)q->distance;
        sum->probability += probability;
    }
    r->waiting = r->most = 0;
}

static int recall(const Options *o, char **argv) {
    size_t B = (size_t)o->batch, bytes, total = 0;
    Recall *r = (Recall *)xcalloc(1, sizeof *r);
    r->loaded = load(argv[1], o->tokenizer, B, OBJECTIVE_LM);
    r->model = argv[1];
    r->path = input_name(argv[2]);
    r->x = (int *)xmalloc(B * (size_t)r->loaded.model->config.T * sizeof *r->x);
    r->asked = (Question *)xmalloc(B * sizeof *r->asked);
    char *file = read_text(argv[2], &bytes);
    for (const char *p = file; *p; p++) total += *p == '\n';
    for (char *line = file, *next; *line; line = next) {
        next = line + strcspn(line, "\n");
        if (*next) *next++ = 0;
        if (*line) recall_add(r, line);
        if (r->waiting < B && (*next || !r->waiting)) continue;
        recall_ask(r);
        progress("recall", (double)r->lines, (double)(total > r->lines ? total : r->lines));
    }
    if (!r->lines) die("%s holds no questions; data/make_recall --ask 200 --out FILE writes some", r->path);
    if (r->left_out == r->lines) die("%s holds no question that %s can be asked", r->path, r->model);
    printf("kind      distance questions  accuracy        +- probability\n");
    for (int k = 0; k < r->kind_count; k++)
        for (int i = 0; i < RECALL_OCTAVES; i++) {
            const Recalled *a = &r->result[k][i];
            double share = a->right / a->questions;
            if (a->questions > 0)
                printf("%-8s %9.1f %9.0f %9.4f %9.4f %11.4f\n", r->kinds[k], a->distance / a->questions, a->questions,
                       share, sqrt(share * (1 - share) / a->questions), a->probability / a->questions);
        }
    if (r->left_out) printf("left out: %zu of %zu questions\n", r->left_out, r->lines);
    unload(r->loaded);
    free(file);
    free(r->x);
    free(r->asked);
    free(r);
    return 0;
}

#endif
