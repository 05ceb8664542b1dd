"""A model on disk, looked over once, completely: which of its files may go into a room.

A model may have been prepared by somebody else: downloaded, unpacked, mounted. So nothing in it leads out of it
(links), nothing in it runs (pickles), nothing in it climbs out of the folder that a copy is written to, or overwrites
another file there (names).
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NoReturn

from strongroom.core.limits import LIMITS
from strongroom.errors import LimitExceeded, NotFound, UsageError
from strongroom.vault.names import check_collisions, check_name, shown
from strongroom.vault.pickles import pickle_evidence
from strongroom.vault.sourcefile import SourceFile, unreadable

# Never part of a model: version control, download caches, compiled Python (which runs when it is imported).
SKIPPED = frozenset({".git", ".cache", "__pycache__"})


@dataclass(slots=True)
class Walk:
    """What is at `root`: `files` to put, `pickles` that only conversion can take in, in no order.

    `skipped` was left out, `followed` were links; both are relative paths. `model`: what is put, and has to be whole; a
    find is what there is.
    """

    root: Path
    follow_links: bool
    model: bool = True
    files: list[SourceFile] = field(default_factory=list)
    pickles: list[tuple[SourceFile, str]] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    followed: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, path: Path, *, follow_links: bool, model: bool = True) -> Walk:
        """Look over a directory or a single file, which has to be of a `model`, unless it is looked over as text.

        NotFound ``source.missing``; UsageError and LimitExceeded ``source.*``, and those of the parsers.
        """
        try:
            root = path.resolve(strict=True)  # its caller named this one: here a link is no trap
        except (OSError, RuntimeError, ValueError):
            raise NotFound(
                "source.missing",
                f"there is no model at {shown(str(path))!r}",
                hint="name a model directory, a .safetensors file or a .gguf file",
            ) from None
        walk = cls(root, follow_links, model)
        if root.is_dir():
            walk._tree()
            if not walk.files and not walk.pickles:
                raise UsageError(
                    "source.empty", f"{shown(str(path))!r} holds no files", hint="name the directory of the model"
                )
        else:
            walk._single(path.absolute().name)  # in a download cache the target's own name is a hash
        return walk

    @classmethod
    def held(cls, files: Iterable[SourceFile]) -> Walk:
        """Look over a find that is in memory; errors as `of`, and UsageError ``source.collision``."""
        walk, files = cls(Path(), follow_links=False, model=False), list(files)
        check_collisions(file.path for file in files)
        for file in files:
            check_name(file.path)
            walk._take(file)
        return walk

    def refuse_pickles(self) -> None:
        """UsageError ``source.pickle`` if there are any."""
        for file, evidence in sorted(self.pickles, key=lambda item: item[0].path):
            refuse_pickle(file.path, evidence, len(self.pickles))

    def _tree(self) -> None:
        pending = [(self.root, "")]
        entries = 0
        while pending:
            folder, prefix = pending.pop()
            try:
                with os.scandir(folder) as listing:
                    found = list(listing)
            except OSError as error:
                raise unreadable(prefix or str(self.root), error) from None
            entries += len(found)
            if entries > LIMITS.files:
                raise LimitExceeded("source.limit", f"more than {LIMITS.files} files and folders in one model")
            for entry in found:
                path = prefix + entry.name
                if entry.name in SKIPPED:
                    self.skipped.append(path)
                    continue
                check_name(path)
                if entry.is_dir(follow_symlinks=False):
                    pending.append((Path(entry.path), path + "/"))
                else:
                    self._file(path, self._resolved(path, Path(entry.path)))

    def _single(self, name: str) -> None:
        check_name(name)
        self._file(name, self.root)
        if self.model and self.files and self.files[0].kind == "opaque":
            raise UsageError(
                "source.not_a_model",
                f"{name} is neither a safetensors file nor a GGUF file",
                hint="name a model directory, a .safetensors file or a .gguf file",
                path=name,
            )

    def _file(self, path: str, location: Path) -> None:
        self._take(SourceFile.scan(path, location))

    def _take(self, file: SourceFile) -> None:
        path = file.path
        with file.opened() as fd:
            # Safetensors' own parser refuses whatever is none.
            if not path.lower().endswith(".safetensors"):
                with os.fdopen(fd, "rb", closefd=False) as stream:
                    try:
                        evidence = pickle_evidence(path, stream)
                    except OSError as error:
                        raise unreadable(path, error) from None
                if evidence is not None:
                    self.pickles.append((file, evidence))
                    return
            self.files.append(file.parsed(partial(file.read, fd), torn=not self.model))

    def _resolved(self, path: str, location: Path) -> Path:
        """Where a file really is; a link is resolved here, once, and never again."""
        if not location.is_symlink():
            return location
        try:
            target = location.resolve(strict=True)
        except (OSError, RuntimeError):
            _refuse_link(path, "leads nowhere", "remove it")
        if target.is_dir():
            _refuse_link(path, "leads to a directory", "put the directory itself in its place")
        if not target.is_relative_to(self.root):
            # A link to ~/.ssh/id_rsa in a downloaded model would carry the key into the room and to every holder.
            if not self.follow_links:
                _refuse_link(
                    path,
                    "leaves the model's directory",
                    "--follow-links takes in what links point at, if you trust who made them (Hugging Face's cache "
                    "is made of such links)",
                )
        elif SKIPPED.intersection(target.relative_to(self.root).parts):
            _refuse_link(path, "leads into a folder that is left out", "put a copy of the file in its place")
        self.followed.append(path)
        return target


def refuse_pickle(path: str, evidence: str, count: int) -> NoReturn:
    """UsageError ``source.pickle`` for `path`, one of `count`."""
    raise UsageError(
        "source.pickle",
        f"{path} is refused: {evidence}, and a pickle is a program that its reader runs",
        hint="strongroom put --convert PATH NAME turns it into safetensors in a sandbox; or remove the file",
        path=path,
        pickles=count,
    )


def _refuse_link(path: str, what: str, hint: str) -> NoReturn:
    raise UsageError("source.link", f"{path} is a symbolic link that {what}", hint=hint, path=path)
