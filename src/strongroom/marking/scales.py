"""Blocks of quantised weights, each taken for one number: its scale, and that of a leak's weights (spec/mark.md,
section 3)."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from strongroom.errors import UsageError
from strongroom.formats.items import ITEMS
from strongroom.marking.elements import PRUNED, integers, step_of, values


def numbers(data: Any, dtype: str) -> NDArray[np.float32]:
    """float32, flat: the weights of whole elements or blocks of a markable type; errors as `dequantised`."""
    if ITEMS[dtype].is_block:
        return dequantised(data, dtype)
    return values(np.frombuffer(data, step_of(dtype).integer), dtype)


def dequantised(data: Any, dtype: str) -> NDArray[np.float32]:
    """float32, flat: the weights of ggml's blocks, by the gguf package's own arithmetic; UsageError
    ``suspect.quantised`` where it knows none, ``suspect.no_gguf`` where it is missing."""
    try:
        gguf: Any = importlib.import_module("gguf")
    except ImportError:
        raise UsageError(
            "suspect.no_gguf",
            f"reading {dtype} takes the gguf package",
            hint="pip install 'strongroom[trace]'",
        ) from None
    try:
        with np.errstate(all="ignore"):
            found = gguf.dequantize(np.frombuffer(data, np.uint8), gguf.GGMLQuantizationType[dtype])
    except (KeyError, NotImplementedError, ValueError):
        raise UsageError("suspect.quantised", f"{dtype} is a type whose weights can't be read") from None
    return np.asarray(found, np.float32).ravel()


def scales(data: Any, dtype: str, leak: NDArray[np.float32]) -> tuple[NDArray[Any], NDArray[np.float32]]:
    """What a mark's estimators take of elements in `data` and the same of a leak, flat: the integers (n,), and the
    leak's values (n,), NaN where it says nothing. Of a block it is its first scale field (0 if it is no number), and
    the scale that fits the leak's weights best."""
    item = ITEMS[dtype]
    bits = integers(dtype, data, 0, 0, len(data) // item.bytes)
    if not item.is_block:
        return bits, leak
    bits = bits[:, 0].copy()
    # A scale that is no number carries no mark, and would silence all that are estimated together with it.
    bits[~np.isfinite(values(bits, dtype))] = 0
    # As float64 nothing overflows: a leak's weights are under 1e9, and the original's are F16 times small integers.
    w = numbers(data, dtype).reshape(-1, item.weights).astype(np.float64)
    seen = leak.reshape(w.shape).astype(np.float64)
    silent = ~np.isfinite(seen) | ~np.isfinite(w)
    pruned = (seen == 0) & (w != 0)
    if pruned.mean() > PRUNED:
        silent |= pruned
    w[silent] = 0
    seen[silent] = 0
    power = np.einsum("ij,ij->i", w, w)
    with np.errstate(all="ignore"):
        found = values(bits, dtype) * np.einsum("ij,ij->i", w, seen) / power
    return bits, found.astype(np.float32)
