"""The log in the forms that other systems read: JSON lines, OCSF 1.4 (API Activity, class 6003) and CEF 0.

What is private is not in any of them: the log itself has only commitments to it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import version
from typing import Any

from strongroom.errors import UsageError
from strongroom.formats.entry import Entry
from strongroom.formats.merkle import leaf_hash

# OCSF: 1 create, 2 read, 3 update, 4 delete, 99 other. CEF: severity 0 to 10.
_CREATE, _READ, _UPDATE, _DELETE, _OTHER = 1, 2, 3, 4, 99
_KINDS: dict[str, tuple[int, int, str]] = {
    "genesis": (_CREATE, 3, "Room made"),
    "principal": (_UPDATE, 5, "Principal changed"),
    "grant": (_CREATE, 6, "Role proposed"),
    "policy": (_UPDATE, 7, "Policy enacted"),
    "proposal": (_CREATE, 5, "Policy proposed"),
    "put": (_CREATE, 3, "Weights put"),
    "rotate": (_UPDATE, 4, "Weights re-encrypted"),
    "shred": (_DELETE, 7, "Weights shredded"),
    "request": (_CREATE, 3, "Lease requested"),
    "approve": (_UPDATE, 4, "Request approved"),
    "deny": (_UPDATE, 4, "Request denied"),
    "release": (_READ, 5, "Keys released"),
    "copy": (_READ, 8, "Plaintext copy written"),
    "renew": (_UPDATE, 4, "Lease renewed"),
    "revoke": (_DELETE, 6, "Right revoked"),
    "ceiling": (_UPDATE, 5, "Ceiling changed"),
    "thaw": (_UPDATE, 6, "Weights thawed"),
    "refused": (_OTHER, 6, "Attempt refused"),
    "clock": (_UPDATE, 8, "Clock set back"),
    "trace": (_READ, 6, "Copy traced"),
    "review": (_READ, 3, "Rights reviewed"),
    "session": (_OTHER, 3, "Login by an identity provider"),
    "passkey": (_UPDATE, 5, "Passkey changed"),
    "authority": (_UPDATE, 6, "Identity provider changed"),
    "keystore": (_UPDATE, 5, "Key store used"),
    "reinstate": (_UPDATE, 9, "Principal reinstated by recovery shares"),
    "redact": (_DELETE, 5, "Personal data redacted"),
    "apikey": (_UPDATE, 4, "API key changed"),
    "inference": (_READ, 1, "Inference accounted for"),
}
_BREAK_GLASS = 9
_VERSION = version("strongroom")


def _severity(entry: Entry) -> int:
    return _BREAK_GLASS if entry.body.get("break_glass") else _KINDS[entry.type][1]


def _plain(entry: Entry) -> dict[str, Any]:
    """The body without the signed statements, which are long and say what the entry says."""
    return {name: value for name, value in entry.body.items() if name != "statement"}


def _jsonl(index: int, data: bytes, _: str) -> str:
    value = {"index": index, "leaf": leaf_hash(data).hex(), **json.loads(data)}
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _ocsf(index: int, data: bytes, origin: str) -> str:
    entry = Entry.decode(data)
    activity, _, name = _KINDS[entry.type]
    severity = _severity(entry)
    refused = entry.type == "refused"
    value = {
        "activity_id": activity,
        "activity_name": name,
        "actor": {"user": {"uid": entry.by, "name": entry.by}},
        "api": {"operation": entry.type, "service": {"name": "strongroom", "uid": origin}},
        "category_uid": 6,
        "class_uid": 6003,
        "message": name,
        "metadata": {
            "product": {"name": "Strongroom", "vendor_name": "Strongroom", "version": _VERSION},
            "version": "1.4.0",
            "uid": leaf_hash(data).hex(),
            "sequence": index,
            "log_name": origin,
        },
        "resources": [{"uid": entry.ref, "type": "weights"}] if entry.ref else [],
        # 1 informational, 2 low, 3 medium, 4 high, 5 critical.
        "severity_id": 1 if severity < 4 else 2 if severity < 6 else 3 if severity < 8 else 4 if severity < 9 else 5,
        "src_endpoint": {"name": "custodian", "uid": origin},
        "status_id": 2 if refused else 1,
        "status": "Failure" if refused else "Success",
        "time": entry.at * 1000,
        "type_uid": 600_300 + activity,
        "unmapped": _plain(entry),
    }
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _cef(index: int, data: bytes, origin: str) -> str:
    entry = Entry.decode(data)
    head = ("Strongroom", "Strongroom", _VERSION, entry.type, _KINDS[entry.type][2], str(_severity(entry)))
    fields = {
        "rt": str(entry.at * 1000),
        "suser": entry.by,
        "duid": entry.ref,
        "externalId": str(index),
        "outcome": "failure" if entry.type == "refused" else "success",
        "cs1Label": "leaf",
        "cs1": leaf_hash(data).hex(),
        "cs2Label": "log",
        "cs2": origin,
        "msg": json.dumps(_plain(entry), ensure_ascii=False, separators=(",", ":")),
    }
    extension = " ".join(f"{name}={_extension(value)}" for name, value in fields.items() if value)
    return "|".join(["CEF:0", *map(_header, head), extension])


def _header(text: str) -> str:
    """A bar or a line break in a field would begin another one, which nobody recorded."""
    return re.sub(r"([\\|])", r"\\\1", text).replace("\r", " ").replace("\n", " ")


def _extension(text: str) -> str:
    return re.sub(r"([\\=])", r"\\\1", text).replace("\r", r"\r").replace("\n", r"\n")


FORMATS: dict[str, Callable[[int, bytes, str], str]] = {"jsonl": _jsonl, "ocsf": _ocsf, "cef": _cef}


def export(entries: Iterable[tuple[int, bytes]], form: str, origin: str) -> Iterator[str]:
    """One line for each entry, given with its index, of the log `origin`; UsageError ``export.format``."""
    if form not in FORMATS:
        raise UsageError("export.format", f"there is no format {form!r:.40}", hint="--format jsonl, ocsf or cef")
    for index, data in entries:
        yield FORMATS[form](index, data, origin)
