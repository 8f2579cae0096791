"""Planning at scale, simulated: real tensors, specs and plans of one rank among many, no processes and no memory."""

from __future__ import annotations

import contextlib
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from bench.measure import Row
from bench.ranks import Settings
from shardwise.comm import Group, JsonValue
from shardwise.engine.computed import ComputedPlan
from shardwise.engine.export import Copies, ExportOptions, ExportPlan, export_record, plan_export
from shardwise.engine.memo import Memo
from shardwise.engine.rosters import RosterKeeper
from shardwise.format.manifest import Manifest, encode_manifest
from shardwise.plan.fragments import HeldTensor
from shardwise.plan.layout import Layout, lay_out
from shardwise.plan.placement import chunk
from shardwise.plan.reads import SourceChunk, SourceTensor, plan_reads
from shardwise.plan.schedule import Schedule, schedule
from shardwise.stateful_wrappers.tensors import MeshRegister, held_tensors
from shardwise.types import Box, TensorSpec

T = TypeVar("T")
TENSORS, RANKS, RANK = 40_000, 1_024, 517
_SHAPES = ((4096, 2048), (2048,), (2048, 1408), (1408, 2048))


def _specs(tensors: int) -> list[TensorSpec]:
    return [
        TensorSpec(f"model.layers.{n // 400}.mlp.experts.{n % 400}.weight", _SHAPES[n % len(_SHAPES)], "BF16")
        for n in range(tensors)
    ]


@contextlib.contextmanager
def _one_of_many() -> Iterator[DeviceMesh]:
    """A mesh of which this process is one rank, and the only one that exists."""
    dist.init_process_group("fake", rank=RANK, world_size=RANKS, store=FakeStore())
    try:
        yield init_device_mesh("cpu", (RANKS,), mesh_dim_names=("dp",))
    finally:
        dist.destroy_process_group()


class _Alike(Group):
    """A group whose other ranks declare what this one does, and stand elsewhere in the mesh."""

    def __init__(self) -> None:
        super().__init__()
        self.rank, self.world_size = RANK, RANKS

    def agree(self, failure: BaseException | None, what: str, flag: bool = False) -> bool:
        """As if no other rank had anything to say."""
        if failure is not None:
            raise failure
        return flag

    def gather_json(self, value: JsonValue, what: str = "gathering") -> list[JsonValue]:
        """This rank's row, with each rank's coordinate."""
        digest, [[names, shape, ordinal, _]] = cast(tuple[str, list[list[JsonValue]]], value)
        rows = (json.dumps([digest, [[names, shape, ordinal, [rank]]]]) for rank in range(RANKS))
        return [cast(JsonValue, json.loads(row)) for row in rows]

    def broadcast_json(self, value: JsonValue, source: int = 0, what: str = "broadcasting") -> JsonValue:
        """What this rank has itself."""
        return value


def _parameters(specs: list[TensorSpec], mesh: DeviceMesh) -> list[tuple[str, torch.Tensor]]:
    """The parameters, which a training has anyway."""
    found: list[tuple[str, torch.Tensor]] = []
    for spec in specs:
        rows = chunk(spec.shape[0], RANKS, RANK)[1]
        local = torch.empty((rows, *spec.shape[1:]), dtype=torch.bfloat16, device="meta")
        whole = DTensor.from_local(
            local, mesh, [Shard(0)], run_check=False, shape=torch.Size(spec.shape), stride=local.stride()
        )
        found.append((spec.name, nn.Parameter(whole)))
    return found


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


def _sources(layout: Layout) -> dict[str, SourceTensor]:
    return {
        entry.spec.name: SourceTensor(
            entry.spec, (SourceChunk(Box.whole(entry.spec.shape), number, len(file.header) + entry.begin),)
        )
        for number, file in enumerate(layout.files)
        for entry in file.entries
    }


def _plan(parameters: list[tuple[str, torch.Tensor]]) -> _Planned:
    rank, later, load = _Clock(), _Clock(), _Clock()
    held = rank.run(lambda: held_tensors(parameters, MeshRegister()))
    keeper = RosterKeeper(_Alike())
    roster = rank.run(lambda: keeper.roster(held))
    layout = rank.run(lambda: lay_out(roster.specs))
    work: Schedule = rank.run(lambda: schedule(held, layout, roster, RANK))

    # The coordinator does the same and also puts the manifest together.
    coordinator = _Clock(rank.seconds)
    options = ExportOptions()
    plan = ExportPlan(Path("consolidated"), options, layout, work, held, ComputedPlan(), Copies())
    crcs = dict.fromkeys((name for name, _ in parameters), 1)
    record = coordinator.run(lambda: export_record(plan, crcs))
    coordinator.run(lambda: encode_manifest(Manifest(record.files, record.tensors, {})))

    memo: Memo[ExportPlan] = Memo()
    memo.get([*held, roster], (options, Copies()), lambda: plan)
    later.run(lambda: _again(held, keeper, memo, options))

    sources = load.run(lambda: _sources(layout))
    load.run(lambda: [read for tensor in held for read in plan_reads(sources[tensor.spec.name], tensor)])
    return _Planned(rank.seconds, coordinator.seconds, later.seconds, load.seconds)


def _again(held: list[HeldTensor], keeper: RosterKeeper, memo: Memo[ExportPlan], options: ExportOptions) -> ExportPlan:
    """What a later save does instead of planning."""
    roster = keeper.roster(held)
    known = memo.get([*held, roster], (options, Copies()), lambda: plan_export(held, roster, Group(), Path(), options))
    return replace(known, directory=Path("consolidated"))


def planning(settings: Settings) -> list[Row]:
    """Seconds of one core to plan a save and a load of 40,000 tensors on 1,024 ranks, and of half as many."""
    with _one_of_many() as mesh:
        parameters = _parameters(_specs(TENSORS), mesh)
        whole = [_plan(parameters) for _ in range(min(settings.repeats, 3))]
        half = _plan(parameters[: TENSORS // 2])

    def row(name: str, limit: str, values: list[float], of_half: float) -> Row:
        seconds = statistics.median(values)
        return Row(name, seconds, note=f"processor time; wanted: {limit}; {of_half:.3f} s for half the tensors")

    return [
        row("plan, first save, a rank", "1 s", [p.rank for p in whole], half.rank),
        row("plan, first save, coordinator", "5 s", [p.coordinator for p in whole], half.coordinator),
        row("plan, later save, a rank", "0.05 s", [p.later for p in whole], half.later),
        row("plan, load, a rank", "1 s", [p.load for p in whole], half.load),
    ]
