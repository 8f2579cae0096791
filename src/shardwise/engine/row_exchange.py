"""Exchanges column shards for rows, which are written to the file, in bounded memory.

A rank that fails (in writing, or for lack of memory) keeps taking part until the exchange is over, so that its peers
are not left waiting; its failure is then raised where all ranks learn of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from shardwise.comm import FirstFailure, Group
from shardwise.geometry import Box
from shardwise.plan.deferred import resolve
from shardwise.plan.fragments import Fragment, HeldTensor, part_in_box
from shardwise.plan.layout import Layout
from shardwise.plan.rows import Exchange
from shardwise.plan.schedule import WriteRun
from shardwise.sources.tensor_bytes import flat_bytes, stored
from shardwise.timing import phase


@phase("exchange")
def exchange_rows(
    exchanges: Sequence[Exchange],
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

    Returns what failed first on this rank, if anything; later rows are then swapped and dropped.

    Raises:
        PeerError: A peer left.
    """
    spare = spare_memory(exchanges, held, group.rank) if spare is None else spare
    kept = FirstFailure(failure)
    for exchange in exchanges:
        for turn in range(exchange.rounds) if group.rank in exchange.members else ():
            with kept, group.keeping(kept.error):
                run = _round(exchange, turn, held[exchange.tensor], layout, group, spare)
                if run is not None and kept.error is None:
                    write(run)
    return kept.error


def spare_memory(exchanges: Sequence[Exchange], held: Sequence[HeldTensor], rank: int) -> torch.Tensor:
    """Memory for the messages of a rank that has failed, also for lack of memory. Local; call while no peer waits.

    It is written to only after a failure; until then it takes address space alone.
    """
    own = (exchange for exchange in exchanges if rank in exchange.members)
    rounds = (e.rows_per_round * math.prod(e.row_shape) * _dtype(held[e.tensor]).itemsize for e in own)
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


def _incoming(
    exchange: Exchange, turn: int, rank: int, dtype: torch.dtype
) -> list[tuple[int, torch.Tensor, list[Box]]]:
    """This rank's receives of a round: from whom, memory as bytes, and the regions."""
    start, count = exchange.target(rank, turn)
    receives: list[tuple[int, torch.Tensor, list[Box]]] = []
    for source, boxes in exchange.sources[rank] if count else ():
        wanted = [box for _, box in exchange.pieces(boxes, start, count)]
        if source != rank and wanted:
            numel = sum(box.numel for box in wanted)
            receives.append((source, torch.empty(numel, dtype=dtype).view(torch.uint8), wanted))
    return receives


def _swap_blanks(exchange: Exchange, turn: int, itemsize: int, group: Group, what: str, spare: torch.Tensor) -> None:
    """Send and receive messages of the sizes that the peers expect, with meaningless content."""
    sizes: dict[tuple[int, int], int] = {}
    for target in exchange.members:
        start, count = exchange.target(target, turn)
        for source, boxes in exchange.sources[target] if count else ():
            nbytes = sum(box.numel for _, box in exchange.pieces(boxes, start, count)) * itemsize
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
    for target in exchange.members:
        start, count = exchange.target(target, turn)
        for source, boxes in exchange.sources[target] if count else ():
            if source != rank:
                continue
            pieces = _cut_out(exchange, boxes, fragments, start, count)
            if target == rank:
                own = pieces
            elif pieces:
                sends.append((target, _pack(pieces)))
    return own, sends


def _cut_out(
    exchange: Exchange, boxes: tuple[Box, ...], fragments: Sequence[Fragment], start: int, count: int
) -> list[Fragment]:
    """This rank's part of the rows, in the order in which the receiver enumerates it."""
    by_box = {fragment.box: fragment for fragment in fragments}
    return [by_box[boxes[number]].cut(common) for number, common in exchange.pieces(boxes, start, count)]


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
