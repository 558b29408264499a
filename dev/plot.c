/* Plots as PNG: the loss of trainings from their main.log, birth and death of splats in one, and the rows of a table as bars with error bars.

     dev/plot loss runs/a/main.log hybrid=runs/b/main.log -o loss.png
     dev/plot adapt runs/a/main.log -o adapt.png
     dev/plot bars table.csv --value "validation loss" --error deviation -o bars.png */
#include "../gsa/flags.h"
#include "../gsa/picture.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static int loss(int argc, char **argv) {
    const char *out = "loss.png", *title = "Loss by step";
    double low = NAN, high = NAN;
    Flag flags[] = {
        {FLAG_ROOM, NULL, NULL, 0, 0, NULL, "flags", false},
        {FLAG_TEXT, "out", &out, 0, 0, "FILE", "the picture; -o for short", false},
        {FLAG_TEXT, "title", &title, 0, 0, "TEXT", "its title", false},
        {FLAG_REAL, "low", &low, 0, 0, NULL, "lower end of the axis of losses; with --high", false},
        {FLAG_REAL, "high", &high, 0, 0, NULL, "its upper end; if neither is given it shows all but the fall of the first steps", false},
        {FLAG_ROOM, NULL, NULL, 0, 0, NULL, NULL, false},
    };
    int n = parse_flags(flags, argc, argv,
                        "usage: dev/plot loss LOG... [flags]\nLOG: the main.log of a training, or NAME=FILE to name it in the legend; otherwise its folder does. The line is the validation\n"
                        "loss, or where there is none the training loss, averaged; each step's training loss is pale.\n");
    if (n < 1) die_usage("loss needs the main.log of at least one training, such as runs/default/main.log");
    if (isnan(low) != isnan(high) || low >= high) die_usage("--low and --high are given together, the lower one first");
    const char **names = (const char **)xcalloc((size_t)n, sizeof *names), **logs = (const char **)xcalloc((size_t)n, sizeof *logs);
    for (int i = 0; i < n; i++) {
        char *equals = strchr(argv[1 + i], '=');
        logs[i] = equals ? equals + 1 : argv[1 + i];
        if (equals) *equals = 0, names[i] = argv[1 + i];
    }
    Canvas *c = picture_losses(title, logs, names, n, low, high);
    canvas_write(c, out);
    canvas_free(c), free(names), free(logs);
    return 0;
}

static int adapt(int argc, char **argv) {
    const char *out = "adapt.png";
    Flag flags[] = {
        {FLAG_ROOM, NULL, NULL, 0, 0, NULL, "flags", false},
        {FLAG_TEXT, "out", &out, 0, 0, "FILE", "the picture; -o for short", false},
        {FLAG_ROOM, NULL, NULL, 0, 0, NULL, NULL, false},
    };
    int n = parse_flags(flags, argc, argv, "usage: dev/plot adapt LOG [flags]\nLOG: the main.log of a training whose splats are born and die.\n");
    if (n != 1) die_usage("adapt needs the main.log of one training");
    Canvas *c = picture_adaptation(argv[1]);
    canvas_write(c, out);
    canvas_free(c);
    return 0;
}

/* ---- tables: a line a row, cells separated by commas, in double quotes where they hold commas */

/* Cuts one line, ended by 0, into its cells, in place; returns how many there are, of which the first `room` are stored. */
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

static int column(char *const *names, int count, const char *name, const char *file) {
    for (int i = 0; i < count; i++)
        if (strcmp(names[i], name) == 0) return i;
    die("%s has no column '%s'; its first line names: %s%s%s%s", file, name, names[0], count > 1 ? ", " : "", count > 1 ? names[1] : "", count > 2 ? " and others" : "");
}

static int bars(int argc, char **argv) {
    const char *out = "bars.png", *title = NULL, *value = NULL, *error = NULL, *label = NULL;
    Flag flags[] = {
        {FLAG_ROOM, NULL, NULL, 0, 0, NULL, "flags", false},
        {FLAG_TEXT, "out", &out, 0, 0, "FILE", "the picture; -o for short", false},
        {FLAG_TEXT, "title", &title, 0, 0, "TEXT", "its title; if not given the name of the value", false},
        {FLAG_TEXT, "label", &label, 0, 0, "COLUMN", "names of the bars; if not given the first column", false},
        {FLAG_TEXT, "value", &value, 0, 0, "COLUMN", "their lengths; if not given the second column", false},
        {FLAG_TEXT, "error", &error, 0, 0, "COLUMN", "half the lengths of the error bars; if not given there are none", false},
        {FLAG_ROOM, NULL, NULL, 0, 0, NULL, NULL, false},
    };
    int n = parse_flags(flags, argc, argv, "usage: dev/plot bars TABLE.csv [flags]\nThe first line of the table names its columns; a cell that is no number gives no bar.\n");
    if (n != 1) die_usage("bars needs one table: dev/plot bars TABLE.csv");
    enum { COLUMNS = 64 };
    size_t bytes;
    char *text = read_file(argv[1], &bytes), *names[COLUMNS], *next, *line = text;
    int columns = 0, count = 0, room = 0, label_column = 0, value_column = 1, error_column = -1;
    const char **labels = NULL;
    double *values = NULL;
    for (; *line; line = next) { /* the first line that is not empty */
        next = line + strcspn(line, "\n");
        if (*next) *next++ = 0;
        line[strcspn(line, "\r")] = 0;
        if (!*line) continue;
        char *cells[COLUMNS];
        int given = cells_of(line, cells, COLUMNS);
        if (given > COLUMNS) die("%s has %d columns; at most %d are read", argv[1], given, COLUMNS);
        if (!columns) {
            columns = given;
            memcpy(names, cells, sizeof names);
            if (columns < 2) die("%s has one column; a table of bars needs names and numbers, separated by commas", argv[1]);
            if (label) label_column = column(names, columns, label, argv[1]);
            if (value) value_column = column(names, columns, value, argv[1]);
            if (error) error_column = column(names, columns, error, argv[1]);
            continue;
        }
        if (given != columns) die("%s: row %d has %d cells, its first line %d", argv[1], count + 1, given, columns);
        if (count == room) {
            room = 2 * room + 16;
            labels = (const char **)xrealloc((void *)labels, (size_t)room * sizeof *labels), values = (double *)xrealloc(values, 2 * (size_t)room * sizeof *values);
        }
        for (int k = 0; k < 2; k++) {
            char *cell = k == 0 ? cells[value_column] : error_column >= 0 ? cells[error_column] : "", *end;
            double number = strtod(cell, &end);
            values[2 * count + k] = end == cell || *end ? NAN : number;
        }
        labels[count++] = cells[label_column];
    }
    if (!count) die("%s holds no rows below the names of its columns", argv[1]);
    double *lengths = (double *)xmalloc(2 * (size_t)count * sizeof *lengths), *errors = lengths + count;
    int numbers = 0;
    for (int i = 0; i < count; i++) lengths[i] = values[2 * i], errors[i] = values[2 * i + 1], numbers += isfinite(lengths[i]);
    if (!numbers) die("%s: the column '%s' holds no number; --value names another", argv[1], names[value_column]);
    Canvas *c = picture_bars(title ? title : names[value_column], names[value_column], labels, lengths, errors, count);
    canvas_write(c, out);
    canvas_free(c), free(labels), free(values), free(lengths), free(text);
    return 0;
}

int main(int argc, char **argv) {
    static const char help[] = "usage: dev/plot COMMAND ...\n"
                               "  loss LOG...       the loss of trainings by step, from their main.log\n"
                               "  adapt LOG         birth and death of splats in a training\n"
                               "  bars TABLE.csv    the rows of a table as bars with error bars\n"
                               "dev/plot COMMAND --help lists the flags of a command.\n";
    program_name(argv[0]);
    if (argc >= 2 && strcmp(argv[1], "loss") == 0) return loss(argc - 1, argv + 1);
    if (argc >= 2 && strcmp(argv[1], "adapt") == 0) return adapt(argc - 1, argv + 1);
    if (argc >= 2 && strcmp(argv[1], "bars") == 0) return bars(argc - 1, argv + 1);
    if (argc >= 2 && (strcmp(argv[1], "--help") == 0 || strcmp(argv[1], "-h") == 0)) {
        fputs(help, stdout);
        return 0;
    }
    fputs(help, stderr);
    if (argc >= 2) die_usage("unknown command '%s'", argv[1]);
    return 2;
}
