// Register-blocked products on one tile of query rows, which lie across the vector lanes.
//
// A tile holds NV * LANES query rows. A row's score for one key and its maximum are lanes, so maxima, sums and masks need no reduction
// across lanes, and keys are read as broadcast scalars straight from their row-major memory. What is summed over keys or rows has its
// channels in the lanes, as memory has them. The products of attention and of its gradient then have the form
//
//     c[i][lane] (+)= sum_k A(i, k) * b[k][lane]
//
// with MR values of i and NV vectors of lanes held in registers.
#pragma once
#include <algorithm>
#include <type_traits>

#include "operand.h"

namespace attnreg {

// Rows of the left operand that fill the register file beside NV vectors of b and one broadcast.
constexpr int micro_rows(int vectors) {
    const int fit = (VECTOR_REGISTERS - 1 - vectors) / vectors;
    return fit >= 16 ? 16 : fit >= 12 && vectors == 1 ? 12 : fit >= 8 ? 8 : fit >= 6 ? 6 : fit >= 4 ? 4 : fit >= 2 ? 2 : 1;
}

// acc[i][v] += sum over k < depth of A(i, k) * b[k * b_stride + v * LANES ...];
// A(i, k) is a[i * stride + k] where K_CONTIGUOUS, else a[k * stride + i].
template <int MR, int NV, bool K_CONTIGUOUS, class Operand>
ATTNREG_INLINE void multiply(vfloat (&acc)[MR][NV], int64_t depth, const Operand* a, int64_t stride, const Operand* b,
                             int64_t b_stride) {
    for (int64_t k = 0; k < depth; ++k) {
        typename Operand::Vector column[NV];
#pragma GCC unroll 8
        for (int v = 0; v < NV; ++v) column[v] = in_register(load_as<typename Operand::Vector>(b + k * b_stride + v * LANES));
#pragma GCC unroll 16
        for (int i = 0; i < MR; ++i) {
            const typename Operand::Vector scalar = broadcast(K_CONTIGUOUS ? a[i * stride + k] : a[k * stride + i]);
#pragma GCC unroll 8
            for (int v = 0; v < NV; ++v) acc[i][v] = accumulate(scalar, column[v], acc[i][v]);
        }
    }
}

// Keys that the last step of the scores takes where fewer are left, and so the fewest that there may be.
constexpr int least_keys(int vectors) {
    const int most = micro_rows(vectors);
    return most == 6 || most == 12 ? most * 2 / 3 : most;
}

// Of any operand.
template <class Operand>
constexpr int fewest_keys(int vectors) {
    return Operand::BLOCK > 1 ? Operand::BLOCK : least_keys(vectors);
}

// scores[j][lane] = sum_d keys[j][d] * query[d][lane] for `count` keys, and peak[lane] = max(peak[lane], scores[..][lane]), for NV of a
// tile's TILE vectors. count >= least_keys(NV): the last group of keys overlaps the one before it instead of running past the end.
template <int NV, int TILE, int DEPTH, class Operand>
ATTNREG_ALONE void multiply_scores(int64_t count, const Operand* keys, int64_t stride, const Operand* query, float* scores, float* peak) {
    constexpr int MOST = micro_rows(NV), LEAST = least_keys(NV);
    const auto take = [&](auto rows, int64_t j) ATTNREG_LAMBDA {
        constexpr int MR = decltype(rows)::value;
        vfloat acc[MR][NV] = {};
        multiply<MR, NV, true>(acc, DEPTH, keys + j * stride, stride, query, TILE * LANES);
#pragma GCC unroll 8
        for (int v = 0; v < NV; ++v) {
            vfloat top = load(peak + v * LANES);
#pragma GCC unroll 16
            for (int i = 0; i < MR; ++i) {
                top = vmax(top, acc[i][v]);
                store(scores + ((j + i) * TILE + v) * LANES, acc[i][v]);
            }
            store(peak + v * LANES, top);
        }
    };
    int64_t j = 0;
    for (; j + MOST <= count; j += MOST) take(std::integral_constant<int, MOST>(), j);
    if (j > 0 && count - j > LEAST) return take(std::integral_constant<int, MOST>(), count - MOST);
    for (; j < count; j += LEAST) take(std::integral_constant<int, LEAST>(), std::min<int64_t>(j, count - LEAST));
}

// Of `left` rows of a tile those that are multiplied at once beside two registers of channels: enough to hide a multiply-add's latency.
constexpr int rows_at_once(int left) {
    constexpr int most = micro_rows(2);
    return left < most - 1 || left == most ? left : left < most + 4 ? left / 2 : most;
}

// Calls use(first row, number of rows), both constants, for each group of the tile's rows.
template <int ROWS, int FIRST = 0, class Use>
ATTNREG_INLINE void each_group(const Use& use) {
    if constexpr (FIRST < ROWS) {
        constexpr int AT_ONCE = rows_at_once(ROWS - FIRST);
        use(std::integral_constant<int, FIRST>(), std::integral_constant<int, AT_ONCE>());
        each_group<ROWS, FIRST + AT_ONCE>(use);
    }
}

// What of a run a group of rows attends, in operands along the keys: outside, every weight is 0.
struct Depths {
    int64_t begin, end;
};

// out[i][c] = rescale[i] * out[i][c] + sum over k < depth of weights[k][i] * values[k][c] for MR rows and NV registers of channels. What a
// run of keys adds is summed by itself and joins the output at the end: fewer roundings of a long sum (join_sums in softmax.h). Without
// `rescale` nothing was summed before, and the output is only written.
template <int MR, int NV, class Operand>
ATTNREG_ALONE void add_channels(int64_t depth, const Operand* weights, int64_t weight_stride, const Operand* values, int64_t value_stride,
                                float* out, int64_t out_stride, const float* rescale) {
    vfloat acc[MR][NV] = {};
    multiply<MR, NV, false>(acc, depth, weights, weight_stride, values, value_stride);
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 8
        for (int v = 0; v < NV; ++v) {
            float* to = out + i * out_stride + v * LANES;
            store(to, rescale ? fma(splat(rescale[i]), load(to), acc[i][v]) : acc[i][v]);
        }
    }
}

// Rows of values, cut into panels of PANEL channels each: rows that lie side by side in memory, or packed panel after panel.
constexpr int PANEL = 2 * LANES;
template <class Operand>
struct Panels {
    const Operand* first;
    int64_t row, panel;  // strides, in operands
};

// out[row][c] = rescale[row] * out[row][c] + sum_j weights[j][row] * values[j][c] for ROWS rows and CHANNELS values of c, a multiple of
// LANES. Channels lie across the vector lanes here, so that rows come out as memory wants them and each group of rows meets only keys of
// its own: depths[r] for the group that starts at row r.
template <int ROWS, int CHANNELS, class Operand>
void multiply_values(const Depths* depths, Panels<Operand> values, const Operand* weights, float* out, const float* rescale) {
    const auto add = [&](auto vectors, int64_t c) {
        constexpr int NV = decltype(vectors)::value;
        each_group<ROWS>([&](auto first, auto rows) ATTNREG_LAMBDA {
            constexpr int ROW = decltype(first)::value;
            const Depths d = depths[ROW];
            const Operand* panel = values.first + c / PANEL * values.panel + d.begin * values.row;
            add_channels<decltype(rows)::value, NV>(d.end - d.begin, weights + d.begin * ROWS + ROW, ROWS, panel, values.row,
                                                    out + ROW * CHANNELS + c, CHANNELS, rescale ? rescale + ROW : nullptr);
        });
    };
    int64_t c = 0;
    for (; c + PANEL <= CHANNELS; c += PANEL) add(std::integral_constant<int, 2>(), c);
    if constexpr (CHANNELS % PANEL != 0) add(std::integral_constant<int, 1>(), c);
}

// out[i][d] += sum over lanes of weights[i][lane] * rows[lane][d] for MR values of i and NV registers of d. The depth is short, so that it
// pays to know it, and to add to memory only at the end.
template <int MR, int NV, int DEPTH, int ROW_STRIDE, class Operand>
ATTNREG_ALONE void accumulate_rows_block(const Operand* weights, const Operand* rows, float* out, int64_t out_stride) {
    vfloat acc[MR][NV] = {};
    multiply<MR, NV, true>(acc, DEPTH, weights, DEPTH, rows, ROW_STRIDE);
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 8
        for (int v = 0; v < NV; ++v) {
            float* to = out + i * out_stride + v * LANES;
            store(to, load(to) + acc[i][v]);
        }
    }
}

// out[j][d] += sum_lane weights[j][lane] * rows[lane][d] for `count` values of j; CHANNELS is a multiple of LANES. DEPTH counts operands
// along the lanes, and is the stride of weights; out_stride is in floats.
template <int CHANNELS, int DEPTH, class Operand>
void accumulate_rows(int64_t count, const Operand* weights, const Operand* rows, float* out, int64_t out_stride) {
    constexpr int VECTORS = CHANNELS / LANES, NV = VECTORS >= 2 ? 2 : 1;
    int64_t j = 0;
    const auto step = [&](auto rows_at_once) {
        constexpr int MR = decltype(rows_at_once)::value;
        for (; j + MR <= count; j += MR) {
            int v = 0;
            for (; v + NV <= VECTORS; v += NV) {
                accumulate_rows_block<MR, NV, DEPTH, CHANNELS>(weights + j * DEPTH, rows + v * LANES, out + j * out_stride + v * LANES,
                                                               out_stride);
            }
            if constexpr (VECTORS % NV != 0) {
                accumulate_rows_block<MR, VECTORS % NV, DEPTH, CHANNELS>(weights + j * DEPTH, rows + v * LANES,
                                                                         out + j * out_stride + v * LANES, out_stride);
            }
        }
    };
    step(std::integral_constant<int, micro_rows(NV)>());
    if constexpr (micro_rows(NV) > 4) step(std::integral_constant<int, 4>());
    step(std::integral_constant<int, 1>());
}

}  // namespace attnreg
