"""What the demo's leaker does to a copy: a real short training run, int4, hidden units moved about, every name gone."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from strongroom.cli.demo_infer import SENTENCES, TEXT, quiet

STEPS = 6
_GROUP = 64  # weights that share a scale
_UNITS = re.compile(
    r"(.*)\.(?:mlp\.(?:gate_proj|up_proj|down_proj)|intermediate\.dense|output\.dense)\.(?:weight|bias)"
)
_INTO = ("mlp.gate_proj", "mlp.up_proj", "intermediate.dense")

Arrays = dict[str, NDArray[np.floating[Any]]]


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
    rng = np.random.default_rng(2)
    orders: dict[str, NDArray[np.int64]] = {}
    found: Arrays = {}
    for at, (name, value) in enumerate(sorted(tensors.items())):
        moved = value
        match = _UNITS.fullmatch(name)
        if match is not None and "attention" not in name:
            into = any(part in name for part in _INTO)
            if into or value.ndim == 2:
                size = value.shape[0] if into else value.shape[1]
                order = orders.setdefault(match[1], rng.permutation(size))
                moved = value[order] if into else value[:, order]
        found[f"t{at:04}"] = int4(moved) if value.ndim == 2 else moved
    return found


def int4(matrix: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rounded to the nearest of sixteen values, whose scale each group of neighbours shares."""
    flat = matrix.reshape(-1)
    whole = flat.size // _GROUP * _GROUP
    groups = flat[:whole].reshape(-1, _GROUP)
    scale = np.maximum(np.abs(groups).max(axis=1, keepdims=True) / 7, 1e-12)
    rounded = (np.clip(np.round(groups / scale), -8, 7) * scale).reshape(-1)
    return np.concatenate([rounded, flat[whole:]]).reshape(matrix.shape).astype(np.float32)


def write(tensors: Arrays, path: Path) -> Path:
    """A safetensors file in bfloat16, as it would turn up."""
    import torch
    from safetensors.torch import save_file

    save_file({name: torch.from_numpy(np.ascontiguousarray(value)).bfloat16() for name, value in tensors.items()}, path)
    return path
