"""Heads of messages that were read once: the same bytes have the same reading, and are not read again.

Nearly all requests of a connection, and nearly all answers, begin with the same bytes but for the digits of a length.
To compare them costs a tenth of reading them. What differs in anything else goes to the parser, which is strict.
"""

from __future__ import annotations

from typing import Generic, TypeVar

T = TypeVar("T")
_DIGITS = 8  # of a length at most; a longer body is read as if nothing were known
_LONGEST = 4096  # bytes of a head: each connection keeps one
_LENGTH = b"\r\ncontent-length:"


class KnownHead(Generic[T]):
    """A head that a parser has taken, of a connection that goes on behind its body; `said`: what it says, but for the
    length. `digits` and `size`: of the length that was matched last."""

    __slots__ = ("_after", "_at", "_before", "_head", "digits", "said", "size")

    def __init__(self, head: bytes, at: int, digits: bytes, said: T) -> None:
        self._head, self._at, self.digits, self.size, self.said = head, at, digits, int(digits), said
        self._before, self._after = head[:at], head[at + len(digits) :]

    @classmethod
    def of(cls, data: bytes, body: int, digits: bytes, said: T) -> KnownHead[T] | None:
        """Out of a piece that a parser has read from the beginning of a message, and in which no other began: `body`
        bytes of it were body, and `digits` is what it took for the length. None where the head isn't plain."""
        end = data.find(b"\r\n\r\n") + 4
        # Else what is behind the head, or before it, would be taken for a part of it.
        if end != len(data) - body or end > _LONGEST or not digits.isdigit() or len(digits) > _DIGITS:
            return None
        head = data[:end]
        lower = head.lower()
        at = lower.find(_LENGTH) + len(_LENGTH)
        if at < len(_LENGTH) or lower.count(_LENGTH) != 1 or head.count(b"\n") != head.count(b"\r\n"):
            return None
        at += head[at : at + 1] == b" "
        return cls(head, at, digits, said) if head[at:].startswith(digits + b"\r\n") else None

    def matches(self, data: bytes) -> int:
        """Where the body begins in `data`, if that begins with this head, of whatever length of its body; else 0."""
        if data.startswith(self._head):
            return len(self._head)
        if not data.startswith(self._before):
            return 0
        end = data.find(b"\r", self._at, self._at + _DIGITS + 1)
        digits = data[self._at : max(end, 0)]
        if not digits.isdigit() or not data.startswith(self._after, end):
            return 0
        self.digits, self.size = digits, int(digits)
        self._head = data[: end + len(self._after)]
        return len(self._head)
