"""What `put` reads: a model on disk, whole, within limits, and the same from the first look to the last byte."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from strongroom.errors import LimitExceeded
from strongroom.formats.tensors import TensorInfo
from strongroom.vault.names import check_collisions
from strongroom.vault.shards import INDEX_MAX, INDEX_SUFFIX, check_index, check_numbered
from strongroom.vault.sourcefile import SourceFile, check_limits
from strongroom.vault.walk import Walk

__all__ = ["ModelSource", "SourceFile", "Tally"]


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
        check_collisions(file.path for file in files)
        check_limits(files)
        source = cls(root, tuple(files), tuple(sorted(skipped)), tuple(sorted(followed)))
        if root.is_dir():  # of a single file, the caller said that it is all that is wanted
            source._check_shards()
        return source

    @property
    def total_bytes(self) -> int:
        return sum(file.size for file in self.files)

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

    def check_unchanged(self) -> None:
        """Conflict ``source.changed`` unless every file is what it was when it was scanned."""
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
                with file.opened() as fd:
                    check_index(file.path, file.read(fd, 0, file.size), shards)
