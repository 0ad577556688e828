// Moving rows into the layouts that the products read: query rows into lanes, key and value rows into dense 32-bit operands.
#pragma once
#include <algorithm>

#include "micro.h"

namespace attnreg {

// As many operands as fill the registers that hold `count`: the length of packed rows.
constexpr int whole_registers(int count) { return (count + LANES - 1) / LANES * LANES; }

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

// query[d][lane] for `count` rows given by pointers; lanes past `count` are 0. CHANNELS counts values, d operands.
template <int CHANNELS, class Operand, class T>
void pack_lanes(const T* const* rows, int64_t count, int64_t lanes, Operand* out) {
    constexpr int WHOLE = CHANNELS / (LANES * Operand::WIDTH) * LANES, REST = (CHANNELS + Operand::WIDTH - 1) / Operand::WIDTH - WHOLE;
    static const T none[CHANNELS] = {};
    for (int64_t lane = 0; lane < lanes; lane += LANES) {
        const T* row[LANES];
        for (int i = 0; i < LANES; ++i) row[i] = lane + i < count ? rows[lane + i] : none;
        // `left` and `kept` are constants, or GCC would keep both ways of loading a row, and the block in memory.
        const auto turn = [&](int64_t d, int64_t left, auto kept) ATTNREG_LAMBDA {
            vfloat block[LANES];
            repeat<LANES>([&](int i) ATTNREG_LAMBDA { block[i] = load_operands(Operand(), row[i], d * Operand::WIDTH, left); });
            transpose(block);
            repeat<decltype(kept)::value>([&](int i) ATTNREG_LAMBDA {
                std::memcpy(out + (d + i) * lanes + lane, &block[i], sizeof(vfloat));
            });
        };
        for (int64_t d = 0; d < WHOLE; d += LANES) turn(d, LANES * Operand::WIDTH, std::integral_constant<int, LANES>());
        if constexpr (REST != 0) turn(WHOLE, CHANNELS - WHOLE * Operand::WIDTH, std::integral_constant<int, REST>());
    }
}

// The same, with zeros up to OPERANDS.
template <int CHANNELS, int OPERANDS, class Operand, class T>
void pack_operands(const T* const* rows, int64_t count, int64_t lanes, Operand* out) {
    constexpr int HELD = (CHANNELS + Operand::WIDTH - 1) / Operand::WIDTH;
    pack_lanes<CHANNELS>(rows, count, lanes, out);
    if constexpr (OPERANDS > HELD) std::fill(out + HELD * lanes, out + OPERANDS * lanes, Operand{});
}

// Rows as they are, widened: out[lane][d], lanes past `count` and channels past CHANNELS are 0.
template <int CHANNELS, class T>
void pack_rows(const T* const* rows, int64_t count, int64_t lanes, Single* out) {
    constexpr int PADDED = whole_registers(CHANNELS);
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
template <int CHANNELS>
void pack_rows(const bfloat_t* const* rows, int64_t count, int64_t lanes, Pair* out) {
    constexpr int PADDED = whole_registers(CHANNELS);
    for (int64_t lane = 0; lane < lanes; lane += 2) {
        for (int64_t d = 0; d < PADDED; d += LANES) {
            const vuint both = pair_rows<CHANNELS>(lane < count ? rows[lane] : nullptr, lane + 1 < count ? rows[lane + 1] : nullptr, d);
            std::memcpy(out + lane / 2 * PADDED + d, &both, sizeof(both));
        }
    }
}

// Sums of rows in lanes as rows: out[lane * out_stride + c] for `rows` lanes; columns up to the next multiple of LANES are written.
inline void sums_to_rows(const float* sums, int64_t stride, int64_t rows, int64_t dim, float* out, int64_t out_stride) {
    for (int64_t r = 0; r < rows; r += LANES) {
        for (int64_t c = 0; c < dim; c += LANES) {
            vfloat block[LANES];
            for (int i = 0; i < LANES; ++i) block[i] = c + i < dim ? load(sums + (c + i) * stride + r) : zero();
            transpose(block);
            for (int i = 0; i < LANES; ++i) store(out + (r + i) * out_stride + c, block[i]);
        }
    }
}

// out[d] = factor * source[d] for CHANNELS values.
template <int CHANNELS, class T>
ATTNREG_INLINE void narrow_row(const float* source, float factor, T* out) {
    constexpr int REST = CHANNELS % LANES, WHOLE = CHANNELS - REST;
    for (int64_t d = 0; d < WHOLE; d += LANES) store_narrow(out + d, splat(factor) * load(source + d));
    for (int64_t d = WHOLE; d < CHANNELS; ++d) narrow(out + d, factor * source[d]);
}

// Key rows as operands along the channels: out[j][d], zeros behind the last channel. Rows up to `padded` repeat the last one, so
// that a maximum over them is unchanged.
template <int CHANNELS, class Operand, class T, class RowAt>
void pack_keys(RowAt row_at, int64_t count, int64_t padded, Operand* out) {
    constexpr int64_t DEPTH = whole_registers((CHANNELS + Operand::WIDTH - 1) / Operand::WIDTH);
    for (int64_t j = 0; j < padded; ++j) {
        const T* row = row_at(std::min(j, count - 1));
        for (int64_t d = 0; d < DEPTH; d += LANES) {
            const vfloat wide = load_operands(Operand(), row, d * Operand::WIDTH, CHANNELS - d * Operand::WIDTH);
            std::memcpy(out + j * DEPTH + d, &wide, sizeof(wide));
        }
    }
}

// Value rows as operands along the keys, in panels that lie `panel` operands apart: out[panel][j][channel]. Zeros behind the last channel.
template <int CHANNELS, class T, class RowAt>
void pack_values(RowAt row_at, int64_t count, int64_t panel, Single* out) {
    for (int64_t j = 0; j < count; ++j) {
        const T* row = row_at(j);
        for (int64_t d = 0; d < CHANNELS; d += LANES) {
            const vfloat wide = load_operands(Single(), row, d, CHANNELS - d);
            std::memcpy(out + d / PANEL * panel + j * PANEL + d % PANEL, &wide, sizeof(wide));
        }
    }
}
// The same with rows j and j + 1 at [panel][j / 2]; an odd last row is paired with zeros.
template <int CHANNELS, class T, class RowAt>
void pack_values(RowAt row_at, int64_t count, int64_t panel, Pair* out) {
    for (int64_t j = 0; j < count; j += 2) {
        const bfloat_t* first = row_at(j);
        const bfloat_t* second = j + 1 < count ? row_at(j + 1) : nullptr;
        for (int64_t d = 0; d < CHANNELS; d += LANES) {
            const vuint both = pair_rows<CHANNELS>(first, second, d);
            std::memcpy(out + d / PANEL * panel + j / 2 * PANEL + d % PANEL, &both, sizeof(both));
        }
    }
}

// Values as rows of channels, pairs of keys along them: out[channel][j / 2], rows that lie `stride` apart. Zeros behind the last key, up
// to the stride, and behind the last channel, up to whole registers.
template <int CHANNELS, class T, class RowAt>
void pack_columns(RowAt row_at, int64_t count, int64_t stride, Pair* out) {
    for (int64_t j = 0; j < 2 * stride; j += 2 * LANES) {
        for (int64_t d = 0; d < CHANNELS; d += LANES) {
            vfloat block[LANES];
            repeat<LANES>([&](int i) ATTNREG_LAMBDA {
                const int64_t first = j + 2 * i;
                const T* even = first < count ? row_at(first) : nullptr;
                block[i] = (vfloat)pair_rows<CHANNELS>(even, first + 1 < count ? row_at(first + 1) : nullptr, d);
            });
            transpose(block);
            for (int i = 0; i < LANES; ++i) std::memcpy(out + (d + i) * stride + j / 2, &block[i], sizeof(vfloat));
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
