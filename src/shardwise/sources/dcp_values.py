"""Entries of a DCP directory beside sharded tensors: values that DCP pickled, and small tensors read whole."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, cast

from shardwise.disk.guarded import open_regular, read_exactly
from shardwise.disk.names import is_file, status
from shardwise.disk.storage import located
from shardwise.errors import CheckpointNotFoundError, FormatError, MisuseError, ShardwiseError, StorageError
from shardwise.format.dcp_metadata import read_dcp_metadata
from shardwise.format.notes import DCP_METADATA_NAME
from shardwise.format.torch_archive import MAX_VALUE_BYTES, read_torch_value
from shardwise.geometry import Box, covers_once
from shardwise.sources.dcp_model import DcpPath, item_paths, refuse_transformed, tensor_names

if TYPE_CHECKING:
    import torch
    from torch.distributed.checkpoint.metadata import Metadata

    from shardwise.upstream.torch_distributed import StorageInfo

#: Tensors that are no part of a model or of an optimizer's state are small: counters, a tensor learning rate.
MAX_SMALL_TENSOR_BYTES = 2**28


def is_dcp(directory: Path) -> bool:
    """Whether a directory is one that DCP wrote."""
    return is_file(directory / DCP_METADATA_NAME)


class DcpValues:
    """Reads single items of a DCP directory. Local; nothing is read before it is asked for.

    With ``legacy`` what cannot be read otherwise is unpickled without restrictions, which runs code from the files.
    """

    def __init__(self, directory: Path, legacy: bool = False) -> None:
        self.directory = directory
        self.metadata: Metadata = read_dcp_metadata(directory / DCP_METADATA_NAME)
        self.paths: Mapping[str, DcpPath] = item_paths(self.metadata)
        self.tensors = frozenset(tensor_names(self.metadata))
        self._legacy = legacy
        self._places: defaultdict[str, list[tuple[tuple[int, ...], StorageInfo]]] = defaultdict(list)
        for index, info in (self.metadata.storage_data or {}).items():
            self._places[index.fqn].append((tuple(index.offset or ()), info))
        self._read: dict[bytes, object] = {}

    def values(self, names: Iterable[str]) -> dict[str, object]:
        """Several items, in the order in which they lie in the files."""
        order = sorted(names, key=lambda name: [(info.relative_path, info.offset) for _, info in self._places[name]])
        found = {name: self.value(name) for name in order}
        return {name: found[name] for name in names}

    def value(self, name: str) -> object:
        """One item: a value, or a small tensor, whole.

        `FormatError` where it is damaged or too large for a value, `UnsafePickleError` where it could run code.
        """
        if name in self.tensors:
            return self._tensor(name)
        places = self._places[name]
        if len(places) != 1:
            raise FormatError(
                f"the metadata name {len(places)} places for this value", path=self.directory, tensor=name
            )
        raw, path = self._bytes(places[0][1], name)
        # Thousands of parameters have the same few options.
        if raw not in self._read:
            self._read[raw] = read_torch_value(raw, str(path), name, legacy=self._legacy)
        return self._read[raw]

    def _bytes(self, info: StorageInfo, name: str) -> tuple[bytes, Path]:
        path = self.directory / info.relative_path
        refuse_transformed(info, path, name)
        if info.length > MAX_VALUE_BYTES:
            raise FormatError(
                f"has {info.length} bytes, too many for what is no sharded tensor", path=path, tensor=name
            )
        try:
            with open_regular(path, FormatError) as (file, _):
                file.seek(info.offset)
                raw = read_exactly(file, info.length)
        except FileNotFoundError as error:
            raise CheckpointNotFoundError(
                f"the metadata names {info.relative_path}, which is absent",
                path=path,
                tensor=name,
                hint="Restore the missing file; the checkpoint is not whole without it.",
            ) from error
        except OSError as error:
            raise StorageError.from_os(error, path=path) from error
        if len(raw) != info.length:
            raise FormatError("the file ends within this item", path=path, tensor=name, hint="Restore the file.")
        return raw, path

    def _tensor(self, name: str) -> torch.Tensor:
        import torch
        from torch.distributed.checkpoint.metadata import TensorStorageMetadata

        from shardwise.sources.packed_items import load_item

        item = self.metadata.state_dict_metadata[name]
        assert isinstance(item, TensorStorageMetadata)
        dtype = item.properties.dtype
        if item.size.numel() * dtype.itemsize > MAX_SMALL_TENSOR_BYTES:
            raise MisuseError(
                f"a tensor of {list(item.size)} is too large for what is read whole on every rank",
                path=self.directory,
                tensor=name,
                hint="Load it by DCP's own means, with shardwise.SafetensorsReader for a reader.",
            )
        whole = torch.zeros(item.size, dtype=dtype)
        places = dict(self._places[name])
        for chunk in item.chunks:
            info = places.get(tuple(chunk.offsets))
            if info is None:
                raise FormatError("the metadata lists a chunk without its place", path=self.directory, tensor=name)
            raw, path = self._bytes(info, name)
            try:
                part = load_item(raw, tuple(chunk.sizes), dtype)
            except FormatError as error:
                raise located(error, path, name) from None
            whole[tuple(slice(o, o + n) for o, n in zip(chunk.offsets, chunk.sizes, strict=True))] = part
        return whole


def nested(found: Mapping[DcpPath, object]) -> object:
    """The value that DCP flattened: path -> part. Dictionaries of consecutive numbers are lists."""
    root: dict[str | int, object] = {}
    for path, value in found.items():
        if not path:
            return value
        at = root
        for part in path[:-1]:
            inner = at.setdefault(part, {})
            if not isinstance(inner, dict):
                raise FormatError(f"the metadata have {'.'.join(map(str, path))} below a value")
            at = cast("dict[str | int, object]", inner)
        at[path[-1]] = value
    return _with_lists(root)


def _with_lists(value: object) -> object:
    if not isinstance(value, dict):
        return value
    made = {key: _with_lists(each) for key, each in value.items()}
    if made and all(type(key) is int for key in made) and sorted(made) == list(range(len(made))):
        return [made[number] for number in range(len(made))]
    return made


_ZIP_START, _ZIP_END = b"PK\x03\x04", b"PK\x05\x06"
_ZIP_END_BYTES = 22


class Wrong(NamedTuple):
    """Something that contradicts the metadata: ``file`` is its path in the directory, empty for the metadata itself.

    ``kind`` is as `shardwise.engine.verify` names damages; ``tensors`` are the items concerned.
    """

    file: str
    kind: Literal["absent", "kind", "size", "header", "incomplete", "unreadable"]
    message: str
    tensors: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class DcpExtents:
    """What was compared: the files that the metadata names, numbers of tensors and items, contradictions."""

    files: tuple[str, ...]
    tensors: int
    items: int
    wrong: tuple[Wrong, ...]


class _Item(NamedTuple):
    offset: int
    length: int
    name: str
    is_archive: bool


def check_dcp_extents(directory: Path) -> DcpExtents:
    """Compare existence and length of the files, each item's place, and the pieces of each tensor."""
    from shardwise.format.dcp_metadata import read_dcp_metadata

    metadata = read_dcp_metadata(directory)
    names = set(tensor_names(metadata))
    by_file: dict[str, list[_Item]] = {}
    for index, info in (metadata.storage_data or {}).items():
        archive = index.fqn in names and not info.transform_descriptors
        by_file.setdefault(str(info.relative_path), []).append(_Item(info.offset, info.length, index.fqn, archive))
    wrong = list(_unplaced(metadata))
    for file, items in by_file.items():
        items.sort()
        wrong += _check_file(directory, file, items)
    return DcpExtents(tuple(by_file), len(names), sum(map(len, by_file.values())), tuple(wrong))


def _unplaced(metadata: Metadata) -> Iterator[Wrong]:
    """Tensors with a missing piece, or a piece without a place."""
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    places = {(index.fqn, tuple(index.offset or ())) for index in metadata.storage_data or {}}
    named = {name for name, _ in places}
    lost, partial = [], []
    for name, item in metadata.state_dict_metadata.items():
        if not isinstance(item, TensorStorageMetadata):
            if name not in named:
                lost.append(name)
            continue
        boxes = [Box(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in item.chunks]
        if any((name, box.offsets) not in places for box in boxes):
            lost.append(name)
        if not covers_once(tuple(item.size), list(dict.fromkeys(boxes))):
            partial.append(name)
    if lost:
        yield Wrong("", "header", "the metadata does not say where these lie", tuple(lost))
    if partial:
        yield Wrong("", "incomplete", "the metadata lists pieces that do not make up the tensor", tuple(partial))


def _check_file(directory: Path, file: str, items: list[_Item]) -> Iterator[Wrong]:
    everything = tuple(dict.fromkeys(item.name for item in items))
    path = directory / file
    info = status(path)
    if info is None:
        yield Wrong(file, "absent", "the file, which .metadata names, is absent", everything)
        return
    if info.kind != "file":
        yield Wrong(file, "kind", "something else stands where .metadata names a file", everything)
        return
    beyond = [item for item in items if item.offset + item.length > info.size]
    if beyond:
        end = max(item.offset + item.length for item in beyond)
        message = f"the file has {info.size} of the {end} bytes that .metadata speaks of: it was cut short"
        yield Wrong(file, "size", message, tuple(dict.fromkeys(item.name for item in beyond)))
    inside = [item for item in items if item.offset + item.length <= info.size]
    overlapping = [
        late.name
        for early, late in itertools.pairwise(inside)
        if late.offset < early.offset + early.length and late[:2] != early[:2]
    ]
    if overlapping:
        yield Wrong(file, "header", ".metadata puts these where other items lie", tuple(dict.fromkeys(overlapping)))
    yield from _check_archives(path, file, inside)


def _check_archives(path: Path, file: str, items: list[_Item]) -> Iterator[Wrong]:
    """Each tensor is an archive of its own, as ``torch.save`` writes it: look at its first and last bytes."""
    odd: dict[str, None] = {}
    try:
        with open_regular(path, FormatError) as (stream, _):
            for item in items:
                if not item.is_archive:
                    continue
                stream.seek(item.offset)
                start = stream.read(len(_ZIP_START))
                stream.seek(item.offset + max(0, item.length - _ZIP_END_BYTES))
                if start != _ZIP_START or stream.read(len(_ZIP_END)) != _ZIP_END:
                    odd[item.name] = None
    except ShardwiseError as error:
        yield Wrong(file, "unreadable", error.message, ())
    if odd:
        yield Wrong(file, "header", "no serialised tensor lies where .metadata puts these", tuple(odd))
