"""Small documents of other people's web servers: of identity providers. https only, no redirects, bounded."""

from __future__ import annotations

import json
import ssl
import time
from http.client import HTTPException, HTTPSConnection
from typing import Any
from urllib.parse import urlencode, urlsplit

from strongroom.errors import BackendError, UsageError

_TIME = 10.0  # seconds that one answer may take in all
_MOST = 256 * 1024


def fetch(url: str, ca: str = "", form: dict[str, str] | None = None) -> dict[str, Any]:
    """The JSON object at `url`, which is https; with `form` the answer to that, posted. `ca`: the certificate
    authorities to believe, PEM; empty: those of this machine. BackendError ``issuer.unreachable``, for every answer
    that is not one; UsageError ``issuer.address``."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port or 443
    except ValueError:
        parts, host, port = urlsplit(""), "", 0
    plain = url.isascii() and url.isprintable() and " " not in url
    if not plain or not host or not url.startswith("https://") or "@" in parts.netloc:
        raise UsageError("issuer.address", f"{url!r:.200} is not https://HOST/PATH")
    end = time.monotonic() + _TIME
    try:
        context = ssl.create_default_context(cadata=ca or None)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        connection = HTTPSConnection(host, port, timeout=_TIME, context=context)
        try:
            path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            headers = {"Accept": "application/json"}
            if form is None:
                connection.request("GET", path, headers=headers)
            else:
                headers["Content-Type"] = "application/x-www-form-urlencoded"
                connection.request("POST", path, urlencode(form), headers)
            with connection.getresponse() as response:
                data = bytearray()
                while piece := response.read1(65536):
                    data += piece
                    if len(data) > _MOST or time.monotonic() > end:
                        raise _unreachable(host, f"its answer has more than {_MOST} bytes, or takes too long")
        finally:
            connection.close()
    except (OSError, HTTPException, ssl.SSLError, ValueError) as error:
        raise _unreachable(host, getattr(error, "verify_message", "") or type(error).__name__) from None
    # A redirect is not followed: it would be another server that is believed.
    if response.status != 200:
        raise _unreachable(host, f"it answers {response.status}")
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise _unreachable(host, "its answer is not a JSON object")
    return value


def _unreachable(host: str, why: str) -> BackendError:
    return BackendError(
        "issuer.unreachable", f"the identity provider at {host} can't be asked: {why}", hint="try again"
    )
