"""A version as only the custodian can read it: the unmarked weights, and what a holder was given of them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from strongroom.crypto.segments import VersionKeys
from strongroom.formats import gguf, safetensors
from strongroom.formats.bundle import KeyBundle
from strongroom.formats.layout import FileEntry, Segment
from strongroom.formats.tensors import TensorInfo
from strongroom.marking.mark import Marker
from strongroom.marking.stamp import large_enough
from strongroom.storage.image import SealedImage
from strongroom.vault.record import VersionRecord

_CONFIG = 1 << 20  # bytes: no config.json is larger
# A copy's stamp spares the tensor that gives a language model's logits (mark.md, section 2). By the names that the
# usual libraries give it that is `_OUTPUT`, which multiplies the last hidden state. A model without one uses its
# embedding for that, too: `_EMBEDDING`. That it is a language model is known by its config.json or, of a GGUF file, by
# `_GGUF_NORM`.
_OUTPUT = re.compile(r"(?:.*\.)?(?:lm_head|embed_out)\.weight|output\.weight")
_EMBEDDING = re.compile(r"(?:.*\.)?(?:embed_tokens|wte|word_embeddings|token_embd|shared)\.weight")
_TEXT_CONFIGS = ("text_config", "llm_config", "language_config")  # of the language part of a model of several
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

    `image` is the custodian's own. Reading raises what `SealedImage` raises.
    """

    def __init__(self, image: SealedImage, record: VersionRecord) -> None:
        self._sealed, self._keys = image, VersionKeys.of(record.version_key, image.manifest.positions)
        self._a, self._b = (self._bundle(record, variant) for variant in (0, 1))
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
        out = memoryview(bytearray(end - begin))
        for _, there, original in self.read_given(begin, end, None, out):
            if there is not original:
                there[:] = original
        return out

    def read_given(
        self, begin: int, end: int, word: bytes | None, out: memoryview
    ) -> Iterator[tuple[int, memoryview, memoryview]]:
        """Bytes `begin` to `end` of the image, into `out`, as the holder of `word` was given them (layer 1); without a
        word `out` stays as it is where there are marked segments.

        Yields, as they are read, where a stretch begins in the image, its place in `out`, and its unmarked bytes, which
        are the same memory where no mark is."""
        layout, scratch = self.layout, self._sealed.scratch()
        for number in range(*layout.stripes_touched(begin, end)):
            segment = layout.common_segment(number)
            low, high = max(begin, segment.start), min(end, segment.end)
            if low < high:
                there = out[low - begin : high - begin]
                if high - low == segment.bytes:
                    self._sealed.read_common(number, there, scratch)
                else:
                    whole = memoryview(bytearray(segment.bytes))
                    self._sealed.read_common(number, whole, scratch)
                    there[:] = whole[low - segment.start : high - segment.start]
                yield low, there, there
            size, start = layout.stripes[number] * layout.marked, segment.end
            low, high = max(begin, start), min(end, start + size)
            if low < high:
                a, b = self._variants(number, scratch)
                position, there = int(layout.first_positions[number]), out[low - begin : high - begin]
                if word is not None:
                    there[:] = self._chosen(position, word, a, b)[low - start : high - start]
                yield low, there, self.marker.original(position, a, b)[low - start : high - start]

    def _variants(self, number: int, scratch: memoryview) -> tuple[memoryview, memoryview]:
        """Variants A and B of the marked segments behind common segment `number`."""
        size = self.layout.stripes[number] * self.layout.marked
        a, b = (memoryview(bytearray(size)) for _ in range(2))
        self._sealed.read_stripe(int(self.layout.first_positions[number]), [(self._a, a), (self._b, b)], scratch)
        return a, b

    def _chosen(self, first: int, word: bytes, a: memoryview, b: memoryview) -> memoryview:
        """Of the marked segments from position `first` the variants that `word` names."""
        count = len(a) // self.layout.marked
        bits = np.unpackbits(np.frombuffer(word, np.uint8), bitorder="little")[first : first + count]
        zero, one = (np.frombuffer(each, np.uint64).reshape(count, -1) for each in (a, b))  # multiples of 64 bytes
        return np.where(bits[:, None] == 1, one, zero).reshape(-1).view(np.uint8).data

    def marked(self, number: int) -> memoryview:
        """The unmarked bytes of the marked segments behind common segment `number`, and of nothing else; out of one
        variant where that is enough, so not a check of both."""
        if not self.layout.stripes[number]:
            return memoryview(b"")
        first, scratch = int(self.layout.first_positions[number]), self._sealed.scratch()
        a = memoryview(bytearray(self.layout.stripes[number] * self.layout.marked))
        self._sealed.read_stripe(first, [(self._a, a)], scratch)
        found = self.marker.unmarked(first, a)  # half the work of reading both
        return found if found is not None else self.marker.original(first, *self._variants(number, scratch))

    def segments(self) -> Iterator[tuple[Segment, memoryview]]:
        """Every segment with its unmarked bytes, in the order of the image, as it is read, both variants of each."""
        scratch = self._sealed.scratch()
        for number in range(len(self.layout.stripes)):
            segment = self.layout.common_segment(number)
            plain = memoryview(bytearray(segment.bytes))
            self._sealed.read_common(number, plain, scratch)
            yield segment, plain
            if not self.layout.stripes[number]:
                continue
            first, size = int(self.layout.first_positions[number]), self.layout.marked
            stripe = self.marker.original(first, *self._variants(number, scratch))
            for k, marked in enumerate(self.layout.stripe(number)):
                yield marked, stripe[k * size : (k + 1) * size]

    def tensors(self) -> Iterator[Placed]:
        """The tensors of all weights files, in the order of the image."""
        for file, info in self._listed:
            begin, end = file.offset + info.begin, file.offset + info.end
            # By what was marked then, which may be less than what this release marks.
            marked = self.layout.markable(begin, end)
            stamped = marked and large_enough(info.name, info.elements) and info.name not in self.spared
            yield Placed(info, begin, end, marked, stamped)

    @cached_property
    def carries_marks(self) -> bool:
        """Whether anything that leaves of it has a mark: code words, which take positions, or stamps."""
        return self.layout.positions > 0 or any(each.stamped for each in self.tensors())

    def header(self, file: FileEntry) -> gguf.GgufHeader:
        """The header of a GGUF file."""
        return gguf.parse_header(self._reading(file), file.bytes)

    @cached_property
    def _listed(self) -> tuple[tuple[FileEntry, TensorInfo], ...]:
        return tuple((file, info) for file in self.layout.files if file.kind != "opaque" for info in self._infos(file))

    @cached_property
    def spared(self) -> frozenset[str]:
        """The tensors that give a language model's logits: a stamp there would go into them unsmoothed, and cost as
        much quality as all the others together."""
        names = [info.name for _, info in self._listed]
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

    def logits(self) -> tuple[int, int]:
        """How many tokens a language model knows, and the size of the hidden state that gives their logits: as its
        config.json says, else as the tensor that makes logits of it is shaped; 0 for what neither says."""
        config = self.config()
        nested = [value for name in _TEXT_CONFIGS if isinstance(value := config.get(name), dict)]
        rows = sorted(info.shape for _, info in self._listed if _is_output(info))
        shape = rows[-1] if rows else (0, 0)

        def said(name: str, otherwise: int) -> int:
            found = [value for each in (config, *nested) if type(value := each.get(name)) is int and value > 0]
            return found[0] if found else otherwise

        return said("vocab_size", shape[0]), said("hidden_size", shape[1])

    def _infos(self, file: FileEntry) -> list[TensorInfo]:
        if file.kind == "safetensors":
            head = self._reading(file)(0, file.data_start)
            return list(safetensors.parse_header(head, file.bytes).tensors.values())
        return list(self.header(file).tensors.values())

    def _reading(self, file: FileEntry) -> Callable[[int, int], bytes]:
        return lambda at, size: bytes(self.read(file.offset + at, min(file.offset + at + size, file.end)))


def _is_output(info: TensorInfo) -> bool:
    return len(info.shape) == 2 and bool(_OUTPUT.fullmatch(info.name) or _EMBEDDING.fullmatch(info.name))
