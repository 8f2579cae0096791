"""The tensors of a checkpoint, assembled from the headers of its files, and where the pieces of sharded ones are.

N ranks save N pieces of each tensor, and M ranks load them. If every rank knew all pieces, each would receive N times
the number of tensors. Instead there is a table distributed over the ranks, in which each tensor has one *index rank*,
which knows all of its pieces:

1. each rank reads some of the files' headers, and sends the entries in them to the index rank of each tensor;
2. an index rank assembles its tensors; all ranks gather their specs, and of the pieces only whether there are several;
3. a rank that knows which regions it wants sends them to the index ranks of its tensors, and receives the pieces that
   touch these regions. It sends no request for pieces from headers that it has read itself, as after a restart on the
   same ranks.

The bytes that a rank sends, receives and keeps then grow with the tensors, and with the pieces that it reads.
"""

from __future__ import annotations

import json
import operator
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from operator import attrgetter, itemgetter
from pathlib import Path
from typing import NamedTuple, TypeAlias, cast
from zlib import crc32

from shardwise.comm import Group, JsonValue
from shardwise.errors import HeaderError
from shardwise.format.header import read_header, saved_offsets
from shardwise.geometry import Box, TensorSpec, tiles
from shardwise.plan.reads import ChunkIndex, RemotePieces, SourceChunk, SourceTensor


class Entry(NamedTuple):
    """One tensor or piece in one file; ``saved`` is where it starts in the whole tensor.

    ``None`` where the file does not say so, and holds it whole. ``offset`` counts bytes from the begin of the file.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    offset: int
    saved: tuple[int, ...] | None

    def located_in(self, file: int) -> SourceTensor:
        """The tensor, where the file with this number holds it whole."""
        spec = TensorSpec(self.name, self.shape, self.dtype)
        return SourceTensor(spec, (SourceChunk(Box.whole(self.shape), file, self.offset),))


def read_entries(file: Path) -> list[Entry]:
    """The entries of one file, in the order of their data."""
    header = read_header(file)
    offsets = saved_offsets(header) or {}
    start = header.data_start
    return [
        Entry(name, shape, dtype, start + begin, offsets.get(name)) for (name, shape, dtype), begin, _ in header.entries
    ]


def decode_entry(row: JsonValue) -> Entry:
    """An entry from JSON, in which a named tuple is an array."""
    name, shape, dtype, offset, saved = cast(tuple[str, list[int], str, int, list[int] | None], row)
    return Entry(name, tuple(shape), dtype, offset, None if saved is None else tuple(saved))


def assemble(root: Path, files: Sequence[Path], entries: Iterable[tuple[int, Sequence[Entry]]]) -> list[SourceTensor]:
    """Assemble tensors from their pieces in several files; ``entries`` are by number of a file, in the files' order.

    Where a tensor is in a file below ``root``, the directory that was opened, and in an export in ``consolidated/``,
    the former counts.
    """
    first: dict[str, tuple[Entry, int]] = {}
    pieces: dict[str, list[tuple[Entry, int]]] = {}
    sharded_names: set[str] = set()
    for number, found in entries:
        below = files[number].parent.name == "consolidated" and files[number].parent != root
        for entry in found:
            if below and entry.name in sharded_names:
                continue
            piece = (entry, number)
            known = first.setdefault(entry.name, piece)
            if known is not piece:
                pieces.setdefault(entry.name, [known]).append(piece)
            elif entry.saved is not None:
                pieces[entry.name] = [piece]
        if not below:
            sharded_names.update(entry.name for entry in found)
    return [
        _joined(name, pieces[name], files) if name in pieces else entry.located_in(number)
        for name, (entry, number) in first.items()
    ]


def _joined(name: str, found: Sequence[tuple[Entry, int]], files: Sequence[Path]) -> SourceTensor:
    first, number = found[0]
    dtype, dims = first.dtype, len(first.shape)
    whole = (0,) * dims
    chunks: dict[Box, SourceChunk] = {}
    for entry, file in found:
        _, sizes, its_dtype, offset, saved = entry
        if its_dtype != dtype or len(sizes) != dims:
            raise HeaderError(
                f"{files[number].name} and {files[file].name} disagree about this tensor's dtype or dimensions",
                path=files[file],
                tensor=name,
                hint="The directory mixes files of different checkpoints; separate them.",
            )
        box = Box(whole if saved is None else saved, sizes)
        # The same region twice: replicas that another tool wrote. One of them is read.
        chunks.setdefault(box, SourceChunk(box, file, offset))
    starts = zip(*(box.offsets for box in chunks), strict=True)
    lengths = zip(*(box.sizes for box in chunks), strict=True)
    shape = tuple([max(map(operator.add, *each)) for each in zip(starts, lengths, strict=True)])
    return SourceTensor(TensorSpec(name, shape, dtype), tuple(chunks.values()))


_Chunk: TypeAlias = tuple[tuple[list[int], list[int]], int, int, int]
_Question: TypeAlias = tuple[int, Box]
_ASKING = "asking for pieces of tensors"


#: This rank's part of the table: the pieces of each tensor that it is the index rank of.
PieceTable: TypeAlias = tuple[ChunkIndex, ...]


def distribute_entries(
    own: Mapping[int, Sequence[Entry]], root: Path, files: Sequence[Path], group: Group
) -> tuple[list[SourceTensor], PieceTable]:
    """Send entries to index ranks, which assemble their tensors. All ranks of the group call.

    ``own`` are the files whose headers this rank has read, by number; ``root`` and ``files`` are as for `assemble`.
    Returns all tensors, the same on every rank, and this rank's part of the table.
    """
    world = group.world_size

    def sort() -> list[bytes]:
        messages: list[dict[int, list[Entry]]] = [{} for _ in range(world)]
        for number, entries in own.items():
            for entry in entries:
                messages[crc32(entry.name.encode()) % world].setdefault(number, []).append(entry)
        return [json.dumps([*message.items()]).encode() if message else b"" for message in messages]

    messages = group.attempt(sort, "sorting headers by tensor")
    theirs = group.exchange(messages, "sharing headers")

    def put_together() -> list[tuple[SourceTensor, int]]:
        found = sorted((pair for text in theirs if text for pair in json.loads(text)), key=itemgetter(0))
        entries = [(number, [decode_entry(row) for row in rows]) for number, rows in found]
        times = Counter([entry.name for _, found in entries for entry in found])
        return [(tensor, times[tensor.spec.name]) for tensor in assemble(root, files, entries)]

    return _assembled(put_together, own, group)


def distribute_rows(rows: Sequence[JsonValue], group: Group) -> tuple[list[SourceTensor], PieceTable]:
    """The same with tensors that only this rank knows, in the form that `tensor_of_row` takes."""

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
    """Decode a tensor: name, shape, dtype code, and the pieces as a `SourceChunk` is in JSON."""
    name, shape, dtype, chunks = cast(tuple[str, list[int], str, list[_Chunk]], row)
    return SourceTensor(TensorSpec(name, tuple(shape), dtype), tuple(_chunk(*row) for row in chunks))


def _chunk(box: tuple[list[int], list[int]], file: int, offset: int, packed: int) -> SourceChunk:
    offsets, sizes = box
    return SourceChunk(Box(tuple(offsets), tuple(sizes)), file, offset, packed)


def _assembled(
    make: Callable[[], list[tuple[SourceTensor, int]]], own: Mapping[int, Sequence[Entry]], group: Group
) -> tuple[list[SourceTensor], PieceTable]:
    """Assemble the tensors of this index rank, and gather the specs of all ranks' tensors.

    ``make`` gives the tensors, and how many pieces of each are in the files.
    """
    kinds: dict[tuple[str, tuple[int, ...]], tuple[list[JsonValue], list[JsonValue]]] = {}
    indices: list[ChunkIndex] = []
    with group.together("putting tensors together"):
        for tensor, times in make():
            (name, shape, dtype), chunks = tensor.spec, tensor.chunks
            wholes, scattered = kinds.setdefault((dtype, shape), ([], []))
            if len(chunks) == 1 and chunks[0].box.sizes == shape:
                wholes.append([name, chunks[0].file, chunks[0].offset, chunks[0].packed])
                continue
            single = times == len(chunks) and tiles(shape, [chunk.box for chunk in chunks])
            number = group.rank + len(indices) * group.world_size
            scattered.append([name, number, chunks[0].file if chunks else -1, single])
            indices.append(ChunkIndex(chunks))
    rows: JsonValue = [[dtype, list(shape), *found] for (dtype, shape), found in kinds.items()]
    everyone = cast(list[list[JsonValue]], group.gather_json(rows, "sharing what tensors there are"))
    known = _chunks_of(own)
    tensors = [tensor for kinds_of_rank in everyone for kind in kinds_of_rank for tensor in _of_kind(kind, known)]
    return tensors, tuple(indices)


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


def look_up_pieces(
    wanted: Callable[[], Sequence[tuple[SourceTensor, Sequence[Box]]]], piece_table: PieceTable, group: Group
) -> dict[int, tuple[SourceChunk, ...]]:
    """Find the pieces that touch the regions that a rank wants. All ranks that opened the checkpoint together call.

    ``wanted`` gives tensors with remote pieces, and the regions wanted of each. The result has the number of each such
    tensor -> its pieces, in the order in which they lie in the files.
    """
    questions: list[list[_Question]] = [[] for _ in range(group.world_size)]
    messages: list[bytes] = []
    with group.together(_ASKING) as request:
        for tensor, boxes in wanted():
            assert tensor.remote is not None
            number = tensor.remote.number
            questions[number % group.world_size] += [(number, box) for box in boxes]
        messages = [json.dumps(each).encode() if each else b"" for each in questions]
        request.flag = any(questions)
    if not request.any:
        return {}
    received = group.exchange(messages, _ASKING)
    answers = group.attempt(
        lambda: [_answer(question, piece_table, group.world_size) for question in received], _ASKING
    )
    answered = group.exchange(answers, "sending where pieces of tensors are")
    return group.attempt(lambda: _collected(questions, answered), "finding pieces of tensors")


def _answer(question: bytes, piece_table: PieceTable, world: int) -> bytes:
    """For each region the pieces that touch it."""
    if not question:
        return b""
    rows = cast(list[tuple[int, tuple[list[int], list[int]]]], json.loads(question))
    regions = [(number, Box(tuple(offsets), tuple(sizes))) for number, (offsets, sizes) in rows]
    return json.dumps([list(piece_table[number // world].touching(region)) for number, region in regions]).encode()


def _collected(
    questions: Sequence[Sequence[_Question]], answers: Sequence[bytes]
) -> dict[int, tuple[SourceChunk, ...]]:
    found: dict[int, tuple[SourceChunk, ...]] = {}
    several: set[int] = set()
    for asked, answer in zip(questions, answers, strict=True):
        rows = cast(list[list[_Chunk]], json.loads(answer) if answer else [])
        for (number, _), chunks in zip(asked, rows, strict=True):
            if number in found or len(chunks) > 1:
                several.add(number)
            found[number] = (*found.get(number, ()), *(_chunk(*row) for row in chunks))
    for number in several:
        # Each piece once, in one order for all ranks, since replicas pass on what they read in it.
        found[number] = tuple(sorted(set(found[number]), key=attrgetter("file", "offset", "box")))
    return found
