/* What one core can do: fused multiply-adds on registers, and reads from memory. Compiled with -O3 -march=native. */
#include <stddef.h>

#if defined(__AVX512F__)
#define BYTES 64
#elif defined(__AVX__)
#define BYTES 32
#else
#define BYTES 16
#endif
typedef float lanes __attribute__((vector_size(BYTES)));
enum { LANES = BYTES / 4, CHAINS = 12 };

/* `rounds` times CHAINS independent multiply-adds; returns the number of floating-point operations. Named variables,
   not an array: gcc keeps an array of chains in memory. */
#define EACH(DO) DO(0) DO(1) DO(2) DO(3) DO(4) DO(5) DO(6) DO(7) DO(8) DO(9) DO(10) DO(11)
#define START(N) lanes sum##N = plus * (float)N;
#define STEP(N) sum##N = sum##N * by + plus;
#define ADD(N) total += sum##N;
double attnreg_fma(long rounds, float *sink) {
    lanes by, plus, total;
    for (int n = 0; n < LANES; n++) { by[n] = 0.999f; plus[n] = 1e-3f; total[n] = 0; }
    EACH(START)
    for (long r = 0; r < rounds; r++) { EACH(STEP) }
    EACH(ADD)
    for (int n = 0; n < LANES; n++) *sink += total[n];
    return 2.0 * (double)rounds * CHAINS * LANES;
}

/* Reads `count` floats once. */
float attnreg_read(const float *from, size_t count) {
    lanes sums[8];
    for (int c = 0; c < 8; c++) for (int n = 0; n < LANES; n++) sums[c][n] = 0;
    size_t step = 8 * LANES, n = 0;
    for (; n + step <= count; n += step)
#pragma GCC unroll 8
        for (int c = 0; c < 8; c++) sums[c] += *(const lanes *)(from + n + (size_t)c * LANES);
    float out = 0;
    for (int c = 0; c < 8; c++) for (int k = 0; k < LANES; k++) out += sums[c][k];
    return out;
}
