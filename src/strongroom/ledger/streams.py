"""The streams of records that gateways keep, as their accounts in the log tell of them, checked offline
(spec/ledger.md, sections 7 and 12). Like statements.py it imports formats only."""

from __future__ import annotations

from collections.abc import Callable

from strongroom.formats.entry import CUSTODIAN, Entry
from strongroom.formats.statement import Statement
from strongroom.formats.stream import DAY, Told, after, fault, newest, owned, remembered


class Streams:
    """How far each gateway's records are. An `inference` entry comes to `fault`, then to `apply`."""

    def __init__(self) -> None:
        self._streams: dict[str, Told] = {}
        # What a custodian knows of them by then: of what it has forgotten it takes any account, and so has a verifier.
        self._known: set[str] = set()
        self._days: set[int] = set()

    def fault(self, entry: Entry, said: Statement | None, known: Callable[[str], bool]) -> str:
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

    def apply(self, entry: Entry) -> None:
        """Take in an `inference`. As policy/usage.py does it, to the day."""
        stream, day = entry.body["gateway"], entry.at // DAY
        account = Statement.decode(entry.body["statement"]).body["account"] if "statement" in entry.body else None
        self._streams[stream] = after(entry.body, day, account)
        self._known.add(stream)
        if day not in self._days:
            self._days = newest(self._days, day) | {day}
            self._known = {each for each in self._known if remembered(self._streams[each], day)}
