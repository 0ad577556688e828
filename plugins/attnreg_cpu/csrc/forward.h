// Tiled online-softmax attention, forward.
//
// Work item: one run of query rows of one KV head's group. It walks the keys that any of its rows may attend; each run of keys is
// widened and packed once for all tiles (query heads) of the item.
#pragma once
#include <cmath>

#include "additive.h"
#include "layout.h"
#include "micro.h"
#include "source.h"

namespace attnreg {

template <class T, class Operand, int HEAD_K, int HEAD_V, int VECTORS, bool ADDITIVE>
class Forward {
  public:
    explicit Forward(const Params& p) : p_(p), documents_(p) {
        group_ = rows_group(p, FULL);
        rows_per_item_ = rows_per_item(p, FULL, group_);
        // Short calls: smaller items, until every thread has a few.
        while (!p.layout_row_ptr && rows_per_item_ > FULL && total_items() < 4 * p.threads) {
            rows_per_item_ = (rows_per_item_ / FULL + 1) / 2 * FULL;
        }
        first_item_.push_back(0);
        for (int64_t b = 0; b < p.batch; ++b) {
            const int64_t rows = sequence_at(p, b).q_len * group_;
            first_item_.push_back(first_item_.back() + (rows + rows_per_item_ - 1) / rows_per_item_ * head_groups());
        }
    }

    // 0, 1 where a thread could not get its scratch memory, or 2 where parts would have to stand for a value that is not finite.
    int run() {
        if (p_.cu_q) clear_rest();
        std::atomic<int> failed{0};
        parallel_for(first_item_.back(), p_.threads, [&](int64_t item, int64_t) {
            char* scratch = Scratch::get(scratch_bytes());
            if (scratch == nullptr) {
                failed = 1;
                return;
            }
            [[maybe_unused]] const Registers<Operand> registers;
            Worker worker(*this, scratch);
            worker.attend(item);
            if (!worker.finite()) failed = 2;
        });
        return failed;
    }

  private:
    static constexpr int64_t FULL = int64_t(VECTORS) * LANES;
    static constexpr bool BLOCKS = Operand::BLOCK > 1;
    static constexpr int PARTS = Operand::PARTS;
    static constexpr int OPERANDS_K = operands_of<Operand>(HEAD_K);
    static constexpr int PADDED_K = whole_registers(OPERANDS_K), PADDED_V = whole_registers(HEAD_V);
    static constexpr int PANELS = (HEAD_V + PANEL - 1) / PANEL;
    // Keys that the product of NV vectors takes at once.
    static constexpr int64_t keys_at_once(int nv) { return BLOCKS ? Operand::BLOCK : micro_rows(nv); }
    // Rows of keys can be read where they lie if they hold the very operands that the product takes.
    static constexpr bool KEYS_IN_PLACE =
        PARTS == 1 && (std::is_same<T, float>::value || (Operand::WIDTH == 2 && HEAD_K % (Operand::WIDTH * Operand::BLOCK) == 0));
    static constexpr bool VALUES_IN_PLACE = std::is_same<T, float>::value && HEAD_V % LANES == 0;

    int64_t total_items() const {
        int64_t items = 0;
        for (int64_t b = 0; b < p_.batch && items < 4 * p_.threads; ++b) {
            items += (sequence_at(p_, b).q_len * group_ + rows_per_item_ - 1) / rows_per_item_ * head_groups();
        }
        return items;
    }

    int64_t head_groups() const { return p_.q_heads / group_; }

    // Packed rows that belong to no sequence: output 0, lse -inf.
    void clear_rest() {
        const int64_t begin = read_integer(p_.cu_q, 0, p_.wide_cu_q), end = read_integer(p_.cu_q, p_.batch, p_.wide_cu_q);
        for (int64_t row = 0; row < p_.q_rows; ++row) {
            if (row == begin && end > begin) row = end;
            if (row >= p_.q_rows) break;
            for (int64_t h = 0; h < p_.q_heads; ++h) {
                T* out = static_cast<T*>(p_.out) + h * p_.out_head + row * p_.out_row;
                std::memset(static_cast<void*>(out), 0, HEAD_V * sizeof(T));
                if (p_.lse) p_.lse[h * p_.lse_head + row * p_.lse_row] = -INFINITY_F;
                if (p_.lse_low) p_.lse_low[h * p_.lse_head + row * p_.lse_row] = 0.0f;
            }
        }
    }

    size_t scratch_bytes() const {
        Carver carver(nullptr);
        Buffers buffers;
        Tile<Operand> tiles[MAX_TILES];
        carve(carver, buffers, tiles);
        return carver.used();
    }

    struct Buffers {
        Operand *keys, *values;
        float *scores, *peak, *rescale, *bias, *allowed;
        float* rows;       // blocks only: output turned to rows
        float* channels;   // parts only: queries before they are split
        Operand* weights;  // parts only; others take the place of scores
        int32_t* bits;
    };

    void carve(Carver& carver, Buffers& b, Tile<Operand>* tiles) const {
        const int64_t block = p_.block_kv + MOST_ROWS;
        b.keys = carver.take<Operand>(block * PADDED_K * PARTS);
        b.values = carver.take<Operand>(BLOCKS ? PADDED_V * column_stride<Operand>(p_) * PARTS : block * PANELS * PANEL);
        b.scores = carver.take<float>(block * FULL);
        b.peak = carver.take<float>(FULL);
        b.rescale = carver.take<float>(FULL);
        b.rows = carver.take<float>(BLOCKS ? LANES * PADDED_V : 0);
        b.channels = carver.take<float>(PARTS > 1 ? 2 * OPERANDS_K * FULL : 0);
        b.weights = carver.take<Operand>(PARTS > 1 ? PARTS * (block + 2 * Operand::BLOCK) / 2 * FULL : 0);
        b.bias = p_.bias ? carver.take<float>(block * FULL) : nullptr;
        b.allowed = p_.mask ? carver.take<float>(block * FULL) : nullptr;
        b.bits = p_.layout_row_ptr ? carver.take<int32_t>((p_.layout_block_kv + 31) / 32 * FULL) : nullptr;
        for (int64_t t = 0; t < (rows_per_item_ + FULL - 1) / FULL; ++t) {
            place_tile<VECTORS, OPERANDS_K * PARTS, HEAD_V>(carver, tiles[t], ADDITIVE);
        }
    }

    // A run of keys ready for the products.
    struct Run {
        int64_t first, count;
        const Operand* keys;
        int64_t key_stride;  // in operands
        Panels<Operand> values;
        int64_t bits;  // block layout: number of its bit tile; -1 is none
    };

    class Worker {
      public:
        Worker(const Forward& shared, char* scratch) : f_(shared), p_(shared.p_) {
            Carver carver(scratch);
            f_.carve(carver, b_, tiles_);
        }

        void attend(int64_t item) {
            locate(item);
            begin();
            if (!finite_) return;
            if (p_.layout_row_ptr) {
                layout_runs(p_, s_, rows_, [&](int64_t first, int64_t count, int64_t bits) { attend_run(first, count, bits); });
            } else {
                attend_interval();
            }
            finish();
        }

        // Can what was read be split into parts? The output is not written if not.
        bool finite() const { return finite_; }

      private:
        void attend_interval() {
            Interval keys{INT32_MAX, -1};
            for (int64_t t = 0; t < tile_count_; ++t) {
                keys.first = std::min(keys.first, tiles_[t].keys.any.first);
                keys.last = std::max(keys.last, tiles_[t].keys.any.last);
            }
            for (int64_t j = keys.first / 2 * 2; j <= keys.last; j += p_.block_kv) {
                attend_run(j, std::min(p_.block_kv, keys.last + 1 - j), -1);
            }
        }

        void locate(int64_t item) {
            const auto& starts = f_.first_item_;
            const int64_t b = std::upper_bound(starts.begin(), starts.end(), item) - starts.begin() - 1;
            s_ = sequence_at(p_, b);
            const int64_t blocks = (starts[b + 1] - starts[b]) / f_.head_groups(), local = item - starts[b];
            rows_.group = f_.group_;
            rows_.head = local / blocks * f_.group_;
            // Last rows first: under a causal mask they take longest, and the short ones even out the end.
            rows_.first = (blocks - 1 - local % blocks) * f_.rows_per_item_;
            rows_.count = std::min(f_.rows_per_item_, s_.q_len * f_.group_ - rows_.first);
            const int64_t kv_head = rows_.head / (p_.q_heads / p_.kv_heads);
            keys_ = key_source<T>(p_, s_, kv_head);
            values_ = value_source<T>(p_, s_, kv_head);
        }

        void begin() {
            tile_count_ = cut_tiles<VECTORS>(rows_, tiles_);
            for (int64_t n = 0; n < tile_count_; ++n) {
                Tile<Operand>& t = tiles_[n];
                describe_tile(p_, s_, f_.documents_, rows_, t);
                const T* pointers[FULL];
                for (int64_t i = 0; i < t.count; ++i) {
                    pointers[i] = row_pointer(static_cast<const T*>(p_.q), p_.q_batch, p_.q_head, p_.q_row, s_, t, i, p_.cu_q != nullptr);
                }
                if constexpr (PARTS > 1) {
                    finite_ &= split_lanes<HEAD_K, OPERANDS_K>(pointers, t.count, t.lanes(), b_.channels, t.query);
                } else {
                    pack_operands<HEAD_K, OPERANDS_K>(pointers, t.count, t.lanes(), t.query);
                }
                if constexpr (ADDITIVE) load_weights<HEAD_K>(p_, t);
                t.summed = false;
                for (int64_t i = 0; i < t.lanes(); ++i) {
                    const float sink = p_.sinks ? p_.sinks[t.head_of[i]] : -INFINITY_F;
                    t.top[i] = sink;
                    t.sum[i] = sink == -INFINITY_F ? 0.0f : weight_of_top(sink);
                }
            }
        }

        // Keys first .. first + count - 1, `first` even (pairs of keys start there).
        void attend_run(int64_t first, int64_t count, int64_t bits) {
            if (!finite_) return;
            Run run{first, count, nullptr, 0, {}, bits};
            if constexpr (PARTS > 1) {
                if (!(finite_ = split_run(run))) return;
            } else {
                pack_run(run);
            }
            for (int64_t n = 0; n < tile_count_; ++n) attend_tile(run, tiles_[n]);
        }

        bool split_run(Run& run) {
            const int64_t stride = column_stride<Operand>(p_), first = run.first;
            run.keys = b_.keys;
            run.key_stride = PARTS * PADDED_K;
            run.values = {b_.values, 1, PARTS * stride};
            return split_keys<HEAD_K, OPERANDS_K>([&](int64_t j) { return keys_.at(first + j); }, run.count,
                                                  std::max(run.count, MOST_ROWS), b_.keys) &
                   split_columns<HEAD_V>([&](int64_t j) { return values_.at(first + j); }, run.count, stride, b_.values);
        }

        void pack_run(Run& run) {
            const int64_t first = run.first, count = run.count;
            const bool paged = keys_.page_size != 0;
            const bool aligned = Operand::WIDTH == 1 || (keys_.row % 2 == 0 && reinterpret_cast<uintptr_t>(keys_.base) % 4 == 0);
            if (!KEYS_IN_PLACE || p_.pack > 1 || paged || !aligned || count < MOST_ROWS) {
                pack_keys<HEAD_K, Operand, T>([&](int64_t j) { return keys_.at(first + j); }, count,
                                              std::max(count, MOST_ROWS), b_.keys);
                run.keys = b_.keys;
                run.key_stride = PADDED_K;
            } else {
                run.keys = reinterpret_cast<const Operand*>(keys_.at(first));
                run.key_stride = keys_.row / Operand::WIDTH;
            }
            if constexpr (BLOCKS) {
                const int64_t stride = column_stride<Operand>(p_);
                pack_columns<HEAD_V, T>([&](int64_t j) { return values_.at(first + j); }, count, stride, b_.values);
                run.values = {b_.values, 1, stride};
            } else if (!VALUES_IN_PLACE || p_.pack > 0 || paged) {
                const int64_t panel = panel_length(p_);
                pack_values<HEAD_V, T>([&](int64_t j) { return values_.at(first + j); }, count, panel, b_.values);
                run.values = {b_.values, PANEL, panel};
            } else {
                run.values = {reinterpret_cast<const Operand*>(values_.at(first)), values_.row, PANEL};
            }
        }

        void attend_tile(const Run& whole, Tile<Operand>& t) {
            // Only the keys that this tile can see; the cut stays on a pair of keys, and leaves enough rows for the micro-kernel.
            Run run = whole;
            const int64_t begin = std::max(whole.first, t.keys.any.first) / 2 * 2;
            const int64_t end = std::min(whole.first + whole.count, t.keys.any.last + 1);
            if (begin >= end || (run.bits >= 0 && !lane_bits(p_, t, run.bits, b_.bits))) return;
            if (run.bits >= 0) return attend_vectors(run, t);
            run.first = std::max(whole.first, std::min(begin, whole.first + whole.count - MOST_ROWS) / 2 * 2);
            run.count = end - run.first;
            run.keys += (run.first - whole.first) * run.key_stride;
            run.values.first += (run.first - whole.first) / Operand::WIDTH * run.values.row;
            attend_vectors(run, t);
        }

        void attend_vectors(const Run& run, Tile<Operand>& t) {
            switch (t.vectors) {
                case 1: return attend_vectors<1>(run, t);
                case 2:
                    if constexpr (VECTORS >= 2) return attend_vectors<2>(run, t);
                    break;
                case 3:
                    if constexpr (VECTORS >= 3) return attend_vectors<3>(run, t);
                    break;
                case 4:
                    if constexpr (VECTORS >= 4) return attend_vectors<4>(run, t);
                    break;
            }
        }

        template <int NV>
        void attend_vectors(const Run& run, Tile<Operand>& t) {
            Modifiers modifiers = modifiers_of(p_, s_, f_.documents_, t, run.first, run.count, b_.bias, b_.allowed);
            if (run.bits >= 0) modifiers.bits = b_.bits;
            for (int v = 0; v < NV; ++v) store(b_.peak + v * LANES, splat(-INFINITY_F));
            float scale = float(p_.scale);
            if (modifiers.plain_but_bounds()) {
                score_within<NV>(run, t, modifiers.first != nullptr);
            } else {
                score<NV>(run, t, 0, run.count, b_.peak);
                modify_scores<NV>(modifiers, run.first, run.count, b_.scores, b_.peak);
                scale = 1.0f;
            }
            Operand* weights = PARTS > 1 ? b_.weights : reinterpret_cast<Operand*>(b_.scores);
            online_softmax<NV>(weights, b_.scores, run.count, scale, b_.peak, t.top, t.sum, b_.rescale);
            sum_values<NV, HEAD_V>(t, run.first, run.count, run.values, weights, b_.rescale);
        }

        // Scores of vectors V and up with keys first .. first + count - 1 of the run, and their maximum. The micro-kernel takes some keys
        // at least; those past the run exist (the keys go on, or were padded) and are not used.
        template <int NV, int V = 0>
        void score(const Run& run, const Tile<Operand>& t, int64_t first, int64_t count, float* peak) {
            const Operand *keys = run.keys + first * run.key_stride, *query = t.query + V * LANES;
            float* scores = b_.scores + (first * NV + V) * LANES;
            if constexpr (ADDITIVE) {
                add_scores<NV - V, NV, HEAD_K>(count, keys, run.key_stride, query, t.weight + V * LANES, scores, peak + V * LANES);
            } else {
                const int64_t enough = std::max<int64_t>(count, fewest_keys<Operand>(NV - V));
                multiply_scores<NV - V, NV, OPERANDS_K>(enough, keys, run.key_stride, query, scores, peak + V * LANES);
            }
        }

        // The same from `first` to the end of the run, where vectors whose rows attend no later key drop out.
        template <int NV, int V = 0>
        void score_rest(const Run& run, const Tile<Operand>& t, int64_t first, float* peak) {
            int64_t end = run.count;
            if constexpr (V + 1 < NV) {
                const int32_t* last = t.last + V * LANES;
                end = std::min<int64_t>(end, *std::max_element(last, last + LANES) + 1 - run.first);
            }
            if (first < end) {
                const int64_t begin = std::max<int64_t>(std::min<int64_t>(first, end - fewest_keys<Operand>(NV - V)), 0);
                score<NV, V>(run, t, begin, end - begin, peak);
            }
            if constexpr (V + 1 < NV) {
                if (end < run.count) score_rest<NV, V + 1>(run, t, std::max(first, end), peak);
            }
        }

        // The same for the whole run where nothing but bounds masks: keys that every row may attend are left as they are.
        template <int NV>
        void score_within(const Run& run, const Tile<Operand>& t, bool bounded) {
            constexpr int64_t MR = keys_at_once(NV);
            float* unused = b_.rescale;  // the maximum of keys of which some are masked
            int64_t begin = 0, end = run.count;
            if (bounded) {
                begin = std::clamp<int64_t>(t.keys.all.first - run.first, 0, end);
                end = std::clamp<int64_t>(t.keys.all.last + 1 - run.first, 0, end);
                // Each part has rows enough for the micro-kernel.
                if (begin > 0) begin = std::max(begin, MR);
                if (end < run.count) end = begin + std::max<int64_t>(std::min(end, run.count - MR) - begin, 0) / MR * MR;
            }
            if (end - begin < MR) begin = end = 0;
            if (begin < end) score<NV>(run, t, begin, end - begin, b_.peak);
            const auto bound = [&](int64_t first, int64_t count) {
                bound_scores<NV>(t.first, t.last, run.first + first, count, b_.scores + first * NV * LANES, b_.peak);
            };
            // The rest may begin before `end`, to have keys enough, and write scores of the first part anew: so both are bounded after.
            if (begin > 0) score<NV>(run, t, 0, begin, unused);
            if (end < run.count) score_rest<NV>(run, t, end, unused);
            if (begin > 0) bound(0, begin);
            if (end < run.count) bound(end, run.count - end);
        }

        void finish() {
            for (int64_t n = 0; n < tile_count_; ++n) {
                Tile<Operand>& t = tiles_[n];
                t.settle(PADDED_V);
                for (int64_t i = 0; i < t.count; ++i) {
                    const float factor = t.sum[i] > 0.0f || t.sum[i] != t.sum[i] ? 1.0f / t.sum[i] : 0.0f;
                    T* out = row_pointer(static_cast<T*>(p_.out), p_.out_batch, p_.out_head, p_.out_row, s_, t, i, p_.cu_q != nullptr);
                    narrow_row<HEAD_V>(output_row<HEAD_V>(t, i, b_.rows), factor, out);
                    if (p_.lse) write_lse(t, i);
                }
            }
        }

        void write_lse(const Tile<Operand>& t, int64_t i) {
            const float lse = t.sum[i] == 0.0f ? -INFINITY_F : t.top[i] + std::log(t.sum[i]);
            const auto put = [&](float* base, float value) {
                *row_pointer(base, p_.lse_batch, p_.lse_head, p_.lse_row, s_, t, i, p_.cu_q != nullptr) = value;
            };
            put(p_.lse, lse);
            if (p_.lse_low) put(p_.lse_low, lse_left(t.top[i], t.sum[i], lse));
        }

        const Forward& f_;
        const Params& p_;
        Buffers b_;
        Tile<Operand> tiles_[MAX_TILES];
        int64_t tile_count_ = 0;
        bool finite_ = true;
        Sequence s_{};
        ItemRows rows_{};
        RowSource<T> keys_{}, values_{};
    };

    const Params& p_;
    Documents documents_;
    int64_t group_, rows_per_item_;
    std::vector<int64_t> first_item_;
};

}  // namespace attnreg
