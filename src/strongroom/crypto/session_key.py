"""Keys that a login has introduced, on the machine of whoever logged in: one file for each room and principal, in the
state folder, readable by its owner only."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from strongroom.core.files import write_whole
from strongroom.core.ids import parse_principal
from strongroom.crypto.identity import Identities
from strongroom.crypto.signatures import SEED_BYTES, Signer
from strongroom.errors import AuthRequired, BackendError, NotFound, Tampered, UsageError

_AGAIN = "strongroom login --help"


class SessionKeys:
    """Those for one room, under the state folder `state`. A key that is `waiting` was made to be named in a token, and
    speaks for nobody yet."""

    def __init__(self, state: Path, room: bytes) -> None:
        self._folder = state / "logins" / room.hex()

    def ls(self) -> list[str]:
        """Who is logged in here, or was."""
        found = (path.relative_to(self._folder).as_posix() for path in self._folder.rglob("*.login"))
        return sorted(name.removesuffix(".login") for name in found)

    def make(self, principal: str) -> Signer:
        """A new key that waits for its token."""
        seed = os.urandom(SEED_BYTES)
        self._write(self._path(principal, "waiting"), {"seed": seed.hex()})
        return Signer(seed)

    def waiting(self, principal: str) -> Signer:
        """The key that `make` has made; NotFound ``login.no_key``."""
        value = self._read(self._path(principal, "waiting"))
        if value is None:
            raise NotFound(
                "login.no_key", f"no key waits for a token of {principal}", hint="strongroom login --prepare"
            )
        return _signer(value)

    def keep(self, principal: str, signer: Signer, expires_at: int) -> None:
        """The key that was waiting, which is `signer`, speaks for `principal` until `expires_at`, in seconds."""
        path = self._path(principal, "waiting")
        value = self._read(path)
        if value is None or _signer(value).public_key != signer.public_key:
            raise AuthRequired("login.raced", "somebody else has logged in here meanwhile", hint=_AGAIN)
        self._write(self._path(principal, "login"), {**value, "expires_at": expires_at})
        path.unlink(missing_ok=True)

    def signer(self, principal: str, now: int) -> Signer | None:
        """The key that speaks for `principal`, if there is a login; AuthRequired ``login.expired`` if it has ended."""
        value = self._read(self._path(principal, "login"))
        if value is None:
            return None
        if type(value.get("expires_at")) is not int or now >= value["expires_at"]:
            raise AuthRequired(
                "login.expired", f"the login of {principal} has ended", hint=f"strongroom login --as {principal}"
            )
        return _signer(value)

    def end(self, principal: str) -> bool:
        """Forget the login; whether there was one."""
        path = self._path(principal, "login")
        there = path.exists()
        path.unlink(missing_ok=True)
        return there

    def _path(self, principal: str, kind: str) -> Path:
        return self._folder / f"{parse_principal(principal)}.{kind}"

    def _read(self, path: Path) -> dict[str, Any] | None:
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise BackendError("login.unreadable", f"can't read {path}: {error.strerror}") from None
        with os.fdopen(descriptor, "rb") as file:
            if os.fstat(descriptor).st_mode & 0o077:
                raise UsageError("login.exposed", f"others may read {path}", hint=f"rm {path}; {_AGAIN}")
            data = file.read(4096)
        try:
            value = json.loads(data)
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise Tampered("login.malformed", f"{path} is not a login", hint=f"rm {path}; {_AGAIN}")
        return value

    def _write(self, path: Path, value: dict[str, Any]) -> None:
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_whole(path, json.dumps(value).encode())
        except OSError as error:
            raise BackendError("login.unwritable", f"can't write {path}: {error.strerror}") from None


def signer_of(identities: Identities, sessions: SessionKeys, who: str, now: int) -> Signer:
    """The key to speak as `who` with: that of a login, else its own. A login counts first, since it is what somebody
    has asked for last. AuthRequired ``login.expired``, ``identity.missing``."""
    own = who in identities.ls()
    try:
        found = sessions.signer(who, now)
    except AuthRequired:
        if not own:
            raise
        found = None
    return found or identities.signer(who)


def acting(identities: Identities, sessions: SessionKeys, principal: str | None, *, whom: str, new: str) -> str:
    """Who to act as: `principal`, else the only one that this machine has a key of; whether that is somebody, the room
    says. `whom` and `new` are for AuthRequired ``principal.ambiguous``: whom it is about, and what one is called."""
    if principal is not None:
        return parse_principal(principal)
    mine = sorted({*identities.ls(), *sessions.ls()})
    if len(mine) == 1:
        return mine[0]
    raise AuthRequired(
        "principal.ambiguous",
        f"this machine has the keys of {', '.join(mine) or 'nobody'}; say who {whom}",
        hint=f"--as {mine[0]}" if mine else f"strongroom identity new {new}",
    )


def _signer(value: dict[str, Any]) -> Signer:
    try:
        return Signer(bytes.fromhex(value["seed"]))
    except (KeyError, TypeError, ValueError, UsageError):
        raise Tampered("login.malformed", "the file of a login has no key", hint=_AGAIN) from None
