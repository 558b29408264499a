#include "loader.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include "text.h"

enum { HEADER_INTS = SHARD_HEADER / 4, SHARD_VERSION = 1 };

typedef struct {
    char *name;
    const uint16_t *tokens;
    uint64_t count;
    uint64_t windows, windows_before; /* of this shard, of all shards before it */
    void *map;                        /* NULL for tokens in memory */
    size_t map_bytes;
} Shard;

struct Loader {
    int T, V, eot;
    bool shuffle;
    uint64_t seed;
    Shard *shards;
    int shard_count;
    uint64_t windows, tokens;
    LoaderState state;
};

/* ---------------------------------------------------------------------- opening */

int64_t shard_length(const void *start, size_t got, int64_t bytes, const char *path) {
    int32_t header[HEADER_INTS] = {0};
    memcpy(header, start, got < sizeof header ? got : sizeof header);
    if (got == 0) die("%s is empty; make it again with data/prepare", path);
    if (got < 4 || header[0] != SHARD_MAGIC) {
        const char *format = known_format(start, got);
        if (format) die("%s is not a token shard; it is %s", path, format);
        die("%s is not a token shard; data/prepare makes shards from text", path);
    }
    if (got < sizeof header) die("%s is truncated: it ends within its header; make it again with data/prepare", path);
    if (header[1] != SHARD_VERSION)
        die("%s is a shard of version %d; only version %d is known", path, header[1], SHARD_VERSION);
    int64_t count = header[2], should = SHARD_HEADER + 2 * count;
    if (count < 0)
        die("%s is damaged: its header says %lld tokens; make it again with data/prepare", path, (long long)count);
    if (bytes >= 0 && bytes < should)
        die("%s is truncated: its header says %lld tokens, but there are only %lld; make it again with data/prepare",
            path, (long long)count, (long long)(bytes - SHARD_HEADER) / 2);
    if (bytes > should)
        die("%s is damaged: its header says %lld tokens, but %lld more bytes follow; make it again with data/prepare",
            path, (long long)count, (long long)(bytes - should));
    return count;
}

#define MAPPED "%s is not a regular file; shards are mapped and cannot come through a pipe: store it first"

static void map_shard(Shard *s, const char *path, bool shuffle) {
    char start[SHARD_HEADER];
    struct stat st;
    /* before it is opened: the opening of a pipe waits for its writer */
    if (stat(path, &st) == 0 && !S_ISREG(st.st_mode) && !S_ISDIR(st.st_mode)) die(MAPPED, path);
    FILE *f = xfopen(path, "rb");
    int64_t bytes = file_bytes(f, path);
    s->count = (uint64_t)shard_length(start, fread(start, 1, sizeof start, f), bytes, path);
    s->map_bytes = (size_t)bytes;
    s->map = mmap(NULL, s->map_bytes, PROT_READ, MAP_SHARED, fileno(f), 0);
    if (s->map == MAP_FAILED) die("cannot map %s into memory: %s", path, strerror(errno));
    /* only advice: no matter if it fails */
    posix_madvise(s->map, s->map_bytes, shuffle ? POSIX_MADV_RANDOM : POSIX_MADV_SEQUENTIAL);
    fclose(f);
    s->name = xstrdup(path);
    s->tokens = (const uint16_t *)((const char *)s->map + SHARD_HEADER);
}

static void count_windows(Loader *l, const char *name) {
    const Shard *longest = &l->shards[0];
    int without = 0;
    for (int i = 0; i < l->shard_count; i++) {
        Shard *s = &l->shards[i];
        if (s->count > longest->count) longest = s;
        s->windows_before = l->windows;
        /* a window's last target is the next one's first input */
        s->windows = s->count > 0 ? (s->count - 1) / (uint64_t)l->T : 0;
        l->windows += s->windows;
        l->tokens += s->count;
        without += s->windows == 0;
    }
    if (l->windows == 0) {
        if (longest->count < 2)
            die("%s: %llu tokens are too few to train on; use more text", name, (unsigned long long)l->tokens);
        die("%s: %s%s has %llu tokens, too few for a window of T = %d, which needs %d; at most --seq %llu would do, or "
            "%s",
            name, l->shard_count > 1 ? "the longest shard, " : "it", l->shard_count > 1 ? longest->name : "",
            (unsigned long long)longest->count, l->T, l->T + 1, (unsigned long long)longest->count - 1,
            l->shard_count > 1 ? "longer shards (data/prepare --shard-tokens)" : "more text");
    }
    if (without > 0)
        warn("%s: %d of %d shards are shorter than a window of T = %d and not used", name, without, l->shard_count,
             l->T);
}

static Loader *new_loader(int shard_count, int T, int V, int eot, bool shuffle, uint64_t seed) {
    Loader *l = (Loader *)xcalloc(1, sizeof *l);
    l->T = T;
    l->V = V;
    l->eot = eot;
    l->shuffle = shuffle;
    l->seed = seed;
    l->shard_count = shard_count;
    l->shards = (Shard *)xcalloc((size_t)shard_count, sizeof *l->shards);
    return l;
}

Loader *loader_open(const char *pattern, int T, int V, int eot, bool shuffle, uint64_t seed) {
    int count;
    if (strcmp(pattern, "-") == 0) die(MAPPED, "standard input");
    char **files = glob_files(pattern, &count);
    if (count == 0) die("no file is called or matches %s; data/prepare makes shards from text", pattern);
    Loader *l = new_loader(count, T, V, eot, shuffle, seed);
    for (int i = 0; i < count; i++) map_shard(&l->shards[i], files[i], shuffle);
    free_files(files, count);
    count_windows(l, pattern);
    return l;
}

Loader *loader_from_tokens(const uint16_t *tokens, size_t count, const char *name, int T, int V, int eot, bool shuffle,
                           uint64_t seed) {
    Loader *l = new_loader(1, T, V, eot, shuffle, seed);
    l->shards[0].name = xstrdup(name);
    l->shards[0].tokens = tokens;
    l->shards[0].count = count;
    count_windows(l, name);
    return l;
}

void loader_free(Loader *l) {
    if (!l) return;
    for (int i = 0; i < l->shard_count; i++) {
        if (l->shards[i].map) munmap(l->shards[i].map, l->shards[i].map_bytes);
        free(l->shards[i].name);
    }
    free(l->shards);
    free(l);
}

/* ---------------------------------------------------------------------- order */

/* A bijection of [0, n) chosen by key, without a table: a Feistel network on the smallest even number of bits that
   holds n, applied again while its result is n or more (at most four times on average). */
static uint64_t permute(uint64_t x, uint64_t n, uint64_t key) {
    int half = 1;
    while (half < 32 && (uint64_t)1 << (2 * half) < n) half++;
    uint64_t mask = ((uint64_t)1 << half) - 1;
    do {
        uint64_t left = x >> half, right = x & mask;
        for (uint64_t round = 0; round < 4; round++) {
            uint64_t next = left ^ (rng_mix(key + round, right) & mask);
            left = right;
            right = next;
        }
        x = left << half | right;
    } while (x >= n);
    return x;
}

/* The shard that window w (in file order) lies in. */
static const Shard *shard_of(const Loader *l, uint64_t w) {
    int low = 0, high = l->shard_count - 1; /* the last shard whose windows_before <= w */
    while (low < high) {
        int middle = (low + high + 1) / 2;
        if (l->shards[middle].windows_before <= w) low = middle;
        else high = middle - 1;
    }
    return &l->shards[low];
}

/* The first token of the next window. */
static const uint16_t *place_window(const Loader *l, const Shard **shard) {
    uint64_t T = (uint64_t)l->T, w = l->state.window, key = rng_mix(l->seed, l->state.epoch);
    if (l->shuffle) w = permute(w, l->windows, rng_mix(key, 0));
    const Shard *s = *shard = shard_of(l, w);
    /* last: the last place where a window still fits */
    uint64_t last = s->count - 1 - T, start = (w - s->windows_before) * T;
    if (l->shuffle) {
        /* otherwise a model would see every token at the same position in every epoch; what no longer fits at the
           end is moved back */
        start += rng_mix(key, 1 + (uint64_t)(s - l->shards)) % (s->windows > 1 ? T : last + 1);
        if (start > last) start = last;
    }
    if (l->eot >= 0)
        for (uint64_t i = start; i <= last; i++)
            if (s->tokens[i] == l->eot) {
                start = i;
                break;
            }
    return s->tokens + start;
}

void loader_next(Loader *l, int *x, int *y, int B) {
    int T = l->T;
    for (int b = 0; b < B; b++, x += T, y += T) {
        const Shard *s;
        const uint16_t *tokens = place_window(l, &s);
        int largest = 0;
        for (int t = 0; t <= T; t++) largest = tokens[t] > largest ? tokens[t] : largest;
        if (largest >= l->V) {
            int t = 0;
            while (tokens[t] < l->V) t++;
            die("%s has token %d at position %lld, but the vocabulary has only %d; it was made with another tokenizer",
                s->name, tokens[t], (long long)(tokens - s->tokens) + t, l->V);
        }
        for (int t = 0; t < T; t++) {
            x[t] = tokens[t];
            y[t] = tokens[t + 1];
        }
        if (++l->state.window == l->windows) {
            l->state.window = 0;
            l->state.epoch++;
        }
    }
}

void loader_skip(Loader *l, uint64_t windows) {
    uint64_t at = l->state.window + windows;
    l->state.epoch += at / l->windows;
    l->state.window = at % l->windows;
}

LoaderState loader_state(const Loader *l) { return l->state; }

void loader_set_state(Loader *l, LoaderState state) {
    if (state.window >= l->windows)
        die("the run to go on with stood at window %llu, but %s has only %llu windows; give the data and T that it "
            "began with",
            (unsigned long long)state.window, l->shards[0].name, (unsigned long long)l->windows);
    l->state = state;
}

uint64_t loader_windows(const Loader *l) { return l->windows; }
uint64_t loader_tokens(const Loader *l) { return l->tokens; }

uint64_t loader_hash(const Loader *l) {
    enum { PIECE = 2048, PIECES = 32 };
    uint64_t hash = 0;
    for (int i = 0; i < l->shard_count; i++) {
        const Shard *s = &l->shards[i];
        bool whole = s->count <= PIECE * PIECES;
        uint64_t size = whole ? s->count : PIECE, pieces = whole ? 1 : PIECES;
        hash = rng_mix(hash, s->count);
        for (uint64_t p = 0; p < pieces; p++) {
            const uint16_t *tokens = s->tokens + (whole ? 0 : (s->count - PIECE) * p / (PIECES - 1));
            for (uint64_t t = 0; t < size; t++) hash = rng_mix(hash, tokens[t]);
        }
    }
    return hash;
}

/* ---------------------------------------------------------------------- writing */

struct ShardWriter {
    FILE *f;
    char *path;
    int64_t count;
};

static void write_header(ShardWriter *w) {
    int32_t header[HEADER_INTS] = {SHARD_MAGIC, SHARD_VERSION, (int32_t)w->count};
    xfwrite(header, sizeof header, 1, w->f, w->path);
}

ShardWriter *shard_create(const char *path) {
    ShardWriter *w = (ShardWriter *)xcalloc(1, sizeof *w);
    w->f = create_file(path);
    w->path = xstrdup(path);
    write_header(w);
    return w;
}

void shard_append(ShardWriter *w, const uint16_t *tokens, size_t count) {
    w->count += (int64_t)count;
    if (w->count > INT32_MAX)
        die("%s would get more than %d tokens, which its header cannot say; use smaller shards", w->path, INT32_MAX);
    xfwrite(tokens, sizeof *tokens, count, w->f, w->path);
}

void shard_close(ShardWriter *w) {
    /* writes what was held back, so this is where a full disk may show */
    if (fseek(w->f, 0, SEEK_SET) != 0) die("cannot write %s: %s", w->path, strerror(errno));
    write_header(w);
    commit_file(w->f, w->path);
    free(w->path);
    free(w);
}
