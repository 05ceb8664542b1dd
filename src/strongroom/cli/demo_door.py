"""The demo's chapter about the gateway: everybody else gets inference, and nothing else."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from strongroom.cli.demo_infer import QUESTION
from strongroom.cli.demo_leak import LeakSteps
from strongroom.cli.demo_stage import ANA, LIA, broken
from strongroom.cli.output import counted, number, seconds
from strongroom.errors import BackendError

_STARTS = 180.0  # seconds in which a server has to answer
_UP_TO = 600  # the largest hidden size that the thief looks for
_HIDDEN = 24  # tokens in which a hostile server hides a bit each


@dataclass(frozen=True)
class _Door:
    """An inference server and a gateway before it, by their URLs, and the secrets to both."""

    bare: str
    gateway: str
    channel: str
    key: str


class DoorSteps(LeakSteps):
    """Lia, who has leaked, may still ask questions."""

    _door: _Door
    _servers: ExitStack

    def served(self) -> dict[str, Any]:
        """`infer` and `gateway` start, and the official client asks."""
        self._lease(ANA)
        folder = self.folder.parent
        channel = secrets.token_hex(32)
        (folder / "channel").write_text(channel)
        (folder / "channel").chmod(0o600)
        inside, door = _free_port(), _free_port()
        self._typed(f"infer {self.ref} --channel channel --as {ANA}")
        begun = time.perf_counter()
        self._start("infer", self.ref, "--listen", f"127.0.0.1:{inside}", "--channel", str(folder / "channel"), as_=ANA)
        _until_ready(f"http://127.0.0.1:{inside}/readyz")
        self._typed(f"gateway --upstream http://127.0.0.1:{inside} --channel channel")
        upstream = ("--upstream", f"http://127.0.0.1:{inside}", "--channel", str(folder / "channel"))
        self._start("gateway", "--listen", f"127.0.0.1:{door}", *upstream)
        _until_ready(f"http://127.0.0.1:{door}/readyz")
        took = time.perf_counter() - begun
        self._typed(f"apikey new --as {LIA}")
        with self._room(LIA) as room:
            key = room.apikeys.new()["key"]
        self._door = _Door(f"http://127.0.0.1:{inside}/v1", f"http://127.0.0.1:{door}/v1", channel, key)
        answer, usage = self._asked(QUESTION[self.original.kind])
        self._tell(f"Ana's server loaded the weights from the room ({seconds(took)} for both); no file was written.")
        self._tell(f"The official openai client, with Lia's key: {QUESTION[self.original.kind]}")
        self._tell(f"{answer}   ({counted(usage['completion_tokens'], 'token')})")
        return {"seconds": round(took, 3), "answer": answer, "usage": usage}

    def stolen(self) -> dict[str, Any]:
        """The last layer, through both doors."""
        self._tell(
            "A thief asks for log-probabilities: of enough prompts they span the model's last layer, as wide as the "
            "hidden size. First from Ana's server itself, which is meant for nobody but the gateway:"
        )
        config = json.loads((self.original.folder / "config.json").read_text(encoding="utf-8"))
        bare = self._theft(self._door.bare, config["vocab_size"], channel=self._door.channel)
        if bare["found"] != config["hidden_size"]:
            raise broken("the attack does not work on a bare server, so stopping it would show nothing", bare)
        self._tell(
            f"Hidden size {bare['found']}, with a gap of e^{bare['gap']:.0f} behind it: right. "
            f"{number(bare['requests'])} requests, {seconds(bare['seconds'])}."
        )
        door = self._theft(self._door.gateway, config["vocab_size"], key=self._door.key)
        if door["found"] is not None or door["tokens"]:
            raise broken("the gateway gave something away", door)
        codes = ", ".join(sorted(door["codes"]))
        self._tell(f"Then through the gateway: {counted(door['refused'], 'request')} refused ({codes}), nothing found.")
        return {"bare": bare, "gateway": door}

    def budget(self) -> dict[str, Any]:
        """What has left, against the weights."""
        before = self._charged()
        self._asked("Tell me about the history of locks.", 64)
        moved = self._charged() - before
        self._typed(f"budget {self.ref}")
        with self._room() as room:
            found = room.budget(self.ref)
        mine = next(
            each
            for each in found["budgets"]
            if (each["scope"], each["window"], each["who"]) == ("identity", "day", LIA)
        )
        if not 0 < moved < mine["limit"]:
            raise broken("an answer was not charged", {"moved": moved})
        self._tell(
            f"Lia has had {number(before + moved)} bits, {number(moved)} of them just now; {number(mine['limit'])} a "
            f"day are allowed. The smallest thing worth stealing here is {number(found['effective_bits'])} bits: these "
            "weights at four bits each, compressed 16-fold."
        )
        return {"used": before + moved, "moved": moved, "limit": mine["limit"], "weights": found["effective_bits"]}

    def covert(self) -> dict[str, Any]:
        """An honest answer and one with bits hidden in it are run again."""
        prompt, honest = self._honest()
        first = self._verified(prompt, honest)
        if first["alarm"]:
            raise broken("an honest answer did not verify", first)
        self._tell(
            f"Who runs the inference server has the weights, and could hide them in its answers. So the gateway draws "
            f"the seeds, and answers are run again: {first['good']} of {counted(first['tokens'], 'token')} of an "
            "honest one are just those that these weights and this seed give."
        )
        then = self._verified(prompt, self._hiding(prompt))
        wrong = then["dangerous"] + then["suspicious"] - first["suspicious"]
        if not then["alarm"]:
            raise broken("bits were hidden in an answer, and nobody saw it", then)
        self._tell(
            f"A server that hides a bit in each token, by taking the second best for a one: {wrong} of "
            f"{counted(then['tokens'] - first['tokens'], 'token')} are not. Alarm."
        )
        self._servers.close()
        return {"honest": first, "hiding": then}

    # -- inside --------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def serving(self) -> Iterator[None]:
        """Servers that are started in this block end with it."""
        with ExitStack() as self._servers:
            yield

    def _start(self, *arguments: str, as_: str | None = None) -> None:
        line = [sys.executable, "-m", "strongroom.cli", "--room", str(self.folder), "--quiet"]
        line += ["--as", as_] if as_ else []
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
        log = (self.folder.parent / f"{arguments[0]}.log").open("wb")
        self._servers.callback(log.close)
        process = subprocess.Popen([*line, *arguments], stdout=log, stderr=log, env=environment)
        self._servers.callback(_ended, process)

    def _asked(self, question: str, most: int = 24) -> tuple[str, dict[str, int]]:
        import openai

        client = openai.OpenAI(base_url=self._door.gateway, api_key=self._door.key, max_retries=0)
        with client:
            found = client.chat.completions.create(
                model=self.ref, messages=[{"role": "user", "content": question}], max_tokens=most, temperature=0
            )
        usage = found.usage
        if usage is None:
            raise broken("an answer without its usage", {})
        tokens = {"prompt_tokens": usage.prompt_tokens, "completion_tokens": usage.completion_tokens}
        return (found.choices[0].message.content or "").strip(), tokens

    def _theft(self, url: str, words: int, *, key: str = "", channel: str = "") -> dict[str, Any]:
        line = [
            sys.executable,
            "-m",
            "strongroom.redteam",
            url,
            self.ref,
            "--words",
            str(words),
            "--up-to",
            str(_UP_TO),
        ]
        secret = {"STRONGROOM_TARGET_KEY": key, "STRONGROOM_TARGET_CHANNEL": channel}
        done = subprocess.run(line, capture_output=True, env=os.environ | secret, timeout=600, check=False)
        if done.returncode:
            raise BackendError("demo.child", f"the attack ended with {done.stderr.decode(errors='replace')[-300:]}")
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    def _charged(self) -> int:
        """Bits that Lia has had, by the gateway's records, which are on disk within a second."""
        time.sleep(1.2)
        lines = [
            json.loads(line)
            for path in (self.folder / "inference").glob("*.jsonl")
            for line in path.read_text(encoding="utf-8").splitlines()
        ]
        return sum(line["bits"] for line in lines if line["by"] == LIA)

    def _private(self, route: str, body: dict[str, Any]) -> dict[str, Any]:
        request = urllib.request.Request(  # noqa: S310 - as above
            self._door.bare + route,
            json.dumps({"model": self.ref, **body}).encode(),
            {"content-type": "application/json", "strongroom-channel": self._door.channel},
        )
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:  # noqa: S310 - a server of the demo's own
                found: dict[str, Any] = json.loads(answer.read())
        except urllib.error.HTTPError as error:
            with error:
                raise BackendError("demo.child", f"the server said {error.read().decode()[:300]}") from None
        return found

    def _honest(self) -> tuple[dict[str, Any], list[int]]:
        """A request, its prompt as numbers of tokens, and what the server answers."""
        asked = {"max_tokens": _HIDDEN, "temperature": 1, "strongroom": {"seed": 7, "record": True}}
        first = self._private("/completions", {**asked, "prompt": "A good lock", "return_token_ids": True})
        choice = first["choices"][0]
        return {**asked, "prompt": choice["prompt_token_ids"]}, choice["strongroom"]["tokens"]

    def _hiding(self, asked: dict[str, Any]) -> list[int]:
        """What a server answers that takes the second best token wherever the bit to hide is a one."""
        tokens, bits = list(asked["prompt"]), secrets.randbits(_HIDDEN)
        step = {"max_tokens": 1, "temperature": 0, "logprobs": 2, "return_tokens_as_token_ids": True}
        for place in range(_HIDDEN):
            choice = self._private("/completions", {**step, "prompt": tokens})["choices"][0]
            likely = choice["logprobs"]["top_logprobs"][0]
            best = sorted(likely, key=lambda name: -likely[name])
            tokens.append(int(best[bits >> place & 1].removeprefix("token_id:")))
        return tokens[-_HIDDEN:]

    def _verified(self, asked: dict[str, Any], tokens: list[int]) -> dict[str, Any]:
        return self._private("/verify", {"route": "completions", "request": asked, "tokens": tokens})


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


def _until_ready(url: str) -> None:
    end = time.monotonic() + _STARTS
    while time.monotonic() < end:
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5) as answer:  # noqa: S310
            if answer.status == 200:
                return
        time.sleep(0.1)
    raise BackendError("demo.child", f"{url} did not answer within {_STARTS:g} s")


def _ended(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
