"""An ID token by way of a browser: the authorization-code flow with PKCE and a loopback redirect (RFC 6749, RFC 7636,
RFC 8252, section 7.3)."""

from __future__ import annotations

import base64
import hashlib
import hmac
import secrets
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from urllib.parse import parse_qs, urlencode, urlsplit

from strongroom.errors import AuthRequired, BackendError
from strongroom.formats.authority import check_issuer
from strongroom.storage.fetch import fetch

_PAGE = b"<!doctype html><title>Strongroom</title><p>This is done in the terminal; this page can be closed."


def token(issuer: str, client: str, nonce: str, show: Callable[[str], None], *, ca: str = "", wait: float = 300) -> str:
    """The ID token that `issuer` makes for `client` with this `nonce`, after somebody has signed in at the address that
    `show` is called with. Not verified here: the custodian does that. AuthRequired ``login.browser`` when nobody does
    so within `wait` seconds, or the issuer refuses; BackendError ``issuer.unreachable``."""
    about = fetch(f"{check_issuer(issuer).rstrip('/')}/.well-known/openid-configuration", ca)
    # A mixed-up issuer would be given the code of another one (RFC 9207).
    if about.get("issuer") != issuer:
        raise BackendError("issuer.unreachable", f"{issuer} says that it is another issuer")
    verifier, state = secrets.token_urlsafe(48), secrets.token_urlsafe(24)
    challenge = base64.urlsafe_b64encode(hashlib.sha256(verifier.encode()).digest()).rstrip(b"=").decode()
    with _Listener(("127.0.0.1", 0), _Answer) as listener:
        back = f"http://127.0.0.1:{listener.server_address[1]}/callback"
        asked = {
            "response_type": "code",
            "client_id": client,
            "redirect_uri": back,
            "scope": "openid",
            "state": state,
            "nonce": nonce,
            "code_challenge": challenge,
            "code_challenge_method": "S256",
        }
        where = str(about.get("authorization_endpoint"))
        show(f"{where}{'&' if '?' in where else '?'}{urlencode(asked)}")
        found = listener.wait(state, wait)
    if "code" not in found:
        why = found.get("error", "nobody signed in")
        raise AuthRequired("login.browser", f"{issuer} gave no token: {why!r:.80}", hint="strongroom login --browser")
    form = {
        "grant_type": "authorization_code",
        "code": found["code"],
        "redirect_uri": back,
        "client_id": client,
        "code_verifier": verifier,
    }
    answer = fetch(str(about.get("token_endpoint")), ca, form).get("id_token")
    if not isinstance(answer, str):
        raise AuthRequired(
            "login.browser", f"{issuer} gave no ID token", hint="is the client allowed the scope openid?"
        )
    return answer


class _Listener(HTTPServer):
    """Takes one answer: the one with our own state. Any page that the browser shows may send others."""

    def wait(self, state: str, seconds: float) -> dict[str, str]:
        self.state, self.found = state, dict[str, str]()
        end = time.monotonic() + seconds
        while not self.found and (left := end - time.monotonic()) > 0:
            self.timeout = left
            self.handle_request()
        return self.found

    def handle_error(self, request: object, client_address: object) -> None:
        """A peer that hangs up is no matter."""


class _Answer(BaseHTTPRequestHandler):
    server: _Listener
    timeout = 5  # seconds: another one may wait

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        found = {name: values[0] for name, values in parse_qs(parts.query).items() if len(values) == 1}
        right = hmac.compare_digest(found.get("state", "").encode(), self.server.state.encode())
        if parts.path != "/callback" or not right:
            self.send_error(404)
            return
        self.server.found = found
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.send_header("Content-Length", str(len(_PAGE)))
        self.end_headers()
        self.wfile.write(_PAGE)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the standard library's name
        """Nothing: the code is in the address."""
