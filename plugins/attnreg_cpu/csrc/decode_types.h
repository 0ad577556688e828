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

// Bytes to 16 or 32 bits, LANES of them. Spelt out because GCC builds these conversions from halves, or lane by lane.
#if defined(ATTNREG_AVX512)
ATTNREG_INLINE vhalf_signed extend_signed(const void* p) { return (vhalf_signed)_mm256_cvtepi8_epi16(load_as<__m128i>(p)); }
ATTNREG_INLINE vhalf extend_unsigned(const void* p) { return (vhalf)_mm256_cvtepu8_epi16(load_as<__m128i>(p)); }
ATTNREG_INLINE vint extend_integers(const void* p) { return (vint)_mm512_cvtepi8_epi32(load_as<__m128i>(p)); }
ATTNREG_INLINE vfloat widen_bits(vhalf bits) { return (vfloat)_mm512_cvtph_ps((__m256i)bits); }
#elif defined(ATTNREG_AVX2) && defined(__F16C__)
ATTNREG_INLINE vhalf_signed extend_signed(const void* p) { return (vhalf_signed)_mm_cvtepi8_epi16(_mm_loadl_epi64((const __m128i*)p)); }
ATTNREG_INLINE vhalf extend_unsigned(const void* p) { return (vhalf)_mm_cvtepu8_epi16(_mm_loadl_epi64((const __m128i*)p)); }
ATTNREG_INLINE vint extend_integers(const void* p) { return (vint)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)); }
ATTNREG_INLINE vfloat widen_bits(vhalf bits) { return (vfloat)_mm256_cvtph_ps((__m128i)bits); }
#else
ATTNREG_INLINE vhalf_signed extend_signed(const void* p) { return __builtin_convertvector(load_as<vbyte_signed>(p), vhalf_signed); }
ATTNREG_INLINE vhalf extend_unsigned(const void* p) { return __builtin_convertvector(load_as<vbyte>(p), vhalf); }
ATTNREG_INLINE vint extend_integers(const void* p) { return __builtin_convertvector(extend_signed(p), vint); }
ATTNREG_INLINE vfloat widen_bits(vhalf bits) {
    half_t lanes[LANES];
    std::memcpy(lanes, &bits, sizeof(bits));
    return load_wide(lanes);
}
#endif

// load_wide of a type times its unit is the value. e4m3 in float16's place lacks 8 of the exponent's bias.
template <class T>
struct Unit {
    static constexpr float value = 1.0f;
};
template <>
struct Unit<e4m3_t> {
    static constexpr float value = 256.0f;
};

ATTNREG_INLINE vfloat load_wide(const int8_t* p) { return __builtin_convertvector(extend_integers(p), vfloat); }
// The upper byte of a float16.
ATTNREG_INLINE vfloat load_wide(const e5m2_t* p) { return widen_bits(extend_unsigned(p) << 8); }
// Sign extension leaves the sign in bits 7 and above, so shifting by 7 puts the exponent and mantissa in float16's place below two
// copies of the sign, of which the lower goes. Subnormals come out right; the two NaN codes have no neighbour and are set apart.
ATTNREG_INLINE vfloat load_wide(const e4m3_t* p) {
    const vhalf_signed x = extend_signed(p);
    const vhalf bits = (vhalf)((x << 7) & int16_t(0xbfff));
#if defined(ATTNREG_AVX512)
    const __mmask16 nan = _mm_cmpeq_epi8_mask(_mm_or_si128(load_as<__m128i>(p), _mm_set1_epi8(-128)), _mm_set1_epi8(-1));
    return (vfloat)_mm512_mask_mov_ps((__m512)widen_bits(bits), nan, _mm512_set1_ps(__builtin_nanf("")));
#else
    return widen_bits(bits | (vhalf)((x | int16_t(0xff80)) == int16_t(-1)));
#endif
}

// How many registers of a type are best widened together: 8-bit floats fill a whole one with their 16-bit forms first.
template <class T>
struct Together {
    static constexpr int value = 1;
};
template <class T, int N>
ATTNREG_INLINE void load_together(const T* p, vfloat (&y)[N]) {
    for (int i = 0; i < N; ++i) y[i] = load_wide(p + i * LANES);
}
#if defined(ATTNREG_AVX512) || (defined(ATTNREG_AVX2) && defined(__F16C__))
template <>
struct Together<e4m3_t> {
    static constexpr int value = 2;
};
template <>
struct Together<e5m2_t> {
    static constexpr int value = 2;
};
#if defined(ATTNREG_AVX512)
ATTNREG_INLINE void widen_both(__m512i bits, vfloat (&y)[2]) {
    y[0] = (vfloat)_mm512_cvtph_ps(_mm512_castsi512_si256(bits));
    y[1] = (vfloat)_mm512_cvtph_ps(_mm512_extracti64x4_epi64(bits, 1));
}
ATTNREG_INLINE void load_together(const e5m2_t* p, vfloat (&y)[2]) {
    widen_both(_mm512_slli_epi16(_mm512_cvtepu8_epi16(load_as<__m256i>(p)), 8), y);
}
ATTNREG_INLINE void load_together(const e4m3_t* p, vfloat (&y)[2]) {
    const __m512i x = _mm512_cvtepi8_epi16(load_as<__m256i>(p)), all = _mm512_set1_epi16(-1);
    const __m512i bits = _mm512_and_si512(_mm512_slli_epi16(x, 7), _mm512_set1_epi16(int16_t(0xbfff)));
    const __mmask32 nan = _mm512_cmpeq_epi16_mask(_mm512_or_si512(x, _mm512_set1_epi16(int16_t(0xff80))), all);
    widen_both(_mm512_mask_mov_epi16(bits, nan, all), y);
}
#else
ATTNREG_INLINE void widen_both(__m256i bits, vfloat (&y)[2]) {
    y[0] = (vfloat)_mm256_cvtph_ps(_mm256_castsi256_si128(bits));
    y[1] = (vfloat)_mm256_cvtph_ps(_mm256_extracti128_si256(bits, 1));
}
ATTNREG_INLINE void load_together(const e5m2_t* p, vfloat (&y)[2]) {
    widen_both(_mm256_slli_epi16(_mm256_cvtepu8_epi16(load_as<__m128i>(p)), 8), y);
}
ATTNREG_INLINE void load_together(const e4m3_t* p, vfloat (&y)[2]) {
    const __m256i x = _mm256_cvtepi8_epi16(load_as<__m128i>(p));
    const __m256i bits = _mm256_and_si256(_mm256_slli_epi16(x, 7), _mm256_set1_epi16(int16_t(0xbfff)));
    const __m256i nan = _mm256_cmpeq_epi16(_mm256_or_si256(x, _mm256_set1_epi16(int16_t(0xff80))), _mm256_set1_epi16(-1));
    widen_both(_mm256_or_si256(bits, nan), y);
}
#endif
#endif

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
