"""DSSE envelopes v1 (github.com/secure-systems-lab/dsse): what is signed is the type and the exact payload bytes."""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass
from typing import Any

from strongroom.core import canonical
from strongroom.core.limits import LIMITS
from strongroom.errors import LimitExceeded, Tampered

# Canonical JSON sorts its keys, so the payload comes first and only its text is ever long.
_PAYLOAD = b'{"payload":"'
_REST_MAX = 64 * 1024  # everything but the payload: the type and 16 signatures of up to 4 KiB


def pre_authentication_encoding(payload_type: str, payload: bytes) -> bytes:
    """PAE: the bytes that are signed. Lengths keep type and payload from being shifted into each other."""
    kind = payload_type.encode()
    return b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload)


@dataclass(frozen=True)
class Envelope:
    """A payload with its signatures: pairs of key id and raw signature. Nothing in it is trusted until verified."""

    payload_type: str
    payload: bytes
    signatures: tuple[tuple[str, bytes], ...]

    def encode(self) -> bytes:
        """The envelope as canonical JSON."""
        return canonical.encode(
            {
                "payload": base64.b64encode(self.payload).decode(),
                "payloadType": self.payload_type,
                "signatures": [
                    {"keyid": key_id, "sig": base64.b64encode(signature).decode()}
                    for key_id, signature in self.signatures
                ],
            }
        )

    @classmethod
    def decode(cls, data: bytes, *, payload_type: str) -> Envelope:
        """Parse an envelope that must carry `payload_type`; Tampered otherwise."""
        if len(data) > LIMITS.manifest:
            raise LimitExceeded(
                "dsse.too_large", f"the envelope has {len(data)} bytes, at most {LIMITS.manifest} are read"
            )
        # The store can write anything here, and nothing is signed yet: 64 MiB of `{},` would become gigabytes of
        # objects. The payload stays bytes; what is left to parse as JSON is short, or it is no envelope.
        begin = len(_PAYLOAD) if data.startswith(_PAYLOAD) else 0
        end = max(begin, data.find(b'"', begin)) if begin else 0
        if len(data) - (end - begin) > _REST_MAX:
            raise Tampered("dsse.malformed", f"the envelope has more than {_REST_MAX} bytes besides its payload")
        value = canonical.decode(data[:begin] + data[end:], what="the envelope")
        if not isinstance(value, dict) or set(value) != {"payload", "payloadType", "signatures"}:
            raise Tampered("dsse.malformed", "the envelope does not have exactly payload, payloadType and signatures")
        if value["payloadType"] != payload_type:
            raise Tampered(
                "dsse.wrong_type", f"the envelope carries {value['payloadType']!r}, expected {payload_type!r}"
            )
        signatures = value["signatures"]
        if not isinstance(signatures, list) or not 1 <= len(signatures) <= LIMITS.signatures:
            raise Tampered("dsse.malformed", f"the envelope has no list of 1 to {LIMITS.signatures} signatures")
        # Nothing but base64 passes, which JSON has one spelling for: what was cut out is canonical as well.
        payload = _decoded(data[begin:end]) if begin else _unbase64(value["payload"])
        return cls(payload_type, payload, tuple(_signature(item) for item in signatures))


def _signature(item: Any) -> tuple[str, bytes]:
    if not isinstance(item, dict) or set(item) != {"keyid", "sig"} or not isinstance(item["keyid"], str):
        raise Tampered("dsse.malformed", "a signature of the envelope does not have exactly keyid and sig")
    return item["keyid"], _unbase64(item["sig"])


def _unbase64(text: object) -> bytes:
    if not isinstance(text, str):
        raise Tampered("dsse.malformed", "a part of the envelope is not base64 text")
    return _decoded(text.encode("utf-8"))


def _decoded(text: bytes) -> bytes:
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise Tampered("dsse.malformed", "a part of the envelope is not base64") from None
    # One text for one value: base64 with stray low bits would decode to the same bytes.
    if base64.b64encode(data) != text:
        raise Tampered("dsse.malformed", "a part of the envelope is not canonical base64")
    return data
