"""Embeddings: the mean of a model's last hidden states, of unit length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

_TOGETHER = 4096  # tokens, padding included


class Embedder:
    """A model of transformers whose first output is its hidden states; `width` is how many numbers each has."""

    def __init__(self, model: Any) -> None:
        self._model, self._device = model.base_model, model.device
        self.width = int(model.config.get_text_config().hidden_size)

    def vectors(self, prompts: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """(prompts, width)."""
        found = np.zeros((len(prompts), self.width), np.float32)
        order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
        while order:
            batch = [order.pop()]
            longest = len(prompts[batch[0]])
            while order and longest * (len(batch) + 1) <= _TOGETHER:
                batch.append(order.pop())
            ids = torch.zeros((len(batch), longest), dtype=torch.long)
            mask = torch.zeros((len(batch), longest), dtype=torch.long)
            for row, number in enumerate(batch):
                ids[row, : len(prompts[number])] = torch.tensor(prompts[number])
                mask[row, : len(prompts[number])] = 1
            with torch.inference_mode():
                hidden = self._model(ids.to(self._device), attention_mask=mask.to(self._device))[0].float().cpu()
            means = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
            found[batch] = torch.nn.functional.normalize(means, dim=1).numpy()
        return found
