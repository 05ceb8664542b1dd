"""CryptoTensors: safetensors with AES-256-GCM per tensor (chunks of 2 MiB) and a signed header."""

from __future__ import annotations

import base64
import importlib.util
import json
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bench.reader import Reader, Setting, shards


class Cryptotensors(Reader):
    """One encrypted file a shard; it decrypts with a thread a core inside each tensor."""

    name = "cryptotensors"
    title = "cryptotensors, encrypted"
    package = "cryptotensors"

    @classmethod
    def missing(cls) -> str:
        return "" if importlib.util.find_spec("cryptotensors") else "cryptotensors is not installed"

    def prepare(self, place: Path) -> None:
        import cryptotensors.torch  # noqa: F401

    def stage(self, directory: Path) -> Any:
        from safetensors.torch import load_file

        return {file.stem: {n: t.clone() for n, t in load_file(file).items()} for file in shards(directory)}

    def put(self, staged: Any, place: Path) -> None:
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
        from cryptotensors.torch import save_file

        signer = Ed25519PrivateKey.generate()
        enc = {"kty": "oct", "alg": "aes256gcm", "kid": "enc", "k": _base64(secrets.token_bytes(32))}
        sign = {
            "kty": "okp",
            "alg": "ed25519",
            "kid": "sign",
            "x": _base64(signer.public_key().public_bytes_raw()),
            "d": _base64(signer.private_bytes_raw()),
        }
        keys = {"enc_key": enc, "sign_key": sign}
        (place / "keys.json").write_text(json.dumps(keys))
        for stem, tensors in staged.items():
            save_file(tensors, place / f"{stem}.cryptotensors", config=keys)

    def load(self, directory: Path, place: Path, setting: Setting) -> Mapping[str, Any]:
        tensors = {}
        for source in self._files(place):
            for name in source.offset_keys():
                tensors[name] = source.get_tensor(name)
        return tensors

    def tensor(self, directory: Path, place: Path, name: str, setting: Setting) -> Any:
        for source in self._files(place):
            if name in source.keys():  # noqa: SIM118 (safe_open is no mapping)
                return source.get_tensor(name)
        raise KeyError(name)

    def _files(self, place: Path) -> Iterator[Any]:
        """What its own load_file does, with the keys given instead of looked up in its process-wide registry."""
        from cryptotensors import safe_open

        keys = json.loads((place / "keys.json").read_text())
        for file in shards(place, ".cryptotensors"):
            with safe_open(file, framework="pt", device="cpu", config=keys) as source:
                yield source


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()
