// Codes into tiles; csrc/kernels.h says which bit is where.
#include <cstring>

#include "context.h"

namespace bittern {

namespace {

constexpr int quads = quantum / 4;

// Codes of 16 columns and up to 16 rows as quads, [quad][row * 4 + column]; what is not there stays 0.
void gather(const uint8_t *codes, ptrdiff_t row_stride, ptrdiff_t column_stride, int rows, int columns,
            uint8_t block[quads][64]) {
    memset(block, 0, quads * 64);
    for (int row = 0; row < rows; row++, codes += row_stride) {
        for (int i = 0; i < columns; i++) block[i >> 2][row * 4 + (i & 3)] = codes[i * column_stride];
    }
}

// One block of 16 columns in the layout of a tile, `bits` * 32 bytes.
void store(const uint8_t block[quads][64], int bits, uint8_t *out) {
    if (bits == 8) {
        memcpy(out, block, quads * 64);
        return;
    }
    if (bits == 4) {
        for (int half = 0; half < 2; half++) {
            for (int i = 0; i < 64; i++) {
                out[half * 64 + i] = static_cast<uint8_t>(block[2 * half][i] | block[2 * half + 1][i] << 4);
            }
        }
        return;
    }
    for (int i = 0; i < 64; i++) {
        out[i] = static_cast<uint8_t>((block[0][i] & 3) | (block[1][i] & 3) << 2 | (block[2][i] & 3) << 4 |
                                      (block[3][i] & 3) << 6);
    }
    if (bits != 3) return;
    for (int quad = 0; quad < quads; quad++) {
        uint64_t third = 0;
        for (int i = 0; i < 64; i++) third |= static_cast<uint64_t>(block[quad][i] >> 2 & 1) << i;
        memcpy(out + 64 + quad * 8, &third, 8);
    }
}

bt_matrix shape(int out_features, int in_features, int bits, int group_size) {
    bt_matrix m = {};
    m.out_features = out_features;
    m.in_features = in_features;
    m.type = BT_CODES;
    m.bits = bits;
    m.group_size = group_size;
    m.scale_type = BT_F16;
    return m;
}

}  // namespace

}  // namespace bittern

using namespace bittern;

extern "C" {

int64_t bt_packed_bytes(int out_features, int in_features, int bits, int group_size) {
    if (group_size < 1) return BT_BAD_ARGUMENT;
    const Layout l = layout_of(shape(out_features, in_features, bits, group_size), BT_A16);
    return l.tiles * l.tile_bytes;
}

int bt_pack(bt_context *c, int out_features, int in_features, int bits, int group_size, const uint8_t *codes,
            ptrdiff_t row_stride, ptrdiff_t column_stride, void *packed) {
    bt_matrix m = shape(out_features, in_features, bits, group_size);
    m.codes = m.scales = packed;
    if (c == nullptr || codes == nullptr || !valid(m)) return BT_BAD_ARGUMENT;
    const Layout l = layout_of(m, BT_A16);
    Lock lock(c);
    c->pool.run(l.tiles, [&](int tile, int) {
        uint8_t *out = static_cast<uint8_t *>(packed) + tile * l.tile_bytes;
        const int first = tile * tile_rows;
        const int rows = out_features - first < tile_rows ? out_features - first : tile_rows;
        for (int group = 0; group < l.groups; group++) {
            const int start = group * group_size;
            const int columns = in_features - start < group_size ? in_features - start : group_size;
            const int filled = group == l.groups - 1 ? l.last_columns : l.group_columns;
            for (int at = 0; at < filled; at += quantum, out += bits * 32) {
                uint8_t block[quads][64];
                const int here = columns - at < quantum ? columns - at : quantum;
                gather(codes + first * row_stride + (start + at) * column_stride, row_stride, column_stride, rows, here,
                       block);
                store(block, bits, out);
            }
        }
    });
    return 0;
}

}  // extern "C"
