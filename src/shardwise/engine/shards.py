"""Writing sharded files: no file is shared between ranks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, TypeAlias, cast

from shardwise.comm import Group, JsonValue
from shardwise.disk.crc import combine, crc32c
from shardwise.disk.storage import Storage
from shardwise.dtypes import torch_dtype
from shardwise.engine.memo import Memo
from shardwise.engine.records import ComponentRecord, FileRow, Told, check_written, file_row
from shardwise.engine.replicas import Comparison, Seen, look_at, refuse
from shardwise.engine.writer import Digests, FileSet, Prepared, prepare, totals, write_prepared
from shardwise.format.header import encode_header
from shardwise.format.manifest import ChunkRecord, FileRecord, TensorRecord
from shardwise.format.sharding import encode_sharding_metadata
from shardwise.geometry import Box, TensorSpec, only_run
from shardwise.plan.layout import FileLayout, shard_name
from shardwise.plan.roster import Roster
from shardwise.plan.schedule import Run
from shardwise.plan.shards import Piece, ShardFile
from shardwise.sources.digest import contribution

#: Most chunks that a manifest lists of one component's shards. There is one for each tensor and rank, and each takes
#: rank 0 about 10 microseconds; above that the manifest has one digest for each file, and names no tensors in them.
MOST_CHUNKS = 300_000
#: Up to so many chunks rank 0 keeps what the ranks have told of them for the next save: some 500 bytes for each.
_KEPT_CHUNKS = 40_000


class _Piece(NamedTuple):
    """One piece that is ready to be written.

    Attributes:
        run: Its bytes.
        piece: The piece.
        place: What the manifest says of it, but for its digest.
        is_one_run: Whether it is one run of bytes of the whole tensor, so that its digest tells what it contributes.
    """

    run: Prepared
    piece: Piece
    place: ChunkRecord
    is_one_run: bool


@dataclass(frozen=True)
class _Written:
    """What a rank has written: contributions to digests, those of its pieces, with what it failed; its replicas."""

    digests: Digests
    crcs: list[int]
    failure: Exception | None
    seen: Seen


_ChunkRow: TypeAlias = tuple[str, str, int, int, list[int], list[int]]
_Places: TypeAlias = tuple[tuple[tuple[int, ChunkRecord], ...], ...]
_Known: TypeAlias = tuple[tuple[FileRecord, ...], _Places]


@dataclass(frozen=True)
class Kept:
    """What one writing of a plan finds and the next can use."""

    pieces: Memo[tuple[_Piece, ...]] = field(default_factory=Memo)
    text: Memo[str] = field(default_factory=Memo)
    known: Memo[_Known] = field(default_factory=Memo)


@dataclass(frozen=True)
class ShardPlan:
    """A sharded save that only waits for its bytes, and may be written again as long as what is held stays there.

    Attributes:
        directory: Where the files go.
        component: Name of the component in the manifest.
        roster: Who holds what.
        files: This rank's files.
        all_bytes: Bytes of all ranks' files, if they have been added up.
        replicas: What this rank holds that others hold too, to be compared before anything is published.
        kept: What one writing leaves for the next.
    """

    directory: Path
    component: str
    roster: Roster
    files: tuple[ShardFile, ...]
    all_bytes: int | None = None
    replicas: tuple[Comparison, ...] = ()
    kept: Kept = field(default_factory=Kept, repr=False, compare=False)

    @property
    def own_bytes(self) -> int:
        """Bytes of this rank's files."""
        return sum(file.layout.size for file in self.files)


def without_tensors(stem: str = "model") -> ShardFile:
    """A shard file with nothing in it: what makes a directory one of shards where no rank holds a tensor.

    Args:
        stem: What the second half of the file's name starts with.
    """
    header = encode_header((), encode_sharding_metadata({}))
    return ShardFile(FileLayout(shard_name(1, 1, 1, stem), header, ()), {})


def write_shards(
    plan: ShardPlan,
    group: Group,
    storage: Storage,
    *,
    everywhere: bool = False,
    later: bool = False,
    most_chunks: int = MOST_CHUNKS,
) -> ComponentRecord:
    """Write this rank's shard files. All ranks of the group call; files are durable when it returns.

    Args:
        plan: What to write where.
        group: The ranks that save together.
        storage: Through what.
        everywhere: Whether every rank is to know what all have written. Its cost grows with tensors times ranks, and
            the manifest, which is what it is for, is written by one.
        later: Whether the record is only to say what is yet to be told, for one exchange with that of others.
        most_chunks: Up to how many chunks of all ranks are told, unless ``everywhere`` asks for them.

    Returns:
        Files and tensors of all ranks, on rank 0 or ``everywhere``; nothing on the other ranks. Above ``most_chunks``
        only files, with digests of their whole content. With ``later``, on every rank, what is yet to be told.

    Raises:
        StorageError: The file system refused, on any rank; the same error on every rank.
        ReplicasDifferError: Ranks that hold a tensor as replicas have different values of it.
    """
    pieces: tuple[_Piece, ...] = ()
    digests, own_crcs = Digests(), list[int]()
    nbytes, total = plan.own_bytes, plan.all_bytes
    if total is None:
        _, [total] = group.fold([], [nbytes], "adding up what is to be written")
    with group.together(f"looking for space in {plan.directory}"):
        pieces = plan.kept.pieces.get((), None, lambda: _prepare(plan.files))
        storage.make_directory(plan.directory)
        storage.check_space(plan.directory, total if group.is_main else nbytes)
    # Not before rank 0 has looked: what others have taken by then it would ask for once more.
    with group.together(f"reserving space in {plan.directory}"):
        for file in plan.files:
            storage.create(plan.directory / file.layout.name, file.layout.size, file.layout.header)
    failure: Exception | None = None
    seen = Seen()
    files = FileSet(storage, [plan.directory / file.layout.name for file in plan.files])
    try:
        try:
            for piece in pieces:
                own_crcs.append(_write(piece, files, storage, digests))
            for number in range(len(plan.files)):
                files.handle(number)  # a file without a tensor's bytes has a header to be synced all the same
            files.sync()
            storage.sync_directory(plan.directory)
        finally:
            files.close()
        seen = look_at(plan.replicas)
    except Exception as error:  # noqa: BLE001 - raised on every rank where digests are combined
        failure = error
    told = _fold(plan, group, _Written(digests, own_crcs, failure, seen), None if everywhere else most_chunks)
    if later:
        return ComponentRecord(told=(told,))
    rows = (group.gather if everywhere else group.collect)(told.own, "gathering records")
    return told.read(rows) if rows else ComponentRecord()


def _prepare(files: Sequence[ShardFile]) -> tuple[_Piece, ...]:
    found = []
    for number, file in enumerate(files):
        head = len(file.layout.header)
        for entry in file.layout.entries:
            piece = file.pieces[entry.spec.name]
            run = prepare(Run(number, head + entry.begin, piece.tensor, entry.spec, 0, piece.data))
            spec, first = piece.spec, only_run(piece.box, piece.spec.shape)
            behind = 0 if first is None else spec.nbytes - first * spec.itemsize - run.nbytes
            place = ChunkRecord(file.layout.name, run.offset, run.nbytes, piece.box, 0)
            found.append(_Piece(run._replace(name=spec.name, behind=behind), piece, place, first is not None))
    return tuple(found)


def _write(prepared: _Piece, files: FileSet, storage: Storage, digests: Digests) -> int:
    run, piece, _, is_one_run = prepared
    crc = write_prepared(run, files, storage)
    if is_one_run:
        digests.take(run, crc)
    else:
        share = contribution(piece.box, piece.spec.shape, piece.data, crc, torch_dtype(piece.spec.dtype))
        digests.add(run.name, share, run.nbytes)
    return crc


def _fold(plan: ShardPlan, group: Group, written: _Written, most_chunks: int | None) -> Told:
    """Combine digests and check that every byte was written; returns what there is to tell of files and chunks."""
    specs, own_crcs = plan.roster.specs, written.crcs
    xors, own_counts = totals([spec.name for spec in specs], written.digests)
    sums = [*own_counts, len(own_crcs), written.seen.share]
    crcs, (*counts, all_chunks, differ) = group.fold(xors, sums, f"writing {plan.directory}", written.failure)
    if differ:
        refuse(written.seen, group)
    for spec, count in zip(specs, counts, strict=True):
        check_written(spec, count, plan.directory)
    is_listed = most_chunks is None or all_chunks <= most_chunks
    is_kept = all_chunks <= _KEPT_CHUNKS

    def tell() -> JsonValue:
        pieces = plan.kept.pieces.get((), None, lambda: _prepare(plan.files))
        if not is_listed:
            return ["", [], [file_row(file) for file in _digested(plan.files, pieces, own_crcs)]]
        # What changes from save to save travels apart from what does not, which nobody has to look at again.
        text = plan.kept.text.get((), None, lambda: _describe(plan.files, pieces))
        return [text, cast(JsonValue, own_crcs), []]

    def read(told: Sequence[JsonValue]) -> ComponentRecord:
        rows = cast(list[tuple[str, list[int], list[FileRow]]], told)
        if not is_listed:
            return ComponentRecord(tuple(FileRecord(*row) for *_, named in rows for row in named))
        texts = tuple(text for text, *_ in rows)
        known = plan.kept.known if is_kept else Memo[_Known]()
        files, places = known.get((), texts, lambda: _read(texts, specs))
        found = [crc for _, theirs, _ in rows for crc in theirs]
        return ComponentRecord(files, _tensors(plan.component, specs, crcs, places, found))

    return Told(tell, read)


def _tensors(
    component: str, specs: Sequence[TensorSpec], crcs: Sequence[int], places: _Places, found: Sequence[int]
) -> tuple[TensorRecord, ...]:
    empty = crc32c(b"")
    records = []
    for spec, crc, its_places in zip(specs, crcs, places, strict=True):
        chunks = [ChunkRecord(file, offset, nbytes, box, found[n]) for n, (file, offset, nbytes, box, _) in its_places]
        records.append(TensorRecord(component, spec, crc if spec.nbytes else empty, tuple(chunks)))
    return tuple(records)


def _describe(files: Sequence[ShardFile], pieces: Sequence[_Piece]) -> str:
    """What there is to tell of a rank's files and chunks but for the chunks' digests."""
    layouts = [file.layout for file in files]
    told = [FileRecord.of_tensors(f.name, f.size, f.header) for f in layouts]
    chunks = [[piece.run.name, *piece.place[:3], piece.place.box.offsets, piece.place.box.sizes] for piece in pieces]
    return json.dumps([[file_row(file) for file in told], chunks])


def _read(texts: Sequence[str], specs: Sequence[TensorSpec]) -> _Known:
    """What all ranks have told: their files, and for each tensor its chunks with the numbers of their digests."""
    files: list[FileRecord] = []
    together: dict[str, list[tuple[int, ChunkRecord]]] = {}
    number = 0
    for text in texts:
        named, chunks = cast(tuple[list[FileRow], list[_ChunkRow]], json.loads(text))
        files += [FileRecord(*row) for row in named]
        for name, file, offset, nbytes, offsets, sizes in chunks:
            place = ChunkRecord(file, offset, nbytes, Box(tuple(offsets), tuple(sizes)), 0)
            together.setdefault(name, []).append((number, place))
            number += 1
    ordered = [sorted(together.get(spec.name, []), key=lambda chunk: chunk[1].box.offsets) for spec in specs]
    return tuple(files), tuple(map(tuple, ordered))


def _digested(files: Sequence[ShardFile], pieces: Sequence[_Piece], crcs: Sequence[int]) -> list[FileRecord]:
    """Records of files with digests of their whole content, put together from those of their pieces."""
    by_file: dict[int, list[tuple[int, int, int]]] = {}
    for (run, *_), crc in zip(pieces, crcs, strict=True):
        if run.nbytes:
            by_file.setdefault(run.file, []).append((run.offset, run.nbytes, crc))
    records = []
    for number, file in enumerate(files):
        crc = crc32c(file.layout.header)
        for _, nbytes, its_crc in sorted(by_file.get(number, ())):
            crc = combine(crc, its_crc, nbytes)
        records.append(FileRecord(file.layout.name, file.layout.size, crc, None))
    return records
