// The two products of decoding: dot products of query rows with keys, and weighted sums of values.
//
// Keys and values come as one pointer a row, so that strided tensors and pages look alike, and are read in their own type, along the
// head dimension. Rows that fill the lanes are multiplied in decode_lanes.h.
#pragma once
#include <algorithm>
#include <type_traits>

#include "decode_nan.h"
#include "decode_types.h"

namespace attnreg {

// Lane i of the result is the sum of v[i]'s lanes: each round halves the vectors by interleaving two and adding the halves.
#if defined(ATTNREG_AVX2)
// Interleaving inside the 128-bit halves costs half of what it does across them; only the last round crosses.
ATTNREG_INLINE vfloat sum_each(vfloat v[LANES]) {
    __m256 four[2];
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
        const __m256 a = (__m256)v[4 * i], b = (__m256)v[4 * i + 1], c = (__m256)v[4 * i + 2], d = (__m256)v[4 * i + 3];
        const __m256 ab = _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
        const __m256 cd = _mm256_add_ps(_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
        four[i] = _mm256_add_ps(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xee));
    }
    return (vfloat)_mm256_add_ps(_mm256_permute2f128_ps(four[0], four[1], 0x20), _mm256_permute2f128_ps(four[0], four[1], 0x31));
}
#else
ATTNREG_INLINE vfloat sum_each(vfloat v[LANES]) {
    typedef typename detail::MakeSequence<LANES>::type Lanes;
#pragma GCC unroll 4
    for (int half = LANES / 2; half > 0; half /= 2) {
#pragma GCC unroll 8
        for (int i = 0; i < half; ++i) {
            vfloat low, high;
            detail::interleave(v[i], v[i + half], low, high, Lanes());
            v[i] = low + high;
        }
    }
    return v[0];
}
#endif

// What to ask memory for while rows are read: with each, the row at its place in `rows` (null: nothing is asked for).
template <class T>
struct Ahead {
    const T* const* rows = nullptr;

    // Zen 5 does best when asked not to keep what comes; Zen 3 then drops lines before they are read (measured: 18.7 against 21.2 GB/s,
    // bfloat16, 4 rows a KV head), and Emerald Rapids all the more (10.8 against 41.6, float32, one row).
#if defined(ATTNREG_AVX512) && defined(ATTNREG_ZEN)
    static constexpr int KEEP = 0;
#elif defined(ATTNREG_AVX512)
    static constexpr int KEEP = 3;
#else
    static constexpr int KEEP = 2;
#endif
    explicit operator bool() const { return rows != nullptr; }
    Ahead from(int64_t row) const { return {rows ? rows + row : nullptr}; }
    // Bytes at .. at + bytes of the row that stands beside row `row`.
    ATTNREG_INLINE void ask(int64_t row, int64_t at, int64_t bytes) const {
        for (int64_t end = at + bytes; at < end; at += 64) __builtin_prefetch(reinterpret_cast<const char*>(rows[row]) + at, 0, KEEP);
    }
};

// Bytes of keys or values that all rows and columns take before the next ones come: they stay in the first cache meanwhile.
constexpr int64_t STRIP = 16384;
template <class T>
int64_t strip_rows(int64_t dim) {
    return std::max<int64_t>(STRIP / (dim * int64_t(sizeof(T))) / LANES, 1) * LANES;
}

// Sums of ROWS rows with STEP keys. Few of them would wait for one another's multiply-adds, so they are kept in two halves.
template <int ROWS, int STEP>
struct DotSums {
    static constexpr int CHAINS = ROWS * STEP <= 4 ? 2 : 1;
    static constexpr bool LEAVES_ROOM = VECTOR_REGISTERS > 16 || ROWS * STEP <= 8;
    vfloat at[CHAINS][ROWS][STEP];

    ATTNREG_INLINE DotSums() {
        repeat<CHAINS * ROWS * STEP>([&](int i) ATTNREG_LAMBDA { at[i / (ROWS * STEP)][i / STEP % ROWS][i % STEP] = zero(); });
    }

    // Adds q[r] * key[k] over N registers of the head dimension; load_keys(k, d, y) gives those of a key from `d` on, two at a time
    // where registers allow.
    template <int N, class Load>
    ATTNREG_INLINE void add(const float* q, int64_t q_stride, int64_t d, const Load& load_keys) {
        constexpr int T = N >= 2 && LEAVES_ROOM ? 2 : 1;
        repeat<N / T>([&](int n) ATTNREG_LAMBDA { add_few<T>(q, q_stride, d + n * T * LANES, load_keys); });
    }

    // What is used more often stays in registers: the queries where rows are few, else the keys.
    template <int T, class Load>
    ATTNREG_INLINE void add_few(const float* q, int64_t q_stride, int64_t d, const Load& load_keys) {
        if constexpr ((ROWS * T <= 4 && ROWS <= STEP) || VECTOR_REGISTERS > 16) {
            vfloat x[T][ROWS];
            repeat<T * ROWS>([&](int i) ATTNREG_LAMBDA {
                x[i / ROWS][i % ROWS] = in_register(load(q + i % ROWS * q_stride + d + i / ROWS * LANES));
            });
            repeat<STEP>([&](int k) ATTNREG_LAMBDA {
                vfloat y[T];
                load_keys(k, d, y);
                repeat<T>([&](int t) ATTNREG_LAMBDA {
                    if (ROWS > 1) y[t] = in_register(y[t]);
                    repeat<ROWS>([&](int r) ATTNREG_LAMBDA { at[t % CHAINS][r][k] = fma(x[t][r], y[t], at[t % CHAINS][r][k]); });
                });
            });
        } else {
            vfloat y[STEP][T];
            repeat<STEP>([&](int k) ATTNREG_LAMBDA {
                load_keys(k, d, y[k]);
                repeat<T>([&](int t) ATTNREG_LAMBDA { y[k][t] = in_register(y[k][t]); });
            });
            repeat<T * ROWS>([&](int i) ATTNREG_LAMBDA {
                const int t = i / ROWS, r = i % ROWS;
                const vfloat x = in_register(load(q + r * q_stride + d + t * LANES));
                repeat<STEP>([&](int k) ATTNREG_LAMBDA { at[t % CHAINS][r][k] = fma(x, y[k][t], at[t % CHAINS][r][k]); });
            });
        }
    }

    ATTNREG_INLINE vfloat total(int r, int k) const { return CHAINS == 2 ? at[0][r][k] + at[CHAINS - 1][r][k] : at[0][r][k]; }
};

// Adds q[r] . keys[first + k] to sums[r * KEYS + first + k], lane by lane, for ROWS rows and STEP keys. Asks for the rows `ahead`.
template <class T, int ROWS, int KEYS, int STEP>
ATTNREG_INLINE void dot_step(const float* q, int64_t q_stride, const T* const* keys, int first, int64_t dim, Ahead<T> ahead, vfloat* sums) {
    constexpr int LINE = 64 / int(sizeof(T)) / LANES > 2 ? 64 / int(sizeof(T)) / LANES : 2;  // registers of a cache line
    DotSums<ROWS, STEP> sum;
    const T* key[STEP];
    for (int k = 0; k < STEP; ++k) key[k] = keys[first + k];
    const auto load_keys = [&](int k, int64_t d, auto& y) ATTNREG_LAMBDA {
        load_registers<!DotSums<ROWS, STEP>::LEAVES_ROOM>(key[k] + d, y);
    };
    int64_t d = 0;
    const auto line = [&](auto asks) ATTNREG_LAMBDA {
        for (; d + LINE * LANES <= dim; d += LINE * LANES) {
            if constexpr (decltype(asks)::value) {
#pragma GCC unroll 4
                for (int k = 0; k < STEP; ++k) ahead.ask(first + k, d * int64_t(sizeof(T)), LINE * LANES * int64_t(sizeof(T)));
            }
            sum.template add<LINE>(q, q_stride, d, load_keys);
        }
    };
    if (ahead) {
        line(std::true_type());
    } else {
        line(std::false_type());
    }
    for (; d + LANES <= dim; d += LANES) sum.template add<1>(q, q_stride, d, load_keys);
    if (d < dim) {
        sum.template add<1>(q, q_stride, d, [&](int k, int64_t at, vfloat(&y)[1]) ATTNREG_LAMBDA {
            y[0] = load_part(key[k] + at, dim - at);
        });
    }
    repeat<ROWS * STEP>([&](int i) ATTNREG_LAMBDA { sums[i / STEP * KEYS + first + i % STEP] = sum.total(i / STEP, i % STEP); });
}

// Keys that `ROWS` rows take with one set of sums across lanes.
template <int ROWS>
constexpr int KEYS_AT_ONCE = ROWS == 3 || (ROWS == 4 && LANES == 8) ? LANES : LANES / ROWS;

// scores[r * stride + k] = q[r] . keys[k] for ROWS rows and KEYS_AT_ONCE keys. Asks for the rows `ahead`.
template <class T, int ROWS>
ATTNREG_INLINE void dot_keys(const float* q, int64_t q_stride, const T* const* keys, int64_t dim, Ahead<T> ahead, float* scores,
                             int64_t stride) {
    constexpr int KEYS = KEYS_AT_ONCE<ROWS>;
    vfloat sums[ROWS * KEYS];
    if constexpr (KEYS == LANES && ROWS > 2) {
        // Twelve sums leave 16 registers room for what they share; eight would wait for their multiply-adds.
        constexpr int STEP = 12 / ROWS, REST = KEYS % STEP;
#pragma GCC unroll 4
        for (int first = 0; first + STEP <= KEYS; first += STEP) dot_step<T, ROWS, KEYS, STEP>(q, q_stride, keys, first, dim, ahead, sums);
        if constexpr (REST != 0) dot_step<T, ROWS, KEYS, REST>(q, q_stride, keys, KEYS - REST, dim, ahead, sums);
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r) store(scores + r * stride, sum_each(sums + r * KEYS));
    } else {
        constexpr int STEP = KEYS < 4 ? KEYS : 4;
#pragma GCC unroll 4
        for (int first = 0; first < KEYS; first += STEP) dot_step<T, ROWS, KEYS, STEP>(q, q_stride, keys, first, dim, ahead, sums);
        float lanes[LANES];
        store(lanes, sum_each(sums));
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r) std::memcpy(scores + r * stride, lanes + r * KEYS, KEYS * sizeof(float));
    }
}

template <class T, int ROWS>
ATTNREG_ALONE void dot_rows(const float* q, int64_t q_stride, const T* const* keys, int64_t count, int64_t dim, Ahead<T> ahead,
                            float* scores, int64_t stride) {
    for (int64_t k = 0; k < count; k += KEYS_AT_ONCE<ROWS>) {
        dot_keys<T, ROWS>(q, q_stride, keys + k, dim, ahead.from(k), scores + k, stride);
    }
}

// Scores of `rows` rows; `keys` is readable up to the next multiple of LANES.
template <class T>
void dot_tile(const float* q, int64_t q_stride, int64_t rows, const T* const* keys, int64_t count, int64_t dim, Ahead<T> asked,
              float* scores, int64_t stride) {
    const int64_t strip = strip_rows<T>(dim);
    for (int64_t k = 0; k < count; k += strip, keys += strip, scores += strip) {
        const int64_t part = std::min(strip, count - k);
        Ahead<T> ahead = asked.from(k);
        int64_t r = 0;
        const auto take = [&](auto block) {
            constexpr int ROWS = decltype(block)::value;
            dot_rows<T, ROWS>(q + r * q_stride, q_stride, keys, part, dim, ahead, scores + r * stride, stride);
            r += ROWS, ahead = {};
        };
        while (r + 4 <= rows) take(std::integral_constant<int, 4>());
        if (r + 3 <= rows) take(std::integral_constant<int, 3>());
        if (r + 2 <= rows) take(std::integral_constant<int, 2>());
        if (r < rows) take(std::integral_constant<int, 1>());
        lose_keys(keys, part, dim, scores, rows, stride);
    }
}

// N registers of a row of values, or the first `part` elements of one.
template <bool FULL, class T, int N>
ATTNREG_INLINE void load_columns(const T* value, int64_t part, vfloat (&y)[N]) {
    if (part == 0) {
        load_registers<FULL>(value, y);
    } else {
        y[0] = load_part(value, part);
    }
}

// out[r] = out[r] * rescale[r] + sum over k of weights[r * stride + k] * values[k], columns `column` to `column` + COLS * LANES.
template <class T, int ROWS, int COLS>
ATTNREG_INLINE void add_values(const float* weights, int64_t stride, const float* rescale, const T* const* values, int64_t count,
                               int64_t column, int64_t part, Ahead<T> ahead, float* out, int64_t out_stride) {
    vfloat sum[ROWS][COLS];
    repeat<ROWS * COLS>([&](int i) ATTNREG_LAMBDA {
        const int r = i / COLS, c = i % COLS;
        sum[r][c] = load(out + r * out_stride + column + c * LANES) * splat(rescale[r]);
    });
    for (int64_t k = 0; k < count; ++k) {
        const T* value = values[k] + column;
        // Each run over the columns asks for its own, so that none computes while memory rests.
        if (ahead) ahead.ask(k, column * int64_t(sizeof(T)), COLS * LANES * int64_t(sizeof(T)));
        // Of weights and values the fewer stay in registers beside the sums.
        if constexpr (ROWS > COLS) {
            vfloat y[COLS];
            load_columns<true>(value, part, y);
            repeat<COLS>([&](int c) ATTNREG_LAMBDA { y[c] = in_register(y[c]); });
            repeat<ROWS>([&](int r) ATTNREG_LAMBDA {
                const vfloat weight = in_register(splat(weights[r * stride + k]));
                repeat<COLS>([&](int c) ATTNREG_LAMBDA { sum[r][c] = fma(weight, y[c], sum[r][c]); });
            });
        } else {
            vfloat weight[ROWS];
            repeat<ROWS>([&](int r) ATTNREG_LAMBDA { weight[r] = splat(weights[r * stride + k]); });
            constexpr int N = COLS % TOGETHER<T> == 0 ? TOGETHER<T> : 1;
            repeat<COLS / N>([&](int block) ATTNREG_LAMBDA {
                const int c = block * N;
                vfloat y[N];
                load_columns<(ROWS > 2 && VECTOR_REGISTERS <= 16)>(value + c * LANES, part, y);
                repeat<N>([&](int n) ATTNREG_LAMBDA {
                    if (ROWS > 1) y[n] = in_register(y[n]);
                    repeat<ROWS>([&](int r) ATTNREG_LAMBDA { sum[r][c + n] = fma(weight[r], y[n], sum[r][c + n]); });
                });
            });
        }
    }
    repeat<ROWS * COLS>([&](int i) ATTNREG_LAMBDA {
        const int r = i / COLS, c = i % COLS;
        store(out + r * out_stride + column + c * LANES, sum[r][c]);
    });
}

template <class T, int ROWS, int COLS>
void add_columns(const float* weights, int64_t stride, const float* rescale, const T* const* values, int64_t count, int64_t column,
                 int64_t dim, Ahead<T> ahead, float* out, int64_t out_stride) {
    for (; column + COLS * LANES <= dim; column += COLS * LANES) {
        add_values<T, ROWS, COLS>(weights, stride, rescale, values, count, column, 0, ahead, out, out_stride);
    }
    if constexpr (COLS > 1) {
        constexpr int FEWER = COLS > 4 ? COLS / 2 : COLS - 1;
        add_columns<T, ROWS, FEWER>(weights, stride, rescale, values, count, column, dim, ahead, out, out_stride);
    } else if (column < dim) {
        add_values<T, ROWS, 1>(weights, stride, rescale, values, count, column, dim - column, ahead, out, out_stride);
    }
}

// `rescale` is used up: it holds ones afterwards.
template <class T>
void add_tile(const float* weights, int64_t stride, int64_t rows, float* rescale, const T* const* values, int64_t count, int64_t dim,
              Ahead<T> asked, float* out, int64_t out_stride) {
    constexpr int SUMS = VECTOR_REGISTERS > 16 ? 16 : 12;
    const int64_t strip = strip_rows<T>(dim);
    for (int64_t k = 0; k < count; k += strip, values += strip, weights += strip) {
        const int64_t part = std::min(strip, count - k);
        Ahead<T> ahead = asked.from(k);
        int64_t r = 0;
        const auto add = [&](auto block) {
            constexpr int ROWS = decltype(block)::value, COLS = SUMS / ROWS < 7 ? SUMS / ROWS : 8;
            add_columns<T, ROWS, COLS>(weights + r * stride, stride, rescale + r, values, part, 0, dim, ahead, out + r * out_stride,
                                       out_stride);
            r += ROWS, ahead = {};
        };
        while (r + 4 <= rows) add(std::integral_constant<int, 4>());
        if (r + 3 <= rows) add(std::integral_constant<int, 3>());
        if (r + 2 <= rows) add(std::integral_constant<int, 2>());
        if (r < rows) add(std::integral_constant<int, 1>());
        lose_channels(values, part, dim, out, rows, out_stride);
        std::fill(rescale, rescale + rows, 1.0f);
    }
}

}  // namespace attnreg
