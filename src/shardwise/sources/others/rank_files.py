"""One file of ``torch.save`` for each rank: verl's, accelerate's, and those of loops that save shards by themselves.

verl writes ``model_world_size_N_rank_R.pt`` with DTensors, and the model's configuration in ``huggingface/`` beside.
Others choose names of their own; there the files say which rank's they are, since FSDP1's ShardedTensors and, from
torch 2.4 on, meshes record it.

accelerate (``save_fsdp_model``; so does transformers' Trainer with FSDP): ``pytorch_model_fsdp_0/`` is a DCP directory,
``pytorch_model_fsdp.bin`` the full state dict, ``pytorch_model_fsdp_0_rank1.bin`` one rank's shards, and
``pytorch_model_fsdp_rank1.bin`` one rank's flat pieces (LOCAL_STATE_DICT). A number other than 0 is that of a further
model. ``save_fsdp_optimizer`` writes the DCP directory ``optimizer_0/`` beside.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from shardwise.disk.names import exists, is_directory, is_file, names_in
from shardwise.errors import (
    AmbiguousFilesError,
    FormatError,
    IncompleteTensorError,
    MisuseError,
    ReplicasDifferError,
    ShapeMismatchError,
    TensorError,
    some,
)
from shardwise.format.sniff import Kind, what_is_file
from shardwise.format.torch_archive import read_torch_archive
from shardwise.geometry import DTYPE_BYTES, Box, TensorSpec, covers_once, runs, stride_of
from shardwise.plan.reads import SourceChunk, SourceTensor
from shardwise.sources.dcp_model import unwrapped_names
from shardwise.sources.others.distributed import RANK_ENUMS, RANK_NAMES, Part, RankTensor, rank_tensor
from shardwise.sources.others.layout import Layout, OtherModel, require_ranks
from shardwise.sources.others.stored import StoredTensor, refuse_tensors_inside
from shardwise.sources.sources import Source
from shardwise.sources.torch_files import distributed_class, unwrapped

VERL_NAME = re.compile(r"model_world_size_(\d{1,6})_rank_(\d{1,6})\.pt")

_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
#: What FSDP1 calls a flat parameter in a local state dict.
_FLAT = ("_flat_param", "flat_param")


@dataclass(frozen=True, slots=True)
class RankFile:
    """What one rank wrote: its tensors by the names in the file, and the names of what is no tensor."""

    path: Path
    rank: int
    tensors: Mapping[str, RankTensor]
    left: tuple[str, ...] = ()


def open_rank_files(directory: Path, names: Mapping[int, str], world_size: int | None) -> OtherModel:
    """Join what the files of all ranks have, each region once; see `Layout`.

    ``names`` are by rank where they say it, and then ``world_size`` as well; else by position.
    """
    if world_size is not None:
        require_ranks(directory, world_size, names)
    files = [file for n, name in sorted(names.items()) if (file := _read(directory / name, n, world_size)) is not None]
    if not files:
        raise MisuseError(
            "these files are an optimizer's state and no model",
            path=directory,
            hint="Name the directory of the model's files.",
        )
    if world_size is None:
        files, world_size = _by_rank(directory, files)
    _refuse_other_names(files)
    replicas = _Replicas()
    found = {name: _joined(name, files, replicas) for name in files[0].tensors}
    kinds = list(dict.fromkeys(tensor.kind for tensor in files[0].tensors.values() if tensor.kind != "Tensor"))
    if not kinds:
        replicas.refuse(directory)
    plain = unwrapped_names({name: name for name in found}, directory)
    tensors = {new: found[name]._replace(spec=found[name].spec._replace(name=new)) for new, name in plain.items()}
    left = list(dict.fromkeys(name for file in files for name in file.left))
    notes = [f"not exported, since it is no tensor: {some(left)}"] if left else []
    checked = [(len(tensors), f"tensors ({', '.join(kinds) or 'whole'}): the pieces make up each exactly once")]
    if kinds or len(files) > 1:
        ranks = "files of ranks: all that there have to be, and all say the same of each tensor"
        checked.insert(0, (len(files), ranks))
    source = Source(directory, tuple(file.path for file in files), tensors)
    return OtherModel(source, world_size, tuple(checked), tuple(notes), tuple(replicas.notes()))


def _read(path: Path, number: int, world_size: int | None) -> RankFile | None:
    """What one file has; ``None`` of an optimizer's, where names do not say what it is."""
    archive = read_torch_archive(path, RANK_NAMES, RANK_ENUMS)
    if not isinstance(archive.tree, dict):
        raise FormatError("the file holds no state dict", path=path, hint="Name a model's files.")
    if world_size is None and {"state", "param_groups"} <= archive.tree.keys():
        return None
    flat = next((str(name) for name in archive.tree if str(name).rpartition(".")[2] in _FLAT), None)
    if flat is not None:
        raise MisuseError(
            "the file holds one rank's pieces of flat parameters (FSDP1's LOCAL_STATE_DICT), which say nothing of the "
            "shapes that the parameters had",
            path=path,
            tensor=flat,
            hint="Load it where it was saved, on as many ranks, and save it with SHARDED_STATE_DICT instead.",
        )

    def elements(value: object) -> int | None:
        tensor = rank_tensor(archive, value, "")
        return None if tensor is None else math.prod(tensor.shape)

    tensors: dict[str, RankTensor] = {}
    left = []
    for key, value in unwrapped(archive.tree, path, elements).items():
        tensor = rank_tensor(archive, value, str(key))
        if tensor is None:
            refuse_tensors_inside(archive, value, str(key))
            left.append(str(key))
        else:
            tensors[str(key)] = tensor
    claimed = {tensor.rank for tensor in tensors.values() if tensor.rank is not None}
    if len(claimed) > 1 or (world_size is not None and claimed - {number}):
        raise FormatError(
            f"the file says to be of rank {', '.join(map(str, sorted(claimed)))}"
            + (f", and its name that it is of rank {number}" if world_size is not None else ""),
            path=path,
            hint="Files were renamed or mixed: restore the directory from a copy.",
        )
    return RankFile(path, next(iter(claimed), number), tensors, tuple(left))


def _by_rank(directory: Path, found: Sequence[RankFile]) -> tuple[list[RankFile], int | None]:
    """The files in the order of the ranks that they say to be of, and how many there have to be."""
    by_rank: dict[int, RankFile] = {}
    for file in found:
        known = by_rank.setdefault(file.rank, file)
        if known is not file:
            raise AmbiguousFilesError(
                f"{known.path.name} and {file.path.name} are both of rank {file.rank}",
                path=directory,
                hint="Leave one model's files in a directory.",
            )
    worlds = {t.world for file in found for t in file.tensors.values() if t.world is not None}
    if len(worlds) > 1:
        raise AmbiguousFilesError(
            f"the files are of runs of {', '.join(map(str, sorted(worlds)))} ranks",
            path=directory,
            hint="Leave one model's files in a directory.",
        )
    world = next(iter(worlds), None)
    if world is not None:
        require_ranks(directory, world, by_rank)
    return [by_rank[rank] for rank in sorted(by_rank)], world


def verl_files(directory: Path, names: Sequence[str]) -> Layout | None:
    """The files of verl in a directory, or in the one directory below it that has some."""
    own = _verl(directory, names)
    if own is not None:
        return own
    below = [directory / name for name in names if is_directory(directory / name)]
    found = [layout for place in below if (layout := _verl(place, names_in(place))) is not None]
    if len(found) > 1:
        raise AmbiguousFilesError(
            f"the directory holds several models that verl wrote: {', '.join(f.directory.name for f in found)}",
            path=directory,
            hint=f"Name the one that is meant, for example {found[0].directory}.",
        )
    return found[0] if found else None


def _verl(directory: Path, names: Sequence[str]) -> Layout | None:
    matches = [match for name in names if (match := VERL_NAME.fullmatch(name)) is not None]
    worlds = sorted({int(match[1]) for match in matches})
    if not matches:
        return None
    if len(worlds) > 1:
        raise AmbiguousFilesError(
            f"the directory holds files of runs of {' and of '.join(map(str, worlds))} ranks",
            path=directory,
            hint="Leave those of one run in it: their names say how many ranks it had.",
        )
    ranks = {int(match[2]): match[0] for match in matches}
    own = directory / "huggingface"
    side = own if is_file(own / "config.json") else directory
    return Layout("verl", directory, side, partial(open_rank_files, directory, ranks, worlds[0]))


def saved_shards(directory: Path, names: Sequence[str]) -> Layout | None:
    """Files in a directory that hold distributed tensors, whatever they are called."""
    found = []
    for name in names:
        if name.endswith(_SUFFIXES):
            what = what_is_file(directory / name)
            if what is not None and what.kind is Kind.TORCH and distributed_class(directory / name) is not None:
                found.append(name)
    opens = partial(open_rank_files, directory, dict(enumerate(found)), None)
    return Layout("torch.save, one file per rank", directory, directory, opens) if found else None


# --- joining what the files of all ranks have ------------------------------------------------------------------------


#: Most runs of bytes in which what one rank holds of one tensor may lie.
_MOST_RUNS = 65536
_MIXED = "The directory mixes files of different checkpoints; separate them."


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


_TOOL = "accelerate (FSDP)"
_DIRECTORY = re.compile(r"pytorch_model_fsdp_(\d+)")
_FULL = re.compile(r"pytorch_model_fsdp(_\d+)?\.bin")
_OF_RANK = re.compile(r"pytorch_model_fsdp(_\d+)?_rank(\d{1,6})\.bin")


def accelerates(directory: Path, names: Sequence[str]) -> Layout | None:
    """What accelerate's FSDP saved in a directory; `AmbiguousFilesError` where it is not one model in one form."""
    sharded = [name for name in names if _DIRECTORY.fullmatch(name) and exists(directory / name / ".metadata")]
    full = [name for name in names if _FULL.fullmatch(name)]
    by_model: dict[str, list[str]] = {}
    for name in names:
        match = _OF_RANK.fullmatch(name)
        if match is not None:
            by_model.setdefault(match[1] or "", []).append(name)
    found = [*sharded, *full, *(group[0] for group in by_model.values())]
    if len(found) > 1:
        raise AmbiguousFilesError(
            f"the directory holds several models, or one in several forms: {', '.join(found)}",
            path=directory,
            hint="Name one of the directories among them, or leave the files of one model in a directory.",
        )
    if sharded:
        dcp = directory / sharded[0]
        return Layout(_TOOL, directory, directory, partial(_refuse_dcp, dcp), dcp)
    files = full or [name for group in by_model.values() for name in group]
    opens = partial(open_rank_files, directory, dict(enumerate(files)), None)
    return Layout(_TOOL, directory, directory, opens) if files else None


def _refuse_dcp(directory: Path) -> OtherModel:
    raise MisuseError("this is a DCP directory", path=directory, hint="Open it as one.")


def optimizer_beside(model: Path) -> Path | None:
    """Where the optimizer of a model in such a DCP directory is; ``None`` for any other path."""
    match = _DIRECTORY.fullmatch(model.name)
    return None if match is None else model.with_name(f"optimizer_{match[1]}")
