"""Which part of a DCP directory is the model: one state dict of several, recognised by structure and never guessed.

DCP flattens nested state dicts to names (``model.layers.0.weight``) and records the path of each
(``("model", "layers.0.weight")``). Where a configuration names the model's class, the place is the one below which that
class's own names lie; otherwise the one mapping that is called as a model's is called.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from shardwise.errors import MisuseError, NameCollisionError, some
from shardwise.stateful_wrappers.wrapping import plain_name

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import Metadata

    from shardwise.upstream.torch_distributed import StorageInfo

#: Names of the model's mapping in state dicts such as `{"model": ..., "optimizer": ...}`.
MODEL_KEYS = ("model", "model_state_dict", "module", "state_dict")
#: Names of mappings that are not the model.
_OTHER_KEYS = frozenset(
    {
        *("optim", "optimizer", "optimizers", "optimizer_state_dict", "optim_state_dict", "param_groups"),
        *("scheduler", "lr_scheduler", "lr_schedulers", "schedulers", "scheduler_state_dict", "dataloader"),
        *("train_state", "trainer", "rng", "rng_state", "scaler", "grad_scaler"),
    }
)
#: Lightning numbers its optimizers.
_NUMBERED = re.compile(r"optim(izer)?_\d+")
_OPTIMIZER_KEYS = frozenset({"state", "param_groups"})
_DATA_PARALLEL = "module."
_SHOWN = 12

#: The place of an item in the state dict that DCP flattened.
DcpPath = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class DcpModel:
    """The model in a DCP directory."""

    names: Mapping[str, str]  #: The model's name of each tensor -> DCP's.
    prefix: str  #: What DCP's names of the model have in front.
    left: tuple[str, ...] = ()  #: DCP's names of what is no tensor and lies in the same place, such as extra state.
    #: The same of tensors elsewhere that are no optimizer's and of nothing else with a name that tells.
    apart: tuple[str, ...] = ()


def find_model(
    metadata: Metadata, directory: Path, expected: Collection[str] = (), prefix: str | None = None
) -> DcpModel:
    """Decide which tensors are the model; `MisuseError` where there is none, or more than one candidate.

    ``expected`` are the names that the model's class has, where it is known; ``prefix`` is what the names of the model
    have in front, where the caller knows better ("" for all of them).
    """
    tensors, paths = tensor_names(metadata), item_paths(metadata)
    if prefix is not None:
        place = _Place(prefix.rstrip("."))
    else:
        tops = {path[0] for path in paths.values()}
        alone = "param_groups" in tops or (tops <= _OPTIMIZER_KEYS and bool(tensors))
        if alone and not tops & set(MODEL_KEYS):
            raise MisuseError(
                "this is an optimizer's state and no model",
                path=directory,
                hint="Name the checkpoint, or its model directory.",
            )
        places = places_of(tensors, expected)
        if len(places) > 1:
            raise _ambiguous(paths, directory, f"the model's class fits what is below each of {_quoted(places)}")
        place = _Place(places[0], frozenset(expected)) if places else _by_structure(paths, tensors, directory)
    own = {name for name in paths if place.has(name, paths)}
    if prefix is not None:
        own |= {name for name in tensors if name.startswith(place.front)}
    if own.isdisjoint(tensors):
        raise _ambiguous(paths, directory, f"no tensor's name begins with {place.front!r}")
    found = _below(place, own, tensors, paths, directory)
    apart = [n for n in tensors if n not in own and not any(map(is_no_model, (*n.split("."), *paths[n])))]
    return replace(found, apart=tuple(apart))


def model_below(metadata: Metadata, directory: Path, head: str, expected: Collection[str]) -> DcpModel:
    """The tensors below ``head``, without an optimizer's state and other things in the same place.

    ``expected`` are DCP's names of what is the model's, whatever they look like.
    """
    paths, place = item_paths(metadata), _Place(head)
    own = {name for name in paths if name in expected or place.has(name, paths)}
    return _below(place, own, tensor_names(metadata), paths, directory)


def _below(
    place: _Place, own: Collection[str], tensors: Collection[str], paths: Iterable[str], directory: Path
) -> DcpModel:
    """The model whose items these are."""
    found = {name.removeprefix(place.front): name for name in tensors if name in own}
    known = set(tensors)
    left = tuple(name for name in paths if name in own and name not in known)
    return DcpModel(unwrapped_names(found, directory), place.front, left)


def tensor_names(metadata: Metadata) -> list[str]:
    """DCP's names of the items that are tensors."""
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    return [name for name, item in metadata.state_dict_metadata.items() if isinstance(item, TensorStorageMetadata)]


@dataclass(frozen=True, slots=True)
class _Place:
    """Where the model is: the prefix of its names, and names that are the model's in any case."""

    head: str
    expected: frozenset[str] = frozenset()

    @property
    def front(self) -> str:
        return f"{self.head}." if self.head else ""

    def has(self, name: str, paths: Mapping[str, DcpPath]) -> bool:
        """Whether a name is the model's, and not that of an optimizer's state in the same place."""
        if not name.startswith(self.front):
            return False
        rest = name.removeprefix(self.front)
        if plain_name(rest) in self.expected:
            return True
        path = paths[name]
        mappings = {str(part) for part in path[:-1]} - set(self.head.split("."))
        return not any(map(is_no_model, (rest.split(".")[0], *mappings)))


def is_no_model(key: object) -> bool:
    """Whether a mapping of this name is not the model."""
    return key in _OTHER_KEYS or (isinstance(key, str) and _NUMBERED.fullmatch(key) is not None)


def mapping_beside(name: str, path: DcpPath) -> str | None:
    """The mapping beside the model that an item belongs to, by its name; ``None`` of the model's, or of one unknown."""
    first = name.split(".", maxsplit=1)[0]
    flat = (first,) if len(path) == 1 and first.startswith("optim") else ()  # some tools use whole paths as names
    found = next((part for part in (*path[:-1], *flat) if part in MODEL_KEYS or is_no_model(part)), None)
    return None if found is None or found in MODEL_KEYS else str(found)


def item_paths(metadata: Metadata) -> dict[str, DcpPath]:
    """The path of each item; a name without a record belongs to a state dict that is not nested."""
    known = metadata.planner_data if isinstance(metadata.planner_data, dict) else {}
    found: dict[str, DcpPath] = {}
    for name in metadata.state_dict_metadata:
        path: object = known.get(name)
        parts = path if isinstance(path, tuple) else ()
        found[name] = tuple(part for part in parts if isinstance(part, (str, int))) or (name,)
    return found


def refuse_transformed(info: StorageInfo, path: Path, name: str) -> None:
    """Refuse an item whose bytes in the file an extension of DCP's writer has changed, such as compressed ones."""
    if info.transform_descriptors:
        raise MisuseError(
            f"DCP wrote this item through {', '.join(info.transform_descriptors)}, which is not undone here",
            path=path,
            tensor=name,
            hint="Save without extensions of DCP's file system writer, or convert the checkpoint with DCP.",
        )


def places_of(tensors: Sequence[str], expected: Collection[str]) -> list[str]:
    """The places below which all names of a model are; none where it has no names."""
    if not expected:
        return []
    probe = max(expected, key=lambda name: (name.count("."), len(name), name))
    plain = {plain_name(name): name for name in tensors}
    heads = [name.removesuffix(probe).rstrip(".") for name in plain if name == probe or name.endswith(f".{probe}")]
    found = []
    for head in heads:
        front = f"{head}." if head else ""
        if not any(map(is_no_model, head.split("."))) and all(front + name in plain for name in expected):
            found.append(head)
    # DataParallel's part of a name is the model's own way of naming, not a place: it is taken off later.
    return found


def _by_structure(paths: Mapping[str, DcpPath], tensors: Sequence[str], directory: Path) -> _Place:
    """The place of the one mapping with a model's name."""
    at: DcpPath = ()
    while True:
        below = {name: path for name, path in paths.items() if path[: len(at)] == at and len(path) > len(at)}
        leaves = [name for name in tensors if name in below and len(below[name]) == len(at) + 1]
        keys = list(dict.fromkeys(path[len(at)] for path in below.values() if len(path) > len(at) + 1))
        models = [key for key in keys if key in MODEL_KEYS]
        rest = [key for key in keys if key not in MODEL_KEYS and not is_no_model(key)]
        if len(models) == 1 and not rest:
            at = (*at, models[0])
        elif leaves and not models and not rest:
            return _flat(paths, leaves, at, directory)
        elif not leaves and not models and len(rest) == 1 and isinstance(rest[0], str):
            at = (*at, rest[0])
        else:
            raise _ambiguous(paths, directory, "several of its parts may be it" if keys or leaves else "it is empty")


def _flat(paths: Mapping[str, DcpPath], leaves: Sequence[str], at: DcpPath, directory: Path) -> _Place:
    """The place of tensors that are in one mapping; some tools use whole paths as names."""
    head = ".".join(map(str, at))
    tops = {str(paths[name][-1]).split(".")[0] for name in leaves}
    others = set(filter(is_no_model, tops))
    models = tops & set(MODEL_KEYS)
    if len(models) == 1 and others and tops == others | models:
        return _Place(".".join([*([head] if head else []), *models]))
    if others:
        raise _ambiguous(paths, directory, f"tensors of {_quoted(sorted(tops))} stand in one state dict")
    return _Place(head)


def unwrapped_names(found: Mapping[str, str], directory: Path) -> dict[str, str]:
    """Name -> the file's name of the tensor, without the parts that torch's wrappers add."""
    strip = all(plain_name(name).startswith(_DATA_PARALLEL) for name in found)
    names: dict[str, str] = {}
    for name, dcp in found.items():
        plain = plain_name(name)
        plain = plain.removeprefix(_DATA_PARALLEL) if strip else plain
        if names.setdefault(plain, dcp) != dcp:
            raise NameCollisionError(
                f"{names[plain]} and {dcp} are both this tensor's name without what wrappers add",
                path=directory,
                tensor=plain,
                hint="Name the one that is meant with --prefix.",
            )
    return names


def _ambiguous(paths: Mapping[str, DcpPath], directory: Path, why: str) -> MisuseError:
    tops = list(dict.fromkeys(str(path[0]) for path in paths.values()))
    return MisuseError(
        f"which part of the checkpoint is the model is not clear: {why}. At its top it has {_quoted(tops)}",
        path=directory,
        hint="Say what the names of the model's tensors begin with: --prefix model (prefix='model'), or --prefix '' "
        "(prefix='') where all tensors are the model's.",
    )


def _quoted(names: Iterable[object]) -> str:
    return some((repr(str(name)) for name in names), _SHOWN)
