"""The surface of `safetensors.safe_open`, on weights in the room.

Indexing a slice does what safetensors 0.8 does with it, and refuses what it refuses. With torch these are torch's own
rules; with NumPy they are narrower: integers, ascending slices inside the tensor's bounds, and one ellipsis.
"""

from __future__ import annotations

import importlib.util
import operator
import re
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import numpy as np
from numpy.typing import NDArray

from strongroom.errors import UsageError
from strongroom.formats.tensors import TensorInfo
from strongroom.load.arrays import array_shape, torch_view, view
from strongroom.load.device import available
from strongroom.load.weights import Entry, Weights
from strongroom.storage.reader import ImageReader

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    import torch

_FRAMEWORKS = {"np": "numpy", "numpy": "numpy", "pt": "torch", "torch": "torch", "pytorch": "torch"}


class SafeOpen:
    """Open tensors of one version: ``keys``, ``get_tensor``, ``get_slice`` and so on as in safetensors.

    `framework` is ``np``, ``numpy``, ``pt``, ``torch`` or ``pytorch``; `device` ``cpu``, ``cuda``, ``cuda:N`` or N, the
    CPU only for NumPy; `file` limits it to one file of the version, else its tensors go by the names that `Weights` has
    for them. UsageError for what is none of these, and for any access once it is closed.
    """

    def __init__(
        self,
        source: ImageReader | Weights,
        framework: str,
        device: str | int | None = "cpu",
        *,
        file: str | None = None,
    ) -> None:
        found = _FRAMEWORKS.get(framework)
        if found is None:
            raise UsageError("safe_open.framework", f"no framework {framework!r}; there are np, numpy, pt and torch")
        self._device = _device(device)
        if found == "numpy" and self._device != "cpu":
            raise UsageError("safe_open.device", f"NumPy has no device {self._device}", hint='framework="pt"')
        if self._device != "cpu":
            available(self._device)
        self._torch = found == "torch"
        if self._torch and importlib.util.find_spec("torch") is None:
            raise UsageError(
                "safe_open.no_torch", "framework 'pt' needs PyTorch", hint='pip install "strongroom[torch]"'
            )
        reader, only = (source.reader, source.only) if isinstance(source, Weights) else (source, None)
        self._weights = Weights(reader, only=only if file is None else [file])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._weights.close()

    def keys(self) -> list[str]:
        """Names in alphabetical order."""
        return sorted(self._weights)

    def offset_keys(self) -> list[str]:
        """Names in the order of files and of the bytes in them."""
        return list(self._weights)

    def metadata(self) -> dict[str, str] | None:
        """The texts in the headers (``__metadata__``), None where there are none."""
        texts = {key: value for key, value in self._weights.metadata().items() if isinstance(value, str)}
        return texts or None

    def get_tensor(self, name: str) -> Any:
        """One tensor, as the framework has it; NotFound for a name that is none."""
        return Slice(self._weights, self._weights.entry(name), torch=self._torch, device=self._device).whole()

    def get_tensors(self) -> dict[str, Any]:
        """All tensors, read at once."""
        return {**(self._weights.torch(self._device) if self._torch else self._weights.read())}

    def get_slice(self, name: str) -> Slice:
        """One tensor to be indexed; nothing is read before."""
        return Slice(self._weights, self._weights.entry(name), torch=self._torch, device=self._device)


class _Part(NamedTuple):
    """What of a tensor has to be read for an index: one stretch of elements, their shape, and the index into that."""

    begin: int
    shape: tuple[int, ...]
    index: Any


class Slice:
    """A tensor that is read when indexed: only the segments that hold the rows it takes."""

    def __init__(self, weights: Weights, entry: Entry, *, torch: bool, device: str) -> None:
        self._weights, self._entry, self._torch, self._device = weights, entry, torch, device
        self._item = entry.info.size // max(1, prod(entry.info.shape))

    def get_shape(self) -> list[int]:
        return list(self._entry.info.shape)

    def get_dtype(self) -> str:
        """The safetensors name, such as ``BF16``."""
        return self._entry.info.dtype.name

    def __getitem__(self, index: Any) -> Any:
        """The indexed part, on the device. UsageError ``slice.index`` for an index that is refused."""
        if array_shape(self._entry.info) != self._entry.info.shape:
            if index is Ellipsis or (isinstance(index, tuple) and len(index) == 0):
                return self.whole()
            raise UsageError(
                "slice.packed", f"tensors of type {self.get_dtype()} have several elements in a byte; read it whole"
            )
        return self._torch_part(index) if self._torch else self._numpy_part(index)

    def whole(self) -> Any:
        """The whole tensor."""
        entry = self._entry
        buffer = self._weights.read_bytes(entry.begin, entry.end)
        return torch_view(entry.info, buffer).to(self._device) if self._torch else view(entry.info, buffer)

    def _torch_part(self, index: Any) -> torch.Tensor:
        shape = self._entry.info.shape
        part = _leading(shape, index)
        piece = torch_view(self._info(part), self._read(part))
        try:
            taken: torch.Tensor = piece[part.index]
        except (IndexError, TypeError, ValueError, RuntimeError) as error:
            _refuse(index, shape, str(error).splitlines()[0])
        if taken.numel() != piece.numel():
            taken = taken.clone()  # a view would keep all that was read alive
        return taken.to(self._device)

    def _numpy_part(self, index: Any) -> NDArray[Any]:
        shape = self._entry.info.shape
        part = _leading(shape, _bounded(shape, index))
        piece = view(self._info(part), self._read(part))
        taken: NDArray[Any] = np.asarray(piece[part.index])
        return taken.copy() if taken.size != piece.size else taken

    def _info(self, part: _Part) -> TensorInfo:
        """What `part` holds, as a tensor of its own."""
        info = self._entry.info
        return TensorInfo(info.name, info.dtype, part.shape, 0, prod(part.shape) * self._item)

    def _read(self, part: _Part) -> memoryview:
        begin = self._entry.begin + part.begin * self._item
        return self._weights.read_bytes(begin, begin + prod(part.shape) * self._item)


def _leading(shape: tuple[int, ...], index: Any) -> _Part:
    """Narrow to what the integers, and one slice, at the front of an index leave; the rest is for the array itself."""
    items = index if isinstance(index, tuple) else (index,)
    begin, taken = 0, 0
    for item in items[: len(shape)]:
        if not _is_integer(item):
            break
        size = shape[taken]
        at = operator.index(item)
        if not -size <= at < size:
            _refuse(index, shape, f"{at} is out of bounds for dimension {taken} of size {size}")
        begin += at % size * prod(shape[taken + 1 :])
        taken += 1
    rest, left = items[taken:], shape[taken:]
    if rest and left and isinstance(rest[0], slice):
        try:
            start, stop, step = rest[0].indices(left[0])
        except (TypeError, ValueError) as error:
            _refuse(index, shape, str(error))
        if step <= 0:
            _refuse(index, shape, "a slice's step must be a positive integer")
        count = len(range(start, stop, step))
        stop = start + (count - 1) * step + 1 if count else start
        begin += start * prod(left[1:])
        return _Part(begin, (stop - start, *left[1:]), (slice(None, None, step), *rest[1:]))
    return _Part(begin, left, rest if isinstance(index, tuple) or taken else index)


def _is_integer(item: Any) -> bool:
    # A truth value, and an array of some dimensions, index in ways of their own.
    return hasattr(item, "__index__") and not isinstance(item, bool | np.bool_) and not getattr(item, "ndim", 0)


def _bounded(shape: tuple[int, ...], index: Any) -> tuple[int | slice, ...]:
    """The index that safetensors takes for NumPy, with its ellipsis spelt out; UsageError for others."""
    if isinstance(index, list) and not index:
        index = slice(0, 0)
    items = list(index) if isinstance(index, tuple) else [index]
    dots = [position for position, item in enumerate(items) if item is Ellipsis]
    if len(dots) > 1:
        _refuse(index, shape, "more than one ellipsis")
    if dots:
        missing = max(0, len(shape) - len(items) + 1)
        items[dots[0] : dots[0] + 1] = [slice(None)] * missing
    if len(items) > len(shape):
        _refuse(index, shape, "more indices than dimensions")
    return tuple(_one(item, size, index, shape) for item, size in zip(items, shape, strict=False))


def _one(item: Any, size: int, index: Any, shape: tuple[int, ...]) -> int | slice:
    if isinstance(item, slice):
        try:
            start, stop, step = (
                default if part is None else operator.index(part)
                for part, default in ((item.start, 0), (item.stop, size), (item.step, 1))
            )
        except TypeError as error:
            _refuse(index, shape, str(error))
        if step <= 0:
            _refuse(index, shape, f"a slice's step must be a positive integer, not {step}")
        # Unlike NumPy, safetensors takes no bounds from the end, and none outside.
        if not 0 <= start <= stop <= size or start >= size:
            _refuse(index, shape, f"{start}:{stop} is not inside a dimension of size {size}")
        return slice(start, stop, step)
    try:
        at = operator.index(item)
    except TypeError:
        _refuse(index, shape, "an index is an integer, a slice or an ellipsis")
    if not -size <= at < size:
        _refuse(index, shape, f"{at} is out of bounds for a dimension of size {size}")
    return at


def _refuse(index: Any, shape: tuple[int, ...], why: str) -> NoReturn:
    text = re.sub(r"\s+", " ", repr(index))[:80]
    raise UsageError("slice.index", f"can't index a tensor of shape {list(shape)} with {text}: {why}") from None


def _device(device: str | int | None) -> str:
    """``cpu`` or a CUDA device, under torch's name for it."""
    if device is None:
        return "cpu"
    if type(device) is int and device >= 0:
        return f"cuda:{device}"
    if isinstance(device, str) and re.fullmatch(r"cpu|cuda(:[0-9]{1,3})?", device, re.ASCII):
        return device
    raise UsageError("safe_open.device", f"no device {device!r}; there are cpu, cuda, cuda:N and N")
