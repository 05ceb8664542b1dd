"""``openbao:https://HOST:PORT/MOUNT/KEY``, also ``vault:``: the transit engine of OpenBao and HashiCorp Vault.

The key-encryption key never leaves the server. A wrapped key, in an envelope (envelope.py), is::

    commitment 32 | the server's ciphertext, such as vault:v1:…

The context goes to the server as associated data. The commitment binds key and context a second time on this side, so
that a server which ignores associated data (Vault before 1.13) or answers with another key is found out.

MOUNT may have several parts and begin with a namespace. Plain http is for loopback only. The environment is read as the
``bao`` and ``vault`` programs read it, at every use: BAO_TOKEN, else the file of BAO_TOKEN_PATH or ``~/.vault-token``;
BAO_NAMESPACE; BAO_CACERT, BAO_CAPATH, BAO_CLIENT_CERT and BAO_CLIENT_KEY; each also as VAULT_…. There is no switch for
not verifying the server's certificate, no proxy, and no redirect is followed: the token goes to the named server only.
"""

from __future__ import annotations

import base64
import os
import re
import ssl
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from strongroom.crypto.keys import check_commitment, commitment, derive
from strongroom.crypto.keystores import envelope
from strongroom.crypto.keystores.transit_http import Answer, request
from strongroom.errors import Sealed, StrongroomError, Tampered, UsageError

KEY_TYPE = "aes256-gcm96"
TIMEOUT = 10.0  # seconds, for one request from connecting to the last byte
_MAGIC = b"SRTW\x01\x00\x00\x00"
_PART = re.compile(r"(?!\.{1,2}$)[A-Za-z0-9_.-]{1,128}", re.ASCII)
_CIPHERTEXT = re.compile(r"vault:v[1-9][0-9]{0,9}:[A-Za-z0-9+/]{40,1024}={0,2}", re.ASCII)
_HEADER_VALUE = re.compile(r"[\x21-\x7e]{1,8192}", re.ASCII)


@dataclass(frozen=True)
class _Place:
    """What the URI says."""

    https: bool
    host: str
    port: int
    mount: str
    key: str

    @classmethod
    def parse(cls, uri: str) -> _Place:
        try:
            url = urlsplit(uri.partition(":")[2])
            host, port = url.hostname or "", url.port
        except ValueError:
            raise _bad_uri("is not a URL") from None
        parts = url.path.strip("/").split("/")
        if url.scheme not in ("https", "http") or not host or not host.isascii() or port == 0:
            raise _bad_uri("has no https address")
        if url.username is not None or url.password is not None or url.query or url.fragment:
            raise _bad_uri("holds more than an address; a token never stands in a URI")
        if len(parts) < 2 or not all(_PART.fullmatch(part) for part in parts):
            raise _bad_uri("does not end in the path of the engine and the name of a key")
        if url.scheme == "http" and not _is_loopback(host):
            # Token and room key would cross the network in the clear.
            raise UsageError(
                "keystore.plain_http",
                f"{host} is not this machine: a key store elsewhere is reached over https only",
                hint="openbao:https://HOST:PORT/MOUNT/KEY",
            )
        return cls(
            url.scheme == "https", host, port or (443 if url.scheme == "https" else 80), "/".join(parts[:-1]), parts[-1]
        )

    @property
    def server(self) -> str:
        return f"{self.host}:{self.port}"


class OpenBaoKeystore:
    """A transit key on a server. Keeps neither token nor connection between operations."""

    def __init__(self, uri: str, *, timeout: float = TIMEOUT) -> None:
        self.uri = uri
        self._place = _Place.parse(uri)
        self._timeout = timeout

    @classmethod
    def create(cls, uri: str) -> OpenBaoKeystore:
        """Make sure that the key is there and stays there; never makes it, which takes rights the room should not have.

        UsageError when the key's type does not do, or when it may be exported.
        """
        keystore = cls(uri)
        keystore._require_fit()
        return keystore

    def wrap(self, key: bytes, context: str) -> bytes:
        envelope.require_key(key)
        # Asked first, for `encrypt` makes a key of the engine's default kind when there is none of the name.
        self._require_fit()
        asked = {"plaintext": _base64(key), "associated_data": _base64(context.encode())}
        ciphertext = self._post("encrypt", asked).get("ciphertext")
        if not isinstance(ciphertext, str) or not _CIPHERTEXT.fullmatch(ciphertext):
            raise self._not_transit()
        body = commitment(derive(key, "transit", context.encode())) + ciphertext.encode("ascii")
        wrapped = envelope.close(_MAGIC, body, context)
        # A room key that does not come back is lost with everything under it: find out now.
        self.unwrap(wrapped, context)
        return wrapped

    def unwrap(self, wrapped: bytes, context: str) -> bytes:
        body = envelope.open_(_MAGIC, wrapped, context, 32 + 50)
        ciphertext = body[32:].decode("ascii", "replace")
        if not _CIPHERTEXT.fullmatch(ciphertext):
            raise Tampered("keystore.wrapped_malformed", "the wrapped key holds no ciphertext of a transit engine")
        asked = {"ciphertext": ciphertext, "associated_data": _base64(context.encode())}
        plaintext = self._post("decrypt", asked).get("plaintext")
        if not isinstance(plaintext, str):
            raise self._not_transit()
        try:
            key = base64.b64decode(plaintext, validate=True)
        except ValueError:
            raise self._not_transit() from None
        envelope.require_unwrapped(key)
        check_commitment(derive(key, "transit", context.encode()), body[:32], f"{context!r} in {self._place.key}")
        return key

    def rotate(self) -> OpenBaoKeystore:
        """A new version of the transit key, which `wrap` uses from now on; the server keeps the old ones."""
        self._require_fit()
        self._post(f"keys/{self._place.key}/rotate", {}, path_is_whole=True)
        return self

    def retire(self) -> None:
        """Does nothing: the server keeps old versions until min_decryption_version is raised and they are trimmed.

        That would lock every older backup of the database out, so it stays an operator's decision (see `check`).
        """

    def check(self) -> dict[str, str | bool]:
        report: dict[str, str | bool] = {"uri": self.uri, "reachable": False}
        try:
            key = self._read_key()
            report["reachable"] = True
            report["key_type"] = f"{key.get('type')}, version {key.get('latest_version')}"
            report["permissions"] = ", ".join(self._capabilities())
            report["notes"] = "; ".join(self._notes(key))
        except StrongroomError as error:
            report["notes"] = error.message
        return report

    def _notes(self, key: dict[str, Any]) -> list[str]:
        notes = _unfit(key)
        if key.get("deletion_allowed"):
            notes.append("deletion of the key is allowed: deleting it locks the room for good")
        if key.get("imported_key"):
            notes.append("the key was imported: a copy of it may exist elsewhere")
        oldest, latest = key.get("min_decryption_version"), key.get("latest_version")
        if isinstance(oldest, int) and isinstance(latest, int) and oldest < latest:
            notes.append(
                f"versions {oldest} to {latest - 1} still decrypt; raise min_decryption_version when no database or "
                "backup needs them"
            )
        return notes

    def _capabilities(self) -> list[str]:
        """What the token may do to the key, by the server's own account."""
        place = self._place
        paths = {
            "encrypt": f"{place.mount}/encrypt/{place.key}",
            "decrypt": f"{place.mount}/decrypt/{place.key}",
            "rotate": f"{place.mount}/keys/{place.key}/rotate",
            "export": f"{place.mount}/export/encryption-key/{place.key}",
        }
        answer = self._ask("POST", "sys/capabilities-self", {"paths": list(paths.values())})
        if answer.status != 200:
            return ["unknown: the token may not ask for its own rights"]
        rights = _data(answer)
        found = []
        for name, path in paths.items():
            granted = rights.get(path)
            if isinstance(granted, list) and not {"update", "create", "root", "sudo"}.isdisjoint(map(str, granted)):
                found.append("root" if "root" in granted else name)
        return sorted(set(found))

    def _require_fit(self) -> None:
        problems = _unfit(self._read_key())
        if problems:
            raise UsageError(
                "keystore.unfit_key",
                f"the transit key {self._place.key} does not do: " + "; ".join(problems),
                hint=f"bao write -f {self._place.mount}/keys/NEW-NAME type={KEY_TYPE}",
            )

    def _read_key(self) -> dict[str, Any]:
        answer = self._ask("GET", f"{self._place.mount}/keys/{self._place.key}")
        if answer.status != 200:
            raise self._refusal(answer)
        key = _data(answer)
        if "type" not in key:
            raise self._not_transit()
        return key

    def _post(self, operation: str, body: dict[str, str], *, path_is_whole: bool = False) -> dict[str, Any]:
        path = f"{self._place.mount}/{operation}" + ("" if path_is_whole else f"/{self._place.key}")
        answer = self._ask("POST", path, body)
        if answer.status not in (200, 204):
            raise self._refusal(answer)
        return _data(answer)

    def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> Answer:
        place = self._place
        token = _token()
        headers = {"X-Vault-Token": token, "X-Vault-Request": "true"}
        namespace = _variable("NAMESPACE")
        if namespace and _HEADER_VALUE.fullmatch(namespace):
            headers["X-Vault-Namespace"] = namespace
        elif namespace:
            raise UsageError("keystore.bad_namespace", "BAO_NAMESPACE is not a path of letters and digits")
        context = _tls() if place.https else None
        return request(place.host, place.port, context, method, f"/v1/{path}", headers, body, timeout=self._timeout)

    def _not_transit(self) -> Sealed:
        return Sealed(
            "keystore.bad_answer",
            f"{self._place.server} did not answer as a transit engine does",
            hint="check the address and the mount in the key store's URI",
        )

    def _refusal(self, answer: Answer) -> StrongroomError:
        """The error for an answer that is not a success.

        None is a `Denied`: that is what the room's policy says to a principal, who then asks for the right. Here the
        room itself is refused, and may try again with another token.
        """
        place, status, said = self._place, answer.status, answer.problem
        altered = "authentication failed" in said or "invalid ciphertext" in said
        if status == 400 and altered and "too new" not in said:
            return Tampered(
                "keystore.wrapped_tampered",
                f"transit key {place.key} does not open the wrapped key: it was altered, or another key wrapped it",
                hint="restore the room's database, or the transit key that it was wrapped with",
            )
        code, message, hint = "keystore.unavailable", "cannot serve now", "try again, and look at the server's log"
        match status:
            case 400 if "too old" in said or "too new" in said:
                code, message = "keystore.key_version", "does not offer the key version that wrapped the room's key"
                hint = f"bao read {place.mount}/keys/{place.key} and compare min_decryption_version and latest_version"
            case 400 | 404 if status == 404 or "key not found" in said:
                code, message = "keystore.no_key", f"has no transit key {place.key} at {place.mount}"
                hint = (
                    f"bao secrets enable -path={place.mount} transit; bao write -f {place.mount}/keys/{place.key}"
                    f" type={KEY_TYPE}"
                )
            case 401 | 403:
                code, message = "keystore.refused", "refuses the token: it has expired, was revoked or lacks a right"
                hint = (
                    f"bao token lookup; its policy needs read on {place.mount}/keys/{place.key}, and update on "
                    f"{place.mount}/encrypt/{place.key} and {place.mount}/decrypt/{place.key}"
                )
            case 503 if "sealed" in said.lower():
                code, message, hint = "keystore.server_sealed", "is sealed", "bao operator unseal"
            case 429:
                code, message = "keystore.busy", "limits the rate of requests"
            case status if 300 <= status < 400:
                code, message = "keystore.redirected", "sends elsewhere, which is not followed with a token"
                hint = "name the active server, or the address in front of all of them, in the key store's URI"
            case status if status < 500:
                code, message = "keystore.bad_answer", "does not understand the request"
                hint = "check the address and the mount in the key store's URI"
        text = f"the key store {place.server} {message} (HTTP {status})" + (f": {said}" if said else "")
        return Sealed(code, text, hint=hint, status=status)


def _unfit(key: dict[str, Any]) -> list[str]:
    """Why `key` must not protect a room; empty when it may."""
    problems = []
    if key.get("type") != KEY_TYPE:
        problems.append(f"its type is not {KEY_TYPE}")
    if key.get("derived"):
        problems.append("it is a derived key, which takes another request")
    if key.get("exportable") is not False:
        problems.append("it is exportable: whoever may export it opens the room without the server")
    if key.get("allow_plaintext_backup") is not False:
        problems.append("it allows plaintext backup: a backup of it opens the room without the server")
    return problems


def _data(answer: Answer) -> dict[str, Any]:
    data = answer.body.get("data")
    return data if isinstance(data, dict) else {}


def _token() -> str:
    token = _variable("TOKEN") or _token_from_file()
    if not token or not _HEADER_VALUE.fullmatch(token):
        raise Sealed(
            "keystore.no_token",
            "there is no token for the key store" if not token else "the token for the key store is malformed",
            hint="bao login, or set BAO_TOKEN",
        )
    return token


def _token_from_file() -> str:
    path = Path(_variable("TOKEN_PATH") or Path.home() / ".vault-token")
    try:
        with path.open("rb") as file:
            return file.read(16384).decode("ascii", "replace").strip()
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise Sealed("keystore.no_token", f"cannot read the token file {path}: {error.strerror}") from None


def _tls() -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=_variable("CACERT"), capath=_variable("CAPATH"))
        certificate = _variable("CLIENT_CERT")
        if certificate:
            context.load_cert_chain(certificate, _variable("CLIENT_KEY"))
    except OSError as error:  # ssl.SSLError is one
        raise UsageError(
            "keystore.bad_certificates",
            f"BAO_CACERT, BAO_CAPATH, BAO_CLIENT_CERT or BAO_CLIENT_KEY cannot be used: {error.strerror}",
        ) from None
    return context


def _variable(name: str) -> str | None:
    return os.environ.get(f"BAO_{name}") or os.environ.get(f"VAULT_{name}") or None


def _is_loopback(host: str) -> bool:
    if host == "localhost":  # RFC 6761 section 6.3
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def _bad_uri(problem: str) -> UsageError:
    # The URI itself is not repeated: somebody may have put a token into it.
    return UsageError(
        "keystore.bad_uri",
        f"the URI of the key store {problem}",
        hint="openbao:https://HOST:PORT/MOUNT/KEY, for example openbao:https://bao.example:8200/transit/room",
    )


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
