/* Classes of tokens that need no other model: in made-up stories the grammar's own lists of words, in English text
   closed lists and the form of a word. */
#ifndef GSA_CLASSES_H
#define GSA_CLASSES_H

#include "../../tokenizer/tokenizer.h"

#ifdef __cplusplus
extern "C" {
#endif

#define CLASSES_CHOICES "stories|english"
enum { CLASSES_STORIES, CLASSES_ENGLISH, MAX_CLASSES = 24 };

/* classes (N): of each token, the class of the word that holds its first byte that is no space. Tokens are read in a
   row, so that a word of several tokens is one word. Returns the names of the *count classes. */
const char *const *token_classes(int kind, const Tokenizer *t, const int *tokens, size_t N, int *classes, int *count);

#ifdef __cplusplus
}
#endif
#endif
