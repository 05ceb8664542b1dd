"""``passphrase:``: Argon2id (RFC 9106) over a passphrase. No key is stored anywhere.

A wrapped key carries what is needed to derive again, in an envelope (envelope.py)::

    memory KiB u32 | passes u32 | lanes u32 | salt 16 | sealed box (sealing.py)

all integers big-endian. New keys are wrapped with the second recommended option of RFC 9106 section 4 (64 MiB,
3 passes, 4 lanes); the first (2 GiB, 1 pass, 4 lanes) is read too. The passphrase is all there is between the database
and the room's keys: whoever has a copy of the database may guess at leisure, with 64 MiB of memory for each guess.
"""

from __future__ import annotations

import getpass
import os
import struct
import sys
import unicodedata

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.kdf.argon2 import Argon2id

from strongroom.crypto.keys import KEY_BYTES
from strongroom.crypto.keystores import PassphraseSource, Purpose, envelope
from strongroom.crypto.sealing import OVERHEAD, seal, unseal
from strongroom.errors import Sealed, Tampered, UsageError

MIN_CHARACTERS = 12
_MAX_BYTES = 1024
_MAGIC = b"SRPW\x01\x00\x00\x00"
_SALT_BYTES = 16
_PARAMETERS = struct.Struct(">III")
_MEMORY, _PASSES, _LANES = 64 * 1024, 3, 4
_MAX_MEMORY, _MAX_PASSES, _MAX_LANES = 2 * 1024 * 1024, 16, 16
_MAX_WORK = 2 * _MAX_MEMORY  # KiB times passes


class PassphraseKeystore:
    """Keys under a passphrase, which is asked for once, when it is first needed, and kept for this object's life."""

    def __init__(self, passphrase: PassphraseSource | None = None, *, known: bytes | None = None) -> None:
        self.uri = "passphrase:"
        self._source = passphrase or from_environment
        self._known = known
        self._retired = False

    @classmethod
    def create(cls, uri: str, passphrase: PassphraseSource | None = None) -> PassphraseKeystore:
        """Ask for a new room's passphrase; UsageError when it is too short, Sealed when there is none to be had."""
        _require_bare(uri)
        return cls(passphrase, known=_new(passphrase or from_environment, "create"))

    @classmethod
    def open(cls, uri: str, passphrase: PassphraseSource | None = None) -> PassphraseKeystore:
        """The passphrase of an existing room, asked for when it is first needed."""
        _require_bare(uri)
        return cls(passphrase)

    def wrap(self, key: bytes, context: str) -> bytes:
        head = _PARAMETERS.pack(_MEMORY, _PASSES, _LANES) + os.urandom(_SALT_BYTES)
        box = seal(self._derive(head), envelope.require_key(key), context)
        return envelope.close(_MAGIC, head + box, context)

    def unwrap(self, wrapped: bytes, context: str) -> bytes:
        head = _PARAMETERS.size + _SALT_BYTES
        body = envelope.open_(_MAGIC, wrapped, context, head + OVERHEAD + KEY_BYTES)
        try:
            return envelope.require_unwrapped(unseal(self._derive(body[:head]), body[head:], context))
        except Tampered as error:
            if error.code != "key.wrong":
                raise
        raise Sealed(
            "keystore.wrong_passphrase",
            "the passphrase is not the one that the room's key was wrapped with",
            hint="check STRONGROOM_PASSPHRASE, or type it again",
        )

    def rotate(self) -> PassphraseKeystore:
        """Ask for the new passphrase and return the key store that wraps with it."""
        self._passphrase()  # fails here, before anything is asked, when the present one is not to be had
        return PassphraseKeystore(self._source, known=_new(self._source, "rotate"))

    def retire(self) -> None:
        """Forget the passphrase. Old copies of the database still open with it."""
        self._known = None
        self._retired = True

    def check(self) -> dict[str, str | bool]:
        origin, notes = "", ""
        if self._source is not from_environment:
            origin = "the program"
        elif os.environ.get("STRONGROOM_PASSPHRASE_FD"):
            origin = "STRONGROOM_PASSPHRASE_FD"
        elif os.environ.get("STRONGROOM_PASSPHRASE"):
            origin = "STRONGROOM_PASSPHRASE"
            notes = "other processes of this user and root can read STRONGROOM_PASSPHRASE; a descriptor is safer"
        elif sys.stdin is not None and sys.stdin.isatty():
            origin = "the terminal"
        else:
            notes = "no passphrase: set STRONGROOM_PASSPHRASE_FD or STRONGROOM_PASSPHRASE"
        return {
            "uri": self.uri,
            "reachable": bool(origin),
            "permissions": f"asked from {origin}" if origin else "",
            "key_type": f"Argon2id, {_MEMORY // 1024} MiB, {_PASSES} passes, {_LANES} lanes; AES-256-GCM",
            "notes": notes,
        }

    def _passphrase(self) -> bytes:
        if self._retired:
            raise Sealed("keystore.retired", "this passphrase was retired by a rotation", hint="use the new passphrase")
        if self._known is None:
            self._known = _normal(self._source("open"))
        return self._known

    def _derive(self, head: bytes) -> bytes:
        memory, passes, lanes = _PARAMETERS.unpack_from(head)
        # Anybody who can write to the database can write these: bound them, or a read takes 4 TiB or four days.
        if not (
            _MEMORY <= memory <= _MAX_MEMORY
            and 1 <= passes <= _MAX_PASSES
            and 1 <= lanes <= _MAX_LANES
            and memory * passes <= _MAX_WORK
        ):
            raise Tampered(
                "keystore.parameters",
                f"the wrapped key asks for Argon2id with {memory} KiB, {passes} passes and {lanes} lanes, "
                "which no release of Strongroom writes",
            )
        passphrase = self._passphrase()
        salt = head[_PARAMETERS.size :]
        try:
            kdf = Argon2id(salt=salt, length=KEY_BYTES, iterations=passes, lanes=lanes, memory_cost=memory)
            return kdf.derive(passphrase)
        except MemoryError:
            raise Sealed(
                "keystore.no_memory",
                f"Argon2id needs {memory // 1024} MiB of memory, which this machine did not give",
                hint="free some memory and try again",
            ) from None
        except UnsupportedAlgorithm:
            raise Sealed(
                "keystore.no_argon2",
                "the OpenSSL in use has no Argon2id",
                hint="install the cryptography package as a wheel, which brings its own OpenSSL",
            ) from None


def from_environment(purpose: Purpose) -> str:
    """The passphrase from an inherited descriptor, the environment or the terminal, in this order.

    STRONGROOM_PASSPHRASE_FD and STRONGROOM_PASSPHRASE name it ("open", "create"); STRONGROOM_NEW_PASSPHRASE_FD and
    STRONGROOM_NEW_PASSPHRASE its successor ("rotate"). A pipe gives it once only. Sealed when there is none of them.
    """
    variable = "STRONGROOM_NEW_PASSPHRASE" if purpose == "rotate" else "STRONGROOM_PASSPHRASE"
    if descriptor := os.environ.get(f"{variable}_FD"):
        return _from_descriptor(f"{variable}_FD", descriptor)
    if text := os.environ.get(variable):
        return text
    if sys.stdin is not None and sys.stdin.isatty():
        return _from_terminal(purpose)
    raise Sealed(
        "keystore.no_passphrase",
        "the room is locked with a passphrase, and there is no terminal to ask for it",
        hint=f"set {variable}_FD to a descriptor that it can be read from, or {variable}",
    )


def _from_descriptor(variable: str, descriptor: str) -> str:
    if not (descriptor.isascii() and descriptor.isdigit() and len(descriptor) < 10):
        raise UsageError("keystore.bad_descriptor", f"{variable} is the number of a descriptor, such as 3")
    data = b""
    try:
        while len(data) <= _MAX_BYTES and (part := os.read(int(descriptor), _MAX_BYTES + 1)):
            data += part
    except OSError as error:
        raise Sealed(
            "keystore.no_passphrase",
            f"cannot read the passphrase from descriptor {descriptor}: {error.strerror}",
            hint=f"open the descriptor in the parent, for example: {variable}=3 strongroom … 3< passphrase-file",
        ) from None
    try:
        text = data.decode().removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError:
        raise UsageError("keystore.passphrase_malformed", "the passphrase is not UTF-8 text") from None
    if not text:
        raise Sealed(
            "keystore.no_passphrase",
            f"descriptor {descriptor} holds no passphrase; a pipe can be read once only",
            hint=f"pass a new descriptor in {variable}",
        )
    return text


def _from_terminal(purpose: Purpose) -> str:
    try:
        if purpose == "open":
            return getpass.getpass("Passphrase of the room: ")
        first = getpass.getpass("New passphrase of the room: ")
        second = getpass.getpass("The same again: ")
    except EOFError:
        raise Sealed("keystore.no_passphrase", "the terminal was closed before a passphrase was typed") from None
    if first != second:
        raise UsageError("keystore.passphrase_mismatch", "the two passphrases differ", hint="type the same one twice")
    return first


def _new(source: PassphraseSource, purpose: Purpose) -> bytes:
    text = source(purpose)
    if len(unicodedata.normalize("NFKC", text)) < MIN_CHARACTERS:
        raise UsageError(
            "keystore.passphrase_short",
            f"a passphrase has at least {MIN_CHARACTERS} characters",
            hint="five or more words drawn at random are easy to type and hard to guess",
        )
    return _normal(text)


def _normal(text: str) -> bytes:
    """NFKC, UTF-8: keyboards and systems write the same letters in different ways (NIST SP 800-63B section 3.1.1.2)."""
    try:
        data = unicodedata.normalize("NFKC", text).encode()
    except UnicodeEncodeError:
        raise UsageError("keystore.passphrase_malformed", "the passphrase is not UTF-8 text") from None
    if len(data) > _MAX_BYTES:
        raise UsageError("keystore.passphrase_long", f"a passphrase has at most {_MAX_BYTES} bytes")
    return data


def _require_bare(uri: str) -> None:
    if uri != "passphrase:":
        # The text is not repeated: it may be the passphrase.
        raise UsageError(
            "keystore.bad_uri",
            "passphrase: takes nothing after the colon; the passphrase never stands in a URI or a command line",
            hint="--keystore passphrase: and STRONGROOM_PASSPHRASE_FD, STRONGROOM_PASSPHRASE or the terminal",
        )
