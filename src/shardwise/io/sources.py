"""Finding the tensors of a checkpoint: which file holds which region at which offset.

A source is a ``consolidated/`` export, a directory of shards, any Hugging Face model directory or single file, what
torch's own Hugging Face writer wrote, or a DCP directory (``.metadata`` and ``.distcp``). All end as `SourceTensor`s.
Reading headers is shared between the ranks; each file's header is read by one of them.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, cast

from shardwise.comm import Group, JsonValue
from shardwise.errors import CheckpointNotFoundError, FormatError, HeaderError, WeightIndexError
from shardwise.format.header import read_header, saved_offsets
from shardwise.format.index import read_index
from shardwise.plan.collector import collector_paused
from shardwise.plan.reads import SourceChunk, SourceTensor
from shardwise.types import Box, TensorSpec

_INDEX_SUFFIX = ".safetensors.index.json"


@dataclass(frozen=True)
class Source:
    """The tensors at a path.

    Attributes:
        path: What was opened.
        files: Every file that holds tensor data.
        tensors: By name.
    """

    path: Path
    files: tuple[Path, ...]
    tensors: Mapping[str, SourceTensor]

    def without(self, names: Iterable[str]) -> Source:
        """The same without some tensors."""
        dropped = self.tensors.keys() & set(names)
        if not dropped:
            return self
        return Source(self.path, self.files, {n: t for n, t in self.tensors.items() if n not in dropped})


class _Entry(NamedTuple):
    """One tensor or piece in one file: global offsets are ``None`` where the file holds it whole."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    offset: int
    saved: tuple[int, ...] | None


@collector_paused()
def open_source(path: str | os.PathLike[str], group: Group) -> Source:
    """Find the tensors at ``path``. All ranks of the group call and see the same.

    Args:
        path: A safetensors file, or a directory: of safetensors files with or without an index, a ``model/`` directory
            with ``consolidated/`` or shards in it, or a DCP directory.
        group: The ranks that load together.

    Raises:
        CheckpointNotFoundError: There is nothing at the path, or no tensor file in it.
        WeightIndexError: The index names a file or a tensor that is absent.
        HeaderError: A file is truncated or damaged.
    """
    root = Path(path).absolute()
    listed = cast(dict[str, list[str]], group.tell(lambda: _look(root), f"looking for a checkpoint at {root}"))
    if listed["dcp"]:
        return _open_dcp(root, group)
    files = [root] if listed["single"] else [root / name for name in listed["files"]]
    entries = _read_headers(files, group)
    source = _assemble(root, files, entries)
    if listed["index"]:
        with group.together(f"checking the index of {root}"):
            if group.is_main:
                _check_index(root, listed["index"], source)
    return source


def _look(root: Path) -> JsonValue:
    """List what is at a path.

    Relative file names, names of tensors per the index, and whether it is a DCP directory.
    """
    if not root.exists():
        raise CheckpointNotFoundError(
            "there is nothing at this path", path=root, hint="Check the path and that the file system is mounted."
        )
    if not root.is_dir():
        return {"single": [root.name], "files": [], "index": [], "dcp": []}
    if (root / ".metadata").exists():
        return {"single": [], "files": [], "index": [], "dcp": [".metadata"]}
    own, index = _tensor_files(root)
    merged: list[str] = []
    if (root / "consolidated").is_dir():
        below, index_below = _tensor_files(root / "consolidated")
        merged = [f"consolidated/{name}" for name in below]
        index = index or ([f"consolidated/{index_below[0]}"] if index_below else [])
    # A name in both is read from the shards, which hold it as it was in memory; so they come first.
    if not own and not merged:
        raise CheckpointNotFoundError(
            "the directory holds no safetensors file and no DCP metadata",
            path=root,
            hint="Point at a model directory, at model/ of a checkpoint, or at a .safetensors file.",
        )
    return {"single": [], "files": [*own, *merged], "index": list(index), "dcp": []}


def _tensor_files(directory: Path) -> tuple[list[str], list[str]]:
    """Names of the safetensors files that make up the model in a directory, and of the index that lists them."""
    names = sorted(os.listdir(directory))
    indices = _without_variants([n for n in names if n.endswith(_INDEX_SUFFIX)], _INDEX_SUFFIX)
    plain = _without_variants([n for n in names if n.endswith(".safetensors")], ".safetensors")
    if not indices:
        return plain, []
    chosen = "model" + _INDEX_SUFFIX if "model" + _INDEX_SUFFIX in indices else indices[0]
    weight_map = read_index(directory / chosen).weight_map
    # A model without a tensor has an index that lists nothing, and a file with nothing but its header.
    listed = sorted(set(weight_map.values())) or plain
    for name in listed:
        if not (directory / name).exists():
            raise WeightIndexError(
                f"the index names {name}, which is absent",
                path=directory / chosen,
                tensor=next(tensor for tensor, file in weight_map.items() if file == name),
                hint="Fetch or restore the missing file; the checkpoint is not whole without it.",
            )
    return listed, [chosen]


def _without_variants(names: Sequence[str], suffix: str) -> list[str]:
    """The names without other versions of a file: with ``model.safetensors`` there, ``model.fp16.safetensors`` is none.

    They hold tensors of the same names, so that reading both would take either one's values.
    """
    stems = {name.removesuffix(suffix) for name in names}
    return [n for n in names if not any(n.startswith(f"{stem}.") for stem in stems - {n.removesuffix(suffix)})]


def _read_headers(files: Sequence[Path], group: Group) -> list[list[_Entry]]:
    """The entries of every file, on every rank; each header is read by one rank."""
    own: dict[str, JsonValue] = {}
    with group.together("reading safetensors headers"):
        for number, file in enumerate(files):
            if number % group.world_size == group.rank:
                own[str(number)] = [_encode(entry) for entry in _entries(file)]
    everyone = cast(list[dict[str, list[JsonValue]]], group.gather_json(cast(JsonValue, own), "sharing headers"))
    merged = {int(number): rows for theirs in everyone for number, rows in theirs.items()}
    return [[_decode(row) for row in merged[number]] for number in range(len(files))]


def _entries(file: Path) -> list[_Entry]:
    header = read_header(file)
    offsets = saved_offsets(header) or {}
    return [
        _Entry(
            entry.spec.name,
            entry.spec.shape,
            entry.spec.dtype,
            header.data_start + entry.begin,
            offsets.get(entry.spec.name),
        )
        for entry in header.entries
    ]


def _encode(entry: _Entry) -> JsonValue:
    saved: JsonValue = None if entry.saved is None else list(entry.saved)
    return [entry.name, list(entry.shape), entry.dtype, entry.offset, saved]


def _decode(row: JsonValue) -> _Entry:
    name, shape, dtype, offset, saved = cast(tuple[str, list[int], str, int, list[int] | None], row)
    return _Entry(name, tuple(shape), dtype, offset, None if saved is None else tuple(saved))


def _assemble(root: Path, files: Sequence[Path], entries: Sequence[Sequence[_Entry]]) -> Source:
    first: dict[str, tuple[_Entry, int]] = {}
    pieces: dict[str, list[tuple[_Entry, int]]] = {}
    sharded_names: set[str] = set()
    for number, found in enumerate(entries):
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
    tensors = {n: _joined(n, pieces[n], files) if n in pieces else _whole(*piece) for n, piece in first.items()}
    return Source(root, tuple(files), tensors)


def _whole(entry: _Entry, file: int) -> SourceTensor:
    spec = TensorSpec(entry.name, entry.shape, entry.dtype)
    return SourceTensor(spec, (SourceChunk(Box.whole(entry.shape), file, entry.offset),))


def _joined(name: str, found: Sequence[tuple[_Entry, int]], files: Sequence[Path]) -> SourceTensor:
    first, number = found[0]
    shape = list(first.shape)
    chunks: dict[Box, SourceChunk] = {}
    for entry, file in found:
        offsets = entry.saved if entry.saved is not None else (0,) * len(entry.shape)
        if entry.dtype != first.dtype or len(entry.shape) != len(first.shape):
            raise HeaderError(
                f"{files[number].name} and {files[file].name} disagree about this tensor's dtype or dimensions",
                path=files[file],
                tensor=name,
                hint="The directory mixes files of different checkpoints; separate them.",
            )
        shape = [max(n, o + s) for n, o, s in zip(shape, offsets, entry.shape, strict=True)]
        box = Box(offsets, entry.shape)
        # The same region twice: replicas written by somebody else. Either will do, so that no byte is read twice.
        chunks.setdefault(box, SourceChunk(box, file, entry.offset))
    return SourceTensor(TensorSpec(name, tuple(shape), first.dtype), tuple(chunks.values()))


def _check_index(root: Path, indices: Sequence[str], source: Source) -> None:
    for name in indices:
        folder = (root / name).parent
        numbers = {path.name: number for number, path in enumerate(source.files) if path.parent == folder}
        here = set(numbers.values())
        for tensor, file in read_index(root / name).weight_map.items():
            known = source.tensors.get(tensor)
            if known is not None:
                held = {chunk.file for chunk in known.chunks}
                # A tensor that is read from shards beside the export has no say about the export's files.
                if not held <= here or _sharded(known) or numbers.get(file, -1) in {-1, *held}:
                    continue
            raise WeightIndexError(
                f"the index says that {file} holds this tensor, which it does not",
                path=root / name,
                tensor=tensor,
                hint="Index and files belong to different exports; fetch or save them again.",
            )


def _sharded(tensor: SourceTensor) -> bool:
    return len(tensor.chunks) > 1 or tensor.chunks[0].box.sizes != tensor.spec.shape


def _open_dcp(root: Path, group: Group) -> Source:
    """The tensors of a DCP directory; rank 0 reads its metadata, through an unpickler with an allow-list."""
    files, rows = cast(
        tuple[list[str], list[tuple[str, list[int], str, list[tuple[list[int], list[int], int, int, int]]]]],
        group.tell(lambda: _describe_dcp(root), f"reading the DCP metadata of {root}"),
    )
    tensors = {
        name: SourceTensor(
            TensorSpec(name, tuple(shape), dtype),
            tuple(SourceChunk(Box(tuple(o), tuple(s)), file, at, size) for o, s, file, at, size in chunks),
        )
        for name, shape, dtype, chunks in rows
    }
    return Source(root, tuple(root / name for name in files), tensors)


def _describe_dcp(root: Path) -> JsonValue:
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    from shardwise.format.dcp_metadata import read_dcp_metadata
    from shardwise.format.dtypes import dtype_code

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
            number = files.setdefault(str(info.relative_path), len(files))
            chunks.append([list(chunk.offsets), list(chunk.sizes), number, info.offset, info.length])
        rows.append([name, list(saved.size), dtype_code(saved.properties.dtype, name), chunks])
    missing = [name for name in files if not (root / name).is_file()]
    if missing:
        raise CheckpointNotFoundError(
            f"the metadata names {missing[0]}, which is absent",
            path=root / missing[0],
            hint="Restore the missing file; the checkpoint is not whole without it.",
        )
    return [list(files), rows]
