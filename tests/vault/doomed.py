"""A program that does work in a room in processes of its own, which die or suffer where they are told to.

It imports everything once, then forks a child for each job: a line of JSON in, a line of JSON out. In the child every
call that changes a disk (and every commit) goes through `Reaper`, which counts them and ends the process with SIGKILL
before call number `kill_at`; with `torn`, a write is half done first.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import json
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cryptography.hazmat.primitives.ciphers.aead as aead_module
import sqlalchemy
import sqlalchemy.engine.default
from sqlalchemy.engine import Engine

from strongroom.client import Room
from strongroom.crypto import sealing
from strongroom.errors import StrongroomError
from strongroom.storage import image
from strongroom.vault import packing, sourcefile
from strongroom.vault.fsck import fsck
from strongroom.vault.source import ModelSource
from strongroom.vault.vault import Vault

CHANGING = ("open", "write", "pwrite", "fsync", "link", "rename", "replace", "unlink", "mkdir", "rmdir")
COMMITS = ("commit", "committed", "reading", "read")
_NEWNS, _NEWUSER = 0x0002_0000, 0x1000_0000
_MS_RDONLY, _MS_REMOUNT, _MS_BIND, _MS_REC, _MS_PRIVATE = 1, 32, 4096, 16384, 1 << 18

_AESGCM = aead_module.AESGCM
_write = os.write


class Reaper:
    """Counts the calls that change something, and kills this process before one of them."""

    def __init__(self, kill_at: int, *, torn: bool, counted: list[str], trace: int | None) -> None:
        self.calls = 0
        self._kill_at, self._torn, self._counted, self._trace = kill_at, torn, frozenset(counted), trace
        self._lock = threading.Lock()

    def install(self) -> None:
        for name in CHANGING:
            setattr(os, name, functools.wraps(getattr(os, name))(self._wrapped(name, getattr(os, name))))
        # Both sides of a commit: what is before it must not count, what is after it must not be needed. A transaction
        # that only reads ends in one, too: "reading" and "read".
        here = threading.local()
        commit = sqlalchemy.engine.default.DefaultDialect.do_commit

        def committing(connection: Any) -> None:
            here.reads = connection.get_execution_options()["strongroom_begin"] == "BEGIN"
            self.step("reading" if here.reads else "commit")

        def committed(dialect: Any, connection: Any) -> None:
            commit(dialect, connection)
            self.step("read" if here.reads else "committed")

        sqlalchemy.event.listen(Engine, "commit", committing)

        sqlalchemy.engine.default.DefaultDialect.do_commit = committed  # type: ignore[method-assign]

    def step(self, name: str, *values: Any) -> None:
        with self._lock:
            self.calls += name in self._counted
            if self._trace is not None:
                _write(self._trace, (json.dumps([threading.get_ident(), name, *values]) + "\n").encode())
            if self.calls == self._kill_at and name in self._counted:
                os.kill(os.getpid(), signal.SIGKILL)
                time.sleep(60)

    def _wrapped(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def stepped(*args: Any, **kwargs: Any) -> Any:
            if name == "open" and not args[1] & (os.O_CREAT | os.O_TRUNC):
                return call(*args, **kwargs)
            if name == "write" and self._torn and self.calls + 1 == self._kill_at:
                call(args[0], memoryview(args[1])[: len(args[1]) // 2])
            folders = (kwargs.get("src_dir_fd", kwargs.get("dir_fd")), kwargs.get("dst_dir_fd"))
            self.step(name, *(_told(value, folder) for value, folder in zip(args[:2], folders, strict=False)))
            return call(*args, **kwargs)

        return stepped


def _told(value: Any, folder: int | None = None) -> Any:
    if isinstance(value, str | Path):
        return str(value if folder is None else Path(f"/proc/self/fd/{folder}").readlink() / value)
    if isinstance(value, int):
        try:
            return str(Path(f"/proc/self/fd/{value}").readlink())
        except OSError:
            return value
    return None


class RecordingAESGCM:
    """AES-GCM as it is, which notes what is encrypted under which key and nonce before it does so."""

    log = -1

    def __init__(self, key: bytes) -> None:
        self._key, self._aead = key, _AESGCM(key)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._aead, name)

    def _note(self, nonce: bytes, plaintext: Any, associated_data: Any) -> None:
        pair = hashlib.sha256(b"pair" + self._key).hexdigest()[:32] + nonce.hex()
        what = hashlib.sha256(bytes(associated_data or b"") + b"|" + bytes(plaintext)).hexdigest()[:32]
        _write(self.log, f"{pair} {what}\n".encode())

    def encrypt(self, nonce: bytes, plaintext: Any, associated_data: Any) -> bytes:
        self._note(nonce, plaintext, associated_data)
        return self._aead.encrypt(nonce, plaintext, associated_data)

    def encrypt_into(self, nonce: bytes, plaintext: Any, associated_data: Any, out: Any) -> int:
        self._note(nonce, plaintext, associated_data)
        return self._aead.encrypt_into(nonce, plaintext, associated_data, out)


# -- the work -------------------------------------------------------------------------------------------------------


def do_put(vault: Vault, job: dict[str, Any]) -> Any:
    source = ModelSource.scan(Path(job["source"]))
    return vault.put(source, job.get("name", "acme/tiny"), by="user/ana", share="1/2").as_json()


def do_rotate(vault: Vault, job: dict[str, Any]) -> Any:
    return vault.rotate(job["ref"], by="user/ana")


def do_shred(vault: Vault, job: dict[str, Any]) -> Any:
    return vault.shred(job["ref"], confirm=job["ref"], by="user/ana")


def do_keystore_rotate(vault: Vault, job: dict[str, Any]) -> Any:
    return vault.keys.rotate(job.get("to"))


def do_load(vault: Vault, job: dict[str, Any]) -> Any:
    """A release, recorded and proven, and then the weights."""
    del vault
    with Room(job["room"], "user/ana") as room:
        return hashlib.sha256(room.reader(job["ref"]).read_all()).hexdigest()


def do_principal_add(vault: Vault, job: dict[str, Any]) -> Any:
    del vault
    with Room(job["room"], "user/ana") as room:
        return room.principal_add(job["path"])


def do_verify(vault: Vault, job: dict[str, Any]) -> Any:
    return vault.verify(job["ref"], deep=job.get("deep", False)).as_json()


def do_full(vault: Vault, job: dict[str, Any]) -> Any:
    """Put onto a disk that is too small; then the disk grows, and it is put again."""
    del vault
    room, place, sizes = Path(job["room"]), Path(job["place"]), job["sizes"]
    kept = {path.relative_to(place): path.read_bytes() for path in place.rglob("*") if path.is_file()}
    folders = sorted(path.relative_to(place) for path in place.rglob("*") if path.is_dir())
    _private_mounts()
    _mount("none", place, "tmpfs", 0, "size=64m")
    for folder in folders:
        (place / folder).mkdir(mode=0o700)
    for path, data in kept.items():
        (place / path).write_bytes(data)
        (place / path).chmod(0o600)
    outcomes = []
    for size in sizes:
        _mount("none", place, "tmpfs", _MS_REMOUNT, f"size={size}")
        outcome = attempt(lambda: _with(room, do_put, job))
        _mount("none", place, "tmpfs", _MS_REMOUNT, "size=64m")  # so that looking at it needs no care
        seen = _with(room, _looked_at, job)
        outcomes.append({**outcome, **seen})
    return outcomes


def do_read_only(vault: Vault, job: dict[str, Any]) -> Any:
    """The store is mounted read-only: nothing can be put, everything can be read."""
    del vault
    room, place = Path(job["room"]), Path(job["place"])
    _private_mounts()
    _mount(str(place), place, None, _MS_BIND, None)
    _mount("none", place, None, _MS_REMOUNT | _MS_BIND | _MS_RDONLY, None)
    outcome = attempt(lambda: _with(room, do_put, job))
    return {**outcome, **_with(room, _looked_at, job)}


def do_init(vault: Vault, job: dict[str, Any]) -> Any:
    made, _ = Vault.init(Path(job["room"]), owner="user/ana", custody="solo")
    made.close()
    return made.id.hex()


WORK = {
    name.removeprefix("do_"): work
    for name, work in list(globals().items())
    if name.startswith("do_") and callable(work)
}


def _with(room: Path, work: Callable[[Vault, dict[str, Any]], Any], job: dict[str, Any]) -> Any:
    vault = Vault(room)
    try:
        return work(vault, job)
    finally:
        vault.close()


def _looked_at(vault: Vault, job: dict[str, Any]) -> dict[str, Any]:
    return {
        "versions": [info.ref for info in vault.ls()],
        "verified": [vault.verify(info.ref, deep=True).ok for info in vault.ls()],
        "fsck": fsck(vault).as_json(),
    }


def _private_mounts() -> None:
    flags = _NEWNS if os.geteuid() == 0 else _NEWNS | _NEWUSER
    if _libc().unshare(flags) != 0:
        raise OSError(ctypes.get_errno(), "unshare")
    _mount("none", Path("/"), None, _MS_REC | _MS_PRIVATE, None)


def _mount(what: str, where: Path, kind: str | None, flags: int, data: str | None) -> None:
    encoded = [None if text is None else text.encode() for text in (what, str(where), kind, data)]
    if _libc().mount(encoded[0], encoded[1], encoded[2], ctypes.c_ulong(flags), encoded[3]) != 0:
        raise OSError(ctypes.get_errno(), "mount")


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


# -- children -------------------------------------------------------------------------------------------------------


def attempt(work: Callable[[], Any]) -> dict[str, Any]:
    try:
        return {"result": work()}
    except StrongroomError as error:
        return {"error": error.as_json(), "kind": type(error).__name__}
    except OSError as error:
        return {"oserror": f"{error!r}", "errno": error.errno}


def child(job: dict[str, Any], answer: int) -> None:
    trace = os.open(job["trace"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600) if "trace" in job else None
    if "nonces" in job:
        RecordingAESGCM.log = os.open(job["nonces"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        packing.AESGCM = sealing.AESGCM = image.AESGCM = RecordingAESGCM  # type: ignore[misc,assignment]
    if "state" in job:
        os.environ["STRONGROOM_STATE"] = job["state"]
    if "pack_body" in job:
        packing.PACK_BODY = job["pack_body"]
    if job.get("blind"):
        blind()
    if "file_size" in job:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["file_size"], job["file_size"]))
    opened: list[list[Any]] = []
    if "audit" in job:
        prefix = job["audit"]
        sys.addaudithook(
            lambda event, args: (
                opened.append([str(args[0]), args[2]]) if event == "open" and str(args[0]).startswith(prefix) else None
            )
        )
    reaper = Reaper(
        job.get("kill_at", 0),
        torn=job.get("torn", False),
        counted=job.get("counted", [*CHANGING, *COMMITS]),
        trace=trace,
    )
    work = WORK[job["do"]]
    if "kill_after" in job:
        threading.Thread(target=lambda: (time.sleep(job["kill_after"]), os.kill(os.getpid(), signal.SIGKILL))).start()
    if job["do"] == "init":
        reaper.install()
        outcome = attempt(lambda: work(None, job))
    else:
        vault = Vault(Path(job["room"]))
        vault.workers = job.get("workers", 2)
        reaper.install()
        outcome = attempt(lambda: work(vault, job))
    _write(answer, json.dumps({**outcome, "calls": reaper.calls, "opened": opened}).encode())


def blind() -> None:
    """A file system whose times say nothing: a file that was changed in place looks unchanged."""
    of = sourcefile.Signature.of
    sourcefile.Signature.of = lambda status: of(status)._replace(mtime_ns=0, ctime_ns=0)  # type: ignore[method-assign,assignment]


def start(job: dict[str, Any]) -> tuple[int, int]:
    readable, writable = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.close(readable)
            child(job, writable)
            status = 0
        except BaseException as error:  # noqa: BLE001 - told to the parent
            _write(writable, json.dumps({"crash": repr(error)}).encode())
        finally:
            os._exit(status)
    os.close(writable)
    return pid, readable


def finish(pid: int, readable: int) -> dict[str, Any]:
    told = b""
    while piece := os.read(readable, 1 << 16):
        told += piece
    os.close(readable)
    _, status = os.waitpid(pid, 0)
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    return {"killed": killed, **(json.loads(told) if told else {})}


def main() -> None:
    for line in sys.stdin:
        children = [start(job) for job in json.loads(line)]
        print(json.dumps([finish(*one) for one in children]), flush=True)


if __name__ == "__main__":
    main()
