// How a decoding call is cut into tasks: sequences, groups of KV heads, blocks of query rows and pieces of the keys.
#pragma once
#include <algorithm>
#include <vector>

#include "params.h"
#include "rows.h"

namespace attnreg {

// Params and what only decoding takes. Packed by decode.py in this order.
struct DecodeParams {
    Params call;
    const float *q_descale, *k_descale, *v_descale;  // null: 1
    int64_t q_scale_batch, q_scale_head, k_scale_batch, k_scale_head, k_scale_block, v_scale_batch, v_scale_head, v_scale_block;
    int64_t keys_a_scale;        // 0: one scale for all keys
    int64_t q_type, out_type;    // 0 float32, 1 float16, 2 bfloat16, 3 e4m3, 4 e5m2
    int64_t head_k, head_v;      // head dimensions
    int64_t head_block;          // KV heads that one task walks together
    int64_t stage;               // rows from which keys and values are widened once a tile
    int64_t ahead;               // bytes of keys or values that are asked for in advance; 0: none
    int64_t streams;             // above 1: a whole tile is asked for in advance, in so many places in turn
};

struct Task {
    Sequence sequence;
    int64_t head, heads;  // KV heads
    int64_t row, rows;    // query rows of each KV head; row r is query r / group of head r % group
    Interval keys;
    int64_t piece, pieces;
    int64_t first_task;  // the task of piece 0
    int64_t state;       // where its partial sums lie, in floats; -1: the task is alone
};

constexpr int64_t ROW_LIMIT = 64;     // rows of a KV head in a task
constexpr int64_t STATE_LIMIT = 256;  // rows of all its KV heads: their state stays in the second-level cache
constexpr int64_t TASKS_A_THREAD = 8;
constexpr int64_t WORK_A_THREAD = 1 << 16;  // bytes read, or arithmetic that takes as long: less is not worth waking a thread
constexpr int64_t LEAST_PIECE = 256;  // keys: shorter pieces cost more in merging than they balance

class Plan {
  public:
    std::vector<Task> tasks;
    int64_t state_floats = 0;  // of all tasks whose keys are cut
    int64_t most_rows = 1;     // of one KV head in a task
    int64_t threads = 1;       // as many as the work is worth
    int64_t head_block;

    // row_floats: what a row's state takes. value_bytes: what a stored value takes.
    Plan(const DecodeParams& d, int64_t row_floats, int64_t value_bytes) {
        const Params& p = d.call;
        const int64_t group = p.q_heads / p.kv_heads;
        head_block = std::clamp<int64_t>(d.head_block, 1, p.kv_heads);
        const int64_t row_limit = std::clamp<int64_t>(STATE_LIMIT / head_block, 1, ROW_LIMIT);
        const int64_t head_groups = (p.kv_heads + head_block - 1) / head_block;

        Params intervals = p;
        intervals.documents = nullptr;  // compared key by key: scanning all ids would cost more than decoding does
        const Documents none(intervals);
        std::vector<Task> blocks;
        int64_t total = 0, longest = 0;
        for (int64_t b = 0; b < p.batch; ++b) {
            const Sequence s = sequence_at(p, b);
            for (int64_t row = 0; row < s.q_len * group; row += row_limit) {
                const int64_t rows = std::min(row_limit, s.q_len * group - row);
                most_rows = std::max(most_rows, rows);
                const Interval keys = reach(p, s, none, row / group, (row + rows - 1) / group);
                blocks.push_back({s, 0, 0, row, rows, keys, 0, 1, 0, -1});
                total += length(keys) * head_groups;
                longest = std::max(longest, length(keys));
            }
        }

        const int64_t work = total * (d.head_k + d.head_v) * (value_bytes + most_rows / 4);
        threads = std::clamp<int64_t>(work / WORK_A_THREAD, 1, std::max<int64_t>(p.threads, 1));
        const int64_t piece = piece_length(p.splits, threads, total, longest);
        const int64_t state = head_block * ((most_rows + LANES - 1) / LANES * LANES) * row_floats;
        for (Task task : blocks) {
            const Interval all = task.keys;
            task.pieces = std::max<int64_t>((length(all) + piece - 1) / piece, 1);
            for (task.head = 0; task.head < p.kv_heads; task.head += head_block) {
                task.heads = std::min(head_block, p.kv_heads - task.head);
                task.first_task = int64_t(tasks.size());
                for (task.piece = 0; task.piece < task.pieces; ++task.piece) {
                    task.keys = {all.first + task.piece * piece, std::min(all.first + (task.piece + 1) * piece - 1, all.last)};
                    if (task.pieces > 1) {
                        task.state = state_floats;
                        state_floats += (state + 15) / 16 * 16;
                    }
                    tasks.push_back(task);
                }
            }
        }
    }

  private:
    static int64_t length(Interval keys) { return std::max<int64_t>(keys.last - keys.first + 1, 0); }

    // The keys that any of the queries first..last may attend.
    static Interval reach(const Params& p, const Sequence& s, const Documents& none, int64_t first, int64_t last) {
        Interval keys{INT64_MAX, -1};
        for (int64_t i = first; i <= last; ++i) {
            const Interval own = allowed_keys(p, s, none, i + s.offset);
            if (own.first > own.last) continue;
            keys.first = std::min(keys.first, own.first);
            keys.last = std::max(keys.last, own.last);
        }
        return keys.first > keys.last ? Interval{0, -1} : keys;
    }

    // As asked, or so that each thread has several tasks and none is short.
    static int64_t piece_length(int64_t splits, int64_t threads, int64_t total, int64_t longest) {
        int64_t piece = longest;
        if (splits > 0) {
            piece = (longest + splits - 1) / splits;
        } else if (threads > 1) {
            piece = std::max(total / (threads * TASKS_A_THREAD), LEAST_PIECE);
        }
        return std::max<int64_t>((piece + LANES - 1) / LANES * LANES, LANES);
    }
};

}  // namespace attnreg
