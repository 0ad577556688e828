// float32 values as sums of three bfloat16 parts, exactly: what lets AMX multiply them at float32's accuracy.
//
// Cutting off the lower half of a value leaves its first 8 bits; of the rest, the next 8, and then the last 8. Of the nine products of two
// values' parts the six greatest are summed; what is left out is below 2^-23 of the product. Parts below 2^-126 are
// taken as 0. Infinity has no rest, so whoever packs looks for values that are not finite.
#pragma once
#include "pack.h"

namespace attnreg {

// Neighbours of the summed dimension, `first` in the low halves, as three pairs.
ATTNREG_INLINE void split_pairs(vfloat first, vfloat second, vint (&parts)[3]) {
    const vint upper = splat(int32_t(0xffff0000));
#pragma GCC unroll 3
    for (int n = 0; n < 3; ++n) {
        const vint low = (vint)((vuint)first >> 16), high = (vint)second & upper;
        parts[n] = low | high;
        if (n == 2) break;
        first -= (vfloat)((vint)first & upper);
        second -= (vfloat)high;
    }
}

namespace detail {
template <int... I>
ATTNREG_INLINE void deinterleave(vfloat a, vfloat b, vfloat& even, vfloat& odd, Sequence<I...>) {
#if defined(__clang__)
    even = __builtin_shufflevector(a, b, (2 * I)...);
    odd = __builtin_shufflevector(a, b, (2 * I + 1)...);
#else
    even = __builtin_shuffle(a, b, vint{(2 * I)...});
    odd = __builtin_shuffle(a, b, vint{(2 * I + 1)...});
#endif
}
}  // namespace detail

// Writes 2 * LANES neighbours as LANES pairs to out, out + stride and out + 2 * stride.
ATTNREG_INLINE void store_parts(vfloat a, vfloat b, int64_t stride, Pair* out) {
    vfloat even, odd;
    detail::deinterleave(a, b, even, odd, typename detail::MakeSequence<LANES>::type());
    vint parts[3];
    split_pairs(even, odd, parts);
    for (int n = 0; n < 3; ++n) std::memcpy(out + n * stride, &parts[n], sizeof(vint));
}

// Bits that are all set in some lane if one of the values so far is infinite or NaN.
class Finiteness {
  public:
    ATTNREG_INLINE void see(vfloat x) {
        const vint exponent = splat(int32_t(0x7f800000));
        unfit_ |= ((vint)x & exponent) == exponent;
    }
    bool all() const { return !any(unfit_); }

  private:
    vint unfit_{};
};

// query[block][part][pair][lane] of rows given by pointers; `channels` has memory for 2 * OPERANDS x lanes values.
template <int CHANNELS, int OPERANDS>
bool split_lanes(const float* const* rows, int64_t count, int64_t lanes, float* channels, BlockParts* out) {
    constexpr int BLOCK = BlockParts::BLOCK;
    Finiteness seen;
    pack_lanes<CHANNELS>(rows, count, lanes, reinterpret_cast<Single*>(channels));
    std::fill(channels + CHANNELS * lanes, channels + 2 * OPERANDS * lanes, 0.0f);
    for (int64_t d = 0; d < OPERANDS; ++d) {
        for (int64_t lane = 0; lane < lanes; lane += LANES) {
            const vfloat first = load(channels + 2 * d * lanes + lane), second = load(channels + (2 * d + 1) * lanes + lane);
            seen.see(first), seen.see(second);
            vint parts[3];
            split_pairs(first, second, parts);
            BlockParts* to = out + (d / BLOCK * 3 * BLOCK + d % BLOCK) * lanes + lane;
            for (int n = 0; n < 3; ++n) std::memcpy(to + n * BLOCK * lanes, &parts[n], sizeof(vint));
        }
    }
    return seen.all();
}

// keys[j][part][pair], with rows up to `padded` as in pack_keys.
template <int CHANNELS, int OPERANDS, class RowAt>
bool split_keys(RowAt row_at, int64_t count, int64_t padded, BlockParts* out) {
    Finiteness seen;
    for (int64_t j = 0; j < padded; ++j) {
        const float* row = row_at(std::min(j, count - 1));
        for (int64_t d = 0; d < 2 * OPERANDS; d += 2 * LANES) {
            const vfloat a = d < CHANNELS ? load_operands(Single(), row, d, CHANNELS - d) : zero();
            const vfloat b = d + LANES < CHANNELS ? load_operands(Single(), row, d + LANES, CHANNELS - d - LANES) : zero();
            seen.see(a), seen.see(b);
            store_parts(a, b, OPERANDS, out + 3 * j * OPERANDS + d / 2);
        }
    }
    return seen.all();
}

// values[channel][part][pair of keys], zeros as in pack_columns; `stride` counts pairs of one part.
template <int CHANNELS, class RowAt>
bool split_columns(RowAt row_at, int64_t count, int64_t stride, BlockParts* out) {
    Finiteness seen;
    for (int64_t j = 0; j < 2 * stride; j += 2 * LANES) {
        for (int64_t d = 0; d < CHANNELS; d += LANES) {
            vfloat halves[2][LANES];
            for (int h = 0; h < 2; ++h) {
                for (int i = 0; i < LANES; ++i) {
                    const int64_t key = j + h * LANES + i;
                    halves[h][i] = key < count ? load_operands(Single(), row_at(key), d, CHANNELS - d) : zero();
                    seen.see(halves[h][i]);
                }
                transpose(halves[h]);
            }
            for (int i = 0; i < LANES; ++i) store_parts(halves[0][i], halves[1][i], stride, out + 3 * (d + i) * stride + j / 2);
        }
    }
    return seen.all();
}

}  // namespace attnreg
