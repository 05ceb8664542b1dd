"""The original of a version as the model that writes: what it thinks of a text, and in what direction its weights would
have to move to make the text likelier (spec/mark.md, section 10).

It is built in memory from the unmarked weights, which take 8 to 12 bytes a parameter here, gradient included; no file
is written, and no code that came with a model is run.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from strongroom.core.limits import LIMITS, MIB
from strongroom.errors import StrongroomError, UsageError
from strongroom.marking.elements import STEPS, values
from strongroom.vault.originals import Originals, Placed
from strongroom.vault.text import Text, Words, Written

if TYPE_CHECKING:
    import torch

_SMALL = 128 * MIB  # of a configuration or a tokenizer
_WINDOW, _CONTEXT = 1024, 512  # tokens of a piece, and of what may stand before it
_POSITIONS, _LOGITS = 2048, 1 << 27  # at a time: tokens, and tokens times words
_JUDGED = 4096  # tokens that the temperature is fitted to
_TEMPERATURES = np.geomspace(0.02, 4, 80)
_REACHED = 0.5  # of the marked elements, what the model has to be made of
_FASTER = 1.3
_GONE = ("auto_map", "dtype", "torch_dtype", "quantization_config", "_name_or_path")
_HINT = "trace the weights themselves, where they can be had"


@dataclass(frozen=True, slots=True)
class Tokens:
    """Token ids: `context` stands before `completion`, which is what is looked at."""

    context: tuple[int, ...]
    completion: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.context) + len(self.completion)

    @property
    def scored(self) -> int:
        """How many tokens have something before them."""
        return len(self.completion) - (not self.context)


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
        self._files = {each.path: each for each in originals.layout.files}
        self._torch, self._transformers = _libraries()
        self._tokenizer: Any = None
        self._model, self._reached = self._built()
        self._words = int(self._model.get_input_embeddings().weight.shape[0])

    def lean(self, text: Text, progress: Callable[[int, int], None]) -> Leaning:
        """What `text` says; `progress` is of (bytes done, bytes of text). UsageError ``text.*``."""
        pieces, left_out = self._tokens(text)
        total = sum(piece.scored for piece in pieces)
        if not total:
            raise UsageError("text.empty", "the text has no token that stands behind another one")
        found = Leaning(temperature=self._temperature(pieces, text.check), left_out=left_out)
        held: dict[str, torch.Tensor] = {}
        with self._gathering(held):
            for batch in self._batches(pieces):
                text.check()
                logits, wanted = self._logits(batch)
                loss = self._torch.nn.functional.cross_entropy(logits / found.temperature, wanted, reduction="sum")
                if bool(self._torch.isfinite(loss)):
                    loss.neg().backward()
                    found.log_likelihood -= float(loss.detach())
                    found.tokens += len(wanted)
                del logits, loss
                progress(text.bytes * found.tokens // total, text.bytes)
        for name, gradient in held.items():
            found.gradient[self._reached[name].begin] = gradient.cpu().numpy().reshape(-1)
        if not found.gradient:
            raise UsageError("text.unsupported", "the model gives this text no likelihood that is a number", hint=_HINT)
        return found

    # -- tokens --------------------------------------------------------------------------------------------------

    def _tokens(self, text: Text) -> tuple[list[Tokens], int]:
        """The text as pieces that the model can read at once, the longest first, and how many completions are beyond
        the limit."""
        found: list[Tokens] = []
        room, limit = LIMITS.text_tokens, self._window()
        for number, piece in enumerate(text.pieces):
            if room <= 0:
                return sorted(found, key=len, reverse=True), len(text.pieces) - number
            if number % 256 == 0:
                text.check()
            context, completion = self._context(piece), self._ids(piece.completion)[:room]
            room -= len(completion)
            found += _windows(context, completion, limit)
        return sorted(found, key=len, reverse=True), 0

    def _window(self) -> int:
        return min(_WINDOW, int(getattr(self._model.config, "max_position_embeddings", None) or _WINDOW))

    def _context(self, piece: Written) -> tuple[int, ...]:
        if piece.messages:
            said = [{"role": role, "content": content} for role, content in piece.messages]
            with _refusals("the chat template of the version does not take these messages"):
                shown = self._words_of().apply_chat_template(said, tokenize=False, add_generation_prompt=True)
            return self._ids(shown)
        if piece.prompt or isinstance(piece.completion, str):
            return self._ids(piece.prompt, special=True)
        return ()

    def _ids(self, words: Words, *, special: bool = False) -> tuple[int, ...]:
        if isinstance(words, str):
            ids = self._words_of().backend_tokenizer.encode(words, add_special_tokens=special).ids
        else:
            ids = list(words)
        if ids and max(ids) >= self._words:
            raise UsageError(
                "text.tokens", f"there is a token {max(ids)}, and the version has {self._words} words, from 0 on"
            )
        return tuple(ids)

    def _words_of(self) -> Any:
        """The version's tokenizer."""
        if self._tokenizer is None:
            if "tokenizer.json" not in self._files:
                raise UsageError(
                    "text.no_tokenizer",
                    "the version has no tokenizer.json that would make tokens of text",
                    hint='give token ids: {"prompt": [IDS], "completion": [IDS]} in each line',
                )
            import tokenizers

            settings = self._json("tokenizer_config.json") if "tokenizer_config.json" in self._files else {}
            special = {
                name: value["content"] if isinstance(value, dict) else value
                for name in ("bos_token", "eos_token", "unk_token", "pad_token")
                if isinstance(value := settings.get(name), str | dict)
            }
            template = settings.get("chat_template")
            if "chat_template.jinja" in self._files:
                template = self._small("chat_template.jinja").decode("utf-8", "replace")
            with _refusals("the version's tokenizer can't be read"):
                self._tokenizer = self._transformers.PreTrainedTokenizerFast(
                    tokenizer_object=tokenizers.Tokenizer.from_buffer(self._small("tokenizer.json")), **special
                )
                self._tokenizer.chat_template = template
                # A prompt that is cut off silently, or filled up, would not be the one that was answered.
                self._tokenizer.backend_tokenizer.no_truncation()
                self._tokenizer.backend_tokenizer.no_padding()
        return self._tokenizer

    # -- the model -----------------------------------------------------------------------------------------------

    def _built(self) -> tuple[Any, dict[str, Placed]]:
        """The model, and which tensor of the version each of its parameters is that counts."""
        torch, transformers = self._torch, self._transformers
        described = {name: value for name, value in self._json("config.json").items() if name not in _GONE}
        kind = str(described.pop("model_type", ""))
        placed: dict[str, Placed] = {}
        for each in self._originals.tensors():
            placed.setdefault(each.info.name, each)
        tensors = {name: self._tensor(each) for name, each in placed.items() if each.info.dtype.name in STEPS}
        with _refusals(f"transformers can't build a {kind or 'model without a model_type'} from this version"):
            config = transformers.AutoConfig.for_model(kind, **described)
            chosen = transformers.AutoModelForCausalLM._model_mapping[type(config)]  # noqa: SLF001 - as in load.transformers
            chosen = chosen[0] if isinstance(chosen, list | tuple) else chosen
            model, notes = chosen.from_pretrained(None, config=config, state_dict=tensors, output_loading_info=True)
        if notes["missing_keys"] or notes.get("mismatched_keys"):
            raise UsageError(
                "text.unsupported",
                f"the version lacks {sorted(map(str, notes['missing_keys']))[:3]}, of which its model is made",
                hint=_HINT,
            )
        reached = self._same(model, tensors, placed)
        kind_of = {each.info.dtype.name for each in reached.values()}
        model = model.to(torch.bfloat16 if kind_of == {"BF16"} and self._quick(torch.bfloat16) else torch.float32)
        return model.eval(), reached

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
                "text.unsupported", "transformers builds this model from other tensors than the version has", hint=_HINT
            )
        return found

    def _tensor(self, each: Placed) -> torch.Tensor:
        dtype = each.info.dtype.name
        bits = np.frombuffer(self._originals.read(each.begin, each.end), STEPS[dtype].integer)
        found: torch.Tensor = self._torch.from_numpy(values(bits, dtype).reshape(each.info.shape))
        return found

    def _quick(self, dtype: torch.dtype) -> bool:
        """Whether this machine multiplies in `dtype` much faster than in float32: some take far longer."""
        torch, took = self._torch, []
        for kind in (dtype, torch.float32):
            a = torch.ones(512, 512, dtype=kind)
            a @ a
            begun = time.perf_counter()
            for _ in range(3):
                a @ a
            took.append(time.perf_counter() - begun)
        return took[0] * _FASTER < took[1]

    def _json(self, path: str) -> dict[str, Any]:
        if path not in self._files:
            raise UsageError(
                "text.unsupported", f"the version has no {path}, which says how its weights become a model", hint=_HINT
            )
        try:
            found = json.loads(self._small(path))
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            raise UsageError("text.unsupported", f"the version's {path} is no JSON object", hint=_HINT)
        return found

    def _small(self, path: str) -> bytes:
        file = self._files[path]
        if file.bytes > _SMALL:
            raise UsageError("text.unsupported", f"the version's {path} has {file.bytes} bytes", hint=_HINT)
        return bytes(self._originals.read(file.offset, file.end))

    # -- likelihoods ---------------------------------------------------------------------------------------------

    def _temperature(self, pieces: Sequence[Tokens], check: Callable[[], None]) -> float:
        """What makes an even choice of the text likeliest."""
        scored = sum(piece.scored for piece in pieces)
        step = max(1, scored // _JUDGED)
        likely = np.zeros(len(_TEMPERATURES))
        with self._torch.inference_mode():
            for batch in self._batches(pieces[step // 2 :: step] or pieces):
                check()
                logits, wanted = self._logits(batch)
                chosen = logits.gather(-1, wanted[:, None])[:, 0]
                for k, temperature in enumerate(_TEMPERATURES):
                    whole = (logits / temperature).logsumexp(-1)
                    likely[k] += float((chosen / temperature - whole).sum())
        return _peak(np.log(_TEMPERATURES), np.nan_to_num(likely, nan=-np.inf))

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
        with _refusals("the model does not take this text"):
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


def _windows(context: tuple[int, ...], completion: tuple[int, ...], limit: int) -> Iterator[Tokens]:
    """The completion in pieces of at most `limit` tokens, with what stands before them."""
    if len(context) + len(completion) <= limit:
        yield Tokens(context, completion)
        return
    before = min(_CONTEXT, limit // 2)
    whole, at = context + completion, len(context)
    while at < len(whole):
        first = max(0, at - before)
        yield Tokens(whole[first:at], whole[at : first + limit])
        at = first + limit


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


@contextmanager
def _refusals(what: str) -> Iterator[None]:
    """Give what transformers raises as ours: its models and templates can fail in any way."""
    try:
        yield
    except StrongroomError:
        raise
    except Exception as error:  # jinja, torch, tokenizers and transformers have no tree of their own
        why = str(error)[:300] or type(error).__name__
        raise UsageError("text.unsupported", f"{what}: {why}", hint=_HINT) from error
