// The program of ./dev check-native, to be run under sanitizers: every instruction set of this machine against double
// precision, with buffers of exactly the documented size, and the threads under load. Prints one line; exits with 1
// at the first difference.
#include <cmath>
#include <cstring>
#include <initializer_list>
#include <time.h>

#include "check.h"
#include "check_decoder.h"
#include "context.h"

namespace {

using bittern::digits_tail;
using bittern::Layout;
using bittern::Pool;

const char *const set_names[BT_SETS] = {"scalar", "avx2", "avx512", "amx", "neon"};

// Written apart from csrc/half.h, for normal numbers.
double half_value(uint16_t half) {
    return ldexp((half >> 15 != 0 ? -1.0 : 1.0) * (1024 + (half & 1023)), (half >> 10 & 31) - 25);
}
double bfloat_value(uint16_t value) {
    return ldexp((value >> 15 != 0 ? -1.0 : 1.0) * (128 + (value & 127)), (value >> 7 & 255) - 134);
}

// A random matrix, its inputs, and what both mean in double precision.
struct Problem {
    int out_features, in_features, bits, group_size, groups, rows, stride;
    bool extreme;  // codes and inputs as large as they can be
    bt_matrix matrix = {};
    Buffer<uint8_t> codes, zeros, packed;
    Buffer<uint16_t> half_scales;
    Buffer<float> float_scales, x;
    Buffer<int32_t> order;
    Buffer<double> weight;             // columns as stored
    Buffer<double> exact, magnitude;   // (rows, out_features): the result, and the sum of |scale| (code + zero) |x|

    double stored(int row, int column) const {
        return x[static_cast<int64_t>(row) * stride + (order != nullptr ? order[column] : column)];
    }
};

void fill_scales(Problem &p, int tiles, bool halves) {
    const int64_t count = static_cast<int64_t>(tiles) * p.groups * 16;
    if (halves) p.half_scales = make<uint16_t>(count);
    else p.float_scales = make<float>(count);
    for (int64_t i = 0; i < count; i++) {
        // Normal halves from 2^-8 to 2, of either sign.
        const int sign = random_below(2) << 15, exponent = (7 + random_below(9)) << 10;
        if (halves) p.half_scales[i] = static_cast<uint16_t>(sign | exponent | random_below(1024));
        else p.float_scales[i] = random_float();
    }
    p.matrix.scale_type = halves ? BT_F16 : BT_F32;
    p.matrix.scales = halves ? static_cast<const void *>(p.half_scales.get()) : p.float_scales.get();
}

void solve(Problem &p) {
    p.weight = make<double>(static_cast<int64_t>(p.out_features) * p.in_features);
    p.exact = make<double>(p.rows * p.out_features), p.magnitude = make<double>(p.rows * p.out_features);
    for (int o = 0; o < p.out_features; o++) {
        for (int i = 0; i < p.in_features; i++) {
            const int64_t at = (static_cast<int64_t>(o / 16) * p.groups + i / p.group_size) * 16 + o % 16;
            const int64_t to = static_cast<int64_t>(o) * p.in_features + i;
            const double scale = p.half_scales != nullptr ? half_value(p.half_scales[at]) : p.float_scales[at];
            const int zero = p.zeros != nullptr ? p.zeros[at] : 1 << (p.bits - 1), code = p.codes[to];
            p.weight[to] = scale * (code - zero);
            for (int row = 0; row < p.rows; row++) {
                const double x = p.stored(row, i);
                p.exact[row * p.out_features + o] += p.weight[to] * x;
                p.magnitude[row * p.out_features + o] += fabs(scale) * (code + zero) * fabs(x);
            }
        }
    }
}

Problem make_problem(bt_context *c, int out_features, int in_features, int bits, int group_size, int rows, int kind) {
    Problem p;
    p.out_features = out_features, p.in_features = in_features, p.bits = bits, p.group_size = group_size, p.rows = rows;
    p.groups = (in_features + group_size - 1) / group_size;
    p.extreme = kind % 3 == 0;
    p.stride = in_features + kind % 2 * 3;
    const int most = (1 << bits) - 1, tiles = (out_features + 15) / 16;
    const int64_t weights = static_cast<int64_t>(out_features) * in_features;
    p.codes = make<uint8_t>(weights);
    for (int64_t i = 0; i < weights; i++) p.codes[i] = static_cast<uint8_t>(p.extreme ? most : random_below(most + 1));
    fill_scales(p, tiles, kind % 2 == 0);
    if (kind % 4 != 1) {
        p.zeros = make<uint8_t>(static_cast<int64_t>(tiles) * p.groups * 16);
        for (int i = 0; i < tiles * p.groups * 16; i++) {
            p.zeros[i] = static_cast<uint8_t>(p.extreme ? i % 3 / 2 * most : random_below(most + 1));
        }
    }
    if (kind % 4 == 2) {
        p.order = make<int32_t>(in_features);
        for (int i = 0; i < in_features; i++) {
            const int j = random_below(i + 1);
            p.order[i] = p.order[j];
            p.order[j] = i;
        }
    }
    p.x = make<float>(static_cast<int64_t>(rows - 1) * p.stride + in_features);
    for (int row = 0; row < rows; row++) {
        for (int i = 0; i < in_features; i++) {
            const float outlier = i % 37 == 5 ? 60.0f : 1.0f;
            p.x[static_cast<int64_t>(row) * p.stride + i] =
                p.extreme ? (row % 3 == 0 || (row % 3 == 1 && i % 2 != 0) ? 1.0f : -1.0f) : random_float() * outlier;
        }
    }
    p.packed = make<uint8_t>(bt_packed_bytes(out_features, in_features, bits, group_size));
    p.matrix.out_features = out_features, p.matrix.in_features = in_features, p.matrix.bits = bits;
    p.matrix.group_size = group_size, p.matrix.type = BT_CODES;
    p.matrix.codes = p.packed.get(), p.matrix.zeros = p.zeros.get(), p.matrix.order = p.order.get();
    expect(bt_pack(c, out_features, in_features, bits, group_size, p.codes.get(), in_features, 1, p.packed.get()) == 0,
           "bt_pack");
    solve(p);
    return p;
}

// The bound of tests/test_kernels.py: half a digit for every input, and the rounding of fp32.
void compare(const Problem &p, int activations, const float *y, ptrdiff_t y_stride, const char *what) {
    const int limit = activations == BT_A8 ? 127 : 32639, chunk = activations == BT_A8 ? 32 : 128;
    Buffer<double> half_step = make<double>(p.in_features);
    for (int row = 0; row < p.rows; row++) {
        for (int start = 0, end; start < p.in_features; start = end) {
            const int group_end = (start / p.group_size + 1) * p.group_size;
            end = start + chunk < group_end ? start + chunk : group_end;
            if (end > p.in_features) end = p.in_features;
            double largest = 0;
            for (int i = start; i < end; i++) {
                if (fabs(p.stored(row, i)) > largest) largest = fabs(p.stored(row, i));
            }
            for (int i = start; i < end; i++) half_step[i] = largest * (0.5 / limit + 3 * 0x1p-24);
        }
        const double roundings = p.in_features / 32.0 + 2 * p.groups + 8;
        for (int o = 0; o < p.out_features; o++) {
            const double *weight = p.weight.get() + static_cast<int64_t>(o) * p.in_features;
            double digits = 0;  // in the extreme problems every digit is exact
            for (int i = 0; i < p.in_features && !p.extreme; i++) digits += fabs(weight[i]) * half_step[i];
            const double exact = p.exact[row * p.out_features + o];
            const double bound = digits + roundings * 0x1.03p-24 * p.magnitude[row * p.out_features + o];
            const double found = y[row * y_stride + o];
            expect(fabs(found - exact) <= bound, "%s: %d x %d, %d bits, group %d, y[%d of %d, %d]: %g is not %g +- %g",
                   what, p.out_features, p.in_features, p.bits, p.group_size, row, p.rows, o, found, exact, bound);
        }
    }
}

// The kernels alone: digits and sums of exactly the size that csrc/kernels.h gives them.
void check_kernels(const bt_context *c, const Problem &p, int activations, const char *what) {
    const Layout l = bittern::layout_of(p.matrix, activations);
    const bool a16 = activations == BT_A16;
    bittern::Input input = {};
    input.rows = p.rows;
    input.digits = l.columns + digits_tail;
    Buffer<int8_t> hi = make<int8_t>(input.digits * p.rows), lo;
    if (a16) lo = make<int8_t>(input.digits * p.rows);
    Buffer<float> scales = make<float>(l.chunks * p.rows), sums = make<float>(l.chunks * p.rows);
    Buffer<float> row_of_x = make<float>(p.in_features);
    for (int row = 0; row < p.rows; row++) {
        for (int i = 0; i < p.in_features; i++) row_of_x[i] = static_cast<float>(p.stored(row, i));
        quantize_row(*c->kernels, p.matrix, l, row_of_x.get(), hi.get() + row * input.digits,
                     a16 ? lo.get() + row * input.digits : nullptr, scales.get() + row * l.chunks,
                     sums.get() + row * l.chunks);
    }
    input.hi = hi.get(), input.lo = lo.get(), input.scales = scales.get(), input.sums = sums.get();
    Buffer<float> y = make<float>(static_cast<int64_t>(p.rows) * p.out_features);
    c->kernels->multiply(p.matrix, l, input, 0, l.tiles, y.get(), p.out_features);
    compare(p, activations, y.get(), p.out_features, what);
}

void check_linear(bt_context *c, const Problem &p, int activations, Buffer<float> &first, const char *what) {
    const ptrdiff_t y_stride = p.out_features + 2;
    const int64_t size = (p.rows - 1) * y_stride + p.out_features;
    Buffer<float> y = make<float>(size);
    const bt_matrix *matrix = &p.matrix;
    float *out = y.get();
    const int status = bt_linear(c, &matrix, 1, activations, p.rows, p.x.get(), p.stride, &out, &y_stride);
    expect(status == 0, "%s: bt_linear gives %d", what, status);
    if (first == nullptr) {
        compare(p, activations, out, y_stride, what);
        first = std::move(y);
    } else {
        expect(memcmp(first.get(), out, static_cast<size_t>(size) * sizeof(float)) == 0,
               "%s: results depend on the number of threads", what);
    }
}

void check_dequantize(bt_context *c, const Problem &p, const char *what) {
    const int begin = p.out_features / 3;
    Buffer<float> out = make<float>(static_cast<int64_t>(p.out_features - begin) * p.in_features);
    expect(bt_dequantize(c, &p.matrix, begin, p.out_features, out.get()) == 0, "%s: bt_dequantize", what);
    const double *weight = p.weight.get() + static_cast<int64_t>(begin) * p.in_features;
    for (int64_t i = 0; i < static_cast<int64_t>(p.out_features - begin) * p.in_features; i++) {
        expect(out[i] == static_cast<float>(weight[i]), "%s: dequantized %g is not %g", what, out[i], weight[i]);
    }
}

void check_dense(bt_context *c, int type, int out_features, int in_features, int rows, const char *what) {
    const int64_t count = static_cast<int64_t>(out_features) * in_features;
    Buffer<float> floats = make<float>(type == BT_F32 ? count : 0), x = make<float>(rows * in_features);
    Buffer<uint16_t> shorts = make<uint16_t>(type == BT_F32 ? 0 : count);
    Buffer<double> weight = make<double>(count);
    for (int64_t i = 0; i < count; i++) {
        if (type == BT_F32) {
            weight[i] = floats[i] = random_float();
        } else {
            const int exponent = type == BT_F16 ? (7 + random_below(9)) << 10 : (119 + random_below(9)) << 7;
            shorts[i] = static_cast<uint16_t>(random_below(2) << 15 | exponent | random_below(128));
            weight[i] = type == BT_F16 ? half_value(shorts[i]) : bfloat_value(shorts[i]);
        }
    }
    for (int i = 0; i < rows * in_features; i++) x[i] = random_float();
    bt_matrix m = {};
    m.out_features = out_features, m.in_features = in_features, m.type = type;
    m.codes = type == BT_F32 ? static_cast<const void *>(floats.get()) : shorts.get();
    Buffer<float> y = make<float>(rows * out_features);
    const bt_matrix *matrix = &m;
    float *out = y.get();
    const ptrdiff_t stride = out_features;
    expect(bt_linear(c, &matrix, 1, BT_A16, rows, x.get(), in_features, &out, &stride) == 0, "%s: dense", what);
    for (int row = 0; row < rows; row++) {
        for (int o = 0; o < out_features; o++) {
            double exact = 0, magnitude = 0;
            for (int i = 0; i < in_features; i++) {
                const double product = weight[static_cast<int64_t>(o) * in_features + i] * x[row * in_features + i];
                exact += product;
                magnitude += fabs(product);
            }
            expect(fabs(out[row * stride + o] - exact) <= (in_features + 1) * 0x1.03p-24 * magnitude,
                   "%s: %d x %d of type %d, row %d, feature %d", what, out_features, in_features, type, row, o);
        }
    }
}

// Columns in their turn, each from the errors that were found before it, against double arithmetic.
void check_columns(bt_context *c, int columns, int rows, int max_code, const char *what) {
    const int groups = 3;
    Buffer<float> targets = make<float>(columns * rows), originals = make<float>(columns * rows);
    Buffer<float> coupling = make<float>(columns * columns), errors = make<float>(columns * rows);
    Buffer<float> scales = make<float>(groups * rows), zeros = make<float>(groups * rows);
    Buffer<int64_t> group = make<int64_t>(columns);
    Buffer<uint8_t> codes = make<uint8_t>(columns * rows);
    Buffer<double> given = make<double>(columns * rows);
    for (int i = 0; i < columns * rows; i++) given[i] = targets[i] = random_float(), originals[i] = random_float();
    for (int i = 0; i < columns * columns; i++) coupling[i] = random_float() / 8;
    for (int i = 0; i < groups * rows; i++) {
        scales[i] = (random_below(2) != 0 ? 1.0f : -1.0f) * (2 + random_float()) / static_cast<float>(max_code);
        zeros[i] = static_cast<float>(random_below(max_code + 1));
    }
    for (int k = 0; k < columns; k++) group[k] = random_below(groups);
    bt_columns call = {};
    call.columns = columns, call.rows = rows, call.max_code = max_code;
    call.targets = targets.get(), call.originals = originals.get(), call.coupling = coupling.get();
    call.down = 1, call.across = columns;
    call.scales = scales.get(), call.zeros = zeros.get(), call.groups = group.get();
    call.codes = codes.get(), call.errors = errors.get();
    expect(bt_solve_columns(c, &call) == 0, "%s: bt_solve_columns", what);
    for (int row = 0; row < rows; row++) {
        for (int k = 0; k < columns; k++) {
            const int at = k * rows + row, grid = static_cast<int>(group[k]) * rows + row;
            double target = given[at];
            for (int j = 0; j < k; j++) {
                target -= static_cast<double>(coupling[j + k * columns]) * errors[j * rows + row];
            }
            const double steps = target / scales[grid] + zeros[grid], code = codes[at];
            const double error = (code - zeros[grid]) * static_cast<double>(scales[grid]) - originals[at];
            const double nearest = steps < 0 ? 0 : steps > max_code ? max_code : steps;
            expect(fabs(targets[at] - target) < 1e-4, "%s: column %d, row %d: target", what, k, row);
            expect(fabs(code - nearest) < 0.501 + 1e-4 * max_code, "%s: column %d, row %d: code", what, k, row);
            expect(fabs(errors[at] - error) < 1e-5, "%s: column %d, row %d: error", what, k, row);
        }
    }
}

// Coordinate descent: each code was the best one in its turn, and the slopes are those of the codes.
void check_descent(bt_context *c, int rows, int columns, int group_size, int max_code, const char *what) {
    const int groups = columns / group_size;
    Buffer<float> hessian = make<float>(columns * columns), inverse = make<float>(columns);
    Buffer<float> scales = make<float>(rows * groups), zeros = make<float>(rows * groups);
    Buffer<float> slopes = make<float>(rows * columns);
    Buffer<uint8_t> codes = make<uint8_t>(rows * columns);
    Buffer<double> expected = make<double>(rows * columns);
    for (int i = 0; i < columns; i++) {
        for (int j = 0; j <= i; j++) hessian[i * columns + j] = hessian[j * columns + i] = random_float() / 8;
        hessian[i * columns + i] = 1 + random_float() / 2;
        inverse[i] = 1 / hessian[i * columns + i];
    }
    for (int i = 0; i < rows * groups; i++) {
        scales[i] = (random_below(2) != 0 ? 1.0f : -1.0f) * (2 + random_float()) / static_cast<float>(max_code);
        zeros[i] = static_cast<float>(random_below(max_code + 1));
    }
    for (int i = 0; i < rows * columns; i++) {
        codes[i] = static_cast<uint8_t>(random_below(max_code + 1));
        expected[i] = slopes[i] = random_float();
    }
    Buffer<uint8_t> given = make<uint8_t>(rows * columns);
    memcpy(given.get(), codes.get(), static_cast<size_t>(rows * columns));
    bt_descent call = {};
    call.rows = rows, call.columns = columns, call.group_size = group_size, call.max_code = max_code;
    call.hessian = hessian.get(), call.inverse = inverse.get(), call.scales = scales.get(), call.zeros = zeros.get();
    call.codes = codes.get(), call.slopes = slopes.get();
    expect(bt_descend(c, &call) == 0, "%s: bt_descend", what);
    for (int row = 0; row < rows; row++) {
        double *own = expected.get() + row * columns;
        for (int k = 0; k < columns; k++) {
            const int at = row * columns + k, grid = row * groups + k / group_size;
            const double scale = scales[grid], code = codes[at];
            const double wanted = given[at] - own[k] * inverse[k] / scale;
            const double nearest = wanted < 0 ? 0 : wanted > max_code ? max_code : wanted;
            expect(fabs(code - nearest) < 0.501 + 1e-3 * max_code, "%s: row %d, column %d: code", what, row, k);
            for (int j = 0; j < columns; j++) own[j] += (code - given[at]) * scale * hessian[k * columns + j];
        }
        for (int k = 0; k < columns; k++) {
            expect(fabs(slopes[row * columns + k] - own[k]) < 1e-4, "%s: row %d, column %d: slope", what, row, k);
        }
    }
}

// Products of groups, of floats and of bfloat16.
void check_group_products(bt_context *c, int rows, int columns, int group_size, const char *what) {
    const int groups = columns / group_size;
    Buffer<float> pulls = make<float>(groups * rows * columns), steps = make<float>(rows * columns);
    Buffer<uint16_t> halves = make<uint16_t>(groups * rows * columns);
    Buffer<float> products = make<float>(rows * groups * groups);
    for (int i = 0; i < rows * columns; i++) steps[i] = random_float();
    for (int i = 0; i < groups * rows * columns; i++) {
        const float x = random_float();
        uint32_t bits;
        memcpy(&bits, &x, 4);
        bits &= 0xffff0000;
        memcpy(&pulls[i], &bits, 4);
        halves[i] = static_cast<uint16_t>(bits >> 16);
    }
    for (int type : {BT_F32, BT_BF16}) {
        bt_group_products call = {};
        call.rows = rows, call.columns = columns, call.group_size = group_size, call.type = type;
        call.pulls = type == BT_F32 ? static_cast<const void *>(pulls.get()) : halves.get();
        call.steps = steps.get(), call.products = products.get();
        expect(bt_multiply_groups(c, &call) == 0, "%s: bt_multiply_groups", what);
        for (int at = 0; at < rows * groups * groups; at++) {
            const int row = at / (groups * groups), one = at / groups % groups, other = at % groups;
            const int g = one < other ? one : other, h = one < other ? other : one;
            double expected = 0;
            for (int k = h * group_size; k < (h + 1) * group_size; k++) {
                expected += static_cast<double>(pulls[(g * rows + row) * columns + k]) * steps[row * columns + k];
            }
            expect(fabs(products[at] - expected) < 1e-5 * columns, "%s: product %d of type %d", what, at, type);
        }
    }
}

// All that one instruction set computes.
int check_set(int set) {
    static const int shapes[][3] = {{1, 32, 32},   {15, 100, 32},  {17, 96, 96},  {33, 100, 100}, {16, 40, 8},
                                    {40, 300, 48}, {70, 272, 128}, {33, 330, 330}};
    static const int thread_counts[] = {1, 2, 8}, row_counts[] = {1, 2, 5, 19, 50}, all_bits[] = {2, 3, 4, 8};
    bt_context *contexts[3];
    for (int i = 0; i < 3; i++) {
        expect(bt_open(thread_counts[i], set, &contexts[i]) == 0, "%s: bt_open", set_names[set]);
    }
    int done = 0;
    for (const auto &shape : shapes) {
        for (int bits : all_bits) {
            for (int kind = 0; kind < 4; kind++, done++) {
                const int rows = row_counts[(kind + bits + done) % 5];
                const Problem p = make_problem(contexts[0], shape[0], shape[1], bits, shape[2], rows, kind);
                check_dequantize(contexts[0], p, set_names[set]);
                for (int activations : {BT_A16, BT_A8}) {
                    check_kernels(contexts[0], p, activations, set_names[set]);
                    Buffer<float> first;
                    for (bt_context *c : contexts) check_linear(c, p, activations, first, set_names[set]);
                }
            }
        }
    }
    for (int type : {BT_F32, BT_F16, BT_BF16}) {
        for (int rows : row_counts) {
            check_dense(contexts[rows % 3], type, 7 + rows, 60 + 3 * rows, rows, set_names[set]);
        }
    }
    for (bt_context *c : contexts) {
        check_attention(c, set_names[set]);
        check_columns(c, 64, 200, 7, set_names[set]), check_columns(c, 64, 61, 255, set_names[set]);
        check_columns(c, 13, 3, 3, set_names[set]), check_columns(c, 1, 65, 15, set_names[set]);
        check_descent(c, 13, 96, 32, 15, set_names[set]), check_descent(c, 7, 40, 40, 3, set_names[set]);
        check_descent(c, 1, 24, 8, 255, set_names[set]), check_descent(c, 9, 30, 5, 7, set_names[set]);
        check_descent(c, 0, 8, 8, 7, set_names[set]);
        check_group_products(c, 13, 96, 32, set_names[set]), check_group_products(c, 7, 40, 40, set_names[set]);
        check_group_products(c, 9, 30, 5, set_names[set]), check_group_products(c, 0, 8, 8, set_names[set]);
    }
    for (int activations : {BT_A16, BT_A8}) {
        for (int cache : {BT_F32, BT_BF16, BT_I8}) check_decoder(contexts, 3, activations, cache, set_names[set]);
    }
    for (bt_context *c : contexts) bt_close(c);
    return done;
}

// Tiny stages one after the other; each job must run once, on a thread of the pool.
void check_pool(int threads, int stages) {
    constexpr int most_jobs = 70;
    Pool pool;
    expect(pool.start(threads), "pool: %d threads", threads);
    int ran[most_jobs] = {};  // written without atomics: a job that ran twice at a time is a race
    for (int stage = 0; stage < stages; stage++) {
        const int jobs = stage % most_jobs;
        pool.run(jobs, [&](int job, int thread) { ran[job] += thread >= 0 && thread < threads ? 1 : 1000; });
        for (int job = 0; job < most_jobs; job++) {
            expect(ran[job] == (job < jobs), "pool: job %d of %d ran %d times", job, jobs, ran[job]);
            ran[job] = 0;
        }
        if (stage % 64 == 63) {  // long enough for the threads to fall asleep
            const timespec moment = {0, 200'000};
            nanosleep(&moment, nullptr);
        }
    }
}

struct Caller {
    bt_context *context;
    const Problem *problem;
    const float *expected;
};

void *call(void *argument) {
    const Caller *caller = static_cast<Caller *>(argument);
    const Problem &p = *caller->problem;
    const int64_t size = static_cast<int64_t>(p.rows) * p.out_features;
    Buffer<float> y = make<float>(size);
    for (int i = 0; i < 100; i++) {
        const bt_matrix *matrix = &p.matrix;
        float *out = y.get();
        const ptrdiff_t stride = p.out_features;
        bt_linear(caller->context, &matrix, 1, BT_A16, p.rows, p.x.get(), p.stride, &out, &stride);
        const bool same = memcmp(out, caller->expected, static_cast<size_t>(size) * sizeof(float)) == 0;
        expect(same, "two callers disturb each other");
    }
    return nullptr;
}

// Two threads that call one context, with inputs of their own.
void check_callers(int threads) {
    bt_context *c = nullptr;
    expect(bt_open(threads, bt_best(), &c) == 0, "bt_open");
    const Problem problems[2] = {make_problem(c, 100, 96, 4, 32, 3, 1), make_problem(c, 50, 300, 3, 64, 7, 2)};
    Buffer<float> expected[2];
    Caller callers[2];
    pthread_t handles[2];
    for (int i = 0; i < 2; i++) {
        const Problem &p = problems[i];
        expected[i] = make<float>(p.rows * p.out_features);
        callers[i] = {c, &p, expected[i].get()};
        const bt_matrix *matrix = &p.matrix;
        float *out = expected[i].get();
        const ptrdiff_t stride = p.out_features;
        bt_linear(c, &matrix, 1, BT_A16, p.rows, p.x.get(), p.stride, &out, &stride);
    }
    for (int i = 0; i < 2; i++) expect(pthread_create(&handles[i], nullptr, call, &callers[i]) == 0, "no thread");
    for (pthread_t handle : handles) pthread_join(handle, nullptr);
    bt_close(c);
}

}  // namespace

int main() {
    printf("ok:");
    for (int set = 0; set < BT_SETS; set++) {
        if (bt_has(set)) printf(" %s %d problems,", set_names[set], check_set(set));
    }
    for (int threads : {1, 2, 3, 8}) check_pool(threads, 5000);
    for (int i = 0; i < 100; i++) {  // closed while the threads look for work, and while they sleep
        bt_context *c = nullptr;
        expect(bt_open(1 + i % 8, bt_best(), &c) == 0, "bt_open");
        bt_close(c);
    }
    for (int threads : {1, 2, 8}) check_callers(threads);
    bt_context *c = nullptr;
    expect(bt_open(2, bt_best(), &c) == 0, "bt_open");
    Buffer<uint8_t> data = make<uint8_t>(5 << 20);
    expect(bt_read_probe(c, data.get(), 5 << 20) > 0, "bt_read_probe");
    bt_close(c);
    printf(" threads\n");
    return 0;
}
