from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from strongroom.crypto.signatures import Signer, verify
from strongroom.errors import Tampered, UsageError

# RFC 8032 section 7.1: seed, public key, message, signature.
RFC_8032 = [
    (
        "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60",
        "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a",
        "",
        "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e065224901555fb8821590a33bacc61e39701cf9b46b"
        "d25bf5f0595bbe24655141438e7a100b",
    ),
    (
        "4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb",
        "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c",
        "72",
        "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da085ac1e43e15996e458f3613d0f11d8c"
        "387b2eaeb4302aeeb00d291612bb0c00",
    ),
]


@pytest.mark.parametrize(("seed", "public", "message", "signature"), RFC_8032)
def test_vectors_of_rfc_8032(seed, public, message, signature):
    signer = Signer(bytes.fromhex(seed))
    assert signer.public_key.hex() == public
    assert signer.key_id == hashlib.sha256(bytes.fromhex(public)).hexdigest()
    assert signer.sign(bytes.fromhex(message)).hex() == signature
    verify(signer.public_key, bytes.fromhex(signature), bytes.fromhex(message))


def test_every_bit_counts():
    signer = Signer(bytes(32))
    signature = signer.sign(b"manifest")
    for bit in range(512):
        altered = bytearray(signature)
        altered[bit // 8] ^= 1 << bit % 8
        with pytest.raises(Tampered) as caught:
            verify(signer.public_key, bytes(altered), b"manifest")
        assert caught.value.code == "signature.invalid"
    for key, data in ((Signer(bytes([1] * 32)).public_key, b"manifest"), (signer.public_key, b"manifesT")):
        with pytest.raises(Tampered):
            verify(key, signature, data)


@given(key=st.binary(max_size=40), signature=st.binary(max_size=80), data=st.binary(max_size=20))
def test_any_bytes_raise_only_our_error(key, signature, data):
    with pytest.raises(Tampered):
        verify(key, signature, data)
    with pytest.raises(Tampered):
        verify(Signer(bytes(32)).public_key, signature, data)


def test_seeds_have_one_size_and_stay_out_of_texts():
    for size in (0, 31, 33, 64):
        with pytest.raises(UsageError):
            Signer(bytes(size))
    seed = bytes(range(32))
    assert seed.hex() not in repr(Signer(seed))
