"""Files that are in memory only: what may be plaintext weights, and has to be a file."""

from __future__ import annotations

import fcntl
import os
from contextlib import ExitStack

from strongroom.errors import UsageError


def memory_file(stack: ExitStack) -> int:
    """The descriptor of a new one, until `stack` is left; UsageError ``convert.no_sandbox``."""
    if not hasattr(os, "memfd_create"):
        raise UsageError(
            "convert.no_sandbox",
            "this system has no memory files, and plaintext weights are never written to a disk",
            hint="do it on a Linux machine",
        )
    memory = os.memfd_create("strongroom", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    stack.callback(os.close, memory)
    return memory


def write_memory(memory: int, data: bytes | memoryview, at: int = 0) -> None:
    """Write all of `data`, from the offset `at` on; OSError where there is no memory for it."""
    done = 0
    while done < len(data):
        done += os.pwrite(memory, data[done:], at + done)


def seal_memory(memory: int) -> None:
    """From here on nobody changes it: not a child that lived on, not this process."""
    seals = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
    fcntl.fcntl(memory, fcntl.F_ADD_SEALS, seals)
