/* What a run does: one loop of batches, updates, evaluations, samples, logs and checkpoints for every back end. */
#ifndef GSA_TRAIN_H
#define GSA_TRAIN_H

#include "ranks.h"

#ifdef __cplusplus
extern "C" {
#endif

/* The flat buffers of a model, in the order of model_tensors; the last in that of model_second_moments. BUFFER_ADAM_M
   also holds Muon's momentum. */
enum { BUFFER_PARAMS, BUFFER_GRADS, BUFFER_ADAM_M, BUFFER_ADAM_V };

/* What memory goes to: enumerator, name. From `residual` to `logits`: what the forward pass keeps; `backward`:
   gradients of activations. */
#define MEMORY_GROUPS(X)           \
    X(PARAMS, "parameters")        \
    X(GRADS, "gradients")          \
    X(OPTIMISER, "optimiser")      \
    X(RESIDUAL, "residual stream") \
    X(ATTENTION, "attention")      \
    X(STATES, "scan states")       \
    X(MLP, "MLP")                  \
    X(LOGITS, "logits")            \
    X(BACKWARD, "backward pass")   \
    X(WORKSPACE, "workspaces")
#define X(name, text) MEMORY_##name,
enum { MEMORY_GROUPS(X) NUM_MEMORY };
#undef X

typedef struct {
    double rate[NUM_CLIPS]; /* learning rate of this step */
    double beta1, beta2, weight_decay;
    double scale[NUM_CLIPS]; /* what gradients are multiplied by: clipping */
    int64_t step;            /* 1 for the first update */
    double momentum;         /* of Muon */
} Update;

/* What a step gives out: the sum of the losses of its forward passes, what gradient_norms finds, what update counts. */
typedef struct {
    double loss, norms[NUM_CLIPS];
    int64_t clamped[NUM_BOUNDS];
} StepResult;

/* How several processes work on one run. */
typedef struct {
    Ranks *ranks;
    bool narrow; /* gradients are added in bf16 */
    bool shard;  /* each rank keeps a part of the fp32 weights and of the moments (ranks_cut) */
} Sharing;

/* A back end: the network's arithmetic. B and T of a call may be smaller than those given to create. */
typedef struct {
    /* machine, threads, libraries: for the first line of a run */
    const char *(*name)(void);
    void (*memory)(const Config *c, int B, size_t bytes[NUM_MEMORY]); /* what create(c, B) and training will take */
    size_t (*free_memory)(void);                                      /* bytes that are free for that; 0: unknown */
    /* room for batches of (B, c->T); buffers are zero; c->recompute is honoured */
    void *(*create)(const Config *c, int B);
    void (*destroy)(void *model);
    void (*write)(void *model, int buffer, const float *from); /* from the host into the model */
    const float *(*read)(void *model, int buffer);             /* on the host, valid until the next call */
    /* part of a buffer: splats fit in one, see gsa/run/adapt.h. first: counted as in BUFFER_PARAMS, whatever the
       buffer */
    void (*put)(void *model, int buffer, size_t first, size_t count, const float *from);
    void (*get)(void *model, int buffer, size_t first, size_t count, float *to);
    /* x, y (B, T); mean loss in nats over the y that are not -1; y NULL: logits only, returns 0 */
    double (*forward)(void *model, const int *x, const int *y, int B, int T);
    /* of the last forward; adds scale times its gradients */
    void (*backward)(void *model, double scale);
    /* the next backward adds to zeros; what the gradients are until then is not said */
    void (*zero_gradients)(void *model);
    void (*gradient_norms)(void *model, double norms[NUM_CLIPS]);
    /* AdamW and Muon, then the bounds of the splats; how many values were outside */
    void (*update)(void *model, const Update *u, int64_t clamped[NUM_BOUNDS]);
    void (*logits)(void *model, int b, int t, float *out); /* of the last forward without y, V numbers */
    /* of the last forward: a part (PART_...) of head (l, h), count rows, of every (B T / count)-th token */
    void (*head)(void *model, int l, int h, int part, int count, float *out);
    /* on: backward also adds sum |dL / d ln phi_s| over the queries and keys of the batch, or an even sample of
       them, to the gradients of `alive` */
    void (*watch)(void *model, bool on);
    /* what the machine could do a second in this precision; 0 or no such function: unknown */
    double (*peak_flops)(void);
    /* the next forward pass will be followed by backward(scale), whose beginning may be done at once; NULL: no use
       for that */
    void (*expect)(void *model, double scale);
    /* what was chosen for this machine in a way that may come out otherwise the next time, such as by speed, and that
       changes the numbers' last digits: malloc'd text, for the state file. A run that goes on gives it back before
       its first pass. NULL: nothing is */
    char *(*choices)(void *model);
    void (*choose)(void *model, const char *choices);
    /* Around a step. on: its functions return at once, with zeros, and the update scales gradients down to a norm of
       `clip` (0: as they are) instead of by u->scale. `result` waits for what the oldest such step gave out that was
       not asked for yet, of two at most. NULL: this back end computes at once */
    void (*defer)(void *model, bool on, double clip);
    void (*result)(void *model, StepResult *out);
    /* The rest is for several processes, a GPU each (ranks.h); NULL: the back end has none of it.
       devices: GPUs that this process sees. join, before all else but name: this process is one of sharing->ranks and
       uses GPU ranks->local. */
    int (*devices)(void);
    void (*join)(const Sharing *sharing);
    /* The next backward pass is this rank's last of the step: its gradients, and those of the passes before, are added
       to those of all other ranks, and gradient_norms waits for the sums. Called by all ranks. With sharing->shard all
       of them call read together too, and only rank 0 gets the numbers, others NULL. */
    void (*share)(void *model);
} Backend;

/* The whole program: flags, data, training. Returns the exit status. */
int train(int argc, char **argv, const Backend *backend);

#ifdef __cplusplus
}
#endif
#endif
