#include "classes.h"

#include <ctype.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#include "../../data/stories_grammar.h"

/* ---------------------------------------------------------------------- lists of words */

static const char *const determiners[] = {"a",   "an",  "the", "this", "these", "those",   "each", "every",
                                          "any", "all", "no",  "some", "both",  "another", "such", NULL};
static const char *const pronouns[] = {
    "i",       "you",       "he",         "she",        "it",     "we",       "they",     "me",        "him",
    "us",      "them",      "her",        "his",        "my",     "your",     "its",      "our",       "their",
    "mine",    "yours",     "hers",       "ours",       "theirs", "myself",   "yourself", "himself",   "herself",
    "itself",  "who",       "whom",       "someone",    "anyone", "everyone", "nobody",   "something", "anything",
    "nothing", "ourselves", "everything", "themselves", NULL};
static const char *const prepositions[] = {
    "of",      "in",      "to",    "for",    "with",    "on",      "at",      "from",   "by",      "about",  "as",
    "into",    "through", "after", "over",   "between", "out",     "against", "during", "without", "before", "under",
    "around",  "among",   "off",   "up",     "down",    "near",    "behind",  "above",  "below",   "across", "toward",
    "towards", "upon",    "along", "beside", "inside",  "outside", "onto",    "until",  "since",   "past",   NULL};
static const char *const conjunctions[] = {"and",  "or",    "but",     "if",    "because", "although", "though", "so",
                                           "than", "that",  "while",   "when",  "where",   "why",      "how",    "nor",
                                           "yet",  "which", "whether", "whose", "what",    NULL};
static const char *const auxiliaries[] = {"be",  "am",    "is",  "are",   "was",  "were", "been",   "being",  "have",
                                          "has", "had",   "do",  "does",  "did",  "will", "would",  "shall",  "should",
                                          "can", "could", "may", "might", "must", "not",  "cannot", "having", NULL};
static const char *const adverbs[] = {"very", "too",   "also", "just",  "then",   "there", "here",
                                      "now",  "again", "ever", "never", "always", "only",  "still",
                                      "soon", "even",  "more", "most",  NULL};
static const char *const friends[] = {"friend", "friends", NULL};

enum { MOST_LISTS = 6 };
typedef struct {
    const char *name;
    const char *const *lists[MOST_LISTS];
} WordClass;

/* The first class that has the word is its own. */
static const WordClass story_classes[] = {
    {"name", {words_girl, words_boy}},
    {"person", {words_girl_kind, words_boy_kind, words_woman, words_man, friends}},
    {"pronoun", {pronouns}},
    {"function word", {determiners, prepositions, conjunctions, auxiliaries, adverbs}},
    {"trait", {words_trait}},
    {"look", {words_look}},
    {"thing", {words_thing}},
    {"place", {words_place}},
    {"spot", {words_spot}},
    {"animal", {words_animal}},
    {"food", {words_food}},
    {"activity", {words_game}},
    {"feeling", {words_glad, words_sad}},
    {"weather", {words_day}},
};
static const WordClass english_classes[] = {
    {"determiner", {determiners}},   {"pronoun", {pronouns}},      {"preposition", {prepositions}},
    {"conjunction", {conjunctions}}, {"auxiliary", {auxiliaries}}, {"adverb", {adverbs}},
};
enum {
    STORY_LISTS = sizeof story_classes / sizeof *story_classes,
    ENGLISH_LISTS = sizeof english_classes / sizeof *english_classes
};

/* What is in no list. Forms of words are told apart in English only. */
enum { OTHER_WORD, PUNCTUATION, SPACE, END_OF_DOCUMENT, NUMBER, CAPITAL, ING, ED, LY, PLURAL, CONTRACTION, FORMS };
static const char *const forms[FORMS] = {"other word", "punctuation", "line end",   "end of text",
                                         "number",     "capital",     "-ing",       "-ed",
                                         "-ly",        "-s",          "contraction"};

static int listed(const WordClass *classes, int count, const char *word, size_t bytes) {
    for (int c = 0; c < count; c++)
        for (int l = 0; l < MOST_LISTS && classes[c].lists[l]; l++)
            for (const char *const *w = classes[c].lists[l]; *w; w++)
                if (strncasecmp(*w, word, bytes) == 0 && (*w)[bytes] == 0) return c;
    return -1;
}

/* ---------------------------------------------------------------------- words of a text */

static bool in_word(unsigned char letter) { return isalnum(letter) || letter >= 128; }

static bool ends_in(const char *word, size_t bytes, const char *ending) {
    size_t n = strlen(ending);
    return bytes >= n + 2 && strncasecmp(word + bytes - n, ending, n) == 0;
}

/* The form of the word at text[from, end), which is in no list: `text` begins with what stands before it. */
static int form_of(const char *text, size_t from, size_t end) {
    const char *word = text + from;
    size_t bytes = end - from, before = from;
    for (size_t i = 0; i < bytes; i++)
        if (isdigit((unsigned char)word[i])) return NUMBER;
    while (before > 0 && strchr(" \"'(", text[before - 1])) before--;
    bool begins = before == 0 || strchr(".!?:\n", text[before - 1]); /* a sentence, where capitals say nothing */
    if (isupper((unsigned char)word[0]) && !begins) return CAPITAL;
    if (ends_in(word, bytes, "ing")) return ING;
    if (ends_in(word, bytes, "ed")) return ED;
    if (ends_in(word, bytes, "ly")) return LY;
    return ends_in(word, bytes, "s") && !ends_in(word, bytes, "ss") ? PLURAL : OTHER_WORD;
}

/* The class of the word or mark at text[at], `bytes` of text in all. */
static int class_at(int kind, const char *text, size_t at, size_t bytes) {
    const WordClass *classes = kind == CLASSES_STORIES ? story_classes : english_classes;
    int lists = kind == CLASSES_STORIES ? STORY_LISTS : ENGLISH_LISTS, form = PUNCTUATION;
    size_t from = at, end = at;
    bool apostrophe = text[at] == '\'' && at > 0 && in_word((unsigned char)text[at - 1]);
    if (apostrophe && at + 1 < bytes && in_word((unsigned char)text[at + 1])) from = end = at + 1;
    if (in_word((unsigned char)text[end])) {
        while (from > 0 && in_word((unsigned char)text[from - 1])) from--;
        while (end < bytes && in_word((unsigned char)text[end])) end++;
        if (kind == CLASSES_ENGLISH && from > 1 && text[from - 1] == '\'' && in_word((unsigned char)text[from - 2]))
            return lists + CONTRACTION;
        int list = listed(classes, lists, text + from, end - from);
        if (list >= 0) return list;
        form = kind == CLASSES_STORIES ? OTHER_WORD : form_of(text, from, end);
    }
    return lists + form;
}

const char *const *token_classes(int kind, const Tokenizer *t, const int *tokens, size_t N, int *classes, int *count) {
    static const char *names[2][MAX_CLASSES];
    const WordClass *table = kind == CLASSES_STORIES ? story_classes : english_classes;
    int lists = kind == CLASSES_STORIES ? STORY_LISTS : ENGLISH_LISTS;
    *count = lists + (kind == CLASSES_STORIES ? NUMBER : FORMS);
    for (int c = 0; c < *count; c++) names[kind][c] = c < lists ? table[c].name : forms[c - lists];
    size_t bytes, total = 0, *start = (size_t *)xmalloc((N + 1) * sizeof *start);
    char *text = NULL;
    for (int pass = 0; pass < 2; pass++) { /* how long the text is, then the text; a document's end ends a line */
        total = 0;
        for (size_t i = 0; i < N; i++) {
            const char *piece = tokens[i] == tokenizer_eot(t) ? NULL : tokenizer_piece(t, tokens[i], &bytes);
            if (!piece) bytes = 1;
            start[i] = total;
            if (text) memcpy(text + total, piece ? piece : "\n", bytes);
            total += bytes;
        }
        start[N] = total;
        if (!text) text = (char *)xmalloc(total + 1);
    }
    for (size_t i = 0; i < N; i++) {
        size_t at = start[i];
        while (at < start[i + 1] && isspace((unsigned char)text[at])) at++;
        if (tokens[i] == tokenizer_eot(t)) classes[i] = lists + END_OF_DOCUMENT;
        else classes[i] = at == start[i + 1] ? lists + SPACE : class_at(kind, text, at, total);
    }
    free(start);
    free(text);
    return names[kind];
}
