// What an instruction set provides, and the layout that all of them share.
//
// Tiles. A packed matrix is cut into tiles of 16 rows (the last one is filled up with zeros). Within a tile the columns
// follow each other group by group, every group filled up to a multiple of 16 columns. A quad is 4 consecutive columns
// of 16 rows, byte r * 4 + i of it being row r, column i: what one dot-product instruction eats. 16 columns take
//   8 bits: 4 quads of 64 bytes;
//   4 bits: 2 x 64 bytes, the low nibbles one quad and the high nibbles the next;
//   2 bits: 64 bytes, quad q in bits 2q and 2q + 1 of every byte;
//   3 bits: the 64 bytes of the lower 2 bits, then 4 x uint64, bit r * 4 + i of the q-th being the third bit in quad q.
//
// Inputs. A row of x is rounded in chunks of columns, each with a scale of its own: x ~ scale * digit. With A16 digits
// have 16 bits and are kept as two int8 halves, digit = 256 * hi + lo; with A8 there is no lo. A chunk never crosses a
// group, so with d(c) the integer dot product over a chunk and s(c) the sum of its digits
//   y = sum over groups of w_scale * sum over its chunks c of x_scale(c) * (d(c) - zero * s(c)).
#ifndef BITTERN_KERNELS_H
#define BITTERN_KERNELS_H

#include "bittern.h"

namespace bittern {

constexpr int tile_rows = 16;
constexpr int quantum = 16;          // columns that a group is filled up to
constexpr int longest_chunk_a16 = 128;  // 255 * 32767 * 128 fits into int32
constexpr int longest_chunk_a8 = 32;
constexpr int digits_tail = 64;      // bytes after a row of digits that may be read, and are multiplied by zero weights

// Everything that follows from a matrix's shape and the precision of its inputs.
struct Layout {
    int tiles;             // of 16 rows
    int groups;            // in a row
    int group_columns;     // columns of a group, filled up; all but the last group
    int last_columns;      // of the last group, filled up
    int columns;           // of a row, filled up
    int chunk;             // columns of a chunk; the last one of a group may be shorter
    int group_chunks;      // chunks of a group; all but the last group
    int chunks;            // of a row
    int64_t tile_bytes;
};

static inline int round_up(int value, int unit) { return (value + unit - 1) / unit * unit; }

static inline Layout layout_of(const bt_matrix &m, int activations) {
    Layout l;
    l.tiles = (m.out_features + tile_rows - 1) / tile_rows;
    l.groups = (m.in_features + m.group_size - 1) / m.group_size;
    l.group_columns = round_up(m.group_size, quantum);
    l.last_columns = round_up(m.in_features - (l.groups - 1) * m.group_size, quantum);
    l.columns = (l.groups - 1) * l.group_columns + l.last_columns;
    l.chunk = activations == BT_A8 ? longest_chunk_a8 : longest_chunk_a16;
    if (l.chunk > l.group_columns) l.chunk = l.group_columns;
    l.group_chunks = (l.group_columns + l.chunk - 1) / l.chunk;
    l.chunks = (l.groups - 1) * l.group_chunks + (l.last_columns + l.chunk - 1) / l.chunk;
    l.tile_bytes = static_cast<int64_t>(l.columns) * m.bits * 2;
    return l;
}

// Columns of a group, filled up.
static inline int columns_of_group(const Layout &l, int group) {
    return group == l.groups - 1 ? l.last_columns : l.group_columns;
}

// Digits lie in [-limit, limit]. 32639 = 127 * 256 + 127: hi stays within int8.
static inline float digit_limit(const int8_t *lo) { return lo != nullptr ? 32639.0f : 127.0f; }

// Rounded rows of x. `digits` is the distance of two rows of hi and of lo, l.columns plus the tail.
struct Input {
    int rows;
    int64_t digits;
    const int8_t *hi, *lo;  // lo is null with A8
    const float *scales;    // [rows][l.chunks]
    const float *sums;      // [rows][l.chunks], integers, of the digits of a chunk
};

struct VectorOps;  // csrc/ops.h: what a decoder does between its matrices

// What one instruction set provides. All functions are pure: memory in, memory out.
struct Kernels {
    // One chunk of x to `width` digits, `real` of its columns there and the others 0; its scale, and the sum of its
    // digits. Infinity and NaN show in the scale.
    float (*quantize)(const float *x, int real, int width, int8_t *hi, int8_t *lo, float *sum);
    // y[r * stride + f] for r in [0, input.rows) and the features f of tiles [begin, end).
    void (*multiply)(const bt_matrix &m, const Layout &l, const Input &input, int begin, int end, float *y,
                     ptrdiff_t stride);
    // The same for a matrix of floats, and for features [begin, end).
    void (*multiply_dense)(const bt_matrix &m, const float *x, ptrdiff_t x_stride, int rows, int begin, int end,
                           float *y, ptrdiff_t y_stride);
    // Rows [begin, end) as floats, columns in stored order, in_features of them a row.
    void (*dequantize)(const bt_matrix &m, const Layout &l, int begin, int end, float *out);
    const VectorOps *ops;
};

extern const Kernels kernels_scalar;
#if defined(__x86_64__)
extern const Kernels kernels_avx2, kernels_avx512, kernels_amx;
#endif
#if defined(__aarch64__)
extern const Kernels kernels_neon;
#endif

}  // namespace bittern

#endif
