"""What a key bundle opens, and what it does not: the property that marking rests on."""

from __future__ import annotations

from pathlib import Path

import pytest
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import example, given, settings
from hypothesis import strategies as st

from strongroom.crypto.segments import VARIANT_A, VersionKeys, pack_key
from strongroom.errors import Tampered
from strongroom.formats.bundle import KeyBundle
from strongroom.formats.manifest import TAG_BYTES
from strongroom.marking.mark import Marker
from strongroom.storage.image import SealedImage, sealed_segments
from strongroom.storage.reader import ImageReader
from strongroom.vault.release import Bundles
from vault.rooms import OWNER, REF, House, original

PART = st.from_regex(r"[a-z0-9][a-z0-9._-]{0,12}", fullmatch=True).filter(lambda text: ".." not in text)
HOLDERS = st.builds("{}/{}".format, st.sampled_from(["user", "workload", "team"]), PART)


class Version:
    """A version with everything that its custodian knows of it."""

    def __init__(self, house: House) -> None:
        self.house = house
        vault = house.vault
        self.record = vault.record(vault.find(REF))
        self.manifest = vault.manifest(self.record)
        self.signer = vault.keys.signer.public_key
        self.image = vault.image(self.record)
        self.layout = self.image.layout
        self.keys = VersionKeys.of(self.record.version_key, self.manifest.positions)
        self.segments = {s.index: s for k in range(len(self.layout.stripes)) for s in self.layout.stripe(k)}

    def bundle(self, holder: str) -> KeyBundle:
        return Bundles(self.record, self.manifest, self.signer).of(holder)

    def read(self, bundle: KeyBundle) -> bytes:
        return bytes(ImageReader(self.house.vault.blobs, bundle, workers=1).read_all())

    def sealed(self, position: int, variant: int) -> tuple[bytes, bytes]:
        """The ciphertext of one variant, and its nonce."""
        pack = next(pack for pack in self.manifest.marked_packs if pack.first <= position < pack.end)
        for number, which, offset, size in sealed_segments(self.manifest, pack):
            if (number, which) == (position, variant):
                data = (self.house.store / pack.name).read_bytes()[offset : offset + size]
                return data, pack.id[:12]
        raise AssertionError

    def variants(self, position: int) -> tuple[bytes, bytes]:
        """A and B, decrypted with the custodian's keys."""
        found = []
        for variant in (0, 1):
            out = memoryview(bytearray(self.layout.marked))
            key = self.keys.variant_key(position, variant)
            self.image.read_marked(position, variant, key, out, self.image.scratch())
            found.append(bytes(out))
        return found[0], found[1]


@pytest.fixture(scope="module")
def version(pristine_packs):
    return Version(pristine_packs)


@pytest.fixture(scope="module")
def files(version, source: Path):
    return original(version.house, REF, source)


def test_the_version_is_worth_the_test(version):
    assert version.manifest.positions == len(version.segments) >= 20
    assert len(version.manifest.marked_packs) > 3
    assert all(a != b for a, b in map(version.variants, version.segments))


@settings(max_examples=40)
@given(holder=HOLDERS)
@example(holder=OWNER)
def test_no_bundle_opens_the_other_variant_of_any_position(version, holder):
    """Whatever is in the bundle or follows from it is tried as a key on the other variant's ciphertext, as that segment
    and as each other kind; GCM refuses all of it."""
    bundle = version.bundle(holder)
    common = [bundle.common_key, *(pack_key(bundle.common_key, pack.id) for pack in version.manifest.packs)]
    variant_keys = [bundle.variant_key(position) for position in range(bundle.positions)]
    assert len(set(variant_keys)) == bundle.positions
    aeads = [AESGCM(key) for key in (*common, *variant_keys)]
    for position in range(bundle.positions):
        other = 1 - bundle.variant(position)
        assert version.keys.variant_key(position, other) not in variant_keys
        sealed, nonce = version.sealed(position, other)
        associated = [version.image.cipher._associated_data(kind, position) for kind in (0, 1, 2)]
        for aead in aeads:
            with pytest.raises(InvalidTag):
                aead.decrypt(nonce, sealed, associated[VARIANT_A + other])
        own = AESGCM(bundle.variant_key(position))
        for data in associated:
            with pytest.raises(InvalidTag):
                own.decrypt(nonce, sealed, data)
        # The same way of opening does open what is theirs: the test can fail.
        mine, nonce = version.sealed(position, 1 - other)
        assert len(own.decrypt(nonce, mine, associated[VARIANT_A + 1 - other])) == len(mine) - TAG_BYTES


@settings(max_examples=25)
@given(holder=HOLDERS)
def test_nor_does_the_reader(version, holder):
    bundle = version.bundle(holder)
    image = SealedImage.open(version.house.vault.blobs, bundle)
    for position in range(bundle.positions):
        out = memoryview(bytearray(b"\xa5" * version.layout.marked))
        with pytest.raises(Tampered) as caught:
            image.read_marked(
                position, 1 - bundle.variant(position), bundle.variant_key(position), out, image.scratch()
            )
        assert caught.value.code == "key.wrong"


def test_a_and_b_reconstruct_the_original_bit_for_bit(version, files):
    marker = Marker(version.record.mark_key, version.layout)
    for position, segment in version.segments.items():
        a, b = version.variants(position)
        plain = files[segment.start : segment.end]
        assert a != plain != b
        assert marker.original(position, memoryview(a), memoryview(b)) == plain


@settings(max_examples=25)
@given(holder=HOLDERS)
@example(holder=OWNER)
def test_a_holder_reads_the_files_with_a_or_b_at_each_position_as_the_word_says(version, files, holder):
    bundle = version.bundle(holder)
    expected = bytearray(files)
    for position, segment in version.segments.items():
        expected[segment.start : segment.end] = version.variants(position)[bundle.variant(position)]
    assert version.read(bundle) == expected


@settings(max_examples=25)
@given(one=HOLDERS, two=HOLDERS)
def test_two_holders_differ_exactly_where_their_words_do(version, one, two):
    a, b = version.bundle(one), version.bundle(two)
    x, y = version.read(a), version.read(b)
    different = {position for position, s in version.segments.items() if x[s.start : s.end] != y[s.start : s.end]}
    assert different == {position for position in version.segments if a.variant(position) != b.variant(position)}
    assert (a.word == b.word) == (x == y)
    common = [version.layout.common_segment(k) for k in range(len(version.layout.stripes))]
    assert all(x[s.start : s.end] == y[s.start : s.end] for s in common)
    if one == two:
        assert a == b


def test_words_of_many_holders_differ(version):
    words = {version.bundle(f"user/holder-{number}").word for number in range(200)}
    assert len(words) > 50  # of a code as short as this, some are the same


def test_the_word_stays_over_releases_and_rotations(house):
    """A holder who reads before and after must not own two differently marked copies."""
    house.register("team/red")
    for holder in (OWNER, "team/red"):
        before, image = house.vault.bundle(REF, holder), house.read(REF, holder)
        assert house.vault.bundle(REF, holder) == before
        house.vault.rotate(REF, by=OWNER)
        after = house.vault.bundle(REF, holder)
        assert after.word == before.word
        assert after.revision == before.revision + 1
        assert house.read(REF, holder) == image
        keys = {before.common_key, *(before.variant_key(k) for k in range(before.positions))}
        assert not keys & {after.common_key, *(after.variant_key(k) for k in range(after.positions))}
        assert before.manifest_digest != after.manifest_digest


def test_two_versions_of_the_same_files_have_unrelated_keys_and_marks(house, source):
    again = house.put(source).ref
    one, two = house.vault.bundle(REF, OWNER), house.vault.bundle(again, OWNER)
    assert {one.variant_key(k) for k in range(one.positions)}.isdisjoint(
        two.variant_key(k) for k in range(two.positions)
    )
    assert house.read(REF) != house.read(again)


def test_repr_shows_no_key(house):
    bundle = house.vault.bundle(REF, OWNER)
    record = house.vault.record(house.vault.find(REF))
    for text in (repr(bundle), str(bundle), repr(record), repr(VersionKeys.of(record.version_key, 3))):
        assert "word" not in text  # whose three bytes may be those of something else
        for secret in (bundle.common_key, bundle.variant_key(0), record.version_key, record.mark_root):
            assert repr(secret)[2:-1] not in text
            assert secret.hex() not in text
