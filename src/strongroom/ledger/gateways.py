"""What gateways take and leave, checked offline (spec/ledger.md, sections 7 and 12): API keys, each said by whom it
speaks for, and the heads of the records of inference. Like statements.py it imports formats only."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from strongroom.formats.apikey import LONGEST, MOST, NAME
from strongroom.formats.entry import CUSTODIAN, Entry
from strongroom.formats.statement import Statement
from strongroom.formats.stream import DAY, Told, after, fault, newest, owned, remembered


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
        self._streams: dict[str, Told] = {}
        # What a custodian knows of them by then: of what it has forgotten it takes any account, and so has a verifier.
        self._known: set[str] = set()
        self._days: set[int] = set()

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

    def inference(self, entry: Entry, said: Statement | None, known: Callable[[str], bool]) -> str:
        """What is wrong with an account of inference, or nothing; `said`: its statement, if it has one; `known`:
        whether there was a version."""
        stream = entry.body["gateway"]
        if entry.ref and not known(entry.ref):
            return "it is of no version"
        before = self._streams.get(stream)
        if said is None:  # for ever: else a custodian could say what a gateway has answered that is silent for long
            return fault(before, entry.body, None) if entry.by == CUSTODIAN else "nobody has signed it"
        if not owned(stream, said.room, entry.by):
            return "the stream is somebody else's"
        return fault(before if stream in self._known else None, entry.body, said.body["account"])

    def apply(self, entry: Entry, session: str) -> None:
        """Take in an entry of one of the two types; `session` names the login's key that has signed it, if one has."""
        body: Mapping[str, Any] = entry.body
        if entry.type == "inference":
            self._account(entry)
        elif body["state"] == "ended":
            self._keys[body["key"]].ended = True
        else:
            key = Key(body["principal"], body["name"], body["expires_at"], session)
            self._keys[body["key"]] = key
            self._active.setdefault(key.principal, []).append(key)

    def _account(self, entry: Entry) -> None:
        """As policy/usage.py does it, to the day."""
        stream, day = entry.body["gateway"], entry.at // DAY
        account = Statement.decode(entry.body["statement"]).body["account"] if "statement" in entry.body else None
        self._streams[stream] = after(entry.body, day, account)
        self._known.add(stream)
        if day not in self._days:
            self._days = newest(self._days, day) | {day}
            self._known = {each for each in self._known if remembered(self._streams[each], day)}

    def end(self, which: Callable[[Key], bool]) -> None:
        """The API keys that `which` says end."""
        for each in self._keys.values():
            each.ended = each.ended or which(each)
