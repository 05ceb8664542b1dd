"""``strongroom bench``: how fast this room is read on this machine, next to what the machine can do at all."""

from __future__ import annotations

import contextlib
import statistics
import threading
import time
from typing import TYPE_CHECKING

import click

from strongroom.cli.options import Options, command, pass_options
from strongroom.cli.output import seconds, size, table

if TYPE_CHECKING:
    from collections.abc import Callable

    from strongroom.storage.blobs import Blobs

_PIECE = 8 << 20  # bytes that one core reads before it takes the next


@command(
    "bench",
    explain="""The version is read whole into fresh memory several times: every segment is hashed, checked against
    the signed digest and decrypted. In turn with that, as many bytes of the store's own objects are read on as many
    threads into fresh huge-page memory, with no cryptography: the machine's limit. Both figures depend on what is
    in the page cache; the first round warms it and does not count.""",
)
@click.argument("ref")
@click.option("--repeat", type=click.IntRange(1, 100), default=5, show_default=True, help="How many rounds count.")
@pass_options
def bench(options: Options, ref: str, repeat: int) -> None:
    """Measure how fast this room is read on this machine.

    The comparison with other tools is `make bench`, in the repository.
    """
    from strongroom.core.settings import Settings
    from strongroom.formats.bundle import KeyBundle
    from strongroom.storage.blobs import open_blobs
    from strongroom.storage.image import SealedImage
    from strongroom.storage.reader import ImageReader

    output = options.output
    with options.open() as room:
        url, encoded = room.grant(ref)
    bundle = KeyBundle.decode(encoded)
    ours: list[float] = []
    limit: list[float] = []
    with contextlib.closing(open_blobs(url, create=False)) as blobs:
        sealed = SealedImage.open(blobs, bundle)
        image = sealed.layout.image
        objects = [(pack.name, sealed.manifest.body_bytes(pack)) for pack in sealed.manifest.packs]
        reader, workers = ImageReader(blobs, bundle), Settings.from_environment().workers
        with output.progress(f"bench {bundle.ref}") as progress:
            for done in range(repeat + 1):
                ours.append(_timed(lambda: reader.read_all().release()))
                limit.append(_timed(lambda: _read_plain(blobs, objects, image, workers)))
                progress((done + 1) * image, (repeat + 1) * image)
    ours, limit = ours[1:], limit[1:]
    answer = {
        "ref": bundle.ref,
        "bytes": image,
        "workers": workers,
        "seconds": [round(value, 6) for value in ours],
        "limit_seconds": [round(value, 6) for value in limit],
        "gb_per_s": round(image / statistics.median(ours) / 1e9, 3),
        "limit_gb_per_s": round(image / statistics.median(limit) / 1e9, 3),
        "ratio": round(statistics.median(ours) / statistics.median(limit), 3),
    }
    rows = [
        (
            name,
            seconds(statistics.median(times)),
            seconds(min(times)),
            f"{image / statistics.median(times) / 1e9:.2f} GB/s",
        )
        for name, times in (
            ("whole version, verified and decrypted", ours),
            ("the machine's limit, no cryptography", limit),
        )
    ]
    lines = table((f"{bundle.ref}, {size(image)}", "MEDIAN", "BEST", "RATE"), rows, right=(1, 2, 3))
    output.answer(answer, [*lines, f"{answer['ratio']:.2f} times the limit's time, on {workers} threads"])


def _timed(work: Callable[[], None]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def _read_plain(blobs: Blobs, objects: list[tuple[str, int]], wanted: int, workers: int) -> None:
    """`wanted` bytes of `objects` into fresh anonymous memory, on all cores."""
    from strongroom.storage.reader import abreast, anonymous

    if not wanted:
        return
    view = anonymous(wanted)
    pieces: list[tuple[str, int, memoryview]] = []
    at = 0
    for name, length in objects:
        for offset in range(0, min(length, wanted - at), _PIECE):
            count = min(_PIECE, length - offset, wanted - at)
            pieces.append((name, offset, view[at : at + count]))
            at += count
    queue = iter(pieces)
    lock = threading.Lock()
    failures: list[BaseException] = []

    def work() -> None:
        while not failures:
            with lock:
                piece = next(queue, None)
            if piece is None:
                return
            blobs.read_into(*piece)

    abreast(work, workers, failures)
