"""Stamps that are too many to be scored in full: who is screened in, and that a later look says what a first would."""

import numpy as np
import pytest

from strongroom.marking import matched
from strongroom.marking.elements import values
from strongroom.marking.matched import MatchedFilter
from strongroom.marking.stamp import Stamp, tensor_tag

ROOT = bytes(range(32))
TAG = tensor_tag(4096)
SIZE, WIDTH = 1 << 18, 512
STAMPS = [Stamp(ROOT, f"user/h{k}") for k in range(300)]


@pytest.fixture
def leaked():
    """bf16 integers of a tensor, and what holder 77's copy of it has, through noise as strong as `noise` chips."""
    rng = np.random.default_rng(5)
    bits = (rng.normal(0, 0.02, SIZE).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)

    def leak(noise):
        copy = bits.copy()
        STAMPS[77].apply("BF16", TAG, 0, bits, copy)
        w = values(bits, "BF16")
        return bits, values(copy, "BF16") + noise * np.abs(w).mean() / 128 * rng.normal(size=SIZE).astype(np.float32)

    return leak


def gathered(bits, leak, stamps, *, screening):
    """In two runs, of which the second begins within a block of the cipher."""
    found = MatchedFilter(stamps, screening=screening)
    for low, high in ((0, 100 * WIDTH + 8), (100 * WIDTH + 8, SIZE)):
        found.add(TAG, low, "BF16", bits[low:high], leak[low:high])
    return found


def test_who_has_the_copy_is_screened_in(leaked):
    found = gathered(*leaked(20.0), [], screening=True)
    assert 77 in found.screened(STAMPS, [], 4)
    assert len(found.screened(STAMPS, [], 4)) == 4


def test_who_is_likely_comes_to_the_second_stage(leaked, monkeypatch):
    """A sample too small to show anybody, and a second one that does."""
    monkeypatch.setattr(matched, "_STAGES", (16, 1 << 18))
    monkeypatch.setattr(matched, "_LEFT", 5)
    found = gathered(*leaked(4.0), [], screening=True)
    assert found.screened(STAMPS, [3, 77], 1) == [77]
    unlikely = [k for k in range(300) if k != 77]
    alone = found.screened(STAMPS, unlikely, 10)
    assert len(alone) <= 10


def test_a_later_look_says_what_a_first_would(leaked):
    bits, leak = leaked(2.0)
    first = gathered(bits, leak, STAMPS[70:80], screening=False).scores()
    later = gathered(bits, leak, [], screening=True).among(STAMPS[70:80]).scores()
    assert np.abs(first - later).max() < 0.02 * first.max()  # r is kept to eight bits
    assert first.argmax() == later.argmax() == 7
    assert later[7] > 50


def test_what_is_too_much_is_not_kept(leaked, monkeypatch):
    monkeypatch.setattr(matched, "_MOST_KEPT", SIZE // 2)
    assert gathered(*leaked(2.0), [], screening=True).among(STAMPS[:3]) is None


@pytest.mark.parametrize("none", [0x7FC0, 0xFF80])
def test_an_original_with_elements_that_are_no_numbers(leaked, none):
    """One in each row, of which the rest says what it said."""
    bits, leak = leaked(2.0)
    before = gathered(bits, leak, STAMPS[70:80], screening=False).scores()
    bits[::WIDTH], leak[::WIDTH] = none, values(np.array([none], np.uint16), "BF16")[0]
    after = gathered(bits, leak, STAMPS[70:80], screening=False).scores()
    assert after[7] == pytest.approx(before[7], rel=0.02)


def test_a_kept_look_bounds_the_innocent(leaked):
    """z of the innocent is that of a sum of centred chips, whatever was done to r on the way."""
    found = gathered(*leaked(2.0), [], screening=True).among([Stamp(ROOT, f"user/x{k}") for k in range(400)])
    z = found.scores()
    assert abs(z.mean()) < 0.2
    assert 0.8 < z.std() < 1.2
    assert np.abs(z).max() < 5


def test_of_nothing():
    found = MatchedFilter([], screening=True)
    assert found.screened(STAMPS, [1], 3) == []
    assert (found.among(STAMPS[:2]).scores() == 0).all()


def test_a_row_of_zeros_says_nothing_and_silences_no_other(leaked):
    """Of padding, or a dead expert, in the original; the leak has something there."""
    bits, leak = leaked(2.0)
    rows, wrong = bits.copy().reshape(-1, WIDTH), leak.copy().reshape(-1, WIDTH)
    before = MatchedFilter(STAMPS[77:78])
    before.add(TAG, 0, "BF16", rows, wrong)
    rows[5], wrong[5] = 0, 0
    wrong[5, 3] = 1e-3
    after = MatchedFilter(STAMPS[77:78])
    after.add(TAG, 0, "BF16", rows, wrong)
    assert after.scores()[0] > 0.98 * before.scores()[0] > 50
