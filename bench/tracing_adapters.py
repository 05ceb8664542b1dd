"""How small an adapter may be to name its holder: `python -m bench.tracing_adapters` writes a table of
docs/reference/tracing.md.

Adapters as PEFT saves them, generated (A even, B normal: what a stamp leaves is relative to the weights, whatever they
are), are copied, changed as leakers do, and traced.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bench import leaks, page
from bench.tracing_room import OWNER, Model, write
from strongroom.vault.source import ModelSource
from strongroom.vault.vault import Vault

PEOPLE = 1_000_000
_TRIED = 8  # layers, looks and the first pass, as in spec/mark.md, section 8
WIDTHS = {"SmolLM2-135M": (576, 192, 30), "of 7 billion weights": (4096, 4096, 32)}
ADAPTERS = (  # rank, of which model, how many layers
    (1, "SmolLM2-135M", 1),
    (1, "SmolLM2-135M", 30),
    (8, "SmolLM2-135M", 1),
    (8, "SmolLM2-135M", 30),
    (64, "SmolLM2-135M", 30),
    (8, "of 7 billion weights", 32),
    (16, "of 7 billion weights", 32),
)
ATTACKS: dict[str, tuple[leaks.Attack, str]] = {
    "as it is": (lambda _, a: a, "F32"),
    "bf16": (lambda _, a: a, "BF16"),
    "int8, each row": (lambda _, a: leaks.rounded(a, 8, a.shape[-1]), "F32"),
    "int8, groups of 64": (lambda _, a: leaks.rounded(a, 8, 64), "F32"),
    "int4, groups of 64": (lambda _, a: leaks.rounded(a, 4, 64), "F32"),
    "noise 0.1": (leaks.noise(0.1), "F32"),
}
WHOLE = {"twice the rank": 2.0, "half the rank": 0.5}  # the product, factored by its singular values


def adapter(rank: int, model: str, layers: int) -> dict[str, leaks.Array]:
    """A LoRA on Q and V."""
    rng, (width, values, _) = np.random.default_rng(rank), WIDTHS[model]
    found: dict[str, leaks.Array] = {}
    for layer in range(layers):
        for what, rows in (("q", width), ("v", values)):
            at = f"base_model.model.model.layers.{layer}.self_attn.{what}_proj"
            found[f"{at}.lora_A.weight"] = rng.uniform(-1, 1, (rank, width)).astype(np.float32) / math.sqrt(width)
            found[f"{at}.lora_B.weight"] = rng.normal(0, 0.01, (rows, rank)).astype(np.float32)
    return found


def traced(tensors: dict[str, leaks.Array], folder: Path) -> list[float]:
    """z of the copy's holder after each attack."""
    (folder / "model").mkdir(parents=True)
    write(tensors, folder / "model" / "adapter_model.safetensors", "F32")
    vault, _ = Vault.init(folder / "room", owner=OWNER, custody="solo")
    vault.put(ModelSource.scan(folder / "model"), "bench", by=OWNER)
    model = Model("adapter", folder, vault, people=100)
    own = model.tensors(model.holders[0], copies=True)
    found = []
    for name, (change, dtype) in ATTACKS.items():
        leaked = {at: changed for at, a in own.items() if (changed := change(at, a)) is not None}
        row = model.trace(write(leaked, folder / "leak.safetensors", dtype), 1, name, "", copies=True)
        found.append(row.stamps[0])
    for name, times in WHOLE.items():
        row = model.trace(write(refactored(own, times), folder / "leak.safetensors", "F32"), 1, name, "", copies=True)
        found.append(row.stamps[0])
    vault.close()
    return found


def refactored(tensors: dict[str, leaks.Array], times: float) -> dict[str, leaks.Array]:
    """Each product of its singular values and vectors: the strongest of so many times its ranks, one at least, or with
    zeros for those that there were not."""
    found: dict[str, leaks.Array] = {}
    for name in [name for name in tensors if "lora_A" in name]:
        a, b = tensors[name], tensors[name.replace("lora_A", "lora_B")]
        rank, wanted = len(a), max(1, int(times * len(a)))
        q, r = np.linalg.qr(b)  # of matrices that are as narrow as the adapter
        left, strengths, v = np.linalg.svd(r @ a, full_matrices=False)
        kept = min(rank, wanted)
        root = np.sqrt(strengths[:kept])
        found[name] = np.zeros((wanted, a.shape[1]), np.float32)
        found[name.replace("lora_A", "lora_B")] = np.zeros((len(b), wanted), np.float32)
        found[name][:kept] = root[:, None] * v[:kept]
        found[name.replace("lora_A", "lora_B")][:, :kept] = (q @ left[:, :kept]) * root
    return found


def table(found: Sequence[tuple[str, int, Sequence[float]]], least: float) -> str:
    lines = [
        "## Adapters",
        "",
        "Written by `python -m bench.tracing_adapters`: generated LoRA files (fp32) on Q and V, put as versions of "
        f"their own and copied; z of the holder's stamp. Among {PEOPLE:,} people it takes {least:.1f} to be named. z "
        "grows with the root of the number of elements, so the last line says how many it takes (256 at least, for a "
        "smaller tensor has no stamp).",
        "",
        f"| adapter | elements | {' | '.join([*ATTACKS, *WHOLE])} |",
        f"|---|---:|{'---:|' * (len(ATTACKS) + len(WHOLE))}",
        *(f"| {what} | {count:,} | {' | '.join(f'{each:.1f}' for each in z)} |" for what, count, z in found),
    ]
    _, count, z = found[-1]
    enough = " | ".join(f"{max(256, math.ceil(count * (least / each) ** 2)):,}" for each in z)
    return "\n".join([*lines, f"| enough, elements |  | {enough} |"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, help="a folder with some gigabytes of room")
    given = parser.parse_args()
    least = math.sqrt(2 * math.log(10) * (9 + math.log10(_TRIED * PEOPLE)))
    found: list[tuple[str, int, Sequence[float]]] = []
    with tempfile.TemporaryDirectory(prefix="strongroom-adapters-", dir=given.work) as work:
        for k, (rank, model, layers) in enumerate(ADAPTERS):
            tensors = adapter(rank, model, layers)
            what = f"rank {rank}, {layers} layer{'s' * (layers > 1)}, {model}"
            found.append((what, sum(a.size for a in tensors.values()), traced(tensors, Path(work) / str(k))))
            print(found[-1], flush=True)
    page.write(page.TRACING, "adapters", table(found, least))


if __name__ == "__main__":
    main()
