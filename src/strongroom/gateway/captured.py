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
    lines = _lines(path.with_suffix(".jsonl"))
    verify(lines, ())
    sealed = {each["record"]: each for each in map(_sealed, _lines(path))}
    for line in lines:
        record = decode(line, what="record")
        said, name = record.get("capture"), digest(line)
        found = sealed.pop(name, None)
        if said is None and found is None:
            continue
        if said is None or found is None:
            what = "is not there" if found is None else "is of a record that says nothing of it"
            raise Tampered("capture.tampered", f"what was captured of record {record['n']} {what}")
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
    if sealed:
        raise Tampered("capture.tampered", f"there is something of {len(sealed)} records that are not there")


def _lines(path: Path) -> list[bytes]:
    try:
        return path.read_bytes().splitlines()
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
    except (ValueError, TypeError, KeyError):
        raise Tampered("capture.tampered", "what was captured is no request") from None
