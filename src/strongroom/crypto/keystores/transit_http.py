"""One HTTP request to a key store, by the standard library, against a server that may be slow, huge or hostile.

Every failure on the way is `Sealed`. One deadline covers the whole request: a server that sends a byte now and then
does not hold a custodian up. Redirects and proxies are not followed. Nothing that was sent is repeated in an error.
"""

from __future__ import annotations

import io
import json
import re
import socket
import ssl
import time
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from typing import TYPE_CHECKING, Any

from strongroom.errors import Sealed

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

MAX_ANSWER_BYTES = 256 * 1024
# A run of characters that could be a token or a key in base64 or hex.
_SECRET_LIKE = re.compile(r"[A-Za-z0-9+/=_.\-]{16,}")


@dataclass(frozen=True)
class Answer:
    """An HTTP status, the JSON object that came with it ({} for none), and the server's own words on what is wrong."""

    status: int
    body: dict[str, Any]

    @property
    def problem(self) -> str:
        errors = self.body.get("errors")
        texts = [text for text in errors if isinstance(text, str)] if isinstance(errors, list) else []
        words = " ".join("; ".join(texts)[:1000].split())
        # A hostile server can send our token or the key back to have it land in a log.
        clean = "".join(letter if " " <= letter <= "~" else "?" for letter in words)
        return _SECRET_LIKE.sub("…", clean)[:200]


def request(
    host: str,
    port: int,
    tls: ssl.SSLContext | None,
    method: str,
    path: str,
    headers: dict[str, str],
    body: dict[str, Any] | None,
    *,
    timeout: float,
) -> Answer:
    """The answer to one request; Sealed when there is none within `timeout` seconds, or it is no JSON object."""
    deadline = time.monotonic() + timeout
    server = f"{host}:{port}"
    connection: HTTPConnection
    if tls is None:
        connection = HTTPConnection(host, port, timeout=timeout)
    else:
        connection = HTTPSConnection(host, port, timeout=timeout, context=tls)
    data = None if body is None else json.dumps(body).encode()
    try:
        connection.request(method, path, data, {**headers, "Content-Type": "application/json", "Connection": "close"})
        status, content = _receive(connection.sock, method, deadline)
    except ssl.SSLCertVerificationError as error:
        raise Sealed(
            "keystore.certificate",
            f"the certificate of the key store {server} does not verify: {error.verify_message}",
            hint="set BAO_CACERT to the file of the authority that issued it",
        ) from None
    except TimeoutError:
        raise Sealed(
            "keystore.timeout", f"the key store {server} gave no whole answer within {timeout:g} s", hint="try again"
        ) from None
    except (OSError, HTTPException, ValueError) as error:
        # By its class only: the text of such an error may quote what was sent or received.
        reason = error.strerror if isinstance(error, OSError) and error.strerror else type(error).__name__
        raise Sealed(
            "keystore.unreachable", f"cannot reach the key store {server}: {reason}", hint="start it, then try again"
        ) from None
    finally:
        connection.close()
    return Answer(status, _parse(content, server, status))


def _receive(sock: Any, method: str, deadline: float) -> tuple[int, bytes]:
    with _Response(sock, method, deadline) as response:
        response.begin()
        return response.status, response.read(MAX_ANSWER_BYTES + 1)


def _parse(content: bytes, server: str, status: int) -> dict[str, Any]:
    problem = f"is over {MAX_ANSWER_BYTES} bytes"
    if len(content) <= MAX_ANSWER_BYTES:
        if not content:
            return {}
        try:
            value = json.loads(content)
        except (ValueError, RecursionError):
            value = None
        if isinstance(value, dict):
            return value
        if status != 200:
            return {}  # a proxy or a load balancer speaks HTML; its status says enough
        problem = "is no JSON object"
    raise Sealed(
        "keystore.bad_answer",
        f"the answer of the key store {server} {problem}",
        hint="check the address and the mount in the key store's URI",
        status=status,
    )


class _Response(HTTPResponse):
    """A response whose every read from the socket gets only what is left until the deadline."""

    def __init__(self, sock: socket.socket, method: str, deadline: float) -> None:
        super().__init__(sock, method=method)
        self.fp.close()
        self.fp = io.BufferedReader(_DeadlineReader(sock, deadline))


class _DeadlineReader(io.RawIOBase):
    def __init__(self, sock: socket.socket, deadline: float) -> None:
        self._sock = sock
        self._deadline = deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._sock.settimeout(left)
        return self._sock.recv_into(buffer)
