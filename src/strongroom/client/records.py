"""What gateways have kept of each request, checked against the heads that the log has (spec/gateway.md, section 6)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from strongroom.core.ids import Ref, parse_id, parse_principal
from strongroom.errors import IntegrityError, NotFound, StrongroomError, Tampered

_LINE_MOST = 64 << 10  # bytes of a record
_READ = 1 << 20
_SUMS = ("requests", "refused", "tokens", "bits")


@dataclass(frozen=True)
class Wanted:
    """Which records are looked for: of a principal, of a version or of all of a name, from a time on (seconds). Streams
    that ended before that time need not be there."""

    by: str = ""
    ref: str = ""
    since: int = 0

    def __post_init__(self) -> None:
        if self.by:
            parse_principal(self.by)
        if self.ref:
            Ref.parse(self.ref)

    def has(self, record: dict[str, Any]) -> bool:
        if record["at"] < self.since * 1000 or (self.by and record["by"] != self.by):
            return False
        return self.names(str(record["ref"]))

    def names(self, ref: str) -> bool:
        """Whether a version is one of those that are looked for."""
        return not self.ref or ref == self.ref or ("@" not in self.ref and ref.partition("@")[0] == self.ref)


class Account(NamedTuple):
    """An `inference` entry of the log: its time (seconds), its version or an empty text, and its body."""

    at: int
    ref: str
    body: dict[str, Any]


@dataclass
class Stream:
    """The chain of one worker. `records`: how many there are; `accounted`: how many of them the log has the head of;
    `unfinished`: bytes at the end that are no record, or none yet. `differences`: versions of which the log's sums are
    others than those of the records, each with both. `problem`: what is wrong, with `code`."""

    stream: str
    records: int = 0
    accounted: int = 0
    unfinished: int = 0
    differences: list[dict[str, Any]] = field(default_factory=list)
    settings: list[str] = field(default_factory=list)
    code: str = ""
    problem: str = ""


def read(accounts: Iterable[Account], folders: Sequence[Path], wanted: Wanted) -> dict[str, Any]:
    """All streams in `folders` against the log's `inference` entries.

    ``ok``, ``streams``, ``records`` (those wanted, by time; `accounted` says whether the log has them), and what they
    come to: ``requests``, ``refused``, ``tokens``, ``bits``; and ``accounts``, what all gateways have told the log of
    each version that is wanted, whenever and for whomever that was. NotFound ``records.missing`` for a folder that
    there is not. What is wrong with a stream is in ``problem`` of it, with ``code``: ``records.tampered`` if a record
    was edited or taken away, ``records.elsewhere`` if the log has it and no folder does, which a gateway on another
    machine explains, ``records.sums`` if the log was told another sum than the records have.
    """
    entries: dict[str, list[Account]] = {}
    last: dict[str, int] = {}
    totals: dict[str, Counter[str]] = {}
    for each in accounts:
        stream_of = each.body["gateway"]
        entries.setdefault(stream_of, []).append(each)
        last[stream_of] = each.at
        if each.ref and wanted.names(each.ref):
            totals.setdefault(each.ref, Counter()).update({name: each.body[name] for name in _SUMS})
    paths = _paths(folders)
    found: list[Stream] = []
    rows: list[dict[str, Any]] = []
    for name in sorted({*paths, *entries}):
        known = entries.get(name, [])
        stream = Stream(name, settings=list(dict.fromkeys(one.body["settings"] for one in known)))
        if name in paths:
            _check(stream, paths[name], known, wanted, rows)
        elif last[name] < wanted.since or not any(one.body["records"] for one in known):
            continue
        else:
            stream.code = "records.elsewhere"
            stream.problem = (
                f"the log has {known[-1].body['records']} records of it, and they are in none of the folders"
            )
        found.append(stream)
    rows.sort(key=lambda each: (each["at"], each["stream"], each["n"]))
    requests = [each for each in rows if each["status"] != 100]  # of a stream the answer's own is the other one
    return {
        "ok": not any(each.code for each in found),
        "streams": [vars(each) for each in found],
        "records": rows,
        "requests": len(requests),
        "refused": sum(each["status"] >= 400 for each in requests),
        "tokens": sum(each["tokens"] for each in requests),
        "bits": sum(each["bits"] for each in requests),
        "accounts": [{"ref": ref, **_plain(told)} for ref, told in sorted(totals.items())],
    }


def _paths(folders: Sequence[Path]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for folder in folders:
        if not folder.is_dir():
            raise NotFound(
                "records.missing",
                f"no gateway has kept records in {folder}",
                hint="--records FOLDER, as `strongroom gateway` was started with",
            )
        for path in sorted(folder.glob("*.jsonl")):
            try:
                parse_id(path.stem)
            except IntegrityError:
                continue  # no gateway names its files so
            found[path.stem] = path
    return found


def _check(stream: Stream, path: Path, accounts: list[Account], wanted: Wanted, rows: list[dict[str, Any]]) -> None:
    from strongroom.gateway.records import verify

    bodies = [each.body for each in accounts]
    accounted = max((body["records"] for body in bodies), default=0)
    # Each version's sums go as far as the newest account of it. One that could not be entered comes with the next.
    until, told = dict[str, int](), dict[str, Counter[str]]()
    for each in accounts:
        if each.body["requests"]:  # else it says what is captured from then on, and counts nothing
            until[each.ref] = max(until.get(each.ref, 0), each.body["records"])
        told.setdefault(each.ref, Counter()).update({name: each.body[name] for name in _SUMS})
    kept = {ref: Counter[str]() for ref in told}
    mine: list[dict[str, Any]] = []

    def take(record: dict[str, Any]) -> None:
        stream.records += 1
        try:
            if record["stream"] != stream.stream:
                raise Tampered("records.tampered", f"record {record['n']} is of another stream")
            row = _row(record, accounted=record["n"] < accounted)
            if record["n"] < until.get(record["ref"], 0):
                said = (1, record["status"] >= 400, record["tokens"], record["bits"])
                kept[record["ref"]].update(dict(zip(_SUMS, said, strict=True)))
            if wanted.has(record):
                mine.append(row)
        except (KeyError, TypeError):
            raise Tampered("records.tampered", f"record {stream.records - 1} is not that of a request") from None

    try:
        verify(_lines(path, stream), bodies, take)
        stream.accounted = accounted
    except StrongroomError as error:
        stream.code, stream.problem = error.code, error.message
        for row in mine:  # edited, maybe: nothing vouches for any of them
            row["accounted"] = False
    else:
        _compare(stream, told, kept)
    rows += mine


def _compare(stream: Stream, told: dict[str, Counter[str]], kept: dict[str, Counter[str]]) -> None:
    """What a gateway has told the log that its own records do not come to."""
    for ref, log in told.items():
        if _plain(log) != _plain(kept[ref]):
            stream.differences.append({"ref": ref, "log": _plain(log), "records": _plain(kept[ref])})
    if stream.differences:
        stream.code = "records.sums"
        stream.problem = "; ".join(
            f"of {each['ref'] or 'no version'} the log has {_said(each['log'])}, its records {_said(each['records'])}"
            for each in stream.differences
        )


def _plain(sums: Counter[str]) -> dict[str, int]:
    return {name: sums[name] for name in _SUMS}


def _said(sums: dict[str, int]) -> str:
    return ", ".join(f"{value} {name}" for name, value in sums.items())


def _row(record: dict[str, Any], *, accounted: bool) -> dict[str, Any]:
    numbers = ("n", "at", "status", "tokens", "bits")
    if (
        not all(type(record[name]) is int for name in numbers)
        or not isinstance(record["by"], str)
        or not isinstance(record["ref"], str)
    ):
        raise TypeError
    return {**record, "accounted": accounted}


def _lines(path: Path, stream: Stream) -> Iterator[bytes]:
    """The whole lines of a file that a gateway may be writing to."""
    try:
        with path.open("rb", buffering=_READ) as file:
            while line := file.readline(_LINE_MOST):
                if line.endswith(b"\n"):
                    yield line[:-1]
                elif len(line) == _LINE_MOST:
                    raise Tampered("records.tampered", "a line is longer than any record")
                else:
                    stream.unfinished = len(line)
    except OSError as error:
        raise NotFound("records.unreadable", f"can't read {path}: {error.strerror}") from None
