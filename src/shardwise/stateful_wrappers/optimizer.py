"""An optimizer's state, keyed by parameter name.

An optimizer numbers its parameters, which means nothing on another topology. Here each state tensor has a name,
``state.<parameter>.<key>``, and is sharded as its parameter is, so that it is saved and resharded as weights are. Other
values, and the groups' options, go into a JSON state. A parameter that has never had a gradient has no state, and is
restored without one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple, cast

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from shardwise.errors import MisuseError, StateFormatError
from shardwise.plan.fragments import HeldTensor
from shardwise.stateful_wrappers.inner_optimizers import (
    AnyOptimizer,
    Options,
    StateHolder,
    StateView,
    find_state_holders,
    makes_or_loads_custom,
    members,
)
from shardwise.stateful_wrappers.memory import install, plain_view
from shardwise.stateful_wrappers.names import list_parameters, promised_ties, undeclared_names
from shardwise.stateful_wrappers.state_trees import (
    LOCAL,
    PLAIN,
    UNCLEAR,
    Kind,
    SavedTensor,
    Tree,
    TreeWriter,
    as_shard_of,
    describe,
    equal,
    is_flat,
    is_sharded,
    merged,
)
from shardwise.stateful_wrappers.tensors import MeshRegister, held_tensors
from shardwise.upstream.torch_tensors import local_part


@dataclass(frozen=True)
class SavedGroup:
    """A parameter group: its options, the names of its parameters, and its optimizer's class."""

    options: Mapping[str, object]  #: Everything but the parameters.
    params: tuple[str, ...]  #: Names of the parameters.
    kind: str = ""  #: Name of the optimizer's class; empty where the checkpoint does not say, as older ones do not.
    slot: str = ""  #: Empty; of an optimizer around another one of the same parameters, its class's name.


@dataclass(frozen=True)
class OptimizerRecord:
    """Everything about an optimizer but its tensors' values."""

    groups: tuple[SavedGroup, ...]  #: All groups.
    tensors: Mapping[str, Mapping[str, SavedTensor]]  #: Parameter name -> state key -> what the tensor was.
    values: Mapping[str, Mapping[str, object]]  #: Parameter name -> state key -> a value that is not a tensor.
    #: Further name of a shared parameter, unless it is declared -> the name that it has here.
    aliases: Mapping[str, str] = field(default_factory=dict)
    #: Parameter name -> its shape, in the whole; older checkpoints do not say.
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    schedulers: tuple[str, ...] = ()  #: The schedulers' classes, in order; likewise.
    #: Parameter name, or a name in angle brackets for what belongs to no parameter -> how its tensors and values are
    #: nested (`shardwise.stateful_wrappers.state_trees`), where they are.
    trees: Mapping[str, Tree] = field(default_factory=dict)
    is_old: bool = False  #: Whether it was written before anything but the state of parameters was saved.
    #: Name in the checkpoint -> the parameter's name here, where they differ.
    renamed: Mapping[str, str] = field(default_factory=dict)
    #: What a state is called here -> what the files call it, where they differ.
    files: Mapping[str, str] = field(default_factory=dict)

    def file_label(self, label: str) -> str:
        """The label of a parameter's state in the files."""
        return self.files.get(label, label)

    def under(self, names: Mapping[str, str]) -> OptimizerRecord:
        """The same under new names (old name -> new, of every parameter); the files keep the old ones."""
        labels = {label: _label_under(label, names) for label in {**self.tensors, **self.shapes, **self.trees}}
        groups = [replace(g, params=tuple(names.get(name, name) for name in g.params)) for g in self.groups]
        return replace(
            self,
            groups=tuple(groups),
            tensors={labels[label]: found for label, found in self.tensors.items()},
            values={_label_under(label, names): found for label, found in self.values.items()},
            aliases={names.get(a, a): names.get(b, b) for a, b in self.aliases.items()},
            shapes={labels[label]: shape for label, shape in self.shapes.items()},
            trees={labels[label]: tree for label, tree in self.trees.items()},
            renamed=dict(names),
            files={new: old for old, new in labels.items()},
        )

    def to_state(self) -> dict[str, object]:
        """As plain containers, for `shardwise.format.state_json`."""
        # A release that knows of no kinds would make something else of a tensor.
        has_kinds = any(saved.kind != Kind() for found in self.tensors.values() for saved in found.values())
        state: dict[str, object] = {
            "version": 2 if self.trees or any(g.slot for g in self.groups) or has_kinds else 1,
            "groups": [
                {"options": dict(g.options), "params": list(g.params), "kind": g.kind, "slot": g.slot}
                for g in self.groups
            ],
            "tensors": {
                name: {key: saved.to_state() for key, saved in found.items()} for name, found in self.tensors.items()
            },
            "values": {name: dict(found) for name, found in self.values.items()},
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
            "schedulers": list(self.schedulers),
        }
        state |= {"aliases": dict(self.aliases)} if self.aliases else {}
        return state | ({"trees": dict(self.trees)} if self.trees else {})

    @staticmethod
    def from_state(state: object) -> OptimizerRecord:
        """Check and take in what `to_state` gave; `StateFormatError` where it is something else."""
        try:
            fields = cast(dict[str, object], state)
            if fields["version"] not in (1, 2):
                raise StateFormatError(
                    f"optimizer state of version {fields['version']!r}; this release reads 1 and 2",
                    hint="Use the release of shardwise that wrote the checkpoint, or a newer one.",
                )
            rows = cast(list[dict[str, dict[str, object]]], fields["groups"])
            groups = tuple(
                SavedGroup(
                    dict(g["options"]), tuple(map(str, g["params"])), str(g.get("kind", "")), str(g.get("slot", ""))
                )
                for g in rows
            )
            tensors = {
                name: {key: SavedTensor.from_state(row) for key, row in found.items()}
                for name, found in cast(dict[str, dict[str, list[object]]], fields["tensors"]).items()
            }
            beside = cast(dict[str, Mapping[str, object]], fields["values"])
            values = {name: dict(found) for name, found in beside.items()}
            aliases = {str(k): str(v) for k, v in cast(dict[str, str], fields.get("aliases", {})).items()}
            saved_shapes = cast(dict[str, list[int]], fields.get("shapes", {}))
            shapes = {name: tuple(int(n) for n in shape) for name, shape in saved_shapes.items()}
            schedulers = tuple(str(kind) for kind in cast(list[object], fields.get("schedulers", [])))
            trees = {name: list(tree) for name, tree in cast(dict[str, Tree], fields.get("trees", {})).items()}
            is_old = bool(rows) and not any("slot" in g for g in rows)
            return OptimizerRecord(groups, tensors, values, aliases, shapes, schedulers, trees, is_old)
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

        Where several ranks have one parameter, all its options and values are those of the first of these ranks.
        """
        groups: list[tuple[SavedGroup, dict[str, None]]] = []
        tensors: dict[str, dict[str, SavedTensor]] = {}
        values: dict[str, Mapping[str, object]] = {}
        trees: dict[str, Tree] = {}
        aliases: dict[str, str] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        schedulers: tuple[str, ...] = ()
        claimed: set[tuple[str, str]] = set()
        for record in records:
            matched: set[int] = set()
            for group in record.groups:
                params = [name for name in group.params if (group.slot, name) not in claimed]
                if params or not group.params:
                    index = _same_options(groups, group, matched)
                    matched.add(index)
                    groups[index][1].update(dict.fromkeys(params))
            claimed.update((group.slot, name) for group in record.groups for name in group.params)
            for name, found in record.tensors.items():
                tensors.setdefault(name, {}).update(found)
            for name, tree in record.trees.items():
                trees[name] = _one_tree(name, trees[name], tree) if name in trees else tree
            values = {**record.values, **values}
            aliases.update(record.aliases)
            shapes.update(record.shapes)
            if schedulers and record.schedulers and len(schedulers) != len(record.schedulers):
                raise MisuseError(
                    f"one rank has {len(schedulers)} schedulers and another {len(record.schedulers)}",
                    hint="The state of one rank's schedulers is saved for all: pass as many on every rank.",
                )
            schedulers = schedulers or record.schedulers
        together = tuple(SavedGroup(g.options, tuple(params), g.kind, g.slot) for g, params in groups)
        return OptimizerRecord(together, tensors, values, aliases, shapes, schedulers, trees)


def _one_tree(name: str, known: Tree, tree: Tree) -> Tree:
    """The trees of two ranks under one name, merged; they may not differ in what belongs to no parameter."""
    if name.startswith("<") and name.endswith(">") and not equal(known, tree):
        raise MisuseError(
            f"ranks have different state of their {name[1:-1].partition('.')[0]} beside that of its parameters, and "
            "one is saved for all",
            tensor=name,
            hint="Keep it the same on every rank; what is a rank's own goes into extra_state.",
        )
    return cast(Tree, merged(known, tree))


def _same_options(groups: list[tuple[SavedGroup, dict[str, None]]], group: SavedGroup, used: set[int]) -> int:
    """Index of the group that ``group`` is a part of; two groups of one record are never folded into one."""
    for index, (known, _) in enumerate(groups):
        if (
            index not in used
            and (known.kind, known.slot) == (group.kind, group.slot)
            and equal(known.options, group.options)
        ):
            return index
    groups.append((group, {}))
    return len(groups) - 1


class SplitState(NamedTuple):
    """A parameter's state, split into tensors and the rest."""

    tensors: Mapping[str, torch.Tensor]  #: Key -> tensor.
    values: Mapping[str, object]  #: Key -> other value, where nothing is nested.
    tree: Tree | None  #: How the state is nested; ``None`` where it is flat.


def _label_under(label: str, names: Mapping[str, str]) -> str:
    if label.endswith(">"):
        return label
    slot, end, name = label.rpartition(">")
    return f"{slot}{end}{names.get(name, name)}"


def label_of(slot: str, name: str) -> str:
    """The label under which a parameter's state is saved."""
    return f"<{slot}>{name}" if slot else name


@dataclass(frozen=True, slots=True)
class Entry:
    """One parameter with the state that an optimizer keeps of it."""

    holder: StateHolder
    param: torch.Tensor
    name: str
    state: Mapping[object, object]

    @property
    def label(self) -> str:
        """The label under which it is saved."""
        return label_of(self.holder.slot, self.name)

    def tensor_name(self, key: str) -> str:
        """Under which name a tensor of it is saved."""
        return f"state.{self.label}.{key}"

    def split(self, name_of: Callable[[torch.Tensor], str], own: Callable[[str], bool] = lambda _: False) -> SplitState:
        """The state as tensors and the rest; ``own`` says of keys whether plain tensors differ between shards."""
        if is_flat(self.state):
            named = cast(Mapping[str, object], self.state)
            tensors = {key: value for key, value in named.items() if isinstance(value, torch.Tensor)}
            if not any(map(own, tensors)):
                return SplitState(tensors, {key: value for key, value in named.items() if key not in tensors}, None)
        writer = TreeWriter(self.label, self.param, name_of, own)
        tree = writer.split(dict(self.state))
        return SplitState(writer.tensors, {}, tree)


class OptimizerState:
    """The state of one optimizer, or of several (pipeline stages, or one for each kind of parameter).

    Args:
        optimizer: The optimizer or optimizers of this rank; containers and wrappers among them too.
        model: The module, or this rank's pipeline stages, whose parameters they update.

    Raises:
        MisuseError: An optimizer updates a parameter that the model does not have, or that another one updates too.
    """

    def __init__(
        self, optimizer: AnyOptimizer | Sequence[AnyOptimizer], model: nn.Module | Sequence[nn.Module]
    ) -> None:
        passed = list(optimizer) if isinstance(optimizer, Sequence) else [optimizer]
        parts = [model] if isinstance(model, nn.Module) else list(model)
        # The modules' own tensors: their state_dict may hold copies.
        named = list_parameters(parts)
        self._names = {id(each.tensor): each.name for each in named}
        self._spread = {tuple(each.tensor.shape): each.name for each in named if isinstance(each.tensor, DTensor)}
        self.passed = passed
        self.state_holders = find_state_holders(passed, self._names)
        self.aliases = undeclared_names(named, parts)
        # Under which other names a parameter's state may be saved; what a checkpoint says is added by `plan_restore`.
        self.saved_under = promised_ties(parts)
        self._settled: dict[str, str] = {}
        self._own: set[str] = set()

    def name(self, param: torch.Tensor) -> str:
        """A parameter's name; `MisuseError` where the model does not have it."""
        name = self._names.get(id(param))
        if name is None:
            if (like := self._spread.get(tuple(param.shape))) and not isinstance(param, DTensor):
                raise MisuseError(
                    f"the optimizer updates a whole parameter of shape {list(param.shape)}, and those of this shape in "
                    "the model are shards: its steps change nothing that the model keeps",
                    tensor=like,
                    hint="Build the optimizer after fully_shard; and after a forward pass without a backward pass, in "
                    "which FSDP2 gathers parameters, call model.reshard() before.",
                )
            raise MisuseError(
                f"the optimizer updates a parameter of shape {list(param.shape)} that the model does not have",
                hint="Pass the model (or all of this rank's stages) that the optimizer was built for, after "
                "fully_shard and before anything replaces its parameters.",
            )
        return name

    def groups(self) -> Iterator[tuple[StateHolder, Options]]:
        """Each optimizer's groups."""
        for holder in self.state_holders:
            for group in holder.groups():
                yield holder, group

    def names(self, group: Options) -> tuple[str, ...]:
        """Names of a group's parameters."""
        return tuple(map(self.name, members(group)))

    def entries(self) -> Iterator[Entry]:
        """Every parameter that has state."""
        for holder, group in self.groups():
            for param in members(group):
                state = cast("Mapping[torch.Tensor, object]", holder.optimizer.state).get(param)
                if state is not None:
                    own = state if isinstance(state, Mapping) else {"": state}
                    yield Entry(holder, param, self.name(param), own)

    def view(self, number: int) -> StateView:
        """The state dict of one of the optimizers that were passed, beside its holders."""
        inside = [holder for holder in self.state_holders if holder.passed == number]
        return StateView(self.passed[number], inside, self.name)

    @property
    def optimizers(self) -> list[Optimizer]:
        """The innermost optimizers, one for each parameter."""
        return [holder.optimizer for holder in self.state_holders if not holder.slot]

    @property
    def has_own_ways(self) -> bool:
        """Whether any optimizer overrides how its state dict is made or loaded."""
        return any(map(makes_or_loads_custom, self.passed))

    @cached_property
    def loose(self) -> dict[str, tuple[Tree, Mapping[str, torch.Tensor]]]:
        """State that belongs to no parameter, by label: under other keys, and further entries of state dicts."""
        found: dict[str, object] = {}
        for holder, label in self.labels():
            state = cast(Mapping[object, object], holder.optimizer.state)
            keyed = {key: value for key, value in state.items() if not isinstance(key, torch.Tensor)}
            if keyed:
                found[label] = keyed
        for number, label in self.passed_labels():
            if makes_or_loads_custom(self.passed[number]):
                rest = [[[list(step) for step in path], value] for path, value in self.view(number).rest()]
                if rest:
                    found[label] = rest
        writers = {label: TreeWriter(label, None, self.name) for label in found}
        return {label: (writers[label].split(value), writers[label].tensors) for label, value in found.items()}

    def labels(self) -> list[tuple[StateHolder, str]]:
        """Each holder, and the label of its state that belongs to no parameter."""
        labels = _numbered([holder.kind for holder in self.state_holders])
        return [(holder, f"<{label}>") for holder, label in zip(self.state_holders, labels, strict=True)]

    def passed_labels(self) -> list[tuple[int, str]]:
        """The number of each optimizer that was passed, and the label of the rest of its state dict."""
        labels = _numbered([type(each).__name__ for each in self.passed])
        return [(number, f"<{label}.state_dict>") for number, label in enumerate(labels)]

    # --- what ranks find out together -------------------------------------------------------------------------------

    def unsettled(self) -> dict[str, list[object]]:
        """Plain tensors beside sharded parameters: only their values show whether each rank has its own.

        Returns:
            Name -> optimizer class and key, whether the shape is that of this rank's shard, and a digest.
        """
        found: dict[str, list[object]] = {}
        for entry in self.entries():
            if not is_sharded(entry.param):
                continue
            for key, value in entry.split(self.name).tensors.items():
                if not isinstance(value, DTensor) and value.ndim and "@" not in key:
                    is_local = value.shape == local_part(entry.param).shape
                    found[entry.tensor_name(key)] = [f"{entry.holder.kind} {key}", int(is_local), _digest(value)]
        return found

    def settle(self, rows: Sequence[Mapping[str, Sequence[object]]]) -> None:
        """Decide from the gathered results of `unsettled`, one for each rank."""
        gathered: dict[str, list[Sequence[object]]] = {}
        of_key: dict[str, list[Sequence[object]]] = {}
        for row in rows:
            for name, said in row.items():
                gathered.setdefault(name, []).append(said)
        for rows_of_name in gathered.values():
            of_key.setdefault(str(rows_of_name[0][0]), []).extend(rows_of_name)
        differs = {name: len({str(said[2]) for said in found}) > 1 for name, found in gathered.items()}
        some_differ = {str(gathered[name][0][0]) for name, differ in differs.items() if differ}
        for name, found in gathered.items():
            key = str(found[0][0])
            if all(said[1] for said in found):
                every = all(said[1] for said in of_key[key])
                local = differs[name] or (every and key in some_differ)
                self._settled[name] = LOCAL if local else UNCLEAR if every else PLAIN
            elif differs[name]:
                self._own.add(name)

    # --- what is saved ----------------------------------------------------------------------------------------------

    def _split(self, entry: Entry) -> SplitState:
        return entry.split(self.name, lambda key: entry.tensor_name(key) in self._own)

    def record(self, schedulers: Sequence[str] = ()) -> OptimizerRecord:
        """The groups, and a description of each parameter's state."""
        groups: list[SavedGroup] = []
        tensors: dict[str, Mapping[str, SavedTensor]] = {}
        values: dict[str, Mapping[str, object]] = {}
        trees: dict[str, Tree] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        for holder, group in self.groups():
            # names of parameters are an option of newer optimizers; ours say the same and survive resharding
            options = {k: v for k, v in group.items() if k not in ("params", "param_names")}
            groups.append(SavedGroup(options, self.names(group), holder.kind, holder.slot))
        for entry in self.entries():
            parts = self._split(entry)
            shapes[entry.label] = tuple(entry.param.shape)
            tensors[entry.label] = {
                key: describe(value, None if "@" in key else entry.param, self._settled.get(entry.tensor_name(key)))
                for key, value in parts.tensors.items()
            }
            values[entry.label] = parts.values
            if parts.tree is not None:
                trees[entry.label] = parts.tree
        for label, (tree, loose) in self.loose.items():
            tensors[label] = {key: describe(value, None) for key, value in loose.items()}
            trees[label] = tree
        return OptimizerRecord(tuple(groups), tensors, values, self.aliases, shapes, tuple(schedulers), trees)

    def held(self, meshes: MeshRegister | None = None) -> list[HeldTensor]:
        """This rank's parts of the state tensors, as views of the optimizers' memory."""
        return held_tensors(self.state_dict().items(), meshes or MeshRegister())

    def state_dict(self) -> dict[str, torch.Tensor]:
        """State tensors by name, sharing the optimizers' memory."""
        found: dict[str, torch.Tensor] = {}
        for entry in self.entries():
            for key, value in self._split(entry).tensors.items():
                name = entry.tensor_name(key)
                tensor = plain_view(name, value)
                found[name] = as_shard_of(tensor, entry.param) if self._settled.get(name) == LOCAL else tensor
        for label, (_, loose) in self.loose.items():
            names = {f"state.{label}.{key}": value for key, value in loose.items()}
            found |= {name: plain_view(name, value) for name, value in names.items()}
        return found

    def parameters(self) -> list[str]:
        """Names of the parameters that the optimizers update."""
        return [self.name(param) for _, group in self.groups() for param in members(group)]

    def owners(self) -> list[tuple[str, str]]:
        """The name of each state tensor, and its parameter's."""
        return [(entry.tensor_name(key), entry.name) for entry in self.entries() for key in self._split(entry).tensors]

    def load_state_dict(self, state_dict: Mapping[str, torch.Tensor]) -> None:
        """Copy state tensors in place; those that already share the optimizers' memory are left alone."""
        own = self.state_dict()
        with torch.no_grad():
            for name, value in state_dict.items():
                install(own[name], plain_view(name, value))


def _numbered(kinds: Sequence[str]) -> list[str]:
    return [f"{kind}.{kinds[:n].count(kind)}" for n, kind in enumerate(kinds)]


def _digest(tensor: torch.Tensor) -> str:
    plain = tensor.detach().cpu().contiguous()
    about = f"{plain.dtype} {list(plain.shape)}".encode()
    digest = hashlib.blake2b(about, digest_size=12)
    if plain.numel():
        digest.update(cast("memoryview[int]", plain.reshape(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()
