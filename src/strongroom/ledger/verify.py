"""Checking a log offline (spec/ledger.md, section 7): from what was published of it and the log's public key, with
nothing of the room. It imports formats only; whoever trusts none of us can read it in a sitting."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from strongroom.errors import CannotVerify, Forked, NotFound, Rollback, StrongroomError, Tampered, Truncated
from strongroom.formats.checkpoint import Checkpoint, verify_cosignature
from strongroom.formats.entry import Entry
from strongroom.formats.merkle import Frontier, leaf_hash
from strongroom.formats.note import Note, VerifierKey, verify_note
from strongroom.formats.tiles import WIDTH, Tile, all_tiles, decode_bundle
from strongroom.ledger.statements import Statements, Verify


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
    statements = Statements(key.name, verify)
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
        raise Truncated(
            "log.truncated",
            f"{tile.path} is missing from the log",
            hint="copy the room's folder log once more, whole; if it is not there either, entries were lost",
        ) from None


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
