"""The child process that reads a version's tokenizer.json as the bytes of its tokens: loaded by
`strongroom.vault.spelling`, in a process of its own, since the file came with the version and may be made to fill
memory. It is read as data: no tokenizer of anybody's is run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from strongroom.vault.child import Confined

_MOST = 1 << 22  # tokens of a vocabulary
_SPACE = "\u2581"  # what stands for a space in the vocabularies of SentencePiece


def main(memory: int, cpu_seconds: int) -> None:
    """Read one tokenizer, and answer with the bytes of each of its tokens."""
    parent = Confined()
    try:
        if parent.enter(memory=memory, seconds=cpu_seconds):
            parent.answer(vocabulary=vocabulary(next(parent.asked())))
    except MemoryError:
        parent.answer(error="unsupported", message="the tokenizer takes more memory than its size explains")
    except BaseException as error:  # noqa: BLE001 - whatever it is that a file can cause
        parent.answer(error="unsupported", message=f"the tokenizer can't be read: {str(error)[:200]}")


def vocabulary(tokenizer: str) -> dict[str, Any]:
    """``tokens``: of each number the bytes, as text in Latin-1, None where there is no such token; ``control``: the
    numbers of those that answers are mostly written without; ``spaced``: whether the first space of a text is left
    out. ValueError for a decoder that does more than put pieces side by side."""
    import json

    value = json.loads(tokenizer)
    write, spaced = _decoder(value.get("decoder"))
    found: dict[int, bytes] = {}
    for number, text in _model(value["model"]["vocab"]):
        found[_checked(number)] = write(text)
    control = []
    for each in value.get("added_tokens") or ():
        found[_checked(each["id"])] = write(each["content"])
        if each.get("special"):
            control.append(each["id"])
    tokens = [each.decode("latin-1") if (each := found.get(n)) is not None else None for n in range(max(found) + 1)]
    return {"tokens": tokens, "control": control, "spaced": spaced}


def _model(vocab: Mapping[str, int] | Sequence[Sequence[Any]]) -> Iterator[tuple[int, str]]:
    if isinstance(vocab, Mapping):
        return ((number, text) for text, number in vocab.items())
    return ((number, pair[0]) for number, pair in enumerate(vocab))  # of a unigram model


def _checked(number: Any) -> int:
    if type(number) is not int or not 0 <= number < _MOST:
        raise ValueError(f"a token has the number {number!r:.40}")
    return number


def _decoder(decoder: Any) -> tuple[Callable[[str], bytes], bool]:
    """What writes one token, and whether a text's first space is left out."""
    steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    kinds = [each["type"] for each in steps]
    if [kind for kind in kinds if kind != "Fuse"] == ["ByteLevel"]:
        return _byte_level(), False
    spaced = False
    for at, step in enumerate(steps):
        before = kinds[:at]
        match step["type"]:
            case "Replace" if step["pattern"] == {"String": _SPACE} and step["content"] == " " and not before:
                pass
            case "Metaspace" if step["replacement"] == _SPACE and not before:
                spaced = spaced or step.get("prepend_scheme", "always") != "never"
            case "ByteFallback" | "Fuse":
                pass
            case "Strip" if "Fuse" in before and (step["content"], step["start"], step["stop"]) == (" ", 1, 0):
                spaced = True
            case kind:
                raise ValueError(f"its decoder is {kind}, of which no token's bytes are known")
    if not {"Replace", "Metaspace"} & set(kinds):
        raise ValueError("its decoder is none of those whose tokens' bytes are known")
    return (_fallback if "ByteFallback" in kinds else _plain), spaced


def _byte_level() -> Callable[[str], bytes]:
    """That of GPT-2 and most after it: a letter for each byte."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [each for each in range(256) if each not in shown]
    letters = {chr(each): each for each in shown} | {chr(256 + n): each for n, each in enumerate(hidden)}

    def write(text: str) -> bytes:
        found = [letters.get(letter) for letter in text]
        # As the library does: a token with any other letter, such as an added one with a space, stands for itself.
        return text.encode() if None in found else bytes(each for each in found if each is not None)

    return write


def _plain(text: str) -> bytes:
    return text.replace(_SPACE, " ").encode()


def _fallback(text: str) -> bytes:
    if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
        try:
            return bytes([int(text[3:5], 16)])
        except ValueError:
            pass
    return _plain(text)
