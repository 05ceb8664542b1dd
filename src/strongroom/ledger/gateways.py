"""What gateways take and leave, checked offline (spec/ledger.md, sections 7 and 12): API keys, each said by whom it
speaks for, and the heads of the records of inference. Like statements.py it imports formats only."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from strongroom.formats.apikey import LONGEST, MOST, NAME
from strongroom.formats.entry import CUSTODIAN, Entry
from strongroom.formats.statement import Statement


@dataclass
class Key:
    """An API key. `session`: the identifier of the login's key that it was made under, or empty."""

    principal: str
    name: str
    expires_at: int
    session: str
    ended: bool = False


class Gateways:
    """The API keys of a log, and how far each gateway's records are. Entries come to a check, then to `apply`."""

    def __init__(self) -> None:
        self._keys: dict[str, Key] = {}  # by digest
        self._active: dict[str, list[Key]] = {}  # of each principal those that may be active
        self._heads: dict[str, tuple[int, str]] = {}  # by gateway: records, and the newest one's hash

    def key(self, entry: Entry, said: Statement, now: int, until: int | None) -> str:
        """What is wrong with an `apikey`, or nothing. `said`: its statement; `now`: the later of its time and the
        log's; `until`: when the key ends that has signed it, None if it can't make any."""
        body = entry.body
        known = self._keys.get(body["key"])
        if body["principal"] != entry.ref:
            return "it is about somebody else than it says"
        if body["state"] == "ended":
            same = (body["principal"], body["name"], body["expires_at"])
            good = known is not None and not known.ended and now < known.expires_at
            if good and known is not None and (known.principal, known.name, known.expires_at) == same:
                return ""
            return "no such API key is active"
        if known is not None:
            return "the API key is in the log already"
        if body["principal"] != entry.by or entry.by.startswith("team/") or until is None:
            return "nobody makes an API key for somebody else, or with another key than their own"
        if not now < body["expires_at"] <= min(said.at + LONGEST, until) or not NAME.fullmatch(body["name"]):
            return "it has no name, or no end, that an API key has"
        active = [each for each in self._active.get(entry.by, ()) if not each.ended and now < each.expires_at]
        self._active[entry.by] = active
        return f"{entry.by} has more than {MOST} API keys" if len(active) >= MOST else ""

    def inference(self, entry: Entry, known: Callable[[str], bool]) -> str:
        """What is wrong with an account of inference, or nothing; `known`: whether there was a version."""
        body = entry.body
        if entry.by != CUSTODIAN or (entry.ref and not known(entry.ref)):
            return "it is by somebody else, or of no version"
        records, head = self._heads.get(body["gateway"], (0, ""))
        if body["records"] < records or (body["records"] == records and head not in ("", body["head"])):
            return "the gateway has fewer records than before, or others"
        return ""

    def apply(self, entry: Entry, session: str) -> None:
        """Take in an entry of one of the two types; `session` names the login's key that has signed it, if one has."""
        body: Mapping[str, Any] = entry.body
        if entry.type == "inference":
            self._heads[body["gateway"]] = (body["records"], body["head"])
        elif body["state"] == "ended":
            self._keys[body["key"]].ended = True
        else:
            key = Key(body["principal"], body["name"], body["expires_at"], session)
            self._keys[body["key"]] = key
            self._active.setdefault(key.principal, []).append(key)

    def end(self, which: Callable[[Key], bool]) -> None:
        """The API keys that `which` says end."""
        for each in self._keys.values():
            each.ended = each.ended or which(each)
