// The kernels in plain C++: the fallback of every machine, and short enough to check the others by reading.
#include <cmath>

#include "half.h"
#include "kernels.h"
#include "ops.h"

namespace bittern {

namespace {

float load(const void *data, int type, int64_t index) {
    if (type == BT_F32) return static_cast<const float *>(data)[index];
    const uint16_t raw = static_cast<const uint16_t *>(data)[index];
    return type == BT_F16 ? half_to_float(raw) : bfloat_to_float(raw);
}

int zero(const bt_matrix &m, int64_t index) { return m.zeros == nullptr ? 1 << (m.bits - 1) : m.zeros[index]; }

// 16 columns of a tile, codes[column][row].
void unpack(const uint8_t *block, int bits, int16_t codes[quantum][tile_rows]) {
    for (int column = 0; column < quantum; column++) {
        const int quad = column >> 2;
        for (int row = 0; row < tile_rows; row++) {
            const int i = row * 4 + (column & 3);
            int code;
            if (bits == 8) {
                code = block[quad * 64 + i];
            } else if (bits == 4) {
                code = block[(quad >> 1) * 64 + i] >> (quad & 1) * 4 & 15;
            } else {
                code = block[i] >> quad * 2 & 3;
                if (bits == 3) code |= (block[64 + quad * 8 + (i >> 3)] >> (i & 7) & 1) << 2;
            }
            codes[column][row] = static_cast<int16_t>(code);
        }
    }
}

// The largest magnitude, or a NaN if there is one: among the bits of magnitudes NaNs come after all numbers.
float largest_magnitude(const float *x, int count) {
    uint32_t largest = 0;
    for (int i = 0; i < count; i++) {
        uint32_t magnitude;
        memcpy(&magnitude, x + i, 4);
        magnitude &= 0x7fffffff;
        if (magnitude > largest) largest = magnitude;
    }
    return bits_to_float(largest);
}

float quantize(const float *x, int real, int width, int8_t *hi, int8_t *lo, float *sum) {
    const float limit = digit_limit(lo), largest = largest_magnitude(x, real), inverse = limit / largest;
    // Zeros, and what is as small, have digits of 0. So have infinity and NaN: their scale says it.
    const bool usable = inverse > 0 && inverse < INFINITY;
    int total = 0;
    for (int i = 0; i < width; i++) {
        const int digit = usable && i < real ? static_cast<int>(lrintf(x[i] * inverse)) : 0;
        const int low = lo != nullptr ? static_cast<int8_t>(digit & 255) : 0;
        hi[i] = static_cast<int8_t>(lo != nullptr ? (digit - low) >> 8 : digit);
        if (lo != nullptr) lo[i] = static_cast<int8_t>(low);
        total += digit;
    }
    *sum = static_cast<float>(total);
    return largest / limit;
}

// 16 columns of a tile times the digits of one row.
void add_products(const int16_t codes[quantum][tile_rows], const int8_t *hi, const int8_t *lo, int *dot) {
    int sum[tile_rows] = {};  // what the compiler keeps in registers
    for (int column = 0; column < quantum; column++) {
        const int16_t digit = static_cast<int16_t>(lo == nullptr ? hi[column] : hi[column] * 256 + lo[column]);
#pragma omp simd
        for (int r = 0; r < tile_rows; r++) sum[r] += codes[column][r] * digit;
    }
    for (int r = 0; r < tile_rows; r++) dot[r] += sum[r];
}

constexpr int most_rows = 8;  // of x, that share an unpacking

void multiply_tile(const bt_matrix &m, const Layout &l, const Input &input, int first_row, int rows, int tile,
                   float *y, ptrdiff_t stride) {
    const uint8_t *block = static_cast<const uint8_t *>(m.codes) + tile * l.tile_bytes;
    float total[most_rows][tile_rows] = {};
    int column = 0, chunk = 0;
    for (int group = 0; group < l.groups; group++) {
        const int64_t at = (static_cast<int64_t>(tile) * l.groups + group) * tile_rows;
        const int filled = columns_of_group(l, group);
        float part[most_rows][tile_rows] = {};
        for (int start = 0; start < filled; start += l.chunk, chunk++) {
            const int width = filled - start < l.chunk ? filled - start : l.chunk;
            int dot[most_rows][tile_rows] = {};
            for (int i = 0; i < width; i += quantum, column += quantum, block += m.bits * 32) {
                int16_t codes[quantum][tile_rows];
                unpack(block, m.bits, codes);
                for (int row = 0; row < rows; row++) {
                    const int64_t digits = (first_row + row) * input.digits + column;
                    add_products(codes, input.hi + digits, input.lo == nullptr ? nullptr : input.lo + digits, dot[row]);
                }
            }
            for (int row = 0; row < rows; row++) {
                const int64_t index = static_cast<int64_t>(first_row + row) * l.chunks + chunk;
                const int sum = static_cast<int>(input.sums[index]);
                for (int r = 0; r < tile_rows; r++) {
                    part[row][r] += input.scales[index] * static_cast<float>(dot[row][r] - zero(m, at + r) * sum);
                }
            }
        }
        for (int r = 0; r < tile_rows; r++) {
            const float scale = load(m.scales, m.scale_type, at + r);
            for (int row = 0; row < rows; row++) total[row][r] += part[row][r] * scale;
        }
    }
    const int first = tile * tile_rows;
    const int real = m.out_features - first < tile_rows ? m.out_features - first : tile_rows;
    for (int row = 0; row < rows; row++) {
        for (int r = 0; r < real; r++) y[(first_row + row) * stride + first + r] = total[row][r];
    }
}

void multiply(const bt_matrix &m, const Layout &l, const Input &input, int begin, int end, float *y,
              ptrdiff_t stride) {
    for (int tile = begin; tile < end; tile++) {
        for (int row = 0; row < input.rows; row += most_rows) {
            const int rows = input.rows - row < most_rows ? input.rows - row : most_rows;
            multiply_tile(m, l, input, row, rows, tile, y, stride);
        }
    }
}

void multiply_dense(const bt_matrix &m, const float *x, ptrdiff_t x_stride, int rows, int begin, int end, float *y,
                    ptrdiff_t y_stride) {
    for (int feature = begin; feature < end; feature++) {
        const int64_t at = static_cast<int64_t>(feature) * m.in_features;
        for (int row = 0; row < rows; row++) {
            float total = 0;
            for (int i = 0; i < m.in_features; i++) total += load(m.codes, m.type, at + i) * x[row * x_stride + i];
            y[row * y_stride + feature] = total;
        }
    }
}

void dequantize(const bt_matrix &m, const Layout &l, int begin, int end, float *out) {
    for (int row = begin; row < end; row++) {
        const int tile = row / tile_rows, r = row % tile_rows;
        const uint8_t *block = static_cast<const uint8_t *>(m.codes) + tile * l.tile_bytes;
        for (int group = 0; group < l.groups; group++) {
            const int64_t at = (static_cast<int64_t>(tile) * l.groups + group) * tile_rows + r;
            const float scale = load(m.scales, m.scale_type, at);
            const int first = group * m.group_size;
            const int there = m.in_features - first < m.group_size ? m.in_features - first : m.group_size;
            for (int start = 0; start < columns_of_group(l, group); start += quantum, block += m.bits * 32) {
                int16_t codes[quantum][tile_rows];
                unpack(block, m.bits, codes);
                for (int i = 0; i < quantum && start + i < there; i++) {
                    out[static_cast<int64_t>(row - begin) * m.in_features + first + start + i] =
                        scale * static_cast<float>(codes[i][r] - zero(m, at));
                }
            }
        }
    }
}

}  // namespace

const Kernels kernels_scalar = {quantize, multiply, multiply_dense, dequantize, &ops};

}  // namespace bittern
