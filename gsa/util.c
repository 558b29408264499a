#include "util.h"

#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <glob.h>
#include <math.h>
#include <signal.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>
#ifdef __APPLE__
#include <mach/mach.h>
#endif

/* ---------------------------------------------------------------------- errors */

static const char *program = "gsa";
static bool output_matters;

/* False, with a sentence, where it could not be written. */
static bool write_output(void) {
    errno = 0;
    if ((fflush(stdout) == 0 && !ferror(stdout)) || !output_matters) return true;
    output_matters = false;
    int error = errno; /* 0: it failed earlier */
    warn("cannot write standard output%s%s", error ? ": " : "", error ? strerror(error) : "");
    return false;
}

void flush_output(void) {
    if (!write_output()) exit(1);
}

static void flush_at_exit(void) {
    if (!write_output()) _exit(1);
}

void output_may_fail(void) {
    signal(SIGPIPE, SIG_IGN);
    output_matters = false;
}

enum { SMALLEST_STACK = 256 }; /* KiB: of matrix products, with room to spare */

/* The stack of OpenMP's threads, in KiB, as the environment sets it; 0 where it does not. */
static double thread_stack(const char *variable) {
    const char *text = getenv(variable);
    char *unit = NULL;
    double size = text ? strtod(text, &unit) : 0;
    while (unit && isspace((unsigned char)*unit)) unit++;
    switch (unit ? toupper((unsigned char)*unit) : 0) {
    case 'B': return size / 1024;
    case 'M': return size * 1024;
    case 'G': return size * 1024 * 1024;
    default: return size;
    }
}

static void check_stacks(void) {
    static const char *const variables[] = {"OMP_STACKSIZE", "GOMP_STACKSIZE"};
    struct rlimit limit;
    for (int i = 0; i < 2; i++) {
        double size = thread_stack(variables[i]);
        if (size > 0 && size < SMALLEST_STACK)
            die("%s=%s leaves threads too small a stack: give %dk or more, or leave it out", variables[i],
                getenv(variables[i]), SMALLEST_STACK);
    }
    if (getrlimit(RLIMIT_STACK, &limit) == 0 && limit.rlim_cur < SMALLEST_STACK * 1024)
        die("the stack may have %ld KiB only: allow %d or more (ulimit -s)", (long)(limit.rlim_cur / 1024),
            SMALLEST_STACK);
}

/* Some libraries use memory that they asked for and were not given. */
static void on_crash(int number) {
    static const char sentence[] = ": a library stopped for want of memory, as it seems: raise the limit (ulimit -v)\n";
    if (write(2, program, strlen(program)) < 0 || write(2, sentence, sizeof sentence - 1) < 0) _exit(number);
    _exit(1);
}

void program_name(const char *argv0) {
    const char *slash = strrchr(argv0, '/');
    program = slash ? slash + 1 : argv0;
    for (int fd = 0; fd <= 2; fd++) /* the lowest closed one is opened, the wrong way round: its use is an error */
        if (fcntl(fd, F_GETFD) < 0 && open("/dev/null", fd == 0 ? O_WRONLY : O_RDONLY) < 0) _exit(1);
    /* at the file size limit a write then fails and is reported, where the signal would kill us */
    signal(SIGXFSZ, SIG_IGN);
    struct rlimit memory;
    if (getrlimit(RLIMIT_AS, &memory) == 0 && memory.rlim_cur != RLIM_INFINITY) signal(SIGSEGV, on_crash);
    check_stacks();
    output_matters = true;
    atexit(flush_at_exit); /* runs last, as it is the first that is registered */
}

static bool (*speaker)(const char *sentence, int status);

void set_speaker(bool (*speak)(const char *sentence, int status)) { speaker = speak; }

/* status: that of the exit which follows, or 0 */
static void complain(int status, const char *format, va_list args) {
    char *sentence = NULL;
    rewrite_line(NULL);
    fflush(stdout);
    if (vasprintf(&sentence, format, args) < 0) sentence = NULL;
    const char *text = sentence ? sentence : "out of memory";
    if (!speaker || speaker(text, status)) fprintf(stderr, "%s: %s\n", program, text);
    free(sentence);
}

void die(const char *format, ...) {
    va_list args;
    va_start(args, format);
    complain(1, format, args);
    va_end(args);
    output_matters = false; /* one sentence is enough, and one status */
    exit(1);
}

void die_usage(const char *format, ...) {
    va_list args;
    va_start(args, format);
    complain(2, format, args);
    va_end(args);
    output_matters = false;
    exit(2);
}

void warn(const char *format, ...) {
    va_list args;
    va_start(args, format);
    complain(0, format, args);
    va_end(args);
}

/* ---------------------------------------------------------------------- memory and files */

void *xmalloc(size_t bytes) {
    void *p = malloc(bytes ? bytes : 1);
    if (!p) die("out of memory: %.1f MiB could not be had; use a smaller model, batch or sequence", bytes / 1048576.0);
    return p;
}

void *xcalloc(size_t count, size_t size) {
    void *p = calloc(count ? count : 1, size ? size : 1);
    if (!p)
        die("out of memory: %.1f MiB could not be had; use a smaller model, batch or sequence",
            (double)count * size / 1048576.0);
    return p;
}

void *xrealloc(void *old, size_t bytes) {
    void *p = realloc(old, bytes ? bytes : 1);
    if (!p) die("out of memory: %.1f MiB could not be had", bytes / 1048576.0);
    return p;
}

char *xstrdup(const char *s) {
    size_t n = strlen(s) + 1;
    return (char *)memcpy(xmalloc(n), s, n);
}

char *xasprintf(const char *format, ...) {
    va_list args;
    char *s = NULL;
    va_start(args, format);
    if (vasprintf(&s, format, args) < 0) die("out of memory");
    va_end(args);
    return s;
}

char *shell_quoted(const char *text) {
    bool plain = *text != 0;
    for (const char *p = text; *p; p++) plain = plain && (isalnum((unsigned char)*p) || strchr("_-./:=,+@%", *p));
    if (plain) return xstrdup(text);
    char *quoted = (char *)xmalloc(4 * strlen(text) + 3), *out = quoted;
    *out++ = '\'';
    for (const char *p = text; *p; p++) {
        if (*p == '\'') out = stpcpy(out, "'\\''"); /* ends the quotes, a quote, and they begin again */
        else *out++ = *p;
    }
    strcpy(out, "'");
    return quoted;
}

size_t free_memory(void) {
#ifdef __APPLE__
    vm_statistics64_data_t pages;
    mach_msg_type_number_t count = HOST_VM_INFO64_COUNT;
    if (host_statistics64(mach_host_self(), HOST_VM_INFO64, (host_info64_t)&pages, &count) != KERN_SUCCESS) return 0;
    return ((size_t)pages.free_count + (size_t)pages.inactive_count) * (size_t)sysconf(_SC_PAGESIZE);
#else
    unsigned long long kB = 0;
    char line[128];
    FILE *f = fopen("/proc/meminfo", "r"); /* of Linux */
    while (f && fgets(line, sizeof line, f))
        if (sscanf(line, "MemAvailable: %llu kB", &kB) == 1) break;
    if (f) fclose(f);
    return (size_t)kB * 1024;
#endif
}

FILE *xfopen(const char *path, const char *mode) {
    struct stat st;
    if (mode[0] == 'r' && stat(path, &st) == 0 && S_ISDIR(st.st_mode)) die("%s is a folder, not a file", path);
    FILE *f = fopen(path, mode);
    if (!f) die("cannot open %s: %s", path, strerror(errno));
    return f;
}

void xfread(void *out, size_t size, size_t count, FILE *f, const char *path) {
    if (fread(out, size, count, f) == count) return;
    if (feof(f)) die("%s is truncated: it ends before its header says it should; make it again", path);
    die("cannot read %s: %s", path, strerror(errno));
}

/* A file between create_file and commit_file. */
typedef struct Unfinished {
    FILE *f;
    char *target;    /* the file to be replaced: behind all symbolic links */
    char *temporary; /* NULL: a device or pipe, written as it is */
    struct Unfinished *next;
} Unfinished;
static Unfinished *unfinished;

static void remove_unfinished(void) { /* at exit */
    for (Unfinished *u = unfinished; u; u = u->next)
        if (u->temporary) unlink(u->temporary);
}

static Unfinished *find_unfinished(const FILE *f) {
    Unfinished *u = unfinished;
    while (u && u->f != f) u = u->next;
    return u;
}

/* u: the file, NULL where it was opened otherwise */
GSA_NORETURN static void cannot_write(const Unfinished *u, const char *path, int error) {
    die("cannot write %s: %s%s", path, strerror(error),
        u && u->temporary ? "; what was there before is unchanged" : "");
}

void xfwrite(const void *in, size_t size, size_t count, FILE *f, const char *path) {
    if (fwrite(in, size, count, f) == count) return;
    int error = errno;
    cannot_write(find_unfinished(f), path, error);
}

int64_t file_bytes(FILE *f, const char *path) {
    struct stat st;
    if (fstat(fileno(f), &st) != 0) die("cannot read the length of %s: %s", path, strerror(errno));
    return (int64_t)st.st_size;
}

FILE *open_input(const char *path) { return strcmp(path, "-") == 0 ? stdin : xfopen(path, "rb"); }
const char *input_name(const char *path) { return strcmp(path, "-") == 0 ? "standard input" : path; }

void close_input(FILE *f) {
    if (f != stdin) fclose(f);
}

char *read_file(const char *path, size_t *bytes) {
    FILE *f = open_input(path);
    size_t n = 0, room = 1 << 16;
    char *text = (char *)xmalloc(room);
    for (size_t got; (got = fread(text + n, 1, room - n - 1, f)) > 0;) {
        n += got;
        if (n + 1 == room) text = (char *)xrealloc(text, room *= 2);
    }
    if (ferror(f)) die("cannot read %s: %s", input_name(path), strerror(errno));
    close_input(f);
    text[n] = 0;
    *bytes = n;
    return text;
}

void make_folder(const char *path) {
    if (!*path) die("a folder needs a name; . is the present one");
    char *partial = xstrdup(path);
    for (char *p = partial + 1;; p++) {
        char c = *p;
        if (c != '/' && c != 0) continue;
        *p = 0;
        if (mkdir(partial, 0777) != 0 && errno != EEXIST)
            die("cannot make the folder %s: %s", partial, strerror(errno));
        *p = c;
        if (c == 0) break;
    }
    struct stat st;
    if (stat(path, &st) != 0 || !S_ISDIR(st.st_mode)) die("%s is not a folder; give another name", path);
    free(partial);
}

static char **one_file(const char *path, int *count) {
    char **files = (char **)xmalloc(sizeof *files);
    files[0] = xstrdup(path);
    *count = 1;
    return files;
}

char **glob_files(const char *pattern, int *count) {
    glob_t found;
    if (access(pattern, F_OK) == 0) return one_file(pattern, count);
    *count = 0;
    int status = glob(pattern, 0, NULL, &found);
    if (status == GLOB_NOMATCH) return NULL;
    if (status != 0) die("cannot search for %s: %s", pattern, strerror(errno));
    char **files = (char **)xmalloc(found.gl_pathc * sizeof *files);
    for (size_t i = 0; i < found.gl_pathc; i++) files[i] = xstrdup(found.gl_pathv[i]);
    *count = (int)found.gl_pathc;
    globfree(&found);
    return files;
}

static int by_name(const void *a, const void *b) { return strcmp(*(char *const *)a, *(char *const *)b); }

char **folder_files(const char *folder, int *count) {
    DIR *d = opendir(folder);
    char **files = NULL;
    int n = 0;
    if (!d && errno != ENOENT && errno != ENOTDIR) die("cannot read the folder %s: %s", folder, strerror(errno));
    for (struct dirent *e; d && (e = readdir(d));) {
        if (strcmp(e->d_name, ".") == 0 || strcmp(e->d_name, "..") == 0) continue;
        files = (char **)xrealloc(files, (size_t)(n + 1) * sizeof *files);
        files[n++] = xstrdup(e->d_name);
    }
    if (d) closedir(d);
    if (n) qsort(files, (size_t)n, sizeof *files, by_name);
    *count = n;
    return files;
}

void free_files(char **files, int count) {
    for (int i = 0; i < count; i++) free(files[i]);
    free(files);
}

/* The file that a symbolic link names, however many links there are; it need not exist. */
static char *behind_links(const char *path) {
    char *name = xstrdup(path), to[4096];
    for (int links = 0;; links++) {
        ssize_t n = readlink(name, to, sizeof to);
        if (n < 0) return name; /* no link */
        if (links == 40 || n == (ssize_t)sizeof to) die("cannot write %s: its symbolic links lead nowhere", path);
        const char *slash = to[0] == '/' ? NULL : strrchr(name, '/');
        char *next = xasprintf("%.*s%.*s", slash ? (int)(slash - name + 1) : 0, name, (int)n, to);
        free(name);
        name = next;
    }
}

FILE *create_file(const char *path) {
    static bool at_exit;
    struct stat st;
    Unfinished *u = (Unfinished *)xcalloc(1, sizeof *u);
    u->target = behind_links(path);
    bool there = stat(u->target, &st) == 0;
    if (there && S_ISDIR(st.st_mode)) die("cannot write %s: it is a folder", path);
    if (!there || S_ISREG(st.st_mode)) u->temporary = xasprintf("%s.tmp", u->target);
    const char *name = u->temporary ? u->temporary : u->target;
    u->f = fopen(name, "wb");
    if (!u->f) die("cannot write %s: %s", name, strerror(errno));
    if (!at_exit) atexit(remove_unfinished);
    at_exit = true;
    u->next = unfinished;
    unfinished = u;
    return u->f;
}

void sync_folder_of(const char *path) {
    const char *slash = strrchr(path, '/');
    char *folder = slash ? xasprintf("%.*s", (int)(slash - path + 1), path) : xstrdup(".");
    int fd = open(folder, O_RDONLY);
    /* some file systems cannot do this for folders, and then there is nothing more to do */
    if (fd >= 0 && fsync(fd) != 0 && errno == EIO) die("cannot write %s: %s", folder, strerror(errno));
    if (fd >= 0) close(fd);
    free(folder);
}

void commit_file(FILE *f, const char *path) {
    Unfinished *u = find_unfinished(f), **place = &unfinished;
    if (!u) die("cannot write %s: it was not begun", path);
    if (fflush(f) != 0 || (u->temporary && fsync(fileno(f)) != 0)) cannot_write(u, path, errno);
    if (fclose(f) != 0) cannot_write(u, path, errno);
    if (u->temporary) {
        if (rename(u->temporary, u->target) != 0) cannot_write(u, path, errno);
        sync_folder_of(u->target);
    }
    while (*place != u) place = &(*place)->next;
    *place = u->next;
    free(u->target);
    free(u->temporary);
    free(u);
}

void lock_file(FILE *f, const char *what) {
    struct flock lock = {.l_type = F_WRLCK, .l_whence = SEEK_SET}; /* of the whole file */
    if (fcntl(fileno(f), F_SETLK, &lock) == 0 || (errno != EAGAIN && errno != EACCES)) return;
    pid_t holder = fcntl(fileno(f), F_GETLK, &lock) == 0 && lock.l_type != F_UNLCK ? lock.l_pid : 0;
    char *who = holder > 0 ? xasprintf("process %ld", (long)holder) : xstrdup("another process");
    die("%s is in use by %s: wait until that has ended, or give another name with --out", what, who);
}

/* ---------------------------------------------------------------------- choices */

int choice_index(const char *choices, const char *text) {
    size_t n = strlen(text);
    int index = 0;
    for (const char *p = choices; p; index++) {
        if (strcspn(p, "|") == n && strncmp(p, text, n) == 0) return index;
        p = strchr(p, '|');
        if (p) p++;
    }
    return -1;
}

void choice_name(const char *choices, int index, char *out, size_t room) {
    const char *p = choices;
    for (; index > 0 && p; index--) p = strchr(p, '|') ? strchr(p, '|') + 1 : NULL;
    snprintf(out, room, "%.*s", p ? (int)strcspn(p, "|") : 1, p ? p : "?");
}

/* ---------------------------------------------------------------------- random numbers */

static uint64_t scramble(uint64_t z) {
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    return z ^ (z >> 31);
}

uint64_t rng_next(uint64_t *state) { return scramble(*state += 0x9E3779B97F4A7C15ull); }

uint64_t rng_mix(uint64_t a, uint64_t b) {
    return scramble(scramble(a + 0x9E3779B97F4A7C15ull) ^ (b * 0xD6E8FEB86659FD93ull));
}

uint64_t rng_below(uint64_t *state, uint64_t n) {
    uint64_t limit = UINT64_MAX - UINT64_MAX % n, x;
    do x = rng_next(state);
    while (x >= limit);
    return x % n;
}

double rng_uniform(uint64_t *state) { return (double)(rng_next(state) >> 11) * 0x1.0p-53; }

double rng_normal(uint64_t *state) {
    double u = 1.0 - rng_uniform(state), v = rng_uniform(state); /* Box-Muller; u > 0 */
    return sqrt(-2.0 * log(u)) * cos(6.283185307179586 * v);
}

/* ---------------------------------------------------------------------- time and progress */

double now_seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + 1e-9 * t.tv_nsec;
}

void progress(const char *what, double done, double total) {
    static double last, start;
    static const char *current;
    double t = now_seconds();
    if (!isatty(2)) return;
    if (current != what || done <= 0) {
        current = what;
        start = t;
        last = 0;
    }
    bool end = total > 0 && done >= total;
    if (!end && t - last < 0.1) return;
    last = t;
    if (total > 0) {
        double share = done / total, left = done > 0 ? (t - start) * (total - done) / done : 0;
        char bar[31];
        for (int i = 0; i < 30; i++) bar[i] = i < (int)(30 * share) ? '#' : '.';
        bar[30] = 0;
        fprintf(stderr, "\r%s [%s] %3.0f %%  %.0f s left \033[K", what, bar, 100 * share, left);
    } else {
        fprintf(stderr, "\r%s %.4g \033[K", what, done);
    }
    if (end) {
        fputc('\n', stderr);
        current = NULL;
    }
    fflush(stderr);
}

void rewrite_line(const char *text) {
    static bool stands;
    struct winsize window;
    if (stands) fputs("\r\033[K", stdout);
    stands = text != NULL;
    if (!text) return;
    /* one column less: some terminals wrap as soon as a line is full */
    bool known = ioctl(1, TIOCGWINSZ, &window) == 0 && window.ws_col > 1;
    printf("%.*s", known ? window.ws_col - 1 : 79, text);
    fflush(stdout);
}
