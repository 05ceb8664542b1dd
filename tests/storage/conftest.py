"""Real faults of disks: file systems of a test's own, in a mount namespace of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap

import pytest


@pytest.fixture
def in_namespace():
    """A function that runs a script where it may mount file systems, and returns the JSON that it prints."""
    return _run


def _run(script: str, *arguments: str) -> dict[str, object]:
    """Run `script` as a program in a mount namespace of its own, where it may mount file systems; its JSON answer."""
    unshare = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--user", "--map-root-user", "--mount"]
    tools = "import json, subprocess, sys, os\nfrom pathlib import Path\n"
    try:
        allowed = subprocess.run([*unshare, "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True, check=False)
    except FileNotFoundError:
        pytest.skip("no unshare program; the other tests of a full or read-only disk do without")
    if allowed.returncode:
        pytest.skip("this machine permits no mounts; the other tests of a full or read-only disk do without")
    done = subprocess.run(
        [*unshare, sys.executable, "-c", tools + textwrap.dedent(script), *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
