/* Runs on several GPUs against runs on one, in bf16 and in fp32 (test_gpus_fp32): losses, memory shared out, going on
   with another number of GPUs, and one sentence when a rank fails. With 2, 4 and 8 GPUs, where there are as many, or
   with the numbers given as arguments. Fewer GPUs are shared by as many ranks as the arguments say, by two if they say
   nothing. The test program is the training program too: test_gpus train FLAGS. Skipped where a GPU or NCCL is missing;
   test_ranks.c has what needs neither. */
#include <cuda_runtime.h>
#include <stdio.h>
#include <stdlib.h>

/* The training program sees as many GPUs as SHARED_GPUS says, and its rank i takes GPU i modulo the real number. NCCL
   refuses two ranks on one GPU of one machine; so each claims to be a machine, and what they send goes through TCP. */
static cudaError_t count_gpus(int *count) {
    cudaError_t error = cudaGetDeviceCount(count);
    const char *shared = getenv("SHARED_GPUS");
    if (error == cudaSuccess && *count > 0 && shared) *count = atoi(shared);
    return error;
}
static cudaError_t take_gpu(int device) {
    int count;
    if (!getenv("SHARED_GPUS")) return cudaSetDevice(device);
    cudaError_t error = cudaGetDeviceCount(&count);
    if (error != cudaSuccess) return error;
    char machine[16];
    snprintf(machine, sizeof machine, "%d", device);
    setenv("NCCL_HOSTID", machine, 1);
    return cudaSetDevice(device % count);
}
#define cudaGetDeviceCount count_gpus
#define cudaSetDevice take_gpu

#define main train_main
#include "../train_gsa.cu"
#undef main

#include "runs.h"

#ifdef GSA_FP32
static const char name[] = "gpus_fp32";
#else
static const char name[] = "gpus";
#endif

/* A new process, which begins the CUDA runtime anew. */
GSA_NORETURN static void run_here(int argc, char **argv) {
    char *arguments[90] = {argv[0], (char *)"train"};
    memcpy(arguments + 2, argv + 1, (size_t)argc * sizeof *argv); /* the NULL behind them too */
    execv("/proc/self/exe", arguments);
    _exit(98);
}

/* Every run has the same small model, but for what is given. */
static const char common[] = "--layers 3 --heads 4 --channels 256 --seq 128 --vocab 512 --eval-tokens 8192 "
                             "--sample-every 0 --lr 1e-3 --warmup 10";

#define HYBRID "--attention hybrid --optimizer adamw"

/* Its output is called `as`, its folder `in`. */
static pid_t begin(const char *as, const char *in, const char *flags) {
    bool has_batch = strstr(flags, "--batch") || strstr(flags, "--resume");
    char *all = xasprintf("%s%s --out %s/%s", has_batch ? "" : "--batch 8 ", flags, folder, in);
    pid_t child = start_run(as, common, all);
    free(all);
    return child;
}

static bool run(const char *as, const char *flags) {
    int status = status_of(begin(as, as, flags), 60);
    return CHECK(status == 0, "%s (%s): status %d, %s", as, flags, status, ending(output_of(as)));
}

static int gpus;     /* of the tests below */
static bool crowded; /* by more ranks than there are */

/* The model after so many steps is the same in the runs `as` and `other`. */
static void check_same(const char *as, const char *flags, const char *other, int steps) {
    char *file = xasprintf("model_%08d.bin", steps);
    CHECK(run(as, flags) && same_file(as, other, file), "%d GPUs: %s and %s are the same bit for bit", gpus, as, other);
    free(file);
}

static void compare_losses(const char *kind, const char *several, const char *one, const char *other) {
    double early = 1e-5, late = 1e-3;
    int n, evaluations;
#ifndef GSA_FP32
    early = fmax(3 * losses_apart(other, one, "trl:", 10, &n), 5e-4);
    late = fmax(3 * losses_apart(other, one, "trl:", 50, &n), 3e-3);
#else
    (void)other;
#endif
    if (strcmp(kind, "narrow") == 0) early = late = 3e-3;
    double first = losses_apart(several, one, "trl:", 10, &n), all = losses_apart(several, one, "trl:", 50, &n),
           after = losses_apart(several, one, "tel:", 50, &evaluations);
    printf("%s: losses of %d GPUs and one differ by %.1e (10 steps), %.1e (50 steps), %.1e (validation); "
           "limits %.1e, %.1e\n",
           kind, gpus, first, all, after, early, late);
    CHECK(n == 50 && first <= early && all <= late, "%s, %d GPUs: %.1e, %.1e", kind, gpus, first, all);
    CHECK(evaluations == 3 && after <= late, "%s, %d GPUs: validation losses differ by %.1e", kind, gpus, after);
}

/* Losses of several GPUs and one, over 10 steps and all 50. In bf16 about as close as one GPU with batches of another
   size, which adds the same in another order: either difference is chance, and may be 0. */
static void test_losses(void) {
    static const struct {
        const char *name, *flags, *more;
        int uneven;  /* batches beyond one a GPU */
        bool always; /* or with two GPUs only: what the passes of one GPU are made of does not depend on the others */
    } kinds[] = {{"standard", "--attention standard --optimizer adamw", "", 0, false},
                 {"hybrid", HYBRID, "", 0, true},
                 {"linear", "--attention gsa --mixer linear --optimizer adamw", "", 0, false},
                 {"accum", HYBRID " --gain head --pos rope", "", 2, true},
                 {"recompute", HYBRID, "--recompute", 0, false},
                 {"narrow", HYBRID, "--reduce bf16", 0, true},
                 {"grow",
                  "--attention gsa --adapt grow --adapt-rules every=5,life=0,activation=0.9 --splats-alive 8 "
                  "--optimizer adamw",
                  "", 0, true}};
    for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++) {
        const char *kind = kinds[i].name;
        if (gpus > 2 && !kinds[i].always) continue;
        char *one = xasprintf("%s_%d_one", kind, gpus), *several = xasprintf("%s_%d", kind, gpus),
             *other = xasprintf("%s_%d_other", kind, gpus);
        char *flags = xasprintf("%s --steps 50 --eval-every 25", kinds[i].flags);
        int accum = gpus + kinds[i].uneven;
        char *alone = xasprintf("%s --accum %d", flags, accum),
             *together = xasprintf("%s %s --gpus %d", alone, kinds[i].more, gpus),
             *order = xasprintf("%s --batch 16 --accum %d", flags, accum / 2);
        bool good = run(one, alone) && run(several, together);
#ifndef GSA_FP32
        good = good && run(other, order);
#endif
        if (good) compare_losses(kind, several, one, other);
        free(one);
        free(several);
        free(other);
        free(flags);
        free(alone);
        free(together);
        free(order);
    }
}

/* The same again, and the same with the optimiser shared out. */
static void test_bits(void) {
    static const struct {
        const char *name, *flags;
        int steps;
    } kinds[] = {{"hybrid", HYBRID " --steps 50 --eval-every 25", 50},
                 {"gates", "--attention standard --forget-gate all --optimizer adamw --steps 20 --eval-every 10", 20},
                 {"muon", "--attention hybrid --optimizer muon --steps 20 --eval-every 10", 20}};
    for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++) {
        char *first = xasprintf("%s_%d", kinds[i].name, gpus), *again = xasprintf("%s_again", first),
             *shard = xasprintf("%s_shard", first);
        char *flags = xasprintf("%s --gpus %d", kinds[i].flags, gpus), /* --accum is this number then */
            *shared = xasprintf("%s --shard-optimiser", flags);
        if (i > 0) run(first, flags); /* test_losses has run the hybrid */
        check_same(again, flags, first, kinds[i].steps);
        check_same(shard, shared, first, kinds[i].steps);
        free(first);
        free(again);
        free(shard);
        free(flags);
        free(shared);
    }
}

/* 1, all and half of the GPUs; and with the optimiser shared out in between. */
static void test_resume(void) {
    char *whole = xasprintf("whole_%d", gpus), *unlike[2];
    char *flags = xasprintf(HYBRID " --steps 30 --accum %d --save-every 10 --keep 0 --eval-every 0", gpus);
    bool good = run(whole, flags);
    for (int shard = 0; shard < 2; shard++) {
        char *all = xasprintf("on%d%s", gpus, shard ? "s" : ""), *half = xasprintf("%s_half", all);
        char *flags2 = xasprintf("--resume --gpus %d%s", gpus, shard ? " --shard-optimiser" : ""),
             *flags3 = xasprintf("--resume --gpus %d", gpus / 2);
        unlike[shard] = half;
        if (good && go_on_from(whole, all, 10) && run(all, flags2) && go_on_from(all, half, 20) && run(half, flags3)) {
            double apart = fabs(last_loss(half) / last_loss(whole) - 1);
#ifdef GSA_FP32
            double limit = 1e-4;
#else
            double limit = 3e-3;
#endif
            const char *how = shard ? ", shared out" : "";
            CHECK(apart <= limit, "1, %d and %d GPUs%s: the last losses differ by %.1e", gpus, gpus / 2, how, apart);
            printf("1, %d and %d GPUs%s: the last losses differ by %.1e\n", gpus, gpus / 2, how, apart);
        } else good = false;
        free(all);
        free(flags2);
        free(flags3);
    }
    CHECK(good && same_file(unlike[0], unlike[1], "model_00000030.bin"),
          "%d GPUs: the same with and without --shard-optimiser, bit for bit", gpus);
    free(unlike[0]);
    free(unlike[1]);
    free(whole);
    free(flags);
}

/* The process of a rank, as its run has printed it. */
static int process_of(const char *as, int rank) {
    const char *text = output_of(as);
    char *key = xasprintf("rank %d (process ", rank);
    const char *at = strstr(text, key);
    int process = at ? atoi(at + strlen(key)) : 0;
    free(key);
    return process;
}

static void check_end(const char *as, const char *what, pid_t child, const char *says) {
    double began = now_seconds();
    int status = status_of(child, 35);
    double took = now_seconds() - began;
    const char *said = output_of(as);
    CHECK(status > 0 && took < 30 && times(said, "train_gsacu: ") == 1 && strstr(said, says),
          "%s: status %d after %.1f s: %s", what, status, took, ending(said));
    printf("%s: status %d after %.1f s: %s", what, status, took,
           strstr(said, "train_gsacu: ") ? strstr(said, "train_gsacu: ") : "nothing\n");
}

/* A run whose process ended goes on from its last checkpoint; Ctrl-C ends it. */
static void check_goes_on(const char *as, const char *what) {
    char *again = xasprintf("%s_resumed", as), *flags = xasprintf("--resume --gpus %d", gpus);
    pid_t child = begin(again, as, flags);
    wait_for_steps(as, 60);
    kill(child, SIGINT); /* to the first process only: it passes it on */
    int status = status_of(child, 30);
    const char *said = output_of(again);
    CHECK(status == 130 && strstr(said, "going on from step ") && times(said, "saved ") >= 1 &&
              strstr(said, "interrupted; go on with"),
          "after %s: status %d, %s", what, status, ending(said));
    free(again);
    free(flags);
}

static void test_faults(void) {
    const struct {
        const char *what;
        int rank, signal;
    } faults[] = {{"kill -9", gpus - 1, SIGKILL}, {"kill -9", 0, SIGKILL}, {"stopped", 1, SIGSTOP}};
    for (int i = 0; i < (gpus == 2 ? 3 : 1); i++) {
        char *as = xasprintf("fault%d_%d", i, gpus), *says = xasprintf("rank %d (process ", faults[i].rank),
             *what = xasprintf("%d GPUs, rank %d %s", gpus, faults[i].rank, faults[i].what),
             *flags = xasprintf(HYBRID " --steps 100000 --save-every 20 --eval-every 0 --gpus %d", gpus);
        pid_t child = begin(as, as, flags);
        wait_for_steps(as, 30);
        int process = process_of(as, faults[i].rank);
        if (process > 0) kill(process, faults[i].signal);
        check_end(as, what, child, says);
        check_goes_on(as, what);
        free(as);
        free(says);
        free(what);
        free(flags);
    }
}

/* Another process holds the last GPU's memory: this one. It leaves room for a process's beginning, but not for the
   model; then for neither. Once it is gone, the run goes on from its checkpoint. */
static void test_memory(void) {
    static const char flags[] = HYBRID " --batch 1024 --steps 100000 --save-every 20 --eval-every 0";
    static const size_t left[] = {(size_t)2 << 30, (size_t)100 << 20};
    char *several = xasprintf("%s --gpus %d", flags, gpus),
         *resumed = xasprintf("--resume --batch 1024 --gpus %d", gpus),
         *says = xasprintf("rank %d (process ", gpus - 1), name[32];
    pid_t child = begin("memory", "memory", several);
    wait_for_steps("memory", 30);
    kill(child, SIGKILL);
    status_of(child, 10);
    usleep(500000); /* its ranks end with it */
    cudaCheck(cudaSetDevice(gpus - 1));
    for (int i = 0; i < 2; i++) {
        size_t free_bytes, all;
        void *held = NULL;
        cudaCheck(cudaMemGetInfo(&free_bytes, &all));
        cudaCheck(cudaMalloc(&held, free_bytes - left[i]));
        snprintf(name, sizeof name, "no_memory%d", i);
        check_end(name, i ? "no memory at all on the last GPU" : "too little memory on the last GPU",
                  begin(name, "memory", resumed), says);
        cudaCheck(cudaFree(held));
    }
    check_goes_on("memory", "a GPU without memory");
    free(several);
    free(resumed);
    free(says);
}

/* Processes as a launcher would start them, each on a machine of its own: only rank 0's remembers which algorithms are
   fast, and others take its choices, without which the bits would be others. */
static void test_by_hand(void) {
    char *port = xasprintf("%d", 20000 + (int)(getpid() % 20000)), *count = xasprintf("%d", gpus);
    char *in = xasprintf("hand_%d", gpus), *as_one = xasprintf("hybrid_%d", gpus);
    const char *cache = getenv("XDG_CACHE_HOME");
    char *elsewhere = xasprintf("%s/elsewhere", folder), *before = cache ? xstrdup(cache) : NULL;
    pid_t child[8];
    int failed = 0;
    setenv("WORLD_SIZE", count, 1);
    setenv("MASTER_ADDR", "127.0.0.1", 1);
    setenv("MASTER_PORT", port, 1);
    for (int rank = 0; rank < gpus; rank++) {
        char *number = xasprintf("%d", rank), *as = xasprintf("%s_%d", in, rank);
        setenv("RANK", number, 1);
        setenv("LOCAL_RANK", number, 1);
        if (rank > 0) setenv("XDG_CACHE_HOME", elsewhere, 1);
        child[rank] = begin(as, in, HYBRID " --steps 50 --eval-every 25");
        free(number);
        free(as);
    }
    for (int rank = 0; rank < gpus; rank++) failed += status_of(child[rank], 60) != 0;
    char *first = xasprintf("%s_0", in);
    CHECK(!failed && same_file(in, as_one, "model_00000050.bin"), "%d processes by hand: %d failed; rank 0: %s", gpus,
          failed, ending(output_of(first)));
    free(first);
    if (before) setenv("XDG_CACHE_HOME", before, 1);
    else unsetenv("XDG_CACHE_HOME");
    unsetenv("RANK");
    unsetenv("LOCAL_RANK");
    unsetenv("WORLD_SIZE");
    unsetenv("MASTER_ADDR");
    unsetenv("MASTER_PORT");
    free(elsewhere);
    free(before);
    free(port);
    free(count);
    free(in);
    free(as_one);
}

static void test_all(void) {
    double began = now_seconds();
    test_losses();
    test_bits();
    test_resume();
    test_by_hand();
    test_faults();
    if (gpus == 2 && !crowded) test_memory(); /* it fills the last GPU, which must not be rank 0's */
    printf("%d %s: %.0f s\n", gpus, crowded ? "ranks on fewer GPUs" : "GPUs", now_seconds() - began);
    fflush(stdout);
}

static void share_gpus(void) {
    char *count = xasprintf("%d", gpus);
    setenv("SHARED_GPUS", count, 1);
    setenv("NCCL_SOCKET_IFNAME", "lo", 0);
    setenv("NCCL_IB_DISABLE", "1", 0);
    free(count);
}

int main(int argc, char **argv) {
    program_name(argv[0]);
    if (argc > 1 && strcmp(argv[1], "train") == 0) {
        argv[1] = argv[0];
        return train_main(argc - 1, argv + 1);
    }
    int devices = ranks_ask(cuda_devices);
    if (devices == 0) {
        skip("several GPUs", "none answers");
        return test_summary(name);
    }
    if (!dlopen("libnccl.so.2", RTLD_NOW | RTLD_LOCAL)) {
        skip("several GPUs", "no libnccl.so.2 (LD_LIBRARY_PATH)");
        return test_summary(name);
    }
    make_test_folder();
    for (gpus = 2; gpus <= 8; gpus *= 2) {
        bool asked = argc == 1 && (gpus == 2 || gpus <= devices);
        for (int i = 1; i < argc; i++) asked = asked || atoi(argv[i]) == gpus;
        if (!asked) continue;
        crowded = gpus > devices;
        if (crowded) share_gpus();
        test_all();
    }
    remove_test_folder();
    return test_summary(name);
}
