"""The tensors of one version, by name."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from strongroom.core.limits import MIB
from strongroom.errors import NotFound, UsageError
from strongroom.formats import gguf, safetensors
from strongroom.formats.layout import FileEntry
from strongroom.formats.tensors import TensorInfo
from strongroom.load.arrays import torch_view, view
from strongroom.storage.reader import ImageReader, anonymous

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    import torch as t  # `torch` is a method below
    from typing_extensions import Buffer

_HEADERS_AT_ONCE = 8
_MAPPED = 8 * MIB
_GROUP = 128 * MIB  # read in one go by `stream`


class MissingTensor(NotFound, KeyError):
    """A name that no tensor of the version has; a KeyError too, as of any mapping."""


class Entry(NamedTuple):
    """A tensor, the file that it is in, and where it begins in the image."""

    info: TensorInfo
    file: FileEntry
    begin: int

    @property
    def end(self) -> int:
        return self.begin + self.info.size


class _Header(NamedTuple):
    file: FileEntry
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, Any]


class Weights(Mapping[str, NDArray[Any]]):
    """All tensors of the safetensors and GGUF files of one version, or of the files in `only`.

    ``weights[name]`` reads one tensor into fresh memory, `read` all of them at once. A name that tensors of two files
    have is qualified for both, as ``path:name``. bf16 and float8 arrays have the dtypes of `ml_dtypes`; quantised GGUF
    tensors, FP4 and FP6 are uint8, one row of bytes for each row of elements (`dtype` and `shape` say what they are).

    Arrays and buffers stay the caller's after `close`; every other access then raises UsageError ``weights.closed``.
    Reading raises what `ImageReader` raises: IntegrityError, CannotVerify, BackendError.
    """

    def __init__(self, reader: ImageReader, *, only: Sequence[str] | None = None) -> None:
        self._reader: ImageReader | None = reader
        self.only = None if only is None else tuple(only)
        self._headers: tuple[_Header, ...] | None = None
        self._entries: dict[str, Entry] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the reader and its keys."""
        self._reader = None

    @property
    def reader(self) -> ImageReader:
        if self._reader is None:
            raise UsageError("weights.closed", "these weights were closed", hint="open them again: room.load(ref)")
        return self._reader

    # -- one tensor ----------------------------------------------------------------------------------------------

    def __getitem__(self, name: str) -> NDArray[Any]:
        entry = self.entry(name)
        return view(entry.info, self.read_bytes(entry.begin, entry.end))

    def __iter__(self) -> Iterator[str]:
        """Names in the order of files and of the bytes in them."""
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    # A mapping's own would read all tensors of both to compare them.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape that the file gives the tensor, row-major; that of packed elements is not their array's."""
        return self.entry(name).info.shape

    def dtype(self, name: str) -> str:
        """The element type under its safetensors name (``BF16``), or the name of ggml's block type (``Q4_K``)."""
        return self.entry(name).info.dtype.name

    def metadata(self) -> dict[str, Any]:
        """What the files' headers say besides tensors: texts from safetensors, values of many types from GGUF.

        A key for which two files have different values is qualified as ``path:key``.
        """
        differing: set[str] = set()
        merged: dict[str, Any] = {}
        for header in self.headers:
            for key, value in header.metadata.items():
                if merged.setdefault(key, value) != value:
                    differing.add(key)
        for header in self.headers if differing else ():
            for key in differing & set(header.metadata):
                merged.pop(key, None)
                merged[f"{header.file.path}:{key}"] = header.metadata[key]
        return merged

    # -- all tensors ---------------------------------------------------------------------------------------------

    @property
    def nbytes(self) -> int:
        """Bytes of the whole image: all files, and the few bytes that align them."""
        return self.reader.layout.image

    def read(self) -> dict[str, NDArray[Any]]:
        """All tensors as views of one buffer, read on all cores; the fastest way to have them all."""
        buffer = self._whole()
        return {name: view(entry.info, buffer, entry.begin) for name, entry in self.entries.items()}

    def read_into(self, buffer: Buffer) -> dict[str, NDArray[Any]]:
        """As `read`, into the caller's writable memory of exactly `nbytes` bytes; on failure it is wiped."""
        try:
            out = memoryview(buffer).cast("B")
        except TypeError as error:
            raise UsageError("read.buffer", f"the buffer is not contiguous memory: {error}") from None
        self.reader.read_into(out)
        return {name: view(entry.info, out, entry.begin) for name, entry in self.entries.items()}

    def torch(self, device: str | t.device = "cpu") -> dict[str, t.Tensor]:
        """All tensors for torch. On the CPU they are views of one buffer, which lives as long as one of them.

        For any other device they go through a small pinned buffer: host memory stays flat.
        """
        if str(device) == "cpu":
            buffer = self._whole()
            return {name: torch_view(entry.info, buffer, entry.begin) for name, entry in self.entries.items()}
        from strongroom.load.device import to_device

        return to_device(self, device)

    def stream(self, *, group: int = _GROUP) -> Iterator[tuple[str, NDArray[Any]]]:
        """Name and array of each tensor, in the order of their bytes.

        They are read in groups of about `group` bytes. While the caller works on one group the next is being read, so
        that about twice `group` bytes are held, and what the caller keeps.
        """
        return ((name, view(info, buffer, offset)) for name, info, buffer, offset in self._streamed(group))

    def stream_torch(self, *, group: int = _GROUP) -> Iterator[tuple[str, t.Tensor]]:
        """As `stream`, with torch tensors on the CPU."""
        return ((name, torch_view(info, buffer, offset)) for name, info, buffer, offset in self._streamed(group))

    # -- files ---------------------------------------------------------------------------------------------------

    def files(self) -> tuple[str, ...]:
        """The paths of all files of the version, whatever they are."""
        return tuple(file.path for file in self.reader.layout.files)

    def file(self, path: str) -> bytes:
        """The bytes of one file, such as ``config.json``. Of a weights file: with this holder's marks."""
        file = self.file_entry(path)
        return bytes(self.read_bytes(file.offset, file.end))

    def file_entry(self, path: str) -> FileEntry:
        """Where a file lies in the image; NotFound ``weights.no_file``."""
        found = self.reader.layout.file(path)
        if found is None:
            listed = ", ".join(self.files()[:20])
            raise NotFound("weights.no_file", f"this version has no file {path!r}; it has {listed}")
        return found

    # -- for the other loaders -----------------------------------------------------------------------------------

    @property
    def entries(self) -> Mapping[str, Entry]:
        """Every tensor with its place in the image."""
        headers = self.headers
        if self._entries is None:
            counts = Counter(name for header in headers for name in header.tensors)
            self._entries = {
                (name if counts[name] == 1 else f"{file.path}:{name}"): Entry(info, file, file.offset + info.begin)
                for file, tensors, _ in headers
                for name, info in tensors.items()
            }
            # A tensor may be called like another one's qualified name: then one of them could not be reached.
            if len(self._entries) != counts.total():
                raise UsageError(
                    "weights.ambiguous", "two tensors have one name even with their files' paths before it"
                )
        return self._entries

    def entry(self, name: str) -> Entry:
        """The tensor of that name; MissingTensor (a NotFound and a KeyError)."""
        found = self.entries.get(name)
        if found is None:
            raise MissingTensor("weights.no_tensor", f"these weights have no tensor {name!r}", hint="see keys()")
        return found

    @property
    def headers(self) -> tuple[_Header, ...]:
        """The header of each weights file: read through the reader once, and only the segments that hold it."""
        files = self._weights_files()
        if self._headers is None:
            if len(files) > 1:
                with ThreadPoolExecutor(min(_HEADERS_AT_ONCE, len(files))) as pool:
                    self._headers = tuple(pool.map(self._header, files))
            else:
                self._headers = tuple(map(self._header, files))
        return self._headers

    def read_bytes(self, begin: int, end: int) -> memoryview:
        """Bytes of the image in fresh memory, aligned like it as far as any tensor needs."""
        size = end - begin + begin % 64
        # Much memory at once comes in huge pages; small pieces are not worth a mapping of their own.
        whole = anonymous(size) if size >= _MAPPED else np.empty(size, np.uint8).data
        buffer = whole[begin % 64 :]
        self.reader.read_range(begin, buffer)
        return buffer

    # -- inside --------------------------------------------------------------------------------------------------

    def _weights_files(self) -> list[FileEntry]:
        if self.only is not None:
            files = [self.file_entry(path) for path in sorted(set(self.only), key=str.encode)]
            opaque = [file.path for file in files if file.kind == "opaque"]
            if opaque:
                raise UsageError("weights.not_tensors", f"{opaque[0]} is neither a safetensors nor a GGUF file")
            return files
        return [file for file in self.reader.layout.files if file.kind != "opaque"]

    def _header(self, file: FileEntry) -> _Header:
        def read(offset: int, size: int) -> bytes:
            return bytes(self.read_bytes(file.offset + offset, file.offset + offset + size))

        if file.kind == "safetensors":
            parsed = safetensors.parse_header(read(0, file.data_start), file.bytes)
            return _Header(file, parsed.tensors, parsed.metadata)
        found = gguf.parse_header(read, file.bytes)
        return _Header(file, found.tensors, found.metadata)

    def _whole(self) -> memoryview:
        """The image, or of it what belongs to the files of `only`: the rest takes up addresses, but no memory."""
        if self.only is None or self.nbytes == 0:
            return self.reader.read_all()
        buffer = anonymous(self.nbytes)
        for header in self.headers:
            self.reader.read_range(header.file.offset, buffer[header.file.offset : header.file.end])
        return buffer

    def _streamed(self, group: int) -> Iterator[tuple[str, TensorInfo, memoryview, int]]:
        groups = list(self._groups(group))
        with ThreadPoolExecutor(1, "strongroom-stream") as ahead:
            waiting: deque[Future[memoryview]] = deque()
            for number, members in enumerate(groups):
                for following in groups[number + len(waiting) : number + 2]:
                    waiting.append(ahead.submit(self.read_bytes, following[0][1].begin, following[-1][1].end))
                buffer, start = waiting.popleft().result(), members[0][1].begin
                for name, entry in members:
                    yield name, entry.info, buffer, entry.begin - start

    def _groups(self, limit: int) -> Iterator[list[tuple[str, Entry]]]:
        """Tensors that are neighbours in one file, up to `limit` bytes together (one alone may be larger)."""
        members: list[tuple[str, Entry]] = []
        for name, entry in self.entries.items():
            if members and (entry.file != members[0][1].file or entry.end - members[0][1].begin > limit):
                yield members
                members = []
            members.append((name, entry))
        if members:
            yield members
