"""Certificates of workloads that are none."""

import datetime as dt
import ssl
import time

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding

from strongroom.crypto import svid
from strongroom.errors import Tampered, UsageError


def certificate(*more):
    """A certificate that names a workload, with these extensions besides; DER."""
    key, now = Ed25519PrivateKey.generate(), dt.datetime.now(dt.UTC)
    name = x509.Name([])
    made = x509.CertificateBuilder(name, name, key.public_key(), 1, now, now + dt.timedelta(hours=1))
    uri = x509.UniformResourceIdentifier("spiffe://example.org/w")
    made = made.add_extension(x509.SubjectAlternativeName([uri]), critical=True)
    for each in more:
        made = made.add_extension(each, critical=False)
    return made.sign(key, None).public_bytes(Encoding.DER)


def pem(der):
    return ssl.DER_cert_to_PEM_cert(der)


def test_the_name_of_a_workload():
    assert svid.uri_of(pem(certificate())) == "spiffe://example.org/w"


def test_an_extension_that_is_there_twice_is_none():
    """Two readers could see two names; and what nobody expects would be a fault of the server that is shown it."""
    other = x509.UnrecognizedExtension(x509.ObjectIdentifier("2.5.29.99"), b"0\x00")
    twice = certificate(other).replace(b"\x55\x1d\x63", b"\x55\x1d\x11")
    with pytest.raises(UsageError) as caught:
        svid.uri_of(pem(twice))
    assert caught.value.code == "svid.chain"
    with pytest.raises(Tampered):
        svid.shown(pem(twice), pem(certificate()), int(time.time()))
