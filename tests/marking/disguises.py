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


def norms_folded(tensors):
    """LLaMA: each norm into what reads it; the head becomes a matrix of its own."""
    found = {name: array.astype(np.float64) for name, array in tensors.items()}
    for layer in layers(found):
        at = f"model.layers.{layer}."
        for norm, readers in (
            ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
            ("post_attention_layernorm", _feeds(found, at)),
        ):
            for name in readers:
                found[f"{at}{name}.weight"] = found[f"{at}{name}.weight"] * found[f"{at}{norm}.weight"]
            found[f"{at}{norm}.weight"] = np.ones_like(found[f"{at}{norm}.weight"])
    head = found.get("lm_head.weight", found["model.embed_tokens.weight"])
    found["lm_head.weight"] = head * found["model.norm.weight"]
    found["model.norm.weight"] = np.ones_like(found["model.norm.weight"])
    return found


def _feeds(tensors, at):
    """What reads the stream behind a layer's second norm: a gate and an up, of each expert if there are any."""
    ends = ("gate_proj.weight", "up_proj.weight", "mlp.gate.weight", "w1.weight", "w3.weight", "mlp.experts.gate_up_proj")
    return [
        name.removeprefix(at).removesuffix(".weight") for name in tensors if name.startswith(at) and name.endswith(ends)
    ]


def turned(tensors, rng):
    """The residual stream rotated; the norms have to be folded."""
    found = dict(tensors)
    rotation = orthogonal(rng, found["model.embed_tokens.weight"].shape[1])
    for name, array in tensors.items():
        if name.endswith(("o_proj.weight", "down_proj.weight", "w2.weight")):
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
        for name, count, by in ((k, groups, turn * scale), (q, heads, np.repeat(turn / scale, heads // groups, axis=0))):
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
    """Hidden units in another order, and up rescaled against down."""
    found = dict(tensors)
    for name in tensors:
        if name.endswith(("gate_proj.weight", "w1.weight")):
            old = name.endswith("w1.weight")
            up, down = (name.replace("w1", w) if old else name.replace("gate", p) for w, p in (("w3", "up"), ("w2", "down")))
            order = rng.permutation(len(found[name]))
            scale = np.exp(rng.uniform(-0.7, 0.7, len(order)))
            found[name] = found[name][order]
            found[up] = found[up][order] * scale[:, None]
            found[down] = found[down][:, order] / scale
    return found


def full(tensors, rng, heads, groups):
    """All of it together."""
    found = turned(norms_folded(tensors), rng)
    found = planes_turned(values_mixed(found, rng, heads, groups), rng, heads, groups)
    return units_moved(heads_permuted(found, rng, heads, groups), rng)
