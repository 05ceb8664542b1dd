"""Callers as the gateway knows them, and a clock that tests set."""

from __future__ import annotations

from dataclasses import dataclass

REF = "acme/tiny@1"


@dataclass(frozen=True)
class Asker:
    principal: str = "user/ana"
    roles: tuple[str, ...] = ("researcher",)
    teams: tuple[str, ...] = ("team/red",)
    person: str = "user/ana"
    key: str = "k1"


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now
