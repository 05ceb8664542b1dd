"""An independent reader of the Strongroom container, format 1, written from spec/container.md alone.

It shares no code with the implementation, so that where the two agree, they agree on the page. It is written to be
read beside it: `§ 9` is a section of the page, and the numbered steps are those of section 12. Speed is no aim.

    python decoder.py STORE BUNDLE     prints the SHA-256 of every file that the holder of the bundle reads
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import struct
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from blake3 import blake3
from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import CTR
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

FORMAT = 1
COMMON, VARIANT_A, VARIANT_B = 0, 1, 2  # § 6: the kinds of a segment
MARKED = 1  # § 9: the kind of a pack of marked segments
TAG = 16
MANIFEST_TYPE = "application/vnd.strongroom.manifest.v1+json"

# § 13
MAX_FILES, MAX_PATH, MAX_IMAGE, MAX_POSITIONS = 100_000, 1024, 2**50, 2**20
MIN_MARKED, MAX_SEGMENT, MAX_SIGNATURES = 4096, 16 << 20, 16
MAX_TRAILER, MAX_MANIFEST, MAX_INDEX, MAX_BUNDLE = 64 << 20, 64 << 20, 256 << 20, 64 << 20


class Refused(Exception):
    """The version is not what the page says. `reason` is one of the codes in vectors/README.md."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason


def need(condition: object, reason: str, detail: str = "") -> None:
    if not condition:
        raise Refused(reason, detail)


# --- § 2, 5, 6: hashes, keys, boxes, segments -------------------------------------------------------------------------

HASHES: dict[int, Callable[[bytes], bytes]] = {
    1: lambda data: blake3(data).digest(),
    2: lambda data: hashlib.sha256(data).digest(),
}


def sha256(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def derive(key: bytes, purpose: str, context: bytes = b"") -> bytes:
    return HKDFExpand(SHA256(), 32, b"strongroom/1 " + purpose.encode() + b"\0" + context).derive(key)


def stream(key: bytes, start: int, count: int) -> bytes:
    """Bytes `start` to `start + count` of the keystream; `start` is a multiple of 16, the size of a counter block."""
    counter = (start // 16).to_bytes(16, "big")
    return Cipher(AES256(key), CTR(counter)).encryptor().update(bytes(count))


def commit(key: bytes) -> bytes:
    return sha256(b"strongroom/1 commitment\0" + key)


def box_key(key: bytes, salt: bytes, context: str) -> bytes:
    return derive(key, "box", salt + context.encode())


def open_box(key: bytes, context: str, box: bytes, what: str) -> bytes:
    need(len(box) >= 72 + TAG and box[:8] == b"SRBX\x01\0\0\0", f"{what}.box")
    b = box_key(key, box[8:40], context)
    need(commit(b) == box[40:72], f"{what}.commitment")
    try:
        return AESGCM(b).decrypt(bytes(12), box[72:], box[:72])
    except InvalidTag:
        raise Refused(f"{what}.tag") from None


def associated_data(suite: int, kind: int, version: bytes, revision: int, index: int, layout_digest: bytes) -> bytes:
    head = struct.pack("<4sBBBx16sIQ", b"SRSG", FORMAT, suite, kind, version, revision, index)
    return head + layout_digest


# --- Canonical JSON ---------------------------------------------------------------------------------------------------


def canonical(value: Any) -> bytes:
    """RFC 8785 without floating-point numbers."""
    if isinstance(value, dict):
        names = sorted(value, key=lambda name: name.encode("utf-16-be"))
        return b"{" + b",".join(canonical(name) + b":" + canonical(value[name]) for name in names) + b"}"
    if isinstance(value, list):
        return b"[" + b",".join(map(canonical, value)) + b"]"
    if isinstance(value, int) and not isinstance(value, bool):
        need(abs(value) < 2**53, "json.number", "beyond what RFC 8785 can carry exactly")
    return json.dumps(value, ensure_ascii=False).encode()


def parse(data: bytes, what: str) -> Any:
    def no_float(text: str) -> NoReturn:
        raise Refused(f"{what}.not-canonical", f"floating-point number {text}")

    def no_duplicate(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        need(len(set(names)) == len(names), f"{what}.duplicate-name")
        return dict(pairs)

    try:
        value = json.loads(data.decode(), object_pairs_hook=no_duplicate, parse_float=no_float, parse_constant=no_float)
        same = canonical(value) == data
    except (ValueError, RecursionError) as error:
        raise Refused(f"{what}.not-canonical", str(error)) from None
    need(same, f"{what}.not-canonical")
    return value


class Object:
    """A JSON object with exactly the names that the page gives it."""

    def __init__(self, value: Any, names: str, reason: str) -> None:
        need(isinstance(value, dict) and set(value) == set(names.split()), reason, f"expected the names {names}")
        self.value, self.reason = value, reason

    def integer(self, name: str, low: int, high: int) -> int:
        return integer(self.value[name], low, high, self.reason)

    def text(self, name: str) -> str:
        need(isinstance(self.value[name], str), self.reason, f"{name} is no string")
        return str(self.value[name])

    def bytes(self, name: str, count: int) -> bytes:
        text = self.text(name)
        need(len(text) == 2 * count and set(text) <= set("0123456789abcdef"), self.reason, f"{name} is no hexadecimal")
        return bytes.fromhex(text)

    def list(self, name: str) -> list[Any]:
        return items(self.value[name], self.reason)


def integer(value: Any, low: int, high: int, reason: str) -> int:
    need(type(value) is int and low <= value <= high, reason, f"{value!r} is not between {low} and {high}")
    return int(value)


def items(value: Any, reason: str) -> list[Any]:
    need(isinstance(value, list), reason, "expected an array")
    return list(value)


# --- § 3, 4, 8: the layout --------------------------------------------------------------------------------------------

# § 7: type → (element bytes, q, smallest and largest normal magnitude)
TYPES = {
    "BF16": (2, 1, 0x0080, 0x7F7F),
    "F16": (2, 8, 0x0400, 0x7BFF),
    "F32": (4, 2**16, 0x0080_0000, 0x7F7F_FFFF),
    "F64": (8, 2**45, 0x0010_0000_0000_0000, 0x7FEF_FFFF_FFFF_FFFF),
}
# § 3: block type → (weights, bytes, byte of the first scale field, scale fields)
BLOCKS = {
    "Q4_0": (32, 18, 0, 1),
    "Q4_1": (32, 20, 0, 2),
    "Q5_0": (32, 22, 0, 1),
    "Q5_1": (32, 24, 0, 2),
    "Q8_0": (32, 34, 0, 1),
    "Q2_K": (256, 84, 80, 2),
    "Q3_K": (256, 110, 108, 1),
    "Q4_K": (256, 144, 0, 2),
    "Q5_K": (256, 176, 0, 2),
    "Q6_K": (256, 210, 208, 1),
    "IQ2_XXS": (256, 66, 0, 1),
    "IQ2_XS": (256, 74, 0, 1),
    "IQ2_S": (256, 82, 0, 1),
    "IQ3_XXS": (256, 98, 0, 1),
    "IQ3_S": (256, 110, 0, 1),
    "IQ1_S": (256, 50, 0, 1),
    "IQ4_NL": (32, 18, 0, 1),
    "IQ4_XS": (256, 136, 0, 1),
}
BLOCKS_FORMAT = 2  # of a layout with runs of block types
Run = tuple[int, int, str]
Piece = tuple[int, int, str, int]  # a part of a run, and where the run begins


def unit(name: str) -> tuple[int, int]:
    """Of what size a run of this type has a whole number, and at a multiple of what it begins."""
    return (BLOCKS[name][1], 4) if name in BLOCKS else (TYPES[name][0], TYPES[name][0])


@dataclass(frozen=True)
class File:
    path: str
    kind: str
    offset: int
    size: int
    data_start: int


@dataclass(frozen=True)
class Layout:
    image: int
    files: list[File]
    runs: list[Run]
    common: int
    marked: int
    stripes: list[int]
    digest: bytes

    @property
    def positions(self) -> int:
        return sum(self.stripes)

    def segments(self) -> Iterator[tuple[int, int, int, int]]:
        """(kind of the pack, index, offset in the image, bytes) of each segment in the order of the image."""
        left = self.image - self.positions * self.marked  # plaintext in common segments
        offset = position = 0
        for j, count in enumerate(self.stripes):
            size = min(self.common, left)
            yield COMMON, j, offset, size
            offset, left = offset + size, left - size
            for _ in range(count):
                yield MARKED, position, offset, self.marked
                offset, position = offset + self.marked, position + 1

    def pieces(self, begin: int, end: int) -> list[Piece]:
        """The parts of runs in a range of the image."""
        cut = [(max(begin, b), min(end, e), name, b) for b, e, name in self.runs]
        return [piece for piece in cut if piece[0] < piece[1]]


def read_layout(value: Any, hash_of: Callable[[bytes], bytes]) -> Layout:
    names = "format image files runs common marked stripes"
    top = Object(value, names, "layout.malformed")
    number = top.integer("format", 0, 2**53)
    need(number in {FORMAT, BLOCKS_FORMAT}, "layout.format")
    image = top.integer("image", 0, MAX_IMAGE)
    need(len(top.list("files")) <= MAX_FILES, "layout.limit")

    files: list[File] = []
    for entry in top.list("files"):
        fields = Object(entry, "path kind offset bytes data_start", "layout.malformed")
        file = File(
            fields.text("path"),
            fields.text("kind"),
            fields.integer("offset", 0, image),
            fields.integer("bytes", 0, image),
            fields.integer("data_start", 0, image),
        )
        need(file.kind in {"safetensors", "gguf", "opaque"}, "layout.malformed", file.kind)
        need(file.kind != "opaque" or file.data_start == 0, "layout.offset")
        need(file.data_start <= file.size, "layout.offset")
        check_path(file.path)
        end = files[-1].offset + files[-1].size if files else 0
        need(not files or files[-1].path.encode() < file.path.encode(), "layout.path-order")
        # § 3: the smallest offset from `end` on that aligns the first tensor byte.
        need(file.offset == end + -(end + file.data_start) % 64, "layout.offset", file.path)
        files.append(file)
    need(image == (files[-1].offset + files[-1].size if files else 0), "layout.offset", "the image ends elsewhere")

    runs: list[Run] = []
    for entry in top.list("runs"):
        need(isinstance(entry, list) and len(entry) == 3, "layout.runs")
        need(isinstance(entry[2], str) and entry[2] in {*TYPES, *BLOCKS}, "layout.runs")
        begin, end = (integer(value, 0, image, "layout.runs") for value in entry[:2])
        size, alignment = unit(entry[2])
        whole = begin < end and begin % alignment == 0 and (end - begin) % size == 0
        need(whole, "layout.runs", "not a whole number of elements")
        need(not runs or runs[-1][1] <= begin, "layout.runs", "not ascending and disjoint")
        need(
            any(file.offset <= begin and end <= file.offset + file.size for file in files),
            "layout.runs",
            "not inside one file",
        )
        runs.append((begin, end, entry[2]))

    # § 8: which of the two formats it is follows from the runs.
    blocks = any(name in BLOCKS for _, _, name in runs)
    need(number == (BLOCKS_FORMAT if blocks else FORMAT), "layout.runs", "not those of this format")

    common = top.integer("common", 64, MAX_SEGMENT)
    marked = top.integer("marked", MIN_MARKED, MAX_SEGMENT)
    need(common % 64 == 0 and marked % 64 == 0, "layout.fill", "segments are multiples of 64 bytes")
    stripes = [integer(n, 0, MAX_POSITIONS, "layout.fill") for n in top.list("stripes")]
    layout = Layout(image, files, runs, common, marked, stripes, hash_of(canonical(value)))
    check_segments(layout)
    return layout


def check_path(path: str) -> None:
    need(0 < len(path.encode()) <= MAX_PATH, "layout.path", path)
    need("\\" not in path, "layout.path", path)
    need(not any(ord(c) < 0x20 or 0x7F <= ord(c) < 0xA0 for c in path), "layout.path", "control character")
    # An absolute path, a doubled and a trailing slash each have an empty part.
    need(not {"", ".", ".."} & set(path.split("/")), "layout.path", path)


def check_segments(layout: Layout) -> None:
    need(layout.positions <= MAX_POSITIONS, "layout.limit", "positions")
    count = len(layout.stripes)
    in_common = layout.image - layout.positions * layout.marked
    # c segments, each full but the last, which has 1 to S bytes. An empty image has none.
    need(max(0, count - 1) * layout.common < in_common or count == in_common == 0, "layout.fill")
    need(in_common <= count * layout.common, "layout.fill")
    for kind, index, begin, size in layout.segments():
        if kind == MARKED:
            pieces = layout.pieces(begin, begin + size)
            covered = sum(e - b for b, e, _, _ in pieces)
            need(covered == size, "layout.fill", f"position {index} leaves the markable runs")
            # Blocks may be cut, their fields never are: § 3 says why.
            parts = [(b, e, TYPES[name][0]) for b, e, name, _ in pieces if name in TYPES]
            whole = all(b % item == 0 and e % item == 0 for b, e, item in parts)
            need(whole, "layout.fill", f"position {index} cuts an element")


def writer_geometry(image: int, runs: list[Run], share: tuple[int, int], wanted: int) -> tuple[int, int, list[int]]:
    """§ 4: the S, L and n_j that a writer of format 1 chooses."""
    p, q = share
    markable = sum(end - begin for begin, end, _ in runs)
    common = 4096
    while common * 256 < image and common < 1 << 20:
        common *= 2
    marked = min(1 << 24, max(4096, markable * p // (q * wanted) // 64 * 64)) if wanted else 4096
    target = min(wanted, markable * p // (q * marked))

    stretches: list[list[int]] = []  # runs that touch each other
    for begin, end, _ in runs:
        if stretches and stretches[-1][1] == begin:
            stretches[-1][1] = end
        else:
            stretches.append([begin, end])

    stripes: list[int] = []
    placed = x = 0
    while x < image:
        x = min(image, x + common)
        ahead = min(image, x + common)
        before = sum(min(end, ahead) - begin for begin, end, _ in runs if begin < ahead)
        room = next((end - x for begin, end in stretches if begin <= x < end), 0)
        due, most = target * before // markable - placed if room else 0, max(1, 2 * common // marked)
        count = min(due, room // marked, most)
        stripes.append(count)
        placed += count
        x += count * marked
    return common, marked, stripes


# --- § 11: the key bundle ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Anchor:
    """What a reader trusts before it has looked at the store."""

    suite: int
    room: bytes
    version: bytes
    revision: int
    positions: int
    manifest_digest: bytes
    public_key: bytes


@dataclass(frozen=True)
class Bundle:
    anchor: Anchor
    common_key: bytes
    holder: str
    reference: str
    word: list[int]  # one bit a position
    variant_keys: list[bytes]


BUNDLE_HEAD = struct.Struct("<4sBBHHxx16s16sII32s32s32s")


def read_bundle(data: bytes) -> Bundle:
    """Step 1: parse the bundle and check its checksum, format and suite."""
    need(BUNDLE_HEAD.size + 32 <= len(data) <= MAX_BUNDLE, "bundle.malformed", "size")
    magic, format_, suite, holder_bytes, reference_bytes, room, version, revision, m, digest, public, common = (
        BUNDLE_HEAD.unpack_from(data)
    )
    need(magic == b"SRKB" and data[10:12] == b"\0\0", "bundle.malformed", "magic")
    need(format_ == FORMAT, "bundle.format", str(format_))
    need(sha256(data[:-32]) == data[-32:], "bundle.checksum")
    need(suite in HASHES, "bundle.suite", str(suite))
    need(m <= MAX_POSITIONS and revision >= 1, "bundle.malformed")

    sizes = [holder_bytes, reference_bytes, (m + 7) // 8, 32 * m]
    need(BUNDLE_HEAD.size + sum(sizes) + 32 == len(data), "bundle.malformed", "size")
    parts, at = [], BUNDLE_HEAD.size
    for size in sizes:
        parts.append(data[at : at + size])
        at += size
    try:
        holder, reference = parts[0].decode(), parts[1].decode()
    except UnicodeDecodeError:
        raise Refused("bundle.malformed", "the holder or the reference is not UTF-8") from None
    word = [parts[2][i // 8] >> i % 8 & 1 for i in range(m)]
    need(pack_word(word) == parts[2], "bundle.malformed", "bits after the code word")
    keys = [parts[3][i : i + 32] for i in range(0, 32 * m, 32)]
    anchor = Anchor(suite, room, version, revision, m, digest, public)
    return Bundle(anchor, common, holder, reference, word, keys)


def pack_word(word: list[int]) -> bytes:
    return bytes(sum(bit << k for k, bit in enumerate(word[i : i + 8])) for i in range(0, len(word), 8))


# --- § 9, 10: manifest, index, packs ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pack:
    kind: int
    identifier: bytes
    first: int
    count: int
    digest: bytes
    segment: int  # plaintext bytes of each segment but the last common one


@dataclass(frozen=True)
class Manifest:
    common_bytes: int
    common: int
    marked: int
    packs: list[Pack]
    index_bytes: int
    index_digest: bytes


@dataclass(frozen=True)
class Index:
    layout: Layout
    sha256: list[bytes]
    report: Any


def fetch(store: Path, name: str, what: str, limit: int) -> bytes:
    path = store / name
    need(path.is_file(), f"{what}.missing", name)
    need(path.stat().st_size <= limit, f"{what}.size", name)
    return path.read_bytes()


def read_manifest(store: Path, anchor: Anchor) -> Manifest:
    """Steps 2 and 3."""
    # 2. Fetch the manifest, verify the signature against the public key, and the payload's digest.
    name = f"versions/{anchor.version.hex()}/{anchor.revision}.manifest"
    envelope = Object(
        parse(fetch(store, name, "manifest", MAX_MANIFEST), "envelope"),
        "payload payloadType signatures",
        "envelope.malformed",
    )
    need(envelope.text("payloadType") == MANIFEST_TYPE, "envelope.malformed")
    payload = from_base64(envelope.text("payload"))
    signed = b"DSSEv1 %d %s %d %s" % (len(MANIFEST_TYPE), MANIFEST_TYPE.encode(), len(payload), payload)
    signatures = envelope.list("signatures")
    need(1 <= len(signatures) <= MAX_SIGNATURES, "envelope.malformed", "signatures")
    valid = False
    for entry in signatures:
        signature = Object(entry, "keyid sig", "envelope.malformed")
        if signature.bytes("keyid", 32) == sha256(anchor.public_key):
            valid = valid or verify(anchor.public_key, from_base64(signature.text("sig")), signed)
    need(valid, "manifest.signature")

    if sha256(payload) != anchor.manifest_digest:
        # Signed by the right room, but not what the bundle names. Say so if it is an older state of the same version.
        other = parse(payload, "manifest")
        same = isinstance(other, dict) and other.get("version") == anchor.version.hex()
        older = same and type(other.get("revision")) is int and other["revision"] < anchor.revision
        raise Refused("manifest.rollback" if older else "manifest.other")

    # 3. Parse the payload.
    top = Object(
        parse(payload, "manifest"), "format suite room version revision common marked index", "manifest.malformed"
    )
    need(top.integer("format", 0, 2**53) == FORMAT, "manifest.format")
    need(top.integer("suite", 0, 2**53) in HASHES, "manifest.suite")
    need(top.value["suite"] == anchor.suite, "manifest.mismatch", "suite")
    need(top.bytes("room", 16) == anchor.room, "manifest.mismatch", "room")
    need(top.bytes("version", 16) == anchor.version, "manifest.mismatch", "version")
    need(top.integer("revision", 1, 2**32 - 1) == anchor.revision, "manifest.mismatch", "revision")
    common = Object(top.value["common"], "bytes segment packs", "manifest.malformed")
    marked = Object(top.value["marked"], "positions segment packs", "manifest.malformed")
    index = Object(top.value["index"], "bytes digest", "manifest.malformed")
    common_bytes = common.integer("bytes", 0, MAX_IMAGE)
    common_segment = common.integer("segment", 64, MAX_SEGMENT)
    marked_segment = marked.integer("segment", MIN_MARKED, MAX_SEGMENT)
    m = marked.integer("positions", 0, MAX_POSITIONS)
    need(m == anchor.positions, "manifest.mismatch", "positions")
    packs = read_pack_list(common.list("packs"), COMMON, -(-common_bytes // common_segment), common_segment)
    packs += read_pack_list(marked.list("packs"), MARKED, m, marked_segment)
    index_bytes = index.integer("bytes", 0, MAX_INDEX)
    return Manifest(common_bytes, common_segment, marked_segment, packs, index_bytes, index.bytes("digest", 32))


def from_base64(text: str) -> bytes:
    try:
        data = base64.b64decode(text, validate=True)
    except ValueError:
        raise Refused("envelope.malformed", "base64") from None
    need(base64.b64encode(data).decode() == text, "envelope.malformed", "base64 is not unique")
    return data


def verify(public_key: bytes, signature: bytes, message: bytes) -> bool:
    try:
        Ed25519PublicKey.from_public_bytes(public_key).verify(signature, message)
    except (InvalidSignature, ValueError):
        return False
    return True


def read_pack_list(entries: list[Any], kind: int, total: int, segment: int) -> list[Pack]:
    packs, following = [], 0
    for entry in entries:
        fields = Object(entry, "id first count digest", "manifest.malformed")
        first, count = fields.integer("first", 0, 2**53), fields.integer("count", 1, 2**32 - 1)
        need(first == following, "manifest.packs", "gap or overlap")
        need(96 + count * (128 if kind else 32) <= MAX_TRAILER, "manifest.packs", "trailer over the limit")
        packs.append(Pack(kind, fields.bytes("id", 32), first, count, fields.bytes("digest", 32), segment))
        following = first + count
    need(following == total, "manifest.packs", f"{following} segments in packs; {total} expected")
    return packs


def read_index(store: Path, anchor: Anchor, manifest: Manifest, common_key: bytes) -> Index:
    """Step 4: fetch the index, check its digest, open it, and check the layout."""
    hash_of = HASHES[anchor.suite]
    name = f"versions/{anchor.version.hex()}/{anchor.revision}"
    box = fetch(store, f"{name}.index", "index", MAX_INDEX)
    need(len(box) == manifest.index_bytes and hash_of(box) == manifest.index_digest, "index.digest")
    plain = open_box(common_key, f"index {anchor.version.hex()} {anchor.revision}", box, "index")

    need(len(plain) >= 8, "index.padding")
    (length,) = struct.unpack_from("<Q", plain)
    need(len(plain) == -(-(8 + length) // 4096) * 4096 and not any(plain[8 + length :]), "index.padding")
    top = Object(parse(plain[8 : 8 + length], "index"), "layout sha256 report", "index.malformed")
    layout = read_layout(top.value["layout"], hash_of)
    hashes = [
        Object({"sha256": value}, "sha256", "index.malformed").bytes("sha256", 32) for value in top.list("sha256")
    ]
    need(len(hashes) == len(layout.files), "index.malformed", "one hash a file")

    need(layout.common == manifest.common and layout.marked == manifest.marked, "layout.manifest", "sizes")
    need(layout.positions == anchor.positions, "layout.manifest", "positions")
    need(layout.image - layout.positions * layout.marked == manifest.common_bytes, "layout.manifest", "common bytes")
    return Index(layout, hashes, top.value["report"])


class OpenPack:
    """A pack whose trailer is what the manifest says, and whose keys are those that the trailer says."""

    def __init__(self, store: Path, anchor: Anchor, index: Index, manifest: Manifest, pack: Pack) -> None:
        """Step 5, without the comparison of commitments."""
        self.anchor, self.layout, self.pack = anchor, index.layout, pack
        self.hash_of = HASHES[anchor.suite]
        final = pack.first + pack.count == len(index.layout.stripes)
        last = pack.segment
        if pack.kind == COMMON and final:
            last = manifest.common_bytes - (pack.first + pack.count - 1) * pack.segment
        variants, record = (2, 128) if pack.kind else (1, 32)
        body = variants * ((pack.count - 1) * (pack.segment + TAG) + last + TAG)

        hexadecimal = pack.identifier.hex()
        name = f"packs/{hexadecimal[:2]}/{hexadecimal}"
        # The one copy that everything below reads.
        self.data = fetch(store, name, "pack", body + 96 + pack.count * record)
        need(len(self.data) == body + 96 + pack.count * record, "pack.size", name)
        trailer = self.data[body:]
        need(self.hash_of(trailer) == pack.digest, "pack.digest", name)
        says = struct.unpack_from("<8sBBHIQII32s", trailer)
        expected = (
            b"SRPACK01",
            anchor.suite,
            pack.kind,
            0,
            pack.count,
            pack.first,
            pack.segment,
            last,
            pack.identifier,
        )
        need(says == expected, "pack.trailer", name)
        self.commitment, self.records = trailer[64:96], trailer[96:]
        need(pack.kind == COMMON or self.commitment == bytes(32), "pack.trailer", "commitment of a marked pack")

    def common(self, common_key: bytes) -> Iterator[tuple[int, bytes]]:
        """(j, plaintext) of each common segment."""
        key = derive(common_key, "pack", self.pack.identifier)
        need(commit(key) == self.commitment, "pack.commitment")
        for k in range(self.pack.count):
            j, at = self.pack.first + k, k * (self.pack.segment + TAG)
            end = min(at + self.pack.segment + TAG, len(self.data) - 96 - len(self.records))
            yield (
                j,
                self.segment(
                    COMMON, j, self.data[at:end], self.records[32 * k : 32 * k + 32], key, j.to_bytes(12, "little")
                ),
            )

    def variant(self, i: int, bit: int, key: bytes) -> bytes:
        """Variant A (`bit` 0) or B (1) of position i."""
        k = i - self.pack.first
        record = self.records[128 * k : 128 * k + 128]
        need(commit(key) == record[64 + 32 * bit : 96 + 32 * bit], "pack.commitment", f"position {i}")
        size = self.pack.segment + TAG
        at = (2 * k + bit) * size
        nonce = self.pack.identifier[:12]
        return self.segment(VARIANT_A + bit, i, self.data[at : at + size], record[32 * bit : 32 * bit + 32], key, nonce)

    def segment(self, kind: int, index: int, data: bytes, digest: bytes, key: bytes, nonce: bytes) -> bytes:
        """Step 6: the hash, then the tag, of one and the same copy."""
        anchor = self.anchor
        need(self.hash_of(data) == digest, "segment.hash", f"kind {kind}, index {index}")
        bound = associated_data(anchor.suite, kind, anchor.version, anchor.revision, index, self.layout.digest)
        try:
            return AESGCM(key).decrypt(nonce, data, bound)
        except InvalidTag:
            raise Refused("segment.tag", f"kind {kind}, index {index}") from None


# --- § 12: reading ----------------------------------------------------------------------------------------------------


def read_image(
    store: Path, anchor: Anchor, common_key: bytes, marked: Callable[[OpenPack, int], bytes]
) -> tuple[Index, bytes]:
    """Steps 2 to 6; `marked` gives the plaintext of a position from its pack."""
    manifest = read_manifest(store, anchor)
    index = read_index(store, anchor, manifest, common_key)
    place = {(kind, number): (begin, size) for kind, number, begin, size in index.layout.segments()}
    image = bytearray(index.layout.image)
    try:
        for pack in manifest.packs:
            opened = OpenPack(store, anchor, index, manifest, pack)
            if pack.kind == COMMON:
                found = opened.common(common_key)
            else:
                found = ((i, marked(opened, i)) for i in range(pack.first, pack.first + pack.count))
            for number, plain in found:
                begin, size = place[pack.kind, number]
                image[begin : begin + size] = plain
        at = 0
        for file in index.layout.files:
            need(not any(image[at : file.offset]), "image.padding", file.path)
            at = file.offset + file.size
    except Refused:
        image[:] = bytes(len(image))
        raise
    return index, bytes(image)


def files_of(index: Index, image: bytes) -> dict[str, bytes]:
    return {file.path: image[file.offset : file.offset + file.size] for file in index.layout.files}


def read_as_holder(store: Path, bundle_bytes: bytes) -> dict[str, bytes]:
    """The files as the holder of a bundle reads them."""
    bundle = read_bundle(bundle_bytes)  # step 1

    def variant(pack: OpenPack, i: int) -> bytes:
        return pack.variant(i, bundle.word[i], bundle.variant_keys[i])

    index, image = read_image(store, bundle.anchor, bundle.common_key, variant)
    files = files_of(index, image)
    stripes = [(begin, begin + size) for kind, _, begin, size in index.layout.segments() if kind == MARKED]
    for file, digest in zip(index.layout.files, index.sha256, strict=True):
        touched = any(begin < file.offset + file.size and file.offset < end for begin, end in stripes)
        need(touched or sha256(files[file.path]) == digest, "file.sha256", file.path)
    return files


# --- § 7: marks -------------------------------------------------------------------------------------------------------


def signs(mark_key: bytes, i: int, marked: int, count: int) -> list[int]:
    """The first `count` signs of position i."""
    block = -(-marked // 256) * 16
    keystream = stream(mark_key, i * block, block)
    return [1 if keystream[e // 8] >> e % 8 & 1 else -1 for e in range(count)]


def numbers(begin: int, pieces: list[Piece]) -> list[list[tuple[int, str]]]:
    """Of each element of a segment that starts at `begin` of the image its numbers: (offset in the segment, type). A
    block's numbers are its scale fields, of type "scale"."""
    found = []
    for b, e, name, origin in pieces:
        if name in TYPES:
            found += [[(o - begin, name)] for o in range(b, e, TYPES[name][0])]
            continue
        _, size, at, fields = BLOCKS[name]
        first = origin + at + -(-(b - origin - at) // size) * size
        found += [[(o - begin + 2 * k, "scale") for k in range(fields)] for o in range(first, e, size)]
    return found


def step_of(value: int, name: str) -> int:
    """By how much a stored integer moves: q, or 0 where it is not marked."""
    if name == "scale":
        u = value & 0x7FFF
        return 8 if 0x0400 <= u <= 0x7BF7 else u >> 7 and 2 ** (u.bit_length() - 8) if u < 0x0400 else 0
    size, q, low, high = TYPES[name]
    return q if low + q <= value & ((1 << 8 * size - 1) - 1) <= high - q else 0


def width_of(name: str) -> int:
    return 2 if name == "scale" else TYPES[name][0]


def variants(original: bytes, begin: int, pieces: list[Piece], mark_key: bytes, i: int) -> tuple[bytes, bytes]:
    """Variants A and B of position i as section 7 defines them."""
    found = numbers(begin, pieces)
    a, b = bytearray(original), bytearray(original)
    for element, s in zip(found, signs(mark_key, i, len(original), len(found)), strict=True):
        for at, name in element:
            here = slice(at, at + width_of(name))
            value = int.from_bytes(original[here], "little")
            step = s * step_of(value, name)
            a[here] = (value + step).to_bytes(width_of(name), "little")
            b[here] = (value - step).to_bytes(width_of(name), "little")
    return bytes(a), bytes(b)


def midpoint(a: bytes, b: bytes, begin: int, pieces: list[Piece]) -> bytes:
    original, rest = bytearray(a), bytearray(b)
    for at, name in [number for element in numbers(begin, pieces) for number in element]:
        here = slice(at, at + width_of(name))
        x, y = (int.from_bytes(data[here], "little") for data in (a, b))
        sign = 1 << 8 * width_of(name) - 1
        need(x & sign == y & sign, "variant.definition", "the variants differ in sign")
        original[here] = rest[here] = ((x + y) // 2).to_bytes(width_of(name), "little")
    need(original == rest, "variant.definition", "the variants differ where no mark is")
    return bytes(original)


def code_word(code_key: bytes, holder: str, m: int, c0: int = 16) -> list[int]:
    # In doubles: none of the 256 values for c0 from 1 to 199 comes nearer than 1e-6 to a half.
    cut = math.asin(math.sqrt(1 / (300 * c0)))
    table = [round(65536 * math.sin(cut + (math.pi / 2 - 2 * cut) * (k + 0.5) / 256) ** 2) for k in range(256)]
    biases = stream(derive(code_key, "bias"), 0, m)
    words = struct.unpack(f"<{m}H", stream(derive(code_key, "word", holder.encode()), 0, 2 * m))
    return [int(word < table[k]) for word, k in zip(words, biases, strict=True)]


# --- What the custodian reads and checks ------------------------------------------------------------------------------


def variant_table(version_key: bytes, m: int) -> list[tuple[bytes, bytes]]:
    table = stream(derive(version_key, "variants"), 0, 64 * m)
    return [(table[i : i + 32], table[i + 32 : i + 64]) for i in range(0, 64 * m, 64)]


def read_as_custodian(
    store: Path, anchor: Anchor, version_key: bytes, mark_root: bytes
) -> tuple[Index, dict[str, bytes]]:
    """The original files, from the midpoints of all variants. Every variant must be what section 7 makes of them."""
    table = variant_table(version_key, anchor.positions)
    mark_key = derive(mark_root, "mark")

    def original(pack: OpenPack, i: int) -> bytes:
        a, b = (pack.variant(i, bit, table[i][bit]) for bit in (0, 1))
        begin = next(begin for kind, n, begin, _ in pack.layout.segments() if (kind, n) == (MARKED, i))
        pieces = pack.layout.pieces(begin, begin + len(a))
        middle = midpoint(a, b, begin, pieces)
        need(variants(middle, begin, pieces, mark_key, i) == (a, b), "variant.definition", f"position {i}")
        return middle

    index, image = read_image(store, anchor, derive(version_key, "common"), original)
    files = files_of(index, image)
    for file, digest in zip(index.layout.files, index.sha256, strict=True):
        need(sha256(files[file.path]) == digest, "file.sha256", file.path)
    check_contents(index.layout, files)
    return index, files


def check_writer_rule(index: Index) -> None:
    """That S, L and n_j are those which a writer of format 1 chooses for the share and positions in `report`."""
    report, layout = index.report, index.layout
    need(isinstance(report, dict) and {"share", "positions_wanted"} <= set(report), "report.malformed")
    need(isinstance(report["share"], list) and len(report["share"]) == 2, "report.malformed")
    p = integer(report["share"][0], 0, 2**53, "report.malformed")
    q = integer(report["share"][1], 1, 2**53, "report.malformed")
    wanted = integer(report["positions_wanted"], 0, 2**53, "report.malformed")
    rule = writer_geometry(layout.image, layout.runs, (p, q), wanted)
    need((layout.common, layout.marked, layout.stripes) == rule, "geometry.rule", f"the rule gives {rule}")


def check_bundle(bundle: Bundle, version_key: bytes, mark_root: bytes, c0: int = 16) -> None:
    """That a bundle holds the keys of its holder's code word and no others."""
    m = bundle.anchor.positions
    need(bundle.common_key == derive(version_key, "common"), "bundle.keys", "common key")
    need(bundle.word == code_word(derive(mark_root, "code"), bundle.holder, m, c0), "bundle.word")
    table = variant_table(version_key, m)
    need(all(table[i][bundle.word[i]] == bundle.variant_keys[i] for i in range(m)), "bundle.keys", "variant keys")


def check_contents(layout: Layout, files: dict[str, bytes]) -> None:
    """§ 3: that `data_start` and `runs` are those of the files."""
    runs: list[Run] = []
    for file in layout.files:
        try:
            data_start, tensors = TENSORS[file.kind](files[file.path])
        except (ValueError, TypeError, KeyError, AttributeError, struct.error) as error:
            raise Refused("layout.kind", f"{file.path} is no {file.kind}: {error}") from None
        need(data_start == file.data_start, "layout.data-start", file.path)
        base = file.offset + data_start
        for name, dimensions, begin, end in sorted(tensors, key=lambda tensor: tensor[2:]):
            # A version from before there were block types has none in its runs.
            known = name in TYPES or (name in BLOCKS and any(run[2] in BLOCKS for run in layout.runs))
            if not known or dimensions < 2 or begin == end or (base + begin) % unit(name)[1]:
                continue
            if runs and runs[-1][1:] == (base + begin, name):
                runs[-1] = (runs[-1][0], base + end, name)
            else:
                runs.append((base + begin, base + end, name))
    need(runs == layout.runs, "layout.runs", f"the files have {runs}")


Tensors = list[tuple[str, int, int, int]]  # type, number of dimensions, begin and end after data_start


def safetensors(data: bytes) -> tuple[int, Tensors]:
    header = 8 + int.from_bytes(data[:8], "little")
    entries = {name: entry for name, entry in json.loads(data[8:header]).items() if name != "__metadata__"}
    return header, [(e["dtype"], len(e["shape"]), *e["data_offsets"]) for e in entries.values()]


# By ggml's numbers; of other types the size does not matter here.
GGML_TYPES = {
    0: "F32",
    1: "F16",
    2: "Q4_0",
    3: "Q4_1",
    6: "Q5_0",
    7: "Q5_1",
    8: "Q8_0",
    10: "Q2_K",
    11: "Q3_K",
    12: "Q4_K",
    13: "Q5_K",
    14: "Q6_K",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    20: "IQ4_NL",
    21: "IQ3_S",
    22: "IQ2_S",
    23: "IQ4_XS",
    28: "F64",
    30: "BF16",
}


def gguf(data: bytes) -> tuple[int, Tensors]:
    """GGUF version 3."""
    scalars = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
    at = 4

    def take(code: str) -> Any:
        nonlocal at
        (value,) = struct.unpack_from("<" + code, data, at)
        at += struct.calcsize("<" + code)
        return value

    def text() -> bytes:
        return bytes(take(f"{take('Q')}s"))

    def value(kind: int) -> Any:
        if kind == 8:
            return text()
        if kind == 9:
            inner, count = take("I"), take("Q")
            return [value(inner) for _ in range(count)]
        return take(scalars[kind])

    _, tensor_count, pair_count = take("I"), take("Q"), take("Q")
    metadata = {text(): value(take("I")) for _ in range(pair_count)}
    found: Tensors = []
    for _ in range(tensor_count):
        text()
        shape = [take("Q") for _ in range(take("I"))]
        name = GGML_TYPES.get(take("I"), "other")
        begin = take("Q")
        weights, size = BLOCKS[name][:2] if name in BLOCKS else (1, TYPES[name][0] if name in TYPES else 0)
        found.append((name, len(shape), begin, begin + math.prod(shape) // weights * size))
    alignment = metadata.get(b"general.alignment", 32)
    return at + -at % alignment, found


TENSORS: dict[str, Callable[[bytes], tuple[int, Tensors]]] = {
    "safetensors": safetensors,
    "gguf": gguf,
    "opaque": lambda _: (0, []),
}


def main(arguments: list[str]) -> int:
    store, bundle = arguments
    try:
        files = read_as_holder(Path(store), Path(bundle).read_bytes())
    except Refused as refused:
        print(f"refused: {refused}", file=sys.stderr)
        return 1
    for path, data in files.items():
        print(f"{hashlib.sha256(data).hexdigest()}  {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
