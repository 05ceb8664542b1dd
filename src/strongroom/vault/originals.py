"""A version as only the custodian can read it: the unmarked weights, and what a holder was given of them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from strongroom.crypto.segments import VersionKeys
from strongroom.formats import gguf, safetensors
from strongroom.formats.bundle import KeyBundle
from strongroom.formats.layout import FileEntry, Segment
from strongroom.formats.tensors import TensorInfo
from strongroom.marking.mark import Marker
from strongroom.marking.stamp import LEAST_ELEMENTS
from strongroom.storage.image import SealedImage
from strongroom.storage.reader import ImageReader
from strongroom.vault.record import VersionRecord

_CONFIG = 1 << 20  # bytes: no config.json is larger
# What multiplies the last hidden state into logits, by the names that the usual libraries give it; and what does so too
# where a language model has no such tensor: its embedding, whose last tensor of output.* is a norm in GGUF.
_OUTPUT = re.compile(r"(?:.*\.)?(?:lm_head|embed_out)\.weight|output\.weight")
_EMBEDDING = re.compile(r"(?:.*\.)?(?:embed_tokens|wte|word_embeddings|token_embd|shared)\.weight")
_GGUF_NORM = "output_norm.weight"
_LANGUAGE_MODELS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")


class Placed(NamedTuple):
    """A tensor, the bytes of the image that hold it, whether its elements carry marks (container.md, section 3), and
    whether copies have a stamp in it (mark.md, section 2)."""

    info: TensorInfo
    begin: int
    end: int
    marked: bool
    stamped: bool


class Originals:
    """The unmarked image of one version, any range of it: the midpoint of both variants, which is exact. Thread-safe.

    `image` is the custodian's own. Reading raises what `ImageReader` raises.
    """

    def __init__(self, image: SealedImage, record: VersionRecord) -> None:
        self._sealed, self._keys = image, VersionKeys.of(record.version_key, image.manifest.positions)
        a, self._b = (self._bundle(record, variant) for variant in (0, 1))
        self._reader = ImageReader(image.blobs, a, sealed=image)
        self.layout = image.layout
        self.marker = Marker(record.mark_key, self.layout)

    def _bundle(self, record: VersionRecord, variant: int) -> KeyBundle:
        """What opens the same variant everywhere; it is nobody's."""
        manifest = self._sealed.manifest
        bits = np.full(manifest.positions, variant, np.uint8)
        word = np.packbits(bits, bitorder="little").tobytes()
        return KeyBundle(
            suite=manifest.suite,
            room=manifest.room,
            version=manifest.version,
            revision=manifest.revision,
            manifest_digest=manifest.digest(),
            signer=b"",
            holder="",
            ref=f"{record.name}@{record.number}",
            common_key=self._keys.common,
            word=word,
            variant_keys=self._keys.chosen(word),
        )

    def read(self, begin: int, end: int) -> memoryview:
        """The unmarked bytes `begin` to `end` of the image, in fresh memory."""
        original, _, low = self._whole(begin, end)
        return original[begin - low : end - low]

    def read_given(self, begin: int, end: int, word: bytes) -> tuple[memoryview, memoryview]:
        """The unmarked bytes, and the same as the holder of `word` was given them (layer 1)."""
        original, given, low = self._whole(begin, end, word)
        return original[begin - low : end - low], given[begin - low : end - low]

    def _whole(self, begin: int, end: int, word: bytes | None = None) -> tuple[memoryview, memoryview, int]:
        """Both, and where they begin: from the first common segment that is touched on."""
        layout = self.layout
        first, stop = layout.stripes_touched(begin, end)
        if first >= stop:
            return memoryview(b""), memoryview(b""), begin
        low = int(layout.common_starts[first])
        high = layout.common_segment(stop - 1).end + layout.stripes[stop - 1] * layout.marked
        given = self._reader.read(low, high)
        original = memoryview(bytearray(given)) if word is not None else given
        scratch = self._sealed.scratch()
        for number in range(first, stop):
            count = layout.stripes[number]
            if not count:
                continue
            at, position = layout.common_segment(number).end - low, int(layout.first_positions[number])
            size = count * layout.marked
            b = memoryview(bytearray(size))
            self._sealed.read_stripe(position, self._b, b, scratch)
            original[at : at + size] = self.marker.original(position, given[at : at + size], b)
            for k in range(count) if word is not None else ():
                if word is not None and word[(position + k) >> 3] >> ((position + k) & 7) & 1:
                    piece = slice(at + k * layout.marked, at + (k + 1) * layout.marked)
                    given[piece] = b[k * layout.marked : (k + 1) * layout.marked]
        return original, given, low

    def marked(self, number: int) -> memoryview:
        """The unmarked bytes of the marked segments behind common segment `number`, and of nothing else."""
        position, count = int(self.layout.first_positions[number]), self.layout.stripes[number]
        if not count:
            return memoryview(b"")
        scratch = self._sealed.scratch()
        both = [memoryview(bytearray(count * self.layout.marked)) for _ in (0, 1)]
        for bundle, out in zip((self._reader.bundle, self._b), both, strict=True):
            self._sealed.read_stripe(position, bundle, out, scratch)
        return self.marker.original(position, *both)

    def segments(self) -> Iterator[tuple[Segment, memoryview]]:
        """Every segment with its unmarked bytes, in the order of the image, as it is read."""
        scratch = self._sealed.scratch()
        for number in range(len(self.layout.stripes)):
            segment = self.layout.common_segment(number)
            plain = memoryview(bytearray(segment.bytes))
            self._sealed.read_common(number, plain, scratch)
            yield segment, plain
            stripe, size = self.marked(number), self.layout.marked
            for k, marked in enumerate(self.layout.stripe(number)):
                yield marked, stripe[k * size : (k + 1) * size]

    def tensors(self) -> Iterator[Placed]:
        """The tensors of all weights files, in the order of the image."""
        for file in self.layout.files:
            if file.kind != "opaque":
                for info in self._infos(file):
                    begin, end = file.offset + info.begin, file.offset + info.end
                    # By what was marked then, which may be less than what this release marks.
                    marked = self.layout.markable(begin, end)
                    stamped = marked and info.elements >= LEAST_ELEMENTS and info.name not in self._spared
                    yield Placed(info, begin, end, marked, stamped)

    @cached_property
    def _spared(self) -> frozenset[str]:
        """The tensors that give a language model's logits: a stamp there would go into them unsmoothed, and cost as
        much quality as all the others together."""
        names = [info.name for file in self.layout.files if file.kind != "opaque" for info in self._infos(file)]
        found = [name for name in names if _OUTPUT.fullmatch(name)]
        if not found and (_GGUF_NORM in names or self._language_model()):
            found = [name for name in names if _EMBEDDING.fullmatch(name)]
        return frozenset(found)

    def _language_model(self) -> bool:
        architectures = self.config().get("architectures")
        return isinstance(architectures, Sequence) and any(
            str(each).endswith(_LANGUAGE_MODELS) for each in architectures
        )

    def config(self) -> dict[str, Any]:
        """The version's config.json, if it has one that can be read; else nothing."""
        for file in self.layout.files:
            if file.kind == "opaque" and file.path.rpartition("/")[2] == "config.json" and file.bytes <= _CONFIG:
                try:
                    value = json.loads(bytes(self.read(file.offset, file.end)))
                except (ValueError, RecursionError):
                    continue
                if isinstance(value, dict):
                    return value
        return {}

    def _infos(self, file: FileEntry) -> list[TensorInfo]:
        def read(offset: int, size: int) -> bytes:
            return bytes(self.read(file.offset + offset, min(file.offset + offset + size, file.end)))

        if file.kind == "safetensors":
            return list(safetensors.parse_header(read(0, file.data_start), file.bytes).tensors.values())
        return list(gguf.parse_header(read, file.bytes).tensors.values())
