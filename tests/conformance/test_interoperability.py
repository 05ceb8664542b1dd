"""The implementation and what was written from the specification alone read each other, and agree in every number."""

from __future__ import annotations

import hashlib
import json
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conformance import cases, decoder, encoder
from strongroom.crypto.segments import VersionKeys
from strongroom.errors import CannotVerify, IntegrityError, Rollback, StrongroomError, Truncated
from strongroom.formats.bundle import KeyBundle
from strongroom.formats.layout import FileEntry, Layout, Run
from strongroom.formats.suites import Suite
from strongroom.marking.code import Code
from strongroom.marking.mark import Marker
from strongroom.storage.blobs import open_blobs
from strongroom.storage.image import SealedImage, read_manifest
from strongroom.storage.reader import ImageReader
from strongroom.vault.originals import Originals
from strongroom.vault.record import VersionRecord
from strongroom.vault.source import ModelSource
from strongroom.vault.vault import Vault

VECTORS = Path(__file__).resolve().parents[2] / "vectors"
FOLDERS = sorted(path.parent for path in VECTORS.glob("*/expected.json"))
MIB = 1 << 20


def name(folder):
    return folder.name


def loaded(folder, part):
    return json.loads((folder / f"{part}.json").read_text(encoding="utf-8"))


def digests(layout, image):
    return {file.path: hashlib.sha256(image[file.offset : file.end]).hexdigest() for file in layout.files}


def refusal(reason):
    """The class of error, which says what the user has to do, for a reason of the decoder."""
    if reason == "manifest.rollback":
        return Rollback
    if reason in {"manifest.missing", "index.missing", "pack.missing", "pack.size"}:
        return Truncated
    if reason in {"bundle.format", "bundle.suite", "manifest.format", "manifest.suite", "layout.format"}:
        return CannotVerify
    return IntegrityError


# --- The implementation reads what the encoder wrote ------------------------------------------------------------------


@pytest.mark.parametrize("folder", FOLDERS, ids=name)
def test_holder_reads_vectors(folder) -> None:
    def read():
        bundle = KeyBundle.decode((folder / "bundle").read_bytes())
        reader = ImageReader(open_blobs(folder / "store", create=False), bundle, workers=2)
        return digests(reader.layout, reader.read_all())

    expected = loaded(folder, "expected")["holder"]
    if "refused" in expected:
        with pytest.raises(refusal(expected["refused"])):
            read()
    else:
        assert read() == expected["files"]


# What the implementation's custodian does not look at when it reads: it makes the variants itself, under its own keys.
NOT_LOOKED_AT = {"variant.definition", "layout.runs"}


@pytest.mark.parametrize("folder", FOLDERS, ids=name)
def test_custodian_reads_vectors(folder) -> None:
    expected, secrets = loaded(folder, "expected"), loaded(folder, "secrets")
    room, version, key, digest = (
        bytes.fromhex(secrets[field]) for field in ("room", "version", "public_key", "manifest_digest")
    )
    version_key, mark_root = bytes.fromhex(secrets["V"]), bytes.fromhex(secrets["R"])
    record = VersionRecord(version, secrets["revision"], version_key, mark_root, secrets["c0"])

    def read():
        blobs = open_blobs(folder / "store", create=False)
        manifest = read_manifest(blobs, room, version, secrets["revision"], key, digest)
        image = SealedImage(blobs, manifest, VersionKeys.of(version_key, 0).common)
        plain = b"".join(bytes(piece) for _, piece in Originals(image, record).segments())
        found = digests(image.layout, plain)
        return found, list(found.values()) == list(image.index.sha256)

    refused = expected["custodian"].get("refused")
    if refused is None:
        assert read() == (expected["custodian"]["files"], True)
    elif refused == "file.sha256":
        assert read()[1] is False
    elif folder.name in {"bad-variant-definition", "bad-layout-run-in-header"}:
        assert refused in NOT_LOOKED_AT
        assert read()[1] is True, "the original is the midpoint whichever variant is which"
    else:
        with pytest.raises(refusal(refused)):
            read()


@pytest.mark.parametrize("folder", [f for f in FOLDERS if not f.name.startswith("bad-")], ids=name)
def test_bundle_is_encoded_as_it_was(folder) -> None:
    data = (folder / "bundle").read_bytes()
    assert KeyBundle.decode(data).encode() == data


# --- The decoder reads what the implementation wrote ------------------------------------------------------------------


def models():
    kinds = [("F32", 120), ("BF16", 300), ("F64", 40), ("F16", 299), ("BF16", 1)]
    yield pytest.param(cases.small_model(), "1/8", 16384, Suite.BLAKE3, id="default")
    yield pytest.param(cases.many_files(), "1/2", 4, Suite.SHA256, id="many-files")
    yield pytest.param({"m.safetensors": cases.special_values()}, "1/2", 16384, Suite.BLAKE3, id="special-values")
    yield pytest.param({"m.safetensors": cases.mixed(kinds)}, "1/3", 5, Suite.BLAKE3, id="crossing")
    yield pytest.param({"m.safetensors": cases.mixed(kinds)}, "0", 16384, Suite.BLAKE3, id="share-0")
    yield pytest.param({"m.safetensors": cases.mixed(kinds)}, "1/2", 0, Suite.BLAKE3, id="no-positions")
    yield pytest.param({"m.safetensors": cases.misaligned()}, "1/2", 9, Suite.BLAKE3, id="misaligned")
    yield pytest.param({"m.gguf": cases.small_gguf()}, "1/2", 9, Suite.SHA256, id="gguf")
    yield pytest.param({"m.gguf": cases.quantised_gguf()}, "1/2", 30, Suite.BLAKE3, id="blocks")
    yield pytest.param({"a": b""}, "1/8", 16384, Suite.BLAKE3, id="only-an-empty-file")
    large = cases.mixed([("BF16", MIB // 64 * 3)])
    yield pytest.param({"m.safetensors": large}, "1/8", 64, Suite.BLAKE3, id="3-MiB")


@pytest.mark.parametrize(("files", "share", "positions", "suite"), list(models()))
def test_decoder_reads_what_put_wrote(tmp_path, files, share, positions, suite) -> None:
    for path, data in files.items():
        (tmp_path / "model" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "model" / path).write_bytes(data)
    vault, _ = Vault.init(tmp_path / "room", owner="user/ana", custody="solo")
    try:
        source = ModelSource.scan(tmp_path / "model")
        ref = vault.put(source, "acme/tiny", by="user/ana", share=share, positions=positions, suite=suite).ref
        words = []
        for revision in (1, 2):
            bundle = vault.bundle(ref, "user/ana")
            record = vault.record(vault.find(ref))
            assert record.revision == revision
            store = tmp_path / "room" / "store"
            held = decoder.read_as_holder(store, bundle.encode())
            reader = ImageReader(vault.blobs, bundle, workers=1)
            assert {path: hashlib.sha256(data).hexdigest() for path, data in held.items()} == digests(
                reader.layout, reader.read_all()
            )

            parsed = decoder.read_bundle(bundle.encode())
            index, found = decoder.read_as_custodian(store, parsed.anchor, record.version_key, record.mark_root)
            assert found == files
            decoder.check_writer_rule(index)
            decoder.check_bundle(parsed, record.version_key, record.mark_root, record.colluders)
            words.append((parsed.word, held))
            if revision == 1:
                vault.rotate(ref, by="user/ana")
        assert words[0] == words[1]
    finally:
        vault.close()


# --- Both refuse any change -------------------------------------------------------------------------------------------


@settings(max_examples=150)
@given(st.data())
def test_no_bit_of_a_store_can_change_what_is_read(tmp_path_factory, data) -> None:
    written = encoder.write(cases.TINY)
    path = data.draw(st.sampled_from(sorted(written.store)))
    at = data.draw(st.integers(0, len(written.store[path]) - 1))
    bit = data.draw(st.integers(0, 7))
    altered = bytearray(written.store[path])
    altered[at] ^= 1 << bit
    folder = tmp_path_factory.mktemp("store")
    for other, content in {**written.store, path: bytes(altered)}.items():
        (folder / other).parent.mkdir(parents=True, exist_ok=True)
        (folder / other).write_bytes(content)

    good = {path: hashlib.sha256(content).hexdigest() for path, content in written.held.items()}
    bundle = decoder.read_bundle(written.bundle)
    secrets = written.secrets
    with pytest.raises(decoder.Refused):
        decoder.read_as_custodian(folder, bundle.anchor, bytes.fromhex(secrets["V"]), bytes.fromhex(secrets["R"]))
    try:
        held = decoder.read_as_holder(folder, written.bundle)
    except decoder.Refused:
        pass
    else:
        assert held == written.held, "the other variant, which this holder does not read"
    try:
        reader = ImageReader(open_blobs(folder, create=False), KeyBundle.decode(written.bundle), workers=1)
        found = digests(reader.layout, reader.read_all())
    except StrongroomError as error:
        assert isinstance(error, IntegrityError | CannotVerify)
    else:
        assert found == good


@given(st.binary(max_size=400) | st.integers(0, 10_000))
def test_any_bytes_as_a_bundle_are_refused(change) -> None:
    data = encoder.write(cases.TINY).bundle
    data = change if isinstance(change, bytes) else data[: change % len(data)]
    with pytest.raises(decoder.Refused):
        decoder.read_bundle(data)
    with pytest.raises(StrongroomError):
        KeyBundle.decode(data)


# --- Numbers ----------------------------------------------------------------------------------------------------------


@st.composite
def images(draw):
    """Files whose tensors follow each other, some of them markable."""
    entries, tensors = [], {}
    for number in range(draw(st.integers(0, 4))):
        at = 0
        pieces = []
        for _ in range(draw(st.integers(0, 6))):
            kind = draw(st.sampled_from(["BF16", "F16", "F32", "F64", None, "Q4_0", "Q4_1", "Q8_0", "Q6_K", "Q2_K"]))
            item = 4 * decoder.BLOCKS[kind][1] if kind in decoder.BLOCKS else 8
            size = -(-draw(st.integers(1, draw(st.sampled_from([10, 3000, 200_000])))) * 8 // item) * item
            pieces.append((at, at + size, kind))
            at += size
        start = draw(st.integers(0, 300))
        tail = draw(st.integers(0, 5000))
        entries.append((f"f{number}", "safetensors", start + at + tail, start))
        tensors[f"f{number}"] = pieces
    files = Layout.place(entries)
    runs = [
        Run(file.offset + file.data_start + begin, file.offset + file.data_start + end, kind)
        for file in files
        for begin, end, kind in tensors[file.path]
        if kind
    ]
    return files, runs


@given(images(), st.integers(0, 20), st.integers(1, 40), st.sampled_from([0, 1, 2, 7, 16, 100, 16384]))
def test_geometry_is_the_same(image, p, q, wanted) -> None:
    files, runs = image
    layout = Layout.plan(files, runs, share=Fraction(p, q), positions=wanted)
    merged = [tuple(run) for run in layout.runs]
    assert decoder.writer_geometry(layout.image, merged, (p, q), wanted) == (
        layout.common,
        layout.marked,
        list(layout.stripes),
    )
    # What one writer plans, both readers accept, and cut alike.
    assert Layout.from_json(layout.to_json()) == layout
    read = decoder.read_layout(layout.to_json(), decoder.HASHES[1])
    assert read.digest == layout.digest(Suite.BLAKE3)
    assert [(kind == decoder.MARKED, number, at, size) for kind, number, at, size in read.segments()] == [
        (segment.marked, segment.index, segment.start, segment.bytes) for segment in layout.segments()
    ]


@given(st.sampled_from(sorted(decoder.TYPES)), st.data())
def test_variants_are_the_same_for_any_bits(kind, data) -> None:
    size = decoder.TYPES[kind][0]
    values = data.draw(st.lists(st.integers(0, 2 ** (8 * size) - 1), min_size=1, max_size=64))
    plain = (b"".join(value.to_bytes(size, "little") for value in values) * 4096)[:4096]
    key, position = data.draw(st.binary(min_size=32, max_size=32)), data.draw(st.integers(0, 3))
    files = (FileEntry("m", "safetensors", 0, 5 * 4096, 0),)
    layout = Layout(5 * 4096, files, (Run(0, 5 * 4096, kind),), 4096, 4096, (4,))
    at = int(layout.marked_starts[position])
    ours = Marker(key, layout).variants(position, memoryview(plain))
    pieces = [(at, at + 4096, kind, 0)]
    assert ours == decoder.variants(plain, at, pieces, key, position)
    assert decoder.midpoint(*ours, at, pieces) == plain


@given(st.sampled_from(sorted(decoder.BLOCKS)), st.integers(0, 300), st.data())
def test_variants_of_blocks_are_the_same_wherever_they_are_cut(kind, skipped, data) -> None:
    """The run begins anywhere before the segments, which belong to it alone, or to it and to floats after it."""
    _, size, _, _ = decoder.BLOCKS[kind]
    begin = 4096 - 4 * skipped
    stop = begin + (5 * 4096 - begin) // size * size
    if data.draw(st.booleans()):
        stop = begin + data.draw(st.integers(1, (5 * 4096 - begin) // size)) * size
    runs = [(begin, stop, kind), (stop + stop % 2, 5 * 4096, "F16")][: 1 + (stop < 5 * 4096)]
    files = (FileEntry("m", "gguf", 0, 5 * 4096, 0),)
    layout = Layout(5 * 4096, files, tuple(Run(*run) for run in runs), 4096, 4096, (4,))
    key = data.draw(st.binary(min_size=32, max_size=32))
    seed = data.draw(st.binary(min_size=1, max_size=300))
    plain = (seed * (4 * 4096 // len(seed) + 1))[: 4 * 4096]
    first = data.draw(st.integers(0, 3))
    count = data.draw(st.integers(1, 4 - first))
    here = plain[first * 4096 : (first + count) * 4096]
    a, b = (bytes(each) for each in Marker(key, layout).variants(first, memoryview(here)))
    assert bytes(Marker(key, layout).original(first, memoryview(a), memoryview(b))) == here
    for position in range(first, first + count):
        at = 4096 * (position + 1)
        cut = slice((position - first) * 4096, (position - first + 1) * 4096)
        pieces = [(max(at, low), min(at + 4096, high), name, low) for low, high, name in runs]
        pieces = [piece for piece in pieces if piece[0] < piece[1]]
        assert (a[cut], b[cut]) == decoder.variants(here[cut], at, pieces, key, position)
        assert decoder.midpoint(a[cut], b[cut], at, pieces) == here[cut]


@given(st.binary(min_size=32, max_size=32), st.text(), st.integers(0, 300), st.integers(1, 64))
def test_code_words_are_the_same(key, holder, positions, colluders) -> None:
    word = decoder.code_word(key, holder, positions, colluders)
    assert Code(key, positions, colluders).word(holder) == decoder.pack_word(word)


def test_encoder_is_independent_of_the_implementation() -> None:
    for module in (encoder, cases):
        assert "strongroom." not in Path(module.__file__).read_text(encoding="utf-8").replace("strongroom.manifest", "")
