/* Tasks with known answers, as infer score asks them: JSON objects, one a line, of two forms.

   choice     {"ctx": "...", "endings": ["...", "...", ...], "label": 2}   as HellaSwag: which ending goes on? label
              counts from 0 (a string will do)
   last word  {"text": "... ... ..."}                                     as LAMBADA: what is the last word of the text?
              White space behind it is left out.
   Other fields are ignored. */
#ifndef GSA_TASKS_H
#define GSA_TASKS_H

#include "../gsa/util.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
    int line;       /* of the file, from 1 */
    bool last_word; /* one ending, the word, which is right */
    char *context;
    /* (count); context and ending are the text, byte for byte. An ending begins with the space before it, which it gets
       where neither has white space there. */
    char **endings;
    size_t *bytes; /* (count): of each without that space */
    int count, label;
} Task;

enum { TASK_ENDINGS_MAX = 64 };

/* All tasks of a file, "-" is standard input; blank lines are passed over. Dies with a sentence that names the line
   where it is not a task. */
Task *tasks_read(const char *path, size_t *count);
void tasks_free(Task *tasks, size_t count);

#ifdef __cplusplus
}
#endif
#endif
