"""What ``strongroom run`` hands to its child: key bundles in sealed memory, named by an environment variable.

The bundles are in an anonymous file (memfd) whose seals let nobody change or resize it. The child inherits the
descriptor, and ``STRONGROOM_GRANT=fd:N`` says which one it is. Nothing of it is in the environment itself, on a command
line, or on a disk. Reading leaves it as it was, so any number of readers can, in the child and in its own children.

A grant is as good as its bundles, so it is for processes of the same user that `strongroom run` has started.
"""

from __future__ import annotations

import fcntl
import os
import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from strongroom.core import canonical
from strongroom.core.ids import Ref
from strongroom.core.limits import LIMITS, MIB
from strongroom.core.settings import Settings
from strongroom.errors import LimitExceeded, NotFound, Tampered, UsageError
from strongroom.formats.bundle import KeyBundle
from strongroom.storage.blobs import open_blobs
from strongroom.storage.reader import ImageReader

VARIABLE = "STRONGROOM_GRANT"
_MAGIC = b"SRGRANT1"
_PREFIX = struct.Struct("<8sI")
_NAME = "strongroom-grant"
_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
_MOST = 256
_HEADER = MIB


@dataclass(frozen=True)
class Grant:
    """One version that may be read: the URL of its store, and an encoded `KeyBundle`."""

    store_url: str
    bundle: bytes = field(repr=False)


def encode(grants: Sequence[Grant]) -> bytes:
    """Prefix, canonical JSON, and the bundles one after another."""
    if not 1 <= len(grants) <= _MOST:
        raise UsageError("grant.count", f"{len(grants)} grants; a process is given 1 to {_MOST}")
    listed = [{"store": grant.store_url, "bytes": len(grant.bundle)} for grant in grants]
    header = canonical.encode({"format": 1, "grants": listed})
    return b"".join([_PREFIX.pack(_MAGIC, len(header)), header, *(grant.bundle for grant in grants)])


def decode(data: bytes) -> list[Grant]:
    """The reverse; Tampered ``grant.malformed`` or LimitExceeded."""
    if len(data) < _PREFIX.size:
        raise _malformed("it is too short")
    magic, size = _PREFIX.unpack_from(data)
    if magic != _MAGIC or size > _HEADER or len(data) < _PREFIX.size + size:
        raise _malformed("it does not begin like one")
    value = canonical.decode(data[_PREFIX.size : _PREFIX.size + size], what="the grant")
    if not isinstance(value, dict) or set(value) != {"format", "grants"} or value["format"] != 1:
        raise _malformed("it is of another format")
    listed = value["grants"]
    if not isinstance(listed, list) or not 1 <= len(listed) <= _MOST:
        raise _malformed("it holds no bundles, or too many")
    grants: list[Grant] = []
    at = _PREFIX.size + size
    for item in listed:
        if not isinstance(item, dict) or set(item) != {"store", "bytes"}:
            raise _malformed("an entry has not exactly store and bytes")
        store, length = item["store"], item["bytes"]
        if not isinstance(store, str) or type(length) is not int or not 0 <= length <= LIMITS.bundle:
            raise _malformed("an entry is not a URL and a size")
        grants.append(Grant(store, data[at : at + length]))
        at += length
    if at != len(data):
        raise _malformed(f"it should have {at} bytes and has {len(data)}")
    return grants


def hold(grants: Sequence[Grant]) -> int:
    """Put `grants` in sealed memory; the descriptor, which child processes inherit if it is passed to them."""
    data = encode(grants)
    fd = os.memfd_create(_NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(fd, rest) :]
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
        os.set_inheritable(fd, True)
    except BaseException:
        os.close(fd)
        raise
    return fd


def variable(fd: int) -> str:
    """The value of ``STRONGROOM_GRANT`` that names `fd`."""
    return f"fd:{fd}"


def read_grants(value: str) -> list[Grant]:
    """The grants that a value such as ``fd:3`` names.

    UsageError ``grant.variable`` or ``grant.gone``; Tampered ``grant.malformed`` for memory that is not sealed or not a
    grant; LimitExceeded.
    """
    match = re.fullmatch(r"fd:([0-9]{1,9})", value, re.ASCII)
    if match is None:
        raise UsageError(
            "grant.variable", f"{VARIABLE} is {value[:40]!r}; strongroom run sets it to fd:N", hint=f"unset {VARIABLE}"
        )
    fd = _open(int(match[1]))
    try:
        # Unsealed, whoever else has the descriptor could change the bundles between two reads of them.
        if fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _SEALS != _SEALS:
            raise _malformed("its memory is not sealed")
        size = os.fstat(fd).st_size
        if size > _HEADER + _MOST * LIMITS.bundle:
            raise LimitExceeded("grant.too_large", f"a grant of {size} bytes")
        pieces: list[bytes] = []
        at = 0
        while at < size and (piece := os.pread(fd, min(size - at, 64 * MIB), at)):
            pieces.append(piece)
            at += len(piece)
    finally:
        os.close(fd)
    return decode(b"".join(pieces))


def reader_from_grant(ref: str, value: str | None = None) -> ImageReader:
    """A reader for `ref` with the bundle that this process was given; a name alone is its newest granted version.

    `value` is that of ``STRONGROOM_GRANT`` (default: the environment's). NotFound ``grant.other`` when it was given
    others only.
    """
    wanted = Ref.parse(ref)
    if value is None:
        value = Settings.from_environment().grant
    if value is None:
        raise UsageError("grant.missing", f"{VARIABLE} is not set", hint=f"strongroom run {ref} -- COMMAND")
    found: tuple[int, Grant, KeyBundle] | None = None
    held: list[str] = []
    for grant in read_grants(value):
        bundle = KeyBundle.decode(grant.bundle)
        granted = Ref.parse(bundle.ref)
        held.append(bundle.ref)
        number = granted.number or 0
        if granted.name == wanted.name and wanted.number in (None, number) and (found is None or number > found[0]):
            found = (number, grant, bundle)
    if found is None:
        raise NotFound(
            "grant.other",
            f"this process was given {', '.join(held)}, not {ref}",
            hint=f"strongroom run {ref} -- COMMAND",
        )
    _, grant, bundle = found
    return ImageReader(open_blobs(grant.store_url, create=False), bundle)


def granted_refs(value: str) -> list[str]:
    """The references (``acme/tiny@1``) of the bundles that a value such as ``fd:3`` names."""
    return [KeyBundle.decode(grant.bundle).ref for grant in read_grants(value)]


def _open(number: int) -> int:
    """A read-only descriptor of the grant that is descriptor `number` here, or in the process that started this one.

    Python closes inherited descriptors in the processes that it starts, such as the workers of an inference server, and
    leaves them the variable. So look further up, as far as the kernel lets this user; the name makes sure that it is a
    grant and not what else has that number.
    """
    for pid in _ancestors():
        path = Path(f"/proc/{pid}/fd/{number}")
        try:
            if str(path.readlink()) == f"/memfd:{_NAME} (deleted)":
                return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            continue
    raise UsageError(
        "grant.gone",
        f"{VARIABLE} names descriptor {number}, which is not a grant in this process or in those that started it",
        hint="run the command through strongroom run again",
    )


def _ancestors() -> Iterator[int]:
    pid = os.getpid()
    while pid > 1:
        yield pid
        try:
            # The second field is the program's name in parentheses, and may hold anything.
            pid = int(Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[1])
        except (OSError, ValueError, IndexError):
            return


def _malformed(why: str) -> Tampered:
    return Tampered("grant.malformed", f"what {VARIABLE} names is not a grant: {why}")
