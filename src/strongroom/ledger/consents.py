"""What follows from what in a log, checked offline (spec/ledger.md, section 7, step 5): a lease from its request and
those who agreed, a release from its lease, a policy from its proposal, a principal from a grant. Whether the approvals
were enough is policy's to say, which a verifier does not ask."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from strongroom.errors import Tampered
from strongroom.formats.entry import Entry
from strongroom.formats.principal import TOGETHER, gains, grants, reinstated, resolved, weighty
from strongroom.formats.statement import Statement

_WAITING = 86_400  # seconds between a proposal and its policy
_TOLERANCE = 300  # seconds that clocks may differ
_NUMBERED = re.compile(r"[^@\s]+@[1-9][0-9]*", re.ASCII)


@dataclass
class Person:
    """A principal's record; `entry` is the index of the entry that it is from."""

    path: str
    key: str
    person: str
    roles: list[str]
    teams: list[str]
    subject: str
    state: str
    entry: int

    @property
    def active(self) -> bool:
        return self.state == "active"


@dataclass
class _Request:
    digest: str
    action: str
    ref: str
    holder: str
    by: str
    duration: int
    uses: int | None
    expires_at: int


@dataclass
class _Lease:
    request: _Request
    granted_at: int
    expires_at: int
    used: int = 0


@dataclass
class _Proposal:
    digest: str
    statement: str
    enact_after: int
    persons: set[str] = field(default_factory=set)


@dataclass
class Grant:
    """What waits for a second person: the record that it makes of a principal, or (empty) the authority of `said`."""

    said: Statement
    record: dict[str, Any]
    by: str
    expires_at: int
    before: int | None


class Consents:
    """The people of a log, and what waits for their word. Entries come to `check`, then to `apply`, in their order."""

    def __init__(self) -> None:
        self.people: dict[str, Person] = {}
        self._most = 0  # people who could grant at one time
        self._requests: dict[str, _Request] = {}
        self._leases: dict[str, _Lease] = {}
        self._proposals: dict[str, _Proposal] = {}
        self._grants: dict[str, Grant] = {}  # of principals, and of authorities
        self._versions: dict[str, bool] = {}  # whether it can be used
        self._copies: dict[int, tuple[str, str]] = {}  # releases to copy: holder and reference

    def person(self, path: str) -> str:
        """The person behind a principal."""
        return self.people[path].person if path in self.people else path

    def knows(self, ref: str) -> bool:
        """Whether there is, or was, this version."""
        return ref in self._versions

    def granted(self, identifier: str) -> Grant | None:
        """What waits under that identifier for a second person, if it is a change of a principal or an authority."""
        return self._grants.get(identifier)

    # -- checking ------------------------------------------------------------------------------------------------

    def check(self, index: int, entry: Entry, said: Statement) -> None:
        """Tampered unless the entry at `index` follows from those before it."""
        wrong = ""
        match entry.type:
            case "principal" | "grant" | "reinstate":
                wrong = self._principal(entry, said)
            case "authority":
                alone = entry.body["expires_at"] is None and bool(said.body["text"])
                wrong = "one person alone has put an authority in force" if alone and self._most >= TOGETHER else ""
            case "approve":
                wrong = self._approve(entry, said)
            case "proposal":
                wrong = "a policy waits for a day" if entry.body["enact_after"] < entry.at + _WAITING else ""
            case "policy":
                wrong = self._policy(entry)
            case "renew":
                wrong = self._renew(entry, said)
            case "release":
                wrong = self._release(entry)
            case "copy":
                named = self._copies.get(entry.body["release"]) == (entry.by, entry.ref)
                known = named and entry.body["holder"] == entry.by
                wrong = "" if known else "it names no release to copy of its holder's"
            case "trace":
                wrong = self._trace(entry, said)
            case "put":
                new = _NUMBERED.fullmatch(entry.ref) and entry.ref not in self._versions
                wrong = "" if new else "it is no new version"
            case "rotate" | "shred" | "thaw":
                wrong = "" if self._versions.get(entry.ref) else "there is no such version"
            case "review":
                wrong = "it is of entries that are not there yet" if entry.body["size"] > index else ""
        if wrong:
            raise Tampered("log.unfounded", f"the entry {entry.type} does not follow from the log: {wrong}")

    def _principal(self, entry: Entry, said: Statement) -> str:
        path = said.body["principal"]
        before = self.people.get(path)
        if entry.type == "reinstate":
            able = entry.ref == path and grants(path, said.body["key"] or (before.key if before else ""), ["officer"])
            return "" if able else "it is of nobody who could let others in"
        if said.body["before"] != (before.entry if before else None):
            return f"it was made of another record of {path}"
        record = resolved(before, said.body)
        wrote = {name: value for name, value in entry.body.items() if name != "statement"}
        if entry.type == "principal" and record != wrote:
            return f"it says something else of {path} than was signed"
        if entry.type == "principal" and self._most >= TOGETHER and weighty(before, record):
            return "one person alone has made somebody whose approval counts"
        own = self.person(entry.by) in (record["person"], before.person if before else "")
        return f"{entry.by} gives rights to its own person" if own and gains(before, record) else ""

    def _approve(self, entry: Entry, said: Statement) -> str:
        body, who = entry.body, self.person(entry.by)
        if not set(body["roles"]) <= set(self.people[entry.by].roles if entry.by in self.people else ()):
            return "who approves does not have these roles"
        if (proposal := self._proposals.get(body["id"])) is not None:
            if said.body["request"] != proposal.statement or who in proposal.persons or body["lease"] is not None:
                return "it is not another person's word about this proposal"
            return ""
        if (grant := self._grants.get(body["id"])) is not None:
            return self._second(entry, said, grant)
        request = self._requests.get(body["id"])
        if request is None or said.body["request"] != request.digest or entry.ref != request.ref:
            return "no such request waits"
        if who in (self.person(request.by), self.person(request.holder)) or entry.at >= request.expires_at:
            return "it is of the person who asks, or too late"
        duration = said.body["duration"] or request.duration
        counts = [count for count in (request.uses, said.body["uses"]) if count is not None]
        uses = min(counts, default=None)
        if said.body["duration"] > request.duration or (body["duration"], body["uses"]) != (duration, uses):
            return "it grants more, or something else, than was asked for and allowed"
        lease = {"id": body["id"], "holder": request.holder, "action": request.action, "ref": request.ref}
        lease |= {"expires_at": entry.at + duration, "uses": uses}
        return "the lease is another than was asked for and allowed" if body["lease"] not in (None, lease) else ""

    def _second(self, entry: Entry, said: Statement, grant: Grant) -> str:
        about = grant.record
        target = self.people.get(about.get("principal", ""))
        persons = {self.person(grant.by), about.get("person", ""), target.person if target else ""}
        if said.body["request"] != grant.said.digest or self.person(entry.by) in persons:
            return "it is not another person's word about this grant"
        if "principal" in about and grant.before != (target.entry if target else None):
            return "who it is about was changed since"
        return "it is too late" if entry.at >= grant.expires_at or entry.body["lease"] is not None else ""

    def _policy(self, entry: Entry) -> str:
        found = self._proposals.get(entry.body["proposal"])
        if found is None or found.digest != entry.body["digest"]:
            return "it is not one that waits"
        if len(found.persons) < 2 or (entry.at < found.enact_after and not entry.body["break_glass"]):
            return "one person alone has put it in force, or before its time"
        return ""

    def _renew(self, entry: Entry, said: Statement) -> str:
        lease = self._leases.get(entry.body["lease"])
        if lease is None or entry.at >= lease.expires_at or entry.ref != lease.request.ref:
            return "there is no such lease"
        request = lease.request
        allowed = said.body["duration"] or request.duration
        if said.body["duration"] > request.duration or entry.body["expires_at"] != entry.at + allowed:
            return "it is longer than was granted, or than was said"
        own = self.person(entry.by) in (self.person(request.holder), self.person(request.by))
        return "it is of the holder's own hand" if own or request.action != "load" else ""

    def _release(self, entry: Entry) -> str:
        body = entry.body
        if body["holder"] != entry.by or not self._versions.get(entry.ref):
            return "it is not to who asked for it, or of no version"
        return self._under(entry, body["action"], entry.at)

    def _trace(self, entry: Entry, said: Statement) -> str:
        body = entry.body
        if entry.ref and not _NUMBERED.fullmatch(entry.ref):
            return "it is of no version"
        if not set(body["accused"]) <= self.people.keys():
            return "it accuses somebody whom the log does not know"
        # By when the search began, which its statement says to within what clocks may differ: the lease's time may be
        # over since.
        lease = self._leases.get(body["lease"] or "")
        if lease is not None and said.at < lease.granted_at - 2 * _TOLERANCE:
            return "it began before its lease was granted"
        return self._under(entry, "trace", said.at - _TOLERANCE)

    def _under(self, entry: Entry, action: str, at: int) -> str:
        """What is wrong, at that time, with the lease that an entry names for an action of its author's; nothing if it
        names none."""
        name = entry.body["lease"]
        if name is None:
            return ""
        lease = self._leases.get(name)
        if lease is None or at >= lease.expires_at:
            return "its lease is none, or has ended"
        asked = lease.request
        if (asked.holder, asked.action, asked.ref) != (entry.by, action, entry.ref):
            return "its lease is for something else"
        return "its lease is used up" if asked.uses is not None and lease.used >= asked.uses else ""

    # -- applying ------------------------------------------------------------------------------------------------

    def apply(self, index: int, entry: Entry, said: Statement | None) -> None:
        """Take in the entry at `index`; `said` is the statement that it quotes, if it does."""
        body = entry.body
        if said is not None:
            self._waits(entry, said)
        match entry.type:
            case "principal" | "reinstate":
                before = self.people.get(body["principal"])
                self.install(index, reinstated(before, body) if entry.type == "reinstate" else body)
            case "approve":
                self._approved(index, entry)
            case "deny":
                for waiting in (self._requests, self._grants, self._proposals):
                    waiting.pop(body["id"], None)
            case "policy":
                self._proposals.pop(body["proposal"], None)
            case "renew" if body["lease"] in self._leases:
                self._leases[body["lease"]].expires_at = body["expires_at"]
            case "release" | "trace":
                if body["lease"] in self._leases:
                    self._leases[body["lease"]].used += 1
                if body.get("action") == "copy":
                    self._copies[index] = (entry.by, entry.ref)
            case "revoke":
                self._revoked(index, body["target"])
            case "clock":
                self._leases.clear()
            case "put" | "shred":
                self._versions[entry.ref] = entry.type == "put"
                self._end("ref", entry.ref)

    def _waits(self, entry: Entry, said: Statement) -> None:
        """What is asked of others from now on."""
        body = entry.body
        match entry.type:
            case "grant":
                before = self.people.get(said.body["principal"])
                record, at = resolved(before, said.body), before.entry if before else None
                self._grants[body["id"]] = Grant(said, record, entry.by, body["expires_at"], at)
            case "authority" if body["expires_at"] is not None:
                self._grants[body["id"]] = Grant(said, {}, entry.by, body["expires_at"], None)
            case "authority":
                self._trusted(said)
            case "request":
                asked = (body["action"], entry.ref, body["for"], entry.by, body["duration"], body["uses"])
                self._requests[body["id"]] = _Request(said.digest, *asked, body["expires_at"])
            case "proposal":
                persons = {self.person(entry.by)}
                self._proposals[body["id"]] = _Proposal(body["digest"], said.digest, body["enact_after"], persons)

    def _approved(self, index: int, entry: Entry) -> None:
        name = entry.body["id"]
        if name in self._proposals:
            self._proposals[name].persons.add(self.person(entry.by))
        elif name in self._grants:
            grant = self._grants.pop(name)
            if grant.record:
                self.install(index, grant.record)
            else:
                self._trusted(grant.said)
        elif name in self._requests:
            request = self._requests[name]
            request.duration, request.uses = entry.body["duration"], entry.body["uses"]
            if (lease := entry.body["lease"]) is not None:
                self._leases[name] = _Lease(self._requests.pop(name), entry.at, lease["expires_at"])

    def _trusted(self, said: Statement) -> None:
        """What else was asked for about an authority was asked of other terms."""
        name = said.body["authority"]
        self._grants = {each: one for each, one in self._grants.items() if one.said.body.get("authority") != name}

    def _revoked(self, index: int, target: str) -> None:
        self._requests.pop(target, None)
        self._leases.pop(target, None)
        if target in self.people:
            found = self.people[target]
            found.state, found.entry = "suspended" if found.active else found.state, index
            self._end("holder", target)
        self._end("ref", target)

    def install(self, index: int, body: Any) -> None:
        """A principal's record is now `body`, that of an entry or a statement."""
        path, subject = body["principal"], body.get("subject", "")
        before = self.people.get(path)
        roles, teams = list(body["roles"]), list(body["teams"])
        self.people[path] = Person(path, body["key"], body["person"], roles, teams, subject, body["state"], index)
        if body["state"] != "active" or (before and (before.key, before.subject) != (body["key"], subject)):
            self._end("holder", path)
        able = {each.person for each in self.people.values() if each.active and grants(each.path, each.key, each.roles)}
        self._most = max(self._most, len(able))

    def _end(self, what: str, value: str) -> None:
        self._leases = {name: each for name, each in self._leases.items() if getattr(each.request, what) != value}
