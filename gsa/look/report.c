#include "report.h"

#include <math.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

/* The page without its data: the bytes of gsa/look/report.html as numbers, written by the Makefile. The data stand
   where the mark does. */
static const unsigned char page_bytes[] = {
#include "report_page.h"
    0};
static const char mark[] = "{\"data\":0}";

/* ---------------------------------------------------------------------- the arrays */

/* The plane in which keys (T, d) are shown, its mean and the share of their variance along each direction: that of
   their first two principal components; of a head with splats that of the mean keys of each splat's own tokens, in
   which these lie farthest apart. r (T, S): responsibilities, or NULL */
static void key_plane(const float *keys, size_t T, size_t d, const float *r, size_t S, float *mean, float *plane,
                      double share[2]) {
    if (!r) {
        principal_plane(keys, (int)T, (int)d, mean, plane, share);
        return;
    }
    int *owner = (int *)xmalloc(T * sizeof *owner);
    double *sum = (double *)xcalloc(S * (d + 1), sizeof *sum), total = 0, along[2] = {0, 0};
    float *means = (float *)xmalloc(T * d * sizeof *means);
    strongest_splats(r, T, S, owner);
    for (size_t t = 0; t < T; t++) {
        double *own = sum + (size_t)owner[t] * (d + 1);
        for (size_t e = 0; e < d; e++) own[e] += (double)keys[t * d + e];
        own[d]++;
    }
    for (size_t n = 0; n < T * d; n++) {
        const double *own = sum + (size_t)owner[n / d] * (d + 1);
        means[n] = (float)(own[n % d] / own[d]);
    }
    principal_plane(means, (int)T, (int)d, mean, plane, share);
    for (size_t t = 0; t < T; t++) {
        double at[2] = {0, 0};
        for (size_t e = 0; e < d; e++) {
            double x = (double)keys[t * d + e] - (double)mean[e];
            total += x * x;
            at[0] += x * (double)plane[e];
            at[1] += x * (double)plane[d + e];
        }
        for (int axis = 0; axis < 2; axis++) along[axis] += at[axis] * at[axis];
    }
    for (int axis = 0; axis < 2; axis++) share[axis] = total > 0 ? along[axis] / total : 0;
    free(owner);
    free(sum);
    free(means);
}

/* Head i = l NH + h: its weights, its keys in their plane, and its splats. */
static void gather_head(Report *r, const float *params, size_t i,
                        void (*read)(void *model, int l, int h, int part, float *out), void *model) {
    const Config *c = &r->config;
    size_t T = (size_t)r->T, d = (size_t)config_head_size(c), S = (size_t)c->S, NH = (size_t)config_heads(c);
    int l = (int)(i / NH), h = (int)(i % NH);
    float *q = (float *)xmalloc((2 * T * d + 3 * d + T) * sizeof *q), *k = q + T * d, *mean = k + T * d,
          *plane = mean + d, *log_forget = plane + 2 * d, *points = r->points + i * T * 2;
    /* weights of a query; responsibilities (T, S) */
    double *row = (double *)xmalloc(T * (S + 1) * sizeof *row), share[2];
    read(model, l, h, PART_QUERIES, q);
    read(model, l, h, PART_KEYS, k);
    if (config_is_gated(c, l, h)) read(model, l, h, PART_FORGET, log_forget);
    HeadWeights *w = head_weights_open(c, params, l, h, q, k, log_forget, T);
    for (size_t t = 0; t < T; t++) {
        head_weights_row(w, t, row);
        for (size_t j = 0; j < T; j++) r->weights[(i * T + t) * T + j] = (float)row[j];
    }
    head_weights_close(w);
    size_t g = (size_t)config_gsa_before(c, l, h);
    bool gsa = config_is_gsa(c, l, h);
    for (int side = 0; side < 2 && gsa; side++) {
        head_responsibilities(c, params, l, h, side ? k : q, T, row);
        for (size_t n = 0; n < T * S; n++) (side ? r->keys : r->queries)[g * T * S + n] = (float)row[n];
    }
    for (size_t t = 0; t < T && !c->raw; t++) { /* the space that splats live in, equation (1) */
        double square = 1e-6;
        for (size_t e = 0; e < d; e++) square += (double)k[t * d + e] * (double)k[t * d + e];
        for (size_t e = 0; e < d; e++) k[t * d + e] = (float)((double)k[t * d + e] / sqrt(square));
    }
    key_plane(k, T, d, gsa ? r->keys + g * T * S : NULL, S, mean, plane, share);
    r->share[2 * i] = (float)share[0];
    r->share[2 * i + 1] = (float)share[1];
    for (size_t n = 0; n < 2 * T; n++)
        for (size_t e = 0; e < d; e++) points[n] += (k[n / 2 * d + e] - mean[e]) * plane[n % 2 * d + e];
    if (gsa) {
        Tensor tensors[NUM_TENSORS];
        model_tensors(c, tensors);
        double largest = 0;
        for (size_t s = 0; s < S; s++) {
            PlaneSplat *e = &r->splats[g * S + s];
            SplatFacts *f = &r->facts[g * S + s];
            const float *mu = params + tensors[TENSOR_mu].offset + (g * S + s) * d;
            double covariance[3], square = 0, at[2] = {0, 0};
            for (size_t n = 0; n < d; n++) {
                square += (double)mu[n] * (double)mu[n];
                for (size_t axis = 0; axis < 2; axis++)
                    at[axis] += ((double)mu[n] - (double)mean[n]) * (double)plane[axis * d + n];
            }
            f->width = (float)sqrt(splat_covariance(c, params, g, s, plane, covariance) / (double)d);
            f->norm = (float)sqrt(square);
            plane_ellipse(covariance[0], covariance[1], covariance[2], e);
            e->x = (float)at[0];
            e->y = (float)at[1];
            e->slot = (int)s;
            f->alive = params[tensors[TENSOR_alive].offset + g * S + s] > 0;
            f->amplitude = (float)exp((double)params[tensors[TENSOR_log_alpha].offset + g * S + s]);
            if (tensors[TENSOR_log_theta].size)
                f->period =
                    (float)(6.283185307179586 / exp((double)params[tensors[TENSOR_log_theta].offset + g * S + s]));
            if (tensors[TENSOR_log_delta].size)
                f->half_life =
                    (float)(0.6931471805599453 / exp((double)params[tensors[TENSOR_log_delta].offset + g * S + s]));
            if (tensors[TENSOR_psi].size) f->phase = params[tensors[TENSOR_psi].offset + g * S + s];
            if (f->alive) largest = fmax(largest, (double)f->amplitude);
        }
        for (size_t s = 0; s < S; s++)
            r->splats[g * S + s].amplitude = (float)((double)r->facts[g * S + s].amplitude / largest);
    }
    free(q);
    free(row);
}

Report *report_create(const Config *c, const float *params, int T,
                      void (*read)(void *model, int l, int h, int part, float *out), void *model) {
    Report *r = (Report *)xcalloc(1, sizeof *r);
    size_t t = (size_t)T, heads = (size_t)c->L * (size_t)config_heads(c),
           slots = (size_t)config_gsa_heads(c) * (size_t)c->S;
    r->config = *c;
    r->T = T;
    r->tokens = (const char **)xcalloc(t * (1 + REPORT_GUESSES), sizeof *r->tokens);
    r->guess = r->tokens + t;
    r->loss = (float *)xcalloc(t * (1 + REPORT_GUESSES) + heads * (t * t + 2 * t + 2) + 2 * slots * t, sizeof *r->loss);
    r->guess_share = r->loss + t;
    r->weights = r->guess_share + t * REPORT_GUESSES;
    r->points = r->weights + heads * t * t;
    r->share = r->points + heads * t * 2;
    r->queries = r->share + heads * 2;
    r->keys = r->queries + slots * t;
    r->splats = (PlaneSplat *)xcalloc(slots + 1, sizeof *r->splats);
    r->facts = (SplatFacts *)xcalloc(slots + 1, sizeof *r->facts);
    r->names = (char **)xcalloc(slots + 1, sizeof *r->names);
    r->snippets = (Snippet *)xcalloc(slots * 2 * REPORT_SNIPPETS + 1, sizeof *r->snippets);
    r->adds = (float *)xcalloc(slots * (DISTANCE_BINS + REPORT_PARTNERS) + 1, sizeof *r->adds);
    r->partner_shares = r->adds + slots * DISTANCE_BINS;
    r->partners = (int *)xcalloc(slots * REPORT_PARTNERS + 1, sizeof *r->partners);
    r->measures = (HeadMeasure *)xmalloc(heads * sizeof *r->measures);
    measure_heads(c, params, t, read, model, r->measures);
    for (size_t i = 0; i < heads; i++) gather_head(r, params, i, read, model);
    return r;
}

void report_free(Report *r) {
    free(r->tokens);
    free(r->loss);
    free(r->splats);
    free(r->facts);
    free(r->measures);
    free(r->names);
    free(r->snippets);
    free(r->adds);
    free(r->partners);
    free(r);
}

/* Length of the UTF-8 character at s, or 0 where there is none. */
static size_t character(const unsigned char *s, size_t bytes) {
    size_t n = s[0] < 0x80                   ? 1
               : s[0] >= 0xC2 && s[0] < 0xE0 ? 2
               : s[0] >= 0xE0 && s[0] < 0xF0 ? 3
               : s[0] >= 0xF0 && s[0] < 0xF5 ? 4
                                             : 0;
    if (n == 0 || n > bytes) return 0;
    for (size_t i = 1; i < n; i++)
        if ((s[i] & 0xC0) != 0x80) return 0;
    /* too long a form; half of a pair */
    if (n == 3 && ((s[0] == 0xE0 && s[1] < 0xA0) || (s[0] == 0xED && s[1] >= 0xA0))) return 0;
    if (n == 4 && ((s[0] == 0xF0 && s[1] < 0x90) || (s[0] == 0xF4 && s[1] >= 0x90))) return 0;
    return n;
}

char *token_label(const char *piece, size_t bytes) {
    char *label = (char *)xmalloc(4 * bytes + 1), *out = label;
    for (size_t i = 0, n; i < bytes; i += n) {
        unsigned char letter = (unsigned char)piece[i];
        n = character((const unsigned char *)piece + i, bytes - i);
        if (letter == ' ' && (i == 0 || i + 1 == bytes)) {
            out += sprintf(out, "\xC2\xB7");
            n = 1;
        } else if (letter == '\n') out += sprintf(out, "\\n");
        else if (letter == '\t') out += sprintf(out, "\\t");
        else if (n == 0 || letter < 32 || letter == 127) {
            out += sprintf(out, "<%02X>", letter);
            n = 1;
        } else {
            memcpy(out, piece + i, n);
            out += n;
        }
    }
    *out = 0;
    return label;
}

/* ---------------------------------------------------------------------- kinds of heads */

static const char *const head_kinds[] = {"standard", "splats, softmax", "splats, linear",
                                         "extend: window, splats beyond"};

/* The kinds that a model has, in order: their names, and for each head the index of its own. */
static int kinds_of(const Config *c, const char **names, int *kind) {
    int index[4] = {-1, -1, -1, -1}, count = 0, NH = config_heads(c);
    for (int i = 0; i < c->L * NH; i++) {
        int k = config_head_kind(c, i / NH, i % NH);
        if (index[k] < 0) {
            names[count] = head_kinds[k];
            index[k] = count++;
        }
        kind[i] = index[k];
    }
    return count;
}

/* The living splats of GSA head g: their places in the plane and their slots; returns their number. */
static int living(const Report *r, int g, PlaneSplat *splats, int *slots) {
    int count = 0;
    for (int s = 0; s < r->config.S; s++)
        if (r->facts[g * r->config.S + s].alive) {
            slots[count] = s;
            splats[count++] = r->splats[g * r->config.S + s];
        }
    return count;
}

/* ---------------------------------------------------------------------- pictures */

static Canvas *heads_picture(const Report *r, HeadGrid *grid) {
    const char *names[4];
    int NH = config_heads(&r->config), *kind = (int *)xmalloc((size_t)(r->config.L * NH) * sizeof *kind),
        count = kinds_of(&r->config, names, kind);
    Canvas *c = picture_heads("Attention of all heads", r->weights, kind, names, count, r->config.L, NH, r->T, grid);
    free(kind);
    return c;
}

/* What the splats of GSA head (l, h) add by distance; returns the number of pictures. */
static int distances_picture(const Report *r, const char *folder, int l, int h, const int *slots, int alive) {
    size_t g = (size_t)config_gsa_before(&r->config, l, h), S = (size_t)r->config.S, bins = r->bins;
    if (!bins) return 0;
    float *adds = (float *)xmalloc((size_t)alive * bins * sizeof *adds);
    char title[128], **labels = (char **)xmalloc((size_t)alive * sizeof *labels);
    for (int s = 0; s < alive; s++) {
        size_t i = g * S + (size_t)slots[s];
        labels[s] = xasprintf("%d %s", slots[s], r->names[i] ? r->names[i] : "");
        memcpy(adds + (size_t)s * bins, r->adds + i * DISTANCE_BINS, bins * sizeof *adds);
    }
    bool logits = config_head_kind(&r->config, l, h) == HEAD_SPLAT;
    snprintf(title, sizeof title, "What splats add by distance: layer %d, head %d (%s)", l, h,
             logits ? "nats of logit" : "share of weight");
    char *path = xasprintf("%s/distances_%d_%d.png", folder, l, h);
    Canvas *c = picture_distances(title, adds, (const char *const *)labels, alive, r->first, (int)bins);
    canvas_write(c, path);
    canvas_free(c);
    free(path);
    for (int s = 0; s < alive; s++) free(labels[s]);
    free(labels);
    free(adds);
    return 1;
}

int report_pictures(const Report *r, const uint64_t heads[MAX_LAYERS], const char *folder) {
    int NH = config_heads(&r->config), S = r->config.S, T = r->T, count = 1,
        *slots = (int *)xmalloc((size_t)(S + T + 1) * sizeof *slots), *owner = slots + S;
    PlaneSplat *splats = (PlaneSplat *)xmalloc((size_t)(S + 1) * sizeof *splats);
    float *shares = (float *)xmalloc((size_t)T * (size_t)(S + 1) * sizeof *shares);
    make_folder(folder);
    HeadGrid grid;
    char *path = xasprintf("%s/heads.png", folder), title[128];
    Canvas *c = heads_picture(r, &grid);
    canvas_write(c, path);
    canvas_free(c);
    free(path);
    for (int i = 0; i < r->config.L * NH; i++) {
        int l = i / NH, h = i % NH, alive = 0, g = config_gsa_before(&r->config, l, h);
        if (!(heads[l] >> h & 1)) continue;
        const char *kind = head_kinds[config_head_kind(&r->config, l, h)];
        snprintf(title, sizeof title, "Attention: layer %d, head %d (%s)", l, h, kind);
        path = xasprintf("%s/attention_%d_%d.png", folder, l, h);
        c = picture_attention(title, r->weights + (size_t)i * (size_t)T * (size_t)T, r->tokens, T);
        canvas_write(c, path);
        canvas_free(c);
        free(path);
        if (config_is_gsa(&r->config, l, h)) alive = living(r, g, splats, slots);
        for (int t = 0; t < T; t++) {
            owner[t] = alive ? 0 : -1;
            for (int s = 0; s < alive; s++) {
                const float *own = r->keys + ((size_t)g * (size_t)T + (size_t)t) * (size_t)S;
                if (own[slots[s]] > own[slots[owner[t]]]) owner[t] = s;
                shares[t * alive + s] = r->queries[((size_t)g * (size_t)T + (size_t)t) * (size_t)S + (size_t)slots[s]];
            }
        }
        double share[2] = {r->share[2 * i], r->share[2 * i + 1]};
        snprintf(title, sizeof title, "%s: layer %d, head %d (%s)", alive ? "Splats and keys" : "Keys", l, h, kind);
        path = xasprintf("%s/splats_%d_%d.png", folder, l, h);
        c = picture_splats(title, splats, alive, r->points + (size_t)i * (size_t)T * 2, owner, r->tokens, T, share);
        canvas_write(c, path);
        canvas_free(c);
        free(path);
        count += 2;
        if (!alive) continue;
        snprintf(title, sizeof title, "Queries and splats: layer %d, head %d (%s)", l, h, kind);
        path = xasprintf("%s/responsibilities_%d_%d.png", folder, l, h);
        c = picture_responsibilities(title, shares, slots, alive, r->tokens, T);
        canvas_write(c, path);
        canvas_free(c);
        free(path);
        count += 1 + distances_picture(r, folder, l, h, slots, alive);
    }
    free(slots);
    free(splats);
    free(shares);
    return count;
}

/* ---------------------------------------------------------------------- the page */

typedef struct {
    FILE *f;
    const char *path;
} Page;

static void put(Page *p, const char *text) { xfwrite(text, 1, strlen(text), p->f, p->path); }

static void put_number(Page *p, double value, int decimals) {
    char text[64];
    /* JSON has no NaN, and an infinite number is one that is too large */
    if (isnan(value)) snprintf(text, sizeof text, "null");
    else if (isinf(value)) snprintf(text, sizeof text, value > 0 ? "1e999" : "-1e999");
    else snprintf(text, sizeof text, "%.*f", decimals, value);
    put(p, text);
}

/* A JSON string. '<' is written as a number, so that no text ends the script that the data stand in. */
static void put_string(Page *p, const char *s) {
    char escape[8];
    put(p, "\"");
    for (; *s; s++) {
        unsigned char letter = (unsigned char)*s;
        if (letter < 32 || letter == '"' || letter == '\\' || letter == '<')
            snprintf(escape, sizeof escape, "\\u%04x", letter);
        else {
            escape[0] = *s;
            escape[1] = 0;
        }
        put(p, escape);
    }
    put(p, "\"");
}

static void put_base64(Page *p, const uint8_t *bytes, size_t count) {
    static const char digits[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    char *text = (char *)xmalloc(count / 3 * 4 + 8), *out = text;
    for (size_t i = 0; i < count; i += 3) {
        uint32_t three = (uint32_t)bytes[i] << 16 | (i + 1 < count ? (uint32_t)bytes[i + 1] << 8 : 0) |
                         (i + 2 < count ? bytes[i + 2] : 0);
        for (int k = 0; k < 4; k++) *out++ = i + (size_t)k > count ? '=' : digits[three >> (18 - 6 * k) & 63];
    }
    *out = 0;
    put(p, text);
    free(text);
}

static uint8_t to_byte(double share) { return (uint8_t)(255 * fmin(fmax(share, 0), 1) + 0.5); }

static void put_picture(Page *p, Canvas *c) {
    size_t bytes;
    uint8_t *png = canvas_png(c, &bytes);
    put(p, "\"data:image/png;base64,");
    put_base64(p, png, bytes);
    put(p, "\"");
    free(png);
    canvas_free(c);
}

static void put_row(Page *p, const char *name, const char *format, ...) GSA_PRINTF(3, 4);
static void put_row(Page *p, const char *name, const char *format, ...) {
    char text[512];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    put(p, ",[");
    put_string(p, name);
    put(p, ",");
    put_string(p, text);
    put(p, "]");
}

static void put_model(Page *p, const Report *r) {
    const Config *c = &r->config;
    char attention[32], mixer[32], position[32], envelope[32], covariance[32];
    choice_name(ATTENTION_CHOICES, c->attention, attention, sizeof attention);
    choice_name(MIXER_CHOICES, c->mixer, mixer, sizeof mixer);
    choice_name(POSITION_CHOICES, c->position, position, sizeof position);
    choice_name(ENVELOPE_CHOICES, c->envelope, envelope, sizeof envelope);
    choice_name(COVARIANCE_CHOICES, c->covariance, covariance, sizeof covariance);
    int alive = 0, slots = config_gsa_heads(c) * c->S;
    for (int s = 0; s < slots; s++) alive += r->facts[s].alive;
    put(p, ",\n\"facts\":[[\"file\",");
    put_string(p, r->model);
    put(p, "]");
    put_row(p, "objective", "%s", c->objective == OBJECTIVE_MLM ? "masked tokens (encoder)" : "next token (decoder)");
    put_row(p, "steps of training", "%lld", (long long)r->step);
    put_row(p, "parameters", "%zu", model_parameters(c));
    put_row(p, "layers", "%d", c->L);
    if (c->extra)
        put_row(p, "heads in a layer", "%d standard and %d extra, of size %d", c->NH, c->extra, config_head_size(c));
    else put_row(p, "heads in a layer", "%d of size %d", c->NH, config_head_size(c));
    put_row(p, "channels", "%d", c->C);
    put_row(p, "context", "%d tokens", c->T);
    put_row(p, "vocabulary", "%d tokens", c->V);
    put_row(p, "positions", "%s", position);
    if (c->window) put_row(p, "window", "%d tokens", c->window);
    put_row(p, "attention", "%s", attention);
    if (!slots) return;
    put_row(p, "mixer of splats", "%s", mixer);
    put_row(p, "envelope", "%s", envelope);
    put_row(p, "covariance", "%s", covariance);
    put_row(p, "splats", "%d alive of %d slots, %d in each of %d heads", alive, slots, c->S, config_gsa_heads(c));
}

/* Of splat i its typical tokens, what it adds by distance, the tokens that it has most of and its partners. */
static void put_meaning(Page *p, const Report *r, int i) {
    put(p, "{\"name\":");
    put_string(p, r->names[i] ? r->names[i] : "");
    put(p, ",\"adds\":[");
    for (size_t b = 0; b < r->bins; b++) {
        put(p, b ? "," : "");
        put_number(p, r->adds[(size_t)i * DISTANCE_BINS + b], 4);
    }
    for (int side = 0; side < 2; side++) {
        const Snippet *own = r->snippets + (2 * i + side) * REPORT_SNIPPETS;
        put(p, side ? "],\"q\":[" : "],\"k\":[");
        for (int n = 0; n < REPORT_SNIPPETS && own[n].token; n++) {
            const char *const parts[3] = {own[n].before, own[n].token, own[n].after};
            put(p, n ? ",[" : "[");
            for (int k = 0; k < 3; k++) {
                put_string(p, parts[k]);
                put(p, ",");
            }
            put_number(p, own[n].share, 3);
            put(p, "]");
        }
    }
    put(p, "],\"with\":[");
    for (int n = i * REPORT_PARTNERS; n < (i + 1) * REPORT_PARTNERS && r->partner_shares[n] > 0; n++) {
        put(p, n > i * REPORT_PARTNERS ? ",[" : "[");
        put_number(p, r->partners[n], 0);
        put(p, ",");
        put_number(p, r->partner_shares[n], 3);
        put(p, "]");
    }
    put(p, "]}");
}

static void put_splats(Page *p, const Report *r, int g) {
    int S = r->config.S, T = r->T, count = 0, *slots = (int *)xmalloc((size_t)(S + 1) * sizeof *slots);
    PlaneSplat *splats = (PlaneSplat *)xmalloc((size_t)(S + 1) * sizeof *splats);
    uint8_t *shares = (uint8_t *)xmalloc((size_t)T * (size_t)S);
    count = living(r, g, splats, slots);
    put(p, "{\"splats\":[");
    /* slot, x, y, a, b, angle, relative amplitude, amplitude, width, period, half-life, |mu|, phase */
    for (int s = 0; s < count; s++) {
        const PlaneSplat *e = &splats[s];
        const SplatFacts *f = &r->facts[g * S + slots[s]];
        const double numbers[] = {slots[s],     e->x,     e->y,      e->a,         e->b,    e->angle, e->amplitude,
                                  f->amplitude, f->width, f->period, f->half_life, f->norm, f->phase};
        put(p, s ? ",[" : "[");
        for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++) {
            if (i) put(p, ",");
            put_number(p, numbers[i], i ? 4 : 0);
        }
        put(p, "]");
    }
    for (int k = 0; k < 2; k++) {
        const float *from = (k ? r->keys : r->queries) + (size_t)g * (size_t)T * (size_t)S;
        for (int t = 0; t < T; t++)
            for (int s = 0; s < count; s++) shares[t * count + s] = to_byte(sqrt(from[t * S + slots[s]]));
        put(p, k ? "\",\"k\":\"" : "],\"q\":\"");
        put_base64(p, shares, (size_t)(T * count));
    }
    put(p, "\",\"means\":[");
    for (int s = 0; s < count; s++) {
        put(p, s ? ",\n" : "");
        put_meaning(p, r, g * S + slots[s]);
    }
    put(p, "]}");
    free(slots);
    free(splats);
    free(shares);
}

/* The kinds of heads, and of each head its own. */
static void put_kinds(Page *p, const Report *r) {
    const char *names[4];
    int heads = r->config.L * config_heads(&r->config), *kind = (int *)xmalloc((size_t)heads * sizeof *kind),
        kinds = kinds_of(&r->config, names, kind);
    put(p, "],\n\"kinds\":[");
    for (int k = 0; k < kinds; k++) {
        put(p, k ? "," : "");
        put_string(p, names[k]);
    }
    put(p, "],\"kind\":[");
    for (int i = 0; i < heads; i++) {
        put(p, i ? "," : "");
        put_number(p, kind[i], 0);
    }
    free(kind);
}

/* The scale of shares in 256 steps, and the colours of slots. */
static void put_colours(Page *p) {
    char text[32];
    put(p, "],\n\"scale\":\"");
    for (int i = 0; i < 256; i++) {
        Colour c = colour_scale(i / 255.0);
        snprintf(text, sizeof text, "%02x%02x%02x", c.r, c.g, c.b);
        put(p, text);
    }
    put(p, "\",\"colours\":[");
    for (int i = 0; i < 7; i++) {
        Colour c = colour_of(i);
        snprintf(text, sizeof text, "%s\"#%02x%02x%02x\"", i ? "," : "", c.r, c.g, c.b);
        put(p, text);
    }
}

/* Of each token its text, its loss and the guesses for it. */
static void put_tokens(Page *p, const Report *r) {
    put(p, "],\n\"tokens\":[");
    for (int t = 0; t < r->T; t++) {
        put(p, t ? "," : "");
        put_string(p, r->tokens[t]);
    }
    put(p, "],\n\"loss\":[");
    for (int t = 0; t < r->T; t++) {
        put(p, t ? "," : "");
        put_number(p, r->loss[t], 3);
    }
    put(p, "],\n\"guess\":[");
    for (int i = 0; i < r->T * REPORT_GUESSES; i++) {
        put(p, i ? ",[" : "[");
        put_string(p, r->guess[i]);
        put(p, ",");
        put_number(p, r->guess_share[i], 4);
        put(p, "]");
    }
}

/* Of each head its weights: bytes 255 sqrt(w), row by row, up to the diagonal where the model is causal. */
static void put_weights(Page *p, const Report *r) {
    size_t T = (size_t)r->T, heads = (size_t)r->config.L * (size_t)config_heads(&r->config);
    bool causal = r->config.objective == OBJECTIVE_LM;
    uint8_t *bytes = (uint8_t *)xmalloc(T * T);
    put(p, "],\n\"weights\":[");
    for (size_t i = 0; i < heads; i++) {
        size_t count = 0;
        for (size_t q = 0; q < T; q++)
            for (size_t k = 0; k < (causal ? q + 1 : T); k++)
                bytes[count++] = to_byte(sqrt(r->weights[(i * T + q) * T + k]));
        put(p, i ? ",\n\"" : "\"");
        put_base64(p, bytes, count);
        put(p, "\"");
    }
    free(bytes);
}

/* Of each head its keys in their plane, its measures (entropy, distance, reach), the shares of variance, its splats. */
static void put_heads(Page *p, const Report *r) {
    const Config *c = &r->config;
    int T = r->T, NH = config_heads(c), heads = c->L * NH;
    put(p, "],\n\"points\":[");
    for (int i = 0; i < heads; i++) {
        put(p, i ? ",\n[" : "[");
        for (int k = 0; k < 2 * T; k++) {
            put(p, k ? "," : "");
            put_number(p, r->points[(size_t)i * (size_t)T * 2 + (size_t)k], 3);
        }
        put(p, "]");
    }
    put(p, "],\"measures\":[");
    for (int i = 0; i < heads; i++) {
        put(p, i ? ",[" : "[");
        put_number(p, r->measures[i].entropy, 3);
        put(p, ",");
        put_number(p, r->measures[i].distance, 2);
        put(p, ",");
        put_number(p, r->measures[i].reach, 0);
        put(p, "]");
    }
    put(p, "],\"share\":[");
    for (int i = 0; i < 2 * heads; i++) {
        put(p, i ? "," : "");
        put_number(p, r->share[i], 3);
    }
    put(p, "],\n\"splats\":[");
    for (int i = 0, g = 0; i < heads; i++) {
        put(p, i ? ",\n" : "");
        if (config_is_gsa(c, i / NH, i % NH)) put_splats(p, r, g++);
        else put(p, "null");
    }
    put(p, "],\"first\":[");
    for (size_t b = 0; b < r->bins; b++) {
        put(p, b ? "," : "");
        put_number(p, (double)r->first[b], 0);
    }
    put(p, "],\"nats\":[");
    for (int i = 0, any = 0; i < heads; i++) { /* heads whose splats add to logits */
        if (config_head_kind(c, i / NH, i % NH) != HEAD_SPLAT) continue;
        put(p, any++ ? "," : "");
        put_number(p, i, 0);
    }
}

/* The picture of all heads, with its grid, and those of the training. */
static void put_pictures(Page *p, const Report *r, const char *log) {
    char text[128];
    HeadGrid grid;
    put(p, "],\n\"overview\":");
    put_picture(p, heads_picture(r, &grid));
    snprintf(text, sizeof text, ",\"grid\":[%d,%d,%d,%d],\n\"training\":[", grid.left, grid.top, grid.pitch, grid.cell);
    put(p, text);
    bool losses = log && log_has_losses(log);
    if (log && !losses) warn("%s holds no losses: the page is written without their picture", log);
    if (losses) put_picture(p, picture_losses("Loss of the training", &log, NULL, 1, 0, 0));
    if (losses && log_has_adaptation(log)) {
        put(p, ",");
        put_picture(p, picture_adaptation(log));
    }
}

void report_write(const Report *r, const char *log, const char *path) {
    const char *report_page = (const char *)page_bytes, *at = strstr(report_page, mark);
    if (!at) die("this program was built from a gsa/look/report.html without the mark %s", mark);
    const Config *c = &r->config;
    char text[256];
    Page page = {create_file(path), path}, *p = &page;
    xfwrite(report_page, 1, (size_t)(at - report_page), p->f, path);
    snprintf(text, sizeof text, "{\"L\":%d,\"NH\":%d,\"T\":%d,\"causal\":%s,\"note\":", c->L, config_heads(c), r->T,
             c->objective == OBJECTIVE_LM ? "true" : "false");
    put(p, text);
    put_string(p, r->note ? r->note : "");
    put_model(p, r);
    put_kinds(p, r);
    put_colours(p);
    put_tokens(p, r);
    put_weights(p, r);
    put_heads(p, r);
    put_pictures(p, r, log);
    put(p, "]}");
    put(p, at + sizeof mark - 1);
    commit_file(p->f, path);
}
