// Gradients: one library a head size, dtype and tile width, like forward.cpp.
#include "backward.h"

using namespace attnreg;

#if ATTNREG_PAIRS && defined(ATTNREG_HAS_PAIRS)
typedef Pair Factor;
#else
typedef Single Factor;
#endif

ATTNREG_EXPORT_PARALLEL

ATTNREG_EXPORT int64_t attnreg_params_size() { return sizeof(Params); }

ATTNREG_EXPORT int64_t attnreg_backward(const Params* p) {
    return guarded([p] { return Backward<ATTNREG_ELEMENT, Factor, ATTNREG_HEAD_K, ATTNREG_HEAD_V, ATTNREG_VECTORS, bool(ATTNREG_ADDITIVE)>(*p).run(); });
}
