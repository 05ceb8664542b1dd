"""The log of a room as its client checks it, while others write to it."""

from __future__ import annotations

import errno
import shutil
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import strongroom
from strongroom.client import Room, RoomLog
from strongroom.client.records import Wanted
from strongroom.core.clock import unix
from strongroom.core.files import locked
from strongroom.crypto import signatures
from strongroom.crypto.signatures import Signer
from strongroom.errors import BackendError, Conflict
from strongroom.formats.checkpoint import verify_cosignature
from strongroom.formats.note import Note
from strongroom.gateway.records import Records
from strongroom.ledger import published
from strongroom.ledger import witness as witness_module
from strongroom.ledger.witness import Witness, cosign
from strongroom.server.witness import WitnessServer
from strongroom.vault.callers import Callers

REF = "acme/tiny@1"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("STRONGROOM_STATE", str(tmp_path / "state"))
    (tmp_path / "model").mkdir()
    save_file({"w": np.arange(6, dtype=np.float32)}, tmp_path / "model" / "model.safetensors")
    room, _ = Room.init(tmp_path / "room", custody="solo")
    with room:
        room.put(tmp_path / "model", "acme/tiny", share="0")
    return tmp_path / "room"


class TestNotSetBack:
    def test_when_another_process_is_publishing(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """This user has seen a newer checkpoint than is published, and somebody else is at that."""
        with strongroom.open(folder) as room:
            room.log.verify()
            tried, found = threading.Event(), []

            @contextmanager
            def trying(path: Path, *, wait: bool):
                if wait:
                    tried.set()
                with locked(path, wait=wait) as mine:
                    tried.set()
                    yield mine

            with locked(folder / "log" / ".lock"):
                room.reader(REF)
                monkeypatch.setattr(published, "locked", trying)
                thread = threading.Thread(target=lambda: found.append(room.log.verify()))
                thread.start()
                assert tried.wait(60)
            thread.join(60)
            assert found[0]["size"] == room._vault.custodian.ledger.checkpoint()[0].size

    def test_when_another_process_of_this_user_sees_a_newer_one(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with strongroom.open(folder) as room, strongroom.open(folder) as other:
            other._vault.custodian.ledger._published_at = float("inf")  # it has published a moment ago
            published_as_of_now = room._vault.read_log

            def late():
                found = published_as_of_now()
                other.reader(REF)
                return found

            monkeypatch.setattr(room._vault, "read_log", late)
            size = room.log.verify()["size"]
            assert size < room._vault.custodian.ledger.checkpoint()[0].size
            monkeypatch.undo()
            assert room.log.verify()["size"] > size


class TestCosigning:
    @pytest.fixture
    def witness(self, folder: Path, tmp_path: Path):
        """A witness that answers: its key and address."""
        with strongroom.open(folder) as room:
            key = room._vault.log_key
        made = Witness("w.example", Signer(b"w" * 32), tmp_path / "seen", {key.origin: key.verifier}, unix)
        with WitnessServer(made, ("127.0.0.1", 0)) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            yield made.key, server.url
            server.shutdown()

    @pytest.mark.parametrize("cosigned", [True, False])
    def test_while_the_log_grows(
        self, folder: Path, witness, monkeypatch: pytest.MonkeyPatch, *, cosigned: bool
    ) -> None:
        """Others are released keys, and have that cosigned: between a look at the log and the witness, or after it."""
        key, url = witness
        with strongroom.open(folder) as room, strongroom.open(folder) as other:
            before, grown = room._vault.custodian.ledger.checkpoint()[0].size, []

            def grow() -> None:
                if len(grown) < 2:
                    grown.append(other.reader(REF))
                    ledger = other._vault.custodian.ledger
                    cosign(url, key, ledger.checkpoint()[1], ledger.consistency)
                    other._vault.publish_log()

            def late(*args):
                if cosigned:
                    grow()
                found = cosign(*args)
                grow()
                return found

            monkeypatch.setattr(witness_module, "cosign", late)
            done = room.log.cosign(url, key.encode())
            monkeypatch.undo()
            assert len(grown) == 2
            assert done == {"size": before + 2, "witness": "w.example"}
            note = Note.decode(room._vault.published.note())
            assert verify_cosignature(note, key, signatures.verify) is not None

    def test_while_others_publish_faster_than_the_witness_signs(
        self, folder: Path, witness, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        key, url = witness
        with strongroom.open(folder) as room, strongroom.open(folder) as other:
            asked: list[int] = []

            def late(*args):
                found = cosign(*args)
                asked.append(room._vault.log_key.open(args[2]).size)
                other.reader(REF)
                other._vault.custodian.ledger.publish()  # as after an entry
                return found

            monkeypatch.setattr(witness_module, "cosign", late)
            done = room.log.cosign(url, key.encode())
            monkeypatch.undo()
            assert done["size"] == asked[-1] < other._vault.custodian.ledger.checkpoint()[0].size
            note = Note.decode(room._vault.published.note())
            assert verify_cosignature(note, key, signatures.verify) is not None
            other._vault.publish_log()  # what was left for later
            assert room._vault.published.newest() == other._vault.custodian.ledger.checkpoint()[0]

    def test_while_others_have_theirs_cosigned_each_time(
        self, folder: Path, witness, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It is said that there is none, and that nobody has set the log back."""
        key, url = witness
        with strongroom.open(folder) as room, strongroom.open(folder) as other:

            def late(*args):
                other.reader(REF)
                ledger = other._vault.custodian.ledger
                cosign(url, key, ledger.checkpoint()[1], ledger.consistency)
                return cosign(*args)

            monkeypatch.setattr(witness_module, "cosign", late)
            with pytest.raises(BackendError) as caught:
                room.log.cosign(url, key.encode())
            assert caught.value.code == "witness.busy"
            assert f"strongroom log cosign --url {url} --witness {key.encode()}" in str(caught.value.hint)

    def test_of_a_log_that_was_set_back_and_grows(
        self, folder: Path, witness, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        key, url = witness
        shutil.copytree(folder, tmp_path / "before")
        with strongroom.open(folder) as room:
            for _ in range(30):
                room.reader(REF)
            room.log.cosign(url, key.encode())
        monkeypatch.setenv("STRONGROOM_STATE", str(tmp_path / "another user"))
        with strongroom.open(tmp_path / "before") as room, strongroom.open(tmp_path / "before") as other:

            def late(*args):
                other.reader(REF)
                return cosign(*args)

            monkeypatch.setattr(witness_module, "cosign", late)
            with pytest.raises(Conflict) as caught:
                room.log.cosign(url, key.encode())
        assert caught.value.code == "witness.ahead"

    def test_where_nothing_can_be_published(self, folder: Path, witness, monkeypatch: pytest.MonkeyPatch) -> None:
        key, url = witness
        with strongroom.open(folder) as room:
            room._vault.publish_log()

            def full(*args, **more):
                raise OSError(errno.ENOSPC, "No space left on device")

            monkeypatch.setattr(published, "write_whole", full)
            with pytest.raises(BackendError) as caught:
                room.log.cosign(url, key.encode())
        assert caught.value.code == "log.unwritable"

    def test_of_a_log_that_was_set_back(self, folder: Path, witness, tmp_path: Path) -> None:
        key, url = witness
        shutil.copytree(folder, tmp_path / "before")
        with strongroom.open(folder) as room:
            room.reader(REF)
            room.log.cosign(url, key.encode())
        with strongroom.open(tmp_path / "before") as room, pytest.raises(Conflict) as caught:
            room.log.cosign(url, key.encode())
        assert caught.value.code == "witness.ahead"


def test_an_account_that_comes_between_two_of_one_version_is_waited_for(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gateway tells of a version under the settings of before, and then under the new ones: in between its records
    come to more than the log has."""
    told: list[tuple[str, dict[str, Any]]] = []
    records = Records(tmp_path / "inference", lambda ref, body: told.append((ref, body)) or 0, "5" * 64)
    record = {"by": "user/owner", "status": 200, "tokens": 5, "bits": 80, "ref": REF}
    records.add({**record})
    records.add({**record}, "6" * 64)
    records.close()
    assert len(told) == 2
    with strongroom.open(folder) as room, strongroom.open(folder) as other:
        enter = Callers(other._vault).record
        enter(*told.pop(0))
        listed = RoomLog._inference

        def late(log: RoomLog):
            yield from listed(log)
            while told:
                enter(*told.pop(0))

        monkeypatch.setattr(RoomLog, "_inference", late)
        found = room.log.records([tmp_path / "inference"], Wanted())
        assert (found["ok"], found["accounts"][0]["bits"]) == (True, 160)
        # A difference that stays is one.
        another = Records(tmp_path / "inference", lambda ref, body: told.append((ref, body)) or 0, "5" * 64)
        another.add({**record})
        another.close()
        told[:] = [(ref, {**body, "bits": 79}) for ref, body in told]
        assert room.log.records([tmp_path / "inference"], Wanted())["ok"]  # nothing is told of it yet
        codes = {
            each["stream"]: each["code"] for each in room.log.records([tmp_path / "inference"], Wanted())["streams"]
        }
        assert codes == {records.stream: "", another.stream: "records.sums"}
