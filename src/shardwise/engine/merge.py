"""The merging path, for file systems without random writes: first shards, then finished files in turn.

It gives the same bytes as the direct path, because both follow the same layout, but every byte is written, read and
written again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

from shardwise.comm import Group
from shardwise.disk.processes import private_directory
from shardwise.disk.sequential import SequentialFile, blocks_of, write_file
from shardwise.disk.storage import Storage, storage_errors
from shardwise.dtypes import torch_dtype
from shardwise.engine.computed import write_computed
from shardwise.engine.export import ExportPlan, export_record, make_room
from shardwise.engine.records import ComponentRecord, merged
from shardwise.engine.shards import ShardPlan, write_shards
from shardwise.errors import IntegrityError
from shardwise.format.manifest import ChunkRecord, FileRecord, TensorRecord
from shardwise.geometry import Box
from shardwise.plan.layout import FileLayout, index_name
from shardwise.plan.reads import SourceChunk, SourceTensor
from shardwise.plan.roster import Roster
from shardwise.plan.schedule import WriteRun, plan_shards
from shardwise.sources.reader import DigestLedger, RecordedDigest, VerifyingReader
from shardwise.sources.tensor_bytes import byte_blocks
from shardwise.timing import phase

_STAGE_ELSEWHERE = "Something else writes below staging_dir, or its disk is not reliable; name another directory."


def write_merged(
    plan: ExportPlan,
    roster: Roster,
    group: Group,
    storage: Storage,
    *,
    single_rank: bool,
    staging_dir: Path | None,
    patience_seconds: float,
) -> ComponentRecord:
    """As `write_export`, the same bytes and record, without a random write. All ranks of the group call.

    If ``single_rank``, rank 0 merges every file; otherwise the ranks take turns over the files. Below ``staging_dir``,
    which is local and which runs may share, a file is finished before it is copied into place. Ranks wait
    ``patience_seconds`` for those that still merge.
    """
    aside = plan.directory.with_name(".merging")
    computed = _write_aside(plan, aside, group, storage)
    files = group.attempt(lambda: plan_shards(plan.held, roster, group.rank), "planning the shards")
    component = plan.options.component
    shards = ShardPlan(aside, component, _without(roster, computed), files, replicas=plan.replicas)
    record = _gathered(write_shards(shards, group, storage, most_chunks=None), group) + computed
    names = {file.path: number for number, file in enumerate(record.files)}
    sources = {tensor.spec.name: _source(tensor, names) for tensor in record.tensors}
    sources |= {tensor.spec.name: _moved(tensor, len(names)) for tensor in plan.copies.tensors}
    paths = [*(aside / file.path for file in record.files), *plan.copies.files]
    recorded: dict[Path, list[RecordedDigest]] = {path: [] for path in paths}
    for tensor in record.tensors:
        for chunk in tensor.chunks:
            run = RecordedDigest(chunk.offset, chunk.nbytes, chunk.crc32c, tensor.spec.name)
            recorded[aside / chunk.file].append(run)
    ledger = DigestLedger({path: sorted(runs) for path, runs in recorded.items()})
    digests = {entry.spec.name: 0 for file in plan.layout.files for entry in file.entries}
    with group.together(f"preparing {plan.directory}"):
        if group.is_main:
            make_room(plan, storage)
    with phase("merge"), group.together(f"merging shards into {plan.directory}", patience_seconds):
        merging = _Merging(sources, paths, storage, ledger)
        own = [
            file
            for number, file in enumerate(plan.layout.files)
            if (0 if single_rank else number % group.world_size) == group.rank
        ]
        digests |= _merge_files(own, merging, plan.directory, staging_dir)
    crcs, _ = group.fold(list(digests.values()), [], "sharing digests")
    with group.together(f"finishing {plan.directory}"):
        if group.is_main:
            index = plan.layout.index
            write_file(storage, plan.directory / index_name(plan.options.stem), index)
            storage.sync_directory(plan.directory)
            with storage_errors(aside):
                storage.remove_tree(aside)
    return export_record(plan, dict(zip(digests, crcs, strict=True))) if group.is_main else ComponentRecord()


def _gathered(own: ComponentRecord, group: Group) -> ComponentRecord:
    return merged(map(ComponentRecord.decoded, group.gather(own.encoded, "gathering records")))


def _source(tensor: TensorRecord, files: dict[str, int]) -> SourceTensor:
    chunks = [SourceChunk(chunk.box, files[chunk.file], chunk.offset) for chunk in tensor.chunks]
    return SourceTensor(tensor.spec, tuple(chunks))


def _moved(tensor: SourceTensor, by: int) -> SourceTensor:
    """The tensor in a longer list of files."""
    return SourceTensor(tensor.spec, tuple(chunk._replace(file=chunk.file + by) for chunk in tensor.chunks))


@dataclass(frozen=True, slots=True)
class _Merging:
    """Each tensor in ``sources`` lies in ``paths``; what is read is compared with the digests in ``ledger``."""

    sources: Mapping[str, SourceTensor]
    paths: Sequence[Path]
    storage: Storage
    ledger: DigestLedger

    def write(self, file: FileLayout, place: Path) -> tuple[dict[str, int], int]:
        """Write one final file to ``place`` from front to back; returns the tensors' digests and its own."""
        found: dict[str, int] = {}
        reader = VerifyingReader(self.storage, self.paths, self.ledger)
        with closing(reader), SequentialFile(self.storage, place) as made:
            made.append([file.header])
            for entry in file.entries:
                name = entry.spec.name
                found[name] = made.append(reader.blocks(self.sources[name]), name)
        return found, made.crc32c


def _merge_files(
    files: Sequence[FileLayout], merging: _Merging, directory: Path, staging_dir: Path | None
) -> dict[str, int]:
    """Write final files one after the other; returns the digests of the tensors in them."""
    found: dict[str, int] = {}
    storage = merging.storage
    if staging_dir is None or not files:
        for file in files:
            found |= merging.write(file, directory / file.name)[0]
        return found
    with private_directory(staging_dir) as private:
        for file in files:
            place = private / file.name
            storage.check_space(private, file.size)
            digests, crc = merging.write(file, place)
            found |= digests
            _move(place, directory / file.name, file.size, crc, storage)
    return found


def _move(place: Path, target: Path, size: int, crc: int, storage: Storage) -> None:
    """Copy a finished file to its place with large sequential writes, compare what is copied, and remove the copy.

    Raises `IntegrityError`: it has other bytes, or fewer.
    """
    with SequentialFile(storage, target) as copy:
        found = copy.append(blocks_of(storage, place))
        if copy.size < size or found != crc:
            what = "has other bytes than were written to it"
            what = f"ends after {copy.size} of {size} bytes" if copy.size < size else what
            raise IntegrityError(f"the staged file {what}", path=place, hint=_STAGE_ELSEWHERE)
    with storage_errors(place):
        storage.remove_file(place)


def _without(roster: Roster, computed: ComponentRecord) -> Roster:
    """The roster without the computed tensors, which no rank holds."""
    if not computed.tensors:
        return roster
    names = {tensor.spec.name for tensor in computed.tensors}
    declarations = dict(roster.declarations)
    for digest, declaration in declarations.items():
        specs = tuple(spec for spec in declaration.specs if spec.name not in names)
        declarations[digest] = replace(declaration, specs=specs)
    return Roster(declarations, roster.digests, roster.coordinates)


def _write_aside(plan: ExportPlan, directory: Path, group: Group, storage: Storage) -> ComponentRecord:
    """Compute what has to be computed and put it into ``directory``, front to back. All ranks of the group call.

    One group of tensors is in memory at a time, on the rank that computes it. Returns the record of all ranks.

    Raises:
        ConversionError: The conversion did not give what it announced.
        StorageError: The file system refused, on any rank; the same error on every rank.
    """
    if not group.any(bool(plan.computed.groups), "looking for tensors that have to be computed"):
        return ComponentRecord()
    name, own = f"computed-{group.rank + 1:05d}", list[TensorRecord]()
    with group.together(f"computing tensors of {plan.directory}"):
        storage.make_directory(directory)
        with SequentialFile(storage, directory / name) as file:

            def append(run: WriteRun) -> None:
                spec, start = run.spec, file.size
                crc = file.append(byte_blocks(run.data, torch_dtype(spec.dtype)), spec.name)
                chunk = ChunkRecord(name, start, spec.nbytes, Box.whole(spec.shape), crc)
                own.append(TensorRecord(plan.options.component, spec, crc, (chunk,)))

            failure = write_computed(plan.computed, plan.layout, group, append)
            if failure is not None:
                raise failure
    files = (FileRecord(name, file.size, file.crc32c, None),) if own else ()
    return _gathered(ComponentRecord(files, tuple(own)), group)
