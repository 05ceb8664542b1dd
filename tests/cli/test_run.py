"""``strongroom run``: what the command gets, what it does not get, and how it ends."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cli.desk import PROGRAM, TIMEOUT, Desk, environment

READ = """
import hashlib, json, strongroom
with strongroom.safe_open("acme/tiny", framework="numpy") as file:
    print(json.dumps({name: file.get_tensor(name).shape for name in file.keys()}))
"""
LOOK = """
import json, os, resource, sys
print(json.dumps({
    "environment": dict(os.environ),
    "descriptors": {n: os.readlink(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd")
                    if os.path.lexists(f"/proc/self/fd/{n}")},
    "core": resource.getrlimit(resource.RLIMIT_CORE),
    "arguments": sys.argv[1:],
}))
"""


def python(text: str, *arguments: str) -> list[str]:
    return [sys.executable, "-c", text, *arguments]


def test_the_command_reads_the_weights(desk: Desk) -> None:
    ended = desk.run("run", "acme/tiny", "--", *python(READ))
    assert ended.code == 0, ended.err
    assert json.loads(ended.out)["layers.0.weight"] == [256, 512]
    assert ended.err == ""


def test_the_command_gets_one_bundle_and_nothing_that_opens_the_room(desk: Desk) -> None:
    secrets = {
        "STRONGROOM_ROOM": str(desk.room),
        "STRONGROOM_AS": "user/ana",
        "STRONGROOM_PASSPHRASE": "correct horse battery staple",
        "STRONGROOM_NEW_PASSPHRASE": "correct horse battery staple",
        "STRONGROOM_THREADS": "1",
        "BAO_TOKEN": "token",
        "VAULT_TOKEN": "token",
        "BAO_TOKEN_PATH": "/token",
        "BAO_CLIENT_KEY": "/key",
        "VAULT_TOKEN_PATH": "/token",
        "STRONGROOM_PASSPHRASE_OLD": "correct horse battery staple",
        "UNRELATED": "kept",
    }
    ended = desk.run("run", "acme/tiny@1", "--", *python(LOOK, "--json", "--", "x"), env=environment(**secrets))
    seen = json.loads(ended.out)
    assert set(secrets) & set(seen["environment"]) == {"STRONGROOM_THREADS", "UNRELATED"}
    kind, number = seen["environment"]["STRONGROOM_GRANT"].split(":")
    assert kind == "fd"
    assert "memfd" in seen["descriptors"][number]
    # The database, the key file and the store's folder are not open in it.
    assert not [target for target in seen["descriptors"].values() if str(desk.folder) in target]
    assert seen["core"][0] == 0
    assert seen["arguments"] == ["--json", "--", "x"]


def test_a_passphrase_in_a_descriptor_is_not_passed_on(empty: Desk) -> None:
    secret = empty.folder / "passphrase"
    secret.write_text("correct horse battery staple")
    first = environment(STRONGROOM_PASSPHRASE="correct horse battery staple")
    assert empty.run("init", "--custody", "solo", "--keystore", "passphrase:", env=first).code == 0
    assert empty.run("put", "model", "acme/tiny", env=first).code == 0
    with secret.open("rb") as file:
        number = file.fileno()
        child = subprocess.run(
            [*PROGRAM, "run", "acme/tiny", "--", *python(LOOK)],
            cwd=empty.folder,
            env=environment(STRONGROOM_PASSPHRASE_FD=str(number)),
            pass_fds=[number],
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
        )
    assert child.returncode == 0, child.stderr
    seen = json.loads(child.stdout)
    assert "STRONGROOM_PASSPHRASE_FD" not in seen["environment"]
    assert str(secret) not in seen["descriptors"].values()


AGAIN = """
import os, sys
number = int(sys.argv[1])
try:
    os.lseek(number, 0, 0)
except OSError:
    pass
print(os.read(number, 100), os.readlink(f"/proc/self/fd/{number}"), file=sys.stderr if number == 1 else sys.stdout)
"""


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_passphrase_in_a_standard_descriptor_is_not_passed_on(empty: Desk, number: int) -> None:
    secret = empty.folder / "passphrase"
    secret.write_text("correct horse battery staple")
    first = environment(STRONGROOM_PASSPHRASE="correct horse battery staple")
    assert empty.run("init", "--custody", "solo", "--keystore", "passphrase:", env=first).code == 0
    assert empty.run("put", "model", "acme/tiny", env=first).code == 0
    with secret.open("r+b") as file:
        streams: dict[str, int] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        streams[("stdin", "stdout", "stderr")[number]] = file.fileno()
        child = subprocess.run(
            [*PROGRAM, "run", "acme/tiny", "--", *python(AGAIN, str(number))],
            cwd=empty.folder,
            env=environment(STRONGROOM_PASSPHRASE_FD=str(number)),
            stdin=streams["stdin"],
            stdout=streams["stdout"],
            stderr=streams["stderr"],
            text=True,
            timeout=TIMEOUT,
        )
    assert child.returncode == 0, child.stderr
    assert (child.stderr if number == 1 else child.stdout) == "b'' /dev/null\n"
    assert secret.read_text() == "correct horse battery staple"


@pytest.mark.parametrize("number", ["²", "9" * 22, "-1", "7", "200"])
def test_a_number_that_names_no_descriptor_takes_nothing_away(desk: Desk, number: str) -> None:
    # 7 is free at first, and then may be the grant's own.
    ended = desk.run("run", "acme/tiny", "--", *python(READ), env=environment(STRONGROOM_NEW_PASSPHRASE_FD=number))
    assert ended.code == 0, ended.err


def test_several_versions_and_others_denied(empty: Desk) -> None:
    assert empty.run("init", "--custody", "solo").code == 0
    for name in ("acme/one", "acme/two", "acme/three"):
        assert empty.run("put", "model", name).code == 0
    text = """
import strongroom
for ref in ("acme/one", "acme/two@1", "acme/three"):
    try:
        with strongroom.safe_open(ref, framework="numpy") as file:
            print(ref, len(list(file.keys())))
    except strongroom.errors.StrongroomError as error:
        print(ref, error.code)
"""
    ended = empty.run("run", "acme/one", "acme/two@1", "--", *python(text))
    assert ended.out.splitlines() == ["acme/one 7", "acme/two@1 7", "acme/three grant.other"]


@pytest.mark.parametrize("code", [0, 1, 6, 17])
def test_the_exit_code_is_the_commands_own(desk: Desk, code: int) -> None:
    ended = desk.run("run", "acme/tiny", "--", *python(f"raise SystemExit({code})"))
    assert (ended.code, ended.out, ended.err) == (code, "", "")


def test_a_signal_reaches_the_command(desk: Desk) -> None:
    text = "import signal, sys; print('ready', flush=True); signal.pause()"
    with subprocess.Popen(
        [*PROGRAM, "run", "acme/tiny", "--", *python(text)],
        cwd=desk.folder,
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        child.send_signal(signal.SIGTERM)
        assert child.wait(TIMEOUT) == -signal.SIGTERM


def test_a_closed_pipe_ends_the_command_as_it_would_any_other(desk: Desk) -> None:
    # Python ignores SIGPIPE; a program that strongroom starts must not inherit that.
    ended = desk.run("run", "acme/tiny", "--", "sh", "-c", "yes | head -1; grep SigIgn /proc/self/status")
    assert ended.out.startswith("y\n")
    ignored = int(ended.out.split()[-1], 16)
    assert not ignored & (1 << (signal.SIGPIPE - 1))


@pytest.mark.parametrize(
    ("arguments", "code", "exit_code"),
    [
        (["acme/tiny", "--", "no-such-program-here"], "run.command", 2),
        (["acme/tiny", "--", "."], "run.command", 2),
        (["acme/tiny", "--"], "usage.malformed", 2),
        (["acme/tiny", "python"], "usage.malformed", 2),
        (["--", "python"], "usage.missing", 2),
        (["acme/none", "--", "python"], "weights.missing", 8),
        (["acme/tiny", "--as", "user/nobody", "--", "python"], "principal.unknown", 4),
        (["Acme", "--", "python"], "ref.malformed", 2),
    ],
)
def test_an_error_before_the_command_starts_is_ours(
    desk: Desk, arguments: list[str], code: str, exit_code: int
) -> None:
    ended = desk.run("--json", "run", *arguments)
    assert ended.error["code"] == code
    assert ended.code == exit_code


def test_an_error_before_the_command_starts_is_told_from_the_commands_own(desk: Desk) -> None:
    ended = desk.run("run", "acme/none", "--", "true")
    assert ended.err.startswith("strongroom: ")
    assert ended.code == 8


def test_explain_says_what_the_command_gets(desk: Desk) -> None:
    ended = desk.run("run", "acme/tiny", "--explain", "--", "true")
    assert ended.code == 0
    assert "one key bundle for each version" in " ".join(ended.err.split())


def test_nothing_is_written_for_the_command(desk: Desk, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in desk.folder.rglob("*") if path.suffix != ".db"}
    ended = desk.run("run", "acme/tiny", "--", *python(READ), env=environment(TMPDIR=str(tmp_path)))
    assert ended.code == 0
    assert list(tmp_path.iterdir()) == []
    after = {path: path.stat().st_mtime_ns for path in desk.folder.rglob("*") if path.suffix != ".db"}
    written = {path for path in after if path.is_file() and path not in before}
    # The release is in the log, which is published; that has a few hundred bytes of each entry, and nothing of weights.
    assert {path for path in written if not path.is_relative_to(desk.room / "log" / "tile")} == set()
    weights = (desk.model / "model.safetensors").read_bytes()
    for path in written:
        data = path.read_bytes()
        assert not any(data[at : at + 16] in weights for at in range(0, len(data) - 16, 4)), path
