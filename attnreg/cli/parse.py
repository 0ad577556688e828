"""Parse what people type: mask, sparsity and score expressions, shapes. Nothing typed is ever evaluated."""

from __future__ import annotations

import ast
import inspect
from typing import Any

import typer

from attnreg import masks, scores, sparsity
from attnreg.errors import AttnregError, SpecError
from attnreg.spec import AttentionSpec

__all__ = ["make_spec", "parse_expression", "parse_shape"]

FAMILIES = {"mask": masks, "sparsity": sparsity, "score": scores}


def parse_expression(family: str, text: str) -> Any:
    """`Causal() & SlidingWindow(255)`, also `causal & sliding_window(255)`, as the expression it says."""
    try:
        tree = ast.parse(text, mode="eval").body
    except SyntaxError as error:
        raise SpecError(f"--{family}: cannot read {text!r}: {error.msg}") from None
    return _build(family, tree, text)


def _build(family: str, node: ast.expr, text: str) -> Any:
    if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.BitAnd, ast.BitOr)):
        left, right = _build(family, node.left, text), _build(family, node.right, text)
        return left & right if isinstance(node.op, ast.BitAnd) else left | right
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Invert):
        return ~_build(family, node.operand, text)
    call = node if isinstance(node, ast.Call) else ast.Call(func=node, args=[], keywords=[])
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", None)
    makers = _makers(family)
    if name is None or name.replace("_", "").lower() not in makers:
        raise SpecError(f"--{family}: cannot read {text!r}; known: {', '.join(m.__name__ for m in makers.values())}")
    maker = makers[name.replace("_", "").lower()]
    try:
        args = [ast.literal_eval(arg) for arg in call.args]
        named = {k.arg: ast.literal_eval(k.value) for k in call.keywords if k.arg}
    except ValueError:
        raise SpecError(f"--{family}: arguments in {text!r} must be plain numbers or tuples of them") from None
    try:
        return maker(*args, **named)
    except TypeError:
        raise SpecError(f"--{family}: {maker.__name__}{inspect.signature(maker)}, got {text!r}") from None


def _makers(family: str) -> dict[str, Any]:
    module = FAMILIES[family]
    leaves: dict[str, Any] = {n: getattr(module, n) for n in module.__all__}
    base = {"mask": masks.Mask, "sparsity": sparsity.Sparsity, "score": scores.Score}[family]
    out: dict[str, Any] = {n: m for n, m in leaves.items() if isinstance(m, type) and issubclass(m, base)}
    out = {n: m for n, m in out.items() if m is not base and n not in ("And", "Or", "Not", "Custom")}
    if family == "mask":
        out["longformer"] = masks.longformer
    return {n.lower(): m for n, m in out.items()}


def parse_shape(text: str) -> tuple[int, ...]:
    """`2x8x512x64` as (2, 8, 512, 64)."""
    try:
        return tuple(int(part) for part in text.lower().replace(",", "x").split("x"))
    except ValueError:
        raise typer.BadParameter(f"expected sizes such as 2x8x512x64, got {text!r}") from None


def make_spec(
    json: str | None, mask: str | None, sparse: str | None, score: str | None, **fields: Any
) -> AttentionSpec:
    """A spec from --spec JSON with the other options laid over it."""
    base = AttentionSpec.model_validate_json(json) if json else AttentionSpec()
    update = {name: value for name, value in fields.items() if value is not None}
    for family, text in (("mask", mask), ("sparsity", sparse), ("score", score)):
        if text is not None:
            update[family] = parse_expression(family, text)
    try:
        spec: AttentionSpec = base.model_copy(update=update)
    except AttnregError as error:
        raise SpecError(str(error)) from None
    return spec
