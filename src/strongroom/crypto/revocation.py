"""Lists of certificates that their authorities have taken back (CRLs, RFC 5280, section 5).

OpenSSL could look at them in the handshake. It would then refuse whoever is of an authority without a list, can be told
of no newer one in place of an older one, and sees no connection that was made before.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, datetime
from itertools import pairwise

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import SignatureAlgorithmOID

from strongroom.errors import UsageError

FILE_MOST = 64 << 20  # bytes
_BLOCK = re.compile(rb"-----BEGIN (X509 CRL|CERTIFICATE)-----.*?-----END \1-----", re.DOTALL)
_SKEW = 60  # seconds that the authority's clock may be ahead
_HASHES = ("sha256", "sha384", "sha512")
_REFUSED = (
    *(ValueError, TypeError, UnsupportedAlgorithm, InvalidSignature),
    *(x509.ExtensionNotFound, x509.DuplicateExtension, x509.UnsupportedGeneralNameType),
)
_PAGE = "see docs/how-to/give-inference.md"
_Key = tuple[bytes, bytes]  # of whoever has signed a list: name and public key


class RevocationLists:
    """`lists` by who has signed them, and of each the `roots` that this is, or is below. `digest` is another one
    whenever they are others, empty without any."""

    def __init__(
        self,
        lists: dict[_Key, x509.CertificateRevocationList] | None = None,
        roots: Mapping[_Key, Collection[_Key]] | None = None,
    ) -> None:
        self._lists, self._below = lists or {}, roots or {}
        self._roots = frozenset(root for each in self._below.values() for root in each)
        found = sorted(each.fingerprint(SHA256()) for each in self._lists.values())
        self.digest = hashlib.sha256(b"".join(found)).hexdigest() if found else ""

    @classmethod
    def decode(cls, files: Sequence[tuple[str, bytes]], bundles: Sequence[str], now: int) -> RevocationLists:
        """Those of `files` (name and content: one DER list, or PEM of lists, and of authorities between one of
        `bundles` and a list). UsageError: ``revocation.malformed`` (no list, a partial one, one without an end),
        ``revocation.stranger`` (signed by no authority of `bundles`), ``revocation.expired``."""
        roots = [each for bundle in bundles for each in x509.load_pem_x509_certificates(bundle.encode())]
        found: dict[_Key, x509.CertificateRevocationList] = {}
        over: dict[_Key, set[_Key]] = {}
        for name, data in files:
            lists, between = _parts(name, data)
            below = [(root, _below(root, between)) for root in roots]
            for each in lists:
                _check_kind(name, each)
                signed = [(root, one) for root, issuers in below for one in issuers if _signed(each, one)]
                if not signed:
                    raise UsageError(
                        "revocation.stranger",
                        f"{name} has a list that no authority of this room has signed: {_named(each)}",
                        hint="strongroom authority ls; where an authority below it has signed, put its certificate "
                        "into the file, too",
                    )
                if why := _untimely(each, now):
                    raise UsageError("revocation.expired", f"{name}: the list of {_named(each)} {why}", hint=_PAGE)
                key = _key(signed[0][1])
                over.setdefault(key, set()).update(_key(root) for root, _ in signed)
                if key not in found or found[key].last_update_utc < each.last_update_utc:
                    found[key] = each
        return cls(found, over)

    def check_after(self, before: RevocationLists, bundles: Sequence[str]) -> None:
        """UsageError ``revocation.older`` where a list is older than the one in force, ``revocation.gone`` where there
        is none any more of an authority that is one of `bundles`, or below one: what was taken back would be good
        again."""
        roots = {_key(each) for bundle in bundles for each in x509.load_pem_x509_certificates(bundle.encode())}
        for key, each in before._lists.items():
            if key not in self._lists and not roots.isdisjoint(before._below[key]):
                raise UsageError(
                    "revocation.gone",
                    f"the list of {_named(each)} is in force, and none of the files has one of that authority",
                    hint="put it into a file again; if that authority has none any more: end this, and start it again",
                )
        for key, each in self._lists.items():
            known = before._lists.get(key)
            if known is not None and each.last_update_utc < known.last_update_utc:
                raise UsageError(
                    "revocation.older",
                    f"the list of {_named(each)} is of {each.last_update_utc:%Y-%m-%d %H:%M:%S}, and one of "
                    f"{known.last_update_utc:%Y-%m-%d %H:%M:%S} is in force",
                    hint=_PAGE,
                )

    def check(self, chain: Sequence[x509.Certificate], anchors: Sequence[x509.Certificate], now: int) -> int | None:
        """That nothing of a verified `chain` (its own certificate first) is taken back, and until when that is known,
        in seconds; None where there is no list of any of `anchors`, the authorities of its trust domain. ValueError.

        Where there is one, whoever has issued the first certificate needs one: else an authority that was itself taken
        back, or a file that is missing, would be a way in."""
        if not any(_key(each) in self._roots for each in anchors):
            return None
        until = None
        for each, issuer in pairwise(chain):
            known = self._lists.get(_key(issuer))
            if known is None:
                if each is chain[0]:
                    raise ValueError(f"there is no revocation list of {_text(issuer.subject)}")
                continue
            if why := _untimely(known, now):
                raise ValueError(f"the revocation list of {_named(known)} {why}")
            if known.get_revoked_certificate_by_serial_number(each.serial_number) is not None:
                raise ValueError("its authority has taken it back")
            until = _end(known) if until is None else min(until, _end(known))
        return until

    @property
    def revoked(self) -> int:
        """How many certificates are on them."""
        return sum(map(len, self._lists.values()))

    @property
    def end(self) -> int | None:
        """When the first of them ends, in seconds; None without any."""
        return min(map(_end, self._lists.values()), default=None)


def _parts(name: str, data: bytes) -> tuple[list[x509.CertificateRevocationList], list[x509.Certificate]]:
    lists, between = [], []
    try:
        if b"-----BEGIN" not in data:
            lists.append(x509.load_der_x509_crl(data))
        for match in _BLOCK.finditer(data):
            if match[1] == b"CERTIFICATE":
                between.append(x509.load_pem_x509_certificate(match[0]))
            else:
                lists.append(x509.load_pem_x509_crl(match[0]))
    except _REFUSED as error:
        raise _malformed(name, str(error)[:200] or "it can't be read") from None
    if not lists:
        raise _malformed(name, "there is none in it")
    return lists, between


def _below(root: x509.Certificate, between: list[x509.Certificate]) -> list[x509.Certificate]:
    """The `root`, and those of `between` that it, or one of them, has signed."""
    found, left = [root], list(between)
    while True:
        more = [each for each in left if _authority(each) and any(_issued(each, one) for one in found)]
        if not more:
            return found
        found += more
        left = [each for each in left if each not in more]


def _authority(certificate: x509.Certificate) -> bool:
    try:
        return certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except _REFUSED:
        return False


def _issued(certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(issuer)
    except _REFUSED:
        return False
    return True


def _check_kind(name: str, crl: x509.CertificateRevocationList) -> None:
    """A whole list of one authority, by an algorithm that is good. What has a critical extension means something else:
    a part of a list, what was added to one, or other authorities' certificates."""
    try:
        extensions = list(crl.extensions)
        strong = crl.signature_algorithm_oid == SignatureAlgorithmOID.ED25519 or (
            crl.signature_hash_algorithm is not None and crl.signature_hash_algorithm.name in _HASHES
        )
    except _REFUSED as error:
        raise _malformed(name, str(error)[:200]) from None
    if any(each.critical or isinstance(each.value, _PARTIAL) for each in extensions):
        raise _malformed(name, "it is a part of one, or of several authorities; a whole one is expected")
    if not strong:
        raise _malformed(name, "it is signed by an algorithm that is not Ed25519, or with SHA-256 or longer")
    if crl.next_update_utc is None:
        raise _malformed(name, "it does not say when the next one comes")


_PARTIAL = (x509.IssuingDistributionPoint, x509.DeltaCRLIndicator)


def _signed(crl: x509.CertificateRevocationList, issuer: x509.Certificate) -> bool:
    try:
        usage = issuer.extensions.get_extension_for_class(x509.KeyUsage).value
        may = usage.crl_sign
    except x509.ExtensionNotFound:
        may = True
    except _REFUSED:
        return False
    try:
        key = issuer.public_key()
        return may and crl.issuer == issuer.subject and crl.is_signature_valid(key)  # type: ignore[arg-type]
    except _REFUSED:
        return False


def _untimely(crl: x509.CertificateRevocationList, now: int) -> str:
    """What is wrong with its time, if anything is."""
    at = datetime.fromtimestamp(now, UTC)
    if now >= _end(crl):
        return f"ended {crl.next_update_utc:%Y-%m-%d %H:%M:%S} UTC: the authority has a newer one"
    if crl.last_update_utc.timestamp() > at.timestamp() + _SKEW:
        return f"begins {crl.last_update_utc:%Y-%m-%d %H:%M:%S} UTC: it is not good yet"
    return ""


def _end(crl: x509.CertificateRevocationList) -> int:
    end = crl.next_update_utc
    return int(end.timestamp()) if end is not None else 0


def _key(issuer: x509.Certificate) -> _Key:
    public = issuer.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return issuer.subject.public_bytes(), public


def _named(crl: x509.CertificateRevocationList) -> str:
    return _text(crl.issuer)


def _text(name: x509.Name) -> str:
    return repr(name.rfc4514_string()[:200])


def _malformed(name: str, why: str) -> UsageError:
    return UsageError("revocation.malformed", f"{name} is no list of revoked certificates: {why}", hint=_PAGE)
