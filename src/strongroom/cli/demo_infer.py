"""What the demo does with a model: it answers, and its outputs are compared with those of the original.

``strongroom run REF -- python -m strongroom.cli.demo_infer KIND REF`` is the demo's child: it has a grant and no room,
and writes its answer and its outputs, never weights, to its stdout as one .npz.
"""

from __future__ import annotations

import io
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

QUESTION = {"smollm2": "What is the capital of France?", "minilm": "Where are bars of gold kept?"}
SENTENCES = (
    "A bank keeps its bullion in a vault with a steel door.",
    "The recipe asks for two eggs and a cup of flour.",
    "Trains to the coast leave every half hour.",
)
TEXT = """A strongroom is only as good as the list of people who may open it. The door is heavy, the walls are thick,
and the lock has two keys that are never carried by the same person; but what the bank relies on is the book beside the
door, in which everybody who goes in is written down before the key is turned, and everything that leaves is signed for.
When something is missing, nobody asks how strong the walls are. They open the book.""".replace("\n", " ")
_NEW_TOKENS = 24


@dataclass(frozen=True)
class Inference:
    """`answer` is text; `outputs` float32: logits (tokens, vocabulary) of a fixed text, or embeddings (texts, width).

    `facts` are what the child saw of itself.
    """

    answer: str
    outputs: NDArray[np.float32]
    facts: dict[str, Any]


def infer(kind: str, model: Any, tokenizer: Any) -> Inference:
    """Ask the model, in float32 arithmetic, so that what differs is the weights' and not the rounding's doing."""
    import torch

    model = model.float().eval()
    with torch.inference_mode():
        return _generate(model, tokenizer) if kind == "smollm2" else _embed(model, tokenizer)


def _generate(model: Any, tokenizer: Any) -> Inference:
    chat = [{"role": "user", "content": QUESTION["smollm2"]}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, max_new_tokens=_NEW_TOKENS, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    text = tokenizer.decode(answer[0][prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    tokens = tokenizer(TEXT, return_tensors="pt").input_ids
    logits = model(tokens).logits[0]
    return Inference(text.strip(), logits.numpy(), {})


def _embed(model: Any, tokenizer: Any) -> Inference:
    batch = tokenizer([QUESTION["minilm"], *SENTENCES], padding=True, return_tensors="pt")
    hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    means = (hidden * mask).sum(1) / mask.sum(1)
    outputs = (means / means.norm(dim=1, keepdim=True)).numpy()
    nearest = int(np.argmax(outputs[1:] @ outputs[0]))
    return Inference(SENTENCES[nearest], outputs, {})


def compare(kind: str, first: Inference, second: Inference) -> dict[str, Any]:
    """How far `second` is from `first`, the original. KL divergence in nats a token."""
    difference = np.abs(first.outputs - second.outputs)
    figures: dict[str, Any] = {
        "same_answer": first.answer == second.answer,
        "max_difference": float(difference.max()),
        "mean_difference": float(difference.mean()),
    }
    if kind == "minilm":
        figures["min_cosine"] = float((first.outputs * second.outputs).sum(1).min())
        return figures
    p, q = _log_softmax(first.outputs), _log_softmax(second.outputs)
    return figures | {
        "tokens": len(p),
        "top1_agreement": float((p.argmax(1) == q.argmax(1)).mean()),
        "kl_nats": float((np.exp(p) * (p - q)).sum(1).mean()),
    }


def _log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    values: NDArray[np.float64] = logits.astype(np.float64)
    values -= values.max(1, keepdims=True)
    values -= np.log(np.exp(values).sum(1, keepdims=True))
    return values


def quiet() -> None:
    """No progress bars and no advice from transformers, and no question to a model hub."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    from transformers.utils import logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]


def encode(inference: Inference) -> bytes:
    """As one .npz; `decode` takes it back."""
    text = json.dumps({"answer": inference.answer, "facts": inference.facts}).encode()
    buffer = io.BytesIO()
    np.savez(buffer, outputs=inference.outputs, text=np.frombuffer(text, np.uint8))
    return buffer.getvalue()


def decode(data: bytes) -> Inference:
    """What `encode` made; ValueError for anything else."""
    with np.load(io.BytesIO(data), allow_pickle=False) as found:
        text = json.loads(found["text"].tobytes())
        return Inference(text["answer"], found["outputs"], text["facts"])


def main(kind: str, ref: str) -> None:
    """The child of ``strongroom run``: everything that it knows of the model comes out of the room."""
    answers = os.dup(1)
    os.dup2(2, 1)  # whatever libraries print is not the answer
    import transformers

    from strongroom.load.transformers import from_room, tokenizer_from_room

    quiet()
    written = _bytes_written()
    auto = transformers.AutoModelForCausalLM if kind == "smollm2" else transformers.AutoModel
    model = from_room(auto, ref)
    found = infer(kind, model, tokenizer_from_room(ref))
    now = _bytes_written()
    found.facts["disk_bytes_written"] = None if now is None or written is None else now - written
    with os.fdopen(answers, "wb") as file:
        file.write(encode(found))


def _bytes_written() -> int | None:
    """Bytes that this process had written to disks so far, as the kernel counts them; None where it won't say."""
    try:
        lines = Path("/proc/self/io").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith("write_bytes:")), None)


if __name__ == "__main__":
    main(*sys.argv[1:])
