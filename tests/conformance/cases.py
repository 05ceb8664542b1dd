"""The test vectors: complete versions, and versions that are wrong at one place."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from conformance import decoder, encoder
from conformance.encoder import Identity, Version, Written, gguf_file, safetensors_file, weights, write


@dataclass(frozen=True)
class Vector:
    """One folder. `holder` and `custodian` are the refusals that they must get, or None where they can read."""

    name: str
    shows: str
    written: Written
    holder: str | None = None
    custodian: str | None = None


# --- Valid versions ---------------------------------------------------------------------------------------------------


def small_model() -> dict[str, bytes]:
    norm = weights("BF16", [64], "norm")
    return {
        "config.json": b'{"architectures": ["Small"]}\n',
        "model.safetensors": safetensors_file(
            {
                "embed.weight": ("BF16", [128, 64], weights("BF16", [128, 64], "embed")),
                "norm.weight": ("BF16", [64], norm),
                "head.weight": ("BF16", [64, 128], weights("BF16", [64, 128], "head")),
            }
        ),
    }


def special_values() -> bytes:
    """Every element at and around the borders of section 7, of either sign, over and over, in all four types."""
    tensors = {}
    for kind, (size, q, low, high) in decoder.TYPES.items():
        top = (1 << 8 * size - 1) - 1
        borders = [0, 1, low - 1, low, low + q - 1, low + q, low + q + 1, high - q - 1, high - q, high - q + 1, high]
        borders += [high + 1, high + 2, top - 1, top, (low + high) // 2]  # infinity, two NaN, the last NaN, a plain one
        both = [value | sign << 8 * size - 1 for value in borders for sign in (0, 1)]
        data = b"".join(value.to_bytes(size, "little") for value in both) * (6144 // size // len(both))
        tensors[kind] = (kind, [len(both), 6144 // size // len(both)], data)
    return safetensors_file(tensors)


def mixed(kinds: list[tuple[str, int]]) -> bytes:
    """Matrices of 32 columns that touch each other."""
    return safetensors_file(
        {
            f"layer.{i}": (kind, [rows, 32], weights(kind, [rows, 32], f"mixed {i}"))
            for i, (kind, rows) in enumerate(kinds)
        }
    )


def short_stretches() -> bytes:
    """Matrices too small for a marked segment between vectors, and then one that has room for many."""
    tensors = {}
    for i in range(6):
        tensors[f"small.{i}"] = ("BF16", [15, 64], weights("BF16", [15, 64], f"small {i}"))
        tensors[f"small.{i}.norm"] = ("BF16", [32], weights("BF16", [32], f"small norm {i}"))
    return safetensors_file({**tensors, "wide": ("BF16", [128, 64], weights("BF16", [128, 64], "wide"))})


def many_files() -> dict[str, bytes]:
    return {
        "LICENSE": b"Free as in weights.\n",
        "empty": b"",
        "nested/deeper/shard-1.safetensors": mixed([("BF16", 100)]),
        "nested/deeper/shard-2.safetensors": mixed([("F16", 101)]),
        "nested-": b"sorts before nested/ by bytes",
        "größe/模型.safetensors": mixed([("F32", 50)]),
        "\uff5a": b"comes first in UTF-8 and second in UTF-16",
        "\U0001d467": b"comes second in UTF-8 and first in UTF-16",
        'with "quotes" and spaces': b"\x00" * 65,
    }


def misaligned() -> bytes:
    """Matrices on and off the multiples of their element size, after a header of no round size."""
    return safetensors_file(
        {
            "odd": ("U8", [3], b"abc"),
            "shifted": ("BF16", [64, 32], weights("BF16", [64, 32], "shifted")),
            "evened": ("U8", [1], b"d"),
            "straight": ("F32", [64, 32], weights("F32", [64, 32], "straight")),
            "half.a.step": ("F16", [1, 1], weights("F16", [1, 1], "half a step")),
            "by.two": ("F32", [4, 4], weights("F32", [4, 4], "by two")),
        },
        header_multiple=1,
    )


def valid() -> Iterator[Vector]:
    plain = Version(Identity("small"), small_model(), share=(1, 2), wanted=3, segments_a_pack=3)
    yield Vector("suite-1", "the default suite; several packs of each kind", write(plain))
    yield Vector(
        "suite-2",
        "the same files under SHA-256, for a holder whose path and reference are not ASCII",
        write(replace(plain, identity=Identity("small in suite 2"), suite=2, holder="lab/ådne", reference="№ 8")),
    )

    old, new = write(plain), write(replace(plain, revision=2))
    yield Vector(
        "revision-2",
        "the version of suite-1, rotated: new keys and packs, the same marks; revision 1 is still in the store",
        replace(new, store={**old.store, **new.store}),
    )

    model = Version(Identity("special"), {"model.safetensors": special_values()}, share=(1, 1), wanted=6)
    yield Vector(
        "special-values",
        "all four types: zeros, denormal numbers, infinities, NaN, and each element within a step of them",
        write(model),
    )
    kinds = [("F32", 40), ("BF16", 70), ("F64", 20), ("F16", 90), ("BF16", 101)]
    model = Version(Identity("mixed"), {"model.safetensors": mixed(kinds)}, share=(1, 1), wanted=5)
    yield Vector("crossing", "marked segments that cross tensors of different types", write(model))
    model = Version(Identity("files"), many_files(), share=(1, 2), wanted=4, segments_a_pack=1)
    yield Vector(
        "many-files", "an empty file, nested, quoted and non-ASCII paths; a pack for each segment", write(model)
    )
    files = {"model.safetensors": safetensors_file({"norm": ("BF16", [3000], weights("BF16", [3000], "norm"))})}
    yield Vector(
        "nothing-markable", "no position: only one-dimensional tensors", write(Version(Identity("flat"), files))
    )
    yield Vector(
        "only-an-empty-file", "an image of no bytes: no segment, no pack", write(Version(Identity("0"), {"a": b""}))
    )
    empty = {"empty": ("F32", [0, 4], b""), "w": ("BF16", [128, 64], weights("BF16", [128, 64], "after an empty one"))}
    files = {"model.safetensors": safetensors_file(empty)}
    model = Version(Identity("empty tensor"), files, share=(1, 2), wanted=9)
    yield Vector("empty-tensor", "a matrix of no rows: it makes no run", write(model))
    model = Version(Identity("misaligned"), {"model.safetensors": misaligned()}, share=(1, 1), wanted=2)
    yield Vector(
        "misaligned", "matrices that begin off the multiples of their element size carry no mark", write(model)
    )
    model = Version(Identity("gguf"), {"model.gguf": small_gguf()}, share=(1, 1), wanted=4, blocks=False)
    yield Vector(
        "gguf",
        "a GGUF file with a data section aligned to 32 bytes, from before quantised tensors were marked",
        write(model),
    )
    model = Version(Identity("blocks"), {"model.gguf": quantised_gguf()}, share=(1, 1), wanted=20)
    yield Vector(
        "gguf-blocks",
        "layout of format 2: every block type, scales of any value, marked segments that cut blocks and cross types",
        write(model),
    )

    files = {"model.safetensors": four_pages(), "z": b"!"}
    model = Version(Identity("one byte"), files, share=(1, 2), wanted=1)
    yield Vector("last-is-short", "the last common segment has one byte", write(model))

    model = Version(Identity("short stretches"), {"model.safetensors": short_stretches()}, share=(1, 1), wanted=6)
    yield Vector("short-stretches", "much falls due at once, and is spread by the bound on a stripe", write(model))

    # The geometry of these two is none that the writer's rule gives; a reader takes it from the index.
    files = {"model.safetensors": four_pages()}
    model = Version(Identity("other"), files, geometry=(4160, 4224, [0, 1, 0]), wanted=1)
    yield Vector("other-geometry", "sizes and stripes that the writer's rule would not give", write(model))
    model = Version(Identity("ends marked"), files, geometry=(4096, 4096, [0, 2]), wanted=2)
    yield Vector("ends-marked", "two marked segments follow the last common one, which is full", write(model))


def small_gguf() -> bytes:
    return gguf_file(
        {
            "token_embd.weight": (30, [64, 40], weights("BF16", [64, 40], "gguf embd")),
            "blk.0.attn_norm.weight": (0, [64], weights("F32", [64], "gguf norm")),
            "blk.0.attn_q.weight": (1, [64, 63], weights("F16", [64, 63], "gguf q")),
            "blk.0.ffn_up.weight": (8, [64, 32], encoder.drawn("gguf", "Q8_0", 34 * 2 * 32)),
            "blk.0.ffn_down.weight": (0, [64, 31], weights("F32", [64, 31], "gguf down")),
        }
    )


def quantised_gguf() -> bytes:
    """A tensor of each block type, of any bytes: scales are denormal, infinite and no numbers, too. Between them a
    matrix of floats, and one of a type that is not marked."""
    numbers = {name: number for number, name in decoder.GGML_TYPES.items()}
    tensors: dict[str, tuple[int, list[int], bytes]] = {}
    for name, (n, size, _, _) in decoder.BLOCKS.items():
        rows = 16 if n == 256 else 64  # whole multiples of the alignment, so that they touch each other
        tensors[f"{name}.weight"] = (numbers[name], [n, rows], encoder.drawn("blocks", name, size * rows))
    tensors["half.weight"] = (1, [64, 40], weights("F16", [64, 40], "blocks half"))
    tensors["mx.weight"] = (39, [32, 32], encoder.drawn("blocks", "MXFP4", 17 * 32))
    tensors["one.row"] = (3, [640], encoder.drawn("blocks", "a row", 20 * 20))
    tensors["again.weight"] = (14, [256, 32], encoder.drawn("blocks", "again", 210 * 32))
    return gguf_file(tensors)


def four_pages() -> bytes:
    """A file of 16,384 bytes."""
    return safetensors_file({"w": ("BF16", [126, 64], weights("BF16", [126, 64], "four pages"))}, header_multiple=248)


# --- Versions that are wrong at one place -----------------------------------------------------------------------------

TINY = Version(
    Identity("tiny"),
    {"model.safetensors": safetensors_file({"w": ("BF16", [98, 64], weights("BF16", [98, 64], "tiny"))})},
    share=(3, 4),
    wanted=3,
)
OTHER_VERSION = replace(TINY, identity=Identity("tiny too"))
OTHER_ROOM = replace(TINY, identity=Identity("tiny", room="another room"))


def hooked(**hooks: Callable[[Any], Any]) -> Written:
    """The tiny version with one value changed where it is made, and everything that depends on it made over."""
    return write(replace(TINY, hooks={name.replace("_", " "): change for name, change in hooks.items()}))


def stored(kind: str, change: Callable[[bytes], bytes | None]) -> Written:
    """The tiny version with one object of the store changed, or taken away, after it was written."""
    written = write(TINY)
    name = next(name for name in written.store if matches(name, written.store[name], kind))
    changed = change(written.store.pop(name))
    return replace(written, store=written.store if changed is None else {**written.store, name: changed})


def matches(name: str, data: bytes, kind: str) -> bool:
    if kind in {"manifest", "index"}:
        return name.endswith("." + kind)
    # The kind of a pack is the tenth byte of its trailer; the tiny version has one common pack and one marked one.
    return name.startswith("packs/") and data[data.rindex(b"SRPACK01") + 9] == (kind == "marked")


def gone(_: bytes) -> None:
    return None


def flipped(at: int) -> Callable[[bytes], bytes]:
    """One bit of the byte at `at` (from the end if negative) is inverted."""
    return lambda data: data[: at % len(data)] + bytes([data[at] ^ 1]) + data[at % len(data) + 1 :]


def changed(*path: str | int, to: Any) -> Callable[[Any], Any]:
    """A value within nested objects and arrays is replaced."""

    def change(value: Any) -> Any:
        value = json.loads(json.dumps(value))
        inner = value
        for step in path[:-1]:
            inner = inner[step]
        inner[path[-1]] = to
        return value

    return change


def bundled(**fields: Any) -> Written:
    return hooked(bundle=lambda before: {**before, **fields})


def with_bundle(change: Callable[[bytes], bytes]) -> Written:
    written = write(TINY)
    return replace(written, bundle=change(written.bundle))


def swapped(parts: list[bytes]) -> list[bytes]:
    return [parts[1], parts[0], *parts[2:]]


def swapped_in_body(size: int) -> Callable[[bytes], bytes]:
    return lambda data: data[size : 2 * size] + data[:size] + data[2 * size :]


def broken_manifests() -> Iterator[Vector]:
    def both(name: str, shows: str, written: Written, refusal: str) -> Vector:
        return Vector(f"bad-{name}", shows, written, refusal, refusal)

    def manifest_of(version: Version) -> bytes:
        store = write(version).store
        return next(data for name, data in store.items() if name.endswith(".manifest"))

    def resigned(data: bytes) -> bytes:
        value = json.loads(data)
        signature = value["signatures"][0]["sig"]
        value["signatures"][0]["sig"] = ("B" if signature[0] == "A" else "A") + signature[1:]
        return decoder.canonical(value)

    def other_payload(data: bytes) -> bytes:
        value, donor = json.loads(data), json.loads(manifest_of(OTHER_VERSION))
        return decoder.canonical({**value, "payload": donor["payload"]})

    yield both("manifest-missing", "no manifest", stored("manifest", gone), "manifest.missing")
    yield both("manifest-signature", "another signature", stored("manifest", resigned), "manifest.signature")
    yield both(
        "manifest-payload",
        "another payload under the signature",
        stored("manifest", other_payload),
        "manifest.signature",
    )
    donor = manifest_of(OTHER_ROOM)
    yield both(
        "manifest-other-room", "what another room signed", stored("manifest", lambda _: donor), "manifest.signature"
    )
    other = manifest_of(OTHER_VERSION)
    yield both(
        "manifest-other-version",
        "another version of the same room",
        stored("manifest", lambda _: other),
        "manifest.other",
    )

    old, new = write(TINY), write(replace(TINY, revision=2))
    name = f"versions/{TINY.identity.version_id.hex()}"
    replayed = {f"{name}/2.{part}": old.store[f"{name}/1.{part}"] for part in ("manifest", "index")}
    packs = {path: data for path, data in old.store.items() if path.startswith("packs/")}
    rollback = replace(new, store={**packs, **replayed})
    yield both("manifest-rollback", "revision 1, whole, in the place of revision 2", rollback, "manifest.rollback")

    yield both(
        "manifest-spaces",
        "a signed payload with a space after a comma",
        hooked(payload_text=lambda text: text.replace(b",", b", ", 1)),
        "manifest.not-canonical",
    )
    yield both(
        "manifest-order",
        "a signed payload whose names are out of order",
        hooked(payload_text=reordered),
        "manifest.not-canonical",
    )
    yield both(
        "manifest-float",
        "a signed payload with 1.0 in the place of 1",
        hooked(payload_text=lambda text: text.replace(b'"revision":1,', b'"revision":1.0,')),
        "manifest.not-canonical",
    )
    yield both(
        "manifest-duplicate-name",
        "a signed payload with two revisions",
        hooked(payload_text=lambda text: text.replace(b'"revision":1,', b'"revision":1,"revision":1,')),
        "manifest.duplicate-name",
    )
    yield both(
        "envelope-spaces",
        "an envelope with a space after a comma; the signature is right",
        stored("manifest", lambda data: data.replace(b",", b", ", 1)),
        "envelope.not-canonical",
    )
    yield both("manifest-format", "format 2, signed", hooked(payload=changed("format", to=2)), "manifest.format")
    yield both("manifest-suite", "suite 3, signed", hooked(payload=changed("suite", to=3)), "manifest.suite")
    yield both(
        "manifest-other-suite",
        "suite 2 in the manifest, 1 elsewhere",
        hooked(payload=changed("suite", to=2)),
        "manifest.mismatch",
    )
    yield both(
        "manifest-gap",
        "packs that leave out a segment",
        hooked(payload=changed("common", "packs", 0, "first", to=1)),
        "manifest.packs",
    )
    yield both(
        "manifest-sizes",
        "another size of marked segments than in the layout",
        hooked(payload=changed("marked", "segment", to=8192)),
        "layout.manifest",
    )


def reordered(text: bytes) -> bytes:
    value = json.loads(text)
    return json.dumps(dict(reversed(value.items())), separators=(",", ":")).encode()


def broken_indexes() -> Iterator[Vector]:
    def layout(name: str, shows: str, change: Callable[[Any], Any], refusal: str) -> Vector:
        return Vector(f"bad-{name}", shows, hooked(layout=change), refusal, refusal)

    def path(name: str, to: str) -> Vector:
        return layout(
            f"path-{name}", f"a file named {json.dumps(to)}", changed("files", 0, "path", to=to), "layout.path"
        )

    yield Vector("bad-index-missing", "no index", stored("index", gone), "index.missing", "index.missing")
    yield Vector(
        "bad-index-altered", "one bit of the index", stored("index", flipped(100)), "index.digest", "index.digest"
    )
    yield Vector(
        "bad-index-tag",
        "one bit of the index, signed so",
        hooked(box=flipped(100)),
        "index.tag",
        "index.tag",
    )
    yield Vector(
        "bad-index-padding",
        "a one in the padding of the index",
        hooked(index_plaintext=flipped(-1)),
        "index.padding",
        "index.padding",
    )
    yield path("parent", "../model.safetensors")
    yield path("inner-parent", "a/../../model.safetensors")
    yield path("absolute", "/model.safetensors")
    yield path("backslash", "..\\model.safetensors")
    yield path("control", "model\n.safetensors")
    yield path("empty-part", "a//model.safetensors")
    yield layout(
        "files-order",
        "files out of order",
        lambda value: {
            **value,
            "files": [
                value["files"][0],
                {
                    **value["files"][0],
                    "path": "a",
                    "bytes": 0,
                    "data_start": 0,
                    "offset": (value["image"] + 63) // 64 * 64,
                },
            ],
            "image": (value["image"] + 63) // 64 * 64,
        },
        "layout.path-order",
    )
    tiny = write(TINY).layout
    begin, end, _ = tiny["runs"][0]
    yield layout("layout-format", "format 3 in the layout", changed("format", to=3), "layout.format")
    yield layout("layout-format-2", "format 2 in a layout without block types", changed("format", to=2), "layout.runs")
    yield layout("layout-offset", "a file 64 bytes later than section 3 puts it", moved(tiny, 64), "layout.offset")
    yield layout(
        "layout-unfilled", "fewer common segments than fill the image", changed("stripes", to=[0, 1]), "layout.fill"
    )
    yield layout(
        "layout-overfilled",
        "more common segments than fill the image",
        changed("stripes", to=[0, 1, 0, 0]),
        "layout.fill",
    )
    yield layout(
        "layout-outside-runs",
        "a marked segment that leaves the markable run",
        changed("runs", 0, 1, to=4096 + 2048),
        "layout.fill",
    )
    overlapping = [[begin, end - 64, "BF16"], [end - 128, end, "BF16"]]
    yield layout("layout-runs-overlap", "runs that overlap", changed("runs", to=overlapping), "layout.runs")
    yield layout(
        "layout-run-in-part", "a run that ends inside an element", changed("runs", 0, 1, to=end - 1), "layout.runs"
    )
    yield Vector(
        "bad-layout-run-in-header",
        "a run that begins before the first tensor, which only the custodian can tell",
        hooked(layout=changed("runs", 0, 0, to=begin - 64)),
        None,
        "layout.runs",
    )
    yield Vector(
        "bad-original-hash",
        "another SHA-256 of the original, which only the custodian can tell",
        hooked(index=changed("sha256", 0, to="00" * 32)),
        None,
        "file.sha256",
    )


def moved(layout: dict[str, Any], by: int) -> Callable[[Any], Any]:
    image, offset = layout["image"] + by, layout["files"][0]["offset"] + by
    runs = [[begin + by, end + by, name] for begin, end, name in layout["runs"]]
    return lambda value: {
        **value,
        "image": image,
        "files": [{**value["files"][0], "offset": offset}],
        "runs": runs,
    }


def broken_packs() -> Iterator[Vector]:
    def both(name: str, shows: str, written: Written, refusal: str) -> Vector:
        return Vector(f"bad-{name}", shows, written, refusal, refusal)

    sealed = 4096 + 16
    yield both("pack-missing", "no pack of common segments", stored("common", gone), "pack.missing")
    yield both("pack-truncated", "a pack without its last byte", stored("common", lambda data: data[:-1]), "pack.size")
    yield both("pack-trailer", "one bit of a trailer", stored("common", flipped(-1)), "pack.digest")
    first = 20  # the lowest byte of `first` in a trailer
    yield both(
        "pack-place",
        "a signed trailer with another first segment",
        hooked(trailer_common=flipped(first)),
        "pack.trailer",
    )
    yield both(
        "pack-suite",
        "a signed trailer with another suite",
        hooked(trailer_common=lambda data: data[:8] + b"\2" + data[9:]),
        "pack.trailer",
    )
    yield both(
        "pack-commitment",
        "a signed trailer that commits to another pack key",
        hooked(trailer_common=flipped(64)),
        "pack.commitment",
    )
    yield both("segment-altered", "one bit of a common segment", stored("common", flipped(sealed + 7)), "segment.hash")
    yield both(
        "segments-swapped", "two common segments swapped", stored("common", swapped_in_body(sealed)), "segment.hash"
    )
    yield both(
        "segments-swapped-signed",
        "two common segments swapped, with right hashes and signature",
        hooked(sealed_common=swapped),
        "segment.tag",
    )
    yield both(
        "variants-swapped", "variants A and B swapped", stored("marked", swapped_in_body(sealed)), "segment.hash"
    )
    yield both(
        "variants-swapped-signed",
        "variants A and B swapped, with right hashes and signature",
        hooked(sealed_marked=swapped),
        "segment.tag",
    )
    held = decoder.read_bundle(write(TINY).bundle).word[0]
    yield Vector(
        "bad-variant-not-held",
        "one bit of the variant that the holder does not read",
        stored("marked", flipped(sealed * (1 - held))),
        None,
        "segment.hash",
    )
    yield Vector(
        "bad-variant-definition",
        "A and B made the wrong way round, which only the custodian can tell",
        hooked(variants=lambda pair: (pair[1], pair[0])),
        None,
        "variant.definition",
    )


def broken_bundles() -> Iterator[Vector]:
    """The store is whole, and the custodian reads it."""
    good, other = write(TINY), write(OTHER_VERSION)
    parsed, donor = decoder.read_bundle(good.bundle), decoder.read_bundle(other.bundle)
    table = decoder.variant_table(bytes.fromhex(good.secrets["V"]), good.secrets["positions"])
    other_variant = [pair[1 - bit] for pair, bit in zip(table, parsed.word, strict=True)]

    def bundle(name: str, shows: str, written: Written, refusal: str) -> Vector:
        return Vector(f"bad-bundle-{name}", shows, written, refusal)

    def longer(data: bytes) -> bytes:
        return data[:-32] + b"\0" + hashlib.sha256(data[:-32] + b"\0").digest()

    yield bundle("truncated", "without its last byte", with_bundle(lambda data: data[:-1]), "bundle.checksum")
    yield bundle("altered", "one bit of a variant key", with_bundle(flipped(-33)), "bundle.checksum")
    yield bundle(
        "longer", "one byte more than the fields, and a right checksum", with_bundle(longer), "bundle.malformed"
    )
    yield bundle("format", "format 2", bundled(format=2), "bundle.format")
    yield bundle("suite", "suite 3", bundled(suite=3), "bundle.suite")
    digest = donor.anchor.manifest_digest
    yield bundle(
        "other-manifest", "names the manifest of another version", bundled(manifest_digest=digest), "manifest.other"
    )
    yield bundle("other-room", "names another room", bundled(room=OTHER_ROOM.identity.room_id), "manifest.mismatch")
    key = OTHER_ROOM.identity.signer.public_key().public_bytes_raw()
    yield bundle("other-signer", "has another room's public key", bundled(public_key=key), "manifest.signature")
    yield bundle(
        "other-common-key",
        "has the common key of another version",
        bundled(common_key=donor.common_key),
        "index.commitment",
    )
    yield bundle(
        "other-version-keys",
        "has the variant keys of another version",
        bundled(variant_keys=donor.variant_keys),
        "pack.commitment",
    )
    yield bundle(
        "other-variant-keys",
        "has the keys of the variants that its code word does not name",
        bundled(variant_keys=other_variant),
        "pack.commitment",
    )
    more = {"positions": 2, "word": [*parsed.word, 0], "variant_keys": [*parsed.variant_keys, bytes(32)]}
    yield bundle("positions", "has more positions than the manifest", bundled(**more), "manifest.mismatch")


# --- All --------------------------------------------------------------------------------------------------------------


def vectors() -> Iterator[Vector]:
    yield from valid()
    yield from broken_manifests()
    yield from broken_indexes()
    yield from broken_packs()
    yield from broken_bundles()
