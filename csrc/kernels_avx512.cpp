// AVX-512 with VNNI: 16 rows of a tile times 4 columns in one instruction.
#include <cmath>

#include "avx512.h"
#include "kernels.h"
#include "ops.h"

namespace bittern {

namespace {

// sums += codes * digits. In assembly since GCC 12 copies the sums to and fro around its intrinsic.
inline void add_products(__m512i &sums, __m512i codes, __m512i digits) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(codes), "v"(digits));
}

inline __m512i broadcast_quad(const int8_t *digits) {
    int quad;
    memcpy(&quad, digits, sizeof quad);
    return _mm512_set1_epi32(quad);
}

// -zero * sum for the rows of a tile. |code - zero| * digits of a chunk fit into int32, so all of it is exact.
template <int Bits, bool Zeros>
inline __m512i bias_of(const bt_matrix &m, int64_t at, float sum) {
    const __m512i negative = _mm512_cvtps_epi32(_mm512_set1_ps(-sum));
    if constexpr (!Zeros) return _mm512_slli_epi32(negative, Bits - 1);
    return _mm512_mullo_epi32(load_zeros(m, at), negative);
}

// Bytes that lines of codes are asked for ahead of their use: from memory that is a sixth of the speed.
constexpr int codes_ahead = 1024;
// The same for scales, whose short steps the hardware does not follow far enough.
constexpr int scales_ahead = 256;

inline void prefetch(const void *data, int64_t offset) {
    _mm_prefetch(static_cast<const char *>(data) + offset, _MM_HINT_T0);
}

// One row of x times `Tiles` tiles, which share its broadcasts.
template <int Bits, bool Lo, bool Zeros, int Tiles>
void multiply_row(const bt_matrix &m, const Layout &l, const Input &x, int tile, float *y) {
    constexpr int in_line = quads_of_line<Bits>;
    const uint8_t *block = static_cast<const uint8_t *>(m.codes) + tile * l.tile_bytes;
    const int8_t *hi = x.hi, *lo = x.lo;
    const float *scales = x.scales, *sums = x.sums;
    __m512 totals[Tiles];
    for (int t = 0; t < Tiles; t++) totals[t] = _mm512_setzero_ps();
    for (int group = 0; group < l.groups; group++) {
        const int columns = columns_of_group(l, group);
        int64_t at[Tiles];
        __m512 weight_scales[Tiles];
        for (int t = 0; t < Tiles; t++) {
            at[t] = (static_cast<int64_t>(tile + t) * l.groups + group) * tile_rows;
            prefetch(m.scales, at[t] * (m.scale_type == BT_F32 ? 4 : 2) + scales_ahead);
            weight_scales[t] = load_scales(m, at[t]);
        }
        for (int start = 0; start < columns; start += l.chunk, scales++, sums++) {
            const int width = columns - start < l.chunk ? columns - start : l.chunk;
            __m512i high[Tiles], low[Tiles];
            for (int t = 0; t < Tiles; t++) {
                high[t] = bias_of<Bits, Zeros>(m, at[t], *sums);
                if constexpr (Lo) {
                    low[t] = high[t];
                    high[t] = _mm512_setzero_si512();
                }
            }
            for (int i = 0; i < width; i += quantum, block += Bits * 32) {
                for (int q = 0; q < 4; q += in_line) {
                    __m512i x_high[in_line], x_low[in_line];
                    for (int p = 0; p < in_line; p++) {
                        x_high[p] = broadcast_quad(hi + i + 4 * (q + p));
                        if constexpr (Lo) x_low[p] = broadcast_quad(lo + i + 4 * (q + p));
                    }
                    for (int t = 0; t < Tiles; t++) {
                        __m512i quads[in_line];
                        prefetch(block, t * l.tile_bytes + q / in_line * 64 + codes_ahead);
                        unpack<Bits>(block + t * l.tile_bytes + q / in_line * 64, quads);
                        for (int p = 0; p < in_line; p++) {
                            high[t] = _mm512_dpbusd_epi32(high[t], quads[p], x_high[p]);
                            if constexpr (Lo) low[t] = _mm512_dpbusd_epi32(low[t], quads[p], x_low[p]);
                        }
                    }
                }
            }
            hi += width;
            if constexpr (Lo) lo += width;
            const __m512 scale = _mm512_set1_ps(*scales);
            for (int t = 0; t < Tiles; t++) {
                const __m512i dot = Lo ? _mm512_add_epi32(_mm512_slli_epi32(high[t], 8), low[t]) : high[t];
                totals[t] = _mm512_fmadd_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(dot), scale), weight_scales[t], totals[t]);
            }
        }
    }
    for (int t = 0; t < Tiles; t++) store_features(m, tile + t, totals[t], y);
}

// Rows of x that share what one pass unpacks, and of those the ones whose sums fit into the registers.
constexpr int pass_rows = 48;
template <bool Lo>
constexpr int block_rows = Lo ? 3 : 6;

// Sums of a strip for the rows of a pass, and what the weights of the present group are scaled with.
struct alignas(64) Pass {
    float totals[pass_rows][strip_tiles][tile_rows];
    __m512 weight_scales[strip_tiles];
    __m512i zeros[strip_tiles];
};

// One chunk of a strip of unpacked tiles times `Rows` rows of x; `chunk` is the one of the row, `column` its first.
template <bool Lo, bool Zeros, int Rows>
void multiply_block(const Strip &strip, const bt_matrix &m, const Layout &l, const Input &x, int row, int chunk,
                    int column, int width, int pass_row, Pass *pass) {
    __m512i high[Rows][strip_tiles], low[Rows][strip_tiles];
    const int8_t *hi = x.hi + row * x.digits + column, *lo = Lo ? x.lo + row * x.digits + column : nullptr;
    const float *scales = x.scales + static_cast<int64_t>(row) * l.chunks + chunk;
    const float *sums = x.sums + static_cast<int64_t>(row) * l.chunks + chunk;
#pragma GCC unroll 8
    for (int r = 0; r < Rows; r++) {
        const __m512i negative = _mm512_cvtps_epi32(_mm512_set1_ps(-sums[r * l.chunks]));
        const __m512i bias = _mm512_sll_epi32(negative, _mm_cvtsi32_si128(m.bits - 1));
#pragma GCC unroll 8
        for (int t = 0; t < strip_tiles; t++) {
            high[r][t] = Zeros ? _mm512_mullo_epi32(pass->zeros[t], negative) : bias;
            if constexpr (Lo) {
                low[r][t] = high[r][t];
                high[r][t] = _mm512_setzero_si512();
            }
        }
    }
    for (int quad = 0; quad < width / 4; quad++) {
        __m512i codes[strip_tiles];
#pragma GCC unroll 8
        for (int t = 0; t < strip_tiles; t++) codes[t] = _mm512_load_si512(strip.codes[t][quad]);
#pragma GCC unroll 8
        for (int r = 0; r < Rows; r++) {
            const __m512i x_high = broadcast_quad(hi + r * x.digits + 4 * quad);
#pragma GCC unroll 8
            for (int t = 0; t < strip_tiles; t++) add_products(high[r][t], codes[t], x_high);
            if constexpr (Lo) {
                const __m512i x_low = broadcast_quad(lo + r * x.digits + 4 * quad);
#pragma GCC unroll 8
                for (int t = 0; t < strip_tiles; t++) add_products(low[r][t], codes[t], x_low);
            }
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < Rows; r++) {
        const __m512 scale = _mm512_set1_ps(scales[r * l.chunks]);
#pragma GCC unroll 8
        for (int t = 0; t < strip_tiles; t++) {
            float *total = pass->totals[pass_row + r][t];
            const __m512i dot = Lo ? _mm512_add_epi32(_mm512_slli_epi32(high[r][t], 8), low[r][t]) : high[r][t];
            const __m512 product = _mm512_mul_ps(_mm512_cvtepi32_ps(dot), scale);
            _mm512_store_ps(total, _mm512_fmadd_ps(product, pass->weight_scales[t], _mm512_load_ps(total)));
        }
    }
}

// The same for any number of rows up to block_rows.
template <bool Lo, bool Zeros, int Rows>
inline void multiply_rows(int rows, const Strip &strip, const bt_matrix &m, const Layout &l, const Input &x, int row,
                          int chunk, int column, int width, int pass_row, Pass *pass) {
    if constexpr (Rows > 1) {
        if (rows < Rows) {
            multiply_rows<Lo, Zeros, Rows - 1>(rows, strip, m, l, x, row, chunk, column, width, pass_row, pass);
            return;
        }
    }
    multiply_block<Lo, Zeros, Rows>(strip, m, l, x, row, chunk, column, width, pass_row, pass);
}

// Rows [first, first + rows) of x times `tiles` tiles, at most pass_rows and strip_tiles of them.
template <int Bits, bool Lo, bool Zeros>
void multiply_pass(const bt_matrix &m, const Layout &l, const Input &x, int first, int rows, int tile, int tiles,
                   float *y, ptrdiff_t stride) {
    const int blocks = (rows + block_rows<Lo> - 1) / block_rows<Lo>;
    Pass pass;
    Strip strip;
    memset(pass.totals, 0, sizeof pass.totals[0] * rows);
    const uint8_t *block = static_cast<const uint8_t *>(m.codes) + tile * l.tile_bytes;
    int column = 0, chunk = 0;
    for (int group = 0; group < l.groups; group++) {
        for (int t = 0; t < strip_tiles; t++) {
            const int64_t at = (static_cast<int64_t>(tile + least(t, tiles - 1)) * l.groups + group) * tile_rows;
            pass.weight_scales[t] = load_scales(m, at);
            if constexpr (Zeros) pass.zeros[t] = load_zeros(m, at);
        }
        const int columns = columns_of_group(l, group);
        for (int start = 0, width; start < columns; start += width, column += width, chunk++) {
            width = least(columns - start, l.chunk);
            for (int t = 0; t < strip_tiles; t++) {
                unpack_chunk<Bits>(block + least(t, tiles - 1) * l.tile_bytes, width, strip.codes[t]);
            }
            block += width / quantum * block_bytes<Bits>;
            for (int b = 0, row = 0, here; b < blocks; b++, row += here) {
                here = (rows - row + blocks - b - 1) / (blocks - b);  // 4 rows are 2 and 2, not 3 and 1
                multiply_rows<Lo, Zeros, block_rows<Lo>>(here, strip, m, l, x, first + row, chunk, column, width, row,
                                                         &pass);
            }
        }
    }
    for (int row = 0; row < rows; row++) {
        for (int t = 0; t < tiles; t++) {
            store_features(m, tile + t, _mm512_load_ps(pass.totals[row][t]), y + (first + row) * stride);
        }
    }
}

template <int Bits, bool Lo, bool Zeros>
void multiply_tiles(const bt_matrix &m, const Layout &l, const Input &x, int begin, int end, float *y,
                    ptrdiff_t stride) {
    if (x.rows == 1) {
        int tile = begin;
        for (; tile + 4 <= end; tile += 4) multiply_row<Bits, Lo, Zeros, 4>(m, l, x, tile, y);
        for (; tile < end; tile++) multiply_row<Bits, Lo, Zeros, 1>(m, l, x, tile, y);
        return;
    }
    for (int row = 0; row < x.rows; row += pass_rows) {
        const int rows = least(x.rows - row, pass_rows);
        for (int tile = begin; tile < end; tile += strip_tiles) {
            multiply_pass<Bits, Lo, Zeros>(m, l, x, row, rows, tile, least(end - tile, strip_tiles), y, stride);
        }
    }
}

template <int Bits>
void multiply_bits(const bt_matrix &m, const Layout &l, const Input &input, int begin, int end, float *y,
                   ptrdiff_t stride) {
    if (input.lo != nullptr) {
        if (m.zeros != nullptr) multiply_tiles<Bits, true, true>(m, l, input, begin, end, y, stride);
        else multiply_tiles<Bits, true, false>(m, l, input, begin, end, y, stride);
    } else {
        if (m.zeros != nullptr) multiply_tiles<Bits, false, true>(m, l, input, begin, end, y, stride);
        else multiply_tiles<Bits, false, false>(m, l, input, begin, end, y, stride);
    }
}

void multiply(const bt_matrix &m, const Layout &l, const Input &input, int begin, int end, float *y,
              ptrdiff_t stride) {
    if (m.bits == 8) multiply_bits<8>(m, l, input, begin, end, y, stride);
    else if (m.bits == 4) multiply_bits<4>(m, l, input, begin, end, y, stride);
    else if (m.bits == 3) multiply_bits<3>(m, l, input, begin, end, y, stride);
    else multiply_bits<2>(m, l, input, begin, end, y, stride);
}

// The largest magnitude, or a NaN if there is one: among the bits of magnitudes NaNs come after all numbers.
inline float largest_magnitude(const float *x, int count) {
    const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
    __m512i largest = _mm512_setzero_si512();
    for (int i = 0; i < count; i += 16) {
        const __m512i bits = _mm512_castps_si512(_mm512_maskz_loadu_ps(first_lanes(count - i), x + i));
        largest = _mm512_max_epu32(largest, _mm512_and_si512(bits, magnitude));
    }
    const uint32_t bits = _mm512_reduce_max_epu32(largest);
    float result;
    memcpy(&result, &bits, sizeof result);
    return result;
}

float quantize(const float *x, int real, int width, int8_t *hi, int8_t *lo, float *sum) {
    const float limit = digit_limit(lo), largest = largest_magnitude(x, real), inverse = limit / largest;
    // Zeros, and what is as small, have digits of 0. So have infinity and NaN: their scale says it.
    const bool usable = inverse > 0 && inverse < INFINITY;
    const __m512 factor = _mm512_set1_ps(usable ? inverse : 0.0f);
    __m512i total = _mm512_setzero_si512();
    for (int i = 0; i < width; i += quantum) {
        const __m512 values = _mm512_maskz_loadu_ps(usable ? first_lanes(real - i) : 0, x + i);
        const __m512i digits = _mm512_cvtps_epi32(_mm512_mul_ps(values, factor));
        total = _mm512_add_epi32(total, digits);
        __m512i high = digits;
        if (lo != nullptr) {
            // The low half is signed, so the high one is rounded to the nearest: (digit + 128) >> 8.
            high = _mm512_srai_epi32(_mm512_add_epi32(digits, _mm512_set1_epi32(128)), 8);
            _mm_storeu_si128(reinterpret_cast<__m128i *>(lo + i), _mm512_cvtepi32_epi8(digits));
        }
        _mm_storeu_si128(reinterpret_cast<__m128i *>(hi + i), _mm512_cvtepi32_epi8(high));
    }
    *sum = static_cast<float>(_mm512_reduce_add_epi32(total));
    return largest / limit;
}

// 16 weights from `index` on, zero where the mask says so.
template <int Type>
inline __m512 load_weights(const void *weights, int64_t index, __mmask16 mask) {
    if constexpr (Type == BT_F32) return _mm512_maskz_loadu_ps(mask, static_cast<const float *>(weights) + index);
    const __m256i raw = _mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t *>(weights) + index);
    if constexpr (Type == BT_F16) return _mm512_cvtph_ps(raw);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
}

// `Rows` rows of x times `Features` features. Every sum has lanes of its own, so that blocks do not change results.
template <int Type, int Rows, int Features>
void multiply_dense_block(const bt_matrix &m, const float *x, ptrdiff_t x_stride, int feature, float *y,
                          ptrdiff_t y_stride) {
    __m512 sums[Rows][Features];
#pragma GCC unroll 4
    for (int r = 0; r < Rows; r++) {
#pragma GCC unroll 4
        for (int f = 0; f < Features; f++) sums[r][f] = _mm512_setzero_ps();
    }
    const int64_t at = static_cast<int64_t>(feature) * m.in_features;
    for (int i = 0; i < m.in_features; i += 16) {
        const __mmask16 mask = first_lanes(m.in_features - i);
        __m512 inputs[Rows];
#pragma GCC unroll 4
        for (int r = 0; r < Rows; r++) inputs[r] = _mm512_maskz_loadu_ps(mask, x + r * x_stride + i);
#pragma GCC unroll 4
        for (int f = 0; f < Features; f++) {
            const __m512 weights = load_weights<Type>(m.codes, at + static_cast<int64_t>(f) * m.in_features + i, mask);
#pragma GCC unroll 4
            for (int r = 0; r < Rows; r++) sums[r][f] = _mm512_fmadd_ps(weights, inputs[r], sums[r][f]);
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < Rows; r++) {
#pragma GCC unroll 4
        for (int f = 0; f < Features; f++) y[r * y_stride + feature + f] = _mm512_reduce_add_ps(sums[r][f]);
    }
}

template <int Type, int Features>
void multiply_dense_rows(const bt_matrix &m, const float *x, ptrdiff_t x_stride, int rows, int feature, float *y,
                         ptrdiff_t y_stride) {
    int row = 0;
    for (; row + 4 <= rows; row += 4) {
        multiply_dense_block<Type, 4, Features>(m, x + row * x_stride, x_stride, feature, y + row * y_stride, y_stride);
    }
    for (; row < rows; row++) {
        multiply_dense_block<Type, 1, Features>(m, x + row * x_stride, x_stride, feature, y + row * y_stride, y_stride);
    }
}

template <int Type>
void multiply_dense_type(const bt_matrix &m, const float *x, ptrdiff_t x_stride, int rows, int begin, int end, float *y,
                         ptrdiff_t y_stride) {
    int feature = begin;
    for (; feature + 4 <= end; feature += 4) multiply_dense_rows<Type, 4>(m, x, x_stride, rows, feature, y, y_stride);
    for (; feature < end; feature++) multiply_dense_rows<Type, 1>(m, x, x_stride, rows, feature, y, y_stride);
}

void multiply_dense(const bt_matrix &m, const float *x, ptrdiff_t x_stride, int rows, int begin, int end, float *y,
                    ptrdiff_t y_stride) {
    const auto type = m.type == BT_F32   ? multiply_dense_type<BT_F32>
                      : m.type == BT_F16 ? multiply_dense_type<BT_F16>
                                         : multiply_dense_type<BT_BF16>;
    type(m, x, x_stride, rows, begin, end, y, y_stride);
}

// 4 quads of 16 rows to 16 bytes a row: row r is at [r % 4][r / 4].
inline void transpose(const __m512i quads[4], uint8_t rows[4][4][16]) {
    const __m512i a = _mm512_unpacklo_epi32(quads[0], quads[1]), b = _mm512_unpacklo_epi32(quads[2], quads[3]);
    const __m512i c = _mm512_unpackhi_epi32(quads[0], quads[1]), d = _mm512_unpackhi_epi32(quads[2], quads[3]);
    _mm512_store_si512(rows[0], _mm512_unpacklo_epi64(a, b));
    _mm512_store_si512(rows[1], _mm512_unpackhi_epi64(a, b));
    _mm512_store_si512(rows[2], _mm512_unpacklo_epi64(c, d));
    _mm512_store_si512(rows[3], _mm512_unpackhi_epi64(c, d));
}

// Rows [begin, end) of one tile.
template <int Bits>
void dequantize_tile(const bt_matrix &m, const Layout &l, int tile, int begin, int end, float *out) {
    const uint8_t *block = static_cast<const uint8_t *>(m.codes) + tile * l.tile_bytes;
    for (int group = 0; group < l.groups; group++) {
        const int64_t at = (static_cast<int64_t>(tile) * l.groups + group) * tile_rows;
        alignas(64) float scales[tile_rows];
        alignas(64) int zeros[tile_rows];
        _mm512_store_ps(scales, load_scales(m, at));
        _mm512_store_si512(zeros, m.zeros != nullptr ? load_zeros(m, at) : _mm512_set1_epi32(1 << (Bits - 1)));
        const int first = group * m.group_size, there = least(m.in_features - first, m.group_size);
        for (int start = 0; start < columns_of_group(l, group); start += quantum, block += block_bytes<Bits>) {
            __m512i quads[4];
            for (int q = 0; q < 4; q += quads_of_line<Bits>) {
                unpack<Bits>(block + q / quads_of_line<Bits> * 64, quads + q);
            }
            alignas(64) uint8_t codes[4][4][16];
            transpose(quads, codes);
            const __mmask16 mask = first_lanes(there - start);
            for (int r = begin; r < end; r++) {
                const __m128i row = _mm_load_si128(reinterpret_cast<const __m128i *>(codes[r % 4][r / 4]));
                const __m512i steps = _mm512_sub_epi32(_mm512_cvtepu8_epi32(row), _mm512_set1_epi32(zeros[r]));
                _mm512_mask_storeu_ps(out + static_cast<int64_t>(r - begin) * m.in_features + first + start, mask,
                                      _mm512_mul_ps(_mm512_cvtepi32_ps(steps), _mm512_set1_ps(scales[r])));
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
        const int tile = row / tile_rows, first = tile * tile_rows;
        next = least(first + tile_rows, end);
        one(m, l, tile, row - first, next - first, out + static_cast<int64_t>(row - begin) * m.in_features);
    }
}

}  // namespace

const Kernels kernels_avx512 = {quantize, multiply, multiply_dense, dequantize, &ops};

}  // namespace bittern
