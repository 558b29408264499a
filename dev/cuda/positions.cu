/* positions: a model's loss by position in its window, that is by how much it could look back on.

     positions MODEL SHARD [--seq T] [--stride S] [--batch B]

   Windows of T tokens begin at every S-th token of the shard. So each token away from the ends is met T / S times,
   at positions that differ by S, and buckets of S positions and more hold the very same tokens: their differences
   are not those of the texts. Buckets below S hold an equal share of each of these tokens' neighbourhoods. `against`
   is the difference to the bucket of positions S .. 2S - 1, with its standard error over stretches of T tokens of
   text. */
#define GSA_NO_MAIN
#include "../../train_gsa.cu"

#include "../../gsa/checkpoint.h"
#include "../../gsa/flags.h"
#include "../../data/loader.h"

#include <vector>

/* Losses summed by bucket of positions and stretch of T tokens of text, (buckets, stretches), and how many they are.
   Bucket 0: positions below 64; then each twice as long as all before it. */
typedef struct {
    size_t T, S, buckets, stretches;
    std::vector<double> sums, counts;
} Table;

static Table make_table(size_t T, size_t S, size_t n) {
    Table t;
    t.T = T;
    t.S = S;
    t.buckets = 1;
    t.stretches = n / T + 1;
    while ((size_t)64 << (t.buckets - 1) < T) t.buckets++;
    t.sums.resize(t.buckets * t.stretches);
    t.counts.resize(t.buckets * t.stretches);
    return t;
}

static std::vector<int> read_tokens(const char *shard, int V, size_t T) {
    Loader *l = loader_open(shard, 1, V, -1, false, 0);
    const size_t n = (size_t)loader_tokens(l);
    if (n < 3 * T) die("%s has %zu tokens; at least three windows of %zu are needed", shard, n, T);
    std::vector<int> text(n);
    for (size_t i = 0; i + 1 < n; i++) loader_next(l, &text[i], &text[i + 1], 1);
    loader_free(l);
    return text;
}

/* The losses of all windows, B at a time, into the table. */
static void measure(CudaModel *m, const std::vector<int> &text, size_t windows, size_t B, Table *table) {
    const size_t T = table->T, S = table->S;
    std::vector<int> x(B * T), y(B * T);
    std::vector<float> losses(B * T);
    for (size_t w = 0; w < windows; w += B) {
        size_t here = w + B < windows ? B : windows - w;
        for (size_t b = 0; b < here; b++)
            for (size_t t = 0; t < T; t++) {
                x[b * T + t] = text[(w + b) * S + t];
                y[b * T + t] = text[(w + b) * S + t + 1];
            }
        cuda_forward(m, x.data(), y.data(), (int)here, (int)T);
        cudaCheck(cudaMemcpy(losses.data(), m->a.losses, here * T * sizeof(float), cudaMemcpyDeviceToHost));
        for (size_t b = 0; b < here; b++)
            for (size_t t = 0, bucket = 0; t < T; t++) {
                while (t >= (size_t)64 << bucket) bucket++;
                size_t at = (w + b) * S + t;
                if (at < T || at >= (windows - 1) * S) continue; /* is not met at all positions */
                table->sums[bucket * table->stretches + at / T] += losses[b * T + t];
                table->counts[bucket * table->stretches + at / T]++;
            }
    }
}

static void print_table(const Table *t) {
    size_t reference = 0;
    while ((size_t)64 << reference <= t->S) reference++; /* the bucket that begins at S, or the first after it */
    printf("| positions | loss | against |\n|---|---|---|\n");
    for (size_t i = 0; i < t->buckets; i++) {
        double sum = 0, count = 0, difference = 0, squares = 0, used = 0;
        for (size_t s = 0; s < t->stretches; s++) {
            size_t here = i * t->stretches + s, there = reference * t->stretches + s;
            double mine = t->counts[here], theirs = t->counts[there];
            sum += t->sums[here];
            count += mine;
            if (mine < 1 || theirs < 1) continue;
            double d = t->sums[here] / mine - t->sums[there] / theirs;
            difference += d;
            squares += d * d;
            used++;
        }
        difference /= used;
        size_t from = i ? (size_t)64 << (i - 1) : 0, to = (size_t)64 << i;
        printf("| %zu to %zu | %.4f | ", from, (to < t->T ? to : t->T) - 1, sum / count);
        if (i == reference) printf("0 |\n");
        else printf("%+.4f ± %.4f |\n", difference, sqrt((squares / used - difference * difference) / (used - 1)));
    }
}

int main(int argc, char **argv) {
    int64_t seq = 0, stride = 1024, batch = 4;
    Flag flags[] = {{FLAG_INT, "seq", &seq, 0, 1 << 24, NULL, "tokens a window; 0: as the model was trained", false},
                    {FLAG_INT, "stride", &stride, 1, 1 << 24, NULL, "tokens from window to window", false},
                    {FLAG_INT, "batch", &batch, 1, 65536, NULL, "windows a pass", false},
                    {FLAG_ROOM, NULL, NULL, 0, 0, NULL, NULL, false}};
    program_name(argv[0]);
    if (parse_flags(flags, argc, argv, "positions MODEL SHARD [flags]: loss by position\n") != 2)
        die_usage("a model and a shard are needed");
    Checkpoint *k = checkpoint_open(argv[1], CHECKPOINT_MODEL);
    Config c = k->config;
    if (seq && seq != c.T && c.position != POSITION_ROPE)
        die_usage("--seq %lld: %s has learned positions for %d tokens", (long long)seq, argv[1], c.T);
    if (seq) c.T = (int)seq;
    c.recompute = true; /* nothing is kept: there is no backward pass */
    const size_t T = (size_t)c.T, S = (size_t)stride;
    const char *wrong = cuda_config_check(&c);
    if (wrong) die_usage("%s", wrong);
    if (S * 2 > T || T % S) die_usage("--stride %zu must divide --seq %zu", S, T);

    std::vector<int> text = read_tokens(argv[2], c.V, T);
    CudaModel *m = (CudaModel *)cuda_create(&c, (int)batch);
    std::vector<float> numbers(m->total);
    checkpoint_read_tensors(k, "", numbers.data());
    cuda_write(m, BUFFER_PARAMS, numbers.data());

    Table table = make_table(T, S, text.size());
    const size_t windows = (text.size() - 1 - T) / S + 1;
    measure(m, text, windows, (size_t)batch, &table);
    printf("%s: %zu windows of %zu tokens, one every %zu\n", argv[1], windows, T, S);
    print_table(&table);
    cuda_destroy(m);
    checkpoint_close(k);
    return 0;
}
