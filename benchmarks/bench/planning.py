"""Planning at scale, simulated: the real plans of one rank among many, without processes and without touching memory.

What is timed is the library's own code as a save and a load call it, the exchanges with other ranks apart, for which a
group stands in that answers as 1,024 like-minded ranks would (with real JSON, which is decoded). The model is the worst
there is: a module for each of its parameters. Python's collector runs as it does in training: not inside a call of the
checkpointer, and after it.
"""

from __future__ import annotations

import contextlib
import gc
import json
import statistics
import tempfile
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TypeVar, cast
from zlib import crc32

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from bench.measure import Row
from bench.ranks import Settings
from shardwise.checkpointing.arguments import FirstExchange
from shardwise.checkpointing.hub import HubState
from shardwise.checkpointing.loading.models import open_model, read_model_metadata
from shardwise.checkpointing.parallel_ranks import ParallelRanks
from shardwise.checkpointing.saving.hooks import ModelRequest
from shardwise.checkpointing.saving.models import ModelSave
from shardwise.checkpointing.session import Session
from shardwise.comm import Group, JsonValue
from shardwise.config import CheckpointingConfig
from shardwise.disk.storage import LocalStorage
from shardwise.engine.agreement import Agreement
from shardwise.engine.collector import without_collector
from shardwise.engine.export import ExportOptions, export_record, plan_export
from shardwise.engine.load import LoadOptions
from shardwise.format.header import arrange, encode_header, encode_sharding_metadata
from shardwise.format.manifest import Manifest, encode_manifest
from shardwise.geometry import TensorSpec
from shardwise.plan.layout import Layout, shard_name
from shardwise.plan.placement import chunk
from shardwise.sources.sources import open_source
from shardwise.stateful_wrappers import ModelState

T = TypeVar("T")
TENSORS, RANKS = 40_000, 1_024
_SHAPES = ((4096, 2048), (2048,), (2048, 1408), (1408, 2048))


def _specs(tensors: int) -> list[TensorSpec]:
    return [
        TensorSpec(f"model.layers.{n // 400}.mlp.experts.{n % 400}.weight", _SHAPES[n % len(_SHAPES)], "BF16")
        for n in range(tensors)
    ]


@contextlib.contextmanager
def _one_of_many(rank: int, ranks: int) -> Iterator[DeviceMesh]:
    """A mesh of which this process is one rank, and the only one that exists."""
    dist.init_process_group("fake", rank=rank, world_size=ranks, store=FakeStore())
    try:
        yield init_device_mesh("cpu", (ranks,), mesh_dim_names=("dp",))
    finally:
        dist.destroy_process_group()


class _Alike(Group):
    """A group whose other ranks declare what this one does, and stand elsewhere in the mesh.

    Args:
        rank: This rank.
        ranks: How many there are.
        told: What others say where this rank has nothing to say, by what it is about.
    """

    def __init__(self, rank: int, ranks: int, told: dict[str, str] | None = None) -> None:
        super().__init__()
        self.rank, self.world_size = rank, ranks
        self._told = told or {}

    def agree(self, failure: BaseException | None, what: str, flag: bool = False, seconds: float | None = None) -> bool:
        """As if no other rank had anything to say."""
        if failure is not None:
            raise failure
        return flag

    def any(self, flag: bool, what: str = "agreeing") -> bool:
        """As `agree`."""
        return flag

    def gather(self, make: Callable[[], JsonValue], what: str) -> list[JsonValue]:
        """What the others tell, or would tell as this rank does."""
        if what in self._told:
            return [json.loads(self._told[what]), *(json.loads("[]") for _ in range(1, self.world_size))]
        value = make()
        if what.startswith("describing"):  # each rank's digest, and its coordinate in each mesh
            digest, meshes = cast(tuple[str, list[list[int]]], value)
            rows = (json.dumps([digest, [[rank] for _ in meshes]]) for rank in range(self.world_size))
            return [cast(JsonValue, json.loads(row)) for row in rows]
        return [value] * self.world_size

    def gather_json(self, value: JsonValue, what: str = "gathering") -> list[JsonValue]:
        """As if all had the same."""
        return [value] * self.world_size

    def fold(
        self, xors: Sequence[int], sums: Sequence[int], what: str, failure: BaseException | None = None
    ) -> tuple[list[int], list[int]]:
        """As if no other rank had anything to add."""
        if failure is not None:
            raise failure
        return list(xors), list(sums)

    def broadcast_bytes(self, data: bytes, source: int, what: str) -> bytes:
        """What this rank has itself."""
        return data

    def broadcast_result(self, make: Callable[[], JsonValue], what: str) -> JsonValue:
        """What rank 0 told, or would tell as this rank does."""
        return cast(JsonValue, json.loads(self._told[what])) if what in self._told else make()


class _Telling(Group):
    """A process alone, which remembers what it would have told others."""

    def __init__(self) -> None:
        super().__init__()
        self.told: dict[str, str] = {}

    def gather(self, make: Callable[[], JsonValue], what: str) -> list[JsonValue]:
        """The only row."""
        found = super().gather(make, what)
        self.told[what] = json.dumps(found[0])
        return found

    def broadcast_result(self, make: Callable[[], JsonValue], what: str) -> JsonValue:
        """The same value."""
        value = super().broadcast_result(make, what)
        self.told[what] = json.dumps(value)
        return value


class _Keeping(_Alike):
    """The same for a load of shards, of which each rank has read one: others ask and answer as this one does.

    Args:
        rank: This rank.
        ranks: How many there are.
        told: As for `_Alike`.
        offsets: Name of a tensor -> where its piece starts in this rank's file.
        said: What others say, by what it is about; kept from one load to the next, so that making it up is not timed
            in the second.
    """

    def __init__(
        self, rank: int, ranks: int, told: dict[str, str], offsets: dict[str, int], said: dict[str, list[bytes]]
    ) -> None:
        super().__init__(rank, ranks, told)
        self._offsets = offsets
        self._said = said
        self._shapes = {spec.name: spec.shape for spec in _specs(len(offsets))}
        self._names: dict[int, str] = {}

    def exchange(self, messages: Sequence[bytes], what: str) -> list[bytes]:
        """What every rank has to say to this one."""
        if what not in self._said:
            self._said[what] = [self._message(rank, messages, what) for rank in range(self.world_size)]
        return self._said[what]

    def gather_json(self, value: JsonValue, what: str = "gathering") -> list[JsonValue]:
        """This rank's tensors, and those that others keep; for the rest as `_Alike`."""
        if what != "sharing what tensors there are":
            return super().gather_json(value, what)
        if what not in self._said:
            self._said[what] = [json.dumps(rows).encode() for rows in self._kept()]
        return [cast(JsonValue, json.loads(text)) for text in self._said[what]]

    def _kept(self) -> list[list[JsonValue]]:
        counts = [0] * self.world_size
        kinds: list[dict[tuple[int, ...], list[JsonValue]]] = [{} for _ in range(self.world_size)]
        for name in self._offsets:
            index_rank = crc32(name.encode()) % self.world_size
            number = index_rank + counts[index_rank] * self.world_size
            counts[index_rank] += 1
            kinds[index_rank].setdefault(self._shapes[name], []).append([name, number, 0, True])
            self._names[number] = name
        return [[["BF16", list(shape), [], rows] for shape, rows in found.items()] for found in kinds]

    def _message(self, rank: int, messages: Sequence[bytes], what: str) -> bytes:
        if what == "sharing headers":
            [[_, rows]] = json.loads(messages[self.rank])
            moved = []
            for name, (_, *rest), dtype, offset, (_, *others) in rows:
                start, count = chunk(self._shapes[name][0], self.world_size, rank)
                moved.append([name, [count, *rest], dtype, offset, [start, *others]])
            return json.dumps([[rank, moved]]).encode()
        if what == "asking for pieces of tensors":
            self._said["asked"] = list(messages)
            values = array("q", messages[self.rank])
            at = 0
            while at < len(values):
                shape = self._shapes[self._names[values[at]]]
                values[at + 1], values[at + 1 + len(shape)] = chunk(shape[0], self.world_size, rank)
                at += 1 + 2 * len(shape)
            return values.tobytes()
        return self._answer(self._said["asked"][rank])

    def _answer(self, question: bytes) -> bytes:
        """This rank's own piece is what it asks for."""
        values, answer, at = array("q", question), array("q"), 0
        while at < len(values):
            name = self._names[values[at]]
            end = at + 1 + 2 * len(self._shapes[name])
            answer.extend((1, self.rank, self._offsets[name], 0, *values[at + 1 : end]))
            at = end
        return answer.tobytes()


def _model(tensors: int, mesh: DeviceMesh, rank: int, ranks: int) -> nn.Module:
    """A model of which this rank has its rows: memory with addresses, but never touched."""
    specs = _specs(tensors)
    shapes = [(chunk(spec.shape[0], ranks, rank)[1], *spec.shape[1:]) for spec in specs]
    memory = torch.empty(sum(torch.Size(shape).numel() for shape in shapes), dtype=torch.bfloat16)
    root, start = nn.Module(), 0
    for spec, shape in zip(specs, shapes, strict=True):
        local = memory[start : start + torch.Size(shape).numel()].view(shape)
        start += local.numel()
        whole = DTensor.from_local(
            local, mesh, [Shard(0)], run_check=False, shape=torch.Size(spec.shape), stride=local.stride()
        )
        module = root
        *path, name = spec.name.split(".")
        for step in path:
            if step not in module._modules:
                module.add_module(step, nn.Module())
            module = module.get_submodule(step)
        module.register_parameter(name, nn.Parameter(whole))
    return root


def _seconds(step: Callable[[], T]) -> tuple[float, T]:
    started = time.process_time()
    result = step()
    # What a step leaves behind makes the collector run, at the expense of whatever happens to make objects next.
    _ = [[] for _ in range(2_000)]
    return time.process_time() - started, result


@dataclass(frozen=True)
class _Planned:
    """Processor seconds of each step."""

    capture: float
    specs: float
    first: float
    coordinator: float
    look: float
    later: float
    first_load: float
    load: float
    first_load_of_shards: float
    load_of_shards: float
    first_load_of_others: float
    load_of_others: float


def _plan(model: nn.Module, rank: int, ranks: int, directory: Path) -> _Planned:
    gc.collect()
    state = ModelState(model)
    group = _Alike(rank, ranks)
    session = _session(group, directory)

    def save() -> None:
        with without_collector():
            ModelSave(ModelRequest(session, model, directory)).steps()

    def look_at_modules() -> HubState:
        with without_collector():
            return session.names.capture(state)

    capture, hub = _seconds(look_at_modules)
    specs, _ = _seconds(save)
    look, _ = _seconds(look_at_modules)
    later, _ = _seconds(save)

    # The coordinator does the same and also puts index and manifest together.
    roster = Agreement(group).roster(lambda: hub.held, "describing")
    plan = replace(plan_export(hub.held, roster, group, directory, ExportOptions()), within="consolidated")
    crcs = {tensor.spec.name: 1 for tensor in hub.held}

    def describe() -> None:
        record = export_record(plan, crcs).below("model")
        encode_manifest(Manifest(record.files, record.tensors, {}))

    coordinator, _ = _seconds(describe)
    with tempfile.TemporaryDirectory(dir=directory) as made:
        told = _files(Path(made), plan.layout)
        fresh = _session(_Alike(rank, ranks, told), directory)
        first_load, _ = _seconds(lambda: _load(fresh, model, Path(made)))
        load, _ = _seconds(lambda: _load(fresh, model, Path(made)))
    of_shards = _plan_shards(model, rank, ranks, rank, directory)
    of_others = _plan_shards(model, rank, ranks, rank + 1, directory)
    first = capture + specs
    return _Planned(capture, specs, first, first + coordinator, look, later, first_load, load, *of_shards, *of_others)


def _plan_shards(model: nn.Module, rank: int, ranks: int, saved_by: int, directory: Path) -> tuple[float, float]:
    """Seconds of a load of shards: the first, and one of a model that is known.

    The file that this rank reads is that of the rank ``saved_by``: its own, as where a run goes on as it was, or
    another's, so that it has to ask for every piece that it wants, and others ask it for as many.
    """
    specs = _specs(sum(1 for _ in model.parameters()))
    cuts = {spec.name: chunk(spec.shape[0], ranks, saved_by) for spec in specs}
    entries = arrange(spec._replace(shape=(cuts[spec.name][1], *spec.shape[1:])) for spec in specs)
    starts = {spec.name: (cuts[spec.name][0], *(0,) * (len(spec.shape) - 1)) for spec in specs}
    header = encode_header(entries, encode_sharding_metadata(starts))
    offsets = {entry.spec.name: len(header) + entry.begin for entry in entries}
    names = [shard_name(number + 1, 1, 1) for number in range(ranks)]
    with tempfile.TemporaryDirectory(dir=directory) as made:
        with (Path(made) / names[rank]).open("wb") as stream:
            stream.write(header)
            stream.truncate(len(header) + entries[-1].end)
        looking = {"single": [], "files": names, "index": [], "dcp": []}
        told = {f"looking for a checkpoint at {made}": json.dumps(looking)}
        notes = _Telling()
        read_model_metadata(Path(made), notes)
        told |= notes.told
        said: dict[str, list[bytes]] = {}
        _load(_session(_Keeping(rank, ranks, told, offsets, said), directory), model, Path(made))
        fresh = _session(_Keeping(rank, ranks, told, offsets, said), directory)
        first, _ = _seconds(lambda: _load(fresh, model, Path(made)))
        again, _ = _seconds(lambda: _load(fresh, model, Path(made)))
    return first, again


def _session(group: Group, directory: Path) -> Session:
    config = CheckpointingConfig(checkpoint_dir=str(directory), save_consolidated="every")
    ranks, met = ParallelRanks(None, None, None, None), FirstExchange(False, False, (), "none")
    return Session(config, group, _Unread(), ranks, directory, met)


def _files(directory: Path, layout: Layout) -> dict[str, str]:
    """Make files that have headers and otherwise only size; returns what ranks tell each other of them."""
    for file in layout.files:
        with (directory / file.name).open("wb") as stream:
            stream.write(file.header)
            stream.truncate(file.size)
    group = _Telling()
    open_source(directory, group)
    read_model_metadata(directory, group)
    return group.told


class _ReadingStarts(Exception):  # noqa: N818 - it is no error
    """A load has planned all that it reads."""


class _Unread(LocalStorage):
    """Ends a load where it would open the first file to read from it."""

    def open(self, path: Path, *, writable: bool) -> int:
        """Not today."""
        raise _ReadingStarts


def _load(session: Session, model: nn.Module, path: Path) -> None:
    """All that a load does before it reads, on a rank that other ranks tell what is in the files."""
    with contextlib.suppress(_ReadingStarts), without_collector():
        open_model(session, model, path, key_mapping=None, options=LoadOptions()).fill()


def _planned(tensors: int, ranks: int, repeats: int, directory: Path) -> _Planned:
    """Medians over some repeats."""
    rank = ranks // 2 + 5
    with _one_of_many(rank, ranks) as mesh:
        model = _model(tensors, mesh, rank, ranks)
        found = [_plan(model, rank, ranks, directory) for _ in range(repeats)]
    return _Planned(*(statistics.median(getattr(each, field.name) for each in found) for field in fields(_Planned)))


def planning(settings: Settings) -> list[Row]:
    """Seconds of one core to plan a save and a load of 40,000 tensors on 1,024 ranks, and of half of either."""
    repeats = min(settings.repeats, 3)
    whole = _planned(TENSORS, RANKS, repeats, settings.directory)
    half = _planned(TENSORS // 2, RANKS, repeats, settings.directory)
    fewer = _planned(TENSORS, RANKS // 2, repeats, settings.directory)

    def row(name: str, step: str, limit: str = "") -> Row:
        seconds, of_half, of_fewer = (getattr(each, step) for each in (whole, half, fewer))
        wanted = f"wanted: {limit}; " if limit else ""
        note = f"{wanted}{of_half:.3f} s for half the tensors, {of_fewer:.3f} s on half the ranks"
        return Row(name, seconds, note=note)

    return [
        row("plan, first capture, a rank", "capture"),
        row("plan, first save once captured, a rank", "specs", "2 s"),
        row("plan, first save with the capture, a rank", "first", "2 s"),
        row("plan, first save with the capture, coordinator", "coordinator", "5 s"),
        row("plan, look at the modules, a rank", "look"),
        row("plan, later save with the look, a rank", "later", "0.3 s"),
        row("plan, first load with the capture, a rank", "first_load", "3 s"),
        row("plan, load of a known model, a rank", "load", "3 s"),
        row("plan, first load of its own shard with the capture, a rank", "first_load_of_shards", "3 s"),
        row("plan, load of its own shard of a known model, a rank", "load_of_shards", "3 s"),
        row("plan, first load of others' shards with the capture, a rank", "first_load_of_others", "3 s"),
        row("plan, load of others' shards of a known model, a rank", "load_of_others", "3 s"),
    ]
