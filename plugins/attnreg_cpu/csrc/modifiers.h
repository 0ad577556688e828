// Gathers what modifies a tile's scores against one run of keys.
#pragma once
#include "tile.h"

namespace attnreg {

template <class B, class Operand>
void gather_pairs(const B* base, int64_t batch, int64_t head, int64_t row, int64_t key, const Sequence& s, const Tile<Operand>& t,
                  int64_t first, int64_t count, float* out) {
    const B* pointers[MAX_LANES];
    lane_rows(base, batch, head, row, s, t, pointers);
    gather_lanes(pointers, t.lanes(), first, count, key, out);
}

template <class B, class Operand>
void gather_bias(const Params& p, const Sequence& s, const Tile<Operand>& t, int64_t first, int64_t count, float* out) {
    gather_pairs(static_cast<const B*>(p.bias), p.bias_batch, p.bias_head, p.bias_row, p.bias_key, s, t, first, count, out);
}

// `bias` and `allowed` are scratch for count * lanes values, needed where the call has a bias or a dense mask.
template <class Operand>
Modifiers modifiers_of(const Params& p, const Sequence& s, const Documents& documents, const Tile<Operand>& t, int64_t first,
                       int64_t count, float* bias, float* allowed) {
    Modifiers m;
    m.scale = float(p.scale);
    m.softcap = float(p.softcap);
    if (first < t.keys.all.first || first + count - 1 > t.keys.all.last) m.first = t.first, m.last = t.last;
    if (documents.scattered()) m.documents = t.document, m.key_documents = documents.ids(s.batch);
    if (p.alibi) m.slopes = t.slope, m.positions = t.position, m.excess = t.excess;
    if (p.bias) {
        switch (p.bias_type) {
            case 0: gather_bias<float>(p, s, t, first, count, bias); break;
            case 1: gather_bias<half_t>(p, s, t, first, count, bias); break;
            default: gather_bias<bfloat_t>(p, s, t, first, count, bias); break;
        }
        m.bias = bias;
    }
    if (p.mask) {
        gather_pairs(p.mask, p.mask_batch, p.mask_head, p.mask_row, p.mask_key, s, t, first, count, allowed);
        m.allowed = allowed;
    }
    return m;
}

}  // namespace attnreg
