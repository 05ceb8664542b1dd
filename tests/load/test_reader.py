"""Ranges, buffers and threads of the reader: what is asked for beyond the image, and what is left when one fails."""

from __future__ import annotations

import mmap
import resource
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from strongroom.errors import LimitExceeded, UsageError
from strongroom.storage import reader as reader_module
from strongroom.storage.reader import abreast, anonymous


@pytest.fixture
def reader(tmp_path, make_reader):
    folder = tmp_path / "model"
    folder.mkdir()
    values = np.random.default_rng(5).normal(0, 0.05, (1024, 512)).astype(np.float16)
    save_file({"w": values}, folder / "model.safetensors")
    return make_reader(folder)


def test_ranges_of_the_image_are_the_image(reader):
    whole, end = bytes(reader.read_all()), reader.layout.image
    for begin, stop in ((0, end), (0, 0), (end, end), (end - 1, end), (4095, 70001)):
        assert bytes(reader.read(begin, stop)) == whole[begin:stop]


@pytest.mark.parametrize("where", ["before", "backwards", "across the end", "after the end", "far away"])
def test_beyond_the_image_nothing_is_made_up(reader, where):
    size = reader.layout.image
    begin, end = {
        "before": (-1, 10),
        "backwards": (10, 9),
        "across the end": (size - 1, size + 1),
        "after the end": (size + 1, size + 1),
        "far away": (1 << 70, (1 << 70) + 1),
    }[where]
    with pytest.raises(UsageError) as caught:
        reader.read(begin, end)
    assert caught.value.code == "read.range"
    if end > begin:
        out = bytearray(b"x" * (end - begin))
        with pytest.raises(UsageError) as caught:
            reader.read_range(begin, memoryview(out))
        assert caught.value.code == "read.range"
        assert out == b"x" * len(out)


def test_a_buffer_of_other_items_is_filled_as_bytes(reader):
    whole, size = bytes(reader.read_all()), reader.layout.image
    assert size % 8 == 0
    for dtype, shape in (("<u8", (size // 8,)), ("<f4", (2, size // 8))):
        out = np.zeros(shape, dtype)
        reader.read_into(out.data)
        assert out.tobytes() == whole
    out = np.zeros(512, "<f4")
    reader.read_range(4096, out.data)
    assert out.tobytes() == whole[4096 : 4096 + 2048]
    reader.read_range(4096, np.zeros((0, 3), "<f4").data)


def test_a_buffer_that_cannot_be_filled_is_refused(reader):
    size = reader.layout.image
    for out in (memoryview(bytes(size)), memoryview(bytearray(2 * size))[::2]):
        for read in (reader.read_into, lambda out: reader.read_range(0, out)):
            with pytest.raises(UsageError) as caught:
                read(out)
            assert caught.value.code == "read.buffer"


def test_a_kernel_without_huge_pages_reads_all_the_same(reader, monkeypatch):
    whole = bytes(reader.read_all())
    monkeypatch.setattr(mmap, "MADV_HUGEPAGE", 12345)  # advice that no kernel knows
    with pytest.raises(OSError, match="Invalid argument"):
        mmap.mmap(-1, 4096).madvise(mmap.MADV_HUGEPAGE)
    assert bytes(reader.read_all()) == whole


def test_memory_that_the_machine_has_not_got(reader):
    for size in (1 << 55, 1 << 70):
        with pytest.raises(LimitExceeded) as caught:
            anonymous(size)
        assert caught.value.code == "read.memory"
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * mmap.PAGESIZE
    resource.setrlimit(resource.RLIMIT_AS, (used + 1024, before[1]))
    try:
        with pytest.raises(LimitExceeded):
            anonymous(1 << 26)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


class _Threads:
    """threading.Thread whose start or join goes wrong once, at the `at`-th call in this test."""

    def __init__(self, monkeypatch, method, at, error, *, after):
        self.calls = 0
        original = getattr(threading.Thread, method)

        def wrong(thread, *arguments):
            if thread.name != "strongroom-read":
                return original(thread, *arguments)
            self.calls += 1
            if self.calls != at:
                return original(thread, *arguments)
            if after:
                original(thread, *arguments)
            raise error

        monkeypatch.setattr(threading.Thread, method, wrong)


def _alive():
    return [thread for thread in threading.enumerate() if thread.name == "strongroom-read"]


def test_with_fewer_threads_than_wanted_those_do_it(monkeypatch):
    _Threads(monkeypatch, "start", 3, RuntimeError("can't start new thread"), after=False)
    seen = set()
    barrier = threading.Barrier(3)  # this thread, and the two that started

    def run():
        seen.add(threading.get_ident())
        barrier.wait(30)

    abreast(run, 8, [])
    assert len(seen) == 3
    assert _alive() == []


@pytest.mark.parametrize(
    ("method", "at", "after"), [("start", 2, True), ("start", 2, False), ("join", 1, False), ("join", 1, True)]
)
def test_no_thread_outlives_an_interrupt(monkeypatch, method, at, after):
    """Ctrl-C while threads are started or waited for: they stop, and are waited for all the same."""
    _Threads(monkeypatch, method, at, KeyboardInterrupt(), after=after)
    failures = []
    main = threading.current_thread()
    ended = []

    def run():
        if threading.current_thread() is main:
            return
        deadline = time.monotonic() + (60 if not after or method == "start" else 0.05)
        while not failures and time.monotonic() < deadline:
            time.sleep(0.001)
        ended.append(threading.get_ident())

    with pytest.raises(KeyboardInterrupt):
        abreast(run, 4, failures)
    assert _alive() == []
    assert failures
    assert ended


def test_a_failure_stops_all_and_is_raised():
    failures = []

    def run():
        if threading.current_thread().name == "strongroom-read":
            raise ValueError("first")
        while not failures:
            pass

    with pytest.raises(ValueError, match="first"):
        abreast(run, 3, failures)
    assert _alive() == []


def test_interrupted_in_the_middle_the_buffer_stays_wiped(reader, monkeypatch):
    """The join is interrupted, as by Ctrl-C: what the threads had read is wiped, and nothing comes after that."""
    monkeypatch.setattr(reader_module, "_STRETCH", 64 * 1024)
    _Threads(monkeypatch, "join", 1, KeyboardInterrupt(), after=False)
    reader._workers = 8
    hold = threading.Event()
    original = reader_module._common

    def slow(revision, number, window, scratch):
        if threading.current_thread().name == "strongroom-read":
            hold.wait(0.2)
        original(revision, number, window, scratch)

    monkeypatch.setattr(reader_module, "_common", slow)
    out = np.ones(reader.layout.image, np.uint8)
    with pytest.raises(KeyboardInterrupt):
        reader.read_into(out.data)
    assert _alive() == []
    assert not out.any()
