// The codes of NaN that load_finite widens to numbers, looked for while a strip of rows lies in the first cache.
//
// A key with one has no score, whatever the query; a channel of the values with one has no sum, whatever the weight.
#pragma once
#include <type_traits>

#include "decode_types.h"

namespace attnreg {

#if defined(ATTNREG_NAN_APART)
namespace detail {
template <int N>
using Count = std::integral_constant<int, N>;
// Doubled, both codes of NaN are 254, which no other code exceeds.
#if defined(ATTNREG_AVX512)
typedef __m512i Codes;
ATTNREG_INLINE Codes doubled(Codes x) { return _mm512_add_epi8(x, x); }
ATTNREG_INLINE Codes greater(Codes a, Codes b) { return _mm512_max_epu8(a, b); }
ATTNREG_INLINE bool holds_nan(Codes top) { return _mm512_cmpeq_epi8_mask(top, _mm512_set1_epi8(-2)) != 0; }
ATTNREG_INLINE Codes load_codes(const e4m3_t* p, Count<LANES>) { return _mm512_zextsi128_si512(load_as<__m128i>(p)); }
#else
typedef __m256i Codes;
ATTNREG_INLINE Codes doubled(Codes x) { return _mm256_add_epi8(x, x); }
ATTNREG_INLINE Codes greater(Codes a, Codes b) { return _mm256_max_epu8(a, b); }
ATTNREG_INLINE bool holds_nan(Codes top) { return _mm256_movemask_epi8(_mm256_cmpeq_epi8(top, _mm256_set1_epi8(-2))) != 0; }
ATTNREG_INLINE Codes load_codes(const e4m3_t* p, Count<LANES>) { return _mm256_zextsi128_si256(_mm_loadl_epi64((const __m128i*)p)); }
#endif
constexpr int CODES = sizeof(Codes);
ATTNREG_INLINE Codes load_codes(const e4m3_t* p, Count<CODES>) { return load_as<Codes>(p); }
// Calls see(d, codes) for whole registers of codes and then for blocks of LANES; what is left was widened by load_wide.
template <class See>
ATTNREG_INLINE void each_block(int64_t dim, const See& see) {
    int64_t d = 0;
    for (; d + CODES <= dim; d += CODES) see(d, Count<CODES>());
    for (; d + LANES <= dim; d += LANES) see(d, Count<LANES>());
}
// Does any of N rows hold a NaN?
template <int N>
ATTNREG_INLINE bool hold_nan(const e4m3_t* const* rows, int64_t dim) {
    Codes top[N] = {};
    each_block(dim, [&](int64_t d, auto codes) ATTNREG_LAMBDA {
        repeat<N>([&](int i) ATTNREG_LAMBDA { top[i] = greater(top[i], doubled(load_codes(rows[i] + d, codes))); });
    });
    repeat<N>([&](int i) ATTNREG_LAMBDA { top[0] = greater(top[0], top[i]); });
    return __builtin_expect(holds_nan(top[0]), 0);
}
// Calls lose(j) for each of `count` rows that holds a NaN.
template <class Lose>
ATTNREG_INLINE void each_lost(const e4m3_t* const* rows, int64_t count, int64_t dim, const Lose& lose) {
    for (int64_t j = 0; j < count; j += LANES) {
        if (j + LANES <= count && !hold_nan<LANES>(rows + j, dim)) continue;
        for (int64_t i = j; i < j + LANES && i < count; ++i) {
            if (hold_nan<1>(rows + i, dim)) lose(i);
        }
    }
}
}  // namespace detail

// Scores of `rows` rows with keys that hold a NaN become NaN.
inline void lose_keys(const e4m3_t* const* keys, int64_t count, int64_t dim, float* scores, int64_t rows, int64_t stride) {
    detail::each_lost(keys, count, dim, [&](int64_t k) {
        for (int64_t r = 0; r < rows; ++r) scores[r * stride + k] = __builtin_nanf("");
    });
}

// Sums of `rows` rows over channels that hold a NaN become NaN.
inline void lose_channels(const e4m3_t* const* values, int64_t count, int64_t dim, float* out, int64_t rows, int64_t stride) {
    detail::each_lost(values, count, dim, [&](int64_t k) {
        for (int64_t c = 0; c < dim; ++c) {
            for (int64_t r = 0; r < rows && (values[k][c].bits & 0x7f) == 0x7f; ++r) out[r * stride + c] = __builtin_nanf("");
        }
    });
}
#endif

// For types whose NaN load_finite keeps there is nothing to look for.
template <class T>
inline void lose_keys(const T* const*, int64_t, int64_t, float*, int64_t, int64_t) {}
template <class T>
inline void lose_channels(const T* const*, int64_t, int64_t, float*, int64_t, int64_t) {}

}  // namespace attnreg
