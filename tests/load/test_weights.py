"""Tensors by name: what is read is what was put, up to the holder's marks, and without more reading than needed."""

from __future__ import annotations

import gc
from pathlib import Path

import gguf
import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from strongroom.errors import LimitExceeded, NotFound, StrongroomError, Tampered, UsageError
from strongroom.formats.safetensors import encode_header
from strongroom.load.device import to_device
from strongroom.load.torch import state_dict
from strongroom.load.weights import Weights
from strongroom.storage.reader import ImageReader

STEPS = {torch.bfloat16: (torch.int16, 1), torch.float16: (torch.int16, 8), torch.float32: (torch.int32, 1 << 16)}


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def off_by(original: torch.Tensor, found: torch.Tensor) -> set[int]:
    """By how many units in the last place elements differ."""
    integer, _ = STEPS[original.dtype]
    return set((found.view(integer).long() - original.view(integer).long()).abs().unique().tolist())


def every_dtype() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    noise = torch.randn(64, 48, generator=generator)
    plain = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
    small = [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz]
    integers = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool]
    tensors = {str(dtype): noise.to(dtype) for dtype in [*plain, *small]}
    tensors |= {str(dtype): (noise * 100).abs().to(dtype) for dtype in integers}
    bits = (noise * 1000).abs().to(torch.int64)
    tensors |= {str(dtype): bits.to(dtype) for dtype in (torch.uint16, torch.uint32, torch.uint64)}
    tensors["complex64"] = torch.complex(noise, noise.flip(0))
    tensors["e8m0"] = bits.to(torch.uint8).view(torch.float8_e8m0fnu)
    tensors["fp4"] = bits.to(torch.uint8).view(torch.float4_e2m1fn_x2)
    tensors["scalar"] = torch.tensor(3.5)
    tensors["empty"] = torch.zeros(0, 5, dtype=torch.bfloat16)
    return tensors


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "tiny"}')
    return folder


@pytest.mark.parametrize("read", ["torch", "to_device", "stream"])
def test_every_dtype_comes_back_bit_for_bit(model, make_reader, read):
    tensors = every_dtype()
    save_file(tensors, model / "model.safetensors")
    reader = make_reader(model, share="0")
    with Weights(reader) as weights:
        found = {
            "torch": weights.torch,
            "to_device": lambda: to_device(weights, "cpu", window=8192),
            "stream": lambda: dict(weights.stream_torch(group=10_000)),
        }[read]()
    assert found.keys() == tensors.keys()
    for name, tensor in load_file(model / "model.safetensors").items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        assert raw(found[name]) == raw(tensor), name


def test_numpy_arrays_have_the_dtypes_of_ml_dtypes_and_bytes_for_packed_types(model, make_reader):
    tensors = every_dtype()
    save_file(tensors, model / "model.safetensors")
    with Weights(make_reader(model, share="0")) as weights:
        whole, streamed = weights.read(), dict(weights.stream(group=20_000))
        assert list(whole) == list(streamed) == list(weights) == list(weights.keys())
        assert len(weights) == len(tensors)
        for name, tensor in tensors.items():
            for array in (whole[name], streamed[name], weights[name]):
                assert array.tobytes() == raw(tensor), name
                assert array.flags.writeable, name
            packed = name == "fp4"
            assert whole[name].shape == tuple(tensor.shape), name
            assert weights.shape(name) == ((64, 96) if packed else tuple(tensor.shape))
    assert whole["torch.bfloat16"].dtype == ml_dtypes.bfloat16
    assert whole["torch.float8_e4m3fn"].dtype == ml_dtypes.float8_e4m3fn
    assert whole["e8m0"].dtype == ml_dtypes.float8_e8m0fnu
    assert whole["fp4"].dtype == np.uint8
    assert np.allclose(whole["torch.bfloat16"].astype(np.float32), tensors["torch.bfloat16"].float().numpy())


def test_marked_tensors_differ_by_one_step_at_most_and_the_others_not_at_all(model, make_reader):
    generator = torch.Generator().manual_seed(1)
    tensors = {f"{dtype}": torch.randn(256, 256, generator=generator).to(dtype) for dtype in STEPS}
    tensors["bias"] = torch.randn(4096, generator=generator)
    save_file(tensors, model / "model.safetensors")
    reader = make_reader(model)
    assert reader.layout.positions > 10
    found = state_dict(reader)
    assert torch.equal(found["bias"], tensors["bias"])
    seen: set[torch.dtype] = set()
    for name, tensor in tensors.items():
        if tensor.dim() == 2:
            steps = off_by(tensor, found[name])
            assert steps <= {0, STEPS[tensor.dtype][1]}, name
            seen |= {tensor.dtype} if len(steps) == 2 else set()
    assert seen == set(STEPS), "each type carries marks"


def test_the_whole_model_is_views_of_one_buffer_that_outlives_the_weights(model, make_reader):
    tensors = {f"layer.{k}": torch.full((32, 33), float(k), dtype=torch.bfloat16) for k in range(20)}
    save_file(tensors, model / "model.safetensors")
    with Weights(make_reader(model, share="0")) as weights:
        arrays, found = weights.read(), weights.torch()
        places = {name: entry.begin for name, entry in weights.entries.items()}
        size = weights.nbytes
    gc.collect()
    for address in (lambda name: arrays[name].ctypes.data, lambda name: found[name].data_ptr()):
        bases = {address(name) - begin for name, begin in places.items()}
        assert len(bases) == 1, "all tensors lie in one stretch of memory, as in the image"
    assert max(places.values()) < size
    for k in range(20):
        assert torch.equal(found[f"layer.{k}"], tensors[f"layer.{k}"])
        assert (arrays[f"layer.{k}"] == k).all()


def test_reading_into_the_callers_memory(model, make_reader):
    tensors = {"a": torch.arange(1000.0), "b": torch.arange(100, dtype=torch.int64)}
    save_file(tensors, model / "model.safetensors")
    with Weights(make_reader(model)) as weights:
        memory = np.zeros(weights.nbytes, np.uint8)
        arrays = weights.read_into(memory)
        for wrong in (
            bytearray(weights.nbytes + 1),
            bytes(weights.nbytes),
            np.zeros((weights.nbytes, 2), np.uint8)[:, 0],
        ):
            with pytest.raises(UsageError) as error:
                weights.read_into(wrong)
            assert error.value.code == "read.buffer"
    for name, tensor in tensors.items():
        assert np.shares_memory(arrays[name], memory)
        assert np.array_equal(arrays[name], tensor.numpy())


def test_after_closing_nothing_can_be_read(model, make_reader):
    save_file({"a": torch.ones(8)}, model / "model.safetensors")
    weights = Weights(make_reader(model))
    with weights:
        kept = weights["a"]
    assert (kept == 1).all()
    for access in (
        lambda: weights["a"],
        weights.read,
        weights.torch,
        weights.metadata,
        weights.files,
        lambda: weights.file("config.json"),
        lambda: weights.shape("a"),
        lambda: weights.dtype("a"),
        lambda: list(weights),
        lambda: list(weights.stream()),
        lambda: len(weights),
        lambda: "a" in weights,
        lambda: weights.nbytes,
        lambda: weights.read_into(bytearray(8)),
        lambda: state_dict(weights),
    ):
        with pytest.raises(UsageError) as error:
            access()
        assert error.value.code == "weights.closed"


def test_a_missing_name_is_a_key_error_and_not_found(model, make_reader):
    save_file({"a": torch.ones(8)}, model / "model.safetensors")
    with Weights(make_reader(model)) as weights:
        with pytest.raises(NotFound) as error:
            weights["nope"]
        assert error.value.code == "weights.no_tensor"
        assert weights.get("nope") is None
        assert "nope" not in weights
        assert weights != {"a": 1}
        with pytest.raises(NotFound):
            weights.file("nope.json")


def test_names_of_two_files_are_qualified_and_single_ones_are_not(model, make_reader):
    (model / "lora").mkdir()
    save_file(
        {"w": torch.ones(4), "x": torch.ones(2)}, model / "lora" / "adapter.safetensors", {"rank": "8", "by": "ana"}
    )
    save_file({"w": torch.zeros(3), "y": torch.zeros(5)}, model / "model.safetensors", {"rank": "16", "format": "pt"})
    reader = make_reader(model)
    with Weights(reader) as weights:
        assert list(weights) == ["lora/adapter.safetensors:w", "x", "model.safetensors:w", "y"]
        assert weights["lora/adapter.safetensors:w"].shape == (4,)
        assert weights.read()["model.safetensors:w"].shape == (3,)
        assert weights.metadata() == {
            "by": "ana",
            "format": "pt",
            "lora/adapter.safetensors:rank": "8",
            "model.safetensors:rank": "16",
        }
        assert weights.files() == ("config.json", "lora/adapter.safetensors", "model.safetensors")
        assert weights.file("config.json") == b'{"model_type": "tiny"}'
    with Weights(reader, only=["model.safetensors"]) as weights:
        assert sorted(weights) == ["w", "y"]
        assert {name: tuple(tensor.shape) for name, tensor in weights.torch().items()} == {"w": (3,), "y": (5,)}
    with pytest.raises(UsageError) as error:
        len(Weights(reader, only=["config.json"]))
    assert error.value.code == "weights.not_tensors"


def test_a_tensor_may_not_hide_behind_a_qualified_name(model, make_reader):
    save_file({"w": torch.ones(4)}, model / "a.safetensors")
    save_file({"w": torch.ones(4), "a.safetensors:w": torch.zeros(4)}, model / "b.safetensors")
    with Weights(make_reader(model)) as weights, pytest.raises(UsageError) as error:
        len(weights)
    assert error.value.code == "weights.ambiguous"


def test_unaligned_tensors_are_read_rightly_and_copied_for_torch(model, make_reader):
    header = encode_header([("bytes", "U8", (3,)), ("matrix", "F32", (2, 3)), ("vector", "BF16", (5,))], {})
    matrix, vector = np.arange(6, dtype="<f4"), torch.arange(5, dtype=torch.bfloat16)
    (model / "model.safetensors").write_bytes(header + b"abc" + matrix.tobytes() + raw(vector))
    with Weights(make_reader(model)) as weights:
        assert np.array_equal(weights.read()["matrix"], matrix.reshape(2, 3))
        assert np.array_equal(weights["matrix"], matrix.reshape(2, 3))
        for tensors in (weights.torch(), dict(weights.stream_torch()), to_device(weights, "cpu")):
            assert tensors["matrix"].data_ptr() % 4 == 0
            assert np.array_equal(tensors["matrix"].numpy(), matrix.reshape(2, 3))
            assert torch.equal(tensors["vector"], vector)


def test_gguf_floats_are_arrays_and_quantised_tensors_are_rows_of_blocks(tmp_path, make_reader):
    generator = np.random.default_rng(3)
    path = tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    matrix = generator.standard_normal((8, 64)).astype(np.float32)
    quantised = gguf.quants.quantize(matrix, gguf.GGMLQuantizationType.Q8_0)
    brain = gguf.quants.quantize(matrix, gguf.GGMLQuantizationType.BF16)
    writer.add_name("tiny")
    writer.add_tensor("float", matrix)
    writer.add_tensor("quantised", quantised, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("brain", brain, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with Weights(make_reader(path, share="0")) as weights:
        assert {name: weights.dtype(name) for name in weights} == {"float": "F32", "quantised": "Q8_0", "brain": "BF16"}
        assert weights.shape("quantised") == (8, 64)
        assert weights.metadata()["general.name"] == "tiny"
        for arrays in (
            dict(weights),
            weights.read(),
            {k: v.numpy() for k, v in weights.torch().items() if k != "brain"},
        ):
            assert np.array_equal(arrays["float"], matrix)
            assert arrays["quantised"].dtype == np.uint8
            assert np.array_equal(arrays["quantised"], quantised)
        assert weights["brain"].tobytes() == brain.tobytes()
        assert weights.torch()["brain"].dtype == torch.bfloat16


def test_one_tensor_reads_only_the_segments_that_hold_it(model, room):
    save_file({f"layer.{k}": torch.randn(128, 128) for k in range(64)}, model / "model.safetensors")
    room.put(model)
    reader = room.reader(recorded=True)
    with Weights(reader) as weights:
        list(weights)
        weights["layer.31"]  # trailers are read once
        entry = weights.entry("layer.31")
        reads = room.blobs.reads
        reads.clear()
        weights["layer.31"]
    # Of marked segments, both variants may be fetched in one go.
    touched = reader.layout.segments(entry.begin, entry.end)
    sealed = sum((segment.bytes + 16) * (2 if segment.marked else 1) for segment in touched)
    assert entry.info.size < sum(size for _, _, size in reads) <= sealed < reader.layout.image / 10


def test_opening_reads_the_header_and_no_tensor(model, room):
    save_file({f"layer.{k}": torch.randn(128, 128) for k in range(64)}, model / "model.safetensors")
    room.put(model)
    reader = room.reader(recorded=True)
    file = reader.layout.file("model.safetensors")
    room.blobs.reads.clear()
    with Weights(reader) as weights:
        assert weights.shape("layer.7") == (128, 128)
    packs = {name for name, _, _ in room.blobs.reads}
    header = reader.layout.segments(file.offset, file.offset + file.data_start)
    sealed = {segment.bytes + 16 for segment in header}
    assert len([size for _, _, size in room.blobs.reads if size in sealed]) == len(header)
    assert len(room.blobs.reads) <= len(header) + len(packs), "the segments, and one trailer a pack"


def test_what_was_changed_in_the_store_is_refused_and_never_handed_out(model, room):
    save_file({f"layer.{k}": torch.randn(128, 128) for k in range(16)}, model / "model.safetensors")
    ref = room.put(model, share="1/8")  # the largest pack is the common one, of which everybody reads everything
    name, size = max(room.vault.blobs.list("packs"), key=lambda item: item[1])
    path = Path(room.vault.folder) / "store" / name
    path.chmod(0o600)
    data = bytearray(path.read_bytes())
    data[size // 2] ^= 1
    path.write_bytes(data)
    with Weights(room.reader(ref)) as weights:
        for read in (weights.read, weights.torch, lambda: dict(weights.stream()), lambda: to_device(weights, "cpu")):
            with pytest.raises(Tampered):
                read()
        memory = np.full(weights.nbytes, 255, np.uint8)
        with pytest.raises(Tampered):
            weights.read_into(memory)
        assert not memory.any(), "wiped"


def test_a_header_that_lies_raises_only_our_errors(model, room, monkeypatch):
    save_file({"a": torch.ones(64, 64)}, model / "model.safetensors")
    reader = room.reader(room.put(model, share="0"))
    begin = reader.layout.file("model.safetensors").offset
    whole = bytes(reader.read_all())
    for position in range(begin, begin + 80):
        broken = bytearray(whole)
        broken[position] ^= 0x41

        def read_range(at: int, out: memoryview, broken: bytearray = broken) -> None:
            out[:] = broken[at : at + len(out)]

        with monkeypatch.context() as patch:
            patch.setattr(ImageReader, "read_range", lambda _, at, out, read=read_range: read(at, out))
            weights = Weights(reader)
            try:
                names = list(weights)
            except (UsageError, LimitExceeded):
                continue
            for name in names:
                assert weights[name].nbytes == 64 * 64 * 4


def test_an_unknown_device_is_refused(model, make_reader):
    save_file({"a": torch.ones(8)}, model / "model.safetensors")
    with Weights(make_reader(model)) as weights, pytest.raises(StrongroomError) as error:
        weights.torch("nowhere")
    assert error.value.code == "device.unavailable"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_model_on_the_gpu_is_the_one_on_the_cpu(model, make_reader):
    tensors = {f"layer.{k}": torch.randn(1024, 1024).bfloat16() for k in range(20)} | every_dtype()
    save_file(tensors, model / "model.safetensors")
    with Weights(make_reader(model)) as weights:
        here = weights.torch()
        for found in (weights.torch("cuda"), to_device(weights, "cuda:0", window=1 << 20)):
            for name, tensor in here.items():
                assert found[name].device.type == "cuda"
                assert raw(found[name].cpu()) == raw(tensor), name
