"""The layout of a version (spec/container.md, sections 3, 4 and 8): which files there are, and how the image is cut."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from strongroom.core import canonical
from strongroom.core.limits import KIB, LIMITS, MIB
from strongroom.errors import LimitExceeded, Tampered
from strongroom.formats.items import ITEMS
from strongroom.formats.suites import FORMAT, Suite, check_format

ALIGNMENT = 64
BLOCKS_FORMAT = 2  # of a layout with runs of ggml's blocks, which older readers refuse by it
KINDS = ("safetensors", "gguf", "opaque")
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f]")  # a fixed list: what Unicode calls printable changes
_MAX_SEGMENT = 1 * MIB
_MIN_SEGMENT = 4 * KIB
_SHARES = (Fraction(1, 8), Fraction(1, 4), Fraction(3, 8), Fraction(1, 2))
_ENOUGH = 8192  # positions, for somebody of eight who mix their copies to be named by the code word alone


class FileEntry(NamedTuple):
    """One file: where it lies in the image, in bytes."""

    path: str
    kind: str
    offset: int
    bytes: int
    data_start: int

    @property
    def end(self) -> int:
        return self.offset + self.bytes


class Run(NamedTuple):
    """A range of the image that markable tensors of one element type cover."""

    begin: int
    end: int
    dtype: str


@dataclass(frozen=True, slots=True)
class Segment:
    """`bytes` bytes of the image from `start`; common segment or marked position `index`."""

    marked: bool
    index: int
    start: int
    bytes: int

    @property
    def end(self) -> int:
        return self.start + self.bytes


@dataclass(frozen=True)
class Layout:
    """Files, markable runs and segments of one image. Construct with `plan` (writer) or `from_json` (reader)."""

    image: int
    files: tuple[FileEntry, ...]
    runs: tuple[Run, ...]
    common: int
    marked: int
    stripes: tuple[int, ...]

    # -- writing -------------------------------------------------------------------------------------------------

    @classmethod
    def plan(
        cls,
        files: Sequence[FileEntry],
        runs: Sequence[Run],
        *,
        share: Fraction,
        positions: int,
    ) -> Layout:
        """The geometry that a writer of format 1 chooses (section 4) for placed files and their markable runs."""
        image = files[-1].end if files else 0
        if image > LIMITS.image:
            raise LimitExceeded(
                "image.too_large", f"the files add up to {image} bytes, at most {LIMITS.image} are kept"
            )
        merged = _merge(runs)
        markable = markable_bytes(merged)
        common = min(max(1 << max(0, (-(-image // 256) - 1).bit_length()), _MIN_SEGMENT), _MAX_SEGMENT)
        marked, wanted = LIMITS.marked_segment_min, 0
        if positions and share:
            ideal = int(markable * share / positions) // ALIGNMENT * ALIGNMENT
            marked = min(max(ideal, LIMITS.marked_segment_min), LIMITS.segment_max)
            wanted = min(positions, int(markable * share / marked))
        stripes = _stripes(image, merged, markable, common, marked, wanted)
        return cls(image, tuple(files), merged, common, marked, stripes)

    @staticmethod
    def default_share(markable: int, positions: int) -> Fraction:
        """The share that is marked of so many markable bytes, unless its owner says another (section 4)."""
        enough = min(positions, _ENOUGH) * LIMITS.marked_segment_min
        return next((share for share in _SHARES[:-1] if markable * share >= enough), _SHARES[-1])

    @staticmethod
    def place(files: Sequence[tuple[str, str, int, int]]) -> tuple[FileEntry, ...]:
        """Lay out (path, kind, bytes, data_start) in the order of their paths' bytes."""
        placed: list[FileEntry] = []
        end = 0
        for path, kind, size, data_start in sorted(files, key=lambda file: file[0].encode()):
            offset = end + (-(end + data_start)) % ALIGNMENT
            placed.append(FileEntry(path, kind, offset, size, data_start))
            end = offset + size
        return tuple(placed)

    def to_json(self) -> dict[str, Any]:
        return {
            "format": self.format,
            "image": self.image,
            "files": [entry._asdict() for entry in self.files],
            "runs": [list(run) for run in self.runs],
            "common": self.common,
            "marked": self.marked,
            "stripes": list(self.stripes),
        }

    def digest(self, suite: Suite) -> bytes:
        """The layout digest that every segment's associated data carries."""
        return suite.digest(canonical.encode_typed(self.to_json()))

    # -- reading -------------------------------------------------------------------------------------------------

    @classmethod
    def from_json(cls, value: Any) -> Layout:
        """Check everything that section 8 asks for; Tampered otherwise."""
        try:
            check_format(value["format"], "the layout", newest=BLOCKS_FORMAT)
            if set(value) != {"format", "image", "files", "runs", "common", "marked", "stripes"}:
                raise ValueError("unexpected members")
            files = tuple(FileEntry(**item) for item in value["files"])
            runs = tuple(Run(*item) for item in value["runs"])
            layout = cls(value["image"], files, runs, value["common"], value["marked"], tuple(value["stripes"]))
            layout._check()
            if value["format"] != layout.format:
                raise ValueError("its format is not that of its runs")
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise Tampered("layout.malformed", f"the layout in the index does not hold together: {error}") from None
        return layout

    def _check(self) -> None:
        numbers = [self.image, self.common, self.marked, *self.stripes]
        numbers += [number for entry in self.files for number in entry[2:]]
        numbers += [number for run in self.runs for number in run[:2]]
        if set(map(type, numbers)) != {int} or min(numbers) < 0:
            raise ValueError("a size is not a natural number")
        if len(self.files) > LIMITS.files or self.image > LIMITS.image or self.positions > LIMITS.positions:
            raise ValueError("beyond the limits")
        for size, least in ((self.common, ALIGNMENT), (self.marked, LIMITS.marked_segment_min)):
            if size % ALIGNMENT or not least <= size <= LIMITS.segment_max:
                raise ValueError(f"segments of {size} bytes")
        expected = self.place([(entry.path, entry.kind, entry.bytes, entry.data_start) for entry in self.files])
        if expected != self.files or self.image != (expected[-1].end if expected else 0):
            raise ValueError("files are not in order or not where they belong")
        names = [check_path(entry.path) for entry in self.files]
        folders = {"/".join(parts[:k]) for name in names for parts in [name.split("/")] for k in range(1, len(parts))}
        if len(set(names)) != len(names) or folders & set(names):
            raise ValueError("a path occurs twice, or is also a folder")
        for entry in self.files:
            if (
                entry.kind not in KINDS
                or entry.data_start > entry.bytes
                or (entry.kind == "opaque" and entry.data_start)
            ):
                raise ValueError("a file of an unknown kind, or whose tensors start where they can't")
        self._check_runs()
        rest = self.image - self.positions * self.marked
        count = len(self.stripes)
        if not (count == 0 == rest or (count - 1) * self.common < rest <= count * self.common):
            raise ValueError("segments do not fill the image")
        if count and self.stripes[-1] and rest != count * self.common:
            raise ValueError("marked segments follow a short common segment")
        self._check_marked()

    def _check_runs(self) -> None:
        end, ends = 0, [entry.end for entry in self.files]
        for run in self.runs:
            item = ITEMS[run.dtype]
            file = bisect_right(ends, run.begin)
            part = (run.end - run.begin) % item.bytes or run.begin % item.alignment
            if run.begin < end or run.end <= run.begin or part:
                raise ValueError("markable runs overlap or hold a part of an element")
            if file >= len(ends) or run.begin < self.files[file].offset or run.end > ends[file]:
                raise ValueError("a markable run is not inside one file")
            end = run.end

    def _check_marked(self) -> None:
        if not self.positions:
            return
        stretches = _stretches(self.runs)
        begins = np.array([begin for begin, _ in stretches], np.int64)
        ends = np.array([end for _, end in stretches], np.int64)
        starts = self.marked_starts
        at = np.searchsorted(begins, starts, "right") - 1
        if begins.size == 0 or bool((at < 0).any()) or bool((starts + self.marked > ends[at]).any()):
            raise ValueError("a marked segment is not inside the markable runs")

    # -- asking --------------------------------------------------------------------------------------------------

    @property
    def format(self) -> int:
        """2 if a run is of ggml's blocks, else 1."""
        return BLOCKS_FORMAT if any(ITEMS[run.dtype].is_block for run in self.runs) else FORMAT

    @cached_property
    def positions(self) -> int:
        """m: how many marked segments there are."""
        return sum(self.stripes)

    @cached_property
    def common_bytes(self) -> int:
        return self.image - self.positions * self.marked

    @cached_property
    def _counts(self) -> NDArray[np.int64]:
        return np.array(self.stripes, np.int64)

    @cached_property
    def first_positions(self) -> NDArray[np.int64]:
        """int64 (c,): the number of the first marked segment after each common one."""
        return np.cumsum(self._counts) - self._counts

    @cached_property
    def common_starts(self) -> NDArray[np.int64]:
        """int64 (c,): where each common segment starts in the image."""
        return np.arange(len(self.stripes), dtype=np.int64) * self.common + self.first_positions * self.marked

    @cached_property
    def marked_starts(self) -> NDArray[np.int64]:
        """int64 (m,): where each marked segment starts in the image."""
        owner = np.repeat(np.arange(len(self.stripes), dtype=np.int64), self._counts)
        ends = np.minimum((owner + 1) * self.common, self.common_bytes)
        return ends + np.arange(self.positions, dtype=np.int64) * self.marked

    def common_segment(self, index: int) -> Segment:
        size = min(self.common, self.common_bytes - index * self.common)
        return Segment(False, index, int(self.common_starts[index]), size)

    def stripe(self, index: int) -> list[Segment]:
        """The marked segments that follow common segment `index`."""
        first = int(self.first_positions[index])
        return [
            Segment(True, position, int(self.marked_starts[position]), self.marked)
            for position in range(first, first + self.stripes[index])
        ]

    def stripes_touched(self, begin: int, end: int) -> tuple[int, int]:
        """The common segments, from and to, that with the stripes after them hold bytes `begin` to `end` of the
        image."""
        first = max(0, int(np.searchsorted(self.common_starts, begin, "right")) - 1)
        return first, int(np.searchsorted(self.common_starts, end, "left"))

    def segments(self, begin: int = 0, end: int | None = None) -> list[Segment]:
        """The segments that touch bytes `begin` to `end` of the image, in order."""
        end = self.image if end is None else end
        if begin >= end:
            return []
        found: list[Segment] = []
        for index in range(*self.stripes_touched(begin, end)):
            found.append(self.common_segment(index))
            found += self.stripe(index)
        return [segment for segment in found if segment.start < end and segment.end > begin]

    def markable(self, begin: int, end: int) -> bool:
        """Whether a run holds all of bytes `begin` to `end` of the image."""
        k = bisect_right(self._run_begins, begin) - 1
        return k >= 0 and begin < end <= self.runs[k].end

    @cached_property
    def _run_begins(self) -> list[int]:
        return [run.begin for run in self.runs]

    def files_of(self, segment: Segment) -> list[str]:
        """The paths of the files that a segment holds bytes of, for reports."""
        return [entry.path for entry in self.files if entry.offset < segment.end and entry.end > segment.start]

    def file(self, path: str) -> FileEntry | None:
        return next((entry for entry in self.files if entry.path == path), None)


def check_path(path: str) -> str:
    """`path` if it is one that may be written below a folder; ValueError otherwise (no traversal, one spelling)."""
    if not path or len(path.encode()) > LIMITS.path_bytes:
        raise ValueError("a path is empty or too long")
    if any(part in ("", ".", "..") for part in path.split("/")) or "\\" in path or _CONTROL.search(path):
        raise ValueError(f"the path {path!r} is not a plain relative path")
    return path


def markable_bytes(runs: Iterable[Run]) -> int:
    """How many bytes of an image carry marks where they are chosen to: those of its runs, which do not overlap."""
    return sum(run.end - run.begin for run in runs)


def _merge(runs: Sequence[Run]) -> tuple[Run, ...]:
    merged: list[Run] = []
    for run in sorted(runs):
        if merged and merged[-1].end == run.begin and merged[-1].dtype == run.dtype:
            merged[-1] = merged[-1]._replace(end=run.end)
        else:
            merged.append(run)
    return tuple(merged)


def _stretches(runs: Sequence[Run]) -> list[tuple[int, int]]:
    """Ranges of the image covered by runs of whatever types that touch each other."""
    stretches: list[tuple[int, int]] = []
    for run in runs:
        if stretches and stretches[-1][1] == run.begin:
            stretches[-1] = (stretches[-1][0], run.end)
        else:
            stretches.append((run.begin, run.end))
    return stretches


def _stripes(image: int, runs: Sequence[Run], markable: int, common: int, marked: int, wanted: int) -> tuple[int, ...]:
    stretches = _stretches(runs)
    begins = [begin for begin, _ in stretches]
    before = [0]  # markable bytes before stretch k
    for begin, end in stretches:
        before.append(before[-1] + end - begin)

    def covered(at: int) -> int:
        k = bisect_right(begins, at) - 1
        return 0 if k < 0 else before[k] + min(at, stretches[k][1]) - begins[k]

    # Where weights lie in stretches shorter than a segment, much falls due at once: put has a stripe in memory whole.
    most = max(1, 2 * common // marked)
    stripes: list[int] = []
    position, placed = 0, 0
    while position < image:
        position = min(position + common, image)
        count = 0
        k = bisect_right(begins, position) - 1
        if wanted and k >= 0 and position < stretches[k][1]:
            due = wanted * covered(min(image, position + common)) // markable - placed
            count = max(0, min(due, (stretches[k][1] - position) // marked, most))
        stripes.append(count)
        placed += count
        position += count * marked
    return tuple(stripes)
