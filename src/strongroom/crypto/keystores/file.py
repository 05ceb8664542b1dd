"""``file:PATH``: a random key in a file that only its owner may read.

The file is text, so that it can be looked at, copied and printed::

    strongroom-key-v1 ROOM-ID
    KEY (64 hex digits) CHECK (8 hex digits)

Whoever can read the file and the room's database has the room's keys: keep it on another disk or in another backup than
the room. Destroying it overwrites and removes it, which does not reach snapshots, backups, or blocks that an SSD or a
copy-on-write file system keeps.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from pathlib import Path

from strongroom.core.files import sync_folder
from strongroom.crypto.keys import commitment, random_key
from strongroom.crypto.keystores.envelope import require_key, require_unwrapped
from strongroom.crypto.sealing import seal, unseal
from strongroom.errors import BackendError, Conflict, Sealed, StrongroomError, UsageError

_HEADER = "strongroom-key-v1"
_FORM = re.compile(rf"{_HEADER} ([0-9a-f]{{0,128}})\n([0-9a-f]{{64}}) ([0-9a-f]{{8}})\n?", re.ASCII)
_MAX_BYTES = 1024
_MAX_ROTATIONS = 10_000


class FileKeystore:
    """A key in a file. Reads it anew for every operation, so nothing stays in memory between them."""

    def __init__(self, uri: str, room_id_hex: str, folder: Path) -> None:
        self.uri = uri
        self._room = room_id_hex
        self._folder = folder
        self._path = folder / _path_of(uri)

    @classmethod
    def create(cls, uri: str, room_id_hex: str, folder: Path) -> FileKeystore:
        """Write a new key file; Conflict when something is at its path, BackendError when it cannot be written."""
        keystore = cls(uri, room_id_hex, folder)
        try:
            _write(keystore._path, room_id_hex)
        except FileExistsError:
            raise Conflict(
                "keystore.exists",
                f"there is already something at {keystore._path}; a key file is never overwritten",
                hint="name another path, or move that file away if no room needs it",
            ) from None
        return keystore

    def wrap(self, key: bytes, context: str) -> bytes:
        return seal(self._read(), require_key(key), context)

    def unwrap(self, wrapped: bytes, context: str) -> bytes:
        return require_unwrapped(unseal(self._read(), wrapped, context))

    def rotate(self) -> FileKeystore:
        """A new key in a new file beside this one: room.key, room.key.1, room.key.2 and so on."""
        stem, _, number = self.uri.rpartition(".")
        count = int(number) if stem and re.fullmatch(r"[1-9][0-9]{0,8}", number, re.ASCII) else 0
        base = stem if count else self.uri
        for next_count in range(count + 1, count + _MAX_ROTATIONS):  # skips what a killed rotation left behind
            successor = FileKeystore(f"{base}.{next_count}", self._room, self._folder)
            try:
                _write(successor._path, self._room)
            except FileExistsError:
                continue
            return successor
        raise Conflict("keystore.exists", f"no free name for a new key file beside {self._path}")

    def retire(self) -> None:
        """Overwrite and remove the file; does nothing when it is gone already."""
        if not os.path.lexists(self._path):
            return
        descriptor = _open_checked(self._path, os.O_RDONLY)
        try:
            os.fchmod(descriptor, 0o600)  # 0400 is a fine mode for a key file, too
            writable = _open_checked(self._path, os.O_WRONLY)
            try:
                os.pwrite(writable, os.urandom(os.fstat(writable).st_size), 0)
                os.fsync(writable)
            finally:
                os.close(writable)
            self._path.unlink()
            sync_folder(self._path.parent)
        except OSError as error:
            raise BackendError(
                "keystore.not_retired",
                f"the superseded key file {self._path} could not be destroyed: {error.strerror}",
                hint=f"remove {self._path} by hand",
            ) from None
        finally:
            os.close(descriptor)

    def check(self) -> dict[str, str | bool]:
        report: dict[str, str | bool] = {"uri": self.uri, "reachable": False, "key_type": "AES-256-GCM, key in a file"}
        try:
            self._read()
            report["reachable"] = True
            report["permissions"] = f"{stat.S_IMODE(self._path.stat().st_mode):04o}"
            report["notes"] = self._notes()
        except StrongroomError as error:
            report["notes"] = error.message
        except OSError as error:
            report["notes"] = f"{self._path}: {error.strerror}"
        return report

    def _notes(self) -> str:
        notes = []
        mode = self._path.parent.stat().st_mode
        if mode & 0o022 and not mode & stat.S_ISVTX:
            notes.append(f"others may write to {self._path.parent} and so remove the key file")
        if self._path.resolve().is_relative_to(self._folder.resolve()):
            notes.append("the key file lies inside the room's folder: a copy of the folder opens the room")
        return "; ".join(notes)

    def _read(self) -> bytes:
        descriptor = _open_checked(self._path, os.O_RDONLY)
        try:
            data = os.read(descriptor, _MAX_BYTES + 1)
        except OSError as error:
            raise Sealed("keystore.unreadable", f"cannot read the key file {self._path}: {error.strerror}") from None
        finally:
            os.close(descriptor)
        form = _FORM.fullmatch(data.decode("ascii", "replace"))
        if form is None:
            raise Sealed(
                "keystore.file_malformed",
                f"{self._path} is not a whole Strongroom key file of version 1",
                hint="restore it from its backup, or recover the room with its recovery shares",
            )
        room, key = form[1], bytes.fromhex(form[2])
        if commitment(key).hex()[:8] != form[3]:
            raise Sealed(
                "keystore.file_malformed",
                f"the key in {self._path} is damaged: it does not match its check digits",
                hint="restore it from its backup, or recover the room with its recovery shares",
            )
        if room != self._room:
            raise Sealed(
                "keystore.other_room",
                f"{self._path} is the key file of room {room}, not of room {self._room}",
                hint="put this room's own key file there",
            )
        return key


def _path_of(uri: str) -> str:
    path = uri.removeprefix("file:")
    if path.startswith("//"):
        if not path.startswith("///"):
            raise UsageError("keystore.bad_uri", "a key file is on this machine: write file:PATH or file:///PATH")
        path = path[2:]
    if not path or path.endswith("/") or any(ord(character) < 32 for character in path):
        raise UsageError("keystore.bad_uri", "file: needs the path of the key file", hint="for example file:room.key")
    try:
        os.fsencode(path)
    except UnicodeEncodeError:
        raise UsageError("keystore.bad_uri", "the path of the key file has no form on this machine") from None
    return path


def _write(path: Path, room_id_hex: str) -> None:
    """A new key file at `path`, durable; FileExistsError when anything is there, a dangling link included."""
    key = random_key()
    text = f"{_HEADER} {room_id_hex}\n{key.hex()} {commitment(key).hex()[:8]}\n"
    try:
        # O_EXCL with O_NOFOLLOW: nobody who may write to the folder can aim this write, or wait with a file to read it.
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        raise
    except OSError as error:
        raise BackendError(
            "keystore.not_written",
            f"cannot create the key file {path}: {error.strerror}",
            hint=f"make the folder {path.parent} and let this user write to it",
        ) from None
    try:
        try:
            os.fchmod(descriptor, 0o600)
            data = text.encode("ascii")
            if os.write(descriptor, data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        sync_folder(path.parent)
    except OSError as error:
        path.unlink(missing_ok=True)  # nothing was wrapped with this key yet
        raise BackendError("keystore.not_written", f"cannot write the key file {path}: {error.strerror}") from None


def _open_checked(path: Path, flags: int) -> int:
    """A descriptor of the key file, after the checks that it is a regular file which nobody else can read."""
    try:
        # O_NONBLOCK: a FIFO in its place must not make us wait.
        descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise _not_opened(path, error) from None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise Sealed("keystore.not_a_file", f"the key file {path} is not a regular file")
        if status.st_uid not in (os.geteuid(), 0):
            raise Sealed(
                "keystore.exposed",
                f"the key file {path} belongs to another user (uid {status.st_uid}), who can read and replace it",
                hint=f"chown {os.geteuid()} {path}",
            )
        if status.st_mode & 0o077:
            raise Sealed(
                "keystore.exposed",
                f"group or others have rights to the key file {path} (mode {stat.S_IMODE(status.st_mode):04o})",
                hint=f"chmod 600 {path}, and rotate the key if somebody may have read it",
            )
    except Sealed:
        os.close(descriptor)
        raise
    return descriptor


def _not_opened(path: Path, error: OSError) -> Sealed:
    if error.errno == errno.ENOENT:
        return Sealed(
            "keystore.missing",
            f"there is no key file at {path}",
            hint="mount or restore it; or, with the room's recovery shares: "
            "strongroom recovery recover --keystore file:keys/NEW.key SHARE...",
        )
    if error.errno == errno.ELOOP:
        return Sealed(
            "keystore.symlink",
            f"the key file {path} is a symbolic link, which whoever may write to its folder can aim elsewhere",
            hint="name the file itself in the key store's URI",
        )
    return Sealed("keystore.unreadable", f"cannot open the key file {path}: {error.strerror}")
