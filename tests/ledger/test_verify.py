"""`log verify`: from the published files and the public key alone, whatever was done to them is seen."""

from __future__ import annotations

import shutil

import pytest

from ledger.logs import KEY, NOW, ROOM, Desk
from strongroom.crypto import signatures
from strongroom.crypto.signatures import Signer
from strongroom.errors import Forked, IntegrityError, Rollback, StrongroomError, Tampered, Truncated
from strongroom.formats.checkpoint import Checkpoint
from strongroom.formats.entry import Entry
from strongroom.formats.merkle import Frontier, leaf_hash
from strongroom.formats.statement import Statement
from strongroom.formats.tiles import Tile, decode_bundle, encode_bundle
from strongroom.ledger.log import Draft
from strongroom.ledger.published import read_from
from strongroom.ledger.verify import verify_log

ANA = Signer(b"a" * 32)
# What a log of 600 entries consists of: entries, their hashes, and the hashes of those.
NEEDED = [Tile(level, index, width) for level in (None, 0) for index, width in ((0, 256), (1, 256), (2, 88))]
NEEDED += [Tile(1, 0, 2)]


def verify(folder, **options):
    return verify_log(read_from(folder), KEY.verifier, signatures.verify, **options)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A log of 600 entries: full tiles, and partial ones on two levels; and one that was published as the log grew, of
    the width that the newest has."""
    desk = Desk(tmp_path_factory.mktemp("log"))
    desk.begin()
    principal(desk, "user/ana", ANA)
    append(desk, revocation(NOW))
    desk.login(85)
    desk.log.publish()
    desk.login(512)
    desk.log.publish()
    yield desk.folder / "log"
    desk.db.close()


def principal(desk, path, signer):
    body = {
        "principal": path,
        "key": signer.public_key.hex(),
        "person": path,
        "roles": [],
        "teams": [],
        "state": "active",
        "statement": "",
    }
    desk.log.append(lambda _, __, now: Draft(Entry("principal", now, "custodian", path, body)))


def statement(**changes):
    said = {
        "kind": "deny",
        "body": {"request": "5" * 64, "reason": "7" * 64},
        "room": ROOM.hex(),
        "by": "user/ana",
        "at": NOW,
        "signer": ANA,
        **changes,
    }
    return Statement.sign(said.pop("kind"), said.pop("body"), **said)


def revocation(now, said=None, **changes):
    said = said or statement()
    body = {"id": said.body["request"][:16], "statement": said.envelope}
    entry = {"type": "deny", "at": now, "by": "user/ana", "ref": "", "body": body, "private": {}}
    entry |= {"private": {"reason": said.body["reason"]}}
    return Entry(**(entry | changes))


@pytest.fixture
def log(exported, tmp_path):
    return shutil.copytree(exported, tmp_path / "copy")


def test_a_whole_log(log):
    found = verify(log)
    assert (found.size, found.statements, found.signed_by) == (600, 1, [KEY.origin])
    assert found.as_json()["ok"] is True


def test_every_bit_of_every_kind_of_file(log):
    """Not all bits of all files: three of each, and all of the checkpoint."""
    needed = {log / tile.path for tile in NEEDED}
    assert all(path.is_file() for path in needed)
    for path in sorted(log.rglob("*")):
        if not path.is_file() or path.name == ".lock":
            continue
        data = path.read_bytes()
        whole = path.name == "checkpoint"
        for at in range(len(data)) if whole else (0, len(data) // 2, len(data) - 1):
            path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
            try:
                found = verify(log)
            except StrongroomError:
                continue
            finally:
                path.write_bytes(data)
            # The tile of a width that the checkpoint is past is nobody's business any more. On a slow machine there are
            # more of them: what was published while the log grew.
            assert found.size == 600
            assert path.parent.name.endswith(".p")
            assert path not in needed
    assert verify(log).size == 600


def test_every_file_that_is_missing(log):
    for name in [*(tile.path for tile in NEEDED), "checkpoint"]:
        path = log / name
        data = path.read_bytes()
        path.unlink()
        with pytest.raises(StrongroomError):
            verify(log)
        path.write_bytes(data)


def test_entries_swapped_dropped_added(log):
    path = log / Tile(None, 1).path
    entries = decode_bundle(path.read_bytes())
    for other in (
        [entries[1], entries[0], *entries[2:]],
        entries[:-1],
        [*entries[:-1], entries[0]],
        [*entries[:100], *entries[101:], entries[100]],
    ):
        path.write_bytes(encode_bundle(other))
        with pytest.raises((Tampered, Truncated)):
            verify(log)


def test_a_log_that_its_custodian_has_rewritten(desk, log):
    """Another history under the same key is no fault in itself: what was seen before shows it."""
    desk.login(599)
    desk.log.publish()
    seen = Checkpoint.decode((log / "checkpoint").read_text().rpartition("\n\n")[0] + "\n")
    assert verify(desk.folder / "log").size == 600
    with pytest.raises(Forked):
        verify(desk.folder / "log", remembered=seen)
    at_300 = Frontier()
    at_300.extend([leaf_hash(data) for data in desk.log.entries(0, 300)])
    with pytest.raises(Forked):
        verify(log, remembered=Checkpoint(KEY.origin, 300, at_300.root()))
    assert verify(desk.folder / "log", remembered=Checkpoint(KEY.origin, 300, at_300.root())).size == 600


def test_a_log_that_was_cut(log):
    with pytest.raises(Rollback):
        verify(log, remembered=Checkpoint(KEY.origin, 601, bytes(32)))


def test_another_key(log):
    other = type(KEY)(KEY.room, Signer(b"o" * 32).public_key)
    with pytest.raises(Tampered):
        verify_log(read_from(log), other.verifier, signatures.verify)


class TestStatements:
    """Step 5: the log proves who has said what, to somebody who does not trust the custodian."""

    @pytest.fixture
    def desk(self, desk):
        principal(desk, "user/ana", ANA)
        principal(desk, "user/ben", Signer(b"b" * 32))
        return desk

    @pytest.mark.parametrize(
        "said",
        [
            statement(signer=Signer(b"b" * 32)),  # ben's key under ana's name
            statement(by="user/ben", signer=Signer(b"b" * 32)),  # ben's statement in an entry of ana's
            statement(room="f" * 32),
            statement(by="user/eve", signer=Signer(b"e" * 32)),
            statement(kind="revoke", body={"target": "user/ben", "reason": "7" * 64}),
        ],
    )
    def test_that_is_not_the_principals(self, desk, said):
        entry = revocation(NOW, statement())
        entry = Entry(
            entry.type, entry.at, entry.by, entry.ref, {**entry.body, "statement": said.envelope}, entry.private
        )
        self.refused(desk, entry)

    def test_that_says_something_else(self, desk):
        said = statement()
        for entry in (
            revocation(NOW, said, body={"id": "6" * 16, "statement": said.envelope}),
            revocation(NOW, said, private={"reason": "8" * 64}),
            revocation(NOW, said, private={}),
        ):
            self.refused(desk, entry)

    def test_that_nobody_has_made(self, desk):
        """A lying custodian's word for somebody's decision: the fold of a room doesn't matter to who reads the log."""
        denied = {"id": "5" * 16, "statement": ""}
        self.refused(desk, revocation(NOW, body=denied))

    def test_that_nobody_has_approved(self, desk):
        body = {"id": "5" * 16, "duration": 0, "uses": None, "roles": [], "statement": "", "lease": None}
        self.refused(desk, revocation(NOW, type="approve", body=body, private={}))

    def test_that_is_there_twice(self, desk):
        said = statement()
        append(desk, revocation(NOW, said))
        self.refused(desk, revocation(NOW, said))

    def test_that_comes_before_its_key(self, desk):
        eve = Signer(b"e" * 32)
        append(desk, revocation(NOW, statement(by="user/eve", signer=eve), by="user/eve"))
        principal(desk, "user/eve", eve)
        desk.log.publish()
        with pytest.raises(IntegrityError):
            verify(desk.folder / "log")

    def refused(self, desk, entry):
        append(desk, entry)
        desk.log.publish()
        with pytest.raises(Tampered) as caught:
            verify(desk.folder / "log")
        assert f"entry {caught.value.evidence['entry']}: " in caught.value.message


def append(desk, entry):
    """Past the fold, as a custodian that cheats would."""
    desk.log._fold.apply, kept = (lambda *_: None), desk.log._fold.apply
    try:
        desk.log.append(lambda _, __, ___: Draft(entry))
    finally:
        desk.log._fold.apply = kept
