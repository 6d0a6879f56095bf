// Attention of a few query rows to one piece of keys. Included by ops.h, so compiled once per instruction set.
//
// Keys are kept in panels of 16 positions, [position / 16][element][position % 16], so that scores are outer products
// like everything else here: no sums across a register. Values are plain rows. Both are `width` floats wide, a multiple
// of 16 with zeros behind the head. The softmax is an online one over blocks of 64 keys; a row's result depends on its
// own query and keys only, not on the rows beside it.
#ifndef BITTERN_FLASH_H
#define BITTERN_FLASH_H

#include "vector.h"
#include "vector_ops.h"

namespace bittern {

namespace {

namespace wide {

// Everything comes in units of 16 floats, a panel's row: one register or several.
constexpr int unit = panel_keys, registers = unit / lanes;

// Units side by side that so many rows of accumulators leave registers for.
#if defined(__AVX512F__)
constexpr int side_by_side(int) { return 4; }
constexpr int most_rows = 6;
#elif defined(__AVX2__)
constexpr int side_by_side(int rows) { return rows <= 3 ? 2 : 1; }
constexpr int most_rows = 6;
#else
constexpr int side_by_side(int) { return 1; }
#if defined(__aarch64__)
constexpr int most_rows = 6;
#else
constexpr int most_rows = 3;
#endif
#endif

// c[r][unit u] = c * keep + sum over k of a[r][k] * b[k][unit u], with b's units at k * step + u * next.
template <int R, int N>
inline void tile(const float *a, ptrdiff_t a_stride, const float *b, ptrdiff_t step, ptrdiff_t next, int depth,
                 bool keep, float *c, ptrdiff_t c_stride) {
    constexpr int vectors = N * registers;
    Floats sums[R][vectors];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
#pragma GCC unroll 8
        for (int v = 0; v < vectors; v++) sums[r][v] = keep ? load(c + r * c_stride + v * lanes) : Floats{};
    }
    for (int k = 0; k < depth; k++) {
        Floats right[vectors];
#pragma GCC unroll 8
        for (int v = 0; v < vectors; v++) right[v] = load(b + k * step + v / registers * next + v % registers * lanes);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            const Floats left = all(a[r * a_stride + k]);
#pragma GCC unroll 8
            for (int v = 0; v < vectors; v++) sums[r][v] += left * right[v];
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
#pragma GCC unroll 8
        for (int v = 0; v < vectors; v++) store(c + r * c_stride + v * lanes, sums[r][v]);
    }
}

template <int R>
void strip(const float *a, ptrdiff_t a_stride, const float *b, ptrdiff_t step, ptrdiff_t next, int depth, bool keep,
           int units, float *c, ptrdiff_t c_stride) {
    constexpr int N = side_by_side(R);
    int u = 0;
    for (; u + N <= units; u += N) {
        tile<R, N>(a, a_stride, b + u * next, step, next, depth, keep, c + u * unit, c_stride);
    }
    for (; u < units; u++) tile<R, 1>(a, a_stride, b + u * next, step, next, depth, keep, c + u * unit, c_stride);
}

void multiply_rows(const float *a, ptrdiff_t a_stride, int rows, const float *b, ptrdiff_t step, ptrdiff_t next,
                   int depth, bool keep, int units, float *c, ptrdiff_t c_stride) {
    while (rows > 0) {
        const int some = rows < most_rows ? rows : most_rows;
        switch (some) {
            case 1: strip<1>(a, a_stride, b, step, next, depth, keep, units, c, c_stride); break;
            case 2: strip<2>(a, a_stride, b, step, next, depth, keep, units, c, c_stride); break;
            case 3: strip<3>(a, a_stride, b, step, next, depth, keep, units, c, c_stride); break;
            case 4: strip<4>(a, a_stride, b, step, next, depth, keep, units, c, c_stride); break;
            case 5: strip<5>(a, a_stride, b, step, next, depth, keep, units, c, c_stride); break;
            default: strip<6>(a, a_stride, b, step, next, depth, keep, units, c, c_stride); break;
        }
        rows -= some;
        a += some * a_stride;
        c += some * c_stride;
    }
}

// Cached values as floats, int8 without their scales. In loops, which GCC vectorizes better than its own conversions of
// vectors.
inline const float *widen(int type, const void *from, int64_t at, int count, float *__restrict room) {
    if (type == BT_F32) return static_cast<const float *>(from) + at;
    if (type == BT_BF16) {
        const uint16_t *__restrict halves = static_cast<const uint16_t *>(from) + at;
        for (int i = 0; i < count; i++) {
            const uint32_t bits = static_cast<uint32_t>(halves[i]) << 16;
            memcpy(room + i, &bits, sizeof bits);
        }
    } else {
        const int8_t *__restrict bytes = static_cast<const int8_t *>(from) + at;
        for (int i = 0; i < count; i++) room[i] = static_cast<float>(bytes[i]);
    }
    return room;
}

// Keys that lie in rows as panels of `width` floats a key.
void make_panels(const HeadCache &cache, int begin, int count, int width, float *room) {
    const float *from = static_cast<const float *>(cache.keys) + begin * cache.key_stride;
    const int filled = round_up(count, panel_keys);
    for (int key = 0; key < filled; key += lanes, from += lanes * cache.key_stride) {
        float *to = room + key / panel_keys * panel_keys * width + key % panel_keys;
        for (int i = 0; i < width; i += lanes) {
            Floats rows[lanes];
            const int there = cache.size - i < lanes ? cache.size - i : lanes;
#pragma GCC unroll 16
            for (int k = 0; k < lanes; k++) {
                const float *row = from + k * cache.key_stride + i;
                const bool none = key + k >= count || there <= 0;
                rows[k] = none ? Floats{} : there == lanes ? load(row) : load_some(row, there);
            }
            transpose<lanes / 2>(rows);
#pragma GCC unroll 16
            for (int k = 0; k < lanes; k++) store(to + (i + k) * panel_keys, rows[k]);
        }
    }
}

// Keys [begin, begin + count) as panels of floats, begin a multiple of 16: where they are, or in `room`.
const float *key_panels(const HeadCache &cache, int begin, int count, int width, float *room) {
    if (cache.key_stride != 0) {
        make_panels(cache, begin, count, width, room);
        return room;
    }
    const int floats = round_up(count, panel_keys) * width;
    return widen(cache.type, cache.keys, static_cast<int64_t>(begin) * width, floats, room);
}

// Values [begin, begin + count) as rows of `width` floats: where they are, or in `room`.
const float *value_rows(const HeadCache &cache, int begin, int count, int width, float *room) {
    if (cache.key_stride == 0) {
        return widen(cache.type, cache.values, static_cast<int64_t>(begin) * width, count * width, room);
    }
    const float *from = static_cast<const float *>(cache.values) + begin * cache.value_stride;
    if (cache.value_stride == width) return from;
    for (int key = 0; key < count; key++, from += cache.value_stride) {
        for (int i = 0; i < width; i++) room[key * width + i] = i < cache.size ? from[i] : 0.0f;
    }
    return room;
}

// Scores of a row to weights, its state brought up to them. Keys outside [low, high) of the block are not seen. The
// scales are those of int8 keys and values, or null.
inline void soften(float *scores, int low, int high, const float *key_scales, const float *value_scales,
                   const float *slope, float distance, float limit, int width, float *state) {
    constexpr int vectors = block_keys / lanes;
    const Floats nothing = all(-__builtin_inff());
    Floats v[vectors], top = nothing;
    for (int j = 0; j < vectors; j++) {
        v[j] = load(scores + j * lanes);
        if (key_scales != nullptr) v[j] *= load(key_scales + j * lanes);
        if (limit > 0) v[j] = capped(v[j], limit);
        const Ints key = lane_numbers + j * lanes;
        // distance is that of the block's first key to the query, at most 0
        if (slope != nullptr) v[j] += *slope * (__builtin_convertvector(key, Floats) + distance);
        if (low > 0) v[j] = key < low ? nothing : v[j];
        if (high < block_keys) v[j] = key >= high ? nothing : v[j];
        top = larger(v[j], top);
    }
    float *largest = state + width + unit;
    const float found = largest_lane(top);
    Floats sums = load(state + width);
    if (found > *largest) {
        const Floats factor = exponential(all(*largest - found));
        for (int i = 0; i < width; i += lanes) store(state + i, load(state + i) * factor);
        sums *= factor;
        *largest = found;
    }
    for (int j = 0; j < vectors; j++) {
        v[j] = exponential(v[j] - *largest);
        sums += v[j];
        if (value_scales != nullptr) v[j] *= load(value_scales + j * lanes);
        store(scores + j * lanes, v[j]);
    }
    store(state + width, sums);
}

}  // namespace wide

// One piece, keys [begin, end), from an empty state: attention of the rows to those keys that each of them sees.
// `state` is [count][width + state_extra].
void attend(const Queries &q, const HeadCache &cache, int begin, int end, float *state, float *scratch) {
    using namespace wide;
    const int width = q.width, stride = width + state_extra;
    float *scores = scratch, *key_room = scores + q.count * block_keys, *value_room = key_room + width * block_keys;
    for (int row = 0; row < q.count; row++) {
        memset(state + row * stride, 0, static_cast<size_t>(stride) * sizeof(float));
        state[row * stride + width + unit] = -__builtin_inff();
    }
    const int last = q.position + (q.count - 1) / q.repeat;
    if (end > last + 1) end = last + 1;
    if (q.window > 0 && begin < q.position - q.window + 1) {
        begin = (q.position - q.window + 1) / block_keys * block_keys;
    }
    for (int block = begin; block < end; block += block_keys) {
        const int count = end - block < block_keys ? end - block : block_keys;
        const float *keys = key_panels(cache, block, count, width, key_room);
        const int panels = (count + panel_keys - 1) / panel_keys;
        const float *key_scales = cache.key_scales == nullptr ? nullptr : cache.key_scales + block;
        const float *value_scales = cache.value_scales == nullptr ? nullptr : cache.value_scales + block;
        multiply_rows(q.rows, width, q.count, keys, unit, static_cast<ptrdiff_t>(unit) * width, width, false, panels,
                      scores, block_keys);
        for (int row = 0; row < q.count; row++) {
            const int token = q.position + row / q.repeat;
            const int high = token + 1 - block < count ? token + 1 - block : count;
            const int low = q.window > 0 ? token - q.window + 1 - block : 0;
            if (high <= 0 || low >= high) {
                memset(scores + row * block_keys, 0, block_keys * sizeof(float));
            } else {
                soften(scores + row * block_keys, low, high, key_scales, value_scales,
                       q.slopes == nullptr ? nullptr : q.slopes + row % q.repeat, static_cast<float>(block - token),
                       q.cap, width, state + row * stride);
            }
        }
        const float *values = value_rows(cache, block, count, width, value_room);
        multiply_rows(scores, block_keys, q.count, values, width, unit, count, true, width / unit, state, stride);
    }
}

// The states of two pieces, `piece` being the later one.
void merge(const float *piece, int rows, int width, float *state) {
    using namespace wide;
    const int stride = width + state_extra, top = width + unit;
    for (int row = 0; row < rows; row++, piece += stride, state += stride) {
        const float earlier = state[top], later = piece[top];
        const float largest = later > earlier ? later : earlier;
        if (later == -__builtin_inff()) continue;  // it saw none of those keys
        const Floats keep = exponential(all(earlier - largest)), take = exponential(all(later - largest));
        for (int i = 0; i < top; i += lanes) store(state + i, load(state + i) * keep + load(piece + i) * take);
        state[top] = largest;
    }
}

void finish(const float *state, int size, int width, float *out) {
    const float factor = 1.0f / wide::sum_of_lanes(wide::load(state + width));
#pragma omp simd
    for (int i = 0; i < size; i++) out[i] = state[i] * factor;
}

}  // namespace

}  // namespace bittern

#endif
