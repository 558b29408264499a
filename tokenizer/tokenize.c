/* Text to token ids and back, and a look at a vocabulary. */
#include "../data/text.h"
#include "../gsa/flags.h"
#include "tokenizer.h"

#include <stdlib.h>
#include <string.h>
#include <utf8proc.h>

static const char *usage =
    "usage: tokenizer/tokenize encode --tokenizer T.bin [FILE]   text to ids\n"
    "       tokenizer/tokenize decode --tokenizer T.bin [FILE]   ids to text\n"
    "       tokenizer/tokenize list --tokenizer T.bin            the vocabulary, a line an entry\n"
    "Without FILE, standard input is read.\n\n";

static void encode(const Tokenizer *t, const char *text, size_t bytes, bool special, bool binary) {
    int *ids = NULL;
    size_t count = 0, room = 0;
    tokenizer_encode(t, text, bytes, special, &ids, &count, &room);
    for (size_t i = 0; i < count; i++) {
        uint16_t id = (uint16_t)ids[i];
        if (binary) fwrite(&id, sizeof id, 1, stdout);
        else printf("%d%c", ids[i], i % 16 == 15 || i + 1 == count ? '\n' : ' ');
    }
    free(ids);
}

static void write_token(const Tokenizer *t, long id, const char *path) {
    size_t n;
    const char *piece = id >= 0 && id <= 65535 ? tokenizer_piece(t, (int)id, &n) : NULL;
    if (!piece)
        die("%s: the id %ld is not in the vocabulary, which has 0 to %d; use the tokenizer that made the ids", path, id,
            tokenizer_vocab_size(t) - 1);
    fwrite(piece, 1, n, stdout);
}

static void decode(const Tokenizer *t, const char *file, size_t bytes, bool binary, const char *path) {
    if (binary) {
        if (bytes % 2)
            die("%s has %zu bytes, an odd number, and an id has two; is it a file of encode --binary?", path, bytes);
        for (size_t i = 0; i < bytes; i += 2) {
            uint16_t id;
            memcpy(&id, file + i, 2);
            write_token(t, id, path);
        }
        return;
    }
    const char white[] = " \t\n\v\f\r";
    for (const char *p = file, *end = file + bytes; p < end;) {
        size_t n = 0;
        while (p < end && *p && strchr(white, *p)) p++;
        while (p + n < end && !(p[n] && strchr(white, p[n]))) n++;
        if (n == 0) break;
        long id = 0;
        for (size_t i = 0; i < n; i++) {
            if (p[i] < '0' || p[i] > '9' || n > 9)
                die("%s: '%.*s' is not a token id; decode reads whole numbers, or uint16 with --binary", path,
                    n > 40 ? 40 : (int)n, p);
            id = 10 * id + (p[i] - '0');
        }
        write_token(t, id, path);
        p += n;
    }
}

/* Whole printing characters as they are, everything else as \xNN. */
static void print_quoted(const char *bytes, size_t n) {
    const utf8proc_uint8_t *p = (const utf8proc_uint8_t *)bytes, *end = p + n;
    putchar('"');
    while (p < end) {
        utf8proc_int32_t code;
        utf8proc_ssize_t length = utf8proc_iterate(p, end - p, &code);
        utf8proc_category_t category = length > 0 ? utf8proc_category(code) : UTF8PROC_CATEGORY_CC;
        bool prints =
            category >= UTF8PROC_CATEGORY_LU && category <= UTF8PROC_CATEGORY_SO && category != UTF8PROC_CATEGORY_MN;
        if (length < 1) length = 1;
        if (*p == '\n') fputs("\\n", stdout);
        else if (*p == '"' || *p == '\\') printf("\\%c", *p);
        else if (*p == ' ' || prints) fwrite(p, 1, (size_t)length, stdout);
        else
            for (utf8proc_ssize_t i = 0; i < length; i++) printf("\\x%02X", p[i]);
        p += length;
    }
    putchar('"');
}

static void list(const Tokenizer *t) {
    int V = tokenizer_vocab_size(t), mask = tokenizer_mask(t);
    for (int id = 0; id < V || id == mask; id++) {
        size_t n;
        const char *piece = tokenizer_piece(t, id, &n);
        printf("%d\t", id);
        print_quoted(piece, n);
        puts(id == tokenizer_eot(t) ? "\tspecial"
             : id != mask           ? ""
             : id < V               ? "\tspecial"
                                    : "\tspecial, in the padding: the file has none");
    }
}

int main(int argc, char **argv) {
    program_name(argv[0]);
    const char *path = NULL;
    bool special = false, binary = false;
    Flag flags[] = {
        {FLAG_TEXT, "tokenizer", &path, 0, 0, "FILE", "the tokenizer file, from tokenizer/train_bpe or llm.c", false},
        {FLAG_SWITCH, "special", &special, 0, 0, NULL,
         "encode: <|endoftext|> and [MASK] in the text become their tokens", false},
        {FLAG_SWITCH, "binary", &binary, 0, 0, NULL, "ids are uint16 instead of decimal", false},
        {0},
    };
    int words = parse_flags(flags, argc, argv, usage);
    const char *what = words > 0 ? argv[1] : "", *input = words > 1 ? argv[2] : "-";
    bool listing = strcmp(what, "list") == 0, encoding = strcmp(what, "encode") == 0;
    if (!listing && !encoding && strcmp(what, "decode") != 0)
        die_usage("first comes what to do: encode, decode or list, not '%s'", what);
    if (words > (listing ? 1 : 2))
        die_usage("'%s' is too much: %s", argv[listing ? 2 : 3],
                  listing ? "list reads no text" : "only one file is read at a time");
    if (!path) die_usage("--tokenizer FILE is missing; make one with tokenizer/train_bpe");
    if (special && !encoding) die_usage("--special is for encode only");
    if (binary && listing) die_usage("--binary is for encode and decode only");

    Tokenizer *t = tokenizer_load(path);
    if (listing) {
        list(t);
    } else {
        size_t bytes;
        char *file = encoding ? read_text(input, &bytes) : read_file(input, &bytes);
        if (encoding) encode(t, file, bytes, special, binary);
        else decode(t, file, bytes, binary, input_name(input));
        free(file);
    }
    tokenizer_free(t);
    return 0;
}
