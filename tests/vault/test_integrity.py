"""Whoever can write to the store, or to the database, and has no key: everything that they do is found and named."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from strongroom.core.limits import LIMITS
from strongroom.crypto.keys import commitment
from strongroom.crypto.sealing import seal
from strongroom.crypto.segments import COMMON as KIND_COMMON
from strongroom.crypto.segments import VARIANT_A, SegmentCipher, pack_key
from strongroom.crypto.signatures import Signer
from strongroom.errors import IntegrityError, NotFound, Rollback, StrongroomError, Tampered, Truncated
from strongroom.formats.bundle import KeyBundle
from strongroom.formats.dsse import Envelope, pre_authentication_encoding
from strongroom.formats.manifest import COMMON, MARKED, PAYLOAD_TYPE, TAG_BYTES, Manifest, PackEntry
from strongroom.formats.pack import trailer_bytes
from strongroom.storage.image import SealedImage, read_trailer, sealed_segments
from strongroom.storage.reader import ImageReader
from vault.rooms import NAME, OWNER, REF, House


def manifest_of(house: House, ref: str = REF) -> Manifest:
    return house.vault.manifest(house.vault.record(house.vault.find(ref)))


def object_size(manifest: Manifest, pack: PackEntry) -> int:
    return manifest.body_bytes(pack) + trailer_bytes(pack.kind, pack.count)


def unreadable(house: House, bundle: KeyBundle) -> IntegrityError:
    """Opening or reading the image with `bundle` fails, and leaves nothing in the memory that was to be filled."""
    try:
        reader = ImageReader(house.vault.blobs, bundle, workers=2)
    except IntegrityError as error:
        return error
    out = memoryview(bytearray(b"\xa5" * reader.layout.image))
    with pytest.raises(IntegrityError) as caught:
        reader.read_into(out)
    assert not any(out), "the destination was not wiped"
    return caught.value


def named(house: House, kind: str | tuple[str, ...], text: str) -> None:
    """verify reports exactly one problem, of that kind, which names `text`."""
    report = house.vault.verify(REF)
    assert not report.ok
    (problem,) = report.problems
    assert problem.kind in ((kind,) if isinstance(kind, str) else kind), problem
    assert text in str(problem.as_json()), problem


class TestSingleBits:
    def test_every_bit_of_the_manifest(self, house):
        bundle = house.vault.bundle(REF, OWNER)
        name = manifest_of(house).name
        for byte in range((house.store / name).stat().st_size):
            for bit in range(8):
                with house.flipped(name, byte, bit), pytest.raises(IntegrityError) as caught:
                    SealedImage.open(house.vault.blobs, bundle)
                assert name in caught.value.message

    def test_every_bit_of_the_index(self, house):
        bundle, manifest = house.vault.bundle(REF, OWNER), manifest_of(house)
        for byte in range(manifest.index_bytes):
            for bit in range(8):
                with house.flipped(manifest.index_name, byte, bit), pytest.raises(Tampered, match="index"):
                    SealedImage(house.vault.blobs, manifest, bundle.common_key)

    @pytest.mark.parametrize("kind", [COMMON, MARKED])
    def test_every_bit_of_a_trailer(self, house, kind):
        manifest = manifest_of(house)
        (pack,) = [pack for pack in manifest.packs if pack.kind == kind]
        body = manifest.body_bytes(pack)
        for byte in range(body, object_size(manifest, pack)):
            for bit in range(8):
                with house.flipped(pack.name, byte, bit), pytest.raises(Tampered) as caught:
                    read_trailer(house.vault.blobs, manifest, pack)
                assert pack.name in caught.value.message

    def test_verify_names_manifest_index_and_trailer(self, packs_house):
        house = packs_house
        manifest = manifest_of(house)
        bundle = house.vault.bundle(REF, OWNER)
        ends = {pack.name: (manifest.body_bytes(pack), object_size(manifest, pack)) for pack in manifest.packs}
        ends |= {name: (0, (house.store / name).stat().st_size) for name in (manifest.name, manifest.index_name)}
        assert len(ends) > 8
        for name, (begin, end) in ends.items():
            for byte in [begin, end - 1, *range(begin, end, 61)]:
                with house.flipped(name, byte, byte % 8):
                    named(house, "tampered", name)
                    unreadable(house, bundle)
        assert house.vault.verify(REF).ok

    def test_bodies_segment_by_segment(self, house, source):
        """In each sealed segment: its first and last byte, its tag, and places between."""
        manifest = manifest_of(house)
        bundle = house.vault.bundle(REF, OWNER)
        layout = house.reader().layout
        for pack in manifest.packs:
            for number, variant, offset, length in sealed_segments(manifest, pack):
                inside = [
                    0,
                    length - 1,
                    length - TAG_BYTES,
                    length - TAG_BYTES - 1,
                    *range(number % 97 + 1, length - TAG_BYTES - 1, 1999),
                ]
                for at in inside:
                    with house.flipped(pack.name, offset + at, (number + at) % 8):
                        report = house.vault.verify(REF)
                        (problem,) = report.problems
                        said = (problem.kind, problem.segment, problem.variant, problem.pack)
                        letter = "AB"[variant] if pack.kind == MARKED else ""
                        assert said == ("tampered", number, letter, pack.name)
                        segment = layout.common_segment(number)
                        if pack.kind == MARKED:
                            segment = next(
                                s for k in range(len(layout.stripes)) for s in layout.stripe(k) if s.index == number
                            )
                        assert problem.file == ", ".join(layout.files_of(segment))
                        if pack.kind == COMMON or bundle.variant(number) == variant:
                            assert unreadable(house, bundle).code == "segment.tampered"

    def test_the_variant_that_a_holder_does_not_open_does_not_concern_them(self, house):
        """It is verify's business, and does not change what the holder reads."""
        manifest, bundle, before = manifest_of(house), house.vault.bundle(REF, OWNER), house.read()
        (pack,) = manifest.marked_packs
        for number, variant, offset, _ in sealed_segments(manifest, pack):
            if bundle.variant(number) != variant:
                with house.flipped(pack.name, offset, 3):
                    assert not house.vault.verify(REF).ok
                    assert house.read() == before

    def test_a_range_is_wiped_too(self, house):
        manifest, reader = manifest_of(house), house.reader()
        (pack,) = manifest.common_packs
        for begin, end in ((0, 100), (5000, 12_000), (1, reader.layout.image)):
            segment = next(s for s in reader.layout.segments(begin, end) if not s.marked)
            out = memoryview(bytearray(b"\xa5" * (end - begin)))
            with house.flipped(pack.name, segment.index * (manifest.common_segment + TAG_BYTES) + 7, 0):
                with pytest.raises(Tampered):
                    reader.read_range(begin, out)
                assert not any(out)
                with pytest.raises(Tampered):
                    reader.read(begin, end)
                with pytest.raises(Tampered):
                    reader.read_all()


class TestSizes:
    def cuts(self, house: House) -> Iterator[tuple[str, int]]:
        manifest = manifest_of(house)
        for name in (manifest.name, manifest.index_name):
            size = (house.store / name).stat().st_size
            yield from ((name, cut) for cut in {0, 1, 72, size // 2, size - 16, size - 1})
        for pack in manifest.packs:
            body, size = manifest.body_bytes(pack), object_size(manifest, pack)
            segments = list(sealed_segments(manifest, pack))
            edges = {0, 1, body - 1, body, body + 1, body + 95, body + 96, body + 96 + 32, size - 1}
            edges |= {offset + d for _, _, offset, _ in segments[:: len(segments) // 4 or 1] for d in (-1, 0, 1)}
            yield from ((pack.name, cut) for cut in sorted(edges) if 0 <= cut < size)

    def test_truncation_at_every_interesting_size(self, house):
        bundle = house.vault.bundle(REF, OWNER)
        for name, cut in list(self.cuts(house)):
            with house.altered(name, (house.store / name).read_bytes()[:cut]):
                named(house, ("truncated", "tampered"), name)
                unreadable(house, bundle)
                if name.startswith("packs/"):
                    (problem,) = house.vault.verify(REF).problems
                    assert problem.kind == "truncated"
                    assert problem.pack == name
                    assert problem.file
                    found = _fsck(house)
                    assert [item["kind"] for item in found] == ["truncated"]
        assert house.vault.verify(REF).ok

    @pytest.mark.parametrize("extra", [1, 16, 4096])
    def test_extra_bytes(self, house, extra):
        for name, data in house.objects().items():
            with house.altered(name, data + b"\0" * extra):
                report = house.vault.verify(REF)
                (problem,) = report.problems
                assert problem.kind == "tampered"
                assert name in str(problem.as_json())
                assert _fsck(house)
            with house.altered(name, b"\0" * extra + data):
                assert not house.vault.verify(REF).ok
                unreadable(house, self.bundle)

    @pytest.fixture(autouse=True)
    def _bundle(self, house):
        self.bundle = house.vault.bundle(REF, OWNER)

    @pytest.mark.parametrize("suffix", [".manifest", ".index"])
    def test_an_object_that_is_absurdly_large_is_tampered_with_not_too_much_asked(self, house, suffix):
        """It is refused before it is read: the file is sparse and larger than what may be read of any such object."""
        name = next(name for name in house.objects() if name.endswith(suffix))
        with house.altered(name, b""):
            os.truncate(house.store / name, max(LIMITS.manifest, LIMITS.index) + 1)
            named(house, "tampered", name)
            unreadable(house, self.bundle)

    def test_missing(self, packs_house):
        bundle = packs_house.vault.bundle(REF, OWNER)
        for name in packs_house.objects():
            with packs_house.altered(name, None):
                named(packs_house, "missing", name)
                assert isinstance(unreadable(packs_house, bundle), Truncated)
                assert any(name in str(item) for item in _fsck(packs_house))
        assert packs_house.vault.verify(REF).ok

    def test_something_else_in_place_of_an_object(self, house, tmp_path):
        """A link, a folder, a pipe: nothing is followed, nothing hangs."""
        for name, data in house.objects().items():
            path, aside = house.store / name, tmp_path / "aside"
            aside.write_bytes(data)
            for make in (lambda p: p.symlink_to(tmp_path / "aside"), os.mkfifo):
                path.unlink()
                make(path)
                house.vault.blobs.close()
                named(house, "tampered", name)
                unreadable(house, self.bundle)
                path.unlink()
                path.write_bytes(data)
            path.unlink()
            path.mkdir()
            house.vault.blobs.close()
            named(house, "missing", name)
            unreadable(house, self.bundle)
            path.rmdir()
            path.write_bytes(data)
        house.vault.blobs.close()
        assert house.vault.verify(REF).ok

    def test_a_pack_replaced_after_it_was_read_in_this_process(self, packs_house):
        """A long-lived process still has the old file open: what counts is what the store has now."""
        house = packs_house
        manifest = manifest_of(house)
        for pack in manifest.packs:
            house.read()
            assert house.vault.verify(REF).ok
            path = house.store / pack.name
            before = path.read_bytes()
            for at in (0, manifest.body_bytes(pack), len(before) - 1):
                evil = bytearray(before)
                evil[at] ^= 1
                (path.parent / "replacement").write_bytes(evil)
                (path.parent / "replacement").rename(path)
                named(house, "tampered", pack.name)
                path.write_bytes(before)


def _fsck(house: House) -> list[dict[str, object]]:
    from strongroom.vault.fsck import fsck

    return fsck(house.vault).problems


class TestSwaps:
    def swapped(self, data: bytes, one: tuple[int, int], two: tuple[int, int]) -> bytes:
        (a, length), (b, other) = one, two
        assert length == other
        evil = bytearray(data)
        evil[a : a + length], evil[b : b + length] = data[b : b + length], data[a : a + length]
        return bytes(evil)

    @pytest.mark.parametrize("kind", [COMMON, MARKED])
    def test_neighbouring_and_distant_segments_of_a_pack(self, house, kind):
        manifest, bundle = manifest_of(house), house.vault.bundle(REF, OWNER)
        (pack,) = [pack for pack in manifest.packs if pack.kind == kind]
        full = [
            s
            for s in sealed_segments(manifest, pack)
            if s[3] == (manifest.marked_segment if kind else manifest.common_segment) + 16
        ]
        data = (house.store / pack.name).read_bytes()
        for one, two in [*list(pairwise(full))[::5], (full[0], full[-1])]:
            with house.altered(pack.name, self.swapped(data, one[2:], two[2:])):
                problems = house.vault.verify(REF).problems
                assert {(p.kind, p.segment, p.pack) for p in problems} == {
                    ("swapped", s[0], pack.name) for s in (one, two)
                }
                opened = kind == COMMON or any(bundle.variant(s[0]) == s[1] for s in (one, two))
                if opened:
                    assert unreadable(house, bundle).code == "segment.tampered"

    def test_variants_a_and_b_of_each_position(self, house):
        manifest, bundle = manifest_of(house), house.vault.bundle(REF, OWNER)
        (pack,) = manifest.marked_packs
        data = (house.store / pack.name).read_bytes()
        segments = list(sealed_segments(manifest, pack))
        for one, two in zip(segments[::2], segments[1::2], strict=True):
            with house.altered(pack.name, self.swapped(data, one[2:], two[2:])):
                problems = house.vault.verify(REF).problems
                assert [(p.kind, p.segment, p.variant) for p in problems] == [("swapped", one[0], v) for v in "AB"]
                assert unreadable(house, bundle).code == "segment.tampered"

    def test_two_packs(self, packs_house):
        house = packs_house
        manifest, bundle = manifest_of(house), house.vault.bundle(REF, OWNER)
        pairs = [*pairwise(manifest.packs), (manifest.packs[0], manifest.packs[-1])]
        for one, two in pairs:
            a, b = ((house.store / pack.name).read_bytes() for pack in (one, two))
            with house.altered(one.name, b), house.altered(two.name, a):
                problems = house.vault.verify(REF).problems
                assert {p.pack for p in problems} == {one.name, two.name}
                if len(a) == len(b):
                    assert {p.kind for p in problems} == {"swapped"}
                unreadable(house, bundle)
        assert any(object_size(manifest, a) == object_size(manifest, b) for a, b in pairs)

    def test_a_trailer_from_another_pack(self, packs_house):
        """Same size, properly made, pinned by the same manifest; only not for this pack."""
        house = packs_house
        manifest, bundle = manifest_of(house), house.vault.bundle(REF, OWNER)
        one, two = manifest.common_packs[:2]
        body = manifest.body_bytes(one)
        a, b = ((house.store / pack.name).read_bytes() for pack in (one, two))
        with house.altered(one.name, a[:body] + b[body:]):
            named(house, "swapped", two.name)
            assert unreadable(house, bundle).code == "pack.swapped"

    def test_objects_of_another_version_under_these_names(self, house, other_source):
        house.put(other_source, "acme/other")
        self.takes_its_place(house, manifest_of(house, "acme/other@1"), "manifest.swapped")

    def test_objects_of_another_room_under_these_names(self, house, source, tmp_path):
        """The same files, put by somebody else into their own room."""
        elsewhere = House.build(tmp_path / "elsewhere")
        elsewhere.put(source)
        theirs = manifest_of(elsewhere)
        for name, data in elsewhere.objects().items():
            (house.store / name).parent.mkdir(exist_ok=True, parents=True)
            (house.store / name).write_bytes(data)
        elsewhere.close()
        self.takes_its_place(house, theirs, "manifest.signature")

    def takes_its_place(self, house: House, theirs: Manifest, code: str) -> None:
        ours, bundle = manifest_of(house), house.vault.bundle(REF, OWNER)
        read = {name: (house.store / name).read_bytes() for name in house.objects()}
        with house.altered(ours.name, read[theirs.name]):
            named(house, "swapped" if code == "manifest.swapped" else "tampered", ours.name)
            assert unreadable(house, bundle).code == code
        with house.altered(ours.index_name, read[theirs.index_name]):
            named(house, "tampered", ours.index_name)
            assert unreadable(house, bundle).code == "index.tampered"
        for mine, other in ((0, 0), (-1, -1), (0, -1)):
            with house.altered(ours.packs[mine].name, read[theirs.packs[other].name]):
                assert house.vault.verify(REF).problems
                unreadable(house, bundle)
        # All of them at once: consistent in itself, signed, and not what this name stands for.
        with (
            house.altered(ours.name, read[theirs.name]),
            house.altered(ours.index_name, read[theirs.index_name]),
            house.altered(ours.packs[0].name, read[theirs.packs[0].name]),
            house.altered(ours.packs[-1].name, read[theirs.packs[-1].name]),
        ):
            assert not house.vault.verify(REF).ok
            unreadable(house, bundle)


class TestRollback:
    def test_an_older_revision_is_named_as_such(self, house):
        old_bundle, old = house.vault.bundle(REF, OWNER), manifest_of(house)
        kept = house.objects()
        before = house.read()
        house.vault.rotate(REF, by=OWNER)
        new = manifest_of(house)
        assert new.revision == 2
        assert house.read() == before
        for name, data in kept.items():  # the store never forgot
            (house.store / name).parent.mkdir(exist_ok=True, parents=True)
            (house.store / name).write_bytes(data)
        with house.altered(new.name, kept[old.name]):
            named(house, "rollback", new.name)
            assert isinstance(unreadable(house, self.bundle_of(house, new, old_bundle)), Rollback)
        with house.altered(new.name, kept[old.name]), house.altered(new.index_name, kept[old.index_name]):
            named(house, "rollback", new.name)
        # Old packs in place of the new.
        for ours, theirs in zip(new.packs, old.packs, strict=True):
            with house.altered(ours.name, kept[theirs.name]):
                problems = house.vault.verify(REF).problems
                assert problems
                assert {problem.pack for problem in problems} == {ours.name}
        assert house.vault.verify(REF, deep=True).ok

    def bundle_of(self, house: House, manifest: Manifest, old: KeyBundle) -> KeyBundle:
        """A bundle for the new revision, as its holder has it: made without the store."""
        from strongroom.vault.release import Bundles

        record = house.vault.record(house.vault.find(REF))
        return Bundles(record, manifest, old.signer).of(OWNER)

    def test_old_bundle_does_not_open_the_new_revision(self, house):
        old = house.vault.bundle(REF, OWNER)
        house.vault.rotate(REF, by=OWNER)
        assert unreadable(house, old).code == "manifest.missing"
        new = manifest_of(house)
        # Even when it is told of the new manifest.
        pretender = replace(old, revision=new.revision, manifest_digest=new.digest())
        assert isinstance(unreadable(house, pretender), Tampered)

    def test_a_manifest_signed_by_the_room_that_is_not_the_recorded_one(self, house):
        """Same version, same revision, properly signed: an interrupted attempt's. The digest is known."""
        bundle, manifest = house.vault.bundle(REF, OWNER), manifest_of(house)
        other = replace(manifest, index_digest=bytes(32))
        signer = house.vault.keys.signer
        signature = signer.sign(pre_authentication_encoding(PAYLOAD_TYPE, other.encode()))
        envelope = Envelope(PAYLOAD_TYPE, other.encode(), ((signer.key_id, signature),))
        with house.altered(manifest.name, envelope.encode()):
            named(house, "tampered", manifest.name)
            assert unreadable(house, bundle).code == "manifest.other"

    def test_a_manifest_signed_by_somebody_else(self, house):
        bundle, manifest = house.vault.bundle(REF, OWNER), manifest_of(house)
        stranger = Signer(os.urandom(32))
        payload = manifest.encode()
        signature = stranger.sign(pre_authentication_encoding(PAYLOAD_TYPE, payload))
        for key_id in (stranger.key_id, house.vault.keys.signer.key_id):
            with house.altered(manifest.name, Envelope(PAYLOAD_TYPE, payload, ((key_id, signature),)).encode()):
                named(house, "tampered", manifest.name)
                assert unreadable(house, bundle).code == "manifest.signature"


class TestDatabase:
    """Whoever can write to the database, but has no key, can't make the room say one thing and read another."""

    def sealed_error(self, house: House, ref: str = REF) -> IntegrityError:
        with pytest.raises(IntegrityError) as caught:
            house.vault.bundle(ref, OWNER)
        (problem,) = house.vault.verify(ref).problems
        assert problem.kind in ("tampered", "truncated", "swapped", "rollback")
        return caught.value

    @pytest.fixture
    def two(self, house, other_source):
        house.put(other_source, NAME)
        return house

    def test_a_name_pointed_at_other_weights(self, two):
        first, second = (row[0] for row in two.sql("SELECT version_id FROM versions ORDER BY number"))
        two.sql("UPDATE versions SET version_id = 'x' || version_id WHERE number = 2")
        two.sql("UPDATE versions SET version_id = ? WHERE number = 1", second)
        assert isinstance(self.sealed_error(two), Tampered)
        assert first != second

    def test_numbers_exchanged(self, two):
        two.sql("UPDATE versions SET number = 7 WHERE number = 1")
        assert self.sealed_error(two, f"{NAME}@7").code == "record.swapped"
        two.sql("UPDATE versions SET number = 1 WHERE number = 2")
        assert self.sealed_error(two).code == "record.swapped"

    def test_a_name_exchanged(self, two):
        two.sql("UPDATE versions SET name = 'acme/best' WHERE number = 2")
        assert self.sealed_error(two, "acme/best@2").code == "record.swapped"

    def test_records_exchanged(self, two):
        (record,) = two.sql("SELECT record FROM versions WHERE number = 2")[0]
        two.sql("UPDATE versions SET record = ? WHERE number = 1", record)
        assert isinstance(self.sealed_error(two), Tampered)

    @pytest.mark.parametrize(
        ("column", "value"), [("revision", 2), ("manifest_sha256", "00" * 32), ("revision", 0), ("manifest_sha256", "")]
    )
    def test_revision_or_digest_altered(self, house, column, value):
        house.sql(f"UPDATE versions SET {column} = ?", value)
        assert isinstance(self.sealed_error(house), Rollback)

    @pytest.mark.parametrize("column", ["version_id", "record", "name"])
    @pytest.mark.parametrize("value", [b"", b"\xff" * 200, "not hexadecimal", 5])
    def test_values_of_any_kind(self, house, column, value):
        if column == "name":
            house.sql("UPDATE versions SET record = ?", value)  # and state left active
        else:
            house.sql(f"UPDATE versions SET {column} = ?", value)
        self.sealed_error(house)

    def test_every_byte_of_the_record(self, house):
        (record,) = house.sql("SELECT record FROM versions")[0]
        assert isinstance(record, bytes)
        for at in range(len(record)):
            evil = bytearray(record)
            evil[at] ^= 1 << at % 8
            house.sql("UPDATE versions SET record = ?", bytes(evil))
            with pytest.raises(IntegrityError):
                house.vault.record(house.vault.find(REF))

    def test_set_back_in_part(self, house):
        """After a rotation, one column as it was before: the record in it disagrees with the rest."""
        columns = ("record", "revision", "manifest_sha256")
        old = house.sql(f"SELECT {', '.join(columns)} FROM versions")[0]
        house.vault.rotate(REF, by=OWNER)
        new = house.sql(f"SELECT {', '.join(columns)} FROM versions")[0]
        for column, before, after in zip(columns, old, new, strict=True):
            house.sql(f"UPDATE versions SET {column} = ?", before)
            assert isinstance(self.sealed_error(house), Rollback)
            house.sql(f"UPDATE versions SET {column} = ?", after)
        assert house.vault.verify(REF).ok

    def test_set_back_as_a_whole(self, house):
        """Then the row agrees with itself; but the store deleted the old revision, and that is reported as missing."""
        house.close()
        copy = (house.folder / "room.db").read_bytes()
        house.vault.rotate(REF, by=OWNER)
        house.close()
        for log in house.folder.glob("room.db-*"):
            log.unlink()
        (house.folder / "room.db").write_bytes(copy)
        house.vault = House(house.folder).vault
        named(house, "missing", "1.manifest")
        with pytest.raises(Truncated):
            house.vault.bundle(REF, OWNER)


class TestBundles:
    def test_of_another_version(self, house, other_source):
        house.put(other_source, "acme/other")
        ours, theirs = house.vault.bundle(REF, OWNER), house.vault.bundle("acme/other@1", OWNER)
        for wrong in (
            replace(theirs, version=ours.version),
            replace(theirs, version=ours.version, manifest_digest=ours.manifest_digest),
            replace(ours, common_key=theirs.common_key),
            replace(
                ours, variant_keys=theirs.variant_keys[: len(ours.variant_keys)].ljust(len(ours.variant_keys), b"k")
            ),
            replace(ours, room=bytes(16)),
            replace(ours, signer=Signer(os.urandom(32)).public_key),
            replace(ours, suite=type(ours.suite).SHA256),
        ):
            unreadable(house, KeyBundle.decode(wrong.encode()))

    def test_of_another_holder(self, house):
        """Their word with my keys, my word with their keys: the keys do not fit, and that is seen before decryption."""
        ours = theirs = house.vault.bundle(REF, OWNER)
        others = iter(range(100))
        while theirs.word == ours.word:  # in a code as short as this it happens
            house.register(other := f"user/bo-{next(others)}")
            theirs = house.vault.bundle(REF, other)
        assert unreadable(house, replace(ours, word=theirs.word)).code == "key.wrong"
        assert unreadable(house, replace(ours, variant_keys=theirs.variant_keys)).code == "key.wrong"
        bytes(ImageReader(house.vault.blobs, replace(ours, holder=theirs.holder)).read_all())

    def test_each_bit_of_the_word(self, house):
        bundle = house.vault.bundle(REF, OWNER)
        for position in range(bundle.positions):
            word = bytearray(bundle.word)
            word[position >> 3] ^= 1 << (position & 7)
            assert unreadable(house, replace(bundle, word=bytes(word))).code == "key.wrong"

    def test_each_byte(self, house):
        """One bit of each byte, with a checksum that fits: refused, or (holder and reference, which are for people) the
        same weights."""
        bundle, right = house.vault.bundle(REF, OWNER), house.read()
        data = bundle.encode()
        names = len(bundle.holder) + len(bundle.ref)
        keys = len(data) - 32 - len(bundle.variant_keys)
        harmless = 0
        for at in [*range(keys), *range(keys, len(data) - 32, 5)]:
            body = bytearray(data[:-32])
            body[at] ^= 1 << at % 7
            with pytest.raises(StrongroomError):
                KeyBundle.decode(bytes(body) + data[-32:])
            try:
                read = ImageReader(
                    house.vault.blobs, KeyBundle.decode(bytes(body) + hashlib.sha256(body).digest()), workers=1
                ).read_all()
            except StrongroomError as error:
                assert error.exit_code == 6
            else:
                assert read == right
                harmless += 1
        assert 0 < harmless <= names

    def test_truncated(self, house):
        data = house.vault.bundle(REF, OWNER).encode()
        for size in range(len(data)):
            with pytest.raises(StrongroomError):
                KeyBundle.decode(data[:size])

    def test_wrong_room_key(self, house, tmp_path):
        """Another room's key store in place of this one's."""
        other = House.build(tmp_path / "elsewhere")
        (wrapped,) = other.sql("SELECT wrapped_room_key FROM room")[0]
        other.close()
        house.sql("UPDATE room SET wrapped_room_key = ?", wrapped)
        with pytest.raises(IntegrityError):
            house.vault.bundle(REF, OWNER)


class TestForgery:
    """A holder has the common key and may be able to write to the store. Others must not read what they make."""

    def forge(self, house: House) -> tuple[bytes, PackEntry, bytes]:
        """Common segment 0 with one byte of its plaintext changed, sealed under the right key, for the right place."""
        bundle, manifest = house.vault.bundle(REF, OWNER), manifest_of(house)
        image = SealedImage.open(house.vault.blobs, bundle)
        pack = manifest.common_packs[0]
        plain = memoryview(bytearray(image.layout.common))
        image.read_common(0, plain, image.scratch())
        plain[1000] ^= 0x80
        aead = AESGCM(pack_key(bundle.common_key, pack.id))
        layout_digest = image.layout.digest(manifest.suite)
        cipher = SegmentCipher(manifest.suite, manifest.version, manifest.revision, layout_digest)
        sealed = memoryview(bytearray(len(plain) + TAG_BYTES))
        digest = cipher.seal_into(aead, bytes(12), KIND_COMMON, 0, plain, sealed)
        # The forgery is perfect as far as GCM can tell.
        check = memoryview(bytearray(len(plain)))
        cipher.open_into(aead, bytes(12), KIND_COMMON, 0, sealed, digest, check)
        assert check == plain
        return bytes(sealed), pack, digest

    def test_a_segment(self, house):
        sealed, pack, _ = self.forge(house)
        data = (house.store / pack.name).read_bytes()
        with house.altered(pack.name, sealed + data[len(sealed) :]):
            named(house, "tampered", pack.name)
            assert unreadable(house, house.vault.bundle(REF, OWNER)).code == "segment.tampered"

    def test_a_segment_and_its_record_in_the_trailer(self, house):
        sealed, pack, digest = self.forge(house)
        body = manifest_of(house).body_bytes(pack)
        data = bytearray((house.store / pack.name).read_bytes())
        data[: len(sealed)] = sealed
        data[body + 96 : body + 128] = digest
        with house.altered(pack.name, bytes(data)):
            named(house, "tampered", pack.name)
            assert unreadable(house, house.vault.bundle(REF, OWNER)).code == "pack.tampered"

    def test_segment_trailer_and_manifest(self, house):
        """All that is left is the room's signature, and that they can't make."""
        sealed, pack, digest = self.forge(house)
        manifest = manifest_of(house)
        body = manifest.body_bytes(pack)
        data = bytearray((house.store / pack.name).read_bytes())
        data[: len(sealed)] = sealed
        data[body + 96 : body + 128] = digest
        altered = replace(pack, digest=manifest.suite.digest(data[body:]))
        payload = replace(manifest, common_packs=(altered,)).encode()
        old = Envelope.decode((house.store / manifest.name).read_bytes(), payload_type=PAYLOAD_TYPE)
        evil = Signer(os.urandom(32))
        signature = evil.sign(pre_authentication_encoding(PAYLOAD_TYPE, payload))
        bundle = house.vault.bundle(REF, OWNER)
        for signatures in (
            old.signatures,
            ((evil.key_id, signature),),
            ((old.signatures[0][0], signature),),
            (*old.signatures, (evil.key_id, signature)),
        ):
            envelope = Envelope(PAYLOAD_TYPE, payload, signatures).encode()
            with house.altered(pack.name, bytes(data)), house.altered(manifest.name, envelope):
                named(house, "tampered", manifest.name)
                assert unreadable(house, bundle).code == "manifest.signature"

    def test_a_marked_segment_under_a_key_of_their_own(self, house):
        """AES-GCM does not commit to its key; the trailer does, and it is signed."""
        manifest, bundle = manifest_of(house), house.vault.bundle(REF, OWNER)
        image = SealedImage.open(house.vault.blobs, bundle)
        (pack,) = manifest.marked_packs
        key, plain = os.urandom(32), memoryview(bytes(manifest.marked_segment))
        sealed = memoryview(bytearray(len(plain) + TAG_BYTES))
        digest = image.cipher.seal_into(AESGCM(key), pack.id[:12], VARIANT_A + bundle.variant(0), 0, plain, sealed)
        body, size = manifest.body_bytes(pack), manifest.marked_segment + TAG_BYTES
        data = bytearray((house.store / pack.name).read_bytes())
        data[bundle.variant(0) * size : (bundle.variant(0) + 1) * size] = sealed
        for offset, value in ((0, digest), (64, commitment(key))):
            at = body + 96 + offset + 32 * bundle.variant(0)
            data[at : at + 32] = value
            with house.altered(pack.name, bytes(data)):
                named(house, "tampered", pack.name)
                wrong = replace(bundle, variant_keys=key + bundle.variant_keys[32:])
                assert unreadable(house, wrong).code == "pack.tampered"
        assert unreadable(house, wrong).code == "key.wrong"


class TwoFacedBlobs:
    """A store that answers honestly once, and with other bytes whenever the same bytes are asked for again."""

    def __init__(self, blobs: object) -> None:
        self._blobs = blobs
        self._seen: dict[str, bytearray] = {}
        self._lock = threading.Lock()
        self.repeated: list[tuple[str, int]] = []

    def __getattr__(self, name: str) -> object:
        return getattr(self._blobs, name)

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        self._blobs.read_into(name, offset, buffer)
        with self._lock:
            seen = self._seen.setdefault(name, bytearray(1 << 20))
            for k in range(len(buffer)):
                if seen[offset + k]:
                    buffer[k] ^= 0xFF
                    self.repeated.append((name, offset))
                seen[offset + k] = 1


class TestCheckThenUse:
    def test_a_store_that_answers_differently_the_second_time(self, house):
        """What was hashed is what is decrypted: no byte of a segment is asked for twice."""
        right = house.read()
        blobs = TwoFacedBlobs(house.vault.blobs)
        assert house.reader(blobs=blobs, workers=1).read_all() == right
        assert not blobs.repeated

    def test_a_store_that_changes_while_it_is_read(self, packs_house):
        """Somebody flips bits there and back, all the time: right bytes or an error, never others."""
        house = packs_house
        right, reader, manifest = house.read(), house.reader(), manifest_of(house)
        stop = threading.Event()

        def vandal() -> None:
            turn = 0
            while not stop.is_set():
                pack = manifest.packs[turn % len(manifest.packs)]
                with house.flipped(pack.name, turn * 7919 % manifest.body_bytes(pack), turn % 8):
                    turn += 1

        thread = threading.Thread(target=vandal)
        thread.start()
        outcomes = set()
        try:
            for _ in range(150):
                out = memoryview(bytearray(b"\xa5" * len(right)))
                try:
                    reader.read_into(out)
                except IntegrityError:
                    outcomes.add("refused")
                    assert not any(out)
                else:
                    outcomes.add("read")
                    assert out == right
        finally:
            stop.set()
            thread.join()
        assert outcomes
        assert house.read() == right

    def test_only_deep_finds_what_the_room_itself_signed_wrongly(self, house):
        """A fault of ours when it was put: every hash and signature is right, and the content is not the original."""
        vault, manifest = house.vault, manifest_of(house)
        record = vault.record(vault.find(REF))
        image = vault.image(record)
        wrong = replace(image.index, sha256=(*image.index.sha256[:-1], "00" * 32))
        common_key = vault.bundle(REF, OWNER).common_key
        box = seal(common_key, wrong.encode(), wrong.context(manifest.version, manifest.revision))
        (house.store / manifest.index_name).write_bytes(box)
        manifest = replace(manifest, index_bytes=len(box), index_digest=manifest.suite.digest(box))
        vault.sign(manifest, vault.keys.signer)
        sealed = replace(record, manifest_digest=manifest.digest()).seal(vault.keys.room_key)
        house.sql("UPDATE versions SET record = ?, manifest_sha256 = ?", sealed, manifest.digest().hex())
        assert vault.verify(REF).ok
        (problem,) = vault.verify(REF, deep=True).problems
        assert (problem.kind, problem.file) == ("tampered", image.layout.files[-1].path)


def test_nothing_of_this_is_found_in_a_sound_room(house, packs_house, source):
    for sound in (house, packs_house):
        report = sound.vault.verify(REF, deep=True)
        assert report.ok
        assert report.bytes == sum(manifest_of(sound).body_bytes(pack) for pack in manifest_of(sound).packs)
        assert _fsck(sound) == []
        with pytest.raises(NotFound):
            sound.vault.find("acme/none")
