// Sizes that the tasks of a call share, and what a task has summed so far.
#pragma once
#include "decode_scores.h"

namespace attnreg {

inline int64_t round_up(int64_t x, int64_t by) { return (x + by - 1) / by * by; }

struct Shape {
    int64_t head_k, head_v;
    int64_t stride_k, stride_v;  // rounded up to whole registers
    int64_t tile;                // keys at a time, a multiple of LANES
    int64_t rows;                // of one KV head, at most, rounded up to whole registers
    int64_t slots;               // of all KV heads of a task, at most: head * rows + row
    int64_t stage;               // rows from which keys and values are widened first
    int64_t ahead;               // rows that are asked for in advance, at most a tile
    int64_t streams;             // above 1: the next tile is asked for instead, in so many places at once

    int64_t state_floats() const { return slots * (stride_v + 2); }
};

// What a task has summed so far.
struct State {
    float* sums;  // [slot][stride_v]
    RowState* rows;

    State(float* base, const Shape& s) : sums(base), rows(reinterpret_cast<RowState*>(base + s.slots * s.stride_v)) {}
};

}  // namespace attnreg
