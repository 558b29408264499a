/* What a model does with one text, gathered as plain arrays, and written as one page of HTML that needs nothing
   else, or as PNG pictures. */
#ifndef GSA_REPORT_H
#define GSA_REPORT_H

#include "measure.h"
#include "picture.h"
#include "splats.h"

#ifdef __cplusplus
extern "C" {
#endif

enum { REPORT_GUESSES = 3, REPORT_SNIPPETS = 6, REPORT_PARTNERS = 4 };

typedef struct {
    /* alpha; root mean variance; tokens of a turn and until half is left, 0: none; |mu|; psi, in radians */
    float amplitude, width, period, half_life, norm, phase;
    bool alive;
} SplatFacts;

/* A token in its context. */
typedef struct {
    char *before, *token, *after; /* UTF-8, as tokens are shown; NULL: there is none */
    float share;                  /* of the token that a splat has */
} Snippet;

/* G counts GSA heads in order of layer and head, S slots of a head, NH all heads; T tokens. */
typedef struct {
    Config config;
    const char *model, *note; /* the file; a sentence for the reader, or NULL */
    int64_t step;
    int T;
    const char **tokens; /* (T): UTF-8, as tokens are shown */
    float *loss;         /* (T): nats of token t given those before; NaN where it was not predicted */
    /* (T, REPORT_GUESSES): the likeliest tokens: next ones, or of an encoder for this place */
    const char **guess;
    float *guess_share; /* (T, REPORT_GUESSES): their probabilities */
    float *weights;     /* (L, NH, T, T): row i what query i gives to each key */
    /* (L, NH, T, 2), (L, NH, 2): keys in the plane of their first two principal components, or of those of the mean
       keys of each splat's own tokens; and what these explain of the keys' variance */
    float *points, *share;
    float *queries, *keys; /* (G, T, S): responsibilities; dead slots 0 */
    PlaneSplat *splats;    /* (G, S): in that plane */
    SplatFacts *facts;     /* (G, S) */
    HeadMeasure *measures; /* (L, NH) */
    /* Of each splat (G, S) its typical tokens, or NULL; tokens that it has most of, as keys, then as queries (.., 2,
       REPORT_SNIPPETS); what it adds by distance (.., DISTANCE_BINS): bin b begins at first[b]; and the splats that its
       queries attend to (.., REPORT_PARTNERS), with their shares, 0: there is none */
    char **names;
    Snippet *snippets;
    float *adds, *partner_shares;
    int *partners;
    size_t bins, first[DISTANCE_BINS];
} Report;

/* What all heads do on a text of T tokens, from the flat parameters, queries and keys: read copies those (part 0,
   part 1) of a head, (T, HS), to out. Names, texts, losses, guesses and what splats own (from the names on) are the
   caller's to fill in, and the strings' bytes its own. */
Report *report_create(const Config *c, const float *params, int T,
                      void (*read)(void *model, int l, int h, int part, float *out), void *model);
void report_free(Report *r);

/* Bytes of a token as text that can be shown: UTF-8, a leading space as a dot, line ends as \n, other bytes in hex.
   free() it. */
char *token_label(const char *piece, size_t bytes);

/* The page, whole or not at all. log: the main.log of the training, for its curves, or NULL. */
void report_write(const Report *r, const char *log, const char *path);
/* heads.png, and of each head (l, h) in the masks of `heads` attention_L_H.png, splats_L_H.png and, of GSA heads,
   responsibilities_L_H.png and distances_L_H.png; returns their number. */
int report_pictures(const Report *r, const uint64_t heads[MAX_LAYERS], const char *folder);

#ifdef __cplusplus
}
#endif
#endif
