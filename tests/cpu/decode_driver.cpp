// Runs the decode kernels without Python and compares them with attention in double precision, straight from the definition.
//
// Every tensor is a heap block of exactly its size, so that a sanitised build sees any access past an end. Built and run by
// test_decode_native.py (AddressSanitizer, UndefinedBehaviorSanitizer; aarch64 under qemu). Exit status: number of failures.
#include <cmath>
#include <cstdio>
#include <random>
#include <thread>
#include <vector>

#include "decode_kernel.h"

using namespace attnreg;

namespace {

struct Setting {
    const char* name;
    int64_t q_heads, kv_heads, rows, keys, dim_k, dim_v;
    int64_t threads = 1, splits = 0, block = 64, head_block = 1, stage = 9, ahead = 0, page = 0, left = -1, streams = 1;
    bool causal = false, extras = false, ids = false;
};

std::mt19937 random_bits(1);
float draw() { return std::normal_distribution<float>()(random_bits); }

inline void put(float* p, float x) { *p = x; }
inline void put(half_t* p, float x) { narrow(p, x); }
inline void put(bfloat_t* p, float x) { narrow(p, x); }
inline void put(int8_t* p, float x) { *p = int8_t(x * 40); }
// Any finite code: exponent bits are never all ones.
inline void put(e4m3_t* p, float) { p->bits = uint8_t(random_bits() & 0xb7); }
inline void put(e5m2_t* p, float) { p->bits = uint8_t(random_bits() & 0xbf); }

template <class T>
std::vector<T> tensor(size_t count) {
    std::vector<T> values(count);
    for (T& value : values) put(&value, draw());
    return values;
}

template <class T>
double value_of(T x) {
    return double(widen_value(x));
}

int judge(const char* what, const Setting& s, const char* type, const std::vector<float>& got, const std::vector<double>& want) {
    double worst = 0, size = 1;
    for (size_t i = 0; i < want.size(); ++i) {
        if (std::isfinite(want[i])) size = std::max(size, std::fabs(want[i]));
        if (double(got[i]) != want[i]) worst = std::max(worst, std::isnan(got[i]) ? INFINITY : std::fabs(double(got[i]) - want[i]));
    }
    const bool well = worst <= 4e-6 * size;
    if (!well) std::printf("%s %s %s: error %.2e of %.2e FAILED\n", s.name, type, what, worst, 4e-6 * size);
    return well ? 0 : 1;
}

template <class T>
int check(const Setting& s, const char* type) {
    const auto q = tensor<float>(s.q_heads * s.rows * s.dim_k);
    const auto k = tensor<T>(s.kv_heads * s.keys * s.dim_k), v = tensor<T>(s.kv_heads * s.keys * s.dim_v);
    const auto bias = tensor<float>(s.q_heads * s.rows * s.keys), sinks = tensor<float>(s.q_heads);
    std::vector<float> slopes(s.q_heads);
    for (float& slope : slopes) slope = draw() * 0.02f;  // steeper ones make scores whose float32 rounding shows
    std::vector<uint8_t> mask(s.rows * s.keys);
    for (uint8_t& m : mask) m = random_bits() % 3 != 0;
    std::vector<int16_t> ids(s.keys);
    for (int64_t j = 0; j < s.keys; ++j) ids[j] = int16_t(j / 50 % 4);
    const float k_descale = 0.03f, v_descale = 1.5f;

    DecodeParams d{};
    Params& p = d.call;
    std::vector<float> out(s.q_heads * s.rows * s.dim_v, NAN), lse(s.q_heads * s.rows, NAN);
    p.q = q.data(), p.k = k.data(), p.v = v.data(), p.out = out.data(), p.lse = lse.data();
    p.q_head = s.rows * s.dim_k, p.q_row = s.dim_k, p.k_head = s.keys * s.dim_k, p.k_row = s.dim_k;
    p.v_head = s.keys * s.dim_v, p.v_row = s.dim_v, p.out_head = s.rows * s.dim_v, p.out_row = s.dim_v;
    p.lse_head = s.rows, p.lse_row = 1;
    p.batch = 1, p.q_heads = s.q_heads, p.kv_heads = s.kv_heads, p.q_rows = s.rows, p.kv_rows = s.keys;
    p.threads = s.threads, p.causal = s.causal, p.window_left = s.left, p.window_right = -1, p.scale = 0.2;
    p.block_kv = s.block, p.splits = s.splits;
    if (s.extras) {
        p.softcap = 3, p.bias = bias.data(), p.bias_head = s.rows * s.keys, p.bias_row = s.keys, p.bias_key = 1;
        p.alibi = slopes.data(), p.sinks = sinks.data(), p.mask = mask.data(), p.mask_row = s.keys, p.mask_key = 1;
    }
    if (s.ids) p.documents = ids.data(), p.document_row = 1, p.document_width = 2;
    d.k_descale = &k_descale, d.v_descale = &v_descale;
    d.head_k = s.dim_k, d.head_v = s.dim_v, d.head_block = s.head_block, d.stage = s.stage, d.ahead = s.ahead;
    d.streams = s.streams;

    // Pages in reverse order; the table's unused entries are -1.
    const int64_t pages = s.page ? (s.keys + s.page - 1) / s.page : 0;
    std::vector<T> paged_k(pages * s.kv_heads * s.page * s.dim_k), paged_v(pages * s.kv_heads * s.page * s.dim_v);
    std::vector<int64_t> table(pages + 2, -1), used{s.keys};
    if (s.page) {
        for (int64_t n = 0; n < pages; ++n) table[n] = pages - 1 - n;
        for (int64_t g = 0; g < s.kv_heads; ++g) {
            for (int64_t j = 0; j < s.keys; ++j) {
                const int64_t row = (table[j / s.page] * s.kv_heads + g) * s.page + j % s.page;
                std::copy_n(k.begin() + (g * s.keys + j) * s.dim_k, s.dim_k, paged_k.begin() + row * s.dim_k);
                std::copy_n(v.begin() + (g * s.keys + j) * s.dim_v, s.dim_v, paged_v.begin() + row * s.dim_v);
            }
        }
        p.k = paged_k.data(), p.v = paged_v.data(), p.k_head = s.page * s.dim_k, p.v_head = s.page * s.dim_v;
        p.k_batch = s.kv_heads * p.k_head, p.v_batch = s.kv_heads * p.v_head, p.page_size = s.page;
        p.block_table = table.data(), p.wide_table = 1, p.table_row = pages + 2, p.seqused = used.data(), p.wide_seqused = 1;
        p.kv_rows = (pages + 2) * s.page;
    }

    std::vector<double> exact_out(out.size()), exact_lse(lse.size());
    for (int64_t h = 0; h < s.q_heads; ++h) {
        for (int64_t i = 0; i < s.rows; ++i) {
            const int64_t g = h / (s.q_heads / s.kv_heads), r = h * s.rows + i, at = i + s.keys - s.rows;
            std::vector<double> score(s.keys, -INFINITY);
            double top = s.extras ? double(sinks[h]) : -INFINITY, sum = 0;
            for (int64_t j = 0; j < s.keys; ++j) {
                if ((s.causal && j > at) || (s.left >= 0 && j < at - s.left) || (s.extras && !mask[i * s.keys + j])) continue;
                if (s.ids && (at < 0 || ids[at] != ids[j])) continue;
                double x = 0;
                for (int64_t c = 0; c < s.dim_k; ++c) x += double(q[r * s.dim_k + c]) * value_of(k[(g * s.keys + j) * s.dim_k + c]);
                x *= p.scale * k_descale;
                if (s.extras) x = 3 * std::tanh(x / 3) + bias[r * s.keys + j] - double(slopes[h]) * std::fabs(double(at - j));
                score[j] = x;
                top = std::max(top, x);
            }
            if (top > -INFINITY && s.extras) sum = std::exp(sinks[h] - top);
            for (int64_t j = 0; j < s.keys; ++j) sum += score[j] == -INFINITY ? 0 : std::exp(score[j] - top);
            exact_lse[r] = sum > 0 ? top + std::log(sum) : -INFINITY;
            for (int64_t j = 0; j < s.keys; ++j) {
                if (score[j] == -INFINITY) continue;
                const double weight = std::exp(score[j] - top) / sum * v_descale;
                for (int64_t c = 0; c < s.dim_v; ++c) exact_out[r * s.dim_v + c] += weight * value_of(v[(g * s.keys + j) * s.dim_v + c]);
            }
        }
    }

    const int failures = Decode<T>(d).run() != 0;
    return failures + judge("out", s, type, out, exact_out) + judge("lse", s, type, lse, exact_lse);
}

// Stands in for the OpenMP entry that Python hands over.
void run_threads(void (*body)(void*), void* data, unsigned threads, unsigned) {
    std::vector<std::thread> others;
    for (unsigned n = 1; n < threads; ++n) others.emplace_back(body, data);
    body(data);
    for (std::thread& other : others) other.join();
}

std::vector<Setting> settings() {
    std::vector<Setting> all;
    for (const int64_t heads : {1, 2, 3, 4, 5, 7, 9, 18, 40}) {
        all.push_back({"group", heads, 1, 1, 77, 33, 21});
        all.push_back({"group, cut, ahead", 2 * heads, 2, 1, 300, 64, 128, 3, 4, 32, 2, 1, 4096});
    }
    for (const int64_t keys : {1, 15, 16, 17, 64, 65, 333}) all.push_back({"keys", 4, 2, 1, keys, 40, 7, 1, 0, 64, 1, 9, 512});
    all.push_back({"no keys", 2, 1, 1, 0, 16, 16});
    for (const int64_t streams : {2, 3, 8}) {
        Setting asked{"streams", 8, 4, 1, 333, 40, 72, 2, 2, 64, 2, 9, 512};
        asked.streams = streams;
        all.push_back(asked);
    }
    for (const int64_t page : {1, 7, 16, 64}) all.push_back({"pages", 6, 2, 2, 200, 24, 36, 2, 3, 32, 2, 9, 900, page});
    Setting s{"causal window", 4, 2, 5, 500, 48, 16, 2};
    s.causal = true, s.left = 70;
    all.push_back(s);
    s.name = "extras", s.extras = true, s.left = -1;
    all.push_back(s);
    s.name = "documents", s.extras = false, s.ids = true;
    all.push_back(s);
    s.name = "more rows than a task", s.rows = 45;
    all.push_back(s);
    s.name = "rows before the first key", s.keys = 20;
    all.push_back(s);
    return all;
}

}  // namespace

int main() {
    parallel_entry() = run_threads;
    int failures = 0;
    for (const Setting& s : settings()) {
        failures += check<float>(s, "float32") + check<half_t>(s, "float16") + check<bfloat_t>(s, "bfloat16");
        failures += check<e4m3_t>(s, "e4m3") + check<e5m2_t>(s, "e5m2") + check<int8_t>(s, "int8");
    }
    std::printf("%d lanes, %d failures\n", LANES, failures);
    return failures;
}
