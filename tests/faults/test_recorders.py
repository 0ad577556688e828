"""Law: what a recorder keeps of a call contains the attention, from every entry, hot or cold; or the call says no."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from recorder_cases import (
    CASES,
    ENTRIES,
    RECORDERS,
    AsModule,
    FunctionLog,
    Layer,
    Log,
    attend,
    by_export,
    by_fx,
    by_jit,
    by_make_fx,
    inputs,
    layer_reference,
    on,
    prepared,
    reference,
)
from torch import Tensor
from torch.utils import checkpoint as checkpoints
from torch.utils.flop_counter import FlopCounterMode

import attnreg
from attnreg import AttentionSpec, hot, masks

BACKENDS = (None, "eager", "sdpa", "cpu")
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
Grid = tuple[str, str, str | None, str, bool]


def grid() -> list[Any]:
    """Every recorder by every backend, entries, cases and tables taken in turn; the whole product is slow."""
    cells = []
    entries, n = list(ENTRIES), 0
    for recorder in RECORDERS:
        for backend in BACKENDS:
            for case in CASES:
                for entry in entries:
                    for heat in (False, True):
                        few = case == ("causal", "padding")[n % 2] and entry == entries[n % 3] and heat == bool(n % 2)
                        cell = (recorder, entry, backend, case, heat)
                        name = f"{recorder}-{entry}-{backend}-{case}-{'hot' if heat else 'cold'}"
                        cells.append(pytest.param(*cell, id=name, marks=[] if few else pytest.mark.slow))
            n += 1
    return cells


def heat_up(function: Any, case: Any) -> None:
    """An equal call, and one whose keys have grown."""
    function(*inputs(case, 1))
    function(*inputs(case, 1, (case.sizes[0], case.sizes[1] + 1)))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("recorder", "entry", "backend", "name", "heat"), grid())
def test_what_is_kept_computes_with_other_inputs(
    recorder: str, entry: str, backend: str | None, name: str, heat: bool
) -> None:
    case = CASES[name]
    hot.clear()
    with torch.no_grad():
        with on(backend):
            function = ENTRIES[entry](case)
            if heat:
                heat_up(function, case)
            kept = RECORDERS[recorder](Layer(function).forward, inputs(case, 2))
        other = inputs(case, 5)
        torch.testing.assert_close(kept(*other).double(), layer_reference(case, *other), **CLOSE)


def gradients(function: Any, arguments: list[Tensor]) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in arguments[:3]]
    torch.autograd.backward(function(*leaves, *arguments[3:]).sin().sum())
    return [x.grad for x in leaves if x.grad is not None]


def wanted_gradients(case: Any, arguments: list[Tensor]) -> list[Tensor]:
    return [x.double() for x in gradients(lambda *a: reference(case, *a), [x.double() for x in arguments[:3]])]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("recorded_with", [False, True])
def test_a_jit_program_has_gradients(backend: str | None, recorded_with: bool) -> None:
    """Also where it was traced without any."""
    case = CASES["causal"]
    with on(backend):
        program = by_jit(attend(case), [x.requires_grad_(recorded_with) for x in inputs(case, 2)])
    other = inputs(case, 5)
    for got, want in zip(gradients(program, other), wanted_gradients(case, other), strict=True):
        torch.testing.assert_close(got.double(), want, **CLOSE)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", ["real", "fake", pytest.param("symbolic", marks=pytest.mark.slow)])
def test_make_fx_keeps_gradients(backend: str | None, mode: str) -> None:
    case = CASES["causal"]

    def step(*leaves: Tensor) -> Any:
        return torch.autograd.grad(attend(case)(*leaves).sin().sum(), leaves)

    with on(backend):
        kept = by_make_fx(mode)(step, [x.requires_grad_() for x in inputs(case, 2)])
    other = inputs(case, 5)
    found = kept(*[x.clone().requires_grad_() for x in other])
    for got, want in zip(found, wanted_gradients(case, other), strict=True):
        torch.testing.assert_close(got.double(), want, **CLOSE)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("entry", [attend, prepared])
@pytest.mark.parametrize("how", ["reentrant", "not_reentrant", "selective"])
def test_checkpoints(backend: str | None, entry: Any, how: str) -> None:
    case = CASES["causal"]
    options: dict[str, Any] = {"use_reentrant": how == "reentrant"}
    if how == "selective":
        policy = checkpoints.CheckpointPolicy.MUST_SAVE

        def keep() -> Any:
            return checkpoints.create_selective_checkpoint_contexts(lambda ctx, op, *a, **k: policy)

        options["context_fn"] = keep
    other = inputs(case, 5)
    with on(backend):
        function = entry(case, True) if entry is prepared else entry(case)
        found = gradients(lambda *a: checkpoints.checkpoint(function, *a, **options), other)
    for got, want in zip(found, wanted_gradients(case, other), strict=True):
        torch.testing.assert_close(got.double(), want, **CLOSE)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("heat", [False, True])
def test_modes_see_the_call(backend: str | None, entry: str, heat: bool) -> None:
    """A mode that reads operators meets the attention, and so does one that reads functions; results stay right."""
    case = CASES["causal"]
    other = inputs(case, 5)
    with torch.no_grad(), on(backend):
        function = ENTRIES[entry](case)
        if heat:
            heat_up(function, case)
        with Log() as log:
            first = function(*other)
        with FunctionLog() as functions:
            second = function(*other)
        with FlopCounterMode(display=False) as counter:
            function(*other)
    for out in (first, second):
        torch.testing.assert_close(out.double(), reference(case, *other), **CLOSE)
    products = ("attnreg.attention", "scaled_dot_product", "bmm")
    assert any(word in name for name in log.seen for word in products), log.seen
    assert {"attention", "merge_states"} & set(functions.seen), functions.seen
    # torch itself counts nothing for the kernel of its own that sdpa calls on the CPU.
    assert counter.get_total_flops() > 0 or "_scaled_dot_product_flash_attention_for_cpu" in " ".join(log.seen)


SIZES = [({2: "s"}, {2: "t"}), ({0: "b"}, {0: "b"}), ({0: "b", 2: "s"}, {0: "b", 2: "t"}), ({2: "s"}, {2: "s"})]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dims", SIZES)
def test_exports_of_dynamic_sizes(backend: str | None, dims: tuple[dict[int, str], dict[int, str]]) -> None:
    case, (of_q, of_k) = CASES["causal"], dims
    made = {name: torch.export.Dim(name, min=2, max=512) for name in ("b", "s", "t")}
    shapes = [{n: made[name] for n, name in one.items()} for one in (of_q, of_k, of_k)]
    square = of_q.get(2) is not None and of_q.get(2) == of_k.get(2)
    with torch.no_grad():
        with on(backend):
            arguments = tuple(inputs(case, 2, (13, 13) if square else None))
            program = torch.export.export(
                AsModule(attend(case)), arguments, dynamic_shapes={"arguments": tuple(shapes)}
            )
        sizes = (21, 21) if square else (19, 27) if 2 in of_q else None
        other = inputs(case, 4, sizes, batch=5 if 0 in of_q else 2)
        torch.testing.assert_close(program.module()(*other).double(), reference(case, *other), **CLOSE)


@pytest.mark.parametrize("kept_by", [by_export, by_jit])
def test_another_process_runs_what_was_saved(kept_by: Any, tmp_path: Path) -> None:
    case = CASES["causal"]
    other = inputs(case, 5)
    with torch.no_grad(), attnreg.use_backend("cpu"):
        if kept_by is by_export:
            torch.export.save(torch.export.export(AsModule(attend(case)), tuple(inputs(case, 2))), tmp_path / "saved")
            load = "torch.export.load(folder + '/saved').module()"
        else:
            torch.jit.save(by_jit(attend(case), inputs(case, 2)), str(tmp_path / "saved"))  # type: ignore[no-untyped-call]
            load = "torch.jit.load(folder + '/saved')"
    torch.save(other, tmp_path / "inputs")
    code = f"import attnreg, sys, torch\nfolder = sys.argv[1]\nrun = {load}\n"
    code += "torch.save(run(*torch.load(folder + '/inputs')), folder + '/out')"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(torch.load(tmp_path / "out").double(), reference(case, *other), **CLOSE)


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("backend", [None, "eager"])
def test_graphs_of_fx_are_modules_like_others(entry: str, backend: str | None) -> None:
    """One node a call and nothing beside it; they print, copy, pickle and are traced again."""
    case = CASES["causal"]
    with on(backend):
        function = ENTRIES[entry](case)
        graph: Any = by_fx(function, inputs(case, 2))
    targets = [getattr(node.target, "__name__", node.target) for node in graph.graph.nodes]
    allowed = {"q", "k", "v", "output", "spec_of_text", "attention", "attention_by", "merge_states", "getitem"}
    assert set(targets) <= allowed, targets
    assert targets.count("attention") + targets.count("attention_by") == (2 if entry == "merged" else 1)
    other = inputs(case, 5)
    for again in (copy.deepcopy(graph), pickle.loads(pickle.dumps(graph)), torch.fx.symbolic_trace(graph)):
        assert "attnreg" in str(again.code)
        torch.testing.assert_close(again(*other).double(), reference(case, *other), **CLOSE)


@pytest.mark.parametrize("backend", [None, "eager", "sdpa"])
@pytest.mark.parametrize("recorder", ["make_fx_real", "jit", "jit_file", "export", "fx"])
@pytest.mark.filterwarnings("ignore")
def test_dropout_is_drawn_anew_at_each_replay(backend: str | None, recorder: str) -> None:
    """And the backward pass meets that of its forward: out is linear in v, so sum(dL/dv * v) = L for L = sum(out)."""
    spec = AttentionSpec(dropout_p=0.4)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return attnreg.attention(spec, q, k, v)

    arguments = inputs(CASES["causal"], 2)
    with torch.no_grad(), on(backend):
        kept = RECORDERS[recorder](call, arguments)
    assert not torch.equal(kept(*arguments), kept(*arguments))
    q, k, v = (x.requires_grad_() for x in arguments)
    out = kept(q, k, v)
    (grad,) = torch.autograd.grad(out.sum(), v)
    torch.testing.assert_close((grad * v).sum(), out.sum(), rtol=1e-4, atol=1e-4)


def test_what_cannot_be_recorded_says_so() -> None:
    q, k, v = inputs(CASES["causal"], 2)
    custom, dropout = AttentionSpec(mask=masks.Custom(lambda b, h, p, j: p >= j)), AttentionSpec(dropout_p=0.5)
    generator = torch.Generator()

    def drawn(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return attnreg.attention(dropout, q, k, v, generator=generator)

    def own(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return attnreg.attention(custom, q, k, v)

    for record in (by_jit, by_fx):
        with pytest.raises(attnreg.errors.SpecError, match="JSON"):
            record(own, [q, k, v])
    with pytest.raises(attnreg.errors.InputError, match="generator"):
        by_jit(drawn, [q, k, v])
    with pytest.raises(attnreg.errors.InputError, match="Proxy"):
        torch.fx.symbolic_trace(lambda q, k, v: attnreg.prepare(CASES["causal"].spec, q, k, v))
    with attnreg.use_backend("cpu"), pytest.raises(attnreg.errors.InputError, match="functionalize"):
        torch.func.functionalize(torch.func.grad(lambda q: attend(CASES["causal"])(q, k, v).sum()))(q)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("grads", ["", "q,k,v"])
def test_torch_checks_the_operator(name: str, grads: str) -> None:
    case = CASES[name]
    q, k, v, *tensors = inputs(case, 2)
    leaves = [x.requires_grad_(bool(grads)) for x in (q, k, v)]
    texts = (case.spec.model_dump_json(exclude_defaults=True), grads, "cpu", "{}")
    torch.library.opcheck(
        torch.ops.attnreg.attention.default, (*leaves, *texts), dict(zip(case.names, tensors, strict=True))
    )


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("mapped", ["q", "q k v", "k named", "q k v named"])
def test_vmap_is_one_call(name: str, mapped: str, recwarn: pytest.WarningsRecorder) -> None:
    case = CASES[name]
    samples = [inputs(case, seed) for seed in (3, 4, 6)]
    places = ["q", "k", "v", *("named" for _ in case.names)]
    dims = [0 if place in mapped.split() else None for place in places]
    stacked = [torch.stack(x) if d == 0 else x[0] for x, d in zip(zip(*samples, strict=True), dims, strict=True)]
    calls: list[int] = []
    with attnreg.use_backend("cpu"), pytest.MonkeyPatch.context() as patch:
        from attnreg import operators

        whole = operators._kernels
        patch.setattr(operators, "_kernels", lambda *a: (calls.append(1), whole(*a))[1])
        got = torch.vmap(attend(case), in_dims=tuple(dims))(*stacked)
    one = [[x if d == 0 else first for x, first, d in zip(s, samples[0], dims, strict=True)] for s in samples]
    torch.testing.assert_close(got.double(), torch.stack([reference(case, *a) for a in one]), **CLOSE)
    assert len(calls) == 1
    assert not [w for w in recwarn if "performance drop" in str(w.message)]


def test_import_loads_no_compiler() -> None:
    code = (
        "import attnreg, sys; print([m for m in ('torch._dynamo', 'triton', 'torch.utils.flop_counter', 'attnreg_cpu')"
    )
    code += " if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
