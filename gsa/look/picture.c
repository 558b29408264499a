#include "picture.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-function"
#include <stb/stb_easy_font.h>
#define STB_TRUETYPE_IMPLEMENTATION
#define STBTT_STATIC
#include <stb/stb_truetype.h>
#pragma GCC diagnostic pop
#define STB_IMAGE_WRITE_IMPLEMENTATION
#define STBI_WRITE_NO_STDIO
#include <stb/stb_image_write.h>

/* ---------------------------------------------------------------------- canvas */

const Colour ink = {34, 34, 34}, grey = {112, 112, 112}, pale = {222, 222, 222}, paper = {255, 255, 255};

Canvas *canvas_create(int width, int height) {
    enum { MOST = 32768 };
    if (width < 1 || height < 1 || width > MOST || height > MOST)
        die("a picture of %d x %d pixels cannot be drawn: each side may have 1 to %d", width, height, MOST);
    Canvas *c = (Canvas *)xmalloc(sizeof *c);
    c->width = width;
    c->height = height;
    c->rgb = (uint8_t *)xmalloc((size_t)width * (size_t)height * 3);
    memset(c->rgb, 255, (size_t)width * (size_t)height * 3);
    canvas_unclip(c);
    return c;
}

void canvas_free(Canvas *c) {
    free(c->rgb);
    free(c);
}

void canvas_clip(Canvas *c, double left, double top, double right, double bottom) {
    c->clip[0] = left;
    c->clip[1] = top;
    c->clip[2] = right;
    c->clip[3] = bottom;
}
void canvas_unclip(Canvas *c) { canvas_clip(c, 0, 0, c->width, c->height); }

typedef struct {
    uint8_t *bytes;
    size_t count;
} Bytes;

static void take_bytes(void *context, void *data, int size) {
    Bytes *b = (Bytes *)context;
    b->bytes = (uint8_t *)xrealloc(b->bytes, b->count + (size_t)size);
    memcpy(b->bytes + b->count, data, (size_t)size);
    b->count += (size_t)size;
}

uint8_t *canvas_png(const Canvas *c, size_t *bytes) {
    Bytes b = {NULL, 0};
    if (!stbi_write_png_to_func(take_bytes, &b, c->width, c->height, 3, c->rgb, c->width * 3) || !b.count)
        die("out of memory for a picture of %d x %d pixels", c->width, c->height);
    *bytes = b.count;
    return b.bytes;
}

void canvas_write(const Canvas *c, const char *path) {
    size_t bytes;
    uint8_t *png = canvas_png(c, &bytes);
    FILE *f = create_file(path);
    xfwrite(png, 1, bytes, f, path);
    commit_file(f, path);
    free(png);
}

/* ---- colours */

/* sRGB of the colour of lightness L (0 to 100), chroma C and hue h (degrees) in CIE LCh(ab), D65; what no screen can
   show is clamped. */
static Colour colour_lch(double L, double C, double h) {
    double a = C * cos(h / 57.29577951308232), b = C * sin(h / 57.29577951308232), f[3], xyz[3];
    static const double white[3] = {0.95047, 1, 1.08883};
    f[1] = (L + 16) / 116;
    f[0] = f[1] + a / 500;
    f[2] = f[1] - b / 200;
    for (int i = 0; i < 3; i++)
        xyz[i] = white[i] * (f[i] > 6.0 / 29 ? f[i] * f[i] * f[i] : (f[i] - 4.0 / 29) * 3 * 36 / 841);
    static const double matrix[3][3] = {
        {3.2404542, -1.5371385, -0.4985314}, {-0.9692660, 1.8760108, 0.0415560}, {0.0556434, -0.2040259, 1.0572252}};
    uint8_t rgb[3];
    for (int i = 0; i < 3; i++) {
        double x = matrix[i][0] * xyz[0] + matrix[i][1] * xyz[1] + matrix[i][2] * xyz[2];
        x = x <= 0.0031308 ? 12.92 * x : 1.055 * pow(x, 1 / 2.4) - 0.055;
        rgb[i] = (uint8_t)(255 * fmin(fmax(x, 0), 1) + 0.5);
    }
    Colour c = {rgb[0], rgb[1], rgb[2]};
    return c;
}

Colour colour_scale(double v) {
    if (!(v == v)) return (Colour){190, 190, 190};
    v = fmin(fmax(v, 0), 1);
    return colour_lch(100 - 82 * v, 30 * sin(3.141592653589793 * v) + 18 * v, 110 + 170 * v);
}

Colour colour_of(int i) {
    static const Colour colours[7] = {{0, 114, 178}, {213, 94, 0},   {0, 158, 115}, {204, 121, 167},
                                      {230, 159, 0}, {86, 180, 233}, {240, 228, 66}};
    return colours[(i % 7 + 7) % 7];
}

Colour colour_on(Colour c) { return 0.299 * c.r + 0.587 * c.g + 0.114 * c.b > 140 ? ink : paper; }

/* ---- shapes: each pixel is mixed by the share of it that is covered */

static void mix(Canvas *c, int x, int y, Colour colour, double share) {
    uint8_t *p = c->rgb + ((size_t)y * (size_t)c->width + (size_t)x) * 3;
    p[0] = (uint8_t)(p[0] + (colour.r - p[0]) * share + 0.5);
    p[1] = (uint8_t)(p[1] + (colour.g - p[1]) * share + 0.5);
    p[2] = (uint8_t)(p[2] + (colour.b - p[2]) * share + 0.5);
}

/* The pixels that [left, right) x [top, bottom) touches, within the clip: {x0, y0, x1, y1}, ends not included. */
static bool pixels(const Canvas *c, double left, double top, double right, double bottom, int box[4]) {
    if (!isfinite(left + top + right + bottom)) return false;
    left = fmax(fmax(left, c->clip[0]), 0);
    top = fmax(fmax(top, c->clip[1]), 0);
    right = fmin(fmin(right, c->clip[2]), c->width);
    bottom = fmin(fmin(bottom, c->clip[3]), c->height);
    if (left >= right || top >= bottom) return false;
    box[0] = (int)floor(left);
    box[1] = (int)floor(top);
    box[2] = (int)ceil(right);
    box[3] = (int)ceil(bottom);
    return true;
}

void draw_rectangle(Canvas *c, double x, double y, double width, double height, Colour colour, double opacity) {
    int box[4];
    double right = fmin(x + width, c->clip[2]), bottom = fmin(y + height, c->clip[3]);
    x = fmax(x, c->clip[0]);
    y = fmax(y, c->clip[1]);
    if (!pixels(c, x, y, right, bottom, box)) return;
    for (int j = box[1]; j < box[3]; j++)
        for (int i = box[0]; i < box[2]; i++)
            mix(c, i, j, colour, opacity * (fmin(right, i + 1) - fmax(x, i)) * (fmin(bottom, j + 1) - fmax(y, j)));
}

void draw_frame(Canvas *c, double x, double y, double width, double height, double line, Colour colour) {
    draw_rectangle(c, x, y, width, line, colour, 1);
    draw_rectangle(c, x, y + height - line, width, line, colour, 1);
    draw_rectangle(c, x, y + line, line, height - 2 * line, colour, 1);
    draw_rectangle(c, x + width - line, y + line, line, height - 2 * line, colour, 1);
}

/* of a pixel whose middle is that far outside */
static double covered(double distance) { return distance < -0.5 ? 1 : distance > 0.5 ? 0 : 0.5 - distance; }

void draw_line(Canvas *c, double x0, double y0, double x1, double y1, double width, Colour colour, double opacity) {
    int box[4];
    double r = width / 2, dx = x1 - x0, dy = y1 - y0, square = dx * dx + dy * dy;
    if (!pixels(c, fmin(x0, x1) - r - 1, fmin(y0, y1) - r - 1, fmax(x0, x1) + r + 1, fmax(y0, y1) + r + 1, box)) return;
    for (int j = box[1]; j < box[3]; j++)
        for (int i = box[0]; i < box[2]; i++) {
            double x = i + 0.5 - x0, y = j + 0.5 - y0,
                   along = square > 0 ? fmin(fmax((x * dx + y * dy) / square, 0), 1) : 0;
            double share = covered(hypot(x - along * dx, y - along * dy) - r);
            if (share > 0) mix(c, i, j, colour, opacity * share);
        }
}

void draw_ellipse(Canvas *c, double x, double y, double a, double b, double angle, double line, Colour colour,
                  double opacity) {
    int box[4];
    double cosine = cos(angle), sine = sin(angle), r = line / 2;
    double wide = hypot(a * cosine, b * sine) + r + 1, high = hypot(a * sine, b * cosine) + r + 1;
    if (!(a > 0 && b > 0) || !pixels(c, x - wide, y - high, x + wide, y + high, box)) return;
    for (int j = box[1]; j < box[3]; j++)
        /* the distance to the outline, by the gradient of f = |(u / a, v / b)|, near it exact enough */
        for (int i = box[0]; i < box[2]; i++) {
            double px = i + 0.5 - x, py = j + 0.5 - y, u = (px * cosine + py * sine) / a,
                   v = (py * cosine - px * sine) / b, f = hypot(u, v);
            double distance = f > 1e-9 ? (f - 1) * f / hypot(u / a, v / b) : -fmin(a, b);
            double share = covered(line > 0 ? fabs(distance) - r : distance);
            if (share > 0) mix(c, i, j, colour, opacity * share);
        }
}

/* ---- fonts: one of the system's where there is one, else the letters of stb_easy_font */

/* The first of these that is found and whole is used. */
static const char *const font_names[] = {"DejaVuSans.ttf", "LiberationSans-Regular.ttf", "NotoSans-Regular.ttf"};
/* Where systems keep fonts; ~ is the user's home. They lie in these folders or up to two levels below. */
static const char *const font_folders[] = {"/usr/share/fonts", "/usr/local/share/fonts", "~/.local/share/fonts",
                                           "~/.fonts", "/Library/Fonts"};

typedef struct {
    unsigned char *file; /* NULL: no such font */
    stbtt_fontinfo info;
    int top, bottom; /* of its letters, from a ring on an A to the foot of a g, in the font's units */
} Font;

static uint32_t big_endian(const unsigned char *p) {
    return (uint32_t)p[0] << 24 | (uint32_t)p[1] << 16 | (uint32_t)p[2] << 8 | p[3];
}

/* Whether a TrueType file is whole. stb_truetype believes every offset that it reads, so nothing damaged may reach it:
   each table must lie in the file and have the checksum that the file's head says. */
static bool font_is_whole(const unsigned char *file, size_t bytes) {
    if (bytes < 12 || big_endian(file) != 0x00010000) return false;
    size_t tables = (size_t)file[4] << 8 | file[5];
    if (!tables || bytes < 12 + 16 * tables) return false;
    for (size_t i = 0; i < tables; i++) { /* a row: name, checksum, offset, length */
        const unsigned char *row = file + 12 + 16 * i;
        size_t offset = big_endian(row + 8), length = big_endian(row + 12);
        uint32_t sum = 0;
        if (offset > bytes || length > bytes - offset) return false;
        for (size_t k = 0; k < length; k++) sum += (uint32_t)file[offset + k] << (24 - 8 * (k % 4));
        /* the head's own third word is the sum of the file and not counted */
        if (memcmp(row, "head", 4) == 0 && length >= 12) sum -= big_endian(file + offset + 8);
        if (sum != big_endian(row + 4)) return false;
    }
    return true;
}

static Font font_open(const char *path) {
    enum { MOST = 32 << 20 };
    Font f = {0}, none = {0};
    struct stat about;
    size_t bytes;
    if (stat(path, &about) != 0 || !S_ISREG(about.st_mode) || about.st_size > MOST) return none;
    FILE *readable = fopen(path, "rb");
    if (!readable) return none;
    fclose(readable);
    f.file = (unsigned char *)read_file(path, &bytes);
    int unused;
    if (font_is_whole(f.file, bytes) && stbtt_InitFont(&f.info, f.file, 0) &&
        stbtt_GetCodepointBox(&f.info, 0xC5, &unused, &unused, &unused, &f.top) &&
        stbtt_GetCodepointBox(&f.info, 'g', &unused, &f.bottom, &unused, &unused) && f.bottom < f.top)
        return f;
    free(f.file);
    return none;
}

/* The system's font, looked for once. */
static Font find_font(void) {
    const char *given = getenv("GSA_FONT"), *home = getenv("HOME");
    Font f = {0};
    if (given) {
        if (*given) f = font_open(given);
        if (*given && !f.file) warn("GSA_FONT: %s is not a TrueType font that is whole; plain letters are used", given);
        return f;
    }
    for (size_t n = 0; n < sizeof font_names / sizeof *font_names; n++)
        for (size_t i = 0; i < sizeof font_folders / sizeof *font_folders; i++)
            for (int below = 0; below < 3; below++) {
                const char *folder = font_folders[i];
                bool of_user = folder[0] == '~';
                int count;
                if (of_user && !home) continue;
                char *pattern = xasprintf("%s%s/%s%s", of_user ? home : "", folder + of_user,
                                          below == 2   ? "*/*/"
                                          : below == 1 ? "*/"
                                                       : "",
                                          font_names[n]);
                char **files = glob_files(pattern, &count);
                for (int k = 0; k < count && !f.file; k++) f = font_open(files[k]);
                free_files(files, count);
                free(pattern);
                if (f.file) return f;
            }
    return f;
}

static const Font *system_font(void) { /* NULL: there is none */
    static Font font;
    static bool looked_for;
    if (!looked_for) font = find_font();
    looked_for = true;
    return font.file ? &font : NULL;
}

bool text_has_font(void) { return system_font() != NULL; }

/* Pixels of one of the font's units. Lines 10 pixels a size apart do not touch. */
static double font_scale(const Font *f, double size) { return (9 * size + 2) / (f->top - f->bottom); }

/* The glyph of a character, or of '?' where the font has none. */
static int font_glyph(const Font *f, uint32_t character) {
    int glyph = stbtt_FindGlyphIndex(&f->info, (int)character);
    return glyph ? glyph : stbtt_FindGlyphIndex(&f->info, '?');
}

/* The letter of stb_easy_font for a character; 1: the dot. */
static int plain_letter(uint32_t character) {
    switch (character) {
    case 0xB7: return 1;
    case 0xD7: return 'x';
    case 0x2018:
    case 0x2019: return '\'';
    case 0x201C:
    case 0x201D: return '"';
    case 0x2013:
    case 0x2014: return '-';
    }
    return character >= 32 && character < 127 ? (int)character : '?';
}

/* ---- text */

/* The next character of UTF-8, *text moved behind it; '?' for bytes that are none. */
static uint32_t next_character(const char **text) {
    const unsigned char *s = (const unsigned char *)*text;
    size_t n = 1, length = s[0] >= 0xF0 ? 4 : s[0] >= 0xE0 ? 3 : s[0] >= 0xC0 ? 2 : 1;
    uint32_t code = length == 1 ? s[0] : s[0] & (0x7Fu >> length);
    while (n < length && (s[n] & 0xC0) == 0x80) code = code << 6 | (s[n++] & 0x3F);
    *text += n;
    return n < length || (length == 1 && code > 127) ? '?' : code;
}

static double character_width(uint32_t character, double size) {
    const Font *f = system_font();
    int letter = plain_letter(character), advance, unused;
    if (!f) return size * (letter == 1 ? 4 : stb_easy_font_charinfo[letter - 32].advance & 15);
    stbtt_GetGlyphHMetrics(&f->info, font_glyph(f, character), &advance, &unused);
    return font_scale(f, size) * advance;
}

double text_width(const char *text, double size) {
    double width = 0;
    while (*text) width += character_width(next_character(&text), size);
    return ceil(width); /* whole pixels: what is laid out by it lies on the grid */
}

/* One letter of stb_easy_font, made of rectangles, `at` pixels along from (x, y). */
static void draw_plain(Canvas *c, double x, double y, double at, int letter, double size, Colour colour, bool up) {
    struct { /* a vertex as the font writes it */
        float x, y, z;
        uint8_t colour[4];
    } quads[64][4];
    char one[2] = {(char)letter, 0};
    int count = letter == 1 ? 1 : stb_easy_font_print(0, 0, one, NULL, quads, sizeof quads);
    for (int q = 0; q < count; q++) {
        double left = at + size * (letter == 1 ? 1 : quads[q][0].x), top = size * (letter == 1 ? 4 : quads[q][0].y);
        double width = size * (letter == 1 ? 1 : quads[q][2].x - quads[q][0].x),
               height = size * (letter == 1 ? 1 : quads[q][2].y - quads[q][0].y);
        if (up) draw_rectangle(c, x + top, y - left - width, height, width, colour, 1);
        else draw_rectangle(c, x + left, y + top, width, height, colour, 1);
    }
}

/* One glyph of a font, `at` pixels along from the whole pixel (x, y), each pixel by the share of it that the glyph
   covers. The line of its feet lies on whole pixels, so that all texts look alike; along the line it stands where it
   should, to a quarter of a pixel. */
static void draw_glyph(Canvas *c, double x, double y, double at, const Font *f, int glyph, double size, Colour colour,
                       bool up) {
    float scale = (float)font_scale(f, size), part = (float)(floor(4 * (at - floor(at))) / 4);
    int width, height, left, top, foot = (int)round(7.5 * size);
    unsigned char *share =
        stbtt_GetGlyphBitmapSubpixel(&f->info, scale, scale, part, 0, glyph, &width, &height, &left, &top);
    for (int j = 0; j < height && share; j++)
        for (int i = 0; i < width; i++) {
            int box[4];
            double along = floor(at) + left + i, across = foot + top + j, px = up ? x + across : x + along,
                   py = up ? y - 1 - along : y + across;
            if (share[j * width + i] && pixels(c, px, py, px + 1, py + 1, box))
                mix(c, box[0], box[1], colour, share[j * width + i] / 255.0);
        }
    stbtt_FreeBitmap(share, NULL);
}

static void draw_letters(Canvas *c, double x, double y, const char *text, double size, int anchor, Colour colour,
                         bool up) {
    const Font *f = system_font();
    double at = anchor == TEXT_START ? 0 : -text_width(text, size) / (anchor == TEXT_MIDDLE ? 2 : 1);
    at = round(at);
    while (*text) {
        uint32_t character = next_character(&text);
        if (f) draw_glyph(c, round(x), round(y), at, f, font_glyph(f, character), size, colour, up);
        else draw_plain(c, x, y, at, plain_letter(character), size, colour, up);
        at += character_width(character, size);
    }
}

void draw_text(Canvas *c, double x, double y, const char *text, double size, int anchor, Colour colour) {
    draw_letters(c, x, y, text, size, anchor, colour, false);
}
void draw_text_up(Canvas *c, double x, double y, const char *text, double size, int anchor, Colour colour) {
    draw_letters(c, x, y, text, size, anchor, colour, true);
}

/* As much of the text as fits, two dots at the end where it was cut. */
static char *fitting(const char *text, double size, double width) {
    if (text_width(text, size) <= width) return xstrdup(text);
    const char *end = text;
    double used = text_width("..", size);
    while (*end) {
        const char *next = end;
        used += character_width(next_character(&next), size);
        if (used > width) break;
        end = next;
    }
    return xasprintf("%.*s..", (int)(end - text), text);
}

/* ---------------------------------------------------------------------- diagrams */

int nice_ticks(double low, double high, int most, double *ticks, double *step) {
    *step = 0;
    if (!(low < high) || !isfinite(high - low) || most < 1) return 0;
    double power = pow(10, floor(log10((high - low) / most)) - 1);
    static const double factors[3] = {1, 2, 5};
    for (int i = 0; i < 12; i++) {
        double s = power * pow(10, i / 3) * factors[i % 3], first = ceil(low / s - 1e-9), last = floor(high / s + 1e-9);
        if (!(last - first + 1 <= most)) continue;
        /* counted as whole numbers: far from 0 adding 1 to a double may change nothing */
        int count = 1 + (int)(last - first);
        for (int k = 0; k < count; k++) ticks[k] = (first + k) * s;
        *step = s;
        return count;
    }
    return 0;
}

void number_text(double value, double step, char *out, size_t room) {
    const char *unit = "";
    if (step >= 1e3 && value != 0) {
        double size = step >= 1e9 ? 1e9 : step >= 1e6 ? 1e6 : 1e3;
        unit = step >= 1e9 ? "G" : step >= 1e6 ? "M" : "k";
        value /= size;
        step /= size;
    }
    int decimals = step > 0 ? (int)fmax(0, ceil(-log10(step) - 1e-9)) : 3;
    if (decimals > 6 || fabs(value) >= 1e7) snprintf(out, room, "%.3g%s", value, unit);
    else snprintf(out, room, "%.*f%s", decimals, fabs(value) < step * 1e-6 ? 0.0 : value, unit);
}

double plot_x(const Plot *p, double x) { return p->left + (x - p->x0) / (p->x1 - p->x0) * (p->right - p->left); }
double plot_y(const Plot *p, double y) { return p->bottom - (y - p->y0) / (p->y1 - p->y0) * (p->bottom - p->top); }

enum { MARGIN = 24, TITLE = 3, TEXT = 2, LINE = 24 }; /* around a picture; sizes of text; from line to line of TEXT */

static void draw_title(Canvas *c, const char *title) {
    double size = TITLE, room = c->width - 2 * MARGIN;
    if (text_width(title, size) > room) size = TEXT; /* a long one is smaller before it is cut */
    char *text = fitting(title, size, room);
    draw_text(c, MARGIN, MARGIN + (TITLE - size) * 4, text, size, TEXT_START, ink);
    free(text);
}

/* The range of a scale, widened by a little, and never empty. */
static void widen(double *low, double *high, double share) {
    double room = *high > *low ? (*high - *low) * share : fabs(*low) > 0 ? fabs(*low) * 0.1 : 1;
    *low -= room;
    *high += room;
}

Plot plot_open(int width, int height, const char *title, const char *x_label, const char *y_label, double x0, double x1,
               double y0, double y1, double names, double legend, bool equal, bool doubling) {
    Plot p = {
        canvas_create(width, height), 0, MARGIN + 48, width - MARGIN - legend, height - MARGIN - 76, x0, x1, y0, y1};
    if (!(x0 < x1)) widen(&p.x0, &p.x1, 0);
    if (!(y0 < y1)) widen(&p.y0, &p.y1, 0);
    Canvas *c = p.canvas;
    double ticks[16], step, widest = equal ? 72 : 0;
    char text[64];
    int count = names > 0 ? 0 : nice_ticks(p.y0, p.y1, 8, ticks, &step);
    for (int i = 0; i < count; i++) {
        number_text(ticks[i], step, text, sizeof text);
        widest = fmax(widest, text_width(text, TEXT));
    }
    p.left = MARGIN + (*y_label ? 36 : 0) + fmax(widest, names) + 12;
    if (equal) {
        double wide = p.right - p.left, tall = p.bottom - p.top,
               unit = fmax((p.x1 - p.x0) / wide, (p.y1 - p.y0) / tall), x = (p.x0 + p.x1) / 2, y = (p.y0 + p.y1) / 2;
        p.x0 = x - unit * wide / 2;
        p.x1 = x + unit * wide / 2;
        p.y0 = y - unit * tall / 2;
        p.y1 = y + unit * tall / 2;
        count = nice_ticks(p.y0, p.y1, 8, ticks, &step);
    }
    draw_title(c, title);
    for (int i = 0; i < count; i++) {
        number_text(ticks[i], step, text, sizeof text);
        double y = round(plot_y(&p, ticks[i]));
        draw_rectangle(c, p.left, y - 1, p.right - p.left, 2, pale, 1);
        draw_text(c, p.left - 10, y - 8, text, TEXT, TEXT_END, ink);
    }
    count = nice_ticks(p.x0, p.x1, (int)fmin(10, (p.right - p.left) / 110), ticks, &step);
    for (int i = 0; i < count; i++) {
        if (doubling && ticks[i] != floor(ticks[i])) continue;
        number_text(doubling ? exp2(ticks[i]) : ticks[i], doubling ? fmin(exp2(ticks[i]), 1) : step, text, sizeof text);
        double x = round(plot_x(&p, ticks[i]));
        draw_rectangle(c, x - 1, p.top, 2, p.bottom - p.top, pale, 1);
        draw_text(c, x, p.bottom + 12, text, TEXT, TEXT_MIDDLE, ink);
    }
    draw_frame(c, p.left - 2, p.top - 2, p.right - p.left + 4, p.bottom - p.top + 4, 2, grey);
    draw_text(c, (p.left + p.right) / 2, p.bottom + 48, x_label, TEXT, TEXT_MIDDLE, ink);
    draw_text_up(c, MARGIN, (p.top + p.bottom) / 2, y_label, TEXT, TEXT_MIDDLE, ink);
    canvas_clip(c, p.left, p.top, p.right, p.bottom);
    return p;
}

/* Places in the colour scale: of shares from 0 to 1 the square root, since most are small; of ratios from 0 to
   infinity, 1 in the middle. */
static double place_share(double share) { return sqrt(share); }
static double place_ratio(double ratio) { return ratio / (1 + ratio); }

/* The colour scale, standing, with ticks at values whose places in it are given. */
static void draw_scale(Canvas *c, double x, double y, double height, const char *label, double (*place)(double)) {
    static const double shares[] = {0, 0.01, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1},
                        ratios[] = {0, 0.1, 0.2, 0.5, 1, 2, 5, 10};
    const double *ticks = place == place_share ? shares : ratios;
    const size_t count = place == place_share ? sizeof shares / sizeof *shares : sizeof ratios / sizeof *ratios;
    for (int i = 0; i < height; i++) draw_rectangle(c, x, y + i, 28, 1, colour_scale(1 - (i + 0.5) / height), 1);
    draw_frame(c, x - 2, y - 2, 32, height + 4, 2, grey);
    for (size_t i = 0; i < count; i++) {
        char text[16];
        double at = y + height * (1 - place(ticks[i]));
        snprintf(text, sizeof text, "%g", ticks[i]);
        draw_rectangle(c, x + 30, at - 1, 8, 2, grey, 1);
        draw_text(c, x + 44, at - 8, text, TEXT, TEXT_START, ink);
    }
    draw_text_up(c, x + 104, y + height / 2, label, TEXT, TEXT_MIDDLE, ink);
}
enum { SCALE_WIDTH = 130 };

/* ---------------------------------------------------------------------- pictures */

enum { LONGEST = 120 }; /* of a token's label, in pixels */

static double longest_label(const char *const *labels, int T, double size) {
    double longest = 0;
    for (int t = 0; t < T; t++) longest = fmax(longest, text_width(labels[t], size));
    return fmin(longest, LONGEST);
}

static void draw_label(Canvas *c, double x, double y, const char *label, double size, bool up) {
    char *text = fitting(label, size, LONGEST);
    if (up) draw_text_up(c, x, y, text, size, TEXT_START, ink);
    else draw_text(c, x, y, text, size, TEXT_END, ink);
    free(text);
}

Canvas *picture_attention(const char *title, const float *weights, const char *const *labels, int T) {
    int cell = T <= 96 ? 20 : 12; /* large enough for a line of text of its size */
    double size = cell == 20 ? 2 : 1, room = longest_label(labels, T, size), scale = fmin(fmax(T * cell, 160), 480);
    int left = MARGIN + 30 + (int)room + 8, top = MARGIN + 48 + 26 + (int)room + 8, side = T * cell;
    Canvas *c =
        canvas_create((int)fmax(left + side + MARGIN + 24 + SCALE_WIDTH, 560), top + (int)fmax(side, 200) + MARGIN);
    draw_title(c, title);
    for (int t = 0; t < T; t++) {
        draw_label(c, left - 8, top + t * cell + (cell - 7 * size) / 2 - 1, labels[t], size, false);
        draw_label(c, left + t * cell + (cell - 7 * size) / 2 - 1, top - 8, labels[t], size, true);
    }
    for (int i = 0; i < T; i++)
        for (int j = 0; j < T; j++)
            draw_rectangle(c, left + j * cell, top + i * cell, cell, cell, colour_scale(sqrt(weights[i * T + j])), 1);
    draw_frame(c, left - 2, top - 2, side + 4, side + 4, 2, grey);
    draw_text(c, left, MARGIN + 44, "key: is attended to", TEXT, TEXT_START, grey);
    draw_text_up(c, MARGIN, top + side, "query", TEXT, TEXT_START, grey);
    draw_scale(c, c->width - MARGIN - SCALE_WIDTH, top, scale, "weight", place_share);
    return c;
}

Canvas *picture_heads(const char *title, const float *weights, const int *kind, const char *const *kinds,
                      int number_of_kinds, int L, int NH, int T, HeadGrid *grid) {
    int cell = NH <= 4 ? 240 : NH <= 8 ? 160 : NH <= 16 ? 104 : 56, pitch = cell + 16;
    int left = MARGIN + 130, top = MARGIN + 48 + LINE + 12, legend_row = 0;
    double legend = 0;
    for (int k = 0; k < number_of_kinds; k++) legend += 40 + text_width(kinds[k], TEXT) + 30;
    int width = (int)fmax(fmax(left + NH * pitch + MARGIN, MARGIN * 2 + legend), 560);
    Canvas *c = canvas_create(width, top + L * pitch + LINE + 2 * MARGIN);
    draw_title(c, title);
    for (int h = 0; h < NH; h++) {
        char text[32];
        snprintf(text, sizeof text, cell < 80 || h ? "%d" : "head %d", h);
        draw_text(c, left + h * pitch + cell / 2, top - LINE, text, TEXT, TEXT_MIDDLE, ink);
    }
    for (int l = 0; l < L; l++) {
        char text[32];
        snprintf(text, sizeof text, "layer %d", l);
        draw_text(c, left - 16, top + l * pitch + cell / 2 - 8, text, TEXT, TEXT_END, ink);
        for (int h = 0; h < NH; h++) {
            int x = left + h * pitch, y = top + l * pitch;
            const float *w = weights + (size_t)(l * NH + h) * (size_t)T * (size_t)T;
            for (int i = 0; i < cell; i++)
                for (int j = 0; j < cell; j++) { /* the largest weight in a pixel, so that thin lines stay */
                    float most = 0;
                    for (int a = i * T / cell; a <= ((i + 1) * T - 1) / cell && a < T; a++)
                        for (int b = j * T / cell; b <= ((j + 1) * T - 1) / cell && b < T; b++)
                            most = w[a * T + b] > most ? w[a * T + b] : most;
                    draw_rectangle(c, x + j, y + i, 1, 1, colour_scale(sqrt(most)), 1);
                }
            draw_frame(c, x - 4, y - 4, cell + 8, cell + 8, 4, colour_of(kind[l * NH + h]));
        }
    }
    double at = MARGIN;
    legend_row = top + L * pitch + MARGIN;
    for (int k = 0; k < number_of_kinds; k++) {
        draw_rectangle(c, at, legend_row, 28, 16, colour_of(k), 1);
        draw_text(c, at + 38, legend_row, kinds[k], TEXT, TEXT_START, ink);
        at += 40 + text_width(kinds[k], TEXT) + 30;
    }
    grid->left = left;
    grid->top = top;
    grid->pitch = pitch;
    grid->cell = cell;
    return c;
}

void principal_plane(const float *keys, int T, int d, float *mean, float *components, double share[2]) {
    double *m = (double *)xcalloc((size_t)d + (size_t)d * (size_t)d + 2 * (size_t)d, sizeof(double)),
           *covariance = m + d, *v = covariance + (size_t)d * d, *next = v + d, total = 0;
    for (int t = 0; t < T; t++)
        for (int k = 0; k < d; k++) m[k] += keys[t * d + k] / (double)T;
    for (int t = 0; t < T; t++)
        for (int a = 0; a < d; a++)
            for (int b = 0; b < d; b++)
                covariance[a * d + b] += (keys[t * d + a] - m[a]) * (keys[t * d + b] - m[b]) / T;
    double size = 0;
    for (int k = 0; k < d; k++) {
        total += covariance[k * d + k];
        size += m[k] * m[k];
        mean[k] = (float)m[k];
    }
    if (total <= 1e-13 * size) total = 0; /* rounding only */
    /* the leading direction by repeated multiplication; the second at right angles to the first */
    for (int component = 0; component < 2; component++) {
        double value = 0;
        uint64_t rng = 1 + (uint64_t)component;
        for (int k = 0; k < d; k++) v[k] = rng_normal(&rng);
        for (int step = 0; step < 500; step++) {
            double along = 0, square = 0;
            for (int k = 0; k < d && component; k++) along += v[k] * components[k];
            for (int k = 0; k < d; k++) {
                if (component) v[k] -= along * components[k];
                square += v[k] * v[k];
            }
            for (int k = 0; k < d; k++) {
                v[k] /= sqrt(square);
                components[component * d + k] = (float)v[k];
            }
            value = 0;
            for (int a = 0; a < d; a++) {
                next[a] = 0;
                for (int b = 0; b < d; b++) next[a] += covariance[a * d + b] * v[b];
                value += next[a] * v[a];
            }
            if (!(value > 1e-12 * total)) break; /* nothing is left in this direction, and any will do */
            memcpy(v, next, (size_t)d * sizeof(double));
        }
        share[component] = total > 0 ? value / total : 0;
    }
    free(m);
}

void plane_ellipse(double xx, double xy, double yy, PlaneSplat *s) {
    double middle = (xx + yy) / 2, apart = hypot((xx - yy) / 2, xy);
    s->a = (float)sqrt(fmax(middle + apart, 0));
    s->b = (float)sqrt(fmax(middle - apart, 0));
    s->angle = (float)(0.5 * atan2(2 * xy, xx - yy));
}

/* Half the side of the square that marks a splat's centre; its area tells its amplitude. */
static double centre_size(const PlaneSplat *splat) { return 5 + 9 * sqrt(splat->amplitude); }

/* Of many the lines are faint: they cross each other and the keys. */
static void draw_splats(const Plot *p, const PlaneSplat *splats, int S) {
    double scale = (p->right - p->left) / (p->x1 - p->x0), strength = S > 8 ? 8.0 / S : 1;
    for (int s = 0; s < S; s++) {
        const PlaneSplat *e = &splats[s];
        double x = plot_x(p, e->x), y = plot_y(p, e->y), a = e->a * scale, b = e->b * scale;
        draw_ellipse(p->canvas, x, y, a, b, -e->angle, 0, colour_of(e->slot), 0.5 / (4 + S));
        draw_ellipse(p->canvas, x, y, a, b, -e->angle, 2.5, colour_of(e->slot),
                     strength * (0.25 + 0.65 * e->amplitude));
    }
}

static void draw_keys(const Plot *p, const PlaneSplat *splats, const float *points, const int *owner, int T) {
    for (int t = 0; t < T; t++) {
        double x = plot_x(p, points[2 * t]), y = plot_y(p, points[2 * t + 1]);
        draw_ellipse(p->canvas, x, y, 7, 7, 0, 0, paper, 1);
        draw_ellipse(p->canvas, x, y, 6, 6, 0, 0, owner[t] < 0 ? grey : colour_of(splats[owner[t]].slot), 1);
    }
}

static void draw_centres(const Plot *p, const PlaneSplat *splats, int S) {
    for (int s = 0; s < S; s++) {
        Colour colour = colour_of(splats[s].slot);
        double r = centre_size(&splats[s]), x = plot_x(p, splats[s].x), y = plot_y(p, splats[s].y);
        char text[16];
        snprintf(text, sizeof text, "%d", splats[s].slot);
        draw_rectangle(p->canvas, x - r - 2, y - r - 2, 2 * r + 4, 2 * r + 4, paper, 1);
        draw_rectangle(p->canvas, x - r, y - r, 2 * r, 2 * r, colour, 1);
        double size = text_width(text, 2) < 2 * r ? 2 : 1;
        draw_text(p->canvas, x, y - 4 * size + 1, text, size, TEXT_MIDDLE, colour_on(colour));
    }
}

/* Names of tokens, where there is room for them: no name covers a centre, a key or another name. */
static void draw_names(const Plot *p, const PlaneSplat *splats, int S, const float *points, const char *const *labels,
                       int T) {
    typedef struct {
        double left, top, right, bottom;
    } Box;
    Box *taken = (Box *)xmalloc((size_t)(2 * T + S + 1) * sizeof *taken);
    int count = 0;
    for (int s = 0; s < S; s++) {
        double r = 2 + centre_size(&splats[s]), x = plot_x(p, splats[s].x), y = plot_y(p, splats[s].y);
        taken[count++] = (Box){x - r, y - r, x + r, y + r};
    }
    for (int t = 0; t < T; t++) {
        double x = plot_x(p, points[2 * t]), y = plot_y(p, points[2 * t + 1]);
        taken[count++] = (Box){x - 6, y - 6, x + 6, y + 6};
    }
    for (int t = 0; t < T; t++) {
        char *text = fitting(labels[t], TEXT, LONGEST);
        double x = plot_x(p, points[2 * t]) + 10, y = plot_y(p, points[2 * t + 1]) - 8;
        Box box = {x, y, x + text_width(text, TEXT), y + 18};
        bool room = box.right < p->right && box.top > p->top && box.bottom < p->bottom;
        for (int i = 0; i < count && room; i++)
            room = box.left >= taken[i].right || box.right <= taken[i].left || box.top >= taken[i].bottom ||
                   box.bottom <= taken[i].top;
        if (room) {
            draw_text(p->canvas, x, y, text, TEXT, TEXT_START, ink);
            taken[count++] = box;
        }
        free(text);
    }
    free(taken);
}

static void draw_splat_legend(Canvas *c, double at, double row, bool splats) {
    draw_ellipse(c, at + 16, row + 8, 7, 7, 0, 0, grey, 1);
    draw_text(c, at + 48, row, "a token's key", TEXT, TEXT_START, ink);
    if (!splats) return;
    draw_text(c, at + 48, row + LINE, "in the colour of the", TEXT, TEXT_START, grey);
    draw_text(c, at + 48, row + 2 * LINE, "splat that has it", TEXT, TEXT_START, grey);
    draw_ellipse(c, at + 16, row + 4.4 * LINE, 16, 10, 0, 3, grey, 1);
    draw_text(c, at + 48, row + 4 * LINE, "a splat at one sigma", TEXT, TEXT_START, ink);
    draw_rectangle(c, at + 4, row + 6 * LINE - 4, 24, 24, grey, 1);
    draw_text(c, at + 48, row + 6 * LINE, "its centre and slot;", TEXT, TEXT_START, ink);
    draw_text(c, at + 48, row + 7 * LINE, "area: its amplitude", TEXT, TEXT_START, grey);
}

Canvas *picture_splats(const char *title, const PlaneSplat *splats, int S, const float *points, const int *owner,
                       const char *const *labels, int T, const double share[2]) {
    double low[2] = {INFINITY, INFINITY}, high[2] = {-INFINITY, -INFINITY};
    for (int t = 0; t < T; t++)
        for (int k = 0; k < 2; k++) { /* not by fmin and fmax: gcc 12 for aarch64 crashes on them here */
            double x = points[2 * t + k];
            low[k] = x < low[k] ? x : low[k];
            high[k] = x > high[k] ? x : high[k];
        }
    for (int s = 0; s < S; s++) { /* centres are always seen, ellipses as far as they fit */
        low[0] = fmin(low[0], splats[s].x);
        high[0] = fmax(high[0], splats[s].x);
        low[1] = fmin(low[1], splats[s].y);
        high[1] = fmax(high[1], splats[s].y);
    }
    enum { WIDTH = 1500, HEIGHT = 1260, KEY = 300 };
    char x_label[96], y_label[96];
    for (int k = 0; k < 2; k++) widen(&low[k], &high[k], 0.08);
    snprintf(x_label, sizeof x_label, "first principal component of the keys%s (%.0f %% of the keys' variance)",
             S ? "' means by splat" : "", 100 * share[0]);
    snprintf(y_label, sizeof y_label, "second (%.0f %%)", 100 * share[1]);
    Plot p = plot_open(WIDTH, HEIGHT, title, x_label, y_label, low[0], high[0], low[1], high[1], 0, KEY, true, false);
    draw_splats(&p, splats, S);
    draw_keys(&p, splats, points, owner, T);
    draw_centres(&p, splats, S);
    draw_names(&p, splats, S, points, labels, T);
    canvas_unclip(p.canvas);
    draw_splat_legend(p.canvas, p.right + 24, p.top, S > 0);
    return p.canvas;
}

Canvas *picture_responsibilities(const char *title, const float *r, const int *slots, int S, const char *const *labels,
                                 int T) {
    int high = T <= 96 ? 20 : 12, wide = S <= 24 ? 36 : 26;
    double size = high >= 18 ? 2 : 1, room = longest_label(labels, T, size);
    int left = MARGIN + (int)room + 12, top = MARGIN + 48 + 2 * LINE;
    Canvas *c = canvas_create((int)fmax(left + S * wide + MARGIN + 24 + SCALE_WIDTH, 720),
                              top + (int)fmax(T * high, 240) + MARGIN);
    draw_title(c, title);
    draw_text(c, left, MARGIN + 44, "splat (slot)", TEXT, TEXT_START, grey);
    for (int s = 0; s < S; s++) {
        char text[16];
        snprintf(text, sizeof text, "%d", slots[s]);
        draw_text(c, left + s * wide + wide / 2, top - LINE, text, wide < 30 && slots[s] > 99 ? 1 : TEXT, TEXT_MIDDLE,
                  ink);
    }
    for (int t = 0; t < T; t++) {
        draw_label(c, left - 8, top + t * high + (high - 7 * size) / 2 - 1, labels[t], size, false);
        for (int s = 0; s < S; s++)
            draw_rectangle(c, left + s * wide, top + t * high, wide, high, colour_scale(sqrt(r[t * S + s])), 1);
    }
    draw_frame(c, left - 2, top - 2, S * wide + 4, T * high + 4, 2, grey);
    draw_scale(c, left + S * wide + 24, top, fmin(fmax(T * high, 160), 480), "responsibility", place_share);
    return c;
}

Canvas *picture_distances(const char *title, const float *adds, const char *const *labels, int S, const size_t *first,
                          int bins) {
    const int high = 24, wide = 52;
    int left = MARGIN + (int)longest_label(labels, S, TEXT) + 12, top = MARGIN + 48 + 2 * LINE;
    Canvas *c =
        canvas_create((int)fmax(left + bins * wide + MARGIN, 720), top + (int)fmax(S * high, 60) + 2 * LINE + MARGIN);
    float most = 0;
    draw_title(c, title);
    draw_text(c, left, MARGIN + 44, "distance in tokens, from", TEXT, TEXT_START, grey);
    for (int i = 0; i < S * bins; i++) most = fmaxf(most, fabsf(adds[i]));
    for (int b = 0; b < bins; b++) {
        char text[24];
        snprintf(text, sizeof text, "%zu", first[b]);
        draw_text(c, left + b * wide + wide / 2, top - LINE, text, TEXT, TEXT_MIDDLE, ink);
    }
    for (int s = 0; s < S; s++) {
        draw_label(c, left - 8, top + s * high + (high - 7 * TEXT) / 2 - 1, labels[s], TEXT, false);
        for (int b = 0; b < bins && most > 0; b++)
            draw_rectangle(c, left + b * wide, top + s * high, wide, high, colour_of(adds[s * bins + b] < 0),
                           sqrt((double)(fabsf(adds[s * bins + b]) / most)));
    }
    draw_frame(c, left - 2, top - 2, bins * wide + 4, S * high + 4, 2, grey);
    char text[64];
    snprintf(text, sizeof text, "the largest: %.3g; blue above 0, orange below", (double)most);
    draw_text(c, left, top + S * high + LINE, text, TEXT, TEXT_START, grey);
    return c;
}

/* The band around a curve, column by column of the canvas, each as high as the band is there. */
static void draw_band(const Plot *p, const Curve *v, bool doubling) {
    for (size_t k = 1; k < v->count; k++) {
        double left = plot_x(p, doubling ? log2(v->x[k - 1]) : v->x[k - 1]),
               right = plot_x(p, doubling ? log2(v->x[k]) : v->x[k]);
        if (!isfinite(v->y[k] + v->y[k - 1] + v->band[k] + v->band[k - 1])) continue;
        for (double x = floor(left); x < floor(right); x++) {
            double share = right > left ? fmin(fmax((x - left) / (right - left), 0), 1) : 0,
                   y = v->y[k - 1] + share * (v->y[k] - v->y[k - 1]),
                   half = v->band[k - 1] + share * (v->band[k] - v->band[k - 1]), top = plot_y(p, y + half);
            draw_rectangle(p->canvas, x, top, 1, plot_y(p, y - half) - top, colour_of(v->colour), 0.2);
        }
    }
}

/* A piece of a curve that is *drawn pixels long before it. There are seven colours: the next seven curves are dashed,
   all others dotted. (One that leads far out of the picture is not cut into dashes.) */
static void draw_piece(Canvas *c, double x0, double y0, double x1, double y1, const Curve *v, double *drawn) {
    double length = hypot(x1 - x0, y1 - y0), dash = v->colour < 14 ? 14 : 1, period = dash + 12;
    double width = v->thin ? 1.5 : 4, opacity = v->thin ? 0.25 : 1;
    bool whole = v->colour < 7 || !(length < 1e5);
    if (whole) draw_line(c, x0, y0, x1, y1, width, colour_of(v->colour), opacity);
    for (double at = 0; !whole && at < length;) {
        double phase = fmod(*drawn + at, period), end = fmin(length, at + (phase < dash ? dash : period) - phase);
        double from = at / length, to = end / length;
        if (phase < dash)
            draw_line(c, x0 + (x1 - x0) * from, y0 + (y1 - y0) * from, x0 + (x1 - x0) * to, y0 + (y1 - y0) * to, width,
                      colour_of(v->colour), opacity);
        at = fmax(end, at + 0.01);
    }
    if (isfinite(length)) *drawn += length;
}

static Canvas *draw_curves(int height, const char *title, const char *x_label, const char *y_label, const Curve *curves,
                           int count, double low, double high, bool doubling) {
    double x0 = INFINITY, x1 = -INFINITY, y0 = INFINITY, y1 = -INFINITY, legend = 0;
    int named = 0;
    for (int i = 0; i < count; i++) {
        if (!curves[i].thin) {
            legend = fmax(legend, text_width(curves[i].name, TEXT));
            named++;
        }
        for (size_t k = 0; k < curves[i].count; k++)
            if (isfinite(curves[i].y[k])) {
                double x = doubling ? log2(curves[i].x[k]) : curves[i].x[k];
                x0 = fmin(x0, x);
                x1 = fmax(x1, x);
                double half = curves[i].band ? curves[i].band[k] : 0;
                y0 = fmin(y0, curves[i].y[k] - half);
                y1 = fmax(y1, curves[i].y[k] + half);
            }
    }
    if (!(x0 <= x1)) {
        x0 = 0;
        x1 = 1;
        y0 = 0;
        y1 = 1;
    }
    if (low < high) {
        y0 = low;
        y1 = high;
    } else widen(&y0, &y1, 0.04);
    x1 += 0.01 * (x1 - x0); /* the last point is seen whole */
    legend = legend > 0 ? legend + 84 : 0;
    Plot p = plot_open((int)(1240 + legend), (int)fmax(height, 200 + (LINE + 6) * named), title, x_label, y_label, x0,
                       x1, y0, y1, 0, legend, false, doubling);
    for (int pass = 0; pass < 2; pass++) /* pale ones below */
        for (int i = 0; i < count; i++) {
            const Curve *v = &curves[i];
            if (v->thin == (pass == 1)) continue;
            if (v->band) draw_band(&p, v, doubling);
            double drawn = 0;
            for (size_t k = 0; k < v->count; k++) {
                double x = plot_x(&p, doubling ? log2(v->x[k]) : v->x[k]), y = plot_y(&p, v->y[k]),
                       before = k ? v->x[k - 1] : NAN;
                if (!isfinite(y)) continue;
                if (k && isfinite(v->y[k - 1]))
                    draw_piece(p.canvas, plot_x(&p, doubling ? log2(before) : before), plot_y(&p, v->y[k - 1]), x, y, v,
                               &drawn);
                if (v->marks) draw_ellipse(p.canvas, x, y, 6, 6, 0, 0, colour_of(v->colour), 1);
            }
        }
    canvas_unclip(p.canvas);
    double row = p.top + 4;
    for (int i = 0; i < count; i++) {
        if (curves[i].thin) continue;
        double drawn = 0;
        draw_piece(p.canvas, p.right + 28, row + 8, p.right + 64, row + 8, &curves[i], &drawn);
        draw_text(p.canvas, p.right + 76, row, curves[i].name, TEXT, TEXT_START, ink);
        row += LINE + 6;
    }
    return p.canvas;
}

Canvas *picture_curves(const char *title, const char *x_label, const char *y_label, const Curve *curves, int count,
                       double low, double high, bool doubling) {
    return draw_curves(800, title, x_label, y_label, curves, count, low, high, doubling);
}

/* A bar's number in text (size bytes); with an error, as many digits as the smallest error of the picture, finest,
   has up to its first. */
static void bar_text(double value, double error, double finest, char *text, size_t size) {
    double scale = fabs(value) >= 1e9 ? 1e9 : fabs(value) >= 1e6 ? 1e6 : fabs(value) >= 1e4 ? 1e3 : 1;
    const char *unit = scale == 1e9 ? "G" : scale == 1e6 ? "M" : scale == 1e3 ? "k" : "";
    int digits = (int)fmin(fmax(ceil(-log10(finest / scale)), 0), 9);
    const char *give_or_take = text_has_font() ? "\xC2\xB1" : "+-";
    if (error > 0)
        snprintf(text, size, "%.*f%s %s %.*f%s", digits, value / scale, unit, give_or_take, digits, error / scale,
                 unit);
    else snprintf(text, size, "%.4g%s", value / scale, unit);
}

Canvas *picture_bars(const char *title, const char *x_label, const char *const *names, const double *values,
                     const double *errors, int count) {
    enum { BAR = 34, PITCH = 50, WIDTH = 1400 };
    double low = INFINITY, high = -INFINITY, finest = INFINITY, room = 0, numbers = 0, step, ticks[16];
    char label[256], text[96];
    for (int i = 0; i < count; i++) {
        double e = errors[i] > 0 ? errors[i] : 0;
        if (e > 0) finest = fmin(finest, e);
        if (isfinite(values[i])) {
            low = fmin(low, values[i] - e);
            high = fmax(high, values[i] + e);
        }
        room = fmax(room, text_width(names[i], TEXT));
    }
    for (int i = 0; i < count; i++) {
        bar_text(values[i], errors[i], finest, text, sizeof text);
        numbers = fmax(numbers, text_width(text, TEXT));
    }
    if (!(low <= high)) {
        low = 0;
        high = 1;
    }
    room = fmin(room, WIDTH / 2);
    numbers = fmin(numbers, WIDTH / 4);
    bool from_zero = low < 0.5 * high || low <= 0;
    double start = from_zero ? fmin(low, 0) : low - fmax(high - low, 1e-3 * high) * 0.6, end = high;
    if (nice_ticks(start, end, 8, ticks, &step) && !from_zero) start = floor(start / step) * step;
    if (end <= start) end = start + 1;
    /* for the numbers behind the bars */
    end += (end - start) * (numbers + 24) / (WIDTH - 3 * MARGIN - room - numbers - 24);
    snprintf(label, sizeof label, "%s", x_label);
    if (!from_zero) {
        number_text(start, step, text, sizeof text);
        snprintf(label, sizeof label, "%s (the axis starts at %s)", x_label, text);
    }
    int height = MARGIN + 48 + count * PITCH + 16 + MARGIN + 76;
    Plot p = plot_open(WIDTH, height, title, label, "", start, end, 0, 1, room, 0, false, false);
    Canvas *c = p.canvas;
    canvas_unclip(c);
    for (int i = 0; i < count; i++) {
        double y = p.top + 16 + i * PITCH, x = plot_x(&p, values[i]), zero = plot_x(&p, fmax(start, 0));
        char *name = fitting(names[i], TEXT, room);
        draw_text(c, p.left - 12, y + BAR / 2 - 8, name, TEXT, TEXT_END, ink);
        free(name);
        if (!isfinite(values[i])) {
            draw_text(c, zero + 10, y + BAR / 2 - 8, "no number", TEXT, TEXT_START, grey);
            continue;
        }
        draw_rectangle(c, fmin(zero, x), y, fabs(x - zero), BAR, colour_of(0), 1);
        bool error = errors[i] > 0;
        double reach = fmax(x, zero);
        if (error) {
            double x0 = plot_x(&p, values[i] - errors[i]), x1 = plot_x(&p, values[i] + errors[i]),
                   middle = y + BAR / 2.0;
            draw_line(c, x0, middle, x1, middle, 3, ink, 1);
            draw_line(c, x0, middle - 9, x0, middle + 9, 3, ink, 1);
            draw_line(c, x1, middle - 9, x1, middle + 9, 3, ink, 1);
            reach = fmax(reach, x1);
        }
        bar_text(values[i], errors[i], finest, text, sizeof text);
        draw_text(c, reach + 12, y + BAR / 2 - 8, text, TEXT, TEXT_START, ink);
    }
    return c;
}

/* ---------------------------------------------------------------------- a training's main.log */

typedef struct {
    double *x, *y;
    size_t count, room;
} Series;

static void series_add(Series *s, double x, double y) {
    while (s->count && s->x[s->count - 1] >= x) s->count--; /* a resumed run writes its last steps again */
    if (s->count == s->room) {
        s->room = 2 * s->room + 256;
        s->x = (double *)xrealloc(s->x, s->room * sizeof *s->x);
        s->y = (double *)xrealloc(s->y, s->room * sizeof *s->y);
    }
    s->x[s->count] = x;
    s->y[s->count++] = y;
}

static void series_free(Series *s) {
    free(s->x);
    free(s->y);
}

/* false: the line was damaged */
static bool is_step(double step) { return step >= 0 && step < 1e15; }

/* Losses by step: "s:N trl:X ..." of training, "s:N tel:X" of validation. False where there are none. */
static bool read_losses(const char *path, Series *training, Series *validation) {
    size_t bytes;
    char *text = read_file(path, &bytes), *next;
    for (char *line = text; *line; line = next) {
        double step, loss;
        char name[8], number[64];
        next = line + strcspn(line, "\n");
        if (*next) *next++ = 0;
        if (sscanf(line, "s:%lf %7[a-z]:%63s", &step, name, number) != 3 || !is_step(step)) continue;
        loss = strtod(number, NULL);
        if (strcmp(name, "trl") == 0) series_add(training, step, loss);
        if (strcmp(name, "tel") == 0) series_add(validation, step, loss);
    }
    free(text);
    return training->count || validation->count;
}

bool log_has_losses(const char *log) {
    Series training = {NULL, NULL, 0, 0}, validation = training;
    bool has = read_losses(log, &training, &validation);
    series_free(&training);
    series_free(&validation);
    return has;
}

/* The average of a series within `steps` to either side of each point. */
static void smooth(Series *out, const Series *in, double steps) {
    double sum = 0;
    size_t from = 0, to = 0, finite = 0;
    for (size_t k = 0; k < in->count; k++) {
        for (; to < in->count && in->x[to] <= in->x[k] + steps; to++)
            if (isfinite(in->y[to])) {
                sum += in->y[to];
                finite++;
            }
        for (; in->x[from] < in->x[k] - steps; from++)
            if (isfinite(in->y[from])) {
                sum -= in->y[from];
                finite--;
            }
        series_add(out, in->x[k], finite ? sum / (double)finite : NAN);
    }
}

/* The folder that a log lies in, or the log's own name where it lies in none. */
static char *run_name(const char *path) {
    const char *end = strrchr(path, '/'), *start = end;
    if (!end || end == path) return xstrdup(path);
    while (start > path && start[-1] != '/') start--;
    return xasprintf("%.*s", (int)(end - start), start);
}

Canvas *picture_losses(const char *title, const char *const *logs, const char *const *names, int count, double low,
                       double high) {
    Series *series = (Series *)xcalloc((size_t)count * 3, sizeof *series);
    Curve *curves = (Curve *)xcalloc((size_t)count * 2, sizeof *curves);
    double last = 0, bottom = INFINITY, top = -INFINITY;
    for (int i = 0; i < count; i++) {
        Series *training = &series[3 * i], *validation = training + 1, *average = training + 2, *shown = validation;
        if (!read_losses(logs[i], training, validation))
            die("%s holds no losses: lines such as 's:100 trl:3.5' or 's:100 tel:3.4', as in the main.log of a "
                "training",
                logs[i]);
        if (validation->count < 2) { /* none, or only that at the start: the training loss, averaged */
            shown = training->count ? average : validation;
            if (training->count) smooth(average, training, training->x[training->count - 1] / 100);
        }
        char *name = names && names[i] ? xstrdup(names[i]) : run_name(logs[i]);
        curves[2 * i] = (Curve){NULL, training->x, training->y, NULL, training->count, i, true, false};
        curves[2 * i + 1] = (Curve){xasprintf("%s: %.4g (%s)", name, shown->y[shown->count - 1],
                                              shown == validation ? "validation" : "training"),
                                    shown->x,
                                    shown->y,
                                    NULL,
                                    shown->count,
                                    i,
                                    false,
                                    shown == validation};
        free(name);
        if (training->count) last = fmax(last, training->x[training->count - 1]);
        last = fmax(last, shown->x[shown->count - 1]);
    }
    /* the fall from the start would flatten all that follows: the first tenth may leave the frame */
    for (int i = 0; i < 2 * count; i++)
        for (size_t k = 0; k < curves[i].count; k++) {
            double y = curves[i].y[k];
            if (!isfinite(y)) continue;
            bottom = fmin(bottom, y);
            if (curves[i].x[k] >= 0.1 * last) top = fmax(top, y);
        }
    if (!(low < high) && bottom < top) {
        low = bottom - 0.04 * (top - bottom);
        high = top + 0.04 * (top - bottom);
    }
    Canvas *c = picture_curves(title, "step", "loss, nats a token", curves, 2 * count, low, high, false);
    for (int i = 0; i < count; i++) free((char *)curves[2 * i + 1].name);
    for (int i = 0; i < 3 * count; i++) series_free(&series[i]);
    free(series);
    free(curves);
    return c;
}

/* ---- adaptation */

static const char *const event_names[] = {"birth", "split", "move", "merge", "death"};
enum { EVENTS = sizeof event_names / sizeof *event_names, BINS = 60 };

typedef struct {
    double step;
    int kind, layer, head;
} Event;

enum { SLOTS = 1024 }; /* more are not read */
typedef struct {
    double step;
    int layer, head, count;
    float *activation; /* (count): of each slot, in even shares of those alive; NaN where dead */
} Activations;

typedef struct {
    Series alive, fewest, coverage;
    Event *events;
    Activations *heads; /* of all heads at one evaluation after the other */
    size_t count, room, head_count, head_room;
    double last; /* step */
} Adaptation;

/* The numbers of "s:N adp:act l:1 h:0 0.031 - 0.02 ...", from behind the head on. */
static float *read_activations(const char *text, int *count) {
    float *values = (float *)xmalloc(SLOTS * sizeof *values);
    int alive = 0;
    for (*count = 0; *count < SLOTS;) {
        char *end;
        while (*text == ' ') text++;
        if (!*text) break;
        bool dead = text[0] == '-' && (text[1] == ' ' || !text[1]);
        double value = strtod(text, &end);
        if (dead) end = (char *)text + 1;
        else if (end == text) break;
        alive += !dead;
        values[(*count)++] = dead ? NAN : (float)value;
        text = end;
    }
    for (int s = 0; s < *count; s++) values[s] *= (float)alive;
    return (float *)xrealloc(values, ((size_t)*count + 1) * sizeof *values);
}

/* "s:N adp:state alive:X fewest:X ... coverage:X ...", an event's "s:N adp:birth l:1 h:2 slot:3 ...", and a head's
   activations. */
static Adaptation read_adaptation(const char *path) {
    Adaptation a;
    size_t bytes;
    char *text = read_file(path, &bytes), *next;
    memset(&a, 0, sizeof a);
    for (char *line = text; *line; line = next) {
        Event e;
        char name[16];
        next = line + strcspn(line, "\n");
        if (*next) *next++ = 0;
        if (sscanf(line, "s:%lf", &e.step) != 1 || !is_step(e.step)) continue;
        while (a.count && a.events[a.count - 1].step > e.step) a.count--; /* a resumed run does its last steps again */
        while (a.head_count && a.heads[a.head_count - 1].step > e.step) free(a.heads[--a.head_count].activation);
        a.last = fmax(a.last, e.step);
        int behind = 0;
        if (sscanf(line, "s:%*f adp:%15[a-z] l:%d h:%d%n", name, &e.layer, &e.head, &behind) == 3) {
            if (e.layer < 0 || e.head < 0 || e.layer > 1 << 20 || e.head > 1 << 20) continue;
            if (strcmp(name, "act") == 0) {
                Activations h = {e.step, e.layer, e.head, 0, NULL};
                if (a.head_count == a.head_room)
                    a.heads = (Activations *)xrealloc(a.heads, (a.head_room = 2 * a.head_room + 256) * sizeof *a.heads);
                h.activation = read_activations(line + behind, &h.count);
                a.heads[a.head_count++] = h;
                continue;
            }
            for (e.kind = 0; e.kind < EVENTS && strcmp(name, event_names[e.kind]) != 0;) e.kind++;
            if (e.kind == EVENTS) continue;
            if (a.count == a.room)
                a.events = (Event *)xrealloc(a.events, (a.room = 2 * a.room + 256) * sizeof *a.events);
            a.events[a.count++] = e;
        } else if (strstr(line, " adp:state ")) {
            const char *alive = strstr(line, " alive:"), *fewest = strstr(line, " fewest:"),
                       *coverage = strstr(line, " coverage:");
            if (alive) series_add(&a.alive, e.step, strtod(alive + 7, NULL));
            if (fewest) series_add(&a.fewest, e.step, strtod(fewest + 8, NULL));
            if (coverage) series_add(&a.coverage, e.step, strtod(coverage + 10, NULL));
        }
    }
    free(text);
    return a;
}

static void adaptation_free(Adaptation *a) {
    for (size_t i = 0; i < a->head_count; i++) free(a->heads[i].activation);
    series_free(&a->alive);
    series_free(&a->fewest);
    series_free(&a->coverage);
    free(a->events);
    free(a->heads);
}

bool log_has_adaptation(const char *log) {
    Adaptation a = read_adaptation(log);
    bool has = a.count || a.alive.count;
    adaptation_free(&a);
    return has;
}

/* Events by head and time: a row a head that had any. */
static Canvas *draw_events_by_head(const Adaptation *a) {
    int(*heads)[2] = (int(*)[2])xmalloc((a->count + 1) * sizeof *heads), rows = 0, most = 0;
    for (size_t i = 0; i < a->count; i++) {
        int at = 0;
        while (at < rows && (heads[at][0] < a->events[i].layer ||
                             (heads[at][0] == a->events[i].layer && heads[at][1] < a->events[i].head)))
            at++;
        if (at < rows && heads[at][0] == a->events[i].layer && heads[at][1] == a->events[i].head) continue;
        memmove(heads[at + 1], heads[at], (size_t)(rows - at) * sizeof *heads);
        heads[at][0] = a->events[i].layer;
        heads[at][1] = a->events[i].head;
        rows++;
    }
    int *counts = (int *)xcalloc((size_t)rows * BINS, sizeof *counts), high = rows > 40 ? 20 : 28;
    for (size_t i = 0; i < a->count; i++) {
        int row = 0, bin = (int)(a->events[i].step / fmax(a->last, 1) * BINS);
        while (heads[row][0] != a->events[i].layer || heads[row][1] != a->events[i].head) row++;
        int *n = &counts[row * BINS + (bin < BINS ? bin : BINS - 1)];
        most = ++*n > most ? *n : most;
    }
    Plot p = plot_open(1540, MARGIN + 48 + rows * high + MARGIN + 76, "Events in each head", "step", "", 0,
                       fmax(a->last, 1), 0, rows, 150, 300, false, false);
    char text[96];
    for (int row = 0; row < rows; row++) {
        for (int bin = 0; bin < BINS; bin++) {
            double x = plot_x(&p, bin * fmax(a->last, 1) / BINS), end = plot_x(&p, (bin + 1) * fmax(a->last, 1) / BINS);
            if (counts[row * BINS + bin])
                draw_rectangle(p.canvas, x, p.top + row * high, end - x, high,
                               colour_scale(0.15 + 0.85 * counts[row * BINS + bin] / most), 1);
        }
    }
    canvas_unclip(p.canvas);
    for (int row = 0; row < rows; row++) {
        snprintf(text, sizeof text, "head %d:%d", heads[row][0], heads[row][1]);
        draw_text(p.canvas, p.left - 12, p.top + row * high + high / 2 - 8, text, TEXT, TEXT_END, ink);
    }
    /* the two ends of the scale; rows are few at times, so they stand side by side */
    for (int k = most == 1; k < 2; k++) {
        draw_rectangle(p.canvas, p.right + 28 + 110 * (k && most > 1), p.top, 28, 20,
                       colour_scale(k ? 1 : 0.15 + 0.85 / most), 1);
        snprintf(text, sizeof text, "%d", k ? most : 1);
        draw_text(p.canvas, p.right + 64 + 110 * (k && most > 1), p.top + 2, text, TEXT, TEXT_START, ink);
    }
    free(heads);
    free(counts);
    return p.canvas;
}

/* Activation over time: a panel a head, layers below each other; in it a row a slot and a column an evaluation, as
   wide as the time since the one before. */
static Canvas *draw_activations(const Adaptation *a) {
    enum { WIDTH = 1540, GAP = 16, KEY = 300 };
    int layers[SLOTS], most_heads = 0, slots = 0, L = 0; /* layers that have such heads, in order */
    for (size_t i = 0; i < a->head_count; i++) {
        int at = 0, l = a->heads[i].layer;
        slots = a->heads[i].count > slots ? a->heads[i].count : slots;
        while (at < L && layers[at] < l) at++;
        if ((at < L && layers[at] == l) || L == SLOTS) continue;
        memmove(layers + at + 1, layers + at, (size_t)(L - at) * sizeof *layers);
        layers[at] = l;
        L++;
    }
    for (int l = 0; l < L; l++) { /* heads of a layer stand in the order in which its first evaluation names them */
        int here = 0;
        for (size_t i = 0; i < a->head_count && a->heads[i].step == a->heads[0].step; i++)
            here += a->heads[i].layer == layers[l];
        most_heads = here > most_heads ? here : most_heads;
    }
    int row = (int)fmin(fmax(1600 / (L * (slots + 1)), 3), 14), high = slots * row, left = MARGIN + 110,
        top = MARGIN + 48 + LINE, pitch = high + LINE + GAP;
    int wide = (int)fmax((WIDTH - left - KEY) / most_heads - GAP, 24);
    int right = left + most_heads * (wide + GAP);
    Canvas *c = canvas_create(right + KEY, top + (int)fmax(L * pitch, 300) + MARGIN + LINE);
    draw_title(c, "Activation of each slot over the steps");
    char text[64];
    for (int l = 0; l < L; l++) {
        int y = top + l * pitch, known = 0, *heads = (int *)xmalloc((size_t)most_heads * sizeof *heads);
        snprintf(text, sizeof text, "layer %d", layers[l]);
        draw_text(c, left - 36, y + high / 2 - 8, text, TEXT, TEXT_END, ink);
        draw_text(c, left - 8, y, "0", 1, TEXT_END, grey);
        snprintf(text, sizeof text, "%d", slots - 1);
        draw_text(c, left - 8, y + high - 8, text, 1, TEXT_END, grey);
        double before[SLOTS] = {0};
        for (size_t i = 0; i < a->head_count; i++) {
            const Activations *v = &a->heads[i];
            if (v->layer != layers[l]) continue;
            int h = 0;
            while (h < known && heads[h] != v->head) h++;
            if (h == known && known == most_heads) continue;
            double x = left + h * (wide + GAP), from = round(x + before[h] / fmax(a->last, 1) * wide),
                   to = round(x + v->step / fmax(a->last, 1) * wide);
            if (h == known) {
                heads[known++] = v->head;
                snprintf(text, sizeof text, wide < 100 ? "%d" : "head %d", v->head);
                draw_text(c, x + wide / 2, y - LINE + 4, text, TEXT, TEXT_MIDDLE, ink);
                draw_frame(c, x - 2, y - 2, wide + 4, high + 4, 2, grey);
            }
            for (int s = 0; s < v->count; s++)
                draw_rectangle(c, from, y + s * row, to - from, row, colour_scale(place_ratio(v->activation[s])), 1);
            before[h] = v->step;
        }
        free(heads);
    }
    double foot = top + (L - 1) * pitch + high + 10;
    draw_text(c, left, foot, "0", TEXT, TEXT_START, ink);
    snprintf(text, sizeof text, "step %.0f", a->last);
    if (wide > text_width(text, TEXT) + 30) draw_text(c, left + wide, foot, text, TEXT, TEXT_END, ink);
    draw_scale(c, right + 12, top, 220, "even shares", place_ratio);
    draw_rectangle(c, right + 12, top + 246, 28, 16, colour_scale(NAN), 1);
    draw_text(c, right + 56, top + 246, "no splat", TEXT, TEXT_START, ink);
    return c;
}

Canvas *picture_adaptation(const char *log) {
    Adaptation a = read_adaptation(log);
    if (!a.count && !a.alive.count)
        die("%s tells nothing of adaptation: no lines such as 's:100 adp:birth l:0 h:1 ...'; train with --adapt", log);
    Canvas *parts[6];
    int n = 0, width = 0, height = 0;
    char *name = run_name(log), *title = xasprintf("Splats alive in all heads: %s", name), *legend[EVENTS];
    Curve curve = {"at an evaluation", a.alive.x, a.alive.y, NULL, a.alive.count, 0, false, true};
    if (a.alive.count) parts[n++] = draw_curves(420, title, "step", "splats", &curve, 1, 0, 0, false);
    curve.x = a.fewest.x;
    curve.y = a.fewest.y;
    curve.count = a.fewest.count;
    if (a.fewest.count)
        parts[n++] =
            draw_curves(420, "Splats alive in the head that has fewest", "step", "splats", &curve, 1, 0, 0, false);
    curve.x = a.coverage.x;
    curve.y = a.coverage.y;
    curve.count = a.coverage.count;
    if (a.coverage.count)
        parts[n++] = draw_curves(420, "Coverage of keys: mean of ln of their summed responses", "step", "ln sum of phi",
                                 &curve, 1, 0, 0, false);
    Series sums[EVENTS];
    Curve curves[EVENTS];
    memset(sums, 0, sizeof sums);
    for (int k = 0; k < EVENTS; k++) { /* how many of a kind so far: each step of the stairs has two corners */
        double so_far = 0;
        series_add(&sums[k], 0, 0);
        for (size_t i = 0; i < a.count; i++) {
            if (a.events[i].kind != k) continue;
            if (sums[k].x[sums[k].count - 1] < a.events[i].step) series_add(&sums[k], a.events[i].step - 0.001, so_far);
            series_add(&sums[k], a.events[i].step, ++so_far);
        }
        series_add(&sums[k], fmax(a.last, 1) + 0.001, so_far);
        legend[k] = xasprintf("%s: %.0f", event_names[k], so_far);
        curves[k] = (Curve){legend[k], sums[k].x, sums[k].y, NULL, sums[k].count, k, false, false};
    }
    if (a.count) {
        parts[n++] = draw_curves(420, "Events so far", "step", "events", curves, EVENTS, 0, 0, false);
        parts[n++] = draw_events_by_head(&a);
    }
    if (a.head_count) parts[n++] = draw_activations(&a);
    for (int i = 0; i < n; i++) {
        width = parts[i]->width > width ? parts[i]->width : width;
        height += parts[i]->height;
    }
    Canvas *c = canvas_create(width, height);
    for (int i = 0, y = 0; i < n; y += parts[i++]->height)
        for (int row = 0; row < parts[i]->height; row++)
            memcpy(c->rgb + (size_t)(y + row) * (size_t)width * 3,
                   parts[i]->rgb + (size_t)row * (size_t)parts[i]->width * 3, (size_t)parts[i]->width * 3);
    for (int i = 0; i < n; i++) canvas_free(parts[i]);
    for (int k = 0; k < EVENTS; k++) {
        series_free(&sums[k]);
        free(legend[k]);
    }
    free(name);
    free(title);
    adaptation_free(&a);
    return c;
}
