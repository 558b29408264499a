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
        if (tolower((unsigned char)name[0]) == slots[i].name[0] &&
            strncmp(name + 1, slots[i].name + 1, count - 1) == 0 && slots[i].name[count] == 0)
            return i;
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

/* A story as it was told: its words, and each sentence with the place where it begins. */
enum { MAX_SENTENCES = 32 };
typedef struct {
    const char *words[SLOTS];
    struct {
        const char *way;
        size_t at; /* in the text that it was appended to */
    } sentences[MAX_SENTENCES];
    int count;
} Told;

static void append_story(Text *t, uint64_t seed, uint64_t index, Told *told) {
    uint64_t rng = rng_mix(seed, index);
    choose_words(told->words, &rng);
    const char *p = plots[rng_below(&rng, PLOTS)].beats;
    told->count = 0;
    for (const char *space = ""; *p;) { /* space: what stands before the next sentence */
        size_t count = strcspn(p, "?,|");
        size_t name = count;
        while (name > 0 && p[name - 1] == ' ') name--;
        bool left_out = p[count] == '?' && rng_below(&rng, 2);
        const char *way = pick(find_beat(p, name)->ways, MAX_WAYS, &rng);
        if (!left_out) {
            if (told->count == MAX_SENTENCES)
                die("the grammar of the stories has a plot of more than %d sentences", MAX_SENTENCES);
            append(t, space, told->count ? 1 : 0);
            told->sentences[told->count].way = way;
            told->sentences[told->count++].at = t->count;
            append_sentence(t, way, told->words);
            space = " ";
        }
        for (p += count; *p && strchr("?,| ", *p); p++)
            if (*p == '|') space = "\n";
    }
}

char *story(uint64_t seed, uint64_t index, size_t *bytes) {
    Text t = {NULL, 0, 0};
    Told told;
    append_story(&t, seed, index, &told);
    *bytes = t.count;
    return t.text;
}

char *stories(uint64_t seed, size_t bytes, size_t *got) {
    Text t = {NULL, 0, 0};
    Told told;
    append(&t, "", 0);
    for (uint64_t i = 0; t.count < bytes; i++) {
        append_story(&t, seed, i, &told);
        append(&t, document_end, sizeof document_end - 1);
    }
    *got = t.count;
    return t.text;
}

/* ---- questions about a story */

static bool has_slot(const char *way, int slot) {
    for (size_t count; (way = strchr(way, '{')); way += count) {
        count = strcspn(++way, "}");
        if (find_slot(way, count) == slot) return true;
    }
    return false;
}

/* Do the first `count` sentences name this slot's word? */
static bool was_said(const Told *told, int count, int slot) {
    for (int i = 0; i < count; i++)
        if (has_slot(told->sentences[i].way, slot)) return true;
    return false;
}

bool story_choice(uint64_t seed, uint64_t index, char **context, char *endings[STORY_ENDINGS], int *label) {
    /* names, colours, objects */
    static const char *const asked[] = {"hero", "friend", "look", "thing", "flook", "fthing", "animal"};
    enum { ASKED = sizeof asked / sizeof *asked };
    Text t = {NULL, 0, 0};
    Told told;
    append_story(&t, seed, index, &told);
    int at[MAX_SENTENCES * ASKED], slot[MAX_SENTENCES * ASKED], n = 0;
    for (int i = 1; i < told.count; i++)
        for (int a = 0; a < ASKED; a++) {
            int s = find_slot(asked[a], strlen(asked[a]));
            if (has_slot(told.sentences[i].way, s) && was_said(&told, i, s)) {
                at[n] = i;
                slot[n++] = s;
            }
        }
    if (n == 0) {
        free(t.text);
        return false;
    }
    uint64_t rng = rng_mix(rng_mix(seed, index), 1);
    int chosen = (int)rng_below(&rng, (uint64_t)n), s = slot[chosen];
    size_t begin = told.sentences[at[chosen]].at;
    const char *right = told.words[s], *const *list = NULL, *others[STORY_ENDINGS];
    for (int sex = 0; sex < 2 && !list; sex++)
        for (const char *const *w = slots[s].words[sex]; *w && !list; w++)
            if (strcmp(*w, right) == 0) list = slots[s].words[sex];
    *label = (int)rng_below(&rng, STORY_ENDINGS);
    for (int e = 0; e < STORY_ENDINGS; e++) {
        bool taken = e != *label; /* wrong words: of the same list, and of no other slot or ending */
        for (others[e] = right; taken;) {
            others[e] = pick(list, SIZE_MAX, &rng);
            taken = false;
            for (int i = 0; i < SLOTS; i++) taken = taken || strcmp(told.words[i], others[e]) == 0;
            for (int i = 0; i < e; i++) taken = taken || strcmp(others[i], others[e]) == 0;
        }
        Text ending = {NULL, 0, 0};
        told.words[s] = others[e];
        append_sentence(&ending, told.sentences[at[chosen]].way, told.words);
        told.words[s] = right;
        endings[e] = ending.text;
    }
    t.text[t.text[begin - 1] == ' ' ? begin - 1 : begin] = 0;
    *context = t.text;
    return true;
}

char *story_last_word(uint64_t seed, uint64_t index) {
    static const char *const asked[][2] = {{"{look} {thing}", "thing"}, {"{flook} {fthing}", "fthing"}};
    Text t = {NULL, 0, 0};
    Told told;
    append_story(&t, seed, index, &told);
    int at[2 * MAX_SENTENCES], which[2 * MAX_SENTENCES], n = 0;
    for (int i = 1; i < told.count; i++)
        for (int a = 0; a < 2; a++)
            if (strstr(told.sentences[i].way, asked[a][0]) &&
                was_said(&told, i, find_slot(asked[a][1], strlen(asked[a][1])))) {
                at[n] = i;
                which[n++] = a;
            }
    if (n == 0) {
        free(t.text);
        return NULL;
    }
    uint64_t rng = rng_mix(rng_mix(seed, index), 2);
    int chosen = (int)rng_below(&rng, (uint64_t)n);
    const char *way = told.sentences[at[chosen]].way, *pattern = asked[which[chosen]][0];
    char *cut = xstrdup(way); /* the sentence up to and with the word */
    cut[strstr(way, pattern) + strlen(pattern) - way] = 0;
    t.count = told.sentences[at[chosen]].at;
    append_sentence(&t, cut, told.words);
    free(cut);
    return t.text;
}
