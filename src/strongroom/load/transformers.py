"""Models and tokenizers of transformers, straight from the room.

What `from_pretrained` does for a folder on disk, done for a version in the room: configuration, generation settings and
weights are read into memory, and no file is written. Code that came with a model is not run, and none is fetched that
its configuration names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from strongroom.errors import StrongroomError, UsageError
from strongroom.load.arrays import torch_dtype
from strongroom.load.checkpoint import checkpoint_files, listed, small_files
from strongroom.load.folder import MemoryFolder
from strongroom.load.safe_open import SafeOpen
from strongroom.load.source import resolve
from strongroom.load.weights import Weights

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from strongroom.load.source import Source

_LOCAL: Mapping[str, Any] = {"trust_remote_code": False, "local_files_only": True}
# What decides where files come from: here they come from the room.
_ELSEWHERE = ("cache_dir", "force_download", "proxies", "revision", "token", "use_safetensors", "variant", "state_dict")
_NOT_FOR_CONFIG = ("dtype", "torch_dtype", "quantization_config", "device_map")


def from_room(model_class: Any, source: Source, *, files: Sequence[str] | None = None, **kwargs: Any) -> Any:
    """The model that ``model_class.from_pretrained(folder, **kwargs)`` would give for the files of a version.

    `model_class` is an Auto class or a model class of transformers; `source` a reference such as ``acme/tiny@1``, a
    reader, or open weights. `files` names the safetensors files to take where the version does not say (it says by
    ``model.safetensors`` or its index); a version whose only weights are one GGUF file is read from that, dequantised.

    On the CPU the parameters are views of one buffer, or copies where `dtype` asks for another type. With `device_map`
    they are read one by one, so that host memory stays flat.

    UsageError ``transformers.*`` and ``checkpoint.*`` for arguments that name another place, a model that needs its own
    code, and what transformers refuses; reading raises what `ImageReader` raises.
    """
    _check(kwargs)
    with Weights(resolve(source)) as weights, ExitStack() as stack:
        checkpoint = checkpoint_files(weights) if files is None else list(files)
        gguf = [path for path in checkpoint if weights.file_entry(path).kind == "gguf"][:1]
        folder = stack.enter_context(MemoryFolder(weights, [*small_files(weights), *gguf]))
        with _refusals():
            if gguf:
                return _unnamed(model_class.from_pretrained(folder, gguf_file=gguf[0], **kwargs, **_LOCAL))
            config, kwargs = _config(model_class, folder, kwargs)
            concrete, config = _concrete(model_class, config)
            if "generation_config" not in kwargs and concrete.can_generate():
                kwargs["generation_config"] = _generation_config(folder)
        tensors: dict[str, Any]
        chosen = stack.enter_context(Weights(weights.reader, only=checkpoint))
        if kwargs.get("device_map") is None:
            tensors = dict(chosen.torch())
        else:
            opened = SafeOpen(chosen, "torch")
            tensors = {name: opened.get_slice(name) for name in chosen}
            if kwargs.get("dtype") in (None, "auto") and kwargs.get("torch_dtype") in (None, "auto"):
                # transformers would ask the tensors, which these are not yet.
                kwargs["dtype"] = getattr(config, "dtype", None) or _dtype(chosen)
        with _refusals():
            return _unnamed(concrete.from_pretrained(None, config=config, state_dict=tensors, **kwargs))


def tokenizer_from_room(source: Source, *, tokenizer_class: Any = None, **kwargs: Any) -> Any:
    """The tokenizer that ``AutoTokenizer.from_pretrained(folder, **kwargs)`` would give for the files of a version.

    Vocabulary, special tokens and chat template included; from the GGUF file where there are no files of a tokenizer.
    `tokenizer_class` is another class of transformers with the same method, such as ``AutoProcessor``. Its files pass
    through memory only; UsageError ``transformers.*`` as in `from_room`.
    """
    import transformers

    _check(kwargs)
    with Weights(resolve(source)) as weights:
        small = small_files(weights)
        heads: dict[str, int] = {}
        if not any(path.startswith(("tokenizer", "vocab", "spiece", "sentencepiece")) for path in small):
            gguf = next((file for file in weights.reader.layout.files if file.kind == "gguf"), None)
            if gguf is None:
                raise UsageError("transformers.no_tokenizer", f"no tokenizer in this version, only {listed(weights)}")
            # The vocabulary is in the header; the tensors behind it need not be read.
            heads[gguf.path] = gguf.data_start
            kwargs.setdefault("gguf_file", gguf.path)
        with MemoryFolder(weights, small, heads=heads) as folder, _refusals():
            found = (tokenizer_class or transformers.AutoTokenizer).from_pretrained(folder, **kwargs, **_LOCAL)
            return _unnamed(found)


def _check(kwargs: dict[str, Any]) -> None:
    if kwargs.pop("trust_remote_code", False):
        raise UsageError("transformers.own_code", "code that came with a model is not run by these loaders")
    kwargs.pop("local_files_only", None)
    for name in _ELSEWHERE:
        if kwargs.get(name) is not None:
            raise UsageError("transformers.argument", f"{name} does not go with a model from the room")


@contextmanager
def _refusals() -> Iterator[None]:
    """Give what transformers raises as ours, and what we raised inside it as it was."""
    try:
        yield
    except (ValueError, TypeError, LookupError, AttributeError, OSError, RuntimeError, ImportError) as error:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, StrongroomError):
                raise cause from None
            cause = cause.__cause__ or cause.__context__
        if "trust_remote_code" in str(error):
            raise UsageError(
                "transformers.own_code",
                "this model needs Python code of its own, which these loaders do not run",
                hint="install that code as a package, register its classes with transformers, and load again",
            ) from error
        raise UsageError("transformers.refused", f"transformers can't load this: {error}") from error


def _config(model_class: Any, folder: Path, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The configuration with what `kwargs` change in it, and the rest of them."""
    import transformers

    config = kwargs.pop("config", None)
    if config is not None:
        return config, kwargs
    if not (folder / "config.json").exists():
        raise UsageError("transformers.no_config", "this version has no config.json", hint="pass config=")
    kept = {name: kwargs.pop(name) for name in _NOT_FOR_CONFIG if name in kwargs}
    config_class = getattr(model_class, "config_class", None) or transformers.AutoConfig
    config, unused = config_class.from_pretrained(folder, return_unused_kwargs=True, **kwargs, **_LOCAL)
    return config, {**{name: value for name, value in unused.items() if name not in _LOCAL}, **kept}


def _concrete(model_class: Any, config: Any) -> tuple[Any, Any]:
    """The class that an Auto class picks for a configuration, and the part of the configuration that is for it.

    Auto classes do it inside `from_pretrained`, which does not take tensors instead of a folder.
    """
    mapping = getattr(model_class, "_model_mapping", None)
    if mapping is None:
        return model_class, config
    if type(config) not in mapping:
        raise UsageError("transformers.no_class", f"{model_class.__name__} has no model for a {type(config).__name__}")
    candidates = mapping[type(config)]
    if not isinstance(candidates, list | tuple):
        candidates = (candidates,)
    named = [found for found in candidates if found.__name__ in (config.architectures or ())]
    concrete = (named or candidates)[0]
    text = config.sub_configs.get("text_config")
    if text is not None and getattr(concrete, "config_class", None) == text:
        quantization = getattr(config, "quantization_config", None)
        config = config.get_text_config()
        if quantization is not None:
            config.quantization_config = quantization
    return concrete, config


def _generation_config(folder: Path) -> Any:
    """As `from_pretrained` has it: from its own file, else from what older models have in their configuration."""
    from transformers import GenerationConfig

    if (folder / "generation_config.json").exists():
        return GenerationConfig.from_pretrained(folder)
    if not (folder / "config.json").exists():
        return None
    return GenerationConfig.from_pretrained(folder, config_file_name="config.json", _from_model_config=True)


def _dtype(weights: Weights) -> torch.dtype | None:
    """The first floating type among the tensors, which is what transformers loads a model in unless told otherwise."""
    for entry in weights.entries.values():
        if entry.info.dtype.name in ("BF16", "F16", "F32", "F64"):
            return torch_dtype(entry.info.dtype.name)
    return None


def _unnamed(found: Any) -> Any:
    """Without the name of the folder, which is gone. Not a reference either: transformers would look for a public model
    of that name on the network, where somebody else may have put one."""
    model = found[0] if isinstance(found, tuple) else found
    for thing in (model, getattr(model, "config", None)):
        if thing is not None and hasattr(thing, "name_or_path"):
            thing.name_or_path = ""
    return found
