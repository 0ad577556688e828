// What a product multiplies: single float32 values, or pairs of bfloat16 values that one dot instruction takes at once, or a matrix unit.
#pragma once
#include "convert.h"

#if (defined(ATTNREG_AVX512) && defined(__AVX512BF16__)) || defined(ATTNREG_PLAIN_LANES)
#define ATTNREG_HAS_PAIRS 1
#endif
#if defined(ATTNREG_HAS_PAIRS) && (defined(ATTNREG_PLAIN_LANES) || defined(__SANITIZE_ADDRESS__))
#define ATTNREG_HAS_AMX 1  // what its instructions do, by others: a sanitiser does not see what they read and write
#elif defined(ATTNREG_HAS_PAIRS) && defined(__AMX_TILE__) && defined(__AMX_BF16__)
#define ATTNREG_HAS_AMX 1
#define ATTNREG_TILE_INSTRUCTIONS 1
#endif

namespace attnreg {

struct Single {
    typedef vfloat Vector;
    static constexpr int WIDTH = 1;  // values an operand holds along the summed dimension
    static constexpr int BLOCK = 1;  // operands that are multiplied together along it
    static constexpr int PARTS = 1;  // operands whose sum stands for the values
    float value;
};
static_assert(sizeof(Single) == 4, "operands are 32 bits");

ATTNREG_INLINE vfloat broadcast(Single x) { return splat(x.value); }
ATTNREG_INLINE vfloat accumulate(vfloat a, vfloat b, vfloat c) { return fma(a, b, c); }

// Two neighbours of the summed dimension, the first in the low half.
struct Pair {
    typedef vint Vector;
    static constexpr int WIDTH = 2, BLOCK = 1, PARTS = 1;
    int32_t bits;
};
static_assert(sizeof(Pair) == 4, "operands are 32 bits");

// Pairs that AMX multiplies (amx.h).
struct BlockPair : Pair {
    static constexpr int BLOCK = 16;
};

// float32 values as three of them (parts.h).
struct BlockParts : Pair {
    static constexpr int BLOCK = 16, PARTS = 3;
};

// Operands that hold `channels` values, in whole blocks.
template <class Operand>
constexpr int operands_of(int channels) {
    return (channels + Operand::WIDTH * Operand::BLOCK - 1) / (Operand::WIDTH * Operand::BLOCK) * Operand::BLOCK;
}

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
ATTNREG_INLINE vint pair_weights(vfloat first, vfloat second) { return make_pairs(first, second); }
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
// The same for weights of a softmax, which are no smaller than 0: ties round up, and a NaN, which is in their sum too, may get lost.
ATTNREG_INLINE vint pair_weights(vfloat first, vfloat second) {
    const vuint half = (vuint)splat(0x8000), low = ((vuint)first + half) >> 16, high = (vuint)second + half;
    return (vint)_mm512_ternarylogic_epi32((__m512i)low, (__m512i)high, (__m512i)splat(int32_t(0xffff0000)), 0xf8);  // low | (high & mask)
}
// Neighbouring lanes as pairs: LANES / 2 operands.
ATTNREG_INLINE void store_pairs(Pair* out, vfloat values) {
    const __m256bh half = _mm512_cvtneps_pbh((__m512)values);
    std::memcpy(out, &half, sizeof(half));
}
#endif

}  // namespace attnreg
