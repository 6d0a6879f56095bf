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

int columns_of_group(const Layout &l, int group) { return group == l.groups - 1 ? l.last_columns : l.group_columns; }

// 16 columns of a tile, codes[column][row].
void unpack(const uint8_t *block, int bits, uint8_t codes[quantum][tile_rows]) {
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
            codes[column][row] = static_cast<uint8_t>(code);
        }
    }
}

void quantize(const bt_matrix &m, const Layout &l, const float *x, int8_t *hi, int8_t *lo, float *scales,
              float *sums) {
    const float limit = lo != nullptr ? 32639.0f : 127.0f;  // 32639 = 127 * 256 + 127: hi stays within int8
    for (int group = 0; group < l.groups; group++) {
        const int first = group * m.group_size;
        const int filled = columns_of_group(l, group);
        const int there = m.in_features - first < m.group_size ? m.in_features - first : m.group_size;
        for (int start = 0; start < filled; start += l.chunk) {
            const int width = filled - start < l.chunk ? filled - start : l.chunk;
            const int real = there - start < width ? there - start : width;
            float largest = 0;
            for (int i = 0; i < real; i++) largest = fmaxf(largest, fabsf(x[first + start + i]));
            const float inverse = largest > 0 ? limit / largest : 0.0f;
            int sum = 0;
            for (int i = 0; i < width; i++) {
                const int digit = i < real ? static_cast<int>(lrintf(x[first + start + i] * inverse)) : 0;
                const int low = lo != nullptr ? static_cast<int8_t>(digit & 255) : 0;
                hi[i] = static_cast<int8_t>(lo != nullptr ? (digit - low) >> 8 : digit);
                if (lo != nullptr) lo[i] = static_cast<int8_t>(low);
                sum += digit;
            }
            *scales++ = largest / limit;
            *sums++ = static_cast<float>(sum);
            hi += width;
            if (lo != nullptr) lo += width;
        }
    }
    for (int i = 0; i < digits_tail; i++) {
        hi[i] = 0;
        if (lo != nullptr) lo[i] = 0;
    }
}

void multiply(const bt_matrix &m, const Layout &l, const Input &input, int begin, int end, float *y,
              ptrdiff_t stride) {
    for (int tile = begin; tile < end; tile++) {
        for (int row = 0; row < input.rows; row++) {
            const uint8_t *block = static_cast<const uint8_t *>(m.codes) + tile * l.tile_bytes;
            const int8_t *hi = input.hi + row * input.digits;
            const int8_t *lo = input.lo == nullptr ? nullptr : input.lo + row * input.digits;
            const float *scales = input.scales + static_cast<int64_t>(row) * l.chunks;
            const float *sums = input.sums + static_cast<int64_t>(row) * l.chunks;
            float total[tile_rows] = {};
            for (int group = 0; group < l.groups; group++) {
                const int64_t at = (static_cast<int64_t>(tile) * l.groups + group) * tile_rows;
                const int filled = columns_of_group(l, group);
                float part[tile_rows] = {};
                for (int start = 0; start < filled; start += l.chunk, scales++, sums++) {
                    const int width = filled - start < l.chunk ? filled - start : l.chunk;
                    int dot[tile_rows] = {};
                    for (int i = 0; i < width; i += quantum, block += m.bits * 32) {
                        uint8_t codes[quantum][tile_rows];
                        unpack(block, m.bits, codes);
                        for (int column = 0; column < quantum; column++) {
                            const int digit = lo == nullptr ? *hi++ : *hi++ * 256 + *lo++;
                            for (int r = 0; r < tile_rows; r++) dot[r] += codes[column][r] * digit;
                        }
                    }
                    for (int r = 0; r < tile_rows; r++) {
                        const float zero = m.zeros == nullptr ? static_cast<float>(1 << (m.bits - 1)) : m.zeros[at + r];
                        part[r] += *scales * (static_cast<float>(dot[r]) - zero * *sums);
                    }
                }
                for (int r = 0; r < tile_rows; r++) total[r] += part[r] * load(m.scales, m.scale_type, at + r);
            }
            const int first = tile * tile_rows;
            const int real = m.out_features - first < tile_rows ? m.out_features - first : tile_rows;
            for (int r = 0; r < real; r++) y[row * stride + first + r] = total[r];
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
            const int zero = m.zeros == nullptr ? 1 << (m.bits - 1) : m.zeros[at];
            const float scale = load(m.scales, m.scale_type, at);
            const int first = group * m.group_size;
            const int there = m.in_features - first < m.group_size ? m.in_features - first : m.group_size;
            for (int start = 0; start < columns_of_group(l, group); start += quantum, block += m.bits * 32) {
                uint8_t codes[quantum][tile_rows];
                unpack(block, m.bits, codes);
                for (int i = 0; i < quantum && start + i < there; i++) {
                    out[static_cast<int64_t>(row - begin) * m.in_features + first + start + i] =
                        scale * static_cast<float>(codes[i][r] - zero);
                }
            }
        }
    }
}

}  // namespace

const Kernels kernels_scalar = {quantize, multiply, multiply_dense, dequantize, &ops};

}  // namespace bittern
