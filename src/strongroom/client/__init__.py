"""The typed client, and the side of whoever asks: an embedded room and a served one with the same methods; statements,
releases and copies as their receiver checks them."""

from strongroom.client.room import Progress, Room, RoomLog, open, read_once, room_folder, safe_open, verify_log  # noqa: A004

__all__ = ["Progress", "Room", "RoomLog", "open", "read_once", "room_folder", "safe_open", "verify_log"]
