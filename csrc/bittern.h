/* bittern's native CPU runtime: a plain C interface, called through ctypes (bittern/runtime/native.py).

   Nothing here allocates what the caller keeps: weights, caches and results live in buffers of the caller's. All
   functions return 0 or one of the negative codes below, and none of them throws, prints or exits. A context may be
   used from several threads; its calls run one after the other. */
#ifndef BITTERN_H
#define BITTERN_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define BT_API __attribute__((visibility("default")))
#define BT_ABI 5 /* changes with every change of this file; the Python side refuses any other */

enum { BT_BAD_ARGUMENT = -1, BT_NO_MEMORY = -2, BT_NO_THREAD = -3, BT_UNSUPPORTED = -4 };

/* Instruction sets, each of them one source file. */
enum { BT_SCALAR, BT_AVX2, BT_AVX512, BT_AMX, BT_NEON, BT_SETS };

/* How the inputs of a packed matrix are rounded: to 16 bits in two int8 halves, or to int8 per 32 columns. */
enum { BT_A16, BT_A8 };

/* What a matrix (or a KV cache) is stored as. */
enum { BT_CODES, BT_F32, BT_F16, BT_BF16, BT_I8 };

/* y = x W^T. One matrix of out_features rows and in_features columns.

   BT_CODES: W[o, i] = scales[o, g(i)] * (codes[o, i] - zeros[o, g(i)]), g(i) = i / group_size, packed by bt_pack into
   tiles of 16 rows (csrc/kernels.h says which bit is where).
   BT_F32, BT_F16, BT_BF16: plain rows, no padding; `codes` points to them and all else is unused. */
typedef struct bt_matrix {
    int32_t out_features, in_features;
    int32_t type;
    int32_t bits, group_size;
    int32_t scale_type;    /* BT_F16 or BT_F32 */
    const void *codes;
    const void *scales;    /* [tiles][groups][16] */
    const uint8_t *zeros;  /* [tiles][groups][16]; NULL where all are 2^(bits - 1) */
    const int32_t *order;  /* [in_features], the input column of each stored one; NULL where they are in order */
} bt_matrix;

typedef struct bt_context bt_context;

BT_API int bt_abi(void);
/* Whether this build has the instruction set and this machine runs it. */
BT_API int bt_has(int set);
/* The best one that this machine runs. */
BT_API int bt_best(void);

/* A context of `threads` threads (the caller's is one of them) that computes with one instruction set. */
BT_API int bt_open(int threads, int set, bt_context **context);
BT_API void bt_close(bt_context *context);

/* Bytes that bt_pack writes. */
BT_API int64_t bt_packed_bytes(int out_features, int in_features, int bits, int group_size);
/* uint8 codes of any strides -> tiles. Columns are grouped already: order has been applied. */
BT_API int bt_pack(bt_context *context, int out_features, int in_features, int bits, int group_size,
                   const uint8_t *codes, ptrdiff_t row_stride, ptrdiff_t column_stride, void *packed);
/* Rows [begin, end) as floats, columns in stored order: (end - begin, in_features). */
BT_API int bt_dequantize(bt_context *context, const bt_matrix *matrix, int begin, int end, float *out);

/* y[j] = x W[j]^T for `count` matrices of one input x (rows, in_features); strides are in floats. */
BT_API int bt_linear(bt_context *context, const bt_matrix *const *matrices, int count, int activations, int rows,
                     const float *x, ptrdiff_t x_stride, float *const *y, const ptrdiff_t *y_strides);

/* Attention of new tokens to all keys, batch by batch: query i of `queries` stands at position keys - queries + i and
   sees the keys up to its own. All are floats; strides are those of batch, head and position, in floats; elements of a
   head lie side by side. */
typedef struct bt_attention_call {
    int32_t batch, heads, kv_heads, queries, keys, head_dim;
    int32_t window; /* keys that a query sees, its own included; 0 for all */
    float scale;    /* of q * k */
    float cap;      /* scores become cap * tanh(score / cap); 0 leaves them */
    const float *slopes; /* ALiBi, [heads]: adds slope * (key - query position); NULL for none */
    const float *q, *k, *v;
    float *out;
    ptrdiff_t q_strides[3], k_strides[3], v_strides[3], out_strides[3];
} bt_attention_call;

BT_API int bt_attention(bt_context *context, const bt_attention_call *call);

/* What quantize rounds between two matrix products (bittern/quantize/columns.py): `columns` columns of `rows` rows, a
   column's rows side by side, each column rounded to its grid in its turn,
     code = clamp(round(target / scale) + zero, 0, max_code), error = (code - zero) * scale - original,
   and an error of column j takes coupling[j * down + k * across] times itself from the target of each column k after
   it. Rows do not see each other. */
typedef struct bt_columns {
    int32_t columns, rows, max_code; /* at most 64 columns, and 255 */
    float *targets;                  /* [columns][rows]; become what each column should have been in its turn */
    const float *originals;          /* [columns][rows] */
    const float *coupling;
    ptrdiff_t down, across;
    const float *scales, *zeros; /* [groups][rows] */
    const int64_t *groups;       /* [columns], which of these */
    uint8_t *codes;              /* [columns][rows] */
    float *errors;               /* [columns][rows] */
} bt_columns;

BT_API int bt_solve_columns(bt_context *context, const bt_columns *call);

/* Coordinate descent on the codes of rows (bittern/quantize/polish.py): each column in its turn gets the code that is
   nearest to where its slope vanishes,
     code = clamp(round((scale (code - zero) - slope / hessian[k][k]) / scale) + zero, 0, max_code),
   and what that changes the weight by, times hessian[k], is added to the slopes of its row. Rows do not see each
   other. */
typedef struct bt_descent {
    int32_t rows, columns, group_size, max_code; /* whole groups; at most 255 */
    const float *hessian;                        /* [columns][columns], symmetric */
    const float *inverse;                        /* [columns], of its diagonal */
    const float *scales, *zeros;                 /* [rows][columns / group_size] */
    uint8_t *codes;                              /* [rows][columns], changed */
    float *slopes;                               /* [rows][columns], changed */
} bt_descent;

BT_API int bt_descend(bt_context *context, const bt_descent *call);

/* What the scales of groups of columns have to do with each other (bittern/quantize/polish.py): of each row, for every
   two groups g and h, the sum over the columns k of h of pulls[g][row][k] steps[row][k], computed where h >= g and put
   in both places. */
typedef struct bt_group_products {
    int32_t rows, columns, group_size, type; /* whole groups; of the pulls, BT_F32 or BT_BF16 */
    const void *pulls;                       /* [columns / group_size][rows][columns] */
    const float *steps;                      /* [rows][columns] */
    float *products;                         /* [rows][columns / group_size][columns / group_size] */
} bt_group_products;

BT_API int bt_multiply_groups(bt_context *context, const bt_group_products *call);

/* A decoder of the Llama family. */

enum { BT_SILU, BT_GELU_TANH };

typedef struct bt_projection {
    const bt_matrix *matrix;
    const float *bias; /* NULL for none */
} bt_projection;

typedef struct bt_layer {
    bt_projection q, k, v, o, gate, up, down;
    const float *attention_norm, *mlp_norm;               /* [hidden], of what goes into the block's halves */
    const float *attention_out_norm, *mlp_out_norm;       /* [hidden], of what comes out of them, or NULL */
    const float *q_norm, *k_norm;                         /* [head_dim] or NULL */
    int32_t window;                                       /* as in bt_attention_call */
    int32_t rope;                                         /* which table of bt_forward; -1 for none */
} bt_layer;

typedef struct bt_decoder {
    int32_t layers, hidden, heads, kv_heads, head_dim, intermediate, vocabulary;
    int32_t activation;  /* of the gate: BT_SILU or BT_GELU_TANH */
    int32_t activations; /* BT_A16 or BT_A8 */
    float epsilon;       /* of the norms */
    float embedding_scale, attention_scale;
    float attention_cap, logit_cap; /* 0 for none */
    const bt_matrix *embedding;     /* floats of any type, [vocabulary][hidden] */
    const bt_matrix *head;
    const float *norm; /* [hidden], before the head */
    const bt_layer *layer;
} bt_decoder;

/* Keys and values of all layers. Per layer one buffer of keys and one of values, each
   [sequences][kv_heads][capacity][head_dim filled up to a multiple of 16] elements; with BT_I8 as many scales as
   positions, [sequences][kv_heads][capacity]. What is where in them is the library's affair. */
typedef struct bt_cache {
    int32_t type;                /* BT_F32, BT_BF16 or BT_I8 */
    int32_t sequences, capacity; /* capacity is a multiple of 64 */
    void *const *keys, *const *values;
    float *const *key_scales, *const *value_scales; /* NULL but for BT_I8 */
} bt_cache;

/* Rotary embeddings of positions [first, end): rows of `stride` floats each, of which rotary / 2 are used. Element i of
   a head turns with element i + rotary / 2; those from `rotary` on stay. */
typedef struct bt_rope {
    const float *cos, *sin;
    int32_t first, end, stride, rotary;
} bt_rope;

/* Appends counts[s] tokens to every sequence s, which holds lengths[s] by now, and computes the logits after the last
   token of each sequence that got any: float (those sequences, vocabulary). `tokens` are those of sequence 0, of
   sequence 1 and so on. */
BT_API int bt_forward(bt_context *context, const bt_decoder *decoder, const bt_cache *cache, const bt_rope *ropes,
                      const int32_t *tokens, const int32_t *counts, const int32_t *lengths, float *logits);

/* Bytes per second of reading `bytes` once with all threads: what a memory-bound kernel is compared with. */
BT_API double bt_read_probe(bt_context *context, const void *data, size_t bytes);

#ifdef __cplusplus
}
#endif
#endif
