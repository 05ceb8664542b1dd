"""The bucket of each address, on a clock of its own."""

from __future__ import annotations

import asyncio

from strongroom.server.guard import Guard


async def app(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": [(b"cache-control", b"public")]})
    await send({"type": "http.response.body", "body": b""})


def ask(guard, address="192.0.2.1"):
    sent = []

    async def send(message):
        sent.append(message)

    asyncio.run(guard({"type": "http", "client": (address, 5)}, None, send))
    return sent[0]["status"], dict(sent[0]["headers"])


def test_a_burst_is_let_through_and_then_a_rate():
    now = [0.0]
    guard = Guard(app, rate=2, burst=5, clock=lambda: now[0])
    assert [ask(guard)[0] for _ in range(7)] == [200] * 5 + [429] * 2
    assert ask(guard, "192.0.2.2")[0] == 200
    now[0] = 1.0
    assert [ask(guard)[0] for _ in range(3)] == [200, 200, 429]
    now[0] = 1000.0
    assert [ask(guard)[0] for _ in range(6)] == [200] * 5 + [429]


def test_an_application_can_not_weaken_the_headers():
    _, headers = ask(Guard(app))
    assert headers[b"cache-control"] == b"no-store"


def test_many_addresses_take_bounded_memory(monkeypatch):
    monkeypatch.setattr("strongroom.server.guard._ADDRESSES", 10)
    guard = Guard(app)
    for number in range(100):
        ask(guard, f"192.0.2.{number}")
    assert len(guard._buckets) == 10


def test_addresses_of_one_customer_are_one():
    guard = Guard(app, rate=0.001, burst=3)
    assert [ask(guard, f"2001:db8:1:2::{number}")[0] for number in range(4)] == [200] * 3 + [429]
    assert ask(guard, "2001:db8:1:3::1")[0] == 200
    assert [ask(guard, "::ffff:192.0.2.9")[0] for _ in range(3)] == [200] * 3
    assert ask(guard, "192.0.2.9")[0] == 429
    assert ask(guard, "not an address")[0] == 200
