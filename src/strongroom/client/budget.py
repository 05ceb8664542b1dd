"""What has left of a version as answers, and what may: asked where the room is, or of a served one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from strongroom.errors import UsageError

if TYPE_CHECKING:
    from strongroom.client.anyroom import AnyRoom


def budget(room: AnyRoom, principal: str, ref: str, settings: Path | None) -> dict[str, Any]:
    """What is used and left of the egress budgets of `ref`, and how long its weights would take to leave that way: see
    `watch.room.report`.

    `settings`: the gateway's, whose budgets they are; a served room knows its own (UsageError ``budget.settings``). For
    those who may audit or administer.
    """
    from strongroom.client.served import ServedRoom

    if isinstance(room, ServedRoom):
        if settings is not None:
            raise UsageError(
                "budget.settings",
                "a served room shows its budgets by the settings that it was started with",
                hint=f"strongroom budget {ref}; on the room's host: strongroom serve --gateway-settings FILE",
            )
        return room.custodian.budget(ref)
    from strongroom.gateway.settings import Settings
    from strongroom.vault.vault import Vault
    from strongroom.watch.room import report

    assert isinstance(room, Vault)  # noqa: S101 - there is no third kind
    said = (Settings.read(settings) if settings else Settings()).budgets
    room.custodian.authorise(principal, "audit", "administer")
    return report(room, ref, said.rules, bits_per_parameter=said.bits_per_parameter, compression=said.compression)
