/* What every program here needs and C does not give: errors in one sentence, checked memory and files,
   files that appear whole or not at all, a random generator whose state is one integer, a progress bar.
   This header and all others in gsa/ stay in the common subset of C11 and C++17, so .c and .cu include them. */
#ifndef GSA_UTIL_H
#define GSA_UTIL_H

#include <math.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(__GNUC__)
#define GSA_PRINTF(a, b) __attribute__((format(printf, a, b)))
#define GSA_NORETURN __attribute__((noreturn))
#else
#define GSA_PRINTF(a, b)
#define GSA_NORETURN
#endif

/* ---- errors: one sentence on stderr, "program: sentence", that names the file, flag or value and says what to do */

/* Call first in main. Also opens descriptors 0 to 2 where they are closed, or the next file would get the screen's
   text: reading and writing them fails as it did. Refuses stacks that are too small for threads. And from then on a
   program whose standard output could not be written ends with a sentence and exit status 1, at its end at the latest:
   nobody need look at what printf returns. */
void program_name(const char *argv0);
/* Writes standard output to where it goes, now; dies where that cannot be done. */
void flush_output(void);
/* For a program whose work is not what it prints: from now on standard output may fail, and its reader go away. */
void output_may_fail(void);
/* exit status 1: the input or the machine is at fault */
GSA_NORETURN void die(const char *format, ...) GSA_PRINTF(1, 2);
/* exit status 2: the command line is at fault */
GSA_NORETURN void die_usage(const char *format, ...) GSA_PRINTF(1, 2);
void warn(const char *format, ...) GSA_PRINTF(1, 2);
/* For a run of several processes, where one sentence speaks for all: `speak` gets each sentence, and the exit status
   that follows it, or 0 for a warning. Only where it returns true is the sentence printed here. */
void set_speaker(bool (*speak)(const char *sentence, int status));

/* ---- memory and files; each of these dies with a sentence instead of returning an error */

void *xmalloc(size_t bytes);
void *xcalloc(size_t count, size_t size); /* zeroed */
void *xrealloc(void *old, size_t bytes);
char *xstrdup(const char *s);
char *xasprintf(const char *format, ...) GSA_PRINTF(1, 2);
/* as it can be pasted into a shell: in quotes where it needs them */
char *shell_quoted(const char *text);
/* bytes of the machine that can be had without swapping; 0 where the system does not say */
size_t free_memory(void);

FILE *xfopen(const char *path, const char *mode);
void xfread(void *out, size_t size, size_t count, FILE *f, const char *path);
void xfwrite(const void *in, size_t size, size_t count, FILE *f, const char *path);
/* length; leaves the position where it was */
int64_t file_bytes(FILE *f, const char *path);
/* a file to be read, "-" for standard input; its name for sentences */
FILE *open_input(const char *path);
const char *input_name(const char *path);
void close_input(FILE *f);
/* whole file plus a final 0 that is not counted; "-" is standard input */
char *read_file(const char *path, size_t *bytes);
/* and its parents; an existing folder is fine */
void make_folder(const char *path);
/* sorted; count 0 where nothing matches. A file of exactly this name comes first: names may hold *, ?, [ and \ */
char **glob_files(const char *pattern, int *count);
/* names in a folder, sorted, without . and ..; count 0 where there is no such folder. free_files frees them. */
char **folder_files(const char *folder, int *count);
void free_files(char **files, int count);

/* A file being written under a temporary name beside its final one: readers see the old file or the new one, never
   a half. create_file starts it, commit_file flushes it to the disk, renames it and flushes the folder: then it
   survives a power cut. On any failure (full disk, file size limit) the program dies with a sentence; the old file is
   untouched. xfwrite on f as for any file. Whoever exits before commit_file leaves no temporary file; who is killed
   leaves PATH.tmp, which is overwritten next time. A symbolic link stays one: the file that it names is replaced.
   Devices and pipes are written as they are. */
FILE *create_file(const char *path);
void commit_file(FILE *f, const char *path);
/* flushes the folder that holds path, after a rename or removal there */
void sync_folder_of(const char *path);
/* One process at a time: locks f, open for writing, for as long as it is open. Dies where another process has it, and
   names that; `what` is what both would write. A process must not open and close the file a second time: that would
   end its lock. */
void lock_file(FILE *f, const char *what);

/* ---- choices: words of a list such as "a|b|c" */

int choice_index(const char *choices, const char *text); /* -1 where it is none of them */
void choice_name(const char *choices, int index, char *out, size_t room);

/* ---- random numbers: splitmix64, state is one integer */

uint64_t rng_next(uint64_t *state);
uint64_t rng_below(uint64_t *state, uint64_t n); /* uniform in [0, n), no modulo bias */
double rng_uniform(uint64_t *state);             /* [0, 1) */
double rng_normal(uint64_t *state);              /* mean 0, deviation 1 */
/* a hash of two integers: independent streams from (seed, purpose) */
uint64_t rng_mix(uint64_t a, uint64_t b);

/* ---- exp. The C library's does not vectorise; this does, with an error below 2.5e-7 relative. 0 below exp(-87.3),
   infinite above exp(88.37). */

static inline float exp_float(float x) {
    const float round_up = 12582912.0f; /* 1.5 * 2^23: adding it rounds to a whole number that stands in the low bits */
    float z = x * 1.44269504f + round_up, n = z - round_up;
    float r = (x - n * 0.693359375f) + n * 2.12194440e-4f; /* x - n ln 2, |r| <= 0.35, ln 2 in two parts */
    float p =
        1.0f +
        r * (1.0f + r * (0.5f + r * (0.166666657f + r * (0.0416657962f + r * (0.00833345205f + r * 0.00138765418f)))));
    uint32_t bits;
    memcpy(&bits, &z, 4);
    bits = (bits << 23) + 0x3F800000; /* 2^n: n into the exponent */
    float scale;
    memcpy(&scale, &bits, 4);
    float y = p * scale;
    y = x > 88.37f ? INFINITY : y;
    return x < -87.3f ? 0.0f : y;
}

/* ---- time and progress */

double now_seconds(void); /* monotonic */

/* A progress bar on stderr, redrawn at most ten times a second, only where stderr is a terminal; done == total ends it
   with a line. total 0: unknown. */
void progress(const char *what, double done, double total);
/* A line of ASCII on stdout, a terminal, that the next one rewrites, cut to the terminal's width; NULL takes it away,
   and comes before anything else is printed there. die and warn do that themselves. */
void rewrite_line(const char *text);

#ifdef __cplusplus
}
#endif
#endif
