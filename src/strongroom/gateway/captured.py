"""What a gateway has captured, opened by whoever has the key, and held against the records beside it
(spec/gateway.md, section 9). Offline: it takes two files, and no room."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from strongroom.core.canonical import decode
from strongroom.crypto.capture import CaptureKey, commitment
from strongroom.errors import StrongroomError, Tampered, UsageError
from strongroom.gateway.records import digest, verify

_SALT = 32


def opened(path: Path, key: CaptureKey) -> Iterator[dict[str, Any]]:
    """All that was captured in ``STREAM.sealed``, in the order of its records, each with the `record` that it is of.

    UsageError ``capture.no_records``, ``capture.other_key``; Tampered ``records.tampered``, ``capture.tampered``: a
    record does not follow from the one before, what was captured is not what its record says, or it is not there.
    """
    records = path.with_suffix(".jsonl")
    verify(_lines(records), ())  # before anything is shown that may be another record's
    sealed, early = map(_sealed, _lines(path)), dict[str, dict[str, Any]]()
    for line in _lines(records):
        record, name = decode(line, what="record"), digest(line)
        said = record.get("capture")
        if said is None:
            continue
        while name not in early:
            found = next(sealed, None)
            if found is None:
                raise Tampered("capture.tampered", f"what was captured of record {record['n']} is not there")
            early[found["record"]] = found
        found = early.pop(name)
        if found["key"] != key.key_id:
            raise UsageError(
                "capture.other_key",
                f"record {record['n']} was sealed to another key, {found['key'][:16]}…",
                hint="--key with the private half of that one",
            )
        content = key.open(found["sealed"], bytes.fromhex(name))
        if commitment(content) != said:
            raise Tampered("capture.tampered", f"what was captured of record {record['n']} is not what the record says")
        yield {"record": record, **_content(content)}
    if early or next(sealed, None) is not None:
        raise Tampered("capture.tampered", "something was captured of a record that is not there")


def _lines(path: Path) -> Iterator[bytes]:
    """The lines of a file, which may have gigabytes, as they are read."""
    try:
        with path.open("rb") as file:
            for line in file:
                yield line.removesuffix(b"\n")
    except OSError as error:
        raise UsageError(
            "capture.no_records",
            f"can't read {path}: {error.strerror}; what was captured is held against the records beside it",
            hint="strongroom capture open FOLDER/STREAM.sealed --key FILE, with STREAM.jsonl in the same folder",
        ) from None


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
