// Runs the native kernels without Python and compares them with attention in double precision, straight from the definition.
//
// Every tensor is a heap block of exactly its size, so that a sanitised build sees any access past an end. Built and run by
// test_sanitised.py (AddressSanitizer, UndefinedBehaviorSanitizer) and test_cross.py (aarch64 under qemu). Exit status: number of failures.
#include <cmath>
#include <cstdio>
#include <functional>
#include <random>
#include <thread>
#include <vector>

#include "backward.h"
#include "forward.h"

using namespace attnreg;

namespace {

constexpr int DIM_K = 40, DIM_V = 24;  // multiples of no vector's length

struct Setting {
    const char* name;
    int64_t q_heads, kv_heads, rows, keys;
    bool causal = false, bias = false, alibi = false, sinks = false, mask = false, documents = false, paged = false, layout = false, additive = false;
    int64_t left = -1, right = -1;
    double softcap = 0;
    int64_t threads = 1, tiles = 2, block = 64, pack = 0;
};

std::mt19937 random_bits(1);
float draw() { return std::normal_distribution<float>()(random_bits); }

template <class T>
std::vector<T> tensor(size_t count, float scale = 1.0f) {
    std::vector<T> values(count);
    for (T& value : values) narrow(&value, draw() * scale);
    return values;
}

struct Exact {
    std::vector<double> out, lse, d_q, d_k, d_v, d_weight;
};

// One batch. logit(h, i, j) and its derivative by the raw product; allowed(h, i, j).
struct Definition {
    std::function<bool(int64_t, int64_t, int64_t)> allowed;
    std::function<double(double, int64_t, int64_t, int64_t)> logit;
    std::function<double(double)> slope;
    std::function<double(int64_t)> sink;
};

template <class T>
Exact exact(const Setting& s, const std::vector<T>& q, const std::vector<T>& k, const std::vector<T>& v, const std::vector<T>& d_out,
            const std::vector<float>& additive, double scale, const Definition& by) {
    Exact e;
    e.out.resize(s.q_heads * s.rows * DIM_V);
    e.lse.resize(s.q_heads * s.rows);
    e.d_q.resize(q.size());
    e.d_k.resize(k.size());
    e.d_v.resize(v.size());
    e.d_weight.resize(s.q_heads * DIM_K);
    for (int64_t h = 0; h < s.q_heads; ++h) {
        const int64_t g = h / (s.q_heads / s.kv_heads);
        for (int64_t i = 0; i < s.rows; ++i) {
            const int64_t r = h * s.rows + i;
            std::vector<double> raw(s.keys), weight(s.keys, 0.0);
            double top = by.sink(h);
            const auto query = [&](int d) { return double(widen(q[r * DIM_K + d])); };
            const auto key = [&](int64_t j, int d) { return double(widen(k[(g * s.keys + j) * DIM_K + d])); };
            const auto bent = [&](int64_t j, int d) { return std::tanh(query(d) + key(j, d)); };
            const auto weight_of = [&](int d) { return double(additive[h * DIM_K + d]); };
            for (int64_t j = 0; j < s.keys; ++j) {
                for (int d = 0; d < DIM_K; ++d) raw[j] += s.additive ? weight_of(d) * bent(j, d) : query(d) * key(j, d);
                raw[j] *= scale;
                if (by.allowed(h, i, j)) top = std::max(top, by.logit(raw[j], h, i, j));
            }
            double sum = top == -INFINITY ? 0.0 : std::exp(by.sink(h) - top);
            for (int64_t j = 0; j < s.keys; ++j) {
                if (by.allowed(h, i, j)) sum += weight[j] = std::exp(by.logit(raw[j], h, i, j) - top);
            }
            e.lse[r] = sum > 0 ? top + std::log(sum) : -INFINITY;
            double dot = 0;
            std::vector<double> d_weight(s.keys, 0.0);
            for (int64_t j = 0; j < s.keys; ++j) {
                weight[j] = sum > 0 ? weight[j] / sum : 0.0;
                for (int d = 0; d < DIM_V; ++d) {
                    const double value = widen(v[(g * s.keys + j) * DIM_V + d]), change = widen(d_out[r * DIM_V + d]);
                    e.out[r * DIM_V + d] += weight[j] * value;
                    e.d_v[(g * s.keys + j) * DIM_V + d] += weight[j] * change;
                    d_weight[j] += value * change;
                }
                dot += weight[j] * d_weight[j];
            }
            for (int64_t j = 0; j < s.keys; ++j) {
                const double d_raw = weight[j] * (d_weight[j] - dot) * by.slope(raw[j]) * scale;
                for (int d = 0; d < DIM_K; ++d) {
                    const double t = bent(j, d), same = weight_of(d) * (1 - t * t);
                    e.d_q[r * DIM_K + d] += d_raw * (s.additive ? same : key(j, d));
                    e.d_k[(g * s.keys + j) * DIM_K + d] += d_raw * (s.additive ? same : query(d));
                    e.d_weight[h * DIM_K + d] += d_raw * t;
                }
            }
        }
    }
    return e;
}

template <class T>
int compare(const char* what, const Setting& s, const std::vector<T>& got, const std::vector<double>& want, double bound) {
    double worst = 0;
    for (size_t i = 0; i < want.size(); ++i) {
        const double value = widen(got[i]);
        if (value != want[i]) worst = std::max(worst, std::isnan(value) ? INFINITY : std::fabs(value - want[i]));
    }
    std::printf("%-28s %-4s error %.2e of %.2e %s\n", s.name, what, worst, bound, worst <= bound ? "" : "FAILED");
    return worst <= bound ? 0 : 1;
}

// A block layout with empty, full and partial blocks, every bit of the partial ones drawn.
struct Layout {
    static constexpr int64_t ROWS = 24, KEYS = 40, WORDS = 2;
    std::vector<int32_t> row_ptr{0}, row_split, columns, tiles, bits;
    std::vector<uint8_t> allowed;

    explicit Layout(const Setting& s) : allowed(s.rows * s.keys) {
        for (int64_t i = 0; i < s.rows; i += ROWS) {
            std::vector<int32_t> partial;
            for (int64_t j = 0; j < s.keys; j += KEYS) {
                const auto kind = random_bits() % 3;
                if (kind == 1) add(s, i, j, -1);
                if (kind == 2) partial.push_back(int32_t(j));
            }
            row_split.push_back(int32_t(columns.size()));
            for (const int32_t j : partial) add(s, i, j, int32_t(bits.size() / (ROWS * WORDS)));
            row_ptr.push_back(int32_t(columns.size()));
        }
    }

    void add(const Setting& s, int64_t i, int64_t j, int32_t tile) {
        columns.push_back(int32_t(j / KEYS));
        tiles.push_back(tile);
        if (tile >= 0) bits.resize(bits.size() + ROWS * WORDS);
        for (int64_t r = i; r < std::min(i + ROWS, s.rows); ++r) {
            for (int64_t c = j; c < std::min(j + KEYS, s.keys); ++c) {
                const bool yes = tile < 0 || random_bits() % 2;
                allowed[r * s.keys + c] = yes;
                if (tile >= 0 && yes) bits[(tile * ROWS + r - i) * WORDS + (c - j) / 32] |= int32_t(1u << ((c - j) % 32));
            }
        }
    }

    void describe(Params& p) const {
        p.layout_row_ptr = row_ptr.data(), p.layout_row_split = row_split.data(), p.layout_columns = columns.data();
        p.layout_tiles = tiles.data(), p.layout_bits = bits.data(), p.layout_batches = p.layout_heads = 1;
        p.layout_lines = int64_t(row_split.size()), p.layout_block_q = ROWS, p.layout_block_kv = KEYS;
    }
};

// Sums of gradients have padded rows; this takes the padding off.
std::vector<float> unpadded(const std::vector<float>& sums, int64_t rows, int64_t width, int64_t padded) {
    std::vector<float> out(rows * width);
    for (int64_t r = 0; r < rows; ++r) std::copy_n(sums.begin() + r * padded, width, out.begin() + r * width);
    return out;
}

template <class T, class Operand, int VECTORS, bool ADDITIVE = false>
int check(const Setting& s, double bound) {
    const auto q = tensor<T>(s.q_heads * s.rows * DIM_K), k = tensor<T>(s.kv_heads * s.keys * DIM_K),
               v = tensor<T>(s.kv_heads * s.keys * DIM_V), d_out = tensor<T>(s.q_heads * s.rows * DIM_V);
    const auto bias = tensor<float>(s.q_heads * s.rows * s.keys), slopes = tensor<float>(s.q_heads, 0.1f), sinks = tensor<float>(s.q_heads),
               weight = tensor<float>(s.q_heads * DIM_K);
    std::vector<uint8_t> mask(s.rows * s.keys);
    std::vector<int32_t> ids(s.keys);
    for (uint8_t& m : mask) m = random_bits() % 3 != 0;
    for (int64_t j = 0; j < s.keys; ++j) ids[j] = int32_t(j / 37 % 3);

    Params p{};
    std::vector<T> out(s.q_heads * s.rows * DIM_V);
    std::vector<float> lse(s.q_heads * s.rows);
    p.q = q.data(), p.k = k.data(), p.v = v.data(), p.out = out.data(), p.lse = lse.data();
    p.q_head = s.rows * DIM_K, p.q_row = DIM_K, p.k_head = s.keys * DIM_K, p.k_row = DIM_K;
    p.v_head = s.keys * DIM_V, p.v_row = DIM_V, p.out_head = s.rows * DIM_V, p.out_row = DIM_V;
    p.lse_head = s.rows, p.lse_row = 1;
    p.batch = 1, p.q_heads = s.q_heads, p.kv_heads = s.kv_heads, p.q_rows = s.rows, p.kv_rows = s.keys;
    p.causal = s.causal, p.window_left = s.left, p.window_right = s.right, p.scale = 0.2, p.softcap = s.softcap;
    p.threads = s.threads, p.block_kv = s.block, p.tiles = s.tiles, p.pack = s.pack, p.splits = 2;
    if (s.bias) p.bias = bias.data(), p.bias_head = s.rows * s.keys, p.bias_row = s.keys, p.bias_key = 1;
    if (s.alibi) p.alibi = slopes.data();
    if (s.sinks) p.sinks = sinks.data();
    if (s.additive) p.weight = weight.data(), p.weight_head = DIM_K;
    if (s.mask) p.mask = mask.data(), p.mask_row = s.keys, p.mask_key = 1;
    if (s.documents) p.documents = ids.data(), p.document_row = 1, p.document_width = 4;

    const Layout layout(s);
    if (s.layout) layout.describe(p);

    // Pages of 16 keys in reverse order; the rest of the last page is stale and holds the largest finite values.
    constexpr int64_t page = 16;
    const int64_t pages = (s.keys + page - 1) / page;
    std::vector<T> paged_k(pages * s.kv_heads * page * DIM_K), paged_v(pages * s.kv_heads * page * DIM_V);
    std::vector<int32_t> table(pages), used{int32_t(s.keys)};
    if (s.paged) {
        for (T& x : paged_k) narrow(&x, sizeof(T) == 4 ? 3e38f : 65504.0f);
        for (T& x : paged_v) narrow(&x, sizeof(T) == 4 ? 3e38f : 65504.0f);
        for (int64_t n = 0; n < pages; ++n) table[n] = int32_t(pages - 1 - n);
        for (int64_t g = 0; g < s.kv_heads; ++g) {
            for (int64_t j = 0; j < s.keys; ++j) {
                const int64_t row = (table[j / page] * s.kv_heads + g) * page + j % page;
                std::copy_n(k.begin() + (g * s.keys + j) * DIM_K, DIM_K, paged_k.begin() + row * DIM_K);
                std::copy_n(v.begin() + (g * s.keys + j) * DIM_V, DIM_V, paged_v.begin() + row * DIM_V);
            }
        }
        p.k = paged_k.data(), p.v = paged_v.data(), p.k_head = page * DIM_K, p.v_head = page * DIM_V;
        p.k_batch = s.kv_heads * page * DIM_K, p.v_batch = s.kv_heads * page * DIM_V;
        p.page_size = page, p.block_table = table.data(), p.table_row = pages, p.seqused = used.data(), p.kv_rows = pages * page;
    }

    const int64_t offset = s.keys - s.rows;
    Definition by;
    by.allowed = [&](int64_t, int64_t i, int64_t j) {
        const int64_t at = i + offset;
        if (s.causal && j > at) return false;
        if (s.left >= 0 && (j < at - s.left || j > at + s.right)) return false;
        if (s.layout && !layout.allowed[i * s.keys + j]) return false;
        if (s.mask && !mask[i * s.keys + j]) return false;
        return !s.documents || (at >= 0 && at < s.keys && ids[at] == ids[j]);
    };
    by.logit = [&](double x, int64_t h, int64_t i, int64_t j) {
        if (s.softcap > 0) x = s.softcap * std::tanh(x / s.softcap);
        if (s.bias) x += bias[(h * s.rows + i) * s.keys + j];
        if (s.alibi) x -= double(slopes[h]) * std::fabs(double(i + offset - j));
        return x;
    };
    by.slope = [&](double x) { return s.softcap > 0 ? 1 - std::pow(std::tanh(x / s.softcap), 2) : 1.0; };
    by.sink = [&](int64_t h) { return s.sinks ? double(sinks[h]) : -INFINITY; };
    const Exact e = exact<T>(s, q, k, v, d_out, weight, p.scale, by);

    int failures = Forward<T, Operand, DIM_K, DIM_V, VECTORS, ADDITIVE>(p).run() != 0;
    failures += compare("out", s, out, e.out, bound) + compare("lse", s, lse, e.lse, 1e-5);
    if constexpr (Operand::PARTS == 1) {  // the forward kernel alone has parts
        if (s.paged) return failures;
        constexpr int64_t padded_k = (DIM_K + 15) / 16 * 16, padded_v = (DIM_V + 15) / 16 * 16;
        std::vector<T> d_q(q.size());
        const int64_t keys = s.kv_heads * s.keys;
        std::vector<float> d_k(2 * keys * padded_k), d_v(2 * keys * padded_v), d_weight(2 * s.q_heads * DIM_K);
        if (s.additive) p.d_weight = d_weight.data(), p.d_weight_row = DIM_K;
        p.d_out = d_out.data(), p.d_q = d_q.data(), p.d_k = d_k.data(), p.d_v = d_v.data();
        p.d_out_head = s.rows * DIM_V, p.d_out_row = DIM_V, p.d_q_head = s.rows * DIM_K, p.d_q_row = DIM_K;
        p.d_k_share = keys * padded_k, p.d_k_head = s.keys * padded_k, p.d_k_row = padded_k;
        p.d_v_share = keys * padded_v, p.d_v_head = s.keys * padded_v, p.d_v_row = padded_v;
        failures += Backward<T, Operand, DIM_K, DIM_V, VECTORS, ADDITIVE>(p).run() != 0;
        for (size_t i = 0; i < d_k.size() / 2; ++i) d_k[i] += d_k[i + d_k.size() / 2];
        for (size_t i = 0; i < d_v.size() / 2; ++i) d_v[i] += d_v[i + d_v.size() / 2];
        for (int64_t i = 0; i < s.q_heads * DIM_K; ++i) d_weight[i] += d_weight[i + s.q_heads * DIM_K];
        if (s.additive) failures += compare("d_w", s, d_weight, e.d_weight, 20 * bound);
        failures += compare("d_q", s, d_q, e.d_q, 4 * bound);
        failures += compare("d_k", s, unpadded(d_k, keys, DIM_K, padded_k), e.d_k, 20 * bound);
        failures += compare("d_v", s, unpadded(d_v, keys, DIM_V, padded_v), e.d_v, 20 * bound);
    }
    return failures;
}

// Stands in for the OpenMP entry that Python hands over.
void run_threads(void (*body)(void*), void* data, unsigned threads, unsigned) {
    std::vector<std::thread> others;
    for (unsigned n = 1; n < threads; ++n) others.emplace_back(body, data);
    body(data);
    for (std::thread& other : others) other.join();
}

}  // namespace

int main() {
    parallel_entry() = run_threads;
    std::vector<Setting> settings(16, Setting{"", 4, 2, 67, 131});
    settings[0].name = "full";
    settings[1].name = "causal", settings[1].causal = true, settings[1].threads = 3;
    settings[2] = {"one query", 6, 1, 1, 33};
    settings[3] = {"more rows than keys", 2, 2, 90, 20}, settings[3].causal = true;
    settings[4].name = "window", settings[4].left = 11, settings[4].right = 4;
    settings[5].name = "softcap bias", settings[5].softcap = 2, settings[5].bias = true;
    settings[6].name = "alibi sinks", settings[6].alibi = settings[6].sinks = settings[6].causal = true;
    settings[7].name = "dense mask", settings[7].mask = true, settings[7].pack = 1;
    settings[8].name = "scattered documents", settings[8].documents = true;
    settings[9].name = "paged", settings[9].paged = settings[9].causal = true;
    settings[10] = {"short keys", 2, 1, 5, 3};
    settings[11].name = "packed causal", settings[11].causal = true, settings[11].pack = 1, settings[11].block = 32, settings[11].threads = 2;
    settings[12].name = "layout", settings[12].layout = settings[12].alibi = true, settings[12].threads = 2;
    settings[13] = {"layout, many heads", 100, 1, 50, 90}, settings[13].layout = true;
    settings[14].name = "additive", settings[14].additive = settings[14].causal = true, settings[14].threads = 2;
    settings[15].name = "additive layout", settings[15].additive = settings[15].layout = true, settings[15].softcap = 2;
    int failures = 0;
    for (const Setting& s : settings) {
        if (s.additive) {
            failures += check<float, Single, 3, true>(s, 2e-6) + check<bfloat_t, Single, 2, true>(s, 1.6e-2);
            continue;
        }
        failures += check<float, Single, 3>(s, 2e-6);
        failures += check<half_t, Single, 2>(s, 2e-3);
        failures += check<bfloat_t, Single, 1>(s, 1.6e-2);
#if defined(ATTNREG_HAS_PAIRS)
        failures += check<bfloat_t, Pair, 3>(s, 2.4e-2);
#endif
#if defined(ATTNREG_HAS_AMX) && !defined(ATTNREG_TILE_INSTRUCTIONS)
        failures += check<bfloat_t, BlockPair, 4>(s, 2.4e-2) + check<float, BlockParts, 3>(s, 2e-6);
#endif
    }
    std::printf("%d lanes, %d failures\n", LANES, failures);
    return failures;
}
