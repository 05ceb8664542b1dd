"""Rooms with a small model in them, made once and copied for each test that harms one."""

from __future__ import annotations

import pytest
from vault.rooms import House, clone, write_model

from strongroom.vault import packing


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("models") / "tiny", seed=1)


@pytest.fixture(scope="session")
def other_source(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("models") / "other", seed=2)


@pytest.fixture(scope="session")
def pristine(tmp_path_factory, source):
    """A room that holds acme/tiny@1 in one pack a kind. Not to be harmed: `house` is a copy."""
    house = House.build(tmp_path_factory.mktemp("rooms") / "one")
    house.put(source)
    yield house
    house.close()


@pytest.fixture(scope="session")
def pristine_packs(tmp_path_factory, source):
    """The same in many small packs."""
    house = House.build(tmp_path_factory.mktemp("rooms") / "many")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "PACK_BODY", 40_000)
        house.put(source)
    yield house
    house.close()


@pytest.fixture
def house(pristine, tmp_path):
    house = clone(pristine, tmp_path / "room")
    yield house
    house.close()


@pytest.fixture
def packs_house(pristine_packs, tmp_path):
    house = clone(pristine_packs, tmp_path / "packs-room")
    yield house
    house.close()
