// AMX for many rows of x: 16 rows times 16 features times 64 columns in one instruction. Few rows go to AVX-512.
//
// A strip's quads of 64 columns are a tile register as they are. Zeros are subtracted while unpacking, so that a dot
// product needs no correction; all but 8-bit codes with zeros of their own fit into int8 then, and those keep a rest.
#include <type_traits>

#include "avx512.h"
#include "ops.h"

namespace bittern {

namespace {

constexpr int fewest_rows = 16;  // of x; also the rows of a tile register
constexpr int tile_columns = 64;
constexpr int most_columns = 1024;  // unpacked together, chunks filled up to tile registers: 64 KB of the L2 cache
constexpr int most_chunks = most_columns / tile_columns;

// Registers: upper and lower digits of x, codes; sums of both for even and for odd chunks, so that the products of one
// chunk overlap with storing the other's. Macros, since GCC wants literal numbers.
#define X_HIGH 0
#define X_LOW 1
#define CODES 2
#define EVEN_HIGH 4
#define EVEN_LOW 5
#define ODD_HIGH 6
#define ODD_LOW 7

// What the tile registers look like: all are 16 rows of 64 bytes. Constant memory, since GCC 12 believes that
// _tile_loadconfig reads 8 bytes of it and drops stores to the others.
struct alignas(64) Configuration {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
};
const Configuration configuration = {
    1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

struct alignas(64) Sums {
    int32_t high[16][tile_rows], low[16][tile_rows];
};

// Some chunks of a strip, unpacked.
struct alignas(64) Segment {
    int8_t codes[strip_tiles][most_columns / 4][64];
    __m512 weight_scales[strip_tiles][most_chunks];
    __m512i rests[strip_tiles][most_chunks];  // zero - 128
    int chunks, first_chunk;                  // of them, and where they begin in a row
    int columns[most_chunks], offsets[most_chunks + 1];  // of a chunk: where it begins in a row and in `codes`
};

// Where a strip's next chunk is.
struct Position {
    int group, column_of_group, column, chunk;
};

// zero, of every row of a tile, for each of its 4 columns.
inline __m512i zero_bytes(const bt_matrix &m, int64_t at) {
    if (m.zeros == nullptr || m.bits == 8) return _mm512_set1_epi8(static_cast<char>(1 << (m.bits - 1)));
    return _mm512_mullo_epi32(load_zeros(m, at), _mm512_set1_epi32(0x01010101));
}

// Columns up to a multiple of a tile register's are filled up with zeros.
template <int Bits>
inline void unpack_signed(const uint8_t *block, int width, __m512i zeros, int8_t codes[][64]) {
    unpack_chunk<Bits>(block, width, reinterpret_cast<uint8_t(*)[64]>(codes));
    for (int quad = 0; quad < width / 4; quad++) {
        _mm512_store_si512(codes[quad], _mm512_sub_epi8(_mm512_load_si512(codes[quad]), zeros));
    }
    for (int quad = width / 4; quad % 16 != 0; quad++) _mm512_store_si512(codes[quad], _mm512_setzero_si512());
}

// The chunks of a strip from one on, as many as fit. Tiles that are not there repeat the last one.
template <int Bits>
void unpack_segment(const bt_matrix &m, const Layout &l, int tile, int tiles, Position *at, Segment *s) {
    s->chunks = 0;
    s->first_chunk = at->chunk;
    s->offsets[0] = 0;
    for (; at->group < l.groups; s->chunks++) {
        const int columns = columns_of_group(l, at->group), width = least(columns - at->column_of_group, l.chunk);
        const int c = s->chunks, offset = s->offsets[c], next = offset + round_up(width, tile_columns);
        if (next > most_columns) break;
        for (int t = 0; t < strip_tiles; t++) {
            const int from = tile + least(t, tiles - 1);
            const int64_t scale = (static_cast<int64_t>(from) * l.groups + at->group) * tile_rows;
            s->weight_scales[t][c] = load_scales(m, scale);
            if (Bits == 8 && m.zeros != nullptr) {
                s->rests[t][c] = _mm512_sub_epi32(load_zeros(m, scale), _mm512_set1_epi32(128));
            }
            const uint8_t *block = static_cast<const uint8_t *>(m.codes) + from * l.tile_bytes;
            unpack_signed<Bits>(block + at->column / quantum * block_bytes<Bits>, width, zero_bytes(m, scale),
                                s->codes[t] + offset / 4);
        }
        s->columns[c] = at->column;
        s->offsets[c + 1] = next;
        at->column += width;
        at->column_of_group += width;
        at->chunk++;
        if (at->column_of_group == columns) {
            at->column_of_group = 0;
            at->group++;
        }
    }
}

// Dot products of 16 rows of x and a tile over one chunk, into registers.
template <bool Odd, bool Lo>
inline void multiply_chunk(const int8_t *hi, const int8_t *lo, int64_t stride, const int8_t codes[][64], int columns) {
    if constexpr (Odd) {
        _tile_zero(ODD_HIGH);
        _tile_zero(ODD_LOW);
    } else {
        _tile_zero(EVEN_HIGH);
        _tile_zero(EVEN_LOW);
    }
    for (int i = 0; i < columns; i += tile_columns) {
        _tile_loadd(CODES, codes[i / 4], 64);
        _tile_loadd(X_HIGH, hi + i, stride);
        if constexpr (Odd) _tile_dpbssd(ODD_HIGH, X_HIGH, CODES);
        else _tile_dpbssd(EVEN_HIGH, X_HIGH, CODES);
        if constexpr (Lo) {
            _tile_loadd(X_LOW, lo + i, stride);
            if constexpr (Odd) _tile_dpbssd(ODD_LOW, X_LOW, CODES);
            else _tile_dpbssd(EVEN_LOW, X_LOW, CODES);
        }
    }
}

template <bool Odd, bool Lo>
inline void store_sums(Sums *sums) {
    if constexpr (Odd) {
        _tile_stored(ODD_HIGH, sums->high, 64);
        if constexpr (Lo) _tile_stored(ODD_LOW, sums->low, 64);
    } else {
        _tile_stored(EVEN_HIGH, sums->high, 64);
        if constexpr (Lo) _tile_stored(EVEN_LOW, sums->low, 64);
    }
}

// totals += weight scale * x scale * dot product. `scales` and `digit_sums` are those of the first row; rest is null
// where it is zero.
template <bool Lo>
inline void add_sums(const Sums &sums, const float *scales, const float *digit_sums, int stride, __m512 weight_scale,
                     const __m512i *rest, __m512 totals[16]) {
#pragma GCC unroll 16
    for (int r = 0; r < 16; r++) {
        __m512i dot = _mm512_load_si512(sums.high[r]);
        if constexpr (Lo) dot = _mm512_add_epi32(_mm512_slli_epi32(dot, 8), _mm512_load_si512(sums.low[r]));
        if (rest != nullptr) {
            const __m512i digits = _mm512_cvtps_epi32(_mm512_set1_ps(digit_sums[r * stride]));
            dot = _mm512_sub_epi32(dot, _mm512_mullo_epi32(*rest, digits));
        }
        const __m512 product = _mm512_mul_ps(_mm512_cvtepi32_ps(dot), _mm512_set1_ps(scales[r * stride]));
        totals[r] = _mm512_fmadd_ps(product, weight_scale, totals[r]);
    }
}

// 16 rows of x from `row` on times a tile of a segment. A chunk's products, storing its sums and using them are three
// steps, each of which works on another chunk.
template <bool Lo, bool Rest>
void multiply_tile(const Layout &l, const Input &x, int row, const Segment &s, int t, __m512 results[16]) {
    Sums sums[4];  // two would do, but what is stored shall have reached memory
    __m512 totals[16];
#pragma GCC unroll 16
    for (int r = 0; r < 16; r++) totals[r] = results[r];
    const int8_t *hi = x.hi + row * x.digits, *lo = Lo ? x.lo + row * x.digits : hi;
    const float *scales = x.scales + static_cast<int64_t>(row) * l.chunks + s.first_chunk;
    const float *digit_sums = x.sums + static_cast<int64_t>(row) * l.chunks + s.first_chunk;
    auto step = [&](auto odd, int c) __attribute__((always_inline)) {
        if (c < s.chunks) {
            multiply_chunk<odd, Lo>(hi + s.columns[c], lo + s.columns[c], x.digits, s.codes[t] + s.offsets[c] / 4,
                                    s.offsets[c + 1] - s.offsets[c]);
        }
        if (c > 0 && c <= s.chunks) store_sums<!odd, Lo>(&sums[(c - 1) & 3]);
        if (c >= 2) {
            add_sums<Lo>(sums[(c - 2) & 3], scales + c - 2, digit_sums + c - 2, l.chunks, s.weight_scales[t][c - 2],
                         Rest ? &s.rests[t][c - 2] : nullptr, totals);
        }
    };
    for (int c = 0; c < s.chunks + 2; c += 2) {
        step(std::false_type(), c);
        if (c + 1 < s.chunks + 2) step(std::true_type(), c + 1);
    }
#pragma GCC unroll 16
    for (int r = 0; r < 16; r++) results[r] = totals[r];
}

// All rows times `tiles` tiles, at most a strip.
template <int Bits, bool Lo, bool Rest>
void multiply_strip(const bt_matrix &m, const Layout &l, const Input &x, int tile, int tiles, float *y,
                    ptrdiff_t stride) {
    Segment segment;
    Position at = {};
    for (bool first = true; at.group < l.groups; first = false) {
        unpack_segment<Bits>(m, l, tile, tiles, &at, &segment);
        asm volatile("" : : : "memory");  // GCC 12 does not know that _tile_loadd reads memory
        for (int start = 0; start < x.rows; start += 16) {
            // Where rows are no multiple of 16 the last 16 overlap those before, and only the others are kept.
            const int row = least(start, x.rows - 16);
            for (int t = 0; t < tiles; t++) {
                float *out = y + row * stride + (tile + t) * tile_rows;
                const __mmask16 features = first_lanes(m.out_features - (tile + t) * tile_rows);
                __m512 totals[16];
                for (int r = 0; r < 16; r++) {
                    totals[r] = _mm512_maskz_loadu_ps(first ? 0 : features, out + r * stride);
                }
                multiply_tile<Lo, Rest>(l, x, row, segment, t, totals);
                for (int r = start - row; r < 16; r++) _mm512_mask_storeu_ps(out + r * stride, features, totals[r]);
            }
        }
    }
}

template <int Bits, bool Lo>
void multiply_bits(const bt_matrix &m, const Layout &l, const Input &x, int begin, int end, float *y,
                   ptrdiff_t stride) {
    const bool rest = Bits == 8 && m.zeros != nullptr;
    const auto strip = rest ? multiply_strip<Bits, Lo, Bits == 8> : multiply_strip<Bits, Lo, false>;
    for (int tile = begin; tile < end; tile += strip_tiles) {
        strip(m, l, x, tile, least(end - tile, strip_tiles), y, stride);
    }
}

void multiply(const bt_matrix &m, const Layout &l, const Input &input, int begin, int end, float *y,
              ptrdiff_t stride) {
    if (input.rows < fewest_rows) {
        kernels_avx512.multiply(m, l, input, begin, end, y, stride);
        return;
    }
    _tile_loadconfig(&configuration);
    const bool lo = input.lo != nullptr;
    const auto bits = m.bits == 8   ? (lo ? multiply_bits<8, true> : multiply_bits<8, false>)
                      : m.bits == 4 ? (lo ? multiply_bits<4, true> : multiply_bits<4, false>)
                      : m.bits == 3 ? (lo ? multiply_bits<3, true> : multiply_bits<3, false>)
                                    : (lo ? multiply_bits<2, true> : multiply_bits<2, false>);
    bits(m, l, input, begin, end, y, stride);
    _tile_release();
}

// The rest is AVX-512's, called rather than copied: copying the table would be code that runs when the library is
// loaded, on any machine.
float quantize(const float *x, int real, int width, int8_t *hi, int8_t *lo, float *sum) {
    return kernels_avx512.quantize(x, real, width, hi, lo, sum);
}

void multiply_dense(const bt_matrix &m, const float *x, ptrdiff_t x_stride, int rows, int begin, int end, float *y,
                    ptrdiff_t y_stride) {
    kernels_avx512.multiply_dense(m, x, x_stride, rows, begin, end, y, y_stride);
}

void dequantize(const bt_matrix &m, const Layout &l, int begin, int end, float *out) {
    kernels_avx512.dequantize(m, l, begin, end, out);
}

}  // namespace

const Kernels kernels_amx = {quantize, multiply, multiply_dense, dequantize, &ops};

}  // namespace bittern
