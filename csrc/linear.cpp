// Inputs to digits, then tiles to threads.
#include <cstring>
#include <time.h>

#include "context.h"
#include "vector_ops.h"

namespace bittern {

namespace {

constexpr int most_matrices = 16;
constexpr int64_t job_bytes = 24 << 10;        // of weights: a few microseconds
constexpr int64_t row_block_bytes = 512 << 10;  // of digits: they stay in L2 while tiles pass by
constexpr int row_quantum = 48, strip_quantum = 4;  // rows and tiles that kernels take at a time

// Memory of `rows` rounded rows.
struct Digits {
    Input input;
    Layout layout;
};

bool same_input(const bt_matrix &a, const bt_matrix &b) {
    return a.type == BT_CODES && b.type == BT_CODES && a.in_features == b.in_features &&
           a.group_size == b.group_size && a.order == b.order;
}

size_t digits_bytes(const Layout &l, int rows, int activations) {
    const size_t halves = activations == BT_A16 ? 2 : 1;
    const size_t digits = static_cast<size_t>(l.columns + digits_tail) * rows * halves;
    return (digits + 63) / 64 * 64 + 2 * sizeof(float) * static_cast<size_t>(l.chunks) * rows + 64;
}

Digits place(void *memory, const Layout &l, int rows, int activations) {
    Digits d;
    d.layout = l;
    d.input.rows = rows;
    d.input.digits = l.columns + digits_tail;
    int8_t *bytes = static_cast<int8_t *>(memory);
    const int64_t half = d.input.digits * rows;
    d.input.hi = bytes;
    d.input.lo = activations == BT_A16 ? bytes + half : nullptr;
    const int64_t used = (half * (activations == BT_A16 ? 2 : 1) + 63) / 64 * 64;
    float *scales = reinterpret_cast<float *>(bytes + used);
    d.input.scales = scales;
    d.input.sums = scales + static_cast<int64_t>(l.chunks) * rows;
    return d;
}

// Rows [begin, end) of x to digits. `gathered` has room for a row when the matrix stores columns in another order.
void quantize_rows(const Kernels &k, const bt_matrix &m, const Digits &d, const float *x, ptrdiff_t stride, int begin,
                   int end, float *gathered) {
    for (int row = begin; row < end; row++) {
        const float *values = x + row * stride;
        if (m.order != nullptr) {
            for (int i = 0; i < m.in_features; i++) gathered[i] = values[m.order[i]];
            values = gathered;
        }
        int8_t *hi = const_cast<int8_t *>(d.input.hi) + row * d.input.digits;
        int8_t *lo = d.input.lo == nullptr ? nullptr : const_cast<int8_t *>(d.input.lo) + row * d.input.digits;
        const int64_t at = static_cast<int64_t>(row) * d.layout.chunks;
        quantize_row(k, m, d.layout, values, hi, lo, const_cast<float *>(d.input.scales) + at,
                     const_cast<float *>(d.input.sums) + at);
    }
}

Input rows_of(const Digits &d, int begin, int end) {
    Input part = d.input;
    part.rows = end - begin;
    part.hi += begin * part.digits;
    if (part.lo != nullptr) part.lo += begin * part.digits;
    part.scales += static_cast<int64_t>(begin) * d.layout.chunks;
    part.sums += static_cast<int64_t>(begin) * d.layout.chunks;
    return part;
}

// The rounded inputs of a call: one set for every group size (and order of columns) among its matrices.
struct Rounded {
    Digits digits[most_matrices];
    const bt_matrix *owner[most_matrices];  // some matrix that takes it
    int kinds = 0;
    int kind_of[most_matrices];  // by matrix; -1 for floats, which take x as it is
};

// Rounds x for all matrices of a call; false when there is no memory.
bool round_inputs(bt_context *c, const Output *outputs, int count, int activations, int rows, const float *x,
                  ptrdiff_t x_stride, Rounded &rounded) {
    size_t offsets[most_matrices], bytes = 0;
    int widest = 0;  // row that has to be put in order
    for (int j = 0; j < count; j++) {
        const bt_matrix &m = *outputs[j].matrix;
        rounded.kind_of[j] = -1;
        if (m.type != BT_CODES) continue;
        int kind = 0;
        while (kind < rounded.kinds && !same_input(*rounded.owner[kind], m)) kind++;
        rounded.kind_of[j] = kind;
        if (kind < rounded.kinds) continue;
        rounded.owner[rounded.kinds++] = &m;
        rounded.digits[kind].layout = layout_of(m, activations);
        offsets[kind] = bytes;
        bytes += (digits_bytes(rounded.digits[kind].layout, rows, activations) + 63) / 64 * 64;
        if (m.order != nullptr && m.in_features > widest) widest = m.in_features;
    }
    const int room = round_up(widest, 16);
    char *memory = static_cast<char *>(c->input.take(bytes + sizeof(float) * room * c->pool.threads() + 64));
    if (memory == nullptr) return false;
    float *gathered = reinterpret_cast<float *>(memory + bytes);
    const int rows_a_job = 4;
    for (int kind = 0; kind < rounded.kinds; kind++) {
        Digits &d = rounded.digits[kind];
        d = place(memory + offsets[kind], d.layout, rows, activations);
        c->pool.run((rows + rows_a_job - 1) / rows_a_job, [&](int job, int thread) {
            const int begin = job * rows_a_job, end = begin + rows_a_job < rows ? begin + rows_a_job : rows;
            quantize_rows(*c->kernels, *rounded.owner[kind], d, x, x_stride, begin, end, gathered + thread * room);
        });
    }
    return true;
}

// Rows of x that are taken together: as many as leave their digits in the second-level cache.
int rows_a_block(const Rounded &rounded, int activations, int rows) {
    int block = rows;
    for (int kind = 0; kind < rounded.kinds; kind++) {
        const int64_t row_bytes = rounded.digits[kind].input.digits * (activations == BT_A16 ? 2 : 1);
        const int fit = static_cast<int>(row_block_bytes / row_bytes / row_quantum * row_quantum);
        const int wanted = fit < row_quantum ? row_quantum : fit;
        if (block > wanted) block = wanted;
    }
    return block;
}

// One matrix's share of a stage: strips of tiles (of features, for floats) times blocks of rows.
struct Share {
    Output output;
    const Digits *digits;  // null for floats
    Layout layout;         // of the matrix: those that share digits may have other rows and bits
    int units, strip, strips;
    int jobs;
};

Share share_of(const Output &output, const Digits *digits, int activations, int row_blocks) {
    const bt_matrix &m = *output.matrix;
    Share s = {};
    s.output = output;
    s.digits = digits;
    if (digits != nullptr) {
        s.layout = layout_of(m, activations);
        s.units = s.layout.tiles;
        s.strip = static_cast<int>(job_bytes / s.layout.tile_bytes) / strip_quantum * strip_quantum;
    } else {
        s.units = m.out_features;
        s.strip = static_cast<int>(job_bytes / (static_cast<int64_t>(m.in_features) * (m.type == BT_F32 ? 4 : 2)));
    }
    if (s.strip < strip_quantum) s.strip = strip_quantum;
    s.strips = (s.units + s.strip - 1) / s.strip;
    s.jobs = s.strips * row_blocks;
    return s;
}

// f(begin, end) for all of `count` rows, `size` of them a job.
template <typename F>
int in_rows(bt_context *c, int count, int size, F f) {
    Lock lock(c);
    c->pool.run((count + size - 1) / size, [&](int job, int) {
        const int begin = job * size, end = begin + size < count ? begin + size : count;
        f(begin, end);
    });
    return 0;
}

}  // namespace

bool valid(const bt_matrix &m) {
    if (m.out_features < 1 || m.in_features < 1 || m.codes == nullptr) return false;
    if (m.type == BT_F32 || m.type == BT_F16 || m.type == BT_BF16) return true;
    const bool bits = m.bits == 2 || m.bits == 3 || m.bits == 4 || m.bits == 8;
    return m.type == BT_CODES && bits && m.group_size >= 1 && m.scales != nullptr &&
           (m.scale_type == BT_F16 || m.scale_type == BT_F32);
}

void quantize_row(const Kernels &k, const bt_matrix &m, const Layout &l, const float *x, int8_t *hi, int8_t *lo,
                  float *scales, float *sums) {
    for (int group = 0; group < l.groups; group++) {
        const int first = group * m.group_size, filled = columns_of_group(l, group);
        const int there = m.in_features - first < m.group_size ? m.in_features - first : m.group_size;
        for (int start = 0; start < filled; start += l.chunk) {
            const int width = filled - start < l.chunk ? filled - start : l.chunk;
            const int real = there - start < width ? there - start : width;
            *scales++ = k.quantize(x + first + start, real, width, hi, lo, sums++);
            hi += width;
            if (lo != nullptr) lo += width;
        }
    }
    memset(hi, 0, digits_tail);
    if (lo != nullptr) memset(lo, 0, digits_tail);
}

int linear(bt_context *c, const Output *outputs, int count, int activations, int rows, const float *x,
           ptrdiff_t x_stride) {
    const Kernels &k = *c->kernels;
    Rounded rounded;
    if (!round_inputs(c, outputs, count, activations, rows, x, x_stride, rounded)) return BT_NO_MEMORY;
    const int row_block = rows_a_block(rounded, activations, rows), row_blocks = (rows + row_block - 1) / row_block;
    Share shares[most_matrices];
    int jobs = 0;
    for (int j = 0; j < count; j++) {
        const Digits *digits = rounded.kind_of[j] < 0 ? nullptr : &rounded.digits[rounded.kind_of[j]];
        shares[j] = share_of(outputs[j], digits, activations, row_blocks);
        jobs += shares[j].jobs;
    }
    c->pool.run(jobs, [&](int job, int) {
        int j = 0;
        while (job >= shares[j].jobs) job -= shares[j++].jobs;
        const Share &s = shares[j];
        const int begin = job % s.strips * s.strip, end = begin + s.strip < s.units ? begin + s.strip : s.units;
        const int first = job / s.strips * row_block, last = first + row_block < rows ? first + row_block : rows;
        float *y = s.output.y + first * s.output.stride;
        if (s.digits != nullptr) {
            k.multiply(*s.output.matrix, s.layout, rows_of(*s.digits, first, last), begin, end, y,
                       s.output.stride);
        } else {
            k.multiply_dense(*s.output.matrix, x + first * x_stride, x_stride, last - first, begin, end, y,
                             s.output.stride);
        }
    });
    return 0;
}

}  // namespace bittern

using namespace bittern;

extern "C" {

int bt_dequantize(bt_context *c, const bt_matrix *m, int begin, int end, float *out) {
    if (c == nullptr || m == nullptr || !valid(*m) || m->type != BT_CODES || begin < 0 || end < begin ||
        end > m->out_features || (out == nullptr && begin < end)) {
        return BT_BAD_ARGUMENT;
    }
    const Layout l = layout_of(*m, BT_A16);
    Lock lock(c);
    const int first = begin / tile_rows, last = (end + tile_rows - 1) / tile_rows;
    c->pool.run(last - first, [&](int job, int) {
        const int tile = (first + job) * tile_rows;
        const int from = tile < begin ? begin : tile, to = tile + tile_rows < end ? tile + tile_rows : end;
        c->kernels->dequantize(*m, l, from, to, out + static_cast<int64_t>(from - begin) * m->in_features);
    });
    return 0;
}

int bt_solve_columns(bt_context *c, const bt_columns *call) {
    if (c == nullptr || call == nullptr || call->columns < 1 || call->columns > most_columns || call->rows < 0 ||
        call->max_code < 1 || call->max_code > 255) {
        return BT_BAD_ARGUMENT;
    }
    float coupling[most_columns][most_columns];
    for (int k = 0; k < call->columns; k++) {
        for (int j = 0; j < k; j++) coupling[k][j] = call->coupling[j * call->down + k * call->across];
    }
    return in_rows(c, call->rows, 64, [&](int begin, int end) { c->kernels->ops->solve_columns(*call, coupling, begin, end); });
}

int bt_descend(bt_context *c, const bt_descent *call) {
    if (c == nullptr || call == nullptr || call->rows < 0 || call->group_size < 1 || call->columns < 1 ||
        call->columns % call->group_size != 0 || call->max_code < 1 || call->max_code > 255) {
        return BT_BAD_ARGUMENT;
    }
    return in_rows(c, call->rows, 4, [&](int begin, int end) { c->kernels->ops->descend(*call, begin, end); });
}

int bt_multiply_groups(bt_context *c, const bt_group_products *call) {
    if (c == nullptr || call == nullptr || call->rows < 0 || call->group_size < 1 || call->columns < 1 ||
        call->columns % call->group_size != 0 || (call->type != BT_F32 && call->type != BT_BF16)) {
        return BT_BAD_ARGUMENT;
    }
    return in_rows(c, call->rows, 4, [&](int begin, int end) { c->kernels->ops->multiply_groups(*call, begin, end); });
}

int bt_linear(bt_context *c, const bt_matrix *const *matrices, int count, int activations, int rows, const float *x,
              ptrdiff_t x_stride, float *const *y, const ptrdiff_t *y_strides) {
    if (c == nullptr || rows < 0 || (x == nullptr && rows > 0)) return BT_BAD_ARGUMENT;
    if (count < 1 || count > most_matrices) return BT_BAD_ARGUMENT;
    if (activations != BT_A16 && activations != BT_A8) return BT_BAD_ARGUMENT;
    Output outputs[most_matrices];
    for (int j = 0; j < count; j++) {
        if (!valid(*matrices[j]) || matrices[j]->in_features != matrices[0]->in_features) return BT_BAD_ARGUMENT;
        outputs[j] = {matrices[j], y[j], y_strides[j]};
    }
    if (rows == 0) return 0;
    Lock lock(c);
    return linear(c, outputs, count, activations, rows, x, x_stride);
}

double bt_read_probe(bt_context *c, const void *data, size_t bytes) {
    const int64_t part = 1 << 20, parts = static_cast<int64_t>(bytes) / part;
    int32_t sums[Pool::max_threads] = {};
    Lock lock(c);
    timespec a, b;
    clock_gettime(CLOCK_MONOTONIC, &a);
    c->pool.run(static_cast<int>(parts), [&](int job, int thread) {
        sums[thread] ^= c->kernels->ops->read(static_cast<const char *>(data) + job * part, part);
    });
    clock_gettime(CLOCK_MONOTONIC, &b);
    int32_t all = 0;
    for (int32_t sum : sums) all ^= sum;
    const double seconds = static_cast<double>(b.tv_sec - a.tv_sec) + 1e-9 * static_cast<double>(b.tv_nsec - a.tv_nsec);
    // The sum is used, or the compiler would leave the reading away.
    return all == 0x5bd1e995 ? 0.0 : static_cast<double>(parts * part) / seconds;
}

}  // extern "C"
