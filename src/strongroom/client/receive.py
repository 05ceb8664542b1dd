"""The receiver's side of a release (spec/release.md, section 3): no bundle is opened without the proof that its
release is recorded, in a log that extends the one seen before."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from strongroom.client.witnessed import require
from strongroom.core.files import locked, write_whole
from strongroom.core.settings import Settings
from strongroom.crypto.release import ReleaseKey
from strongroom.errors import (
    AuthRequired,
    BackendError,
    Conflict,
    Forked,
    Rollback,
    Sealed,
    StrongroomError,
    Tampered,
)
from strongroom.formats.bundle import KeyBundle
from strongroom.formats.checkpoint import Checkpoint
from strongroom.formats.copybundle import CopyBundle
from strongroom.formats.entry import Entry, Private
from strongroom.formats.merkle import leaf_hash, verify_consistency, verify_inclusion
from strongroom.formats.statement import Statement
from strongroom.ledger.key import LogKey

if TYPE_CHECKING:
    from strongroom.client.anyroom import AnyRoom, Say

Consistency = Callable[[int, int], list[bytes]]


@dataclass(frozen=True)
class Released:
    """A release as it came over: all of it is checked here. `proof` is the audit path, `checkpoint` the signed note."""

    entry: bytes
    index: int
    proof: tuple[bytes, ...]
    checkpoint: bytes
    sealed: bytes


class Remembered:
    """The newest checkpoint of a log that this user of this machine has seen, in a file."""

    def __init__(self, folder: Path, key: LogKey) -> None:
        self._key = key
        self._path = folder / "checkpoints" / f"{key.room.hex()}-{key.public_key[:8].hex()}"

    def newest(self) -> Checkpoint | None:
        """The checkpoint; None the first time. A file that is damaged is not passed over: with it goes the memory that
        a rollback would be seen by. Tampered ``checkpoint.damaged``."""
        try:
            data = self._path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise BackendError("checkpoint.unreadable", f"can't read {self._path}: {error.strerror}") from None
        try:
            return self._key.open(data)
        except StrongroomError as error:
            raise Tampered(
                "checkpoint.damaged",
                f"the newest checkpoint that was seen of this log does not verify: {error.message}",
                hint=f"strongroom log verify; then remove {self._path}",
            ) from None

    def advance(self, note: bytes, consistency: Consistency) -> None:
        """Remember `note`, a checkpoint that this log signed, if it extends the newest that was seen.

        Rollback ``log.rollback``; Forked ``log.forked``. `consistency` gives the proof between two sizes. Two processes
        that advance at the same time take turns, so neither forgets what the other has seen.
        """
        checkpoint = self._key.open(note)
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with locked(self._path.with_suffix(".lock")):
                seen = self.newest()
                if seen is not None:
                    _extends(seen, checkpoint, consistency)
                if seen is None or seen.size < checkpoint.size:
                    write_whole(self._path, note)
        except OSError as error:
            raise BackendError(
                "checkpoint.unwritable",
                f"can't remember the log's checkpoint in {self._path.parent}: {error.strerror}",
                hint="STRONGROOM_STATE=FOLDER names another place",
            ) from None


def _extends(seen: Checkpoint, now: Checkpoint, consistency: Consistency) -> None:
    """Either way round: a release that took long may come back after a younger one was seen, and is fine if both are
    of one history."""
    older, newer = sorted((seen, now), key=lambda each: each.size)
    if older.size == newer.size:
        if older.root != newer.root:
            raise _forked(older)
        return
    try:
        path = consistency(older.size, newer.size)
    except (BackendError, Sealed):
        raise  # nobody answered: that says nothing about the log
    except StrongroomError as error:
        if newer is seen:  # the log that answers does not have what was seen
            raise Rollback(
                "log.rollback",
                f"the log has {now.size} entries, and had {seen.size} before",
                hint="keep the checkpoint that was seen: it proves what the log said",
            ) from error
        raise
    try:
        verify_consistency(older.size, older.root, newer.size, newer.root, path)
    except Tampered:
        raise _forked(older) from None


def _forked(older: Checkpoint) -> Forked:
    return Forked(
        "log.forked",
        f"the log is not the one that was seen before: its first {older.size} entries are others",
        hint="keep both checkpoints: somebody was shown another history",
    )


def accept(
    released: Released,
    statement: Statement,
    key: ReleaseKey,
    *,
    log: LogKey,
    signer: bytes,
    remembered: Remembered,
    consistency: Consistency,
    witnessed: Callable[[bytes], None] = lambda _: None,
) -> KeyBundle | CopyBundle:
    """The key bundle of a release, or the copy bundle of one to copy, that `statement` asked for, to `key`. Steps as in
    spec/release.md, section 3.

    `signer` is the room's public key for manifests; `witnessed` raises unless enough witnesses have seen the checkpoint
    that it is given. Tampered, Rollback, Forked; nothing is opened before all of it holds.
    """
    # Step 1.
    checkpoint = log.open(released.checkpoint)
    # Step 2.
    leaf = leaf_hash(released.entry)
    verify_inclusion(leaf, released.index, checkpoint.size, list(released.proof), checkpoint.root)
    # Step 3: the entry says what was asked, and nothing else.
    entry = Entry.decode(released.entry)
    asked = statement.body
    names = ("action", "holder", "public_key", "challenge", "break_glass", "form")
    expected, said = ({name: each.get(name) for name in names} for each in (asked, entry.body))
    if (
        entry.type != "release"
        or (entry.by, entry.ref) != (statement.by, asked["ref"])
        or said != expected
        or entry.body["statement"] != statement.envelope
    ):
        raise Tampered("release.other_entry", "the log's entry is not about the release that was asked for")
    # Step 4.
    remembered.advance(released.checkpoint, consistency)
    witnessed(released.checkpoint)
    # Step 5.
    secret = key.open(released.sealed, released.index, leaf)
    bundle = CopyBundle.decode(secret) if asked["action"] == "copy" else KeyBundle.decode(secret)
    if (
        bundle.room != log.room
        or bundle.signer != signer
        or (bundle.ref, bundle.holder) != (asked["ref"], asked["holder"])
        or bundle.revision != entry.body["revision"]
        or bundle.manifest_digest.hex() != entry.body["manifest"]
    ):
        raise Tampered("release.other_bundle", "the key bundle is not the one that the log's entry is about")
    # Step 6 is the reader's: it checks the manifest against this digest and signer. Of a copy it is the custodian's.
    return bundle


@dataclass(frozen=True)
class Received:
    """What a release has brought: the entry that records it and its hash, the lease that it is under, if one, where the
    ciphertext is read, and the keys."""

    index: int
    lease: str | None
    leaf: bytes
    store: str
    bundle: KeyBundle | CopyBundle


def receive(
    vault: AnyRoom,
    say: Say,
    holder: str,
    ref: str,
    action: str,
    break_glass: str | None = None,
    form: str | None = None,
) -> Received:
    """Ask for the keys of one version, and check all that comes; in an embedded room the custodian's side runs within.
    `say` signs a statement of a kind, as `holder`; `form` is that of a copy that leaves quantised. Errors of `accept`,
    and what the custodian refuses."""
    custodian, log = vault.custodian, vault.log_key
    row = vault.find(ref)
    key = ReleaseKey()
    reason = Private.fresh("reason", break_glass) if break_glass is not None else None

    def asked() -> str:
        return say(
            "release",
            {
                "action": action,
                "ref": f"{row.name}@{row.number}",
                "holder": holder,
                "public_key": key.public_key.hex(),
                "challenge": custodian.challenge().hex(),
                "break_glass": break_glass is not None,
                "reason": reason.commitment if reason is not None else "",
                **({"form": form} if form is not None else {}),
            },
        )

    envelope = asked()
    try:
        answer = custodian.release(envelope, reason)
    except (AuthRequired, BackendError, Conflict) as error:
        # The room's clock was set right a moment ago, or an answer was lost with its connection: ask anew, once.
        if error.code not in ("challenge.foreign", "server.interrupted", "statement.replayed"):
            raise
        envelope = asked()
        answer = custodian.release(envelope, reason)

    def witnessed(note: bytes) -> None:
        if vault.witnesses is not None:
            require(note, vault.witnesses, log, custodian.ledger)

    bundle = accept(
        Released(answer.entry, answer.index, answer.proof, answer.checkpoint, answer.sealed),
        Statement.decode(envelope),
        key,
        log=log,
        signer=vault.signer,
        remembered=Remembered(Settings.from_environment().state_folder, log),
        consistency=custodian.ledger.consistency,
        witnessed=witnessed,
    )
    lease = Entry.decode(answer.entry).body["lease"]
    return Received(answer.index, lease, leaf_hash(answer.entry), answer.store, bundle)
