"""What `strongroom infer` makes on a device, and what a verifier makes of it: `python -m bench.inference --device cuda`
writes its part of docs/explanation/extraction.md.

SmolLM2 goes from a room onto the device; the engine answers for one and for many; then every answer is run again by
verifiers on other devices and in other arithmetic, which is what honest servers differ by.
"""

from __future__ import annotations

import argparse
import gc
import platform
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bench import page
from strongroom.cli import demo_model
from strongroom.client.room import Room

if TYPE_CHECKING:
    from strongroom.infer.verify import Run

PAGE = Path("docs/explanation/extraction.md")
TEXT = Path(__file__).with_name("text.txt")
PROMPTS, LENGTH = 16, 24  # that each server answers for the verifiers, and their tokens


@dataclass(frozen=True)
class Served:
    """One server: how long the room took to fill its device, and tokens a second by how many answers at once."""

    dtype: str
    loaded: float
    rates: dict[int, float]
    runs: dict[int, list[Run]]


def asks(tokenizer: Any, count: int, most: int) -> Iterator[Any]:
    """Prompts out of a text; every second one at temperature 0.7 with `top_p` 0.9."""
    from strongroom.infer.engine import Ask
    from strongroom.infer.sampling import Sampling

    ids = tokenizer(TEXT.read_text(encoding="utf-8")).input_ids
    for k in range(count):
        at = k % PROMPTS * LENGTH
        how = Sampling(seed=k) if k % 2 else Sampling(seed=k, temperature=0.7, top_p=0.9)
        yield Ask(tuple(ids[at : at + LENGTH]), how, most)


def answered(engine: Any, wanted: Sequence[Any]) -> list[Run]:
    """What the engine says to all of them together."""
    from strongroom.errors import StrongroomError
    from strongroom.infer.engine import Token
    from strongroom.infer.verify import Run

    heard: list[list[int]] = [[] for _ in wanted]
    ends = [threading.Event() for _ in wanted]

    def tell(k: int, events: Sequence[Any]) -> None:
        for event in events:
            if isinstance(event, Token):
                heard[k].append(event.token)
            if isinstance(event, StrongroomError) or getattr(event, "finish", None):
                ends[k].set()

    for k, ask in enumerate(wanted):
        engine.submit(ask, lambda events, k=k: tell(k, events))
    for end in ends:
        if not end.wait(600):
            raise TimeoutError("the engine did not end an answer in 600 s")
    return [Run(ask.prompt, tuple(tokens), ask.sampling) for ask, tokens in zip(wanted, heard, strict=True)]


def served(room: Room, device: str, dtype: str, counts: Sequence[int], most: int) -> Served:
    from strongroom.infer.server import Settings, load
    from strongroom.load.transformers import tokenizer_from_room

    tokenizer = tokenizer_from_room(room.load("acme/smollm2"))
    begun = time.perf_counter()
    made, end = load(room.load("acme/smollm2"), Settings(rows=max(counts), dtype=dtype, device=device))
    loaded = time.perf_counter() - begun
    try:
        answered(made.engine, list(asks(tokenizer, 1, 4)))  # what is compiled or chosen at first is not timed
        rates: dict[int, float] = {}
        runs: dict[int, list[Run]] = {}
        for count in counts:
            wanted = list(asks(tokenizer, max(count, PROMPTS), most))
            begun = time.perf_counter()
            found = [
                run for at in range(0, len(wanted), count) for run in answered(made.engine, wanted[at : at + count])
            ]
            rates[count] = sum(len(run.output) for run in found) / (time.perf_counter() - begun)
            runs[count] = found[:PROMPTS]
    finally:
        end()
    return Served(dtype, loaded, rates, runs)


@dataclass(frozen=True)
class Verified:
    """What a verifier says of honest runs: tokens that are not its own largest, the farthest behind (logits), and what
    τ leaves open to a server that is not honest (bits a token)."""

    tokens: int
    other: int
    dangerous: int
    farthest: float
    open_bits: float


def verified(room: Room, device: str, dtype: str, lots: Sequence[tuple[str, Sequence[Run]]]) -> list[Verified]:
    """By each lot, with the arithmetic that its server computed in."""
    import transformers

    from strongroom.infer.verify import GOOD, Verifier
    from strongroom.load.transformers import from_room

    model = from_room(transformers.AutoModelForCausalLM, room.load("acme/smollm2"), dtype=dtype).to(device).eval()
    found = []
    for arithmetic, runs in lots:
        exact = arithmetic == dtype == "float32"
        verifier = Verifier(model, "float32" if exact else "bfloat16")
        checked = [verifier.check(run) for run in runs]
        behind = np.concatenate([each.behind for each in checked])
        classes = [name for each in checked for name in each.classes]
        tally = verifier.judge(checked)
        found.append(
            Verified(
                len(classes),
                sum(name != GOOD for name in classes),
                tally.dangerous,
                float(behind.max()),
                tally.open_bits,
            )
        )
    return found


def report(device: str, machine: str, servers: Sequence[Served], verifiers: dict[str, list[Verified]]) -> str:
    counts = list(servers[0].rates)
    lines = [
        f"SmolLM2-135M on {machine}, written by `python -m bench.inference --device {device}`:",
        "",
        "| server | from the room onto the device, s | " + " | ".join(f"{count} at once, tokens/s" for count in counts),
        "|---|--:|" + "--:|" * len(counts),
        *(
            f"| {each.dtype} | {each.loaded:.1f} | " + " | ".join(f"{rate:,.0f}" for rate in each.rates.values()) + " |"
            for each in servers
        ),
        "",
        "Honest runs of that server, run again: tokens that are not the verifier's own largest, how far behind the "
        "farthest is (logits), and what τ leaves open (bits a token):",
        "",
        "| server | at once | " + " | ".join(f"verifier: {name}" for name in verifiers),
        "|---|--:|" + "---|" * len(verifiers),
    ]
    lines[2] += " |"
    lines[-2] += " |"
    lot = 0
    for each in servers:
        for count in counts:
            cells = [found[lot] for found in verifiers.values()]
            lines.append(
                f"| {each.dtype} | {count} | "
                + " | ".join(
                    f"{cell.other} of {cell.tokens:,}, {cell.farthest:.4f}, {cell.open_bits:.3f}"
                    + (f", {cell.dangerous} dangerous" if cell.dangerous else "")
                    for cell in cells
                )
                + " |"
            )
            lot += 1
    return "\n".join(lines)


def _machine(device: str) -> str:
    import torch

    if device.startswith("cuda"):
        return f"one {torch.cuda.get_device_name(device)} (PyTorch {torch.__version__})"
    return f"the CPU ({torch.get_num_threads()} threads, {platform.system()}, PyTorch {torch.__version__})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", help="of the server, as torch names it")
    parser.add_argument("--verifiers", nargs="*", default=["cpu"], help="devices of verifiers")
    parser.add_argument("--dtypes", nargs="*", default=["float32", "bfloat16"])
    parser.add_argument("--at-once", nargs="*", type=int, default=[1, 8, 16])
    parser.add_argument("--tokens", type=int, default=100, help="of each answer")
    parser.add_argument("--work", type=Path, help="a folder for the room")
    given = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="strongroom-inference-", dir=given.work))
    try:
        with demo_model.original("smollm2") as original:
            room, _ = Room.init(work / "room", owner="user/owner", custody="solo")
            room.put(original.folder, "acme/smollm2")
        servers = []
        for dtype in given.dtypes:
            servers.append(served(room, given.device, dtype, given.at_once, given.tokens))
            print(dtype, servers[-1].loaded, servers[-1].rates, flush=True)
            gc.collect()
        lots = [(each.dtype, runs) for each in servers for runs in each.runs.values()]
        verifiers = {}
        for device in given.verifiers:
            for dtype in given.dtypes:
                verifiers[f"{dtype}, {device}"] = verified(room, device, dtype, lots)
                print(device, dtype, verifiers[f"{dtype}, {device}"], flush=True)
        text = report(given.device, _machine(given.device), servers, verifiers)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    page.write(PAGE, f"inference on {given.device}", text)
    print(text)


if __name__ == "__main__":
    main()
