"""The image as put reads it: memory is used again, and nothing of what was in it before gets into the image."""

from contextlib import ExitStack
from fractions import Fraction

from strongroom.formats.suites import Suite
from strongroom.vault.put import ImageStream, Plan
from strongroom.vault.source import ModelSource


def test_the_gap_between_files_is_zero_in_memory_that_was_used_before(tmp_path):
    for name, size in (("a", 4096), ("b", 100), ("c", 3000)):
        (tmp_path / name).write_bytes(b"\xff" * size)
    plan = Plan.of(ModelSource.scan(tmp_path), share=Fraction(0), positions=0, suite=Suite.BLAKE3)
    with ExitStack() as stack:
        stream = ImageStream(plan.source, plan.layout, stack)
        first = stream.read(2048)
        assert first == b"\xff" * 2048
        stream.give_back(first)
        again = stream.read(2048)
        assert again.obj is first.obj
        stream.give_back(again)
        assert stream.read(2048) == b"\xff" * 100 + bytes(28) + b"\xff" * 1920
