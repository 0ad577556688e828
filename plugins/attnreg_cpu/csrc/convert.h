// Widening and rounding between float32 registers and float16 / bfloat16 memory.
#pragma once
#include "vec.h"

namespace attnreg {

// Storage tags: 16-bit floats are moved as bits and widened in registers.
struct half_t {
    uint16_t bits;
};
struct bfloat_t {
    uint16_t bits;
};
static_assert(sizeof(half_t) == 2 && sizeof(bfloat_t) == 2, "16-bit storage");

ATTNREG_INLINE float bits_to_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
ATTNREG_INLINE uint32_t float_to_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}

ATTNREG_INLINE float widen(float x) { return x; }
ATTNREG_INLINE float widen(bfloat_t x) { return bits_to_float(uint32_t(x.bits) << 16); }
ATTNREG_INLINE float widen(half_t x) {
#if defined(__F16C__)
    return _cvtsh_ss(x.bits);
#elif defined(__aarch64__)
    __fp16 h;
    std::memcpy(&h, &x.bits, 2);
    return float(h);
#else
    // Placing exponent and mantissa 13 bits up gives the value times 2^-112; infinity and NaN get the full exponent back.
    const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16, rest = uint32_t(x.bits & 0x7fffu) << 13;
    if (rest >= 0x0f800000u) return bits_to_float(sign | 0x7f800000u | (rest & 0x007fffffu));
    return bits_to_float(sign | float_to_bits(bits_to_float(rest) * 5.192296858534828e33f));
#endif
}

ATTNREG_INLINE vfloat load_wide(const float* p) { return load(p); }
ATTNREG_INLINE vfloat load_wide(const bfloat_t* p) {
    // GCC builds the generic conversion from two halves.
#if defined(ATTNREG_AVX512)
    return (vfloat)_mm512_slli_epi32(_mm512_cvtepu16_epi32(load_as<__m256i>(p)), 16);
#elif defined(ATTNREG_AVX2)
    // One shuffle inside the halves of a broadcast, which costs but its load, where an extension crosses them.
    const __m256i places = _mm256_setr_epi8(-1, -1, 0, 1, -1, -1, 2, 3, -1, -1, 4, 5, -1, -1, 6, 7,  //
                                            -1, -1, 8, 9, -1, -1, 10, 11, -1, -1, 12, 13, -1, -1, 14, 15);
    return (vfloat)_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(load_as<__m128i>(p)), places);
#else
    return (vfloat)(__builtin_convertvector(load_as<vhalf>(p), vuint) << 16);
#endif
}
ATTNREG_INLINE vfloat load_wide(const half_t* p) {
#if defined(ATTNREG_AVX512)
    return (vfloat)_mm512_cvtph_ps((__m256i)load_as<vhalf>(p));
#elif defined(ATTNREG_AVX2) && defined(__F16C__)
    return (vfloat)_mm256_cvtph_ps((__m128i)load_as<vhalf>(p));
#elif defined(__aarch64__)
    return (vfloat)vcvt_f32_f16((float16x4_t)load_as<vhalf>(p));
#else
    vfloat value;
    for (int i = 0; i < LANES; ++i) value[i] = widen(p[i]);
    return value;
#endif
}

// Round to nearest even; a NaN keeps a set mantissa bit.
ATTNREG_INLINE void narrow(float* p, float x) { *p = x; }
ATTNREG_INLINE void narrow(bfloat_t* p, float x) {
    const uint32_t bits = float_to_bits(x);
    const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
    p->bits = nan ? uint16_t((bits >> 16) | 0x40u) : uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
ATTNREG_INLINE void narrow(half_t* p, float x) {
#if defined(__F16C__)
    p->bits = _cvtss_sh(x, 0);
#elif defined(__aarch64__)
    const __fp16 h = __fp16(x);
    std::memcpy(&p->bits, &h, 2);
#else
    const uint32_t bits = float_to_bits(x), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) {
        p->bits = uint16_t(sign | 0x7e00u);
    } else if (magnitude >= 0x477ff000u) {  // rounds to 65520 or more
        p->bits = uint16_t(sign | 0x7c00u);
    } else if (magnitude < 0x38800000u) {  // subnormal half: adding 0.5 leaves the rounded result in the low bits
        p->bits = uint16_t(sign | (float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u));
    } else {
        p->bits = uint16_t(sign | ((magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13));
    }
#endif
}

ATTNREG_INLINE void store_narrow(float* p, vfloat v) { store(p, v); }
ATTNREG_INLINE void store_narrow(bfloat_t* p, vfloat v) {
    const vuint bits = (vuint)v;
    const vuint rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const vuint quiet = (bits >> 16) | 0x40u;
    const vhalf half = __builtin_convertvector(v != v ? quiet : rounded, vhalf);
    std::memcpy(p, &half, sizeof(half));
}
ATTNREG_INLINE void store_narrow(half_t* p, vfloat v) {
#if defined(ATTNREG_AVX512)
    const __m256i half = _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT);
    std::memcpy(p, &half, sizeof(half));
#elif defined(ATTNREG_AVX2) && defined(__F16C__)
    const __m128i half = _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
    std::memcpy(p, &half, sizeof(half));
#elif defined(__aarch64__)
    const float16x4_t half = vcvt_f16_f32((float32x4_t)v);
    std::memcpy(p, &half, sizeof(half));
#else
    for (int i = 0; i < LANES; ++i) narrow(p + i, v[i]);
#endif
}

}  // namespace attnreg
