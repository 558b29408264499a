/* What splats mean: inspect --text shows what each owns in a text; measure --classes says how much they know about
   classes of tokens beside controls, and which class suffers when one is silenced. A part of infer.c in a file of its
   own, included by study.h. */
#ifndef GSA_MEANING_H
#define GSA_MEANING_H

#include "../run/starts.h"
#include "classes.h"
#include "report.h"
#include "splats.h"

/* A part (PART_...) of a head in the last forward pass of one text: (T, HS), or of the forget gate (T) */
static void report_head(void *model, int l, int h, int part, float *out) {
    const GSA *m = (const GSA *)model;
    Sizes z = config_sizes(&m->config);
    ActivationTensors block = block_activations(m, (size_t)l, m->used_T);
    Gates gates = layer_gates(m, &block, (size_t)l);
    for (size_t t = 0; t < m->used_T && part == PART_FORGET; t++)
        out[t] = gates.log_forget[t * gates.count + (size_t)gates.column[h]];
    for (size_t t = 0; t < m->used_T && part != PART_FORGET; t++)
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

/* What the model's splats do on n windows of T tokens, `apart` tokens from one to the next; pairs: see splats_open. */
static SplatStudy *study_splats(GSA *m, const int *windows, size_t n, size_t T, size_t apart, bool pairs) {
    SplatStudy *a = splats_open(&m->config, T, n, pairs);
    for (size_t w = 0; w < n; w++) {
        gsa_forward(m, windows + w * apart, NULL, 1, T);
        splats_add(a, m->params, windows + w * apart, report_head, m);
        progress("splats", (double)(w + 1), (double)n);
    }
    return a;
}

/* ---------------------------------------------------------------------- tokens in context */

enum { BEFORE = 8, AFTER = 5, EACH = 2 }; /* tokens around one that is shown; how often one is shown at most */

/* The token at a place, from responsibilities r (N, S) of splat s. */
static Snippet snippet(const Tokenizer *t, const SplatStudy *a, const float *r, size_t s, size_t at) {
    size_t from = at > BEFORE ? at - BEFORE : 0, end = at + 1 + AFTER < a->N ? at + 1 + AFTER : a->N;
    Snippet out = {tokens_label(t, a->tokens + from, at - from), tokens_label(t, a->tokens + at, 1),
                   tokens_label(t, a->tokens + at + 1, end - at - 1), r[at * (size_t)a->config.S + s]};
    return out;
}

static void snippet_free(Snippet *s) {
    free(s->before);
    free(s->token);
    free(s->after);
}

/* What the splats of a report own in the text that was studied. */
static void report_meaning(Report *r, const Tokenizer *t, const SplatStudy *a) {
    size_t S = (size_t)a->config.S, slots = (size_t)config_gsa_heads(&a->config) * S, places[REPORT_SNIPPETS];
    r->bins = distance_bins(a->T, r->first);
    for (size_t i = 0; i < slots; i++) {
        double adds[DISTANCE_BINS];
        if (!r->facts[i].alive) continue;
        r->names[i] = splat_name(t, a, i / S, i % S);
        splat_offsets(a, i / S, i % S, r->first, r->bins, adds);
        for (size_t b = 0; b < r->bins; b++) r->adds[i * DISTANCE_BINS + b] = (float)adds[b];
        splat_partners(a, i / S, i % S, REPORT_PARTNERS, r->partners + i * REPORT_PARTNERS,
                       r->partner_shares + i * REPORT_PARTNERS);
        for (size_t side = 0; side < 2; side++) {
            const float *of = (side ? a->queries : a->keys) + i / S * a->room * S;
            size_t count = splat_places(of, a->tokens, a->N, S, i % S, EACH, REPORT_SNIPPETS, places);
            for (size_t n = 0; n < count; n++)
                r->snippets[(2 * i + side) * REPORT_SNIPPETS + n] = snippet(t, a, of, i % S, places[n]);
        }
    }
}

static void report_meaning_free(Report *r) {
    size_t slots = (size_t)config_gsa_heads(&r->config) * (size_t)r->config.S;
    for (size_t i = 0; i < slots * 2 * REPORT_SNIPPETS; i++) snippet_free(&r->snippets[i]);
    for (size_t i = 0; i < slots; i++) free(r->names[i]);
}

/* ---------------------------------------------------------------------- inspect --text */

static void print_snippets(const char *title, const Tokenizer *t, const SplatStudy *a, const float *r, size_t s,
                           size_t show) {
    size_t *places = (size_t *)xmalloc((show + 1) * sizeof *places), S = (size_t)a->config.S,
           count = splat_places(r, a->tokens, a->N, S, s, EACH, show, places);
    if (count) printf("  %s\n", title);
    for (size_t i = 0; i < count; i++) {
        Snippet one = snippet(t, a, r, s, places[i]);
        printf("    %4.0f %% %s[%s]%s\n", 100 * (double)one.share, one.before, one.token, one.after);
        snippet_free(&one);
    }
    free(places);
}

/* The distances in a window of T tokens at which the wave cos(theta n - psi) of splat i is largest. */
static void print_envelope(const GSA *m, size_t i, size_t T) {
    if (m->p.log_theta) {
        double theta = exp((double)m->p.log_theta[i]), psi = m->p.psi ? (double)m->p.psi[i] : 0,
               turn = 6.283185307179586 / theta, peak = psi / theta, end = (double)T - 0.5, least = 1, most = -1;
        for (size_t n = 0; n < T; n++) {
            least = fmin(least, cos(theta * (double)n - psi));
            most = fmax(most, cos(theta * (double)n - psi));
        }
        if (peak < -0.5) peak += turn; /* one nearer to 0 than to any other distance is at 0 */
        printf("  a turn of %.1f tokens favours ", turn);
        if (most - least < 0.1) printf("no distance: its cosine is %.2f to %.2f in a window\n", least, most);
        else if (peak < end) {
            for (int n = 0; n < 5 && peak < end; n++) {
                printf("%s%.0f", n ? ", " : "distances ", fmax(peak, 0));
                peak += turn;
            }
            printf(peak < end ? " ...\n" : "\n");
        } else if (cos(psi) >= most) printf("the shortest distances\n");
        else printf("the longest distances: it is largest at %.0f\n", peak);
    }
    if (m->p.log_delta) printf("  half of it is left after %.1f tokens\n", log(2) / exp((double)m->p.log_delta[i]));
}

static void print_partners(const SplatStudy *a, size_t g, size_t s) {
    int splats[REPORT_PARTNERS];
    float shares[REPORT_PARTNERS];
    size_t count = splat_partners(a, g, s, REPORT_PARTNERS, splats, shares);
    printf("  its queries attend to keys of splats");
    for (size_t i = 0; i < count; i++) printf("%s %d (%.0f %%)", i ? "," : "", splats[i], 100 * (double)shares[i]);
    printf("\n");
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

/* The splats on the first tokens of a text or shard. */
static SplatStudy *study_text(GSA *m, const Tokenizer *t, const char *path, size_t tokens) {
    size_t T = (size_t)m->config.T;
    int *text = (int *)xmalloc((tokens + 1) * sizeof *text);
    TokenSource *source = source_open(path, t);
    size_t count = source_read(source, text, tokens);
    source_close(source);
    if (count < 1) die("%s holds no text to look at", input_name(path));
    if (T > count) T = count;
    SplatStudy *a = study_splats(m, text, count / T, T, T, true);
    free(text);
    return a;
}

/* heads: masks by layer of those that are shown */
static void inspect_text(GSA *m, const Tokenizer *t, const Options *o, const uint64_t heads[MAX_LAYERS]) {
    const Config *c = &m->config;
    SplatStudy *a = study_text(m, t, o->text, (size_t)o->tokens);
    printf("%zu tokens of %s in windows of %zu; snippets with the share that the splat has of the [token]\n", a->N,
           input_name(o->text), a->T);
    for (int i = 0; i < c->L * config_heads(c); i++) {
        int l = i / config_heads(c), h = i % config_heads(c);
        if (!config_is_gsa(c, l, h) || !(heads[l] >> h & 1)) continue;
        for (size_t s = 0; s < (size_t)c->S; s++)
            if (m->p.alive[(size_t)config_gsa_before(c, l, h) * (size_t)c->S + s] > 0)
                print_meaning(m, t, a, l, h, s, (size_t)o->show);
    }
    splats_close(a);
}

/* ---------------------------------------------------------------------- measure --classes */

enum { CLASS_TOKENS = 16384, SHUFFLES = 200 };

/* Queries or keys (heads, N, HS) of all heads on windows (n, T + 1). */
static float *all_points(GSA *m, const int *windows, size_t n, int part) {
    const Config *c = &m->config;
    size_t T = (size_t)c->T, HS = (size_t)config_head_size(c), heads = (size_t)c->L * (size_t)config_heads(c);
    float *x = (float *)xmalloc(heads * n * T * HS * sizeof *x);
    for (size_t w = 0; w < n; w++) {
        gsa_forward(m, windows + w * (T + 1), NULL, 1, T);
        for (size_t i = 0; i < heads; i++)
            report_head(m, (int)(i / (size_t)config_heads(c)), (int)(i % (size_t)config_heads(c)), part,
                        x + (i * n + w) * T * HS);
    }
    return x;
}

/* cluster (N): k-means of x (N, d) on the unit sphere, as far as start_kmeans goes */
static void k_means(const float *x, size_t N, size_t d, int K, int *cluster) {
    float *centre = (float *)xmalloc((size_t)K * d * sizeof *centre);
    start_kmeans(centre, K, x, N, (int)d, 1);
    nearest_centres(cluster, centre, K, x, N, (int)d);
    free(centre);
}

/* What an assignment of the N tokens to K groups says about their classes, in nats. */
typedef struct {
    double heads, groups, known; /* how many heads; the mean of exp(entropy) of their groups; of the information */
} Purity;

static void add_purity(Purity *p, const int *group, int K, const int *classes, int count, size_t N) {
    double entropy = mutual_information(group, (size_t)K, group, (size_t)K, N);
    double known = mutual_information(group, (size_t)K, classes, (size_t)count, N);
#pragma omp critical
    {
        p->groups = (p->groups * p->heads + exp(entropy)) / (p->heads + 1);
        p->known = (p->known * p->heads + known) / (p->heads + 1);
        p->heads++;
    }
}

enum { BY_SPLATS, BY_OWN_KMEANS, BY_KMEANS, BY_UNTRAINED, BY_UNTRAINED_KMEANS, BY_CHANCE, ASSIGNMENTS };

/* The same of K-means of the keys or queries x (heads, N, HS) of a model's standard heads in layer l. */
static void standard_purity(Purity *purity, const Config *c, int l, int K, const float *x, const int *classes,
                            int count, size_t N) {
    size_t HS = (size_t)config_head_size(c);
    int heads = config_heads(c);
#pragma omp parallel for schedule(dynamic)
    for (int h = 0; h < heads; h++) {
        if (config_is_gsa(c, l, h)) continue;
        int *group = (int *)xmalloc(N * sizeof *group);
        k_means(x + (size_t)(l * heads + h) * N * HS, N, HS, K, group);
        add_purity(purity, group, K, classes, count, N);
        free(group);
    }
}

/* purity (ASSIGNMENTS) of layer l: its splats and k-means of their keys, of the model and of an untrained one. r (G, N,
   S), x (heads, N, HS) of both models */
static void layer_purity(Purity purity[ASSIGNMENTS], const GSA *m, int l, const float *const r[2],
                         const float *const x[2], const int *classes, int count, size_t N) {
    const Config *c = &m->config;
    size_t S = (size_t)c->S, HS = (size_t)config_head_size(c);
    int heads = config_heads(c);
#pragma omp parallel for schedule(dynamic)
    for (int i = 0; i < 2 * heads; i++) {
        int h = i / 2, untrained = i % 2, *group = (int *)xmalloc(N * sizeof *group);
        if (config_is_gsa(c, l, h)) {
            strongest_splats(r[untrained] + (size_t)config_gsa_before(c, l, h) * N * S, N, S, group);
            add_purity(&purity[untrained ? BY_UNTRAINED : BY_SPLATS], group, c->S, classes, count, N);
            if (!untrained) {
                double chance = shuffled_information(group, S, classes, (size_t)count, N, 5, 1);
#pragma omp critical
                {
                    Purity *p = &purity[BY_CHANCE];
                    p->known = (p->known * p->heads + chance) / (p->heads + 1);
                    p->heads++;
                }
            }
            k_means(x[untrained] + (size_t)(l * heads + h) * N * HS, N, HS, c->S, group);
            add_purity(&purity[untrained ? BY_UNTRAINED_KMEANS : BY_OWN_KMEANS], group, c->S, classes, count, N);
        }
        free(group);
    }
}

static void print_purity(const char *name, const char *side, const Purity purity[ASSIGNMENTS]) {
    printf("%5s %-8s", name, side);
    for (int i = 0; i < ASSIGNMENTS; i++)
        if (purity[i].heads == 0) printf("%14s", "-");
        else if (i == BY_CHANCE) printf("%14.4f", purity[i].known);
        else printf("%7.3f (%4.1f)", purity[i].known, purity[i].groups);
    printf("\n");
}

/* The table of what the strongest splat of a token says about the token's class. twin: a model whose standard heads
   stand for this one's, or NULL. windows (n, T + 1), classes (n T) */
static void measure_purity(GSA *m, GSA *twin, const int *windows, size_t n, const int *classes, int count) {
    const Config *c = &m->config;
    size_t T = (size_t)c->T, N = n * T;
    GSA *start = gsa_create(c, 1);
    model_start(c, start->params, 1);
    SplatStudy *study[2] = {study_splats(m, windows, n, T, T + 1, false),
                            study_splats(start, windows, n, T, T + 1, false)};
    double entropy = mutual_information(classes, (size_t)count, classes, (size_t)count, N);
    printf(
        "\nwhat a token's strongest splat says about its class, in nats of %.3f; means of heads; in brackets how many "
        "groups would be as even\n"
        "layer side            splats  k-means there  k-means else     untrained untrained k-m.        chance\n",
        entropy);
    for (int part = 1; part >= 0; part--) {
        const float *r[2], *x[2];
        Purity mean[ASSIGNMENTS] = {{0, 0, 0}};
        for (int u = 0; u < 2; u++) {
            r[u] = part ? study[u]->keys : study[u]->queries;
            x[u] = all_points(u ? start : m, windows, n, part);
        }
        const float *of_twin = twin ? all_points(twin, windows, n, part) : NULL;
        for (int l = 0; l < c->L; l++) {
            Purity purity[ASSIGNMENTS] = {{0, 0, 0}};
            if (!c->gsa_heads[l]) continue;
            layer_purity(purity, m, l, r, x, classes, count, N);
            standard_purity(&purity[BY_KMEANS], twin ? &twin->config : c, l, c->S, twin ? of_twin : x[0], classes,
                            count, N);
            char name[8];
            snprintf(name, sizeof name, "%d", l);
            print_purity(name, part ? "keys" : "queries", purity);
            for (int i = 0; i < ASSIGNMENTS; i++) {
                double heads = mean[i].heads + purity[i].heads;
                if (!purity[i].heads) continue;
                mean[i].groups = (mean[i].groups * mean[i].heads + purity[i].groups * purity[i].heads) / heads;
                mean[i].known = (mean[i].known * mean[i].heads + purity[i].known * purity[i].heads) / heads;
                mean[i].heads = heads;
            }
            progress("purity", (1 - part) * c->L + l + 1, 2 * c->L);
        }
        print_purity("all", part ? "keys" : "queries", mean);
        for (int u = 0; u < 2; u++) free((void *)x[u]);
        free((void *)of_twin);
    }
    for (int u = 0; u < 2; u++) splats_close(study[u]);
    gsa_destroy(start);
}

/* ---------------------------------------------------------------------- measure --silence */

/* What silencing does to tokens as targets: of each kind of token that is met often enough its class, its loss and,
   for each splat, how much larger the loss is without it. */
enum { OFTEN = 5, FEW_KINDS = 3 };
typedef struct {
    size_t kinds, splats;
    int *class_of, *shuffled; /* (kinds) */
    double *count, *loss;     /* (kinds) */
    double *more;             /* (splats, kinds): mean */
} Silence;

/* Student's t of class k against the rest, each kind of token counting once: how many deviations its mean is above
   theirs. NaN where either has fewer than FEW_KINDS. */
static double selectivity(const Silence *a, const double *more, const int *class_of, int k) {
    double n[2] = {0, 0}, sum[2] = {0, 0}, square = 0, all = (double)a->kinds;
    for (size_t v = 0; v < a->kinds; v++) {
        n[class_of[v] == k]++;
        sum[class_of[v] == k] += more[v];
        square += more[v] * more[v];
    }
    if (n[0] < FEW_KINDS || n[1] < FEW_KINDS) return NAN;
    double mean = (sum[0] + sum[1]) / all, variance = square / all - mean * mean;
    return variance > 0 ? (sum[1] / n[1] - sum[0] / n[0]) / sqrt(variance * (1 / n[1] + 1 / n[0])) : 0;
}

/* The losses (N) of the batches with every splat in its turn silenced, into a->more. Only blocks from the splat's layer
   on are computed anew; so the last layer comes first. kind (N): of each target, or -1 */
static void silence_each(GSA *m, Silence *a, const int *windows, size_t n, const int *kind) {
    const Config *c = &m->config;
    size_t T = (size_t)c->T, S = (size_t)c->S, done = 0;
    int *x = (int *)xmalloc(2 * m->B * T * sizeof *x), *y = x + m->B * T;
    float *base = (float *)xmalloc(m->B * T * sizeof *base);
    for (size_t w = 0; w < n;) {
        size_t B = n - w < m->B ? n - w : m->B, N = B * T;
        for (size_t i = 0; i < N; i++) {
            x[i] = windows[(w + i / T) * (T + 1) + i % T];
            y[i] = windows[(w + i / T) * (T + 1) + i % T + 1];
        }
        gsa_forward(m, x, y, B, T);
        memcpy(base, m->a.losses, N * sizeof *base);
        for (size_t i = 0; i < N; i++)
            if (kind[w * T + i] >= 0) a->loss[kind[w * T + i]] += (double)base[i] / a->count[kind[w * T + i]];
        for (int l = c->L - 1; l >= 0; l--)
            for (int h = 0; h < config_heads(c); h++)
                for (size_t s = 0; s < S && config_is_gsa(c, l, h); s++) {
                    size_t at = (size_t)config_gsa_before(c, l, h) * S + s;
                    double *more = a->more + at * a->kinds;
                    if (!(m->p.alive[at] > 0)) continue;
                    m->p.alive[at] = 0;
                    forward_from(m, (size_t)l, B, T);
                    classifier_forward(m->a.losses, m->a.lse, m->a.logits, m->y, N, (size_t)c->V, (size_t)c->Vp);
                    m->p.alive[at] = 1;
                    for (size_t i = 0; i < N; i++) {
                        int v = kind[w * T + i];
                        if (v >= 0) more[v] += ((double)m->a.losses[i] - (double)base[i]) / a->count[v];
                    }
                    progress("silence", (double)++done, (double)(a->splats * ((n + m->B - 1) / m->B)));
                }
        w += B;
    }
    free(x);
    free(base);
}

/* The kinds of tokens that targets y (N) are of, and of each the class that most of its places have. kind (N) */
static Silence *open_silence(const Config *c, const int *y, const int *classes, size_t N, int *kind) {
    Silence *a = (Silence *)xcalloc(1, sizeof *a);
    size_t V = (size_t)c->Vp;
    double *votes = (double *)xcalloc(V * (MAX_CLASSES + 1), sizeof *votes), *seen = votes + V * MAX_CLASSES;
    int *index = (int *)xmalloc(V * sizeof *index);
    a->splats = (size_t)config_gsa_heads(c) * (size_t)c->S;
    for (size_t i = 0; i < N; i++) {
        votes[(size_t)y[i] * MAX_CLASSES + (size_t)classes[i]]++;
        seen[y[i]]++;
    }
    for (size_t v = 0; v < V; v++) index[v] = seen[v] >= OFTEN ? (int)a->kinds++ : -1;
    a->class_of = (int *)xcalloc(2 * a->kinds + 1, sizeof *a->class_of);
    a->shuffled = a->class_of + a->kinds;
    a->count = (double *)xcalloc((2 + a->splats) * a->kinds + 1, sizeof *a->count);
    a->loss = a->count + a->kinds;
    a->more = a->loss + a->kinds;
    for (size_t v = 0; v < V; v++) {
        if (index[v] < 0) continue;
        for (int k = 1; k < MAX_CLASSES; k++)
            if (votes[v * MAX_CLASSES + (size_t)k] > votes[v * MAX_CLASSES + (size_t)a->class_of[index[v]]])
                a->class_of[index[v]] = k;
        a->count[index[v]] = seen[v];
    }
    for (size_t i = 0; i < N; i++) kind[i] = index[y[i]];
    free(votes);
    free(index);
    return a;
}

typedef struct {
    double t;
    size_t splat;
    int class_of;
} Effect;

static int by_selectivity(const void *x, const void *y) {
    double a = ((const Effect *)x)->t, b = ((const Effect *)y)->t;
    return a < b ? 1 : a > b ? -1 : 0;
}

/* The most selective class of each splat with these classes of kinds, into effect (splats); returns the largest t. */
static double all_effects(const Silence *a, const int *class_of, int classes, Effect *effect) {
    double largest = 0;
#pragma omp parallel for reduction(max : largest)
    for (size_t s = 0; s < a->splats; s++) {
        Effect best = {0, s, 0};
        for (int k = 0; k < classes; k++) {
            double t = selectivity(a, a->more + s * a->kinds, class_of, k);
            if (t > best.t) {
                best.t = t;
                best.class_of = k;
            }
        }
        effect[s] = best;
        largest = fmax(largest, best.t);
    }
    return largest;
}

static void print_effect(const Config *c, const Silence *a, const Effect *e, const char *class_name, const char *name,
                         double chance) {
    double n[2] = {0, 0}, loss[2] = {0, 0}, more[2] = {0, 0};
    for (size_t v = 0; v < a->kinds; v++) { /* means over tokens, not over kinds of them */
        int in = a->class_of[v] == e->class_of;
        n[in] += a->count[v];
        loss[in] += a->count[v] * a->loss[v];
        more[in] += a->count[v] * a->more[e->splat * a->kinds + v];
    }
    int g = (int)(e->splat / (size_t)c->S), i = 0;
    while (!config_is_gsa(c, i / config_heads(c), i % config_heads(c)) ||
           config_gsa_before(c, i / config_heads(c), i % config_heads(c)) != g)
        i++;
    char *place = xasprintf("%d:%d:%zu", i / config_heads(c), i % config_heads(c), e->splat % (size_t)c->S);
    printf("%-8s %-13s %8.4f %+9.4f %8.4f %+9.4f %6.2f %7.3f  %s\n", place, class_name, loss[1] / n[1], more[1] / n[1],
           loss[0] / n[0], more[0] / n[0], e->t, chance, name);
    free(place);
}

/* The ten splats whose silence makes one class suffer most beside the rest, and how often chance does as much. windows
   (n, T + 1), classes (n T) of the targets */
static void measure_silence(GSA *m, const Tokenizer *t, const int *windows, size_t n, const int *classes,
                            const char *const *names, int count) {
    const Config *c = &m->config;
    size_t T = (size_t)c->T, N = n * T;
    int *kind = (int *)xmalloc(2 * N * sizeof *kind), *y = kind + N;
    for (size_t i = 0; i < N; i++) y[i] = windows[i / T * (T + 1) + i % T + 1];
    Silence *a = open_silence(c, y, classes, N, kind);
    silence_each(m, a, windows, n, kind);
    Effect *effect = (Effect *)xmalloc(2 * a->splats * sizeof *effect), *by_chance = effect + a->splats;
    double largest[SHUFFLES];
    uint64_t rng = 1;
    all_effects(a, a->class_of, count, effect);
    memcpy(a->shuffled, a->class_of, a->kinds * sizeof *a->shuffled);
    for (int round = 0; round < SHUFFLES; round++) {
        for (size_t i = a->kinds; i > 1; i--) {
            size_t other = (size_t)rng_below(&rng, i);
            int was = a->shuffled[i - 1];
            a->shuffled[i - 1] = a->shuffled[other];
            a->shuffled[other] = was;
        }
        largest[round] = all_effects(a, a->shuffled, count, by_chance);
        progress("chance", round + 1, SHUFFLES);
    }
    qsort(effect, a->splats, sizeof *effect, by_selectivity);
    size_t alive = 0, beyond = 0;
    SplatStudy *study = study_splats(m, windows, n < 16 ? n : 16, T, T + 1, false);
    printf(
        "\nthe splats whose silence makes one class of targets suffer most beside the rest: losses in nats and what "
        "they grow by; t: of the means\n"
        "over %zu tokens that occur %d times or more, each counted once; chance: the share of %d shuffles of their "
        "classes, this text counted\n"
        "with them, in which the largest t of all splats and classes is as large; the splat's typical tokens as keys\n"
        "splat    class             loss    grows the rest    grows      t  chance  typical\n",
        a->kinds, OFTEN, SHUFFLES);
    for (size_t i = 0; i < a->splats; i++) {
        int as_large = 0;
        for (int round = 0; round < SHUFFLES; round++) as_large += largest[round] >= effect[i].t;
        double chance = (as_large + 1.0) / (SHUFFLES + 1); /* the text as it is counts as one of the shuffles */
        beyond += chance <= 0.05;
        alive += m->p.alive[effect[i].splat] > 0;
        if (i >= 10 || !(effect[i].t > 0)) continue; /* a text may have too few kinds of tokens for any effect */
        char *name = splat_name(t, study, effect[i].splat / (size_t)c->S, effect[i].splat % (size_t)c->S);
        print_effect(c, a, &effect[i], names[effect[i].class_of], name, chance);
        free(name);
    }
    printf("%zu of %zu splats have an effect that chance reaches in at most 5 %% of the shuffles\n", beyond, alive);
    splats_close(study);
    free(a->class_of);
    free(a->count);
    free(a);
    free(effect);
    free(kind);
}

/* The model of --twin, or one without a model: it reads the same tokens in windows as long, and has every layer. */
static Loaded open_twin(const Options *o, const Config *c, const char *path) {
    Loaded twin = {0};
    if (!o->twin) return twin;
    twin = load(o->twin, o->tokenizer, 1, OBJECTIVE_LM);
    const Config *t = &twin.model->config;
    if (t->T != c->T || t->V != c->V || t->L < c->L)
        die("--twin: %s has %d layers, %d tokens of context and a vocabulary of %d, and %s has %d, %d and %d; a twin "
            "is trained with the same flags but --attention",
            o->twin, t->L, t->T, t->V, path, c->L, c->T, c->V);
    if (config_standard_before(t, t->L, 0) == 0) die("--twin: %s has no standard heads to compare with", o->twin);
    return twin;
}

/* What measure --classes adds; twin: see measure_purity; windows (n, T + 1) of a text, one after the other. */
static void measure_classes(GSA *m, GSA *twin, const Tokenizer *t, const Options *o, const int *windows, size_t n) {
    const Config *c = &m->config;
    size_t T = (size_t)c->T;
    int kind = choice_index(CLASSES_CHOICES, o->classes), count;
    if (n > CLASS_TOKENS / T + 1) n = CLASS_TOKENS / T + 1;
    int *text = (int *)xmalloc(2 * (n * T + 1) * sizeof *text), *classes = text + n * T + 1;
    for (size_t i = 0; i <= n * T; i++)
        text[i] = i < n * T ? windows[i / T * (T + 1) + i % T] : windows[n * (T + 1) - 1];
    const char *const *names = token_classes(kind, t, text, n * T + 1, classes, &count);
    printf("\nclasses of %zu tokens:", n * T);
    for (int k = 0; k < count; k++) {
        double share = 0;
        for (size_t i = 0; i < n * T; i++) share += classes[i] == k;
        if (share == (double)(n * T))
            die("--classes %s: all of the %zu tokens looked at are of one class, '%s'; take another text, or more of "
                "it",
                o->classes, n * T, names[k]);
        printf("%s %s %.1f %%", k ? "," : "", names[k], 100 * share / (double)(n * T));
    }
    printf("\n");
    measure_purity(m, twin, windows, n, classes, count);
    if (o->silence) measure_silence(m, t, windows, n, classes + 1, names, count);
    free(text);
}

#endif
