"""Keys and values of many sequences in one buffer a layer, a row each, so that all of them take a step together.

Rows in use are always the first ones: who leaves is replaced by the last. A row's own length is in the mask that a
forward pass gets, so rows of different lengths go side by side and what lies behind a row's end is never looked at.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from strongroom.errors import UsageError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_FIRST = 128  # positions that rows have to begin with; doubled when one needs more


class _Layer(CacheLayerMixin):  # type: ignore[no-untyped-call]  # transformers' own hook
    """One layer's buffers, (rows, heads, positions, width): made when the first keys come, which tell their shape."""

    is_sliding = False

    def __init__(self, rows: Rows) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._rows = rows

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        def made(like: torch.Tensor) -> torch.Tensor:
            return like.new_zeros((self._rows.most, like.shape[1], self._rows.positions, like.shape[3]))

        self.keys, self.values, self.is_initialized = made(key_states), made(value_states), True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write what is new where the rows say, and give all of these rows that the mask may look at."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None  # noqa: S101 - made a line ago
        assert self.values is not None  # noqa: S101
        return self._rows.written(self.keys, key_states), self._rows.written(self.values, value_states)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:  # noqa: ARG002
        return self._rows.seen, 0

    def get_seq_length(self) -> int:
        return 0  # positions are always passed

    def get_max_length(self) -> int:
        return -1


class Rows:
    """A causal model of transformers and `most` rows. All calls from one thread.

    UsageError ``infer.unsupported`` for models whose layers keep anything but keys and values of all positions.
    """

    def __init__(self, model: Any, most: int) -> None:
        config = model.config.get_text_config()
        kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
        sliding = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
        if kinds != {"full_attention"} or (sliding and not getattr(config, "layer_types", None)):
            raise UsageError(
                "infer.unsupported",
                f"this server runs decoders with full attention only; this one has {', '.join(sorted(kinds))}"
                f"{f', a window of {sliding}' if sliding else ''}",
                hint="serve it with vLLM: strongroom run REF -- vllm serve REF --load-format strongroom",
            )
        self.model, self.most = model, most
        self.vocabulary = int(config.vocab_size)
        self.longest = int(getattr(config, "max_position_embeddings", 0) or 2048)
        self.positions = min(_FIRST, self.longest)
        self.lengths: list[int] = []
        self.seen = 0
        self._at: tuple[Any, ...] = ()
        self._device, self._dtype = model.device, model.dtype
        self._named = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
        self._layers = [_Layer(self) for _ in range(config.num_hidden_layers)]
        self._cache = Cache(layers=list(self._layers))

    def written(self, buffer: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        """Put (rows, heads, new positions, width) into `buffer`; what may be looked at."""
        first, last, at = self._at
        if isinstance(at, int):
            buffer[first:last, :, at : at + new.shape[2]] = new
        else:
            buffer[at[0], :, at[1]] = new[:, :, 0]
        return buffer[first:last, :, : self.seen]

    def begin(self, prompts: Sequence[Sequence[int]], *, every: bool = False) -> NDArray[np.float32]:
        """A new row for each of `prompts`, which go through the model together. The logits behind the last token of
        each, (prompts, V); or behind `every` token, (prompts, tokens of the longest, V)."""
        first, longest = len(self.lengths), max(map(len, prompts))
        self._room_for(longest)
        ids = torch.zeros((len(prompts), longest), dtype=torch.long)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)] = torch.tensor(prompt)
        positions = torch.arange(longest)
        mask = positions[None, :] <= positions[:, None]
        self._at, self.seen = (first, first + len(prompts), 0), longest
        ends = torch.tensor([len(prompt) - 1 for prompt in prompts])
        kept, which = torch.unique(ends, return_inverse=True)
        if every:
            kept = positions
        logits = self._forward(ids, positions.expand(len(prompts), -1), mask.expand(len(prompts), 1, -1, -1), kept)
        self.lengths += [len(prompt) for prompt in prompts]
        found: NDArray[np.float32] = (logits if every else logits[torch.arange(len(prompts)), which]).numpy()
        return found

    def step(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """One more token for each row, in their order; the logits behind it, (rows, V)."""
        self._room_for(max(self.lengths) + 1)
        at = torch.tensor(self.lengths)
        self.seen = max(self.lengths) + 1
        mask = torch.arange(self.seen)[None, :] <= at[:, None]
        self._at = (0, len(tokens), (torch.arange(len(tokens), device=self._device), at.to(self._device)))
        logits = self._forward(torch.tensor(tokens)[:, None], at[:, None], mask[:, None, None, :], torch.tensor([0]))
        self.lengths = [length + 1 for length in self.lengths]
        found: NDArray[np.float32] = logits[:, 0].numpy()
        return found

    def leave(self, row: int) -> int:
        """Give up a row. The row that has its place from now on was the last one: its former number."""
        last = len(self.lengths) - 1
        if row != last:
            with torch.inference_mode():  # as where they were made
                for layer in self._layers:
                    for buffer in (layer.keys, layer.values):
                        assert buffer is not None  # noqa: S101 - a row that is left was written
                        buffer[row, :, : self.lengths[last]] = buffer[last, :, : self.lengths[last]]
        self.lengths[row] = self.lengths[last]
        self.lengths.pop()
        return last

    def _forward(self, ids: torch.Tensor, positions: torch.Tensor, seen: torch.Tensor, kept: torch.Tensor) -> Any:
        # Additive, since that is right for every implementation of attention.
        mask = torch.zeros(seen.shape, dtype=self._dtype).masked_fill_(~seen, torch.finfo(self._dtype).min)
        with torch.inference_mode():
            logits = self.model(
                input_ids=ids.to(self._device),
                position_ids=positions.to(self._device),
                attention_mask=mask.to(self._device),
                use_cache=True,
                logits_to_keep=kept.to(self._device),
                **{self._named: self._cache},
            ).logits
        return logits.float().cpu()

    def _room_for(self, positions: int) -> None:
        if positions <= self.positions:
            return
        self.positions = min(self.longest, max(positions, 2 * self.positions))
        for layer in self._layers:
            for name in ("keys", "values"):
                old = getattr(layer, name)
                if old is not None:
                    new = old.new_zeros((*old.shape[:2], self.positions, old.shape[3]))
                    new[:, :, : old.shape[2]] = old
                    setattr(layer, name, new)
