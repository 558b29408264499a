/* dev/logits MODEL.bin: reads numbers of tokens from standard input, writes the logits after each, (T, V) fp32, to
   standard output: for comparison with other programs (dev/gpt2_compare.py). */
#define GSA_NO_MAIN
#if defined(__GNUC__)
#pragma GCC diagnostic ignored "-Wunused-function" /* the backward pass */
#endif
#include "../train_gsa.c"

#include "../gsa/checkpoint.h"
#include "../gsa/flags.h"

int main(int argc, char **argv) {
    Flag flags[] = {{FLAG_ROOM, NULL, NULL, 0, 0, NULL, NULL, false}};
    program_name(argv[0]);
    if (parse_flags(flags, argc, argv,
                    "logits MODEL.bin: reads numbers of tokens from standard input, writes the logits after each as "
                    "fp32\n") != 1)
        die_usage("give a model file; the tokens come on standard input");
    Checkpoint *k = checkpoint_open(argv[1], CHECKPOINT_MODEL);
    GSA *m = gsa_create(&k->config, 1);
    checkpoint_read_tensors(k, "", m->params);
    int *x = (int *)xmalloc((size_t)k->config.T * sizeof *x), n = 0;
    while (n < k->config.T && scanf("%d", &x[n]) == 1) {
        if (x[n] < 0 || x[n] >= k->config.V) die("token %d is outside the vocabulary of %d", x[n], k->config.V);
        n++;
    }
    if (n == 0) die("no tokens on standard input");
    gsa_forward(m, x, NULL, 1, (size_t)n);
    for (int t = 0; t < n; t++)
        xfwrite(m->a.logits + (size_t)t * (size_t)k->config.Vp, sizeof(float), (size_t)k->config.V, stdout,
                "standard output");
    free(x);
    gsa_destroy(m);
    checkpoint_close(k);
    return 0;
}
