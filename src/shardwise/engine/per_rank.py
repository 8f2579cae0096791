"""Tensors with a different value on each rank: one file for each rank, beside the files that all ranks share."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import TypeAlias

from shardwise.disk.names import is_directory, names_in
from shardwise.disk.sequential import SequentialFile
from shardwise.disk.storage import Storage
from shardwise.dtypes import torch_dtype
from shardwise.engine.records import ComponentRecord
from shardwise.errors import (
    DtypeMismatchError,
    MisuseError,
    ShapeMismatchError,
    StateFormatError,
    TensorError,
    UnexpectedTensorError,
)
from shardwise.format.header import arrange, encode_header, read_header
from shardwise.format.manifest import FileRecord
from shardwise.format.notes import PER_RANK_DIR
from shardwise.geometry import Box, TensorSpec
from shardwise.plan.fragments import HeldTensor
from shardwise.plan.reads import SourceChunk, SourceTensor, plan_reads
from shardwise.sources.reader import Reader
from shardwise.sources.tensor_bytes import byte_blocks

#: A tensor of a file, and the memory that it is read into.
Pair: TypeAlias = tuple[SourceTensor, HeldTensor]

_NAME = re.compile(r"rank_\d{5,}_of_(\d{5,})\.safetensors")


def own_file(directory: Path, rank: int, world_size: int) -> Path:
    """The file of one rank. Its name has the number of ranks, since its content is meaningless on another number."""
    return directory / PER_RANK_DIR / f"rank_{rank:05d}_of_{world_size:05d}.safetensors"


def saved_ranks(directory: Path) -> int:
    """The number of ranks that saved per-rank tensors of a component; 0 where there are none. Local.

    Raises `StateFormatError`: there are files of several saves.
    """
    place = directory / PER_RANK_DIR
    if not is_directory(place):
        return 0
    counts = {int(found[1]) for name in names_in(place) if (found := _NAME.fullmatch(name))}
    if len(counts) > 1:
        what = f"there are files of {' and of '.join(map(str, sorted(counts)))} ranks"
        hint = "They are of several saves; remove those that do not belong here."
        raise StateFormatError(what, path=place, hint=hint)
    return counts.pop() if counts else 0


def require_whole(held: Sequence[HeldTensor]) -> None:
    """Raise `MisuseError` if a tensor is spread over ranks."""
    for tensor in held:
        boxes = [fragment.box for fragment in tensor.fragments]
        if boxes != [Box.whole(tensor.spec.shape)]:
            raise MisuseError(
                "per_rank_state names this tensor, which is spread over several ranks: each saves its shard anyway",
                tensor=tensor.spec.name,
                hint="Let the patterns in per_rank_state match only what each rank holds whole.",
            )


def write_own(held: Sequence[HeldTensor], path: Path, storage: Storage, metadata: Mapping[str, str]) -> ComponentRecord:
    """Write a rank's file, durable. Local."""
    data = {tensor.spec.name: tensor.fragments[0].data for tensor in held}
    entries = arrange([tensor.spec for tensor in held])
    header = encode_header(entries, metadata)
    size = len(header) + (entries[-1].end if entries else 0)
    storage.make_directory(path.parent)
    storage.check_space(path.parent, size)
    with SequentialFile(storage, path, size) as file:
        file.append([header])
        for spec, _, _ in entries:
            file.append(byte_blocks(data[spec.name], torch_dtype(spec.dtype)), spec.name)
    storage.sync_directory(path.parent)
    return ComponentRecord((FileRecord(f"{PER_RANK_DIR}/{path.name}", file.size, file.crc32c, None),))


def match_own(path: Path, held: Mapping[str, HeldTensor]) -> tuple[list[Pair], Mapping[str, str]]:
    """The reads from a rank's file into its tensors, which are compared first, and the file's metadata. Local.

    Raises:
        TensorError: They do not fit.
        HeaderError: The file is damaged.
    """
    header = read_header(path)
    found: list[Pair] = []
    for spec, begin, _ in header.entries:
        target = held.get(spec.name)
        if target is None:
            raise _unlike(
                UnexpectedTensorError, "this rank's file has a tensor that the rank does not hold", spec, path
            )
        own = target.spec
        if spec.shape != own.shape:
            what = f"this rank saved it with shape {list(spec.shape)}, here it has {list(own.shape)}"
            raise _unlike(ShapeMismatchError, what, spec, path)
        if spec.dtype != own.dtype:
            raise _unlike(DtypeMismatchError, f"this rank saved it as {spec.dtype}, here it is {own.dtype}", spec, path)
        chunk = SourceChunk(Box.whole(spec.shape), 0, header.data_start + begin)
        found.append((SourceTensor(spec, (chunk,)), target._replace(spec=spec)))
    return found, header.metadata


def _unlike(kind: type[TensorError], what: str, spec: TensorSpec, path: Path) -> TensorError:
    hint = "Build the model and its optimizer as when the checkpoint was saved."
    return kind(what, path=path, tensor=spec.name, hint=hint)


def read_own(path: Path, pairs: Sequence[Pair], storage: Storage, threads: int) -> None:
    """Read what `match_own` found. Local."""
    with closing(Reader(storage, [path], threads)) as reader:
        reader.execute([read for saved, target in pairs for read in plan_reads(saved, target)])
