"""What text says of a mark: the gradient of its likelihood in the place of a leak (spec/mark.md, section 10).

A position's estimate and a stamp's score are sums over elements, as they are for found weights; only what is summed
differs. The gradient is a function of the text and of the original alone, so every bound holds as it does there.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from strongroom.marking.elements import STEPS, ulps, values
from strongroom.marking.estimate import Estimator
from strongroom.marking.matched import MatchedFilter
from strongroom.marking.stamp import stampable

_LARGEST = 1e12  # nats that one step of one element gains: of no text that there is


class GradientEstimator(Estimator):
    """Estimates of the positions; where `Estimator` takes a leak's values, this takes the gradient, as float32."""

    def _take(
        self, at: slice, dtype: str, bits: NDArray[Any], leak: NDArray[np.float32], signs: NDArray[np.uint8]
    ) -> None:  # marks are taken only out of differences
        original = values(bits, dtype)
        d = np.where(STEPS[dtype].markable(bits), np.copysign(ulps(original), original), np.float32(0))
        d[signs == 0] *= -1
        gained = np.multiply(_finite(leak), d, dtype=np.float64)
        n, information = gained.sum(axis=1), np.einsum("ij,ij->i", gained, gained)
        with self._lock:
            self._n[at] += n
            self._information[at] += information
            self._square[at] += np.divide(n**2, information, out=np.zeros_like(n), where=information > 0)
            self._sums[at] += information > 0


class GradientFilter(MatchedFilter):
    """Scores of stamps; where `MatchedFilter` takes a leak's values, this takes the gradient, as float32."""

    @staticmethod
    def _filtered(dtype: str, bits: NDArray[Any], leak: NDArray[np.float32]) -> NDArray[np.float32]:
        original = values(bits, dtype)
        r = _finite(leak) * (ulps(original) * np.sign(original))
        # Its square has to be a number, too: one element that is none would silence all others.
        r[~(np.abs(r) < _LARGEST) | ~stampable(bits, dtype)] = 0
        return np.asarray(r, np.float32).reshape(-1)


def _finite(gradient: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.where(np.isfinite(gradient), gradient, np.float32(0))
