"""What leakers do to a model before it turns up somewhere, alone and together."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from strongroom.cli.demo_thief import moved, rounded

Array = NDArray[np.float32]
Attack = Callable[[str, Array], Array | None]


def int_(bits: int, group: int) -> Callable[[str, Array], Array]:
    """Round to nearest, a scale for each group of neighbours."""

    return lambda _, a: a if a.ndim < 2 else rounded(a, bits, group)


def ggml(kind: str) -> Callable[[str, Array], Array]:
    """Through ggml's own blocks and back."""

    def attack(_: str, a: Array) -> Array:
        import gguf
        from gguf import quants

        if a.ndim < 2 or a.shape[-1] % 32:
            return a
        type_ = gguf.GGMLQuantizationType[kind]
        found: Array = quants.dequantize(quants.quantize(a, type_), type_).astype(np.float32)
        return found

    return attack


def gptq(bits: int = 4, group: int = 128) -> Callable[[str, Array], Array]:
    """As GPTQ (arXiv 2210.17323) rounds: each column's error is made up for by those after it, by the second moments of
    what the layer is fed, here of correlated noise."""

    def attack(name: str, a: Array) -> Array:
        if a.ndim != 2 or "embed" in name or a.shape[1] > 8192:
            return int_(bits, group)(name, a)
        n, width = a.shape
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        fed = rng.standard_normal((512, 64), np.float32) @ rng.standard_normal((64, width), np.float32)
        fed += 3 * rng.standard_normal(fed.shape, np.float32)
        moments = (fed.T @ fed).astype(np.float64)
        moments[np.diag_indices(width)] += 0.01 * moments.trace() / width
        upper = np.linalg.cholesky(np.linalg.inv(moments)).T.astype(np.float32)
        left, found, top = a.copy(), np.empty_like(a), np.float32(2 ** (bits - 1) - 1)
        for begin in range(0, width, group):
            end = min(begin + group, width)
            scale = np.maximum(np.abs(left[:, begin:end]).max(axis=1) / top, np.float32(1e-12))
            errors = np.empty((n, end - begin), np.float32)
            for k in range(begin, end):
                found[:, k] = np.clip(np.round(left[:, k] / scale), -top - 1, top) * scale
                errors[:, k - begin] = (left[:, k] - found[:, k]) / upper[k, k]
                left[:, k:end] -= errors[:, k - begin, None] * upper[k, k:end]
            left[:, end:] -= errors @ upper[begin:end, end:]
        return found

    return attack


def awq(bits: int = 4, group: int = 128) -> Callable[[str, Array], Array]:
    """As AWQ (arXiv 2306.00978): columns that matter are scaled up before rounding, and down again."""

    def attack(name: str, a: Array) -> Array:
        if a.ndim != 2 or "embed" in name:
            return int_(bits, group)(name, a)
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        scale = np.exp(0.5 * rng.standard_normal(a.shape[1], np.float32))
        return int_(bits, group)(name, a * scale) / scale

    return attack


def kquant(bits: int, sub: int, *, least: bool) -> Callable[[str, Array], Array]:
    """As ggml's K-quants: blocks of 256 in groups of `sub`, whose scales (and `least` values) are quantised too."""

    def attack(_: str, a: Array) -> Array:
        if a.ndim < 2 or a.size % 256:
            return a
        groups = a.reshape(-1, 256 // sub, sub)
        levels = np.float32(2**bits - 1)
        if least:
            low = np.minimum(groups.min(axis=2), 0)
            scale = (groups.max(axis=2) - low) / levels
            scale, low = _stepped(scale, 63), -_stepped(-low, 63)
            codes = np.clip(np.round((groups - low[:, :, None]) / scale[:, :, None]), 0, levels)
            return (codes * scale[:, :, None] + low[:, :, None]).reshape(a.shape).astype(np.float32)
        scale = _stepped(np.abs(groups).max(axis=2) / np.float32(2 ** (bits - 1) - 1), 127)
        codes = np.clip(np.round(groups / scale[:, :, None]), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        return (codes * scale[:, :, None]).reshape(a.shape).astype(np.float32)

    return attack


def _stepped(scales: Array, steps: int) -> Array:
    """Scales of the groups of a block, to so many steps of the block's own, which is a float of 16 bits."""
    unit = (scales.max(axis=1, keepdims=True) / steps).astype(np.float16).astype(np.float32)
    unit = np.maximum(unit, np.float32(1e-8))
    return np.maximum(np.round(scales / unit), 1) * unit


def cast(dtype: str) -> Callable[[str, Array], Array]:
    """To another float type and back; float8 with one scale a tensor."""

    def attack(_: str, a: Array) -> Array:
        if dtype == "fp16":
            return a.astype(np.float16).astype(np.float32)
        import ml_dtypes

        scale = np.float32(np.abs(a).max() / 448 or 1)
        return ((a / scale).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale).astype(np.float32)

    return attack


def noise(share: float) -> Callable[[str, Array], Array]:
    def attack(name: str, a: Array) -> Array:
        rng = np.random.default_rng(zlib.crc32(f"{name} {share}".encode()))
        return a + (share * a.std() * rng.standard_normal(a.shape, np.float32) if a.ndim > 1 else 0)

    return attack


def prune(share: float) -> Callable[[str, Array], Array]:
    def attack(_: str, a: Array) -> Array:
        if a.ndim < 2:
            return a
        cut = np.quantile(np.abs(a).reshape(-1)[:: max(1, a.size // 100_000)], share)
        return np.where(np.abs(a) < cut, np.float32(0), a)

    return attack


def adapter(size: float) -> Callable[[str, Array], Array]:
    def attack(name: str, a: Array) -> Array:
        if a.ndim < 2 or "embed" in name:
            return a
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        update = rng.standard_normal((a.shape[0], 16), np.float32) @ rng.standard_normal((16, a.shape[1]), np.float32)
        return a + update * np.float32(size * a.std() / update.std())

    return attack


def merged(sister: Mapping[str, Array], share: float) -> Callable[[str, Array], Array]:
    """`share` of the copy and the rest of a sister model, element by element."""

    def attack(name: str, a: Array) -> Array:
        if name not in sister:
            return a
        return np.float32(share) * a + np.float32(1 - share) * sister[name].reshape(a.shape)

    return attack


def informed(where: Mapping[str, NDArray[np.bool_]], change: Callable[[str, Array], Array]) -> Attack:
    """Only where the leaker's own keys show that there are marked segments."""

    def attack(name: str, a: Array) -> Array:
        changed = change(name, a)
        return np.where(where[name].reshape(a.shape), changed, a) if name in where else a

    return attack


def then(*attacks: Callable[[str, Array], Array]) -> Callable[[str, Array], Array]:
    def attack(name: str, a: Array) -> Array:
        for each in attacks:
            a = each(name, a)
        return a

    return attack


def only(part: str) -> Callable[[str, Array], Array | None]:
    return lambda name, a: a if part in name else None


def rows(share: float) -> Callable[[str, Array], Array | None]:
    """The same share of the rows of every matrix."""
    return lambda _, a: a[len(a) // 3 :][: max(4, int(len(a) * share))] if a.ndim > 1 else None


def alone(
    shapes: Mapping[str, tuple[int, ...]], where: Mapping[str, NDArray[np.bool_]], sister: Mapping[str, Array]
) -> dict[str, Attack]:
    """By name, what one leaker does: `where` marked segments lie, and a `sister` of the model."""
    middle = sorted(name for name, shape in shapes.items() if len(shape) == 2 and "layer" in name)
    return {
        "none": lambda _, a: a,
        "fp16": cast("fp16"),
        "fp8 (e4m3)": cast("fp8"),
        "int8, groups of 128": int_(8, 128),
        "int4, groups of 128": int_(4, 128),
        "int3, groups of 128": int_(3, 128),
        "int4 as GPTQ": gptq(),
        "int4 as AWQ": awq(),
        "GGUF Q8_0": ggml("Q8_0"),
        "GGUF Q4_0": ggml("Q4_0"),
        "as GGUF's Q4_K": kquant(4, 32, least=True),
        "as GGUF's Q6_K": kquant(6, 16, least=False),
        "noise 0.03": noise(0.03),
        "noise 0.1": noise(0.1),
        "noise 0.3": noise(0.3),
        "noise 1.0": noise(1.0),
        "pruned 50 %": prune(0.5),
        "pruned 90 %": prune(0.9),
        "LoRA of rank 16 merged, 0.1 of the weights": adapter(0.1),
        "merged with a sister, half": merged(sister, 0.5),
        "merged with a sister, a fifth of the copy": merged(sister, 0.2),
        "int4, pruned 50 %, noise 0.1": then(int_(4, 128), prune(0.5), noise(0.1)),
        "hidden units permuted, int4": then(moved(3), int_(4, 128)),
        "marked segments alone: noise 0.1": informed(where, noise(0.1)),
        "marked segments alone: int4": informed(where, int_(4, 128)),
        "one matrix of one layer": only(middle[len(middle) // 2] if middle else ""),
        "one per cent of the rows": rows(0.01),
    }


def together(stack: NDArray[np.float32], how: str, rng: np.random.Generator, segment: int) -> Array:
    """One tensor out of those of several holders."""
    count, size = stack.shape
    match how:
        case "mean" | "median" | "min" | "max":
            found: Array = getattr(np, how)(stack, axis=0).astype(np.float32)
            return found
        case "elements":
            return np.take_along_axis(stack, rng.integers(0, count, size)[None], axis=0)[0]
        case "tensors":
            return stack[rng.integers(count)]
        case _:
            picks = np.repeat(rng.integers(0, count, -(-size // segment)), segment)[:size]
            return np.take_along_axis(stack, picks[None], axis=0)[0]


WAYS = ("mean", "median", "min", "max", "elements", "segments", "tensors")
TRAINED = "all weights trained"
"""The attack of one leaker that is no change of a tensor by itself: a real, short training run."""
AFTER: dict[str, Attack] = {
    "": lambda _, a: a,
    "int4": int_(4, 128),
    "int8": int_(8, 128),
    "noise 0.03": noise(0.03),
    "pruned 50 %": prune(0.5),
}
"""What is done to a mixture once more."""
