"""``python -m strongroom.redteam URL MODEL``: find the hidden size of a model that somebody else serves, by its
log-probabilities. The API key is in STRONGROOM_TARGET_KEY, the secret of a private channel, if any, in
STRONGROOM_TARGET_CHANNEL. One JSON object on stdout."""

from __future__ import annotations

import argparse
import dataclasses
import os

import numpy as np

from strongroom.cli.output import Output
from strongroom.redteam.extraction import ATTACKS, Known, Setup, run
from strongroom.redteam.target import Target


def main() -> None:
    """What was found, and what it cost."""
    parser = argparse.ArgumentParser(prog="strongroom.redteam", description=__doc__)
    parser.add_argument("url", help="up to and with /v1")
    parser.add_argument("model")
    parser.add_argument("--attack", default="allowed tokens", choices=list(ATTACKS))
    parser.add_argument("--words", type=int, required=True, help="the size of the vocabulary")
    parser.add_argument("--up-to", type=int, default=1024, help="the largest hidden size that is looked for")
    given = parser.parse_args()
    # Which tokens they are makes no difference, so they are spread over the vocabulary.
    numbers = np.linspace(0, given.words - 1, min(2 * given.up_to + 1, given.words)).astype(int).tolist()
    nothing = np.zeros((given.words, 1))  # the true layer is not known here, and is not needed for its width
    setup = Setup([Known(number, f"{number}") for number in numbers], given.words, given.up_to, nothing)
    key, channel = (os.environ.get(f"STRONGROOM_TARGET_{name}") or None for name in ("KEY", "CHANNEL"))
    target = Target(given.url, given.model, key=key, headers={"strongroom-channel": channel} if channel else None)
    try:
        found = run(target, setup, given.attack)
    finally:
        target.close()
    said = {name: value for name, value in dataclasses.asdict(found).items() if name not in ("verdict", "overlap")}
    Output(json=True).answer({**said, "codes": dict(target.cost.codes)})


if __name__ == "__main__":
    main()
