"""The keys of principals on one machine."""

from __future__ import annotations

import pytest

from strongroom.crypto.identity import Identities
from strongroom.errors import Conflict

WHO = "workload/witness"


def test_two_who_need_a_key_at_the_same_time_have_the_same(tmp_path, monkeypatch):
    """Another process makes it between the look and the making."""
    create = Identities.create

    def late(identities, principal):
        monkeypatch.undo()
        made.append(Identities(tmp_path).ensure(principal))
        return create(identities, principal)

    made = []
    monkeypatch.setattr(Identities, "create", late)
    mine = Identities(tmp_path).ensure(WHO)
    assert [each.public_key for each in made] == [mine.public_key]
    assert Identities(tmp_path).ensure(WHO).public_key == mine.public_key
    with pytest.raises(Conflict):
        Identities(tmp_path).create(WHO)
