"""The original of a version as the model that writes: what it thinks of a text, and in what direction its weights would
have to move to make the text likelier (spec/mark.md, section 10).

It is built in memory from the unmarked weights, which take 8 to 12 bytes a parameter here, gradient included; no file
is written. What came with a model as a program, its tokenizer and chat template, runs in a process of its own
(`tokenizing`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from strongroom.errors import UsageError
from strongroom.marking.elements import STEPS, values
from strongroom.vault.originals import Originals, Placed
from strongroom.vault.text import Text
from strongroom.vault.tokens import HINT, SmallFiles, Tokenizer, Tokens, refusals

if TYPE_CHECKING:
    import torch

_POSITIONS, _LOGITS = 2048, 1 << 27  # at a time: tokens, and tokens times words
_JUDGED = 4096  # tokens that the temperature is fitted to
_TEMPERATURES = np.geomspace(0.02, 4, 80)
_NEAR = 8  # of them on either side of what the first tokens find best
_REACHED = 0.5  # of the marked elements, what the model has to be made of
_OTHERS = 0.01  # of the tokens, what may be of another hand, or come of another way to make tokens of text
_GONE = ("auto_map", "dtype", "torch_dtype", "quantization_config", "use_kernels")


@dataclass
class Leaning:
    """What a text says of the original: the gradient of its log-likelihood by each tensor it reaches (float32, flat, by
    the byte where the tensor begins), and figures of it. `log_likelihood` is in nats, of all tokens together."""

    gradient: dict[int, NDArray[np.float32]] = field(default_factory=dict)
    temperature: float = 1.0
    log_likelihood: float = 0.0
    tokens: int = 0
    left_out: int = 0  # pieces beyond the limit


class Generator:
    """A version's original model. UsageError ``text.no_transformers``, ``text.unsupported``; reading raises what
    `ImageReader` raises."""

    def __init__(self, originals: Originals) -> None:
        self._originals = originals
        self._torch, self._transformers = _libraries()
        self._files = SmallFiles(originals)
        self._model, self._reached = self._built()
        self._words = int(self._model.get_input_embeddings().weight.shape[0])
        window = getattr(self._model.config, "max_position_embeddings", None)
        self._tokenizer = Tokenizer(self._files, self._words, window if isinstance(window, int) else None)

    def lean(self, text: Text, progress: Callable[[int, int], None]) -> Leaning:
        """What `text` says; `progress` is of (bytes done, bytes of text). UsageError ``text.*``."""
        pieces, left_out = self._tokenizer.pieces(text)
        total = sum(piece.scored for piece in pieces)
        if not total:
            raise UsageError("text.empty", "the text has no token that stands behind another one")
        found = Leaning(temperature=self._temperature(pieces, text.check), left_out=left_out)
        floor = math.log(_OTHERS / self._words)
        held: dict[str, torch.Tensor] = {}
        with self._gathering(held):
            for batch in self._batches(pieces):
                text.check()
                logits, wanted = self._logits(batch)
                likely = -self._torch.nn.functional.cross_entropy(logits / found.temperature, wanted, reduction="none")
                other = self._torch.full_like(likely, floor)
                believed = self._torch.logaddexp(likely + math.log1p(-_OTHERS), other).sum()
                if bool(self._torch.isfinite(believed)):
                    believed.backward()
                    found.log_likelihood += float(likely.detach().sum())
                    found.tokens += len(wanted)
                del logits, likely, other, believed
                progress(text.bytes * found.tokens // total, text.bytes)
        for name, gradient in held.items():
            found.gradient[self._reached[name].begin] = gradient.cpu().numpy().reshape(-1)
        if not found.gradient:
            raise UsageError("text.unsupported", "the model gives this text no likelihood that is a number", hint=HINT)
        return found

    # -- the model -----------------------------------------------------------------------------------------------

    def _built(self) -> tuple[Any, dict[str, Placed]]:
        """The model, and which tensor of the version each of its parameters is that counts."""
        torch, transformers = self._torch, self._transformers
        described = _described(self._files.json("config.json"))
        kind = str(described.pop("model_type", ""))
        self._plausible(described)
        placed: dict[str, Placed] = {}
        for each in self._originals.tensors():
            placed.setdefault(each.info.name, each)
        tensors = {name: self._tensor(each) for name, each in placed.items() if each.info.dtype.name in STEPS}
        with refusals(f"transformers can't build a {kind or 'model without a model_type'} from this version"):
            config = transformers.AutoConfig.for_model(kind, **described)
            chosen = transformers.AutoModelForCausalLM._model_mapping[type(config)]  # noqa: SLF001 - as in load.transformers
            chosen = chosen[0] if isinstance(chosen, list | tuple) else chosen
            with _no_bar(transformers.utils.logging):
                model, notes = chosen.from_pretrained(None, config=config, state_dict=tensors, output_loading_info=True)
        if notes["missing_keys"] or notes.get("mismatched_keys"):
            raise UsageError(
                "text.unsupported",
                f"the version lacks {sorted(map(str, notes['missing_keys']))[:3]}, of which its model is made",
                hint=HINT,
            )
        reached = self._same(model, tensors, placed)
        kind_of = {each.info.dtype.name for each in reached.values()}
        # By the processor, never by the clock: the same text is to have the same outcome.
        quick = kind_of == {"BF16"} and bool(torch.cpu._is_avx512_bf16_supported())  # noqa: SLF001 - has no public name
        return model.to(torch.bfloat16 if quick else torch.float32).eval(), reached

    def _plausible(self, described: Mapping[str, Any]) -> None:
        """Refuse a configuration of more layers than the version has tensors: to build them takes hours of memory."""
        count = sum(1 for _ in self._originals.tensors())
        for name in ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "num_experts", "num_local_experts"):
            layers = described.get(name, 0)
            if not isinstance(layers, int) or layers > count:
                raise UsageError("text.unsupported", f"the version's config.json says {name} {layers!r:.20}", hint=HINT)

    def _same(self, model: Any, tensors: Mapping[str, Any], placed: Mapping[str, Placed]) -> dict[str, Placed]:
        """Which parameter is which tensor: one of its name and its very values, whatever a loader may do to others."""
        found: dict[str, Placed] = {}
        front = f"{getattr(model, 'base_model_prefix', '')}."
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(False)
            for other in (name, name.removeprefix(front), front + name):
                tensor = tensors.get(other)
                if tensor is None or tensor.shape != parameter.shape or not placed[other].marked:
                    continue
                if self._torch.equal(tensor.to(parameter.dtype), parameter):
                    parameter.requires_grad_(True)
                    found[name] = placed[other]
                    break
        all_of = sum(each.info.elements for each in placed.values() if each.marked)
        if sum(each.info.elements for each in found.values()) < _REACHED * all_of or not found:
            raise UsageError(
                "text.unsupported", "transformers builds this model from other tensors than the version has", hint=HINT
            )
        return found

    def _tensor(self, each: Placed) -> torch.Tensor:
        dtype = each.info.dtype.name
        bits = np.frombuffer(self._originals.read(each.begin, each.end), STEPS[dtype].integer)
        found: torch.Tensor = self._torch.from_numpy(values(bits, dtype).reshape(each.info.shape))
        return found

    # -- likelihoods ---------------------------------------------------------------------------------------------

    def _temperature(self, pieces: Sequence[Tokens], check: Callable[[], None]) -> float:
        """What makes an even choice of the text likeliest."""
        scored = sum(piece.scored for piece in pieces)
        step = max(1, scored // _JUDGED)
        likely, near = np.zeros(len(_TEMPERATURES)), slice(None)
        with self._torch.inference_mode():
            for batch in self._batches(pieces[step // 2 :: step] or pieces):
                check()
                logits, wanted = self._logits(batch)
                chosen = logits.gather(-1, wanted[:, None])[:, 0]
                for k in range(len(_TEMPERATURES))[near]:
                    temperature = float(_TEMPERATURES[k])
                    likely[k] += float((chosen / temperature - (logits / temperature).logsumexp(-1)).sum())
                if near == slice(None):  # the rest of the text need not be judged at all of them
                    best = int(np.argmax(np.nan_to_num(likely, nan=-np.inf)))
                    near = slice(max(0, best - _NEAR), best + _NEAR + 1)
        return _peak(np.log(_TEMPERATURES)[near], np.nan_to_num(likely, nan=-np.inf)[near])

    def _batches(self, pieces: Sequence[Tokens]) -> Iterator[list[Tokens]]:
        """Pieces that are read at once, from the longest to the shortest."""
        most = max(1, min(_POSITIONS, _LOGITS // self._words))
        batch: list[Tokens] = []
        for piece in pieces:
            if piece.scored and batch and len(batch[0]) * (len(batch) + 1) > most:
                yield batch
                batch = []
            if piece.scored:
                batch.append(piece)
        if batch:
            yield batch

    def _logits(self, batch: Sequence[Tokens]) -> tuple[torch.Tensor, torch.Tensor]:
        """Float32 (tokens, words) and int64 (tokens,): what the model says of each token of the completions, and what
        the token is."""
        torch = self._torch
        width = len(batch[0])
        ids = torch.zeros(len(batch), width, dtype=torch.int64)
        there, wanted = torch.zeros_like(ids), torch.zeros(len(batch), width, dtype=torch.bool)
        for k, piece in enumerate(batch):
            ids[k, : len(piece)] = torch.tensor(piece.context + piece.completion)
            there[k, : len(piece)] = 1
            wanted[k, max(1, len(piece.context)) : len(piece)] = True
        with refusals("the model does not take this text"):
            said = self._model(input_ids=ids, attention_mask=there, use_cache=False).logits
        return said[:, :-1][wanted[:, 1:]].float(), ids[:, 1:][wanted[:, 1:]]

    @contextmanager
    def _gathering(self, held: dict[str, torch.Tensor]) -> Iterator[None]:
        """Gradients are added up in `held` as float32, whatever the model is in: many small ones would be lost."""

        def take(name: str, parameter: torch.Tensor) -> None:
            if parameter.grad is None:
                return
            if name not in held:
                held[name] = parameter.grad.float()
            else:
                held[name].add_(parameter.grad)
            parameter.grad = None

        hooks = [
            parameter.register_post_accumulate_grad_hook(lambda changed, name=name: take(name, changed))
            for name, parameter in self._model.named_parameters()
            if parameter.requires_grad
        ]
        try:
            with self._torch.enable_grad():
                yield
        finally:
            for hook in hooks:
                hook.remove()


@contextmanager
def _no_bar(logging: Any) -> Iterator[None]:
    """Without the bar that transformers draws while it loads: what is printed here, the command line prints."""
    drawn = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if drawn:
            logging.enable_progress_bar()


def _described(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration without what names code: whoever may put weights could have the custodian fetch kernels by it,
    and run them."""
    return {
        name: _described(value) if isinstance(value, dict) else value
        for name, value in config.items()
        if name not in _GONE and not name.startswith("_") and "implementation" not in name
    }


def _peak(at: NDArray[np.float64], likely: NDArray[np.float64]) -> float:
    """Where the parabola through the highest value and its neighbours has its peak; `at` are logarithms."""
    k = int(np.argmax(likely))
    if 0 < k < len(at) - 1 and np.isfinite(likely[k - 1 : k + 2]).all():
        below, here, above = likely[k - 1 : k + 2]
        bend = below - 2 * here + above
        if bend < 0:
            return float(np.exp(at[k] + (at[k + 1] - at[k]) * 0.5 * (below - above) / bend))
    return float(np.exp(at[k]))


def _libraries() -> tuple[Any, Any]:
    try:
        import torch
        import transformers
    except ImportError:
        raise UsageError(
            "text.no_transformers",
            "tracing text runs the original, which takes torch and transformers",
            hint="pip install 'strongroom[transformers]'",
        ) from None
    return torch, transformers
