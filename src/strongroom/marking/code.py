"""The code that decides which variant a holder gets: Tardos' code with the density of Škorić's symmetric scheme.

Spec/container.md, section 7. G. Tardos, "Optimal probabilistic fingerprint codes" (2003); B. Škorić, S. Katzenbeisser,
M. Celik, "Symmetric Tardos fingerprinting codes" (2008). Biases and words come from keystreams, in integers, so that
every
machine computes the same word.
"""

from __future__ import annotations

import math
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray

from strongroom.crypto.keys import derive, keystream

COLLUDERS = 16  # c0: what the cut-off is made for
_STEPS = 256


@lru_cache(maxsize=8)
def bias_table(colluders: int = COLLUDERS) -> NDArray[np.uint32]:
    """uint32 (256,): 65536 times the probability of a 1, at equally likely steps of the arcsine density with
    cut-off."""
    least = math.asin(math.sqrt(1 / (300 * colluders)))
    angles = (least + (math.pi / 2 - 2 * least) * (k + 0.5) / _STEPS for k in range(_STEPS))
    table = np.array([round(65536 * math.sin(angle) ** 2) for angle in angles], np.uint32)
    table.flags.writeable = False
    return table


class Code:
    """The code of one version, under its code key."""

    def __init__(self, code_key: bytes, positions: int, colluders: int = COLLUDERS) -> None:
        self._key = code_key
        self.positions = positions
        self._table = bias_table(colluders)

    @cached_property
    def biases(self) -> NDArray[np.uint32]:
        """uint32 (positions,): 65536 times the probability that a word has a 1 there."""
        steps = np.frombuffer(keystream(derive(self._key, "bias"), self.positions), np.uint8)
        return self._table[steps]

    def word(self, holder: str) -> bytes:
        """The code word of a holder's path: ⌈positions / 8⌉ bytes, position 0 in the lowest bit of the first."""
        return np.packbits(self.bits(holder), bitorder="little").tobytes()

    def bits(self, holder: str) -> NDArray[np.bool_]:
        """The same, bool (positions,)."""
        draws = np.frombuffer(keystream(derive(self._key, "word", holder.encode()), 2 * self.positions), "<u2")
        found: NDArray[np.bool_] = draws < self._limits
        return found

    @cached_property
    def _limits(self) -> NDArray[np.uint16]:
        """The biases, which are less than 65536, as 16-bit numbers: compared in half the time."""
        return self.biases.astype(np.uint16)
