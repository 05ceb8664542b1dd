"""A small OpenID provider over HTTPS, with an authority of its own; and the authority of a SPIFFE trust domain."""

from __future__ import annotations

import base64
import hashlib
import json
import secrets
import ssl
import threading
import time
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlencode, urlsplit

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from joserfc import jwk, jws

from strongroom.crypto.authority import Authority as WebAuthority

CLIENT = "strongroom-room"


class _Server(ThreadingHTTPServer):
    def handle_error(self, *_):
        """A client that does not like the certificate hangs up."""


class Provider:
    """The provider; `keys` are what it signs with, the last one for new tokens, and `asked` the paths it was asked
    for."""

    def __init__(self, folder) -> None:
        authority = WebAuthority(folder, "Provider")
        self.ca = authority.pem
        self.keys = {"one": jwk.RSAKey.generate_key(2048, private=True)}
        self.extra: list[dict] = []  # further members of the JWK set
        self.asked: list[str] = []
        self.codes: dict[str, dict] = {}
        self.subject = "ana@example.com"
        self.claims: dict = {}
        self.redirect = ""
        self.body: bytes | None = None  # whatever it answers, in place of what it should
        self._server = _Server(("127.0.0.1", 0), _handler(self))
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        with authority.issued(["127.0.0.1"]) as certificate:
            context.load_cert_chain(certificate)
        self.tls = context
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True, do_handshake_on_connect=False)
        self.issuer = f"https://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def token(self, *, header=None, key=None, without=(), **claims) -> str:
        now = int(time.time())
        kid = list(self.keys)[-1]
        said = {"iss": self.issuer, "sub": self.subject, "aud": CLIENT, "iat": now, "exp": now + 300, **claims}
        said = {name: value for name, value in said.items() if name not in without}
        about = {"alg": "RS256", "kid": kid, "typ": "JWT", **(header or {})}
        about = {name: value for name, value in about.items() if value is not None}
        return jws.serialize_compact(about, json.dumps(said), key or self.keys[kid], algorithms=[about["alg"]])

    def jwks(self) -> dict:
        keys = [{**key.as_dict(private=False), "kid": kid, "use": "sig"} for kid, key in self.keys.items()]
        return {"keys": keys + self.extra}


def _handler(provider: Provider):
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            parts = urlsplit(self.path)
            provider.asked.append(parts.path)
            if provider.redirect:
                self.send_response(302)
                self.send_header("Location", provider.redirect)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            match parts.path:
                case "/.well-known/openid-configuration":
                    base = provider.issuer
                    about = {
                        "issuer": base,
                        "jwks_uri": f"{base}/jwks",
                        "authorization_endpoint": f"{base}/authorize",
                        "token_endpoint": f"{base}/token",
                    }
                    self._answer(about | provider.claims)
                case "/jwks":
                    self._answer(provider.jwks())
                case "/authorize":
                    query = {name: value[0] for name, value in parse_qs(parts.query).items()}
                    code = secrets.token_urlsafe(16)
                    provider.codes[code] = query
                    back = f"{query['redirect_uri']}?{urlencode({'code': code, 'state': query['state']})}"
                    self.send_response(302)
                    self.send_header("Location", back)
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                case _:
                    self.send_error(404)

        def do_POST(self):
            provider.asked.append(self.path)
            form = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
            asked = provider.codes.pop(form["code"][0], None)
            challenge = base64.urlsafe_b64encode(hashlib.sha256(form["code_verifier"][0].encode()).digest())
            if asked is None or asked["code_challenge"] != challenge.rstrip(b"=").decode():
                self.send_error(400)
                return
            self._answer({"id_token": provider.token(nonce=asked["nonce"], aud=form["client_id"][0])})

        def _answer(self, value):
            data = json.dumps(value).encode() if provider.body is None else provider.body
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass

    return Handler


class TrustDomain:
    """A certificate authority, and the certificates of workloads that it makes."""

    def __init__(self, name="example.org") -> None:
        self.name = name
        self.key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, name)])
        self.certificate = self._sign(
            subject,
            self.key.public_key(),
            [x509.UniformResourceIdentifier(f"spiffe://{name}")],
            ca=True,
            usage=_usage(signs=False, certificates=True),
        )
        self.bundle = self.certificate.public_bytes(Encoding.PEM).decode()

    def svid(self, *uris, ca=False, usage=None, begin=-60, end=3600, names=None) -> tuple[str, bytes]:
        """Chain and key, PEM."""
        key = ec.generate_private_key(ec.SECP256R1())
        given = names if names is not None else [x509.UniformResourceIdentifier(uri) for uri in uris]
        subject = x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, "workload")])
        made = self._sign(
            subject,
            key.public_key(),
            given,
            ca=ca,
            usage=usage or _usage(signs=True, certificates=False),
            begin=begin,
            end=end,
        )
        private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        return made.public_bytes(Encoding.PEM).decode(), private

    def between(self) -> TrustDomain:
        """An authority below this one, of the same name, that makes certificates and lists in its place."""
        below = TrustDomain.__new__(TrustDomain)
        below.name, below.key = self.name, ec.generate_private_key(ec.SECP256R1())
        below.certificate = self._sign(
            x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, f"below {secrets.token_hex(4)}")]),
            below.key.public_key(),
            [x509.UniformResourceIdentifier(f"spiffe://{self.name}")],
            ca=True,
            usage=_usage(signs=False, certificates=True),
        )
        below.bundle = below.certificate.public_bytes(Encoding.PEM).decode()
        return below

    def crl(self, *chains, begin=-60, end=3600, extensions=(), signer=None) -> bytes:
        """The list, PEM, of the first certificate of each of `chains`, which were revoked."""
        now = datetime.now(UTC)
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(self.certificate.subject)
            .last_update(now + timedelta(seconds=begin))
            .next_update(now + timedelta(seconds=end))
        )
        for chain in chains:
            serial = x509.load_pem_x509_certificates(chain.encode())[0].serial_number
            gone = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(now).build()
            builder = builder.add_revoked_certificate(gone)
        for each, critical in extensions:
            builder = builder.add_extension(each, critical=critical)
        made = builder.sign(signer or self.key, SHA256())
        return made.public_bytes(Encoding.PEM)

    def _sign(self, subject, public, names, *, ca, usage, begin=-3600, end=7200):
        now = datetime.now(UTC)
        issuer = subject if not hasattr(self, "certificate") else self.certificate.subject
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(issuer)
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now + timedelta(seconds=begin))
            .not_valid_after(now + timedelta(seconds=end))
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
            .add_extension(usage, critical=True)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        )
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        return builder.sign(self.key, SHA256())


def _usage(*, signs, certificates):
    return x509.KeyUsage(
        digital_signature=signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=certificates,
        crl_sign=certificates,
        encipher_only=False,
        decipher_only=False,
    )


usage = _usage
