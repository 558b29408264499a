/* Writes a probe of memory: documents in which everything that is told is asked for later, some more than once, at
   known distances. Two kinds:

     pairs   keys and values:  "bako salt dure corn ... bako salt"          a key that comes again has the same value
             again
     facts   of a story:       "There is a colour red. The sun was warm. ... I like the colour red."

   As training text: documents separated by lines <|endoftext|>. With --ask: one question a line, its kind, a tab,
   and a document that ends with the answer; the place where it was told and the answer are in brackets. That is what
   `infer recall` reads. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "../gsa/flags.h"
#include "../gsa/util.h"

static int64_t bytes = 10000000, seed = 1, ask = 0, far = 192;
static const char *out = NULL;

static Flag flags[] = {
    {FLAG_TEXT, "out", &out, 0, 0, "FILE", "where to write; - is standard output", false},
    {FLAG_INT, "bytes", &bytes, 1, 1e15, "N", "stop after the document that reaches this many bytes", false},
    {FLAG_INT, "ask", &ask, 0, 1e9, "N", "instead of documents N questions of each kind and distance", false},
    {FLAG_INT, "far", &far, 16, 100000, "N", "longest distance asked for, in words; documents are 48 words longer",
     false},
    {FLAG_INT, "seed", &seed, 0, 9e15, "N", "another seed, other documents; ask with one that was not trained on",
     false},
    {FLAG_TEXT, NULL, NULL, 0, 0, NULL, NULL, false}};

enum { PAIRS, FACTS, NUM_KINDS, MAX_KEYS = 128 }; /* MAX_KEYS: as many as either kind has */
static const char *const kind_names[NUM_KINDS] = {"pairs", "facts"};

#define COUNT(list) (sizeof(list) / sizeof *(list))
static const char *const first_halves[] = {"ba", "du", "fo", "ge", "hi", "ka", "lo", "mu",
                                           "ne", "pi", "ra", "so", "tu", "vo", "wi", "ze"};
static const char *const second_halves[] = {"ko", "re", "mi", "la", "pu", "sha", "no", "ti"};
static const char *const values[] = {"salt", "corn", "milk", "rice",  "bean",  "lime",
                                     "fish", "cake", "tea",  "honey", "bread", "onion"};
static const struct {
    const char *kind, *names[12];
} facts[] = {
    {"boy", {"Tom", "Ben", "Max", "Sam", "Tim", "Jack", "Leo", "Paul", "Fred", "Hugo", "Noah", "Carl"}},
    {"girl", {"Lily", "Anna", "Mia", "Lucy", "Sue", "Rosa", "Emma", "Zoe", "Nina", "Kate", "Ella", "Clara"}},
    {"colour",
     {"red", "blue", "green", "white", "black", "brown", "pink", "grey", "gold", "purple", "orange", "yellow"}},
    {"pet", {"dog", "cat", "fox", "bear", "duck", "horse", "mouse", "frog", "goat", "lion", "owl", "rabbit"}},
    {"toy", {"ball", "kite", "drum", "doll", "train", "puzzle", "top", "boat", "robot", "sword", "castle", "wagon"}},
    {"place",
     {"park", "beach", "forest", "farm", "market", "school", "garden", "lake", "mill", "tower", "cave", "bridge"}},
    {"fruit",
     {"apple", "pear", "plum", "grape", "lemon", "peach", "cherry", "mango", "melon", "banana", "fig", "berry"}},
    {"month",
     {"January", "March", "April", "May", "June", "July", "August", "October", "November", "December", "February",
      "September"}}};
static const char *const said[] = {"The sun was warm.",  "A bird sang in the tree.", "They went to the park.",
                                   "It was a good day.", "The wind was cold.",       "They ran to the river."};

typedef struct {
    int key, value; /* key: of pairs, or which of the facts */
    int64_t due;    /* asked for once this many words are written */
} Item;

typedef struct {
    char *text;
    size_t count, room;
    int64_t words;
    bool used[MAX_KEYS];
    Item pending[MAX_KEYS];
    int waiting;
} Document;

static void append(Document *d, const char *text) {
    size_t n = strlen(text);
    if (d->count + n + 1 > d->room) d->text = (char *)xrealloc(d->text, d->room = 2 * (d->count + n) + 1024);
    memcpy(d->text + d->count, text, n + 1);
    d->count += n;
}

/* Tells an item, or asks for it: the same pair again, or another sentence. A marked one has its value in brackets;
   last: the text ends there. */
static void write_item(Document *d, int kind, const Item *item, bool told, bool marked, bool last) {
    char line[128];
    const char *open = marked ? "[" : "", *close = marked ? "]" : "", *gap = d->count ? " " : "";
    if (kind == PAIRS) {
        snprintf(line, sizeof line, "%s%s%s %s%s%s", gap, first_halves[(size_t)item->key % COUNT(first_halves)],
                 second_halves[(size_t)item->key / COUNT(first_halves)], open, values[item->value], close);
        d->words += 2;
    } else {
        const char *what = facts[item->key].kind, *name = facts[item->key].names[item->value];
        snprintf(line, sizeof line, "%s%s %s %s%s%s%s", gap, told ? "There is a" : "I like the", what, open, name,
                 close, last ? "" : ".");
        d->words += 6;
    }
    append(d, line);
}

/* A new item that the document has not had; false where all are used. */
static bool new_item(Document *d, int kind, uint64_t *rng, Item *item) {
    uint64_t keys = kind == PAIRS ? COUNT(first_halves) * COUNT(second_halves) : COUNT(facts),
             start = rng_below(rng, keys);
    for (uint64_t i = 0; i < keys; i++) {
        item->key = (int)((start + i) % keys);
        if (d->used[item->key]) continue;
        d->used[item->key] = true;
        item->value = (int)rng_below(rng, kind == PAIRS ? COUNT(values) : COUNT(facts[0].names));
        return true;
    }
    return false;
}

/* When to ask: 4 to `far` words from now, as often in each octave. */
static int64_t due(const Document *d, uint64_t *rng) {
    return d->words + (int64_t)exp(log(4.0) + rng_uniform(rng) * (log((double)far) - log(4.0)));
}

/* Writes until the document has this many words: what is due, else something new, or, in a story, something that
   tells nothing. */
static void write_until(Document *d, int kind, int64_t words, uint64_t *rng) {
    while (d->words < words) {
        int next = -1;
        for (int i = 0; i < d->waiting; i++)
            if (d->pending[i].due <= d->words && (next < 0 || d->pending[i].due < d->pending[next].due)) next = i;
        Item item;
        if (next >= 0) {
            write_item(d, kind, &d->pending[next], false, false, false);
            if (rng_below(rng, 4)) d->pending[next].due = due(d, rng);
            else d->pending[next] = d->pending[--d->waiting];
        } else if ((kind == FACTS && rng_below(rng, 4)) || !new_item(d, kind, rng, &item)) {
            const char *sentence = said[rng_below(rng, COUNT(said))];
            append(d, d->count ? " " : "");
            append(d, sentence);
            for (const char *c = sentence; *c; c++) d->words += *c == ' ' || *c == '.';
        } else {
            write_item(d, kind, &item, true, false, false);
            item.due = due(d, rng);
            d->pending[d->waiting++] = item;
        }
    }
}

static void begin(Document *d) {
    d->count = 0;
    d->words = 0;
    d->waiting = 0;
    memset(d->used, 0, sizeof d->used);
}

/* One question: the document so far, the item, then others until it is `distance` words ago, then the question. */
static void write_question(Document *d, int kind, int64_t distance, uint64_t *rng) {
    Item item = {0, 0, 0};
    begin(d);
    new_item(d, kind, rng, &item); /* nothing else tells of it */
    write_until(d, kind, 1 + (int64_t)rng_below(rng, (uint64_t)(far + 32 - distance)), rng);
    write_item(d, kind, &item, true, true, false);
    int64_t told = d->words;
    write_until(d, kind, told + distance - (kind == PAIRS ? 2 : 6), rng);
    write_item(d, kind, &item, false, true, true);
}

int main(int argc, char **argv) {
    program_name(argv[0]);
    if (parse_flags(flags, argc, argv,
                    "data/make_recall --out FILE [flags]: documents whose words are asked for later, to train on; with "
                    "--ask the questions for infer recall\n\n") > 0)
        die_usage("'%s' is not a flag; --out FILE says where to write", argv[1]);
    if (!out) die_usage("--out FILE is missing; --out - writes to standard output");
    if (ask && find_flag(flags, "bytes")->given)
        die_usage("--bytes is for documents, --ask for questions: give one of them");
    bool to_stdout = strcmp(out, "-") == 0;
    const char *path = to_stdout ? "standard output" : out;
    FILE *f = to_stdout ? stdout : create_file(out);
    Document *d = (Document *)xcalloc(1, sizeof *d);
    int64_t written = 0, made = 0;
    if (ask)
        for (int kind = 0; kind < NUM_KINDS; kind++)
            for (int64_t distance = 8; distance <= far;
                 distance = distance < far && 2 * distance > far ? far : 2 * distance)
                for (int64_t i = 0; i < ask; i++, made++) {
                    uint64_t rng = rng_mix(rng_mix((uint64_t)seed, (uint64_t)(kind * far + distance)), (uint64_t)i);
                    write_question(d, kind, distance, &rng);
                    if (fprintf(f, "%s\t%s\n", kind_names[kind], d->text) < 0) die("cannot write %s", path);
                }
    for (; !ask && written < bytes; made++) {
        uint64_t rng = rng_mix((uint64_t)seed, (uint64_t)made);
        begin(d);
        write_until(d, (int)rng_below(&rng, NUM_KINDS), far + 48, &rng);
        xfwrite(d->text, 1, d->count, f, path);
        xfwrite("\n<|endoftext|>\n", 1, 15, f, path);
        written += (int64_t)d->count + 15;
        progress("recall", (double)(written < bytes ? written : bytes), (double)bytes);
    }
    if (!to_stdout) commit_file(f, out);
    if (ask) fprintf(stderr, "%lld questions of seed %lld\n", (long long)made, (long long)seed);
    else
        fprintf(stderr, "%lld documents of seed %lld: %lld bytes\n", (long long)made, (long long)seed,
                (long long)written);
    free(d->text);
    free(d);
}
