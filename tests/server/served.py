"""A room served by a real process over TLS, and clients of it on machines of their own."""

from __future__ import annotations

import json
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from cli.desk import command, environment
from loopback import free_port
from strongroom.client import Room
from strongroom.crypto.identity import Identities
from strongroom.formats.card import Card
from vault.rooms import write_model

REF = "acme/tiny@1"
PEOPLE = {"user/ana": "researcher", "user/ben": "officer", "user/eva": "executive", "user/ada": "auditor"}


class Served:
    """A team room on `db`, put into by its owner on the host, and served by `strongroom serve` there."""

    def __init__(
        self, folder: Path, db: str = "sqlite:room.db", *, operators: tuple[str, ...] = (), **init: str
    ) -> None:
        self.folder, self.home = folder / "room", folder / "home"
        room, _ = Room.init(self.folder, owner="user/olga", db=db, **init)
        with room:
            room.put(write_model(folder / "model"), "acme/tiny", share="1/2")
            self.identities = Identities(self.home / "identities")
            for path, role in {**dict.fromkeys(operators, "operator"), **PEOPLE}.items():
                key = self.identities.create(path).public_key.hex()
                room.principal_add(path, roles=[role], public_key=key)
        self.log = (folder / "serve.log").open("wb")
        self.processes: list[subprocess.Popen[bytes]] = []
        self.url = self.start()

    def start(self, *options: str) -> str:
        """One more custodian over the same room, with these options; its URL."""
        listen = f"127.0.0.1:{free_port()}"
        command = [sys.executable, "-m", "strongroom.cli", "--room", str(self.folder), "serve", "--listen", listen]
        self.processes.append(subprocess.Popen([*command, *options], stdout=self.log, stderr=self.log))
        url = f"https://{listen}"
        deadline = time.monotonic() + 180
        while time.monotonic() < deadline and self.processes[-1].poll() is None:
            try:
                card = Card.decode((self.folder / "card.json").read_bytes())
                if card.url == url and self.raw("GET", "/readyz", url=url)[0] == 200:
                    return url
            except (OSError, ValueError):
                pass
            time.sleep(0.1)
        pytest.fail(f"strongroom serve did not start:\n{Path(self.log.name).read_text(errors='replace')[-3000:]}")

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait(30)
        self.log.close()

    @property
    def card(self) -> Card:
        return Card.decode((self.folder / "card.json").read_bytes())

    def raw(self, method, path, body=b"", headers=None, *, url=""):
        """A request past our own client: status, headers, body."""
        context = ssl.create_default_context(cadata=self.card.authority)
        request = urllib.request.Request(
            (url or self.url) + path, data=body or None, method=method, headers=headers or {}
        )
        try:
            with urllib.request.urlopen(request, timeout=60, context=context) as answer:
                return answer.status, answer.headers, answer.read()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.headers, error.read()

    def cli(self, *arguments, as_="user/ana", check=0):
        """The command line on the client's machine."""
        places = {"STRONGROOM_STATE": str(self.home / "state"), "STRONGROOM_IDENTITIES": str(self.home / "identities")}
        return self._answer(
            "--room", self.url, "--as", as_, "--json", *arguments, env=environment(**places), check=check
        )

    def host(self, *arguments, check=0):
        """The command line on the room's own host, as its owner."""
        return self._answer("--room", str(self.folder), "--json", *arguments, env=environment(), check=check)

    def _answer(self, *arguments, env, check):
        ended = command(*arguments, cwd=self.home, env=env)
        assert check in (None, ended.code), ended
        return json.loads(ended.out) if ended.out.startswith("{") else ended.out
