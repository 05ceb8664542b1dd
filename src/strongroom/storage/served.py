"""The store of a served room, as its holders see it: ciphertext, read through the custodian with a pass."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NoReturn
from urllib.parse import urlsplit

from strongroom.errors import LimitExceeded, Truncated, UsageError
from strongroom.storage.blobs import check_name
from strongroom.storage.session import Session, card_of

if TYPE_CHECKING:
    from typing_extensions import Buffer

_PIECE = 32 << 20  # of one request


class ServedBlobs:
    """Reads of `Blobs` at ``https://HOST:PORT/v1/objects/PASS``; all that writes is UsageError
    ``store.read_only_here``."""

    near = False

    def __init__(self, url: str) -> None:
        self.url = url
        self._session = Session(card_of(url))
        self._path = urlsplit(url).path.rstrip("/")
        self._sizes: dict[str, int] = {}

    def read(self, name: str, *, limit: int) -> bytes:
        size = self.size(name)
        if size > limit:
            raise LimitExceeded("store.too_large", f"{name} has {size} bytes, at most {limit} are read")
        buffer = bytearray(size)
        self.read_into(name, 0, memoryview(buffer))
        return bytes(buffer)

    def read_at_once(self, name: str) -> bytes:
        """The whole of what is made as it is asked for, and so has no size before."""
        return self._session.request("GET", f"{self._path}/{check_name(name)}")

    def size(self, name: str) -> int:
        return self._session.size(f"{self._path}/{check_name(name)}")

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        buffer = buffer.cast("B")
        for begin in range(0, len(buffer), _PIECE):
            piece = buffer[begin : begin + _PIECE]
            first = offset + begin
            headers = {"Range": f"bytes={first}-{first + len(piece) - 1}"}
            data = self._session.request("GET", f"{self._path}/{check_name(name)}", headers=headers)
            if len(data) != len(piece):
                raise Truncated("store.short_read", f"{name} ends within the {len(piece)} bytes from {first}")
            piece[:] = data

    def read_ranges_into(self, name: str, ranges: Sequence[tuple[int, memoryview]]) -> None:
        for offset, buffer in ranges:
            self.read_into(name, offset, buffer)

    def close(self) -> None:
        self._session.close()

    # -- what the custodian does itself --------------------------------------------------------------------------

    def write(self, name: str, chunks: Iterable[Buffer]) -> int:  # noqa: ARG002
        self._refuse()

    def delete(self, name: str) -> None:  # noqa: ARG002
        self._refuse()

    def list(self, folder: str = "") -> Iterator[tuple[str, int]]:  # noqa: ARG002
        self._refuse()

    def leftovers(self) -> Sequence[tuple[str, int]]:
        self._refuse()

    def sweep(self, older_than_s: float = 3600.0) -> int:  # noqa: ARG002
        self._refuse()

    def check(self) -> dict[str, Any]:
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise UsageError("store.read_only_here", "the store of a served room is read from here, and not changed")
