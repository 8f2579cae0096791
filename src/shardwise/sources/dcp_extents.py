"""Comparing the files of a DCP directory with what its ``.metadata`` says of them. No item is unpickled."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from shardwise.disk.guarded import open_regular
from shardwise.disk.names import status
from shardwise.errors import FormatError, ShardwiseError
from shardwise.geometry import Box, covers_once
from shardwise.sources.dcp_model import tensor_names

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import Metadata

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
