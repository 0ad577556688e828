// Key and value rows of one KV head, wherever they lie: in a strided tensor or in the pages of a cache.
#pragma once
#include "params.h"
#include "rows.h"

namespace attnreg {

template <class T>
struct RowSource {
    const T* base;      // row 0 of the sequence (paged: page 0 of this head)
    int64_t row;        // stride between rows
    int64_t page;       // stride between pages
    int64_t page_size;  // 0: not paged
    const void* table;  // this sequence's entries
    int64_t wide;

    const T* at(int64_t j) const {
        if (page_size == 0) return base + j * row;
        // An entry below 0 is an unused page: no key of it counts, but a run may begin in it.
        const int64_t entry = read_integer(table, j / page_size, wide);
        return base + (entry > 0 ? entry : 0) * page + j % page_size * row;
    }
};

template <class T>
RowSource<T> row_source(const Params& p, const Sequence& s, const void* tensor, int64_t batch_stride, int64_t head_stride,
                        int64_t row_stride, int64_t kv_head) {
    const T* base = static_cast<const T*>(tensor) + kv_head * head_stride;
    if (p.page_size == 0) {
        const int64_t start = p.cu_k ? s.k_first * row_stride : s.batch * batch_stride;
        return {base + start, row_stride, 0, 0, nullptr, 0};
    }
    const int64_t entry = s.batch * p.table_row * (p.wide_table ? 8 : 4);
    return {base, row_stride, batch_stride, p.page_size, static_cast<const char*>(p.block_table) + entry, p.wide_table};
}

template <class T>
RowSource<T> key_source(const Params& p, const Sequence& s, int64_t kv_head) {
    return row_source<T>(p, s, p.k, p.k_batch, p.k_head, p.k_row, kv_head);
}
template <class T>
RowSource<T> value_source(const Params& p, const Sequence& s, int64_t kv_head) {
    return row_source<T>(p, s, p.v, p.v_batch, p.v_head, p.v_row, kv_head);
}

}  // namespace attnreg
