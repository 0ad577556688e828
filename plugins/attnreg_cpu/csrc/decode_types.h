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

// load_wide of a type, times both units, is the value. `before` goes to queries and weights, so that products neither under- nor
// overflow; `after` to what was summed.
template <class T>
struct Unit {
    static constexpr float before = 1.0f, after = 1.0f;
};

// Bytes to 16 or 32 bits, LANES of them. Spelt out because GCC builds these conversions from halves, or lane by lane.
#if defined(ATTNREG_AVX512)
ATTNREG_INLINE vhalf_signed extend_signed(const void* p) { return (vhalf_signed)_mm256_cvtepi8_epi16(load_as<__m128i>(p)); }
ATTNREG_INLINE vhalf upper_bytes(const void* p) { return (vhalf)_mm256_slli_epi16(_mm256_cvtepu8_epi16(load_as<__m128i>(p)), 8); }
ATTNREG_INLINE vint load_integers(const int8_t* p) { return (vint)_mm512_cvtepi8_epi32(load_as<__m128i>(p)); }
ATTNREG_INLINE vfloat widen_bits(vhalf bits) { return (vfloat)_mm512_cvtph_ps((__m256i)bits); }
#elif defined(ATTNREG_AVX2) && defined(__F16C__)
ATTNREG_INLINE vhalf_signed extend_signed(const void* p) { return (vhalf_signed)_mm_cvtepi8_epi16(_mm_loadl_epi64((const __m128i*)p)); }
ATTNREG_INLINE vhalf upper_bytes(const void* p) {
    return (vhalf)_mm_unpacklo_epi8(_mm_setzero_si128(), _mm_loadl_epi64((const __m128i*)p));
}
ATTNREG_INLINE vint load_integers(const int8_t* p) { return (vint)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)); }
ATTNREG_INLINE vfloat widen_bits(vhalf bits) { return (vfloat)_mm256_cvtph_ps((__m128i)bits); }
#else
ATTNREG_INLINE vhalf_signed extend_signed(const void* p) { return __builtin_convertvector(load_as<vbyte_signed>(p), vhalf_signed); }
ATTNREG_INLINE vhalf upper_bytes(const void* p) { return __builtin_convertvector(load_as<vbyte>(p), vhalf) << 8; }
ATTNREG_INLINE vint load_integers(const int8_t* p) { return __builtin_convertvector(extend_signed(p), vint); }
ATTNREG_INLINE vfloat widen_bits(vhalf bits) {
    half_t lanes[LANES];
    std::memcpy(lanes, &bits, sizeof(bits));
    return load_wide(lanes);
}
#endif

ATTNREG_INLINE vfloat load_wide(const int8_t* p) { return __builtin_convertvector(load_integers(p), vfloat); }
// The upper byte of a float16.
ATTNREG_INLINE vfloat load_wide(const e5m2_t* p) { return widen_bits(upper_bytes(p)); }

// As load_wide, but where telling codes of NaN apart costs they become numbers; whoever uses it looks for them (decode_nan.h).
template <class T>
ATTNREG_INLINE vfloat load_finite(const T* p) {
    return load_wide(p);
}
// The same where sums fill the registers: constants are read from memory with each use, as GCC would rather spill a sum than a constant.
template <class T>
ATTNREG_INLINE vfloat load_among_sums(const T* p) {
    return load_finite(p);
}
#if defined(ATTNREG_AVX2)
struct alignas(32) Constant {
    uint32_t at[8];
};
constexpr Constant UPPER_HALVES = {{0x01008080, 0x03028080, 0x05048080, 0x07068080, 0x09088080, 0x0b0a8080, 0x0d0c8080, 0x0f0e8080}};
template <>
ATTNREG_INLINE vfloat load_among_sums(const bfloat_t* p) {
    __m256i x = _mm256_broadcastsi128_si256(load_as<__m128i>(p));
    asm("vpshufb %1, %0, %0" : "+x"(x) : "m"(UPPER_HALVES));
    return (vfloat)x;
}
#if defined(__F16C__)
template <>
ATTNREG_INLINE vfloat load_among_sums(const e5m2_t* p) {
    return widen_bits((vhalf)_mm_slli_epi16(_mm_cvtepu8_epi16(_mm_loadl_epi64((const __m128i*)p)), 8));
}
#endif
#endif

#if defined(ATTNREG_AVX2) || defined(ATTNREG_AVX512)
#define ATTNREG_NAN_APART 1  // load_finite of e4m3 takes NaN for a number
#endif

#if defined(ATTNREG_AVX2) && defined(ATTNREG_ZEN)
// Shifted by 20, the exponent and mantissa stand in float32's place below five copies of the sign, of which four go, and lack 120 of the
// exponent's bias. Subnormals come out right, as subnormals: a Zen 3 multiplies them at full speed (measured; the other Zens are
// taken to), an Intel core does not.
#define ATTNREG_SUBNORMAL_E4M3 1
template <>
struct Unit<e4m3_t> {
    static constexpr float before = 0x1p60f, after = 0x1p60f;
};
constexpr uint32_t SIGN_AND_CODE = 0x87f00000;
ATTNREG_INLINE vint extend_codes(const e4m3_t* p) { return (vint)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)); }
template <>
ATTNREG_INLINE vfloat load_finite(const e4m3_t* p) {
    return (vfloat)((extend_codes(p) << 20) & int32_t(SIGN_AND_CODE));
}
constexpr Constant SIGNS_AND_CODES = {{SIGN_AND_CODE, SIGN_AND_CODE, SIGN_AND_CODE, SIGN_AND_CODE, SIGN_AND_CODE, SIGN_AND_CODE,
                                       SIGN_AND_CODE, SIGN_AND_CODE}};
template <>
ATTNREG_INLINE vfloat load_among_sums(const e4m3_t* p) {
    __m256i x = (__m256i)(extend_codes(p) << 20);
    asm("vpand %1, %0, %0" : "+x"(x) : "m"(SIGNS_AND_CODES));
    return (vfloat)x;
}
ATTNREG_INLINE vfloat load_wide(const e4m3_t* p) {
    const vint nan = (extend_codes(p) | ~0x7f) == -1;
    return (vfloat)((vint)load_finite(p) | nan);
}
#else
// e4m3 in float16's place lacks 8 of the exponent's bias.
template <>
struct Unit<e4m3_t> {
    static constexpr float before = 1.0f, after = 256.0f;
};
// Sign extension leaves the sign in bits 7 and above, so shifting by 7 puts the exponent and mantissa in float16's place below two
// copies of the sign, of which the lower goes. Subnormals come out right; the two NaN codes have no neighbour and are set apart.
ATTNREG_INLINE vhalf half_of_code(vhalf_signed code) { return (vhalf)((code << 7) & int16_t(0xbfff)); }
ATTNREG_INLINE vfloat load_wide(const e4m3_t* p) {
    const vhalf_signed x = extend_signed(p);
    return widen_bits(half_of_code(x) | (vhalf)((x | int16_t(0xff80)) == int16_t(-1)));
}
#if defined(ATTNREG_NAN_APART)
template <>
ATTNREG_INLINE vfloat load_finite(const e4m3_t* p) {
    return widen_bits(half_of_code(extend_signed(p)));
}
#endif
#endif

// While one lives, subnormals are read as what they are, whatever the thread was told (torch.set_flush_denormal).
struct KeepSubnormals {
#if defined(ATTNREG_SUBNORMAL_E4M3)
    static constexpr unsigned READ_AS_ZERO = 0x40;
    const unsigned before = _mm_getcsr();
    KeepSubnormals() {
        if (before & READ_AS_ZERO) _mm_setcsr(before & ~READ_AS_ZERO);
    }
    ~KeepSubnormals() {
        if (before & READ_AS_ZERO) _mm_setcsr(before);
    }
#else
    KeepSubnormals() {}
#endif
};

// Registers of a type that are best widened together: AVX-512 fills a whole one with the 16-bit forms of 8-bit floats first.
template <class T>
constexpr int TOGETHER = 1;
#if defined(ATTNREG_AVX512)
template <>
constexpr int TOGETHER<e4m3_t> = 2;
template <>
constexpr int TOGETHER<e5m2_t> = 2;
// By way of memory, which parts the register for nothing.
ATTNREG_INLINE void widen_both(__m512i bits, vfloat (&y)[2]) {
    asm("" : "+m"(bits));
    const __m256i* half = reinterpret_cast<const __m256i*>(&bits);
    y[0] = (vfloat)_mm512_cvtph_ps(half[0]);
    y[1] = (vfloat)_mm512_cvtph_ps(half[1]);
}
ATTNREG_INLINE void load_both(const e5m2_t* p, vfloat (&y)[2]) {
    widen_both(_mm512_slli_epi16(_mm512_cvtepu8_epi16(load_as<__m256i>(p)), 8), y);
}
ATTNREG_INLINE void load_both(const e4m3_t* p, vfloat (&y)[2]) {
    const __m512i bits = _mm512_slli_epi16(_mm512_cvtepi8_epi16(load_as<__m256i>(p)), 7);
    widen_both(_mm512_and_si512(bits, _mm512_set1_epi16(int16_t(0xbfff))), y);
}
#endif

template <class T>
ATTNREG_INLINE float widen_value(T x) {
    T lanes[LANES] = {x};
    return load_wide(lanes)[0] * Unit<T>::before * Unit<T>::after;
}

// N registers of a row. FULL: where sums fill the registers.
template <bool FULL, class T, int N>
ATTNREG_INLINE void load_registers(const T* p, vfloat (&y)[N]) {
#if defined(ATTNREG_AVX512)
    if constexpr (N == 2 && TOGETHER<T> == 2) {
        load_both(p, y);
        return;
    }
#endif
    repeat<N>([&](int n) ATTNREG_LAMBDA { y[n] = FULL ? load_among_sums(p + n * LANES) : load_finite(p + n * LANES); });
}

// The first `count` elements, zeros behind them; nothing beyond them is read.
template <class T>
ATTNREG_INLINE vfloat load_part(const T* p, int64_t count) {
    T lanes[LANES] = {};
    std::memcpy(lanes, p, size_t(count) * sizeof(T));
    return load_wide(lanes);
}

}  // namespace attnreg
