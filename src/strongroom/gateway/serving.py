"""Running the gateway: one process, or several on one socket."""

from __future__ import annotations

import contextlib
import gc
import logging
import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from multiprocessing import connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from strongroom.errors import BackendError, StrongroomError
from strongroom.gateway.changes import Taken
from strongroom.gateway.generations import Generations
from strongroom.gateway.handshakes import Server
from strongroom.gateway.hangup import Hangup
from strongroom.gateway.listen import configure
from strongroom.gateway.reload import Read, Reload, Tell, unexpected
from strongroom.gateway.rooms import Open
from strongroom.gateway.settings import Settings
from strongroom.gateway.worker import application
from strongroom.gateway.workers import Participant, coordinate

if TYPE_CHECKING:
    import uvicorn


_ALONE = "what it said is above; strongroom gateway --workers 1, with all else as it was, ends with the reason"
_NEW = 5000  # objects, between two looks of the collector


@dataclass(frozen=True)
class Plan:
    """What to serve, and how. `room` opens it, in each worker; `records`: a folder; `certificate`: a chain and its key,
    or None for no TLS; `observe` is called in each worker with its application and its number, before requests are
    answered; `ask`: whether callers may show certificates of their own, but for those on the lists in the files
    `revoked`; `read` reads the settings again at a SIGHUP, and `tell` is told those that are in force from then on, or
    why they are not. Without `read` a SIGHUP ends it."""

    room: Open
    settings: Settings
    records: Path
    workers: int = 1
    certificate: tuple[Path, Path] | None = None
    observe: Callable[[Generations, int], None] = lambda _, __: None
    ask: bool = False
    revoked: tuple[Path, ...] = ()
    read: Read | None = None
    tell: Tell = lambda _: None


class _Server(Server):
    """A server that says when it has started, and why it has not."""

    def __init__(self, config: uvicorn.Config, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if not self.should_exit:
            remember()
            self._ready()


def remember() -> None:
    """What is there now stays until the process ends: the collector need not look at it again and again. Requests leave
    hardly any cycles behind, so it also looks less often at what is new."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(_NEW, 10, 10)


def run(plan: Plan, listener: socket.socket, *, ready: Callable[[], None]) -> None:
    """Serve until interrupted; `ready` is called once, when requests are answered. BackendError ``gateway.start``."""
    if plan.workers == 1:
        read = plan.read
        if read is None:
            _serve(plan, listener, ready, 0, lambda _: None)
            return
        with _hangup(signal.SIG_IGN):  # until it can be answered
            _serve(plan, listener, ready, 0, lambda reload: Hangup(reload, read, plan.tell).listen())
        return
    before = signal.signal(signal.SIGTERM, _interrupted)  # else they would be left behind
    context = multiprocessing.get_context("fork")
    children: list[tuple[Any, Any]] = []
    rung, bell = os.pipe()
    os.set_blocking(bell, False)  # who rings a thousand times is heard once
    try:
        with _hangup(partial(_ring, bell) if plan.read else _interrupted):
            # One after the other: where a key store asks for a passphrase, one asks at a time.
            for number in range(plan.workers):
                started = context.Event()
                here, there = context.Pipe()
                ours = [*(line for line, _ in children), here]
                child = context.Process(target=_worker, args=(plan, listener, started.set, number, there, ours))
                child.start()
                children.append((here, child))
                there.close()  # so that one that has ended is heard to have
                while not started.wait(0.1):
                    if child.exitcode is not None:
                        why, hint = (
                            here.recv() if here.poll() else ("a worker of the gateway ended while it started", _ALONE)
                        )
                        raise BackendError("gateway.start", why, hint=hint)
            ready()
            while rung in connection.wait([rung, *(child.sentinel for _, child in children)]):
                os.read(rung, 1 << 16)
                _again(plan, children)
        # One that ended by itself has lost what it had drawn of budgets and limits: all are started again together.
        raise BackendError("gateway.worker", "a worker of the gateway has ended", hint="start the gateway again")
    except KeyboardInterrupt:
        pass
    finally:
        for _, child in children:
            child.terminate()
        for line, child in children:
            child.join()
            line.close()
        os.close(rung)
        os.close(bell)
        signal.signal(signal.SIGTERM, before)


def _ring(bell: int, *_: object) -> None:
    with contextlib.suppress(BlockingIOError):
        os.write(bell, b"!")


def _again(plan: Plan, children: list[tuple[Any, Any]]) -> None:
    if plan.read is None:
        return
    try:
        settings = plan.read()
        plan.tell(Taken(settings, coordinate(settings, children)))
    except StrongroomError as error:
        if error.code == "gateway.worker":
            raise
        plan.tell(error)
    except Exception as error:  # noqa: BLE001 - a file that can't be read must not end what is under way
        plan.tell(unexpected(error))


@contextlib.contextmanager
def _hangup(handler: Any) -> Iterator[None]:
    before = signal.signal(signal.SIGHUP, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, before)


def _worker(
    plan: Plan, listener: socket.socket, ready: Callable[[], None], number: int, line: Any, firsts: list[Any]
) -> None:
    """One of several, in a process of its own: why it did not start is for whoever started them all to say. `firsts`:
    ends of lines that are the first process's, which this one has with all that it began with."""
    for each in firsts:
        each.close()  # else nobody would hear at the other ends that the first process has gone
    signal.signal(signal.SIGHUP, signal.SIG_IGN if plan.read else signal.SIG_DFL)  # it is told by the first process
    try:
        _serve(plan, listener, ready, number, lambda reload: Participant(reload, line).listen())
    except StrongroomError as error:
        line.send((error.message, error.hint))
        sys.exit(error.exit_code)


def _interrupted(*_: object) -> None:
    raise KeyboardInterrupt


def _serve(
    plan: Plan,
    listener: socket.socket,
    ready: Callable[[], None],
    number: int,
    listening: Callable[[Reload], None],
) -> None:
    room = plan.room()
    try:
        app = application(room, plan.settings, plan.records, workers=plan.workers)
        plan.observe(app, number)
        config = configure(app, plan.certificate)
        if plan.ask and config.ssl is not None:
            app.certificates.ask_with(config.ssl)
        revocations = room.revocations(plan.revoked) if plan.revoked else None
        if revocations is not None:
            revocations.take(revocations.read())
            app.certificates.crl_end = revocations.end

        def begun() -> None:
            listening(reload)
            ready()

        server = _Server(config, begun)
        reload = Reload(app, config.ssl, plan.certificate, revocations, server.server_state.connections)
        # Why it did not start is said once, by whoever catches it, with what to do.
        logging.getLogger("uvicorn.error").addFilter(lambda _: app.failure is None)
        try:
            with contextlib.suppress(KeyboardInterrupt):
                server.run(sockets=[listener])
        except SystemExit:  # uvicorn's way to end when an application does not start
            if app.failure is None:
                raise
        if app.failure is not None:
            raise app.failure
    finally:
        room.close()
