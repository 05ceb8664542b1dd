"""The child process that reads a pickle of tensors: loaded by `strongroom.vault.convert`, in a process of its own.

It says which tensors the file holds; the parent, which believes nothing, sizes the memory file and says where the
tensors go; the child copies them there. It can write nowhere else.
"""

from __future__ import annotations

import contextlib
import importlib
import mmap
import os
import re
from typing import Any

from strongroom.vault.child import Confined

DTYPES = {
    "torch.bool": "BOOL",
    "torch.uint8": "U8",
    "torch.int8": "I8",
    "torch.int16": "I16",
    "torch.uint16": "U16",
    "torch.int32": "I32",
    "torch.uint32": "U32",
    "torch.int64": "I64",
    "torch.uint64": "U64",
    "torch.float16": "F16",
    "torch.bfloat16": "BF16",
    "torch.float32": "F32",
    "torch.float64": "F64",
    "torch.complex64": "C64",
    "torch.float8_e4m3fn": "F8_E4M3",
    "torch.float8_e5m2": "F8_E5M2",
    "torch.float8_e4m3fnuz": "F8_E4M3FNUZ",
    "torch.float8_e5m2fnuz": "F8_E5M2FNUZ",
    "torch.float8_e8m0fnu": "F8_E8M0",
}
# Where trainers put the weights beside what they need to resume.
_NESTED = ("state_dict", "model_state_dict", "model")


class _Unfit(Exception):
    """The file holds something that safetensors has no form for."""


def main(source: int, memory: int, allowance: int, cpu_seconds: int) -> None:
    """Read the pickle at descriptor `source` into the memory file `memory`; talk on standard input and output."""
    parent = Confined()
    try:
        torch = importlib.import_module("torch")
    except Exception as error:  # noqa: BLE001  # a broken torch raises anything
        parent.answer(error="no_torch", message=f"{type(error).__name__}: {error}")
        return
    torch.set_num_threads(1)
    if not parent.enter(memory=allowance, seconds=cpu_seconds):
        return
    try:
        tensors = _tensors(torch, _load(torch, source))
        parent.answer(tensors=[[name, DTYPES[str(tensor.dtype)], list(tensor.shape)] for name, tensor in tensors])
        _copy(torch, tensors, memory, next(parent.asked()))
        parent.answer(done=True)
    except _Unfit as error:
        parent.answer(error="unfit", message=str(error))
    except MemoryError:
        parent.answer(error="memory", message="it needs more memory than its size explains")
    except Exception as error:  # noqa: BLE001  # what torch raises on bad bytes is not documented
        kind = "refused" if type(error).__name__ == "UnpicklingError" else "unreadable"
        if "Unsupported operand" in str(
            error
        ):  # an opcode of pickle's protocol 4 or 5: it may hold nothing but tensors
            kind = "protocol"
        parent.answer(error=kind, message=str(error)[:10_000], wants=_wanted(str(error)))


def _wanted(message: str) -> str:
    """The function or class that torch's message says it would not call."""
    found = re.search(r"(?:GLOBAL|Unsupported global: GLOBAL|class) ([\w.]+)", message)
    return found[1] if found else ""


def _load(torch: Any, source: int) -> Any:
    options = {"map_location": "cpu", "weights_only": True}
    with contextlib.suppress(PermissionError, RuntimeError, ValueError):
        # Mapped, tensors are read when they are copied. Archives only, and only where the file may be opened again
        # under this process's reduced rights; all others are read in whole, below, which also says what is wrong.
        return torch.load(f"/proc/self/fd/{source}", mmap=True, **options)
    with os.fdopen(os.dup(source), "rb") as stream:
        stream.seek(0)
        return torch.load(stream, **options)


def _tensors(torch: Any, loaded: Any) -> list[tuple[str, Any]]:
    """Names and tensors, wide elements first, so that each is aligned; tied ones are each written out."""
    for key in _NESTED:
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
    if not isinstance(loaded, dict):
        raise _Unfit(f"it holds a {type(loaded).__name__}, not tensors by name")
    for name, tensor in loaded.items():
        if type(name) is not str:
            raise _Unfit(f"a tensor's name is a {type(name).__name__}")
        if not isinstance(tensor, torch.Tensor):
            raise _Unfit(f"{name!r} is a {type(tensor).__name__}, not a tensor")
        if tensor.layout is not torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
            raise _Unfit(f"{name!r} is a sparse, quantised or empty-shelled tensor, for which safetensors has no form")
        if str(tensor.dtype) not in DTYPES:
            raise _Unfit(f"{name!r} has elements of {tensor.dtype}, for which safetensors has no form")
    return sorted(loaded.items(), key=lambda item: (-item[1].element_size(), item[0]))


def _copy(torch: Any, tensors: list[tuple[str, Any]], memory: int, place: dict[str, int]) -> None:
    with mmap.mmap(memory, place["size"]) as target:
        begin = place["begin"]
        for _, tensor in tensors:
            count = tensor.numel()
            if count:
                window = torch.frombuffer(target, dtype=tensor.dtype, count=count, offset=begin)
                window.view(tensor.shape).copy_(tensor.detach().resolve_conj().resolve_neg())
                del window  # a mapping that is still viewed cannot be closed
            begin += count * tensor.element_size()
