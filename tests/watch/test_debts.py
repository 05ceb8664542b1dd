"""What answers had beyond all that was drawn is charged once, whenever and however their worker ends."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from strongroom.errors import BackendError, Tampered
from strongroom.watch.counters import Counters, Key
from strongroom.watch.debts import Debts
from strongroom.watch.drawing import OwnCounters
from strongroom.watch.rules import Rule, Spender
from watch.budgets import ANA, BEN, NOON, REF, ROOM, Desk

DAY = 86_400
TODAY = NOON - NOON % DAY
MINE = Key("identity", "day", TODAY, "user/ana", REF)


@pytest.fixture
def desk(tmp_path):
    made = Desk(f"sqlite:///{tmp_path}/room.db")
    yield made
    made.db.close()


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "records"


def files(folder):
    return sorted(folder.glob("*")) + sorted(folder.glob(".*"))


def killed(desk, folder, step):
    """What `budgets.owe` has said until it was killed: bits, and whether the end of the answer went out."""
    code = f"from watch.budgets import owe; owe({desk.url!r}, {str(folder)!r}, {step!r})"
    here = Path(__file__).parents[1]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here), *filter(None, [os.environ.get("PYTHONPATH")])])}
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, env=env, text=True, timeout=120)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    granted, *given = ended.stdout.split() or ["0"]
    return int(granted), bool(given)


@pytest.mark.parametrize(
    ("step", "given"),
    [
        ("before it is on disk", False),
        ("half of it is on disk", False),
        ("before it is sent", True),
        ("the answer is lost", True),
        ("before the file is emptied", True),
        ("it is charged", True),
    ],
)
def test_who_kills_a_worker_has_nothing_for_nothing(desk, folder, step, given):
    granted, went_out = killed(desk, folder, step)
    assert went_out is given
    drawn = desk.used("identity", "day", "user/ana")
    debts = Debts(folder, ROOM)
    worker = desk.worker(debts=debts)
    worker.reserve(BEN, REF, 1)  # anybody's: nothing is drawn while something is owed
    assert worker.owed == 0
    assert desk.used("identity", "day", "user/ana") == (granted if given else drawn)
    assert desk.used("model", "hour") >= (granted if given else 0)
    debts.close()
    assert files(folder) == []


def test_an_alarm_that_is_passed_by_what_was_taken_over_is_sounded(desk, folder):
    one = Debts(folder, ROOM)
    one.add({Key("team", "day", TODAY, "team/red", REF): 90_000})
    one.close()
    worker = desk.worker((Rule("team", "day", 0.01),), debts=Debts(folder, ROOM))
    worker.pay()
    worker.reserve(ANA, REF, 1)
    assert [each.percent for each in desk.alarms] == [50, 80]


@pytest.mark.parametrize("step", ["before it is sent", "the answer is lost", "before the file is emptied"])
def test_a_worker_that_is_killed_while_it_pays_for_one_that_was_killed(desk, folder, step):
    granted, _ = killed(desk, folder, step)
    for _ in range(2):
        assert killed(desk, folder, step) == (0, False)  # before anything of its own
    debts = Debts(folder, ROOM)
    desk.worker(debts=debts).pay()
    assert desk.used("identity", "day", "user/ana") == granted
    debts.close()
    assert files(folder) == []


def test_after_a_month_whoever_pays_again_is_charged_again_and_not_before(desk):
    table, key = OwnCounters(desk.db), Key("model", "lifetime", 0, "", REF)
    for days, used in ((0, 5), (0, 5), (29, 5), (31, 10)):
        now = int(NOON + days * DAY)
        table.give_back(now, {}, forget=True)
        table.pay(now, "5d" * 16, {key: 5})
        assert desk.used("model", "lifetime") == used, days


def test_of_a_folder_that_was_copied_all_is_charged_once(desk, folder):
    granted, _ = killed(desk, folder, "before it is sent")
    copies = [folder.with_name(f"copy {number}") for number in range(3)]
    for each in copies:
        shutil.copytree(folder, each)
    workers = [desk.worker(debts=Debts(each, ROOM)) for each in copies]
    threads = [threading.Thread(target=worker.pay) for worker in workers]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert [worker.owed for worker in workers] == [0, 0, 0]
    assert desk.used("identity", "day", "user/ana") == granted


def test_of_many_that_start_together_one_takes_it_over(desk, folder):
    killed(desk, folder, "before it is sent")
    start, found = threading.Barrier(6), []

    def take():
        start.wait()
        found.append(Debts(folder, ROOM))

    threads = [threading.Thread(target=take) for _ in range(6)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert sorted(each.owed > 0 for each in found) == [False] * 5 + [True]
    assert len(files(folder)) == 1
    for each in found:
        each.close()
    assert len(files(folder)) == 1  # nobody has paid it


def test_what_a_worker_that_runs_owes_is_its_own_and_what_another_room_is_owed_too(folder):
    one, other = Debts(folder, ROOM), Debts(folder, "ab" * 16)
    for each in (one, other):
        each.add({MINE: 500})
        each.write()
    assert len(files(folder)) == 2
    assert Debts(folder, ROOM).owed == 0
    one.close()
    other.close()
    two = Debts(folder, ROOM)
    assert two.owed == 500
    paid = []
    two.settle(lambda asked, bits: paid.append((asked, bits)))
    assert [bits for _, bits in paid] == [{MINE: 500}]
    two.close()
    (left,) = files(folder)
    assert left.name.startswith("ab" * 16)


def test_no_file_is_made_for_a_worker_that_owes_nothing(desk, folder):
    debts = Debts(folder, ROOM)
    worker = desk.worker(debts=debts)
    for _ in range(10):
        worker.reserve(ANA, REF, 100).settle(50)
    assert not folder.exists()
    debts.close()


def test_more_than_a_custodian_takes_at_once_is_owed_in_parts():
    debts, paid = Debts(), []
    many = {MINE._replace(who=f"user/u{number}"): 1 for number in range(2500)}
    debts.add({**many, MINE: (2 << 32) + 5})
    debts.settle(lambda asked, bits: paid.append((asked, bits)))
    assert len({asked for asked, _ in paid}) == len(paid)
    assert all(len(bits) <= 1000 and max(bits.values()) <= 1 << 32 for _, bits in paid)
    assert sum(sum(bits.values()) for _, bits in paid) == 2500 + (2 << 32) + 5
    assert debts.owed == 0


GOOD = {"asked": "5d" * 16, "bits": [[*MINE, 5]]}


@pytest.mark.parametrize(
    "line",
    [
        b"no JSON",
        b"{}",
        b'{"asked":"5d5d","bits":[]}',
        json.dumps(GOOD).encode(),  # not as it is written
        *(
            json.dumps({**GOOD, **more}, separators=(",", ":"), sort_keys=True).encode()
            for more in (
                {"back": []},
                {"asked": "x" * 32},
                {"bits": []},
                {"bits": 5},
                {"bits": [[*MINE]]},
                {"bits": [[*MINE, 0]]},
                {"bits": [[*MINE, -5]]},  # would give back
                {"bits": [[*MINE, True]]},
                {"bits": [[*MINE, (1 << 32) + 1]]},
                {"bits": [["clock", "", 0, "", "", 5]]},  # time itself
                {"bits": [["paid", "day", TODAY, "", REF, 5]]},
                {"bits": [["identity", "day", TODAY + 1, "user/ana", REF, 5]]},
                {"bits": [["identity", "day", 1 << 50, "user/ana", REF, 5]]},
                {"bits": [["identity", "day", TODAY, "user/ana", "@", 5]]},
                {"bits": [[*MINE, 5]] * 1001},
                {"bits": [[*MINE, 5000], [*MINE, 5]]},
            )
        ),
    ],
)
def test_a_file_that_somebody_has_written_to_ends_the_start_and_is_kept(folder, line):
    folder.mkdir()
    path = folder / f"{ROOM}.{'0' * 32}.owed"
    path.write_bytes(line + b"\n")
    with pytest.raises(Tampered) as caught:
        Debts(folder, ROOM)
    assert caught.value.code == "budget.owed"
    assert f"line 1 of {path}" in caught.value.message
    assert path.name in caught.value.hint
    assert path.read_bytes() == line + b"\n"
    path.rename(path.with_name(path.name + ".kept"))  # as the hint says
    assert Debts(folder, ROOM).owed == 0


def test_what_can_not_be_written_is_charged_and_nothing_more_is_answered(desk, tmp_path):
    in_the_way = tmp_path / "file"
    in_the_way.touch()
    debts = Debts(in_the_way / "records", ROOM)
    worker = desk.worker(debts=debts)
    debts.check()
    late = []
    assert worker.reserve(ANA, REF, 10).settle(50_000, pay=late.append)
    with pytest.raises(BackendError) as caught:
        debts.written().result()
    assert caught.value.code == "records.unwritable"
    with pytest.raises(BackendError):
        debts.check()
    late[0]()
    assert worker.owed == 0
    assert desk.used("identity", "day", "user/ana") == 50_000
    debts.close()


@pytest.mark.parametrize("made", ["a link", "a pipe", "a folder", "a socket"])
def test_what_is_no_file_of_a_worker_ends_the_start_and_nobody_waits_for_it(folder, tmp_path, monkeypatch, made):
    folder.mkdir()
    monkeypatch.chdir(folder)  # the name of a socket is short
    (tmp_path / "else").write_bytes(b"")
    path = folder / f"{ROOM}.{'0' * 32}.owed"
    with socket.socket(socket.AF_UNIX) as end:
        match made:
            case "a link":
                path.symlink_to(tmp_path / "else")
            case "a pipe":
                os.mkfifo(path)
            case "a folder":
                path.mkdir()
            case "a socket":
                end.bind(path.name)
        with pytest.raises(Tampered) as caught:
            Debts(folder, ROOM)
    assert caught.value.code == "budget.owed"
    assert path.name in caught.value.hint
    assert (tmp_path / "else").exists()


def test_a_huge_file_is_not_read_into_memory(folder):
    folder.mkdir()
    with (folder / f"{ROOM}.{'0' * 32}.owed").open("wb") as file:
        file.truncate(64 << 30)  # a hole
    with pytest.raises(Tampered):
        Debts(folder, ROOM)


def test_a_folder_that_can_not_be_read_is_not_taken_for_an_empty_one(folder, monkeypatch):
    one = Debts(folder, ROOM)
    one.add({MINE: 500})
    one.close()

    def fails(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patch:
        for name in ("listdir", "scandir"):  # whichever it is that a folder is read with
            patch.setattr(os, name, fails)
        with pytest.raises(BackendError) as caught:
            Debts(folder, ROOM)
    assert caught.value.code == "records.unwritable"
    assert Debts(folder, ROOM).owed == 500


def test_who_did_not_start_leaves_what_it_had_taken_over(folder):
    one = Debts(folder, ROOM)
    one.add({MINE: 500})
    one.close()
    bad = folder / f"{ROOM}.{'g' * 32}.owed"  # after all others
    bad.write_bytes(b"no debt\n")
    with pytest.raises(Tampered) as caught:
        Debts(folder, ROOM)
    assert caught.value is not None  # with the frames that have what did not start
    bad.unlink()
    assert Debts(folder, ROOM).owed == 500


def test_who_starts_again_and_again_on_a_full_disk_leaves_no_files(folder, monkeypatch):
    one = Debts(folder, ROOM)
    one.add({MINE: 500})
    one.close()
    before = files(folder)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        for _ in range(3):
            with pytest.raises(BackendError):
                Debts(folder, ROOM)
    assert files(folder) == before
    assert Debts(folder, ROOM).owed == 500


def test_identifiers_of_debts_are_no_budget_and_forgotten_in_time(desk, folder):
    worker = desk.worker(debts=Debts(folder, ROOM))
    worker.reserve(Spender("user/ana", "10.0.0.0/24"), REF, 10).settle(50_000)

    def known():
        with desk.db.reading() as tx:
            return tx.exec_driver_sql("SELECT count(*) FROM egress WHERE scope = 'paid'").scalar_one()

    assert known() == 1
    assert {each["scope"] for each in desk.report()["budgets"]} == {"identity", "destination", "model", "everybody"}
    desk.now += 29 * DAY
    worker.tend()
    assert known() == 1
    desk.now += 2 * DAY
    worker.tend()
    assert known() == 0
    assert [key for key, _ in Counters(desk.db).look(int(desk.now), {""})[1]] == []
