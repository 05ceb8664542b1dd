"""What a gateway captures is for one reader, belongs to its record, and is never kept in secret."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import socket
import threading
from types import SimpleNamespace

import pytest

from cli.desk import here, strongroom
from gateway.callers import Clock
from gateway.hpke import open_base
from gateway.places import ANA, OWNER, PIA, REF, chat, chunk, ended, token, whole
from gateway.test_gateway import eventually
from gateway.test_reload import _take as take
from strongroom.crypto.capture import CaptureKey, CaptureSealer, commitment, key_id
from strongroom.errors import BackendError, StrongroomError, Tampered, UsageError
from strongroom.gateway import serving, unsealing
from strongroom.gateway.capture import Capture, Captured
from strongroom.gateway.metrics import GatewayMetrics
from strongroom.gateway.rooms import InFolder
from strongroom.gateway.settings import Settings
from strongroom.gateway.unsealing import opened
from strongroom.vault.callers import Callers

STREAM = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


@pytest.fixture(autouse=True)
def waiting(monkeypatch):
    """The clock by which what is missing is waited for: nobody has to wait for it here."""
    clock = Clock()

    def sleep(seconds):
        clock.now += seconds

    monkeypatch.setattr(unsealing, "time", SimpleNamespace(monotonic=clock, sleep=sleep))
    return clock


@pytest.fixture(scope="module")
def kept(house, tmp_path_factory):
    """Three captured requests of one principal among others, and what they were sealed in; the gateway has ended."""
    key = CaptureKey()
    durable = '[records]\ndurable = "before"\n'
    gateway = house.gateway(f'{durable}[capture]\nkey = "{key.public_key.hex()}"\nwho = ["{ANA}"]\n')
    app = house.newest
    assert gateway.get("/readyz")[1]["capture"] == key.key_id
    house.inference.script = lambda _: [whole("Marmalade.")]
    assert gateway.post(chat("Raspberry", temperature=0.5))[0] == 200
    assert gateway.post(chat("Not this one"), as_=PIA)[0] == 200
    house.inference.script = lambda _: [STREAM, token("Quin"), token("ces"), ended(2)]
    assert gateway.post(chat("Pear", stream=True))[0] == 200
    assert gateway.post(chat("Refused", logprobs=True))[0] == 403  # nothing of it went upstream
    heard = threading.Event()
    house.inference.script = lambda _: [STREAM, token("Cut"), heard, chunk(b"data: no JSON\n\n")]
    assert gateway.post(chat("Apple", stream=True), heard=heard)[0] == 200
    path = app.capture.path
    house.stop_gateways()
    return house, key, path


def test_what_was_captured_is_for_whoever_has_the_key(kept):
    _, key, path = kept
    found = list(opened(path, key))
    assert [(each["record"]["by"], each["asked"]["messages"][0]["content"], each["answers"]) for each in found] == [
        (ANA, "Raspberry", ["Marmalade."]),
        (ANA, "Pear", ["Quinces"]),
        (ANA, "Apple", ["Cut"]),
    ]
    assert found[0]["asked"]["temperature"] == 0.5
    assert [each["record"]["status"] for each in found] == [200, 200, 502]
    written = path.read_text() + path.with_suffix(".jsonl").read_text()
    for word in ("Raspberry", "Marmalade", "Quin", "Pear"):
        assert word not in written
    with pytest.raises(UsageError, match="sealed to another key"):
        list(opened(path, CaptureKey()))
    assert path.stat().st_mode & 0o077 == 0


def test_whoever_has_the_specification_and_the_key_can_open_it(kept):
    """With HPKE from its RFC, and hashes from the library, and nothing of ours."""
    _, key, path = kept
    records = path.with_suffix(".jsonl").read_bytes().splitlines()
    hashes = [hashlib.sha256(b"strongroom/1 inference\0" + line).digest() for line in records]
    for line in map(json.loads, path.read_bytes().splitlines()):
        record = hashes.index(bytes.fromhex(line["record"]))
        info = b"strongroom/1 capture\0" + hashes[record]
        content = open_base(key.private_bytes(), base64.b64decode(line["sealed"]), info)
        told = json.loads(records[record])
        assert told["capture"] == {
            "content": hashlib.sha256(b"strongroom/1 captured\0" + content).hexdigest(),
            "key": hashlib.sha256(key.public_key).hexdigest(),
        }
        assert (line["n"], line["key"]) == (told["n"], told["capture"]["key"])
        assert json.loads(content[32:])["ref"] == REF


def test_the_log_says_so_before_anything_is_captured(kept):
    house, key, path = kept
    with house.room(OWNER) as room:
        entries = [each for each in room.log.tail(60) if each["type"] == "inference"]
        assert room.log.verify()
    mine = [each for each in entries if each["body"]["gateway"] == path.stem]
    first = min(mine, key=lambda each: each["index"])
    assert (first["ref"], first["body"]["records"], first["body"]["requests"]) == ("", 0, 0)
    assert {each["body"]["capture"] for each in mine} == {key.key_id} == {key_id(key.public_key)}
    assert all("capture" not in each["body"] for each in entries if each not in mine)


def changed(path, folder, sealed=lambda lines: lines, records=lambda lines: lines):
    """The two files, with their lines changed."""
    folder.mkdir()
    for suffix, change in ((".sealed", sealed), (".jsonl", records)):
        lines = path.with_suffix(suffix).read_text().splitlines()
        (folder / f"s{suffix}").write_text("".join(f"{line}\n" for line in change(lines)))
    return folder / "s.sealed"


def swapped(lines):
    """Of two captured requests each has what was said in the other."""
    first, second, *rest = map(json.loads, lines)
    first["sealed"], second["sealed"] = second["sealed"], first["sealed"]
    return [json.dumps(each, sort_keys=True, separators=(",", ":")) for each in (first, second, *rest)]


def relabelled(lines, *, spoilt):
    """As if the first were for somebody else, whose line nobody here can open."""
    first = json.loads(lines[0])
    first["key"] = "0" * 64
    if spoilt:
        first["sealed"] = base64.b64encode(base64.b64decode(first["sealed"])[:-1] + b"?").decode()
    return [json.dumps(first, sort_keys=True, separators=(",", ":")), *lines[1:]]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"sealed": lambda lines: relabelled(lines, spoilt=True)}, "names another key than the record"),
        ({"sealed": lambda lines: relabelled(lines, spoilt=False)}, "names another key than the record"),
        ({"sealed": lambda lines: lines[1:]}, "is not there"),
        ({"sealed": lambda lines: []}, "is not there"),
        ({"sealed": swapped}, "does not open"),
        ({"sealed": lambda lines: [*lines, lines[0]]}, "of a record that is not there"),
        ({"sealed": lambda lines: [lines[0].replace('"sealed":"', '"sealed":"A'), *lines[1:]]}, "is none|not open"),
        ({"sealed": lambda lines: ["{}", *lines[1:]]}, "is none"),
        ({"records": lambda lines: lines[:-1]}, "of a record that is not there"),
        ({"records": lambda lines: [lines[0].replace("200", "201"), *lines[1:]]}, "does not follow"),
        ({"records": lambda lines: []}, "of a record that is not there"),
    ],
)
def test_what_was_changed_is_found_out(kept, tmp_path, change, why):
    _, key, path = kept
    with pytest.raises(Tampered, match=why):
        list(opened(changed(path, tmp_path / "changed", **change), key))


@pytest.mark.parametrize("late", ["sealed", "records"])
def test_a_line_that_is_being_written_is_waited_for(kept, tmp_path, monkeypatch, waiting, late):
    """The gateway runs: of its newest request one of the two files has a line, and the other one has it soon, though
    its machine is held up for some seconds."""
    _, key, path = kept
    path = changed(path, tmp_path / "changed")
    behind = path.with_suffix(".jsonl") if late == "records" else path
    lines = behind.read_bytes().splitlines(keepends=True)
    behind.write_bytes(b"".join(lines[:-1]))
    slept = []

    def write(seconds):
        slept.append(seconds)
        waiting.now += 3
        with behind.open("ab") as file:
            file.write(lines[-1][:50] if len(slept) == 1 else lines[-1][50:] if len(slept) == 2 else b"")

    monkeypatch.setattr(unsealing.time, "sleep", write)
    whole = late == "sealed"  # what has no record yet is no part of what is told
    assert len(list(opened(path, key))) == (3 if whole else 2)
    assert len(slept) == 2
    assert len(list(opened(path, key))) == 3


@pytest.mark.parametrize(
    "change",
    [
        lambda lines: lines[1:],
        lambda lines: ["{}", *lines[1:]],
        lambda lines: [lines[0].replace('"sealed":"', '"sealed":"AAAA'), *lines[1:]],
        lambda lines: relabelled(lines, spoilt=True),
    ],
)
def test_nobody_hides_all_by_spoiling_one(kept, tmp_path, change):
    _, key, path = kept
    spoilt = changed(path, tmp_path / "changed", sealed=change)
    shown = []
    with pytest.raises(Tampered):
        shown.extend(each["answers"] for each in opened(spoilt, key))
    assert shown == [["Quinces"], ["Cut"]]


def test_what_a_lost_power_left_behind_the_last_line_is_no_line(kept, tmp_path):
    _, key, path = kept
    copied = changed(path, tmp_path / "copied")
    for each, more in ((copied, '{"key":"'), (copied.with_suffix(".jsonl"), '{"at":1')):
        with each.open("a") as file:
            file.write(more)
    assert list(opened(copied, key)) == list(opened(path, key))


def test_a_new_key_for_what_comes_next_hides_nothing_from_either(place, tmp_path):
    first, second = CaptureKey(), CaptureKey()
    gateway = place.gateway(_for(first))
    app = place.newest
    path = app.capture.path
    assert gateway.post(chat("First"))[0] == 200
    take(place, app, f'{_for(second)}[[upstream]]\nurl = "http://127.0.0.1:{place.inference.port}"\n')
    assert gateway.post(chat("Second"))[0] == 200
    place.stop_gateways()
    for key, said in ((first, "First"), (second, "Second")):
        found = list(opened(path, key))
        assert [each["asked"]["messages"][0]["content"] for each in found if "asked" in each] == [said]
        (other,) = [each["other_key"] for each in found if "asked" not in each]
        assert {key.key_id, other} == {first.key_id, second.key_id}
    (tmp_path / "mine").write_text(second.private_bytes().hex())
    (tmp_path / "mine").chmod(0o600)
    shown = strongroom("capture", "open", str(path), "--key", "mine", cwd=tmp_path)
    assert (shown.code, "user: Second" in shown.out, "user: First" in shown.out) == (0, True, False)
    assert "record 0 was sealed to another key" in shown.err


def test_a_line_that_the_settings_before_are_writing_is_waited_for(tmp_path, monkeypatch):
    """New settings come while an answer is captured under those before: the file ends in a part of a line then."""
    wanted = Settings.parse(_for(CaptureKey()) + '[[upstream]]\nurl = "http://127.0.0.1:1"\n').capture
    before = Capture(wanted, tmp_path / "s.jsonl")
    write, begun, go = os.write, threading.Event(), threading.Event()

    def halting(file, data):
        if file != before._file or begun.is_set():
            return write(file, data)
        done = write(file, data[: len(data) // 2])
        begun.set()
        assert go.wait(60)
        return done

    monkeypatch.setattr("strongroom.gateway.appending.os.write", halting)
    before.add(Captured(b"c" * 100, {}), 0, "0" * 64)
    assert begun.wait(60)
    made = []
    taking = threading.Thread(target=lambda: made.append(Capture(wanted, tmp_path / "s.jsonl")))
    taking.start()
    taking.join(0.3)  # it waits for as long as that takes
    go.set()
    taking.join(60)
    (after,) = made
    after.add(Captured(b"d" * 100, {}), 1, "1" * 64)
    for each in (before, after):
        each.close()
    assert [json.loads(line)["n"] for line in after.path.read_text().splitlines()] == [0, 1]


def test_nothing_is_written_behind_a_part_of_a_line(tmp_path):
    wanted = Settings.parse(_for(CaptureKey()) + '[[upstream]]\nurl = "http://127.0.0.1:1"\n').capture
    (tmp_path / "s.sealed").write_text('{"key":')
    with pytest.raises(BackendError, match="ends in a part of a line"):
        Capture(wanted, tmp_path / "s.jsonl")
    (tmp_path / "s.sealed").write_text("{}\n")
    Capture(wanted, tmp_path / "s.jsonl").close()


def _for(key: CaptureKey) -> str:
    return f'[capture]\nkey = "{key.public_key.hex()}"\nwho = ["{ANA}"]\n'


def test_in_whatever_order(kept, tmp_path):
    _, key, path = kept
    turned = changed(path, tmp_path / "turned", sealed=lambda lines: lines[::-1])
    assert list(opened(turned, key)) == list(opened(path, key))


def test_nobody_can_seal_something_else_to_a_record(kept, tmp_path):
    """The public key is everybody's: only the record tells that this is what was said."""
    _, key, path = kept

    def forged(lines):
        value = json.loads(lines[0])
        content = bytes(32) + b'{"route":"chat","ref":"acme/tiny@1","asked":{},"answers":["I confess"]}'
        sealed = CaptureSealer(key.public_key).seal(content, bytes.fromhex(value["record"]))
        value["sealed"] = base64.b64encode(sealed).decode()
        return [json.dumps(value, sort_keys=True, separators=(",", ":")), *lines[1:]]

    with pytest.raises(Tampered, match="not what the record says"):
        list(opened(changed(path, tmp_path / "forged", sealed=forged), key))


def test_from_the_command_line(kept, tmp_path):
    _, key, path = kept
    made = strongroom("capture", "keygen", "mine", "--json", cwd=tmp_path)
    assert made.code == 0
    assert (tmp_path / "mine").stat().st_mode & 0o077 == 0
    public = CaptureKey(bytes.fromhex((tmp_path / "mine").read_text().strip())).public_key
    assert made.json == {"public_key": public.hex(), "key": key_id(public), "file": "mine"}
    assert strongroom("capture", "keygen", "mine", "--json", cwd=tmp_path).error["code"] == "capture.exists"
    (tmp_path / "theirs").write_text(key.private_bytes().hex())
    assert "chmod 600" in strongroom("capture", "open", str(path), "--key", "theirs", cwd=tmp_path).err
    (tmp_path / "theirs").chmod(0o600)
    shown = strongroom("capture", "open", str(path), "--key", "theirs", cwd=tmp_path)
    assert (shown.code, "  > user: Pear\n  < Quinces\n" in shown.out) == (0, True)
    found = strongroom("capture", "open", str(path), "--key", "theirs", "--record", "0", "--json", cwd=tmp_path).json
    assert [each["answers"] for each in found["captured"]] == [["Marmalade."]]
    tampered = changed(path, tmp_path / "changed", sealed=lambda lines: lines[1:])
    assert here("capture", "open", str(tampered), "--key", "theirs", cwd=tmp_path).code == 6
    other = strongroom("capture", "open", str(path), "--key", "mine", "--json", cwd=tmp_path)
    assert other.error["code"] == "capture.other_key"


def test_what_can_not_be_captured_is_not_answered(place, caplog):
    key = CaptureKey().public_key.hex()
    gateway = place.gateway(f'[capture]\nkey = "{key}"\nmodels = ["{REF}"]\n')
    app = place.newest
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, app.capture._file)
    os.close(full)
    assert gateway.post(chat())[0] == 200  # it is found out as it is written
    eventually(lambda: gateway.post(chat())[2].get("error", {}).get("code") == "sealed")
    # Anybody may ask whether it is ready. What it is, the log says, once.
    for _ in range(2):
        told = gateway.get("/readyz")
        assert told == (503, {"ready": False, "problems": ["capture"], "capture": app.capture.key_id})
    assert [each.getMessage() for each in caplog.records if each.levelname == "ERROR"] == [
        f"not ready, capture: can't keep what was to be captured in {app.capture.path.name}: No space left on device"
    ]
    assert 'strongroom_gateway_problem{problem="capture"} 1.0' in GatewayMetrics(app).exposition().decode()


def test_what_can_not_be_sealed_is_not_answered_either(place, monkeypatch):
    def fails(*_):
        raise RuntimeError("a fault of the library's")

    key = CaptureKey().public_key.hex()
    gateway = place.gateway(f'[capture]\nkey = "{key}"\nmodels = ["{REF}"]\n')
    monkeypatch.setattr(CaptureSealer, "seal", fails)
    assert gateway.post(chat())[0] == 200
    eventually(lambda: gateway.post(chat())[2].get("error", {}).get("code") == "sealed")


def test_a_room_whose_log_cannot_be_written_captures_nothing(place, monkeypatch):
    def fails(*_):
        raise BackendError("db.down", "the database is down")

    monkeypatch.setattr(Callers, "record", fails)
    upstream = f'[[upstream]]\nurl = "http://127.0.0.1:{place.inference.port}"\n'
    settings = Settings.parse(f'[capture]\nkey = "{CaptureKey().public_key.hex()}"\nwho = ["{ANA}"]\n{upstream}')
    plan = serving.Plan(lambda: InFolder.opened(place.folder), settings, place.folder / "inference")
    with socket.create_server(("127.0.0.1", 0)) as listener, pytest.raises(BackendError, match="database is down"):
        serving.run(plan, listener, ready=pytest.fail)


@pytest.mark.parametrize(
    "text",
    [
        f'key = "{"ab" * 32}"',
        'who = ["user/ana"]',
        'key = "no"\nwho = ["user/ana"]',
        f'key = "{"AB" * 32}"\nwho = ["user/ana"]',
    ],
)
def test_settings_that_capture_by_oversight(text):
    with pytest.raises(UsageError) as caught:
        Settings.parse(f"[capture]\n{text}\n")
    assert caught.value.code == "settings.malformed"


def test_keys_that_are_none():
    for key in (bytes(32), b"\1" + bytes(31), b"short"):
        with pytest.raises(UsageError, match="public half"):
            CaptureSealer(key)
    with pytest.raises(UsageError, match="private half"):
        CaptureKey(b"short")
    key = CaptureKey()
    sealer = CaptureSealer(key.public_key)
    assert key.open(sealer.seal(b"x", bytes(32)), bytes(32)) == b"x"
    for sealed, record in ((sealer.seal(b"x", bytes(32)), b"\1" * 32), (b"", bytes(32)), (bytes(60), bytes(32))):
        with pytest.raises(StrongroomError) as caught:
            key.open(sealed, record)
        assert caught.value.code == "capture.tampered"
    assert commitment(b"a") != commitment(b"b")
    assert key.private_bytes().hex() not in repr(key)
