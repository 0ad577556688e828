// One task of decoding: the rows of a few KV heads against one piece of the keys, tile by tile.
#pragma once
#include "decode_lane_rows.h"
#include "decode_output.h"
#include "decode_product.h"

namespace attnreg {

template <class T>
class Worker {
  public:
    // Takes its arrays from the carver, which with a null base only counts what they need.
    Worker(const DecodeParams& d, const Shape& shape, Carver& carver)
        : d_(d), p_(d.call), s_(shape), group_(p_.q_heads / p_.kv_heads), masks_(d.call, shape.tile, shape.rows, carver),
          lanes_(shape, masks_, carver) {
        state_ = carver.take<float>(s_.state_floats());
        q_ = carver.take<float>(s_.slots * s_.stride_k);
        scores_ = carver.take<float>(s_.rows * s_.tile);
        rescale_ = carver.take<float>(s_.rows);
        key_scale_ = carver.take<float>(s_.tile);
        value_scale_ = carver.take<float>(s_.tile);
        key_at_ = carver.take<int64_t>(s_.tile + s_.ahead);
        value_at_ = carver.take<int64_t>(s_.tile);
        keys_ = carver.take<const T*>(2 * s_.tile + s_.ahead);
        asked_ = carver.take<const T*>(s_.streams > 1 ? 2 * s_.tile : 0);
        wide_keys_ = carver.take<const float*>(s_.tile);
        wide_values_ = carver.take<const float*>(s_.tile);
        staged_keys_ = carver.take<float>(s_.tile * s_.stride_k);
        staged_values_ = carver.take<float>(s_.tile * s_.stride_v);
    }

    float* own_state() const { return state_; }

    // Sums the task's keys into the state.
    void sum(const Task& task, const Documents& none, State state) {
        task_ = &task;
        in_lanes_ = fill_lanes(task.rows);
        staged_ = sizeof(T) < sizeof(float) && (in_lanes_ || task.rows >= s_.stage);
        clear(state);
        load_queries();
        masks_.start(task, none);
        for (int64_t first = task.keys.first; first <= task.keys.last; first += s_.tile) {
            const int64_t count = std::min(s_.tile, task.keys.last + 1 - first);
            if (!masks_.enter(first, count)) continue;
            locate(first, count);
            for (int64_t h = 0; h < task.heads; ++h) attend(h, first, count, state);
        }
        if (in_lanes_) lanes_.leave(state);
    }

  private:
    int64_t slot(int64_t h) const { return h * s_.rows; }

    void clear(State state) {
        std::memset(state.sums, 0, size_t(s_.slots * s_.stride_v) * sizeof(float));
        for (int64_t slot = 0; slot < s_.slots; ++slot) state.rows[slot] = RowState();
    }

    void load_queries() {
        const int64_t batch = p_.cu_q ? 0 : task_->sequence.batch;
        if (in_lanes_) lanes_.start(*task_);
        for (int64_t h = 0; h < task_->heads; ++h) {
            const int64_t kv_head = task_->head + h;
            const float scale =
                Unit<T>::before * scale_at(d_.q_descale, d_.q_scale_batch, d_.q_scale_head, task_->sequence.batch, kv_head);
            for (int64_t r = 0; r < task_->rows; ++r) {
                const int64_t row = task_->sequence.q_first + (task_->row + r) / group_;
                const int64_t head = kv_head * group_ + (task_->row + r) % group_;
                const int64_t at = batch * p_.q_batch + head * p_.q_head + row * p_.q_row;
                float* q = q_ + (slot(h) + r) * s_.stride_k;
                for (int64_t c = 0; c < s_.head_k; ++c) q[c] = read_float(p_.q, at + c, d_.q_type) * scale;
                for (int64_t c = s_.head_k; c < s_.stride_k; ++c) q[c] = 0.0f;
                if (in_lanes_) lanes_.load(h, r, q);
            }
        }
    }

    // Where the tile's rows of head 0 lie, in elements from the tensors' starts; of keys also the next tile's first rows.
    void locate(int64_t first, int64_t count) {
        const int64_t more = std::clamp<int64_t>(task_->keys.last + 1 - first - count, 0, s_.ahead);
        if (p_.page_size == 0) {
            const int64_t batch = p_.cu_k ? 0 : task_->sequence.batch, row = task_->sequence.k_first + first;
            for (int64_t j = 0; j < count + more; ++j) key_at_[j] = batch * p_.k_batch + (row + j) * p_.k_row;
            for (int64_t j = 0; j < count; ++j) value_at_[j] = batch * p_.v_batch + (row + j) * p_.v_row;
        } else {
            locate_pages(first, count + more, p_.k_batch, p_.k_row, key_at_);
            locate_pages(first, count, p_.v_batch, p_.v_row, value_at_);
        }
        std::fill(key_at_ + count + more, key_at_ + count + s_.ahead, key_at_[count - 1]);
    }
    void locate_pages(int64_t first, int64_t count, int64_t page_stride, int64_t row_stride, int64_t* at) const {
        const int64_t table = task_->sequence.batch * p_.table_row;
        for (int64_t j = 0; j < count;) {
            const int64_t entry = (first + j) / p_.page_size;
            // An entry below 0 is an unused page; a table that calls it used is wrong, but must not read outside the cache.
            const int64_t page = std::max<int64_t>(read_integer(p_.block_table, table + entry, p_.wide_table), 0);
            for (int64_t i = (first + j) % p_.page_size; i < p_.page_size && j < count; ++i, ++j) {
                at[j] = page * page_stride + i * row_stride;
            }
        }
    }

    // The rows in the order in which they are read: the keys, repeated up to whole registers, the values, and the keys that come next.
    // Returns what to ask for beside each.
    Ahead<T> list_rows(int64_t h, int64_t count, int64_t padded) {
        const int64_t kv_head = task_->head + h, next = h + 1 < task_->heads ? p_.k_head : -h * p_.k_head;
        const T* k = static_cast<const T*>(p_.k) + kv_head * p_.k_head;
        const T* v = static_cast<const T*>(p_.v) + kv_head * p_.v_head;
        const int64_t* following = h + 1 < task_->heads ? key_at_ : key_at_ + count;
        const T** row = keys_;
        for (int64_t j = 0; j < count; ++j) *row++ = k + key_at_[j];
        for (int64_t j = count; j < padded; ++j) *row++ = k + key_at_[count - 1];
        for (int64_t j = 0; j < count; ++j) *row++ = v + value_at_[j];
        for (int64_t j = 0; j < s_.ahead; ++j) *row++ = k + next + following[j];
        if (s_.streams <= 1) return s_.ahead > 0 ? Ahead<T>{keys_ + s_.ahead} : Ahead<T>{};
        // Memory serves a few streams faster than one (measured on a Zen 3: 26.6 against 22.0 GB/s, float32, one row a KV head).
        in_turns(v, value_at_, count, padded, asked_);
        in_turns(k + next, following, count, count, asked_ + padded);
        return {asked_};
    }
    // `wanted` of `count` rows, the last repeated, in the order in which as many parts of them as there are streams take turns.
    void in_turns(const T* base, const int64_t* at, int64_t count, int64_t wanted, const T** row) const {
        const int64_t part = (count + s_.streams - 1) / s_.streams;
        int64_t j = 0;
        for (int64_t i = 0; j < wanted; ++i) {
            for (int64_t s = i; s < i + s_.streams * part && j < wanted; s += part) row[j++] = base + at[std::min(s, count - 1)];
        }
    }

    void attend(int64_t h, int64_t first, int64_t count, State state) {
        const int64_t padded = round_up(count, LANES), rows = task_->rows;
        const Ahead<T> ahead = list_rows(h, count, padded), later = ahead.from(padded);
        const T* const* values = keys_ + padded;
        RowModifiers m = modifiers(task_->head + h, first, count);
        if (staged_) widen_rows(keys_, padded, s_.head_k, s_.stride_k, ahead, staged_keys_, wide_keys_);
        if (in_lanes_) {
            const auto keys = floats(keys_, wide_keys_, ahead);
            if (staged_) widen_rows(values, count, s_.head_v, s_.stride_v, later, staged_values_, wide_values_);
            return lanes_.attend(h, task_->head + h, count, m, keys, floats(values, wide_values_, later));
        }
        const float* q = q_ + slot(h) * s_.stride_k;
        if (staged_) {
            dot_tile(q, s_.stride_k, rows, wide_keys_, padded, s_.head_k, {}, scores_, s_.tile);
        } else {
            dot_tile(q, s_.stride_k, rows, keys_, padded, s_.head_k, ahead, scores_, s_.tile);
        }
        weigh(task_->head + h, count, m, state.rows + slot(h));
        float* sums = state.sums + slot(h) * s_.stride_v;
        if (staged_) {
            widen_rows(values, count, s_.head_v, s_.stride_v, later, staged_values_, wide_values_);
            add_tile(scores_, s_.tile, rows, rescale_, wide_values_, count, s_.head_v, {}, sums, s_.stride_v);
        } else {
            add_tile(scores_, s_.tile, rows, rescale_, values, count, s_.head_v, later, sums, s_.stride_v);
        }
    }

    // Rows that are float32 already are read where they lie, and then the next are asked for; staged ones were asked for before.
    static FloatRows floats(const float* const* rows, const float* const*, Ahead<float> ahead) { return {rows, ahead}; }
    template <class U>
    static FloatRows floats(const U* const*, const float* const* staged, Ahead<U>) {
        return {staged, {}};
    }

    static void widen_rows(const T* const* rows, int64_t count, int64_t dim, int64_t stride, Ahead<T> ahead, float* staged,
                           const float** wide) {
        for (int64_t j = 0; j < count; ++j) {
            if (ahead) ahead.ask(j, 0, dim * int64_t(sizeof(T)));
            float* to = staged + j * stride;
            int64_t d = 0;
            for (; d + LANES <= dim; d += LANES) store(to + d, load_wide(rows[j] + d));
            if (d < dim) store(to + d, load_part(rows[j] + d, dim - d));
            wide[j] = to;
        }
    }

    // Scores to weights, row by row.
    void weigh(int64_t kv_head, int64_t count, RowModifiers& m, RowState* rows) {
        for (int64_t r = 0; r < task_->rows; ++r) {
            float* scores = scores_ + r * s_.tile;
            masks_.fill(r, kv_head, m);
            const bool plain = m.plain() && masks_.plain() && count % LANES == 0;
            const float peak = plain ? rounded(greatest(scores, count) * m.scale) : modify_row(m, scores, count);
            rescale_[r] = online_softmax(m, rows[r], scores, count, plain ? m.scale : 1.0f, peak);
        }
    }

    // What all rows have in common.
    RowModifiers modifiers(int64_t kv_head, int64_t first, int64_t count) {
        const int64_t batch = task_->sequence.batch;
        RowModifiers m{};
        m.scale = float(p_.scale) * Unit<T>::after;
        m.weight_unit = Unit<T>::before;
        m.softcap = float(p_.softcap);
        if (d_.keys_a_scale > 0) {
            const int64_t k_at = batch * d_.k_scale_batch + kv_head * d_.k_scale_head;
            const int64_t v_at = batch * d_.v_scale_batch + kv_head * d_.v_scale_head;
            m.key_scale = block_scales(d_.k_descale, k_at, d_.k_scale_block, first, count, key_scale_);
            m.value_scale = block_scales(d_.v_descale, v_at, d_.v_scale_block, first, count, value_scale_);
        } else {
            m.scale *= scale_at(d_.k_descale, d_.k_scale_batch, d_.k_scale_head, batch, kv_head);
        }
        return m;
    }

    const float* block_scales(const float* scales, int64_t at, int64_t stride, int64_t first, int64_t count, float* out) const {
        if (scales == nullptr) return nullptr;
        for (int64_t j = 0; j < count; ++j) out[j] = scales[at + (first + j) / d_.keys_a_scale * stride];
        return out;
    }

    const DecodeParams& d_;
    const Params& p_;
    const Shape s_;
    const int64_t group_;
    Masks masks_;
    LaneRows lanes_;
    const Task* task_ = nullptr;
    bool in_lanes_ = false, staged_ = false;
    float *state_, *q_, *scores_, *rescale_, *key_scale_, *value_scale_;
    int64_t *key_at_, *value_at_;
    const T **keys_, **asked_;
    const float **wide_keys_, **wide_values_;
    float *staged_keys_, *staged_values_;
};

}  // namespace attnreg
