// Bahdanau's additive score and its gradients, with query rows in lanes: sum over d of weight[d] * tanh(query[d] + key[d]).
#pragma once
#include "operand.h"
#include "vmath.h"

namespace attnreg {

// scores[j][lane] = sum_d weight[d][lane] * tanh(keys[j][d] + query[d][lane]) for `count` keys, and peak[lane] = max(peak[lane],
// scores[..][lane]), for NV of a tile's TILE vectors. keys: [j * stride + d]; query and weight: [d][TILE * LANES].
template <int NV, int TILE, int DEPTH>
ATTNREG_ALONE void add_scores(int64_t count, const Single* keys, int64_t stride, const Single* query, const float* weight, float* scores,
                              float* peak) {
    for (int64_t j = 0; j < count; ++j) {
        vfloat sum[NV] = {};
        for (int64_t d = 0; d < DEPTH; ++d) {
            const vfloat key = broadcast(keys[j * stride + d]);
#pragma GCC unroll 8
            for (int v = 0; v < NV; ++v) {
                const int64_t at = (d * TILE + v) * LANES;
                sum[v] = fma(load(weight + at), vtanh(load_as<vfloat>(query + at) + key), sum[v]);
            }
        }
#pragma GCC unroll 8
        for (int v = 0; v < NV; ++v) {
            store(scores + (j * TILE + v) * LANES, sum[v]);
            store(peak + v * LANES, vmax(load(peak + v * LANES), sum[v]));
        }
    }
}

// Gradients from d_scores[j][lane] of the same scores, added to what is there: d_query and d_weight [d][lane], and d_keys[j * d_stride + d]
// for channels up to a whole register.
template <int NV, int DEPTH>
ATTNREG_ALONE void differentiate_added(int64_t count, const Single* keys, int64_t stride, const Single* query, const float* weight,
                                       const float* d_scores, float* d_query, float* d_weight, float* d_keys, int64_t d_stride) {
    const auto channels = [&](int64_t first, auto kept) ATTNREG_LAMBDA {
        for (int64_t j = 0; j < count; ++j) {
            vfloat lanes[LANES] = {};
            repeat<decltype(kept)::value>([&](int i) ATTNREG_LAMBDA {
                const vfloat key = broadcast(keys[j * stride + first + i]);
#pragma GCC unroll 8
                for (int v = 0; v < NV; ++v) {
                    const int64_t at = ((first + i) * NV + v) * LANES;
                    const vfloat bent = vtanh(load_as<vfloat>(query + at) + key), upstream = load(d_scores + (j * NV + v) * LANES);
                    const vfloat change = upstream * load(weight + at) * fma(-bent, bent, splat(1.0f));
                    store(d_weight + at, fma(upstream, bent, load(d_weight + at)));
                    store(d_query + at, load(d_query + at) + change);
                    lanes[i] += change;
                }
            });
            transpose(lanes);
            vfloat sum = load(d_keys + j * d_stride + first);
            repeat<LANES>([&](int i) ATTNREG_LAMBDA { sum += lanes[i]; });
            store(d_keys + j * d_stride + first, sum);
        }
    };
    constexpr int REST = DEPTH % LANES;
    for (int64_t d = 0; d < DEPTH - REST; d += LANES) channels(d, std::integral_constant<int, LANES>());
    if constexpr (REST != 0) channels(DEPTH - REST, std::integral_constant<int, REST>());
}

}  // namespace attnreg
