"""An independent writer of the Strongroom container, format 1, written from spec/container.md alone.

All randomness comes from a seed, so that what it writes is the same byte for byte; never use it for real weights. With
the primitives of the decoder beside it, it shares no code with the implementation. `hooks` change one value at one
point of the work and let all that follows, the signature included, be made over the changed value: so a version can be
wrong at one place only.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from conformance import decoder as d
from conformance.decoder import COMMON, MARKED, VARIANT_A, canonical, commit, derive


def drawn(seed: str, label: str, count: int) -> bytes:
    """The bytes that the seed gives in the place of random ones."""
    return hashlib.shake_256(f"strongroom test vectors\0{seed}\0{label}".encode()).digest(count)


@dataclass(frozen=True)
class Identity:
    """What a version keeps when it is written again: all but V and the packs."""

    seed: str
    room: str = "room"

    @property
    def room_id(self) -> bytes:
        return drawn(self.room, "room", 16)

    @property
    def signer(self) -> Ed25519PrivateKey:
        return Ed25519PrivateKey.from_private_bytes(drawn(self.room, "signing key", 32))

    @property
    def version_id(self) -> bytes:
        return drawn(self.seed, "version", 16)

    @property
    def mark_root(self) -> bytes:
        return drawn(self.seed, "R", 32)


@dataclass(frozen=True)
class Version:
    """What is to be written, and how."""

    identity: Identity
    files: dict[str, bytes]
    suite: int = 1
    revision: int = 1
    share: tuple[int, int] = (1, 8)
    wanted: int = 16384
    geometry: tuple[int, int, list[int]] | None = None  # in the place of the writer's rule
    blocks: bool = True  # as writers do now; before, no block type was markable
    segments_a_pack: int = 1 << 20
    holder: str = "lab/ada"
    reference: str = "release 7"
    c0: int = 16
    hooks: dict[str, Callable[[Any], Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Written:
    """A version: objects of the store by name, the bundle of its holder, and all secrets.

    `held` has the files as the holder must read them.
    """

    store: dict[str, bytes]
    bundle: bytes
    secrets: dict[str, Any]
    layout: dict[str, Any]
    originals: dict[str, bytes]
    held: dict[str, bytes]


def write(version: Version) -> Written:
    identity, hash_of = version.identity, d.HASHES[version.suite]
    version_id, revision = identity.version_id, version.revision

    def hook(name: str, value: Any) -> Any:
        return version.hooks[name](value) if name in version.hooks else value

    # § 5: keys
    version_key = drawn(identity.seed, f"V of revision {revision}", 32)
    common_key = derive(version_key, "common")
    mark_key, code_key = derive(identity.mark_root, "mark"), derive(identity.mark_root, "code")

    # § 3, 4: image and layout
    image, layout = lay_out(version)
    cut, cut_files = d.read_layout(layout, hash_of), layout["files"]
    layout = hook("layout", layout)
    digest = hash_of(canonical(layout))

    def seal(key: bytes, nonce: bytes, plain: bytes, kind: int, number: int) -> bytes:
        bound = d.associated_data(version.suite, kind, version_id, revision, number, digest)
        return AESGCM(key).encrypt(nonce, plain, bound)

    # § 6, 7, 9: packs
    table = d.variant_table(version_key, cut.positions)
    segments = list(cut.segments())
    places = {number: begin for kind, number, begin, _ in segments if kind == MARKED}
    pairs: dict[int, tuple[bytes, bytes]] = {}
    store: dict[str, bytes] = {}
    pack_lists: dict[int, list[dict[str, Any]]] = {COMMON: [], MARKED: []}
    for kind, size in ((COMMON, cut.common), (MARKED, cut.marked)):
        of_kind = [segment for segment in segments if segment[0] == kind]
        for first in range(0, len(of_kind), version.segments_a_pack):
            taken = of_kind[first : first + version.segments_a_pack]
            identifier = drawn(identity.seed, f"pack {kind} {first} of revision {revision}", 32)
            pack_key = derive(common_key, "pack", identifier)
            sealed: list[bytes] = []
            for _, number, begin, count in taken:
                plain = image[begin : begin + count]
                if kind == COMMON:
                    sealed.append(seal(pack_key, number.to_bytes(12, "little"), plain, COMMON, number))
                else:
                    pieces = cut.pieces(begin, begin + count)
                    pair = pairs[number] = hook("variants", d.variants(plain, begin, pieces, mark_key, number))
                    nonce = identifier[:12]
                    sealed += [seal(table[number][v], nonce, pair[v], VARIANT_A + v, number) for v in (0, 1)]
            sealed = hook("sealed common" if kind == COMMON else "sealed marked", sealed)

            last = taken[-1][3]
            trailer = struct.pack(
                "<8sBBHIQII32s", b"SRPACK01", version.suite, kind, 0, len(taken), first, size, last, identifier
            )
            if kind == COMMON:
                trailer += commit(pack_key) + b"".join(map(hash_of, sealed))
            else:
                trailer += bytes(32)
                for k, (_, number, _, _) in enumerate(taken):
                    hashes = hash_of(sealed[2 * k]) + hash_of(sealed[2 * k + 1])
                    trailer += hashes + commit(table[number][0]) + commit(table[number][1])
            trailer = hook("trailer common" if kind == COMMON else "trailer marked", trailer)
            name = identifier.hex()
            store[f"packs/{name[:2]}/{name}"] = b"".join(sealed) + trailer
            pack_lists[kind].append({"id": name, "first": first, "count": len(taken), "digest": hash_of(trailer).hex()})

    # § 8: index
    inner = {
        "layout": layout,
        "sha256": [hashlib.sha256(version.files[path]).hexdigest() for path in ordered(version.files)],
        "report": {
            "share": list(version.share),
            "positions_wanted": version.wanted,
            "unmarked": unmarked(version.files),
        },
    }
    text = hook("index text", canonical(hook("index", inner)))
    plain = struct.pack("<Q", len(text)) + text
    plain = hook("index plaintext", plain + bytes(-len(plain) % 4096))
    salt = drawn(identity.seed, f"salt of revision {revision}", 32)
    b = d.box_key(common_key, salt, f"index {version_id.hex()} {revision}")
    head = b"SRBX\x01\0\0\0" + salt + commit(b)
    box = hook("box", head + AESGCM(b).encrypt(bytes(12), plain, head))
    name = f"versions/{version_id.hex()}/{revision}"
    store[f"{name}.index"] = box

    # § 10: manifest
    payload = {
        "format": 1,
        "suite": version.suite,
        "room": identity.room_id.hex(),
        "version": version_id.hex(),
        "revision": revision,
        "common": {
            "bytes": cut.image - cut.positions * cut.marked,
            "segment": cut.common,
            "packs": pack_lists[COMMON],
        },
        "marked": {"positions": cut.positions, "segment": cut.marked, "packs": pack_lists[MARKED]},
        "index": {"bytes": len(box), "digest": hash_of(box).hex()},
    }
    payload_bytes = hook("payload text", canonical(hook("payload", payload)))
    store[f"{name}.manifest"] = hook("envelope", envelope(payload_bytes, identity.signer))

    # § 11: bundle
    public_key = identity.signer.public_key().public_bytes_raw()
    word = d.code_word(code_key, version.holder, cut.positions, version.c0)
    fields: dict[str, Any] = hook(
        "bundle",
        {
            "format": 1,
            "suite": version.suite,
            "room": identity.room_id,
            "version": version_id,
            "revision": revision,
            "positions": cut.positions,
            "manifest_digest": hashlib.sha256(payload_bytes).digest(),
            "public_key": public_key,
            "common_key": common_key,
            "holder": version.holder.encode(),
            "reference": version.reference.encode(),
            "word": word,
            "variant_keys": [pair[bit] for pair, bit in zip(table, word, strict=True)],
        },
    )
    secrets = {
        "suite": version.suite,
        "room": identity.room_id.hex(),
        "version": version_id.hex(),
        "revision": revision,
        "positions": cut.positions,
        "manifest_digest": hashlib.sha256(payload_bytes).hexdigest(),
        "public_key": public_key.hex(),
        "signing_key": identity.signer.private_bytes_raw().hex(),
        "V": version_key.hex(),
        "R": identity.mark_root.hex(),
        "c0": version.c0,
    }
    for number, pair in pairs.items():
        image = image[: places[number]] + pair[word[number]] + image[places[number] + cut.marked :]
    held = {entry["path"]: image[entry["offset"] :][: entry["bytes"]] for entry in cut_files}
    return Written(store, bundle(fields), secrets, layout, version.files, held)


def envelope(payload: bytes, signer: Ed25519PrivateKey) -> bytes:
    kind = d.MANIFEST_TYPE
    signed = f"DSSEv1 {len(kind)} {kind} {len(payload)} ".encode() + payload
    keyid = hashlib.sha256(signer.public_key().public_bytes_raw()).hexdigest()
    return canonical(
        {
            "payload": base64.b64encode(payload).decode(),
            "payloadType": kind,
            "signatures": [{"keyid": keyid, "sig": base64.b64encode(signer.sign(signed)).decode()}],
        }
    )


def bundle(fields: dict[str, Any]) -> bytes:
    data: bytes = b"SRKB" + struct.pack("<BB", fields["format"], fields["suite"])
    data += struct.pack("<HHH", len(fields["holder"]), len(fields["reference"]), 0)
    data += fields["room"] + fields["version"] + struct.pack("<II", fields["revision"], fields["positions"])
    data += fields["manifest_digest"] + fields["public_key"] + fields["common_key"]
    data += fields["holder"] + fields["reference"] + d.pack_word(fields["word"]) + b"".join(fields["variant_keys"])
    return data + hashlib.sha256(data).digest()


# --- § 3, 4: image ----------------------------------------------------------------------------------------------------


def ordered(files: dict[str, bytes]) -> list[str]:
    return sorted(files, key=str.encode)


def kind_of(path: str) -> str:
    suffix = path.rpartition(".")[2]
    return suffix if suffix in {"safetensors", "gguf"} else "opaque"


def lay_out(version: Version) -> tuple[bytes, dict[str, Any]]:
    image = b""
    entries: list[dict[str, Any]] = []
    runs: list[d.Run] = []
    for path in ordered(version.files):
        data, kind = version.files[path], kind_of(path)
        data_start, tensors = d.TENSORS[kind](data)
        while (len(image) + data_start) % 64:
            image += b"\0"
        base = len(image) + data_start
        entry = {"path": path, "kind": kind, "offset": len(image), "bytes": len(data), "data_start": data_start}
        entries.append(entry)
        image += data
        for name, dimensions, begin, end in sorted(tensors, key=lambda tensor: tensor[2]):
            known = name in d.TYPES or (name in d.BLOCKS and version.blocks)
            if known and dimensions >= 2 and (base + begin) % d.unit(name)[1] == 0 and begin < end:
                runs.append((base + begin, base + end, name))
    joined: list[d.Run] = []
    for run in runs:
        if joined and joined[-1][1:] == (run[0], run[2]):
            joined[-1] = (joined[-1][0], run[1], run[2])
        else:
            joined.append(run)
    common, marked, stripes = version.geometry or d.writer_geometry(len(image), joined, version.share, version.wanted)
    layout = {
        "format": 2 if any(name in d.BLOCKS for _, _, name in joined) else 1,
        "image": len(image),
        "files": entries,
        "runs": [list(run) for run in joined],
        "common": common,
        "marked": marked,
        "stripes": stripes,
    }
    return image, layout


def unmarked(files: dict[str, bytes]) -> dict[str, int]:
    flat = 0
    for path, data in files.items():
        flat += sum(end - begin for _, dims, begin, end in d.TENSORS[kind_of(path)](data)[1] if dims < 2)
    return {"one-dimensional": flat} if flat else {}


# --- Model files ------------------------------------------------------------------------------------------------------


def safetensors_file(tensors: dict[str, tuple[str, list[int], bytes]], header_multiple: int = 8) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    body = b""
    for name, (kind, shape, data) in tensors.items():
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [len(body), len(body) + len(data)]}
        body += data
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % header_multiple)
    return struct.pack("<Q", len(text)) + text + body


def gguf_file(tensors: dict[str, tuple[int, list[int], bytes]], alignment: int = 32) -> bytes:
    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value.encode())) + value.encode()

    pairs = {
        "general.architecture": struct.pack("<I", 8) + text("llama"),
        "general.alignment": struct.pack("<II", 4, alignment),
        "tokenizer.ggml.tokens": struct.pack("<IIQ", 9, 8, 3) + text("a") + text("é") + text(""),
    }
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(pairs))
    head += b"".join(text(name) + value for name, value in pairs.items())
    body = b""
    for name, (kind, shape, data) in tensors.items():
        head += text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, len(body))
        body += data + bytes(-len(data) % alignment)
    return head + bytes(-len(head) % alignment) + body


def weights(kind: str, shape: list[int], seed: str) -> bytes:
    """Ordinary weights: normal numbers of magnitude 2^-8 to 1, of either sign."""
    size, _, low, _ = d.TYPES[kind]
    mantissa = low.bit_length() - 1  # the smallest normal magnitude is one in the exponent's place
    bias = (1 << 8 * size - 2 - mantissa) - 1
    raw = drawn(seed, f"{kind} weights", size * math.prod(shape))
    found = bytearray()
    for at in range(0, len(raw), size):
        value = int.from_bytes(raw[at : at + size], "little")
        exponent = bias - 1 - (value >> mantissa) % 8
        sign = value >> 8 * size - 1
        found += (sign << 8 * size - 1 | exponent << mantissa | value & low - 1).to_bytes(size, "little")
    return bytes(found)
