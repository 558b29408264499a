/* The readers of infer and the trainer, see fuzz.h. */
#include "fuzz.h"

#define INFER_NO_MAIN
#include "../../infer.c"

#include "../../gsa/run/run.h"
#include "../readers.h"

/* An infer command; texts as main would get them. */
#define COMMAND(name, ...)                                        \
    do {                                                          \
        char *argv[] = {(char *)#name, __VA_ARGS__, NULL};        \
        run_command((int)(sizeof argv / sizeof *argv) - 1, argv); \
    } while (0)

static char *valid(const char *name) { return xasprintf("%s/%s", fuzz_folder, name); }

void fuzz_model(char *path) { COMMAND(generate, path, (char *)"Once", (char *)"--tokens", (char *)"2"); }
void fuzz_encoder(char *path) { COMMAND(fill, path, (char *)"The [MASK] sat"); }
void fuzz_llmc(char *path) {
    COMMAND(generate, path, (char *)"Once", (char *)"--tokens", (char *)"2", (char *)"--tokenizer",
            valid("tokenizer.bin"));
}
void fuzz_text(char *path) { COMMAND(perplexity, valid("model.bin"), path); }

static void defaults(Settings *s) {
    char *argv[] = {(char *)"fuzz", NULL};
    settings_from_command_line(s, 1, argv);
}

/* --init-from: configuration, weights and the record of adaptation */
void fuzz_init(char *path) {
    static Settings s;
    Tensor tensors[NUM_TENSORS];
    defaults(&s);
    Checkpoint *k = checkpoint_open(path, CHECKPOINT_MODEL);
    Tokenizer *t = checkpoint_tokenizer(k, NULL);
    Config c = config_from_file(&s, k, t);
    tokenizer_free(t);
    resolve_rates(&s, &c);
    float *flat = (float *)xcalloc(model_tensors(&c, tensors), sizeof *flat);
    checkpoint_read_tensors(k, "", flat);
    if (config_gsa_heads(&c)) {
        Adapt *a = adapt_create(&c, 5);
        adapt_read(a, k, false);
        adapt_free(a);
    }
    free(flat);
    checkpoint_close(k);
}

static void ignore_write(void *model, int buffer, const float *from) {
    (void)model;
    (void)buffer;
    (void)from;
}

/* --resume: settings, place in the data, moments */
void fuzz_state(char *path) {
    static Settings s;
    enum { MOST = 16384 };
    static const uint16_t tokens[MOST];
    const Backend backend = {.write = ignore_write};
    Run r = {.settings = &s, .backend = &backend};
    int64_t length, two = 2, four = 4;
    defaults(&s);
    Checkpoint *k = checkpoint_open(path, CHECKPOINT_STATE);
    const char *text = (const char *)checkpoint_find(k, "settings", TYPE_BYTES, 0, NULL, &length);
    settings_from_text(&s, text, (size_t)length, path);
    r.config = k->config;
    r.total = model_tensors(&r.config, r.tensors);
    /* data that pass for the run's own */
    const int64_t *position = (const int64_t *)checkpoint_find(k, "position", TYPE_I64, 1, &four, NULL);
    size_t count = position[3] > 16 && position[3] <= MOST ? (size_t)position[3] : MOST;
    r.train = loader_from_tokens(tokens, count, "tokens", 16, 2, -1, true, 1);
    if (checkpoint_has(k, "data"))
        memcpy(r.data_hash, checkpoint_find(k, "data", TYPE_I64, 1, &two, NULL), sizeof r.data_hash);
    restore(&r, k);
    loader_free(r.train);
    checkpoint_close(k);
}

/* the settings of a state file, and what becomes of them */
void fuzz_settings(char *path) {
    static Settings s;
    size_t bytes;
    AdaptRules rules = adapt_rules_default();
    char *text = read_file(path, &bytes), *name = valid("tokenizer.bin");
    Tokenizer *t = tokenizer_load(name);
    defaults(&s);
    settings_from_text(&s, text, bytes, path);
    free(adapt_rules_read(&rules, s.adapt_rules));
    resolve_shape(&s);
    Config c = make_config(&s, t);
    resolve_rates(&s, &c);
    free(settings_text(&s));
    tokenizer_free(t);
    free(text);
}

void fuzz_shard(char *path) {
    int x[3 * 5], y[3 * 5];
    for (int shuffled = 0; shuffled < 2; shuffled++) {
        Loader *l = loader_open(path, 5, 300, shuffled ? 298 : -1, shuffled, 1);
        loader_hash(l);
        for (int i = 0; i < 20; i++) loader_next(l, x, y, 3);
        loader_free(l);
    }
}

void fuzz_tokenizer(char *path) { read_tokenizer(path); }
void fuzz_tasks(char *path) { read_tasks(path); }

void fuzz_log(char *path) {
    static bool drawn;
    const char *log = path;
    fuzz_keep(!drawn); /* the first picture loads the letters, for all that follow */
    text_width("letters", 12);
    drawn = true;
    fuzz_keep(false);
    canvas_free(log_has_adaptation(log) ? picture_adaptation(log) : picture_losses("Loss", &log, NULL, 1, 0, 0));
}
