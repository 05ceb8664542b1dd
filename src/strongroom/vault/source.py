"""What `put` reads: a model on disk, whole, within limits, and the same from the first look to the last byte."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from strongroom.errors import LimitExceeded
from strongroom.formats.tensors import TensorInfo
from strongroom.vault.names import check_collisions
from strongroom.vault.shards import INDEX_MAX, INDEX_SUFFIX, check_index, check_numbered
from strongroom.vault.sourcefile import SourceFile, check_limits, unreadable
from strongroom.vault.walk import Walk

__all__ = ["ModelSource", "ReadInto", "SourceFile", "Tally"]

# Of a file: reads from an offset into a buffer, and says how many bytes came; 0 at the end.
ReadInto = Callable[[int, memoryview], int]


class Tally(NamedTuple):
    """How many tensors, and how many bytes they hold."""

    tensors: int
    bytes: int


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A model to be put: `files` in the order of their paths' UTF-8 bytes.

    `skipped` are paths that were left out (version control, caches), `followed` those that are symbolic links.
    """

    root: Path
    files: tuple[SourceFile, ...]
    skipped: tuple[str, ...] = ()
    followed: tuple[str, ...] = ()

    @classmethod
    def scan(cls, path: Path, *, follow_links: bool = False) -> ModelSource:
        """Look over a model directory, a ``.safetensors`` file or a GGUF file.

        Links inside a directory are followed to regular files in it, to regular files elsewhere only with
        `follow_links`. NotFound ``source.missing``; UsageError ``source.*``, ``safetensors.malformed``,
        ``gguf.malformed``; LimitExceeded ``source.limit``.
        """
        walk = Walk.of(path, follow_links=follow_links)
        walk.refuse_pickles()
        return cls.of(walk.root, walk.files, walk.skipped, walk.followed)

    @classmethod
    def of(cls, root: Path, files: list[SourceFile], skipped: list[str], followed: list[str]) -> ModelSource:
        """The source of these files, once they are known to be a whole model; errors as `scan`."""
        files = sorted(files, key=lambda file: file.path.encode("utf-8"))
        source = cls(root, tuple(files), tuple(sorted(skipped)), tuple(sorted(followed)))
        source.check(whole=root.is_dir())  # of a single file, the caller said that it is all that is wanted
        return source

    def check(self, *, whole: bool) -> None:
        """UsageError and LimitExceeded ``source.*`` unless these files can be a version; with `whole` also unless all
        shards are there."""
        check_collisions(file.path for file in self.files)
        check_limits(self.files)
        if whole:
            self._check_shards()

    @property
    def tensors(self) -> tuple[TensorInfo, ...]:
        """All tensors, file by file; their offsets are those of their own file."""
        return tuple(tensor for file in self.files for tensor in file.tensors)

    @property
    def unmarked_reasons(self) -> dict[str, Tally]:
        """Tensors that will carry no mark, by reason (`TensorInfo.unmarked_reason`)."""
        tallies: dict[str, Tally] = {}
        for file in self.files:
            for tensor in file.tensors:
                if (reason := tensor.unmarked_reason(file.data_start)) is not None:
                    before = tallies.get(reason, Tally(0, 0))
                    tallies[reason] = Tally(before.tensors + 1, before.bytes + tensor.size)
        return dict(sorted(tallies.items()))

    def open(self, file: SourceFile) -> AbstractContextManager[int]:
        """A descriptor, at its start, of the very file that was scanned; Conflict ``source.changed`` otherwise."""
        return file.opened()

    @contextmanager
    def reading(self, file: SourceFile) -> Iterator[ReadInto]:
        """How to read the very file that was scanned, from its start to its end; errors as `open`, UsageError
        ``source.unreadable``."""
        with self.open(file) as fd:

            def read(offset: int, buffer: memoryview) -> int:
                try:
                    return os.preadv(fd, [buffer], offset)
                except OSError as error:
                    raise unreadable(file.path, error) from None

            yield read

    def identity(self, file: SourceFile) -> tuple[int | str, ...]:
        """What is the same as long as the content of `file` is."""
        return file.signature

    def check_unchanged(self, digests: Sequence[str]) -> None:  # noqa: ARG002 - what was read is what is there
        """Conflict ``source.changed`` unless every file is what it was when it was scanned. `digests`: SHA-256 of
        each, in hexadecimal, as it was read."""
        for file in self.files:
            with file.opened():
                pass

    def _check_shards(self) -> None:
        check_numbered(frozenset(file.path for file in self.files if file.kind != "opaque"))
        shards = {
            file.path: frozenset(tensor.name for tensor in file.tensors)
            for file in self.files
            if file.kind == "safetensors"
        }
        for file in self.files:
            if file.path.endswith(INDEX_SUFFIX):
                if file.size > INDEX_MAX:
                    raise LimitExceeded("source.limit", f"{file.path} is larger than {INDEX_MAX} bytes")
                text, done = memoryview(bytearray(file.size)), 0
                with self.reading(file) as read:
                    while step := read(done, text[done:]):
                        done += step
                check_index(file.path, bytes(text[:done]), shards)
