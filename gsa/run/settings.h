/* The settings of a run. One row of SETTINGS owns a flag: its place in Settings, its name, default, bounds and help,
   and what may be done with it. To add a flag, add a row, and use its field. */
#ifndef GSA_SETTINGS_H
#define GSA_SETTINGS_H

#include "../../tokenizer/tokenizer.h"
#include "../checkpoint.h"
#include "../flags.h"
#include "adapt.h"

#ifdef __cplusplus
extern "C" {
#endif

/* What holds for a flag beside its value; 0: none of these. */
enum {
    SPLATS = 1,    /* it is for splats: refused with --attention standard */
    NEW_MODEL = 2, /* it says how a new model begins: refused with --init-from */
    FREE = 4,      /* it may change when a run is resumed, because it does not change what the run computes */
    UNSAVED = 8,   /* it says which run is meant: not stored in state files */
    PLACE = 16     /* it names files that may have moved: it may name their new place when a run is resumed, and what
                      is in them is compared */
};

/* X(kind, field, flag, default, values, model, attributes, help), in the order of --help; ROOM(name, heading).
   kind    a FLAG_... of flags.h; it also gives the type of the field in Settings
   values  RANGE(low, high) for numbers, inclusive; CHOICES("a|b|c"); ANY("WHAT") for texts; NO_VALUE for switches
   model   MODEL(field of Config) that the flag sets in a new model, or NONE. With --init-from the model file sets the
           flag instead, and a flag on the command line that contradicts the file is refused. */
// clang-format off
#define SETTINGS(ROOM, X) \
    ROOM(model, "model") \
    X(INT, depth, "depth", 2, RANGE(1, 64), NONE, NEW_MODEL, \
      "one dial for the shape: N layers, N heads, 64 N channels") \
    X(CHOICE, preset, "preset", NULL, CHOICES("gpt2-124m|gpt2-350m|gpt2-774m|gpt2-1558m"), NONE, NEW_MODEL, \
      "a shape of GPT-2 instead: layers, heads, channels, --seq 1024") \
    X(INT, layers, "layers", 0, RANGE(1, MAX_LAYERS), MODEL(L), 0, \
      "layers; from --depth or --preset if not given") \
    X(INT, heads, "heads", 0, RANGE(1, MAX_HEADS), MODEL(NH), 0, \
      "attention heads per layer; likewise") \
    X(INT, channels, "channels", 0, RANGE(2, 65536), MODEL(C), 0, \
      "channels, a multiple of twice the heads; likewise") \
    X(INT, seq, "seq", 256, RANGE(1, 1 << 24), NONE, 0, /* with --init-from too, where positions are rotations */ \
      "sequence length T in tokens") \
    X(CHOICE, position, "pos", "rope", CHOICES(POSITION_CHOICES), MODEL(position), 0, \
      "positions: added at the input (learned), rotations in standard heads (rope), or both") \
    X(CHOICE, gain, "gain", NULL, CHOICES(GAIN_CHOICES), MODEL(gain), 0, \
      "of standard heads with rotations: a factor of their logits that each head learns (if not given: head); " \
      "without it no logit exceeds the square root of the head size") \
    X(CHOICE, rope, "rope-frequencies", NULL, CHOICES(ROPE_CHOICES), MODEL(rope), 0, \
      "of standard heads with rotations: 10000^(-2k/d), or learned from there on, each head its own (if not given)") \
    X(CHOICE, forget, "forget-gate", NULL, CHOICES(FORGET_CHOICES), MODEL(forget), 0, \
      "of the first half of each layer's standard heads, or all: a learned share of what lies before each token is " \
      "forgotten there; half if not given, where heads have rotations and look back") \
    X(CHOICE, objective, "objective", "lm", CHOICES(OBJECTIVE_CHOICES), MODEL(objective), 0, \
      "predict the next token, or masked ones from both sides (BERT)") \
    X(CHOICE, attention, "attention", "hybrid", CHOICES(ATTENTION_CHOICES), MODEL(attention), 0, \
      "standard; GSA in all heads (gsa), in some (hybrid), in extra ones (augment), or beyond a window (extend)") \
    X(TEXT, gsa_heads, "gsa-heads", NULL, ANY("N|MAP"), NONE, NEW_MODEL, \
      "the last N heads of each layer, augment: N more; or layer:head such as 0:3,2:1-4. If not given: hybrid with " \
      "softmax, all heads of the first of several layers; extend, all; else half of all heads, rounded up") \
    X(INT, window, "window", 0, RANGE(0, 1 << 24), MODEL(window), 0, \
      "standard heads see the last N tokens only; 0: all (extend: 64)") \
    X(CHOICE, mixer, "mixer", NULL, CHOICES(MIXER_CHOICES), MODEL(mixer), SPLATS, \
      "what GSA heads weigh values by: softmax of splat contributions, or these themselves in linear time") \
    X(INT, splats, "splats", 0, RANGE(0, 65536), MODEL(S), SPLATS, \
      "splats per GSA head; 0: as many as softmax takes, 16 for linear") \
    X(CHOICE, envelope, "envelope", NULL, CHOICES(ENVELOPE_CHOICES), MODEL(envelope), SPLATS, \
      "contribution by distance; cosine for softmax and raised for linear if not given") \
    X(CHOICE, phase, "phase", NULL, CHOICES(PHASE_CHOICES), MODEL(phase), SPLATS, \
      "of the envelope's cosine: none, or one that each splat learns, so that it may favour a distance; learned if " \
      "not given, where there is a cosine") \
    X(CHOICE, covariance, "covariance", "iso", CHOICES(COVARIANCE_CHOICES), MODEL(covariance), SPLATS, \
      "a splat's precision: one number, one for each dimension, or a matrix") \
    X(TEXT, splat_init, "splat-init", "random", ANY("random|ball|kmeans|pca|FILE"), NONE, SPLATS | NEW_MODEL, \
      "centres on the unit sphere, all in one small ball, from keys of a first batch, or all splats of a model") \
    X(REAL, splat_precision, "splat-precision", SPLAT_PRECISION_START, RANGE(1e-6, 1e6), NONE, SPLATS | NEW_MODEL, \
      "precision of all splats at the start") \
    X(REAL, splat_amplitude, "splat-amplitude", 0, RANGE(0, 1e6), NONE, SPLATS | NEW_MODEL, \
      "softmax: amplitude of all splats at the start, times what gives logits of random vectors a deviation of 1; " \
      "less keeps attention soft. 0: 0.1 in a layer of splats only, 1 beside standard heads") \
    X(INT, fit, "fit", 300, RANGE(0, 1e6), NONE, SPLATS, \
      "--init-from a standard model: steps in which the splats of each head learn whom it attended to") \
    X(SWITCH, no_sphere, "no-sphere", false, NO_VALUE, MODEL(raw), SPLATS | NEW_MODEL, \
      "for comparison: splats see queries and keys as they are, not on the unit sphere") \
    X(TEXT, unbounded, "unbounded", NULL, ANY("LIST"), NONE, SPLATS | NEW_MODEL, \
      "for comparison: switch bounds of splats off, any of " BOUND_CHOICES ", by commas") \
    \
    ROOM(adaptation, "birth and death of splats (gsa/run/adapt.h)") \
    X(CHOICE, adapt, "adapt", "none", CHOICES(ADAPT_CHOICES), NONE, SPLATS, \
      "splats stay as they are; idle and redundant ones move; or they die and are born, up to --splats. Of use after " \
      "a bad start (dev/RESULTS.md)") \
    X(INT, splats_alive, "splats-alive", 0, RANGE(0, 65536), NONE, SPLATS | NEW_MODEL, \
      "splats of a head that live at the start, of --splats; 0: all") \
    X(TEXT, adapt_rules, "adapt-rules", NULL, ANY("NAME=VALUE,..."), NONE, SPLATS, \
      "when splats move, die and are born: any of these, by commas" ADAPT_RULES_HELP) \
    \
    ROOM(data, "data") \
    X(TEXT, data, "data", NULL, ANY("GLOB"), NONE, PLACE, \
      "training shards, from data/prepare; made-up stories if not given. With --resume: their new place, if they " \
      "moved") \
    X(TEXT, val, "val", NULL, ANY("GLOB"), NONE, PLACE, \
      "validation shards; none: no evaluation. With --resume: likewise") \
    X(TEXT, tokenizer, "tokenizer", NULL, ANY("FILE"), NONE, PLACE, \
      "the tokenizer that made the shards; stored in the checkpoints") \
    X(INT, vocab, "vocab", 1024, RANGE(258, 65536), NONE, 0, \
      "vocabulary learned from the made-up stories") \
    X(SWITCH, doc_start, "doc-start", false, NO_VALUE, NONE, 0, \
      "training windows begin at the start of a document") \
    \
    ROOM(optimisation, "optimisation") \
    X(INT, steps, "steps", 8000, RANGE(1, 1e9), NONE, 0, \
      "updates") \
    X(INT, batch, "batch", 4, RANGE(1, 65536), NONE, 0, \
      "sequences per pass") \
    X(INT, accum, "accum", 1, RANGE(1, 65536), NONE, 0, \
      "passes per update, gradients averaged; GPUs share them out; one a GPU if not given") \
    X(CHOICE, optimizer, "optimizer", "muon", CHOICES("adamw|muon"), NONE, 0, \
      "muon: matrices of the blocks get orthogonal updates, as large as AdamW's; all else AdamW. With --init-from " \
      "adamw if not given") \
    X(CHOICE, products, "products", NULL, CHOICES(PRODUCTS_CHOICES), NONE, 0, \
      "train_gsa: what matrix products of layers multiply; bf16: rounded factors, where the CPU has AMX or " \
      "AVX512-BF16; sums, weights and all else stay fp32. fp32 if not given; train_gsacu has what it was built for") \
    X(REAL, momentum, "momentum", 0.95, RANGE(0, 0.9999), NONE, 0, \
      "Muon: memory of the gradient") \
    X(REAL, lr, "lr", 0, RANGE(0, 10), NONE, 0, \
      "highest learning rate; if not given 0.078 / sqrt(channels), and 0.384 / channels without Muon") \
    X(REAL, min_lr, "min-lr", 0, RANGE(0, 10), NONE, 0, \
      "learning rate at the end; a tenth of --lr if not given") \
    X(REAL, splat_lr, "splat-lr", 0, RANGE(0, 10), NONE, 0, \
      "highest rate of scalars (splats' precision, amplitude, envelope; gains; learned rotations), in the schedule " \
      "of --lr; ten times --lr, but at most 0.01, if not given") \
    X(INT, warmup, "warmup", 100, RANGE(0, 1e9), NONE, 0, \
      "steps until the highest rate is reached") \
    X(CHOICE, schedule, "schedule", "cosine", CHOICES("cosine|wsd|constant"), NONE, 0, \
      "after the warm-up: a cosine; constant, then linear over the last fifth; constant") \
    X(REAL, weight_decay, "weight-decay", 0, RANGE(0, 10), NONE, 0, \
      "of matrices and embeddings; if not given (1 + epochs) / (steps x --lr), of at most 16 epochs; but 0.1 without " \
      "Muon or with --init-from") \
    X(REAL, beta1, "beta1", 0.9, RANGE(0, 0.9999), NONE, 0, \
      "AdamW: memory of the gradient") \
    X(REAL, beta2, "beta2", 0.95, RANGE(0, 0.999999), NONE, 0, \
      "AdamW: memory of its square") \
    X(REAL, clip, "clip", 1, RANGE(0, 1e9), NONE, 0, \
      "largest gradient norm, of weights and of scalars each; 0: no limit. Muon's updates have one size: there it " \
      "only limits a gradient's part of the momentum") \
    X(INT, seed, "seed", 1, RANGE(0, 9e15), NONE, 0, \
      "of the starting weights, the order of the data and the samples") \
    X(TEXT, init_from, "init-from", NULL, ANY("FILE"), NONE, 0, \
      "start with the weights of this model: fresh optimiser and schedule. With --attention hybrid or gsa, heads of " \
      "a standard model get splats: half of each layer, those that attend nearest, or --gsa-heads") \
    X(SWITCH, overfit_batch, "overfit-batch", false, NO_VALUE, NONE, 0, \
      "train on the first batch again and again: a test of the code") \
    \
    ROOM(run, "run (these may be changed when a run is resumed)") \
    X(TEXT, out, "out", "runs/default", ANY("DIR"), NONE, FREE | UNSAVED, \
      "checkpoints and main.log go here") \
    X(SWITCH, resume, "resume", false, NO_VALUE, NONE, FREE | UNSAVED, \
      "go on from the newest checkpoint in --out, with its settings") \
    X(SWITCH, recompute, "recompute", false, NO_VALUE, NONE, FREE, \
      "keep only the input of each block and compute it again in the backward pass: less memory, same numbers") \
    X(INT, eval_every, "eval-every", 1000, RANGE(0, 1e9), NONE, FREE, \
      "steps between evaluations; 0: none") \
    X(INT, eval_tokens, "eval-tokens", 65536, RANGE(1, 1e12), NONE, FREE, \
      "validation tokens per evaluation, at most") \
    X(INT, sample_every, "sample-every", 2000, RANGE(0, 1e9), NONE, FREE, \
      "steps between samples of text; 0: none") \
    X(INT, save_every, "save-every", 1000, RANGE(0, 1e9), NONE, FREE, \
      "steps between checkpoints; 0: only at the end") \
    X(INT, keep, "keep", 2, RANGE(0, 1e9), NONE, FREE, \
      "checkpoints kept, the newest; 0: all") \
    X(INT, threads, "threads", 0, RANGE(0, 4096), NONE, FREE, \
      "CPU threads; 0: what OpenMP chooses, as a rule one a core") \
    X(INT, gpus, "gpus", 1, RANGE(0, 1024), NONE, FREE | UNSAVED, \
      "train_gsacu: GPUs of this machine, a process each; 0: all. On several machines torchrun, srun or mpirun start " \
      "them") \
    X(CHOICE, reduce, "reduce", "fp32", CHOICES("fp32|bf16"), NONE, FREE | UNSAVED, \
      "several GPUs: how their gradients are added; bf16: half the traffic, and rounded") \
    X(SWITCH, shard_optimiser, "shard-optimiser", false, NO_VALUE, NONE, FREE | UNSAVED, \
      "several GPUs: each keeps a part of the fp32 weights and of the moments: less memory, same numbers")
// clang-format on

/* SETTING_depth ...: a row's place in the table and in Settings.flags. */
#define ROOM(name, heading) ROOM_##name,
#define X(kind, field, ...) SETTING_##field,
enum { SETTINGS(ROOM, X) NUM_SETTINGS };
#undef ROOM
#undef X

typedef bool SettingSWITCH;
typedef int64_t SettingINT;
typedef double SettingREAL;
typedef const char *SettingTEXT;
typedef const char *SettingCHOICE;
#define ROOM(name, heading)
#define X(kind, field, ...) Setting##kind field;
typedef struct {
    SETTINGS(ROOM, X)
    Flag flags[NUM_SETTINGS + 1]; /* row by row; they point at the fields above, so a Settings must not be copied */
} Settings;
#undef ROOM
#undef X

/* The defaults, then the command line. Every mistake is one sentence and the end of the program. */
void settings_from_command_line(Settings *s, int argc, char **argv);
/* on the command line, not by a file */
static inline bool is_given(const Settings *s, int setting) { return s->flags[setting].given; }

/* What a state file stores: "name=value\n" for every flag that is not UNSAVED. The caller frees it. */
char *settings_text(const Settings *s);
/* Takes all settings from that text, of the file `path`. A flag that is given and differs is refused; one that is
   FREE, or a PLACE where the file names another, wins over the file. */
void settings_from_text(Settings *s, const char *text, size_t bytes, const char *path);
/* Prints all settings room by room, and one line of the log. */
void print_settings(const Settings *s, FILE *log, int64_t step);

/* These fill in what the flags leave open and make the model's configuration: the shape, from --depth and --preset;
   then the rest, which needs the tokenizer; then the learning rates, which depend on the model's size; then the weight
   decay, which depends on how often the run reads its text (epochs). */
void resolve_shape(Settings *s);
Config make_config(Settings *s, const Tokenizer *t);
void resolve_rates(Settings *s, const Config *c);
void resolve_decay(Settings *s, double epochs);
/* --init-from: the configuration of the model file, in place of the first two. The sequence length alone may differ
   from the file's, where positions are not learned; and a standard model may become one with splats (into_splats.h). */
Config config_from_file(Settings *s, const Checkpoint *k, const Tokenizer *t);

#ifdef __cplusplus
}
#endif
#endif
