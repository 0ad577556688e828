// The query rows of one work item, cut into tiles of at most VECTORS registers of lanes, with their running softmax state.
#pragma once
#include "amx.h"
#include "pack.h"
#include "parallel.h"
#include "rows.h"

namespace attnreg {

constexpr int64_t MAX_TILES = 32;
constexpr int64_t MAX_LANES = 4 * LANES;  // of a tile
constexpr int64_t MOST_ROWS = 16;  // of the micro-kernel: padding of packed keys

// One tile: `count` rows from `row` on, in `vectors` * LANES lanes.
template <class Operand>
struct Tile {
    int64_t row, count;
    int vectors;
    TileKeys keys;
    Operand* query;    // [operands of a row][lanes]
    float* weight;     // [channels][lanes], of the additive score
    float* output;     // [row][channels, in whole registers]; of blocks [channel][lane]
    bool summed;       // is there anything in the output?
    float *top, *sum;  // [lanes] maximum and sum of weights
    int32_t *first, *last;  // [lanes] allowed keys
    int32_t *row_of, *head_of;  // [lanes]: row of its sequence, and query head; lanes past the rows repeat the last one's
    int32_t *position, *document;  // [lanes]
    float* excess;     // [lanes], of the position (Place)
    float* slope;      // [lanes]
    int64_t lanes() const { return int64_t(vectors) * LANES; }
    // The output of rows that met no key is 0.
    void settle(int64_t channels) {
        if (!summed) std::fill(output, output + (Operand::BLOCK > 1 ? lanes() : count) * channels, 0.0f);
    }
};

// Operands of a packed panel of a run's values.
inline int64_t panel_length(const Params& p) { return (p.block_kv + MOST_ROWS) * PANEL; }

// Pairs of keys in a row of values that lie as columns: a tile's run may begin anywhere in it, and reads whole blocks.
template <class Operand>
int64_t column_stride(const Params& p) {
    return ((p.block_kv + 1) / 2 + 2 * Operand::BLOCK - 1) / Operand::BLOCK * Operand::BLOCK;
}

// Row `lane` of the tile's output, asked for in order; `turned` has memory for LANES rows.
template <int CHANNELS, class Operand>
const float* output_row(const Tile<Operand>& t, int64_t lane, float* turned) {
    constexpr int PADDED = whole_registers(CHANNELS);
    if constexpr (Operand::BLOCK == 1) return t.output + lane * PADDED;
    if (lane % LANES == 0) sums_to_rows(t.output + lane, t.lanes(), LANES, CHANNELS, turned, PADDED);
    return turned + lane % LANES * PADDED;
}

// Where the rows of a work item come from and go to: row r is row r / group of the sequence, of head `head + r % group`.
struct ItemRows {
    int64_t head, group;
    int64_t first, count;  // rows of this item
};

// A tile's row in a [B, H, S, ...] tensor or a packed one.
template <class T, class Operand>
T* row_pointer(T* base, int64_t batch, int64_t head, int64_t row, const Sequence& s, const Tile<Operand>& t, int64_t lane, bool packed) {
    const int64_t start = packed ? s.q_first * row : s.batch * batch;
    return base + start + t.head_of[lane] * head + t.row_of[lane] * row;
}

// Cuts the item into tiles of VECTORS registers; the last takes the fewest registers, a multiple of STEP, that hold its rows.
template <int VECTORS, int STEP = 1, class Operand>
int64_t cut_tiles(const ItemRows& rows, Tile<Operand>* tiles) {
    constexpr int64_t full = int64_t(VECTORS) * LANES;
    int64_t count = 0;
    for (int64_t done = 0; done < rows.count; done += full) {
        Tile<Operand>& t = tiles[count++];
        t.row = rows.first + done;
        t.count = std::min(full, rows.count - done);
        t.vectors = int((t.count + STEP * LANES - 1) / (STEP * LANES) * STEP);
    }
    return count;
}

template <int VECTORS, int OPERANDS, int CHANNELS, class Operand>
void place_tile(Carver& carver, Tile<Operand>& t, bool additive) {
    constexpr int64_t lanes = int64_t(VECTORS) * LANES;
    t.query = carver.take<Operand>(OPERANDS * lanes);
    t.weight = carver.take<float>(additive ? OPERANDS * lanes : 0);
    t.output = carver.take<float>(lanes * whole_registers(CHANNELS));
    t.top = carver.take<float>(lanes);
    t.sum = carver.take<float>(lanes);
    t.first = carver.take<int32_t>(lanes);
    t.last = carver.take<int32_t>(lanes);
    t.row_of = carver.take<int32_t>(lanes);
    t.head_of = carver.take<int32_t>(lanes);
    t.position = carver.take<int32_t>(lanes);
    t.excess = carver.take<float>(lanes);
    t.document = carver.take<int32_t>(lanes);
    t.slope = carver.take<float>(lanes);
}

// Bounds, positions and per-head numbers of a tile's lanes.
template <class Operand>
void describe_tile(const Params& p, const Sequence& s, const Documents& documents, const ItemRows& rows, Tile<Operand>& t) {
    int64_t row = t.row / rows.group, member = t.row % rows.group;
    for (int64_t lane = 0; lane < t.lanes(); ++lane) {
        t.row_of[lane] = int32_t(row);
        t.head_of[lane] = int32_t(rows.head + member);
        const Place place(row + s.offset);
        t.position[lane] = place.near;
        t.excess[lane] = place.excess;
        t.document[lane] = documents.given() ? documents.id(s.batch, row + s.offset) : 0;
        t.slope[lane] = p.alibi ? p.alibi[s.batch * p.alibi_batch + t.head_of[lane]] : 0.0f;
        if (lane + 1 < t.count && ++member == rows.group) ++row, member = 0;
    }
    t.keys = fill_intervals(p, s, documents, t.row_of, t.count, t.lanes(), t.first, t.last);
}

// The additive score's weights of each lane's head.
template <int CHANNELS, class Operand>
void load_weights(const Params& p, Tile<Operand>& t) {
    const float* rows[MAX_LANES];
    for (int64_t lane = 0; lane < t.lanes(); ++lane) rows[lane] = p.weight + t.head_of[lane] * p.weight_head;
    pack_lanes<CHANNELS>(rows, t.lanes(), t.lanes(), reinterpret_cast<Single*>(t.weight));
}

// What each group of the tile's rows attends of the run first .. first + count - 1, by bounds alone, in operands of WIDTH keys.
template <int ROWS, int WIDTH, class Operand>
void group_depths(const Tile<Operand>& t, int64_t first, int64_t count, Depths* out) {
    const int64_t whole = (count + WIDTH - 1) / WIDTH;
    const bool all = t.keys.all.first <= first && t.keys.all.last >= first + count - 1;
    each_group<ROWS>([&](auto row, auto rows) {
        constexpr int FIRST = decltype(row)::value, LAST = FIRST + decltype(rows)::value - 1;
        Depths& depths = out[FIRST];
        depths = {0, whole};
        if (all) return;
        const int64_t begin = *std::min_element(t.first + FIRST, t.first + LAST + 1) - first;
        const int64_t end = *std::max_element(t.last + FIRST, t.last + LAST + 1) + 1 - first;
        depths.end = std::clamp<int64_t>((end + WIDTH - 1) / WIDTH, 0, whole);
        depths.begin = std::clamp<int64_t>(begin / WIDTH, 0, depths.end);
    });
}

// Sums a run into the tile's output: values[j] times weights[j][row]; rescale[row] is for what was summed before. Of blocks, values lie as
// columns and the output along the lanes.
template <int NV, int CHANNELS, class Operand>
void sum_values(Tile<Operand>& t, int64_t first, int64_t count, Panels<Operand> values, const Operand* weights, const float* rescale) {
    constexpr int PADDED = whole_registers(CHANNELS);
    const float* factors = t.summed ? rescale : nullptr;
    t.summed = true;
#if defined(ATTNREG_HAS_AMX)
    if constexpr (Operand::BLOCK > 1) {
        return multiply_columns<NV, PADDED>(blocks_of(count), values.first, values.panel, weights, t.output, factors);
    }
#endif
    Depths depths[NV * LANES];
    group_depths<NV * LANES, Operand::WIDTH>(t, first, count, depths);
    multiply_values<NV * LANES, PADDED>(depths, values, weights, t.output, factors);
}

// The same without rescaling: `ones` holds as many as there are lanes.
template <int NV, int CHANNELS, class Operand>
void add_values(Tile<Operand>& t, int64_t first, int64_t count, Panels<Operand> values, const Operand* weights, const float* ones) {
#if defined(ATTNREG_HAS_AMX)
    if constexpr (Operand::BLOCK > 1) {
        t.settle(whole_registers(CHANNELS));
        t.summed = true;
        return accumulate_columns<NV, whole_registers(CHANNELS)>(blocks_of(count), values.first, values.panel, weights, t.output);
    }
#endif
    sum_values<NV, CHANNELS>(t, first, count, values, weights, ones);
}

// Pointers to the rows of a [B, Hq, Sq, Skv] tensor that a tile's lanes read; null past the tile's rows.
template <class T, class Operand>
void lane_rows(const T* base, int64_t batch, int64_t head, int64_t row, const Sequence& s, const Tile<Operand>& t, const T** out) {
    for (int64_t lane = 0; lane < t.lanes(); ++lane) {
        out[lane] = lane < t.count ? row_pointer(base, batch, head, row, s, t, lane, false) : nullptr;
    }
}

}  // namespace attnreg
