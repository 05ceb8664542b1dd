"""Every command as it is used: what it prints, for people and for programs, and how it ends."""

from __future__ import annotations

import re
import stat
import sys
from pathlib import Path

import pytest

from cli.desk import Desk, environment


def flip(path: Path, offset: int) -> None:
    path.chmod(0o600)
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


# -- init --------------------------------------------------------------------------------------------------------


def test_init_prints_shares_once_and_warns(empty: Desk) -> None:
    ended = empty.run("init", "--recovery", "2of3")
    assert ended.code == 0
    shares = re.findall(r"^srshare1-\S+$", ended.out, re.MULTILINE)
    assert len(shares) == 3
    assert "kept nowhere else" in ended.err
    assert "srshare1-" not in ended.err
    assert "user/ana.example is its first principal" in ended.out
    given = "# from the safe\n" + shares[0] + "\n" + shares[2] + "\n"
    assert empty.run("recovery", "drill", given=given).code == 0
    # Nothing in the room holds a share.
    for path in empty.room.rglob("*"):
        if path.is_file():
            assert shares[0].encode() not in path.read_bytes()


def test_init_json_has_everything(empty: Desk) -> None:
    found = empty.run("init", "--recovery", "2of2", "--owner", "user/safety", "--json").json
    assert found["owner"] == "user/safety"
    assert found["recovery"] == "2of2"
    assert len(found["shares"]) == 2
    assert found["share_files"] == []
    assert re.fullmatch("[0-9a-f]{32}", found["room"])
    assert found["keystore"] == "file:keys/room.key"


def test_init_without_recovery_says_what_that_means(empty: Desk) -> None:
    ended = empty.run("init")
    assert ended.code == 0
    assert "a lost key store is a lost room" in ended.err
    assert empty.run("recovery", "drill", "nothing").code == 8


def test_init_writes_shares_for_their_holders_only(empty: Desk) -> None:
    ended = empty.run("init", "--recovery", "2of3", "--shares-dir", "shares")
    assert ended.code == 0
    assert "srshare1-" not in ended.out
    files = sorted((empty.folder / "shares").iterdir())
    assert [file.name for file in files] == ["share-1.txt", "share-2.txt", "share-3.txt"]
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--shares-dir", "shares"], "init.shares"),
        (["--recovery", "2of3", "--shares-dir", "room/shares"], "init.shares"),
        (["--recovery", "2of3", "--shares-dir", "model/config.json/x"], "init.shares"),
        (["--recovery", "3of2"], "share.bad_threshold"),
        (["--recovery", "three"], "usage.bad_value"),
        (["--owner", "ana"], "principal.malformed"),
        (["--store", "ftp://somewhere"], "store.unknown_scheme"),
        (["--keystore", "box:1"], "keystore.unknown_scheme"),
    ],
)
def test_init_refuses_and_leaves_no_room(empty: Desk, arguments: list[str], code: str) -> None:
    ended = empty.run("--json", "init", *arguments)
    assert ended.error["code"] == code
    assert ended.code == 2
    assert not (empty.room / "room.json").exists()


def test_init_takes_no_folder_that_is_in_use(desk: Desk) -> None:
    ended = desk.run("init", "--json")
    assert ended.error["code"] == "room.exists"
    assert ended.code == 2


# -- weights -----------------------------------------------------------------------------------------------------


def test_put_json(desk: Desk) -> None:
    ended = desk.run("put", "model", "acme/second", "--json", "--share", "1/4")
    found = ended.json
    assert ended.code == 0
    assert {"ref", "digest", "bytes", "stored_bytes", "segments", "positions", "files"} <= set(found)
    assert found["ref"] == "acme/second@1"
    assert re.fullmatch("sha256:[0-9a-f]{64}", found["digest"])
    assert found["files"] == ["config.json", "model.safetensors"]
    assert found["bytes"] == sum(path.stat().st_size for path in desk.model.iterdir())
    assert found["positions"] > 0
    assert found["stored_bytes"] > found["bytes"]
    assert found["unmarked"] == {"one-dimensional": 2048}


def test_put_for_people(desk: Desk) -> None:
    ended = desk.run("put", "model", "acme/third")
    assert ended.code == 0
    assert ended.out.startswith("acme/third@1 is in the room: 2 files, 1.6 MB")
    assert "without a mark: 2.0 kB one-dimensional" in ended.out
    assert "yours to remove" in ended.err
    again = desk.run("put", "model", "acme/third", "--quiet").err
    assert re.fullmatch(r"strongroom: the very same files are in the room as .*acme/third@1: .*\n", again)
    assert desk.run("ls", "acme/third").out.count("acme/third@") == 2


def test_put_says_when_nothing_is_marked(desk: Desk) -> None:
    for asked in (("--positions", "0"), ("--share", "0")):
        ended = desk.run("put", "model", "acme/bare", *asked)
        assert ended.code == 0
        assert "as you asked: what is only loaded will not name its holder; copies are stamped" in ended.err


@pytest.mark.parametrize(
    ("arguments", "code", "exit_code"),
    [
        (["nowhere", "acme/x"], "source.missing", 8),
        (["model", "Acme/X"], "ref.malformed", 2),
        (["model", "acme/x@1"], "put.numbered", 2),
        (["model", "acme/x", "--share", "0.9"], "put.share", 2),
        (["model", "acme/x", "--positions", "-1"], "put.positions", 2),
        (["model", "acme/x", "--positions", "many"], "usage.bad_value", 2),
        (["model", "acme/x", "--suite", "md5"], "usage.bad_value", 2),
        (["model", "acme/x", "--as", "user/nobody"], "principal.unknown", 4),
        (["model"], "usage.missing", 2),
    ],
)
def test_put_refuses(desk: Desk, arguments: list[str], code: str, exit_code: int) -> None:
    ended = desk.run("put", *arguments, "--json")
    assert ended.error["code"] == code
    assert ended.code == exit_code


def test_a_pickle_is_refused_and_converted(desk: Desk) -> None:
    torch = pytest.importorskip("torch")
    folder = desk.folder / "pickled"
    folder.mkdir(exist_ok=True)
    torch.save({"w": torch.ones(64, 64)}, folder / "pytorch_model.bin")
    refused = desk.run("put", "pickled", "acme/pickled", "--json")
    assert refused.error["code"] == "source.pickle"
    assert "--convert" in refused.error["hint"]
    converted = desk.run("put", "pickled", "acme/pickled", "--convert", "--json")
    assert converted.code == 0
    assert any(path.endswith(".safetensors") for path in converted.json["files"])


def test_ls(desk: Desk) -> None:
    ended = desk.run("ls", "acme/tiny")
    header, line = ended.out.splitlines()
    assert header.split() == ["REF", "STATE", "SIZE", "POSITIONS", "SINCE", "BY"]
    assert line.split()[:2] == ["acme/tiny@1", "active"]
    (found,) = desk.run("ls", "acme/tiny", "--json").json["versions"]
    assert found["ref"] == "acme/tiny@1"
    assert found["created_by"] == "user/ana"
    unknown = desk.run("ls", "acme/none", "--json")
    assert (unknown.error["code"], unknown.code) == ("weights.missing", 8)


def test_show(desk: Desk) -> None:
    ended = desk.run("show", "acme/tiny")
    assert re.search(r"^model\.safetensors +safetensors +1\.6 MB +[0-9a-f]{64}$", ended.out, re.MULTILINE)
    found = desk.run("show", "acme/tiny@1", "--json").json
    assert [file["path"] for file in found["files"]] == ["config.json", "model.safetensors"]
    missing = desk.run("show", "acme/tiny@9", "--json")
    assert missing.error["code"] == "weights.missing"
    assert missing.code == 8


def test_verify(desk: Desk) -> None:
    ended = desk.run("verify", "acme/tiny", "--deep")
    assert ended.code == 0
    assert ended.out.startswith("acme/tiny@1 is whole: ")
    assert "exactly what was put" in ended.out
    found = desk.run("verify", "acme/tiny", "--json").json
    assert found["ref"] == "acme/tiny@1"
    assert found["ok"] is True
    assert found["problems"] == []
    assert found["segments"] > 0
    assert found["bytes"] > 0


def test_verify_explains(desk: Desk) -> None:
    ended = desk.run("verify", "acme/tiny", "--explain", "--json")
    assert ended.json["ok"] is True
    assert "signature has to be the room's" in " ".join(ended.err.split())


def test_damage_is_named_and_refused(empty: Desk) -> None:
    assert empty.run("init", "--custody", "solo").code == 0
    assert empty.run("put", "model", "acme/tiny", "--positions", "0").code == 0
    pack = empty.objects()[0]
    flip(pack, 100_000)
    ended = empty.run("verify", "acme/tiny", "--json")
    assert ended.code == 6
    assert ended.json["ok"] is False
    (problem,) = ended.json["problems"]
    assert problem["kind"] == "tampered"
    assert problem["file"] == "model.safetensors"
    assert isinstance(problem["segment"], int)
    for_people = empty.run("verify", "acme/tiny")
    assert for_people.code == 6
    assert for_people.out.startswith(f"tampered: model.safetensors, segment {problem['segment']}: ")
    assert "is damaged: 1 problem" in for_people.out
    read = "import strongroom; strongroom.safe_open('acme/tiny', framework='numpy').get_tensor('layers.0.weight')"
    refused = empty.run(
        "run", "acme/tiny", "--", sys.executable, "-c", f"try:\n {read}\nexcept Exception as e: print(e.code)"
    )
    assert refused.out == "segment.tampered\n"
    flip(pack, 100_000)
    assert empty.run("verify", "acme/tiny").code == 0
    pack.unlink()
    lost = empty.run("verify", "acme/tiny", "--json")
    assert lost.code == 6
    assert {problem["kind"] for problem in lost.json["problems"]} == {"missing"}
    checked = empty.run("fsck", "--json")
    assert checked.code == 6
    assert checked.json["problems"][0]["kind"] == "missing"
    assert "missing" in empty.run("fsck").out


def test_rotate_and_shred(empty: Desk) -> None:
    assert empty.run("init").code == 0
    assert empty.run("put", "model", "acme/tiny").code == 0
    before = {path.name for path in empty.objects()}
    rotated = empty.run("rotate", "acme/tiny", "--json").json
    assert rotated["ref"] == "acme/tiny@1"
    assert rotated["revision"] == 2
    assert not before & {path.name for path in empty.objects()}
    assert empty.run("verify", "acme/tiny", "--deep").code == 0
    unconfirmed = empty.run("shred", "acme/tiny", "--confirm", "acme/tiny", "--json")
    assert unconfirmed.error["code"] == "shred.confirm"
    assert unconfirmed.error["hint"] == "strongroom shred acme/tiny@1 --confirm acme/tiny@1"
    assert empty.run("shred", "acme/tiny", "--json").error["code"] == "usage.missing"
    shredded = empty.run("shred", "acme/tiny@1", "--confirm", "acme/tiny@1")
    assert shredded.code == 0
    assert "backups" in shredded.out
    assert empty.objects() == []
    gone = empty.run("verify", "acme/tiny@1", "--json")
    assert gone.error["code"] == "weights.shredded"
    assert gone.code == 8
    assert empty.run("ls", "--json").json["versions"][0]["state"] == "shredded"


# -- principals, keys and recovery -------------------------------------------------------------------------------


def test_principals(desk: Desk) -> None:
    added = desk.run("principal", "add", "workload/eval-7", "--quiet")
    assert added.code == 0
    # Not to be missed: whoever reads this file is that workload.
    file = next(line for line in added.err.splitlines() if "private key of workload/eval-7 lies in" in line)
    assert str(desk.room.name) + "/identities/workload/eval-7.key" in file
    assert "workload/eval-7" in desk.run("principal", "ls", "--as", "user/ana").out
    listed = desk.run("principal", "ls", "--json").json["principals"]
    assert {item["path"] for item in listed} == {"user/ana", "workload/eval-7"}
    again = desk.run("principal", "add", "workload/eval-7", "--json")
    assert again.error["code"] == "principal.exists"
    assert desk.run("principal", "add", "eval", "--json").error["code"] == "principal.malformed"
    # Two principals: now it has to be said who acts.
    unsaid = desk.run("put", "model", "acme/whose", "--json")
    assert unsaid.error["code"] == "principal.ambiguous"
    assert unsaid.code == 4


def test_recovery_shares_bring_somebody_back(empty: Desk) -> None:
    assert empty.run("init", "--recovery", "2of3", "--shares-dir", "shares", "--owner", "user/olga").code == 0
    assert empty.run("principal", "add", "user/ben", "--role", "officer").code == 0
    assert empty.run("principal", "suspend", "user/olga", "--as", "user/ben").code == 0
    command = ("recovery", "reinstate", "user/olga", "--reason", "locked out")
    assert empty.run(*command, "shares/share-1.txt", "--json").error["code"] == "share.too_few"
    done = empty.run(*command, "shares/share-1.txt", "shares/share-2.txt")
    assert done.code == 0
    assert "user/olga is active, and officer" in done.out
    assert "officer, BY RECOVERY SHARES" in empty.run("log", "tail", "--as", "user/ben").out
    for told in (empty.run("status").err, empty.run("doctor").out):
        assert "recovery shares used, and nobody else has reviewed it" in told
    assert "have made user/olga an active officer" in empty.run("review", "--as", "user/olga").out
    assert "reviewed: the emergency" in empty.run("review", "--apply", "--as", "user/ben").err
    assert "recovery shares used" not in empty.run("status").err + empty.run("doctor").out


def test_key_store_is_lost_and_the_room_recovered(empty: Desk) -> None:
    assert empty.run("init", "--recovery", "2of3", "--shares-dir", "shares").code == 0
    assert empty.run("put", "model", "acme/tiny").code == 0
    rotated = empty.run("keystore", "rotate", "--json").json
    assert rotated["key_epoch"] == 2
    assert rotated["resealed"] == 1
    shown = empty.run("keystore", "show", "--json").json
    assert shown["keystore"] == rotated["keystore"]
    assert shown["sealed"] is False
    (empty.room / shown["keystore"].removeprefix("file:")).unlink()
    assert empty.run("keystore", "show", "--json").json["sealed"] is True
    assert empty.run("status").code == 0
    sealed = empty.run("verify", "acme/tiny", "--json")
    assert sealed.error["code"] == "keystore.missing"
    assert sealed.code == 7
    too_few = empty.run("recovery", "recover", "--keystore", "file:new.key", "shares/share-1.txt", "--json")
    assert too_few.error["code"] == "share.too_few"
    shares = ["shares/share-3.txt", "shares/share-1.txt"]
    assert empty.run("recovery", "drill", *shares, "--json").json == {"ok": True, "shares": 2}
    done = empty.run("recovery", "recover", "--keystore", "file:new.key", *shares)
    assert done.code == 0
    assert "the room is open again" in done.out
    assert empty.run("verify", "acme/tiny", "--deep").code == 0


def test_shares_are_never_repeated_in_errors(desk: Desk) -> None:
    share = (desk.folder / "shares" / "share-1.txt").read_text().strip()
    typo = share[:-1] + ("0" if share[-1] != "0" else "1")
    ended = desk.run("recovery", "drill", given=typo + "\n")
    assert ended.code == 2
    assert "group 22" in ended.err
    assert share[30:60] not in ended.err
    assert desk.run("recovery", "drill", given="my cat's name\n").code == 2
    assert desk.run("recovery", "drill", "--json", given="").error["code"] == "recovery.no_share"


def test_a_passphrase_opens_the_room(empty: Desk) -> None:
    right = environment(STRONGROOM_PASSPHRASE="correct horse battery staple")
    assert empty.run("init", "--keystore", "passphrase:", env=right).code == 0
    assert empty.run("keystore", "show", "--json", env=right).json["sealed"] is False
    wrong = environment(STRONGROOM_PASSPHRASE="correct horse battery stable")
    ended = empty.run("put", "model", "acme/tiny", "--json", env=wrong)
    assert ended.code == 7
    assert "horse" not in ended.out


# -- the room ----------------------------------------------------------------------------------------------------


def test_status(desk: Desk) -> None:
    found = desk.run("status", "--json").json
    assert found["sealed"] is False
    assert found["versions"] >= 1
    assert found["recovery"] == "2 of 3"
    ended = desk.run("status")
    assert ended.code == 0
    assert re.search(r"^state +unsealed$", ended.out, re.MULTILINE)


def test_doctor_ends_with_the_worst_severity(empty: Desk) -> None:
    assert empty.run("init").code == 0
    warned = empty.run("doctor", "--json")
    # A key in a file, and no recovery shares: could be better.
    assert {check["name"] for check in warned.json["checks"] if check["level"] == "warn"} >= {"recovery"}
    assert warned.json["ok"] is False
    assert warned.code == 12
    (recovery,) = (check for check in warned.json["checks"] if check["name"] == "recovery")
    # No command gives a room recovery shares later.
    assert recovery["hint"] == ""
    assert "made by init only" in recovery["message"]
    (empty.room / "keys" / "room.key").unlink()
    failed = empty.run("doctor")
    assert failed.code == 14
    assert re.search(r"^fail  key store: ", failed.out, re.MULTILINE)
    assert "→" in failed.out
    assert "→" not in empty.run("doctor", "--quiet").out


def test_fsck_finds_and_deletes_orphans(empty: Desk) -> None:
    assert empty.run("init").code == 0
    assert empty.run("put", "model", "acme/tiny").code == 0
    assert empty.run("fsck", "--json").json["ok"] is True
    orphan = empty.objects()[0].parent / ("ab" * 32)
    orphan.write_bytes(b"x" * 1000)
    found = empty.run("fsck", "--json")
    assert found.code == 0
    assert found.json["orphan_bytes"] == 1000
    assert orphan.exists()
    repaired = empty.run("fsck", "--repair")
    assert "1 object (1.0 kB) deleted" in repaired.out
    assert not orphan.exists()
    assert empty.run("verify", "acme/tiny").code == 0


def test_bench_measures(desk: Desk) -> None:
    found = desk.run("bench", "acme/tiny", "--repeat", "2", "--json", "--as", "user/ana").json
    assert found["ref"] == "acme/tiny@1"
    assert found["bytes"] > 1_500_000
    assert len(found["seconds"]) == len(found["limit_seconds"]) == 2
    assert found["gb_per_s"] > 0
    assert "GB/s" in desk.run("bench", "acme/tiny", "--repeat", "1", "--as", "user/ana").out
