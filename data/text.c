#include "text.h"

#include <errno.h>
#include <stdlib.h>

enum { CHUNK = 1 << 18, LONGEST_RUN = 64 << 20 };
static const char separator[] = "<|endoftext|>";
enum { SEPARATOR = sizeof separator - 1 };

/* ---------------------------------------------------------------------- what is no text, or another encoding */

#define UNPACK(program) ": unpack it first (" program " -dc FILE writes it to standard output)"
static const struct {
    size_t bytes;
    const char *start, *what;
} formats[] = {
    {2, "\x1F\x8B", "compressed by gzip" UNPACK("gzip")},
    {6, "\xFD\x37zXZ\0", "compressed by xz" UNPACK("xz")},
    {4, "\x28\xB5\x2F\xFD", "compressed by zstd" UNPACK("zstd")},
    {10, "BZh91AY&SY", "compressed by bzip2" UNPACK("bzip2")},
    {6, "7z\xBC\xAF\x27\x1C", "a 7-Zip archive: unpack it first"},
    {4, "PK\3\4", "a zip archive: unpack it first"},
    {4, "PAR1", "a Parquet file: write its column of text into a file, documents separated by <|endoftext|>"},
    {5, "%PDF-", "a PDF file: take its text out first"},
    {8, "\x89PNG\r\n\x1A\n", "a picture"},
    {6, "\x93NUMPY", "a NumPy array"},
    {4, "GGUF", "a GGUF model"},
};

/* Files of int32 that begin with a magic number, in either order of bytes. */
static const struct {
    uint32_t magic;
    const char *what;
} numbered[] = {
    {20240520, "a shard of tokens"},
    {20240801, "a Llama-3 shard with 32-bit tokens; here a shard has 16-bit tokens, as llm.c writes them for GPT-2"},
    {20240328, "a tokenizer"},
    {20240326, "a model of llm.c"},
    {20261123, "a model or a run's state"},
};

const char *known_format(const void *start, size_t bytes) {
    const unsigned char *p = (const unsigned char *)start;
    for (size_t i = 0; i < sizeof formats / sizeof *formats; i++)
        if (bytes >= formats[i].bytes && memcmp(p, formats[i].start, formats[i].bytes) == 0) return formats[i].what;
    for (size_t i = 0; i < sizeof numbered / sizeof *numbered && bytes >= 4; i++) {
        uint32_t little = (uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
        if (little == numbered[i].magic) return numbered[i].what;
        if (__builtin_bswap32(little) == numbered[i].magic)
            return "a file of tokens or of a model in the other order of bytes (big-endian): make it again here";
    }
    /* the length of a JSON object in 8 bytes, then the object */
    if (bytes >= 9 && p[8] == '{' && memcmp(p + 4, "\0\0\0\0", 4) == 0) return "a safetensors model";
    return NULL;
}

/* Every second byte is 0, and no other one: letters of most scripts in UTF-16 without a mark. */
static bool has_zeros_by_turns(const unsigned char *p, size_t bytes) {
    size_t zeros[2] = {0, 0}, n = bytes < 256 ? bytes : 256;
    for (size_t i = 0; i < n; i++) zeros[i % 2] += p[i] == 0;
    return n >= 16 && (zeros[0] == 0 || zeros[1] == 0) && zeros[0] + zeros[1] > n / 3;
}

/* Looks at the first bytes of a text; returns how many of them are a byte-order mark of UTF-8: 3 or 0. */
static size_t look_at_start(const char *start, size_t bytes, const char *name) {
    const unsigned char *p = (const unsigned char *)start;
    const char *format = known_format(start, bytes);
    if (format) die("%s is no text; it is %s", name, format);
    if ((bytes >= 2 && (p[0] ^ p[1]) == 1 && (p[0] | p[1]) == 0xFF) || has_zeros_by_turns(p, bytes))
        warn("%s seems to be in UTF-16, and is read as UTF-8 all the same; iconv -f UTF-16 -t UTF-8 makes that of it",
             name);
    return bytes >= 3 && memcmp(start, "\xEF\xBB\xBF", 3) == 0 ? 3 : 0;
}

char *read_text(const char *path, size_t *bytes) {
    char *text = read_file(path, bytes);
    size_t mark = look_at_start(text, *bytes, input_name(path));
    *bytes -= mark;
    return (char *)memmove(text, text + mark, *bytes + 1);
}

/* ---------------------------------------------------------------------- documents */

static bool is_newline(char c) { return c == '\n' || c == '\r'; }

/* May the character that ends before p be white space, in any script? Says yes too often, never too seldom. */
static bool may_end_in_space(const char *begin, const char *p) {
    unsigned char a = (unsigned char)p[-1], b = p - begin >= 2 ? (unsigned char)p[-2] : 0,
                  c = p - begin >= 3 ? (unsigned char)p[-3] : 0;
    if (a < 128) return a <= ' ' || a == 127;
    return b == 0xC2 || (c == 0xE1 && b == 0x9A) || (c == 0xE2 && (b == 0x80 || b == 0x81)) || (c == 0xE3 && b == 0x80);
}

/* GPT-2's pattern has a border before such white space whatever follows, as white space stands only at the start of a
   piece, and what comes before looks no further than the white space. */
size_t safe_cut(const char *text, size_t bytes) {
    for (size_t i = bytes; i-- > 1;)
        if ((text[i] == ' ' || text[i] == '\n') && !may_end_in_space(text, text + i)) return i;
    return 0;
}

/* CHUNK more bytes, behind those that are not taken yet. */
static void read_more(Documents *d) {
    memmove(d->buffer, d->buffer + d->at, d->held - d->at);
    d->held -= d->at;
    d->searched -= d->at < d->searched ? d->at : d->searched;
    d->at = 0;
    if (d->held + CHUNK > d->room) d->buffer = (char *)xrealloc(d->buffer, d->room = 2 * (d->held + CHUNK));
    size_t got = fread(d->buffer + d->held, 1, CHUNK, d->f);
    if (ferror(d->f) && errno == EINTR) die("interrupted; nothing was changed");
    if (ferror(d->f)) die("cannot read %s: %s", d->name, strerror(errno));
    d->held += got;
    d->read += (double)got;
    d->end = got < CHUNK;
}

Documents *documents_behind(FILE *f, const char *name, const void *start, size_t bytes) {
    Documents *d = (Documents *)xcalloc(1, sizeof *d);
    d->f = f;
    d->name = xstrdup(name);
    d->room = bytes + 2 * CHUNK;
    d->buffer = (char *)memcpy(xmalloc(d->room), start, bytes);
    d->held = bytes;
    d->read = (double)bytes;
    read_more(d);
    d->at = look_at_start(d->buffer, d->held, name);
    if (d->at) warn("%s begins with a byte-order mark, which is passed over", name);
    return d;
}

Documents *documents_open(const char *path) { return documents_behind(open_input(path), input_name(path), "", 0); }

void documents_close(Documents *d) {
    close_input(d->f);
    free(d->name);
    free(d->buffer);
    free(d);
}

/* Takes `bytes` of what is held, of which the first `used` are the part at hand. False: that is none. */
static bool take_part(Documents *d, size_t used, size_t bytes, bool ends) {
    d->text = d->buffer + d->at;
    d->bytes = used;
    d->begins = !d->open;
    d->documents += used > 0 && d->begins;
    d->open = !ends && (d->open || used > 0);
    d->at += bytes;
    if (d->searched < d->at) d->searched = d->at;
    return used > 0;
}

/* The same for the rest of a document: `bytes` without the line ends at their end, and `behind` of a separator. */
static bool take_end(Documents *d, size_t bytes, size_t behind) {
    size_t used = bytes;
    while (used > 0 && is_newline(d->buffer[d->at + used - 1])) used--;
    return take_part(d, used, bytes + behind, true);
}

bool documents_next(Documents *d) {
    for (;;) {
        while (!d->open && d->at < d->held && is_newline(d->buffer[d->at])) d->at++;
        if (d->searched < d->at) d->searched = d->at;
        char *from = d->buffer + d->searched,
             *found = (char *)memmem(from, d->held - d->searched, separator, SEPARATOR);
        if (found) {
            if (take_end(d, (size_t)(found - d->buffer) - d->at, SEPARATOR)) return true;
            continue;
        }
        /* the last bytes may be the first of a separator */
        if (d->held >= d->searched + SEPARATOR) d->searched = d->held - SEPARATOR + 1;
        size_t left = d->held - d->at;
        if (d->end) return take_end(d, left, 0);
        if (left >= CHUNK) {
            size_t cut = safe_cut(d->buffer + d->at, left);
            if (cut == 0 && left > LONGEST_RUN)
                die("%s has more than %d MB without any white space; is it text?", d->name, LONGEST_RUN >> 20);
            if (cut > 0) return take_part(d, cut, cut, false);
        }
        read_more(d);
    }
}
