/* A test program is a list of CHECKs; its last line is "N passed, M failed, K skipped" and its exit status the verdict.
   A value that is not finite fails before anything is compared. */
#ifndef GSA_TEST_H
#define GSA_TEST_H

#include "../gsa/util.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int tests_passed, tests_failed, tests_skipped;

#define CHECK(condition, ...) check((condition), __FILE__, __LINE__, __VA_ARGS__)

__attribute__((format(printf, 4, 5), unused)) static int check(int good, const char *file, int line, const char *format,
                                                               ...) {
    char what[512];
    __builtin_va_list args;
    __builtin_va_start(args, format);
    vsnprintf(what, sizeof what, format, args);
    __builtin_va_end(args);
    if (good) tests_passed++;
    else tests_failed++;
    if (!good || getenv("VERBOSE")) {
        printf("%s %s:%d %s\n", good ? "ok  " : "FAIL", file, line, what);
        fflush(stdout); /* a crash or a limit of time must not swallow it */
    }
    return good;
}

__attribute__((unused)) static void skip(const char *what, const char *why) {
    tests_skipped++;
    printf("skip %s: %s\n", what, why);
}

/* |a - b| / |b| in the L2 norm, b the reference; infinite where anything is not finite or the reference is 0. */
#define RELATIVE_ERROR(name, type)                                                       \
    __attribute__((unused)) static double name(const type *a, const type *b, size_t n) { \
        double difference = 0, reference = 0;                                            \
        for (size_t i = 0; i < n; i++) {                                                 \
            if (!isfinite(a[i]) || !isfinite(b[i])) return INFINITY;                     \
            double d = (double)a[i] - (double)b[i];                                      \
            difference += d * d;                                                         \
            reference += (double)b[i] * (double)b[i];                                    \
        }                                                                                \
        return reference > 0 ? sqrt(difference / reference) : INFINITY;                  \
    }
RELATIVE_ERROR(relative_error, float)
RELATIVE_ERROR(relative_error_double, double)

__attribute__((unused)) static void write_file(const char *path, const void *bytes, size_t n) {
    FILE *f = xfopen(path, "wb");
    xfwrite(bytes, 1, n, f, path);
    fclose(f);
}

__attribute__((unused)) static int test_summary(const char *name) {
    printf("%s: %d passed, %d failed, %d skipped\n", name, tests_passed, tests_failed, tests_skipped);
    return tests_failed ? 1 : 0;
}

#endif
