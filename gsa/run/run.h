/* One run, shared by the files of this folder: train.c (the loop), save.c (checkpoints), memory.c. */
#ifndef GSA_RUN_H
#define GSA_RUN_H

#include "../../data/loader.h"
#include "settings.h"
#include "train.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
    const Settings *settings;
    const Backend *backend;
    Ranks *ranks; /* the processes of this run; one of them may be all */
    void *model;  /* the back end's */
    Config config;
    Tensor tensors[NUM_TENSORS];
    size_t total; /* numbers in a flat buffer of all tensors */
    Tokenizer *tokenizer;
    int mask;           /* id of [MASK] */
    int64_t step;       /* updates done */
    int64_t first_step; /* at which this program began: above 0 when resumed */
    int64_t saved;      /* the last step that is on disk; -1: none */
    bool stop;          /* all ranks know that one was interrupted */
    /* data: the made-up stories' tokens are NULL where there are shards, val where nothing is evaluated */
    Loader *train, *val;
    uint16_t *train_tokens, *val_tokens;
    int64_t data_hash[2]; /* loader_hash of train and val; 0: no val */
    int *x, *y;           /* (B, T) each: the batch at hand */
    int *overfit_x;       /* (2, B, T): --overfit-batch's x and y; NULL without that flag */
    /* splats: adapt is NULL where there are none */
    Adapt *adapt;
    AdaptRules rules;
    Update pending;        /* the step whose result has not been asked for; its step is 0: there is none */
    float *pending_window; /* what was watched in it (watch_splats), or NULL */
    StepResult result;     /* of the last step before; its loss is the mean */
    /* what is printed and logged */
    FILE *log;
    char *log_path;
    double tokens_a_step;
    double training_time;        /* seconds in training steps */
    double recent;               /* seconds a step, averaged over about the last ten */
    double began;                /* when the step began whose result comes next: when that of the last one came */
    double reporting;            /* seconds that the last step's line and log took */
    double printed;              /* time of the last step's line that stays */
    int64_t outside[NUM_BOUNDS]; /* as clamped, of all updates since then */
} Run;

/* ---- train.c */

/* The next batch: what follows each token, or, for an encoder, what is masked; the masks depend on `draw`. */
void next_batch(const Run *r, Loader *l, int *x, int *y, int B, uint64_t draw);

/* ---- save.c */

/* Dies where `out` holds checkpoints already. */
void refuse_used_folder(const char *out);
/* Removes what a run that was killed while it saved has left in `out`: temporary files, and states without a model.
   Only who holds the lock of `out` may. */
void remove_leftovers(const char *out);
/* --resume: opens the newest step of --out whose two files are whole, and takes the settings from there. */
void open_newest(Settings *s, Checkpoint **model, Checkpoint **state);
/* Step, place in the data and AdamW's moments from a state file. */
void restore(Run *r, const Checkpoint *state);
/* Writes state and model of the present step; removes those that --keep does not keep. Called by all ranks: the first
   one writes. */
void save(Run *r);
/* Removes the checkpoints of the present step and before that --keep does not keep. The present step must be saved. */
void remove_old(const Run *r);

/* ---- memory.c */

/* Prints what the run takes. Where that is more than what is free, ends the program and says what would fit. */
void check_memory(const Run *r);

#ifdef __cplusplus
}
#endif
#endif
