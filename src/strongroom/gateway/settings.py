"""The gateway's settings: one TOML file, every key known, a default for each (docs/reference/gateway-settings.md).

Their digest is in every `inference` entry of the log, so whoever loosens a limit is seen to have done it.
"""

from __future__ import annotations

import hashlib
import math
import re
import tomllib
from dataclasses import Field, dataclass, field, fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints
from urllib.parse import urlsplit

from strongroom.core import canonical
from strongroom.core.limits import MIB
from strongroom.errors import UsageError
from strongroom.watch.effective import BITS_PER_PARAMETER, COMPRESSION
from strongroom.watch.rules import RULES, SCOPES, WINDOWS, Rule

_PAGE = "see docs/reference/gateway-settings.md"
_ROLE = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}", re.ASCII)
_MOST = 10**12


def _of(default: Any, doc: str, *, least: float = 0, most: float = _MOST, among: tuple[str, ...] = ()) -> Any:
    """A setting: its default, what it means, and what it may be."""
    return field(default=default, metadata={"doc": doc, "least": least, "most": most, "among": among})


@dataclass(frozen=True)
class Rate:
    """What one scope may have. 0: no limit."""

    requests: int = _of(0, "requests a minute; 0, here and below: no limit")
    burst: int = _of(0, "of them at once; 0: a minute's")
    tokens: int = _of(0, "tokens a minute, `max_tokens` of a request until it is answered")
    tokens_burst: int = _of(0, "of them at once; 0: a minute's")
    concurrency: int = _of(0, "requests under way at a time")

    def tightest(self, other: Rate) -> Rate:
        """Of each limit the smaller one."""
        return Rate(*(_smaller(getattr(self, each.name), getattr(other, each.name)) for each in fields(Rate)))

    def scaled(self, by: float) -> Rate:
        """That part of every limit, and of each at least 1."""
        values = [getattr(self, each.name) for each in fields(Rate)]
        return Rate(*(max(1, math.floor(value * by + 1e-9)) if value else 0 for value in values))


@dataclass(frozen=True)
class Scopes:
    """Limits by scope."""

    key: Rate = Rate(requests=600, burst=60, tokens=200_000, concurrency=16)
    identity: Rate = Rate(requests=600, burst=60, tokens=200_000, concurrency=16)
    team: Rate = Rate(requests=3000, burst=300, tokens=1_000_000, concurrency=64)
    model: Rate = Rate(requests=30_000, burst=3000, concurrency=512)
    everybody: Rate = Rate(requests=60_000, burst=6000, concurrency=1024)


@dataclass(frozen=True)
class Role:
    """Tighter limits of those who have a role; the smallest of all that apply counts."""

    key: Rate = Rate()
    identity: Rate = Rate()
    max_tokens: int = _of(0, "tokens of an answer at most; 0: as everybody")


@dataclass(frozen=True)
class Answer:
    """How long an answer may be."""

    max_tokens_default: int = _of(1024, "tokens where a request does not say", least=1)
    max_tokens: int = _of(4096, "tokens that a request may ask for at most", least=1)


@dataclass(frozen=True)
class Timeouts:
    """Of an upstream, in seconds."""

    first_byte: float = _of(60.0, "until a stream begins; other answers have the whole", least=0.01, most=3600)
    between: float = _of(30.0, "from one chunk to the next", least=0.01, most=3600)
    whole: float = _of(600.0, "for an answer in all", least=0.01, most=86_400)


@dataclass(frozen=True)
class Queue:
    """Requests that wait while an upstream has as many as it takes."""

    length: int = _of(256, "that wait for one upstream at most")
    each: int = _of(16, "of them of one identity")
    wait: float = _of(10.0, "seconds that one waits at most", most=3600)


@dataclass(frozen=True)
class Requests:
    """What is let through."""

    unknown_fields: str = _of(
        "refuse", "what happens to a field that the specification does not have", among=("refuse", "drop")
    )
    control_tokens: tuple[str, ...] = _of(
        (
            *("<|*|>", "[INST]", "[/INST]", "<s>", "</s>", "<<SYS>>", "<</SYS>>", "<bos>", "<eos>"),
            *("<start_of_turn>", "<end_of_turn>"),
        ),
        "texts that speak in another role's name; `*` is at most 64 characters other than `|`",
    )
    words: tuple[str, ...] = _of((), "refused in prompts, whole words, upper case or lower")
    patterns: tuple[str, ...] = _of((), "regular expressions, refused in prompts")
    classifier: str = _of(
        "", 'a URL that is sent `{"texts": [...]}` of each prompt and answers `{"refuse": true}` or false; empty: none'
    )


@dataclass(frozen=True)
class Records:
    """What is kept of each request."""

    durable: str = _of(
        "after", "a record is on disk within a second, or before anything is answered", among=("after", "before")
    )


@dataclass(frozen=True)
class Capture:
    """Prompts and answers that are kept, sealed (section 9 of the specification)."""

    key: str = _of("", "the public key of whoever may read them (`strongroom capture keygen`); empty: none are kept")
    who: tuple[str, ...] = _of((), "principals whose requests are kept; empty: everybody's, of these models")
    models: tuple[str, ...] = _of((), "NAME or NAME@N; empty: all, of these principals. One of both lists is needed")


@dataclass(frozen=True)
class Budget:
    """`[[budgets.rule]]`: the budget of one scope and window, in place of the default one."""

    scope: str = _of("", "which spenders have one together", among=SCOPES)
    window: str = _of("", "in which time (UTC)", among=WINDOWS)
    share: float = _of(0.0, "of W_eff", most=1000)
    floor: int = _of(0, "bits, if that is more")
    hard: bool = _of(default=False, doc="refused beyond it; otherwise an alarm")


@dataclass(frozen=True)
class Budgets:
    """What may leave, against the size of the weights."""

    bits_per_parameter: int = _of(BITS_PER_PARAMETER, "W_eff is parameters · this ÷ compression", least=1, most=64)
    compression: int = _of(COMPRESSION, "how far a thief compresses what leaves", least=1, most=100_000)
    rule: tuple[Budget, ...] = _of((), "see below")

    @property
    def rules(self) -> tuple[Rule, ...]:
        """All that are in force: the default ones, and those of the file in their place or beside them."""
        said = {
            (each.scope, each.window): Rule(each.scope, each.window, each.share, each.floor, each.hard)
            for each in self.rule
        }
        return tuple(({(rule.scope, rule.window): rule for rule in RULES} | said).values())


@dataclass(frozen=True)
class Upstream:
    """`[[upstream]]`: one inference server."""

    url: str = _of("", "http:// or https://, host and port; with a path, what stands before /v1")
    models: tuple[tuple[str, str], ...] = _of(
        (), "a table: what this room calls a model, NAME or NAME@N, and what upstream does"
    )
    channel: str = _of("", "the file with the secret of the private channel of `strongroom infer`")
    key: str = _of("", "a file with an API key that upstream asks for")
    ca: str = _of("", "a file of certificates to trust instead of the machine's")
    weight: int = _of(1, "its part of the requests, beside others that have the model", least=1, most=1000)
    concurrency: int = _of(32, "requests that it takes at a time", least=1, most=100_000)


@dataclass(frozen=True)
class Verify:
    """Answers that are run again (section 7 of the specification)."""

    url: str = _of("", "a `strongroom infer` beside the one that answers; empty: nothing is run again")
    channel: str = _of("", "the file with the secret of its private channel")
    share: float = _of(0.01, "of the answers", most=1)
    stop: bool = _of(default=False, doc="an alarm ends all inference of this gateway; otherwise it is told")
    term: int = _of(0, "a higher number begins a new tally, when an alarm has been looked into: the log sees it")


@dataclass(frozen=True)
class Probe:
    """Whether upstreams are there, asked before a caller finds out."""

    every: float = _of(5.0, "seconds between two looks at each inference server; 0: none", most=3600)


@dataclass(frozen=True)
class Traces:
    """Spans of each request, for OpenTelemetry (section 8 of the specification)."""

    endpoint: str = _of("", "where they go, OTLP over HTTP: http://127.0.0.1:4318/v1/traces; empty: none are made")
    key: str = _of("", "a file with a bearer token that the receiver asks for")
    ca: str = _of("", "a file of certificates to trust instead of the machine's")
    share: float = _of(1.0, "of the requests", most=1)
    parent: str = _of(
        "link",
        "a caller's `traceparent`: linked to, taken as the parent, or not looked at",
        among=("link", "trust", "ignore"),
    )
    service: str = _of("strongroom-gateway", "`service.name`")


@dataclass(frozen=True)
class Redis:
    """Limits that several workers and machines share."""

    url: str = _of("", "redis:// or rediss://; empty: each worker has an equal part of every limit")
    down: str = _of(
        "closed",
        "without an answer from Redis: refuse all, or let each worker give out its share",
        among=("closed", "share"),
    )
    share: float = _of(0.1, "of every limit, for each worker, while Redis is down", least=0.000_001, most=1)
    timeout: float = _of(0.25, "seconds until Redis counts as down", least=0.001, most=60)


@dataclass(frozen=True)
class Settings:
    """Everything that a gateway is told. Make one with `read` or `parse`; the default is a gateway without upstream."""

    limits: Scopes = Scopes()
    role: tuple[tuple[str, Role], ...] = ()
    answer: Answer = Answer()
    timeouts: Timeouts = Timeouts()
    queue: Queue = Queue()
    requests: Requests = Requests()
    records: Records = Records()
    budgets: Budgets = Budgets()
    upstream: tuple[Upstream, ...] = ()
    redis: Redis = Redis()
    verify: Verify = Verify()
    probe: Probe = Probe()
    traces: Traces = Traces()
    capture: Capture = Capture()

    @classmethod
    def read(cls, path: Path) -> Settings:
        """Those of a TOML file; UsageError ``settings.unreadable`` and those of `parse`."""
        try:
            if path.stat().st_size > MIB:
                raise UsageError("settings.unreadable", f"{path} is larger than settings are", hint=_PAGE)
            return cls.parse(path.read_text("utf-8"), str(path))
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError("settings.unreadable", f"can't read the settings {path}: {error}", hint=_PAGE) from None

    @classmethod
    def parse(cls, text: str, name: str = "the settings") -> Settings:
        """UsageError: ``settings.malformed`` (no TOML, a value of another kind or out of range), ``settings.unknown``
        (a key that there is not)."""
        try:
            table = tomllib.loads(text)
        except (tomllib.TOMLDecodeError, RecursionError) as error:
            raise UsageError("settings.malformed", f"{name} is no TOML: {error}", hint=_PAGE) from None
        settings: Settings = _table(cls, table, "")
        _check(settings)
        return settings

    @property
    def digest(self) -> str:
        """SHA-256 of their canonical JSON, in hexadecimal. Passwords in URLs are left out: the log has the digest, and
        a password could be guessed by it."""
        return _digest(self)

    def rates(self, scope: str, roles: tuple[str, ...] = ()) -> Rate:
        """The limits of `scope` for somebody with `roles`."""
        rate: Rate = getattr(self.limits, scope)
        if scope in ("key", "identity"):
            for name, role in self.role:
                if name in roles:
                    rate = rate.tightest(getattr(role, scope))
        return rate

    def max_tokens(self, roles: tuple[str, ...] = ()) -> int:
        """The most tokens of an answer for somebody with `roles`."""
        most = self.answer.max_tokens
        for name, role in self.role:
            if name in roles and role.max_tokens:
                most = min(most, role.max_tokens)
        return most


def _smaller(one: int, other: int) -> int:
    return min(one, other) if one and other else one or other


@cache
def _digest(settings: Settings) -> str:
    return hashlib.sha256(canonical.encode(_plain(settings))).hexdigest()


def _plain(value: Any) -> Any:
    """As canonical JSON has it: a fraction is its shortest text."""
    if is_dataclass(value):
        return {each.name: _plain(getattr(value, each.name)) for each in fields(value)}
    if isinstance(value, tuple):
        return [_plain(each) for each in value]
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, str) and "://" in value:
        parts = urlsplit(value)
        if parts.password is not None:
            host = parts.netloc.rpartition("@")[2]
            return parts._replace(netloc=f"{parts.username or ''}:@{host}").geturl()
    return value


# -- reading ---------------------------------------------------------------------------------------------------------


def _table(kind: Any, table: Any, path: str, base: Any = None) -> Any:
    """An object of the dataclass `kind` from a TOML table; what it does not say is as in `base`."""
    where = f"[{path}]" if path else "the settings"
    if not isinstance(table, dict):
        raise _malformed(path, "is a table", table)
    known = {each.name: each for each in fields(kind)}
    if unknown := sorted(table.keys() - known.keys()):
        raise UsageError(
            "settings.unknown", f"{where}: there is no {unknown[0]!r:.80}, only {', '.join(known)}", hint=_PAGE
        )
    hints = get_type_hints(kind)
    start = kind() if base is None else base
    said = {
        name: _value(known[name], hints[name], value, f"{path}.{name}" if path else name, getattr(start, name))
        for name, value in table.items()
    }
    return replace(start, **said)


def _value(about: Field[Any], kind: Any, value: Any, path: str, base: Any) -> Any:
    if is_dataclass(kind):
        return _table(kind, value, path, base)
    if get_origin(kind) is tuple:
        return _many(get_args(kind)[0], value, path)
    limits = about.metadata
    if kind is str:
        if not isinstance(value, str):
            raise _malformed(path, "is a text", value)
        if limits["among"] and value not in limits["among"]:
            raise _malformed(path, f"is one of {', '.join(limits['among'])}", value)
        return value
    if kind is bool:
        if not isinstance(value, bool):
            raise _malformed(path, "is true or false", value)
        return value
    if isinstance(value, bool) or not isinstance(value, int if kind is int else int | float):
        raise _malformed(path, "is a whole number" if kind is int else "is a number", value)
    if not limits["least"] <= value <= limits["most"] or not math.isfinite(value):
        raise _malformed(path, f"is from {limits['least']:g} to {limits['most']:g}", value)
    return kind(value)


def _many(kind: Any, value: Any, path: str) -> tuple[Any, ...]:
    if get_origin(kind) is tuple:  # a table whose keys are names: sorted, so that their order has no meaning
        inner = get_args(kind)[1]
        if not isinstance(value, dict):
            raise _malformed(path, "is a table", value)
        if is_dataclass(inner):
            return tuple((name, _table(inner, each, f"{path}.{name}")) for name, each in sorted(value.items()))
        if not all(isinstance(each, str) for each in value.values()):
            raise _malformed(path, "has texts only", value)
        return tuple(sorted(value.items()))
    if not isinstance(value, list):
        raise _malformed(path, "is a list", value)
    if is_dataclass(kind):
        return tuple(_table(kind, each, path) for each in value)
    if not all(isinstance(each, str) and each for each in value):
        raise _malformed(path, "is a list of texts", value)
    return tuple(value)


def _check(settings: Settings) -> None:
    """What no single value shows."""
    for name, _ in settings.role:
        if not _ROLE.fullmatch(name):
            raise _malformed("role", "has names of roles, such as partner", name)
    answer = settings.answer
    if answer.max_tokens_default > answer.max_tokens:
        raise _malformed(
            "answer.max_tokens_default", f"is at most max_tokens, {answer.max_tokens}", answer.max_tokens_default
        )
    for pattern in settings.requests.patterns:
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError):
            raise _malformed("requests.patterns", "are regular expressions", pattern) from None
    rules = settings.budgets.rule
    for rule in rules:
        if not rule.scope or not rule.window:
            raise _malformed("budgets.rule", "names its scope and its window", rule)
    if len({(rule.scope, rule.window) for rule in rules}) < len(rules):
        raise _malformed("budgets.rule", "is there once for a scope and window", [rule.scope for rule in rules])
    for upstream in settings.upstream:
        _check_url("upstream.url", upstream.url, ("http", "https"))
    if settings.requests.classifier:
        _check_url("requests.classifier", settings.requests.classifier, ("http", "https"))
    _check_capture(settings.capture)
    if settings.traces.endpoint:
        _check_url("traces.endpoint", settings.traces.endpoint, ("http", "https"))
    if settings.redis.url:
        _check_url("redis.url", settings.redis.url, ("redis", "rediss"))


def _check_capture(capture: Capture) -> None:
    if capture.key and not re.fullmatch("[0-9a-f]{64}", capture.key, re.ASCII):
        raise _malformed("capture.key", "is a public key of 64 hexadecimal digits", capture.key)
    if bool(capture.key) != bool(capture.who or capture.models):  # what everybody says is never kept by an oversight
        raise _malformed("capture", "has a key, and says whose requests or of which models", capture)


def _check_url(path: str, url: str, schemes: tuple[str, ...]) -> None:
    try:
        parts = urlsplit(url)
        fine = parts.scheme in schemes and bool(parts.hostname) and (parts.port or 1) > 0 and not parts.fragment
    except ValueError:
        fine = False
    if not fine or any(ord(each) <= 32 or ord(each) > 126 for each in url):
        raise UsageError(
            "settings.malformed",
            f"{path} is {' or '.join(each + '://' for each in schemes)}, host and port",
            hint=_PAGE,
        )


def _malformed(path: str, expected: str, value: Any) -> UsageError:
    return UsageError("settings.malformed", f"{path} {expected}, and not {value!r:.80}", hint=_PAGE)
