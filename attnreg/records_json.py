"""Records as JSON lines: plain data only, checked field by field on the way in."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

from attnreg.errors import AttnregError, RecordError
from attnreg.problem import Problem
from attnreg.records import LEVELS, Gate, Policy, Quantiles, Record, Rival
from attnreg.space import NAME

__all__ = ["SCHEMA", "as_evidence", "from_evidence", "from_json", "line", "parse_line", "schema_of", "to_json"]

SCHEMA = 1
_BACKEND = re.compile(r"[a-z][a-z0-9_]{0,79}\Z")
_SLUG = re.compile(r"[a-z0-9-]{1,120}\Z")
_DATE = re.compile(r"\d{4}-\d\d-\d\d(T\d\d:\d\d:\d\dZ)?\Z", re.ASCII)
_NEEDED = ("problem", "backend", "version", "config", "hardware", "software", "date", "origin")
# Evidence is a record without what all records of one identity share.
_SHARED = ("schema", "problem", "hardware", "software", "origin", "evidence")
_MAX_LINE = 1 << 20


def to_json(record: Record) -> dict[str, Any]:
    """Plain data that `from_json` turns back into an equal record; empty fields are left out."""
    data: dict[str, Any] = {"schema": SCHEMA, "problem": record.problem.to_json()}
    for f in fields(record):
        value = getattr(record, f.name)
        if f.name != "problem" and (not _empty(value) or f.name == "config"):
            data[f.name] = _plain(value)
    return data


def line(record: Record) -> str:
    """The record as one line of a database file; equal records give equal lines."""
    return json.dumps(to_json(record), sort_keys=True, allow_nan=False)


def as_evidence(record: Record) -> dict[str, Any]:
    """What a merge keeps of a record: all of it but what records of one identity share."""
    return {name: value for name, value in to_json(record).items() if name not in _SHARED}


def from_evidence(record: Record, entry: Mapping[str, Any]) -> Record:
    """The record that an entry of `record.evidence` was made of, without evidence."""
    shared = {name: value for name, value in to_json(record).items() if name in _SHARED and name != "evidence"}
    return from_json({**shared, **entry})


def parse_line(text: str) -> Record:
    """The record of one line. Raises RecordError naming what is wrong."""
    if len(text) > _MAX_LINE:
        raise RecordError(f"record: a line of {len(text)} characters; the limit is {_MAX_LINE}")
    try:
        data = json.loads(text, parse_constant=_no_constant)
    except RecursionError as error:
        raise RecordError("record: nested too deeply") from error
    except ValueError as error:
        raise RecordError(f"record: not JSON: {error}") from error
    return from_json(data)


def schema_of(data: object) -> int | None:
    """The schema number that a line claims; None where it claims none."""
    schema = data.get("schema") if isinstance(data, Mapping) else None
    return schema if isinstance(schema, int) and not isinstance(schema, bool) else None


def from_json(data: object) -> Record:
    """The record that `to_json` described. Raises RecordError naming what is wrong.

    Only plain data is read: a record holds no path, no module and no code, and unknown fields are refused.
    """
    if not isinstance(data, Mapping):
        raise RecordError(f"record: expected an object, got {type(data).__name__}")
    schema = schema_of(data)
    if schema != SCHEMA:
        newer = "; update attnreg to use it" if schema is not None and schema > SCHEMA else ""
        raise RecordError(f"record: schema: this attnreg reads {SCHEMA}, got {data.get('schema')!r}{newer}")
    try:
        return _read(data)
    except RecordError:
        raise
    except (AttnregError, TypeError, ValueError, KeyError, IndexError, AttributeError, RecursionError) as error:
        raise RecordError(f"record: {error}") from error


def _read(data: Mapping[str, Any]) -> Record:
    known = {f.name for f in fields(Record)} | {"schema"}
    if extra := sorted(set(data) - known):
        raise RecordError(f"record: unknown fields {extra}; schema {SCHEMA} has {sorted(known)}")
    if missing := sorted(set(_NEEDED) - set(data)):
        raise RecordError(f"record: the fields {missing} are missing")
    origin = data["origin"]
    if origin not in ("measured", "static"):
        raise RecordError(f"record: origin: expected 'measured' or 'static', got {origin!r}")
    hardware = _facts("hardware", data["hardware"])
    if not isinstance(hardware.get("slug"), str) or not _SLUG.match(hardware["slug"]):
        raise RecordError(
            f"record: hardware.slug: expected lower-case words joined by '-', got {hardware.get('slug')!r}"
        )
    if origin == "measured" and "times" not in data:
        raise RecordError("record: origin 'measured' needs the field 'times'")
    record = Record(
        problem=Problem.from_json(data["problem"]),
        backend=_backend("backend", data["backend"]),
        version=_version("version", data["version"]),
        config=_config("config", data["config"]),
        hardware=hardware,
        software=_software(data["software"]),
        date=_date("date", data["date"]),
        origin=origin,
        policy=_policy(data.get("policy", {})),
        times=_quantiles("times", data["times"]) if "times" in data else None,
        gate=_gate(data["gate"]) if "gate" in data else None,
        runner_up=_rival("runner_up", data["runner_up"]) if "runner_up" in data else None,
        ties=tuple(_rival("ties", r) for r in _list("ties", data.get("ties", []))),
        refused=tuple(_refusal(r) for r in _list("refused", data.get("refused", []))),
        peak_memory=_count("peak_memory", data.get("peak_memory", 0)),
        trials=_count("trials", data.get("trials", 0)),
        static=_facts("static", data.get("static", {})),
    )
    entries = [dict(entry) for entry in _list("evidence", data.get("evidence", []))]
    for entry in entries:
        from_evidence(record, entry)
    return replace(record, evidence=tuple(entries))


def _empty(value: object) -> bool:
    return (
        value is None or (isinstance(value, (tuple, list, Mapping)) and not value) or (type(value) is int and not value)
    )


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(v) for v in value]
    return value


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is not a number that a record may hold")


def _bad(name: str, want: str, got: object) -> RecordError:
    text = repr(got)
    return RecordError(f"record: {name}: expected {want}, got {text if len(text) <= 80 else text[:77] + '...'}")


def _like(pattern: re.Pattern[str], want: str, name: str, value: object) -> str:
    if not isinstance(value, str) or not pattern.match(value):
        raise _bad(name, want, value)
    return value


def _name(name: str, value: object) -> str:
    return _like(NAME, "a name of letters, digits and _.+-", name, value)


def _backend(name: str, value: object) -> str:
    return _like(_BACKEND, "a backend's name: lower-case letters, digits and _", name, value)


def _text(name: str, value: object) -> str:
    if not isinstance(value, str) or len(value) > 2000:
        raise _bad(name, "a text", value)
    return value


def _version(name: str, value: object) -> str:
    text = _text(name, value)
    if not text.isprintable():  # it is shown in terminals
        raise _bad(name, "a printable text", value)
    return text


def _date(name: str, value: object) -> str:
    return _like(_DATE, "UTC as YYYY-MM-DDTHH:MM:SSZ", name, value)


def _count(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise _bad(name, "an integer >= 0", value)
    return value


def _number(name: str, value: object, *, positive: bool = False) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise _bad(name, "a finite number", value)
    if value < 0 or (positive and value == 0):
        raise _bad(name, "a number above 0" if positive else "a number >= 0", value)
    return float(value)


def _list(name: str, value: object) -> list[Any]:
    if not isinstance(value, list):
        raise _bad(name, "a list", value)
    return value


def _object(name: str, value: object, keys: set[str]) -> Mapping[str, Any]:
    if not isinstance(value, Mapping) or set(value) - keys:
        raise _bad(name, f"an object with the fields {sorted(keys)}", value)
    return value


def _facts(name: str, value: object) -> dict[str, Any]:
    """An object of scalars, or of flat lists and objects of scalars."""
    if not isinstance(value, Mapping):
        raise _bad(name, "an object", value)
    for key, item in value.items():
        inner = list(item.values()) if isinstance(item, Mapping) else item if isinstance(item, list) else [item]
        if not all(isinstance(x, (str, int, float, bool)) or x is None for x in inner):
            raise _bad(f"{name}.{key}", "a number, a text, or a flat list of them", item)
    return dict(value)


def _software(value: object) -> dict[str, Any]:
    facts = _facts("software", value)
    for name in facts.get("backends", {}) if isinstance(facts.get("backends", {}), Mapping) else [None]:
        _backend("software.backends", name)
    return facts


def _config(name: str, value: object) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise _bad(name, "an object", value)
    for key, item in value.items():
        _name(f"{name}.{key}", key)
        if isinstance(item, str):
            _name(f"{name}.{key}", item)
        elif not isinstance(item, (bool, int, float)):
            raise _bad(f"{name}.{key}", "a number, a bool or a name", item)
    return dict(value)


def _quantiles(name: str, value: object) -> Quantiles:
    data = _object(name, value, {"n", "values"})
    values = tuple(_number(f"{name}.values", x, positive=True) for x in _list(f"{name}.values", data["values"]))
    if len(values) != len(LEVELS) or list(values) != sorted(values):
        raise _bad(f"{name}.values", f"{len(LEVELS)} rising times", value)
    count = _count(f"{name}.n", data["n"])
    if not count:
        raise _bad(f"{name}.n", "at least one sample", count)
    return Quantiles(count, values)


def _gate(value: object) -> Gate:
    data = _object("gate", value, {f.name for f in fields(Gate)})
    return Gate(**{key: _number(f"gate.{key}", item) for key, item in data.items()})


def _rival(name: str, value: object) -> Rival:
    data = _object(name, value, {f.name for f in fields(Rival)})
    ratio = tuple(_number(f"{name}.ratio", x, positive=True) for x in _list(f"{name}.ratio", data.get("ratio", [])))
    if len(ratio) not in (0, 3) or list(ratio) != sorted(ratio):
        raise _bad(f"{name}.ratio", "[low, estimate, high]", data.get("ratio"))
    return Rival(
        backend=_backend(f"{name}.backend", data["backend"]),
        version=_version(f"{name}.version", data["version"]),
        config=_config(f"{name}.config", data["config"]),
        seconds=_number(f"{name}.seconds", data["seconds"], positive=True),
        ratio=ratio,
    )


def _refusal(value: object) -> tuple[str, int, str]:
    items = _list("refused", value)
    if len(items) != 3:
        raise _bad("refused", "[backend, how many, the first reason]", value)
    return _backend("refused", items[0]), _count("refused", items[1]), _text("refused", items[2])


def _policy(value: object) -> Policy:
    data = dict(_object("policy", value, {f.name for f in fields(Policy)}))
    if data.get("cache", "warm") not in ("warm", "cold"):
        raise _bad("policy.cache", "'warm' or 'cold'", data["cache"])
    for key in ("threads", "rounds", "dropped"):
        _count(f"policy.{key}", data.get(key, 0))
    if not isinstance(data.get("noisy", False), bool):
        raise _bad("policy.noisy", "a bool", data["noisy"])
    _name("policy.timer", data.get("timer", "perf_counter"))
    if not 0.5 <= _number("policy.confidence", data.get("confidence", 0.99)) < 1:
        raise _bad("policy.confidence", "a number in [0.5, 1)", data["confidence"])
    return Policy(**data)
