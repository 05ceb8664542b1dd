"""A process of its own for what nobody trusts, and both ends of the talk with it.

Pickles, tokenizers and chat templates are programs of whoever made them. They run in a child without network, that can
write no file and start no program, with bounded memory and time (`sandbox`), and of which the parent believes nothing:
an answer may be late, too long, or none. Lines of JSON go both ways.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NoReturn

from strongroom.core.limits import MIB
from strongroom.vault import sandbox

_BOOTSTRAP = (
    "import importlib, json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "importlib.import_module(sys.argv[2]).main(*map(int, sys.argv[3:]))"
)
_ENVIRONMENT = {
    **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS"), "1"),
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "LANG": "C.UTF-8",
}
_LOOK = 1.0  # seconds between two looks at whether the parent's own work still goes on

Answer = Mapping[str, Any]


def unhurried() -> None:
    """Nothing to look at while a child is waited for."""


class Child:
    """The parent's end. Starts `module`, whose ``main`` is called with `descriptors`, which it inherits, `memory` and
    `seconds`; `close` ends it.

    `memory`: bytes beyond what its libraries take. `seconds`: of the processor, for all that it does. `patience`:
    seconds that one line may take, in either direction. `most`: bytes of a line. `explain` makes the error to raise of
    an answer that is not what was asked for, by its ``error``: the child's own, or "late", "stopped" or "no_sandbox",
    each with a ``message``. `check` is called about once a second of waiting, and may raise.
    """

    def __init__(
        self,
        module: str,
        *,
        memory: int,
        seconds: int,
        patience: float,
        most: int,
        explain: Callable[[Answer], Exception],
        descriptors: Sequence[int] = (),
        check: Callable[[], None] = unhurried,
    ) -> None:
        self._patience, self._most, self._explain, self._check = patience, most, explain, check
        self._pending = bytearray()
        if not sys.executable:
            raise explain({"error": "no_sandbox", "message": "there is no Python interpreter to start for it"})
        # Isolated mode keeps the environment and the working directory out of the child's imports; what it may import
        # is what this process may.
        paths = [path for path in sys.path if Path(path).is_absolute()]
        libraries = {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-I", "-B", "-c", _BOOTSTRAP, json.dumps(paths), module),
                *map(str, (*descriptors, memory, seconds)),
            ],
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=libraries | _ENVIRONMENT,
            cwd="/",
            pass_fds=descriptors,
        )
        assert self._process.stdin is not None  # noqa: S101 - both are pipes
        assert self._process.stdout is not None  # noqa: S101
        self._stdin: IO[bytes] = self._process.stdin
        self._stdout: IO[bytes] = self._process.stdout
        os.set_blocking(self._stdin.fileno(), False)  # one that does not read must not stop the parent

    def say(self, value: Any) -> None:
        """Send one value."""
        left = memoryview(json.dumps(value).encode() + b"\n")
        until = time.monotonic() + self._patience
        with contextlib.suppress(BrokenPipeError):  # then there is no answer either, which `hear` reports
            while left:
                if self._ready(until, writing=True):
                    left = left[os.write(self._stdin.fileno(), left[:MIB]) :]

    def hear(self, key: str) -> Any:
        """The value of `key` in the next answer; what `explain` makes of any other answer, and of none."""
        try:
            answer = json.loads(self._line())
        except (ValueError, RecursionError):
            answer = None
        if not isinstance(answer, dict) or (key not in answer and "error" not in answer):
            self._fail("stopped", "what it says is no answer")
        if key not in answer:
            self._process.kill()
            raise self._explain(answer)
        return answer[key]

    def close(self) -> None:
        self._process.kill()
        self._stdin.close()
        self._stdout.close()
        self._process.wait()

    def _line(self) -> bytes:
        until = time.monotonic() + self._patience
        seen = 0
        while (end := self._pending.find(b"\n", seen)) < 0:
            seen = len(self._pending)
            if seen > self._most:
                self._fail("late", "it says more than its size explains")
            if self._ready(until):
                piece = os.read(self._stdout.fileno(), MIB)
                if not piece:
                    self._fail("stopped", f"the process was stopped (status {self._process.wait()})")
                self._pending += piece
        line = bytes(self._pending[:end])
        del self._pending[: end + 1]
        return line

    def _ready(self, until: float, *, writing: bool = False) -> bool:
        """Whether the pipe is, after a while."""
        self._check()
        left = until - time.monotonic()
        if left <= 0:
            self._fail("late", "it takes longer than its size explains")
        pipes = ([], [self._stdin]) if writing else ([self._stdout], [])
        return any(select.select(*pipes, [], min(left, _LOOK)))

    def _fail(self, error: str, message: str) -> NoReturn:
        self._process.kill()
        raise self._explain({"error": error, "message": message})


class Confined:
    """The child's end, to be made before any library that starts threads: only a process with one may leave the
    network."""

    def __init__(self) -> None:
        self._answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)  # whatever libraries print must not look like an answer
        sandbox.die_with_parent()
        self._apart = sandbox.leave_network()

    def enter(self, *, memory: int, seconds: int) -> bool:
        """Give up the rest, when the libraries are there and before anything is read; False, and the parent is told,
        where neither wall against the network can be had."""
        sandbox.limit(memory=memory, cpu_seconds=seconds)
        if sandbox.filter_calls() or self._apart:
            return True
        self.answer(
            error="no_sandbox", message="neither a network namespace nor a system call filter is permitted here"
        )
        return False

    def answer(self, **value: Any) -> None:
        self._answers.write(json.dumps(value) + "\n")
        self._answers.flush()

    def asked(self) -> Iterator[Any]:
        """What the parent says, one value after another, until it has no more to say."""
        for line in sys.stdin:
            yield json.loads(line)
