"""The writer and the reader as ordinary DCP storage classes, for those who call DCP themselves.

    dcp.save(state_dict, storage_writer=SafetensorsWriter(path))
    dcp.load(state_dict, storage_reader=SafetensorsReader(path))

The writer gives finished Hugging Face files (``consolidated=True``, every rank at the final offsets) or one shard file
for each rank, with an index and a manifest; the reader takes whatever `shardwise.sources.sources.open_source` opens.
What is not a tensor (param_groups, a step, a Stateful's counters) is one JSON file beside them: `shardwise.dcp.items`.
Planning is DCP's own here: its coordinator gathers every rank's plan. `Checkpointer` plans locally and does not go
through these classes.
"""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from shardwise.comm import Group
from shardwise.dcp import items
from shardwise.disk.names import exists
from shardwise.disk.sequential import write_file
from shardwise.disk.storage import LocalStorage, Storage, storage_errors, using
from shardwise.dtypes import torch_dtype
from shardwise.engine.records import ComponentRecord, check_written, layout_record, write_manifest
from shardwise.errors import CheckpointNotFoundError, MissingTensorError, MisuseError, ShardwiseError, StateFormatError
from shardwise.format.manifest import MANIFEST_NAME, FileRecord
from shardwise.geometry import Box, TensorSpec
from shardwise.plan.fragments import Fragment, HeldTensor
from shardwise.plan.layout import Layout, index_name, is_tensor_file, lay_out
from shardwise.plan.reads import AnyRead, plan_reads
from shardwise.sources.dcp_states import RECORD_TENSORS, has_record, read_record
from shardwise.sources.dcp_values import DcpValues
from shardwise.sources.reader import Reader
from shardwise.sources.sources import Source, open_source
from shardwise.stateful_wrappers.memory import plain_memory, require_own_elements
from shardwise.upstream.torch_tensors import local_part

PathLike = str | os.PathLike[str]


class SafetensorsWriter(StorageWriter):
    """Writes a DCP save as Hugging Face safetensors, each byte once, and what is not a tensor as JSON.

    Numbers, text, bytes, lists, tuples, dicts, sets and ``None`` can be stored; another object is a `StateFormatError`
    that names it.

    Args:
        path: Directory to write into; made if absent. What an earlier save of this writer left there is replaced, and
            is gone if this one fails: give each save a directory of its own.
        consolidated: Whole tensors in finished files; otherwise shard files, one for each rank.
        base_files: Tensor name -> file name of a base model whose split is to be kept.
        max_file_bytes: Largest file without a base split.
        stem: What file names start with.
        storage: Where to; the mounted file systems by default.

    Examples:
        >>> import torch.distributed.checkpoint as dcp
        >>> state = {"model": model.state_dict(), "step": 3}
        >>> metadata = dcp.save(state, storage_writer=SafetensorsWriter("run"), no_dist=True)
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
        self.reset()

    def reset(self, checkpoint_id: PathLike | None = None) -> None:
        """Start again, at another path if one is given."""
        if checkpoint_id is not None:
            self._path = Path(checkpoint_id).absolute()
        self._layout: Layout | None = None
        self._specs: tuple[TensorSpec, ...] = ()

    def set_up_storage_writer(self, is_coordinator: bool, *args: object, **kwargs: object) -> None:
        """Nothing to set up."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """The plan as it is; `MisuseError` where the planner leaves it out since nothing has changed."""
        if not plan.usable:
            # Files are laid out again for each save, from all ranks' plans; without them all files would be removed.
            what = "the planner left its plan out, since it is the same as for an earlier save"
            raise MisuseError(what, path=self._path, hint="Use a save planner without enable_plan_caching.")
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Lay out the files and create them. The coordinator calls."""
        self._specs = items.union(plans)
        self._storage.make_directory(self._path)
        # What an earlier save left of these must never be read with new tensors.
        for name in (MANIFEST_NAME, index_name(self._stem), *items.VALUES_NAMES.values()):
            self._remove(name)
        if self._consolidated:
            self._layout = lay_out(
                self._specs, base_files=self._base_files, max_file_bytes=self._max_file_bytes, stem=self._stem
            )
            self._storage.check_space(self._path, self._layout.total_bytes)
            for file in self._layout.files:
                self._storage.create(self._path / file.name, file.size, file.header)
        return [
            replace(plan, storage_data=items.Task(rank, len(plans), self._layout)) for rank, plan in enumerate(plans)
        ]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's tensors and make them durable; its other values go to the coordinator with the results.

        A value of a kind that cannot be stored is a `StateFormatError`.
        """
        task = plan.storage_data
        assert isinstance(task, items.Task)
        items.refuse_packed(planner)
        tensors, values = items.tensors_and_values(plan.items)
        # The values first: what can be refused is refused before tensors are written for nothing.
        packed = [items.pack_value(item, planner) for item in values]
        if task.layout is not None:
            results = items.write_final(self._storage, self._path, tensors, planner, task.layout)
        else:
            results = items.write_shards(self._storage, self._path, tensors, planner, task, self._stem)
        future: Future[list[WriteResult]] = Future()
        future.set_result(results + packed)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Check that every byte was written; write values, index and, last, the manifest. The coordinator calls.

        Raises:
            IncompleteTensorError: The ranks' items do not cover a tensor.
            NameCollisionError: Ranks saved different values under one name.
        """
        totals = items.Totals.of(results)
        hint = "Wrap the state dict with shardwise.dcp.regions.as_regions, or check the tensor's placements."
        for spec in self._specs:
            check_written(spec, totals.counts.get(spec.name, 0), self._path, hint)
        plain = items.write_values(self._storage, self._path, totals.values)
        record = ComponentRecord(tuple(totals.files.values()), totals.tensors(self._specs))
        if self._layout is not None:
            write_file(self._storage, self._path / index_name(self._stem), self._layout.index)
            plain.append(FileRecord.plain(index_name(self._stem), self._layout.index))
            record = layout_record(self._layout, totals.crcs)
        current = {file.path for file in record.files}
        for name, _ in self._storage.entries(self._path):
            if is_tensor_file(name, self._stem) and name not in current:
                self._remove(name)
        write_manifest(self._storage, self._path, record + ComponentRecord(tuple(plain)), {})

    def _remove(self, name: str) -> None:
        """Remove a file that an earlier save left, if it is there."""
        with storage_errors(self._path / name):
            self._storage.remove_file(self._path / name)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: PathLike) -> bool:
        """Whether this writer can write there: any local path."""
        return "://" not in str(checkpoint_id)

    def storage_meta(self) -> StorageMeta | None:
        """Where this writer writes."""
        return StorageMeta(checkpoint_id=str(self._path))


class SafetensorsReader(StorageReader):
    """Reads any checkpoint that shardwise can open into a DCP load, each rank reading only what it needs.

    Values that are not tensors are there where `SafetensorsWriter` wrote some, in a DCP directory, and in the ``optim``
    directory of a checkpoint of ours (``param_groups``). What DCP pickled is read as data, or by an unpickler with an
    allow-list; a value that this refuses is an error when it is asked for.

    Args:
        path: See `shardwise.sources.sources.open_source`.
        threads: Reads at once on this rank.
        storage: Where from; the mounted file systems by default.
        allow_legacy_pickle_restore: Unpickle such values without restrictions, which runs code from the files.

    Examples:
        >>> import torch.distributed.checkpoint as dcp
        >>> saved = {"model": model.state_dict(), "step": 3}
        >>> metadata = dcp.save(saved, storage_writer=SafetensorsWriter("run"), no_dist=True)
        >>> state = {"model": model.state_dict(), "step": 0}
        >>> dcp.load(state, storage_reader=SafetensorsReader("run"), no_dist=True)
        >>> state["step"]
        3
    """

    def __init__(
        self,
        path: PathLike,
        *,
        threads: int = 1,
        storage: Storage | None = None,
        allow_legacy_pickle_restore: bool = False,
    ) -> None:
        self._path = Path(path).absolute()
        self._legacy = allow_legacy_pickle_restore
        self._threads = threads
        self._storage = storage or LocalStorage()
        self.reset()

    def reset(self, checkpoint_id: PathLike | None = None) -> None:
        """Start again, at another path if one is given."""
        if checkpoint_id is not None:
            self._path = Path(checkpoint_id).absolute()
        self._source: Source | None = None
        self._values: dict[str, object] = {}
        self._pickled: DcpValues | None = None
        self._failure: ShardwiseError | None = None

    def read_metadata(self, *args: object, **kwargs: object) -> Metadata:
        """Read the headers and the values that are not tensors. Every rank calls, by itself.

        Raises:
            CheckpointNotFoundError: There is no checkpoint at the path.
            FormatError: A file of it is damaged.
        """
        if self._failure is not None and "rank" in kwargs:
            # DCP comes back for metadata of this rank alone, and would raise an AssertionError in place of our error.
            # With these it goes on to `set_up_storage_reader`, which raises it.
            return Metadata({})
        self._failure = None
        try:
            with using(self._storage):
                self._values = items.read_values(self._path) or read_record(self._path)
                self._source = self._open()
                self._pickled = DcpValues(self._path, self._legacy) if self._source.dcp else None
        except ShardwiseError as error:
            self._failure = error
            raise
        described: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {
            name: TensorStorageMetadata(
                TensorProperties(dtype=torch_dtype(tensor.spec.dtype)),
                torch.Size(tensor.spec.shape),
                [ChunkStorageMetadata(torch.Size(c.box.offsets), torch.Size(c.box.sizes)) for c in tensor.chunks],
            )
            for name, tensor in self._source.tensors.items()
        }
        pickled = self._pickled
        others = [] if pickled is None else [name for name in pickled.paths if name not in pickled.tensors]
        described |= {name: BytesStorageMetadata() for name in (*self._values, *others)}
        planner_data = None if pickled is None else pickled.metadata.planner_data
        return Metadata(described, planner_data, storage_meta=StorageMeta(checkpoint_id=str(self._path)))

    def _open(self) -> Source:
        try:
            exclude = RECORD_TENSORS if has_record(self._path) else frozenset()
            source = open_source(self._path, Group(None), exclude=exclude)
        except CheckpointNotFoundError:
            if not self._values:
                raise
            source = Source(self._path, (), {})  # a state dict without a tensor
        values_name = items.VALUES_NAME if exists(self._path / items.VALUES_NAME) else "optimizer.json"
        both = self._values.keys() & source.tensors.keys()
        if both:
            raise StateFormatError(
                f"{values_name} has a value under the name of a tensor",
                path=self._path / values_name,
                tensor=min(both),
                hint="The file belongs to another save: restore the right one, or remove it.",
            )
        return source

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: object, **kwargs: object) -> None:
        """Nothing to set up; raises what `read_metadata` could not read."""
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """The plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """The plans as they are."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read this rank's items into place; `MissingTensorError` where a value is not in the checkpoint."""
        source = self._source
        assert source is not None
        targets = []
        reads: list[AnyRead] = []
        for item in plan.items:
            if item.type == LoadItemType.BYTE_IO:
                self._load_value(item, planner)
                continue
            target = planner.resolve_tensor(item).detach()
            targets.append((item, target))
            saved = source.tensors[item.storage_index.fqn]
            origin = tuple(item.storage_index.offset or ())
            offsets = tuple(a + b for a, b in zip(origin, item.storage_offsets, strict=True))
            memory = plain_memory(saved.spec.name, local_part(target))
            require_own_elements(saved.spec.name, memory)
            wanted = HeldTensor.alone(saved.spec, [Fragment(Box(offsets, tuple(item.lengths)), memory)])
            reads += plan_reads(saved, wanted)
        with closing(Reader(self._storage, source.files, self._threads)) as reader:
            reader.execute(reads)
        for item, target in targets:
            planner.commit_tensor(item, target)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    def _load_value(self, item: ReadItem, planner: LoadPlanner) -> None:
        name = item.storage_index.fqn
        if self._pickled is not None and name in self._pickled.paths:
            with using(self._storage):
                value = self._pickled.value(name)
        elif name in self._values:
            value = self._values[name]
        else:
            what = "the checkpoint has no value of this name"
            hint = "Leave it out of the state dict, or allow partial loads in the planner."
            raise MissingTensorError(what, path=self._path, tensor=name, hint=hint)
        stream = io.BytesIO()  # DCP's planners unpickle: made here and now, nothing of it comes from a file
        torch.save(value, stream)
        stream.seek(0)
        planner.load_bytes(item, stream)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: PathLike) -> bool:
        """Whether this reader can read there: any local path."""
        return "://" not in str(checkpoint_id)

    @property
    def checkpoint_id(self) -> str:
        """Where this reader reads."""
        return str(self._path)
