/* JSON in: all that is read here goes through this. */
#ifndef GSA_JSON_H
#define GSA_JSON_H

#include <cjson/cJSON.h>

#include "../gsa/util.h"

#ifdef __cplusplus
extern "C" {
#endif

/* The object that a text is; cJSON_Delete frees it. Dies with a sentence that names the line, of which `line` is the
   first, where it is something else, where more follows, and where cJSON would cut a text without a word: at \u0000 and
   at a \u without four hexadecimal digits. */
cJSON *json_object(const char *text, size_t bytes, const char *path, int line);

#ifdef __cplusplus
}
#endif
#endif
