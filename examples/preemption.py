r"""Leaving in time: a signal, one save on all ranks together, an elastic restart that resumes.

    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun --standalone --nproc-per-node 2 --max-restarts 3 \
        examples/preemption.py --out /tmp/preempted

The script sends SIGTERM to one of its own ranks at step 5, as a scheduler would to one node. All ranks save at the next
step boundary and leave; torchrun starts them again, and they resume from the checkpoint. With ``--signal-at -1
--pause 1`` it is slow and sends nothing, so that you can send SIGTERM, or SIGKILL, to a process that it names. A killed
rank saves nothing; the run then resumes from the last regular checkpoint.

The variable is for torch (2.13), not for shardwise: by default torchrun's rendezvous lends the workers one and the same
key-value store at every start, in which restarted ranks may find the addresses of the ones before and fail to connect.
With it they get a new store each time.
"""

from __future__ import annotations

import argparse
import os
import signal
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from shardwise import CheckpointingConfig, PreemptionGuard

#: EX_TEMPFAIL of sysexits.h: anything but 0, so that torchrun restarts the workers.
TRY_AGAIN = 75


def arguments() -> argparse.Namespace:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="where checkpoints go")
    parser.add_argument("--steps", type=int, default=12, help="steps of the whole run")
    parser.add_argument("--save-every", type=int, default=4, help="steps from one regular checkpoint to the next")
    parser.add_argument("--signal-at", type=int, default=5, help="step at which one rank is sent SIGTERM; -1: never")
    parser.add_argument("--pause", type=float, default=0.0, help="seconds that a step takes longer")
    return parser.parse_args()


def main() -> int:
    """Train, leave when asked, resume when restarted."""
    asked = arguments()
    dist.init_process_group("gloo")
    rank, restarts = dist.get_rank(), int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 1))
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    config = CheckpointingConfig(checkpoint_dir=asked.out, save_consolidated=False, max_recent_checkpoints=2)
    checkpointer = config.build()

    record = checkpointer.restore(model, optimizer)
    first = 0 if record is None or record.step is None else record.step + 1
    print(f"start {restarts}: rank {rank} is process {os.getpid()}, from step {first}", flush=True)

    leaving = False
    # torchrun passes on to its workers a signal that schedulers often send to them directly as well.
    with PreemptionGuard(repeat_window_seconds=2) as guard:
        for step in range(first, asked.steps):
            inputs = torch.randn(8, 16)
            loss = model(inputs).pow(2).mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            time.sleep(asked.pause)
            if step == asked.signal_at and restarts == 0 and rank == dist.get_world_size() - 1:
                os.kill(os.getpid(), signal.SIGTERM)
            leaving, last = checkpointer.asked_to_stop(guard), step == asked.steps - 1
            if leaving or last or (step + 1) % asked.save_every == 0:
                checkpointer.save(
                    step=step,
                    model=model,
                    optimizer=optimizer,
                    metrics={"default": loss.item()},
                    is_final_checkpoint=last,
                )
            if rank == 0:
                print(f"start {restarts}: step {step} done", flush=True)
            if leaving:
                break
        checkpointer.finalize()
    if rank == 0:
        print("asked to leave: saved" if leaving else "finished", flush=True)
    dist.destroy_process_group()
    return TRY_AGAIN if leaving else 0


if __name__ == "__main__":
    raise SystemExit(main())
