"""Writing sharded files: no file is shared between ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import cast

from shardwise.comm import Group, JsonValue
from shardwise.engine.records import ComponentRecord, FileRow, check_written, file_row
from shardwise.format.crc import combine, crc32c
from shardwise.format.dtypes import torch_dtype
from shardwise.format.header import encode_header, encode_sharding_metadata
from shardwise.format.manifest import ChunkRecord, FileRecord, TensorRecord
from shardwise.io.digest import contribution
from shardwise.io.storage import Storage
from shardwise.io.writer import Digests, FileSet, totals, write_run
from shardwise.plan.layout import FileLayout, shard_name
from shardwise.plan.roster import Roster
from shardwise.plan.schedule import Run
from shardwise.plan.shards import ShardFile
from shardwise.types import Box

#: Most chunks that a manifest lists of one component's shards. There is one for each tensor and rank, and each takes
#: rank 0 about 10 microseconds; above that the manifest has one digest for each file, and names no tensors in them.
MOST_CHUNKS = 300_000


@dataclass(frozen=True)
class ShardPlan:
    """A sharded save that only waits for its bytes."""

    directory: Path
    component: str
    roster: Roster
    files: tuple[ShardFile, ...]


def without_tensors(stem: str = "model") -> ShardFile:
    """A shard file with nothing in it: what makes a directory one of shards where no rank holds a tensor.

    Args:
        stem: What the second half of the file's name starts with.
    """
    header = encode_header((), encode_sharding_metadata({}))
    return ShardFile(FileLayout(shard_name(1, 1, 1, stem), header, ()), {})


def write_shards(
    plan: ShardPlan, group: Group, storage: Storage, *, everywhere: bool = False, most_chunks: int = MOST_CHUNKS
) -> ComponentRecord:
    """Write this rank's shard files. All ranks of the group call; files are durable when it returns.

    Args:
        plan: What to write where.
        group: The ranks that save together.
        storage: Through what.
        everywhere: Whether every rank is to know what all have written. Its cost grows with tensors times ranks, and
            the manifest, which is what it is for, is written by one.
        most_chunks: Up to how many chunks of all ranks are told, unless ``everywhere`` asks for them.

    Returns:
        Files and tensors of all ranks, on rank 0 or ``everywhere``; nothing on the other ranks. Above ``most_chunks``
        only files, with digests of their whole content.

    Raises:
        StorageError: The file system refused, on any rank; the same error on every rank.
    """
    digests = Digests()
    chunks: dict[str, list[ChunkRecord]] = {}
    nbytes = sum(file.layout.size for file in plan.files)
    total = sum(group.fold([], [nbytes], "adding up what is to be written")[1])
    with group.together(f"reserving space in {plan.directory}"):
        storage.make_directory(plan.directory)
        storage.check_space(plan.directory, total if group.is_main else nbytes)
        for file in plan.files:
            storage.create(plan.directory / file.layout.name, file.layout.size, file.layout.header)
    with group.together(f"writing {plan.directory}"):
        files = FileSet(storage, [plan.directory / file.layout.name for file in plan.files])
        try:
            for number, file in enumerate(plan.files):
                _write_file(number, file, files, storage, digests, chunks)
            files.sync()
            storage.sync_directory(plan.directory)
        finally:
            files.close()
    return _gather(plan, group, digests, chunks, everywhere, most_chunks)


def _write_file(
    number: int,
    file: ShardFile,
    files: FileSet,
    storage: Storage,
    digests: Digests,
    chunks: dict[str, list[ChunkRecord]],
) -> None:
    head = len(file.layout.header)
    for entry in file.layout.entries:
        piece = file.pieces[entry.spec.name]
        run = Run(number, head + entry.begin, piece.tensor, entry.spec, 0, piece.data)
        crc = write_run(run, files, storage)
        name, dtype = piece.spec.name, torch_dtype(piece.spec.dtype)
        share = contribution(piece.box, piece.spec.shape, piece.data, crc, dtype)
        digests.crcs[name] = digests.crcs.get(name, 0) ^ share
        digests.counts[name] = digests.counts.get(name, 0) + run.nbytes
        chunks.setdefault(name, []).append(
            ChunkRecord(file.layout.name, head + entry.begin, run.nbytes, piece.box, crc)
        )


def _gather(
    plan: ShardPlan,
    group: Group,
    digests: Digests,
    chunks: dict[str, list[ChunkRecord]],
    everywhere: bool,
    most_chunks: int,
) -> ComponentRecord:
    specs = plan.roster.specs
    own_crcs, own_counts = totals([spec.name for spec in specs], digests)
    own_chunks = sum(map(len, chunks.values()))
    crcs, (*counts, all_chunks) = group.fold(own_crcs, [*own_counts, own_chunks], "combining digests")
    for spec, count in zip(specs, counts, strict=True):
        check_written(spec, count, plan.directory)
    is_listed = everywhere or all_chunks <= most_chunks
    files = _described(plan.files) if is_listed else _digested(plan.files, chunks)
    own: JsonValue = [
        [file_row(file) for file in files],
        {name: [_encode(chunk) for chunk in found] for name, found in chunks.items()} if is_listed else {},
    ]
    gather = group.gather_json if everywhere else group.collect_json
    rows = cast(list[tuple[list[FileRow], dict[str, list[list[int]]]]], gather(own, "gathering records"))
    if not rows:
        return ComponentRecord()
    all_files = tuple(FileRecord(*row) for named, _ in rows for row in named)
    if not is_listed:
        return ComponentRecord(all_files)
    together: dict[str, list[ChunkRecord]] = {}
    for _, theirs in rows:
        for name, encoded in theirs.items():
            together.setdefault(name, []).extend(_decode(chunk) for chunk in encoded)
    tensors = []
    for spec, crc in zip(specs, crcs, strict=True):
        ordered = tuple(sorted(together.get(spec.name, []), key=lambda chunk: chunk.box.offsets))
        tensors.append(TensorRecord(plan.component, spec, crc if spec.nbytes else crc32c(b""), ordered))
    return ComponentRecord(all_files, tuple(tensors))


def _described(files: Sequence[ShardFile]) -> list[FileRecord]:
    """Records of files whose content the chunks of tensors describe."""
    layouts = [file.layout for file in files]
    return [FileRecord(f.name, f.size, crc32c(f.header), len(f.header)) for f in layouts]


def _digested(files: Sequence[ShardFile], chunks: Mapping[str, Sequence[ChunkRecord]]) -> list[FileRecord]:
    """Records of files with digests of their whole content, put together from those of their pieces."""
    by_file: dict[str, list[ChunkRecord]] = {}
    for found in chunks.values():
        for chunk in found:
            if chunk.nbytes:
                by_file.setdefault(chunk.file, []).append(chunk)
    records = []
    for file in files:
        crc = crc32c(file.layout.header)
        for chunk in sorted(by_file.get(file.layout.name, ()), key=attrgetter("offset")):
            crc = combine(crc, chunk.crc32c, chunk.nbytes)
        records.append(FileRecord(file.layout.name, file.layout.size, crc, None))
    return records


def _encode(chunk: ChunkRecord) -> JsonValue:
    return [chunk.file, chunk.offset, chunk.nbytes, list(chunk.box.offsets), list(chunk.box.sizes), chunk.crc32c]


def _decode(value: Sequence[object]) -> ChunkRecord:
    file, offset, nbytes, offsets, sizes, crc = cast(tuple[str, int, int, list[int], list[int], int], tuple(value))
    return ChunkRecord(file, offset, nbytes, Box(tuple(offsets), tuple(sizes)), crc)
