// 16-bit floats to 32 bits, for code without instructions for it. Static: every file compiles a copy of its own.
#ifndef BITTERN_HALF_H
#define BITTERN_HALF_H

#include <cstdint>
#include <cstring>

namespace bittern {

static inline float bits_to_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static inline float half_to_float(uint16_t half) {
    const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16, rest = half & 0x7fffu;
    if (rest >= 0x7c00) return bits_to_float(sign | 0x7f800000 | (rest & 0x3ff) << 13);  // infinite, NaN
    if (rest >= 0x0400) return bits_to_float(sign | ((rest << 13) + 0x38000000));
    const float tiny = static_cast<float>(rest) * 0x1p-24f;  // subnormal
    return sign != 0 ? -tiny : tiny;
}

static inline float bfloat_to_float(uint16_t value) { return bits_to_float(static_cast<uint32_t>(value) << 16); }

}  // namespace bittern

#endif
