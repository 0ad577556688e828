// One library for each type that keys and values are stored in: the macro ATTNREG_CACHE comes from decode.py.
#include "decode_kernel.h"

using namespace attnreg;

ATTNREG_EXPORT_PARALLEL

ATTNREG_EXPORT int64_t attnreg_decode_params_size() { return sizeof(DecodeParams); }

ATTNREG_EXPORT int64_t attnreg_decode(const DecodeParams* d) {
    return guarded([d] { return Decode<ATTNREG_CACHE>(*d).run(); });
}
