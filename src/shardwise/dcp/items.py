"""The items of DCP's plans in this library's terms, written, and the messages between ranks and coordinator.

What is no tensor (numbers, text, lists) DCP would pickle. Here the rank that DCP chose for it encodes the object itself
and sends the text to the coordinator, which writes all of them as one state (`shardwise.format.state_json`): a table
from DCP's names (``optim.param_groups.0.lr``) to values. Tensors inside a value, in a tuple say, which DCP does not
look into, go to a second file; its name does not end in ``.safetensors``, so that nobody takes them for tensors of the
model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from shardwise.dcp.regions import is_packed
from shardwise.disk.crc import shift
from shardwise.disk.names import is_there
from shardwise.disk.sequential import SequentialFile, write_file
from shardwise.disk.storage import Storage
from shardwise.dtypes import dtype_code, torch_dtype
from shardwise.engine.writer import Digests, FileSet, write_run
from shardwise.errors import IncompleteTensorError, MisuseError, NameCollisionError, StateFormatError
from shardwise.format.manifest import ChunkRecord, FileRecord, TensorRecord
from shardwise.geometry import Box, TensorSpec, runs
from shardwise.plan.layout import Layout
from shardwise.plan.schedule import ShardPiece, WriteRun, shard_files
from shardwise.sources.state_files import pack_state, read_packed, unpack_state
from shardwise.sources.tensor_bytes import byte_blocks, contribution
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
    """What a rank says of one tensor item: its share of the tensor's CRC-32C, and its place in a shard file."""

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
            totals.add(name, written.contribution, result.size_in_bytes)
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
            results.append(WriteResult(item.index, box.numel * spec.itemsize, Written(total)))
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
        header = file.layout.header
        record = FileRecord.of_tensors(file.layout.name, file.layout.size, header)
        with SequentialFile(storage, directory / record.path, file.layout.size) as made:
            made.append([header])
            for spec, begin, end in file.layout.entries:
                piece, dtype = file.pieces[spec.name], torch_dtype(spec.dtype)
                crc = made.append(byte_blocks(piece.data, dtype), spec.name)
                share = contribution(piece.box, piece.spec.shape, piece.data, crc, dtype)
                chunk = ChunkRecord(record.path, len(header) + begin, end - begin, piece.box, crc)
                index = by_box[spec.name, piece.box].index
                results.append(WriteResult(index, end - begin, Written(share, chunk, record)))
    return results


# --- what is no tensor -----------------------------------------------------------------------------------------------


#: The values, and the tensors inside them, if any.
VALUES_NAME = "dcp_values.json"
VALUES_TENSORS_NAME = "dcp_values.tensors"
VALUES_NAMES = {".json": VALUES_NAME, ".safetensors": VALUES_TENSORS_NAME}


@dataclass(frozen=True)
class PackedValue:
    """A value as a rank sends it to the coordinator: a state, a table of it alone under its name; see `pack_state`."""

    packed: Mapping[str, bytes]


def pack_value(item: WriteItem, planner: SavePlanner) -> WriteResult:
    """Encode the object that DCP would pickle.

    `MisuseError` where the planner gives none out; `StateFormatError`, with item and place, where it cannot be stored.
    """
    name = item.index.fqn
    look_up: Callable[[MetadataIndex], object] | None = getattr(planner, "lookup_object", None)
    if look_up is None:
        what = f"{type(planner).__name__} has no lookup_object, so that this value could only be saved as a pickle"
        hint = "Derive the planner from DCP's DefaultSavePlanner, or keep the value out of the state dict."
        raise MisuseError(what, tensor=name, hint=hint)
    try:
        packed = pack_state({name: look_up(item.index)})
    except StateFormatError as error:
        error.tensor = name
        raise
    return WriteResult(item.index, sum(map(len, packed.values())), PackedValue(packed))


def write_values(storage: Storage, directory: Path, parts: Iterable[tuple[str, PackedValue]]) -> list[FileRecord]:
    """Write the values of all ranks in one table, durable; no file where there are none.

    `NameCollisionError` where ranks sent different ones under one name.
    """
    seen: dict[str, PackedValue] = {}
    for name, part in parts:
        if seen.setdefault(name, part) != part:
            hint = "Put the rank into the name, or keep what differs between ranks out of the state dict."
            raise NameCollisionError("ranks saved different values under this name", tensor=name, hint=hint)
    values = {name: _table(unpack_state(dict(part.packed)))[name] for name, part in seen.items()}
    records = []
    for suffix, content in (pack_state(values) if values else {}).items():
        write_file(storage, directory / VALUES_NAMES[suffix], content)
        records.append(FileRecord.plain(VALUES_NAMES[suffix], content))
    return records


def read_values(directory: Path) -> dict[str, object]:
    """The values of a directory; none where it has no such file, `StateFormatError` if that is damaged or forged."""
    path = directory / VALUES_NAME
    return _table(read_packed(path, directory / VALUES_TENSORS_NAME), path) if is_there(path) else {}


def _table(table: object, path: Path | None = None) -> dict[str, object]:
    if not isinstance(table, dict) or not all(isinstance(name, str) for name in table):
        raise StateFormatError(
            "the values are not a table from names to values",
            path=path,
            hint="The file is damaged or forged: restore it from a copy, or resume from another checkpoint.",
        )
    return table
