// ARMv8.2 with the dot product instructions. SDOT adds 4 products of int8 to each int32: a register has 4 rows of a
// quad, and the digits of its 4 columns are one lane of another. Codes of 8 bits are taken less 128, and so are their
// zero points: the difference of the two is what counts.
#include <arm_neon.h>
#include <cstring>

#include "kernels.h"
#include "ops.h"

namespace bittern {

namespace {

constexpr int offset_of(int bits) { return bits == 8 ? 128 : 0; }

// 16 columns of a tile, less the offset: [quad][quarter], byte r * 4 + i of a quarter being its row r, column i.
template <int bits>
void unpack(const uint8_t *block, int8x16_t quads[4][4]) {
    static const uint8_t powers[16] = {1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128};
    for (int k = 0; k < 4; k++) {
        for (int q = 0; q < 4; q++) {
            uint8x16_t v;
            if (bits == 8) {
                v = veorq_u8(vld1q_u8(block + q * 64 + k * 16), vdupq_n_u8(128));
            } else if (bits == 4) {
                v = vld1q_u8(block + q / 2 * 64 + k * 16);
                v = q % 2 == 0 ? vandq_u8(v, vdupq_n_u8(15)) : vshrq_n_u8(v, 4);
            } else {
                v = vshlq_u8(vld1q_u8(block + k * 16), vdupq_n_s8(static_cast<int8_t>(-2 * q)));
                v = vandq_u8(v, vdupq_n_u8(3));
                if (bits == 3) {
                    const uint8_t *third = block + 64 + q * 8 + k * 2;
                    const uint8x16_t bytes = vcombine_u8(vdup_n_u8(third[0]), vdup_n_u8(third[1]));
                    v = vorrq_u8(v, vandq_u8(vtstq_u8(bytes, vld1q_u8(powers)), vdupq_n_u8(4)));
                }
            }
            quads[q][k] = vreinterpretq_s8_u8(v);
        }
    }
}

// 16 columns of a tile times 16 digits.
void add_products(const int8x16_t quads[4][4], const int8_t *digits, int32x4_t dot[4]) {
    const int8x16_t d = vld1q_s8(digits);
    for (int k = 0; k < 4; k++) {
        dot[k] = vdotq_laneq_s32(dot[k], quads[0][k], d, 0);
        dot[k] = vdotq_laneq_s32(dot[k], quads[1][k], d, 1);
        dot[k] = vdotq_laneq_s32(dot[k], quads[2][k], d, 2);
        dot[k] = vdotq_laneq_s32(dot[k], quads[3][k], d, 3);
    }
}

float32x4_t load_halves(const uint16_t *at) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(at))); }

// 4 scales of weights.
float32x4_t load_scales(const bt_matrix &m, int64_t index) {
    return m.scale_type == BT_F32 ? vld1q_f32(static_cast<const float *>(m.scales) + index)
                                  : load_halves(static_cast<const uint16_t *>(m.scales) + index);
}

// 4 zero points less the offset.
float32x4_t load_zeros(const bt_matrix &m, int64_t index) {
    float zeros[4];
    for (int r = 0; r < 4; r++) {
        const int zero = m.zeros == nullptr ? 1 << (m.bits - 1) : m.zeros[index + r];
        zeros[r] = static_cast<float>(zero - offset_of(m.bits));
    }
    return vld1q_f32(zeros);
}

// Floats of which `count` are there; the others are 0 and not read.
template <int size>
void load_some(const float *from, int count, float32x4_t to[size / 4]) {
    float some[size] = {};
    if (count < size) {
        if (count > 0) memcpy(some, from, static_cast<size_t>(count) * sizeof(float));
        from = some;
    }
    for (int i = 0; i < size / 4; i++) to[i] = vld1q_f32(from + 4 * i);
}

// One chunk of `width` columns, `real` of them there; returns its scale.
float quantize(const float *x, int real, int width, int8_t *hi, int8_t *lo, float *sum) {
    const float limit = digit_limit(lo);
    float32x4_t values[4];
    uint32x4_t magnitudes = vdupq_n_u32(0);
    for (int i = 0; i < real; i += 16) {
        load_some<16>(x + i, real - i, values);
        for (float32x4_t v : values) magnitudes = vmaxq_u32(magnitudes, vreinterpretq_u32_f32(vabsq_f32(v)));
    }
    const uint32_t bits = vmaxvq_u32(magnitudes);
    float largest;
    memcpy(&largest, &bits, 4);
    const float inverse = limit / largest;
    const int usable = inverse > 0 && inverse < __builtin_inff() ? real : 0;
    int32x4_t total = vdupq_n_s32(0);
    for (int i = 0; i < width; i += 16) {
        int32x4_t digits[4] = {total, total, total, total};
        load_some<16>(x + i, usable - i, values);
        for (int k = 0; k < 4; k++) {
            digits[k] = usable > i ? vcvtnq_s32_f32(vmulq_n_f32(values[k], inverse)) : vdupq_n_s32(0);
            total = vaddq_s32(total, digits[k]);
        }
        const int16x8_t a = vcombine_s16(vmovn_s32(digits[0]), vmovn_s32(digits[1]));
        const int16x8_t b = vcombine_s16(vmovn_s32(digits[2]), vmovn_s32(digits[3]));
        const int8x16_t low = vcombine_s8(vmovn_s16(a), vmovn_s16(b));
        if (lo == nullptr) {
            vst1q_s8(hi + i, low);
        } else {
            const int16x8_t half = vdupq_n_s16(128);  // what carries into hi where lo is negative
            vst1q_s8(lo + i, low);
            vst1q_s8(hi + i, vcombine_s8(vshrn_n_s16(vaddq_s16(a, half), 8), vshrn_n_s16(vaddq_s16(b, half), 8)));
        }
    }
    *sum = static_cast<float>(vaddvq_s32(total));
    return largest / limit;
}

constexpr int most_rows = 8;  // of x, that share an unpacking; their sums stay in L1

template <int bits, bool a16>
void multiply_tile(const bt_matrix &m, const Layout &l, const Input &input, int first_row, int rows, int tile,
                   float *y, ptrdiff_t stride) {
    const uint8_t *block = static_cast<const uint8_t *>(m.codes) + tile * l.tile_bytes;
    const int8_t *hi = input.hi + first_row * input.digits, *lo = a16 ? input.lo + first_row * input.digits : nullptr;
    const float *scales = input.scales + static_cast<int64_t>(first_row) * l.chunks;
    const float *sums = input.sums + static_cast<int64_t>(first_row) * l.chunks;
    float32x4_t total[most_rows][4] = {};
    for (int group = 0; group < l.groups; group++) {
        const int64_t at = (static_cast<int64_t>(tile) * l.groups + group) * tile_rows;
        const int filled = columns_of_group(l, group);
        float32x4_t zeros[4], part[most_rows][4] = {};
        for (int k = 0; k < 4; k++) zeros[k] = load_zeros(m, at + 4 * k);
        for (int start = 0; start < filled; start += l.chunk, scales++, sums++) {
            const int width = filled - start < l.chunk ? filled - start : l.chunk;
            int32x4_t upper[most_rows][4] = {}, lower[most_rows][4] = {};
            for (int i = 0; i < width; i += quantum, block += bits * 32, hi += quantum) {
                int8x16_t quads[4][4];
                unpack<bits>(block, quads);
                for (int row = 0; row < rows; row++) add_products(quads, hi + row * input.digits, upper[row]);
                if (!a16) continue;
                for (int row = 0; row < rows; row++) add_products(quads, lo + row * input.digits, lower[row]);
                lo += quantum;
            }
            for (int row = 0; row < rows; row++) {
                const float scale = scales[static_cast<int64_t>(row) * l.chunks];
                const float32x4_t sum = vdupq_n_f32(sums[static_cast<int64_t>(row) * l.chunks]);
                for (int k = 0; k < 4; k++) {
                    int32x4_t dot = upper[row][k];
                    if (a16) dot = vaddq_s32(vshlq_n_s32(dot, 8), lower[row][k]);
                    const float32x4_t centred = vfmsq_f32(vcvtq_f32_s32(dot), zeros[k], sum);
                    part[row][k] = vfmaq_n_f32(part[row][k], centred, scale);
                }
            }
        }
        for (int k = 0; k < 4; k++) {
            const float32x4_t weights = load_scales(m, at + 4 * k);
            for (int row = 0; row < rows; row++) total[row][k] = vfmaq_f32(total[row][k], part[row][k], weights);
        }
    }
    const int first = tile * tile_rows;
    const int real = m.out_features - first < tile_rows ? m.out_features - first : tile_rows;
    for (int row = 0; row < rows; row++) {
        float out[tile_rows];
        for (int k = 0; k < 4; k++) vst1q_f32(out + 4 * k, total[row][k]);
        memcpy(y + (first_row + row) * stride + first, out, static_cast<size_t>(real) * sizeof(float));
    }
}

template <int bits>
void multiply_bits(const bt_matrix &m, const Layout &l, const Input &input, int begin, int end, float *y,
                   ptrdiff_t stride) {
    const auto one = input.lo != nullptr ? multiply_tile<bits, true> : multiply_tile<bits, false>;
    for (int tile = begin; tile < end; tile++) {
        for (int row = 0; row < input.rows; row += most_rows) {
            const int rows = input.rows - row < most_rows ? input.rows - row : most_rows;
            one(m, l, input, row, rows, tile, y, stride);
        }
    }
}

void multiply(const bt_matrix &m, const Layout &l, const Input &input, int begin, int end, float *y,
              ptrdiff_t stride) {
    if (m.bits == 8) multiply_bits<8>(m, l, input, begin, end, y, stride);
    else if (m.bits == 4) multiply_bits<4>(m, l, input, begin, end, y, stride);
    else if (m.bits == 3) multiply_bits<3>(m, l, input, begin, end, y, stride);
    else multiply_bits<2>(m, l, input, begin, end, y, stride);
}

// 4 weights of which `count` are there.
template <int type>
float32x4_t load_weights(const void *row, int64_t index, int count) {
    float32x4_t v;
    if (type == BT_F32) {
        load_some<4>(static_cast<const float *>(row) + index, count, &v);
        return v;
    }
    const uint16_t *at = static_cast<const uint16_t *>(row) + index;
    uint16_t some[4] = {};
    if (count < 4) {
        memcpy(some, at, static_cast<size_t>(count) * 2);
        at = some;
    }
    return type == BT_F16 ? load_halves(at) : vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(at), 16));
}

// 4 features, the last one repeated where there are fewer, times some rows.
template <int type, int rows>
void multiply_four(const bt_matrix &m, const float *x, ptrdiff_t x_stride, int feature, int features, float *y,
                   ptrdiff_t y_stride) {
    constexpr int size = type == BT_F32 ? 4 : 2;
    const char *weights[4];
    for (int f = 0; f < 4; f++) {
        const int64_t real = feature + (f < features ? f : features - 1);
        weights[f] = static_cast<const char *>(m.codes) + real * m.in_features * size;
    }
    float32x4_t sums[rows][4] = {};
    for (int i = 0; i < m.in_features; i += 4) {
        const int count = m.in_features - i;
        float32x4_t values[rows];
        for (int row = 0; row < rows; row++) load_some<4>(x + row * x_stride + i, count, values + row);
        for (int f = 0; f < 4; f++) {
            const float32x4_t w = load_weights<type>(weights[f], i, count);
            for (int row = 0; row < rows; row++) sums[row][f] = vfmaq_f32(sums[row][f], w, values[row]);
        }
    }
    for (int row = 0; row < rows; row++) {
        for (int f = 0; f < features; f++) y[row * y_stride + feature + f] = vaddvq_f32(sums[row][f]);
    }
}

template <int type>
void multiply_type(const bt_matrix &m, const float *x, ptrdiff_t x_stride, int rows, int begin, int end, float *y,
                   ptrdiff_t y_stride) {
    for (int feature = begin; feature < end; feature += 4) {
        const int features = end - feature < 4 ? end - feature : 4;
        for (int row = 0; row < rows; row += 4) {
            const auto some = rows - row >= 4   ? multiply_four<type, 4>
                              : rows - row == 3 ? multiply_four<type, 3>
                              : rows - row == 2 ? multiply_four<type, 2>
                                                : multiply_four<type, 1>;
            some(m, x + row * x_stride, x_stride, feature, features, y + row * y_stride, y_stride);
        }
    }
}

void multiply_dense(const bt_matrix &m, const float *x, ptrdiff_t x_stride, int rows, int begin, int end, float *y,
                    ptrdiff_t y_stride) {
    const auto typed = m.type == BT_F32   ? multiply_type<BT_F32>
                       : m.type == BT_F16 ? multiply_type<BT_F16>
                                          : multiply_type<BT_BF16>;
    typed(m, x, x_stride, rows, begin, end, y, y_stride);
}

template <int bits>
void dequantize_tile(const bt_matrix &m, const Layout &l, int begin, int end, float *out) {
    const int tile = begin / tile_rows;
    const uint8_t *block = static_cast<const uint8_t *>(m.codes) + tile * l.tile_bytes;
    for (int group = 0; group < l.groups; group++) {
        const int64_t at = (static_cast<int64_t>(tile) * l.groups + group) * tile_rows;
        float zeros[tile_rows], scales[tile_rows];
        for (int r = 0; r < tile_rows; r += 4) {
            vst1q_f32(zeros + r, load_zeros(m, at + r));
            vst1q_f32(scales + r, load_scales(m, at + r));
        }
        const int first = group * m.group_size;
        const int there = m.in_features - first < m.group_size ? m.in_features - first : m.group_size;
        for (int start = 0; start < columns_of_group(l, group); start += quantum, block += bits * 32) {
            int8x16_t quads[4][4];
            unpack<bits>(block, quads);
            int8_t codes[4][64];
            for (int i = 0; i < 16; i++) vst1q_s8(codes[i / 4] + i % 4 * 16, quads[i / 4][i % 4]);
            for (int row = begin; row < end; row++) {
                const int r = row % tile_rows;
                float *to = out + static_cast<int64_t>(row - begin) * m.in_features + first + start;
                for (int i = 0; i < quantum && start + i < there; i++) {
                    to[i] = scales[r] * (static_cast<float>(codes[i / 4][r * 4 + i % 4]) - zeros[r]);
                }
            }
        }
    }
}

void dequantize(const bt_matrix &m, const Layout &l, int begin, int end, float *out) {
    const auto one = m.bits == 8   ? dequantize_tile<8>
                     : m.bits == 4 ? dequantize_tile<4>
                     : m.bits == 3 ? dequantize_tile<3>
                                   : dequantize_tile<2>;
    for (int row = begin, next; row < end; row = next) {
        next = (row / tile_rows + 1) * tile_rows < end ? (row / tile_rows + 1) * tile_rows : end;
        one(m, l, row, next, out + static_cast<int64_t>(row - begin) * m.in_features);
    }
}

}  // namespace

const Kernels kernels_neon = {quantize, multiply, multiply_dense, dequantize, &ops};

}  // namespace bittern
