"""Geometry: whatever the files, segments fill the image, marked ones lie in markable runs, and reading finds each."""

from dataclasses import replace
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from strongroom.core import canonical
from strongroom.errors import CannotVerify, Tampered
from strongroom.formats.layout import Layout, Run

KIB = 1024


@st.composite
def layouts(draw):
    sizes = draw(st.lists(st.integers(0, 600 * KIB), min_size=1, max_size=5))
    files = Layout.place(
        [(f"f{k}", "safetensors", size, draw(st.integers(0, min(size, 99)))) for k, size in enumerate(sizes)]
    )
    runs = []
    for entry in files:
        at = entry.offset + entry.data_start
        while at + 64 < entry.end and draw(st.booleans()):
            dtype = draw(st.sampled_from(["BF16", "F16", "F32", "F64"]))
            begin = -(-at // 8) * 8
            end = min(entry.end // 8 * 8, begin + 8 * draw(st.integers(1, 40_000)))
            if end <= begin:
                break
            runs.append(Run(begin, end, dtype))
            at = end + draw(st.sampled_from([0, 8, 1000]))
    share = draw(st.sampled_from([Fraction(0), Fraction(1, 8), Fraction(1, 4), Fraction(1, 2), Fraction(1, 100)]))
    return Layout.plan(files, runs, share=share, positions=draw(st.sampled_from([0, 1, 7, 16384])))


@given(layouts())
def test_segments_fill_the_image_in_order(layout):
    at = 0
    for segment in layout.segments():
        assert segment.start == at
        assert segment.start % 64 == 0
        at = segment.end
    assert at == layout.image


@given(layouts())
def test_marked_segments_lie_in_markable_bytes(layout):
    for segment in layout.segments():
        if segment.marked:
            assert segment.bytes == layout.marked >= 4096
            covered = sum(max(0, min(run.end, segment.end) - max(run.begin, segment.start)) for run in layout.runs)
            assert covered == segment.bytes


@given(layouts())
def test_a_reader_gets_the_layout_that_the_writer_planned(layout):
    again = Layout.from_json(canonical.decode(canonical.encode(layout.to_json())))
    assert again == layout
    assert [int(x) for x in again.marked_starts] == [s.start for s in layout.segments() if s.marked]


@given(layouts(), st.data())
def test_a_range_touches_exactly_the_segments_that_overlap_it(layout, data):
    begin = data.draw(st.integers(0, layout.image))
    end = data.draw(st.integers(begin, layout.image))
    expected = [s for s in layout.segments() if s.start < end and s.end > begin] if begin < end else []
    assert layout.segments(begin, end) == expected


def test_the_default_share_is_reached_on_a_plain_model():
    size = 256 * KIB * KIB
    files = Layout.place([("model.safetensors", "safetensors", size, 4096)])
    layout = Layout.plan(
        files, [Run(files[0].offset + 4096, files[0].end, "BF16")], share=Fraction(1, 8), positions=4096
    )
    assert layout.positions == 4096
    assert 0.12 < layout.positions * layout.marked / size < 0.126
    gaps = [b - a for a, b in zip(layout.common_starts, layout.common_starts[1:], strict=False)]
    assert max(gaps[1:-2]) - min(gaps[1:-2]) <= 3 * layout.marked  # spread evenly, but for both ends


@given(layouts(), st.data())
def test_a_layout_that_is_changed_is_refused_or_is_another_sound_layout(layout, data):
    value = layout.to_json()
    key = data.draw(st.sampled_from(["image", "common", "marked"]))
    value[key] += data.draw(st.sampled_from([-64, -1, 1, 64, 2**60]))
    try:
        changed = Layout.from_json(value)
    except Tampered:
        return
    ends = [0, *(segment.end for segment in changed.segments())]
    assert [segment.start for segment in changed.segments()] == ends[:-1]
    assert ends[-1] == changed.image == layout.image


def test_no_stripe_grows_beyond_what_a_writer_holds_in_memory():
    # A hundred MiB in stretches too short for a marked segment, and then a long one: all that is due falls due there.
    size = 200 * 1024 * KIB
    files = Layout.place([("a", "safetensors", size, 0)])
    short = [Run(at, at + 4000, "BF16") for at in range(0, size // 2, 4096)]
    layout = Layout.plan(files, [*short, Run(size // 2, size, "BF16")], share=Fraction(1, 8), positions=16384)
    assert layout.positions > 0
    assert max(layout.stripes) * layout.marked <= 2 * layout.common


class Counted(tuple):
    """Stripes that count how often somebody goes through all of them."""

    __slots__ = ()
    passes = 0

    def __iter__(self):
        type(self).passes += 1
        return super().__iter__()


def test_finding_a_segment_goes_through_no_list_of_all():
    size = 64 * 1024 * KIB
    planned = Layout.plan(
        Layout.place([("a", "safetensors", size, 0)]), [Run(0, size, "BF16")], share=Fraction(1, 8), positions=1000
    )
    layout = replace(planned, stripes=Counted(planned.stripes))
    Counted.passes = 0
    for number in range(len(planned.stripes)):
        assert layout.common_segment(number).bytes > 0
        assert len(layout.stripe(number)) == planned.stripes[number]
    assert Counted.passes <= 4  # else reading a model takes the square of its size


@pytest.mark.parametrize(
    "path", ["", "/etc/passwd", "../x", "a/../b", "a//b", "./a", "a\\b", "a\nb", "a\x00b", "x" * 1025]
)
def test_paths_that_leave_the_folder_are_refused(path):
    files = Layout.place([("a", "opaque", 10, 0)])
    value = Layout.plan(files, [], share=Fraction(0), positions=0).to_json()
    value["files"][0]["path"] = path
    with pytest.raises(Tampered):
        Layout.from_json(value)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


class TestBlocks:
    """Runs of ggml's blocks: what makes a layout one of format 2."""

    def planned(self, *runs):
        files = Layout.place([("m.gguf", "gguf", 1 << 20, 64)])
        return Layout.plan(files, [Run(*run) for run in runs], share=Fraction(1, 8), positions=64)

    def test_the_format_says_whether_there_are_any(self):
        for dtype, number in (("Q4_1", 2), ("Q6_K", 2), ("F16", 1)):
            layout = self.planned((64, 64 + 400 * 840, dtype))
            assert layout.format == layout.to_json()["format"] == number
            assert Layout.from_json(layout.to_json()) == layout
            with pytest.raises(Tampered, match="its format"):
                Layout.from_json({**layout.to_json(), "format": 3 - number})

    @pytest.mark.parametrize(
        "run",
        [(64, 64 + 34 * 4000 + 2, "Q8_0"), (66, 66 + 34 * 4000, "Q8_0"), (64, 64 + 16 * 4000, "MXFP4"), (64, 65, 7)],
    )
    def test_of_other_runs_is_refused(self, run):
        good = self.planned((64, 64 + 34 * 4000, "Q8_0")).to_json()
        with pytest.raises(Tampered):
            Layout.from_json({**good, "runs": [list(run)]})

    def test_a_tensor_is_marked_if_one_run_holds_all_of_it(self):
        layout = self.planned((64, 6464, "Q4_1"), (6464, 70_464, "F32"))
        assert layout.markable(64, 6464)
        assert layout.markable(84, 6464)
        assert not layout.markable(64, 6468)
        assert not layout.markable(60, 6464)
        assert not layout.markable(64, 64)
        assert not layout.markable(70_464, 70_468)


@pytest.mark.parametrize("number", [3, 10**6])
def test_another_format_is_not_called_tampered(number):
    with pytest.raises(CannotVerify, match="newer Strongroom"):
        Layout.from_json({"format": number, "whatever": "it has"})


@pytest.mark.parametrize("number", [0, -1, True, 1.0, "1", None])
def test_what_is_no_number_of_a_format_is_tampered(number):
    with pytest.raises(Tampered):
        Layout.from_json({"format": number})


@given(json_values)
def test_any_json_raises_only_ours(value):
    with pytest.raises(Tampered):
        Layout.from_json(value)
