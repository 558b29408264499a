/* The tokenizer that a model file carries, so that text goes in and comes out of a model without any other file. */
#ifndef GSA_STORED_H
#define GSA_STORED_H

#include "../gsa/checkpoint.h"
#include "tokenizer.h"

#ifdef __cplusplus
extern "C" {
#endif

/* The model's own tokenizer, or that of the file `given` (NULL: none) where it holds none; dies where the two
   differ, where there is neither, and where the number of entries is not the model's vocabulary. */
Tokenizer *checkpoint_tokenizer(const Checkpoint *k, const char *given);

#ifdef __cplusplus
}
#endif
#endif
