#include "tasks.h"

#include <ctype.h>
#include <stdlib.h>
#include <string.h>

#include "json.h"
#include "text.h"

static bool is_blank(const char *text, size_t bytes) {
    for (size_t i = 0; i < bytes; i++)
        if (!isspace((unsigned char)text[i])) return false;
    return true;
}

/* A whole number as JSON number or string; -1 where it is neither. */
static int label_of(const cJSON *item) {
    double x = cJSON_IsNumber(item) ? item->valuedouble : -1;
    if (cJSON_IsString(item)) {
        char *end;
        x = strtod(item->valuestring, &end);
        if (end == item->valuestring || *end) x = -1;
    }
    return x >= 0 && x < TASK_ENDINGS_MAX && x == (int)x ? (int)x : -1;
}

static void add_ending(Task *t, const char *space, const char *text) {
    t->endings = (char **)xrealloc(t->endings, (size_t)(t->count + 1) * sizeof *t->endings);
    t->bytes = (size_t *)xrealloc(t->bytes, (size_t)(t->count + 1) * sizeof *t->bytes);
    t->endings[t->count] = xasprintf("%s%s", space, text);
    t->bytes[t->count++] = strlen(text);
}

/* Takes a space from the end of the context, where there is one: words are learned together with the space before. */
static bool take_space(Task *t) {
    size_t n = strlen(t->context);
    if (n == 0 || t->context[n - 1] != ' ') return false;
    t->context[n - 1] = 0;
    return true;
}

/* NULL, or what is wrong with the line. */
static const char *read_choice(Task *t, const cJSON *ctx, const cJSON *endings, const cJSON *label) {
    int count = cJSON_IsArray(endings) ? cJSON_GetArraySize(endings) : 0;
    if (!cJSON_IsString(ctx)) return "\"ctx\" is not a text";
    if (count < 2 || count > TASK_ENDINGS_MAX) return "\"endings\" is not a list of 2 to 64 texts";
    t->context = xstrdup(ctx->valuestring);
    size_t n = strlen(t->context);
    bool apart = n > 0 && isspace((unsigned char)t->context[n - 1]), space = take_space(t);
    for (const cJSON *e = endings->child; e; e = e->next) {
        if (!cJSON_IsString(e)) return "\"endings\" holds something that is not a text";
        if (is_blank(e->valuestring, strlen(e->valuestring))) return "\"endings\" holds an empty text";
        add_ending(t, space || !(apart || isspace((unsigned char)e->valuestring[0])) ? " " : "", e->valuestring);
    }
    t->label = label_of(label);
    return t->label >= 0 && t->label < count ? NULL : "\"label\" is not the number of an ending, counted from 0";
}

static const char *read_last_word(Task *t, const cJSON *text) {
    if (!cJSON_IsString(text)) return "\"text\" is not a text";
    t->last_word = true;
    t->context = xstrdup(text->valuestring);
    char *end = t->context + strlen(t->context);
    while (end > t->context && isspace((unsigned char)end[-1])) *--end = 0;
    char *word = end;
    while (word > t->context && !isspace((unsigned char)word[-1])) word--;
    if (is_blank(t->context, (size_t)(word - t->context))) return "\"text\" has no word before its last one";
    char *last = xstrdup(word);
    *word = 0;
    add_ending(t, take_space(t) ? " " : "", last);
    free(last);
    return NULL;
}

Task *tasks_read(const char *path, size_t *count) {
    size_t bytes, room = 0;
    char *file = read_text(path, &bytes);
    Task *tasks = NULL;
    int line = 0;
    *count = 0;
    for (char *at = file, *end = file + bytes, *stop; at < end; at = stop + 1) {
        stop = (char *)memchr(at, '\n', (size_t)(end - at));
        if (!stop) stop = end;
        line++;
        if (is_blank(at, (size_t)(stop - at))) continue;
        if (*count == room) tasks = (Task *)xrealloc(tasks, (room = 2 * room + 64) * sizeof *tasks);
        Task *t = &tasks[(*count)++];
        memset(t, 0, sizeof *t);
        t->line = line;
        cJSON *root = json_object(at, (size_t)(stop - at), input_name(path), line);
        const cJSON *ctx = cJSON_GetObjectItemCaseSensitive(root, "ctx"),
                    *endings = cJSON_GetObjectItemCaseSensitive(root, "endings");
        const cJSON *text = cJSON_GetObjectItemCaseSensitive(root, "text");
        if (!endings == !text)
            die("%s, line %d: a task has either \"ctx\", \"endings\" and \"label\" or \"text\"", path, line);
        const char *wrong = endings ? read_choice(t, ctx, endings, cJSON_GetObjectItemCaseSensitive(root, "label"))
                                    : read_last_word(t, text);
        if (wrong) die("%s, line %d: %s", path, line, wrong);
        cJSON_Delete(root);
    }
    if (!*count) die("%s holds no tasks", path);
    free(file);
    return tasks;
}

void tasks_free(Task *tasks, size_t count) {
    for (size_t i = 0; i < count; i++) {
        for (int e = 0; e < tasks[i].count; e++) free(tasks[i].endings[e]);
        free(tasks[i].context);
        free(tasks[i].endings);
        free(tasks[i].bytes);
    }
    free(tasks);
}
