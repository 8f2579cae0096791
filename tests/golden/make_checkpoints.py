"""Writes the golden checkpoints. Two ranks: ``torchrun --nproc-per-node 2 -m tests.golden.make_checkpoints OUT``.

What is in ``checkpoints/`` was written by the commit that its manifests name, before the layout of the source was
rebuilt. It is not to be written anew: that old checkpoints restore is what it is for.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch.distributed as dist
from tests.golden import runs


def main(out: Path) -> None:
    dist.init_process_group("gloo")
    for name in runs.RUNS:
        model, optimizer, scheduler = runs.made(name, filled=True)
        checkpointer = runs.checkpointer(name, out)
        checkpointer.save(0, runs.STEP, model, optimizer, scheduler, extra_state={"consumed": runs.Consumed(96)})
        checkpointer.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
