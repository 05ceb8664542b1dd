"""Models and tokenizers of transformers, straight from the room.

What `from_pretrained` does for a folder on disk, done for a version in the room: configuration, generation settings and
weights are read into memory, and no file is written. Code that came with a model is not run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

from strongroom.errors import UsageError
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

# What decides where files come from: here they come from the room.
_ELSEWHERE = ("cache_dir", "force_download", "proxies", "revision", "token", "use_safetensors", "variant", "state_dict")
_NOT_FOR_CONFIG = ("dtype", "torch_dtype", "quantization_config", "device_map")


def from_room(model_class: Any, source: Source, *, files: Sequence[str] | None = None, **kwargs: Any) -> Any:
    """The model that ``model_class.from_pretrained(folder, **kwargs)`` would give for the files of a version.

    `model_class` is an Auto class or a model class of transformers; `source` a reference such as ``acme/tiny@1``, a
    reader, or open weights. `files` names the safetensors files to take where the version does not say (it says by
    ``model.safetensors`` or its index); a version whose only weights are one GGUF file is read from that, dequantised.

    On the CPU the parameters are views of one buffer (a copy where `dtype` asks for another type). With `device_map` they
    are read one by one, so that host memory stays flat.

    UsageError ``transformers.*`` for arguments that name another place, a model that needs its own code, and a version
    from which no model can be made; reading raises what `ImageReader` raises. Errors in a configuration are those of
    transformers.
    """
    import transformers

    _check(kwargs)
    with Weights(resolve(source)) as weights, ExitStack() as stack:
        checkpoint = checkpoint_files(weights) if files is None else list(files)
        gguf = checkpoint[0] if weights.file_entry(checkpoint[0]).kind == "gguf" else None
        folder = stack.enter_context(MemoryFolder(weights, [*small_files(weights), *([gguf] if gguf else [])]))
        with _own_code_refused():
            if gguf:
                return _unnamed(model_class.from_pretrained(folder, gguf_file=gguf, **kwargs, **_LOCAL))
            config, kwargs = _config(model_class, folder, kwargs)
        if "generation_config" not in kwargs and (folder / "config.json").exists():
            own = (folder / "generation_config.json").exists()
            named = {} if own else {"config_file_name": "config.json", "_from_model_config": True}
            kwargs["generation_config"] = transformers.GenerationConfig.from_pretrained(folder, **named)
        tensors: Mapping[str, Any]
        chosen = stack.enter_context(Weights(weights.reader, only=checkpoint))
        if kwargs.get("device_map") is None:
            tensors = chosen.torch()
        else:
            opened = SafeOpen(chosen, "torch")
            tensors = {name: opened.get_slice(name) for name in chosen}
            if kwargs.get("dtype", "auto") in (None, "auto") and getattr(config, "dtype", None) is None:
                kwargs["dtype"] = _dtype(chosen)
        with _own_code_refused():
            return _unnamed(model_class.from_pretrained(None, config=config, state_dict=tensors, **kwargs))


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
            ggufs = [file for file in weights.reader.layout.files if file.kind == "gguf"]
            if not ggufs:
                raise UsageError(
                    "transformers.no_tokenizer", f"this version has no tokenizer; it has {listed(weights)}"
                )
            # The vocabulary is in the header; the tensors behind it need not be read.
            heads[ggufs[0].path] = ggufs[0].data_start
            kwargs.setdefault("gguf_file", ggufs[0].path)
        with MemoryFolder(weights, small, heads=heads) as folder, _own_code_refused():
            found = (tokenizer_class or transformers.AutoTokenizer).from_pretrained(folder, **kwargs, **_LOCAL)
            return _unnamed(found)


_LOCAL: Mapping[str, Any] = {"trust_remote_code": False, "local_files_only": True}


def _check(kwargs: dict[str, Any]) -> None:
    if kwargs.pop("trust_remote_code", False):
        raise UsageError("transformers.own_code", "code that came with a model is not run by these loaders")
    kwargs.pop("local_files_only", None)
    for name in _ELSEWHERE:
        if kwargs.get(name) is not None:
            raise UsageError("transformers.argument", f"{name} does not go with a model from the room")


@contextmanager
def _own_code_refused() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        _needs_code(error)


def _needs_code(error: ValueError) -> NoReturn:
    raise UsageError(
        "transformers.own_code",
        "this model needs Python code of its own, which these loaders do not run",
        hint="install that code as a package, register its classes with transformers, and load again",
    ) from error


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


def _dtype(weights: Weights) -> torch.dtype | None:
    """The first floating type among the tensors, which is what transformers loads a model in unless told otherwise."""
    for entry in weights.entries.values():
        if entry.info.dtype.name in ("BF16", "F16", "F32", "F64"):
            return torch_dtype(entry.info.dtype.name)
    return None


def _unnamed(found: Any) -> Any:
    """Without the name of the folder, which is gone. Not a reference either: transformers would look for a public model
    of that name on the network, where somebody else may have put one."""
    for thing in (found, getattr(found, "config", None)):
        if hasattr(thing, "name_or_path"):
            thing.name_or_path = ""
    return found
