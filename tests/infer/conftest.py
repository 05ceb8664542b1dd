"""One small model, one room that holds it, and the model as a running engine has it."""

from __future__ import annotations

import pytest

from infer.small import make_room, write_small
from strongroom.errors import BackendError
from strongroom.infer.server import Settings, load


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """The folder of the small model."""
    return write_small(tmp_path_factory.mktemp("small") / "model")


@pytest.fixture(scope="session")
def small_room(small, tmp_path_factory):
    """An open room of one with the small model in it."""
    with make_room(tmp_path_factory.mktemp("small-room") / "room", small) as room:
        yield room


@pytest.fixture
def model(small_room):
    """What a server serves, with eight rows."""
    found, close = load(small_room.load("acme/small"), Settings(rows=8, threads=1))
    yield found
    found.engine.stop(BackendError("test.over", "the test is over"))
    close()
