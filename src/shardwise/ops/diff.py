"""Compares two checkpoints or models: names, shapes, dtypes, values and configurations.

Where both have manifests, tensors with one digest are equal and are not read. Others are read block by block.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from shardwise.comm import Group
from shardwise.disk.guarded import read_whole
from shardwise.disk.names import is_directory, is_file, names_in
from shardwise.disk.storage import Storage, current, using
from shardwise.engine.verify import load_manifest
from shardwise.errors import CheckpointNotFoundError, FormatError, HeaderError, IntegrityError, MisuseError
from shardwise.format.json_file import MAX_JSON_BYTES, parse_json
from shardwise.format.manifest import TensorRecord
from shardwise.format.notes import METADATA_DIR
from shardwise.format.sniff import Kind, what_is_file
from shardwise.geometry import TensorSpec
from shardwise.ops.beside import CONFIG_NAME, parse_yaml
from shardwise.ops.modules import layer_of
from shardwise.ops.targets import COMPONENTS, find_targets, with_nested
from shardwise.ops.verify import TORCH_SUFFIXES, Counted, Progress
from shardwise.sources.directory_contents import holds_model, natural
from shardwise.sources.reader import Reader, tensor_blocks
from shardwise.sources.sources import Source, open_source

if TYPE_CHECKING:
    import torch

__all__ = ["ConfigDifference", "DiffReport", "LayerDifference", "TensorDifference", "diff"]

#: Elements of each tensor that are compared at a time: with everything that is computed from them about 64 MiB.
_ELEMENTS = 2**20


@dataclass(frozen=True, slots=True)
class TensorDifference:
    """A tensor that both have, and that is not the same.

    Attributes:
        component: ``model``, ``optim``, or the folder of a pipeline's model.
        a: What it is in the first.
        b: What it is in the second.
        relative: Norm of the difference, divided by the norm in the first; infinite where that is 0 or a value of one
            is not finite. ``None`` where shapes differ or no values were compared.
        largest: Largest absolute difference of two elements; likewise.
        elements: How many elements differ: in their bits, or of two dtypes in their values; likewise.
    """

    component: str
    a: TensorSpec
    b: TensorSpec
    relative: float | None = None
    largest: float | None = None
    elements: int | None = None


@dataclass(frozen=True, slots=True)
class ConfigDifference:
    """A value of a configuration file that is not the same.

    Attributes:
        file: The file's name.
        key: Where it is in the file, keys joined by dots; empty for the whole file.
        a: The value in the first, as JSON has it; ``None`` where it is absent.
        b: Likewise in the second.
    """

    file: str
    key: str
    a: object
    b: object


@dataclass(slots=True)
class LayerDifference:
    """How the tensors of a layer differ; outside of layers those of a module.

    Attributes:
        component: As in `TensorDifference`.
        layer: ``model.layers.7``.
        tensors: How many tensors it has in both.
        different: How many of these differ.
        only_a: How many the first alone has.
        only_b: Likewise the second.
        relative: The largest relative difference of one of its tensors; ``None`` where none was computed.
        largest: The largest difference of two elements; likewise.
    """

    component: str
    layer: str
    tensors: int = 0
    different: int = 0
    only_a: int = 0
    only_b: int = 0
    relative: float | None = None
    largest: float | None = None


@dataclass(frozen=True, slots=True)
class DiffReport:
    """How two checkpoints differ.

    Attributes:
        a: What the first path means: of a root, its newest checkpoint.
        b: Likewise the second.
        same: Number of tensors that are equal in name, shape, dtype and every bit.
        by_digest: How many of these were compared by digests alone.
        tensors: Those that differ.
        only_a: Component and name of tensors that the first alone has.
        only_b: Likewise the second.
        configs: Differences of configuration files.
        equal: Component and name of those that are equal.
        uncompared: Component and name of tensors whose values were not compared, since nobody asked for more than
            digests and they have none in common.
        notes: What was left out, one sentence each.
    """

    a: Path
    b: Path
    same: int = 0
    by_digest: int = 0
    tensors: tuple[TensorDifference, ...] = ()
    only_a: tuple[tuple[str, str], ...] = ()
    only_b: tuple[tuple[str, str], ...] = ()
    configs: tuple[ConfigDifference, ...] = ()
    equal: tuple[tuple[str, str], ...] = ()
    uncompared: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def differs(self) -> bool:
        """Whether anything differs."""
        return bool(self.tensors or self.only_a or self.only_b or self.configs)

    @property
    def layers(self) -> list[LayerDifference]:
        """The layers in which anything differs, by component and name."""
        found: dict[tuple[str, str], LayerDifference] = {}

        def of(component: str, name: str) -> LayerDifference:
            key = (component, layer_of(name))
            return found.setdefault(key, LayerDifference(*key))

        for each in self.tensors:
            layer = of(each.component, each.a.name)
            layer.tensors += 1
            layer.different += 1
            if each.relative is not None and each.largest is not None:
                layer.relative = max(each.relative, layer.relative or 0.0)
                layer.largest = max(each.largest, layer.largest or 0.0)
        for key in self.only_a:
            of(*key).only_a += 1
        for key in self.only_b:
            of(*key).only_b += 1
        differing = list(found.values())
        for key in (*self.equal, *self.uncompared):
            of(*key).tensors += 1
        return sorted(differing, key=lambda each: (each.component, natural(each.layer)))


def diff(
    a: str | os.PathLike[str],
    b: str | os.PathLike[str],
    *,
    values: bool = True,
    progress: Progress | None = None,
    storage: Storage | None = None,
) -> DiffReport:
    """Compare two checkpoints, components of them, Hugging Face models, safetensors files or DCP directories.

    A checkpoint is compared with a model by its model alone. Digests tell what was saved; whether files are still that,
    `verify` says.

    Args:
        a: The first; of a root its newest checkpoint.
        b: The second.
        values: Read the tensors whose digests differ or that have none.
        progress: Called with the bytes read of both and the bytes to read.
        storage: Where both are; the mounted file systems by default.

    Raises:
        CheckpointNotFoundError: There is nothing at a path.
        IncompleteCheckpointError: One is an interrupted save.
        FormatError: A manifest, header or configuration is damaged.
        IntegrityError: A file ends before its header says so.
        MisuseError: They have no component in common, or one is of a form that is not compared.
        StorageError: The file system refused.
    """
    with using(storage or current()):
        first, second = find_parts(a), find_parts(b)
        shared, apart = _components(first, second)
        whole = first.is_checkpoint and second.is_checkpoint
        notes = [] if whole else [f"{name} is in one of them alone, and was not compared" for name in apart]
        pairs: list[_Pair] = []
        only_a: list[tuple[str, str]] = []
        only_b: list[tuple[str, str]] = []
        has_dcp = False
        alone = [(name, first.places.get(name), second.places.get(name)) for name in apart if whole]
        for component, mine, theirs in [*shared, *alone]:
            one, other = _opened(mine), _opened(theirs)
            has_dcp |= one.dcp or other.dcp
            only_a += [(component, name) for name in one.tensors if name not in other.tensors]
            only_b += [(component, name) for name in other.tensors if name not in one.tensors]
            pairs += [(component, one, other, name) for name in one.tensors if name in other.tensors]
        if has_dcp:
            notes.append("what DCP holds besides tensors was not compared")
        found = DiffReport(
            first.path,
            second.path,
            only_a=tuple(sorted(only_a)),
            only_b=tuple(sorted(only_b)),
            configs=tuple(_config_differences(first, second)),
            notes=tuple(notes),
        )
        return _compared(found, pairs, first, second, values, progress)


def _components(first: Parts, second: Parts) -> tuple[list[tuple[str, Path, Path]], list[str]]:
    """What is compared with what, and the components that one of them alone has."""
    a, b = first.places, second.places
    if len(a) == len(b) == 1:
        [(name, place)], [other] = a.items(), b.values()
        return [(name, place, other)], []
    shared = [(name, a[name], b[name]) for name in a if name in b]
    if not shared:
        mine, theirs = (", ".join(places) or "no tensors" for places in (a, b))
        raise MisuseError(
            f"the two have nothing in common: the first has {mine}, the second {theirs}",
            path=second.path,
            hint="Name a directory of each that holds one model.",
        )
    return shared, [name for name in dict.fromkeys((*a, *b)) if name not in a or name not in b]


def _opened(place: Path | None) -> Source:
    """What is in a place; nothing where one of both has no such component."""
    if place is None:
        return Source(Path(), (), {})
    try:
        return open_source(place, Group(None))
    except (CheckpointNotFoundError, HeaderError):
        hint = "`shardwise convert` makes files of it that can be compared (--to hf)."
        suffixes = {PurePosixPath(name).suffix for name in names_in(place)} if is_directory(place) else set()
        if ".distcp" in suffixes:
            raise CheckpointNotFoundError(
                "the .metadata of this DCP directory is absent, and without it its files cannot be read",
                path=place,
                hint="Copy it from where the checkpoint was saved; DCP writes it last.",
            ) from None
        if suffixes & set(TORCH_SUFFIXES):
            raise MisuseError("files of torch.save are not compared", path=place, hint=hint) from None
        what = what_is_file(place) if is_file(place) and place.suffix != ".safetensors" else None
        if what is None or what.kind is Kind.SAFETENSORS:
            raise
        torch = what.kind is Kind.TORCH
        hint = hint if torch else "Name a model's directory, a safetensors file, a DCP directory or a checkpoint."
        raise MisuseError(f"this is {what.name}, which is not compared", path=place, hint=hint) from None


#: Component, both sources and the name of a tensor that both have.
_Pair = tuple[str, Source, Source, str]


def _compared(
    report: DiffReport, pairs: list[_Pair], first: Parts, second: Parts, values: bool, progress: Progress | None
) -> DiffReport:
    """The report with the tensors that both have: by their digests, and by their values where these tell nothing."""
    found: list[TensorDifference] = []
    unread: list[tuple[str, str]] = []
    equal: list[tuple[str, str]] = []
    to_read: list[_Pair] = []
    for component, a, b, name in pairs:
        mine, theirs, key = a.tensors[name].spec, b.tensors[name].spec, (component, name)
        same = _same_digest(first, second, key, mine) if mine == theirs else None
        if same:
            equal.append(key)
        elif values and mine.shape == theirs.shape:
            to_read.append((component, a, b, name))
        elif same is None and mine == theirs:
            unread.append(key)
        else:
            found.append(TensorDifference(component, mine, theirs))
    by_digest = len(equal)
    differing = list(_read(to_read, progress))
    apart = {(each.component, each.a.name) for each in differing}
    equal += [key for component, _, _, name in to_read if (key := (component, name)) not in apart]
    return replace(
        report,
        same=len(equal),
        by_digest=by_digest,
        tensors=tuple(sorted([*found, *differing], key=lambda each: (each.component, each.a.name))),
        equal=tuple(sorted(equal)),
        uncompared=tuple(unread),
    )


def _read(pairs: list[_Pair], progress: Progress | None) -> Iterator[TensorDifference]:
    counted = Counted(sum(source.tensors[name].spec.nbytes for _, a, b, name in pairs for source in (a, b)), progress)
    with ExitStack() as opened:
        readers: dict[int, Reader] = {}
        for component, a, b, name in pairs:
            for source in (a, b):
                if id(source) not in readers:
                    readers[id(source)] = opened.enter_context(closing(Reader(current(), source.files)))
            blocks = _blocks(a, b, name, readers, counted)
            difference = _difference(component, a.tensors[name].spec, b.tensors[name].spec, blocks)
            if difference is not None:
                yield difference


def _blocks(
    a: Source, b: Source, name: str, readers: Mapping[int, Reader], counted: Counted
) -> Iterator[tuple[memoryview, memoryview]]:
    """Blocks of the same elements of both."""
    streams = (tensor_blocks(source.tensors[name], readers[id(source)], _ELEMENTS) for source in (a, b))
    for mine, theirs in zip(*streams, strict=True):
        yield mine, theirs
        counted.add(len(mine) + len(theirs))


def _same_digest(first: Parts, second: Parts, key: tuple[str, str], spec: TensorSpec) -> bool | None:
    """Whether the manifests' digests of a tensor or its pieces are equal; ``None`` where they cannot be compared."""
    found: list[dict[object, int]] = []
    for parts in (first, second):
        fitting = [record for record in parts.recorded.get(key, ()) if record.spec == spec]
        if len(fitting) != 1:
            return None  # shards and export may have different values: which of them is meant, only reading tells
        [record] = fitting
        whole = record.chunks[0].crc32c if record.crc32c is None and len(record.chunks) == 1 else record.crc32c
        found.append({chunk.box: chunk.crc32c for chunk in record.chunks} if whole is None else {None: whole})
    mine, theirs = found
    return mine == theirs if mine and mine.keys() == theirs.keys() else None


def _difference(
    component: str, a: TensorSpec, b: TensorSpec, blocks: Iterable[tuple[memoryview, memoryview]]
) -> TensorDifference | None:
    """How two tensors differ, of which blocks of the same elements are given; ``None`` where they are equal."""
    import torch

    elements, norm, difference, largest = 0, 0.0, 0.0, 0.0
    for mine, theirs in blocks:
        x = _values(mine, a)
        norm += float(x.abs().square().sum())
        if a.dtype == b.dtype and mine == theirs:
            continue
        y = _values(theirs, b)
        same = x.eq(y) | (x.isnan() & y.isnan())
        if a.dtype == b.dtype:
            bits = [torch.frombuffer(data, dtype=torch.uint8).view(-1, a.itemsize) for data in (mine, theirs)]
            elements += int(bits[0].ne(bits[1]).any(dim=1).sum())
        else:
            elements += int((~same).sum())
        apart = (x - y).abs()
        apart[same] = 0.0
        apart.nan_to_num_(nan=math.inf, posinf=math.inf)
        difference += float(apart.square().sum())
        largest = max(largest, float(apart.max()))
    if not elements and a.dtype == b.dtype:
        return None
    relative = 0.0
    if difference:
        finite = math.isfinite(difference) and 0 < norm < math.inf
        relative = math.sqrt(difference / norm) if finite else math.inf
    return TensorDifference(component, a, b, relative, largest, elements)


def _values(data: memoryview, spec: TensorSpec) -> torch.Tensor:
    import torch

    from shardwise.dtypes import torch_dtype

    raw = torch.frombuffer(data, dtype=torch_dtype(spec.dtype))
    return raw.to(torch.complex128 if raw.is_complex() else torch.float64)


def _config_differences(first: Parts, second: Parts) -> Iterator[ConfigDifference]:
    whole = first.is_checkpoint and second.is_checkpoint
    for file in sorted(first.configs.keys() | second.configs.keys()):
        a, b = first.configs.get(file), second.configs.get(file)
        if a is not None and b is not None:
            mine, theirs = _flat(_content(a)), _flat(_content(b))
            for key in sorted(mine.keys() | theirs.keys()):
                if mine.get(key) != theirs.get(key) or (key in mine) != (key in theirs):
                    yield ConfigDifference(file, key, mine.get(key), theirs.get(key))
        elif whole:
            yield ConfigDifference(file, "", None if a is None else "present", None if b is None else "present")


def _content(path: Path) -> object:
    data = read_whole(path, MAX_JSON_BYTES, FormatError)
    return parse_json(data, path) if path.suffix == ".json" else parse_yaml(data, path)


def _flat(value: object, key: str = "") -> dict[str, object]:
    """Leaves of nested objects by their keys joined with dots; a list is a leaf."""
    if not isinstance(value, Mapping) or not value:
        return {key: value}
    found: dict[str, object] = {}
    for name, each in value.items():
        found |= _flat(each, f"{key}.{name}" if key else str(name))
    return found


# --- what of a path is compared --------------------------------------------------------------------------------------


_COMPONENTS = (*COMPONENTS, "model_ema")
_ADAPTER = "adapter_model.safetensors"
_CONFIGS = ("config.json", "generation_config.json", "adapter_config.json", "model_index.json")


@dataclass(frozen=True, slots=True)
class Parts:
    """Which tensors a path given by a user has: one model, or the components of a checkpoint or pipeline.

    Attributes:
        path: What the path means: of a root, its newest checkpoint.
        is_checkpoint: It is a whole checkpoint of shardwise's form; else a model, or one component.
        places: Component -> what to open.
        recorded: (component, name) -> the records of the manifests; empty where there are none.
        configs: Name -> configuration file.
    """

    path: Path
    is_checkpoint: bool
    places: Mapping[str, Path] = field(default_factory=dict)
    recorded: Mapping[tuple[str, str], tuple[TensorRecord, ...]] = field(default_factory=dict)
    configs: Mapping[str, Path] = field(default_factory=dict)


def find_parts(path: str | os.PathLike[str]) -> Parts:
    """Find what is to be opened for a path."""
    targets = find_targets(path)
    first = targets[0]
    place = first.directory / first.under
    if len(targets) > 1:  # components that stand alone, side by side
        place = first.directory.parent
    whole = not first.under and any(is_directory(place / name) for name in _COMPONENTS)
    recorded: dict[tuple[str, str], tuple[TensorRecord, ...]] = {}
    for target in with_nested(targets):
        manifest = load_manifest(target.directory)
        for tensor in () if manifest is None else manifest.tensors:
            key = (tensor.component, tensor.spec.name)
            recorded[key] = (*recorded.get(key, ()), tensor)
    places = _places(place, whole)
    lost = sorted({component for component, _ in recorded} & set(_COMPONENTS) - places.keys()) if whole else ()
    if lost:
        raise IntegrityError(
            f"the checkpoint is damaged: its manifest lists files of {lost[0]}, and that directory is absent",
            path=place / lost[0],
            hint="Restore the checkpoint from a copy.",
        )
    configs = {CONFIG_NAME: place / CONFIG_NAME} if is_file(place / CONFIG_NAME) else {}
    for component, where in places.items():
        below = "" if component == "model" else f"{component}/"
        configs |= {f"{below}{name}": found for name, found in _configs(where).items()}
    return Parts(place, whole, places, recorded, configs)


def _places(place: Path, whole: bool) -> dict[str, Path]:
    if is_file(place):
        return {"model": place}
    if whole:
        return {name: _openable(place / name) for name in _COMPONENTS if is_directory(place / name)}
    if is_file(place / "model_index.json"):
        return {name: place / name for name in names_in(place) if holds_model(place / name)}
    return {place.name if place.name in _COMPONENTS else "model": _openable(place)}


def _openable(directory: Path) -> Path:
    """The directory, or an adapter's file in it, which no directory is opened for."""
    return directory / _ADAPTER if is_file(directory / _ADAPTER) and not holds_model(directory) else directory


def _configs(where: Path) -> dict[str, Path]:
    directory = where.parent if is_file(where) else where
    found: dict[str, Path] = {}
    for name in _CONFIGS:
        for place in (directory, directory / "consolidated", directory / METADATA_DIR):
            if name not in found and is_file(place / name):
                found[name] = place / name
    return found
