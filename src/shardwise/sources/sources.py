"""Finding the tensors of a checkpoint: which file holds which region at which offset.

A source is a ``consolidated/`` export, a directory of shards, any Hugging Face model directory or single file, what
torch's own Hugging Face writer wrote, or a DCP directory (``.metadata`` and ``.distcp``). All end as `SourceTensor`s.
Reading headers is shared between the ranks; each file's header is read by one of them.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from operator import itemgetter
from pathlib import Path
from typing import TypeAlias, cast

from shardwise.comm import Group, JsonValue
from shardwise.disk.names import exists, is_directory, is_file, names_in
from shardwise.errors import AmbiguousFilesError, CheckpointNotFoundError, FormatError, WeightIndexError
from shardwise.format.index import WeightIndex, read_index
from shardwise.format.weight_files import SAFETENSORS, WeightFiles, choose_weights, files_of_index
from shardwise.geometry import Box
from shardwise.plan.reads import SourceTensor
from shardwise.sources.dcp_model import refuse_transformed
from shardwise.sources.directory_contents import did_you_mean, found_instead, how_to_open
from shardwise.sources.entries import (
    Entry,
    PieceTable,
    assemble,
    decode_entry,
    distribute_entries,
    distribute_rows,
    look_up_pieces,
    read_entries,
    tensor_of_row,
)
from shardwise.timing import phase

_LOG = logging.getLogger(__name__)
_ReadIndex: TypeAlias = Callable[[Path], WeightIndex]


@dataclass(frozen=True)
class Source:
    """The tensors at a path."""

    path: Path  #: What was opened.
    files: tuple[Path, ...]  #: Every file that holds tensor data.
    tensors: Mapping[str, SourceTensor]  #: By name.
    #: This rank's part of the distributed table of pieces; ``None`` where every rank knows all pieces.
    piece_table: PieceTable | None = None
    dcp: bool = False  #: Whether it is a DCP directory, which may hold more than a model.
    below: str = ""  #: Of a DCP directory: what the names of these tensors have in front, without the last dot.

    def without(self, names: Iterable[str]) -> Source:
        """The same without some tensors."""
        dropped = set(names)
        return replace(self, tensors={n: t for n, t in self.tensors.items() if n not in dropped})

    def located(self, wanted: Callable[[], Mapping[str, Sequence[Box]]], group: Group) -> Source:
        """The same source with just the pieces that this rank wants. All ranks that opened it together call.

        ``wanted`` gives names of tensors and regions of each; a rank may want none.
        """
        if self.piece_table is None:
            return self
        tensors = dict(self.tensors)
        asked: dict[str, Sequence[Box]] = {}

        def questions() -> list[tuple[SourceTensor, Sequence[Box]]]:
            asked.update({n: boxes for n, boxes in wanted().items() if boxes and not tensors[n].knows(boxes)})
            return [(tensors[name], boxes) for name, boxes in asked.items()]

        pieces = look_up_pieces(questions, self.piece_table, group)
        for name in asked:
            spec, _, remote = tensors[name]
            if remote is not None:
                tensors[name] = SourceTensor(spec, pieces[remote.number], remote)
        return replace(self, tensors=tensors)


@phase("headers")
def open_source(
    path: str | os.PathLike[str],
    group: Group,
    *,
    spread: bool = False,
    exclude: frozenset[str] = frozenset(),
) -> Source:
    """Find the tensors at ``path``. All ranks of the group call and see the same.

    The path is a safetensors file, a weight index, or a directory: of safetensors files with or without an index, a
    ``model/`` directory with ``consolidated/`` or shards in it, or a DCP directory. ``exclude`` names files in a
    directory that hold something else than the tensors to load. With ``spread`` a rank has to ask for the pieces that
    it wants of tensors that were saved in several (`Source.located`); otherwise each knows all of them, which are as
    many as tensors times ranks that saved.

    Raises:
        CheckpointNotFoundError: There is nothing at the path, or no tensor file in it.
        AmbiguousFilesError: Several files in it could be meant.
        WeightIndexError: The index names a file or a tensor that is absent.
        HeaderError: A file is truncated or damaged.
    """
    root = Path(path).absolute()
    read: _ReadIndex = cache(read_index)  # it is looked at twice: for its files, and when their headers are known
    kind, names, indices = cast(
        tuple[str, list[str], list[str]],
        group.broadcast_result(lambda: _look(root, read, exclude), f"looking for a checkpoint at {root}"),
    )
    if kind == "dcp":
        return _open_dcp(root, group, spread)
    if kind == "index":
        root = root.parent  # it stands for the files that it lists
    files = (root,) if kind == "file" else tuple(root / name for name in names)
    own, everyone = _read_headers(files, group, spread and group.world_size > 1)
    piece_table: PieceTable | None = None
    if everyone is None:
        tensors, piece_table = distribute_entries(own, root, files, group)
    else:
        tensors = assemble(root, files, everyone)
    source = Source(root, files, {tensor.spec.name: tensor for tensor in tensors}, piece_table)
    if indices:
        with group.together(f"checking the index of {root}"):
            if group.is_main:
                _check_index(root, indices, source, read)
    return source


def _look(root: Path, read: _ReadIndex, exclude: frozenset[str]) -> JsonValue:
    """What is at a path: ``file``, ``index``, ``dcp`` or ``files``; relative names of files, and of indices."""
    if not exists(root):
        raise CheckpointNotFoundError(
            "there is nothing at this path", path=root, hint="Check the path and that the file system is mounted."
        )
    if not is_directory(root):
        return _look_at_file(root, read)
    if exists(root / ".metadata"):
        _refuse_both(root)
        return ["dcp", [], []]
    own, index = _tensor_files(root, read, exclude)
    merged: list[str] = []
    if is_directory(root / "consolidated"):
        below, index_below = _tensor_files(root / "consolidated", read)
        merged = [f"consolidated/{name}" for name in below]
        index = index or [f"consolidated/{name}" for name in index_below]
    # A name in both is read from the shards, which hold it as it was in memory; so they come first.
    if not own and not merged:
        there = found_instead(root)
        hint = did_you_mean(root) or how_to_open(root)
        raise CheckpointNotFoundError(
            "the directory holds no safetensors file and no DCP metadata" + (f", {there}" if there else ""),
            path=root,
            hint=hint or "Point at a model directory, at model/ of a checkpoint, or at a .safetensors file.",
        )
    return ["files", [*own, *merged], [*index]]


def _look_at_file(file: Path, read: _ReadIndex) -> JsonValue:
    if SAFETENSORS.index_stem(file.name) is not None:
        found = files_of_index(file, names_in(file.parent), read)
        return ["index", list(found.files), [file.name]]
    if file.suffix == ".distcp" or file.name == ".metadata":
        raise FormatError(
            "this is one file of a DCP directory", path=file, hint=f"Pass the directory: {str(file.parent)!r}."
        )
    return ["file", [], []]


def _refuse_both(root: Path) -> None:
    """Refuse a directory that is a DCP checkpoint and a Hugging Face model, which may be two different models."""
    names = names_in(root)
    standard = [name for name in SAFETENSORS.standard if name in names]
    standard += [name for name in names if SAFETENSORS.index_stem(name) is not None]
    if standard:
        raise AmbiguousFilesError(
            f"the directory holds a DCP checkpoint (.metadata) and a Hugging Face model ({standard[0]})",
            path=root,
            hint=f"Pass the path of {standard[0]} to load that, or move it away to load the DCP checkpoint.",
        )


def _tensor_files(
    directory: Path, read: _ReadIndex, exclude: frozenset[str] = frozenset()
) -> tuple[list[str], list[str]]:
    """Names of the safetensors files that make up the model in a directory, and of the index that lists them."""
    names = [name for name in names_in(directory) if name not in exclude]
    chosen = choose_weights(directory, names, SAFETENSORS, read)
    if chosen is None:
        return [], []
    tell_unread(directory, chosen)
    return list(chosen.files), [] if chosen.index is None else [chosen.index]


def tell_unread(directory: Path, chosen: WeightFiles) -> None:
    """Log which of two sources was used, where there are two."""
    if chosen.unread is not None:
        _LOG.warning(
            "%s holds %s and %s, which lists other files: the former is read, as transformers does",
            directory,
            chosen.files[0],
            chosen.unread,
        )


def _read_headers(
    files: Sequence[Path], group: Group, spread: bool
) -> tuple[dict[int, list[Entry]], list[tuple[int, list[Entry]]] | None]:
    """Read the files' headers, each of them on one rank: this rank's entries by number of a file, and all files'.

    ``None`` for the latter where there are pieces of tensors and ``spread`` is set.
    """
    own: dict[int, list[Entry]] = {}

    def read() -> JsonValue:
        # Neighbours together: as many ranks as saved then each read what the same of them wrote.
        first, last = (len(files) * rank // group.world_size for rank in (group.rank, group.rank + 1))
        for number in range(first, last):
            own[number] = read_entries(files[number])
        if spread and any(entry.saved is not None for entries in own.values() for entry in entries):
            return None
        return cast(JsonValue, [*own.items()])

    answers = group.gather(read, "reading safetensors headers")
    if None in answers:
        return own, None
    everyone = cast(list[list[tuple[int, list[JsonValue]]]], answers)
    rows = sorted(((number, found) for theirs in everyone for number, found in theirs), key=itemgetter(0))
    return own, [(number, [decode_entry(row) for row in found]) for number, found in rows]


def _check_index(root: Path, indices: Sequence[str], source: Source, read: _ReadIndex) -> None:
    for name in indices:
        folder = (root / name).parent
        numbers = {path.name: number for number, path in enumerate(source.files) if path.parent == folder}
        here = set(numbers.values())
        for tensor, file in read(root / name).weight_map.items():
            known = source.tensors.get(tensor)
            if known is not None and known.remote is not None:
                continue
            if known is not None:
                held = {chunk.file for chunk in known.chunks}
                # A tensor that is read from shards beside the export has no say about the export's files.
                sharded = len(known.chunks) > 1 or known.chunks[0].box.sizes != known.spec.shape
                if not held <= here or sharded or numbers.get(file, -1) in {-1, *held}:
                    continue
            raise WeightIndexError(
                f"the index says that {file} holds this tensor, which it does not",
                path=root / name,
                tensor=tensor,
                hint="Index and files belong to different exports; fetch or save them again.",
            )


def _open_dcp(root: Path, group: Group, spread: bool) -> Source:
    """The tensors of a DCP directory; rank 0 reads its metadata, through an unpickler with an allow-list."""
    rows: list[JsonValue] = []
    spread = spread and group.world_size > 1

    def describe() -> JsonValue:
        files, found = _describe_dcp(root)
        rows.extend(found)
        return [files, [] if spread else found]

    described = group.broadcast_result(describe, f"reading the DCP metadata of {root}")
    files, everyone = cast(tuple[list[str], list[JsonValue]], described)
    piece_table: PieceTable | None = None
    if spread:
        tensors, piece_table = distribute_rows(rows, group)
    else:
        tensors = [tensor_of_row(row) for row in everyone]
    return Source(root, tuple(root / name for name in files), {t.spec.name: t for t in tensors}, piece_table, dcp=True)


def _describe_dcp(root: Path) -> tuple[list[JsonValue], list[JsonValue]]:
    """Names of the files, and the tensors as `tensor_of_row` takes them."""
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    from shardwise.dtypes import dtype_code
    from shardwise.format.dcp_metadata import read_dcp_metadata

    files: dict[str, int] = {}
    rows: list[JsonValue] = []
    metadata = read_dcp_metadata(root / ".metadata")
    places = {(index.fqn, tuple(index.offset or ())): info for index, info in (metadata.storage_data or {}).items()}
    for name, saved in metadata.state_dict_metadata.items():
        if not isinstance(saved, TensorStorageMetadata):
            continue
        chunks: list[JsonValue] = []
        for chunk in saved.chunks:
            info = places.get((name, tuple(chunk.offsets)))
            if info is None:
                raise FormatError("the metadata lists a chunk without its place", path=root, tensor=name)
            refuse_transformed(info, root / info.relative_path, name)
            number = files.setdefault(str(info.relative_path), len(files))
            chunks.append([[list(chunk.offsets), list(chunk.sizes)], number, info.offset, info.length])
        rows.append([name, list(saved.size), dtype_code(saved.properties.dtype, name), chunks])
    missing = [name for name in files if not is_file(root / name)]
    if missing:
        raise CheckpointNotFoundError(
            f"the metadata names {missing[0]}, which is absent",
            path=root / missing[0],
            hint="Restore the missing file; the checkpoint is not whole without it.",
        )
    return list(files), rows
