"""Tensors on another device than the CPU: each byte is decrypted into a pinned buffer and copied from there, once.

Two buffers take turns, so that one is filled while the other is on its way. Host memory is these two buffers, whatever
the size of the model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from strongroom.core.limits import MIB
from strongroom.errors import UsageError
from strongroom.load.arrays import shaped

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

    from strongroom.formats.layout import Layout
    from strongroom.load.weights import Entry, Weights

_WINDOW = 64 * MIB


def to_device(weights: Weights, device: str | torch.device, *, window: int = _WINDOW) -> dict[str, torch.Tensor]:
    """All tensors of `weights` on `device`. UsageError ``device.unavailable`` when torch has no such device."""
    import torch

    target = available(device)
    tensors = {
        name: torch.empty(entry.info.size, dtype=torch.uint8, device=target) for name, entry in weights.entries.items()
    }
    stage = _Stage(target, min(window, max(1, weights.nbytes)) + weights.reader.layout.common)
    pending = sorted(weights.entries.items(), key=lambda item: item[1].begin)
    for begin, end in _windows(weights.reader.layout, window):
        while pending and pending[0][1].end <= begin:
            pending.pop(0)
        touched = [(name, entry) for name, entry in _until(pending, end) if entry.end > begin]
        if not touched:
            continue
        low, high = max(begin, touched[0][1].begin), min(end, touched[-1][1].end)
        host = stage.take(high - low)
        weights.reader.read_range(low, host.numpy().data)
        for name, entry in touched:
            first, last = max(low, entry.begin), min(high, entry.end)
            piece = tensors[name][first - entry.begin : last - entry.begin]
            piece.copy_(host[first - low : last - low], non_blocking=True)
        stage.sent()
    stage.finish()
    return {name: shaped(weights.entry(name).info, raw) for name, raw in tensors.items()}


def available(device: str | torch.device) -> torch.device:
    """The device of that name; UsageError ``device.unavailable`` when torch can't put a tensor on it."""
    import torch

    try:
        found = torch.device(device)
        torch.empty(1, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError("device.unavailable", f"torch can't use the device {str(device)!r}: {reason}") from None
    return found


def _windows(layout: Layout, size: int) -> Iterator[tuple[int, int]]:
    """Stretches of the image of about `size` bytes that begin and end between two segments: none is decrypted twice."""
    starts = [int(start) for start in layout.common_starts]
    begin = 0
    for start in [*starts[1:], layout.image]:
        if start - begin >= size or start == layout.image:
            yield begin, start
            begin = start


def _until(pending: list[tuple[str, Entry]], end: int) -> Iterator[tuple[str, Entry]]:
    for item in pending:
        if item[1].begin >= end:
            return
        yield item


class _Stage:
    """Two host buffers, pinned where the device copies from them by itself."""

    def __init__(self, device: torch.device, size: int) -> None:
        import torch

        self._asynchronous = device.type == "cuda"
        self._device, self._torch, self._turn = device, torch, 0
        self._buffers: list[torch.Tensor | None] = [None, None]
        self._events: list[torch.cuda.Event | None] = [None, None]
        self._size = size

    def take(self, size: int) -> torch.Tensor:
        """A buffer of `size` bytes, once what was in it has arrived."""
        event = self._events[self._turn]
        if event is not None:
            event.synchronize()
        buffer = self._buffers[self._turn]
        if buffer is None or buffer.numel() < size:
            buffer = self._torch.empty(max(size, self._size), dtype=self._torch.uint8, pin_memory=self._asynchronous)
            self._buffers[self._turn] = buffer
        return buffer[:size]

    def sent(self) -> None:
        """The copies out of the buffer last taken are under way."""
        if self._asynchronous:
            self._events[self._turn] = self._torch.cuda.current_stream(self._device).record_event()
        self._turn = 1 - self._turn

    def finish(self) -> None:
        """Wait for all copies, then overwrite the plaintext: torch keeps pinned memory for later use by anybody."""
        for event, buffer in zip(self._events, self._buffers, strict=True):
            if event is not None:
                event.synchronize()
            if buffer is not None:
                buffer.zero_()
