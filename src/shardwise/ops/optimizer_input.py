"""Finds the optimizer that belongs to a model, as a checkpoint of ours has it: a record, and tensors by name."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from shardwise.checkpointing.loading.foreign_optimizers import ForeignOptimizers
from shardwise.comm import Group
from shardwise.disk.names import is_directory, is_file, names_in
from shardwise.errors import MisuseError, UnsafePickleError
from shardwise.format.notes import PER_RANK_DIR
from shardwise.ops.consolidate_input import ModelInput, once
from shardwise.ops.torchtitan_names import in_halves
from shardwise.plan.reads import SourceTensor
from shardwise.sources.dcp_model import is_no_model
from shardwise.sources.dcp_states import RECORD_TENSORS, DcpOptimizer, has_record, optimizer_places, read_optimizers
from shardwise.sources.dcp_values import DcpValues, is_dcp
from shardwise.sources.others.rank_files import optimizer_beside
from shardwise.sources.sources import Source, open_source
from shardwise.sources.state_files import pack_state
from shardwise.sources.tensor_bytes import Computed
from shardwise.stateful_wrappers.wrapping import plain_name

_LEAVE = "Or leave it out with --no-optimizer (optimizer=False): training then starts with a fresh one."
#: Files of ``torch.save`` that Trainer, accelerate, verl and DeepSpeed keep an optimizer's state in.
_OPTIMIZER_FILE = re.compile(r"(^|_)optim(izer)?(_.*)?\.(bin|pt|pth)$")


@dataclass(frozen=True, slots=True)
class OptimizerInput:
    """An optimizer's state.

    Attributes:
        source: Its tensors under the names of our ``optim`` directories.
        plain: Name of a file in such a directory -> its content.
        values: What else is there, in a DCP directory of another tool.
        computed: Tensors whose rows are in another order in the files.
    """

    source: Source
    plain: Mapping[str, bytes]
    values: DcpValues | None = None
    computed: Mapping[str, Computed] = field(default_factory=dict)


def find_optimizer(found: ModelInput) -> OptimizerInput | None:
    """The optimizer of a model, in its directory or beside it; ``None`` where there is none.

    One that a run could not go on with is a `MisuseError`.
    """
    if found.unnamed_optimizers:
        raise MisuseError(
            f"the file has an optimizer's state ({', '.join(found.unnamed_optimizers)}), whose parameters are known by "
            "number alone: which they are is not in it",
            path=found.source.path,
            hint=_LEAVE,
        )
    if not is_directory(found.source.path):
        return None  # what lies around a file is not its own
    for place in _places(found):
        if has_record(place):
            return _own(found, place)
        values = DcpValues(place) if is_dcp(place) else None
        if values is not None and optimizer_places(values):
            try:
                optimizers = read_optimizers(values)
            except (MisuseError, UnsafePickleError) as error:
                error.hint = f"{error.hint or ''} {_LEAVE}".strip()
                raise
            return _foreign(found, values, optimizers) if optimizers else None
    for directory in dict.fromkeys([found.directory, *(file.parent for file in found.source.files)]):
        for name in filter(_OPTIMIZER_FILE.search, names_in(directory)):
            raise MisuseError(
                "the optimizer's state is in a file of torch.save beside the model, which is not carried over",
                path=directory / name,
                hint=_LEAVE,
            )
    return None


def states_beside(values: DcpValues, found: ModelInput, *, carried: bool) -> list[str]:
    """What a DCP directory has beside the model, by its names, such as ``lr_scheduler``.

    Optimizers are among it unless they are ``carried`` over.
    """
    optimizers = {name for names in optimizer_places(values).values() for name in names} if carried else set()
    has_model, below = values.directory == found.directory, found.source.below
    outer = below.split(".")[0]
    left: dict[str, None] = {}
    for name, path in values.paths.items():
        if name in optimizers or (has_model and below and name.startswith(f"{below}.")):
            continue
        if has_model and not below and not any(map(is_no_model, (name.split(".")[0], *path))):
            continue
        left[".".join(map(str, path[: 2 if has_model and path[0] == outer else 1]))] = None
    return list(left)


def _places(found: ModelInput) -> list[Path]:
    """Where the optimizer of a model can be: in the same DCP directory, or in ``optim`` beside the model's."""
    beside = [found.checkpoint / "optim"]
    if found.directory.name == "model":
        beside.append(found.directory.parent / "optim")
    trainers = optimizer_beside(found.source.path)
    if trainers is not None:
        beside.append(trainers)
    return list(dict.fromkeys([found.directory, *beside]))


def _own(found: ModelInput, place: Path) -> OptimizerInput:
    """An ``optim`` directory of ours, whose record stays as it is."""
    if is_directory(place / PER_RANK_DIR):
        raise MisuseError(
            "the optimizer has state that single ranks keep, which cannot be carried over", path=place, hint=_LEAVE
        )
    files = [place / f"{stem}{suffix}" for stem in ("optimizer", "scheduler") for suffix in (".json", ".safetensors")]
    plain = {file.name: found.read(file) for file in files if is_file(file)}
    opened = open_source(place, Group(None), exclude=RECORD_TENSORS)
    tensors = {name: once(tensor, name, place) for name, tensor in opened.tensors.items()}
    return OptimizerInput(replace(opened, tensors=tensors), plain)


def _foreign(found: ModelInput, values: DcpValues, optimizers: Sequence[DcpOptimizer]) -> OptimizerInput:
    place = values.directory
    numbered = [each.place or "at the top" for each in optimizers if each.numbered]
    if numbered:
        raise MisuseError(
            f"the optimizer ({numbered[0]}) knows its parameters by number alone: which they are is not in the "
            "checkpoint",
            path=place,
            hint="Checkpointer.restore reads this directory as it is and matches them with the optimizer that it is "
            f"given. {_LEAVE}",
        )
    named = [_in_model_names(each, found, place) for each in optimizers]
    for param, state in (entry for each in named for entry in each.values.items()):
        if type(state.get("step")) in (int, float):  # of which torch's optimizers make tensors
            raise MisuseError(
                "the optimizer counts its steps in numbers, as releases of torch before 1.12 did",
                path=place,
                tensor=param,
                hint=f"Checkpointer.restore reads this directory as it is. {_LEAVE}",
            )
    opened = open_source(place, Group(None))
    record, dcp_names = ForeignOptimizers(place, tuple(named), opened).described(named)
    tensors = {name: once(opened.tensors[dcp], name, place) for name, dcp in dcp_names.items()}
    packed = pack_state(record.to_state())
    plain = {f"optimizer{suffix}": content for suffix, content in packed.items()}
    return OptimizerInput(replace(opened, tensors=tensors), plain, values, _reordered(found, tensors, place))


def _reordered(found: ModelInput, tensors: Mapping[str, SourceTensor], place: Path) -> dict[str, Computed]:
    """The state of parameters whose rows are put into another order, in that order."""
    computed: dict[str, Computed] = {}
    for param, heads in found.renamed.heads.items() if found.renamed is not None else ():
        for name in [name for name in tensors if name.startswith(f"state.{param}.")]:
            shape = tensors[name].spec.shape
            if shape == found.source.tensors[param].spec.shape:
                computed[name] = in_halves(tensors[name], heads)
            elif shape not in ((), (1,)):
                raise MisuseError(
                    f"the optimizer keeps {list(shape)} of a parameter whose rows are put into another order",
                    path=place,
                    tensor=name,
                    hint=_LEAVE,
                )
    return computed


def _in_model_names(optimizer: DcpOptimizer, found: ModelInput, place: Path) -> DcpOptimizer:
    """The optimizer with the model's names for its parameters, which may be those of a module around the model."""
    params = [param for group in optimizer.groups for param in group.params]
    plain = {param: plain_name(param) for param in params}
    # The names that the model has for its tensors in memory, where it was trained.
    known: Collection[str] = found.source.tensors.keys()
    names = {} if found.renamed is None else found.renamed.names
    if found.renamed is not None:
        known = names.keys()
    elif found.kind is not None:
        known = found.kind.native.keys() | found.kind.others.keys()
    # What DCP's names of the model have in front, and the ends of that.
    parts = found.source.below.split(".") if found.source.below else []
    for front in ("", *(".".join(parts[start:]) + "." for start in reversed(range(len(parts))))):
        if all(name.startswith(front) and name.removeprefix(front) in known for name in plain.values()):
            own = {param: name.removeprefix(front) for param, name in plain.items()}
            return optimizer.renamed({param: names.get(name, name) for param, name in own.items()})
    astray = [name for name in plain.values() if name not in known]
    raise MisuseError(
        f"the optimizer has {len(astray)} parameters that are not the model's: {', '.join(astray[:5])}",
        path=place,
        tensor=astray[0] if astray else None,
        hint=_LEAVE,
    )
