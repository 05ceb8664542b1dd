"""W_eff, in bits: the smallest artefact worth stealing, which every budget is a share of (spec/gateway.md, section 5).

Sources: weights are quantised to 4 bits a parameter with little loss; who carries them off, and may take days to unpack
them, compresses 16- to 100-fold (arXiv 2601.01296). docs/explanation/egress.md says more.
"""

from __future__ import annotations

from strongroom.errors import UsageError

BITS_PER_PARAMETER = 4
COMPRESSION = 16


def effective_bits(
    parameters: int, *, bits_per_parameter: int = BITS_PER_PARAMETER, compression: int = COMPRESSION
) -> int:
    """Bits, at least 1. UsageError ``budget.size`` for numbers below 1."""
    if min(parameters, bits_per_parameter, compression) < 1:
        raise UsageError("budget.size", "weights have at least one parameter, and each at least one bit")
    return max(1, parameters * bits_per_parameter // compression)
