#include "checkpoint.h"

#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

enum {
    MAGIC = 20261123,
    VERSION = 4, /* 3 knows gains of standard heads, 4 phases of splats, learned rotations and forget gates */
    OLDEST = 2,
    LLMC_MAGIC = 20240326,
    LLMC_FP32 = 3,
    LLMC_BF16 = 5,
    HEADER = 256,
    CONFIG_AT = 16,
    HEADS_AT = 128,
    ALIGN = 64,
    MAX_ENTRIES = 4096
};
static const int64_t type_bytes[] = {4, 1, 8, 2, 1};
static const char *const type_names[] = {"fp32", "bytes", "int64", "bf16", "int8"};

static void shape_text(const int64_t *shape, int dimensions, char *out, size_t room) {
    size_t n = (size_t)snprintf(out, room, "(");
    for (int i = 0; i < dimensions && n < room; i++)
        n += (size_t)snprintf(out + n, room - n, "%s%lld", i ? ", " : "", (long long)shape[i]);
    if (n < room) snprintf(out + n, room - n, ")");
}

/* ---------------------------------------------------------------------- writing */

Entry checkpoint_entry(const char *name, int type, int dimensions, const int64_t *shape) {
    Entry e;
    memset(&e, 0, sizeof e);
    snprintf(e.name, sizeof e.name, "%s", name);
    e.type = type;
    e.dimensions = dimensions;
    e.bytes = type_bytes[type];
    for (int i = 0; i < dimensions; i++) {
        e.shape[i] = shape[i];
        e.bytes *= shape[i];
    }
    return e;
}

void checkpoint_add_table(const Tensor *tensors, const char *prefix, const float *flat, Entry *entries,
                          const void **data, int *count) {
    for (int i = 0; i < NUM_TENSORS; i++) {
        char name[64];
        snprintf(name, sizeof name, "%s%s", prefix, tensors[i].name);
        data[*count] = flat + tensors[i].offset;
        entries[(*count)++] = checkpoint_entry(name, TYPE_F32, 3, tensors[i].shape);
    }
}

void checkpoint_add_tensors(const Config *c, const char *prefix, const float *flat, Entry *entries, const void **data,
                            int *count) {
    Tensor tensors[NUM_TENSORS];
    model_tensors(c, tensors);
    checkpoint_add_table(tensors, prefix, flat, entries, data, count);
}

void checkpoint_write(const char *path, int kind, const Config *c, int64_t step, Entry *entries, const void **data,
                      int count) {
    int32_t header[HEADER] = {0};
    static const char zeros[ALIGN];
    int64_t at = (int64_t)sizeof header + count * (int64_t)sizeof(Entry);
    for (int i = 0; i < count; i++) {
        at = (at + ALIGN - 1) / ALIGN * ALIGN;
        entries[i].offset = at;
        at += entries[i].bytes;
    }
    header[0] = MAGIC;
    header[1] = VERSION;
    header[2] = kind;
    header[3] = count;
    memcpy(header + 4, &at, 8);
    header[6] = (int32_t)step;
    int field = CONFIG_AT;
#define X(name, what) header[field++] = c->name;
    CONFIG_FIELDS(X)
#undef X
    memcpy(header + HEADS_AT, c->gsa_heads, sizeof c->gsa_heads);

    FILE *f = create_file(path);
    xfwrite(header, sizeof header, 1, f, path);
    xfwrite(entries, sizeof *entries, (size_t)count, f, path);
    int64_t written = (int64_t)sizeof header + count * (int64_t)sizeof(Entry);
    for (int i = 0; i < count; i++) {
        xfwrite(zeros, 1, (size_t)(entries[i].offset - written), f, path);
        xfwrite(data[i], 1, (size_t)entries[i].bytes, f, path);
        written = entries[i].offset + entries[i].bytes;
    }
    commit_file(f, path);
}

/* ---------------------------------------------------------------------- reading */

/* A model of llm.c: its tensors are those of the table in the table's order, so the directory that it lacks is made
   here. */
static char *read_llmc(const char *path, int kind, const int32_t *header, Checkpoint *k) {
    Tensor tensors[NUM_TENSORS];
    Config *c = &k->config;
    if (kind != CHECKPOINT_MODEL) return xasprintf("%s is a model of llm.c; a state_*.bin file is needed here", path);
    if (header[1] != LLMC_FP32 && header[1] != LLMC_BF16)
        return xasprintf("%s is a model of llm.c of version %d; this program reads versions %d, fp32, and %d, bf16",
                         path, header[1], LLMC_FP32, LLMC_BF16);
    c->T = header[2];
    c->V = header[3];
    c->L = header[4];
    c->NH = header[5];
    c->C = header[6];
    c->Vp = header[7];
    c->position = POSITION_LEARNED;
    c->attention = ATTENTION_STANDARD;
    const char *unsound = config_check(c);
    if (unsound) return xasprintf("%s is damaged: %s", path, unsound);
    model_tensors(c, tensors);
    int64_t at = HEADER * 4;
    k->made = (Entry *)xmalloc(NUM_TENSORS * sizeof *k->made);
    for (int i = 0; i < NUM_TENSORS; i++) {
        Entry *e = &k->made[k->count++];
        *e = checkpoint_entry(tensors[i].name, TYPE_F32, 3, tensors[i].shape);
        e->offset = at;
        at += e->bytes;
    }
    k->entries = k->made;
    bool halves = header[1] == LLMC_BF16;
    int64_t numbers = at / 4 - HEADER, should = HEADER * 4 + numbers * (halves ? 2 : 4);
    if (should != (int64_t)k->bytes)
        return xasprintf("%s is %lld bytes long, its header says %lld: it is truncated or damaged", path,
                         (long long)k->bytes, (long long)should);
    if (!halves) return NULL;
    /* our models keep the small tensors in fp32 */
    char *wide = (char *)mmap(NULL, (size_t)at, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (wide == MAP_FAILED) return xasprintf("out of memory: %s in fp32 needs %.1f MiB", path, (double)at / 1048576);
    const uint16_t *from = (const uint16_t *)(k->map + HEADER * 4);
    uint32_t *to = (uint32_t *)(wide + HEADER * 4);
    for (int64_t i = 0; i < numbers; i++) to[i] = (uint32_t)from[i] << 16;
    munmap((void *)k->map, k->bytes);
    k->map = wide;
    k->bytes = (size_t)at;
    return NULL;
}

/* True where an entry of a file has this name, or the one that it had before names were written out. Behind a prefix
   such as adam_m. it is the same. */
static bool has_name(const Entry *e, const char *name) {
    static const char *const old[][2] = {
        {"log_precision", "lnp"}, {"log_alpha", "lnalpha"}, {"log_alpha_reference", "lnalpha0"},
        {"log_theta", "lntheta"}, {"log_delta", "lndelta"}, {"log_far", "lng"}};
    if (strcmp(e->name, name) == 0) return true;
    const char *dot = strrchr(name, '.'), *bare = dot ? dot + 1 : name;
    size_t prefix = (size_t)(bare - name);
    if (strncmp(e->name, name, prefix) != 0) return false;
    for (size_t i = 0; i < sizeof old / sizeof *old; i++)
        if (strcmp(bare, old[i][0]) == 0) return strcmp(e->name + prefix, old[i][1]) == 0;
    return false;
}

/* Opens and checks; NULL on success, else the sentence (malloc'd). Nothing of the file is believed before it is
   checked. */
static char *open_checked(const char *path, int kind, Checkpoint *k) {
    memset(k, 0, sizeof *k);
    int fd = open(path, O_RDONLY);
    struct stat st;
    if (fd < 0) return xasprintf("cannot open %s: %s", path, strerror(errno));
    if (fstat(fd, &st) != 0 || !S_ISREG(st.st_mode)) {
        close(fd);
        return xasprintf("%s is not a regular file", path);
    }
    int32_t header[HEADER];
    if ((size_t)st.st_size < sizeof header) {
        close(fd);
        return xasprintf("%s is %s: no checkpoint is so short", path, st.st_size ? "truncated" : "empty");
    }
    k->bytes = (size_t)st.st_size;
    k->map = (const char *)mmap(NULL, k->bytes, PROT_READ, MAP_PRIVATE, fd, 0);
    close(fd);
    if (k->map == MAP_FAILED) {
        k->map = NULL;
        return xasprintf("cannot map %s: %s", path, strerror(errno));
    }
    memcpy(header, k->map, sizeof header);
    if (header[0] == LLMC_MAGIC) return read_llmc(path, kind, header, k);
    if (header[0] != MAGIC)
        return xasprintf("%s is not a checkpoint of gsa.c (magic %d, not %d) or llm.c (%d)", path, header[0], MAGIC,
                         LLMC_MAGIC);
    if (header[1] < OLDEST || header[1] > VERSION)
        return xasprintf("%s has checkpoint version %d; this program reads versions %d to %d; train the model anew",
                         path, header[1], OLDEST, VERSION);
    if (header[2] != kind)
        return xasprintf("%s is a %s file; a %s file is needed here", path,
                         header[2] == CHECKPOINT_STATE ? "state_*.bin" : "model_*.bin",
                         kind == CHECKPOINT_STATE ? "state_*.bin" : "model_*.bin");
    int64_t length;
    memcpy(&length, header + 4, 8);
    if (length != (int64_t)k->bytes)
        return xasprintf("%s is %lld bytes long, its header says %lld: it is truncated or damaged", path,
                         (long long)k->bytes, (long long)length);
    k->count = header[3];
    k->step = header[6];
    int field = CONFIG_AT;
#define X(name, what) k->config.name = header[field++];
    CONFIG_FIELDS(X)
#undef X
    memcpy(k->config.gsa_heads, header + HEADS_AT, sizeof k->config.gsa_heads);
    const char *unsound = config_check(&k->config);
    if (unsound) return xasprintf("%s is damaged: %s", path, unsound);
    if (k->step < 0 || k->count < 1 || k->count > MAX_ENTRIES || sizeof header + k->count * sizeof(Entry) > k->bytes)
        return xasprintf("%s is damaged: its directory of %d entries does not fit", path, k->count);
    k->entries = (const Entry *)(k->map + sizeof header);
    for (int i = 0; i < k->count; i++) {
        const Entry *e = &k->entries[i];
        bool good = memchr(e->name, 0, sizeof e->name) && e->type >= 0 && e->type <= TYPE_I8 && e->dimensions >= 1 &&
                    e->dimensions <= 4 && e->offset % ALIGN == 0 && e->offset >= 0 && e->bytes >= 0 &&
                    e->offset <= length && e->bytes <= length - e->offset;
        int64_t bytes = good ? type_bytes[e->type] : 0;
        for (int d = 0; good && d < e->dimensions; d++)
            good = e->shape[d] >= 0 && !__builtin_mul_overflow(bytes, e->shape[d], &bytes);
        if (!good || bytes != e->bytes)
            return xasprintf("%s is damaged: entry %d of its directory is not sound", path, i);
    }
    Tensor tensors[NUM_TENSORS]; /* what would not be used was meant for another configuration */
    model_tensors(&k->config, tensors);
    for (int t = 0; t < NUM_TENSORS; t++)
        for (int i = 0; i < k->count && !tensors[t].size; i++)
            if (k->entries[i].bytes && has_name(&k->entries[i], tensors[t].name))
                return xasprintf("%s is damaged: it holds a tensor %s, which models of its configuration do not have",
                                 path, tensors[t].name);
    return NULL;
}

static void release(Checkpoint *k) {
    if (k->map) munmap((void *)k->map, k->bytes);
    free(k->made);
}

Checkpoint *checkpoint_open(const char *path, int kind) {
    Checkpoint *k = (Checkpoint *)xmalloc(sizeof *k);
    char *wrong = open_checked(path, kind, k);
    if (wrong) die("%s", wrong);
    k->path = xstrdup(path);
    return k;
}

bool checkpoint_is_whole(const char *path, int kind) {
    Checkpoint k;
    char *wrong = open_checked(path, kind, &k);
    release(&k);
    free(wrong);
    return !wrong;
}

void checkpoint_close(Checkpoint *k) {
    if (!k) return;
    release(k);
    free(k->path);
    free(k);
}

bool checkpoint_has(const Checkpoint *k, const char *name) {
    for (int i = 0; i < k->count; i++)
        if (has_name(&k->entries[i], name)) return true;
    return false;
}

const void *checkpoint_find(const Checkpoint *k, const char *name, int type, int dimensions, const int64_t *shape,
                            int64_t *length) {
    for (int i = 0; i < k->count; i++) {
        const Entry *e = &k->entries[i];
        if (!has_name(e, name)) continue;
        bool same = e->type == type && e->dimensions == (dimensions ? dimensions : 1);
        for (int d = 0; same && d < dimensions; d++) same = e->shape[d] == shape[d];
        if (!same) {
            char theirs[96], ours[96];
            shape_text(e->shape, e->dimensions, theirs, sizeof theirs);
            shape_text(shape, dimensions, ours, sizeof ours);
            die("%s: tensor %s is %s %s, but %s %s is needed", k->path, name, type_names[e->type], theirs,
                type_names[type], dimensions ? ours : "of one dimension");
        }
        if (length) *length = e->shape[0];
        return k->map + e->offset;
    }
    die("%s has no tensor %s", k->path, name);
}

int checkpoint_weight_type(const Checkpoint *k) {
    for (int i = 0; i < k->count; i++)
        if (strcmp(k->entries[i].name, "wte") == 0) return k->entries[i].type;
    return TYPE_F32;
}

Matrix checkpoint_matrix(const Checkpoint *k, const char *prefix, int tensor) {
    Tensor tensors[NUM_TENSORS];
    model_tensors(&k->config, tensors);
    const Tensor *t = &tensors[tensor];
    char name[64], scales[80];
    snprintf(name, sizeof name, "%s%s", prefix, t->name);
    Matrix m = {TYPE_F32, (size_t)(t->shape[2] > 1 ? t->shape[2] : t->shape[1]), NULL, NULL};
    for (int i = 0; i < k->count; i++)
        if (strcmp(k->entries[i].name, name) == 0 && (k->entries[i].type == TYPE_BF16 || k->entries[i].type == TYPE_I8))
            m.type = k->entries[i].type;
    m.data = checkpoint_find(k, name, m.type, 3, t->shape, NULL);
    if (m.type != TYPE_I8) return m;
    int64_t rows = (int64_t)(t->size / m.columns);
    snprintf(scales, sizeof scales, "%s.scales", name);
    m.scales = (const float *)checkpoint_find(k, scales, TYPE_F32, 1, &rows, NULL);
    return m;
}

/* to the nearest, ties to even */
static uint16_t to_bf16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return (uint16_t)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

bool matrix_round(const Matrix *m, const float *from, size_t rows, void *data, float *scales) {
    size_t n = m->columns;
    for (size_t r = 0; r < rows; r++, from += n) {
        float most = 0;
        for (size_t i = 0; i < n; i++) {
            if (!isfinite(from[i])) return false;
            most = fabsf(from[i]) > most ? fabsf(from[i]) : most;
        }
        if (m->type == TYPE_BF16) {
            for (size_t i = 0; i < n; i++) ((uint16_t *)data)[r * n + i] = to_bf16(from[i]);
        } else {
            float scale = most / 127;
            scales[r] = scale;
            for (size_t i = 0; i < n; i++)
                ((int8_t *)data)[r * n + i] = scale > 1e-37f ? (int8_t)lrintf(from[i] / scale) : 0;
        }
    }
    return true;
}

void checkpoint_read_tensors(const Checkpoint *k, const char *prefix, float *flat) {
    Tensor tensors[NUM_TENSORS];
    model_tensors(&k->config, tensors);
    checkpoint_read_table(k, prefix, tensors, flat);
}

void checkpoint_read_table(const Checkpoint *k, const char *prefix, const Tensor *tensors, float *flat) {
    for (int i = 0; i < NUM_TENSORS; i++) {
        char name[64];
        if (!tensors[i].size) continue;
        snprintf(name, sizeof name, "%s%s", prefix, tensors[i].name);
        float *to = flat + tensors[i].offset;
        if (!tensor_is_matrix(i)) {
            memcpy(to, checkpoint_find(k, name, TYPE_F32, 3, tensors[i].shape, NULL), tensors[i].size * sizeof(float));
            continue;
        }
        Matrix m = checkpoint_matrix(k, prefix, i);
        for (size_t row = 0; row < tensors[i].size / m.columns; row++, to += m.columns) {
            const float *from = matrix_row(&m, row, to);
            if (from != to) memcpy(to, from, m.columns * sizeof(float));
            if (m.type == TYPE_I8)
                for (size_t c = 0; c < m.columns; c++) to[c] *= m.scales[row];
        }
    }
    /* weights have no prefix */
    const char *wrong = *prefix ? NULL : model_check_alive(&k->config, flat + tensors[TENSOR_alive].offset);
    if (wrong) die("%s is damaged: %s", k->path, wrong);
}

void checkpoint_match(const Checkpoint *k, const Config *c) {
#define X(name, what) \
    if (k->config.name != c->name) die("%s: its %s is %d, that of this run %d", k->path, what, k->config.name, c->name);
    CONFIG_FIELDS(X)
#undef X
    for (int l = 0; l < c->L; l++)
        if (k->config.gsa_heads[l] != c->gsa_heads[l])
            die("%s: its GSA heads in layer %d are not those of this run; give the same --gsa-heads", k->path, l);
}
