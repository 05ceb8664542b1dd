"""A door that is attacked: an OpenAI-compatible server, asked over several connections at once. What it refuses, for
whatever reason, is no answer; how much was asked is counted."""

from __future__ import annotations

import http.client
import ssl
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import orjson

from strongroom.errors import UsageError

Prompt = str | Sequence[int]
Choices = list[dict[str, Any]]
_TOGETHER = 64  # prompts in one request, where the server takes several


@dataclass
class Cost:
    """What was spent so far: requests, those of them that were refused, by which `codes`, and tokens that the server
    generated."""

    requests: int = 0
    refused: int = 0
    tokens: int = 0
    codes: Counter[str] = field(default_factory=Counter)


class Target:
    """`url` up to and with ``/v1``, `model` as requests name it, `key` an API key; `headers` go with each request."""

    def __init__(
        self,
        url: str,
        model: str,
        *,
        key: str | None = None,
        headers: Mapping[str, str] | None = None,
        connections: int = 4,
        timeout: float = 120.0,
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UsageError("redteam.url", f"{url!r} is not http://HOST:PORT/v1")
        self._scheme, self._host, self._port = parts.scheme, parts.hostname, parts.port
        self._path, self._timeout, self.model = parts.path.rstrip("/"), timeout, model
        self._headers = {"Content-Type": "application/json", **(headers or {})}
        if key is not None:
            self._headers["Authorization"] = f"Bearer {key}"
        self._local = threading.local()
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(connections, thread_name_prefix="target")
        self._opened: list[http.client.HTTPConnection] = []
        self._lists: bool | None = None  # whether it takes several prompts in one request, once that is known
        self.plain = False  # only fields that OpenAI has: who refuses others has refused nothing yet
        self.cost = Cost()

    def ask(self, route: str, fields: Mapping[str, Any]) -> dict[str, Any] | None:
        """One request; None if it is refused, or the answer is none."""
        body = orjson.dumps({"model": self.model, **fields})
        status, data = self._exchange(f"{self._path}{route}", body)
        try:
            answer = orjson.loads(data)
        except ValueError:
            answer = None
        found = answer if status == 200 and isinstance(answer, dict) else None
        usage = (found or {}).get("usage") or {}
        with self._lock:
            self.cost.requests += 1
            if found is None:
                self.cost.refused += 1
                self.cost.codes[_code(answer) or str(status)] += 1
            self.cost.tokens += int(usage.get("completion_tokens", 0) or 0)
        return found

    def complete(
        self, prompts: Sequence[Prompt], fields: Mapping[str, Any], *, together: int = _TOGETHER
    ) -> list[Choices | None]:
        """The choices of each prompt under the same `fields`, in several requests at once, of `together` prompts where
        the server takes so many; None for what is refused."""
        if not prompts:
            return []
        if self._lists is None and len(prompts) > 1:
            first = self._completed(prompts[:2], fields)
            self._lists = first[0] is not None
            if not self._lists:
                # Refused as a list, or for what it asks? One alone tells, and no more are sent in vain.
                alone = self._completed(prompts[:1], fields)
                if alone[0] is None:
                    self._lists = None
                    return [None] * len(prompts)
        size = max(1, together // int(fields.get("n", 1))) if self._lists else 1
        groups = [prompts[at : at + size] for at in range(0, len(prompts), size)]
        found = self._pool.map(lambda group: self._completed(group, fields), groups)
        return [each for group in found for each in group]

    def many(self, asked: Sequence[tuple[Sequence[Prompt], Mapping[str, Any]]]) -> list[list[Choices | None]]:
        """`complete` for several lists of prompts at once, each with its own fields, short enough for one request."""
        if self._lists is None:
            return [self.complete(prompts, fields) for prompts, fields in asked]
        if not self._lists:
            flat = [(prompt, fields) for prompts, fields in asked for prompt in prompts]
            alone = iter(list(self._pool.map(lambda each: self._completed([each[0]], each[1])[0], flat)))
            return [[next(alone) for _ in prompts] for prompts, _ in asked]
        return list(self._pool.map(lambda each: self._completed(*each), asked))

    def close(self) -> None:
        self._pool.shutdown()
        with self._lock:
            while self._opened:
                self._opened.pop().close()

    def _completed(self, prompts: Sequence[Prompt], fields: Mapping[str, Any]) -> list[Choices | None]:
        several = not isinstance(prompts[0], str) or len(prompts) > 1
        answer = self.ask("/completions", {**fields, "prompt": list(prompts) if several else prompts[0]})
        each = int(fields.get("n", 1))
        choices = (answer or {}).get("choices")
        if not isinstance(choices, list) or len(choices) != each * len(prompts):
            return [None] * len(prompts)
        ordered = sorted(choices, key=lambda choice: int(choice.get("index", 0)))
        return [ordered[at : at + each] for at in range(0, len(ordered), each)]

    def _exchange(self, path: str, body: bytes) -> tuple[int, bytes]:
        for last in (False, True):
            connection = getattr(self._local, "connection", None)
            if connection is None:
                connection = self._local.connection = self._connected()
            try:
                connection.request("POST", path, body, self._headers)
                answer = connection.getresponse()
                return answer.status, answer.read()
            except (OSError, http.client.HTTPException):
                connection.close()  # a server closes what was idle; once more, over another
                self._local.connection = None
                if last:
                    return 0, b""
        raise AssertionError("not reached")

    def _connected(self) -> http.client.HTTPConnection:
        made = http.client.HTTPConnection(self._host, self._port, timeout=self._timeout)
        if self._scheme == "https":
            context = ssl.create_default_context()
            made = http.client.HTTPSConnection(self._host, self._port, timeout=self._timeout, context=context)
        with self._lock:
            self._opened.append(made)
        return made


def _code(answer: Any) -> str:
    error = answer.get("error") if isinstance(answer, dict) else None
    return str(error.get("code") or "") if isinstance(error, dict) else ""
