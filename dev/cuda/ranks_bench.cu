/* ranks_bench: what several GPUs gain, and what the sum of their gradients costs.

     make build/release/ranks_bench && build/release/ranks_bench --gpus 2 --attention hybrid; ... --help

   Rows of steps of one model on random tokens, in turn: with no sums (each GPU by itself, and no GPU waits for
   another), with sums in fp32 and bf16 at the end of the backward pass and while it runs; then the sums alone, and with
   --shard-optimiser what sharing out the weights takes. Times are medians of rank 0's clock; without sums those of all
   ranks are printed, and what sums add is told against the slowest of them. Bus bandwidth, as NCCL's tests have it:
   what each GPU sends, 2 (N - 1) / N times the bytes, over the time. */
#define GSA_NO_MAIN
#include "../../train_gsa.cu"

#include "bench_model.cuh"

#include <algorithm>
#include <vector>

typedef struct {
    BenchModel model;
    int64_t gpus, runs;
    bool shard;
} Options;

static Options read_options(int argc, char **argv) {
    static Options o = {bench_model_shape, 2, 6, false};
    static Flag flags[] = {{FLAG_INT, "gpus", &o.gpus, 1, 1024, NULL, "GPUs", false},
                           BENCH_MODEL_FLAGS(o.model),
                           {FLAG_INT, "runs", &o.runs, 1, 1000, NULL, "rows of 5 steps of each kind", false},
                           {FLAG_SWITCH, "shard-optimiser", &o.shard, 0, 0, NULL, "the optimiser shared out", false},
                           {FLAG_ROOM, NULL, NULL, 0, 0, NULL, NULL, false}};
    if (parse_flags(flags, argc, argv, "ranks_bench [flags]: what several GPUs gain\n\n") > 0)
        die_usage("'%s' is no flag; --help lists them all", argv[1]);
    return o;
}

struct Bench {
    Ranks *ranks;
    CudaModel *m;
    int *x, *y;
    size_t B, T;
    int64_t steps; /* so far */
};

static void meet(Ranks *k) {
    char mine = 0, all[1024];
    ranks_gather(k, &mine, all, 1);
}

/* Seconds of each step of a row but the first, from result to result; sums: with those of other GPUs. */
enum { ROW = 5 };
static std::vector<double> row(Bench *b, bool sums) {
    StepResult result;
    std::vector<double> times;
    double before = 0;
    if (sums) meet(b->ranks);
    for (int i = 0; i <= ROW; i++) {
        if (i < ROW) bench_step(b->m, b->x, b->y, b->B, ++b->steps, sums);
        if (i == 0) continue;
        cuda_result(b->m, &result);
        double now = now_seconds();
        if (i > 1) times.push_back(now - before);
        before = now;
    }
    return times;
}

static double mean(const std::vector<double> &times) {
    double sum = 0;
    for (double t : times) sum += t;
    return sum / (double)times.size();
}
static double median(std::vector<double> times) {
    std::sort(times.begin(), times.end());
    return times[times.size() / 2];
}

/* Seconds of f, which works on the stream of the sums. */
template <typename F> static double time_alone(Bench *b, F f) {
    std::vector<double> times;
    for (int i = 0; i < 12; i++) {
        cudaCheck(cudaDeviceSynchronize());
        meet(b->ranks);
        double began = now_seconds();
        f();
        cudaCheck(cudaDeviceSynchronize());
        if (i > 1) times.push_back(now_seconds() - began);
    }
    return median(times);
}

enum { KINDS = 5 };
static const struct {
    const char *name;
    bool sums, late, narrow;
} kinds[KINDS] = {{"no sums", false, false, false},
                  {"sums in fp32, at the end", true, true, false},
                  {"sums in fp32, meanwhile", true, false, false},
                  {"sums in bf16, at the end", true, true, true},
                  {"sums in bf16, meanwhile", true, false, true}};
static void time_steps(Bench *b, int runs) {
    std::vector<double> times[KINDS], alone; /* of rows; of each step without sums */
    int count = b->ranks->count > 1 ? KINDS : 1;
    for (int i = 0; i < runs + 1; i++)
        for (int k = 0; k < count; k++) {
            b->m->late = kinds[k].late;
            team.narrow = kinds[k].narrow;
            std::vector<double> steps = row(b, kinds[k].sums);
            if (i == 0) continue;
            times[k].push_back(mean(steps));
            if (k == 0) alone.insert(alone.end(), steps.begin(), steps.end());
        }
    double tokens = (double)(b->ranks->count * b->B * b->T), own = median(times[0]), all[1024], slowest = 0;
    ranks_gather(b->ranks, &own, all, sizeof own);
    printf("each GPU by itself, ms      ");
    for (int q = 0; q < b->ranks->count; q++) {
        printf(" %8.2f", 1e3 * all[q]);
        slowest = fmax(slowest, all[q]);
    }
    printf("\n");
    /* GPUs that wait for each other in every step take as long as the slower one of each */
    std::vector<double> of_all(alone.size() * (size_t)b->ranks->count), most(alone.size(), 0);
    ranks_gather(b->ranks, alone.data(), of_all.data(), alone.size() * sizeof(double));
    for (size_t i = 0; i < of_all.size(); i++) most[i % most.size()] = fmax(most[i % most.size()], of_all[i]);
    printf("%-28s %8.2f ms\n", "the slowest of each step", 1e3 * mean(most));
    for (int k = 0; k < count; k++) {
        double seconds = k ? median(times[k]) : slowest;
        printf("%-28s %8.2f ms, %9.0f tokens/s on %d GPUs, %+.2f ms\n", kinds[k].name, 1e3 * seconds, tokens / seconds,
               b->ranks->count, 1e3 * (seconds - slowest));
    }
}

static void time_sums(Bench *b) {
    CudaModel *m = b->m;
    const Range all = {0, m->total};
    double n = (double)m->total, sent = 2.0 * (team_count() - 1) / team_count();
    double wide = time_alone(b, [&]() { sum_wide(m->grads, &all, 1); }),
           narrow = time_alone(b, [&]() { sum_narrow(m->grads, m->piece, &all, 1); });
    printf("%-28s %8.2f ms, bus %.0f GB/s\n", "the sums alone, fp32", 1e3 * wide, 1e-9 * 4 * n * sent / wide);
    printf("%-28s %8.2f ms, bus %.0f GB/s, rounding included\n", "the sums alone, bf16", 1e3 * narrow,
           1e-9 * 2 * n * sent / narrow);
    if (team.shard) {
        double shared = time_alone(b, [&]() { share_weights(m); });
        printf("%-28s %8.2f ms\n", "sharing out the weights", 1e3 * shared);
    }
}

int main(int argc, char **argv) {
    program_name(argv[0]);
    Options o = read_options(argc, argv);
    RankPlace place;
    memset(&place, 0, sizeof place);
    if (o.gpus > 1) place = ranks_launch((int)o.gpus);
    Bench b = {};
    b.ranks = ranks_join(&place);
    if (b.ranks->rank > 0 && !freopen("/dev/null", "w", stdout)) die("cannot open /dev/null");
    Sharing sharing = {b.ranks, true, o.shard}; /* with room for bf16 */
    cuda_join(&sharing);
    Config c = bench_config(&o.model);
    b.B = (size_t)o.model.batch;
    b.T = (size_t)o.model.seq;
    printf("%s\n%d GPUs, %zu x %zu tokens each, %zu parameters\n", cuda_name(), b.ranks->count, b.B, b.T,
           model_parameters(&c));
    b.x = (int *)xmalloc(2 * b.B * b.T * sizeof *b.x);
    b.y = b.x + b.B * b.T;
    b.m = bench_model(&c, b.B, 1 + (uint64_t)b.ranks->rank, b.x, b.y);

    /* rank 0 chooses algorithms, the others take them */
    if (b.ranks->rank == 0) {
        gsa_forward(b.m, b.x, b.y, b.B, b.T);
        gsa_backward(b.m, 1);
        cudaCheck(cudaDeviceSynchronize());
    }
    char *text = b.ranks->rank ? NULL : cuda_choices(b.m);
    size_t length = text ? strlen(text) + 1 : 0;
    ranks_broadcast(b.ranks, &length, sizeof length, 0);
    if (!text) text = (char *)xmalloc(length);
    ranks_broadcast(b.ranks, text, length, 0);
    if (b.ranks->rank) cuda_choose(b.m, text);
    free(text);

    time_steps(&b, (int)o.runs);
    if (b.ranks->count > 1) time_sums(&b);
    gsa_destroy(b.m);
    free(b.x);
    ranks_leave(b.ranks);
    return 0;
}
