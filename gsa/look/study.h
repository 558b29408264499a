/* infer measure and infer recall: what a model's heads do, how far it looks back, which heads it needs, and what it
   remembers. The end of infer.c, in a file of its own: train_gsa.c's forward pass, and the measures of heads of
   gsa/look/measure.c. */
#ifndef GSA_STUDY_H
#define GSA_STUDY_H

#include "measure.h"

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

static int measure(int argc, char **argv) {
    int64_t tokens = 65536, batch = 8, threads = 0;
    const char *tokenizer = NULL;
    Flag flags[] = {
        {FLAG_ROOM, NULL, NULL, 0, 0, NULL, "flags", false},
        {FLAG_INT, "tokens", &tokens, 1, 1e12, NULL,
         "tokens of the file that are used, from its start, in whole windows", false},
        {FLAG_INT, "batch", &batch, 1, 65536, NULL, "windows per pass", false},
        MACHINE_FLAGS,
    };
    int n = parse_flags(
        flags, argc, argv,
        "usage: infer measure MODEL FILE [flags]\n"
        "What the heads do on a text or shard, in windows of the model's length: the loss by length of history, the "
        "loss without the GSA\n"
        "heads and without the standard ones, and of each head entropy (nats), mean distance and the distance within "
        "which 90 % of its weight\n"
        "lies (tokens). The effective context is the shortest history with a loss within 1 % of the longest's.\n");
    if (n != 2) die_usage("measure needs a model and a file: infer measure MODEL FILE");
    set_threads(threads);
    Loaded s = load(argv[1], tokenizer, (size_t)batch, OBJECTIVE_LM);
    GSA *m = s.model;
    const Config *c = &m->config;
    size_t T = (size_t)c->T, count, heads = (size_t)c->L * (size_t)config_heads(c);
    int *text = perplexity_tokens(argv[2], s.tokenizer, &count);
    size_t windows = count > 1 ? (count - 1) / T : 0, wanted = ((size_t)tokens + T - 1) / T;
    if (windows < 1)
        die("%s has %zu tokens; one window of this model is %zu, and one token to predict after it", argv[2], count, T);
    if (windows > wanted) windows = wanted;
    int *window = (int *)xmalloc(windows * (T + 1) * sizeof *window);
    for (size_t w = 0; w < windows; w++) memcpy(window + w * (T + 1), text + w * T, (T + 1) * sizeof *window);

    double loss = window_loss(m, window, windows, T, T, T);
    if (!isfinite(loss)) die("%s gives a loss that is not finite on %s: it is not a usable model", argv[1], argv[2]);
    printf("tokens %zu, windows %zu of %zu\nloss %.6f nats per token\n", windows * T, windows, T, loss);

    /* the same tokens, the last of each window, with more and more history: 1, 2, 3, 4, 6, 8, 12 ... */
    size_t counted = T < 32 ? (T + 3) / 4 : T < 128 ? 8 : T / 16, longest = T - counted + 1, steps = 0, history[128];
    double by_history[128];
    for (size_t h = 1; h < longest && steps < 127; h = (h & (h - 1)) == 0 && h > 1 ? h / 2 * 3 : h == 1 ? 2 : h / 3 * 4)
        history[steps++] = h;
    history[steps++] = longest;
    size_t effective = longest;
    for (size_t i = steps; i-- > 0;) {
        by_history[i] = window_loss(m, window, windows, T, history[i] + counted - 1, counted);
        progress("history", (double)(steps - i), (double)steps);
    }
    for (size_t i = steps; i-- > 0 && by_history[i] <= 1.01 * by_history[steps - 1];) effective = history[i];
    printf("effective context %zu tokens (of %zu)\n", effective, longest);

    /* heads, on the first windows */
    HeadMeasure *each = (HeadMeasure *)xmalloc(2 * heads * sizeof *each), *sum = each + heads, mean = {0, 0, 0};
    size_t sampled = windows < 4 ? windows : 4, length = T < MEASURE_TOKENS ? T : MEASURE_TOKENS;
    memset(sum, 0, heads * sizeof *sum);
    for (size_t w = 0; w < sampled; w++) {
        gsa_forward(m, window + w * (T + 1), NULL, 1, length);
        HeadMeasure all = measure_heads(c, m->params, length, report_head, m, each);
        for (size_t h = 0; h < heads; h++) {
            sum[h].entropy += each[h].entropy / (double)sampled;
            sum[h].distance += each[h].distance / (double)sampled;
            sum[h].reach += each[h].reach / (double)sampled;
        }
        mean.entropy += all.entropy / (double)sampled;
        mean.distance += all.distance / (double)sampled;
        mean.reach += all.reach / (double)sampled;
    }
    printf("attention entropy %.4f nats, distance %.2f, reach %.1f tokens\n", mean.entropy, mean.distance, mean.reach);

    real *keep = (real *)xmalloc(m->total * sizeof *keep);
    memcpy(keep, m->params, m->total * sizeof *keep);
    for (int gsa = 1; gsa >= 0; gsa--) {
        size_t silent = silence_heads(m, gsa);
        if (silent)
            printf("loss without the %zu %s heads %.6f\n", silent, gsa ? "GSA" : "standard",
                   window_loss(m, window, windows, T, T, T));
        memcpy(m->params, keep, m->total * sizeof *keep);
    }

    printf("\nlayer head kind             entropy  distance     reach\n");
    static const char *const kinds[] = {"standard", "splats, softmax", "splats, linear", "extended"};
    for (size_t h = 0; h < heads; h++) {
        int l = (int)h / config_heads(c), at = (int)h % config_heads(c);
        printf("%5d %4d %-15s %8.3f %9.1f %9.1f\n", l, at, kinds[config_head_kind(c, l, at)], sum[h].entropy,
               sum[h].distance, sum[h].reach);
    }
    printf("\nhistory      loss\n");
    for (size_t i = 0; i < steps; i++) printf("%7zu %9.5f\n", history[i], by_history[i]);
    unload(s);
    free(text);
    free(window);
    free(each);
    free(keep);
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

static int recall(int argc, char **argv) {
    int64_t batch = 16, threads = 0;
    const char *tokenizer = NULL;
    Flag flags[] = {
        {FLAG_ROOM, NULL, NULL, 0, 0, NULL, "flags", false},
        {FLAG_INT, "batch", &batch, 1, 65536, NULL, "questions per pass", false},
        MACHINE_FLAGS,
    };
    int n = parse_flags(
        flags, argc, argv,
        "usage: infer recall MODEL FILE [flags]\n"
        "What a model remembers, by distance. FILE holds questions of data/make_recall --ask: an answer counts as "
        "right where each of its tokens\n"
        "is the model's likeliest; distances are in tokens, from where it was told, and grouped by half octaves.\n");
    if (n != 2) die_usage("recall needs a model and a file of questions: infer recall MODEL FILE");
    set_threads(threads);
    Loaded s = load(argv[1], tokenizer, (size_t)batch, OBJECTIVE_LM);
    GSA *m = s.model;
    const Config *c = &m->config;
    size_t T = (size_t)c->T, bytes, waiting = 0, lines = 0, most = 0, total = 0;
    char *file = read_file(argv[2], &bytes), *kinds[RECALL_KINDS];
    int *x = (int *)xmalloc((size_t)batch * T * sizeof *x), *ids = NULL, kind_count = 0;
    struct {
        size_t begin, end, distance; /* tokens of the answer */
        int kind;
    } *asked = xmalloc((size_t)batch * sizeof *asked);
    static Recalled result[RECALL_KINDS][RECALL_OCTAVES];
    memset(result, 0, sizeof result);
    for (const char *p = file; *p; p++) total += *p == '\n';
    for (char *line = file, *next; *line || waiting; line = next) {
        next = line + strcspn(line, "\n");
        if (*next) *next++ = 0;
        if (*line) {
            char *kind, *text;
            size_t from[2], to[2], count = 1, room = 1024, at = 0, told = 0;
            const char *wrong = recall_line(line, &kind, &text, from, to);
            lines++;
            if (wrong) die("%s, line %zu: %s; it takes lines of data/make_recall --ask", argv[2], lines, wrong);
            int k = 0;
            while (k < kind_count && strcmp(kinds[k], kind) != 0) k++;
            if (k == RECALL_KINDS) die("%s, line %zu: more than %d kinds of questions", argv[2], lines, RECALL_KINDS);
            if (k == kind_count) kinds[kind_count++] = kind;
            ids = (int *)xrealloc(ids, room * sizeof *ids);
            ids[0] = tokenizer_eot(s.tokenizer);
            tokenizer_encode(s.tokenizer, text, strlen(text), false, &ids, &count, &room);
            asked[waiting].begin = count;
            asked[waiting].end = count;
            asked[waiting].kind = k;
            for (size_t i = 1; i < count; i++) { /* the tokens that a bracketed word is in */
                size_t length;
                tokenizer_piece(s.tokenizer, ids[i], &length);
                if (at < to[0] && at + length > from[0] && !told) told = i;
                if (at + length > from[1] && i < asked[waiting].begin) asked[waiting].begin = i;
                at += length;
            }
            size_t left_out = count > T ? count - T : 0; /* of a longer text the beginning */
            if (asked[waiting].begin <= told)
                die("%s, line %zu: the two words in brackets share a token", argv[2], lines);
            if (left_out > told)
                die("%s, line %zu: the word was told %zu tokens ago; the model was trained for %zu", argv[2], lines,
                    asked[waiting].begin - told, T);
            asked[waiting].distance = asked[waiting].begin - told;
            asked[waiting].begin -= left_out;
            asked[waiting].end -= left_out;
            count -= left_out;
            for (size_t i = 0; i < T; i++) x[waiting * T + i] = i < count ? ids[left_out + i] : ids[0];
            most = count > most ? count : most;
            waiting++;
        }
        if (waiting == (size_t)batch || (!*next && waiting)) {
            for (size_t b = 1; b < waiting; b++) memmove(x + b * most, x + b * T, most * sizeof *x);
            gsa_forward(m, x, NULL, waiting, most);
            for (size_t b = 0; b < waiting; b++) {
                bool right = true;
                double probability = 1;
                for (size_t i = asked[b].begin; i < asked[b].end; i++) {
                    const real *logits = m->a.logits + (b * most + i - 1) * (size_t)c->Vp;
                    real top = largest(logits, (size_t)c->V), sum = 0;
                    int token = x[b * most + i];
                    for (int v = 0; v < c->V; v++) sum += exp_real(logits[v] - top);
                    right = right && logits[token] == top;
                    probability *= (double)(exp_real(logits[token] - top) / sum);
                }
                if (!isfinite(probability))
                    die("%s gives logits that are not finite: it is not a usable model", argv[1]);
                Recalled *r = &result[asked[b].kind][(int)lround(2 * log2((double)asked[b].distance))];
                r->questions++;
                r->right += right;
                r->distance += (double)asked[b].distance;
                r->probability += probability;
            }
            waiting = most = 0;
            progress("recall", (double)lines, (double)(total > lines ? total : lines));
        }
        if (!*next && !waiting) break;
    }
    if (!lines) die("%s holds no questions; data/make_recall --ask 200 --out FILE writes some", argv[2]);
    printf("kind      distance questions  accuracy        +- probability\n");
    for (int k = 0; k < kind_count; k++)
        for (int i = 0; i < RECALL_OCTAVES; i++) {
            const Recalled *r = &result[k][i];
            double share = r->right / r->questions;
            if (r->questions > 0)
                printf("%-8s %9.1f %9.0f %9.4f %9.4f %11.4f\n", kinds[k], r->distance / r->questions, r->questions,
                       share, sqrt(share * (1 - share) / r->questions), r->probability / r->questions);
        }
    unload(s);
    free(file);
    free(x);
    free(ids);
    free(asked);
    return 0;
}

#endif
