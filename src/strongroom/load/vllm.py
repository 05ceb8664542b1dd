"""vLLM: the load format ``strongroom``.

vLLM finds `register` by the entry point ``vllm.general_plugins``, in each of its processes. Then weights come from the
room. Configuration and tokenizer don't go through a model loader there: vLLM reads them by itself, from the folder or
repository that ``model`` names, before it loads anything. So give it a folder with these files. `model_folder` makes
one whose files are in memory::

    with model_folder("acme/tiny@1") as folder:
        llm = LLM(model=str(folder), load_format="strongroom", model_loader_extra_config={"ref": "acme/tiny@1"})

or, from a shell, keep ``config.json`` and the tokenizer's files in a folder of their own (they are no weights)::

    strongroom run acme/tiny@1 -- vllm serve ./tiny-config --load-format strongroom

Without ``ref`` the weights are those of the grant, where ``strongroom run`` gave exactly one. Each of vLLM's workers
reads the whole version and keeps its share. Quantisation is vLLM's business as with any checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from strongroom.core.settings import Settings
from strongroom.errors import UsageError
from strongroom.load.checkpoint import checkpoint_files, small_files
from strongroom.load.folder import MemoryFolder
from strongroom.load.grant import granted_refs
from strongroom.load.source import resolve
from strongroom.load.weights import Weights

if TYPE_CHECKING:
    import torch

    from strongroom.load.source import Source

LOAD_FORMAT = "strongroom"


def register() -> None:
    """Tell vLLM of the load format. Called again, it changes nothing; UsageError where there is no vLLM."""
    try:
        from vllm.model_executor.model_loader import (
            _LOAD_FORMAT_TO_MODEL_LOADER,  # vLLM has no other way to ask what is registered
            register_model_loader,
        )
        from vllm.model_executor.model_loader.base_loader import BaseModelLoader
    except ImportError as error:
        raise UsageError("vllm.missing", f"vLLM can't be imported: {error}", hint="pip install vllm") from None
    if LOAD_FORMAT in _LOAD_FORMAT_TO_MODEL_LOADER:
        return

    @register_model_loader(LOAD_FORMAT)
    class StrongroomLoader(BaseModelLoader):  # type: ignore[misc]  # Any where vLLM is not installed
        """Weights from the room, in memory only."""

        def download_model(self, model_config: Any) -> None:  # noqa: ARG002 - vLLM's interface
            """No file is wanted. Whether the weights may be read is found out here, though."""
            resolve(self._ref())

        def load_weights(self, model: Any, model_config: Any) -> None:
            load_into(model, self._ref(), strict=model_config.quantization is None)

        def _ref(self) -> str:
            return ref_of(self.load_config.model_loader_extra_config)


def ref_of(extra_config: Any) -> str:
    """Which weights ``model_loader_extra_config`` means: its ``ref``, else the only ones granted; or UsageError."""
    options = dict(extra_config) if isinstance(extra_config, Mapping) else {}
    ref = options.pop("ref", None)
    if options or not isinstance(ref, str | None):
        raise UsageError(
            "vllm.option", f"the only option of load format {LOAD_FORMAT} is ref, a text", hint='{"ref": REF}'
        )
    if ref is not None:
        return ref
    grant = Settings.from_environment().grant
    granted = [] if grant is None else granted_refs(grant)
    if len(granted) != 1:
        raise UsageError(
            "vllm.which",
            f"which weights? {len(granted)} were granted",
            hint='--model-loader-extra-config \'{"ref": "NAME@N"}\'',
        )
    return granted[0]


def load_into(model: Any, source: Source, *, strict: bool = True) -> None:
    """Feed a version to ``model.load_weights``. `strict`: UsageError ``vllm.incomplete`` when parameters got nothing.

    As vLLM's own loader has it, that can be told of models that say what they loaded, and not of modules that make
    parameters from others afterwards.
    """
    loaded = model.load_weights(weights_iterator(source))
    if loaded is None or not strict:
        return
    made_later = {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        if hasattr(getattr(module, "quant_method", None), "process_weights_after_loading")
        for name, _ in module.named_parameters()
    }
    missing = sorted({name for name, _ in model.named_parameters()} - set(loaded) - made_later)
    if missing:
        raise UsageError(
            "vllm.incomplete", f"the version has no weights for {len(missing)} parameters, such as {missing[0]}"
        )


def weights_iterator(source: Source) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and CPU tensor of each tensor of the model, one group of neighbours read while the last is being used."""
    with Weights(resolve(source)) as weights, Weights(weights.reader, only=checkpoint_files(weights)) as chosen:
        yield from chosen.stream_torch()


def model_folder(source: Source) -> MemoryFolder:
    """Configuration and tokenizer of a version under a path, in memory, while it is open and this process lives."""
    with Weights(resolve(source)) as weights:
        return MemoryFolder(weights, small_files(weights))
