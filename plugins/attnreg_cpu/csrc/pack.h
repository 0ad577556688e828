// Moving rows into the layouts that the products read: query rows into lanes, key and value rows into dense 32-bit operands.
#pragma once
#include <algorithm>

#include "operand.h"

namespace attnreg {

// Loads LANES operands of a row from channel `at`; `left` of them exist, the rest are 0.
template <class T>
ATTNREG_INLINE vfloat load_operands(Single, const T* row, int64_t at, int64_t left) {
    if (left >= LANES) return load_wide(row + at);
    vfloat value = zero();
    for (int64_t i = 0; i < left; ++i) value[i] = widen(row[at + i]);
    return value;
}
// The same for pairs of channels, as raw bits; `left` counts channels.
ATTNREG_INLINE vfloat load_operands(Pair, const bfloat_t* row, int64_t at, int64_t left) {
    if (left >= 2 * LANES) return load_as<vfloat>(row + at);
    bfloat_t padded[2 * LANES] = {};
    std::memcpy(padded, row + at, size_t(left) * sizeof(bfloat_t));
    return load_as<vfloat>(padded);
}

// query[d][lane] for `count` rows given by pointers; lanes past `count` are 0. DEPTH counts operands, CHANNELS values.
template <int CHANNELS, class Operand, class T>
void pack_lanes(const T* const* rows, int64_t count, int64_t lanes, Operand* out) {
    constexpr int DEPTH = (CHANNELS + Operand::WIDTH - 1) / Operand::WIDTH;
    for (int64_t lane = 0; lane < lanes; lane += LANES) {
        for (int64_t d = 0; d < DEPTH; d += LANES) {
            vfloat block[LANES];
            const int64_t at = d * Operand::WIDTH;
            for (int i = 0; i < LANES; ++i) {
                block[i] = lane + i < count ? load_operands(Operand(), rows[lane + i], at, CHANNELS - at) : zero();
            }
            transpose(block);
            const int64_t end = std::min<int64_t>(LANES, DEPTH - d);
            for (int64_t i = 0; i < end; ++i) std::memcpy(out + (d + i) * lanes + lane, &block[i], sizeof(vfloat));
        }
    }
}

// Rows as they are, widened: out[lane][d], lanes past `count` and channels past CHANNELS are 0.
template <int CHANNELS, int PADDED, class T>
void pack_rows(const T* const* rows, int64_t count, int64_t lanes, Single* out) {
    for (int64_t lane = 0; lane < lanes; ++lane) {
        for (int64_t d = 0; d < PADDED; d += LANES) {
            const vfloat wide = lane < count ? load_operands(Single(), rows[lane], d, CHANNELS - d) : zero();
            std::memcpy(out + lane * PADDED + d, &wide, sizeof(wide));
        }
    }
}

// Values d ... d + LANES - 1 of two rows as pairs; null rows and channels past the end are 0.
template <int CHANNELS>
ATTNREG_INLINE vuint pair_rows(const bfloat_t* first, const bfloat_t* second, int64_t d) {
    const auto part = [d](const bfloat_t* row) {
        vhalf half = {};
        if (row == nullptr) return half;
        // The size of a whole vector is a constant, and its copy one load.
        if (d + LANES <= CHANNELS) return load_as<vhalf>(row + d);
        std::memcpy(&half, row + d, size_t(CHANNELS - d) * sizeof(bfloat_t));
        return half;
    };
    return __builtin_convertvector(part(first), vuint) | (__builtin_convertvector(part(second), vuint) << 16);
}
// The same as pairs of lanes: out[lane / 2][d].
template <int CHANNELS, int PADDED>
void pack_rows(const bfloat_t* const* rows, int64_t count, int64_t lanes, Pair* out) {
    for (int64_t lane = 0; lane < lanes; lane += 2) {
        for (int64_t d = 0; d < PADDED; d += LANES) {
            const vuint both = pair_rows<CHANNELS>(lane < count ? rows[lane] : nullptr, lane + 1 < count ? rows[lane + 1] : nullptr, d);
            std::memcpy(out + lane / 2 * PADDED + d, &both, sizeof(both));
        }
    }
}

// Copies lanes back to rows: rows[lane][d] = factor[lane] * source[d][lane].
template <int CHANNELS, class T>
void unpack_lanes(const float* source, const float* factor, int64_t count, int64_t lanes, T* const* rows) {
    for (int64_t lane = 0; lane < count; lane += LANES) {
        const vfloat scale = load(factor + lane);
        const int64_t rows_here = std::min<int64_t>(LANES, count - lane);
        for (int64_t d = 0; d < CHANNELS; d += LANES) {
            const int64_t channels = std::min<int64_t>(LANES, CHANNELS - d);
            vfloat block[LANES];
            for (int i = 0; i < LANES; ++i) block[i] = i < channels ? scale * load(source + (d + i) * lanes + lane) : zero();
            transpose(block);
            for (int64_t i = 0; i < rows_here; ++i) {
                if (channels == LANES) {
                    store_narrow(rows[lane + i] + d, block[i]);
                } else {
                    for (int64_t c = 0; c < channels; ++c) narrow(rows[lane + i] + d + c, block[i][c]);
                }
            }
        }
    }
}

// Key rows as operands along the channels: out[j][d]. Rows up to `padded` repeat the last one, so that a maximum over them is unchanged.
template <int CHANNELS, class Operand, class T, class RowAt>
void pack_keys(RowAt row_at, int64_t count, int64_t padded, Operand* out) {
    constexpr int64_t DEPTH = (CHANNELS + Operand::WIDTH - 1) / Operand::WIDTH;
    for (int64_t j = 0; j < padded; ++j) {
        const T* row = row_at(std::min(j, count - 1));
        Operand* to = out + j * DEPTH;
        int64_t d = 0;
        for (; d + LANES <= DEPTH; d += LANES) {
            const vfloat wide = load_operands(Operand(), row, d * Operand::WIDTH, CHANNELS - d * Operand::WIDTH);
            std::memcpy(to + d, &wide, sizeof(wide));
        }
        if (d < DEPTH) {
            const vfloat wide = load_operands(Operand(), row, d * Operand::WIDTH, CHANNELS - d * Operand::WIDTH);
            std::memcpy(to + d, &wide, size_t(DEPTH - d) * sizeof(Operand));
        }
    }
}

// Value rows as operands along the keys: out[j][d].
template <int CHANNELS, class T, class RowAt>
void pack_values(RowAt row_at, int64_t count, Single* out) {
    pack_keys<CHANNELS, Single, T>(row_at, count, count, out);
}
// out[j / 2][d] holds rows j and j + 1; an odd last row is paired with zeros.
template <int CHANNELS, class T, class RowAt>
void pack_values(RowAt row_at, int64_t count, Pair* out) {
    for (int64_t j = 0; j < count; j += 2) {
        const bfloat_t* first = row_at(j);
        const bfloat_t* second = j + 1 < count ? row_at(j + 1) : nullptr;
        Pair* to = out + j / 2 * CHANNELS;
        for (int64_t d = 0; d < CHANNELS; d += LANES) {
            const vuint both = pair_rows<CHANNELS>(first, second, d);
            if (d + LANES <= CHANNELS) {
                std::memcpy(to + d, &both, sizeof(both));
            } else {
                std::memcpy(to + d, &both, size_t(CHANNELS - d) * sizeof(Pair));
            }
        }
    }
}

ATTNREG_INLINE vfloat load_wide(const uint8_t* p) { return __builtin_convertvector(load_as<vbyte>(p), vfloat); }
ATTNREG_INLINE float widen(uint8_t x) { return float(x); }

// out[j][lane] = rows[lane][(first + j) * stride] for `count` keys: bias and dense masks, turned to lanes. A null row reads as 0.
template <class T>
void gather_lanes(const T* const* rows, int64_t lanes, int64_t first, int64_t count, int64_t stride, float* out) {
    for (int64_t lane = 0; lane < lanes; lane += LANES) {
        int64_t j = 0;
        for (; stride == 1 && j + LANES <= count; j += LANES) {
            vfloat block[LANES];
            for (int i = 0; i < LANES; ++i) block[i] = rows[lane + i] ? load_wide(rows[lane + i] + first + j) : zero();
            transpose(block);
            for (int i = 0; i < LANES; ++i) store(out + (j + i) * lanes + lane, block[i]);
        }
        for (; j < count; ++j) {
            for (int i = 0; i < LANES; ++i) {
                out[j * lanes + lane + i] = rows[lane + i] ? widen(rows[lane + i][(first + j) * stride]) : 0.0f;
            }
        }
    }
}

}  // namespace attnreg
