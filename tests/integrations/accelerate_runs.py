"""Runs of a `ShardwiseAccelerator` in processes of their own, on one or two ranks."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tests.integrations.runs import announce, die_when_opening, digest, errors_of, launch, model, rows
from torch.utils.data import DataLoader


@dataclass(frozen=True)
class Run:
    """A training of two epochs of 40 samples.

    Attributes:
        directory: The ``project_dir``.
        world: Number of ranks.
        fsdp: Sharded with FSDP2; otherwise several ranks train with DistributedDataParallel.
        batch: Samples of one rank in a step.
        steps: It ends after so many.
        save_every: Steps between states.
        is_async: They are written in the background.
        named: States go to one directory, again and again, instead of numbered ones.
        data: How batches are made: plain, seedable, stateful, or dispatch.
        workers: Processes that make them; tokens are then replaced at random.
        scaler: Losses are scaled, by a factor that grows every 7 steps.
        models: Number of models, each with an optimizer.
        lora: An adapter is trained.
        dropout: How much of it.
        killed_in: Rank 0 dies when it opens a file of tensors below such a path.
    """

    directory: Path
    world: int = 1
    fsdp: bool = False
    batch: int = 4
    steps: int = 18
    save_every: int = 3
    is_async: bool = False
    named: bool = False
    data: str = "plain"
    workers: int = 0
    scaler: bool = False
    models: int = 1
    lora: bool = False
    dropout: float = 0.1
    killed_in: str = ""


@dataclass(frozen=True)
class Result:
    """What became of it, as rank 0 says.

    Attributes:
        losses: By step, of this run's steps.
        weights: A digest for each model, and the factor by which losses are scaled.
        started: The step that it went on from.
        samples: By step, a number that depends on which samples all ranks together had.
    """

    losses: dict[int, float]
    weights: list[str]
    started: int
    samples: dict[int, int] = field(default_factory=dict)


def result_of(said: str) -> Result:
    """What rank 0 has printed."""
    table = json.loads(said.splitlines()[-1])
    losses, samples = ({int(step): each for step, each in table.get(of, {}).items()} for of in ("losses", "samples"))
    return Result(losses, table["weights"], table["started"], samples)


def result(run: Run, tmp_path: Path) -> Result:
    """Train, and return what came of it."""
    codes = launch(_rank, run, run.world, tmp_path)
    assert codes == [0] * run.world, errors_of(run.world, tmp_path)
    return result_of((tmp_path / "rank-0").read_text())


def train(run: Run, tmp_path: Path) -> list[int]:
    """Train, and return the ranks' exit codes."""
    return launch(_rank, run, run.world, tmp_path)


class Progress:
    """What the script counts."""

    def __init__(self) -> None:
        self.epoch = self.batches = self.steps = 0

    def state_dict(self) -> dict[str, int]:
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, int]) -> None:
        vars(self).update(state)


def masked(samples: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """A batch in which some tokens are replaced at random."""
    ids = torch.stack([sample["input_ids"] for sample in samples])
    ids = torch.where(torch.rand(ids.shape) < 0.2, random.randrange(128), ids)
    return {"input_ids": ids, "labels": ids}


def accelerator_of(run: Run) -> Any:
    from accelerate.utils import (
        DataLoaderConfiguration,
        DistributedType,
        FullyShardedDataParallelPlugin,
        ProjectConfiguration,
        set_seed,
    )

    from shardwise import CheckpointingConfig
    from shardwise.integrations.accelerate import ShardwiseAccelerator

    set_seed(0)
    made = ShardwiseAccelerator(
        cpu=True,
        project_config=ProjectConfiguration(
            str(run.directory), automatic_checkpoint_naming=not run.named, total_limit=2
        ),
        dataloader_config=DataLoaderConfiguration(
            use_seedable_sampler=run.data == "seedable",
            use_stateful_dataloader=run.data == "stateful",
            dispatch_batches=True if run.data == "dispatch" else None,
        ),
        checkpointing=CheckpointingConfig(is_async=run.is_async, save_consolidated="every"),
    )
    if run.fsdp:  # which accelerate turns on only where there are accelerators
        made.state.distributed_type = DistributedType.FSDP
        made.state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    if run.scaler:  # which accelerate makes only for accelerators
        made.scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=7)
    return made


def loader_of(run: Run) -> DataLoader[Any]:
    return DataLoader(
        rows(40, 1),  # type: ignore[arg-type]
        batch_size=run.batch,
        shuffle=True,
        num_workers=run.workers,
        multiprocessing_context="fork" if run.workers else None,  # whose processes end with a rank that is killed
        collate_fn=masked if run.workers else None,
    )


def _rank(run: Run, rank: int, port: int) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    multiprocessing.current_process().daemon = False  # which may not have workers
    if run.world > 1 or run.fsdp:
        announce(rank, run.world, port)
    if run.killed_in and rank == 0:
        die_when_opening(run.killed_in)
    accelerator = accelerator_of(run)
    models = [model(lora=run.lora, dropout=run.dropout) for _ in range(run.models)]
    optimizers = [torch.optim.AdamW([p for p in each.parameters() if p.requires_grad], lr=2e-3) for each in models]
    schedulers = [torch.optim.lr_scheduler.LinearLR(each, 1.0, 0.1, total_iters=20) for each in optimizers]
    loader = loader_of(run)
    prepared = accelerator.prepare(*models, *optimizers, *schedulers, loader)
    models, optimizers = list(prepared[: run.models]), list(prepared[run.models : 2 * run.models])
    schedulers, loader = list(prepared[2 * run.models : -1]), prepared[-1]
    progress = Progress()
    accelerator.register_for_checkpointing(progress)
    path = run.directory / "state"
    if path.is_dir() if run.named else (run.directory / "checkpoints").is_dir():
        accelerator.load_state(path if run.named else None)
    started, losses, samples = progress.steps, {}, {}
    while progress.steps < run.steps:
        stateful = run.data == "stateful"
        for batch in loader if stateful else accelerator.skip_first_batches(loader, progress.batches):
            loss = sum(each(**batch).loss for each in models)
            accelerator.backward(loss)
            for each in (*optimizers, *schedulers):
                each.step()
            for each in optimizers:
                each.zero_grad()
            progress.steps, progress.batches = progress.steps + 1, progress.batches + 1
            losses[progress.steps] = float(accelerator.reduce(loss.detach(), "mean"))
            samples[progress.steps] = int(accelerator.reduce(batch["input_ids"].sum(), "sum"))
            if progress.steps % run.save_every == 0:
                accelerator.save_state(path if run.named else None)
            if progress.steps == run.steps:
                break
        progress.epoch, progress.batches = progress.epoch + 1, 0
    for number, each in enumerate(models):
        accelerator.save_model(each, run.directory / f"final-{number}")
    accelerator.wait_for_saves()
    weights = [digest(each) for each in models] + [str(each.get_scale()) for each in [accelerator.scaler] if each]
    print(json.dumps({"losses": losses, "samples": samples, "weights": weights, "started": started}))
    if dist.is_initialized():
        accelerator.end_training()
