"""What a worker of the gateway may have beside its parts: each is there where the settings ask for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from strongroom.gateway.capture import Capture
    from strongroom.gateway.probe import Probe
    from strongroom.gateway.tracing import Tracing
    from strongroom.gateway.verified import Verified


@dataclass(frozen=True)
class Beside:
    """Each None where it is off, and then asked for nothing."""

    verified: Verified | None = None
    probe: Probe | None = None
    tracing: Tracing | None = None
    capture: Capture | None = None
