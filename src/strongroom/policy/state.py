"""What a room's log says, applied in order: principals, requests, leases, versions, use (spec/ledger.md, section 6).

Nothing here decides anything: an entry that is in the log has been decided. The state must not grow with the number of
releases, so of those it keeps one record for each pair of holder and version.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

from strongroom.core.canonical import MAX_INTEGER
from strongroom.errors import Tampered
from strongroom.formats.entry import Entry
from strongroom.formats.principal import grants, reinstated, resolved
from strongroom.formats.statement import Statement
from strongroom.formats.stream import Told
from strongroom.policy import apikeys, usage
from strongroom.policy.apikeys import ApiKey
from strongroom.policy.speaker import TOLERANCE, key_of

_REMEMBERED = 4 * TOLERANCE  # a release's statement is too old long before its digest is forgotten
_FOR_EVER = MAX_INTEGER
_NO_MATTER = ("inference", "refused")  # entries that change nothing that decides


@dataclass
class Principal:
    """`key`: Ed25519 in hexadecimal, or empty. `person`: the principal path of the human behind it."""

    path: str
    key: str
    person: str
    roles: list[str]
    teams: list[str]
    state: str
    since: int  # when it was added, in seconds
    entry: int
    subject: str = ""  # what an authority calls it, hashed (formats/authority.py), or empty

    @property
    def active(self) -> bool:
        return self.state == "active"


@dataclass
class Session:
    """A key that a login has introduced: Ed25519 in hexadecimal, good until `expires_at`. `method`: oidc or x509."""

    principal: str
    public_key: str
    method: str
    authority: str
    expires_at: int
    entry: int


@dataclass
class Approval:
    """One person's yes, with the roles that the person had, and the kind of key that it was given with."""

    by: str
    person: str
    roles: list[str]
    at: int
    entry: int
    method: str


@dataclass
class Request:
    """`digest` is that of the signed request; `duration` and `uses` are what the approvers have left of what was asked
    for. `state`: pending, approved, denied, revoked; a pending one that is past `expires_at` has expired."""

    id: str
    digest: str
    action: str
    ref: str
    holder: str
    by: str
    duration: int
    uses: int | None
    at: int
    expires_at: int
    entry: int
    state: str = "pending"
    approvals: list[Approval] = field(default_factory=list)

    def state_at(self, now: int) -> str:
        return "expired" if self.state == "pending" and now >= self.expires_at else self.state


@dataclass
class Lease:
    """The right of one holder to one version, for a time. `uses` None: any number; `ended`: why, or empty."""

    id: str
    holder: str
    action: str
    ref: str
    granted_at: int
    expires_at: int
    uses: int | None
    used: int = 0
    ended: str = ""

    def lasts(self, now: int) -> bool:
        """Whether it was not ended, nor is its time over: what was given under it may be in use."""
        return self.granted_at - TOLERANCE <= now < self.expires_at and not self.ended

    def holds(self, now: int) -> bool:
        return self.lasts(now) and not self.used_up

    @property
    def used_up(self) -> bool:
        return self.uses is not None and self.used >= self.uses


@dataclass
class Version:
    """What was put under a reference, and the revision that is current."""

    ref: str
    version: str
    revision: int
    manifest: str
    shredded: bool = False
    frozen: bool = False


@dataclass
class Use:
    """What one holder has had of one version: releases (loads) and plaintext copies."""

    holder: str
    ref: str
    first: int
    last: int
    releases: int = 0
    copies: int = 0


@dataclass
class Grant:
    """A change of a principal, or of an authority, that waits for a second person. `record` is the body of the
    statement: what the principal's entry would say. `before`: of an authority None."""

    id: str
    digest: str
    record: dict[str, Any]
    before: int | None  # the entry that the principal is from when the change is asked for; None: it is a new one
    by: str
    at: int
    expires_at: int
    method: str  # of who asks
    state: str = "pending"
    approved_by: str = ""

    def state_at(self, now: int) -> str:
        return "expired" if self.state == "pending" and now >= self.expires_at else self.state


@dataclass
class Proposal:
    """A policy that somebody proposes, and who agrees. `statement` is the digest of the signed proposal."""

    id: str
    digest: str
    statement: str
    by: str
    at: int
    enact_after: int
    method: str  # of who proposes
    state: str = "pending"
    approvals: list[Approval] = field(default_factory=list)


@dataclass
class Passkey:
    """`key`: SubjectPublicKeyInfo in hexadecimal; `count`: the greatest that its authenticator has told."""

    principal: str
    key: str
    credential: str
    entry: int
    count: int = 0


@dataclass
class State:
    """The fold. `latest` is the greatest time that an entry has had, `era` the index of the newest `clock` entry.

    `recent`: the digests of statements, and challenges, that must not come again, each with the time from which it may
    be forgotten and the entry that it is in. Those of releases are too old by then, and void in another era; those of
    inference are counted; all others are kept for ever: after the clock was set back they would be young again.
    """

    FOLD: ClassVar[int] = 7  # raised with every change of what an entry does here: snapshots of before are void

    room: str = ""
    signer: str = ""
    custody: str = ""
    recovery: str = ""  # the public key of what recovery shares sign, if there are shares
    policy: str = ""
    policy_since: int = 0
    latest: int = 0
    era: int = 0
    decided: int = 0  # the index of the newest entry that may change a decision
    most_granters: int = 0  # people who were officers or executives at one time; never less
    principals: dict[str, Principal] = field(default_factory=dict)
    versions: dict[str, Version] = field(default_factory=dict)
    requests: dict[str, Request] = field(default_factory=dict)
    leases: dict[str, Lease] = field(default_factory=dict)
    uses: dict[str, Use] = field(default_factory=dict)
    proposals: dict[str, Proposal] = field(default_factory=dict)
    grants: dict[str, Grant] = field(default_factory=dict)
    authorities: dict[str, str] = field(default_factory=dict)  # by name: the text that formats/authority.py reads
    passkeys: dict[str, Passkey] = field(default_factory=dict)  # by the identifier of the key
    sessions: dict[str, Session] = field(default_factory=dict)  # by the identifier of the key
    apikeys: dict[str, ApiKey] = field(default_factory=dict)  # by digest; those that have ended, too
    usage: dict[str, dict[str, usage.Usage]] = field(default_factory=dict)  # by day since 1970, as text, and reference
    hours: dict[str, dict[str, int]] = field(default_factory=dict)  # bits, by hour since 1970, as text, and reference
    gateways: dict[str, Told] = field(default_factory=dict)  # by the stream of a worker
    ceilings: dict[str, list[int]] = field(default_factory=dict)  # by name or reference: holders, copies, copiers
    # Releases past a lease, policies before their time, and people who were reinstated, that nobody else has reviewed:
    # the index of the entry, as text, and the person.
    emergencies: dict[str, str] = field(default_factory=dict)
    recent: dict[str, list[int]] = field(default_factory=dict)

    # -- asking --------------------------------------------------------------------------------------------------

    def lease_for(self, holder: str, action: str, ref: str, now: int) -> Lease | None:
        """The lease that covers this, of several the one that ends last."""
        found = [
            lease
            for lease in self.leases.values()
            if (lease.holder, lease.action, lease.ref) == (holder, action, ref) and lease.holds(now)
        ]
        return max(found, key=lambda lease: lease.expires_at, default=None)

    def granters(self, path: str = "", roles: Sequence[str] = ()) -> set[str]:
        """The people who may bring others in, by their roles, if `path` had these `roles`, and acted."""
        now = {each.path: each.roles for each in self.principals.values() if each.active}
        if path in self.principals:
            now[path] = list(roles)
        found = (self.principals[each] for each, held in now.items() if grants(each, self.principals[each].key, held))
        return {each.person for each in found}

    # -- applying ------------------------------------------------------------------------------------------------

    def apply(self, index: int, entry: Entry) -> None:
        """Take in the entry at `index`; Tampered ``log.malformed`` for one that can't follow those before it."""
        if (index == 0) != (entry.type == "genesis"):
            raise Tampered("log.malformed", f"entry {index} is {entry.type}: the first entry, and only it, is genesis")
        # `clock` is how an administrator sets the room's time back; every other entry only moves it on.
        self.latest = entry.at if entry.type == "clock" else max(self.latest, entry.at)
        if entry.type not in _NO_MATTER:
            self.decided = index
        if statement := entry.body.get("statement"):
            until = entry.at + _REMEMBERED if entry.type in ("release", "inference") else _FOR_EVER
            said = Statement.decode(statement)
            self._remember(said.digest, until, index)
            if (used := self.passkeys.get(said.key_id)) is not None:
                used.count = max(used.count, said.count)
        if apply := _APPLY.get(entry.type):
            try:
                apply(self, index, entry)
            except KeyError as error:
                raise Tampered("log.malformed", f"entry {index} ({entry.type}) refers to nothing: {error}") from None

    def _remember(self, digest: str, until: int, index: int) -> None:
        self.recent[digest] = [until, index]
        if len(self.recent) % 64 == 0:
            self.recent = {key: item for key, item in self.recent.items() if item[0] >= self.latest}

    def _genesis(self, _: int, entry: Entry) -> None:
        body = entry.body
        self.room, self.signer, self.custody = body["room"], body["signer"], body["custody"]
        self.policy, self.policy_since = body["policy"], entry.at
        self.recovery = body.get("recovery", "")

    def _reinstate(self, index: int, entry: Entry) -> None:
        record = reinstated(self.principals.get(entry.body["principal"]), entry.body)
        self._install(index, entry.at, record)
        self.emergencies[str(index)] = record["person"]

    def _principal(self, index: int, entry: Entry) -> None:
        self._install(index, entry.at, entry.body)

    def _grant(self, _: int, entry: Entry) -> None:
        said = Statement.decode(entry.body["statement"])
        before = self.principals.get(said.body["principal"])
        self.grants[entry.body["id"]] = Grant(
            entry.body["id"],
            said.digest,
            resolved(before, said.body),
            before.entry if before else None,
            entry.by,
            entry.at,
            entry.body["expires_at"],
            self._method(entry, said),
        )

    def _install(self, index: int, at: int, body: Mapping[str, Any]) -> None:
        path = body["principal"]
        before = self.principals.get(path)
        self.principals[path] = Principal(
            path,
            body["key"],
            body["person"],
            list(body["roles"]),
            list(body["teams"]),
            body["state"],
            before.since if before else at,
            index,
            body.get("subject", ""),
        )
        self._end_sessions(lambda session: session.principal == path)
        if body["state"] == "removed" or before is None or before.key != body["key"]:
            # What another key has added may have been added by whoever had stolen that.
            self.passkeys = {name: each for name, each in self.passkeys.items() if each.principal != path}
        if body["state"] != "active" or before is None or before.key != body["key"]:
            self._end_apikeys(lambda each: each.principal == path)
        self.most_granters = max(self.most_granters, len(self.granters()))
        if body["state"] != "active" or (
            before and (before.key, before.subject) != (body["key"], body.get("subject", ""))
        ):
            self._end_leases(lambda lease: lease.holder == path, f"the principal changed in entry {index}")

    def _authority(self, _: int, entry: Entry) -> None:
        said, until = Statement.decode(entry.body["statement"]), entry.body["expires_at"]
        if until is None:
            self._trust(said.body)
            return
        self.grants[entry.body["id"]] = Grant(
            entry.body["id"], said.digest, dict(said.body), None, entry.by, entry.at, until, self._method(entry, said)
        )

    def _trust(self, record: Mapping[str, Any]) -> None:
        """Take an authority at its word from now on, or, with an empty text, no more. What it said before is void: it
        was said under other terms."""
        name = record["authority"]
        # What others have asked for about it was asked of something else: taken away, it must not come back by that.
        for each in self.grants.values():
            if each.record.get("authority") == name and each.state == "pending":
                each.state = "outdated"
        if record["text"]:
            self.authorities[name] = record["text"]
        else:
            self.authorities.pop(name, None)
        self._end_sessions(lambda session: session.authority == name)

    def _session(self, index: int, entry: Entry) -> None:
        body = entry.body
        said = Statement.decode(body["statement"])
        self._remember(body["proof"], _FOR_EVER, index)
        self._end_sessions(lambda session: session.expires_at <= entry.at)
        self.sessions[said.key_id] = Session(
            self.principals[entry.by].path,
            body["public_key"],
            body["method"],
            body["authority"],
            body["expires_at"],
            index,
        )

    def _passkey(self, index: int, entry: Entry) -> None:
        body = entry.body
        name = hashlib.sha256(bytes.fromhex(body["key"])).hexdigest()
        if body["state"] == "active":
            self.passkeys[name] = Passkey(self.principals[entry.by].path, body["key"], body["credential"], index)
        else:
            self.passkeys.pop(name, None)

    def _apikey(self, index: int, entry: Entry) -> None:
        apikeys.apply(self, index, entry, Statement.decode(entry.body["statement"]))

    def _inference(self, _: int, entry: Entry) -> None:
        usage.apply(self, entry)

    def _end_sessions(self, which: Callable[[Session], bool]) -> None:
        self.sessions = {name: each for name, each in self.sessions.items() if not which(each)}
        self._end_apikeys(lambda each: bool(each.session) and each.session not in self.sessions)

    def _end_apikeys(self, which: Callable[[ApiKey], bool]) -> None:
        for each in self.apikeys.values():
            each.ended = each.ended or which(each)

    def _proposal(self, _: int, entry: Entry) -> None:
        body = entry.body
        said = Statement.decode(body["statement"])
        self.proposals[body["id"]] = Proposal(
            body["id"],
            body["digest"],
            said.digest,
            entry.by,
            entry.at,
            body["enact_after"],
            self._method(entry, said),
        )

    def _policy(self, index: int, entry: Entry) -> None:
        self.policy, self.policy_since = entry.body["digest"], entry.at
        self.proposals[entry.body["proposal"]].state = "enacted"
        if entry.body["break_glass"]:
            self.emergencies[str(index)] = self.principals[entry.by].person

    def _put(self, _: int, entry: Entry) -> None:
        body = entry.body
        self.versions[entry.ref] = Version(entry.ref, body["version"], body["revision"], body["manifest"])

    def _rotate(self, _: int, entry: Entry) -> None:
        version = self.versions[entry.ref]
        version.revision, version.manifest = entry.body["revision"], entry.body["manifest"]

    def _shred(self, index: int, entry: Entry) -> None:
        self.versions[entry.ref].shredded = True
        self._end_leases(lambda lease: lease.ref == entry.ref, f"shredded in entry {index}")

    def _request(self, index: int, entry: Entry) -> None:
        body = entry.body
        self.requests[body["id"]] = Request(
            body["id"],
            Statement.decode(body["statement"]).digest,
            body["action"],
            entry.ref,
            body["for"],
            entry.by,
            body["duration"],
            body["uses"],
            entry.at,
            body["expires_at"],
            index,
        )

    def _approve(self, index: int, entry: Entry) -> None:
        body = entry.body
        found = self.proposals.get(body["id"]) or self.grants.get(body["id"]) or self.requests[body["id"]]
        person = self.principals[entry.by].person
        method = self._method(entry, Statement.decode(body["statement"]))
        approval = Approval(entry.by, person, list(body["roles"]), entry.at, index, method)
        if isinstance(found, Grant):
            found.state, found.approved_by = "approved", entry.by
            if "authority" in found.record:
                self._trust(found.record)
            else:
                self._install(index, entry.at, found.record)
            return
        found.approvals.append(approval)
        if isinstance(found, Proposal):
            return
        found.duration, found.uses = body["duration"], body["uses"]
        if lease := body["lease"]:
            found.state = "approved"
            self.leases[lease["id"]] = Lease(
                lease["id"],
                lease["holder"],
                lease["action"],
                lease["ref"],
                entry.at,
                lease["expires_at"],
                lease["uses"],
            )

    def _deny(self, _: int, entry: Entry) -> None:
        identifier = entry.body["id"]
        found = self.requests.get(identifier) or self.grants.get(identifier) or self.proposals[identifier]
        found.state = "denied"

    def _release(self, index: int, entry: Entry) -> None:
        body = entry.body
        self._remember(body["challenge"], entry.at + _REMEMBERED, index)
        fresh = Use(body["holder"], entry.ref, entry.at, entry.at)
        use = self.uses.setdefault(f"{body['holder']} {entry.ref}", fresh)
        use.last = entry.at
        use.releases += 1
        if body["action"] == "copy":
            use.copies += 1
        if body["break_glass"]:
            self.emergencies[str(index)] = self.principals[body["holder"]].person
        if body["lease"] is not None:
            self.leases[body["lease"]].used += 1

    def _trace(self, _: int, entry: Entry) -> None:
        if entry.body["lease"] is not None:
            self.leases[entry.body["lease"]].used += 1

    def _ceiling(self, _: int, entry: Entry) -> None:
        self.ceilings[entry.ref] = [entry.body[name] for name in ("holders", "copies", "copiers")]

    def _thaw(self, _: int, entry: Entry) -> None:
        self.versions[entry.ref].frozen = False

    def _review(self, _: int, entry: Entry) -> None:
        # Nobody looks at their own emergency, under any of their identities; where there is one person by design, there
        # is nobody else. And nobody has looked at what came after the log that was reviewed.
        person = self.principals[entry.by].person if self.custody != "solo" else ""
        size = entry.body["size"]
        self.emergencies = {at: who for at, who in self.emergencies.items() if who == person or int(at) >= size}

    def _renew(self, _: int, entry: Entry) -> None:
        self.leases[entry.body["lease"]].expires_at = entry.body["expires_at"]

    def _revoke(self, index: int, entry: Entry) -> None:
        target, why = entry.body["target"], f"revoked in entry {index}"
        if target in self.requests:
            self.requests[target].state = "revoked"
            self._end_leases(lambda lease: lease.id == target, why)
        elif target in self.principals:
            if self.principals[target].active:
                self.principals[target].state = "suspended"
            self.principals[target].entry = index
            self._end_sessions(lambda session: session.principal == target)
            self._end_apikeys(lambda each: each.principal == target)
            self._end_leases(lambda lease: lease.holder == target, why)
        else:
            self.versions[target].frozen = True
            self._end_leases(lambda lease: lease.ref == target, why)

    def _clock(self, index: int, _: Entry) -> None:
        self.era = index
        self._end_sessions(lambda _: True)
        self._end_leases(lambda _: True, f"the clock was set back in entry {index}")

    def _method(self, entry: Entry, said: Statement) -> str:
        """By which kind of key `entry` was signed; Tampered ``log.malformed`` if none of its principal's made it."""
        key = key_of(self, entry.by, said.key_id, entry.at)
        if key is None:
            raise Tampered("log.malformed", f"{entry.by} had no key that signed its entry of type {entry.type}")
        return key.method

    def _end_leases(self, which: Callable[[Lease], bool], why: str) -> None:
        for lease in self.leases.values():
            if which(lease) and not lease.ended:
                lease.ended = why

    # -- snapshots -----------------------------------------------------------------------------------------------

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> State:
        """The reverse of `as_json`, of a snapshot that the log key signed; Tampered for anything else."""
        try:
            return cls(
                **{
                    **value,
                    "principals": {key: Principal(**item) for key, item in value["principals"].items()},
                    "versions": {key: Version(**item) for key, item in value["versions"].items()},
                    "requests": {key: _approved(Request, item) for key, item in value["requests"].items()},
                    "leases": {key: Lease(**item) for key, item in value["leases"].items()},
                    "uses": {key: Use(**item) for key, item in value["uses"].items()},
                    "grants": {key: Grant(**item) for key, item in value["grants"].items()},
                    "passkeys": {key: Passkey(**item) for key, item in value["passkeys"].items()},
                    "sessions": {key: Session(**item) for key, item in value["sessions"].items()},
                    "apikeys": {key: ApiKey(**item) for key, item in value["apikeys"].items()},
                    "gateways": {key: Told(**item) for key, item in value["gateways"].items()},
                    "usage": usage.from_json(value["usage"]),
                    "proposals": {key: _approved(Proposal, item) for key, item in value["proposals"].items()},
                }
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise Tampered("log.snapshot", f"the snapshot of the log does not hold together: {error}") from None


def _approved(kind: Callable[..., Any], item: dict[str, Any]) -> Any:
    return kind(**{**item, "approvals": [Approval(**each) for each in item["approvals"]]})


_APPLY: dict[str, Callable[[State, int, Entry], None]] = {
    "genesis": State._genesis,
    "principal": State._principal,
    "reinstate": State._reinstate,
    "grant": State._grant,
    "authority": State._authority,
    "passkey": State._passkey,
    "session": State._session,
    "apikey": State._apikey,
    "inference": State._inference,
    "proposal": State._proposal,
    "policy": State._policy,
    "put": State._put,
    "rotate": State._rotate,
    "shred": State._shred,
    "request": State._request,
    "approve": State._approve,
    "deny": State._deny,
    "release": State._release,
    "trace": State._trace,
    "renew": State._renew,
    "review": State._review,
    "ceiling": State._ceiling,
    "thaw": State._thaw,
    "revoke": State._revoke,
    "clock": State._clock,
}
