"""An adapter's model as the merged export has it: which tensors are in memory, and which are computed from what.

What the adapter leaves alone is written as the tensors of any export are. A merged tensor is computed from the base
weight and the adapter's tensors of that module, on one of the ranks that hold them, one module at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from shardwise.checkpointing.hub import HubNames, HubState, natives_of
from shardwise.checkpointing.session import Session
from shardwise.convert import Computed, HeldGroup
from shardwise.dtypes import torch_dtype
from shardwise.errors import ConversionError, ModuleStateError
from shardwise.geometry import Box
from shardwise.peft.merge import MergedGroup, MergedPart, merged_parts
from shardwise.plan.deferred import bound, deferred
from shardwise.plan.fragments import HeldTensor
from shardwise.plan.views import hub_views
from shardwise.stateful_wrappers import ModelState
from shardwise.stateful_wrappers.replicas import MayDiffer
from shardwise.stateful_wrappers.tensors import MeshRegister, held_tensors
from shardwise.upstream.torch_tensors import storage_key


def check_merging(session: Session, parts: Sequence[nn.Module]) -> None:
    """Describe a model's merged export as a save would, raising what it would raise, and write nothing. Local."""
    merged = merged_parts(parts)
    state = ModelState([part.model for part in merged])
    merged_state(HubNames(session.may_differ).capture(state), parts, merged, session.may_differ)


def merged_state(
    hub: HubState, parts: Sequence[nn.Module], merged: Sequence[MergedPart], may_differ: MayDiffer
) -> HubState:
    """Divide a merged model's tensors into those in memory and those to compute. Local.

    ``hub`` is the merged model's captured state, in which merged tensors have no memory; ``parts`` have their adapters.
    Refused are conversions, and modules' own code, that make something else of merged tensors.
    """
    makers = {storage_key(t): group for part in merged for group in part.groups for t in group.results}
    held: list[HeldTensor] = []
    made: list[_Made] = []
    for tensor in hub.held:
        groups = _makers(tensor, makers)
        if groups:
            made.append(_Made(tensor, groups, _beside(tensor, hub.joined.get(tensor.spec.name, ()), makers)))
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
    meshes = MeshRegister(may_differ.of_adapter(named, parts))
    sources = {tensor.spec.name: tensor for tensor in held_tensors(named, meshes)}
    computed = [_held_group(together, sources) for together in _together(made)]
    return replace(hub, held=tuple(held), groups=(*hub.groups, *computed), excluded=())


@dataclass(frozen=True, slots=True, eq=False)
class _Made:
    """A tensor of the files that has to be computed.

    Attributes:
        tensor: The tensor; its parts are views of results of ``groups``, which have no memory, or of tensors that have.
        groups: The modules whose merging gives these results.
        beside: For each part the model's own tensor that it is a view of; ``None`` where that is a merged one.
    """

    tensor: HeldTensor
    groups: tuple[MergedGroup, ...]
    beside: tuple[HeldTensor | None, ...]

    @property
    def natives(self) -> list[HeldTensor]:
        """The model's tensors that are joined with merged ones, under unique names."""
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


def _beside(
    tensor: HeldTensor, joined: Sequence[HeldTensor], makers: Mapping[int, MergedGroup]
) -> tuple[HeldTensor | None, ...]:
    """For each part the tensor that it is a view of, unless that is a merged one, which no rank has memory of."""
    if len(tensor.parts) == 1:
        return (None,)
    return tuple(
        None
        if native.fragments and _makers(native, makers)
        else native._replace(spec=native.spec._replace(name=f"{tensor.spec.name}/{native.spec.name}"))
        for native in joined
    )


def _together(made: Sequence[_Made]) -> list[list[_Made]]:
    """Tensors of the files, those computed from the same modules in one list."""
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
    """Merges adapted modules, and gives the results the names and shapes of the files."""

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
    """The unique name of what a group reads: several groups may read the same tensor."""
    return f"{group.name}/{name}"


def _makers(tensor: HeldTensor, makers: Mapping[int, MergedGroup]) -> tuple[MergedGroup, ...]:
    """The modules that a tensor of the files is computed from; none for one in memory."""
    found: dict[int, MergedGroup] = {}
    for fragment in tensor.fragments:
        what = deferred(fragment.data)
        if what is not None and what.device.type == "meta":
            raise ModuleStateError(
                "export_merged: a module's own code makes its state from a tensor that an adapter is merged into",
                tensor=tensor.spec.name,
                hint="Leave the module out of the adapter's targets, or set export_merged to false.",
            )
        group = makers.get(storage_key(fragment.data)) if fragment.data.is_meta and what is None else None
        if group is not None:
            found[id(group)] = group
    return tuple(found.values())
