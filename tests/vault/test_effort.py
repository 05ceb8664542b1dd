"""How long a suspect is searched is not for whoever made it to say."""

from __future__ import annotations

import numpy as np
import pytest

from strongroom.vault import comparison, effort
from strongroom.vault.comparison import Comparison
from strongroom.vault.effort import Effort, Patience, Purse
from strongroom.vault.originals import Originals
from strongroom.vault.suspect import Suspect
from strongroom.vault.trace import trace
from vault.test_trace import HOLDERS, REF, given, room, traced, write  # noqa: F401 - fixtures

STOPPED = "alignment stopped at its budget"


def decoys(count, shape=(256, 256), seed=3):
    """Tensors of one size that are nobody's."""
    rng = np.random.default_rng(seed)
    return {f"decoy.{k}.weight": rng.normal(0, 0.05, shape).astype(np.float32) for k in range(count)}


def worked(house, path, monkeypatch):
    """Elements of the suspect that were read, and matrices as large as the original that were solved, in aligning it;
    its elements; and whether that ended at the budget."""
    read, solved = [], []
    real_read, real_solve = Suspect.read, comparison.solve

    def counting(self, name, begin=0, end=None):
        found = real_read(self, name, begin, end)
        read.append(found.size)
        return found

    def solving(original, suspect):
        if original.size == suspect.size:
            solved.append(original.size)
        return real_solve(original, suspect)

    monkeypatch.setattr(Suspect, "read", counting)
    monkeypatch.setattr(comparison, "solve", solving)
    record = house.vault.record(house.vault.find(REF))
    with Suspect.opened(path) as suspect:
        found = Comparison(Originals(house.vault.image(record), record), suspect)
        found.deepen(lambda _done, _total: None)
        return sum(read), len(solved), sum(each.info.elements for each in suspect.tensors.values()), found.stopped


def test_tensors_without_end_of_the_size_of_an_original_are_not_all_tried(room, tmp_path, monkeypatch):  # noqa: F811
    """Nothing of the version is there, and each of three tensors could be any of hundreds."""
    monkeypatch.setattr(effort, "_OF_EACH", 2)
    some = worked(room, write(tmp_path / "some.safetensors", decoys(200)), monkeypatch)
    more = worked(room, write(tmp_path / "more.safetensors", decoys(800)), monkeypatch)
    assert 0 < some[1] <= 3 * 5  # of the three that are as large
    assert more[1] == some[1]
    # What is read grows with what was found, and no faster: not with that times the tensors of the version.
    assert more[0] - some[0] <= 6 * (more[2] - some[2])


def test_looks_at_samples_end_too(room, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(effort, "_LOOKS", 10)
    monkeypatch.setattr(effort, "_LOOKS_OF_EACH", 1)
    path = write(tmp_path / "many.safetensors", decoys(40))
    record = room.vault.record(room.vault.find(REF))
    with Suspect.opened(path) as suspect:
        assert Comparison(Originals(room.vault.image(record), record), suspect).stopped


def test_a_report_says_that_not_everything_was_tried(room, tmp_path, monkeypatch):  # noqa: F811
    leak = given(room, HOLDERS[3], copy=True)
    usual = traced(room, write(tmp_path / "leak.safetensors", leak))
    assert STOPPED not in usual["transformations"]
    # What lies as it did is found at once, and names its holder; the rest is what the budget is spent on.
    monkeypatch.setattr(effort, "_OF_EACH", 1)
    hidden = [name for name in leak if "q_proj" in name]
    rows = np.random.default_rng(1).permutation(256)
    there = {name: array for name, array in leak.items() if name not in hidden}
    there |= decoys(900) | {"z.weight": leak[hidden[0]][rows][:, rows]}
    found = traced(room, write(tmp_path / "many.safetensors", there))
    assert found["transformations"][-1] == STOPPED
    assert [each["holder"] for each in found["accused"]] == [HOLDERS[3]]


def test_all_versions_of_a_trace_share_what_it_may_cost(room, tmp_path, monkeypatch):  # noqa: F811
    """However many there are, and however little of each is there: of nothing like it that is said, too."""
    path = write(tmp_path / "some.safetensors", decoys(100))
    attempts, real = [], Effort.attempt

    def counting(self, k, cost):
        done = real(self, k, cost)
        attempts.append(cost if done else 0)
        return done

    monkeypatch.setattr(Effort, "attempt", counting)
    monkeypatch.setattr(effort, "_OF_ELEMENT", 0)
    most = 3 * effort.full((256, 256))
    monkeypatch.setattr(effort, "_OF_TRACE", most)
    found = traced(room, path)
    assert len(found["versions"]) == 2
    assert 0 < sum(attempts) <= most
    assert (found["verdict"], found["transformations"]) == ("unrelated", [STOPPED])
    monkeypatch.setattr(effort, "_OF_TRACE", 10**15)
    attempts.clear()
    traced(room, path)
    assert sum(attempts) > most


def test_a_limit_of_time_ends_a_search_whose_work_does_not(room, tmp_path, monkeypatch):  # noqa: F811
    """What was found by then is told: what lies as it did, whatever else the suspect has."""
    leak = given(room, HOLDERS[3], copy=True)
    there = {name: array for name, array in leak.items() if "q_proj" not in name} | decoys(300)
    path = write(tmp_path / "many.safetensors", there)
    attempts, now, real = [], [0.0], Effort.attempt

    def counting(self, k, cost):
        done = real(self, k, cost)
        attempts.append(done)
        now[0] += done  # each takes a second
        return done

    monkeypatch.setattr(Effort, "attempt", counting)
    monkeypatch.setattr(effort.time, "monotonic", lambda: now[0])

    def search(seconds):
        attempts.clear()
        with Suspect.opened(path) as suspect:
            found = trace(room.vault, suspect, "x", [], weights=None, progress=lambda *_: None, seconds=seconds)
        return found, sum(attempts)

    whole, most = search(None)
    assert STOPPED not in whole.transformations
    assert most > 3
    found, some = search(3)
    assert 0 < some <= 3
    assert found.transformations[-1] == STOPPED
    assert [each.holder for each in found.accused] == [HOLDERS[3]]
    # With none at all it is one that nobody looked at, and says so.
    found, some = search(0)
    assert (some, found.verdict, found.transformations) == (0, "unrelated", [STOPPED])


class TestPatience:
    def test_what_one_leaves_is_for_the_others(self, monkeypatch):
        now = [100.0]
        monkeypatch.setattr(effort.time, "monotonic", lambda: now[0])
        patience = Patience(60)
        assert patience.until(3) == 120
        now[0] = 110
        assert patience.until(2) == 135
        now[0] = 200
        assert patience.until(1) == 200
        assert Patience(None).until(1) == np.inf


class TestPurse:
    def test_what_one_leaves_is_for_the_others(self):
        purse = Purse(10**6, 2)
        most = 10**14 + (10**6 << 15)
        assert purse.share() == most // 2
        purse.spend(10)
        assert purse.share() == most - 10
        purse.spend(most)
        assert purse.share() == 0

    def test_an_effort_has_no_more_than_its_share(self):
        found = Effort(TestEffort.SHAPES, 0)
        cost = effort.full((256, 256))
        found.limit(2 * cost)
        assert [found.attempt(0, cost) for _ in range(3)] == [True, True, False]
        assert (found.spent, found.stopped) == (2 * cost, True)


class TestEffort:
    SHAPES = ((256, 256), (512, 256))

    def test_of_one_tensor_ends_before_that_of_all(self):
        found = Effort(self.SHAPES, 5)
        cost = effort.full((256, 256))
        assert [found.attempt(0, cost) for _ in range(8)] == [True] * 6 + [False] * 2
        assert found.stopped
        assert found.attempt(1, effort.full((512, 256)))

    def test_of_all_is_shared(self):
        found = Effort(((64, 64),) * 3, 0)
        done = sum(found.attempt(k, effort.full((64, 64))) for k in range(3) for _ in range(6))
        assert done == 12

    def test_looks_grow_with_the_tensors_that_there_are(self):
        found = Effort(((8, 8),), 9)
        assert sum(found.look() for _ in range(10**6)) == 100_000 + 64 * 10

    def test_says_nothing_as_long_as_there_is_some(self):
        found = Effort(self.SHAPES, 0)
        assert found.attempt(0, effort.permuted((256, 256), (256, 256)))
        assert found.look()
        assert not found.stopped

    @pytest.mark.parametrize("cost", [effort.permuted, effort.disguised])
    def test_costs_more_the_larger_they_are(self, cost):
        shapes = [(8, 8), (64, 8), (64, 64), (512, 64), (2, 256, 64)]
        costs = [cost(shape, shape) for shape in shapes]
        assert costs == sorted(costs)
        assert cost((64, 64), (32, 64)) < cost((64, 64), (64, 64))
