"""Bytes of a tensor as an array of NumPy or torch, in place.

Element types go by their safetensors names. bf16 and the float8 types are those of `ml_dtypes` in NumPy. What has no
element type of its own there (ggml's quantised blocks, FP4 and FP6) is given as uint8: one row of bytes for each row of
elements.
"""

from __future__ import annotations

from math import prod
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from strongroom.formats.tensors import TensorInfo

if TYPE_CHECKING:
    import torch

_NUMPY = MappingProxyType(
    {
        "BOOL": "?",
        "U8": "<u1",
        "I8": "<i1",
        "U16": "<u2",
        "I16": "<i2",
        "U32": "<u4",
        "I32": "<i4",
        "U64": "<u8",
        "I64": "<i8",
        "F16": "<f2",
        "F32": "<f4",
        "F64": "<f8",
        "C64": "<c8",
    }
)
_ML_DTYPES = MappingProxyType(
    {
        "BF16": "bfloat16",
        "F8_E4M3": "float8_e4m3fn",
        "F8_E5M2": "float8_e5m2",
        "F8_E8M0": "float8_e8m0fnu",
        "F8_E4M3FNUZ": "float8_e4m3fnuz",
        "F8_E5M2FNUZ": "float8_e5m2fnuz",
    }
)
_TORCH = MappingProxyType(
    {
        "BOOL": "bool",
        "U8": "uint8",
        "I8": "int8",
        "U16": "uint16",
        "I16": "int16",
        "U32": "uint32",
        "I32": "int32",
        "U64": "uint64",
        "I64": "int64",
        "F16": "float16",
        "F32": "float32",
        "F64": "float64",
        "C64": "complex64",
        "F4": "float4_e2m1fn_x2",  # two elements a byte, and a shape to match
        **_ML_DTYPES,
    }
)


def has_elements(dtype: str) -> bool:
    """Whether tensors of this type become arrays of their own shape, and not of raw bytes."""
    return dtype in _NUMPY or dtype in _ML_DTYPES


def numpy_dtype(dtype: str) -> np.dtype[Any]:
    """The NumPy dtype for a safetensors or ggml type name; uint8 where there is none."""
    if dtype in _ML_DTYPES:
        import ml_dtypes

        found: np.dtype[Any] = np.dtype(getattr(ml_dtypes, _ML_DTYPES[dtype]))
        return found
    return np.dtype(_NUMPY.get(dtype, "<u1"))


def array_shape(info: TensorInfo) -> tuple[int, ...]:
    """The shape of the NumPy array of a tensor: its own, or bytes in the last place where elements are packed."""
    return info.shape if has_elements(info.dtype.name) else _byte_shape(info)


def view(info: TensorInfo, buffer: memoryview, offset: int = 0) -> NDArray[Any]:
    """The tensor whose bytes begin at `offset` of `buffer`, without a copy; writable if the buffer is."""
    if info.size == 0:
        return np.empty(array_shape(info), numpy_dtype(info.dtype.name))
    return np.ndarray(array_shape(info), numpy_dtype(info.dtype.name), buffer, offset)


def torch_dtype(dtype: str) -> torch.dtype:
    """The torch dtype for a safetensors or ggml type name; uint8 where this torch has none."""
    import torch

    found: torch.dtype = getattr(torch, _TORCH.get(dtype, "uint8"), torch.uint8)
    return found


def torch_view(info: TensorInfo, buffer: memoryview, offset: int = 0) -> torch.Tensor:
    """As `view`, for torch. A tensor that does not lie at a multiple of its element's size is copied: torch's kernels
    may read such a one wrongly or not at all."""
    import torch

    if info.size == 0:
        return torch.empty(_torch_shape(info), dtype=torch_dtype(info.dtype.name))
    raw = torch.frombuffer(buffer, dtype=torch.uint8, count=info.size, offset=offset)
    if raw.data_ptr() % torch_dtype(info.dtype.name).itemsize:
        raw = raw.clone()
    return shaped(info, raw)


def shaped(info: TensorInfo, raw: torch.Tensor) -> torch.Tensor:
    """uint8 (bytes,) on any device, seen as the tensor that these bytes are."""
    return raw.view(torch_dtype(info.dtype.name)).reshape(_torch_shape(info))


def _torch_shape(info: TensorInfo) -> tuple[int, ...]:
    if info.dtype.name == "F4" and torch_dtype("F4").is_floating_point and info.shape[-1:] and info.shape[-1] % 2 == 0:
        return (*info.shape[:-1], info.shape[-1] // 2)
    return array_shape(info)


def _byte_shape(info: TensorInfo) -> tuple[int, ...]:
    rows = prod(info.shape[:-1])
    if rows and info.size % rows == 0 and info.shape:
        return (*info.shape[:-1], info.size // rows)
    return (info.size,)
