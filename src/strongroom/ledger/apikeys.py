"""API keys of a log, checked offline (spec/ledger.md, section 12): each is said by whom it speaks for. Like
statements.py it imports formats only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from strongroom.formats.apikey import LONGEST, MOST, NAME
from strongroom.formats.entry import Entry
from strongroom.formats.statement import Statement


@dataclass
class Key:
    """An API key. `session`: the identifier of the login's key that it was made under, or empty."""

    principal: str
    name: str
    expires_at: int
    session: str
    ended: bool = False


class ApiKeys:
    """Those of a log. An entry comes to `fault`, then to `apply`."""

    def __init__(self) -> None:
        self._keys: dict[str, Key] = {}  # by digest
        self._active: dict[str, list[Key]] = {}  # of each principal those that may be active

    def fault(self, entry: Entry, said: Statement, now: int, until: int | None) -> str:
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

    def apply(self, entry: Entry, session: str) -> None:
        """Take in an `apikey`; `session` names the login's key that has signed it, if one has."""
        body = entry.body
        if body["state"] == "ended":
            self._keys[body["key"]].ended = True
        else:
            key = Key(body["principal"], body["name"], body["expires_at"], session)
            self._keys[body["key"]] = key
            self._active.setdefault(key.principal, []).append(key)

    def end(self, which: Callable[[Key], bool]) -> None:
        """The API keys that `which` says end."""
        for each in self._keys.values():
            each.ended = each.ended or which(each)
