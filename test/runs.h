/* For tests that start whole runs as processes: their folder, their output, their logs. Before it is included, the test
   defines what a run is: static void run_here(int argc, char **argv), which does not return. */
#ifndef GSA_TEST_RUNS_H
#define GSA_TEST_RUNS_H

#include "../gsa/util.h"
#include "test.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

GSA_NORETURN static void run_here(int argc, char **argv);

static char folder[] = "/tmp/test_runs_XXXXXX";

static void make_test_folder(void) {
    signal(SIGPIPE, SIG_IGN);
    if (!mkdtemp(folder)) die("cannot make a folder in /tmp");
}
static void remove_test_folder(void) {
    char *command = xasprintf("rm -rf '%s'", folder);
    if (system(command) != 0) printf("%s is left\n", folder);
    free(command);
}

/* What a process has printed, on both streams; valid for the next few calls. */
static const char *output_of(const char *name) {
    static char *texts[16];
    static int next;
    char *path = xasprintf("%s/%s.out", folder, name), **text = &texts[next++ % 16];
    size_t bytes;
    free(*text);
    *text = access(path, F_OK) == 0 ? read_file(path, &bytes) : xstrdup("");
    free(path);
    return *text;
}
static void output_to(const char *name) {
    char *path = xasprintf("%s/%s.out", folder, name);
    int file = open(path, O_WRONLY | O_CREAT | O_APPEND, 0600);
    if (file < 0 || dup2(file, 1) < 0 || dup2(file, 2) < 0) _exit(99);
    close(file);
    free(path);
}

/* Its last words. */
static const char *ending(const char *text) {
    size_t n = strlen(text);
    return text + (n > 250 ? n - 250 : 0);
}

/* How often text holds part. */
__attribute__((unused)) static int times(const char *text, const char *part) {
    int n = 0;
    for (const char *at = strstr(text, part); at; at = strstr(at + strlen(part), part)) n++;
    return n;
}

/* Ends with the child; -1: it did not end within `seconds`, and was killed. Else the status as a shell gives it. */
static int status_of(pid_t child, double seconds) {
    int status;
    for (double until = now_seconds() + seconds; now_seconds() < until; usleep(20000))
        if (waitpid(child, &status, WNOHANG) == child)
            return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
    kill(child, SIGKILL);
    waitpid(child, &status, 0);
    return -1;
}

/* A run in a process of its own; `common` flags, then its own. */
static pid_t start_run(const char *name, const char *common, const char *flags) {
    char *line = xasprintf("train_gsacu %s %s", common, flags), *arguments[80];
    int count = 0;
    for (char *word = strtok(line, " "); word && count < 79; word = strtok(NULL, " ")) arguments[count++] = word;
    arguments[count] = NULL;
    fflush(NULL);
    pid_t child = fork();
    if (child == 0) {
        output_to(name);
        run_here(count, arguments);
    }
    free(line);
    return child;
}

/* The numbers behind `key` in the lines of a run's log, such as "trl:"; returns how many there are. */
static int logged(const char *name, const char *key, double *out, int most) {
    char *path = xasprintf("%s/%s/main.log", folder, name);
    size_t bytes;
    char *text = access(path, F_OK) == 0 ? read_file(path, &bytes) : xstrdup("");
    int n = 0;
    for (const char *at = strstr(text, key); at && n < most; at = strstr(at + 1, key))
        out[n++] = strtod(at + strlen(key), NULL);
    free(text);
    free(path);
    return n;
}

/* Until so many steps are in the run's log, or a minute. */
static void wait_for_steps(const char *name, int steps) {
    double losses[1000];
    for (double until = now_seconds() + 60; now_seconds() < until && logged(name, "trl:", losses, 1000) < steps;)
        usleep(50000);
}

/* The largest relative difference of two runs' losses, of the first `most` or as many as there are, which are counted;
   infinite where they have not the same number, none, or one that is not finite. */
__attribute__((unused)) static double losses_apart(const char *a, const char *b, const char *key, int most,
                                                   int *count) {
    double x[1000], y[1000], largest = 0;
    int n = logged(a, key, x, most), m = logged(b, key, y, most);
    *count = n;
    if (n != m || n == 0) return INFINITY;
    for (int i = 0; i < n; i++) {
        double apart = fabs(x[i] - y[i]) / fabs(y[i]);
        if (!isfinite(apart)) return INFINITY;
        largest = apart > largest ? apart : largest;
    }
    return largest;
}

__attribute__((unused)) static double last_loss(const char *name) {
    double x[1000];
    int n = logged(name, "trl:", x, 1000);
    return n ? x[n - 1] : NAN;
}

/* Run `to` is run `from` as it was after `step` steps, which both have saved. */
__attribute__((unused)) static bool go_on_from(const char *from, const char *to, int step) {
    char *command = xasprintf("cd '%s' && cp -r %s %s && cd %s && for f in *_000*.bin; do "
                              "case $f in *_%08d.bin) ;; *) [ \"${f#*_}\" \\< %08d.bin ] || rm $f;; esac; done",
                              folder, from, to, to, step, step);
    bool done = system(command) == 0;
    free(command);
    return CHECK(done, "%s as it was after step %d", from, step);
}

static bool same_file(const char *a, const char *b, const char *file) {
    char *command = xasprintf("cmp -s '%s/%s/%s' '%s/%s/%s'", folder, a, file, folder, b, file);
    bool same = system(command) == 0;
    free(command);
    return same;
}

#endif
