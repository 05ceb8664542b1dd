"""What a thief can do to a model without changing what it computes: to a dictionary of arrays with transformers' names.

Each function returns new arrays, float64. test_disguise.py shows on real models that their logits stay as they were.
"""

from __future__ import annotations

import numpy as np


def orthogonal(rng, size):
    return np.linalg.qr(rng.normal(size=(size, size)))[0]


def invertible(rng, size, spread=0.7):
    """Far from orthogonal: factors from e^-spread to e^spread."""
    return orthogonal(rng, size) * np.exp(rng.uniform(-spread, spread, size)) @ orthogonal(rng, size)


def layers(tensors):
    return range(1 + max(int(name.split("layers.")[1].split(".")[0]) for name in tensors if "layers." in name))


def llama(rng, *, width, vocabulary, units, heads, groups, depth=2):
    """float32 arrays of a LLaMA's shape, with norms that differ; heads are a quarter of the stream wide."""
    size = width // heads
    shapes = {
        "self_attn.q_proj": (width, width),
        "self_attn.k_proj": (groups * size, width),
        "self_attn.v_proj": (groups * size, width),
        "self_attn.o_proj": (width, width),
        "mlp.gate_proj": (units, width),
        "mlp.up_proj": (units, width),
        "mlp.down_proj": (width, units),
    }
    found = {"model.embed_tokens.weight": rng.normal(size=(vocabulary, width)), "model.norm.weight": _norm(rng, width)}
    for layer in range(depth):
        at = f"model.layers.{layer}."
        found |= {f"{at}{name}.weight": rng.normal(0, 0.05, shape) for name, shape in shapes.items()}
        found |= {f"{at}{name}.weight": _norm(rng, width) for name in ("input_layernorm", "post_attention_layernorm")}
    return {name: array.astype(np.float32) for name, array in found.items()}


def _norm(rng, width):
    """As they are found: some elements are negative."""
    return np.exp(rng.normal(0, 0.4, width)) * np.where(rng.random(width) < 0.1, -1, 1)


def quantised(array, bits, group=64):
    """To integers in groups with one scale; norms stay as they are, and so does all if `bits` is None."""
    if array.ndim < 2 or bits is None:
        return array
    flat = array.reshape(-1, group)
    scale = np.abs(flat).max(axis=1, keepdims=True) / (2 ** (bits - 1) - 1) + 1e-30
    return (np.round(flat / scale) * scale).reshape(array.shape)


def norms_folded(tensors):
    """LLaMA: each norm into what reads it; the head becomes a matrix of its own."""
    found = {name: array.astype(np.float64) for name, array in tensors.items()}
    attention = ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight")
    feeding = ("mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.gate.weight", "mlp.experts.gate_up_proj")
    for layer in layers(found):
        for norm, readers in (("input_layernorm.weight", attention), ("post_attention_layernorm.weight", feeding)):
            factor = found[f"model.layers.{layer}.{norm}"]
            for name in (f"model.layers.{layer}.{reader}" for reader in readers):
                if name in found:
                    found[name] = found[name] * factor
            found[f"model.layers.{layer}.{norm}"] = np.ones_like(factor)
    head = found.get("lm_head.weight", found["model.embed_tokens.weight"])
    found["lm_head.weight"] = head * found["model.norm.weight"]
    found["model.norm.weight"] = np.ones_like(found["model.norm.weight"])
    return found


def turned(tensors, rng):
    """The residual stream rotated; the norms have to be folded."""
    found = dict(tensors)
    rotation = orthogonal(rng, found["model.embed_tokens.weight"].shape[1])
    for name, array in tensors.items():
        if name.endswith(("o_proj.weight", "down_proj.weight", "down_proj")):
            found[name] = rotation.T @ array
        elif array.ndim >= 2:
            found[name] = array @ rotation
    return found


def values_mixed(tensors, rng, heads, groups):
    """A map of its own between V and O for each head of V."""
    found = dict(tensors)
    for layer in layers(found):
        v, o = (f"model.layers.{layer}.self_attn.{what}_proj.weight" for what in "vo")
        size, width = len(found[v]) // groups, found[v].shape[1]
        a = [invertible(rng, size) for _ in range(groups)]
        found[v] = np.concatenate([a[k] @ found[v].reshape(groups, size, width)[k] for k in range(groups)])
        parts = found[o].reshape(-1, heads, size).transpose(1, 0, 2)
        back = [parts[k] @ np.linalg.inv(a[k * groups // heads]) for k in range(heads)]
        found[o] = np.stack(back, axis=1).reshape(found[o].shape)
    return found


def planes_turned(tensors, rng, heads, groups):
    """Each plane that the rotary embedding turns is turned and scaled, in Q against K."""
    found = dict(tensors)
    for layer in layers(found):
        q, k = (f"model.layers.{layer}.self_attn.{what}_proj.weight" for what in "qk")
        half, width = len(found[k]) // groups // 2, found[k].shape[1]
        turn = np.exp(1j * rng.uniform(-np.pi, np.pi, (groups, half, 1)))
        scale = np.exp(rng.uniform(-0.7, 0.7, (groups, half, 1)))
        for name, count, by in (
            (k, groups, turn * scale),
            (q, heads, np.repeat(turn / scale, heads // groups, axis=0)),
        ):
            parts = found[name].reshape(count, 2, half, width)
            plane = (parts[:, 0] + 1j * parts[:, 1]) * by
            found[name] = np.stack([plane.real, plane.imag], axis=1).reshape(-1, width)
    return found


def heads_permuted(tensors, rng, heads, groups):
    found = dict(tensors)
    each = heads // groups
    for layer in layers(found):
        order = rng.permutation(groups)
        within = np.concatenate([group * each + rng.permutation(each) for group in order])
        at = f"model.layers.{layer}.self_attn."
        for what, index in (("q", within), ("k", order), ("v", order)):
            array = found[f"{at}{what}_proj.weight"]
            found[f"{at}{what}_proj.weight"] = array.reshape(len(index), -1, array.shape[1])[index].reshape(array.shape)
        array = found[f"{at}o_proj.weight"]
        found[f"{at}o_proj.weight"] = array.reshape(len(array), heads, -1)[:, within].reshape(array.shape)
    return found


def units_moved(tensors, rng):
    """Hidden units in another order, and up rescaled against down; experts in another order, too."""
    found = dict(tensors)
    for name in tensors:
        if name.endswith("gate_proj.weight"):
            up, down = name.replace("gate_proj", "up_proj"), name.replace("gate_proj", "down_proj")
            order, scale = rng.permutation(len(found[name])), np.exp(rng.uniform(-0.7, 0.7, len(found[name])))
            found[name] = found[name][order]
            found[up] = found[up][order] * scale[:, None]
            found[down] = found[down][:, order] / scale
        elif name.endswith("experts.gate_up_proj"):
            down, router = (
                name.replace("gate_up_proj", "down_proj"),
                name.replace("experts.gate_up_proj", "gate.weight"),
            )
            units = found[down].shape[2]
            experts = rng.permutation(len(found[router]))
            orders = [rng.permutation(units) for _ in experts]
            found[name] = np.stack(
                [found[name][k][np.concatenate([at, units + at])] for k, at in zip(experts, orders, strict=True)]
            )
            found[down] = np.stack([found[down][k][:, at] for k, at in zip(experts, orders, strict=True)])
            found[router] = found[router][experts]
    return found


def stream_recentred(tensors, rng):
    """GPT-2: norms folded, and the stream rotated about the direction of its mean, which LayerNorm needs in place."""
    found = {name: array.astype(np.float64) for name, array in tensors.items()}
    width = found["transformer.wte.weight"].shape[1]
    base = np.linalg.qr(np.concatenate([np.ones((width, 1)), rng.normal(size=(width, width - 1))], axis=1))[0]
    inner = np.eye(width)
    inner[1:, 1:] = orthogonal(rng, width - 1)
    rotation = base @ inner @ base.T
    for layer in range(sum(name.endswith("ln_1.weight") for name in tensors)):
        at = f"transformer.h.{layer}."
        for norm, reader in (("ln_1", "attn.c_attn"), ("ln_2", "mlp.c_fc")):
            g, b, w = (found[f"{at}{name}"] for name in (f"{norm}.weight", f"{norm}.bias", f"{reader}.weight"))
            found[f"{at}{reader}.bias"] = found[f"{at}{reader}.bias"] + b @ w
            found[f"{at}{reader}.weight"] = rotation.T @ (g[:, None] * w)
            found[f"{at}{norm}.weight"], found[f"{at}{norm}.bias"] = np.ones_like(g), np.zeros_like(b)
        for writer in ("attn.c_proj", "mlp.c_proj"):
            for part in ("weight", "bias"):
                found[f"{at}{writer}.{part}"] = found[f"{at}{writer}.{part}"] @ rotation
    for name in ("transformer.wte.weight", "transformer.wpe.weight"):
        found[name] = found[name] @ rotation
    g, b = found["transformer.ln_f.weight"], found["transformer.ln_f.bias"]
    found["lm_head.weight"] = (found["lm_head.weight"] * g) @ rotation
    found["transformer.ln_f.weight"], found["transformer.ln_f.bias"] = np.ones_like(g), (b / g) @ rotation
    return found


def heads_mixed(tensors, rng, heads):
    """BERT, whose norms are in the stream itself: without rotary planes any map goes between Q and K, and V and O."""
    found = {name: array.astype(np.float64) for name, array in tensors.items()}
    for name in tensors:
        if name.endswith("attention.self.query.weight"):
            at = name.removesuffix("self.query.weight")
            size = len(found[name]) // heads
            a, b = ([invertible(rng, size) for _ in range(heads)] for _ in range(2))
            for what, maps in (("query", a), ("key", [np.linalg.inv(each).T for each in a]), ("value", b)):
                for part in ("weight", "bias"):
                    array = found[f"{at}self.{what}.{part}"]
                    rows = array.reshape(heads, size, -1)
                    mixed = np.concatenate([maps[k] @ rows[k] for k in range(heads)])
                    found[f"{at}self.{what}.{part}"] = mixed.reshape(array.shape)
            out = found[f"{at}output.dense.weight"]
            parts = [out[:, k * size : (k + 1) * size] @ np.linalg.inv(b[k]) for k in range(heads)]
            found[f"{at}output.dense.weight"] = np.concatenate(parts, axis=1)
    return found


def words_moved(tensors, rng, kept=1.0):
    """The words in another order, or those of them that are kept, as a tokenizer that is changed alike has them."""
    order = rng.permutation(len(tensors["model.embed_tokens.weight"]))
    return _words(tensors, order[: int(kept * len(order))])


def words_left(tensors, rng, kept):
    """Some of the words, in their order."""
    order = rng.permutation(len(tensors["model.embed_tokens.weight"]))
    return _words(tensors, np.sort(order[: int(kept * len(order))]))


def _words(tensors, order):
    names = ("model.embed_tokens.weight", "lm_head.weight")
    return {name: array[order] if name in names else array for name, array in tensors.items()}


def full(tensors, rng, heads, groups):
    """All of it together."""
    found = turned(norms_folded(tensors), rng)
    found = planes_turned(values_mixed(found, rng, heads, groups), rng, heads, groups)
    return units_moved(heads_permuted(found, rng, heads, groups), rng)
