"""Store: layers and order of matches, distance, staleness, broken files, and many processes at once."""

from __future__ import annotations

import json
import multiprocessing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from records_for_tests import HARDWARE, VERSIONS, problem, record, rival

from attnreg import AttentionSpec, masks, store
from attnreg.errors import RecordError
from attnreg.records import Policy
from attnreg.records_json import SCHEMA, line, to_json
from attnreg.store import Store
from attnreg.store_files import file_of, read, rewrite


def at(size: int) -> Any:
    return problem(sq=size, skv=size)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setattr("torch.get_num_threads", lambda: 2)
    return Store(tmp_path / "user", tmp_path / "shipped")


def ship(here: Store, made: Any) -> None:
    assert here.shipped is not None
    rewrite(here.shipped, file_of(here.shipped, made), lambda now: [*now, made])


def find(here: Store, wanted: Any, **how: Any) -> list[tuple[str, str, float]]:
    return [(m.rung, m.backend, m.distance) for m in here.find(wanted, HARDWARE, VERSIONS, **how)]


def test_exact_user_then_plugin_then_shipped_then_nearest_then_static(here: Store) -> None:
    ship(here, record())
    here.add(record(backend="sdpa", version="2.13", config={}))
    here.add(record(backend="eager", config={}, problem=at(1024)))
    here.add(record(backend="flex", config={}, origin="static", times=None))
    here.plugins = lambda: [("mine", to_json(record(backend="mine", config={})))]
    assert find(here, problem()) == [
        ("user", "sdpa", 0.0),
        ("plugin", "mine", 0.0),
        ("shipped", "cpu", 0.0),
        ("nearest", "eager", 2.0),
        ("static", "flex", 0.0),
    ]


def test_all_sizes_of_a_bucket_are_exact_and_the_nearest_comes_first(here: Store) -> None:
    here.add(record(backend="sdpa", version="2.13", config={}, problem=at(300)))
    here.add(record(problem=at(500)))
    assert find(here, at(510)) == [("user", "cpu", 0.0), ("user", "sdpa", 0.0)]
    assert find(here, at(290)) == [("user", "sdpa", 0.0), ("user", "cpu", 0.0)]


def test_a_record_that_compared_more_backends_outranks_a_later_one(here: Store) -> None:
    here.add(record())
    later = {"software": {**record().software, "backends": {"eager": "1"}}, "date": "2026-12-01T00:00:00Z"}
    here.add(record(backend="eager", config={}, runner_up=None, **later))
    assert find(here, problem()) == [("user", "cpu", 0.0), ("user", "eager", 0.0)]


def test_neighbours_are_ordered_by_distance_and_end(here: Store) -> None:
    for size, name in ((128, "a"), (256, "b"), (2048, "c"), (16384, "d")):
        here.add(record(backend=name, problem=at(size)))
    found = find(here, at(512))
    assert found[0] == ("nearest", "b", 2.0)
    assert sorted(found[1:]) == [("nearest", "a", 4.0), ("nearest", "c", 4.0)]


@pytest.mark.parametrize(
    "other",
    [
        problem(dtype="bfloat16", kv_dtype="bfloat16"),
        problem(grads=frozenset({"q"})),
        problem(head_dim=128),
        problem(kv_heads=8),
        problem(spec=AttentionSpec(mask=masks.Full())),
        problem(sq=1, square=False),
        problem(strides=("rows", "rows", "rows")),
    ],
)
def test_what_differs_in_more_than_sizes_is_no_neighbour(here: Store, other: Any) -> None:
    here.add(record(problem=other))
    assert find(here, problem()) == []


def test_stale_records_come_after_fresh_ones_and_name_what_differs(here: Store) -> None:
    here.add(record(version="0"))
    here.add(record(backend="sdpa", version="2.13", config={}, problem=at(1024), runner_up=None))
    found = here.find(problem(), HARDWARE, VERSIONS)
    assert [(m.rung, m.backend) for m in found] == [("nearest", "sdpa"), ("user", "cpu")]
    assert found[0].stale == ()
    assert found[1].stale == ("version of cpu (0 then, 1 now)",)


def test_cache_policy_is_part_of_the_key(here: Store) -> None:
    here.add(record(policy=Policy(cache="cold", threads=2)))
    assert find(here, problem()) == []
    assert find(here, problem(), cache="cold") == [("user", "cpu", 0.0)]


def test_another_machine_class_is_not_asked(here: Store) -> None:
    here.add(record(hardware={**record().hardware, "slug": "cpu-other"}))
    assert find(here, problem()) == []


def test_a_custom_mask_has_no_records(here: Store) -> None:
    custom = problem(spec=AttentionSpec(mask=masks.Custom(lambda b, h, p, j: p >= j)))
    here.add(record())
    assert find(here, custom) == []


def test_adding_the_same_problem_combines(here: Store) -> None:
    here.add(record())
    kept = here.add(record(date="2026-12-01T00:00:00Z", runner_up=rival(ratio=(1.2, 1.25, 1.3))))
    assert len(kept.evidence) == 1
    assert [r.date for _, r in here.records("user")] == ["2026-12-01T00:00:00Z"]


def test_a_file_is_json_sorted_and_one_record_a_line(here: Store) -> None:
    for size in (512, 64, 4096):
        here.add(record(problem=at(size)))
    assert here.user is not None
    path = file_of(here.user, record())
    assert path.relative_to(here.user).as_posix() == f"{HARDWARE.slug}/float32-forward.json"
    text = path.read_text()
    assert len(json.loads(text)) == 3
    lines = text.splitlines()[1:-1]
    assert lines == sorted(lines)
    assert [json.loads(x.rstrip(","))["problem"]["sq"] for x in sorted(lines)] == [4096, 512, 64]


@pytest.mark.parametrize(
    "junk",
    [
        b"\x00\xff\xfe garbage",
        b'{"schema": 1, "problem"',
        b"<<<<<<< HEAD",
        b"{}",
        json.dumps({**to_json(record()), "module": "os"}).encode(),
        b"[" * 50_000,
    ],
)
def test_a_broken_line_is_set_aside_and_named_and_the_rest_is_used(here: Store, junk: bytes) -> None:
    here.add(record())
    assert here.user is not None
    path = file_of(here.user, record())
    path.write_bytes(path.read_bytes() + junk + b"\n")
    assert find(here, problem()) == [("user", "cpu", 0.0)]
    assert [b.where for b in here.broken()] == [f"{path}:4"]
    here.add(record(problem=at(64)))
    assert here.broken() == []
    aside = path.with_name(path.name + ".broken").read_text()
    assert aside.strip() == junk.decode("utf-8", "backslashreplace").strip()


def test_a_truncated_file_keeps_what_is_whole(here: Store) -> None:
    for size in (64, 512):
        here.add(record(problem=at(size)))
    assert here.user is not None
    path = file_of(here.user, record())
    whole = path.read_bytes()
    for cut in range(0, len(whole), 101):
        path.write_bytes(whole[:cut])
        kept = read(path)
        assert len(kept.records) == sum(_whole(x) for x in whole[:cut].split(b"\n"))
        here.find(problem(), HARDWARE, VERSIONS)


def _whole(text: bytes) -> bool:
    try:
        return isinstance(json.loads(text.rstrip(b",")), dict)
    except ValueError:
        return False


def test_lines_of_a_newer_schema_are_named_and_survive_writing(here: Store) -> None:
    newer = json.dumps({**to_json(record()), "schema": SCHEMA + 1, "wonder": True}, sort_keys=True)
    assert here.user is not None
    path = file_of(here.user, record())
    path.parent.mkdir(parents=True)
    path.write_text(f"[\n{newer}\n]\n")
    assert find(here, problem()) == []
    here.add(record())
    assert newer in path.read_text()
    assert find(here, problem()) == [("user", "cpu", 0.0)]
    assert "update attnreg" in here.broken()[0].reason


def test_a_broken_plugin_record_is_named(here: Store) -> None:
    here.plugins = lambda: [("bad", {"schema": 1}), ("good", to_json(record()))]
    assert find(here, problem()) == [("plugin", "cpu", 0.0)]
    assert [b.where for b in here.broken()] == ["plugin bad, record 0"]


def test_an_unreadable_or_missing_folder_breaks_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    odd = Store(tmp_path / "file", tmp_path / "missing")
    assert odd.find(problem(), HARDWARE, VERSIONS) == []
    assert odd.broken() == []
    with pytest.raises(RecordError, match="cannot be written"):
        odd.add(record())


def test_a_change_of_the_file_is_seen(here: Store) -> None:
    assert find(here, problem()) == []
    other = Store(here.user, None)
    other.add(record())
    assert find(here, problem()) == [("user", "cpu", 0.0)]


def test_using_puts_another_store_in_force_and_tells_listeners(here: Store) -> None:
    told: list[int] = []
    store.on_change(lambda: told.append(1))
    before = store.current()
    with store.using(here) as now:
        assert store.current() is now is here
        assert len(told) == 1
        here.add(record())
        assert len(told) == 2
    assert store.current() is before
    assert len(told) == 3


def test_describe_and_evidence_say_what_the_issue_asks(here: Store) -> None:
    here.add(record(version="0", evidence=()))
    match = here.find(problem(sq=256, skv=256), HARDWARE, VERSIONS)[0]
    text = "\n".join([match.describe(), *match.evidence()])
    for said in (
        "2026-11-24",
        HARDWARE.slug,
        "sdpa",
        "1.1",
        "1.2",
        "eager, 1 configurations: error 3e-2",
        "version of cpu",
        "octaves",
        "holds for",
    ):
        assert said in text


def _write(folder: Path, me: int, count: int) -> None:
    here = Store(folder, None)
    for n in range(count):
        here.add(record(problem=at(me * 1000 + n + 2), date=f"2026-01-01T00:{me:02}:{n:02}Z"))
        here.add(record(date=f"2026-02-01T00:{me:02}:{n:02}Z", config={"block_q": me}))


def test_eight_writers_and_readers_lose_and_tear_nothing(tmp_path: Path) -> None:
    writers, each = 8, 4
    fork = multiprocessing.get_context("fork")  # eight imports of torch would be most of the test's time
    running = [fork.Process(target=_write, args=(tmp_path, n, each)) for n in range(writers)]
    for process in running:
        process.start()
    reader, reads = Store(tmp_path, None), 0
    while any(process.is_alive() for process in running):
        assert reader.broken() == []
        reads += 1
        for _, seen in reader.records("user"):
            assert seen.backend == "cpu"
    for process in running:
        process.join()
    assert [process.exitcode for process in running] == [0] * writers
    assert reads > 0
    found = [r for _, r in Store(tmp_path, None).records("user")]
    sizes = {r.problem.sq for r in found}
    assert sizes == {n * 1000 + k + 2 for n in range(writers) for k in range(each)} | {512}
    shared = next(r for r in found if r.problem.sq == 512)
    dates = {shared.date, *(e["date"] for e in shared.evidence)}
    assert dates == {f"2026-02-01T00:{n:02}:{k:02}Z" for n in range(writers) for k in range(each)}


def test_equal_content_gives_equal_bytes(tmp_path: Path) -> None:
    made = [record(problem=at(size)) for size in (64, 128, 256)]
    for folder, order in (("a", made), ("b", made[::-1])):
        for one in order:
            Store(tmp_path / folder, None).add(one)
    paths = [file_of(tmp_path / folder, made[0]) for folder in ("a", "b")]
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert line(replace(made[0])) in paths[0].read_text()
