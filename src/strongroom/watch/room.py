"""The budgets of a room: its counters, the size of its versions, and what its log says of copies, releases, answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from strongroom.policy import usage
from strongroom.vault.callers import Callers
from strongroom.watch.counters import Counters
from strongroom.watch.effective import BITS_PER_PARAMETER, COMPRESSION, effective_bits
from strongroom.watch.report import SHARED
from strongroom.watch.report import report as reported
from strongroom.watch.rules import RULES, SECONDS, Rule, counted_ref, window_at
from strongroom.watch.tallies import Tallies, shown

if TYPE_CHECKING:
    from strongroom.vault.vault import Vault

_VOCABULARY = 1 << 20  # tokens, where nothing says how many there are


def report(
    vault: Vault,
    ref: str,
    rules: Sequence[Rule] = RULES,
    *,
    bits_per_parameter: int = BITS_PER_PARAMETER,
    compression: int = COMPRESSION,
) -> dict[str, Any]:
    """As `watch.report`, of the version that `ref` names, and how its size comes about: ``parameters``,
    ``bits_per_parameter``, ``compression``. ``logged``: requests, refused, tokens and bits that gateways have accounted
    for in the log, which nobody can take back, in up to 400 days. NotFound ``version.missing``."""
    row = vault.find(ref)
    name = f"{row.name}@{row.number}"
    model = Callers(vault).model(name)
    parameters = model.parameters
    size = effective_bits(parameters, bits_per_parameter=bits_per_parameter, compression=compression)
    refs = {name, *(counted_ref(rule.scope, name) for rule in rules)}
    now, rows = Counters(vault.db).look(int(vault.clock()), refs)
    with vault.custodian.ledger.view() as state:
        uses, logged = [use for use in state.uses.values() if use.ref == name], usage.since(state, name, 0).as_json()
        accounted = {
            (rule.scope, rule.window): usage.bits(
                state, counted_ref(rule.scope, name), window_at(rule.window, now)[0], hourly=rule.window == "hour"
            )
            for rule in rules
            if rule.scope in SHARED
        }
        answered = (usage.on(state, name, now).bits, usage.on(state, name, now - SECONDS["day"]).bits)
    found = reported(rules, rows, uses, name, size, now, answered, accounted)
    return {
        **found,
        "parameters": parameters,
        "bits_per_parameter": bits_per_parameter,
        "compression": compression,
        "logged": logged,
        "verified": shown(Tallies(vault.db).newest(name), model.vocabulary or _VOCABULARY, logged["tokens"]),
    }
