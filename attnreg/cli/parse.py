"""Parse what people type: mask, sparsity and score expressions. Nothing typed is ever evaluated."""

from __future__ import annotations

import ast
import inspect
import keyword
import re
from typing import Any

from attnreg import masks, scores, sparsity
from attnreg.errors import AttnregError, SpecError
from attnreg.spec import AttentionSpec

__all__ = ["make_spec", "parse_expression"]

FAMILIES = {"mask": masks, "sparsity": sparsity, "score": scores}


def parse_expression(family: str, text: str) -> Any:
    """`Causal() & SlidingWindow(255)`, also `causal & sliding_window(255)`, as the expression it says."""
    try:
        tree = ast.parse(_class_names(family, text), mode="eval").body
    except SyntaxError as error:
        raise SpecError(f"--{family}: cannot read {text!r}: {error.msg}") from None
    return _build(family, tree, text)


def _class_names(family: str, text: str) -> str:
    """The text with a name that Python keeps for itself, such as `global`, as its class's name."""
    kept = {name: maker.__name__ for name, maker in _makers(family).items() if keyword.iskeyword(name)}
    return re.sub(r"\w+", lambda word: kept.get(word[0], word[0]), text)


def _build(family: str, node: ast.expr, text: str) -> Any:
    if family != "mask" and isinstance(node, (ast.BinOp, ast.UnaryOp)):
        raise SpecError(f"--{family}: cannot read {text!r}: only masks are combined by &, | and ~")
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
    except (TypeError, ValueError):  # the first of a set or a key that is a list
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
