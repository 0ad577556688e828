"""Built-in lists of problems: the suites that bench and tune share, and the attention shapes of known models."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from attnreg import masks
from attnreg.errors import TuneError
from attnreg.problem import Problem, TensorInfo
from attnreg.sparsity import BigBird
from attnreg.spec import AttentionSpec, Precision

__all__ = ["MODELS", "SUITES", "Case", "attention_problem", "model_shape", "suite"]

CAUSAL = masks.Causal()
QKV = frozenset({"q", "k", "v"})
# Dtype and broadcast dimensions of the call tensors that the suites need; B is 1 or more.
_TENSORS: Mapping[str, Callable[[int], tuple[str, tuple[int, ...]]]] = {
    "document_ids": lambda batch: ("int64", (int(batch == 1), 0)),
    "kv_lengths": lambda batch: ("int64", (int(batch == 1),)),
    "k_descale": lambda batch: ("float32", (1,)),
    "v_descale": lambda batch: ("float32", (1,)),
}


@dataclass(frozen=True)
class Case:
    """A named problem of a suite."""

    name: str
    problem: Problem


def attention_problem(
    spec: AttentionSpec,
    heads: tuple[int, int],
    sq: int,
    skv: int,
    dim: int,
    *,
    batch: int = 1,
    dim_v: int | None = None,
    dtype: str = "float32",
    grad: bool = False,
    device: str = "cpu",
) -> Problem:
    """A problem with contiguous tensors: heads (query, KV), lengths, head_dim; k and v stored as the spec says."""
    kv = spec.dtype.kv
    tensors = []
    for name in sorted(spec.tensors()):
        kind, dims = _TENSORS[name](batch)
        tensors.append(TensorInfo(name, kind, dims))
    return Problem(
        spec=spec,
        batch=batch,
        q_heads=heads[0],
        kv_heads=heads[1],
        sq=sq,
        skv=skv,
        head_dim=dim,
        head_dim_k=dim,
        head_dim_v=dim if dim_v is None else dim_v,
        dtype=dtype,
        kv_dtype=dtype if kv == "same" else kv,
        device=device,
        tensors=tuple(tensors),
        grads=QKV if grad else frozenset(),
        square=sq == skv,
    )


def _prefill() -> list[Case]:
    full, causal = AttentionSpec(), AttentionSpec(mask=CAUSAL)
    out = [
        Case("full D64 S2048", attention_problem(full, (8, 8), 2048, 2048, 64)),
        Case("causal D64 S2048", attention_problem(causal, (8, 8), 2048, 2048, 64)),
        Case("causal D128 S2048", attention_problem(causal, (8, 8), 2048, 2048, 128)),
        Case("causal GQA 32/8 D128 S1024", attention_problem(causal, (32, 8), 1024, 1024, 128)),
        Case("causal B8 S128", attention_problem(causal, (8, 8), 128, 128, 64, batch=8)),
        Case("causal S512", attention_problem(causal, (8, 8), 512, 512, 64)),
    ]
    return out + [
        Case(f"causal D64 S2048 {dtype}", attention_problem(causal, (8, 8), 2048, 2048, 64, dtype=dtype))
        for dtype in ("float16", "bfloat16")
    ]


def _decode() -> list[Case]:
    one = AttentionSpec(mask=CAUSAL)
    shapes = {"GQA 32/8 8K": ((32, 8), 8192, 1), "MHA 4K": ((32, 32), 4096, 1), "GQA 32/8 B8 2K": ((32, 8), 2048, 8)}
    out = []
    for dtype in ("float32", "bfloat16", "float16"):
        for name, (heads, keys, batch) in shapes.items():
            made = attention_problem(one, heads, 1, keys, 128, batch=batch, dtype=dtype)
            out.append(Case(f"decode {name} {dtype}", made))
    out.append(Case("decode MQA 16K D64", attention_problem(one, (32, 1), 1, 16384, 64)))
    for kv in ("float8_e4m3fn", "int8"):
        quantised = AttentionSpec(mask=CAUSAL, dtype=Precision(kv=kv))
        for name in ("GQA 32/8 8K", "MHA 4K"):
            heads, keys, batch = shapes[name]
            made = attention_problem(quantised, heads, 1, keys, 128, batch=batch, dtype="bfloat16")
            out.append(Case(f"decode {name} {kv} cache", made))
    return out


def _sparse() -> list[Case]:
    window = AttentionSpec(mask=CAUSAL & masks.SlidingWindow(255))
    documents = AttentionSpec(mask=CAUSAL & masks.Document())
    prefix = AttentionSpec(mask=masks.PrefixLM(512))
    return [
        Case("window 256 S8192", attention_problem(window, (8, 8), 8192, 8192, 64)),
        Case("documents 8 x 1024", attention_problem(documents, (8, 8), 8192, 8192, 64)),
        Case("BigBird S8192", attention_problem(AttentionSpec(sparsity=BigBird(64)), (8, 8), 8192, 8192, 64)),
        Case("prefix-LM 512 of 4096", attention_problem(prefix, (8, 8), 4096, 4096, 64)),
    ]


def _train() -> list[Case]:
    causal = AttentionSpec(mask=CAUSAL)
    return [
        Case("train S1024", attention_problem(causal, (8, 8), 1024, 1024, 64, grad=True)),
        Case("train S2048", attention_problem(causal, (8, 8), 2048, 2048, 64, grad=True)),
        Case("train S1024 bfloat16", attention_problem(causal, (8, 8), 1024, 1024, 64, grad=True, dtype="bfloat16")),
    ]


def _overhead() -> list[Case]:
    return [Case("tiny", attention_problem(AttentionSpec(mask=CAUSAL), (1, 1), 16, 16, 16))]


def _long() -> list[Case]:
    return [Case("causal 131072", attention_problem(AttentionSpec(mask=CAUSAL), (1, 1), 131072, 131072, 64))]


SUITES: Mapping[str, Callable[[], list[Case]]] = {
    "prefill": _prefill,
    "decode": _decode,
    "sparse": _sparse,
    "train": _train,
    "overhead": _overhead,
    "long": _long,
    "models": lambda: _models(),
}
"""Suites by name. `long` and `overhead` are for bench, `models` for GPUs; the others hold what is worth tuning."""


def suite(name: str, device: str = "cpu") -> list[Case]:
    """The cases of a suite, or of all that are worth tuning for "all". Raises TuneError for a name that is none."""
    if name == "all":
        return [case for each in ("prefill", "decode", "sparse", "train") for case in suite(each, device)]
    if name not in SUITES:
        raise TuneError(f"no suite is named {name!r}; there are {', '.join(SUITES)} and all")
    return [Case(case.name, replace(case.problem, device=device)) for case in SUITES[name]()]


@dataclass(frozen=True)
class Model:
    """How a model attends: heads, head sizes, and the specs of its kinds of layer.

    heads: (query, KV). decodes: it generates token by token. cache: heads and sizes of what decoding reads, where
    they differ from prefill's (multi-head latent attention reads the latent: one KV head, wider).
    """

    heads: tuple[int, int]
    dim: int
    specs: tuple[AttentionSpec, ...]
    dim_v: int | None = None
    decodes: bool = True
    cache: tuple[tuple[int, int], int, int] | None = None
    lengths: tuple[int, ...] = (512, 2048)


_CAUSAL = AttentionSpec(mask=CAUSAL)
_PADDED = AttentionSpec(mask=masks.Padding())

MODELS: Mapping[str, Model] = {
    "minilm": Model((12, 12), 32, (_PADDED,), decodes=False, lengths=(32, 128, 256)),
    "bert-base": Model((12, 12), 64, (_PADDED,), decodes=False, lengths=(128, 512)),
    "llama-3-8b": Model((32, 8), 128, (_CAUSAL,)),
    "llama-3-70b": Model((64, 8), 128, (_CAUSAL,)),
    "mistral-7b": Model((32, 8), 128, (AttentionSpec(mask=CAUSAL & masks.SlidingWindow(4095)),)),
    "gemma-2-9b": Model(
        (16, 8),
        256,
        (
            AttentionSpec(mask=CAUSAL, softcap=50.0),
            AttentionSpec(mask=CAUSAL & masks.SlidingWindow(4095), softcap=50.0),
        ),
    ),
    "deepseek-mla": Model((128, 128), 192, (_CAUSAL,), dim_v=128, cache=((128, 1), 576, 512)),
}
"""Published attention shapes: Llama 3 (arXiv:2407.21783), Mistral (2310.06825), Gemma 2 (2408.00118), DeepSeek-V3
(2412.19437; decoding with the absorbed projections), BERT (1810.04805), MiniLM-L6 (2002.10957)."""


def model_shape(
    name: str, *, dtype: str = "float32", batch: int = 1, lengths: tuple[int, ...] | None = None, device: str = "cpu"
) -> list[Case]:
    """A model's problems: a prefill and, if it generates, a decoding step at each length. Raises TuneError."""
    if name not in MODELS:
        raise TuneError(f"no model shape is named {name!r}; there are {', '.join(MODELS)}")
    model = MODELS[name]
    out = []
    for spec in model.specs:
        for n in lengths or model.lengths:
            made = attention_problem(
                spec, model.heads, n, n, model.dim, batch=batch, dim_v=model.dim_v, dtype=dtype, device=device
            )
            out.append(Case(f"{name} prefill {n}", made))
            if model.decodes:
                heads, dim, dim_v = model.cache or (model.heads, model.dim, model.dim_v or model.dim)
                step = attention_problem(spec, heads, 1, n, dim, batch=batch, dim_v=dim_v, dtype=dtype, device=device)
                out.append(Case(f"{name} decode {n}", step))
    return out


def _models() -> list[Case]:
    """The shapes of the known generating models and BERT in bfloat16: prefill, decoding, training; 128K for two."""
    out: list[Case] = []
    for name, model in MODELS.items():
        if name == "minilm":
            continue
        heads, dim, dim_v = model.cache or (model.heads, model.dim, model.dim_v or model.dim)
        for spec in model.specs:
            kind = name + (" window" if model.specs.index(spec) else "")

            def prefill(
                n: int, batch: int = 1, grad: bool = False, m: Model = model, s: AttentionSpec = spec, k: str = kind
            ) -> Case:
                made = attention_problem(
                    s, m.heads, n, n, m.dim, batch=batch, dim_v=m.dim_v, dtype="bfloat16", grad=grad
                )
                return Case(f"{k} {'train' if grad else 'prefill'} B{batch} {n}", made)

            if not model.decodes:
                out += [prefill(512, 32), prefill(512, 32, True)]
                continue
            out += [prefill(n) for n in ((2048, 8192, 131072) if name == "llama-3-8b" else (2048, 8192))]
            for n, batch in ((8192, 1), (8192, 16), (131072, 1)):
                made = attention_problem(spec, heads, 1, n, dim, batch=batch, dim_v=dim_v, dtype="bfloat16")
                out.append(Case(f"{kind} decode B{batch} {n}", made))
            if model.cache is None:
                out.append(prefill(4096, 1, True))
    return out
