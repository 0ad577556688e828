"""Peers outside of torch: ONNX Runtime and OpenVINO, where they are installed, on what their operators can say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attnreg.masks import Causal, Full
from attnreg.problem import Problem
from attnreg.scores import ScaledDot
from attnreg.sparsity import Dense
from attnreg.testing import Inputs

__all__ = ["UnfitError", "onnxruntime_peer", "openvino_peer", "refuse_whole_matrix"]

Run = Callable[..., Any]


class UnfitError(Exception):
    """The peer cannot compute the problem; the text says why."""


def refuse_whole_matrix(pairs: int, most: int = 1 << 27) -> None:
    """Refuse a peer that holds something for every query-key pair at once where that takes the machine's memory."""
    if pairs > most:
        raise UnfitError(f"only up to 2**{most.bit_length() - 1} query-key pairs, since it holds them all")


def _plain(p: Problem, dtypes: tuple[str, ...]) -> bool:
    """Is it causal? Raises UnfitError unless it is full or causal dot-product attention that both runtimes can say."""
    spec = p.spec
    extras = (
        spec.softcap or spec.bias or spec.alibi or spec.sinks or spec.dropout_p or spec.page_size or spec.return_lse
    )
    if extras or spec.layout != "bhsd" or not isinstance(spec.score, ScaledDot) or p.kv_dtype != p.dtype or p.grads:
        raise UnfitError("only plain inference")
    if not isinstance(spec.sparsity, Dense) or not isinstance(spec.mask, (Full, Causal)):
        raise UnfitError("only full and causal")
    if p.dtype not in dtypes:
        raise UnfitError(f"only {', '.join(dtypes)}")
    refuse_whole_matrix(p.batch * p.q_heads * p.sq * p.skv)  # both take eight bytes a pair and more (measured)
    causal = isinstance(spec.mask, Causal) and p.sq > 1
    if causal and not p.square:
        raise UnfitError("only causal with as many keys as queries")
    return causal


def onnxruntime_peer(p: Problem, inputs: Inputs) -> Run:
    """One query: two products and a softmax over grouped rows. Else the fused MultiHeadAttention, heads abreast."""
    causal = _plain(p, ("float32", "float16"))
    try:
        import onnx
        import onnxruntime
        from onnx import helper
    except ImportError as error:
        raise UnfitError(f"only where onnx and onnxruntime are installed: {error}") from None
    kind = {"float32": onnx.TensorProto.FLOAT, "float16": onnx.TensorProto.FLOAT16}[p.dtype]
    if p.sq == 1:
        shapes = ([p.batch, p.kv_heads, p.group, p.head_dim], [p.batch, p.kv_heads, p.head_dim, p.skv])
        value = [p.batch, p.kv_heads, p.skv, p.head_dim_v]
        nodes = [
            helper.make_node("MatMul", ["q", "k"], ["s"]),
            helper.make_node("Softmax", ["s"], ["p"], axis=-1),
            helper.make_node("MatMul", ["p", "v"], ["out"]),
        ]
        said = dict(zip("qkv", (*shapes, value), strict=True))
    else:
        if p.group > 1 or p.dtype != "float32":
            raise UnfitError("only as many KV heads as query heads, in float32")
        said = {n: [p.batch, s, p.q_heads * d] for n, s, d in zip("qkv", (p.sq, p.skv, p.skv), _dims(p), strict=True)}
        node = helper.make_node(
            "MultiHeadAttention", ["q", "k", "v"], ["out"], domain="com.microsoft", num_heads=p.q_heads,
            scale=p.scale, unidirectional=int(causal),
        )  # fmt: skip
        nodes = [node]
    ins = [helper.make_tensor_value_info(name, kind, shape) for name, shape in said.items()]
    out = helper.make_tensor_value_info("out", kind, None)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(helper.make_graph(nodes, "attention", ins, [out]), opset_imports=opsets, ir_version=9)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    kept: dict[str, Any] = {}

    def run(q: Tensor, k: Tensor, v: Tensor, **named: Any) -> Tensor:
        state = [(x.data_ptr(), x._version) for x in (q, k, v)]
        if kept.get("state") != state:
            kept.update(state=state, feed=_feed(p, Inputs(q, k, v, {}, p, "normal", 0)))
        out = torch.from_numpy(session.run(None, kept["feed"])[0])
        if p.sq == 1:
            return out.reshape(p.batch, p.q_heads, 1, p.head_dim_v)
        return out.view(p.batch, p.sq, p.q_heads, p.head_dim_v).transpose(1, 2)

    return run


def _dims(p: Problem) -> tuple[int, int, int]:
    return p.head_dim, p.head_dim, p.head_dim_v


def _feed(p: Problem, inputs: Inputs) -> dict[str, Any]:
    """The inputs as the graph wants them; laid out once, which is not counted: a runtime's user keeps them so."""
    q, k, v = inputs.q, inputs.k, inputs.v
    if p.sq == 1:
        rows = (q * p.scale).view(p.batch, p.kv_heads, p.group, p.head_dim)
        laid = (rows, k.transpose(-1, -2), v)
    else:
        laid = tuple(x.transpose(1, 2).flatten(2) for x in (q, k, v))  # type: ignore[assignment]  # three either way
    return {name: x.detach().contiguous().numpy() for name, x in zip("qkv", laid, strict=True)}


def openvino_peer(p: Problem, inputs: Inputs) -> Run:
    """OpenVINO's ScaledDotProductAttention, compiled for the CPU for latency."""
    causal = _plain(p, ("float32",))
    if p.group > 1 and p.sq > 1:
        raise UnfitError("only as many KV heads as query heads")
    try:
        import openvino
        import openvino.opset13 as ops
    except ImportError as error:
        raise UnfitError(f"only where openvino is installed: {error}") from None
    q_shape = [p.batch, p.kv_heads, p.group, p.head_dim] if p.sq == 1 else [p.batch, p.q_heads, p.sq, p.head_dim]
    shapes = (q_shape, [p.batch, p.kv_heads, p.skv, p.head_dim], [p.batch, p.kv_heads, p.skv, p.head_dim_v])
    names = [ops.parameter(shape, dtype=np.float32, name=name) for name, shape in zip("qkv", shapes, strict=True)]
    node = ops.scaled_dot_product_attention(*names, causal=causal)
    config = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.compile_model(openvino.Model([node], names, "attention"), "CPU", config)
    request = compiled.create_infer_request()
    rescale = p.scale * p.head_dim**0.5

    def run(q: Tensor, k: Tensor, v: Tensor, **named: Any) -> Tensor:
        if rescale != 1:
            q = q * rescale
        given = [x.detach().view(shape).numpy() for x, shape in zip((q, k, v), shapes, strict=True)]
        request.infer(given, share_inputs=True)
        out = torch.from_numpy(request.get_output_tensor(0).data)
        return out.reshape(p.batch, p.q_heads, p.sq, p.head_dim_v)

    return run
