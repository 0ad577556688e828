// One library a head size, dtype and tile width: the ATTNREG_* macros come from library.py.
#include "forward.h"

using namespace attnreg;

#if ATTNREG_PAIRS && defined(ATTNREG_HAS_PAIRS)
typedef Pair Factor;
#else
typedef Single Factor;
#endif

ATTNREG_EXPORT_PARALLEL

ATTNREG_EXPORT int64_t attnreg_params_size() { return sizeof(Params); }

ATTNREG_EXPORT int64_t attnreg_forward(const Params* p) {
    return guarded([p] { return Forward<ATTNREG_ELEMENT, Factor, ATTNREG_HEAD_K, ATTNREG_HEAD_V, ATTNREG_VECTORS, bool(ATTNREG_ADDITIVE)>(*p).run(); });
}
