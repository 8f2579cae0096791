"""Writing tensors as a DCP directory, one tensor at a time.

The files are those that torch's ``FileSystemWriter`` writes: items of ``torch.save`` one after the other in a
``.distcp`` file, and ``.metadata``, which says where each is. Source: torch 2.13's
``torch.distributed.checkpoint.filesystem``.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, cast

import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from shardwise.disk.sequential import SequentialFile, write_file
from shardwise.disk.storage import Storage
from shardwise.dtypes import torch_dtype
from shardwise.format.dcp_metadata import DCP_METADATA_NAME
from shardwise.geometry import TensorSpec
from shardwise.ops.computed_tensors import fill
from shardwise.ops.tensors_to_write import TensorToWrite
from shardwise.upstream.torch_checkpoint import storage_info

if TYPE_CHECKING:
    from shardwise.upstream.torch_checkpoint import StorageInfo

#: As DCP calls the first file of its first rank.
_FILE = "__0_0.distcp"
#: The mapping that the model's names are below, as in ``dcp.save({"model": model.state_dict()})``.
MODEL = "model"
#: What torch calls the current layout of such directories.
_VERSION = "1.0.0"


def write_dcp(
    tensors: Mapping[str, TensorToWrite],
    aliases: Mapping[str, str],
    directory: Path,
    storage: Storage,
    advance: Callable[[int], None],
) -> int:
    """Write ``{"model": state_dict}`` into an existing directory, durably. Memory is twice the largest tensor.

    Args:
        tensors: The state dict's tensors.
        aliases: Further name of a tensor -> its name among these; both names lead to the same bytes.
        directory: Where to.
        storage: Through what.
        advance: Called with bytes that were written.

    Returns:
        Bytes of the files.
    """
    places: dict[str, StorageInfo] = {}
    with SequentialFile(storage, directory / _FILE) as made:
        for name, tensor in tensors.items():
            start = made.size
            made.append(_item(tensor), name)
            places[name] = storage_info(_FILE, start, made.size - start, None)
            advance(tensor.spec.nbytes)
    size = made.size
    specs = {name: (tensor.spec, name) for name, tensor in tensors.items()}
    specs |= {alias: (tensors[kept].spec, kept) for alias, kept in aliases.items()}
    metadata = Metadata(
        state_dict_metadata={f"{MODEL}.{name}": _described(spec) for name, (spec, _) in specs.items()},
        planner_data={f"{MODEL}.{name}": (MODEL, name) for name in specs},
        storage_data={_index(name, spec): places[kept] for name, (spec, kept) in specs.items()},
        storage_meta=StorageMeta(),
        version=_VERSION,
    )
    content = pickle.dumps(metadata)
    write_file(storage, directory / DCP_METADATA_NAME, content)
    return size + len(content)


def _index(name: str, spec: TensorSpec) -> MetadataIndex:
    return MetadataIndex(f"{MODEL}.{name}", torch.Size([0] * len(spec.shape)))


def _described(spec: TensorSpec) -> TensorStorageMetadata:
    shape = torch.Size(spec.shape)
    chunk = ChunkStorageMetadata(torch.Size([0] * len(spec.shape)), shape)
    return TensorStorageMetadata(TensorProperties(dtype=torch_dtype(spec.dtype)), shape, [chunk])


def _item(tensor: TensorToWrite) -> Iterator[memoryview]:
    """The tensor as ``torch.save`` writes it."""
    spec = tensor.spec
    whole = torch.empty(spec.shape, dtype=torch_dtype(spec.dtype))
    fill(whole, tensor.blocks())
    kept = _Kept([])
    torch.save(whole, cast("IO[bytes]", kept))
    for part in kept.parts:
        yield memoryview(part)


@dataclass(frozen=True, slots=True)
class _Kept:
    """What ``torch.save`` writes to: keeps the parts, since those of a buffer are gone when it returns."""

    parts: list[bytes]

    def write(self, part: bytes | memoryview) -> int:
        """Keep a part."""
        self.parts.append(bytes(part))
        return len(part)

    def flush(self) -> None:
        """Nothing is left to be written."""
