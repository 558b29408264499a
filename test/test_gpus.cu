/* Runs on two GPUs against runs on one, in bf16 and in fp32 (test_gpus_fp32): losses, memory shared out, going on with
   another number of GPUs, and one sentence when a rank fails. The test program is the training program too:
   test_gpus train FLAGS. Skipped where two GPUs or NCCL are missing; test_ranks.c has what needs neither. */
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
static const char common[] = "--layers 3 --heads 4 --channels 256 --seq 128 --batch 8 --vocab 512 --eval-tokens 8192 "
                             "--sample-every 0 --lr 1e-3 --warmup 10";

static bool run(const char *as, const char *flags) {
    char *all = xasprintf("%s --out %s/%s", flags, folder, as);
    int status = status_of(start_run(as, common, all), 60);
    free(all);
    return CHECK(status == 0, "%s (%s): status %d, %s", as, flags, status, ending(output_of(as)));
}

/* Losses of two GPUs and one, over 10 steps and all 50. In bf16 as close as one GPU with batches of another size, which
   adds the same in another order. */
static void test_losses(void) {
    static const struct {
        const char *name, *flags, *more;
        int batch, accum;
    } kinds[] = {{"standard", "--attention standard", "", 8, 2},
                 {"hybrid", "--attention hybrid", "", 8, 2},
                 {"linear", "--attention gsa --mixer linear", "", 8, 2},
                 {"accum", "--attention hybrid --gain head --pos rope", "", 8, 6},
                 {"recompute", "--attention hybrid", "--recompute", 8, 2},
                 {"narrow", "--attention hybrid", "--reduce bf16", 8, 2},
                 {"grow", "--attention gsa --adapt grow --adapt-rules every=5,life=0,activation=0.9 --splats-alive 8",
                  "", 8, 2}};
    for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++) {
        const char *kind = kinds[i].name;
        char *one = xasprintf("%s_one", kind), *two = xasprintf("%s_two", kind), *other = xasprintf("%s_other", kind);
        char *flags = xasprintf("%s --steps 50 --eval-every 25", kinds[i].flags);
        char *alone = xasprintf("%s --accum %d", flags, kinds[i].accum),
             *both = xasprintf("%s %s --gpus 2", alone, kinds[i].more),
             *order = xasprintf("%s --batch 16 --accum %d", flags, kinds[i].accum / 2);
        int n, evaluations;
        bool narrow = strcmp(kind, "narrow") == 0;
        double early = 1e-5, late = 1e-3;
        bool good = run(one, alone) && run(two, both);
#ifndef GSA_FP32
        if (good && run(other, order)) {
            early = 3 * losses_apart(other, one, "trl:", 10, &n);
            late = 3 * losses_apart(other, one, "trl:", 50, &n);
        }
#endif
        if (narrow) early = late = 3e-3;
        if (good) {
            double first = losses_apart(two, one, "trl:", 10, &n), all = losses_apart(two, one, "trl:", 50, &n),
                   after = losses_apart(two, one, "tel:", 50, &evaluations);
            printf("%s: losses of two GPUs and one differ by %.1e (10 steps), %.1e (50 steps), %.1e (validation); "
                   "limits %.1e, %.1e\n",
                   kind, first, all, after, early, late);
            CHECK(n == 50 && first <= early && all <= late, "%s: %.1e, %.1e", kind, first, all);
            CHECK(evaluations == 3 && after <= late, "%s: validation losses differ by %.1e", kind, after);
        }
        free(one);
        free(two);
        free(other);
        free(flags);
        free(alone);
        free(both);
        free(order);
    }
    run("hybrid_again", "--attention hybrid --steps 50 --eval-every 25 --gpus 2"); /* --accum is 2 then */
    CHECK(same_file("hybrid_again", "hybrid_two", "model_00000050.bin"), "two runs are the same bit for bit");
    run("hybrid_shard", "--attention hybrid --steps 50 --eval-every 25 --gpus 2 --shard-optimiser");
    CHECK(same_file("hybrid_shard", "hybrid_two", "model_00000050.bin"), "--shard-optimiser: the same bit for bit");
}

/* 1, 2 and 1 GPU; and on 2 with the optimiser shared out in between. */
static void test_resume(void) {
    const char *flags = "--attention hybrid --steps 30 --accum 2 --save-every 10 --keep 0 --eval-every 0";
    if (!run("whole", flags)) return;
    for (int shard = 0; shard < 2; shard++) {
        const char *on2 = shard ? "on2s" : "on2", *on1 = shard ? "on1s" : "on1";
        if (!go_on_from("whole", on2, 10) ||
            !run(on2, shard ? "--resume --gpus 2 --shard-optimiser" : "--resume --gpus 2") ||
            !go_on_from(on2, on1, 20) || !run(on1, "--resume"))
            continue;
        double apart = fabs(last_loss(on1) / last_loss("whole") - 1);
#ifdef GSA_FP32
        double limit = 1e-4;
#else
        double limit = 3e-3;
#endif
        CHECK(apart <= limit, "1, 2 and 1 GPU%s: the last losses differ by %.1e", shard ? ", shared out" : "", apart);
        printf("1, 2 and 1 GPU%s: the last losses differ by %.1e\n", shard ? ", shared out" : "", apart);
    }
    CHECK(same_file("on1", "on1s", "model_00000030.bin"), "the same with and without --shard-optimiser, bit for bit");
}

/* The process of a rank, as its run has printed it. */
static int process_of(const char *as, int rank) {
    char *text = output_of(as), *key = xasprintf("rank %d (process ", rank), *at = strstr(text, key);
    int process = at ? atoi(at + strlen(key)) : 0;
    free(text);
    free(key);
    return process;
}

static void check_end(const char *as, const char *what, pid_t child, const char *says) {
    double began = now_seconds();
    int status = status_of(child, 35);
    double took = now_seconds() - began;
    char *said = output_of(as);
    CHECK(status > 0 && took < 30 && times(said, "train_gsacu: ") == 1 && strstr(said, says),
          "%s: status %d after %.1f s: %s", what, status, took, ending(said));
    printf("%s: status %d after %.1f s: %s", what, status, took,
           strstr(said, "train_gsacu: ") ? strstr(said, "train_gsacu: ") : "nothing\n");
    free(said);
}

static void test_faults(void) {
    static const struct {
        const char *what, *says;
        int rank, signal;
    } faults[] = {{"kill -9 of rank 1", "rank 1 (process ", 1, SIGKILL},
                  {"kill -9 of rank 0", "rank 0 (process ", 0, SIGKILL},
                  {"rank 1 stopped", "rank 1 (process ", 1, SIGSTOP}};
    for (size_t i = 0; i < sizeof faults / sizeof *faults; i++) {
        char *as = xasprintf("fault%zu", i),
             *flags = xasprintf("--attention hybrid --steps 100000 --save-every 20 --eval-every 0 --gpus 2 --out %s/%s",
                                folder, as),
             *resumed = xasprintf("--resume --gpus 2 --out %s/%s", folder, as);
        pid_t child = start_run(as, common, flags);
        wait_for_steps(as, 30);
        int process = process_of(as, faults[i].rank);
        if (process > 0) kill(process, faults[i].signal);
        check_end(as, faults[i].what, child, faults[i].says);
        char *again = xasprintf("%s_resumed", as);
        child = start_run(again, common, resumed);
        wait_for_steps(as, 60);
        kill(child, SIGINT); /* to the first process only: it passes it on */
        int status = status_of(child, 30);
        char *said = output_of(again);
        CHECK(status == 130 && strstr(said, "going on from step ") && times(said, "saved ") >= 1 &&
                  strstr(said, "interrupted; go on with"),
              "after %s: status %d, %s", faults[i].what, status, ending(said));
        free(said);
        free(again);
        free(as);
        free(flags);
        free(resumed);
    }
}

/* Another process holds nearly all of the second GPU's memory: this one. */
static void test_memory(void) {
    size_t free_bytes, all;
    void *held = NULL;
    cudaCheck(cudaSetDevice(1));
    cudaCheck(cudaMemGetInfo(&free_bytes, &all));
    cudaCheck(cudaMalloc(&held, free_bytes - ((size_t)6 << 30)));
    char *flags = xasprintf("--attention hybrid --batch 2048 --steps 3 --gpus 2 --out %s/memory", folder);
    check_end("memory", "no memory on GPU 1", start_run("memory", common, flags), "rank 1 (process ");
    cudaCheck(cudaFree(held));
    free(flags);
}

/* Two processes as a launcher would start them on two machines. */
static void test_by_hand(void) {
    char *port = xasprintf("%d", 20000 + (int)(getpid() % 20000));
    pid_t child[2];
    setenv("WORLD_SIZE", "2", 1);
    setenv("MASTER_ADDR", "127.0.0.1", 1);
    setenv("MASTER_PORT", port, 1);
    for (int rank = 0; rank < 2; rank++) {
        char *number = xasprintf("%d", rank), *as = xasprintf("hand_%d", rank),
             *flags = xasprintf("--attention hybrid --steps 50 --eval-every 25 --out %s/hand", folder);
        setenv("RANK", number, 1);
        setenv("LOCAL_RANK", number, 1);
        child[rank] = start_run(as, common, flags);
        free(number);
        free(as);
        free(flags);
    }
    int first = status_of(child[0], 60), second = status_of(child[1], 60);
    CHECK(first == 0 && second == 0 && same_file("hand", "hybrid_two", "model_00000050.bin"),
          "two processes by hand: %d, %d, %s", first, second, ending(output_of("hand_0")));
    unsetenv("RANK");
    unsetenv("LOCAL_RANK");
    unsetenv("WORLD_SIZE");
    unsetenv("MASTER_ADDR");
    unsetenv("MASTER_PORT");
    free(port);
}

int main(int argc, char **argv) {
    program_name(argv[0]);
    if (argc > 1 && strcmp(argv[1], "train") == 0) {
        argv[1] = argv[0];
        return train_main(argc - 1, argv + 1);
    }
    if (ranks_ask(cuda_devices) < 2) {
        skip("several GPUs", "fewer than two answer");
        return test_summary(name);
    }
    if (!dlopen("libnccl.so.2", RTLD_NOW | RTLD_LOCAL)) {
        skip("several GPUs", "no libnccl.so.2 (LD_LIBRARY_PATH)");
        return test_summary(name);
    }
    make_test_folder();
    test_losses();
    test_resume();
    test_by_hand();
    test_faults();
    test_memory();
    remove_test_folder();
    return test_summary(name);
}
