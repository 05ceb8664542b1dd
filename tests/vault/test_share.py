"""The marked share, as it is typed."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from strongroom.errors import UsageError
from strongroom.formats.layout import Layout
from strongroom.formats.suites import Suite
from strongroom.vault.put import Plan, parse_share
from strongroom.vault.source import ModelSource


@pytest.mark.parametrize(
    ("text", "share"),
    [("1/8", (1, 8)), ("0.125", (1, 8)), ("0", (0, 1)), ("0.0", (0, 1)), ("1/2", (1, 2)), ("2/6", (1, 3))],
)
def test_fractions_and_decimals(text: str, share: tuple[int, int]) -> None:
    assert parse_share(text) == Fraction(*share)


@pytest.mark.parametrize(
    "text",
    # Fraction() takes 10 s for the first, does not end for the second, and reads the Arabic digits.
    [
        *("1e10000000", "1e-999999999", "1e-7", "\u0661/\u0668", "0.0000001", "1/999999999", "0/0", "1/0", "-1/8"),
        *("-0", "0.50001", "1", "nan", "inf", "1_0/8_0", " 1/8", "1/8\n", "", "1/8/8", "0.5/1", "1" * 5000),
    ],
)
def test_everything_else_is_refused_at_once(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_share(text)
    assert caught.value.code == "put.share"
    assert len(caught.value.message) < 120


MIB = 1 << 20


@pytest.mark.parametrize(
    ("markable", "positions", "share"),
    [
        (1 << 40, 16384, (1, 8)),
        (256 * MIB, 16384, (1, 8)),
        (256 * MIB - 1, 16384, (1, 4)),
        (128 * MIB - 1, 16384, (3, 8)),
        (86 * MIB, 16384, (3, 8)),
        (85 * MIB, 16384, (1, 2)),
        (MIB, 16384, (1, 2)),
        (MIB, 32, (1, 8)),  # no more than is asked for
        (0, 16384, (1, 2)),
        (MIB, 0, (1, 8)),
    ],
)
def test_by_default_a_small_model_is_marked_in_more_of_its_weights(markable, positions, share) -> None:
    assert parse_share("auto") is None
    assert Layout.default_share(markable, positions) == Fraction(*share)


@pytest.mark.parametrize(("share", "positions"), [("auto", 64), ("1/8", 32), ("1/2", 127)])
def test_what_was_marked_is_what_was_said(tmp_path: Path, share: str, positions: int) -> None:
    save_file({"a.weight": np.ones((512, 512), np.float32)}, tmp_path / "model.safetensors")  # 1 MiB
    source = ModelSource.scan(tmp_path)
    planned = Plan.of(source, share=parse_share(share), positions=64 if share == "auto" else 16384, suite=Suite.BLAKE3)
    assert planned.layout.positions == positions
    assert planned.share == (Fraction(1, 4) if share == "auto" else Fraction(share))
