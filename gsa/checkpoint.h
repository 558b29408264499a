/* Checkpoint files: 256 int32, then a directory of named tensors, then their bytes. The same format holds models
   (weights and tokenizer) and states (optimiser and position in the data).

   header  0 magic 20261123   1 version 4   2 kind (1 model, 2 state)   3 entries   4, 5 file length in bytes (low,
           high)
           6 step   16.. the CONFIG_FIELDS of model.h in order   128.. GSA heads: for each of 64 layers a mask of 64
                    bits (low, high)
   entry   120 bytes: name[64], int32 type (0 fp32, 1 bytes, 2 int64, 3 bf16, 4 int8), int32 dimensions, int64 shape[4],
           int64 offset, int64 length
   Tensors start at multiples of 64 bytes, so that a mapped file can be used as it is. Little-endian throughout. The
   matrices (tensor_is_matrix) may be bf16, or int8 with a scale per row: an entry NAME.scales, fp32 (rows); all else is
   fp32.

   Models of llm.c are read as well (magic 20240326, version 3: fp32, 5: bf16; words 2 maximal length, 3 vocabulary,
   4 layers, 5 heads, 6 channels, 7 padded vocabulary; tensors follow without gaps): as a model of standard attention
   and learned positions, without a tokenizer. */
#ifndef GSA_CHECKPOINT_H
#define GSA_CHECKPOINT_H

#include "model.h"

#ifdef __cplusplus
extern "C" {
#endif

enum { CHECKPOINT_MODEL = 1, CHECKPOINT_STATE = 2 };
enum { TYPE_F32, TYPE_BYTES, TYPE_I64, TYPE_BF16, TYPE_I8 };
#define WEIGHT_CHOICES "fp32|bf16|int8"

typedef struct {
    char name[64];
    int32_t type, dimensions;
    int64_t shape[4];
    int64_t offset, bytes; /* offset is filled in by checkpoint_write */
} Entry;

/* Writes the file whole or not at all (create_file, commit_file). data[i] are the bytes of entries[i]. */
void checkpoint_write(const char *path, int kind, const Config *c, int64_t step, Entry *entries, const void **data,
                      int count);
/* bytes are computed from the shape */
Entry checkpoint_entry(const char *name, int type, int dimensions, const int64_t *shape);

typedef struct {
    char *path;
    Config config;
    int64_t step;
    const char *map; /* the file, mapped for reading */
    size_t bytes;
    const Entry *entries;
    int count;
    Entry *made; /* the directory of a file that has none */
} Checkpoint;

/* Maps a file and checks header, length, configuration and directory; a wrong one is one sentence that names the
   file and what is wrong with it. checkpoint_is_whole answers instead of dying, for choosing the file to resume
   from. */
Checkpoint *checkpoint_open(const char *path, int kind);
bool checkpoint_is_whole(const char *path, int kind);
void checkpoint_close(Checkpoint *k);

bool checkpoint_has(const Checkpoint *k, const char *name);
/* The bytes of an entry, in the mapping; dies naming entry, both types and both shapes where they differ. dimensions
   0: any one-dimensional length, stored in *length. */
const void *checkpoint_find(const Checkpoint *k, const char *name, int type, int dimensions, const int64_t *shape,
                            int64_t *length);

/* A matrix as it lies in a file or in memory: fp32, bf16, or int8 times the scale of its row. */
typedef struct {
    int type;
    size_t columns;
    const void *data;
    const float *scales; /* (rows), of int8 only */
} Matrix;

static inline bool tensor_is_matrix(int tensor) {
    return tensor == TENSOR_wte || tensor == TENSOR_qkvw || tensor == TENSOR_attprojw || tensor == TENSOR_fcw ||
           tensor == TENSOR_fcprojw;
}
/* A row in fp32, int8 without its scale: in place where it is so already, else in room (columns). */
static inline const float *matrix_row(const Matrix *m, size_t row, float *room) {
    size_t n = m->columns;
    if (m->type == TYPE_F32) return (const float *)m->data + row * n;
    if (m->type == TYPE_BF16) {
        const uint16_t *from = (const uint16_t *)m->data + row * n;
        for (size_t i = 0; i < n; i++) {
            uint32_t bits = (uint32_t)from[i] << 16;
            memcpy(&room[i], &bits, 4);
        }
    } else {
        const int8_t *from = (const int8_t *)m->data + row * n;
        for (size_t i = 0; i < n; i++) room[i] = from[i];
    }
    return room;
}
/* The matrices' type, and entry PREFIX + name of one of them. Layers lie one after the other. */
int checkpoint_weight_type(const Checkpoint *k);
Matrix checkpoint_matrix(const Checkpoint *k, const char *prefix, int tensor);
/* Rounds rows x columns numbers to m->type and writes them where m points; false where a number is not finite. */
bool matrix_round(const Matrix *m, const float *from, size_t rows, void *data, float *scales);

/* All tensors of model.h's table that the model has, entry PREFIX + name, into a flat buffer, in fp32 whatever the
   matrices' type; the weights, of prefix "", are checked by model_check_alive. */
void checkpoint_read_tensors(const Checkpoint *k, const char *prefix, float *flat);
/* Likewise with the places of another table, such as that of model_second_moments. */
void checkpoint_read_table(const Checkpoint *k, const char *prefix, const Tensor *tensors, float *flat);
/* Appends an entry for each tensor of the table to entries and data at *count. */
void checkpoint_add_tensors(const Config *c, const char *prefix, const float *flat, Entry *entries, const void **data,
                            int *count);
void checkpoint_add_table(const Tensor *tensors, const char *prefix, const float *flat, Entry *entries,
                          const void **data, int *count);
/* Dies with a sentence naming the first field in which the file's configuration differs from c. */
void checkpoint_match(const Checkpoint *k, const Config *c);

#ifdef __cplusplus
}
#endif
#endif
