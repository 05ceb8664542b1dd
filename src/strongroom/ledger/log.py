"""Appending: one sequencer at a time, one transaction a batch, an answer only when it is durable (spec/ledger.md,
section 5)."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Generic, NamedTuple, Protocol, Self, TypeAlias, TypeVar

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from strongroom.core import canonical
from strongroom.crypto import signatures
from strongroom.crypto.signatures import Signer
from strongroom.errors import (
    CannotVerify,
    Forked,
    NotFound,
    Rollback,
    StrongroomError,
    Tampered,
    Truncated,
    UsageError,
)
from strongroom.formats.checkpoint import Checkpoint
from strongroom.formats.dsse import Envelope, pre_authentication_encoding
from strongroom.formats.entry import Entry, Private
from strongroom.formats.merkle import (
    Frontier,
    consistency_proof,
    inclusion_proof,
    leaf_hash,
    node_hash,
    verify_consistency,
)
from strongroom.formats.tiles import WIDTH, verify_leaves
from strongroom.ledger.key import LogKey
from strongroom.ledger.published import Published
from strongroom.ledger.queue import Queue, Waiting
from strongroom.storage.db import Database, log_entries, log_nodes, log_private, log_snapshot, log_state
from strongroom.storage.prepared import Prepared

SNAPSHOT_TYPE = "application/vnd.strongroom.ledger-snapshot+json"
_CHUNK = 2048
_SNAPSHOT_EVERY = 256  # entries, more where the state is large: whoever opens a room applies those since
_TILE_BITS = 8
_PUBLISH_EVERY = 1.0  # seconds
_RESTORE = "strongroom log verify; restore the database from a backup"


_NEWEST = Prepared(sa.select(log_state.c.size, log_state.c.checkpoint))
_ADVANCE = Prepared(
    sa.update(log_state).values(size=sa.bindparam("new_size"), checkpoint=sa.bindparam("new_checkpoint"))
)
_ENTRIES = Prepared(
    sa.select(log_entries.c.position, log_entries.c.entry)
    .where(log_entries.c.position >= sa.bindparam("begin"), log_entries.c.position < sa.bindparam("end"))
    .order_by(log_entries.c.position)
)
_NODES = Prepared(
    sa.select(log_nodes.c.hash)
    .where(
        log_nodes.c.level == sa.bindparam("level"),
        log_nodes.c.position >= sa.bindparam("begin"),
        log_nodes.c.position < sa.bindparam("end"),
    )
    .order_by(log_nodes.c.position)
)
_SNAPSHOT = Prepared(sa.select(log_snapshot.c.data))
_FORGET, _KEEP = Prepared(sa.delete(log_snapshot)), Prepared(sa.insert(log_snapshot))


class Fold(Protocol):
    """A state that entries are applied to in order. `FOLD` is another number whenever they are applied otherwise: no
    snapshot of before is believed then."""

    FOLD: ClassVar[int]

    def apply(self, index: int, entry: Entry) -> None: ...

    def as_json(self) -> dict[str, Any]: ...

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self: ...


S = TypeVar("S", bound=Fold)


class Draft(NamedTuple):
    """What a decision wants recorded: the entry, and what its commitments stand for."""

    entry: Entry
    private: Sequence[Private] = ()


# Given the transaction, the state that all entries before it leave, and the time: the entry, or an error that refuses.
Decision = Callable[[Connection, S, int], Draft]


@dataclass(slots=True)  # not frozen: every entry has one, and it would be made at half the speed
class Receipt:
    """A durable entry. `note` is the signed checkpoint of the batch that it was in, `size` that checkpoint's."""

    index: int
    entry: Entry
    data: bytes = field(repr=False)
    size: int
    note: bytes = field(repr=False)
    nodes: Sequence[tuple[int, int, bytes]] = field(repr=False)

    def proof(self) -> list[bytes]:
        """The audit path of the entry in the tree of `size`. The hashes left of the entry are those that the tree
        before the batch had at its edge, those right of it are the batch's: no database is asked."""
        found = {(level, position): value for level, position, value in self.nodes}
        return inclusion_proof(self.index, self.size, lambda level, position: found[level, position])


_Waiting: TypeAlias = Waiting[Decision[S], Receipt]


@dataclass
class _Loaded(Generic[S]):
    frontier: Frontier
    state: S
    note: bytes = b""


class Ledger(Generic[S]):
    """The log of one room, and the state that its entries make. Thread-safe; any number of processes may have one.

    Errors of everything here: Rollback ``log.rollback`` for a log that is shorter than what was seen or published;
    Forked ``log.forked``; Tampered, Truncated for one that does not have the root that was signed; Sealed;
    BackendError.
    """

    def __init__(
        self,
        db: Database,
        key: LogKey,
        signer: Callable[[], Signer],
        fold: type[S],
        *,
        clock: Callable[[], int],
        published: Published | None = None,
        others: Callable[[str], None] = lambda _: None,
    ) -> None:
        """`others` is called with the type of each entry that another process has appended, as it is read; with an
        empty text where entries are not read one by one, so that it may have been any."""
        self._db, self._key, self._signer, self._fold, self._clock = db, key, signer, fold, clock
        self._published, self._others = published, others
        self._loaded: _Loaded[S] | None = None
        self._seen: tuple[int, bytes] | None = None  # size and root, remembered when what was loaded is dropped
        self._state_lock = threading.RLock()
        self._queue: Queue[Decision[S], Receipt] = Queue()
        self._snapshot_due = 0
        self._published_at = -_PUBLISH_EVERY
        self._caught_up = 0.0  # when what is loaded was the newest, by the monotonic clock

    # -- appending -----------------------------------------------------------------------------------------------

    def append(self, decide: Decision[S], *, writes: bool = False) -> Receipt:
        """Let `decide` look at the newest state and append what it returns; back when that is durable.

        What `decide` raises is raised here, and nothing is recorded. It runs while nobody else appends, so it is quick,
        and calls nothing that appends or opens a transaction. `writes`: it changes tables, too; that is committed with
        the entry, and undone when it raises.
        """
        waiting: _Waiting[S] = Waiting(decide, writes=writes)
        try:
            self._queue.enter(waiting)
            if not waiting.done:
                self._lead(waiting)
        except BaseException:
            self._queue.leave(waiting)
            raise
        if waiting.error is not None:
            raise waiting.error
        assert waiting.receipt is not None  # noqa: S101 - `done` says so
        return waiting.receipt

    def _lead(self, leader: _Waiting[S]) -> None:
        """Append all that wait, in one batch, and hand the lead to somebody who came meanwhile."""
        batch: list[_Waiting[S]] = []
        try:
            self._sequence(batch)
        except BaseException as error:
            if not batch:  # it could not even begin: nor could it for any of these
                self._queue.take(batch)
            for waiting in batch:
                waiting.receipt, waiting.error = None, waiting.error or error
            if not isinstance(error, Exception):
                raise
        finally:
            self._queue.answer(batch, leader)
        # All are answered: what is published late does not make an entry less durable. `log verify` publishes, too,
        # and says what is wrong.
        if time.monotonic() - self._published_at > _PUBLISH_EVERY:
            with contextlib.suppress(Exception):
                self.publish()

    def _sequence(self, batch: list[_Waiting[S]]) -> None:
        """Append what waits when the database is ours, as `batch`, which is empty until then."""
        signer = self._signer()  # outside: it may have to ask the key store
        self._queue.settle()  # outside, too: they come, and other processes append
        with self._state_lock:
            try:
                published = self._published_size()
                with self._db.sequencing() as tx:
                    loaded = self._catch_up(tx, published)
                    self._queue.take(batch)
                    before = loaded.frontier.size
                    accepted, nodes = self._append(tx, loaded, batch, signer)
            except BaseException:
                self._loaded = None  # it may be ahead of what is durable
                raise
            self._remember()
        size, note = loaded.frontier.size, loaded.note
        for index, (waiting, entry, data) in enumerate(accepted, before):
            waiting.receipt = Receipt(index, entry, data, size, note, nodes)

    def publish(self, *, wait: bool = False) -> None:
        """Bring what is published up to the newest entry; appending does it about once a second, and leaves it to
        another process that is at it. With `wait` what is published afterwards has all that is in the log now."""
        if self._published is not None:
            self._published_at = time.monotonic()
            self._published.publish(self, wait=wait)

    def _append(
        self, tx: Connection, loaded: _Loaded[S], batch: list[_Waiting[S]], signer: Signer
    ) -> tuple[list[tuple[_Waiting[S], Entry, bytes]], list[tuple[int, int, bytes]]]:
        """Those of `batch` whose entries are in the log if this transaction commits, and the nodes of their proofs."""
        before = index = loaded.frontier.size
        nodes = loaded.frontier.nodes()
        accepted: list[tuple[_Waiting[S], Entry, bytes]] = []
        entries: list[bytes] = []
        private: list[dict[str, Any]] = []
        state, now = loaded.state, self._clock()
        for waiting in batch:
            try:
                if waiting.writes:
                    with self._db.savepoint(tx):  # an entry that can't be encoded undoes what was written for it
                        entry, notes = waiting.decide(tx, state, now)
                        data = entry.encode()
                else:
                    entry, notes = waiting.decide(tx, state, now)
                    data = entry.encode()
            except Exception as error:  # noqa: BLE001 - it is the caller's; the others in the batch go on
                waiting.error = error
                continue
            state.apply(index, entry)
            accepted.append((waiting, entry, data))
            entries.append(data)
            if notes:
                private += [{"position": index, **vars(value)} for value in notes]
            index += 1
        if not accepted:
            return accepted, nodes
        made = loaded.frontier.extend(map(leaf_hash, entries))
        nodes += made
        stored = [
            {"level": level, "position": position, "hash": value}
            for level, position, value in made
            if level and level % _TILE_BITS == 0
        ]
        loaded.note = self._key.sign(Checkpoint(self._key.origin, index, loaded.frontier.root()), signer)
        self._db.add_entries(tx, before, entries)
        if stored:
            tx.execute(sa.insert(log_nodes), stored)
        if private:
            tx.execute(sa.insert(log_private), private)
        if before:
            _ADVANCE(tx, new_size=index, new_checkpoint=loaded.note)
        else:
            tx.execute(sa.insert(log_state).values(id=1, size=index, checkpoint=loaded.note))
        self._keep_snapshot(tx, loaded, signer)
        return accepted, nodes

    # -- the state -----------------------------------------------------------------------------------------------

    @contextmanager
    def view(self) -> Iterator[S]:
        """The state as of now, for reading, for the length of the block: nothing is appended here meanwhile, though
        other processes may append; a `view` within it takes that in."""
        with self._state_lock:
            try:
                published = self._published_size()
                with self._db.reading() as tx:
                    loaded = self._catch_up(tx, published)
            except BaseException:
                self._loaded = None
                raise
            self._remember()
            yield loaded.state

    @property
    def viewed(self) -> int:
        """How many entries the state of `view` is made of, for whoever asks within its block: the log may have more by
        then."""
        return self._loaded.frontier.size if self._loaded is not None else 0

    def glance(self, age: float) -> S | None:
        """The state as it was at most `age` seconds ago, without waiting for whoever appends, or None. An entry may be
        in it that is about to be durable, or about to be undone, and it changes while it is looked at: for questions
        that the sequencer asks again, about single members."""
        loaded = self._loaded
        return loaded.state if loaded is not None and time.monotonic() - self._caught_up <= age else None

    def checkpoint(self) -> tuple[Checkpoint, bytes]:
        """The newest checkpoint, and its signed note; NotFound ``log.empty``."""
        with self._state_lock, self.view():
            loaded = self._loaded
            if loaded is None or not loaded.note:
                raise NotFound("log.empty", "the log of this room has no entry yet", hint="strongroom init")
            return self._key.open(loaded.note), loaded.note

    def _catch_up(self, tx: Connection, published: int) -> _Loaded[S]:
        """Steps 1 of section 5: read what others have appended, and check all of it against the signed root.

        `published`: how many entries were published before `tx` began."""
        row = _NEWEST(tx).one_or_none()
        size, note = (row.size, row.checkpoint) if row else (0, b"")
        if not isinstance(size, int) or not isinstance(note, bytes):
            raise Tampered("log.malformed", "the database's row of the log's state is not one that a custodian writes")
        loaded = self._loaded
        afresh = loaded is None
        if loaded is None:
            if published > size:
                raise Rollback(
                    "log.rollback",
                    f"the log in the database has {size} entries, and {published} were published",
                    hint="the database was set back: restore the newest copy of it",
                )
            loaded = self._from_snapshot(tx)
            self._others("")
        seen = self._seen[0] if self._seen is not None else 0
        if size < max(loaded.frontier.size, seen):
            raise Rollback(
                "log.rollback",
                f"the log has {size} entries, and had {max(loaded.frontier.size, seen)}",
                hint="the database was set back: restore the newest copy of it",
            )
        if (size, note) == (loaded.frontier.size, loaded.note):
            self._loaded = loaded
            return loaded
        checkpoint = self._key.open(note)
        same = size == loaded.frontier.size and bool(loaded.note)
        for begin in range(loaded.frontier.size, size, _CHUNK):
            found = self._read(tx, begin, min(begin + _CHUNK, size))
            for index, data in enumerate(found, begin):
                entry = Entry.decode(data)
                loaded.state.apply(index, entry)
                self._others(entry.type)
            for _ in loaded.frontier.extend([leaf_hash(data) for data in found]):
                pass
        if checkpoint.size != size or checkpoint.root != loaded.frontier.root():
            if same:
                raise Forked("log.forked", f"the log of {size} entries has another root than it had", hint=_RESTORE)
            if not afresh:  # what was seen may be right, and the log another one: read by itself it shows which
                self._loaded = None
                return self._catch_up(tx, published)
            raise Tampered(
                "log.tampered", f"the {size} entries in the database are not those that were signed", hint=_RESTORE
            )
        if afresh:
            self._check_seen(tx, checkpoint)
        loaded.note = note
        self._loaded = loaded
        return loaded

    def _remember(self) -> None:
        """What this process has seen stays seen, also when an error makes it load the log anew."""
        if self._loaded is not None:
            self._seen = (self._loaded.frontier.size, self._loaded.frontier.root())
            self._caught_up = time.monotonic()

    def _check_seen(self, tx: Connection, checkpoint: Checkpoint) -> None:
        if self._seen is None:
            return
        size, root = self._seen
        try:
            path = consistency_proof(size, checkpoint.size, partial(self._node, tx))
            verify_consistency(size, root, checkpoint.size, checkpoint.root, path)
        except (Tampered, Truncated) as error:
            raise Forked(
                "log.forked",
                f"the log is not the one that was seen before: its first {size} entries are others",
                hint=_RESTORE,
            ) from error

    def _published_size(self) -> int:
        """How many entries are published, 0 where the log need not be read afresh. Asked before a transaction begins:
        others append and publish while it reads, which is no log that was set back."""
        if self._published is None or self._loaded is not None:
            return 0
        newest = self._published.newest()
        return newest.size if newest is not None else 0

    def _read(self, tx: Connection, begin: int, end: int) -> list[bytes]:
        rows = _ENTRIES(tx, begin=begin, end=end).all()
        if [row.position for row in rows] != list(range(begin, end)):
            raise Truncated("log.truncated", f"entries between {begin} and {end} are missing from the log")
        if not all(isinstance(row.entry, bytes) for row in rows):
            raise Tampered("log.malformed", f"an entry between {begin} and {end} is no entry")
        return [row.entry for row in rows]

    # -- snapshots -----------------------------------------------------------------------------------------------

    def _keep_snapshot(self, tx: Connection, loaded: _Loaded[S], signer: Signer) -> None:
        if loaded.frontier.size < max(self._snapshot_due, _SNAPSHOT_EVERY):
            return
        value = {
            "fold": self._fold.FOLD,
            "frontier": loaded.frontier.encode().hex(),
            "origin": self._key.origin,
            "state": loaded.state.as_json(),
        }
        payload = canonical.encode(value)
        signature = signer.sign(pre_authentication_encoding(SNAPSHOT_TYPE, payload))
        data = Envelope(SNAPSHOT_TYPE, payload, ((signer.key_id, signature),)).encode()
        _FORGET(tx)
        _KEEP(tx, id=1, data=data)
        self._snapshot_due = loaded.frontier.size + max(_SNAPSHOT_EVERY, len(data) // 256)

    def _from_snapshot(self, tx: Connection) -> _Loaded[S]:
        """The newest snapshot that is the log key's own, else the beginning. An older one costs time, no more."""
        empty = _Loaded(Frontier(), self._fold())
        row = _SNAPSHOT(tx).one_or_none()
        if row is None:
            return empty
        try:
            envelope = Envelope.decode(row.data, payload_type=SNAPSHOT_TYPE)
            (_, signature), *_ = envelope.signatures
            signed = pre_authentication_encoding(SNAPSHOT_TYPE, envelope.payload)
            signatures.verify(self._key.public_key, signature, signed)
            # The log key has signed what `encode` made: nobody else can have written what it would not have.
            value = canonical.decode_typed(envelope.payload, what="the snapshot of the log")
            if (value["origin"], value["fold"]) != (self._key.origin, self._fold.FOLD):
                return empty
            found = _Loaded(Frontier.decode(bytes.fromhex(value["frontier"])), self._fold.from_json(value["state"]))
        except (StrongroomError, TypeError, KeyError, ValueError):
            return empty  # somebody wrote to it, or another release did: the entries say it all
        self._snapshot_due = found.frontier.size + _SNAPSHOT_EVERY
        # One that is ahead of the log shows a log that was set back, which the caller refuses.
        return found

    # -- reading -------------------------------------------------------------------------------------------------

    def entries(self, begin: int, end: int) -> list[bytes]:
        """The encoded entries from `begin` to before `end`. Not checked: `proven` does that, or whoever reads them."""
        with self._db.reading() as tx:
            return self._read(tx, begin, end)

    def proven(self, begin: int, end: int) -> list[bytes]:
        """As `entries`, each of them proven to be in the tree that was signed; Tampered ``log.tampered``."""
        checkpoint, _ = self.checkpoint()
        if not 0 <= begin < end <= checkpoint.size:
            raise UsageError("log.range", f"the log of {checkpoint.size} entries has none from {begin} to {end}")
        first, last = begin // WIDTH * WIDTH, min(-(-end // WIDTH) * WIDTH, checkpoint.size)
        with self._db.reading() as tx:
            found = self._read(tx, first, last)
            leaves = [leaf_hash(data) for data in found]
            try:
                verify_leaves(first, leaves, checkpoint.size, checkpoint.root, partial(self._node, tx))
            except Tampered as error:
                raise Tampered(
                    "log.tampered",
                    f"entries of the database between {first} and {last} are not those that were signed",
                    hint=_RESTORE,
                ) from error
        return found[begin - first : end - first]

    def private(self, index: int, entry: Entry) -> dict[str, str]:
        """The values of `notes`."""
        return {name: note.value for name, note in self.notes(index, entry).items()}

    def notes(self, index: int, entry: Entry) -> dict[str, Private]:
        """What was kept beside the entry, checked against its commitments; what was redacted is missing."""
        query = sa.select(log_private).where(log_private.c.position == index)
        with self._db.reading() as tx:
            rows = tx.execute(query).all()
        found = {}
        for row in rows:
            if not isinstance(row.value, str) or not isinstance(row.salt, bytes):
                raise Tampered("log.malformed", f"what is kept beside entry {index} is not what a custodian writes")
            value = Private(row.name, row.value, row.salt)
            value.check(entry.private.get(row.name, ""))
            found[row.name] = value
        return found

    def inclusion(self, index: int, size: int) -> list[bytes]:
        """The audit path of the entry at `index` in the tree of `size`."""
        with self._db.reading() as tx:
            return inclusion_proof(index, size, partial(self._node, tx))

    def consistency(self, old: int, new: int) -> list[bytes]:
        """The proof that the tree of size `new` extends that of size `old`."""
        with self._db.reading() as tx:
            return consistency_proof(old, new, partial(self._node, tx))

    def hashes(self, level: int, begin: int, end: int) -> list[bytes]:
        """Hashes of complete subtrees of a level that is a multiple of 8, as a tile has them."""
        with self._db.reading() as tx:
            return self._hashes(tx, level, begin, end)

    def _node(self, tx: Connection, level: int, position: int) -> bytes:
        """The hash of a complete subtree, from those of the tile level below it."""
        stored = level // _TILE_BITS * _TILE_BITS
        span = 1 << (level - stored)
        hashes = self._hashes(tx, stored, position * span, position * span + span)
        while len(hashes) > 1:
            hashes = [node_hash(left, right) for left, right in zip(hashes[::2], hashes[1::2], strict=True)]
        return hashes[0]

    def _hashes(self, tx: Connection, level: int, begin: int, end: int) -> list[bytes]:
        if level == 0:
            return [leaf_hash(data) for data in self._read(tx, begin, end)]
        rows = _NODES(tx, level=level, begin=begin, end=end).all()
        hashes = [row.hash for row in rows]
        if len(hashes) != end - begin or not all(isinstance(value, bytes) for value in hashes):
            raise CannotVerify("log.nodes", f"nodes of level {level} are missing from the log", hint="strongroom fsck")
        return hashes
