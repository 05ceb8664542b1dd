"""What the environment says. Read once a process, at the edge; everything else takes arguments."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """``STRONGROOM_*`` variables. `grant` is set by ``strongroom run`` for its child and by nobody else."""

    room: str = "./room"
    principal: str | None = None
    grant: str | None = None
    threads: int = 0  # 0: as many as there are cores

    @classmethod
    def from_environment(cls) -> Settings:
        env = os.environ
        threads = env.get("STRONGROOM_THREADS", "0")
        return cls(
            room=env.get("STRONGROOM_ROOM") or cls.room,
            principal=env.get("STRONGROOM_AS") or None,
            grant=env.get("STRONGROOM_GRANT") or None,
            threads=int(threads) if threads.isdigit() else 0,
        )

    @property
    def workers(self) -> int:
        return self.threads or len(os.sched_getaffinity(0))
