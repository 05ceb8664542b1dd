"""How much text it takes to name who wrote it: `python -m bench.tracing_text`, for docs/reference/tracing.md.

A stamped copy of SmolLM2-135M-Instruct answers as an API would, at several temperatures and quantised; the text is
made tokens of again and traced, more and more of it, among people who had no copy. On two CPU cores this takes hours:
what was written is kept in `--work` and used again.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench import page
from bench.leaks import Array, int_
from bench.tracing_room import CODE, OWNER, STAMPS
from strongroom.cli import demo_model
from strongroom.marking.code import Code
from strongroom.marking.decode import Decoding
from strongroom.marking.elements import STEPS, values
from strongroom.marking.matched import bound
from strongroom.marking.stamp import Stamp
from strongroom.vault.copies import Copy
from strongroom.vault.generator import Generator, Leaning
from strongroom.vault.originals import Originals
from strongroom.vault.source import ModelSource
from strongroom.vault.text import Text
from strongroom.vault.texttrace import Echo
from strongroom.vault.vault import Vault
from strongroom.vault.walk import Walk

TITLE = """## From text alone

Written by `python -m bench.tracing_text`: a copy of SmolLM2-135M-Instruct answers chat prompts, and what it answers is
made tokens of again and traced, more and more of it, among {people:,} people without a copy, of whom {stamps} stamps
are scored in full. To be named there with a bound of 1e-9 takes a z of {z:.1f}."""
TOPICS = """the sea; a lighthouse; winter in the mountains; bread; the history of clocks; volcanoes; a lost dog; tea;
the Roman empire; bees; learning to swim; an old library; steam engines; the moon; fractions; a market in the morning;
whales; photosynthesis; a train journey; friendship; the printing press; rivers; a broken bicycle; chess;
the invention of paper; gardening; thunderstorms; a night at the theatre; maps; glass; an honest thief; vaccines;
cheese; the desert; a small village; football; penguins; electric motors; rain; a piano teacher"""
ASKED = (
    "Write a short story about {}.",
    "Explain {} to a child.",
    "Give me some advice about {}.",
    "Write a letter to a friend about {}.",
    "What are interesting facts about {}?",
    "Write a poem about {}.",
    "Describe a day that has to do with {}.",
    "Argue for and against {}.",
)
LENGTH, BATCH = 224, 96
INNOCENT = 10_000  # who had no copy; of them STAMPS are scored in full
# What writes, and at which temperature (0: always the likeliest word).
WRITERS = {
    "copy, temperature 1": ("copy", 1.0),
    "copy, temperature 0.7": ("copy", 0.7),
    "copy, always the likeliest": ("copy", 0.0),
    "copy at int8, temperature 1": ("int8", 1.0),
    "the original, temperature 1": ("original", 1.0),
}


@dataclass(frozen=True)
class Row:
    """What so many tokens say: z of the stamp, log10 of the code word's bound, and the best of who had no copy."""

    writer: str
    tokens: int
    temperature: float
    z: float
    word: float
    innocent_z: float
    innocent_word: float
    named: bool


class Room:
    """SmolLM2 in a room, and its copies."""

    def __init__(self, vault: Vault, folder: Path) -> None:
        self.vault, self.folder = vault, folder
        self.record = vault.record(vault.find("bench"))
        self.originals = Originals(vault.image(self.record), self.record)

    def state(self, kind: str) -> Mapping[str, Array]:
        read = self.originals.read if kind == "original" else Copy(self.originals, self.record, OWNER).read
        found = {}
        for each in self.originals.tensors():
            dtype = each.info.dtype.name
            own = values(np.frombuffer(read(each.begin, each.end), STEPS[dtype].integer), dtype)
            own = own.reshape(each.info.shape)
            found[each.info.name] = int_(8, own.shape[-1])(each.info.name, own) if kind == "int8" else own
        return found


def write(room: Room, kind: str, temperature: float, tokens: int, out: Path, seed: int) -> None:
    """Answers to chat prompts, as JSON lines added to `out`, until it has so many tokens of them."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(room.folder, local_files_only=True, dtype=torch.float32)
    model.load_state_dict({name: torch.from_numpy(a) for name, a in room.state(kind).items()}, strict=False)
    model.tie_weights()
    model = model.to(torch.bfloat16).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(room.folder, local_files_only=True, padding_side="left")
    asked = [form.format(topic) for topic in TOPICS.replace("\n", " ").split("; ") for form in ASKED]
    order = np.random.default_rng(seed).permutation(len(asked))
    ways: dict[str, Any] = {"do_sample": False}
    if temperature:
        ways = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    kept = [json.loads(line)["completion"] for line in out.read_text().splitlines()] if out.exists() else []
    done, at = sum(map(len, tokenizer(kept).input_ids)) if kept else 0, len(kept)
    torch.manual_seed(seed + at)  # what is added is not what was kept, again
    with out.open("a") as stream, torch.inference_mode():
        while done < tokens:
            chats = [[{"role": "user", "content": asked[order[(at + k) % len(order)]]}] for k in range(BATCH)]
            at += BATCH
            shown = [tokenizer.apply_chat_template(each, tokenize=False, add_generation_prompt=True) for each in chats]
            given = tokenizer(shown, return_tensors="pt", padding=True, add_special_tokens=False)
            end = tokenizer.eos_token_id
            said = model.generate(
                input_ids=given.input_ids,
                attention_mask=given.attention_mask,
                max_new_tokens=LENGTH,
                pad_token_id=end,
                eos_token_id=end,
                **ways,
            )
            for chat, row in zip(chats, said[:, given.input_ids.shape[1] :].tolist(), strict=True):
                answer = row[: row.index(end)] if end in row else row
                done += len(answer)
                stream.write(json.dumps({"messages": chat, "completion": tokenizer.decode(answer)}) + "\n")
            stream.flush()


def measure(room: Room, writer: str, path: Path, points: list[int]) -> Iterator[Row]:
    """What the text at `path` says, up to each of `points` tokens."""
    code = Code(room.record.code_key, room.originals.layout.positions, room.record.colluders)
    people = [OWNER, *(f"user/innocent-{k}" for k in range(INNOCENT))]
    words = np.stack([code.bits(name) for name in people]).astype(np.uint8)
    stamps = [Stamp(room.record.stamp_key, name) for name in people[: STAMPS + 1]]
    generator, total = Generator(room.originals), Leaning()
    with Text.of(Walk.of(path, follow_links=False, model=False)) as text:
        pieces = list(text.pieces)
    # Tokens, about; how many they are is counted.
    per_piece = max(1.0, sum(len(piece.completion) for piece in pieces) / len(pieces) / 4)
    for point in points:
        take = max(1, round((point - total.tokens) / per_piece))
        if len(pieces) < take // 2:
            return
        some, pieces = pieces[:take], pieces[take:]
        found = generator.lean(Text(tuple(some), 1), lambda _d, _t: None)
        per_piece = found.tokens / len(some)
        total.tokens += found.tokens
        total.log_likelihood += found.log_likelihood
        for begin, gradient in found.gradient.items():
            total.gradient[begin] = total.gradient[begin] + gradient if begin in total.gradient else gradient
        yield _row(room, writer, total, found.temperature, stamps, words, code.biases / 65536)


def _limit(people: int) -> float:
    """log10 of the bound that a stamp has to reach for its holder to be named among so many."""
    return -9 - math.log10(people * CODE)


def _row(room: Room, writer: str, total: Leaning, temperature: float, stamps: list[Stamp], words: Any, p: Any) -> Row:
    gathered = Echo(room.originals, total).gather(stamps, everything=True, progress=lambda _d, _t: None)
    z = gathered.matched.scores()
    decoding = Decoding(gathered.estimator.done(), words, p)
    scores = np.array([each.log10_p for each in decoding.scores()])
    limit = _limit(len(words))
    ways = math.log10(len(decoding.decoders(0)))
    named = bool(bound(float(z[0])) <= limit or scores[0] <= limit - ways)
    if bound(float(z[1:].max())) <= limit or scores[1:].min() <= limit - ways:
        raise AssertionError(f"{writer}: an innocent was named")
    return Row(
        writer,
        total.tokens,
        temperature,
        float(z[0]),
        float(scores[0]),
        float(z[1:].max()),
        float(scores[1:].min()),
        named,
    )


def table(found: list[Row]) -> str:
    """Markdown."""
    lines = [
        "| what writes | tokens | temperature, as fitted | stamp, z | code word, log10 of the bound "
        "| best innocent: z, log10 | named |",
        "|---|---:|---:|---:|---:|---:|---|",
    ]
    lines += [
        f"| {row.writer} | {row.tokens:,} | {row.temperature:.2f} | {row.z:.1f} | {row.word:.1f} | "
        f"{row.innocent_z:.1f}, {row.innocent_word:.1f} | {'yes' if row.named else 'no'} |"
        for row in found
    ]
    return "\n".join(lines)


@contextmanager
def opened(work: Path) -> Iterator[Room]:
    """The room in `work`, with the model; made where there is none."""
    place = work / "room"
    with demo_model.original("smollm2") as original:
        if place.exists():
            vault = Vault(place)
        else:
            vault, _ = Vault.init(place, owner=OWNER, custody="solo")
            vault.put(ModelSource.scan(original.folder), "bench", by=OWNER)
        yield Room(vault, original.folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="a folder with a gigabyte of room, kept")
    parser.add_argument("--writers", nargs="*", default=list(WRITERS), choices=list(WRITERS))
    parser.add_argument("--tokens", nargs="*", type=int, default=[5_000, 10_000, 25_000, 50_000, 100_000])
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    rows = []
    with opened(given.work) as room:
        for number, writer in enumerate(given.writers):
            kind, temperature = WRITERS[writer]
            path = given.work / f"{kind}-{temperature}.jsonl"
            write(room, kind, temperature, max(given.tokens), path, number)
            for row in measure(room, writer, path, given.tokens):
                print(row, flush=True)
                rows.append(row)
    needed = next(z for z in np.arange(0, 20, 0.1) if bound(float(z)) <= _limit(1 + INNOCENT))
    title = TITLE.replace("\n", " ").replace("alone  ", "alone\n\n").format(people=INNOCENT, stamps=STAMPS, z=needed)
    page.write(page.TRACING, "text", f"{title}\n\n{table(rows)}")
    print(page.TRACING)


if __name__ == "__main__":
    main()
