"""Directories of DeepSpeed: the model's 16-bit weights where they are saved, else fp32 master weights.

Source: what DeepSpeed 0.19 writes, its documentation, and descriptions of ``zero_to_fp32``. Up to ZeRO-2,
``mp_rank_00_model_states.pt`` has the state dict; each rank's ``..._optim_states.pt`` has, of each parameter group, an
equal part of the group's master weights one behind the other. With ZeRO-3 each parameter by itself is cut into equal
parts, and a rank has its parts one behind the other; what is frozen is cut likewise, in ``..._model_states.pt``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple

from shardwise.disk.guarded import read_small_file, why_not_relative
from shardwise.disk.names import is_directory, is_file, names_in
from shardwise.errors import CheckpointNotFoundError, FormatError, IncompleteTensorError, MisuseError
from shardwise.format.pickle_tree import PickledCall, PickledGlobal
from shardwise.format.torch_archive import read_torch_archive
from shardwise.geometry import DTYPE_BYTES, Box, TensorSpec, covers_once
from shardwise.plan.reads import SourceChunk, SourceTensor
from shardwise.plan.views import refine_range
from shardwise.sources.dcp_model import unwrapped_names
from shardwise.sources.others.layout import Layout, OtherModel, require_ranks
from shardwise.sources.others.stored import (
    PLAIN_NAMES,
    StoredTensor,
    counts,
    is_tensor,
    refuse_tensors_inside,
    refuse_unread,
    storage_of,
    stored_tensor,
)
from shardwise.sources.sources import Source

_MODEL = re.compile(r"(?:zero_pp_rank_(?P<dp>\d{1,6})_)?mp_rank_(?P<mp>\d{1,6})_model_states\.pt")
_OPTIM = re.compile(r"(?:bf16_)?zero_pp_rank_(?P<dp>\d{1,6})_mp_rank_(?P<mp>\d{1,6})_optim_states\.pt")
_PARTS = re.compile(r"layer_\d+.*-model_states\.pt|.*expert_\d+_mp_rank_\d+_.*states\.pt")
_STAGE = PickledGlobal("deepspeed.runtime.zero.config", "ZeroStageEnum")
_FRAGMENT = PickledGlobal("deepspeed.utils.tensor_fragment", "fragment_address")
#: What such files name beside tensors; of all but the first two nothing is read.
_NAMES = PLAIN_NAMES | {
    _STAGE,
    _FRAGMENT,
    PickledGlobal("deepspeed.runtime.fp16.loss_scaler", "LossScaler"),
    PickledGlobal("deepspeed.runtime.fp16.loss_scaler", "DynamicLossScaler"),
    PickledGlobal("argparse", "Namespace"),
    PickledGlobal("numpy", "dtype"),
    PickledGlobal("numpy", "ndarray"),
    *(
        PickledGlobal(f"numpy.{core}.multiarray", name)
        for core in ("core", "_core")
        for name in ("scalar", "_reconstruct")
    ),
    PickledGlobal("_codecs", "encode"),
}
_LATEST = "latest"


def open_deepspeed(directory: Path, masters: bool) -> OtherModel:
    """Read what the files of all ranks of one checkpoint (``global_stepN``) have; see `Layout`.

    ``masters`` says whether master weights are preferred.
    """
    names = names_in(directory)
    for name in names:
        match = _MODEL.fullmatch(name) or _OPTIM.fullmatch(name)
        if _PARTS.fullmatch(name) or (match is not None and int(match["mp"]) > 0):
            raise _parallel(directory / name)
    models = {int(m["dp"] or 0): m for name in names if (m := _MODEL.fullmatch(name)) is not None}
    optimizers = {int(m["dp"]): m[0] for name in names if (m := _OPTIM.fullmatch(name)) is not None}
    lowest = models[min(models)]
    first = _States(directory / lowest[0])
    if lowest["dp"] is not None:
        require_ranks(directory, first.world, models, "model_states files")
        others = [_States(directory / models[rank][0]) for rank in range(1, first.world)]
        return _stage3([first, *others], _partitions(directory, optimizers, first.world))
    if masters:
        return _stage2(first, _partitions(directory, optimizers, first.world))
    result = _Result([first])
    result.add_whole(first.whole())
    found = result.opened(first)
    if not optimizers:
        return found
    note = "the weights of the model's state dict were taken; the master weights are there too (--master-weights)"
    unread = "the optimizer's partitions: the model is not read from them"
    return replace(found, notes=(*found.notes, note), unchecked=(unread,))


def _partitions(directory: Path, found: Mapping[int, str], world: int) -> list[_Partitions]:
    """Every rank's optimizer file, in the order of the ranks."""
    require_ranks(directory, world, found, "optim_states files")
    return [_Partitions(directory / found[rank]) for rank in range(world)]


def _stage2(first: _States, ranks: Sequence[_Partitions]) -> OtherModel:
    """Master weights of up to ZeRO-2: each group is one vector, of which each rank has an equal part."""
    result = _Result([first, *ranks])
    groups = first.param_shapes
    held = [rank.groups("single_partition_of_fp32_groups") for rank in ranks]
    if any(len(each) != len(groups) for each in held):
        raise first.wrong(f"has {len(groups)} parameter groups, and a rank's optimizer another number")
    for number, shapes in enumerate(groups):
        equal = held[0][number].numel
        vector = [_Segment(rank * equal, each[number], 1 + rank) for rank, each in enumerate(held)]
        padding = ranks[0].alignment(number, len(shapes))
        position = 0
        for (name, shape), behind in zip(shapes.items(), padding, strict=True):
            numel = Box.whole(shape).numel
            for rank, part in enumerate(ranks):
                part.compare(number, name, position - rank * equal, numel, equal)
            result.add(name, shape, "F32", _pieces(vector, position, numel, shape))
            position += numel + behind
        there, align = vector[-1].end, 2 * first.world
        if -(-position // align) != -(-there // align):
            raise first.wrong(
                f"says that the parameters of group {number} have {position} elements; the ranks have {there}"
            )
    for segment_dtype in {each.dtype for rank in held for each in rank} - {"F32"}:
        raise first.wrong(f"has master weights in {segment_dtype}")
    # What is in no partition, as buffers and what is frozen, is in the state dict; a tied parameter is there twice.
    whole = first.whole()
    places = {(whole[name].offset, whole[name].shape): name for name in result.tensors if name in whole}
    twice = {name: of for name, stored in whole.items() if (of := places.get((stored.offset, stored.shape)))}
    result.alias({**first.shared, **twice})
    result.add_whole({name: stored for name, stored in whole.items() if name not in result.tensors})
    return result.opened(first, "the fp32 master weights were taken")


def _stage3(states: Sequence[_States], ranks: Sequence[_Partitions]) -> OtherModel:
    """Master weights of ZeRO-3: each parameter by itself is cut into equal parts."""
    first, world = states[0], len(states)
    result = _Result([*states, *ranks])
    for state in states[1:]:
        if state.param_shapes != first.param_shapes or state.frozen != first.frozen:
            raise state.wrong("says other shapes of the parameters than that of rank 0")
    vectors = [_vector(part.groups("fp32_flat_groups"), world + rank) for rank, part in enumerate(ranks)]
    position = 0
    shapes = {name: shape for group in first.param_shapes for name, shape in group.items()}
    for name, shape in shapes.items():
        result.add(name, shape, "F32", _cut(vectors, position, shape))
        position += -(-Box.whole(shape).numel // world)
    for rank, vector in enumerate(vectors):
        if not vector or vector[-1].end != position or any(each.stored.dtype != "F32" for each in vector):
            raise ranks[rank].wrong(f"has not just the {position} master weights in F32 that the shapes ask for")
    for name, shape in first.frozen.items():
        parts = [_vector([state.fragment(name)], rank) for rank, state in enumerate(states)]
        if len({part[0].stored.dtype for part in parts}) > 1:
            raise first.wrong(f"and those of other ranks have parts of {name} in several dtypes")
        result.add(name, shape, parts[0][0].stored.dtype, _cut(parts, 0, shape))
    whole = first.whole()
    result.add_whole({name: whole[name] for name in first.buffers if name in whole})
    result.alias({**first.shared, **first.aliases(result.tensors)})
    for name in first.names:
        if name not in result.tensors:
            raise IncompleteTensorError(
                "the model's state dict has this tensor, and no partition has its values",
                path=first.path,
                tensor=name,
                hint="Save 16-bit weights with the tool that wrote it (save_16bit_model).",
            )
    note = "the fp32 master weights were taken: ZeRO-3 saves no 16-bit weights in these files"
    return result.opened(first, note)


class _Segment(NamedTuple):
    """A part of a vector: where it begins there, in elements, what it is, and the position of its file."""

    start: int
    stored: StoredTensor
    file: int

    @property
    def end(self) -> int:
        return self.start + self.stored.numel


def _pieces(
    segments: Sequence[_Segment], position: int, count: int, shape: tuple[int, ...], first: int = 0
) -> Iterator[SourceChunk]:
    """The boxes of a tensor that lie in a run of a vector; ``first`` is the tensor's element at ``position``."""
    for segment in segments:
        low, high = max(position, segment.start), min(position + count, segment.end)
        if low >= high:
            continue
        item = DTYPE_BYTES[segment.stored.dtype]
        offset = segment.stored.offset + (low - segment.start) * item
        boxes = refine_range(first + low - position, high - low, shape) if shape else (Box((), ()),)
        for box in boxes:
            yield SourceChunk(box, segment.file, offset)
            offset += box.numel * item


def _vector(stored: Sequence[StoredTensor], file: int) -> list[_Segment]:
    found: list[_Segment] = []
    for each in stored:
        found.append(_Segment(found[-1].end if found else 0, each, file))
    return found


def _cut(vectors: Sequence[Sequence[_Segment]], position: int, shape: tuple[int, ...]) -> list[SourceChunk]:
    """The pieces of a tensor of which each rank has an equal part, at the same position of its vector."""
    numel = Box.whole(shape).numel
    part = -(-numel // len(vectors))
    found: list[SourceChunk] = []
    for rank, vector in enumerate(vectors):
        count = min(part, numel - rank * part)
        if count > 0:
            found += _pieces(vector, position, count, shape, rank * part)
    return found


class _Result:
    """The tensors that were found so far."""

    def __init__(self, files: Sequence[_File]) -> None:
        self.files = tuple(file.path for file in files)
        self.tensors: dict[str, SourceTensor] = {}

    def add(self, name: str, shape: tuple[int, ...], dtype: str, found: Iterable[SourceChunk]) -> None:
        """Add a tensor, if its pieces make it up."""
        chunks = tuple(found)
        if not covers_once(shape, [chunk.box for chunk in chunks]):
            raise IncompleteTensorError(
                f"the ranks' partitions do not hold all of this tensor of {list(shape)}",
                path=self.files[0].parent,
                tensor=name,
                hint="A rank's file is another checkpoint's, or was cut short: restore the directory from a copy.",
            )
        spec = TensorSpec(name, shape, dtype)
        self.tensors[name] = SourceTensor(spec, chunks or (SourceChunk(Box.whole(shape), 0, 0),))

    def add_whole(self, found: Mapping[str, StoredTensor]) -> None:
        """Add tensors that the first file has whole."""
        for name, stored in found.items():
            self.add(name, stored.shape, stored.dtype, [SourceChunk(Box.whole(stored.shape), 0, stored.offset)])

    def alias(self, names: Mapping[str, str]) -> None:
        """Give tensors further names."""
        for name, of in names.items():
            if of in self.tensors and name not in self.tensors:
                known = self.tensors[of]
                self.tensors[name] = known._replace(spec=known.spec._replace(name=name))

    def opened(self, first: _States, *notes: str) -> OtherModel:
        """The model under its own names, in the order of its state dict."""
        if not self.tensors:
            raise first.wrong("holds no model")
        order = dict.fromkeys([*(name for name in first.names if name in self.tensors), *self.tensors])
        plain = unwrapped_names({name: name for name in order}, first.path.parent)
        tensors = {
            name: self.tensors[own]._replace(spec=self.tensors[own].spec._replace(name=name))
            for name, own in plain.items()
        }
        left = [f"not exported, since it is no tensor: {', '.join(first.left[:3])}"] if first.left else []
        checked = ((len(tensors), "tensors of DeepSpeed: each is there exactly once"),)
        source = Source(first.path.parent, self.files, tensors)
        return OtherModel(source, first.world, checked, (*notes, *left))


class _File:
    """A file of DeepSpeed, and what it has under its keys."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.archive = read_torch_archive(path, _NAMES, {_STAGE})
        if not isinstance(self.archive.tree, dict):
            raise self.wrong("holds no dictionary")
        self.tree: dict[object, object] = self.archive.tree

    def wrong(self, what: str) -> FormatError:
        """The error for a file that is not of the form that DeepSpeed writes."""
        return FormatError(f"the file {what}", path=self.path, hint="Restore the file from a copy.")

    def mapping(self, key: str) -> dict[str, object]:
        """A dictionary with names for keys; empty where there is none."""
        value = self.tree.get(key)
        if value is None:
            return {}
        if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
            raise self.wrong(f"has something else than a dictionary of names under {key!r}")
        return value

    def shapes(self, found: Mapping[str, object]) -> dict[str, tuple[int, ...]]:
        """Shapes by names."""
        return {name: counts(self.archive, shape, name, "a shape's sizes") for name, shape in found.items()}


class _States(_File):
    """``model_states.pt``."""

    @property
    def world(self) -> int:
        """The number of data-parallel ranks."""
        found = self.tree.get("dp_world_size")
        if type(found) is not int or not 0 < found <= 10**6:
            raise self.wrong("does not say how many ranks there were")
        if self.tree.get("mp_world_size", 1) not in (1, None):
            raise _parallel(self.path)
        return found

    @cached_property
    def _module(self) -> dict[str, object]:
        return self.mapping("module")

    @property
    def names(self) -> list[str]:
        """Names of the tensors in the model's state dict."""
        return [name for name, value in self._module.items() if is_tensor(value)]

    @property
    def left(self) -> list[str]:
        """Names of what is no tensor there."""
        found = {name: value for name, value in self._module.items() if not is_tensor(value)}
        for name, value in found.items():
            refuse_unread(self.archive, value, name)
            refuse_tensors_inside(self.archive, value, name)
        return list(found)

    def whole(self) -> dict[str, StoredTensor]:
        """The tensors of the model's state dict."""
        return {name: stored_tensor(self.archive, self._module[name], name) for name in self.names}

    @cached_property
    def param_shapes(self) -> list[dict[str, tuple[int, ...]]]:
        """The shapes of the parameters of each group, in the order in which they lie."""
        found = self.tree.get("param_shapes")
        groups = found if isinstance(found, list) else [found]
        if not all(isinstance(group, dict) and all(isinstance(name, str) for name in group) for group in groups):
            raise self.wrong("does not say which parameters lie in the partitions")
        return [self.shapes(group) for group in groups if isinstance(group, dict)]

    @cached_property
    def frozen(self) -> dict[str, tuple[int, ...]]:
        """The shapes of parameters that no optimizer has."""
        return self.shapes(self.mapping("frozen_param_shapes"))

    def fragment(self, name: str) -> StoredTensor:
        """This rank's part of a frozen parameter."""
        return stored_tensor(self.archive, self.mapping("frozen_param_fragments").get(name), name)

    @property
    def buffers(self) -> list[str]:
        """Names of the buffers."""
        found = self.tree.get("buffer_names")
        return [str(name) for name in found] if isinstance(found, list) else []

    @property
    def shared(self) -> dict[str, str]:
        """Further names of parameters."""
        return {name: of for name, of in self.mapping("shared_params").items() if isinstance(of, str)}

    def aliases(self, known: Mapping[str, SourceTensor]) -> dict[str, str]:
        """Names of the state dict that have the storage of a known tensor's: the same parameter once more."""
        storages: dict[object, list[str]] = {}
        for name, value in self._module.items():
            if name in known:
                storages.setdefault(storage_of(value), []).append(name)
        found = {name: storages.get(storage_of(self._module[name]), []) for name in self.names if name not in known}
        # Where several parameters have one storage, it says nothing.
        return {name: of[0] for name, of in found.items() if len(of) == 1}


class _Partitions(_File):
    """``optim_states.pt``."""

    @cached_property
    def _state(self) -> dict[str, object]:
        found = self.mapping("optimizer_state_dict")
        if not found:
            raise self.wrong("holds no optimizer's state")
        return found

    def groups(self, key: str) -> list[StoredTensor]:
        """This rank's vectors."""
        found = self._state.get(key)
        if not isinstance(found, (list, tuple)):
            raise self.wrong(f"has no {key}: it is of another version or stage of ZeRO than is known")
        stored = [stored_tensor(self.archive, value, f"{key}[{number}]") for number, value in enumerate(found)]
        if any(len(each.shape) != 1 for each in stored):
            raise self.wrong(f"has a partition in {key} that is not flat")
        return stored

    def alignment(self, group: int, count: int) -> list[int]:
        """How many elements of padding are behind each parameter of a group."""
        found = self._state.get("param_alignment_paddings")
        rows = found[group] if isinstance(found, list) and group < len(found) else None
        if rows is None:
            return [0] * count
        numbers = counts(self.archive, rows, "param_alignment_paddings", "paddings")
        if len(numbers) != count:
            raise self.wrong("has not one padding for each parameter")
        return list(numbers)

    def compare(self, group: int, name: str, start: int, numel: int, equal: int) -> None:
        """Compare where a parameter lies with what the file says of it, if it does (DeepSpeed from 0.7 on).

        ``start`` counts from this rank's partition of ``equal`` elements.
        """
        mappings = self._state.get("param_slice_mappings")
        if not isinstance(mappings, list) or group >= len(mappings) or not isinstance(mappings[group], dict):
            return
        low, high = max(start, 0), min(start + numel, equal)
        found = mappings[group].get(name)
        state = found.state if isinstance(found, PickledCall) and found.function == _FRAGMENT else None
        said = (state.get("start"), state.get("numel")) if isinstance(state, dict) else None
        if said != ((low, high - low) if low < high else None):
            raise self.wrong(f"says that {name} lies at {said} in its partition, and not at {(low, high - low)}")


def _parallel(path: Path) -> MisuseError:
    return MisuseError(
        "the file holds a part of a model (model or pipeline parallelism, or experts), and does not say which part of "
        "each tensor",
        path=path,
        hint="Make a model of it with the tool that cut it.",
    )


def deepspeeds(directory: Path, names: Sequence[str], masters: bool) -> Layout | None:
    """The checkpoint that a directory is, or that its ``latest`` names; arguments as of `recognise`."""
    place, requested = directory, directory
    if any(map(_MODEL.fullmatch, names)):
        if is_file(directory.parent / _LATEST):
            requested = directory.parent
    else:
        tag = read_small_file(directory / _LATEST, 4096, follows=True) if _LATEST in names else None
        below = "" if tag is None else tag.decode("utf-8", "replace").strip()
        if not below or why_not_relative(below) is not None:
            return None
        place = directory / below
        if not is_directory(place):
            raise CheckpointNotFoundError(
                f"latest names {below}, which is not there", path=place, hint="Name the directory of a checkpoint."
            )
        if not any(map(_MODEL.fullmatch, names_in(place))):
            return None
    side = place if is_file(place / "config.json") else requested
    return Layout("DeepSpeed", place, side, partial(open_deepspeed, place, masters), has_masters=True)
