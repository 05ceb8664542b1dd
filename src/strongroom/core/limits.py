"""Every limit in one place. A parser refuses beyond these before it allocates."""

from __future__ import annotations

from dataclasses import dataclass

KIB = 1 << 10
MIB = 1 << 20


@dataclass(frozen=True)
class Limits:
    """Bytes and counts; see spec/container.md, section Limits."""

    safetensors_header: int = 100_000_000  # safetensors' own bound
    gguf_tensors: int = 1 << 20
    gguf_metadata: int = 64 * MIB
    tensors: int = 1 << 20
    tensor_dims: int = 8
    files: int = 100_000
    path_bytes: int = 1024
    image: int = 1 << 50
    positions: int = 1 << 20
    marked_segment_min: int = 4 * KIB
    segment_max: int = 16 * MIB
    pack_body: int = 32 * MIB  # what the writer aims at
    pack_trailer: int = 64 * MIB
    manifest: int = 64 * MIB
    index: int = 256 * MIB
    bundle: int = 64 * MIB
    signatures: int = 16
    reason: int = 4 * KIB  # characters of a reason that is kept beside the log
    entry: int = 65_535  # C2SP tlog-tiles: the length of an entry has two bytes
    upload: int = 2 * MIB  # what is said of files that are sent to a served room
    upload_heads: int = 256 * MIB  # of them, kept in memory until they are written
    suspect_files: int = 500  # that are searched at a time in a served room: each is a descriptor
    text: int = 64 * MIB  # that is searched for marks at a time
    text_tokens: int = 1 << 19  # of it that are looked at: each costs three runs of the model
    note: int = 1 * MIB
    note_signatures: int = 64  # C2SP signed-note: at least 16
    log_size: int = 1 << 62  # entries; a log has fewer
    proof_hashes: int = 63  # C2SP tlog-witness


LIMITS = Limits()
