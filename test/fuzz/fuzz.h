/* The readers that are fuzzed. Each is what a program does with a file of its kind, up to where all of it has been
   read and, if it is cheap, used; it may end by exit, as programs do that refuse a file. */
#ifndef GSA_FUZZ_H
#define GSA_FUZZ_H

/* X(name, header): header bytes at the start get three quarters of the changes; 0: a text, where no byte is special */
#define FUZZ_TARGETS(X) \
    X(model, 4096)      \
    X(encoder, 4096)    \
    X(llmc, 128)        \
    X(init, 4096)       \
    X(state, 4096)      \
    X(settings, 0)      \
    X(shard, 64)        \
    X(text, 0)          \
    X(tokenizer, 64)    \
    X(vocab_bpe, 0)     \
    X(encoder_json, 0)  \
    X(tasks, 0)         \
    X(table, 0)         \
    X(log, 0)
#define X(name, header) void fuzz_##name(char *path);
FUZZ_TARGETS(X)
#undef X

/* Valid files that readers need beside the one that is fuzzed lie here: model.bin, tokenizer.bin, gpt2/. */
extern const char *fuzz_folder;
/* What is allocated from here on may live as long as the program; else it goes with the run of a reader. */
void fuzz_keep(int on);

#endif
