// AVX2: 8 rows of a tile in a register, so a tile is two halves, each of them one half of every 64 bytes.
//
// Codes of at most 4 bits times digits of 8 bits, two of them added, stay within 2 * 15 * 128 = 3840, so that 8 such
// sums (32 columns) fit into int16 without the saturation of vpmaddubsw. Codes of 8 bits would not: they and their
// digits are widened to int16, whose products vpmaddwd adds up in int32.
#include <cstring>
#include <immintrin.h>

#include "kernels.h"
#include "ops.h"

namespace bittern {

namespace {

constexpr int step = 32;  // columns that are added up in int16

__m256i load_codes(const uint8_t *at) { return _mm256_loadu_si256(reinterpret_cast<const __m256i *>(at)); }

// 32 bits to 32 bytes: 0 or 255.
__m256i spread(const uint8_t *at) {
    int bits;
    memcpy(&bits, at, 4);
    const __m256i byte_of = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
    const __m256i bit_of = _mm256_set1_epi64x(static_cast<int64_t>(0x8040201008040201));
    const __m256i bytes = _mm256_shuffle_epi8(_mm256_set1_epi32(bits), byte_of);
    return _mm256_cmpeq_epi8(_mm256_and_si256(bytes, bit_of), bit_of);
}

// 16 columns of 8 rows: 4 quads of bytes, byte r * 4 + i being row r, column i.
template <int bits>
void unpack(const uint8_t *block, int half, __m256i quads[4]) {
    block += half * 32;
    const __m256i low = _mm256_set1_epi8(bits == 4 ? 15 : 3);
    if (bits == 8) {
        for (int q = 0; q < 4; q++) quads[q] = load_codes(block + q * 64);
    } else if (bits == 4) {
        for (int q = 0; q < 4; q += 2) {
            const __m256i v = load_codes(block + q * 32);
            quads[q] = _mm256_and_si256(v, low);
            quads[q + 1] = _mm256_and_si256(_mm256_srli_epi16(v, 4), low);
        }
    } else {
        const __m256i v = load_codes(block);
        for (int q = 0; q < 4; q++) {
            quads[q] = _mm256_and_si256(_mm256_srli_epi16(v, 2 * q), low);
            if (bits == 3) {
                const __m256i third = spread(block + 64 + q * 8 - half * 28);
                quads[q] = _mm256_or_si256(quads[q], _mm256_and_si256(third, _mm256_set1_epi8(4)));
            }
        }
    }
}

// 4 digits, for each of 8 rows.
__m256i four_digits(const int8_t *at) {
    int four;
    memcpy(&four, at, 4);
    return _mm256_set1_epi32(four);
}

// 8 rows times 32 digits.
__m256i dot(const __m256i quads[8], const int8_t *digits) {
    __m256i sum = _mm256_setzero_si256();
    for (int q = 0; q < 8; q++) {
        sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(quads[q], four_digits(digits + 4 * q)));
    }
    return _mm256_madd_epi16(sum, _mm256_set1_epi16(1));
}

// 8 scales of weights.
__m256 load_scales(const bt_matrix &m, int64_t index) {
    if (m.scale_type == BT_F32) return _mm256_loadu_ps(static_cast<const float *>(m.scales) + index);
    const uint16_t *halves = static_cast<const uint16_t *>(m.scales) + index;
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(halves)));
}

// 8 bytes as floats.
__m256 load_bytes(const uint8_t *at) {
    return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(at))));
}

// 8 zero points.
__m256 load_zeros(const bt_matrix &m, int64_t index) {
    return m.zeros == nullptr ? _mm256_set1_ps(static_cast<float>(1 << (m.bits - 1))) : load_bytes(m.zeros + index);
}

// The first `count` lanes, for any count.
__m256i lanes(int count) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

// 8 floats of which `count` are there; the others are 0 and not read.
__m256 load_some(const float *at, int count) {
    return count >= 8 ? _mm256_loadu_ps(at) : _mm256_maskload_ps(at, lanes(count));
}

void store_some(float *at, int count, __m256 values) {
    if (count >= 8) _mm256_storeu_ps(at, values);
    else if (count > 0) _mm256_maskstore_ps(at, lanes(count), values);
}

float largest_of(__m256i magnitudes) {
    __m128i a = _mm_max_epi32(_mm256_castsi256_si128(magnitudes), _mm256_extracti128_si256(magnitudes, 1));
    a = _mm_max_epi32(a, _mm_shuffle_epi32(a, _MM_SHUFFLE(1, 0, 3, 2)));
    a = _mm_max_epi32(a, _mm_shuffle_epi32(a, _MM_SHUFFLE(2, 3, 0, 1)));
    return _mm_cvtss_f32(_mm_castsi128_ps(a));
}

int sum_of(__m256i v) {
    __m128i a = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    a = _mm_add_epi32(a, _mm_shuffle_epi32(a, _MM_SHUFFLE(1, 0, 3, 2)));
    a = _mm_add_epi32(a, _mm_shuffle_epi32(a, _MM_SHUFFLE(2, 3, 0, 1)));
    return _mm_cvtsi128_si32(a);
}

float sum_of(__m256 v) {
    __m128 a = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    a = _mm_add_ps(a, _mm_movehl_ps(a, a));
    return _mm_cvtss_f32(_mm_add_ss(a, _mm_movehdup_ps(a)));
}

// One chunk of `width` columns, `real` of them there; returns its scale.
float quantize(const float *x, int real, int width, int8_t *hi, int8_t *lo, float *sum) {
    const float limit = digit_limit(lo);
    __m256i magnitudes = _mm256_setzero_si256();
    for (int i = 0; i < real; i += 8) {
        const __m256i v = _mm256_castps_si256(load_some(x + i, real - i));
        magnitudes = _mm256_max_epi32(magnitudes, _mm256_and_si256(v, _mm256_set1_epi32(0x7fffffff)));
    }
    const float largest = largest_of(magnitudes), inverse = limit / largest;
    const int usable = inverse > 0 && inverse < __builtin_inff() ? real : 0;
    __m256i total = _mm256_setzero_si256();
    for (int i = 0; i < width; i += 16) {
        const __m256 factor = _mm256_set1_ps(inverse);
        __m256i a = _mm256_setzero_si256(), b = a;
        if (i < usable) a = _mm256_cvtps_epi32(_mm256_mul_ps(load_some(x + i, usable - i), factor));
        if (i + 8 < usable) b = _mm256_cvtps_epi32(_mm256_mul_ps(load_some(x + i + 8, usable - i - 8), factor));
        total = _mm256_add_epi32(total, _mm256_add_epi32(a, b));
        const __m256i digits = _mm256_permute4x64_epi64(_mm256_packs_epi32(a, b), _MM_SHUFFLE(3, 1, 2, 0));
        __m256i bytes = digits;
        if (lo != nullptr) {
            bytes = _mm256_srai_epi16(_mm256_add_epi16(digits, _mm256_set1_epi16(128)), 8);
            const __m256i low = _mm256_and_si256(digits, _mm256_set1_epi16(255));
            const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi16(low, low), _MM_SHUFFLE(3, 1, 2, 0));
            _mm_storeu_si128(reinterpret_cast<__m128i *>(lo + i), _mm256_castsi256_si128(packed));
        }
        const __m256i packed = _mm256_permute4x64_epi64(_mm256_packs_epi16(bytes, bytes), _MM_SHUFFLE(3, 1, 2, 0));
        _mm_storeu_si128(reinterpret_cast<__m128i *>(hi + i), _mm256_castsi256_si128(packed));
    }
    *sum = static_cast<float>(sum_of(total));
    return largest / limit;
}

constexpr int most_rows = 16;  // of x, that share an unpacking; their sums stay in L1

// 32 columns of a tile, or 16 where they are not whole, times the digits of some rows.
template <int bits, bool a16, int most>
inline void add_products(const uint8_t *block, bool whole, const int8_t *hi, const int8_t *lo, int64_t distance,
                         int rows, __m256i dots[most][2]) {
    for (int half = 0; half < 2; half++) {
        __m256i quads[8];
        unpack<bits>(block, half, quads);
        // The digits that follow a last block of 16 are there to be read, and times nothing.
        if (whole) unpack<bits>(block + bits * 32, half, quads + 4);
        else quads[4] = quads[5] = quads[6] = quads[7] = _mm256_setzero_si256();
        for (int row = 0; row < rows; row++) {
            __m256i sum = dot(quads, hi + row * distance);
            if (a16) sum = _mm256_add_epi32(_mm256_slli_epi32(sum, 8), dot(quads, lo + row * distance));
            dots[row][half] = _mm256_add_epi32(dots[row][half], sum);
        }
    }
}

// The same for one row, whose digits are more than registers can keep from one half to the other: both in turns.
template <int bits, bool a16>
inline void add_row(const uint8_t *block, bool whole, const int8_t *hi, const int8_t *lo, __m256i dots[2]) {
    __m256i upper[2], lower[2];
    upper[0] = upper[1] = lower[0] = lower[1] = _mm256_setzero_si256();
    for (int part = 0; part < (whole ? 2 : 1); part++, block += bits * 32) {
        __m256i quads[2][4];
        for (int half = 0; half < 2; half++) unpack<bits>(block, half, quads[half]);
        for (int q = 0; q < 4; q++) {
            const __m256i above = four_digits(hi + part * 16 + q * 4);
            for (int half = 0; half < 2; half++) {
                upper[half] = _mm256_add_epi16(upper[half], _mm256_maddubs_epi16(quads[half][q], above));
            }
            if (!a16) continue;
            const __m256i below = four_digits(lo + part * 16 + q * 4);
            for (int half = 0; half < 2; half++) {
                lower[half] = _mm256_add_epi16(lower[half], _mm256_maddubs_epi16(quads[half][q], below));
            }
        }
    }
    const __m256i ones = _mm256_set1_epi16(1);
    for (int half = 0; half < 2; half++) {
        __m256i sum = _mm256_madd_epi16(upper[half], ones);
        if (a16) sum = _mm256_add_epi32(_mm256_slli_epi32(sum, 8), _mm256_madd_epi16(lower[half], ones));
        dots[half] = _mm256_add_epi32(dots[half], sum);
    }
}

// 32 digits as int16: of each 4 columns the first and the third, which are a lane of `pairs[0]`, then the other two.
template <bool a16>
inline void widen_digits(const int8_t *hi, const int8_t *lo, __m256i pairs[2]) {
    const __m256i upper = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(hi));
    const __m256i lowest = a16 ? _mm256_loadu_si256(reinterpret_cast<const __m256i *>(lo)) : upper;
    pairs[0] = _mm256_srai_epi16(_mm256_slli_epi16(lowest, 8), 8);
    pairs[1] = _mm256_srai_epi16(lowest, 8);
    if (!a16) return;
    pairs[0] = _mm256_add_epi16(pairs[0], _mm256_slli_epi16(upper, 8));
    pairs[1] = _mm256_add_epi16(pairs[1], _mm256_andnot_si256(_mm256_set1_epi16(255), upper));
}

constexpr int wide_row = longest_chunk_a16 / 2;  // ints that widened digits of a chunk take

// 16 columns of codes of 8 bits times widened digits of some rows; both halves share what is read of those.
template <int most>
inline void add_wide(const uint8_t *block, const int (*digits)[wide_row], int from, int rows, __m256i dots[most][2]) {
    for (int q = 0; q < 4; q += 2, block += 128, from += 2) {
        __m256i even[2][2], odd[2][2];
        for (int i = 0; i < 2; i++) {
            for (int half = 0; half < 2; half++) {
                const __m256i codes = load_codes(block + i * 64 + half * 32);
                even[i][half] = _mm256_and_si256(codes, _mm256_set1_epi16(255));
                odd[i][half] = _mm256_srli_epi16(codes, 8);
            }
        }
        for (int row = 0; row < rows; row++) {
            for (int i = 0; i < 2; i++) {
                const __m256i a = _mm256_set1_epi32(digits[row][from + i]);
                const __m256i b = _mm256_set1_epi32(digits[row][from + i + 8]);
                for (int half = 0; half < 2; half++) {
                    const __m256i sum = _mm256_madd_epi16(even[i][half], a);
                    dots[row][half] = _mm256_add_epi32(dots[row][half], sum);
                    dots[row][half] = _mm256_add_epi32(dots[row][half], _mm256_madd_epi16(odd[i][half], b));
                }
            }
        }
    }
}

// Bytes that codes and scales are asked for ahead of their use, when one row leaves the memory little time.
constexpr int codes_ahead = 1024, scales_ahead = 256;

inline void prefetch(const void *data, int64_t offset) {
    _mm_prefetch(static_cast<const char *>(data) + offset, _MM_HINT_T0);
}

// One tile times at most `most` rows; with 1 the sums are registers.
template <int bits, bool a16, int most>
void multiply_tile(const bt_matrix &m, const Layout &l, const Input &input, int first_row, int given, int tile,
                   float *y, ptrdiff_t stride) {
    const int rows = most == 1 ? 1 : given;
    const uint8_t *block = static_cast<const uint8_t *>(m.codes) + tile * l.tile_bytes;
    const int8_t *hi = input.hi + first_row * input.digits, *lo = a16 ? input.lo + first_row * input.digits : nullptr;
    const float *scales = input.scales + static_cast<int64_t>(first_row) * l.chunks;
    const float *sums = input.sums + static_cast<int64_t>(first_row) * l.chunks;
    __m256 total[most][2], part[most][2];
    for (int row = 0; row < rows; row++) total[row][0] = total[row][1] = _mm256_setzero_ps();
    for (int group = 0; group < l.groups; group++) {
        const int64_t at = (static_cast<int64_t>(tile) * l.groups + group) * tile_rows;
        if (most == 1) prefetch(m.scales, at * (m.scale_type == BT_F32 ? 4 : 2) + scales_ahead);
        const __m256 zeros[2] = {load_zeros(m, at), load_zeros(m, at + 8)};
        const int filled = columns_of_group(l, group);
        for (int row = 0; row < rows; row++) part[row][0] = part[row][1] = _mm256_setzero_ps();
        for (int start = 0; start < filled; start += l.chunk, scales++, sums++) {
            const int width = filled - start < l.chunk ? filled - start : l.chunk;
            __m256i dots[most][2];
            for (int row = 0; row < rows; row++) dots[row][0] = dots[row][1] = _mm256_setzero_si256();
            alignas(32) int wide[bits == 8 ? most : 1][wide_row];
            for (int row = 0; bits == 8 && row < rows; row++) {
                for (int i = 0; i < width; i += step) {
                    const int64_t from = row * input.digits + i;
                    __m256i *to = reinterpret_cast<__m256i *>(wide[row] + i / 2);
                    widen_digits<a16>(hi + from, a16 ? lo + from : nullptr, to);
                }
            }
            for (int i = 0; i < width; i += step) {
                const uint8_t *at_step = block + i * bits * 2;
                if (most == 1) {
                    for (int line = 0; line < step * bits * 2; line += 64) prefetch(at_step, line + codes_ahead);
                }
                const bool whole = width - i >= step;
                if constexpr (bits == 8) {
                    add_wide<most>(at_step, wide, i / 2, rows, dots);
                    if (whole) add_wide<most>(at_step + bits * 32, wide, i / 2 + 4, rows, dots);
                } else if constexpr (most == 1) {
                    add_row<bits, a16>(at_step, whole, hi + i, a16 ? lo + i : nullptr, dots[0]);
                } else {
                    const int8_t *lo_step = a16 ? lo + i : nullptr;
                    add_products<bits, a16, most>(at_step, whole, hi + i, lo_step, input.digits, rows, dots);
                }
            }
            block += width * bits * 2;
            hi += width;
            if (a16) lo += width;
            for (int row = 0; row < rows; row++) {
                const int64_t index = static_cast<int64_t>(row) * l.chunks;
                const __m256 scale = _mm256_set1_ps(scales[index]), sum = _mm256_set1_ps(sums[index]);
                for (int half = 0; half < 2; half++) {
                    const __m256 centred = _mm256_fnmadd_ps(zeros[half], sum, _mm256_cvtepi32_ps(dots[row][half]));
                    part[row][half] = _mm256_fmadd_ps(scale, centred, part[row][half]);
                }
            }
        }
        const __m256 weights[2] = {load_scales(m, at), load_scales(m, at + 8)};
        for (int row = 0; row < rows; row++) {
            for (int half = 0; half < 2; half++) {
                total[row][half] = _mm256_fmadd_ps(part[row][half], weights[half], total[row][half]);
            }
        }
    }
    const int first = tile * tile_rows, real = m.out_features - first;
    for (int row = 0; row < rows; row++) {
        float *out = y + (first_row + row) * stride + first;
        store_some(out, real, total[row][0]);
        if (real > 8) store_some(out + 8, real - 8, total[row][1]);
    }
}

template <int bits, bool a16>
void multiply_rows(const bt_matrix &m, const Layout &l, const Input &input, int begin, int end, float *y,
                   ptrdiff_t stride) {
    for (int tile = begin; tile < end; tile++) {
        for (int row = 0; row < input.rows; row += most_rows) {
            const int rows = input.rows - row < most_rows ? input.rows - row : most_rows;
            if (rows == 1) multiply_tile<bits, a16, 1>(m, l, input, row, 1, tile, y, stride);
            else multiply_tile<bits, a16, most_rows>(m, l, input, row, rows, tile, y, stride);
        }
    }
}

template <int bits>
void multiply_bits(const bt_matrix &m, const Layout &l, const Input &input, int begin, int end, float *y,
                   ptrdiff_t stride) {
    if (input.lo != nullptr) multiply_rows<bits, true>(m, l, input, begin, end, y, stride);
    else multiply_rows<bits, false>(m, l, input, begin, end, y, stride);
}

void multiply(const bt_matrix &m, const Layout &l, const Input &input, int begin, int end, float *y,
              ptrdiff_t stride) {
    if (m.bits == 8) multiply_bits<8>(m, l, input, begin, end, y, stride);
    else if (m.bits == 4) multiply_bits<4>(m, l, input, begin, end, y, stride);
    else if (m.bits == 3) multiply_bits<3>(m, l, input, begin, end, y, stride);
    else multiply_bits<2>(m, l, input, begin, end, y, stride);
}

// 8 weights.
template <int type>
__m256 load_weights(const char *at) {
    if (type == BT_F32) return _mm256_loadu_ps(reinterpret_cast<const float *>(at));
    const __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i *>(at));
    return type == BT_F16 ? _mm256_cvtph_ps(v) : _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(v), 16));
}

// 4 features, the last one repeated where there are fewer, times some rows.
template <int type, int rows>
void multiply_four(const bt_matrix &m, const float *x, ptrdiff_t x_stride, int feature, int features, float *y,
                   ptrdiff_t y_stride) {
    constexpr int size = type == BT_F32 ? 4 : 2;
    const int64_t row_bytes = static_cast<int64_t>(m.in_features) * size;
    const char *weights[4];
    for (int f = 0; f < 4; f++) {
        weights[f] = static_cast<const char *>(m.codes) + (feature + (f < features ? f : features - 1)) * row_bytes;
    }
    __m256 sums[rows][4];
    for (int row = 0; row < rows; row++) {
        for (int f = 0; f < 4; f++) sums[row][f] = _mm256_setzero_ps();
    }
    const int whole = m.in_features / 8 * 8, rest = m.in_features - whole;
    for (int i = 0; i < whole; i += 8) {
        __m256 values[rows];
        for (int row = 0; row < rows; row++) values[row] = _mm256_loadu_ps(x + row * x_stride + i);
        for (int f = 0; f < 4; f++) {
            prefetch(weights[f], i * size + 4 * row_bytes);  // the next 4, whose rows may be short
            const __m256 w = load_weights<type>(weights[f] + i * size);
            for (int row = 0; row < rows; row++) sums[row][f] = _mm256_fmadd_ps(w, values[row], sums[row][f]);
        }
    }
    if (rest > 0) {
        for (int f = 0; f < 4; f++) {
            char some[32] = {};
            memcpy(some, weights[f] + whole * size, static_cast<size_t>(rest) * size);
            const __m256 w = load_weights<type>(some);
            for (int row = 0; row < rows; row++) {
                sums[row][f] = _mm256_fmadd_ps(w, load_some(x + row * x_stride + whole, rest), sums[row][f]);
            }
        }
    }
    for (int row = 0; row < rows; row++) {
        for (int f = 0; f < features; f++) y[row * y_stride + feature + f] = sum_of(sums[row][f]);
    }
}

template <int type>
void multiply_type(const bt_matrix &m, const float *x, ptrdiff_t x_stride, int rows, int begin, int end, float *y,
                   ptrdiff_t y_stride) {
    for (int feature = begin; feature < end; feature += 4) {
        const int features = end - feature < 4 ? end - feature : 4;
        for (int row = 0; row < rows; row += 3) {
            const auto some = rows - row >= 3   ? multiply_four<type, 3>
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

// 16 columns of 8 rows to out[row][column].
template <int bits>
void unpack_rows(const uint8_t *block, int half, uint8_t out[8][quantum]) {
    __m256i q[4];
    unpack<bits>(block, half, q);
    // A quad has 4 columns of a row in 32 bits: 4 x 8 of them, transposed.
    const __m256i a = _mm256_unpacklo_epi32(q[0], q[1]), b = _mm256_unpackhi_epi32(q[0], q[1]);
    const __m256i c = _mm256_unpacklo_epi32(q[2], q[3]), d = _mm256_unpackhi_epi32(q[2], q[3]);
    const __m256i rows[4] = {_mm256_unpacklo_epi64(a, c), _mm256_unpackhi_epi64(a, c), _mm256_unpacklo_epi64(b, d),
                             _mm256_unpackhi_epi64(b, d)};
    for (int r = 0; r < 4; r++) {
        _mm_storeu_si128(reinterpret_cast<__m128i *>(out[r]), _mm256_castsi256_si128(rows[r]));
        _mm_storeu_si128(reinterpret_cast<__m128i *>(out[r + 4]), _mm256_extracti128_si256(rows[r], 1));
    }
}

// Rows [begin, end) of one half of a tile.
template <int bits>
void dequantize_half(const bt_matrix &m, const Layout &l, int begin, int end, float *out) {
    const int tile = begin / tile_rows, half = begin % tile_rows / 8, first_row = begin % 8;
    const uint8_t *block = static_cast<const uint8_t *>(m.codes) + tile * l.tile_bytes;
    for (int group = 0; group < l.groups; group++) {
        const int64_t at = (static_cast<int64_t>(tile) * l.groups + group) * tile_rows + half * 8;
        float zeros[8], scales[8];
        _mm256_storeu_ps(zeros, load_zeros(m, at));
        _mm256_storeu_ps(scales, load_scales(m, at));
        const int first = group * m.group_size;
        const int there = m.in_features - first < m.group_size ? m.in_features - first : m.group_size;
        for (int start = 0; start < columns_of_group(l, group); start += quantum, block += bits * 32) {
            uint8_t codes[8][quantum];
            unpack_rows<bits>(block, half, codes);
            for (int row = begin; row < end; row++) {
                const int r = first_row + row - begin;
                const __m256 zero = _mm256_set1_ps(zeros[r]), scale = _mm256_set1_ps(scales[r]);
                float *to = out + static_cast<int64_t>(row - begin) * m.in_features + first + start;
                for (int i = 0; i < quantum && start + i < there; i += 8) {
                    const __m256 centred = _mm256_sub_ps(load_bytes(codes[r] + i), zero);
                    store_some(to + i, there - start - i, _mm256_mul_ps(centred, scale));
                }
            }
        }
    }
}

void dequantize(const bt_matrix &m, const Layout &l, int begin, int end, float *out) {
    const auto one = m.bits == 8   ? dequantize_half<8>
                     : m.bits == 4 ? dequantize_half<4>
                     : m.bits == 3 ? dequantize_half<3>
                                   : dequantize_half<2>;
    for (int row = begin, next; row < end; row = next) {
        next = row / 8 * 8 + 8 < end ? row / 8 * 8 + 8 : end;
        one(m, l, row, next, out + static_cast<int64_t>(row - begin) * m.in_features);
    }
}

}  // namespace

const Kernels kernels_avx2 = {quantize, multiply, multiply_dense, dequantize, &ops};

}  // namespace bittern
