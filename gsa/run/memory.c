#include "run.h"

#include <stdlib.h>

static const double MiB = 1 << 20, GiB = 1 << 30;

/* bytes: by MEMORY_GROUPS of train.h; the sum is returned. */
static size_t memory_sum(const Backend *backend, const Config *c, int B, size_t bytes[NUM_MEMORY]) {
    size_t sum = 0;
    backend->memory(c, B, bytes);
    for (int i = 0; i < NUM_MEMORY; i++) sum += bytes[i];
    return sum;
}

static bool memory_fits(const Backend *backend, Config c, int T, int B, size_t room) {
    size_t bytes[NUM_MEMORY];
    c.T = T;
    return memory_sum(backend, &c, B, bytes) <= room;
}

/* The largest batch below B, the largest length below T (a multiple of 1,024 where it is at least that) that fit
   into `room` bytes; 0: none does. One by one, because less is not always smaller: up to 65,536 tokens, logits are
   made in one piece. */
static int largest_batch(const Backend *backend, const Config *c, int B, size_t room) {
    while (--B > 0 && !memory_fits(backend, *c, c->T, B, room))
        ;
    return B;
}
static int largest_seq(const Backend *backend, const Config *c, int B, size_t room) {
    for (int T = c->T - 1, step; T > 0; T -= step) {
        step = T > 1024 ? 1024 : 1;
        T = T / step * step;
        if (memory_fits(backend, *c, T, B, room)) return T;
    }
    return 0;
}

/* text and one more way out; frees both */
static char *add_advice(char *text, char *more) {
    char *longer = xasprintf("%s%s%s", text, *text ? "; or " : "", more);
    free(text);
    free(more);
    return longer;
}

/* The ways out for a run that takes more than `room` bytes: "--batch 2, with ...; or --recompute and --seq 512". The
   caller frees it. */
static char *what_would_fit(const Backend *backend, const Config *config, int B, int64_t accum, size_t room) {
    char *advice = xstrdup("");
    for (int recompute = config->recompute; recompute < 2; recompute++) { /* as it is, then with --recompute */
        size_t bytes[NUM_MEMORY];
        Config c = *config;
        c.recompute = recompute;
        const char *with = recompute == config->recompute ? "" : "--recompute and ";
        size_t needed = memory_sum(backend, &c, B, bytes);
        if (needed <= room)
            return add_advice(advice, xasprintf("--recompute, which needs %.1f GiB", (double)needed / GiB));
        int batch = largest_batch(backend, &c, B, room), seq = largest_seq(backend, &c, B, room);
        if (batch)
            advice = add_advice(advice, xasprintf("%s--batch %d, with --accum %lld for as many tokens a step", with,
                                                  batch, (long long)((B * accum + batch - 1) / batch)));
        if (seq) advice = add_advice(advice, xasprintf("%s--seq %d", with, seq));
    }
    return advice;
}

void check_memory(const Run *r) {
    static const char *const names[NUM_MEMORY] = {
#define X(name, text) text,
        MEMORY_GROUPS(X)
#undef X
    };
    const int B = (int)r->settings->batch;
    size_t bytes[NUM_MEMORY], sum = memory_sum(r->backend, &r->config, B, bytes), room = r->backend->free_memory();
    int column = printf("memory, MiB   ");
    for (int i = 0; i < NUM_MEMORY; i++) {
        if (bytes[i] == 0) continue;
        if (column > 90) column = printf("\n%14s", "") - 1;
        column += printf("%s %.1f  ", names[i], (double)bytes[i] / MiB);
    }
    printf("sum %.1f\n", (double)sum / MiB);
    if (room == 0 || sum <= room) return;
    fflush(stdout);
    char *advice = what_would_fit(r->backend, &r->config, B, r->settings->accum, room);
    die("this run needs %.1f GiB of memory and %.1f are free; %s%s", (double)sum / GiB, (double)room / GiB,
        *advice ? "these would fit: " : "choose a smaller model: no --batch or --seq would fit", advice);
}
