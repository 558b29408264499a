/* Pictures: a canvas of RGB pixels, what can be drawn on it, diagrams with axes, and the pictures of a model and of
   its training. Everything is drawn from plain arrays; nothing here knows the network. Lengths are in pixels, x to
   the right, y down. */
#ifndef GSA_PICTURE_H
#define GSA_PICTURE_H

#include "../util.h"

#ifdef __cplusplus
extern "C" {
#endif

/* ---------------------------------------------------------------------- canvas */

typedef struct {
    uint8_t r, g, b;
} Colour;

typedef struct {
    int width, height;
    double clip[4]; /* left, top, right, bottom: nothing is drawn outside */
    uint8_t *rgb;   /* (height, width, 3) */
} Canvas;

extern const Colour ink, grey, pale, paper; /* text, secondary text, grid lines, the ground */

Canvas *canvas_create(int width, int height); /* all paper; dies where a side exceeds 32,768 */
void canvas_free(Canvas *c);
void canvas_clip(Canvas *c, double left, double top, double right, double bottom);
void canvas_unclip(Canvas *c);
uint8_t *canvas_png(const Canvas *c, size_t *bytes); /* the file's bytes; free() them */
/* a PNG file, whole or not at all; dies with a sentence where it cannot be written */
void canvas_write(const Canvas *c, const char *path);

/* A scale for numbers in [0, 1]: from white through green and blue to dark blue, its lightness falling steadily, so
   that the order is seen without telling colours apart and in print. Values outside are clamped; grey where not a
   number. */
Colour colour_scale(double value);
/* A colour for the i-th of several things, by Okabe and Ito, who chose them to be told apart by the colour-blind:
   seven, then again. */
Colour colour_of(int i);
Colour colour_on(Colour background); /* ink or paper, whichever can be read on it */

void draw_rectangle(Canvas *c, double x, double y, double width, double height, Colour colour, double opacity);
/* its outline, inside */
void draw_frame(Canvas *c, double x, double y, double width, double height, double line, Colour colour);
void draw_line(Canvas *c, double x0, double y0, double x1, double y1, double width, Colour colour, double opacity);
/* Half-axes a and b, a turned by angle from the x-axis towards y. line 0: filled. */
void draw_ellipse(Canvas *c, double x, double y, double a, double b, double angle, double line, Colour colour,
                  double opacity);

/* Text, UTF-8, in a font of the system: DejaVu Sans, Liberation Sans or Noto Sans, or the TrueType file that the
   environment variable GSA_FONT names. Where there is none, or GSA_FONT is empty, in the letters of stb_easy_font: it
   has ASCII; common quotes and dashes become theirs, the dot that stands for a space (U+00B7) is drawn. A character
   that the font has not is a '?'. (x, y): the upper edge of the text, and its start, middle or end. Letters are some 7
   pixels a size high, and lines 10 pixels a size apart never touch. draw_text_up writes upwards: (x, y) is its left
   edge and its lower end, middle or upper end. */
enum { TEXT_START, TEXT_MIDDLE, TEXT_END };
bool text_has_font(void); /* one of the system, or that of GSA_FONT */
double text_width(const char *text, double size);
void draw_text(Canvas *c, double x, double y, const char *text, double size, int anchor, Colour colour);
void draw_text_up(Canvas *c, double x, double y, const char *text, double size, int anchor, Colour colour);

/* ---------------------------------------------------------------------- diagrams */

/* The multiples of 1, 2 or 5 times a power of ten in [low, high], at most `most` of them, into ticks; *step is their
   distance. Returns the number, 0 where low < high does not hold. */
int nice_ticks(double low, double high, int most, double *ticks, double *step);
/* with the decimals that step needs; 25000 is 25k */
void number_text(double value, double step, char *out, size_t room);

typedef struct {
    Canvas *canvas;
    double left, top, right, bottom; /* the frame */
    double x0, x1, y0, y1;           /* the values at its edges */
} Plot;

/* A canvas with title, axes, ticks and their grid. names: room to the left of the frame, without ticks of y; 0:
   ticks. legend: room kept free to the right. equal: one unit is as long on both axes, and the ranges grow to that.
   doubling: x is a power of two, x0 and x1 too, and ticks say 2^x. Drawing is clipped to the frame until
   canvas_unclip. The y-axis grows upwards. */
Plot plot_open(int width, int height, const char *title, const char *x_label, const char *y_label, double x0, double x1,
               double y0, double y1, double names, double legend, bool equal, bool doubling);
double plot_x(const Plot *p, double x);
double plot_y(const Plot *p, double y);

/* ---------------------------------------------------------------------- pictures

   Each returns a canvas of the size that it needs. Labels are UTF-8, cut where they are too long. */

/* Attention of one head: weights (T, T), row i what query i gives to each key; its tokens on both sides. */
Canvas *picture_attention(const char *title, const float *weights, const char *const *labels, int T);

/* Attention of all heads at a glance: weights (L, NH, T, T), kind (L, NH) the index of the head's kind in kinds (a
   frame's colour). Head (l, h) fills the square of side *cell at (left + h pitch, top + l pitch), for whoever wants
   to know what was clicked. */
typedef struct {
    int left, top, pitch, cell;
} HeadGrid;
Canvas *picture_heads(const char *title, const float *weights, const int *kind, const char *const *kinds,
                      int number_of_kinds, int L, int NH, int T, HeadGrid *grid);

/* A head's splats and keys in a plane: of the first two principal components of the keys, or where it has splats, of
   the keys' means by splat. */
typedef struct {
    float x, y, a, b, angle; /* centre, half-axes at one sigma, angle of a from the x-axis */
    float amplitude;         /* relative to the largest in the head */
    int slot;
} PlaneSplat;
/* From keys (T, d): mean (d), components (2, d), orthonormal, and the share of the variance that each holds. */
void principal_plane(const float *keys, int T, int d, float *mean, float *components, double share[2]);
/* The ellipse of covariance ((xx, xy), (xy, yy)) at one sigma. */
void plane_ellipse(double xx, double xy, double yy, PlaneSplat *splat);
/* points (T, 2); owner (T): the splat, by its position in splats, that a token is coloured by; -1: none. */
Canvas *picture_splats(const char *title, const PlaneSplat *splats, int S, const float *points, const int *owner,
                       const char *const *labels, int T, const double share[2]);

/* Responsibilities (T, S) of a head's splats for its tokens; slots (S) are the splats' names. */
Canvas *picture_responsibilities(const char *title, const float *r, const int *slots, int S, const char *const *labels,
                                 int T);

/* What the splats of a head add by distance: adds (S, bins), bin b from distance first[b] on; blue above 0, orange
   below, by the square root of its share of the largest. labels (S). */
Canvas *picture_distances(const char *title, const float *adds, const char *const *labels, int S, const size_t *first,
                          int bins);

/* Curves of training: any number of them, each of points in order of x, as lines; thin ones are drawn pale and have
   no entry in the legend. */
typedef struct {
    const char *name;
    const double *x, *y;
    const double *band; /* half the height of a pale band around the line, or NULL */
    size_t count;
    int colour;
    bool thin, marks; /* marks: a dot at each point */
} Curve;
/* low < high: range of y; else it follows from the points. doubling: the scale of x, greater than 0, doubles from
   tick to tick */
Canvas *picture_curves(const char *title, const char *x_label, const char *y_label, const Curve *curves, int count,
                       double low, double high, bool doubling);

/* Losses of trainings from their main.log: validation as a line, or where there is none the averaged training loss;
   the training loss of each step is pale. names (count); where NULL, the folders that the logs are in. Dies with a
   sentence where a file has no losses, which log_has_losses answers. */
Canvas *picture_losses(const char *title, const char *const *logs, const char *const *names, int count, double low,
                       double high);
bool log_has_losses(const char *log);

/* Birth and death of splats in a training, from the adp lines of its main.log: how many live, coverage, events of
   each kind so far, and in which heads. Dies with a sentence where there are none, which log_has_adaptation answers. */
Canvas *picture_adaptation(const char *log);
bool log_has_adaptation(const char *log);

/* Bars with error bars, one below the other: value and error (count; an error of 0 or NaN is not drawn). The axis
   starts at 0 where the smallest bar is under half of the largest, otherwise near the smallest, and the axis says
   so. */
Canvas *picture_bars(const char *title, const char *x_label, const char *const *names, const double *values,
                     const double *errors, int count);

#ifdef __cplusplus
}
#endif
#endif
