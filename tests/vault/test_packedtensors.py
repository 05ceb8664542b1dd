"""What compressed-tensors has packed is read as a tensor where codes, scales and shape fit, and as nothing else."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from strongroom.formats.tensors import DTYPES, TensorInfo
from strongroom.marking.quantiser import packed
from strongroom.vault.packedtensors import put_together
from strongroom.vault.suspect import Suspect

SHAPES = st.lists(st.integers(0, 600), max_size=3).map(tuple)
WHOLE = {"codes": ("I32", (8, 32)), "scales": ("BF16", (8, 2)), "shape": ("I64", (2,))}


def infos(codes, scales, shape):
    rows = zip(("w_packed", "w_scale", "w_shape"), (codes, scales, shape), strict=True)
    return {name: TensorInfo(name, DTYPES[dtype], dims, 0, 0) for name, (dtype, dims) in rows}


def test_what_fits():
    (found,) = put_together(infos(**WHOLE), lambda _: (8, 256))
    three, info, packing = found
    assert three == ("w_packed", "w_scale", "w_shape")
    assert (info.name, info.shape, packing.bits, packing.group) == ("w", (8, 256), 4, 128)
    (found,) = put_together(infos(**WHOLE), lambda _: (8, 128))
    assert (found[1].shape, found[2].bits, found[2].group) == ((8, 128), 8, 64)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, (8, 255)),
        ({}, (7, 256)),
        ({}, ()),
        ({}, (2**62, 2**62)),
        ({"codes": ("U32", (8, 32))}, (8, 256)),
        ({"codes": ("I32", (8, 32, 1))}, (8, 256)),
        ({"codes": ("I32", (0, 32))}, (0, 256)),
        ({"scales": ("BF16", (8, 3))}, (8, 256)),
        ({"scales": ("BF16", (4, 2))}, (8, 256)),
        ({"scales": ("BF16", (8, 0))}, (8, 256)),
        ({"scales": ("I16", (8, 2))}, (8, 256)),
        ({"shape": ("I64", (3,))}, (8, 256)),
        ({"shape": ("I32", (2,))}, (8, 256)),
    ],
)
def test_what_does_not(changes, said):
    assert not list(put_together(infos(**WHOLE | changes), lambda _: said))


@given(SHAPES, SHAPES, SHAPES, SHAPES)
def test_whatever_it_says(codes, scales, shape, said):
    for _, info, packing in put_together(infos(("I32", codes), ("F16", scales), ("I64", shape)), lambda _: said):
        assert math.prod(info.shape) * packing.bits == math.prod(codes) * 32
        assert math.prod(info.shape) == math.prod(scales) * packing.group


def write(path, tensors):
    header, at = {}, 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(data)]}
        at += len(data)
    text = json.dumps(header).encode()
    head = len(text).to_bytes(8, "little") + text
    path.write_bytes(head + b"".join(data for _, _, data in tensors.values()))


@pytest.mark.parametrize("files", [1, 3])
@pytest.mark.parametrize(("bits", "group"), [(4, 128), (4, 24), (4, 6), (8, 384), (8, 3)])
def test_any_range_of_it_is_read(tmp_path, bits, group, files):
    w = np.random.default_rng(0).normal(0, 0.05, (40, 384)).astype(np.float32)
    codes, scales = packed(w.reshape(-1, group), bits, "F16")
    tensors = {
        "w_packed": ("I32", [40, 384 * bits // 32], codes.tobytes()),
        "w_scale": ("F16", [40, 384 // group], scales.tobytes()),
        "w_shape": ("I64", [2], np.array([40, 384], "<i8").tobytes()),
    }
    for k in range(files):
        write(tmp_path / f"{k}.safetensors", dict(list(tensors.items())[k::files]))
    with Suspect.opened(tmp_path) as suspect:
        assert set(suspect.tensors) == {"w"}
        whole = suspect.read("w")
        assert np.abs(whole - w.reshape(-1)).max() < (0.03 if bits == 4 else 0.002)
        block = 32 // bits
        for begin, end in ((0, 1), (7, 9), (0, 15360), (385, 1000), (15359, 15360), (128, 256)):
            low = begin // block * block
            assert (suspect.read("w", begin, end)[: end - low] == whole[low:end]).all()


def test_what_is_put_beside_it_under_its_name_hides_nothing(tmp_path):
    """A few bytes of the same name, in another file, or packed: a trace looks at both."""
    mine, other = np.float32([[1, 2, 3, 4]]), np.float32([[5, 6]])
    small = {"w_packed": ("I32", [1, 1], b"\x21\x43\x65\x87"), "w_scale": ("F16", [1, 1], b"\0\x3c")}
    shape = {"w_shape": ("I64", [2], np.array([1, 8], "<i8").tobytes())}
    write(tmp_path / "0.safetensors", {**shape, "w": ("F32", [1, 4], mine.tobytes()), **small})
    write(tmp_path / "1.safetensors", {"w": ("F32", [1, 2], other.tobytes()), **small, **shape})
    with Suspect.opened(tmp_path) as suspect:
        found = sorted(suspect.read(name).tolist() for name in suspect.tensors)
    assert found == [[-7, -6, -5, -4, -3, -2, -1, 0], [-7, -6, -5, -4, -3, -2, -1, 0], [1, 2, 3, 4], [5, 6]]
