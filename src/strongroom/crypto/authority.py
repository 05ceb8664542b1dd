"""A certificate authority of the room's own, so that TLS is on from the first minute (RFC 5280).

For rooms that have no public name, and for development: the card that clients are given names this authority, and they
believe no other.
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from strongroom.core.files import locked, write_whole
from strongroom.errors import BackendError, Tampered, UsageError

_YEARS = timedelta(days=3650)
_BACK = timedelta(minutes=5)  # for clients whose clock is behind


class Authority:
    """The authority in `folder`: ``ca.pem`` and its key, made when there is none."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder = folder
        with _alone(folder):  # two that start for the first time would make two
            self._certificate, self._key = self._load(name)

    @property
    def pem(self) -> str:
        """The authority's certificate, which clients are given."""
        return self._certificate.public_bytes(Encoding.PEM).decode()

    @contextmanager
    def issued(self, hosts: list[str]) -> Iterator[Path]:
        """A certificate for a server under these names and addresses, made anew at every start: the file of its chain
        and its key, for the length of the block, in which it is read. A file of its own, which is read twice, for
        chain and key: two that start at the same time would mix theirs.

        It is good for as long as the authority: the authority's own key lies beside it, so that a shorter life would
        protect nothing, and would end a server that runs for longer.
        """
        key = ec.generate_private_key(ec.SECP256R1())
        names: list[x509.GeneralName] = []
        for host in hosts:
            try:
                names.append(x509.IPAddress(ipaddress.ip_address(host)))
            except ValueError:
                if not host.isascii():
                    raise UsageError("authority.name", f"{host!r} is not a host's name", hint="--name HOST") from None
                names.append(x509.DNSName(host))
        now = datetime.now(UTC)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(_name("Strongroom custodian"))
            .issuer_name(self._certificate.subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - _BACK)
            .not_valid_after(self._certificate.not_valid_after_utc)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
            .sign(self._key, SHA256())
        )
        chain = certificate.public_bytes(Encoding.PEM) + self.pem.encode()
        path = _write(self._folder / f"server-{os.urandom(8).hex()}.pem", _private(key) + chain)
        try:
            yield path
        finally:
            path.unlink(missing_ok=True)

    def _load(self, name: str) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
        path, key_path = self._folder / "ca.pem", self._folder / "ca.key"
        if not path.exists():
            return self._make(name, path, key_path)
        try:
            certificate = x509.load_pem_x509_certificate(path.read_bytes())
            key = load_pem_private_key(key_path.read_bytes(), None)
        except (OSError, ValueError) as error:
            raise Tampered("authority.damaged", f"the authority in {self._folder} can't be read: {error}") from None
        if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
            raise Tampered("authority.damaged", f"key and certificate in {self._folder} don't belong together")
        return certificate, key

    def _make(self, name: str, path: Path, key_path: Path) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
        key = ec.generate_private_key(ec.SECP256R1())
        subject, now = _name(name), datetime.now(UTC)
        usage = x509.KeyUsage(
            digital_signature=False,
            content_commitment=False,
            key_encipherment=False,
            data_encipherment=False,
            key_agreement=False,
            key_cert_sign=True,
            crl_sign=True,
            encipher_only=False,
            decipher_only=False,
        )
        certificate = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - _BACK)
            .not_valid_after(now + _YEARS)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(usage, critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .sign(key, SHA256())
        )
        _write(key_path, _private(key))
        _write(path, certificate.public_bytes(Encoding.PEM))  # last: with it the authority is there
        return certificate, key


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """For the length of the block nobody else makes an authority here."""
    with ExitStack() as stack:
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            stack.enter_context(locked(folder / ".lock"))
        except OSError as error:
            raise BackendError("authority.write", f"can't write to {folder}: {error.strerror}") from None
        yield


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text[:64])])


def _private(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _write(path: Path, data: bytes) -> Path:
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_whole(path, data)
    except OSError as error:
        raise BackendError("authority.write", f"can't write {path}: {error.strerror}") from None
    return path
