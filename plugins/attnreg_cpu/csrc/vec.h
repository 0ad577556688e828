// One vector type for every instruction set: the widest float register that the target has.
//
// Kernels are written once against `vfloat` and `vint`; GCC/Clang vector extensions give the arithmetic, and the few operations
// that the compilers do not form by themselves (fused multiply-add, ordered max, splat) are wrapped here per instruction set.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

// ATTNREG_PLAIN_LANES: so many lanes of the compiler's own vectors. Tests run the width of AVX-512 so where the CPU has none.
#if defined(ATTNREG_PLAIN_LANES)
#elif defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define ATTNREG_AVX512 1
#elif defined(__AVX2__) && defined(__FMA__)
#define ATTNREG_AVX2 1
#elif defined(__ARM_NEON)
#define ATTNREG_NEON 1
#endif

// AMD's cores. A compiler that does not know one yet takes it for the newest that it knows.
#if defined(__znver1__) || defined(__znver2__) || defined(__znver3__) || defined(__znver4__) || defined(__znver5__)
#define ATTNREG_ZEN 1
#endif

// A sanitised build leaves inlining to the compiler, and would take minutes otherwise.
#if defined(__SANITIZE_ADDRESS__)
#define ATTNREG_INLINE inline
#define ATTNREG_LAMBDA
#else
#define ATTNREG_INLINE inline __attribute__((always_inline))
#define ATTNREG_LAMBDA __attribute__((always_inline))
#endif
// A function that needs the whole register file: inlined, its sums would be spilled for what its caller keeps.
#define ATTNREG_ALONE __attribute__((noinline))

namespace attnreg {

#if defined(ATTNREG_AVX512)
constexpr int LANES = 16;
constexpr int VECTOR_REGISTERS = 32;
#elif defined(ATTNREG_AVX2)
constexpr int LANES = 8;
constexpr int VECTOR_REGISTERS = 16;
#elif defined(ATTNREG_PLAIN_LANES)
constexpr int LANES = ATTNREG_PLAIN_LANES;
constexpr int VECTOR_REGISTERS = 32;
#elif defined(ATTNREG_NEON)
constexpr int LANES = 4;
constexpr int VECTOR_REGISTERS = 32;
#else
constexpr int LANES = 4;
constexpr int VECTOR_REGISTERS = 16;
#endif
constexpr int VECTOR_BYTES = LANES * 4;

typedef float vfloat __attribute__((vector_size(VECTOR_BYTES)));
typedef int32_t vint __attribute__((vector_size(VECTOR_BYTES)));
typedef uint32_t vuint __attribute__((vector_size(VECTOR_BYTES)));
typedef uint16_t vhalf __attribute__((vector_size(VECTOR_BYTES / 2)));
typedef uint8_t vbyte __attribute__((vector_size(VECTOR_BYTES / 4)));

// Loads and stores need no alignment: memcpy of a register's size compiles to one unaligned move.
template <class V, class T>
ATTNREG_INLINE V load_as(const T* pointer) {
    V value;
    std::memcpy(&value, pointer, sizeof(V));
    return value;
}
ATTNREG_INLINE vfloat load(const float* pointer) { return load_as<vfloat>(pointer); }
ATTNREG_INLINE vint load(const int32_t* pointer) { return load_as<vint>(pointer); }
ATTNREG_INLINE void store(float* pointer, vfloat value) { std::memcpy(pointer, &value, sizeof(value)); }
ATTNREG_INLINE void store(int32_t* pointer, vint value) { std::memcpy(pointer, &value, sizeof(value)); }

#if defined(ATTNREG_AVX512)
ATTNREG_INLINE vfloat splat(float x) { return (vfloat)_mm512_set1_ps(x); }
ATTNREG_INLINE vfloat fma(vfloat a, vfloat b, vfloat c) { return (vfloat)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
// As the instruction does: where either side is NaN the second comes back, so vmax(bound, x) lets a NaN x through.
ATTNREG_INLINE vfloat vmax(vfloat a, vfloat b) { return (vfloat)_mm512_max_ps((__m512)a, (__m512)b); }
ATTNREG_INLINE vfloat vmin(vfloat a, vfloat b) { return (vfloat)_mm512_min_ps((__m512)a, (__m512)b); }
#elif defined(ATTNREG_AVX2)
ATTNREG_INLINE vfloat splat(float x) { return (vfloat)_mm256_set1_ps(x); }
ATTNREG_INLINE vfloat fma(vfloat a, vfloat b, vfloat c) { return (vfloat)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
ATTNREG_INLINE vfloat vmax(vfloat a, vfloat b) { return (vfloat)_mm256_max_ps((__m256)a, (__m256)b); }
ATTNREG_INLINE vfloat vmin(vfloat a, vfloat b) { return (vfloat)_mm256_min_ps((__m256)a, (__m256)b); }
#else
#if defined(ATTNREG_NEON)
ATTNREG_INLINE vfloat splat(float x) { return (vfloat)vdupq_n_f32(x); }
ATTNREG_INLINE vfloat fma(vfloat a, vfloat b, vfloat c) {
    return (vfloat)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
}
#else
ATTNREG_INLINE vfloat splat(float x) { return (vfloat){} + x; }
ATTNREG_INLINE vfloat fma(vfloat a, vfloat b, vfloat c) { return a * b + c; }
#endif
ATTNREG_INLINE vfloat vmax(vfloat a, vfloat b) { return a > b ? a : b; }
ATTNREG_INLINE vfloat vmin(vfloat a, vfloat b) { return a < b ? a : b; }
#endif

// Keeps a product from being joined with a sum that follows, which would then not be of the rounded product.
template <class V>
ATTNREG_INLINE V rounded(V x) {
#if defined(ATTNREG_AVX512)
    asm("" : "+v"(x));
#elif defined(ATTNREG_AVX2)
    asm("" : "+x"(x));
#else
    asm("" : "+m"(x));
#endif
    return x;
}

// Keeps a value that several multiply-adds share in its register: GCC would rather make each of them read it again, and twice the
// loads of an x86 core are fewer than its multiply-adds.
template <class V>
ATTNREG_INLINE V in_register(V x) {
#if defined(ATTNREG_AVX512)
    asm("" : "+v"(x));
#elif defined(ATTNREG_AVX2)
    asm("" : "+x"(x));
#endif
    return x;
}

ATTNREG_INLINE vint splat(int32_t x) { return (vint){} + x; }
ATTNREG_INLINE vfloat zero() { return (vfloat){}; }
ATTNREG_INLINE vfloat select(vint mask, vfloat yes, vfloat no) { return mask ? yes : no; }

// 0, 1, 2, ... LANES - 1
ATTNREG_INLINE vint lane_index() {
    vint index;
    for (int i = 0; i < LANES; ++i) index[i] = i;
    return index;
}

#if defined(ATTNREG_AVX512)
ATTNREG_INLINE float reduce_add(vfloat v) { return _mm512_reduce_add_ps((__m512)v); }
ATTNREG_INLINE float reduce_max(vfloat v) { return _mm512_reduce_max_ps((__m512)v); }
#elif defined(ATTNREG_AVX2)
ATTNREG_INLINE float reduce_add(vfloat v) {
    __m128 x = _mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}
ATTNREG_INLINE float reduce_max(vfloat v) {
    __m128 x = _mm_max_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
    x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}
#else
ATTNREG_INLINE float reduce_add(vfloat v) {
    float sum = 0.0f;
    for (int i = 0; i < LANES; ++i) sum += v[i];
    return sum;
}
ATTNREG_INLINE float reduce_max(vfloat v) {
    float top = v[0];
    for (int i = 1; i < LANES; ++i) top = v[i] > top ? v[i] : top;
    return top;
}
#endif
ATTNREG_INLINE bool any(vint mask) {
#if defined(ATTNREG_AVX512)
    return _mm512_movepi32_mask((__m512i)mask) != 0;
#elif defined(ATTNREG_AVX2)
    return _mm256_movemask_ps((__m256)mask) != 0;
#else
    int32_t bits = 0;
    for (int i = 0; i < LANES; ++i) bits |= mask[i];
    return bits != 0;
#endif
}

// f(0), ... f(N - 1), each a call of its own: where every index into an array of registers is a constant from the start, GCC keeps the
// array in registers; loops that it unrolls later it may leave in memory.
template <int N, class F>
ATTNREG_INLINE void repeat(const F& f) {
#if defined(__SANITIZE_ADDRESS__)
    for (int i = 0; i < N; ++i) f(i);
#else
    if constexpr (N > 0) {
        repeat<N - 1>(f);
        f(N - 1);
    }
#endif
}

// Transposes the LANES x LANES block held in rows[]: log2(LANES) rounds of pairwise interleaving.
namespace detail {
template <int... I>
struct Sequence {};
template <int N, int... I>
struct MakeSequence : MakeSequence<N - 1, N - 1, I...> {};
template <int... I>
struct MakeSequence<0, I...> {
    typedef Sequence<I...> type;
};
// One interleave takes a0 b0 a1 b1 ... ; repeating it log2(LANES) times on rows i and i + LANES/2 transposes the block.
template <int... I>
ATTNREG_INLINE void interleave(vfloat a, vfloat b, vfloat& low, vfloat& high, Sequence<I...>) {
#if defined(__clang__)
    low = __builtin_shufflevector(a, b, (I / 2 + (I % 2) * LANES)...);
    high = __builtin_shufflevector(a, b, (LANES / 2 + I / 2 + (I % 2) * LANES)...);
#else
    low = __builtin_shuffle(a, b, vint{(I / 2 + (I % 2) * LANES)...});
    high = __builtin_shuffle(a, b, vint{(LANES / 2 + I / 2 + (I % 2) * LANES)...});
#endif
}
}  // namespace detail

#if defined(ATTNREG_AVX2)
// Inside the 128-bit halves first, as in sum_each: the generic rounds would cross them in each.
ATTNREG_INLINE void transpose(vfloat rows[LANES]) {
    __m256 quads[LANES];  // rows 4h ... 4h + 3 of columns c and c + 4 at [4 * h + c]
    repeat<2>([&](int h) ATTNREG_LAMBDA {
        const __m256 a = (__m256)rows[4 * h], b = (__m256)rows[4 * h + 1], c = (__m256)rows[4 * h + 2], d = (__m256)rows[4 * h + 3];
        const __m256 ab = _mm256_unpacklo_ps(a, b), ab2 = _mm256_unpackhi_ps(a, b);
        const __m256 cd = _mm256_unpacklo_ps(c, d), cd2 = _mm256_unpackhi_ps(c, d);
        quads[4 * h] = _mm256_shuffle_ps(ab, cd, 0x44), quads[4 * h + 1] = _mm256_shuffle_ps(ab, cd, 0xee);
        quads[4 * h + 2] = _mm256_shuffle_ps(ab2, cd2, 0x44), quads[4 * h + 3] = _mm256_shuffle_ps(ab2, cd2, 0xee);
    });
    repeat<4>([&](int c) ATTNREG_LAMBDA {
        rows[c] = (vfloat)_mm256_permute2f128_ps(quads[c], quads[4 + c], 0x20);
        rows[c + 4] = (vfloat)_mm256_permute2f128_ps(quads[c], quads[4 + c], 0x31);
    });
}
#else
ATTNREG_INLINE void transpose(vfloat rows[LANES]) {
    typedef typename detail::MakeSequence<LANES>::type Lanes;
    vfloat next[LANES];
#pragma GCC unroll 4
    for (int round = 1; round < LANES; round *= 2) {
#pragma GCC unroll 16
        for (int i = 0; i < LANES / 2; ++i) {
            detail::interleave(rows[i], rows[i + LANES / 2], next[2 * i], next[2 * i + 1], Lanes());
        }
#pragma GCC unroll 16
        for (int i = 0; i < LANES; ++i) rows[i] = next[i];
    }
}
#endif

}  // namespace attnreg
