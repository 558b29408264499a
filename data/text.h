/* Text in: what every program here reads as text, it reads through this file, so that the same text becomes the same
   tokens as a file, as a shard and as a prompt.

   Documents are separated by <|endoftext|>; line ends (\n and \r) next to it, and at the ends of a file, belong to the
   separator, and all other bytes to the documents. A byte-order mark at the start of a file is passed over. Files that
   are no text are refused by what they are: compressed ones, shards, models. Text in UTF-16 gives a warning. */
#ifndef GSA_TEXT_H
#define GSA_TEXT_H

#include "../gsa/util.h"

#ifdef __cplusplus
extern "C" {
#endif

/* A whole file, as read_file of util.h; "-" is standard input. */
char *read_text(const char *path, size_t *bytes);

/* What a file is by its first bytes, and what to do with it, such as "compressed by gzip: unpack it first"; NULL where
   it may be text. */
const char *known_format(const void *start, size_t bytes);

/* The documents of a file, one after the other and long ones in parts, in constant memory. A part ends where the
   tokens of the document do not depend on what follows. */
typedef struct {
    const char *text; /* the part at hand, `bytes` of it, at least one; until the next is asked for */
    size_t bytes;
    bool begins;        /* a document begins with it */
    uint64_t documents; /* begun so far */
    double read;        /* bytes of the file so far */
    /* the rest is text.c's own */
    FILE *f;
    char *name, *buffer;
    size_t at, held, searched, room; /* of buffer: taken; read; known to hold no separator */
    bool open, end;
} Documents;

Documents *documents_open(const char *path); /* "-" is standard input */
/* For a file of which these bytes have been read already; name is what sentences call it. */
Documents *documents_behind(FILE *f, const char *name, const void *start, size_t bytes);
/* The next part; false at the end. Dies where the file cannot be read, and where a signal interrupts a program that
   catches it. */
bool documents_next(Documents *d);
void documents_close(Documents *d); /* and its file */

/* The last place where a text can be cut without changing its tokens: before white space that follows something else.
   0: there is none. */
size_t safe_cut(const char *text, size_t bytes);

#ifdef __cplusplus
}
#endif
#endif
