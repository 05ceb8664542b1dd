"""A small language model in a room, and its copies as they write: what the tests of traced text listen to."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import tokenizers
import torch
import transformers
from safetensors.torch import save_file
from tokenizers import models, pre_tokenizers, processors

from strongroom.marking.elements import STEPS, values
from strongroom.vault.copies import Copy
from strongroom.vault.originals import Originals
from vault.rooms import House

WORDS = 512
NAMES = ("<s>", "<u>", *(f"w{k}" for k in range(2, WORDS)))
TEMPLATE = "{% for message in messages %}<u> {{ message['content'] }} {% endfor %}w2"
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": WORDS,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
    "dtype": "bfloat16",
}


def write_model(folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Path:
    """A LLaMA of random weights, with a tokenizer of which each word is a token."""
    folder.mkdir()
    torch.manual_seed(seed)
    kept = {name: value for name, value in CONFIG.items() if name not in ("model_type", "dtype")}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**kept))
    with torch.no_grad():  # it is to prefer some words to others by much: then a mark changes what it says
        model.model.embed_tokens.weight *= 3
    tensors = {name: each.detach().to(dtype).clone() for name, each in model.named_parameters()}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    tokenizer = tokenizers.Tokenizer(models.WordLevel({word: k for k, word in enumerate(NAMES)}, unk_token="<u>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<s>", "unk_token": "<u>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def tensors_of(house: House, ref: str, holder: str | None, *, copy: bool = True) -> dict[str, torch.Tensor]:
    """What a holder has: a stamped copy, or what was loaded; None: the original."""
    record = house.vault.record(house.vault.find(ref))
    originals = Originals(house.vault.image(record), record)
    if holder is None:
        read = originals.read
    elif copy:
        read = Copy(originals, record, holder).read
    else:
        read = house.reader(ref, holder).read
    found = {}
    for each in originals.tensors():
        dtype = each.info.dtype.name
        numbers = values(np.frombuffer(read(each.begin, each.end), STEPS[dtype].integer), dtype)
        found[each.info.name] = torch.from_numpy(numbers.reshape(each.info.shape).copy())
    return found


def written(
    tensors: dict[str, torch.Tensor], pieces: int, *, length: int = 64, temperature: float = 1.0, asked: bool = True
) -> list[dict[str, list[int]]]:
    """Prompts of three tokens, or the start of a text, and how a model of these weights goes on; temperature 0: with
    its likeliest word."""
    kept = {name: value for name, value in CONFIG.items() if name not in ("model_type", "dtype")}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**kept))
    model.load_state_dict(tensors, strict=False)
    model.tie_weights()
    model.eval()
    torch.manual_seed(0)
    prompts = torch.randint(2, WORDS, (pieces, 3)) if asked else torch.zeros(pieces, 1, dtype=torch.int64)
    with torch.inference_mode():
        step = model(input_ids=prompts, use_cache=True)
        said = []
        for _ in range(length):
            logits = step.logits[:, -1]
            chosen = (
                torch.multinomial((logits / temperature).softmax(-1), 1)
                if temperature
                else logits.argmax(-1, keepdim=True)
            )
            said.append(chosen)
            step = model(input_ids=chosen, past_key_values=step.past_key_values, use_cache=True)
    answers = torch.cat(said, 1).tolist()
    return [{"prompt": p, "completion": a} for p, a in zip(prompts.tolist(), answers, strict=True)]


def lines(path: Path, pieces: list[object]) -> Path:
    path.write_text("".join(json.dumps(each) + "\n" for each in pieces))
    return path
