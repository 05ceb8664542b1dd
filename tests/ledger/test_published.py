"""What is published of a log, while others publish, too."""

from __future__ import annotations

import threading
from contextlib import contextmanager

from ledger.logs import KEY, NOW, Desk
from strongroom.core.files import locked
from strongroom.crypto import signatures
from strongroom.crypto.signatures import Signer
from strongroom.errors import Conflict
from strongroom.formats.checkpoint import verify_cosignature
from strongroom.formats.note import Note
from strongroom.ledger import published
from strongroom.ledger.key import LogKey
from strongroom.ledger.witness import Witness, cosign


def witness(desk, name):
    return Witness(name, Signer(name.encode() * 16), desk.folder / name, {KEY.origin: KEY.verifier}, lambda: NOW)


def cosigned(desk, witness, note):
    def post(_, body):
        try:
            return 200, witness.add_checkpoint(body)
        except Conflict as error:
            return 409, f"{error.evidence['size']}\n".encode()

    return cosign("https://witness.example", witness.key, note, desk.log.consistency, post=post)


def signed_by(desk, witness):
    return verify_cosignature(Note.decode(desk.published.note()), witness.key, signatures.verify) is not None


class TestCosignatures:
    def test_of_two_witnesses_who_are_asked_at_the_same_time(self, desk):
        first, second = witness(desk, "w1"), witness(desk, "w2")
        desk.log.publish()
        note = desk.published.note()
        desk.published.cosigned(cosigned(desk, first, note))
        desk.published.cosigned(cosigned(desk, second, note))
        assert signed_by(desk, first)
        assert signed_by(desk, second)
        assert KEY.open(desk.published.note()) == desk.log.checkpoint()[0]

    def test_once_more_of_the_same_one_is_there_once(self, desk):
        first = witness(desk, "w1")
        desk.log.publish()
        note = desk.published.note()
        for _ in range(3):
            desk.published.cosigned(cosigned(desk, first, note))
        assert [each.name for each in Note.decode(desk.published.note()).signatures] == [KEY.origin, "w1"]

    def test_of_another_checkpoint_are_not_published(self, desk):
        first = witness(desk, "w1")
        desk.log.publish()
        note = cosigned(desk, first, desk.published.note())
        desk.login()
        desk.log.publish()
        desk.published.cosigned(note)
        assert not signed_by(desk, first)

    def test_are_those_of_the_checkpoint_that_was_asked_about(self, desk, monkeypatch):
        """Another process appends and publishes between two looks at what is published."""
        desk.log.publish()
        checkpoint, note = desk.log.checkpoint()
        other, opened = Desk(desk.folder), LogKey.open

        def late(key, data):
            found = opened(key, data)
            monkeypatch.undo()
            other.login()
            other.log.publish()
            return found

        monkeypatch.setattr(LogKey, "open", late)
        found = desk.published.with_cosignatures(note)
        assert KEY.open(found) == checkpoint
        other.db.close()
        assert desk.published.newest().size == checkpoint.size + 1
        assert desk.published.with_cosignatures(note) == note


def test_publishing_waits_for_another_process_that_is_at_it(desk, monkeypatch):
    desk.log.publish()
    tried = threading.Event()

    @contextmanager
    def trying(path, *, wait):
        if wait:
            tried.set()
        with locked(path, wait=wait) as mine:
            tried.set()
            yield mine

    with locked(desk.folder / "log" / ".lock"):
        desk.login()
        desk.log.publish()  # as after an entry: it is left to the other one
        assert desk.published.newest().size < desk.log.checkpoint()[0].size
        monkeypatch.setattr(published, "locked", trying)
        thread = threading.Thread(target=desk.log.publish, kwargs={"wait": True})
        thread.start()
        assert tried.wait(60)
    thread.join(60)
    assert desk.published.newest() == desk.log.checkpoint()[0]
