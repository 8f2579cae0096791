"""Looking up where the pieces of sharded tensors are, in a table that is distributed over the ranks.

N ranks save N pieces of each tensor, and M ranks load them. If every rank knew all pieces, each would receive N times
the number of tensors. Instead each tensor has one *index rank*, which knows all of its pieces:

1. each rank reads some of the files' headers, and sends the entries in them to the index rank of each tensor;
2. an index rank assembles its tensors; all ranks gather their specs, and of the pieces only whether there are several;
3. a rank that knows which regions it wants sends them to the index ranks of its tensors, and receives the pieces that
   touch these regions. It sends no request for pieces from headers that it has read itself, as after a restart on the
   same ranks.

The bytes that a rank sends, receives and keeps then grow with the tensors, and with the pieces that it reads.
"""

from __future__ import annotations

import json
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import cast
from zlib import crc32

from shardwise.comm import Group, JsonValue
from shardwise.geometry import Box, TensorSpec, tiles
from shardwise.plan.reads import ChunkIndex, RemotePieces, SourceChunk, SourceTensor
from shardwise.sources.entries import Entry, assemble, decode_entry

_ASKING = "asking for pieces of tensors"


@dataclass(frozen=True, slots=True)
class PieceTable:
    """This rank's part of the table: the pieces of the tensors that it is the index rank of.

    Attributes:
        dims: Number of dimensions of each tensor.
        pieces: The pieces of each tensor.
    """

    dims: tuple[int, ...]
    pieces: tuple[ChunkIndex, ...]


def distribute_entries(
    own: Mapping[int, Sequence[Entry]], root: Path, files: Sequence[Path], group: Group
) -> tuple[list[SourceTensor], PieceTable]:
    """Send entries to index ranks, which assemble their tensors. All ranks of the group call.

    Args:
        own: The files whose headers this rank has read, and their entries.
        root: As for `assemble`.
        files: All files, the same on every rank.
        group: The ranks that load together.

    Returns:
        All tensors, the same on every rank; and this rank's part of the table.

    Raises:
        HeaderError: Two files disagree about a tensor.
    """
    messages = group.attempt(lambda: _by_index_rank(own, group.world_size), "sorting headers by tensor")
    theirs = group.exchange(messages, "sharing headers")

    def put_together() -> list[tuple[SourceTensor, int]]:
        entries = _decoded(theirs)
        times = Counter([entry.name for _, found in entries for entry in found])
        return [(tensor, times[tensor.spec.name]) for tensor in assemble(root, files, entries)]

    return _assembled(put_together, own, group)


def distribute_rows(rows: Sequence[JsonValue], group: Group) -> tuple[list[SourceTensor], PieceTable]:
    """Send each tensor to an index rank. All ranks of the group call.

    Args:
        rows: Tensors that only this rank knows, in the form that `tensor_of_row` takes.
        group: The ranks that load together.

    Returns:
        As `distribute_entries`.
    """

    def sort() -> list[bytes]:
        parts = [rows[number :: group.world_size] for number in range(group.world_size)]
        return [json.dumps(part).encode() if part else b"" for part in parts]

    messages = group.attempt(sort, "sorting tensors by index rank")
    theirs = group.exchange(messages, "sharing where pieces of tensors are")

    def put_together() -> list[tuple[SourceTensor, int]]:
        tensors = [tensor_of_row(row) for text in theirs if text for row in json.loads(text)]
        return [(tensor, len(tensor.chunks)) for tensor in tensors]

    return _assembled(put_together, {}, group)


def tensor_of_row(row: JsonValue) -> SourceTensor:
    """Decode a tensor with its pieces.

    Args:
        row: Name, shape, dtype code, and of each piece offsets, sizes, number of the file, offset in it, packed bytes.
    """
    name, shape, dtype, chunks = cast(tuple[str, list[int], str, list[tuple[list[int], list[int], int, int, int]]], row)
    pieces = [SourceChunk(Box(tuple(o), tuple(s)), file, at, packed) for o, s, file, at, packed in chunks]
    return SourceTensor(TensorSpec(name, tuple(shape), dtype), tuple(pieces))


def _assembled(
    make: Callable[[], list[tuple[SourceTensor, int]]], own: Mapping[int, Sequence[Entry]], group: Group
) -> tuple[list[SourceTensor], PieceTable]:
    """Assemble the tensors of this index rank, and gather the specs of all ranks' tensors.

    Args:
        make: Gives the tensors, and how many pieces of each are in the files.
        own: The files whose headers this rank has read, and their entries.
        group: The ranks that load together.
    """
    kinds: dict[tuple[str, tuple[int, ...]], tuple[list[JsonValue], list[JsonValue]]] = {}
    dims: list[int] = []
    indices: list[ChunkIndex] = []
    with group.together("putting tensors together"):
        for tensor, times in make():
            (name, shape, dtype), chunks = tensor.spec, tensor.chunks
            wholes, scattered = kinds.setdefault((dtype, shape), ([], []))
            if len(chunks) == 1 and chunks[0].box.sizes == shape:
                wholes.append([name, chunks[0].file, chunks[0].offset, chunks[0].packed])
                continue
            single = times == len(chunks) and tiles(shape, [chunk.box for chunk in chunks])
            number = group.rank + len(dims) * group.world_size
            scattered.append([name, number, chunks[0].file if chunks else -1, single])
            dims.append(len(shape))
            indices.append(ChunkIndex(chunks))
    rows: JsonValue = [[dtype, list(shape), *found] for (dtype, shape), found in kinds.items()]
    everyone = cast(list[list[JsonValue]], group.gather_json(rows, "sharing what tensors there are"))
    known = _chunks_of(own)
    tensors = [tensor for kinds_of_rank in everyone for kind in kinds_of_rank for tensor in _of_kind(kind, known)]
    return tensors, PieceTable(tuple(dims), tuple(indices))


def _chunks_of(own: Mapping[int, Sequence[Entry]]) -> dict[str, tuple[SourceChunk, ...]]:
    found: dict[str, tuple[SourceChunk, ...]] = {}
    for file, entries in own.items():
        for name, shape, _, offset, saved in entries:
            if saved is not None:
                chunk = SourceChunk(Box(saved, shape), file, offset)
                found[name] = (*found[name], chunk) if name in found else (chunk,)
    return found


def _of_kind(kind: JsonValue, known: Mapping[str, tuple[SourceChunk, ...]]) -> Iterator[SourceTensor]:
    """Tensors of one dtype and shape: first those that are whole in one file, then those with remote pieces."""
    dtype, sizes, wholes, scattered = cast(
        tuple[str, list[int], list[tuple[str, int, int, int]], list[tuple[str, int, int, bool]]], kind
    )
    shape = tuple(sizes)
    for name, file, offset, packed in wholes:
        yield SourceTensor(TensorSpec(name, shape, dtype), (SourceChunk(Box.whole(shape), file, offset, packed),))
    for name, number, file, single in scattered:
        yield SourceTensor(TensorSpec(name, shape, dtype), known.get(name, ()), RemotePieces(number, file, single))


def _by_index_rank(own: Mapping[int, Sequence[Entry]], world: int) -> list[bytes]:
    messages: list[list[tuple[int, list[Entry]]]] = [[] for _ in range(world)]
    for number, entries in own.items():
        found: list[list[Entry]] = [[] for _ in range(world)]
        for entry in entries:
            found[crc32(entry[0].encode()) % world].append(entry)
        for message, some in zip(messages, found, strict=True):
            if some:
                message.append((number, some))
    return [json.dumps(message).encode() if message else b"" for message in messages]


def _decoded(messages: Iterable[bytes]) -> list[tuple[int, list[Entry]]]:
    """Numbers of files and entries, in the order of the files."""
    found: list[tuple[int, list[Entry]]] = []
    for text in messages:
        if text:
            found += [(number, [decode_entry(row) for row in rows]) for number, rows in json.loads(text)]
    return sorted(found, key=lambda each: each[0])


def look_up_pieces(
    wanted: Callable[[], Sequence[tuple[SourceTensor, Sequence[Box]]]], piece_table: PieceTable, group: Group
) -> dict[int, tuple[SourceChunk, ...]]:
    """Find the pieces that touch the regions that a rank wants. All ranks of the group call.

    Args:
        wanted: Gives tensors with remote pieces, and the regions wanted of each. Local.
        piece_table: This rank's part of the table.
        group: The ranks that opened the checkpoint together.

    Returns:
        The number of each such tensor -> the pieces that touch the regions, in the order in which they lie in the
        files.
    """
    questions: list[bytes] = []
    asked: list[list[tuple[int, int]]] = []
    with group.together(_ASKING) as request:
        questions, asked = _questions(wanted(), group.world_size)
        request.flag = any(questions)
    if not request.any:
        return {}
    received = group.exchange(questions, _ASKING)
    answers = group.attempt(
        lambda: [_answer(question, piece_table, group.world_size) for question in received], _ASKING
    )
    answered = group.exchange(answers, "sending where pieces of tensors are")
    return group.attempt(lambda: _collected(asked, answered), "finding pieces of tensors")


def _questions(
    wanted: Sequence[tuple[SourceTensor, Sequence[Box]]], world: int
) -> tuple[list[bytes], list[list[tuple[int, int]]]]:
    """The message to each index rank; and for each region in it the tensor's number and number of dimensions."""
    values: list[list[int]] = [[] for _ in range(world)]
    asked: list[list[tuple[int, int]]] = [[] for _ in range(world)]
    for tensor, boxes in wanted:
        assert tensor.remote is not None
        number, dims = tensor.remote.number, len(tensor.spec.shape)
        for offsets, sizes in boxes:
            values[number % world] += (number, *offsets, *sizes)
            asked[number % world].append((number, dims))
    return [array("q", each).tobytes() for each in values], asked


def _answer(question: bytes, piece_table: PieceTable, world: int) -> bytes:
    values, answer = _numbers(question), array("q")
    at, end = 0, len(values)
    while at < end:
        index = values[at] // world
        middle = at + 1 + piece_table.dims[index]
        after = middle + piece_table.dims[index]
        region = Box(tuple(values[at + 1 : middle]), tuple(values[middle:after]))
        touching = piece_table.pieces[index].touching(region)
        answer.append(len(touching))
        for (offsets, sizes), file, offset, packed in touching:
            answer.extend((file, offset, packed, *offsets, *sizes))
        at = after
    return answer.tobytes()


def _collected(
    asked: Sequence[Sequence[tuple[int, int]]], answers: Sequence[bytes]
) -> dict[int, tuple[SourceChunk, ...]]:
    found: dict[int, tuple[SourceChunk, ...]] = {}
    several: set[int] = set()
    for questions, answer in zip(asked, answers, strict=True):
        values, at = _numbers(answer), 0
        for number, dims in questions:
            chunks: list[SourceChunk] = []
            count, at = values[at], at + 1
            for _ in range(count):
                file, offset, packed = values[at : at + 3]
                middle = at + 3 + dims
                box = Box(tuple(values[at + 3 : middle]), tuple(values[middle : middle + dims]))
                chunks.append(SourceChunk(box, file, offset, packed))
                at = middle + dims
            if number in found or count > 1:
                several.add(number)
            found[number] = (*found.get(number, ()), *chunks)
    for number in several:
        # Each piece once, in one order for all ranks, since replicas pass on what they read in it.
        found[number] = tuple(sorted(set(found[number]), key=attrgetter("file", "offset", "box")))
    return found


def _numbers(message: bytes) -> list[int]:
    values = array("q")
    values.frombytes(message)
    return values.tolist()
