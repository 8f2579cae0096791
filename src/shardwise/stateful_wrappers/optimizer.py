"""An optimizer's state, keyed by parameter name.

An optimizer numbers its parameters, which means nothing on another topology. Here each state tensor has a name,
``state.<parameter>.<key>``, and is sharded as its parameter is, so that it is saved and resharded as weights are. What
is not a tensor, and the groups' options, go into a JSON state. A parameter that has never had a gradient has no state,
and comes back without.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import nn
from torch.optim import Optimizer

from shardwise.errors import MisuseError, StateFormatError
from shardwise.format.dtypes import dtype_code
from shardwise.plan.fragments import HeldTensor
from shardwise.stateful_wrappers.kinds import kind_of
from shardwise.stateful_wrappers.memory import install, plain_view
from shardwise.stateful_wrappers.names import list_parameters, promised_ties, undeclared_names
from shardwise.stateful_wrappers.tensors import MeshRegister, held_tensors

StateValue = object
Options = dict[str, object]


@dataclass(frozen=True)
class SavedGroup:
    """A parameter group: its options, the names of its parameters, and its optimizer's class.

    Attributes:
        options: Everything but the parameters.
        params: Names of the parameters.
        kind: Name of the optimizer's class; empty where the checkpoint does not say, as older ones do not.
    """

    options: Mapping[str, object]
    params: tuple[str, ...]
    kind: str = ""


@dataclass(frozen=True)
class SavedTensor:
    """What a state tensor was when it was saved: enough to make one to load into."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class OptimizerRecord:
    """Everything about an optimizer but its tensors' values.

    Attributes:
        groups: All groups.
        tensors: Parameter name -> state key -> what the tensor was.
        values: Parameter name -> state key -> a value that is not a tensor.
        aliases: Further name of a shared parameter, unless it is declared -> the name that it has here.
        shapes: Parameter name -> its shape, in the whole; older checkpoints do not say.
        schedulers: The schedulers' classes, in order; likewise.
    """

    groups: tuple[SavedGroup, ...]
    tensors: Mapping[str, Mapping[str, SavedTensor]]
    values: Mapping[str, Mapping[str, StateValue]]
    aliases: Mapping[str, str] = field(default_factory=dict)
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    schedulers: tuple[str, ...] = ()

    def to_state(self) -> dict[str, object]:
        """As plain containers, for `shardwise.format.state_json`."""
        state: dict[str, object] = {
            "version": 1,
            "groups": [{"options": dict(g.options), "params": list(g.params), "kind": g.kind} for g in self.groups],
            "tensors": {
                name: {key: [saved.dtype, list(saved.shape)] for key, saved in found.items()}
                for name, found in self.tensors.items()
            },
            "values": {name: dict(found) for name, found in self.values.items()},
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
            "schedulers": list(self.schedulers),
        }
        return {**state, "aliases": dict(self.aliases)} if self.aliases else state

    @staticmethod
    def from_state(state: object) -> OptimizerRecord:
        """Check and take in what `to_state` gave.

        Raises:
            StateFormatError: It is something else.
        """
        try:
            fields = cast(dict[str, object], state)
            if fields["version"] != 1:
                raise StateFormatError(f"optimizer state of version {fields['version']!r}; this release reads 1")
            groups = tuple(
                SavedGroup(dict(g["options"]), tuple(str(p) for p in g["params"]), str(g.get("kind", "")))
                for g in cast(list[dict[str, dict[str, object]]], fields["groups"])
            )
            tensors = {
                name: {key: SavedTensor(str(row[0]), tuple(int(n) for n in row[1])) for key, row in found.items()}
                for name, found in cast(dict[str, dict[str, tuple[str, list[int]]]], fields["tensors"]).items()
            }
            values = cast(dict[str, dict[str, object]], fields["values"])
            aliases = {str(k): str(v) for k, v in cast(dict[str, str], fields.get("aliases", {})).items()}
            told = cast(dict[str, list[int]], fields.get("shapes", {}))
            shapes = {name: tuple(int(n) for n in shape) for name, shape in told.items()}
            schedulers = tuple(str(kind) for kind in cast(list[object], fields.get("schedulers", [])))
            held = {name: dict(found) for name, found in values.items()}
            return OptimizerRecord(groups, tensors, held, aliases, shapes, schedulers)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            if isinstance(error, StateFormatError):
                raise
            raise StateFormatError(
                f"this is not an optimizer state ({type(error).__name__}: {error})",
                hint="Restore the file or choose another checkpoint.",
            ) from error

    @staticmethod
    def merge(records: Iterable[OptimizerRecord]) -> OptimizerRecord:
        """Put the records of several ranks together: groups of one class with equal options become one.

        Raises:
            MisuseError: Ranks have different numbers of schedulers.
        """
        groups: list[tuple[SavedGroup, dict[str, None]]] = []
        tensors: dict[str, Mapping[str, SavedTensor]] = {}
        values: dict[str, Mapping[str, StateValue]] = {}
        aliases: dict[str, str] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        schedulers: tuple[str, ...] = ()
        for record in records:
            matched: set[int] = set()
            for group in record.groups:
                index = _same_options(groups, group, matched)
                matched.add(index)
                groups[index][1].update(dict.fromkeys(group.params))
            tensors.update(record.tensors)
            values.update(record.values)
            aliases.update(record.aliases)
            shapes.update(record.shapes)
            if schedulers and record.schedulers and len(schedulers) != len(record.schedulers):
                raise MisuseError(
                    f"one rank has {len(schedulers)} schedulers and another {len(record.schedulers)}",
                    hint="The state of one rank's schedulers is saved for all: pass as many on every rank.",
                )
            schedulers = schedulers or record.schedulers
        merged = tuple(SavedGroup(g.options, tuple(params), g.kind) for g, params in groups)
        return OptimizerRecord(merged, tensors, values, aliases, shapes, schedulers)


def _same_options(groups: list[tuple[SavedGroup, dict[str, None]]], group: SavedGroup, used: set[int]) -> int:
    """Index of the group that ``group`` is a part of; two groups of one record are never folded into one."""
    for index, (known, _) in enumerate(groups):
        if index not in used and known.kind == group.kind and equal(known.options, group.options):
            return index
    groups.append((group, {}))
    return len(groups) - 1


def equal(a: object, b: object) -> bool:
    """Whether two options, or two dictionaries of them, are the same."""
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        return isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


class OptimizerState:
    """The state of one optimizer, or of several (pipeline stages, or one for each kind of parameter).

    Args:
        optimizer: The optimizer or optimizers of this rank.
        model: The module, or this rank's pipeline stages, whose parameters they update.

    Raises:
        MisuseError: An optimizer updates a parameter that the model does not have.
    """

    def __init__(self, optimizer: Optimizer | Sequence[Optimizer], model: nn.Module | Sequence[nn.Module]) -> None:
        self.optimizers = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)
        parts = [model] if isinstance(model, nn.Module) else list(model)
        # As the modules have them: what they give out for their state may be copies.
        named = list_parameters(parts)
        self._names = {id(each.tensor): each.name for each in named}
        self.aliases = undeclared_names(named, parts)
        # Under which other names a parameter's state may be saved; what a checkpoint says is added by `plan_restore`.
        self.saved_under = promised_ties(parts)

    def _name(self, param: torch.Tensor) -> str:
        name = self._names.get(id(param))
        if name is None:
            raise MisuseError(
                f"the optimizer updates a parameter of shape {list(param.shape)} that the model does not have",
                hint="Pass the model (or all of this rank's stages) that the optimizer was built for, after "
                "fully_shard and before anything replaces its parameters.",
            )
        return name

    def groups(self) -> Iterable[tuple[Optimizer, Options]]:
        """Each optimizer's groups."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                yield optimizer, group

    def names(self, group: Options) -> tuple[str, ...]:
        """Names of a group's parameters.

        Raises:
            MisuseError: The model does not have one of them.
        """
        return tuple(self._name(param) for param in cast(list[torch.Tensor], group["params"]))

    def record(self, schedulers: Sequence[str] = ()) -> OptimizerRecord:
        """Groups, and what each parameter's state consists of.

        Args:
            schedulers: The classes of the schedulers that are saved along.
        """
        groups, tensors, values = [], {}, {}
        shapes: dict[str, tuple[int, ...]] = {}
        for optimizer, group in self.groups():
            params = cast(list[torch.Tensor], group["params"])
            names = self.names(group)
            # names of parameters are an option of newer optimizers; ours say the same and survive resharding
            options = {k: v for k, v in group.items() if k not in ("params", "param_names")}
            groups.append(SavedGroup(options, names, kind_of(optimizer)))
            for param, name in zip(params, names, strict=True):
                state = optimizer.state.get(param)
                if state is None:
                    continue
                shapes[name] = tuple(param.shape)
                tensors[name] = {k: describe(v) for k, v in state.items() if isinstance(v, torch.Tensor)}
                values[name] = {k: v for k, v in state.items() if not isinstance(v, torch.Tensor)}
        return OptimizerRecord(tuple(groups), tensors, values, self.aliases, shapes, tuple(schedulers))

    def held(self, meshes: MeshRegister | None = None) -> list[HeldTensor]:
        """What this rank holds of the state tensors, as views of the optimizers' memory."""
        register = meshes or MeshRegister()
        return held_tensors(self.state_dict().items(), register)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """State tensors by name, sharing the optimizers' memory."""
        found: dict[str, torch.Tensor] = {}
        for optimizer, group in self.groups():
            for param in cast(list[torch.Tensor], group["params"]):
                for key, value in optimizer.state.get(param, {}).items():
                    if isinstance(value, torch.Tensor):
                        name = f"state.{self._name(param)}.{key}"
                        found[name] = plain_view(name, value)
        return found

    def parameters(self) -> list[str]:
        """Names of the parameters that the optimizers update."""
        return [self._name(param) for _, group in self.groups() for param in cast(list[torch.Tensor], group["params"])]

    def owners(self) -> list[tuple[str, str]]:
        """The name of each state tensor, and its parameter's."""
        return [
            (f"state.{name}.{key}", name)
            for optimizer, group in self.groups()
            for param in cast(list[torch.Tensor], group["params"])
            for name in [self._name(param)]
            for key, value in optimizer.state.get(param, {}).items()
            if isinstance(value, torch.Tensor)
        ]

    def load_state_dict(self, state_dict: Mapping[str, torch.Tensor]) -> None:
        """Copy state tensors in place; those that already share the optimizers' memory are left alone.

        Raises:
            KeyError: A tensor that the optimizers do not have.
        """
        own = self.state_dict()
        with torch.no_grad():
            for name, value in state_dict.items():
                install(own[name], plain_view(name, value))


def describe(tensor: torch.Tensor) -> SavedTensor:
    """What there is to record of a state tensor."""
    return SavedTensor(dtype_code(tensor.dtype), tuple(tensor.shape))
