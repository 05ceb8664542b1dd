"""A child that does what a test tells it: `main` is started by `strongroom.vault.child`."""

from __future__ import annotations

import os
import socket
import sys
import time

from strongroom.vault.child import Confined


def main(*numbers: int) -> None:
    parent = Confined()
    if not parent.enter(memory=numbers[-2], seconds=numbers[-1]):
        return
    for told in parent.asked():
        DEEDS[told["do"]](parent, told, numbers)


def echo(parent, told, _):
    parent.answer(said=told["value"])


def write(parent, told, _):
    parent._answers.write(told["text"])
    parent._answers.flush()


def chatter(parent, _, __):
    print('{"said": "by a library"}', flush=True)
    os.write(1, b'{"said": "by a library in C"}\n')
    parent.answer(said="by the child")


def where(parent, _, numbers):
    parent.answer(
        said={
            "environment": dict(os.environ),
            "folder": os.getcwd(),  # noqa: PTH109
            "descriptors": list(map(int, os.listdir("/proc/self/fd"))),  # noqa: PTH208
            "isolated": sys.flags.isolated,
            "given": numbers[:-2],
        }
    )


def reach(parent, told, _):
    tried = []
    for attempt in (
        lambda: socket.create_connection(("127.0.0.1", told["port"]), 5),
        lambda: open(told["path"], "w"),  # noqa: SIM115, PTH123
        os.fork,
    ):
        try:
            attempt()
            tried.append("done")
        except OSError:
            tried.append("refused")
    parent.answer(said=tried)


def allocate(parent, told, _):
    try:
        parent.answer(said=len(bytearray(told["bytes"])))
    except MemoryError:
        parent.answer(error="memory", message="it needs more")


def flood(parent, _, __):
    while True:
        parent._answers.write("x" * 65_536)


def spin(_, __, ___):
    while True:
        pass


DEEDS = {
    "echo": echo,
    "write": write,
    "chatter": chatter,
    "where": where,
    "reach": reach,
    "allocate": allocate,
    "flood": flood,
    "spin": spin,
    "exit": lambda *_: os._exit(3),
    "sleep": lambda *_: time.sleep(600),
}
