/* Several processes that work on one run, without a GPU: who stands where (launchers' variables), who does what, how
   they find each other, and whole runs on the CPU, whose gradients are added over the wires of gsa/run/ranks.h in place
   of NCCL: the same losses as one process with as many batches, and one sentence when a rank dies, stops, hangs or
   fails. (test_gpus.cu does the same with GPUs.) */
#define main train_gsa_main
#include "../train_gsa.c"
#undef main
#include "../data/loader.h"
#include "late.h"
#include "runs.h"

/* ---------------------------------------------------------------------- launchers */

static const char *variables[16];
static char *variable(const char *name) { /* of variables: name, value, ..., NULL */
    for (int i = 0; variables[i]; i += 2)
        if (strcmp(variables[i], name) == 0) return (char *)variables[i + 1];
    return NULL;
}
#define ENVIRONMENT(...)                           \
    do {                                           \
        const char *given[] = {__VA_ARGS__, NULL}; \
        memcpy(variables, given, sizeof given);    \
    } while (0)

static void test_launchers(void) {
    RankPlace p;
    const char *wrong;
    ENVIRONMENT("PATH", "/bin");
    wrong = ranks_place(&p, variable);
    CHECK(!wrong && p.count == 0, "no launcher");
    ENVIRONMENT("RANK", "3", "WORLD_SIZE", "4", "LOCAL_RANK", "1", "MASTER_ADDR", "node7", "MASTER_PORT", "1234");
    wrong = ranks_place(&p, variable);
    CHECK(!wrong && p.rank == 3 && p.count == 4 && p.local == 1 && strcmp(p.address, "node7") == 0 && p.port == 1234,
          "torchrun: %d of %d at %s:%d", p.rank, p.count, p.address, p.port);
    ENVIRONMENT("RANK", "0", "WORLD_SIZE", "2", "LOCAL_RANK", "0", "MASTER_ADDR", "a", "MASTER_PORT", "1234",
                "TORCHELASTIC_USE_AGENT_STORE", "True");
    wrong = ranks_place(&p, variable);
    CHECK(!wrong && p.port == 1235, "torchrun's own port is taken: %d", p.port);
    ENVIRONMENT("OMPI_COMM_WORLD_RANK", "1", "OMPI_COMM_WORLD_SIZE", "2", "OMPI_COMM_WORLD_LOCAL_RANK", "1",
                "OMPI_COMM_WORLD_LOCAL_SIZE", "2");
    wrong = ranks_place(&p, variable);
    CHECK(!wrong && p.rank == 1 && p.count == 2 && p.local == 1 && strcmp(p.address, "127.0.0.1") == 0,
          "mpirun on one machine: %d of %d at %s", p.rank, p.count, p.address);
    ENVIRONMENT("OMPI_COMM_WORLD_RANK", "1", "OMPI_COMM_WORLD_SIZE", "4", "OMPI_COMM_WORLD_LOCAL_RANK", "1",
                "OMPI_COMM_WORLD_LOCAL_SIZE", "2");
    wrong = ranks_place(&p, variable);
    CHECK(wrong && strstr(wrong, "MASTER_ADDR"), "mpirun on several machines: %s", wrong ? wrong : "taken");
    ENVIRONMENT("SLURM_PROCID", "5", "SLURM_STEP_NUM_TASKS", "8", "SLURM_LOCALID", "1", "SLURM_STEP_NODELIST",
                "gpu[03-05,9],other", "SLURM_JOB_ID", "1234567");
    wrong = ranks_place(&p, variable);
    CHECK(!wrong && p.rank == 5 && p.count == 8 && p.local == 1 && strcmp(p.address, "gpu03") == 0 && p.port == 24567,
          "srun: %d of %d at %s:%d", p.rank, p.count, p.address, p.port);
    ENVIRONMENT("SLURM_PROCID", "0", "SLURM_NTASKS", "8", "SLURM_LOCALID", "0");
    wrong = ranks_place(&p, variable);
    CHECK(!wrong && p.count == 0, "a job's script is none of its tasks");
    ENVIRONMENT("RANK", "0", "WORLD_SIZE", "1", "LOCAL_RANK", "0");
    wrong = ranks_place(&p, variable);
    CHECK(!wrong && p.count == 1, "a launcher of one");
    static const char *const bad[][3] = {{"2", "2", "0"}, {"-1", "2", "0"}, {"0", "zero", "0"}, {"0", "2", ""}};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        ENVIRONMENT("RANK", bad[i][0], "WORLD_SIZE", bad[i][1], "LOCAL_RANK", bad[i][2]);
        wrong = ranks_place(&p, variable);
        CHECK(wrong && strstr(wrong, "WORLD_SIZE"), "RANK %s WORLD_SIZE %s: %s", bad[i][0], bad[i][1],
              wrong ? wrong : "taken");
    }
}

/* ---------------------------------------------------------------------- who does what */

static void test_batches(void) {
    for (int count = 1; count <= 5; count++)
        for (int64_t accum = count; accum < 12; accum++)
            for (int rank = 0; rank < count; rank++) {
                Ranks k = {rank, count, 0, NULL};
                int64_t last = -1, own = 0;
                for (int64_t i = 0; i < accum; i++) {
                    if (ranks_of_batch(&k, i) != rank) continue;
                    last = i;
                    own++;
                }
                CHECK(ranks_last_batch(&k, accum) == last && own >= accum / count && own <= (accum - 1) / count + 1,
                      "rank %d of %d, %lld batches: the last is %lld, %lld are its own", rank, count, (long long)accum,
                      (long long)last, (long long)own);
            }
}

/* Batches that are passed over leave the loader where reading them does, over the end of an epoch too. */
static void test_skip(void) {
    enum { T = 4, B = 3 };
    uint16_t tokens[7 * T + 1] = {0};
    int x[B * T], y[B * T];
    Loader *read = loader_from_tokens(tokens, 7 * T + 1, "t", T, 10, -1, true, 1),
           *skipped = loader_from_tokens(tokens, 7 * T + 1, "t", T, 10, -1, true, 1);
    for (int i = 0; i < 20; i++) {
        loader_next(read, x, y, B);
        loader_skip(skipped, B);
        LoaderState a = loader_state(read), b = loader_state(skipped);
        CHECK(a.epoch == b.epoch && a.window == b.window, "%d batches on: window %llu of epoch %llu", i,
              (unsigned long long)b.window, (unsigned long long)b.epoch);
    }
    loader_skip(skipped, 100 * loader_windows(skipped));
    CHECK(loader_state(skipped).epoch == loader_state(read).epoch + 100, "100 epochs at once");
    loader_free(read);
    loader_free(skipped);
}

/* The parts lie side by side, end between rows, and differ by no more than the largest row. */
static void test_cuts(void) {
    Config c;
    Tensor tensors[NUM_TENSORS];
    memset(&c, 0, sizeof c);
    static const int shapes[][3] = {{12, 12, 768}, {36, 20, 1280}, {48, 25, 1600}, {1, 2, 64}, {3, 2, 64}};
    for (size_t s = 0; s < sizeof shapes / sizeof *shapes; s++)
        for (int count = 1; count <= 9; count++) {
            size_t first[NUM_TENSORS], end[NUM_TENSORS], so_far[NUM_TENSORS] = {0}, largest = 0, least = SIZE_MAX,
                                                         most = 0;
            c.L = shapes[s][0];
            c.NH = shapes[s][1];
            c.C = shapes[s][2];
            c.T = 1024;
            c.V = 50257;
            c.Vp = 50304;
            c.attention = ATTENTION_HYBRID;
            c.S = 16;
            c.forget = FORGET_ALL;
            config_head_map(&c, NULL);
            model_tensors(&c, tensors);
            /* the GPU's passes read these in fp32 */
            bool good = tensors[TENSOR_forgetw].size > 0 && !ranks_cuts(TENSOR_forgetw);
            for (int rank = 0; rank < count; rank++) {
                size_t kept = 0;
                ranks_cut(tensors, rank, count, first, end);
                for (int i = 0; i < NUM_TENSORS; i++) {
                    size_t row = tensor_row(&tensors[i]);
                    if (!ranks_cuts(i)) {
                        good = good && first[i] == 0 && end[i] == tensors[i].size;
                        continue;
                    }
                    good = good && first[i] == so_far[i] && end[i] >= first[i] && (!row || end[i] % row == 0);
                    so_far[i] = end[i];
                    kept += end[i] - first[i];
                    largest = row > largest ? row : largest;
                }
                least = kept < least ? kept : least;
                most = kept > most ? kept : most;
            }
            for (int i = 0; i < NUM_TENSORS; i++) good = good && (!ranks_cuts(i) || so_far[i] == tensors[i].size);
            CHECK(good && most - least <= 2 * largest,
                  "%d layers of %d channels over %d ranks: parts of %zu to %zu numbers", c.L, c.C, count, least, most);
        }
}

/* ---------------------------------------------------------------------- wires */

static void exchange_numbers(Ranks *k) {
    int n = k->count, all[8], mine = 10 + k->rank;
    double *large = (double *)xmalloc(100000 * sizeof *large);
    for (int round = 0; round < 3; round++) {
        ranks_gather(k, &mine, all, sizeof mine);
        for (int q = 0; q < n; q++)
            if (all[q] != 10 + q) die("gathered %d from rank %d", all[q], q);
        for (int root = 0; root < n; root++) {
            for (int i = 0; i < 100000; i++) large[i] = k->rank == root ? i + root : -1;
            ranks_broadcast(k, large, 100000 * sizeof *large, root);
            for (int i = 0; i < 100000; i++)
                if (large[i] != i + root) die("number %d of rank %d came as %g", i, root, large[i]);
        }
    }
    free(large);
    ranks_leave(k);
}

static void test_wires(void) {
    for (int count = 1; count <= 4; count++) {
        char *name = xasprintf("wires%d", count);
        fflush(NULL);
        pid_t child = fork();
        if (child == 0) {
            output_to(name);
            RankPlace p = ranks_launch(count);
            exchange_numbers(ranks_join(&p));
            exit(0);
        }
        int status = status_of(child, 20);
        CHECK(status == 0, "%d ranks exchange numbers: status %d, %s", count, status, output_of(name));
        free(name);
    }
}

static int any_port(void) { return 20000 + (int)(getpid() % 20000); }

/* A process as a launcher would start it, on its own. */
static pid_t start_rank(const char *name, int rank, int count, int port) {
    fflush(NULL);
    pid_t child = fork();
    if (child) return child;
    output_to(name);
    RankPlace p = {.rank = rank, .count = count, .local = 0, .address = "127.0.0.1", .port = port, .listener = -1};
    ranks_coming = 2;
    exchange_numbers(ranks_join(&p));
    exit(0);
}

static void test_meeting(void) {
    int port = any_port();
    pid_t first = start_rank("late0", 0, 3, port), third = start_rank("late2", 2, 3, port);
    usleep(500000);
    pid_t second = start_rank("late1", 1, 3, port);
    int statuses[] = {status_of(first, 20), status_of(second, 20), status_of(third, 20)};
    CHECK(!statuses[0] && !statuses[1] && !statuses[2], "ranks that come one after the other: %d %d %d", statuses[0],
          statuses[1], statuses[2]);
    first = start_rank("alone0", 0, 3, port + 1);
    third = start_rank("alone2", 2, 3, port + 1);
    int status = status_of(first, 20), other = status_of(third, 20);
    CHECK(status == 1 && strstr(output_of("alone0"), "rank 1 of 3 did not come"), "a rank that does not come: %d, %s",
          status, output_of("alone0"));
    CHECK(other == 1 && strstr(output_of("alone2"), "rank 0"), "the others end: %d, %s", other, output_of("alone2"));
    pid_t lost = start_rank("lost", 1, 2, port + 2);
    status = status_of(lost, 20);
    CHECK(status == 1 && strstr(output_of("lost"), "rank 0 does not answer at 127.0.0.1"), "nobody there: %d, %s",
          status, output_of("lost"));
    first = start_rank("count0", 0, 2, port + 3);
    second = start_rank("count1", 1, 3, port + 3);
    status = status_of(first, 20);
    status_of(second, 20);
    CHECK(status == 1 && strstr(output_of("count0"), "rank 1 of 3 came, and there are 2"), "other counts: %d, %s",
          status, output_of("count0"));
}

/* ---------------------------------------------------------------------- whole runs

   The back end of train_gsa.c, and in place of NCCL sums over the wires in the order of ranks. */

static Ranks *team;
static int shared;        /* how often the gradients of this step were sent */
static const char *fault; /* what this rank does wrong, see ranked_forward */
static bool late;         /* steps are looked at one step later, as on a GPU */
static int passes;

static int many_devices(void) { return 8; }
static void ranked_join(const Sharing *s) { team = s->ranks; }
static void ranked_share(void *model) {
    (void)model;
    shared++;
}
static void ranked_norms(void *model, double norms[NUM_CLIPS]) {
    GSA *m = (GSA *)model;
    if (team->count > 1) {
        if (shared != 1) die("the gradients of a step are sent %d times", shared);
        float *all = (float *)xmalloc((size_t)team->count * m->total * sizeof *all);
        ranks_gather(team, m->grads, all, m->total * sizeof *all);
        memcpy(m->grads, all, m->total * sizeof *all);
        for (int q = 1; q < team->count; q++)
            for (size_t i = 0; i < m->total; i++) m->grads[i] += all[(size_t)q * m->total + i];
        free(all);
        shared = 0;
    }
    cpu_gradient_norms(model, norms);
}

/* fault: "RANK WHAT", done by that rank in its fifth pass */
static double ranked_forward(void *model, const int *x, const int *y, int B, int T) {
    if (fault && y && atoi(fault) == team->rank && ++passes == 5) {
        const char *what = fault + 2;
        if (strcmp(what, "die") == 0) kill(getpid(), SIGKILL);
        if (strcmp(what, "stop") == 0) kill(getpid(), SIGSTOP);
        if (strcmp(what, "hang") == 0) sleep(60);
        if (strcmp(what, "fail") == 0) die("the GPU reports 'out of memory'");
        if (strcmp(what, "interrupt") == 0) kill(getpid(), SIGINT);
    }
    return cpu_forward(model, x, y, B, T);
}

/* fault "RANK memory": there is next to none */
static size_t ranked_free_memory(void) {
    bool poor = fault && atoi(fault) == team->rank && strcmp(fault + 2, "memory") == 0;
    return poor ? 100000 : free_memory();
}

static char *ranked_choices(void *model) {
    (void)model;
    return xstrdup("chosen by rank 0\n");
}
static void ranked_take(void *model, const char *text) {
    (void)model;
    if (strcmp(text, "chosen by rank 0\n") != 0) die("rank 0's choices came as '%s'", text);
}

/* Every run has the same small model, but for what is given. */
static const char common[] = "--layers 2 --heads 2 --channels 32 --seq 32 --batch 2 --vocab 300 --eval-tokens 320 "
                             "--sample-every 0 --threads 1 --lr 1e-3 --warmup 3";

GSA_NORETURN static void run_here(int argc, char **argv) {
    Backend b = cpu_backend;
    b.free_memory = ranked_free_memory;
    b.forward = ranked_forward;
    b.gradient_norms = ranked_norms;
    b.devices = many_devices;
    b.join = ranked_join;
    b.share = ranked_share;
    b.choices = ranked_choices;
    b.choose = ranked_take;
    if (late) b = late_backend(b);
    exit(train(argc, argv, &b));
}

/* It ends well. */
static bool run(const char *name, const char *flags) {
    char *all = xasprintf("%s --out %s/%s", flags, folder, name);
    int status = status_of(start_run(name, common, all), 120);
    free(all);
    return CHECK(status == 0, "%s (%s): status %d, %s", name, flags, status, ending(output_of(name)));
}

/* N ranks and one with the same --accum, on all kinds of models. */
static void test_equal(void) {
    static const struct {
        const char *name, *flags;
        int accum, ranks;
    } kinds[] = {
        {"standard", "--attention standard --optimizer adamw", 2, 2},
        {"hybrid", "--attention hybrid", 3, 3},
        {"linear", "--attention gsa --mixer linear --recompute", 4, 2},
        {"uneven", "--attention hybrid --gain head", 5, 3},
        {"grow", "--attention gsa --adapt grow --adapt-rules every=2,life=0,activation=0.9 --splats-alive 4", 2, 2},
        {"kmeans", "--attention gsa --splat-init kmeans --objective mlm", 2, 2},
        {"overfit", "--attention hybrid --overfit-batch --doc-start", 2, 2}};
    for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++) {
        char *one = xasprintf("%s_one", kinds[i].name), *several = xasprintf("%s_several", kinds[i].name),
             *after = xasprintf("%s_after", kinds[i].name);
        char *flags = xasprintf("%s --steps 10 --eval-every 5 --accum %d", kinds[i].flags, kinds[i].accum),
             *more = xasprintf("%s --gpus %d", flags, kinds[i].ranks);
        if (run(one, flags) && run(several, more)) {
            int n, evaluations;
            double apart = losses_apart(several, one, "trl:", 200, &n),
                   then = losses_apart(several, one, "tel:", 200, &evaluations);
            CHECK(n == 10 && apart <= 1e-5, "%s: losses of %d steps on %d ranks differ by %.1e", kinds[i].name, n,
                  kinds[i].ranks, apart);
            CHECK(evaluations == 3 && then <= 1e-5, "%s: validation losses differ by %.1e", kinds[i].name, then);
        }
        if (strcmp(kinds[i].name, "grow") == 0) {
            double a[400], b[400];
            int n = logged(one, "slot:", a, 400), m = logged(several, "slot:", b, 400);
            CHECK(n > 0 && n == m && memcmp(a, b, (size_t)n * sizeof *a) == 0, "grow: %d and %d events, the same", n,
                  m);
        }
        late = true;
        CHECK(run(after, more) && same_file(after, several, "model_00000010.bin"),
              "%s: the same bit for bit where results come a step later", kinds[i].name);
        late = false;
        free(one);
        free(several);
        free(after);
        free(flags);
        free(more);
    }
    run("again_several", "--attention hybrid --steps 10 --eval-every 5 --gpus 3"); /* --accum is 3 then */
    CHECK(same_file("again_several", "hybrid_several", "model_00000010.bin"), "two runs are the same bit for bit");
}

/* One rank for four steps, two for the next four, one again: as if each had been stopped there. */
static void test_resume(void) {
    const char *flags = "--attention hybrid --steps 12 --accum 2 --save-every 4 --keep 0 --eval-every 0";
    if (!run("whole", flags) || !go_on_from("whole", "on2", 4) || !run("on2", "--resume --gpus 2") ||
        !go_on_from("on2", "on1", 8) || !run("on1", "--resume"))
        return;
    double apart = fabs(last_loss("on1") / last_loss("whole") - 1);
    CHECK(apart <= 1e-5, "gone on from step 4 by two ranks and from 8 by one: the last losses differ by %.1e", apart);
    char *command = xasprintf("--resume --gpus 3 --out %s/whole", folder);
    int status = status_of(start_run("idle", common, command), 60);
    CHECK(status == 2 && strstr(output_of("idle"), "use at most 2"), "more ranks than batches: %d, %s", status,
          output_of("idle"));
    free(command);
}

/* One rank has no memory: one sentence, and the checkpoint from which the run goes on stays as it is. */
static void test_memory(void) {
    if (!go_on_from("whole", "poor", 8)) return;
    char *resumed = xasprintf("--resume --gpus 2 --out %s/poor", folder);
    fault = "1 memory";
    int status = status_of(start_run("no_memory", common, resumed), 60);
    fault = NULL;
    const char *said = output_of("no_memory");
    CHECK(status == 1 && times(said, "train_gsacu: ") == 1 && strstr(said, "rank 1 (process ") &&
              strstr(said, "of memory and 0.0 are free"),
          "rank 1 has no memory: status %d, %s", status, ending(said));
    CHECK(run("poor", "--resume --gpus 2") && fabs(last_loss("poor") / last_loss("whole") - 1) <= 1e-5,
          "with memory again it goes on: %.9g, not %.9g", last_loss("poor"), last_loss("whole"));
    free(resumed);
}

static void test_faults(void) {
    static const struct {
        const char *fault, *says;
    } faults[] = {{"1 die", "rank 1 (process "},   {"0 die", "rank 0 (process "},
                  {"1 fail", "out of memory"},     {"0 fail", "rank 0: the GPU reports 'out of memory'"},
                  {"2 stop", "rank 2 (process "},  {"0 stop", "rank 0 (process "},
                  {"1 hang", "no pass has ended"}, {"0 hang", "rank 0 (process "}};
    ranks_patience = 3;
    for (size_t i = 0; i < sizeof faults / sizeof *faults; i++) {
        char *name = xasprintf("fault%zu", i),
             *flags =
                 xasprintf("--attention standard --steps 100000 --save-every 3 --eval-every 0 --gpus 3 --out %s/%s",
                           folder, name);
        fault = faults[i].fault;
        double began = now_seconds();
        int status = status_of(start_run(name, common, flags), 60);
        fault = NULL;
        const char *said = output_of(name);
        CHECK(status > 0 && times(said, "train_gsacu: ") == 1 && strstr(said, faults[i].says),
              "rank %s: status %d after %.1f s: %s", faults[i].fault, status, now_seconds() - began, ending(said));
        char *resumed = xasprintf("--resume --gpus 2 --out %s/%s", folder, name);
        char *again = xasprintf("%s_again", name);
        pid_t child = start_run(again, common, resumed);
        wait_for_steps(name, 20);
        kill(child, SIGINT);
        status = status_of(child, 20);
        CHECK(status == 130 && strstr(output_of(again), "going on from step 3"), "after %s: goes on: %d, %s",
              faults[i].fault, status, ending(output_of(again)));
        free(again);
        free(resumed);
        free(name);
        free(flags);
    }
    ranks_patience = 20;
}

/* A signal to the first process, or to one rank: all save once, and end. */
static void test_interrupt(void) {
    for (int one = 0; one < 2; one++) {
        char *name = xasprintf("interrupt%d", one),
             *flags =
                 xasprintf("--attention standard --steps 100000 --save-every 0 --eval-every 0 --gpus 3 --out %s/%s",
                           folder, name);
        fault = one ? "1 interrupt" : NULL;
        pid_t child = start_run(name, common, flags);
        if (!one) {
            wait_for_steps(name, 3);
            kill(child, SIGINT);
        }
        int status = status_of(child, 20);
        fault = NULL;
        const char *said = output_of(name);
        CHECK(status == 130 && times(said, "saved ") == 1 && strstr(said, "go on with --resume"),
              "interrupted: status %d, %s", status, ending(said));
        free(name);
        free(flags);
    }
}

static void test_refusals(void) {
    static const struct {
        const char *flags, *says;
    } refused[] = {{"--gpus 9", "this machine shows 8"},
                   {"--shard-optimiser", "--shard-optimiser"},
                   {"--reduce bf16", "--reduce"},
                   {"--gpus 3 --accum 2", "use at most 2"}};
    for (size_t i = 0; i < sizeof refused / sizeof *refused; i++) {
        char *name = xasprintf("refused%zu", i), *flags = xasprintf("%s --out %s/refused", refused[i].flags, folder);
        int status = status_of(start_run(name, common, flags), 30);
        const char *said = output_of(name);
        CHECK(status == 2 && strstr(said, refused[i].says), "%s: status %d, %s", refused[i].flags, status, said);
        free(name);
        free(flags);
    }
    setenv("RANK", "0", 1);
    setenv("WORLD_SIZE", "2", 1);
    setenv("LOCAL_RANK", "0", 1);
    setenv("MASTER_ADDR", "127.0.0.1", 1);
    int status = status_of(start_run("both", common, "--gpus 2"), 30);
    CHECK(status == 2 && strstr(output_of("both"), "torchrun has started this process as rank 0 of 2"),
          "--gpus under a launcher: %d, %s", status, output_of("both"));
    unsetenv("RANK");
    unsetenv("WORLD_SIZE");
    unsetenv("LOCAL_RANK");
}

/* Two processes as a launcher starts them, and one that was given another flag. */
static void test_by_hand(void) {
    char *port = xasprintf("%d", any_port() + 10);
    setenv("WORLD_SIZE", "2", 1);
    setenv("MASTER_ADDR", "127.0.0.1", 1);
    setenv("MASTER_PORT", port, 1);
    for (int other = 0; other < 2; other++) {
        pid_t child[2];
        for (int rank = 0; rank < 2; rank++) {
            char *number = xasprintf("%d", rank), *name = xasprintf("hand%d_%d", other, rank);
            char *flags = xasprintf("--attention hybrid --accum 3 --steps 10 --eval-every 5 --out %s/hand%d%s", folder,
                                    other, other && rank ? " --beta2 0.9" : "");
            setenv("RANK", number, 1);
            setenv("LOCAL_RANK", number, 1);
            child[rank] = start_run(name, common, flags);
            free(number);
            free(name);
            free(flags);
        }
        int first = status_of(child[0], 60), second = status_of(child[1], 60), n;
        if (!other) {
            double apart = losses_apart("hand0", "hybrid_one", "trl:", 200, &n);
            CHECK(!first && !second && apart <= 1e-5, "two processes by hand: %d, %d, losses differ by %.1e", first,
                  second, apart);
        } else
            CHECK(first == 1 && strstr(output_of("hand1_0"), "has other settings than rank 0"), "other flags: %d, %s",
                  first, output_of("hand1_0"));
    }
    unsetenv("RANK");
    unsetenv("WORLD_SIZE");
    unsetenv("LOCAL_RANK");
    unsetenv("MASTER_ADDR");
    unsetenv("MASTER_PORT");
    free(port);
}

int main(int argc, char **argv) {
    (void)argc;
    program_name(argv[0]);
    make_test_folder();
    test_launchers();
    test_batches();
    test_skip();
    test_cuts();
    test_wires();
    test_meeting();
    test_equal();
    late = true;
    test_resume();
    test_memory();
    test_by_hand();
    test_faults();
    test_interrupt();
    test_refusals();
    remove_test_folder();
    return test_summary("ranks");
}
