"""An authenticator in software: what a security key does, and what it should not."""

from __future__ import annotations

import base64
import hashlib
import json
import os

from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from strongroom.formats.passkey import Assertion


def text(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


class Authenticator:
    """One credential. `sign` is what `Statement.sign` asks a signer for; keywords make it do wrong."""

    def __init__(self, kind: str = "ES256", **wrong: object) -> None:
        self.private = {
            "ES256": lambda: ec.generate_private_key(ec.SECP256R1()),
            "EdDSA": ed25519.Ed25519PrivateKey.generate,
            "RS256": lambda: rsa.generate_private_key(65537, 2048),
        }[kind]()
        self.kind, self.count, self.wrong = kind, 0, wrong
        self.key = self.private.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        self.credential = text(os.urandom(32))

    @property
    def key_id(self) -> str:
        return hashlib.sha256(self.key).hexdigest()

    def client(self, message: bytes) -> bytes:
        said = {
            "type": "webauthn.get",
            "challenge": text(hashlib.sha256(message).digest()),
            "origin": "http://localhost:8471",
            "crossOrigin": False,
        }
        return json.dumps({**said, **self.wrong.get("client", {})}).encode()

    def assertion(self, message: bytes) -> Assertion:
        rp = self.wrong.get("rp", "localhost")
        flags = self.wrong.get("flags", 0x05)
        data = hashlib.sha256(rp.encode()).digest() + bytes([flags]) + self.count.to_bytes(4, "big")
        client = self.wrong.get("raw", lambda made: made)(self.client(message))
        signed = data + hashlib.sha256(client).digest()
        match self.kind:
            case "ES256":
                signature = self.private.sign(signed, ec.ECDSA(SHA256()))
            case "EdDSA":
                signature = self.private.sign(signed)
            case _:
                signature = self.private.sign(signed, padding.PKCS1v15(), SHA256())
        return Assertion(data, client, signature)

    def sign(self, message: bytes) -> bytes:
        if "counts" in self.wrong:
            self.count += 1
        return self.assertion(message).encode()
