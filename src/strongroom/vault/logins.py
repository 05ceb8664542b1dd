"""Logins, on the custodian's side: what a token or a certificate proves (spec/ledger.md, section 9).

Steps are numbered as there. Nothing here decides who may come in: policy/entrance.py does, in the log's order.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
import time
import warnings
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from strongroom.crypto import svid
from strongroom.crypto.revocation import RevocationLists
from strongroom.errors import BackendError, StrongroomError, Tampered, UsageError
from strongroom.formats.authority import (
    AUDIENCE,
    LONGEST,
    NONCE,
    OIDC,
    Authority,
    audience_name,
    check_proof,
    gateway_audience,
    gateway_nonce,
    key_name,
    subject,
    svid_message,
    trust_domain,
)
from strongroom.formats.statement import Statement
from strongroom.policy.entrance import Verified, refused
from strongroom.storage.fetch import fetch

if TYPE_CHECKING:
    from collections.abc import Callable

_TOKEN = 16 * 1024
_LEEWAY = 60  # seconds that the issuer's clock may be off
_YOUNG = 600  # seconds since a token was made: one is got for a login, and used at once
_KEEP = 3600.0  # seconds that an issuer's keys are believed without asking again
_AGAIN = 30.0  # seconds between two questions to an issuer, whoever shows whatever
_WAIT = 3.0  # seconds to wait for an answer that somebody else has asked for
_KEYS = 64
_KINDS = {"RS256": ("RSA",), "PS256": ("RSA",), "ES256": ("EC",), "EdDSA": ("OKP",)}
_RSA_BYTES = 256


class Logins:
    """Verifies proofs; certificates by the lists `revoked`, which whoever serves the room replaces. Thread-safe."""

    def __init__(self, get: Callable[[str, str], dict[str, Any]] = fetch) -> None:
        self._get = get
        self.revoked = RevocationLists()
        self._keys: dict[str, tuple[float, list[dict[str, Any]]]] = {}  # by the authority's digest: when, which
        self._asked: dict[str, float] = {}
        self._asking: set[str] = set()
        self._changed = threading.Condition()

    def verify(self, authority: Authority, statement: Statement, proof: Mapping[str, Any], now: int) -> Verified:
        """What `proof` shows about who has the key that `statement` introduces. Step 4. AuthRequired
        ``login.refused``, BackendError ``issuer.unreachable``."""
        if check_proof(proof) != authority.kind:
            raise refused("it shows a token for a certificate, or the other way round")
        room, key = bytes.fromhex(statement.room), bytes.fromhex(statement.body["public_key"])
        if authority.kind == OIDC:
            found = self._token(authority, str(proof["token"]), room, key, now)
            until, shown = now + LONGEST, str(proof["token"])
        else:
            found, until = self._workload(authority, proof, room, statement, now)
            # The chain, not the signature, of which one key can make many: one login for one statement, all the same.
            shown = str(proof["chain"]) + statement.digest
        named = subject(authority.kind, authority.name, found)
        return Verified(authority.encode(), named, until, hashlib.sha256(shown.encode()).hexdigest())

    # -- OpenID Connect ------------------------------------------------------------------------------------------

    def bearer(self, authority: Authority, token: str, room: bytes, now: int) -> tuple[str, int]:
        """Whom an ID token for the gateway of `room` names, as in a principal's record, and until when it is good
        (spec/ledger.md, section 12). Errors as `verify`."""
        payload = self._signed(authority, token)
        _check_claims(authority, payload, now, once=False)
        _check_purpose(authority, payload, gateway_audience(room), gateway_nonce(room))
        until = int(min(payload["exp"], payload["iat"] + authority.longest))
        if now >= until:
            raise refused("the token has expired", "get a new one")
        return subject(authority.kind, authority.name, str(payload["sub"])), until

    def certificate(self, authority: Authority, chain: str, at: int, now: int) -> tuple[str, int]:
        """Whom the PEM `chain` of a TLS handshake that ended at `at` (seconds) names, as in a principal's record, and
        until when it is good (spec/ledger.md, section 12). AuthRequired ``login.refused``."""
        found = _svid(authority, lambda: svid.shown(chain, authority.bundle, now, self.revoked))
        until = min(found.until, at + authority.longest)
        if now >= until:
            raise refused("the certificate was shown too long ago", "connect again")
        return subject(authority.kind, authority.name, found.uri), until

    def _token(self, authority: Authority, token: str, room: bytes, key: bytes, now: int) -> str:
        """The subject of an ID token that introduces a key."""
        payload = self._signed(authority, token)
        _check_claims(authority, payload, now)
        # 4d: it was made for this key and this room.
        _check_purpose(authority, payload, audience_name(room, key), key_name(room, key))
        return str(payload["sub"])

    def _signed(self, authority: Authority, token: str) -> dict[str, Any]:
        """What an ID token says that the issuer has signed (OpenID Connect Core, section 3.1.3.7; RFC 8725)."""
        try:
            from joserfc import jws
            from joserfc.errors import SecurityWarning
            from joserfc.jwk import import_key
        except ImportError:
            raise UsageError(
                "login.not_installed", "tokens can't be read here", hint="pip install 'strongroom[server]'"
            ) from None
        # Its new names (RFC 9864) are those of no issuer yet.
        warnings.filterwarnings("ignore", "EdDSA is deprecated", SecurityWarning)
        # 4a: three parts, and a header that says no more than it may.
        header, payload = _parts(token)
        algorithm, key_id = header.get("alg"), header.get("kid")
        if algorithm not in authority.algorithms:
            raise refused(f"the token's algorithm {algorithm!r:.20} is none of {', '.join(authority.algorithms)}")
        if str(header.get("typ", "JWT")).upper() != "JWT" or "crit" in header or "b64" in header:
            raise refused("the token's header is not that of an ID token")
        if not isinstance(key_id, str) or not key_id:
            raise refused("the token does not name its key")
        # 4b: exactly one key of that name, for that algorithm. Keys in the header (jwk, jku, x5c) are looked at never.
        signer = self._key(authority, key_id, str(algorithm))
        try:
            jws.deserialize_compact(token, import_key(signer), algorithms=[str(algorithm)])
        except Exception:  # noqa: BLE001 - whatever it is: this is not what the issuer has signed
            raise refused("the token is not signed with the issuer's key") from None
        return payload

    def _key(self, authority: Authority, key_id: str, algorithm: str) -> dict[str, Any]:
        found = [each for each in self._jwks(authority, fresh=False) if each.get("kid") == key_id]
        if not found and not authority.jwks:  # it may have changed its keys
            found = [each for each in self._jwks(authority, fresh=True) if each.get("kid") == key_id]
        if len(found) != 1:
            raise refused(f"the issuer has {len(found) or 'no'} key(s) of the name that the token gives")
        (key,) = found
        operations = key.get("key_ops", ["verify"])
        fits = (
            key.get("kty") in _KINDS[algorithm]
            and key.get("alg", algorithm) == algorithm
            and key.get("use", "sig") == "sig"
            and isinstance(operations, list)
            and "verify" in operations
        )
        if not fits or (key.get("kty") == "RSA" and len(_decoded(str(key.get("n", ""))).lstrip(b"\0")) < _RSA_BYTES):
            raise refused("the issuer's key of that name is not for this algorithm")
        # Of a key no more than its public part.
        return {name: key[name] for name in ("kty", "crv", "x", "y", "n", "e") if name in key}

    def _jwks(self, authority: Authority, *, fresh: bool) -> list[dict[str, Any]]:
        """The issuer's keys. A stranger's token must not make this custodian ask for them again and again."""
        if authority.jwks:
            return keys_of(authority.jwks)
        with self._changed:
            # Somebody else may be asking right now: most answers come within that time. No longer, or a slow issuer
            # would hold up every thread of a server.
            self._changed.wait_for(lambda: authority.digest not in self._asking, _WAIT)
            at, known = self._keys.get(authority.digest, (-_KEEP, []))
            now = time.monotonic()
            if known and (now - at < _AGAIN or (not fresh and now - at < _KEEP)):
                return known
            if now - self._asked.get(authority.digest, -_AGAIN) < _AGAIN:
                if known and now - at < _KEEP:
                    return known
                raise BackendError("issuer.unreachable", f"{authority.name} was just asked", hint="try again later")
            self._asked[authority.digest] = now
            self._asking.add(authority.digest)
        try:
            found = self._ask(authority)
            with self._changed:
                self._keys[authority.digest] = (time.monotonic(), found)
        finally:
            with self._changed:
                self._asking.discard(authority.digest)
                self._changed.notify_all()
        return found

    def _ask(self, authority: Authority) -> list[dict[str, Any]]:
        about = self._get(f"{authority.name.rstrip('/')}/.well-known/openid-configuration", authority.ca)
        if about.get("issuer") != authority.name:
            raise BackendError("issuer.unreachable", f"{authority.name} says that it is another issuer")
        return keys_of(json.dumps(self._get(str(about.get("jwks_uri")), authority.ca)))

    # -- workloads -----------------------------------------------------------------------------------------------

    def _workload(
        self, authority: Authority, proof: Mapping[str, Any], room: bytes, statement: Statement, now: int
    ) -> tuple[str, int]:
        """The SPIFFE id that the chain proves, and until when."""
        try:
            signature = base64.b64decode(str(proof["signature"]), validate=True)
        except ValueError:
            raise refused("the signature is not base64") from None
        chain, message = str(proof["chain"]), svid_message(room, statement.digest)
        judged = partial(svid.verify, chain, signature, message, authority.bundle, now, self.revoked)
        found = _svid(authority, judged)
        return found.uri, found.until


def keys_of(text: str) -> list[dict[str, Any]]:
    """The keys of a JWK set (RFC 7517); BackendError ``issuer.unreachable`` for what is none."""
    try:
        value = json.loads(text)
        found = value["keys"]
    except (ValueError, RecursionError, TypeError, KeyError):
        found = None
    if not isinstance(found, list) or len(found) > _KEYS or not all(isinstance(each, dict) for each in found):
        raise BackendError("issuer.unreachable", f"the issuer's keys are not a set of at most {_KEYS}")
    return found


def issuer_of(token: str) -> str:
    """Whose token this says to be; not checked. AuthRequired ``login.refused``."""
    issuer = _parts(token)[1].get("iss")
    if not isinstance(issuer, str):
        raise refused("the token does not say whose it is")
    return issuer


def _check_purpose(authority: Authority, claims: Mapping[str, Any], audience: str, nonce: str) -> None:
    """That it was made for what is asked: by its audience, or by its nonce."""
    if authority.binding == NONCE:
        audience = authority.audience
        if claims.get("nonce") != nonce:
            raise refused("the token was not made for this key, or for this: its nonce is another")
    if claims.get("aud") not in (audience, [audience]):
        raise refused("the token was made for somebody else, or not for this key: its audience is another")
    if claims.get("azp", audience) != audience and authority.binding != AUDIENCE:
        raise refused("the token was given to somebody else")


def _check_claims(authority: Authority, claims: Mapping[str, Any], now: int, *, once: bool = True) -> None:
    """Step 4c. `once`: it was made to be used now, and never again."""
    if claims.get("iss") != authority.name:
        raise refused(f"the token is by {claims.get('iss')!r:.200}, letter by letter not {authority.name!r:.200}")
    if not isinstance(claims.get("sub"), str) or not 0 < len(claims["sub"]) <= 255:
        raise refused("the token names nobody")
    times = {name: claims.get(name, 0 if name == "nbf" else None) for name in ("iat", "exp", "nbf")}
    if not all(map(_time, times.values())):
        raise refused("the token does not say when it was made, and when it ends")
    if now >= times["exp"] + _LEEWAY:
        raise refused("the token has expired", "get a new one, and run strongroom login at once")
    if now < max(times["iat"], times["nbf"]) - _LEEWAY:
        raise refused("the token is not good yet: the issuer's clock and the custodian's differ")
    if once and now - times["iat"] > _YOUNG + _LEEWAY:
        raise refused(f"the token is older than {_YOUNG} seconds", "get a new one, and run strongroom login at once")


def _time(value: object) -> bool:
    """Neither Infinity nor NaN, which JSON as Python reads it has, and which is later than nothing."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 2**53


def _parts(token: str) -> tuple[dict[str, Any], dict[str, Any]]:
    parts = token.split(".")
    if len(token) > _TOKEN or len(parts) != 3 or not all(parts):
        raise refused("that is no signed token")
    found = []
    for part in parts[:2]:
        try:
            value = json.loads(_decoded(part), object_pairs_hook=_once)
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict):
            raise refused("that is no signed token")
        found.append(value)
    return found[0], found[1]


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Two readers that take the first and the last of two members would see two tokens."""
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError
    return value


def _decoded(text: str) -> bytes:
    try:
        padded = text.encode("ascii") + b"=" * (-len(text) % 4)
        return base64.b64decode(padded, altchars=b"-_", validate=True)
    except ValueError:
        return b""


# -- workloads ---------------------------------------------------------------------------------------------------------


def _svid(authority: Authority, judge: Callable[[], svid.Svid]) -> svid.Svid:
    """The workload of the trust domain of `authority` that `judge` finds in a chain."""
    try:
        found = judge()
        domain = trust_domain(found.uri)
    except (Tampered, UsageError) as error:
        raise refused(error.message) from None
    if domain != authority.name:
        raise refused(f"the certificate is of the trust domain {domain}, and not of {authority.name}")
    return found


def check(authority: Authority) -> None:
    """UsageError ``authority.malformed`` for keys or certificates that can't be read: found out now, and not by whoever
    logs in."""
    try:
        if authority.bundle:
            svid.check_bundle(authority.bundle)
        if authority.jwks:
            keys_of(authority.jwks)
    except StrongroomError as error:
        raise UsageError("authority.malformed", f"the authority is malformed: {error.message}") from None
