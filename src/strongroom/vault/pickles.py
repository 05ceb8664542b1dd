"""Which files are pickles, by name and by content, without loading any of them.

A pickle is a program that its reader runs. A room that kept one would hand it to every holder with the room's authority
behind it. Scanners that judge what a pickle does have all been bypassed; so none is let in, whatever it does.
"""

from __future__ import annotations

import io
import pickletools
import re
import zipfile
from typing import BinaryIO

SUFFIXES = frozenset(
    {".bin", ".pt", ".pth", ".pt2", ".ptl", ".ckpt", ".pkl", ".pickle", ".joblib", ".dill", ".cloudpickle", ".mar"}
)
_HEAD = 1 << 20
_NPY_MAGIC = b"\x93NUMPY"
_NPY_HEADER_MAX = 1 << 16
# An object in a dtype description: '|O', 'O', alone or as the type of a field.
_NPY_OBJECT = re.compile(rb"""['"][|<>=]?O\d*['"]""")
# Opcodes that look up or call what the pickle names: without one of them a pickle is plain data.
_CALLS = frozenset({"GLOBAL", "STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "REDUCE", "BUILD"})
_OPCODES = frozenset(ord(opcode.code) for opcode in pickletools.opcodes)


def pickle_evidence(name: str, stream: BinaryIO) -> str | None:
    """Why the file `name` is held for a pickle, or None.

    `stream` is at its start, seekable, and is left anywhere. What `stream` raises passes through; its bytes raise
    nothing.
    """
    suffix = "." + name.rpartition(".")[2].lower() if "." in name else ""
    if suffix in SUFFIXES:
        return f"its suffix {suffix} is that of pickle formats"
    head = stream.read(_HEAD)
    if head.startswith(b"PK\x03\x04"):
        return _in_archive(head, stream)
    if head.startswith(_NPY_MAGIC):
        return "it is a NumPy array of Python objects" if _npy_holds_objects(head) else None
    return "its content is a pickle" if _is_pickle(head) else None


def _is_pickle(head: bytes) -> bool:
    # From protocol 2 on, a pickle begins with PROTO, its version, and an opcode; so does torch's old format.
    if len(head) >= 3 and head[0] == 0x80 and 2 <= head[1] <= 5:
        return head[2] in _OPCODES
    # Protocols 0 and 1 have no magic. Text that happens to parse as opcodes doesn't also call something and stop.
    calls = False
    try:
        for opcode, _, _ in pickletools.genops(io.BytesIO(head)):
            calls = calls or opcode.name in _CALLS
    except Exception:  # noqa: BLE001  # whatever a disassembler of arbitrary bytes raises: then it is no pickle
        return False
    return calls


def _in_archive(head: bytes, stream: BinaryIO) -> str | None:
    """Torch's archives hold ``…/data.pkl``; NumPy's may hold arrays of objects."""
    try:
        with zipfile.ZipFile(stream) as archive:
            names = archive.namelist()
            if any(name.endswith(".pkl") for name in names):
                return "it is an archive with a pickle inside"
            for name in names:
                if name.endswith(".npy"):
                    with archive.open(name) as member:
                        if _npy_holds_objects(member.read(_NPY_HEADER_MAX)):
                            return "it is an archive with a NumPy array of Python objects inside"
            return None
    except Exception:  # noqa: BLE001  # zipfile raises a dozen types on broken archives
        # Another reader may find its way through what ours calls broken.
        stream.seek(0, io.SEEK_END)
        stream.seek(max(0, stream.tell() - _HEAD))
        return "it is a broken archive that names a pickle" if b".pkl" in head + stream.read(_HEAD) else None


def _npy_holds_objects(head: bytes) -> bool:
    if not head.startswith(_NPY_MAGIC) or len(head) < 12:
        return False
    wide = head[6] >= 2
    size = int.from_bytes(head[8:12] if wide else head[8:10], "little")
    return _NPY_OBJECT.search(head[8 : 12 + min(size, _NPY_HEADER_MAX)]) is not None
