"""Variants A and B of a marked segment (spec/container.md, section 7; layer 1 of the mark).

A adds one keyed sign pattern to the magnitude bits, B subtracts it, and the midpoint is the original. The step is one
bf16 unit in the last place, relative to the element, whatever its type.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from strongroom.crypto.keys import keystream
from strongroom.formats.layout import Layout


class Step(NamedTuple):
    """How one element type is marked: unsigned integer type, step q, and the least and greatest normal magnitude."""

    integer: Any
    q: int
    least: int
    most: int


STEPS = {
    "BF16": Step(np.dtype("<u2"), 1, 0x0080, 0x7F7F),
    "F16": Step(np.dtype("<u2"), 8, 0x0400, 0x7BFF),
    "F32": Step(np.dtype("<u4"), 1 << 16, 0x0080_0000, 0x7F7F_FFFF),
    "F64": Step(np.dtype("<u8"), 1 << 45, 0x0010_0000_0000_0000, 0x7FEF_FFFF_FFFF_FFFF),
}


class Marker:
    """Makes the variants of one version's marked segments, and takes them back to the original."""

    def __init__(self, mark_key: bytes, layout: Layout) -> None:
        self._key = mark_key
        self._layout = layout
        self._run_begins = [run.begin for run in layout.runs]
        self._stride = -(-layout.marked // 256) * 16

    def variants(self, position: int, plaintext: memoryview) -> tuple[bytes, bytes]:
        """Variants A and B of the segment at `position`, whose original bytes are given."""
        packed = np.frombuffer(keystream(self._key, self._stride, offset=position * self._stride), np.uint8)
        signs = np.unpackbits(packed, bitorder="little")
        a, b = bytearray(len(plaintext)), bytearray(len(plaintext))
        done = 0  # elements
        for begin, end, dtype in self._pieces(position):
            step = STEPS[dtype]
            bits = np.frombuffer(plaintext[begin:end], step.integer)
            delta = self._deltas(bits, signs[done : done + bits.size], step)
            np.frombuffer(a, step.integer, bits.size, begin)[:] = bits + delta
            np.frombuffer(b, step.integer, bits.size, begin)[:] = bits - delta
            done += bits.size
        return bytes(a), bytes(b)

    @staticmethod
    def _deltas(bits: NDArray[Any], signs: NDArray[np.uint8], step: Step) -> NDArray[Any]:
        """q, −q (modulo the integer's size) or 0 for each element; never carries into the sign bit or out of range."""
        integer = step.integer.type
        sign_bit = integer(1 << (8 * step.integer.itemsize - 1))
        magnitude = bits & ~sign_bit
        can = (magnitude >= integer(step.least + step.q)) & (magnitude <= integer(step.most - step.q))
        minus = integer((1 << (8 * step.integer.itemsize)) - step.q)
        deltas: NDArray[Any] = np.where(can, np.where(signs.astype(bool), integer(step.q), minus), integer(0))
        return deltas.astype(step.integer)

    def original(self, position: int, a: memoryview, b: memoryview) -> bytes:
        """The unmarked bytes, from both variants: the mean of the integers, which is exact."""
        out = bytearray(len(a))
        for begin, end, dtype in self._pieces(position):
            integer = STEPS[dtype].integer
            x = np.frombuffer(a[begin:end], integer)
            y = np.frombuffer(b[begin:end], integer)
            np.frombuffer(out, integer, x.size, begin)[:] = (x & y) + ((x ^ y) >> integer.type(1))
        return bytes(out)

    def _pieces(self, position: int) -> list[tuple[int, int, str]]:
        """(begin, end, type) within the segment, in bytes: a segment may cross from one tensor into the next."""
        start = int(self._layout.marked_starts[position])
        end = start + self._layout.marked
        pieces: list[tuple[int, int, str]] = []
        k = bisect_right(self._run_begins, start) - 1
        at = start
        while at < end:
            run = self._layout.runs[k]
            stop = min(end, run.end)
            pieces.append((at - start, stop - start, run.dtype))
            at, k = stop, k + 1
        return pieces
