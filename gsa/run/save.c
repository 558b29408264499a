#include "run.h"

#include <errno.h>
#include <stdlib.h>
#include <unistd.h>

/* OUT/model_00001000.bin holds the weights, the tokenizer and the record of adaptation: what infer needs, and what
   another run may start from. OUT/state_00001000.bin holds the rest of what this run needs to go on: its settings, its
   place in the data, AdamW's moments and Muon's momentum, which stands among the first moments. */
static char *run_path(const char *out, const char *kind, int64_t step) {
    return xasprintf("%s/%s_%08lld.bin", out, kind, (long long)step);
}

/* The step of a checkpoint's file, such as model_00001000.bin with kind "model"; -1: another kind of file. The folder's
   name plays no part, whatever characters it holds. */
static int64_t step_of(const char *name, const char *kind) {
    size_t n = strlen(kind);
    if (strncmp(name, kind, n) != 0 || name[n] != '_') return -1;
    const char *digits = name + n + 1;
    if (strspn(digits, "0123456789") != 8 || strcmp(digits + 8, ".bin") != 0) return -1;
    return strtoll(digits, NULL, 10);
}

/* Steps for which OUT holds a model file, ascending. */
static int64_t *saved_steps(const char *out, int *count) {
    int files;
    char **names = folder_files(out, &files);
    int64_t *steps = (int64_t *)xmalloc((size_t)(files + 1) * sizeof *steps);
    *count = 0;
    for (int i = 0; i < files; i++) {
        int64_t step = step_of(names[i], "model");
        if (step >= 0) steps[(*count)++] = step;
    }
    free_files(names, files);
    return steps;
}

void refuse_used_folder(const char *out) {
    int count;
    free(saved_steps(out, &count));
    if (count > 0)
        die("%s holds the checkpoints of an earlier run: add --resume to go on with it, or name another folder with "
            "--out",
            out);
}

static bool is_leftover(const char *out, const char *name) {
    size_t n = strlen(name);
    int64_t step = step_of(name, "state");
    if (step < 0) { /* whose temporary file? */
        char *whole = n > 4 && strcmp(name + n - 4, ".tmp") == 0 ? xasprintf("%.*s", (int)n - 4, name) : xstrdup("");
        bool temporary = step_of(whole, "state") >= 0 || step_of(whole, "model") >= 0;
        free(whole);
        return temporary;
    }
    char *model = run_path(out, "model", step);
    bool alone = access(model, F_OK) != 0;
    free(model);
    return alone;
}

void remove_leftovers(const char *out) {
    int count;
    char **names = folder_files(out, &count);
    for (int i = 0; i < count; i++) {
        if (!is_leftover(out, names[i])) continue;
        char *path = xasprintf("%s/%s", out, names[i]);
        if (unlink(path) != 0) warn("cannot remove %s: %s", path, strerror(errno));
        free(path);
    }
    free_files(names, count);
}

/* ---------------------------------------------------------------------- going on */

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

static Checkpoint *open_step(const char *out, int kind, int64_t step) {
    char *path = run_path(out, kind == CHECKPOINT_STATE ? "state" : "model", step);
    Checkpoint *k = checkpoint_open(path, kind);
    free(path);
    return k;
}

void open_newest(Settings *s, Checkpoint **model, Checkpoint **state) {
    if (s->init_from) die_usage("--resume and --init-from exclude each other");
    int64_t step = newest_step(s->out), length;
    *state = open_step(s->out, CHECKPOINT_STATE, step);
    *model = open_step(s->out, CHECKPOINT_MODEL, step);
    const char *text = (const char *)checkpoint_find(*state, "settings", TYPE_BYTES, 0, NULL, &length);
    settings_from_text(s, text, (size_t)length, (*state)->path);
    if (checkpoint_weight_type(*model) != TYPE_F32)
        die("%s holds rounded weights, and a run goes on from its own: begin a new one with --init-from %s",
            (*model)->path, (*model)->path);
}

/* Dies where the data are not those that the run began with: shards that moved may be named anew, other ones may not.
   States of before there was a hash hold the number of tokens alone. */
static void compare_data(const Run *r, const Checkpoint *state, int64_t tokens) {
    const Settings *s = r->settings;
    int64_t two = 2;
    if ((uint64_t)tokens != loader_tokens(r->train))
        die("%s: the training data has %llu tokens now and had %lld then; put the old shards back, name their new "
            "place with --data, or start anew with --init-from",
            state->path, (unsigned long long)loader_tokens(r->train), (long long)tokens);
    if (!checkpoint_has(state, "data")) {
        if (is_given(s, SETTING_data) || is_given(s, SETTING_val))
            warn("%s is of an older version and knows only how many tokens there were: whether these are the same is "
                 "not checked",
                 state->path);
        return;
    }
    const int64_t *then = (const int64_t *)checkpoint_find(state, "data", TYPE_I64, 1, &two, NULL);
    const char *const flags[] = {"data", "val"}, *const places[] = {s->data, s->val};
    for (int i = 0; i < 2; i++) {
        if (then[i] == r->data_hash[i]) continue;
        if (!s->data)
            die("%s: this version of the program makes up other stories than the one that began this run, which can "
                "only go on with that one",
                state->path);
        die("%s: --%s %s holds other tokens than this run began with; put the old shards back, name their new place "
            "with --%s, or start anew with --init-from",
            state->path, flags[i], places[i] ? places[i] : "(none)", flags[i]);
    }
}

void restore(Run *r, const Checkpoint *state) {
    int64_t four = 4;
    const int64_t *position = (const int64_t *)checkpoint_find(state, "position", TYPE_I64, 1, &four, NULL);
    LoaderState at = {(uint64_t)position[1], (uint64_t)position[2]};
    r->step = r->first_step = r->saved = position[0];
    compare_data(r, state, position[3]);
    loader_set_state(r->train, at);
    Tensor second[NUM_TENSORS];
    float *flat = (float *)xcalloc(r->total, sizeof *flat);
    model_second_moments(&r->config, second);
    checkpoint_read_tensors(state, "adam_m.", flat);
    r->backend->write(r->model, BUFFER_ADAM_M, flat);
    checkpoint_read_table(state, "adam_v.", second, flat);
    r->backend->write(r->model, BUFFER_ADAM_V, flat);
    free(flat);
    if (r->backend->choose && checkpoint_has(state, "choices")) {
        int64_t bytes;
        const char *text = (const char *)checkpoint_find(state, "choices", TYPE_BYTES, 0, NULL, &bytes);
        char *choices = xasprintf("%.*s", (int)bytes, text);
        r->backend->choose(r->model, choices);
        free(choices);
    }
    printf("going on from step %lld of %lld\n", (long long)r->step, (long long)r->settings->steps);
}

/* ---------------------------------------------------------------------- saving */

static void save_state(Run *r) {
    Entry entries[2 * NUM_TENSORS + 4];
    const void *data[2 * NUM_TENSORS + 4];
    int n = 0;
    char *path = run_path(r->settings->out, "state", r->step), *settings = settings_text(r->settings);
    LoaderState at = loader_state(r->train);
    int64_t position[] = {r->step, (int64_t)at.epoch, (int64_t)at.window, (int64_t)loader_tokens(r->train)};
    int64_t length = sizeof position / sizeof *position, settings_length = (int64_t)strlen(settings), hashes = 2;
    /* copies, because what a back end hands out is valid only until its next read */
    Tensor second[NUM_TENSORS];
    size_t seconds = model_second_moments(&r->config, second);
    float *m = (float *)xmalloc((r->total + seconds) * sizeof *m), *v = m + r->total;
    memcpy(m, r->backend->read(r->model, BUFFER_ADAM_M), r->total * sizeof *m);
    memcpy(v, r->backend->read(r->model, BUFFER_ADAM_V), seconds * sizeof *v);
    data[n] = settings;
    entries[n++] = checkpoint_entry("settings", TYPE_BYTES, 1, &settings_length);
    data[n] = position;
    entries[n++] = checkpoint_entry("position", TYPE_I64, 1, &length);
    data[n] = r->data_hash;
    entries[n++] = checkpoint_entry("data", TYPE_I64, 1, &hashes);
    char *choices = r->backend->choices ? r->backend->choices(r->model) : NULL;
    int64_t choices_length = choices ? (int64_t)strlen(choices) : 0;
    data[n] = choices;
    if (choices) entries[n++] = checkpoint_entry("choices", TYPE_BYTES, 1, &choices_length);
    checkpoint_add_tensors(&r->config, "adam_m.", m, entries, data, &n);
    checkpoint_add_table(second, "adam_v.", v, entries, data, &n);
    checkpoint_write(path, CHECKPOINT_STATE, &r->config, r->step, entries, data, n);
    free(m);
    free(settings);
    free(choices);
    free(path);
}

static void save_model(Run *r) {
    Entry entries[NUM_TENSORS + 1 + ADAPT_ENTRIES];
    const void *data[NUM_TENSORS + 1 + ADAPT_ENTRIES];
    int n = 0;
    size_t bytes;
    void *tokenizer = tokenizer_to_memory(r->tokenizer, &bytes);
    int64_t length = (int64_t)bytes;
    char *path = run_path(r->settings->out, "model", r->step);
    data[n] = tokenizer;
    entries[n++] = checkpoint_entry("tokenizer", TYPE_BYTES, 1, &length);
    checkpoint_add_tensors(&r->config, "", r->backend->read(r->model, BUFFER_PARAMS), entries, data, &n);
    if (r->adapt) adapt_add_entries(r->adapt, entries, data, &n);
    checkpoint_write(path, CHECKPOINT_MODEL, &r->config, r->step, entries, data, n);
    rewrite_line(NULL);
    printf("saved %s\n", path);
    fflush(stdout);
    free(tokenizer);
    free(path);
}

void remove_old(const Run *r) {
    int count;
    int64_t *steps = saved_steps(r->settings->out, &count);
    while (count > 0 && steps[count - 1] > r->step) count--; /* not whole: this run passed over it */
    for (int i = 0; r->settings->keep > 0 && i < count - r->settings->keep; i++) {
        char *model = run_path(r->settings->out, "model", steps[i]),
             *state = run_path(r->settings->out, "state", steps[i]);
        unlink(model);
        unlink(state);
        free(model);
        free(state);
    }
    free(steps);
}

/* What other ranks do meanwhile: they hand over their part of the numbers. */
static void help_to_save(Run *r) {
    const int buffers[] = {BUFFER_ADAM_M, BUFFER_ADAM_V, BUFFER_PARAMS}; /* in the order in which they are saved */
    for (int i = 0; i < 3 && r->settings->shard_optimiser; i++) r->backend->read(r->model, buffers[i]);
}

void save(Run *r) {
    if (r->ranks->rank > 0) help_to_save(r);
    else {
        save_state(r);
        save_model(r); /* last: a step is looked for by its model, and counts when both files are whole */
        remove_old(r);
    }
    r->saved = r->step;
}
