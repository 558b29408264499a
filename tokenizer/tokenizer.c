#include "tokenizer.h"

#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <utf8proc.h>

enum {
    MAGIC = 20240328,
    HEADER_INTS = 256,
    LONGEST = 255,        /* bytes of an entry: its length is one byte in the file */
    MOST_ENTRIES = 65536, /* ids are uint16 in shards, and two of them one uint32 key here */
    NO_RANK = INT_MAX
};
#define EOT_TEXT "<|endoftext|>"
#define MASK_TEXT "[MASK]"
#define NONE UINT32_MAX

/* Classes of characters that the splitting pattern knows. */
enum { OTHER, LETTER, NUMBER, SPACE, NOT_ASCII };

typedef struct {
    uint32_t key; /* left id << 16 | right id */
    int32_t id;   /* of the two joined; NO_RANK: the slot is empty */
} PairSlot;

struct Tokenizer {
    int V, eot, mask;
    char *bytes;      /* of all entries, one after the other */
    uint32_t *start;  /* V + 1: entry i is bytes[start[i]] up to bytes[start[i + 1]] */
    int byte_id[256]; /* the entry of each single byte */
    unsigned char class_of[256];
    uint32_t *entry_slots; /* hash table from an entry's bytes to its id; NONE: empty */
    size_t entry_mask;     /* slots - 1, a power of two less one, as below */
    PairSlot *pair_slots;  /* hash table from two ids to the id of the two joined */
    size_t pair_mask;
};

/* ---------------------------------------------------------------------- hashes and a heap */

static uint64_t load(const void *p, size_t n) {
    uint64_t x = 0;
    memcpy(&x, p, n);
    return x;
}

/* Overlapping loads instead of a loop over the last bytes: pieces are short, and this is most of the time in encode. */
static inline uint64_t hash_bytes(const char *p, size_t n) {
    const uint64_t k = 0x9E3779B97F4A7C15ull;
    uint64_t h = n * k, x;
    if (n >= 8) {
        for (size_t i = 0; i + 8 < n; i += 8) {
            h = (h ^ load(p + i, 8)) * k;
            h ^= h >> 32;
        }
        x = load(p + n - 8, 8);
    } else if (n >= 4) {
        x = load(p, 4) | load(p + n - 4, 4) << 32;
    } else {
        x = n ? (uint64_t)(unsigned char)p[0] | (uint64_t)(unsigned char)p[n / 2] << 8 |
                    (uint64_t)(unsigned char)p[n - 1] << 16
              : 0;
    }
    h = (h ^ x) * k;
    return h ^ h >> 32;
}

static inline size_t hash_pair(uint32_t key) {
    uint64_t h = key * 0x9E3779B97F4A7C15ull;
    return (size_t)(h >> 32);
}

/* The smallest item is on top; both encoding of long pieces and training choose the next merge with it. */
typedef struct {
    uint64_t first, second;
} Item;

static bool before(const Item *a, const Item *b) {
    return a->first != b->first ? a->first < b->first : a->second < b->second;
}

static void sift_down(Item *heap, size_t n, size_t i) {
    Item item = heap[i];
    for (size_t child; (child = 2 * i + 1) < n; i = child) {
        if (child + 1 < n && before(&heap[child + 1], &heap[child])) child++;
        if (!before(&heap[child], &item)) break;
        heap[i] = heap[child];
    }
    heap[i] = item;
}

static void heap_push(Item *heap, size_t *n, Item item) {
    size_t i = (*n)++;
    for (; i > 0 && before(&item, &heap[(i - 1) / 2]); i = (i - 1) / 2) heap[i] = heap[(i - 1) / 2];
    heap[i] = item;
}

static void heap_pop(Item *heap, size_t *n) {
    heap[0] = heap[--*n];
    if (*n > 0) sift_down(heap, *n, 0);
}

/* ---------------------------------------------------------------------- splitting

   's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+

   No alternative but the whitespace ones ever has to go back, so one look at the class of the next character decides.
   A byte that is not part of valid UTF-8 is a character of its own, of no class. */

static void set_classes(Tokenizer *t) {
    for (int c = 0; c < 256; c++) {
        bool letter = (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z');
        t->class_of[c] = c >= 128                               ? NOT_ASCII
                         : letter                               ? LETTER
                         : c >= '0' && c <= '9'                 ? NUMBER
                         : c == ' ' || (c >= '\t' && c <= '\r') ? SPACE
                                                                : OTHER;
    }
}

/* Class and length of the character at p < end. */
static inline int character(const Tokenizer *t, const unsigned char *p, const unsigned char *end, size_t *bytes) {
    *bytes = 1;
    int class = t->class_of[*p];
    if (class != NOT_ASCII) return class;
    utf8proc_int32_t code;
    utf8proc_ssize_t n = utf8proc_iterate(p, end - p < 4 ? end - p : 4, &code);
    if (n < 1) return OTHER;
    *bytes = (size_t)n;
    switch (utf8proc_category(code)) {
    case UTF8PROC_CATEGORY_LU:
    case UTF8PROC_CATEGORY_LL:
    case UTF8PROC_CATEGORY_LT:
    case UTF8PROC_CATEGORY_LM:
    case UTF8PROC_CATEGORY_LO: return LETTER;
    case UTF8PROC_CATEGORY_ND:
    case UTF8PROC_CATEGORY_NL:
    case UTF8PROC_CATEGORY_NO: return NUMBER;
    case UTF8PROC_CATEGORY_ZS:
    case UTF8PROC_CATEGORY_ZL:
    case UTF8PROC_CATEGORY_ZP: return SPACE;
    default: return code == 0x85 ? SPACE : OTHER; /* next line: white space, but a control character by category */
    }
}

/* Where the run of characters of one class that goes on at p ends. */
static inline const unsigned char *run_end(const Tokenizer *t, const unsigned char *p, const unsigned char *end,
                                           int class) {
    for (size_t n; p < end && character(t, p, end, &n) == class;) p += n;
    return p;
}

/* The length of the piece that starts at text; 0 < bytes. */
static size_t piece_bytes(const Tokenizer *t, const char *text, size_t bytes) {
    const unsigned char *begin = (const unsigned char *)text, *p = begin, *end = begin + bytes;
    if (*p == '\'' && bytes > 1) {
        if (strchr("stmd", p[1]) && p[1]) return 2;
        if (bytes > 2 && ((p[1] == 'r' && p[2] == 'e') || (p[1] == 'v' && p[2] == 'e') || (p[1] == 'l' && p[2] == 'l')))
            return 3;
    }
    size_t n, last;
    int class = character(t, p, end, &n);
    if (class != SPACE) return (size_t)(run_end(t, p + n, end, class) - begin);
    if (*p == ' ' && bytes > 1) {
        class = character(t, p + 1, end, &n);
        if (class != SPACE) return (size_t)(run_end(t, p + 1 + n, end, class) - begin);
    }
    /* White space: all of it at the end of the text, else all but its last character, which belongs to what follows */
    for (last = 0; p < end && character(t, p, end, &n) == SPACE; p += n) last = n;
    size_t run = (size_t)(p - begin);
    return p == end || run == last ? run : run - last;
}

/* ---------------------------------------------------------------------- merging */

static inline int pair_rank(const Tokenizer *t, int left, int right) {
    uint32_t key = (uint32_t)left << 16 | (uint32_t)right;
    for (size_t i = hash_pair(key) & t->pair_mask;; i = (i + 1) & t->pair_mask) {
        if (t->pair_slots[i].id == NO_RANK) return NO_RANK;
        if (t->pair_slots[i].key == key) return t->pair_slots[i].id;
    }
}

static int entry_id(const Tokenizer *t, const char *bytes, size_t n, uint64_t hash) {
    if (n > LONGEST) return -1;
    for (size_t i = hash & t->entry_mask;; i = (i + 1) & t->entry_mask) {
        uint32_t id = t->entry_slots[i];
        if (id == NONE) return -1;
        uint32_t from = t->start[id];
        if (t->start[id + 1] - from == n && memcmp(t->bytes + from, bytes, n) == 0) return (int)id;
    }
}

/* Below this length looking through all pairs for the smallest is faster than a heap. */
enum { SHORT = 48 };

static size_t merge_short(const Tokenizer *t, const char *piece, size_t n, int *id) {
    int rank[SHORT]; /* of the pair (i, i + 1) */
    for (size_t i = 0; i < n; i++) id[i] = t->byte_id[(unsigned char)piece[i]];
    for (size_t i = 0; i + 1 < n; i++) rank[i] = pair_rank(t, id[i], id[i + 1]);
    for (;;) {
        size_t best = 0;
        int smallest = NO_RANK;
        for (size_t i = 0; i + 1 < n; i++)
            if (rank[i] < smallest) {
                smallest = rank[i];
                best = i;
            }
        if (smallest == NO_RANK) return n;
        n--;
        id[best] = smallest;
        for (size_t i = best + 1; i < n; i++) {
            id[i] = id[i + 1];
            rank[i - 1] = rank[i];
        }
        if (best > 0) rank[best - 1] = pair_rank(t, id[best - 1], id[best]);
        if (best + 1 < n) rank[best] = pair_rank(t, id[best], id[best + 1]);
    }
}

/* The same in O(n log n): a linked list of tokens and a heap of pairs, by rank and then from left to right. An item of
   the heap whose rank is no longer that of the pair at its place is stale. */
typedef struct {
    size_t previous, next; /* n: none; there is one more token at n that takes the writes meant for none */
    int id, rank;
} Link;

static size_t merge_long(const Tokenizer *t, const char *piece, size_t n, int *id) {
    Link *list = xmalloc((n + 1) * sizeof *list);
    Item *heap = xmalloc(2 * n * sizeof *heap); /* a merge takes at least one item and adds at most two */
    size_t waiting = 0, tokens = 0;
    for (size_t i = 0; i < n; i++)
        list[i] = (Link){
            .previous = i ? i - 1 : n, .next = i + 1, .id = t->byte_id[(unsigned char)piece[i]], .rank = NO_RANK};
    for (size_t i = 0; i + 1 < n; i++) {
        list[i].rank = pair_rank(t, list[i].id, list[i + 1].id);
        if (list[i].rank != NO_RANK) heap[waiting++] = (Item){(uint64_t)list[i].rank, i};
    }
    for (size_t i = waiting / 2; i-- > 0;) sift_down(heap, waiting, i);
    while (waiting > 0) {
        Item top = heap[0];
        heap_pop(heap, &waiting);
        size_t i = top.second;
        if ((uint64_t)list[i].rank != top.first) continue;
        size_t gone = list[i].next;
        list[i].id = list[i].rank;
        list[i].next = list[gone].next;
        list[list[i].next].previous = i;
        list[gone].rank = NO_RANK;
        size_t around[2] = {list[i].previous, i}; /* the pairs whose right or left token is new */
        for (int k = 0; k < 2; k++) {
            size_t left = around[k];
            if (left == n) continue;
            size_t right = list[left].next;
            list[left].rank = right == n ? NO_RANK : pair_rank(t, list[left].id, list[right].id);
            if (list[left].rank != NO_RANK) heap_push(heap, &waiting, (Item){(uint64_t)list[left].rank, left});
        }
    }
    for (size_t i = 0; i < n; i = list[i].next) id[tokens++] = list[i].id;
    free(heap);
    free(list);
    return tokens;
}

/* ---------------------------------------------------------------------- encoding

   Text repeats its words. What a piece became is looked up where it last stood: the cache holds places in the text and
   in the ids already written, lives inside one call, and a newer piece takes the slot of an older one. */

typedef struct {
    const char *text; /* NULL: empty */
    size_t at;        /* index of its first id */
    unsigned char bytes, tokens;
} Seen;

typedef struct {
    int *ids;
    size_t count, room;
    Seen *seen;
    size_t seen_mask;
} Output;

static void make_room(Output *out, size_t n) {
    if (out->room - out->count >= n) return;
    out->room = out->room * 2 > out->count + n ? out->room * 2 : out->count + n;
    out->ids = xrealloc(out->ids, out->room * sizeof *out->ids);
}

static void encode_ordinary(const Tokenizer *t, const char *text, size_t bytes, Output *out) {
    for (size_t n; bytes > 0; text += n, bytes -= n) {
        n = piece_bytes(t, text, bytes);
        make_room(out, n);
        int *id = out->ids + out->count;
        if (n > SHORT) {
            int whole = n <= LONGEST ? entry_id(t, text, n, hash_bytes(text, n)) : -1;
            if (whole >= 0) {
                id[0] = whole;
                out->count++;
            } else out->count += merge_long(t, text, n, id);
            continue;
        }
        uint64_t hash = hash_bytes(text, n);
        Seen *seen = &out->seen[(hash >> 32 ^ hash) & out->seen_mask];
        size_t tokens;
        if (seen->text && seen->bytes == n && memcmp(seen->text, text, n) == 0) {
            tokens = seen->tokens;
            const int *old = out->ids + seen->at;
            for (size_t i = 0; i < tokens; i++) id[i] = old[i];
        } else {
            int whole = entry_id(t, text, n, hash);
            if (whole >= 0) {
                id[0] = whole;
                tokens = 1;
            } else tokens = merge_short(t, text, n, id);
        }
        /* the newest place is still in the processor's cache */
        *seen = (Seen){text, out->count, (unsigned char)n, (unsigned char)tokens};
        out->count += tokens;
    }
}

static const char *find(const char *from, const char *end, const char *what) {
    const char *found = from < end ? memmem(from, (size_t)(end - from), what, strlen(what)) : NULL;
    return found ? found : end;
}

void tokenizer_encode(const Tokenizer *t, const char *text, size_t bytes, bool special, int **ids, size_t *count,
                      size_t *room) {
    if (bytes == 0) return;
    size_t slots = 64;
    while (slots < 16384 && slots * 16 < bytes) slots *= 2;
    Output out = {
        .ids = *ids, .count = *count, .room = *room, .seen = xcalloc(slots, sizeof(Seen)), .seen_mask = slots - 1};
    if (!special) {
        encode_ordinary(t, text, bytes, &out);
    } else {
        const char *end = text + bytes, *eot = find(text, end, EOT_TEXT), *mask = find(text, end, MASK_TEXT);
        while (text < end) {
            const char *next = eot < mask ? eot : mask;
            encode_ordinary(t, text, (size_t)(next - text), &out);
            text = next;
            if (next == end) break;
            make_room(&out, 1);
            out.ids[out.count++] = next == eot ? t->eot : t->mask;
            text += strlen(next == eot ? EOT_TEXT : MASK_TEXT);
            if (eot < text) eot = find(text, end, EOT_TEXT);
            if (mask < text) mask = find(text, end, MASK_TEXT);
        }
    }
    free(out.seen);
    *ids = out.ids;
    *count = out.count;
    *room = out.room;
}

const char *tokenizer_piece(const Tokenizer *t, int id, size_t *bytes) {
    if (id >= 0 && id < t->V) {
        *bytes = t->start[id + 1] - t->start[id];
        return t->bytes + t->start[id];
    }
    *bytes = 0;
    if (id != t->mask) return NULL;
    *bytes = strlen(MASK_TEXT); /* a vocabulary without [MASK] has it in the padding */
    return MASK_TEXT;
}

int tokenizer_vocab_size(const Tokenizer *t) { return t->V; }
int tokenizer_eot(const Tokenizer *t) { return t->eot; }
int tokenizer_mask(const Tokenizer *t) { return t->mask; }

/* ---------------------------------------------------------------------- making one from its entries */

static size_t entry_bytes(const Tokenizer *t, int id) { return t->start[id + 1] - t->start[id]; }

static void add_entry(Tokenizer *t, int id, const void *bytes, size_t n) {
    memcpy(t->bytes + t->start[id], bytes, n);
    t->start[id + 1] = t->start[id] + (uint32_t)n;
}

static Tokenizer *new_tokenizer(int V) {
    Tokenizer *t = xcalloc(1, sizeof *t);
    t->V = V;
    t->bytes = xmalloc((size_t)V * LONGEST);
    t->start = xcalloc((size_t)V + 1, sizeof *t->start);
    set_classes(t);
    return t;
}

void tokenizer_free(Tokenizer *t) {
    if (!t) return;
    free(t->bytes);
    free(t->start);
    free(t->entry_slots);
    free(t->pair_slots);
    free(t);
}

/* Builds the hash tables once all entries are there, and proves that they are in merge order: encoded by the merges
   before it, each entry is just two tokens, and those are the pair that it was learned from. */
static void finish(Tokenizer *t, const char *name) {
    t->bytes = xrealloc(t->bytes, t->start[t->V]);
    size_t slots = 1024;
    while (slots < 2 * (size_t)t->V) slots *= 2;
    t->entry_mask = t->pair_mask = slots - 1;
    t->entry_slots = xmalloc(slots * sizeof *t->entry_slots);
    t->pair_slots = xmalloc(slots * sizeof *t->pair_slots);
    for (size_t i = 0; i < slots; i++) t->entry_slots[i] = NONE, t->pair_slots[i] = (PairSlot){0, NO_RANK};
    for (int b = 0; b < 256; b++) t->byte_id[b] = -1;

    for (int id = 0; id < t->V; id++) {
        const char *bytes = t->bytes + t->start[id];
        size_t n = entry_bytes(t, id);
        uint64_t hash = hash_bytes(bytes, n);
        int same = entry_id(t, bytes, n, hash);
        if (same >= 0)
            die("%s: entries %d and %d are the same bytes, so this is no BPE vocabulary; make it again", name, same,
                id);
        size_t i = hash & t->entry_mask;
        while (t->entry_slots[i] != NONE) i = (i + 1) & t->entry_mask;
        t->entry_slots[i] = (uint32_t)id;
        if (n == 1) t->byte_id[(unsigned char)bytes[0]] = id;
    }
    for (int b = 0; b < 256; b++)
        if (t->byte_id[b] < 0)
            die("%s has no entry for the byte 0x%02X, so it cannot encode every text; make it again", name, b);

    for (int id = 0; id < t->V; id++) {
        const char *bytes = t->bytes + t->start[id];
        size_t n = entry_bytes(t, id);
        int tokens[LONGEST];
        if (n == 1 || id == t->eot || id == t->mask) continue;
        size_t count = n <= SHORT ? merge_short(t, bytes, n, tokens) : merge_long(t, bytes, n, tokens);
        if (count != 2)
            die("%s: entry %d is not two earlier entries joined, so its ids are not in merge order and do not suffice "
                "to encode",
                name, id);
        uint32_t key = (uint32_t)tokens[0] << 16 | (uint32_t)tokens[1];
        size_t i = hash_pair(key) & t->pair_mask;
        while (t->pair_slots[i].id != NO_RANK) i = (i + 1) & t->pair_mask;
        t->pair_slots[i] = (PairSlot){key, id};
    }
}

/* ---------------------------------------------------------------------- the file */

static bool entry_is(const Tokenizer *t, int id, const char *text) {
    return entry_bytes(t, id) == strlen(text) && memcmp(t->bytes + t->start[id], text, strlen(text)) == 0;
}

Tokenizer *tokenizer_from_memory(const void *file, size_t count, const char *name) {
    const unsigned char *p = file, *end = p + count;
    int32_t header[HEADER_INTS] = {0};
    if (count < sizeof header)
        die("%s is %zu bytes, too short for a tokenizer file; make one with tokenizer/train_bpe", name, count);
    memcpy(header, p, sizeof header);
    p += sizeof header;
    int version = header[1], V = header[2], eot = header[3], mask = header[4];
    if (header[0] != MAGIC)
        die("%s is no tokenizer file: it starts with %d, not %d; make one with tokenizer/train_bpe", name, header[0],
            MAGIC);
    if (version != 1 && version != 2)
        die("%s is a tokenizer file of version %d, and only 1 and 2 are known; make it with tokenizer/train_bpe", name,
            version);
    if (version == 1) {
        eot = V - 1;
        mask = 0;
    } /* llm.c's first version: GPT-2 only, and not said in the header */
    if (V < 257 || V > MOST_ENTRIES - (mask == 0))
        die("%s has %d entries, and this program knows 257 to %d; make it again", name, V, MOST_ENTRIES - (mask == 0));
    if (eot < 0 || eot >= V || mask < 0 || mask >= V)
        die("%s has the special tokens %d and %d, outside its %d entries; make it again", name, eot, mask, V);
    Tokenizer *t = new_tokenizer(V);
    for (int id = 0; id < V; id++) {
        size_t n = p < end ? *p++ : 0;
        if (p == end || (size_t)(end - p) < n)
            die("%s is truncated: it ends in entry %d of %d; make it again", name, id, V);
        if (n == 0) die("%s: entry %d is empty; make it again", name, id);
        add_entry(t, id, p, n);
        p += n;
    }
    if (p != end) die("%s does not end after its %d entries, as it should; make it again", name, V);
    if (!entry_is(t, eot, EOT_TEXT))
        die("%s: entry %d should be %s and is something else; make it again", name, eot, EOT_TEXT);
    if (mask != 0 && !entry_is(t, mask, MASK_TEXT))
        die("%s: entry %d should be %s and is something else; make it again", name, mask, MASK_TEXT);
    t->eot = eot;
    t->mask = mask ? mask : V;
    finish(t, name);
    return t;
}

Tokenizer *tokenizer_load(const char *path) {
    size_t count;
    char *bytes = read_file(path, &count);
    Tokenizer *t = tokenizer_from_memory(bytes, count, path);
    free(bytes);
    return t;
}

void *tokenizer_to_memory(const Tokenizer *t, size_t *count) {
    int32_t header[HEADER_INTS] = {MAGIC, 2, t->V, t->eot, t->mask < t->V ? t->mask : 0};
    *count = sizeof header + (size_t)t->V + t->start[t->V];
    unsigned char *file = xmalloc(*count), *p = file + sizeof header;
    memcpy(file, header, sizeof header);
    for (int id = 0; id < t->V; id++) {
        size_t n = entry_bytes(t, id);
        *p++ = (unsigned char)n;
        memcpy(p, t->bytes + t->start[id], n);
        p += n;
    }
    return file;
}

void tokenizer_save(const Tokenizer *t, const char *path) {
    size_t count;
    void *bytes = tokenizer_to_memory(t, &count);
    FILE *f = create_file(path);
    xfwrite(bytes, 1, count, f, path);
    commit_file(f, path);
    free(bytes);
}

/* ---------------------------------------------------------------------- training

   The text is only its different words and how often each occurs. They stand in one array of sites, a site a token, in
   linked lists; each pair of neighbours knows its count and the list of the sites where it starts. A merge
   visits just those sites. All pairs that it makes contain the new entry, so no old pair's count ever grows: the heap's
   counts are upper bounds, and an item whose count is out of date is put back with the right one. */

typedef struct {
    const char *text;
    size_t bytes;
    uint64_t hash;
    int64_t count;
} Word;

typedef struct {
    uint32_t word;           /* index of its word, for the count */
    uint32_t previous, next; /* neighbours in the word; NONE at its ends */
    uint32_t pair;           /* index of the pair (this, next); NONE without next */
    /* sites where the same pair starts, from left to right: "aaa" has to become "aa", "a" */
    uint32_t earlier, later;
    int id;
} Site;

typedef struct {
    uint32_t key;         /* left id << 16 | right id */
    uint32_t first, last; /* sites */
    int64_t count;
} Pair;

typedef struct {
    Word *words;
    size_t word_count, word_room;
    Site *sites;
    size_t site_count;
    Pair *pairs;
    size_t pair_count, pair_room;
    uint32_t *slots; /* hash table, first of words, then of pairs; NONE: empty */
    size_t slot_count;
} Trainer;

static void new_slots(Trainer *r, size_t n) {
    free(r->slots);
    r->slots = xmalloc(n * sizeof *r->slots);
    r->slot_count = n;
    for (size_t i = 0; i < n; i++) r->slots[i] = NONE;
}

static void put_in_slot(Trainer *r, uint64_t hash, size_t index) {
    size_t i = hash & (r->slot_count - 1);
    while (r->slots[i] != NONE) i = (i + 1) & (r->slot_count - 1);
    r->slots[i] = (uint32_t)index;
}

static void count_word(Trainer *r, const char *text, size_t bytes) {
    uint64_t hash = hash_bytes(text, bytes);
    for (size_t i = hash & (r->slot_count - 1); r->slots[i] != NONE; i = (i + 1) & (r->slot_count - 1)) {
        Word *w = &r->words[r->slots[i]];
        if (w->hash == hash && w->bytes == bytes && memcmp(w->text, text, bytes) == 0) {
            w->count++;
            return;
        }
    }
    if (r->word_count == r->word_room)
        r->words = xrealloc(r->words, (r->word_room = 2 * r->word_room + 1024) * sizeof *r->words);
    r->words[r->word_count++] = (Word){text, bytes, hash, 1};
    r->site_count += bytes;
    if (r->site_count >= NONE)
        die("the training text has more than 4 GiB of different words, more than can be counted; use less text");
    if (2 * r->word_count > r->slot_count) {
        new_slots(r, 2 * r->slot_count);
        for (size_t i = 0; i < r->word_count; i++) put_in_slot(r, r->words[i].hash, i);
    } else {
        put_in_slot(r, hash, r->word_count - 1);
    }
}

static uint32_t find_pair(Trainer *r, uint32_t key) {
    for (size_t i = hash_pair(key) & (r->slot_count - 1); r->slots[i] != NONE; i = (i + 1) & (r->slot_count - 1))
        if (r->pairs[r->slots[i]].key == key) return r->slots[i];
    if (r->pair_count == r->pair_room)
        r->pairs = xrealloc(r->pairs, (r->pair_room = 2 * r->pair_room + 1024) * sizeof *r->pairs);
    r->pairs[r->pair_count++] = (Pair){key, NONE, NONE, 0};
    if (2 * r->pair_count > r->slot_count) {
        new_slots(r, 2 * r->slot_count);
        for (size_t i = 0; i < r->pair_count; i++) put_in_slot(r, hash_pair(r->pairs[i].key), i);
    } else {
        put_in_slot(r, hash_pair(key), r->pair_count - 1);
    }
    return (uint32_t)(r->pair_count - 1);
}

/* Enters the pair that starts at site i at the end of its list. Sites are entered from left to right, so lists are
   in order. */
static void enter_pair(Trainer *r, uint32_t i) {
    Site *s = &r->sites[i];
    if (s->next == NONE) return;
    s->pair = find_pair(r, (uint32_t)s->id << 16 | (uint32_t)r->sites[s->next].id);
    Pair *p = &r->pairs[s->pair];
    s->earlier = p->last;
    s->later = NONE;
    if (p->last == NONE) p->first = i;
    else r->sites[p->last].later = i;
    p->last = i;
    p->count += r->words[s->word].count;
}

static void leave_pair(Trainer *r, uint32_t i) {
    Site *s = &r->sites[i];
    if (s->pair == NONE) return;
    Pair *p = &r->pairs[s->pair];
    if (s->earlier == NONE) p->first = s->later;
    else r->sites[s->earlier].later = s->later;
    if (s->later == NONE) p->last = s->earlier;
    else r->sites[s->later].earlier = s->earlier;
    p->count -= r->words[s->word].count;
    s->pair = NONE;
}

static void merge_pair(Trainer *r, uint32_t pair, int id) {
    for (uint32_t i; (i = r->pairs[pair].first) != NONE;) {
        Site *s = &r->sites[i];
        uint32_t before = s->previous, gone = s->next;
        if (before != NONE) leave_pair(r, before);
        leave_pair(r, i);
        leave_pair(r, gone);
        s->id = id;
        s->next = r->sites[gone].next;
        if (s->next != NONE) r->sites[s->next].previous = i;
        if (before != NONE) enter_pair(r, before);
        enter_pair(r, i);
    }
}

/* GPT-2's order of the bytes: first those that print in Latin-1, then the others. Hugging Face's trainer has the same
   order, so that ties between pairs are decided alike. */
static void add_bytes(Tokenizer *t) {
    int id = 0;
    for (int pass = 0; pass < 2; pass++)
        for (int b = 0; b < 256; b++) {
            bool prints = (b >= '!' && b <= '~') || (b >= 0xA1 && b != 0xAD);
            unsigned char byte = (unsigned char)b;
            if (prints == (pass == 0)) {
                t->byte_id[b] = id;
                add_entry(t, id++, &byte, 1);
            }
        }
}

Tokenizer *tokenizer_train(const char *text, size_t bytes, int V, bool show_progress) {
    if (V < 258 || V > MOST_ENTRIES)
        die("a vocabulary of %d entries cannot be trained; 258 (the bytes and two special tokens) to %d are possible",
            V, MOST_ENTRIES);
    Tokenizer *t = new_tokenizer(V);
    Trainer trainer = {0}, *r = &trainer;
    add_bytes(t);

    new_slots(r, 1 << 16);
    const char *end = text + bytes;
    for (const char *p = text; p < end;) {
        const char *border = find(p, end, EOT_TEXT);
        for (size_t n; p < border; p += n) count_word(r, p, n = piece_bytes(t, p, (size_t)(border - p)));
        if (p < end) p += strlen(EOT_TEXT);
        if (show_progress) progress("reading", (double)(p - text), (double)bytes);
    }

    new_slots(r, 1 << 16);
    r->sites = xmalloc(r->site_count * sizeof *r->sites);
    uint32_t site = 0;
    for (size_t w = 0; w < r->word_count; w++) {
        size_t n = r->words[w].bytes;
        for (size_t i = 0; i < n; i++, site++)
            r->sites[site] = (Site){.word = (uint32_t)w,
                                    .previous = i > 0 ? site - 1 : NONE,
                                    .next = i + 1 < n ? site + 1 : NONE,
                                    .pair = NONE,
                                    .id = t->byte_id[(unsigned char)r->words[w].text[i]]};
    }
    for (uint32_t i = 0; i < site; i++) enter_pair(r, i);

    Item *heap = NULL;
    size_t waiting = 0, room = 0, known = 0; /* pairs known to the heap */
    for (int id = 256; id < V - 2; id++) {
        for (; known < r->pair_count; known++) {
            const Pair *p = &r->pairs[known];
            if (p->count == 0 || entry_bytes(t, (int)(p->key >> 16)) + entry_bytes(t, (int)(p->key & 0xFFFF)) > LONGEST)
                continue;
            if (waiting == room) heap = xrealloc(heap, (room = 2 * room + 1024) * sizeof *heap);
            heap_push(heap, &waiting, (Item){UINT64_MAX - (uint64_t)p->count, (uint64_t)p->key << 32 | known});
        }
        const Pair *p = NULL;
        while (waiting > 0) {
            p = &r->pairs[(uint32_t)heap[0].second];
            uint64_t order = UINT64_MAX - (uint64_t)p->count;
            if (heap[0].first == order) break;
            if (p->count == 0) {
                heap_pop(heap, &waiting);
            } else {
                heap[0].first = order;
                sift_down(heap, waiting, 0);
            }
        }
        if (waiting == 0)
            die("the training text has pairs for a vocabulary of %d entries only, not %d; ask for fewer entries or "
                "give more text",
                id + 2, V);
        uint32_t pair = (uint32_t)heap[0].second;
        heap_pop(heap, &waiting);
        char joined[2 * LONGEST];
        int left = (int)(p->key >> 16), right = (int)(p->key & 0xFFFF);
        size_t n = entry_bytes(t, left), m = entry_bytes(t, right);
        memcpy(joined, t->bytes + t->start[left], n);
        memcpy(joined + n, t->bytes + t->start[right], m);
        add_entry(t, id, joined, n + m);
        merge_pair(r, pair, id);
        if (show_progress) progress("learning", id - 255, V - 258);
    }
    free(heap);
    free(r->slots);
    free(r->pairs);
    free(r->sites);
    free(r->words);

    t->eot = V - 2;
    t->mask = V - 1;
    add_entry(t, t->eot, EOT_TEXT, strlen(EOT_TEXT));
    add_entry(t, t->mask, MASK_TEXT, strlen(MASK_TEXT));
    finish(t, "the trained vocabulary");
    return t;
}
