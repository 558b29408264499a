/* The loop with a back end that gives what a step gives out one step later (Backend.defer): the same checkpoints and
   logs as with one that computes at once, nothing is evaluated or saved before a step's result was looked at, and a
   loss that is not finite ends the run before that too. Either way the logged loss is the mean of those of the step's
   batches. The arithmetic is train_gsa.c's. */
#define main train_gsa_main
#include "../train_gsa.c"
#undef main
#include "late.h"
#include "runs.h"

static bool late;        /* this run defers */
static double pass_loss; /* of the last forward pass */
static FILE *passes;     /* the loss of each batch that is trained on, a line each */

static double noted_forward(void *model, const int *x, const int *y, int B, int T) {
    return pass_loss = cpu_forward(model, x, y, B, T);
}
static void noted_backward(void *model, double scale) {
    fprintf(passes, "%.17g\n", pass_loss);
    fflush(passes);
    cpu_backward(model, scale);
}

GSA_NORETURN static void run_here(int argc, char **argv) {
    char *path = xasprintf("%s/passes", folder);
    if (!(passes = fopen(path, "w"))) die("cannot write %s", path);
    free(path);
    Backend b = cpu_backend;
    b.forward = noted_forward;
    b.backward = noted_backward;
    if (late) b = late_backend(b);
    exit(train(argc, argv, &b));
}

/* Every run has the same small model, but for what is given. */
static const char common[] = "--layers 2 --heads 2 --channels 32 --seq 32 --batch 2 --vocab 300 --eval-tokens 320 "
                             "--threads 1 --warmup 3 --keep 0";

static int run(const char *name, const char *flags, bool defers) {
    char *all = xasprintf("%s --steps 24 --eval-every 7 --out %s/%s", flags, folder, name);
    late = defers;
    int status = status_of(start_run(name, common, all), 120);
    free(all);
    return status;
}

/* Both logs without what is timed and without their own names. */
static bool same_logs(const char *a, const char *b) {
    char *command = xasprintf("cd '%s' && for r in %s %s; do sed -e '/tps:/d' -e '/cfg:/d' $r/main.log >$r.log; done; "
                              "test -s %s.log && cmp %s.log %s.log",
                              folder, a, b, a, a, b);
    bool same = system(command) == 0;
    free(command);
    return same;
}

/* How far the last run's logged losses are, relatively, from the means of those of `accum` batches each. */
static double losses_off(const char *name, int accum) {
    double logged_losses[1000], worst = 0, loss;
    int steps = logged(name, "trl:", logged_losses, 1000), step = 0;
    char *path = xasprintf("%s/passes", folder);
    FILE *f = fopen(path, "r");
    while (f && step < steps) {
        double sum = 0;
        for (int i = 0; i < accum; i++) sum += fscanf(f, "%lf", &loss) == 1 ? loss : NAN;
        double off = fabs(logged_losses[step++] / (sum / accum) - 1);
        if (!(off <= worst)) worst = off;
    }
    bool whole = f && steps > 0 && fscanf(f, "%lf", &loss) == EOF;
    if (f) fclose(f);
    free(path);
    return whole ? worst : INFINITY;
}

static void test_equal(void) {
    static const char *const kinds[] = {
        "--attention standard --save-every 10 --sample-every 9 --clip 0.3 --optimizer adamw",
        "--attention hybrid --save-every 10 --sample-every 9 --accum 3 --clip 0",
        "--attention gsa --save-every 10 --sample-every 9 --splats-alive 4 --adapt grow --adapt-rules "
        "every=3,life=0,activation=0.9"};
    static const int accum[] = {1, 3, 1};
    static const char *const files[] = {"model_00000010.bin", "model_00000020.bin", "model_00000024.bin"};
    for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++) {
        char *now = xasprintf("now%zu", i), *later = xasprintf("later%zu", i);
        int first = run(now, kinds[i], false);
        double off = losses_off(now, accum[i]);
        CHECK(off < 1e-8, "%s: logged losses are off by %g", kinds[i], off);
        int second = run(later, kinds[i], true);
        off = losses_off(later, accum[i]);
        CHECK(off < 1e-8, "%s, a step later: logged losses are off by %g", kinds[i], off);
        CHECK(first == 0 && second == 0, "%s: %d, %d, %s", kinds[i], first, second, ending(output_of(later)));
        for (size_t k = 0; k < sizeof files / sizeof *files; k++)
            CHECK(same_file(now, later, files[k]), "%s: %s is the same", kinds[i], files[k]);
        CHECK(same_logs(now, later), "%s: the log is the same", kinds[i]);
        free(now);
        free(later);
    }
}

/* The sentence names the step, and no checkpoint of it or of a later one is written. */
static void test_divergence(void) {
    const char *flags =
        "--attention standard --lr 10 --min-lr 10 --weight-decay 10 --clip 0 --save-every 1 --sample-every 0";
    int status[2];
    const char *said[2];
    for (int i = 0; i < 2; i++) {
        status[i] = run(i ? "nan_later" : "nan_now", flags, i == 1);
        const char *sentence = strstr(output_of(i ? "nan_later" : "nan_now"), "train_gsacu: step ");
        said[i] = sentence ? sentence : "nothing";
    }
    double losses[1000];
    char *step = xasprintf("train_gsacu: step %d: ", logged("nan_now", "trl:", losses, 1000) + 1);
    CHECK(status[0] == 1 && status[1] == 1 && strcmp(said[0], said[1]) == 0 &&
              strncmp(said[0], step, strlen(step)) == 0,
          "%d, %d; %s; %s; not %s", status[0], status[1], said[0], said[1], step);
    free(step);
    char *command = xasprintf("cd '%s' && [ \"$(ls nan_now)\" = \"$(ls nan_later)\" ]", folder);
    CHECK(system(command) == 0, "a run that diverges leaves the same files");
    free(command);
}

/* Ctrl-C: the last step is looked at, and saved. */
static void test_interrupt(void) {
    char *flags = xasprintf(
        "--attention standard --steps 100000 --eval-every 0 --sample-every 0 --save-every 0 --out %s/stopped", folder);
    late = true;
    pid_t child = start_run("stopped", common, flags);
    wait_for_steps("stopped", 3);
    kill(child, SIGINT);
    int status = status_of(child, 20);
    const char *said = output_of("stopped"), *saved = strstr(said, "saved ");
    double losses[1000];
    int steps = logged("stopped", "trl:", losses, 1000), step = -1;
    if (saved) sscanf(strstr(saved, "model_"), "model_%d", &step);
    CHECK(status == 130 && step == steps, "status %d, %d steps logged, step %d saved: %s", status, steps, step,
          ending(said));
    free(flags);
}

int main(int argc, char **argv) {
    (void)argc;
    program_name(argv[0]);
    make_test_folder();
    test_equal();
    test_divergence();
    test_interrupt();
    remove_test_folder();
    return test_summary("deferred");
}
