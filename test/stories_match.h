/* Reads sentences with the grammar of the made-up stories: a matcher that shares the tables with the generator and
   nothing else. For test/check_stories.c and test/test_data.c. */
#ifndef GSA_TEST_STORIES_MATCH_H
#define GSA_TEST_STORIES_MATCH_H

#include <ctype.h>
#include <string.h>

#include "../data/stories_grammar.h"

/* What has been said: the word of each slot (NULL: none yet) and the sex of each person (-1: not known, 0: she, 1:
   he). */
typedef struct {
    const char *words[SLOTS];
    int is_he[PERSONS];
} Said;

static Said nothing_said(void) {
    Said s;
    memset(&s, 0, sizeof s);
    for (int p = 0; p < PERSONS; p++) s.is_he[p] = -1;
    return s;
}

/* May this slot take this word, after what has been said? */
static int may_take(const Said *said, int slot, const char *word) {
    if (said->words[slot]) return strcmp(said->words[slot], word) == 0;
    for (int i = 0; i < SLOTS; i++) {
        int must_differ = (slots[slot].differs && strcmp(slots[slot].differs, slots[i].name) == 0) ||
                          (slots[i].differs && strcmp(slots[i].differs, slots[slot].name) == 0);
        if (must_differ && said->words[i] && strcmp(said->words[i], word) == 0) return 0;
    }
    return 1;
}

/* Does text, n bytes of it, read like this way of telling? On success *said holds what it says too. */
static int match_way(const char *way, const char *text, size_t n, Said *said) {
    for (; *way && *way != '{'; way++, text++, n--)
        if (n == 0 || *text != *way) return 0;
    if (!*way) return n == 0;
    const char *close = strchr(way, '}');
    int slot = 0, capital = isupper((unsigned char)way[1]) != 0;
    for (size_t length = (size_t)(close - way - 1); slot < SLOTS; slot++)
        if (strlen(slots[slot].name) == length && slots[slot].name[0] == tolower((unsigned char)way[1]) &&
            memcmp(slots[slot].name + 1, way + 2, length - 1) == 0)
            break;
    if (slot == SLOTS) return 0;
    int person = slots[slot].person;
    for (int he = 0; he < (person == NOBODY ? 1 : 2); he++) {
        if (person != NOBODY && said->is_he[person] == !he) continue;
        for (const char *const *w = slots[slot].words[he]; *w; w++) {
            size_t length = strlen(*w);
            char first = capital ? (char)toupper((unsigned char)**w) : **w;
            if (length > n || text[0] != first || memcmp(text + 1, *w + 1, length - 1) != 0 ||
                !may_take(said, slot, *w))
                continue;
            Said next = *said;
            next.words[slot] = *w;
            if (person != NOBODY) next.is_he[person] = he;
            if (!match_way(close + 1, text + length, n - length, &next)) continue;
            *said = next;
            return 1;
        }
    }
    return 0;
}

static int match_sentence(const char *text, size_t n, Said *said) {
    for (int b = 0; b < BEATS; b++)
        for (int w = 0; w < MAX_WAYS && beats[b].ways[w]; w++)
            if (match_way(beats[b].ways[w], text, n, said)) return 1;
    return 0;
}

/* The length of the sentence that text begins with: up to . ! or ?, a closing quotation mark after it, and white space
   that no small letter follows ("Where is it?" asked Mia.). */
static size_t sentence_length(const char *text, size_t n) {
    for (size_t i = 0; i < n; i++) {
        if (text[i] != '.' && text[i] != '!' && text[i] != '?') continue;
        size_t after = i + 1;
        if (after < n && text[after] == '"') after++;
        size_t next = after;
        while (next < n && isspace((unsigned char)text[next])) next++;
        if (next == n || (next > after && !islower((unsigned char)text[next]))) return after;
    }
    return n;
}

#endif
