"""An optimizer's state, keyed by parameter name.

An optimizer numbers its parameters, which means nothing on another topology. Here each state tensor has a name,
``state.<parameter>.<key>``, and is sharded as its parameter is, so that it is saved and resharded as weights are. What
is not a tensor, and the groups' options, go into a JSON state. A parameter that has never had a gradient has no state,
and comes back without.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from shardwise.errors import MissingTensorError, MisuseError, StateFormatError
from shardwise.format.dtypes import dtype_code, torch_dtype
from shardwise.plan.fragments import HeldTensor
from shardwise.stateful_wrappers.names import promised_ties, state_tensors, undeclared_names
from shardwise.stateful_wrappers.tensors import MeshRegister, held_tensors

StateValue = object
Options = dict[str, object]


@dataclass(frozen=True)
class SavedGroup:
    """A parameter group: its options, and the names of its parameters."""

    options: Mapping[str, object]
    params: tuple[str, ...]


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
    """

    groups: tuple[SavedGroup, ...]
    tensors: Mapping[str, Mapping[str, SavedTensor]]
    values: Mapping[str, Mapping[str, StateValue]]
    aliases: Mapping[str, str] = field(default_factory=dict)

    def to_state(self) -> dict[str, object]:
        """As plain containers, for `shardwise.format.state_json`."""
        state: dict[str, object] = {
            "version": 1,
            "groups": [{"options": dict(g.options), "params": list(g.params)} for g in self.groups],
            "tensors": {
                name: {key: [saved.dtype, list(saved.shape)] for key, saved in found.items()}
                for name, found in self.tensors.items()
            },
            "values": {name: dict(found) for name, found in self.values.items()},
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
                SavedGroup(dict(g["options"]), tuple(str(p) for p in g["params"]))
                for g in cast(list[dict[str, dict[str, object]]], fields["groups"])
            )
            tensors = {
                name: {key: SavedTensor(str(row[0]), tuple(int(n) for n in row[1])) for key, row in found.items()}
                for name, found in cast(dict[str, dict[str, tuple[str, list[int]]]], fields["tensors"]).items()
            }
            values = cast(dict[str, dict[str, object]], fields["values"])
            aliases = {str(k): str(v) for k, v in cast(dict[str, str], fields.get("aliases", {})).items()}
            return OptimizerRecord(groups, tensors, {name: dict(found) for name, found in values.items()}, aliases)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            if isinstance(error, StateFormatError):
                raise
            raise StateFormatError(
                f"this is not an optimizer state ({type(error).__name__}: {error})",
                hint="Restore the file or choose another checkpoint.",
            ) from error

    @staticmethod
    def merge(records: Iterable[OptimizerRecord]) -> OptimizerRecord:
        """Put the records of several ranks together: groups with equal options become one."""
        groups: list[tuple[Options, dict[str, None]]] = []
        tensors: dict[str, Mapping[str, SavedTensor]] = {}
        values: dict[str, Mapping[str, StateValue]] = {}
        aliases: dict[str, str] = {}
        for record in records:
            matched: set[int] = set()
            for group in record.groups:
                index = _same_options(groups, group.options, matched)
                matched.add(index)
                groups[index][1].update(dict.fromkeys(group.params))
            tensors.update(record.tensors)
            values.update(record.values)
            aliases.update(record.aliases)
        return OptimizerRecord(tuple(SavedGroup(o, tuple(p)) for o, p in groups), tensors, values, aliases)


def _same_options(groups: list[tuple[Options, dict[str, None]]], options: Mapping[str, object], used: set[int]) -> int:
    """Index of the group that ``options`` belong to; two groups of one record are never folded into one."""
    for index, (known, _) in enumerate(groups):
        if index not in used and _equal(known, options):
            return index
    groups.append((dict(options), {}))
    return len(groups) - 1


def _equal(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        return isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(_equal(x, y) for x, y in zip(a, b, strict=True))
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
        named = state_tensors(parts)
        self._names = {id(each.tensor): each.name for each in named}
        self._aliases = undeclared_names(named, parts)
        # Under which other names a parameter's state may be saved; what a checkpoint says is added by `prepare`.
        self._saved_under = promised_ties(parts)

    def _name(self, param: torch.Tensor) -> str:
        name = self._names.get(id(param))
        if name is None:
            raise MisuseError(
                f"the optimizer updates a parameter of shape {list(param.shape)} that the model does not have",
                hint="Pass the model (or all of this rank's stages) that the optimizer was built for, after "
                "fully_shard and before anything replaces its parameters.",
            )
        return name

    def _groups(self) -> Iterable[tuple[Optimizer, Options]]:
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                yield optimizer, group

    def record(self) -> OptimizerRecord:
        """Groups, and what each parameter's state consists of."""
        groups, tensors, values = [], {}, {}
        for optimizer, group in self._groups():
            params = cast(list[torch.Tensor], group["params"])
            names = tuple(self._name(param) for param in params)
            # names of parameters are an option of newer optimizers; ours say the same and survive resharding
            options = {k: v for k, v in group.items() if k not in ("params", "param_names")}
            groups.append(SavedGroup(options, names))
            for param, name in zip(params, names, strict=True):
                state = optimizer.state.get(param)
                if state is None:
                    continue
                tensors[name] = {k: _describe(v) for k, v in state.items() if isinstance(v, torch.Tensor)}
                values[name] = {k: v for k, v in state.items() if not isinstance(v, torch.Tensor)}
        return OptimizerRecord(tuple(groups), tensors, values, self._aliases)

    def held(self, meshes: MeshRegister | None = None) -> list[HeldTensor]:
        """What this rank holds of the state tensors, as views of the optimizers' memory."""
        register = meshes or MeshRegister()
        return held_tensors(self.state_dict().items(), register)

    def held_as_saved(self, names: Collection[str]) -> list[HeldTensor]:
        """As `held`, under the names of a checkpoint.

        A pipeline stage's own copy of a tied tensor takes the state that the single tensor had, where nothing was
        saved under its own name; so does each of two parameters that were one when the checkpoint was saved.

        Args:
            names: What the checkpoint has.
        """
        keys = {key for optimizer in self.optimizers for state in optimizer.state.values() for key in state}
        other = {
            f"state.{name}.{key}": f"state.{tied}.{key}"
            for name, tied in self._saved_under.items()
            for key in sorted(keys)
        }
        return [
            tensor._replace(spec=tensor.spec._replace(name=other[tensor.spec.name]))
            if tensor.spec.name not in names and other.get(tensor.spec.name) in names
            else tensor
            for tensor in self.held()
        ]

    def state_dict(self) -> dict[str, torch.Tensor]:
        """State tensors by name, sharing the optimizers' memory."""
        found: dict[str, torch.Tensor] = {}
        for optimizer, group in self._groups():
            for param in cast(list[torch.Tensor], group["params"]):
                for key, value in optimizer.state.get(param, {}).items():
                    if isinstance(value, torch.Tensor):
                        found[f"state.{self._name(param)}.{key}"] = value.detach()
        return found

    def parameters(self) -> list[str]:
        """Names of the parameters that the optimizers update."""
        return [self._name(param) for _, group in self._groups() for param in cast(list[torch.Tensor], group["params"])]

    def keep_only(self, names: Collection[str], parameters: Collection[str]) -> None:
        """Drop the state of ``parameters`` that is not among ``names``: this rank had none when it was saved."""
        for optimizer, group in self._groups():
            for param in cast(list[torch.Tensor], group["params"]):
                name = self._name(param)
                state = optimizer.state.get(param)
                if name not in parameters or state is None:
                    continue
                kept = [key for key, value in state.items() if f"state.{name}.{key}" in names]
                if not kept:
                    optimizer.state.pop(param)
                for key in [key for key, value in state.items() if isinstance(value, torch.Tensor)]:
                    if key not in kept:
                        del state[key]

    def owners(self) -> list[tuple[str, str]]:
        """The name of each state tensor, and its parameter's."""
        return [
            (f"state.{name}.{key}", name)
            for optimizer, group in self._groups()
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
                local = getattr(own[name], "_local_tensor", own[name])
                given = getattr(value, "_local_tensor", value)
                if local.data_ptr() != given.data_ptr() or local.stride() != given.stride():
                    local.copy_(given)

    def prepare(self, record: OptimizerRecord) -> None:
        """Make the optimizers ready to be loaded: options set, state tensors allocated, no step taken.

        Raises:
            MissingTensorError: A parameter that was in no group of the saved optimizer.
            MisuseError: One group's parameters were saved in groups with different options.
        """
        group_of = {name: index for index, group in enumerate(record.groups) for name in group.params}
        other = self._saved_under = {**record.aliases, **self._saved_under}
        saved_as = {name: name if name in group_of else other.get(name, name) for name in self._names.values()}
        for position, (optimizer, group) in enumerate(self._groups()):
            params = cast(list[torch.Tensor], group["params"])
            saved = self._saved_group(record, group_of, [saved_as[self._name(p)] for p in params], position)
            if saved is not None:
                _set_options(group, saved.options)
            for param in params:
                self._allocate(optimizer, group, param, record, saved_as[self._name(param)])

    @staticmethod
    def _saved_group(
        record: OptimizerRecord, group_of: Mapping[str, int], names: Sequence[str], position: int
    ) -> SavedGroup | None:
        absent = [name for name in names if name not in group_of]
        if absent:
            raise MissingTensorError(
                f"the saved optimizer did not update {len(absent)} of these parameters: {', '.join(absent[:5])}",
                tensor=absent[0],
                hint="Build the optimizer over the same parameters as when the checkpoint was saved.",
            )
        chosen = sorted({group_of[name] for name in names})
        if not chosen:
            return record.groups[position] if position < len(record.groups) else None
        first = record.groups[chosen[0]]
        for other in chosen[1:]:
            if not _equal(first.options, record.groups[other].options):
                raise MisuseError(
                    f"{names[0]} and a parameter of the same group were saved in groups with different options",
                    tensor=names[0],
                    hint="Build the optimizer with the same parameter groups as when the checkpoint was saved.",
                )
        return first

    @staticmethod
    def _allocate(
        optimizer: Optimizer, group: Options, param: torch.Tensor, record: OptimizerRecord, name: str
    ) -> None:
        if name not in record.tensors:
            optimizer.state.pop(param, None)
            return
        state = optimizer.state[param]
        for key in [k for k in state if k not in record.tensors[name] and k not in record.values.get(name, {})]:
            del state[key]
        for key, saved in record.tensors[name].items():
            have = state.get(key)
            if not isinstance(have, torch.Tensor) or _describe(have) != saved:
                state[key] = _empty_state(param, saved, group)
        state.update(record.values.get(name, {}))


def _describe(tensor: torch.Tensor) -> SavedTensor:
    return SavedTensor(dtype_code(tensor.dtype), tuple(tensor.shape))


def _set_options(group: Options, options: Mapping[str, object]) -> None:
    for key, value in options.items():
        have = group.get(key)
        if isinstance(have, torch.Tensor) and isinstance(value, torch.Tensor):
            # A compiled step holds on to a tensor learning rate: keep the object, replace the value.
            have.copy_(value)
        else:
            group[key] = value


def _empty_state(param: torch.Tensor, saved: SavedTensor, group: Options) -> torch.Tensor:
    dtype = torch_dtype(saved.dtype)
    if saved.shape == tuple(param.shape) and saved.shape != ():
        return torch.zeros_like(param.detach(), dtype=dtype, requires_grad=False)
    on_device = bool(group.get("capturable")) or bool(group.get("fused")) or saved.shape != ()
    local = param.to_local() if isinstance(param, DTensor) else param
    return torch.zeros(saved.shape, dtype=dtype, device=local.device if on_device else "cpu")
