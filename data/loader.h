/* Batches of token windows from shards in llm.c's format (256 int32: magic 20240520, version 1, number of tokens; then
   uint16 tokens). The shards are mapped, so any amount of data takes no memory; indices are 64 bits. */
#ifndef GSA_LOADER_H
#define GSA_LOADER_H

#include "../gsa/util.h"

#ifdef __cplusplus
extern "C" {
#endif

enum { SHARD_MAGIC = 20240520, SHARD_HEADER = 1024 }; /* bytes */
/* Tokens of a shard that starts with these bytes, its header or less where it ends before; `bytes`: of the whole file,
   -1 where that is not known. Dies with a sentence where it is no shard, or has another length. */
int64_t shard_length(const void *start, size_t got, int64_t bytes, const char *path);

/* All that changes while batches are drawn: saving these integers and putting them back continues exactly. */
typedef struct {
    uint64_t epoch;
    uint64_t window; /* next window of this epoch, 0 .. windows - 1, counted in shuffled order */
} LoaderState;

typedef struct Loader Loader;

/* pattern: a file name or a glob, shards in sorted order. T: window length. V: tokens >= V are refused with a
   sentence that names shard and position. shuffle: windows of all shards in an order that depends on (seed, epoch)
   alone, and shifted by a fraction of a window that differs between epochs; otherwise in file order. eot >= 0: each
   window starts at the first token eot at or after its place (--doc-start), where its shard has one with T tokens
   after it; -1: off. Windows do not cross from shard to shard: the longest one limits T. Dies with a sentence on a
   missing, empty, foreign or truncated shard and where none is long enough, and warns where some are too short. */
Loader *loader_open(const char *pattern, int T, int V, int eot, bool shuffle, uint64_t seed);
/* The same over tokens in memory, which must outlive the loader; name is what sentences call them. */
Loader *loader_from_tokens(const uint16_t *tokens, size_t count, const char *name, int T, int V, int eot, bool shuffle,
                           uint64_t seed);
void loader_free(Loader *l);

/* The next B windows: inputs x (B, T) and targets y (B, T), y[t] = x[t + 1] in the stream. Goes on with the next
   epoch at the end. */
void loader_next(Loader *l, int *x, int *y, int B);
/* Passes over as many windows: those of other processes of the run. */
void loader_skip(Loader *l, uint64_t windows);

LoaderState loader_state(const Loader *l);
void loader_set_state(Loader *l, LoaderState state);
uint64_t loader_windows(const Loader *l); /* windows in one epoch */
uint64_t loader_tokens(const Loader *l);  /* tokens in all shards */
/* A hash of what the shards hold, in their order: of each its length and 32 even pieces, or all of a short one. Names
   play no part. */
uint64_t loader_hash(const Loader *l);

/* Writes one shard: create, append any number of times, close (fills in the count, renames from its temporary name). */
typedef struct ShardWriter ShardWriter;
ShardWriter *shard_create(const char *path);
void shard_append(ShardWriter *w, const uint16_t *tokens, size_t count);
void shard_close(ShardWriter *w);

#ifdef __cplusplus
}
#endif
#endif
