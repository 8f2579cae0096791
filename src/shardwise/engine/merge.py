"""The merging path, for file systems that cannot take random writes: shards first, then finished files in turn.

It gives the same bytes as the direct path, because both follow the same layout; it costs what the direct path saves:
every byte is written, read and written again.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from shardwise.comm import Group
from shardwise.engine.export import ExportPlan, export_record
from shardwise.engine.merge_computed import write_aside
from shardwise.engine.records import ComponentRecord
from shardwise.engine.shards import ShardPlan, write_shards
from shardwise.errors import IntegrityError, StorageError
from shardwise.format.crc import crc32c
from shardwise.format.manifest import TensorRecord
from shardwise.io.reader import Reader
from shardwise.io.statefiles import write_plain
from shardwise.io.storage import Storage
from shardwise.io.stream import tensor_blocks
from shardwise.io.writer import locating
from shardwise.plan.layout import FileLayout, index_name
from shardwise.plan.reads import SourceChunk, SourceTensor
from shardwise.plan.roster import Roster
from shardwise.plan.shards import ShardFile, plan_shards

_BLOCK_BYTES = 8 * 2**20


@dataclass(frozen=True)
class MergeOptions:
    """How to merge.

    Attributes:
        single_rank: Rank 0 merges every file; otherwise the ranks take turns over the files.
        staging_dir: Local directory in which a file is finished before it is copied into place.
    """

    single_rank: bool
    staging_dir: Path | None


def write_merged(
    plan: ExportPlan, roster: Roster, group: Group, storage: Storage, options: MergeOptions
) -> ComponentRecord:
    """Write an export without a random write. All ranks of the group call.

    Returns:
        Files and tensors with their digests, on every rank; the same bytes as `write_export` writes.
    """
    aside = plan.directory.with_name(".merging")
    computed = write_aside(plan, aside, group, storage)
    files: tuple[ShardFile, ...] = ()
    with group.together("planning the shards"):
        files = plan_shards(plan.held, roster, group.rank)
    component = plan.options.component
    shards = ShardPlan(aside, component, computed.others(roster), files, replicas=plan.replicas)
    record = write_shards(shards, group, storage, everywhere=True)
    names = {file.path: number for number, file in enumerate(record.files)}
    sources = {tensor.spec.name: _source(tensor, names) for tensor in record.tensors}
    paths = [*(aside / file.path for file in record.files), *computed.paths, *plan.copies.files]
    digests: dict[str, int | None] = {tensor.spec.name: tensor.crc32c for tensor in record.tensors}
    digests |= computed.digests
    sources |= {name: _moved(tensor, len(names)) for name, tensor in computed.sources.items()}
    behind = len(names) + len(computed.paths)
    sources |= {tensor.spec.name: _moved(tensor, behind) for tensor in plan.copies.tensors}
    copied = {tensor.spec.name: 0 for tensor in plan.copies.tensors}
    with group.together(f"preparing {plan.directory}"):
        if group.is_main:
            storage.make_directory(plan.directory)
            storage.check_space(plan.directory, plan.layout.total_bytes)
    with group.together(f"merging shards into {plan.directory}"):
        for number, file in enumerate(plan.layout.files):
            if (0 if options.single_rank else number % group.world_size) == group.rank:
                with locating(plan.directory / file.name):
                    copied |= _merge_file(file, plan.directory / file.name, sources, paths, storage, options, digests)
    digests |= dict(zip(copied, group.fold(list(copied.values()), [], "sharing digests")[0], strict=True))
    with group.together(f"finishing {plan.directory}"):
        if group.is_main:
            index = plan.layout.index
            write_plain(storage, plan.directory / index_name(plan.options.stem), index)
            storage.sync_directory(plan.directory)
            shutil.rmtree(aside)
    return export_record(plan, {name: crc or 0 for name, crc in digests.items()})


def _source(tensor: TensorRecord, files: dict[str, int]) -> SourceTensor:
    return SourceTensor(
        tensor.spec, tuple(SourceChunk(chunk.box, files[chunk.file], chunk.offset) for chunk in tensor.chunks)
    )


def _moved(tensor: SourceTensor, by: int) -> SourceTensor:
    """The tensor in a longer list of files."""
    return SourceTensor(tensor.spec, tuple(chunk._replace(file=chunk.file + by) for chunk in tensor.chunks))


def _merge_file(
    file: FileLayout,
    target: Path,
    sources: dict[str, SourceTensor],
    paths: Sequence[Path],
    storage: Storage,
    options: MergeOptions,
    digests: dict[str, int | None],
) -> dict[str, int]:
    """Write one final file from front to back; returns the digests of tensors that had none."""
    found: dict[str, int] = {}
    place = target
    if options.staging_dir is not None:
        storage.make_directory(options.staging_dir)
        storage.check_space(options.staging_dir, file.size)
        place = options.staging_dir / f".shardwise-{target.name}"
    reader = Reader(storage, paths)
    storage.create(place, 0, b"")
    handle = storage.open(place, writable=True)
    try:
        storage.write(handle, file.header, 0)
        offset = len(file.header)
        for entry in file.entries:
            crc = 0
            for block in tensor_blocks(sources[entry.spec.name], reader):
                crc = crc32c(block, crc)
                storage.write(handle, block, offset)
                offset += len(block)
            if entry.spec.name not in digests:
                found[entry.spec.name] = crc
            elif entry.spec.nbytes and crc != digests[entry.spec.name]:
                raise IntegrityError(
                    "the bytes read back from the shards differ from those written",
                    path=target,
                    tensor=entry.spec.name,
                    hint="The file system or the memory of this node is not reliable; save elsewhere.",
                )
        storage.sync(handle)
    finally:
        storage.close(handle)
        reader.close()
    if place != target:
        _copy(place, target, file.size, storage)
    return found


def _copy(place: Path, target: Path, size: int, storage: Storage) -> None:
    """Copy a finished file to its place with large sequential writes."""
    source = storage.open(place, writable=False)
    try:
        storage.create(target, 0, b"")
        handle = storage.open(target, writable=True)
        try:
            buffer = bytearray(_BLOCK_BYTES)
            offset = 0
            while offset < size:
                got = storage.read(source, memoryview(buffer)[: min(len(buffer), size - offset)], offset)
                storage.write(handle, memoryview(buffer)[:got], offset)
                offset += got
            storage.sync(handle)
        finally:
            storage.close(handle)
    finally:
        storage.close(source)
    try:
        place.unlink()
    except OSError as error:
        raise StorageError.from_os(error, path=place) from error
