"""What the marks cost in quality: perplexity of SmolLM2 on a fixed text, original weights against a holder's.

The text, `text.txt`, is the first chapter of Lewis Carroll's *Alice's Adventures in Wonderland* (1865), in the public
domain. It runs in a child process: `python -m bench.perplexity MODEL_DIRECTORY [PLACE]`.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.measure import TIMEOUT, Failed, environment, last_words
from bench.ours import StrongroomTorch

TEXT = Path(__file__).with_name("text.txt")
WINDOW = 1024


@dataclass(frozen=True)
class Quality:
    """Perplexity of the original and, where there is a room, of the marked weights (else None), with the mean
    Kullback-Leibler divergence in nats and the share of positions whose most likely token is the same."""

    tokens: int
    original: float
    marked: float | None = None
    divergence: float | None = None
    agreement: float | None = None

    @property
    def change(self) -> float | None:
        """Relative change of perplexity, in percent."""
        return None if self.marked is None else 100 * (self.marked / self.original - 1)


def perplexity(directory: Path, place: Path | None) -> Quality:
    """Run the comparison in a child process."""
    command = [sys.executable, "-m", "bench.perplexity", str(directory), *([str(place)] if place else [])]
    child = subprocess.run(
        command, env=environment(StrongroomTorch), capture_output=True, text=True, timeout=TIMEOUT, check=False
    )
    if child.returncode:
        raise Failed(f"perplexity: {last_words(child)}")
    return Quality(**json.loads(child.stdout.strip().splitlines()[-1]))


def compare(directory: Path, place: Path | None) -> Quality:
    """The child's side: float32 arithmetic on the bf16 weights, windows of 1,024 tokens side by side."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(directory)(TEXT.read_text(), return_tensors="pt").input_ids[0]
    original = _model(directory, load_file(directory / "model.safetensors"))
    marked = None
    if place is not None:
        reader = StrongroomTorch()
        marked = _model(directory, reader.load(directory, place, {}))
    loss = [0.0, 0.0]
    divergence = same = 0.0
    count = 0
    with torch.inference_mode():
        for start in range(0, len(ids), WINDOW):
            window = ids[start : start + WINDOW]
            if len(window) < 2:
                break
            first = _log_probabilities(original, window)
            loss[0] -= _of_targets(first, window)
            count += len(window) - 1
            if marked is not None:
                second = _log_probabilities(marked, window)
                loss[1] -= _of_targets(second, window)
                divergence += float((first.exp() * (first - second)).sum(dtype=torch.float64))
                same += float((first.argmax(-1) == second.argmax(-1)).sum())
    if marked is None:
        return Quality(count, math.exp(loss[0] / count))
    return Quality(count, math.exp(loss[0] / count), math.exp(loss[1] / count), divergence / count, same / count)


def _model(directory: Path, tensors: Mapping[str, Any]) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory), dtype=torch.float32)
    missing, unexpected = model.load_state_dict(
        {name: tensor.float() for name, tensor in tensors.items()}, strict=False
    )
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise ValueError(f"weights don't fit the configuration: missing {missing}, unexpected {unexpected}")
    model.tie_weights()
    return model.eval()


def _log_probabilities(model: Any, window: Any) -> Any:
    return model(window[None]).logits[0, :-1].log_softmax(-1)


def _of_targets(log_probabilities: Any, window: Any) -> float:
    import torch

    return float(log_probabilities.gather(-1, window[1:, None]).sum(dtype=torch.float64))


if __name__ == "__main__":
    print(json.dumps(asdict(compare(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else None))))
