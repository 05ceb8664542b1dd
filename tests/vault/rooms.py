"""Small models, and rooms that hold them: what the tests of this folder attack."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from strongroom.client import Room
from strongroom.crypto.keys import random_key
from strongroom.formats.entry import Entry
from strongroom.ledger.log import Draft
from strongroom.storage.blobs import Blobs
from strongroom.storage.reader import ImageReader
from strongroom.vault.record import VersionRecord
from strongroom.vault.search import search
from strongroom.vault.source import ModelSource
from strongroom.vault.vault import PutResult, Vault

OWNER = "user/ana"
NAME = "acme/tiny"
REF = f"{NAME}@1"

Tensors = Mapping[str, tuple[str, tuple[int, ...]]]
_ITEM = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8, "I8": 1}

FIRST: Tensors = {
    "model.embed_tokens.weight": ("BF16", (128, 320)),
    "model.layers.0.mlp.up_proj.weight": ("F32", (96, 128)),
    "model.layers.0.input_layernorm.weight": ("F32", (128,)),
}
SECOND: Tensors = {
    "model.layers.1.mlp.up_proj.weight": ("F16", (96, 128)),
    "lm_head.weight": ("BF16", (200, 128)),
    "model.layers.1.mask": ("I8", (3, 101)),
}


def safetensors_file(path: Path, tensors: Tensors, seed: int, *, header_bytes: int = 0) -> None:
    """A safetensors file of random weights (finite, of the size that weights have); its header padded with spaces."""
    rng = np.random.default_rng(seed)
    header: dict[str, object] = {}
    parts: list[bytes] = []
    at = 0
    for name, (dtype, shape) in tensors.items():
        data = _weights(rng, dtype, int(np.prod(shape)))
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + len(data)]}
        parts.append(data)
        at += len(data)
    text = json.dumps(header).encode()
    text += b" " * (max(header_bytes - len(text), 0) + -max(len(text), header_bytes) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(parts))


def _weights(rng: np.random.Generator, dtype: str, count: int) -> bytes:
    values = rng.normal(0, 0.05, count)
    match dtype:
        case "BF16":
            return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16).tobytes()
        case "F16":
            return values.astype(np.float16).tobytes()
        case "F32":
            return values.astype(np.float32).tobytes()
        case "F64":
            return values.tobytes()
        case _:
            return rng.integers(0, 256, count * _ITEM[dtype], dtype=np.uint8).tobytes()


def write_model(folder: Path, seed: int = 0) -> Path:
    """A sharded model of about 230 KB: two safetensors files with their index, a configuration, an empty file."""
    folder.mkdir()
    shards = {"model-00001-of-00002.safetensors": FIRST, "model-00002-of-00002.safetensors": SECOND}
    for number, (name, tensors) in enumerate(shards.items()):
        safetensors_file(folder / name, tensors, 2 * seed + number)
    owners = {tensor: name for name, tensors in shards.items() for tensor in tensors}
    index = {"metadata": {}, "weight_map": owners}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps({"architectures": ["TinyForCausalLM"], "seed": seed}))
    (folder / "added_tokens.json").write_bytes(b"")
    return folder


class House:
    """A room on disk, opened as its owner, whose store can be tampered with."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store = folder / "store"
        self.vault = Vault(folder)

    @classmethod
    def build(cls, folder: Path, **options: str) -> House:
        vault, _ = Vault.init(folder, owner=OWNER, custody="solo", **options)
        vault.close()
        return cls(folder)

    def search(self, path: Path):
        """What is found out about the file at `path` among all weights of the room, as its owner."""
        return search(self.vault, path, by=OWNER, weights=None, progress=lambda _d, _t: None)

    def register(self, path: str) -> None:
        """A principal of that path, without a key or a role: somebody whose bundle is looked at."""
        body = {
            "principal": path,
            "key": "",
            "person": path,
            "roles": [],
            "teams": [],
            "state": "active",
            "statement": "",
        }
        self.vault.custodian.ledger.append(lambda _, __, now: Draft(Entry("principal", now, OWNER, path, body)))

    def close(self) -> None:
        self.vault.close()
        self.vault.blobs.close()

    def put(self, source: Path, name: str = NAME, *, known: bool = False, **options: object) -> PutResult:
        """`known`: marks, code words and stamps are those of the name, the same in every run; else they are random.
        What a search finds through noise then depends on chance no more than the product does."""
        options = {"share": "1/2", **options}
        with pytest.MonkeyPatch.context() as patch:
            if known:
                root = hashlib.sha256(name.encode()).digest()
                patch.setattr(VersionRecord, "fresh", lambda version: VersionRecord(version, 1, random_key(), root))
            return self.vault.put(ModelSource.scan(source), name, by=OWNER, **options)

    def reader(
        self, ref: str = REF, holder: str = OWNER, *, blobs: Blobs | None = None, workers: int = 2
    ) -> ImageReader:
        return ImageReader(blobs or self.vault.blobs, self.vault.bundle(ref, holder), workers=workers)

    def read(self, ref: str = REF, holder: str = OWNER) -> bytes:
        return bytes(self.reader(ref, holder).read_all())

    def objects(self) -> dict[str, bytes]:
        return {name: (self.store / name).read_bytes() for name, _ in self.vault.blobs.list()}

    @contextmanager
    def altered(self, name: str, data: bytes | None) -> Iterator[None]:
        """The object `name` holds `data` (None: is gone) for the length of the block."""
        path = self.store / name
        before = path.read_bytes()
        path.unlink()
        if data is not None:
            path.write_bytes(data)
        try:
            yield
        finally:
            path.write_bytes(before)

    @contextmanager
    def flipped(self, name: str, byte: int, bit: int) -> Iterator[None]:
        """One bit of the object is the other way round for the length of the block; in the very same file."""
        descriptor = os.open(self.store / name, os.O_RDWR)
        try:
            (before,) = os.pread(descriptor, 1, byte)
            os.pwrite(descriptor, bytes([before ^ 1 << bit]), byte)
            try:
                yield
            finally:
                os.pwrite(descriptor, bytes([before]), byte)
        finally:
            os.close(descriptor)

    def sql(self, statement: str, *values: object) -> list[tuple[object, ...]]:
        """Whoever can write to the database, but has no key, does this."""
        with sqlite3.connect(self.folder / "room.db", isolation_level=None) as connection:
            found = connection.execute(statement, values).fetchall()
        connection.close()
        return found


def recorded(house: House) -> None:
    """The log holds together, as it was published and as it is; and of every version it says what the database says,
    of no fewer and of no others."""
    with Room(house.folder, OWNER) as room:
        report = room.log.verify()
    with house.vault.custodian.ledger.view() as state:
        logged = {
            ref: (each.version, each.revision, each.manifest, each.shredded) for ref, each in state.versions.items()
        }
    rows = house.sql("SELECT name, number, version_id, revision, manifest_sha256, state FROM versions")
    assert logged == {
        f"{name}@{number}": (version, revision, manifest, state == "shredded")
        for name, number, version, revision, manifest, state in rows
    }
    assert (
        [(report["size"],)] == house.sql("SELECT size FROM log_state") == house.sql("SELECT count(*) FROM log_entries")
    )


def clone(house: House, folder: Path) -> House:
    """A copy of a room and everything in it; the original is closed while it is made."""
    house.close()
    shutil.copytree(house.folder, folder)
    return House(folder)


def original(house: House, ref: str, source: Path) -> bytes:
    """The image of the files that were put, byte for byte, as the layout says they lie."""
    layout = house.reader(ref).layout
    image = bytearray(layout.image)
    for entry in layout.files:
        image[entry.offset : entry.end] = (source / entry.path).read_bytes()
    return bytes(image)
