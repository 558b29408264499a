/* What splats mean: inspect --text shows what each owns in a text; measure --classes says how much they know about
   classes of tokens beside controls, and which class suffers when one is silenced. A part of infer.c in a file of its
   own, included by study.h. */
#ifndef GSA_MEANING_H
#define GSA_MEANING_H

#include "../run/starts.h"
#include "classes.h"
#include "splats.h"

/* Queries (part 0) or keys (part 1) of a head in the last forward pass of one text: (T, HS) */
static void report_head(void *model, int l, int h, int part, float *out) {
    const GSA *m = (const GSA *)model;
    Sizes z = config_sizes(&m->config);
    for (size_t t = 0; t < m->used_T; t++)
        memcpy(out + t * z.HS, m->a.qkv + ((size_t)l * m->used_T + t) * 3 * z.A + (size_t)part * z.A + (size_t)h * z.HS,
               z.HS * sizeof(float));
}

/* Tokens as text that can be shown on one line. */
static char *tokens_label(const Tokenizer *t, const int *tokens, size_t count) {
    size_t bytes, total = 0;
    for (size_t i = 0; i < count; i++) total += tokenizer_piece(t, tokens[i], &bytes) ? bytes : strlen("[MASK]");
    char *text = (char *)xmalloc(total + 1), *out = text;
    for (size_t i = 0; i < count; i++) {
        const char *piece = tokenizer_piece(t, tokens[i], &bytes);
        if (!piece) piece = "[MASK]", bytes = strlen(piece);
        memcpy(out, piece, bytes);
        out += bytes;
    }
    char *label = token_label(text, total);
    free(text);
    return label;
}

/* The name of a splat: the most typical tokens of its keys. */
enum { NAME_TOKENS = 3 };
static char *splat_name(const Tokenizer *t, const SplatStudy *a, size_t g, size_t s) {
    size_t S = (size_t)a->config.S;
    int ids[NAME_TOKENS];
    size_t count =
        splat_tokens(a->keys + g * a->room * S, a->tokens, a->N, S, s, (size_t)a->config.Vp, NAME_TOKENS, ids);
    char *name = xstrdup("");
    for (size_t i = 0; i < count; i++) {
        char *label = tokens_label(t, &ids[i], 1), *longer = xasprintf("%s%s%s", name, i ? " " : "", label);
        free(label);
        free(name);
        name = longer;
    }
    return name;
}

/* What the model's splats do on windows of a text (n, T), `apart` tokens from one to the next. */
static SplatStudy *study_splats(GSA *m, const int *windows, size_t n, size_t T, size_t apart) {
    SplatStudy *a = splats_open(&m->config, T, n);
    for (size_t w = 0; w < n; w++) {
        gsa_forward(m, windows + w * apart, NULL, 1, T);
        splats_add(a, m->params, windows + w * apart, report_head, m);
        progress("splats", (double)(w + 1), (double)n);
    }
    return a;
}

/* ---------------------------------------------------------------------- inspect --text */

enum { BEFORE = 8, AFTER = 5 }; /* tokens around one that is shown */

static void print_snippets(const char *title, const Tokenizer *t, const SplatStudy *a, const float *r, size_t s,
                           size_t show) {
    size_t *places = (size_t *)xmalloc((show + 1) * sizeof *places), S = (size_t)a->config.S,
           count = splat_places(r, a->tokens, a->N, S, s, 2, show, places);
    if (count) printf("  %s\n", title);
    for (size_t i = 0; i < count; i++) {
        size_t at = places[i], from = at > BEFORE ? at - BEFORE : 0,
               end = at + 1 + AFTER < a->N ? at + 1 + AFTER : a->N;
        char *before = tokens_label(t, a->tokens + from, at - from), *token = tokens_label(t, a->tokens + at, 1),
             *after = tokens_label(t, a->tokens + at + 1, end - at - 1);
        printf("    %4.0f %% %s[%s]%s\n", 100 * (double)r[at * S + s], before, token, after);
        free(before);
        free(token);
        free(after);
    }
    free(places);
}

/* The distances at which the envelope is largest. */
static void print_envelope(const GSA *m, size_t i, size_t T) {
    if (m->p.log_theta) {
        double turn = 6.283185307179586 / exp((double)m->p.log_theta[i]), peak = 0;
        printf("  a turn of %.1f tokens favours distances", turn);
        for (int n = 0; n < 5 && peak < (double)T; n++) {
            printf("%s %.0f", n ? "," : "", peak);
            peak += turn;
        }
        printf(peak < (double)T ? " ...\n" : "\n");
    }
    if (m->p.log_delta) printf("  half of it is left after %.1f tokens\n", log(2) / exp((double)m->p.log_delta[i]));
}

/* The splats whose keys its queries give most weight to. */
static void print_partners(const SplatStudy *a, size_t g, size_t s) {
    size_t S = (size_t)a->config.S;
    double total = 0, *met = (double *)xmalloc(S * sizeof *met);
    memcpy(met, a->met + (g * S + s) * S, S * sizeof *met);
    for (size_t u = 0; u < S; u++) total += met[u];
    printf("  its queries attend to keys of splats");
    for (int place = 0; place < 4; place++) {
        size_t best = 0;
        for (size_t u = 1; u < S; u++) best = met[u] > met[best] ? u : best;
        if (!(met[best] > 0.01 * total)) break;
        printf("%s %zu (%.0f %%)", place ? "," : "", best, 100 * met[best] / total);
        met[best] = 0;
    }
    printf("\n");
    free(met);
}

static void print_meaning(const GSA *m, const Tokenizer *t, const SplatStudy *a, int l, int h, size_t s, size_t show) {
    size_t S = (size_t)a->config.S, g = (size_t)config_gsa_before(&a->config, l, h), N = a->N, first[DISTANCE_BINS],
           bins = distance_bins(a->T, first);
    const float *r[2] = {a->queries + g * a->room * S, a->keys + g * a->room * S};
    double use[2] = {0, 0}, owns[2] = {0, 0}, adds[DISTANCE_BINS];
    for (size_t i = 0; i < N; i++)
        for (int side = 0; side < 2; side++) {
            bool strongest = true;
            for (size_t u = 0; u < S; u++) strongest = strongest && r[side][i * S + u] <= r[side][i * S + s];
            use[side] += (double)r[side][i * S + s] / (double)N;
            owns[side] += strongest ? 1 / (double)N : 0;
        }
    char *name = splat_name(t, a, g, s);
    printf("\nsplat %d:%d:%zu  %s\n  share of keys %.2f %%, strongest of %.2f %%; of queries %.2f %%, strongest of "
           "%.2f %%\n",
           l, h, s, name, 100 * use[1], 100 * owns[1], 100 * use[0], 100 * owns[0]);
    free(name);
    print_envelope(m, g * S + s, a->T);
    splat_offsets(a, g, s, first, bins, adds);
    printf(config_head_kind(&a->config, l, h) == HEAD_SPLAT ? "  adds to logits by distance, in nats:"
                                                            : "  share of the weight by distance, in percent:");
    for (size_t b = 0; b < bins; b++)
        printf(" %zu:%.2f", first[b], adds[b] * (config_head_kind(&a->config, l, h) == HEAD_SPLAT ? 1 : 100));
    printf("\n");
    print_partners(a, g, s);
    print_snippets("keys", t, a, r[1], s, show);
    print_snippets("queries", t, a, r[0], s, show);
}

/* heads: masks by layer of those that are shown */
static void inspect_text(GSA *m, const Tokenizer *t, const Options *o, const uint64_t heads[MAX_LAYERS]) {
    const Config *c = &m->config;
    size_t count, T = (size_t)c->T;
    int *text = perplexity_tokens(o->text, t, &count);
    if (count < 2) die("%s holds no text to look at", o->text);
    if (count > (size_t)o->tokens) count = (size_t)o->tokens;
    if (T > count) T = count;
    SplatStudy *a = study_splats(m, text, count / T, T, T);
    printf("%zu tokens of %s in windows of %zu; snippets with the share that the splat has of the [token]\n", a->N,
           o->text, T);
    for (int i = 0; i < c->L * config_heads(c); i++) {
        int l = i / config_heads(c), h = i % config_heads(c);
        if (!config_is_gsa(c, l, h) || !(heads[l] >> h & 1)) continue;
        for (size_t s = 0; s < (size_t)c->S; s++)
            if (m->p.alive[(size_t)config_gsa_before(c, l, h) * (size_t)c->S + s] > 0)
                print_meaning(m, t, a, l, h, s, (size_t)o->show);
    }
    splats_close(a);
    free(text);
}

#endif
