/* The reader of GPT-2's vocabulary, see fuzz.h. */
#include "fuzz.h"

#define main train_bpe_main
#include "../../tokenizer/train_bpe.c"
#undef main

#include <errno.h>
#include <unistd.h>

int train_bpe_main(int argc, char **argv);

/* The file is one of the two of FOLDER/gpt2, by a link; the other is valid. */
static void read_with(const char *name, char *path) {
    char *folder = xasprintf("%s/gpt2_%s", fuzz_folder, name), *link = xasprintf("%s/%s", folder, name);
    if (symlink(path, link) != 0 && errno != EEXIST) die("cannot write %s", link);
    char *argv[] = {(char *)"train_bpe", (char *)"--gpt2", folder, (char *)"--out", (char *)"/dev/null", NULL};
    train_bpe_main(5, argv);
    free(link);
    free(folder);
}
void fuzz_vocab_bpe(char *path) { read_with("vocab.bpe", path); }
void fuzz_encoder_json(char *path) { read_with("encoder.json", path); }
