"""An adapter's model merged on the way: an export of base plus adapter beside the adapter, without a gather.

What the adapter leaves alone is written as the tensors of any export are. A merged tensor has to be computed: its
sources are the base weight and the adapter's tensors of that module, which are put together on one of the ranks that
hold them, one module at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import torch
from torch import nn

from shardwise.addons import ConsolidatedHFAddon
from shardwise.addons.base import SavesPretrained
from shardwise.checkpointing.hub import HubNames, HubState, memory_of, natives_of, require_memory
from shardwise.checkpointing.saving.facts import Facts
from shardwise.checkpointing.saving.models import Described, ModelSave
from shardwise.checkpointing.session import Session
from shardwise.convert import Computed, HeldGroup
from shardwise.dtypes import torch_dtype
from shardwise.engine.export import ExportOptions
from shardwise.engine.jobs import Step
from shardwise.errors import ConversionError, ModuleStateError
from shardwise.geometry import Box, TensorSpec
from shardwise.peft.merge import MergedGroup, MergedPart, merged_parts
from shardwise.plan.deferred import bound, deferred
from shardwise.plan.fragments import HeldTensor
from shardwise.plan.views import hub_views
from shardwise.stateful_wrappers import ModelState
from shardwise.stateful_wrappers.tensors import MeshRegister, held_tensors
from shardwise.upstream.torch_tensors import storage_key

#: Component of the merged tensors: the manifest lists a tensor once in a component.
MERGED = "merged"


def check_merging(session: Session, parts: Sequence[nn.Module]) -> None:
    """Describe a model's merged export as a save would, and write nothing. Local.

    Raises:
        ShardwiseError: Why a save could not merge: as `merged_parts` and `merged_state` say.
    """
    merged = merged_parts(parts)
    state = ModelState([part.model for part in merged])
    merged_state(HubNames(session.may_differ).capture(state), parts, merged, session)


class MergedSave(ModelSave):
    """The merged export of one save of a model's adapters; it writes nothing that resumes. All ranks make one.

    Args:
        session: Settings, ranks and storage, with memory of its own of what was saved before.
        parts: This rank's parts with their adapters.
        merged: The same without.
        directory: Where the ``model`` directory's content goes; it exists.
        tokenizer: What the caller gave.
        is_final: Whether this is the run's last save.
    """

    def __init__(
        self,
        session: Session,
        parts: Sequence[nn.Module],
        merged: Sequence[MergedPart],
        directory: Path,
        *,
        tokenizer: SavesPretrained | None,
        is_final: bool,
    ) -> None:
        super().__init__(
            session,
            [part.model for part in merged],
            directory,
            [ConsolidatedHFAddon()],
            tokenizer=tokenizer,
            peft_config=None,
            is_final=is_final,
            reserve=_nothing,
        )
        self._parts, self._merged = parts, merged

    def _captured(self) -> tuple[HubState, bool]:
        session = self._session
        hub = session.names.capture(self.state)
        hub = merged_state(hub, self._parts, self._merged, session)
        require_memory(memory_of(hub.held), "values to save")
        natives = iter(session.staged("model.native", natives_of(hub.groups)))
        groups = tuple(replace(held, natives=tuple(islice(natives, len(held.natives)))) for held in hub.groups)
        return replace(hub, held=tuple(session.staged("model", hub.held)), groups=groups), self._look_at_parameters()

    def _options(self, specs: Sequence[TensorSpec]) -> ExportOptions:
        return replace(super()._options(specs), component=MERGED)

    def _prepare_directory(self, facts: Facts, passed: Sequence[str] = ()) -> None:
        # The notes beside an export are for resuming from it.
        super()._prepare_directory(replace(facts, native={}, outside=frozenset(), excluded=()))

    def _beside(self, described: Described) -> list[Step]:
        return []


def _nothing() -> None:
    """The adapter's save has made the directory."""


def merged_state(hub: HubState, parts: Sequence[nn.Module], merged: Sequence[MergedPart], session: Session) -> HubState:
    """Tell the tensors that have to be computed from those that are there. Local.

    Args:
        hub: What was captured of the merged model, whose merged tensors have no memory.
        parts: This rank's parts with their adapters.
        merged: The same without.
        session: Settings.

    Raises:
        ConversionError: The model's own conversion computes tensors of merged ones.
        ModuleStateError: A module makes its state of merged tensors in a way of its own.
    """
    makers = {storage_key(t): group for part in merged for group in part.groups for t in group.results}
    held: list[HeldTensor] = []
    made: list[_Made] = []
    for tensor in hub.held:
        groups = _makers(tensor, makers)
        if groups:
            made.append(_Made(tensor, groups, _beside(tensor, hub.joined.get(tensor.spec.name, ()))))
        else:
            held.append(tensor)
    for native in natives_of(hub.groups):
        if _makers(native, makers):
            raise ConversionError(
                "export_merged: the model's conversion computes tensors of the files out of this one, which an adapter "
                "is merged into",
                tensor=native.spec.name,
                hint="Let the model's state_dict_adapter only rearrange tensors, or set export_merged to false.",
            )
    named = [(_source(g, name), t) for part in merged for g in part.groups for name, t in g.sources.items()]
    meshes = MeshRegister(session.may_differ.of_adapter(named, parts))
    sources = {tensor.spec.name: tensor for tensor in held_tensors(named, meshes)}
    computed = [_held_group(together, sources) for together in _together(made)]
    return replace(hub, held=tuple(held), groups=(*hub.groups, *computed), excluded=())


@dataclass(frozen=True, slots=True, eq=False)
class _Made:
    """A tensor of the files that has to be computed.

    Attributes:
        tensor: It; its parts look at results of ``groups``, which have no memory, or at tensors that have.
        groups: The modules whose merging gives these results.
        beside: For each part nothing, or what of the model it looks at that is not merged.
    """

    tensor: HeldTensor
    groups: tuple[MergedGroup, ...]
    beside: tuple[HeldTensor | None, ...]

    @property
    def natives(self) -> list[HeldTensor]:
        """The tensors of the model that are joined with merged ones, under names of their own."""
        return list({tensor.spec.name: tensor for tensor in self.beside if tensor is not None}.values())

    def of(self, natives: Mapping[str, torch.Tensor], results: Mapping[int, torch.Tensor]) -> torch.Tensor:
        """The tensor of the files, from whole tensors."""
        pieces: list[tuple[Box, torch.Tensor]] = []
        for held, beside in zip(self.tensor.parts, self.beside, strict=True):
            if beside is None:
                pieces += [(f.box, bound(f.data, results[storage_key(f.data)])) for f in held.fragments]
            else:
                assert held.part.view is not None
                pieces += hub_views(held.part.view, Box.whole(beside.spec.shape), natives[beside.spec.name])
        if len(pieces) == 1:
            return pieces[0][1].reshape(self.tensor.spec.shape)
        out = torch.empty(self.tensor.grid, dtype=torch_dtype(self.tensor.spec.dtype))
        for box, piece in pieces:
            out[tuple(slice(o, e) for o, e in zip(box.offsets, box.ends, strict=True))] = piece
        return out.reshape(self.tensor.spec.shape)


def _beside(tensor: HeldTensor, joined: Sequence[HeldTensor]) -> tuple[HeldTensor | None, ...]:
    """For each part what it looks at, where that has memory. A rank may have no piece of it, but of what is merged."""
    if len(tensor.parts) == 1:
        return (None,)
    return tuple(
        None
        if native.fragments and native.fragments[0].data.is_meta
        else native._replace(spec=native.spec._replace(name=f"{tensor.spec.name}/{native.spec.name}"))
        for native in joined
    )


def _together(made: Sequence[_Made]) -> list[list[_Made]]:
    """Tensors of the files that come of the same modules, in one list each."""
    lists: list[tuple[set[int], list[_Made]]] = []
    for each in made:
        keys, own = {id(group) for group in each.groups}, [each]
        outside = []
        for known, theirs in lists:
            if known.isdisjoint(keys):
                outside.append((known, theirs))
            else:
                keys, own = keys | known, [*theirs, *own]
        lists = [*outside, (keys, own)]
    return [own for _, own in lists]


def _held_group(made: Sequence[_Made], sources: Mapping[str, HeldTensor]) -> HeldGroup:
    groups = tuple({id(group): group for each in made for group in each.groups}.values())
    natives = [sources[_source(group, name)] for group in groups for name in group.sources]
    natives += [native for each in made for native in each.natives]
    computed = Computed(
        tuple(native.spec for native in natives),
        tuple(each.tensor.spec for each in made),
        MergeRule(groups, tuple(made)),
        "an adapter is merged into it",
        has_inverse=False,
    )
    return HeldGroup(computed, tuple(natives))


@dataclass(frozen=True, slots=True, eq=False)
class MergeRule:
    """Merges adapted modules, and gives what comes of them the names and the form of the files.

    Attributes:
        groups: The modules.
        made: The tensors of the files.
    """

    groups: tuple[MergedGroup, ...]
    made: tuple[_Made, ...]

    def forward(self, natives: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Whole sources by name to merged tensors by their names in the files."""
        results: dict[int, torch.Tensor] = {}
        for group in self.groups:
            merged = group.merge({name: natives[_source(group, name)] for name in group.sources})
            results |= {storage_key(t): tensor.contiguous() for t, tensor in zip(group.results, merged, strict=True)}
        return {each.tensor.spec.name: each.of(natives, results) for each in self.made}

    def backward(self, hub: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Never called: a merged tensor cannot be divided into base and adapter."""
        raise NotImplementedError


def _source(group: MergedGroup, name: str) -> str:
    """The name of what a group reads, of its own: several may read the same tensor."""
    return f"{group.name}/{name}"


def _makers(tensor: HeldTensor, makers: Mapping[int, MergedGroup]) -> tuple[MergedGroup, ...]:
    """The modules that a tensor of the files comes of; none of one that is in memory."""
    found: dict[int, MergedGroup] = {}
    for fragment in tensor.fragments:
        what = deferred(fragment.data)
        if what is not None and what.device.type == "meta":
            raise ModuleStateError(
                "export_merged: a module makes its state in a way of its own, of a tensor that an adapter is merged "
                "into",
                tensor=tensor.spec.name,
                hint="Leave the module out of the adapter's targets, or set export_merged to false.",
            )
        group = makers.get(storage_key(fragment.data)) if fragment.data.is_meta and what is None else None
        if group is not None:
            found[id(group)] = group
    return tuple(found.values())
