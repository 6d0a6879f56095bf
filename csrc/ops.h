// What a decoder does between its matrices, and the inner loop of the quantizer: one source, compiled once per
// instruction set.
//
// Every file of kernels includes this one and gets functions of its own (static), so that no code of a newer
// instruction set can leak into an older one. No result depends on how rows are shared among threads or calls.
#ifndef BITTERN_OPS_H
#define BITTERN_OPS_H

#include "flash.h"
#include "half.h"
#include "vector.h"
#include "vector_ops.h"

namespace bittern {

namespace {

void rms_norm(const float *x, const float *weight, float epsilon, int size, float *out) {
    using namespace wide;
    Floats sums[4] = {};
    int i = 0;
    for (; i + 4 * lanes <= size; i += 4 * lanes) {
        for (int j = 0; j < 4; j++) {
            const Floats v = load(x + i + j * lanes);
            sums[j] += v * v;
        }
    }
    for (; i < size; i += lanes) {
        const Floats v = size - i < lanes ? load_some(x + i, size - i) : load(x + i);
        sums[0] += v * v;
    }
    const float sum = sum_of_lanes((sums[0] + sums[1]) + (sums[2] + sums[3]));
    const float factor = 1.0f / __builtin_sqrtf(sum / static_cast<float>(size) + epsilon);
#pragma omp simd
    for (int j = 0; j < size; j++) out[j] = x[j] * factor * weight[j];
}

void add(const float *y, int size, float *x) {
#pragma omp simd
    for (int i = 0; i < size; i++) x[i] += y[i];
}

// f of 16 at a time over x, in place.
template <typename F>
inline void each(float *x, int size, F f) {
    using namespace wide;
    int i = 0;
    for (; i + lanes <= size; i += lanes) store(x + i, f(load(x + i), i, lanes));
    if (i < size) store_some(x + i, f(load_some(x + i, size - i), i, size - i), size - i);
}

void gate(int activation, const float *up, int size, float *x) {
    using namespace wide;
    auto other = [up](int i, int count) { return count == lanes ? load(up + i) : load_some(up + i, count); };
    if (activation == BT_SILU) {
        each(x, size, [&](Floats v, int i, int count) { return v * sigmoid(v) * other(i, count); });
    } else {
        // gelu(x) = x (1 + tanh u) / 2 = x sigmoid(2u), u = sqrt(2 / pi) (x + 0.044715 x^3)
        each(x, size, [&](Floats v, int i, int count) {
            const Floats u = 1.5957691216f * (v + 0.044715f * v * v * v);
            return v * sigmoid(u) * other(i, count);
        });
    }
}

void cap(float limit, int size, float *x) {
    each(x, size, [limit](wide::Floats v, int, int) { return wide::capped(v, limit); });
}

void embed(int type, const void *row, float scale, int size, float *out) {
    const float *floats = static_cast<const float *>(row);
    const uint16_t *halves = static_cast<const uint16_t *>(row);
    if (type == BT_F32) {
        for (int i = 0; i < size; i++) out[i] = scale * floats[i];
    } else if (type == BT_F16) {
        for (int i = 0; i < size; i++) out[i] = scale * half_to_float(halves[i]);
    } else {
        for (int i = 0; i < size; i++) out[i] = scale * bfloat_to_float(halves[i]);
    }
}

void head(const Head &h, const float *x, float *out) {
    const int half = h.rotary / 2;
    if (h.bias != nullptr) {
#pragma omp simd
        for (int i = 0; i < h.size; i++) out[i] = x[i] + h.bias[i];
        x = out;
    }
    if (h.norm != nullptr) {
        rms_norm(x, h.norm, h.epsilon, h.size, out);
        x = out;
    }
#pragma omp simd
    for (int i = 0; i < half; i++) {
        const float a = x[i], b = x[i + half];
        out[i] = (a * h.cos[i] - b * h.sin[i]) * h.scale;
        out[i + half] = (b * h.cos[i] + a * h.sin[i]) * h.scale;
    }
    for (int i = h.rotary; i < h.size; i++) out[i] = x[i] * h.scale;
    for (int i = h.size; i < h.width; i++) out[i] = 0;
}

// To the nearest, ties to even; NaN stays NaN.
inline uint16_t to_bfloat(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return static_cast<uint16_t>(bits >> 16 | 0x40);
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

void append(int type, const float *x, int width, int step, void *out, float *scale) {
    if (type == BT_F32) {
        float *to = static_cast<float *>(out);
        for (int i = 0; i < width; i++) to[i * step] = x[i];
    } else if (type == BT_BF16) {
        uint16_t *to = static_cast<uint16_t *>(out);
        for (int i = 0; i < width; i++) to[i * step] = to_bfloat(x[i]);
    } else {
        int8_t *to = static_cast<int8_t *>(out);
        float largest = 0;
        for (int i = 0; i < width; i++) {
            const float size = __builtin_fabsf(x[i]);
            largest = size > largest ? size : largest;
        }
        const float inverse = largest > 0 ? 127.0f / largest : 0.0f;
        for (int i = 0; i < width; i++) to[i * step] = static_cast<int8_t>(__builtin_rintf(x[i] * inverse));
        *scale = largest / 127.0f;
    }
}

// Four streams side by side, as the kernels have: one alone does not keep enough lines on their way.
int32_t read(const void *data, int64_t bytes) {
    using namespace wide;
    const char *p = static_cast<const char *>(data);
    const int64_t quarter = bytes / 4;
    Ints sums[4] = {};
    for (int64_t i = 0; i < quarter; i += 64) {
        for (int stream = 0; stream < 4; stream++) {
            for (int64_t j = 0; j < 64; j += static_cast<int64_t>(sizeof(Ints))) {
                Ints v;
                memcpy(&v, p + stream * quarter + i + j, sizeof v);
                sums[stream] ^= v;
            }
        }
    }
    const Ints all_four = (sums[0] ^ sums[1]) ^ (sums[2] ^ sums[3]);
    int32_t result = 0;
    for (int lane = 0; lane < lanes; lane++) result ^= all_four[lane];
    return result;
}

// A few registers of rows at once: they share what is loaded of the coupling, and none waits for its own sums.
template <int Registers>
void solve_rows(const bt_columns &c, const float (*coupling)[most_columns], int64_t first, int count) {
    using namespace wide;
    const auto there = [&](int r) { return count - r * lanes < lanes ? count - r * lanes : lanes; };
    const auto get = [&](const float *p, int r) {
        return there(r) == lanes ? load(p + r * lanes) : load_some(p + r * lanes, there(r));
    };
    const auto put = [&](float *p, int r, Floats v) {
        there(r) == lanes ? store(p + r * lanes, v) : store_some(p + r * lanes, v, there(r));
    };
    const Floats magic = all(0x1.8p23f), least = all(-1024.0f), most = all(1024.0f);
    const Floats largest = all(static_cast<float>(c.max_code));
    Floats errors[most_columns][Registers];
    for (int k = 0; k < c.columns; k++) {
        const int64_t at = k * static_cast<int64_t>(c.rows) + first;
        const int64_t grid = c.groups[k] * static_cast<int64_t>(c.rows) + first;
        Floats sums[Registers] = {};
        for (int j = 0; j < k; j++) {
            const float pull = coupling[k][j];
            for (int r = 0; r < Registers; r++) sums[r] += pull * errors[j][r];
        }
        for (int r = 0; r < Registers; r++) {
            const Floats target = get(c.targets + at, r) - sums[r];
            const Floats scale = get(c.scales + grid, r), zero = get(c.zeros + grid, r);
            Floats code = target / scale;
            code = code > least ? code : least;  // further than any grid reaches; takes NaN too
            code = code < most ? code : most;
            code = (code + magic) - magic + zero;  // to the nearest, ties to even
            code = code > 0.0f ? code : all(0.0f);
            code = code < largest ? code : largest;
            errors[k][r] = (code - zero) * scale - get(c.originals + at, r);
            put(c.targets + at, r, target);
            put(c.errors + at, r, errors[k][r]);
            for (int l = 0; l < there(r); l++) c.codes[at + r * lanes + l] = static_cast<uint8_t>(code[l]);
        }
    }
}

void solve_columns(const bt_columns &c, const float (*coupling)[most_columns], int begin, int end) {
    constexpr int registers = 4;
    int row = begin;
    for (; row + (registers - 1) * wide::lanes < end; row += registers * wide::lanes) {
        solve_rows<registers>(c, coupling, row, end - row < registers * wide::lanes ? end - row : registers * wide::lanes);
    }
    for (; row < end; row += wide::lanes) {
        solve_rows<1>(c, coupling, row, end - row < wide::lanes ? end - row : wide::lanes);
    }
}

// Few codes of a solved matrix change, so `lanes` columns are decided on at once as if none of them did; from the first
// that does on, they are decided on again.
void descend_row(const bt_descent &c, int row) {
    using namespace wide;
    typedef uint8_t Codes __attribute__((vector_size(lanes)));
    const Floats magic = all(0x1.8p23f), least = all(-1024.0f), most = all(1024.0f), none = {};
    const Floats largest = all(static_cast<float>(c.max_code)), numbers = __builtin_convertvector(lane_numbers, Floats);
    const int groups = c.columns / c.group_size;
    uint8_t *codes = c.codes + row * static_cast<int64_t>(c.columns);
    float *slopes = c.slopes + row * static_cast<int64_t>(c.columns);
    for (int group = 0; group < groups; group++) {
        const float step = c.scales[row * static_cast<int64_t>(groups) + group];
        const Floats scale = all(step), zero = all(c.zeros[row * static_cast<int64_t>(groups) + group]);
        const int stop = (group + 1) * c.group_size;
        for (int column = stop - c.group_size; column < stop; column += lanes) {
            const int count = stop - column < lanes ? stop - column : lanes;
            Codes packed = {};
            memcpy(&packed, codes + column, static_cast<size_t>(count));
            Floats given = __builtin_convertvector(packed, Floats);
            const Floats inverse = load_some(c.inverse + column, count);
            for (int from = 0; from < count;) {
                const Floats slope = load_some(slopes + column, count);
                Floats code = ((given - zero) * scale - slope * inverse) / scale;
                code = code > least ? code : least;  // further than any grid reaches; takes NaN too
                code = code < most ? code : most;
                code = (code + magic) - magic + zero;  // to the nearest, ties to even
                code = code > 0.0f ? code : none;
                code = code < largest ? code : largest;
                // The first lane of those whose turn is still to come.
                const Floats behind = numbers < static_cast<float>(from) ? none : all(static_cast<float>(lanes)) - numbers;
                const int lane = lanes - static_cast<int>(largest_lane(code != given ? behind : none));
                if (lane >= count) break;
                const float change = (code[lane] - given[lane]) * step;
                given[lane] = code[lane];
                codes[column + lane] = static_cast<uint8_t>(code[lane]);
                const float *pull = c.hessian + (column + lane) * static_cast<int64_t>(c.columns);
#pragma omp simd
                for (int k = 0; k < c.columns; k++) slopes[k] += change * pull[k];
                from = lane + 1;
            }
        }
    }
}

void descend(const bt_descent &c, int begin, int end) {
    for (int row = begin; row < end; row++) descend_row(c, row);
}

inline wide::Floats floats_from(const float *p, int count) {
    return count == wide::lanes ? wide::load(p) : wide::load_some(p, count);
}

inline wide::Floats floats_from(const uint16_t *p, int count) {
    typedef uint16_t Halves __attribute__((vector_size(2 * wide::lanes)));
    Halves v = {};
    // A copy of known size is one load, of any other a call.
    count == wide::lanes ? memcpy(&v, p, sizeof v) : memcpy(&v, p, static_cast<size_t>(count) * sizeof *p);
    return wide::floats_of(__builtin_convertvector(v, wide::Ints) << 16);
}

template <typename T>
void multiply_groups_of_row(const bt_group_products &c, int row) {
    using namespace wide;
    const int groups = c.columns / c.group_size;
    const float *steps = c.steps + row * static_cast<int64_t>(c.columns);
    float *products = c.products + row * static_cast<int64_t>(groups) * groups;
    for (int g = 0; g < groups; g++) {
        const T *pull = static_cast<const T *>(c.pulls) + (g * static_cast<int64_t>(c.rows) + row) * c.columns;
        for (int h = g; h < groups; h++) {
            Floats sum = {};
            const int stop = (h + 1) * c.group_size;
            for (int k = stop - c.group_size; k < stop; k += lanes) {
                const int count = stop - k < lanes ? stop - k : lanes;
                sum += floats_from(pull + k, count) * floats_from(steps + k, count);
            }
            products[g * groups + h] = products[h * groups + g] = sum_of_lanes(sum);
        }
    }
}

void multiply_groups(const bt_group_products &c, int begin, int end) {
    for (int row = begin; row < end; row++) {
        c.type == BT_F32 ? multiply_groups_of_row<float>(c, row) : multiply_groups_of_row<uint16_t>(c, row);
    }
}

const VectorOps ops = {rms_norm, add,   gate,   cap,           embed,   head,            append,
                       attend,   merge, finish, solve_columns, descend, multiply_groups, read};

}  // namespace

}  // namespace bittern

#endif
