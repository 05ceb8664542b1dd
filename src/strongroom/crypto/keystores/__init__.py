"""Key stores: where the key that wraps a room's key lives, chosen by URI.

::

    file:PATH                                  a random key in a file that only its owner may read
    passphrase:                                Argon2id over a passphrase that somebody types or a supervisor passes in
    openbao:https://HOST:PORT/MOUNT/KEY        the transit engine of OpenBao (or Vault: vault:https://…)

A key store wraps 32-byte keys for a named context and unwraps them for the same context only. The caller keeps the
wrapped bytes. A key store that is down, locked or refuses raises `Sealed`, which may be tried again; there is never
another key to fall back on. Each backend is one module here, imported only when its scheme is used.

Changing the key-encryption key, in an order that a crash at any point survives::

    new = old.rotate()  # both unwrap what they wrapped
    wrapped = new.wrap(room_key, context)  # then store `wrapped` and `new.uri` in one transaction
    old.retire()  # only now is the old key destroyed
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal, Protocol

from strongroom.errors import UsageError

SCHEMES = ("file:", "passphrase:", "openbao:", "vault:")

Purpose = Literal["open", "create", "rotate"]
PassphraseSource = Callable[[Purpose], str]
"""Returns the passphrase in use ("open"), the first one of a new room ("create"), or its successor ("rotate")."""


class Keystore(Protocol):
    """One key-encryption key, wherever it lives."""

    @property
    def uri(self) -> str:
        """What `open_keystore` takes to open this key store again. Holds no secret."""

    def wrap(self, key: bytes, context: str) -> bytes:
        """Encrypt a 32-byte uniformly random `key` for `context`, a string that names the room and the purpose.

        Sealed when the key store is not to be had; UsageError when `key` is not 32 bytes.
        """

    def unwrap(self, wrapped: bytes, context: str) -> bytes:
        """The 32-byte key inside `wrapped`.

        Sealed when the key store is not to be had or refuses (try again); Truncated or Tampered when `wrapped` is not
        whole, was altered, or belongs to another context.
        """

    def rotate(self) -> Keystore:
        """Make a new key-encryption key and return the key store that wraps with it; this one still unwraps."""

    def retire(self) -> None:
        """Destroy this superseded key where that is possible; afterwards this object may no longer unwrap."""

    def check(self) -> dict[str, str | bool]:
        """Facts for ``strongroom doctor``: uri, reachable, permissions, key_type, notes. Asks nobody for a secret."""


def create_keystore(
    uri: str, room_id_hex: str, folder: Path, *, passphrase: PassphraseSource | None = None
) -> Keystore:
    """The key store for a new room: makes the key, or makes sure that the one `uri` names is there and fit.

    `folder` is the room's folder, against which relative paths are read; `passphrase` is asked instead of environment
    and terminal. UsageError for a URI that names no key store, or a key or passphrase that does not do; Conflict when
    the key file is already there; Sealed or BackendError when the backend fails.
    """
    match _scheme(uri):
        case "file":
            from strongroom.crypto.keystores.file import FileKeystore

            return FileKeystore.create(uri, room_id_hex, folder)
        case "passphrase":
            from strongroom.crypto.keystores.passphrase import PassphraseKeystore

            return PassphraseKeystore.create(uri, passphrase)
        case _:
            from strongroom.crypto.keystores.openbao import OpenBaoKeystore

            return OpenBaoKeystore.create(uri)


def open_keystore(uri: str, room_id_hex: str, folder: Path, *, passphrase: PassphraseSource | None = None) -> Keystore:
    """The key store of an existing room. Reads no secret and reaches no server until it is used."""
    match _scheme(uri):
        case "file":
            from strongroom.crypto.keystores.file import FileKeystore

            return FileKeystore(uri, room_id_hex, folder)
        case "passphrase":
            from strongroom.crypto.keystores.passphrase import PassphraseKeystore

            return PassphraseKeystore.open(uri, passphrase)
        case _:
            from strongroom.crypto.keystores.openbao import OpenBaoKeystore

            return OpenBaoKeystore(uri)


def _scheme(uri: str) -> str:
    scheme, colon, _ = uri.partition(":")
    if f"{scheme}{colon}" in SCHEMES:
        return scheme
    # The text itself is not repeated: somebody may have typed a passphrase or a token where the URI belongs.
    raise UsageError(
        "keystore.unknown_scheme",
        "no key store has the scheme of this URI; known are " + ", ".join(SCHEMES),
        hint="for example --keystore file:room.key",
        known=list(SCHEMES),
    )
