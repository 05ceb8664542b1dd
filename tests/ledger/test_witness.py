"""Witnesses sign only what extends what they have signed; a log that shows two histories gets no second signature."""

from __future__ import annotations

import contextlib
import socket
import threading
import urllib.error
import urllib.request

import pytest

from ledger.logs import KEY, NOW, Desk
from strongroom.crypto import signatures
from strongroom.crypto.signatures import Signer
from strongroom.errors import BackendError, Conflict, Denied, NotFound, StrongroomError, Tampered
from strongroom.formats.checkpoint import verify_cosignature
from strongroom.formats.note import Note
from strongroom.formats.witness import AddCheckpoint
from strongroom.ledger import witness as witness_module
from strongroom.ledger.witness import Witness, cosign
from strongroom.server.witness import WitnessServer

_STATUS = {NotFound: 404, Denied: 403, Tampered: 400, Conflict: 409}


@pytest.fixture
def witness(tmp_path):
    return Witness("witness.example", Signer(b"w" * 32), tmp_path / "seen", {KEY.origin: KEY.verifier}, lambda: NOW)


def door(witness, asked=None):
    """The witness behind HTTP, without a network."""

    def post(url, body):
        assert url == "https://witness.example/add-checkpoint"
        if asked is not None:
            asked.append(body)
        try:
            return 200, witness.add_checkpoint(body)
        except Conflict as error:
            return 409, f"{error.evidence['size']}\n".encode()
        except StrongroomError as error:
            return _STATUS[type(error)], b""

    return post


def ask(desk, witness, ledger=None, **options):
    ledger = ledger or desk.log
    _, note = ledger.checkpoint()
    post = options.pop("post", None) or door(witness)
    return cosign("https://witness.example/", witness.key, note, ledger.consistency, post=post, **options)


def test_a_log_that_grows(desk, witness):
    for _ in range(5):
        desk.login(7)
        note = Note.decode(ask(desk, witness))
        assert verify_cosignature(note, witness.key, signatures.verify) == NOW
        assert KEY.open(note.encode()).size == desk.log.checkpoint()[0].size
    ask(desk, witness)  # the same checkpoint again


def test_a_split_view_is_caught(desk, witness, tmp_path):
    """Two histories under one log key, shown to two clients: only one of them can be cosigned."""
    desk.login(20)
    ask(desk, witness)
    (tmp_path / "other").mkdir()
    other = Desk(tmp_path / "other")
    other.begin()
    other.login(30)
    with pytest.raises((BackendError, Tampered)):
        ask(other, witness)
    other.db.close()
    desk.login(1)
    ask(desk, witness)


def test_a_log_that_was_set_back(desk, witness):
    desk.login(20)
    _, old = desk.log.checkpoint()
    desk.login(5)
    ask(desk, witness)
    with pytest.raises(Conflict) as caught:
        cosign("https://witness.example", witness.key, old, desk.log.consistency, post=door(witness))
    assert caught.value.code == "witness.ahead"


def test_a_witness_that_others_move_on_meanwhile(desk, witness):
    """Each time it has said where it is, somebody else has an older checkpoint cosigned than this one."""
    desk.login(3)
    older = []
    for _ in range(7):
        desk.login(2)
        older.append(desk.log.checkpoint()[1])
    desk.login(2)
    post, notes = door(witness), iter(older)

    def late(url, body):
        if note := next(notes, None):
            cosign("https://witness.example", witness.key, note, desk.log.consistency, post=post)
        return post(url, body)

    note = Note.decode(ask(desk, witness, post=late))
    assert verify_cosignature(note, witness.key, signatures.verify) == NOW
    assert next(notes, None) is None


def test_a_witness_that_drips_its_answer_is_not_waited_for(desk, witness, monkeypatch):
    """Each byte comes in time, and the whole never does: what is published would wait for it, too."""
    monkeypatch.setattr(witness_module, "_TIMEOUT", 0.5)
    desk.login()
    _, note = desk.log.checkpoint()
    with socket.create_server(("127.0.0.1", 0)) as server:
        ended = threading.Event()

        def drip():
            connection, _ = server.accept()
            with connection, contextlib.suppress(OSError):
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 65536\r\n\r\n")
                while not ended.wait(0.05):
                    connection.sendall(b"x")

        thread = threading.Thread(target=drip)
        thread.start()
        with pytest.raises(BackendError) as caught:
            cosign(f"http://127.0.0.1:{server.getsockname()[1]}", witness.key, note, desk.log.consistency)
        assert not ended.is_set()
        ended.set()
        thread.join()
    assert caught.value.code == "witness.unreachable"


def test_requests_that_are_refused(desk, witness):
    desk.login(9)
    _, note = desk.log.checkpoint()
    witness.add_checkpoint(AddCheckpoint(0, (), note).encode())
    desk.login(9)
    size, newer = desk.log.checkpoint()
    proof = tuple(desk.log.consistency(10, size.size))
    unsigned = newer.replace(newer.rpartition(b" ")[2], note.rpartition(b" ")[2])
    foreign = newer.replace(KEY.origin.encode(), b"strongroom/other")
    for request, error in (
        (AddCheckpoint(10, proof, foreign), NotFound),
        (AddCheckpoint(10, proof, unsigned), Denied),
        (AddCheckpoint(99, proof, newer), Tampered),
        (AddCheckpoint(3, proof, newer), Conflict),
        (AddCheckpoint(10, (), newer), Tampered),
        (AddCheckpoint(10, proof[::-1], newer), Tampered),
        (AddCheckpoint(10, (bytes(32), *proof[1:]), newer), Tampered),
    ):
        with pytest.raises(error):
            witness.add_checkpoint(request.encode())
    for body in (b"", b"old 10\n", newer, AddCheckpoint(10, proof, newer).encode()[:-1]):
        with pytest.raises(Tampered):
            witness.add_checkpoint(body)
    assert witness.add_checkpoint(AddCheckpoint(10, proof, newer).encode())


def test_an_older_request_never_rolls_the_record_back(desk, witness, tmp_path):
    """Many at a time: whatever the order, the record only grows (C2SP tlog-witness, the race it warns of)."""
    requests = []
    for _ in range(8):
        desk.login(3)
        requests.append(desk.log.checkpoint())
    done = []

    def run(checkpoint, note):
        for _ in range(6):
            try:
                cosign("https://witness.example", witness.key, note, desk.log.consistency, post=door(witness))
                done.append(checkpoint.size)
            except (Conflict, BackendError):
                pass

    threads = [threading.Thread(target=run, args=each) for each in requests]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with witness._record(KEY.origin) as record:
        assert record.read().size >= max(done)


def test_a_signature_of_somebody_else_is_not_taken(desk, witness):
    desk.login(3)
    other = Witness(
        "witness.example", Signer(b"x" * 32), witness._folder / "x", {KEY.origin: KEY.verifier}, lambda: NOW
    )
    with pytest.raises(Tampered):
        ask(desk, witness, post=door(other))


def test_over_http(desk, witness):
    """The real thing: a witness on a port, asked by the log's own client."""
    server = WitnessServer(witness, ("127.0.0.1", 0))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        for _ in range(3):
            desk.login(5)
            _, note = desk.log.checkpoint()
            cosigned = Note.decode(cosign(server.url, witness.key, note, desk.log.consistency))
            assert verify_cosignature(cosigned, witness.key, signatures.verify) == NOW
        for path, body, status in (
            ("/add-checkpoint", b"old 3\n", 400),
            ("/add-checkpoint", AddCheckpoint(0, (), note).encode(), 409),
            ("/elsewhere", b"", 404),
        ):
            with pytest.raises(urllib.error.HTTPError) as caught:
                urllib.request.urlopen(server.url + path, data=body, timeout=60)
            with caught.value as error:
                assert error.code == status
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    with pytest.raises(BackendError):
        cosign(server.url, witness.key, note, desk.log.consistency)
