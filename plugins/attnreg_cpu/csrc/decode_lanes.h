// Many query rows against one tile of float32 keys and values: rows lie in vector lanes, as in prefill (micro.h), so that neither the
// products nor the softmax cross them. Keys and values come as one pointer a row.
#pragma once
#include <algorithm>
#include <type_traits>

#include "decode_product.h"
#include "decode_scores.h"
#include "pack.h"
#include "softmax.h"

namespace attnreg {

constexpr int MOST_LANE_VECTORS = 3;  // registers of rows that go together

// Are rows better in lanes? One register of them needs as many loads as multiply-adds, and empty lanes are multiplied too (measured on a
// Zen 3: 16 rows of 16 lanes 1.1 times as fast as along the head dimension, 14 of 16 0.9 times, 8 of 8 0.8 times).
inline bool fill_lanes(int64_t rows) { return rows > LANES && 10 * rows >= 9 * ((rows + LANES - 1) / LANES * LANES); }
constexpr int64_t LINE_FLOATS = 64 / sizeof(float);

// Keys whose sums NV registers of rows keep at once; each takes a pointer as well.
constexpr int MOST_LANE_KEYS = 8;
template <int NV>
constexpr int LANE_KEYS = micro_rows(NV) < MOST_LANE_KEYS ? micro_rows(NV) : MOST_LANE_KEYS;

// scores[k][lane] = sum_d keys[k][d] * columns[d * stride + lane], and peak[lane] = the greatest of them. Scores are written up to the
// next multiple of LANE_KEYS. Asks for the rows `ahead`.
template <int NV>
ATTNREG_ALONE void score_lanes(const float* columns, int64_t stride, const float* const* keys, int64_t count, int64_t dim,
                               Ahead<float> ahead, float* scores, float* peak) {
    constexpr int KEYS = LANE_KEYS<NV>;
    vfloat top[NV];
    repeat<NV>([&](int v) ATTNREG_LAMBDA { top[v] = splat(-INFINITY_F); });
    for (int64_t next = 0; next < count; next += KEYS) {
        const float* key[KEYS];
        for (int i = 0; i < KEYS; ++i) key[i] = keys[std::min(next + i, count - 1)];
        vfloat sum[KEYS][NV] = {};
        const float* column = columns;
        for (int64_t line = 0; line < dim; line += LINE_FLOATS) {
            if (ahead) {
                for (int64_t k = next; k < std::min(next + KEYS, count); ++k) ahead.ask(k, line * int64_t(sizeof(float)), 64);
            }
            const int64_t end = std::min(line + LINE_FLOATS, dim);
            for (int64_t d = line; d < end; ++d, column += stride) {
                vfloat x[NV];
                repeat<NV>([&](int v) ATTNREG_LAMBDA { x[v] = in_register(load(column + v * LANES)); });
                repeat<KEYS>([&](int i) ATTNREG_LAMBDA {
                    const vfloat y = splat(key[i][d]);
                    repeat<NV>([&](int v) ATTNREG_LAMBDA { sum[i][v] = fma(x[v], y, sum[i][v]); });
                });
            }
        }
        repeat<KEYS * NV>([&](int i) ATTNREG_LAMBDA {
            top[i % NV] = vmax(top[i % NV], sum[i / NV][i % NV]);
            store(scores + (next * NV + i) * LANES, sum[i / NV][i % NV]);
        });
    }
    repeat<NV>([&](int v) ATTNREG_LAMBDA { store(peak + v * LANES, top[v]); });
}

// One register of rows' scores, turned to one row after the other and back: rows[lane * stride + k].
template <int NV>
void lanes_to_rows(const float* scores, int64_t count, float* rows, int64_t stride) {
    for (int64_t k = 0; k < count; k += LANES) {
        vfloat block[LANES];
        for (int i = 0; i < LANES; ++i) block[i] = load(scores + std::min(k + i, count - 1) * NV * LANES);
        transpose(block);
        for (int i = 0; i < LANES; ++i) store(rows + i * stride + k, block[i]);
    }
}
template <int NV>
void rows_to_lanes(const float* rows, int64_t stride, int64_t count, float* scores) {
    for (int64_t k = 0; k < count; k += LANES) {
        vfloat block[LANES];
        for (int i = 0; i < LANES; ++i) block[i] = load(rows + i * stride + k);
        transpose(block);
        for (int64_t i = 0; i < std::min<int64_t>(LANES, count - k); ++i) store(scores + (k + i) * NV * LANES, block[i]);
    }
}

// Scales the weights of each key.
template <int NV>
void scale_keys(float* weights, int64_t count, float unit, const float* scale) {
    for (int64_t k = 0; k < count; ++k) {
        const vfloat factor = splat(scale ? unit * scale[k] : unit);
        for (int v = 0; v < NV; ++v) {
            float* at = weights + (k * NV + v) * LANES;
            store(at, load(at) * factor);
        }
    }
}

template <int NV, int CHANNELS>
ATTNREG_INLINE void add_channels(const float* weights, const float* rescale, const float* const* values, int64_t count, int64_t channel,
                                 Ahead<float> ahead, float* out, int64_t stride) {
    vfloat sum[CHANNELS][NV] = {};
    // Each run over the channels asks for the lines that begin in it.
    const int64_t line = (channel + LINE_FLOATS - 1) / LINE_FLOATS * LINE_FLOATS;
    const bool asks = ahead && line < channel + CHANNELS;
    for (int64_t k = 0; k < count; ++k) {
        const float* value = values[k] + channel;
        if (asks) ahead.ask(k, line * int64_t(sizeof(float)), 64);
        vfloat weight[NV];
        repeat<NV>([&](int v) ATTNREG_LAMBDA { weight[v] = in_register(load(weights + (k * NV + v) * LANES)); });
        repeat<CHANNELS>([&](int c) ATTNREG_LAMBDA {
            const vfloat y = splat(value[c]);
            repeat<NV>([&](int v) ATTNREG_LAMBDA { sum[c][v] = fma(weight[v], y, sum[c][v]); });
        });
    }
    // As in micro.h: a tile's own sum joins at the end.
    repeat<CHANNELS * NV>([&](int i) ATTNREG_LAMBDA {
        float* to = out + (channel + i / NV) * stride + i % NV * LANES;
        store(to, fma(load(rescale + i % NV * LANES), load(to), sum[i / NV][i % NV]));
    });
}

// out[c * stride + lane] = rescale[lane] * out[c * stride + lane] + sum_k values[k][c] * weights[k][lane]. Asks for the rows `ahead`.
template <int NV>
ATTNREG_ALONE void add_lanes(const float* weights, const float* rescale, const float* const* values, int64_t count, int64_t dim,
                             Ahead<float> ahead, float* out, int64_t stride) {
    int64_t c = 0;
    const auto add = [&](auto channels) {
        constexpr int CHANNELS = decltype(channels)::value;
        for (; c + CHANNELS <= dim; c += CHANNELS) add_channels<NV, CHANNELS>(weights, rescale, values, count, c, ahead, out, stride);
    };
    add(std::integral_constant<int, micro_rows(NV)>());
    add(std::integral_constant<int, 4>());
    add(std::integral_constant<int, 1>());
}

}  // namespace attnreg
