"""What is in the database or on the command line is shown, and not obeyed by the terminal."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing

import pytest

from cli.desk import Desk, environment
from strongroom.cli.output import Output, facts, printable, table
from strongroom.errors import NotFound

EVIL = "\x1b]0;pwned\x07\x1b[2J\x9b31mFAKE\u202e\udc80"
SHOWN = r"\x1b]0;pwned\x07\x1b[2J\x9b31mFAKE\u202e\udc80"


def test_only_what_can_be_seen_is_printed_as_it_is() -> None:
    plain = "→ ärger · 東京\n\tx"
    assert printable(plain) == plain
    assert printable(EVIL) == SHOWN
    assert printable("a\rb\x00\x7f\U000e0001") == r"a\rb\x00\x7f\U000e0001"


@pytest.mark.parametrize("method", ["say", "note", "warn", "heading"])
def test_every_line_for_people_goes_through_it(method: str, capsys: pytest.CaptureFixture[str]) -> None:
    getattr(Output(), method)(EVIL)
    Output().answer({}, [EVIL])
    Output().error(NotFound("x.y", EVIL, hint=EVIL))
    out, err = capsys.readouterr()
    assert (out + err).count(SHOWN) == 4
    assert not set(out + err) & set("\x1b\x07\x9b\u202e\udc80")


def test_json_escapes_it_and_stays_json(capsys: pytest.CaptureFixture[str]) -> None:
    Output(json=True).answer({"name": EVIL, "place": "Zürich 東京 \U0001f512 \U000e0001\n"})
    text = capsys.readouterr().out
    assert text.rstrip("\n").isprintable()
    assert "Zürich 東京 \U0001f512" in text
    assert json.loads(text) == {"name": EVIL, "place": "Zürich 東京 \U0001f512 \U000e0001\n"}


def test_a_cell_makes_no_row_of_its_own() -> None:
    assert table(("A", "B"), [("x\ny", "z")]) == ["A     B", r"x\ny  z"]
    assert facts([("room", "x\nstate  unsealed")]) == [r"room  x\nstate  unsealed"]


@pytest.mark.parametrize(
    ("statement", "commands"),
    [
        ("update versions set created_by = ?", [["ls"]]),
        ("update log_private set value = ?", [["log", "show", "3"], ["log", "tail"]]),
        (
            "update log_entries set entry = cast(? as blob)",
            [["principal", "ls"], ["log", "tail"], ["log", "show", "1"]],
        ),
        ("update log_state set checkpoint = cast(? as blob)", [["principal", "ls"], ["log", "verify"], ["status"]]),
        ("update documents set data = cast(? as blob)", [["policy", "show"], ["who", "acme/tiny"]]),
        ("update versions set name = 'acme/' || ?", [["ls"], ["fsck"], ["status"]]),
        ("update room set keystore_uri = 'file:' || ?", [["status"], ["doctor"], ["keystore", "show"]]),
    ],
)
def test_rows_that_somebody_else_wrote(empty: Desk, statement: str, commands: list[list[str]]) -> None:
    evil = EVIL.replace("\udc80", "")
    assert empty.run("init").code == 0
    assert empty.run("put", "model", "acme/tiny").code == 0
    assert empty.run("run", "acme/tiny", "--", "true").code == 3  # entry 3: what was refused is kept beside it
    with closing(sqlite3.connect(empty.room / "room.db")) as database, database:
        assert database.execute(statement, (evil,)).rowcount
    for command in commands:
        for arguments in (command, [*command, "--json"]):
            ended = empty.run(*arguments)
            assert not set(ended.out + ended.err) & set(evil[:1] + "\x07\x9b\u202e"), arguments


def test_the_command_line_is_echoed_the_same_way(empty: Desk) -> None:
    ended = empty.run("--room", f"x{EVIL[:-1]}", "ls", env=environment())
    assert ended.code == 8
    assert SHOWN[:12] in ended.err
    assert "\x1b" not in ended.err


@pytest.mark.parametrize(
    ("hint", "shown"),
    [
        ("strongroom log verify", "strongroom --room r --as user/a log verify"),
        ("strongroom --as user/b requests", "strongroom --room r --as user/b requests"),
        ("whoever may approve it: strongroom approve 1", "whoever may approve it: strongroom --room r approve 1"),
        ("ask whom strongroom knows", "ask whom strongroom knows"),
        ("where the room is: strongroom serve --crl FILE", "where the room is: strongroom serve --crl FILE"),
        ("strongroom trust card.json", "strongroom trust card.json"),
    ],
)
def test_hints_keep_the_room_and_one_s_own_also_the_name(capsys, hint, shown):
    Output(json=False, given={"--room": "r", "--as": "user/a"}).note(f"  → {hint}")
    assert capsys.readouterr().err == f"  → {shown}\n"
