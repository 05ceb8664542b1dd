"""The small model, and what an attacker of it knows and wants."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from infer.small import HIDDEN, WORDS, corpus, write_small
from strongroom.redteam.extraction import Known, Setup


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    return write_small(tmp_path_factory.mktemp("small") / "model")


@pytest.fixture(scope="session")
def setup(small):
    """The 2h + 1 commonest tokens that have a text of their own."""
    tokenizer = Tokenizer.from_file(str(small / "tokenizer.json"))
    texts = {number: tokenizer.decode([number], skip_special_tokens=True) for number in range(WORDS)}
    told = Counter(texts.values())
    common = Counter(tokenizer.encode(corpus()).ids)
    known = [Known(number, text) for number, text in texts.items() if text and "\ufffd" not in text and told[text] == 1]
    known.sort(key=lambda token: -common[token.number])
    layer = load_file(small / "model.safetensors")["lm_head.weight"].astype(np.float64)
    return Setup(known[: 2 * HIDDEN + 1], WORDS, HIDDEN, layer)
