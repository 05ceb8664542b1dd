"""Records: chained, durable, in the log, and no word can be taken back."""

from __future__ import annotations

import asyncio
import json
import os
import threading

import pytest

from strongroom.errors import BackendError, Tampered
from strongroom.gateway import records as module
from strongroom.gateway.records import FIRST, Records, digest, verify

RECORD = {"by": "user/ana", "ref": "acme/tiny@1", "status": 200, "tokens": 5, "bits": 80}


def made(folder, entered, count: int = 3, **more) -> Records:
    records = Records(folder, lambda ref, body: entered.append((ref, body)) or len(entered), "5" * 64)
    for k in range(count):
        records.add({**RECORD, "tokens": k, **more})
    return records


def test_a_chain_that_the_log_knows(tmp_path):
    entered = []
    records = made(tmp_path, entered)
    records.close()
    lines = records.path.read_bytes().splitlines()
    assert [json.loads(line)["n"] for line in lines] == [0, 1, 2]
    assert json.loads(lines[0])["before"] == FIRST
    assert json.loads(lines[2])["before"] == digest(lines[1])
    ((ref, body),) = entered
    assert ref == "acme/tiny@1"
    assert body == {
        "gateway": records.stream,
        "records": 3,
        "head": digest(lines[2]),
        "settings": "5" * 64,
        "requests": 3,
        "refused": 0,
        "tokens": 3,
        "bits": 240,
    }
    assert verify(lines, [body]) == 3
    assert oct(records.path.stat().st_mode & 0o777) == "0o600"


def test_nobody_waits_for_a_stream_that_has_ended(tmp_path):
    """The last request of older settings may end after it, and a thread that waits keeps the process."""
    entered = []
    records = made(tmp_path, entered)
    records.close()
    waiting = threading.Thread(target=records.announce, args=("a" * 64,), daemon=True)
    waiting.start()
    waiting.join(60)
    assert not waiting.is_alive()
    assert len(entered) == 1


def test_whoever_edits_a_record_contradicts_the_log(tmp_path):
    entered = []
    records = made(tmp_path, entered)
    records.close()
    lines = records.path.read_bytes().splitlines()
    body = entered[0][1]
    for changed in (
        [lines[0], lines[1].replace(b'"tokens":1', b'"tokens":0'), lines[2]],
        [lines[0], lines[2]],
        lines[:2],
        [lines[1], lines[0], lines[2]],
        [*lines[:2], lines[2].replace(b'"tokens":2', b'"tokens":0')],
        [b"{}", *lines[1:]],
        [b"\xff", *lines[1:]],
    ):
        with pytest.raises(Tampered):
            verify(changed, [body])


def test_a_log_that_answers_slowly_keeps_no_record_from_the_disk(tmp_path, monkeypatch):
    """It may be another machine's. Answers wait for their records, and whoever ends the gateway meanwhile must not end
    what is only in its memory; what the log is told goes no further than the head that it is told with."""
    monkeypatch.setattr(module, "_ENTRY_EVERY", 0.0)
    asked, go, entered = threading.Event(), threading.Event(), []

    def slow(ref, body):
        entered.append((ref, body))
        asked.set()
        return len(entered) if go.wait(120) else -1

    records = Records(tmp_path, slow, "5" * 64)
    try:
        records.add(dict(RECORD))
        assert asked.wait(60)
        records.add(dict(RECORD))
        asyncio.run(asyncio.wait_for(records.durable(), 60))
        lines = records.path.read_bytes().splitlines()
        assert len(lines) == 2
        assert [(body["records"], body["requests"]) for _, body in entered] == [(1, 1)]
    finally:
        go.set()
        records.close()
    assert [(body["records"], body["requests"]) for _, body in entered] == [(1, 1), (2, 1)]
    assert verify(lines, [body for _, body in entered]) == 2


def test_durable_means_on_disk(tmp_path):
    records = made(tmp_path, [], 0)

    async def one():
        records.add(RECORD)
        await records.durable()
        return records.path.read_bytes().count(b"\n")

    assert asyncio.run(one()) == 1
    records.close()


def test_an_entry_counts_what_its_chain_has_and_no_more(tmp_path, monkeypatch):
    """A record that comes while the ones before are written is in the next entry."""
    entered, first, more, written = [], threading.Event(), threading.Event(), os.fdatasync

    def sync(file):
        written(file)
        if not more.is_set():
            more.set()
            records.add(dict(RECORD))
        else:  # another thread makes the entries: of what was written before there is one by then
            assert first.wait(60)

    def append(ref, body):
        entered.append((ref, body))
        first.set()
        return len(entered)

    monkeypatch.setattr(module, "_ENTRY_EVERY", 0.0)
    records = Records(tmp_path, append, "5" * 64)
    monkeypatch.setattr(os, "fdatasync", sync)
    for k in range(3):
        records.add({**RECORD, "tokens": k})
    records.close()
    lines = [json.loads(line) for line in records.path.read_bytes().splitlines()]
    assert (len(entered), entered[-1][1]["records"]) >= (2, 4)
    for _, body in entered:
        assert body["records"] == sum(each["requests"] for _, each in entered if each["records"] <= body["records"])
    assert sum(body["bits"] for _, body in entered) == sum(each["bits"] for each in lines)


def test_refusals_are_counted(tmp_path):
    entered = []
    records = made(tmp_path, entered, 2, status=429)
    records.close()
    assert entered[0][1]["refused"] == 2


def test_a_log_that_fails_gets_it_later(tmp_path):
    entered = []
    fails = [True]

    def append(ref, body):
        if fails[0]:
            raise BackendError("database.down", "not now")
        entered.append(body)
        return 1

    records = Records(tmp_path, append, "5" * 64)
    records.add({**RECORD})
    records._enter()
    assert not entered
    fails[0] = False
    records.add({**RECORD})
    records.close()
    assert [(body["requests"], body["tokens"]) for body in entered] == [(2, 10)]


def test_a_full_disk_ends_all_answers(tmp_path, monkeypatch):
    records = made(tmp_path, [], 0)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fdatasync", full)

    async def one():
        records.add(RECORD)
        with pytest.raises(BackendError, match="No space left"):
            await records.durable()

    asyncio.run(one())
    with pytest.raises(BackendError) as caught:
        records.check()
    assert caught.value.code == "records.unwritable"
    with pytest.raises(BackendError):
        records.add(RECORD)
    records.close()


def test_a_folder_that_can_not_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BackendError) as caught:
        Records(tmp_path / "file", lambda *_: 0, "5" * 64)
    assert caught.value.code == "records.unwritable"
