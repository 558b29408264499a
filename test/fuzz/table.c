/* The reader of dev/plot's tables, see fuzz.h. */
#include "fuzz.h"

#define main plot_main
#include "../../dev/plot.c"
#undef main

int plot_main(int argc, char **argv); /* not called, but what it calls is used */
void fuzz_table(char *path) {
    Table t = table_read(path);
    for (int row = 0; row < t.rows; row++)
        for (int i = 0; i < t.columns; i++) number(&t, row, column(&t, t.names[i]));
    table_free(&t);
}
