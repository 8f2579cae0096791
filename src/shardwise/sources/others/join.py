"""The tensors of a model, joined from what the files of all its ranks have of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from shardwise.errors import (
    FormatError,
    IncompleteTensorError,
    ReplicasDifferError,
    ShapeMismatchError,
    TensorError,
    some,
)
from shardwise.geometry import DTYPE_BYTES, Box, TensorSpec, covers_once, runs, stride_of
from shardwise.plan.reads import SourceChunk, SourceTensor
from shardwise.sources.dcp_model import unwrapped_names
from shardwise.sources.others.distributed import Part, RankTensor
from shardwise.sources.others.stored import StoredTensor

#: Most runs of bytes in which what one rank holds of one tensor may lie.
_MOST_RUNS = 65536
_MIXED = "The directory mixes files of different checkpoints; separate them."


@dataclass(frozen=True, slots=True)
class RankFile:
    """What one rank wrote: its tensors by the names in the file, and the names of what is no tensor."""

    path: Path
    rank: int
    tensors: Mapping[str, RankTensor]
    left: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Joined:
    """A model's tensors without what wrappers add to names; notes for a report, see `OtherModel`."""

    tensors: Mapping[str, SourceTensor]
    notes: tuple[str, ...] = ()
    unchecked: tuple[str, ...] = ()


def join(directory: Path, files: Sequence[RankFile]) -> Joined:
    """Join the tensors of all ranks, each region once. The pieces name ``files``, one of each rank, by position.

    Raises:
        IncompleteTensorError: A rank's file lacks a tensor, or the pieces do not make it up.
        TensorError: The ranks disagree about a tensor, or what a rank holds lies in too many pieces.
        ReplicasDifferError: Each rank has plain tensors alone, and other values than another rank.
    """
    _refuse_other_names(files)
    replicas = _Replicas()
    found = {name: _joined(name, files, replicas) for name in files[0].tensors}
    if all(tensor.kind == "Tensor" for tensor in files[0].tensors.values()):
        replicas.refuse(directory)
    names = unwrapped_names({name: name for name in found}, directory)
    tensors = {plain: found[name]._replace(spec=found[name].spec._replace(name=plain)) for plain, name in names.items()}
    left = list(dict.fromkeys(name for file in files for name in file.left))
    notes = [f"not exported, since it is no tensor: {some(left)}"] if left else []
    return Joined(tensors, tuple(notes), tuple(replicas.notes()))


def _refuse_other_names(files: Sequence[RankFile]) -> None:
    everywhere = dict.fromkeys(name for file in files for name in file.tensors)
    for file in files:
        absent = [name for name in everywhere if name not in file.tensors]
        if absent:
            raise IncompleteTensorError(
                f"the file of rank {file.rank} lacks {len(absent)} tensors that other ranks' files have, {absent[0]} "
                "among them",
                path=file.path,
                tensor=absent[0],
                hint="Ranks with different parts of a model, as in pipelines, are not joined. " + _MIXED,
            )


def _joined(name: str, files: Sequence[RankFile], replicas: _Replicas) -> SourceTensor:
    first = files[0].tensors[name]
    chunks: dict[Box, SourceChunk] = {}
    known: dict[Box, tuple[int, StoredTensor]] = {}
    for number, file in enumerate(files):
        tensor = file.tensors[name]
        if (tensor.shape, tensor.dtype) != (first.shape, first.dtype):
            raise ShapeMismatchError(
                f"rank {files[0].rank} has it as {list(first.shape)} {first.dtype}, rank {file.rank} as "
                f"{list(tensor.shape)} {tensor.dtype}",
                path=file.path,
                tensor=name,
                hint=_MIXED,
            )
        if (tensor.kind, tensor.spread) != (first.kind, first.spread):
            raise TensorError(
                f"the files of rank {files[0].rank} and rank {file.rank} disagree about how this {first.kind} is "
                "spread over the ranks",
                path=file.path,
                tensor=name,
                hint=_MIXED,
            )
        for part in tensor.parts:
            before = known.setdefault(part.region.box, (file.rank, part.stored))
            if before[1] is part.stored:
                chunks |= {chunk.box: chunk for chunk in _chunks(name, part, number, file.path)}
            else:
                replicas.compare(name, before, (file.rank, part.stored))
    if not covers_once(first.shape, [box for box in known if box.numel]):
        raise IncompleteTensorError(
            f"the {len(known)} pieces in the ranks' files do not make up the tensor of {list(first.shape)}",
            path=files[0].path.parent,
            tensor=name,
            hint="A rank's file is absent, or the directory mixes files of different checkpoints.",
        )
    # An empty tensor has no piece with an element, and still one place.
    pieces = tuple(chunks.values()) or (SourceChunk(Box.whole(first.shape), 0, 0),)
    return SourceTensor(TensorSpec(name, first.shape, first.dtype), pieces)


def _chunks(name: str, part: Part, file: int, path: Path) -> Iterator[SourceChunk]:
    """The pieces of a file in which a region lies: one for each run of bytes of the local tensor."""
    box, stored = part.region.box, part.stored
    local = Box(part.region.local, box.sizes)
    if box.numel and stride_of(local, stored.shape).count > _MOST_RUNS:
        raise FormatError(
            f"what the file has of this tensor lies in more than {_MOST_RUNS} pieces",
            path=path,
            tensor=name,
            hint="Redistribute the tensor, cut along its first dimension, before saving.",
        )
    item = DTYPE_BYTES[stored.dtype]
    for first, _, index in runs(local, stored.shape):
        outer = len(index)
        low = tuple(o + i for o, i in zip(box.offsets, index, strict=False))
        piece = Box((*low, *box.offsets[outer:]), ((1,) * outer + box.sizes[outer:]))
        yield SourceChunk(piece, file, stored.offset + first * item)


class _Replicas:
    """Compares regions that several ranks hold, by the checksums of their archives."""

    def __init__(self) -> None:
        self._differing: dict[str, tuple[int, int]] = {}
        self._unknown: dict[str, None] = {}

    def compare(self, name: str, a: tuple[int, StoredTensor], b: tuple[int, StoredTensor]) -> None:
        """Note whether two ranks have equal bytes of a region."""
        one, other = a[1], b[1]
        if not one.numel:
            return
        alike = one.crc32 and other.crc32 and one.shape == other.shape
        if alike and (one.crc32, one.start, one.storage_bytes) == (other.crc32, other.start, other.storage_bytes):
            return
        if alike and one.alone and other.alone:
            self._differing.setdefault(name, (a[0], b[0]))
        else:
            self._unknown[name] = None

    def refuse(self, directory: Path) -> None:
        """Refuse what is not known to be equal, where nothing says that ranks hold the same and not parts."""
        doubtful = [*self._differing, *self._unknown]
        if doubtful:
            raise ReplicasDifferError(
                f"{len(doubtful)} tensors are not known to be equal in all ranks' files, and nothing says that they "
                "are replicas and not each rank's part",
                path=directory,
                tensor=doubtful[0],
                hint="Save the model as one, or as distributed tensors, which say what they are parts of.",
            )

    def notes(self) -> list[str]:
        """Sentences about what differs, and what could not be compared."""
        found = []
        if self._differing:
            name, (one, other) = next(iter(self._differing.items()))
            found.append(
                f"{len(self._differing)} tensors differ between ranks that hold them as replicas, and the lowest "
                f"rank's were taken: {some(list(self._differing))} ({name} on rank {one} and rank {other})"
            )
        unknown = [name for name in self._unknown if name not in self._differing]
        if unknown:
            found.append(
                f"whether {len(unknown)} tensors are equal on ranks that hold them as replicas could not be compared, "
                f"since the files have no checksum of just these: {some(unknown)}"
            )
        return found
