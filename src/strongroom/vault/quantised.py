"""A holder's copy that leaves quantised: made of the holder's marked and stamped floats, any range of it
(spec/release.md, section 5).

What is quantised is read, marked, rounded and forgotten in stretches: of a range as much memory is taken as it has
bytes, and 16 MiB of floats."""

from __future__ import annotations

import threading
from bisect import bisect_right
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from strongroom.core.limits import MIB
from strongroom.formats.copybundle import CopiedFile
from strongroom.marking.elements import integers, values
from strongroom.marking.quantiser import blocks, packed
from strongroom.vault.forms import Made, Part, Plan

_STRETCH = 16 * MIB  # of floats at a time
_KEPT = 4  # tensors whose scales are kept for a while
_ALIGNED = 8  # bytes: no float is cut


class Floats(Protocol):
    """The same copy as floats."""

    @property
    def image(self) -> int: ...
    @property
    def marked(self) -> bool: ...
    def read(self, begin: int, end: int) -> memoryview: ...


class Quantised:
    """One holder's copy of one version in the form that was planned. Thread-safe."""

    def __init__(self, floats: Floats, plan: Plan) -> None:
        self._floats, self._plan = floats, plan
        self._begins = [part.begin for part in plan.parts]
        self._lock = threading.Lock()
        # By where the tensor begins: its scales, and which of them are there. Codes come first, and have made them.
        self._scales: dict[int, tuple[NDArray[Any], NDArray[np.bool_]]] = {}

    @property
    def image(self) -> int:
        return self._plan.image

    @property
    def marked(self) -> bool:
        return self._floats.marked

    @property
    def files(self) -> tuple[CopiedFile, ...]:
        return self._plan.files

    def read(self, begin: int, end: int) -> memoryview:
        """Bytes `begin` to `end` of its image."""
        out = memoryview(bytearray(end - begin))
        for part in self._plan.parts[max(0, bisect_right(self._begins, begin) - 1) :]:
            if part.begin >= end:
                break
            low, high = max(part.begin, begin), min(part.end, end)
            if low < high:
                self._fill(part, low - part.begin, high - part.begin, out[low - begin : high - begin])
        return out

    def _fill(self, part: Part, low: int, high: int, out: memoryview) -> None:
        """Bytes `low` to `high` of a part."""
        source = part.source
        if isinstance(source, bytes):
            out[:] = source[low:high]
        elif isinstance(source, int):
            out[:] = self._given(source + low, source + high)
        else:
            self._make(source, low, high, out)

    def _given(self, begin: int, end: int) -> memoryview:
        """Bytes `begin` to `end` of the floats' image."""
        low = begin - begin % _ALIGNED
        high = min(end + -end % _ALIGNED, self._floats.image)
        return self._floats.read(low, high)[begin - low : end - low]

    def _make(self, made: Made, low: int, high: int, out: memoryview) -> None:
        """Bytes `low` to `high` of what is made of a tensor, by stretches of whole groups."""
        first, stop = low // made.size, -(-high // made.size)
        step = max(1, _STRETCH // (made.group * made.tensor.info.dtype.block_bytes))
        for at in range(first, stop, step):
            end = min(at + step, stop)
            data = self._groups(made, at, end).reshape(-1).view(np.uint8).data
            here = max(low, at * made.size), min(high, end * made.size)
            out[here[0] - low : here[1] - low] = data[here[0] - at * made.size : here[1] - at * made.size]

    def _groups(self, made: Made, first: int, stop: int) -> NDArray[Any]:
        """What is made of groups `first` to `stop` of a tensor."""
        if made.scales and (kept := self._kept(made, first, stop)) is not None:
            return kept
        dtype, tensor = made.tensor.info.dtype, made.tensor
        begin, end = (tensor.begin + at * made.group * dtype.block_bytes for at in (first, stop))
        data = self._given(begin, end)
        w = values(integers(dtype.name, data, 0, 0, (stop - first) * made.group), dtype.name)
        w = w.reshape(-1, made.group)
        if made.block:
            return blocks(w, made.block)
        codes, scales = packed(w, made.bits, dtype.name)
        self._keep(made, first, scales)
        return scales if made.scales else codes

    def _kept(self, made: Made, first: int, stop: int) -> NDArray[Any] | None:
        with self._lock:
            scales, there = self._scales.get(made.tensor.begin, (np.empty(0), np.zeros(0, bool)))
            return scales[first:stop].copy() if there.size and there[first:stop].all() else None

    def _keep(self, made: Made, first: int, scales: NDArray[Any]) -> None:
        with self._lock:
            if made.tensor.begin not in self._scales:
                if len(self._scales) >= _KEPT:
                    self._scales.pop(next(iter(self._scales)))
                count = made.tensor.info.elements // made.group
                self._scales[made.tensor.begin] = np.empty(count, scales.dtype), np.zeros(count, bool)
            kept, there = self._scales[made.tensor.begin]
            kept[first : first + len(scales)], there[first : first + len(scales)] = scales, True
