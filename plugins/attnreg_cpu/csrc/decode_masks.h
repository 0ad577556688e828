// What each query row of a task may attend within a tile of keys, and what is added to its scores there.
#pragma once
#include "decode_plan.h"
#include "decode_scores.h"
#include "decode_types.h"
#include "parallel.h"

namespace attnreg {

// ids[j] == id for `count` keys, as all ones or 0; says whether any is.
template <class I>
bool match_ids(const I* ids, int64_t stride, I id, int64_t count, int32_t* same) {
    int32_t any = 0;
    for (int64_t j = 0; j < count; ++j) {
        same[j] = -int32_t(ids[j * stride] == id);
        any |= same[j];
    }
    return any != 0;
}

template <class F>
void widen_strided(const F* from, int64_t stride, int64_t count, float* to) {
    for (int64_t j = 0; j < count; ++j) to[j] = widen(from[j * stride]);
}

class Masks {
  public:
    Masks(const Params& p, int64_t tile, int64_t rows, Carver& carver) : p_(p), group_(p.q_heads / p.kv_heads) {
        allowed_ = carver.take<int32_t>(tile);
        bias_ = carver.take<float>(tile);
        keys_ = carver.take<Interval>(rows);
    }

    void start(const Task& task, const Documents& none) {
        task_ = &task;
        all_ = {0, INT64_MAX};
        for (int64_t r = 0; r < task.rows; ++r) {
            const int64_t at = position(r);
            keys_[r] = allowed_keys(p_, task.sequence, none, at);
            if (p_.documents && (at < 0 || at >= p_.kv_rows)) keys_[r] = {0, -1};
            all_.first = std::max(all_.first, keys_[r].first);
            all_.last = std::min(all_.last, keys_[r].last);
        }
    }

    // Sets the tile; false where documents leave none of its keys to any row.
    bool enter(int64_t first_key, int64_t count) {
        first_key_ = first_key;
        count_ = count;
        bounded_ = first_key < all_.first || first_key + count - 1 > all_.last;
        filled_ = -1;
        if (!p_.documents) return true;
        for (int64_t r = 0; r < task_->rows; r += group_ - (task_->row + r) % group_) {
            if (keys_[r].first <= keys_[r].last && same_document(r)) return true;
        }
        return false;
    }

    // Does the tile neither hide nor change a score of any row?
    bool plain() const { return !bounded_ && !p_.bias && !p_.mask && !p_.documents && !p_.alibi; }

    // Completes what row r of the KV head adds and hides. Valid until the next call.
    void fill(int64_t r, int64_t kv_head, RowModifiers& m) {
        const int64_t query = (task_->row + r) / group_, head = kv_head * group_ + (task_->row + r) % group_;
        m.alibi = p_.alibi != nullptr;
        if (m.alibi) m.slope = p_.alibi[task_->sequence.batch * p_.alibi_batch + head];
        const Place place(position(r) - first_key_);
        m.position = place.near, m.excess = place.excess;
        m.bounded = bounded_;
        m.first = int32_t(std::clamp<int64_t>(keys_[r].first - first_key_, -1, INT32_MAX));
        m.last = int32_t(std::clamp<int64_t>(keys_[r].last - first_key_, -1, INT32_MAX));
        m.bias = p_.bias ? read_bias(query, head) : nullptr;
        m.allowed = p_.documents || p_.mask ? allow(r, query, head) : nullptr;
    }

  private:
    int64_t position(int64_t r) const { return (task_->row + r) / group_ + task_->sequence.offset; }

    const float* read_bias(int64_t query, int64_t head) {
        const int64_t at = task_->sequence.batch * p_.bias_batch + head * p_.bias_head + query * p_.bias_row + first_key_ * p_.bias_key;
        switch (p_.bias_type) {
            case 0: widen_strided(static_cast<const float*>(p_.bias) + at, p_.bias_key, count_, bias_); break;
            case 1: widen_strided(static_cast<const half_t*>(p_.bias) + at, p_.bias_key, count_, bias_); break;
            default: widen_strided(static_cast<const bfloat_t*>(p_.bias) + at, p_.bias_key, count_, bias_);
        }
        return bias_;
    }

    const int32_t* allow(int64_t r, int64_t query, int64_t head) {
        if (p_.mask == nullptr) {
            if (filled_ != query && keys_[r].first <= keys_[r].last) same_document(r);
            filled_ = query;  // rows of one query share its document
            return allowed_;
        }
        if (!p_.documents || keys_[r].first > keys_[r].last) {
            std::memset(allowed_, -1, size_t(count_) * sizeof(int32_t));
        } else {
            same_document(r);
        }
        const uint8_t* mask = p_.mask + task_->sequence.batch * p_.mask_batch + head * p_.mask_head + query * p_.mask_row;
        mask += first_key_ * p_.mask_key;
        for (int64_t j = 0; j < count_; ++j) allowed_[j] &= -int32_t(mask[j * p_.mask_key] != 0);
        return allowed_;
    }

    bool same_document(int64_t r) {
        const int64_t row = task_->sequence.batch * p_.document_batch, at = row + position(r) * p_.document_row;
        switch (p_.document_width) {
            case 8: return match<int64_t>(row, at);
            case 4: return match<int32_t>(row, at);
            case 2: return match<int16_t>(row, at);
            default: return match<int8_t>(row, at);
        }
    }
    template <class I>
    bool match(int64_t row, int64_t at) {
        const I* ids = static_cast<const I*>(p_.documents);
        return match_ids(ids + row + first_key_ * p_.document_row, p_.document_row, ids[at], count_, allowed_);
    }

    const Params& p_;
    const int64_t group_;
    const Task* task_ = nullptr;
    int32_t* allowed_;
    float* bias_;
    Interval* keys_;
    Interval all_{};
    int64_t first_key_ = 0, count_ = 0, filled_ = -1;
    bool bounded_ = false;
};

}  // namespace attnreg
