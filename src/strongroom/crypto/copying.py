"""How a plaintext copy is encrypted on its way from the custodian to its holder (spec/release.md, section 4)."""

from __future__ import annotations

import struct

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from strongroom.crypto.keys import derive
from strongroom.errors import Tampered

TAG_BYTES = 16
_LABEL = b"strongroom/1 copy\x00"
_NUMBERS = struct.Struct(">QQ")


def copying_key(root: bytes, leaf: bytes, piece: int, *, formed: bool = False) -> bytes:
    """The key of the copy that the log's entry of this leaf hash released, in pieces of `piece` bytes; `formed` where
    it leaves quantised. The size of the pieces is in it, and which edition of the forms: under one key a number never
    stands for two plaintexts."""
    return derive(root, "copy in a form 2" if formed else "copy", leaf + piece.to_bytes(8, "big"))


class CopyCipher:
    """Seals and opens the pieces of one copy of `image` bytes."""

    def __init__(self, key: bytes, leaf: bytes, image: int) -> None:
        self._aead, self._leaf, self._image = AESGCM(key), leaf, image

    def seal(self, number: int, plaintext: bytes | memoryview) -> bytes:
        return self._aead.encrypt(number.to_bytes(12, "little"), plaintext, self._bound(number))

    def open(self, number: int, sealed: bytes | memoryview) -> bytes:
        """Tampered ``copy.tampered`` unless it is this very piece of this very copy."""
        try:
            return self._aead.decrypt(number.to_bytes(12, "little"), sealed, self._bound(number))
        except InvalidTag:
            raise Tampered(
                "copy.tampered", f"piece {number} of the copy was altered on its way", hint="take the copy again"
            ) from None

    def _bound(self, number: int) -> bytes:
        return _LABEL + self._leaf + _NUMBERS.pack(self._image, number)
