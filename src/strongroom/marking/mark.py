"""Variants A and B of a marked segment (spec/container.md, section 7; layer 1 of the mark).

A adds one keyed sign pattern to the magnitude bits, B subtracts it, and the midpoint is the original. The step is one
bf16 unit in the last place, relative to the element, whatever its type.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from strongroom.crypto.keys import keystream
from strongroom.formats.layout import Layout, Run
from strongroom.marking.elements import STEPS, Step


class Marker:
    """Makes the variants of one version's marked segments, and takes them back to the original."""

    def __init__(self, mark_key: bytes, layout: Layout) -> None:
        self._key = mark_key
        self._layout = layout
        self._run_begins = [run.begin for run in layout.runs]
        self._stride = -(-layout.marked // 256) * 16

    def variants(self, first: int, plaintext: memoryview) -> tuple[memoryview, memoryview]:
        """Variants A and B of the marked segments from position `first`, whose original bytes are given, one after
        another."""
        a, b = (np.empty(len(plaintext), np.uint8) for _ in (0, 1))
        for begin, end, dtype, signs in self._pieces(first, len(plaintext)):
            step = STEPS[dtype]
            bits = np.frombuffer(plaintext[begin:end], step.integer)
            delta = self._deltas(bits, signs, step)
            np.add(bits, delta, out=a[begin:end].view(step.integer))
            np.subtract(bits, delta, out=b[begin:end].view(step.integer))
        return a.data, b.data

    @staticmethod
    def _deltas(bits: NDArray[Any], signs: NDArray[np.uint8], step: Step) -> NDArray[Any]:
        """q, −q (modulo the integer's size) or 0 for each element; never carries into the sign bit or out of range."""
        integer = step.integer.type
        can = step.markable(bits)
        minus = integer((1 << (8 * step.integer.itemsize)) - step.q)
        deltas: NDArray[Any] = np.where(can, np.where(signs.astype(bool), integer(step.q), minus), integer(0))
        return deltas.astype(step.integer)

    def original(self, first: int, a: memoryview, b: memoryview) -> memoryview:
        """The unmarked bytes, from both variants: the mean of the integers, which is exact."""
        out = np.empty(len(a), np.uint8)
        for begin, end, dtype, _ in self._pieces(first, len(a)):
            integer = STEPS[dtype].integer
            x = np.frombuffer(a[begin:end], integer)
            y = np.frombuffer(b[begin:end], integer)
            np.add(x & y, (x ^ y) >> integer.type(1), out=out[begin:end].view(integer))
        return out.data

    def _pieces(self, first: int, size: int) -> Iterator[tuple[int, int, str, NDArray[np.uint8]]]:
        """(begin, end, type, signs) of stretches of one element type: a stripe that a stretch covers is one piece, else
        each segment for itself, which may cross from one tensor into the next."""
        length = self._layout.marked
        start, count = int(self._layout.marked_starts[first]), size // length
        run = self._run_at(start)
        if start + size <= run.end:
            signs = self.signs(first, count)[:, : length // STEPS[run.dtype].integer.itemsize]
            yield 0, size, run.dtype, signs.ravel()
            return
        for k in range(count):
            signs = self.signs(first + k, 1)[0]
            at, end, done = start + k * length, start + (k + 1) * length, 0
            while at < end:
                run = self._run_at(at)
                stop = min(end, run.end)
                elements = (stop - at) // STEPS[run.dtype].integer.itemsize
                yield at - start, stop - start, run.dtype, signs[done : done + elements]
                at, done = stop, done + elements

    def signs(self, first: int, count: int) -> NDArray[np.uint8]:
        """uint8 (count, 8E): 1 where the sign is +, for each position and element."""
        stream = keystream(self._key, count * self._stride, offset=first * self._stride)
        return np.unpackbits(np.frombuffer(stream, np.uint8), bitorder="little").reshape(count, -1)

    def elements_before(self, position: int, begin: int) -> int:
        """How many elements of a position lie before byte `begin` of the image."""
        at, count = int(self._layout.marked_starts[position]), 0
        while at < begin:
            run = self._run_at(at)
            stop = min(begin, run.end)
            count += (stop - at) // STEPS[run.dtype].integer.itemsize
            at = stop
        return count

    def _run_at(self, at: int) -> Run:
        return self._layout.runs[bisect_right(self._run_begins, at) - 1]
