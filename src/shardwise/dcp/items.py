"""The items of DCP's plans in this library's terms, written, and the messages between ranks and coordinator."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from shardwise.dcp.regions import is_packed
from shardwise.dcp.values import PackedValue
from shardwise.disk.crc import shift
from shardwise.disk.sequential import SequentialFile
from shardwise.disk.storage import Storage
from shardwise.dtypes import dtype_code, torch_dtype
from shardwise.engine.writer import Digests, FileSet, write_run
from shardwise.errors import IncompleteTensorError, MisuseError, NameCollisionError
from shardwise.format.manifest import ChunkRecord, FileRecord, TensorRecord
from shardwise.geometry import Box, TensorSpec, runs
from shardwise.plan.layout import Layout
from shardwise.plan.schedule import ShardFile, ShardPiece, WriteRun, shard_files
from shardwise.sources.digest import contribution
from shardwise.sources.tensor_bytes import byte_blocks
from shardwise.stateful_wrappers.memory import plain_memory
from shardwise.upstream.torch_tensors import local_part


@dataclass(frozen=True)
class Task:
    """What the coordinator sends to a rank: its number, and the layout (``None`` for shard files)."""

    rank: int
    world_size: int
    layout: Layout | None


@dataclass(frozen=True)
class Written:
    """What a rank says of one tensor item: bytes written, its share of the tensor's CRC-32C, its place in a shard."""

    nbytes: int
    contribution: int
    chunk: ChunkRecord | None = None
    file: FileRecord | None = None


@dataclass
class Totals(Digests):
    """What all ranks wrote, by tensor name (files by file name)."""

    chunks: dict[str, list[ChunkRecord]] = field(default_factory=dict)
    files: dict[str, FileRecord] = field(default_factory=dict)
    values: list[tuple[str, PackedValue]] = field(default_factory=list)

    @staticmethod
    def of(results: Iterable[Iterable[WriteResult]]) -> Totals:
        """Add up the results of all ranks."""
        totals = Totals()
        for result in (result for theirs in results for result in theirs):
            name, written = result.index.fqn, result.storage_data
            if isinstance(written, PackedValue):
                totals.values.append((name, written))
                continue
            assert isinstance(written, Written)
            totals.add(name, written.contribution, written.nbytes)
            if written.chunk is not None and written.file is not None:
                totals.chunks.setdefault(name, []).append(written.chunk)
                totals.files[written.file.path] = written.file
        return totals

    def tensors(self, specs: Sequence[TensorSpec]) -> tuple[TensorRecord, ...]:
        """The tensors and the pieces of them that stand in shard files."""
        return tuple(
            TensorRecord("model", spec, self.crcs.get(spec.name, 0), tuple(self.chunks.get(spec.name, ())))
            for spec in specs
        )


def tensors_and_values(items: Iterable[WriteItem]) -> tuple[list[WriteItem], list[WriteItem]]:
    """The items that are tensors, and those that DCP would pickle."""
    every = list(items)
    values = [item for item in every if item.type == WriteItemType.BYTE_IO]
    return [item for item in every if item.type != WriteItemType.BYTE_IO], values


def spec_of(item: WriteItem) -> TensorSpec:
    """Name, global shape and dtype of an item's tensor."""
    data = item.tensor_data
    assert data is not None
    return TensorSpec(item.index.fqn, tuple(data.size), dtype_code(data.properties.dtype, item.index.fqn))


def box_of(item: WriteItem) -> Box:
    """The region that an item is."""
    data = item.tensor_data
    assert data is not None
    return Box(tuple(data.chunk.offsets), tuple(data.chunk.sizes))


def resolve(item: WriteItem, planner: SavePlanner, box: Box) -> torch.Tensor:
    """The memory of an item's region; `IncompleteTensorError` if it is not of the shape that the plan says."""
    data = planner.resolve_data(item)
    assert isinstance(data, torch.Tensor)
    local = plain_memory(item.index.fqn, local_part(data))
    if tuple(local.shape) != box.sizes:
        what = f"the plan describes a region of {list(box.sizes)}, the tensor has {list(local.shape)}"
        hint = "Wrap the state dict with shardwise.dcp.regions.as_regions."
        raise IncompleteTensorError(what, tensor=item.index.fqn, hint=hint)
    return local


def union(plans: Sequence[SavePlan]) -> tuple[TensorSpec, ...]:
    """Every tensor of the plans, once; `NameCollisionError` where ranks disagree, or one has a value of its name."""
    found: dict[str, TensorSpec] = {}
    others: set[str] = set()
    for plan in plans:
        tensors, values = tensors_and_values(plan.items)
        others.update(item.index.fqn for item in values)
        for item in tensors:
            spec = spec_of(item)
            if found.setdefault(spec.name, spec) != spec:
                what = f"ranks disagree about this tensor: {found[spec.name]} and {spec}"
                hint = "Give each stage's modules the names that they have in the whole model."
                raise NameCollisionError(what, tensor=spec.name, hint=hint)
    both = others & found.keys()
    if both:
        what = "one rank has a tensor under this name and another a value that is none"
        hint = "Give every rank the same kinds of values under the same names."
        raise NameCollisionError(what, tensor=min(both), hint=hint)
    return tuple(found.values())


def refuse_packed(planner: SavePlanner) -> None:
    """Raise `MisuseError` where there is a tensor that DCP's own hooks describe wrongly."""
    state = getattr(planner, "state_dict", None)
    for name, value in state.items() if isinstance(state, Mapping) else ():
        if is_packed(value):
            what = "this rank holds several disjoint regions of the tensor, which DCP describes as one"
            hint = "Pass shardwise.dcp.regions.as_regions(state_dict) to dcp.save and dcp.load."
            raise MisuseError(what, tensor=str(name), hint=hint)


def write_final(
    storage: Storage, directory: Path, items: Sequence[WriteItem], planner: SavePlanner, layout: Layout
) -> list[WriteResult]:
    """Write items into the files of a layout, which exist, and make them durable."""
    results = []
    with closing(FileSet(storage, [directory / file.name for file in layout.files])) as files:
        for item in items:
            spec, box = spec_of(item), box_of(item)
            data = resolve(item, planner, box)
            place = layout.places[spec.name]
            total = 0
            for first, count, index in runs(box, spec.shape):
                start = first * spec.itemsize
                run = WriteRun(place.file, place.offset + start, spec, start, data[index])
                total ^= shift(write_run(run, files, storage), spec.nbytes - start - count * spec.itemsize)
            nbytes = box.numel * spec.itemsize
            results.append(WriteResult(item.index, nbytes, Written(nbytes, total)))
        files.sync()
    return results


def write_shards(
    storage: Storage, directory: Path, items: Sequence[WriteItem], planner: SavePlanner, task: Task, stem: str
) -> list[WriteResult]:
    """Make this rank's shard files, write its items into them and make them durable."""
    by_box = {(item.index.fqn, box_of(item)): item for item in items}
    pieces = [ShardPiece(spec_of(i), box_of(i), resolve(i, planner, box_of(i))) for i in items]
    planned = shard_files(pieces, task.rank, task.world_size, None, stem)
    storage.check_space(directory, sum(file.layout.size for file in planned))
    results = []
    for file in planned:
        for name, written in _write_pieces(file, directory, storage):
            assert written.chunk is not None
            index = by_box[(name, written.chunk.box)].index
            results.append(WriteResult(index, written.nbytes, written))
    return results


def _write_pieces(file: ShardFile, directory: Path, storage: Storage) -> list[tuple[str, Written]]:
    header = file.layout.header
    record = FileRecord.of_tensors(file.layout.name, file.layout.size, header)
    out = []
    with SequentialFile(storage, directory / file.layout.name, file.layout.size) as made:
        made.append([header])
        for spec, begin, end in file.layout.entries:
            piece, dtype = file.pieces[spec.name], torch_dtype(spec.dtype)
            crc = made.append(byte_blocks(piece.data, dtype), spec.name)
            share = contribution(piece.box, piece.spec.shape, piece.data, crc, dtype)
            chunk = ChunkRecord(record.path, len(header) + begin, end - begin, piece.box, crc)
            out.append((spec.name, Written(end - begin, share, chunk, record)))
    return out
