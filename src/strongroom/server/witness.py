"""A witness over HTTP (C2SP tlog-witness): ``POST /add-checkpoint``, and nothing else.

Plain HTTP, since what it takes and gives is signed; put it behind whatever terminates TLS where names of logs are
private.
"""

from __future__ import annotations

from http.server import BaseHTTPRequestHandler
from typing import Any, ClassVar

from strongroom.core.limits import LIMITS
from strongroom.errors import BackendError, Conflict, Denied, LimitExceeded, NotFound, StrongroomError, Tampered
from strongroom.ledger.witness import Witness
from strongroom.server.bounded import BoundedServer

_TIMEOUT = 10.0  # seconds without a byte of a request
# In the words of the specification; a proof that does not verify is told from a request that is not one by its code.
_STATUS: tuple[tuple[type[StrongroomError], int], ...] = (
    (NotFound, 404),
    (Denied, 403),
    (Conflict, 409),
    (LimitExceeded, 413),
    (BackendError, 503),
    (Tampered, 400),
)


class WitnessServer(BoundedServer):
    """`witness` on `address`, a pair of host and port; port 0 is any that is free."""

    def __init__(self, witness: Witness, address: tuple[str, int], **bounds: Any) -> None:
        self.witness = witness
        super().__init__(address, _Handler, **bounds)


class _Handler(BaseHTTPRequestHandler):
    server: WitnessServer
    timeout = _TIMEOUT
    protocol_version = "HTTP/1.1"
    server_version = "strongroom-witness"
    sys_version = ""
    _TYPES: ClassVar[dict[int, str]] = {409: "text/x.tlog.size"}

    def do_POST(self) -> None:
        if self.path.rstrip("/") != "/add-checkpoint":
            self._answer(404, b"")
            return
        length = self.headers.get("Content-Length", "")
        number = int(length) if length.isascii() and length.isdigit() and len(length) < 10 else None
        if number is None or number > LIMITS.note:
            self.close_connection = True  # what follows can't be told from the next request
            self._answer(413 if length.isdigit() else 411, b"")
            return
        try:
            self._answer(200, self.server.witness.add_checkpoint(self.rfile.read(number)))
        except StrongroomError as error:
            status = next((code for kind, code in _STATUS if isinstance(error, kind)), 500)
            if error.code == "log.consistency":
                status = 422
            size = error.evidence.get("size")
            self._answer(status, b"" if size is None else f"{size}\n".encode())

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", self._TYPES.get(status, "text/plain; charset=utf-8"))
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - http.server's name
        """Requests are not printed: only the command line prints."""
