"""A child for what nobody trusts: it gets nowhere, and whatever it says or does not say, the parent goes on."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from strongroom.core.limits import MIB
from strongroom.vault.child import Child


class Explained(Exception):
    """What the parent made of an answer."""

    def __init__(self, answer) -> None:
        super().__init__(answer)
        self.answer = answer


@pytest.fixture
def start():
    with contextlib.ExitStack() as stack:

        def started(**options):
            bounds = {"memory": 64 * MIB, "seconds": 30, "patience": 60.0, "most": MIB} | options
            child = Child("vault.talker", explain=Explained, **bounds)
            stack.callback(child.close)
            return child

        yield started


def told(child, do, **more):
    child.say({"do": do, **more})
    return child.hear("said")


def failed(child, do, **more):
    with pytest.raises(Explained) as caught:
        told(child, do, **more)
    child._process.wait(30)  # it was ended: nothing that it does is waited for
    return caught.value.answer


@pytest.mark.parametrize("value", [None, "\u2028 \ud800 ", ["x" * 3 * MIB], {"a": [1, {"b": 2}]}])
def test_values_go_both_ways(start, value):
    child = start(most=8 * MIB)
    for _ in range(3):
        assert told(child, "echo", value=value) == value


def test_several_answers_may_come_at_once_or_in_pieces(start):
    child = start()
    child.say({"do": "write", "text": '{"said": 1}\n{"said": 2}\n{"sa'})
    assert [child.hear("said"), child.hear("said")] == [1, 2]
    assert told(child, "write", text='id": 3}\n') == 3


def test_what_libraries_print_is_no_answer(start):
    assert told(start(), "chatter") == "by the child"


def test_it_has_nothing_of_the_parents_but_what_it_was_given(start, tmp_path, monkeypatch):
    monkeypatch.setenv("STRONGROOM_PASSPHRASE", "secret")
    monkeypatch.setenv("PYTHONPATH", "/nowhere")
    (tmp_path / "x").touch()
    with (tmp_path / "x").open() as given, (tmp_path / "x").open() as kept:
        os.set_inheritable(kept.fileno(), True)
        found = told(start(descriptors=(given.fileno(),)), "where")
        assert found["given"] == [given.fileno()]
        assert given.fileno() in found["descriptors"]
        assert kept.fileno() not in found["descriptors"]
    assert found["isolated"] == 1
    assert found["folder"] == "/"
    assert not {name for name in found["environment"] if "STRONGROOM" in name or "PYTHON" in name or "HOME" in name}


def test_it_reaches_nothing(start, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert told(start(), "reach", port=port, path=str(tmp_path / "x")) == ["refused"] * 3
    assert not (tmp_path / "x").exists()


def test_its_memory_is_bounded(start):
    child = start(memory=64 * MIB)
    assert told(child, "allocate", bytes=16 * MIB) == 16 * MIB
    assert failed(child, "allocate", bytes=256 * MIB) == {"error": "memory", "message": "it needs more"}


def test_its_time_is_bounded(start):
    assert failed(start(seconds=1), "spin")["error"] == "stopped"


NO_NAMESPACES = (
    "from strongroom.vault import sandbox\nassert sandbox.filter_calls()\n"  # unshare is refused inside ours
)
NO_FILTER = "import platform\nplatform.machine = lambda: 'a machine whose calls we have no table of'\n"


@pytest.mark.parametrize(
    ("before", "answer"),
    [
        (NO_NAMESPACES, {"said": 1}),
        (
            NO_NAMESPACES + NO_FILTER,
            {
                "error": "no_sandbox",
                "message": "neither a network namespace nor a system call filter is permitted here",
            },
        ),
    ],
)
def test_one_wall_is_enough_and_without_either_it_does_nothing(before, answer):
    """As in a container that forbids namespaces, and on a machine whose system calls we have no table of."""
    code = f"import sys; sys.path[:] = {sys.path!r}\n{before}\nfrom vault.talker import main\nmain(1 << 26, 30)"
    asked = '{"do": "echo", "value": 1}\n'
    done = subprocess.run([sys.executable, "-I", "-c", code], input=asked.encode(), stdout=subprocess.PIPE, check=True)
    assert json.loads(done.stdout) == answer


@pytest.mark.parametrize("do", ["exit", "sleep"])
def test_who_says_nothing_is_not_waited_for_for_ever(start, do):
    child = start()
    assert told(child, "echo", value=1) == 1  # it has begun, however long that took
    child._patience = 60 if do == "exit" else 1
    answer = failed(child, do)
    assert answer["error"] == ("stopped" if do == "exit" else "late")
    if do == "exit":
        assert "status 3" in answer["message"]


def test_who_does_not_listen_is_not_waited_for_for_ever(start):
    child = start()
    assert told(child, "echo", value=1) == 1
    child.say({"do": "sleep"})
    child._patience = 1
    with pytest.raises(Explained) as caught:
        child.say("x" * 4 * MIB)
    assert caught.value.answer["error"] == "late"


def test_who_says_too_much_is_not_heard_out(start):
    assert failed(start(most=4 * MIB), "flood") == {"error": "late", "message": "it says more than its size explains"}


@pytest.mark.parametrize(
    "line", ["", "no JSON", "[]", "3", "null", "{}", '{"other": 1}', "[" * 100_000, '{"said": 1', "\x00", "9" * 10_000]
)
def test_what_is_no_answer_is_not_taken_for_one(start, line):
    assert failed(start(), "write", text=line + "\n")["error"] == "stopped"


def test_its_own_errors_are_passed_on(start):
    line = '{"error": "refused", "message": "no", "wants": "os.system"}\n'
    assert failed(start(), "write", text=line) == {"error": "refused", "message": "no", "wants": "os.system"}


def test_who_waits_may_be_stopped(start):
    class Stopped(Exception):
        pass

    looks = []

    def check():
        looks.append(1)
        if len(looks) > 4:
            raise Stopped

    with pytest.raises(Stopped):
        told(start(check=check), "sleep")


def test_one_that_is_gone_is_noticed_by_who_speaks_to_it(start):
    child = start()
    child.say({"do": "exit"})
    child._process.wait(30)
    child.say("x" * MIB)
    with pytest.raises(Explained) as caught:
        child.hear("said")
    assert caught.value.answer["error"] == "stopped"


def test_closed_it_is_gone(start):
    child = start()
    told(child, "echo", value=1)
    child.say({"do": "spin"})
    child.close()
    assert not Path(f"/proc/{child._process.pid}").exists()
    child.close()


def test_where_there_is_no_interpreter(start, monkeypatch):
    monkeypatch.setattr(sys, "executable", "")
    with pytest.raises(Explained) as caught:
        start()
    assert caught.value.answer["error"] == "no_sandbox"
