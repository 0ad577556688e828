// exp and tanh on whole vectors.
#pragma once
#include <limits>

#include "vec.h"

namespace attnreg {

constexpr float INFINITY_F = std::numeric_limits<float>::infinity();

// exp(x) within 2 ulp for -87.6 < x < 88.3 (checked over the range by tests/cpu). Below, and at -inf, it is 0 (results there would be
// subnormal); above it saturates; NaN stays NaN.
// Cody-Waite: x = n ln2 + r with |r| <= ln2 / 2 and ln2 in two parts; then a degree-6 minimax polynomial of exp on that interval.
ATTNREG_INLINE vfloat vexp(vfloat x) {
    const vfloat magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer held in the low bits
    x = vmin(splat(88.37f), vmax(splat(-88.0f), x));
    const vfloat shifted = fma(x, splat(1.44269504088896341f), magic);
    const vfloat n = shifted - magic;
    vfloat r = fma(n, splat(-0.693145751953125f), x);
    r = fma(n, splat(-1.42860677e-6f), r);
    vfloat p = splat(1.381453988e-3f);
    p = fma(p, r, splat(8.368745127e-3f));
    p = fma(p, r, splat(4.166839079e-2f));
    p = fma(p, r, splat(1.666652040e-1f));
    p = fma(p, r, splat(4.999999343e-1f));
    p = fma(p, r * r, r) + splat(1.0f);
    const vint exponent = ((vint)shifted << 23) + splat(int32_t(127) << 23);
    return p * (vfloat)exponent;
}

constexpr double LOG2_E_EXACT = 1.44269504088896341;
constexpr float LOG2_E = float(LOG2_E_EXACT);

// 2^x within 1.1 ulp for -126 <= x < 127 (checked over the range by tests/cpu). Below -126.5, and at -inf, it is 0; NaN stays NaN. With
// log2(e) in the scale of its argument this is the exponential of a softmax: what is left of x beside its nearest integer is exact, so
// that it needs neither a product nor a second part of ln2. Degree-6 minimax polynomial of 2^r for |r| <= 1/2 whose constant is 1.
//
// Several at once, step by step, so that the long chain of one does not fill a core's schedulers.
#if defined(ATTNREG_AVX512)
// AVX-512 takes off the whole part and scales by it in one instruction each. The whole part is the one below, so the polynomial is of
// 0 <= r < 1.
template <int N, int DEGREE>
ATTNREG_INLINE void scale_powers(vfloat (&x)[N], const float (&coefficients)[DEGREE]) {
    vfloat r[N], p[N];
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) {
        r[i] = (vfloat)_mm512_reduce_ps((__m512)x[i], _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
        p[i] = splat(coefficients[0]);
    }
#pragma GCC unroll 8
    for (int n = 1; n < DEGREE; ++n) {
#pragma GCC unroll 8
        for (int i = 0; i < N; ++i) p[i] = fma(p[i], r[i], splat(coefficients[n]));
    }
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) {
        const __mmask16 normal = _mm512_cmp_ps_mask((__m512)x[i], (__m512)splat(-126.0f), _CMP_NLT_UQ);
        x[i] = (vfloat)_mm512_maskz_scalef_ps(normal, (__m512)fma(p[i], r[i], splat(1.0f)), (__m512)x[i]);
    }
}
template <int N>
ATTNREG_INLINE void vexp2(vfloat (&x)[N]) {
    constexpr float P[] = {2.1612915e-4f, 1.24678465e-3f, 9.67545157e-3f, 5.548528062e-2f, 2.4022930555e-1f, 6.9314704444e-1f};
    scale_powers(x, P);
}
#else
template <int N>
ATTNREG_INLINE void vexp2(vfloat (&x)[N]) {
    const vfloat magic = splat(12582912.0f + 127.0f);  // as in vexp, and with the exponent's bias
    constexpr float P[] = {1.5594677507e-4f, 1.3406643904e-3f, 9.6176929750e-3f, 5.5503105510e-2f,
                           2.4022652783e-1f, 6.9314721497e-1f, 1.0f};
    vfloat shifted[N], p[N];
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) {
        x[i] = vmax(splat(-127.0f), x[i]);
        shifted[i] = x[i] + magic;
        x[i] -= shifted[i] - magic;
        p[i] = splat(P[0]);
    }
#pragma GCC unroll 8
    for (int n = 1; n < 7; ++n) {
#pragma GCC unroll 8
        for (int i = 0; i < N; ++i) p[i] = fma(p[i], x[i], splat(P[n]));
    }
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) x[i] = p[i] * (vfloat)((vint)shifted[i] << 23);
}
#endif
ATTNREG_INLINE vfloat vexp2(vfloat x) {
    vfloat one[1] = {x};
    vexp2(one);
    return one[0];
}

// The same for what is rounded to 8 bits next: within 3 ulp.
template <int N>
ATTNREG_INLINE void vexp2_to_round(vfloat (&x)[N]) {
#if defined(ATTNREG_AVX512)
    constexpr float P[] = {1.86713008e-3f, 9.01703028e-3f, 5.579991315e-2f, 2.4016445014e-1f, 6.9315131181e-1f};
    scale_powers(x, P);
#else
    vexp2(x);
#endif
}

// tanh(x): a degree-9 odd polynomial near 0, where (e - 1) / (e + 1) would cancel, and that quotient elsewhere.
ATTNREG_INLINE vfloat vtanh(vfloat x) {
    const vfloat clamped = vmin(splat(10.0f), vmax(splat(-10.0f), x));
    const vfloat e = vexp(clamped + clamped);
    const vfloat far = (e - splat(1.0f)) / (e + splat(1.0f));
    const vfloat z = x * x;
    vfloat p = splat(2.058955266e-2f);
    p = fma(p, z, splat(-5.390235685e-2f));
    p = fma(p, z, splat(1.333319671e-1f));
    p = fma(p, z, splat(-3.333333242e-1f));
    const vfloat near = fma(p * z, x, x);
    return select(z < splat(0.0625f), near, far);
}

}  // namespace attnreg
