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
from strongroom.vault.comparison import Comparison
from strongroom.vault.originals import Originals
from strongroom.vault.source import ModelSource
from strongroom.vault.suspect import Suspect
from strongroom.vault.unmerging import unmerged
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
WHOLE = {"twice the rank": 2.0, "half the rank (1 at least)": 0.5}  # the product, factored by its singular values
MERGED: dict[str, tuple[int, str]] = {"merged, bf16": (0, "BF16"), "merged, int8, groups of 64": (8, "F32")}
_MERGED = "SmolLM2-135M"  # weights of the size of those of 7 billion are not made for this


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


def base(tensors: dict[str, leaks.Array]) -> dict[str, leaks.Array]:
    """Weights that an adapter is for."""
    rng = np.random.default_rng(5)
    return {
        _target(name): rng.normal(0, 0.04, (len(tensors[name.replace("lora_A", "lora_B")]), a.shape[1])).astype(
            np.float32
        )
        for name, a in tensors.items()
        if "lora_A" in name
    }


def _target(name: str) -> str:
    return name.removeprefix("base_model.model.").replace(".lora_A", "")


def split(
    vault: Vault, own: dict[str, leaks.Array], weights: dict[str, leaks.Array], bits: int, path: Path, dtype: str
) -> dict[str, leaks.Array]:
    """What a trace takes out of weights that a copy of an adapter was merged into, with alpha twice its rank."""
    merged = dict(weights)
    for name in [name for name in own if "lora_A" in name]:
        merged[_target(name)] = weights[_target(name)] + 2 * own[name.replace("lora_A", "lora_B")] @ own[name]
    leaked = {name: leaks.rounded(a, bits, 64) if bits else a for name, a in merged.items()}
    adapter, into = (
        Originals(vault.image(record), record)
        for record in (vault.record(vault.find(ref)) for ref in ("bench", "base"))
    )
    with Suspect.opened(write(leaked, path, dtype)) as suspect:
        found = unmerged(adapter, Comparison(into, suspect))
    if found is None:
        return {}
    return {name: found.read(name).reshape(tensor.info.shape) for name, tensor in found.tensors.items()}


def traced(tensors: dict[str, leaks.Array], folder: Path, *, merge: bool) -> list[float]:
    """z of the copy's holder after each attack; with `merge` also after those that merge it."""
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
    if merge:
        (folder / "base").mkdir()
        weights = base(tensors)
        write(weights, folder / "base" / "model.safetensors", "BF16")
        vault.put(ModelSource.scan(folder / "base"), "base", by=OWNER)
        for name, (bits, dtype) in MERGED.items():
            seen = split(vault, own, weights, bits, folder / "merged.safetensors", dtype)
            row = model.trace(write(seen, folder / "leak.safetensors", "F32"), 1, name, "", copies=True)
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
    columns = [*ATTACKS, *WHOLE, *MERGED]
    lines = [
        "## Adapters",
        "",
        "Written by `python -m bench.tracing_adapters`: generated LoRA files (fp32) on Q and V, put as versions of "
        "their own and copied; z of the holder's stamp; of those of SmolLM2's size also as they were merged, with "
        "alpha twice the rank, into generated weights (bf16) that the room has. "
        f"Among {PEOPLE:,} people it takes {least:.1f} to be named. z grows with the root of the number of elements, "
        "so the last line says how many it takes (256 at least, for a smaller tensor has no stamp).",
        "",
        f"| adapter | elements | {' | '.join(columns)} |",
        f"|---|---:|{'---:|' * len(columns)}",
        *(
            f"| {what} | {count:,} | {' | '.join([f'{each:.1f}' for each in z] + [''] * (len(columns) - len(z)))} |"
            for what, count, z in found
        ),
    ]
    _, count, z = found[-1]
    _, less, merged = next(each for each in reversed(found) if len(each[2]) == len(columns))
    enough = " | ".join(
        f"{max(256, math.ceil(of * (least / each) ** 2)):,}"
        for of, each in [*((count, each) for each in z), *((less, each) for each in merged[len(z) :])]
    )
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
            found.append(
                (
                    what,
                    sum(a.size for a in tensors.values()),
                    traced(tensors, Path(work) / str(k), merge=model == _MERGED),
                )
            )
            print(found[-1], flush=True)
    page.write(page.TRACING, "adapters", table(found, least))


if __name__ == "__main__":
    main()
