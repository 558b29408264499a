/* Shards, loader, data/prepare, the made-up stories, and what a run says when memory is short. */
#include <stdarg.h>
#include <sys/wait.h>
#include <unistd.h>

#include "../data/stories.h"
#include "../data/loader.h"
#include "../gsa/run/train.h"
#include "../gsa/util.h"
#include "../tokenizer/tokenizer.h"
#include "stories_match.h"
#include "test.h"

#define main prepare_main /* for safe_cut */
#include "../data/prepare.c"
#undef main

static char *folder; /* of this run's files */

static char *in_folder(const char *name) { return xasprintf("%s/%s", folder, name); }

static void write_shard(const char *path, const uint16_t *tokens, size_t n) {
    ShardWriter *w = shard_create(path);
    shard_append(w, tokens, n / 3); /* in two parts */
    shard_append(w, tokens + n / 3, n - n / 3);
    shard_close(w);
}

/* ---------------------------------------------------------------------- refusals */

/* Runs action in a child: it must end with this status and one sentence that has both words in it. */
static void check_refusal(void (*action)(void *), void *argument, int status, const char *word, const char *word2) {
    int ends[2];
    fflush(stdout);
    if (pipe(ends) != 0) die("no pipe");
    pid_t child = fork();
    if (child == 0) {
        dup2(ends[1], 2);
        close(ends[0]);
        close(ends[1]);
        action(argument);
        _exit(0);
    }
    close(ends[1]);
    char said[2048];
    size_t n = 0;
    for (ssize_t got; n + 1 < sizeof said && (got = read(ends[0], said + n, sizeof said - 1 - n)) > 0;)
        n += (size_t)got;
    said[n] = 0;
    close(ends[0]);
    int how;
    waitpid(child, &how, 0);
    CHECK(WIFEXITED(how) && WEXITSTATUS(how) == status, "refused with status %d, not %d: %s", status,
          WIFEXITED(how) ? WEXITSTATUS(how) : -1, said);
    const char *line_end = strchr(said, '\n');
    CHECK(line_end && line_end[1] == 0, "one line: %s", said);
    CHECK(strstr(said, word) && strstr(said, word2), "the sentence names '%s' and '%s': %s", word, word2, said);
}

static void open_shards(void *pattern) {
    Loader *l = loader_open((const char *)pattern, 8, 100, -1, false, 1);
    int x[8], y[8];
    for (uint64_t i = 0; i < loader_windows(l); i++) loader_next(l, x, y, 1);
    loader_free(l);
}

static void refuse_shard(const char *name, const void *bytes, size_t n, const char *word) {
    char *path = in_folder(name);
    write_file(path, bytes, n);
    check_refusal(open_shards, path, 1, path, word);
    unlink(path);
    free(path);
}

static void test_shard_refusals(void) {
    enum { N = 100 };
    struct {
        int32_t header[256];
        uint16_t tokens[N];
    } shard = {.header = {20240520, 1, N}}, bad;
    for (int i = 0; i < N; i++) shard.tokens[i] = (uint16_t)i;

    char *path = in_folder("good.bin");
    write_file(path, &shard, sizeof shard);
    Loader *l = loader_open(path, 8, 100, -1, false, 1);
    CHECK(loader_tokens(l) == N && loader_windows(l) == 12, "a shard written by hand is read");
    loader_free(l);
    unlink(path);

    refuse_shard("empty.bin", &shard, 0, "empty");
    refuse_shard("three_bytes.bin", &shard, 3, "not a token shard");
    refuse_shard("cut_in_header.bin", &shard, 500, "truncated");
    refuse_shard("header_only.bin", &shard, 1024, "truncated");
    refuse_shard("one_byte_short.bin", &shard, sizeof shard - 1, "truncated");
    refuse_shard("text.bin", "Once upon a time, there was a file that was text and no shard at all.", 70,
                 "not a token shard");
    bad = shard;
    bad.header[0] = 20240801;
    bad.header[1] = 7;
    refuse_shard("llama3.bin", &bad, sizeof bad, "Llama-3");
    bad = shard;
    bad.header[1] = 2;
    refuse_shard("version.bin", &bad, sizeof bad, "version 2");
    bad = shard;
    bad.header[2] = -5;
    refuse_shard("negative.bin", &bad, sizeof bad, "-5");
    bad = shard;
    bad.header[2] = N - 1;
    refuse_shard("longer.bin", &bad, sizeof bad, "more bytes");
    bad = shard;
    bad.tokens[77] = 100;
    refuse_shard("token.bin", &bad, sizeof bad, "token 100 at position 77");
    bad = shard;
    bad.tokens[96] = 65535; /* the last target */
    refuse_shard("token.bin", &bad, sizeof bad, "token 65535 at position 96");
    bad = shard;
    bad.header[2] = 8;
    refuse_shard("few.bin", &bad, 1024 + 16, "--seq 7 would do");
    bad.header[2] = 1;
    refuse_shard("one.bin", &bad, 1024 + 2, "too few to train on");
    check_refusal(open_shards, folder, 1, folder, "folder");
    free(path);
    path = in_folder("nothing_*.bin");
    check_refusal(open_shards, path, 1, path, "no file");
    free(path);
    path = in_folder("missing.bin");
    check_refusal(open_shards, path, 1, path, "no file");
    free(path);
}

static void set_state_beyond(void *loader) {
    loader_set_state((Loader *)loader, (LoaderState){0, loader_windows((Loader *)loader)});
}

/* ---------------------------------------------------------------------- loader

   Token i of shard s is a number that tells where it came from, so a window read can be found again. */

enum { T = 16, SHARDS = 5, V = 60000 };
static const size_t shard_sizes[SHARDS] = {1000, T, 0, T + 1, 777}; /* uneven ends, too short, empty, just one window */
static const uint64_t shard_windows[SHARDS] = {62, 0, 0, 1, 48};
enum { WINDOWS = 62 + 1 + 48 };

static char *make_shards(void) {
    uint16_t tokens[1000];
    for (int s = 0; s < SHARDS; s++) {
        char name[64];
        snprintf(name, sizeof name, "loader_%d.bin", s);
        char *path = in_folder(name);
        for (size_t i = 0; i < shard_sizes[s]; i++) tokens[i] = (uint16_t)(s * 10000 + (int)i);
        write_shard(path, tokens, shard_sizes[s]);
        free(path);
    }
    return in_folder("loader_*.bin");
}

/* Draws an epoch; the first token of each window into starts. Checks that windows are consecutive tokens and y is x
   shifted. */
static void draw_epoch(Loader *l, int *starts) {
    int x[3 * T], y[3 * T];
    int bad = 0;
    for (int i = 0; i < WINDOWS; i += 3) {
        int B = WINDOWS - i < 3 ? WINDOWS - i : 3;
        loader_next(l, x, y, B);
        for (int b = 0; b < B; b++) {
            starts[i + b] = x[b * T];
            for (int t = 0; t < T; t++) bad += x[b * T + t] != x[b * T] + t || y[b * T + t] != x[b * T + t] + 1;
        }
    }
    CHECK(bad == 0, "windows are consecutive tokens of one shard and y is x shifted by one");
}

static int compare_ints(const void *a, const void *b) { return *(const int *)a - *(const int *)b; }

static void test_loader_in_order(const char *pattern) {
    int starts[WINDOWS], expected[WINDOWS], n = 0;
    Loader *l = loader_open(pattern, T, V, -1, false, 1);
    CHECK(loader_windows(l) == WINDOWS, "windows: %llu", (unsigned long long)loader_windows(l));
    CHECK(loader_tokens(l) == 1000 + T + T + 1 + 777, "tokens: %llu", (unsigned long long)loader_tokens(l));
    for (int s = 0; s < SHARDS; s++)
        for (uint64_t w = 0; w < shard_windows[s]; w++) expected[n++] = s * 10000 + (int)w * T;
    for (int epoch = 0; epoch < 2; epoch++) {
        CHECK(loader_state(l).epoch == (uint64_t)epoch && loader_state(l).window == 0, "an epoch begins at window 0");
        draw_epoch(l, starts);
        CHECK(memcmp(starts, expected, sizeof starts) == 0, "without shuffle: file order, not shifted, epoch %d",
              epoch);
    }
    check_refusal(set_state_beyond, l, 1, "loader_0.bin", "windows");
    loader_free(l);
}

static void test_loader_shuffled(const char *pattern) {
    int starts[WINDOWS], sorted[WINDOWS], shifts[6];
    bool all_in_order = true;
    Loader *l = loader_open(pattern, T, V, -1, true, 7);
    for (int epoch = 0; epoch < 6; epoch++) {
        draw_epoch(l, starts);
        memcpy(sorted, starts, sizeof sorted);
        qsort(sorted, WINDOWS, sizeof *sorted, compare_ints);
        all_in_order &= memcmp(sorted, starts, sizeof sorted) == 0;
        shifts[epoch] = sorted[0];
        int bad = 0, i = 0;
        for (int s = 0; s < SHARDS; s++) {
            int shift = shard_windows[s] ? sorted[i] - s * 10000 : 0, last = (int)shard_sizes[s] - 1 - T;
            bad += shift < 0 || shift >= T;
            for (int w = 0; w < (int)shard_windows[s]; w++, i++) {
                int place = w * T + shift < last ? w * T + shift : last;
                bad += sorted[i] != s * 10000 + place;
            }
        }
        CHECK(bad == 0, "shuffled: every window once, shifted alike, epoch %d", epoch);
    }
    CHECK(!all_in_order, "shuffled is not in order");
    int different = 0;
    for (int e = 1; e < 6; e++) different += shifts[e] != shifts[0];
    CHECK(different > 0, "the shift differs between epochs");
    loader_free(l);
}

/* The order depends on seed and epoch only: epoch 1 read first is epoch 1. */
static void test_loader_seeds(const char *pattern) {
    int starts[WINDOWS], again[WINDOWS], next[WINDOWS];
    Loader *l = loader_open(pattern, T, V, -1, true, 7);
    draw_epoch(l, starts);
    draw_epoch(l, next);
    loader_set_state(l, (LoaderState){1, 0});
    draw_epoch(l, again);
    CHECK(memcmp(next, again, sizeof next) == 0, "an epoch's order does not depend on what was read before");
    CHECK(memcmp(starts, next, sizeof next) != 0, "epochs differ");
    loader_set_state(l, (LoaderState){0, 0});
    draw_epoch(l, again);
    CHECK(memcmp(starts, again, sizeof next) == 0, "epoch 0 again");
    loader_free(l);
    l = loader_open(pattern, T, V, -1, true, 8);
    draw_epoch(l, again);
    CHECK(memcmp(starts, again, sizeof next) != 0, "seeds differ");
    loader_free(l);
}

/* Saved and restored in the middle, over the end of an epoch; batches that do not divide the epoch. */
static void test_loader_resumed(const char *pattern) {
    int x[2][7 * T], y[2][7 * T], wrong = 0;
    Loader *l = loader_open(pattern, T, V, -1, true, 7);
    loader_set_state(l, (LoaderState){3, WINDOWS - 10});
    loader_next(l, x[0], y[0], 7);
    LoaderState saved = loader_state(l);
    CHECK(saved.epoch == 3 && saved.window == WINDOWS - 3, "the state counts windows");
    Loader *resumed = loader_open(pattern, T, V, -1, true, 7);
    loader_set_state(resumed, saved);
    for (int i = 0; i < 40; i++) {
        loader_next(l, x[0], y[0], 7);
        loader_next(resumed, x[1], y[1], 7);
        wrong += memcmp(x[0], x[1], sizeof x[0]) != 0 || memcmp(y[0], y[1], sizeof y[0]) != 0;
    }
    CHECK(wrong == 0, "a restored state continues exactly");
    CHECK(loader_state(l).epoch == 3 + (WINDOWS - 3 + 280) / WINDOWS &&
              loader_state(l).window == (WINDOWS - 3 + 280) % WINDOWS,
          "epochs are counted");
    loader_free(resumed);
    loader_free(l);
}

static void test_loader_memory(void) {
    uint16_t tokens[1000];
    int x[2][7 * T], y[2][7 * T], wrong = 0;
    for (int i = 0; i < 1000; i++) tokens[i] = (uint16_t)(i * 7 % 100);
    char *path = in_folder("memory.bin");
    write_shard(path, tokens, 1000);
    Loader *l = loader_open(path, T, 100, -1, true, 3),
           *other = loader_from_tokens(tokens, 1000, "tokens in memory", T, 100, -1, true, 3);
    for (int i = 0; i < 30; i++) {
        loader_next(l, x[0], y[0], 7);
        loader_next(other, x[1], y[1], 7);
        wrong += memcmp(x[0], x[1], sizeof x[0]) != 0;
    }
    CHECK(wrong == 0, "tokens in memory are read like a file of them");
    loader_free(l);
    loader_free(other);
    free(path);
}

/* --doc-start: windows begin at the first eot at or after their place, where enough follows it. */
static void test_loader_documents(void) {
    uint16_t tokens[1000];
    for (int i = 0; i < 1000; i++) tokens[i] = i % 90 == 40 || i == 990 ? 99 : (uint16_t)(i % 50);
    for (int shuffle = 0; shuffle < 2; shuffle++) {
        Loader *l = loader_from_tokens(tokens, 1000, "documents", T, 100, 99, shuffle, 3);
        int x[T], y[T], begin_with_eot = 0, windows = (int)loader_windows(l);
        for (int i = 0; i < windows; i++) {
            loader_next(l, x, y, 1);
            begin_with_eot += x[0] == 99;
        }
        /* token 940 is the last eot with enough behind it: windows that would start after it stay where they are */
        CHECK(shuffle ? begin_with_eot >= windows - 4 && begin_with_eot < windows : begin_with_eot == 59,
              "%d of %d windows begin with eot", begin_with_eot, windows);
        loader_free(l);
    }
}

/* A glob pattern's characters in the name of a file that exists. */
static void test_loader_odd_name(void) {
    uint16_t tokens[1000] = {0};
    char *odd = in_folder("odd[1]*.bin");
    write_shard(odd, tokens, 1000);
    Loader *l = loader_open(odd, T, 100, -1, false, 1);
    CHECK(loader_tokens(l) == 1000, "a file may be called like a pattern");
    loader_free(l);
    unlink(odd);
    free(odd);
}

/* The hash of the loader's data with one token changed: any of a short shard, the first or last of a long one. */
static void test_loader_hash(void) {
    static uint16_t tokens[300000];
    const size_t counts[] = {100, 65536, 300000};
    for (size_t i = 0; i < sizeof counts / sizeof *counts; i++) {
        size_t n = counts[i], changed[] = {0, 1, n == 300000 ? 2047 : n / 2, n - 1};
        Loader *l = loader_from_tokens(tokens, n, "one", T, V, -1, true, 3),
               *other = loader_from_tokens(tokens, n, "another", 2 * T, V, -1, false, 4);
        uint64_t hash = loader_hash(l);
        CHECK(hash == loader_hash(other), "%zu tokens: name, order and windows play no part", n);
        for (size_t k = 0; k < sizeof changed / sizeof *changed; k++) {
            tokens[changed[k]]++;
            CHECK(loader_hash(l) != hash, "%zu tokens: the hash knows token %zu", n, changed[k]);
            tokens[changed[k]]--;
        }
        loader_free(l);
        loader_free(other);
        l = loader_from_tokens(tokens, n - 1, "shorter", T, V, -1, true, 3);
        CHECK(loader_hash(l) != hash, "%zu tokens: the hash knows their number", n);
        loader_free(l);
    }
}

static void test_loader(void) {
    char *pattern = make_shards();
    test_loader_in_order(pattern);
    test_loader_shuffled(pattern);
    test_loader_seeds(pattern);
    test_loader_resumed(pattern);
    test_loader_memory();
    test_loader_documents();
    test_loader_odd_name();
    free(pattern);
}

/* Windows of a million tokens, of which the shorter shard has none; the longest shard limits T. */
static int long_T;
static void open_long(void *pattern) { loader_free(loader_open((const char *)pattern, long_T, 60000, -1, true, 1)); }
static void test_long_windows(void) {
    enum { LONG = 1 << 20, TOKENS = 2 * LONG + 5 };
    uint16_t *tokens = (uint16_t *)xmalloc(TOKENS * sizeof *tokens);
    int *x = (int *)xmalloc(2 * LONG * sizeof *x), *y = x + LONG, wrong = 0;
    uint64_t at = 9, mark;
    for (int i = 0; i < TOKENS; i++) tokens[i] = (uint16_t)rng_below(&at, 60000);
    char *pattern = in_folder("long_*.bin"), *path = in_folder("long_0.bin"), *other = in_folder("long_1.bin");
    write_shard(path, tokens, LONG);
    write_shard(other, tokens, TOKENS);
    Loader *l = loader_open(pattern, LONG, 60000, -1, true, 4);
    CHECK(loader_windows(l) == 2, "two windows of 2^20 tokens");
    for (int w = 0; w < 6; w++) {
        loader_next(l, x, y, 1);
        for (mark = 0; mark + LONG < TOKENS && (tokens[mark] != x[0] || tokens[mark + 1] != x[1] ||
                                                tokens[mark + 2] != x[2] || tokens[mark + 3] != x[3]);)
            mark++;
        for (int t = 0; t < LONG && mark + LONG < TOKENS; t++)
            wrong += x[t] != tokens[mark + (uint64_t)t] || y[t] != tokens[mark + (uint64_t)t + 1];
        wrong += mark + LONG >= TOKENS;
    }
    CHECK(wrong == 0, "windows of 2^20 tokens are consecutive tokens of one shard");
    loader_free(l);
    long_T = TOKENS;
    check_refusal(open_long, pattern, 1, "long_1.bin", "at most --seq 2097156 would do");
    long_T = TOKENS - 1; /* just one window */
    l = loader_open(pattern, long_T, 60000, -1, true, 1);
    CHECK(loader_windows(l) == 1, "--seq as advised");
    loader_free(l);
    free(tokens);
    free(x);
    free(pattern);
    free(path);
    free(other);
}

/* Every size of epoch: the permutation behind the shuffle is one for small and odd numbers too. */
static void test_epoch_sizes(void) {
    uint16_t tokens[4 * 300 + 1];
    for (int i = 0; i < 1201; i++) tokens[i] = (uint16_t)i;
    int bad = 0, fixed = 0;
    for (int n = 1; n <= 300; n++) {
        Loader *l = loader_from_tokens(tokens, (size_t)(4 * n + 1), "tokens", 4, V, -1, true, (uint64_t)n);
        char seen[301] = {0};
        bad += loader_windows(l) != (uint64_t)n;
        for (int i = 0; i < n; i++) {
            int x[4], y[4];
            loader_next(l, x, y, 1);
            int w = x[0] / 4; /* the shifted last window is moved back to the place of window n - 1 */
            bad += seen[w]++;
            fixed += w == i;
        }
        loader_free(l);
    }
    CHECK(bad == 0, "every window once for epochs of 1 to 300 windows");
    CHECK(fixed > 150 && fixed < 600, "a random permutation leaves one window in place on average: %d of 300", fixed);
}

/* ---------------------------------------------------------------------- prepare */

static Tokenizer *tokenizer;
static char *tokenizer_file;

static char said[4096]; /* by the last data/prepare */

/* Runs a command in the shell; its exit status, and what it wrote in said. */
static int run(const char *command) {
    fflush(stdout);
    FILE *f = popen(command, "r");
    said[fread(said, 1, sizeof said - 1, f)] = 0;
    int status = pclose(f);
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

/* Runs data/prepare with these arguments after --tokenizer. */
static int prepare(const char *format, ...) __attribute__((format(printf, 1, 2)));
static int prepare(const char *format, ...) {
    char arguments[4096], *out = getenv("OUT");
    va_list list;
    va_start(list, format);
    vsnprintf(arguments, sizeof arguments, format, list);
    va_end(list);
    char *command = xasprintf("./%sdata/prepare --tokenizer %s %s 2>&1", out ? out : "", tokenizer_file, arguments);
    int status = run(command);
    free(command);
    return status;
}

/* All tokens of the shards PREFIX_SPLIT_*.bin. */
static uint16_t *read_shards(const char *prefix, const char *split, size_t *n, int *shards) {
    char *pattern = xasprintf("%s/%s_%s_*", folder, prefix, split);
    char **files = glob_files(pattern, shards);
    uint16_t *tokens = NULL;
    *n = 0;
    for (int i = 0; i < *shards; i++) {
        size_t bytes;
        char *file = read_file(files[i], &bytes), *expected = xasprintf("%s/%s_%s_%06d.bin", folder, prefix, split, i);
        CHECK(strcmp(files[i], expected) == 0, "%s is called %s", files[i], expected);
        tokens = (uint16_t *)xrealloc(tokens, *n * 2 + bytes);
        memcpy(tokens + *n, file + 1024, bytes - 1024);
        *n += (bytes - 1024) / 2;
        free(file);
        free(expected);
    }
    free_files(files, *shards);
    free(pattern);
    return tokens;
}

/* The text of tokens, each <|endoftext|> as the byte 1, which the documents do not have. */
static char *decode(const uint16_t *tokens, size_t n) {
    size_t bytes = 0;
    char *text = (char *)xmalloc(n * 256 + 1);
    for (size_t i = 0; i < n; i++) {
        size_t length;
        const char *piece = tokenizer_piece(tokenizer, tokens[i], &length);
        if (tokens[i] == tokenizer_eot(tokenizer)) {
            piece = "\1";
            length = 1;
        }
        if (!piece) {
            piece = "?";
            length = 1;
        }
        memcpy(text + bytes, piece, length);
        bytes += length;
    }
    text[bytes] = 0;
    return text;
}

static bool same_file(const char *a, const char *b) {
    size_t n, m;
    char *x = read_file(a, &n), *y = read_file(b, &m);
    bool same = n == m && memcmp(x, y, n) == 0;
    free(x);
    free(y);
    return same;
}

static int count_files(const char *name) {
    int n;
    char *pattern = in_folder(name);
    char **files = glob_files(pattern, &n);
    free_files(files, n);
    free(pattern);
    return n;
}

enum { DOCUMENTS = 700 };

/* The text that the tests of data/prepare read: documents of all kinds, with changing separators between them. */
typedef struct {
    char *path;     /* of the text */
    char *expected; /* what decoding its tokens must give: \1 and a document, for each */
    size_t bytes;   /* of expected */
} PrepareText;

static PrepareText prepare_text(void) {
    static const char *const separators[] = {"\n<|endoftext|>\n",
                                             "<|endoftext|>",
                                             "\r\n<|endoftext|>\r\n",
                                             "\n\n<|endoftext|>\n\n\n",
                                             "\n<|endoftext|>\n<|endoftext|>\n",
                                             "<|endoftext|>\n"};
    PrepareText text;
    text.path = in_folder("text.txt");
    char *expected_path = in_folder("expected");
    FILE *f = xfopen(text.path, "wb"), *expected_file = xfopen(expected_path, "wb");
    for (int i = 0; i < DOCUMENTS; i++) {
        size_t bytes;
        char *s = story(5, (uint64_t)i, &bytes);
        const char *extra = i % 50 == 3   ? "  two spaces \n\n end  "
                            : i % 50 == 7 ? "\xff\xfe broken [MASK] <|endof text|> \xe2\x80"
                            : i % 50 == 9 ? " na\xc3\xafve \xe4\xb8\xad\xe6\x96\x87"
                                          : "";
        fprintf(f, "%s%s%s", s, extra, i + 1 < DOCUMENTS || i % 2 ? separators[i % 6] : "\n");
        fprintf(expected_file, "\1%s%s", s, extra);
        free(s);
    }
    fclose(f);
    fclose(expected_file);
    text.expected = read_file(expected_path, &text.bytes);
    free(expected_path);
    return text;
}

/* The text comes back unchanged, and the loader reads what was written. Returns the number of shards. */
static int test_prepare_round_trip(const PrepareText *from) {
    size_t n;
    int shards;
    CHECK(prepare("--out %s/a --shard-tokens 10k --threads 1 %s", folder, from->path) == 0, "prepare: %s", said);
    uint16_t *tokens = read_shards("a", "train", &n, &shards);
    CHECK(shards > 5 && (size_t)shards == (n + 9999) / 10000, "%zu tokens are %d shards", n, shards);
    char *text = decode(tokens, n);
    CHECK(strcmp(text, from->expected) == 0, "decode(shards) == documents");
    CHECK(count_files("a_val*") == 0 && count_files("*.new*") == 0 && count_files("*.tmp") == 0,
          "nothing else is left");
    free(text);
    free(tokens);

    char *pattern = in_folder("a_train_*.bin");
    Loader *l = loader_open(pattern, 64, tokenizer_vocab_size(tokenizer), -1, false, 1);
    CHECK(loader_tokens(l) == n, "the loader finds %zu tokens", n);
    loader_free(l);
    free(pattern);
    return shards;
}

/* Threads and ways of reading change nothing. */
static void test_prepare_threads(const PrepareText *from, int shards) {
    CHECK(prepare("--out %s/b --shard-tokens 10k --threads 7 %s", folder, from->path) == 0, "prepare: %s", said);
    CHECK(prepare("--out %s/c --shard-tokens 10k - < %s", folder, from->path) == 0, "prepare: %s", said);
    int differ = 0;
    for (int i = 0; i < shards; i++) {
        char a[64], b[64], c[64];
        snprintf(a, sizeof a, "a_train_%06d.bin", i);
        snprintf(b, sizeof b, "b_train_%06d.bin", i);
        snprintf(c, sizeof c, "c_train_%06d.bin", i);
        char *pa = in_folder(a), *pb = in_folder(b), *pc = in_folder(c);
        differ += !same_file(pa, pb) || !same_file(pa, pc);
        free(pa);
        free(pb);
        free(pc);
    }
    CHECK(differ == 0, "shards do not depend on threads, nor on the text coming from a pipe");
}

/* A share for validation: each document is in one of the two, in order. */
static void test_prepare_share(const PrepareText *from) {
    size_t n, val_n;
    int shards;
    CHECK(prepare("--out %s/d --val 0.1 %s", folder, from->path) == 0, "prepare: %s", said);
    uint16_t *tokens = read_shards("d", "train", &n, &shards), *val_tokens = read_shards("d", "val", &val_n, &shards);
    char *train_text = decode(tokens, n), *val_text = decode(val_tokens, val_n);
    const char *t = train_text, *v = val_text;
    int in_train = 0, in_val = 0, in_none = 0;
    for (const char *d = from->expected; *d;) {
        const char *end = strchr(d + 1, '\1');
        size_t length = end ? (size_t)(end - d) : strlen(d);
        if (strncmp(t, d, length) == 0 && (t[length] == 0 || t[length] == '\1')) {
            t += length;
            in_train++;
        } else if (strncmp(v, d, length) == 0 && (v[length] == 0 || v[length] == '\1')) {
            v += length;
            in_val++;
        } else in_none++;
        d += length;
    }
    CHECK(in_none == 0 && *t == 0 && *v == 0, "every document is in one of train and val, complete and in order");
    CHECK(in_val > 60 && in_val < 80 && in_train == DOCUMENTS - in_val, "%d of %d are for validation", in_val,
          DOCUMENTS);
    free(tokens);
    free(val_tokens);
    free(train_text);
    free(val_text);
}

/* A file for validation, several files for training; a run of fewer shards leaves none of the old ones. */
static void test_prepare_files(const PrepareText *from, const char *val_path) {
    size_t n;
    int shards;
    CHECK(count_files("a_train_*") > 5, "before");
    CHECK(prepare("--out %s/a --val %s %s %s", folder, val_path, from->path, from->path) == 0, "prepare: %s", said);
    CHECK(strstr(said, "removed") != NULL, "says that old shards were removed: %s", said);
    CHECK(count_files("a_train_*") == 1 && count_files("a_val_*") == 1, "shards of an earlier run are gone");
    uint16_t *tokens = read_shards("a", "val", &n, &shards);
    char *text = decode(tokens, n);
    CHECK(strcmp(text, "\1A short one.") == 0, "validation text: %s", text);
    free(tokens);
    free(text);
    tokens = read_shards("a", "train", &n, &shards);
    text = decode(tokens, n);
    CHECK(strlen(text) == 2 * from->bytes && strncmp(text, from->expected, from->bytes) == 0 &&
              strcmp(text + from->bytes, from->expected) == 0,
          "two files, one after the other");
    free(tokens);
    free(text);
    CHECK(prepare("--out %s/a %s", folder, val_path) == 0 && count_files("a_val_*") == 0,
          "without --val no validation shard of an earlier run is left");
}

/* The files that the refusals below name. */
static void write_useless_files(void) {
    char *empty = in_folder("empty.txt"), *newlines = in_folder("newlines.txt"), *zeros = in_folder("zeros.txt");
    write_file(empty, "", 0);
    write_file(newlines, "\n\n<|endoftext|>\n\n", 17);
    write_file(zeros, "", 0);
    if (truncate(zeros, 70 << 20) != 0) die("cannot make %s", zeros);
    free(empty);
    free(newlines);
    free(zeros);
}

static void check_refused_arguments(void) {
    static const struct {
        const char *arguments, *words; /* %s: the folder */
        int status;
    } refusals[] = {
        {"--out %s/a %s/missing.txt", "missing.txt", 1},
        {"--out %s/a %s/empty.txt", "empty", 1},
        {"--out %s/a %s/newlines.txt", "no text", 1},
        {"--out %s/a %s/zeros.txt", "white space", 1},
        {"--out %s/a %s", "folder", 1},
        {"--out %s/a --val 1.5 %s/val.txt", "--val 1.5", 2},
        {"--out %s/a --val 0.05 %s/val.txt", "no document for validation", 1},
        {"--out %s/a --val - - %s/val.txt </dev/null", "more than once", 2},
        {"--out %s/a --shard-tokens 5 %s/val.txt", "--shard-tokens", 2},
        {"--out %s/a", "no text is given", 2},
        {"%s/val.txt", "--out", 2},
        {"--out %s/val.txt/a %s/val.txt", "val.txt", 1},
    };
    for (size_t i = 0; i < sizeof refusals / sizeof refusals[0]; i++) {
        char arguments[1024];
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wformat-nonliteral"
        snprintf(arguments, sizeof arguments, refusals[i].arguments, folder, folder);
#pragma GCC diagnostic pop
        int status = prepare("%s", arguments);
        const char *words = said, *line_end = strchr(words, '\n');
        CHECK(status == refusals[i].status && strstr(words, refusals[i].words) && line_end && !line_end[1],
              "prepare %s: status %d: %s", arguments, status, words);
    }
}

/* Refusals: one sentence, and the shards of the earlier run stay. */
static void test_prepare_refusals(const PrepareText *from, char *val_path) {
    char *kept = in_folder("a_train_000000.bin"), *copy = in_folder("kept"), *zeros = in_folder("zeros.txt");
    size_t kept_bytes;
    char *kept_contents = read_file(kept, &kept_bytes);
    write_file(copy, kept_contents, kept_bytes);
    free(kept_contents);
    write_useless_files();
    check_refused_arguments();
    CHECK(count_files("a_*") == 1 && same_file(kept, copy),
          "a refused run leaves the earlier shards as they were and nothing else");
    char *real = tokenizer_file;
    tokenizer_file = val_path;
    CHECK(prepare("--out %s/a %s", folder, val_path) == 1 && strstr(said, "val.txt"), "a text is no tokenizer: %s",
          said);
    tokenizer_file = real;
    char *command = xasprintf("ulimit -f 20; ./%sdata/prepare --tokenizer %s --out %s/a %s 2>&1",
                              getenv("OUT") ? getenv("OUT") : "", tokenizer_file, folder, from->path);
    int status = run(command);
    CHECK(status == 1 && strstr(said, "too large"), "a full disk: %s", said);
    CHECK(count_files("a_*") == 1 && same_file(kept, copy), "and nothing half-written stays");
    free(command);
    unlink(zeros);
    free(zeros);
    free(kept);
    free(copy);
}

static void test_prepare(void) {
    PrepareText text = prepare_text();
    char *val_path = in_folder("val.txt");
    write_file(val_path, "A short one.\n", 13);
    test_prepare_threads(&text, test_prepare_round_trip(&text));
    test_prepare_share(&text);
    test_prepare_files(&text, val_path);
    test_prepare_refusals(&text, val_path);
    free(val_path);
    free(text.expected);
    free(text.path);
}

/* Pieces of text with white space of every kind, in every script, whole and broken. */
static void make_text(char *text, size_t room, size_t *n, uint64_t *rng) {
    static const char *const bits[] = {"Mia",
                                       " had",
                                       " a",
                                       " red",
                                       "  ball",
                                       "\n",
                                       "\n\n",
                                       " \n",
                                       "\n ",
                                       "   ",
                                       "\t",
                                       " \t ",
                                       "'s",
                                       "'re",
                                       " 'll",
                                       " 12",
                                       "345",
                                       "...",
                                       " !?",
                                       "\xc2\xa0",
                                       " \xc2\xa0 ",
                                       "\xe2\x80\x83",
                                       "\xe3\x80\x80",
                                       "\xe4\xb8\xad\xe6\x96\x87",
                                       " \xe4\xb8\xad",
                                       "\xc2\x85",
                                       "\xff",
                                       "\r\n",
                                       "-",
                                       "\xe2\x80",
                                       "\xe1\x9a\x80",
                                       "\x1c",
                                       "\x7f",
                                       "\xc3\xa9"};
    *n = 0;
    for (const char *bit; *n + 16 < room; *n += strlen(bit)) {
        bit = bits[rng_below(rng, sizeof bits / sizeof bits[0])];
        memcpy(text + *n, bit, strlen(bit));
    }
}

/* A text cut at a safe place must give the tokens that it gives as a whole. */
static void test_safe_cuts(void) {
    char text[120];
    uint64_t rng = 12;
    int wrong = 0, uncut = 0;
    enum { TEXTS = 100000 };
    for (int i = 0; i < TEXTS; i++) {
        size_t n, count[2] = {0}, room[2] = {0};
        int *ids[2] = {0};
        make_text(text, 17 + rng_below(&rng, sizeof text - 17), &n, &rng);
        size_t cut = safe_cut(text, n);
        uncut += cut == 0;
        tokenizer_encode(tokenizer, text, n, false, &ids[0], &count[0], &room[0]);
        tokenizer_encode(tokenizer, text, cut, false, &ids[1], &count[1], &room[1]);
        tokenizer_encode(tokenizer, text + cut, n - cut, false, &ids[1], &count[1], &room[1]);
        wrong += n > 0 && (count[0] != count[1] || memcmp(ids[0], ids[1], count[0] * sizeof(int)) != 0);
        free(ids[0]);
        free(ids[1]);
    }
    CHECK(wrong == 0, "%d of %d texts cut at a safe place have other tokens", wrong, TEXTS);
    CHECK(uncut < TEXTS / 4, "most texts have a safe place: %d have none", uncut);
}

/* A document much longer than the parts it is encoded in. */
static void test_long_document(void) {
    size_t room = 3 << 20, n;
    char *text = (char *)xmalloc(room);
    uint64_t rng = 11;
    make_text(text, room, &n, &rng);
    memcpy(text, "A", 1);
    memcpy(text + n, "z", 1);
    n++;
    char *path = in_folder("long.txt");
    write_file(path, text, n);
    CHECK(prepare("--out %s/long %s", folder, path) == 0, "prepare: %s", said);
    size_t count, whole_count = 0, whole_room = 0;
    int shards, *whole = NULL;
    uint16_t *tokens = read_shards("long", "train", &count, &shards);
    tokenizer_encode(tokenizer, text, n, false, &whole, &whole_count, &whole_room);
    CHECK(count == whole_count + 1 && tokens[0] == tokenizer_eot(tokenizer),
          "a long document: %zu tokens in parts, %zu as a whole", count - 1, whole_count);
    size_t differ = 0;
    for (size_t i = 0; i < whole_count && i + 1 < count; i++) differ += tokens[i + 1] != whole[i];
    CHECK(differ == 0, "a long document in parts has the tokens of the whole");
    free(tokens);
    free(whole);

    /* a separator at every place relative to the blocks that are read */
    int wrong = 0;
    for (size_t before = (1 << 18) - 20; before < (1 << 18) + 5; before++) {
        FILE *f = xfopen(path, "wb");
        for (size_t i = 0; i < before; i++) fputc(i % 6 == 5 ? ' ' : 'a', f);
        fputs("<|endoftext|>b\n", f);
        fclose(f);
        wrong += prepare("--out %s/long %s", folder, path) != 0;
        tokens = read_shards("long", "train", &count, &shards);
        char *decoded = decode(tokens, count);
        wrong += decoded[0] != 1 || strcmp(decoded + 1 + before, "\1b") != 0;
        free(decoded);
        free(tokens);
    }
    CHECK(wrong == 0, "a separator across the border of two blocks is found");
    free(path);
    free(text);
}

/* ---------------------------------------------------------------------- memory

   A machine of 10^10 bytes. Attention takes 10^6 a token, with --recompute a tenth; the logits 5 x 10^6 up to 4,096
   tokens, then as much as 1,024 of them: so less memory is not always fewer tokens, and what fits is easily worked
   out. */

static const char *fake_name(void) { return "a machine"; }
static size_t fake_free(void) { return 10000000000; }
static void fake_memory(const Config *c, int B, size_t bytes[NUM_MEMORY]) {
    size_t N = (size_t)B * (size_t)c->T;
    memset(bytes, 0, NUM_MEMORY * sizeof *bytes);
    bytes[MEMORY_ATTENTION] = N * (c->recompute ? 100000 : 1000000);
    bytes[MEMORY_LOGITS] = (N <= 4096 ? N : 1024) * 5000000;
}
static const char *memory_flags[3];
static void run_out_of_memory(void *unused) {
    (void)unused;
    Backend fake;
    memset(&fake, 0, sizeof fake);
    fake.name = fake_name;
    fake.free_memory = fake_free;
    fake.memory = fake_memory;
    char *out = in_folder("no_run");
    const char *argv[] = {"train",         "--depth",       "1", "--steps", "1", "--seq", "64", "--out", out, "--batch",
                          memory_flags[0], memory_flags[1], NULL};
    if (!freopen("/dev/null", "w", stdout)) return;
    train(11 + (memory_flags[1] != NULL), (char **)argv, &fake);
}
static void check_advice(const char *batch, const char *flag, const char *word, const char *word2) {
    memory_flags[0] = batch;
    memory_flags[1] = flag;
    check_refusal(run_out_of_memory, NULL, 1, word, word2);
}
static void test_memory(void) {
    check_advice("100", NULL, "needs 10.7 GiB of memory and 9.3 are free", "--batch 76, with --accum 2");
    check_advice("100", NULL, "--seq 48", "or --recompute, which needs 5.4 GiB");
    check_advice("1000", NULL, "--batch 76, with --accum 14", "or --recompute and --batch 762, with --accum 2");
    check_advice("1000", "--recompute", "these would fit: --batch 762", "--seq 48");
}

/* ---------------------------------------------------------------------- stories */

typedef struct {
    uint64_t hash;
    size_t bytes;
} Print;

static int compare_prints(const void *a, const void *b) {
    uint64_t x = ((const Print *)a)->hash, y = ((const Print *)b)->hash;
    return x < y ? -1 : x > y;
}

/* Sentences of a story that follow the grammar without contradicting it; their number in *sentences. */
static int good_sentences(const char *text, size_t bytes, int *sentences) {
    Said said = nothing_said();
    int good = 0;
    *sentences = 0;
    for (const char *p = text, *end = text + bytes; p < end; (*sentences)++) {
        size_t n = sentence_length(p, (size_t)(end - p));
        good += match_sentence(p, n, &said);
        for (p += n; p < end && isspace((unsigned char)*p);) p++;
    }
    return good;
}

static bool follows(const char *sentence) {
    Said said = nothing_said();
    return match_sentence(sentence, strlen(sentence), &said);
}

static void test_stories(void) {
    enum { N = 20000 };
    static Print prints[N];
    int duplicates = 0, bad_length = 0, bad_count = 0, broken = 0, bad_ends = 0;
    for (int i = 0; i < N; i++) {
        size_t n;
        int sentences;
        char *s = story(1, (uint64_t)i, &n);
        prints[i].hash = n;
        for (size_t k = 0; k < n; k++) prints[i].hash = rng_mix(prints[i].hash, (unsigned char)s[k]);
        bad_length += n < 300 || n > 1100 || strlen(s) != n;
        bad_ends += s[n - 1] == '\n' || strchr(s, '{') || strchr(s, '}') || strstr(s, "endoftext");
        if (i % 5 == 0) { /* reading is slower than writing */
            int good = good_sentences(s, n, &sentences);
            broken += good != sentences;
            bad_count += sentences < 8 || sentences > 16;
        }
        free(s);
    }
    qsort(prints, N, sizeof *prints, compare_prints);
    for (int i = 1; i < N; i++) duplicates += prints[i].hash == prints[i - 1].hash;
    CHECK(duplicates == 0, "no two of 20,000 stories are the same");
    CHECK(bad_length == 0, "300 to 1,100 bytes");
    CHECK(bad_count == 0, "8 to 16 sentences");
    CHECK(bad_ends == 0, "no slot is left open, no newline at the end");
    CHECK(broken == 0, "the checker accepts every sentence, and finds no contradiction in %d stories", N / 5);

    size_t n, m, got;
    char *a = story(3, 17, &n), *b = story(3, 17, &m), *c = story(4, 17, &got);
    CHECK(n == m && strcmp(a, b) == 0, "a story is the same every time");
    CHECK(strcmp(a, c) != 0, "another seed, another story");
    free(b);
    free(c);
    char *all = stories(3, 20000, &got);
    char *expected = xasprintf("\n<|endoftext|>\n%s\n<|endoftext|>\n", a);
    CHECK(got >= 20000 && got < 21200 && strlen(all) == got && strstr(all, expected),
          "story 17 is in the first 20,000 bytes of all stories");
    CHECK(strcmp(all + got - 15, "\n<|endoftext|>\n") == 0, "the last one is complete");
    char *more = stories(3, 40000, &got);
    CHECK(strncmp(more, all, strlen(all)) == 0, "more stories begin with the same ones");
    free(a);
    free(all);
    free(more);
    free(expected);

    /* the checker must be able to say no */
    CHECK(follows("Once upon a time, there was a kind girl named Mia."), "a sentence");
    CHECK(follows("\"Where is my red ball?\" cried Tom."), "speech");
    CHECK(follows("Mia ran home to her mom in the rain."), "her mom");
    CHECK(!follows("Mia ran home to his mom in the rain."), "the pronoun must agree");
    CHECK(!follows("Once upon a time, there was a kind boy named Mia."), "so must the kind");
    CHECK(!follows("Once upon a time, there was a kind girl named."), "a word is missing");
    CHECK(!follows("Once upon time, there was a kind girl named Mia."), "a word is missing");
    CHECK(!follows("Once upon a time, there was a girl kind named Mia."), "words are swapped");
    CHECK(!follows("Once upon a time, there was a kind girl named Xyz."), "a word from elsewhere");
    CHECK(!follows("Once upon a time, there was a kind girl named Mia"), "the end is missing");
    CHECK(!follows("once upon a time, there was a kind girl named Mia."), "the capital is missing");
    CHECK(!follows("Mia and Mia were best friends."), "two who must differ");
    CHECK(!follows("Mia was so glad that she gave Tom a big hug. "), "white space at the end");
    CHECK(!follows(""), "nothing");
    int sentences;
    const char *kept = "Once there was a girl called Mia who was very shy. She had a red ball that she loved very "
                       "much.\nMia ran to the tree, and there was the red ball.";
    const char *other_look = "Once there was a girl called Mia who was very shy. She had a red ball that she loved "
                             "very much.\nMia ran to the tree, and there was the blue ball.";
    const char *other_sex = "Once there was a girl called Mia who was very shy. He had a red ball that he loved very "
                            "much.\nMia ran to the tree, and there was the red ball.";
    CHECK(good_sentences(kept, strlen(kept), &sentences) == 3 && sentences == 3, "a story that keeps its words");
    CHECK(good_sentences(other_look, strlen(other_look), &sentences) == 2 && sentences == 3,
          "a ball that changes its colour");
    CHECK(good_sentences(other_sex, strlen(other_sex), &sentences) == 2 && sentences == 3,
          "a girl who turns into a boy");
    CHECK(sentence_length("\"Is it?\" asked Mia. So.", 23) == 19 && sentence_length("No.\nYes.", 8) == 3 &&
              sentence_length("\"No!\" He ran.", 13) == 5 && sentence_length("cut of", 6) == 6,
          "sentences are split");
}

/* What the reader of the grammar thinks of the questions: right endings follow the story, wrong ones contradict it. */
static void test_story_tasks(void) {
    enum { N = 400 };
    int without = 0, unfit = 0, labels[STORY_ENDINGS] = {0}, right = 0, wrong = 0, words = 0, cut = 0, known = 0;
    for (int i = 0; i < N; i++) {
        char *context, *endings[STORY_ENDINGS];
        int label;
        size_t n;
        char *whole = story(6, (uint64_t)i, &n);
        if (!story_choice(6, (uint64_t)i, &context, endings, &label)) {
            without++;
            free(whole);
            continue;
        }
        labels[label]++;
        Said said = nothing_said();
        for (const char *p = context, *end = p + strlen(context); p < end;) {
            size_t length = sentence_length(p, (size_t)(end - p));
            if (!match_sentence(p, length, &said)) unfit++;
            for (p += length; p < end && isspace((unsigned char)*p);) p++;
        }
        char *told = xasprintf("%s%s%s", context, context[strlen(context) - 1] == '\n' ? "" : " ", endings[label]);
        unfit += strncmp(whole, told, strlen(told)) != 0;
        for (int e = 0; e < STORY_ENDINGS; e++) {
            Said then = said;
            int fits = match_sentence(endings[e], strlen(endings[e]), &then);
            right += e == label && fits;
            wrong += e != label && fits;
            for (int other = 0; other < e; other++) unfit += strcmp(endings[e], endings[other]) == 0;
        }
        for (int e = 0; e < STORY_ENDINGS; e++) free(endings[e]);
        free(context);
        free(told);

        char *text = story_last_word(6, (uint64_t)i);
        if (text) {
            char *last = strrchr(text, ' ') + 1, *earlier = strstr(text, last);
            while (earlier < last &&
                   (isalpha((unsigned char)earlier[-1]) || isalpha((unsigned char)earlier[strlen(last)])))
                earlier = strstr(earlier + 1, last);
            words++;
            cut += strncmp(text, whole, strlen(text)) == 0 && !isalpha((unsigned char)whole[strlen(text)]);
            known += earlier < last;
        }
        free(text);
        free(whole);
    }
    CHECK(without == 0 && unfit == 0,
          "every story has a question: %d have none; contexts and right endings are the stories': %d are not", without,
          unfit);
    CHECK(right == N && wrong == 0, "%d of %d right endings follow the story, %d of %d wrong ones", right, N, wrong,
          3 * N);
    for (int e = 0; e < STORY_ENDINGS; e++)
        CHECK(labels[e] > N / 8 && labels[e] < N / 2, "the answer is at any place: %d times at %d", labels[e], e);
    CHECK(words > N / 2 && cut == words && known == words,
          "%d last words, %d of them at the end of a piece of the story, %d said before", words, cut, known);
}

static void test_make_stories(void) {
    char *path = in_folder("made.txt"), *out = getenv("OUT");
    size_t n, expected_bytes;
    char *command = xasprintf("./%sdata/make_stories --bytes 20k --seed 9 --first 2 --out %s 2>/dev/null && "
                              "./%sdata/make_stories --bytes 20k --seed 9 --first 2 --out - 2>/dev/null | cmp - %s",
                              out ? out : "", path, out ? out : "", path);
    CHECK(run(command) == 0, "make_stories writes the same to a file and to standard output");
    char *text = read_file(path, &n), *expected = stories(9, 30000, &expected_bytes), *third = expected;
    for (int i = 0; i < 2; i++) third = strstr(third, "<|endoftext|>\n") + 14;
    CHECK(n >= 20000 && strncmp(text, third, n) == 0, "--first 2 begins with the third story");
    free(text);
    free(expected);
    free(command);
    command = xasprintf("ulimit -f 10; ./%sdata/make_stories --bytes 1M --out %s/limited.txt 2>/dev/null",
                        out ? out : "", folder);
    int status = run(command);
    CHECK(status == 1 && count_files("limited*") == 0, "a full disk leaves nothing");
    free(command);
    command = xasprintf("./%sdata/make_stories --bytes 1M 2>/dev/null", out ? out : "");
    status = run(command);
    CHECK(status == 2, "--out is needed");
    free(command);
    char *context, *endings[STORY_ENDINGS];
    int label;
    /* a line of each form, taken apart by hand: these texts have no escapes but quotes and newlines */
    for (int last = 0; last < 2; last++) {
        command = xasprintf("./%sdata/make_stories --tasks %s --count 1 --first 3 --seed 6 --out %s 2>/dev/null",
                            out ? out : "", last ? "last-word" : "choice", path);
        status = run(command);
        char *line = read_file(path, &n), *plain = (char *)xmalloc(n + 1), *p = plain, *expected;
        for (const char *q = line; *q; q++) {
            if (*q == '\\') {
                q++;
                *p++ = *q == 'n' ? '\n' : *q;
            } else *p++ = *q;
        }
        *p = 0;
        if (last) {
            char *text = story_last_word(6, 3);
            expected = xasprintf("{\"text\":\"%s\"}\n", text);
            free(text);
        } else {
            story_choice(6, 3, &context, endings, &label);
            expected = xasprintf("{\"ctx\":\"%s\",\"endings\":[\"%s\",\"%s\",\"%s\",\"%s\"],\"label\":%d}\n", context,
                                 endings[0], endings[1], endings[2], endings[3], label);
            free(context);
            for (int e = 0; e < STORY_ENDINGS; e++) free(endings[e]);
        }
        CHECK(status == 0 && strcmp(plain, expected) == 0, "a task file: %s", plain);
        free(line);
        free(plain);
        free(expected);
        free(command);
    }
    const char *const bad[] = {"--tasks choice --bytes 5", "--count 5", "--tasks both", "--tasks choice --count 0"};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        command = xasprintf("./%sdata/make_stories %s --out %s 2>/dev/null", out ? out : "", bad[i], path);
        status = run(command);
        CHECK(status == 2, "make_stories %s is refused", bad[i]);
        free(command);
    }
    free(path);
}

int main(int argc, char **argv) {
    (void)argc;
    program_name(argv[0]);
    char name[] = "/tmp/test_data.XXXXXX";
    folder = mkdtemp(name);
    if (!folder) die("cannot make a folder in /tmp");

    /* stories, and text with white space of all kinds: without tokens for runs of it, wrong cuts would not show */
    size_t bytes, more;
    uint64_t rng = 10;
    char *text = stories(2, 300000, &bytes);
    text = (char *)xrealloc(text, bytes + 100000);
    make_text(text + bytes, 100000, &more, &rng);
    bytes += more;
    tokenizer = tokenizer_train(text, bytes, 3300, false);
    tokenizer_file = in_folder("tokenizer.bin");
    tokenizer_save(tokenizer, tokenizer_file);
    free(text);

    test_shard_refusals();
    test_loader();
    test_loader_hash();
    test_long_windows();
    test_epoch_sizes();
    test_memory();
    test_stories();
    test_story_tasks();
    test_make_stories();
    test_prepare();
    test_safe_cuts();
    test_long_document();

    tokenizer_free(tokenizer);
    free(tokenizer_file);
    char *command = xasprintf("rm -r %s", folder);
    if (system(command) != 0) warn("%s stays", folder);
    free(command);
    return test_summary("test_data");
}
