"""What the environment may say."""

from __future__ import annotations

import os

import pytest

from strongroom.core.settings import Settings
from strongroom.errors import UsageError


@pytest.mark.parametrize(("text", "workers"), [("1", 1), ("0007", 7), ("1024", 1024)])
def test_a_number_of_threads(monkeypatch: pytest.MonkeyPatch, text: str, workers: int) -> None:
    monkeypatch.setenv("STRONGROOM_THREADS", text)
    assert Settings.from_environment().workers == workers


@pytest.mark.parametrize("text", [None, ""])
def test_without_one_there_is_a_thread_for_each_core(monkeypatch: pytest.MonkeyPatch, text: str | None) -> None:
    monkeypatch.delenv("STRONGROOM_THREADS", raising=False)
    if text is not None:
        monkeypatch.setenv("STRONGROOM_THREADS", text)
    assert Settings.from_environment().workers == len(os.sched_getaffinity(0))


@pytest.mark.parametrize("text", ["²", "٣", "0", "1025", "-1", "1.5", " 1", "1\n", "two", "9" * 5000])
def test_anything_else_is_an_error_and_not_a_guess(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("STRONGROOM_THREADS", text)
    with pytest.raises(UsageError) as caught:
        Settings.from_environment()
    assert caught.value.code == "settings.threads"
    assert len(caught.value.message) < 150
