"""Writes an export once: every rank writes its bytes at their final place in the final files.

Column shards are exchanged for rows first, in bounded memory. A rank that fails (in writing, or for lack of memory)
keeps taking part until the exchange is over, so that its peers are not left waiting; its failure is then raised where
all ranks learn of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import torch

from shardwise.comm import FirstFailure, Group
from shardwise.disk.crc import crc32c
from shardwise.disk.sequential import write_file
from shardwise.disk.storage import Storage
from shardwise.dtypes import torch_dtype
from shardwise.engine.computed import ComputedPlan, write_computed
from shardwise.engine.progress import Progress
from shardwise.engine.records import ComponentRecord, check_written, layout_record
from shardwise.engine.replicas import Comparison, comparison, look_at, refuse, share_of
from shardwise.engine.writer import Digests, FileSet, totals, write_all, write_run
from shardwise.format.manifest import FileRecord
from shardwise.geometry import Box
from shardwise.plan.deferred import resolve
from shardwise.plan.fragments import Fragment, HeldTensor, part_in_box
from shardwise.plan.layout import Layout, index_name, lay_out
from shardwise.plan.reads import SourceTensor
from shardwise.plan.roster import Roster
from shardwise.plan.rows import Exchange
from shardwise.plan.schedule import Schedule, WriteRun, schedule
from shardwise.sources.reader import Reader, tensor_blocks
from shardwise.sources.tensor_bytes import flat_bytes, stored
from shardwise.timing import count_bytes, phase, timed


@dataclass(frozen=True)
class ExportOptions:
    """The options of an export's layout, for which see `lay_out`.

    Attributes:
        component: Name of the component in the manifest.
        threads: Writers on this rank.
        index: Whether a weight index is written beside the files.
    """

    base_files: Mapping[str, str] = field(default_factory=dict)
    max_file_bytes: int | None = 5_000_000_000
    stem: str = "model"
    component: str = "model"
    threads: int = 1
    index: bool = True
    metadata: Mapping[str, str] | None = None


@dataclass(frozen=True)
class Copies:
    """Tensors that are carried over from other files as they are."""

    tensors: tuple[SourceTensor, ...] = ()
    files: tuple[Path, ...] = ()


@dataclass(frozen=True)
class ExportPlan:
    """A planned export, which may be written again as long as the held tensors stay where they are.

    Attributes:
        replicas: What this rank holds that others hold too, to be compared before anything is published.
        within: The directory, as paths in the manifest name it; empty for the component's own.
        has_room: Whether `make_room` was called, and has succeeded.
    """

    directory: Path
    options: ExportOptions
    layout: Layout
    schedule: Schedule
    held: Sequence[HeldTensor]
    computed: ComputedPlan
    copies: Copies
    replicas: tuple[Comparison, ...] = ()
    within: str = ""
    has_room: bool = False


@phase("plan")
def plan_export(
    held: Sequence[HeldTensor],
    roster: Roster,
    group: Group,
    directory: Path,
    options: ExportOptions,
    computed: ComputedPlan | None = None,
    copies: Copies | None = None,
) -> ExportPlan:
    """Lay out the files and find this rank's writes. Local: no communication.

    ``held`` and ``roster`` are under the names of the files and declare the results of ``computed``, groups of tensors
    that are computed while writing. ``copies`` are carried over from other files.
    """
    copied = [tensor.spec for tensor in copies.tensors] if copies is not None else []
    layout = lay_out(
        [*roster.specs, *copied],
        base_files=options.base_files,
        max_file_bytes=options.max_file_bytes,
        stem=options.stem,
        metadata=options.metadata,
    )
    work = schedule(held, layout, roster, group.rank)
    computed = computed or ComputedPlan()
    replicas = [comparison(held, roster, group.rank)]
    if computed.roster is not None:
        natives = [tensor for each in computed.groups for tensor in each.natives]
        replicas.append(comparison(natives, computed.roster, group.rank))
    return ExportPlan(directory, options, layout, work, held, computed, copies or Copies(), tuple(replicas))


def write_export(plan: ExportPlan, group: Group, storage: Storage) -> ComponentRecord:
    """Write the files of an export. All ranks of the group call; the files are durable when it returns.

    Extra memory is bounded by a constant: a block for conversion, and one round of rows where tensors are cut along
    another dimension than the first.

    Returns files and tensors with their digests, on rank 0; nothing on the others.

    Raises:
        StorageError: The file system refused, on any rank; the same error on every rank.
        IncompleteTensorError: The ranks together did not write every byte of a tensor.
        ReplicasDifferError: Ranks that hold a tensor as replicas have different values of it.
    """
    spare = reserve(plan, group, storage)
    progress = Progress(f"saving {plan.options.component}", plan.schedule.nbytes, group.is_main)
    digests = Digests(advance=progress.add)
    seen: list[Comparison] = []
    kept = FirstFailure()
    with kept, progress:
        _write(plan, group, storage, digests, spare)
        seen = look_at(plan.replicas, plan.options.threads)
    return _fold(plan, group, digests, seen, kept.error)


def make_room(plan: ExportPlan, storage: Storage) -> None:
    """Make the directory and check its space. Rank 0 calls, before any file is created."""
    storage.make_directory(plan.directory)
    storage.check_space(plan.directory, plan.layout.total_bytes)


@phase("reserve")
def reserve(plan: ExportPlan, group: Group, storage: Storage) -> torch.Tensor:
    """Create every file with its header and its space, so that a full disk fails before a byte is written.

    The index is written too. Returns memory with which this rank takes part in exchanges of rows if it fails.
    """
    if not plan.has_room:
        with group.together(f"reserving space in {plan.directory}"):
            if group.is_main:
                make_room(plan, storage)
    with group.together(f"creating the files of {plan.directory}"):
        for number in _created(plan, group):
            file = plan.layout.files[number]
            storage.create(plan.directory / file.name, file.size, file.header)
        if group.is_main and plan.options.index:
            write_file(storage, plan.directory / index_name(plan.options.stem), plan.layout.index)
        return spare_memory(plan.schedule.exchanges, plan.held, group.rank)


def _created(plan: ExportPlan, group: Group) -> range:
    """The files that this rank creates."""
    return range(group.rank, len(plan.layout.files), group.world_size)


@phase("write")
def _write(plan: ExportPlan, group: Group, storage: Storage, digests: Digests, spare: torch.Tensor) -> None:
    digest = timed("digest", crc32c)
    with closing(FileSet(storage, [plan.directory / file.name for file in plan.layout.files])) as files:

        def write_rows(run: WriteRun) -> None:
            digests.take(run, write_run(run, files, storage, digest))

        kept = FirstFailure()
        with kept:
            write_all(plan.schedule.runs, files, storage, plan.options.threads, digests, digest)
        # Peers count on this rank's rows even if its own writing has failed.
        exchanges = plan.schedule.exchanges
        failure = exchange_rows(exchanges, plan.held, plan.layout, group, write_rows, failure=kept.error, spare=spare)
        failure = write_computed(plan.computed, plan.layout, group, write_rows, failure)
        if failure is not None:
            raise failure
        _copy(plan, group, storage, write_rows)
        count_bytes(sum(digests.counts.values()))
        for number in _created(plan, group):
            files.handle(number)  # this rank wrote its header, perhaps nothing else in it
        files.sync()
        if group.is_main:  # every rank has created its files by now
            storage.sync_directory(plan.directory)


def _copy(plan: ExportPlan, group: Group, storage: Storage, write: Callable[[WriteRun], None]) -> None:
    """Carry tensors over, each by one rank, a block at a time."""
    with closing(Reader(storage, plan.copies.files)) as reader:
        for tensor in plan.copies.tensors[group.rank :: group.world_size]:
            place, start = plan.layout.places[tensor.spec.name], 0
            for block in tensor_blocks(tensor, reader):
                data = torch.frombuffer(block, dtype=torch.uint8).view(torch_dtype(tensor.spec.dtype))
                write(WriteRun(place.file, place.offset + start, tensor.spec, start, data))
                start += len(block)


@phase("fold")
def _fold(
    plan: ExportPlan, group: Group, digests: Digests, seen: Sequence[Comparison], failure: Exception | None
) -> ComponentRecord:
    names = [entry.spec.name for file in plan.layout.files for entry in file.entries]
    xors, own_counts = totals(names, digests)
    crcs, (*counts, differ) = group.fold(xors, [*own_counts, share_of(seen)], f"writing {plan.directory}", failure)
    if differ:
        refuse(seen, group)
    written = dict(zip(names, counts, strict=True))
    for file in plan.layout.files:
        path = plan.directory / file.name
        for entry in file.entries:
            check_written(entry.spec, written[entry.spec.name], path)
    return export_record(plan, dict(zip(names, crcs, strict=True))) if group.is_main else ComponentRecord()


def export_record(plan: ExportPlan, crcs: Mapping[str, int]) -> ComponentRecord:
    """Files and tensors of an export whose tensors have these digests."""
    options, within = plan.options, f"{plan.within}/" if plan.within else ""
    record = layout_record(plan.layout, crcs, options.component, within)
    if options.index:
        record += ComponentRecord((FileRecord.plain(within + index_name(options.stem), plan.layout.index),))
    return record


@phase("exchange")
def exchange_rows(
    exchanges: Sequence[tuple[int, Exchange]],
    held: Sequence[HeldTensor],
    layout: Layout,
    group: Group,
    write: Callable[[WriteRun], None],
    *,
    failure: Exception | None = None,
    spare: torch.Tensor | None = None,
) -> Exception | None:
    """Turn column shards into rows and hand each range of rows to ``write``. The tensors' holders call.

    ``exchanges`` are in an order common to all ranks. A rank that has a ``failure`` already swaps its rows and writes
    none; ``spare`` is from `spare_memory`, made here if not given. ``write`` is called on the calling thread.

    Returns what failed first on this rank, if anything; later rows are then swapped and dropped. Raises `PeerError`: a
    peer left.
    """
    spare = spare_memory(exchanges, held, group.rank) if spare is None else spare
    kept = FirstFailure(failure)
    for number, exchange in exchanges:
        for turn in range(exchange.rounds) if group.rank in exchange.members else ():
            with kept, group.keeping(kept.error):
                run = _round(exchange, turn, held[number], layout, group, spare)
                if run is not None and kept.error is None:
                    write(run)
    return kept.error


def spare_memory(exchanges: Sequence[tuple[int, Exchange]], held: Sequence[HeldTensor], rank: int) -> torch.Tensor:
    """Memory for the messages of a rank that has failed, also for lack of memory. Local; call while no peer waits.

    It is written to only after a failure; until then it takes address space alone.
    """
    own = ((number, exchange) for number, exchange in exchanges if rank in exchange.members)
    rounds = (e.rows_per_round * math.prod(e.row_shape) * _dtype(held[number]).itemsize for number, e in own)
    return torch.empty(max(rounds, default=0), dtype=torch.uint8)


def _dtype(tensor: HeldTensor) -> torch.dtype:
    """The dtype in which a tensor's elements travel."""
    return tensor.fragments[0].data.dtype


def _round(
    exchange: Exchange, turn: int, tensor: HeldTensor, layout: Layout, group: Group, spare: torch.Tensor
) -> WriteRun | None:
    """Swap one round, whatever fails; returns the rows that this rank is to write, if any."""
    what = f"exchanging rows of {tensor.spec.name}"
    dtype = _dtype(tensor)
    start, count = exchange.target(group.rank, turn)
    try:
        own, sends = _outgoing(exchange, turn, tensor.fragments, group.rank)
        receives = _incoming(exchange, turn, group.rank, dtype)
    except Exception as error:
        with group.keeping(error):
            _swap_blanks(exchange, turn, dtype.itemsize, group, what, spare)
        raise
    group.swap(sends, [(source, buffer) for source, buffer, _ in receives], what)
    if not count:
        return None
    rows = torch.empty(count * math.prod(exchange.row_shape), dtype=dtype)
    for fragment in own:
        _place(exchange, rows, fragment.box, start, count, resolve(fragment.data))
    for _, buffer, boxes_in in receives:
        flat, position = buffer.view(dtype), 0
        for box in boxes_in:
            _place(exchange, rows, box, start, count, flat[position : position + box.numel].view(box.sizes))
            position += box.numel
    place = layout.places[tensor.spec.name]
    offset = start * math.prod(exchange.row_shape) * tensor.spec.itemsize
    return WriteRun(place.file, place.offset + offset, tensor.spec, offset, rows)


def _messages(
    exchange: Exchange, turn: int, targets: Iterable[int]
) -> Iterator[tuple[int, int, Iterator[tuple[Box, Box]]]]:
    """Who sends what in a round to which of ``targets``: pairs of a box of the sender and the part of it, in order."""
    for target in targets:
        start, count = exchange.target(target, turn)
        for source, boxes in exchange.sources(target) if count else ():
            yield source, target, exchange.pieces(boxes, start, count)


def _incoming(
    exchange: Exchange, turn: int, rank: int, dtype: torch.dtype
) -> list[tuple[int, torch.Tensor, list[Box]]]:
    """This rank's receives of a round: from whom, memory as bytes, and the regions."""
    receives: list[tuple[int, torch.Tensor, list[Box]]] = []
    for source, _, pieces in _messages(exchange, turn, (rank,)):
        wanted = [part for _, part in pieces]
        if source != rank and wanted:
            numel = sum(box.numel for box in wanted)
            receives.append((source, torch.empty(numel, dtype=dtype).view(torch.uint8), wanted))
    return receives


def _swap_blanks(exchange: Exchange, turn: int, itemsize: int, group: Group, what: str, spare: torch.Tensor) -> None:
    """Send and receive messages of the sizes that the peers expect, with meaningless content."""
    sizes: dict[tuple[int, int], int] = {}
    for source, target, pieces in _messages(exchange, turn, exchange.members):
        nbytes = sum(part.numel for _, part in pieces) * itemsize
        if nbytes and source != target and group.rank in (source, target):
            sizes[source, target] = nbytes
    group.swap(
        [(target, spare[:nbytes]) for (source, target), nbytes in sizes.items() if source == group.rank],
        [(source, spare[:nbytes]) for (source, target), nbytes in sizes.items() if target == group.rank],
        what,
    )


def _outgoing(
    exchange: Exchange, turn: int, fragments: Sequence[Fragment], rank: int
) -> tuple[list[Fragment], list[tuple[int, torch.Tensor]]]:
    """The fragments that this rank keeps in a round, and those that it sends to other ranks."""
    own: list[Fragment] = []
    sends: list[tuple[int, torch.Tensor]] = []
    by_box = {fragment.box: fragment for fragment in fragments}
    for source, target, pieces in _messages(exchange, turn, exchange.members):
        if source != rank:
            continue
        cut = [by_box[box].cut(part) for box, part in pieces]
        if target == rank:
            own = cut
        elif cut:
            sends.append((target, _pack(cut)))
    return own, sends


def _pack(pieces: Sequence[Fragment]) -> torch.Tensor:
    flat = [resolve(piece.data).detach().to("cpu").reshape(-1) for piece in pieces]
    packed = flat[0].contiguous() if len(flat) == 1 else torch.cat(flat)
    return flat_bytes(stored(packed))


def _place(exchange: Exchange, rows: torch.Tensor, box: Box, start: int, count: int, data: torch.Tensor) -> None:
    position = 0
    for lead in exchange.row_boxes(start, count):
        common = box.intersect(lead)
        if common is not None:
            target = rows[position : position + lead.numel].view(lead.sizes)
            part_in_box(target, common.relative_to(lead)).copy_(data)
            return
        position += lead.numel
