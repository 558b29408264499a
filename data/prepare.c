/* Turns text into token shards: documents are read one after the other, encoded in parallel and written in order, so
   that any amount of text takes the same memory and the result does not depend on the number of threads.

   text.h says how text is cut into documents. A document becomes the token <|endoftext|> and then its text's tokens, as
   in llm.c. */
#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "../gsa/flags.h"
#include "loader.h"
#include "text.h"
#include "../gsa/util.h"
#include "../tokenizer/tokenizer.h"

#ifdef _OPENMP
#include <omp.h>
#endif

enum { BATCH = 8 << 20, FULL = BATCH - (1 << 18) }; /* bytes; a batch is encoded when it holds FULL */

/* ---------------------------------------------------------------------- shards

   They are made under names that end in .new and get their own names only when all of them are complete; then those of
   an earlier run go first. So an interrupted run changes nothing, and there is never a mix of two runs. */

enum { TRAIN, VAL, SPLITS };
static const char *const split_names[SPLITS] = {"train", "val"};

typedef struct {
    ShardWriter *writer;
    int shards;       /* begun */
    int64_t in_shard; /* tokens in the open one */
    int64_t documents, bytes, tokens;
} Split;

static Split splits[SPLITS];
static const char *prefix;
static bool complete;

static char *shard_name(int split, int index, const char *suffix) {
    return xasprintf("%s_%s_%06d.bin%s", prefix, split_names[split], index, suffix);
}

static bool exists(int split, int index, const char *suffix) {
    char *name = shard_name(split, index, suffix);
    bool found = access(name, F_OK) == 0;
    free(name);
    return found;
}

static void remove_shard(int split, int index, const char *suffix) {
    char *name = shard_name(split, index, suffix);
    if (unlink(name) != 0 && errno != ENOENT) warn("cannot remove %s: %s", name, strerror(errno));
    free(name);
}

static void remove_new_shards(void) {
    if (complete) return;
    for (int s = 0; s < SPLITS; s++)
        for (int i = 0; i < splits[s].shards || exists(s, i, ".new") || exists(s, i, ".new.tmp"); i++) {
            remove_shard(s, i, ".new");
            remove_shard(s, i, ".new.tmp");
        }
}

static char *lock_path;
static void remove_lock(void) { unlink(lock_path); }

/* PREFIX.lock is there for as long as shards of this prefix are being made. Who is killed leaves the file, but no
   lock. */
static void lock_prefix(void) {
    struct stat held, there;
    lock_path = xasprintf("%s.lock", prefix);
    for (;;) {
        FILE *f = xfopen(lock_path, "a"); /* stays open */
        lock_file(f, prefix);
        /* the process before us may have removed the file between our opening and locking it */
        bool same = fstat(fileno(f), &held) == 0 && stat(lock_path, &there) == 0 && held.st_ino == there.st_ino;
        if (same) break;
        fclose(f);
    }
    atexit(remove_lock);
}

static void close_shard(Split *p) {
    if (p->writer) shard_close(p->writer);
    p->writer = NULL;
}

static void write_tokens(int split, const uint16_t *tokens, size_t count, int64_t shard_tokens) {
    Split *p = &splits[split];
    p->tokens += (int64_t)count;
    while (count > 0) {
        if (!p->writer) {
            char *name = shard_name(split, p->shards++, ".new");
            p->writer = shard_create(name);
            p->in_shard = 0;
            free(name);
        }
        size_t fits = (size_t)(shard_tokens - p->in_shard), n = count < fits ? count : fits;
        shard_append(p->writer, tokens, n);
        tokens += n;
        count -= n;
        p->in_shard += (int64_t)n;
        if (p->in_shard == shard_tokens) close_shard(p);
    }
}

static void publish_shards(void) {
    int stale = 0;
    for (int s = 0; s < SPLITS; s++) {
        int old = 0;
        close_shard(&splits[s]);
        while (exists(s, old, "")) old++;
        if (old > splits[s].shards) stale += old - splits[s].shards;
        /* from the last, so that an interruption leaves them numbered without gaps */
        while (old > 0) remove_shard(s, --old, "");
    }
    for (int s = 0; s < SPLITS; s++)
        for (int i = 0; i < splits[s].shards; i++) {
            char *from = shard_name(s, i, ".new"), *to = shard_name(s, i, "");
            if (rename(from, to) != 0) die("cannot rename %s to %s: %s", from, to, strerror(errno));
            free(from);
            free(to);
        }
    complete = true;
    sync_folder_of(prefix);
    if (stale > 0) printf("removed %d more shard%s of an earlier run of this name\n", stale, stale == 1 ? "" : "s");
}

/* ---------------------------------------------------------------------- encoding a batch */

typedef struct {
    size_t at, bytes; /* in the batch's text */
    bool begins;      /* a document, so that <|endoftext|> comes first */
    int split;
    int *ids;
    size_t count, room;
} Job;

typedef struct {
    const Tokenizer *tokenizer;
    int64_t shard_tokens;
    int threads;
    char *text;
    size_t bytes, room;
    Job *jobs;
    size_t job_count, job_room;
    uint16_t *tokens;
    size_t token_room;
} Batch;

static void flush(Batch *b) {
#ifdef _OPENMP
#pragma omp parallel for schedule(dynamic, 8) num_threads(b->threads)
#endif
    for (size_t i = 0; i < b->job_count; i++) {
        Job *j = &b->jobs[i];
        tokenizer_encode(b->tokenizer, b->text + j->at, j->bytes, false, &j->ids, &j->count, &j->room);
    }
    for (size_t i = 0; i < b->job_count; i++) {
        Job *j = &b->jobs[i];
        size_t n = 0;
        if (j->count + 1 > b->token_room)
            b->tokens = (uint16_t *)xrealloc(b->tokens, (b->token_room = 2 * (j->count + 1)) * sizeof *b->tokens);
        if (j->begins) b->tokens[n++] = (uint16_t)tokenizer_eot(b->tokenizer);
        for (size_t t = 0; t < j->count; t++) b->tokens[n++] = (uint16_t)j->ids[t];
        write_tokens(j->split, b->tokens, n, b->shard_tokens);
        free(j->ids);
    }
    b->job_count = b->bytes = 0;
}

static void add_job(Batch *b, const char *text, size_t bytes, bool begins, int split) {
    if (b->bytes + bytes > b->room)
        b->text = (char *)xrealloc(b->text, b->room = b->bytes + bytes > BATCH ? b->bytes + bytes : BATCH);
    if (b->job_count == b->job_room) {
        b->job_room = 2 * b->job_room + 64;
        b->jobs = (Job *)xrealloc(b->jobs, b->job_room * sizeof *b->jobs);
    }
    memcpy(b->text + b->bytes, text, bytes);
    b->jobs[b->job_count++] = (Job){.at = b->bytes, .bytes = bytes, .begins = begins, .split = split};
    b->bytes += bytes;
    splits[split].documents += begins;
    splits[split].bytes += (int64_t)bytes;
    if (b->bytes >= FULL) flush(b);
}

/* ---------------------------------------------------------------------- reading documents */

/* A share of the documents, the same ones every time: multiples of the golden ratio spread evenly, so that of n
   documents close to share * n are chosen however small n is. */
static bool is_chosen(uint64_t document, double share) {
    return (double)((document + 1) * 0x9E3779B97F4A7C15ull) < share * 0x1p64;
}

typedef struct {
    Batch *batch;
    double val_share;
    int split;          /* SPLITS: by val_share */
    uint64_t documents; /* begun, over all files */
    int document_split;
} Reader;

static volatile sig_atomic_t interrupted;
static void on_interrupt(int number) { interrupted = number; }

static double bytes_done, bytes_total; /* total 0: unknown */

static void read_documents(Reader *r, const char *path) {
    Documents *d = documents_open(path);
    double before = bytes_done;
    while (documents_next(d)) {
        if (interrupted) die("interrupted; nothing was changed");
        if (d->begins) {
            r->document_split = r->split != SPLITS ? r->split : is_chosen(r->documents, r->val_share) ? VAL : TRAIN;
            r->documents++;
        }
        add_job(r->batch, d->text, d->bytes, d->begins, r->document_split);
        bytes_done = before + d->read;
        progress("preparing, MB", 1e-6 * (bytes_done < bytes_total ? bytes_done : 0.999 * bytes_total),
                 1e-6 * bytes_total);
    }
    bytes_done = before + d->read;
    if (d->documents == 0) die("%s has no text in it", input_name(path));
    documents_close(d);
}

/* ---------------------------------------------------------------------- */

static const char *tokenizer_path, *val;
static int64_t shard_tokens = 100000000, threads = 0;

static Flag flags[] = {
    {FLAG_TEXT, "tokenizer", &tokenizer_path, 0, 0, "FILE", "tokenizer (tokenizer/train_bpe makes one)", false},
    {FLAG_TEXT, "out", &prefix, 0, 0, "PREFIX", "shards are PREFIX_train_000000.bin ... and PREFIX_val_000000.bin ...",
     false},
    {FLAG_TEXT, "val", &val, 0, 0, "FILE|SHARE",
     "text for validation, or the share of the documents that goes there, such as 0.05", false},
    {FLAG_INT, "shard-tokens", &shard_tokens, 1024, 2147483647, "N", "tokens in a shard", false},
    {FLAG_INT, "threads", &threads, 0, 1024, "N", "0: all there are; the shards do not depend on it", false},
    {FLAG_TEXT, NULL, NULL, 0, 0, NULL, NULL, false}};

/* All inputs are looked at before hours go into the first one. */
static void look_at_inputs(char **texts, int count, const char *val_file) {
    int from_stdin = 0;
    bool all_known = true;
    for (int i = 0; i < count + (val_file != NULL); i++) {
        const char *path = i < count ? texts[i] : val_file;
        struct stat st;
        bool is_stdin = strcmp(path, "-") == 0;
        if (is_stdin && ++from_stdin > 1) die_usage("standard input (-) is named more than once");
        if (is_stdin || (stat(path, &st) == 0 && !S_ISREG(st.st_mode) && !S_ISDIR(st.st_mode))) {
            all_known = false; /* a pipe is not opened here: closing it again would stop its writer */
            continue;
        }
        fclose(xfopen(path, "rb"));
        if (st.st_size == 0) die("%s is empty", path);
        bytes_total += (double)st.st_size;
    }
    if (!all_known) bytes_total = 0;
}

static void report(int split) {
    const Split *p = &splits[split];
    if (p->shards == 0) return;
    printf("%s: %lld documents, %lld tokens, %.2f bytes a token, %d shard%s %s_%s_*.bin\n", split_names[split],
           (long long)p->documents, (long long)p->tokens, (double)p->bytes / (double)(p->tokens - p->documents),
           p->shards, p->shards == 1 ? "" : "s", prefix, split_names[split]);
}

int main(int argc, char **argv) {
    program_name(argv[0]);
    int inputs = parse_flags(flags, argc, argv,
                             "data/prepare --tokenizer FILE --out PREFIX [--val FILE|SHARE] [flags] TEXT...\n"
                             "Turns text into token shards. Documents are separated by <|endoftext|>, and line ends "
                             "next to it are left out;\n"
                             "TEXT - is standard input.\n\n");
    if (!tokenizer_path) die_usage("--tokenizer FILE is missing; tokenizer/train_bpe makes one");
    if (!prefix) die_usage("--out PREFIX is missing; shards are called PREFIX_train_000000.bin ...");
    if (inputs == 0) die_usage("no text is given; name one or more text files, or - for standard input");
    double share = 0;
    const char *val_file = NULL;
    if (val) {
        char *rest;
        share = strtod(val, &rest);
        if (rest == val || *rest) {
            share = 0;
            val_file = val;
        } else if (!(share > 0 && share < 1))
            die_usage("--val %s is not a share of the documents between 0 and 1, nor a file", val);
    }
    look_at_inputs(argv + 1, inputs, val_file);

    Tokenizer *tokenizer = tokenizer_load(tokenizer_path);
    if (tokenizer_vocab_size(tokenizer) > 65536)
        die("%s has %d entries, but shards have 16-bit tokens: at most 65536", tokenizer_path,
            tokenizer_vocab_size(tokenizer));
    const char *slash = strrchr(prefix, '/');
    if (slash && slash > prefix) {
        char *folder = xasprintf("%.*s", (int)(slash - prefix), prefix);
        make_folder(folder);
        free(folder);
    }
    lock_prefix();
    remove_new_shards();
    atexit(remove_new_shards);                              /* runs before the lock is removed */
    struct sigaction action = {.sa_handler = on_interrupt}; /* without SA_RESTART, so that a read that waits ends too */
    sigaction(SIGINT, &action, NULL);
    sigaction(SIGTERM, &action, NULL);

    Batch batch = {.tokenizer = tokenizer, .shard_tokens = shard_tokens, .threads = 1};
#ifdef _OPENMP
    batch.threads = threads > 0 ? (int)threads : omp_get_max_threads();
#endif
    Reader reader = {.batch = &batch, .val_share = share, .split = share > 0 ? SPLITS : TRAIN};
    double start = now_seconds();
    for (int i = 1; i <= inputs; i++) read_documents(&reader, argv[i]);
    reader.split = VAL;
    if (val_file) read_documents(&reader, val_file);
    flush(&batch);
    for (int s = 0; s <= (share > 0 ? VAL : TRAIN); s++)
        if (splits[s].documents == 0)
            die("--val %s leaves no document for %s, as there are only %lld; separate documents by <|endoftext|> or "
                "give --val a file",
                val, s == TRAIN ? "training" : "validation", (long long)reader.documents);
    publish_shards();
    if (bytes_total > 0) progress("preparing, MB", 1e-6 * bytes_total, 1e-6 * bytes_total);
    double seconds = now_seconds() - start;
    report(TRAIN);
    report(VAL);
    printf("%.1f MB in %.1f s: %.1f MB/s\n", bytes_done / 1e6, seconds, bytes_done / 1e6 / seconds);

    free(batch.jobs);
    free(batch.text);
    free(batch.tokens);
    tokenizer_free(tokenizer);
    return 0;
}
