"""Redaction: passwords never leave in what attnreg says, be it an error, a log, a report or progress.

Every text of an error of attnreg's tree, and of any error that it tells of, passes through `redact`. The command line
hides the passwords of its arguments before anything else sees them; only the storage asks for them back.
"""

from __future__ import annotations

import re
import threading
from urllib.parse import unquote

__all__ = ["HIDDEN", "hide", "hide_argument", "redact", "reveal"]

HIDDEN = "***"

_SCHEME = r"[A-Za-z][A-Za-z0-9+.\-]*"
_PATTERNS = (
    # scheme://user:password@, with as many slashes and colons as people type; a password may hold anything but space.
    re.compile(rf"((?:\b{_SCHEME}:?/{{1,3}}|(?<![\w/])(?::/{{1,3}}|/{{2,3}}))[^\s:/@]*):([^\s]*)@"),
    # scheme:user:password@
    re.compile(rf"(\b{_SCHEME}:[^\s:/@]+):([^\s]+)@(?=\S)"),
    # user:password@host
    re.compile(r"((?<![\w:/@.+\-])[\w.%+\-]+):(?![/\s])([^\s@/]+)@(?=[\w\[])"),
)
# The key words of a connection string, which drivers repeat.
_WORDS = re.compile(
    r"(?i)\b((?:ssl_?)?(?:password|passwd|passphrase|pwd)|passfile|pgpass)(\s*=\s*)('[^']*'|\"[^\"]*\"|[^\s&;,'\")]+)"
)
_QUERY = re.compile(rf"(\b{_SCHEME}:/{{0,3}}[^\s?]*\?)(\S+)")
# What may stand in a URL's query and be shown; all else of it may be a secret of some driver's.
_PLAIN = frozenset(
    ("application_name", "channel_binding", "charset", "client_encoding", "connect_timeout", "dbname", "gssencmode",
     "host", "hostaddr", "keepalives", "load_balance_attrs", "mode", "port", "service", "ssl_mode", "sslmode",
     "target_session_attrs", "timeout", "user")
)  # fmt: skip

# What looks like a URL, or begins like a login or a connection string; a path that only has a colon and an @ does not.
_LOOKS = re.compile(rf"(?is)\W*{_SCHEME}\s*(?::|//)|.*://|//|[^/]*:[^/]*@|(?:.*\s|)\w+\s*=")
_SECRET = re.compile(r"(?i)pass|pwd|secret|token|key|cred|auth|sig")
# White space, and letters that nobody writes to stand for it.
_SOLID = {ord(space): 0xF000 + ord(space) for space in " \t\n\r\v\f"}
_SPACES = {stands: space for space, stands in _SOLID.items()}

_guard = threading.Lock()
_kept: dict[str, str] = {}
_secrets: dict[str, re.Pattern[str]] = {}


def redact(text: str) -> str:
    """The text with every password in it hidden: of URLs, whole or mistyped, of connection strings, and known ones."""
    if not {"@", "=", "?"}.isdisjoint(text):
        for pattern in _PATTERNS:
            text = pattern.sub(lambda found: f"{found[1]}:{HIDDEN}@" if found[2] else found[0], text)
        text = _WORDS.sub(lambda found: f"{found[1]}{found[2]}{HIDDEN}", text)
        text = _QUERY.sub(lambda found: found[1] + _query(found[2]), text)
    for known in list(_secrets.values()):
        text = known.sub(HIDDEN, text)
    return text


def hide(text: str) -> str:
    """The text without its passwords, which `reveal` gives back; `redact` knows them from now on, wherever they stand.

    To be called with a whole argument: a URL in it goes up to its end, spaces included.
    """
    solid = text.translate(_SOLID)
    shown = redact(solid).translate(_SPACES)
    if shown != text:
        with _guard:
            while _kept.get(shown, text) != text:  # another password of the same place
                shown = shown.replace(HIDDEN, HIDDEN + "*", 1)
            _kept[shown] = text
            for secret in _of(solid):
                secret = secret.translate(_SPACES)
                _secrets.setdefault(secret, _literal(secret))
    return shown


def hide_argument(text: str) -> str:
    """An argument of a command line, `--name=value` too, with the passwords of what looks like a URL hidden."""
    name, equals, value = text.partition("=")
    if equals and name.startswith("--"):
        return f"{name}={hide_argument(value)}"
    return hide(text) if _LOOKS.match(text) else text


def reveal(text: str) -> str:
    """What `hide` was given, for what it returned; any other text as it is."""
    return _kept.get(text, text)


def _query(text: str) -> str:
    """A URL's query with what is not known to be harmless hidden."""

    def one(part: str) -> str:
        key, equals, _ = part.partition("=")
        if unquote(key).lower() in _PLAIN or part in ("", f"{key}="):
            return part
        return f"{key}={HIDDEN}" if equals else HIDDEN

    query, quote, rest = re.match(r"([^'\"]*)(['\"]?)(.*)", text, re.DOTALL).groups()  # type: ignore[union-attr]  # matches anything
    return "&".join(one(part) for part in re.split("[&;]", query)) + quote + rest


def _of(text: str) -> list[str]:
    """The passwords in an argument, as they stand and decoded."""
    found = [match[2] for pattern in _PATTERNS for match in pattern.finditer(text)]
    found += [match[3] for match in _WORDS.finditer(text)]
    for match in _QUERY.finditer(text):
        for key, equals, value in (part.partition("=") for part in re.split("[&;]", match[2])):
            if not equals or _SECRET.search(unquote(key)):
                found.append(value if equals else key)
    return list(dict.fromkeys(form for one in found for form in (one, unquote(one)) if form.strip(HIDDEN)))


def _literal(secret: str) -> re.Pattern[str]:
    """A known password, wherever it stands; one of a few letters only as a word of its own."""
    escaped = re.escape(secret)
    return re.compile(escaped if len(secret) >= 8 else rf"(?<![A-Za-z0-9_]){escaped}(?![A-Za-z0-9_])")
