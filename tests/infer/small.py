"""A LLaMA-shaped model with a hidden size of 64 and 512 words, trained for a moment on the text of a licence, and rooms
that hold it."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM

from strongroom.client import Room

HIDDEN, WORDS, POSITIONS = 64, 512, 256
OWNER, NAME = "user/ana", "acme/small"
REF = f"{NAME}@1"
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_TEXT = Path(__file__).parents[2] / "LICENSE"  # a text that nobody edits: figures of tests depend on it


def corpus() -> str:
    return _TEXT.read_text(encoding="utf-8")


def write_small(folder: Path, *, template: str = TEMPLATE, steps: int = 60) -> Path:
    """The model's directory: configuration, tokenizer with a chat template, weights in float32."""
    torch.manual_seed(5)
    torch.set_num_threads(1)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=WORDS, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator([corpus()], trainer)
    assert tokenizer.get_vocab_size() == WORDS
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=HIDDEN,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    train(model, tokenizer.encode(corpus()).ids, steps)
    model.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|endoftext|>",
        "eos_token": "<|im_end|>",
        "chat_template": template,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


def train(model: LlamaForCausalLM, ids: list[int], steps: int) -> None:
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    tokens = torch.tensor(ids)
    for _ in range(steps):
        starts = torch.randint(0, len(tokens) - 64, (16,))
        batch = torch.stack([tokens[start : start + 64] for start in starts])
        loss = model(input_ids=batch, labels=batch).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    model.eval()


def make_room(folder: Path, model: Path, name: str = NAME) -> Room:
    """A room of one, open, with the model in it as version 1 of `name`."""
    room, _ = Room.init(folder, owner=OWNER, custody="solo")
    room.put(model, name)
    return room
