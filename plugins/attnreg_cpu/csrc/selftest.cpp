// Entry points by which tests look at the shared vector code itself.
#include "convert.h"
#include "parallel.h"
#include "vec.h"
#include "vmath.h"

using namespace attnreg;

ATTNREG_EXPORT_PARALLEL

ATTNREG_EXPORT int64_t attnreg_lanes() { return LANES; }

// count must be a multiple of 16.
ATTNREG_EXPORT void attnreg_exp(const float* x, float* y, int64_t count) {
    for (int64_t i = 0; i < count; i += LANES) store(y + i, vexp(load(x + i)));
}
ATTNREG_EXPORT void attnreg_exp2(const float* x, float* y, int64_t count) {
    for (int64_t i = 0; i < count; i += LANES) store(y + i, vexp2(load(x + i)));
}
ATTNREG_EXPORT void attnreg_tanh(const float* x, float* y, int64_t count) {
    for (int64_t i = 0; i < count; i += LANES) store(y + i, vtanh(load(x + i)));
}
ATTNREG_EXPORT void attnreg_transpose(float* block) {
    vfloat rows[LANES];
    for (int i = 0; i < LANES; ++i) rows[i] = load(block + i * LANES);
    transpose(rows);
    for (int i = 0; i < LANES; ++i) store(block + i * LANES, rows[i]);
}

// Through vectors for the bulk and through scalars for the last 16, so that both conversions are seen.
template <class T>
static void round_trip(const T* from, float* wide, T* back, int64_t count) {
    for (int64_t i = 0; i < count - 16; i += LANES) {
        const vfloat v = load_wide(from + i);
        store(wide + i, v);
        store_narrow(back + i, v);
    }
    for (int64_t i = count - 16; i < count; ++i) {
        wide[i] = widen(from[i]);
        narrow(back + i, wide[i]);
    }
}
ATTNREG_EXPORT void attnreg_round_trip_half(const half_t* from, float* wide, half_t* back, int64_t count) {
    round_trip(from, wide, back, count);
}
ATTNREG_EXPORT void attnreg_round_trip_bfloat(const bfloat_t* from, float* wide, bfloat_t* back, int64_t count) {
    round_trip(from, wide, back, count);
}
template <class T>
static void narrow_all(const float* from, T* to, int64_t count) {
    for (int64_t i = 0; i < count - 16; i += LANES) store_narrow(to + i, load(from + i));
    for (int64_t i = count - 16; i < count; ++i) narrow(to + i, from[i]);
}
ATTNREG_EXPORT void attnreg_narrow_half(const float* from, half_t* to, int64_t count) { narrow_all(from, to, count); }
ATTNREG_EXPORT void attnreg_narrow_bfloat(const float* from, bfloat_t* to, int64_t count) { narrow_all(from, to, count); }

// Adds each item's number + 1 into sum[worker]: the total is items * (items + 1) / 2 whatever the threads do.
ATTNREG_EXPORT void attnreg_count(int64_t items, int64_t threads, int64_t* sum) {
    parallel_for(items, threads, [&](int64_t item, int64_t worker) { sum[worker] += item + 1; });
}
