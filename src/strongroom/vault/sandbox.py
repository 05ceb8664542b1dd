"""Gives up, for the rest of this process, what reading an untrusted file does not need (Linux).

Two walls against the network, either of which is enough: a network namespace without interfaces, and a system call
filter. The filter also refuses new processes, programs, and every change to the file system; limits stop a file that
grows without end in memory or time. A process that entered cannot leave.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import resource
import signal
import struct
from collections.abc import Iterable, Mapping

_CLONE_NEWUSER, _CLONE_NEWNET = 0x10000000, 0x40000000
_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 22, 38
_SECCOMP_MODE_FILTER = 2
_ALLOW, _ERRNO, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
_LOAD, _JUMP_EQUAL, _JUMP_GREATER_EQUAL, _JUMP_SET, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_X32 = 0x40000000  # x86-64's second table of the same calls

# System call numbers that are the same on all architectures since they were introduced.
_COMMON = {
    "pidfd_send_signal": 424,
    "io_uring_setup": 425,  # does what the other calls do, unseen by the filter
    "io_uring_enter": 426,
    "io_uring_register": 427,
    "pidfd_open": 434,
    "clone3": 435,
    "openat2": 437,  # its flags are behind a pointer, where a filter cannot look
    "pidfd_getfd": 438,
    "fchmodat2": 452,
}
_X86_64 = {
    "socket": 41,
    "connect": 42,
    "accept": 43,
    "sendto": 44,
    "sendmsg": 46,
    "bind": 49,
    "listen": 50,
    "socketpair": 53,
    "clone": 56,
    "fork": 57,
    "vfork": 58,
    "execve": 59,
    "kill": 62,
    "truncate": 76,
    "rename": 82,
    "mkdir": 83,
    "rmdir": 84,
    "creat": 85,
    "link": 86,
    "unlink": 87,
    "symlink": 88,
    "chmod": 90,
    "fchmod": 91,
    "chown": 92,
    "fchown": 93,
    "lchown": 94,
    "ptrace": 101,
    "mknod": 133,
    "pivot_root": 155,
    "chroot": 161,
    "mount": 165,
    "umount2": 166,
    "init_module": 175,
    "setxattr": 188,
    "lsetxattr": 189,
    "fsetxattr": 190,
    "tkill": 200,
    "tgkill": 234,
    "add_key": 248,
    "keyctl": 250,
    "mkdirat": 258,
    "mknodat": 259,
    "fchownat": 260,
    "unlinkat": 263,
    "renameat": 264,
    "linkat": 265,
    "symlinkat": 266,
    "fchmodat": 268,
    "unshare": 272,
    "accept4": 288,
    "perf_event_open": 298,
    "sendmmsg": 307,
    "setns": 308,
    "process_vm_readv": 310,
    "process_vm_writev": 311,
    "finit_module": 313,
    "renameat2": 316,
    "memfd_create": 319,
    "bpf": 321,
    "execveat": 322,
    "userfaultfd": 323,
}
_AARCH64 = {
    "setxattr": 5,
    "lsetxattr": 6,
    "fsetxattr": 7,
    "mknodat": 33,
    "mkdirat": 34,
    "unlinkat": 35,
    "symlinkat": 36,
    "linkat": 37,
    "renameat": 38,
    "umount2": 39,
    "mount": 40,
    "pivot_root": 41,
    "truncate": 45,
    "chroot": 51,
    "fchmod": 52,
    "fchmodat": 53,
    "fchownat": 54,
    "fchown": 55,
    "unshare": 97,
    "init_module": 105,
    "ptrace": 117,
    "kill": 129,
    "tkill": 130,
    "tgkill": 131,
    "socket": 198,
    "socketpair": 199,
    "bind": 200,
    "listen": 201,
    "accept": 202,
    "connect": 203,
    "sendto": 206,
    "sendmsg": 211,
    "add_key": 217,
    "keyctl": 219,
    "clone": 220,
    "execve": 221,
    "perf_event_open": 241,
    "accept4": 242,
    "setns": 268,
    "sendmmsg": 269,
    "process_vm_readv": 270,
    "process_vm_writev": 271,
    "finit_module": 273,
    "renameat2": 276,
    "memfd_create": 279,
    "bpf": 280,
    "execveat": 281,
    "userfaultfd": 282,
}
# Machine: audit architecture, refused calls, calls that open a file (number and offset of the flags in seccomp_data).
_MACHINES: Mapping[str, tuple[int, Iterable[int], tuple[tuple[int, int], ...]]] = {
    "x86_64": (0xC000003E, (*_X86_64.values(), *_COMMON.values()), ((2, 24), (257, 32))),
    "aarch64": (0xC00000B7, (*_AARCH64.values(), *_COMMON.values()), ((56, 32),)),
}


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def die_with_parent() -> None:
    """End this process when its parent ends, however that ends."""
    _libc().prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def leave_network() -> bool:
    """Move to a network namespace without interfaces; False where that is not permitted. Call before any thread."""
    unshare = getattr(_libc(), "unshare", None)  # os.unshare came with Python 3.12
    return unshare is not None and unshare(_CLONE_NEWUSER | _CLONE_NEWNET) == 0


def filter_calls() -> bool:
    """Refuse, with EPERM, system calls that reading does not need; False where that is not possible."""
    machine = _MACHINES.get(platform.machine())
    prctl = getattr(_libc(), "prctl", None)
    if machine is None or prctl is None or struct.calcsize("P") != 8:
        return False
    program = _program(*machine, x32=platform.machine() == "x86_64")
    buffer = ctypes.create_string_buffer(program)
    # struct sock_fprog: count, padding, pointer.
    header = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(buffer)))
    if prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        return False
    return bool(prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.c_void_p(ctypes.addressof(header)), 0, 0) == 0)


def limit(*, memory: int, cpu_seconds: int) -> None:
    """At most `memory` bytes of address space beyond what is in use, no file written, no process made, no core dump."""
    with open("/proc/self/statm", encoding="ascii") as stream:  # noqa: PTH123
        in_use = int(stream.read().split()[0]) * resource.getpagesize()
    for kind, value in (
        (resource.RLIMIT_AS, in_use + memory),
        (resource.RLIMIT_CPU, cpu_seconds),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NPROC, 0),
        (resource.RLIMIT_CORE, 0),  # a core dump is plaintext weights on disk
    ):
        _, hard = resource.getrlimit(kind)
        lower = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (lower, lower))


def _program(machine: int, refused: Iterable[int], opening: tuple[tuple[int, int], ...], *, x32: bool) -> bytes:
    """The filter in classic BPF. struct seccomp_data: number 4, architecture 4, pointer 8, arguments 8 bytes each."""

    def instruction(code: int, value: int, yes: int = 0, no: int = 0) -> bytes:
        return struct.pack("<HBBI", code, yes, no, value)

    refusal = instruction(_RETURN, _ERRNO | errno.EPERM)
    # Calls of another architecture have other numbers.
    parts = [instruction(_LOAD, 4), instruction(_JUMP_EQUAL, machine, 1), instruction(_RETURN, _KILL)]
    parts.append(instruction(_LOAD, 0))
    if x32:
        parts += [instruction(_JUMP_GREATER_EQUAL, _X32, 0, 1), instruction(_RETURN, _KILL)]
    for number in refused:
        parts += [instruction(_JUMP_EQUAL, number, 0, 1), refusal]
    for number, flags in opening:
        parts += [
            instruction(_JUMP_EQUAL, number, 0, 4),
            instruction(_LOAD, flags),
            instruction(_JUMP_SET, _WRITES, 0, 1),
            refusal,
            instruction(_RETURN, _ALLOW),
        ]
    return b"".join([*parts, instruction(_RETURN, _ALLOW)])
