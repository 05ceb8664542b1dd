"""Manifest, envelope, trailer, bundle, index: round trips, and any bytes raise only our errors."""

import hashlib
import os
import tracemalloc
from dataclasses import replace
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from strongroom.errors import StrongroomError, Tampered
from strongroom.formats.bundle import KeyBundle
from strongroom.formats.dsse import Envelope, pre_authentication_encoding
from strongroom.formats.index import Index
from strongroom.formats.layout import Layout
from strongroom.formats.manifest import COMMON, MARKED, PAYLOAD_TYPE, Manifest, PackEntry
from strongroom.formats.pack import Trailer
from strongroom.formats.suites import Suite

ID = bytes(range(32))


def manifest(suite=Suite.BLAKE3):
    return Manifest(
        suite=suite,
        room=b"r" * 16,
        version=b"v" * 16,
        revision=3,
        common_bytes=10_000,
        common_segment=4096,
        common_packs=(PackEntry(ID, COMMON, 0, 2, b"d" * 32), PackEntry(b"\xff" * 32, COMMON, 2, 1, b"e" * 32)),
        positions=5,
        marked_segment=4096,
        marked_packs=(PackEntry(b"m" * 32, MARKED, 0, 5, b"f" * 32),),
        index_bytes=5000,
        index_digest=b"i" * 32,
    )


def bundle(positions=11):
    return KeyBundle(
        suite=Suite.BLAKE3,
        room=b"r" * 16,
        version=b"v" * 16,
        revision=1,
        manifest_digest=b"d" * 32,
        signer=b"s" * 32,
        holder="user/ana",
        ref="acme/tiny@1",
        common_key=b"c" * 32,
        word=bytes(-(-positions // 8)),
        variant_keys=os.urandom(32 * positions),
    )


def test_a_manifest_survives_its_encoding():
    assert Manifest.decode(manifest().encode()) == manifest()


def test_body_sizes_follow_from_the_manifest():
    m = manifest()
    assert [m.body_bytes(pack) for pack in m.packs] == [2 * 4112, 10_000 - 8192 + 16, 10 * 4112]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"revision":3', b'"revision":0'),
        (b'"revision":3', b'"revision":3.0'),
        (b'"revision":3', b'"revision":true'),
        (b'"format":1', b'"format":2'),
        (b'"first":2', b'"first":1'),
        (b'"count":5', b'"count":4'),
        (b'"positions":5', b'"positions":6'),
        (b'"bytes":10000', b'"bytes":20000'),
        (b'"suite":1', b'"suite":7'),
        (b'"room":"72', b'"room":"7G'),
        (b'{"common"', b'{"common" '),
        (b'"suite":1', b'"suite":1,"suite":2'),
        (b"6d6d", b"6D6D"),
    ],
)
def test_a_manifest_that_does_not_hold_together_is_refused(old, new):
    data = manifest().encode()
    assert old in data
    with pytest.raises(StrongroomError):
        Manifest.decode(data.replace(old, new, 1))


def test_a_pack_listed_twice_is_refused():
    m = manifest()
    twice = replace(m, common_packs=(m.common_packs[0], PackEntry(ID, COMMON, 2, 1, b"e" * 32)))
    with pytest.raises(Tampered):
        Manifest.decode(twice.encode())


def test_pae_is_that_of_the_dsse_specification():
    # The example of the protocol's own page.
    assert (
        pre_authentication_encoding("http://example.com/HelloWorld", b"hello world")
        == b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"
    )


def test_an_envelope_survives_its_encoding():
    envelope = Envelope(PAYLOAD_TYPE, b"payload", (("key", b"signature"),))
    assert Envelope.decode(envelope.encode(), payload_type=PAYLOAD_TYPE) == envelope
    with pytest.raises(Tampered):
        Envelope.decode(envelope.encode(), payload_type="application/other")


def test_base64_with_stray_bits_is_refused():
    data = Envelope(PAYLOAD_TYPE, b"x", (("key", b"s"),)).encode()
    assert b'"eA=="' in data
    with pytest.raises(Tampered):
        Envelope.decode(data.replace(b'"eA=="', b'"eB=="'), payload_type=PAYLOAD_TYPE)


def traced_peak(act):
    tracemalloc.start()
    try:
        act()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "wrap",
    [b"[%s{}]", b'{"a":[%s{}]}', b'{"payload":"","x":[%s{}]}', b'{"payload":"%s"}', b'{"payload":"%s'],
)
def test_a_large_envelope_makes_no_objects(wrap):
    data = wrap % (b"{}," * (2 << 20))

    def decode():
        with pytest.raises(Tampered):
            Envelope.decode(data, payload_type=PAYLOAD_TYPE)

    assert traced_peak(decode) < 3 * len(data)


def test_a_large_payload_is_read():
    envelope = Envelope(PAYLOAD_TYPE, bytes(1 << 20), (("key", b"signature"),))
    assert Envelope.decode(envelope.encode(), payload_type=PAYLOAD_TYPE) == envelope


@pytest.mark.parametrize("payload", [b"5", b"null", b'"e\\u0041=="', b'"\xff"', b'"eA"', b'"eA==","payload":"eA=="'])
def test_a_payload_has_one_form(payload):
    data = Envelope(PAYLOAD_TYPE, b"x", (("key", b"s"),)).encode()
    with pytest.raises(Tampered):
        Envelope.decode(data.replace(b'"eA=="', payload, 1), payload_type=PAYLOAD_TYPE)


def test_a_trailer_says_what_was_recorded():
    records = [tuple(bytes([16 * k + part]) * 32 for part in range(4)) for k in range(5)]
    trailer = Trailer.marked(Suite.BLAKE3, 0, 4096, b"m" * 32, records)
    again = Trailer.decode(trailer.encode())
    assert again == trailer
    for k, record in enumerate(records):
        assert again.marked_record(k, 0) == (record[0], record[2])
        assert again.marked_record(k, 1) == (record[1], record[3])
        assert (again.digest_of(k, 0), again.digest_of(k, 1)) == record[:2]


@pytest.mark.parametrize("suite", list(Suite))
def test_a_trailer_must_be_the_pinned_one(suite):
    trailer = Trailer.common(suite, 0, 4096, 4096, ID, b"k" * 32, [b"1" * 32, b"2" * 32])
    data = trailer.encode()
    entry = PackEntry(ID, COMMON, 0, 2, suite.digest(data))
    m = replace(manifest(suite), common_packs=(entry, manifest().common_packs[1]))
    assert Trailer.verify(data, m, entry) == trailer
    for bit in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(Tampered):
            Trailer.verify(bytes(flipped), m, entry)


def test_a_pinned_trailer_of_another_place_is_refused():
    trailer = Trailer.common(Suite.BLAKE3, 7, 4096, 4096, ID, b"k" * 32, [b"1" * 32, b"2" * 32]).encode()
    entry = PackEntry(ID, COMMON, 0, 2, Suite.BLAKE3.digest(trailer))
    m = replace(manifest(), common_packs=(entry, manifest().common_packs[1]))
    with pytest.raises(Tampered, match="does not say"):
        Trailer.verify(trailer, m, entry)


@given(st.integers(0, 70))
def test_a_bundle_survives_its_encoding(positions):
    b = bundle(positions)
    again = KeyBundle.decode(b.encode())
    assert again == b
    assert again.positions == positions


def test_every_bit_of_a_bundle_counts():
    data = bundle(3).encode()
    for bit in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(StrongroomError):
            KeyBundle.decode(bytes(flipped))
    for size in range(len(data)):
        with pytest.raises(StrongroomError):
            KeyBundle.decode(data[:size])


def test_a_bundle_does_not_show_its_keys():
    text = repr(bundle())
    assert "common_key" not in text
    assert "variant_keys" not in text
    assert "cccc" not in text


def test_a_manifest_that_was_read_has_the_digest_of_what_was_signed():
    written = manifest()
    read = Manifest.decode(written.encode())
    assert read.digest() == written.digest() == hashlib.sha256(written.encode()).digest()
    assert replace(read, common_packs=()).digest() != written.digest()


@pytest.mark.parametrize("number", [b"1.5", b"1.0", b"9007199254740992", b"NaN"])
@pytest.mark.parametrize("member", [b'"report":{"x":%s}', b'"report":{"x":[{"y":[%s]}]}'])
def test_a_report_of_an_index_has_numbers_that_all_readers_agree_on(number, member):
    layout = Layout.plan([], [], share=Fraction(0), positions=0)
    plain = Index(layout, (), {}).encode()
    text = plain[8 : 8 + int.from_bytes(plain[:8], "little")].replace(b'"report":{}', member % number)
    plain = len(text).to_bytes(8, "little") + text
    with pytest.raises(Tampered) as caught:
        Index.decode(plain + bytes(-len(plain) % 4096))
    assert caught.value.code == "json.malformed"


PARSERS = {
    "manifest": Manifest.decode,
    "envelope": lambda data: Envelope.decode(data, payload_type=PAYLOAD_TYPE),
    "trailer": Trailer.decode,
    "bundle": KeyBundle.decode,
    "index": Index.decode,
}


@pytest.mark.parametrize("name", PARSERS)
@given(data=st.binary(max_size=300))
def test_any_bytes_raise_only_ours(name, data):
    with pytest.raises(StrongroomError):
        PARSERS[name](data)


SAMPLES = {
    "manifest": manifest().encode(),
    "envelope": Envelope(PAYLOAD_TYPE, b"payload", (("key", b"signature"),)).encode(),
    "trailer": Trailer.common(Suite.BLAKE3, 0, 4096, 4096, ID, b"k" * 32, [b"1" * 32]).encode(),
    "bundle": bundle().encode(),
}


@pytest.mark.parametrize("name", SAMPLES)
@given(data=st.data())
def test_changed_bytes_raise_only_ours(name, data):
    sample = bytearray(SAMPLES[name])
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(sample) - 1))
        sample[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    try:
        PARSERS[name](bytes(sample))
    except StrongroomError:
        return
