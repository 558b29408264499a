#include "stories.h"

#include <ctype.h>
#include <stdlib.h>
#include <string.h>

#include "stories_grammar.h"

static const char document_end[] = "\n<|endoftext|>\n";

typedef struct {
    char *text;
    size_t count, room;
} Text;

static void append(Text *t, const char *bytes, size_t count) {
    if (t->count + count + 1 > t->room) t->text = (char *)xrealloc(t->text, t->room = 2 * (t->count + count) + 1024);
    memcpy(t->text + t->count, bytes, count);
    t->text[t->count += count] = 0;
}

static const char *pick(const char *const *list, size_t most, uint64_t *rng) {
    size_t n = 0;
    while (n < most && list[n]) n++;
    return list[rng_below(rng, n)];
}

/* The index of the slot whose name is these `count` letters, its first small or capital. */
static int find_slot(const char *name, size_t count) {
    for (int i = 0; i < SLOTS; i++)
        if (tolower((unsigned char)name[0]) == slots[i].name[0] && strncmp(name + 1, slots[i].name + 1, count - 1) == 0 && slots[i].name[count] == 0) return i;
    die("the grammar of the stories has no slot {%.*s}", (int)count, name);
}

static const Beat *find_beat(const char *name, size_t count) {
    for (int i = 0; i < BEATS; i++)
        if (strncmp(beats[i].name, name, count) == 0 && beats[i].name[count] == 0) return &beats[i];
    die("the grammar of the stories has no beat '%.*s'", (int)count, name);
}

/* One word for every slot, for the whole story. */
static void choose_words(const char *words[SLOTS], uint64_t *rng) {
    bool is_he[PERSONS];
    for (int p = 0; p < PERSONS; p++) is_he[p] = rng_below(rng, 2);
    for (int i = 0; i < SLOTS; i++) {
        const char *other = slots[i].differs ? words[find_slot(slots[i].differs, strlen(slots[i].differs))] : NULL;
        do words[i] = pick(slots[i].words[is_he[slots[i].person]], SIZE_MAX, rng);
        while (other && strcmp(words[i], other) == 0);
    }
}

static void append_sentence(Text *t, const char *way, const char *const words[SLOTS]) {
    while (*way) {
        size_t plain = strcspn(way, "{");
        append(t, way, plain);
        way += plain;
        if (!*way) break;
        size_t count = strcspn(++way, "}");
        const char *word = words[find_slot(way, count)];
        size_t at = t->count;
        append(t, word, strlen(word));
        if (isupper((unsigned char)way[0])) t->text[at] = (char)toupper((unsigned char)t->text[at]);
        way += count + 1;
    }
}

static void append_story(Text *t, uint64_t seed, uint64_t index) {
    uint64_t rng = rng_mix(seed, index);
    const char *words[SLOTS];
    choose_words(words, &rng);
    const char *p = plots[rng_below(&rng, PLOTS)].beats;
    bool first = true;
    for (const char *space = ""; *p;) { /* space: what stands before the next sentence */
        size_t count = strcspn(p, "?,|");
        size_t name = count;
        while (name > 0 && p[name - 1] == ' ') name--;
        bool left_out = p[count] == '?' && rng_below(&rng, 2);
        const char *way = pick(find_beat(p, name)->ways, MAX_WAYS, &rng);
        if (!left_out) {
            append(t, space, first ? 0 : 1);
            append_sentence(t, way, words);
            space = " ";
            first = false;
        }
        for (p += count; *p && strchr("?,| ", *p); p++)
            if (*p == '|') space = "\n";
    }
}

char *story(uint64_t seed, uint64_t index, size_t *bytes) {
    Text t = {NULL, 0, 0};
    append_story(&t, seed, index);
    *bytes = t.count;
    return t.text;
}

char *stories(uint64_t seed, size_t bytes, size_t *got) {
    Text t = {NULL, 0, 0};
    append(&t, "", 0);
    for (uint64_t i = 0; t.count < bytes; i++) {
        append_story(&t, seed, i);
        append(&t, document_end, sizeof document_end - 1);
    }
    *got = t.count;
    return t.text;
}
