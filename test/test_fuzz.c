/* Damaged files: whatever is in a file, a program that reads it goes on with something sound or ends with one sentence
   and status 1; it never dies by a signal, hangs or takes all memory. Each case is a small valid file, damaged at
   random and read by the code that reads it for a user, in a process that may die.

   test_fuzz [SECONDS [SEED]]: without arguments a hundred cases of each kind, the same every time; best with
   config=sanitize. A case that fails leaves its file behind, and its number, so that `test_fuzz 0 SEED KIND NUMBER`
   runs it alone. */
#define INFER_NO_MAIN
#include "network.h"

#include "../data/stories.h"
#include "../gsa/run/train.h"
#include "readers.h"

#include <fcntl.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#ifdef __SANITIZE_ADDRESS__
const char *__asan_default_options(void);
const char *__asan_default_options(void) {
    return "abort_on_error=1:detect_leaks=0:allocator_may_return_null=1:max_allocation_size_mb=4096";
}
#endif

static char *folder;
static char *in_folder(const char *name) { return xasprintf("%s/%s", folder, name); }

/* ---------------------------------------------------------------------- the readers */

/* Each is what a command does with the file; they run in the child. All arguments are texts, as main would get them. */
#define COMMAND(name, ...)                                              \
    do {                                                                \
        char *argv[] = {(char *)#name, __VA_ARGS__, NULL};              \
        exit(run_command((int)(sizeof argv / sizeof *argv) - 1, argv)); \
    } while (0)

static char *tokenizer_file, *shard_file, *text_file, *prompt_file, *model_file;

static void read_by_generate(char *path) { COMMAND(generate, path, (char *)"Once", (char *)"--tokens", (char *)"3"); }
static void read_by_perplexity(char *path) { COMMAND(perplexity, path, shard_file); }
static void read_by_fill(char *path) { COMMAND(fill, path, (char *)"The [MASK] sat"); }
static void read_by_report(char *path) {
    COMMAND(report, path, (char *)"Once upon", (char *)"--out", in_folder("damaged.html"), (char *)"--pictures",
            in_folder("pictures"));
}
static void read_log(char *path) {
    const char *log = path;
    Canvas *c = log_has_adaptation(log) ? picture_adaptation(log) : picture_losses("Loss", &log, NULL, 1, 0, 0);
    char *out = in_folder("damaged.png");
    canvas_write(c, out);
    exit(0);
}
static void read_by_quantize(char *path) {
    COMMAND(quantize, path, xasprintf("%s.int8", path), (char *)"--type", (char *)"int8");
}
static void read_llmc(char *path) {
    COMMAND(generate, path, (char *)"Once", (char *)"--tokens", (char *)"3", (char *)"--tokenizer", tokenizer_file);
}
static void read_data(char *path) { COMMAND(perplexity, model_file, path); } /* a shard, a text */
static void read_prompt(char *path) {
    COMMAND(generate, model_file, (char *)"--file", path, (char *)"--tokens", (char *)"1");
}

/* A back end that computes nothing: what is read is --resume and --init-from. */
static const char *no_name(void) { return "none"; }
static void no_memory(const Config *c, int B, size_t bytes[NUM_MEMORY]) {
    (void)c;
    (void)B;
    memset(bytes, 0, NUM_MEMORY * sizeof *bytes);
}
static size_t no_limit(void) { return 0; }
static void *no_model(const Config *c, int B) {
    (void)B;
    return (void *)c;
}
static void no_destroy(void *model) { (void)model; }
static void no_write(void *model, int buffer, const float *from) {
    (void)model;
    (void)buffer;
    (void)from;
}
static void no_zero(void *model) { (void)model; }
static void no_watch(void *model, bool on) {
    (void)model;
    (void)on;
}
static double no_forward(void *model, const int *x, const int *y, int B, int T) {
    (void)model;
    (void)x;
    (void)y;
    (void)B;
    (void)T;
    exit(0);
}
static const Backend none = {.name = no_name,
                             .memory = no_memory,
                             .free_memory = no_limit,
                             .create = no_model,
                             .destroy = no_destroy,
                             .write = no_write,
                             .zero_gradients = no_zero,
                             .forward = no_forward,
                             .watch = no_watch};

static void read_by_resume(char *path) { /* path: the model or the state of step 2 */
    char *out = xstrdup(path);
    *strrchr(out, '/') = 0;
    char *argv[] = {(char *)"program", (char *)"--resume", (char *)"--out", out, NULL};
    exit(train(4, argv, &none));
}

static void read_by_init(char *path) {
    char *out = xasprintf("%s.out", path);
    char *argv[] = {(char *)"program", (char *)"--init-from", path, (char *)"--data",
                    shard_file,        (char *)"--out",       out,  NULL};
    exit(train(7, argv, &none));
}

/* ---------------------------------------------------------------------- damage */

enum { BINARY, TEXT };

typedef struct {
    char *bytes;
    size_t count, room;
} File;

/* the bytes at..at+cut become `with`, which may lie in f */
static void replace(File *f, size_t at, size_t cut, const char *with, size_t count) {
    char *copy = (char *)xmalloc(count + 1);
    memcpy(copy, with, count);
    if (f->count - cut + count > f->room) f->bytes = (char *)xrealloc(f->bytes, f->room = 2 * (f->count + count));
    memmove(f->bytes + at + count, f->bytes + at + cut, f->count - at - cut);
    memcpy(f->bytes + at, copy, count);
    f->count += count - cut;
    free(copy);
}

/* a number in the first 256, where headers are, or in the directory, or anywhere */
static void damage_word(File *f, uint64_t *rng) {
    static const int32_t strange[] = {
        0,     1,     -1,      2,       3,         7,         64,         255,        256,        257,
        65535, 65536, 1 << 20, 1 << 24, INT32_MAX, INT32_MIN, 0x7FC00000, 0x7F800000, 0x7F7FFFFF, (int32_t)0xFF800000};
    size_t reach = rng_below(rng, 2) ? 64 * 4 : rng_below(rng, 2) ? 4096 : f->count, size = rng_below(rng, 4) ? 4 : 8;
    if (reach > f->count) reach = f->count;
    if (reach < 8) return;
    size_t at = rng_below(rng, (reach - size) / 4 + 1) * 4;
    int64_t value = 0;
    memcpy(&value, f->bytes + at, size);
    switch (rng_below(rng, 6)) {
    case 0: value = strange[rng_below(rng, sizeof strange / sizeof *strange)]; break;
    case 1: value = (int64_t)((uint64_t)value + rng_below(rng, 9) - 4); break;
    case 2: value ^= (int64_t)((uint64_t)1 << rng_below(rng, 8 * size)); break;
    case 3: value = (int64_t)((uint64_t)value * 2 + rng_below(rng, 2)); break;
    case 4:
        value =
            size == 8 ? (int64_t)rng_next(rng) >> rng_below(rng, 64) : (int32_t)(rng_next(rng) >> rng_below(rng, 64));
        break;
    case 5: value = (int64_t)f->count + (int64_t)rng_below(rng, 129) - 64; break;
    }
    memcpy(f->bytes + at, &value, size);
}

static void damage(File *f, int form, uint64_t *rng) {
    static const char *const words[] = {"\"",
                                        "{",
                                        "}",
                                        "[",
                                        "]",
                                        ",",
                                        ":",
                                        "\\",
                                        "\\u0000",
                                        "\\ud800",
                                        "null",
                                        "1e999",
                                        "-1",
                                        "\n",
                                        "\r\n",
                                        " ",
                                        "<|endoftext|>",
                                        "=",
                                        "\xFF\xFE",
                                        "\"endings\":",
                                        "\"text\":",
                                        "\"label\":3",
                                        "true",
                                        "999999999999999999999",
                                        "\xF0\x9F\x98\x80"};
    for (uint64_t rounds = 1 + rng_below(rng, rng_below(rng, 2) ? 2 : 6); rounds > 0 && f->count > 0; rounds--) {
        size_t at = rng_below(rng, f->count), n = rng_below(rng, f->count - at) + 1, to = rng_below(rng, f->count);
        const char *word = words[rng_below(rng, sizeof words / sizeof *words)];
        if (n > 300 && rng_below(rng, 4)) n = 1 + rng_below(rng, 300);
        switch (rng_below(rng, form == BINARY ? 12 : 8)) {
        case 0: f->bytes[at] = (char)rng_next(rng); break;
        case 1: f->bytes[at] ^= (char)(1 << rng_below(rng, 8)); break;
        case 2: replace(f, at, n, "", 0); break;
        case 3: replace(f, to, 0, f->bytes + at, n); break;
        case 4: f->count = at; break;
        case 5: memmove(f->bytes + to, f->bytes + at, n < f->count - to ? n : f->count - to); break;
        case 6:
            replace(f, at, rng_below(rng, 2) ? strlen(word) < f->count - at ? strlen(word) : 0 : 0, word, strlen(word));
            break;
        case 7:
            for (size_t i = 0; i < n; i++) f->bytes[at + i] = (char)rng_next(rng);
            break;
        default: damage_word(f, rng); break;
        }
    }
    /* a checkpoint's length, put right again: otherwise most damage stops there */
    if (form == BINARY && f->count >= 24 && rng_below(rng, 2)) {
        int64_t length = (int64_t)f->count;
        memcpy(f->bytes + 16, &length, 8);
    }
}

/* ---------------------------------------------------------------------- cases */

typedef struct {
    const char *name, *file; /* file: what the damaged one is called */
    char *valid;
    void (*read)(char *path);
    int form;
    long cases, refused;
} Kind;

/* What a child tells its parent, who outlives it. */
static struct {
    uint64_t number; /* the case it is at */
    long cases, refused;
    char wrong[512];
} * told;

/* Programs end by exit, and a process for each case would be most of the time: in a child exit leads to the next
   case instead. */
static jmp_buf next_case;
static volatile bool in_case;
void exit(int status) {
    if (in_case) longjmp(next_case, status + 1000);
    fflush(NULL);
    _exit(status);
}

/* Case `number` of a kind, the same file for the same seed; NOTHING: undamaged. */
#define NOTHING ((uint64_t)1 << 62)
static void make_case(const Kind *k, uint64_t seed, uint64_t number, const char *path) {
    uint64_t rng = rng_mix(rng_mix(seed, number), (uint64_t)k->name[0] << 8 | (uint64_t)strlen(k->name));
    File f;
    f.bytes = read_file(k->valid, &f.count);
    f.room = f.count;
    if (number != NOTHING) damage(&f, k->form, &rng);
    FILE *out = xfopen(path, "wb");
    xfwrite(f.bytes, 1, f.count, out, path);
    fclose(out);
    free(f.bytes);
}

/* Cases first, first + 1 ... in this process; ends it. */
static void child(const Kind *k, uint64_t seed, uint64_t first, uint64_t count) {
    char *path = in_folder(k->file), *errors = in_folder("errors");
    int null = open("/dev/null", O_RDWR), file = open(errors, O_RDWR | O_CREAT, 0666);
    dup2(null, 0);
    dup2(null, 1);
    dup2(file, 2);
    program_name("program");
#ifndef __SANITIZE_ADDRESS__
    struct rlimit room = {(rlim_t)8 << 30, (rlim_t)8 << 30};
    setrlimit(RLIMIT_AS, &room);
#endif
    struct rlimit core = {0, 0};
    setrlimit(RLIMIT_CORE, &core);
    for (volatile uint64_t i = 0; i < count; i++) {
        told->number = first + i;
        make_case(k, seed, first + i, path);
        if (ftruncate(file, 0) != 0 || lseek(file, 0, SEEK_SET) != 0 || lseek(0, 0, SEEK_SET) != 0) _exit(98);
        alarm(120);
        int status = setjmp(next_case);
        if (!status) {
            in_case = true;
            k->read(path);
            exit(0); /* for those that come back */
        }
        in_case = false;
        status -= 1000;
        char said[4096];
        ssize_t n = pread(file, said, sizeof said - 1, 0);
        said[n > 0 ? n : 0] = 0;
        /* the sentence is the last line: warnings may stand before it */
        const char *last = n > 1 ? said + n - 1 : said;
        while (last > said && last[-1] != '\n') last--;
        if (status != 0 &&
            !((status == 1 || status == 2) && n > 0 && said[n - 1] == '\n' && strncmp(last, "program: ", 9) == 0)) {
            snprintf(told->wrong, sizeof told->wrong, "status %d without a sentence: %.300s", status, said);
            _exit(97);
        }
        told->cases++;
        told->refused += status != 0;
    }
    _exit(0);
}

static void run_cases(Kind *k, uint64_t seed, uint64_t first, uint64_t count) {
    for (uint64_t end = first + count; first < end; first = told->number + 1) {
        fflush(stdout);
        memset(told, 0, sizeof *told);
        pid_t pid = fork();
        if (pid < 0) die("cannot fork");
        if (pid == 0) child(k, seed, first, end - first);
        int status;
        if (waitpid(pid, &status, 0) != pid) die("cannot wait for a child");
        k->cases += told->cases;
        k->refused += told->refused;
        if (!told->wrong[0] && status != 0) { /* a signal, or a sanitizer's own end */
            char *errors = in_folder("errors");
            size_t n;
            char *said = read_file(errors, &n);
            snprintf(told->wrong, sizeof told->wrong, "ended by %s: %.400s",
                     WIFSIGNALED(status) ? strsignal(WTERMSIG(status)) : "the sanitizer", said);
            free(errors);
            free(said);
        }
        bool good = WIFEXITED(status) && WEXITSTATUS(status) == 0;
        CHECK(good, "%s, seed %llu, case %llu: %s", k->name, (unsigned long long)seed, (unsigned long long)told->number,
              told->wrong);
        if (good) break;
        char *keep =
            xasprintf("/tmp/fuzz_%s_%llu_%llu", k->name, (unsigned long long)seed, (unsigned long long)told->number);
        make_case(k, seed, told->number, keep);
        printf("     its file is %s\n", keep);
        free(keep);
    }
}

/* ---------------------------------------------------------------------- valid files */

static void run(const char *format, ...) {
    char *command;
    va_list args;
    va_start(args, format);
    if (vasprintf(&command, format, args) < 0) die("out of memory");
    va_end(args);
    if (system(command) != 0) die("a valid file could not be made: %s", command);
    free(command);
}

static char *make_model(const char *out, const char *flags) { /* trained for two steps; its state lies beside it */
    const char *programs = getenv("OUT") ? getenv("OUT") : "";
    run("./%strain_gsa --layers 1 --heads 2 --channels 16 --seq 16 --batch 2 --steps 4 --save-every 2 --sample-every 0 "
        "--data %s --tokenizer %s %s --threads 1 --out %s/%s >%s/log 2>&1",
        programs, shard_file, tokenizer_file, flags, folder, out, folder);
    return xasprintf("%s/%s/model_00000002.bin", folder, out);
}

static char *make_rounded(const char *model, const char *type) {
    char *path = xasprintf("%s.%s", model, type);
    run("./%sinfer quantize %s %s --type %s 2>%s/log", getenv("OUT") ? getenv("OUT") : "", model, path, type, folder);
    return path;
}

/* Our model of standard attention as llm.c writes it: version 3, fp32, or 5, bf16. */
static char *make_llmc(const char *model, int version) {
    Checkpoint *k = checkpoint_open(model, CHECKPOINT_MODEL);
    static const char *const order[] = {"wte",  "wpe",  "ln1w", "ln1b", "qkvw",    "qkvb",    "attprojw", "attprojb",
                                        "ln2w", "ln2b", "fcw",  "fcb",  "fcprojw", "fcprojb", "lnfw",     "lnfb"};
    const Config *c = &k->config;
    int32_t header[256] = {20240326, version, c->T, c->V, c->L, c->NH, c->C, c->Vp};
    char *path = in_folder(version == 3 ? "valid.llmc" : "valid.llmc16");
    FILE *f = xfopen(path, "wb");
    xfwrite(header, sizeof header, 1, f, path);
    for (size_t i = 0; i < sizeof order / sizeof *order; i++)
        for (int e = 0; e < k->count; e++) {
            if (strcmp(k->entries[e].name, order[i]) != 0) continue;
            const char *numbers = k->map + k->entries[e].offset;
            for (int64_t n = 0; n < k->entries[e].bytes / 4; n++)
                xfwrite(numbers + 4 * n + (version == 3 ? 0 : 2), version == 3 ? 4 : 2, 1, f, path);
        }
    fclose(f);
    checkpoint_close(k);
    return path;
}

/* The small files that all kinds are made from: a tokenizer, a shard, a text and a prompt. */
static void make_texts(void) {
    size_t bytes, count = 0, room = 0;
    int *ids = NULL;
    char *text = stories(1, 6000, &bytes);
    Tokenizer *t = tokenizer_train(text, bytes, 280, false);
    tokenizer_file = in_folder("tokenizer.bin");
    shard_file = in_folder("shard.bin");
    text_file = in_folder("text.txt");
    prompt_file = in_folder("prompt.txt");
    tokenizer_save(t, tokenizer_file);
    tokenizer_encode(t, text, bytes, true, &ids, &count, &room);
    uint16_t tokens[400];
    for (size_t i = 0; i < 400; i++) tokens[i] = (uint16_t)ids[i % count];
    ShardWriter *w = shard_create(shard_file);
    shard_append(w, tokens, 400);
    shard_close(w);
    FILE *f = xfopen(text_file, "wb");
    xfwrite(text, 1, 1500, f, text_file);
    fclose(f);
    f = xfopen(prompt_file, "wb");
    xfwrite("Once upon\n", 1, 10, f, prompt_file);
    fclose(f);
    free(ids);
    free(text);
    tokenizer_free(t);
}

/* A training's log with a loss a step and events of adaptation in it. */
static char *make_log(void) {
    char *path = in_folder("main.log");
    FILE *f = xfopen(path, "wb");
    for (int s = 0; s < 40; s++)
        fprintf(
            f, "s:%d trl:%g lr:0.001\n%s", s, 7 - 0.1 * s,
            s % 9 ? ""
                  : "s:9 tel:5\ns:9 adp:birth l:1 h:0 slot:3 act:0.1\ns:9 adp:state alive:9 fewest:4 coverage:-1.5\n");
    fclose(f);
    return path;
}

/* Everything that is read, each from a valid file made here. Their number; list has room for MOST_KINDS. */
enum { MOST_KINDS = 32 };
static size_t make_kinds(Kind *list) {
    const char *programs = getenv("OUT") ? getenv("OUT") : "";
    make_texts();
    char *hybrid = make_model("hybrid", "--attention hybrid"),
         *extend = make_model("extend", "--attention extend --window 4 --covariance full"),
         *standard = make_model("standard", "--attention standard --pos learned"),
         *linear = make_model("linear", "--attention augment --mixer linear"),
         *encoder = make_model("encoder", "--attention gsa --objective mlm"), *llmc = make_llmc(standard, 3),
         *llmc16 = make_llmc(standard, 5), *bf16 = make_rounded(extend, "bf16"), *int8 = make_rounded(linear, "int8"),
         *int8_encoder = make_rounded(encoder, "int8");
    char *choice = in_folder("choice.jsonl"), *last_word = in_folder("last_word.jsonl");
    run("./%sdata/make_stories --tasks choice --count 2 --out %s 2>%s/log", programs, choice, folder);
    run("./%sdata/make_stories --tasks last-word --count 4 --out %s 2>%s/log", programs, last_word, folder);
    model_file = linear;
    run("mkdir %s/resume && cp %s/hybrid/*_00000002.bin %s/resume", folder, folder, folder);
    char *state = in_folder("hybrid/state_00000002.bin"), *log = make_log();

    const Kind kinds[] = {
        {"hybrid", "damaged", hybrid, read_by_generate, BINARY, 0, 0},
        {"extend", "damaged", extend, read_by_generate, BINARY, 0, 0},
        {"linear", "damaged", linear, read_by_perplexity, BINARY, 0, 0},
        {"encoder", "damaged", encoder, read_by_fill, BINARY, 0, 0},
        {"report", "damaged", extend, read_by_report, BINARY, 0, 0},
        {"log", "damaged", log, read_log, TEXT, 0, 0},
        {"init-from", "damaged", hybrid, read_by_init, BINARY, 0, 0},
        {"state", "resume/state_00000002.bin", state, read_by_resume, BINARY, 0, 0},
        {"llmc", "damaged", llmc, read_llmc, BINARY, 0, 0},
        {"llmc bf16", "damaged", llmc16, read_llmc, BINARY, 0, 0},
        {"bf16", "damaged", bf16, read_by_generate, BINARY, 0, 0},
        {"int8", "damaged", int8, read_by_perplexity, BINARY, 0, 0},
        {"int8 encoder", "damaged", int8_encoder, read_by_fill, BINARY, 0, 0},
        {"quantize", "damaged", extend, read_by_quantize, BINARY, 0, 0},
        {"shard", "damaged", shard_file, read_data, BINARY, 0, 0},
        {"tokenizer", "damaged", tokenizer_file, read_tokenizer, BINARY, 0, 0},
        {"text", "damaged", text_file, read_data, TEXT, 0, 0},
        {"prompt", "damaged", prompt_file, read_prompt, TEXT, 0, 0},
        {"choice", "damaged", choice, read_tasks, TEXT, 0, 0},
        {"word", "damaged", last_word, read_tasks, TEXT, 0, 0},
    };
    _Static_assert(sizeof kinds / sizeof *kinds <= MOST_KINDS, "list has room for them");
    memcpy(list, kinds, sizeof kinds);
    return sizeof kinds / sizeof *kinds;
}

/* Every kind undamaged, then in turn, BATCH cases of each, for so many seconds; below 0: two batches. */
static void run_all(Kind *kinds, size_t N, double seconds, uint64_t seed) {
    enum { BATCH = 50 };
    double start = now_seconds();
    for (size_t i = 0; i < N; i++) {
        run_cases(&kinds[i], seed, NOTHING, 1);
        CHECK(kinds[i].cases == 1 && kinds[i].refused == 0, "%s: the valid file is taken", kinds[i].name);
    }
    for (uint64_t number = 0; seconds < 0 ? number < 2 * BATCH : now_seconds() - start < seconds; number += BATCH)
        for (size_t i = 0; i < N; i++) run_cases(&kinds[i], seed, number, BATCH);
    for (size_t i = 0; i < N; i++) {
        if (seconds >= 0) printf("%-10s %ld cases, %ld refused\n", kinds[i].name, kinds[i].cases, kinds[i].refused);
        else
            CHECK(kinds[i].refused > 0 || kinds[i].form == TEXT, "%s: some of the damaged files are refused",
                  kinds[i].name);
    }
}

/* A number from the command line, or what stands there without it. */
static double argument(int given, char **argv, int at, const char *what, double otherwise) {
    if (at > given) return otherwise;
    char error[256];
    double value = otherwise;
    Flag flag = {FLAG_REAL, what, &value, 0, 9e15, NULL, "", false};
    if (!set_flag(&flag, argv[at], error)) die_usage("'%s' is not %s", argv[at], what);
    return value;
}

int main(int argc, char **argv) {
    static Flag flags[] = {{FLAG_ROOM, NULL, NULL, 0, 0, NULL, NULL, false}};
    program_name(argv[0]);
    setvbuf(stdout, NULL, _IOLBF, 0);
    int given = parse_flags(flags, argc, argv,
                            "test_fuzz [SECONDS [SEED [KIND NUMBER]]]: reads damaged files; without arguments a "
                            "hundred of each kind, the same every time\n");
    if (given == 3 || given > 4) die_usage("name SECONDS, then SEED, then KIND and NUMBER of one case");
    double seconds = argument(given, argv, 1, "a number of seconds", -1);
    uint64_t seed = (uint64_t)argument(given, argv, 2, "a seed", 1),
             number = (uint64_t)argument(given, argv, 4, "a case", 0);
#ifdef _OPENMP
    omp_set_num_threads(1); /* before anything runs in parallel: a pool of threads does not survive a fork */
#endif
    char name[] = "/tmp/test_fuzz.XXXXXX";
    folder = mkdtemp(name);
    if (!folder) die("cannot make a folder in /tmp");
    Kind kinds[MOST_KINDS];
    size_t N = make_kinds(kinds);
    told = mmap(NULL, sizeof *told, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (told == MAP_FAILED) die("cannot share memory");
    if (given == 4) {
        for (size_t i = 0; i < N; i++)
            if (strcmp(kinds[i].name, argv[3]) == 0) run_cases(&kinds[i], seed, number, 1);
    } else run_all(kinds, N, seconds, seed);
    run("rm -rf %s", folder);
    return test_summary("test_fuzz");
}
