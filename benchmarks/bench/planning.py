"""Planning at scale, simulated: real specs and plans of one rank among many, no processes and no memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch

from bench.measure import Row
from bench.ranks import Settings
from shardwise.comm import Group
from shardwise.engine.computed import ComputedPlan
from shardwise.engine.export import Copies, ExportOptions, ExportPlan, export_record, plan_export
from shardwise.engine.memo import Memo
from shardwise.format.manifest import Manifest, encode_manifest
from shardwise.plan.fragments import HeldTensor, Part, hold
from shardwise.plan.layout import Layout, lay_out
from shardwise.plan.placement import MeshKey, Sharded, chunk
from shardwise.plan.reads import SourceChunk, SourceTensor, plan_reads
from shardwise.plan.roster import Declaration, Roster
from shardwise.plan.schedule import Schedule, schedule
from shardwise.types import Box, TensorSpec

T = TypeVar("T")
TENSORS, RANKS = 40_000, 1_024
_MESH = MeshKey(("dp",), (RANKS,))
_PLACEMENTS = (Sharded(0),)
_SHAPES = ((4096, 2048), (2048,), (2048, 1408), (1408, 2048))


def _specs(tensors: int) -> list[TensorSpec]:
    return [
        TensorSpec(f"model.layers.{n // 400}.mlp.experts.{n % 400}.weight", _SHAPES[n % len(_SHAPES)], "BF16")
        for n in range(tensors)
    ]


def _memory(specs: list[TensorSpec], rank: int) -> list[torch.Tensor]:
    """The local tensors, which a training has anyway."""
    return [
        torch.empty((chunk(spec.shape[0], RANKS, rank)[1], *spec.shape[1:]), dtype=torch.bfloat16, device="meta")
        for spec in specs
    ]


def _held(specs: list[TensorSpec], rank: int, memory: list[torch.Tensor]) -> list[HeldTensor]:
    return [
        hold(spec, Part(spec.shape, _MESH, _PLACEMENTS), (rank,), local)
        for spec, local in zip(specs, memory, strict=True)
    ]


@dataclass
class _Clock:
    """Adds up the processor time of steps."""

    seconds: float = 0.0

    def run(self, step: Callable[[], T]) -> T:
        started = time.process_time()
        result = step()
        self.seconds += time.process_time() - started
        return result


@dataclass(frozen=True)
class _Planned:
    rank: float
    coordinator: float
    later: float
    load: float


def _roster(held: list[HeldTensor]) -> Roster:
    own = Declaration.of(held)
    roster = Roster({own.digest: own}, (own.digest,) * RANKS, tuple({_MESH: (r,)} for r in range(RANKS)))
    _ = roster.specs
    roster.check_complete(held)
    return roster


def _sources(layout: Layout) -> dict[str, SourceTensor]:
    return {
        entry.spec.name: SourceTensor(
            entry.spec, (SourceChunk(Box.whole(entry.spec.shape), number, len(file.header) + entry.begin),)
        )
        for number, file in enumerate(layout.files)
        for entry in file.entries
    }


def _plan(tensors: int) -> _Planned:
    specs = _specs(tensors)
    memory = _memory(specs, 517)
    rank, later, load = _Clock(), _Clock(), _Clock()
    held = rank.run(lambda: _held(specs, 517, memory))
    roster = rank.run(lambda: _roster(held))
    layout = rank.run(lambda: lay_out(roster.specs))
    work: Schedule = rank.run(lambda: schedule(held, layout, roster, 517))

    # The coordinator does the same and also puts the manifest together.
    coordinator = _Clock(rank.seconds)
    options = ExportOptions()
    plan = ExportPlan(Path("consolidated"), options, layout, work, held, ComputedPlan(), Copies())
    crcs = dict.fromkeys((spec.name for spec in specs), 1)
    record = coordinator.run(lambda: export_record(plan, crcs))
    coordinator.run(lambda: encode_manifest(Manifest(record.files, record.tensors, {})))

    memo: Memo[ExportPlan] = Memo()
    inputs = [*held, roster]
    memo.get(inputs, (options, Copies()), lambda: plan)
    known = later.run(
        lambda: memo.get(inputs, (options, Copies()), lambda: plan_export(held, roster, Group(), Path(), options))
    )
    later.run(lambda: replace(known, directory=Path("consolidated")))

    sources = load.run(lambda: _sources(layout))
    load.run(lambda: [read for tensor in held for read in plan_reads(sources[tensor.spec.name], tensor)])
    return _Planned(rank.seconds, coordinator.seconds, later.seconds, load.seconds)


def planning(settings: Settings) -> list[Row]:
    """Seconds of one core to plan a save and a load of 40,000 tensors on 1,024 ranks, and of half as many."""
    whole = [_plan(TENSORS) for _ in range(min(settings.repeats, 3))]
    half = _plan(TENSORS // 2)

    def row(name: str, limit: str, values: list[float], of_half: float) -> Row:
        seconds = statistics.median(values)
        return Row(name, seconds, note=f"processor time; wanted: {limit}; {of_half:.3f} s for half the tensors")

    return [
        row("plan, first save, a rank", "1 s", [p.rank for p in whole], half.rank),
        row("plan, first save, coordinator", "5 s", [p.coordinator for p in whole], half.coordinator),
        row("plan, later save, a rank", "0.05 s", [p.later for p in whole], half.later),
        row("plan, load, a rank", "1 s", [p.load for p in whole], half.load),
    ]
