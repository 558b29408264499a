/* One run, from flags to the last checkpoint. Reading order: settings and their flags -> data -> checkpoints of a
   run -> evaluation, samples -> the loop. */
#include "train.h"

#include "../../data/stories.h"
#include "../../tokenizer/stored.h"
#include "adapt.h"
#include "../checkpoint.h"
#include "../flags.h"
#include "../../data/loader.h"
#include "../look/measure.h"
#include "../sample.h"
#include "starts.h"

#include <errno.h>
#include <math.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#ifdef _OPENMP
#include <omp.h>
#endif

/* ---------------------------------------------------------------------- settings */

typedef struct {
    /* model */
    int64_t depth, layers, heads, channels, seq, splats;
    const char *preset, *attention, *gsa_heads, *position, *mixer, *covariance, *envelope, *objective, *splat_init;
    int64_t window;
    double splat_precision, splat_amplitude;
    bool no_sphere;
    const char *unbounded;
    /* adaptation */
    const char *adapt;
    int64_t splats_alive, adapt_every, adapt_life;
    double adapt_activation, adapt_overlap, adapt_coverage, adapt_density, adapt_pull;
    /* data */
    const char *data, *val, *tokenizer;
    int64_t vocab;
    bool doc_start;
    /* optimisation */
    int64_t batch, accum, steps, warmup, seed;
    double lr, min_lr, splat_lr, weight_decay, beta1, beta2, clip;
    const char *schedule, *init_from;
    bool overfit_batch;
    /* run */
    const char *out;
    bool resume, recompute;
    int64_t eval_every, eval_tokens, sample_every, save_every, keep, threads;
} Settings;

static const Settings defaults = {
    2,
    0,
    0,
    0,
    256,
    0,
    NULL,
    "hybrid",
    NULL,
    "rope",
    NULL,
    "iso",
    NULL,
    "lm",
    "random",
    0,
    SPLAT_PRECISION_START,
    1,
    false,
    NULL,
    "none",
    0,
    5,
    100,
    0.3,
    0.995,
    -1000,
    0.02,
    4,
    NULL,
    NULL,
    NULL,
    1024,
    false,
    4,
    1,
    8000,
    100,
    1,
    0,
    0,
    0,
    0.1,
    0.9,
    0.95,
    1.0,
    "cosine",
    NULL,
    false,
    "runs/default",
    false,
    false,
    1000,
    65536,
    2000,
    1000,
    2,
    0,
};

static const char usage[] = "usage: %s [flags]\n"
                            "Trains a GPT whose attention heads are standard or Gaussian Splat Attention. Without "
                            "flags: a small hybrid model on\n"
                            "made-up stories, checkpoints in runs/default. Defaults stand in brackets.\n"
                            "MFU of a GPU's step line: tokens/s x operations a token / the card's peak.\n";

/* The flags of s. Those after FREE may differ when a run is resumed: they do not change what it computes. */
#define FREE "run (these may be changed when a run is resumed)"
static void make_flags(Flag *flags, Settings *s) {
    Flag table[] = {
        {FLAG_ROOM, NULL, NULL, 0, 0, NULL, "model", false},
        {FLAG_INT, "depth", &s->depth, 1, 64, NULL, "one dial for the shape: N layers, N heads, 64 N channels", false},
        {FLAG_CHOICE, "preset", &s->preset, 0, 0, "gpt2-124m|gpt2-350m|gpt2-774m",
         "a shape of GPT-2 instead: layers, heads, channels, --seq 1024", false},
        {FLAG_INT, "layers", &s->layers, 1, MAX_LAYERS, NULL, "layers; from --depth or --preset if not given", false},
        {FLAG_INT, "heads", &s->heads, 1, MAX_HEADS, NULL, "attention heads per layer; likewise", false},
        {FLAG_INT, "channels", &s->channels, 2, 65536, NULL, "channels, a multiple of twice the heads; likewise",
         false},
        {FLAG_INT, "seq", &s->seq, 1, 1 << 24, NULL, "sequence length T in tokens", false},
        {FLAG_CHOICE, "pos", &s->position, 0, 0, POSITION_CHOICES,
         "positions: added at the input (learned), rotations in standard heads (rope), or both", false},
        {FLAG_CHOICE, "objective", &s->objective, 0, 0, OBJECTIVE_CHOICES,
         "predict the next token, or masked ones from both sides (BERT)", false},
        {FLAG_CHOICE, "attention", &s->attention, 0, 0, ATTENTION_CHOICES,
         "standard; GSA in all heads (gsa), in some (hybrid), in extra ones (augment), or beyond a window (extend)",
         false},
        {FLAG_TEXT, "gsa-heads", &s->gsa_heads, 0, 0, "N|MAP",
         "the last N heads of each layer, augment: N more; or layer:head such as 0:3,2:1-4", false},
        {FLAG_INT, "window", &s->window, 0, 1 << 24, NULL,
         "standard heads see the last N tokens only; 0: all (extend: 64)", false},
        {FLAG_CHOICE, "mixer", &s->mixer, 0, 0, MIXER_CHOICES,
         "what GSA heads weigh values by: softmax of splat contributions, or these themselves in linear time", false},
        {FLAG_INT, "splats", &s->splats, 0, 65536, NULL,
         "splats per GSA head; 0: as many as softmax takes, 16 for linear", false},
        {FLAG_CHOICE, "envelope", &s->envelope, 0, 0, ENVELOPE_CHOICES,
         "contribution by distance; cosine for softmax and raised for linear if not given", false},
        {FLAG_CHOICE, "covariance", &s->covariance, 0, 0, COVARIANCE_CHOICES,
         "a splat's precision: one number, one for each dimension, or a matrix", false},
        {FLAG_TEXT, "splat-init", &s->splat_init, 0, 0, "random|ball|kmeans|pca|FILE",
         "centres on the unit sphere, all in one small ball, from keys of a first batch, or all splats of a model",
         false},
        {FLAG_REAL, "splat-precision", &s->splat_precision, 1e-6, 1e6, NULL, "precision of all splats at the start",
         false},
        {FLAG_REAL, "splat-amplitude", &s->splat_amplitude, 1e-6, 1e6, NULL,
         "softmax: amplitude of all splats at the start, times what gives logits of random vectors a deviation of 1; "
         "less keeps attention soft",
         false},
        {FLAG_SWITCH, "no-sphere", &s->no_sphere, 0, 0, NULL,
         "for comparison: splats see queries and keys as they are, not on the unit sphere", false},
        {FLAG_TEXT, "unbounded", &s->unbounded, 0, 0, "LIST",
         "for comparison: switch bounds of splats off, any of " BOUND_CHOICES ", by commas", false},
        {FLAG_ROOM, NULL, NULL, 0, 0, NULL, "birth and death of splats (gsa/run/adapt.h)", false},
        {FLAG_CHOICE, "adapt", &s->adapt, 0, 0, ADAPT_CHOICES,
         "splats stay as they are; idle and redundant ones move; or they die and are born, up to --splats. Of use "
         "after a bad start (README)",
         false},
        {FLAG_INT, "splats-alive", &s->splats_alive, 0, 65536, NULL,
         "splats of a head that live at the start, of --splats; 0: all", false},
        {FLAG_INT, "adapt-every", &s->adapt_every, 1, 1e9, NULL,
         "steps until the first pass; from then on at least as many, or a tenth of the steps so far; none in the last "
         "30 %",
         false},
        {FLAG_INT, "adapt-life", &s->adapt_life, 0, 1e9, NULL,
         "steps that a new splat lives before it may die, merge, move or split", false},
        {FLAG_REAL, "adapt-activation", &s->adapt_activation, 0, 1, NULL,
         "a splat is idle below this share of an even activation", false},
        {FLAG_REAL, "adapt-overlap", &s->adapt_overlap, 0, 1, NULL,
         "two splats are one too many above this overlap (Bhattacharyya)", false},
        {FLAG_REAL, "adapt-coverage", &s->adapt_coverage, -1e3, 1e3, NULL,
         "splats are born among keys k with ln sum_s phi_s(k) below this, off as it stands: it did not help", false},
        {FLAG_REAL, "adapt-density", &s->adapt_density, 0, 1, NULL,
         "where at least this share of all keys is within a splat's width", false},
        {FLAG_REAL, "adapt-pull", &s->adapt_pull, 0, 1e9, NULL,
         "a splat splits with at least this times its head's mean sum of |dL / d ln phi|", false},
        {FLAG_ROOM, NULL, NULL, 0, 0, NULL, "data", false},
        {FLAG_TEXT, "data", &s->data, 0, 0, "GLOB", "training shards, from data/prepare; made-up stories if not given",
         false},
        {FLAG_TEXT, "val", &s->val, 0, 0, "GLOB", "validation shards; none: no evaluation", false},
        {FLAG_TEXT, "tokenizer", &s->tokenizer, 0, 0, "FILE",
         "the tokenizer that made the shards; stored in the checkpoints", false},
        {FLAG_INT, "vocab", &s->vocab, 258, 65536, NULL, "vocabulary learned from the made-up stories", false},
        {FLAG_SWITCH, "doc-start", &s->doc_start, 0, 0, NULL, "training windows begin at the start of a document",
         false},
        {FLAG_ROOM, NULL, NULL, 0, 0, NULL, "optimisation", false},
        {FLAG_INT, "steps", &s->steps, 1, 1e9, NULL, "updates", false},
        {FLAG_INT, "batch", &s->batch, 1, 65536, NULL, "sequences per pass", false},
        {FLAG_INT, "accum", &s->accum, 1, 65536, NULL, "passes per update, gradients averaged", false},
        {FLAG_REAL, "lr", &s->lr, 0, 10, NULL, "highest learning rate; 0.384 / channels if not given", false},
        {FLAG_REAL, "min-lr", &s->min_lr, 0, 10, NULL, "learning rate at the end; a tenth of --lr if not given", false},
        {FLAG_REAL, "splat-lr", &s->splat_lr, 0, 10, NULL,
         "highest rate of splats' scalars (precision, amplitude, envelope), in the schedule of --lr; ten times --lr, "
         "but at most 0.01, if not given",
         false},
        {FLAG_INT, "warmup", &s->warmup, 0, 1e9, NULL, "steps until the highest rate is reached", false},
        {FLAG_CHOICE, "schedule", &s->schedule, 0, 0, "cosine|wsd|constant",
         "after the warm-up: a cosine; constant, then linear over the last fifth; constant", false},
        {FLAG_REAL, "weight-decay", &s->weight_decay, 0, 10, NULL, "of matrices and embeddings", false},
        {FLAG_REAL, "beta1", &s->beta1, 0, 0.9999, NULL, "AdamW: memory of the gradient", false},
        {FLAG_REAL, "beta2", &s->beta2, 0, 0.999999, NULL, "AdamW: memory of its square", false},
        {FLAG_REAL, "clip", &s->clip, 0, 1e9, NULL,
         "largest gradient norm, of weights and of splat scalars each; 0: no limit", false},
        {FLAG_INT, "seed", &s->seed, 0, 9e15, NULL, "of the starting weights, the order of the data and the samples",
         false},
        {FLAG_TEXT, "init-from", &s->init_from, 0, 0, "FILE",
         "start with the weights of this model: fresh optimiser and schedule", false},
        {FLAG_SWITCH, "overfit-batch", &s->overfit_batch, 0, 0, NULL,
         "train on the first batch again and again: a test of the code", false},
        {FLAG_ROOM, NULL, NULL, 0, 0, NULL, FREE, false},
        {FLAG_TEXT, "out", &s->out, 0, 0, "DIR", "checkpoints and main.log go here", false},
        {FLAG_SWITCH, "resume", &s->resume, 0, 0, NULL, "go on from the newest checkpoint in --out, with its settings",
         false},
        {FLAG_SWITCH, "recompute", &s->recompute, 0, 0, NULL,
         "keep only the input of each block and compute it again in the backward pass: less memory, same numbers",
         false},
        {FLAG_INT, "eval-every", &s->eval_every, 0, 1e9, NULL, "steps between evaluations; 0: none", false},
        {FLAG_INT, "eval-tokens", &s->eval_tokens, 1, 1e12, NULL, "validation tokens per evaluation, at most", false},
        {FLAG_INT, "sample-every", &s->sample_every, 0, 1e9, NULL, "steps between samples of text; 0: none", false},
        {FLAG_INT, "save-every", &s->save_every, 0, 1e9, NULL, "steps between checkpoints; 0: only at the end", false},
        {FLAG_INT, "keep", &s->keep, 0, 1e9, NULL, "checkpoints kept, the newest; 0: all", false},
        {FLAG_INT, "threads", &s->threads, 0, 4096, NULL, "CPU threads; 0: what OpenMP chooses, as a rule one a core",
         false},
        {FLAG_ROOM, NULL, NULL, 0, 0, NULL, NULL, false},
    };
    memcpy(flags, table, sizeof table);
}
enum { MAX_FLAGS = 96 };

/* "name=value\n" for every flag but the two that say which run it is: what a state file stores */
static char *settings_text(const Flag *flags) {
    char *text = xstrdup("");
    for (const Flag *f = flags; f->help; f++) {
        char value[512];
        if (f->kind == FLAG_ROOM || strcmp(f->name, "out") == 0 || strcmp(f->name, "resume") == 0) continue;
        flag_text(f, value, sizeof value);
        char *longer = xasprintf("%s%s=%s\n", text, f->name, value);
        free(text);
        text = longer;
    }
    return text;
}

/* Takes all settings from the text; a flag that was given and differs is refused, unless it is a free one, which
   then wins. */
static void settings_from_text(Flag *flags, const char *text, size_t bytes, const char *path) {
    const Flag *first_free = flags;
    while (first_free->kind != FLAG_ROOM || strcmp(first_free->help, FREE) != 0) first_free++;
    char *copy = (char *)xmalloc(bytes + 1); /* never freed: flags point into it */
    memcpy(copy, text, bytes);
    copy[bytes] = 0;
    for (char *line = copy, *next; *line; line = next) {
        next = line + strcspn(line, "\n");
        if (*next) *next++ = 0;
        char *value = strchr(line, '='), error[256], given[512];
        Flag *f = NULL;
        if (value) {
            *value++ = 0;
            f = find_flag(flags, line);
        }
        if (!f) die("%s: unknown setting '%.60s'; it was written by another version of this program", path, line);
        if (f->given) {
            flag_text(f, given, sizeof given);
            if (f < first_free && strcmp(given, value) != 0)
                die("--%s %s contradicts the run to be resumed, where it is '%s' (%s); leave it out, or start a new "
                    "run with --init-from",
                    f->name, given, value, path);
        } else if (*value || f->kind == FLAG_TEXT) {
            if (f->kind == FLAG_TEXT && !*value) continue;
            if (!set_flag(f, value, error)) die("%s: %s", path, error);
        }
    }
}

static void print_settings(const Flag *flags, FILE *log, int64_t step) {
    fprintf(log, "s:%lld cfg:1", (long long)step);
    int column = 0;
    for (const Flag *f = flags; f->help; f++) {
        char value[512];
        if (f->kind == FLAG_ROOM) {
            column =
                printf("%s%-13s ", f == flags ? "" : "\n", strcmp(f->help, FREE) == 0 ? "run" : f->help) - (f != flags);
            continue;
        }
        flag_text(f, value, sizeof value);
        if (!value[0] || strcmp(value, "no") == 0) continue;
        if (column > 90) column = printf("\n%14s", "") - 1;
        column += printf("%s %s  ", f->name, value);
        fprintf(log, " %s=%s", f->name, value);
    }
    printf("\n");
    fprintf(log, "\n");
}

/* The shape from --depth, --preset and the single flags, the latter winning. */
static void resolve_shape(Settings *s, Flag *flags) {
    static const struct {
        const char *name;
        int64_t layers, heads, channels;
    } presets[] = {{"gpt2-124m", 12, 12, 768}, {"gpt2-350m", 24, 16, 1024}, {"gpt2-774m", 36, 20, 1280}};
    int64_t layers = s->depth, heads = s->depth, channels = 64 * s->depth;
    if (s->preset && find_flag(flags, "depth")->given)
        die_usage("--depth and --preset both set the shape: give one of them");
    for (size_t i = 0; s->preset && i < sizeof presets / sizeof *presets; i++)
        if (strcmp(presets[i].name, s->preset) == 0) {
            layers = presets[i].layers;
            heads = presets[i].heads;
            channels = presets[i].channels;
            if (!find_flag(flags, "seq")->given) s->seq = 1024;
        }
    if (!s->layers) s->layers = layers;
    if (!s->heads) s->heads = heads;
    if (!s->channels) s->channels = channels;
}

static double six_digits(double x) { /* the number that is printed is the number that is used */
    char text[32];
    snprintf(text, sizeof text, "%.6g", x);
    return strtod(text, NULL);
}

/* The smaller the model, the larger its rate: 3e-3 at 128 channels, 5e-4 at GPT-2's 768. Splats' scalars are
   logarithms and do not know how large the model is: beyond 0.01 some seeds end far worse than others (dev/LOG.md). */
static void resolve_rates(Settings *s, Flag *flags, const Config *c) {
    bool splats = config_gsa_heads(c) > 0;
    if (!splats && find_flag(flags, "splat-lr")->given) die_usage("--splat-lr is for splats, and this model has none");
    if (!find_flag(flags, "lr")->given) s->lr = six_digits(0.384 / c->C);
    if (!find_flag(flags, "min-lr")->given) s->min_lr = six_digits(s->lr / 10);
    if (!find_flag(flags, "splat-lr")->given) s->splat_lr = splats ? six_digits(fmin(10 * s->lr, 0.01)) : 0;
}

static Config make_config(Settings *s, const Tokenizer *t, Flag *flags) {
    static const char *const of_splats[] = {
        "mixer",           "splats",           "envelope",      "covariance",     "splat-init",    "splat-precision",
        "splat-amplitude", "no-sphere",        "unbounded",     "adapt",          "splats-alive",  "adapt-every",
        "adapt-life",      "adapt-activation", "adapt-overlap", "adapt-coverage", "adapt-density", "adapt-pull"};
    Config c;
    memset(&c, 0, sizeof c);
    c.T = (int)s->seq;
    c.V = tokenizer_vocab_size(t);
    c.L = (int)s->layers;
    c.NH = (int)s->heads;
    c.C = (int)s->channels;
    c.position = choice_index(POSITION_CHOICES, s->position);
    c.attention = choice_index(ATTENTION_CHOICES, s->attention);
    c.objective = choice_index(OBJECTIVE_CHOICES, s->objective);
    /* a [MASK] of the padding needs some padding */
    int rows = c.objective == OBJECTIVE_MLM && tokenizer_mask(t) == c.V ? c.V + 1 : c.V;
    c.Vp = (rows + 127) / 128 * 128;
    if (c.attention == ATTENTION_EXTEND && !find_flag(flags, "window")->given) s->window = 64;
    c.window = (int)s->window;
    const char *wrong = config_head_map(&c, s->gsa_heads);
    for (size_t i = 0; i < sizeof of_splats / sizeof *of_splats && c.attention == ATTENTION_STANDARD; i++)
        if (find_flag(flags, of_splats[i])->given)
            die_usage("--%s is for splats, and --attention standard has none", of_splats[i]);
    if (c.attention != ATTENTION_STANDARD) { /* a standard model keeps zeros in these fields, whatever the defaults */
        int d = c.NH > 0 && c.C % c.NH == 0 ? c.C / c.NH : 0;
        if (!s->mixer) s->mixer = c.attention == ATTENTION_EXTEND ? "linear" : "softmax";
        c.mixer = choice_index(MIXER_CHOICES, s->mixer);
        if (!s->envelope) s->envelope = c.mixer == MIXER_LINEAR ? "raised" : "cosine";
        c.envelope = choice_index(ENVELOPE_CHOICES, s->envelope);
        c.covariance = choice_index(COVARIANCE_CHOICES, s->covariance);
        if (!s->splats) s->splats = c.mixer == MIXER_LINEAR ? 16 : c.envelope == ENVELOPE_COSINE ? d / 2 : d;
        c.S = (int)s->splats;
        c.raw = s->no_sphere;
        for (const char *p = s->unbounded; p && *p; p += strcspn(p, ","), p += *p == ',') {
            char word[16];
            snprintf(word, sizeof word, "%.*s", (int)strcspn(p, ","), p);
            int bound = choice_index(BOUND_CHOICES, word);
            if (bound < 0)
                die_usage("--unbounded takes any of %s, separated by commas, not '%.40s'", BOUND_CHOICES, s->unbounded);
            c.unbounded |= 1 << bound;
        }
        if (c.mixer != MIXER_SOFTMAX && find_flag(flags, "splat-amplitude")->given)
            die_usage("--splat-amplitude is for softmax; the linear mixer divides by the sum of its weights");
        if (s->splats_alive > c.S)
            die_usage("--splats-alive %lld: a head has %d splats", (long long)s->splats_alive, c.S);
    }
    if (!wrong) wrong = config_check(&c);
    if (wrong) die_usage("%s", wrong);
    return c;
}

/* --init-from: the file's configuration, where no flag contradicts it. Without learned positions any length will do. */
static Config config_from_file(Settings *s, Flag *flags, const Checkpoint *k) {
    Config c = k->config;
    char text[512];
    struct {
        const char *flag, *choices;
        int value;
    } shape[] = {{"layers", NULL, c.L},
                 {"heads", NULL, c.NH},
                 {"channels", NULL, c.C},
                 {"pos", POSITION_CHOICES, c.position},
                 {"attention", ATTENTION_CHOICES, c.attention},
                 {"objective", OBJECTIVE_CHOICES, c.objective},
                 {"mixer", MIXER_CHOICES, c.mixer},
                 {"window", NULL, c.window},
                 {"splats", NULL, c.S},
                 {"envelope", ENVELOPE_CHOICES, c.envelope},
                 {"covariance", COVARIANCE_CHOICES, c.covariance}};
    for (size_t i = 0; i < sizeof shape / sizeof *shape; i++) {
        Flag *f = find_flag(flags, shape[i].flag);
        char value[64], error[256];
        if (shape[i].choices) choice_name(shape[i].choices, shape[i].value, value, sizeof value);
        else snprintf(value, sizeof value, "%d", shape[i].value);
        flag_text(f, text, sizeof text);
        if (f->given && strcmp(text, value) != 0)
            die_usage("--%s %s contradicts %s, where it is %s", f->name, text, k->path, value);
        if (!set_flag(f, shape[i].choices ? xstrdup(value) : value, error)) die("%s: %s", k->path, error);
    }
    const char *fixed[] = {"depth",           "preset",    "gsa-heads", "splat-init",  "splat-precision",
                           "splat-amplitude", "no-sphere", "unbounded", "splats-alive"};
    for (size_t i = 0; i < sizeof fixed / sizeof *fixed; i++)
        if (find_flag(flags, fixed[i])->given)
            die_usage("--%s does not go with --init-from: shape and splats are those of %s", fixed[i], k->path);
    if (!find_flag(flags, "seq")->given) s->seq = c.T;
    if (s->seq != c.T && c.position != POSITION_ROPE)
        die_usage("--seq %lld: %s has learned positions for %d tokens and no others", (long long)s->seq, k->path, c.T);
    c.T = (int)s->seq;
    return c;
}

/* ---------------------------------------------------------------------- data */

/* Made-up stories as tokens, each behind its <|endoftext|>, until there are `wanted` tokens. */
static uint16_t *story_tokens(const Tokenizer *t, uint64_t seed, size_t wanted, size_t *count) {
    int *ids = NULL;
    size_t n = 0, room = 0;
    uint16_t *tokens = NULL;
    size_t have = 0, size = 0;
    for (uint64_t i = 0; have < wanted; i++) {
        size_t bytes;
        char *text = story(seed, i, &bytes);
        n = 0;
        tokenizer_encode(t, text, bytes, false, &ids, &n, &room);
        free(text);
        if (have + n + 1 > size) tokens = (uint16_t *)xrealloc(tokens, (size = 2 * (have + n + 1)) * sizeof *tokens);
        tokens[have++] = (uint16_t)tokenizer_eot(t);
        for (size_t k = 0; k < n; k++) tokens[have++] = (uint16_t)ids[k];
    }
    free(ids);
    *count = have;
    return tokens;
}

/* BERT's masking: 15 % of the tokens are to be predicted (y; -1 elsewhere), and of these 80 % become [MASK], 10 %
   any token and 10 % stay in x. The choice depends on rng alone. At least one token of the batch is chosen. */
static void mask_tokens(int *x, int *y, size_t n, int V, int mask, uint64_t rng) {
    size_t chosen = 0;
    for (size_t i = 0; i < n; i++) {
        bool choose = rng_uniform(&rng) < 0.15 || (i + 1 == n && chosen == 0);
        double fate = rng_uniform(&rng);
        int other = (int)rng_below(&rng, (uint64_t)V);
        y[i] = choose ? x[i] : -1;
        if (!choose) continue;
        x[i] = fate < 0.8 ? mask : fate < 0.9 ? other : x[i];
        chosen++;
    }
}

/* ---------------------------------------------------------------------- checkpoints of a run */

static char *run_path(const char *out, const char *kind, int64_t step) {
    return xasprintf("%s/%s_%08lld.bin", out, kind, (long long)step);
}

/* Steps for which OUT holds a model file, ascending. */
static int64_t *saved_steps(const char *out, int *count) {
    char *pattern = xasprintf("%s/model_????????.bin", out);
    char **files = glob_files(pattern, count);
    int64_t *steps = (int64_t *)xmalloc((size_t)(*count + 1) * sizeof *steps);
    for (int i = 0; i < *count; i++) steps[i] = strtoll(strrchr(files[i], '_') + 1, NULL, 10);
    free_files(files, *count);
    free(pattern);
    return steps;
}

typedef struct {
    const Backend *backend;
    void *model;
    Config config;
    const Settings *settings;
    char *settings_text;
    void *tokenizer_bytes;
    size_t tokenizer_size;
    const char *out;
    int64_t step; /* updates done */
    Loader *train;
    int mask;     /* id of [MASK] */
    Adapt *adapt; /* NULL: no GSA heads */
    AdaptRules rules;
} Run;

/* The next batch: what follows each token, or, for an encoder, what is masked; the masks depend on `draw`. */
static void next_batch(const Run *r, Loader *l, int *x, int *y, int B, uint64_t draw) {
    loader_next(l, x, y, B);
    if (r->config.objective == OBJECTIVE_MLM)
        mask_tokens(x, y, (size_t)B * (size_t)r->config.T, r->config.V, r->mask,
                    rng_mix((uint64_t)r->settings->seed, draw));
}

static void save(Run *r) {
    Entry entries[2 * NUM_TENSORS + 2];
    const void *data[2 * NUM_TENSORS + 2];
    int n = 0;
    LoaderState at = loader_state(r->train);
    int64_t position[] = {r->step, (int64_t)at.epoch, (int64_t)at.window, (int64_t)loader_tokens(r->train)};
    int64_t length = sizeof position / sizeof *position, text_length = (int64_t)strlen(r->settings_text);
    char *state = run_path(r->out, "state", r->step), *model = run_path(r->out, "model", r->step);
    size_t total;
    Tensor tensors[NUM_TENSORS];
    total = model_tensors(&r->config, tensors);
    /* a back end's view is valid only until the next */
    float *m = (float *)xmalloc(2 * total * sizeof *m), *v = m + total;
    memcpy(m, r->backend->read(r->model, BUFFER_ADAM_M), total * sizeof *m);
    memcpy(v, r->backend->read(r->model, BUFFER_ADAM_V), total * sizeof *v);
    data[n] = r->settings_text;
    entries[n++] = checkpoint_entry("settings", TYPE_BYTES, 1, &text_length);
    data[n] = position;
    entries[n++] = checkpoint_entry("position", TYPE_I64, 1, &length);
    checkpoint_add_tensors(&r->config, "adam_m.", m, entries, data, &n);
    checkpoint_add_tensors(&r->config, "adam_v.", v, entries, data, &n);
    checkpoint_write(state, CHECKPOINT_STATE, &r->config, r->step, entries, data, n);
    free(m);

    n = 0;
    length = (int64_t)r->tokenizer_size;
    data[n] = r->tokenizer_bytes;
    entries[n++] = checkpoint_entry("tokenizer", TYPE_BYTES, 1, &length);
    checkpoint_add_tensors(&r->config, "", r->backend->read(r->model, BUFFER_PARAMS), entries, data, &n);
    /* in the model: the next run from it goes on with them, and infer shows them */
    if (r->adapt) adapt_add_entries(r->adapt, entries, data, &n);
    /* last: a step counts when both are whole */
    checkpoint_write(model, CHECKPOINT_MODEL, &r->config, r->step, entries, data, n);
    printf("saved %s\n", model);
    free(state);
    free(model);

    int count;
    int64_t *steps = saved_steps(r->out, &count);
    for (int i = 0; r->settings->keep > 0 && i < count - r->settings->keep; i++) {
        char *old_model = run_path(r->out, "model", steps[i]), *old_state = run_path(r->out, "state", steps[i]);
        unlink(old_model);
        unlink(old_state);
        free(old_model);
        free(old_state);
    }
    free(steps);
}

/* The newest step in OUT whose two files are whole; dies where there is none. */
static int64_t newest_step(const char *out) {
    int count;
    int64_t *steps = saved_steps(out, &count), step = -1;
    for (int i = count - 1; i >= 0 && step < 0; i--) {
        char *model = run_path(out, "model", steps[i]), *state = run_path(out, "state", steps[i]);
        if (checkpoint_is_whole(model, CHECKPOINT_MODEL) && checkpoint_is_whole(state, CHECKPOINT_STATE))
            step = steps[i];
        else warn("step %lld in %s is not whole and is passed over", (long long)steps[i], out);
        free(model);
        free(state);
    }
    if (step < 0) die("--resume: %s holds no checkpoint to go on from; start without --resume", out);
    free(steps);
    return step;
}

/* ---------------------------------------------------------------------- memory */

static size_t memory_sum(const Backend *backend, const Config *c, int B, size_t bytes[NUM_MEMORY]) {
    size_t sum = 0;
    backend->memory(c, B, bytes);
    for (int i = 0; i < NUM_MEMORY; i++) sum += bytes[i];
    return sum;
}

static bool memory_fits(const Backend *backend, Config c, int T, int B, size_t room) {
    size_t bytes[NUM_MEMORY];
    c.T = T;
    return memory_sum(backend, &c, B, bytes) <= room;
}

/* The largest batch below B, the largest length below T (a multiple of 1,024 where it is at least that) that fit
   into `room` bytes; 0: none does. One by one, because less is not always smaller: up to 65,536 tokens, logits are
   made in one piece. */
static int largest_batch(const Backend *backend, const Config *c, int B, size_t room) {
    while (--B > 0 && !memory_fits(backend, *c, c->T, B, room))
        ;
    return B;
}
static int largest_seq(const Backend *backend, const Config *c, int B, size_t room) {
    for (int T = c->T - 1, step; T > 0; T -= step) {
        step = T > 1024 ? 1024 : 1;
        T = T / step * step;
        if (memory_fits(backend, *c, T, B, room)) return T;
    }
    return 0;
}

/* text and one more way out; frees both */
static char *add_advice(char *text, char *more) {
    char *longer = xasprintf("%s%s%s", text, *text ? "; or " : "", more);
    free(text);
    free(more);
    return longer;
}

/* Prints what the run takes, by group. Where that is more than what is free, ends the program with a sentence that
   says what would fit. */
static void check_memory(const Backend *backend, const Config *config, int B, int64_t accum) {
    static const char *const names[NUM_MEMORY] = {
#define X(name, text) text,
        MEMORY_GROUPS(X)
#undef X
    };
    const double MiB = 1 << 20, GiB = 1 << 30;
    size_t bytes[NUM_MEMORY], sum = memory_sum(backend, config, B, bytes), room = backend->free_memory();
    int column = printf("memory, MiB   ");
    for (int i = 0; i < NUM_MEMORY; i++) {
        if (bytes[i] == 0) continue;
        if (column > 90) column = printf("\n%14s", "") - 1;
        column += printf("%s %.1f  ", names[i], (double)bytes[i] / MiB);
    }
    printf("sum %.1f\n", (double)sum / MiB);
    if (room == 0 || sum <= room) return;
    fflush(stdout);
    char *advice = xstrdup("");
    for (int recompute = config->recompute; recompute < 2; recompute++) { /* as it is, then with --recompute */
        Config c = *config;
        c.recompute = recompute;
        const char *with = recompute == config->recompute ? "" : "--recompute and ";
        size_t needed = memory_sum(backend, &c, B, bytes);
        if (needed <= room) {
            advice = add_advice(advice, xasprintf("--recompute, which needs %.1f GiB", (double)needed / GiB));
            break;
        }
        int batch = largest_batch(backend, &c, B, room), seq = largest_seq(backend, &c, B, room);
        if (batch)
            advice = add_advice(advice, xasprintf("%s--batch %d, with --accum %lld for as many tokens a step", with,
                                                  batch, (long long)((B * accum + batch - 1) / batch)));
        if (seq) advice = add_advice(advice, xasprintf("%s--seq %d", with, seq));
    }
    die("this run needs %.1f GiB of memory and %.1f are free; %s%s", (double)sum / GiB, (double)room / GiB,
        *advice ? "these would fit: " : "choose a smaller model: no --batch or --seq would fit", advice);
}

/* ---------------------------------------------------------------------- evaluation, samples */

static double evaluate(Run *r, Loader *val, int *x, int *y) {
    int B = (int)r->settings->batch, T = r->config.T;
    uint64_t windows = loader_windows(val), batches;
    if (windows < (uint64_t)B) B = (int)windows;
    batches = (uint64_t)r->settings->eval_tokens / ((uint64_t)B * (uint64_t)T);
    if (batches > windows / (uint64_t)B) batches = windows / (uint64_t)B;
    if (batches < 1) batches = 1;
    LoaderState start = {0, 0};
    double sum = 0;
    loader_set_state(val, start);
    for (uint64_t i = 0; i < batches; i++) {
        next_batch(r, val, x, y, B, ~i); /* the same masks in every evaluation */
        sum += r->backend->forward(r->model, x, y, B, T);
    }
    return sum / (double)batches;
}

typedef struct {
    Run *run;
    int tokens;
} Measured;

static void read_head(void *from, int l, int h, int part, float *out) { /* of all tokens of the last forward pass */
    const Measured *m = (const Measured *)from;
    m->run->backend->head(m->run->model, l, h, part, m->tokens, out);
}

/* Entropy, distance and reach of all heads on the first tokens of the validation data: one line of the log, the
   heads in order of layer and head. */
static HeadMeasure measure(Run *r, Loader *val, int *x, int *y, FILE *log) {
    size_t T = (size_t)r->config.T, n = T < MEASURE_TOKENS ? T : MEASURE_TOKENS,
           heads = (size_t)r->config.L * (size_t)config_heads(&r->config);
    LoaderState start = {0, 0};
    HeadMeasure *each = (HeadMeasure *)xmalloc(heads * sizeof *each);
    loader_set_state(val, start);
    next_batch(r, val, x, y, 1, ~0ull);
    r->backend->forward(r->model, x, NULL, 1, (int)n);
    Measured from = {r, (int)n};
    HeadMeasure mean = measure_heads(&r->config, r->backend->read(r->model, BUFFER_PARAMS), n, read_head, &from, each);
    fprintf(log, "s:%lld ent:%.5g dst:%.5g rch:%.5g ents:", (long long)r->step, mean.entropy, mean.distance,
            mean.reach);
    for (size_t h = 0; h < heads; h++) fprintf(log, "%s%.4g", h ? "," : "", each[h].entropy);
    fprintf(log, " dsts:");
    for (size_t h = 0; h < heads; h++) fprintf(log, "%s%.4g", h ? "," : "", each[h].distance);
    fprintf(log, "\n");
    free(each);
    return mean;
}

static void print_sample(Run *r, const Tokenizer *tokenizer, int *x) {
    Sampler sampler = {.repetition = 1,
                       .temperature = 0.8,
                       .top_p = 0.95,
                       .rng = rng_mix((uint64_t)r->settings->seed, (uint64_t)r->step)};
    int most = r->config.T < 128 ? r->config.T : 128, n = 1;
    float *logits = (float *)xmalloc((size_t)r->config.V * sizeof *logits);
    x[0] = tokenizer_eot(tokenizer);
    printf("--- sample after step %lld: ", (long long)r->step);
    while (n < most) {
        r->backend->forward(r->model, x, NULL, 1, n);
        r->backend->logits(r->model, 0, n - 1, logits);
        x[n] = sample_token(&sampler, logits, r->config.V, NULL, 0);
        if (x[n] < 0 || x[n] == tokenizer_eot(tokenizer)) break; /* below 0: the loss will say that it is not finite */
        size_t bytes;
        const char *piece = tokenizer_piece(tokenizer, x[n], &bytes);
        if (piece) fwrite(piece, 1, bytes, stdout);
        n++;
    }
    printf("\n---\n");
    free(logits);
}

/* --splat-init: centres from the keys that the untrained model makes of the first batch, or the splats of another
   model. */
static void start_splats(Run *r, const Tensor *tensors, float *params) {
    const Config *c = &r->config;
    int d = config_head_size(c), B = (int)r->settings->batch;
    size_t n = (size_t)B * (size_t)c->T;
    bool kmeans = strcmp(r->settings->splat_init, "kmeans") == 0;
    if (kmeans || strcmp(r->settings->splat_init, "pca") == 0) {
        int *x = (int *)xmalloc(2 * n * sizeof *x);
        float *keys = (float *)xmalloc(n * (size_t)d * sizeof *keys);
        LoaderState before = loader_state(r->train);
        next_batch(r, r->train, x, x + n, B, 0);
        loader_set_state(r->train, before);
        r->backend->forward(r->model, x, NULL, B, c->T);
        for (int l = 0; l < c->L; l++)
            for (int h = 0; h < config_heads(c); h++) {
                if (!config_is_gsa(c, l, h)) continue;
                size_t g = (size_t)config_gsa_before(c, l, h);
                r->backend->head(r->model, l, h, 1, (int)n, keys);
                (kmeans ? start_kmeans
                        : start_components)(params + tensors[TENSOR_mu].offset + g * (size_t)c->S * (size_t)d, c->S,
                                            keys, n, d, rng_mix((uint64_t)r->settings->seed, g));
            }
        free(x);
        free(keys);
    } else {
        Checkpoint *other = checkpoint_open(r->settings->splat_init, CHECKPOINT_MODEL);
        start_from_file(c, params, other);
        checkpoint_close(other);
    }
    r->backend->write(r->model, BUFFER_PARAMS, params);
}

/* ---------------------------------------------------------------------- birth and death of splats */

/* A window of statistics from the last forward and backward pass. True: the data has shifted. */
static bool watch_splats(Run *r, const Tensor *tensors) {
    Adapt *a = r->adapt;
    const Backend *b = r->backend;
    int available =
        (int)(r->settings->batch * r->config.T < ADAPT_TOKENS ? r->settings->batch * r->config.T : ADAPT_TOKENS);
    float *rows = (float *)xmalloc(((size_t)available * (size_t)config_head_size(&r->config) + a->count + a->G * a->S) *
                                   sizeof *rows);
    float *splats = rows + (size_t)available * (size_t)config_head_size(&r->config), *sums = splats + a->count;
    for (int l = 0; l < r->config.L; l++)
        for (int h = 0; h < config_heads(&r->config); h++)
            for (int part = 0; part < 2 && config_is_gsa(&r->config, l, h); part++) {
                b->head(r->model, l, h, part, available, rows);
                adapt_sample(a, config_gsa_before(&r->config, l, h), part, rows, available);
            }
    b->get(r->model, BUFFER_PARAMS, a->first, a->count, splats);
    b->get(r->model, BUFFER_GRADS, tensors[TENSOR_alive].offset, a->G * a->S, sums);
    bool shifted = adapt_window(a, r->step + 1, splats, sums);
    free(rows);
    return shifted;
}

static void layer_and_head(const Config *c, int g, int *layer, int *head) {
    for (int l = 0; l < c->L; l++)
        for (int h = 0; h < config_heads(c); h++)
            if (config_is_gsa(c, l, h) && config_gsa_before(c, l, h) == g) {
                *layer = l;
                *head = h;
            }
}

/* One pass: the splats of all heads to the host, edited there and back. */
static void adapt_splats(Run *r, FILE *log) {
    Adapt *a = r->adapt;
    const int buffers[] = {BUFFER_PARAMS, BUFFER_ADAM_M, BUFFER_ADAM_V};
    float *parts = (float *)xmalloc(3 * a->count * sizeof *parts);
    AdaptEvent *events = (AdaptEvent *)xmalloc(((size_t)adapt_room(a) + 1) * sizeof *events);
    for (int i = 0; i < 3; i++) r->backend->get(r->model, buffers[i], a->first, a->count, parts + (size_t)i * a->count);
    int count = adapt_pass(a, &r->rules, r->step, parts, parts + a->count, parts + 2 * a->count, events);
    for (int i = 0; i < 3 && count; i++)
        r->backend->put(r->model, buffers[i], a->first, a->count, parts + (size_t)i * a->count);
    for (int i = 0; i < count; i++) {
        int l = 0, h = 0;
        layer_and_head(&r->config, events[i].g, &l, &h);
        fprintf(log, "s:%lld adp:%s l:%d h:%d slot:%d", (long long)r->step, adapt_event_names[events[i].kind], l, h,
                events[i].slot);
        if (events[i].from >= 0) fprintf(log, " from:%d", events[i].from);
        fprintf(log, " act:%.6g\n", (double)events[i].activation);
    }
    free(parts);
    free(events);
}

/* What has become of the splats: a line for the reader and one for the log. */
static void report_splats(Run *r, FILE *log) {
    const Adapt *a = r->adapt;
    const int64_t *n = a->numbers + ADAPT_EVENTS;
    float *splats = (float *)xmalloc(a->count * sizeof *splats);
    int alive = 0, fewest = (int)a->S;
    double coverage = 0;
    r->backend->get(r->model, BUFFER_PARAMS, a->first, a->count, splats);
    for (size_t g = 0; g < a->G; g++) {
        int here = adapt_alive(&r->config, (int)g, splats);
        alive += here;
        fewest = here < fewest ? here : fewest;
        coverage += (double)a->coverage[g] / (double)a->G;
    }
    if (r->rules.mode != ADAPT_NONE)
        printf("splats: %d of %zu alive, at least %d a head | %lld births, %lld splits, %lld moves, %lld deaths, %lld "
               "merges | coverage %.3f | %lld shifts\n",
               alive, a->G * a->S, fewest, (long long)n[ADAPT_BIRTH], (long long)n[ADAPT_SPLIT],
               (long long)n[ADAPT_MOVE], (long long)n[ADAPT_DEATH], (long long)n[ADAPT_MERGE], coverage,
               (long long)a->numbers[ADAPT_SHIFTS]);
    fprintf(log,
            "s:%lld adp:state alive:%d fewest:%d births:%lld splits:%lld moves:%lld deaths:%lld merges:%lld "
            "coverage:%.6g shifts:%lld\n",
            (long long)r->step, alive, fewest, (long long)n[ADAPT_BIRTH], (long long)n[ADAPT_SPLIT],
            (long long)n[ADAPT_MOVE], (long long)n[ADAPT_DEATH], (long long)n[ADAPT_MERGE], coverage,
            (long long)a->numbers[ADAPT_SHIFTS]);
    Tensor tensors[NUM_TENSORS];
    model_tensors(&r->config, tensors);
    const float *lives = splats + (tensors[TENSOR_alive].offset - a->first);
    for (size_t g = 0; g < a->G; g++) { /* activation by slot, of dead ones a dash */
        int l = 0, h = 0;
        layer_and_head(&r->config, (int)g, &l, &h);
        fprintf(log, "s:%lld adp:act l:%d h:%d", (long long)r->step, l, h);
        for (size_t s = 0; s < a->S; s++)
            if (lives[g * a->S + s] > 0) fprintf(log, " %.3g", adapt_activation(a, g, s));
            else fprintf(log, " -");
        fprintf(log, "\n");
    }
    free(splats);
}

/* ---------------------------------------------------------------------- the loop */

static volatile sig_atomic_t interrupted;

static void on_signal(int number) {
    if (interrupted) _exit(130); /* asked twice */
    interrupted = number;
}

/* The schedule between the rates `high` and `low`. */
static double learning_rate(const Settings *s, double high, double low, int64_t step) {
    double share = s->steps > s->warmup ? (double)(step - s->warmup) / (double)(s->steps - s->warmup) : 1;
    if (step < s->warmup) return high * (double)(step + 1) / (double)s->warmup;
    if (strcmp(s->schedule, "cosine") == 0) return low + 0.5 * (high - low) * (1 + cos(3.141592653589793 * share));
    double tail = (double)(s->steps - step) / (0.2 * (double)s->steps);
    if (strcmp(s->schedule, "wsd") == 0 && tail < 1) return low + (high - low) * tail;
    return high;
}

static void duration(double seconds, char *out, size_t room) {
    long t = (long)(seconds + 0.5);
    if (t >= 3600) snprintf(out, room, "%ldh%02ldm", t / 3600, t / 60 % 60);
    else snprintf(out, room, "%ldm%02lds", t / 60, t % 60);
}

/* "3 centres, 1 amplitude"; static memory */
static const char *bounds_text(const int64_t clamped[NUM_BOUNDS]) {
    static const char *const names[NUM_BOUNDS] = {"precision", "centre", "amplitude", "frequency", "decay", "gain"};
    static char text[256];
    size_t n = 0;
    for (int i = 0; i < NUM_BOUNDS; i++)
        if (clamped[i])
            n += (size_t)snprintf(text + n, sizeof text - n, "%s%s %lld", n ? ", " : "", names[i],
                                  (long long)clamped[i]);
    return n ? text : "none";
}

static void write_log(FILE *log, const char *path) {
    if (fflush(log) != 0 || ferror(log)) die("cannot write %s: %s", path, strerror(errno));
}

/* Updates until the last step or an interrupt; a NaN ends the program with a sentence. Returns the exit status. */
static int train_loop(Run *r, Loader *val, const Tokenizer *tokenizer, FILE *log, const char *log_path) {
    const Settings s = *r->settings;
    const Config config = r->config;
    const Backend *backend = r->backend;
    const int B = (int)s.batch, T = config.T;
    const double tokens_a_step = (double)B * T * (double)s.accum;
    struct sigaction action;
    memset(&action, 0, sizeof action);
    action.sa_handler = on_signal;
    sigaction(SIGINT, &action, NULL);
    sigaction(SIGTERM, &action, NULL);

    const size_t window = (size_t)B * T;
    Tensor tensors[NUM_TENSORS];
    model_tensors(&config, tensors);
    int *x = (int *)xmalloc(2 * window * sizeof *x), *y = x + window;
    double training_time = 0, recent = 0;
    int64_t clamped[NUM_BOUNDS] = {0}; /* splat parameters that the last update left out of bounds */
    int64_t first_step = r->step, saved = s.resume ? r->step : -1;
    if (s.overfit_batch) next_batch(r, r->train, x, y, B, 0);
    int *batch_x = NULL; /* the overfitted batch, safe from evaluations and samples */
    if (s.overfit_batch) {
        batch_x = (int *)xmalloc(2 * window * sizeof *batch_x);
        memcpy(batch_x, x, 2 * window * sizeof *x);
    }
    while (!interrupted) {
        bool last = r->step == s.steps;
        if (val && s.eval_every && (last || r->step % s.eval_every == 0)) {
            double loss = evaluate(r, val, x, y);
            fprintf(log, "s:%lld tel:%.9g\n", (long long)r->step, loss);
            HeadMeasure heads = measure(r, val, x, y, log);
            printf("step %lld/%lld | validation loss %.6f | perplexity %.3f | attention entropy %.2f, distance %.1f\n",
                   (long long)r->step, (long long)s.steps, loss, exp(loss), heads.entropy, heads.distance);
            if (r->adapt && r->adapt->numbers[ADAPT_COUNT_WINDOWS]) report_splats(r, log);
            write_log(log, log_path);
        }
        if (s.sample_every && config.objective == OBJECTIVE_LM && r->step > first_step &&
            (last || r->step % s.sample_every == 0))
            print_sample(r, tokenizer, x);
        fflush(stdout);
        if (last) break;

        double began = now_seconds(), loss = 0, norms[NUM_CLIPS];
        bool watched = r->adapt && adapt_due(r->adapt, &r->rules, r->step + 1), shifted = false;
        backend->zero_gradients(r->model);
        if (r->adapt) backend->watch(r->model, watched);
        for (int64_t i = 0; i < s.accum; i++) {
            if (s.overfit_batch) memcpy(x, batch_x, 2 * window * sizeof *x);
            else next_batch(r, r->train, x, y, B, (uint64_t)(r->step * s.accum + i));
            if (backend->expect) backend->expect(r->model, 1.0 / (double)s.accum);
            loss += backend->forward(r->model, x, y, B, T) / (double)s.accum;
            backend->backward(r->model, 1.0 / (double)s.accum);
        }
        backend->gradient_norms(r->model, norms);
        if (!isfinite(loss) || !isfinite(norms[CLIP_WEIGHTS]) || !isfinite(norms[CLIP_SPLATS]))
            die("step %lld: loss %g, gradient norm %g (weights) and %g (splats), out of bounds before: %s; training "
                "diverged: lower --lr or --clip%s",
                (long long)r->step + 1, loss, norms[CLIP_WEIGHTS], norms[CLIP_SPLATS], bounds_text(clamped),
                saved > 0 ? ", or go on from the last checkpoint" : "");
        Update u;
        u.rate[CLIP_WEIGHTS] = learning_rate(&s, s.lr, s.min_lr, r->step);
        u.rate[CLIP_SPLATS] = learning_rate(&s, s.splat_lr, s.lr > 0 ? s.splat_lr * s.min_lr / s.lr : 0, r->step);
        u.beta1 = s.beta1;
        u.beta2 = s.beta2;
        u.weight_decay = s.weight_decay;
        u.step = r->step + 1;
        for (int c = 0; c < NUM_CLIPS; c++) u.scale[c] = s.clip > 0 && norms[c] > s.clip ? s.clip / norms[c] : 1;
        if (watched) shifted = watch_splats(r, tensors);
        backend->update(r->model, &u, clamped);
        int64_t outside = 0;
        for (int i = 0; i < NUM_BOUNDS; i++) outside += clamped[i];
        r->step++;
        if (shifted) {
            r->adapt->numbers[ADAPT_SHIFTS]++;
            fprintf(log, "s:%lld adp:shift\n", (long long)r->step);
        }
        if (watched && (shifted || r->step >= r->adapt->numbers[ADAPT_NEXT])) {
            if (r->rules.mode != ADAPT_NONE && r->step <= r->rules.end) adapt_splats(r, log);
            adapt_schedule(r->adapt, &r->rules, r->step, shifted);
        }

        double took = now_seconds() - began;
        training_time += took;
        /* the first step also touches all memory for the first time */
        recent = r->step > first_step + 2 ? 0.9 * recent + 0.1 * took : took;
        char left[32];
        duration(recent * (double)(s.steps - r->step), left, sizeof left);
        char share[32] = "";
        if (backend->peak_flops) {
            double peak = backend->peak_flops();
            if (peak > 0)
                snprintf(share, sizeof share, " | MFU %.1f %%",
                         100 * tokens_a_step / recent * config_operations(&config) / peak);
            else snprintf(share, sizeof share, " | MFU n/a");
        }
        printf("step %lld/%lld | loss %.6f | norm %.4f, splats %.4f | lr %.2e | %.0f ms | %.0f tok/s%s | %s left%s%s\n",
               (long long)r->step, (long long)s.steps, loss, norms[CLIP_WEIGHTS], norms[CLIP_SPLATS],
               u.rate[CLIP_WEIGHTS], 1e3 * took, tokens_a_step / recent, share, left,
               outside ? " | put back into bounds: " : "", outside ? bounds_text(clamped) : "");
        fprintf(log, "s:%lld trl:%.9g lr:%.6g norm:%.6g snorm:%.6g clamped:%lld\n", (long long)r->step, loss,
                u.rate[CLIP_WEIGHTS], norms[CLIP_WEIGHTS], norms[CLIP_SPLATS], (long long)outside);
        write_log(log, log_path);
        if (r->step == s.steps || (s.save_every && r->step % s.save_every == 0)) {
            save(r);
            saved = r->step;
        }
    }
    if (interrupted && saved != r->step) save(r);
    if (r->step > first_step)
        printf("%lld steps in %.1f s, %.0f tokens/s; the model is %s/model_%08lld.bin\n",
               (long long)(r->step - first_step), training_time,
               tokens_a_step * (double)(r->step - first_step) / training_time, s.out, (long long)r->step);
    else printf("%s: nothing was left to do at step %lld\n", s.out, (long long)r->step);
    if (interrupted) printf("interrupted; go on with --resume --out %s\n", s.out);

    free(x);
    free(batch_x);
    return interrupted ? 130 : 0;
}

/* Flags, tokenizer, data, model, then the loop. */
int train(int argc, char **argv, const Backend *backend) {
    static Settings s;
    static Flag flags[MAX_FLAGS];
    s = defaults;
    program_name(argv[0]);
    make_flags(flags, &s);
    char *help = xasprintf(usage, argv[0]);
    if (parse_flags(flags, argc, argv, help) > 0) die_usage("'%s' is not a flag; --help lists them all", argv[1]);
    free(help);

    /* settings: of the run to be resumed, of the model to start from, or as given */
    Checkpoint *start = NULL, *state = NULL;
    if (s.resume) {
        if (s.init_from) die_usage("--resume and --init-from exclude each other");
        int64_t step = newest_step(s.out), length;
        char *path = run_path(s.out, "state", step);
        state = checkpoint_open(path, CHECKPOINT_STATE);
        free(path);
        path = run_path(s.out, "model", step);
        start = checkpoint_open(path, CHECKPOINT_MODEL);
        free(path);
        const char *text = (const char *)checkpoint_find(state, "settings", TYPE_BYTES, 0, NULL, &length);
        settings_from_text(flags, text, (size_t)length, state->path);
        if (checkpoint_weight_type(start) != TYPE_F32)
            die("%s holds rounded weights, and a run goes on from its own: begin a new one with --init-from %s",
                start->path, start->path);
        s.init_from = NULL; /* the weights are the run's own now */
    } else {
        int count;
        free(saved_steps(s.out, &count));
        if (count > 0)
            die("%s holds the checkpoints of an earlier run: add --resume to go on with it, or name another folder "
                "with --out",
                s.out);
        if (s.init_from) start = checkpoint_open(s.init_from, CHECKPOINT_MODEL);
    }
#ifdef _OPENMP
    if (s.threads > 0) omp_set_num_threads((int)s.threads);
#else
    if (s.threads > 1)
        die_usage("--threads %lld: this program was built without OpenMP and has one thread", (long long)s.threads);
#endif

    /* tokenizer and configuration */
    Config config;
    Tokenizer *tokenizer;
    if (s.data && !s.tokenizer && !start)
        die_usage("--data needs --tokenizer FILE, the tokenizer that made the shards");
    if (s.val && !s.data) die_usage("--val needs --data: the made-up stories bring their own validation set");
    if (find_flag(flags, "vocab")->given && !s.resume && (s.data || s.tokenizer || start))
        die_usage("--vocab is for the made-up stories; here the tokenizer is given");
    bool shape_from_file = start && !s.resume;
    if (shape_from_file) config = config_from_file(&s, flags, start);
    else if (!s.resume) resolve_shape(&s, flags);
    if (start) {
        tokenizer = checkpoint_tokenizer(start, s.resume ? NULL : s.tokenizer);
    } else if (s.tokenizer) {
        tokenizer = tokenizer_load(s.tokenizer);
    } else {
        size_t bytes;
        char *text = stories((uint64_t)s.seed, 1 << 20, &bytes);
        tokenizer = tokenizer_train(text, bytes, (int)s.vocab, false);
        free(text);
    }
    if (state) config = state->config;
    else if (!shape_from_file) config = make_config(&s, tokenizer, flags);
    if (!state) resolve_rates(&s, flags, &config);
    else if (!find_flag(flags, "splat-lr")->given) s.splat_lr = 10 * s.lr; /* a run of before that flag */
    if (state) checkpoint_match(start, &config);
    config.recompute = s.recompute;

    Run run;
    memset(&run, 0, sizeof run);
    run.backend = backend;
    run.config = config;
    run.settings = &s;
    run.out = s.out;
    run.mask = tokenizer_mask(tokenizer);
    run.settings_text = settings_text(flags);
    run.tokenizer_bytes = tokenizer_to_memory(tokenizer, &run.tokenizer_size);

    /* data */
    const int B = (int)s.batch, T = config.T, eot = s.doc_start ? tokenizer_eot(tokenizer) : -1;
    const double tokens_a_step = (double)B * T * (double)s.accum;
    Loader *val = NULL;
    uint16_t *train_tokens = NULL, *val_tokens = NULL;
    if (s.data) {
        run.train = loader_open(s.data, T, config.V, eot, true, (uint64_t)s.seed);
        if (s.val) val = loader_open(s.val, T, config.V, -1, false, 0);
    } else { /* as many stories as the run needs, within reason; the validation stories are those of another seed */
        size_t n, wanted = (size_t)fmin(fmax(tokens_a_step * (double)s.steps, 4.0 * B * (T + 1)), 16e6);
        train_tokens = story_tokens(tokenizer, (uint64_t)s.seed, wanted, &n);
        run.train =
            loader_from_tokens(train_tokens, n, "the made-up stories", T, config.V, eot, true, (uint64_t)s.seed);
        val_tokens = story_tokens(tokenizer, rng_mix((uint64_t)s.seed, 1), (size_t)fmax(65536, 2.0 * (T + 1)), &n);
        val = loader_from_tokens(val_tokens, n, "the validation stories", T, config.V, -1, false, 0);
    }

    /* the model */
    Tensor tensors[NUM_TENSORS];
    size_t total = model_tensors(&config, tensors), splat_parameters = 0;
    for (int i = 0; i < NUM_TENSORS; i++)
        if (tensors[i].group == GROUP_SCALAR || tensors[i].group == GROUP_CENTRE) splat_parameters += tensors[i].size;
    printf("%s\n", backend->name());
    check_memory(backend, &config, B, s.accum);
    printf("parameters    %zu, of them %zu in the splats of %d GSA heads (of %d heads)\n", model_parameters(&config),
           splat_parameters, config_gsa_heads(&config), config.L * config_heads(&config));
    printf("operations    %.3g MFLOP a token in training\n", config_operations(&config) / 1e6);
    printf("tokens        %llu for training, %llu for validation, vocabulary %d; %.0f a step, %.2f epochs\n",
           (unsigned long long)loader_tokens(run.train), val ? (unsigned long long)loader_tokens(val) : 0ull, config.V,
           tokens_a_step, tokens_a_step * (double)s.steps / ((double)loader_windows(run.train) * T));
    fflush(stdout);
    run.model = backend->create(&config, B);
    float *flat = (float *)xcalloc(total, sizeof *flat);
    if (start) checkpoint_read_tensors(start, "", flat);
    else {
        model_start(&config, flat, (uint64_t)s.seed);
        /* the first forward pass comes before the first update's bounds */
        double precision = !config_bounded(&config, BOUND_PRECISION)
                               ? s.splat_precision
                               : fmin(fmax(s.splat_precision, SPLAT_PRECISION_MIN), SPLAT_PRECISION_MAX);
        if (precision != s.splat_precision)
            printf("--splat-precision %g is out of bounds: all splats start with %g\n", s.splat_precision, precision);
        model_set_precision(&config, flat, precision);
        if (strcmp(s.splat_init, "ball") == 0) adapt_start_ball(&config, flat, (uint64_t)s.seed);
        static const char *const of_model[] = {"splats-alive", "splat-precision", "splat-amplitude"};
        bool model = strcmp(s.splat_init, "random") != 0 && strcmp(s.splat_init, "ball") != 0 &&
                     strcmp(s.splat_init, "kmeans") != 0 && strcmp(s.splat_init, "pca") != 0;
        for (size_t i = 0; i < sizeof of_model / sizeof *of_model && model; i++)
            if (find_flag(flags, of_model[i])->given)
                die_usage("--%s does not go with --splat-init %s: splats are those of that model", of_model[i],
                          s.splat_init);
        if (s.splats_alive) adapt_start_alive(&config, (int)s.splats_alive, flat);
        if (s.splat_amplitude != 1) model_scale_amplitudes(&config, flat, s.splat_amplitude);
    }
    backend->write(run.model, BUFFER_PARAMS, flat);
    if (!start && strcmp(s.splat_init, "random") != 0 && strcmp(s.splat_init, "ball") != 0)
        start_splats(&run, tensors, flat);
    if (state) {
        int64_t four = 4;
        const int64_t *position = (const int64_t *)checkpoint_find(state, "position", TYPE_I64, 1, &four, NULL);
        LoaderState at = {(uint64_t)position[1], (uint64_t)position[2]};
        run.step = position[0];
        if ((uint64_t)position[3] != loader_tokens(run.train) || at.window > loader_windows(run.train))
            die("%s: the training data has %llu tokens now and had %lld then; put the old shards back or start anew "
                "with --init-from",
                state->path, (unsigned long long)loader_tokens(run.train), (long long)position[3]);
        loader_set_state(run.train, at);
        checkpoint_read_tensors(state, "adam_m.", flat);
        backend->write(run.model, BUFFER_ADAM_M, flat);
        checkpoint_read_tensors(state, "adam_v.", flat);
        backend->write(run.model, BUFFER_ADAM_V, flat);
        printf("going on from step %lld of %lld\n", (long long)run.step, (long long)s.steps);
    }
    free(flat);
    if (config_gsa_heads(&config)) {
        run.adapt = adapt_create(&config, s.adapt_every);
        if (start) adapt_read(run.adapt, start, !state);
    } else if (strcmp(s.adapt, "none") != 0) die_usage("--adapt %s is for splats, and this model has none", s.adapt);
    AdaptRules rules = {choice_index(ADAPT_CHOICES, s.adapt),
                        s.adapt_every,
                        s.adapt_life,
                        s.steps * 7 / 10,
                        s.adapt_activation,
                        s.adapt_overlap,
                        s.adapt_coverage,
                        s.adapt_density,
                        s.adapt_pull};
    run.rules = rules;
    checkpoint_close(start);
    checkpoint_close(state);

    make_folder(s.out);
    char *log_path = xasprintf("%s/main.log", s.out);
    FILE *log = xfopen(log_path, s.resume ? "a" : "w");
    print_settings(flags, log, run.step);
    write_log(log, log_path);

    int status = train_loop(&run, val, tokenizer, log, log_path);
    fclose(log);
    backend->destroy(run.model);
    adapt_free(run.adapt);
    loader_free(run.train);
    loader_free(val);
    tokenizer_free(tokenizer);
    free(train_tokens);
    free(val_tokens);
    free(run.settings_text);
    free(run.tokenizer_bytes);
    free(log_path);
    return status;
}
