"""Shamir's secret sharing (CACM 22(11), 1979) of a 32-byte key over GF(2^8), with shares that can be written on paper.

Each byte of the secret is the constant term of a polynomial of degree k - 1 with uniformly random other coefficients;
share i holds the 32 values at x = i. Any k shares give the secret, k - 1 say nothing about it. A share on paper::

    srshare1-K-INDEX-SET-GROUP-GROUP-…

K and INDEX in decimal, SET 8 hex digits that all shares of one split have in common, then 22 groups of five characters
of Crockford's base 32 (no I, L, O, U; case does not matter). The last character of a group checks the group, so that an
error names the group that was mistyped; the other four carry the payload::

    commitment 16 | share 32 | SHA-256(label, K, INDEX, SET, commitment, share) truncated to 7 bytes

The commitment is SHA-256(label, K, SET, secret) truncated to 16 bytes. Combining ends by checking it: wrong shares
never give a wrong key silently. It tells nothing about a uniformly random secret, which is the only kind to share here.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from strongroom.errors import Tampered, UsageError

SECRET_BYTES = 32
MAX_SHARES = 255
_COMMITMENT_BYTES = 16
_CHECK_BYTES = 7
_PAYLOAD_BYTES = _COMMITMENT_BYTES + SECRET_BYTES + _CHECK_BYTES
_LABEL = b"strongroom/1 share "
_ALPHABET = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
_GROUPS = _PAYLOAD_BYTES * 8 // 20
_HEAD = re.compile(r"srshare1-([0-9]{1,3})-([0-9]{1,3})-([0-9a-f]{8})-(.+)", re.ASCII)
_MAX_TEXT = 1024


@dataclass(frozen=True)
class Share:
    """One share. `data` and `commitment` stay out of its repr."""

    k: int
    index: int  # the x coordinate, 1 to 255
    set_id: bytes  # 4 bytes, the same in all shares of one split
    commitment: bytes = field(repr=False)  # 16 bytes
    data: bytes = field(repr=False)  # 32 bytes

    def __str__(self) -> str:
        """The form for paper."""
        payload = self.commitment + self.data + self._check()
        symbols = _to_symbols(payload)
        groups = [_with_check(number, symbols[4 * number : 4 * number + 4]) for number in range(_GROUPS)]
        return f"srshare1-{self.k}-{self.index}-{self.set_id.hex()}-" + "-".join(groups)

    @classmethod
    def parse(cls, text: str) -> Share:
        """Read the form for paper; spaces, line breaks and case do not matter. UsageError names what is mistyped."""
        if len(text) > _MAX_TEXT:
            raise UsageError("share.malformed", "this is too long for a recovery share")
        head = _HEAD.fullmatch("".join(text.split()).lower())
        if head is None:
            raise UsageError("share.malformed", "a recovery share begins like srshare1-2-1-0a1b2c3d-")
        k, index, set_id = int(head[1]), int(head[2]), bytes.fromhex(head[3])
        payload = _from_symbols(_checked_symbols(head[4].replace("-", "").upper()))
        share = cls(k, index, set_id, payload[:_COMMITMENT_BYTES], payload[_COMMITMENT_BYTES:-_CHECK_BYTES])
        if not hmac.compare_digest(share._check(), payload[-_CHECK_BYTES:]) or not _in_range(k, index):
            raise UsageError(
                "share.typo",
                f"share {index} of set {set_id.hex()} has a typing error that its groups do not show: "
                "look at the numbers at its beginning first",
                hint="compare it with the paper, character by character",
            )
        return share

    def _check(self) -> bytes:
        head = f"{self.k} {self.index} ".encode() + self.set_id
        return hashlib.sha256(_LABEL + b"check\x00" + head + self.commitment + self.data).digest()[:_CHECK_BYTES]


def split(secret: bytes, k: int, n: int, *, random: Callable[[int], bytes] = os.urandom) -> list[Share]:
    """`n` shares of the uniformly random 32-byte `secret`, any `k` of which give it back.

    `random(size)` returns that many uniformly random bytes. UsageError unless 2 <= k <= n <= 255.
    """
    if len(secret) != SECRET_BYTES:
        raise UsageError("share.bad_secret", f"a secret to share has {SECRET_BYTES} bytes, not {len(secret)}")
    if not 2 <= k <= n <= MAX_SHARES:
        raise UsageError(
            "share.bad_threshold",
            f"cannot make {n} shares of which {k} are needed; needed are at least 2, and at most as many as there are",
            hint="for example --recovery 2of3",
        )
    set_id = random(4)
    proof = _commitment(secret, k, set_id)
    coefficients = [secret, *(random(SECRET_BYTES) for _ in range(k - 1))]
    return [Share(k, x, set_id, proof, _evaluate(coefficients, x)) for x in range(1, n + 1)]


def combine(shares: Sequence[Share]) -> bytes:
    """The 32-byte secret of at least k `shares` of one split, in any order.

    UsageError for too few, duplicates and shares of several splits; Tampered when the shares, or a share beyond the
    first k, are not those of the secret that they commit to.
    """
    _require_one_set(shares)
    k = shares[0].k
    used = shares[:k]
    secret = _interpolate(used, 0)
    if not hmac.compare_digest(_commitment(secret, k, shares[0].set_id), shares[0].commitment):
        raise Tampered(
            "share.wrong",
            f"shares {', '.join(str(share.index) for share in used)} do not give the key that they commit to: "
            "at least one of them was altered",
            hint="try other shares of the same set",
        )
    for share in shares[k:]:
        if not hmac.compare_digest(_interpolate(used, share.index), share.data):
            raise Tampered("share.wrong", f"share {share.index} does not belong to the others: it was altered")
    return secret


def multiply(a: int, b: int) -> int:
    """The product in GF(2^8) modulo x^8 + x^4 + x^3 + x + 1 (FIPS 197), without tables or branches on the values.

    A table would be read at places that depend on the secret, which shows in the cache. Python's integers promise no
    constant time, but nothing here depends on the values by design.
    """
    product = 0
    for _ in range(8):
        product ^= -(b & 1) & a
        a = (a << 1) ^ (-(a >> 7) & 0x11B)
        b >>= 1
    return product


def _inverse(a: int) -> int:
    # a^254 = a^-1: the group of units has 255 elements (Fermat).
    result, square = 1, a
    for _ in range(7):
        square = multiply(square, square)
        result = multiply(result, square)
    return result


def _evaluate(coefficients: Sequence[bytes], x: int) -> bytes:
    value = bytes(SECRET_BYTES)
    for row in reversed(coefficients):  # Horner
        value = bytes(multiply(y, x) ^ c for y, c in zip(value, row, strict=True))
    return value


def _interpolate(shares: Sequence[Share], x: int) -> bytes:
    """The value at `x` of the polynomials through `shares` (Lagrange); minus is plus in this field."""
    value = bytes(SECRET_BYTES)
    for share in shares:
        weight = 1
        for other in shares:
            if other is not share:
                weight = multiply(weight, multiply(x ^ other.index, _inverse(share.index ^ other.index)))
        value = bytes(v ^ multiply(y, weight) for v, y in zip(value, share.data, strict=True))
    return value


def _require_one_set(shares: Sequence[Share]) -> None:
    if not shares:
        raise UsageError("share.too_few", "no recovery share was given")
    first = shares[0]
    seen: set[int] = set()
    for share in shares:
        if not _in_range(share.k, share.index) or len(share.data) != SECRET_BYTES:
            raise UsageError("share.malformed", f"share {share.index} is not one that was made by a split")
        if share.set_id != first.set_id or share.k != first.k:
            raise UsageError(
                "share.other_set",
                f"share {share.index} is of set {share.set_id.hex()}, share {first.index} of set {first.set_id.hex()}",
                hint="shares of different splits do not combine: give shares whose set is the same",
            )
        if share.index in seen:
            raise UsageError(
                "share.duplicate", f"share {share.index} was given twice", hint="give another share of the same set"
            )
        seen.add(share.index)
        if not hmac.compare_digest(share.commitment, first.commitment):
            raise Tampered("share.wrong", f"shares {first.index} and {share.index} commit to different keys")
    if len(shares) < first.k:
        raise UsageError(
            "share.too_few",
            f"{len(shares)} of the {first.k} shares that are needed were given",
            hint=f"give {first.k - len(shares)} more of set {first.set_id.hex()}",
            given=len(shares),
            needed=first.k,
        )


def _in_range(k: int, index: int) -> bool:
    return 2 <= k <= MAX_SHARES and 1 <= index <= MAX_SHARES


def _commitment(secret: bytes, k: int, set_id: bytes) -> bytes:
    return hashlib.sha256(_LABEL + b"commitment\x00" + bytes([k]) + set_id + secret).digest()[:_COMMITMENT_BYTES]


def _to_symbols(payload: bytes) -> str:
    number = int.from_bytes(payload, "big")
    count = len(payload) * 8 // 5
    return "".join(_ALPHABET[number >> 5 * (count - 1 - place) & 31] for place in range(count))


def _from_symbols(symbols: str) -> bytes:
    number = 0
    for symbol in symbols:
        number = number << 5 | _ALPHABET.index(symbol)
    return number.to_bytes(_PAYLOAD_BYTES, "big")


def _with_check(number: int, group: str) -> str:
    # The place of the group is part of it: two groups that were swapped are found, too.
    digest = hashlib.sha256(_LABEL + b"group\x00" + bytes([number]) + group.encode("ascii")).digest()
    return group + _ALPHABET[digest[0] & 31]


def _checked_symbols(text: str) -> str:
    """The payload's symbols, after the check of every group."""
    text = text.translate(str.maketrans("ILO", "110"))
    if len(text) != 5 * _GROUPS:
        raise UsageError(
            "share.malformed",
            f"a recovery share has {_GROUPS} groups of five characters ({5 * _GROUPS} in all), here are {len(text)}",
            hint="look for a character or a group that is missing or written twice",
        )
    symbols = ""
    for number in range(_GROUPS):
        group = text[5 * number : 5 * number + 5]
        if any(symbol not in _ALPHABET for symbol in group) or _with_check(number, group[:4]) != group:
            # The group itself is not repeated: it is key material.
            raise UsageError(
                "share.typo",
                f"there is a typing error in group {number + 1} of the share",
                hint=f"compare group {number + 1} after the set with the paper",
                group=number + 1,
            )
        symbols += group[:4]
    return symbols
