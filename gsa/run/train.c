/* One run, from flags to the last checkpoint. To follow it, read train() at the end of this file, then upwards: the
   loop, what it does with splats, evaluation and samples, the start of the model, the data. Settings, checkpoints and
   memory have files of their own (run.h). */
#include "run.h"

#include "../../data/stories.h"
#include "../../tokenizer/stored.h"
#include "../look/measure.h"
#include "../sample.h"
#include "into_splats.h"
#include "starts.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <unistd.h>
#ifdef _OPENMP
#include <omp.h>
#endif

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

void next_batch(const Run *r, Loader *l, int *x, int *y, int B, uint64_t draw) {
    loader_next(l, x, y, B);
    if (r->config.objective == OBJECTIVE_MLM)
        mask_tokens(x, y, (size_t)B * (size_t)r->config.T, r->config.V, r->mask,
                    rng_mix((uint64_t)r->settings->seed, draw));
}

static void hash_data(Run *r) {
    r->data_hash[0] = (int64_t)loader_hash(r->train);
    r->data_hash[1] = r->val ? (int64_t)loader_hash(r->val) : 0;
}

/* Shards, or as many made-up stories as the run needs, within reason; the validation stories are those of another
   seed. */
static void open_data(Run *r) {
    const Settings *s = r->settings;
    const int B = (int)s->batch, T = r->config.T, V = r->config.V;
    const int eot = s->doc_start ? tokenizer_eot(r->tokenizer) : -1;
    uint64_t seed = (uint64_t)s->seed;
    if (s->data) {
        r->train = loader_open(s->data, T, V, eot, true, seed);
        if (s->val) r->val = loader_open(s->val, T, V, -1, false, 0);
        hash_data(r);
        return;
    }
    size_t n, wanted = (size_t)fmin(fmax(r->tokens_a_step * (double)s->steps, 4.0 * B * (T + 1)), 16e6);
    r->train_tokens = story_tokens(r->tokenizer, seed, wanted, &n);
    r->train = loader_from_tokens(r->train_tokens, n, "the made-up stories", T, V, eot, true, seed);
    r->val_tokens = story_tokens(r->tokenizer, rng_mix(seed, 1), (size_t)fmax(65536, 2.0 * (T + 1)), &n);
    r->val = loader_from_tokens(r->val_tokens, n, "the validation stories", T, V, -1, false, 0);
    hash_data(r);
}

/* Buffers for the batch at hand; with --overfit-batch also the one batch, out of reach of evaluations and samples: the
   first of all, also in a run that goes on. */
static void make_batch(Run *r) {
    const size_t window = (size_t)r->settings->batch * (size_t)r->config.T;
    r->x = (int *)xmalloc(2 * window * sizeof *r->x);
    r->y = r->x + window;
    if (!r->settings->overfit_batch) return;
    LoaderState first = {0, 0};
    loader_set_state(r->train, first);
    next_batch(r, r->train, r->x, r->y, (int)r->settings->batch, 0);
    r->overfit_x = (int *)xmalloc(2 * window * sizeof *r->x);
    memcpy(r->overfit_x, r->x, 2 * window * sizeof *r->x);
}

/* ---------------------------------------------------------------------- the start of the model */

/* --splat-init kmeans, pca: centres from the keys that the untrained model makes of the first batch. */
static void start_from_keys(Run *r, float *params) {
    const Config *c = &r->config;
    int d = config_head_size(c), B = (int)r->settings->batch;
    size_t n = (size_t)B * (size_t)c->T, centres = (size_t)c->S * (size_t)d;
    bool kmeans = strcmp(r->settings->splat_init, "kmeans") == 0;
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
            float *mu = params + r->tensors[TENSOR_mu].offset + g * centres;
            uint64_t seed = rng_mix((uint64_t)r->settings->seed, g);
            r->backend->head(r->model, l, h, PART_KEYS, (int)n, keys);
            if (kmeans) start_kmeans(mu, c->S, keys, n, d, seed);
            else start_components(mu, c->S, keys, n, d, seed);
        }
    /* keys are a GPU's arithmetic, which another kind of GPU may round in another way */
    ranks_broadcast(r->ranks, params + r->tensors[TENSOR_mu].offset, r->tensors[TENSOR_mu].size * sizeof *params, 0);
    free(x);
    free(keys);
}

static void refuse_with_other_splats(const Settings *s) {
    static const int own[] = {SETTING_splats_alive, SETTING_splat_precision, SETTING_splat_amplitude};
    for (size_t i = 0; i < sizeof own / sizeof *own; i++)
        if (is_given(s, own[i]))
            die_usage("--%s does not go with --splat-init %s: splats are those of that model", s->flags[own[i]].name,
                      s->splat_init);
}

/* Random weights, and splats as the flags say but for centres. */
static void start_weights(const Run *r, float *flat) {
    const Settings *s = r->settings;
    const Config *c = &r->config;
    model_start(c, flat, (uint64_t)s->seed);
    /* updates keep the bounds, but the first forward pass comes before the first update */
    double precision = s->splat_precision;
    if (config_bounded(c, BOUND_PRECISION)) precision = fmin(fmax(precision, SPLAT_PRECISION_MIN), SPLAT_PRECISION_MAX);
    if (precision != s->splat_precision)
        printf("--splat-precision %g is out of bounds: all splats start with %g\n", s->splat_precision, precision);
    model_set_precision(c, flat, precision);
}

/* The weights of a new model, into the back end. */
static void start_model(Run *r, float *flat) {
    const Settings *s = r->settings;
    const Config *c = &r->config;
    enum { RANDOM, BALL, KMEANS, PCA };
    int from = choice_index("random|ball|kmeans|pca", s->splat_init); /* -1: the splats of another model */
    if (from < 0) refuse_with_other_splats(s);
    start_weights(r, flat);
    if (from == BALL) adapt_start_ball(c, flat, (uint64_t)s->seed);
    if (s->splats_alive) adapt_start_alive(c, (int)s->splats_alive, flat);
    if (c->mixer == MIXER_SOFTMAX) model_scale_amplitudes(c, flat, s->splat_amplitude);
    r->backend->write(r->model, BUFFER_PARAMS, flat);
    if (from == RANDOM || from == BALL) return;
    if (from == KMEANS || from == PCA) start_from_keys(r, flat);
    else {
        Checkpoint *other = checkpoint_open(s->splat_init, CHECKPOINT_MODEL);
        start_from_file(c, flat, other);
        checkpoint_close(other);
    }
    r->backend->write(r->model, BUFFER_PARAMS, flat);
}

static uint64_t hash_of(const void *data, size_t bytes) {
    uint64_t hash = bytes;
    for (size_t i = 0; i < bytes; i += 8) {
        uint64_t word = 0;
        memcpy(&word, (const char *)data + i, bytes - i < 8 ? bytes - i : 8);
        hash = (hash ^ word) * 0x9E3779B97F4A7C15ull;
        hash ^= hash >> 29;
    }
    return hash;
}

/* All ranks must begin alike. flat: the weights. */
static void compare_starts(Run *r, const float *flat) {
    static const char *const what[] = {"settings", "weights", "training data"};
    enum { COMPARED = sizeof what / sizeof *what };
    char *settings = settings_text(r->settings);
    uint64_t mine[COMPARED] = {hash_of(settings, strlen(settings)), hash_of(flat, r->total * sizeof *flat),
                               loader_tokens(r->train)};
    uint64_t *all = (uint64_t *)xmalloc((size_t)r->ranks->count * sizeof mine);
    ranks_gather(r->ranks, mine, all, sizeof mine);
    for (int q = 1; q < r->ranks->count; q++)
        for (int i = 0; i < COMPARED; i++)
            if (all[q * COMPARED + i] != all[i] && r->ranks->rank == 0)
                die("%s has other %s than rank 0: give all ranks the same flags, files and program",
                    ranks_name(r->ranks, q), what[i]);
    free(all);
    free(settings);
}

/* start: the model file that gives the weights, or NULL. */
static void make_model(Run *r, const Checkpoint *start) {
    float *flat = (float *)xcalloc(r->total, sizeof *flat);
    bool turn = start && start->config.attention != r->config.attention;
    if (turn) { /* before the model is made: which heads have splats is found here */
        start_weights(r, flat);
        if (r->config.mixer == MIXER_SOFTMAX) model_scale_amplitudes(&r->config, flat, r->settings->splat_amplitude);
        into_splats(r, start, flat);
    }
    r->model = r->backend->create(&r->config, (int)r->settings->batch);
    if (turn) r->backend->write(r->model, BUFFER_PARAMS, flat);
    else if (start) {
        checkpoint_read_tensors(start, "", flat);
        r->backend->write(r->model, BUFFER_PARAMS, flat);
    } else start_model(r, flat);
    if (r->ranks->count > 1) compare_starts(r, flat);
    free(flat);
}

/* The record of birth and death, which is kept whether or not splats adapt: reports show it, and a later run may go on
   from it. */
static void make_adapt(Run *r, const Checkpoint *start, bool resumed) {
    const Settings *s = r->settings;
    r->rules = adapt_rules_default();
    adapt_rules_read(&r->rules, s->adapt_rules);
    r->rules.mode = choice_index(ADAPT_CHOICES, s->adapt);
    r->rules.end = s->steps * 7 / 10;
    if (config_gsa_heads(&r->config)) {
        r->adapt = adapt_create(&r->config, r->rules.every);
        if (start && config_gsa_heads(&start->config)) adapt_read(r->adapt, start, !resumed);
    } else if (r->rules.mode != ADAPT_NONE) die_usage("--adapt %s is for splats, and this model has none", s->adapt);
}

/* ---------------------------------------------------------------------- evaluation, samples */

/* Each rank takes its batches as in a step, and the losses are added in the order of these: the sum is the same for any
   number of ranks. */
static double evaluate(Run *r) {
    int B = (int)r->settings->batch, T = r->config.T;
    uint64_t windows = loader_windows(r->val), batches;
    if (windows < (uint64_t)B) B = (int)windows;
    batches = (uint64_t)r->settings->eval_tokens / ((uint64_t)B * (uint64_t)T);
    if (batches > windows / (uint64_t)B) batches = windows / (uint64_t)B;
    if (batches < 1) batches = 1;
    LoaderState start = {0, 0};
    size_t count = (size_t)r->ranks->count, each = ((size_t)batches + count - 1) / count;
    double sum = 0, *mine = (double *)xcalloc(each, sizeof *mine), *all = (double *)xmalloc(count * each * sizeof *all);
    loader_set_state(r->val, start);
    for (uint64_t i = 0; i < batches; i++) {
        if (ranks_of_batch(r->ranks, (int64_t)i) != r->ranks->rank) {
            loader_skip(r->val, (uint64_t)B);
            continue;
        }
        next_batch(r, r->val, r->x, r->y, B, ~i); /* the same masks in every evaluation */
        mine[i / count] = r->backend->forward(r->model, r->x, r->y, B, T);
    }
    ranks_gather(r->ranks, mine, all, each * sizeof *mine);
    for (uint64_t i = 0; i < batches; i++) sum += all[i % count * each + i / count];
    free(mine);
    free(all);
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
   heads in order of layer and head. params: all parameters. */
static HeadMeasure measure(Run *r, const float *params) {
    size_t T = (size_t)r->config.T, n = T < MEASURE_TOKENS ? T : MEASURE_TOKENS,
           heads = (size_t)r->config.L * (size_t)config_heads(&r->config);
    LoaderState start = {0, 0};
    HeadMeasure *each = (HeadMeasure *)xmalloc(heads * sizeof *each);
    loader_set_state(r->val, start);
    next_batch(r, r->val, r->x, r->y, 1, ~0ull);
    r->backend->forward(r->model, r->x, NULL, 1, (int)n);
    Measured from = {r, (int)n};
    HeadMeasure mean = measure_heads(&r->config, params, n, read_head, &from, each);
    fprintf(r->log, "s:%lld ent:%.5g dst:%.5g rch:%.5g ents:", (long long)r->step, mean.entropy, mean.distance,
            mean.reach);
    for (size_t h = 0; h < heads; h++) fprintf(r->log, "%s%.4g", h ? "," : "", each[h].entropy);
    fprintf(r->log, " dsts:");
    for (size_t h = 0; h < heads; h++) fprintf(r->log, "%s%.4g", h ? "," : "", each[h].distance);
    fprintf(r->log, "\n");
    free(each);
    return mean;
}

static void print_sample(Run *r) {
    const Tokenizer *tokenizer = r->tokenizer;
    int *x = r->x;
    Sampler sampler = {.repetition = 1,
                       .temperature = 0.8,
                       .top_p = 0.95,
                       .rng = rng_mix((uint64_t)r->settings->seed, (uint64_t)r->step)};
    int most = r->config.T < 128 ? r->config.T : 128, n = 1;
    float *logits = (float *)xmalloc((size_t)r->config.V * sizeof *logits);
    x[0] = tokenizer_eot(tokenizer);
    rewrite_line(NULL);
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
    fflush(stdout);
    free(logits);
}

/* ---------------------------------------------------------------------- birth and death of splats */

/* Tokens that a window of statistics looks at. */
static int watched_tokens(const Run *r) {
    int64_t tokens = r->settings->batch * r->config.T;
    return (int)(tokens < ADAPT_TOKENS ? tokens : ADAPT_TOKENS);
}

/* What such a window is made of, from the last forward and backward pass, whose rank tells it to the others: queries
   and keys of all GSA heads, then splats, then the sums of their gradients. Malloc'd. */
static float *watch_splats(Run *r) {
    const Adapt *a = r->adapt;
    const Backend *b = r->backend;
    const int from = ranks_of_batch(r->ranks, r->settings->accum - 1);
    size_t each = (size_t)watched_tokens(r) * (size_t)config_head_size(&r->config);
    float *window = (float *)xmalloc((2 * a->G * each + a->count + a->G * a->S) * sizeof *window), *rows = window;
    for (int l = 0; l < r->config.L; l++)
        for (int h = 0; h < config_heads(&r->config); h++)
            for (int part = 0; part < 2 && config_is_gsa(&r->config, l, h); part++, rows += each) {
                if (from == r->ranks->rank) b->head(r->model, l, h, part, watched_tokens(r), rows);
                ranks_broadcast(r->ranks, rows, each * sizeof *rows, from);
            }
    b->get(r->model, BUFFER_PARAMS, a->first, a->count, rows);
    b->get(r->model, BUFFER_GRADS, r->tensors[TENSOR_alive].offset, a->G * a->S, rows + a->count);
    return window;
}

/* One window of statistics, of that step; frees it. True: the data has shifted. */
static bool look_at_splats(Run *r, int64_t step, float *window) {
    Adapt *a = r->adapt;
    size_t each = (size_t)watched_tokens(r) * (size_t)config_head_size(&r->config);
    const float *splats = window + 2 * a->G * each;
    for (size_t i = 0; i < 2 * a->G; i++)
        adapt_sample(a, (int)(i / 2), (int)(i % 2), window + i * each, watched_tokens(r));
    bool shifted = adapt_window(a, step, splats, splats + a->count);
    free(window);
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
static void adapt_splats(Run *r) {
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
        fprintf(r->log, "s:%lld adp:%s l:%d h:%d slot:%d", (long long)r->step, adapt_event_names[events[i].kind], l, h,
                events[i].slot);
        if (events[i].from >= 0) fprintf(r->log, " from:%d", events[i].from);
        fprintf(r->log, " act:%.6g\n", (double)events[i].activation);
    }
    free(parts);
    free(events);
}

/* What has become of the splats: a line for the reader and one for the log. */
static void report_splats(Run *r) {
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
    fprintf(r->log,
            "s:%lld adp:state alive:%d fewest:%d births:%lld splits:%lld moves:%lld deaths:%lld merges:%lld "
            "coverage:%.6g shifts:%lld\n",
            (long long)r->step, alive, fewest, (long long)n[ADAPT_BIRTH], (long long)n[ADAPT_SPLIT],
            (long long)n[ADAPT_MOVE], (long long)n[ADAPT_DEATH], (long long)n[ADAPT_MERGE], coverage,
            (long long)a->numbers[ADAPT_SHIFTS]);
    const float *lives = splats + (r->tensors[TENSOR_alive].offset - a->first);
    for (size_t g = 0; g < a->G; g++) { /* activation by slot, of dead ones a dash */
        int l = 0, h = 0;
        layer_and_head(&r->config, (int)g, &l, &h);
        fprintf(r->log, "s:%lld adp:act l:%d h:%d", (long long)r->step, l, h);
        for (size_t s = 0; s < a->S; s++)
            if (lives[g * a->S + s] > 0) fprintf(r->log, " %.3g", adapt_activation(a, g, s));
            else fprintf(r->log, " -");
        fprintf(r->log, "\n");
    }
    free(splats);
}

/* ---------------------------------------------------------------------- one step */

static atomic_bool looping;    /* there is something to save, and the loop looks at the next */
static atomic_int interrupted; /* the signal that asked for the end; 0: none */

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
    static char text[256];
    size_t n = 0;
    for (int i = 0; i < NUM_BOUNDS; i++)
        if (clamped[i]) {
            char name[16];
            choice_name(BOUND_CHOICES, i, name, sizeof name);
            n += (size_t)snprintf(text + n, sizeof text - n, "%s%s %lld", n ? ", " : "", name, (long long)clamped[i]);
        }
    return n ? text : "none";
}

static void write_log(Run *r) {
    if (fflush(r->log) != 0 || ferror(r->log)) die("cannot write %s: %s", r->log_path, strerror(errno));
}

/* What is measured of the model as it stands; the losses of training need no evaluation. */
static void evaluation(Run *r) {
    double loss = evaluate(r);
    bool first = r->ranks->rank == 0;
    const float *params = first || r->settings->shard_optimiser ? r->backend->read(r->model, BUFFER_PARAMS) : NULL;
    if (!first) return;
    fprintf(r->log, "s:%lld tel:%.9g\n", (long long)r->step, loss);
    HeadMeasure heads = measure(r, params);
    rewrite_line(NULL);
    printf("step %lld/%lld | validation loss %.6f | perplexity %.3f | attention entropy %.2f, distance %.1f\n",
           (long long)r->step, (long long)r->settings->steps, loss, exp(loss), heads.entropy, heads.distance);
    if (r->adapt && r->adapt->numbers[ADAPT_COUNT_WINDOWS]) report_splats(r);
    fflush(stdout);
    write_log(r);
}

static void check_finite(const Run *r, int64_t step, double loss, const double norms[NUM_CLIPS]) {
    if (isfinite(loss) && isfinite(norms[CLIP_WEIGHTS]) && isfinite(norms[CLIP_SPLATS])) return;
    die("step %lld: loss %g, gradient norm %g (weights) and %g (splats), out of bounds before: %s; training diverged: "
        "lower --lr or --clip%s",
        (long long)step, loss, norms[CLIP_WEIGHTS], norms[CLIP_SPLATS], bounds_text(r->result.clamped),
        r->saved > 0 ? ", or go on from the last checkpoint" : "");
}

static Update next_update(const Run *r, const double norms[NUM_CLIPS]) {
    const Settings *s = r->settings;
    Update u;
    u.rate[CLIP_WEIGHTS] = learning_rate(s, s->lr, s->min_lr, r->step);
    u.rate[CLIP_SPLATS] = learning_rate(s, s->splat_lr, s->lr > 0 ? s->splat_lr * s->min_lr / s->lr : 0, r->step);
    u.beta1 = s->beta1;
    u.beta2 = s->beta2;
    u.weight_decay = s->weight_decay;
    u.step = r->step + 1;
    u.momentum = s->momentum;
    for (int c = 0; c < NUM_CLIPS; c++) u.scale[c] = s->clip > 0 && norms[c] > s->clip ? s->clip / norms[c] : 1;
    return u;
}

/* After the update of a step that was watched: its statistics, a pass over the splats where one is due, and the step of
   the next. */
static void adapt_step(Run *r, int64_t step, float *window) {
    bool shifted = look_at_splats(r, step, window);
    if (shifted) {
        r->adapt->numbers[ADAPT_SHIFTS]++;
        fprintf(r->log, "s:%lld adp:shift\n", (long long)step);
    }
    if (!shifted && step < r->adapt->numbers[ADAPT_NEXT]) return;
    if (r->rules.mode != ADAPT_NONE && step <= r->rules.end) adapt_splats(r);
    adapt_schedule(r->adapt, &r->rules, step, shifted);
}

/* " | MFU 41.2 %", of each GPU; "" for a back end that does not know its machine. */
static void mfu_text(const Run *r, double mfu, char *out, size_t room) {
    out[0] = 0;
    if (mfu > 0) snprintf(out, room, " | MFU %.1f %%", mfu);
    else if (r->backend->peak_flops) snprintf(out, room, " | MFU n/a");
}

/* A step's line: of a terminal always the same one, else one every few seconds; always the first and the last. */
static void print_step(Run *r, int64_t step, const char *line) {
    enum { SECONDS = 5 };
    double now = now_seconds();
    bool terminal = isatty(1), ends = step == r->settings->steps;
    if (terminal && !ends) {
        rewrite_line(line);
        return;
    }
    if (!ends && step > r->first_step + 1 && now - r->printed < SECONDS) return;
    rewrite_line(NULL);
    printf("%s\n", line);
    fflush(stdout);
    memset(r->outside, 0, sizeof r->outside);
    r->printed = now;
}

/* Prints and logs the step of update u, which took `took` seconds. */
static void report_step(Run *r, const Update *u, double took) {
    char left[32], share[32];
    const double *norms = r->result.norms, loss = r->result.loss;
    int64_t outside = 0, since = 0;
    for (int i = 0; i < NUM_BOUNDS; i++) {
        outside += r->result.clamped[i];
        since += r->outside[i] += r->result.clamped[i];
    }
    r->training_time += took;
    /* the first two steps are slower: they touch all memory for the first time */
    r->recent = u->step > r->first_step + 2 ? 0.9 * r->recent + 0.1 * took : took;
    duration(r->recent * (double)(r->settings->steps - u->step), left, sizeof left);
    double peak = r->backend->peak_flops ? r->backend->peak_flops() : 0, speed = r->tokens_a_step / r->recent,
           mfu = peak > 0 ? 100 * speed * config_operations(&r->config) / peak / r->ranks->count : 0;
    mfu_text(r, mfu, share, sizeof share);
    char *line = xasprintf(
        "step %lld/%lld | loss %.6f | %s left | %.0f ms | %.0f tok/s%s | norm %.4f, splats %.4f | lr %.2e%s%s",
        (long long)u->step, (long long)r->settings->steps, loss, left, 1e3 * took, speed, share, norms[CLIP_WEIGHTS],
        norms[CLIP_SPLATS], u->rate[CLIP_WEIGHTS], since ? " | put back into bounds: " : "",
        since ? bounds_text(r->outside) : "");
    print_step(r, u->step, line);
    free(line);
    fprintf(r->log, "s:%lld trl:%.9g lr:%.6g norm:%.6g snorm:%.6g clamped:%lld\n", (long long)u->step, loss,
            u->rate[CLIP_WEIGHTS], norms[CLIP_WEIGHTS], norms[CLIP_SPLATS], (long long)outside);
    if (u->step % 10 == 0 || u->step == r->settings->steps)
        fprintf(r->log, "s:%lld tps:%.0f mfu:%.4g gpus:%d\n", (long long)u->step, speed, mfu, r->ranks->count);
    write_log(r);
}

/* At the end of a step the ranks tell each other the sums of their losses and whether they were interrupted. result's
   loss becomes the sum of all; makes sure that the update was the same everywhere. */
static void exchange(Run *r, int64_t step, StepResult *result) {
    typedef struct {
        double loss, norms[NUM_CLIPS];
        int64_t interrupted;
    } Report;
    if (r->ranks->count == 1) return;
    Report mine = {result->loss, {result->norms[0], result->norms[1]}, interrupted};
    Report *all = (Report *)xmalloc((size_t)r->ranks->count * sizeof *all);
    ranks_gather(r->ranks, &mine, all, sizeof mine);
    result->loss = 0;
    for (int q = 0; q < r->ranks->count; q++) {
        result->loss += all[q].loss;
        r->stop = r->stop || all[q].interrupted;
        if (r->ranks->rank == 0 && memcmp(all[q].norms, all[0].norms, sizeof mine.norms) != 0)
            die("step %lld: the gradient norm of %s was %.9g and that of rank 0 %.9g, which should be the same bit for "
                "bit: a GPU or a connection is faulty; go on from the last checkpoint",
                (long long)step, ranks_name(r->ranks, q), all[q].norms[CLIP_WEIGHTS], all[0].norms[CLIP_WEIGHTS]);
    }
    free(all);
}

/* The end of the step of update u, whose result is there. A loss or gradient that is not finite ends the program with a
   sentence. window: what was watched, or NULL */
static void end_step(Run *r, const Update *u, float *window, StepResult result) {
    exchange(r, u->step, &result);
    result.loss /= (double)r->settings->accum;
    check_finite(r, u->step, result.loss, result.norms);
    r->result = result;
    if (window) adapt_step(r, u->step, window);
    double now = now_seconds(), began = r->began;
    r->began = now;
    report_step(r, u, now - began);
    r->reporting = now_seconds() - now; /* a part of the step too, which the next one's line shows */
}

/* Waits for the step that is still being computed, if there is one. */
static void settle(Run *r) {
    StepResult result;
    Update u = r->pending;
    if (!u.step) return;
    r->pending.step = 0;
    ranks_doing(r->ranks, RANKS_WORKING);
    r->backend->result(r->model, &result);
    end_step(r, &u, r->pending_window, result);
    ranks_doing(r->ranks, RANKS_FREE);
}

/* The gradients of one update, over --accum batches, of which each rank takes its own; watched: with the sums that
   adapt.h needs. Returns the sum of this rank's losses. The step before is looked at while the device works. */
static double forward_backward(Run *r, bool watched) {
    const Settings *s = r->settings;
    const int B = (int)s->batch, T = r->config.T;
    const double share = 1.0 / (double)s->accum;
    double loss = 0;
    r->backend->zero_gradients(r->model);
    if (r->adapt) r->backend->watch(r->model, watched);
    for (int64_t i = 0; i < s->accum; i++) {
        if (ranks_of_batch(r->ranks, i) != r->ranks->rank) {
            if (!r->overfit_x) loader_skip(r->train, (uint64_t)B);
            continue;
        }
        if (r->overfit_x) memcpy(r->x, r->overfit_x, 2 * (size_t)B * T * sizeof *r->x);
        else next_batch(r, r->train, r->x, r->y, B, (uint64_t)(r->step * s->accum + i));
        if (r->backend->expect) r->backend->expect(r->model, share);
        loss += r->backend->forward(r->model, r->x, r->y, B, T);
        if (r->ranks->count > 1 && i == ranks_last_batch(r->ranks, s->accum)) r->backend->share(r->model);
        r->backend->backward(r->model, share);
        settle(r);
        ranks_doing(r->ranks, RANKS_WORKING);
    }
    return loss;
}

/* One update. A back end that can goes on with it while the next step is made ready: its result is looked at then, and
   before anything is written or evaluated. */
static void train_step(Run *r) {
    ranks_doing(r->ranks, RANKS_WORKING);
    bool watched = r->adapt && adapt_due(r->adapt, &r->rules, r->step + 1);
    bool deferred = r->backend->defer != NULL;
    if (!r->pending.step) r->began = now_seconds() - r->reporting;
    if (deferred) r->backend->defer(r->model, true, r->settings->clip);
    StepResult result;
    result.loss = forward_backward(r, watched);
    r->backend->gradient_norms(r->model, result.norms);
    float *window = watched ? watch_splats(r) : NULL;
    Update u = next_update(r, result.norms);
    r->backend->update(r->model, &u, result.clamped);
    r->step++;
    if (deferred) {
        r->backend->defer(r->model, false, 0);
        r->pending = u;
        r->pending_window = window;
        if (watched && r->rules.mode != ADAPT_NONE) settle(r); /* splats may change before the next step */
    } else end_step(r, &u, window, result);
    ranks_doing(r->ranks, RANKS_FREE);
}

/* ---------------------------------------------------------------------- the loop */

static void *wait_for_signals(void *signals) {
    for (int number; sigwait((const sigset_t *)signals, &number) == 0;)
        if (!looping || atomic_exchange(&interrupted, number)) _exit(130); /* nothing to save, or asked twice */
    return NULL;
}

/* A thread waits for the signals that ask for the end, and they are blocked in all others: so this comes before the
   first parallel region. No handler may ever run on the stack of a thread that computes: oneDNN's matrix products keep
   data below the stack pointer, where a handler would overwrite them. */
static void catch_signals(void) {
    static sigset_t signals;
    pthread_t thread;
    sigemptyset(&signals);
    sigaddset(&signals, SIGINT);
    sigaddset(&signals, SIGTERM);
    signal(SIGINT, SIG_DFL); /* a shell's background jobs begin with this one ignored, and kill -INT should save */
    struct sigaction old;
    if (sigaction(SIGHUP, NULL, &old) == 0 && old.sa_handler != SIG_IGN) sigaddset(&signals, SIGHUP); /* not by nohup */
    pthread_sigmask(SIG_BLOCK, &signals, NULL);
    int error = pthread_create(&thread, NULL, wait_for_signals, &signals);
    if (error) die("cannot start a thread: %s", strerror(error));
    pthread_detach(thread);
}

static void print_end(const Run *r) {
    int64_t steps = r->step - r->first_step;
    const char *out = r->settings->out;
    rewrite_line(NULL);
    if (steps > 0)
        printf("%lld steps in %.1f s, %.0f tokens/s; the model is %s/model_%08lld.bin\n", (long long)steps,
               r->training_time, r->tokens_a_step * (double)steps / r->training_time, out, (long long)r->step);
    else printf("%s: nothing was left to do at step %lld\n", out, (long long)r->step);
    if (r->stop) printf("interrupted; go on with --resume --out %s\n", shell_quoted(out));
}

/* `every` steps, and after the last; 0: never */
static bool is_due(const Run *r, int64_t every) {
    return every > 0 && (r->step == r->settings->steps || r->step % every == 0);
}

/* Several ranks find out together, in a step (exchange). */
static bool stops(Run *r) {
    if (r->ranks->count == 1) r->stop = interrupted != 0;
    return r->stop;
}

/* What is chosen by timing is chosen by rank 0, in a rehearsal with the first batch, and then the others' too. */
static void rehearse(Run *r) {
    if (r->ranks->count == 1 || !r->backend->choices) return;
    const int B = (int)r->settings->batch, T = r->config.T;
    size_t length = 0;
    char *text = NULL;
    if (r->ranks->rank == 0) {
        LoaderState before = loader_state(r->train);
        next_batch(r, r->train, r->x, r->y, B, 0);
        loader_set_state(r->train, before);
        if (r->adapt) r->backend->watch(r->model, false);
        if (r->backend->expect) r->backend->expect(r->model, 1);
        r->backend->forward(r->model, r->x, r->y, B, T);
        r->backend->backward(r->model, 1);
        r->backend->zero_gradients(r->model);
        text = r->backend->choices(r->model);
        length = strlen(text) + 1;
    }
    ranks_broadcast(r->ranks, &length, sizeof length, 0);
    if (!text) text = (char *)xmalloc(length);
    ranks_broadcast(r->ranks, text, length, 0);
    if (r->ranks->rank > 0) r->backend->choose(r->model, text);
    free(text);
}

/* Updates until the last step or an interrupt. Returns the exit status. */
static int train_loop(Run *r) {
    const Settings *s = r->settings;
    bool samples = r->config.objective == OBJECTIVE_LM && r->ranks->rank == 0;
    looping = true;
    while (!stops(r)) {
        if (r->val && is_due(r, s->eval_every)) evaluation(r);
        if (samples && r->step > r->first_step && is_due(r, s->sample_every)) print_sample(r);
        if (r->step == s->steps) break;
        train_step(r);
        bool saves = r->step == s->steps || is_due(r, s->save_every);
        if (saves || is_due(r, s->eval_every) || is_due(r, s->sample_every)) settle(r);
        if (saves) save(r);
    }
    settle(r);
    if (r->stop && r->saved != r->step) save(r);
    /* a run that was killed between the two has left too many */
    if (r->saved == r->step && r->ranks->rank == 0) remove_old(r);
    print_end(r);
    return r->stop ? 130 : 0;
}

/* ---------------------------------------------------------------------- the run */

/* OUT/main.log, which is also the lock of OUT. Other ranks than the first write nothing. */
static void lock_out(Run *r) {
    if (r->ranks->rank > 0) {
        r->log = xfopen("/dev/null", "a");
        return;
    }
    r->log = xfopen(r->log_path, "a+");
    lock_file(r->log, r->settings->out);
    remove_leftovers(r->settings->out);
}

/* The checkpoints that a run begins from: model and state of the run to be resumed, whose settings hold then too, or
   the model of --init-from, or none. */
static void open_checkpoints(Run *r, Settings *s, Checkpoint **start, Checkpoint **state) {
    r->log_path = xasprintf("%s/main.log", s->out);
    if (access(r->log_path, F_OK) == 0) lock_out(r); /* before OUT is looked at: another run may be writing there */
    if (s->resume) {
        open_newest(s, start, state);
        return;
    }
    refuse_used_folder(s->out);
    if (s->init_from) *start = checkpoint_open(s->init_from, CHECKPOINT_MODEL);
}

/* This process among those of the run. With --gpus, the processes: the first one does not return. */
static Ranks *start_ranks(const Settings *s, const Backend *backend) {
    RankPlace place;
    const char *wrong = ranks_place(&place, getenv);
    if (!backend->devices) {
        if (is_given(s, SETTING_gpus))
            die_usage("--gpus is for train_gsacu; this program runs on the CPU, where --threads says how many threads");
        if (place.count > 1)
            die_usage("%s has started %d processes, and this program is one, on the CPU: each would train the whole "
                      "run; start it without %s, or train_gsacu with it",
                      place.source, place.count, place.source);
        memset(&place, 0, sizeof place);
    } else if (wrong) die_usage("%s", wrong);
    else if (place.count && is_given(s, SETTING_gpus))
        die_usage("--gpus %lld: %s has started this process as rank %d of %d already; leave --gpus out",
                  (long long)s->gpus, place.source, place.rank, place.count);
    else if (s->gpus != 1) {
        int devices = ranks_ask(backend->devices), count = s->gpus ? (int)s->gpus : devices;
        if (count > devices)
            die_usage("--gpus %d: this machine shows %d (CUDA_VISIBLE_DEVICES may hide some)", count, devices);
        if (count > 1) place = ranks_launch(count);
    }
    catch_signals();
    Ranks *k = ranks_join(&place);
    if (k->count == 1 && is_given(s, SETTING_shard_optimiser))
        die_usage("--shard-optimiser shares the optimiser out among GPUs, and this run has one (--gpus)");
    if (k->count == 1 && is_given(s, SETTING_reduce))
        die_usage("--reduce says how the gradients of several GPUs are added, and this run has one (--gpus)");
    if (k->rank > 0 && !freopen("/dev/null", "w", stdout)) die("cannot open /dev/null: %s", strerror(errno));
    Sharing sharing = {k, strcmp(s->reduce, "bf16") == 0, s->shard_optimiser};
    if (backend->join) backend->join(&sharing);
    return k;
}

/* One batch a rank, unless --accum says how many there are: that is a property of the run, which may go on with another
   number of ranks. */
static void share_batches(Settings *s, const Ranks *k) {
    if (!s->resume && !is_given(s, SETTING_accum)) s->accum = k->count;
    if (s->accum < k->count)
        die_usage("a step of this run has %lld batches (--accum), so that %d GPUs have nothing to do: use at most %lld",
                  (long long)s->accum, k->count - (int)s->accum, (long long)s->accum);
}

static void use_threads(int64_t threads) {
#ifdef _OPENMP
    if (threads > 0) omp_set_num_threads((int)threads);
#else
    if (threads > 1)
        die_usage("--threads %lld: this program was built without OpenMP and has one thread", (long long)threads);
#endif
}

static void check_data_flags(const Settings *s, const Checkpoint *start) {
    if (s->data && !s->tokenizer && !start)
        die_usage("--data needs --tokenizer FILE, the tokenizer that made the shards");
    if (s->val && !s->data) die_usage("--val needs --data: the made-up stories bring their own validation set");
    if (is_given(s, SETTING_vocab) && !s->resume && (s->data || s->tokenizer || start))
        die_usage("--vocab is for the made-up stories; here the tokenizer is given");
}

/* That of the model to start from, that of --tokenizer, or one learned from the made-up stories. */
static Tokenizer *make_tokenizer(const Settings *s, const Checkpoint *start) {
    /* a run that goes on has its own, and one that is given is compared */
    bool compare = !s->resume || is_given(s, SETTING_tokenizer);
    if (start) return checkpoint_tokenizer(start, compare ? s->tokenizer : NULL);
    if (s->tokenizer) return tokenizer_load(s->tokenizer);
    size_t bytes;
    char *text = stories((uint64_t)s->seed, 1 << 20, &bytes);
    Tokenizer *t = tokenizer_train(text, bytes, (int)s->vocab, false);
    free(text);
    return t;
}

/* Tokenizer and configuration, and the settings that depend on them: of the run that goes on, of the model to start
   from, or from flags. */
static void configure(Run *r, Settings *s, const Checkpoint *start, const Checkpoint *state) {
    if (!start) resolve_shape(s);
    r->tokenizer = make_tokenizer(s, start);
    if (state) {
        r->config = state->config;
        checkpoint_match(start, &r->config);
    } else r->config = start ? config_from_file(s, start, r->tokenizer) : make_config(s, r->tokenizer);
    if (!state) resolve_rates(s, &r->config);
    r->config.recompute = s->recompute;
    r->config.muon = strcmp(s->optimizer, "muon") == 0;
    r->config.products = s->products ? 1 + choice_index(PRODUCTS_CHOICES, s->products) : PRODUCTS_UNSAID;
    r->mask = tokenizer_mask(r->tokenizer);
    r->total = model_tensors(&r->config, r->tensors);
    r->tokens_a_step = (double)s->batch * r->config.T * (double)s->accum;
}

/* What is seldom meant. */
static void print_doubts(const Run *r) {
    const Settings *s = r->settings;
    int ranks = r->ranks->count;
    double tokens = r->tokens_a_step / ranks, pass = config_operations(&r->config) * tokens,
           update = config_muon_operations(&r->config) / (s->shard_optimiser ? ranks : 1);
    if (s->warmup > s->steps)
        printf("warning       the warm-up of %lld steps never reaches --lr: the run has %lld (--warmup)\n",
               (long long)s->warmup, (long long)s->steps);
    if (s->accum % ranks)
        printf("warning       %d GPUs share %lld batches a step (--accum) unevenly: some wait for others\n", ranks,
               (long long)s->accum);
    if (s->min_lr > s->lr) printf("warning       --min-lr %g is above --lr %g: the rate will rise\n", s->min_lr, s->lr);
    if (update > pass)
        printf("warning       an update by Muon takes %.2g times the operations of its %.0f tokens: larger steps "
               "(--batch, --accum) or --optimizer adamw are faster\n",
               update / pass, tokens);
}

/* how often the run reads its text */
static double epochs_of(const Run *r) {
    return r->tokens_a_step * (double)r->settings->steps / ((double)loader_windows(r->train) * r->config.T);
}

static void print_run(const Run *r) {
    const Config *c = &r->config;
    size_t splats = 0;
    for (int i = 0; i < NUM_TENSORS; i++)
        if (r->tensors[i].group == GROUP_SCALAR || r->tensors[i].group == GROUP_CENTRE) splats += r->tensors[i].size;
    printf("%s\n", r->backend->name());
    if (r->ranks->count > 1)
        printf("GPUs          %d, gradients added in %s%s\n", r->ranks->count, r->settings->reduce,
               r->settings->shard_optimiser ? ", optimiser shared out" : "");
    for (int q = 0; q < r->ranks->count && r->ranks->count > 1; q++) printf("%14s%s\n", "", ranks_name(r->ranks, q));
    check_memory(r);
    printf("parameters    %zu, of them %zu in the splats of %d GSA heads (of %d heads)\n", model_parameters(c), splats,
           config_gsa_heads(c), c->L * config_heads(c));
    print_doubts(r);
    printf("operations    %.3g MFLOP a token in training\n", config_operations(c) / 1e6);
    printf("tokens        %llu for training, %llu for validation, vocabulary %d; %.0f a step, %.2f epochs\n",
           (unsigned long long)loader_tokens(r->train), r->val ? (unsigned long long)loader_tokens(r->val) : 0ull, c->V,
           r->tokens_a_step, epochs_of(r));
    fflush(stdout);
}

/* A run that was killed, or had no room left, may have written a part of a line, which nobody should take for a whole
   one: the log is cut behind its last whole line. */
static void cut_torn_line(Run *r) {
    int64_t size = file_bytes(r->log, r->log_path), whole = size;
    char last;
    while (whole > 0 && pread(fileno(r->log), &last, 1, (off_t)whole - 1) == 1 && last != '\n') whole--;
    if (whole < size && ftruncate(fileno(r->log), (off_t)whole) != 0)
        die("cannot write %s: %s", r->log_path, strerror(errno));
}

static void open_log(Run *r) {
    const Settings *s = r->settings;
    if (!r->log) { /* a new folder, as a rule; but another run may have begun there just now */
        if (r->ranks->rank == 0) make_folder(s->out);
        lock_out(r);
        if (!s->resume) refuse_used_folder(s->out);
    }
    if (r->ranks->rank > 0) return;
    if (!s->resume && ftruncate(fileno(r->log), 0) != 0 && errno != EINVAL) /* of a device */
        die("cannot write %s: %s", r->log_path, strerror(errno));
    if (s->resume) cut_torn_line(r);
    print_settings(s, r->log, r->step);
    write_log(r);
}

static void close_run(Run *r) {
    fclose(r->log);
    r->backend->destroy(r->model);
    adapt_free(r->adapt);
    loader_free(r->train);
    loader_free(r->val);
    tokenizer_free(r->tokenizer);
    free(r->train_tokens);
    free(r->val_tokens);
    free(r->x);
    free(r->overfit_x);
    free(r->log_path);
    ranks_leave(r->ranks);
}

int train(int argc, char **argv, const Backend *backend) {
    static Settings settings; /* static: what it points at is never freed */
    Checkpoint *start = NULL, *state = NULL;
    Run run;
    memset(&run, 0, sizeof run);
    run.settings = &settings;
    run.backend = backend;
    run.saved = -1;

    program_name(argv[0]);
    settings_from_command_line(&settings, argc, argv);
    output_may_fail(); /* the run outlives a reader of its screen, such as head */
    run.ranks = start_ranks(&settings, backend);
    open_checkpoints(&run, &settings, &start, &state);
    share_batches(&settings, run.ranks);
    use_threads(settings.threads);
    check_data_flags(&settings, start);
    configure(&run, &settings, start, state);
    open_data(&run);
    if (!state) resolve_decay(&settings, epochs_of(&run));
    print_run(&run);
    make_model(&run, start);
    if (state) restore(&run, state);
    make_adapt(&run, start, state != NULL);
    checkpoint_close(start);
    checkpoint_close(state);
    open_log(&run);
    make_batch(&run);
    rehearse(&run);

    int status = train_loop(&run);
    close_run(&run);
    return status;
}
