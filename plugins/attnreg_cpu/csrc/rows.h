// Which keys each query row may attend, as intervals: causal, window, prefix, chunk, padding and documents.
#pragma once
#include <algorithm>
#include <cstdlib>
#include <vector>

#include "params.h"
#include "vec.h"

namespace attnreg {

// One sequence of the batch: where its rows lie and how positions are counted.
struct Sequence {
    int64_t batch;           // index into per-batch tensors
    int64_t q_first, q_len;  // first row in q (0 unless packed) and number of rows
    int64_t k_first, k_len;  // the same of k; k_len is what may be read
    int64_t offset;          // position of row 0
    int64_t prefix;          // keys below it are seen by all
};

inline Sequence sequence_at(const Params& p, int64_t b) {
    Sequence s{b, 0, p.q_rows, 0, p.kv_rows, 0, p.prefix};
    if (p.cu_q) {
        s.q_first = read_integer(p.cu_q, b, p.wide_cu_q);
        s.q_len = read_integer(p.cu_q, b + 1, p.wide_cu_q) - s.q_first;
    }
    if (p.cu_k) {
        s.k_first = read_integer(p.cu_k, b, p.wide_cu_k);
        s.k_len = read_integer(p.cu_k, b + 1, p.wide_cu_k) - s.k_first;
    }
    if (p.seqused) s.k_len = std::min(s.k_len, read_integer(p.seqused, b, p.wide_seqused));
    s.k_len = std::max<int64_t>(s.k_len, 0);
    s.q_len = std::max<int64_t>(s.q_len, 0);
    int64_t length = s.k_len;
    if (p.kv_lengths) length = std::min(length, std::max<int64_t>(read_integer(p.kv_lengths, b, p.wide_kv_lengths), 0));
    if (p.padding) s.k_len = length;
    if (p.align == 0) s.offset = length - s.q_len;
    if (p.align == 2) s.offset = read_integer(p.query_offset, b, p.wide_query_offset);
    if (p.prefix_lengths) s.prefix = read_integer(p.prefix_lengths, b, p.wide_prefix);
    return s;
}

// Keys first..last, both included; empty where first > last.
struct Interval {
    int64_t first, last;
};

inline int64_t floor_divide(int64_t x, int64_t by) { return x >= 0 ? x / by : -((-x + by - 1) / by); }

// A position as distances to keys are counted from it, in 32 bits, and how far beyond it lies on the same side of every key.
struct Place {
    int32_t near;
    float excess;
    explicit Place(int64_t position)
        : near(int32_t(std::clamp<int64_t>(position, -(int64_t(1) << 30), INT32_MAX))), excess(float(std::llabs(position - near))) {}
};

// First and last key of each position's document, and whether some document lies in several pieces, so that the interval is not
// enough and ids must be compared as well.
class Documents {
  public:
    explicit Documents(const Params& p) : rows_(p.kv_rows) {
        if (!p.documents) return;
        ids_.resize(p.batch * rows_);
        first_.resize(p.batch * rows_);
        last_.resize(p.batch * rows_);
        for (int64_t b = 0; b < p.batch; ++b) scan(p, b);
    }
    bool given() const { return !ids_.empty(); }
    bool scattered() const { return scattered_; }
    const int32_t* ids(int64_t batch) const { return ids_.data() + batch * rows_; }
    int32_t id(int64_t batch, int64_t position) const {
        return position < 0 || position >= rows_ ? -1 : ids_[batch * rows_ + position];
    }
    Interval at(int64_t batch, int64_t position) const {
        if (position < 0 || position >= rows_) return {1, 0};
        return {first_[batch * rows_ + position], last_[batch * rows_ + position]};
    }

  private:
    struct Run {
        int64_t id, first, last;
    };

    // Ids are renumbered in order of value, which makes any integer width an int32.
    void scan(const Params& p, int64_t b) {
        std::vector<Run> runs;
        for (int64_t j = 0; j < rows_; ++j) {
            const int64_t id = read_id(p, b * p.document_batch + j * p.document_row);
            if (runs.empty() || runs.back().id != id) {
                runs.push_back({id, j, j});
            } else {
                runs.back().last = j;
            }
        }
        std::stable_sort(runs.begin(), runs.end(), [](const Run& a, const Run& c) { return a.id < c.id; });
        int32_t number = 0;
        for (size_t begin = 0, end; begin < runs.size(); begin = end, ++number) {
            for (end = begin + 1; end < runs.size() && runs[end].id == runs[begin].id;) ++end;
            if (end - begin > 1) scattered_ = true;
            for (size_t r = begin; r < end; ++r) {
                for (int64_t j = b * rows_ + runs[r].first; j <= b * rows_ + runs[r].last; ++j) {
                    ids_[j] = number;
                    first_[j] = int32_t(runs[begin].first);
                    last_[j] = int32_t(runs[end - 1].last);
                }
            }
        }
    }
    static int64_t read_id(const Params& p, int64_t index) {
        switch (p.document_width) {
            case 8: return static_cast<const int64_t*>(p.documents)[index];
            case 4: return static_cast<const int32_t*>(p.documents)[index];
            case 2: return static_cast<const int16_t*>(p.documents)[index];
            default: return static_cast<const int8_t*>(p.documents)[index];
        }
    }

    int64_t rows_;
    bool scattered_ = false;
    std::vector<int32_t> ids_, first_, last_;
};

inline Interval allowed_keys(const Params& p, const Sequence& s, const Documents& documents, int64_t position) {
    Interval keys{0, s.k_len - 1};
    if (p.window_left >= 0) keys.first = std::max(keys.first, position - p.window_left);
    if (p.window_right >= 0) keys.last = std::min(keys.last, position + p.window_right);
    if (p.causal) keys.last = std::min(keys.last, std::max(position, s.prefix - 1));
    if (p.chunk > 0) {
        const int64_t start = floor_divide(position, p.chunk) * p.chunk;
        keys.first = std::max(keys.first, start);
        keys.last = std::min(keys.last, start + p.chunk - 1);
    }
    if (documents.given()) {
        const Interval own = documents.at(s.batch, position);
        keys.first = std::max(keys.first, own.first);
        keys.last = std::min(keys.last, own.last);
    }
    return keys;
}

// The keys of a whole tile of rows.
struct TileKeys {
    Interval any;   // outside it no row attends
    Interval all;   // inside it every row attends (by intervals alone)
};

// Fills the per-lane bounds of `count` rows of the sequence and returns the tile's. Lanes past `count` get an empty interval.
inline TileKeys fill_intervals(const Params& p, const Sequence& s, const Documents& documents, const int32_t* rows, int64_t count,
                               int64_t lanes, int32_t* first, int32_t* last) {
    TileKeys tile{{INT32_MAX, -1}, {0, INT32_MAX}};
    for (int64_t lane = 0; lane < lanes; ++lane) {
        if (lane >= count) {
            first[lane] = INT32_MAX;
            last[lane] = -1;
            continue;
        }
        const Interval keys = allowed_keys(p, s, documents, rows[lane] + s.offset);
        first[lane] = int32_t(std::min<int64_t>(keys.first, INT32_MAX));
        last[lane] = int32_t(std::max<int64_t>(keys.last, -1));
        if (keys.first <= keys.last) {
            tile.any.first = std::min(tile.any.first, keys.first);
            tile.any.last = std::max(tile.any.last, keys.last);
        }
        tile.all.first = std::max(tile.all.first, keys.first);
        tile.all.last = std::min(tile.all.last, keys.last);
    }
    return tile;
}

}  // namespace attnreg
