/* infer.c: uses a trained model: continues a prompt, measures how well the model predicts a text or solves tasks, or
   fills in masked tokens.

   The layers are those of train_gsa.c, included as they are. What is new here: weights used where they lie in the file,
   in fp32, bf16 or int8; sessions, which remember of each text what its next tokens need; one token at a time at the
   speed of the memory. In this order:
     loading -> matrix times vectors -> sessions -> text that streams -> measuring -> commands -> main
   Text goes to standard output, everything else to standard error. INFER_NO_MAIN leaves main to the file that
   includes this one. */

#if defined(__GNUC__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-function" /* the backward pass */
#endif
#define GSA_NO_MAIN
#include "train_gsa.c"
#if defined(__GNUC__)
#pragma GCC diagnostic pop
#endif

#include "gsa/run/adapt.h"
#include "gsa/checkpoint.h"
#include "gsa/flags.h"
#include "data/loader.h"
#include "gsa/look/report.h"
#include "gsa/sample.h"
#include "data/tasks.h"
#include "tokenizer/stored.h"

#include <sys/mman.h>

/* ---------------------------------------------------------------------- loading */

/* A model file that was trained for this objective. */
static Checkpoint *open_trained(const char *path, int objective) {
    Checkpoint *k = checkpoint_open(path, CHECKPOINT_MODEL);
    if (k->config.objective != objective)
        die(objective == OBJECTIVE_LM ? "%s is an encoder, trained to fill in masked tokens: use infer fill"
                                      : "%s is a decoder, trained to predict the next token: use infer generate",
            path);
    return k;
}

/* A model for train_gsa.c's forward pass, with room for B sequences of its length, and its tokenizer. */
typedef struct {
    GSA *model;
    Tokenizer *tokenizer;
} Loaded;

/* tokenizer: a file for a model that holds none, or NULL */
static Loaded load(const char *path, const char *tokenizer, size_t B, int objective) {
    Checkpoint *k = open_trained(path, objective);
    Loaded l;
    l.tokenizer = checkpoint_tokenizer(k, tokenizer);
    l.model = gsa_create(&k->config, B);
    checkpoint_read_tensors(k, "", l.model->params);
    checkpoint_close(k);
    return l;
}

static void unload(Loaded l) {
    gsa_destroy(l.model);
    tokenizer_free(l.tokenizer);
}

/* One head of a model that does not change: its kind, its splats and what follows from them. */
typedef struct {
    int kind;
    size_t window; /* how far its softmax looks back; SIZE_MAX: to the start */
    real scale;    /* what f_q . f_k is multiplied by */
    Splats w;
    SplatConstants constants;
    double *theta; /* softmax splats with an envelope: its frequencies (S) */
    Scan step;     /* scan and extend heads: tables for chunks of one token */
} Head;

typedef struct {
    /* what the layers of train_gsa.c read: configuration and small tensors; neither activations nor matrices */
    GSA net;
    Matrix matrix[NUM_TENSORS]; /* wte, qkvw, attprojw, fcw, fcprojw as they lie in the file */
    Head *heads;                /* (L, NH) */
    Tokenizer *tokenizer;
    Checkpoint *file;
} Model;

/* For a model whose net.config, net.p and matrices are set: the rest. */
static void model_prepare(Model *m) {
    const Config *c = &m->net.config;
    Sizes z = config_sizes(c);
    model_tensors(c, m->net.tensors);
    m->heads = (Head *)xcalloc(z.L * z.NH, sizeof *m->heads);
    for (size_t i = 0; i < z.L * z.NH; i++) {
        Head *head = &m->heads[i];
        head->kind = config_head_kind(c, (int)(i / z.NH), (int)(i % z.NH));
        head->window = head->kind == HEAD_SPLAT || !c->window ? SIZE_MAX : (size_t)c->window;
        head->scale = head_scale(&m->net, i / z.NH, i % z.NH);
        if (head->kind == HEAD_STANDARD) continue;
        Splats w = head_splats(&m->net, i / z.NH, i % z.NH);
        if (!is_full(&w, z.HS)) head->constants = splat_constants(&w, z.HS);
        if (head->kind != HEAD_SPLAT) head->constants.key_scale = scan_key_scale(&w, z.HS);
        head->w = w;
        head->w.constants = &head->constants;
        if (head->kind == HEAD_SPLAT && w.log_theta) head->theta = splat_frequencies(w.log_theta, z.S);
        if (head->kind == HEAD_SPLAT) continue;
        head->step = scan_open(&head->w, head->kind == HEAD_EXTEND ? (size_t)c->window : 0, 1);
        scan_turn(&head->step, 1);
    }
}

/* A model file of any weight type, used where it lies. tokenizer: a file for a model that holds none, or NULL.
   objective: what it must have been trained for. */
static Model *model_open(const char *path, const char *tokenizer, int objective) {
    Model *m = (Model *)xcalloc(1, sizeof *m);
    m->file = open_trained(path, objective);
    m->net.config = m->file->config;
    m->tokenizer = checkpoint_tokenizer(m->file, tokenizer);
    Tensor tensors[NUM_TENSORS];
    model_tensors(&m->net.config, tensors);
    real **small = (real **)&m->net.p; /* a struct of nothing but pointers, in the order of the table */
    for (int i = 0; i < NUM_TENSORS; i++) {
        if (tensor_is_matrix(i)) m->matrix[i] = checkpoint_matrix(m->file, "", i);
        else if (tensors[i].size)
            small[i] = (real *)checkpoint_find(m->file, tensors[i].name, TYPE_F32, 3, tensors[i].shape, NULL);
    }
    const char *wrong = model_check_alive(&m->net.config, m->net.p.alive);
    if (wrong) die("%s is damaged: %s", path, wrong);
    madvise((void *)m->file->map, m->file->bytes, MADV_WILLNEED);
    model_prepare(m);
    return m;
}

static void model_close(Model *m) {
    for (size_t i = 0; i < (size_t)m->net.config.L * (size_t)config_heads(&m->net.config); i++) {
        if (m->heads[i].constants.slope) free(m->heads[i].constants.slope);
        if (m->heads[i].step.w) scan_close(&m->heads[i].step);
        free(m->heads[i].theta);
    }
    free(m->heads);
    tokenizer_free(m->tokenizer);
    checkpoint_close(m->file);
    free(m);
}

/* Whether texts can go on for ever in constant memory: no learned positions, and no head that looks back to the
   start by softmax. */
static bool model_endless(const Model *m) {
    for (size_t i = 0; i < (size_t)m->net.config.L * (size_t)config_heads(&m->net.config); i++)
        if (m->heads[i].kind != HEAD_SCAN && m->heads[i].window == SIZE_MAX) return false;
    return m->net.config.position == POSITION_ROPE;
}

/* ---------------------------------------------------------------------- matrix times vectors */

/* A row is read in blocks of four vectors. bf16 and int8 are taken apart without shuffles: a loaded word holds 2 or
   4 neighbours, which shifts and masks turn into numbers, so vector u of a block holds every second or fourth one,
   from u on; the other factor is brought into that order once for all rows (in_blocks). int8 comes out times 2^24. */
enum { VECTORS = 4, IN_BLOCK = VECTORS * LANES };
typedef uint32_t words __attribute__((vector_size(VECTOR_BYTES), aligned(1), may_alias));
typedef int32_t signed_words __attribute__((vector_size(VECTOR_BYTES)));

static inline void block_f32(vector f[VECTORS], const char *w) {
    for (int u = 0; u < VECTORS; u++) f[u] = *(const vector *)(w + u * VECTOR_BYTES);
}

static inline void block_bf16(vector f[VECTORS], const char *w) {
    for (int u = 0; u < VECTORS; u += 2) {
        words pair = *(const words *)(w + u / 2 * VECTOR_BYTES);
        f[u] = (vector)(pair << 16);
        f[u + 1] = (vector)(pair & 0xFFFF0000u);
    }
}

static inline void block_int8(vector f[VECTORS], const char *w) {
    words four = *(const words *)w;
    for (int u = 0; u < VECTORS; u++)
        f[u] = __builtin_convertvector((signed_words)((four << (24 - 8 * u)) & 0xFF000000u), vector);
}

/* x (C) for rows of this type: whole blocks in the order of their vectors. The last block ends with the row, so it
   holds again some of what the one before it has: zeros stand there, and behind a row that is shorter than a block. */
static void in_blocks(real *out, const real *x, int type, size_t C) {
    for (size_t c = 0; c < C; c += IN_BLOCK, out += IN_BLOCK) {
        const real *from = x + c;
        real edge[IN_BLOCK] = {0};
        if (c + IN_BLOCK > C) {
            size_t repeated = C < IN_BLOCK ? 0 : c + IN_BLOCK - C;
            memcpy(edge + repeated, x + c, (C - c) * sizeof(real));
            from = edge;
        }
        if (type == TYPE_F32) memcpy(out, from, IN_BLOCK * sizeof(real));
        for (int u = 0; u < VECTORS && type != TYPE_F32; u++)
            for (int lane = 0; lane < LANES; lane++)
                out[u * LANES + lane] =
                    type == TYPE_BF16 ? from[(u / 2 * LANES + lane) * 2 + u % 2] : from[4 * lane + u];
    }
}

/* out[i] = row . in_i, i < N, in (N, blocks) as in_blocks makes them: a loaded weight serves all N, and each sum is
   the same whatever N. */
#define DOTS(name, N, block, bytes)                                                         \
    static inline void name(real out[N], const char *row, const real *in, size_t C) {       \
        const size_t length = (C + IN_BLOCK - 1) / IN_BLOCK * IN_BLOCK;                     \
        vector sum[N][VECTORS];                                                             \
        memset(sum, 0, sizeof sum);                                                         \
        for (size_t c = 0; c < C; c += IN_BLOCK) {                                          \
            vector f[VECTORS];                                                              \
            block(f, row + (c + IN_BLOCK <= C ? c : C - IN_BLOCK) * (bytes));               \
            for (int i = 0; i < N; i++)                                                     \
                for (int u = 0; u < VECTORS; u++)                                           \
                    sum[i][u] += f[u] * *(const vector *)(in + i * length + c + u * LANES); \
        }                                                                                   \
        for (int i = 0; i < N; i++) {                                                       \
            real lane[LANES];                                                               \
            *(vector *)lane = (sum[i][0] + sum[i][1]) + (sum[i][2] + sum[i][3]);            \
            for (int half = LANES / 2; half > 0; half /= 2)                                 \
                for (int k = 0; k < half; k++) lane[k] += lane[k + half];                   \
            out[i] = lane[0];                                                               \
        }                                                                                   \
    }
DOTS(dots_f32_1, 1, block_f32, 4)
DOTS(dots_f32_4, 4, block_f32, 4)
DOTS(dots_bf16_1, 1, block_bf16, 2)
DOTS(dots_bf16_4, 4, block_bf16, 2)
DOTS(dots_int8_1, 1, block_int8, 1)
DOTS(dots_int8_4, 4, block_int8, 1)

/* Where the CPU multiplies bytes four at a time, int8 is not taken apart: x (C) becomes whole numbers of 24 bits,
   times `unit`, as three planes of signed bytes. (clang 14 does not find the instruction; its code for dots_int8 is
   the faster one.) */
#if !defined(__clang__) && (defined(__AVX512VNNI__) || defined(__AVXVNNI__))
enum { BYTE_PRODUCTS = true };
#else
enum { BYTE_PRODUCTS = false };
#endif
typedef struct {
    real unit;      /* NaN where a number is not finite */
    int32_t sum[3]; /* of each plane */
    int8_t plane[]; /* (3, C), the upper digits first */
} Planes;

static void in_planes(Planes *p, const real *x, size_t C) {
    real most = 0, none = 0;
#pragma omp simd reduction(max : most) reduction(+ : none)
    for (size_t c = 0; c < C; c++) {
        most = fabsf(x[c]) > most ? fabsf(x[c]) : most;
        none += 0 * x[c];
    }
    p->unit = most / 8300000 + none; /* digits from -128 to 127 reach 8,323,072 at least */
    const real inverse = p->unit > 1e-36f ? 1 / p->unit : 0;
    int8_t *upper = p->plane, *middle = upper + C, *lower = middle + C;
    int32_t upper_sum = 0, middle_sum = 0, lower_sum = 0;
#pragma omp simd reduction(+ : upper_sum, middle_sum, lower_sum)
    for (size_t c = 0; c < C; c++) { /* each digit takes what is nearest: what it leaves is a multiple of 256 */
        int32_t number = inverse > 0 ? (int32_t)rintf(x[c] * inverse) : 0, rest = (number + 128) >> 8,
                last = (rest + 128) >> 8;
        lower[c] = (int8_t)number;
        middle[c] = (int8_t)rest;
        upper[c] = (int8_t)last;
        lower_sum += (int8_t)number;
        middle_sum += (int8_t)rest;
        upper_sum += last;
    }
    p->sum[0] = upper_sum;
    p->sum[1] = middle_sum;
    p->sum[2] = lower_sum;
}

/* row . x, exact but for the rounding of x. The instruction takes one factor without a sign: weights plus 128. In
   the sums' 32 bits there is room for 65,536 columns. */
static inline real dot_planes(const int8_t *row, const Planes *p, size_t C) {
    const int8_t *upper = p->plane, *middle = upper + C, *lower = middle + C;
    int32_t sum[3] = {0};
    for (size_t c = 0; c < C; c++) {
        uint8_t w = (uint8_t)row[c] ^ 128;
        sum[0] += w * upper[c];
        sum[1] += w * middle[c];
        sum[2] += w * lower[c];
    }
    for (int i = 0; i < 3; i++) sum[i] -= 128 * p->sum[i];
    return p->unit * ((real)sum[0] * 65536 + (real)sum[1] * 256 + (real)sum[2]);
}

enum { AHEAD = 4096 }; /* bytes: rounded rows come faster, those for planes by half, when asked for a page ahead */
enum { THEN_NOTHING, THEN_ADD, THEN_GELU };

static bool by_planes(const Matrix *w) { return BYTE_PRODUCTS && w->type == TYPE_I8 && w->columns <= 65536; }

/* out[i * ldo + o] for rows o0 .. o0 + n - 1 of w from `first` on, one token of each of N texts, in (N, blocks): a
   thread reads its rows once, in order. */
static void matrix_step(real *out, size_t ldo, const real *in, const Matrix *w, size_t first, const real *bias,
                        size_t N, size_t o0, size_t n, bool add) {
    const size_t C = w->columns, length = (C + IN_BLOCK - 1) / IN_BLOCK * IN_BLOCK,
                 bytes = w->type == TYPE_F32    ? 4
                         : w->type == TYPE_BF16 ? 2
                                                : 1,
                 wide = C < IN_BLOCK ? IN_BLOCK : C;
    const bool planes = by_planes(w);
    char padded[IN_BLOCK * sizeof(real)] = {0}; /* of a row shorter than a block */
    for (size_t o = o0; o < o0 + n; o++) {
        const char *row = (const char *)w->data + (first + o) * C * bytes;
        for (size_t c = 0; c < C * bytes && bytes < 4; c += 64) __builtin_prefetch(row + c + AHEAD);
        if (C < IN_BLOCK && !planes) row = (const char *)memcpy(padded, row, C * bytes);
        const real scale = w->scales ? w->scales[first + o] * (planes ? 1 : 0x1p-24f) : 1, offset = bias ? bias[o] : 0;
        for (size_t i = 0; i < N;) {
            real sum[4];
            const real *x = in + i * length;
            size_t m = N - i >= 4 && !planes ? 4 : 1;
            if (w->type == TYPE_F32) m == 4 ? dots_f32_4(sum, row, x, wide) : dots_f32_1(sum, row, x, wide);
            else if (w->type == TYPE_BF16) m == 4 ? dots_bf16_4(sum, row, x, wide) : dots_bf16_1(sum, row, x, wide);
            else if (planes) sum[0] = dot_planes((const int8_t *)row, (const Planes *)x, C);
            else m == 4 ? dots_int8_4(sum, row, x, wide) : dots_int8_1(sum, row, x, wide);
            for (size_t k = 0; k < m; k++, i++)
                out[i * ldo + o] = (add ? out[i * ldo + o] : 0) + (sum[k] * scale + offset);
        }
    }
}

/* The same for the many tokens of a pass, in (N, C): the rows brought into fp32 for a product of matrices. */
static void matrix_product(real *out, size_t ldo, const real *in, const Matrix *w, size_t first, const real *bias,
                           size_t N, size_t o0, size_t n, bool add) {
    const size_t C = w->columns;
    const real *rows = (const real *)w->data + (first + o0) * C;
    real *room = w->type == TYPE_F32 ? NULL : (real *)xmalloc(n * C * sizeof(real));
    for (size_t o = 0; o < n && room; o++) {
        matrix_row(w, first + o0 + o, room + o * C);
        for (size_t c = 0; c < C && w->scales; c++) room[o * C + c] *= w->scales[first + o0 + o];
        rows = room;
    }
    gemm_block(false, true, N, n, C, in, C, rows, C, out + o0, ldo, add);
    for (size_t i = 0; i < N && bias; i++)
        for (size_t o = o0; o < o0 + n; o++) out[i * ldo + o] += bias[o];
    free(room);
}

/* out (N, OC) with rows ldo apart = in (N, C) times rows first .. first + OC - 1 of w, plus bias (or NULL); ADD: out
   += that; GELU: out = gelu(that). steps: one token of each of N texts, at the speed of the memory; what comes out
   for one text does not depend on the others. */
static void matrix_forward(real *out, size_t ldo, const real *in, const Matrix *w, size_t first, const real *bias,
                           size_t N, size_t OC, int then, bool steps) {
    const size_t C = w->columns, length = (C + IN_BLOCK - 1) / IN_BLOCK * IN_BLOCK, group = steps ? 16 : 64,
                 groups = (OC + group - 1) / group;
    real *blocks = NULL;
    if (steps) {
        blocks = (real *)aligned_alloc(64, N * length * sizeof(real)); /* planes are shorter */
        if (!blocks) die("out of memory");
        for (size_t i = 0; i < N; i++)
            by_planes(w) ? in_planes((Planes *)(blocks + i * length), in + i * C, C)
                         : in_blocks(blocks + i * length, in + i * C, w->type, C);
    }
#pragma omp parallel for schedule(static) if (N * C * OC > 65536)
    for (size_t g = 0; g < groups; g++) {
        size_t o0 = g * group, n = OC - o0 < group ? OC - o0 : group;
        if (steps) matrix_step(out, ldo, blocks, w, first, bias, N, o0, n, then == THEN_ADD);
        else matrix_product(out, ldo, in, w, first, bias, N, o0, n, then == THEN_ADD);
        for (size_t i = 0; i < N && then == THEN_GELU; i++) {
            real *o = out + i * ldo + o0;
#pragma omp simd
            for (size_t k = 0; k < n; k++) o[k] = gelu(o[k]);
        }
    }
    free(blocks);
}

/* ---------------------------------------------------------------------- sessions */

enum { PREFILL = 256 }; /* tokens in one pass, of all texts together */

/* Where one head keeps what it remembers of a text. Softmax needs keys and values: a ring of `rows` slots, position
   p in slot p % rows, which is all that a window needs; with rows for every position it never wraps. An extend head
   keeps the responses of those keys as well: when one leaves the window it enters the state, the sums of all that is
   far, which is all that a scan head has. */
typedef struct {
    size_t rows;
    size_t state, keys, values, responses; /* offsets: (F, HS + 1); (rows, HS) twice; (rows, S) */
} Place;

/* n texts ("samples") that one model reads or writes, each with a memory of its own, and room for the tokens of one
   pass. */
typedef struct {
    const Model *model;
    /* samples; tokens of each at most; numbers remembered of each, the first of them states */
    size_t n, capacity, size, states;
    Place *places;    /* (L, NH) */
    size_t *position; /* (n): tokens seen */
    real *memory;     /* (n, size) */
    real *logits;     /* (n, Vp): after the last token */
    real *x, *norm, *mean, *rstd, *qkv, *fq, *fk, *lse, *att, *fc, *rope_waves, *splat_waves;
} Session;

/* capacity: most tokens of a text. Pages of the memory are zeros until they are touched, so a text uses what it
   needs. */
static Session *session_create(const Model *m, size_t n, size_t capacity) {
    const Config *c = &m->net.config;
    Sizes z = config_sizes(c);
    if (c->position != POSITION_ROPE && capacity > z.T)
        die("this model has learned positions for %zu tokens and cannot go beyond them", z.T);
    Session *s = (Session *)xcalloc(1, sizeof *s);
    s->model = m;
    s->n = n;
    s->capacity = capacity;
    s->places = (Place *)xcalloc(z.L * z.NH, sizeof *s->places);
    for (int pass = 0; pass < 2; pass++) /* states, then rings */
        for (size_t i = 0; i < z.L * z.NH; i++) {
            const Head *h = &m->heads[i];
            Place *p = &s->places[i];
            bool far = h->kind == HEAD_SCAN || h->kind == HEAD_EXTEND;
            if (pass == 0 && far) {
                p->state = s->size;
                s->size += h->step.F * (z.HS + 1);
            }
            if (pass == 0) s->states = s->size;
            if (pass == 0 || h->kind == HEAD_SCAN) continue;
            p->rows = h->window < capacity ? h->window : capacity;
            if (p->rows > SIZE_MAX / sizeof(real) / 4096 / (z.L * z.NH * n))
                die("texts of %zu tokens do not fit into this machine's memory", capacity);
            p->keys = s->size;
            s->size += p->rows * z.HS;
            p->values = s->size;
            s->size += p->rows * z.HS;
            p->responses = s->size;
            s->size += h->kind == HEAD_EXTEND ? p->rows * z.S : 0;
        }
    size_t N = n > PREFILL ? n : PREFILL;
    s->position = (size_t *)xcalloc(n, sizeof *s->position);
    s->memory = (real *)xcalloc(n * s->size, sizeof(real));
    s->logits = (real *)xcalloc(n * z.Vp, sizeof(real));
    s->x = (real *)xmalloc(N * (2 * z.C + 2 + 6 * z.A + z.NH + 4 * z.C + z.HS + 2 * z.G * z.S) * sizeof(real));
    s->norm = s->x + N * z.C;
    s->mean = s->norm + N * z.C;
    s->rstd = s->mean + N;
    s->qkv = s->rstd + N;
    s->fq = s->qkv + 3 * N * z.A;
    s->fk = s->fq + N * z.A;
    s->att = s->fk + N * z.A;
    s->lse = s->att + N * z.A;
    s->fc = s->lse + N * z.NH;
    s->rope_waves = s->fc + 4 * N * z.C;
    s->splat_waves = s->rope_waves + N * z.HS;
    return s;
}

static void session_free(Session *s) {
    free(s->places);
    free(s->position);
    free(s->memory);
    free(s->logits);
    free(s->x);
    free(s);
}

/* Sample i is empty again. */
static void session_reset(Session *s, size_t i) {
    s->position[i] = 0;
    memset(s->memory + i * s->size, 0, s->states * sizeof(real));
}

/* Sample `to` becomes a copy of `from`: a context that is read once and gone on with several times. */
static void session_copy(Session *s, size_t to, size_t from) {
    Sizes z = config_sizes(&s->model->net.config);
    real *a = s->memory + to * s->size, *b = s->memory + from * s->size;
    if (to == from) return;
    s->position[to] = s->position[from];
    memcpy(a, b, s->states * sizeof(real));
    for (size_t i = 0; i < z.L * z.NH; i++) {
        const Place *p = &s->places[i];
        size_t used = s->position[from] < p->rows ? s->position[from] : p->rows;
        memcpy(a + p->keys, b + p->keys, used * z.HS * sizeof(real));
        memcpy(a + p->values, b + p->values, used * z.HS * sizeof(real));
        if (s->model->heads[i].kind == HEAD_EXTEND)
            memcpy(a + p->responses, b + p->responses, used * z.S * sizeof(real));
    }
    memcpy(s->logits + to * z.Vp, s->logits + from * z.Vp, z.V * sizeof(real));
}

/* The logits (V) of what follows sample i's last token. */
static const real *session_logits(const Session *s, size_t i) {
    return s->logits + i * (size_t)s->model->net.config.Vp;
}

/* Softmax attention of one query over n keys and values (n, HS), in any order; returns the logarithm of the weights'
   sum. Rows are read once and in order. */
static inline real attention_rows(real *o, const real *fq, const real *keys, const real *values, real scale, size_t n,
                                  const size_t HS) {
    enum { WIDE = 64 };
    real *w = (real *)xmalloc(n * sizeof(real)), sum = 0;
    size_t j = 0, e = 0;
    /* partial sums of many rows under way, then the rows side by side */
    for (; HS % LANES == 0 && j + LANES <= n; j += LANES) {
        real part[LANES][LANES];
        for (size_t r = 0; r < LANES; r++) {
            vector dot = {0};
            for (size_t k = 0; k < HS; k += LANES)
                dot += *(const vector *)(fq + k) * *(const vector *)(keys + (j + r) * HS + k);
            *(vector *)part[r] = dot;
        }
        for (size_t r = 0; r < LANES; r++) {
            real dot = 0;
            for (size_t k = 0; k < LANES; k++) dot += part[r][k];
            w[j + r] = dot * scale;
        }
    }
    for (; j < n; j++) {
        real dot = 0;
#pragma omp simd reduction(+ : dot)
        for (size_t k = 0; k < HS; k++) dot += fq[k] * keys[j * HS + k];
        w[j] = dot * scale;
    }
    real most = largest(w, n);
#pragma omp simd reduction(+ : sum)
    for (j = 0; j < n; j++) {
        w[j] = exp_real(w[j] - most);
        sum += w[j];
    }
    for (; e + WIDE <= HS; e += WIDE) {
        vector total[WIDE / LANES];
        memset(total, 0, sizeof total);
        for (j = 0; j < n; j++)
            for (size_t u = 0; u < WIDE / LANES; u++)
                total[u] += w[j] * *(const vector *)(values + j * HS + e + u * LANES);
        memcpy(o + e, total, sizeof total);
    }
    if (e < HS) product(1, HS - e, n, w, n, 1, values + e, HS, o + e, HS, false);
    for (size_t k = 0; k < HS; k++) o[k] /= sum;
    free(w);
    return most + (real)log(sum);
}

/* The same, compiled for the usual head size and for any. */
static real attention_step(real *o, const real *fq, const real *keys, const real *values, real scale, size_t n,
                           size_t HS) {
    return HS == 64 ? attention_rows(o, fq, keys, values, scale, n, 64)
                    : attention_rows(o, fq, keys, values, scale, n, HS);
}

/* scan_forward for one token, in one pass over the state: the key enters it (phi NULL: there is none), the query
   reads it, it moves on by one. N (HS); returns D. */
static real scan_step(const Scan *c, real *N, const real *r, const real *phi, const real *v, real *state, size_t HS) {
    size_t S = c->w->S, F = c->F;
    real D = 0, *z = state + F * HS;
    bool waves = F > S;
    memset(N, 0, HS * sizeof(real));
    for (size_t s = 0; s < S; s++) {
        real *a = state + s * HS, *x = a + S * HS, *y = x + S * HS, *zx = z + S + s, *zy = zx + S;
        real fade = c->fade[s], p = phi ? phi[s] : 0, q0 = r[s] * c->q_table[s], k0 = p * c->k_table[s];
        z[s] += k0;
        D += (real)(1 + ROW_SUM_ROUNDING) * q0 * z[s];
        z[s] *= fade;
        for (size_t e = 0; e < HS; e++) {
            real sum = phi ? a[e] + k0 * v[e] : a[e];
            N[e] += q0 * sum;
            a[e] = fade * sum;
        }
        if (!waves) continue;
        real cosine = fade * c->turn[s], sine = fade * c->turn[S + s], q1 = r[s] * c->q_table[S + s],
             q2 = r[s] * c->q_table[2 * S + s], k1 = p * c->k_table[S + s], k2 = p * c->k_table[2 * S + s];
        real sx = *zx + k1, sy = *zy + k2;
        D += q1 * sx + q2 * sy;
        *zx = cosine * sx + sine * sy;
        *zy = cosine * sy - sine * sx;
        for (size_t e = 0; e < HS; e++) {
            sx = phi ? x[e] + k1 * v[e] : x[e];
            sy = phi ? y[e] + k2 * v[e] : y[e];
            N[e] += q1 * sx + q2 * sy;
            x[e] = cosine * sx + sine * sy;
            y[e] = cosine * sy - sine * sx;
        }
    }
    return D;
}

/* Head (l, h) of one sample over T further tokens, which are rows at .. at + T - 1 of this pass: qkv -> att. Of all
   earlier tokens it knows what the sample's memory holds; afterwards that holds these too. */
static void head_forward(Session *s, size_t l, size_t h, size_t sample, size_t at, size_t T) {
    const Model *m = s->model;
    Sizes z = config_sizes(&m->net.config);
    const size_t i = l * z.NH + h, HS = z.HS, A = z.A, S = z.S, position = s->position[sample], stride = 3 * A;
    const Head *head = &m->heads[i];
    const Place *place = &s->places[i];
    real *memory = s->memory + sample * s->size, *state = memory + place->state, *keys = memory + place->keys,
         *values = memory + place->values, *responses = memory + place->responses;
    const real *q = s->qkv + at * stride + h * HS, *k = q + A, *v = k + A, scale = head->scale;
    real *out = s->att + at * A + h * HS, *fq = s->fq + at * A + h * T * HS, *fk = s->fk + at * A + h * T * HS,
         *lse = s->lse + at * z.NH + h * T;
    const bool near = head->kind != HEAD_SCAN, far = head->kind == HEAD_SCAN || head->kind == HEAD_EXTEND,
               both = near && far;
    const size_t rows = place->rows, late = both ? head->window : 0, slot = rows ? position % rows : 0;
    ScanHead f = {0};
    if (far) f = scan_head_open(q, k, stride, &head->w, T, HS);
    if (near) {
        const real *waves = head->kind == HEAD_SPLAT
                                ? s->splat_waves + ((size_t)config_gsa_before(&m->net.config, (int)l, (int)h) *
                                                        (s->n > PREFILL ? s->n : PREFILL) +
                                                    at) *
                                                       2 * S
                                : s->rope_waves + at * HS;
        head_features(&m->net, fq, q, head->kind, &head->w, true, T, waves);
        head_features(&m->net, fk, k, head->kind, &head->w, false, T, waves);
    }
    if (T == 1) {
        real *N = (real *)xmalloc(HS * sizeof(real)), rho, D = 0;
        if (both) { /* the slot still holds the key that leaves the window now */
            bool old = position >= late;
            D = scan_step(&head->step, N, f.q.response, old ? responses + slot * S : NULL,
                          old ? values + slot * HS : NULL, state, HS);
            memcpy(responses + slot * S, f.k.response, S * sizeof(real));
        } else if (far) D = scan_step(&head->step, N, f.q.response, f.k.response, v, state, HS);
        if (near) {
            memcpy(keys + slot * HS, fk, HS * sizeof(real));
            memcpy(values + slot * HS, v, HS * sizeof(real));
            *lse = attention_step(out, fq, keys, values, scale, position < rows ? position + 1 : rows, HS);
        }
        if (far) scan_output(out, both ? lse : NULL, &rho, N, D, &head->w, f.key_scale, HS);
        free(N);
    } else {
        /* what is remembered of the last `past` tokens, then the new ones, in order of position: in place unless the
           ring wraps */
        const size_t past = position < rows ? position : rows, total = past + T, width = HS + (both ? S : 0);
        const bool wraps = near && position + T > rows;
        real *near_keys = keys, *near_values = values, *near_responses = responses, *room = NULL;
        if (wraps) {
            room = (real *)xmalloc(total * (HS + width) * sizeof(real));
            near_keys = room;
            near_values = near_keys + total * HS;
            near_responses = near_values + total * HS;
            for (size_t j = 0; j < past; j++) {
                size_t from = (position - past + j) % rows;
                memcpy(near_keys + j * HS, keys + from * HS, HS * sizeof(real));
                memcpy(near_values + j * HS, values + from * HS, HS * sizeof(real));
                if (both) memcpy(near_responses + j * S, responses + from * S, S * sizeof(real));
            }
        }
        if (near) {
            memcpy(near_keys + past * HS, fk, T * HS * sizeof(real));
            for (size_t t = 0; t < T; t++) memcpy(near_values + (past + t) * HS, v + t * stride, HS * sizeof(real));
            if (both) memcpy(near_responses + past * S, f.k.response, T * S * sizeof(real));
            attention_head_forward(out, A, lse, fq, near_keys, near_values, HS, scale, head->window, true, past, total,
                                   HS);
        }
        if (far) {
            Scan c = scan_open(&head->w, late, CHUNK);
            real *N = (real *)xcalloc(T * (HS + 1), sizeof(real)), *D = N + T * HS, rho;
            size_t skip = past < late ? late - past : 0, first = past < late ? 0 : past - late;
            if (both)
                scan_forward(&c, N, D, f.q.response, near_responses + first * S, near_values + first * HS, HS, skip,
                             false, state, NULL, T, HS);
            else scan_forward(&c, N, D, f.q.response, f.k.response, v, stride, 0, false, state, NULL, T, HS);
            for (size_t t = 0; t < T; t++)
                scan_output(out + t * A, both ? lse + t : NULL, &rho, N + t * HS, D[t], &head->w, f.key_scale, HS);
            free(N);
            scan_close(&c);
        }
        for (size_t j = total > rows ? total - rows : 0; wraps && j < total; j++) {
            size_t to = (position - past + j) % rows;
            memcpy(keys + to * HS, near_keys + j * HS, HS * sizeof(real));
            memcpy(values + to * HS, near_values + j * HS, HS * sizeof(real));
            if (both) memcpy(responses + to * S, near_responses + j * S, S * sizeof(real));
        }
        free(room);
    }
    if (far) scan_head_close(&f);
}

/* Sees the logits (rows, Vp; from V on they mean nothing) of what follows the tokens at positions position ..
   position + rows - 1 of a sample. */
typedef void LogitsSink(void *context, size_t sample, size_t position, size_t rows, const real *logits);

/* T further tokens of each of n samples, n T <= PREFILL or T = 1; the tokens of sample i at tokens + i * apart. */
static void session_pass(Session *s, const size_t *samples, size_t n, const int *tokens, size_t apart, size_t T,
                         bool last, LogitsSink *sink, void *context) {
    const Model *m = s->model;
    Sizes z = config_sizes(&m->net.config);
    const ParameterTensors p = m->net.p;
    const size_t N = n * T, C = z.C, A = z.A, room = s->n > PREFILL ? s->n : PREFILL;
    const bool steps = T == 1;
    for (size_t i = 0; i < n; i++) {
        size_t at = i * T, position = s->position[samples[i]];
        for (size_t t = 0; t < T; t++) {
            size_t token = (size_t)tokens[i * apart + t];
            real *x = s->x + (at + t) * C;
            const real *row = matrix_row(&m->matrix[TENSOR_wte], token, x),
                       scale = m->matrix[TENSOR_wte].scales ? m->matrix[TENSOR_wte].scales[token] : 1;
            for (size_t c = 0; c < C; c++) x[c] = row[c] * scale + (p.wpe ? p.wpe[(position + t) * C + c] : 0);
        }
        if (i > 0 && position == s->position[samples[i - 1]])
            memcpy(s->rope_waves + at * z.HS, s->rope_waves + (at - T) * z.HS, T * z.HS * sizeof(real));
        else rope_table(s->rope_waves + at * z.HS, T, z.HS, position);
    }
#pragma omp parallel for schedule(dynamic) if (N * z.A > 512)
    for (size_t head = 0; head < z.L * z.NH; head++) {
        if (!m->heads[head].theta) continue;
        real *waves =
            s->splat_waves +
            (size_t)config_gsa_before(&m->net.config, (int)(head / z.NH), (int)(head % z.NH)) * room * 2 * z.S;
        for (size_t i = 0; i < n; i++) {
            size_t position = s->position[samples[i]], size = T * 2 * z.S;
            if (i > 0 && position == s->position[samples[i - 1]])
                memcpy(waves + i * size, waves + (i - 1) * size, size * sizeof(real));
            else wave_table(waves + i * size, m->heads[head].theta, z.S, T, position);
        }
    }
    for (size_t l = 0; l < z.L; l++) {
        layernorm_forward(s->norm, s->mean, s->rstd, s->x, p.ln1w + l * C, p.ln1b + l * C, N, C);
        matrix_forward(s->qkv, 3 * A, s->norm, &m->matrix[TENSOR_qkvw], l * 3 * A, p.qkvb + l * 3 * A, N, 3 * A,
                       THEN_NOTHING, steps);
#pragma omp parallel for schedule(dynamic) if (N * z.A > 128)
        for (size_t i = 0; i < n * z.NH; i++) head_forward(s, l, i % z.NH, samples[i / z.NH], i / z.NH * T, T);
        matrix_forward(s->x, C, s->att, &m->matrix[TENSOR_attprojw], l * C, p.attprojb + l * C, N, C, THEN_ADD, steps);
        layernorm_forward(s->norm, s->mean, s->rstd, s->x, p.ln2w + l * C, p.ln2b + l * C, N, C);
        matrix_forward(s->fc, 4 * C, s->norm, &m->matrix[TENSOR_fcw], l * 4 * C, p.fcb + l * 4 * C, N, 4 * C, THEN_GELU,
                       steps);
        matrix_forward(s->x, C, s->fc, &m->matrix[TENSOR_fcprojw], l * C, p.fcprojb + l * C, N, C, THEN_ADD, steps);
    }
    if (sink) {
        layernorm_forward(s->norm, s->mean, s->rstd, s->x, p.lnfw, p.lnfb, N, C);
        enum { ROWS_SEEN = 64 };
        real *logits = (real *)xmalloc(ROWS_SEEN * z.Vp * sizeof(real));
        for (size_t i = 0; i < n; i++)
            for (size_t t = 0; t < T; t += ROWS_SEEN) {
                size_t rows = T - t < ROWS_SEEN ? T - t : ROWS_SEEN;
                matrix_forward(logits, z.Vp, s->norm + (i * T + t) * C, &m->matrix[TENSOR_wte], 0, NULL, rows, z.V,
                               THEN_NOTHING, steps);
                sink(context, samples[i], s->position[samples[i]] + t, rows, logits);
            }
        free(logits);
    } else if (last) { /* only what follows the last tokens is asked for */
        for (size_t i = 0; i < n; i++)
            layernorm_forward(s->norm + i * C, s->mean, s->rstd, s->x + (i * T + T - 1) * C, p.lnfw, p.lnfb, 1, C);
        bool consecutive = true;
        for (size_t i = 0; i < n; i++) consecutive = consecutive && samples[i] == samples[0] + i;
        real *logits = consecutive ? s->logits + samples[0] * z.Vp : (real *)xmalloc(n * z.Vp * sizeof(real));
        matrix_forward(logits, z.Vp, s->norm, &m->matrix[TENSOR_wte], 0, NULL, n, z.V, THEN_NOTHING, true);
        for (size_t i = 0; i < n && !consecutive; i++)
            memcpy(s->logits + samples[i] * z.Vp, logits + i * z.Vp, z.V * sizeof(real));
        if (!consecutive) free(logits);
    }
    for (size_t i = 0; i < n; i++) s->position[samples[i]] += T;
}

/* `count` further tokens for each of the n samples named (NULL: 0 .. n - 1, no sample twice); tokens (n, count). The
   samples may stand at different positions. sink NULL: session_logits are those after the last token; else it sees
   all of them, on the calling thread, positions in order, and session_logits stay as they were. One token (count 1)
   gives to the bit the same whatever samples run beside. */
static void session_run(Session *s, const size_t *samples, size_t n, const int *tokens, size_t count, LogitsSink *sink,
                        void *context) {
    size_t T = count < PREFILL ? count : PREFILL, together = count == 1 ? n : PREFILL / (T ? T : 1),
           *all = (size_t *)xmalloc((n ? n : 1) * sizeof *all);
    for (size_t i = 0; i < n; i++) {
        all[i] = samples ? samples[i] : i;
        if (count > s->capacity - s->position[all[i]])
            die("a text of %zu tokens is longer than the %zu there is room for", s->position[all[i]] + count,
                s->capacity);
    }
    for (size_t i = 0; i < n; i += together)
        for (size_t t = 0; t < count; t += T)
            session_pass(s, all + i, n - i < together ? n - i : together, tokens + i * count + t, count,
                         count - t < T ? count - t : T, t + T >= count, sink, context);
    free(all);
}

/* ---------------------------------------------------------------------- text that streams */

/* The text of one sample on its way out. Held back is what may yet become a stop string, and half a character of
   UTF-8. */
typedef struct {
    char *held, *ready; /* not decided yet; to be written, always whole characters */
    size_t held_bytes, held_room, ready_bytes, ready_room;
} Stream;

/* Length of the UTF-8 character at p (1 to 4); 0: these n bytes begin none; -1: they may be the beginning of one. */
static int utf8_length(const unsigned char *p, size_t n) {
    int length = p[0] < 0x80 ? 1 : p[0] < 0xC2 ? 0 : p[0] < 0xE0 ? 2 : p[0] < 0xF0 ? 3 : p[0] < 0xF5 ? 4 : 0;
    for (int i = 1; i < length; i++) {
        if ((size_t)i == n) return -1;
        /* no longer than needed, no surrogates, nothing above U+10FFFF */
        unsigned char low = i > 1 ? 0x80 : p[0] == 0xE0 ? 0xA0 : p[0] == 0xF0 ? 0x90 : 0x80;
        unsigned char high = i > 1 ? 0xBF : p[0] == 0xED ? 0x9F : p[0] == 0xF4 ? 0x8F : 0xBF;
        if (p[i] < low || p[i] > high) return 0;
    }
    return length;
}

static void append(char **text, size_t *bytes, size_t *room, const char *more, size_t n) {
    if (*bytes + n > *room) *text = (char *)xrealloc(*text, *room = 2 * (*bytes + n));
    memcpy(*text + *bytes, more, n);
    *bytes += n;
}

/* The first n held bytes become ready; bytes that are no UTF-8 become U+FFFD. Half a character at their end stays,
   unless it is the end of the text. */
static void stream_release(Stream *o, size_t n, bool end) {
    size_t at = 0;
    if (!o->held_bytes) return;
    while (at < n) {
        int length = utf8_length((unsigned char *)o->held + at, n - at);
        if (length < 0 && !end) break;
        if (length > 0) append(&o->ready, &o->ready_bytes, &o->ready_room, o->held + at, (size_t)length);
        else append(&o->ready, &o->ready_bytes, &o->ready_room, "\xEF\xBF\xBD", 3);
        at += length > 0 ? (size_t)length : length < 0 ? n - at : 1;
    }
    memmove(o->held, o->held + at, o->held_bytes -= at);
}

/* Adds a token's bytes. True: a stop string is complete; the text ends before it. */
static bool stream_add(Stream *o, const char *piece, size_t bytes, const Texts *stops) {
    append(&o->held, &o->held_bytes, &o->held_room, piece, bytes);
    size_t doubtful = o->held_bytes; /* from here on it may become a stop string */
    for (size_t at = 0; at < o->held_bytes; at++)
        for (int i = 0; i < stops->count; i++) {
            size_t left = o->held_bytes - at, length = strlen(stops->text[i]);
            if (memcmp(o->held + at, stops->text[i], left < length ? left : length) != 0) continue;
            if (left >= length) {
                stream_release(o, at, true);
                return true;
            }
            if (at < doubtful) doubtful = at;
        }
    stream_release(o, doubtful, false);
    return false;
}

/* ---------------------------------------------------------------------- measuring */

/* A mean and its standard error, taking what is added as independent. */
typedef struct {
    double count, sum, square;
} Mean;

static void mean_add(Mean *m, double x) {
    m->count++;
    m->sum += x;
    m->square += x * x;
}
static double mean_value(const Mean *m) { return m->sum / m->count; }
static double mean_error(const Mean *m) { /* 0 for a single value */
    double variance = m->square / m->count - mean_value(m) * mean_value(m);
    return m->count > 1 && variance > 0 ? sqrt(variance / (m->count - 1)) : 0;
}

/* The losses of a text's tokens but the first, in nats. */
enum { POSITIONS = 25 }; /* a token predicted from p tokens belongs to row floor(log2 p) */
typedef struct {
    size_t predictions, windows, stretches;
    double sum, *stretch; /* (stretches): sums of T predictions each; the last may have fewer */
    Mean position[POSITIONS];
} Losses;

typedef struct {
    const Model *model;
    const int *tokens;
    size_t T, stride, window; /* window: of sample 0 */
    real *rows;               /* (2, T): losses and lse */
    Losses *out;
} Measuring;

/* A LogitsSink: of each window but the first only the last `stride` predictions count; the others were made before,
   from more. */
static void measure_rows(void *context, size_t sample, size_t position, size_t rows, const real *logits) {
    Measuring *c = (Measuring *)context;
    Sizes z = config_sizes(&c->model->net.config);
    size_t window = c->window + sample, known = window ? c->T - c->stride : 0,
           skip = known > position ? known - position : 0;
    if (skip >= rows) return;
    size_t first = window * c->stride + position + skip; /* prediction i is that of token i + 1 */
    logits += skip * z.Vp;
    position += skip;
    rows -= skip;
    classifier_forward(c->rows, c->rows + c->T, logits, c->tokens + first + 1, rows, z.V, z.Vp);
    for (size_t i = 0; i < rows; i++) {
        double loss = (double)c->rows[i];
        int row = 0;
        for (size_t seen = position + i + 1; seen > 1; seen /= 2) row++;
        mean_add(&c->out->position[row], loss);
        c->out->stretch[(first + i) / c->T] += loss;
        c->out->sum += loss;
    }
}

/* The text in windows of T tokens that begin every `stride` tokens, stride <= T, `batch` windows at a time; count >=
   2. Free out.stretch. */
static Losses measure_losses(const Model *m, const int *tokens, size_t count, size_t stride, size_t batch) {
    size_t T = (size_t)m->net.config.T;
    Losses out;
    memset(&out, 0, sizeof out);
    out.predictions = count - 1;
    out.windows = out.predictions <= T ? 1 : 1 + (out.predictions - T + stride - 1) / stride;
    out.stretches = (out.predictions + T - 1) / T;
    out.stretch = (double *)xcalloc(out.stretches, sizeof *out.stretch);
    if (batch > out.windows) batch = out.windows;
    Session *s = session_create(m, batch, T);
    int *x = (int *)xmalloc(batch * T * sizeof *x);
    Measuring c = {m, tokens, T, stride, 0, (real *)xmalloc(2 * T * sizeof(real)), &out};
    for (size_t B; c.window < out.windows; c.window += B) {
        /* only the last can be shorter */
        size_t begin = c.window * stride, length = out.predictions - begin < T ? out.predictions - begin : T;
        for (B = 0; B < batch && c.window + B < out.windows && begin + B * stride + length <= out.predictions; B++) {
            memcpy(x + B * length, tokens + begin + B * stride, length * sizeof *x);
            session_reset(s, B);
        }
        session_run(s, NULL, B, x, length, measure_rows, &c);
        progress("perplexity", (double)(c.window + B), (double)out.windows);
    }
    session_free(s);
    free(x);
    free(c.rows);
    return out;
}

/* What a model makes of tasks: means over them. */
typedef struct {
    /* the likeliest ending is the right one; likeliest per byte; one over the number of endings */
    Mean choice, normalised, chance;
    Mean word, likelihood; /* the last word's tokens are all the likeliest; its log-likelihood in nats */
} Scores;

typedef struct {
    const Model *model;
    const int *targets;       /* (samples, longest): the endings' tokens, -1 behind them */
    size_t longest, position; /* position: of the first token after the context */
    real *rows;               /* (2, longest) */
    double *likelihood;       /* (samples) */
    bool *greedy;
} Scoring;

/* A LogitsSink: row i is the prediction of an ending's token i. */
static void score_rows(void *context, size_t sample, size_t position, size_t rows, const real *logits) {
    Scoring *c = (Scoring *)context;
    Sizes z = config_sizes(&c->model->net.config);
    const int *targets = c->targets + sample * c->longest + (position + 1 - c->position);
    classifier_forward(c->rows, c->rows + c->longest, logits, targets, rows, z.V, z.Vp);
    for (size_t i = 0; i < rows && targets[i] >= 0; i++) {
        const real *l = logits + i * z.Vp;
        c->likelihood[sample] -= (double)c->rows[i];
        for (size_t v = 0; v < z.V && c->greedy[sample]; v++)
            if (l[v] > l[targets[i]] || (l[v] == l[targets[i]] && v < (size_t)targets[i])) c->greedy[sample] = false;
    }
}

/* The log-likelihood of each of a task's endings after its context, and whether greedy decoding would write it.
   Where both together exceed the model's length, the context loses its beginning. path: of the task, for sentences. */
static void score_task(const Model *m, Session *s, const Task *t, const char *path, double *likelihood, bool *greedy) {
    size_t T = (size_t)m->net.config.T, n = 1, room = 0, longest = 0, counts[TASK_ENDINGS_MAX], k = (size_t)t->count;
    int *context = NULL, *ids[TASK_ENDINGS_MAX];
    context = (int *)xmalloc((room = 64) * sizeof *context);
    context[0] = tokenizer_eot(m->tokenizer); /* as in training: every document stands behind one */
    tokenizer_encode(m->tokenizer, t->context, strlen(t->context), false, &context, &n, &room);
    for (size_t e = 0; e < k; e++) {
        ids[e] = NULL;
        counts[e] = room = 0;
        tokenizer_encode(m->tokenizer, t->endings[e], strlen(t->endings[e]), false, &ids[e], &counts[e], &room);
        longest = counts[e] > longest ? counts[e] : longest;
    }
    if (longest > T)
        die("%s, line %d: an ending has %zu tokens; the model was trained for %zu", path, t->line, longest, T);
    size_t keep = n + longest - 1 > T ? T + 1 - longest : n;
    int *tokens = (int *)xmalloc(2 * k * longest * sizeof *tokens), *targets = tokens + k * longest;
    for (size_t e = 0; e < k; e++) {
        for (size_t i = 0; i < longest; i++) targets[e * longest + i] = i < counts[e] ? ids[e][i] : -1;
        /* what follows an ending does not matter */
        for (size_t i = 0; i + 1 < longest; i++) tokens[e * (longest - 1) + i] = i < counts[e] ? ids[e][i] : context[0];
        likelihood[e] = 0;
        greedy[e] = true;
    }
    Scoring c = {m, targets, longest, keep, (real *)xmalloc(2 * longest * sizeof(real)), likelihood, greedy};
    session_reset(s, 0);
    session_run(s, NULL, 1, context + n - keep, keep, NULL, NULL);
    for (size_t e = 0; e < k; e++) score_rows(&c, e, keep - 1, 1, session_logits(s, 0));
    for (size_t e = 1; e < k && longest > 1; e++) session_copy(s, e, 0);
    if (longest > 1) session_run(s, NULL, k, tokens, longest - 1, score_rows, &c);
    for (size_t e = 0; e < k; e++) free(ids[e]);
    free(context);
    free(tokens);
    free(c.rows);
}

static Scores score_tasks(const Model *m, const Task *tasks, size_t count, const char *path) {
    Scores out;
    size_t most = 1;
    memset(&out, 0, sizeof out);
    for (size_t i = 0; i < count; i++) most = (size_t)tasks[i].count > most ? (size_t)tasks[i].count : most;
    Session *s = session_create(m, most, (size_t)m->net.config.T);
    for (size_t i = 0; i < count; i++) {
        const Task *t = &tasks[i];
        double likelihood[TASK_ENDINGS_MAX];
        bool greedy[TASK_ENDINGS_MAX];
        score_task(m, s, t, path, likelihood, greedy);
        int best = 0, best_per_byte = 0;
        for (int e = 0; e < t->count; e++) {
            if (!isfinite(likelihood[e]))
                die("%s, line %d: the model gives it a probability that is not finite: it is not a usable model", path,
                    t->line);
            if (likelihood[e] > likelihood[best]) best = e;
            if (likelihood[e] / (double)t->bytes[e] > likelihood[best_per_byte] / (double)t->bytes[best_per_byte])
                best_per_byte = e;
        }
        if (t->last_word) {
            mean_add(&out.word, greedy[0]);
            mean_add(&out.likelihood, likelihood[0]);
        } else {
            mean_add(&out.choice, best == t->label);
            mean_add(&out.normalised, best_per_byte == t->label);
            mean_add(&out.chance, 1.0 / t->count);
        }
        progress("score", (double)(i + 1), (double)count);
    }
    session_free(s);
    return out;
}

/* ---------------------------------------------------------------------- commands */

static void set_threads(int64_t threads) {
#ifdef _OPENMP
    if (threads > 0) omp_set_num_threads((int)threads);
#else
    if (threads > 1)
        die_usage("--threads %lld: this program was built without OpenMP and has one thread", (long long)threads);
#endif
}

/* The end of every table of flags: a command has variables `tokenizer` and `threads`. */
#define MACHINE_FLAGS                                                                                   \
    {FLAG_TEXT,                                                                                         \
     "tokenizer",                                                                                       \
     &tokenizer,                                                                                        \
     0,                                                                                                 \
     0,                                                                                                 \
     "FILE",                                                                                            \
     "the tokenizer of a model file that holds none, as those of llm.c",                                \
     false},                                                                                            \
        {FLAG_INT, "threads", &threads, 0, 4096, NULL, "CPU threads; 0: what OpenMP chooses", false}, { \
        FLAG_ROOM, NULL, NULL, 0, 0, NULL, NULL, false                                                  \
    }

/* The text that a command is given: an argument (or NULL), or a file without the newlines that end it, which are not
   part of the sentence. */
static char *given_text(const char *argument, const char *file, size_t *bytes) {
    char *text = file ? read_file(file, bytes) : xstrdup(argument ? argument : "");
    if (!file) *bytes = strlen(text);
    while (file && *bytes > 0 && text[*bytes - 1] == '\n') --*bytes;
    return text;
}

enum { RECENT = 256 }; /* tokens that the repetition penalty looks back on */
enum { GOING_ON, END_OF_TEXT, STOP_STRING, TOKENS_MADE, CONTEXT_FULL };

/* One text being written. */
typedef struct {
    Sampler sampler;
    Stream stream;
    int recent[RECENT]; /* a ring; of `recents` tokens */
    size_t recents;
    int token, state; /* the last one; GOING_ON, or why it stopped */
    int64_t made;
} Writer;

static void remember(Writer *w, int token) { w->recent[w->recents++ % RECENT] = token; }

static int generate(int argc, char **argv) {
    int64_t tokens = 0, samples = 1, limit = 0, top_k = 0, seed = 1, threads = 0;
    double temperature = 0.8, top_p = 0.95, min_p = 0, repetition = 1;
    const char *file = NULL, *tokenizer = NULL;
    bool endless = false;
    Texts stops = {0};
    Flag flags[] = {
        {FLAG_ROOM, NULL, NULL, 0, 0, NULL, "what to write", false},
        {FLAG_TEXT, "file", &file, 0, 0, "FILE", "read the prompt from FILE; - is standard input", false},
        {FLAG_INT, "samples", &samples, 1, 65536, NULL,
         "texts written side by side; sample i is what --seed SEED + i alone would write", false},
        {FLAG_INT, "tokens", &tokens, 0, 9e15, NULL, "tokens to generate, at most; 0: until one of the ends below",
         false},
        {FLAG_TEXTS, "stop", &stops, 0, 0, "TEXT", "end a sample before TEXT; may be given several times", false},
        {FLAG_SWITCH, "endless", &endless, 0, 0, NULL, "go on behind the end of a text with another", false},
        {FLAG_INT, "context", &limit, 0, 9e15, NULL,
         "end after N tokens, prompt included; 0: what the model was trained for, without end where it needs constant "
         "memory",
         false},
        {FLAG_ROOM, NULL, NULL, 0, 0, NULL, "choice of the next token, in the order in which it is narrowed down",
         false},
        {FLAG_REAL, "repetition-penalty", &repetition, 0.01, 100, NULL,
         "above 1: the last 256 tokens become less likely", false},
        {FLAG_REAL, "temperature", &temperature, 0, 100, NULL,
         "below 1 bolder in favour of the likely; 0: always the most likely token", false},
        {FLAG_INT, "top-k", &top_k, 0, 1 << 20, NULL, "choose among the K most likely; 0: all", false},
        {FLAG_REAL, "top-p", &top_p, 1e-9, 1, NULL, "choose among the most likely that together have probability P",
         false},
        {FLAG_REAL, "min-p", &min_p, 0, 1, NULL, "choose among those at least P times as likely as the most likely",
         false},
        {FLAG_INT, "seed", &seed, 0, 9e15, NULL, "same seed, same text, whatever the threads and samples", false},
        {FLAG_ROOM, NULL, NULL, 0, 0, NULL, "machine and files", false},
        MACHINE_FLAGS,
    };
    int n = parse_flags(
        flags, argc, argv,
        "usage: infer generate MODEL [PROMPT] [flags]\n"
        "Continues PROMPT; without one, starts a new text. Several samples are divided by lines <|endoftext|>.\n");
    if (n < 1) die_usage("generate needs a model file, such as runs/default/model_00000800.bin");
    if (n > 2) die_usage("generate takes a model and one prompt; put the prompt in quotes");
    if (n == 2 && file) die_usage("give the prompt as an argument or by --file, not both");
    for (int i = 0; i < stops.count; i++)
        if (!stops.text[i][0]) die_usage("--stop needs a text of at least one letter");
    set_threads(threads);
    Model *m = model_open(argv[1], tokenizer, OBJECTIVE_LM);
    const Config *c = &m->net.config;
    const size_t N = (size_t)samples, T = (size_t)c->T, most = limit ? (size_t)limit : model_endless(m) ? SIZE_MAX : T;
    if (c->position != POSITION_ROPE && most > T)
        die("--context %lld: %s has learned positions for %zu tokens and cannot go beyond them", (long long)limit,
            argv[1], T);
    size_t prompt_bytes, count = 0, room = 0, bytes;
    char *prompt = given_text(n == 2 ? argv[2] : NULL, file, &prompt_bytes);
    int *ids = NULL;
    tokenizer_encode(m->tokenizer, prompt, prompt_bytes, false, &ids, &count, &room);
    int *context = (int *)xmalloc((count + 1) * sizeof *context), eot = tokenizer_eot(m->tokenizer);
    context[0] = eot; /* as in training: every document stands behind one */
    if (count) memcpy(context + 1, ids, count * sizeof *ids);
    if (count + 1 > most)
        die("the prompt has %zu tokens, with the start one more; %s %zu%s", count,
            limit ? "--context allows" : "the model was trained for", most,
            limit || c->position != POSITION_ROPE ? "" : ", and --context N goes beyond");

    Session *s =
        session_create(m, N, tokens > 0 && most - count - 1 > (size_t)tokens ? count + 1 + (size_t)tokens : most);
    Writer *writers = (Writer *)xcalloc(N, sizeof *writers);
    size_t *active = (size_t *)xmalloc(N * sizeof *active), actives = N, turn = 0, fed = 0,
           stopped[CONTEXT_FULL + 1] = {0};
    int *next = (int *)xmalloc(N * sizeof *next);
    double start = now_seconds(), prefill, took;
    session_run(s, NULL, 1, context, count + 1, NULL, NULL);
    prefill = now_seconds() - start;
    for (size_t i = 0; i < N; i++) {
        Sampler sampler = {repetition, temperature, (int)top_k, top_p, min_p, (uint64_t)seed + i};
        session_copy(s, i, 0);
        writers[i].sampler = sampler;
        active[i] = i;
        for (size_t j = 1; j <= count; j++) remember(&writers[i], context[j]);
    }
    start = now_seconds();
    fwrite(prompt, 1, prompt_bytes, stdout);
    while (actives > 0) {
#pragma omp parallel for schedule(dynamic) if (actives > 1)
        for (size_t k = 0; k < actives; k++) {
            Writer *w = &writers[active[k]];
            w->token = sample_token(&w->sampler, session_logits(s, active[k]), c->V, w->recent,
                                    w->recents < RECENT ? w->recents : RECENT);
        }
        size_t left = 0;
        for (size_t k = 0; k < actives; k++) {
            Writer *w = &writers[active[k]];
            if (w->token < 0) die("%s gives logits that are not finite: it is not a usable model", argv[1]);
            if (w->token == eot && !endless) w->state = END_OF_TEXT;
            else {
                const char *piece =
                    w->token == eot ? "\n<|endoftext|>\n" : tokenizer_piece(m->tokenizer, w->token, &bytes);
                if (w->token == eot) bytes = strlen(piece);
                else remember(w, w->token);
                if (stream_add(&w->stream, piece, bytes, &stops)) w->state = STOP_STRING;
                else if (++w->made == tokens) w->state = TOKENS_MADE;
                else if (s->position[active[k]] == most) w->state = CONTEXT_FULL;
            }
            stopped[w->state]++;
            if (w->state == GOING_ON) {
                next[left] = w->token;
                active[left++] = active[k];
            } else if (w->state != STOP_STRING) stream_release(&w->stream, w->stream.held_bytes, true);
        }
        actives = left;
        for (; turn < N; turn++) { /* samples are written one after the other, each as soon as it can be */
            Stream *o = &writers[turn].stream;
            if (o->ready_bytes) fwrite(o->ready, 1, o->ready_bytes, stdout);
            o->ready_bytes = 0;
            if (writers[turn].state == GOING_ON) break;
            printf(N > 1 ? "\n<|endoftext|>\n" : "\n");
            if (turn + 1 < N) fwrite(prompt, 1, prompt_bytes, stdout);
        }
        if (fflush(stdout) != 0) die("cannot write the text to standard output");
        fed += actives;
        if (actives > 0) session_run(s, active, actives, next, 1, NULL, NULL);
    }
    took = now_seconds() - start;
    int64_t made = 0;
    for (size_t i = 0; i < N; i++) made += writers[i].made;
    fprintf(stderr, "prompt %zu tokens in %.3f s, %.0f tokens/s; %lld tokens generated", count + 1, prefill,
            (double)(count + 1) / prefill, (long long)made);
    if (fed > 0) fprintf(stderr, " in %.3f s, %.0f tokens/s", took, (double)fed / took);
    static const char *const reasons[] = {NULL, "the end of the text", "a --stop text",
                                          "the number of tokens asked for", "the end of the context"};
    fprintf(stderr, "; stopped at ");
    for (int i = 1, said = 0; i <= CONTEXT_FULL; i++)
        if (stopped[i]) {
            fprintf(stderr, "%s%s", said++ ? ", " : "", reasons[i]);
            if (N > 1) fprintf(stderr, " (%zu)", stopped[i]);
        }
    if (stopped[CONTEXT_FULL] && !limit)
        fprintf(stderr, " of %zu tokens that it was trained for%s", T,
                c->position == POSITION_ROPE ? "; --context N goes beyond" : ", and learned positions go no further");
    fprintf(stderr, "\n");
    for (size_t i = 0; i < N; i++) {
        free(writers[i].stream.held);
        free(writers[i].stream.ready);
    }
    session_free(s);
    model_close(m);
    free(prompt);
    free(ids);
    free(context);
    free(writers);
    free(active);
    free(next);
    return 0;
}

/* The tokens of a text, each document behind its <|endoftext|> as data/prepare would write them, or those of a
   shard. */
static int *perplexity_tokens(const char *path, const Tokenizer *t, size_t *count) {
    size_t bytes, room = 0;
    char *text = read_file(path, &bytes);
    int *ids = NULL, eot = tokenizer_eot(t);
    int32_t magic = 0;
    *count = 0;
    if (bytes >= 4) memcpy(&magic, text, 4);
    if (magic == 20240520) {
        free(text);
        Loader *l = loader_open(path, 1, tokenizer_vocab_size(t), -1, false, 0);
        uint64_t n = loader_tokens(l);
        ids = (int *)xmalloc((n + 1) * sizeof *ids);
        int y;
        for (uint64_t i = 0; i + 1 < n; i++) {
            loader_next(l, ids + i, &y, 1);
            ids[i + 1] = y;
        }
        *count = n;
        loader_free(l);
        return ids;
    }
    static const char mark[] = "<|endoftext|>";
    for (char *at = text, *end = text + bytes; at < end;) { /* documents, without the newlines next to the marks */
        char *stop = (char *)memmem(at, (size_t)(end - at), mark, sizeof mark - 1),
             *next = stop ? stop + sizeof mark - 1 : end, *last = stop ? stop : end;
        while (at < last && *at == '\n') at++;
        while (last > at && last[-1] == '\n') last--;
        if (last > at) {
            if (*count + 2 > room) ids = (int *)xrealloc(ids, (room = 2 * *count + 1024) * sizeof *ids);
            ids[(*count)++] = eot;
            tokenizer_encode(t, at, (size_t)(last - at), false, &ids, count, &room);
        }
        at = next;
    }
    free(text);
    return ids;
}

static int perplexity(int argc, char **argv) {
    int64_t batch = 8, stride = 0, threads = 0;
    const char *tokenizer = NULL;
    Flag flags[] = {
        {FLAG_ROOM, NULL, NULL, 0, 0, NULL, "flags", false},
        {FLAG_INT, "stride", &stride, 0, 1 << 24, NULL,
         "windows begin every N tokens and all but the first count their last N; 0: windows side by side", false},
        {FLAG_INT, "batch", &batch, 1, 65536, NULL, "windows per pass", false},
        MACHINE_FLAGS,
    };
    int n =
        parse_flags(flags, argc, argv,
                    "usage: infer perplexity MODEL FILE [flags]\n"
                    "FILE is a text, documents separated by lines <|endoftext|>, or a shard of data/prepare. It is cut "
                    "into windows of the\n"
                    "model's length, each predicted from nothing but itself; the standard error is over stretches of "
                    "that length. The table is\n"
                    "of tokens by how many tokens they were predicted from; its errors take them as independent.\n");
    if (n != 2) die_usage("perplexity needs a model and a file: infer perplexity MODEL FILE");
    set_threads(threads);
    Model *m = model_open(argv[1], tokenizer, OBJECTIVE_LM);
    size_t T = (size_t)m->net.config.T, count;
    if ((size_t)stride > T)
        die_usage("--stride %lld exceeds the windows of %s, %zu tokens", (long long)stride, argv[1], T);
    int *tokens = perplexity_tokens(argv[2], m->tokenizer, &count);
    if (count < 2) die("%s holds no text to predict", argv[2]);
    double bytes = 0, start = now_seconds();
    for (size_t i = 1; i < count; i++) {
        size_t length = 0;
        if (tokens[i] != tokenizer_eot(m->tokenizer)) tokenizer_piece(m->tokenizer, tokens[i], &length);
        bytes += (double)length;
    }
    Losses l = measure_losses(m, tokens, count, stride ? (size_t)stride : T, (size_t)batch);
    double mean = l.sum / (double)l.predictions, square = 0;
    if (!isfinite(mean)) die("%s gives a loss that is not finite on %s: it is not a usable model", argv[1], argv[2]);
    for (size_t i = 0; i < l.stretches; i++) { /* deviation of a stretch's sum from what its length makes one expect */
        double expected = mean * (double)(i + 1 < l.stretches ? T : l.predictions - i * T);
        square += (l.stretch[i] - expected) * (l.stretch[i] - expected);
    }
    printf("tokens %zu, bytes %.0f, windows %zu of %zu", l.predictions, bytes, l.windows, T);
    if (stride) printf(" every %lld", (long long)stride);
    printf("\nloss %.6f nats per token\n", mean);
    if (l.stretches > 1) {
        double error = sqrt(square * (double)l.stretches / (double)(l.stretches - 1)) / (double)l.predictions;
        printf("perplexity %.4f +- %.4f\n", exp(mean), exp(mean) * error);
    } else printf("perplexity %.4f (one window: no standard error)\n", exp(mean));
    printf("bits per byte %.5f\n\n%19s %12s %10s\n", l.sum / log(2) / bytes, "predicted from", "tokens", "loss");
    for (size_t row = 0, first = 1; row < POSITIONS; row++, first *= 2) {
        const Mean *p = &l.position[row];
        char range[64];
        if (!p->count) continue;
        size_t last = 2 * first - 1 < T ? 2 * first - 1 : T;
        if (first < last) snprintf(range, sizeof range, "%zu - %zu", first, last);
        else snprintf(range, sizeof range, "%zu", first);
        printf("%19s %12.0f %10.4f", range, p->count, mean_value(p));
        if (p->count > 1) printf(" +- %.4f", mean_error(p));
        printf("\n");
    }
    fprintf(stderr, "%.0f tokens/s\n", (double)l.predictions / (now_seconds() - start));
    model_close(m);
    free(tokens);
    free(l.stretch);
    return 0;
}

static void print_mean(const char *what, const Mean *m) {
    printf(", %s %.4f", what, mean_value(m));
    if (m->count > 1) printf(" +- %.4f", mean_error(m));
}

static int score(int argc, char **argv) {
    int64_t threads = 0;
    const char *tokenizer = NULL;
    Flag flags[] = {
        {FLAG_ROOM, NULL, NULL, 0, 0, NULL, "flags", false},
        MACHINE_FLAGS,
    };
    int n = parse_flags(
        flags, argc, argv,
        "usage: infer score MODEL TASKS.jsonl [flags]\n"
        "One JSON object a line. {\"ctx\": \"...\", \"endings\": [\"...\", ...], \"label\": 0}, as HellaSwag: the "
        "share of tasks where the right ending\n"
        "is the likeliest, and where it is the likeliest per byte (normalised). {\"text\": \"...\"}, as LAMBADA: the "
        "share of texts whose last\n"
        "word greedy decoding would write, and its mean log-likelihood. data/make_stories --tasks makes such files.\n");
    if (n != 2) die_usage("score needs a model and a file of tasks: infer score MODEL TASKS.jsonl");
    set_threads(threads);
    Model *m = model_open(argv[1], tokenizer, OBJECTIVE_LM);
    size_t count;
    Task *tasks = tasks_read(argv[2], &count);
    double start = now_seconds();
    Scores s = score_tasks(m, tasks, count, argv[2]);
    if (s.choice.count) {
        printf("choice: %.0f tasks", s.choice.count);
        print_mean("accuracy", &s.choice);
        print_mean("normalised", &s.normalised);
        printf(", by chance %.4f\n", mean_value(&s.chance));
    }
    if (s.word.count) {
        printf("last word: %.0f tasks", s.word.count);
        print_mean("accuracy", &s.word);
        print_mean("log-likelihood", &s.likelihood);
        printf("\n");
    }
    fprintf(stderr, "%.1f tasks/s\n", (double)count / (now_seconds() - start));
    tasks_free(tasks, count);
    model_close(m);
    return 0;
}

static int fill(int argc, char **argv) {
    int64_t show = 5, threads = 0;
    const char *tokenizer = NULL;
    Flag flags[] = {
        {FLAG_ROOM, NULL, NULL, 0, 0, NULL, "flags", false},
        {FLAG_INT, "show", &show, 0, 1000, NULL, "likeliest tokens listed for each mask, on standard error", false},
        MACHINE_FLAGS,
    };
    int n = parse_flags(flags, argc, argv,
                        "usage: infer fill MODEL \"The [MASK] sat\" [flags]\nPuts the likeliest token in place of each "
                        "[MASK], all at once.\n");
    if (n != 2) die_usage("fill needs a model and a text with [MASK] in it, in quotes");
    set_threads(threads);
    Loaded l = load(argv[1], tokenizer, 1, OBJECTIVE_MLM);
    const Config *c = &l.model->config;
    int *ids = NULL, mask = tokenizer_mask(l.tokenizer), masks = 0;
    size_t count = 1, room = 1024;
    ids = (int *)xmalloc(room * sizeof *ids);
    ids[0] = tokenizer_eot(l.tokenizer);
    tokenizer_encode(l.tokenizer, argv[2], strlen(argv[2]), true, &ids, &count, &room);
    for (size_t i = 0; i < count; i++) masks += ids[i] == mask;
    if (!masks) die("there is no [MASK] in the text '%.80s'", argv[2]);
    if (count > (size_t)c->T)
        die("the text has %zu tokens; the model was trained for %d, one of them for the start", count - 1, c->T);
    gsa_forward(l.model, ids, NULL, 1, count);
    for (size_t i = 1; i < count; i++) {
        size_t bytes;
        if (ids[i] == mask) {
            real *logits = l.model->a.logits + i * (size_t)c->Vp, most, sum = 0;
            int best = 0;
            if (mask < c->V) logits[mask] = -INFINITY; /* no answer */
            most = largest(logits, (size_t)c->V);
            for (int v = 0; v < c->V; v++) sum += exp_real(logits[v] - most);
            for (int64_t k = 0; k < (show > 1 ? show : 1) && k < c->V; k++) {
                int token = 0;
                for (int v = 1; v < c->V; v++)
                    if (logits[v] > logits[token]) token = v;
                if (k == 0) best = token;
                const char *piece = tokenizer_piece(l.tokenizer, token, &bytes);
                if (k < show)
                    fprintf(stderr, "%s%.*s %.1f %%", k ? ", " : "mask: ", (int)bytes, piece,
                            100 * (double)(exp_real(logits[token] - most) / sum));
                logits[token] = -INFINITY;
            }
            if (show) fputc('\n', stderr);
            ids[i] = best;
        }
        const char *piece = tokenizer_piece(l.tokenizer, ids[i], &bytes);
        fwrite(piece, 1, bytes, stdout);
    }
    printf("\n");
    unload(l);
    free(ids);
    return 0;
}

/* The heads that a list such as 0:3,2:1-4 (layer:head) names, as masks by layer. */
static void named_heads(uint64_t heads[MAX_LAYERS], const char *list, const Config *c) {
    int NH = config_heads(c);
    memset(heads, 0, MAX_LAYERS * sizeof *heads);
    for (const char *p = list;;) {
        int layer, first, last, used = 0, more = 0;
        if (sscanf(p, "%9d:%9d%n", &layer, &first, &used) != 2)
            die_usage("--heads '%.80s' is not a list such as 0:3,2:1-4 (layer:head)", list);
        last = first;
        p += used;
        if (sscanf(p, "-%9d%n", &last, &more) == 1) p += more;
        if (layer < 0 || layer >= c->L || first < 0 || last < first || last >= NH)
            die_usage("--heads '%.80s': the model has layers 0 to %d of heads 0 to %d", list, c->L - 1, NH - 1);
        for (int h = first; h <= last; h++) heads[layer] |= 1ull << h;
        if (*p == 0) return;
        if (*p++ != ',') die_usage("--heads '%.80s': entries are separated by commas", list);
    }
}

/* Queries (part 0) or keys (part 1) of a head in the last forward pass of one text: (T, HS) */
static void report_head(void *model, int l, int h, int part, float *out) {
    const GSA *m = (const GSA *)model;
    Sizes z = config_sizes(&m->config);
    for (size_t t = 0; t < m->used_T; t++)
        memcpy(out + t * z.HS, m->a.qkv + ((size_t)l * m->used_T + t) * 3 * z.A + (size_t)part * z.A + (size_t)h * z.HS,
               z.HS * sizeof(float));
}

static int report(int argc, char **argv) {
    int64_t most = 96, threads = 0;
    const char *file = NULL, *out = "report.html", *pictures = NULL, *list = NULL, *tokenizer = NULL;
    Flag flags[] = {
        {FLAG_ROOM, NULL, NULL, 0, 0, NULL, "flags", false},
        {FLAG_TEXT, "out", &out, 0, 0, "FILE", "the page; -o for short", false},
        {FLAG_TEXT, "file", &file, 0, 0, "FILE", "read the text from FILE; - is standard input", false},
        {FLAG_INT, "tokens", &most, 2, 512, NULL, "how much of the text is shown, at most", false},
        {FLAG_TEXT, "pictures", &pictures, 0, 0, "DIR", "write PNG pictures of the heads into DIR as well", false},
        {FLAG_TEXT, "heads", &list, 0, 0, "MAP", "of these heads only, layer:head such as 0:3,2:1-4; with --pictures",
         false},
        MACHINE_FLAGS,
    };
    int n = parse_flags(flags, argc, argv,
                        "usage: infer report MODEL TEXT [-o report.html] [flags]\n"
                        "Writes a page that shows what the model does with TEXT: attention, splats and predictions, "
                        "token by token. It needs no network\n"
                        "and nothing beside it. A main.log next to the model adds the curves of its training.\n");
    if (n < 1) die_usage("report needs a model file and a text: infer report MODEL TEXT");
    if (n > 2) die_usage("report takes a model and one text; put the text in quotes");
    if ((n == 2) == (file != NULL))
        die_usage(file ? "give the text as an argument or by --file, not both"
                       : "report needs a text to show the model: infer report MODEL TEXT");
    if (list && !pictures) die_usage("--heads says which heads --pictures draws; give --pictures DIR as well");
    set_threads(threads);
    Checkpoint *k = checkpoint_open(argv[1], CHECKPOINT_MODEL);
    Config c = k->config;
    Tokenizer *t = checkpoint_tokenizer(k, tokenizer);
    uint64_t heads[MAX_LAYERS];
    for (int l = 0; l < MAX_LAYERS; l++) heads[l] = ~0ull;
    if (list) named_heads(heads, list, &c);

    size_t bytes, count = 1, room = 1024, T = (size_t)most;
    char *text = given_text(n == 2 ? argv[2] : NULL, file, &bytes), *note = NULL;
    if (bytes == 0) die("%s is empty: the report needs a text to show", file ? file : "the text");
    int *x = (int *)xmalloc(room * sizeof *x);
    x[0] = tokenizer_eot(t); /* as in training: every document stands behind one */
    tokenizer_encode(t, text, bytes, c.objective == OBJECTIVE_MLM, &x, &count, &room);
    size_t heads_in_all = (size_t)c.L * (size_t)config_heads(&c);
    while (T > 2 && heads_in_all * T * T > 24 << 20) T--; /* the page stays below some 40 MB */
    if (T > (size_t)c.T) T = (size_t)c.T;
    if (count > T) {
        note = xasprintf("The text has %zu tokens, one for the start counted; the first %zu are shown (%s).", count, T,
                         T == (size_t)c.T    ? "the model's context"
                         : T == (size_t)most ? "--tokens shows more"
                                             : "more of so many heads would make too large a page");
        fprintf(stderr, "%s\n", note);
        count = T;
    }

    GSA *m = gsa_create(&c, 1);
    checkpoint_read_tensors(k, "", m->params);
    int *y = (int *)xmalloc(count * sizeof *y);
    for (size_t i = 0; i < count; i++) y[i] = i + 1 < count ? x[i + 1] : -1;
    gsa_forward(m, x, c.objective == OBJECTIVE_LM ? y : NULL, 1, count);
    for (size_t i = 0; i < count * (size_t)c.Vp; i++)
        if (!isfinite(m->a.logits[i])) die("%s gives numbers that are not finite: it is not a usable model", argv[1]);
    Report *r = report_create(&c, m->params, (int)count, report_head, m);
    r->model = argv[1];
    r->note = note;
    r->step = k->step;
    for (size_t i = 0; i < count; i++) {
        r->loss[i] = c.objective == OBJECTIVE_LM && i > 0 ? m->a.losses[i - 1] : NAN;
        real *logits = m->a.logits + i * (size_t)c.Vp, top = largest(logits, (size_t)c.V), sum = 0;
        size_t length;
        const char *piece = tokenizer_piece(t, x[i], &length);
        /* a vocabulary without it has it behind its end */
        r->tokens[i] = piece ? token_label(piece, length) : xstrdup("[MASK]");
        for (int v = 0; v < c.V; v++) sum += exp_real(logits[v] - top);
        for (size_t place = i * REPORT_GUESSES; place < (i + 1) * REPORT_GUESSES; place++) {
            int best = 0;
            for (int v = 1; v < c.V; v++)
                if (logits[v] > logits[best]) best = v;
            piece = tokenizer_piece(t, best, &length);
            r->guess[place] = token_label(piece, length);
            r->guess_share[place] = (float)(exp_real(logits[best] - top) / sum);
            logits[best] = -INFINITY;
        }
    }
    const char *slash = strrchr(argv[1], '/');
    char *log = xasprintf("%.*smain.log", slash ? (int)(slash - argv[1]) + 1 : 0, argv[1]);
    FILE *there = fopen(log, "r");
    if (there) fclose(there);
    report_write(r, there ? log : NULL, out);
    fprintf(stderr, "%s: %zu tokens, %zu heads\n", out, count, heads_in_all);
    if (pictures) fprintf(stderr, "%s: %d pictures\n", pictures, report_pictures(r, heads, pictures));
    for (size_t i = 0; i < count * (1 + REPORT_GUESSES); i++) free((char *)r->tokens[i]);
    report_free(r);
    gsa_destroy(m);
    tokenizer_free(t);
    checkpoint_close(k);
    free(log);
    free(note);
    free(text);
    free(x);
    free(y);
    return 0;
}

/* A model file with the matrices in a smaller type; all that is small stays fp32. */
static int quantize(int argc, char **argv) {
    const char *type = NULL;
    Flag flags[] = {
        {FLAG_ROOM, NULL, NULL, 0, 0, NULL, "flags", false},
        {FLAG_CHOICE, "type", &type, 0, 0, "bf16|int8",
         "bf16: half the bytes; int8, with a scale for each row of a matrix: a quarter", false},
        {FLAG_ROOM, NULL, NULL, 0, 0, NULL, NULL, false},
    };
    int n = parse_flags(flags, argc, argv,
                        "usage: infer quantize MODEL OUT --type bf16|int8\nWrites MODEL to the file OUT with its "
                        "matrices rounded. Every command takes such a file.\n");
    if (n != 2)
        die_usage("quantize needs a model and the name of the file to write: infer quantize MODEL OUT --type int8");
    if (!type) die_usage("quantize needs --type bf16 or --type int8");
    Checkpoint *k = checkpoint_open(argv[1], CHECKPOINT_MODEL);
    if (checkpoint_weight_type(k) != TYPE_F32)
        die("%s holds rounded weights already; quantize the file that training wrote", argv[1]);
    Tensor tensors[NUM_TENSORS];
    model_tensors(&k->config, tensors);
    Entry *entries = (Entry *)xmalloc(((size_t)k->count + NUM_TENSORS) * sizeof *entries);
    const void **data = (const void **)xmalloc(((size_t)k->count + NUM_TENSORS) * sizeof *data);
    void *made[2 * NUM_TENSORS];
    bool done[NUM_TENSORS] = {false};
    int count = 0, mades = 0;
    for (int i = 0; i < k->count; i++) {
        int tensor = 0;
        while (tensor < NUM_TENSORS && strcmp(tensors[tensor].name, k->entries[i].name) != 0) tensor++;
        entries[count] = k->entries[i];
        data[count++] = k->map + k->entries[i].offset;
        if (tensor == NUM_TENSORS || !tensor_is_matrix(tensor)) continue;
        if (done[tensor]) die("%s is damaged: it holds tensor %s twice", argv[1], tensors[tensor].name);
        Matrix m = checkpoint_matrix(k, "", tensor);
        done[tensor] = true;
        const int64_t rows = (int64_t)(tensors[tensor].size / m.columns);
        const float *from = (const float *)m.data;
        m.type = strcmp(type, "bf16") == 0 ? TYPE_BF16 : TYPE_I8;
        float *scales = (float *)(made[mades++] = xmalloc((size_t)rows * sizeof *scales));
        entries[count - 1] = checkpoint_entry(tensors[tensor].name, m.type, 3, tensors[tensor].shape);
        data[count - 1] = made[mades++] = xmalloc((size_t)entries[count - 1].bytes);
        if (!matrix_round(&m, from, (size_t)rows, made[mades - 1], scales))
            die("%s: tensor %s holds a number that is not finite", argv[1], tensors[tensor].name);
        if (m.type != TYPE_I8) continue;
        char name[64];
        snprintf(name, sizeof name, "%s.scales", tensors[tensor].name);
        entries[count] = checkpoint_entry(name, TYPE_F32, 1, &rows);
        data[count++] = scales;
    }
    checkpoint_write(argv[2], CHECKPOINT_MODEL, &k->config, k->step, entries, data, count);
    fprintf(stderr, "%s: %.1f MiB; %s: %.1f MiB\n", argv[1], (double)k->bytes / 1048576, argv[2],
            (double)(entries[count - 1].offset + entries[count - 1].bytes) / 1048576);
    while (mades > 0) free(made[--mades]);
    free(entries);
    free(data);
    checkpoint_close(k);
    return 0;
}

/* Mean of the diagonal of Lambda. */
static double mean_precision(const Config *c, const float *log_precision) {
    int d = config_head_size(c), P = config_precisions(c);
    double sum = 0;
    if (c->covariance != COVARIANCE_FULL)
        for (int k = 0; k < P; k++) sum += exp((double)log_precision[k]) / P;
    else
        for (int i = 0; i < d; i++)
            for (int k = 0; k <= i; k++)
                sum += pow(i == k ? exp((double)log_precision[i * (i + 1) / 2 + k])
                                  : (double)log_precision[i * (i + 1) / 2 + k],
                           2) /
                       d;
    return sum;
}

static int inspect(int argc, char **argv) {
    int64_t most = 4096, show = 5, threads = 0;
    const char *tokenizer = NULL;
    Flag flags[] = {
        {FLAG_ROOM, NULL, NULL, 0, 0, NULL, "flags", false},
        {FLAG_INT, "tokens", &most, 1, 1 << 20, NULL, "entries of the vocabulary that are looked at, from the first",
         false},
        {FLAG_INT, "show", &show, 0, 100, NULL, "tokens listed for each splat", false},
        MACHINE_FLAGS,
    };
    int n = parse_flags(
        flags, argc, argv,
        "usage: infer inspect MODEL [flags]\n"
        "The splats of each head. act: activation, the mean share of queries and keys over the last windows of "
        "training, in percent; amp: amplitude\n"
        "against its reference; width: of a splat on the unit sphere; period, half: of its envelope, in tokens; age: "
        "steps it has lived. Then the\n"
        "tokens whose keys it owns, nearest first: keys of each entry of the vocabulary at the beginning of a text.\n");
    if (n != 1) die_usage("inspect needs a model file and nothing else: infer inspect MODEL");
    set_threads(threads);
    Checkpoint *k = checkpoint_open(argv[1], CHECKPOINT_MODEL);
    Config c = k->config;
    Tokenizer *t = checkpoint_tokenizer(k, tokenizer);
    size_t G = (size_t)config_gsa_heads(&c), S = (size_t)c.S, d = (size_t)config_head_size(&c),
           V = (size_t)(most < c.V ? most : c.V), length = c.T > 1 ? 2 : 1, A = (size_t)config_width(&c);
    if (!G) die("%s has standard heads only, and no splats to show", argv[1]);
    GSA *m = gsa_create(&c, 1);
    checkpoint_read_tensors(k, "", m->params);
    Adapt *a = adapt_create(&c, 1);
    adapt_read(a, k, false);
    bool tracked = a->numbers[ADAPT_COUNT_WINDOWS] > 0;

    /* keys (G, V, HS) of all tokens, each behind the token that begins a text */
    float *keys = (float *)xmalloc(G * V * d * sizeof *keys);
    size_t batch = (size_t)c.T / length;
    int *x = (int *)xmalloc(batch * length * sizeof *x);
    for (size_t first = 0; first < V; first += batch) {
        size_t B = V - first < batch ? V - first : batch;
        for (size_t b = 0; b < B; b++) {
            x[b * length] = tokenizer_eot(t);
            x[b * length + length - 1] = (int)(first + b);
        }
        gsa_forward(m, x, NULL, B, length);
        for (size_t l = 0; l < (size_t)c.L; l++)
            for (int h = 0; h < config_heads(&c); h++)
                for (size_t b = 0; b < B && config_is_gsa(&c, (int)l, h); b++)
                    memcpy(keys + ((size_t)config_gsa_before(&c, (int)l, h) * V + first + b) * d,
                           m->a.qkv + ((l * B + b) * length + length - 1) * 3 * A + A + (size_t)h * d,
                           d * sizeof *keys);
        progress("keys", (double)(first + B), (double)V);
    }

    printf("%s: step %lld, %d layers, %zu GSA heads of %zu slots%s\n", argv[1], (long long)k->step, c.L, G, S,
           tracked ? "" : "; its training kept no statistics: activations are those of the keys looked at");
    double *r = (double *)xmalloc(V * (S + 1) * sizeof *r), *nearness = r + V * S;
    for (int l = 0; l < c.L; l++)
        for (int h = 0; h < config_heads(&c); h++) {
            if (!config_is_gsa(&c, l, h)) continue;
            size_t g = (size_t)config_gsa_before(&c, l, h);
            head_responsibilities(&c, m->params, l, h, keys + g * V * d, V, r);
            printf("\nlayer %d, head %d: %d of %zu alive\n slot   act %%    amp  width%s%s   %7s  tokens\n", l, h,
                   adapt_alive(&c, (int)g, m->params + a->first), S, m->p.log_theta ? "   period" : "",
                   m->p.log_delta ? "     half" : "", "age");
            for (size_t s = 0; s < S; s++) {
                size_t i = g * S + s;
                if (!(m->p.alive[i] > 0)) {
                    printf(" %4zu   dead\n", s);
                    continue;
                }
                double share = 0;
                for (size_t v = 0; v < V; v++) share += r[v * S + s] / (double)V;
                printf(" %4zu %7.2f %6.2f %6.3f", s, 100 * (tracked ? adapt_activation(a, g, s) : share),
                       exp((double)(m->p.log_alpha[i] - m->p.log_alpha_reference[i])),
                       1 / sqrt(mean_precision(&c, m->p.log_precision + i * (size_t)config_precisions(&c))));
                if (m->p.log_theta) printf(" %8.1f", 6.283185307179586 / exp((double)m->p.log_theta[i]));
                if (m->p.log_delta) printf(" %8.1f", log(2) / exp((double)m->p.log_delta[i]));
                printf("   %7lld ", (long long)(k->step - a->born[i]));
                for (size_t v = 0; v < V; v++) { /* of the tokens that it owns how much of the key it has */
                    nearness[v] = r[v * S + s];
                    for (size_t u = 0; u < S; u++) nearness[v] = r[v * S + u] > r[v * S + s] ? -1 : nearness[v];
                }
                for (int64_t place = 0; place < show; place++) {
                    size_t best = 0, bytes;
                    for (size_t v = 1; v < V; v++) best = nearness[v] > nearness[best] ? v : best;
                    if (nearness[best] < 0) break;
                    nearness[best] = -1;
                    const char *piece = tokenizer_piece(t, (int)best, &bytes);
                    char *label = token_label(piece, bytes);
                    printf(" %s", label);
                    free(label);
                }
                printf("\n");
            }
        }
    free(r);
    free(x);
    free(keys);
    adapt_free(a);
    gsa_destroy(m);
    tokenizer_free(t);
    checkpoint_close(k);
    return 0;
}

#include "gsa/look/study.h"

#ifndef INFER_NO_MAIN

int main(int argc, char **argv) {
    static const char help[] =
        "usage: infer COMMAND MODEL ...\n"
        "  generate MODEL [PROMPT]    continue a prompt\n"
        "  perplexity MODEL FILE      loss, perplexity and bits per byte of a text or shard\n"
        "  score MODEL TASKS.jsonl    accuracy on tasks: the right one of several endings, or a text's last word\n"
        "  quantize MODEL OUT         the model with bf16 or int8 weights: smaller files, faster generation\n"
        "  fill MODEL TEXT            put tokens in place of each [MASK] of TEXT (models of --objective mlm)\n"
        "  report MODEL TEXT          a page that shows what the model does with a text: attention, splats, "
        "predictions\n"
        "  measure MODEL FILE         what each head does, how far the model looks back, which heads it needs\n"
        "  recall MODEL FILE          what it remembers by distance: questions of data/make_recall\n"
        "  inspect MODEL              the splats of each head: activation, amplitude, width, envelope, age, tokens\n"
        "infer COMMAND --help lists the flags of a command.\n";
    program_name(argv[0]);
    if (argc >= 2 && strcmp(argv[1], "generate") == 0) return generate(argc - 1, argv + 1);
    if (argc >= 2 && strcmp(argv[1], "perplexity") == 0) return perplexity(argc - 1, argv + 1);
    if (argc >= 2 && strcmp(argv[1], "score") == 0) return score(argc - 1, argv + 1);
    if (argc >= 2 && strcmp(argv[1], "quantize") == 0) return quantize(argc - 1, argv + 1);
    if (argc >= 2 && strcmp(argv[1], "fill") == 0) return fill(argc - 1, argv + 1);
    if (argc >= 2 && strcmp(argv[1], "report") == 0) return report(argc - 1, argv + 1);
    if (argc >= 2 && strcmp(argv[1], "measure") == 0) return measure(argc - 1, argv + 1);
    if (argc >= 2 && strcmp(argv[1], "recall") == 0) return recall(argc - 1, argv + 1);
    if (argc >= 2 && strcmp(argv[1], "inspect") == 0) return inspect(argc - 1, argv + 1);
    if (argc >= 2 && (strcmp(argv[1], "--help") == 0 || strcmp(argv[1], "-h") == 0)) {
        fputs(help, stdout);
        return 0;
    }
    fputs(help, stderr);
    if (argc >= 2) die_usage("unknown command '%s'", argv[1]);
    return 2;
}

#endif
