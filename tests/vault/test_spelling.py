"""What tokens spell, against the library that runs such tokenizers."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from strongroom.client import Room
from strongroom.errors import UsageError
from strongroom.vault.callers import Callers
from strongroom.vault.spelling import Spelling
from strongroom.vault.vault import Vault
from strongroom.vault.vocabulary import vocabulary
from vault.rooms import write_model


def byte_level() -> Tokenizer:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["He", "llo", "\u0120wor", "ld", "\u00e2\u0124", *("\u0120" * n for n in (4, 80))]
    made = Tokenizer(models.BPE({text: n for n, text in enumerate([*letters, *words])}, []))
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<|end|>", "<|a b|>"])
    made.add_tokens([AddedToken("\u00e9t\u00e9 "), AddedToken("  ")])
    return made


def sentences() -> Tokenizer:
    """As LLaMA 2 has it."""
    words = ["\u2581Hello", "\u2581", "world", "\u2581\u2581", "\u00e9", "<0xZZ>"]
    pieces = [f"<0x{n:02X}>" for n in range(256)] + words
    made = Tokenizer(models.BPE({text: n for n, text in enumerate(pieces)}, [], byte_fallback=True))
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(steps)
    made.add_special_tokens(["<s>", "</s>"])
    return made


def read(tokenizer: Tokenizer | str) -> Spelling:
    found: dict[str, Any] = vocabulary(tokenizer if isinstance(tokenizer, str) else tokenizer.to_str())
    tokens = [None if each is None else each.encode("latin-1") for each in found["tokens"]]
    return Spelling(tokens, found["control"], spaced=found["spaced"])


BYTES, SENTENCES = byte_level(), sentences()


@settings(deadline=None)
@given(st.lists(st.integers(0, BYTES.get_vocab_size() - 1), max_size=30), st.booleans(), st.data())
def test_whatever_tokens_a_byte_level_tokenizer_writes_spell_it(tokens, control, data):
    text, spelling = BYTES.decode(tokens, skip_special_tokens=control), read(BYTES)
    assert spelling.spells(tokens, text)
    assert spelling.spells(tokens, text[: data.draw(st.integers(0, len(text)))])
    assert not spelling.spells(tokens, text + "x")
    changed = data.draw(st.text(min_size=1, max_size=40))
    assert (
        spelling.spells(tokens, changed)
        == any(BYTES.decode(tokens, skip_special_tokens=each).startswith(changed) for each in (True, False))
        or "\ufffd" in changed
    )


@settings(deadline=None)
@given(st.lists(st.sampled_from([0x41, 0xE2, 0x82, 0xAC, *range(256, 263)]), max_size=20))
def test_and_one_of_sentences_with_a_byte_for_what_it_does_not_know(tokens):
    spelling = read(SENTENCES)
    text = SENTENCES.decode(tokens, skip_special_tokens=True)
    if "\ufffd" not in text:  # of broken characters a run is written in more ways than are taken
        assert spelling.spells(tokens, text)
    assert not spelling.spells(tokens, text + "world!")


def test_a_broken_character_is_written_in_either_of_two_ways():
    spelling = Spelling([b"\xe2\x82", b"a"], (), spaced=False)
    assert spelling.spells([0, 1], "\ufffda")
    assert spelling.spells([0, 1], "\ufffd\ufffda")
    assert not spelling.spells([0, 1], "\ufffd\ufffd\ufffda")


@pytest.mark.parametrize("tokens", [[-1], [99], [1]])
def test_numbers_of_no_token_spell_nothing(tokens):
    assert not Spelling([b"a", None], (), spaced=False).spells(tokens, "a")


@pytest.mark.parametrize(
    "change",
    [
        {"decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True}},
        {"decoder": {"type": "Sequence", "decoders": [{"type": "Fuse"}]}},
        {"decoder": None},
        {"added_tokens": [{"id": 1 << 40, "content": "x"}]},
        {"model": {"vocab": {}}, "added_tokens": []},
        {"model": {"vocab": {"x": -1}}},
    ],
)
def test_a_tokenizer_of_which_it_is_not_known(change):
    value = json.loads(BYTES.to_str()) | change
    with pytest.raises((ValueError, TypeError, KeyError)):
        vocabulary(json.dumps(value))


def test_a_version_is_read_in_a_process_of_its_own(tmp_path):
    room, _ = Room.init(tmp_path / "room", owner="user/ana", custody="solo")
    with room:
        for name, tokenizer in (("acme/one", BYTES.to_str()), ("acme/two", "[" * 100_000), ("acme/three", None)):
            model = write_model(tmp_path / name.partition("/")[2])
            if tokenizer is not None:
                (model / "tokenizer.json").write_text(tokenizer, encoding="utf-8")
            room.put(model, name)
    vault = Vault(tmp_path / "room")
    callers = Callers(vault)
    try:
        tokens = [n for n in range(BYTES.get_vocab_size()) if BYTES.id_to_token(n) in ("He", "llo")]
        assert callers.spelling("acme/one@1").spells(tokens, "Hello")
        for ref, word in (("acme/two@1", "can't be read"), ("acme/three@1", "no tokenizer.json")):
            with pytest.raises(UsageError, match=word) as caught:
                callers.spelling(ref)
            assert caught.value.code == "spelling.unknown"
    finally:
        vault.close()
