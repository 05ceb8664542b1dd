"""What tokens spell is read once for all who ask."""

from __future__ import annotations

import asyncio
import threading

from strongroom.errors import BackendError, UsageError
from strongroom.gateway.spelt import Spellings, spelled
from strongroom.vault.spelling import Spelling

LETTERS = Spelling([b"a", b"b"], (), spaced=False)


def test_many_who_ask_at_once_have_it_read_once():
    asked, go = [], threading.Event()

    def read(ref):
        asked.append(ref)
        assert go.wait(30)
        return LETTERS

    async def work():
        spellings = Spellings(read)
        waiting = [asyncio.create_task(spellings.of("acme/tiny@1")) for _ in range(20)]
        await asyncio.sleep(0)
        waiting[0].cancel()  # whoever leaves takes it from nobody
        await asyncio.sleep(0)
        go.set()
        assert await asyncio.gather(*waiting[1:]) == [LETTERS] * 19
        assert await spellings.of("acme/tiny@1") is LETTERS

    asyncio.run(work())
    assert asked == ["acme/tiny@1"]


def test_what_can_not_be_known_is_asked_once_and_what_failed_again():
    errors = [BackendError("db.down", "the database is down"), UsageError("spelling.unknown", "it has none")]
    asked = []

    def read(ref):
        asked.append(ref)
        raise errors[min(len(asked), len(errors)) - 1]

    async def work():
        spellings = Spellings(read)
        assert [await spellings.of("acme/tiny@1") for _ in range(4)] == [None] * 4

    asyncio.run(work())
    assert len(asked) == 2


def test_no_choice_has_a_text_without_tokens_of_its_own():
    assert spelled(LETTERS, {0: [0, 1], 1: [1]}, {0: ["a", "b"], 1: ["b"]})
    assert not spelled(LETTERS, {0: [0, 1, 1]}, {0: ["ab"], 1: ["b"]})
    assert spelled(LETTERS, {0: [0], 1: [1]}, {0: [], 1: [""]})
