"""The child process that makes tokens of text: loaded by `strongroom.vault.tokens`, in a process of its own.

A version's tokenizer and chat template are programs that came with it, and whoever put it may have meant harm: a
normaliser that makes a gigabyte of one letter, a template that counts for hours. Here they have no network and no
files, and bounded memory and time.
"""

from __future__ import annotations

import importlib
from typing import Any

from strongroom.vault.child import Confined


def main(memory: int, cpu_seconds: int) -> None:
    """Read the tokenizer, then lists of [messages, prompt, completion]; answer each list with pairs of token ids."""
    parent = Confined()
    stage = "the version's tokenizer can't be read"
    try:
        tokenizers, transformers = (importlib.import_module(name) for name in ("tokenizers", "transformers"))
        if not parent.enter(memory=memory, seconds=cpu_seconds):
            return
        asked = parent.asked()
        own = _built(tokenizers, transformers, next(asked))
        parent.answer(ready=True)
        for pieces in asked:
            found = []
            for messages, prompt, completion in pieces:
                stage = "the chat template of the version does not take these messages"
                if messages:
                    prompt = own.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)  # noqa: PLW2901
                stage = "the version's tokenizer does not take this text"
                found.append([_ids(own, prompt, special=not messages), _ids(own, completion)])
            parent.answer(tokens=found)
    except MemoryError:
        parent.answer(error="unsupported", message=f"{stage}: it takes more memory than its size explains")
    except BaseException as error:  # noqa: BLE001  # what is written in Rust panics, which is no Exception
        parent.answer(error="unsupported", message=f"{stage}: {str(error)[:300] or type(error).__name__}")


def _built(tokenizers: Any, transformers: Any, given: dict[str, Any]) -> Any:
    own = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(given["tokenizer"]), **given["special"]
    )
    own.chat_template = given["template"]
    # A prompt that is cut off silently, or filled up, would not be the one that was answered.
    own.backend_tokenizer.no_truncation()
    own.backend_tokenizer.no_padding()
    return own


def _ids(own: Any, words: str | None, *, special: bool = False) -> list[int] | None:
    if words is None:
        return None
    ids: list[int] = own.backend_tokenizer.encode(words, add_special_tokens=special).ids
    return ids
