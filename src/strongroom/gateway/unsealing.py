"""What a gateway has captured, opened by whoever has the key, and held against the records beside it
(spec/gateway.md, section 9). Offline: it takes two files, and no room."""

from __future__ import annotations

import base64
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from strongroom.core.canonical import decode
from strongroom.crypto.capture import CaptureKey, commitment
from strongroom.errors import StrongroomError, Tampered, UsageError
from strongroom.gateway.records import digest, verify

_SALT = 32
# Seconds within which a gateway that runs has written both of a request's lines: it should within one, but that its
# machine or its disk was held up is no tampering.
_MOMENT = 10.0


def opened(path: Path, key: CaptureKey) -> Iterator[dict[str, Any]]:
    """All that was captured in ``STREAM.sealed``, in the order of its records, each with the `record` that it is of;
    with `other_key` instead of what was said where it is for the holder of another one.

    UsageError ``capture.no_records``, ``capture.other_key`` if nothing is for this one; Tampered ``records.tampered``,
    a record does not follow from the one before, and before anything is shown, which may be another record's;
    ``capture.tampered``, what was captured is not what its record says, or it is not there: after all the rest, which
    nobody shall keep from its reader by spoiling one line.
    """
    records = path.with_suffix(".jsonl")
    chain = _Chain(records)
    verify(chain.lines(), ())
    wrong: list[str] = []
    sealed = _Places(path, wrong)
    mine, others = 0, dict[str, int]()
    with _reading(path) as file:
        for at, line in _lines(records):
            if at >= chain.end:
                break
            record, name = decode(line, what="record"), digest(line)
            if record.get("capture") is None:
                continue
            number, said = record["n"], _commitment(record)
            if said is None:
                wrong.append(f"record {number} does not say what was captured of it")
                sealed.found.pop(name, None)
                continue
            if (place := sealed.of(name)) is None:
                wrong.append(f"what was captured of record {number} is not there")
                continue
            file.seek(place)
            found = _sealed(file.readline().removesuffix(b"\n"))
            # The record's word, and not the line's: whoever can write to the file could say of any that it is not ours.
            if found["key"] != said["key"]:
                wrong.append(f"what was captured of record {number} names another key than the record does")
            if said["key"] != key.key_id:
                others[said["key"]] = number
                yield {"record": record, "other_key": said["key"]}
                continue
            mine += 1
            try:
                content = key.open(found["sealed"], bytes.fromhex(name))
            except Tampered as error:
                wrong.append(error.message)
                continue
            if commitment(content) != said["content"]:
                wrong.append(f"what was captured of record {number} is not what the record says")
                continue
            yield {"record": record, **_content(content)}
    if not chain.has_all(sealed.found):
        wrong.append("something was captured of a record that is not there")
    if wrong:
        more = f", and {len(wrong) - 1} more like this" if wrong[1:] else ""
        raise Tampered("capture.tampered", wrong[0] + more)
    if others and not mine:
        other, number = next(iter(others.items()))
        raise UsageError(
            "capture.other_key",
            f"record {number} was sealed to another key, {other[:16]}…",
            hint="--key with the private half of that one",
        )


def _commitment(record: dict[str, Any]) -> dict[str, str] | None:
    said = record["capture"]
    fine = isinstance(said, dict) and isinstance(said.get("content"), str) and isinstance(said.get("key"), str)
    return said if fine else None


class _Chain:
    """The records, as far as they have been read. A gateway that runs writes to them, and to what is captured, in turn:
    of one request either may be there before the other."""

    def __init__(self, path: Path) -> None:
        self._path, self.end = path, 0

    def lines(self) -> Iterator[bytes]:
        """Those that have come since."""
        for at, line in _lines(self._path, self.end):
            self.end = at + len(line) + 1
            yield line

    def has_all(self, names: Iterable[str]) -> bool:
        """Whether all of these, by their hashes, come after those that were read, now or in a moment."""
        left = set(names)

        def come() -> bool:
            left.difference_update(map(digest, self.lines()))
            return not left

        return not left or _Moment().has(come)


class _Places:
    """Where what was captured of each record begins, by the record's hash: `found`. What is `wrong` is told."""

    def __init__(self, path: Path, wrong: list[str]) -> None:
        self._path, self._wrong, self._end = path, wrong, 0
        self._moment = _Moment()  # of all that are missing together
        self.found: dict[str, int] = {}
        self._more()

    def of(self, name: str) -> int | None:
        """Its place, from now on nobody else's; None where there is none, and does not come in a moment."""

        def come() -> bool:
            self._more()
            return name in self.found

        return self.found.pop(name) if name in self.found or self._moment.has(come) else None

    def _more(self) -> None:
        for at, line in _lines(self._path, self._end):
            self._end = at + len(line) + 1
            try:
                name = _sealed(line)["record"]
            except Tampered as error:
                self._wrong.append(error.message)
                continue
            if name in self.found:
                self._wrong.append("something was captured of a record that is not there: it has two")
            self.found[name] = at


class _Moment:
    """What a gateway that runs takes to write a line, once: it begins when something is missing."""

    def __init__(self) -> None:
        self._until = 0.0

    def has(self, come: Callable[[], bool]) -> bool:
        """Whether something comes while it lasts."""
        self._until = self._until or time.monotonic() + _MOMENT
        while not come():
            if time.monotonic() >= self._until:
                return False
            time.sleep(0.05)
        return True


def _reading(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise UsageError(
            "capture.no_records",
            f"can't read {path}: {error.strerror}; what was captured is held against the records beside it",
            hint="strongroom capture open FOLDER/STREAM.sealed --key FILE, with STREAM.jsonl in the same folder",
        ) from None


def _lines(path: Path, at: int = 0) -> Iterator[tuple[int, bytes]]:
    """The whole lines of a file from there on, which may have gigabytes, as they are read, and where each begins. What
    a machine that lost its power has left behind the last one is none."""
    with _reading(path) as file:
        file.seek(at)
        for line in file:
            if line.endswith(b"\n"):
                yield at, line[:-1]
            at += len(line)


def _sealed(line: bytes) -> dict[str, Any]:
    try:
        value = decode(line, what="sealed record")
        record, key, sealed = value["record"], value["key"], base64.b64decode(value["sealed"], validate=True)
        if not (isinstance(record, str) and isinstance(key, str)):
            raise TypeError
    except (StrongroomError, TypeError, KeyError, ValueError):
        raise Tampered("capture.tampered", "a line of what was captured is none") from None
    return {"record": record, "key": key, "sealed": sealed}


def _content(content: bytes) -> dict[str, Any]:
    import json

    try:
        value = json.loads(content[_SALT:])
        return {"route": value["route"], "ref": value["ref"], "asked": value["asked"], "answers": value["answers"]}
    except (ValueError, TypeError, KeyError, RecursionError):
        raise Tampered("capture.tampered", "what was captured is no request") from None
