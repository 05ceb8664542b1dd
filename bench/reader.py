"""What a reader is: one way of getting a model's weights from disk into memory."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

Setting = dict[str, Any]


class Reader:
    """Base of every reader; an instance lives in one child process and is used for one measurement.

    A reader keeps its own form of a model in the folder `place` (where `own_form` is true `put` writes it there) or
    reads the model directory itself. Whatever has to stay open while the result is in use goes on `self.open`.
    """

    name: ClassVar[str]
    """What ``--only`` takes."""
    title: ClassVar[str]
    """What the table says."""
    package: ClassVar[str] = ""
    """The distribution whose version the page states."""
    own_form: ClassVar[bool] = True
    form: ClassVar[str] = ""
    """The name of the reader whose form this one reads; empty: its own."""
    operations: ClassVar[frozenset[str]] = frozenset({"load", "tensor", "first", "put"})
    settings: ClassVar[tuple[Setting, ...]] = ({},)
    """Settings tried once on the whole model before the rounds; the fastest is measured."""
    environment: ClassVar[dict[str, str]] = {}
    """Variables of the child process."""
    marked: ClassVar[bool] = False
    """The result differs from the original by at most one unit in the last place of bf16."""

    def __init__(self) -> None:
        self.open = ExitStack()

    @classmethod
    def missing(cls) -> str:
        """Why this reader can't run on this machine; empty when it can."""
        return ""

    def prepare(self, place: Path) -> None:
        """Imports and key material; outside every timing."""

    def stage(self, directory: Path) -> Any:
        """What `put` starts from, outside its timing: the directory, or tensors already in memory for a serialiser."""
        return directory

    def put(self, staged: Any, place: Path) -> None:
        """Write this reader's form of the model into the existing empty folder `place`."""
        raise NotImplementedError

    def load(self, directory: Path, place: Path, setting: Setting) -> Mapping[str, Any]:
        """Every tensor of the model, in memory that the caller owns."""
        raise NotImplementedError

    def tensor(self, directory: Path, place: Path, name: str, setting: Setting) -> Any:
        """One tensor, from opening to the tensor in memory that the caller owns."""
        raise NotImplementedError


def bits(value: Any) -> np.ndarray:
    """The bf16 bits of a torch or NumPy result as uint16, without a copy where there need be none."""
    if isinstance(value, np.ndarray):
        return value if value.dtype == np.uint16 else value.view(np.uint16)
    import torch

    return value.detach().contiguous().view(torch.uint16).numpy()


def shards(directory: Path, suffix: str = ".safetensors") -> list[Path]:
    return sorted(directory.glob(f"*{suffix}"))
