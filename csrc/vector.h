// A register of floats in the compiler's own vector type, as wide as the instruction set has them.
//
// For files that are compiled once per instruction set. Everything is static, so that no code of a newer instruction
// set can leak into an older one.
#ifndef BITTERN_VECTOR_H
#define BITTERN_VECTOR_H

#include <cstdint>
#include <cstring>

namespace bittern {

namespace {

namespace wide {

// f of every lane's number, a list.
#if defined(__AVX512F__)
constexpr int lanes = 16;
#define BITTERN_LANES(f) \
    f(0), f(1), f(2), f(3), f(4), f(5), f(6), f(7), f(8), f(9), f(10), f(11), f(12), f(13), f(14), f(15)
#elif defined(__AVX2__)
constexpr int lanes = 8;
#define BITTERN_LANES(f) f(0), f(1), f(2), f(3), f(4), f(5), f(6), f(7)
#else
constexpr int lanes = 4;
#define BITTERN_LANES(f) f(0), f(1), f(2), f(3)
#endif

typedef float Floats __attribute__((vector_size(4 * lanes)));
typedef int32_t Ints __attribute__((vector_size(4 * lanes)));

inline Floats load(const float *p) {
    Floats v;
    memcpy(&v, p, sizeof v);
    return v;
}
inline void store(float *p, Floats v) { memcpy(p, &v, sizeof v); }
inline Floats all(float x) { return x - Floats{}; }
inline Floats floats_of(Ints v) { return reinterpret_cast<Floats>(v); }
inline Ints bits_of(Floats v) { return reinterpret_cast<Ints>(v); }
inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }

#define BITTERN_SAME(l) l
constexpr Ints lane_numbers = {BITTERN_LANES(BITTERN_SAME)};

// Lane l takes that of l with one bit changed.
#define BITTERN_OTHER(l) (l) ^ H
template <int H>
inline float largest_lane(Floats v) {
    v = larger(v, __builtin_shufflevector(v, v, BITTERN_LANES(BITTERN_OTHER)));
    if constexpr (H > 1) return largest_lane<H / 2>(v);
    return v[0];
}
template <int H>
inline float sum_of_lanes(Floats v) {
    v += __builtin_shufflevector(v, v, BITTERN_LANES(BITTERN_OTHER));
    if constexpr (H > 1) return sum_of_lanes<H / 2>(v);
    return v[0];
}
inline float largest_lane(Floats v) { return largest_lane<lanes / 2>(v); }
inline float sum_of_lanes(Floats v) { return sum_of_lanes<lanes / 2>(v); }

// A square of `lanes` rows: in every square of 2 H the off-diagonal squares of H change places, H halving.
#define BITTERN_UPPER(l) ((l) & H) != 0 ? lanes + (l) - H : (l)
#define BITTERN_LOWER(l) ((l) & H) != 0 ? lanes + (l) : (l) + H
template <int H>
inline void transpose(Floats rows[lanes]) {
#pragma GCC unroll 16
    for (int i = 0; i < lanes; i++) {
        if ((i & H) != 0) continue;
        const Floats a = rows[i], b = rows[i + H];
        rows[i] = __builtin_shufflevector(a, b, BITTERN_LANES(BITTERN_UPPER));
        rows[i + H] = __builtin_shufflevector(a, b, BITTERN_LANES(BITTERN_LOWER));
    }
    if constexpr (H > 1) transpose<H / 2>(rows);
}

// e^x within 2 ulp; 0 below the smallest normal number, NaN for NaN.
//
// x = n ln 2 + r with |r| <= ln 2 / 2, ln 2 in two parts so that r is exact enough; a polynomial for e^r (Taylor's to
// the 7th power: the rest is 5e-9 of it); 2^n through the exponent's bits in two halves, since n may be 128.
inline Floats exponential(Floats x) {
    const Floats clamped_low = x < -88.0f ? all(-88.0f) : x;
    const Floats clamped = clamped_low > 89.0f ? all(89.0f) : clamped_low;
    const Floats magic = all(0x1.8p23f);  // adding it leaves the nearest integer in the low bits
    const Floats shifted = clamped * 1.44269504f + magic;
    const Floats n = shifted - magic;
    Floats r = clamped - n * 0x1.62e4p-1f;
    r = r + n * -1.4286068203e-6f;  // ln 2 = 0x1.62e4p-1 + 1.4286068203e-6
    Floats p = all(1.0f / 5040);
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = (p * r) * r + r;
    p = p + 1.0f;
    const Ints exponent = bits_of(shifted) - 0x4b400000;
    const Ints half = exponent >> 1;
    p = p * floats_of((half + 127) << 23) * floats_of((exponent - half + 127) << 23);
    return x < -87.3365f ? all(0.0f) : p;
}

inline Floats sigmoid(Floats x) { return 1.0f / (1.0f + exponential(-x)); }

// limit * tanh(x / limit); near 0, where the difference below would cancel, by its series (the rest is 5e-8 of it).
inline Floats capped(Floats x, float limit) {
    const Floats u = x * (1.0f / limit), square = u * u;
    const Floats series = x - x * square * (1.0f / 3 - square * (2.0f / 15));
    const Floats far = limit - 2.0f * limit / (1.0f + exponential(2.0f * u));
    return square < 0.01f ? series : far;
}

// The tail of an array.
inline Floats load_some(const float *p, int count) {
    Floats v = {};
    memcpy(&v, p, static_cast<size_t>(count) * sizeof(float));
    return v;
}
inline void store_some(float *p, Floats v, int count) { memcpy(p, &v, static_cast<size_t>(count) * sizeof(float)); }

}  // namespace wide

}  // namespace

}  // namespace bittern

#endif
