"""Which files of a version are its model, and which go with it."""

from __future__ import annotations

import json
from pathlib import Path

from strongroom.core.limits import MIB
from strongroom.errors import UsageError
from strongroom.load.weights import Weights

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_SMALL = 128 * MIB
_NOT_SMALL = frozenset(
    (
        ".bin",
        ".ckpt",
        ".gguf",
        ".h5",
        ".msgpack",
        ".npy",
        ".npz",
        ".onnx",
        ".ot",
        ".pkl",
        ".pt",
        ".pth",
        ".py",
        ".safetensors",
    )
)


def checkpoint_files(weights: Weights) -> list[str]:
    """The files that hold the model: those of its index, ``model.safetensors``, or the only weights file there is.

    UsageError ``checkpoint.*`` when that leaves none, or a choice.
    """
    names = weights.files()
    if _INDEX in names:
        try:
            found = sorted(set(json.loads(weights.file(_INDEX))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UsageError("checkpoint.index", f"{_INDEX} is not an index of weights", hint="files=[...]") from None
        if found and all(isinstance(name, str) for name in found):
            return found
    if _SINGLE in names:
        return [_SINGLE]
    holding = [file.path for file in weights.reader.layout.files if file.kind != "opaque"]
    if len(holding) == 1:
        return holding
    raise UsageError(
        "checkpoint.unclear",
        f"which files hold the model? There is neither {_SINGLE} nor {_INDEX}; there are {listed(weights)}",
        hint="files=[...]",
    )


def small_files(weights: Weights) -> list[str]:
    """The files that go with the weights: configuration, tokenizer and such, each at most 128 MiB; no code."""
    return [
        file.path
        for file in weights.reader.layout.files
        if file.kind == "opaque" and file.bytes <= _SMALL and Path(file.path).suffix.lower() not in _NOT_SMALL
    ]


def listed(weights: Weights) -> str:
    """The version's files, for an error message."""
    return ", ".join(weights.files()[:20])
