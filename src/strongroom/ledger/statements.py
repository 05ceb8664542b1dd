"""What the entries of a log say, checked offline (spec/ledger.md, section 7, steps 4 and 5). Like verify.py it imports
formats only: whoever trusts none of us can read it in a sitting."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

from strongroom.core.canonical import MAX_INTEGER
from strongroom.errors import Tampered
from strongroom.formats.authority import LONGEST, Authority
from strongroom.formats.entry import CUSTODIAN, UNKNOWN, Entry
from strongroom.formats.principal import reinstated
from strongroom.formats.statement import Statement
from strongroom.ledger.apikeys import ApiKeys
from strongroom.ledger.consents import Consents
from strongroom.ledger.streams import Streams

Verify = Callable[[bytes, bytes, bytes], None]

_TOLERANCE = 300  # seconds that clocks may differ
# On which kind of statement an entry rests whose type has another name.
_BEGINS = ("put", "trace")  # what is said when a long job begins
_RESTS_ON = {"proposal": "propose", "policy": "enact", "grant": "principal", "session": "login"}


class Statements:
    """Genesis first, and every statement signed by a key that the log gave its principal before. Entries are handed to
    `check` in their order; `verify` takes key, signature and message and raises Tampered."""

    def __init__(self, origin: str, verify: Verify) -> None:
        self._origin, self._verify = origin, verify
        self._room, self._recovery = "", ""
        self._consents, self._apikeys, self._streams = Consents(), ApiKeys(), Streams()
        self._authorities: dict[str, Authority] = {}  # in force
        # By the key's identifier: key, principal, authority and end of a key that a login has introduced.
        self._sessions: dict[str, tuple[str, str, str, int]] = {}
        self._passkeys: dict[str, tuple[str, str]] = {}  # by the key's identifier: key and principal
        self._seen: set[str] = set()
        self._proofs: set[str] = set()  # by which a key was introduced
        self._latest = 0
        self.count = 0

    def check(self, index: int, entry: Entry) -> None:
        """Tampered unless the entry at `index` rests on what it has to rest on."""
        if (index == 0) != (entry.type == "genesis"):
            raise Tampered("log.malformed", "the first entry, and only it, is genesis")
        if index == 0:
            self._room, self._recovery = entry.body["room"], entry.body.get("recovery", "")
            if self._origin.rpartition("/")[2] != self._room:
                raise Tampered("log.other", f"the log {self._origin} begins with another room")
        envelope = entry.body.get("statement")
        if envelope:
            said = Statement.decode(envelope)
            self._check_statement(entry, said)
            self._consents.check(index, entry, said)
            self._check_inference(entry, said)
        elif not self._by_itself(entry):
            raise Tampered("statement.missing", f"the entry {entry.type} rests on a statement, and has none")
        else:
            self._check_inference(entry, None)
        self.apply(index, entry)

    def _check_inference(self, entry: Entry, said: Statement | None) -> None:
        wrong = self._streams.fault(entry, said, self._consents.knows) if entry.type == "inference" else ""
        if wrong:
            raise Tampered("log.unfounded", f"the entry inference does not follow from the log: {wrong}")

    def _by_itself(self, entry: Entry) -> bool:
        """Whether this is what a custodian does without anybody's word: who owns the room and what is there when the
        log begins has been said by nobody; and who recovers a room shows shares, and no key. All else would be its word
        for others."""
        if entry.type == "refused":
            return entry.by == UNKNOWN or entry.by in self._consents.people
        if entry.by != CUSTODIAN:
            return False
        if entry.type in ("genesis", "inference"):
            return True
        if entry.type == "keystore":
            return bool(entry.body["operation"] == "recover")
        if entry.type == "principal":
            return not self._consents.people  # the one owner
        return entry.type in ("put", "shred") and not self.count

    # -- what an entry changes -----------------------------------------------------------------------------------

    def apply(self, index: int, entry: Entry) -> None:
        """Which keys speak for whom after the entry at `index`, which was checked."""
        body = entry.body
        said = Statement.decode(body["statement"]) if body.get("statement") else None
        self._latest = entry.at if entry.type == "clock" else max(self._latest, entry.at)
        match entry.type:
            case "principal":
                self._install(body)
            case "reinstate":
                self._install(reinstated(self._consents.people.get(body["principal"]), body))
            case "passkey":
                key = bytes.fromhex(body["key"])
                self._passkeys.pop(hashlib.sha256(key).hexdigest(), None)
                if body["state"] == "active":
                    self._passkeys[hashlib.sha256(key).hexdigest()] = (key.hex(), entry.by)
            case "session" if said is not None:
                self._proofs.add(body["proof"])
                self._sessions[said.key_id] = (body["public_key"], entry.by, body["authority"], body["expires_at"])
            case "authority" if said is not None and body["expires_at"] is None:
                self._trust(said)
            case "revoke":
                self._end(1, body["target"])
                self._apikeys.end(lambda each: each.principal == body["target"])
            case "clock":
                self._sessions.clear()
                self._apikeys.end(lambda each: bool(each.session))
            case "inference":
                self._streams.apply(entry)
            case "apikey":
                signer = said.key_id if said is not None else ""
                self._apikeys.apply(entry, signer if signer in self._sessions else "")
            case "approve" if grant := self._consents.granted(body["id"]):
                if grant.record:
                    self._install(grant.record)
                else:
                    self._trust(grant.said)
        self._consents.apply(index, entry, said)

    def _install(self, body: Mapping[str, Any]) -> None:
        path = body["principal"]
        before = self._consents.people.get(path)
        if body["state"] == "removed" or before is None or before.key != body["key"]:
            self._passkeys = {name: each for name, each in self._passkeys.items() if each[1] != path}
        if body["state"] != "active" or before is None or before.key != body["key"]:
            self._apikeys.end(lambda each: each.principal == path)
        self._end(1, path)

    def _trust(self, said: Statement) -> None:
        name, text = said.body["authority"], said.body["text"]
        self._authorities.pop(name, None)
        if text:
            self._authorities[name] = Authority.decode(text)
        self._end(2, name)

    def _end(self, place: int, name: str) -> None:
        """No key that a login introduced speaks for this principal (1), or on this authority's word (2), any more."""
        self._sessions = {key_id: each for key_id, each in self._sessions.items() if each[place] != name}
        self._apikeys.end(lambda each: bool(each.session) and each.session not in self._sessions)

    # -- what it rests on ----------------------------------------------------------------------------------------

    def _key(self, entry: Entry, statement: Statement) -> str:
        """The key that `statement` has to be signed with, or empty: its principal's own, or one that a login has
        introduced and that is good still. A login is signed with the key that it introduces. Whoever is suspended or
        removed has none. Nobody's key but that of the recovery shares brings somebody back."""
        if entry.type == "reinstate":
            return self._recovery if statement.by == CUSTODIAN else ""
        who = self._consents.people.get(statement.by)
        if who is None or not who.active:
            return ""
        if entry.type == "session":
            return str(statement.body.get("public_key", ""))
        own, whose = self._passkeys.get(statement.key_id, ("", ""))
        if own and whose == statement.by:
            return own
        key, by, _, until = self._sessions.get(statement.key_id, ("", "", "", 0))
        # By the log's own time, too: an entry that is dated back brings no login to life.
        good = by == statement.by and max(entry.at, self._latest) < until
        return key if good else who.key

    def _check_login(self, entry: Entry, statement: Statement) -> None:
        """Of a login the proof is not in the log; but for nobody who is not bound, nor by an authority that is not
        trusted, nor for longer than that may, does it introduce a key."""
        body = entry.body
        authority, who = self._authorities.get(body["authority"]), self._consents.people.get(entry.by)
        team = entry.by.startswith("team/")
        if authority is None or authority.kind != body["method"] or who is None or not who.subject or team:
            raise Tampered("session.unfounded", f"no authority of the room could let {entry.by} in like this")
        # Else whoever has one token, or the database, would have as many keys of somebody as they like, or one that
        # speaks for two.
        taken = any(each.key == body["public_key"] for each in self._consents.people.values())
        until = self._sessions.get(statement.key_id, ("", "", "", 0))[3]
        if body["proof"] in self._proofs or until > max(entry.at, self._latest) or taken:
            raise Tampered("session.unfounded", f"the proof of {entry.by}, or the key, has been used before")
        longest = min(statement.body["duration"], authority.longest, LONGEST)
        if body["expires_at"] > max(entry.at, self._latest) + longest:
            raise Tampered("session.unfounded", f"the login of {entry.by} is longer than it may be")

    def _check_passkey(self, entry: Entry, signed_with: str) -> None:
        """Else a custodian that lies could make of a passkey or a login that was borrowed once a key that stays, or
        take somebody's passkey away on another's word."""
        name = hashlib.sha256(bytes.fromhex(entry.body["key"])).hexdigest()
        whose = self._passkeys.get(name, ("", ""))[1]
        if entry.body["state"] == "removed" and whose != entry.by:
            raise Tampered("statement.foreign", f"the passkey that is removed is not one of {entry.by}")
        if entry.body["state"] == "active" and (whose or signed_with != self._consents.people[entry.by].key):
            raise Tampered("statement.foreign", f"the passkey is not added with {entry.by}'s own key, or not new")

    def _check_apikey(self, entry: Entry, statement: Statement, signed_with: str) -> None:
        """Else a custodian that lies could make a key for somebody, or of a login that was borrowed once one that
        stays."""
        own = signed_with == self._consents.people[entry.by].key
        session = self._sessions.get(statement.key_id)
        until = MAX_INTEGER if own else session[3] if session is not None else None
        if wrong := self._apikeys.fault(entry, statement, max(entry.at, self._latest), until):
            raise Tampered("log.unfounded", f"the entry apikey does not follow from the log: {wrong}")

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
        if entry.type == "session":
            self._check_login(entry, statement)
        # Held back, or dated back, it would be another decision than was made. Shredding and mending the clock must be
        # possible whatever the clock says.
        if entry.type not in _BEGINS and abs(entry.at - statement.at) > _TOLERANCE:
            raise Tampered(
                "statement.late", f"the statement was made {abs(entry.at - statement.at)} seconds off its entry"
            )
        if entry.type not in ("clock", "shred") and entry.at < self._latest - _TOLERANCE:
            raise Tampered("entry.early", f"the entry is {self._latest - entry.at} seconds older than one before it")
        if statement.kind != _RESTS_ON.get(entry.type, entry.type):
            raise Tampered("statement.kind", f"an entry {entry.type} rests on a statement of the kind {statement.kind}")
        if differing := _differing(entry, statement):
            raise Tampered(
                "statement.differs", f"the entry does not say what {entry.by} signed: {', '.join(differing)}"
            )
        if entry.type == "apikey":
            self._check_apikey(entry, statement, key)
        self.count += 1


def _differing(entry: Entry, statement: Statement) -> list[str]:
    """The members in which `entry` says something else than was signed."""
    said, wrote = statement.body, entry.body
    # What the entry says of its own (an approver's narrowing, an expiry) is the custodian's; the rest is quoted.
    shared = said.keys() & wrote.keys()
    if entry.type in ("approve", "renew"):
        shared = shared - {"duration", "uses"}
    if entry.type == "principal":  # what is left open is looked up in the record before: in consents.py
        shared = {"principal"}
    differing = {name for name in shared if said[name] != wrote[name]}
    if entry.type == "inference":  # that something is captured, or nothing, is signed, too
        differing |= (said.keys() ^ wrote.keys()) - {"account", "ref", "statement"}
    if entry.type == "release":  # floats are not what was signed for where it was a quantised copy, nor the other way
        differing |= {"form"} & (said.keys() ^ wrote.keys())
    name = entry.ref.partition("@")[0]
    named = said.get("name", name) if entry.type != "apikey" else name  # which has a name of its own
    if (said.get("ref", entry.ref) or "") != entry.ref or named != name:
        differing.add("ref")
    # What is private is signed as the commitment to it.
    private = {"reason"} | ({"files"} if entry.type == "put" else set())
    differing |= {name for name in private if said.get(name) and said[name] != entry.private.get(name)}
    found = {"detail"} if entry.type == "trace" else set()  # by the custodian
    differing |= {name for name in entry.private if (name not in private or not said.get(name)) and name not in found}
    if entry.type in ("request", "grant", "proposal", "authority") and wrote["id"] != statement.id:
        differing.add("id")
    if "request" in said and said["request"][:16] != wrote["id"]:
        differing.add("request")
    # Who enacts in an emergency says why.
    if entry.type == "policy" and wrote["break_glass"] != bool(said["reason"]):
        differing.add("break_glass")
    return sorted(differing)
