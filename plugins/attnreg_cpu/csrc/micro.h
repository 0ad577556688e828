// Register-blocked products on one tile of query rows, which lie across the vector lanes.
//
// A tile holds NV * LANES query rows. Everything that belongs to a row (its score for one key, its maximum, one channel of its output) is a
// lane, so maxima, sums and masks need no reduction across lanes, and keys and values are read as broadcast scalars straight from
// their row-major memory. All three products of attention and of its gradient then have the form
//
//     c[i][lane] (+)= sum_k A(i, k) * b[k][lane]
//
// with MR values of i and NV vectors of lanes held in registers.
#pragma once
#include "vec.h"

namespace attnreg {

// Rows of the left operand that fill the register file beside NV vectors of b and one broadcast.
constexpr int micro_rows(int vectors) {
    const int fit = (VECTOR_REGISTERS - 1 - vectors) / vectors;
    return fit >= 16 ? 16 : fit >= 12 && vectors == 1 ? 12 : fit >= 8 ? 8 : fit >= 6 ? 6 : fit >= 4 ? 4 : fit >= 2 ? 2 : 1;
}

// acc[i][v] += sum over k < depth of A(i, k) * b[k * NV * LANES + v * LANES ...];
// A(i, k) is a[i * lda + k] where K_CONTIGUOUS, else a[k * lda + i].
template <int MR, int NV, bool K_CONTIGUOUS>
ATTNREG_INLINE void multiply(vfloat (&acc)[MR][NV], int64_t depth, const float* a, int64_t lda, const float* b) {
    for (int64_t k = 0; k < depth; ++k) {
        vfloat column[NV];
#pragma GCC unroll 8
        for (int v = 0; v < NV; ++v) column[v] = load(b + (k * NV + v) * LANES);
#pragma GCC unroll 16
        for (int i = 0; i < MR; ++i) {
            const vfloat scalar = splat(K_CONTIGUOUS ? a[i * lda + k] : a[k * lda + i]);
#pragma GCC unroll 8
            for (int v = 0; v < NV; ++v) acc[i][v] = fma(scalar, column[v], acc[i][v]);
        }
    }
}

}  // namespace attnreg
