// Reading queries and writing finished rows, whatever their types: few elements, so types are told apart at run time.
#pragma once
#include "decode_plan.h"
#include "decode_scores.h"
#include "decode_types.h"

namespace attnreg {

inline float read_float(const void* base, int64_t index, int64_t type) {
    switch (type) {
        case 0: return static_cast<const float*>(base)[index];
        case 1: return widen(static_cast<const half_t*>(base)[index]);
        case 2: return widen(static_cast<const bfloat_t*>(base)[index]);
        case 3: return widen_value(static_cast<const e4m3_t*>(base)[index]);
        default: return widen_value(static_cast<const e5m2_t*>(base)[index]);
    }
}

inline void write_float(void* base, int64_t index, int64_t type, float value) {
    switch (type) {
        case 0: static_cast<float*>(base)[index] = value; break;
        case 1: narrow(static_cast<half_t*>(base) + index, value); break;
        default: narrow(static_cast<bfloat_t*>(base) + index, value);
    }
}

inline float scale_at(const float* scales, int64_t batch_stride, int64_t head_stride, int64_t batch, int64_t head) {
    return scales == nullptr ? 1.0f : scales[batch * batch_stride + head * head_stride];
}

class Output {
  public:
    // unit: what every stored value is multiplied by.
    Output(const DecodeParams& d, int64_t head_v, float unit) : d_(d), p_(d.call), head_v_(head_v), unit_(unit) {}

    // `row` is row / group of the task's head; `sums` and `state` are of that row alone.
    void write(const Task& task, int64_t kv_head, int64_t row, const float* sums, RowState state) const {
        const int64_t group = p_.q_heads / p_.kv_heads, head = kv_head * group + (task.row + row) % group;
        const RowEnd end = finish_row(state, p_.sinks ? p_.sinks + head : nullptr);
        const bool one_scale = d_.keys_a_scale == 0;
        const float* scales = one_scale ? d_.v_descale : nullptr;
        const float scale = unit_ * scale_at(scales, d_.v_scale_batch, d_.v_scale_head, task.sequence.batch, kv_head);
        const bool packed = p_.cu_q != nullptr;
        put(packed ? 0 : task.sequence.batch, head, task.sequence.q_first + (task.row + row) / group, sums, end, scale);
    }

    // Packed rows beyond the last sequence belong to none.
    void clear_rest() const {
        if (!p_.cu_q) return;
        for (int64_t row = read_integer(p_.cu_q, p_.batch, p_.wide_cu_q); row < p_.q_rows; ++row) {
            for (int64_t head = 0; head < p_.q_heads; ++head) put(0, head, row, nullptr, {-INFINITY_F, 0.0f}, 0.0f);
        }
    }

  private:
    void put(int64_t batch, int64_t head, int64_t row, const float* sums, RowEnd end, float scale) const {
        const int64_t at = batch * p_.out_batch + head * p_.out_head + row * p_.out_row;
        const float factor = end.factor * scale;
        for (int64_t c = 0; c < head_v_; ++c) write_float(p_.out, at + c, d_.out_type, sums ? sums[c] * factor : 0.0f);
        if (p_.lse) p_.lse[batch * p_.lse_batch + head * p_.lse_head + row * p_.lse_row] = end.lse;
    }

    const DecodeParams& d_;
    const Params& p_;
    const int64_t head_v_;
    const float unit_;
};

}  // namespace attnreg
