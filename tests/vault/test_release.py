"""Releases, attacked from both sides (spec/release.md): what a custodian hands out, and what a receiver believes."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import random
import shutil
import threading
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import sqlalchemy as sa

from strongroom.client import Room
from strongroom.client.copy import write_copy
from strongroom.client.receive import Released, Remembered, accept
from strongroom.core.clock import unix
from strongroom.crypto.release import ReleaseKey, make_challenge, seal_bundle
from strongroom.crypto.signatures import Signer
from strongroom.errors import (
    BackendError,
    Denied,
    Forked,
    IntegrityError,
    NotFound,
    Rollback,
    StrongroomError,
    Tampered,
    UsageError,
)
from strongroom.formats.bundle import KeyBundle
from strongroom.formats.entry import UNKNOWN, Entry, Private
from strongroom.formats.merkle import leaf_hash
from strongroom.formats.statement import Statement
from strongroom.ledger.key import LogKey
from strongroom.ledger.log import Draft
from strongroom.marking.stamp import Stamp, tensor_tag
from strongroom.policy.facts import CEILINGS
from strongroom.policy.state import State
from strongroom.storage.reader import ImageReader
from strongroom.vault.copies import Copy
from strongroom.vault.originals import Originals
from strongroom.vault.release import Bundles
from strongroom.vault.vault import Vault
from vault.rooms import write_model

REF, OTHER = "acme/tiny@1", "acme/other@1"
HOUR = 3600


class Hall:
    """A team's room, its custodian at a clock that can be moved, and what each of its people says."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.offset = folder, 0
        self.vault = Vault(folder / "room", clock=self.clock)
        self.custodian = self.vault.custodian
        self.log = self.custodian.ledger

    def close(self) -> None:
        self.vault.close()

    def clock(self) -> int:
        return unix() + self.offset

    def again(self) -> Hall:
        """As another process has it."""
        self.close()
        return Hall(self.folder)

    def room(self, who: str) -> Room:
        return Room(self.folder / "room", who)

    def say(self, kind, by, body, *, signer=None, at=None) -> str:
        signer = signer or self.vault.identities.signer(by)
        at = self.clock() if at is None else at
        return Statement.sign(kind, body, room=self.vault.id.hex(), by=by, at=at, signer=signer).envelope

    def act(self, kind, by, body, reason=None):
        note = Private.fresh("reason", reason) if reason is not None else None
        return self.custodian.acted(self.say(kind, by, body | ({"reason": note.commitment} if note else {})), note)

    def taking(self, by="user/ana", *, key=None, ref=REF, action="load", challenge=None, reason=None, **how) -> str:
        body = {
            "action": action,
            "ref": ref,
            "holder": how.pop("holder", by),
            "public_key": (key.public_key if key else ReleaseKey().public_key).hex(),
            "challenge": (challenge or self.custodian.challenge()).hex(),
            "break_glass": reason is not None,
            "reason": reason.commitment if reason else "",
        }
        body.update(how.pop("body", {}))
        return self.say("release", by, body, **how)

    def release(self, by="user/ana", **how):
        return self.custodian.release(self.taking(by, **how), how.get("reason"))

    def received(self, by="user/ana", **how):
        """A release as its receiver has it: what was asked, with which key, and the answer."""
        key = Watched()
        envelope = self.taking(by, key=key, **how)
        answer = self.custodian.release(envelope, how.get("reason"))
        released = Released(answer.entry, answer.index, answer.proof, answer.checkpoint, answer.sealed)
        return Statement.decode(envelope), key, released

    def accept(self, statement, key, released, remembered, **how) -> KeyBundle:
        return accept(
            released,
            statement,
            key,
            log=how.get("log", self.vault.log_key),
            signer=how.get("signer", self.vault.signer),
            remembered=remembered,
            consistency=how.get("consistency", self.log.consistency),
        )

    def entries(self) -> list[Entry]:
        return [Entry.decode(data) for data in self.log.entries(0, self.size)]

    @property
    def size(self) -> int:
        return self.log.checkpoint()[0].size

    def verify(self) -> None:
        with self.room("user/ana") as room:
            room.log.verify()

    @contextmanager
    def records(self, by, code, *, action="load"):
        """In the block something is refused with `code`, and that, and nothing else, is recorded."""
        before = self.size
        with pytest.raises(StrongroomError) as caught:
            yield
        assert caught.value.code == code
        (entry,) = self.entries()[before:]
        assert (entry.type, entry.by, entry.body["code"]) == ("refused", by, code)
        assert entry.body["action"] == action

    @contextmanager
    def records_nothing(self, *codes):
        before = self.size
        with pytest.raises(StrongroomError) as caught:
            yield
        assert caught.value.code in codes
        assert self.size == before


class Watched(ReleaseKey):
    """A receiver's key that counts how often something was opened with it."""

    opened = 0

    def open(self, sealed, index, leaf):
        self.opened += 1
        return super().open(sealed, index, leaf)


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """Ana and Amy have leases to load and copy acme/tiny@1, Ana one for acme/other@1; Ben and Eva approve."""
    folder = tmp_path_factory.mktemp("template")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STRONGROOM_STATE", str(folder / "state"))
        olga, _ = Room.init(folder / "room", owner="user/olga")
        with olga:
            olga.put(write_model(folder / "model", seed=1), "acme/tiny", share="1/2")
            olga.put(write_model(folder / "other", seed=2), "acme/other", share="1/2")
            for path, role in (
                ("user/ana", "researcher"),
                ("user/amy", "researcher"),
                ("user/ben", "officer"),
                ("user/eva", "executive"),
            ):
                olga.principal_add(path, roles=[role])
        people = {name: Room(folder / "room", f"user/{name}") for name in ("ana", "amy", "ben", "eva")}
        for name, ref, action in (
            ("ana", REF, "load"),
            ("amy", REF, "load"),
            ("ana", OTHER, "load"),
            ("ana", REF, "copy"),
        ):
            asked = people[name].request(ref, reason="evaluation", action=action)
            people["ben"].approve(asked["id"])
            people["eva"].approve(asked["id"])
        for room in people.values():
            room.close()
    shutil.rmtree(folder / "state", ignore_errors=True)
    return folder


@pytest.fixture
def hall(template, tmp_path, monkeypatch):
    """A copy of it, whose receivers have seen nothing yet."""
    shutil.copytree(template, tmp_path / "hall")
    monkeypatch.setenv("STRONGROOM_STATE", str(tmp_path / "state"))
    made = Hall(tmp_path / "hall")
    yield made
    made.close()


@pytest.fixture
def remembered(hall, tmp_path):
    return Remembered(tmp_path / "seen", hall.vault.log_key)


def leases_used(hall) -> int:
    with hall.log.view() as state:
        return sum(lease.used for lease in state.leases.values())


class TestTheChallenge:
    def test_of_another_room_or_of_nobody(self, hall):
        room, key, now = hall.vault.id, hall.vault.keys.challenge_key, hall.clock()
        good = hall.custodian.challenge()
        foreign = [
            make_challenge(bytes(32), room, 0, now),
            make_challenge(key, bytes(16), 0, now),
            make_challenge(key, room, 7, now),
            bytes(32),
            good[:-1] + bytes([good[-1] ^ 1]),
            bytes([good[0] ^ 1]) + good[1:],
            good[16:] + good[:16],
        ]
        for challenge in foreign:
            with hall.records("user/ana", "challenge.foreign"):
                hall.release(challenge=challenge)
        assert leases_used(hall) == 0

    @pytest.mark.parametrize("off", [-301, 360, -HOUR, 10 * HOUR])  # seconds that this takes count
    def test_of_another_time(self, hall, off):
        hall.offset = off
        challenge = hall.custodian.challenge()
        hall.offset = 0
        with hall.records("user/ana", "challenge.expired"):
            hall.release(challenge=challenge)

    def test_used_twice_by_whomever(self, hall):
        challenge = hall.custodian.challenge()
        hall.release(challenge=challenge)
        with hall.records("user/ana", "challenge.used"):
            hall.release(challenge=challenge)
        with hall.records("user/amy", "challenge.used"):
            hall.release("user/amy", challenge=challenge)
        hall = hall.again()  # another process, another replica
        with hall.records("user/ana", "challenge.used"):
            hall.release(challenge=challenge)
        hall.close()

    def test_that_was_refused_is_not_used_up(self, hall):
        challenge = hall.custodian.challenge()
        with hall.records("user/ben", "denied.rule"):
            hall.release("user/ben", challenge=challenge)
        hall.release(challenge=challenge)

    @pytest.mark.parametrize("text", ["", "00", "0" * 62, "0" * 66, "g" * 64, "A" * 64, None, 5])
    def test_malformed(self, hall, text):
        """Already the statement is none then."""
        with pytest.raises(ValueError, match="not a statement"):
            hall.taking(body={"challenge": text})

    def test_from_before_the_clock_was_set_back(self, hall):
        """After the clock had been ahead, what was good before it was is not good again: the log may have forgotten
        what was used then."""
        said = hall.taking("user/eva", reason=Private.fresh("reason", "fire"))
        early = hall.custodian.challenge()
        hall.offset = 400 * 24 * HOUR
        hall.custodian.authorise("user/ben", "administer")
        hall.log.append(
            lambda _, __, now: Draft(Entry("refused", now, "user/ben", "", {"action": "x", "code": "x.y", "rule": ""}))
        )
        hall.offset = 10
        with hall.records_nothing("clock.backwards"):
            hall.custodian.challenge()
            hall.release(challenge=early)
        hall.act("clock", "user/ben", {}, "it was ahead")
        note = Private.fresh("reason", "fire")
        with hall.records("user/eva", "challenge.foreign"):
            hall.release("user/eva", challenge=early, reason=note)
        with pytest.raises(StrongroomError):
            hall.custodian.release(said)
        hall.release("user/eva", reason=note)
        with pytest.raises(UsageError) as caught:
            hall.act("clock", "user/ben", {}, "it is right")
        assert caught.value.code == "clock.right"


class TestWhoSpeaks:
    def test_a_statement_is_good_once(self, hall):
        said = hall.taking()
        hall.custodian.release(said)
        with hall.records(UNKNOWN, "statement.replayed"):
            hall.custodian.release(said)
        hall.verify()

    @pytest.mark.parametrize("off", [-301, 360, 10 * HOUR, -10 * HOUR])  # seconds that this takes count
    def test_at_another_time(self, hall, off):
        with hall.records(UNKNOWN, "statement.stale"):
            hall.release(at=hall.clock() + off)

    @pytest.mark.parametrize("name", ["user/eva", "user/ana", "user/nobody", "custodian", UNKNOWN, "", "\x1b[2J" * 99])
    def test_nobody_is_named_who_did_not_sign(self, hall, name):
        """The log must not say of Eva what somebody else made up."""
        with hall.records(UNKNOWN, "auth.refused"):
            hall.release(name, signer=Signer(bytes(32)))
        with hall.records(UNKNOWN, "auth.refused", action="revoke"):
            note = Private.fresh("reason", "x")
            body = {"target": REF, "reason": note.commitment}
            hall.custodian.revoke(hall.say("revoke", name, body, signer=Signer(bytes(32))), note)

    def test_a_stranger_learns_nothing_of_what_there_is(self, hall):
        told = []
        for ref in (REF, "acme/tiny@9", "acme/secret@1"):
            with pytest.raises(StrongroomError) as caught:
                hall.release("user/nobody", ref=ref, signer=Signer(bytes(32)))
            told.append(caught.value.as_json())
        assert told[0] == told[1] == told[2]

    def test_a_stranger_does_not_fill_the_log(self, hall):
        before = hall.size
        said = hall.taking("user/nobody", signer=Signer(bytes(32)))
        for _ in range(200):
            with pytest.raises(StrongroomError):
                hall.custodian.release(said)
        assert before < hall.size <= before + 60
        # And it hides nothing that people do whom the log knows.
        with hall.records("user/ben", "denied.rule"):
            hall.release("user/ben")

    def test_a_stranger_keeps_no_text_of_a_policy_here(self, hall):
        note = Private.fresh("reason", "x")
        with hall.log.view() as state:
            text = hall.custodian._documents.policies(state.policy).text + "\n// and more"
        from strongroom.policy.engine import Policies

        digest = Policies.parse(text).digest
        said = hall.say("propose", "user/ben", {"digest": digest, "reason": note.commitment}, signer=Signer(bytes(32)))
        with hall.records(UNKNOWN, "auth.refused", action="administer"):
            hall.custodian.propose(said, text, note)
        with pytest.raises(NotFound):
            hall.custodian._documents.policies(digest)

    def test_nobody_takes_for_another(self, hall):
        with hall.records("user/amy", "release.holder"):
            hall.release("user/amy", holder="user/ana")

    @pytest.mark.parametrize("kind", ["request", "approve", "revoke"])
    def test_a_statement_of_another_kind(self, hall, kind):
        note = Private.fresh("reason", "x")
        bodies = {
            "request": {"action": "load", "ref": REF, "for": "user/ana", "duration": 60, "uses": None},
            "approve": {"request": "0" * 64, "duration": 0, "uses": None},
            "revoke": {"target": REF},
        }
        body = bodies[kind] | ({"reason": note.commitment} if kind != "approve" else {})
        with hall.records_nothing("statement.kind"):
            hall.custodian.release(hall.say(kind, "user/ana", body))

    @pytest.mark.parametrize(
        "text", ["", "{}", "x" * 70_000, "\ud800", '{"payload":"","payloadType":"","signatures":[]}']
    )
    def test_no_statement_at_all(self, hall, text):
        with pytest.raises(StrongroomError):
            hall.custodian.release(text)


class TestReasons:
    def test_are_what_was_signed(self, hall):
        """A release that says less than was signed would be an entry that no verifier accepts: nobody could verify the
        log again."""
        note = Private.fresh("reason", "fire")
        with hall.records("user/ana", "release.reason"):
            hall.custodian.release(hall.taking(body={"reason": note.commitment}))
        for other in (Private.fresh("reason", "fire"), Private("reason", "flood", note.salt)):
            with hall.records("user/eva", "entry.private"):
                hall.custodian.release(hall.taking("user/eva", reason=note), other)
        with hall.records("user/eva", "release.no_reason"):
            hall.custodian.release(hall.taking("user/eva", body={"break_glass": True}))
        hall.release("user/eva", reason=note)
        hall.verify()

    @pytest.mark.parametrize(
        "note",
        [
            Private.fresh("detail", "x"),
            Private.fresh("", "x"),
            Private.fresh("reason", "\0"),
            Private.fresh("reason", "all is well\x1b[2J"),
            Private.fresh("reason", "\u202egnp.exe"),
            Private.fresh("reason", "x" * 5000),
        ],
    )
    def test_can_be_kept_and_shown(self, hall, note):
        body = {"action": "load", "ref": REF, "for": "user/ana", "duration": 60, "uses": None}
        said = hall.say("request", "user/ana", {**body, "reason": note.commitment})
        with hall.records("user/ana", "reason.malformed"):
            hall.custodian.request(said, note)
        said = hall.taking("user/eva", reason=note)
        with hall.records("user/eva", "reason.malformed"):
            hall.custodian.release(said, note)

    def test_in_several_lines(self, hall):
        note = Private.fresh("reason", "Grüße:\n\tfor the evaluation")
        receipt = hall.release("user/eva", reason=note)
        entry = Entry.decode(receipt.entry)
        assert hall.log.private(receipt.index, entry) == {"reason": note.value}


class TestTheVersion:
    def test_that_was_shredded(self, hall):
        with hall.room("user/olga") as olga:
            olga.shred(REF, confirm=REF)
        with hall.records("user/ana", "weights.shredded"):
            hall.release()
        hall.release(ref=OTHER)

    def test_that_is_frozen(self, hall):
        with hall.room("user/ben") as ben:
            ben.revoke(REF, reason="it leaked")
        with hall.records("user/ana", "version.frozen"):
            hall.release()
        hall.release(ref=OTHER)

    @contextmanager
    def between(self, hall, act):
        """`act` happens right after everything was looked up, and before it is decided."""
        deciding = hall.custodian.decide

        def late(decide, **how):
            hall.custodian.decide = deciding
            act()
            return deciding(decide, **how)

        hall.custodian.decide = late
        yield
        assert hall.custodian.decide is deciding  # it came to that

    def do(self, hall, who, act):
        with hall.room(who) as room:
            act(room)

    @pytest.mark.parametrize(
        ("who", "act", "code"),
        [
            ("user/olga", lambda room: room.shred(REF, confirm=REF), "version.missing"),
            ("user/ben", lambda room: room.revoke(REF, reason="x"), "version.frozen"),
            ("user/ben", lambda room: room.revoke("user/ana", reason="x"), "auth.refused"),
            ("user/ben", lambda room: room.principal_change("user/ana", roles=[]), "denied.default"),
        ],
    )
    def test_that_changes_at_the_last_moment(self, hall, who, act, code):
        said = hall.taking()
        with pytest.raises(StrongroomError) as caught, self.between(hall, lambda: self.do(hall, who, act)):
            hall.custodian.release(said)
        assert caught.value.code == code
        assert not [entry for entry in hall.entries() if entry.type == "release"]

    @pytest.mark.parametrize("kept", [False, True])
    def test_that_is_rotated_at_the_last_moment_is_released_as_it_is_then(self, hall, remembered, kept):
        if kept:
            hall.release()
        size = hall.size
        with self.between(hall, lambda: self.do(hall, "user/olga", lambda room: room.rotate(REF))):
            bundle = hall.accept(*hall.received(), remembered)
        assert bundle.revision == 2
        # Nobody was refused anything.
        assert [entry.type for entry in hall.entries()[size:]] == ["rotate", "release"]

    def test_that_was_rotated_is_released_anew(self, hall, remembered):
        before = hall.accept(*hall.received(), remembered)
        self.do(hall, "user/olga", lambda room: room.rotate(REF))
        after = hall.accept(*hall.received(), remembered)
        assert after.revision == before.revision + 1
        assert after.common_key != before.common_key
        assert after.word == before.word

    def test_whose_row_was_set_back_in_the_database(self, hall):
        """The record of before a rotation, whole and sealed: the log knows better."""
        hall.close()
        database = hall.folder / "room" / "room.db"
        query = "SELECT record, revision, manifest_sha256 FROM versions WHERE name = 'acme/tiny'"
        import sqlite3

        with sqlite3.connect(database) as tx:
            row = tx.execute(query).fetchone()
        tx.close()
        self.do(hall, "user/olga", lambda room: room.rotate(REF))
        with sqlite3.connect(database) as tx:
            tx.execute(
                "UPDATE versions SET record = ?, revision = ?, manifest_sha256 = ? WHERE name = 'acme/tiny'", row
            )
        tx.close()
        hall = Hall(hall.folder)
        with pytest.raises(StrongroomError):
            hall.release()
        assert not [entry for entry in hall.entries() if entry.type == "release"]
        hall.close()


class TestLookingAfterTheRoom:
    """Each act is signed, policy is asked, and a refusal is recorded."""

    ACTS = (
        lambda hall, by: hall.act("ceiling", by, {"ref": REF, "holders": 1, "copies": 1, "copiers": 1}),
        lambda hall, by: hall.act("thaw", by, {"ref": REF}, "it was a mistake"),
        lambda hall, by: hall.act("clock", by, {}, "it was ahead"),
        lambda hall, by: hall.act("enact", by, {"proposal": "0" * 16, "reason": ""}),
        lambda hall, by: hall.act("redact", by, {"entry": 1}),
        lambda hall, by: hall.act("review", by, {"size": 1, "findings": 0, "removed": 0}),
        lambda hall, by: hall.act("keystore", by, {"operation": "rotate", "epoch": 2}),
        lambda hall, by: hall.custodian.authorise(by, "administer"),
    )

    @pytest.mark.parametrize("act", ACTS)
    @pytest.mark.parametrize("by", ["user/ana", "user/eva"])
    def test_is_for_who_may(self, hall, act, by):
        with hall.records(by, "denied.default", action="administer"):
            act(hall, by)

    @pytest.mark.parametrize("value", [-1, 2**53, 2**64])
    def test_a_ceiling_is_a_number_that_the_log_can_hold(self, hall, value):
        with hall.records_nothing("ceiling.negative"), hall.room("user/ben") as ben:
            ben.set_ceiling(REF, copies=value)

    def test_what_was_frozen_is_asked_for_anew(self, hall):
        with hall.room("user/ben") as ben:
            ben.revoke(REF, reason="it leaked")
        with hall.records("user/ben", "reason.malformed", action="administer"):
            hall.act("thaw", "user/ben", {"ref": REF}, "\x1b[2J")
        hall.act("thaw", "user/ben", {"ref": REF}, "it did not")
        with hall.records("user/ana", "denied.default"):
            hall.release()


class TestNothingLeavesUnrecorded:
    """If the log can't be written nothing is released; if nothing can be released no release is recorded."""

    def pragma(self, hall, text):
        hall.vault.db.close()

        @sa.event.listens_for(hall.vault.db._engine, "begin")
        def limit(connection):
            connection.exec_driver_sql(f"PRAGMA {text}")

        return limit

    def test_with_a_database_that_is_read_only(self, hall):
        said, before = hall.taking(), hall.size
        limit = self.pragma(hall, "query_only=1")
        with pytest.raises(BackendError):
            hall.custodian.release(said)
        sa.event.remove(hall.vault.db._engine, "begin", limit)
        hall.vault.db.close()
        assert hall.size == before
        hall.custodian.release(said)  # it was never used

    def test_with_a_disk_that_is_full(self, hall):
        import sqlite3

        acknowledged = []
        hall.close()
        with sqlite3.connect(hall.folder / "room" / "room.db") as tx:
            pages = tx.execute("PRAGMA page_count").fetchone()[0]
        tx.close()
        hall = Hall(hall.folder)
        self.pragma(hall, f"max_page_count={pages + 2}")
        with pytest.raises(BackendError) as caught:
            acknowledged.extend(hall.release().index for _ in range(500))
        assert caught.value.code == "db.full"
        assert [entry.type for entry in hall.entries()].count("release") == len(acknowledged)
        assert leases_used(hall) == len(acknowledged)
        hall.close()

    def test_with_a_store_that_is_not_there(self, hall):
        hall = hall.again()
        said, before = hall.taking(), hall.size
        store = hall.folder / "room" / "store"
        store.rename(store.with_name("elsewhere"))
        with pytest.raises(StrongroomError):
            hall.custodian.release(said)
        assert hall.size == before
        store.with_name("elsewhere").rename(store)
        hall.custodian.release(said)
        hall.close()

    def test_with_a_manifest_that_was_tampered_with(self, hall):
        hall = hall.again()
        before = hall.size
        for path in (hall.folder / "room" / "store").rglob("*manifest*"):
            data = path.read_bytes()
            path.chmod(0o600)
            path.write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
        with pytest.raises(StrongroomError):
            hall.release()
        assert hall.size == before
        hall.close()

    @pytest.mark.parametrize("key", [bytes(32), b"\1" + bytes(31), b"\xec" + b"\xff" * 30 + b"\x7f"])
    def test_to_a_key_that_everybody_has_the_other_half_of(self, hall, key):
        with hall.records("user/ana", "release.bad_key"):
            hall.release(body={"public_key": key.hex()})
        assert leases_used(hall) == 0

    def test_with_a_policy_that_was_altered(self, hall):
        import sqlite3

        hall.close()
        with sqlite3.connect(hall.folder / "room" / "room.db") as tx:
            tx.execute("UPDATE documents SET data = replace(data, 'forbid', 'permit')")
        tx.close()
        hall = Hall(hall.folder)
        with hall.records_nothing("document.tampered"):
            hall.release()
        hall.close()


def flips(data: bytes, count: int = 40):
    """`data` with one bit the other way round, at places all over it, and shorter, longer and empty."""
    step = max(1, len(data) // count)
    for place in range(0, len(data), step):
        for bit in (0, 7):
            yield data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :]
    yield from (data[:-1], data[1:], data + b"\0", b"\0" + data, b"", data + data)


class TestWhatIsBelieved:
    def refuses(self, hall, remembered, statement, key, released, *kinds, **how):
        """Refused as one of `kinds`, and nothing was opened or remembered."""
        seen = remembered.newest()
        with pytest.raises(StrongroomError) as caught:
            hall.accept(statement, key, released, remembered, **how)
        assert isinstance(caught.value, kinds or IntegrityError)
        assert key.opened == 0
        assert remembered.newest() == seen
        return caught.value

    def test_an_honest_answer(self, hall, remembered):
        statement, key, released = hall.received()
        bundle = hall.accept(statement, key, released, remembered)
        assert (bundle.ref, bundle.holder) == (REF, "user/ana")
        assert remembered.newest().size == hall.size
        assert ImageReader(hall.vault.blobs, bundle).read_all()

    @pytest.mark.parametrize("part", ["entry", "checkpoint"])
    def test_every_bit(self, hall, remembered, part):
        statement, key, released = hall.received()
        for wrong in flips(getattr(released, part), 200):
            changed = dataclasses.replace(released, **{part: wrong})
            self.refuses(hall, remembered, statement, key, changed)
        hall.accept(statement, key, released, remembered)

    def test_every_hash_and_place_of_the_proof(self, hall, remembered):
        statement, key, released = hall.received()
        proof = released.proof
        assert len(proof) > 1
        wrong = [proof[:-1], proof[1:], (*proof, bytes(32)), (bytes(32), *proof), (), proof[::-1], (b"", *proof[1:])]
        for number in range(len(proof)):
            wrong += [(*proof[:number], each, *proof[number + 1 :]) for each in flips(proof[number], 4)]
        for each in wrong:
            self.refuses(hall, remembered, statement, key, dataclasses.replace(released, proof=each))
        for index in (-1, 0, released.index - 1, released.index + 1, released.index + 2**32, 2**64, -(2**64)):
            self.refuses(hall, remembered, statement, key, dataclasses.replace(released, index=index))

    def test_every_bit_of_what_is_sealed(self, hall, remembered):
        statement, key, released = hall.received()
        for wrong in flips(released.sealed, 100):
            with pytest.raises(Tampered) as caught:
                hall.accept(statement, key, dataclasses.replace(released, sealed=wrong), remembered)
            assert caught.value.code == "release.tampered"

    def test_the_answer_to_another_request(self, hall, remembered):
        """By the same person for the same version, by another one, for another version, for a copy, in an
        emergency."""
        statement, key, released = hall.received()
        note = Private.fresh("reason", "fire")
        others = [
            hall.received(),
            hall.received("user/amy"),
            hall.received(ref=OTHER),
            hall.received(action="copy"),
            hall.received("user/eva", reason=note),
        ]
        for _, _, other in others:
            error = self.refuses(hall, remembered, statement, key, other, Tampered)
            assert error.code == "release.other_entry"
            mixed = dataclasses.replace(other, sealed=released.sealed)
            self.refuses(hall, remembered, statement, key, mixed, Tampered)
            mixed = dataclasses.replace(released, sealed=other.sealed)
            with pytest.raises(Tampered):
                hall.accept(statement, Watched(), mixed, remembered)

    def test_an_entry_that_is_no_release(self, hall, remembered):
        statement, key, _ = hall.received()
        checkpoint, note = hall.log.checkpoint()
        for index, data in enumerate(hall.log.entries(0, checkpoint.size - 1)):
            proof = tuple(hall.log.inclusion(index, checkpoint.size))
            other = Released(data, index, proof, note, b"x" * 64)
            self.refuses(hall, remembered, statement, key, other, Tampered)

    @pytest.mark.parametrize(
        "change",
        [
            {"holder": "user/amy"},
            {"ref": OTHER},
            {"revision": 2},
            {"room": bytes(16)},
            {"signer": bytes(32)},
            {"manifest_digest": bytes(32)},
        ],
    )
    def test_another_bundle_under_the_right_entry(self, hall, remembered, change):
        """Sealed as it should be, by a custodian that gives somebody else's code word, or another version's keys."""
        statement, key, released = hall.received()
        bundle = dataclasses.replace(self.bundle(hall), **change)
        sealed = seal_bundle(bundle.encode(), key.public_key, released.index, leaf_hash(released.entry))
        with pytest.raises(Tampered) as caught:
            hall.accept(statement, key, dataclasses.replace(released, sealed=sealed), remembered)
        assert caught.value.code == "release.other_bundle"

    @pytest.mark.parametrize("data", [b"", b"x", bytes(500)])
    def test_what_is_no_bundle(self, hall, remembered, data):
        statement, key, released = hall.received()
        sealed = seal_bundle(data, key.public_key, released.index, leaf_hash(released.entry))
        with pytest.raises(StrongroomError):
            hall.accept(statement, key, dataclasses.replace(released, sealed=sealed), remembered)

    def bundle(self, hall, ref=REF, holder="user/ana"):
        record = hall.vault.record(hall.vault.find(ref))
        return Bundles(record, hall.vault.manifest(record), hall.vault.keys.signer.public_key).of(holder)

    def test_another_rooms_log_or_key(self, hall, remembered):
        statement, key, released = hall.received()
        for log in (
            LogKey(bytes(16), hall.vault.log_key.public_key),
            LogKey(hall.vault.id, Signer(bytes(32)).public_key),
        ):
            self.refuses(hall, remembered, statement, key, released, log=log)

    def test_a_release_that_took_long(self, hall, remembered):
        """Its checkpoint is older than one that was seen meanwhile: both are of one history, and that is shown."""
        first, second = hall.received(), hall.received()
        hall.accept(*second, remembered)
        newest = remembered.newest()
        hall.accept(*first, remembered)
        assert remembered.newest() == newest

    @pytest.mark.parametrize(
        "lie",
        [
            lambda _old, _new: [],
            lambda _old, _new: [bytes(32)],
            lambda _old, _new: [b"short"] * 3,
            lambda _old, _new: [bytes(32)] * 100,
        ],
    )
    @pytest.mark.parametrize("turn", [1, -1])
    def test_a_proof_between_checkpoints_that_is_none(self, hall, remembered, lie, turn):
        earlier, later = [hall.received(), hall.received()][::turn]
        hall.accept(*earlier, remembered)
        self.refuses(hall, remembered, *later, Forked, consistency=lie)


class TestAnotherHistory:
    """Under the same key: what only a custodian can make, or whoever has the database of yesterday."""

    @pytest.fixture
    def twin(self, hall):
        """The same room, copied while both were one."""
        hall.close()
        shutil.copytree(hall.folder, hall.folder.with_name("twin"))
        made = Hall(hall.folder.with_name("twin"))
        yield made
        made.close()

    @pytest.mark.parametrize("ahead", [0, 1, 5])
    def test_that_was_forked(self, hall, twin, remembered, ahead):
        hall.accept(*hall.received(), remembered)
        seen = remembered.newest()
        for _ in range(ahead):
            twin.release()
        statement, key, released = twin.received()
        with pytest.raises(Forked) as caught:
            twin.accept(statement, key, released, remembered)
        assert (caught.value.code, key.opened) == ("log.forked", 0)
        assert remembered.newest() == seen

    def test_that_is_shorter(self, hall, twin, remembered):
        """Set back: the log can't prove what it has forgotten."""
        for _ in range(4):
            hall.accept(*hall.received(), remembered)
        statement, key, released = twin.received()
        with pytest.raises(Rollback) as caught:
            twin.accept(statement, key, released, remembered)
        assert (caught.value.code, key.opened) == ("log.rollback", 0)
        # Nor with a proof that the longer log makes of it.
        with pytest.raises(Forked):
            twin.accept(statement, key, released, remembered, consistency=hall.log.consistency)
        assert key.opened == 0

    def test_as_a_user_sees_it(self, hall, twin):
        """The room's folder is the copy of yesterday; the user's own memory is of today."""
        with hall.room("user/ana") as ana:
            for _ in range(3):
                ana.load(REF)
        with twin.room("user/ana") as ana, pytest.raises((Rollback, Forked)):
            ana.load(REF)
        with twin.room("user/ana") as ana, pytest.raises((Rollback, Forked)):
            ana.log.verify()


def advance(folder: str, room: str, public_key: str, notes: list[str], proofs: dict[str, list[str]]) -> None:
    """A process that sees these checkpoints, in an order of its own."""
    remembered = Remembered(Path(folder), LogKey(bytes.fromhex(room), bytes.fromhex(public_key)))
    random.Random(os.getpid()).shuffle(notes)
    for note in notes:
        remembered.advance(
            bytes.fromhex(note), lambda old, new: [bytes.fromhex(each) for each in proofs[f"{old} {new}"]]
        )


class TestWhatIsRemembered:
    def test_by_many_processes_at_once_is_the_newest(self, hall, tmp_path):
        notes = []
        for _ in range(12):
            hall.release()
            notes.append(hall.log.checkpoint())
        sizes = [checkpoint.size for checkpoint, _ in notes]
        proofs = {
            f"{old} {new}": [each.hex() for each in hall.log.consistency(old, new)]
            for old in sizes
            for new in sizes
            if old < new
        }
        remembered = Remembered(tmp_path / "seen", hall.vault.log_key)
        context = multiprocessing.get_context("spawn")
        key = hall.vault.log_key
        arguments = (str(tmp_path / "seen"), key.room.hex(), key.public_key.hex(), [note.hex() for _, note in notes])
        workers = [context.Process(target=advance, args=(*arguments, proofs)) for _ in range(4)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(120)
            assert worker.exitcode == 0
        assert remembered.newest() == notes[-1][0]
        assert {path.suffix for path in (tmp_path / "seen" / "checkpoints").iterdir()} == {"", ".lock"}

    @pytest.mark.parametrize("damage", ["empty", "cut", "other", "flipped", "text"])
    def test_and_was_damaged_is_an_error(self, hall, remembered, damage):
        """With it goes the memory that a rollback would be seen by: it is not passed over, also not when it is
        empty."""
        hall.accept(*hall.received(), remembered)
        path = remembered._path
        data = path.read_bytes()
        other = LogKey(hall.vault.id, Signer(bytes(32)).public_key)
        path.write_bytes(
            {
                "empty": b"",
                "cut": data[:-10],
                "other": other.sign(remembered.newest(), Signer(bytes(32))),
                "flipped": data[:40] + bytes([data[40] ^ 1]) + data[41:],
                "text": b"\xff\xfe",
            }[damage]
        )
        statement, key, released = hall.received()
        with pytest.raises(Tampered) as caught:
            hall.accept(statement, key, released, remembered)
        assert (caught.value.code, key.opened) == ("checkpoint.damaged", 0)
        path.unlink()
        hall.accept(statement, key, released, remembered)

    def test_where_nothing_can_be_kept_nothing_is_opened(self, hall, tmp_path):
        (tmp_path / "file").write_bytes(b"")
        (tmp_path / "taken").mkdir()
        blocked = Remembered(tmp_path / "taken", hall.vault.log_key)
        blocked._path.mkdir(parents=True)
        for remembered in (Remembered(tmp_path / "file", hall.vault.log_key), blocked):
            statement, key, released = hall.received()
            with pytest.raises(BackendError):
                hall.accept(statement, key, released, remembered)
            assert key.opened == 0

    def test_is_of_one_room_and_key_each(self, hall, tmp_path):
        remembered = Remembered(tmp_path, hall.vault.log_key)
        others = [
            LogKey(bytes(16), hall.vault.log_key.public_key),
            LogKey(hall.vault.id, Signer(bytes(32)).public_key),
        ]
        hall.accept(*hall.received(), remembered)
        for key in others:
            assert Remembered(tmp_path, key).newest() is None


def copy_of(hall, holder):
    """The copy of a holder, as the custodian writes it."""
    vault = hall.vault
    record = vault.record(vault.find(REF))
    originals = Originals(vault.image(record), record)
    return Copy(originals, record, holder)


def stamped(vault, holder, reader):
    """The image that `reader` has of its holder's variants, stamped tensor by tensor as spec/mark.md has it."""
    image = bytearray(reader.read_all())
    record = vault.record(vault.find(REF))
    originals = Originals(vault.image(record), record)
    for each in originals.tensors():
        if each.marked and each.info.elements >= 16384 and each.info.name != "lm_head.weight":
            original = bytes(originals.read(each.begin, each.end))
            integer = {"BF16": "<u2", "F16": "<u2", "F32": "<u4"}[each.info.dtype.name]
            Stamp(record.stamp_key, holder).apply(
                each.info.dtype.name,
                tensor_tag(each.begin),
                0,
                np.frombuffer(original, integer),
                np.frombuffer(memoryview(image)[each.begin : each.end], integer),
            )
    return bytes(image)


class TestCopies:
    def copy(self, hall, out):
        with hall.room("user/ana") as ana:
            return ana.copy(REF, "user/ana", out)

    def test_are_the_originals_but_for_the_marks(self, hall, tmp_path):
        from safetensors import safe_open

        told = self.copy(hall, tmp_path / "out")
        originals = hall.folder / "model"
        assert sorted(told["files"]) == sorted(path.name for path in originals.iterdir())
        reader = ImageReader(hall.vault.blobs, hall.vault.bundle(REF, "user/ana"))
        layout, image = reader.layout, stamped(hall.vault, "user/ana", reader)
        markable = bytearray(layout.image)
        for run in layout.runs:
            markable[run.begin : run.end] = b"\1" * (run.end - run.begin)
        marked = 0
        for file in layout.files:
            copied, original = (tmp_path / "out" / file.path).read_bytes(), (originals / file.path).read_bytes()
            assert copied == image[file.offset : file.end]
            differ = [k for k, (one, other) in enumerate(zip(copied, original, strict=True)) if one != other]
            assert all(markable[file.offset + k] for k in differ)
            marked += len(differ)
            if file.path.endswith(".safetensors"):
                with (
                    safe_open(tmp_path / "out" / file.path, "np") as opened,
                    safe_open(originals / file.path, "np") as first,
                ):
                    assert sorted(opened.keys()) == sorted(first.keys())
                    for name in opened.keys():  # noqa: SIM118 - it is no mapping
                        assert opened.get_slice(name).get_shape() == first.get_slice(name).get_shape()
        assert 0 < marked < layout.image
        assert (tmp_path / "out").stat().st_mode & 0o777 == 0o700
        assert {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()} == {0o600}
        entry = hall.entries()[told["entry"]]
        assert (entry.type, entry.body["files"], entry.body["bytes"]) == ("copy", len(told["files"]), told["bytes"])
        assert hall.entries()[entry.body["release"]].body["action"] == "copy"
        hall.verify()

    def damaged(self, hall):
        """A byte is flipped in one of the largest objects of the store, so that it is met in the middle."""
        objects = sorted((hall.folder / "room" / "store").rglob("*"), key=lambda path: path.stat().st_size)
        for path in objects[-4:]:
            data = bytearray(path.read_bytes())
            data[len(data) // 2] ^= 1
            path.chmod(0o600)
            path.write_bytes(data)

    def test_that_fail_in_the_middle_leave_nothing(self, hall, tmp_path):
        self.damaged(hall)
        (tmp_path / "copies").mkdir()
        with pytest.raises(IntegrityError):
            self.copy(hall, tmp_path / "copies" / "out")
        assert list((tmp_path / "copies").iterdir()) == []
        types = [entry.type for entry in hall.entries()]
        assert types[-1] == "release"  # which was recorded, and counts
        assert "copy" not in types

    def test_that_are_interrupted_leave_nothing(self, hall, tmp_path):
        class Interrupted(BaseException):
            pass

        def progress(done, total):
            if done > total // 2:
                raise Interrupted

        reader = copy_of(hall, "user/ana")
        (tmp_path / "copies").mkdir()
        with pytest.raises(Interrupted):
            write_copy(reader, tmp_path / "copies" / "out", progress=progress)
        assert list((tmp_path / "copies").iterdir()) == []

    def test_never_touch_what_is_there(self, hall, tmp_path):
        here = tmp_path / "here"
        here.mkdir()
        with pytest.raises(UsageError):
            self.copy(hall, here)
        reader = copy_of(hall, "user/ana")
        (here / "mine").write_text("mine")
        (tmp_path / "link").symlink_to(tmp_path / "nowhere")
        (tmp_path / "file").write_text("mine")
        for taken in (here, tmp_path / "link", tmp_path / "file", tmp_path / "file" / "out"):
            with pytest.raises(BackendError):
                write_copy(reader, taken)
        assert (here / "mine").read_text() == "mine"
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "file").read_text() == "mine"
        assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []

    def test_two_at_once_into_one_folder(self, hall, tmp_path):
        """One of them makes it, whole; neither takes the other's work away."""
        reader = copy_of(hall, "user/ana")
        barrier, outcomes = threading.Barrier(4), []

        def run():
            barrier.wait()
            try:
                outcomes.append(write_copy(reader, tmp_path / "out"))
            except BackendError:
                outcomes.append(None)

        threads = [threading.Thread(target=run) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len([each for each in outcomes if each]) == 1
        for file in reader.files:
            assert (tmp_path / "out" / file.path).stat().st_size == file.bytes
        assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]

    @pytest.mark.parametrize(
        "path", ["../out", "/etc/passwd", "a/../../b", "..", "", ".", "a/..", "//x", "\0", "x" * 300]
    )
    def test_of_files_with_impossible_names(self, hall, tmp_path, path):
        """An index is sealed and checked when it is read; still nothing is written outside the folder."""
        real = copy_of(hall, "user/ana")

        class Lying:
            files = (dataclasses.replace(real.files[0], path=path), *real.files[1:])
            read = staticmethod(real.read)

        inner = tmp_path / "deep" / "in"
        inner.mkdir(parents=True)
        with pytest.raises(StrongroomError):
            write_copy(Lying(), inner / "copy")
        assert [path for path in tmp_path.rglob("*") if path.is_file() and "hall" not in path.parts] == []

    def test_count_against_the_ceilings_also_when_they_fail(self, hall, tmp_path):
        for number in range(CEILINGS[1] - 1):
            self.copy(hall, tmp_path / f"copy-{number}")
        self.damaged(hall)
        with pytest.raises(IntegrityError):
            self.copy(hall, tmp_path / "failed")
        with hall.records("user/ana", "denied.rule", action="copy"):
            self.copy(hall, tmp_path / "more")
        assert not (tmp_path / "more").exists()

    def test_are_for_who_takes_them(self, hall, tmp_path):
        with hall.room("user/amy") as amy:
            with pytest.raises(UsageError):
                amy.copy(REF, "user/ana", tmp_path / "out")
            with pytest.raises(Denied):
                amy.copy(REF, "user/amy", tmp_path / "out")
        assert not (tmp_path / "out").exists()


class TestRaces:
    @pytest.mark.parametrize("seed", range(3))
    def test_every_release_is_covered_where_it_stands(self, hall, seed):
        """Requests, approvals, revocations and releases by many threads and two processes' worth of custodians: at its
        place in the log, every release has a lease that held there."""
        other = Hall(hall.folder)
        chance = random.Random(seed)
        counts = {"released": 0, "refused": 0}
        lock = threading.Lock()

        def act(random_, custodian, room):
            choice = random_.random()
            with custodian.log.view() as state:
                pending = [each.id for each in state.requests.values() if each.state == "pending"]
                leases = [each.id for each in state.leases.values() if not each.ended]
            if choice < 0.15:
                who = random_.choice(["user/ana", "user/amy"])
                room[who].request(random_.choice([REF, OTHER]), reason="x", uses=random_.choice([None, 1, 2]))
            elif choice < 0.4 and pending:
                room[random_.choice(["user/ben", "user/eva"])].approve(random_.choice(pending))
            elif choice < 0.5 and leases:
                room["user/ben"].revoke(random_.choice(leases), reason="x")
            elif choice < 0.53:
                room["user/ben"].principal_change("user/amy", state=random_.choice(["active", "suspended"]))
            else:
                custodian.release(random_.choice(["user/ana", "user/amy"]), ref=random_.choice([REF, OTHER]))
                with lock:
                    counts["released"] += 1

        def run(number):
            random_ = random.Random(seed * 100 + number)
            custodian = (hall, other)[number % 2]
            rooms = {who: hall.room(who) for who in ("user/ana", "user/amy", "user/ben", "user/eva")}
            for _ in range(25):
                try:
                    act(random_, custodian, rooms)
                except StrongroomError as error:
                    assert error.code.split(".")[0] in (
                        "denied",
                        "auth",
                        "request",
                        "approve",
                        "principal",
                        "release",
                        "revoke",
                    ), error
                    with lock:
                        counts["refused"] += 1
            for each in rooms.values():
                each.close()

        failures = []

        def guarded(number):
            try:
                run(number)
            except BaseException as error:  # noqa: BLE001 - it fails the test, below
                failures.append(error)

        threads = [threading.Thread(target=guarded, args=(number,)) for number in range(6)]
        chance.shuffle(threads)
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        other.close()
        assert failures == []
        state, releases, refused = State(), 0, 0
        for index, entry in enumerate(hall.entries()):
            if entry.type == "release":
                lease = state.leases[entry.body["lease"]]
                assert lease.holds(entry.at), (index, lease)
                assert (lease.holder, lease.action, lease.ref) == (entry.by, "load", entry.ref)
                assert state.principals[entry.by].active
                releases += 1
            refused += entry.type == "refused"
            state.apply(index, entry)
        assert releases == counts["released"] > 0
        assert refused > 0
        for lease in state.leases.values():
            assert lease.uses is None or lease.used <= lease.uses
        hall.verify()


def test_an_entry_says_nothing_that_was_kept_beside_it(hall):
    note = Private.fresh("reason", "for Mrs Smith of Ward 5")
    answer = hall.release("user/eva", reason=note)
    assert b"Smith" not in answer.entry
    assert json.loads(answer.entry)["private"] == {"reason": note.commitment}
