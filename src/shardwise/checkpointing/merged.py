"""An adapter's model merged on the way: an export of base plus adapter beside the adapter, without a gather.

What the adapter leaves alone is written as the tensors of any export are. A merged tensor has to be computed: its
sources are the base weight and the adapter's tensors of that module, which are put together on one of the ranks that
hold them, one module at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import torch
from torch import nn

from shardwise.addons import ConsolidatedHFAddon
from shardwise.addons.base import SavesPretrained
from shardwise.addons.peft_merge import MergedGroup, MergedPart
from shardwise.checkpointing.context import Context
from shardwise.checkpointing.hub import HubState, memory_of, natives_of, require_memory
from shardwise.checkpointing.models import Described, ModelSave
from shardwise.checkpointing.recasts import Recasts
from shardwise.convert import Computed, HeldGroup
from shardwise.engine.export import ExportOptions
from shardwise.engine.jobs import Step
from shardwise.errors import ConversionError, ModuleStateError
from shardwise.plan.deferred import bound, deferred
from shardwise.plan.fragments import HeldTensor
from shardwise.stateful_wrappers.tensors import MeshRegister, held_tensors
from shardwise.types import TensorSpec

#: Component of the merged tensors: the manifest lists a tensor once in a component.
MERGED = "merged"



class MergedSave(ModelSave):
    """The merged export of one save of a model's adapters; it writes nothing that resumes. All ranks make one.

    Args:
        context: Settings, ranks and storage, with memory of its own of what was saved before.
        parts: This rank's parts with their adapters.
        merged: The same without.
        directory: Where the ``model`` directory's content goes; it exists.
        tokenizer: What the caller gave.
        is_final: Whether this is the run's last save.
    """

    def __init__(
        self,
        context: Context,
        parts: Sequence[nn.Module],
        merged: Sequence[MergedPart],
        directory: Path,
        *,
        tokenizer: SavesPretrained | None,
        is_final: bool,
    ) -> None:
        super().__init__(
            context,
            [part.model for part in merged],
            directory,
            [ConsolidatedHFAddon()],
            tokenizer=tokenizer,
            peft_config=None,
            is_final=is_final,
            reserve=_nothing,
        )
        self._parts, self._merged = parts, merged

    def _captured(self) -> HubState:
        context = self._context
        hub = context.names.capture(self.state)
        hub = merged_state(hub, self._parts, self._merged, context)
        require_memory(memory_of(hub.held), "values to save")
        context.sound = hub
        natives = iter(context.staged("model.native", natives_of(hub.groups)))
        groups = tuple(replace(held, natives=tuple(islice(natives, len(held.natives)))) for held in hub.groups)
        return replace(hub, held=tuple(context.staged("model", hub.held)), groups=groups)

    def _options(self, specs: Sequence[TensorSpec]) -> ExportOptions:
        return replace(super()._options(specs), component=MERGED)

    def _prepare_directory(
        self, recasts: Recasts, passed: Sequence[str], hidden: Sequence[str], quantized: bool
    ) -> None:
        # The notes beside an export are for resuming from it.
        super()._prepare_directory(Recasts({}, False), (), (), quantized)

    def _beside(self, described: Described) -> list[Step]:
        return []


def _nothing() -> None:
    """The adapter's save has made the directory."""


def merged_state(
    hub: HubState, parts: Sequence[nn.Module], merged: Sequence[MergedPart], context: Context
) -> HubState:
    """Tell the tensors that have to be computed from those that are there. Local.

    Args:
        hub: What was captured of the merged model, whose merged tensors have no memory.
        parts: This rank's parts with their adapters.
        merged: The same without.
        context: Settings.

    Raises:
        ConversionError: A tensor of the files is made of merged tensors and of others.
        ModuleStateError: A module makes its state of merged tensors in a way of its own.
    """
    makers = {_memory(t): group for part in merged for group in part.groups for t in group.results}
    held: list[HeldTensor] = []
    made: dict[str, tuple[HeldTensor, list[MergedGroup]]] = {}
    for tensor in hub.held:
        found = _made_by(tensor, makers)
        if found:
            made[tensor.spec.name] = (tensor, found)
        else:
            held.append(tensor)
    for native in (native for group in hub.groups for native in group.natives):
        if _made_by(native, makers):
            raise _mixed(native.spec.name)
    named = [(_source(g, name), t) for part in merged for g in part.groups for name, t in g.sources.items()]
    meshes = MeshRegister(context.may_differ.of_adapter(named, parts))
    sources = {tensor.spec.name: tensor for tensor in held_tensors(named, meshes)}
    groups = [
        _held_group([tensor for tensor, _ in together], makers_of(together), sources)
        for together in _together(list(made.values()))
    ]
    return replace(hub, held=tuple(held), groups=(*hub.groups, *groups), hidden=())


_Made = tuple[HeldTensor, list[MergedGroup]]


def makers_of(together: Sequence[_Made]) -> list[MergedGroup]:
    """All that make some tensors, each once."""
    return list({id(group): group for _, groups in together for group in groups}.values())


def _together(made: Sequence[_Made]) -> list[list[_Made]]:
    """Tensors of the files that come of the same modules, in one list each."""
    lists: list[tuple[set[int], list[_Made]]] = []
    for each in made:
        keys, own = {id(group) for group in each[1]}, [each]
        apart = []
        for known, theirs in lists:
            if known.isdisjoint(keys):
                apart.append((known, theirs))
            else:
                keys, own = keys | known, [*theirs, *own]
        lists = [*apart, (keys, own)]
    return [own for _, own in lists]


def _held_group(
    hub: Sequence[HeldTensor], groups: Sequence[MergedGroup], sources: Mapping[str, HeldTensor]
) -> HeldGroup:
    natives = tuple(sources[_source(group, name)] for group in groups for name in group.sources)
    computed = Computed(
        tuple(native.spec for native in natives),
        tuple(tensor.spec for tensor in hub),
        MergeRule(tuple(groups), tuple(hub)),
        "an adapter is merged into it",
        has_inverse=False,
    )
    return HeldGroup(computed, natives)


@dataclass(frozen=True, slots=True, eq=False)
class MergeRule:
    """Merges adapted modules, and gives what comes of them the names and the form of the files.

    Attributes:
        groups: The modules.
        hub: The tensors of the files, as views of the groups' results.
    """

    groups: tuple[MergedGroup, ...]
    hub: tuple[HeldTensor, ...]

    def forward(self, natives: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Whole sources by name to merged tensors by their names in the files."""
        results: dict[int, torch.Tensor] = {}
        for group in self.groups:
            made = group.merge({name: natives[_source(group, name)] for name in group.sources})
            results |= {
                _memory(stand_in): tensor.contiguous()
                for stand_in, tensor in zip(group.results, made, strict=True)
            }
        return {tensor.spec.name: _assembled(tensor, results) for tensor in self.hub}

    def backward(self, hub: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Nothing can tell base and adapter apart again: it is never called."""
        raise NotImplementedError


def _assembled(tensor: HeldTensor, results: Mapping[int, torch.Tensor]) -> torch.Tensor:
    pieces = [(f.box, bound(f.data, results[_memory(f.data)])) for f in tensor.fragments]
    if len(pieces) == 1:
        return pieces[0][1].reshape(tensor.spec.shape)
    out = torch.empty(tensor.grid, dtype=pieces[0][1].dtype)
    for box, piece in pieces:
        out[tuple(slice(o, e) for o, e in zip(box.offsets, box.ends, strict=True))] = piece
    return out.reshape(tensor.spec.shape)


def _source(group: MergedGroup, name: str) -> str:
    """The name of what a group reads, of its own: several may read the same tensor."""
    return f"{group.name}/{name}"


def _memory(tensor: torch.Tensor) -> int:
    """What a tensor without memory and its views have in common."""
    return int(tensor.untyped_storage()._cdata)


def _made_by(tensor: HeldTensor, makers: Mapping[int, MergedGroup]) -> list[MergedGroup]:
    """The modules that a tensor of the files comes of; none of one that is in memory."""
    found: dict[int, MergedGroup] = {}
    for part in tensor.parts:
        own = {id(g): g for g in _of_fragments(tensor, (f.data for f in part.fragments), makers)}
        found |= own
    if found and any(not f.data.is_meta for f in tensor.fragments):
        raise _mixed(tensor.spec.name)
    return list(found.values())


def _of_fragments(
    tensor: HeldTensor, data: Iterator[torch.Tensor], makers: Mapping[int, MergedGroup]
) -> Iterator[MergedGroup]:
    for each in data:
        what = deferred(each)
        if what is not None and what.device.type == "meta":
            raise ModuleStateError(
                "export_merged: a module makes its state in a way of its own, of a tensor that an adapter is merged "
                "into",
                tensor=tensor.spec.name,
                hint="Leave the module out of the adapter's targets, or set export_merged to false.",
            )
        if each.is_meta and what is None and (maker := makers.get(_memory(each))) is not None:
            yield maker


def _mixed(name: str) -> ConversionError:
    return ConversionError(
        "export_merged: the files join this tensor out of some that an adapter is merged into and others",
        tensor=name,
        hint="Adapt all of the modules that it is made of, or none; or set export_merged to false.",
    )
