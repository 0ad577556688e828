// Keys and values as a cache stores them: 8-bit floats and integers, widened in registers without a table.
#pragma once
#include "convert.h"

namespace attnreg {

struct e4m3_t {
    uint8_t bits;
};
struct e5m2_t {
    uint8_t bits;
};

typedef int8_t vbyte_signed __attribute__((vector_size(LANES)));
typedef int16_t vhalf_signed __attribute__((vector_size(LANES * 2)));

// load_wide of a type times its unit is the value. e4m3 in float16's place lacks 8 of the exponent's bias.
template <class T>
struct Unit {
    static constexpr float value = 1.0f;
};
template <>
struct Unit<e4m3_t> {
    static constexpr float value = 256.0f;
};

ATTNREG_INLINE vfloat widen_bits(vhalf bits) {
    half_t lanes[LANES];
    std::memcpy(lanes, &bits, sizeof(bits));
    return load_wide(lanes);
}

ATTNREG_INLINE vfloat load_wide(const int8_t* p) {
    return __builtin_convertvector(__builtin_convertvector(load_as<vbyte_signed>(p), vint), vfloat);
}
// The upper byte of a float16.
ATTNREG_INLINE vfloat load_wide(const e5m2_t* p) {
    return widen_bits(__builtin_convertvector(load_as<vbyte>(p), vhalf) << 8);
}
// Sign extension leaves the sign in bits 7 and above, so shifting by 7 puts the exponent and mantissa in float16's place below two
// copies of the sign, of which the lower goes. Subnormals come out right; the two NaN codes have no neighbour and are set apart.
ATTNREG_INLINE vfloat load_wide(const e4m3_t* p) {
    const vhalf_signed x = __builtin_convertvector(load_as<vbyte_signed>(p), vhalf_signed);
    const vhalf bits = (vhalf)((x << 7) & int16_t(0xbfff));
#if defined(ATTNREG_AVX512)
    const __mmask16 nan = _mm_cmpeq_epi8_mask(_mm_or_si128((__m128i)load_as<vbyte>(p), _mm_set1_epi8(-128)), _mm_set1_epi8(-1));
    return (vfloat)_mm512_mask_mov_ps(_mm512_cvtph_ps((__m256i)bits), nan, _mm512_set1_ps(__builtin_nanf("")));
#else
    return widen_bits(bits | (vhalf)((x | int16_t(0xff80)) == int16_t(-1)));
#endif
}

template <class T>
ATTNREG_INLINE float widen_value(T x) {
    T lanes[LANES] = {x};
    return load_wide(lanes)[0] * Unit<T>::value;
}

// The first `count` elements, zeros behind them; nothing beyond them is read.
template <class T>
ATTNREG_INLINE vfloat load_part(const T* p, int64_t count) {
    T lanes[LANES] = {};
    std::memcpy(lanes, p, size_t(count) * sizeof(T));
    return load_wide(lanes);
}

}  // namespace attnreg
