// Gradients of tiled attention: dq, dk, dv, and on demand of the bias.
//
// Work item: a share of the query rows of one KV head's group. Weights are computed again from q, k and the two words of the saved lse;
// dq stays with its tile, dk and dv are summed in float32 memory of the share's own, so that results do not depend on which thread ran
// what.
#pragma once
#include <cmath>

#include "additive.h"
#include "layout.h"
#include "micro.h"
#include "source.h"

namespace attnreg {

template <class T, class Operand, int HEAD_K, int HEAD_V, int VECTORS, bool ADDITIVE>
class Backward {
  public:
    explicit Backward(const Params& p)
        : p_(p), documents_(p), group_(rows_group(p, FULL)), rows_per_item_(rows_per_item(p, FULL, group_)) {}

    // 0, or 1 where a thread could not get its scratch memory.
    int run() {
        std::atomic<int> failed{0};
        parallel_for(p_.batch * p_.kv_heads * p_.splits, p_.threads, [&](int64_t item, int64_t) {
            char* scratch = Scratch::get(scratch_bytes());
            if (scratch == nullptr) {
                failed = 1;
                return;
            }
            [[maybe_unused]] const Registers<Operand> registers;
            Worker(*this, scratch).differentiate(item);
        });
        return failed;
    }

  private:
    static constexpr int64_t FULL = int64_t(VECTORS) * LANES;
    static constexpr bool BLOCKS = Operand::BLOCK > 1;
    static constexpr int OPERANDS_K = operands_of<Operand>(HEAD_K), OPERANDS_V = operands_of<Operand>(HEAD_V);
    static constexpr int PADDED_K = whole_registers(HEAD_K), PADDED_V = whole_registers(HEAD_V);
    static constexpr int PANELS = (HEAD_K + PANEL - 1) / PANEL;
    static constexpr int KEY_STRIDE = whole_registers(OPERANDS_K), VALUE_STRIDE = whole_registers(OPERANDS_V);
    static constexpr bool PAIRED = Operand::WIDTH == 2;
    static constexpr int64_t ROUND = BLOCKS ? 2 * Operand::BLOCK : 8;  // keys of a tile's run are rounded up to it where the run goes on
    // Rows of a tile are whole blocks of pairs, as they are summed over.
    static_assert(!BLOCKS || VECTORS % 2 == 0, "pairs of registers");
    static constexpr int STEP = BLOCKS ? 2 : 1;

    struct GradientTile {
        Tile<Operand> tile;   // `output` holds dq
        Operand* d_out;       // [operands of a row][lanes]
        Operand *query_rows, *d_out_rows;  // [lane / WIDTH][PADDED]
        float *d_query, *d_weight;  // additive score: [channels][lanes]
        float *lse, *lse_rest, *delta;  // [lanes] log-sum-exp, near: in base 2; what its rounding left, in base 2; dout . out - dlse
        int32_t* far;                     // [lanes] all ones where the log-sum-exp is beyond FAR, else 0
        bool any_far;
    };
    struct Buffers {
        Operand *keys, *values;
        Operand* key_rows;  // pairs only: along the keys, for dq
        Operand *weight_rows, *d_rows, *d_keys;  // pairs only: weights and d_scores along lanes, d_scores along keys
        float *scores, *d_scores, *peak, *ones, *bias, *allowed, *softcap_slope;
        float* turned;  // blocks only: dq as rows
        int32_t* bits;
    };

    size_t scratch_bytes() const {
        Carver carver(nullptr);
        Buffers buffers;
        GradientTile tiles[MAX_TILES];
        carve(carver, buffers, tiles);
        return carver.used();
    }

    void carve(Carver& carver, Buffers& b, GradientTile* tiles) const {
        const int64_t block = p_.block_kv + MOST_ROWS;
        b.keys = carver.take<Operand>(block * KEY_STRIDE);
        b.values = carver.take<Operand>(block * VALUE_STRIDE);
        b.key_rows = carver.take<Operand>(BLOCKS ? PADDED_K * column_stride<Operand>(p_) : PAIRED ? block * PANELS * PANEL : 0);
        b.weight_rows = carver.take<Operand>(PAIRED ? block * FULL / 2 : 0);
        b.d_rows = carver.take<Operand>(PAIRED ? block * FULL / 2 : 0);
        b.d_keys = carver.take<Operand>(PAIRED ? ((block + 1) / 2 + Operand::BLOCK) * FULL : 0);
        b.turned = carver.take<float>(BLOCKS ? LANES * PADDED_K : 0);
        b.scores = carver.take<float>(block * FULL);
        b.d_scores = carver.take<float>(block * FULL);
        b.peak = carver.take<float>(FULL);
        b.ones = carver.take<float>(FULL);
        b.bias = p_.bias ? carver.take<float>(block * FULL) : nullptr;
        b.allowed = p_.mask ? carver.take<float>(block * FULL) : nullptr;
        b.bits = p_.layout_row_ptr ? carver.take<int32_t>((p_.layout_block_kv + 31) / 32 * FULL) : nullptr;
        b.softcap_slope = p_.softcap > 0 ? carver.take<float>(block * FULL) : nullptr;
        for (int64_t t = 0; t < (rows_per_item_ + FULL - 1) / FULL; ++t) {
            place_tile<VECTORS, OPERANDS_K, HEAD_K>(carver, tiles[t].tile, ADDITIVE);
            tiles[t].d_query = carver.take<float>(ADDITIVE ? HEAD_K * FULL : 0);
            tiles[t].d_weight = carver.take<float>(ADDITIVE ? HEAD_K * FULL : 0);
            tiles[t].d_out = carver.take<Operand>(OPERANDS_V * FULL);
            tiles[t].query_rows = carver.take<Operand>(ADDITIVE ? 0 : FULL * PADDED_K);
            tiles[t].d_out_rows = carver.take<Operand>(FULL * PADDED_V);
            tiles[t].lse = carver.take<float>(FULL);
            tiles[t].lse_rest = carver.take<float>(FULL);
            tiles[t].far = carver.take<int32_t>(FULL);
            tiles[t].delta = carver.take<float>(FULL);
        }
    }

    struct Run {
        int64_t first, count;
        const Operand *keys, *values;
        int64_t key_stride, value_stride;
        Panels<Operand> key_rows;
        int64_t bits;  // block layout: number of its bit tile; -1 is none
    };

    class Worker {
      public:
        Worker(const Backward& shared, char* scratch) : f_(shared), p_(shared.p_) {
            Carver carver(scratch);
            f_.carve(carver, b_, tiles_);
            std::fill(b_.ones, b_.ones + FULL, 1.0f);
        }

        void differentiate(int64_t item) {
            const int64_t share = item % p_.splits, kv_head = item / p_.splits % p_.kv_heads;
            s_ = sequence_at(p_, item / p_.splits / p_.kv_heads);
            keys_ = key_source<T>(p_, s_, kv_head);
            values_ = value_source<T>(p_, s_, kv_head);
            // Shares have memory of their own, one after the other; each is laid out like k.
            d_keys_ = gradient_rows(p_.d_k, share, p_.d_k_share, p_.d_k_batch, p_.d_k_head, p_.d_k_row, kv_head);
            d_values_ = gradient_rows(p_.d_v, share, p_.d_v_share, p_.d_v_batch, p_.d_v_head, p_.d_v_row, kv_head);
            if (p_.d_weight) d_weight_ = p_.d_weight + (share * p_.batch + s_.batch) * p_.q_heads * p_.d_weight_row;
            const int64_t heads = p_.q_heads / p_.kv_heads;
            rows_.group = f_.group_;
            for (rows_.head = kv_head * heads; rows_.head < (kv_head + 1) * heads; rows_.head += f_.group_) {
                const int64_t step = f_.rows_per_item_, total = s_.q_len * f_.group_;
                // Blocks of rows are dealt out in turn, so that under a causal mask every share gets short and long ones.
                for (rows_.first = share * step; rows_.first < total; rows_.first += p_.splits * step) {
                    rows_.count = std::min(step, total - rows_.first);
                    differentiate_rows();
                }
            }
        }

      private:
        float* gradient_rows(void* base, int64_t share, int64_t share_stride, int64_t batch, int64_t head, int64_t row,
                             int64_t kv_head) const {
            const int64_t start = p_.cu_k ? s_.k_first * row : s_.batch * batch;
            return static_cast<float*>(base) + share * share_stride + start + kv_head * head;
        }

        void differentiate_rows() {
            begin();
            if (p_.layout_row_ptr) {
                layout_runs(p_, s_, rows_, [&](int64_t first, int64_t count, int64_t bits) { differentiate_run(first, count, bits); });
            } else {
                differentiate_interval();
            }
            for (int64_t n = 0; n < tile_count_; ++n) finish(tiles_[n]);
        }

        void differentiate_interval() {
            Interval keys{INT32_MAX, -1};
            for (int64_t n = 0; n < tile_count_; ++n) {
                keys.first = std::min(keys.first, tiles_[n].tile.keys.any.first);
                keys.last = std::max(keys.last, tiles_[n].tile.keys.any.last);
            }
            const int64_t end = std::min((keys.last + ROUND) / ROUND * ROUND, s_.k_len);
            for (int64_t j = keys.first / ROUND * ROUND; j < end && keys.first <= keys.last; j += p_.block_kv) {
                differentiate_run(j, std::min(p_.block_kv, end - j), -1);
            }
        }

        void begin() {
            Tile<Operand> cut[MAX_TILES];
            tile_count_ = cut_tiles<VECTORS, STEP>(rows_, cut);
            for (int64_t n = 0; n < tile_count_; ++n) {
                GradientTile& g = tiles_[n];
                g.tile.row = cut[n].row, g.tile.count = cut[n].count, g.tile.vectors = cut[n].vectors;
                describe_tile(p_, s_, f_.documents_, rows_, g.tile);
                load_tile(g);
            }
        }

        template <class U>
        U* row(U* base, int64_t batch, int64_t head, int64_t row_stride, const Tile<Operand>& t, int64_t lane) const {
            return row_pointer(base, batch, head, row_stride, s_, t, lane, p_.cu_q != nullptr);
        }

        void load_tile(GradientTile& g) {
            Tile<Operand>& t = g.tile;
            const T *queries[FULL], *d_outs[FULL];
            for (int64_t i = 0; i < t.count; ++i) {
                queries[i] = row(static_cast<const T*>(p_.q), p_.q_batch, p_.q_head, p_.q_row, t, i);
                d_outs[i] = row(static_cast<const T*>(p_.d_out), p_.d_out_batch, p_.d_out_head, p_.d_out_row, t, i);
            }
            pack_operands<HEAD_K, OPERANDS_K>(queries, t.count, t.lanes(), t.query);
            pack_operands<HEAD_V, OPERANDS_V>(d_outs, t.count, t.lanes(), g.d_out);
            if constexpr (ADDITIVE) {
                load_weights<HEAD_K>(p_, t);
                std::fill(g.d_query, g.d_query + HEAD_K * t.lanes(), 0.0f);
                std::fill(g.d_weight, g.d_weight + HEAD_K * t.lanes(), 0.0f);
            } else {
                pack_rows<HEAD_K>(queries, t.count, t.lanes(), g.query_rows);
            }
            pack_rows<HEAD_V>(d_outs, t.count, t.lanes(), g.d_out_rows);
            t.summed = false;
            g.any_far = false;
            for (int64_t i = 0; i < t.lanes(); ++i) {
                g.lse[i] = INFINITY_F;  // makes every weight 0
                g.lse_rest[i] = 0.0f;
                g.far[i] = 0;
                g.delta[i] = 0.0f;
                if (i >= t.count) continue;
                const T* out = row(static_cast<const T*>(p_.out), p_.out_batch, p_.out_head, p_.out_row, t, i);
                const float lse = *row(static_cast<const float*>(p_.lse), p_.lse_batch, p_.lse_head, p_.lse_row, t, i);
                if (lse == -INFINITY_F) continue;
                float delta = 0.0f;
                for (int64_t d = 0; d < HEAD_V; ++d) delta += widen(out[d]) * widen(d_outs[i][d]);
                if (p_.d_lse) delta -= *row(p_.d_lse, p_.d_lse_batch, p_.d_lse_head, p_.d_lse_row, t, i);
                const double low = p_.lse_low ? *row(p_.lse_low, p_.lse_batch, p_.lse_head, p_.lse_row, t, i) : 0.0f;
                g.delta[i] = delta;
                const bool far = std::fabs(lse) > FAR;
                g.far[i] = far ? -1 : 0;
                g.any_far |= far;
                g.lse[i] = far ? lse : lse * LOG2_E;
                g.lse_rest[i] = float(far ? low * LOG2_E_EXACT : (lse + low) * LOG2_E_EXACT - g.lse[i]);
            }
        }

        void differentiate_run(int64_t first, int64_t count, int64_t bits) {
            const int64_t padded = std::max(count, MOST_ROWS);
            const auto key_at = [&](int64_t j) { return keys_.at(first + j); };
            const auto value_at = [&](int64_t j) { return values_.at(first + j); };
            pack_keys<HEAD_K, Operand, T>(key_at, count, padded, b_.keys);
            pack_keys<HEAD_V, Operand, T>(value_at, count, padded, b_.values);
            Run run{first, count, b_.keys, b_.values, KEY_STRIDE, VALUE_STRIDE, {b_.keys, KEY_STRIDE, PANEL}, bits};
            if constexpr (BLOCKS) {
                const int64_t stride = column_stride<Operand>(p_);
                pack_columns<HEAD_K, T>(key_at, count, stride, b_.key_rows);
                run.key_rows = {b_.key_rows, 1, stride};
            } else if constexpr (PAIRED) {
                const int64_t panel = panel_length(p_);
                pack_values<HEAD_K, T>(key_at, count, panel, b_.key_rows);
                run.key_rows = {b_.key_rows, PANEL, panel};
            }
            for (int64_t n = 0; n < tile_count_; ++n) differentiate_tile(run, tiles_[n]);
        }

        void differentiate_tile(const Run& whole, GradientTile& g) {
            if (whole.bits >= 0) {
                if (lane_bits(p_, g.tile, whole.bits, b_.bits)) differentiate_vectors(whole, g);
                return;
            }
            Run run = whole;
            const int64_t end = whole.first + whole.count;
            run.first = std::max(whole.first, g.tile.keys.any.first / ROUND * ROUND);
            // Rounding up runs into keys that are masked for this tile; it spares the products an odd rest.
            run.count = std::min(end, (g.tile.keys.any.last + ROUND) / ROUND * ROUND) - run.first;
            if (run.count <= 0 || g.tile.keys.any.first >= end) return;
            const int64_t skip = run.first - whole.first;
            run.keys += skip * run.key_stride;
            run.values += skip * run.value_stride;
            run.key_rows.first += skip / Operand::WIDTH * run.key_rows.row;
            differentiate_vectors(run, g);
        }

        void differentiate_vectors(const Run& run, GradientTile& g) {
            switch (g.tile.vectors) {
                case 1:
                    if constexpr (!BLOCKS) return differentiate_vectors<1>(run, g);
                    break;
                case 2:
                    if constexpr (VECTORS >= 2) return differentiate_vectors<2>(run, g);
                    break;
                case 3:
                    if constexpr (VECTORS >= 3 && !BLOCKS) return differentiate_vectors<3>(run, g);
                    break;
                case 4:
                    if constexpr (VECTORS >= 4) return differentiate_vectors<4>(run, g);
                    break;
            }
        }

        template <int NV>
        void differentiate_vectors(const Run& run, GradientTile& g) {
            Tile<Operand>& t = g.tile;
            constexpr int64_t lanes = NV * LANES;
            Modifiers modifiers = modifiers_of(p_, s_, f_.documents_, t, run.first, run.count, b_.bias, b_.allowed);
            modifiers.softcap_slope = b_.softcap_slope;
            if (run.bits >= 0) modifiers.bits = b_.bits;
            // Buffers end MOST_ROWS past the longest run, so a short run's extra rows are stale but there.
            const int64_t computed = std::max<int64_t>(run.count, fewest_keys<Operand>(NV));
            float* peak = BLOCKS ? nullptr : b_.peak;  // nobody asks for it
            if constexpr (ADDITIVE) {
                add_scores<NV, NV, HEAD_K>(run.count, run.keys, run.key_stride, t.query, t.weight, b_.scores, b_.peak);
            } else {
                multiply_scores<NV, NV, OPERANDS_K>(computed, run.keys, run.key_stride, t.query, b_.scores, peak);
            }
            multiply_scores<NV, NV, OPERANDS_V>(computed, run.values, run.value_stride, g.d_out, b_.d_scores, peak);
            float scale = float(p_.scale);
            if (!modifiers.plain()) {
                modify_scores<NV>(modifiers, run.first, run.count, b_.scores, b_.peak);
                scale = 1.0f;
            }
            // The bias joins after scale and softcap, so its gradient is taken off before they are applied.
            const bool later = p_.d_bias || p_.softcap > 0;
            differentiate_softmax<NV>(run.count, scale, later ? 1.0f : float(p_.scale), g);
            if (p_.d_bias) scatter_bias(run, t);
            if (later) {
                for (int64_t i = 0; i < run.count * lanes; i += LANES) {
                    const vfloat slope = p_.softcap > 0 ? load(b_.softcap_slope + i) : splat(1.0f);
                    store(b_.d_scores + i, load(b_.d_scores + i) * slope * splat(float(p_.scale)));
                }
            }
            const Operands ready = operands<NV>(run.count);
            constexpr int depth = int(lanes) / Operand::WIDTH;
            accumulate_rows<PADDED_V, depth>(run.count, ready.weights, g.d_out_rows, d_values_ + run.first * p_.d_v_row, p_.d_v_row);
            float* d_keys = d_keys_ + run.first * p_.d_k_row;
            if constexpr (ADDITIVE) {
                differentiate_added<NV, HEAD_K>(run.count, run.keys, run.key_stride, t.query, t.weight, b_.d_scores, g.d_query,
                                                g.d_weight, d_keys, p_.d_k_row);
            } else {
                accumulate_rows<PADDED_K, depth>(run.count, ready.d_rows, g.query_rows, d_keys, p_.d_k_row);
                add_values<NV, HEAD_K>(t, run.first, run.count, run.key_rows, ready.d_keys, b_.ones);
            }
        }

        // Weights and d_scores as the three products take them.
        struct Operands {
            const Operand *weights, *d_rows, *d_keys;
        };
        template <int NV>
        Operands operands([[maybe_unused]] int64_t count) {
#if defined(ATTNREG_HAS_PAIRS)
            if constexpr (PAIRED) {
                to_pairs<NV>(count);
                if constexpr (BLOCKS) fill_block(b_.d_keys, count, NV * LANES);
                return {b_.weight_rows, b_.d_rows, b_.d_keys};
            }
#endif
            const Operand* d = reinterpret_cast<const Operand*>(b_.d_scores);
            return {reinterpret_cast<const Operand*>(b_.scores), d, d};
        }
#if defined(ATTNREG_HAS_PAIRS)
        template <int NV>
        void to_pairs(int64_t count) {
            constexpr int64_t lanes = NV * LANES;
            for (int64_t j = 0; j < count; j += 2) {
                for (int v = 0; v < NV; ++v) {
                    const int64_t at = j * lanes + v * LANES;
                    const bool both = j + 1 < count;
                    const vfloat d_first = load(b_.d_scores + at), d_second = both ? load(b_.d_scores + at + lanes) : zero();
                    store_pairs(b_.weight_rows + at / 2, load(b_.scores + at));
                    store_pairs(b_.d_rows + at / 2, d_first);
                    if (both) {
                        store_pairs(b_.weight_rows + (at + lanes) / 2, load(b_.scores + at + lanes));
                        store_pairs(b_.d_rows + (at + lanes) / 2, d_second);
                    }
                    const vint pair = make_pairs(d_first, d_second);
                    std::memcpy(b_.d_keys + j / 2 * lanes + v * LANES, &pair, sizeof(pair));
                }
            }
        }
#endif

        // scores become weights exp(score - lse); d_scores become weight * (d_weight - delta) * d_scale.
        template <int NV>
        ATTNREG_ALONE void differentiate_softmax(int64_t count, float scale, float d_scale, const GradientTile& g) {
            const vfloat d_factor = splat(d_scale);
            vfloat lse[NV], rest[NV], delta[NV];
            vint far[NV];
            for (int v = 0; v < NV; ++v) {
                far[v] = load(g.far + v * LANES);
                lse[v] = load(g.lse + v * LANES), rest[v] = load(g.lse_rest + v * LANES), delta[v] = load(g.delta + v * LANES);
            }
            const auto differentiate = [&](auto any) ATTNREG_LAMBDA {
                for (int64_t j = 0; j < count; ++j) {
                    for (int v = 0; v < NV; ++v) {
                        const int64_t at = (j * NV + v) * LANES;
                        const vfloat weight = vexp2(exponent_of(any, load(b_.scores + at), scale, lse[v], far[v]) - rest[v]);
                        const vfloat change = weight * (load(b_.d_scores + at) - delta[v]) * d_factor;
                        store(b_.scores + at, weight);
                        // A masked key's d_weight may have overflowed; its weight is 0 and so is its gradient.
                        store(b_.d_scores + at, select(weight == 0.0f, zero(), change));
                    }
                }
            };
            g.any_far ? differentiate(std::true_type()) : differentiate(std::false_type());
        }

        // Each pair of row and key is met once, by one thread.
        void scatter_bias(const Run& run, const Tile<Operand>& t) {
            float* rows[FULL];
            for (int64_t i = 0; i < t.count; ++i) {
                const int64_t row = (s_.batch * p_.q_heads + t.head_of[i]) * p_.d_bias_rows + t.row_of[i];
                rows[i] = p_.d_bias + row * p_.d_bias_keys;
            }
            for (int64_t j = 0; j < run.count; ++j) {
                for (int64_t i = 0; i < t.count; ++i) rows[i][run.first + j] = b_.d_scores[j * t.lanes() + i];
            }
        }

        void finish(GradientTile& g) {
            Tile<Operand>& t = g.tile;
            if constexpr (ADDITIVE) return finish_added(g);
            t.settle(PADDED_K);
            for (int64_t i = 0; i < t.count; ++i) {
                T* d_q = row(static_cast<T*>(p_.d_q), p_.d_q_batch, p_.d_q_head, p_.d_q_row, t, i);
                narrow_row<HEAD_K>(output_row<HEAD_K>(t, i, b_.turned), 1.0f, d_q);
            }
        }

        void finish_added(const GradientTile& g) {
            const Tile<Operand>& t = g.tile;
            for (int64_t i = 0; i < t.count; ++i) {
                T* d_q = row(static_cast<T*>(p_.d_q), p_.d_q_batch, p_.d_q_head, p_.d_q_row, t, i);
                for (int64_t d = 0; d < HEAD_K; ++d) narrow(d_q + d, g.d_query[d * t.lanes() + i]);
                if (!p_.d_weight) continue;
                float* d_weight = d_weight_ + t.head_of[i] * p_.d_weight_row;
                for (int64_t d = 0; d < HEAD_K; ++d) d_weight[d] += g.d_weight[d * t.lanes() + i];
            }
        }

        const Backward& f_;
        const Params& p_;
        Buffers b_;
        GradientTile tiles_[MAX_TILES];
        int64_t tile_count_ = 0;
        Sequence s_{};
        ItemRows rows_{};
        RowSource<T> keys_{}, values_{};
        float *d_keys_ = nullptr, *d_values_ = nullptr, *d_weight_ = nullptr;
    };

    const Params& p_;
    Documents documents_;
    int64_t group_, rows_per_item_;
};

}  // namespace attnreg
