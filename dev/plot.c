/* Plots as PNG: the loss of trainings from their main.log, birth and death of splats in one, and the rows of a table as
   bars with error bars.

   dev/plot loss runs/a/main.log hybrid=runs/b/main.log -o loss.png
   dev/plot adapt runs/a/main.log -o adapt.png
   dev/plot bars table.csv --value "validation loss" --error deviation -o bars.png
   dev/plot lines table.csv --by attention --x distance --y accuracy -o lines.png */
#include "../data/text.h"
#include "../gsa/flags.h"
#include "../gsa/look/picture.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

static int loss(int argc, char **argv) {
    const char *out = "loss.png", *title = "Loss by step";
    double low = NAN, high = NAN;
    Flag flags[] = {
        {FLAG_ROOM, NULL, NULL, 0, 0, NULL, "flags", false},
        {FLAG_TEXT, "out", &out, 0, 0, "FILE", "the picture; -o for short", false},
        {FLAG_TEXT, "title", &title, 0, 0, "TEXT", "its title", false},
        {FLAG_REAL, "low", &low, 0, 0, NULL, "lower end of the axis of losses; with --high", false},
        {FLAG_REAL, "high", &high, 0, 0, NULL,
         "its upper end; if neither is given it shows all but the fall of the first steps", false},
        {FLAG_ROOM, NULL, NULL, 0, 0, NULL, NULL, false},
    };
    int n =
        parse_flags(flags, argc, argv,
                    "usage: dev/plot loss LOG... [flags]\nLOG: the main.log of a training, or NAME=FILE to name it in "
                    "the legend; otherwise its folder does. The line is the validation\n"
                    "loss, or where there is none the training loss, averaged; each step's training loss is pale.\n");
    if (n < 1) die_usage("loss needs the main.log of at least one training, such as runs/default/main.log");
    if (isnan(low) != isnan(high) || low >= high) die_usage("--low and --high are given together, the lower one first");
    const char **names = (const char **)xcalloc((size_t)n, sizeof *names),
               **logs = (const char **)xcalloc((size_t)n, sizeof *logs);
    for (int i = 0; i < n; i++) {
        struct stat st;
        char *equals =
            stat(argv[1 + i], &st) == 0 ? NULL : strchr(argv[1 + i], '='); /* a file of this name comes first */
        logs[i] = equals ? equals + 1 : argv[1 + i];
        if (equals) {
            *equals = 0;
            names[i] = argv[1 + i];
        }
    }
    Canvas *c = picture_losses(title, logs, names, n, low, high);
    canvas_write(c, out);
    canvas_free(c);
    free(names);
    free(logs);
    return 0;
}

static int adapt(int argc, char **argv) {
    const char *out = "adapt.png";
    Flag flags[] = {
        {FLAG_ROOM, NULL, NULL, 0, 0, NULL, "flags", false},
        {FLAG_TEXT, "out", &out, 0, 0, "FILE", "the picture; -o for short", false},
        {FLAG_ROOM, NULL, NULL, 0, 0, NULL, NULL, false},
    };
    int n = parse_flags(
        flags, argc, argv,
        "usage: dev/plot adapt LOG [flags]\nLOG: the main.log of a training whose splats are born and die.\n");
    if (n != 1) die_usage("adapt needs the main.log of one training");
    Canvas *c = picture_adaptation(argv[1]);
    canvas_write(c, out);
    canvas_free(c);
    return 0;
}

/* ---- tables: a line a row, cells separated by commas, in double quotes where they hold commas */

/* Cuts one line, ended by 0, into its cells, in place; returns how many there are, of which the first `room` are
   stored. */
static int cells_of(char *line, char **cells, int room) {
    int count = 0;
    for (char *from = line, *to;; from++) {
        bool quoted = *from == '"';
        if (count < room) cells[count] = from;
        count++;
        for (to = from, from += quoted; *from && (quoted || *from != ','); from++) {
            if (quoted && *from == '"') {
                if (from[1] != '"') { /* "" is a quote, " the end */
                    quoted = false;
                    continue;
                }
                from++;
            }
            *to++ = *from;
        }
        bool last = *from == 0;
        *to = 0;
        if (last) return count;
    }
}

enum { COLUMNS = 64 };
typedef struct {
    const char *path;
    char *text, *names[COLUMNS], **cells; /* (rows, columns), in text */
    int columns, rows;
} Table;

static Table table_read(const char *path) {
    Table t = {path, NULL, {NULL}, NULL, 0, 0};
    size_t bytes;
    char *line, *next;
    int room = 0;
    t.text = read_text(path, &bytes);
    for (line = t.text; *line; line = next) { /* the first line that is not empty has the names */
        next = line + strcspn(line, "\n");
        if (*next) *next++ = 0;
        line[strcspn(line, "\r")] = 0;
        if (!*line) continue;
        char *cells[COLUMNS];
        int given = cells_of(line, cells, COLUMNS);
        if (given > COLUMNS) die("%s has %d columns; at most %d are read", path, given, COLUMNS);
        if (!t.columns) {
            t.columns = given;
            memcpy(t.names, cells, sizeof t.names);
            if (t.columns < 2) die("%s has one column; a table needs names and numbers, separated by commas", path);
            continue;
        }
        if (given != t.columns) die("%s: row %d has %d cells, its first line %d", path, t.rows + 1, given, t.columns);
        if (t.rows == room)
            t.cells = (char **)xrealloc(t.cells, (size_t)(room = 2 * room + 16) * (size_t)t.columns * sizeof *t.cells);
        memcpy(t.cells + t.rows++ * t.columns, cells, (size_t)t.columns * sizeof *cells);
    }
    if (!t.rows) die("%s holds no rows below the names of its columns", path);
    return t;
}

static void table_free(Table *t) {
    free(t->text);
    free(t->cells);
}
static const char *cell(const Table *t, int row, int column) { return t->cells[row * t->columns + column]; }

static double number(const Table *t, int row, int column) { /* NaN where the cell is none */
    char *end;
    const char *text = cell(t, row, column);
    double value = strtod(text, &end);
    return end == text || *end ? NAN : value;
}

static int column(const Table *t, const char *name) {
    for (int i = 0; i < t->columns; i++)
        if (strcmp(t->names[i], name) == 0) return i;
    die("%s has no column '%s'; its first line names: %s, %s%s", t->path, name, t->names[0], t->names[1],
        t->columns > 2 ? " and others" : "");
}

static int bars(int argc, char **argv) {
    const char *out = "bars.png", *title = NULL, *value = NULL, *error = NULL, *label = NULL;
    Flag flags[] = {
        {FLAG_ROOM, NULL, NULL, 0, 0, NULL, "flags", false},
        {FLAG_TEXT, "out", &out, 0, 0, "FILE", "the picture; -o for short", false},
        {FLAG_TEXT, "title", &title, 0, 0, "TEXT", "its title; if not given the name of the value", false},
        {FLAG_TEXT, "label", &label, 0, 0, "COLUMN", "names of the bars; if not given the first column", false},
        {FLAG_TEXT, "value", &value, 0, 0, "COLUMN", "their lengths; if not given the second column", false},
        {FLAG_TEXT, "error", &error, 0, 0, "COLUMN", "half the lengths of the error bars; if not given there are none",
         false},
        {FLAG_ROOM, NULL, NULL, 0, 0, NULL, NULL, false},
    };
    int n = parse_flags(flags, argc, argv,
                        "usage: dev/plot bars TABLE.csv [flags]\nThe first line of the table names its columns; a cell "
                        "that is no number gives no bar.\n");
    if (n != 1) die_usage("bars needs one table: dev/plot bars TABLE.csv");
    Table t = table_read(argv[1]);
    int label_column = label ? column(&t, label) : 0, value_column = value ? column(&t, value) : 1,
        error_column = error ? column(&t, error) : -1, count = t.rows;
    const char **labels = (const char **)xmalloc((size_t)count * sizeof *labels);
    double *lengths = (double *)xmalloc(2 * (size_t)count * sizeof *lengths), *errors = lengths + count;
    int numbers = 0;
    for (int i = 0; i < count; i++) {
        labels[i] = cell(&t, i, label_column);
        lengths[i] = number(&t, i, value_column);
        errors[i] = error_column < 0 ? NAN : number(&t, i, error_column);
        numbers += isfinite(lengths[i]);
    }
    if (!numbers) die("%s: the column '%s' holds no number; --value names another", argv[1], t.names[value_column]);
    Canvas *c =
        picture_bars(title ? title : t.names[value_column], t.names[value_column], labels, lengths, errors, count);
    canvas_write(c, out);
    canvas_free(c);
    free(labels);
    free(lengths);
    table_free(&t);
    return 0;
}

static int lines(int argc, char **argv) {
    const char *out = "lines.png", *title = NULL, *by = NULL, *x = NULL, *y = NULL, *error = NULL;
    double low = NAN, high = NAN;
    bool doubling = false;
    Flag flags[] = {
        {FLAG_ROOM, NULL, NULL, 0, 0, NULL, "flags", false},
        {FLAG_TEXT, "out", &out, 0, 0, "FILE", "the picture; -o for short", false},
        {FLAG_TEXT, "title", &title, 0, 0, "TEXT", "its title; if not given the name of y", false},
        {FLAG_TEXT, "by", &by, 0, 0, "COLUMN", "a line for each name in it; if not given the first column", false},
        {FLAG_TEXT, "x", &x, 0, 0, "COLUMN", "if not given the second column", false},
        {FLAG_TEXT, "y", &y, 0, 0, "COLUMN", "if not given the third column", false},
        {FLAG_TEXT, "error", &error, 0, 0, "COLUMN", "half the height of a pale band around each line", false},
        {FLAG_REAL, "low", &low, 0, 0, NULL, "lower end of the axis of y; with --high", false},
        {FLAG_REAL, "high", &high, 0, 0, NULL, "its upper end", false},
        {FLAG_SWITCH, "doubling", &doubling, 0, 0, NULL, "the axis of x doubles from tick to tick", false},
        {FLAG_ROOM, NULL, NULL, 0, 0, NULL, NULL, false},
    };
    int n = parse_flags(flags, argc, argv,
                        "usage: dev/plot lines TABLE.csv [flags]\nThe first line of the table names its columns; rows "
                        "of one name are the points of its line, in their order.\n");
    if (n != 1) die_usage("lines needs one table: dev/plot lines TABLE.csv");
    if (isnan(low) != isnan(high) || low >= high) die_usage("--low and --high are given together, the lower one first");
    Table t = table_read(argv[1]);
    if (t.columns < 3) die("%s has %d columns; lines needs names, x and y", argv[1], t.columns);
    int by_column = by ? column(&t, by) : 0, x_column = x ? column(&t, x) : 1, y_column = y ? column(&t, y) : 2,
        error_column = error ? column(&t, error) : -1, count = 0;
    Curve *curves = (Curve *)xcalloc((size_t)t.rows, sizeof *curves);
    /* the points of all lines, one line after the other */
    double *xs = (double *)xmalloc(3 * (size_t)t.rows * sizeof *xs), *ys = xs + t.rows, *halves = ys + t.rows;
    size_t points = 0;
    for (int i = 0; i < t.rows; i++) { /* the first row of each name collects all of them */
        bool known = false;
        for (int c = 0; c < count; c++) known = known || strcmp(curves[c].name, cell(&t, i, by_column)) == 0;
        if (known) continue;
        Curve *c = &curves[count];
        c->name = cell(&t, i, by_column);
        c->x = xs + points;
        c->y = ys + points;
        c->band = error ? halves + points : NULL;
        c->colour = count++;
        for (int k = i; k < t.rows; k++) {
            if (strcmp(cell(&t, k, by_column), c->name) != 0) continue;
            double a = number(&t, k, x_column), b = number(&t, k, y_column);
            if (doubling && a <= 0)
                die("%s: row %d has %g in the column '%s'; --doubling needs numbers above 0", argv[1], k + 1, a,
                    t.names[x_column]);
            if (isfinite(a) && isfinite(b)) {
                double half = error ? number(&t, k, error_column) : 0;
                xs[points] = a;
                halves[points] = half > 0 ? half : 0;
                ys[points++] = b;
                c->count++;
            }
        }
    }
    if (!points)
        die("%s: the columns '%s' and '%s' hold no numbers in one row", argv[1], t.names[x_column], t.names[y_column]);
    Canvas *c = picture_curves(title ? title : t.names[y_column], t.names[x_column], t.names[y_column], curves, count,
                               isnan(low) ? 0 : low, isnan(low) ? 0 : high, doubling);
    canvas_write(c, out);
    canvas_free(c);
    free(curves);
    free(xs);
    table_free(&t);
    return 0;
}

static const struct {
    const char *name, *arguments, *help;
    int (*run)(int argc, char **argv);
} commands[] = {{"loss", "LOG...", "the loss of trainings by step, from their main.log", loss},
                {"adapt", "LOG", "birth and death of splats in a training", adapt},
                {"bars", "TABLE.csv", "the rows of a table as bars with error bars", bars},
                {"lines", "TABLE.csv", "its numbers as lines, one for each name", lines}};
enum { COMMANDS = sizeof commands / sizeof *commands };

static void print_commands(FILE *f) {
    fprintf(f, "usage: dev/plot COMMAND ...\n");
    for (int i = 0; i < COMMANDS; i++)
        fprintf(f, "  %-5s %-11s %s\n", commands[i].name, commands[i].arguments, commands[i].help);
    fprintf(f, "dev/plot COMMAND --help lists the flags of a command.\n");
}

int main(int argc, char **argv) {
    program_name(argv[0]);
    if (argc >= 2 && (strcmp(argv[1], "--help") == 0 || strcmp(argv[1], "-h") == 0)) {
        print_commands(stdout);
        return 0;
    }
    for (int i = 0; i < COMMANDS && argc >= 2; i++)
        if (strcmp(commands[i].name, argv[1]) == 0) return commands[i].run(argc - 1, argv + 1);
    if (argc >= 2) die_usage("unknown command '%s'; there are loss, adapt, bars and lines", argv[1]);
    print_commands(stderr);
    return 2;
}
