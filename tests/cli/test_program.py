"""The program itself: help, options wherever they stand, errors in one shape, signals and pipes."""

from __future__ import annotations

import ast
import fcntl
import json
import os
import pty
import re
import shlex
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import click
import pytest

from cli.desk import PROGRAM, TIMEOUT, Desk, environment, strongroom
from strongroom import __version__, client
from strongroom.cli import init as init_module
from strongroom.cli import output
from strongroom.cli.main import COMMANDS, cli, execute
from strongroom.cli.options import Command
from strongroom.core.ids import parse_principal
from strongroom.errors import Denied, LimitExceeded, Pending

ROOT = Path(__file__).resolve().parents[2]
NAMES = [name for commands in COMMANDS.values() for name in commands]
HEAVY = {"numpy", "sqlalchemy", "obstore", "rich", "cryptography", "blake3", "torch", "transformers"}


def leaves(command: click.Command = cli, path: tuple[str, ...] = ()) -> list[tuple[str, click.Command]]:
    """Every command that does something, by its words."""
    if not isinstance(command, click.Group):
        return [(" ".join(path), command)]
    context = click.Context(command)
    found = []
    for name in command.list_commands(context):
        child = command.get_command(context, name)
        assert child is not None
        found += leaves(child, (*path, name))
    return found


LEAVES = dict(leaves())


# -- help --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], *([name, "--help"] for name in NAMES)], ids=" ".join)
def test_help_is_light(arguments: list[str], tmp_path: Path) -> None:
    text = (
        "import sys; from strongroom.cli.main import execute; code = execute(sys.argv[1:]); "
        "print('LOADED', code, *sorted(name for name in sys.modules if '.' not in name))"
    )
    child = subprocess.run(
        [sys.executable, "-c", text, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=TIMEOUT
    )
    loaded = child.stdout.rpartition("LOADED ")[2].split()
    assert loaded[0] == "0"
    assert set(loaded) & HEAVY == set()


def test_a_command_off_a_terminal_needs_no_rich(desk: Desk) -> None:
    text = "import sys; from strongroom.cli.main import execute; execute(sys.argv[1:]); print('rich' in sys.modules)"
    arguments = ["verify", "acme/tiny"]
    child = subprocess.run(
        [sys.executable, "-c", text, *arguments],
        cwd=desk.folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    assert child.stdout.splitlines()[-1] == "False"


@pytest.mark.parametrize(("name", "text"), [item for group in COMMANDS.values() for item in group.items()])
def test_the_overview_says_what_the_command_says(name: str, text: tuple[str, str]) -> None:
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    assert command.help is not None
    assert re.sub(r" (There|PATH) .*", "", " ".join(command.help.split("\n\n")[0].split())) == text[1]


@pytest.mark.parametrize("words", LEAVES)
def test_every_command_explains_itself_and_takes_the_shared_options(words: str) -> None:
    command = LEAVES[words]
    assert isinstance(command, Command)
    assert len(command.explain) > 40
    assert command.help
    assert {"room", "principal", "json", "explain", "quiet"} <= {param.name for param in command.params}


@pytest.mark.parametrize("words", LEAVES)
def test_every_command_is_in_the_reference(words: str) -> None:
    assert f"strongroom {words}" in (ROOT / "docs" / "reference" / "commands.md").read_text(encoding="utf-8")


def test_version_and_no_command(tmp_path: Path) -> None:
    assert strongroom("--version", cwd=tmp_path).out == f"strongroom {__version__}\n"
    bare = strongroom(cwd=tmp_path)
    assert bare.code == 2
    assert "Start here" in bare.err
    assert strongroom("--json", cwd=tmp_path).error["hint"] == "strongroom --help"
    assert strongroom("--json", "principal", cwd=tmp_path).error["code"] == "usage.no_command"
    assert "add" in strongroom("principal", cwd=tmp_path).err


def test_shells_complete_commands_without_a_room(tmp_path: Path) -> None:
    asked = environment(_STRONGROOM_COMPLETE="bash_complete", COMP_WORDS="strongroom ver", COMP_CWORD="1")
    assert strongroom(cwd=tmp_path, env=asked).out == "plain,verify\n"


# -- what the documents and hints say ----------------------------------------------------------------------------


def commands_in(path: Path) -> list[str]:
    """The command lines of a Markdown file's code blocks."""
    lines: list[str] = []
    inside = False
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.lstrip().startswith("```"):
            inside = not inside
        elif inside and (match := re.match(r"\s*(?:\$ )?(strongroom .*)", line)):
            lines.append(re.split(r"\s{2,}|\s#", match[1])[0])
    return lines


def parse(line: str) -> None:
    """Let click parse a command line, and run nothing."""
    words = shlex.split(line)[1:]
    command: click.Command = cli
    context = cli.make_context("strongroom", list(words))
    while isinstance(command, click.Group):
        _, found, words = command.resolve_command(context, [*context._protected_args, *context.args])
        assert found is not None
        command = found
        context = command.make_context(str(command.name), list(words), parent=context)


def documents() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def test_the_readme_shows_commands() -> None:
    assert len(commands_in(ROOT / "README.md")) >= 3


@pytest.mark.parametrize("path", documents(), ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_in_the_documents_parse(path: Path) -> None:
    for line in commands_in(path):
        try:
            parse(line)
        except click.ClickException as error:
            pytest.fail(f"{path.relative_to(ROOT)}: {line}: {error.format_message()}")


def test_a_wrong_command_in_a_document_is_noticed() -> None:
    for line in ("strongroom lock room", "strongroom put --fast model acme/tiny", "strongroom run acme/tiny python"):
        with pytest.raises(click.ClickException):
            parse(line)


def hints() -> list[tuple[str, str]]:
    """Every text in the sources that begins with a command, such as a hint."""
    found = []
    for path in sorted((ROOT / "src").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                text = "".join(str(part.value) if isinstance(part, ast.Constant) else "X" for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                text = node.value
            else:
                continue
            matches = re.finditer(r"(?:^|→ |`)(strongroom (?:--room X )?[a-z]+ ?[^,;`]*)", text)
            found.extend((f"{path.name}:{node.lineno}", match[1]) for match in matches)
    return found


@pytest.mark.parametrize(("place", "hint"), hints())
def test_hints_name_commands_that_exist(place: str, hint: str) -> None:
    words = hint.replace("--room X ", "").split()[1:]
    known = [name for name in LEAVES if words[: len(name.split())] == name.split()]
    groups = {name.split()[0] for name in LEAVES if " " in name}
    if not known:
        assert words[:1] == ["run"] or words[0] in groups | {"X"}, f"{place}: {hint}"
        return
    options = {option for param in LEAVES[known[0]].params for option in param.opts}
    assert {word for word in words if word.startswith("--") and word != "--"} <= options | {"--help"}, place


# -- options -----------------------------------------------------------------------------------------------------


def test_shared_options_stand_anywhere(desk: Desk, tmp_path: Path) -> None:
    room = str(desk.room)
    before = strongroom("--json", "--room", room, "ls", cwd=tmp_path)
    behind = strongroom("ls", "--room", room, "--json", cwd=tmp_path)
    nested = strongroom("principal", "--room", room, "ls", "--json", cwd=tmp_path)
    named = strongroom("ls", "--json", cwd=tmp_path, env=environment(STRONGROOM_ROOM=room))
    url = strongroom("--room", f"file://{room}", "ls", "--json", cwd=tmp_path)
    assert before.json == behind.json == named.json == url.json
    assert nested.json["principals"][0]["path"] == "user/ana"
    # The last word counts.
    assert strongroom("--room", "nowhere", "ls", "--room", room, "--json", cwd=tmp_path).json == before.json
    assert strongroom("ls", "--json", cwd=desk.folder).json == before.json


@pytest.mark.parametrize(
    ("arguments", "code", "exit_code"),
    [
        (["ls"], "room.missing", 8),
        (["ls", "--room", "https://custodian.example"], "card.missing", 8),
        (["ls", "--room", "http://custodian.example"], "room.not_a_folder", 2),
        (["lock"], "usage.unknown_command", 2),
        (["ls", "--sideways"], "usage.unknown_option", 2),
        (["ls", "a", "b"], "usage.malformed", 2),
        (["principal", "promote"], "usage.unknown_command", 2),
    ],
)
def test_errors_have_one_shape(tmp_path: Path, arguments: list[str], code: str, exit_code: int) -> None:
    machine = strongroom(*arguments, "--json", cwd=tmp_path)
    assert machine.error["code"] == code
    assert machine.error["hint"]
    assert machine.code == exit_code
    assert machine.err == ""
    person = strongroom(*arguments, cwd=tmp_path)
    assert person.code == exit_code
    assert person.out == ""
    assert person.err.startswith("strongroom: ")
    assert f"[{code}]" in person.err
    assert "\n  → " in person.err


@pytest.mark.parametrize("kind", [Denied, Pending, LimitExceeded])
def test_exit_codes_come_from_the_error(
    kind: type[Denied], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], desk: Desk
) -> None:
    def refuse(self: client.Room, name: str | None = None) -> None:
        raise kind("x.y", "no", hint="later", who="user/ana", count=2)

    monkeypatch.setattr(client.Room, "ls", refuse)
    assert execute(["ls", "--room", str(desk.room), "--json"]) == kind.exit_code
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["evidence"] == {"who": "user/ana", "count": 2}
    assert error["exit_code"] == kind.exit_code


def test_a_fault_of_ours_is_short_unless_asked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], desk: Desk
) -> None:
    def fail(self: client.Room, name: str | None = None) -> None:
        raise RuntimeError("wires crossed")

    monkeypatch.setattr(client.Room, "ls", fail)
    assert execute(["ls", "--room", str(desk.room)]) == 1
    short = capsys.readouterr().err
    assert short.startswith("strongroom: RuntimeError: wires crossed [unexpected.error]")
    assert "Traceback" not in short
    monkeypatch.setenv("STRONGROOM_TRACEBACK", "1")
    assert execute(["ls", "--room", str(desk.room), "--json"]) == 1
    long = capsys.readouterr()
    assert "Traceback" in long.err
    assert json.loads(long.out)["error"]["code"] == "unexpected.error"


# -- signals and pipes -------------------------------------------------------------------------------------------


def test_interrupted(desk: Desk) -> None:
    with subprocess.Popen(
        [*PROGRAM, "recovery", "drill"],
        cwd=desk.folder,
        env=environment(PYTHONUNBUFFERED="1"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as child:
        assert child.stdin is not None
        child.stdin.write("srshare1-\n")
        child.stdin.flush()
        wait_until_read(child.stdin.fileno())
        child.send_signal(signal.SIGINT)
        out, err = child.communicate(timeout=TIMEOUT)
    assert child.returncode == 130
    assert out == ""
    assert err.startswith("strongroom: interrupted")


def wait_until_read(pipe: int) -> None:
    """Until the other side has taken everything out of the pipe, and so waits for more."""
    deadline = time.monotonic() + TIMEOUT
    while struct.unpack("i", fcntl.ioctl(pipe, termios.FIONREAD, bytes(4))) != (0,):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_reader_that_goes_away_is_no_fault(desk: Desk) -> None:
    read, write = os.pipe()
    os.close(read)
    with subprocess.Popen(
        [*PROGRAM, "ls"], cwd=desk.folder, env=environment(), stdout=write, stderr=subprocess.PIPE, text=True
    ) as child:
        os.close(write)
        _, err = child.communicate(timeout=TIMEOUT)
    assert child.returncode == 141
    assert err == ""


def test_a_terminal_shows_a_bar_and_stdout_stays_clean(desk: Desk) -> None:
    ours, theirs = pty.openpty()
    child = subprocess.run(
        [*PROGRAM, "verify", "acme/tiny"],
        cwd=desk.folder,
        env=environment(TERM="xterm"),
        stdout=subprocess.PIPE,
        stderr=theirs,
        text=True,
        timeout=TIMEOUT,
    )
    os.close(theirs)
    shown = os.read(ours, 1 << 16).decode()
    os.close(ours)
    assert child.returncode == 0
    assert "verify acme/tiny" in shown
    assert "\x1b[" in shown
    assert child.stdout.startswith("acme/tiny@1 is whole")
    assert "\x1b" not in child.stdout


def test_progress_counts_bytes_over_the_whole_job(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter([0.0, 1.0, 2.5, 3.0, 8.0])
    monkeypatch.setattr(output.time, "monotonic", lambda: next(clock))
    with output.Output().progress("put x") as progress:
        for done in (1, 25, 30, 80):
            progress(done * 10**6, 10**8)
    assert capsys.readouterr().err.splitlines() == [
        "put x: 25 % (25.0 MB of 100.0 MB, 10.0 MB/s)",
        "put x: 80 % (80.0 MB of 100.0 MB, 10.0 MB/s)",
    ]


def test_quiet_progress_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with output.Output(quiet=True).progress("put x") as progress:
        progress(1, 2)
    assert capsys.readouterr().err == ""


# -- text --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1.0 kB"),
        (269_060_552, "269.1 MB"),
        (2e9, "2.0 GB"),
        (3e15, "3000.0 TB"),
    ],
)
def test_sizes(count: float, text: str) -> None:
    assert output.size(count) == text


def test_tables_are_aligned() -> None:
    assert output.table(("A", "N"), [("long", "1"), ("x", "22")], right=(1,)) == ["A      N", "long   1", "x     22"]
    assert output.facts([("a", 1), ("long", 2)]) == ["a     1", "long  2"]


@pytest.mark.parametrize(
    ("login", "owner"),
    [
        ("ana", "user/ana"),
        ("Ana Müller", "user/ana-m-ller"),
        ("..x..y", "user/x.y"),
        ("", "user/owner"),
        ("ÄÖ", "user/owner"),
    ],
)
def test_the_default_owner_fits_the_grammar(login: str, owner: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(init_module.getpass, "getuser", lambda: login)
    assert init_module.default_owner() == owner
    assert parse_principal(owner) == owner
