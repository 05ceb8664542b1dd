"""Authorities: whose word the room takes for who somebody is (spec/ledger.md, section 9).

An identity provider (OpenID Connect) or the X.509 authority of a SPIFFE trust domain, as canonical JSON in a signed
statement; what binds a principal to a name that such an authority gives; and what a login has to contain.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from strongroom.core import canonical
from strongroom.errors import Tampered, UsageError

OIDC, X509 = "oidc", "x509"
NONCE, AUDIENCE = "nonce", "audience"
# Signatures only: with none, or with a key that both sides have (HS256), anybody could make tokens.
ALGORITHMS = ("EdDSA", "ES256", "PS256", "RS256")
LONGEST = 8 * 3600  # seconds that a login is good for, at most
_CONFIG = 32 * 1024  # characters: statement and entry have to hold it
_DOMAIN = re.compile(r"[a-z0-9]([a-z0-9._-]{0,253}[a-z0-9])?", re.ASCII)
_ISSUER = re.compile(r"https://[A-Za-z0-9.-]+(:[1-9][0-9]{0,4})?(/[A-Za-z0-9._~%!$&'()*+,;=:@/-]*)?", re.ASCII)
_SPIFFE = re.compile(r"spiffe://([a-z0-9._-]{1,255})((?:/[A-Za-z0-9._-]+)+)", re.ASCII)
_SUBJECT = b"strongroom/1 subject\x00"
_LOGIN = b"strongroom/1 login\x00"
_SVID = b"strongroom/1 svid\x00"


@dataclass(frozen=True)
class Authority:
    """One authority. Of an identity provider: `issuer` (https, as in its tokens, letter by letter), the `audience`
    that its tokens have, how a token names the key that it introduces (`binding`), `algorithms`, its keys (`jwks`, or
    none: they are asked for at the issuer), and the certificate authorities of its web server (`ca`, PEM, or none:
    those of this machine). Of a trust domain: its name and its `bundle` of CA certificates (PEM)."""

    kind: str
    name: str
    audience: str = ""
    binding: str = ""
    algorithms: tuple[str, ...] = ()
    jwks: str = ""
    ca: str = ""
    bundle: str = ""
    longest: int = field(default=LONGEST)

    def __post_init__(self) -> None:
        texts = (self.kind, self.name, self.audience, self.binding, self.jwks, self.ca, self.bundle)
        if not all(map(_plain, texts)):
            raise _malformed("its members are ASCII texts")
        if type(self.longest) is not int or not 60 <= self.longest <= LONGEST:
            raise _malformed(f"a login lasts from 60 to {LONGEST} seconds")
        if self.kind == OIDC:
            check_issuer(self.name)
            if not self.audience or not self.audience.isprintable() or len(self.audience) > 256:
                raise _malformed("an identity provider's tokens have an audience")
            if self.binding not in (NONCE, AUDIENCE):
                raise _malformed(f"a token names the key by its {NONCE} or its {AUDIENCE}")
            known = set(self.algorithms) <= set(ALGORITHMS)
            if not self.algorithms or not known or list(self.algorithms) != sorted(set(self.algorithms)):
                raise _malformed(f"its algorithms are some of {', '.join(ALGORITHMS)}")
            if self.bundle:
                raise _malformed("an identity provider has no bundle")
        elif self.kind == X509:
            if not _DOMAIN.fullmatch(self.name):
                raise _malformed(f"{self.name!r:.80} is not a trust domain")
            if not self.bundle or self.audience or self.binding or self.algorithms or self.jwks or self.ca:
                raise _malformed("a trust domain has a bundle of certificates, and nothing else")
        else:
            raise _malformed(f"it is {OIDC} or {X509}")

    @property
    def digest(self) -> str:
        """SHA-256 of its text, in hexadecimal."""
        return hashlib.sha256(self.encode().encode()).hexdigest()

    def encode(self) -> str:
        """Canonical JSON. UsageError ``authority.malformed`` when it is too long for the log."""
        text = canonical.encode({**vars(self), "algorithms": list(self.algorithms)}).decode()
        if len(text) > _CONFIG:
            raise _malformed(f"it has {len(text)} characters, and may have {_CONFIG}: name fewer keys or certificates")
        return text

    @classmethod
    def decode(cls, text: str) -> Authority:
        """The reverse; UsageError ``authority.malformed``."""
        try:
            if len(text) > _CONFIG:
                raise _malformed("it is too long")
            value: Any = canonical.decode(text.encode(), what="an authority")
            return cls(**{**value, "algorithms": tuple(value["algorithms"])})
        except (Tampered, TypeError, KeyError, ValueError) as error:
            raise _malformed(str(error)[:200]) from None


def _plain(value: object) -> bool:
    return isinstance(value, str) and value.isascii()


def check_issuer(issuer: str) -> str:
    """`issuer` if it is one: https, and no more than host, port and path. UsageError ``authority.malformed``."""
    if len(issuer) > 512 or not _ISSUER.fullmatch(issuer):
        raise _malformed(f"an issuer is https://HOST, as its tokens say, and not {issuer!r:.80}")
    return issuer


def oidc_subject(text: str) -> str:
    """The binding to ISSUER#SUBJECT; UsageError ``authority.malformed``."""
    issuer, _, name = text.partition("#")
    if not name:
        raise _malformed(f"{text!r:.80} is not ISSUER#SUBJECT")
    return subject(OIDC, check_issuer(issuer), name)


def spiffe_subject(text: str) -> str:
    """The binding to a SPIFFE id; UsageError ``authority.malformed``."""
    return subject(X509, trust_domain(text), text)


def trust_domain(text: str) -> str:
    """The trust domain of a SPIFFE id (SPIFFE-ID, section 2); UsageError ``authority.malformed`` for any other text."""
    match = _SPIFFE.fullmatch(text)
    if match is None or len(text) > 2048 or not _DOMAIN.fullmatch(match[1]):
        raise _malformed(f"{text!r:.80} is not spiffe://TRUST-DOMAIN/PATH")
    if any(part in (".", "..") for part in match[2].split("/")):
        raise _malformed(f"{text!r:.80} has a path that leads elsewhere")
    return match[1]


def subject(kind: str, authority: str, name: str) -> str:
    """What stands in a principal's record for the name that `authority` gives to it: SHA-256 in hexadecimal. The name
    itself, which may be somebody's e-mail address, is written nowhere."""
    try:
        said = canonical.encode([kind, authority, name])
    except ValueError:
        raise _malformed("the subject is not text") from None
    return hashlib.sha256(_SUBJECT + said).hexdigest()


def key_name(room: bytes, public_key: bytes) -> str:
    """What an identity provider's token has to say so that it introduces `public_key` (32 bytes) to `room` (16) and
    nothing else: base64url of SHA-256, 43 characters."""
    digest = hashlib.sha256(_LOGIN + room + public_key).digest()
    return base64.urlsafe_b64encode(digest).rstrip(b"=").decode()


def audience_name(room: bytes, public_key: bytes) -> str:
    """The audience to ask for where the token has no nonce."""
    return f"strongroom:{key_name(room, public_key)}"


def gateway_audience(room: bytes) -> str:
    """The audience of a token for the gateway of `room` (16 bytes), where the audience says what it is for: no login's,
    which names a key."""
    return f"strongroom-gateway:{room.hex()}"


def gateway_nonce(room: bytes) -> str:
    """The nonce of such a token, where the nonce says it: shorter than the name of any key."""
    return f"gateway-{room.hex()}"


def svid_message(room: bytes, statement: str) -> bytes:
    """What a workload signs with its certificate's key; `statement` is the digest of its login in hexadecimal."""
    return _SVID + room + bytes.fromhex(statement)


def check_proof(proof: Mapping[str, Any]) -> str:
    """The kind of a proof: ``{"token"}`` or ``{"chain", "signature"}``, texts; UsageError ``login.proof``."""
    if all(isinstance(each, str) and len(each) <= _CONFIG for each in proof.values()):
        if proof.keys() == {"token"}:
            return OIDC
        if proof.keys() == {"chain", "signature"}:
            return X509
    raise UsageError("login.proof", "a login comes with a token, or with a chain of certificates and a signature")


def _malformed(why: str) -> UsageError:
    return UsageError(
        "authority.malformed", f"the authority is malformed: {why}", hint="strongroom authority add --help"
    )


def subject_of(oidc: str | None, spiffe: str | None) -> str:
    """What a principal's record has for the name that an authority gives it, or empty; UsageError
    ``principal.bound``, and those of the two."""
    if oidc and spiffe:
        raise UsageError("principal.bound", "a principal is bound to one name", hint="--oidc or --spiffe")
    return oidc_subject(oidc) if oidc else spiffe_subject(spiffe) if spiffe else ""
