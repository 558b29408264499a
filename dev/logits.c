/* dev/logits MODEL.bin: reads numbers of tokens from standard input, writes the logits after each, (T, V) fp32, to
   standard output. With --gradients OUT.bin the numbers are inputs, then as many targets (-1: none), and OUT.bin is a
   model file with the gradients of the mean loss in place of the weights. For comparison with other programs
   (dev/gpt2_compare.py, test/pytorch.py). */
#define GSA_NO_MAIN
#if defined(__GNUC__)
#pragma GCC diagnostic ignored "-Wunused-function" /* the update */
#endif
#include "../train_gsa.c"

#include "../gsa/checkpoint.h"
#include "../gsa/flags.h"

static void write_gradients(GSA *m, const int *tokens, size_t n, const char *path) {
    gsa_forward(m, tokens, tokens + n, 1, n);
    gsa_backward(m, 1);
    Entry entries[NUM_TENSORS];
    const void *data[NUM_TENSORS];
    int count = 0;
    checkpoint_add_tensors(&m->config, "", m->grads, entries, data, &count);
    checkpoint_write(path, CHECKPOINT_MODEL, &m->config, 0, entries, data, count);
}

int main(int argc, char **argv) {
    const char *gradients = NULL;
    Flag flags[] = {{FLAG_TEXT, "gradients", &gradients, 0, 0, "OUT.bin",
                     "write the gradients of all parameters there, as a model file", false},
                    {FLAG_ROOM, NULL, NULL, 0, 0, NULL, NULL, false}};
    program_name(argv[0]);
    if (parse_flags(flags, argc, argv,
                    "logits MODEL.bin: reads numbers of tokens from standard input, writes the logits after each as "
                    "fp32; with --gradients OUT.bin numbers of inputs, then of as many targets\n") != 1)
        die_usage("give a model file; the tokens come on standard input");
    Checkpoint *k = checkpoint_open(argv[1], CHECKPOINT_MODEL);
    GSA *m = gsa_create(&k->config, 1);
    checkpoint_read_tensors(k, "", m->params);
    size_t most = (size_t)k->config.T * (gradients ? 2 : 1), n = 0;
    int *x = (int *)xmalloc(most * sizeof *x);
    for (; n < most && scanf("%d", &x[n]) == 1; n++)
        if (x[n] < (gradients ? -1 : 0) || x[n] >= k->config.Vp)
            die("token %d is outside the vocabulary of %d", x[n], k->config.V);
    if (n == 0 || (gradients && n % 2))
        die("standard input has %zu numbers of tokens%s", n, n ? ", not two lists" : "");
    for (size_t i = 0; i < (gradients ? n / 2 : n); i++)
        if (x[i] < 0) die("token %d is outside the vocabulary of %d", x[i], k->config.V);
    if (gradients) write_gradients(m, x, n / 2, gradients);
    else gsa_forward(m, x, NULL, 1, n);
    for (size_t t = 0; t < n && !gradients; t++)
        xfwrite(m->a.logits + t * (size_t)k->config.Vp, sizeof(float), (size_t)k->config.V, stdout, "standard output");
    free(x);
    gsa_destroy(m);
    checkpoint_close(k);
    return 0;
}
