"""Bodies of many bytes (spec/http.md, sections 7 and 9), taken in as they come, by who is known to be their sender."""

from __future__ import annotations

import asyncio
import time

from anyio import from_thread
from starlette.requests import ClientDisconnect, Request

from strongroom.core.limits import LIMITS
from strongroom.errors import Conflict, LimitExceeded, UsageError

LENGTH = 4  # bytes of the number that such a body begins with
_PIECE_TIME = 60.0  # seconds in which the next bytes have to come
_RATE = 16 * 1024  # bytes in a second that they have to come at, after the first minute: they hold one of few slots


def check_length(request: Request, expected: int) -> None:
    """UsageError ``upload.length`` unless as many bytes are on their way as were announced: else the sender would learn
    after gigabytes that some are missing, or that nobody reads the last ones."""
    said = request.headers.get("content-length", "")
    if not said.isascii() or not said.isdigit() or int(said[:20]) != expected:
        raise UsageError(
            "upload.length",
            f"the files that are announced make a body of {expected} bytes, and the request says "
            f"{said[:20] or 'no length'}",
            hint=f"Content-Length: {expected}",
        )


class Stream:
    """The body of a request: for the event loop until it is known who speaks, then for the thread that takes it in."""

    def __init__(self, request: Request) -> None:
        self._pieces = request.stream().__aiter__()
        self._piece = memoryview(b"")
        self._begun, self._received = time.monotonic(), 0

    async def head(self) -> bytes:
        """What is sent before the files, behind its length; UsageError ``upload.malformed``, LimitExceeded
        ``upload.too_large``, ``server.too_slow``."""
        try:
            # As a whole: nobody knows yet who sends it.
            async with asyncio.timeout(_PIECE_TIME):
                length = int.from_bytes(await self.exactly(LENGTH), "big")
                if length > LIMITS.upload:
                    raise LimitExceeded(
                        "upload.too_large", f"the list of files has {length} bytes; at most {LIMITS.upload}"
                    )
                return await self.exactly(length)
        except TimeoutError:
            raise LimitExceeded(
                "server.too_slow",
                f"the list of files has to come within {_PIECE_TIME:.0f} seconds",
                hint="send it again",
            ) from None

    async def exactly(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            if not self._piece and not await self._next():
                raise UsageError("upload.malformed", "the upload ends within its head")
            wanted = size - len(data)
            data += self._piece[:wanted]
            self._piece = self._piece[wanted:]
        return bytes(data)

    def receive(self, buffer: memoryview) -> int:
        """Some bytes, into `buffer`; 0 at the end. Called in a thread."""
        if not self._piece and not from_thread.run(self._next):
            return 0
        count = min(len(buffer), len(self._piece))
        buffer[:count] = self._piece[:count]
        self._piece = self._piece[count:]
        return count

    async def _next(self) -> bool:
        """Whether more has come."""
        late = self._begun + _PIECE_TIME + self._received / _RATE - time.monotonic()
        try:
            async with asyncio.timeout(min(_PIECE_TIME, late)):
                while not self._piece:
                    self._piece = memoryview(await anext(self._pieces))
            self._received += len(self._piece)
        except StopAsyncIteration:
            return False
        except TimeoutError:
            raise LimitExceeded(
                "server.too_slow",
                f"the upload comes too slowly: at least {_RATE // 1024} KiB a second, and no pause of "
                f"{_PIECE_TIME:.0f} seconds",
                hint="send it again; a put goes on",
            ) from None
        except ClientDisconnect:
            raise Conflict("upload.interrupted", "the connection ended before the upload did") from None
        return True
