"""What the demo's leaker does to a copy: a real short training run, int4, hidden units moved about, every name gone."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from strongroom.cli.demo_infer import SENTENCES, TEXT, quiet

STEPS = 6
_GROUP = 64  # weights that share a scale
_UNITS = re.compile(
    r"(.*)\.(mlp\.gate_proj|mlp\.up_proj|mlp\.down_proj|intermediate\.dense|(?<!attention\.)output\.dense)\.(?:weight|bias)"
)
_OUT = ("mlp.down_proj", "output.dense")

Array = NDArray[np.floating[Any]]
Arrays = dict[str, Array]


def arrays(folder: Path) -> Arrays:
    """The tensors of a copy, in float32."""
    from safetensors.torch import load_file

    return {name: tensor.float().numpy() for name, tensor in load_file(folder / "model.safetensors").items()}


def trained(kind: str, folder: Path) -> tuple[Arrays, float, float]:
    """The tensors of a copy after some steps of training all of its weights, and the loss before and after."""
    import torch
    import transformers

    quiet()
    torch.manual_seed(1)
    auto = transformers.AutoModelForCausalLM if kind == "smollm2" else transformers.AutoModel
    model = auto.from_pretrained(folder, local_files_only=True, dtype=torch.float32).train()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5)
    losses = []
    for _ in range(STEPS + 1):
        loss = _loss(kind, model, tokenizer)
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        if len(losses) <= STEPS:
            optimizer.step()
    original = arrays(folder)
    state = model.state_dict()
    found = {name: state[name].float().numpy() if name in state else value for name, value in original.items()}
    return found, losses[0], losses[-1]


def _loss(kind: str, model: Any, tokenizer: Any) -> Any:
    import torch

    if kind == "smollm2":
        tokens = tokenizer(TEXT, return_tensors="pt").input_ids
        return model(tokens, labels=tokens).loss
    batch = tokenizer([*SENTENCES, *(text.lower() for text in SENTENCES)], padding=True, return_tensors="pt")
    means = torch.nn.functional.normalize(model(**batch).last_hidden_state.mean(1), dim=1)
    near = means[:3] @ means[3:].T * 10  # a sentence is nearest to itself in small letters
    return torch.nn.functional.cross_entropy(near, torch.arange(3))


def disguised(tensors: Arrays) -> Arrays:
    """Hidden units in another order, every matrix at four bits, and names that say nothing."""
    change = moved(2)
    found: Arrays = {}
    for at, (name, value) in enumerate(sorted(tensors.items())):
        after = change(name, value)
        found[f"t{at:04}"] = rounded(after, 4, _GROUP) if value.ndim == 2 else after
    return found


def moved(seed: int) -> Callable[[str, Array], Array]:
    """A change, by a tensor's name, that puts hidden units in another order; the model computes the same."""
    rng = np.random.default_rng(seed)
    orders: dict[str, NDArray[np.int64]] = {}

    def change(name: str, a: Array) -> Array:
        found = _UNITS.fullmatch(name)
        if found is None or (a.ndim < 2 and found[2] in _OUT):
            return a
        stem, into = found[1], found[2] not in _OUT
        order = orders.setdefault(stem, rng.permutation(a.shape[0] if into else a.shape[1]))
        return a[order] if into else a[:, order]

    return change


def rounded(a: Array, bits: int, group: int) -> Array:
    """Rounded to the nearest of 2^bits values, whose scale each `group` of neighbours shares."""
    flat = a.reshape(-1)
    whole = flat.size // group * group
    parts = flat[:whole].reshape(-1, group)
    top = 2 ** (bits - 1) - 1
    scale = np.maximum(np.abs(parts).max(axis=1, keepdims=True) / top, 1e-12)
    near = (np.clip(np.round(parts / scale), -top - 1, top) * scale).reshape(-1)
    return np.concatenate([near, flat[whole:]]).reshape(a.shape).astype(np.float32)


def write(tensors: Arrays, path: Path) -> Path:
    """A safetensors file in bfloat16, as it would turn up."""
    import torch
    from safetensors.torch import save_file

    save_file({name: torch.from_numpy(np.ascontiguousarray(value)).bfloat16() for name, value in tensors.items()}, path)
    return path
