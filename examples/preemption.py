"""Leaving in time: a signal, one save on all ranks together, an elastic restart that resumes.

    torchrun --standalone --nproc-per-node 2 --max-restarts 1 examples/preemption.py --out /tmp/preempted

The script sends SIGTERM to one of its own ranks at step 5, as a scheduler would to one node. All ranks save at the next
step boundary and leave; torchrun starts them again, and they resume from the checkpoint.
"""

from __future__ import annotations

import argparse
import os
import signal
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from shardwise import CheckpointingConfig, PreemptionGuard

STEPS = 12
ASKED_AT = 5
#: EX_TEMPFAIL of sysexits.h: anything but 0, so that torchrun restarts the workers.
TRY_AGAIN = 75


def main() -> int:
    """Train, leave when asked, resume when restarted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="where checkpoints go")
    out = parser.parse_args().out
    dist.init_process_group("gloo")
    rank, restarts = dist.get_rank(), int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 1))
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    config = CheckpointingConfig(checkpoint_dir=out, save_consolidated=False, max_recent_checkpoints=2)
    checkpointer = config.build(dp_rank=rank, tp_rank=0, pp_rank=0)

    record = checkpointer.restore(model, optimizer)
    first = 0 if record is None or record.step is None else record.step + 1
    if rank == 0:
        print(f"start {restarts}: from step {first}", flush=True)

    # torchrun passes on to its workers a signal that schedulers often send to them directly as well.
    with PreemptionGuard(repeat_window_seconds=2) as guard:
        for step in range(first, STEPS):
            inputs = torch.randn(8, 16)
            loss = model(inputs).pow(2).mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if step == ASKED_AT and restarts == 0 and rank == dist.get_world_size() - 1:
                os.kill(os.getpid(), signal.SIGTERM)
            if checkpointer.asked_to_stop(guard):
                path = checkpointer.save(0, step, model, optimizer, metrics={"default": loss.item()})
                checkpointer.finalize()
                if rank == 0:
                    print(f"asked to leave: saved {path}", flush=True)
                dist.destroy_process_group()
                return TRY_AGAIN
    checkpointer.save(0, STEPS, model, optimizer, is_final_checkpoint=True)
    checkpointer.finalize()
    if rank == 0:
        print("finished", flush=True)
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
