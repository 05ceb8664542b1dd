"""How the gateway listens: uvicorn's server on uvloop, with connections of our own."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Any

import uvicorn

from strongroom.errors import BackendError
from strongroom.gateway.connection import Connection


def unusable(error: Exception) -> BackendError:
    """The error for a certificate, or a key, that TLS can't be had with."""
    return BackendError(
        "gateway.certificate",
        f"can't use the certificate: {error}",
        hint="--certificate FILE with the server's own and then what leads to its authority, PEM, and --key FILE with "
        "its private key; openssl x509 -in FILE -noout -subject shows whose the first one is",
    )


def configure(app: Any, certificate: tuple[Path, Path] | None = None) -> uvicorn.Config:
    """How `app` is served; with TLS where there are a certificate and its key. BackendError ``gateway.certificate``."""
    config = uvicorn.Config(
        app,
        interface="asgi3",  # which uvicorn knows by a coroutine function alone
        http=Connection,
        loop="uvloop",
        ws="none",
        lifespan="on",
        proxy_headers=False,  # who asks would name another network each time
        server_header=False,
        date_header=False,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=30,
        ssl_certfile=str(certificate[0]) if certificate else None,
        ssl_keyfile=str(certificate[1]) if certificate else None,
    )
    try:
        config.load()
    except (OSError, ssl.SSLError) as error:
        raise unusable(error) from None
    if config.ssl is not None:
        config.ssl.minimum_version = ssl.TLSVersion.TLSv1_2
    return config
