"""The machine's limit: the same bytes read into fresh memory by all cores, with no format and no cryptography."""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bench.model import header
from bench.reader import Reader, Setting, shards


class Limit(Reader):
    """pread into fresh anonymous memory with MADV_HUGEPAGE; the tensors are views over it."""

    name = "limit"
    title = "machine's limit (pread into huge pages, no cryptography)"
    own_form = False
    operations = frozenset({"load", "tensor"})
    settings = ({"chunk": 1 << 20}, {"chunk": 2 << 20}, {"chunk": 8 << 20})

    def load(self, directory: Path, place: Path, setting: Setting) -> Mapping[str, Any]:
        ranges, views, at = [], {}, 0
        for file in shards(directory):
            base, entries = header(file)
            size = max(entry["data_offsets"][1] for entry in entries.values())
            ranges.append((file, base, at, size))
            for name, entry in entries.items():
                start, end = entry["data_offsets"]
                views[name] = (at + start, at + end, entry["shape"])
            at += -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        memory = _read(ranges, at, setting["chunk"])
        return {
            name: np.frombuffer(memory, np.uint16, (end - start) // 2, start).reshape(shape)
            for name, (start, end, shape) in views.items()
        }

    def tensor(self, directory: Path, place: Path, name: str, setting: Setting) -> Any:
        for file in shards(directory):
            base, entries = header(file)
            if name in entries:
                start, end = entries[name]["data_offsets"]
                memory = _read([(file, base + start, 0, end - start)], end - start, setting["chunk"])
                return np.frombuffer(memory, np.uint16, (end - start) // 2).reshape(entries[name]["shape"])
        raise KeyError(name)


def _read(ranges: list[tuple[Path, int, int, int]], size: int, chunk: int) -> mmap.mmap:
    """Fill `size` bytes of fresh memory from (file, offset in it, offset in memory, bytes), a thread a core."""
    # Private: shared anonymous memory is a file in tmpfs to the kernel, which gives that no huge pages by default.
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    view = memoryview(memory)
    pieces: list[tuple[int, int, int, int]] = []
    for file, offset, at, length in ranges:
        descriptor = os.open(file, os.O_RDONLY)
        pieces += [(descriptor, offset + n, at + n, min(chunk, length - n)) for n in range(0, length, chunk)]
    queue = iter(pieces)
    lock = threading.Lock()
    failures: list[OSError] = []

    def work() -> None:
        try:
            while True:
                with lock:
                    piece = next(queue, None)
                if piece is None:
                    return
                descriptor, offset, at, length = piece
                done = 0
                while done < length:
                    got = os.preadv(descriptor, [view[at + done : at + length]], offset + done)
                    if got == 0:
                        raise OSError(f"file ended {length - done} bytes early")
                    done += got
        except OSError as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(len(os.sched_getaffinity(0)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for descriptor in {piece[0] for piece in pieces}:
        os.close(descriptor)
    if failures:
        raise failures[0]
    return memory
