"""`SafeOpen` beside the real `safetensors.safe_open`, on the same file: the same answers, and the same refusals."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import ml_dtypes  # noqa: F401 - safetensors finds bfloat16 in NumPy only once this was imported
import numpy as np
import pytest
import safetensors
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from load.conftest import Room
from strongroom.errors import NotFound, StrongroomError, UsageError
from strongroom.load.safe_open import SafeOpen
from strongroom.load.weights import Weights

SHAPES = [(), (1,), (5,), (0,), (3, 4), (2, 0, 3), (4, 3, 2), (1, 1, 1, 2), (7, 130), (40, 6)]
DTYPES = [torch.float32, torch.bfloat16, torch.int8, torch.int64]


@pytest.fixture(scope="module")
def both(tmp_path_factory) -> Callable[[str], tuple[SafeOpen, safetensors.safe_open]]:
    """For a framework: ours and theirs, open on one file without marks."""
    folder = tmp_path_factory.mktemp("safe_open")
    generator = torch.Generator().manual_seed(5)
    tensors = {
        f"{number}.{str(dtype).removeprefix('torch.')}": torch.randint(-100, 100, shape, generator=generator).to(dtype)
        for number, shape in enumerate(SHAPES)
        for dtype in DTYPES
    }
    save_file(tensors, folder / "model.safetensors", {"format": "pt", "by": "ana"})
    room = Room(folder / "room")
    reader = room.reader(room.put(folder / "model.safetensors", share="0"))
    frameworks = ("np", "pt")
    opened = {
        framework: (SafeOpen(reader, framework), safetensors.safe_open(folder / "model.safetensors", framework))
        for framework in frameworks
    }
    yield opened.__getitem__
    room.vault.close()


NAMES = [f"{number}.{str(dtype).removeprefix('torch.')}" for number in range(len(SHAPES)) for dtype in DTYPES]
BOUNDS = st.one_of(st.none(), st.integers(-8, 8))
SLICES = st.builds(slice, BOUNDS, BOUNDS, st.one_of(st.none(), st.integers(-1, 4)))
ITEMS = st.one_of(
    st.integers(-6, 6),
    st.integers(-6, 6).map(np.int64),
    SLICES,
    SLICES,
    st.just(slice(None)),
    st.just(...),
    st.none(),
    st.booleans(),
    st.lists(st.integers(-4, 4), max_size=3),
    st.just(1.0),
)
INDICES = st.one_of(ITEMS, st.lists(ITEMS, max_size=4).map(tuple))


def outcome(indexed: Callable[[], object], refusals: type[Exception] | tuple[type[Exception], ...]) -> object:
    """(shape, dtype, bytes), or that it was refused."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch deprecates some of what is tried here
            found = indexed()
    except refusals:
        return "refused"
    if isinstance(found, torch.Tensor):
        flat = found.reshape(-1).clone(memory_format=torch.contiguous_format)
        return tuple(found.shape), found.dtype, flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
    assert isinstance(found, np.ndarray | np.generic)
    return found.shape, found.dtype, found.tobytes()


def descending(item: object) -> bool:
    return isinstance(item, slice) and item.stop is not None and (item.start or 0) > item.stop


@pytest.mark.parametrize("framework", ["np", "pt"])
@settings(max_examples=800)
@example(name="6.bfloat16", index=(slice(1, 3), 0))
@example(name="6.bfloat16", index=(0, slice(None), [0, 1]))
@example(name="6.bfloat16", index=slice(-3, -1))
@example(name="3.float32", index=...)
@example(name="0.float32", index=())
@given(name=st.sampled_from(NAMES), index=INDICES)
def test_indexing_is_that_of_safetensors(both, framework, name, index):
    ours, theirs = both(framework)
    if framework == "np" and any(descending(item) for item in (index if isinstance(index, tuple) else (index,))):
        # There safetensors runs into an overflow of its own: it panics, or tries to make an enormous array.
        assert outcome(lambda: ours.get_slice(name)[index], UsageError) == "refused"
        return
    expected = outcome(lambda: theirs.get_slice(name)[index], Exception)
    assert outcome(lambda: ours.get_slice(name)[index], UsageError) == expected


@pytest.mark.parametrize("framework", ["np", "pt"])
def test_the_rest_of_the_surface_is_that_of_safetensors(both, framework):
    ours, theirs = both(framework)
    public = {name for name in dir(theirs) if not name.startswith("_")}
    assert public <= set(dir(ours))
    assert ours.keys() == theirs.keys()
    assert ours.offset_keys() == theirs.offset_keys()
    assert ours.metadata() == theirs.metadata()
    everything = ours.get_tensors()
    assert list(everything) == list(theirs.get_tensors())
    for name in theirs.keys():  # noqa: SIM118 - not a mapping
        expected = outcome(lambda name=name: theirs.get_tensor(name), Exception)
        assert outcome(lambda name=name: ours.get_tensor(name), UsageError) == expected
        assert outcome(lambda name=name: everything[name], UsageError) == expected
        assert ours.get_slice(name).get_shape() == theirs.get_slice(name).get_shape()
        assert ours.get_slice(name).get_dtype() == theirs.get_slice(name).get_dtype()
    for access in (ours.get_tensor, ours.get_slice):
        with pytest.raises(NotFound):
            access("nope")


def test_a_file_without_metadata_has_none(tmp_path, make_reader):
    save_file({"a": torch.ones(2)}, tmp_path / "a.safetensors")
    with SafeOpen(make_reader(tmp_path / "a.safetensors"), "np") as opened:
        assert opened.metadata() is None


def test_rows_are_read_without_the_rest_of_the_tensor(tmp_path, room):
    save_file({"w": torch.randn(4096, 512).bfloat16(), "x": torch.randn(64)}, tmp_path / "model.safetensors")
    whole = Weights(room.reader(room.put(tmp_path / "model.safetensors")))["w"]
    reader = room.reader(recorded=True)
    reads = room.blobs.reads
    with SafeOpen(reader, "pt") as opened:
        part = opened.get_slice("w")
        begin = Weights(reader).entry("w").begin
        for rows in (slice(100, 110), slice(4000, 4096), slice(7, 8)):
            part[rows]  # trailers are read once
            reads.clear()
            taken = part[rows]
            touched = reader.layout.segments(begin + rows.start * 1024, begin + rows.stop * 1024)
            sealed = sum((segment.bytes + 16) * (2 if segment.marked else 1) for segment in touched)
            assert 0 < sum(size for _, _, size in reads) <= sealed < reader.layout.image / 16
            assert bytes(taken.view(torch.uint8).numpy()) == whole[rows].tobytes()
        reads.clear()
        assert part[5, 2:4].shape == (2,)
        assert sum(size for _, _, size in reads) <= 2 * 2 * (reader.layout.common + reader.layout.marked + 32)
        reads.clear()
        assert part[10:10].shape == (0, 512)
        assert part.get_shape() == [4096, 512]
        with pytest.raises(UsageError):
            part[4096]
        assert not reads, "nothing is read for nothing, for a shape, or for an index that is refused"


def test_a_part_does_not_keep_the_whole_in_memory(both):
    ours, _ = both("pt")
    assert ours.get_slice("9.float32")[:, 1:3].untyped_storage().nbytes() == 40 * 2 * 4
    ours, _ = both("np")
    assert ours.get_slice("9.float32")[:, 1:3].base is None


def test_packed_tensors_are_read_whole_only(tmp_path, make_reader):
    fp4 = torch.arange(16, dtype=torch.uint8).reshape(4, 4).view(torch.float4_e2m1fn_x2)
    save_file({"a": fp4}, tmp_path / "a.safetensors")
    with SafeOpen(make_reader(tmp_path / "a.safetensors"), "pt") as opened:
        assert torch.equal(opened.get_tensor("a").view(torch.uint8), fp4.view(torch.uint8))
        assert opened.get_slice("a").get_shape() == [4, 8]
        with pytest.raises(UsageError) as error:
            opened.get_slice("a")[0]
        assert error.value.code == "slice.packed"


@pytest.mark.parametrize("framework", ["tf", "flax", "jax", "mlx", "", "NumPy"])
def test_other_frameworks_are_refused(both, framework):
    ours, _ = both("np")
    with pytest.raises(UsageError) as error:
        SafeOpen(ours._weights, framework)
    assert error.value.code == "safe_open.framework"


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:x", -1, True, 1.5, "cpu:0", "0", "meta"])
def test_devices_that_are_none_are_refused(both, device):
    ours, _ = both("pt")
    with pytest.raises(UsageError) as error:
        SafeOpen(ours._weights, "pt", device)
    assert error.value.code == "safe_open.device"


def test_numpy_has_no_other_device(both):
    ours, _ = both("np")
    for device in ("cuda", "cuda:0", 0):
        with pytest.raises(UsageError):
            SafeOpen(ours._weights, "np", device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_refused_with_our_error(both):
    ours, _ = both("pt")
    for device in ("cuda", "cuda:0", 0):
        with pytest.raises(UsageError) as error:
            SafeOpen(ours._weights, "pt", device)
        assert error.value.code == "device.unavailable"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("device", ["cuda", "cuda:0", 0])
def test_tensors_on_the_gpu(both, device):
    ours, _ = both("pt")
    with SafeOpen(ours._weights, "pt", device) as opened:
        for name in opened.keys():  # noqa: SIM118 - not a mapping
            found = opened.get_tensor(name)
            assert found.device.type == "cuda"
            assert torch.equal(found.cpu(), ours.get_tensor(name))
        assert opened.get_slice("9.float32")[3:5].device.type == "cuda"


def test_one_file_of_several(tmp_path: Path, make_reader):
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"w": torch.ones(2)}, folder / "a.safetensors")
    save_file({"w": torch.zeros(3)}, folder / "b.safetensors")
    reader = make_reader(folder)
    assert SafeOpen(reader, "np").keys() == ["a.safetensors:w", "b.safetensors:w"]
    assert SafeOpen(reader, "np", file="b.safetensors").get_tensor("w").tolist() == [0, 0, 0]
    with pytest.raises(NotFound):
        SafeOpen(reader, "np", file="c.safetensors").keys()


def test_closed_means_closed(tmp_path, make_reader):
    save_file({"a": torch.ones(2)}, tmp_path / "a.safetensors")
    with SafeOpen(make_reader(tmp_path / "a.safetensors"), "pt") as opened:
        part, kept = opened.get_slice("a"), opened.get_tensor("a")
    assert kept.tolist() == [1, 1]
    for access in (opened.keys, opened.metadata, lambda: opened.get_tensor("a"), lambda: part[0]):
        with pytest.raises(StrongroomError) as error:
            access()
        assert error.value.code == "weights.closed"
