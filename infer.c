/* infer.c: uses a trained model: continues a prompt, measures how well the model predicts a text or solves tasks, or
   fills in masked tokens.

   The layers are those of train_gsa.c, included as they are. What is new here: weights used where they lie in the file,
   in fp32, bf16 or int8; sessions, which remember of each text what its next tokens need; one token at a time at the
   speed of the memory. In this order:
     loading -> matrix times vectors -> sessions -> text that streams -> tokens of files -> measuring -> commands ->
     the table of them -> main
   The commands that look into a model (report, inspect, measure, recall) are in gsa/look/study.h.
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
#include "data/text.h"
#include "tokenizer/stored.h"

#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

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
    size_t window;                 /* how far its softmax looks back; SIZE_MAX: to the start */
    real scale;                    /* what f_q . f_k is multiplied by */
    const real *forgetw, *forgetb; /* (C), (1): of its gate; NULL: it has none */
    Splats w;
    SplatConstants constants;
    double *theta; /* frequencies: of softmax splats with an envelope (S), or of learned rotations (HS/2) */
    Scan step;     /* scan and extend heads: tables for chunks of one token */
} Head;

typedef struct {
    /* what the layers of train_gsa.c read: configuration and small tensors; neither activations nor matrices */
    GSA net;
    Matrix matrix[NUM_TENSORS]; /* wte, qkvw, attprojw, fcw, fcprojw as they lie in the file */
    Head *heads;                /* (L, NH) */
    Tokenizer *tokenizer;
    Checkpoint *file;
    real *alive; /* (G, S): net.p.alive, where splats are silenced */
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
        if (config_is_gated(c, (int)(i / z.NH), (int)(i % z.NH))) {
            size_t gate = (size_t)config_gates_before(c, (int)(i / z.NH), (int)(i % z.NH));
            head->forgetw = m->net.p.forgetw + gate * z.C;
            head->forgetb = m->net.p.forgetb + gate;
        }
        if (m->net.p.log_rope && head->kind != HEAD_SPLAT && head->kind != HEAD_SCAN)
            head->theta = frequencies(m->net.p.log_rope + rope_index(c, i / z.NH, i % z.NH) * z.HS / 2, z.HS / 2);
        if (head->kind == HEAD_STANDARD) continue;
        Splats w = head_splats(&m->net, i / z.NH, i % z.NH);
        if (!is_full(&w, z.HS)) head->constants = splat_constants(&w, z.HS);
        if (head->kind != HEAD_SPLAT) head->constants.key_scale = scan_key_scale(&w, z.HS);
        head->w = w;
        head->w.constants = &head->constants;
        if (head->kind == HEAD_SPLAT && w.log_theta) head->theta = frequencies(w.log_theta, z.S);
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

static void model_unprepare(Model *m) {
    for (size_t i = 0; i < (size_t)m->net.config.L * (size_t)config_heads(&m->net.config); i++) {
        if (m->heads[i].constants.slope) free(m->heads[i].constants.slope);
        if (m->heads[i].step.w) scan_close(&m->heads[i].step);
        free(m->heads[i].theta);
    }
    free(m->heads);
}

/* Silences the splats of a list such as 0:1:17,1:0:2-5 (layer:head:slot): alive (G, S) becomes 0 there, so that they
   take no part. Dies with a sentence where the list or a splat is wrong, or a head would be left without a splat. */
static void silence_splats(const Config *c, real *alive, const char *list) {
    for (const char *p = list;;) {
        int layer, head, first, last, used = 0, more = 0;
        if (sscanf(p, "%9d:%9d:%9d%n", &layer, &head, &first, &used) != 3)
            die_usage("--without '%.80s' is not a list such as 0:1:17,1:0:2-5 (layer:head:splat)", list);
        last = first;
        p += used;
        if (sscanf(p, "-%9d%n", &last, &more) == 1) p += more;
        if (layer < 0 || layer >= c->L || head < 0 || head >= config_heads(c) || !config_is_gsa(c, layer, head))
            die_usage("--without '%.80s': the model has no splats in layer %d, head %d; infer inspect lists its splats",
                      list, layer, head);
        real *slots = alive + (size_t)config_gsa_before(c, layer, head) * (size_t)c->S;
        int left = 0;
        if (last < first) die_usage("--without '%.80s': splats %d-%d: the first is behind the last", list, first, last);
        for (int s = first; s <= last; s++) {
            if (s < 0 || s >= c->S || !(slots[s] > 0))
                die_usage("--without '%.80s': no splat %d lives in layer %d, head %d, or it is named twice", list, s,
                          layer, head);
            slots[s] = 0;
        }
        for (int s = 0; s < c->S; s++) left += slots[s] > 0;
        if (!left)
            die_usage("--without '%.80s' leaves layer %d, head %d without a splat; leave one out of the list", list,
                      layer, head);
        if (*p == 0) return;
        if (*p++ != ',') die_usage("--without '%.80s': entries are separated by commas", list);
    }
}

/* list: what --without was given, or NULL */
static void model_silence(Model *m, const char *list) {
    const Config *c = &m->net.config;
    if (!list) return;
    size_t slots = (size_t)config_gsa_heads(c) * (size_t)c->S;
    m->alive = (real *)xmalloc((slots + 1) * sizeof *m->alive);
    if (slots) memcpy(m->alive, m->net.p.alive, slots * sizeof *m->alive);
    silence_splats(c, m->alive, list);
    m->net.p.alive = m->alive;
    model_unprepare(m);
    model_prepare(m);
}

static void model_close(Model *m) {
    model_unprepare(m);
    free(m->alive);
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
   p in slot p % rows, which is all that a window needs; with rows for every position it never wraps. A gated head
   keeps ln f as well, from which sums over distances follow however far the text has come. An extend head keeps the
   responses of those keys: when one leaves the window it enters the state, the sums of all that is far, which is
   all that a scan head has. */
typedef struct {
    size_t rows;
    size_t state, keys, values, responses, forget; /* offsets: (F, HS + 1); (rows, HS) twice; (rows, S); (rows) */
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
    real *x, *norm, *mean, *rstd, *qkv, *fq, *fk, *lse, *forget, *att, *fc, *rope_waves, *splat_waves;
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
            p->forget = s->size;
            s->size += h->forgetw ? p->rows : 0;
        }
    size_t N = n > PREFILL ? n : PREFILL;
    s->position = (size_t *)xcalloc(n, sizeof *s->position);
    s->memory = (real *)xcalloc(n * s->size, sizeof(real));
    s->logits = (real *)xcalloc(n * z.Vp, sizeof(real));
    s->x =
        (real *)xmalloc(N * (2 * z.C + 2 + 6 * z.A + 2 * z.NH + 4 * z.C + z.R * z.HS + 2 * z.G * z.S) * sizeof(real));
    s->norm = s->x + N * z.C;
    s->mean = s->norm + N * z.C;
    s->rstd = s->mean + N;
    s->qkv = s->rstd + N;
    s->fq = s->qkv + 3 * N * z.A;
    s->fk = s->fq + N * z.A;
    s->att = s->fk + N * z.A;
    s->lse = s->att + N * z.A;
    s->forget = s->lse + N * z.NH;
    s->fc = s->forget + N * z.NH;
    s->rope_waves = s->fc + 4 * N * z.C;
    s->splat_waves = s->rope_waves + N * z.R * z.HS;
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
        if (s->model->heads[i].forgetw) memcpy(a + p->forget, b + p->forget, used * sizeof(real));
    }
    memcpy(s->logits + to * z.Vp, s->logits + from * z.Vp, z.V * sizeof(real));
}

/* The logits (V) of what follows sample i's last token. */
static const real *session_logits(const Session *s, size_t i) {
    return s->logits + i * (size_t)s->model->net.config.Vp;
}

/* Softmax attention of one query over n keys and values (n, HS), in any order; returns the logarithm of the weights'
   sum. Rows are read once and in order. bias (n): what is added to the logits; NULL: nothing. */
static inline real attention_rows(real *o, const real *fq, const real *keys, const real *values, real scale,
                                  const real *bias, size_t n, const size_t HS) {
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
    for (j = 0; j < n && bias; j++) w[j] += bias[j];
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
static real attention_step(real *o, const real *fq, const real *keys, const real *values, real scale, const real *bias,
                           size_t n, size_t HS) {
    return HS == 64 ? attention_rows(o, fq, keys, values, scale, bias, n, 64)
                    : attention_rows(o, fq, keys, values, scale, bias, n, HS);
}

/* A gated head's bias (n) by slot, c_i - c_j: from the newest token, in slot `newest`, back to the oldest of n. */
static real *forget_bias(const real *forget, size_t newest, size_t n) {
    real *bias = (real *)xmalloc(n * sizeof(real));
    double sum = 0;
    for (size_t k = 0, slot = newest; k < n; k++, slot = (slot ? slot : n) - 1) {
        bias[slot] = (real)sum;
        sum += (double)forget[slot];
    }
    return bias;
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

/* One head of one sample at work on T further tokens: its rows of this pass, and the sample's memory. */
typedef struct {
    const Head *head;
    size_t T, position, rows, HS, A, S; /* position: of the first token; rows: of the ring */
    bool near, far, both;               /* near: keys and values by softmax; far: sums of a scan */
    real scale;
    const real *v;                                    /* (T, HS), rows 3 A apart */
    real *out;                                        /* (T, HS), rows A apart */
    real *fq, *fk, *lse;                              /* (T, HS) twice, (T) */
    real *log_forget;                                 /* (T): of a gated head */
    real *state, *keys, *values, *responses, *forget; /* the memory: Place */
    ScanHead features;                                /* far: responses of queries and keys */
} HeadPass;

typedef struct {
    real *keys, *values, *responses, *forget; /* (rows, HS) twice; (rows, S); (rows) */
} Ring;

/* The cosines and sines of head (l, h), softmax, for row `at` of a pass. */
static real *session_waves(const Session *s, size_t l, size_t h, size_t at) {
    const Config *c = &s->model->net.config;
    const size_t HS = (size_t)config_head_size(c), room = s->n > PREFILL ? s->n : PREFILL;
    if (config_head_kind(c, (int)l, (int)h) != HEAD_SPLAT)
        return s->rope_waves + (rope_index(c, l, h) * room + at) * HS;
    return s->splat_waves + ((size_t)config_gsa_before(c, (int)l, (int)h) * room + at) * 2 * (size_t)c->S;
}

static HeadPass head_open(Session *s, size_t l, size_t h, size_t sample, size_t at, size_t T) {
    const Model *m = s->model;
    Sizes z = config_sizes(&m->net.config);
    const size_t i = l * z.NH + h;
    real *memory = s->memory + sample * s->size;
    const Place *place = &s->places[i];
    HeadPass a = {.head = &m->heads[i], .T = T, .position = s->position[sample], .rows = place->rows};
    a.HS = z.HS;
    a.A = z.A;
    a.S = z.S;
    a.near = a.head->kind != HEAD_SCAN;
    a.far = a.head->kind == HEAD_SCAN || a.head->kind == HEAD_EXTEND;
    a.both = a.near && a.far;
    a.scale = a.head->scale;
    a.state = memory + place->state;
    a.keys = memory + place->keys;
    a.values = memory + place->values;
    a.responses = memory + place->responses;
    a.forget = memory + place->forget;
    a.v = s->qkv + at * 3 * z.A + 2 * z.A + h * z.HS;
    a.out = s->att + at * z.A + h * z.HS;
    a.fq = s->fq + at * z.A + h * T * z.HS;
    a.fk = s->fk + at * z.A + h * T * z.HS;
    a.lse = s->lse + at * z.NH + h * T;
    a.log_forget = s->forget + at * z.NH + h * T;
    for (size_t t = 0; t < T && a.head->forgetw; t++) {
        const real *x = s->norm + (at + t) * z.C;
        real u = 0;
#pragma omp simd reduction(+ : u)
        for (size_t c = 0; c < z.C; c++) u += a.head->forgetw[c] * x[c];
        a.log_forget[t] = log_sigmoid(u + *a.head->forgetb);
    }
    const real *q = a.v - 2 * z.A, *k = a.v - z.A;
    if (a.far) a.features = scan_head_open(q, k, 3 * z.A, &a.head->w, T, z.HS);
    if (!a.near) return a;
    const real *waves = session_waves(s, l, h, at);
    head_features(&m->net, a.fq, q, a.head->kind, &a.head->w, true, T, waves);
    head_features(&m->net, a.fk, k, a.head->kind, &a.head->w, false, T, waves);
    return a;
}

/* One token: one pass over what is remembered. */
static void head_step(HeadPass *a) {
    const size_t HS = a->HS, S = a->S, slot = a->rows ? a->position % a->rows : 0;
    const real *query = a->features.q.response, *key = a->features.k.response;
    real *N = (real *)xmalloc(HS * sizeof(real)), rho, D = 0;
    if (a->both) { /* the slot still holds the key that leaves the window now */
        bool old = a->position >= a->head->window;
        D = scan_step(&a->head->step, N, query, old ? a->responses + slot * S : NULL,
                      old ? a->values + slot * HS : NULL, a->state, HS);
        memcpy(a->responses + slot * S, key, S * sizeof(real));
    } else if (a->far) D = scan_step(&a->head->step, N, query, key, a->v, a->state, HS);
    if (a->near) {
        memcpy(a->keys + slot * HS, a->fk, HS * sizeof(real));
        memcpy(a->values + slot * HS, a->v, HS * sizeof(real));
        size_t n = a->position < a->rows ? a->position + 1 : a->rows;
        if (a->head->forgetw) a->forget[slot] = *a->log_forget;
        real *bias = a->head->forgetw ? forget_bias(a->forget, slot, n) : NULL;
        *a->lse = attention_step(a->out, a->fq, a->keys, a->values, a->scale, bias, n, HS);
        free(bias);
    }
    if (a->far) scan_output(a->out, a->both ? a->lse : NULL, &rho, N, D, &a->head->w, a->features.key_scale, HS);
    free(N);
}

/* Slot `slot` of one ring becomes row `row` of another: keys and values, and what else there is. */
static void ring_copy(const HeadPass *a, const Ring *to, size_t slot, const Ring *from, size_t row) {
    memcpy(to->keys + slot * a->HS, from->keys + row * a->HS, a->HS * sizeof(real));
    memcpy(to->values + slot * a->HS, from->values + row * a->HS, a->HS * sizeof(real));
    if (a->both) memcpy(to->responses + slot * a->S, from->responses + row * a->S, a->S * sizeof(real));
    if (a->head->forgetw) to->forget[slot] = from->forget[row];
}

/* What lies beyond the window of a head, or all of it: `past` remembered rows, then the new ones, in `all`. */
static void head_scan(HeadPass *a, const Ring *all, size_t past) {
    const size_t HS = a->HS, T = a->T, late = a->both ? a->head->window : 0;
    Scan c = scan_open(&a->head->w, late, CHUNK);
    real *N = (real *)xcalloc(T * (HS + 1), sizeof(real)), *D = N + T * HS, rho;
    size_t skip = past < late ? late - past : 0, first = past < late ? 0 : past - late;
    const real *query = a->features.q.response, *key = a->features.k.response;
    if (a->both)
        scan_forward(&c, N, D, query, all->responses + first * a->S, all->values + first * HS, HS, skip, false,
                     a->state, NULL, T, HS);
    else scan_forward(&c, N, D, query, key, a->v, 3 * a->A, 0, false, a->state, NULL, T, HS);
    for (size_t t = 0; t < T; t++)
        scan_output(a->out + t * a->A, a->both ? a->lse + t : NULL, &rho, N + t * HS, D[t], &a->head->w,
                    a->features.key_scale, HS);
    free(N);
    scan_close(&c);
}

/* Many tokens: what is remembered of the last `past` tokens, then the new ones, stand in order of position: in place
   unless the ring wraps. */
static void head_block(HeadPass *a) {
    const size_t HS = a->HS, T = a->T, past = a->position < a->rows ? a->position : a->rows, total = past + T;
    const bool wraps = a->near && a->position + T > a->rows;
    const Ring ring = {a->keys, a->values, a->responses, a->forget};
    Ring all = ring;
    real *room = NULL;
    if (wraps) {
        room = (real *)xmalloc(total * (2 * HS + 1 + (a->both ? a->S : 0)) * sizeof(real));
        all.keys = room;
        all.values = all.keys + total * HS;
        all.forget = all.values + total * HS;
        all.responses = all.forget + total;
        for (size_t j = 0; j < past; j++) ring_copy(a, &all, j, &ring, (a->position - past + j) % a->rows);
    }
    if (a->near) {
        memcpy(all.keys + past * HS, a->fk, T * HS * sizeof(real));
        for (size_t t = 0; t < T; t++) memcpy(all.values + (past + t) * HS, a->v + t * 3 * a->A, HS * sizeof(real));
        if (a->both) memcpy(all.responses + past * a->S, a->features.k.response, T * a->S * sizeof(real));
        if (a->head->forgetw) memcpy(all.forget + past, a->log_forget, T * sizeof(real));
        double *c = a->head->forgetw ? forget_sums(all.forget, 1, total) : NULL;
        attention_head_forward(a->out, a->A, a->lse, a->fq, all.keys, all.values, HS, a->scale, c, a->head->window,
                               true, past, total, HS);
        free(c);
    }
    if (a->far) head_scan(a, &all, past);
    for (size_t j = total > a->rows ? total - a->rows : 0; wraps && j < total; j++)
        ring_copy(a, &ring, (a->position - past + j) % a->rows, &all, j);
    free(room);
}

/* Head (l, h) of one sample over T further tokens, which are rows at .. at + T - 1 of this pass: qkv -> att. Of all
   earlier tokens it knows what the sample's memory holds; afterwards that holds these too. */
static void head_forward(Session *s, size_t l, size_t h, size_t sample, size_t at, size_t T) {
    HeadPass a = head_open(s, l, h, sample, at, T);
    T == 1 ? head_step(&a) : head_block(&a);
    if (a.far) scan_head_close(&a.features);
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
    const size_t N = n * T, C = z.C, A = z.A;
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
        if (p.log_rope) continue;
        if (i > 0 && position == s->position[samples[i - 1]])
            memcpy(s->rope_waves + at * z.HS, s->rope_waves + (at - T) * z.HS, T * z.HS * sizeof(real));
        else rope_table(s->rope_waves + at * z.HS, NULL, T, z.HS, position);
    }
#pragma omp parallel for schedule(dynamic) if (N * z.A > 512)
    for (size_t head = 0; head < z.L * z.NH; head++) {
        if (!m->heads[head].theta) continue;
        real *waves = session_waves(s, head / z.NH, head % z.NH, 0);
        const size_t count = m->heads[head].kind == HEAD_SPLAT ? z.S : z.HS / 2;
        for (size_t i = 0; i < n; i++) {
            size_t position = s->position[samples[i]], size = T * 2 * count;
            if (i > 0 && position == s->position[samples[i - 1]])
                memcpy(waves + i * size, waves + (i - 1) * size, size * sizeof(real));
            else wave_table(waves + i * size, m->heads[head].theta, count, T, position);
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

#define DOCUMENT_END "\n<|endoftext|>\n" /* between texts that are written */

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
    if (n == 0) return; /* text may be NULL still */
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

/* ---------------------------------------------------------------------- tokens of files */

/* The tokens of a text, each document behind its <|endoftext|> as data/prepare would write them, or those of a shard:
   read once, in constant memory, through a pipe too. */
typedef struct {
    const char *name; /* for sentences */
    const Tokenizer *tokenizer;
    Documents *text; /* NULL: a shard */
    FILE *shard;
    int64_t count, given; /* tokens of the shard; of either, handed out */
    double bytes;         /* of the text that those but the first stand for, <|endoftext|> left out */
    double length;        /* bytes of the file; 0: not known */
    int *ids;             /* encoded; `taken` of `ready` are handed out */
    size_t taken, ready, room;
} TokenSource;

static TokenSource *source_open(const char *path, const Tokenizer *t) {
    TokenSource *s = (TokenSource *)xcalloc(1, sizeof *s);
    char start[SHARD_HEADER];
    struct stat st;
    FILE *f = open_input(path);
    int64_t bytes = fstat(fileno(f), &st) == 0 && S_ISREG(st.st_mode) && f != stdin ? (int64_t)st.st_size : -1;
    size_t got = fread(start, 1, sizeof start, f);
    int32_t magic = 0;
    s->name = input_name(path);
    s->tokenizer = t;
    s->length = bytes > 0 ? (double)bytes : 0;
    if (got >= 4) memcpy(&magic, start, 4);
    if (magic == SHARD_MAGIC) {
        s->shard = f;
        s->count = shard_length(start, got, bytes, s->name);
    } else s->text = documents_behind(f, s->name, start, got);
    return s;
}

static void source_close(TokenSource *s) {
    if (s->text) documents_close(s->text);
    else close_input(s->shard);
    free(s->ids);
    free(s);
}

/* How much of the file has been read; below 1, as the reader is ahead. */
static double source_share(const TokenSource *s) {
    if (!s->text) return 0.999 * (double)s->given / (double)(s->count ? s->count : 1);
    return s->length > 0 ? 0.999 * s->text->read / s->length : 0;
}

/* The next tokens of a shard, at most `room`; dies where it is not as long as it says. */
static size_t source_shard(TokenSource *s, int *out, size_t room) {
    uint16_t ids[4096];
    size_t left = (size_t)(s->count - s->given), n = room < left ? room : left;
    if (n > sizeof ids / sizeof *ids) n = sizeof ids / sizeof *ids;
    xfread(ids, sizeof *ids, n, s->shard, s->name);
    for (size_t i = 0; i < n; i++) {
        out[i] = ids[i];
        if (out[i] >= tokenizer_vocab_size(s->tokenizer))
            die("%s has token %d at position %lld, but the vocabulary has only %d; it was made with another tokenizer",
                s->name, out[i], (long long)s->given + (long long)i, tokenizer_vocab_size(s->tokenizer));
    }
    if (n == left && getc(s->shard) != EOF)
        die("%s is damaged: its header says %lld tokens, but more follow; make it again with data/prepare", s->name,
            (long long)s->count);
    return n;
}

/* The same of a text. */
static size_t source_text(TokenSource *s, int *out, size_t room) {
    if (s->taken == s->ready) {
        if (!documents_next(s->text)) return 0;
        s->taken = s->ready = 0;
        if (!s->room) s->ids = (int *)xmalloc((s->room = 1024) * sizeof *s->ids);
        if (s->text->begins) s->ids[s->ready++] = tokenizer_eot(s->tokenizer);
        tokenizer_encode(s->tokenizer, s->text->text, s->text->bytes, false, &s->ids, &s->ready, &s->room);
    }
    size_t left = s->ready - s->taken, n = room < left ? room : left;
    memcpy(out, s->ids + s->taken, n * sizeof *out);
    s->taken += n;
    return n;
}

/* The next `room` tokens; fewer at the end only. */
static size_t source_read(TokenSource *s, int *out, size_t room) {
    size_t count = 0, length;
    for (size_t n; count < room; count += n) {
        n = s->text ? source_text(s, out + count, room - count) : source_shard(s, out + count, room - count);
        if (n == 0) break;
        for (size_t i = 0; i < n; i++, s->given++) {
            if (s->given == 0 || out[count + i] == tokenizer_eot(s->tokenizer)) continue;
            tokenizer_piece(s->tokenizer, out[count + i], &length);
            s->bytes += (double)length;
        }
    }
    return count;
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
    size_t predictions, windows, stretches; /* stretches of T predictions; the last may have fewer */
    double bytes, sum, error;               /* of the text; of all losses; the standard error of their mean */
    Mean position[POSITIONS];
} Losses;

typedef struct {
    const Model *model;
    size_t T, stride, window; /* window: of sample 0 */
    int *tokens;              /* of the windows at hand, from the first one's start on */
    double *losses;           /* of the same: of token i + 1 */
    real *rows;               /* (2, T): losses and lse */
    Losses *out;
    /* the stretch at hand; all whole ones, as differences from the first */
    double stretch, first, difference, square;
    size_t in_stretch;
} Measuring;

/* Of a window but the first only the last `stride` predictions count; the others were made before, from more. */
static size_t known_before(const Measuring *c, size_t window) { return window ? c->T - c->stride : 0; }

/* A LogitsSink. */
static void measure_rows(void *context, size_t sample, size_t position, size_t rows, const real *logits) {
    Measuring *c = (Measuring *)context;
    Sizes z = config_sizes(&c->model->net.config);
    size_t known = known_before(c, c->window + sample), skip = known > position ? known - position : 0;
    if (skip >= rows) return;
    size_t first = sample * c->stride + position + skip; /* prediction i is that of token i + 1 */
    logits += skip * z.Vp;
    position += skip;
    rows -= skip;
    classifier_forward(c->rows, c->rows + c->T, logits, c->tokens + first + 1, rows, z.V, z.Vp);
    for (size_t i = 0; i < rows; i++) {
        int row = 0;
        for (size_t seen = position + i + 1; seen > 1; seen /= 2) row++;
        c->losses[first + i] = (double)c->rows[i];
        mean_add(&c->out->position[row], c->losses[first + i]);
    }
}

/* The next loss, in the order of the text. */
static void measure_add(Measuring *c, double loss) {
    Losses *out = c->out;
    out->predictions++;
    out->sum += loss;
    c->stretch += loss;
    if (++c->in_stretch < c->T) return;
    if (!out->stretches++) c->first = c->stretch;
    c->difference += c->stretch - c->first;
    c->square += (c->stretch - c->first) * (c->stretch - c->first);
    c->stretch = 0;
    c->in_stretch = 0;
}

/* The standard error of the mean, from how far each stretch is from what its length makes one expect. */
static void measure_end(Measuring *c) {
    Losses *out = c->out;
    double mean = out->sum / (double)out->predictions, n = (double)out->stretches,
           offset = mean * (double)c->T - c->first,
           square = n > 0 ? c->square - 2 * offset * c->difference + n * offset * offset : 0;
    if (c->in_stretch) {
        double beyond = c->stretch - mean * (double)c->in_stretch;
        square += beyond * beyond;
        n = (double)++out->stretches;
    }
    if (n > 1 && square > 0) out->error = sqrt(square * n / (n - 1)) / (double)out->predictions;
}

/* The text in windows of T tokens that begin every `stride` tokens, stride <= T, `batch` windows at a time. Of fewer
   than two tokens there are no predictions. */
static Losses measure_losses(const Model *m, TokenSource *source, size_t stride, size_t batch) {
    size_t T = (size_t)m->net.config.T, room = (batch - 1) * stride + T + 1, held = 0, ahead;
    Losses out;
    memset(&out, 0, sizeof out);
    Measuring c = {.model = m, .T = T, .stride = stride, .out = &out};
    c.tokens = (int *)xmalloc(room * sizeof *c.tokens);
    c.rows = (real *)xmalloc(2 * T * sizeof *c.rows);
    held = source_read(source, c.tokens, room);
    /* no more samples than there are windows */
    while (batch > 1 && (batch - 1) * stride + T + 1 >= held + stride) batch--;
    Session *s = session_create(m, batch, T);
    c.losses = (double *)xmalloc(((batch - 1) * stride + T) * sizeof *c.losses);
    int *x = (int *)xmalloc(batch * T * sizeof *x);
    while ((ahead = held ? held - 1 : 0) > known_before(&c, c.window)) {
        size_t B = 0, length = ahead < T ? ahead : T; /* only the last can be shorter */
        for (; B < batch && B * stride + length <= ahead && (B == 0 || length == T); B++) {
            memcpy(x + B * length, c.tokens + B * stride, length * sizeof *x);
            session_reset(s, B);
        }
        session_run(s, NULL, B, x, length, measure_rows, &c);
        for (size_t i = known_before(&c, c.window); i < (B - 1) * stride + length; i++) measure_add(&c, c.losses[i]);
        c.window += B;
        size_t done = B * stride < held ? B * stride : held;
        memmove(c.tokens, c.tokens + done, (held -= done) * sizeof *c.tokens);
        held += source_read(source, c.tokens + held, room - held);
        progress("perplexity", source_share(source), 1);
    }
    progress("perplexity", 1, 1);
    out.windows = c.window;
    out.bytes = source->bytes;
    if (out.predictions) measure_end(&c);
    session_free(s);
    free(x);
    free(c.tokens);
    free(c.losses);
    free(c.rows);
    return out;
}

/* What a model makes of tasks: means over them. */
typedef struct {
    /* the likeliest ending is the right one; likeliest per byte; one over the number of endings */
    Mean choice, normalised, chance;
    Mean word, likelihood; /* the last word's tokens are all the likeliest; its log-likelihood in nats */
    size_t left_out;       /* tasks that are too long for the model */
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
   Where both together exceed the model's length, the context loses its beginning. False, with a sentence, where an
   ending alone does. path: of the task, for sentences. */
static bool score_task(const Model *m, Session *s, const Task *t, const char *path, double *likelihood, bool *greedy) {
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
    if (longest > T) {
        warn("%s, line %d: an ending has %zu tokens; the model was trained for %zu: the task is left out", path,
             t->line, longest, T);
        for (size_t e = 0; e < k; e++) free(ids[e]);
        free(context);
        return false;
    }
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
    return true;
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
        progress("score", (double)(i + 1), (double)count);
        if (!score_task(m, s, t, path, likelihood, greedy)) {
            out.left_out++;
            continue;
        }
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
    }
    session_free(s);
    return out;
}

/* ---------------------------------------------------------------------- commands */

/* What the flags of all commands set; the table of commands below says which command has which, and the defaults. */
typedef struct {
    int64_t batch, context, samples, seed, show, stride, threads, tokens, top_k;
    double min_p, repetition, temperature, top_p;
    const char *classes, *examples, *file, *heads, *out, *pictures, *text, *tokenizer, *twin, *type, *without;
    bool endless, silence;
    Texts stops;
} Options;

/* The text that a command is given, and its tokens: an argument (or NULL) as it stands, behind <|endoftext|>, as every
   document is in training; or a file's documents, as data/prepare would write them. special: [MASK] becomes its token.
   free() both. */
static int *given_tokens(const char *argument, const char *file, const Tokenizer *t, bool special, size_t *count,
                         char **text, size_t *bytes) {
    size_t room = 64, text_room = 0;
    int *ids = (int *)xmalloc(room * sizeof *ids);
    ids[0] = tokenizer_eot(t);
    *count = 1;
    *text = NULL;
    *bytes = 0;
    if (!file) {
        append(text, bytes, &text_room, argument ? argument : "", argument ? strlen(argument) : 0);
        tokenizer_encode(t, *text, *bytes, special, &ids, count, &room);
        return ids;
    }
    Documents *d = documents_open(file);
    while (documents_next(d)) {
        if (d->begins && d->documents > 1) {
            append(text, bytes, &text_room, DOCUMENT_END, strlen(DOCUMENT_END));
            if (*count == room) ids = (int *)xrealloc(ids, (room *= 2) * sizeof *ids);
            ids[(*count)++] = tokenizer_eot(t);
        }
        append(text, bytes, &text_room, d->text, d->bytes);
        tokenizer_encode(t, d->text, d->bytes, special, &ids, count, &room);
    }
    documents_close(d);
    return ids;
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

/* Texts that are written side by side, all after one prompt. */
typedef struct {
    const Options *o;
    const char *path;
    Model *model;
    Session *session;
    Writer *writers; /* (N) */
    size_t N, most;  /* most: tokens of a text, prompt included */
    char *prompt;
    size_t prompt_bytes, count; /* count: tokens of context */
    int *context;               /* (count): <|endoftext|>, then the prompt's tokens */
    size_t *active, actives;    /* (N): which are still written; how many */
    int *next;                  /* (N): the token that each of those goes on with */
    size_t turn;                /* the text that is on its way out */
    size_t stopped[CONTEXT_FULL + 1];
} Generation;

/* The prompt as tokens. */
static void encode_prompt(Generation *g, const char *argument) {
    const Options *o = g->o;
    const Config *c = &g->model->net.config;
    size_t T = (size_t)c->T;
    g->most = o->context ? (size_t)o->context : model_endless(g->model) ? SIZE_MAX : T;
    if (c->position != POSITION_ROPE && g->most > T)
        die("--context %lld: %s has learned positions for %zu tokens and cannot go beyond them", (long long)o->context,
            g->path, T);
    g->context = given_tokens(argument, o->file, g->model->tokenizer, false, &g->count, &g->prompt, &g->prompt_bytes);
    if (g->count > g->most)
        die("the prompt has %zu tokens, with the start one more; %s %zu%s", g->count - 1,
            o->context ? "--context allows" : "the model was trained for", g->most,
            o->context || c->position != POSITION_ROPE ? "" : ", and --context N goes beyond");
}

/* Reads the prompt once; every text goes on from it with a sampler of its own. Returns the seconds that it took. */
static double start_writers(Generation *g) {
    const Options *o = g->o;
    bool short_enough = o->tokens > 0 && g->most - g->count > (size_t)o->tokens;
    g->N = g->actives = (size_t)o->samples;
    g->session = session_create(g->model, g->N, short_enough ? g->count + (size_t)o->tokens : g->most);
    g->writers = (Writer *)xcalloc(g->N, sizeof *g->writers);
    g->active = (size_t *)xmalloc(g->N * sizeof *g->active);
    g->next = (int *)xmalloc(g->N * sizeof *g->next);
    double start = now_seconds();
    session_run(g->session, NULL, 1, g->context, g->count, NULL, NULL);
    double seconds = now_seconds() - start;
    for (size_t i = 0; i < g->N; i++) {
        Sampler sampler = {o->repetition, o->temperature, (int)o->top_k, o->top_p, o->min_p, (uint64_t)o->seed + i};
        session_copy(g->session, i, 0);
        g->writers[i].sampler = sampler;
        g->active[i] = i;
        for (size_t j = 1; j < g->count; j++) remember(&g->writers[i], g->context[j]);
    }
    return seconds;
}

static void choose_tokens(Generation *g) {
    const int V = g->model->net.config.V;
#pragma omp parallel for schedule(dynamic) if (g->actives > 1)
    for (size_t k = 0; k < g->actives; k++) {
        Writer *w = &g->writers[g->active[k]];
        w->token = sample_token(&w->sampler, session_logits(g->session, g->active[k]), V, w->recent,
                                w->recents < RECENT ? w->recents : RECENT);
    }
}

/* Text i takes its token: GOING_ON, or why it stops here. */
static int take_token(Generation *g, size_t i) {
    Writer *w = &g->writers[i];
    const Tokenizer *t = g->model->tokenizer;
    size_t bytes;
    if (w->token < 0) die("%s gives logits that are not finite: it is not a usable model", g->path);
    bool ends = w->token == tokenizer_eot(t);
    if (ends && !g->o->endless) return END_OF_TEXT;
    const char *piece = ends ? DOCUMENT_END : tokenizer_piece(t, w->token, &bytes);
    if (ends) bytes = strlen(piece);
    else remember(w, w->token);
    if (stream_add(&w->stream, piece, bytes, &g->o->stops)) return STOP_STRING;
    if (++w->made == g->o->tokens) return TOKENS_MADE;
    return g->session->position[i] == g->most ? CONTEXT_FULL : GOING_ON;
}

/* All texts take their tokens; those that go on stay active. */
static void take_tokens(Generation *g) {
    size_t left = 0;
    for (size_t k = 0; k < g->actives; k++) {
        size_t i = g->active[k];
        Writer *w = &g->writers[i];
        w->state = take_token(g, i);
        g->stopped[w->state]++;
        if (w->state == GOING_ON) {
            g->next[left] = w->token;
            g->active[left++] = i;
        } else if (w->state != STOP_STRING) stream_release(&w->stream, w->stream.held_bytes, true);
    }
    g->actives = left;
}

/* Texts go out one after the other, each as soon as it can. */
static void write_ready(Generation *g) {
    for (; g->turn < g->N; g->turn++) {
        Stream *o = &g->writers[g->turn].stream;
        if (o->ready_bytes) fwrite(o->ready, 1, o->ready_bytes, stdout);
        o->ready_bytes = 0;
        if (g->writers[g->turn].state == GOING_ON) break;
        printf("%s", g->N > 1 ? DOCUMENT_END : "\n");
        if (g->turn + 1 < g->N) fwrite(g->prompt, 1, g->prompt_bytes, stdout);
    }
    flush_output();
}

/* The last line, on standard error: how fast, how much, and why it stopped. fed: tokens that were read back. */
static void print_generation(const Generation *g, double prefill, double took, size_t fed) {
    static const char *const reasons[] = {NULL, "the end of the text", "a --stop text",
                                          "the number of tokens asked for", "the end of the context"};
    const Config *c = &g->model->net.config;
    int64_t made = 0;
    for (size_t i = 0; i < g->N; i++) made += g->writers[i].made;
    fprintf(stderr, "prompt %zu tokens in %.3f s, %.0f tokens/s; %lld tokens generated", g->count, prefill,
            (double)g->count / prefill, (long long)made);
    if (fed > 0) fprintf(stderr, " in %.3f s, %.0f tokens/s", took, (double)fed / took);
    fprintf(stderr, "; stopped at ");
    for (int i = 1, said = 0; i <= CONTEXT_FULL; i++)
        if (g->stopped[i]) {
            fprintf(stderr, "%s%s", said++ ? ", " : "", reasons[i]);
            if (g->N > 1) fprintf(stderr, " (%zu)", g->stopped[i]);
        }
    if (g->stopped[CONTEXT_FULL] && !g->o->context)
        fprintf(stderr, " of %d tokens that it was trained for%s", c->T,
                c->position == POSITION_ROPE ? "; --context N goes beyond" : ", and learned positions go no further");
    fprintf(stderr, "\n");
}

static void generation_free(Generation *g) {
    for (size_t i = 0; i < g->N; i++) {
        free(g->writers[i].stream.held);
        free(g->writers[i].stream.ready);
    }
    session_free(g->session);
    model_close(g->model);
    free(g->prompt);
    free(g->context);
    free(g->writers);
    free(g->active);
    free(g->next);
}

static int generate(const Options *o, char **argv) {
    if (argv[2] && o->file) die_usage("give the prompt as an argument or by --file, not both");
    for (int i = 0; i < o->stops.count; i++)
        if (!o->stops.text[i][0]) die_usage("--stop needs a text of at least one letter");
    Generation g = {.o = o, .path = argv[1], .model = model_open(argv[1], o->tokenizer, OBJECTIVE_LM)};
    model_silence(g.model, o->without);
    encode_prompt(&g, argv[2]);
    double prefill = start_writers(&g), start = now_seconds();
    size_t fed = 0;
    if (g.prompt_bytes) fwrite(g.prompt, 1, g.prompt_bytes, stdout);
    while (g.actives > 0) {
        choose_tokens(&g);
        take_tokens(&g);
        write_ready(&g);
        fed += g.actives;
        if (g.actives > 0) session_run(g.session, g.active, g.actives, g.next, 1, NULL, NULL);
    }
    print_generation(&g, prefill, now_seconds() - start, fed);
    generation_free(&g);
    return 0;
}

static int perplexity(const Options *o, char **argv) {
    Model *m = model_open(argv[1], o->tokenizer, OBJECTIVE_LM);
    model_silence(m, o->without);
    size_t T = (size_t)m->net.config.T;
    if ((size_t)o->stride > T)
        die_usage("--stride %lld exceeds the windows of %s, %zu tokens", (long long)o->stride, argv[1], T);
    TokenSource *source = source_open(argv[2], m->tokenizer);
    double start = now_seconds();
    Losses l = measure_losses(m, source, o->stride ? (size_t)o->stride : T, (size_t)o->batch);
    if (!l.predictions) die("%s holds no text to predict", source->name);
    double mean = l.sum / (double)l.predictions;
    if (!isfinite(mean)) die("%s gives a loss that is not finite on %s: it is not a usable model", argv[1], argv[2]);
    printf("tokens %zu, bytes %.0f, windows %zu of %zu", l.predictions, l.bytes, l.windows, T);
    if (o->stride) printf(" every %lld", (long long)o->stride);
    printf("\nloss %.6f nats per token\n", mean);
    if (l.stretches > 1) printf("perplexity %.4f +- %.4f\n", exp(mean), exp(mean) * l.error);
    else printf("perplexity %.4f (one window: no standard error)\n", exp(mean));
    if (l.bytes > 0) printf("bits per byte %.5f\n", l.sum / log(2) / l.bytes); /* not of <|endoftext|> alone */
    printf("\n%19s %12s %10s\n", "predicted from", "tokens", "loss");
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
    source_close(source);
    model_close(m);
    return 0;
}

static void print_mean(const char *what, const Mean *m) {
    printf(", %s %.4f", what, mean_value(m));
    if (m->count > 1) printf(" +- %.4f", mean_error(m));
}

static int score(const Options *o, char **argv) {
    Model *m = model_open(argv[1], o->tokenizer, OBJECTIVE_LM);
    model_silence(m, o->without);
    size_t count;
    Task *tasks = tasks_read(argv[2], &count);
    double start = now_seconds();
    Scores s = score_tasks(m, tasks, count, input_name(argv[2]));
    if (s.left_out == count) die("no task of %s is short enough for %s", input_name(argv[2]), argv[1]);
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
    if (s.left_out) printf("left out: %zu of %zu tasks, with endings too long for the model\n", s.left_out, count);
    fprintf(stderr, "%.1f tasks/s\n", (double)count / (now_seconds() - start));
    tasks_free(tasks, count);
    model_close(m);
    return 0;
}

static int fill(const Options *o, char **argv) {
    Loaded l = load(argv[1], o->tokenizer, 1, OBJECTIVE_MLM);
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
            for (int64_t k = 0; k < (o->show > 1 ? o->show : 1) && k < c->V; k++) {
                int token = 0;
                for (int v = 1; v < c->V; v++)
                    if (logits[v] > logits[token]) token = v;
                if (k == 0) best = token;
                const char *piece = tokenizer_piece(l.tokenizer, token, &bytes);
                if (k < o->show)
                    fprintf(stderr, "%s%.*s %.1f %%", k ? ", " : "mask: ", (int)bytes, piece,
                            100 * (double)(exp_real(logits[token] - most) / sum));
                logits[token] = -INFINITY;
            }
            if (o->show) fputc('\n', stderr);
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

/* A model file with the matrices in a smaller type; all that is small stays fp32. */
static int quantize(const Options *o, char **argv) {
    if (!o->type) die_usage("quantize needs --type bf16 or --type int8");
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
        m.type = strcmp(o->type, "bf16") == 0 ? TYPE_BF16 : TYPE_I8;
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

#include "gsa/look/study.h"

/* ---------------------------------------------------------------------- the table of commands */

static Options options; /* where the parser puts what the flags say; each command is handed it */

#define HEADING(text) \
    { FLAG_ROOM, NULL, NULL, 0, 0, NULL, text, false }
#define TOKENIZER_HELP "the tokenizer of a model file that holds none, as those of llm.c"
#define TOKENIZER_FLAG \
    { FLAG_TEXT, "tokenizer", &options.tokenizer, 0, 0, "FILE", TOKENIZER_HELP, false }
#define WITHOUT_HELP "silence these splats, layer:head:splat such as 0:1:17,1:0:2-5"
#define WITHOUT_FLAG \
    { FLAG_TEXT, "without", &options.without, 0, 0, "LIST", WITHOUT_HELP, false }
#define THREADS_HELP "CPU threads; 0: what OpenMP chooses"
#define THREADS_FLAG \
    { FLAG_INT, "threads", &options.threads, 0, 4096, NULL, THREADS_HELP, false }

/* A new command is a row here and its function; a value that no other command has gets its place in Options. */
typedef struct {
    const char *name, *arguments, *help; /* its line of infer --help */
    const char *usage;                   /* infer NAME --help: how to call it, and what it does in full */
    int least, most;                     /* arguments; fewer or more are refused by these sentences */
    const char *too_few, *too_many;
    Options defaults;
    Flag flags[20];                            /* ended by zeros */
    int (*run)(const Options *o, char **argv); /* arguments from argv[1] on, NULL behind the last */
} Command;

static const Command commands[] = {
    {.name = "generate",
     .arguments = "MODEL [PROMPT]",
     .help = "continue a prompt",
     .usage = "MODEL [PROMPT] [flags]\n"
              "Continues PROMPT; without one, starts a new text. Several samples are divided by lines <|endoftext|>.\n",
     .least = 1,
     .most = 2,
     .too_few = "generate needs a model file, such as runs/default/model_00000800.bin",
     .too_many = "generate takes a model and one prompt; put the prompt in quotes",
     .defaults = {.samples = 1, .repetition = 1, .temperature = 0.8, .top_p = 0.95, .seed = 1},
     .flags = {HEADING("what to write"),
               {FLAG_TEXT, "file", &options.file, 0, 0, "FILE", "read the prompt from FILE; - is standard input",
                false},
               {FLAG_INT, "samples", &options.samples, 1, 65536, NULL,
                "texts written side by side; sample i is what --seed SEED + i alone would write", false},
               {FLAG_INT, "tokens", &options.tokens, 0, 9e15, NULL,
                "tokens to generate, at most; 0: until one of the ends below", false},
               {FLAG_TEXTS, "stop", &options.stops, 0, 0, "TEXT",
                "end a sample before TEXT; may be given several times", false},
               {FLAG_SWITCH, "endless", &options.endless, 0, 0, NULL, "go on behind the end of a text with another",
                false},
               {FLAG_INT, "context", &options.context, 0, 9e15, NULL,
                "end after N tokens, prompt included; 0: what the model was trained for, without end where it needs "
                "constant memory",
                false},
               HEADING("choice of the next token, in the order in which it is narrowed down"),
               {FLAG_REAL, "repetition-penalty", &options.repetition, 0.01, 100, NULL,
                "above 1: the last 256 tokens become less likely", false},
               {FLAG_REAL, "temperature", &options.temperature, 0, 100, NULL,
                "below 1 bolder in favour of the likely; 0: always the most likely token", false},
               {FLAG_INT, "top-k", &options.top_k, 0, 1 << 20, NULL, "choose among the K most likely; 0: all", false},
               {FLAG_REAL, "top-p", &options.top_p, 1e-9, 1, NULL,
                "choose among the most likely that together have probability P", false},
               {FLAG_REAL, "min-p", &options.min_p, 0, 1, NULL,
                "choose among those at least P times as likely as the most likely", false},
               {FLAG_INT, "seed", &options.seed, 0, 9e15, NULL,
                "same seed, same text, whatever the threads and samples", false},
               HEADING("machine and files"),
               WITHOUT_FLAG,
               TOKENIZER_FLAG,
               THREADS_FLAG},
     .run = generate},

    {.name = "perplexity",
     .arguments = "MODEL FILE",
     .help = "loss, perplexity and bits per byte of a text or shard",
     .usage =
         "MODEL FILE [flags]\n"
         "FILE is a text, documents separated by lines <|endoftext|>, or a shard of data/prepare; - is standard input. "
         "It is cut into windows of the\n"
         "model's length, each predicted from nothing but itself; the standard error is over stretches of that length. "
         "The table is\n"
         "of tokens by how many tokens they were predicted from; its errors take them as independent.\n",
     .least = 2,
     .most = 2,
     .too_few = "perplexity needs a model and a file: infer perplexity MODEL FILE",
     .defaults = {.batch = 8},
     .flags = {HEADING("flags"),
               {FLAG_INT, "stride", &options.stride, 0, 1 << 24, NULL,
                "windows begin every N tokens and all but the first count their last N; 0: windows side by side",
                false},
               {FLAG_INT, "batch", &options.batch, 1, 65536, NULL, "windows per pass", false},
               WITHOUT_FLAG,
               TOKENIZER_FLAG,
               THREADS_FLAG},
     .run = perplexity},

    {.name = "score",
     .arguments = "MODEL TASKS.jsonl",
     .help = "accuracy on tasks: the right one of several endings, or a text's last word",
     .usage =
         "MODEL TASKS.jsonl [flags]\n"
         "One JSON object a line. {\"ctx\": \"...\", \"endings\": [\"...\", ...], \"label\": 0}, as HellaSwag: the "
         "share of tasks where the right ending\n"
         "is the likeliest, and where it is the likeliest per byte (normalised). {\"text\": \"...\"}, as LAMBADA: the "
         "share of texts whose last\n"
         "word greedy decoding would write, and its mean log-likelihood. data/make_stories --tasks makes such files.\n",
     .least = 2,
     .most = 2,
     .too_few = "score needs a model and a file of tasks: infer score MODEL TASKS.jsonl",
     .flags = {HEADING("flags"), WITHOUT_FLAG, TOKENIZER_FLAG, THREADS_FLAG},
     .run = score},

    {.name = "quantize",
     .arguments = "MODEL OUT",
     .help = "the model with bf16 or int8 weights: smaller files, faster generation",
     .usage = "MODEL OUT --type bf16|int8\n"
              "Writes MODEL to the file OUT with its matrices rounded. Every command takes such a file.\n",
     .least = 2,
     .most = 2,
     .too_few = "quantize needs a model and the name of the file to write: infer quantize MODEL OUT --type int8",
     .flags = {HEADING("flags"),
               {FLAG_CHOICE, "type", &options.type, 0, 0, "bf16|int8",
                "bf16: half the bytes; int8, with a scale for each row of a matrix: a quarter", false}},
     .run = quantize},

    {.name = "fill",
     .arguments = "MODEL TEXT",
     .help = "put tokens in place of each [MASK] of TEXT (models of --objective mlm)",
     .usage = "MODEL \"The [MASK] sat\" [flags]\n"
              "Puts the likeliest token in place of each [MASK], all at once.\n",
     .least = 2,
     .most = 2,
     .too_few = "fill needs a model and a text with [MASK] in it, in quotes",
     .defaults = {.show = 5},
     .flags = {HEADING("flags"),
               {FLAG_INT, "show", &options.show, 0, 1000, NULL,
                "likeliest tokens listed for each mask, on standard error", false},
               TOKENIZER_FLAG,
               THREADS_FLAG},
     .run = fill},

    {.name = "report",
     .arguments = "MODEL TEXT",
     .help = "a page that shows what the model does with a text: attention, splats, predictions",
     .usage =
         "MODEL TEXT [-o report.html] [flags]\n"
         "Writes a page that shows what the model does with TEXT: attention, splats and predictions, token by token. "
         "It needs no network\n"
         "and nothing beside it. A main.log next to the model adds the curves of its training.\n",
     .least = 1,
     .most = 2,
     .too_few = "report needs a model file and a text: infer report MODEL TEXT",
     .too_many = "report takes a model and one text; put the text in quotes",
     .defaults = {.out = "report.html", .tokens = 96},
     .flags = {HEADING("flags"),
               {FLAG_TEXT, "out", &options.out, 0, 0, "FILE", "the page; -o for short", false},
               {FLAG_TEXT, "file", &options.file, 0, 0, "FILE", "read the text from FILE; - is standard input", false},
               {FLAG_INT, "tokens", &options.tokens, 2, 512, NULL, "how much of the text is shown, at most", false},
               {FLAG_TEXT, "examples", &options.examples, 0, 0, "FILE",
                "name splats, and show what they own, by the first 16,384 tokens of FILE; else by TEXT itself", false},
               {FLAG_TEXT, "pictures", &options.pictures, 0, 0, "DIR",
                "write PNG pictures of the heads into DIR as well", false},
               {FLAG_TEXT, "heads", &options.heads, 0, 0, "MAP",
                "of these heads only, layer:head such as 0:3,2:1-4; with --pictures", false},
               TOKENIZER_FLAG,
               THREADS_FLAG},
     .run = report},

    {.name = "measure",
     .arguments = "MODEL FILE",
     .help = "what each head does, how far the model looks back, which heads it needs",
     .usage =
         "MODEL FILE [flags]\n"
         "What the heads do on a text or shard, in windows of the model's length: the loss by length of history, the "
         "loss without the GSA\n"
         "heads and without the standard ones, and of each head entropy (nats), mean distance and the distance within "
         "which 90 % of its weight\n"
         "lies (tokens). The effective context is the shortest history with a loss within 1 % of the longest's.\n"
         "With --classes also what a token's strongest splat says about its class, on the first 16,384 tokens: the "
         "mutual information, beside\n"
         "k-means of the same keys and of those of the layer's standard heads (or of a twin's: a standard model "
         "trained on the same tokens),\n"
         "an untrained model and chance. Classes come from the lists of the made-up stories' grammar, or for English "
         "text from closed lists of\n"
         "words and from endings.\n",
     .least = 2,
     .most = 2,
     .too_few = "measure needs a model and a file: infer measure MODEL FILE",
     .defaults = {.tokens = 65536, .batch = 8},
     .flags = {HEADING("flags"),
               {FLAG_INT, "tokens", &options.tokens, 1, 1e12, NULL,
                "tokens of the file that are used, from its start, in whole windows", false},
               {FLAG_INT, "batch", &options.batch, 1, 65536, NULL, "windows per pass", false},
               {FLAG_CHOICE, "classes", &options.classes, 0, 0, CLASSES_CHOICES,
                "what splats say about classes of tokens: the grammar's of the made-up stories, or words and endings",
                false},
               {FLAG_SWITCH, "silence", &options.silence, 0, 0, NULL,
                "silence every splat in its turn: which class of tokens suffers? A pass over the tokens for each",
                false},
               {FLAG_TEXT, "twin", &options.twin, 0, 0, "MODEL",
                "with --classes: take this model's standard heads, where a layer has none or few of its own", false},
               TOKENIZER_FLAG,
               THREADS_FLAG},
     .run = measure},

    {.name = "recall",
     .arguments = "MODEL FILE",
     .help = "what it remembers by distance: questions of data/make_recall",
     .usage =
         "MODEL FILE [flags]\n"
         "What a model remembers, by distance. FILE holds questions of data/make_recall --ask: an answer counts as "
         "right where each of its tokens\n"
         "is the model's likeliest; distances are in tokens, from where it was told, and grouped by half octaves.\n",
     .least = 2,
     .most = 2,
     .too_few = "recall needs a model and a file of questions: infer recall MODEL FILE",
     .defaults = {.batch = 16},
     .flags = {HEADING("flags"),
               {FLAG_INT, "batch", &options.batch, 1, 65536, NULL, "questions per pass", false},
               TOKENIZER_FLAG,
               THREADS_FLAG},
     .run = recall},

    {.name = "inspect",
     .arguments = "MODEL",
     .help = "the splats of each head: activation, amplitude, width, envelope, age, tokens",
     .usage = "MODEL [flags]\n"
              "The splats of each head. act: activation, the mean share of queries and keys over the last windows of "
              "training, in percent; amp: amplitude\n"
              "against its reference; width: of a splat on the unit sphere; period, half: of its envelope, in tokens; "
              "phase: of its cosine, in\n"
              "radians; age: steps it has lived. Then the tokens whose keys it owns, nearest first: keys of each entry "
              "of the vocabulary at the\n"
              "beginning of a text.\n"
              "With --text, what each splat does in a text: a name from its most typical tokens, its share of use, "
              "what it adds by distance, the\n"
              "splats that it works with, and the tokens in context whose keys and queries it has most of.\n",
     .least = 1,
     .most = 1,
     .too_few = "inspect needs a model file and nothing else: infer inspect MODEL",
     .defaults = {.tokens = 16384, .show = 6},
     .flags = {HEADING("flags"),
               {FLAG_TEXT, "text", &options.text, 0, 0, "FILE", "show what the splats own in this text or shard",
                false},
               {FLAG_TEXT, "heads", &options.heads, 0, 0, "MAP", "these heads only, layer:head such as 0:3,2:1-4",
                false},
               {FLAG_INT, "tokens", &options.tokens, 1, 1 << 20,
                NULL, "entries of the vocabulary, or tokens of the text, that are looked at, from the first", false},
               {FLAG_INT, "show", &options.show, 0, 100,
                NULL, "tokens listed for each splat; with --text, snippets of its keys and of its queries", false},
               TOKENIZER_FLAG,
               THREADS_FLAG},
     .run = inspect},
};
enum { COMMANDS = sizeof commands / sizeof *commands };

static void set_threads(int64_t threads) {
#ifdef _OPENMP
    if (threads > 0) omp_set_num_threads((int)threads);
#else
    if (threads > 1)
        die_usage("--threads %lld: this program was built without OpenMP and has one thread", (long long)threads);
#endif
}

static void print_commands(FILE *f) {
    fprintf(f, "usage: infer COMMAND MODEL ...\n");
    for (int i = 0; i < COMMANDS; i++) {
        char *left = xasprintf("%s %s", commands[i].name, commands[i].arguments);
        fprintf(f, "  %-26s %s\n", left, commands[i].help);
        free(left);
    }
    fprintf(f, "infer COMMAND --help lists the flags of a command.\n");
}

/* The row of a command; an unknown one is refused by a sentence that lists them all. */
static Command find_command(const char *name) {
    char names[512] = "";
    for (int i = 0; i < COMMANDS; i++) {
        if (strcmp(commands[i].name, name) == 0) return commands[i];
        size_t used = strlen(names);
        snprintf(names + used, sizeof names - used, "%s%s", i ? ", " : "", commands[i].name);
    }
    die_usage("unknown command '%s'; there are %s", name, names);
}

/* A command as it is typed: argv[0] is its name, argv[argc] may be written. */
static int run_command(int argc, char **argv) {
    Command c = find_command(argv[0]); /* a copy: the parser marks which flags were given */
    options = c.defaults;
    char *usage = xasprintf("usage: infer %s %s", c.name, c.usage);
    int n = parse_flags(c.flags, argc, argv, usage);
    free(usage);
    if (n < c.least || n > c.most) die_usage("%s", n > c.most && c.too_many ? c.too_many : c.too_few);
    set_threads(options.threads);
    argv[n + 1] = NULL;
    return c.run(&options, argv);
}

#ifndef INFER_NO_MAIN

int main(int argc, char **argv) {
    program_name(argv[0]);
    if (argc < 2) {
        print_commands(stderr);
        return 2;
    }
    if (strcmp(argv[1], "--help") == 0 || strcmp(argv[1], "-h") == 0) {
        print_commands(stdout);
        return 0;
    }
    return run_command(argc - 1, argv + 1);
}

#endif
