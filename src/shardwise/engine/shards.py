"""Writes sharded files: no file is shared between ranks."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from shardwise.comm import FirstFailure, Group
from shardwise.disk.crc import combine, crc32c
from shardwise.disk.storage import Storage
from shardwise.engine.progress import Progress
from shardwise.engine.records import ComponentRecord, check_written
from shardwise.engine.replicas import Comparison, comparison, look_at, refuse, share_of
from shardwise.engine.writer import FileSet, write_run
from shardwise.format.header import encode_header, encode_sharding_metadata
from shardwise.format.manifest import ChunkRecord, FileRecord, TensorRecord
from shardwise.plan.fragments import HeldTensor
from shardwise.plan.layout import FileLayout, shard_name
from shardwise.plan.roster import Roster
from shardwise.plan.schedule import ShardFile, WriteRun, plan_shards
from shardwise.timing import count_bytes, phase, timed

#: Most chunks that a manifest lists of one component's shards. There is one for each tensor and rank, and each takes
#: rank 0 about 10 microseconds; above that the manifest has one digest for each file, and names no tensors in them.
MOST_CHUNKS = 300_000


@dataclass(frozen=True)
class ShardPlan:
    """A planned sharded save; it may be written again as long as the held tensors stay where they are.

    ``all_bytes`` are those of all ranks' files, if they have been added up; ``replicas`` are compared before anything
    is published.
    """

    directory: Path
    component: str
    roster: Roster
    files: tuple[ShardFile, ...]
    all_bytes: int | None = None
    replicas: tuple[Comparison, ...] = ()

    @property
    def own_bytes(self) -> int:
        """Bytes of this rank's files."""
        return sum(file.layout.size for file in self.files)


@phase("plan")
def shard_plan(
    held: Sequence[HeldTensor], roster: Roster, group: Group, directory: Path, component: str, stem: str
) -> ShardPlan:
    """Plan the shards of one component; replicas are compared while they are written. All ranks call."""
    what = f"planning the files of {component}"
    files = group.attempt(lambda: plan_shards(held, roster, group.rank, stem=stem), what)
    return ShardPlan(directory, component, roster, files, replicas=(comparison(held, roster, group.rank),))


def without_tensors() -> ShardFile:
    """A shard file with nothing in it: what makes a directory one of shards where no rank holds a tensor."""
    header = encode_header((), encode_sharding_metadata({}))
    return ShardFile(FileLayout(shard_name(1, 1, 1, "model"), header, ()), {})


def write_shards(
    plan: ShardPlan, group: Group, storage: Storage, *, most_chunks: int | None = MOST_CHUNKS
) -> ComponentRecord:
    """Write this rank's shard files. All ranks of the group call; files are durable when it returns.

    Returns this rank's files and its pieces of tensors, to be `shardwise.engine.records.merged` with those of the
    others; rank 0's names every tensor. If all ranks together have more than ``most_chunks`` (``None`` for any number),
    only files, with digests of their whole content. Raises as `shardwise.engine.export.write_export`.
    """
    nbytes, total = plan.own_bytes, plan.all_bytes
    if total is None:
        _, [total] = group.fold([], [nbytes], "adding up what is to be written")
    with group.together(f"looking for space in {plan.directory}"):
        storage.make_directory(plan.directory)
        storage.check_space(plan.directory, total if group.is_main else nbytes)
    # After rank 0 has checked: it would otherwise ask again for space that other ranks have reserved.
    with group.together(f"reserving space in {plan.directory}"):
        for file in plan.files:
            storage.create(plan.directory / file.layout.name, file.layout.size, file.layout.header)
    kept = FirstFailure()
    written: list[list[ChunkRecord]] = []
    seen: list[Comparison] = []
    with kept, Progress(f"saving {plan.component}", plan.own_bytes, group.is_main) as progress:
        written = _write(plan, storage, progress)
        seen = look_at(plan.replicas)
    is_listed = _check(plan, group, written, seen, kept.error, most_chunks)
    return _listed(plan, written, names_all=group.is_main) if is_listed else _digested(plan, written)


@phase("write")
def _write(plan: ShardPlan, storage: Storage, progress: Progress) -> list[list[ChunkRecord]]:
    """Write the files and make them durable; returns the pieces in each, in the order of its entries."""
    written: list[list[ChunkRecord]] = []
    digest = timed("digest", crc32c)
    with closing(FileSet(storage, [plan.directory / file.layout.name for file in plan.files])) as files:
        for number, file in enumerate(plan.files):
            head, chunks = len(file.layout.header), list[ChunkRecord]()
            files.handle(number)  # a file without a tensor's bytes has a header to be synced all the same
            for spec, begin, end in file.layout.entries:
                piece = file.pieces[spec.name]
                run = WriteRun(number, head + begin, spec, 0, piece.data)
                crc = write_run(run, files, storage, digest)
                progress.add(end - begin)
                chunks.append(ChunkRecord(file.layout.name, head + begin, end - begin, piece.box, crc))
            written.append(chunks)
        files.sync()
        count_bytes(sum(chunk.nbytes for chunks in written for chunk in chunks))
        storage.sync_directory(plan.directory)
    return written


@phase("fold")
def _check(
    plan: ShardPlan,
    group: Group,
    written: list[list[ChunkRecord]],
    seen: list[Comparison],
    failure: Exception | None,
    most_chunks: int | None,
) -> bool:
    """Check that the ranks together wrote every byte, once; returns whether their chunks are to be recorded."""
    specs = plan.roster.specs
    own = {spec.name: 0 for spec in specs}
    for file, chunks in zip(plan.files, written, strict=False):  # after a failure only some have been written
        for entry, chunk in zip(file.layout.entries, chunks, strict=True):
            own[entry.spec.name] += chunk.nbytes
    sums = [*own.values(), sum(map(len, written)), share_of(seen)]
    _, (*counts, all_chunks, differ) = group.fold([], sums, f"writing {plan.directory}", failure)
    if differ:
        refuse(seen, group)
    for spec, count in zip(specs, counts, strict=True):
        check_written(spec, count, plan.directory)
    return most_chunks is None or all_chunks <= most_chunks


def _listed(plan: ShardPlan, written: list[list[ChunkRecord]], *, names_all: bool) -> ComponentRecord:
    """Records of files, and of the tensors in them."""
    layouts = [file.layout for file in plan.files]
    files = [FileRecord.of_tensors(f.name, f.size, f.header) for f in layouts]
    found: dict[str, list[ChunkRecord]] = {spec.name: [] for spec in plan.roster.specs}
    for layout, chunks in zip(layouts, written, strict=True):
        for entry, chunk in zip(layout.entries, chunks, strict=True):
            found[entry.spec.name].append(chunk)
    tensors = [
        TensorRecord(plan.component, spec, None, tuple(sorted(found[spec.name], key=lambda chunk: chunk.box.offsets)))
        for spec in plan.roster.specs
        if names_all or found[spec.name]
    ]
    return ComponentRecord(tuple(files), tuple(tensors))


def _digested(plan: ShardPlan, written: list[list[ChunkRecord]]) -> ComponentRecord:
    """Records of files alone, with digests of their whole content, put together from those of their pieces."""
    records = []
    for file, chunks in zip(plan.files, written, strict=True):
        crc = crc32c(file.layout.header)
        for chunk in chunks:  # without gaps
            crc = combine(crc, chunk.crc32c, chunk.nbytes) if chunk.nbytes else crc
        records.append(FileRecord(file.layout.name, file.layout.size, crc, None))
    return ComponentRecord(tuple(records))
