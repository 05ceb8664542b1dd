"""The benchmark: Strongroom beside the other ways of getting weights into memory, in one run on one machine.

Run from the repository root::

    python -m bench            # 2 GiB, five rounds, writes docs/reference/bench.md
    python -m bench --quick    # 256 MiB, two rounds, prints the page

`model` makes the models, `reader` says what a reader is, `peers`, `ours` and `limit` are the readers, `measure` takes
one measurement in a fresh child process, `perplexity` compares answers, `report` writes the page.
"""
