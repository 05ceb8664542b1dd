"""What a gateway has captured, opened by whoever has the key, and held against the records beside it
(spec/gateway.md, section 9). Offline: it takes two files, and no room."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from strongroom.core.canonical import decode
from strongroom.crypto.capture import CaptureKey, commitment
from strongroom.errors import StrongroomError, Tampered, UsageError
from strongroom.gateway.records import digest, verify

_SALT = 32


def opened(path: Path, key: CaptureKey) -> Iterator[dict[str, Any]]:
    """All that was captured in ``STREAM.sealed``, in the order of its records, each with the `record` that it is of;
    with `other_key` instead of what was said where it is for the holder of another one.

    UsageError ``capture.no_records``, ``capture.other_key`` if nothing is for this one; Tampered ``records.tampered``,
    a record does not follow from the one before, and before anything is shown, which may be another record's;
    ``capture.tampered``, what was captured is not what its record says, or it is not there: after all the rest, which
    nobody shall keep from its reader by spoiling one line.
    """
    records = path.with_suffix(".jsonl")
    verify((line for _, line in _lines(records)), ())
    wrong: list[str] = []
    places = _places(path, wrong)
    mine, others = 0, dict[str, int]()
    with _reading(path) as file:
        for _, line in _lines(records):
            record, name = decode(line, what="record"), digest(line)
            if record.get("capture") is None:
                continue
            number, said = record["n"], _commitment(record)
            if said is None:
                wrong.append(f"record {number} does not say what was captured of it")
                places.pop(name, None)
                continue
            if name not in places:
                wrong.append(f"what was captured of record {number} is not there")
                continue
            file.seek(places.pop(name))
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
    if places:
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


def _places(path: Path, wrong: list[str]) -> dict[str, int]:
    """Where what was captured of each record begins, by the record's hash; what is `wrong` is told."""
    found: dict[str, int] = {}
    for at, line in _lines(path):
        try:
            name = _sealed(line)["record"]
        except Tampered as error:
            wrong.append(error.message)
            continue
        if name in found:
            wrong.append("something was captured of a record that is not there: it has two")
        found[name] = at
    return found


def _reading(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise UsageError(
            "capture.no_records",
            f"can't read {path}: {error.strerror}; what was captured is held against the records beside it",
            hint="strongroom capture open FOLDER/STREAM.sealed --key FILE, with STREAM.jsonl in the same folder",
        ) from None


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The whole lines of a file, which may have gigabytes, as they are read, and where each begins. What a machine that
    lost its power has left behind the last one is none."""
    with _reading(path) as file:
        at = 0
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
