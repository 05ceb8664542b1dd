"""The tree of a log: against the published answers, and against RFC 6962's own recursive definition."""

from __future__ import annotations

import contextlib
import functools
import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from strongroom.errors import LimitExceeded, StrongroomError, Tampered, Truncated, UsageError
from strongroom.formats.merkle import (
    EMPTY_ROOT,
    Frontier,
    consistency_proof,
    inclusion_proof,
    leaf_hash,
    node_hash,
    range_hash,
    verify_consistency,
    verify_inclusion,
)

# The entries and roots that Certificate Transparency's implementations share as vectors for RFC 6962.
ENTRIES = [
    bytes.fromhex(text)
    for text in ("", "00", "10", "2021", "3031", "40414243", "5051525354555657", "606162636465666768696a6b6c6d6e6f")
]
ROOTS = [
    bytes.fromhex(text)
    for text in (
        "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
        "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
        "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
        "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
        "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
        "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
        "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
        "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
        "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
    )
]
INCLUSIONS = {
    (0, 8): (
        "96a296d224f285c67bee93c30f8a309157f0daa35dc5b87e410b78630a09cfc7",
        "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
        "6b47aaf29ee3c2af9af889bc1fb9254dabd31177f16232dd6aab035ca39bf6e4",
    ),
    (5, 8): (
        "bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b",
        "ca854ea128ed050b41b35ffc1b87b8eb2bde461e9e3b5596ece6b9d5975a0ae0",
        "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    ),
    (2, 3): ("fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",),
}
CONSISTENCIES = {
    (1, 8): (
        "96a296d224f285c67bee93c30f8a309157f0daa35dc5b87e410b78630a09cfc7",
        "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
        "6b47aaf29ee3c2af9af889bc1fb9254dabd31177f16232dd6aab035ca39bf6e4",
    ),
    (6, 8): (
        "0ebc5d3437fbe2db158b9f126a1d118e308181031d0a949f8dededebc558ef6a",
        "ca854ea128ed050b41b35ffc1b87b8eb2bde461e9e3b5596ece6b9d5975a0ae0",
        "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    ),
    (2, 5): (
        "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
        "bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b",
    ),
}

MOST = 70
DATA = [b"entry %d" % number for number in range(MOST)]
LEAVES = [leaf_hash(entry) for entry in DATA]
hashes = st.lists(st.binary(min_size=32, max_size=32), max_size=8)
numbers = st.integers(-2, 1 << 64)


# -- RFC 6962 section 2.1, word for word -------------------------------------------------------------------------------


def largest_power_below(count):
    power = 1
    while power * 2 < count:
        power *= 2
    return power


@functools.cache
def mth(begin, end):
    """MTH(D[begin:end])."""
    if begin == end:
        return hashlib.sha256(b"").digest()
    if end - begin == 1:
        return hashlib.sha256(b"\x00" + DATA[begin]).digest()
    middle = begin + largest_power_below(end - begin)
    return hashlib.sha256(b"\x01" + mth(begin, middle) + mth(middle, end)).digest()


def path_of(m, begin, end):
    """PATH(m, D[begin:end])."""
    if end - begin == 1:
        return []
    k = largest_power_below(end - begin)
    if m < k:
        return [*path_of(m, begin, begin + k), mth(begin + k, end)]
    return [*path_of(m - k, begin + k, end), mth(begin, begin + k)]


def subproof(m, begin, end, whole):
    """SUBPROOF(m, D[begin:end], whole)."""
    if m == end - begin:
        return [] if whole else [mth(begin, end)]
    k = largest_power_below(end - begin)
    if m <= k:
        return [*subproof(m, begin, begin + k, whole), mth(begin + k, end)]
    return [*subproof(m - k, begin + k, end, False), mth(begin, begin + k)]


def root_of_path(leaf, m, n, path):
    """The root that PATH(m, D[n]) leads to, by the same recursion; None where the path is too short or too long."""
    if n == 1:
        return None if path else leaf
    if not path:
        return None
    k = largest_power_below(n)
    *rest, top = path
    below = root_of_path(leaf, m, k, rest) if m < k else root_of_path(leaf, m - k, n - k, rest)
    if below is None:
        return None
    return node_hash(below, top) if m < k else node_hash(top, below)


def roots_of_subproof(old_root, m, n, whole, path):
    """The roots of both trees that SUBPROOF(m, D[n], whole) leads to; None as above."""
    if m == n:
        if whole:
            return None if path else (old_root, old_root)
        return (path[0], path[0]) if len(path) == 1 else None
    if not path:
        return None
    k = largest_power_below(n)
    *rest, top = path
    if m <= k:
        below = roots_of_subproof(old_root, m, k, whole, rest)
        return below and (below[0], node_hash(below[1], top))
    below = roots_of_subproof(old_root, m - k, n - k, False, rest)
    return below and (node_hash(top, below[0]), node_hash(top, below[1]))


def node(level, position):
    """Complete subtrees only, of the log of 70 entries."""
    begin, end = position << level, (position + 1) << level
    assert level >= 0
    assert 0 <= begin < end <= MOST
    return mth(begin, end)


def of_size(size):
    """A node function that knows nothing beyond a log of `size`."""

    def known(level, position):
        assert (position + 1) << level <= size
        return node(level, position)

    return known


def accepts(check, *arguments):
    try:
        check(*arguments)
    except Tampered:
        return False
    return True


# -- known answers -----------------------------------------------------------------------------------------------------


def test_roots_are_those_of_the_published_vectors():
    frontier = Frontier()
    assert frontier.root() == EMPTY_ROOT == ROOTS[0]
    for size, entry in enumerate(ENTRIES, 1):
        frontier.append(leaf_hash(entry))
        assert frontier.root() == ROOTS[size]


def published(level, position):
    frontier = Frontier()
    frontier.extend([leaf_hash(entry) for entry in ENTRIES[position << level : (position + 1) << level]])
    assert frontier.size == 1 << level
    return frontier.root()


@pytest.mark.parametrize(("index", "size"), INCLUSIONS)
def test_inclusion_proofs_are_those_of_the_published_vectors(index, size):
    path = [bytes.fromhex(text) for text in INCLUSIONS[index, size]]
    assert inclusion_proof(index, size, published) == path
    verify_inclusion(leaf_hash(ENTRIES[index]), index, size, path, ROOTS[size])


@pytest.mark.parametrize(("old", "new"), CONSISTENCIES)
def test_consistency_proofs_are_those_of_the_published_vectors(old, new):
    path = [bytes.fromhex(text) for text in CONSISTENCIES[old, new]]
    assert consistency_proof(old, new, published) == path
    verify_consistency(old, ROOTS[old], new, ROOTS[new], path)


def test_a_node_is_no_entry():
    left, right = LEAVES[:2]
    assert leaf_hash(left + right) != node_hash(left, right)


# -- frontier ----------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, MOST), max_size=4).filter(lambda parts: sum(parts) <= MOST))
def test_a_frontier_grows_the_same_in_any_parts(parts):
    frontier, made = Frontier(), []
    for count in parts:
        made += frontier.extend(LEAVES[frontier.size : frontier.size + count])
        assert frontier.root() == mth(0, frontier.size)
        assert [value for _, _, value in frontier.nodes()] == frontier.hashes
        assert all(value == node(level, position) for level, position, value in frontier.nodes())
        assert sum(1 << level for level, _, _ in frontier.nodes()) == frontier.size
    # Each complete subtree is told of exactly once, after those that it is made of.
    complete = {(level, p) for level in range(8) for p in range(frontier.size >> level)}
    assert [(level, position) for level, position, _ in made] == sorted(
        complete, key=lambda each: ((each[1] + 1) << each[0], each[0])
    )
    assert all(value == node(level, position) for level, position, value in made)


@pytest.mark.parametrize("size", range(MOST + 1))
def test_a_frontier_survives_its_encoding(size):
    frontier = Frontier()
    frontier.extend(LEAVES[:size])
    data = frontier.encode()
    again = Frontier.decode(data)
    assert (again.size, again.hashes, again.root()) == (size, frontier.hashes, mth(0, size))
    assert again.encode() == data
    for shorter in range(len(data)):
        with pytest.raises(Truncated):
            Frontier.decode(data[:shorter])
    with pytest.raises(Tampered):
        Frontier.decode(data + b"\x00")


@pytest.mark.parametrize("size", [1 << 62, 1 << 63, (1 << 64) - 1])
def test_a_frontier_of_an_impossible_size_is_refused(size):
    data = size.to_bytes(8, "big") + bytes(32 * size.bit_count())
    with pytest.raises(Tampered):
        Frontier.decode(data)


@given(st.binary(max_size=200))
def test_any_bytes_into_a_frontier(data):
    with contextlib.suppress(StrongroomError):
        assert Frontier.decode(data).encode() == data


def test_a_copy_goes_its_own_way():
    frontier = Frontier()
    frontier.extend(LEAVES[:5])
    other = frontier.copy()
    other.append(LEAVES[5])
    assert (frontier.size, frontier.root()) == (5, mth(0, 5))
    assert (other.size, other.root()) == (6, mth(0, 6))


def test_an_extension_that_fails_appends_nothing():
    frontier = Frontier()
    frontier.extend(LEAVES[:3])
    before = frontier.encode()

    def leaves():
        yield from LEAVES[3:10]
        raise OSError

    with pytest.raises(OSError):  # noqa: PT011 - the very one
        frontier.extend(leaves())
    with pytest.raises(UsageError):
        frontier.extend([*LEAVES[3:10], b"no hash"])
    assert frontier.encode() == before


def test_a_frontier_is_never_larger_than_a_log_may_be():
    size = (1 << 62) - 1
    frontier = Frontier(size, [bytes(32)] * 62)
    with pytest.raises(LimitExceeded):
        frontier.append(bytes(32))
    assert frontier.size == size


@pytest.mark.parametrize(("size", "count"), [(-1, 0), (0, 1), (3, 1), (4, 2), (1 << 62, 1)])
def test_subtrees_that_do_not_fit_the_size(size, count):
    with pytest.raises(UsageError):
        Frontier(size, [bytes(32)] * count)


# -- proofs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", range(1, MOST + 1))
def test_every_inclusion_proof_is_that_of_the_definition(size):
    root = mth(0, size)
    for index in range(size):
        path = inclusion_proof(index, size, of_size(size))
        assert path == path_of(index, 0, size)
        verify_inclusion(LEAVES[index], index, size, path, root)
        for other in range(size):
            assert accepts(verify_inclusion, LEAVES[index], other, size, path, root) == (other == index)
            assert accepts(verify_inclusion, LEAVES[other], index, size, path, root) == (other == index)


@pytest.mark.parametrize("new", range(MOST + 1))
def test_every_consistency_proof_is_that_of_the_definition(new):
    for old in range(new + 1):
        path = consistency_proof(old, new, of_size(new))
        assert path == (subproof(old, 0, new, True) if old else [])
        verify_consistency(old, mth(0, old), new, mth(0, new), path)
        for other in range(new + 1):
            if other != old:
                assert not accepts(verify_consistency, old, mth(0, other), new, mth(0, new), path)
            if other != new:
                # From the empty log every log goes on: its root is bound by its signature alone.
                expected = old == 0 < new
                assert accepts(verify_consistency, old, mth(0, old), new, mth(0, other), path) == expected


@pytest.mark.parametrize("size", range(1, 18))
def test_every_bit_of_an_inclusion_proof_counts(size):
    root = mth(0, size)
    for index in range(size):
        path = path_of(index, 0, size)
        for altered in flips([LEAVES[index], root, *path]):
            assert not accepts(verify_inclusion, altered[0], index, size, altered[2:], altered[1])
        for other in lengths(path):
            assert not accepts(verify_inclusion, LEAVES[index], index, size, other, root)


@pytest.mark.parametrize("new", range(2, 14))
def test_every_bit_of_a_consistency_proof_counts(new):
    for old in range(1, new):
        path = subproof(old, 0, new, True)
        for altered in flips([mth(0, old), mth(0, new), *path]):
            assert not accepts(verify_consistency, old, altered[0], new, altered[1], altered[2:])
        for other in lengths(path):
            assert not accepts(verify_consistency, old, mth(0, old), new, mth(0, new), other)


def flips(values):
    for at, value in enumerate(values):
        for bit in range(8 * len(value)):
            flipped = (int.from_bytes(value, "big") ^ 1 << bit).to_bytes(len(value), "big")
            yield [*values[:at], flipped, *values[at + 1 :]]


def lengths(path):
    """Proofs that are longer, shorter, or made of pieces that are no hashes."""
    yield [*path, bytes(32)]
    yield [bytes(32), *path]
    if path:
        yield path[:-1]
        yield path[1:]
        yield [*path, path[-1]]
        yield [path[0][:-1], *path[1:]]
        yield [path[0] + b"\x00", *path[1:]]


@pytest.mark.parametrize("size", range(1, 34))
def test_an_inclusion_proof_holds_for_no_other_place(size):
    """Index and size altered, the root kept: accepted only where the definition itself leads from that place to that
    root, as for entries whose way up is the same in a larger tree. Size and root come from one signed checkpoint."""
    root = mth(0, size)
    for index in range(size):
        path = path_of(index, 0, size)
        for place in [(index ^ 1 << bit, size) for bit in range(64)] + [(index, size ^ 1 << bit) for bit in range(64)]:
            inside = place[0] < place[1] < 1 << 62
            expected = inside and root_of_path(LEAVES[index], *place, path) == root
            assert accepts(verify_inclusion, LEAVES[index], *place, path, root) == expected
            if place[0] != index:
                assert not expected
            elif place[1] <= MOST:  # with the root that belongs to that size there is no such case
                assert not accepts(verify_inclusion, LEAVES[index], *place, path, mth(0, place[1]))


@pytest.mark.parametrize("new", range(2, 34))
def test_a_consistency_proof_holds_for_no_other_sizes(new):
    for old in range(1, new):
        path, roots = subproof(old, 0, new, True), (mth(0, old), mth(0, new))
        for sizes in [(old ^ 1 << bit, new) for bit in range(64)] + [(old, new ^ 1 << bit) for bit in range(64)]:
            inside = 0 < sizes[0] < sizes[1] < 1 << 62
            expected = inside and roots_of_subproof(roots[0], *sizes, True, path) == roots
            assert accepts(verify_consistency, sizes[0], roots[0], sizes[1], roots[1], path) == expected
            if max(sizes) <= MOST:
                assert not accepts(verify_consistency, sizes[0], mth(0, sizes[0]), sizes[1], mth(0, sizes[1]), path), (
                    sizes
                )


def test_a_way_that_goes_on_above_the_root():
    """Root and proof that fit each other, for a tree that is higher than its size says."""
    for size in (1, 2, 5, 8):
        path, above = path_of(0, 0, size), bytes(range(32))
        for root in (node_hash(above, mth(0, size)), node_hash(mth(0, size), above)):
            assert not accepts(verify_inclusion, LEAVES[0], 0, size, [*path, above], root)
            if size > 1:
                longer = [*subproof(1, 0, size, True), above]
                assert not accepts(verify_consistency, 1, LEAVES[0], size, root, longer)


def test_hashes_are_not_cut_elsewhere():
    """The same bytes, divided in another way between the two that are hashed together."""
    left, right = LEAVES[:2]
    verify_inclusion(left, 0, 2, [right], mth(0, 2))
    assert not accepts(verify_inclusion, left[:31], 0, 2, [left[31:] + right], mth(0, 2))
    assert not accepts(verify_inclusion, left + right, 0, 2, [b""], mth(0, 2))
    path = subproof(1, 0, 2, True)
    assert not accepts(verify_consistency, 1, left[:31], 2, mth(0, 2), [left[31:] + path[0]])


def test_the_empty_log_has_one_root():
    verify_consistency(0, EMPTY_ROOT, 0, EMPTY_ROOT, [])
    for roots in ((EMPTY_ROOT, mth(0, 1)), (mth(0, 1), EMPTY_ROOT), (mth(0, 1), mth(0, 1))):
        assert not accepts(verify_consistency, 0, roots[0], 0, roots[1], [])
    assert not accepts(verify_consistency, 0, mth(0, 1), 5, mth(0, 5), [])
    assert not accepts(verify_consistency, 0, EMPTY_ROOT, 5, mth(0, 5), [mth(0, 5)])


def test_equal_sizes_have_equal_roots_and_no_proof():
    verify_consistency(5, mth(0, 5), 5, mth(0, 5), [])
    assert not accepts(verify_consistency, 5, mth(0, 5), 5, mth(0, 4), [])
    assert not accepts(verify_consistency, 5, mth(0, 5), 5, mth(0, 5), [mth(0, 5)])


@given(numbers, numbers, hashes, st.binary(max_size=33), st.binary(max_size=33))
def test_any_numbers_into_a_verifier(one, two, path, first, second):
    for check in (
        lambda: verify_inclusion(first, one, two, path, second),
        lambda: verify_consistency(one, first, two, second, path),
    ):
        try:
            check()
        except StrongroomError as error:
            assert isinstance(error, Tampered)


@given(numbers, numbers)
def test_any_numbers_into_a_prover(one, two):
    for check, allowed in (
        (inclusion_proof, 0 <= one < two < 1 << 62),
        (consistency_proof, 0 <= one <= two < 1 << 62),
    ):
        if allowed:
            assert len(check(one, two, lambda _level, _position: bytes(32))) <= 63
        else:
            with pytest.raises(UsageError):
                check(one, two, node)


@given(st.integers(-1, MOST), st.integers(-1, MOST))
def test_only_what_is_a_subtree_has_a_hash(begin, end):
    count = end - begin
    power = 1
    while power < count:
        power *= 2
    if begin >= 0 and count > 0 and begin % power == 0:
        assert range_hash(begin, end, node) == mth(begin, end)
    else:
        with pytest.raises(UsageError):
            range_hash(begin, end, node)
