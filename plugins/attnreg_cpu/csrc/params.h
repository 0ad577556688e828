// The arguments of a call as plain 8-byte fields, filled by params.py in this order.
#pragma once
#include <cstdint>

namespace attnreg {

// Strides are in elements. A null pointer means: not given. Lengths and tables may be int32 or int64: wide_* is 1 for int64.
struct Params {
    const void *q, *k, *v;
    void* out;
    float* lse;
    int64_t q_batch, q_head, q_row;
    int64_t k_batch, k_head, k_row;  // paged: k_batch is the stride between pages
    int64_t v_batch, v_head, v_row;
    int64_t out_batch, out_head, out_row;
    int64_t lse_batch, lse_head, lse_row;

    int64_t batch, q_heads, kv_heads, q_rows, kv_rows;  // rows of the tensors; packed sequences have theirs in cu_*
    int64_t threads;
    // What stands above changes from call to call; below, a call without further tensors changes nothing.

    int64_t align;                                      // 0 bottom right, 1 top left, 2 offset
    int64_t causal, window_left, window_right, prefix;  // windows: -1 is no bound
    int64_t chunk;                                      // 0 is none
    int64_t padding;                                    // 1: keys stop at kv_lengths
    double scale, softcap;                              // softcap: 0 is off

    const void *cu_q, *cu_k, *kv_lengths, *seqused, *query_offset, *prefix_lengths, *block_table;
    int64_t wide_cu_q, wide_cu_k, wide_kv_lengths, wide_seqused, wide_query_offset, wide_prefix, wide_table;
    int64_t page_size, table_row;  // page_size 0: not paged

    const void* documents;  // [B, Skv] integers of document_width bytes
    int64_t document_batch, document_row, document_width;

    const void* bias;
    int64_t bias_batch, bias_head, bias_row, bias_key, bias_type;  // type: 0 float32, 1 float16, 2 bfloat16
    const uint8_t* mask;
    int64_t mask_batch, mask_head, mask_row, mask_key;
    const float *alibi, *sinks;  // [B or 1, Hq], [Hq]
    int64_t alibi_batch;
    const float* weight;  // [Hq or 1, D] of the additive score
    int64_t weight_head;

    // Block layout (null: none), as attnreg.blocks.BlockLayout describes it; the mask fields above are then off.
    const int32_t *layout_row_ptr, *layout_row_split, *layout_columns, *layout_tiles, *layout_bits;
    int64_t layout_batches, layout_heads, layout_lines, layout_block_q, layout_block_kv;  // lines: row blocks of one batch and head

    // Configuration.
    int64_t block_kv, tiles, pack, splits;  // pack: 0 nothing, 1 values, 2 keys too

    // Gradients; lse and out above are then inputs. d_k and d_v are float32 sums, one for each of `splits` shares of the rows, with rows
    // padded to whole vectors; d_bias is float32 [B, Hq, d_bias_rows, d_bias_keys], zero where nothing is written.
    const void* d_out;
    const float* d_lse;
    void *d_q, *d_k, *d_v;
    float* d_bias;
    float* d_weight;  // [share, B, Hq, d_weight_row], like d_k and d_v sums that begin at zero
    int64_t d_out_batch, d_out_head, d_out_row;
    int64_t d_lse_batch, d_lse_head, d_lse_row;
    int64_t d_q_batch, d_q_head, d_q_row;
    int64_t d_k_share, d_k_batch, d_k_head, d_k_row;
    int64_t d_v_share, d_v_batch, d_v_head, d_v_row;
    int64_t d_bias_rows, d_bias_keys;
    int64_t d_weight_row;
    // What the rounding of lse left, laid out like it: their sum says what weights were divided by. Written by a forward pass that
    // gradients follow, read by the backward one.
    float* lse_low;
};

inline int64_t read_integer(const void* base, int64_t index, int64_t wide) {
    return wide ? static_cast<const int64_t*>(base)[index] : static_cast<const int32_t*>(base)[index];
}

}  // namespace attnreg
