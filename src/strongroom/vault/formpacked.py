"""The forms int4 and int8: safetensors files as compressed-tensors packs them, which vLLM and transformers load
(spec/release.md, section 5)."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from strongroom.core import canonical
from strongroom.core.limits import LIMITS, MIB
from strongroom.formats import safetensors
from strongroom.formats.layout import FileEntry
from strongroom.formats.tensors import DTYPES, Dtype, TensorInfo
from strongroom.vault.forms import FLOATS, Content, Made, Source, among, of_file, quantisable, unfit
from strongroom.vault.originals import Originals, Placed
from strongroom.vault.packedtensors import LARGEST

_LINEAR = re.compile(
    r"(?:.*\.)?(?:(?:q|k|v|o|qkv|gate|up|down|gate_up)_proj|(?<!mixer\.)out_proj|fc(?:[12]|_in|_out)|query_key_value"
    r"|dense(?:_h_to_4h|_4h_to_h)?|w[123])\.weight",
    re.DOTALL,
)
# What is left alone: towers of other senses, and heads beside the language model's. They are small, costly to round,
# of odd sizes, and loaders build them of layers that take floats alone; so are state-space layers. Loaders are given
# the same pattern, so it holds whatever they call the layers inside.
_PARTS = (
    r"(?:.*\.)?(?:(?:vision|visual|image|video|audio|speech)(?:_[^.]*)?"
    r"|[^.]*(?:projector|connector|resampler|qformer|merger|aligner)|mamba[^.]*"
    r"|embed_vision|embed_audio|vqmodel|vpm|apm|linear_attn|mtp|pooler|classifier|cls|lm_head)\..*"
)
_LEFT_ALONE = re.compile(_PARTS)
# Layers that give logits, by the names that libraries have for them: of the embedding's weights they have no tensor.
_HEADS = (
    r"(?:.*\.)?(?:lm_head(?:\..*)?|decoder|proj_out|embed_out|output_projection"
    r"|vocab_projector|generator_lm_head|lm_loss)$"
)
_EMBEDDING = re.compile(r"emb|(?:^|\.)(?:wte|wpe|shared)(?:\.|$)")
_SPECIAL = re.compile(r"[ -/:-@\[-^`{-~]")  # what is in ASCII no letter, digit or underscore
_BITS = {"int4": 4, "int8": 8}
_GROUPS = (128, 64, 32)
_MADE = ("packed", "scale", "shape")  # of a tensor that is quantised
_LARGEST = 64 * MIB  # of the files that say how a model is loaded
_ANEW = 256 * MIB  # of all of them as they are written anew, which a custodian has in memory
_INDEX = ".safetensors.index.json"
_Unit = list[tuple[str, str, tuple[int, ...], Source]]  # what stays together: name, type, shape and source


def packed_files(originals: Originals, form: str) -> dict[str, Content]:
    """The files that differ from those that were put. UsageError ``form.*``."""
    bits, files, tensors = _BITS[form], originals.layout.files, list(originals.tensors())
    chosen = [each for each in tensors if _linear(each.info, originals.spared)]
    if not chosen:
        unfit("form.nothing", f"{form} quantises linear layers, and this version has none by a name that is known")
    _check_share(tensors, chosen, originals.spared, form)
    group = _group(chosen, bits)
    weights = [file for file in files if file.kind == "safetensors"]
    placed = {file.path: of_file(tensors, file) for file in weights}
    quantised = {each.begin for each in chosen}
    found: dict[str, Content] = {}
    rows: dict[str, list[tuple[str, int]]] = {}  # of each file, the tensors it has now, and their bytes
    for file in weights:
        found[file.path], rows[file.path] = _file(originals, file, placed[file.path], quantised, bits, group)
    settings, left = canonical.encode(_settings(tensors, quantised, bits, group)), _ANEW
    paths = {file.path: file for file in files}
    folders: dict[str, list[str]] = {}
    for path in placed:
        folders.setdefault(_folder(path), []).append(path)

    def anew(path: str, data: bytes) -> None:
        nonlocal left
        left -= len(data)
        if left < 0:  # a short file that names all tensors, a thousand times
            unfit("form.config", f"its configurations would be more than {_ANEW // MIB} MiB when they are written anew")
        found[path] = _literal(data)

    for folder in sorted(folders):
        _check_names([each for path in folders[folder] for each in placed[path]], quantised)
        config = paths.get(f"{folder}config.json")
        if config is None:
            where = folder or "beside the weights"
            unfit("form.config", f"there is no config.json ({where}), by which {form} would be known when it is loaded")
        anew(config.path, _configured(_read(originals, config), settings))
    for file in files:
        if file.path.endswith(_INDEX):
            anew(file.path, _indexed(_read(originals, file), _folder(file.path), placed, rows))
    return found


def _linear(info: TensorInfo, spared: frozenset[str]) -> bool:
    named = _LINEAR.fullmatch(info.name) and not _left_alone(info) and info.name not in spared
    return bool(named) and len(info.shape) == 2 and info.elements > 0


def _check_share(tensors: Sequence[Placed], chosen: Sequence[Placed], spared: frozenset[str], form: str) -> None:
    """Refused unless at least half of what could be quantised is: where experts lie in one tensor, say, or layers are
    transposed, a copy would be floats but for its name, and loaders would look for what is not there."""
    matrices = [each.info for each in tensors if len(each.info.shape) > 1 and each.info.dtype.name in FLOATS]
    others = [
        info
        for info in matrices
        if not (_linear(info, spared) or info.name in spared or _EMBEDDING.search(info.name) or _left_alone(info))
    ]
    done, rest = sum(each.info.elements for each in chosen), sum(info.elements for info in others)
    if done < rest:
        largest = max(others, key=lambda info: info.elements)
        unfit(
            "form.part",
            f"{form} knows linear layers by their names, and {largest.name!r:.100} is none: "
            f"{100 * rest // (done + rest)} % of the weights would leave as they are",
        )


def _check_names(tensors: Sequence[Placed], quantised: set[int]) -> None:
    """Of the files of a folder, which are loaded as one model, and found as one: none has a name twice."""
    made = {f"{each.info.name}_{what}" for each in tensors if among(each, quantised) for what in _MADE}
    taken = sorted(each.info.name for each in tensors if each.info.name in made)
    if taken:
        unfit("form.quantised", f"it has a tensor {taken[0]!r:.100}, which is the name that a quantised one would get")


def _group(chosen: Sequence[Placed], bits: int) -> int:
    """Elements of a group; 0: a row."""
    for each in chosen:
        quantisable(each.info, _GROUPS[-1] if bits == 4 else 4)
    if bits == 8:
        for each in chosen:
            if each.info.shape[-1] > LARGEST:  # no trace would read it, and a custodian make it at once
                unfit("form.shape", f"rows of {each.info.name!r:.100} have more than {LARGEST} elements")
        return 0
    return next(group for group in _GROUPS if all(each.info.shape[-1] % group == 0 for each in chosen))


def _file(
    originals: Originals, file: FileEntry, tensors: Sequence[Placed], quantised: set[int], bits: int, group: int
) -> tuple[Content, list[tuple[str, int]]]:
    """What a file becomes, and its tensors with their bytes."""
    units: list[_Unit] = []
    for each in tensors:
        info = each.info
        if among(each, quantised):
            units += _packed(each, bits, group)
        else:
            units.append([(info.name, info.dtype.name, info.shape, each.begin)])
    # Each unit's size is a multiple of its alignment: so every tensor is aligned, as readers that map files want it.
    units.sort(key=lambda unit: -max(_alignment(DTYPES[dtype]) for _, dtype, _, _ in unit))
    rows = [row for unit in units for row in unit]
    metadata = safetensors.parse_header(originals.read(file.offset, file.offset + file.data_start), file.bytes).metadata
    header = safetensors.encode_header([row[:3] for row in rows], metadata)
    if len(header) > safetensors.LENGTH_BYTES + LIMITS.safetensors_header:  # three for each that is quantised
        unfit("form.header", f"{file.path!r:.100} would have a header that no reader of safetensors takes")
    sizes = [_size(dtype, shape) for _, dtype, shape, _ in rows]
    parts: list[tuple[int, Source]] = [(len(header), header)]
    parts += [(size, row[3]) for size, row in zip(sizes, rows, strict=True) if size]
    return Content(len(header), parts), [(row[0], size) for size, row in zip(sizes, rows, strict=True)]


def _packed(each: Placed, bits: int, group: int) -> list[_Unit]:
    info = each.info
    name, dtype, (rows, columns) = info.name, info.dtype, info.shape
    group = group or columns
    shape = b"".join(number.to_bytes(8, "little") for number in info.shape)
    codes = Made(each, group, group * bits // 8, bits)
    scales = Made(each, group, dtype.block_bytes, bits, scales=True)
    pair: _Unit = [
        (f"{name}_packed", "I32", (rows, columns * bits // 32), codes),
        (f"{name}_scale", dtype.name, (rows, columns // group), scales),
    ]
    first: _Unit = [(f"{name}_shape", "I64", (2,), shape)]
    # Behind one another they are made at once. Sizes that no real tensor has would leave what follows unaligned.
    together = all(_size(kind, shape) % 4 == 0 for _, kind, shape, _ in pair)
    return [first, pair] if together else [first, *([row] for row in pair)]


def _size(dtype: str, shape: tuple[int, ...]) -> int:
    return TensorInfo("", DTYPES[dtype], shape, 0, 0).elements // DTYPES[dtype].block * DTYPES[dtype].block_bytes


def _alignment(dtype: Dtype) -> int:
    return dtype.block_bytes if dtype.block == 1 else 1


# -- what says how it is loaded ---------------------------------------------------------------------------------------


def _settings(tensors: Sequence[Placed], quantised: set[int], bits: int, group: int) -> dict[str, Any]:
    others = [
        each.info
        for each in tensors
        if not among(each, quantised) and len(each.info.shape) > 1 and each.info.name.endswith(".weight")
    ]
    # By their last names: what stands before it is another in each library. In full, where one of what is quantised has
    # the same (experts in one tensor beside other layers, say): else that would be loaded as if it were not.
    there = {_last(each.info) for each in tensors if among(each, quantised)}
    alone = {
        f"re:(?:.*\\.)?{_escaped(_layer(info) if _last(info) in there else _last(info))}$"
        for info in others
        if not _left_alone(info)
    }
    parts = {f"re:{_PARTS}"} if any(_left_alone(info) for info in others) else set()
    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": True,
        "dynamic": False,
        "strategy": "group" if group else "channel",
        "group_size": group or None,
    }
    scheme = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "config_groups": {"group_0": scheme},
        "format": "pack-quantized",
        "ignore": sorted(alone | parts | {"lm_head", f"re:{_HEADS}"}),
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
    }


def _left_alone(info: TensorInfo) -> bool:
    return _LEFT_ALONE.match(_layer(info)) is not None


def _layer(info: TensorInfo) -> str:
    """The layer that a tensor is the weight of."""
    return info.name.removesuffix(".weight")


def _last(info: TensorInfo) -> str:
    """The last name of that layer."""
    return _layer(info).rpartition(".")[2]


def _escaped(name: str) -> str:
    """A name as a pattern; the same text by whatever version of Python."""
    return _SPECIAL.sub(r"\\\g<0>", name)


def _configured(data: bytes, settings: bytes) -> bytes:
    """A config.json with a quantisation: what is there stays as it is written, so that no number changes its form."""
    value = _object(data, "config.json")
    if "quantization_config" in value or "compression_config" in value:
        unfit("form.quantised", "its config.json says that it is quantised already")
    body = data.rstrip()[:-1].rstrip()
    comma = b"," if value else b""
    found = body + comma + b'"quantization_config":' + settings + b"}\n"
    value["quantization_config"] = json.loads(settings)
    if _object(found, "config.json") != value:  # of another encoding, say
        unfit("form.config", "its config.json can't be added to: it is not plain JSON in UTF-8")
    return found


def _indexed(
    data: bytes, folder: str, placed: Mapping[str, Sequence[Placed]], rows: Mapping[str, list[tuple[str, int]]]
) -> bytes:
    """The index of a model in several files, for the tensors that these have now."""
    weight_map = _object(data, "the index of its files").get("weight_map")
    named = {path for path in weight_map.values() if isinstance(path, str)} if isinstance(weight_map, dict) else set()
    paths = sorted(path for name in named if (path := folder + name) in placed)
    total = sum(size for path in paths for _, size in rows[path])
    owners = {name: path[len(folder) :] for path in paths for name, _ in rows[path]}
    return canonical.encode({"metadata": {"total_size": total}, "weight_map": owners})


def _object(data: bytes, what: str) -> dict[str, Any]:
    try:
        value = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        unfit("form.config", f"{what} is no JSON object in UTF-8")
    return value


def _read(originals: Originals, file: FileEntry) -> bytes:
    if file.bytes > _LARGEST:
        unfit("form.config", f"{file.path!r:.100} is too large to be written anew")
    return bytes(originals.read(file.offset, file.end))


def _folder(path: str) -> str:
    """The folder of a file, with the stroke at its end; empty for the uppermost."""
    head, stroke, _ = path.rpartition("/")
    return head + stroke


def _literal(data: bytes) -> Content:
    return Content(0, [(len(data), data)] if data else [])
