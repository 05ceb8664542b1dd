"""Weights rounded to ggml's Q4_K and Q6_K, which the gguf package reads but does not write: to nearest, no search for
better scales."""

from __future__ import annotations

import numpy as np


def quantize(weights, dtype):
    """uint8 (rows, bytes of a row) of float weights whose rows are multiples of 256."""
    x = np.asarray(weights, np.float64).reshape(-1, 256)
    found = {"Q4_K": _q4_k, "Q6_K": _q6_k}[dtype](x)
    return found.reshape(len(weights), -1)


def _half(numbers):
    return numbers.astype("<f2"), numbers.astype("<f2").astype(np.float64)


def _q4_k(x):
    x = x.reshape(-1, 8, 32)
    least = np.maximum(0, -x.min(axis=2))
    step = (x.max(axis=2) + least) / 15
    (d, big), (dmin, small) = _half(step.max(axis=1) / 63), _half(least.max(axis=1) / 63)
    scale = np.clip(np.round(step / big[:, None]), 0, 63).astype(np.uint8)
    low = np.clip(np.round(least / np.maximum(small, 1e-9)[:, None]), 0, 63).astype(np.uint8)
    unit = np.maximum(big[:, None] * scale, 1e-12)
    codes = np.clip(np.round((x + (small[:, None] * low)[:, :, None]) / unit[:, :, None]), 0, 15).astype(np.uint8)
    packed = np.concatenate(
        [
            scale[:, :4] | scale[:, 4:] >> 4 << 6,
            low[:, :4] | low[:, 4:] >> 4 << 6,
            scale[:, 4:] & 15 | (low[:, 4:] & 15) << 4,
        ],
        axis=1,
    )
    nibbles = codes[:, ::2] | codes[:, 1::2] << 4
    heads = np.stack([d, dmin], axis=1).view(np.uint8)
    return np.concatenate([heads, packed, nibbles.reshape(len(x), -1)], axis=1)


def _q6_k(x):
    x = x.reshape(-1, 16, 16)
    step = np.abs(x).max(axis=2) / 31
    d, big = _half(step.max(axis=1) / 127)
    scale = np.clip(np.round(step / big[:, None]), 1, 127)
    codes = np.clip(np.round(x / (big[:, None] * scale)[:, :, None]) + 32, 0, 63).astype(np.uint8).reshape(-1, 2, 4, 32)
    low = np.concatenate([codes[:, :, :2] & 15 | (codes[:, :, 2:] & 15) << 4], axis=2)
    high = codes[:, :, 0] >> 4 | codes[:, :, 1] >> 4 << 2 | codes[:, :, 2] >> 4 << 4 | codes[:, :, 3] >> 4 << 6
    parts = [low.reshape(len(x), -1), high.reshape(len(x), -1), scale.astype(np.uint8), d[:, None].view(np.uint8)]
    return np.concatenate(parts, axis=1)
