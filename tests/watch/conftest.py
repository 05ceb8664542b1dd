from __future__ import annotations

import pytest

from watch.budgets import Desk


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.server)])
def desk(request, tmp_path):
    url = f"sqlite:///{tmp_path}/room.db" if request.param == "sqlite" else request.getfixturevalue("postgresql_url")
    made = Desk(url)
    yield made
    made.db.close()
