// Register-blocked products on one tile of query rows, which lie across the vector lanes.
//
// A tile holds NV * LANES query rows. Everything that belongs to a row (its score for one key, its maximum, one channel of its output) is a
// lane, so maxima, sums and masks need no reduction across lanes, and keys and values are read as broadcast scalars straight from
// their row-major memory. The products of attention and of its gradient then have the form
//
//     c[i][lane] (+)= sum_k A(i, k) * b[k][lane]
//
// with MR values of i and NV vectors of lanes held in registers.
#pragma once
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

// scores[j][lane] = sum_d keys[j][d] * query[d][lane] for `count` keys, and peak[lane] = max(peak[lane], scores[..][lane]).
// count >= micro_rows(NV): the last group of rows overlaps the one before it instead of running past the end.
template <int NV, int DEPTH, class Operand>
ATTNREG_ALONE void multiply_scores(int64_t count, const Operand* keys, int64_t stride, const Operand* query, float* scores, float* peak) {
    constexpr int MR = micro_rows(NV);
    for (int64_t next = 0; next < count; next += MR) {
        const int64_t j = next + MR <= count ? next : count - MR;
        vfloat acc[MR][NV] = {};
        multiply<MR, NV, true>(acc, DEPTH, keys + j * stride, stride, query, NV * LANES);
#pragma GCC unroll 8
        for (int v = 0; v < NV; ++v) {
            vfloat top = load(peak + v * LANES);
#pragma GCC unroll 16
            for (int i = 0; i < MR; ++i) {
                top = vmax(top, acc[i][v]);
                store(scores + ((j + i) * NV + v) * LANES, acc[i][v]);
            }
            store(peak + v * LANES, top);
        }
    }
}

// What a run of keys adds is summed by itself and joins the output at the end: fewer roundings of a long sum (join_sums in softmax.h).
template <int MR, int NV, class Operand>
ATTNREG_INLINE void accumulate_channels(int64_t depth, const Operand* values, int64_t stride, const Operand* weights, float* output,
                                        const float* rescale) {
    vfloat acc[MR][NV] = {};
    multiply<MR, NV, false>(acc, depth, values, stride, weights, NV * LANES);
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) {
        const vfloat factor = load(rescale + v * LANES);
#pragma GCC unroll 16
        for (int i = 0; i < MR; ++i) {
            float* to = output + (i * NV + v) * LANES;
            store(to, fma(factor, load(to), acc[i][v]));
        }
    }
}

// output[d][lane] = rescale[lane] * output[d][lane] + sum_j values[j][d] * weights[j][lane] for CHANNELS values of d.
template <int NV, int CHANNELS, class Operand>
ATTNREG_ALONE void multiply_values(int64_t depth, const Operand* values, int64_t stride, const Operand* weights, float* output,
                     const float* rescale) {
    constexpr int MR = micro_rows(NV);
    constexpr int REST = CHANNELS % MR;
    for (int64_t d = 0; d + MR <= CHANNELS; d += MR) {
        accumulate_channels<MR, NV>(depth, values + d, stride, weights, output + d * NV * LANES, rescale);
    }
    if constexpr (REST != 0) {
        constexpr int64_t d = CHANNELS - REST;
        accumulate_channels<REST, NV>(depth, values + d, stride, weights, output + d * NV * LANES, rescale);
    }
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
