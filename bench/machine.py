"""The machine that a run was made on, as lines for the page."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

from bench.reader import Reader


def describe(work: Path, readers: list[type[Reader]]) -> dict[str, str]:
    """What a reader of the figures needs to know; no host name and no path."""
    cores = len(os.sched_getaffinity(0))
    return {
        "date": time.strftime("%Y-%m-%d"),
        "processor": f"{_processor()}, {cores} cores{_caches()}",
        "memory": f"{_meminfo('MemTotal') / 2**30:.0f} GiB",
        "kernel": f"{platform.system()} {platform.release()}, transparent huge pages {_huge_pages()}",
        "file system": _file_system(work),
        "Python": interpreter(),
        "load before the run": f"{os.getloadavg()[0]:.2f} (one minute)",
        "versions": ", ".join(_versions(readers)),
    }


def interpreter() -> str:
    """The version of Python, and what of its build makes the same code cost up to a fifth more or less."""
    # What Debian's says of itself is how its shared library was configured, and not the program.
    if sys.base_prefix == "/usr":
        build = "the operating system's build"
    else:
        asked = str(sysconfig.get_config_var("CONFIG_ARGS"))
        build = f"built {'with' if '--enable-optimizations' in asked else 'without'} --enable-optimizations"
    shared = "libpython" in Path("/proc/self/maps").read_text()
    return f"{platform.python_version()} ({build}, {'in a shared library' if shared else 'no shared library'})"


def _processor() -> str:
    found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return found.group(1) if found else platform.machine()


def _caches() -> str:
    """The second and third level of the first core."""
    caches = sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"))
    levels = [((cache / "level").read_text().strip(), (cache / "size").read_text().strip()) for cache in caches]
    sizes = [f"L{level} {size}" for level, size in levels if level in {"2", "3"}]
    return f" ({', '.join(sizes)})" if sizes else ""


def _meminfo(key: str) -> int:
    found = re.search(rf"^{key}:\s*(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE)
    return int(found.group(1)) * 1024 if found else 0


def _huge_pages() -> str:
    path = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    found = re.search(r"\[(\w+)\]", path.read_text()) if path.exists() else None
    return found.group(1) if found else "unknown"


def _file_system(folder: Path) -> str:
    told = subprocess.run(["stat", "-f", "-c", "%T", folder], capture_output=True, text=True, check=False)
    return told.stdout.strip() or "unknown"


def _versions(readers: list[type[Reader]]) -> list[str]:
    packages = {"torch", "numpy", "cryptography", "blake3"} | {reader.package for reader in readers if reader.package}
    lines = []
    for package in sorted(packages):
        try:
            lines.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            if package == "strongroom":
                lines.append("strongroom from this tree")
    if any(reader.name == "age" for reader in readers):
        told = subprocess.run(["age", "--version"], capture_output=True, text=True, check=False)
        lines.append(f"age {told.stdout.strip().lstrip('v')}")
    return lines
