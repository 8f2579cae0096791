"""One file of ``torch.save`` for each rank: verl's, and those of any loop that saves sharded state dicts by itself.

verl writes ``model_world_size_N_rank_R.pt`` with DTensors, and the model's configuration in ``huggingface/`` beside.
Others choose names of their own; there the files say which rank's they are, since FSDP1's ShardedTensors and, from
torch 2.4 on, meshes record it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from shardwise.disk.names import is_directory, is_file, names_in
from shardwise.errors import AmbiguousFilesError, FormatError, MisuseError
from shardwise.format.sniff import Kind, what_is_file
from shardwise.format.torch_archive import TorchArchive, read_torch_archive
from shardwise.sources.others.distributed import RANK_ENUMS, RANK_NAMES, RankTensor, rank_tensor
from shardwise.sources.others.join import RankFile, join
from shardwise.sources.others.layout import Layout, OtherModel, require_ranks
from shardwise.sources.others.stored import refuse_tensors_inside
from shardwise.sources.sources import Source
from shardwise.sources.torch_state import distributed_class, unwrapped

VERL_NAME = re.compile(r"model_world_size_(\d{1,6})_rank_(\d{1,6})\.pt")

_VERL_SIDE = "huggingface"
_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
_SHOWN = 5
_CONFIG = "config.json"
#: What FSDP1 calls a flat parameter in a local state dict.
_FLAT = ("_flat_param", "flat_param")


@dataclass(frozen=True, slots=True)
class RankFiles:
    """Files of all ranks in a directory: by rank where names say it, and so ``world_size``, else by position."""

    directory: Path
    names: Mapping[int, str]
    world_size: int | None

    def open(self) -> OtherModel:
        """Join what the files have; see `Layout`."""
        if self.world_size is not None:
            require_ranks(self.directory, self.world_size, self.names)
        found = [file for number, name in sorted(self.names.items()) if (file := self._read(number, name)) is not None]
        if not found:
            raise MisuseError(
                "these files are an optimizer's state and no model",
                path=self.directory,
                hint="Name the directory of the model's files.",
            )
        files, world = (found, self.world_size) if self.world_size is not None else _by_rank(self.directory, found)
        joined = join(self.directory, files)
        kinds = list(dict.fromkeys(tensor.kind for tensor in files[0].tensors.values() if tensor.kind != "Tensor"))
        checked = [
            (len(joined.tensors), f"tensors ({', '.join(kinds) or 'whole'}): the pieces make up each exactly once")
        ]
        if kinds or len(files) > 1:
            ranks = "files of ranks: all that there have to be, and all say the same of each tensor"
            checked.insert(0, (len(files), ranks))
        source = Source(self.directory, tuple(file.path for file in files), joined.tensors)
        return OtherModel(source, world, tuple(checked), joined.notes, joined.unchecked)

    def _read(self, number: int, name: str) -> RankFile | None:
        archive = read_torch_archive(self.directory / name, RANK_NAMES, RANK_ENUMS)
        if not isinstance(archive.tree, dict):
            raise FormatError("the file holds no state dict", path=archive.path, hint="Name a model's files.")
        if self.world_size is None and {"state", "param_groups"} <= archive.tree.keys():
            return None
        _refuse_flat(archive)
        state = unwrapped(archive.tree, archive.path, partial(_elements, archive))
        tensors: dict[str, RankTensor] = {}
        left = []
        for key, value in state.items():
            tensor = rank_tensor(archive, value, str(key))
            if tensor is None:
                refuse_tensors_inside(archive, value, str(key))
                left.append(str(key))
            else:
                tensors[str(key)] = tensor
        claimed = {tensor.rank for tensor in tensors.values() if tensor.rank is not None}
        if len(claimed) > 1 or (self.world_size is not None and claimed - {number}):
            raise FormatError(
                f"the file says to be of rank {', '.join(map(str, sorted(claimed)))}"
                + (f", and its name that it is of rank {number}" if self.world_size is not None else ""),
                path=archive.path,
                hint="Files were renamed or mixed: restore the directory from a copy.",
            )
        return RankFile(archive.path, next(iter(claimed), number), tensors, tuple(left))


def _refuse_flat(archive: TorchArchive) -> None:
    """Refuse FSDP1's local state dict: pieces of flat parameters, without what they are cut from."""
    state = archive.tree if isinstance(archive.tree, dict) else {}
    flat = next((str(name) for name in state if str(name).rpartition(".")[2] in _FLAT), None)
    if flat is not None:
        raise MisuseError(
            "the file holds one rank's pieces of flat parameters (FSDP1's LOCAL_STATE_DICT), which say nothing of the "
            "shapes that the parameters had",
            path=archive.path,
            tensor=flat,
            hint="Load it where it was saved, on as many ranks, and save it with SHARDED_STATE_DICT instead.",
        )


def _elements(archive: TorchArchive, value: object) -> int | None:
    tensor = rank_tensor(archive, value, "")
    return None if tensor is None else math.prod(tensor.shape)


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
        require_ranks(directory, world, {rank: file.path.name for rank, file in by_rank.items()})
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
    files = RankFiles(directory, {int(match[2]): match[0] for match in matches}, worlds[0])
    own = directory / _VERL_SIDE
    return Layout("verl", directory, own if is_file(own / _CONFIG) else directory, files.open)


def saved_shards(directory: Path, names: Sequence[str]) -> Layout | None:
    """Files in a directory that hold distributed tensors, whatever they are called."""
    found = []
    for name in names:
        if name.endswith(_SUFFIXES):
            what = what_is_file(directory / name)
            if what is not None and what.kind is Kind.TORCH and distributed_class(directory / name) is not None:
                found.append(name)
    files = RankFiles(directory, dict(enumerate(found)), None)
    return Layout("torch.save, one file per rank", directory, directory, files.open) if found else None
