/* A tokenizer and a file of tasks, read and used as programs do it, for files that test_fuzz.c has damaged and that
   test/fuzz has made. */
#ifndef GSA_TEST_READERS_H
#define GSA_TEST_READERS_H

#include "../data/tasks.h"
#include "../tokenizer/tokenizer.h"

#include <stdlib.h>

static void read_tokenizer(char *path) {
    Tokenizer *t = tokenizer_load(path);
    int *ids = NULL;
    size_t count = 0, room = 0, bytes;
    const char text[] = "Once upon a time, 1234 \xC3\xA9t\xC3\xA9s\xFF\n\n  <|endoftext|> [MASK] "
                        "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa";
    tokenizer_encode(t, text, sizeof text, true, &ids, &count, &room);
    for (size_t i = 0; i < count; i++)
        if (!tokenizer_piece(t, ids[i], &bytes)) abort();
    free(tokenizer_to_memory(t, &bytes));
    free(ids);
    tokenizer_free(t);
}

static void read_tasks(char *path) {
    size_t count;
    Task *tasks = tasks_read(path, &count);
    for (size_t i = 0; i < count; i++)
        if (tasks[i].label >= tasks[i].count || tasks[i].count < 1) abort();
    tasks_free(tasks, count);
}

#endif
