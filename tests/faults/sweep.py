import sys, warnings, time, torch, traceback
warnings.simplefilter("error", RuntimeWarning)
sys.path.insert(0,'tests/faults')
from derivative_cases import CASES, attend, reference
from derivative_ways import FIRST, SECOND, FORWARD, WAYS
from torch.utils._pytree import tree_flatten
import attnreg, contextlib
from attnreg.errors import AttnregError
torch.set_num_threads(1)
backends=sys.argv[1].split(','); cases=sys.argv[2].split(',') if len(sys.argv)>2 and sys.argv[2] else list(CASES); ways=sys.argv[3].split(',') if len(sys.argv)>3 and sys.argv[3] else list(WAYS)
dtype=getattr(torch,sys.argv[4]) if len(sys.argv)>4 else torch.float32
tiles=len(sys.argv)>5
if tiles:
    import attnreg_eager.plan as P
    P.BUDGET=64
    import attnreg_eager.build
tol={torch.float32:1e-3,torch.float64:3e-6,torch.bfloat16:0.15}[dtype]
from collections import Counter
count=Counter()
slow=Counter()
def run(case,fn,inputs,way):
    names=['q','k','v',*case.smooth]
    rest={n:x for n,x in inputs.items() if n not in names}
    return tree_flatten(way(lambda *xs: fn(case,{**dict(zip(names,xs)),**rest}), [inputs[n] for n in names]))[0]
for b in backends:
  for cn in cases:
    case=CASES[cn]
    for wn in ways:
        t0=time.process_time()
        want=run(case,reference,case.inputs(torch.bfloat16 if dtype==torch.bfloat16 else torch.float32) and {n:(x.double() if x.is_floating_point() else x) for n,x in case.inputs(dtype).items()},WAYS[wn])
        with (attnreg.use_backend(b) if b!='default' else contextlib.nullcontext()):
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("error", RuntimeWarning)
                    got=run(case,attend,case.inputs(dtype),WAYS[wn])
            except AttnregError as e:
                count[b,'attnreg error']+=1
                txt=str(e).splitlines()
                if b in('default','eager'): print(b,cn,wn,'ERR',type(e).__name__,' | '.join(txt)[:300])
                elif "use_backend('eager')" not in str(e) and type(e).__name__!='UnsupportedError': print(b,cn,wn,'unnamed',txt[0][:200])
                continue
            except Exception as e:
                count[b,'OTHER']+=1
                print(b,cn,wn,'OTHER',type(e).__name__,str(e).splitlines()[0][:250] if str(e) else '')
                if '-v' in sys.argv: traceback.print_exc()
                continue
        if len(got)!=len(want): print(b,cn,wn,'LEN',len(got),len(want)); continue
        bad=[i for i,(x,y) in enumerate(zip(got,want)) if (x is None)!=(y is None) or (x is not None and not ((x.double()-y).abs().max()<=tol*(1+y.abs().max())))]
        if bad:
            i=bad[0]; print(b,cn,wn,'WRONG',bad[:8], None if got[i] is None else got[i].flatten()[:3], None if want[i] is None else want[i].flatten()[:3]); count[b,'WRONG']+=1
        else: count[b,'ok']+=1
        slow[wn]+=time.process_time()-t0
print(count); print(slow.most_common(6))
