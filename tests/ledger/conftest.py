from __future__ import annotations

from pathlib import Path

import pytest

from ledger.logs import Desk


@pytest.fixture
def desk(tmp_path: Path):
    made = Desk(tmp_path)
    made.begin()
    yield made
    made.db.close()
