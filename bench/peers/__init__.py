"""The peers: other people's readers, each used as its own documentation says and with its fastest setting."""

from __future__ import annotations

from bench.peers.age import Age
from bench.peers.cryptotensors import Cryptotensors
from bench.peers.fastsafetensors import Fastsafetensors
from bench.peers.runai import Runai
from bench.peers.safetensors import Safetensors, SafetensorsHuge
from bench.peers.tensorizer import Tensorizer, TensorizerEncrypted
from bench.reader import Reader

PEERS: tuple[type[Reader], ...] = (
    Safetensors,
    SafetensorsHuge,
    Fastsafetensors,
    Runai,
    Tensorizer,
    TensorizerEncrypted,
    Cryptotensors,
    Age,
)
