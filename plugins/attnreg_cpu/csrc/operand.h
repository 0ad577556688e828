// What a product multiplies: single float32 values, or pairs of bfloat16 values that one dot instruction takes at once.
#pragma once
#include "convert.h"

#if (defined(ATTNREG_AVX512) && defined(__AVX512BF16__)) || defined(ATTNREG_PLAIN_LANES)
#define ATTNREG_HAS_PAIRS 1
#endif

namespace attnreg {

struct Single {
    typedef vfloat Vector;
    static constexpr int WIDTH = 1;  // values an operand holds along the summed dimension
    float value;
};
static_assert(sizeof(Single) == 4, "operands are 32 bits");

ATTNREG_INLINE vfloat broadcast(Single x) { return splat(x.value); }
ATTNREG_INLINE vfloat accumulate(vfloat a, vfloat b, vfloat c) { return fma(a, b, c); }

// Two neighbours of the summed dimension, the first in the low half.
struct Pair {
    typedef vint Vector;
    static constexpr int WIDTH = 2;
    int32_t bits;
};
static_assert(sizeof(Pair) == 4, "operands are 32 bits");

#if defined(ATTNREG_PLAIN_LANES)
// What the instructions below do, so that tests run this path too where the CPU has none.
ATTNREG_INLINE vint broadcast(Pair x) { return splat(x.bits); }
ATTNREG_INLINE vfloat accumulate(vint a, vint b, vfloat c) {
    const vint upper = splat(int32_t(0xffff0000));
    return c + (vfloat)(a & upper) * (vfloat)(b & upper) + (vfloat)(a << 16) * (vfloat)(b << 16);
}
ATTNREG_INLINE vint make_pairs(vfloat first, vfloat second) {
    bfloat_t halves[2][LANES];
    store_narrow(halves[0], first), store_narrow(halves[1], second);
    return (vint)(__builtin_convertvector(load_as<vhalf>(halves[0]), vuint) |
                  (__builtin_convertvector(load_as<vhalf>(halves[1]), vuint) << 16));
}
ATTNREG_INLINE void store_pairs(Pair* out, vfloat values) {
    bfloat_t halves[LANES];
    store_narrow(halves, values);
    std::memcpy(out, halves, sizeof(halves));
}
#elif defined(ATTNREG_HAS_PAIRS)
ATTNREG_INLINE vint broadcast(Pair x) { return (vint)_mm512_set1_epi32(x.bits); }
ATTNREG_INLINE vfloat accumulate(vint a, vint b, vfloat c) {
    return (vfloat)_mm512_dpbf16_ps((__m512)c, (__m512bh)(__m512i)a, (__m512bh)(__m512i)b);
}
// bfloat16 of `first` in the low halves, of `second` in the high ones. For finite weights: rounds to nearest even.
ATTNREG_INLINE vint make_pairs(vfloat first, vfloat second) {
    const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)first));
    const __m512i high = _mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)second)), 16);
    return (vint)_mm512_or_si512(low, high);
}
// Neighbouring lanes as pairs: LANES / 2 operands.
ATTNREG_INLINE void store_pairs(Pair* out, vfloat values) {
    const __m256bh half = _mm512_cvtneps_pbh((__m512)values);
    std::memcpy(out, &half, sizeof(half));
}
#endif

}  // namespace attnreg
