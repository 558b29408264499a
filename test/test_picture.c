/* Pictures and reports. Witnesses: stb_image reads what stb_image_write wrote, cJSON what the report wrote; ticks,
   scales, planes and ellipses by their properties; covariances by elimination; responsibilities by equation (11)
   written again; of every picture, that its rim is empty: nothing is cut off. */
#include "../gsa/look/report.h"
#include "test.h"

#include <cjson/cJSON.h>
#define STB_IMAGE_IMPLEMENTATION
#define STBI_ONLY_PNG
#define STBI_NO_STDIO
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-function"
#include <stb/stb_image.h>
#pragma GCC diagnostic pop
#include <sys/wait.h>
#include <unistd.h>

static const char *dir;

/* The rim of 8 pixels and the rows between the title and what is below it are paper, and the middle is not all
   paper. */
static void check_rim(const Canvas *c, const char *what) {
    int marks = 0, inside = 0;
    for (int y = 0; y < c->height; y++)
        for (int x = 0; x < c->width; x++) {
            const uint8_t *p = c->rgb + ((size_t)y * (size_t)c->width + (size_t)x) * 3;
            bool empty = p[0] == 255 && p[1] == 255 && p[2] == 255,
                 rim = x < 8 || y < 8 || x >= c->width - 8 || y >= c->height - 8 || (y >= 56 && y < 63);
            marks += rim && !empty;
            inside += !rim && !empty;
        }
    CHECK(marks == 0 && inside > 100, "%s: %d pixels of its rim are drawn on, %d within", what, marks, inside);
}

static void check_and_free(Canvas *c, const char *what) {
    check_rim(c, what);
    canvas_free(c);
}

static Colour pixel(const Canvas *c, int x, int y) {
    const uint8_t *p = c->rgb + ((size_t)y * (size_t)c->width + (size_t)x) * 3;
    return (Colour){p[0], p[1], p[2]};
}

static bool same(Colour a, Colour b) { return a.r == b.r && a.g == b.g && a.b == b.b; }

/* ---------------------------------------------------------------------- canvas */

static void test_png(void) {
    Canvas *c = canvas_create(37, 23);
    uint64_t rng = 1;
    for (int i = 0; i < 37 * 23 * 3; i++) c->rgb[i] = (uint8_t)rng_next(&rng);
    char *path = xasprintf("%s/noise.png", dir);
    canvas_write(c, path);
    size_t bytes;
    char *file = read_file(path, &bytes);
    int width, height, channels;
    uint8_t *back = stbi_load_from_memory((const uint8_t *)file, (int)bytes, &width, &height, &channels, 0);
    CHECK(back && width == 37 && height == 23 && channels == 3 && memcmp(back, c->rgb, 37 * 23 * 3) == 0,
          "a PNG holds what was drawn");
    stbi_image_free(back);
    free(file);
    free(path);
    canvas_free(c);
}

static void test_shapes(void) {
    static const Colour red = {255, 0, 0};
    Canvas *c = canvas_create(200, 100);
    /* covers 14.25 - 10.25 by 23.5 - 20.5: an area of 12, shared out among 5 x 4 pixels */
    draw_rectangle(c, 10.25, 20.5, 4, 3, red, 1);
    double area = 0;
    for (int i = 0; i < 200 * 100; i++) area += (255 - c->rgb[3 * i + 1]) / 255.0;
    CHECK(fabs(area - 12) < 0.05 && pixel(c, 10, 21).g == 64 && same(pixel(c, 11, 21), red),
          "a rectangle covers its area: %g", area);
    memset(c->rgb, 255, 200 * 100 * 3);
    draw_ellipse(c, 100, 50, 40, 20, 0.6, 0, red, 1);
    area = 0;
    double xx = 0, xy = 0;
    for (int y = 0; y < 100; y++)
        for (int x = 0; x < 200; x++) {
            double share = (255 - pixel(c, x, y).g) / 255.0, u = x + 0.5 - 100, v = y + 0.5 - 50;
            area += share;
            xx += share * u * u;
            xy += share * u * v;
        }
    /* moments of a filled ellipse are a quarter of its half-axes' squares */
    double want_xx = (1600 * cos(0.6) * cos(0.6) + 400 * sin(0.6) * sin(0.6)) / 4,
           want_xy = (1600 - 400) * cos(0.6) * sin(0.6) / 4;
    CHECK(fabs(area / (M_PI * 800) - 1) < 0.01 && fabs(xx / area / want_xx - 1) < 0.02 &&
              fabs(xy / area / want_xy - 1) < 0.02,
          "an ellipse: area %g, moments %g %g, not %g %g", area, xx / area, xy / area, want_xx, want_xy);
    memset(c->rgb, 255, 200 * 100 * 3);
    draw_line(c, 20, 20, 120, 60, 4, red, 1);
    area = 0;
    for (int i = 0; i < 200 * 100; i++) area += (255 - c->rgb[3 * i + 1]) / 255.0;
    CHECK(fabs(area / (4 * hypot(100, 40) + M_PI * 4) - 1) < 0.02, "a line of width 4 with round ends covers %g", area);
    memset(c->rgb, 255, 200 * 100 * 3);
    canvas_clip(c, 50, 30, 60, 40);
    draw_line(c, 0, 0, 200, 100, 50, red, 1);
    draw_rectangle(c, -5, -5, 300, 300, red, 1);
    draw_ellipse(c, 55, 35, 500, 500, 0, 0, red, 1);
    draw_text(c, 0, 30, "all of this", 2, TEXT_START, red);
    int outside = 0;
    for (int y = 0; y < 100; y++)
        for (int x = 0; x < 200; x++)
            outside += !same(pixel(c, x, y), x >= 50 && x < 60 && y >= 30 && y < 40 ? red : paper);
    CHECK(outside == 0, "what is drawn stays within the clip and fills it: %d pixels do not", outside);
    /* must not crash */
    draw_ellipse(c, NAN, 1, 1, 1, 0, 0, red, 1);
    draw_line(c, INFINITY, 0, 1, 1, 1, red, 1);
    draw_rectangle(c, 0, NAN, 1, 1, red, 1);
    canvas_free(c);
}

static void test_text(void) {
    static const Colour red = {255, 0, 0};
    /* The pixels of a text lie between its start and start + width, whichever way it is anchored and turned. */
    static const char *const texts[] = {"Attention: layer 3", "\xC2\xB7the",
                                        "\xE2\x80\x9Cquotes\xE2\x80\x9D \xE2\x80\x94 dash", "\xFF\xC3",
                                        "\xE6\x97\xA5\xE6\x9C\xAC"};
    for (size_t i = 0; i < sizeof texts / sizeof *texts; i++)
        for (int anchor = TEXT_START; anchor <= TEXT_END; anchor++)
            for (int up = 0; up < 2; up++) {
                Canvas *c = canvas_create(600, 600);
                double width = text_width(texts[i], 2), start = 300 - (anchor == TEXT_START    ? 0
                                                                       : anchor == TEXT_MIDDLE ? width / 2
                                                                                               : width);
                if (up) draw_text_up(c, 300, 300, texts[i], 2, anchor, red);
                else draw_text(c, 300, 300, texts[i], 2, anchor, red);
                int drawn = 0, outside = 0;
                for (int y = 0; y < 600; y++)
                    for (int x = 0; x < 600; x++) {
                        if (same(pixel(c, x, y), paper)) continue;
                        double along = up ? 600 - 1 - y : x, across = up ? x : y;
                        drawn++;
                        outside += along < start - 1 || along > start + width + 1 || across < 300 || across >= 324;
                    }
                CHECK(drawn > 3 && outside == 0, "text %zu, anchor %d, up %d: %d pixels, %d outside its box", i, anchor,
                      up, drawn, outside);
                canvas_free(c);
            }
    CHECK(text_width("\xE6\x97\xA5", 1) == text_width("?", 1) && text_width("\xC3\xA4", 1) <= text_width("M", 1),
          "one letter for one character");
    if (!text_has_font()) CHECK(text_width("\xE2\x80\x99", 1) == text_width("'", 1), "a curly quote is a plain one");
}

static void test_ticks(void) {
    uint64_t rng = 5;
    int bad = 0;
    for (int trial = 0; trial < 20000; trial++) {
        double low = rng_normal(&rng) * pow(10, rng_uniform(&rng) * 12 - 6),
               high = low + pow(10, rng_uniform(&rng) * 12 - 6), ticks[16], step;
        if (!(low + 1e-9 * fabs(low) < high)) continue;
        int most = 4 + (int)rng_below(&rng, 8), count = nice_ticks(low, high, most, ticks, &step);
        double mantissa = step / pow(10, floor(log10(step) + 1e-9));
        bool nice = fabs(mantissa - 1) < 1e-6 || fabs(mantissa - 2) < 1e-6 || fabs(mantissa - 5) < 1e-6;
        /* the next finer step, at most 2.5 times finer, would be too many */
        bool good = nice && count <= most && count >= 1 && count * 2.5 + 2.5 >= most;
        for (int i = 0; i < count; i++)
            good = good && ticks[i] >= low - 1e-6 * step && ticks[i] <= high + 1e-6 * step &&
                   fabs(remainder(ticks[i], step)) < 1e-6 * step + 1e-9 * fabs(ticks[i]);
        bad += !good;
    }
    CHECK(bad == 0, "ticks are multiples of 1, 2 or 5, within the range, as many as fit: %d ranges are not so", bad);
    double ticks[16], step;
    CHECK(nice_ticks(1, 1, 8, ticks, &step) == 0 && nice_ticks(0, NAN, 8, ticks, &step) == 0 &&
              nice_ticks(0, INFINITY, 8, ticks, &step) == 0,
          "no ticks in an empty range");
    CHECK(nice_ticks(1e17, 1e17 + 64, 8, ticks, &step) <= 8, "a range so far from 0 that doubles do not count in it");
    static const struct {
        double value, step;
        const char *text;
    } numbers[] = {{0, 1, "0"},          {2.5, 0.5, "2.5"},   {25000, 5000, "25k"}, {1500, 500, "1500"},
                   {0.05, 0.01, "0.05"}, {-0.1, 0.1, "-0.1"}, {3e6, 1e6, "3M"}};
    for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++) {
        char text[32];
        number_text(numbers[i].value, numbers[i].step, text, sizeof text);
        CHECK(strcmp(text, numbers[i].text) == 0, "%g is written %s, not %s", numbers[i].value, text, numbers[i].text);
    }
}

static double linear(double v) { return v <= 0.04045 ? v / 12.92 : pow((v + 0.055) / 1.055, 2.4); }

/* Lightness falls along the scale, also for who lacks one kind of cone: their colours are mixtures of linear RGB
   (Vienot and others, 1999). */
static void test_colours(void) {
    static const double eyes[4][3] = {
        {0.2126, 0.7152, 0.0722}, {0.11238, 0.88762, 0}, {0.29275, 0.70725, 0}, {0.299, 0.587, 0.114}};
    for (int eye = 0; eye < 4; eye++) {
        double before = 2, steepest = 0;
        int rises = 0;
        for (int i = 0; i <= 64; i++) {
            Colour c = colour_scale(i / 64.0);
            double y = eyes[eye][0] * linear(c.r / 255.0) + eyes[eye][1] * linear(c.g / 255.0) +
                       eyes[eye][2] * linear(c.b / 255.0),
                   lightness = 116 * cbrt(y) - 16;
            if (i) {
                rises += lightness > before - 0.3;
                steepest = fmax(steepest, before - lightness);
            }
            before = lightness;
        }
        CHECK(rises == 0 && steepest < 3.5,
              "the scale gets darker steadily for eye %d: %d steps do not, the largest is %g", eye, rises, steepest);
    }
    CHECK(same(colour_scale(-1), colour_scale(0)) && same(colour_scale(0), paper) &&
              same(colour_scale(2), colour_scale(1)) && !same(colour_scale(NAN), paper),
          "ends of the scale");
    double nearest = 1e9;
    for (int i = 0; i < 7; i++)
        for (int k = 0; k < i; k++) {
            Colour a = colour_of(i), b = colour_of(k);
            nearest = fmin(nearest, hypot(hypot(a.r - b.r, a.g - b.g), a.b - b.b));
        }
    CHECK(nearest > 50 && same(colour_of(7), colour_of(0)), "seven colours, none alike: %g", nearest);
}

/* ---------------------------------------------------------------------- planes and ellipses */

static void test_plane(void) {
    enum { T = 50, D = 12 };
    float keys[T * D], mean[D], u[2 * D];
    double share[2], covariance[D * D] = {0}, total = 0;
    uint64_t rng = 3;
    for (int t = 0; t < T; t++)
        for (int k = 0; k < D; k++) keys[t * D + k] = (float)(rng_normal(&rng) / (1 + k) + 3);
    principal_plane(keys, T, D, mean, u, share);
    for (int a = 0; a < D; a++)
        for (int b = 0; b < D; b++)
            for (int t = 0; t < T; t++)
                covariance[a * D + b] += (double)(keys[t * D + a] - mean[a]) * (keys[t * D + b] - mean[b]) / T;
    for (int k = 0; k < D; k++) total += covariance[k * D + k];
    double dots[3] = {0, 0, 0}, residual = 0;
    for (int k = 0; k < D; k++) {
        dots[0] += u[k] * u[k];
        dots[1] += u[D + k] * u[D + k];
        dots[2] += u[k] * u[D + k];
    }
    for (int c = 0; c < 2; c++)
        for (int a = 0; a < D; a++) {
            double sum = 0;
            for (int b = 0; b < D; b++) sum += covariance[a * D + b] * u[c * D + b];
            residual = fmax(residual, fabs(sum - share[c] * total * u[c * D + a]));
        }
    CHECK(fabs(dots[0] - 1) < 1e-6 && fabs(dots[1] - 1) < 1e-6 && fabs(dots[2]) < 1e-6,
          "components are orthonormal: %g %g %g", dots[0], dots[1], dots[2]);
    CHECK(residual < 1e-5 * total && share[0] > share[1], "components are eigenvectors of the covariance: %g",
          residual / total);
    /* at right angles to the first, no direction has more variance than the second */
    for (int trial = 0; trial < 100; trial++) {
        double v[D], along = 0, square = 0, sum = 0;
        for (int k = 0; k < D; k++) {
            v[k] = rng_normal(&rng);
            along += v[k] * u[k];
        }
        for (int k = 0; k < D; k++) {
            v[k] -= along * u[k];
            square += v[k] * v[k];
        }
        for (int a = 0; a < D; a++)
            for (int b = 0; b < D; b++) sum += v[a] * covariance[a * D + b] * v[b] / square;
        if (!(sum <= share[1] * total * (1 + 1e-6)))
            CHECK(false, "a direction has more variance (%g) than the second component (%g)", sum, share[1] * total);
    }
    for (int i = 0; i < T * D; i++) keys[i] = 1; /* all alike */
    principal_plane(keys, T, D, mean, u, share);
    bool finite = share[0] == 0 && share[1] == 0;
    for (int k = 0; k < 2 * D; k++) finite = finite && isfinite(u[k]);
    CHECK(finite, "keys that are all alike have a plane, without variance");
    for (int trial = 0; trial < 100; trial++) {
        /* L L^T */
        double a = rng_normal(&rng), b = rng_normal(&rng), d = rng_normal(&rng), xx = a * a, xy = a * b,
               yy = b * b + d * d;
        PlaneSplat e;
        plane_ellipse(xx, xy, yy, &e);
        double cosine = cos(e.angle), sine = sin(e.angle),
               got_xx = e.a * e.a * cosine * cosine + e.b * e.b * sine * sine,
               got_yy = e.a * e.a * sine * sine + e.b * e.b * cosine * cosine;
        double got_xy = (e.a * e.a - e.b * e.b) * cosine * sine,
               error = fabs(got_xx - xx) + fabs(got_xy - xy) + fabs(got_yy - yy);
        if (!(error < 1e-5 * (xx + yy)))
            CHECK(false, "ellipse of (%g %g %g) has (%g %g %g)", xx, xy, yy, got_xx, got_xy, got_yy);
    }
    CHECK(true, "ellipses");
}

/* ---------------------------------------------------------------------- splats of a model */

typedef struct {
    const Config *config;
    int T;
    float *x; /* (L, NH, 2, T, HS) */
} Heads;

static void read_head(void *model, int l, int h, int part, float *out) {
    const Heads *m = (const Heads *)model;
    size_t n = (size_t)m->T * (size_t)config_head_size(m->config);
    memcpy(out, m->x + (((size_t)l * (size_t)config_heads(m->config) + (size_t)h) * 2 + (size_t)part) * n,
           n * sizeof *out);
}

static Config model_config(int attention, int mixer, int envelope, int covariance, int objective, int L, int NH,
                           int S) {
    Config c;
    memset(&c, 0, sizeof c);
    c.T = 700;
    c.V = 300;
    c.Vp = 384;
    c.L = L;
    c.NH = NH;
    c.C = 12 * NH;
    c.S = S;
    c.position = POSITION_ROPE;
    c.attention = attention;
    c.mixer = mixer;
    c.envelope = envelope;
    c.covariance = covariance;
    c.objective = objective;
    c.window = attention == ATTENTION_EXTEND ? 5 : 0;
    const char *problem = config_head_map(&c, NULL);
    if (!problem) problem = config_check(&c);
    if (problem) die("%s", problem);
    return c;
}

/* Parameters and keys that are all different; slot 1 of every head is dead. */
static float *make_model(const Config *c, int T, Heads *heads, uint64_t seed) {
    Tensor tensors[NUM_TENSORS];
    size_t total = model_tensors(c, tensors), n = (size_t)(c->L * config_heads(c) * 2 * T * config_head_size(c));
    float *params = (float *)xmalloc(total * sizeof *params);
    model_start(c, params, seed);
    uint64_t rng = seed;
    for (int i = TENSOR_mu; i <= TENSOR_log_alpha; i++)
        for (size_t k = 0; k < tensors[i].size; k++) params[tensors[i].offset + k] += (float)(0.3 * rng_normal(&rng));
    for (size_t s = 0; s < tensors[TENSOR_alive].size; s++)
        params[tensors[TENSOR_alive].offset + s] = c->S == 1 || s % (size_t)c->S != 1;
    heads->config = c;
    heads->T = T;
    heads->x = (float *)xmalloc(n * sizeof(float));
    for (size_t i = 0; i < n; i++) heads->x[i] = (float)rng_normal(&rng);
    return params;
}

static void test_splats(void) {
    for (int covariance = 0; covariance < 3; covariance++) {
        enum { T = 9, D = 12, S = 5 };
        Config c = model_config(ATTENTION_HYBRID, MIXER_SOFTMAX, ENVELOPE_COSINE, covariance, OBJECTIVE_LM, 2, 2, S);
        Heads heads;
        Tensor tensors[NUM_TENSORS];
        float *params = make_model(&c, T, &heads, 4 + (uint64_t)covariance), x[T * D];
        model_tensors(&c, tensors);
        double r[T * S], worst = 0, worst_variance = 0;
        size_t g = 1, P = (size_t)config_precisions(&c);
        read_head(&heads, 1, 1, 0, x);
        head_responsibilities(&c, params, 1, 1, x, T, r);
        const float *mu = params + tensors[TENSOR_mu].offset + g * S * D,
                    *log_alpha = params + tensors[TENSOR_log_alpha].offset + g * S;
        double Lambda[S][D * D];
        for (int s = 0; s < S; s++) { /* Lambda as a matrix, whichever form it is kept in */
            const float *log_precision = params + tensors[TENSOR_log_precision].offset + (g * S + (size_t)s) * P;
            double L[D * D] = {0};
            for (size_t i = 0; i < D; i++)
                for (size_t k = 0; k <= i; k++)
                    L[i * D + k] = covariance == COVARIANCE_FULL ? (i == k ? exp(log_precision[i * (i + 1) / 2 + k])
                                                                           : log_precision[i * (i + 1) / 2 + k])
                                   : i == k                      ? exp(0.5 * log_precision[P > 1 ? i : 0])
                                                                 : 0;
            for (int i = 0; i < D; i++)
                for (int k = 0; k < D; k++) {
                    Lambda[s][i * D + k] = 0;
                    for (int j = 0; j < D; j++) Lambda[s][i * D + k] += L[i * D + j] * L[k * D + j];
                }
        }
        for (int t = 0; t < T; t++) { /* equation (11) with (1) and (2) */
            double weights[S], sum = 0, square = 1e-6;
            for (int k = 0; k < D; k++) square += (double)x[t * D + k] * x[t * D + k];
            for (int s = 0; s < S; s++) {
                double quadratic = 0;
                for (int i = 0; i < D; i++)
                    for (int k = 0; k < D; k++)
                        quadratic += (x[t * D + i] / sqrt(square) - mu[s * D + i]) * Lambda[s][i * D + k] *
                                     (x[t * D + k] / sqrt(square) - mu[s * D + k]);
                sum += weights[s] = s == 1 ? 0 : exp(log_alpha[s] - 0.5 * quadratic);
            }
            for (int s = 0; s < S; s++)
                worst = fmax(worst, isfinite(r[t * S + s]) ? fabs(r[t * S + s] - weights[s] / sum) : INFINITY);
        }
        CHECK(worst < 1e-9 && r[1] == 0, "responsibilities, covariance %d: %g", covariance, worst);
        float directions[2 * D];
        uint64_t rng = 9;
        for (int k = 0; k < 2 * D; k++) directions[k] = (float)rng_normal(&rng);
        for (int s = 0; s < S; s++) { /* Lambda^-1 u by elimination */
            double plane[3], want[3] = {0, 0, 0}, trace = 0,
                             got = splat_covariance(&c, params, g, (size_t)s, directions, plane), solved[2][D];
            for (int u = 0; u < 2 + D; u++) {
                double A[D * D], b[D];
                memcpy(A, Lambda[s], sizeof A);
                for (int k = 0; k < D; k++) b[k] = u < 2 ? directions[u * D + k] : k == u - 2;
                for (int p = 0; p < D; p++)
                    for (int i = 0; i < D; i++) {
                        if (i == p) continue;
                        double factor = A[i * D + p] / A[p * D + p];
                        for (int k = 0; k < D; k++) A[i * D + k] -= factor * A[p * D + k];
                        b[i] -= factor * b[p];
                    }
                for (int k = 0; k < D; k++) b[k] /= A[k * D + k];
                if (u < 2) memcpy(solved[u], b, sizeof b);
                else trace += b[u - 2];
            }
            for (int k = 0; k < D; k++) {
                want[0] += directions[k] * solved[0][k];
                want[1] += directions[k] * solved[1][k];
                want[2] += directions[D + k] * solved[1][k];
            }
            for (int i = 0; i < 3; i++)
                worst_variance = fmax(worst_variance, fabs(plane[i] - want[i]) / (want[0] + want[2]));
            worst_variance = fmax(worst_variance, fabs(got / trace - 1));
        }
        CHECK(worst_variance < 1e-9, "variances in a plane, covariance %d: %g", covariance, worst_variance);
        free(params);
        free(heads.x);
    }
}

/* ---------------------------------------------------------------------- labels, pictures, page */

static void test_labels(void) {
    static const struct {
        const char *bytes, *label;
    } cases[] = {{" the", "\xC2\xB7the"},
                 {"a b", "a b"},
                 {"x ", "x\xC2\xB7"},
                 {"\n", "\\n"},
                 {"\xC3\xA4", "\xC3\xA4"},
                 {"\xE6\x97", "<E6><97>"},
                 {"\xC0\xAF", "<C0><AF>"},
                 {"\xED\xA0\x80", "<ED><A0><80>"},
                 {"\xF0\x9F\x99\x82", "\xF0\x9F\x99\x82"},
                 {"\xF5\x80\x80\x80", "<F5><80><80><80>"},
                 {"\x01", "<01>"},
                 {"\x7F", "<7F>"}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char *label = token_label(cases[i].bytes, strlen(cases[i].bytes));
        CHECK(strcmp(label, cases[i].label) == 0, "label %zu is %s, not %s", i, label, cases[i].label);
        free(label);
    }
    char *label = token_label("\0a", 2);
    CHECK(strcmp(label, "<00>a") == 0, "a byte 0 is shown");
    free(label);
}

static void write_text(const char *path, const char *text) { write_file(path, text, strlen(text)); }

static int count_colour(const Canvas *c, Colour colour, double left, double top, double right, double bottom) {
    int count = 0;
    for (int y = (int)(top * c->height); y < (int)(bottom * c->height); y++)
        for (int x = (int)(left * c->width); x < (int)(right * c->width); x++) count += same(pixel(c, x, y), colour);
    return count;
}

static void test_bars(void) {
    static const char *const names[] = {"standard, learned positions and a very long name that takes more than its "
                                        "share of the picture's width, far more",
                                        "b", "", "d", "e"};
    static const double values[][5] = {{2.3, 2.31, 2.4, 2.2, NAN}, {0.1, 1, 5, 0, 3}, {3749376, 1e9, 5e5, 2, 3},
                                       {-2, 3, 1, 0, 0},           {1, 1, 1, 1, 1},   {0, 0, 0, 0, 0}};
    static const double errors[5] = {0.02, 0, NAN, 0.1, 0.1};
    for (size_t i = 0; i < sizeof values / sizeof *values; i++)
        check_and_free(picture_bars("Bars", "loss, nats a token", names, values[i], errors, 5), "bars");
    check_and_free(picture_bars("One bar and a title that is so long that it cannot be written at its full size nor "
                                "even at the smaller one and must therefore be cut before the end",
                                "x", names + 1, values[0], errors, 1),
                   "one bar");
    /* 1, 5, 0: the lengths are as the values */
    Canvas *c = picture_bars("Bars", "x", names + 1, values[1] + 1, errors + 1, 3);
    int rows[3] = {0, 0, 0};
    for (int i = 0; i < 3; i++)
        for (int x = 0; x < c->width; x++) rows[i] += same(pixel(c, x, 24 + 48 + 16 + 50 * i + 4), colour_of(0));
    CHECK(rows[0] > 50 && abs(rows[1] - 5 * rows[0]) <= 8 && rows[2] <= 1, "bars of 1, 5 and 0 are %d, %d and %d long",
          rows[0], rows[1], rows[2]);
    canvas_free(c);
    /* two numbers that are the same to the digits of the smaller error, and so in ink; errors of a broken table
       leave room for the bars */
    c = picture_bars("Digits", "x", names + 1, (const double[]){4.25, 4.25}, (const double[]){0.00999, 0.01001}, 2);
    for (int i = 0; i < 2; i++) {
        rows[i] = 0;
        for (int y = 24 + 48 + 16 + 50 * i; y < 24 + 48 + 16 + 50 * i + 34; y++)
            for (int x = c->width / 4; x < c->width; x++) rows[i] += same(pixel(c, x, y), ink);
    }
    CHECK(rows[0] > 200 && abs(rows[0] - rows[1]) <= 12,
          "numbers and errors that read alike have %d and %d pixels of ink", rows[0], rows[1]);
    canvas_free(c);
    c = picture_bars("Huge", "x", names, (const double[]){1e300, 1}, (const double[]){1e299, 1e300}, 2);
    CHECK(count_colour(c, colour_of(0), 0.5, 0, 1, 1) > 1000, "the bar of a huge number is drawn");
    canvas_free(c);
}

/* Where a diagram's frame begins and ends, half way down. */
static void frame_sides(const Canvas *c, double *left, double *right) {
    *left = *right = 0;
    for (int x = 0; x < c->width && !*left; x++) *left = same(pixel(c, x, c->height / 2), grey) ? x + 2 : 0;
    for (int x = (int)*left; x < c->width && !*right; x++) *right = same(pixel(c, x, c->height / 2), grey) ? x : 0;
}

static void test_losses(void) {
    char *a = xasprintf("%s/a", dir), *log = xasprintf("%s/a/main.log", dir), *other = xasprintf("%s/plain.log", dir);
    make_folder(a);
    FILE *f = xfopen(log, "wb");
    fprintf(f, "s:0 cfg:1 depth=2\ns:0 tel:7\n");
    for (int s = 1; s <= 300; s++)
        fprintf(f, "s:%d trl:%g lr:1e-3 norm:1\n%s", s, s < 200 ? 7 - s * 0.01 : 1.0,
                s % 100 ? "" : "s:1 att:1 other\n");
    fprintf(f, "s:300 tel:5\ns:200 tel:3\ns:300 tel:2\n"); /* resumed at 200: the first line of step 300 is void */
    fclose(f);
    write_text(other, "s:1 trl:4\ns:2 trl:nan\ns:300 trl:3.5");
    const char *logs[2] = {log, other}, *given[2] = {NULL, "other"};
    Canvas *c = picture_losses("Loss", logs, given, 2, 0, 8);
    check_rim(c, "losses");
    /* at step 200 of 303, loss 3 of 0 to 8, within the frame: the line of validation has a point */
    double left, right, top = 72, bottom = c->height - 100;
    frame_sides(c, &left, &right);
    int at = (int)(left + (right - left) * 200 / 303), height = (int)(bottom - (bottom - top) * 3 / 8);
    CHECK(same(pixel(c, at, height), colour_of(0)), "a point is where its step and loss are: %d %d", at, height);
    CHECK(
        !same(pixel(c, (int)(left + (right - left) * 300 / 303), (int)(bottom - (bottom - top) * 5 / 8)), colour_of(0)),
        "what a resumed run does again replaces what it did before");
    CHECK(count_colour(c, colour_of(1), 0, 0, 1, 1) > 100, "the second log has its colour");
    canvas_free(c);
    check_and_free(picture_losses("Loss", logs, NULL, 1, 0, 0), "one run");
    check_and_free(picture_losses("Loss", logs + 1, NULL, 1, NAN, NAN), "a run without evaluations");
    write_text(other, "s:0 tel:3");
    check_and_free(picture_losses("Loss", logs + 1, NULL, 1, 0, 0), "one point");
    free(a);
    free(log);
    free(other);
}

static void test_dot(void) {
    static const double x[] = {100, 0, 300}, y[] = {3.2, 9, 9};
    /* one dot, the other line outside the frame */
    const Curve points[2] = {{"point", x, y, NULL, 1, 0, false, true}, {"", x + 1, y + 1, NULL, 2, 1, true, false}};
    Canvas *c = picture_curves("A dot", "", "", points, 2, 0, 8, false);
    double middle[2] = {0, 0}, mass = 0, left, right, top = 72, bottom = c->height - 100;
    frame_sides(c, &left, &right);
    for (int j = 72; j < c->height - 100; j++)
        for (int i = (int)left; i < (int)right; i++) {
            double share = same(pixel(c, i, j), colour_of(0));
            middle[0] += share * (i + 0.5);
            middle[1] += share * (j + 0.5);
            mass += share;
        }
    CHECK(mass > 80 && fabs(middle[0] / mass - left - (right - left) * 100 / 303) < 0.6,
          "a dot of %g pixels stands at %g, not %g", mass, middle[0] / mass, left + (right - left) * 100 / 303);
    CHECK(fabs(middle[1] / mass - (bottom - (bottom - top) * 3.2 / 8)) < 0.6, "its height is %g, not %g",
          middle[1] / mass, bottom - (bottom - top) * 3.2 / 8);
    canvas_free(c);
}

/* A level line of 4 with a band from 1 to 5 units of half its height: rows that the band colours at the left and at the
   right end, against those that the scale of y says. */
static void test_band(void) {
    static const double x[] = {0, 100}, y[] = {10, 10}, half[] = {1, 5};
    const Curve curve = {"band", x, y, half, 2, 0, false, false};
    Canvas *c = picture_curves("A band", "", "", &curve, 1, 0, 20, false);
    double left, right, top = 72, bottom = c->height - 100;
    frame_sides(c, &left, &right);
    for (int end = 0; end < 2; end++) {
        int at = (int)(left + (right - left) * (end ? 0.9 : 0.1)), rows = 0;
        Colour empty = pixel(c, at, (int)top + 8);
        for (int j = (int)top + 8; j < (int)bottom - 8; j++)
            rows += pixel(c, at, j).b != empty.b && abs(j - (int)(top + bottom) / 2) > 4;
        double share = (end ? 0.9 : 0.1) * 101 / 100, expected = 2 * (1 + 4 * share) / 20 * (bottom - top) - 9;
        CHECK(fabs(rows - expected) < 0.15 * expected + 4, "band of %d rows, not %g", rows, expected);
    }
    canvas_free(c);
}

/* Of 15 level lines the first seven are whole, the next seven dashed in the same colours, the last one dotted. One
   more leads out of the picture as far as numbers go, which dashes must not follow. */
static void test_dashes(void) {
    static const double x[] = {0, 100, 200}, far[] = {0, 1e300, 0}, least[] = {0.9, 0.5, 0.08},
                        most[] = {1, 0.75, 0.45};
    double y[15][3];
    Curve curves[16];
    for (int i = 0; i < 15; i++) {
        y[i][0] = y[i][1] = y[i][2] = i + 1;
        curves[i] = (Curve){"line", x, y[i], NULL, 3, i, false, false};
    }
    curves[15] = (Curve){"far", x, far, NULL, 3, 15, false, false};
    Canvas *c = picture_curves("Dashes", "", "", curves, 16, 0, 16, false);
    double left, right, top = 72, bottom = c->height - 100;
    frame_sides(c, &left, &right);
    for (int i = 0; i < 15; i++) {
        int row = (int)(bottom - (bottom - top) * (i + 1) / 16), wide = (int)((right - left) * 0.9), there = 0;
        for (int at = 0; at < wide; at++) there += same(pixel(c, (int)left + 10 + at, row), colour_of(i));
        double share = (double)there / wide, low = least[i / 7], high = most[i / 7];
        CHECK(share >= low && share <= high, "line %d covers %g of its length, not %g to %g", i, share, low, high);
    }
    canvas_free(c);
}

static void test_adaptation(void) {
    char *adapt = xasprintf("%s/adapt.log", dir), *plain = xasprintf("%s/plain.log", dir);
    write_text(plain, "s:1 trl:4");
    FILE *f = xfopen(adapt, "wb");
    for (int s = 0; s <= 1000; s += 10) {
        fprintf(f, "s:%d trl:3\n", s);
        for (int e = 0; e < s % 7; e++)
            fprintf(f, "s:%d adp:%s l:%d h:%d slot:3 from:1 act:0.02\n", s, s % 20 ? "birth" : "death", e, s % 3);
        if (s % 100 == 0)
            fprintf(
                f,
                "s:%d adp:state alive:%d fewest:%d births:1 splits:0 moves:0 deaths:0 merges:0 coverage:%g shifts:0\n",
                s, 64 - s / 100, s / 100, s / -300.0);
    }
    fclose(f);
    check_and_free(picture_adaptation(adapt), "adaptation");
    CHECK(log_has_adaptation(adapt) && !log_has_adaptation(plain), "which log tells of adaptation");
    write_text(adapt,
               "s:-1 adp:birth l:0 h:0 slot:3\ns:nan adp:birth l:0 h:0 slot:3\ns:1e300 adp:birth l:0 h:0 slot:1\n");
    CHECK(!log_has_adaptation(adapt), "events at steps that cannot be are none"); /* one wrote before an array */
    write_text(adapt, "s:5 adp:state alive:3 fewest:1 coverage:nan");
    check_and_free(picture_adaptation(adapt), "adaptation, states only");
    /* one head of two slots: half of the time equal, then one dead; what a resumed run does again replaces what it
       did before; a line cut short */
    write_text(adapt, "s:50 adp:state alive:2 fewest:2 coverage:-1\ns:50 adp:act l:1 h:1 0.5 0.5\ns:100 adp:act l:1 "
                      "h:1 0.9 0.1\ns:60 trl:1\ns:100 adp:act l:1 h:1 1 -\ns:100 adp:act l:2 h:1");
    Canvas *c = picture_adaptation(adapt);
    check_rim(c, "activations");
    CHECK(count_colour(c, colour_scale(0.5), 0, 0, 1, 1) > 8000, "an even share has the middle of the scale: %d pixels",
          (int)count_colour(c, colour_scale(0.5), 0, 0, 1, 1));
    CHECK(count_colour(c, colour_scale(NAN), 0, 0, 1, 1) > 4000, "a dead slot is grey: %d pixels",
          (int)count_colour(c, colour_scale(NAN), 0, 0, 1, 1));
    CHECK(count_colour(c, colour_scale(1.8 / 2.8), 0, 0, 1, 1) < 300, "what was done again is gone");
    canvas_free(c);
    write_text(adapt, "s:5 adp:move l:0 h:1\ns:3 trl:1\ns:5 adp:move l:0 h:2\n");
    check_and_free(picture_adaptation(adapt), "adaptation, one event");
    free(adapt);
    free(plain);
}

/* The bytes of a base64 string */
static uint8_t *decode(const char *text, size_t *count) {
    static const char digits[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    uint8_t *out = (uint8_t *)xmalloc(strlen(text) + 4);
    uint32_t bits = 0;
    int have = 0;
    *count = 0;
    for (; *text && *text != '='; text++) {
        const char *digit = strchr(digits, *text);
        if (!digit) break;
        bits = bits << 6 | (uint32_t)(digit - digits);
        have += 6;
        if (have >= 8) {
            have -= 8;
            out[(*count)++] = (uint8_t)(bits >> have);
        }
    }
    return out;
}

/* Weights, to a byte. */
static void check_weights(const Report *r, const cJSON *data, const char *what) {
    int heads = r->config.L * config_heads(&r->config), T = r->T;
    bool causal = r->config.objective == OBJECTIVE_LM;
    size_t count;
    double off = 0;
    size_t lengths = 0;
    for (int i = 0; i < heads; i++) {
        uint8_t *w = decode(cJSON_GetArrayItem(cJSON_GetObjectItem(data, "weights"), i)->valuestring, &count);
        lengths += count;
        size_t at = 0;
        for (int q = 0; q < T; q++)
            for (int k = 0; k < (causal ? q + 1 : T); k++, at++)
                if (at < count)
                    off =
                        fmax(off, fabs(w[at] / 255.0 -
                                       sqrt(r->weights[((size_t)i * (size_t)T + (size_t)q) * (size_t)T + (size_t)k])));
        free(w);
    }
    CHECK(off < 0.502 / 255 && lengths == (size_t)(heads) * (size_t)(causal ? T * (T + 1) / 2 : T * T),
          "%s: weights to a byte: %g, %zu of them", what, off * 255, lengths);
}

/* Of each head with splats: those alive, and their responsibilities. */
static void check_heads(const Report *r, const cJSON *data, const char *what) {
    const Config *c = &r->config;
    int NA = config_heads(c), S = c->S, T = r->T;
    size_t count;
    for (int i = 0, g = 0; i < c->L * NA; i++) {
        const cJSON *s = cJSON_GetArrayItem(cJSON_GetObjectItem(data, "splats"), i);
        if (!config_is_gsa(c, i / NA, i % NA)) {
            if (!cJSON_IsNull(s)) CHECK(false, "%s: a standard head has splats", what);
            continue;
        }
        const cJSON *list = cJSON_GetObjectItem(s, "splats");
        int alive = cJSON_GetArraySize(list);
        uint8_t *q = decode(cJSON_GetObjectItem(s, "q")->valuestring, &count);
        double difference = 0;
        bool slots = alive == (S == 1 ? 1 : S - 1) && count == (size_t)(alive * T);
        for (int k = 0; k < alive && slots; k++) {
            int slot = cJSON_GetArrayItem(cJSON_GetArrayItem(list, k), 0)->valueint;
            slots = slots && slot != 1 && slot == (k ? k + 1 : 0);
            for (int t = 0; t < T; t++)
                difference =
                    fmax(difference, fabs(q[t * alive + k] / 255.0 - sqrt(r->queries[(g * T + t) * S + slot])));
        }
        if (!slots || !(difference < 0.502 / 255))
            CHECK(false, "%s: splats of head %d: %d alive, responsibilities off by %g", what, i, alive, difference);
        free(q);
        g++;
    }
}

static void check_overview(const Report *r, const cJSON *data, const char *what) {
    int L = r->config.L, NA = config_heads(&r->config);
    size_t count;
    const char *png = cJSON_GetObjectItem(data, "overview")->valuestring;
    uint8_t *image = decode(strchr(png, ',') + 1, &count);
    int width = 0, height = 0, channels;
    uint8_t *rgb = stbi_load_from_memory(image, (int)count, &width, &height, &channels, 3);
    const cJSON *grid = cJSON_GetObjectItem(data, "grid");
    int place[4];
    for (int i = 0; i < 4; i++) place[i] = cJSON_GetArrayItem(grid, i)->valueint;
    CHECK(rgb && place[0] + (NA - 1) * place[2] + place[3] < width && place[1] + (L - 1) * place[2] + place[3] < height,
          "%s: the picture of all heads holds its grid", what);
    stbi_image_free(rgb);
    free(image);
}

/* Pictures of two heads are written, and none is cut off. */
static void check_pictures(const Report *r, const char *folder, const char *what) {
    int L = r->config.L, NA = config_heads(&r->config);
    const Config *c = &r->config;
    uint64_t chosen[MAX_LAYERS] = {0};
    chosen[0] = 1;
    chosen[L - 1] |= 1ull << (NA - 1);
    int pictures = report_pictures(r, chosen, folder),
        splat_heads = config_is_gsa(c, 0, 0) + (L * NA > 1 && config_is_gsa(c, L - 1, NA - 1)), files = 0, found;
    char *pattern = xasprintf("%s/*.png", folder);
    char **list = glob_files(pattern, &found);
    for (int i = 0; i < found; i++) {
        size_t size;
        char *file = read_file(list[i], &size);
        Canvas view = {0, 0, {0, 0, 0, 0}, NULL};
        int channels;
        view.rgb = stbi_load_from_memory((const uint8_t *)file, (int)size, &view.width, &view.height, &channels, 3);
        if (view.rgb) {
            check_rim(&view, list[i]);
            files++;
        }
        stbi_image_free(view.rgb);
        free(file);
        remove(list[i]);
    }
    CHECK(files == found && found == pictures && pictures == 1 + 2 * (L * NA > 1 ? 2 : 1) + splat_heads,
          "%s: %d pictures said, %d found, %d read", what, pictures, found, files);
    free_files(list, found);
    free(pattern);
}

/* Scatter of points (T, dimensions) between splats, each at the mean of the tokens that it has most of; r (T, S). */
static double between_splats(const float *x, int T, int dimensions, const float *r, int S) {
    double sum = 0;
    for (int k = 0; k < dimensions; k++) {
        double own[64] = {0}, count[64] = {0}, mean = 0;
        for (int t = 0; t < T; t++) {
            int best = 0;
            for (int s = 1; s < S; s++) best = r[t * S + s] > r[t * S + best] ? s : best;
            own[best] += (double)x[t * dimensions + k];
            count[best]++;
            mean += (double)x[t * dimensions + k] / T;
        }
        for (int s = 0; s < S; s++)
            if (count[s] > 0) sum += count[s] * pow(own[s] / count[s] - mean, 2);
    }
    return sum;
}

/* In the plane of a head with splats they lie no closer together than in that of the keys' principal components, and
   the shares are those of the keys' variance. */
static void check_planes(const Report *r, const Heads *heads, const char *what) {
    const Config *c = &r->config;
    int T = r->T, NA = config_heads(c), d = config_head_size(c), larger = 0;
    float *k = (float *)xmalloc((size_t)(T * d + 3 * d + 2 * T) * sizeof *k), *mean = k + T * d, *plane = mean + d,
          *points = plane + 2 * d;
    for (int i = 0; i < c->L * NA; i++) {
        double share[2], total = 0, along = 0, middle[2] = {0, 0};
        read_head((void *)heads, i / NA, i % NA, PART_KEYS, k);
        for (int t = 0; t < T; t++) {
            double square = 1e-6;
            for (int e = 0; e < d; e++) square += (double)k[t * d + e] * (double)k[t * d + e];
            for (int e = 0; e < d; e++) k[t * d + e] = (float)((double)k[t * d + e] / sqrt(square));
        }
        principal_plane(k, T, d, mean, plane, share);
        for (int n = 0; n < 2 * T; n++) {
            points[n] = 0;
            for (int e = 0; e < d; e++) points[n] += (k[n / 2 * d + e] - mean[e]) * plane[n % 2 * d + e];
        }
        for (int n = 0; n < T * d; n++) total += pow((double)k[n] - (double)mean[n % d], 2);
        const float *shown = r->points + i * T * 2;
        for (int n = 0; n < 2 * T; n++) middle[n % 2] += (double)shown[n] / T;
        for (int n = 0; n < 2 * T; n++) along += pow((double)shown[n] - middle[n % 2], 2);
        CHECK(fabs(along - (double)(r->share[2 * i] + r->share[2 * i + 1]) * total) < 1e-4 * total + 1e-6,
              "%s: head %d shows %g of a variance of %g", what, i, along, total);
        if (!config_is_gsa(c, i / NA, i % NA)) continue;
        const float *of = r->keys + (size_t)config_gsa_before(c, i / NA, i % NA) * (size_t)(T * c->S);
        double now = between_splats(shown, T, 2, of, c->S), then = between_splats(points, T, 2, of, c->S);
        CHECK(now > then * (1 - 1e-5) - 1e-9, "%s: head %d has scatter %g between splats, less than %g", what, i, now,
              then);
        larger += now > 1.01 * then;
    }
    CHECK(larger > 0 || T < 20 || config_gsa_heads(c) == 0, "%s: no plane shows splats farther apart", what);
    free(k);
}

static void test_report(int attention, int mixer, int envelope, int objective, int L, int NH, int S, int T,
                        const char *what) {
    Config c = model_config(attention, mixer, envelope, COVARIANCE_DIAG, objective, L, NH, S);
    Heads heads;
    float *params = make_model(&c, T, &heads, 77);
    Report *r = report_create(&c, params, T, read_head, &heads);
    static const char *const words[] = {"<|endoftext|>",
                                        "\xC2\xB7the",
                                        "</script><b>",
                                        "a \"quote\" \\n",
                                        "\xC3\xA4",
                                        "<E6>",
                                        "averyveryverylongtokenindeeditis",
                                        "x"};
    r->model = "runs/a/model.bin";
    r->note = "A <note> & more";
    r->step = 12;
    for (int t = 0; t < T; t++) {
        r->tokens[t] = words[t % 8];
        r->loss[t] = t ? (float)t / 7 : NAN;
        for (int k = 0; k < REPORT_GUESSES; k++) {
            r->guess[t * REPORT_GUESSES + k] = words[(t + k) % 8];
            r->guess_share[t * REPORT_GUESSES + k] = 0.25f;
        }
    }
    double worst = 0;
    int NA = config_heads(&c);
    for (int row = 0; row < L * NA * T; row++) {
        double sum = 0;
        for (int k = 0; k < T; k++) sum += r->weights[(size_t)row * (size_t)T + (size_t)k];
        worst = fmax(worst, isfinite(sum) ? fabs(sum - 1) : INFINITY);
    }
    CHECK(worst < 1e-5, "%s: weights sum to 1 but for %g", what, worst);
    check_planes(r, &heads, what);

    char *path = xasprintf("%s/report.html", dir), *folder = xasprintf("%s/pictures", dir);
    report_write(r, NULL, path);
    size_t bytes;
    char *page = read_file(path, &bytes), *start = strstr(page, "type=\"application/json\">"),
         *end = start ? strstr(start, "</script>") : NULL;
    CHECK(end && strstr(page, "</html>") && !strstr(page, "http"), "%s: a whole page that asks for nothing", what);
    if (end) {
        *end = 0;
        cJSON *data = cJSON_Parse(start + strlen("type=\"application/json\">"));
        CHECK(data != NULL, "%s: its data are JSON", what);
        CHECK(data && cJSON_GetArraySize(cJSON_GetObjectItem(data, "tokens")) == T &&
                  strcmp(cJSON_GetArrayItem(cJSON_GetObjectItem(data, "tokens"), 2 % T)->valuestring, words[2 % T]) ==
                      0 &&
                  strcmp(cJSON_GetObjectItem(data, "note")->valuestring, r->note) == 0,
              "%s: texts survive", what);
        if (data) {
            check_weights(r, data, what);
            check_heads(r, data, what);
            check_overview(r, data, what);
        }
        cJSON_Delete(data);
    }
    check_pictures(r, folder, what);
    free(page);
    free(path);
    free(folder);
    free(params);
    free(heads.x);
    report_free(r);
}

static void test_all(void) {
    test_png();
    test_shapes();
    test_text();
    test_ticks();
    test_colours();
    test_plane();
    test_splats();
    test_labels();
    test_bars();
    test_losses();
    test_dot();
    test_band();
    test_dashes();
    test_adaptation();
    test_report(ATTENTION_HYBRID, MIXER_SOFTMAX, ENVELOPE_COSINE, OBJECTIVE_LM, 2, 2, 6, 20, "hybrid");
    test_report(ATTENTION_STANDARD, MIXER_SOFTMAX, ENVELOPE_COSINE, OBJECTIVE_MLM, 1, 1, 6, 2,
                "standard encoder, two tokens");
    test_report(ATTENTION_EXTEND, MIXER_LINEAR, ENVELOPE_RAISED, OBJECTIVE_LM, 1, 3, 64, 50, "extend");
    test_report(ATTENTION_AUGMENT, MIXER_LINEAR, ENVELOPE_DECAY, OBJECTIVE_MLM, 3, 3, 1, 100,
                "augment, linear, encoder");
    test_report(ATTENTION_GSA, MIXER_SOFTMAX, ENVELOPE_NONE, OBJECTIVE_LM, 12, 12, 12, 33, "twelve layers");
}

/* A child process with a font of its own: runs a test there and returns its status; a crash is -1. */
static int with_font(const char *font, int (*test)(void)) {
    fflush(stdout);
    pid_t child = fork();
    if (child == 0) {
        setenv("GSA_FONT", font, 1);
        exit(test());
    }
    int status;
    return waitpid(child, &status, 0) == child && WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

static int all_fail(void) {
    test_all();
    return test_summary("picture, with the letters of stb_easy_font");
}

/* 1: the font is used; 0: it is not. */
static int use_font(void) {
    if (!freopen("/dev/null", "w", stderr)) return -1;
    Canvas *c = canvas_create(300, 60);
    draw_text(c, 10, 10, "Quartz \xC3\x85 glyph \xE2\x80\x94 1.5", 2, TEXT_START, ink);
    canvas_free(c);
    return text_has_font();
}

/* stb_truetype believes what a font says, so a damaged one must not reach it. */
static void test_damaged_fonts(void) {
    static const char whole[] = "/usr/share/fonts/truetype/dejavu/DejaVuSans.ttf";
    if (access(whole, R_OK) != 0) {
        skip("damaged fonts", "fonts-dejavu-core is not installed");
        return;
    }
    size_t bytes;
    char *font = read_file(whole, &bytes), *path = xasprintf("%s/font.ttf", dir);
    uint64_t rng = 1;
    int cut = 0, crashed = 0;
    CHECK(with_font(whole, use_font) == 1, "a font that is whole is used");
    CHECK(with_font("/none", use_font) == 0 && with_font(dir, use_font) == 0, "what is no font is not used");
    for (int i = 0; i < 40; i++) {
        size_t length = i % 2 ? bytes : rng_below(&rng, bytes), at = rng_below(&rng, i % 4 == 1 ? 400 : bytes);
        char before = font[at];
        if (i % 2) font[at] = (char)(before ^ (1 + rng_below(&rng, 255)));
        FILE *f = xfopen(path, "wb");
        xfwrite(font, 1, length, f, path);
        fclose(f);
        font[at] = before;
        int status = with_font(path, use_font);
        crashed += status != 0 && status != 1;
        cut += length < bytes && status == 1;
    }
    CHECK(!crashed && !cut, "of 40 damaged fonts %d end the program, %d that lack their end are used", crashed, cut);
    free(font);
    free(path);
}

int main(void) {
    char folder[] = "/tmp/picture_XXXXXX";
    program_name("test_picture");
    dir = mkdtemp(folder);
    if (!dir) die("no folder for the pictures");
    CHECK(with_font("", all_fail) == 0, "all of this with the letters of stb_easy_font");
    test_damaged_fonts();
    test_all();
    char *clean = xasprintf("rm -rf '%s'", dir);
    if (system(clean)) printf("%s is left\n", dir);
    free(clean);
    return test_summary("picture");
}
