#include "settings.h"

#include <stdlib.h>

/* ---------------------------------------------------------------------- the table */

static const char usage[] = "usage: %s [flags]\n"
                            "Trains a GPT whose attention heads are standard or Gaussian Splat Attention. Without "
                            "flags: a small hybrid model on\n"
                            "made-up stories, checkpoints in runs/default. Defaults stand in brackets.\n"
                            "MFU of a GPU's step line: tokens/s x operations a token / the card's peak.\n";

#define ROOM(name, heading)
#define X(kind, field, flag, value, ...) .field = value,
static const Settings defaults = {SETTINGS(ROOM, X)};
#undef ROOM
#undef X

typedef struct {
    FlagKind kind;
    const char *flag;
    size_t field; /* offset in Settings */
    double low, high;
    const char *choices;
    int model; /* offset in Config, or NONE */
    int attributes;
    const char *help;
    const char *room; /* of a heading: its short name */
} Setting;

#define RANGE(low, high) low, high, NULL
#define CHOICES(list) 0, 0, list
#define ANY(what) 0, 0, what
#define NO_VALUE 0, 0, NULL
#define MODEL(field) (int)offsetof(Config, field)
#define NONE -1
#define ROOM(name, heading) {FLAG_ROOM, NULL, 0, NO_VALUE, NONE, 0, heading, #name},
#define X(kind, field, flag, value, values, model, attributes, help) \
    {FLAG_##kind, flag, offsetof(Settings, field), values, model, attributes, help, NULL},
static const Setting table[NUM_SETTINGS] = {SETTINGS(ROOM, X)};
#undef ROOM
#undef X

/* flags[NUM_SETTINGS] stays empty: it ends the list for flags.h. */
static void make_flags(Settings *s) {
    *s = defaults;
    for (int i = 0; i < NUM_SETTINGS; i++) {
        const Setting *t = &table[i];
        Flag f = {t->kind, t->flag, (char *)s + t->field, t->low, t->high, t->choices, t->help, false};
        s->flags[i] = f;
    }
}

/* ---------------------------------------------------------------------- the command line */

/* From "every=20" to the text of all rules, so that a state file says what the defaults were. path: where the text came
   from; NULL: the command line. */
static void complete_rules(Settings *s, const char *path) {
    AdaptRules rules = adapt_rules_default();
    char *wrong = s->adapt_rules ? adapt_rules_read(&rules, s->adapt_rules) : NULL;
    if (wrong && path) die("%s: %s", path, wrong);
    if (wrong) die_usage("%s", wrong);
    s->adapt_rules = adapt_rules_text(&rules);
}

void settings_from_command_line(Settings *s, int argc, char **argv) {
    make_flags(s);
    char *help = xasprintf(usage, argv[0]);
    if (parse_flags(s->flags, argc, argv, help) > 0) die_usage("'%s' is not a flag; --help lists them all", argv[1]);
    free(help);
    for (int i = 0; i < NUM_SETTINGS; i++)
        if (table[i].kind == FLAG_TEXT && is_given(s, i) && strchr(*(const char **)s->flags[i].value, '\n'))
            die_usage("--%s holds a line break, and state files store each setting in one line: rename the file or "
                      "folder",
                      table[i].flag);
    if (is_given(s, SETTING_adapt_rules) || !s->resume) complete_rules(s, NULL); /* else the state file has them */
}

/* ---------------------------------------------------------------------- settings in files */

char *settings_text(const Settings *s) {
    char *text = xstrdup("");
    for (int i = 0; i < NUM_SETTINGS; i++) {
        if (table[i].kind == FLAG_ROOM || table[i].attributes & UNSAVED) continue;
        char *value = flag_text(&s->flags[i]), *longer = xasprintf("%s%s=%s\n", text, table[i].flag, value);
        free(value);
        free(text);
        text = longer;
    }
    return text;
}

/* One line of the text; returns which setting it is. The value is kept: the flag points at it. */
static int take_setting(Settings *s, const char *name, const char *value, const char *path) {
    char error[256];
    Flag *f = find_flag(s->flags, name);
    if (!f) die("%s: unknown setting '%.60s'; it was written by another version of this program", path, name);
    if (f->given) {
        char *given = flag_text(f);
        int attributes = table[f - s->flags].attributes;
        bool may_differ = attributes & FREE || (attributes & PLACE && *value);
        /* this one stays open in files, so that either program goes on */
        const char *was = f == &s->flags[SETTING_products] && !*value ? "fp32" : value;
        if (!may_differ && strcmp(given, was) != 0)
            die("--%s %s contradicts the run to be resumed, where it is %s (%s); leave it out, or start a new "
                "run with --init-from",
                name, given, *was ? was : "not given", path);
        free(given);
    } else if (*value && !set_flag(f, value, error)) die("%s: %s", path, error);
    return (int)(f - s->flags);
}

/* Refuses what is given for a run that began before there was such a flag, where it is not what the program did then:
   its default. */
static void check_unstored(const Settings *s, const bool *stored, const char *path) {
    for (int i = 0; i < NUM_SETTINGS; i++) {
        if (stored[i] || !is_given(s, i) || table[i].attributes & (FREE | UNSAVED)) continue;
        Flag before = s->flags[i];
        before.value = (char *)&defaults + table[i].field; /* only read */
        char *given = flag_text(&s->flags[i]), *was = flag_text(&before);
        if (before.kind == FLAG_CHOICE && !*was) { /* a choice that follows from others: what was before is the first */
            free(was);
            was = xasprintf("%.*s", (int)strcspn(before.choices, "|"), before.choices);
        }
        if (strcmp(given, was) != 0)
            die("--%s %s contradicts the run to be resumed, which began before there was this flag (%s); leave it out, "
                "or start a new run with --init-from",
                table[i].flag, given, path);
        free(given);
        free(was);
    }
}

void settings_from_text(Settings *s, const char *text, size_t bytes, const char *path) {
    char *copy = (char *)xmalloc(bytes + 1); /* never freed: settings point into it */
    memcpy(copy, text, bytes);
    copy[bytes] = 0;
    char *old_rules = NULL; /* --adapt-rules was once a flag for each rule: --adapt-every and so on */
    bool stored[NUM_SETTINGS] = {false};
    for (char *line = copy, *next; *line; line = next) {
        next = line + strcspn(line, "\n");
        if (*next) *next++ = 0;
        char *value = strchr(line, '=');
        if (!value) die("%s is damaged: its settings hold '%.60s', which is no name=value", path, line);
        *value++ = 0;
        if (strncmp(line, "adapt-", 6) == 0 && adapt_is_rule(line + 6)) {
            char *before = old_rules;
            old_rules = xasprintf("%s%s%s=%s", before ? before : "", before ? "," : "", line + 6, value);
            free(before);
        } else stored[take_setting(s, line, value, path)] = true;
    }
    if (old_rules) stored[take_setting(s, "adapt-rules", old_rules, path)] = true;
    if (!is_given(s, SETTING_adapt_rules)) complete_rules(s, path);
    free(old_rules);
    /* a run that began before there was an --optimizer: AdamW's */
    if (!stored[SETTING_optimizer]) stored[take_setting(s, "optimizer", "adamw", path)] = true;
    /* a run that began before there was a --splat-lr: its splats learned at this rate */
    if (!stored[SETTING_splat_lr] && !is_given(s, SETTING_splat_lr)) s->splat_lr = 10 * s->lr;
    stored[SETTING_splat_lr] = true;
    check_unstored(s, stored, path);
}

void print_settings(const Settings *s, FILE *log, int64_t step) {
    fprintf(log, "s:%lld cfg:1", (long long)step);
    int column = 0;
    for (int i = 0; i < NUM_SETTINGS; i++) {
        if (table[i].kind == FLAG_ROOM) {
            column = printf("%s%-13s ", i ? "\n" : "", table[i].room) - (i > 0);
            continue;
        }
        char *value = flag_text(&s->flags[i]);
        if (value[0] && strcmp(value, "no") != 0) {
            if (column > 90) column = printf("\n%14s", "") - 1;
            column += printf("%s %s  ", table[i].flag, value);
            fprintf(log, " %s=%s", table[i].flag, value);
        }
        free(value);
    }
    printf("\n");
    fprintf(log, "\n");
}

/* ---------------------------------------------------------------------- what the flags leave open */

static void refuse_fit(const Settings *s) {
    if (is_given(s, SETTING_fit))
        die_usage("--fit is for --init-from a standard model with --attention hybrid or gsa; here no head gets splats");
}

/* The single flags win over --preset, and that over --depth. */
void resolve_shape(Settings *s) {
    refuse_fit(s);
    static const struct {
        const char *name;
        int64_t layers, heads, channels;
    } presets[] = {{"gpt2-124m", 12, 12, 768},
                   {"gpt2-350m", 24, 16, 1024},
                   {"gpt2-774m", 36, 20, 1280},
                   {"gpt2-1558m", 48, 25, 1600}};
    int64_t layers = s->depth, heads = s->depth, channels = 64 * s->depth;
    if (s->preset && is_given(s, SETTING_depth)) die_usage("--depth and --preset both set the shape: give one of them");
    for (size_t i = 0; s->preset && i < sizeof presets / sizeof *presets; i++)
        if (strcmp(presets[i].name, s->preset) == 0) {
            layers = presets[i].layers;
            heads = presets[i].heads;
            channels = presets[i].channels;
            if (!is_given(s, SETTING_seq)) s->seq = 1024;
        }
    if (!s->layers) s->layers = layers;
    if (!s->heads) s->heads = heads;
    if (!s->channels) s->channels = channels;
}

/* Mixer, envelope and number of splats depend on each other and on the kind of attention. Where a choice is free it is
   what has won (dev/RESULTS.md). */
static void resolve_splats(Settings *s) {
    if (!s->mixer) s->mixer = strcmp(s->attention, "extend") == 0 ? "linear" : "softmax";
    bool linear = strcmp(s->mixer, "linear") == 0;
    if (linear && is_given(s, SETTING_splat_amplitude))
        die_usage("--splat-amplitude is for softmax; the linear mixer divides by the sum of its weights");
    if (!s->envelope) s->envelope = linear ? "raised" : "cosine";
    bool cosine = strcmp(s->envelope, "cosine") == 0 || strcmp(s->envelope, "raised") == 0;
    if (!s->phase) s->phase = cosine ? "learned" : "none";
    int64_t d = s->heads > 0 && s->channels % s->heads == 0 ? s->channels / s->heads : 0; /* size of a head */
    if (!s->splats) s->splats = linear ? 16 : strcmp(s->envelope, "cosine") == 0 ? d / 2 : d;
    if (s->splats_alive > s->splats)
        die_usage("--splats-alive %lld: a head has %lld splats", (long long)s->splats_alive, (long long)s->splats);
    if (!s->gsa_heads && strcmp(s->attention, "hybrid") == 0 && !linear && s->layers > 1)
        s->gsa_heads = xasprintf("0:0-%lld", (long long)s->heads - 1);
}

/* Gain, frequencies and forget gates of standard heads: what has won, where there are such heads and it fits them. */
static void resolve_standard_heads(Settings *s, Config *c) {
    bool rotations = c->position != POSITION_LEARNED && config_standard_before(c, c->L, 0) > 0;
    bool gates = rotations && c->attention != ATTENTION_EXTEND && c->objective != OBJECTIVE_MLM;
    if (!s->gain) s->gain = rotations ? "head" : "none";
    if (!s->rope) s->rope = rotations ? "learned" : "fixed";
    if (!s->forget) s->forget = gates ? "half" : "none";
    c->gain = choice_index(GAIN_CHOICES, s->gain);
    c->rope = choice_index(ROPE_CHOICES, s->rope);
    c->forget = choice_index(FORGET_CHOICES, s->forget);
}

static double six_digits(double x) { /* the number that is printed is the number that is used */
    char text[32];
    snprintf(text, sizeof text, "%.6g", x);
    return strtod(text, NULL);
}

/* The smaller the model, the larger its rate. AdamW: 3e-3 at 128 channels, 5e-4 at GPT-2's 768. Muon: 6.9e-3 and
   2.8e-3, for text that is read about once; many times wants less than half (dev/RESULTS.md). Splats' scalars are
   logarithms, so their best rate does not depend on the model's size; above 0.01 some seeds end far worse than others
   (dev/LOG.md). */
void resolve_rates(Settings *s, const Config *c) {
    bool scalars = config_gsa_heads(c) > 0 || config_gains(c) > 0 || config_ropes(c) > 0;
    if (!scalars && is_given(s, SETTING_splat_lr))
        die_usage("--splat-lr is for splats, gains and learned rotations, and this model has none");
    /* a model that is trained on keeps what it knows: Muon's rates are for new ones */
    if (s->init_from && !is_given(s, SETTING_optimizer)) s->optimizer = "adamw";
    bool muon = strcmp(s->optimizer, "muon") == 0;
    if (!muon && is_given(s, SETTING_momentum))
        die_usage("--momentum is Muon's, and this run is AdamW's: leave it out, or choose --optimizer muon");
    if (strcmp(s->schedule, "constant") == 0 && is_given(s, SETTING_min_lr))
        die_usage("--min-lr is where the rate ends, and that of --schedule constant does not change: leave it out");
    if (!is_given(s, SETTING_lr)) s->lr = six_digits(muon ? 0.078 / sqrt(c->C) : 0.384 / c->C);
    if (!is_given(s, SETTING_min_lr)) s->min_lr = six_digits(s->lr / 10);
    if (!is_given(s, SETTING_splat_lr)) s->splat_lr = scalars ? six_digits(fmin(10 * s->lr, 0.01)) : 0;
}

/* Each step takes --lr x decay of the weights away. Muon's runs end best where that is about 2 in all when the text is
   read once, 8 when it is read six times and 16 or more when it is read sixteen times: then the weights forget what
   they learned a reading ago, which is what a model would learn by heart (dev/LOG.md). A model that is trained on must
   not forget so much. */
void resolve_decay(Settings *s, double epochs) {
    if (is_given(s, SETTING_weight_decay)) return;
    bool muon = strcmp(s->optimizer, "muon") == 0, ruled = muon && !s->init_from && s->lr > 0;
    s->weight_decay = ruled ? six_digits(fmin((1 + fmin(epochs, 16)) / ((double)s->steps * s->lr), 10)) : 0.1;
}

/* ---------------------------------------------------------------------- the model's configuration */

static int *config_field(Config *c, const Setting *t) { return (int *)((char *)c + t->model); }

/* --unbounded: bit b for bound b. */
static int bounds_off(const char *list) {
    int bits = 0;
    for (const char *p = list, *end; p; p = *end ? end + 1 : NULL) {
        end = p + strcspn(p, ",");
        char word[16];
        snprintf(word, sizeof word, "%.*s", (int)(end - p), p);
        int bound = choice_index(BOUND_CHOICES, word);
        if (bound < 0) die_usage("--unbounded takes any of %s, separated by commas, not '%.40s'", BOUND_CHOICES, list);
        bits |= 1 << bound;
    }
    return bits;
}

/* Whose bound it is, where this model has nothing that it holds; else NULL. */
static const char *bound_of_others(const Config *c, int bound) {
    switch (bound) {
    case BOUND_FREQUENCY:
        return config_has_cosine(c) || config_ropes(c) ? NULL
                                                       : "an envelope with a cosine and of --rope-frequencies learned";
    case BOUND_DECAY: return config_has_decay(c) ? NULL : "--envelope decay and raised, with --mixer linear";
    case BOUND_GAIN: return config_gains(c) ? NULL : "--gain head";
    case BOUND_PHASE: return c->phase && c->mixer == MIXER_LINEAR ? NULL : "--phase learned with --mixer linear";
    default: return NULL;
    }
}

/* Flags that would change nothing in a new model. Files may hold what they say, so config_check lets it pass. */
static void refuse_without_effect(const Settings *s, const Config *c) {
    if (c->attention != ATTENTION_STANDARD && !config_gsa_heads(c))
        die_usage("--gsa-heads %s leaves no head with splats; choose --attention standard for that", s->gsa_heads);
    if (is_given(s, SETTING_window) && c->window && !config_standard_before(c, c->L, 0))
        die_usage("--window bounds standard heads, and this model has none");
    for (int bound = 0; bound < NUM_BOUNDS; bound++) {
        const char *others = config_bounded(c, bound) ? NULL : bound_of_others(c, bound);
        char name[16];
        choice_name(BOUND_CHOICES, bound, name, sizeof name);
        if (others) die_usage("--unbounded %s: this model has no such bound, which is of %s", name, others);
    }
}

Config make_config(Settings *s, const Tokenizer *t) {
    Config c;
    memset(&c, 0, sizeof c);
    bool splats = strcmp(s->attention, "standard") != 0;
    if (strcmp(s->attention, "extend") == 0 && !is_given(s, SETTING_window)) s->window = 64;
    if (splats) resolve_splats(s);
    for (int i = 0; i < NUM_SETTINGS; i++) {
        const Flag *f = &s->flags[i];
        if (table[i].attributes & SPLATS && !splats) { /* its field stays 0, whatever the flag's default */
            if (f->given) die_usage("--%s is for splats, and --attention standard has none", f->name);
        } else if (table[i].model != NONE && !(f->kind == FLAG_CHOICE && !*(const char **)f->value))
            *config_field(&c, &table[i]) = f->kind == FLAG_CHOICE   ? choice_index(f->choices, *(const char **)f->value)
                                           : f->kind == FLAG_SWITCH ? *(bool *)f->value
                                                                    : (int)*(int64_t *)f->value;
    }
    if (splats) c.unbounded = bounds_off(s->unbounded);
    c.T = (int)s->seq;
    c.V = tokenizer_vocab_size(t);
    /* Vp: the next multiple of 128. An encoder's [MASK] that is not in the vocabulary is the first row behind it. */
    int rows = c.objective == OBJECTIVE_MLM && tokenizer_mask(t) == c.V ? c.V + 1 : c.V;
    c.Vp = (rows + 127) / 128 * 128;
    const char *wrong = config_head_map(&c, s->gsa_heads);
    if (!wrong) {
        resolve_standard_heads(s, &c);
        wrong = config_check(&c);
    }
    if (wrong) die_usage("%s", wrong);
    refuse_without_effect(s, &c);
    return c;
}

/* The flag of setting i from the model file, where a flag that contradicts it is refused. */
static void take_from_file(Settings *s, int i, const Checkpoint *k) {
    Flag *f = &s->flags[i];
    Config c = k->config;
    char value[64], error[256], *text = flag_text(f);
    int field = *config_field(&c, &table[i]);
    if (f->kind == FLAG_CHOICE) choice_name(f->choices, field, value, sizeof value);
    else if (f->kind == FLAG_SWITCH) strcpy(value, field ? "yes" : "no");
    else snprintf(value, sizeof value, "%d", field);
    if (f->given && strcmp(text, value) != 0)
        die_usage("--%s %s contradicts %s, where it is %s", f->name, text, k->path, value);
    /* a choice is a copy, because the flag points at it */
    if (!set_flag(f, f->kind == FLAG_CHOICE ? xstrdup(value) : value, error)) die("%s: %s", k->path, error);
    free(text);
}

/* What heads of a standard model may become. */
static void check_into_splats(Settings *s, const Checkpoint *k) {
    const char *attention = s->attention;
    bool linear = s->mixer && strcmp(s->mixer, "linear") == 0;
    if (strcmp(attention, "hybrid") != 0 && strcmp(attention, "gsa") != 0)
        die_usage("--attention %s contradicts %s, where it is standard; heads of such a model get splats by hybrid and "
                  "gsa",
                  attention, k->path);
    if (strcmp(s->covariance, "iso") != 0)
        die_usage("--covariance %s does not go with --init-from a standard model (%s): splats that are fitted to its "
                  "heads have one precision each (iso)",
                  s->covariance, k->path);
    /* k-means' splats answer more than random ones */
    if (!s->splat_amplitude && !linear) s->splat_amplitude = SOFT_AMPLITUDE;
}

/* Setting i from the model file; what only a new model has is refused. own: what else is the file's own. */
static void take_or_refuse(Settings *s, int i, const Checkpoint *k, const char *own) {
    if (table[i].attributes & NEW_MODEL && is_given(s, i))
        die_usage("--%s does not go with --init-from: shape and %s are those of %s", table[i].flag, own, k->path);
    if (!(table[i].attributes & NEW_MODEL) && table[i].model != NONE) take_from_file(s, i, k);
}

static void take_length(Settings *s, const Checkpoint *k) {
    if (!is_given(s, SETTING_seq)) s->seq = k->config.T;
    if (s->seq != k->config.T && k->config.position != POSITION_ROPE)
        die_usage("--seq %lld: %s has learned positions for %d tokens and no others", (long long)s->seq, k->path,
                  k->config.T);
}

/* A model that trains on as it is. */
static Config config_as_it_is(Settings *s, const Checkpoint *k) {
    refuse_fit(s);
    for (int i = 0; i < NUM_SETTINGS; i++) take_or_refuse(s, i, k, "splats");
    take_length(s, k);
    Config c = k->config;
    c.T = (int)s->seq;
    return c;
}

/* Where heads of a standard model get splats: whether a flag says setting i, as for a new model, and not the file. */
static bool flag_decides(const Settings *s, int i) {
    switch (i) {
    case SETTING_attention:
    case SETTING_gsa_heads: return true;
    case SETTING_window: return is_given(s, i);
    case SETTING_splat_init: /* centres are k-means', on the sphere, within all bounds, and all live */
    case SETTING_splats_alive:
    case SETTING_no_sphere:
    case SETTING_unbounded: return false;
    default: return table[i].attributes & SPLATS;
    }
}

/* A standard model, some heads of which get splats. */
static Config config_with_splats(Settings *s, const Checkpoint *k, const Tokenizer *t) {
    check_into_splats(s, k);
    for (int i = 0; i < NUM_SETTINGS; i++)
        if (!flag_decides(s, i)) take_or_refuse(s, i, k, "the splats' start");
    take_length(s, k);
    if (strcmp(s->attention, "gsa") == 0) { /* no head is left that has them */
        s->gain = "none";
        s->rope = "fixed";
        s->forget = "none";
        if (!is_given(s, SETTING_window)) s->window = 0;
    } else if (!s->gsa_heads) s->gsa_heads = xasprintf("%d", (k->config.NH + 1) / 2);
    Config c = make_config(s, t);
    c.Vp = k->config.Vp;
    return c;
}

Config config_from_file(Settings *s, const Checkpoint *k, const Tokenizer *t) {
    bool turn = k->config.attention == ATTENTION_STANDARD && is_given(s, SETTING_attention) &&
                strcmp(s->attention, "standard") != 0;
    return turn ? config_with_splats(s, k, t) : config_as_it_is(s, k);
}
