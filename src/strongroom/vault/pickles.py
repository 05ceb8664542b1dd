"""Which files are pickles, by name and by content, without loading any of them.

A pickle is a program that its reader runs. A room that kept one would hand it to every holder with the room's authority
behind it. Scanners that judge what a pickle does have all been bypassed; so none is let in, whatever it does.
"""

from __future__ import annotations

import bz2
import io
import lzma
import pickletools
import re
import tarfile
import zipfile
import zlib
from typing import BinaryIO

SUFFIXES = frozenset(
    {".bin", ".pt", ".pth", ".pt2", ".ptl", ".ckpt", ".pkl", ".pickle", ".joblib", ".dill", ".cloudpickle", ".mar"}
)
_HEAD = 1 << 20
_NPY_MAGIC = b"\x93NUMPY"
_NPY_HEADER_MAX = 1 << 16
# An object in a dtype description: '|O', 'O', alone or as the type of a field.
_NPY_OBJECT = re.compile(rb"""['"][|<>=]?O\d*['"]""")
# Opcodes that look up what the pickle names, and those that call it: without one of them a pickle is plain data.
_LOOKUPS = frozenset({"GLOBAL", "STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4"})
_CALLS = frozenset({"INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "REDUCE", "BUILD"})
_OPCODES = {ord(opcode.code): opcode for opcode in pickletools.opcodes}
_OPCODES_MAX = 1 << 16  # no text gets through so many
_LINE_MAX = 8192  # of an argument that is a line; Python reads no number of more than 4300 digits
_NUMBER = re.compile(rb"\s*[+-]?(?:[0-9.]|(?i:inf|nan))")  # how one begins
_NAME = re.compile(rb"[^\s\x00-\x1f]+")
# In what is cut off, a length beyond the cut is believed up to here; four letters of a text say 512 MiB and more.
_CUT_LENGTH_MAX = 256 << 20
_NESTING = 3  # a pickle in a tar in a gzip
_SINGLE = 1024
_TAR_BLOCK = 512
_TAR_EMPTY = frozenset(  # no bytes follow these, whatever size they say
    {tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE}
)


def pickle_evidence(name: str, stream: BinaryIO) -> str | None:
    """Why the file `name` is held for a pickle, or None.

    `stream` is at its start, seekable, and is left anywhere. What `stream` raises passes through; its bytes raise
    nothing.
    """
    suffix = "." + name.rpartition(".")[2].lower() if "." in name else ""
    if suffix in SUFFIXES:
        return f"its suffix {suffix} is that of pickle formats"
    return _in_content(stream, _NESTING, whole=True)


def _in_content(stream: BinaryIO, nesting: int, *, whole: bool) -> str | None:
    """As `pickle_evidence`, by content alone; `stream` holds the `whole` of it, or only how it begins."""
    head = stream.read(_HEAD)
    if head.startswith(b"PK\x03\x04"):
        return _in_archive(head, stream)
    if head.startswith(_NPY_MAGIC):
        return "it is a NumPy array of Python objects" if _npy_holds_objects(head) else None
    # From protocol 2 on, a pickle begins with PROTO, its version, and an opcode; so does torch's old format.
    if len(head) >= 3 and head[0] == 0x80 and 2 <= head[1] <= 5 and head[2] in _OPCODES:
        return "its content is a pickle"
    if _is_pickle(stream, whole=whole):
        return "its content is a pickle"
    if nesting and (content := _decompressed(head)):
        # joblib and pandas look through the compression by themselves.
        cut = len(content) >= _HEAD or len(head) >= _HEAD
        if _in_content(io.BytesIO(content), nesting - 1, whole=not cut):
            return "it is a compressed pickle"
    elif nesting and _is_tar_header(head):
        return _in_tar(stream, nesting - 1)
    return None


def _is_pickle(stream: BinaryIO, *, whole: bool) -> bool:
    """Whether unpickling `stream` would call something, or end having looked it up.

    Protocols 0 and 1 have no magic, so what a pickle does is followed, all but its values. What is called counts at
    once: an unpickler has run it by the time that it stumbles over what follows. Text that happens to begin as opcodes
    soon takes from the stack what is not there, or names no module.
    """
    size = stream.seek(0, io.SEEK_END)
    stream.seek(0)
    frames = [0]  # how many values lie on the stack above each mark
    looked_up = False
    for _ in range(_OPCODES_MAX):
        code = stream.read(1)
        if not code:
            return not whole
        opcode = _OPCODES.get(code[0])
        if opcode is None:
            return False
        left = size - stream.tell()
        if (length := _argument(stream, opcode, left)) is None:
            return False
        if length > left:
            return not whole and length <= _CUT_LENGTH_MAX
        if not _moves(frames, opcode):
            return False
        looked_up = looked_up or opcode.name in _LOOKUPS
        if looked_up and opcode.name in _CALLS | {"STOP"}:
            return True
        if opcode.name == "STOP":
            frames = [0]  # another pickle may follow
    return True


def _argument(stream: BinaryIO, opcode: pickletools.OpcodeInfo, left: int) -> int | None:
    """Pass the argument of `opcode`, of `left` bytes at most: its length, more than `left` if it is cut off there.

    None if no unpickler takes it.
    """
    if opcode.arg is None:
        return 0
    kind = opcode.arg.n
    if kind == pickletools.UP_TO_NEWLINE:
        return _lines(stream, opcode, left)
    if kind >= 0:
        value = stream.read(kind)
        return None if opcode.name == "PROTO" and value > b"\x05" else kind
    width = {pickletools.TAKEN_FROM_ARGUMENT1: 1, pickletools.TAKEN_FROM_ARGUMENT8U: 8}.get(kind, 4)
    value = stream.read(width)
    length = int.from_bytes(value, "little", signed=kind == pickletools.TAKEN_FROM_ARGUMENT4)
    if len(value) < width:
        return left + 1
    if length < 0:
        return None
    if width + length <= left:
        stream.seek(length, io.SEEK_CUR)
    return width + length


def _lines(stream: BinaryIO, opcode: pickletools.OpcodeInfo, left: int) -> int | None:
    length = 0
    for _ in range(2 if opcode.name in ("GLOBAL", "INST") else 1):
        line = part = stream.readline(_LINE_MAX)
        length += len(part)
        if len(line) < _LINE_MAX and not line.endswith(b"\n"):
            return left + 1
        if opcode.name in ("GLOBAL", "INST") and not _NAME.fullmatch(line[:-1]):
            return None
        if opcode.name in ("INT", "LONG", "FLOAT", "GET", "PUT") and not _NUMBER.match(line):
            return None
        if opcode.name == "STRING" and line[:1] not in (b"'", b'"'):
            return None
        while part and not part.endswith(b"\n"):
            part = stream.readline(_HEAD)
            length += len(part)
        if not part:
            return left + 1
    return length


def _moves(frames: list[int], opcode: pickletools.OpcodeInfo) -> bool:
    """Do to the stack what `opcode` does; False where it would take what is not there."""
    before, name = opcode.stack_before, opcode.name
    if name == "MARK":
        frames.append(0)
        return True
    if name == "POP" and not frames[-1] and len(frames) > 1:
        frames.pop()
        return True
    needed = len(before)
    if pickletools.markobject in before:
        if len(frames) == 1 or (name == "OBJ" and not frames[-1]):
            return False
        frames.pop()
        needed = before.index(pickletools.markobject)
    if frames[-1] < needed:
        return False
    frames[-1] += len(opcode.stack_after) - needed
    return True


def _decompressed(head: bytes) -> bytes:
    """How the content of the compressed file that begins with `head` begins; nothing if it is none."""
    content = b""
    while len(content) < _HEAD:
        decompressor: zlib._Decompress | bz2.BZ2Decompressor | lzma.LZMADecompressor
        if head[:2] == b"\x1f\x8b" or (len(head) > 2 and head[0] & 15 == 8 and (head[0] << 8 | head[1]) % 31 == 0):
            decompressor = zlib.decompressobj(32 + zlib.MAX_WBITS)
        elif head.startswith(b"BZh"):
            decompressor = bz2.BZ2Decompressor()
        elif head.startswith((b"\xfd7zXZ\0", b"]\0\0")):
            decompressor = lzma.LZMADecompressor(memlimit=128 << 20)
        else:
            break
        # Piece by piece, single bytes at first: what came before a broken end counts, as readers may have read it by
        # then, and no piece unfolds to more than some megabytes.
        try:
            end = 0
            while end < len(head):
                begin, end = end, end + (1 if end < _SINGLE else 1024)
                content += decompressor.decompress(head[begin:end])
                if decompressor.eof or len(content) >= _HEAD:
                    break
        except (zlib.error, lzma.LZMAError, OSError, EOFError, ValueError):
            break
        if not decompressor.eof:
            break
        head = decompressor.unused_data + head[end:]  # readers join what is compressed one after another
    return content[:_HEAD]


def _is_tar_header(block: bytes) -> bool:
    try:
        tarfile.TarInfo.frombuf(block[:_TAR_BLOCK], "utf-8", "surrogateescape")
    except (tarfile.HeaderError, ValueError):
        return False
    return True


def _in_tar(stream: BinaryIO, nesting: int) -> str | None:
    """Torch's oldest format is a tar that holds a ``pickle``; NeMo's holds a ``.ckpt``."""
    at, end = 0, stream.seek(0, io.SEEK_END)
    while at + _TAR_BLOCK <= end:
        stream.seek(at)
        try:
            member = tarfile.TarInfo.frombuf(stream.read(_TAR_BLOCK), "utf-8", "surrogateescape")
        except (tarfile.HeaderError, ValueError):
            return None
        at += _TAR_BLOCK
        begin = stream.read(min(max(member.size, 0), _HEAD))
        if "." + member.name.rpartition(".")[2].lower() in SUFFIXES and "." in member.name:
            return "it is an archive with a pickle inside"
        if _in_content(io.BytesIO(begin), nesting, whole=member.size <= len(begin)):
            return "it is an archive with a pickle inside"
        if member.type in (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE) and b"size=" in begin:
            return "it is an archive that moves its members away from where their headers say"
        if member.type not in _TAR_EMPTY:
            at += max(0, -(-member.size // _TAR_BLOCK) * _TAR_BLOCK)
    return None


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
