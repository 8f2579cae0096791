"""The tensors of a checkpoint, assembled from the headers of its files."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, cast

from shardwise.errors import HeaderError
from shardwise.format.header import read_header, saved_offsets
from shardwise.format.strict_json import JsonValue
from shardwise.geometry import Box, TensorSpec
from shardwise.plan.reads import SourceChunk, SourceTensor


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
    """Assemble tensors from their pieces in several files.

    Args:
        root: The directory that was opened. Where a tensor is in a file below it and in an export in
            ``consolidated/``, the former counts.
        files: All files.
        entries: Number of a file, and its entries; in the order of the files.
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
