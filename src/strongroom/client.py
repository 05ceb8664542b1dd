"""The room as a Python program sees it: `strongroom.open(...)`, the same methods for an embedded and, later, a served
room."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import unquote, urlsplit

from strongroom.core.settings import Settings
from strongroom.errors import UsageError

if TYPE_CHECKING:
    from types import TracebackType

    from strongroom.crypto.keystores import PassphraseSource
    from strongroom.load.reader import ImageReader
    from strongroom.load.safe_open import SafeOpen
    from strongroom.load.weights import Weights
    from strongroom.vault.fsck import FsckReport
    from strongroom.vault.status import Check
    from strongroom.vault.vault import PutResult
    from strongroom.vault.verify import VerifyReport
    from strongroom.vault.versions import VersionInfo

Progress = Callable[[int, int], None]


def _silent(done: int, total: int) -> None:
    pass


def room_folder(room: str | Path) -> Path:
    """The folder that a path or a ``file:`` URL names; UsageError ``room.not_a_folder`` for every other URL."""
    if isinstance(room, Path) or "://" not in room:
        return Path(room)
    try:
        parts = urlsplit(room)
        path = unquote(parts.path) if parts.scheme == "file" and parts.netloc in ("", "localhost") else ""
    except ValueError:  # brackets that hold no IPv6 address
        raise _no_folder(room, "it is malformed") from None
    if parts.scheme in ("http", "https"):
        raise _no_folder(room, "rooms that a server offers come with a later release; this one opens rooms in folders")
    if not path or "\0" in path or parts.query or parts.fragment:
        raise _no_folder(room, "a room is a folder, or file:///its/path")
    return Path(path)


def _no_folder(room: str, why: str) -> UsageError:
    return UsageError(
        "room.not_a_folder", f"{room} is not a room that can be opened from here: {why}", hint="--room FOLDER"
    )


class Room:
    """A room, as one principal. Make one with `Room.init`, open one with `strongroom.open`."""

    def __init__(
        self, folder: str | Path, principal: str | None = None, *, passphrase: PassphraseSource | None = None
    ) -> None:
        from strongroom.vault.vault import Vault

        self._vault = Vault(room_folder(folder), passphrase=passphrase)
        self._principal = principal

    @classmethod
    def init(
        cls,
        folder: str | Path,
        *,
        store: str = "store",
        db: str = "sqlite:room.db",
        keystore: str = "file:keys/room.key",
        recovery: tuple[int, int] | None = None,
        owner: str = "user/owner",
        passphrase: PassphraseSource | None = None,
    ) -> tuple[Room, list[str]]:
        """Make a room; returns it and its recovery shares (`recovery` = (needed, made)), which are kept nowhere
        else."""
        from strongroom.vault.vault import Vault

        vault, shares = Vault.init(
            room_folder(folder),
            store=store,
            db=db,
            keystore=keystore,
            recovery=recovery,
            owner=owner,
            passphrase=passphrase,
        )
        vault.close()
        return cls(folder, owner, passphrase=passphrase), [str(share) for share in shares]

    def close(self) -> None:
        self._vault.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def principal(self) -> str:
        """Who this room is opened as."""
        return self._vault.principal(self._principal)

    # -- weights -------------------------------------------------------------------------------------------------

    def put(
        self,
        path: str | Path,
        name: str,
        *,
        share: str = "1/8",
        positions: int = 16384,
        suite: str = "blake3",
        convert: bool = False,
        follow_links: bool = False,
        progress: Progress = _silent,
    ) -> PutResult:
        """Store a model directory, a safetensors file or a GGUF file as the next version of `name`."""
        import contextlib

        from strongroom.formats.suites import Suite
        from strongroom.vault.convert import converted
        from strongroom.vault.source import ModelSource

        if suite.upper() not in Suite.__members__:
            raise UsageError("put.suite", f"there is no suite {suite!r}", hint="--suite blake3 or --suite sha256")
        with contextlib.ExitStack() as stack:
            if convert:
                source = stack.enter_context(converted(Path(path), follow_links=follow_links))
            else:
                source = ModelSource.scan(Path(path), follow_links=follow_links)
            return self._vault.put(
                source,
                name,
                by=self.principal,
                share=share,
                positions=positions,
                suite=Suite[suite.upper()],
                progress=progress,
            )

    def ls(self, name: str | None = None) -> list[VersionInfo]:
        """Versions, oldest first. Needs no key."""
        return self._vault.ls(name)

    def show(self, ref: str) -> dict[str, Any]:
        """Everything about one version, files and geometry included."""
        return self._vault.show(ref)

    def verify(self, ref: str, *, deep: bool = False, progress: Progress = _silent) -> VerifyReport:
        """Check every byte in the store; `deep` also decrypts both variants and compares with what was put."""
        return self._vault.verify(ref, deep=deep, progress=progress)

    def rotate(self, ref: str, *, progress: Progress = _silent) -> dict[str, Any]:
        """Re-encrypt one version under new keys; marks and code words stay."""
        return self._vault.rotate(ref, by=self.principal, progress=progress)

    def shred(self, ref: str, *, confirm: str) -> dict[str, Any]:
        """Destroy one version's keys and ciphertext; `confirm` repeats its full name."""
        return self._vault.shred(ref, confirm=confirm)

    # -- reading -------------------------------------------------------------------------------------------------

    def reader(self, ref: str) -> ImageReader:
        """A reader of one version, with this principal's key bundle."""
        from strongroom.load.reader import ImageReader

        return ImageReader(self._vault.blobs, self._vault.bundle(ref, self.principal))

    def load(self, ref: str) -> Weights:
        """One version as a lazy mapping from tensor names to arrays; see `Weights` for whole-model reads."""
        from strongroom.load.weights import Weights

        return Weights(self.reader(ref))

    def grant(self, ref: str) -> tuple[str, bytes]:
        """The store's URL and this principal's encoded key bundle: what ``strongroom run`` hands to its child.
        Secret."""
        return self._vault.blobs.url, self._vault.bundle(ref, self.principal).encode()

    # -- the room itself -----------------------------------------------------------------------------------------

    def principal_add(self, path: str) -> None:
        self._vault.principal_add(path)

    def principal_ls(self) -> list[dict[str, Any]]:
        return self._vault.principal_ls()

    def status(self) -> dict[str, Any]:
        from strongroom.vault.status import status

        return status(self._vault)

    def doctor(self) -> list[Check]:
        from strongroom.vault.status import doctor

        return doctor(self._vault)

    def fsck(self, *, repair: bool = False) -> FsckReport:
        from strongroom.vault.fsck import fsck

        return fsck(self._vault, repair=repair)

    def keystore_rotate(self, to: str | None = None) -> dict[str, int | str]:
        """A new room key under a new key-encryption key, or in another key store."""
        return self._vault.keys.rotate(to)

    def recovery_drill(self, shares: Sequence[str]) -> None:
        """Prove that these shares open the room."""
        from strongroom.crypto.shamir import Share

        self._vault.keys.drill([Share.parse(share) for share in shares])

    def recover(self, shares: Sequence[str], keystore: str) -> dict[str, int | str]:
        """Open a room whose key store is lost, and give it another."""
        from strongroom.crypto.shamir import Share

        return self._vault.keys.recover([Share.parse(share) for share in shares], keystore)


def open(room: str | Path | None = None, principal: str | None = None) -> Room:  # noqa: A001 - the public name
    """Open a room: a folder or its ``file:`` URL (default: ``STRONGROOM_ROOM``, else ``./room``), as `principal`
    (default: ``STRONGROOM_AS``, else the only local identity). UsageError inside ``strongroom run``."""
    settings = Settings.from_environment()
    if settings.grant is not None:
        raise _no_room_here("strongroom.safe_open(REF, …) and the loaders read what this process was given")
    return Room(room or settings.room, principal or settings.principal)


def safe_open(
    ref: str,
    framework: str,
    device: str | int = "cpu",
    *,
    file: str | None = None,
    room: str | Path | None = None,
) -> SafeOpen:
    """`safetensors.safe_open` for weights in the room: same methods, and a slice fetches only what it touches.

    `file` names one weights file of the version (default: the tensors of all). Inside ``strongroom run`` the grant of
    the parent is used, and naming a `room` there is a UsageError; elsewhere the room is opened.
    """
    from strongroom.load.safe_open import SafeOpen
    from strongroom.load.source import resolve

    if room is None:
        reader = resolve(ref)
    elif Settings.from_environment().grant is not None:
        # A child that is denied something must not get round that by naming the room.
        raise _no_room_here("leave out room=, or run it without strongroom run")
    else:
        reader = read_once(ref, room)
    return SafeOpen(reader, framework, device, file=file)


def _no_room_here(hint: str) -> UsageError:
    return UsageError(
        "grant.room",
        "this process runs under strongroom run and reads what it was given; it opens no room",
        hint=hint,
    )


def read_once(ref: str, room: str | Path | None = None) -> ImageReader:
    """A reader of `ref` that outlives the room it is from: it has its key bundle and the store, and no database."""
    with open(room) as opened:
        return opened.reader(ref)
