/* Byte-level byte pair encoding with GPT-2's splitting pattern, in one pass and without regular expressions.

   A vocabulary of V entries is 256 bytes, V - 258 merges in the order in which they were learned, and two special
   tokens at the end: <|endoftext|> (V - 2) and [MASK] (V - 1). GPT-2's published vocabulary has no [MASK]; it takes
   the first id of the padding, 50257, there (see tokenizer_mask). An entry's id is its merge rank, so the entries'
   bytes alone are enough to encode: of all adjacent pairs whose joined bytes are an entry, the one with the smallest
   id is merged first.

   File (llm.c's): 256 int32 = magic 20240328, version 2, V, id of <|endoftext|>, id of [MASK] (0: none; llm.c ignores
   it), zeros; then for every id one length byte and that many bytes. */
#ifndef GSA_TOKENIZER_H
#define GSA_TOKENIZER_H

#include "../gsa/util.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct Tokenizer Tokenizer;

/* Reads a tokenizer file; dies with a sentence on a foreign, truncated or inconsistent one. The second form reads the
   same bytes from memory; name is what the sentence calls them. */
Tokenizer *tokenizer_load(const char *path);
Tokenizer *tokenizer_from_memory(const void *bytes, size_t count, const char *name);
/* Learns V - 258 merges from text: the most frequent pair first, ties to the pair of smaller ids, never across the
   borders of GPT-2's splitting pattern; a line <|endoftext|> is a border and is not learned. 258 <= V <= 65536; dies
   with a sentence where the text has fewer pairs than that. show_progress draws a bar. */
Tokenizer *tokenizer_train(const char *text, size_t bytes, int V, bool show_progress);
void tokenizer_free(Tokenizer *t);

void *tokenizer_to_memory(const Tokenizer *t, size_t *count); /* the file's bytes; free() them */
void tokenizer_save(const Tokenizer *t, const char *path);

int tokenizer_vocab_size(const Tokenizer *t); /* V of the file; GPT-2: 50257 */
int tokenizer_eot(const Tokenizer *t);
int tokenizer_mask(const Tokenizer *t); /* V where the file has none: the first id of the padding */

/* Encodes any bytes (broken UTF-8 too; 0 bytes too) and appends the ids to *ids, which holds *count of *room and
   grows as needed (start with NULL, 0, 0). Where special is true the texts <|endoftext|> and [MASK] become their
   tokens; where it is false they are ordinary text. decode(encode(x)) = x. Uses no state outside its arguments:
   threads may share t. */
void tokenizer_encode(const Tokenizer *t, const char *text, size_t bytes, bool special, int **ids, size_t *count,
                      size_t *room);

/* The bytes of one token, *bytes of them, not terminated; NULL where id is outside the vocabulary. */
const char *tokenizer_piece(const Tokenizer *t, int id, size_t *bytes);

#ifdef __cplusplus
}
#endif
#endif
