"""Weights in ggml's block types, by ggml itself: the gguf package reads all of them and writes only the oldest.

llama.cpp's library lies in the package xllamacpp; of it one function is called, whose interface is ggml.h's.
"""

from __future__ import annotations

import ctypes
import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_INSTEAD = {"Q2_K": "IQ4_NL", "Q3_K": "IQ4_NL", "IQ4_XS": "IQ4_NL", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
"""What llama.cpp writes where rows are no multiple of 256."""


def fitting(kind: str, width: int) -> str | None:
    """The block type that llama.cpp takes for rows of `width`, asked for `kind`; None where it takes none."""
    import gguf

    for each in (kind, _INSTEAD.get(kind, kind)):
        if width % gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[each]][0] == 0:
            return each
    return None


def quantize(weights: NDArray[np.float32], kind: str) -> NDArray[np.uint8]:
    """(rows, bytes of a row) of float32 (rows, width), whose width is a multiple of the block's."""
    import gguf

    type_ = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[type_]
    rows, width = weights.shape
    if width % block:
        raise ValueError(f"rows of {width} are no blocks of {block}")
    source = np.ascontiguousarray(weights, np.float32)
    found = np.zeros((rows, width // block * size), np.uint8)
    written = _library().ggml_quantize_chunk(int(type_), source.ctypes.data, found.ctypes.data, 0, rows, width, None)
    if written != found.nbytes:
        raise ValueError(f"ggml wrote {written} bytes of {kind}, not {found.nbytes}")
    return found


@cache
def _library() -> Any:
    spec = importlib.util.find_spec("xllamacpp")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("ggml's own quantiser comes with the package xllamacpp")
    library = ctypes.CDLL(str(next(Path(spec.submodule_search_locations[0]).glob("xllamacpp*.so"))))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    library.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, integer, integer, integer, pointer]
    return library
