"""Law: no text that attnreg gives out holds a password, however it was written; all else in it stays."""

from __future__ import annotations

import pickle

import pytest

from attnreg import errors, redaction
from attnreg.backend import error_text
from attnreg.redaction import hide, hide_argument, redact, reveal

PASSWORD = "s3cr3t-Pass"


@pytest.fixture(autouse=True)
def _nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redaction, "_secrets", {})
    monkeypatch.setattr(redaction, "_kept", {})


SHOWN = [
    ("postgresql://u:{}@h/n", "postgresql://u:***@h/n"),
    ("postgresql+psycopg://u:{}@h:5432/n?sslmode=require", "postgresql+psycopg://u:***@h:5432/n?sslmode=require"),
    ("postgresql://:{}@h/n", "postgresql://:***@h/n"),
    ("postgresql://u:{}@", "postgresql://u:***@"),
    ("postgresql://u:a@{}@h/n", "postgresql://u:***@h/n"),
    ("postgresql://u:a/{}@h/n", "postgresql://u:***@h/n"),
    ("postgresql://u:a?{}@h/n", "postgresql://u:***@h/n"),
    ("postgresql://u:a#{}@h/n", "postgresql://u:***@h/n"),
    ("postgresql://u:a'{}@h/n", "postgresql://u:***@h/n"),
    ("postgresql://h/n?password={}", "postgresql://h/n?password=***"),
    ("postgresql://h/n?user=u&sslpassword={}&port=1", "postgresql://h/n?user=u&sslpassword=***&port=1"),
    ("postgresql://h/n?passfile=/{}", "postgresql://h/n?passfile=***"),
    ("postgresql://h/n?Pass%77ord={}", "postgresql://h/n?Pass%77ord=***"),
    ("mysql://h/n?ssl_key_token={}", "mysql://h/n?ssl_key_token=***"),
    ("postgresql:/u:{}@h/n", "postgresql:/u:***@h/n"),
    ("postgresql:///u:{}@h/n", "postgresql:///u:***@h/n"),
    ("postgresql:u:{}@h/n", "postgresql:***@h/n"),
    ("postgres//u:{}@h/n", "postgres//u:***@h/n"),
    ("postgresql:/h/n?password={}", "postgresql:/h/n?password=***"),
    ("u:{}@h/n", "u:***@h/n"),
    ("//u:{}@h/n", "//u:***@h/n"),
    ("postgresql ://u:{}@h/n", "postgresql ://u:***@h/n"),
    ("postgresql :/u:{}@h/n", "postgresql :/u:***@h/n"),
    ("postgresql://h/n?{}", "postgresql://h/n?***"),
    ("postgresql://h/n?port=1&{}", "postgresql://h/n?port=1&***"),
    ("could not connect to postgresql://u:{}@h/n: no", "could not connect to postgresql://u:***@h/n: no"),
    ("two: a://u:{0}@h and b://u:{0}@h", "two: a://u:***@h and b://u:***@h"),
    ('invalid dsn: "host=h password={} user=u"', 'invalid dsn: "host=h password=*** user=u"'),
    ("password = 'a {}' user=u", "password = *** user=u"),
    ("(PASSWD={})", "(PASSWD=***)"),
]
KEPT = [
    "postgresql://u@h:5432/n?host=/run/pg&application_name=a",
    "https://sqlalche.me/e/20/e3q8",
    "Global(tokens=(0, 1)) has 3 tokens: 0, 1 and 2",
    "/data/a.cpp:12:3: error: expected 'x' before '@' token",
    "symbol lookup error: libm.so.6: version `GLIBC_2.38' not found",
    "q @ k: [2, 3] @ [3, 2]",
    "-DATTNREG_HEAD_K=64 -DATTNREG_VECTORS=2",
    "is it mounted noexec?): cache=warm",
]


@pytest.mark.parametrize(("text", "shown"), SHOWN)
def test_a_password_is_hidden_and_the_rest_stays(text: str, shown: str) -> None:
    assert redact(text.format(PASSWORD)) == shown
    assert redact(shown) == shown


@pytest.mark.parametrize("text", KEPT)
def test_what_holds_no_password_is_not_touched(text: str) -> None:
    assert redact(text) == text
    assert hide_argument(text) == text


@pytest.mark.parametrize(
    "kind", ["AttnregError", "SpecError", "BackendError", "RecordError", "TuneError", "PluginError"]
)
def test_errors_of_the_tree_hide_what_they_say(kind: str) -> None:
    error = getattr(errors, kind)(f"storage postgresql://u:{PASSWORD}@h/n?password={PASSWORD} cannot be opened")
    for text in (str(error), repr(error), repr(error.args), str(pickle.loads(pickle.dumps(error))), error_text(error)):
        assert PASSWORD not in text
        assert "postgresql://u:***@h/n" in text


def test_errors_with_parts_hide_them_all() -> None:
    url = f"postgresql://u:{PASSWORD}@h/n"
    for error in (errors.InputError("storage", url), errors.UnsupportedError(url, {"a": [url]})):
        for text in (str(error), repr(vars(error)), str(pickle.loads(pickle.dumps(error)))):
            assert PASSWORD not in text


def test_errors_of_others_are_told_without() -> None:
    assert error_text(ValueError(f"postgresql://u:{PASSWORD}@h")) == "ValueError: postgresql://u:***@h"


@pytest.mark.parametrize("password", ["with space", "tab\there", "p@ss", "ключ-слово", "a%40b-long", "x" * 500])
def test_what_was_hidden_is_hidden_wherever_it_stands_and_can_be_asked_for(password: str) -> None:
    url = f"postgresql://u:{password}@h/n"
    shown = hide(url)
    assert shown == "postgresql://u:***@h/n"
    assert reveal(shown) == url
    assert password not in redact(f"driver: no host named {password}, or so")
    assert redact(f"driver: no host named {password}, or so").startswith("driver: no host named ***")


def test_two_passwords_of_one_place_are_told_apart() -> None:
    urls = [f"postgresql://u:{password}@twice/n" for password in ("first-one", "second-one", "first-one")]
    shown = [hide(url) for url in urls]
    assert [reveal(text) for text in shown] == urls
    assert shown[0] == shown[2] != shown[1]


@pytest.mark.parametrize(
    ("argument", "shown"),
    [
        ("postgresql://u:a b-c@h/n", "postgresql://u:***@h/n"),
        ("--storage=postgresql://u:a b-c@h/n", "--storage=postgresql://u:***@h/n"),
        ("--storag=postgresql:/u:a b-c@h/n", "--storag=postgresql:/u:***@h/n"),
        ("/data/a:b@c/problems.jsonl", "/data/a:b@c/problems.jsonl"),
        ("data/a:b@c/problems.jsonl", "data/a:b@c/problems.jsonl"),
        ("causal & ~global((0, 1))", "causal & ~global((0, 1))"),
        ('{"dtype": {"kv": "int8"}}', '{"dtype": {"kv": "int8"}}'),
    ],
)
def test_arguments_are_hidden_where_they_look_like_a_url(argument: str, shown: str) -> None:
    assert hide_argument(argument) == shown
