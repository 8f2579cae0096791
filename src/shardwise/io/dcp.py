"""The writer and the reader as ordinary DCP storage classes, for those who call DCP themselves.

    dcp.save(state_dict, storage_writer=SafetensorsWriter(path))
    dcp.load(state_dict, storage_reader=SafetensorsReader(path))

The writer gives finished Hugging Face files (``consolidated=True``, every rank at the final offsets) or one shard file
for each rank, with an index and a manifest; the reader takes whatever `shardwise.io.sources.open_source` opens.
Planning is DCP's own here: its coordinator gathers every rank's plan. `Checkpointer` plans locally and does not go
through these classes.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    LoadPlanner,
    SavePlan,
    SavePlanner,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from shardwise.comm import Group
from shardwise.errors import IncompleteTensorError, MisuseError, NameCollisionError
from shardwise.format.crc import crc32c, shift
from shardwise.format.dtypes import dtype_code, torch_dtype
from shardwise.format.index import encode_index
from shardwise.format.manifest import (
    MANIFEST_NAME,
    ChunkRecord,
    FileRecord,
    Manifest,
    TensorRecord,
    encode_manifest,
)
from shardwise.io.digest import contribution
from shardwise.io.reader import Reader
from shardwise.io.regions import is_packed
from shardwise.io.sources import Source, open_source
from shardwise.io.storage import LocalStorage, Storage
from shardwise.io.writer import FileSet, write_run
from shardwise.plan.fragments import Fragment, HeldPart, HeldTensor, Part
from shardwise.plan.layout import Layout, index_name, lay_out
from shardwise.plan.reads import AnyRead, plan_reads
from shardwise.plan.runs import runs
from shardwise.plan.schedule import Run
from shardwise.plan.shards import Piece, ShardFile, shard_files
from shardwise.types import Box, TensorSpec

PathLike = str | os.PathLike[str]


@dataclass(frozen=True)
class _Task:
    """What the coordinator tells a rank: its number, and the layout (``None`` for shard files)."""

    rank: int
    world_size: int
    layout: Layout | None


@dataclass(frozen=True)
class _Written:
    """What a rank tells the coordinator of one item.

    Attributes:
        nbytes: Bytes written.
        contribution: To the CRC-32C of the whole tensor.
        chunk: Where the piece is, for a shard file.
        file: The shard file.
    """

    nbytes: int
    contribution: int
    chunk: ChunkRecord | None = None
    file: FileRecord | None = None


class SafetensorsWriter(StorageWriter):
    """Writes a DCP save as Hugging Face safetensors, each byte once.

    Args:
        path: Directory to write into; made if absent. What an earlier save of this writer left there is replaced.
        consolidated: Whole tensors in finished files; otherwise shard files, one for each rank.
        base_files: Tensor name -> file name of a base model whose split is to be kept.
        max_file_bytes: Largest file without a base split.
        stem: What file names start with.
        storage: Where to; the mounted file systems by default.
    """

    def __init__(
        self,
        path: PathLike,
        *,
        consolidated: bool = True,
        base_files: Mapping[str, str] | None = None,
        max_file_bytes: int = 5_000_000_000,
        stem: str = "model",
        storage: Storage | None = None,
    ) -> None:
        self._path = Path(path).absolute()
        self._consolidated = consolidated
        self._base_files = dict(base_files or {})
        self._max_file_bytes = max_file_bytes
        self._stem = stem
        self._storage = storage or LocalStorage()
        self._layout: Layout | None = None
        self._specs: tuple[TensorSpec, ...] = ()

    def reset(self, checkpoint_id: PathLike | None = None) -> None:
        """Start anew, at another path if one is given."""
        if checkpoint_id is not None:
            self._path = Path(checkpoint_id).absolute()
        self._layout, self._specs = None, ()

    def set_up_storage_writer(self, is_coordinator: bool, *args: object, **kwargs: object) -> None:
        """Nothing to set up."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Check that every item is a tensor.

        Raises:
            MisuseError: An item is not; DCP would pickle it.
        """
        for item in plan.items:
            if item.type == WriteItemType.BYTE_IO:
                raise MisuseError(
                    "this value is not a tensor, and DCP would pickle it",
                    tensor=item.index.fqn,
                    hint="Keep such values out of the state dict, or save them with Checkpointer(extra_state=...).",
                )
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Lay out the files and create them. The coordinator calls."""
        self._specs = _union(plans)
        self._storage.make_directory(self._path)
        for name in (MANIFEST_NAME, index_name(self._stem)):
            (self._path / name).unlink(missing_ok=True)
        if self._consolidated:
            self._layout = lay_out(
                self._specs, base_files=self._base_files, max_file_bytes=self._max_file_bytes, stem=self._stem
            )
            self._storage.check_space(self._path, self._layout.total_bytes)
            for file in self._layout.files:
                self._storage.create(self._path / file.name, file.size, file.header)
        return [replace(plan, storage_data=_Task(rank, len(plans), self._layout)) for rank, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's items and make them durable."""
        task = plan.storage_data
        assert isinstance(task, _Task)
        _refuse_packed(planner)
        if task.layout is not None:
            results = self._write_final(plan.items, planner, task.layout)
        else:
            results = self._write_shards(plan.items, planner, task)
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def _write_final(self, items: Sequence[WriteItem], planner: SavePlanner, layout: Layout) -> list[WriteResult]:
        files = FileSet(self._storage, [self._path / file.name for file in layout.files])
        results = []
        try:
            for item in items:
                spec, box = _spec(item), _box(item)
                data = _resolve(item, planner, box)
                place = layout.places[spec.name]
                total = 0
                for first, count, index in runs(box, spec.shape):
                    start = first * spec.itemsize
                    run = Run(place.file, place.offset + start, 0, spec, start, data[index])
                    total ^= shift(write_run(run, files, self._storage), spec.nbytes - start - count * spec.itemsize)
                nbytes = box.numel * spec.itemsize
                results.append(WriteResult(item.index, nbytes, _Written(nbytes, total)))
            files.sync()
        finally:
            files.close()
        return results

    def _write_shards(self, items: Sequence[WriteItem], planner: SavePlanner, task: _Task) -> list[WriteResult]:
        by_box = {(item.index.fqn, _box(item)): item for item in items}
        pieces = [Piece(0, _spec(i), _box(i), _resolve(i, planner, _box(i))) for i in items]
        planned = shard_files(pieces, task.rank, task.world_size, None, self._stem)
        results = []
        files = FileSet(self._storage, [self._path / file.layout.name for file in planned])
        try:
            self._storage.check_space(self._path, sum(file.layout.size for file in planned))
            for number, file in enumerate(planned):
                self._storage.create(self._path / file.layout.name, file.layout.size, file.layout.header)
                for name, written in self._write_pieces(number, file, files):
                    assert written.chunk is not None
                    index = by_box[(name, written.chunk.box)].index
                    results.append(WriteResult(index, written.nbytes, written))
            files.sync()
        finally:
            files.close()
        return results

    def _write_pieces(self, number: int, file: ShardFile, files: FileSet) -> list[tuple[str, _Written]]:
        head = len(file.layout.header)
        record = FileRecord(file.layout.name, file.layout.size, crc32c(file.layout.header), head)
        out = []
        for entry in file.layout.entries:
            piece = file.pieces[entry.spec.name]
            run = Run(number, head + entry.begin, 0, entry.spec, 0, piece.data)
            crc = write_run(run, files, self._storage)
            plain = piece.data.detach().to("cpu", torch_dtype(piece.spec.dtype))
            share = contribution(piece.box, piece.spec.shape, plain, crc)
            chunk = ChunkRecord(record.path, head + entry.begin, run.nbytes, piece.box, crc)
            out.append((entry.spec.name, _Written(run.nbytes, share, chunk, record)))
        return out

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Check that every byte was written; write index and manifest, the manifest last. The coordinator calls.

        Raises:
            IncompleteTensorError: The ranks' items do not cover a tensor.
        """
        crcs: dict[str, int] = {}
        counts: dict[str, int] = {}
        chunks: dict[str, list[ChunkRecord]] = {}
        files: dict[str, FileRecord] = {}
        for result in (result for theirs in results for result in theirs):
            written, name = result.storage_data, result.index.fqn
            assert isinstance(written, _Written)
            crcs[name] = crcs.get(name, 0) ^ written.contribution
            counts[name] = counts.get(name, 0) + written.nbytes
            if written.chunk is not None and written.file is not None:
                chunks.setdefault(name, []).append(written.chunk)
                files[written.file.path] = written.file
        for spec in self._specs:
            if counts.get(spec.name, 0) != spec.nbytes:
                raise IncompleteTensorError(
                    f"the ranks together wrote {counts.get(spec.name, 0)} of {spec.nbytes} bytes",
                    path=self._path,
                    tensor=spec.name,
                    hint="Wrap the state dict with shardwise.io.regions.as_regions, or check the tensor's placements.",
                )
        plain: list[FileRecord] = []
        if self._layout is not None:
            index = encode_index(self._layout.weight_map, self._layout.tensor_bytes)
            plain.append(self._plain(index_name(self._stem), index))
            for file in self._layout.files:
                head = len(file.header)
                files[file.name] = FileRecord(file.name, file.size, crc32c(file.header), head)
                for entry in file.entries:
                    box, crc = Box.whole(entry.spec.shape), crcs.get(entry.spec.name, 0)
                    chunk = ChunkRecord(file.name, head + entry.begin, entry.spec.nbytes, box, crc)
                    chunks[entry.spec.name] = [chunk]
        tensors = tuple(
            TensorRecord("model", spec, crcs.get(spec.name, 0), tuple(chunks.get(spec.name, ())))
            for spec in self._specs
        )
        self._remove_stale(set(files))
        self._plain(MANIFEST_NAME, encode_manifest(Manifest((*files.values(), *plain), tensors, {})))
        self._storage.sync_directory(self._path)

    def _plain(self, name: str, content: bytes) -> FileRecord:
        self._storage.create(self._path / name, len(content), content)
        handle = self._storage.open(self._path / name, writable=True)
        try:
            self._storage.sync(handle)
        finally:
            self._storage.close(handle)
        return FileRecord(name, len(content), crc32c(content), None)

    def _remove_stale(self, current: set[str]) -> None:
        """Remove tensor files of an earlier save under this stem that the new one does not have."""
        for file in self._path.glob("*.safetensors"):
            ours = file.name.startswith(self._stem) or file.name.startswith("shard-")
            if ours and file.name not in current:
                file.unlink()

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: PathLike) -> bool:
        """Whether this writer can write there: any local path."""
        return "://" not in str(checkpoint_id)

    def storage_meta(self) -> StorageMeta | None:
        """Where this writer writes."""
        return StorageMeta(checkpoint_id=str(self._path))


def _spec(item: WriteItem) -> TensorSpec:
    data = item.tensor_data
    assert data is not None
    return TensorSpec(item.index.fqn, tuple(data.size), dtype_code(data.properties.dtype, item.index.fqn))


def _box(item: WriteItem) -> Box:
    data = item.tensor_data
    assert data is not None
    return Box(tuple(data.chunk.offsets), tuple(data.chunk.sizes))


def _resolve(item: WriteItem, planner: SavePlanner, box: Box) -> torch.Tensor:
    data = planner.resolve_data(item)
    assert isinstance(data, torch.Tensor)
    local = getattr(data, "_local_tensor", data).detach()
    if tuple(local.shape) != box.sizes:
        raise IncompleteTensorError(
            f"the plan describes a region of {list(box.sizes)}, the tensor has {list(local.shape)}",
            tensor=item.index.fqn,
            hint="Wrap the state dict with shardwise.io.regions.as_regions.",
        )
    return local


def _union(plans: Sequence[SavePlan]) -> tuple[TensorSpec, ...]:
    found: dict[str, TensorSpec] = {}
    for plan in plans:
        for item in plan.items:
            spec = _spec(item)
            if found.setdefault(spec.name, spec) != spec:
                raise NameCollisionError(
                    f"ranks disagree about this tensor: {found[spec.name]} and {spec}",
                    tensor=spec.name,
                    hint="Give each stage's modules the names that they have in the whole model.",
                )
    return tuple(found.values())


def _refuse_packed(planner: SavePlanner) -> None:
    state = getattr(planner, "state_dict", None)
    for name, value in state.items() if isinstance(state, dict) else ():
        if is_packed(value):
            raise MisuseError(
                "this rank holds several disjoint regions of the tensor, which DCP describes as one",
                tensor=str(name),
                hint="Pass shardwise.io.regions.as_regions(state_dict) to dcp.save and dcp.load.",
            )


class SafetensorsReader(StorageReader):
    """Reads any checkpoint that shardwise can open into a DCP load, each rank reading only what it needs.

    Args:
        path: See `shardwise.io.sources.open_source`.
        threads: Reads at once on this rank.
        storage: Where from; the mounted file systems by default.
    """

    def __init__(self, path: PathLike, *, threads: int = 1, storage: Storage | None = None) -> None:
        self._path = Path(path).absolute()
        self._threads = threads
        self._storage = storage or LocalStorage()
        self._source: Source | None = None

    def reset(self, checkpoint_id: PathLike | None = None) -> None:
        """Start anew, at another path if one is given."""
        if checkpoint_id is not None:
            self._path = Path(checkpoint_id).absolute()
        self._source = None

    def read_metadata(self, *args: object, **kwargs: object) -> Metadata:
        """Read the headers. Every rank calls, by itself."""
        self._source = open_source(self._path, Group(None))
        return Metadata(
            {
                name: TensorStorageMetadata(
                    TensorProperties(dtype=torch_dtype(tensor.spec.dtype)),
                    torch.Size(tensor.spec.shape),
                    [ChunkStorageMetadata(torch.Size(c.box.offsets), torch.Size(c.box.sizes)) for c in tensor.chunks],
                )
                for name, tensor in self._source.tensors.items()
            },
            storage_meta=StorageMeta(checkpoint_id=str(self._path)),
        )

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: object, **kwargs: object) -> None:
        """Nothing to set up."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """The plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """The plans as they are."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read this rank's items into place."""
        source = self._source
        assert source is not None
        reader = Reader(self._storage, source.files, self._threads)
        targets = []
        reads: list[AnyRead] = []
        for item in plan.items:
            if item.type == LoadItemType.BYTE_IO:
                raise MisuseError("this value is not a tensor", tensor=item.dest_index.fqn)
            target = planner.resolve_tensor(item).detach()
            targets.append((item, target))
            saved = source.tensors[item.storage_index.fqn]
            origin = _origin(item.storage_index)
            offsets = tuple(a + b for a, b in zip(origin, item.storage_offsets, strict=True))
            fragment = Fragment(Box(offsets, tuple(item.lengths)), getattr(target, "_local_tensor", target))
            wanted = HeldTensor(saved.spec, saved.spec.shape, (HeldPart(Part(saved.spec.shape), (), (fragment,)),))
            reads += plan_reads(saved, wanted)
        try:
            reader.execute(reads)
        finally:
            reader.close()
        for item, target in targets:
            planner.commit_tensor(item, target)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: PathLike) -> bool:
        """Whether this reader can read there: any local path."""
        return "://" not in str(checkpoint_id)

    @property
    def checkpoint_id(self) -> str:
        """Where this reader reads."""
        return str(self._path)


def _origin(index: MetadataIndex) -> tuple[int, ...]:
    return tuple(index.offset or ())
