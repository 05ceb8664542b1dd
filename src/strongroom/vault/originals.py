"""A version as only the custodian can read it: the unmarked weights, and what a holder was given of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from strongroom.crypto.segments import VersionKeys
from strongroom.formats import gguf, safetensors
from strongroom.formats.bundle import KeyBundle
from strongroom.formats.layout import FileEntry
from strongroom.formats.manifest import Manifest
from strongroom.formats.tensors import TensorInfo
from strongroom.marking.mark import Marker
from strongroom.storage.blobs import Blobs
from strongroom.storage.image import SealedImage
from strongroom.storage.reader import ImageReader
from strongroom.vault.record import VersionRecord


class Placed(NamedTuple):
    """A tensor, the bytes of the image that hold it, and whether its elements carry marks (container.md, section 3)."""

    info: TensorInfo
    begin: int
    end: int
    marked: bool


class Originals:
    """The unmarked image of one version, any range of it: the midpoint of both variants, which is exact. Thread-safe.

    Reading raises what `ImageReader` raises.
    """

    def __init__(self, blobs: Blobs, record: VersionRecord, manifest: Manifest, signer: bytes) -> None:
        self._keys = VersionKeys.of(record.version_key, manifest.positions)
        size = -(-manifest.positions // 8)
        rest = manifest.positions % 8
        last = (1 << rest) - 1 if rest else 0xFF
        ones = b"\xff" * (size - 1) + bytes([last]) if size else b""
        bundles = [self._bundle(record, manifest, signer, word) for word in (bytes(size), ones)]
        self._reader = ImageReader(blobs, bundles[0])
        self._b = bundles[1]
        self._sealed = SealedImage.open(blobs, bundles[1])
        self.layout = self._reader.layout
        self.marker = Marker(record.mark_key, self.layout)

    def _bundle(self, record: VersionRecord, manifest: Manifest, signer: bytes, word: bytes) -> KeyBundle:
        """What opens the variants that `word` names; it is nobody's."""
        return KeyBundle(
            suite=manifest.suite,
            room=manifest.room,
            version=manifest.version,
            revision=manifest.revision,
            manifest_digest=manifest.digest(),
            signer=signer,
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
        scratch = self._sealed.scratch()
        both = [memoryview(bytearray(count * self.layout.marked)) for _ in (0, 1)]
        for bundle, out in zip((self._reader.bundle, self._b), both, strict=True):
            self._sealed.read_stripe(position, bundle, out, scratch)
        return self.marker.original(position, *both)

    def tensors(self) -> Iterator[Placed]:
        """The tensors of all weights files, in the order of the image."""
        for file in self.layout.files:
            if file.kind != "opaque":
                for info in self._infos(file):
                    marked = info.unmarked_reason(file.data_start) is None and info.elements > 0
                    yield Placed(info, file.offset + info.begin, file.offset + info.end, marked)

    def _infos(self, file: FileEntry) -> list[TensorInfo]:
        def read(offset: int, size: int) -> bytes:
            return bytes(self.read(file.offset + offset, min(file.offset + offset + size, file.end)))

        if file.kind == "safetensors":
            return list(safetensors.parse_header(read(0, file.data_start), file.bytes).tensors.values())
        return list(gguf.parse_header(read, file.bytes).tensors.values())
