// Scores of one tile against one run of keys: modifiers, masks and the online softmax, all with query rows in lanes.
#pragma once
#include <cmath>
#include <type_traits>

#include "operand.h"
#include "vmath.h"

namespace attnreg {

// What happens to the scores of a tile between the two products. Null pointers: not asked for.
struct Modifiers {
    float scale = 1.0f;
    float softcap = 0.0f;
    const float* bias = nullptr;           // [key][lane]
    const float* slopes = nullptr;         // [lane]
    const int32_t* positions = nullptr;    // [lane]
    const float* excess = nullptr;         // [lane], of the positions
    const int32_t* first = nullptr;        // [lane]: keys first..last may be attended
    const int32_t* last = nullptr;         // [lane]
    const int32_t* documents = nullptr;    // [lane]
    const int32_t* key_documents = nullptr;  // [key], absolute
    const float* allowed = nullptr;        // [key][lane], 0 where masked
    const int32_t* bits = nullptr;         // [key / 32][lane]: bit key % 32 says that it may be attended
    float* softcap_slope = nullptr;        // [key][lane], written: derivative of the softcap

    bool plain() const { return plain_but_bounds() && !first; }
    // Nothing but the scale, which then joins the exponential, and bounds of rows.
    bool plain_but_bounds() const { return softcap == 0.0f && scale > 0.0f && !bias && !slopes && !documents && !allowed && !bits; }
};

ATTNREG_INLINE vint absolute(vint x) { return x < 0 ? -x : x; }

// Applies everything in order scale, softcap, bias, ALiBi, mask; leaves -inf where masked and the maximum of each lane in `peak`.
template <int NV>
void modify_scores(const Modifiers& m, int64_t first_key, int64_t count, float* scores, float* peak) {
    const vfloat scale = splat(m.scale), cap = splat(m.softcap), inverse_cap = splat(m.softcap > 0 ? 1.0f / m.softcap : 0.0f);
    const vfloat masked = splat(-INFINITY_F);
    for (int v = 0; v < NV; ++v) {
        vfloat top = masked;
        vint low{}, high{}, document{}, position{};
        vfloat slope{}, excess{};
        vuint words{};
        if (m.first) low = load(m.first + v * LANES), high = load(m.last + v * LANES);
        if (m.documents) document = load(m.documents + v * LANES);
        if (m.slopes) slope = load(m.slopes + v * LANES), position = load(m.positions + v * LANES), excess = load(m.excess + v * LANES);
        for (int64_t j = 0; j < count; ++j) {
            const int64_t at = (j * NV + v) * LANES;
            const int32_t key = int32_t(first_key + j);
            vfloat x = load(scores + at) * scale;
            if (m.softcap > 0) {
                const vfloat bent = vtanh(x * inverse_cap);
                x = cap * bent;
                if (m.softcap_slope) store(m.softcap_slope + at, splat(1.0f) - bent * bent);
            }
            if (m.bias) x += load(m.bias + at);
            if (m.slopes) x -= slope * (__builtin_convertvector(absolute(position - key), vfloat) + excess);
            if (m.first) x = select((low <= key) & (high >= key), x, masked);
            if (m.documents) x = select(document == m.key_documents[key], x, masked);
            if (m.allowed) x = select(load(m.allowed + at) != 0.0f, x, masked);
            if (m.bits) {
                if (j % 32 == 0) words = (vuint)load(m.bits + (j / 32 * NV + v) * LANES);
                x = select((vint)(words << (31 - uint32_t(j % 32))) < 0, x, masked);
            }
            store(scores + at, x);
            top = vmax(top, x);
        }
        store(peak + v * LANES, top);
    }
}

// Masks what is out of bounds and brings `peak` up to date; the scale is left to the softmax.
template <int NV>
void bound_scores(const int32_t* first, const int32_t* last, int64_t first_key, int64_t count, float* scores, float* peak) {
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) {
        const vint low = load(first + v * LANES), high = load(last + v * LANES);
        vfloat top = load(peak + v * LANES);
        for (int64_t j = 0; j < count; ++j) {
            const int32_t key = int32_t(first_key + j);
            float* at = scores + (j * NV + v) * LANES;
            const vfloat x = select((low <= key) & (high >= key), load(at), splat(-INFINITY_F));
            store(at, x);
            top = vmax(top, x);
        }
        store(peak + v * LANES, top);
    }
}

ATTNREG_INLINE void store_weights(Single* out, int64_t at, vfloat weight) { std::memcpy(out + at, &weight, sizeof(weight)); }

// Scores beyond it are counted from the maximum before they become powers of 2: what rounding takes from their product with log2(e) is
// then no longer small (at 1e9 it is 64, and the greatest weight 2^64 instead of 1).
constexpr float FAR = 4096.0f;

// Brings the maximum up to date before weights are taken: `base` is what their exponents are counted from (0 for a lane that has met
// nothing yet), and `rescale` the factor for what was summed before. In lanes that are `far` the base is a score, in others a power of 2;
// is any far?
template <int NV>
ATTNREG_INLINE bool start_weights(float scale, const float* peak, float* top, float* rescale, vfloat (&base)[NV], vint (&far)[NV]) {
    const vfloat log2_e = splat(LOG2_E);
    vfloat farthest = zero();
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) {
        const vfloat before = load(top + v * LANES), now = vmax(before, rounded(load(peak + v * LANES) * splat(scale)));
        const vfloat score = select(now == splat(-INFINITY_F), zero(), now), size = vmax(score, -score);
        farthest = vmax(farthest, size);
        far[v] = size > splat(FAR);
        // Weights taken at different times share one rounded base.
        const vfloat power = rounded(score * log2_e);
        base[v] = select(far[v], score, power);
        store(top + v * LANES, now);
        store(rescale + v * LANES, vexp2(select(far[v], (before - score) * log2_e, rounded(before * log2_e) - power)));
    }
    return reduce_max(farthest) > FAR;
}

// What weights are counted from in a lane whose maximum is `top`, as start_weights() has it, in natural units.
inline double exact_base(float top) { return std::fabs(top) > FAR ? double(top) : double(top * LOG2_E) / LOG2_E_EXACT; }

// The weight of a score that is the maximum: 1 but for what rounding took from the base.
inline float weight_of_top(float top) { return std::fabs(top) > FAR ? 1.0f : 1.0f + float(double(top) - exact_base(top)); }

// What is left of top + log(sum) beside `lse`, which holds little of log(sum) where top is large.
inline float lse_left(float top, float sum, float lse) {
    if (!(std::fabs(lse) < INFINITY_F)) return 0.0f;  // nothing met, or not finite: lse says all
    return float((exact_base(top) - lse) + std::log(double(sum)));
}

// The power of 2 that a score's weight is. Any: std::true_type where some lane may be far. A lane's weight does not depend on the others.
template <class Any>
ATTNREG_INLINE vfloat exponent_of(Any, vfloat score, float scale, vfloat base, vint far) {
    const vfloat near = fma(score, splat(scale * LOG2_E), -base);
    if constexpr (Any::value) return select(far, (rounded(score * splat(scale)) - base) * splat(LOG2_E), near);
    return near;
}

// Joins the sum of one run's weights to that of the runs before. Run by run, because one long sum loses more to rounding: a lane may
// count 131,072 keys.
template <int NV>
ATTNREG_INLINE void join_sums(const vfloat (&total)[NV], const float* rescale, float* sum) {
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) store(sum + v * LANES, fma(load(rescale + v * LANES), load(sum + v * LANES), total[v]));
}

// Turns scores into weights exp(score * scale - maximum), in place, and brings maximum, sum and the factor for what was summed before up
// to date. A lane that has met nothing yet keeps maximum -inf and weights 0.
template <int NV>
ATTNREG_ALONE void online_softmax(Single* weights, const float* scores, int64_t count, float scale, const float* peak, float* top,
                                  float* sum, float* rescale) {
    vfloat base[NV], total[NV] = {};
    vint far[NV];
    const auto weigh = [&](auto any) ATTNREG_LAMBDA {
        for (int64_t j = 0; j < count; ++j) {
            vfloat weight[NV];
#pragma GCC unroll 8
            for (int v = 0; v < NV; ++v) weight[v] = exponent_of(any, load(scores + (j * NV + v) * LANES), scale, base[v], far[v]);
            vexp2(weight);
#pragma GCC unroll 8
            for (int v = 0; v < NV; ++v) {
                total[v] += weight[v];
                store_weights(weights, (j * NV + v) * LANES, weight[v]);
            }
        }
    };
    start_weights<NV>(scale, peak, top, rescale, base, far) ? weigh(std::true_type()) : weigh(std::false_type());
    join_sums<NV>(total, rescale, sum);
}

#if defined(ATTNREG_HAS_PAIRS)
// The same with weights rounded to pairs along the keys; the sum is of the unrounded ones.
template <int NV>
ATTNREG_ALONE void online_softmax(Pair* weights, const float* scores, int64_t count, float scale, const float* peak, float* top,
                                  float* sum, float* rescale) {
    vfloat base[NV], total[NV] = {};
    vint far[NV];
    const auto weigh = [&](auto any) ATTNREG_LAMBDA {
        const auto both = [&](int64_t j, auto last) ATTNREG_LAMBDA {
#pragma GCC unroll 8
            for (int v = 0; v < NV; ++v) {
                const float* at = scores + (j * NV + v) * LANES;
                vfloat weight[2];
                weight[0] = exponent_of(any, load(at), scale, base[v], far[v]);
                weight[1] = last.value ? splat(-INFINITY_F) : exponent_of(any, load(at + NV * LANES), scale, base[v], far[v]);
                vexp2_to_round(weight);
                total[v] += weight[0] + weight[1];
                const vint pair = pair_weights(weight[0], weight[1]);
                std::memcpy(weights + (j / 2 * NV + v) * LANES, &pair, sizeof(pair));
            }
        };
        int64_t j = 0;
        for (; j + 2 <= count; j += 2) both(j, std::false_type());
        if (j < count) both(j, std::true_type());
    };
    start_weights<NV>(scale, peak, top, rescale, base, far) ? weigh(std::true_type()) : weigh(std::false_type());
    join_sums<NV>(total, rescale, sum);
}
#endif

}  // namespace attnreg
