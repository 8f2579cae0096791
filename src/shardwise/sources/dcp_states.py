"""What a DCP directory holds beside a model: optimizers, in any of torch's layouts, schedulers, and other values.

Source: ``Optimizer.state_dict`` (parameters by number), ``torch.distributed.checkpoint.state_dict`` (parameters by
fully qualified name; with ``flatten_optimizer_state_dict`` one key for each parameter and option), and how
``torch.distributed.checkpoint`` flattens nested state dicts: before torch 2.4 a list or dictionary without tensors was
one value. An optimizer is known by its ``param_groups``; what it is called, and below what, does not matter.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NoReturn, cast

from shardwise.errors import CheckpointNotFoundError, MisuseError, StateFormatError
from shardwise.sources.dcp_model import DcpPath, find_model, model_below
from shardwise.sources.dcp_values import DcpValues, nested
from shardwise.sources.state_files import has_state, read_state
from shardwise.stateful_wrappers.optimizer import OptimizerRecord
from shardwise.upstream.torch_modules import STEP_COUNT

_SCHEDULER_NAME = re.compile(r"sched", re.IGNORECASE)
#: State of torch's schedulers: all have the first entry, and each has one of the others.
_SCHEDULER_KEYS = ("last_epoch", frozenset({STEP_COUNT, "base_lrs", "num_bad_epochs"}))


def state_at(values: DcpValues, place: DcpPath) -> object:
    """The value below a place of the state dict, as before DCP flattened it; empty dictionaries are lost."""
    names = [name for name, path in values.paths.items() if path[: len(place)] == place]
    read = values.values(names)
    return nested({values.paths[name][len(place) :]: read[name] for name in names})


def place_called(values: DcpValues, name: str) -> DcpPath:
    """The place of the entry ``name``: its path, joined by dots; `CheckpointNotFoundError` lists those that exist."""
    for path in values.paths.values():
        for length in range(1, len(path) + 1):
            if ".".join(map(str, path[:length])) == name:
                return path[:length]
    raise CheckpointNotFoundError(
        f"the checkpoint has no extra state {name!r}",
        path=values.directory,
        hint=f"It has {', '.join(components(values)) or 'nothing beside a model'}: leave it out of extra_state, or "
        "choose a checkpoint that has it.",
    )


def scheduler_places(values: DcpValues) -> list[DcpPath]:
    """The places of schedulers: entries of that name, or with the state of torch's schedulers. Reads no item."""
    children: dict[DcpPath, set[str]] = {}
    for path in values.paths.values():
        for length in range(len(path)):
            children.setdefault(path[:length], set()).add(str(path[length]))
    torchs = [
        place
        for place, keys in children.items()
        if _SCHEDULER_KEYS[0] in keys and not keys.isdisjoint(_SCHEDULER_KEYS[1])
    ]
    called = [place for place in torchs if any(_SCHEDULER_NAME.search(str(part)) for part in place)]
    found = _outermost(called or torchs)
    if found:
        return found
    # Another's class, or torch's as one value.
    named = dict.fromkeys(  # in the order of the file: schedulers of several lists are told apart by it
        path[: number + 1]
        for path in values.paths.values()
        for number, part in enumerate(path)
        if isinstance(part, str) and _SCHEDULER_NAME.search(part)
    )
    own = {name for names in optimizer_places(values).values() for name in names} | values.tensors
    others = [path for name, path in values.paths.items() if name not in own]
    heads = [place for place in named if any(path[: len(place)] == place for path in others)]
    lists = {place: {key for key in children.get(place, ()) if key.isdecimal()} for place in heads}
    return [
        inner
        for place in _outermost(heads)
        for inner in ([(*place, int(key)) for key in sorted(lists[place], key=int)] or [place])
    ]


def _outermost(places: list[DcpPath]) -> list[DcpPath]:
    every = set(places)
    return [p for p in places if not any(p[:length] in every for length in range(len(p)))]


def components(values: DcpValues, model_place: str | None = None) -> list[str]:
    """The entries beside a model: ``optimizer``, ``scheduler``, and the places of all others. Reads no item.

    ``model_place`` is what DCP's names of the model have in front, where that is known.
    """
    optimizers = optimizer_places(values)
    schedulers = scheduler_places(values)
    known = {name for names in optimizers.values() for name in names}
    try:
        if model_place is None:
            model = find_model(values.metadata, values.directory)
        else:
            model = model_below(values.metadata, values.directory, model_place, ())
        known |= {*model.names.values()}
    except MisuseError:
        pass  # there is none, or the caller has to say which part it is
    paths = list(values.paths.values())
    common = _common(paths)
    rest = [
        ".".join(map(str, path[: common + 1]))
        for name, path in values.paths.items()
        if name not in known and not any(path[: len(place)] == place for place in schedulers)
    ]
    return ["optimizer"] * bool(optimizers) + ["scheduler"] * bool(schedulers) + list(dict.fromkeys(rest))


def _common(paths: list[DcpPath]) -> int:
    """The number of leading parts that all paths share, less than the length of any."""
    shortest = min((len(path) - 1 for path in paths), default=0)
    length = 0
    while length < shortest and len({path[length] for path in paths}) == 1:
        length += 1
    return length


_RECORD = "optimizer"
#: Files of such a directory that hold no sharded tensors.
RECORD_TENSORS = frozenset({"optimizer.safetensors", "scheduler.safetensors"})


def has_record(directory: Path) -> bool:
    """Whether a directory is one of ours with an optimizer."""
    return has_state(directory / _RECORD)


def read_record(directory: Path) -> dict[str, object]:
    """DCP's name -> value, of all that is not a tensor of the optimizer's state; nothing where there is no record.

    Both of torch's layouts are there: groups by number with lists of names, as ``get_optimizer_state_dict`` gives them,
    and one entry for each parameter and option, as with ``flatten_optimizer_state_dict``. `StateFormatError` where the
    record is damaged.
    """
    if not has_record(directory):
        return {}
    try:
        record = OptimizerRecord.from_state(read_state(directory / _RECORD))
    except StateFormatError as error:
        error.path = error.path or str(directory / f"{_RECORD}.json")
        raise
    found: dict[str, object] = {}
    for number, group in enumerate(record.groups):
        for key, value in group.options.items():
            found[f"param_groups.{number}.{key}"] = value
            found |= {f"param_groups.{param}.{key}": value for param in group.params}
        found[f"param_groups.{number}.params"] = list(group.params)
    for param, values in record.values.items():
        found |= {f"state.{param}.{key}": value for key, value in values.items()}
    return found


# --- optimizers ------------------------------------------------------------------------------------------------------


_FLAT = re.compile(r"(?:(?P<head>.+?)\.)?(?P<kind>state|param_groups)\.(?P<rest>.+)")
_KINDS = ("state", "param_groups")
_OPTIMIZER_NAME = re.compile(r"optim(izer)?s?(_state(_dict)?)?", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class DcpGroup:
    """A parameter group: its options, and its parameters' names, or their numbers as text."""

    options: Mapping[str, object]
    params: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class DcpOptimizer:
    """One optimizer in a DCP directory."""

    place: str  #: What DCP's names of it have in front, without the last dot; empty where nothing.
    numbered: bool  #: Whether its parameters are known by number alone.
    groups: tuple[DcpGroup, ...]  #: In their order.
    tensors: Mapping[str, Mapping[str, str]]  #: Parameter -> state key -> DCP's name of the tensor.
    values: Mapping[str, Mapping[str, object]]  #: Parameter -> state key -> what is no tensor.
    listed: bool = False  #: Whether it is an entry of a list.

    def renamed(self, names: Mapping[str, str]) -> DcpOptimizer:
        """The same with other names of its parameters: old name, or number as text -> new, of each."""
        return replace(
            self,
            groups=tuple(replace(g, params=tuple(names[param] for param in g.params)) for g in self.groups),
            tensors={names[param]: keys for param, keys in self.tensors.items()},
            values={names[param]: keys for param, keys in self.values.items()},
        )

    def to_state(self) -> dict[str, object]:
        """As plain containers, for another rank. ``dataclasses.asdict`` would copy all values, and spoil a Counter."""
        own: dict[str, object] = {each.name: getattr(self, each.name) for each in fields(self)}
        return own | {"groups": [{"options": group.options, "params": group.params} for group in self.groups]}

    @staticmethod
    def from_state(state: object) -> DcpOptimizer:
        """The inverse of `to_state`."""
        own = cast("dict[str, Any]", state)
        return DcpOptimizer(**{**own, "groups": tuple(DcpGroup(**group) for group in own["groups"])})


@dataclass(frozen=True, slots=True)
class _Item:
    """An item of an optimizer: its name in DCP, and where it is below ``state`` or ``param_groups``."""

    name: str
    rest: DcpPath


@dataclass(slots=True)
class _Found:
    """The entries of one optimizer."""

    path: DcpPath
    flat: set[bool] = field(default_factory=set)
    items: dict[str, list[_Item]] = field(default_factory=lambda: {kind: [] for kind in _KINDS})
    whole: str | None = None

    @property
    def place(self) -> str:
        return ".".join(map(str, self.path))


def optimizer_places(values: DcpValues) -> dict[str, frozenset[str]]:
    """Where there are optimizers, and DCP's names of all that is theirs. Reads no item."""
    places = {}
    for found in _find(values):
        names = [item.name for items in found.items.values() for item in items]
        places[found.place] = frozenset([*names, *([found.whole] if found.whole is not None else [])])
    return places


def read_optimizers(values: DcpValues) -> list[DcpOptimizer]:
    """Every optimizer in a DCP directory, its tensors unread. Local.

    `MisuseError` or `StateFormatError` where one is kept in a way that is not understood, or is no optimizer's state.
    """
    read = []
    for found in _find(values):
        value = None if found.whole is None else values.value(found.whole)
        # An entry of this name may be anything, such as the optimizer's name in a configuration.
        if found.whole is None or (isinstance(value, dict) and "param_groups" in value):
            read.append(_Reading(values, found).optimizer())
    return read


def _find(values: DcpValues) -> list[_Found]:
    found: dict[DcpPath, _Found] = {}
    for name, path in values.paths.items():
        at = _locate(path)
        if at is None:
            if name not in values.tensors and _OPTIMIZER_NAME.fullmatch(str(path[-1])):
                found.setdefault(path, _Found(path)).whole = name
            continue
        head, kind, rest, flat = at
        optimizer = found.setdefault(head, _Found(head))
        optimizer.items[kind].append(_Item(name, rest))
        optimizer.flat.add(flat)
    # A model may have a module that is called `state`: without groups it is no optimizer's.
    return [each for each in found.values() if each.items["param_groups"] or each.whole is not None]


def _locate(path: DcpPath) -> tuple[DcpPath, str, DcpPath, bool] | None:
    """Which optimizer an item belongs to, its kind, its place below, and whether names were joined to one text."""
    for number, part in enumerate(path):
        if part in _KINDS and (part == "param_groups" or number + 1 < len(path)):
            return path[:number], str(part), path[number + 1 :], False
        match = _FLAT.fullmatch(part) if isinstance(part, str) else None
        # A longer prefix is possible only where the nesting of the state dict was not recorded.
        if match is not None and (match["head"] is None or len(path) == 1):
            head = path[:number] if match["head"] is None else (match["head"],)
            return head, match["kind"], (match["rest"], *path[number + 1 :]), True
    return None


class _Reading:
    """Reads one optimizer."""

    def __init__(self, values: DcpValues, found: _Found) -> None:
        self._values, self._found = values, found
        small = [i.name for items in found.items.values() for i in items if i.name not in values.tensors]
        self._read = values.values(small)
        #: By parameter and state key: DCP's names of tensors, and what is no tensor.
        self._tensors: dict[str, dict[str, str]] = {}
        self._others: dict[str, dict[str, object]] = {}

    def optimizer(self) -> DcpOptimizer:
        found = self._found
        if found.whole is not None:
            if found.flat:
                self._refuse(found.whole, "stands beside what is below it")
            return self._of_value(self._values.value(found.whole), found.whole)
        if len(found.flat) > 1:
            self._refuse(found.items["param_groups"][0].name, "is nested, and others beside it are flattened")
        if found.flat == {True}:
            return self._flattened()
        groups = self._groups(self._nested(found.items["param_groups"], tensors=True))
        self._take_states()
        return self._made(*groups)

    def _made(self, groups: Sequence[DcpGroup], numbered: bool, names: Mapping[str, str]) -> DcpOptimizer:
        """The optimizer, its states under the names that the file gives to numbers."""
        tensors = {names.get(param, param): keys for param, keys in self._tensors.items()}
        values = {names.get(param, param): keys for param, keys in self._others.items()}
        known = [param for group in groups for param in group.params]
        if len(set(known)) < len(known):
            raise StateFormatError(
                "a parameter is in two groups of this optimizer", path=self._values.directory, tensor=self._found.place
            )
        astray = sorted({*tensors, *values} - {*known})
        if astray:
            raise StateFormatError(
                f"the optimizer {self._found.place!r} has state of {len(astray)} parameters that are in none of its "
                f"groups: {', '.join(astray[:5])}",
                path=self._values.directory,
                tensor=astray[0],
                hint="Restore without an optimizer, and let it start afresh.",
            )
        path = self._found.path
        listed = bool(path) and isinstance(path[-1], int)
        return DcpOptimizer(self._found.place, numbered, tuple(groups), tensors, values, listed)

    # --- nested -----------------------------------------------------------------------------------------------------

    def _nested(self, items: Sequence[_Item], tensors: bool) -> object:
        """The value that items make up together."""
        found: dict[DcpPath, object] = {}
        for item in items:
            if item.name not in self._read and not tensors:
                self._refuse(item.name, "is a tensor inside a list or dictionary of an optimizer's state")
            found[item.rest] = self._value(item)
        return nested(found)

    def _value(self, item: _Item) -> object:
        return self._read[item.name] if item.name in self._read else self._values.value(item.name)

    def _groups(self, value: object) -> tuple[list[DcpGroup], bool, Mapping[str, str]]:
        """Groups, whether their parameters are numbers, and the names of numbers where the file gives them."""
        if not isinstance(value, (list, tuple)) or not all(isinstance(group, dict) for group in value):
            self._refuse(self._found.items["param_groups"][0].name, "is no list of parameter groups")
        groups: list[DcpGroup] = []
        names: dict[str, str] = {}
        numbered: set[bool] = set()
        for group in value:
            options = dict(group)
            params, given = options.pop("params", []), options.pop("param_names", None)
            if not isinstance(params, (list, tuple)) or not all(type(each) in (int, str) for each in params):
                self._refuse(self._found.items["param_groups"][0].name, "has parameters that are no names or numbers")
            own = tuple(map(str, params))
            if any(type(each) is int for each in params):
                is_named = isinstance(given, (list, tuple)) and len(given) == len(own)
                if is_named:
                    names |= dict(zip(own, map(str, cast("list[object]", given)), strict=True))
                numbered.add(not is_named)
            elif params:
                numbered.add(False)
            groups.append(DcpGroup(options, tuple(names.get(each, each) for each in own)))
        if len(numbered) > 1:
            self._refuse(self._found.items["param_groups"][0].name, "names parameters of some groups and not of others")
        return groups, True in numbered, names

    def _take_states(self) -> None:
        deeper: dict[tuple[str, str], list[_Item]] = {}
        for item in self._found.items["state"]:
            param = str(item.rest[0])
            if len(item.rest) == 1:  # a parameter's state without a tensor, as torch before 2.4 wrote it
                self._tensors.setdefault(param, {})
                self._add_all(self._others.setdefault(param, {}), item)
            elif len(item.rest) > 2:
                deeper.setdefault((param, str(item.rest[1])), []).append(_Item(item.name, item.rest[2:]))
            else:
                self._put(item, param, str(item.rest[1]))
        for (param, key), items in deeper.items():
            self._tensors.setdefault(param, {})
            self._others.setdefault(param, {})[key] = self._nested(items, tensors=False)

    def _put(self, item: _Item, param: str, key: str) -> None:
        tensors, others = self._tensors.setdefault(param, {}), self._others.setdefault(param, {})
        if item.name in self._values.tensors:
            tensors[key] = item.name
        else:
            others[key] = self._read[item.name]

    def _add_all(self, into: dict[str, object], item: _Item) -> None:
        value = self._read.get(item.name)
        if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
            self._refuse(item.name, "is state of the optimizer that belongs to no parameter")
        into.update(value)

    # --- flattened --------------------------------------------------------------------------------------------------

    def _flattened(self) -> DcpOptimizer:
        options: dict[str, dict[str, object]] = {}
        for item in self._found.items["param_groups"]:
            param, option = self._split(item)
            options.setdefault(param, {})[option] = self._value(item)
        alike: dict[tuple[tuple[str, int], ...], list[str]] = {}
        for param, found in options.items():
            # Values that were read from equal bytes are one object.
            alike.setdefault(tuple(sorted((key, id(value)) for key, value in found.items())), []).append(param)
        groups = [DcpGroup(options[params[0]], tuple(params)) for params in alike.values()]
        for item in self._found.items["state"]:
            self._put(item, *self._split(item))
        return self._made(groups, False, {})

    def _split(self, item: _Item) -> tuple[str, str]:
        param, dot, key = str(item.rest[0]).rpartition(".")
        if not dot or len(item.rest) > 1:
            self._refuse(item.name, "is not of the form PARAMETER.KEY")
        return param, key

    # --- one value --------------------------------------------------------------------------------------------------

    def _of_value(self, value: object, name: str) -> DcpOptimizer:
        """An optimizer's whole state dict that has no tensor, as torch before 2.4 wrote it."""
        if not isinstance(value, dict) or not isinstance(value.get("state"), dict) or "param_groups" not in value:
            self._refuse(name, "is called as an optimizer is and is no optimizer's state")
        self._found.items["param_groups"].append(_Item(name, ()))
        groups = self._groups(value["param_groups"])
        for param, state in value["state"].items():
            if not isinstance(state, dict):
                self._refuse(name, "has state that belongs to no parameter")
            self._tensors[str(param)] = {}
            self._others[str(param)] = {str(key): each for key, each in state.items()}
        return self._made(*groups)

    def _refuse(self, name: str, why: str) -> NoReturn:
        raise MisuseError(
            f"the optimizer {self._found.place!r} is kept in a way that is not understood: {name} {why}",
            path=self._values.directory,
            tensor=name,
            hint="Restore without an optimizer, and let it start afresh; or save it by "
            "torch.distributed.checkpoint.state_dict.get_optimizer_state_dict.",
        )
