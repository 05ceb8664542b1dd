"""One room for all tests of a module, and gateways that end with the test."""

from __future__ import annotations

import pytest

from gateway.places import Place, whole


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    made = Place(tmp_path_factory.mktemp("place"))
    yield made
    made.stop()


@pytest.fixture
def place(house):
    house.inference.script = lambda _: [whole()]
    house.inference.forget()
    yield house
    house.stop_gateways()
