"""NumPy's own files are read as NumPy reads them, and nothing else that they could be is."""

from __future__ import annotations

import io

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from strongroom.errors import UsageError
from strongroom.formats.npy import MAGIC, parse_npy


def saved(array: np.ndarray, version: tuple[int, int] | None = None) -> bytes:
    out = io.BytesIO()
    np.lib.format.write_array(out, array, version=version)
    return out.getvalue()


def parsed(data: bytes):
    return parse_npy("a", lambda offset, size: data[offset : offset + size], len(data))


@pytest.mark.parametrize("dtype", ["<f2", "<f4", "<f8", "i1", "u1", "<i2", "<i4", "<i8", "<u2", "<u4"])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_as_numpy_wrote_it(dtype, order, version):
    array = np.asarray(np.arange(12).reshape(3, 4), dtype, order=order)
    data = saved(array, version)
    info = parsed(data)
    found = np.frombuffer(data[info.begin : info.end], dtype).reshape(info.shape)
    assert np.array_equal(found, array if order == "C" else array.T)


def test_bfloat16_as_numpy_saves_it():
    array = np.arange(8, dtype=np.float32).astype(ml_dtypes.bfloat16)
    data = saved(array)
    info = parsed(data)
    assert info.dtype.name == "BF16"
    assert np.array_equal(np.frombuffer(data[info.begin : info.end], ml_dtypes.bfloat16), array)


@pytest.mark.parametrize(
    "array",
    [np.zeros(3, ">f4"), np.zeros(3, complex), np.zeros(2, "U5"), np.zeros(2, [("a", "f4")]), np.zeros(2, "M8[s]")],
)
def test_what_is_no_weight(array):
    with pytest.raises(UsageError):
        parsed(saved(array))


def test_objects_are_not_loaded():
    out = io.BytesIO()
    np.lib.format.write_array(out, np.array([print], object), allow_pickle=True)
    with pytest.raises(UsageError):
        parsed(out.getvalue())


def head(text: str) -> bytes:
    return MAGIC + b"\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        MAGIC,
        MAGIC + b"\x04\x00\x00\x00\x00\x00",
        MAGIC + b"\x02\x00\xff\xff\xff\xff",
        head("__import__('os').system('true')"),
        head("{'descr': '<f4', 'fortran_order': False}"),
        head("{'descr': '<f4', 'fortran_order': 0, 'shape': (1,)}") + bytes(4),
        head("{'descr': '<f4', 'fortran_order': False, 'shape': (-1,)}") + bytes(4),
        head("{'descr': '<f4', 'fortran_order': False, 'shape': (True,)}") + bytes(4),
        head("{'descr': '<f4', 'fortran_order': False, 'shape': (2,)}") + bytes(4),
        head("{'descr': '<f4', 'fortran_order': False, 'shape': (1048576, 1048576, 1048576)}") + bytes(4),
        head("{'descr': '<f4', 'fortran_order': False, 'shape': [1]}") + bytes(4),
        head("(" * 5000),
        head("9" * 9000),
        head("[1]"),
        head("\x00"),
    ],
)
def test_what_is_malformed(data):
    with pytest.raises(UsageError):
        parsed(data)


@given(st.binary(max_size=200), st.integers(0, 127), st.integers(0, 255))
def test_any_bytes(data, at, value):
    whole = bytearray(saved(np.zeros((2, 3), np.float32)))
    whole[at] = value
    for each in (data, MAGIC + data, head(data.decode("latin-1")), bytes(whole)):
        try:
            info = parsed(each)
        except UsageError:
            continue
        assert 0 <= info.begin <= info.end <= len(each)
