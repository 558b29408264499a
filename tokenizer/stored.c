#include "stored.h"

#include <stdlib.h>
#include <string.h>

Tokenizer *checkpoint_tokenizer(const Checkpoint *k, const char *given) {
    bool has = checkpoint_has(k, "tokenizer");
    if (!has && !given) die("%s holds no tokenizer: name its file with --tokenizer FILE", k->path);
    Tokenizer *t;
    size_t size = 0;
    char *file = given ? read_file(given, &size) : NULL;
    if (has) {
        int64_t bytes;
        const void *own = checkpoint_find(k, "tokenizer", TYPE_BYTES, 0, NULL, &bytes);
        if (given && (size != (size_t)bytes || memcmp(file, own, size) != 0))
            die("%s is not the tokenizer of %s; a model can only go on with its own", given, k->path);
        char *name = xasprintf("the tokenizer in %s", k->path);
        t = tokenizer_from_memory(own, (size_t)bytes, name);
        if (tokenizer_vocab_size(t) != k->config.V)
            die("%s is damaged: its tokenizer has %d entries, its vocabulary %d", k->path, tokenizer_vocab_size(t),
                k->config.V);
        free(name);
    } else {
        t = tokenizer_from_memory(file, size, given);
        if (tokenizer_vocab_size(t) != k->config.V)
            die("%s has %d entries, the vocabulary of %s %d: it is the tokenizer of another model", given,
                tokenizer_vocab_size(t), k->path, k->config.V);
    }
    free(file);
    return t;
}
