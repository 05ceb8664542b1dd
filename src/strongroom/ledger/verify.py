"""Checking a log offline (spec/ledger.md, section 7): from what was published of it and the log's public key, with
nothing of the room. It imports formats only; whoever trusts none of us can read it in a sitting."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from strongroom.errors import CannotVerify, Forked, NotFound, Rollback, StrongroomError, Tampered, Truncated
from strongroom.formats.checkpoint import Checkpoint, verify_cosignature
from strongroom.formats.entry import CUSTODIAN, Entry
from strongroom.formats.merkle import Frontier, leaf_hash
from strongroom.formats.note import Note, VerifierKey, verify_note
from strongroom.formats.statement import Statement
from strongroom.formats.tiles import WIDTH, Tile, all_tiles, decode_bundle

# On which kind of statement an entry rests whose type has another name.
_RESTS_ON = {"proposal": "propose", "grant": "principal", "session": "login"}

Verify = Callable[[bytes, bytes, bytes], None]


@dataclass(frozen=True)
class LogReport:
    """A log that holds together. `statements` is how many signed statements were checked."""

    size: int
    root: str
    origin: str
    signed_by: list[str]
    witnessed_by: list[str] = field(default_factory=list)
    statements: int = 0

    def as_json(self) -> dict[str, Any]:
        return {"ok": True, **vars(self)}


def verify_log(
    read: Callable[[str], bytes],
    key: VerifierKey,
    verify: Verify,
    *,
    remembered: Checkpoint | None = None,
    witnesses: Sequence[VerifierKey] = (),
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> LogReport:
    """The report of the log whose files `read` returns by their tlog-tiles name (NotFound for one that is missing).

    `verify` takes key, signature and message and raises Tampered. Tampered, Truncated, Rollback or Forked for a log
    that does not hold together; the message says at which entry.
    """
    # Step 1: the checkpoint.
    note = Note.decode(read("checkpoint"))
    signed_by = verify_note(note, [key], verify)
    if key.name not in signed_by:
        raise Tampered("log.unsigned", "the checkpoint is not signed by the log key", hint="--key of the right log")
    checkpoint = Checkpoint.decode(note.text)
    if checkpoint.origin != key.name:
        raise Tampered("log.other", f"the checkpoint is of the log {checkpoint.origin!r:.80}, not {key.name}")
    if remembered is not None and remembered.size > checkpoint.size:
        raise Rollback("log.rollback", f"the log has {checkpoint.size} entries, and had {remembered.size} before")
    # Steps 2 and 3: entries, tiles, root. Steps 4 and 5: what the entries say.
    statements = _Statements(key.name, verify)
    frontier = Frontier()
    tiles = _Tiles(read, checkpoint.size)
    for begin, entries in _bundles(read, checkpoint.size):
        leaves = []
        for index, data in enumerate(entries, begin):
            try:
                statements.check(index, Entry.decode(data))
            except StrongroomError as error:
                error.evidence.setdefault("entry", index)
                error.message = f"entry {index}: {error.message}"
                raise
            leaves.append(leaf_hash(data))
        _extend(frontier, leaves, tiles, remembered)
        progress(frontier.size, checkpoint.size)
    tiles.finish()
    if frontier.root() != checkpoint.root:
        raise Tampered("log.tampered", f"the {frontier.size} entries do not have the root that was signed")
    # Step 6 for a checkpoint of this very size, or of the empty log; `_extend` has seen those between.
    if remembered is not None and remembered.size == checkpoint.size and remembered.root != checkpoint.root:
        raise _forked(remembered)
    # Step 7.
    missing = [witness.name for witness in witnesses if verify_cosignature(note, witness, verify) is None]
    if missing:
        raise CannotVerify(
            "log.unwitnessed",
            f"{', '.join(missing)} has not cosigned this checkpoint of {checkpoint.size} entries",
            hint="strongroom log cosign --url URL --witness VKEY",
        )
    seen = sorted(witness.name for witness in witnesses)
    return LogReport(
        checkpoint.size, checkpoint.root.hex(), checkpoint.origin, sorted(signed_by), seen, statements.count
    )


def _extend(frontier: Frontier, leaves: list[bytes], tiles: _Tiles, remembered: Checkpoint | None) -> None:
    """Append leaves, compare the tiles that they complete, and the tree at the size that was remembered."""
    split = remembered.size - frontier.size if remembered is not None else 0
    parts = [leaves[:split], leaves[split:]] if 0 < split < len(leaves) else [leaves]
    for part in parts:
        for level, position, value in frontier.extend(part):
            tiles.compare(level, position, value)
        if remembered is not None and frontier.size == remembered.size and frontier.root() != remembered.root:
            raise _forked(remembered)
    tiles.leaves(frontier.size, leaves)


def _forked(remembered: Checkpoint) -> Forked:
    return Forked(
        "log.forked",
        f"this log is not the one that was seen before: its first {remembered.size} entries have another root",
        hint="keep both: somebody was shown another history",
    )


def _bundles(read: Callable[[str], bytes], size: int) -> Iterator[tuple[int, list[bytes]]]:
    for begin in range(0, size, WIDTH):
        width = min(WIDTH, size - begin)
        entries = decode_bundle(_read(read, Tile(None, begin // WIDTH, width)))
        if len(entries) != width:
            raise Tampered("log.bundle", f"the bundle of entries from {begin} has {len(entries)} of {width}")
        yield begin, entries


def _read(read: Callable[[str], bytes], tile: Tile) -> bytes:
    try:
        return read(tile.path)
    except NotFound:
        raise Truncated("log.truncated", f"{tile.path} is missing from the log") from None


class _Tiles:
    """The tiles of a log of `size`: every hash in them is compared with the one that the entries give."""

    def __init__(self, read: Callable[[str], bytes], size: int) -> None:
        self._read = read
        self._wanted = {(tile.level, tile.index): tile for tile in all_tiles(size) if tile.level is not None}
        self._got: dict[tuple[int, int], list[bytes]] = {}

    def leaves(self, end: int, leaves: list[bytes]) -> None:
        """All leaves of one tile of level 0, which ends at `end`."""
        self._collect(0, (end - 1) // WIDTH, leaves)

    def compare(self, level: int, position: int, value: bytes) -> None:
        if level and level % 8 == 0:
            self._collect(level // 8, position // WIDTH, [value])

    def _collect(self, level: int, index: int, values: list[bytes]) -> None:
        got = self._got.setdefault((level, index), [])
        got += values
        tile = self._wanted.get((level, index))
        if tile is None or len(got) < tile.width:
            return
        hashes = _read(self._read, tile)
        if hashes != b"".join(got):
            wrong = next((k for k, value in enumerate(got) if hashes[32 * k : 32 * k + 32] != value), len(got) - 1)
            entry = (index * WIDTH + wrong) << 8 * level
            which = f"entry {entry}" if level == 0 else f"the entries from {entry}"
            raise Tampered("log.tile", f"{which}: {tile.path} has another hash than what was read", entry=entry)
        del self._wanted[level, index], self._got[level, index]

    def finish(self) -> None:
        if self._wanted:
            raise Truncated("log.truncated", f"{next(iter(self._wanted.values())).path} could not be compared")


class _Statements:
    """Steps 4 and 5: genesis first, and every statement signed by the key that the log gave its principal before."""

    def __init__(self, origin: str, verify: Verify) -> None:
        self._origin, self._verify = origin, verify
        self._room = ""
        self._keys: dict[str, str] = {}
        self._waiting: dict[str, tuple[str, str]] = {}  # principals and keys that a second person has to agree to
        self._asked: dict[str, str] = {}  # authorities that a second person has to agree to
        # By the key's identifier: key, principal, authority and end of a key that a login has introduced.
        self._sessions: dict[str, tuple[str, str, str, int]] = {}
        self._passkeys: dict[str, tuple[str, str]] = {}  # by the key's identifier: key and principal
        self._seen: set[str] = set()
        self.count = 0

    def check(self, index: int, entry: Entry) -> None:
        if (index == 0) != (entry.type == "genesis"):
            raise Tampered("log.malformed", "the first entry, and only it, is genesis")
        if index == 0:
            self._room = entry.body["room"]
            if self._origin.rpartition("/")[2] != self._room:
                raise Tampered("log.other", f"the log {self._origin} begins with another room")
        envelope = entry.body.get("statement")
        if envelope:
            self._check_statement(entry, Statement.decode(envelope))
        elif envelope is not None and (entry.type != "principal" or entry.by != CUSTODIAN or self.count):
            # Who is there when the room is made, nobody has said. All else would be the custodian's word for others.
            raise Tampered("statement.missing", f"the entry {entry.type} rests on a statement, and has none")
        self._who_speaks(entry)

    def _who_speaks(self, entry: Entry) -> None:
        """Which keys speak for whom after `entry`."""
        if entry.type == "principal":
            self._install(entry.body["principal"], entry.body["key"], removed=entry.body["state"] == "removed")
        elif entry.type == "passkey":
            key = bytes.fromhex(entry.body["key"])
            self._passkeys.pop(hashlib.sha256(key).hexdigest(), None)
            if entry.body["state"] == "active":
                self._passkeys[hashlib.sha256(key).hexdigest()] = (key.hex(), entry.by)
        elif entry.type == "session":
            body = entry.body
            key_id = Statement.decode(body["statement"]).key_id
            self._sessions[key_id] = (body["public_key"], entry.by, body["authority"], body["expires_at"])
        elif entry.type == "authority" and entry.body["expires_at"] is not None:
            self._asked[entry.body["id"]] = entry.body["authority"]
        elif entry.type == "authority":
            self._end(2, entry.body["authority"])
        elif entry.type == "revoke":
            self._end(1, entry.body["target"])
        elif entry.type == "clock":
            self._sessions.clear()
        elif entry.type == "grant":
            said = Statement.decode(entry.body["statement"]).body
            self._waiting[entry.body["id"]] = (said["principal"], said["key"])
        elif entry.type == "approve" and entry.body["id"] in self._waiting:
            self._install(*self._waiting.pop(entry.body["id"]))
        elif entry.type == "approve" and entry.body["id"] in self._asked:
            self._end(2, self._asked.pop(entry.body["id"]))

    def _install(self, path: str, key: str, *, removed: bool = False) -> None:
        if removed or self._keys.get(path) != key:
            self._passkeys = {name: each for name, each in self._passkeys.items() if each[1] != path}
        self._keys[path] = key
        self._end(1, path)

    def _end(self, place: int, name: str) -> None:
        """No key that a login introduced speaks for this principal (1), or on this authority's word (2), any more."""
        self._sessions = {key_id: each for key_id, each in self._sessions.items() if each[place] != name}

    def _key(self, entry: Entry, statement: Statement) -> str:
        """The key that `statement` has to be signed with, or empty: its principal's own, or one that a login has
        introduced and that is good still. A login is signed with the key that it introduces."""
        if entry.type == "session":
            return str(statement.body.get("public_key", ""))
        own, whose = self._passkeys.get(statement.key_id, ("", ""))
        if own and whose == statement.by:
            return own
        key, by, _, until = self._sessions.get(statement.key_id, ("", "", "", 0))
        return key if by == statement.by and entry.at < until else self._keys.get(statement.by, "")

    def _check_passkey(self, entry: Entry, signed_with: str) -> None:
        """Else a custodian that lies could make of a passkey or a login that was borrowed once a key that stays, or
        take somebody's passkey away on another's word."""
        name = hashlib.sha256(bytes.fromhex(entry.body["key"])).hexdigest()
        whose = self._passkeys.get(name, ("", ""))[1]
        if entry.body["state"] == "removed" and whose != entry.by:
            raise Tampered("statement.foreign", f"the passkey that is removed is not one of {entry.by}")
        if entry.body["state"] == "active" and (whose or signed_with != self._keys.get(entry.by)):
            raise Tampered("statement.foreign", f"the passkey is not added with {entry.by}'s own key, or not new")

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
        said, wrote = statement.body, entry.body
        if statement.kind != _RESTS_ON.get(entry.type, entry.type):
            raise Tampered("statement.kind", f"an entry {entry.type} rests on a statement of the kind {statement.kind}")
        # What the entry says of its own (an approver's narrowing, an expiry) is the custodian's; the rest is quoted.
        shared = (said.keys() & wrote.keys()) - {"duration", "uses"}
        differing = {name for name in shared if said[name] != wrote[name]}
        if said.get("ref", entry.ref) != entry.ref:
            differing.add("ref")
        if "reason" in said and said["reason"] and said["reason"] != entry.private.get("reason"):
            differing.add("reason")
        if entry.type == "principal" and ("subject" in said) != ("subject" in wrote):
            differing.add("subject")
        if entry.type in ("request", "grant", "proposal", "authority") and wrote["id"] != statement.id:
            differing.add("id")
        if "request" in said and said["request"][:16] != wrote["id"]:
            differing.add("request")
        if differing:
            raise Tampered(
                "statement.differs", f"the entry does not say what {entry.by} signed: {', '.join(differing)}"
            )
        self.count += 1
