// The functions between a decoder's matrices, and the quantizer's inner loop, as every instruction set provides them
// (ops.h).
#ifndef BITTERN_VECTOR_OPS_H
#define BITTERN_VECTOR_OPS_H

#include "kernels.h"

namespace bittern {

constexpr int most_columns = 64;  // of bt_solve_columns
constexpr int head_quantum = 16;  // floats that a head is filled up to
constexpr int panel_keys = 16;
constexpr int block_keys = 64;
constexpr int piece_keys = 256;  // a job's worth when there are few rows; pieces are merged in their order

// Keys and values of one head of one sequence.
struct HeadCache {
    int type;  // of a cache: BT_F32, BT_BF16, or BT_I8 with a scale per position
    const void *keys, *values;
    const float *key_scales, *value_scales;
    // Not a cache but rows of floats at these distances: keys are not in panels, and neither has zeros behind it.
    ptrdiff_t key_stride, value_stride;  // 0 for a cache
    int size;                            // of a row of those
};

// Query rows of one sequence and one head of keys. Row r belongs to the position + r / repeat-th token.
struct Queries {
    const float *rows;    // [count][width], scaled
    const float *slopes;  // ALiBi, [repeat], or null
    int count, width, repeat;
    int position;
    int window;  // keys that a query sees, itself included; 0 for all
    float cap;   // of scores, 0 for none
};

// A row's online softmax: `width` floats of output, 16 partial sums, the largest score.
constexpr int state_extra = 32;
// Floats of scratch that attend() needs.
static inline int64_t flash_scratch(int rows, int width) {
    return static_cast<int64_t>(rows) * block_keys + 2 * static_cast<int64_t>(width) * block_keys;
}

// One head of a query or a key on its way from the matrix to attention.
struct Head {
    const float *bias, *norm;  // [size] or null
    const float *cos, *sin;    // [rotary / 2], of this position
    int size, width;           // floats there, and with the zeros behind them
    int rotary;                // the first ones that are rotated, i with i + rotary / 2
    float epsilon, scale;
};

struct VectorOps {
    // out[i] = x[i] / rms(x) * weight[i]; out may be x.
    void (*rms_norm)(const float *x, const float *weight, float epsilon, int size, float *out);
    // x[i] += y[i]
    void (*add)(const float *y, int size, float *x);
    // gate[i] = activation(gate[i]) * up[i]
    void (*gate)(int activation, const float *up, int size, float *gate);
    // x[i] = limit * tanh(x[i] / limit)
    void (*cap)(float limit, int size, float *x);
    // out[i] = scale * row[i] of BT_F32, BT_F16 or BT_BF16
    void (*embed)(int type, const void *row, float scale, int size, float *out);
    void (*head)(const Head &head, const float *x, float *out);
    // One position's key (x of `width` floats, zeros behind its head) or value into a cache, element i at
    // out[i * step]; int8 with its scale.
    void (*append)(int type, const float *x, int width, int step, void *out, float *scale);
    // Attention of some rows to one piece of keys, see flash.h.
    void (*attend)(const Queries &queries, const HeadCache &cache, int begin, int end, float *state, float *scratch);
    void (*merge)(const float *piece, int rows, int width, float *state);
    void (*finish)(const float *state, int size, int width, float *out);
    // Rows [begin, end) of bt_solve_columns; coupling[k][j] is what column k takes of an error of column j.
    void (*solve_columns)(const bt_columns &call, const float (*coupling)[most_columns], int begin, int end);
    // Rows [begin, end) of bt_descend.
    void (*descend)(const bt_descent &call, int begin, int end);
    // Rows [begin, end) of bt_multiply_groups.
    void (*multiply_groups)(const bt_group_products &call, int begin, int end);
    // Reads `bytes`, a multiple of 1024, as fast as the instruction set can; some function of all of them.
    int32_t (*read)(const void *data, int64_t bytes);
};

}  // namespace bittern

#endif
