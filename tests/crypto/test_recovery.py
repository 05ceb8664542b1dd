from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from strongroom.crypto.recovery import SEALED_BYTES, create_recovery, open_with_shares, seal_for_recovery
from strongroom.crypto.shamir import Share
from strongroom.errors import IntegrityError, StrongroomError, Tampered, Truncated, UsageError

ROOM = bytes(range(16))
KEY = bytes(range(200, 232))


@pytest.fixture(scope="module")
def recovery():
    return create_recovery(2, 3)


def test_any_two_shares_from_paper_recover(recovery):
    public, shares = recovery
    sealed = seal_for_recovery(public, KEY, ROOM)
    assert len(sealed) == SEALED_BYTES
    assert KEY not in sealed
    papers = [str(share) for share in shares]
    for subset in itertools.combinations(papers, 2):
        assert open_with_shares(sealed, [Share.parse(paper) for paper in subset], ROOM) == KEY


def test_a_new_room_key_is_sealed_without_shares(recovery):
    public, shares = recovery
    second = bytes(reversed(KEY))
    assert open_with_shares(seal_for_recovery(public, second, ROOM), shares[1:], ROOM) == second
    assert seal_for_recovery(public, KEY, ROOM) != seal_for_recovery(public, KEY, ROOM)


def test_one_share_is_not_enough(recovery):
    public, shares = recovery
    with pytest.raises(UsageError) as caught:
        open_with_shares(seal_for_recovery(public, KEY, ROOM), shares[:1], ROOM)
    assert caught.value.code == "share.too_few"


def test_another_room(recovery):
    public, shares = recovery
    with pytest.raises(Tampered) as caught:
        open_with_shares(seal_for_recovery(public, KEY, ROOM), shares, ROOM[:-1] + b"\xff")
    assert caught.value.code == "recovery.tampered"


def test_shares_of_another_recovery_key(recovery):
    public, _ = recovery
    _, others = create_recovery(2, 2)
    with pytest.raises(UsageError) as caught:
        open_with_shares(seal_for_recovery(public, KEY, ROOM), others, ROOM)
    assert caught.value.code == "recovery.other_key"


def test_every_bit_flip_and_truncation(recovery):
    public, shares = recovery
    sealed = seal_for_recovery(public, KEY, ROOM)
    for bit in range(8 * len(sealed)):
        altered = bytearray(sealed)
        altered[bit // 8] ^= 1 << bit % 8
        with pytest.raises((IntegrityError, UsageError)):
            open_with_shares(bytes(altered), shares[:2], ROOM)
    for size in range(len(sealed)):
        with pytest.raises(Truncated):
            open_with_shares(sealed[:size], shares[:2], ROOM)
    with pytest.raises(Tampered):
        open_with_shares(sealed + b"\x00", shares[:2], ROOM)


@pytest.mark.parametrize("public", [b"", bytes(31), bytes(32), b"\x01" + bytes(31), bytes(33)])
def test_keys_of_small_order_or_wrong_size_are_refused(public):
    with pytest.raises(UsageError) as caught:
        seal_for_recovery(public, KEY, ROOM)
    assert caught.value.code == "recovery.bad_public_key"


def test_an_encapsulated_key_of_small_order(recovery):
    public, shares = recovery
    sealed = seal_for_recovery(public, KEY, ROOM)
    for point in (bytes(32), b"\x01" + bytes(31)):
        with pytest.raises(Tampered):
            open_with_shares(sealed[:40] + point + sealed[72:], shares[:2], ROOM)


@given(junk=st.binary(max_size=200))
def test_any_bytes_raise_only_our_errors(recovery, junk):
    _, shares = recovery
    with pytest.raises(StrongroomError):
        open_with_shares(junk, shares[:2], ROOM)
    padded = (b"SRRC\x01\x00\x00\x00" + junk).ljust(SEALED_BYTES, b"\x00")[:SEALED_BYTES]
    with pytest.raises(StrongroomError):
        open_with_shares(padded, shares[:2], ROOM)


def test_only_whole_keys_are_sealed(recovery):
    with pytest.raises(UsageError):
        seal_for_recovery(recovery[0], KEY[:16], ROOM)
