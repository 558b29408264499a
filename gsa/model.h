/* What a model is: its configuration, its parameters as one table, their starting values. No arithmetic of the network
   here; that is train_gsa.c's and train_gsa.cu's. */
#ifndef GSA_MODEL_H
#define GSA_MODEL_H

#include "util.h"

#ifdef __cplusplus
extern "C" {
#endif

/* ---------------------------------------------------------------------- configuration */

/* Each enumeration is in the order of its flag's choices: the flag's text is looked up by position. */
#define ATTENTION_CHOICES "standard|gsa|hybrid|augment|extend"
enum { ATTENTION_STANDARD, ATTENTION_GSA, ATTENTION_HYBRID, ATTENTION_AUGMENT, ATTENTION_EXTEND };
#define MIXER_CHOICES "softmax|linear"
enum { MIXER_SOFTMAX, MIXER_LINEAR };
#define POSITION_CHOICES "learned|rope|both"
enum { POSITION_LEARNED, POSITION_ROPE, POSITION_BOTH };
#define ENVELOPE_CHOICES "none|cosine|decay|raised"
enum { ENVELOPE_NONE, ENVELOPE_COSINE, ENVELOPE_DECAY, ENVELOPE_RAISED };
#define COVARIANCE_CHOICES "iso|diag|full"
enum { COVARIANCE_ISO, COVARIANCE_DIAG, COVARIANCE_FULL };
#define OBJECTIVE_CHOICES "lm|mlm"
enum { OBJECTIVE_LM, OBJECTIVE_MLM };
#define GAIN_CHOICES "none|head"
enum { GAIN_NONE, GAIN_HEAD };
#define PHASE_CHOICES "none|learned"
enum { PHASE_NONE, PHASE_LEARNED };
#define ROPE_CHOICES "fixed|learned"
enum { ROPE_FIXED, ROPE_LEARNED };
#define FORGET_CHOICES "none|half|all"
enum { FORGET_NONE, FORGET_HALF, FORGET_ALL };

/* All fields are one int32 each in a checkpoint's header, in this order; a file that differs is refused by this
   name. */
#define CONFIG_FIELDS(X)                                                           \
    X(T, "sequence length")                                                        \
    X(V, "vocabulary size")                                                        \
    X(Vp, "padded vocabulary size")                                                \
    X(L, "number of layers")                                                       \
    X(NH, "number of heads")                                                       \
    X(C, "number of channels")                                                     \
    X(position, "kind of positions (learned, rope, both)")                         \
    X(attention, "kind of attention (standard, gsa, hybrid, augment, extend)")     \
    X(mixer, "mixer of GSA heads (softmax, linear)")                               \
    X(extra, "number of heads beside the standard ones")                           \
    X(window, "window of standard and extended heads (0: none)")                   \
    X(S, "number of splats per head")                                              \
    X(envelope, "envelope (none, cosine, decay, raised)")                          \
    X(covariance, "covariance (iso, diag, full)")                                  \
    X(objective, "objective (lm, mlm)")                                            \
    X(raw, "queries and keys of splats as they are (1) or on the unit sphere (0)") \
    X(unbounded, "kinds of splat parameters without bounds")                       \
    X(gain, "gain of standard heads (none, head)")                                 \
    X(phase, "phase of splats (none, learned)")                                    \
    X(rope, "rotation frequencies of standard heads (fixed, learned)")             \
    X(forget, "forget gates of standard heads (none, half, all)")

/* raw: equation (1) is left out, x^ = x. unbounded: bit b switches bound b off. Both are for comparisons. */
#define BOUND_CHOICES "precision|centre|amplitude|frequency|decay|gain|phase"
enum {
    BOUND_PRECISION,
    BOUND_CENTRE,
    BOUND_AMPLITUDE,
    BOUND_FREQUENCY,
    BOUND_DECAY,
    BOUND_GAIN,
    BOUND_PHASE,
    NUM_BOUNDS
};

enum { PRODUCTS_UNSAID, PRODUCTS_FP32, PRODUCTS_BF16 }; /* unsaid: fp32 on the CPU, what train_gsacu was built for */
#define PRODUCTS_CHOICES "fp32|bf16"

enum { MAX_LAYERS = 64, MAX_HEADS = 64 }; /* one 64-bit mask of GSA heads per layer */

typedef struct {
#define X(name, what) int name;
    CONFIG_FIELDS(X)
#undef X
    /* bit h of word l: head h of layer l has splats; extra heads come after the NH others */
    uint64_t gsa_heads[MAX_LAYERS];
    /* not what the model is, but how a run trains it, and in no file. recompute: of each block only the input is kept
       for the backward pass; muon: the matrices of blocks are updated by Muon, all else by AdamW; products: what
       train_gsa multiplies (PRODUCTS_...) */
    bool recompute, muon;
    int products;
} Config;

/* The whole configuration checked: NULL where it is sound, else a sentence (static memory) that names the flag. */
const char *config_check(const Config *c);
/* Fills gsa_heads from c->attention and the text of --gsa-heads: NULL (all heads for gsa and extend, the last half
   for hybrid, half as many extra ones for augment), "N" (the last N heads of each layer; augment: N extra ones) or
   "0:3,2:1-4" (layer:head). Sets c->extra. NULL where it fits, else a sentence. */
const char *config_head_map(Config *c, const char *gsa_heads);

static inline int config_head_size(const Config *c) { return c->C / c->NH; }
static inline int config_heads(const Config *c) { return c->NH + c->extra; }
/* of q, k, v and attention's output */
static inline int config_width(const Config *c) { return config_heads(c) * config_head_size(c); }
static inline int config_precisions(const Config *c) { /* numbers that describe one splat's precision */
    int d = config_head_size(c);
    return c->covariance == COVARIANCE_ISO ? 1 : c->covariance == COVARIANCE_DIAG ? d : d * (d + 1) / 2;
}
static inline bool config_has_cosine(const Config *c) {
    return c->envelope == ENVELOPE_COSINE || c->envelope == ENVELOPE_RAISED;
}
static inline bool config_has_decay(const Config *c) {
    return c->envelope == ENVELOPE_DECAY || c->envelope == ENVELOPE_RAISED;
}
static inline bool config_has_far(const Config *c) { return c->attention == ATTENTION_EXTEND; }
static inline bool config_bounded(const Config *c, int bound) { return !(c->unbounded >> bound & 1); }
static inline bool config_is_gsa(const Config *c, int l, int h) { return c->gsa_heads[l] >> h & 1; }
/* The four kinds of heads: features of q and k, then what mixes the values. */
/* rope + softmax, splats + softmax, splats + scan, rope + softmax nearby and splats + scan beyond */
enum { HEAD_STANDARD, HEAD_SPLAT, HEAD_SCAN, HEAD_EXTEND };
static inline int config_head_kind(const Config *c, int l, int h) {
    if (!config_is_gsa(c, l, h)) return HEAD_STANDARD;
    return c->attention == ATTENTION_EXTEND ? HEAD_EXTEND : c->mixer == MIXER_LINEAR ? HEAD_SCAN : HEAD_SPLAT;
}
/* number of GSA heads before (l, h), in order of layer and head: the index of its splats */
int config_gsa_before(const Config *c, int l, int h);
static inline int config_gsa_heads(const Config *c) { return config_gsa_before(c, c->L, 0); }
/* likewise of heads with softmax of q . k: all but GSA heads, and all of extend: the index of its gain and
   frequencies */
static inline int config_standard_before(const Config *c, int l, int h) {
    return l * config_heads(c) + h - (c->attention == ATTENTION_EXTEND ? 0 : config_gsa_before(c, l, h));
}
static inline int config_gains(const Config *c) { return c->gain ? config_standard_before(c, c->L, 0) : 0; }
static inline int config_ropes(const Config *c) { /* heads that learn their rotation frequencies */
    return c->rope ? config_standard_before(c, c->L, 0) : 0;
}
/* number of heads with a forget gate before (l, h), in order of layer and head: of each layer the first half of its
   standard heads, rounded up, or all of them */
int config_gates_before(const Config *c, int l, int h);
static inline int config_gates(const Config *c) { return config_gates_before(c, c->L, 0); }
static inline bool config_is_gated(const Config *c, int l, int h) {
    return config_gates_before(c, l, h + 1) > config_gates_before(c, l, h);
}
/* What a back end can read of a head after a forward pass: its queries or keys before any feature map, (T, HS), or of a
   gated head ln f, (T). */
enum { PART_QUERIES, PART_KEYS, PART_FORGET };

/* ---------------------------------------------------------------------- parameters */

/* Optimiser groups. Splat scalars have a rate of their own, because their natural step is larger than that of a
   weight, and a gradient norm of their own, because d loss / d ln theta grows with T and could throttle all others.
   GROUP_FIXED has no gradient and is no parameter of the model, only part of its description. */
enum { GROUP_MATRIX, GROUP_VECTOR, GROUP_CENTRE, GROUP_SCALAR, GROUP_FIXED, NUM_GROUPS };
enum { CLIP_WEIGHTS, CLIP_SPLATS, NUM_CLIPS }; /* whose rate and gradient norm */
typedef struct {
    bool trained;
    bool decay; /* weight decay applies */
    int clip;   /* whose rate it has and whose norm it is clipped by */
} Group;
extern const Group groups[NUM_GROUPS];

enum {
    START_NORMAL,
    START_RESIDUAL,
    START_ZERO,
    START_ONE,
    START_SPHERE,
    START_AMPLITUDE,
    START_FREQUENCY,
    START_DECAY,
    START_FAR,
    START_GAIN,
    START_ROPE,
    START_MEMORY
};

/* THE table: name, shape as expressions of the configuration c, start, group. The parameter struct of both programs,
   all sizes, the optimiser's groups, the checkpoint's directory and the tests' reports come from it; to add a
   tensor, add a line. A first dimension of 0: the model has no such tensor. Those of splats have a table of their own
   within it: one row for each GSA head, in order of layer and head; what belongs to a head and to none of its splats
   comes last. */
// clang-format off
#define SPLAT_TENSORS(X) \
    X(mu, config_gsa_heads(c), c->S, config_head_size(c), START_SPHERE, GROUP_CENTRE) /* centres */ \
    X(log_precision, config_gsa_heads(c), c->S, config_precisions(c), START_ZERO, GROUP_SCALAR) \
    X(log_alpha, config_gsa_heads(c), c->S, 1, START_AMPLITUDE, GROUP_SCALAR) /* amplitudes */ \
    X(log_alpha_reference, config_gsa_heads(c), c->S, 1, START_AMPLITUDE, GROUP_FIXED) /* middle of its bounds */ \
    X(alive, config_gsa_heads(c), c->S, 1, START_ONE, GROUP_FIXED) /* 1 or 0, at least one a head */ \
    X(log_theta, config_has_cosine(c) ? config_gsa_heads(c) : 0, c->S, 1, START_FREQUENCY, GROUP_SCALAR) \
    X(log_delta, config_has_decay(c) ? config_gsa_heads(c) : 0, c->S, 1, START_DECAY, GROUP_SCALAR) \
    X(psi, c->phase ? config_gsa_heads(c) : 0, c->S, 1, START_ZERO, GROUP_SCALAR) /* phases of the cosine */ \
    X(log_far, config_has_far(c) ? config_gsa_heads(c) : 0, 1, 1, START_FAR, GROUP_SCALAR) /* weight of far keys */
#define PARAMETERS(X) \
    X(wte, c->Vp, c->C, 1, START_NORMAL, GROUP_MATRIX) /* token embedding and classifier */ \
    X(wpe, c->position == POSITION_ROPE ? 0 : c->T, c->C, 1, START_NORMAL, GROUP_MATRIX) \
    X(ln1w, c->L, c->C, 1, START_ONE, GROUP_VECTOR) \
    X(ln1b, c->L, c->C, 1, START_ZERO, GROUP_VECTOR) \
    X(qkvw, c->L, 3 * config_width(c), c->C, START_NORMAL, GROUP_MATRIX) \
    X(qkvb, c->L, 3 * config_width(c), 1, START_ZERO, GROUP_VECTOR) \
    SPLAT_TENSORS(X) \
    X(log_gain, config_gains(c), 1, 1, START_GAIN, GROUP_SCALAR) /* of standard heads */ \
    X(log_rope, config_ropes(c), config_head_size(c) / 2, 1, START_ROPE, GROUP_SCALAR) /* their frequencies */ \
    X(forgetw, config_gates(c), c->C, 1, START_NORMAL, GROUP_MATRIX) /* their forget gates */ \
    X(forgetb, config_gates(c), 1, 1, START_MEMORY, GROUP_VECTOR) \
    X(attprojw, c->L, c->C, config_width(c), START_RESIDUAL, GROUP_MATRIX) \
    X(attprojb, c->L, c->C, 1, START_ZERO, GROUP_VECTOR) \
    X(ln2w, c->L, c->C, 1, START_ONE, GROUP_VECTOR) \
    X(ln2b, c->L, c->C, 1, START_ZERO, GROUP_VECTOR) \
    X(fcw, c->L, 4 * c->C, c->C, START_NORMAL, GROUP_MATRIX) \
    X(fcb, c->L, 4 * c->C, 1, START_ZERO, GROUP_VECTOR) \
    X(fcprojw, c->L, c->C, 4 * c->C, START_RESIDUAL, GROUP_MATRIX) \
    X(fcprojb, c->L, c->C, 1, START_ZERO, GROUP_VECTOR) \
    X(lnfw, 1, c->C, 1, START_ONE, GROUP_VECTOR) \
    X(lnfb, 1, c->C, 1, START_ZERO, GROUP_VECTOR)
// clang-format on

#define X(name, ...) TENSOR_##name,
enum { PARAMETERS(X) NUM_TENSORS };
#undef X

typedef struct {
    const char *name;
    int64_t shape[3];
    size_t offset, size; /* in numbers, within the flat buffer; offsets are multiples of 32 (128 bytes of fp32) */
    int start, group;
} Tensor;

static inline bool tensor_is_splat(int tensor) {
#define X(name, ...) || tensor == TENSOR_##name
    return false SPLAT_TENSORS(X);
#undef X
}
/* Numbers in one row of the first dimension: of a layer, or of a GSA head. */
static inline size_t tensor_row(const Tensor *t) { return (size_t)(t->shape[1] * t->shape[2]); }

/* Fills tensors[NUM_TENSORS]; returns the length of the flat buffer, padding between tensors included. */
size_t model_tensors(const Config *c, Tensor *tensors);
/* Likewise of the buffer of AdamW's second moments: Muon has none, so its tensors are empty there. */
size_t model_second_moments(const Config *c, Tensor *tensors);
/* Where the second moment of number `at` of the parameters lies, whose tensor has some. */
size_t model_second_moment(const Tensor *tensors, const Tensor *second, size_t at);
/* Into how many matrices, one behind the other, Muon takes a tensor apart: W_qkv of each layer into those of q, k and
   v. 0: the tensor is AdamW's. */
static inline size_t config_muon_matrices(const Config *c, int tensor) {
    bool block = tensor == TENSOR_qkvw || tensor == TENSOR_attprojw || tensor == TENSOR_fcw || tensor == TENSOR_fcprojw;
    return !c->muon || !block ? 0 : tensor == TENSOR_qkvw ? 3 * (size_t)c->L : (size_t)c->L;
}
/* Matrix j of these: where it lies in the flat buffers, and its sizes. */
typedef struct {
    size_t at, rows, columns;
} MuonMatrix;
MuonMatrix config_muon_matrix(const Config *c, const Tensor *tensors, int tensor, size_t j);
/* The steps that make singular values about 1, equation (13), and what the result is multiplied by: so its numbers have
   a root mean square of about 0.2, as AdamW's updates have, and one learning rate serves both. */
#define MUON_A 3.4445
#define MUON_B -4.7750
#define MUON_C 2.0315
enum { MUON_STEPS = 5 };
static inline double muon_scale(size_t rows, size_t columns) {
    return 0.2 * sqrt((double)(rows > columns ? rows : columns));
}
/* Number of trained parameters; without the padding of the buffer and of the vocabulary. */
size_t model_parameters(const Config *c);
/* Starting values of all parameters into a flat buffer; depends on the configuration and seed alone. */
void model_start(const Config *c, float *params, uint64_t seed);
/* Gives all splats this isotropic precision, in whichever form the configuration keeps it. */
void model_set_precision(const Config *c, float *params, double precision);
/* Multiplies the amplitudes of all splats, and with them what their bounds are relative to. factor 0: what a softmax
   starts best with (dev/LOG.md): a layer of nothing but splats soft, by SOFT_AMPLITUDE, and splats beside standard
   heads sharp, by 1. */
#define SOFT_AMPLITUDE 0.1
void model_scale_amplitudes(const Config *c, float *params, double factor);

/* ---------------------------------------------------------------------- splats

   Each GSA head has S slots for splats. A slot with alive = 0 is dead: it takes no part (its features are 0), has no
   gradient and is not put back into bounds. NULL where every slot is 1 or 0 and every head has one alive, else a
   sentence. */
const char *model_check_alive(const Config *c, const float *alive);

/* Bounds of splat parameters, applied after each update. */
#define SPLAT_PRECISION_START 4.0
#define SPLAT_PRECISION_MIN 0.4
#define SPLAT_PRECISION_MAX 40.0
#define SPLAT_CENTRE_MAX 2.0                    /* |mu| */
#define SPLAT_SLOPE_MAX 40.0                    /* |Lambda mu| */
#define SPLAT_AMPLITUDE_RANGE 2.302585092994046 /* ln 10: |log_alpha - log_alpha_reference| */
#define SPLAT_FREQUENCY_MAX 3.141592653589793   /* of learned rotations too */
#define SPLAT_DECAY_MAX 0.14
/* |psi| of the linear mixer: a token weighs itself by (1 + cos psi) / 2, at least a half of what it would by psi = 0,
   so that row sums stay positive. The softmax mixer has no such bound; its psi is kept in (-pi, pi]. */
#define SPLAT_PHASE_MAX 1.5707963267948966

/* The starting frequencies are log-spaced from 1 to this within each head, in radians a token. */
#ifndef THETA_LOWEST
#define THETA_LOWEST 1e-3
#endif

/* The gain of a standard head, which logits of unit queries and keys are multiplied by: without it none of them could
   exceed the square root of the head size. */
#ifndef GAIN_START
#define GAIN_START 1.0
#endif
#define GAIN_MIN 0.25
#define GAIN_MAX 10.0

/* The rotation of pair k of a head of size d by position, in radians a token; where frequencies are learned, their
   start. */
double rope_frequency(int k, int d);

/* The start of forget gates: f = exp(-1 / n) for an x of 0, so that weights fall by e in n tokens; n log-spaced over
   the gated heads of a layer. */
#define FORGET_SHORTEST 16.0
#define FORGET_LONGEST 1024.0

/* The starting ln alpha: logits sum_s alpha phi_s(q) phi_s(k) of random unit vectors q, k have standard deviation 1,
   for S centres that are random unit vectors of dimension d and isotropic precision SPLAT_PRECISION_START. */
double splat_amplitude_start(int S, int d);
double config_amplitude_start(const Config *c); /* that, or 0 for the linear mixer */

#ifdef __cplusplus
}
#endif
#endif
