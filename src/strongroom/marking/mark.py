"""Variants A and B of a marked segment (spec/container.md, section 7; layer 1 of the mark).

A adds one keyed sign pattern to the magnitude bits, B subtracts it, and the midpoint is the original. The step is one
bf16 unit in the last place, relative to the element, whatever its type. Of ggml's blocks the scale fields are marked.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from strongroom.crypto.keys import keystream
from strongroom.formats.items import ITEMS
from strongroom.formats.layout import Layout, Run
from strongroom.marking.elements import Step, integers, step_of


class _Piece(NamedTuple):
    """Bytes `begin` to `end` of some segments, all in one run: `first` to `stop` are its elements there. It is `whole`
    if it is of whole segments."""

    begin: int
    end: int
    run: Run
    first: int
    stop: int
    whole: bool


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
        start = int(self._layout.marked_starts[first])
        for piece in self._pieces(first, len(plaintext)):
            begin, end, run = piece[:3]
            if ITEMS[run.dtype].is_block:  # most of it is not marked
                for variant in (a, b):
                    variant[begin:end] = np.frombuffer(plaintext[begin:end], np.uint8)
            bits, plus, minus = (
                integers(run.dtype, data, run.begin - start, piece.first, piece.stop) for data in (plaintext, a, b)
            )
            signs = self._signs(first, piece).reshape(-1, *[1] * (bits.ndim - 1))
            delta = self._deltas(bits, signs, step_of(run.dtype))
            np.add(bits, delta, out=plus)
            np.subtract(bits, delta, out=minus)
        return a.data, b.data

    @staticmethod
    def _deltas(bits: NDArray[Any], signs: NDArray[np.uint8], step: Step) -> NDArray[Any]:
        """q, −q (modulo the integer's size) or 0 for each element; never carries into the sign bit or out of range."""
        integer = step.integer.type
        can, q = step.markable(bits), step.sizes(bits)
        with np.errstate(over="ignore"):
            deltas: NDArray[Any] = np.where(can, np.where(signs.astype(bool), q, integer(0) - q), integer(0))
        return deltas.astype(step.integer)

    def unmarked(self, first: int, a: memoryview) -> memoryview | None:
        """The same as `original`, from variant A and the signs alone; None where A does not say which elements were
        moved: in some of the smallest and largest normal numbers, and in blocks."""
        out = np.empty(len(a), np.uint8)
        start = int(self._layout.marked_starts[first])
        for piece in self._pieces(first, len(a)):
            run = piece.run
            if ITEMS[run.dtype].is_block:
                return None
            moved, plain = (integers(run.dtype, data, run.begin - start, piece.first, piece.stop) for data in (a, out))
            step = step_of(run.dtype)
            back = np.subtract(moved, self._moves(self._signs(first, piece), step))
            could, still = step.markable(back), step.markable(moved)
            if could.all() and still.all():
                plain[:] = back
            elif (could & ~still).any():
                return None
            else:
                np.copyto(plain, moved)
                np.copyto(plain, back, where=could)
        return out.data

    @staticmethod
    def _moves(signs: NDArray[np.uint8], step: Step) -> NDArray[Any]:
        """The step q or −q (modulo the integer's size) for each sign."""
        q = step.integer.type(step.q)
        moves: NDArray[Any] = signs.astype(step.integer)
        moves *= 2 * q
        moves -= q
        return moves

    def original(self, first: int, a: memoryview, b: memoryview) -> memoryview:
        """The unmarked bytes, from both variants: the mean of the integers, which is exact. What of a block is not
        marked is the same in both, and so is its own mean."""
        out = np.empty(len(a), np.uint8)
        for piece in self._pieces(first, len(a)):
            begin, end, integer = piece.begin, piece.end, step_of(piece.run.dtype).integer
            x = np.frombuffer(a[begin:end], integer)
            y = np.frombuffer(b[begin:end], integer)
            np.add(x & y, (x ^ y) >> integer.type(1), out=out[begin:end].view(integer))
        return out.data

    def _pieces(self, first: int, size: int) -> Iterator[_Piece]:
        """Stretches of one run: a stripe that a run covers is one piece, else each segment for itself, which may cross
        from one tensor into the next."""
        length = self._layout.marked
        start, count = int(self._layout.marked_starts[first]), size // length
        run = self._run_at(start)
        if start + size <= run.end:
            yield _Piece(0, size, run, *ITEMS[run.dtype].within(start - run.begin, start + size - run.begin), True)
            return
        for k in range(count):
            at, end = start + k * length, start + (k + 1) * length
            while at < end:
                run = self._run_at(at)
                stop = min(end, run.end)
                found = ITEMS[run.dtype].within(at - run.begin, stop - run.begin)
                yield _Piece(at - start, stop - start, run, *found, False)
                at = stop

    def _signs(self, first: int, piece: _Piece) -> NDArray[np.uint8]:
        """uint8 (elements of the piece,): 1 where the sign is +. `first` is the position that byte 0 belongs to."""
        item, length, count = ITEMS[piece.run.dtype], self._layout.marked, piece.stop - piece.first
        if not piece.whole:
            position = first + piece.begin // length
            start = int(self._layout.marked_starts[first])
            done = self.elements_before(position, start + piece.begin)
            return self.signs(position, 1)[0, done : done + count]
        signs = self.signs(first, piece.end // length)
        if length % item.bytes == 0:
            return signs[:, : length // item.bytes].ravel()
        # Segments have one block more or less: each is counted from its own first one.
        start = int(self._layout.marked_starts[first]) - piece.run.begin
        places = np.arange(piece.first, piece.stop) * item.bytes + (item.at - start)
        segments = places // length
        firsts = np.searchsorted(segments, np.arange(len(signs)))
        found: NDArray[np.uint8] = signs[segments, np.arange(count) - firsts[segments]]
        return found

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
            first, end = ITEMS[run.dtype].within(at - run.begin, stop - run.begin)
            count += end - first
            at = stop
        return count

    def _run_at(self, at: int) -> Run:
        return self._layout.runs[bisect_right(self._run_begins, at) - 1]
