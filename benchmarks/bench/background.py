"""Asynchronous saving: how long training stands still, and what the background costs it."""

from __future__ import annotations

import filecmp
import math
import statistics
import time
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from bench.measure import Row, Samples, measure
from bench.models import local_tensors, sharded, total_bytes
from bench.ranks import Rank, Settings, run_ranks
from bench.raw import copy
from bench.saving import removed
from shardwise import Checkpointer, CheckpointingConfig


def _config(rank: Rank, *, is_async: bool) -> CheckpointingConfig:
    return CheckpointingConfig(checkpoint_dir=rank.directory, save_consolidated="every", is_async=is_async)


def _stall(rank: Rank, ahead: bool) -> list[Row]:
    mesh = init_device_mesh("cpu", (rank.world_size,), mesh_dim_names=("dp",))
    model = sharded(rank.settings.size, mesh, seed=rank.rank)
    sources, nbytes = local_tensors(model), total_bytes(model)
    targets = [torch.zeros_like(t) for t in sources]
    target, plain = rank.directory / "target", rank.directory / "plain"
    samples = Samples()
    same = "files equal to a synchronous save's"
    with Checkpointer(_config(rank, is_async=True), rank.rank, 0, 0) as checkpointer:

        def stall() -> None:
            checkpointer.save_model(model, target)
            checkpointer.maybe_wait_for_staging()

        copy(sources, targets)
        if ahead:
            # As at the start of a run: there is nothing to resume yet.
            checkpointer.restore(model)
        for turn in range(rank.settings.repeats + 1 if ahead else 1):
            reference = measure(lambda: copy(sources, targets))
            sample = measure(stall)
            checkpointer.async_wait()
            if turn:
                samples.measured.append(sample)
                samples.reference.append(reference)
            else:
                samples.first, copied = sample, reference
                with Checkpointer(_config(rank, is_async=False), rank.rank, 0, 0) as direct:
                    direct.save_model(model, plain)
                if rank.rank == 0 and (different := _different(target / "model", plain / "model")):
                    same = f"DIFFER from a synchronous save's: {different}"
                removed(rank, plain)
            removed(rank, target)
    assert samples.first is not None
    rows = [samples.row("async stall", "copy in memory", 1.1, nbytes, note=same)] if ahead else []
    first = Row(
        "async stall, first save" + ("" if ahead else " of all"),
        samples.first.seconds,
        "copy in memory",
        copied.seconds,
        samples.first.seconds / copied.seconds,
        target=1.5 if ahead else None,
        peak_mib=samples.first.peak,
        nbytes=nbytes,
        note="one sample" if ahead else "one sample; no restore before it, so it makes the staging memory too",
    )
    return [*rows, first]


def _different(left: Path, right: Path) -> str:
    names = {p.relative_to(left) for p in left.rglob("*") if p.is_file()}
    names |= {p.relative_to(right) for p in right.rglob("*") if p.is_file()}
    unlike = (
        str(name)
        for name in sorted(names)
        if not ((left / name).is_file() and (right / name).is_file())
        or not filecmp.cmp(left / name, right / name, shallow=False)
    )
    return next(unlike, "")


def async_stall(settings: Settings) -> list[Row]:
    """Time until training may go on, against a copy of the same bytes into warm memory."""
    return run_ranks(partial(_stall, ahead=True), settings) + run_ranks(partial(_stall, ahead=False), settings)


class _Training:
    """A small model that trains on one core: steps of some tens of milliseconds."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self._model = nn.Sequential(*(nn.Linear(512, 512) for _ in range(12)))
        self._optimizer = torch.optim.AdamW(self._model.parameters())
        self._batch = torch.randn(128, 512)

    def step(self) -> tuple[float, float]:
        """One step; returns its wall-clock and processor seconds on this thread."""
        started, cpu = time.perf_counter(), time.thread_time()
        self._model(self._batch).square().mean().backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        return time.perf_counter() - started, time.thread_time() - cpu


def _steps(rank: Rank) -> list[Row]:
    model = sharded(rank.settings.size / 2, None)
    training, target = _Training(), rank.directory / "target"
    for _ in range(40):
        training.step()
    alone: list[float] = []
    during: list[float] = []
    ratios, cpu_ratios = [], []
    with Checkpointer(_config(rank, is_async=True), 0, 0, 0) as checkpointer:
        for turn in range(2 * rank.settings.repeats + 1):
            quiet = [training.step() for _ in range(10)]
            checkpointer.save_model(model, target)
            checkpointer.maybe_wait_for_staging()
            busy = []
            while not (target / "model").exists():
                busy.append(training.step())
            checkpointer.async_wait()
            removed(rank, target)
            # Before and after, since the machine's speed drifts by more than what is looked for.
            quiet += [training.step() for _ in range(10)]
            if turn and len(busy) > 1:
                # The step in which the save ended is only partly concurrent with it.
                busy.pop()
                alone += [w for w, _ in quiet]
                during += [w for w, _ in busy]
                ratios.append(statistics.mean(w for w, _ in busy) / statistics.mean(w for w, _ in quiet))
                cpu_ratios.append(statistics.mean(c for _, c in busy) / statistics.mean(c for _, c in quiet))
    if not ratios:
        return [Row("training step during a save", math.nan, note="saves ended within a step; use a larger --size")]
    return [
        Row(
            "training step during a save",
            statistics.mean(during),
            "without",
            statistics.mean(alone),
            statistics.median(ratios),
            (min(ratios), max(ratios)),
            statistics.median(cpu_ratios),
            1.05,
            nbytes=total_bytes(model),
            note=f"1 rank, 1 thread, {len(during)} steps during {len(ratios)} saves",
        )
    ]


def async_steps(settings: Settings) -> list[Row]:
    """Training steps while a save is written in the background, one process with one thread: one core stays free."""
    return run_ranks(_steps, settings, 1)
