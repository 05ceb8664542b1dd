"""A sharded model is whole: every shard is there, and holds what the index says it does.

A shard that is missing, or replaced by one that holds other tensors, would otherwise be found out by whoever loads the
weights, long after the original is gone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, NoReturn

from strongroom.core.limits import LIMITS
from strongroom.errors import LimitExceeded, UsageError

INDEX_SUFFIX = ".safetensors.index.json"
INDEX_MAX = 32 << 20  # bytes; an index of 100,000 tensors has ten million
# model-00001-of-00002.safetensors, as transformers, diffusers and llama.cpp name shards.
_NUMBERED = re.compile(r"(?P<stem>.*)-[0-9]{5}-of-(?P<count>[0-9]{5})(?P<suffix>\.safetensors|\.gguf)")


def check_numbered(paths: frozenset[str]) -> None:
    """UsageError ``source.missing_shard`` unless every ``…-00001-of-0000N`` among `paths` has all its N parts."""
    seen: set[tuple[str, str, str]] = set()
    for path in sorted(paths):
        match = _NUMBERED.fullmatch(path)
        if match is None:
            continue
        stem, count, suffix = match["stem"], match["count"], match["suffix"]
        if (stem, count, suffix) in seen:
            continue
        seen.add((stem, count, suffix))
        for number in range(1, int(count) + 1):
            part = f"{stem}-{number:05}-of-{count}{suffix}"
            if part not in paths:
                _missing(part, path)


def check_index(path: str, text: bytes, shards: Mapping[str, frozenset[str]]) -> None:
    """Check the index file `path`, whose content is `text`.

    `shards` maps the path of every safetensors file to the names of its tensors. UsageError: ``source.index`` (not an
    index, or its names leave its folder), ``source.missing_shard``, ``source.missing_tensor``,
    ``source.duplicate_tensor``. LimitExceeded ``source.limit`` as `read_index`.
    """
    folder = path.rpartition("/")[0]
    weight_map = read_index(path, text)
    named = {shard: f"{folder}/{shard}" if folder else shard for shard in sorted(set(weight_map.values()))}
    for shard, place in named.items():
        # ../../other/model.safetensors would make a reader of the room's copy open what is not in the room.
        if shard.startswith("/") or "\\" in shard or any(part in ("", ".", "..") for part in shard.split("/")):
            _refuse("source.index", f"the index {path} names {shard[:200]!r}, which is not a file below it", index=path)
        if place not in shards:
            _missing(place, path)
    for tensor, shard in weight_map.items():
        if tensor not in shards[named[shard]]:
            _refuse(
                "source.missing_tensor",
                f"the index {path} says that {named[shard]!r} holds {tensor[:200]!r}; it does not",
                index=path,
                shard=named[shard],
                tensor=tensor[:200],
            )
    # Readers differ in which of the two they load, so that what was evaluated need not be what runs.
    owner: dict[str, str] = {}
    for place in named.values():
        for tensor in shards[place]:
            if tensor in owner:
                _refuse(
                    "source.duplicate_tensor",
                    f"{owner[tensor]!r} and {place!r} both hold {tensor[:200]!r}",
                    index=path,
                    tensor=tensor[:200],
                )
            owner[tensor] = place


def read_index(path: str, text: bytes) -> dict[str, str]:
    """The ``weight_map`` of an index: tensor name to file name.

    UsageError ``source.index`` if it has none; LimitExceeded ``source.limit`` for more bytes or entries than are read.
    """
    if len(text) > INDEX_MAX:
        raise LimitExceeded("source.limit", f"the index {path} has {len(text)} bytes; at most {INDEX_MAX} are read")
    # Megabytes of `{},` would become gigabytes of objects: a value takes a comma, so there are no more of them.
    if text.count(b",") > LIMITS.tensors:
        raise LimitExceeded("source.limit", f"the index {path} has more than {LIMITS.tensors} entries")
    try:
        document = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
        json.dumps(document, ensure_ascii=False).encode("utf-8")  # fails on lone surrogates, which name nothing
    except (ValueError, RecursionError) as error:
        _refuse("source.index", f"the index {path} is not valid JSON: {error}", index=path)
    weight_map = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        _refuse("source.index", f"the index {path} has no weight_map from tensors to files", index=path)
    return weight_map


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key occurs twice in one object")
    return result


def _missing(shard: str, named_by: str) -> NoReturn:
    _refuse(
        "source.missing_shard",
        f"{shard[:300]!r} is missing; {named_by!r} names it",
        hint="download the model again; all its shards belong in one directory",
        shard=shard[:300],
        named_by=named_by[:300],
    )


def _refuse(code: str, message: str, *, hint: str = "", **evidence: str) -> NoReturn:
    raise UsageError(code, message, hint=hint or "download the model again, index and shards together", **evidence)
