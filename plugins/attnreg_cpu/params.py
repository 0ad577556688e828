"""The C struct `Params` as an ordered list of fields, and its packing into bytes for one call."""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping

from attnreg_cpu.build import SOURCE_DIR

_POINTER = re.compile(r"\*")


def _read_fields() -> tuple[tuple[str, str], ...]:
    """(name, struct code) of each field in order, read from csrc/params.h so that the two cannot drift."""
    text = (SOURCE_DIR / "params.h").read_text()
    body = text[text.index("struct Params {") : text.index("};")]
    body = re.sub(r"//[^\n]*", "", body.split("{", 1)[1])
    fields: list[tuple[str, str]] = []
    for declaration in body.split(";"):
        words = re.sub(r"\s+", " ", declaration).strip()
        if not words:
            continue
        kind = re.match(r"(?:const )?(void|float|double|int64_t|int32_t|uint64_t|uint8_t)", words)
        assert kind is not None, f"params.h: cannot read {words!r}"
        for part in words[kind.end() :].split(","):
            code = "d" if kind.group(1) == "double" and not _POINTER.search(part) else "q"
            fields.append((part.replace("*", "").strip(), code))
    return tuple(fields)


FIELDS = _read_fields()
INDEX = {name: index for index, (name, _) in enumerate(FIELDS)}
_packer = struct.Struct("=" + "".join(code for _, code in FIELDS))
SIZE = _packer.size


def template(values: Mapping[str, int | float]) -> list[int | float]:
    """All fields at 0 except those given. Raises KeyError for a name that is no field."""
    filled: list[int | float] = [0.0 if code == "d" else 0 for _, code in FIELDS]
    for name, value in values.items():
        filled[INDEX[name]] = value
    return filled


def pack(values: list[int | float]) -> bytes:
    """The struct's bytes. A fresh object a call, because calls on several threads may run at once."""
    return _packer.pack(*values)
