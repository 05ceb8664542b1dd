"""``strongroom infer`` as a process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from loopback import free_port


class Running:
    """A server of the room in `folder`, or of the one at the URL `served`, ready to answer; `url` without a path."""

    def __init__(
        self,
        folder: Path,
        ref: str = "acme/small",
        *options: str,
        listen: str | None = None,
        served: str = "",
        as_: str = "",
    ) -> None:
        if listen is None:
            listen = f"127.0.0.1:{free_port()}"
        self.url = f"http://{listen}"
        self.log = folder.parent / f"infer-{time.monotonic_ns()}.log"
        command = [sys.executable, "-m", "strongroom.cli", "--room", served or str(folder)]
        command += [*(["--as", as_] if as_ else []), "infer", ref, "--threads", "1"]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*command, "--listen", listen, *options],
                stdout=log,
                stderr=log,
                env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            )
        if not listen.startswith("unix:"):
            self._await_ready()

    def _await_ready(self) -> None:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                if self.raw("GET", "/readyz")[0] == 200:
                    return
            except OSError:
                time.sleep(0.1)
        self.stop()
        pytest.fail(f"strongroom infer did not start:\n{self.log.read_text(errors='replace')[-3000:]}")

    def stop(self) -> None:
        self.process.kill()
        self.process.wait(30)

    def raw(self, method, path, body=None, headers=None):
        """Status and JSON of one request."""
        data = json.dumps(body).encode() if body is not None else None
        request = urllib.request.Request(self.url + path, data, headers or {}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, json.loads(answer.read())
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.loads(error.read())
