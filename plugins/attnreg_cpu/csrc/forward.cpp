// One library a head size, dtype and tile width: the ATTNREG_* macros come from library.py.
#include "forward.h"

using namespace attnreg;

// ATTNREG_PRODUCT: 0 multiply-adds, 1 the dot instruction of bfloat16 pairs, 2 AMX, 3 AMX with float32 values in parts.
#if ATTNREG_PRODUCT == 3 && defined(ATTNREG_HAS_AMX)
typedef BlockParts Factor;
#elif ATTNREG_PRODUCT == 2 && defined(ATTNREG_HAS_AMX)
typedef BlockPair Factor;
#elif (ATTNREG_PRODUCT == 1 || ATTNREG_PRODUCT == 2) && defined(ATTNREG_HAS_PAIRS)
typedef Pair Factor;
#else
typedef Single Factor;
#endif

ATTNREG_EXPORT_PARALLEL

ATTNREG_EXPORT int64_t attnreg_params_size() { return sizeof(Params); }

ATTNREG_EXPORT int64_t attnreg_forward(const Params* p) {
    typedef Forward<ATTNREG_ELEMENT, Factor, ATTNREG_HEAD_K, ATTNREG_HEAD_V, ATTNREG_VECTORS, bool(ATTNREG_ADDITIVE)> Kernel;
    return guarded([p] { return Kernel(*p).run(); });
}
