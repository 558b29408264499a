/* Files made by libFuzzer, which keeps what reaches new code, read by one of the readers of fuzz.h in this process,
   again and again. FUZZ names the reader, FUZZ_FOLDER a folder of valid files; the rest is libFuzzer's: test/fuzz/run
   makes the files and starts it for all of them.

   A reader that refuses its file ends by exit, and what it holds then is the system's to free. Here exit leads back
   to the loop, and all memory, files and mappings that are still held are given back: the linker puts the functions
   below, of the names __wrap_..., into the place of the C library's (--wrap). */
#include "fuzz.h"

#include "../../gsa/util.h"

#include <cjson/cJSON.h>
#include <fcntl.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

const char *fuzz_folder;

/* ---------------------------------------------------------------------- what a run holds */

typedef enum { MEMORY = 1, STREAM, DESCRIPTOR, MAPPING } Kind;
typedef struct {
    Kind kind; /* 0: free */
    uintptr_t what;
    size_t bytes;
    int next; /* of the same bucket, or of the free ones; -1: none */
} Held;

enum { BUCKETS = 1 << 16 };
static Held *held;
static int room, used, free_ones = -1, buckets[BUCKETS];
static bool running, keeping;

static int *bucket_of(uintptr_t what) { return &buckets[rng_mix(what, 0) % BUCKETS]; }

void *__real_malloc(size_t bytes);
void *__real_calloc(size_t count, size_t size);
void *__real_realloc(void *old, size_t bytes);
void __real_free(void *p);
int __real_vasprintf(char **text, const char *format, va_list args);
FILE *__real_fopen(const char *path, const char *mode);
int __real_fclose(FILE *f);
int __real_open(const char *path, int flags, ...);
int __real_close(int fd);
void *__real_mmap(void *at, size_t bytes, int protection, int flags, int fd, off_t offset);
int __real_munmap(void *at, size_t bytes);
void __real_exit(int status) __attribute__((noreturn));

static void hold(Kind kind, uintptr_t what, size_t bytes) {
    if (!running || keeping) return;
    int i = free_ones;
    if (i >= 0) free_ones = held[i].next;
    else {
        if (used == room) held = __real_realloc(held, (size_t)(room = 2 * room + 1024) * sizeof *held);
        i = used++;
    }
    int *bucket = bucket_of(what);
    held[i] = (Held){kind, what, bytes, *bucket};
    *bucket = i;
}

static void forget(Kind kind, uintptr_t what) {
    if (!used) return; /* nothing was ever held, and the buckets are not yet set up */
    for (int *at = bucket_of(what); *at >= 0; at = &held[*at].next) {
        Held *h = &held[*at];
        if (h->kind != kind || h->what != what) continue;
        int i = *at;
        *at = h->next;
        h->kind = 0;
        h->next = free_ones;
        free_ones = i;
        return;
    }
}

static void give_back(void) {
    for (int i = 0; i < used; i++) {
        Held *h = &held[i];
        if (h->kind == MEMORY) __real_free((void *)h->what);
        if (h->kind == STREAM) __real_fclose((FILE *)h->what);
        if (h->kind == DESCRIPTOR) __real_close((int)h->what);
        if (h->kind == MAPPING) __real_munmap((void *)h->what, h->bytes);
    }
    used = 0;
    free_ones = -1;
    memset(buckets, 0xFF, sizeof buckets);
}

void fuzz_keep(int on) { keeping = on; }

void *__wrap_malloc(size_t bytes);
void *__wrap_malloc(size_t bytes) {
    void *p = __real_malloc(bytes);
    if (p) hold(MEMORY, (uintptr_t)p, 0);
    return p;
}
void *__wrap_calloc(size_t count, size_t size);
void *__wrap_calloc(size_t count, size_t size) {
    void *p = __real_calloc(count, size);
    if (p) hold(MEMORY, (uintptr_t)p, 0);
    return p;
}
void *__wrap_realloc(void *old, size_t bytes);
void *__wrap_realloc(void *old, size_t bytes) {
    void *p = __real_realloc(old, bytes);
    if (!p) return NULL;
    if (old) forget(MEMORY, (uintptr_t)old);
    hold(MEMORY, (uintptr_t)p, 0);
    return p;
}
void __wrap_free(void *p);
void __wrap_free(void *p) {
    forget(MEMORY, (uintptr_t)p);
    __real_free(p);
}
int __wrap_vasprintf(char **text, const char *format, va_list args);
int __wrap_vasprintf(char **text, const char *format, va_list args) {
    int n = __real_vasprintf(text, format, args);
    if (n >= 0) hold(MEMORY, (uintptr_t)*text, 0);
    return n;
}
FILE *__wrap_fopen(const char *path, const char *mode);
FILE *__wrap_fopen(const char *path, const char *mode) {
    FILE *f = __real_fopen(path, mode);
    if (f) hold(STREAM, (uintptr_t)f, 0);
    return f;
}
int __wrap_fclose(FILE *f);
int __wrap_fclose(FILE *f) {
    forget(STREAM, (uintptr_t)f);
    return __real_fclose(f);
}
int __wrap_open(const char *path, int flags, ...);
int __wrap_open(const char *path, int flags, ...) {
    int fd = __real_open(path, flags, 0666);
    if (fd >= 0) hold(DESCRIPTOR, (uintptr_t)fd, 0);
    return fd;
}
int __wrap_close(int fd);
int __wrap_close(int fd) {
    forget(DESCRIPTOR, (uintptr_t)fd);
    return __real_close(fd);
}
void *__wrap_mmap(void *at, size_t bytes, int protection, int flags, int fd, off_t offset);
void *__wrap_mmap(void *at, size_t bytes, int protection, int flags, int fd, off_t offset) {
    void *p = __real_mmap(at, bytes, protection, flags, fd, offset);
    if (p != MAP_FAILED) hold(MAPPING, (uintptr_t)p, bytes);
    return p;
}
int __wrap_munmap(void *at, size_t bytes);
int __wrap_munmap(void *at, size_t bytes) {
    forget(MAPPING, (uintptr_t)at);
    return __real_munmap(at, bytes);
}

static jmp_buf next_run;
void __wrap_exit(int status) __attribute__((noreturn));
void __wrap_exit(int status) {
    if (!running) __real_exit(status);
    if (status < 0 || status > 2) abort(); /* no program ends so */
    longjmp(next_run, 1);
}

/* ---------------------------------------------------------------------- libFuzzer's side */

typedef struct {
    const char *name;
    void (*read)(char *path);
    size_t header;
} Target;
#define X(name, header) {#name, fuzz_##name, header},
static const Target targets[] = {FUZZ_TARGETS(X)};
#undef X
static const Target *target;
static int file; /* in memory */
static char *path;

int LLVMFuzzerInitialize(int *argc, char ***argv);
int LLVMFuzzerInitialize(int *argc, char ***argv) {
    (void)argc;
    program_name((*argv)[0]);
    const char *name = getenv("FUZZ");
    for (size_t i = 0; i < sizeof targets / sizeof *targets; i++)
        if (name && strcmp(targets[i].name, name) == 0) target = &targets[i];
    fuzz_folder = getenv("FUZZ_FOLDER");
    if (!target || !fuzz_folder) die("FUZZ must name a reader of test/fuzz/fuzz.h, and FUZZ_FOLDER its valid files");
    file = memfd_create("fuzzed", 0);
    if (file < 0) die("no file in memory can be had");
    path = xasprintf("/proc/self/fd/%d", file);
    give_back(); /* sets the buckets up */
    cJSON_InitHooks(&(cJSON_Hooks){__wrap_malloc, __wrap_free});
    return 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    if (ftruncate(file, 0) != 0 || pwrite(file, data, size, 0) != (ssize_t)size) abort();
    if (!setjmp(next_run)) {
        running = true;
        target->read(path);
    }
    running = false;
    give_back();
    return 0;
}

size_t LLVMFuzzerMutate(uint8_t *data, size_t size, size_t most);
size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t most, unsigned seed);
/* Most of a binary file is numbers of which each is as good as another, so most changes are made to its header; and a
   checkpoint that does not say its own length is refused at once. */
size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t most, unsigned seed) {
    if (!target->header) return LLVMFuzzerMutate(data, size, most);
    if (size > target->header && seed % 4) LLVMFuzzerMutate(data, target->header, target->header);
    else size = LLVMFuzzerMutate(data, size, most);
    if (target->header == 4096 && size >= 24 && seed % 16) {
        int64_t length = (int64_t)size;
        memcpy(data + 16, &length, 8);
    }
    return size;
}
