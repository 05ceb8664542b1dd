"""The log of a room, as its client sees it: entries, proofs, exports, and whether it holds together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from strongroom.core.canonical import MAX_INTEGER
from strongroom.core.settings import Settings
from strongroom.errors import Conflict, NotFound

if TYPE_CHECKING:
    from strongroom.client.anyroom import AnyRoom
    from strongroom.client.records import Account, Wanted
    from strongroom.formats.checkpoint import Checkpoint
    from strongroom.vault.vault import Vault

_PIECE = 1024  # entries that are read at a time
_TRIES = 10  # to have a checkpoint cosigned, and published, that is the newest still
_FREELY = 3  # of them: while others publish


class RoomLog:
    """The log of a room. `act` says and does something in it, as the room's client does; `here` is how the room itself
    is had, for what is done on its own host only."""

    def __init__(self, vault: AnyRoom, act: Callable[..., dict[str, Any]], here: Callable[[str], Vault]) -> None:
        self._vault, self._act, self._here = vault, act, here
        self._ledger = vault.custodian.ledger

    @property
    def key(self) -> str:
        """The log's public key in the form of a C2SP signed note's verifier key."""
        return str(self._vault.log_key.verifier.encode())

    def show(self, index: int) -> dict[str, Any]:
        """One entry; `private` has what is kept beside it, checked against its commitments, `missing` the names of what
        is kept there no more, or with the custodian only, and `redacted` the entry that deleted it, or null."""
        found = self._entries(index, index + 1)[0]
        from strongroom.formats.entry import Entry

        entry = Entry(**{name: found[name] for name in ("type", "at", "by", "ref", "body", "private")})
        private = self._ledger.private(index, entry)
        missing = sorted(found["private"].keys() - private.keys())
        redacted = self._redacted(index) if missing else None
        return {**found, "private": private, "missing": missing, "redacted": redacted}

    def _redacted(self, index: int) -> int | None:
        """The entry in which what was kept beside the one at `index` was deleted."""
        from strongroom.formats.entry import Entry

        size = self._ledger.checkpoint()[0].size
        for begin in range(index + 1, size, _PIECE):
            for at, data in enumerate(self._ledger.proven(begin, min(begin + _PIECE, size)), begin):
                entry = Entry.decode(data)
                if entry.type == "redact" and entry.body["entry"] == index:
                    return at
        return None

    def tail(self, count: int = 20) -> list[dict[str, Any]]:
        """The newest entries, oldest first."""
        size = self._ledger.checkpoint()[0].size
        return self._entries(max(0, size - count), size)

    def _entries(self, begin: int, end: int) -> list[dict[str, Any]]:
        from strongroom.formats.entry import Entry
        from strongroom.formats.merkle import leaf_hash

        size = self._ledger.checkpoint()[0].size
        if not begin < end <= size:
            raise NotFound("log.no_entry", f"the log has entries 0 to {size - 1}", hint="strongroom log tail")
        return [
            {"index": index, "leaf": leaf_hash(data).hex(), **vars(Entry.decode(data))}
            for index, data in enumerate(self._ledger.proven(begin, end), begin)
        ]

    def prove(self, index: int) -> dict[str, Any]:
        """The C2SP tlog-proof of one entry, and the entry."""
        from strongroom.formats.merkle import verify_inclusion
        from strongroom.formats.tlogproof import LogProof

        found = self._entries(index, index + 1)[0]
        checkpoint, note = self._ledger.checkpoint()
        note = self._vault.cosigned_note(note)
        path = self._ledger.inclusion(index, checkpoint.size)
        # A server may have made it of anything.
        verify_inclusion(bytes.fromhex(found["leaf"]), index, checkpoint.size, path, checkpoint.root)
        proof = LogProof(index, tuple(path), note)
        return {"index": index, "leaf": found["leaf"], "size": checkpoint.size, "proof": proof.encode().decode()}

    def export(self, form: str = "jsonl") -> Iterator[str]:
        """Every entry as one line of ``jsonl``, ``ocsf`` or ``cef``; what is private is in none of them."""
        from strongroom.ledger.export import export

        size = self._ledger.checkpoint()[0].size
        pieces = (self._ledger.proven(at, min(at + _PIECE, size)) for at in range(0, size, _PIECE))
        entries = enumerate(entry for piece in pieces for entry in piece)
        return export(entries, form, self._vault.log_key.origin)

    def records(self, folders: Sequence[Path], wanted: Wanted) -> dict[str, Any]:
        """What gateways have kept in `folders`, against this log: see `client.records.read`."""
        from strongroom.client.records import read

        # The log first: what it has is on disk by then.
        accounts = list(self._inference())
        while True:
            found = read(accounts, folders, wanted)
            # Of one version a gateway gives an account for each settings that it had, one after the other: between two
            # of them its records come to more than the log has.
            differing = {each["stream"] for each in found["streams"] if each["code"] == "records.sums"}
            before, accounts = len(accounts), list(self._inference()) if differing else accounts
            if not any(each.body["gateway"] in differing for each in accounts[before:]):
                return found

    def _inference(self) -> Iterator[Account]:
        """Each account that a gateway has given."""
        from strongroom.client.records import Account
        from strongroom.formats.entry import Entry

        size = self._ledger.checkpoint()[0].size
        for begin in range(0, size, _PIECE):
            for data in self._ledger.proven(begin, min(begin + _PIECE, size)):
                if b'"type":"inference"' in data:
                    entry = Entry.decode(data)
                    if entry.type == "inference":
                        yield Account(entry.at, entry.ref, dict(entry.body))

    def redact(self, index: int) -> dict[str, Any]:
        """Delete what is kept beside an entry (reasons, addresses): the log stays whole."""
        if not 0 <= index <= MAX_INTEGER:
            raise NotFound("log.no_entry", f"no log has an entry {index}", hint="strongroom log tail")
        return {"redacted": index, "entry": self._act("redact", {"entry": index})["entry"]}

    def cosign(self, url: str, witness: str) -> dict[str, Any]:
        """Have the witness at `url`, with the verifier key `witness`, cosign the newest checkpoint, and publish
        that."""
        from strongroom.formats.note import VerifierKey
        from strongroom.ledger.witness import busy, cosign

        vault = self._here("log cosign")
        ledger, published = vault.custodian.ledger, vault.published
        key = VerifierKey.parse(witness)

        def ask(note: bytes) -> bytes:
            return cosign(url, key, note, ledger.consistency)

        for turn in range(_TRIES):
            try:
                if turn < _FREELY:
                    vault.publish_log()
                    done = published.cosigned(ask(published.note()))
                else:  # a witness that takes longer than a busy room to publish anew would lose every turn
                    done = published.cosigned_alone(ledger, ask)
            except Conflict as error:
                # Somebody else may have had a newer one cosigned since: then the log has all that the witness has seen.
                # If it has less it was set back, however fast it grows; and a witness of another tree is not ahead.
                if error.code != "witness.ahead":
                    raise
                if not error.evidence["size"] < error.evidence["seen"] <= ledger.checkpoint()[0].size:
                    raise
                continue
            if done is not None:
                return {"size": done.size, "witness": key.name}
        raise busy(url, key)

    def verify(self, folder: str | Path | None = None, *, witnesses: Sequence[str] = ()) -> dict[str, Any]:
        """Check what is published of the log, or the exported log in `folder`, against everything that is known of it:
        the pinned key, and the newest checkpoint seen by this user. IntegrityError when it does not hold together."""
        from strongroom.client.receive import Remembered

        # First: another process of this user's may see a newer one while the log is brought up to date, and read.
        remembered = Remembered(Settings.from_environment().state_folder, self._vault.log_key).newest()
        where = folder if folder is not None else self._vault.read_log()
        return verify_log(where, self.key, witnesses=witnesses, remembered=remembered)


def verify_log(
    log: str | Path | Callable[[str], bytes],
    key: str,
    *,
    witnesses: Sequence[str] = (),
    remembered: Checkpoint | None = None,
) -> dict[str, Any]:
    """Check an exported log, in a folder or given by how its files are read, by its public key alone (`RoomLog.key`);
    IntegrityError when it does not hold together."""
    from strongroom.crypto import passkey
    from strongroom.formats.note import VerifierKey
    from strongroom.ledger.published import read_from
    from strongroom.ledger.verify import verify_log as verify

    report = verify(
        log if callable(log) else read_from(Path(log)),
        VerifierKey.parse(key),
        passkey.verify,
        witnesses=[VerifierKey.parse(each) for each in witnesses],
        remembered=remembered,
    )
    return report.as_json()
