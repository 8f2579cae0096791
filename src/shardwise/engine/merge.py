"""The merging path, for file systems that cannot take random writes: shards first, then finished files in turn.

It gives the same bytes as the direct path, because both follow the same layout; it costs what the direct path saves:
every byte is written, read and written again.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from shardwise.comm import Group
from shardwise.disk.crc import crc32c
from shardwise.disk.private_directory import private_directory
from shardwise.disk.storage import Storage, locating
from shardwise.engine.export import ExportPlan, export_record
from shardwise.engine.merge_computed import write_aside
from shardwise.engine.records import ComponentRecord
from shardwise.engine.shards import ShardPlan, write_shards
from shardwise.errors import IntegrityError, StorageError
from shardwise.format.manifest import TensorRecord
from shardwise.plan.layout import FileLayout, index_name
from shardwise.plan.reads import SourceChunk, SourceTensor
from shardwise.plan.roster import Roster
from shardwise.plan.shards import ShardFile, plan_shards
from shardwise.sources.reader import Reader
from shardwise.sources.state_files import write_plain
from shardwise.sources.stream import tensor_blocks

_BLOCK_BYTES = 8 * 2**20
_STAGE_ELSEWHERE = "Something else writes below staging_dir, or its disk is not reliable; name another directory."


@dataclass(frozen=True)
class MergeOptions:
    """How to merge.

    Attributes:
        single_rank: Rank 0 merges every file; otherwise the ranks take turns over the files.
        staging_dir: Local directory below which a file is finished before it is copied into place. Runs may share it.
        patience_seconds: How long ranks that are done wait for those that still merge; the group's time-out if not
            given.
    """

    single_rank: bool
    staging_dir: Path | None
    patience_seconds: float | None = None


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
    with group.together(f"merging shards into {plan.directory}", options.patience_seconds):
        merging = _Merging(plan.directory, sources, paths, storage, digests)
        own = [
            file
            for number, file in enumerate(plan.layout.files)
            if (0 if options.single_rank else number % group.world_size) == group.rank
        ]
        copied |= _merge_files(own, merging, options.staging_dir)
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


@dataclass(frozen=True, slots=True)
class _Merging:
    """What files are merged from, and where to.

    Attributes:
        directory: The final files' directory.
        sources: Where each tensor lies in ``paths``.
        paths: The files to read.
        storage: Where data goes.
        digests: The tensors' digests, as far as they are known.
    """

    directory: Path
    sources: Mapping[str, SourceTensor]
    paths: Sequence[Path]
    storage: Storage
    digests: Mapping[str, int | None]


def _merge_files(files: Sequence[FileLayout], merging: _Merging, staging_dir: Path | None) -> dict[str, int]:
    """Write final files one after the other; returns the digests of tensors that had none."""
    found: dict[str, int] = {}
    storage, directory = merging.storage, merging.directory
    if staging_dir is None or not files:
        for file in files:
            with locating(directory / file.name):
                found |= _merge_file(file, directory / file.name, merging)[0]
        return found
    with private_directory(staging_dir) as private:
        for file in files:
            place, target = private / file.name, directory / file.name
            with locating(place):
                storage.check_space(private, file.size)
                digests, crc = _merge_file(file, place, merging)
                found |= digests
            with locating(target):
                _move(place, target, file.size, crc, storage)
    return found


def _merge_file(file: FileLayout, place: Path, merging: _Merging) -> tuple[dict[str, int], int]:
    """Write one final file to ``place`` from front to back.

    Returns:
        The digests of tensors that had none, and the whole file's.
    """
    found: dict[str, int] = {}
    storage, digests = merging.storage, merging.digests
    reader = Reader(storage, merging.paths)
    storage.create(place, 0, b"")
    handle = storage.open(place, writable=True)
    try:
        storage.write(handle, file.header, 0)
        offset, whole = len(file.header), crc32c(file.header)
        for entry in file.entries:
            crc = 0
            for block in tensor_blocks(merging.sources[entry.spec.name], reader):
                crc = crc32c(block, crc)
                whole = crc32c(block, whole)
                storage.write(handle, block, offset)
                offset += len(block)
            if entry.spec.name not in digests:
                found[entry.spec.name] = crc
            elif entry.spec.nbytes and crc != digests[entry.spec.name]:
                raise IntegrityError(
                    "the bytes read back from the shards differ from those written",
                    path=place,
                    tensor=entry.spec.name,
                    hint="The file system or the memory of this node is not reliable; save elsewhere.",
                )
        storage.sync(handle)
    finally:
        storage.close(handle)
        reader.close()
    return found, whole


def _move(place: Path, target: Path, size: int, crc: int, storage: Storage) -> None:
    """Copy a finished file to its place with large sequential writes, compare what is copied, and remove the copy.

    Args:
        place: The finished file.
        target: Its place.
        size: Its bytes.
        crc: The digest of what was written to it.
        storage: Where data goes.

    Raises:
        IntegrityError: It has other bytes, or fewer.
    """
    source = storage.open(place, writable=False)
    try:
        storage.create(target, 0, b"")
        handle = storage.open(target, writable=True)
        try:
            buffer = bytearray(_BLOCK_BYTES)
            offset, found = 0, 0
            while offset < size:
                block = memoryview(buffer)[: min(len(buffer), size - offset)]
                got = storage.read(source, block, offset)
                if got != len(block):
                    raise IntegrityError(
                        f"the staged file ends after {offset + got} of {size} bytes", path=place, hint=_STAGE_ELSEWHERE
                    )
                found = crc32c(block, found)
                storage.write(handle, block, offset)
                offset += got
            if found != crc:
                raise IntegrityError(
                    "the staged file has other bytes than were written to it", path=place, hint=_STAGE_ELSEWHERE
                )
            storage.sync(handle)
        finally:
            storage.close(handle)
    finally:
        storage.close(source)
    try:
        place.unlink()
    except OSError as error:
        raise StorageError.from_os(error, path=place) from error
