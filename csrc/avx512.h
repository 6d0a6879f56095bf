// What the AVX-512 kernels and those with AMX share. Static: each file has a copy of its own.
#ifndef BITTERN_AVX512_H
#define BITTERN_AVX512_H

#include <cstring>

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12 warns of its own _mm512_undefined_*
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

#include "kernels.h"

namespace bittern {

namespace {

constexpr int strip_tiles = 4;  // tiles that are unpacked together when x has several rows
constexpr int most_quads = longest_chunk_a16 / 4;

// Quads of one chunk of a strip, a byte a code.
struct alignas(64) Strip {
    uint8_t codes[strip_tiles][most_quads][64];
};

inline int least(int a, int b) { return a < b ? a : b; }

// How many quads a line of 64 bytes holds, and the bytes of a block of 16 columns.
template <int Bits>
constexpr int quads_of_line = Bits == 8 ? 1 : Bits == 4 ? 2 : 4;
template <int Bits>
constexpr int block_bytes = Bits * 32;

// A line as quads of u8 codes.
template <int Bits>
inline void unpack(const uint8_t *line, __m512i quads[quads_of_line<Bits>]) {
    __m512i all = _mm512_loadu_si512(line);
    if constexpr (Bits == 8) {
        quads[0] = all;
    } else if constexpr (Bits == 4) {
        asm("" : "+v"(all));  // or GCC reads it twice, and loads are as scarce here as arithmetic
        quads[0] = _mm512_and_si512(all, _mm512_set1_epi8(15));
        quads[1] = _mm512_and_si512(_mm512_srli_epi16(all, 4), _mm512_set1_epi8(15));
    } else {
        asm("" : "+v"(all));
        const __m512i pair = _mm512_set1_epi8(3);
        quads[0] = _mm512_and_si512(all, pair);
        for (int q = 1; q < 4; q++) quads[q] = _mm512_and_si512(_mm512_srli_epi16(all, 2 * q), pair);
        if constexpr (Bits == 3) {
            for (int q = 0; q < 4; q++) {
                uint64_t third;
                memcpy(&third, line + 64 + 8 * q, 8);
                quads[q] = _mm512_mask_add_epi8(quads[q], third, quads[q], _mm512_set1_epi8(4));
            }
        }
    }
}

// `width` columns of a tile.
template <int Bits>
inline void unpack_chunk(const uint8_t *block, int width, uint8_t codes[][64]) {
    for (int quad = 0; quad < width / 4; quad += 4, block += block_bytes<Bits>) {
        for (int q = 0; q < 4; q += quads_of_line<Bits>) {
            __m512i quads[quads_of_line<Bits>];
            unpack<Bits>(block + q / quads_of_line<Bits> * 64, quads);
            for (int p = 0; p < quads_of_line<Bits>; p++) _mm512_store_si512(codes[quad + q + p], quads[p]);
        }
    }
}

inline __m512 load_scales(const bt_matrix &m, int64_t at) {
    if (m.scale_type == BT_F32) return _mm512_loadu_ps(static_cast<const float *>(m.scales) + at);
    return _mm512_cvtph_ps(_mm256_loadu_si256(
        reinterpret_cast<const __m256i *>(static_cast<const uint16_t *>(m.scales) + at)));
}

inline __m512i load_zeros(const bt_matrix &m, int64_t at) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(m.zeros + at)));
}

// The mask of the first `count` of 16 lanes, of none when it is negative.
inline __mmask16 first_lanes(int count) {
    return count >= 16 ? 0xffff : static_cast<__mmask16>((1u << (count > 0 ? count : 0)) - 1);
}

inline void store_features(const bt_matrix &m, int tile, __m512 values, float *y) {
    _mm512_mask_storeu_ps(y + tile * tile_rows, first_lanes(m.out_features - tile * tile_rows), values);
}

}  // namespace

}  // namespace bittern

#endif
