"""Text to tokens and back.

A version's tokenizer and chat template came with it, and a template is a program. What callers' text and messages go
through runs in a process of its own (`strongroom.vault.tokenizing`): no network, no files, bounded memory; it is ended
when one request takes longer than it may. Tokens become text in this process: a decoder only joins pieces.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from strongroom.core.limits import MIB
from strongroom.errors import BackendError, LimitExceeded, UsageError

if TYPE_CHECKING:
    from strongroom.load.weights import Weights

_BOOTSTRAP = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from strongroom.vault.tokenizing import main; main(*map(int, sys.argv[2:]))"
)
_START, _PATIENCE = 60.0, 5.0  # seconds until it is ready, and for one request
_CPU = 3600  # seconds of the processor in a process's life: then there is another
_ANSWER = 64 * MIB
_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")


class Prompts:
    """Makes tokens of text and of messages, in a child process that is started when it is needed. `patience`: seconds
    for one request."""

    def __init__(
        self, tokenizer: str, template: Any, special: Mapping[str, Any], *, patience: float = _PATIENCE
    ) -> None:
        self._patience = patience
        self._given = {"tokenizer": tokenizer, "template": template, "special": dict(special)}
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        self._ended = False

    @classmethod
    def of(cls, weights: Weights) -> Prompts | None:
        """Those of a version; None if it has no tokenizer.json."""
        names = weights.files()
        if "tokenizer.json" not in names:
            return None
        settings: dict[str, Any] = {}
        if "tokenizer_config.json" in names:
            with contextlib.suppress(ValueError, RecursionError):
                found = json.loads(weights.file("tokenizer_config.json"))
                settings = found if isinstance(found, dict) else {}
        special = {
            name: value["content"] if isinstance(value, dict) and isinstance(value.get("content"), str) else value
            for name in _SPECIAL
            if isinstance(value := settings.get(name), str | dict)
        }
        template = settings.get("chat_template")
        if "chat_template.jinja" in names:
            template = bytes(weights.file("chat_template.jinja")).decode("utf-8", "replace")
        return cls(bytes(weights.file("tokenizer.json")).decode("utf-8", "replace"), template, special)

    @property
    def templated(self) -> bool:
        """Whether messages can be made a prompt."""
        return bool(self._given["template"])

    def text(self, texts: Sequence[str], *, special: bool = True) -> list[list[int]]:
        """The tokens of each text; `special`: with those that the tokenizer puts around a prompt."""
        if special:
            return [first for first, _ in self._asked([[[], each, None] for each in texts])]
        return [second for _, second in self._asked([[[], None, each] for each in texts])]

    def chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """The tokens of a conversation whose next words are the assistant's. UsageError ``infer.no_template``."""
        if not self.templated:
            raise UsageError("infer.no_template", "this version has no chat template", hint="/v1/completions")
        first: list[int] = self._asked([[list(messages), None, None]])[0][0]
        return first

    def close(self) -> None:
        with self._lock:
            self._ended = True
            self._kill()

    def _asked(self, asked: list[list[Any]]) -> list[list[Any]]:
        with self._lock:
            if self._ended:
                raise BackendError("infer.ended", "this server is being stopped")
            fresh = self._process is None or self._process.poll() is not None
            if fresh:
                self._start()
            try:
                answer = self._exchange(asked, self._patience)
            except BrokenPipeError:
                # It had used up its time of the processor, over many requests; a fresh one has not.
                if fresh:
                    raise self._stopped() from None
                self._start()
                try:
                    answer = self._exchange(asked, self._patience)
                except BrokenPipeError:
                    raise self._stopped() from None
        if "tokens" in answer:
            found: list[list[Any]] = answer["tokens"]
            return found
        self._kill()  # it ends after an error
        raise UsageError("infer.prompt", str(answer.get("message", "no tokens"))[:300])

    def _start(self) -> None:
        self._kill()
        paths = [path for path in sys.path if Path(path).is_absolute()]
        memory = 1024 * MIB + 64 * len(self._given["tokenizer"])
        self._process = subprocess.Popen(
            [*(sys.executable, "-I", "-B", "-c", _BOOTSTRAP, json.dumps(paths)), str(memory), str(_CPU)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={
                **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS"), "1"),
                "TOKENIZERS_PARALLELISM": "false",
                "HF_HUB_OFFLINE": "1",
                "LANG": "C.UTF-8",
            },
            cwd="/",
        )
        try:
            answer = self._exchange(self._given, _START)
        except BrokenPipeError:
            raise self._stopped() from None
        if "ready" not in answer:
            self._kill()
            raise UsageError("infer.tokenizer", str(answer.get("message", "the tokenizer can't be read"))[:300])

    def _exchange(self, value: Any, patience: float) -> dict[str, Any]:
        """One line there, one back; BrokenPipeError if it has ended, LimitExceeded ``infer.prompt`` if it takes too
        long: then it is ended."""
        process = self._process
        assert process is not None  # noqa: S101 - every caller has started it
        stdin: IO[bytes] = process.stdin  # type: ignore[assignment]
        stdout: IO[bytes] = process.stdout  # type: ignore[assignment]
        stdin.write(json.dumps(value).encode() + b"\n")
        stdin.flush()
        pending, until = bytearray(), time.monotonic() + patience
        while not pending.endswith(b"\n"):
            if time.monotonic() > until or len(pending) > _ANSWER:
                self._kill()
                raise LimitExceeded("infer.prompt", f"making tokens of this takes longer than {patience:.0f} s")
            if select.select([stdout], [], [], 0.1)[0]:
                piece = os.read(stdout.fileno(), MIB)
                if not piece:
                    raise BrokenPipeError
                pending += piece
        found: dict[str, Any] = json.loads(pending)
        return found

    def _stopped(self) -> LimitExceeded:
        self._kill()
        return LimitExceeded("infer.prompt", "making tokens of this took more memory or time than it may")

    def _kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            with contextlib.suppress(BrokenPipeError):
                self._process.communicate()
            self._process = None


class Spelling:
    """How tokens are written."""

    def __init__(self, tokenizer: Any, words: int) -> None:
        self._tokenizer, self._words = tokenizer, words
        backend = getattr(tokenizer, "backend_tokenizer", None)
        # Past transformers' own layer, which takes longer than a small model takes for the token.
        self._decode = backend.decode if backend is not None else getattr(tokenizer, "decode", None)
        self._alone: dict[int, str] = {}
        self._special = frozenset(getattr(tokenizer, "all_special_ids", ()) if tokenizer is not None else ())
        self._numbered: list[str] | None = None

    def text(self, tokens: Sequence[int]) -> str:
        """Their text together, without control tokens; each as ``<N>`` where the version has no tokenizer."""
        if self._decode is None:
            return "".join(f"<{token}>" for token in tokens)
        kept = [token for token in tokens if token not in self._special]
        if len(kept) <= 1:
            return self.word(kept[0]) if kept else ""
        found: str = self._decode(kept, skip_special_tokens=False)
        return found

    def word(self, token: int) -> str:
        """One token, control tokens included."""
        if self._decode is None:
            return f"<{token}>"
        found = self._alone.get(token)
        if found is None:
            found = self._alone[token] = self._decode([token], skip_special_tokens=False)
        return found

    def numbered(self) -> list[str]:
        """``token_id:N`` for all of them: two tokens can have one text."""
        if self._numbered is None:
            self._numbered = [f"token_id:{number}" for number in range(self._words)]
        return self._numbered

    def stops(self) -> frozenset[int]:
        """What ends an answer, as far as the tokenizer says."""
        found = getattr(self._tokenizer, "eos_token_id", None)
        return frozenset() if found is None else frozenset((found,))


class Growing:
    """The text of an answer as its tokens come: what is given out is never taken back. `stops`: texts that end it."""

    def __init__(self, spelling: Spelling, stops: Sequence[str] = ()) -> None:
        self._spelling, self._stops = spelling, [stop for stop in stops if stop]
        self._tokens: list[int] = []
        self._from = self._read = 0  # a decoder looks back a few tokens, not to the beginning
        self._before = ""
        self._held = ""
        self.stopped = False

    def add(self, token: int, *, last: bool = False) -> str:
        """What can be given out now that `token` has come (-1: none)."""
        if token >= 0:
            self._tokens.append(token)
        now = self._spelling.text(self._tokens[self._from :])
        if last or not now.endswith("\ufffd"):  # else the rest of a character is to come
            self._held += now[len(self._before) :]
            self._from, self._read = self._read, len(self._tokens)
            self._before = "" if last else self._spelling.text(self._tokens[self._from : self._read])
        for stop in self._stops:
            at = self._held.find(stop)
            if at >= 0:
                self._held, self.stopped = self._held[:at], True
        if self.stopped or last:
            given, self._held = self._held, ""
            return given
        keep = max((_begins(self._held, stop) for stop in self._stops), default=0)
        cut = len(self._held) - keep
        given, self._held = self._held[:cut], self._held[cut:]
        return given


def _begins(text: str, stop: str) -> int:
    """How many characters at the end of `text` could become `stop`."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)
