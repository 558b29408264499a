/* The processes of one run, one a GPU: where each stands (its rank, from a launcher's environment or from --gpus), how
   they find each other over TCP, what they tell each other between the passes, and what becomes of the run when one of
   them fails. Gradients and weights do not pass here; they go from GPU to GPU (gsa/cuda/ranks.cuh).

   The run computes what one process would: its step is made of --accum batches, and batch i is that of rank i mod
   count. Each rank begins with the same weights and makes the same updates from the same sums, so that no weights need
   to be sent.

   Rank 0 has two connections with every other rank. Through one the main threads exchange numbers (ranks_gather,
   ranks_broadcast). The other belongs to a thread of each process, which tells every second what its main thread does,
   and ends the run with one sentence when a rank dies, says nothing for ranks_patience seconds, or does not get on
   for as long. */
#ifndef GSA_RANKS_H
#define GSA_RANKS_H

#include "../model.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Seconds without a word or without progress after which a rank counts as lost, and seconds within which all must come;
   tests shorten them. */
extern double ranks_patience, ranks_coming;

typedef struct {
    int rank, count;   /* this process, of how many; count 0: no launcher has started it */
    int local;         /* its GPU among those of its machine */
    char address[256]; /* of rank 0 */
    int port;
    int listener;       /* rank 0: a socket that listens at that port already; -1: none */
    const char *source; /* whose variables said so: "torchrun", "mpirun", "srun" */
} RankPlace;

/* What a launcher has put into the environment, read by `get` (getenv): RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and
   MASTER_PORT, or else Open MPI's or Slurm's variables. NULL, or a sentence that says what is wrong. */
const char *ranks_place(RankPlace *place, char *(*get)(const char *name));

/* Forks into `count` processes on this machine, which go on from here, and returns in these. The first process stays
   behind: it passes signals on, and ends with the status of the rank that ended first with one that is not 0. Before
   any thread is started. */
RankPlace ranks_launch(int count);

/* f() of another process, which ends then: f may start what does not survive a fork. */
int ranks_ask(int (*f)(void));

typedef struct Ranks {
    int rank, count, local;
    struct RankWires *wires; /* NULL: count is 1 */
} Ranks;

/* All ranks meet; place.count of 0 or 1: this process is alone, and nothing is opened. Dies with a sentence where a
   rank does not come in time. From here on what die says is printed once, by rank 0; warnings of others are not. */
Ranks *ranks_join(const RankPlace *place);
/* At the end of the run, by all ranks. */
void ranks_leave(Ranks *k);

/* all (count, bytes) = mine (bytes) of every rank, in their order. Called by all, as is ranks_broadcast: data (bytes)
   becomes that of rank `root`. */
void ranks_gather(Ranks *k, const void *mine, void *all, size_t bytes);
void ranks_broadcast(Ranks *k, void *data, size_t bytes, int root);

/* "rank 1 (process 1234 on HOST)"; static memory. count is above 1. */
const char *ranks_name(const Ranks *k, int rank);

/* What the main thread does now. RANKS_FREE: what takes its time (reading, evaluating, saving). RANKS_WORKING: passes,
   each of which is told by a call; one that takes longer than ranks_patience hangs. RANKS_WAITING: for other ranks. */
enum { RANKS_FREE, RANKS_WORKING, RANKS_WAITING };
void ranks_doing(Ranks *k, int what);

/* ---- who does what */

/* the rank that batch i of a step is for */
static inline int ranks_of_batch(const Ranks *k, int64_t i) { return (int)(i % k->count); }
/* the last batch of a step of `accum` >= count that is this rank's */
static inline int64_t ranks_last_batch(const Ranks *k, int64_t accum) {
    return accum - 1 - (accum - 1 - k->rank) % k->count;
}
/* The part of each tensor whose optimiser `rank` keeps when it is shared out, from number first[i] to before end[i] of
   tensor i. Matrices and embeddings are cut, but only between rows of their first dimension: whole matrices of a layer,
   whole embeddings of a token; their parts differ by one matrix at most, do not overlap and leave nothing out. All
   others are small, and each rank keeps them whole. */
void ranks_cut(const Tensor *tensors, int rank, int count, size_t first[NUM_TENSORS], size_t end[NUM_TENSORS]);

#ifdef __cplusplus
}
#endif
#endif
