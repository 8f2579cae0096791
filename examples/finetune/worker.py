"""What one process of a run does: build, load or resume, train, save. ``torchrun -m examples.finetune.worker TASK``."""

from __future__ import annotations

import os
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from examples.finetune.events import Finished, Ready, Resumed, Saved, Saving, Started, Stepped, append
from examples.finetune.task import Task
from examples.finetune.texts import SENTENCES, make_blocks, share

from shardwise.disk.processes import process_exists

if TYPE_CHECKING:
    import torch
    from examples.finetune.events import Event
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from shardwise import Checkpointer

_PATROL_SECONDS = 0.5
_ORPHANED = 3


@dataclass(frozen=True)
class Run:
    """What a run works with, on one rank."""

    task: Task
    rank: int
    world_size: int
    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    tokenizer: PreTrainedTokenizerBase
    batch: torch.Tensor
    checkpointer: Checkpointer

    def tell(self, event: Event) -> None:
        """Send an event, on rank 0."""
        if self.rank == 0:
            append(self.task.events, event)


def leave_with(orchestrator: int, launcher: int) -> None:
    """End this process soon after the orchestrator or ``torchrun`` is gone, however they went."""

    def patrol() -> None:
        while os.getppid() == launcher and process_exists(orchestrator):
            time.sleep(_PATROL_SECONDS)
        os._exit(_ORPHANED)

    threading.Thread(target=patrol, name="patrol", daemon=True).start()


def build_model(base: Path, world_size: int) -> nn.Module:
    """The base model's architecture without memory, sharded layer by layer over all processes (FSDP2).

    The weights stay in the base model's dtype; the arithmetic is float32, which is faster on most CPUs.
    """
    import torch
    from torch import nn
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(base)
    dtype = config.dtype if config.dtype in (torch.bfloat16, torch.float32) else torch.float32
    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=dtype)
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("dp",))
    policy = MixedPrecisionPolicy(param_dtype=torch.float32, reduce_dtype=torch.float32)
    stacks = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    # The first is the stack of layers; those within layers (experts) belong to their layer.
    for layer in stacks[0] if stacks else ():
        fully_shard(layer, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    return model


def make_run(task: Task, rank: int, world_size: int) -> Run:
    """Build everything and load the base weights. All ranks call."""
    import torch
    from transformers import AutoTokenizer

    from shardwise import CheckpointingConfig

    config = CheckpointingConfig(
        checkpoint_dir=task.checkpoints,
        model_repo_id=str(task.base),
        save_consolidated="every",
        best_metric_key="loss",
        max_recent_checkpoints=2,
        collective_timeout_seconds=600,
    )
    checkpointer = config.build()
    model = build_model(task.base, world_size)
    checkpointer.load_base_model(model, "cpu", None, str(task.base))
    optimizer = torch.optim.AdamW(model.parameters(), lr=task.learning_rate)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.5, total_iters=task.steps)
    tokenizer = AutoTokenizer.from_pretrained(task.base)
    blocks = make_blocks(tokenizer(" ".join(SENTENCES))["input_ids"])
    batch = torch.tensor(share(blocks, rank, world_size))
    return Run(task, rank, world_size, model, optimizer, scheduler, tokenizer, batch, checkpointer)


def mean_loss(run: Run, *, train: bool) -> float:
    """Loss over all blocks of all processes; with ``train``, gradients too. All ranks call."""
    import torch
    import torch.distributed as dist

    with torch.set_grad_enabled(train):
        loss = run.model(input_ids=run.batch, labels=run.batch).loss
    if train:
        loss.backward()
    total = loss.detach().double()
    dist.all_reduce(total)
    return float(total) / run.world_size


def train_step(run: Run, step: int) -> float:
    """One step; returns the loss before its update. All ranks call."""
    begun = time.monotonic()
    loss = mean_loss(run, train=True)
    run.optimizer.step()
    run.optimizer.zero_grad()
    run.scheduler.step()
    run.tell(Stepped(step, loss, time.monotonic() - begun))
    return loss


def save_and_measure(run: Run, step: int, loss: float, progress: dict[str, object]) -> None:
    """Save a checkpoint, then write the same state raw, both timed from barrier to barrier. All ranks call."""
    import torch.distributed as dist
    from examples.finetune.raw_write import local_tensors, raw_write

    run.tell(Saving(step))
    dist.barrier()
    begun = time.monotonic()
    path = run.checkpointer.save(
        step=step,
        model=run.model,
        optimizer=run.optimizer,
        scheduler=run.scheduler,
        tokenizer=run.tokenizer,
        metrics={"loss": loss},
        extra_state={"progress": progress},
        is_final_checkpoint=step == run.task.steps,
    )
    dist.barrier()
    seconds = time.monotonic() - begun
    assert path is not None
    tensors = list(local_tensors(run.model, run.optimizer))
    dist.barrier()
    begun = time.monotonic()
    own = raw_write(tensors, run.task.scratch / f"raw-{run.rank}")
    dist.barrier()
    raw_seconds = time.monotonic() - begun
    run.tell(Saved(step, path.name, seconds, raw_seconds, _sum(own)))


def _sum(value: int) -> int:
    import torch
    import torch.distributed as dist

    total = torch.tensor(value, dtype=torch.int64)
    dist.all_reduce(total)
    return int(total)


def resume(run: Run, progress: dict[str, object]) -> int:
    """Restore the newest checkpoint, if there is one; returns the step to go on from. All ranks call."""
    begun = time.monotonic()
    record = run.checkpointer.restore(run.model, run.optimizer, run.scheduler, extra_state={"progress": progress})
    if record is None:
        return 0
    step = progress["step"]
    assert isinstance(step, int)
    assert step == record.step
    run.tell(Resumed(step, record.path.name, int(str(progress["world_size"])), time.monotonic() - begun))
    return step


def train(task: Task, rank: int, world_size: int, begun: float) -> None:
    """The whole run. All ranks call."""
    run = make_run(task, rank, world_size)
    sizes = [(p.numel(), p.element_size()) for p in run.model.parameters()]
    elements, nbytes = sum(n for n, _ in sizes), sum(n * size for n, size in sizes)
    run.tell(Ready(world_size, elements, nbytes, time.monotonic() - begun))
    progress: dict[str, object] = {}
    first = resume(run, progress) + 1
    with run.checkpointer:
        for step in range(first, task.last_step + 1):
            loss = train_step(run, step)
            progress |= {"step": step, "world_size": world_size}
            save_and_measure(run, step, loss, progress)
        run.tell(Finished(mean_loss(run, train=False)))


def main(arguments: list[str]) -> None:
    """Entry point of each process that ``torchrun`` starts."""
    begun = time.monotonic()
    launcher = os.getppid()
    task = Task.read(Path(arguments[0]))
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    append(task.events, Started(rank, os.getpid()))
    leave_with(task.orchestrator, launcher)

    import torch
    import torch.distributed as dist

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    dist.init_process_group("gloo")
    try:
        train(task, rank, world_size, begun)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
