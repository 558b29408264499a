#include "adapt.h"

#include "../flags.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

const char *const adapt_event_names[NUM_ADAPT_EVENTS] = {"death", "merge", "birth", "split", "move"};

/* ---------------------------------------------------------------------- --adapt-rules */

#define X(...) +1
enum { NUM_RULES = 0 ADAPT_RULES(X) };
#undef X

/* Each rule is read and written as a flag would be. */
typedef struct {
    Flag flags[NUM_RULES + 1]; /* the last stays empty and ends the list */
} RuleFlags;
static RuleFlags flags_of(AdaptRules *r) {
#define X(type, name, value, low, high, help) {FLAG_##type, #name, &r->name, low, high, NULL, help, false},
    RuleFlags all = {{ADAPT_RULES(X)}};
#undef X
    return all;
}

AdaptRules adapt_rules_default(void) {
    AdaptRules r;
    memset(&r, 0, sizeof r);
#define X(type, name, value, ...) r.name = value;
    ADAPT_RULES(X)
#undef X
    return r;
}

bool adapt_is_rule(const char *name) {
    AdaptRules any;
    RuleFlags all = flags_of(&any);
    return find_flag(all.flags, name) != NULL;
}

char *adapt_rules_read(AdaptRules *rules, const char *text) {
    RuleFlags all = flags_of(rules);
    char *copy = xstrdup(text), *wrong = NULL;
    for (char *word = copy, *next; word && !wrong; word = next) {
        char error[256], *value = NULL;
        next = strchr(word, ',');
        if (next) *next++ = 0;
        size_t n = strcspn(word, "=");
        if (word[n]) value = word + n + 1;
        word[n] = 0;
        Flag *f = find_flag(all.flags, word);
        if (!f) wrong = xasprintf("there is no rule '%.40s'", word);
        else if (f->given) wrong = xasprintf("%s is given twice", word);
        else if (!value) wrong = xasprintf("%s has no value", word);
        else if (!set_flag(f, value, error)) wrong = xstrdup(error + strlen("--"));
        else f->given = true;
    }
    free(copy);
    if (!wrong) return NULL;
#define X(type, name, ...) " " #name
    char *sentence = xasprintf(
        "--adapt-rules %.80s: %s; give NAME=VALUE pairs with commas between them, each name once:" ADAPT_RULES(X), text,
        wrong);
#undef X
    free(wrong);
    return sentence;
}

char *adapt_rules_text(const AdaptRules *rules) {
    AdaptRules copy = *rules;
    RuleFlags all = flags_of(&copy);
    char *text = xstrdup("");
    for (int i = 0; i < NUM_RULES; i++) {
        char *value = flag_text(&all.flags[i]);
        char *longer = xasprintf("%s%s%s=%s", text, i ? "," : "", all.flags[i].name, value);
        free(value);
        free(text);
        text = longer;
    }
    return text;
}

/* ---------------------------------------------------------------------- one head's slots */

/* The rows of a slot: what the tensors of splats hold of it, in the order of SPLAT_TENSORS. The last of these, log_far,
   is a number of the head and belongs to no slot. */
#define ROW(tensor) (TENSOR_##tensor - TENSOR_mu)
enum {
    MU = ROW(mu),
    LOG_PRECISION = ROW(log_precision),
    LOG_ALPHA = ROW(log_alpha),
    LOG_REFERENCE = ROW(log_alpha_reference),
    ALIVE = ROW(alive),
    LOG_THETA = ROW(log_theta),
    LOG_DELTA = ROW(log_delta),
    PSI = ROW(psi),
    NUM_ROWS = ROW(log_far)
};

typedef struct {
    float *rows[NUM_ROWS]; /* row i of slot s: rows[i] + s * width[i]; NULL: the model has no such tensor */
    size_t width[NUM_ROWS], S;
} Slots;

static Slots slots_of(const Config *c, int g, float *splats) {
    Tensor tensors[NUM_TENSORS];
    Slots h;
    model_tensors(c, tensors);
    h.S = (size_t)c->S;
    for (int i = 0; i < NUM_ROWS; i++) {
        const Tensor *t = &tensors[TENSOR_mu + i];
        h.width[i] = (size_t)t->shape[2];
        h.rows[i] = t->size ? splats + (t->offset - tensors[TENSOR_mu].offset) + (size_t)g * h.S * h.width[i] : NULL;
    }
    return h;
}

static inline bool is_alive(const Slots *h, size_t s) { return h->rows[ALIVE][s] > 0; }

static int count_alive(const Slots *h) {
    int count = 0;
    for (size_t s = 0; s < h->S; s++) count += is_alive(h, s);
    return count;
}

int adapt_alive(const Config *c, int g, const float *splats) {
    Slots h = slots_of(c, g, (float *)splats);
    return count_alive(&h);
}

double adapt_log_response(const Config *c, const float *mu, const float *log_precision, const float *x) {
    int d = config_head_size(c);
    float sum = 0;
    if (c->covariance == COVARIANCE_ISO) {
#pragma omp simd reduction(+ : sum)
        for (int k = 0; k < d; k++) sum += (x[k] - mu[k]) * (x[k] - mu[k]);
        return -0.5 * exp((double)log_precision[0]) * (double)sum;
    }
    if (c->covariance == COVARIANCE_DIAG) {
        for (int k = 0; k < d; k++) sum += expf(log_precision[k]) * (x[k] - mu[k]) * (x[k] - mu[k]);
        return -0.5 * (double)sum;
    }
    for (int k = 0; k < d; k++) { /* |L^T (x - mu)|^2, column k of L; its diagonal as logarithms */
        float along = expf(log_precision[k * (k + 1) / 2 + k]) * (x[k] - mu[k]);
        for (int i = k + 1; i < d; i++) along += log_precision[i * (i + 1) / 2 + k] * (x[i] - mu[i]);
        sum += along * along;
    }
    return -0.5 * (double)sum;
}

/* out (n, S) = ln phi_s(x) for x (n, HS); minus infinity for dead splats */
static void responses(const Config *c, const Slots *h, const float *x, size_t n, double *out) {
    size_t d = (size_t)config_head_size(c);
    for (size_t i = 0; i < n; i++)
        for (size_t s = 0; s < h->S; s++)
            out[i * h->S + s] =
                is_alive(h, s) ? adapt_log_response(c, h->rows[MU] + s * d,
                                                    h->rows[LOG_PRECISION] + s * h->width[LOG_PRECISION], x + i * d)
                               : -INFINITY;
}

/* ln sum_s exp(l_s) of l (S). weights (S), or NULL: each one's share of that sum, its responsibility. */
static double log_sum(const double *l, size_t S, double *weights) {
    double most = -INFINITY, sum = 0;
    for (size_t s = 0; s < S; s++) most = l[s] > most ? l[s] : most;
    for (size_t s = 0; s < S; s++) {
        double e = exp(l[s] - most);
        sum += e;
        if (weights) weights[s] = e;
    }
    for (size_t s = 0; s < S && weights; s++) weights[s] /= sum;
    return most + log(sum);
}

/* ---------------------------------------------------------------------- the record */

Adapt *adapt_create(const Config *c, int64_t every) {
    Adapt *a = (Adapt *)xcalloc(1, sizeof *a);
    Tensor tensors[NUM_TENSORS];
    model_tensors(c, tensors);
    a->c = *c;
    a->G = (size_t)config_gsa_heads(c);
    a->S = a->G ? (size_t)c->S : 0;
    /* from mu to psi; log_far, the next tensor, belongs to a head and not to a splat */
    a->first = tensors[TENSOR_mu].offset;
    a->count = tensors[TENSOR_log_far].offset - a->first;
    a->numbers[ADAPT_NEXT] = every;
    a->born = (int64_t *)xcalloc(a->G * a->S + 1, sizeof *a->born);
    a->activation = (float *)xcalloc(2 * a->G * a->S * ADAPT_WINDOWS + a->G + 1, sizeof *a->activation);
    a->pull = a->activation + a->G * a->S * ADAPT_WINDOWS;
    a->coverage = a->pull + a->G * a->S * ADAPT_WINDOWS;
    a->bands = (AdaptBand *)xcalloc(a->G + 1, sizeof *a->bands);
    a->sample = (float *)xcalloc(a->G * 2 * ADAPT_TOKENS * (size_t)config_head_size(c) + 1, sizeof *a->sample);
    return a;
}

void adapt_free(Adapt *a) {
    if (!a) return;
    free(a->born);
    free(a->activation);
    free(a->bands);
    free(a->sample);
    free(a);
}

void adapt_add_entries(const Adapt *a, Entry *entries, const void **data, int *count) {
    const int64_t numbers = NUM_ADAPT_NUMBERS, slots = (int64_t)(a->G * a->S),
                  rings[3] = {(int64_t)a->G, (int64_t)a->S, ADAPT_WINDOWS}, heads = (int64_t)a->G,
                  bands[2] = {(int64_t)a->G, 4};
    data[*count] = a->numbers;
    entries[(*count)++] = checkpoint_entry("adapt.schedule", TYPE_I64, 1, &numbers);
    data[*count] = a->born;
    entries[(*count)++] = checkpoint_entry("adapt.born", TYPE_I64, 1, &slots);
    data[*count] = a->activation;
    entries[(*count)++] = checkpoint_entry("adapt.activation", TYPE_F32, 3, rings);
    data[*count] = a->pull;
    entries[(*count)++] = checkpoint_entry("adapt.pull", TYPE_F32, 3, rings);
    data[*count] = a->coverage;
    entries[(*count)++] = checkpoint_entry("adapt.coverage", TYPE_F32, 1, &heads);
    data[*count] = a->bands;
    entries[(*count)++] = checkpoint_entry("adapt.bands", TYPE_F32, 2, bands);
}

void adapt_read(Adapt *a, const Checkpoint *k, bool restart) {
    const int64_t numbers = NUM_ADAPT_NUMBERS, slots = (int64_t)(a->G * a->S),
                  rings[3] = {(int64_t)a->G, (int64_t)a->S, ADAPT_WINDOWS}, heads = (int64_t)a->G,
                  bands[2] = {(int64_t)a->G, 4};
    int64_t every = a->numbers[ADAPT_NEXT];
    if (!checkpoint_has(k, "adapt.schedule")) return; /* models of the earliest versions have another record */
    memcpy(a->numbers, checkpoint_find(k, "adapt.schedule", TYPE_I64, 1, &numbers, NULL), sizeof a->numbers);
    memcpy(a->born, checkpoint_find(k, "adapt.born", TYPE_I64, 1, &slots, NULL), a->G * a->S * sizeof *a->born);
    memcpy(a->activation, checkpoint_find(k, "adapt.activation", TYPE_F32, 3, rings, NULL),
           a->G * a->S * ADAPT_WINDOWS * sizeof *a->activation);
    memcpy(a->pull, checkpoint_find(k, "adapt.pull", TYPE_F32, 3, rings, NULL),
           a->G * a->S * ADAPT_WINDOWS * sizeof *a->pull);
    memcpy(a->coverage, checkpoint_find(k, "adapt.coverage", TYPE_F32, 1, &heads, NULL), a->G * sizeof *a->coverage);
    memcpy(a->bands, checkpoint_find(k, "adapt.bands", TYPE_F32, 2, bands, NULL), a->G * sizeof *a->bands);
    if (!restart) return;
    for (size_t i = 0; i < a->G * a->S; i++) a->born[i] -= k->step;
    int64_t windows = a->numbers[ADAPT_COUNT_WINDOWS];
    memset(a->numbers, 0, sizeof a->numbers);
    a->numbers[ADAPT_NEXT] = every;
    a->numbers[ADAPT_COUNT_WINDOWS] = windows;
}

/* ---------------------------------------------------------------------- statistics */

static float *sample_of(const Adapt *a, size_t g, int part) {
    return a->sample + (g * 2 + (size_t)part) * ADAPT_TOKENS * (size_t)config_head_size(&a->c);
}

void adapt_sample(Adapt *a, int g, int part, const float *x, int tokens) {
    size_t d = (size_t)config_head_size(&a->c);
    float *unit = sample_of(a, (size_t)g, part);
    a->tokens = tokens;
    for (size_t t = 0; t < (size_t)tokens; t++) {
        double square = 1e-6;
        for (size_t k = 0; k < d; k++) square += (double)x[t * d + k] * (double)x[t * d + k];
        for (size_t k = 0; k < d; k++)
            unit[t * d + k] = a->c.raw ? x[t * d + k] : (float)((double)x[t * d + k] / sqrt(square));
    }
}

/* The mean of ln sum_s phi_s(k) over the sampled keys. */
static double head_coverage(const Adapt *a, size_t g, const Slots *h) {
    size_t n = (size_t)a->tokens;
    double *l = (double *)xmalloc(n * h->S * sizeof *l), sum = 0;
    responses(&a->c, h, sample_of(a, g, 1), n, l);
    for (size_t i = 0; i < n; i++) sum += log_sum(l + i * h->S, h->S, NULL);
    free(l);
    return sum / (double)n;
}

enum {
    BAND_WINDOWS = 30, /* values seen before one can be outside */
    BAND_MEMORY = 3,   /* values that the mean looks back on, */
    NOISE_MEMORY = 30, /* and the variance */
    BAND_OUTSIDE = 3   /* values in a row that must be outside */
};

bool adapt_band(AdaptBand *b, double value) {
    double apart = value - (double)b->mean;
    if (b->count >= BAND_WINDOWS && fabs(apart) > 4 * sqrt((double)b->variance)) return ++b->outside >= BAND_OUTSIDE;
    b->outside = 0;
    b->count++;
    if (b->count > 1)
        b->variance =
            (float)((double)b->variance + (apart * apart - (double)b->variance) /
                                              (b->count - 1 < NOISE_MEMORY ? (double)b->count - 1 : NOISE_MEMORY));
    b->mean = (float)((double)b->mean + apart / (b->count < BAND_MEMORY ? (double)b->count : BAND_MEMORY));
    return false;
}

bool adapt_window(Adapt *a, int64_t step, const float *splats, const float *sums) {
    size_t n = (size_t)a->tokens, S = a->S, slot = (size_t)(a->numbers[ADAPT_COUNT_WINDOWS] % ADAPT_WINDOWS);
#pragma omp parallel for schedule(dynamic)
    for (size_t g = 0; g < a->G; g++) {
        Slots h = slots_of(&a->c, (int)g, (float *)splats);
        double *l = (double *)xmalloc((n + 2) * S * sizeof *l), *r = l + n * S, *activation = r + S, coverage = 0;
        memset(activation, 0, S * sizeof *activation);
        for (int side = 0; side < 2; side++) {
            responses(&a->c, &h, sample_of(a, g, side), n, l);
            for (size_t i = 0; i < n; i++) {
                if (side == 1) coverage += log_sum(l + i * S, S, NULL) / (double)n;
                for (size_t s = 0; s < S; s++) l[i * S + s] += (double)h.rows[LOG_ALPHA][s];
                log_sum(l + i * S, S, r);
                for (size_t s = 0; s < S; s++) activation[s] += r[s] / (double)(2 * n);
            }
        }
        for (size_t s = 0; s < S; s++) {
            a->activation[(g * S + s) * ADAPT_WINDOWS + slot] = (float)activation[s];
            a->pull[(g * S + s) * ADAPT_WINDOWS + slot] = sums[g * S + s];
        }
        a->coverage[g] = (float)coverage;
        free(l);
    }
    a->numbers[ADAPT_COUNT_WINDOWS]++;
    bool shifted = false;
    for (size_t g = 0; g < a->G && step % ADAPT_SPACING == 0; g++)
        shifted |= adapt_band(&a->bands[g], (double)a->coverage[g]);
    if (shifted) memset(a->bands, 0, a->G * sizeof *a->bands);
    return shifted;
}

/* The mean of the last windows of activation or pull. */
static double ring_mean(const Adapt *a, const float *rings, size_t g, size_t s) {
    double sum = 0;
    int64_t windows = a->numbers[ADAPT_COUNT_WINDOWS] < ADAPT_WINDOWS ? a->numbers[ADAPT_COUNT_WINDOWS] : ADAPT_WINDOWS;
    for (int64_t w = 0; w < windows; w++) sum += (double)rings[(g * a->S + s) * ADAPT_WINDOWS + (size_t)w];
    return windows ? sum / (double)windows : 0;
}

double adapt_activation(const Adapt *a, size_t g, size_t s) { return ring_mean(a, a->activation, g, s); }

/* A slot takes another splat: these take the place of the old one's statistics. */
static void renew(Adapt *a, size_t g, size_t s, int64_t step, double activation, double pull) {
    for (int w = 0; w < ADAPT_WINDOWS; w++) {
        a->activation[(g * a->S + s) * ADAPT_WINDOWS + w] = (float)activation;
        a->pull[(g * a->S + s) * ADAPT_WINDOWS + w] = (float)pull;
    }
    a->born[g * a->S + s] = step;
}

/* ---------------------------------------------------------------------- edits */

void adapt_split(const Config *c, int g, int s, int t, float *splats) {
    Slots h = slots_of(c, g, splats);
    for (int i = 0; i < NUM_ROWS; i++)
        if (h.rows[i])
            memcpy(h.rows[i] + (size_t)t * h.width[i], h.rows[i] + (size_t)s * h.width[i], h.width[i] * sizeof(float));
    double whole = exp((double)h.rows[LOG_ALPHA][s]);
    h.rows[LOG_ALPHA][s] = (float)((double)h.rows[LOG_ALPHA][s] - log(2));
    /* not another ln(whole / 2): the two halves together are the whole in spite of rounding */
    h.rows[LOG_ALPHA][t] = (float)log(whole - exp((double)h.rows[LOG_ALPHA][s]));
    h.rows[LOG_REFERENCE][s] = h.rows[LOG_REFERENCE][t] = (float)((double)h.rows[LOG_REFERENCE][s] - log(2));
}

/* ln of the mean response over x (n, HS) */
static double log_mean_response(const Config *c, const Slots *h, size_t s, const float *x, size_t n) {
    size_t d = (size_t)config_head_size(c);
    double *l = (double *)xmalloc(n * sizeof *l), mean;
    for (size_t i = 0; i < n; i++)
        l[i] =
            adapt_log_response(c, h->rows[MU] + s * d, h->rows[LOG_PRECISION] + s * h->width[LOG_PRECISION], x + i * d);
    mean = log_sum(l, n, NULL) - log((double)n);
    free(l);
    return mean;
}

static double log_add(double a, double b) { return a > b ? a + log1p(exp(b - a)) : b + log1p(exp(a - b)); }

void adapt_merge(const Config *c, int g, int s, int t, double weight, const float *x, size_t n, float *splats) {
    Slots h = slots_of(c, g, splats);
    static const int mixed[] = {MU, LOG_PRECISION, LOG_THETA, LOG_DELTA};
    double alpha_s = (double)h.rows[LOG_ALPHA][s], alpha_t = (double)h.rows[LOG_ALPHA][t];
    if (h.rows[PSI] && weight < 0.5) h.rows[PSI][s] = h.rows[PSI][t]; /* an angle: the mean of two could be neither */
    /* a splat contributes alpha phi(q) phi(k): its mean response counts twice */
    if (n) {
        alpha_s += 2 * log_mean_response(c, &h, (size_t)s, x, n);
        alpha_t += 2 * log_mean_response(c, &h, (size_t)t, x, n);
    }
    for (int i = 0; i < 4; i++) {
        float *a = h.rows[mixed[i]];
        for (size_t k = 0, w = h.width[mixed[i]]; a && k < w; k++) {
            float *own = a + (size_t)s * w + k, other = a[(size_t)t * w + k];
            *own = (float)((double)*own + (1 - weight) * ((double)other - (double)*own));
        }
    }
    double alpha = log_add(alpha_s, alpha_t),
           reference = log_add((double)h.rows[LOG_REFERENCE][s], (double)h.rows[LOG_REFERENCE][t]);
    if (n) alpha -= 2 * log_mean_response(c, &h, (size_t)s, x, n);
    h.rows[LOG_REFERENCE][s] = (float)reference;
    if (config_bounded(c, BOUND_AMPLITUDE))
        alpha = fmin(fmax(alpha, reference - SPLAT_AMPLITUDE_RANGE), reference + SPLAT_AMPLITUDE_RANGE);
    h.rows[LOG_ALPHA][s] = (float)alpha;
    h.rows[ALIVE][t] = 0;
}

static void set_precision(const Config *c, float *log_precision, double precision) {
    int d = config_head_size(c), P = config_precisions(c);
    for (int k = 0; k < P; k++) log_precision[k] = c->covariance == COVARIANCE_FULL ? 0 : (float)log(precision);
    for (int k = 0; k < d && c->covariance == COVARIANCE_FULL; k++)
        log_precision[k * (k + 1) / 2 + k] = (float)(0.5 * log(precision));
}

/* A new splat in a free slot, with the frequency and decay that the slot had, no phase, and the amplitude of the
   others. A softmax head's logits grow with the number of its splats: where they are larger than those that a head of
   so many starts with, all amplitudes go down. */
static void give_birth(const Config *c, Slots *h, size_t t, const float *centre) {
    size_t d = h->width[MU];
    int alive = count_alive(h);
    double amplitude = 0, excess;
    for (size_t s = 0; s < h->S; s++) amplitude += is_alive(h, s) ? exp((double)h->rows[LOG_REFERENCE][s]) / alive : 0;
    amplitude = log(amplitude);
    excess = c->mixer == MIXER_SOFTMAX ? fmax(amplitude - splat_amplitude_start(alive + 1, (int)d), 0) : 0;
    for (size_t s = 0; s < h->S && excess > 0; s++) {
        h->rows[LOG_ALPHA][s] -= (float)excess;
        h->rows[LOG_REFERENCE][s] -= (float)excess;
    }
    memcpy(h->rows[MU] + t * d, centre, d * sizeof *centre);
    set_precision(c, h->rows[LOG_PRECISION] + t * h->width[LOG_PRECISION], SPLAT_PRECISION_START);
    h->rows[LOG_ALPHA][t] = h->rows[LOG_REFERENCE][t] = (float)(amplitude - excess);
    if (h->rows[PSI]) h->rows[PSI][t] = 0;
    h->rows[ALIVE][t] = 1;
}

/* The leading axis of the keys that splat s owns, times their deviation along it: the largest eigenvalue of their
   covariance, keys weighed by responsibility. axis (HS). */
static void leading_axis(const Config *c, const Slots *h, size_t s, const float *keys, size_t n, double *axis) {
    size_t d = h->width[MU], S = h->S, start = 0;
    double *l = (double *)xmalloc((n * S + S + n + 2 * d) * sizeof *l), *r = l + n * S, *weight = r + S,
           *mean = weight + n, *image = mean + d, total = 0, most = -1, value = 0;
    responses(c, h, keys, n, l);
    memset(mean, 0, d * sizeof *mean);
    for (size_t i = 0; i < n; i++) {
        for (size_t u = 0; u < S; u++) l[i * S + u] += (double)h->rows[LOG_ALPHA][u];
        log_sum(l + i * S, S, r);
        total += weight[i] = r[s];
        for (size_t k = 0; k < d; k++) mean[k] += weight[i] * (double)keys[i * d + k];
    }
    for (size_t k = 0; k < d; k++) mean[k] /= total > 0 ? total : 1;
    for (size_t i = 0; i < n; i++) { /* power iteration begins at the key that counts most */
        double square = 0;
        for (size_t k = 0; k < d; k++)
            square += weight[i] * ((double)keys[i * d + k] - mean[k]) * ((double)keys[i * d + k] - mean[k]);
        if (square > most) {
            most = square;
            start = i;
        }
    }
    for (size_t k = 0; k < d; k++) axis[k] = (double)keys[start * d + k] - mean[k];
    for (int round = 0; round < 30; round++) {
        double size = 0;
        for (size_t k = 0; k < d; k++) {
            size += axis[k] * axis[k];
            image[k] = 0;
        }
        if (!(size > 0)) break;
        for (size_t k = 0; k < d; k++) axis[k] /= sqrt(size);
        value = 0;
        for (size_t i = 0; i < n; i++) {
            double along = 0;
            for (size_t k = 0; k < d; k++) along += ((double)keys[i * d + k] - mean[k]) * axis[k];
            value += weight[i] * along * along / (total > 0 ? total : 1);
            for (size_t k = 0; k < d; k++) image[k] += weight[i] * along * ((double)keys[i * d + k] - mean[k]);
        }
        if (round < 29) memcpy(axis, image, d * sizeof *axis);
    }
    for (size_t k = 0; k < d; k++) axis[k] *= sqrt(value);
    free(l);
}

/* ---------------------------------------------------------------------- rules */

/* What a pass knows of the head it is at. */
typedef struct {
    Adapt *a;
    const AdaptRules *rules;
    size_t g;
    int64_t step;
    Slots h, m, v; /* parameters and Adam's moments */
} Head;

/* Old enough to die, merge, move or split. The splats of the start always are. */
static bool is_old(const Head *p, size_t s) {
    int64_t born = p->a->born[p->g * p->a->S + s];
    return born <= 0 || p->step - born >= p->rules->life;
}
static double activation(const Head *p, size_t s) { return adapt_activation(p->a, p->g, s); }
static double pull(const Head *p, size_t s) { return ring_mean(p->a, p->a->pull, p->g, s); }
static double mean_pull(const Head *p) {
    double sum = 0;
    for (size_t s = 0; s < p->h.S; s++) sum += is_alive(&p->h, s) ? pull(p, s) : 0;
    return sum / count_alive(&p->h);
}

/* Of the old splats that are idle the least active one; -1: none is. */
static int weakest(const Head *p) {
    int found = -1;
    double even = 1.0 / count_alive(&p->h);
    for (size_t s = 0; s < p->h.S; s++)
        if (is_alive(&p->h, s) && is_old(p, s) && activation(p, s) < p->rules->activation * even &&
            (found < 0 || activation(p, s) < activation(p, (size_t)found)))
            found = (int)s;
    return found;
}

/* Envelopes that differ by no more than a tenth in log_theta and log_delta, half the usual spacing, and in psi: such
   are the two splats that a split has made. */
static bool alike(const Head *p, size_t s, size_t t) {
    for (int i = LOG_THETA; i <= LOG_DELTA; i++)
        if (p->h.rows[i] && fabs((double)p->h.rows[i][s] - (double)p->h.rows[i][t]) > 0.1) return false;
    const double turn = 6.283185307179586;
    double apart = p->h.rows[PSI] ? (double)p->h.rows[PSI][s] - (double)p->h.rows[PSI][t] : 0;
    return fabs(apart - turn * rint(apart / turn)) <= 0.1;
}

/* How much two splats overlap: the Bhattacharyya coefficient of their responses, taken as distributions over the
   sample, sum sqrt(phi_s phi_t) / sqrt(sum phi_s sum phi_t). It is 1 for two equal splats whatever their amplitudes; a
   centre farther out with a lower precision responds in the same way and also counts as equal. Returns the less active
   splat of the pair that overlaps most, or -1 where none overlaps enough. twin: the other one of the pair if they are
   alike in their envelopes too, else -1. */
static int redundant(const Head *p, int *twin) {
    const Adapt *a = p->a;
    size_t S = a->S, n = (size_t)a->tokens;
    double *l = (double *)xmalloc((2 * n * S + S) * sizeof *l), *total = l + 2 * n * S, most = p->rules->overlap;
    int found = -1;
    for (int side = 0; side < 2; side++) responses(&a->c, &p->h, sample_of(a, p->g, side), n, l + (size_t)side * n * S);
    for (size_t s = 0; s < S; s++) {
        double largest = -INFINITY, sum = 0;
        for (size_t i = 0; i < 2 * n; i++) largest = l[i * S + s] > largest ? l[i * S + s] : largest;
        for (size_t i = 0; i < 2 * n; i++) sum += exp(l[i * S + s] - largest);
        total[s] = is_alive(&p->h, s) ? largest + log(sum) : 0;
    }
    for (size_t s = 0; s < S; s++)
        for (size_t t = s + 1; t < S; t++) {
            if (!is_alive(&p->h, s) || !is_alive(&p->h, t) || !is_old(p, s) || !is_old(p, t)) continue;
            double sum = 0;
            for (size_t i = 0; i < 2 * n; i++) sum += exp(0.5 * (l[i * S + s] - total[s] + l[i * S + t] - total[t]));
            if (!(sum > most)) continue;
            bool first = activation(p, s) < activation(p, t);
            most = sum;
            found = (int)(first ? s : t);
            *twin = alike(p, s, t) ? (int)(first ? t : s) : -1;
        }
    free(l);
    return found;
}

/* within the width of a splat as it begins */
static bool near(const float *x, const float *y, size_t d) {
    float apart = 0;
#pragma omp simd reduction(+ : apart)
    for (size_t k = 0; k < d; k++) apart += (x[k] - y[k]) * (x[k] - y[k]);
    return (double)apart <= 1 / SPLAT_PRECISION_START;
}

/* Looks among the keys with too little coverage for the one that has most keys near it. centre (HS): the mean of these.
   Returns their share of all keys; 0 where there is no such key. */
static double densest(const Head *p, float *centre) {
    const Adapt *a = p->a;
    size_t n = (size_t)a->tokens, S = a->S, d = p->h.width[MU], best = 0, most = 0;
    const float *keys = sample_of(a, p->g, 1);
    double *l = (double *)xmalloc(n * S * sizeof *l);
    responses(&a->c, &p->h, keys, n, l);
    for (size_t i = 0; i < n; i++) {
        size_t count = 0;
        if (!(log_sum(l + i * S, S, NULL) < p->rules->coverage)) continue;
        for (size_t j = 0; j < n; j++) count += near(keys + i * d, keys + j * d, d);
        if (count > most) {
            most = count;
            best = i;
        }
    }
    free(l);
    if (!most || (double)most < p->rules->density * (double)n) return 0;
    for (size_t k = 0; k < d; k++) centre[k] = 0;
    for (size_t j = 0; j < n; j++)
        for (size_t k = 0; k < d && near(keys + best * d, keys + j * d, d); k++)
            centre[k] += keys[j * d + k] / (float)most;
    return (double)most / (double)n;
}

/* Of the splats that may be split, without these two, the one of most pull; -1: none. */
static int busiest(const Head *p, int not_this, int nor_that) {
    int found = -1;
    double even = 1.0 / count_alive(&p->h), mean = mean_pull(p);
    for (size_t s = 0; s < p->h.S; s++) {
        if (!is_alive(&p->h, s) || !is_old(p, s) || (int)s == not_this || (int)s == nor_that) continue;
        if (activation(p, s) >= even && pull(p, s) > 0 && pull(p, s) >= p->rules->pull * mean &&
            (found < 0 || pull(p, s) > pull(p, (size_t)found)))
            found = (int)s;
    }
    return found;
}

/* The free slot whose frequency is farthest from those of the living, so that births bring in what the head lacks;
   the first where there are no frequencies. */
static int free_slot(const Head *p) {
    int found = -1;
    double most = -1;
    for (size_t t = 0; t < p->h.S; t++) {
        double nearest = INFINITY;
        if (is_alive(&p->h, t)) continue;
        for (size_t s = 0; s < p->h.S && p->h.rows[LOG_THETA]; s++)
            if (is_alive(&p->h, s))
                nearest = fmin(nearest, fabs((double)p->h.rows[LOG_THETA][s] - (double)p->h.rows[LOG_THETA][t]));
        if (nearest > most) {
            most = nearest;
            found = (int)t;
        }
    }
    return found;
}

static void forget_moments(Head *p, size_t s) {
    for (int i = 0; i < NUM_ROWS; i++)
        if (p->h.rows[i]) {
            memset(p->m.rows[i] + s * p->m.width[i], 0, p->m.width[i] * sizeof(float));
            memset(p->v.rows[i] + s * p->v.width[i], 0, p->v.width[i] * sizeof(float));
        }
}

static AdaptEvent event(const Head *p, int kind, size_t slot, int from, double activation) {
    AdaptEvent e = {kind, (int)p->g, (int)slot, from, (float)activation};
    return e;
}

static AdaptEvent die_out(Head *p, size_t s) {
    AdaptEvent e = event(p, ADAPT_DEATH, s, -1, activation(p, s));
    p->h.rows[ALIVE][s] = 0;
    renew(p->a, p->g, s, p->step, 0, 0);
    forget_moments(p, s);
    return e;
}

static AdaptEvent join(Head *p, float *splats, size_t s, size_t t) {
    double a = activation(p, s), b = activation(p, t);
    AdaptEvent e = event(p, ADAPT_MERGE, t, (int)s, b);
    renew(p->a, p->g, s, p->step, a + b, pull(p, s) + pull(p, t));
    adapt_merge(&p->a->c, (int)p->g, (int)s, (int)t, a + b > 0 ? a / (a + b) : 0.5, sample_of(p->a, p->g, 0),
                (size_t)p->a->tokens, splats);
    renew(p->a, p->g, t, p->step, 0, 0);
    forget_moments(p, s);
    forget_moments(p, t);
    return e;
}

static AdaptEvent settle(Head *p, size_t t) {
    size_t d = p->h.width[MU];
    float *centre = (float *)xmalloc(d * sizeof *centre);
    double share = densest(p, centre), ordinary = mean_pull(p);
    if (!(share > 0)) { /* a random unit vector, another for each step, head and slot */
        uint64_t rng = rng_mix(rng_mix((uint64_t)p->step, p->g), t);
        double square = 0;
        for (size_t k = 0; k < d; k++) {
            centre[k] = (float)rng_normal(&rng);
            square += (double)centre[k] * (double)centre[k];
        }
        for (size_t k = 0; k < d; k++) centre[k] = (float)((double)centre[k] / sqrt(square));
    }
    give_birth(&p->a->c, &p->h, t, centre);
    /* until it has statistics of its own it counts as an ordinary one */
    renew(p->a, p->g, t, p->step, 1.0 / count_alive(&p->h), ordinary);
    forget_moments(p, t);
    free(centre);
    return event(p, ADAPT_BIRTH, t, -1, share);
}

static AdaptEvent divide(Head *p, float *splats, size_t s, size_t t) {
    size_t d = p->h.width[MU];
    AdaptEvent e = event(p, ADAPT_SPLIT, t, (int)s, activation(p, s));
    double half = activation(p, s) / 2, half_pull = pull(p, s) / 2, *axis = (double *)xmalloc(d * sizeof *axis);
    leading_axis(&p->a->c, &p->h, s, sample_of(p->a, p->g, 1), (size_t)p->a->tokens, axis);
    adapt_split(&p->a->c, (int)p->g, (int)s, (int)t, splats);
    for (size_t k = 0; k < d; k++) { /* apart, each by half a deviation */
        p->h.rows[MU][s * d + k] = (float)((double)p->h.rows[MU][s * d + k] - 0.5 * axis[k]);
        p->h.rows[MU][t * d + k] = (float)((double)p->h.rows[MU][t * d + k] + 0.5 * axis[k]);
    }
    renew(p->a, p->g, s, p->step, half, half_pull);
    renew(p->a, p->g, t, p->step, half, half_pull);
    forget_moments(p, s);
    forget_moments(p, t);
    free(axis);
    return e;
}

static int cap(const Adapt *a) { return a->S / 16 > 1 ? (int)(a->S / 16) : 1; }
int adapt_room(const Adapt *a) { return (int)a->G * 2 * cap(a); } /* as many deaths as births */

int adapt_pass(Adapt *a, const AdaptRules *rules, int64_t step, float *splats, float *m, float *v, AdaptEvent *events) {
    int count = 0;
    for (size_t g = 0; g < a->G; g++) {
        Head p;
        p.a = a;
        p.rules = rules;
        p.g = g;
        p.step = step;
        p.h = slots_of(&a->c, (int)g, splats);
        p.m = slots_of(&a->c, (int)g, m);
        p.v = slots_of(&a->c, (int)g, v);
        double before = head_coverage(a, g, &p.h);
        int edits = 0, s, t;
        while (rules->mode == ADAPT_RELOCATE && edits < cap(a) && count_alive(&p.h) > 1) {
            int twin = -1;
            if ((s = weakest(&p)) < 0 && (s = redundant(&p, &twin)) < 0) break;
            int parent = busiest(&p, s, twin);
            double lost = activation(&p, (size_t)s);
            if (twin >= 0) join(&p, splats, (size_t)twin, (size_t)s);
            else die_out(&p, (size_t)s);
            if (parent >= 0) divide(&p, splats, (size_t)parent, (size_t)s);
            else settle(&p, (size_t)s);
            events[count++] = event(&p, ADAPT_MOVE, (size_t)s, parent, lost);
            edits++;
        }
        for (int left = cap(a); rules->mode == ADAPT_GROW && left > 0 && count_alive(&p.h) > 1; left--, edits++) {
            int twin = -1;
            if ((s = weakest(&p)) < 0 && (s = redundant(&p, &twin)) < 0) break;
            events[count++] = twin >= 0 ? join(&p, splats, (size_t)twin, (size_t)s) : die_out(&p, (size_t)s);
        }
        for (int left = cap(a); rules->mode == ADAPT_GROW && left > 0 && (t = free_slot(&p)) >= 0; left--, edits++)
            events[count++] =
                (s = busiest(&p, -1, -1)) >= 0 ? divide(&p, splats, (size_t)s, (size_t)t) : settle(&p, (size_t)t);
        /* what edits do to the coverage is no shift of the data */
        double moved = edits ? head_coverage(a, g, &p.h) - before : 0;
        a->bands[g].mean = (float)((double)a->bands[g].mean + moved);
    }
    for (int i = 0; i < count; i++) a->numbers[ADAPT_EVENTS + events[i].kind]++;
    return count;
}

bool adapt_due(const Adapt *a, const AdaptRules *rules, int64_t step) {
    int64_t spacing = (a->numbers[ADAPT_NEXT] - a->numbers[ADAPT_LAST]) / 5;
    if (rules->mode == ADAPT_NONE) return step == ADAPT_SPACING || step % ADAPT_RARELY == 0;
    if (step % ADAPT_SPACING == 0) return true;
    if (step > rules->end) return false; /* no pass will come */
    return step == a->numbers[ADAPT_NEXT] || (spacing < ADAPT_SPACING && step % (spacing > 1 ? spacing : 1) == 0);
}

void adapt_schedule(Adapt *a, const AdaptRules *rules, int64_t step, bool shifted) {
    int64_t *n = a->numbers, so_far;
    if (shifted) n[ADAPT_FIRST] = step;
    so_far = (step - n[ADAPT_FIRST]) / 10;
    n[ADAPT_LAST] = step;
    n[ADAPT_NEXT] = step + (so_far > rules->every ? so_far : rules->every);
}

/* ---------------------------------------------------------------------- starts */

void adapt_start_alive(const Config *c, int alive, float *flat) {
    Tensor tensors[NUM_TENSORS];
    model_tensors(c, tensors);
    float amplitude = (float)(c->mixer == MIXER_SOFTMAX ? splat_amplitude_start(alive, config_head_size(c)) : 0);
    for (int g = 0; g < config_gsa_heads(c); g++) {
        Slots h = slots_of(c, g, flat + tensors[TENSOR_mu].offset);
        for (size_t s = 0; s < h.S; s++) {
            h.rows[ALIVE][s] = 0;
            h.rows[LOG_ALPHA][s] = h.rows[LOG_REFERENCE][s] = amplitude;
        }
        for (int i = 0; i < alive; i++) h.rows[ALIVE][alive > 1 ? (size_t)i * (h.S - 1) / (size_t)(alive - 1) : 0] = 1;
    }
}

void adapt_start_ball(const Config *c, float *flat, uint64_t seed) {
    Tensor tensors[NUM_TENSORS];
    size_t d = (size_t)config_head_size(c);
    model_tensors(c, tensors);
    for (int g = 0; g < config_gsa_heads(c); g++) {
        uint64_t rng = rng_mix(seed, 0xBA11u + (uint64_t)g);
        float *mu = flat + tensors[TENSOR_mu].offset + (size_t)g * (size_t)c->S * d;
        float first[1024];                    /* the largest head */
        memcpy(first, mu, d * sizeof *first); /* the first splat's own: a random unit vector */
        for (size_t i = 0; i < (size_t)c->S * d; i++)
            mu[i] = (float)((double)first[i % d] + 0.05 * rng_normal(&rng) / sqrt((double)d));
    }
}
