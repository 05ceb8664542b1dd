"""tensorizer, plain and encrypted (XSalsa20-Poly1305 in chunks of 2 MiB, through libsodium)."""

from __future__ import annotations

import ctypes.util
import importlib.util
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.reader import Reader, Setting, shards


class Tensorizer(Reader):
    """One file; all tensors are read up front by several threads."""

    name = "tensorizer"
    title = "tensorizer, plain"
    package = "tensorizer"
    settings = ({}, {"num_readers": 1}, {"num_readers": 2})

    @classmethod
    def missing(cls) -> str:
        return "" if importlib.util.find_spec("tensorizer") else "tensorizer is not installed"

    def prepare(self, place: Path) -> None:
        import tensorizer  # noqa: F401

    def stage(self, directory: Path) -> Any:
        """Tensors in private memory: its encryption works in place, and mapped pages would be copied while timed."""
        from safetensors.torch import load_file

        return {name: tensor.clone() for file in shards(directory) for name, tensor in load_file(file).items()}

    def put(self, staged: Any, place: Path) -> None:
        from tensorizer import TensorSerializer

        serializer = TensorSerializer(str(place / "model.tensors"), encryption=self._encryption(place))
        serializer.write_state_dict(staged)
        serializer.close()

    def load(self, directory: Path, place: Path, setting: Setting) -> Mapping[str, Any]:
        return dict(self._open(place, setting))

    def tensor(self, directory: Path, place: Path, name: str, setting: Setting) -> Any:
        return self._open(place, setting, lazy_load=True, filter_func=lambda path: path == name)[name]

    def _open(self, place: Path, setting: Setting, **options: Any) -> Any:
        from tensorizer import TensorDeserializer

        path = str(place / "model.tensors")
        return self.open.enter_context(
            TensorDeserializer(path, device="cpu", encryption=self._decryption(place), **setting, **options)
        )

    def _encryption(self, place: Path) -> Any:
        return None

    def _decryption(self, place: Path) -> Any:
        return None


class TensorizerEncrypted(Tensorizer):
    name = "tensorizer-encrypted"
    title = "tensorizer, encrypted"

    @classmethod
    def missing(cls) -> str:
        if reason := super().missing():
            return reason
        return "" if ctypes.util.find_library("sodium") else "libsodium is not installed (Debian: libsodium23)"

    def _encryption(self, place: Path) -> Any:
        from tensorizer import EncryptionParams

        key = secrets.token_bytes(32)
        (place / "key").write_bytes(key)
        return EncryptionParams(key)

    def _decryption(self, place: Path) -> Any:
        from tensorizer import DecryptionParams

        return DecryptionParams.from_key((place / "key").read_bytes())
