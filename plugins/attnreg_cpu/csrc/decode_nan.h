// The codes of NaN that load_finite widens to numbers, looked for while a strip of rows lies in the first cache.
//
// A key with one has no score, whatever the query; a channel of the values with one has no sum, whatever the weight.
#pragma once
#include <type_traits>

#include "decode_types.h"

namespace attnreg {

#if defined(ATTNREG_SUBNORMAL_E4M3)
namespace detail {
// Doubled, both codes of NaN are 254, which no other code exceeds.
ATTNREG_INLINE __m256i greatest_code(__m256i top, __m256i codes) { return _mm256_max_epu8(top, _mm256_add_epi8(codes, codes)); }
ATTNREG_INLINE __m256i load_codes(const e4m3_t* p, std::integral_constant<int, 32>) { return load_as<__m256i>(p); }
ATTNREG_INLINE __m256i load_codes(const e4m3_t* p, std::integral_constant<int, 8>) {
    return _mm256_zextsi128_si256(_mm_loadl_epi64((const __m128i*)p));
}
// Calls see(d, codes) for blocks of 32 and then of 8 codes; what is left of 8 was widened by load_wide.
template <class See>
ATTNREG_INLINE void each_block(int64_t dim, const See& see) {
    int64_t d = 0;
    for (; d + 32 <= dim; d += 32) see(d, std::integral_constant<int, 32>());
    for (; d + 8 <= dim; d += 8) see(d, std::integral_constant<int, 8>());
}
// Does any of N rows hold a NaN?
template <int N>
ATTNREG_INLINE bool hold_nan(const e4m3_t* const* rows, int64_t dim) {
    __m256i top[N];
    repeat<N>([&](int i) ATTNREG_LAMBDA { top[i] = _mm256_setzero_si256(); });
    each_block(dim, [&](int64_t d, auto codes) ATTNREG_LAMBDA {
        repeat<N>([&](int i) ATTNREG_LAMBDA { top[i] = greatest_code(top[i], load_codes(rows[i] + d, codes)); });
    });
    repeat<N>([&](int i) ATTNREG_LAMBDA { top[0] = _mm256_max_epu8(top[0], top[i]); });
    return __builtin_expect(_mm256_movemask_epi8(_mm256_cmpeq_epi8(top[0], _mm256_set1_epi8(-2))) != 0, 0);
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
