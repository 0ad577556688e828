// The query rows of one work item, cut into tiles of at most VECTORS registers of lanes, with their running softmax state.
#pragma once
#include "pack.h"
#include "parallel.h"
#include "rows.h"
#include "softmax.h"

namespace attnreg {

constexpr int64_t MAX_TILES = 32;

// One tile: `count` rows from `row` on, in `vectors` * LANES lanes.
template <class Operand>
struct Tile {
    int64_t row, count;
    int vectors;
    TileKeys keys;
    Operand* query;    // [operands of a row][lanes]
    float* output;     // [channels][lanes]
    float *top, *sum;  // [lanes] maximum, as a power of 2, and sum of weights
    int32_t *first, *last;  // [lanes] allowed keys
    int32_t *position, *document;  // [lanes]
    float* slope;      // [lanes]
    int64_t lanes() const { return int64_t(vectors) * LANES; }
};

// Where the rows of a work item come from and go to. Rows are position-major: row r is position r / group of head `head + r % group`.
struct ItemRows {
    int64_t head, group;
    int64_t first, count;  // rows of this item
    int64_t position(int64_t row) const { return row / group; }
    int64_t head_of(int64_t row) const { return head + row % group; }
};

template <class T>
T* row_pointer(T* base, int64_t batch, int64_t head, int64_t row, const Sequence& s, const ItemRows& rows, int64_t r, bool packed) {
    const int64_t start = packed ? s.q_first * row : s.batch * batch;
    return base + start + rows.head_of(r) * head + rows.position(r) * row;
}

// Cuts the item into tiles of VECTORS registers; the last takes the fewest registers that hold its rows.
template <int VECTORS, class Operand>
int64_t cut_tiles(const ItemRows& rows, Tile<Operand>* tiles) {
    constexpr int64_t full = int64_t(VECTORS) * LANES;
    int64_t count = 0;
    for (int64_t done = 0; done < rows.count; done += full) {
        Tile<Operand>& t = tiles[count++];
        t.row = rows.first + done;
        t.count = std::min(full, rows.count - done);
        t.vectors = int((t.count + LANES - 1) / LANES);
    }
    return count;
}

template <int VECTORS, int OPERANDS, int CHANNELS, class Operand>
void place_tile(Carver& carver, Tile<Operand>& t) {
    constexpr int64_t lanes = int64_t(VECTORS) * LANES;
    t.query = carver.take<Operand>(OPERANDS * lanes);
    t.output = carver.take<float>(CHANNELS * lanes);
    t.top = carver.take<float>(lanes);
    t.sum = carver.take<float>(lanes);
    t.first = carver.take<int32_t>(lanes);
    t.last = carver.take<int32_t>(lanes);
    t.position = carver.take<int32_t>(lanes);
    t.document = carver.take<int32_t>(lanes);
    t.slope = carver.take<float>(lanes);
}

// Bounds, positions and per-head numbers of a tile's lanes.
template <class Operand>
void describe_tile(const Params& p, const Sequence& s, const Documents& documents, const ItemRows& rows, Tile<Operand>& t) {
    t.keys = fill_intervals(p, s, documents, t.row, t.count, rows.group, t.lanes(), t.first, t.last);
    for (int64_t lane = 0; lane < t.lanes(); ++lane) {
        const int64_t r = t.row + std::min(lane, t.count - 1), position = rows.position(r) + s.offset;
        t.position[lane] = int32_t(position);
        t.document[lane] = documents.given() ? documents.id(s.batch, position) : 0;
        t.slope[lane] = p.alibi ? p.alibi[s.batch * p.alibi_batch + rows.head_of(r)] : 0.0f;
    }
}

// Pointers to the rows of a [B, Hq, Sq, Skv] tensor that a tile's lanes read; null past the tile's rows.
template <class T, class Operand>
void lane_rows(const T* base, int64_t batch, int64_t head, int64_t row, const Sequence& s, const ItemRows& rows,
               const Tile<Operand>& t, const T** out) {
    for (int64_t lane = 0; lane < t.lanes(); ++lane) {
        const int64_t r = t.row + lane;
        out[lane] = lane < t.count ? base + s.batch * batch + rows.head_of(r) * head + rows.position(r) * row : nullptr;
    }
}

}  // namespace attnreg
