"""Weights for torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from strongroom.load.source import resolve
from strongroom.load.weights import Weights

if TYPE_CHECKING:
    import torch

    from strongroom.load.source import Source


def state_dict(source: Source, device: str | torch.device = "cpu") -> dict[str, torch.Tensor]:
    """All tensors of a version by name, for ``model.load_state_dict(..., assign=True)``; see `Weights.torch`.

    `source` is a reference such as ``acme/tiny@1``, a reader, or open weights.
    """
    with Weights(resolve(source)) as weights:
        return weights.torch(device)
