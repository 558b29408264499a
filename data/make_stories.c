/* Writes made-up stories, separated by lines <|endoftext|>, or questions about them, to a file or to standard
   output. */
#include <cjson/cJSON.h>
#include <stdlib.h>
#include <string.h>

#include "../gsa/flags.h"
#include "../gsa/util.h"
#include "stories.h"

static int64_t bytes = 10000000, seed = 1, first = 0, count = 1000;
static const char *out = NULL, *tasks = NULL;

static Flag flags[] = {
    {FLAG_INT, "bytes", &bytes, 1, 1e15, "N", "stop after the story that reaches this many bytes", false},
    {FLAG_CHOICE, "tasks", &tasks, 0, 0, "choice|last-word",
     "instead of stories, tasks about them for infer score: which ending, or which last word", false},
    {FLAG_INT, "count", &count, 1, 1e9, "N", "number of tasks", false},
    {FLAG_INT, "seed", &seed, 0, 9e15, "N", "another seed, other stories", false},
    {FLAG_INT, "first", &first, 0, 9e15, "INDEX", "number of the first story; story INDEX of a seed is always the same",
     false},
    {FLAG_TEXT, "out", &out, 0, 0, "FILE", "where to write; - is standard output", false},
    {FLAG_TEXT, NULL, NULL, 0, 0, NULL, NULL, false}};

/* The line of a task about a story, malloc'd; NULL where the story has none. */
static char *task_line(uint64_t index) {
    cJSON *line = cJSON_CreateObject();
    char *context = NULL, *endings[STORY_ENDINGS] = {NULL}, *text = NULL;
    int label;
    if (strcmp(tasks, "last-word") == 0) {
        context = story_last_word((uint64_t)seed, index);
        if (context) cJSON_AddStringToObject(line, "text", context);
    } else if (story_choice((uint64_t)seed, index, &context, endings, &label)) {
        cJSON_AddStringToObject(line, "ctx", context);
        cJSON_AddItemToObject(line, "endings", cJSON_CreateStringArray((const char *const *)endings, STORY_ENDINGS));
        cJSON_AddNumberToObject(line, "label", label);
    }
    if (context && !(text = cJSON_PrintUnformatted(line))) die("out of memory");
    cJSON_Delete(line);
    free(context);
    for (int e = 0; e < STORY_ENDINGS; e++) free(endings[e]);
    return text;
}

int main(int argc, char **argv) {
    program_name(argv[0]);
    if (parse_flags(flags, argc, argv,
                    "data/make_stories --out FILE [flags]: made-up stories, separated by lines <|endoftext|>,\n"
                    "or, with --tasks, a file of tasks about them; ask about stories of a seed that the model was not "
                    "trained on\n\n") > 0)
        die_usage("'%s' is not a flag; --out FILE says where to write", argv[1]);
    if (!out) die_usage("--out FILE is missing; --out - writes to standard output");
    if (tasks && find_flag(flags, "bytes")->given)
        die_usage("--bytes is for stories; --count says how many tasks to write");
    if (!tasks && find_flag(flags, "count")->given) die_usage("--count is for --tasks; --bytes says how much to write");
    bool to_stdout = strcmp(out, "-") == 0;
    const char *path = to_stdout ? "standard output" : out;
    FILE *f = to_stdout ? stdout : create_file(out);
    int64_t written = 0, made = 0, index = first;
    for (; tasks ? made < count : written < bytes; index++) {
        size_t n;
        char *text = tasks ? task_line((uint64_t)index) : story((uint64_t)seed, (uint64_t)index, &n);
        if (!text) continue;
        const char *end = tasks ? "\n" : "\n<|endoftext|>\n";
        n = strlen(text);
        xfwrite(text, 1, n, f, path);
        xfwrite(end, 1, strlen(end), f, path);
        written += (int64_t)(n + strlen(end));
        made++;
        free(text);
        if (tasks) progress("tasks", (double)made, (double)count);
        else progress("stories", (double)(written < bytes ? written : bytes), (double)bytes);
    }
    if (!to_stdout) commit_file(f, out);
    if (tasks)
        fprintf(stderr, "%lld tasks about stories %lld to %lld of seed %lld\n", (long long)made, (long long)first,
                (long long)index - 1, (long long)seed);
    else
        fprintf(stderr, "stories %lld to %lld of seed %lld: %lld bytes\n", (long long)first, (long long)index - 1,
                (long long)seed, (long long)written);
}
