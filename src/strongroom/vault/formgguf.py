"""The forms q8_0 and q4_0: GGUF files of ggml's blocks, which llama.cpp reads (spec/release.md, section 5)."""

from __future__ import annotations

import math
import struct

from strongroom.formats.gguf import GGML_TYPES
from strongroom.formats.layout import FileEntry
from strongroom.formats.tensors import TensorInfo
from strongroom.marking.quantiser import BLOCK
from strongroom.vault.forms import Content, Made, Source, among, of_file, quantisable, unfit
from strongroom.vault.originals import Originals, Placed

_NUMBERS = {dtype.name: number for number, dtype in GGML_TYPES.items()}
_FILE_TYPES = {"q8_0": 7, "q4_0": 2}  # llama.cpp's numbers for what is mostly of these types
# What llama.cpp's own quantiser leaves alone: small, and costly to round, or no weights.
_LEFT_ALONE = (
    "_norm.weight",
    "ffn_gate_inp",
    "ffn_gate_tid2eid",
    "altup",
    "laurel",
    "per_layer_model_proj",
    "ssm_conv1d",
    "shortconv.conv",
    "indexer.k_proj",
    "indexer.q_proj",
    "time_mix_",
    "attn_rel_b",
    "position_embd",
    "token_types",
    "pos_embd",
    "sam.",
    ".rel_pos",
    ".patch_embd",
    ".patch_merger",
    "a.rvq.codebook",
    "mm.a.code_embd",
)


def block_files(originals: Originals, form: str) -> dict[str, Content]:
    """The files that differ from those that were put. UsageError ``form.*``."""
    tensors = list(originals.tensors())
    for each in tensors:
        if each.info.dtype.block > 1:
            unfit(
                "form.quantised", f"the tensor {each.info.name!r:.100} is of {each.info.dtype.name}: quantised already"
            )
    types = {each.begin: _type(each.info, form, originals.spared) for each in tensors if _chosen(each.info)}
    if not types:
        unfit("form.nothing", f"{form} quantises matrices, and this version has none by a name that is known")
    return {
        file.path: _file(originals, file, of_file(tensors, file), types, form)
        for file in originals.layout.files
        if file.kind == "gguf"
    }


def _chosen(info: TensorInfo) -> bool:
    named = info.name.endswith(".weight") and not any(text in info.name for text in _LEFT_ALONE)
    # As llama.cpp does: what is not in whole blocks stays a float, and every tensor of a file says of which type it is.
    if not named or not info.elements or math.prod(info.shape[:-1]) < 2 or info.shape[-1] % BLOCK:
        return False
    quantisable(info, BLOCK)
    return True


def _type(info: TensorInfo, form: str, spared: frozenset[str]) -> str:
    return "Q8_0" if info.name in spared else form.upper()


def _file(originals: Originals, file: FileEntry, tensors: list[Placed], types: dict[int, str], form: str) -> Content:
    header = originals.header(file)
    head = bytearray(originals.read(file.offset, file.offset + header.data_start))
    if not tensors:  # a vocabulary alone
        return Content(file.data_start, [(file.bytes, file.offset)])
    if header.file_type:
        struct.pack_into("<I", head, header.file_type, _FILE_TYPES[form])
    parts: list[tuple[int, Source]] = []
    at = 0

    def add(size: int, source: Source) -> None:
        nonlocal at
        if size:
            parts.append((size, source))
            at += size

    for each in tensors:
        add(-at % header.alignment, None)
        made = among(each, types)
        block = types[each.begin] if made else each.info.dtype.name
        struct.pack_into("<IQ", head, header.entries[each.info.name], _NUMBERS[block], at)
        if made:
            size = GGML_TYPES[_NUMBERS[block]].block_bytes
            add(each.info.elements // BLOCK * size, Made(each, BLOCK, size, block=block))
        else:
            add(each.info.size, each.begin)
    if file.end > max(each.end for each in tensors):  # it was filled up to the alignment, and is again
        add(-at % header.alignment, None)
    return Content(len(head), [(len(head), bytes(head)), *parts])
