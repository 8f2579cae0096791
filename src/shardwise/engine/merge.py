"""The merging path, for file systems without random writes: first shards, then finished files in turn.

It gives the same bytes as the direct path, because both follow the same layout, but every byte is written, read and
written again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from shardwise.comm import Group, JsonValue
from shardwise.disk.private_directory import private_directory
from shardwise.disk.sequential import SequentialFile, blocks_of, write_file
from shardwise.disk.storage import Storage, storage_errors
from shardwise.dtypes import torch_dtype
from shardwise.engine.computed import write_computed
from shardwise.engine.export import ExportPlan, export_record
from shardwise.engine.records import ComponentRecord, merged
from shardwise.engine.shards import ShardPlan, write_shards
from shardwise.errors import IntegrityError
from shardwise.format.manifest import TensorRecord
from shardwise.geometry import Box, TensorSpec
from shardwise.plan.layout import FileLayout, index_name
from shardwise.plan.reads import SourceChunk, SourceTensor
from shardwise.plan.roster import Roster
from shardwise.plan.schedule import WriteRun
from shardwise.plan.shards import plan_shards
from shardwise.sources.tensor_bytes import byte_blocks
from shardwise.sources.verifying_reader import DigestLedger, RecordedDigest, VerifyingReader
from shardwise.timing import phase

_STAGE_ELSEWHERE = "Something else writes below staging_dir, or its disk is not reliable; name another directory."


@dataclass(frozen=True)
class MergeOptions:
    """Options of the merging path.

    Attributes:
        single_rank: Rank 0 merges every file; otherwise the ranks take turns over the files.
        staging_dir: Local directory below which a file is finished before it is copied into place. Runs may share it.
        patience_seconds: How long ranks wait for those that still merge; the group's time-out if not given.
    """

    single_rank: bool
    staging_dir: Path | None
    patience_seconds: float | None = None


def write_merged(
    plan: ExportPlan, roster: Roster, group: Group, storage: Storage, options: MergeOptions
) -> ComponentRecord:
    """Write an export without a random write. All ranks of the group call.

    Returns what `write_export` returns, which writes the same bytes.
    """
    aside = plan.directory.with_name(".merging")
    computed = _write_aside(plan, aside, group, storage)
    files = group.attempt(lambda: plan_shards(plan.held, roster, group.rank), "planning the shards")
    component = plan.options.component
    shards = ShardPlan(aside, component, computed.others(roster), files, replicas=plan.replicas)
    own_record = write_shards(shards, group, storage, most_chunks=None)
    record = merged(map(ComponentRecord.decoded, group.gather(own_record.encoded, "gathering records")))
    names = {file.path: number for number, file in enumerate(record.files)}
    sources = {tensor.spec.name: _source(tensor, names) for tensor in record.tensors}
    paths = [*(aside / file.path for file in record.files), *computed.paths, *plan.copies.files]
    sources |= {name: _moved(tensor, len(names)) for name, tensor in computed.sources.items()}
    behind = len(names) + len(computed.paths)
    sources |= {tensor.spec.name: _moved(tensor, behind) for tensor in plan.copies.tensors}
    ledger = _ledger(paths, aside, record, computed)
    digests = {entry.spec.name: 0 for file in plan.layout.files for entry in file.entries}
    with group.together(f"preparing {plan.directory}"):
        if group.is_main:
            storage.make_directory(plan.directory)
            storage.check_space(plan.directory, plan.layout.total_bytes)
    with phase("merge"), group.together(f"merging shards into {plan.directory}", options.patience_seconds):
        merging = _Merging(plan.directory, sources, paths, storage, ledger)
        own = [
            file
            for number, file in enumerate(plan.layout.files)
            if (0 if options.single_rank else number % group.world_size) == group.rank
        ]
        digests |= _merge_files(own, merging, options.staging_dir)
    crcs, _ = group.fold(list(digests.values()), [], "sharing digests")
    with group.together(f"finishing {plan.directory}"):
        if group.is_main:
            index = plan.layout.index
            write_file(storage, plan.directory / index_name(plan.options.stem), index)
            storage.sync_directory(plan.directory)
            with storage_errors(aside):
                storage.remove_tree(aside)
    return export_record(plan, dict(zip(digests, crcs, strict=True))) if group.is_main else ComponentRecord()


def _ledger(paths: Sequence[Path], aside: Path, record: ComponentRecord, computed: _ComputedFiles) -> DigestLedger:
    recorded: dict[Path, list[RecordedDigest]] = {path: [] for path in paths}
    for tensor in record.tensors:
        for chunk in tensor.chunks:
            run = RecordedDigest(chunk.offset, chunk.nbytes, chunk.crc32c, tensor.spec.name)
            recorded[aside / chunk.file].append(run)
    for name, made in computed.sources.items():
        [place] = made.chunks
        run = RecordedDigest(place.offset, made.spec.nbytes, computed.digests[name], name)
        recorded[computed.paths[place.file]].append(run)
    return DigestLedger({path: sorted(runs) for path, runs in recorded.items()})


def _source(tensor: TensorRecord, files: dict[str, int]) -> SourceTensor:
    chunks = [SourceChunk(chunk.box, files[chunk.file], chunk.offset) for chunk in tensor.chunks]
    return SourceTensor(tensor.spec, tuple(chunks))


def _moved(tensor: SourceTensor, by: int) -> SourceTensor:
    """The tensor in a longer list of files."""
    return SourceTensor(tensor.spec, tuple(chunk._replace(file=chunk.file + by) for chunk in tensor.chunks))


@dataclass(frozen=True, slots=True)
class _Merging:
    """The sources of merged files, and their directory.

    Each tensor in ``sources`` lies in ``paths``; what is read is compared with the digests in ``ledger``.
    """

    directory: Path
    sources: Mapping[str, SourceTensor]
    paths: Sequence[Path]
    storage: Storage
    ledger: DigestLedger


def _merge_files(files: Sequence[FileLayout], merging: _Merging, staging_dir: Path | None) -> dict[str, int]:
    """Write final files one after the other; returns the digests of the tensors in them."""
    found: dict[str, int] = {}
    storage, directory = merging.storage, merging.directory
    if staging_dir is None or not files:
        for file in files:
            found |= _merge_file(file, directory / file.name, merging)[0]
        return found
    with private_directory(staging_dir) as private:
        for file in files:
            place = private / file.name
            storage.check_space(private, file.size)
            digests, crc = _merge_file(file, place, merging)
            found |= digests
            _move(place, directory / file.name, file.size, crc, storage)
    return found


def _merge_file(file: FileLayout, place: Path, merging: _Merging) -> tuple[dict[str, int], int]:
    """Write one final file to ``place`` from front to back."""
    found: dict[str, int] = {}
    reader = VerifyingReader(merging.storage, merging.paths, merging.ledger)
    try:
        with SequentialFile(merging.storage, place) as made:
            made.append([file.header])
            for entry in file.entries:
                name = entry.spec.name
                found[name] = made.append(reader.blocks(merging.sources[name]), name)
    finally:
        reader.close()
    return found, made.crc32c


def _move(place: Path, target: Path, size: int, crc: int, storage: Storage) -> None:
    """Copy a finished file to its place with large sequential writes, compare what is copied, and remove the copy.

    Raises:
        IntegrityError: It has other bytes, or fewer.
    """
    with SequentialFile(storage, target) as copy:
        found = copy.append(blocks_of(storage, place))
        if copy.size < size or found != crc:
            what = "has other bytes than were written to it"
            what = f"ends after {copy.size} of {size} bytes" if copy.size < size else what
            raise IntegrityError(f"the staged file {what}", path=place, hint=_STAGE_ELSEWHERE)
    with storage_errors(place):
        storage.remove_file(place)


@dataclass(frozen=True)
class _ComputedFiles:
    """The files of all ranks' computed tensors; the same on every rank.

    ``sources`` and ``digests`` are by tensor name; chunks refer to ``paths``.
    """

    paths: tuple[Path, ...]
    sources: Mapping[str, SourceTensor]
    digests: Mapping[str, int]

    def others(self, roster: Roster) -> Roster:
        """The roster without the computed tensors, which no rank holds."""
        if not self.sources:
            return roster
        declarations = dict(roster.declarations)
        for digest, declaration in declarations.items():
            specs = tuple(spec for spec in declaration.specs if spec.name not in self.sources)
            declarations[digest] = replace(declaration, specs=specs)
        return Roster(declarations, roster.digests, roster.coordinates)


def _write_aside(plan: ExportPlan, directory: Path, group: Group, storage: Storage) -> _ComputedFiles:
    """Compute what has to be computed and put it into ``directory``, front to back. All ranks of the group call.

    One group of tensors is in memory at a time, on the rank that computes it.

    Raises:
        ConversionError: The conversion did not give what it announced.
        StorageError: The file system refused, on any rank; the same error on every rank.
    """
    if not group.any(bool(plan.computed.groups), "looking for tensors that have to be computed"):
        return _ComputedFiles((), {}, {})
    paths = tuple(directory / f"computed-{rank:05d}" for rank in range(1, group.world_size + 1))
    own: list[JsonValue] = []
    with group.together(f"computing tensors of {plan.directory}"):
        storage.make_directory(directory)
        with SequentialFile(storage, paths[group.rank]) as file:

            def append(run: WriteRun) -> None:
                start = file.size
                crc = file.append(byte_blocks(run.data, torch_dtype(run.spec.dtype)), run.spec.name)
                own.append([run.spec.name, list(run.spec.shape), run.spec.dtype, start, crc])

            failure = write_computed(plan.computed, plan.layout, group, append)
            if failure is not None:
                raise failure
    rows = cast(list[list[list[JsonValue]]], group.gather_json(own, "gathering records"))
    sources: dict[str, SourceTensor] = {}
    digests: dict[str, int] = {}
    for number, theirs in enumerate(rows):
        for row in theirs:
            name, shape, dtype, offset, crc = cast(tuple[str, list[int], str, int, int], tuple(row))
            spec = TensorSpec(name, tuple(shape), dtype)
            sources[name] = SourceTensor(spec, (SourceChunk(Box.whole(spec.shape), number, offset),))
            digests[name] = crc
    return _ComputedFiles(paths, sources, digests)
