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
#define BT_ABI 1 /* changes with every change of this file; the Python side refuses any other */

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

/* Bytes per second of reading `bytes` once with all threads: what a memory-bound kernel is compared with. */
BT_API double bt_read_probe(bt_context *context, const void *data, size_t bytes);

#ifdef __cplusplus
}
#endif
#endif
