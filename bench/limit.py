"""The machine's limits: the same bytes read into fresh memory by all cores, without and with bare cryptography."""

from __future__ import annotations

import mmap
import os
import secrets
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bench.model import header
from bench.reader import Reader, Setting, shards

Range = tuple[Path, int, int, int]
"""A file, an offset in it, where that goes in memory, and bytes."""
Piece = tuple[int, int, memoryview]
"""A descriptor, an offset in its file, and where the bytes go."""
SEALED = 1 << 20
TAG = 16


class Limit(Reader):
    """pread into fresh anonymous memory with MADV_HUGEPAGE; the tensors are views over it."""

    name = "limit"
    title = "machine's limit (pread into huge pages, no cryptography)"
    own_form = False
    operations = frozenset({"load", "tensor"})
    settings = ({"chunk": 1 << 20}, {"chunk": 2 << 20}, {"chunk": 8 << 20})

    def load(self, directory: Path, place: Path, setting: Setting) -> Mapping[str, Any]:
        ranges, views, size = _image(directory)
        return _tensors(views, _read(ranges, size, setting["chunk"], lambda: _pread))

    def tensor(self, directory: Path, place: Path, name: str, setting: Setting) -> Any:
        for file in shards(directory):
            base, entries = header(file)
            if name in entries:
                start, end = entries[name]["data_offsets"]
                whole: list[Range] = [(file, base + start, 0, end - start)]
                memory = _read(whole, end - start, setting["chunk"], lambda: _pread)
                return np.frombuffer(memory, np.uint16, (end - start) // 2).reshape(entries[name]["shape"])
        raise KeyError(name)


class Floor(Reader):
    """What AES-256-GCM and BLAKE3 cost at least: pieces of 1 MiB, hashed and decrypted, with no format and no marks."""

    name = "floor"
    title = "bare cryptography (the limit + BLAKE3 + AES-256-GCM, no format, no marks)"
    operations = frozenset({"load"})

    def prepare(self, place: Path) -> None:
        import blake3  # noqa: F401
        import cryptography.hazmat.primitives.ciphers.aead  # noqa: F401

    def put(self, staged: Any, place: Path) -> None:
        from blake3 import blake3
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        key = secrets.token_bytes(32)
        (place / "key").write_bytes(key)
        with (place / "sealed").open("wb") as sealed, (place / "digests").open("wb") as digests:
            for file, offset, _, size in _image(staged)[0]:
                with file.open("rb") as source:
                    source.seek(offset)
                    for begin in range(0, size, SEALED):
                        plain = source.read(min(SEALED, size - begin))
                        piece = AESGCM(key).encrypt(sealed.tell().to_bytes(12, "little"), plain, None)
                        sealed.write(piece)
                        digests.write(blake3(piece).digest())

    def load(self, directory: Path, place: Path, setting: Setting) -> Mapping[str, Any]:
        from blake3 import blake3
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        ranges, views, size = _image(directory)
        sealed, digests, places = place / "sealed", (place / "digests").read_bytes(), []
        aead, numbers, offset = AESGCM((place / "key").read_bytes()), {}, 0
        for _, _, at, length in ranges:
            for begin in range(0, length, SEALED):
                plain = min(SEALED, length - begin)
                numbers[offset] = len(numbers)
                places.append((sealed, offset, at + begin, plain))
                offset += plain + TAG

        def opener() -> Callable[[Piece], None]:
            scratch = memoryview(bytearray(SEALED + TAG))

            def take(piece: Piece) -> None:
                descriptor, begin, out = piece
                private = scratch[: len(out) + TAG]
                _pread((descriptor, begin, private))
                at = 32 * numbers[begin]
                if blake3(private).digest() != digests[at : at + 32]:
                    raise ValueError("a piece is not the one that was sealed")
                aead.decrypt_into(begin.to_bytes(12, "little"), private, None, out)

            return take

        return _tensors(views, _read(places, size, SEALED, opener))


def _image(directory: Path) -> tuple[list[Range], dict[str, Any], int]:
    """All tensors in one stretch of memory: where each file's go, where each tensor lies, and how long it is."""
    ranges: list[Range] = []
    views, at = {}, 0
    for file in shards(directory):
        base, entries = header(file)
        size = max(entry["data_offsets"][1] for entry in entries.values())
        ranges.append((file, base, at, size))
        for name, entry in entries.items():
            start, end = entry["data_offsets"]
            views[name] = (at + start, at + end, entry["shape"])
        at += -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    return ranges, views, at


def _tensors(views: Mapping[str, Any], memory: mmap.mmap) -> Mapping[str, Any]:
    return {
        name: np.frombuffer(memory, np.uint16, (end - start) // 2, start).reshape(shape)
        for name, (start, end, shape) in views.items()
    }


def _read(ranges: list[Range], size: int, chunk: int, taker: Callable[[], Callable[[Piece], None]]) -> mmap.mmap:
    """Fill `size` bytes of fresh memory, a thread a core; each thread has a function of its own that takes a piece."""
    # Private: shared anonymous memory is a file in tmpfs to the kernel, which gives that no huge pages by default.
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    view = memoryview(memory)
    descriptors = {file: os.open(file, os.O_RDONLY) for file, _, _, _ in ranges}
    queue = iter(
        (descriptors[file], offset + n, view[at + n : at + n + min(chunk, length - n)])
        for file, offset, at, length in ranges
        for n in range(0, length, chunk)
    )
    lock = threading.Lock()
    failures: list[Exception] = []

    def work() -> None:
        take = taker()
        try:
            while True:
                with lock:
                    piece = next(queue, None)
                if piece is None:
                    return
                take(piece)
        except Exception as error:  # noqa: BLE001 - raised again by the thread that waits
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(len(os.sched_getaffinity(0)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for descriptor in descriptors.values():
        os.close(descriptor)
    if failures:
        raise failures[0]
    return memory


def _pread(piece: Piece) -> None:
    descriptor, offset, out = piece
    done = 0
    while done < len(out):
        got = os.preadv(descriptor, [out[done:]], offset + done)
        if got == 0:
            raise OSError(f"file ended {len(out) - done} bytes early")
        done += got
