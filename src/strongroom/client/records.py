"""What gateways have kept of each request, checked against the heads that the log has (spec/gateway.md, section 6)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from strongroom.core.ids import Ref, parse_id, parse_principal
from strongroom.errors import IntegrityError, NotFound, StrongroomError, Tampered

_LINE_MOST = 64 << 10  # bytes of a record
_READ = 1 << 20


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
        ref = str(record["ref"])
        return not self.ref or ref == self.ref or ("@" not in self.ref and ref.partition("@")[0] == self.ref)


@dataclass
class Stream:
    """The chain of one worker. `records`: how many there are; `accounted`: how many of them the log has the head of;
    `unfinished`: bytes at the end that are no record, or none yet. `problem`: what is wrong, with `code`."""

    stream: str
    records: int = 0
    accounted: int = 0
    unfinished: int = 0
    settings: list[str] = field(default_factory=list)
    code: str = ""
    problem: str = ""


def read(bodies: Iterable[tuple[int, dict[str, Any]]], folders: Sequence[Path], wanted: Wanted) -> dict[str, Any]:
    """All streams in `folders` against the log's `inference` entries, each its time and its body.

    ``ok``, ``streams``, ``records`` (those wanted, by time; `accounted` says whether the log has them), and what they
    come to: ``requests``, ``refused``, ``tokens``, ``bits``. NotFound ``records.missing`` for a folder that there is
    not. What is wrong with a stream is in ``problem`` of it, with ``code``: ``records.tampered`` if a record was edited
    or taken away, ``records.elsewhere`` if the log has it and no folder does, which a gateway on another machine
    explains.
    """
    entries: dict[str, list[dict[str, Any]]] = {}
    last: dict[str, int] = {}
    for at, body in bodies:
        entries.setdefault(body["gateway"], []).append(body)
        last[body["gateway"]] = at
    paths = _paths(folders)
    found: list[Stream] = []
    rows: list[dict[str, Any]] = []
    for name in sorted({*paths, *entries}):
        known = entries.get(name, [])
        stream = Stream(name, settings=list(dict.fromkeys(body["settings"] for body in known)))
        if name in paths:
            _check(stream, paths[name], known, wanted, rows)
        elif last[name] < wanted.since or not any(body["records"] for body in known):
            continue
        else:
            stream.code = "records.elsewhere"
            stream.problem = f"the log has {known[-1]['records']} records of it, and they are in none of the folders"
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


def _check(
    stream: Stream, path: Path, bodies: list[dict[str, Any]], wanted: Wanted, rows: list[dict[str, Any]]
) -> None:
    from strongroom.gateway.records import verify

    accounted = max((body["records"] for body in bodies), default=0)
    mine: list[dict[str, Any]] = []

    def take(record: dict[str, Any]) -> None:
        stream.records += 1
        try:
            if record["stream"] != stream.stream:
                raise Tampered("records.tampered", f"record {record['n']} is of another stream")
            if wanted.has(record):
                mine.append(_row(record, accounted=record["n"] < accounted))
        except (KeyError, TypeError):
            raise Tampered("records.tampered", f"record {stream.records - 1} is not that of a request") from None

    try:
        verify(_lines(path, stream), bodies, take)
        stream.accounted = accounted
    except StrongroomError as error:
        stream.code, stream.problem = error.code, error.message
        for each in mine:  # edited, maybe: nothing vouches for any of them
            each["accounted"] = False
    rows += mine


def _row(record: dict[str, Any], *, accounted: bool) -> dict[str, Any]:
    numbers = ("n", "at", "status", "tokens", "bits")
    if not all(type(record[name]) is int for name in numbers) or not isinstance(record["by"], str):
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
