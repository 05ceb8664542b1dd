"""From the room onto a GPU: `python -m bench.device --device cuda` writes docs/reference/bench-device.md.

Three ways, in turn, after a first round of each that is not counted: what the room decrypts, verifies and sends through
pinned buffers; the same through the whole model in host memory; and safetensors, which neither decrypts nor verifies.
"""

from __future__ import annotations

import argparse
import gc
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bench import model as models
from bench import page
from bench.ours import REF, WEIGHTS
from strongroom.client.room import Room

PAGE = Path("docs/reference/bench-device.md")


def main() -> None:
    import torch
    from safetensors.torch import load_file

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", help="as torch names it")
    parser.add_argument("--size", type=float, default=2e9, help="of the model, bytes")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--work", type=Path, help="a folder for twice the model")
    given = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="strongroom-device-", dir=given.work))
    try:
        model = models.generate(work / "model", models.shape_of(int(given.size)), name="device", title="generated")
        room, _ = Room.init(work / "room", owner="user/owner", custody="solo")
        room.put(model.directory, WEIGHTS)

        def ours() -> Mapping[str, Any]:
            with room.load(REF) as weights:
                return weights.torch(given.device)

        def through_memory() -> Mapping[str, Any]:
            with room.load(REF) as weights:
                return {name: tensor.to(given.device) for name, tensor in weights.torch().items()}

        def plain() -> Mapping[str, Any]:
            return {name: t for file in model.files for name, t in load_file(file, device=given.device).items()}

        ways: dict[str, Callable[[], Mapping[str, Any]]] = {
            "safetensors, in plaintext and unverified": plain,
            "**strongroom**, straight onto the device": ours,
            "strongroom, through the whole model in memory": through_memory,
        }
        taken: dict[str, list[float]] = {name: [] for name in ways}
        for number in range(given.rounds + 1):
            for name, way in ways.items():
                begun = time.perf_counter()
                tensors = way()
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                if number:
                    taken[name].append(time.perf_counter() - begun)
                assert len(tensors) == model.tensors
                del tensors
                gc.collect()
    finally:
        shutil.rmtree(work, ignore_errors=True)
    medians = {name: statistics.median(each) for name, each in taken.items()}
    least = medians["safetensors, in plaintext and unverified"]
    what = torch.cuda.get_device_name(given.device) if given.device.startswith("cuda") else given.device
    lines = [
        f"A generated bf16 model of {model.bytes / 1e9:.2f} GB onto one {what}, {len(os.sched_getaffinity(0))} cores, "
        f"files in the page cache or in memory, PyTorch {torch.__version__}; medians of {given.rounds} "
        f"(`python -m bench.device --device {given.device}`).",
        "",
        "| how | s | GB/s | × safetensors' time |",
        "|---|--:|--:|--:|",
        *(
            f"| {name} | {median:.2f} | {model.bytes / median / 1e9:.2f} | {median / least:.2f} |"
            for name, median in medians.items()
        ),
    ]
    page.write(PAGE, "device", "\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
