// The rows of a task in vector lanes: their queries, scores, running softmax and sums.
#pragma once
#include "decode_lanes.h"
#include "decode_masks.h"
#include "decode_state.h"

namespace attnreg {

// Rows of keys or values in float32, and what to ask for beside each.
struct FloatRows {
    const float* const* rows;
    Ahead<float> ahead;
};

class LaneRows {
  public:
    LaneRows(const Shape& shape, Masks& masks, Carver& carver) : s_(shape), masks_(masks) {
        queries_ = carver.take<float>(s_.slots * s_.head_k);
        sums_ = carver.take<float>(s_.slots * s_.head_v);
        top_ = carver.take<float>(s_.slots);
        sum_ = carver.take<float>(s_.slots);
        scores_ = carver.take<float>(MOST_LANES * (s_.tile + MOST_LANE_KEYS));
        row_scores_ = carver.take<float>(LANES * s_.tile);
        peak_ = carver.take<float>(MOST_LANES);
        rescale_ = carver.take<float>(MOST_LANES);
    }

    void start(const Task& task) {
        task_ = &task;
        std::fill(queries_, queries_ + s_.slots * s_.head_k, 0.0f);
        std::fill(sums_, sums_ + s_.slots * s_.head_v, 0.0f);
        std::fill(top_, top_ + s_.slots, -INFINITY_F);
        std::fill(sum_, sum_ + s_.slots, 0.0f);
    }

    void load(int64_t h, int64_t r, const float* q) {
        for (int64_t c = 0; c < s_.head_k; ++c) queries_[(h * s_.head_k + c) * s_.rows + r] = q[c];
    }

    // Attends `count` keys of one KV head, few registers of rows at a time, so that their scores stay in the first cache.
    void attend(int64_t h, int64_t kv_head, int64_t count, RowModifiers& m, FloatRows keys, FloatRows values) {
        const int64_t vectors = (task_->rows + LANES - 1) / LANES;
        for (int64_t v = 0; v < vectors;) {
            const int64_t left = vectors - v, taken = left == 1 || left == 3 ? left : 2, row = v * LANES;
            switch (taken) {
                case 1: attend_vectors<1>(h, kv_head, row, count, m, keys, values); break;
                case 2: attend_vectors<2>(h, kv_head, row, count, m, keys, values); break;
                default: attend_vectors<3>(h, kv_head, row, count, m, keys, values);
            }
            v += taken, keys.ahead = values.ahead = {};
        }
    }

    // Turns what was summed to rows.
    void leave(State state) const {
        for (int64_t h = 0; h < task_->heads; ++h) {
            const int64_t slot = h * s_.rows;
            sums_to_rows(sums_ + slot * s_.head_v, s_.rows, task_->rows, s_.head_v, state.sums + slot * s_.stride_v, s_.stride_v);
            for (int64_t r = slot; r < slot + task_->rows; ++r) state.rows[r] = {top_[r], sum_[r]};
        }
    }

  private:
    static constexpr int64_t MOST_LANES = MOST_LANE_VECTORS * LANES;

    template <int NV>
    void attend_vectors(int64_t h, int64_t kv_head, int64_t row, int64_t count, RowModifiers& m, FloatRows keys, FloatRows values) {
        static_assert(NV <= MOST_LANE_VECTORS, "scratch");
        const int64_t slot = h * s_.rows + row;
        score_lanes<NV>(queries_ + h * s_.head_k * s_.rows + row, s_.rows, keys.rows, count, s_.head_k, keys.ahead, scores_, peak_);
        float scale = m.scale;
        if (!m.plain() || !masks_.plain()) {
            for (int v = 0; v < NV; ++v) modify<NV>(kv_head, row + v * LANES, count, m, scores_ + v * LANES, peak_ + v * LANES);
            scale = 1.0f;
        }
        online_softmax<NV>(reinterpret_cast<Single*>(scores_), scores_, count, scale, peak_, top_ + slot, sum_ + slot, rescale_);
        if (m.weight_unit != 1.0f || m.value_scale) scale_keys<NV>(scores_, count, m.weight_unit, m.value_scale);
        float* sums = sums_ + h * s_.head_v * s_.rows + row;
        add_lanes<NV>(scores_, rescale_, values.rows, count, s_.head_v, values.ahead, sums, s_.rows);
    }

    // Modifies the scores of a register of rows, one row at a time.
    template <int NV>
    void modify(int64_t kv_head, int64_t row, int64_t count, RowModifiers& m, float* scores, float* peak) {
        lanes_to_rows<NV>(scores, count, row_scores_, s_.tile);
        for (int64_t r = row; r < std::min(row + LANES, task_->rows); ++r) {
            masks_.fill(r, kv_head, m);
            peak[r - row] = modify_row(m, row_scores_ + (r - row) * s_.tile, count);
        }
        rows_to_lanes<NV>(row_scores_, s_.tile, count, scores);
    }

    const Shape s_;
    Masks& masks_;
    const Task* task_ = nullptr;
    float* queries_;     // [head][channel][row]
    float* sums_;        // [head][channel][row]
    float *top_, *sum_;  // [head][row]
    float* scores_;      // [key][lane] of the registers at hand
    float* row_scores_;  // [lane][key] of one of them
    float *peak_, *rescale_;
};

}  // namespace attnreg
