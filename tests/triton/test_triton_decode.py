"""Split-KV decoding: any number of splits gives what one run of the keys gives, paged and packed too."""

from __future__ import annotations

import pytest
import torch
from flash_cases import core, inference, quick, taken, without_gradients
from hypothesis import given
from hypothesis import strategies as st

from attnreg import AttentionSpec, Problem, masks
from attnreg.hardware import detect
from attnreg.testing import BackendConformance, cases, check_inputs, make_inputs
from attnreg_triton.flash import TritonDecode
from attnreg_triton.flash_space import SPLITS, split_seed

HARDWARE = detect("cpu")
DECODE = TritonDecode()
TAKEN = taken(DECODE, [without_gradients(case) for case in cases() if inference(case)])


class TestTritonDecode(BackendConformance):
    backend = DECODE
    cases = core((case for case in quick(TAKEN) if case.problem.sq <= 8), "few_queries", "paged_bhsd_decode")
    configurations = 2


@pytest.mark.slow
class TestTritonDecodeWhole(BackendConformance):
    backend = DECODE
    cases = TAKEN


SPECS = {
    "plain": AttentionSpec(return_lse=True),
    "window_sinks": AttentionSpec(mask=masks.Causal() & masks.SlidingWindow(40), sinks=True, return_lse=True),
    "padding_bias": AttentionSpec(mask=masks.Padding(), bias=True, softcap=6.0, return_lse=True),
    "paged_bshd": AttentionSpec(mask=masks.Causal(), page_size=8, layout="bshd", return_lse=True),
    "paged_thd": AttentionSpec(mask=masks.Causal() & masks.Padding(), page_size=24, layout="thd", return_lse=True),
    "alibi_thd": AttentionSpec(mask=masks.Causal(), layout="thd", alibi=True, return_lse=True),
}


def step(spec: AttentionSpec, dtype: str = "bfloat16", sq: int = 2, **sizes: object) -> Problem:
    """A decoding step of 3 sequences over at most 120 keys."""
    plain: dict[str, object] = {"batch": 3, "q_heads": 6, "kv_heads": 2, "sq": sq, "skv": 120, "head_dim": 32}
    plain |= {"head_dim_k": 32, "head_dim_v": 32, "dtype": dtype, "kv_dtype": dtype}
    if spec.layout == "thd":
        plain |= {"total_q": 2 * sq + 1, "total_k": 0 if spec.page_size else 200}
    if spec.page_size:
        plain |= {"pages": 3 * 120 // spec.page_size + 2}
    return Problem(spec=spec, **(plain | sizes))  # type: ignore[arg-type]  # sizes come by name


@pytest.mark.parametrize("splits", [3, 64])
@pytest.mark.parametrize("name", SPECS)
def test_any_split_is_right(name: str, splits: int) -> None:
    """Splits that see no key at all, 64 of them for at most 8 tiles, change nothing."""
    inputs = make_inputs(step(SPECS[name]), "huge" if "paged" in name else "normal")
    assert DECODE.supports(inputs.problem, HARDWARE) == []
    space = DECODE.space(inputs.problem, HARDWARE)
    splits = max(s for s in space.choices["splits"] if int(s) <= splits)
    run = DECODE.prepare(inputs.problem, space.check({"splits": splits, "block_n": 16}))
    result = check_inputs(run, inputs)
    assert result.ok, result.reason


def test_rows_without_keys_and_splits() -> None:
    """A sequence of no keys gives 0 and -inf (its sink, where there is one) whatever the splits."""
    for sinks in (False, True):
        spec = AttentionSpec(mask=masks.Padding(), sinks=sinks, return_lse=True)
        inputs = make_inputs(step(spec, "float32", sq=1))
        tensors = inputs.tensors | {"kv_lengths": torch.tensor([0, 120, 1])}
        space = DECODE.space(inputs.problem, HARDWARE)
        run = DECODE.prepare(inputs.problem, space.check({"splits": 4}))
        out, lse = run(inputs.q, inputs.k, inputs.v, **tensors)
        assert not out[0].any()
        expected = tensors["sinks"].view(-1, 1) if sinks else torch.full((6, 1), -torch.inf)
        torch.testing.assert_close(lse[0], expected.float())
        assert torch.isfinite(out).all()


def test_mla_latent_heads() -> None:
    """DeepSeek's absorbed form: 576 columns of q.k in a block of 512 and a tail of 64, 512 of v, one KV head."""
    spec = AttentionSpec(return_lse=True)
    asked = step(spec, "float16", sq=1, q_heads=16, kv_heads=1, head_dim=576, head_dim_k=576, head_dim_v=512, skv=70)
    inputs = make_inputs(asked)
    assert DECODE.supports(inputs.problem, HARDWARE) == []
    space = DECODE.space(inputs.problem, HARDWARE)
    result = check_inputs(DECODE.prepare(inputs.problem, space.check({"splits": 2, "block_n": 16})), inputs)
    assert result.ok, result.reason


@given(programs=st.integers(1, 400), tiles=st.integers(1, 5000), cores=st.integers(1, 304))
def test_split_seed_is_the_smallest_that_fills(programs: int, tiles: int, cores: int) -> None:
    """The law of the heuristic, by brute force: 85% of the best fill, and no smaller count reaches that."""
    found = split_seed(programs, tiles, cores)
    offered = [s for s in SPLITS if s <= min(cores, tiles)]
    assert found in offered
    if programs >= 0.8 * cores:
        assert found == 1
        return

    def busy(splits: int) -> float:
        work = programs * splits
        waves = -(-work // cores)
        return work / (waves * cores)

    best = max(map(busy, offered))
    assert busy(found) >= 0.85 * best
    assert all(busy(s) < 0.85 * best for s in offered if s < found)


def test_refusals_name_the_reason() -> None:
    many = step(AttentionSpec(), sq=100, skv=128)
    assert any("100 queries" in reason for reason in DECODE.supports(many, HARDWARE))
    trained = step(AttentionSpec(), grads=frozenset("q"))
    assert any("gradient" in reason for reason in DECODE.supports(trained, HARDWARE))
