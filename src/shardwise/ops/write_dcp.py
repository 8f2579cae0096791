"""Writing tensors as a DCP directory.

The files are those that torch's ``FileSystemWriter`` writes: items of ``torch.save`` one after the other in
``.distcp`` files, and ``.metadata``, which says where each is. Source: torch 2.13's
``torch.distributed.checkpoint.filesystem``.

An item is the tensor's elements between bytes that its shape and dtype determine, but for a checksum behind them. So
the place of every item is known beforehand, and none is ever whole in memory.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast
from zlib import crc32

import numpy as np
import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from shardwise.disk.sequential import write_file
from shardwise.disk.storage import Storage
from shardwise.dtypes import torch_dtype
from shardwise.format.header import TensorEntry
from shardwise.format.notes import DCP_METADATA_NAME
from shardwise.geometry import TensorSpec
from shardwise.ops.exporting import TensorWriter, batches_of
from shardwise.ops.tensors_to_write import TensorToWrite
from shardwise.plan.layout import FileLayout, Layout, lay_out
from shardwise.upstream.torch_checkpoint import storage_info

#: The mapping that the model's names are below, as in ``dcp.save({"model": model.state_dict()})``.
MODEL = "model"
#: What torch calls the current layout of such directories.
_VERSION = "1.0.0"
#: In a zip archive: the name of the elements' entry, how an entry of its directory begins, and where its checksum is.
_ELEMENTS, _DIRECTORY_ENTRY, _CHECKSUM_AT = b"/data/0", b"PK\x01\x02", 16
#: Behind the elements: where their checksum is in what follows them at once (APPNOTE.TXT, 4.3.9).
_DESCRIPTOR_AT = 4


def write_dcp(
    tensors: Mapping[str, TensorToWrite],
    aliases: Mapping[str, str],
    directory: Path,
    storage: Storage,
    advance: Callable[[int], None],
) -> None:
    """Write ``{"model": state_dict}`` into an existing directory, durably. Memory is a few blocks for each thread.

    ``aliases`` are further names of tensors; both names lead to the same bytes. ``advance`` is called with bytes that
    were written.
    """
    specs = {name: tensor.spec for name, tensor in tensors.items()}
    frames = {(spec.shape, spec.dtype): spec for spec in specs.values()}
    made = {kind: _frame(spec) for kind, spec in frames.items()}
    layout = _layout(specs, made)

    def item(name: str) -> Iterator[memoryview]:
        spec = specs[name]
        return made[spec.shape, spec.dtype].around(tensors[name].blocks())

    TensorWriter(layout, directory, storage, advance).write(batches_of(layout, item, specs))
    places = {
        entry.spec.name: storage_info(file.name, entry.begin, entry.end - entry.begin, None)
        for file in layout.files
        for entry in file.entries
    }
    kept = {name: name for name in specs} | dict(aliases)
    metadata = Metadata(
        state_dict_metadata={f"{MODEL}.{name}": _described(specs[own]) for name, own in kept.items()},
        planner_data={f"{MODEL}.{name}": (MODEL, name) for name in kept},
        storage_data={_index(name, specs[own]): places[own] for name, own in kept.items()},
        storage_meta=StorageMeta(),
        version=_VERSION,
    )
    write_file(storage, directory / DCP_METADATA_NAME, pickle.dumps(metadata))


def _layout(specs: Mapping[str, TensorSpec], frames: Mapping[tuple[tuple[int, ...], str], _Frame]) -> Layout:
    """The files, named as DCP names those of its first rank; as many as an export has: writers of one take turns."""
    files = []
    for number, file in enumerate(lay_out(specs.values()).files):
        entries, at = [], 0
        for spec, _, _ in file.entries:
            end = at + frames[spec.shape, spec.dtype].beside + spec.nbytes
            entries.append(TensorEntry(spec, at, end))
            at = end
        files.append(FileLayout(f"__0_{number}.distcp", b"", tuple(entries)))
    return Layout(tuple(files))


def _index(name: str, spec: TensorSpec) -> MetadataIndex:
    return MetadataIndex(f"{MODEL}.{name}", torch.Size([0] * len(spec.shape)))


def _described(spec: TensorSpec) -> TensorStorageMetadata:
    shape = torch.Size(spec.shape)
    chunk = ChunkStorageMetadata(torch.Size([0] * len(spec.shape)), shape)
    return TensorStorageMetadata(TensorProperties(dtype=torch_dtype(spec.dtype)), shape, [chunk])


@dataclass(frozen=True, slots=True)
class _Frame:
    """What ``torch.save`` writes before and behind the elements of a tensor of one shape and dtype.

    ``checksums`` is where in ``tail`` the elements' CRC-32 stands.
    """

    head: bytes
    tail: bytes
    checksums: tuple[int, ...]

    @property
    def beside(self) -> int:
        """Bytes that are no elements."""
        return len(self.head) + len(self.tail)

    def around(self, blocks: Iterator[memoryview]) -> Iterator[memoryview]:
        """A tensor's bytes as ``torch.save`` writes it."""
        yield memoryview(self.head)
        crc = 0
        for block in blocks:
            yield block
            crc = crc32(block, crc)
        tail = bytearray(self.tail)
        for at in self.checksums:
            tail[at : at + 4] = crc.to_bytes(4, "little")
        yield memoryview(tail)


def _frame(spec: TensorSpec) -> _Frame:
    """What surrounds such a tensor, as torch writes it around whatever is in memory that is never written to."""
    whole = torch.empty(spec.shape, dtype=torch_dtype(spec.dtype))
    start = whole.data_ptr()
    head, tail = bytearray(), bytearray()
    passed = 0

    def write(part: bytes | memoryview) -> int:
        nonlocal passed
        data = np.frombuffer(part, dtype=np.uint8)
        if start <= data.ctypes.data < start + spec.nbytes:
            passed += len(data)
        else:
            (tail if passed else head).extend(part)
        return len(data)

    torch.save(whole, cast("IO[bytes]", _Written(write)))
    if not spec.nbytes:  # the checksum of nothing stands there already
        return _Frame(bytes(head), b"", ())
    entry = tail.rindex(_DIRECTORY_ENTRY, 0, tail.index(_ELEMENTS))
    return _Frame(bytes(head), bytes(tail), (_DESCRIPTOR_AT, entry + _CHECKSUM_AT))


@dataclass(frozen=True, slots=True)
class _Written:
    """What ``torch.save`` writes to."""

    write: Callable[[bytes | memoryview], int]

    def flush(self) -> None:
        """Nothing is left to be written."""
