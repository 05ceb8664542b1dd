"""X.509 certificates of workloads: SPIFFE X509-SVIDs, and proof that somebody has the key of one."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from cryptography.x509 import verification
from cryptography.x509.verification import Criticality, ExtensionPolicy, PolicyBuilder, Store

from strongroom.crypto.revocation import RevocationLists
from strongroom.errors import Tampered, UsageError

_DEPTH = 4  # certificates between a workload's own and the bundle
_CHAIN = 8
_RSA_BITS = 2048
_REFUSED = (
    *(verification.VerificationError, ValueError, TypeError, UnsupportedAlgorithm),
    *(x509.ExtensionNotFound, x509.DuplicateExtension),
)
_CURVES = (ec.SECP256R1, ec.SECP384R1)
_NONE = RevocationLists()


@dataclass(frozen=True)
class Svid:
    """Whom a certificate names (its URI), and until when it is good, in seconds."""

    uri: str
    until: int


def verify(
    chain: str, signature: bytes, message: bytes, bundle: str, now: int, revoked: RevocationLists = _NONE
) -> Svid:
    """The workload that has signed `message`, by the PEM `chain` of its certificate, its own first, up to one of
    `bundle`. X509-SVID (SPIFFE), section 5: one URI and no other names, a leaf that may sign and is no authority; and
    nothing of it is `revoked`. Tampered ``svid.invalid``."""
    leaf, found, _ = _judged(chain, bundle, now, revoked)
    try:
        _check(leaf.public_key(), signature, message)
    except _REFUSED as error:
        raise _invalid(str(error)[:300]) from None
    except InvalidSignature:
        raise _invalid("the login is not signed with the certificate's key") from None
    return found


def shown(chain: str, bundle: str, now: int, revoked: RevocationLists = _NONE) -> Svid:
    """As `verify`, of a chain whose key somebody else has proved: TLS, in its handshake. It is good until the list ends
    by which it is not revoked, if that is sooner."""
    leaf, found, known = _judged(chain, bundle, now, revoked)
    try:
        _check_kind(leaf.public_key())
    except _REFUSED as error:
        raise _invalid(str(error)[:300]) from None
    return found if known is None else Svid(found.uri, min(found.until, known))


def _judged(chain: str, bundle: str, now: int, revoked: RevocationLists) -> tuple[x509.Certificate, Svid, int | None]:
    certificates = _load(chain, "the chain")
    if len(certificates) > _CHAIN:
        raise _invalid(f"the chain has more than {_CHAIN} certificates")
    leaf, between = certificates[0], certificates[1:]
    usual = ExtensionPolicy.webpki_defaults_ca()
    own = (
        ExtensionPolicy.permit_all()
        .require_present(x509.SubjectAlternativeName, Criticality.AGNOSTIC, _one_uri)
        .require_present(x509.KeyUsage, Criticality.AGNOSTIC, _signs)
        .may_be_present(x509.BasicConstraints, Criticality.AGNOSTIC, _no_authority)
    )
    anchors = _load(bundle, "the bundle")
    try:
        policy = (
            PolicyBuilder()
            .store(Store(anchors))
            .time(datetime.fromtimestamp(now, UTC))
            .max_chain_depth(_DEPTH)
            .extension_policies(ca_policy=usual, ee_policy=own)
        )
        verified = policy.build_client_verifier().verify(leaf, between)
        known = revoked.check(verified.chain, anchors, now)
        names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        (uri,) = names.get_values_for_type(x509.UniformResourceIdentifier)
    except _REFUSED as error:
        raise _invalid(str(error)[:300]) from None
    return leaf, Svid(uri, int(leaf.not_valid_after_utc.timestamp())), known


def check_bundle(bundle: str) -> None:
    """Tampered ``svid.invalid`` unless these are certificates of authorities."""
    for each in _load(bundle, "the bundle"):
        try:
            if each.extensions.get_extension_for_class(x509.BasicConstraints).value.ca:
                continue
        except (x509.ExtensionNotFound, ValueError):
            pass
        raise _invalid("a certificate of the bundle is not that of an authority")


def uri_of(chain: str) -> str:
    """The URI in the first certificate, unchecked; UsageError ``svid.chain``."""
    try:
        names = _load(chain, "the file")[0].extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        return names.get_values_for_type(x509.UniformResourceIdentifier)[0]
    except (Tampered, x509.ExtensionNotFound, x509.DuplicateExtension, ValueError, IndexError):
        raise UsageError("svid.chain", "the file has no certificate of a workload", hint="--svid CERT KEY") from None


def sign(key: bytes, message: bytes) -> bytes:
    """The signature of `message` with the PEM private key of a workload; UsageError ``svid.key``."""
    try:
        private = load_pem_private_key(key, None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise UsageError("svid.key", "the file has no private key that can be read", hint="--svid CERT KEY") from None
    if isinstance(private, ed25519.Ed25519PrivateKey):
        return private.sign(message)
    if isinstance(private, ec.EllipticCurvePrivateKey):
        return private.sign(message, ec.ECDSA(SHA256()))
    if isinstance(private, rsa.RSAPrivateKey):
        return private.sign(message, padding.PSS(padding.MGF1(SHA256()), 32), SHA256())
    raise UsageError("svid.key", "the key is none of Ed25519, ECDSA and RSA", hint="--svid CERT KEY")


def _check(key: object, signature: bytes, message: bytes) -> None:
    _check_kind(key)
    if isinstance(key, ed25519.Ed25519PublicKey):
        key.verify(signature, message)
    elif isinstance(key, ec.EllipticCurvePublicKey):
        key.verify(signature, message, ec.ECDSA(SHA256()))
    elif isinstance(key, rsa.RSAPublicKey):
        key.verify(signature, message, padding.PSS(padding.MGF1(SHA256()), 32), SHA256())


def _check_kind(key: object) -> None:
    fine = (
        isinstance(key, ed25519.Ed25519PublicKey)
        or (isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, _CURVES))
        or (isinstance(key, rsa.RSAPublicKey) and key.key_size >= _RSA_BITS)
    )
    if not fine:
        raise ValueError("the certificate's key is none of Ed25519, ECDSA P-256 or P-384, and RSA of 2048 bits")


def _load(text: str, what: str) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(text.encode())
    except (ValueError, UnsupportedAlgorithm):
        raise _invalid(f"{what} has no certificates") from None


def _one_uri(_: object, __: x509.Certificate, names: x509.SubjectAlternativeName) -> None:
    if len(list(names)) != 1 or len(names.get_values_for_type(x509.UniformResourceIdentifier)) != 1:
        raise ValueError("a workload's certificate has exactly one name, a URI")


def _signs(_: object, __: x509.Certificate, usage: x509.KeyUsage) -> None:
    if not usage.digital_signature or usage.key_cert_sign or usage.crl_sign:
        raise ValueError("a workload's certificate is for signatures, and not for certificates")


def _no_authority(_: object, __: x509.Certificate, constraints: x509.BasicConstraints | None) -> None:
    if constraints is not None and constraints.ca:
        raise ValueError("a workload's certificate is not that of an authority")


def _invalid(why: str) -> Tampered:
    return Tampered("svid.invalid", f"the certificate is refused: {why}")
