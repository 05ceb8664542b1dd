"""What gateways have kept, as `strongroom records` reads it: whole, or contradicted by the log."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import sqlalchemy as sa

from gateway.places import ANA, PIA, REF, Place, chat
from strongroom.cli.main import execute
from strongroom.client.records import Account, Wanted, read
from strongroom.errors import NotFound, UsageError
from strongroom.gateway import records as records_module
from strongroom.gateway.records import Records
from strongroom.storage.db import Database, egress


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A room whose gateways have answered, and ended."""
    folder = tmp_path_factory.mktemp("kept")
    place = Place(folder)
    for settings in ("", "[answer]\nmax_tokens = 5000\n"):
        gateway = place.gateway(settings)
        assert [gateway.post(chat(), who)[0] for who in (ANA, ANA, PIA)] == [200] * 3
        assert gateway.post(chat(temperature=3), PIA)[0] == 400
        place.stop_gateways()
    yield place
    place.stop()


@pytest.fixture
def ask(kept, capsys):
    def one(*words: str, json_: bool = True) -> tuple[int, dict]:
        capsys.readouterr()
        code = execute(
            ["--room", str(kept.folder), "--as", "user/olga", *(["--json"] if json_ else []), "records", *words]
        )
        said = capsys.readouterr()
        return code, json.loads(said.out) if json_ else said.out + said.err

    return one


@pytest.fixture
def copied(kept, tmp_path):
    """A copy of its records, and their files."""
    shutil.copytree(kept.folder / "inference", tmp_path / "copied")
    return tmp_path / "copied", sorted((tmp_path / "copied").glob("*.jsonl"))


def test_all_that_was_answered(ask):
    code, found = ask()
    assert (code, found["ok"]) == (0, True)
    assert (found["requests"], found["refused"], found["tokens"]) == (8, 2, 18)
    assert found["bits"] == sum(each["bits"] for each in found["records"]) > 0
    assert len(found["streams"]) == 2
    for each in found["streams"]:
        assert (each["records"], each["accounted"], each["unfinished"], each["code"]) == (4, 4, 0, "")
    assert len({each["settings"][0] for each in found["streams"]}) == 2
    assert all(each["accounted"] for each in found["records"])
    assert {"n", "at", "by", "key", "ref", "route", "status", "tokens", "bits", "stream", "before"} <= found["records"][
        0
    ].keys()
    text = ask(json_=False)[1]
    assert "2 streams, 8 records: all as the log has them" in text
    (row,) = [line.split() for line in text.splitlines() if line.startswith(f"{ANA} ")]
    assert row[:5] == [ANA, REF, "4", "0", "12"]


def test_whoever_checks_the_room_is_told_of_them(kept, capsys):
    for command in (["log", "verify"], ["fsck"]):
        assert execute(["--room", str(kept.folder), "--as", "user/olga", *command]) == 0
        assert "strongroom --room" in (said := capsys.readouterr().err)
        assert " records " in said


def test_some_of_them(ask):
    assert [each["by"] for each in ask("--by", PIA)[1]["records"]] == [PIA] * 4
    assert ask("--ref", REF)[1]["requests"] == 6  # the others named none that was read
    assert ask("--ref", "acme/tiny")[1]["requests"] == 6
    assert ask("--ref", "acme/tiny@2")[1]["records"] == []
    assert ask("--since", "1h")[1]["requests"] == 8
    assert ask("--since", "2020-01-01")[1]["requests"] == 8
    assert ask("--since", "2999-01-01T00:00:00Z")[1]["requests"] == 0
    for wrong in (("--by", "ana"), ("--ref", "@"), ("--since", "soon"), ("--since", "2026-13-01")):
        assert ask(*wrong)[0] == 2


def edited(paths, change) -> None:
    lines = paths[0].read_bytes().splitlines(keepends=True)
    paths[0].write_bytes(b"".join(change(lines)))


@pytest.mark.parametrize(
    "change",
    [
        lambda lines: [lines[0].replace(b'"tokens":3', b'"tokens":1'), *lines[1:]],
        lambda lines: [*lines[:-1], lines[-1].replace(b'"by":"user/pia"', b'"by":"user/ana"')],
        lambda lines: lines[1:],
        lambda lines: lines[:-1],
        lambda lines: [*lines[:-1], lines[-1][:-1]],  # the log has it, and it is not whole
        lambda lines: [lines[1], lines[0], *lines[2:]],
        lambda lines: [*lines, lines[-1]],
        lambda lines: [*lines, b"\n"],
        lambda lines: [b"x" * (1 << 17) + b"\n", *lines],
        lambda lines: [],
    ],
)
def test_whoever_changes_a_file_is_found_out(ask, copied, change):
    folder, paths = copied
    edited(paths, change)
    code, found = ask("--records", str(folder))
    assert (code, found["ok"]) == (6, False)
    wrong = {each["stream"]: each["code"] for each in found["streams"]}
    assert wrong == {paths[0].stem: "records.tampered", paths[1].stem: ""}
    # Nobody vouches for any record of that file; for those of the other the log does.
    assert all(each["accounted"] == (each["stream"] == paths[1].stem) for each in found["records"])
    assert "NOT as the log has them" in ask("--records", str(folder), json_=False)[1]


def test_a_file_that_is_gone_could_be_elsewhere(ask, copied, tmp_path):
    folder, paths = copied
    (tmp_path / "other").mkdir()
    paths[0].rename(tmp_path / "other" / paths[0].name)
    code, found = ask("--records", str(folder))
    assert (code, [each["code"] for each in found["streams"]]) == (6, ["records.elsewhere", ""])
    assert "--records FOLDER" in ask("--records", str(folder), json_=False)[1]
    assert ask("--records", str(folder), "--records", str(tmp_path / "other"))[0] == 0
    # One that had ended before is not asked for.
    assert ask("--records", str(folder), "--since", "2999-01-01")[0] == 0
    code, found = ask("--records", str(tmp_path / "nowhere"))
    assert (code, found["error"]["code"]) == (8, "records.missing")


def test_the_file_of_another_stream_is_not_its_own(ask, copied):
    folder, paths = copied
    paths[1].write_bytes(paths[0].read_bytes())
    code, found = ask("--records", str(folder))
    assert (code, found["streams"][1]["code"]) == (6, "records.tampered")


def test_what_the_log_does_not_have_yet(tmp_path):
    """And a line that is being written."""
    entered = []
    records = Records(tmp_path, lambda ref, body: entered.append(Account(5, ref, body)) or 0, "5" * 64)
    record = {"by": ANA, "ref": REF, "status": 200, "tokens": 5, "bits": 80, "stream": records.stream}
    records.add(record)
    records._wake.set()
    records.close()
    whole = records.path.read_bytes()
    with records.path.open("ab") as file:
        file.write(b'{"at":1,"be')
    found = read(entered, [tmp_path], Wanted())
    (stream,) = found["streams"]
    assert (found["ok"], stream["records"], stream["accounted"], stream["unfinished"]) == (True, 1, 1, 11)
    records.path.write_bytes(whole)
    found = read([], [tmp_path], Wanted())  # as in the seconds before the first entry
    assert (found["ok"], found["streams"][0]["accounted"], found["records"][0]["accounted"]) == (True, 0, False)


def test_whom_and_what_there_is_no_name_for():
    for wrong in ({"by": "ana"}, {"ref": "A"}):
        with pytest.raises(UsageError):
            Wanted(**wrong)
    with pytest.raises(NotFound):
        read([], [Path("nowhere")], Wanted())


def entries_of(folder, path):
    """What a gateway enters that has written this file, and its name there."""
    entered = []
    records = Records(folder, lambda ref, body: entered.append(Account(5, ref, body)) or 0, "5" * 64)
    for line in path:
        records.add({"by": ANA, "status": 200, "tokens": 5, "bits": 80, **line})
    records.close()
    return entered


def test_sums_that_the_records_do_not_come_to(tmp_path):
    """Whoever tells the log of less than was answered can't keep records of it, and the other way round."""
    other = "acme/tiny@2"
    lines = [{"ref": REF}, {"ref": REF, "status": 100}, {"ref": REF, "status": 429}, {"ref": other}, {"ref": ""}]
    told = entries_of(tmp_path, lines)
    assert read(told, [tmp_path], Wanted())["ok"]
    for name, by in (("bits", -1), ("requests", 1), ("refused", -1), ("tokens", 7)):
        wrong = [one if one.ref != REF else one._replace(body={**one.body, name: one.body[name] + by}) for one in told]
        found = read(wrong, [tmp_path], Wanted(ref=other))  # whatever is looked for
        (stream,) = found["streams"]
        assert (found["ok"], stream["code"]) == (False, "records.sums")
        (difference,) = stream["differences"]
        assert difference["ref"] == REF
        assert difference["log"][name] == difference["records"][name] + by
        assert f"{difference['records'][name]} {name}" in stream["problem"]
        assert [each["ref"] for each in found["accounts"]] == [other]
    # Of a version of which the log has nothing, nothing is compared: it may not have been entered yet.
    assert read([one for one in told if one.ref != other], [tmp_path], Wanted())["ok"]


def test_an_account_that_came_late_is_no_difference(tmp_path, monkeypatch):
    """The log was away for a while: what could not be entered comes with the next, and the other version's before."""
    monkeypatch.setattr(records_module, "_EVERY", 3600.0)  # its threads do nothing that this test does in their place
    entered, away = [], ["acme/tiny@2"]

    def enter(ref, body):
        if ref in away:
            raise OSError
        entered.append(Account(5, ref, body))
        return 0

    records = Records(tmp_path, enter, "5" * 64)
    line = {"by": ANA, "status": 200, "tokens": 5, "bits": 80}
    for k in range(2):
        for ref in (REF, "acme/tiny@2"):
            records.add({**line, "ref": ref})
        records._write()
        records._enter()
        assert read(entered, [tmp_path], Wanted())["ok"], k
        away.clear()
    records.close()
    assert read(entered, [tmp_path], Wanted())["ok"]
    assert {each["ref"]: each["bits"] for each in read(entered, [tmp_path], Wanted())["accounts"]} == {
        REF: 160,
        "acme/tiny@2": 160,
    }


def test_an_entry_about_what_is_captured_counts_nothing(tmp_path):
    entered = []
    records = Records(tmp_path, lambda ref, body: entered.append(Account(5, ref, body)) or 0, "5" * 64)
    records.add({"by": ANA, "status": 400, "tokens": 0, "bits": 0, "ref": ""})
    records.announce("a" * 64)
    assert [each.body["requests"] for each in entered] == [0]
    assert entered[0].body["records"] == 1
    assert read(entered, [tmp_path], Wanted())["ok"]
    records.close()
    assert read(entered, [tmp_path], Wanted())["ok"]


def test_counters_that_were_set_back(kept, ask):
    found = ask()[1]
    (account,) = found["accounts"]
    assert account["counters"] >= account["bits"] == found["bits"] > 0
    assert (account["ref"], account["requests"], account["refused"]) == (REF, 6, 0)
    assert "set back" not in ask(json_=False)[1]
    database = Database.open(f"sqlite:///{kept.folder}/room.db")
    try:
        with database.counting() as tx:
            tx.execute(sa.update(egress).where(egress.c.ref == REF, egress.c.scope == "model").values(used=1))
    finally:
        database.close()
    code, text = ask(json_=False)
    assert code == 0
    assert f"the budget's counters have 1 bits of {REF}" in text
