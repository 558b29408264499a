/* How fast infer reads and writes text, beside the speed of the memory: random models of llama2.c's three shapes
   (context 1,024, vocabulary 32,000), in fp32, bf16 and int8, and a model of window and linear heads at positions 1,000
   and 100,000.
     make build/release/dev/infer_bench && OMP_NUM_THREADS=2 build/release/dev/infer_bench [FOLDER]
   The models are written to FOLDER (build/bench), 1.4 GB, and stay there for the next time. Every figure of decoding
   is the median of 15 pieces of 16 tokens in the middle of the context, greedy, with a pass of the plain read loop
   between them; MB/token are all weights and what is remembered of 512 tokens. "program" is `infer generate` of 512
   tokens from its start to its end. */
#define INFER_NO_MAIN
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-function"
#include "../infer.c"
#pragma GCC diagnostic pop

#include <unistd.h>

enum { V = 32000, CONTEXT = 1024, PIECE = 16, PIECES = 15, READ_BYTES = 256 << 20 };
static const struct {
    const char *name;
    int C, L, NH;
} shapes[] = {{"15M", 288, 6, 6}, {"42M", 512, 8, 8}, {"110M", 768, 12, 12}};

static int by_size(const void *a, const void *b) {
    return *(const double *)a > *(const double *)b ? 1 : *(const double *)a < *(const double *)b ? -1 : 0;
}

static double median(double *x, size_t n) {
    qsort(x, n, sizeof *x, by_size);
    return x[n / 2];
}

volatile float sink; /* keeps the sum from being left out */

/* Bytes per second at which all threads together read memory and do nothing with it but add. */
static double read_speed(const float *x) {
    float total = 0;
    double start = now_seconds();
#pragma omp parallel for schedule(static) reduction(+ : total)
    for (size_t block = 0; block < READ_BYTES / 65536; block++) {
        vector sum[4];
        memset(sum, 0, sizeof sum);
        for (size_t i = 0; i < 16384; i += 4 * LANES)
            for (size_t k = 0; k < 4; k++) sum[k] += *(const vector *)(x + block * 16384 + i + k * LANES);
        total += (sum[0] + sum[1] + sum[2] + sum[3])[0];
    }
    sink = total;
    return READ_BYTES / (now_seconds() - start);
}

/* A tokenizer of V entries: the bytes, then pairs of bytes. */
static char *make_tokenizer(size_t *bytes) {
    char *text = (char *)xmalloc(1024 + 4 * V), special[64];
    Tokenizer *smallest = tokenizer_train("", 0, 258, false);
    char *base = (char *)tokenizer_to_memory(smallest, bytes);
    size_t at = 1024 + 2 * 256, specials = *bytes - at;
    memcpy(text, base, at);
    memcpy(special, base + at, specials);
    for (int i = 0; i < V - 258; i++) {
        text[at++] = 2;
        text[at++] = base[1024 + 2 * (i / 256) + 1];
        text[at++] = base[1024 + 2 * (i % 256) + 1];
    }
    memcpy(text + at, special, specials);
    const int32_t ids[] = {V, V - 2, V - 1};
    memcpy(text + 8, ids, sizeof ids);
    *bytes = at + specials;
    tokenizer_free(smallest);
    free(base);
    return text;
}

static char *model_path(const char *folder, const char *name, const char *type) {
    return xasprintf("%s/%s_%s.bin", folder, name, type);
}

static void make_models(const char *folder, const char *name, Config *c) {
    static const char *const types[] = {"fp32", "bf16", "int8"};
    char *paths[3];
    for (int i = 0; i < 3; i++) paths[i] = model_path(folder, name, types[i]);
    if (!checkpoint_is_whole(paths[0], CHECKPOINT_MODEL)) {
        Tensor tensors[NUM_TENSORS];
        Entry entries[NUM_TENSORS + 1];
        const void *data[NUM_TENSORS + 1];
        int count = 0;
        size_t bytes;
        float *params = (float *)xcalloc(model_tensors(c, tensors), sizeof(float));
        char *tokenizer = make_tokenizer(&bytes);
        int64_t length = (int64_t)bytes;
        model_start(c, params, 1);
        checkpoint_add_tensors(c, "", params, entries, data, &count);
        entries[count] = checkpoint_entry("tokenizer", TYPE_BYTES, 1, &length);
        data[count++] = tokenizer;
        checkpoint_write(paths[0], CHECKPOINT_MODEL, c, 0, entries, data, count);
        free(params);
        free(tokenizer);
    }
    for (int i = 1; i < 3; i++) {
        char type[8], *arguments[] = {"quantize", paths[0], paths[i], "--type", type, NULL};
        snprintf(type, sizeof type, "%s", types[i]);
        if (!checkpoint_is_whole(paths[i], CHECKPOINT_MODEL)) run_command(5, arguments);
    }
    for (int i = 0; i < 3; i++) free(paths[i]);
}

/* Bytes that one decode step reads: all weights but the rows of other tokens' positions, and what is remembered of
   `seen` tokens. */
static double step_bytes(const Session *s, double seen) {
    const Model *m = s->model;
    Sizes z = config_sizes(&m->net.config);
    Tensor tensors[NUM_TENSORS];
    double bytes = 0;
    model_tensors(&m->net.config, tensors);
    for (int i = 0; i < NUM_TENSORS; i++) {
        const Matrix *w = &m->matrix[i];
        double number = (double)(i == TENSOR_wte ? z.V * z.C : i == TENSOR_wpe ? z.C : tensors[i].size);
        if (!tensor_is_matrix(i)) bytes += 4 * number;
        else
            bytes += w->type == TYPE_F32    ? 4 * number
                     : w->type == TYPE_BF16 ? 2 * number
                                            : number + 4 * number / (double)w->columns;
    }
    for (size_t i = 0; i < z.L * z.NH; i++) {
        double rows = (double)s->places[i].rows < seen ? (double)s->places[i].rows : seen;
        if (m->heads[i].kind != HEAD_SCAN) bytes += rows * 2 * (double)z.HS * 4;
        if (m->heads[i].step.w) bytes += 4 * (double)(m->heads[i].step.F * (z.HS + 1));
    }
    return bytes;
}

static int likeliest(const Session *s) {
    Sampler greedy = {.repetition = 1, .top_p = 1};
    return sample_token(&greedy, session_logits(s, 0), V, NULL, 0);
}

/* Median seconds of a token over PIECES pieces, with a pass of the read loop before and after each; its median bytes
   per second go to *speed, and to *ratio the median of what each piece read (`bytes` a token) against the mean of
   the two passes beside it: what the memory's speed does meanwhile concerns both. */
static double decode_seconds(Session *s, const float *memory, double bytes, double *speed, double *ratio) {
    double took[PIECES], reads[PIECES + 1], ratios[PIECES];
    reads[0] = read_speed(memory);
    for (int i = 0; i < PIECES; i++) {
        double start = now_seconds();
        for (int k = 0; k < PIECE; k++) {
            int token = likeliest(s);
            session_run(s, NULL, 1, &token, 1, NULL, NULL);
        }
        took[i] = (now_seconds() - start) / PIECE;
        reads[i + 1] = read_speed(memory);
        ratios[i] = bytes / took[i] / ((reads[i] + reads[i + 1]) / 2);
    }
    *speed = median(reads, PIECES + 1);
    *ratio = median(ratios, PIECES);
    return median(took, PIECES);
}

static Config model_of(int C, int L, int NH) {
    Config c;
    memset(&c, 0, sizeof c);
    c.T = CONTEXT;
    c.V = c.Vp = V;
    c.L = L;
    c.NH = NH;
    c.C = C;
    c.position = POSITION_ROPE;
    return c;
}

/* Tokens a second of the program itself, from its start to its end; NaN where there is none. */
static double program_speed(const char *path) {
    char *command = xasprintf("./infer generate %s --endless --tokens 512 --temperature 0 >/dev/null 2>&1", path);
    double start = now_seconds();
    int status = access("./infer", X_OK) == 0 ? system(command) : 1;
    free(command);
    return status == 0 ? 512 / (now_seconds() - start) : NAN;
}

/* One line of the table; text (CONTEXT). */
static void bench_model(const char *path, const char *name, const char *type, const int *text, const float *memory) {
    Model *m = model_open(path, NULL, OBJECTIVE_LM);
    Session *s = session_create(m, 1, CONTEXT);
    double speed, ratio, prefill = INFINITY;
    for (int k = 0; k < 3; k++) {
        double start = now_seconds();
        session_reset(s, 0);
        session_run(s, NULL, 1, text, CONTEXT, NULL, NULL);
        prefill = fmin(prefill, now_seconds() - start);
    }
    session_reset(s, 0);
    session_run(s, NULL, 1, text, CONTEXT / 2 - PIECE * PIECES / 2, NULL, NULL);
    double bytes = step_bytes(s, CONTEXT / 2), seconds = decode_seconds(s, memory, bytes, &speed, &ratio);
    session_free(s);
    model_close(m);
    printf("%-4s %-9s %8.1f %8.1f %10.1f %8.1f %8.1f %6.1f%% %10.0f %7.1fx\n", name, type, 1 / seconds,
           program_speed(path), bytes / 1e6, bytes / seconds / 1e9, speed / 1e9, 100 * ratio, CONTEXT / prefill,
           seconds * CONTEXT / prefill);
    flush_output();
}

/* Constant work a token, however long the text. */
static void bench_linear(const char *folder, const int *text) {
    Config c = model_of(288, 6, 6);
    c.attention = ATTENTION_HYBRID;
    c.mixer = MIXER_LINEAR;
    c.envelope = ENVELOPE_RAISED;
    c.S = 16;
    c.window = 64;
    const char *problem = config_head_map(&c, NULL);
    if (problem || (problem = config_check(&c))) die("%s", problem);
    make_models(folder, "linear", &c);
    char *path = model_path(folder, "linear", "fp32");
    Model *m = model_open(path, NULL, OBJECTIVE_LM);
    Session *s = session_create(m, 2, SIZE_MAX);
    double took[2][PIECES], seconds[2];
    static const size_t until[2] = {1000, 100000};
    for (size_t i = 0; i < 2; i++)
        while (s->position[i] < until[i])
            session_run(s, &i, 1, text, until[i] - s->position[i] < CONTEXT ? until[i] - s->position[i] : CONTEXT, NULL,
                        NULL);
    for (int piece = 0; piece < PIECES; piece++)
        for (size_t i = 0; i < 2; i++) { /* in turn, so that both see the same machine */
            double start = now_seconds();
            for (int k = 0; k < PIECE; k++) session_run(s, &i, 1, text + k, 1, NULL, NULL);
            took[i][piece] = (now_seconds() - start) / PIECE;
        }
    for (size_t i = 0; i < 2; i++) {
        seconds[i] = median(took[i], PIECES);
        printf("window 64 + linear, 15M fp32, at position %6zu: %.1f tokens/s\n", until[i], 1 / seconds[i]);
    }
    printf("difference %.1f %%\n", 100 * (seconds[1] / seconds[0] - 1));
    session_free(s);
    model_close(m);
    free(path);
}

int main(int argc, char **argv) {
    program_name(argv[0]);
    Flag flags[] = {{FLAG_ROOM, NULL, NULL, 0, 0, NULL, NULL, false}};
    int words =
        parse_flags(flags, argc, argv,
                    "usage: infer_bench [FOLDER]\nHow fast infer reads and writes text, by models that are made "
                    "in FOLDER (build/bench), 1.4 GB.\n");
    if (words > 1) die_usage("infer_bench takes one folder, not '%s' too", argv[2]);
    const char *folder = words ? argv[1] : "build/bench";
    static const char *const types[] = {"fp32", "bf16", "int8"};
    float *memory = (float *)xmalloc(READ_BYTES);
    for (size_t i = 0; i < READ_BYTES / 4; i++) memory[i] = (float)(i % 7);
    make_folder(folder);
    int *text = (int *)xmalloc(CONTEXT * sizeof *text);
    uint64_t rng = 1;
    for (int i = 0; i < CONTEXT; i++) text[i] = (int)rng_below(&rng, V);
    printf("%-14s %8s %8s %10s %8s %8s %7s %10s %8s\n", "model", "decode", "program", "MB/token", "GB/s", "read",
           "ratio", "prefill", "against");
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
        Config c = model_of(shapes[i].C, shapes[i].L, shapes[i].NH);
        make_models(folder, shapes[i].name, &c);
        for (int type = 0; type < 3; type++) {
            char *path = model_path(folder, shapes[i].name, types[type]);
            bench_model(path, shapes[i].name, types[type], text, memory);
            free(path);
        }
    }
    bench_linear(folder, text);
    free(memory);
    free(text);
    return 0;
}
