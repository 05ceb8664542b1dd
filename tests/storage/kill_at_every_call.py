"""Kills a process at every system call of `LocalBlobs.write`; a program of its own, because it forks.

``python kill_at_every_call.py FOLDER``: for each call that a write makes, and for each of "just before it", "half-way
through it" (writes) and "just after it", a forked child writes an object and is gone at that point without any cleaning
up. The parent then looks at what is left, as the next process would. One JSON object a kill on stdout.
"""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import sys
from pathlib import Path

from strongroom.errors import NotFound
from strongroom.storage.local import LocalBlobs

NAME = "packs/ab/object"
CHUNKS = [bytes([k]) * 10_000 for k in range(1, 4)]
CALLS = ("open", "write", "fsync", "link", "unlink", "mkdir", "close")
GONE = 99


def main(folder: Path) -> None:
    for existing in (False, True):
        for phase in ("before", "half", "after"):
            for at in itertools.count():
                root = folder / f"{existing}-{phase}-{at}"
                if existing:  # the folders are there already, and so is another object
                    LocalBlobs(root).write("packs/ab/other", [b"other"])
                call = _killed_write(root, phase, at)
                if call is None:
                    break
                if phase != "half" or call == "write":
                    print(json.dumps({"existing": existing, "phase": phase, "at": at, "call": call, **_found(root)}))


def _killed_write(root: Path, phase: str, at: int) -> str | None:
    """The call at which the child was killed; None if the write makes no call number `at`."""
    readable, writable = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            _die_at(at, phase, writable)
            LocalBlobs(root).write(NAME, CHUNKS)
            os._exit(0)
        finally:
            os._exit(1)
    os.close(writable)
    with os.fdopen(readable, "rb") as pipe:
        call = pipe.read().decode()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status not in (0, GONE):
        raise SystemExit(f"the child failed by itself: {status}")
    return call if status == GONE else None


def _die_at(at: int, phase: str, pipe: int) -> None:
    counter = itertools.count()
    write = os.write

    def die(name: str) -> None:
        write(pipe, name.encode())
        os._exit(GONE)

    def hook(module: object, name: str) -> None:
        real = getattr(module, name)

        def call(*args, **kwargs):
            if next(counter) != at:
                return real(*args, **kwargs)
            if phase == "before":
                die(name)
            if phase == "half" and name == "write":
                real(args[0], bytes(args[1])[: len(args[1]) // 2])
                die(name)
            result = real(*args, **kwargs)
            die(name)
            return result

        setattr(module, name, call)

    for name in CALLS:
        hook(os, name)
    hook(fcntl, "flock")


def _found(root: Path) -> dict[str, object]:
    store = LocalBlobs(root)
    whole = b"".join(CHUNKS)
    try:
        state = "whole" if store.read(NAME, limit=1 << 20) == whole else "partial"
    except NotFound:
        state = "absent"
    listed = dict(store.list())
    listed.pop("packs/ab/other", None)
    leftovers = len(store.leftovers())
    fresh = store.sweep(older_than_s=3600)  # too young to be swept
    again = store.write(NAME, CHUNKS)  # what a resumed put does
    swept = store.sweep(older_than_s=0)  # the dead process's lock is gone with it
    return {
        "state": state,
        "listed": listed,
        "leftovers": leftovers,
        "fresh_swept": fresh,
        "swept": swept,
        "left": len(store.leftovers()),
        "again": again,
        "rewritten": store.read(NAME, limit=1 << 20) == whole,
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]))
