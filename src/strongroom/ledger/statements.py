"""What the entries of a log say, checked offline (spec/ledger.md, section 7, steps 4 and 5). Like verify.py it imports
formats only: whoever trusts none of us can read it in a sitting."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field

from strongroom.errors import Tampered
from strongroom.formats.entry import CUSTODIAN, Entry
from strongroom.formats.statement import Statement

Verify = Callable[[bytes, bytes, bytes], None]

# On which kind of statement an entry rests whose type has another name.
_RESTS_ON = {"proposal": "propose", "policy": "enact", "grant": "principal", "session": "login"}


@dataclass
class _Proposal:
    """A policy that was proposed: who of the persons has agreed, the proposer among them."""

    digest: str
    enact_after: int
    persons: set[str] = field(default_factory=set)


class Statements:
    """Genesis first, and every statement signed by a key that the log gave its principal before. Entries are handed to
    `check` in their order; `verify` takes key, signature and message and raises Tampered."""

    def __init__(self, origin: str, verify: Verify) -> None:
        self._origin, self._verify = origin, verify
        self._room = ""
        self._keys: dict[str, str] = {}  # of those who are active
        self._persons: dict[str, str] = {}
        self._proposals: dict[str, _Proposal] = {}
        self._waiting: dict[str, Statement] = {}  # changes of principals that a second person has to agree to
        self._asked: dict[str, str] = {}  # authorities that a second person has to agree to
        # By the key's identifier: key, principal, authority and end of a key that a login has introduced.
        self._sessions: dict[str, tuple[str, str, str, int]] = {}
        self._passkeys: dict[str, tuple[str, str]] = {}  # by the key's identifier: key and principal
        self._own: dict[str, str] = {}  # the newest own key of everybody, whoever may act or not
        self._seen: set[str] = set()
        self.count = 0

    def check(self, index: int, entry: Entry) -> None:
        """Tampered unless the entry at `index` rests on what it has to rest on."""
        if (index == 0) != (entry.type == "genesis"):
            raise Tampered("log.malformed", "the first entry, and only it, is genesis")
        if index == 0:
            self._room = entry.body["room"]
            if self._origin.rpartition("/")[2] != self._room:
                raise Tampered("log.other", f"the log {self._origin} begins with another room")
        envelope = entry.body.get("statement")
        if envelope:
            self._check_statement(entry, Statement.decode(envelope))
        elif envelope is not None and not self._by_itself(entry):
            raise Tampered("statement.missing", f"the entry {entry.type} rests on a statement, and has none")
        if entry.type == "policy":
            self._check_policy(entry)
        self._apply(entry)

    def _by_itself(self, entry: Entry) -> bool:
        """Whether this is what a custodian does without anybody's word: who and what is there when the log begins has
        been said by nobody; and who recovers a room shows shares, and no key. All else would be its word for others."""
        if entry.by != CUSTODIAN:
            return False
        if entry.type == "keystore":
            return bool(entry.body["operation"] == "recover")
        return entry.type in ("principal", "put", "shred") and not self.count

    # -- what an entry changes -----------------------------------------------------------------------------------

    def _apply(self, entry: Entry) -> None:
        """Which keys speak for whom, and what waits for whose word, after `entry`."""
        body = entry.body
        match entry.type:
            case "principal":
                self._install(body["principal"], body["key"], body["person"], body["state"])
            case "passkey":
                key = bytes.fromhex(body["key"])
                self._passkeys.pop(hashlib.sha256(key).hexdigest(), None)
                if body["state"] == "active":
                    self._passkeys[hashlib.sha256(key).hexdigest()] = (key.hex(), entry.by)
            case "session":
                key_id = Statement.decode(body["statement"]).key_id
                self._sessions[key_id] = (body["public_key"], entry.by, body["authority"], body["expires_at"])
            case "authority" if body["expires_at"] is not None:
                self._asked[body["id"]] = body["authority"]
            case "authority":
                self._end(2, body["authority"])
            case "revoke":
                self._keys.pop(body["target"], None)  # of a principal that is suspended
                self._end(1, body["target"])
            case "clock":
                self._sessions.clear()
            case "grant":
                self._waiting[body["id"]] = Statement.decode(body["statement"])
            case "proposal":
                persons = {self._persons.get(entry.by, entry.by)}
                self._proposals[body["id"]] = _Proposal(body["digest"], body["enact_after"], persons)
            case "approve" if body["id"] in self._proposals:
                self._proposals[body["id"]].persons.add(self._persons.get(entry.by, entry.by))
            case "approve" if body["id"] in self._waiting:
                said = self._waiting.pop(body["id"]).body
                self._install(said["principal"], said["key"], said["person"], said["state"])
            case "approve" if body["id"] in self._asked:
                self._end(2, self._asked.pop(body["id"]))

    def _install(self, path: str, key: str, person: str, state: str) -> None:
        if state == "removed" or self._own.get(path) != key:
            self._passkeys = {name: each for name, each in self._passkeys.items() if each[1] != path}
        self._own[path], self._persons[path] = key, person
        if state == "active":
            self._keys[path] = key
        else:
            self._keys.pop(path, None)
        self._end(1, path)

    def _end(self, place: int, name: str) -> None:
        """No key that a login introduced speaks for this principal (1), or on this authority's word (2), any more."""
        self._sessions = {key_id: each for key_id, each in self._sessions.items() if each[place] != name}

    # -- what it rests on ----------------------------------------------------------------------------------------

    def _key(self, entry: Entry, statement: Statement) -> str:
        """The key that `statement` has to be signed with, or empty: its principal's own, or one that a login has
        introduced and that is good still. A login is signed with the key that it introduces. Whoever is suspended or
        removed has none."""
        if statement.by not in self._keys:
            return ""
        if entry.type == "session":
            return str(statement.body.get("public_key", ""))
        own, whose = self._passkeys.get(statement.key_id, ("", ""))
        if own and whose == statement.by:
            return own
        key, by, _, until = self._sessions.get(statement.key_id, ("", "", "", 0))
        return key if by == statement.by and entry.at < until else self._keys[statement.by]

    def _check_passkey(self, entry: Entry, signed_with: str) -> None:
        """Else a custodian that lies could make of a passkey or a login that was borrowed once a key that stays, or
        take somebody's passkey away on another's word."""
        name = hashlib.sha256(bytes.fromhex(entry.body["key"])).hexdigest()
        whose = self._passkeys.get(name, ("", ""))[1]
        if entry.body["state"] == "removed" and whose != entry.by:
            raise Tampered("statement.foreign", f"the passkey that is removed is not one of {entry.by}")
        if entry.body["state"] == "active" and (whose or signed_with != self._keys.get(entry.by)):
            raise Tampered("statement.foreign", f"the passkey is not added with {entry.by}'s own key, or not new")

    def _check_policy(self, entry: Entry) -> None:
        """A policy is one that was proposed, by one person, and agreed to by another; and it has waited, if it is no
        emergency."""
        found = self._proposals.pop(entry.body["proposal"] or "", None)
        if found is None or found.digest != entry.body["digest"]:
            raise Tampered("policy.unproposed", "the policy that is put in force is not one that waits")
        early = entry.at < found.enact_after and not entry.body["break_glass"]
        if len(found.persons) < 2 or early:
            raise Tampered("policy.hasty", "the policy was put in force by one person alone, or before its time")

    def _check_statement(self, entry: Entry, statement: Statement) -> None:
        key = self._key(entry, statement)
        if not key or statement.by != entry.by or statement.room != self._room:
            raise Tampered("statement.foreign", f"the statement is not by {entry.by} of this room")
        statement.verify(key, self._verify)
        if statement.digest in self._seen:
            raise Tampered("statement.replayed", "the statement is in the log twice")
        self._seen.add(statement.digest)
        if entry.type == "passkey":
            self._check_passkey(entry, key)
        if statement.kind != _RESTS_ON.get(entry.type, entry.type):
            raise Tampered("statement.kind", f"an entry {entry.type} rests on a statement of the kind {statement.kind}")
        if differing := _differing(entry, statement):
            raise Tampered(
                "statement.differs", f"the entry does not say what {entry.by} signed: {', '.join(differing)}"
            )
        self.count += 1


def _differing(entry: Entry, statement: Statement) -> list[str]:
    """The members in which `entry` says something else than was signed."""
    said, wrote = statement.body, entry.body
    # What the entry says of its own (an approver's narrowing, an expiry) is the custodian's; the rest is quoted.
    shared = (said.keys() & wrote.keys()) - {"duration", "uses"}
    differing = {name for name in shared if said[name] != wrote[name]}
    if (
        said.get("ref", entry.ref) != entry.ref
        or said.get("name", entry.ref.partition("@")[0]) != entry.ref.partition("@")[0]
    ):
        differing.add("ref")
    # What is private is signed as the commitment to it.
    private = {"reason"} | ({"files"} if entry.type == "put" else set())
    differing |= {name for name in private if said.get(name) and said[name] != entry.private.get(name)}
    if entry.type == "principal" and ("subject" in said) != ("subject" in wrote):
        differing.add("subject")
    if entry.type in ("request", "grant", "proposal", "authority") and wrote["id"] != statement.id:
        differing.add("id")
    if "request" in said and said["request"][:16] != wrote["id"]:
        differing.add("request")
    # Who enacts in an emergency says why.
    if entry.type == "policy" and wrote["break_glass"] != bool(said["reason"]):
        differing.add("break_glass")
    return sorted(differing)
