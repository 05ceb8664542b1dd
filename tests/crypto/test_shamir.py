from __future__ import annotations

import itertools
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from strongroom.crypto import shamir
from strongroom.crypto.shamir import Share, combine, multiply, split
from strongroom.errors import StrongroomError, Tampered, UsageError

SECRET = bytes(range(32))
PINNED = (
    "srshare1-2-1-0a1b2c3d-000G6-40R4A-0M305-E2090-185G2-R38E5-1XJ64-ASK7H-D1MPR-MTVC6-"
    "DNQ6J-YW3HH-E9SQX-8XBP7-EXW7Y-JYKVM-FHYQC-WZW0G-G6189-64EEF-04WFX-AV8V6"
)


def independent_tables() -> tuple[list[int], list[int]]:
    """Powers and logarithms to the generator 3, from the definition of the field alone."""
    power, log, value = [], [0] * 256, 1
    for exponent in range(255):
        power.append(value)
        log[value] = exponent
        value ^= value << 1
        if value & 0x100:
            value ^= 0x11B
    return power, log


POWER, LOG = independent_tables()


def times(a: int, b: int) -> int:
    return POWER[(LOG[a] + LOG[b]) % 255] if a and b else 0


def value_at_zero(points: list[tuple[int, int]]) -> int:
    result = 0
    for x, y in points:
        for other, _ in points:
            if other != x:
                y = times(y, times(other, POWER[-LOG[other ^ x] % 255]))  # noqa: PLW2901
        result ^= y
    return result


@pytest.mark.parametrize(
    ("a", "b", "product"),
    [(0x57, 0x83, 0xC1), (0x57, 0x13, 0xFE), (0x57, 0x02, 0xAE), (0x53, 0xCA, 0x01), (0, 0xFF, 0), (1, 0xA5, 0xA5)],
)
def test_products_of_fips_197(a, b, product):
    assert multiply(a, b) == product


def test_every_product_and_every_inverse():
    assert all(multiply(a, b) == times(a, b) for a in range(256) for b in range(256))
    assert all(multiply(a, shamir._inverse(a)) == 1 for a in range(1, 256))


def test_shares_lie_on_the_polynomial_of_the_given_coefficients():
    rows = [bytes([0x11, 0x22, 0x33, 0x44]), bytes([7] * 32), bytes([9] * 32)]
    shares = split(SECRET, 3, 5, random=lambda size: rows.pop(0))
    for share in shares:
        x = share.index
        expected = bytes(s ^ times(7, x) ^ times(9, times(x, x)) for s in SECRET)
        assert share.data == expected
        assert share.set_id == bytes([0x11, 0x22, 0x33, 0x44])


@settings(max_examples=15, deadline=None)
@given(secret=st.binary(min_size=32, max_size=32), data=st.data())
def test_every_subset_of_k_recovers(secret, data):
    n = data.draw(st.integers(2, 6))
    k = data.draw(st.integers(2, n))
    shares = split(secret, k, n)
    for subset in itertools.combinations(shares, k):
        assert combine(subset) == secret
        points = [[(share.index, share.data[place]) for share in subset] for place in range(32)]
        assert bytes(map(value_at_zero, points)) == secret
    assert combine(data.draw(st.permutations(shares))) == secret


def test_the_largest_split():
    shares = split(SECRET, 3, 255)
    assert combine([shares[254], shares[0], shares[127]]) == SECRET


def test_fewer_than_k_are_refused():
    for subset in itertools.combinations(split(SECRET, 3, 4), 2):
        with pytest.raises(UsageError, match="2 of the 3") as caught:
            combine(subset)
        assert caught.value.code == "share.too_few"
    with pytest.raises(UsageError):
        combine([])


def test_one_share_of_two_says_nothing():
    # Over all values of the one random coefficient, a share takes every value once, whatever the secret is.
    for secret in (bytes(32), bytes([0x5A] * 32)):
        seen = {1: [], 2: [], 3: []}
        for first in range(0, 256, 32):
            drawn = [bytes(4), bytes(range(first, first + 32))]
            for share in split(secret, 2, 3, random=lambda size, drawn=drawn: drawn.pop(0)):
                seen[share.index].extend(share.data)
        assert all(sorted(values) == list(range(256)) for values in seen.values())


def test_k_minus_one_shares_passed_off_as_enough_are_found_out():
    shares = split(SECRET, 3, 4)
    liars = [Share(2, share.index, share.set_id, share.commitment, share.data) for share in shares[:2]]
    with pytest.raises(Tampered) as caught:
        combine(liars)
    assert caught.value.code == "share.wrong"


def test_shares_of_two_splits_do_not_combine():
    first, second = split(SECRET, 2, 3), split(SECRET, 2, 3)
    with pytest.raises(UsageError) as caught:
        combine([first[0], second[1]])
    assert caught.value.code == "share.other_set"


def test_a_duplicate_is_named():
    shares = split(SECRET, 2, 3)
    with pytest.raises(UsageError, match="share 1") as caught:
        combine([shares[0], shares[0]])
    assert caught.value.code == "share.duplicate"


@pytest.mark.parametrize("bit", [0, 77, 255])
def test_an_altered_share_never_gives_a_wrong_key(bit):
    shares = split(SECRET, 2, 3)
    data = bytearray(shares[0].data)
    data[bit // 8] ^= 1 << bit % 8
    altered = Share(2, 1, shares[0].set_id, shares[0].commitment, bytes(data))
    for subset in ([altered, shares[1]], [shares[1], shares[2], altered]):
        with pytest.raises(Tampered) as caught:
            combine(subset)
        assert caught.value.code == "share.wrong"
    other = Share(2, 1, shares[0].set_id, bytes(16), shares[0].data)
    with pytest.raises(Tampered):
        combine([other, shares[1]])


@pytest.mark.parametrize(("k", "n"), [(1, 1), (1, 3), (0, 2), (3, 2), (2, 256), (-1, 4)])
def test_thresholds_that_make_no_sense(k, n):
    with pytest.raises(UsageError) as caught:
        split(SECRET, k, n)
    assert caught.value.code == "share.bad_threshold"


def test_only_whole_keys_are_shared():
    with pytest.raises(UsageError):
        split(SECRET[:31], 2, 3)


def test_no_share_shows_its_data_by_accident():
    share = split(SECRET, 2, 2)[0]
    assert share.data.hex() not in repr(share)
    assert repr(share.data) not in repr(share)


@settings(max_examples=50, deadline=None)
@given(secret=st.binary(min_size=32, max_size=32), k=st.integers(2, 5))
def test_paper_form_round_trip(secret, k):
    for share in split(secret, k, 5):
        text = str(share)
        assert text.startswith(f"srshare1-{k}-{share.index}-{share.set_id.hex()}-")
        assert Share.parse(text) == share
        head, body = text[: -(6 * 22 - 1)], text[-(6 * 22 - 1) :]
        as_typed = head + body.replace("1", "l").replace("0", "O").lower()
        assert Share.parse(as_typed) == share
        assert Share.parse(text.upper().replace("-", "-\n ", 9)) == share


def test_paper_form_is_pinned():
    share = Share(2, 1, bytes.fromhex("0a1b2c3d"), bytes(range(16)), bytes(range(100, 132)))
    assert str(share) == PINNED
    assert Share.parse(PINNED) == share


def test_every_single_typing_error_is_found_and_nearly_always_named():
    share = split(SECRET, 2, 3)[0]
    text = str(share)
    start = len(text) - (6 * 22 - 1)
    named = total = 0
    for place in range(start, len(text)):
        if text[place] == "-":
            continue
        for symbol in "0123456789ABCDEFGHJKMNPQRSTVWXYZ":
            if symbol == text[place]:
                continue
            with pytest.raises(UsageError) as caught:
                Share.parse(text[:place] + symbol + text[place + 1 :])
            total += 1
            if caught.value.evidence.get("group") == (place - start) // 6 + 1:
                named += 1
    assert named / total > 0.9


def test_an_error_in_the_numbers_is_found():
    share = split(SECRET, 2, 3)[0]
    text = str(share)
    for wrong in (
        text.replace("srshare1-2-1-", "srshare1-3-1-"),
        text.replace("srshare1-2-1-", "srshare1-2-2-"),
        text.replace(share.set_id.hex(), bytes(b ^ 1 for b in share.set_id).hex()),
    ):
        with pytest.raises(UsageError) as caught:
            Share.parse(wrong)
        assert caught.value.code == "share.typo"


def test_swapped_groups_and_lost_groups_are_found():
    head, *groups = str(split(SECRET, 2, 3)[0]).rsplit("-", 22)
    swapped = [groups[1], groups[0], *groups[2:]]
    for wrong in (swapped, groups[1:], [*groups, groups[0]]):
        with pytest.raises(UsageError):
            Share.parse("-".join([head, *wrong]))


def test_errors_hold_no_share():
    text = str(split(SECRET, 2, 3)[0])
    group = text.rsplit("-", 1)[1]
    with pytest.raises(UsageError) as caught:
        Share.parse(text[:-5] + group[:4] + ("0" if group[4] != "0" else "2"))
    assert group[:4] not in str(caught.value) + str(caught.value.as_json())


@settings(max_examples=300, deadline=None)
@given(
    text=st.one_of(
        st.text(max_size=300), st.text("srhae1-0123456789ABCDEF²٣\n ", max_size=200).map("srshare1-".__add__)
    )
)
def test_any_text_raises_only_our_errors(text):
    with pytest.raises(StrongroomError):
        Share.parse(text)
    with pytest.raises(StrongroomError):
        Share.parse("srshare1-2-1-0a1b2c3d-" + text)


def test_randomness_comes_from_the_system_by_default():
    assert split.__kwdefaults__["random"] is os.urandom
    assert split(SECRET, 2, 2)[0].data != split(SECRET, 2, 2)[0].data
