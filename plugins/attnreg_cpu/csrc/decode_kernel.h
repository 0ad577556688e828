// Attention of few query rows over a long cache: all rows of a KV head together, so that keys and values are read once.
#pragma once
#include "decode_worker.h"

namespace attnreg {

template <class T>
class Decode {
  public:
    explicit Decode(const DecodeParams& d)
        : d_(d), plan_(d, round_up(d.head_v, LANES) + 2, sizeof(T)), shape_(make_shape(d, plan_)),
          output_(d, d.head_v, Unit<T>::after), none_(without_documents(d.call)) {}

    // 0, or 1 where there was no memory for scratch.
    int64_t run() {
        output_.clear_rest();
        const int64_t tasks = int64_t(plan_.tasks.size());
        const int64_t workers = std::max<int64_t>(std::min(plan_.threads, tasks), 1);
        Carver measure(nullptr);
        (void)Worker<T>(d_, shape_, measure);
        const size_t worker_bytes = measure.used();
        Carver shared(nullptr);
        shared.take<float>(plan_.state_floats);
        shared.take<std::atomic<int32_t>>(tasks);
        char* scratch = Scratch::get(shared.used() + workers * worker_bytes);
        if (scratch == nullptr) return 1;
        Carver carver(scratch);
        float* states = carver.take<float>(plan_.state_floats);
        auto* finished = carver.take<std::atomic<int32_t>>(tasks);
        for (int64_t t = 0; t < tasks; ++t) new (finished + t) std::atomic<int32_t>(0);
        char* own = scratch + carver.used();
        parallel_for(tasks, workers, [&](int64_t t, int64_t index) {
            const KeepSubnormals keep;
            Carver carved(own + index * worker_bytes);
            Worker<T> worker(d_, shape_, carved);
            const Task& task = plan_.tasks[t];
            State state(task.pieces > 1 ? states + task.state : worker.own_state(), shape_);
            worker.sum(task, none_, state);
            if (task.pieces == 1) {
                write(task, state);
            } else if (finished[task.first_task].fetch_add(1, std::memory_order_acq_rel) + 1 == task.pieces) {
                // Whoever ends last merges; the order of merging is that of the keys, so results repeat bit for bit.
                merge(task, states);
            }
        });
        return 0;
    }

  private:
    static Shape make_shape(const DecodeParams& d, const Plan& plan) {
        const int64_t rows = round_up(plan.most_rows, LANES), tile = round_up(std::max<int64_t>(d.call.block_kv, 1), LANES);
        const int64_t ahead =
            d.streams > 1 ? tile : std::min<int64_t>((d.ahead + d.head_k * sizeof(T) - 1) / (d.head_k * sizeof(T)), tile);
        return {d.head_k, d.head_v, round_up(d.head_k, LANES), round_up(d.head_v, LANES), tile, rows, plan.head_block * rows,
                d.stage, ahead, d.streams};
    }
    static Documents without_documents(Params p) {
        p.documents = nullptr;
        return Documents(p);
    }

    void write(const Task& task, State state) const {
        for (int64_t h = 0; h < task.heads; ++h) {
            for (int64_t r = 0; r < task.rows; ++r) {
                const int64_t slot = h * shape_.rows + r;
                output_.write(task, task.head + h, r, state.sums + slot * shape_.stride_v, state.rows[slot]);
            }
        }
    }

    // Adds the later pieces into the first.
    void merge(const Task& task, float* states) const {
        State into(states + plan_.tasks[task.first_task].state, shape_);
        for (int64_t piece = 1; piece < task.pieces; ++piece) {
            State from(states + plan_.tasks[task.first_task + piece].state, shape_);
            for (int64_t h = 0; h < task.heads; ++h) {
                for (int64_t slot = h * shape_.rows; slot < h * shape_.rows + task.rows; ++slot) add(into, from, slot);
            }
        }
        write(task, into);
    }

    void add(State into, State from, int64_t slot) const {
        RowState &a = into.rows[slot], &b = from.rows[slot];
        const float top = std::max(a.top, b.top);
        if (top == -INFINITY_F) {
            a.sum += b.sum;  // 0, or NaN where a score was
            return;
        }
        const float keep = std::exp(a.top - top), take = std::exp(b.top - top);
        float *x = into.sums + slot * shape_.stride_v, *y = from.sums + slot * shape_.stride_v;
        for (int64_t c = 0; c < shape_.stride_v; c += LANES) {
            store(x + c, fma(load(x + c), splat(keep), load(y + c) * splat(take)));
        }
        a.sum = a.sum * keep + b.sum * take;
        a.top = top;
    }

    const DecodeParams& d_;
    const Plan plan_;
    const Shape shape_;
    const Output output_;
    const Documents none_;
};

}  // namespace attnreg
