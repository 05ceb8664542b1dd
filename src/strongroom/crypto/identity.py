"""Identities: the Ed25519 keys of principals, on the machine of whoever acts as them.

A key file is text: ``strongroom-identity-v1 PRINCIPAL``, newline, 64 hexadecimal digits of the seed, newline. The
files lie in one folder, as ``user/ana.key``, readable by their owner only.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
from pathlib import Path

from strongroom.core.files import sync_folder, write_whole
from strongroom.core.ids import parse_principal
from strongroom.crypto.signatures import SEED_BYTES, Signer
from strongroom.errors import AuthRequired, BackendError, Conflict, Tampered, UsageError

_LABEL = "strongroom-identity-v1"
_SUFFIX = ".key"


class Identities:
    """The identities in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def ls(self) -> list[str]:
        """The principals that this machine can act as."""
        found = (path.relative_to(self.folder).as_posix() for path in self.folder.rglob(f"*{_SUFFIX}"))
        return sorted(name.removesuffix(_SUFFIX) for name in found)

    def create(self, principal: str) -> Signer:
        """A new key for `principal`; Conflict ``identity.exists``."""
        path = self.file(principal)
        seed = os.urandom(SEED_BYTES)
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_whole(path, f"{_LABEL} {principal}\n{seed.hex()}\n".encode("ascii"), new=True)
            # Whatever happens to the machine now: the log is about to say that this key is the principal's.
            for folder in (self.folder, self.folder.parent):
                sync_folder(folder)
        except FileExistsError:
            raise Conflict(
                "identity.exists",
                f"this machine has a key of {principal} already: {path}",
                hint=f"strongroom identity ls, or principal show, has its public half; for a new key move {path} away, "
                "and then run this again",
            ) from None
        except OSError as error:
            raise BackendError("identity.write", f"can't write {path}: {error.strerror}") from None
        return Signer(seed)

    def ensure(self, principal: str) -> Signer:
        """The key of `principal`, made if there is none. Errors as `create` and `signer`."""
        if not self.file(principal).exists():
            with contextlib.suppress(Conflict):  # another process has made it meanwhile
                return self.create(principal)
        return self.signer(principal)

    def remove(self, principal: str) -> None:
        """Take back a key that was made and is not wanted after all."""
        self.file(principal).unlink(missing_ok=True)

    def signer(self, principal: str) -> Signer:
        """The key of `principal`. AuthRequired ``identity.missing``; Tampered ``identity.malformed``; UsageError
        ``identity.exposed`` for a file that others may read."""
        path = self.file(principal)
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            raise AuthRequired(
                "identity.missing",
                f"this machine has no key of {principal}, so it can't act as that principal",
                hint=f"keys lie in {self.folder}: --as {(self.ls() or ['PRINCIPAL'])[0]}; of a served room also "
                f"strongroom login, or strongroom identity new {principal}, whose key somebody who may grant registers",
            ) from None
        with os.fdopen(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise Tampered("identity.malformed", f"{path} is not a plain file")
            if status.st_mode & 0o077:
                raise UsageError("identity.exposed", f"others may read the key {path}", hint=f"chmod 600 {path}")
            text = file.read(4096).decode("ascii", "replace")
        match = re.fullmatch(rf"{_LABEL} (\S+)\n([0-9a-f]{{64}})\n", text, re.ASCII)
        if match is None or match[1] != principal:
            raise Tampered("identity.malformed", f"{path} is not a key of {principal}")
        return Signer(bytes.fromhex(match[2]))

    def file(self, principal: str) -> Path:
        """Where the key of `principal` lies, if there is one."""
        return self.folder / f"{parse_principal(principal)}{_SUFFIX}"
