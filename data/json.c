#include "json.h"

#include <ctype.h>

/* What cJSON would take wrongly, in the strings of a text; *at is where it stands. NULL: nothing. */
static const char *find_wrong(const char *text, size_t bytes, size_t *at) {
    bool quoted = false;
    for (size_t i = 0; i < bytes; i++) {
        *at = i;
        if (text[i] == 0) return "a byte 0";
        if (text[i] == '"') quoted = !quoted;
        if (text[i] != '\\' || !quoted || ++i == bytes || text[i] != 'u') continue;
        size_t digits = 0, zeros = 0;
        for (; digits < 4 && i + 1 < bytes && isxdigit((unsigned char)text[i + 1]); digits++) zeros += text[++i] == '0';
        if (digits < 4) return "\\u without four hexadecimal digits";
        if (zeros == 4) return "\\u0000, and no text may hold that";
    }
    return NULL;
}

static int line_at(const char *text, size_t at, int line) {
    for (size_t i = 0; i < at; i++) line += text[i] == '\n';
    return line;
}

cJSON *json_object(const char *text, size_t bytes, const char *path, int line) {
    size_t at = 0;
    const char *wrong = find_wrong(text, bytes, &at), *rest = text;
    if (wrong) die("%s, line %d: %s", path, line_at(text, at, line), wrong);
    cJSON *root = cJSON_ParseWithLengthOpts(text, bytes, &rest, false);
    at = (size_t)(rest - text);
    while (root && at < bytes && isspace((unsigned char)text[at])) at++;
    if (!cJSON_IsObject(root) || at < bytes) die("%s, line %d: not a JSON object", path, line_at(text, at, line));
    return root;
}
