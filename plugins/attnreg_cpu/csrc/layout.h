// Reading a block layout: the runs of keys of one row block, and the bits of a partial block by lanes.
#pragma once
#include "modifiers.h"

namespace attnreg {

// Query heads whose rows may share an item: all of a group, or one where heads have lists of their own or a block would be too large.
inline int64_t rows_group(const Params& p, int64_t full_tile) {
    const int64_t group = p.q_heads / p.kv_heads;
    if (!p.layout_row_ptr) return group;
    return p.layout_heads > 1 || p.layout_block_q * group > MAX_TILES * full_tile ? 1 : group;
}

// Rows of one item: whole tiles, or under a layout the rows of one block.
inline int64_t rows_per_item(const Params& p, int64_t full_tile, int64_t group) {
    if (p.layout_row_ptr) return p.layout_block_q * group;
    return std::min<int64_t>(p.tiles, MAX_TILES) * full_tile;
}

// Calls use(first key, number of keys, bit tile or -1) for the live blocks of the item's rows. Neighbouring full blocks become one run of
// at most block_kv keys; block_kv is at least a layout block.
template <class Use>
void layout_runs(const Params& p, const Sequence& s, const ItemRows& rows, const Use& use) {
    const int64_t batch = p.layout_batches > 1 ? s.batch : 0, head = p.layout_heads > 1 ? rows.head : 0;
    const int64_t line = (batch * p.layout_heads + head) * p.layout_lines + rows.first / rows.group / p.layout_block_q;
    const int64_t block = p.layout_block_kv, split = p.layout_row_split[line], end = p.layout_row_ptr[line + 1];
    for (int64_t entry = p.layout_row_ptr[line]; entry < split;) {
        const int64_t first = p.layout_columns[entry] * block;
        int64_t keys = block;
        for (++entry; entry < split && p.layout_columns[entry] * block == first + keys && keys + block <= p.block_kv; ++entry) {
            keys += block;
        }
        use(first, std::min(keys, s.k_len - first), int64_t(-1));
    }
    for (int64_t entry = split; entry < end; ++entry) {
        const int64_t first = p.layout_columns[entry] * block;
        use(first, std::min(block, s.k_len - first), int64_t(p.layout_tiles[entry]));
    }
}

// Turns a bit tile to a tile's lanes: out[word][lane] holds bits of keys word * 32 ... of the lane's row; lanes past the rows hold 0.
// False where no lane may attend any key.
template <class Operand>
bool lane_bits(const Params& p, const Tile<Operand>& t, int64_t bit_tile, int32_t* out) {
    const int64_t words = (p.layout_block_kv + 31) / 32;
    const int32_t* bits = p.layout_bits + bit_tile * p.layout_block_q * words;
    int32_t live = 0;
    for (int64_t lane = 0; lane < t.lanes(); ++lane) {
        const int64_t row = t.row_of[lane] % p.layout_block_q;
        for (int64_t w = 0; w < words; ++w) {
            const int32_t value = lane < t.count ? bits[row * words + w] : 0;
            out[w * t.lanes() + lane] = value;
            live |= value;
        }
    }
    return live != 0;
}

}  // namespace attnreg
