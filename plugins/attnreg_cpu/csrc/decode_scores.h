// What happens to one row's scores between the two products, with keys in lanes: modifiers, masks, online softmax.
#pragma once
#include <cmath>
#include <type_traits>

#include "vmath.h"

namespace attnreg {

// Null pointers: not asked for. Arrays are readable and writable up to the next multiple of LANES.
struct RowModifiers {
    float scale, softcap;
    float weight_unit;         // of the weights that are stored, not of their sum
    const float* key_scale;    // [key]
    const float* value_scale;  // [key]
    const float* bias;         // [key]
    const int32_t* allowed;    // [key], all ones or 0
    bool alibi, bounded;
    float slope;
    int32_t position;     // of the query, less the tile's first key
    float excess;         // of the position (Place)
    int32_t first, last;  // keys of the tile that may be attended

    // Nothing but the scale, which then joins the exponential, and masks.
    bool plain() const { return scale > 0.0f && softcap == 0.0f && !key_scale; }
};

// The maximum, the sum of weights and the weighted values of one row so far.
struct RowState {
    float top = -INFINITY_F, sum = 0.0f;
};

// Applies scale, softcap, bias, ALiBi and mask, in this order; returns the greatest score.
inline float modify_row(const RowModifiers& m, float* scores, int64_t count) {
    const vfloat scale = splat(m.scale), masked = splat(-INFINITY_F), cap = splat(m.softcap);
    const vfloat inverse_cap = splat(m.softcap > 0.0f ? 1.0f / m.softcap : 0.0f);
    const vint first = splat(m.first), last = splat(m.last);
    vfloat top = masked;
    for (int64_t k = 0; k < count; k += LANES) {
        const vint key = lane_index() + int32_t(k);
        vfloat x = load(scores + k) * scale;
        if (m.key_scale) x *= load(m.key_scale + k);
        if (m.softcap > 0.0f) x = cap * vtanh(x * inverse_cap);
        if (m.bias) x += load(m.bias + k);
        if (m.alibi) {
            const vint distance = key - m.position;
            x -= splat(m.slope) * (__builtin_convertvector(distance < 0 ? -distance : distance, vfloat) + splat(m.excess));
        }
        if (m.bounded) x = select((key >= first) & (key <= last), x, masked);
        if (m.allowed) x = select(load(m.allowed + k) != 0, x, masked);
        if (k + LANES > count) x = select(key < int32_t(count), x, masked);
        store(scores + k, x);
        top = vmax(top, x);
    }
    return reduce_max(top);
}

inline float greatest(const float* scores, int64_t count) {
    vfloat top = load(scores);
    for (int64_t k = LANES; k < count; k += LANES) top = vmax(top, load(scores + k));
    return reduce_max(top);
}

// Turns scores, which `scale` multiplies, into weights and brings the state up to date; returns the factor for what was summed before.
// peak: the greatest of the scaled scores.
inline float online_softmax(const RowModifiers& m, RowState& state, float* scores, int64_t count, float scale, float peak) {
    // A NaN among the scores may be the peak or be passed over; either way its weight is NaN and with it the row's sum.
    const float top = state.top >= peak ? state.top : peak, base = top == -INFINITY_F ? 0.0f : top;
    const float rescale = top == state.top ? 1.0f : std::exp(state.top - base);
    const vfloat factor = splat(scale), shift = splat(base), log2_e = splat(LOG2_E), unit = splat(m.weight_unit);
    vfloat sum = zero();
    const auto weigh = [&](auto together, int64_t k) {
        constexpr int N = decltype(together)::value;
        vfloat weight[N];
#pragma GCC unroll 2
        for (int n = 0; n < N; ++n) weight[n] = (rounded(load(scores + k + n * LANES) * factor) - shift) * log2_e;
        vexp2(weight);
#pragma GCC unroll 2
        for (int n = 0; n < N; ++n) {
            sum += weight[n];
            weight[n] *= unit;
            if (m.value_scale) weight[n] *= load(m.value_scale + k + n * LANES);
            store(scores + k + n * LANES, weight[n]);
        }
    };
    int64_t k = 0;
    for (; k + LANES < count; k += 2 * LANES) weigh(std::integral_constant<int, 2>(), k);
    if (k < count) weigh(std::integral_constant<int, 1>(), k);
    state.sum = state.sum * rescale + reduce_add(sum);
    state.top = top;
    return rescale;
}

// A row's share of the whole: log of the sum of exponentials with the sink in it, and the factor that normalises its values.
struct RowEnd {
    float lse, factor;
};

inline RowEnd finish_row(RowState state, const float* sink) {
    float top = state.top, sum = state.sum;
    float factor = 1.0f;
    if (sink != nullptr && *sink != -INFINITY_F) {
        const float joint = *sink > top ? *sink : top;
        factor = top == joint ? 1.0f : std::exp(top - joint);
        sum = sum * factor + std::exp(*sink - joint);
        top = joint;
    }
    // An empty row summed nothing, so any finite factor leaves its output 0.
    if (sum == 0.0f) return {-INFINITY_F, 0.0f};
    return {top + std::log(sum), factor / sum};
}

}  // namespace attnreg
