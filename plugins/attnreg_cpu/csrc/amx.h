// Products by AMX: 16 x 16 sums at a time, over 16 pairs of bfloat16 values a step.
//
// The operands lie as in micro.h: the left one in rows along the pairs, the right one in rows of lanes.
#pragma once
#include "parts.h"
#include "softmax.h"

namespace attnreg {

constexpr int BLOCK = BlockPair::BLOCK;  // rows of a tile register, and the 32-bit operands or sums of each

#if defined(ATTNREG_TILE_INSTRUCTIONS)
// GCC's tile instructions do not say that they read all of their memory.
ATTNREG_INLINE void memory_is_read(const void* from) { asm volatile("" ::"r"(from) : "memory"); }

// While one lives, the thread's tile registers hold BLOCK rows of BLOCK operands each.
class TileRegisters {
  public:
    TileRegisters() {
        struct alignas(64) {
            uint8_t palette = 1, start_row = 0, reserved[14] = {};
            uint16_t row_bytes[16] = {};
            uint8_t rows[16] = {};
        } config;
        for (int i = 0; i < 8; ++i) config.row_bytes[i] = BLOCK * 4, config.rows[i] = BLOCK;
        memory_is_read(&config);
        _tile_loadconfig(&config);
    }
    ~TileRegisters() { _tile_release(); }
    TileRegisters(const TileRegisters&) = delete;
    TileRegisters& operator=(const TileRegisters&) = delete;
};

// c[i][j] = (ADD: c[i][j] +) sum over pairs k of a[i][k] . b[k][j], for ROWS x COLUMNS blocks of sums and `steps` blocks of k. Strides are
// in operands. A constant number of registers each: sums in 0 to 3, a in 4 and 5, b in 6 and 7.
template <int ROWS, int COLUMNS, bool ADD>
ATTNREG_INLINE void multiply_blocks(int64_t steps, const BlockPair* a, int64_t a_stride, int64_t, const BlockPair* b, int64_t b_stride,
                                    float* c, int64_t c_stride) {
    static_assert(ROWS <= 2 && COLUMNS <= 2, "sums fill four registers");
    const int64_t a_bytes = a_stride * 4, b_bytes = b_stride * 4, c_bytes = c_stride * 4;
    float* below = c + BLOCK * c_stride;
    memory_is_read(a);
    if constexpr (ADD) {
        _tile_loadd(0, c, c_bytes);
        if constexpr (COLUMNS == 2) _tile_loadd(1, c + BLOCK, c_bytes);
        if constexpr (ROWS == 2) _tile_loadd(2, below, c_bytes);
        if constexpr (ROWS == 2 && COLUMNS == 2) _tile_loadd(3, below + BLOCK, c_bytes);
    } else {
        _tile_zero(0);
        if constexpr (COLUMNS == 2) _tile_zero(1);
        if constexpr (ROWS == 2) _tile_zero(2);
        if constexpr (ROWS == 2 && COLUMNS == 2) _tile_zero(3);
    }
    for (int64_t k = 0; k < steps; ++k, a += BLOCK, b += BLOCK * b_stride) {
        _tile_loadd(6, b, b_bytes);
        _tile_loadd(4, a, a_bytes);
        _tile_dpbf16ps(0, 4, 6);
        if constexpr (COLUMNS == 2) {
            _tile_loadd(7, b + BLOCK, b_bytes);
            _tile_dpbf16ps(1, 4, 7);
        }
        if constexpr (ROWS == 2) {
            _tile_loadd(5, a + BLOCK * a_stride, a_bytes);
            _tile_dpbf16ps(2, 5, 6);
            if constexpr (COLUMNS == 2) _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, c, c_bytes);
    if constexpr (COLUMNS == 2) _tile_stored(1, c + BLOCK, c_bytes);
    if constexpr (ROWS == 2) _tile_stored(2, below, c_bytes);
    if constexpr (ROWS == 2 && COLUMNS == 2) _tile_stored(3, below + BLOCK, c_bytes);
    memory_is_read(c);
}

// The same of values in parts (parts.h): a[i] has its parts one after the other, `a_part` apart, and each block of b its own. All parts of
// a in registers 2 to 4, and one of b after the other in 5 and 6: loads and products that take turns less often lose less time where
// another thread of the core leaves no spare registers (measured: 67 ns for four products where rows and columns of two take 113).
template <int ROWS, int COLUMNS, bool ADD>
ATTNREG_INLINE void multiply_blocks(int64_t steps, const BlockParts* a, int64_t a_stride, int64_t a_part, const BlockParts* b,
                                    int64_t b_stride, float* c, int64_t c_stride) {
    static_assert(COLUMNS <= 2 && !ADD, "sums in registers 0 and 1");
    const int64_t a_bytes = a_stride * 4, b_bytes = b_stride * 4, c_bytes = c_stride * 4, b_part = BLOCK * b_stride;
    memory_is_read(a);
    for (int row = 0; row < ROWS; ++row, a += BLOCK * a_stride, c += BLOCK * c_stride) {
        _tile_zero(0);
        if constexpr (COLUMNS == 2) _tile_zero(1);
        for (int64_t k = 0; k < steps; ++k) {
            const BlockParts *left = a + k * BLOCK, *right = b + k * 3 * b_part;
            const auto load_b = [&](const BlockParts* part) ATTNREG_LAMBDA {
                _tile_loadd(5, part, b_bytes);
                if constexpr (COLUMNS == 2) _tile_loadd(6, part + BLOCK, b_bytes);
            };
            _tile_loadd(2, left, a_bytes);
            _tile_loadd(3, left + a_part, a_bytes);
            _tile_loadd(4, left + 2 * a_part, a_bytes);
            load_b(right + 2 * b_part);
            _tile_dpbf16ps(0, 2, 5);
            if constexpr (COLUMNS == 2) _tile_dpbf16ps(1, 2, 6);
            load_b(right + b_part);
            _tile_dpbf16ps(0, 3, 5);
            if constexpr (COLUMNS == 2) _tile_dpbf16ps(1, 3, 6);
            _tile_dpbf16ps(0, 2, 5);
            if constexpr (COLUMNS == 2) _tile_dpbf16ps(1, 2, 6);
            load_b(right);
            _tile_dpbf16ps(0, 4, 5);
            if constexpr (COLUMNS == 2) _tile_dpbf16ps(1, 4, 6);
            _tile_dpbf16ps(0, 3, 5);
            if constexpr (COLUMNS == 2) _tile_dpbf16ps(1, 3, 6);
            _tile_dpbf16ps(0, 2, 5);
            if constexpr (COLUMNS == 2) _tile_dpbf16ps(1, 2, 6);
        }
        _tile_stored(0, c, c_bytes);
        if constexpr (COLUMNS == 2) _tile_stored(1, c + BLOCK, c_bytes);
    }
    memory_is_read(c);
}
#elif defined(ATTNREG_HAS_AMX)
// What the instructions above do.
class TileRegisters {};
template <int ROWS, int COLUMNS, bool ADD, class Operand>
void multiply_blocks(int64_t steps, const Operand* a, int64_t a_stride, int64_t a_part, const Operand* b, int64_t b_stride, float* c,
                     int64_t c_stride) {
    constexpr int PARTS = Operand::PARTS;
    const auto add_block = [&](const Operand* left, const Operand* right, vfloat& sum) {
        for (int k = 0; k < BLOCK; ++k) sum = accumulate(broadcast(left[k]), load_as<vint>(right + k * b_stride), sum);
    };
    for (int i = 0; i < ROWS * BLOCK; ++i) {
        for (int v = 0; v < COLUMNS; ++v) {
            vfloat sum = ADD ? load(c + i * c_stride + v * LANES) : zero();
            for (int64_t k = 0; k < steps; ++k) {
                const Operand *left = a + i * a_stride + k * BLOCK, *right = b + k * PARTS * BLOCK * b_stride + v * LANES;
                for (int m = PARTS - 1; m >= 0; --m) {
                    for (int n = PARTS - 1 - m; n >= 0; --n) add_block(left + n * a_part, right + m * BLOCK * b_stride, sum);
                }
            }
            store(c + i * c_stride + v * LANES, sum);
        }
    }
}
#endif

// What must live while products of an operand are computed.
template <class Operand>
class Registers {};

#if defined(ATTNREG_HAS_AMX)
template <>
class Registers<BlockPair> : TileRegisters {};
template <>
class Registers<BlockParts> : TileRegisters {};

static_assert(LANES == BLOCK, "a register of lanes is a row of a block");

// Raises peak[lane] to the greatest of `count` rows of NV of a tile's TILE vectors.
template <int NV, int TILE>
ATTNREG_INLINE void raise_peak(int64_t count, const float* scores, vfloat (&peak)[NV]) {
    for (int64_t j = 0; j < count; ++j) {
#pragma GCC unroll 8
        for (int v = 0; v < NV; ++v) peak[v] = vmax(peak[v], load(scores + (j * TILE + v) * LANES));
    }
}

// multiply_scores of micro.h by blocks, with count >= BLOCK; `peak` may be null.
template <int NV, int TILE, int DEPTH, class Operand>
ATTNREG_ALONE void block_scores(int64_t count, const Operand* keys, int64_t stride, const Operand* query, float* scores, float* peak) {
    static_assert(DEPTH % BLOCK == 0, "whole blocks");
    vfloat top[NV];
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) top[v] = peak ? load(peak + v * LANES) : zero();
    // The maximum follows one step behind, so that it is taken while tile registers multiply.
    int64_t seen = 0, written = 0;
    const auto look = [&](int64_t end) ATTNREG_LAMBDA {
        if (peak) raise_peak<NV, TILE>(end - seen, scores + seen * TILE * LANES, top);
        seen = end;
    };
    const auto take = [&](auto rows, int64_t j) ATTNREG_LAMBDA {
        constexpr int ROWS = decltype(rows)::value;
        const auto multiply = [&](auto columns, int v) ATTNREG_LAMBDA {
            multiply_blocks<ROWS, decltype(columns)::value, false>(DEPTH / BLOCK, keys + j * stride, stride, DEPTH, query + v * LANES,
                                                                   TILE * LANES, scores + (j * TILE + v) * LANES, TILE * LANES);
        };
        for (int v = 0; v + 2 <= NV; v += 2) multiply(std::integral_constant<int, 2>(), v);
        if constexpr (NV % 2 != 0) multiply(std::integral_constant<int, 1>(), NV - 1);
        look(std::min(written, j));
        written = j + ROWS * BLOCK;
    };
    int64_t j = 0;
    for (; j + 2 * BLOCK <= count; j += 2 * BLOCK) take(std::integral_constant<int, 2>(), j);
    for (; j < count; j += BLOCK) take(std::integral_constant<int, 1>(), std::min(j, count - BLOCK));
    look(count);
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) {
        if (peak) store(peak + v * LANES, top[v]);
    }
}

template <int NV, int TILE, int DEPTH>
void multiply_scores(int64_t count, const BlockPair* keys, int64_t stride, const BlockPair* query, float* scores, float* peak) {
    block_scores<NV, TILE, DEPTH>(count, keys, stride, query, scores, peak);
}
template <int NV, int TILE, int DEPTH>
void multiply_scores(int64_t count, const BlockParts* keys, int64_t stride, const BlockParts* query, float* scores, float* peak) {
    block_scores<NV, TILE, DEPTH>(count, keys, stride, query, scores, peak);
}

// Calls use(blocks, c) for every two blocks of channels, `blocks` a constant, and for one that is left.
template <int CHANNELS, class Use>
ATTNREG_INLINE void each_two_blocks(const Use& use) {
    int c = 0;
    for (; c + 2 * BLOCK <= CHANNELS; c += 2 * BLOCK) use(std::integral_constant<int, 2>(), c);
    if constexpr (CHANNELS % (2 * BLOCK) != 0) use(std::integral_constant<int, 1>(), c);
}

// out[c][lane] = rescale[lane] * out[c][lane] + sum over pairs j of values[c][j] . weights[j][lane] for CHANNELS values of c, a multiple
// of BLOCK, and NV vectors of lanes. Without `rescale` the output is only written. `steps` counts blocks of j.
template <int NV, int CHANNELS, class Operand>
ATTNREG_ALONE void multiply_columns(int64_t steps, const Operand* values, int64_t stride, const Operand* weights, float* out,
                                    const float* rescale) {
    constexpr int WIDTH = NV * LANES;
    const int64_t part = stride / Operand::PARTS;
    alignas(64) float sums[2][2 * BLOCK * 2 * BLOCK];
    vfloat factor[NV];
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) factor[v] = rescale ? load(rescale + v * LANES) : zero();
    int turn = 0;
    const auto join = [&](const float* from, auto rows, auto columns, int c, int v) ATTNREG_LAMBDA {
        constexpr int ROWS = decltype(rows)::value * BLOCK, COLUMNS = decltype(columns)::value;
        for (int i = 0; i < ROWS; ++i) {
#pragma GCC unroll 2
            for (int n = 0; n < COLUMNS; ++n) {
                float* to = out + (c + i) * WIDTH + (v + n) * LANES;
                store(to, fma(factor[v + n], load(to), load(from + i * 2 * BLOCK + n * LANES)));
            }
        }
    };
    const auto take = [&](auto rows, auto columns, int c, int v) ATTNREG_LAMBDA {
        constexpr int ROWS = decltype(rows)::value, COLUMNS = decltype(columns)::value;
        const Operand *a = values + c * stride, *b = weights + v * LANES;
        if (rescale == nullptr) {
            return multiply_blocks<ROWS, COLUMNS, false>(steps, a, stride, part, b, WIDTH, out + c * WIDTH + v * LANES, WIDTH);
        }
        multiply_blocks<ROWS, COLUMNS, false>(steps, a, stride, part, b, WIDTH, sums[turn], 2 * BLOCK);
        join(sums[turn], rows, columns, c, v);
        turn ^= 1;
    };
    each_two_blocks<CHANNELS>([&](auto rows, int c) ATTNREG_LAMBDA {
#pragma GCC unroll 8
        for (int v = 0; v + 2 <= NV; v += 2) take(rows, std::integral_constant<int, 2>(), c, v);
        if constexpr (NV % 2 != 0) take(rows, std::integral_constant<int, 1>(), c, NV - 1);
    });
}

// out[c][lane] += the same sum.
template <int NV, int CHANNELS>
ATTNREG_ALONE void accumulate_columns(int64_t steps, const BlockPair* values, int64_t stride, const BlockPair* weights, float* out) {
    constexpr int WIDTH = NV * LANES;
    constexpr int COLUMNS = NV == 1 ? 1 : 2;
    static_assert(NV % COLUMNS == 0, "pairs of registers");
    each_two_blocks<CHANNELS>([&](auto rows, int c) ATTNREG_LAMBDA {
        for (int v = 0; v < NV; v += COLUMNS) {
            multiply_blocks<decltype(rows)::value, COLUMNS, true>(steps, values + c * stride, stride, 0, weights + v * LANES, WIDTH,
                                                                  out + c * WIDTH + v * LANES, WIDTH);
        }
    });
}

// As for other operands (micro.h). DEPTH is a multiple of BLOCK; `weights` are readable up to the next whole block of rows.
template <int CHANNELS, int DEPTH>
ATTNREG_ALONE void accumulate_rows(int64_t count, const BlockPair* weights, const BlockPair* rows, float* out, int64_t out_stride) {
    static_assert(DEPTH % BLOCK == 0 && CHANNELS % BLOCK == 0, "whole blocks");
    int64_t j = 0;
    const auto step = [&](auto blocks) ATTNREG_LAMBDA {
        constexpr int ROWS = decltype(blocks)::value;
        for (; j + ROWS * BLOCK <= count; j += ROWS * BLOCK) {
            each_two_blocks<CHANNELS>([&](auto columns, int c) ATTNREG_LAMBDA {
                multiply_blocks<ROWS, decltype(columns)::value, true>(DEPTH / BLOCK, weights + j * DEPTH, DEPTH, 0, rows + c, CHANNELS,
                                                                      out + j * out_stride + c, out_stride);
            });
        }
    };
    step(std::integral_constant<int, 2>());
    step(std::integral_constant<int, 1>());
    if (j == count) return;
    // The last rows, by themselves: what lies behind them in `out` is not theirs.
    alignas(64) float sums[BLOCK * 2 * BLOCK];
    each_two_blocks<CHANNELS>([&](auto columns, int c) {
        constexpr int COLUMNS = decltype(columns)::value;
        multiply_blocks<1, COLUMNS, false>(DEPTH / BLOCK, weights + j * DEPTH, DEPTH, 0, rows + c, CHANNELS, sums, 2 * BLOCK);
        for (int64_t i = j; i < count; ++i) {
            for (int v = 0; v < COLUMNS; ++v) {
                float* to = out + i * out_stride + c + v * LANES;
                store(to, load(to) + load(sums + (i - j) * 2 * BLOCK + v * LANES));
            }
        }
    });
}

// Blocks of pairs that hold `count` keys.
inline int64_t blocks_of(int64_t count) { return (count + 2 * BLOCK - 1) / (2 * BLOCK); }
// Zeros behind the pairs of `count` keys, up to the next whole block of them.
inline void fill_block(BlockPair* pairs, int64_t count, int64_t lanes) {
    std::fill(pairs + (count + 1) / 2 * lanes, pairs + blocks_of(count) * BLOCK * lanes, BlockPair{});
}

// The softmax of pairs (softmax.h), with zeros up to the next whole block of pairs.
template <int NV>
void online_softmax(BlockPair* weights, const float* scores, int64_t count, float scale, const float* peak, float* top, float* sum,
                    float* rescale) {
    online_softmax<NV>(static_cast<Pair*>(weights), scores, count, scale, peak, top, sum, rescale);
    fill_block(weights, count, NV * LANES);
}

// The softmax with weights in parts: weights[block][part][pair][lane].
template <int NV>
ATTNREG_ALONE void online_softmax(BlockParts* weights, const float* scores, int64_t count, float scale, const float* peak, float* top,
                                  float* sum, float* rescale) {
    constexpr int64_t WIDTH = NV * LANES;
    vfloat base[NV], total[NV] = {};
    vint far[NV];
    const auto weigh = [&](auto any) ATTNREG_LAMBDA {
        for (int64_t j = 0; j < blocks_of(count) * 2 * BLOCK; j += 2) {
            BlockParts* to = weights + (j / (2 * BLOCK) * 3 * BLOCK + j / 2 % BLOCK) * WIDTH;
#pragma GCC unroll 8
            for (int v = 0; v < NV; ++v) {
                vfloat weight[2] = {splat(-INFINITY_F), splat(-INFINITY_F)};
                const float* at = scores + j * WIDTH + v * LANES;
                if (j < count) weight[0] = exponent_of(any, load(at), scale, base[v], far[v]);
                if (j + 1 < count) weight[1] = exponent_of(any, load(at + WIDTH), scale, base[v], far[v]);
                vexp2(weight);
                total[v] += weight[0] + weight[1];
                vint parts[3];
                split_pairs(weight[0], weight[1], parts);
                for (int n = 0; n < 3; ++n) std::memcpy(to + n * BLOCK * WIDTH + v * LANES, &parts[n], sizeof(vint));
            }
        }
    };
    start_weights<NV>(scale, peak, top, rescale, base, far) ? weigh(std::true_type()) : weigh(std::false_type());
    join_sums<NV>(total, rescale, sum);
}
#endif

}  // namespace attnreg
