/* The tokenizer against a slow witness written here from the pattern itself, against ids from Hugging Face's
   tokenizers, against training worked out by hand, and against files that are not tokenizers. */
#include "test.h"

#include "../gsa/util.h"
#include "../tokenizer/tokenizer.h"

#include <stdarg.h>
#include <sys/wait.h>
#include <unistd.h>
#include <utf8proc.h>

/* ---------------------------------------------------------------------- helpers */

typedef struct {
    int *ids;
    size_t count, room;
} Ids;

static Ids encode(const Tokenizer *t, const char *text, size_t bytes, bool special) {
    Ids out = {NULL, 0, 0};
    tokenizer_encode(t, text, bytes, special, &out.ids, &out.count, &out.room);
    return out;
}

static bool same_ids(const Ids *a, const Ids *b) {
    return a->count == b->count && (a->count == 0 || memcmp(a->ids, b->ids, a->count * sizeof *a->ids) == 0);
}

static bool decodes_to(const Tokenizer *t, const Ids *ids, const char *text, size_t bytes) {
    size_t at = 0, n;
    for (size_t i = 0; i < ids->count; i++) {
        const char *piece = tokenizer_piece(t, ids->ids[i], &n);
        if (!piece || n > bytes - at || memcmp(text + at, piece, n) != 0) return false;
        at += n;
    }
    return at == bytes;
}

static bool round_trip(const Tokenizer *t, const char *text, size_t bytes) {
    bool good = true;
    for (int special = 0; special < 2; special++) {
        Ids ids = encode(t, text, bytes, special);
        good = good && decodes_to(t, &ids, text, bytes);
        free(ids.ids);
    }
    return good;
}

static Ids parse_ids(const char *text) {
    Ids out = {xmalloc(strlen(text) * sizeof(int) + 1), 0, 0};
    for (char *end; *text; text = end) {
        long id = strtol(text, &end, 10);
        if (end == text) break;
        out.ids[out.count++] = (int)id;
    }
    return out;
}

extern void __lsan_disable(void) __attribute__((weak)); /* there in a build with AddressSanitizer */

/* What a process that calls act(argument) writes to stderr, and how it ends. */
static int run_apart(void (*act)(const void *), const void *argument, char *said, size_t room) {
    int ends[2], status;
    fflush(stdout);
    if (pipe(ends) != 0) return -1;
    pid_t child = fork();
    if (child == 0) {
        dup2(ends[1], 2);
        close(ends[0]);
        close(ends[1]);
        if (__lsan_disable) __lsan_disable(); /* die() frees nothing */
        act(argument);
        _exit(0);
    }
    close(ends[1]);
    size_t n = 0;
    for (ssize_t got; n + 1 < room && (got = read(ends[0], said + n, room - 1 - n)) > 0;) n += (size_t)got;
    said[n] = 0;
    close(ends[0]);
    if (waitpid(child, &status, 0) != child || !WIFEXITED(status)) return -1;
    return WEXITSTATUS(status);
}

static bool one_sentence(const char *said) {
    const char *newline = strchr(said, '\n');
    return newline && newline > said && newline[1] == 0;
}

static void check_refused(void (*act)(const void *), const void *argument, const char *naming, const char *what) {
    char said[4096];
    int status = run_apart(act, argument, said, sizeof said);
    CHECK(status == 1 && one_sentence(said) && strstr(said, naming), "%s: status %d, said: %.300s", what, status, said);
}

/* clang-format off */
static const char *const text_parts[] = {
    "a", "b", "ab", "the", " the", "aaaa", " ", "  ", "\t", "\n", "\r\n", "\v\f", "'", "'s", "'t", "'re", "'ve", "'m",
    "'ll", "'d", "'S", "'l", "''", "0", "12", "!", "?", "--", "<", "|", ">", "<|endoftext|>", "[MASK]", "<|endoftext",
    "\x7f", "\303\244", "\303\274ber", "\316\261\316\262", "\344\270\255\346\226\207", "\331\241", "\342\205\247",
    "\302\262", "\302\240", "\302\205", "\343\200\200", "\342\200\250", "\342\200\213", "\341\240\216",
    "\341\232\200", "\360\237\220\214", "e\314\201", "\357\273\277", "\357\277\275", "\360\235\204\236",
    "\360\220\214\260", "\034", "hours", " rain", "return"};
static const char *const broken_parts[] = { /* no UTF-8 */
    "\200", "\277", "\300\200", "\301\277", "\302", "\340\200\257", "\342\202", "\355\240\200", "\360\237\230",
    "\360\200\200\257", "\364\220\200\200", "\370\210\200\200\200", "\377", "\376"};
/* clang-format on */

/* Text with a bias to what the splitting pattern cares about: valid, or with broken UTF-8 in it. */
static size_t random_text(uint64_t *rng, char *out, size_t room, bool broken) {
    size_t n = 0;
    for (;;) {
        char one[2] = {(char)rng_below(rng, 256), 0};
        const char *part = text_parts[rng_below(rng, sizeof text_parts / sizeof *text_parts)];
        if (broken && rng_below(rng, 4) == 0)
            part = rng_below(rng, 2) ? one : broken_parts[rng_below(rng, sizeof broken_parts / sizeof *broken_parts)];
        size_t m = part == one ? 1 : strlen(part); /* a byte of 0 counts */
        if (n + m > room) return n;
        memcpy(out + n, part, m);
        n += m;
    }
}

/* ---------------------------------------------------------------------- the slow witness

   The pattern's alternatives one after the other, each by the rules of a backtracking matcher over decoded
   characters; merging by looking through all pairs again after each merge; training by counting all pairs again
   after each merge. */

typedef struct {
    char class; /* L, N, S or O */
    size_t bytes;
} Char;

static Char char_at(const unsigned char *p, size_t left) {
    static const struct {
        unsigned char low, high, second_low, second_high;
        int bytes;
    } forms[] = {/* table 3-7 of the Unicode standard: well-formed byte sequences */
                 {0x00, 0x7F, 0, 0, 1},       {0xC2, 0xDF, 0x80, 0xBF, 2}, {0xE0, 0xE0, 0xA0, 0xBF, 3},
                 {0xE1, 0xEC, 0x80, 0xBF, 3}, {0xED, 0xED, 0x80, 0x9F, 3}, {0xEE, 0xEF, 0x80, 0xBF, 3},
                 {0xF0, 0xF0, 0x90, 0xBF, 4}, {0xF1, 0xF3, 0x80, 0xBF, 4}, {0xF4, 0xF4, 0x80, 0x8F, 4}};
    for (size_t f = 0; f < sizeof forms / sizeof *forms; f++) {
        if (p[0] < forms[f].low || p[0] > forms[f].high) continue;
        int n = forms[f].bytes, code = n == 1 ? p[0] : p[0] & (0xFF >> (n + 1));
        if ((size_t)n > left || (n > 1 && (p[1] < forms[f].second_low || p[1] > forms[f].second_high))) break;
        for (int i = 1; i < n; i++) {
            if (p[i] < 0x80 || p[i] > 0xBF) return (Char){'O', 1};
            code = code << 6 | (p[i] & 0x3F);
        }
        bool control_space = (code >= 9 && code <= 13) || code == 0x85;
        char category = utf8proc_category_string(code)[0];
        return (Char){control_space || category == 'Z'     ? 'S'
                      : category == 'L' || category == 'N' ? category
                                                           : 'O',
                      (size_t)n};
    }
    return (Char){'O', 1};
}

static size_t match_contraction(const char *p, size_t left) {
    static const char *all[] = {"'s", "'t", "'re", "'ve", "'m", "'ll", "'d"};
    for (int i = 0; i < 7; i++)
        if (strlen(all[i]) <= left && memcmp(p, all[i], strlen(all[i])) == 0) return strlen(all[i]);
    return 0;
}

static size_t match_run(const char *text, size_t left, char class) {
    size_t n = 0;
    while (n < left) {
        Char c = char_at((const unsigned char *)text + n, left - n);
        if (c.class != class) break;
        n += c.bytes;
    }
    return n;
}

static size_t match_space_run(const char *text, size_t left, char class) {
    if (left > 0 && text[0] == ' ') {
        size_t n = match_run(text + 1, left - 1, class);
        if (n > 0) return n + 1;
    }
    return match_run(text, left, class);
}

/* \s+(?!\S): the longest run of white space that is not followed by a character that is none */
static size_t match_space_before_space(const char *text, size_t left) {
    size_t best = 0;
    for (size_t n = 0; n < left;) {
        Char c = char_at((const unsigned char *)text + n, left - n);
        if (c.class != 'S') break;
        n += c.bytes;
        if (n == left || char_at((const unsigned char *)text + n, left - n).class == 'S') best = n;
    }
    return best;
}

static size_t naive_piece(const char *text, size_t left) {
    size_t n = match_contraction(text, left);
    if (!n) n = match_space_run(text, left, 'L');
    if (!n) n = match_space_run(text, left, 'N');
    if (!n) n = match_space_run(text, left, 'O');
    if (!n) n = match_space_before_space(text, left);
    if (!n) n = match_run(text, left, 'S');
    return n;
}

/* joined[a * V + b]: the entry that is a's bytes and then b's, or -1 */
static int *join_table(const Tokenizer *t) {
    int V = tokenizer_vocab_size(t), *joined = xmalloc((size_t)V * V * sizeof *joined);
    for (int i = 0; i < V * V; i++) joined[i] = -1;
    for (int id = 0; id < V; id++) {
        size_t n, na, nb;
        const char *bytes = tokenizer_piece(t, id, &n), *a, *b;
        if (id == tokenizer_eot(t) || id == tokenizer_mask(t)) continue;
        for (int i = 0; i < V; i++) {
            a = tokenizer_piece(t, i, &na);
            if (na >= n || memcmp(a, bytes, na) != 0) continue;
            for (int j = 0; j < V; j++) {
                b = tokenizer_piece(t, j, &nb);
                if (na + nb == n && memcmp(b, bytes + na, nb) == 0) joined[i * V + j] = id;
            }
        }
    }
    return joined;
}

static int byte_entry(const Tokenizer *t, char byte) {
    size_t n;
    for (int id = 0; id < tokenizer_vocab_size(t); id++) {
        const char *piece = tokenizer_piece(t, id, &n);
        if (n == 1 && piece[0] == byte) return id;
    }
    return -1;
}

static void naive_ordinary(const Tokenizer *t, const int *joined, const char *text, size_t bytes, Ids *out) {
    int V = tokenizer_vocab_size(t);
    for (size_t at = 0, n; at < bytes; at += n) {
        n = naive_piece(text + at, bytes - at);
        int *id = out->ids + out->count;
        size_t count = n;
        for (size_t i = 0; i < n; i++) id[i] = byte_entry(t, text[at + i]);
        for (;;) {
            int smallest = V;
            size_t best = 0;
            for (size_t i = 0; i + 1 < count; i++) {
                int rank = joined[id[i] * V + id[i + 1]];
                if (rank >= 0 && rank < smallest) {
                    smallest = rank;
                    best = i;
                }
            }
            if (smallest == V) break;
            id[best] = smallest;
            for (size_t i = best + 1; i + 1 < count; i++) id[i] = id[i + 1];
            count--;
        }
        out->count += count;
    }
}

static Ids naive_encode(const Tokenizer *t, const int *joined, const char *text, size_t bytes, bool special) {
    Ids out = {xmalloc(bytes * sizeof(int) + 1), 0, 0};
    size_t from = 0, at = 0;
    while (special && at < bytes) {
        bool eot = bytes - at >= 13 && memcmp(text + at, "<|endoftext|>", 13) == 0,
             mask = bytes - at >= 6 && memcmp(text + at, "[MASK]", 6) == 0;
        if (!eot && !mask) {
            at++;
            continue;
        }
        naive_ordinary(t, joined, text + from, at - from, &out);
        out.ids[out.count++] = eot ? tokenizer_eot(t) : tokenizer_mask(t);
        from = at += eot ? 13 : 6;
    }
    naive_ordinary(t, joined, text + from, bytes - from, &out);
    return out;
}

/* The same file as tokenizer_to_memory's, learned slowly; t gives only the bytes' order. */
static unsigned char *naive_train(const char *text, size_t bytes, int V, const Tokenizer *t, size_t *file_bytes) {
    typedef struct {
        unsigned char bytes[256];
        size_t count;
    } Entry;
    enum { END = -1 };
    Entry *entries = xcalloc((size_t)V, sizeof *entries);
    int *ids = xmalloc((2 * bytes + 1) * sizeof *ids), *counts = xmalloc((size_t)V * V * sizeof *counts);
    size_t n = 0;
    for (int b = 0; b < 256; b++) entries[byte_entry(t, (char)b)] = (Entry){{(unsigned char)b}, 1};
    for (size_t at = 0; at < bytes;) { /* pieces one after the other, END after each */
        size_t border = at;
        while (border < bytes && !(bytes - border >= 13 && memcmp(text + border, "<|endoftext|>", 13) == 0)) border++;
        while (at < border) {
            size_t length = naive_piece(text + at, border - at);
            for (size_t i = 0; i < length; i++) ids[n++] = byte_entry(t, text[at + i]);
            ids[n++] = END;
            at += length;
        }
        at = border < bytes ? border + 13 : border;
    }
    for (int id = 256; id < V - 2; id++) {
        memset(counts, 0, (size_t)V * V * sizeof *counts);
        for (size_t i = 0; i + 1 < n; i++)
            if (ids[i] != END && ids[i + 1] != END) counts[ids[i] * V + ids[i + 1]]++;
        int best = -1;
        for (int k = 0; k < V * V; k++)
            if (counts[k] > 0 && entries[k / V].count + entries[k % V].count <= 255 &&
                (best < 0 || counts[k] > counts[best]))
                best = k;
        if (best < 0) {
            V = 0;
            break;
        }
        Entry *e = &entries[id], *a = &entries[best / V], *b = &entries[best % V];
        memcpy(e->bytes, a->bytes, a->count);
        memcpy(e->bytes + a->count, b->bytes, b->count);
        e->count = a->count + b->count;
        size_t to = 0;
        for (size_t i = 0; i < n; i++) {
            bool pair = i + 1 < n && ids[i] == best / V && ids[i + 1] == best % V;
            ids[to++] = pair ? id : ids[i];
            i += pair;
        }
        n = to;
    }
    int32_t header[256] = {20240328, 2, V, V - 2, V - 1};
    unsigned char *file = xmalloc(sizeof header + (size_t)V * 256), *p = file + sizeof header;
    memcpy(file, header, sizeof header);
    for (int id = 0; id < V; id++) {
        if (id == V - 2) memcpy(entries[id].bytes, "<|endoftext|>", entries[id].count = 13);
        if (id == V - 1) memcpy(entries[id].bytes, "[MASK]", entries[id].count = 6);
        *p++ = (unsigned char)entries[id].count;
        memcpy(p, entries[id].bytes, entries[id].count);
        p += entries[id].count;
    }
    *file_bytes = (size_t)(p - file);
    free(entries);
    free(ids);
    free(counts);
    return file;
}

/* ---------------------------------------------------------------------- golden ids

   From Hugging Face tokenizers 0.23.3: BpeTrainer with ByteLevel, 400 entries learned from training_text split at
   <|endoftext|> (their ids renumbered: they put special tokens first), and GPT-2's vocabulary with [MASK] added. */

static const char training_text[] =
    "The quick snail met the slow fox at the old mill. \"It's raining,\" said the fox, \"and we'll get wet!\"\n"
    "\"I've 12 leaves,\" the snail replied, \"you're welcome to 3 of them; they'd keep us dry.\"\n"
    "They sat under the leaves, and the rain went on and on: 1 hour, 2 hours, 12 hours.\n"
    "F\303\274r die Schnecke war's sch\303\266n, f\303\274r den Fuchs nicht. \303\234ber der M\303\274hle schien "
    "sp\303\244ter die Sonne.\n"
    "<|endoftext|>\n"
    "def wait(hours):\n"
    "    for hour in range(hours):\n"
    "        print(\"rain\", hour)\n"
    "\n"
    "    return \"dry\"\n"
    "<|endoftext|>\n"
    "In the morning the fox didn't say a word, he'd caught a cold; the snail said: \"I'm sorry, I can't help, but "
    "there's tea.\"\n";

static const struct {
    const char *text, *learned, *gpt2;
} golden[] = {
    {"", "", ""},
    {" ", "220", "220"},
    {"a", "64", "64"},
    {"The snail and the fox.", "302 296 313 259 295 13", "464 47374 290 262 21831 13"},
    {"it's 'tis they'll we've I'm you'd don't y'all 'S 'LL",
     "72 83 279 220 6 83 72 82 259 88 334 293 333 389 332 220 381 297 266 78 77 298 220 88 6 64 306 220 6 50 220 6 43 "
     "43",
     "270 338 705 48010 484 1183 356 1053 314 1101 345 1549 836 470 331 6 439 705 50 705 3069"},
    {"  two  spaces   three\n\n\nlines \t tab ",
     "220 257 86 78 220 258 79 64 66 68 82 260 257 71 309 68 198 198 198 75 276 68 82 220 197 257 64 65 220",
     "220 734 220 9029 220 220 1115 628 198 6615 220 197 7400 220"},
    {"12 leaves 1234567 3.14 a1b2", "16 17 328 327 18 19 20 21 22 388 13 16 19 288 16 65 17",
     "1065 5667 17031 2231 3134 513 13 1415 257 16 65 17"},
    {"M\303\274hle sch\303\266n \303\274ber na\303\257ve \303\206r\303\270 \357\254\201n \307\205",
     "341 356 68 317 385 220 285 345 220 77 64 127 107 284 220 127 228 81 127 116 220 171 105 223 77 220 131 227",
     "44 9116 71 293 5513 48863 6184 120 527 41492 6184 228 81 24172 27332 105 223 77 220 131 227"},
    {"\344\270\255\346\226\207\345\255\227 \355\225\234\352\265\255\354\226\264 \330\250\330\263\331\205 "
     "\331\241\331\242 \342\205\247 \302\262\302\275",
     "160 116 255 162 244 229 161 255 245 220 169 243 250 166 113 255 168 244 112 220 148 101 148 111 149 227 220 149 "
     "94 149 95 220 158 227 100 220 126 110 126 121",
     "40792 23877 229 27764 245 220 47991 250 166 113 255 168 244 112 17550 101 45692 25405 18923 94 149 95 2343 227 "
     "100 1587 110 23141"},
    {"\360\237\220\214\360\237\246\212 rain!? ... --- ((x))",
     "172 253 238 234 172 253 99 232 320 0 30 220 13 13 13 220 12 12 12 220 7 7 87 8 8",
     "8582 238 234 8582 99 232 6290 22857 2644 11420 14808 87 4008"},
    {"a\302\240b\343\200\200c\342\200\250d\302\205e\342\200\213f",
     "64 126 254 65 159 222 222 66 158 222 101 67 126 227 68 158 222 233 69",
     "64 1849 65 5099 222 66 447 101 67 126 227 68 9525 69"},
    {"<|endoftext|>[MASK]", "398 399", "50256 50257"},
    {"x<|endoftext|> y [MASK] z", "87 398 220 88 220 399 220 89", "87 50256 331 220 50257 1976"},
    {"!!!?\?? '''s \"'re\" ''ll", "0 0 0 30 30 30 220 6 6 6 82 269 6 309 1 220 6 6 306",
     "10185 28358 705 7061 82 24018 260 1 10148 297"},
    {"for hour in range(hours):\n\n    print(hour)\n",
     "69 277 272 390 271 267 353 7 318 299 386 397 276 83 7 265 8 198",
     "1640 1711 287 2837 7 24425 2599 628 220 220 220 3601 7 9769 8 198"},
    {"e\314\201 \340\244\225\340\244\277 \314\201x", "68 136 223 220 156 97 243 156 97 123 220 136 223 87",
     "68 136 223 28225 243 11976 123 220 136 223 87"},
    {"trailing   ", "83 81 261 75 322 260 220", "9535 4386 220 220 220"},
    {"\r\n\r\nline\r\n  ", "201 198 201 198 75 276 68 201 286", "201 198 201 198 1370 201 198 220 220"},
    {"aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
     "64 64 64 64 64 64 64 64 64 64 64 64 64 64 64 64 64 64 64 64 64 64 64 64 64 64 64 64 64 64 64 64 64 64 64 64 64 "
     "64 64 64 64 64 64 64 64 64 64 64 64 64 64 64 64 64 64 64 64 64 64 64 64 64 64 64 64 64 64 64 64 64 64",
     "24794 24794 24794 24794 24794 24794 24794 24794 24794 24794 24794 24794 24794 24794 24794 24794 24794 46071"},
};

static const Tokenizer *learned_tokenizer(void) {
    static Tokenizer *t;
    if (!t) t = tokenizer_train(training_text, strlen(training_text), 400, false);
    return t;
}

static void check_golden(const Tokenizer *t, bool gpt2) {
    for (size_t i = 0; i < sizeof golden / sizeof *golden; i++) {
        const char *text = golden[i].text;
        Ids expected = parse_ids(gpt2 ? golden[i].gpt2 : golden[i].learned), got = encode(t, text, strlen(text), true);
        CHECK(same_ids(&got, &expected), "golden text %zu, %s vocabulary: %zu ids, %zu expected", i,
              gpt2 ? "GPT-2's" : "learned", got.count, expected.count);
        CHECK(round_trip(t, text, strlen(text)), "golden text %zu does not come back", i);
        free(expected.ids);
        free(got.ids);
    }
}

/* ---------------------------------------------------------------------- training */

typedef struct {
    const char *text;
    int V;
} Training;

static void train(const void *argument) {
    const Training *a = argument;
    tokenizer_free(tokenizer_train(a->text, strlen(a->text), a->V, false));
}

static bool entry_is(const Tokenizer *t, int id, const char *text) {
    size_t n;
    const char *piece = tokenizer_piece(t, id, &n);
    return piece && n == strlen(text) && memcmp(piece, text, n) == 0;
}

static void test_training_by_hand(void) {
    /* Pieces "aaab", " aaab", " ab". aa 4, ab 3, " a" 2: aa. Then (a, b) 3, (aa, a) 2: ab. Then (aa, ab) 2. Then ("
       ", ab) and (" ", aaab) once each, and ab has the smaller id. */
    const char *text = "aaab aaab ab", *merges[] = {"aa", "ab", "aaab", " ab", " aaab"};
    Tokenizer *t = tokenizer_train(text, strlen(text), 263, false);
    CHECK(tokenizer_vocab_size(t) == 263 && tokenizer_eot(t) == 261 && tokenizer_mask(t) == 262,
          "size and special tokens of the example");
    for (int i = 0; i < 5; i++) CHECK(entry_is(t, 256 + i, merges[i]), "the example's merge %d is '%s'", i, merges[i]);
    CHECK(entry_is(t, 261, "<|endoftext|>") && entry_is(t, 262, "[MASK]"), "special entries");
    CHECK(entry_is(t, 0, "!") && entry_is(t, 220, " ") && entry_is(t, 64, "a"), "bytes are in GPT-2's order");
    size_t n = 1;
    CHECK(!tokenizer_piece(t, 263, &n) && !tokenizer_piece(t, -1, &n), "ids outside the vocabulary have no bytes");
    tokenizer_free(t);
    check_refused(train, &(Training){text, 264}, "263", "more entries than pairs");
    check_refused(train, &(Training){text, 257}, "257", "a vocabulary of 257");
    check_refused(train, &(Training){text, 65537}, "65537", "a vocabulary of 65537");
    check_refused(train, &(Training){"", 259}, "258", "an empty training text");

    t = tokenizer_train("", 0, 258, false);
    CHECK(round_trip(t, text, strlen(text)), "bytes alone make a vocabulary");
    tokenizer_free(t);

    /* <|endoftext|> is no text and joins nothing: only "xy" is left */
    const char *bordered = "xy<|endoftext|>xy<|endoftext|><|endoftext|>xy";
    t = tokenizer_train(bordered, strlen(bordered), 259, false);
    CHECK(entry_is(t, 256, "xy"), "a border is not learned");
    tokenizer_free(t);
    check_refused(train, &(Training){bordered, 260}, "259", "pairs across <|endoftext|>");

    /* 4096 letters a: 2, 4, ... 128 of them become entries; 256 do not fit into the file */
    char run[4097];
    memset(run, 'a', 4096);
    run[4096] = 0;
    t = tokenizer_train(run, 4096, 265, false);
    size_t longest;
    tokenizer_piece(t, 262, &longest);
    CHECK(longest == 128 && round_trip(t, run, 4096), "doubling up to 128, got %zu", longest);
    tokenizer_free(t);
    check_refused(train, &(Training){run, 266}, "265", "entries of 256 bytes");
}

static void test_training_against_naive(void) {
    uint64_t rng = 11;
    for (int trial = 0; trial < 12; trial++) {
        char text[1500];
        /* few letters make ties and overlapping runs; the other trials have every kind of character */
        size_t bytes = trial % 2 ? random_text(&rng, text, sizeof text, trial % 4 == 3) : sizeof text;
        if (trial % 2 == 0)
            for (size_t i = 0; i < bytes; i++) text[i] = "aaabc  "[rng_below(&rng, trial % 4 ? 7 : 4)];
        int V = trial % 4 == 0 ? 300 : 330;
        Tokenizer *t = tokenizer_train(text, bytes, V, false), *again = tokenizer_train(text, bytes, V, false);
        size_t n, m, k;
        unsigned char *file = tokenizer_to_memory(t, &n), *same = tokenizer_to_memory(again, &m),
                      *naive = naive_train(text, bytes, V, t, &k);
        CHECK(n == m && memcmp(file, same, n) == 0, "training twice gives the same, trial %d", trial);
        CHECK(n == k && memcmp(file, naive, n) == 0, "training against counting anew, trial %d", trial);
        free(file);
        free(same);
        free(naive);
        tokenizer_free(t);
        tokenizer_free(again);
    }
}

/* ---------------------------------------------------------------------- encoding */

static void test_encoding_against_naive(const Tokenizer *t) {
    int *joined = join_table(t);
    uint64_t rng = 5;
    size_t room = 3000;
    char *text = xmalloc(room);
    int different = 0, lost = 0;
    for (int trial = 0; trial < 600; trial++) {
        size_t bytes = random_text(&rng, text, rng_below(&rng, trial % 20 ? 60 : room), trial % 2);
        if (trial % 50 == 7) { /* pieces of 20 to 620 letters, on both sides of where the heap takes over */
            bytes = 20 + (size_t)trial;
            for (size_t i = 0; i < bytes; i++) text[i] = "rainhoursthe"[rng_below(&rng, 12)];
        }
        for (int special = 0; special < 2; special++) {
            Ids got = encode(t, text, bytes, special), expected = naive_encode(t, joined, text, bytes, special);
            if (!same_ids(&got, &expected)) different++;
            if (!decodes_to(t, &got, text, bytes)) lost++;
            free(got.ids);
            free(expected.ids);
        }
    }
    CHECK(different == 0, "%d of 1200 encodings differ from the naive one", different);
    CHECK(lost == 0, "%d of 1200 encodings do not decode to their text", lost);
    free(text);
    free(joined);
}

static void test_round_trips(const Tokenizer *t) {
    uint64_t rng = 3;
    size_t room = 200000;
    char *noise = xmalloc(room);
    for (size_t i = 0; i < room; i++) noise[i] = (char)rng_below(&rng, 256);
    CHECK(round_trip(t, noise, room), "random bytes come back");
    memset(noise, 0, room);
    CHECK(round_trip(t, noise, room), "zero bytes come back");
    for (int b = 0; b < 256; b++) {
        char one = (char)b;
        Ids ids = encode(t, &one, 1, false);
        CHECK(ids.count == 1 && decodes_to(t, &ids, &one, 1), "the byte 0x%02X is one token", b);
        free(ids.ids);
    }
    free(noise);

    Ids ids = {NULL, 0, 0};
    tokenizer_encode(t, NULL, 0, true, &ids.ids, &ids.count, &ids.room);
    CHECK(ids.count == 0, "no text, no ids");
    tokenizer_encode(t, "rain", 4, true, &ids.ids, &ids.count, &ids.room);
    size_t first = ids.count;
    tokenizer_encode(t, " rain rain", 10, true, &ids.ids, &ids.count, &ids.room);
    CHECK(first > 0 && ids.count > first && ids.room >= ids.count && decodes_to(t, &ids, "rain rain rain", 14),
          "encode appends");
    free(ids.ids);

    const char *text = "rain<|endoftext|>[MASK]<|endoftext|";
    Ids with = encode(t, text, strlen(text), true), without = encode(t, text, strlen(text), false);
    int eots = 0, masks = 0, specials = 0;
    for (size_t i = 0; i < with.count; i++) {
        eots += with.ids[i] == tokenizer_eot(t);
        masks += with.ids[i] == tokenizer_mask(t);
    }
    for (size_t i = 0; i < without.count; i++)
        specials += without.ids[i] == tokenizer_eot(t) || without.ids[i] == tokenizer_mask(t);
    CHECK(eots == 1 && masks == 1 && specials == 0, "special tokens only where asked for: %d %d %d", eots, masks,
          specials);
    CHECK(decodes_to(t, &with, text, strlen(text)), "special tokens decode to their text");
    free(with.ids);
    free(without.ids);
}

static void test_long_pieces(void) {
    size_t n = 1000000;
    char *text = xmalloc(n);
    uint64_t rng = 9;
    memset(text, 'a', n / 2);
    for (size_t i = n / 2; i < n; i++) text[i] = (char)('a' + rng_below(&rng, 4));
    double start = now_seconds();
    Tokenizer *t = tokenizer_train(text, n, 1000, false); /* one word of a million letters */
    CHECK(round_trip(t, text, n), "a word of a million letters");
    memset(text, 'a', n);
    CHECK(round_trip(t, text, n), "a million times the same letter");
    memset(text, ' ', n);
    CHECK(round_trip(t, text, n), "a million spaces");
    text[n - 1] = 'x';
    CHECK(round_trip(t, text, n), "a million spaces and a letter");
    for (size_t i = 0; i + 1 < n; i += 2) memcpy(text + i, "\303\244", 2);
    CHECK(round_trip(t, text, n), "half a million letters of two bytes");
    memset(text, '\377', n);
    CHECK(round_trip(t, text, n), "a million broken bytes");
    for (size_t i = 0; i < n; i++) text[i] = "[<"[i & 1];
    CHECK(round_trip(t, text, n), "half a million beginnings of special tokens");
    double seconds = now_seconds() - start;
    CHECK(seconds < 60, "long pieces take n log n, not n^2: %.1f s", seconds);
    tokenizer_free(t);
    free(text);
}

static void test_threads(const Tokenizer *t) {
    char text[20000];
    uint64_t rng = 21;
    size_t bytes = random_text(&rng, text, sizeof text, true);
    Ids expected = encode(t, text, bytes, true);
    int different = 0;
#pragma omp parallel for reduction(+ : different)
    for (int i = 0; i < 64; i++) {
        Ids got = encode(t, text, bytes, true);
        different += !same_ids(&got, &expected);
        free(got.ids);
    }
    CHECK(different == 0, "%d of 64 encodings at the same time differ", different);
    free(expected.ids);
}

/* ---------------------------------------------------------------------- files */

typedef struct {
    const unsigned char *bytes;
    size_t count;
} File;

static void load_bytes(const void *argument) {
    const File *f = argument;
    tokenizer_free(tokenizer_from_memory(f->bytes, f->count, "the bad file"));
}

static void load_path(const void *argument) { tokenizer_free(tokenizer_load(argument)); }

static void test_saving(const Tokenizer *t, const unsigned char *file, size_t n, const char *path) {
    size_t m;
    Tokenizer *again = tokenizer_from_memory(file, n, "the file");
    unsigned char *twice = tokenizer_to_memory(again, &m);
    CHECK(n == m && memcmp(file, twice, n) == 0, "reading and writing again gives the same bytes");
    check_golden(again, false);
    tokenizer_free(again);
    free(twice);

    tokenizer_save(t, path);
    char *saved = read_file(path, &m);
    CHECK(n == m && memcmp(file, saved, n) == 0, "saved as in memory");
    again = tokenizer_load(path);
    check_golden(again, false);
    tokenizer_free(again);
    free(saved);

    int32_t header[256];
    memcpy(header, file, sizeof header);
    CHECK(header[0] == 20240328 && header[1] == 2 && header[2] == 400 && header[3] == 398 && header[4] == 399,
          "the header is llm.c's, and [MASK] in word 4");
}

/* Cut short anywhere: everywhere in the header and at its end, and in steps through the entries. Removes path. */
static void test_truncated(const unsigned char *file, size_t n, const char *path, const char *folder) {
    for (size_t cut = 0; cut < n; cut += cut < 1020 ? 51 : cut < 1030 ? 1 : 37) {
        check_refused(load_bytes, &(File){file, cut}, cut < 1024 ? "the bad file is" : "the bad file is truncated",
                      "cut short");
    }
    check_refused(load_bytes, &(File){file, n - 1}, "the bad file is truncated", "the last byte is missing");
    write_file(path, file, n / 2);
    check_refused(load_path, path, path, "a truncated file on disk");
    write_file(path, "", 0);
    check_refused(load_path, path, path, "an empty file");
    unlink(path);
    check_refused(load_path, path, path, "a file that is not there");
    check_refused(load_path, folder, folder, "a folder");
}

/* copy: room for n bytes and 300 more; here and below. */
static void test_wrong_headers(const unsigned char *file, size_t n, unsigned char *copy) {
    static const struct {
        int word, value;
        const char *what;
    } words[] = {{0, 20240520, "a shard's magic"},
                 {0, 0, "magic 0"},
                 {1, 0, "version 0"},
                 {1, 3, "version 3"},
                 {1, 1, "version 1 of another vocabulary"},
                 {2, 399, "V too small"},
                 {2, 401, "V too large"},
                 {2, 0, "V of 0"},
                 {2, -1, "V of -1"},
                 {2, 2000000000, "V of 2 billion"},
                 {3, 400, "eot at V"},
                 {3, -1, "eot of -1"},
                 {3, 5, "eot at another entry"},
                 {4, 400, "[MASK] at V"},
                 {4, -5, "[MASK] of -5"},
                 {4, 7, "[MASK] at another entry"},
                 {4, 398, "[MASK] at eot"},
                 {3, 399, "eot at [MASK]"}};
    for (size_t i = 0; i < sizeof words / sizeof *words; i++) {
        memcpy(copy, file, n);
        memcpy(copy + 4 * words[i].word, &words[i].value, 4);
        check_refused(load_bytes, &(File){copy, n}, "the bad file", words[i].what);
    }
}

/* The file's header for V entries, of which the last two are <|endoftext|> and [MASK]. */
static void copy_header(unsigned char *copy, const unsigned char *file, int32_t V) {
    int32_t header[256];
    memcpy(header, file, sizeof header);
    header[2] = V;
    header[3] = V - 2;
    header[4] = V - 1;
    memcpy(copy, header, sizeof header);
}

static void test_wrong_entries(const unsigned char *file, size_t n, unsigned char *copy) {
    memcpy(copy, file, n);
    copy[n] = 0;
    check_refused(load_bytes, &(File){copy, n + 1}, "the bad file does not end", "a byte too many");
    memcpy(copy, file, n);
    copy[1024 + 1] = copy[1024 + 3]; /* entry 0 gets entry 1's byte */
    check_refused(load_bytes, &(File){copy, n}, "the bad file: entries 0 and 1 are the same", "the same entry twice");
    size_t at = 1024 + 2 * 256; /* the first merge */
    memcpy(copy, file, at);
    copy[at] = 0;
    memcpy(copy + at + 1, file + at, n - at);
    copy_header(copy, file, 401);
    check_refused(load_bytes, &(File){copy, n + 1}, "the bad file: entry 256 is empty", "an empty entry");
    memcpy(copy + at, "\x01!", 2);
    memcpy(copy + at + 2, file + at, n - at);
    check_refused(load_bytes, &(File){copy, n + 2}, "the bad file: entries 0 and 256 are the same", "a byte twice");
    memcpy(copy, file, at);
    memcpy(copy + at, "\x05qzqzq", 6);
    memcpy(copy + at + 6, file + at, n - at);
    copy_header(copy, file, 401);
    check_refused(load_bytes, &(File){copy, n + 6}, "the bad file: entry 256 is not", "an entry that no merge makes");
    memcpy(copy + 1024, file + 1024 + 2, n - 1024 - 2); /* entry 0, the byte '!', is gone */
    copy_header(copy, file, 399);
    check_refused(load_bytes, &(File){copy, n - 2}, "the bad file has no entry for the byte 0x21",
                  "a byte without entry");
}

/* GPT-2 as llm.c writes it has no [MASK], and in its first version no id of <|endoftext|>. */
static void test_without_mask(const unsigned char *file, size_t n, unsigned char *copy) {
    for (int version = 1; version <= 2; version++) {
        size_t m;
        memcpy(copy, file, n - 7);
        int32_t without[256] = {20240328, version, 399, version == 2 ? 398 : 0};
        memcpy(copy, without, sizeof without);
        Tokenizer *other = tokenizer_from_memory(copy, n - 7, "llm.c's file");
        CHECK(tokenizer_vocab_size(other) == 399 && tokenizer_eot(other) == 398 && tokenizer_mask(other) == 399,
              "version %d without [MASK]: it is the first id of the padding", version);
        CHECK(round_trip(other, "[MASK] rain", 11), "[MASK] in the padding comes back");
        unsigned char *back = tokenizer_to_memory(other, &m);
        without[1] = 2;
        without[3] = 398;
        CHECK(m == n - 7 && memcmp(back, without, sizeof without) == 0 &&
                  memcmp(back + 1024, file + 1024, m - 1024) == 0,
              "and is not written");
        free(back);
        tokenizer_free(other);
    }
}

static void test_files(const Tokenizer *t, const char *folder) {
    size_t n;
    unsigned char *file = tokenizer_to_memory(t, &n), *copy = xmalloc(n + 300);
    char *path = xasprintf("%s/saved.bin", folder);
    test_saving(t, file, n, path);
    test_truncated(file, n, path, folder);
    test_wrong_headers(file, n, copy);
    test_wrong_entries(file, n, copy);
    test_without_mask(file, n, copy);
    free(path);
    free(copy);
    free(file);
}

/* ---------------------------------------------------------------------- programs */

__attribute__((format(printf, 3, 4))) static int command(char *said, size_t room, const char *format, ...) {
    va_list args;
    char *line = NULL;
    va_start(args, format);
    if (vasprintf(&line, format, args) < 0) abort();
    va_end(args);
    fflush(stdout);
    FILE *f = popen(line, "r");
    free(line);
    if (!f) return -1;
    size_t n = fread(said, 1, room - 1, f);
    said[n] = 0;
    int status = pclose(f);
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

/* GPT-2's two files for another vocabulary; damage 0: none, else one of the mistakes below */
static void write_gpt2_files(const Tokenizer *t, const char *folder, int damage) {
    char *json_path = xasprintf("%s/encoder.json", folder), *merges_path = xasprintf("%s/vocab.bpe", folder);
    FILE *json = xfopen(json_path, "w"), *merges = xfopen(merges_path, "w");
    int *joined = join_table(t), V = tokenizer_vocab_size(t) - 1; /* without [MASK] */
    char spelled[400][1100];
    for (int id = 0; id < V; id++) {
        size_t n;
        const unsigned char *p = (const unsigned char *)tokenizer_piece(t, id, &n);
        char *out = spelled[id];
        for (size_t i = 0; i < n; i++) {
            int others = 256, code = p[i];
            bool prints = (code >= '!' && code <= '~') || (code >= 0xA1 && code != 0xAD);
            for (int b = 0; b < p[i]; b++) others += !((b >= '!' && b <= '~') || (b >= 0xA1 && b != 0xAD));
            if (!prints) code = others;
            if (code < 128) *out++ = (char)code;
            else {
                *out++ = (char)(0xC0 | code >> 6);
                *out++ = (char)(0x80 | (code & 0x3F));
            }
        }
        *out = 0;
    }
    fprintf(json, damage == 1 ? "[" : "{");
    for (int id = 0; id < V; id++) {
        fprintf(json, "%s\"", id ? ", " : "");
        for (const char *p = spelled[id]; *p; p++) fprintf(json, *p == '"' || *p == '\\' ? "\\%c" : "%c", *p);
        fprintf(json, "\": %d",
                damage == 2 && id == 300   ? 301
                : damage == 3 && id < 2    ? 1 - id
                : damage == 4 && id == 300 ? -1
                                           : id);
    }
    fprintf(json, "}\n");
    fprintf(merges, "#version: 0.2\n");
    for (int id = 256; id < V - 1; id++) {
        int k = 0, wanted = damage == 5 && id == 300 ? 301 : damage == 5 && id == 301 ? 300 : id;
        if (damage == 6 && id == V - 2) break;
        /* of several pairs with the same bytes, the one of smallest ids: any will do for the comparison */
        while (joined[k / V * (V + 1) + k % V] != wanted) k++;
        fprintf(merges, damage == 7 && id == 310 ? "%s%s\n" : "%s %s\n", spelled[k / V], spelled[k % V]);
    }
    fclose(json);
    fclose(merges);
    free(joined);
    free(json_path);
    free(merges_path);
}

/* Two programs and the files of their tests. said: what the last command wrote. */
typedef struct {
    char *train_bpe, *tokenize;
    const char *folder;
    char *text;          /* a file of training_text */
    char *path;          /* a tokenizer learned from it */
    unsigned char *file; /* what should stand there, n bytes */
    size_t n;
    char said[100000];
} Programs;

static void test_train_bpe(Programs *p) {
    const char *train_bpe = p->train_bpe, *folder = p->folder, *text = p->text;
    char *said = p->said;
    const size_t room = sizeof p->said;
    size_t m;
    CHECK(command(said, room, "%s --vocab 400 --out %s/p.bin %s 2>&1", train_bpe, folder, text) == 0 &&
              one_sentence(said) && strstr(said, "400 entries"),
          "train_bpe: %s", said);
    char *written = read_file(p->path, &m);
    CHECK(p->n == m && memcmp(p->file, written, m) == 0, "train_bpe writes what tokenizer_train learns");
    free(written);
    CHECK(command(said, room, "%s --vocab 400 --out %s/q.bin - < %s && cmp %s/q.bin %s", train_bpe, folder, text,
                  folder, p->path) == 0,
          "train_bpe reads standard input");
    CHECK(command(said, room, "%s --vocab 60k --out %s/q.bin %s 2>&1", train_bpe, folder, text) == 1 &&
              one_sentence(said),
          "too small a text: %s", said);
    CHECK(command(said, room, "%s --vocab 100 --out %s/q.bin %s 2>&1", train_bpe, folder, text) == 2 &&
              one_sentence(said),
          "too small a vocabulary: %s", said);
    CHECK(command(said, room, "%s --vocab 300 %s 2>&1", train_bpe, text) == 2 && one_sentence(said) &&
              strstr(said, "--out"),
          "no --out: %s", said);
    CHECK(command(said, room, "%s --out %s/q.bin 2>&1", train_bpe, folder) == 2 && one_sentence(said), "no text: %s",
          said);
    CHECK(command(said, room, "%s --out %s/q.bin %s/nothing 2>&1", train_bpe, folder, folder) == 1 &&
              one_sentence(said) && strstr(said, "nothing"),
          "a text that is not there: %s", said);
}

static void test_tokenize(Programs *p) {
    const char *tokenize = p->tokenize, *path = p->path, *text = p->text;
    char *said = p->said;
    const size_t room = sizeof p->said;
    for (int binary = 0; binary < 2; binary++) {
        const char *flag = binary ? "--binary" : "";
        CHECK(command(said, room, "%s encode --special %s --tokenizer %s %s | %s decode %s --tokenizer %s", tokenize,
                      flag, path, text, tokenize, flag, path) == 0 &&
                  strcmp(said, training_text) == 0,
              "tokenize encode %s | tokenize decode %s", flag, flag);
    }
    CHECK(command(said, room, "printf 'The snail and the fox.' | %s encode --tokenizer %s", tokenize, path) == 0 &&
              strcmp(said, "302 296 313 259 295 13\n") == 0,
          "tokenize encode: %s", said);
    CHECK(command(said, room, "%s list --tokenizer %s | wc -l", tokenize, path) == 0 && atoi(said) == 400,
          "list has a line an entry: %s", said);
    if (access("/dev/full", W_OK) != 0) skip("a full disk", "this system has no /dev/full");
    else
        CHECK(command(said, room, "%s encode --tokenizer %s %s 2>&1 >/dev/full", tokenize, path, text) == 1 &&
                  one_sentence(said),
              "a full disk: %s", said);
}

static void test_tokenize_refusals(Programs *p) {
    const char *tokenize = p->tokenize, *path = p->path, *text = p->text;
    char *said = p->said;
    const size_t room = sizeof p->said;
    CHECK(command(said, room, "echo 302 400 | %s decode --tokenizer %s 2>&1 >/dev/null", tokenize, path) == 1 &&
              one_sentence(said) && strstr(said, "400"),
          "an id outside: %s", said);
    CHECK(command(said, room, "echo 302 99999999999999 | %s decode --tokenizer %s 2>&1 >/dev/null", tokenize, path) ==
                  1 &&
              one_sentence(said),
          "an id far outside: %s", said);
    CHECK(command(said, room, "echo 302 -1 | %s decode --tokenizer %s 2>&1 >/dev/null", tokenize, path) == 1 &&
              one_sentence(said) && strstr(said, "-1"),
          "a negative id: %s", said);
    CHECK(command(said, room, "echo 12x | %s decode --tokenizer %s 2>&1", tokenize, path) == 1 && one_sentence(said) &&
              strstr(said, "12x"),
          "no number: %s", said);
    CHECK(command(said, room, "printf 123 | %s decode --binary --tokenizer %s 2>&1", tokenize, path) == 1 &&
              one_sentence(said),
          "half an id: %s", said);
    CHECK(command(said, room, "%s encode 2>&1 </dev/null", tokenize) == 2 && one_sentence(said) &&
              strstr(said, "--tokenizer"),
          "no --tokenizer: %s", said);
    CHECK(command(said, room, "%s draw --tokenizer %s 2>&1 </dev/null", tokenize, path) == 2 && one_sentence(said) &&
              strstr(said, "draw"),
          "no such thing to do: %s", said);
    CHECK(command(said, room, "%s encode --tokenizer %s %s 2>&1", tokenize, text, text) == 1 && one_sentence(said) &&
              strstr(said, text),
          "text as tokenizer: %s", said);
}

/* Our own vocabulary in the form of GPT-2's files, whole and damaged; GPT-2's own where GSA_DATA has it. */
static void test_import(const Tokenizer *t, Programs *p) {
    const char *train_bpe = p->train_bpe, *folder = p->folder, *path = p->path, *data = getenv("GSA_DATA");
    char *said = p->said;
    const size_t room = sizeof p->said;
    size_t m;
    write_gpt2_files(t, folder, 0);
    CHECK(command(said, room, "%s --gpt2 %s --out %s 2>&1", train_bpe, folder, path) == 0 && one_sentence(said) &&
              strstr(said, "399 entries"),
          "import: %s", said);
    char *written = read_file(path, &m);
    CHECK(m == p->n - 7 && memcmp(p->file + 1024, written + 1024, m - 1024) == 0,
          "import of our own vocabulary in GPT-2's form");
    free(written);
    for (int damage = 1; damage <= 7; damage++) {
        write_gpt2_files(t, folder, damage);
        CHECK(command(said, room, "%s --gpt2 %s --out %s 2>&1", train_bpe, folder, path) == 1 && one_sentence(said) &&
                  strstr(said, folder),
              "import with damage %d: %s", damage, said);
    }
    if (!data) {
        skip("GPT-2's vocabulary", "GSA_DATA names no folder with gpt2/encoder.json and gpt2/vocab.bpe");
        return;
    }
    int status = command(said, room, "%s --gpt2 %s/gpt2 --out %s 2>&1", train_bpe, data, path);
    if (!CHECK(status == 0, "GPT-2's vocabulary: %s", said)) return;
    Tokenizer *gpt2 = tokenizer_load(path);
    CHECK(tokenizer_vocab_size(gpt2) == 50257 && tokenizer_eot(gpt2) == 50256 && tokenizer_mask(gpt2) == 50257,
          "GPT-2's sizes");
    check_golden(gpt2, true);
    test_round_trips(gpt2);
    tokenizer_free(gpt2);
}

static void test_programs(const Tokenizer *t, const char *folder) {
    static Programs p;
    const char *out = getenv("OUT");
    p.train_bpe = xasprintf("%stokenizer/train_bpe", out ? out : "");
    p.tokenize = xasprintf("%stokenizer/tokenize", out ? out : "");
    if (access(p.train_bpe, X_OK) == 0 && access(p.tokenize, X_OK) == 0) {
        p.folder = folder;
        p.text = xasprintf("%s/text", folder);
        p.path = xasprintf("%s/p.bin", folder);
        p.file = tokenizer_to_memory(t, &p.n);
        write_file(p.text, training_text, strlen(training_text));
        test_train_bpe(&p);
        test_tokenize(&p);
        test_tokenize_refusals(&p);
        test_import(t, &p);
        free(p.text);
        free(p.path);
        free(p.file);
    } else skip("train_bpe and tokenize", "the programs are not built; make, and run in the repository's folder");
    free(p.train_bpe);
    free(p.tokenize);
}

int main(int argc, char **argv) {
    (void)argc;
    program_name(argv[0]);
    char folder[] = "/tmp/test_tokenizer_XXXXXX", said[4096];
    if (!mkdtemp(folder)) die("cannot make a folder in /tmp");
    const Tokenizer *t = learned_tokenizer();
    test_training_by_hand();
    test_training_against_naive();
    check_golden(t, false);
    test_encoding_against_naive(t);
    test_round_trips(t);
    test_long_pieces();
    test_files(t, folder);
    test_programs(t, folder);
    test_threads(t); /* last: the tests above fork, and OpenMP's threads would not be there in the child */
    command(said, sizeof said, "rm -r %s", folder);
    tokenizer_free((Tokenizer *)t);
    return test_summary("test_tokenizer");
}
