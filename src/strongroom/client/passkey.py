"""Passkeys, on the side of whoever decides: a page of this machine's own asks the authenticator, each time
(spec/ledger.md, section 10). What it shows is what the program that builds the statement has read of the request: in a
served room, from the custodian."""

from __future__ import annotations

import base64
import hashlib
import hmac
import html
import json
import secrets
import time
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.resources import files
from string import Template
from typing import TYPE_CHECKING, Any

from strongroom.crypto.passkey import check_key
from strongroom.errors import AuthRequired, NotFound, UsageError
from strongroom.formats.passkey import RP, Assertion

if TYPE_CHECKING:
    from strongroom.client.anyroom import AnyRoom, Say

_WAIT = 300.0  # seconds: as long as a statement is fresh
_MOST = 64 * 1024
_ALGORITHMS = (-7, -8, -257)  # ES256, EdDSA, RS256

Show = Callable[[str], None]


class PasskeySigner:
    """Signs one statement with a passkey: `sign` shows the address of a page, and waits for the authenticator.

    `keys`: of each credential (base64url) the public key in hexadecimal; `facts`: what is decided, for the page.
    """

    def __init__(self, keys: Mapping[str, str], title: str, facts: Mapping[str, str], show: Show) -> None:
        self._keys, self._title, self._facts, self._show = keys, title, facts, show
        self._used = ""

    @property
    def key_id(self) -> str:
        """Of the passkey that has signed: known once it has."""
        return fingerprint_of(self._used)

    def sign(self, data: bytes) -> bytes:
        """The encoded assertion over `data`; AuthRequired ``passkey.nobody`` when none comes in time."""
        options = {
            "challenge": _text(hashlib.sha256(data).digest()),
            "rpId": RP,
            "allowCredentials": [{"type": "public-key", "id": each} for each in self._keys],
            "userVerification": "required",
        }
        answer = ask("get", options, self._title, self._facts, "Sign with the passkey", self._show)
        found, used = answer.get("response"), answer.get("id")
        if not isinstance(found, dict) or not isinstance(used, str) or used not in self._keys:
            raise _nobody()
        self._used = self._keys[used]
        parts = [_bytes(found.get(name)) for name in ("authenticatorData", "clientDataJSON", "signature")]
        return Assertion(*parts).encode()


class Passkeys:
    """The passkeys of `who` in a room; `say` signs a statement of a kind, as `who`."""

    def __init__(self, room: AnyRoom, who: str, say: Say) -> None:
        self._room, self._who, self._say = room, who, say

    def ls(self) -> list[dict[str, Any]]:
        """Keys and credentials, oldest first."""
        return list(self._room.custodian.show_principal(self._who)["passkeys"])

    def add(self, show: Show) -> dict[str, Any]:
        """Make one, on the page whose address `show` is called with. Takes the principal's own key. Errors of
        `register`; Denied ``passkey.own_key``."""
        known = [str(each["credential"]) for each in self.ls()]
        key, credential = register(self._who, self._room.id, known, show)
        body = {"key": key, "credential": credential, "state": "active"}
        return {**self._room.custodian.change_passkey(self._say("passkey", body)), "key": key}

    def rm(self, fingerprint: str) -> dict[str, Any]:
        """Take one away, by the beginning of its key's SHA-256; NotFound ``passkey.missing``."""
        found = [each for each in self.ls() if fingerprint and fingerprint_of(each["key"]).startswith(fingerprint)]
        if len(found) != 1:
            raise NotFound(
                "passkey.missing", f"{self._who} has no passkey {fingerprint!r:.80}", hint="strongroom passkey ls"
            )
        body = {"key": found[0]["key"], "credential": found[0]["credential"], "state": "removed"}
        return self._room.custodian.change_passkey(self._say("passkey", body))

    def signer(self, what: str, asked: Mapping[str, Any], show: Show) -> PasskeySigner:
        """What signs one decision (approve, deny, renew) about the request `asked`, which the page shows: the very one
        that the statement is made of, as `strongroom.client.asked.look` gives it. NotFound ``passkey.none``."""
        found = self.ls()
        if not found:
            raise NotFound("passkey.none", f"{self._who} has no passkey in this room", hint="strongroom passkey add")
        names = ("id", "action", "ref", "for", "by", "reason", "state", "needs")
        facts = {name: _shown(asked[name]) for name in names if asked.get(name)}
        if asked["duration"]:
            facts |= {"seconds": str(asked["duration"]), "uses": str(asked["uses"] or "any number")}
        facts = {"you are": self._who, "decision": what, **facts, **asked["details"]}
        return PasskeySigner({each["credential"]: each["key"] for each in found}, f"{what} {asked['id']}", facts, show)


def fingerprint_of(key: str) -> str:
    """SHA-256 of a passkey's public key, in hexadecimal: how it is named."""
    return hashlib.sha256(bytes.fromhex(key)).hexdigest()


def _shown(value: Any) -> str:
    """As text in which nothing hides: what is invisible, or turns the direction of what follows, is shown as what it
    is."""
    text = "; ".join(map(str, value)) if isinstance(value, list) else str(value)
    return "".join(each if each.isprintable() else f"\\u{ord(each):04x}" for each in text)


def register(principal: str, room: bytes, known: list[str], show: Show) -> tuple[str, str]:
    """Make a passkey: its key (SubjectPublicKeyInfo in hexadecimal) and credential (base64url). `known`: credentials
    that there are already, which the same authenticator does not make again. UsageError ``passkey.not_installed``."""
    try:
        from webauthn import verify_registration_response
        from webauthn.helpers import decode_credential_public_key
        from webauthn.helpers.decoded_public_key_to_cryptography import decoded_public_key_to_cryptography
        from webauthn.helpers.exceptions import WebAuthnException
    except ImportError:
        raise UsageError(
            "passkey.not_installed", "passkeys are not installed", hint="pip install 'strongroom[server]'"
        ) from None
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    challenge = secrets.token_bytes(32)
    options = {
        "challenge": _text(challenge),
        "rp": {"id": RP, "name": "Strongroom"},
        "user": {
            "id": _text(hashlib.sha256(room + principal.encode()).digest()),
            "name": principal,
            "displayName": principal,
        },
        "pubKeyCredParams": [{"type": "public-key", "alg": each} for each in _ALGORITHMS],
        "authenticatorSelection": {"userVerification": "required", "residentKey": "preferred"},
        "excludeCredentials": [{"type": "public-key", "id": each} for each in known],
        "attestation": "none",
    }
    facts = {"for": principal, "room": room.hex()}
    origins: list[str] = []
    answer = ask("create", options, "Add a passkey", facts, "Make the passkey", show, origins)
    try:
        found = verify_registration_response(
            credential=answer,
            expected_challenge=challenge,
            expected_rp_id=RP,
            expected_origin=origins,
            require_user_verification=True,
        )
        public = decoded_public_key_to_cryptography(decode_credential_public_key(found.credential_public_key))
    except (WebAuthnException, ValueError, TypeError, KeyError) as error:
        raise AuthRequired(
            "passkey.registration",
            f"the authenticator's answer does not hold: {str(error)[:200]}",
            hint="strongroom passkey add",
        ) from None
    encoded = public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    check_key(encoded)
    return encoded.hex(), _text(found.credential_id)


def ask(
    call: str,
    options: Mapping[str, Any],
    title: str,
    facts: Mapping[str, str],
    button: str,
    show: Show,
    origins: list[str] | None = None,
) -> dict[str, Any]:
    """What the authenticator answers to ``navigator.credentials`` `call`, by way of a page whose address `show` is
    called with. AuthRequired ``passkey.nobody`` when none comes within five minutes."""
    with _Listener(("127.0.0.1", 0), _Answer) as listener:
        origin = f"http://{RP}:{listener.server_address[1]}"
        if origins is not None:
            origins.append(origin)
        listener.secret, nonce = secrets.token_urlsafe(24), secrets.token_urlsafe(16)
        # In a script: no text ends it, or begins a comment.
        asked = json.dumps({"call": call, "options": options}).replace("<", "\\u003c").replace("\u2028", "\\u2028")
        shown = "".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(said)}</dd>" for name, said in facts.items())
        listener.page = Template(files("strongroom.load").joinpath("page.html").read_text("utf-8")).substitute(
            title=html.escape(title), facts=shown, button=html.escape(button), nonce=nonce, asked=asked
        )
        listener.policy = (
            f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; connect-src 'self'; "
            "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )
        show(f"{origin}/{listener.secret}")
        return listener.wait(_WAIT)


class _Listener(HTTPServer):
    """Takes one answer, at the address that only this program and the browser know: other pages may send others."""

    secret, page, policy = "", "", ""

    def wait(self, seconds: float) -> dict[str, Any]:
        self.answers: list[dict[str, Any]] = []
        end = time.monotonic() + seconds
        while not self.answers and (left := end - time.monotonic()) > 0:
            self.timeout = left
            self.handle_request()
        for answer in self.answers:
            return answer
        raise _nobody()

    def handle_error(self, request: object, client_address: object) -> None:
        """A peer that hangs up is no matter."""


class _Answer(BaseHTTPRequestHandler):
    server: _Listener
    timeout = 5  # seconds: another one may wait

    def do_GET(self) -> None:
        if self._ours():
            self._answer(200, "text/html; charset=utf-8", self.server.page.encode())

    def do_POST(self) -> None:
        if not self._ours():
            return
        size = self.headers.get("Content-Length", "")
        if not size.isascii() or not size.isdigit() or int(size[:9]) > _MOST:
            self.send_error(413)
            return
        try:
            value = json.loads(self.rfile.read(int(size)))
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict):
            self.send_error(400)
            return
        self.server.answers.append(value)
        self._answer(200, "text/plain", b"done")

    def _ours(self) -> bool:
        host = f"{RP}:{self.server.server_address[1]}"
        # A name that somebody has made point here (DNS rebinding) is another host.
        known = hmac.compare_digest(self.path.encode(), f"/{self.server.secret}".encode())
        if known and self.headers.get("Host") == host:
            return True
        self.send_error(404)
        return False

    def _answer(self, status: int, kind: str, body: bytes) -> None:
        self.send_response(status)
        for name, value in (
            ("Content-Type", kind),
            ("Content-Length", str(len(body))),
            ("Content-Security-Policy", self.server.policy),
            ("Cache-Control", "no-store"),
            ("Referrer-Policy", "no-referrer"),
            ("X-Content-Type-Options", "nosniff"),
        ):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the standard library's name
        """Nothing: the secret is in the address."""


def _text(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _bytes(text: object) -> bytes:
    if not isinstance(text, str):
        raise _nobody()
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except ValueError:
        raise _nobody() from None


def _nobody() -> AuthRequired:
    return AuthRequired(
        "passkey.nobody",
        "no passkey has signed: the page was not answered in time, or by something else",
        hint="run the command again, and open the address that it shows in a browser",
    )
