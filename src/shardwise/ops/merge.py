"""Merges an adapter into its base model, and writes the result as a model of its own: one process, bounded memory.

The model is built without memory and gets its adapter by peft's own code; what peft would make of each adapted module
is known before a byte of the base is read. Then one module after the other is read, merged by peft and written, and
every tensor that the adapter leaves alone is copied.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

import torch
from torch import nn

from shardwise.addons.files import as_text
from shardwise.addons.hf_config import CONFIG, CONFIG_V5
from shardwise.base.files import base_config, open_base_source, ties_head
from shardwise.base.names import BaseWanted, match_base
from shardwise.base.source import BaseSource
from shardwise.checkpointing.adapters import merged_state
from shardwise.checkpointing.hub import HubNames, HubState
from shardwise.checkpointing.loading.models import expected_unused
from shardwise.checkpointing.saving.checks import check_described
from shardwise.comm import Group
from shardwise.disk.storage import Storage, current, using
from shardwise.dtypes import torch_dtype
from shardwise.engine.collector import without_collector
from shardwise.engine.load import LoadOptions
from shardwise.engine.sharing import PlannedReads
from shardwise.errors import AdapterError, ConversionError, ModuleStateError, some
from shardwise.format.manifest import AliasRecord
from shardwise.ops.aside import refuse_existing
from shardwise.ops.exporting import Export, Piece, batches_of, publish
from shardwise.ops.merge_input import MergeInput, attach, find_merge, take_extra
from shardwise.ops.verify import Progress
from shardwise.peft.merge import merged_parts
from shardwise.plan.deferred import bound
from shardwise.plan.fragments import Fragment, HeldTensor, part_in_box
from shardwise.plan.layout import MAX_FILE_BYTES, Layout, index_name, lay_out
from shardwise.sources.reader import Reader
from shardwise.sources.tensor_bytes import byte_blocks
from shardwise.stateful_wrappers import ModelState
from shardwise.stateful_wrappers.names import declared_ties
from shardwise.stateful_wrappers.replicas import MayDiffer
from shardwise.upstream.torch_tensors import storage_key

__all__ = ["MergeReport", "merge_adapter"]

#: Tensors of the model that are kept in memory: of one that holds many of the files, these are written in turn.
_MOST_KEPT = 2


@dataclass(frozen=True, slots=True)
class MergeReport:
    """What was written.

    Attributes:
        path: The merged model's directory.
        files: Names of its tensor files.
        tensors: Number of tensors.
        merged: Names of those that the adapter changed.
        nbytes: Bytes of the tensor files.
        notes: What is worth knowing, one sentence each.
    """

    path: Path
    files: tuple[str, ...]
    tensors: int
    merged: tuple[str, ...]
    nbytes: int
    notes: tuple[str, ...] = ()


def merge_adapter(
    base: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    max_file_bytes: int | None = None,
    progress: Progress | None = None,
    storage: Storage | None = None,
    verify_export: bool = True,
) -> MergeReport:
    """Merge an adapter into its base model.

    The tensors are byte for byte those that ``PeftModel.from_pretrained(base).merge_and_unload()`` makes of the base in
    the dtype of its ``config.json``, on the CPU and with as many threads. Nothing of either is changed.

    Args:
        base: The base model: a directory, a file, or a hub id in the cache. Quantized ones are dequantized.
        adapter: A directory that peft wrote, a checkpoint with an adapter, or a root of such (its newest).
        output: The directory to write; it must not exist.
        max_file_bytes: Largest file; by default the files of the base, or 5 GB where the base is quantized or has none.
        progress: Called with the bytes written and the bytes to write.
        storage: Where files are read and written.
        verify_export: Whether the class that ``config.json`` names has to load the result.

    Raises:
        CheckpointExistsError: The output is there already.
        CheckpointNotFoundError: There is no base model, or no adapter.
        AdapterError: The adapter does not belong to this base, or cannot be merged.
        IntegrityError, FormatError: A file is damaged.
        TensorError, QuantizationError: The base is not a model of the class that its configuration names.
        MisuseError: The base's configuration names no class of transformers'.

    Examples:
        >>> merge_adapter("org/base", "run/LATEST", "merged")  # doctest: +SKIP
    """
    target = Path(output).absolute()
    with using(storage or current()), without_collector():
        refuse_existing(target)
        found = find_merge(base, adapter)
        with closing(_Reading(found)) as reading:
            hub = _merged(found, reading)
            merged = [spec for group in hub.groups for spec in group.computed.hub]
            specs = [*(tensor.spec for tensor in hub.held), *merged]
            if verify_export:
                why = check_described(found.config, specs, found.base / CONFIG)
                if why is not None:
                    found.notes.append(f"not compared with a model class: {why}")
            files = _files_of(reading.source, {spec.name for spec in specs}) if max_file_bytes is None else {}
            layout = lay_out(specs, base_files=files, max_file_bytes=max_file_bytes or MAX_FILE_BYTES)
            publish(_export(found, reading, hub, layout), target, current(), progress)
    changed, names = tuple(spec.name for spec in merged), tuple(file.name for file in layout.files)
    return MergeReport(target, names, len(specs), changed, layout.total_bytes, tuple(found.notes))


class _Reading:
    """Reads tensors of the model, as it is without its adapter, from the base's files: a few at a time in memory."""

    def __init__(self, found: MergeInput) -> None:
        self.source: BaseSource = open_base_source(found.base, Group(None), base_config(found.base))
        self._ties = ties_head(found.config)
        self._notes = found.notes
        self._reader = Reader(current(), self.source.plain.files, threads=2)
        self._wanted: dict[int, list[HeldTensor]] = {}
        self._copied: dict[int, torch.Tensor] = {}
        #: Storages are told apart as long as what they are of lives.
        self.alive: list[object] = []
        self._kept: OrderedDict[int, torch.Tensor] = OrderedDict()
        self._lock = Lock()

    def close(self) -> None:
        """Close the base's files."""
        self._reader.close()

    def match(self, adapted: nn.Module) -> None:
        """Find every tensor of the model in the base's files, and compare shapes and dtypes."""
        wanted: BaseWanted = match_base([adapted], list(self.source.names()), base_ties=self._ties)
        if wanted.groups:
            name = wanted.groups[0].computed.hub[0].name
            raise ConversionError(
                "tensors of the base's files have to be computed to be the model's",
                path=self.source.path,
                tensor=name,
                hint="Merge where the model is loaded: peft's merge_and_unload, or export_merged in a run.",
            )
        if wanted.steps:
            raise ModuleStateError(
                "a module of the model takes its state by a method of its own",
                path=self.source.path,
                hint="Merge where the model is loaded: peft's merge_and_unload, or export_merged in a run.",
            )
        specs = [tensor.spec for tensor in wanted.held]
        names = {spec.name for spec in specs}
        unused = self.source.unexpected([name for name in self.source.names() if name not in names], _OPTIONS)
        self.source.compare(specs, unused, _OPTIONS)
        known, ties = set(expected_unused([adapted], unused)), tuple(declared_ties([adapted]))
        left = [name for name in unused if name not in known and not name.endswith(ties)]
        if left:
            self._notes.append(f"not in the merged model, since the base's class does not load it: {some(left)}")
        for tensor in wanted.held:
            for key in {storage_key(fragment.data) for fragment in tensor.fragments}:
                self._wanted.setdefault(key, []).append(tensor)
        self._copied = {storage_key(second): first for first, second in wanted.copies}
        self.alive += wanted.tensors

    def whole(self, data: torch.Tensor) -> torch.Tensor:
        """The values behind a tensor without memory, or behind a view of one; of one with memory itself. Any thread."""
        if not data.is_meta:
            return data.detach()
        with self._lock:
            data, key = self._origin(data)
            if not data.is_meta:
                return data.detach()
            known = self._kept.pop(key, None)
            while len(self._kept) >= _MOST_KEPT:
                self._kept.popitem(last=False)
            self._kept[key] = self._read(key, data) if known is None else known
            return bound(data, self._kept[key])

    def fresh(self, data: torch.Tensor) -> torch.Tensor:
        """The same in memory of its own, which the caller may change. Any thread."""
        if not data.is_meta:
            return data.detach().clone()
        with self._lock:
            data, key = self._origin(data)
            return bound(data, self._read(key, data)) if data.is_meta else data.detach().clone()

    def _origin(self, data: torch.Tensor) -> tuple[torch.Tensor, int]:
        """What is read, or has memory, in the place of a tensor that begins as a copy of another."""
        first = self._copied.get(storage_key(data), data)
        return first, storage_key(first)

    def _read(self, key: int, data: torch.Tensor) -> torch.Tensor:
        if key not in self._wanted:
            raise AdapterError(
                "merging reads a tensor that neither the base model nor the adapter has",
                path=self.source.path,
                hint="Merge where the model is loaded: with peft's merge_and_unload, or export_merged in a run.",
            )
        flat = torch.empty(data.untyped_storage().nbytes() // data.element_size(), dtype=data.dtype)
        reads = PlannedReads()
        for tensor in self._wanted[key]:
            self.source.add(_onto(tensor, key, flat), reads, None)
        reads.execute(self._reader, Group(None))
        return flat


_OPTIONS = LoadOptions(allow_unexpected=True, allow_cast=True)


def _onto(tensor: HeldTensor, key: int, flat: torch.Tensor) -> HeldTensor:
    """The destination with memory in the place of what has none, where it is a part of one storage."""
    parts = []
    for part in tensor.parts:
        own = [fragment for fragment in part.fragments if storage_key(fragment.data) == key]
        made = tuple(Fragment(fragment.box, bound(fragment.data, flat)) for fragment in own)
        parts.append(part._replace(fragments=made))
    return tensor._replace(parts=tuple(parts))


def _copied(reading: _Reading, tensor: HeldTensor) -> Iterator[memoryview]:
    dtype = torch_dtype(tensor.spec.dtype)
    if len(tensor.fragments) == 1 and tensor.fragments[0].box.sizes == tensor.grid:
        yield from byte_blocks(reading.whole(tensor.fragments[0].data), dtype)
        return
    whole = torch.empty(tensor.grid, dtype=dtype)
    for fragment in tensor.fragments:
        part_in_box(whole, fragment.box).copy_(reading.whole(fragment.data))
    yield from byte_blocks(whole, dtype)


def _computed(reading: _Reading, hub: HubState) -> Iterator[Piece]:
    """What is merged: one module at a time has memory."""
    for group in hub.groups:
        values = {native.spec.name: reading.fresh(native.fragments[0].data) for native in group.natives}
        made = group.computed.rule.forward(values)
        del values
        for spec in group.computed.hub:
            yield spec.name, byte_blocks(made.pop(spec.name), torch_dtype(spec.dtype))


def _merged(found: MergeInput, reading: _Reading) -> HubState:
    """Put the adapter on the model, and find its tensors in the base."""
    adapted = attach(found.model, found.adapter)
    take_extra(adapted, found.adapter)
    reading.match(adapted)
    (part,) = merged_parts([adapted])
    reading.alive.append(part)
    return merged_state(HubNames().capture(ModelState([part.model])), [adapted], [part], MayDiffer())


def _export(found: MergeInput, reading: _Reading, hub: HubState, layout: Layout) -> Export:
    held = {tensor.spec.name: tensor for tensor in hub.held}
    plain = {name: content for name, content in found.plain.items() if name != CONFIG_V5}
    plain |= {CONFIG: as_text(found.config).encode(), index_name("model"): layout.index}
    return Export(
        layout,
        [lambda: _computed(reading, hub), *batches_of(layout, lambda name: _copied(reading, held[name]), held)],
        lambda _: plain,
        lambda: None,
        tuple(AliasRecord("model", name, kept) for name, kept in hub.unwritten_aliases.items()),
        {"source": "merged", "base": str(found.base), "adapter": str(found.adapter)},
    )


def _files_of(source: BaseSource, names: set[str]) -> dict[str, str]:
    """The file of each tensor in the base, where its files have the names of an export and it is not quantized."""
    tensors = source.plain.tensors
    if source.behind or source.bins is not None or not names <= tensors.keys():
        return {}
    found = {name: source.plain.files[tensors[name].chunks[0].file].name for name in names}
    plain = all(len(tensors[name].chunks) == 1 for name in names)
    return found if plain and all(file.startswith("model") for file in found.values()) else {}
