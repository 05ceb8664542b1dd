"""What gateways have kept, as `strongroom records` reads it: whole, or contradicted by the log."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from gateway.places import ANA, PIA, REF, Place, chat
from strongroom.cli.main import execute
from strongroom.client.records import Wanted, read
from strongroom.errors import NotFound, UsageError
from strongroom.gateway.records import Records


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
    records = Records(tmp_path, lambda ref, body: entered.append((5, body)) or 0, "5" * 64)
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
