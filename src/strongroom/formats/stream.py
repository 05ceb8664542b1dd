"""Streams of gateways: whose each is, and which account of one may follow another (spec/ledger.md, section 12).

Custodian and verifier ask the same here: an account that one takes and the other refuses would end the verifying of a
log."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from strongroom.core.canonical import MAX_INTEGER

DAY = 86_400
KEPT = 400  # days
_SEEN = 7  # days for which it is known how far a stream is: each worker begins one whenever it starts
_LABEL = b"strongroom/1 stream\x00"
_OWN = 16  # digits that say whose it is


@dataclass
class Told:
    """What the log has of a stream: how many records, the hash of the newest, the day (since 1970) of its newest entry,
    and how many accounts were signed, 0 of a gateway in the custodian's own process."""

    records: int
    head: str
    day: int
    accounts: int = 0


def fresh(room: bytes, principal: str) -> str:
    """A new stream of a gateway that is `principal`."""
    return _own(room, principal) + secrets.token_hex(8)


def owned(stream: str, room: str, principal: str) -> bool:
    """Whether `stream` is one of `principal`, in the room with this identifier."""
    return stream[:_OWN] == _own(bytes.fromhex(room), principal)


def fault(before: Told | None, body: Mapping[str, Any], account: int | None) -> str:
    """What is wrong with an entry of the stream of which the log has `before`, or nothing. `account`: the number that
    was signed, None where nobody signed."""
    if account == MAX_INTEGER:
        return f"no account can come after {account}"
    if before is None:
        return ""
    if (account is None) != (before.accounts == 0):
        return "the stream is somebody else's"
    if account is not None and account != before.accounts:
        return f"it is account {account} of its gateway, and {before.accounts} is the next"
    if body["records"] < before.records or (body["records"] == before.records and body["head"] != before.head):
        return f"its gateway has had {before.records} records, with another end"
    return ""


def after(body: Mapping[str, Any], day: int, account: int | None) -> Told:
    """What the log has of a stream with an entry more."""
    return Told(body["records"], body["head"], day, 0 if account is None else account + 1)


def newest(days: Iterable[int], day: int) -> set[int]:
    """Of days on which there was inference, those that are still remembered on a new `day`."""
    return {each for each in days if each > day - KEPT}


def remembered(told: Told, day: int) -> bool:
    """Whether it is known, from a new `day` on, how far this stream is."""
    return told.day > day - _SEEN


def _own(room: bytes, principal: str) -> str:
    return hashlib.sha256(_LABEL + room + principal.encode()).hexdigest()[:_OWN]
