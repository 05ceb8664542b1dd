"""room.json: what it may say, and what it is not taken for."""

import pytest

from strongroom.errors import CannotVerify, Tampered
from strongroom.vault.config import RoomConfig


def test_a_room_of_a_later_format_is_not_called_tampered(tmp_path):
    (tmp_path / "room.json").write_text('{"format":2,"place":"elsewhere"}')
    with pytest.raises(CannotVerify, match="format 2") as caught:
        RoomConfig.read(tmp_path)
    assert caught.value.code == "format.unknown"


@pytest.mark.parametrize("text", ["{}", "[]", "7", '{"format":"1"}', '{"format":true}', '{"format":0}'])
def test_what_is_no_configuration_is_tampered(tmp_path, text):
    (tmp_path / "room.json").write_text(text)
    with pytest.raises(Tampered):
        RoomConfig.read(tmp_path)
