/* Birth and death of splats: which slots of a head live, decided now and then from statistics of training. All of it
   runs on the host and does no arithmetic of the network: a back end hands over queries, keys and sums of gradients,
   and the rules are the same for both back ends. The same statistics give the same events, whatever the number of
   threads.

   Statistics come in windows: ADAPT_TOKENS evenly spaced tokens of one batch, every ADAPT_SPACING steps, and at least
   five between two passes. Where splats stay as they are, only the log and `infer inspect` want them: one after
   ADAPT_SPACING steps and then every ADAPT_RARELY, because a GPU stands still while the host fetches one. Of each splat
   s
     activation   mean over queries and keys x of its responsibility r_s(x) = softmax_s(ln alpha_s + ln phi_s(x^))
     pull         sum over the batch's queries and keys of |dL / d ln phi_s|
   are kept for the last ADAPT_WINDOWS windows, and of each head the mean coverage of keys, ln sum_s phi_s(k^).

   Passes come every few steps at first and ever more rarely: each interval is a tenth of the steps so far. Early, when
   little is learned that an edit could disturb, a bad start is put right within a hundred steps. In a pass over all
   heads at most S / 16 splats of a head (at least 1) go, and as many come:
     idle       a splat with an activation below `activation` times an even share is given up, after `life` steps
     redundant  so is the less active of two whose responses overlap by more than `overlap`; if their envelopes are
                alike as well, they merge
     split      a splat with at least an even share of activation and at least `pull` times the mean pull becomes two,
                if a slot is free
     birth      else a free slot takes a splat at the densest of the keys whose coverage is below `coverage`, if at
                least `density` of all keys are near that, or in a random direction, as at the start of a run
   grow: splats die or merge, then free slots are filled, by as many births as deaths at most, so that a head that
   was full stays full. relocate: what is given up moves at once, by split or birth: the number of splats stays.
   Splits and merges of equals leave the function as it was: contributions alpha phi(q) phi(k) add, so amplitudes do. */
#ifndef GSA_ADAPT_H
#define GSA_ADAPT_H

#include "../checkpoint.h"

#ifdef __cplusplus
extern "C" {
#endif

#define ADAPT_CHOICES "none|relocate|grow"
enum { ADAPT_NONE, ADAPT_RELOCATE, ADAPT_GROW };
enum { ADAPT_WINDOWS = 10, ADAPT_TOKENS = 256, ADAPT_SPACING = 10, ADAPT_RARELY = 100 };

/* The rules' numbers, in the words above: type, name, default, lowest, highest, help. --adapt-rules sets them. */
// clang-format off
#define ADAPT_RULES(X) \
    X(INT, every, 5, 1, 1e9, "steps until the first pass; from then on at least as many, or a tenth of the steps so " \
      "far; none in the last 30 %") \
    X(INT, life, 100, 0, 1e9, "steps that a new splat lives before it may die, merge, move or split") \
    X(REAL, activation, 0.3, 0, 1, "a splat is idle below this share of an even activation") \
    X(REAL, overlap, 0.995, 0, 1, "two splats are one too many above this overlap (Bhattacharyya)") \
    X(REAL, coverage, -1000, -1e3, 1e3, "splats are born among keys k with ln sum_s phi_s(k) below this; at -1000 " \
      "nowhere, because it did not help") \
    X(REAL, density, 0.02, 0, 1, "where at least this share of all keys is within a splat's width") \
    X(REAL, pull, 4, 0, 1e9, "a splat splits with at least this times its head's mean sum of |dL / d ln phi|")
// clang-format on
#define ADAPT_RULE_HELP(type, name, value, low, high, help) "\n" #name ": " help " (" #value ")"
#define ADAPT_RULES_HELP ADAPT_RULES(ADAPT_RULE_HELP)

typedef int64_t AdaptRuleINT;
typedef double AdaptRuleREAL;
typedef struct {
    int mode;
    int64_t end; /* no pass after this step */
#define X(type, name, ...) AdaptRule##type name;
    ADAPT_RULES(X)
#undef X
} AdaptRules;

AdaptRules adapt_rules_default(void); /* mode ADAPT_NONE */
/* Takes "name=value,name=value". NULL, or a sentence that says what is wrong. */
char *adapt_rules_read(AdaptRules *rules, const char *text);
/* All rules in that form and in the order of the table; the caller frees it. */
char *adapt_rules_text(const AdaptRules *rules);
bool adapt_is_rule(const char *name);

enum { ADAPT_DEATH, ADAPT_MERGE, ADAPT_BIRTH, ADAPT_SPLIT, ADAPT_MOVE, NUM_ADAPT_EVENTS };
extern const char *const adapt_event_names[NUM_ADAPT_EVENTS];
typedef struct {
    /* g: GSA head in order of layer and head; from: the slot it is split off or merged into, or -1 */
    int kind, g, slot, from;
    /* of the slot before, of a split's parent; of a birth the share of keys near it, 0 for a random direction */
    float activation;
} AdaptEvent;

/* The mean of a number's last three or so values, and the mean square of what each value was apart from that mean
   before: noise, and a drift as training has it. */
typedef struct {
    float mean, variance, count, outside; /* windows seen; the last ones in a row that were outside */
} AdaptBand;
/* True where the third value in a row lies more than 4 standard deviations from the mean. */
bool adapt_band(AdaptBand *b, double value);

enum {
    ADAPT_FIRST,         /* step at which the schedule began: the run's start, or the last shift */
    ADAPT_LAST,          /* step of the last pass */
    ADAPT_NEXT,          /* step of the next pass */
    ADAPT_COUNT_WINDOWS, /* windows so far */
    ADAPT_SHIFTS,        /* shifts so far */
    ADAPT_EVENTS,        /* from here on: events of each kind so far */
    NUM_ADAPT_NUMBERS = ADAPT_EVENTS + NUM_ADAPT_EVENTS
};
typedef struct {
    Config c;
    size_t G, S;         /* GSA heads, slots of each */
    size_t first, count; /* the tensors of splats: `count` numbers from `first` on, in all flat buffers */
    int64_t numbers[NUM_ADAPT_NUMBERS];
    int64_t *born;            /* (G, S): step of birth; 0 for the splats of the start */
    float *activation, *pull; /* (G, S, ADAPT_WINDOWS): window w at w % ADAPT_WINDOWS */
    float *coverage;          /* (G): of the last window */
    AdaptBand *bands;         /* (G): of the coverage */
    /* (G, 2, ADAPT_TOKENS, HS): queries and keys of the last window, as unit vectors; not saved */
    float *sample;
    int tokens; /* of the sample */
} Adapt;

Adapt *adapt_create(const Config *c, int64_t every);
void adapt_free(Adapt *a);
/* The record as it is stored in model files. adapt_read leaves a as created where the file has none. restart: the run
   is a new one that starts from this model. Then splats keep their ages, the schedule begins anew, and the bands stay,
   so that other data shows as a shift. */
void adapt_add_entries(const Adapt *a, Entry *entries, const void **data, int *count);
void adapt_read(Adapt *a, const Checkpoint *k, bool restart);
enum { ADAPT_ENTRIES = 6 };

/* Takes queries (part 0) or keys (1) of GSA head g, (tokens, HS), into the sample, as unit vectors where the model
   uses them so; tokens <= ADAPT_TOKENS. */
void adapt_sample(Adapt *a, int g, int part, const float *x, int tokens);
/* One window, after `step` updates, from the sample of all layers. splats: their parameters (first, count); sums
   (G, S): of |dL / d ln phi|. True: the coverage of a head has shifted; all bands then begin anew. Bands skip windows
   of steps that are no multiple of ADAPT_SPACING: those close before a pass would change the noise they measure. */
bool adapt_window(Adapt *a, int64_t step, const float *splats, const float *sums);
/* One pass; the last window must be of this step. splats, m, v: the parameters of all splats and Adam's two moments of
   them (first, count), edited in place. Stores what was done in events, which has room for adapt_room(a), and returns
   how many there are. */
int adapt_pass(Adapt *a, const AdaptRules *rules, int64_t step, float *splats, float *m, float *v, AdaptEvent *events);
int adapt_room(const Adapt *a);
/* True where a window is due after `step` updates. */
bool adapt_due(const Adapt *a, const AdaptRules *rules, int64_t step);
/* Sets the step of the next pass after one at `step`: rules->every later, or a tenth of the steps since the first or
   the last shift. */
void adapt_schedule(Adapt *a, const AdaptRules *rules, int64_t step, bool shifted);

/* The activation of splat s of head g, averaged over the last windows; 0 before the first. */
double adapt_activation(const Adapt *a, size_t g, size_t s);
/* ln phi_s(x), equation (2), of one splat at x (HS), which is used as it is. mu (HS), log_precision as in the
   parameter table. */
double adapt_log_response(const Config *c, const float *mu, const float *log_precision, const float *x);
/* The two edits, of head g. adapt_split: s becomes s and t. adapt_merge: t is merged into s and dies; the new splat is
   the mean of both, where s counts `weight` (0 .. 1). Its amplitude is such that on x (n, HS) it responds on average as
   the two did together; n = 0: it is the sum of theirs. */
void adapt_split(const Config *c, int g, int s, int t, float *splats);
void adapt_merge(const Config *c, int g, int s, int t, double weight, const float *x, size_t n, float *splats);
int adapt_alive(const Config *c, int g, const float *splats);

/* --splats-alive: only `alive` slots of each head live, spread over the frequencies, with the amplitude of that
   number. flat: all parameters. */
void adapt_start_alive(const Config *c, int alive, float *flat);
/* --splat-init ball: all centres of a head within 0.05 of one random unit vector. */
void adapt_start_ball(const Config *c, float *flat, uint64_t seed);

#ifdef __cplusplus
}
#endif
#endif
