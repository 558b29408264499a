/* Learns a byte-level BPE vocabulary from text, or takes GPT-2's as it was published. */
#include "../data/json.h"
#include "../data/text.h"
#include "../gsa/flags.h"
#include "tokenizer.h"

#include <stdlib.h>
#include <string.h>

static const char *usage =
    "usage: tokenizer/train_bpe --vocab 4096 --out T.bin TEXT...\n"
    "       tokenizer/train_bpe --gpt2 FOLDER --out T.bin [TEXT...]\n"
    "TEXT are files, or - for standard input. <|endoftext|> in them is a border between documents.\n\n";

/* ---------------------------------------------------------------------- GPT-2's two files */

typedef struct {
    unsigned char bytes[255];
    size_t count;
} Entry;

/* encoder.json and vocab.bpe write a byte as a character: itself where it prints in Latin-1, else 256 and up in
   order. byte_of[character] is its byte, -1 where there is none; GPT-2's ids 0 to 255 are the bytes in the order of
   order[]. */
static void byte_characters(int byte_of[512], int order[256]) {
    int id = 0, others = 256;
    for (int c = 0; c < 512; c++) byte_of[c] = -1;
    for (int pass = 0; pass < 2; pass++)
        for (int b = 0; b < 256; b++) {
            bool prints = (b >= '!' && b <= '~') || (b >= 0xA1 && b != 0xAD);
            if (prints != (pass == 0)) continue;
            byte_of[prints ? b : others++] = b;
            order[id++] = b;
        }
}

/* Appends the bytes that count characters stand for; false where they stand for none or too many. Only one and two byte
   UTF-8 can occur. */
static bool append(Entry *entry, const char *text, size_t count, const int byte_of[512]) {
    const unsigned char *p = (const unsigned char *)text, *end = p + count;
    while (p < end) {
        int c = *p++;
        if (c >= 0xC0 && c < 0xE0 && p < end) c = (c & 0x1F) << 6 | (*p++ & 0x3F);
        else if (c >= 0x80) return false;
        if (c >= 512 || byte_of[c] < 0 || entry->count == sizeof entry->bytes) return false;
        entry->bytes[entry->count++] = (unsigned char)byte_of[c];
    }
    return true;
}

static Tokenizer *read_gpt2(const char *folder) {
    char *json_path = xasprintf("%s/encoder.json", folder), *merges_path = xasprintf("%s/vocab.bpe", folder);
    size_t json_bytes, merges_bytes;
    char *json = read_text(json_path, &json_bytes), *merges = read_text(merges_path, &merges_bytes);
    int byte_of[512], order[256];
    byte_characters(byte_of, order);

    cJSON *root = json_object(json, json_bytes, json_path, 1);
    int V = cJSON_GetArraySize(root);
    if (V < 257 || V > 65535) die("%s has %d entries, not 257 to 65535; download it again", json_path, V);
    static Entry *entries; /* static: LeakSanitizer finds it where a refusal ends the program */
    entries = xcalloc((size_t)V, sizeof *entries);
    const char eot[] = "<|endoftext|>";
    for (const cJSON *item = root->child; item; item = item->next) {
        double id = cJSON_IsNumber(item) ? item->valuedouble : -1;
        if (!(id >= 0 && id < V) || id != (int)id || entries[(int)id].count > 0)
            die("%s: the id of \"%s\" is missing, doubled or not in 0 to %d; download it again", json_path,
                item->string, V - 1);
        if (!append(&entries[(int)id], item->string, strlen(item->string), byte_of) || entries[(int)id].count == 0)
            die("%s: \"%s\" is not 1 to 255 bytes in GPT-2's spelling; download it again", json_path, item->string);
    }
    for (int id = 0; id < 256; id++)
        if (entries[id].count != 1 || entries[id].bytes[0] != order[id])
            die("%s: entry %d is not the byte 0x%02X, so the order is not GPT-2's; download it again", json_path, id,
                order[id]);
    if (entries[V - 1].count != strlen(eot) || memcmp(entries[V - 1].bytes, eot, strlen(eot)) != 0)
        die("%s: the last entry, %d, is not %s; download it again", json_path, V - 1, eot);

    /* a line of vocab.bpe is a merge, "LEFT RIGHT"; the first line is its version */
    int line = 0, id = 256;
    const char *end = merges + merges_bytes;
    for (const char *p = merges, *stop; p < end; p = stop + 1) {
        stop = memchr(p, '\n', (size_t)(end - p));
        if (!stop) stop = end;
        line++;
        const char *last = stop > p && stop[-1] == '\r' ? stop - 1 : stop;
        if (p == last || (line == 1 && *p == '#')) continue;
        const char *space = memchr(p, ' ', (size_t)(last - p));
        Entry joined = {.count = 0};
        if (!space || !append(&joined, p, (size_t)(space - p), byte_of) ||
            !append(&joined, space + 1, (size_t)(last - space - 1), byte_of))
            die("%s: line %d is not two entries in GPT-2's spelling; download it again", merges_path, line);
        if (id >= V - 1 || joined.count != entries[id].count ||
            memcmp(joined.bytes, entries[id].bytes, joined.count) != 0)
            die("%s: the merge in line %d is not entry %d of %s; the two files are not of one vocabulary", merges_path,
                line, id, json_path);
        id++;
    }
    if (id != V - 1)
        die("%s has %d merges and %s has %d; the two files are not of one vocabulary", merges_path, id - 256, json_path,
            V - 257);

    int32_t header[256] = {20240328, 2, V, V - 1};
    unsigned char *file = xmalloc(sizeof header + (size_t)V * 256), *out = file + sizeof header;
    memcpy(file, header, sizeof header);
    for (int i = 0; i < V; i++) {
        *out++ = (unsigned char)entries[i].count;
        memcpy(out, entries[i].bytes, entries[i].count);
        out += entries[i].count;
    }
    Tokenizer *t = tokenizer_from_memory(file, (size_t)(out - file), json_path);
    free(file);
    free(entries);
    cJSON_Delete(root);
    free(json);
    free(merges);
    free(json_path);
    free(merges_path);
    return t;
}

/* ---------------------------------------------------------------------- main */

/* The documents of all files, with <|endoftext|> between them. */
static char *read_texts(int count, char **paths, size_t *bytes) {
    const char border[] = "<|endoftext|>";
    size_t room = 1;
    char *text = xmalloc(room);
    *bytes = 0;
    for (int i = 0; i < count; i++) {
        Documents *d = documents_open(paths[i]);
        while (documents_next(d)) {
            if (*bytes + d->bytes + sizeof border > room)
                text = xrealloc(text, room = 2 * (*bytes + d->bytes + sizeof border));
            if (d->begins && *bytes > 0) {
                memcpy(text + *bytes, border, sizeof border - 1);
                *bytes += sizeof border - 1;
            }
            memcpy(text + *bytes, d->text, d->bytes);
            *bytes += d->bytes;
        }
        documents_close(d);
    }
    return text;
}

int main(int argc, char **argv) {
    program_name(argv[0]);
    int64_t vocab = 4096;
    const char *out = NULL, *gpt2 = NULL;
    Flag flags[] = {
        {FLAG_INT, "vocab", &vocab, 258, 65536, "N", "entries, the 256 bytes and the two special tokens included",
         false},
        {FLAG_TEXT, "out", &out, 0, 0, "FILE", "the tokenizer file to write", false},
        {FLAG_TEXT, "gpt2", &gpt2, 0, 0, "FOLDER",
         "take GPT-2's vocabulary from FOLDER/encoder.json and FOLDER/vocab.bpe", false},
        {0},
    };
    int texts = parse_flags(flags, argc, argv, usage);
    if (!out) die_usage("--out FILE is missing: where to write the tokenizer");
    if (gpt2 && find_flag(flags, "vocab")->given)
        die_usage("--vocab and --gpt2 exclude each other: GPT-2's vocabulary has its own size");
    if (!gpt2 && texts == 0) die_usage("no text is given to learn from; name files, or - for standard input");

    double start = now_seconds();
    size_t bytes;
    char *text = read_texts(texts, argv + 1, &bytes);
    Tokenizer *t = gpt2 ? read_gpt2(gpt2) : tokenizer_train(text, bytes, (int)vocab, true);
    tokenizer_save(t, out);
    double seconds = now_seconds() - start;

    int *ids = NULL;
    size_t count = 0, room = 0;
    tokenizer_encode(t, text, bytes, true, &ids, &count, &room);
    printf("%s: %d entries", out, tokenizer_vocab_size(t));
    if (count > 0)
        printf(", %.3f bytes per token on %.1f MB of text", (double)bytes / (double)count, (double)bytes / 1e6);
    printf(", %.2f s\n", seconds);
    free(ids);
    free(text);
    tokenizer_free(t);
    return 0;
}
