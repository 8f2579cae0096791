"""A model's adapters before anything is written or read, and their model as the merged export has it.

What the adapter leaves alone is written as the tensors of any export are. A merged tensor is computed from the base
weight and the adapter's tensors of that module, on one of the ranks that hold them, one module at a time.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn

from shardwise.checkpointing.hub import HubNames, HubState, natives_of
from shardwise.checkpointing.session import Session
from shardwise.convert.rules import Computed, HeldGroup
from shardwise.dtypes import torch_dtype
from shardwise.engine.agreement import Agreement
from shardwise.errors import AdapterError, ConversionError, MisuseError, ModuleStateError
from shardwise.geometry import Box
from shardwise.peft.builtin_lora import find_sites
from shardwise.peft.capture import capture_adapter, hold_adapter
from shardwise.peft.check import check_adapter, check_stages
from shardwise.peft.check import check_opens as check_opens_in_peft
from shardwise.peft.config import adapter_settings
from shardwise.peft.diffusers_lora import as_peft, check_opens, require_component
from shardwise.peft.merge import MergedGroup, MergedPart, merged_parts
from shardwise.peft.models import is_peft_adapted
from shardwise.peft.tensors import AdapterTensors
from shardwise.plan.deferred import bound, deferred
from shardwise.plan.fragments import HeldTensor
from shardwise.plan.roster import Roster
from shardwise.plan.views import hub_views
from shardwise.stateful_wrappers import ModelState
from shardwise.stateful_wrappers.replicas import MayDiffer
from shardwise.stateful_wrappers.tensors import MeshRegister, held_tensors
from shardwise.stateful_wrappers.units import refuse_fsdp1
from shardwise.stateful_wrappers.wrapping import is_average
from shardwise.upstream.torch_tensors import storage_key


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
        if not groups:
            held.append(tensor)
            continue
        beside: list[HeldTensor | None] = [None]
        if len(tensor.parts) > 1:
            joined, name = hub.joined.get(tensor.spec.name, ()), tensor.spec.name
            beside = [
                None if native.fragments and _makers(native, makers) else native.renamed(f"{name}/{native.spec.name}")
                for native in joined
            ]
        made.append(_Made(tensor, groups, beside))
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
    computed: list[HeldGroup] = []
    for together in _together(made):
        own = list({id(group): group for each in together for group in each.groups}.values())
        natives = [sources[_source(group, name)] for group in own for name in group.sources]
        for each in together:  # the model's tensors that are joined with merged ones, under unique names
            natives += {tensor.spec.name: tensor for tensor in each.beside if tensor is not None}.values()
        specs = tuple(native.spec for native in natives), tuple(each.tensor.spec for each in together)
        rule = Computed(*specs, MergeRule(own, together), "an adapter is merged into it", has_inverse=False)
        computed.append(HeldGroup(rule, tuple(natives)))
    return replace(hub, held=tuple(held), groups=(*hub.groups, *computed), excluded=())


@dataclass(frozen=True, slots=True, eq=False)
class _Made:
    """A tensor of the files that has to be computed from ``groups``, the modules whose merging gives its parts.

    ``beside`` has for each part the model's own tensor that it is a view of; ``None`` where that is a merged one, which
    no rank has memory of.
    """

    tensor: HeldTensor
    groups: tuple[MergedGroup, ...]
    beside: Sequence[HeldTensor | None]

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


@dataclass(frozen=True, slots=True, eq=False)
class MergeRule:
    """Merges adapted modules, and gives the results the names and shapes of the files."""

    groups: Sequence[MergedGroup]
    made: Sequence[_Made]

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


def capture(
    session: Session, parts: Sequence[nn.Module], config: object | None, stepped: Collection[int] = ()
) -> AdapterTensors:
    """The adapters of this rank's parts, in the layout that the settings promise. Local."""
    return capture_adapter(
        list(parts),
        config,
        v4_compatible=session.config.v4_compatible,
        legacy_paramwrapper_layout=session.config.legacy_paramwrapper_layout,
        base=session.base_name(),
        stepped=stepped,
    )


@dataclass(frozen=True, slots=True)
class Declared:
    """Each rank's layers, where one has a part of a model; whether any rank trains tensors beside the adapter."""

    inventories: tuple[Mapping[str, Sequence[int]], ...]
    extra: bool


def declare(session: Session, captured: AdapterTensors) -> Declared:
    """Gather the layers of the model on each rank; `AdapterError` if a pipeline stage is missing. All ranks call."""
    layers = {path: list(indices) for path, indices in captured.inventory.items()}
    own = layers, bool(captured.cut), session.stage, bool(captured.extra)
    rows = session.group.gather_json(own, "comparing the stages' layers")
    check_stages({stage for _, _, stage, _ in rows})
    # A list with fewer layers than the configuration says is a pruned model; a stage's has keys, or holes.
    inventories = tuple(theirs for theirs, *_ in rows) if any(cut for _, cut, _, _ in rows) else ()
    return Declared(inventories, any(extra for *_, extra in rows))


def diffusers_component(session: Session, parts: Sequence[nn.Module], peft_config: object | None) -> str:
    """The model's name in a pipeline of diffusers, where its adapter is saved for one; else empty."""
    return require_component(parts, peft_config) if session.config.diffusers_compatible else ""


def check_adapter_file(
    roster: Roster,
    settings: Mapping[str, object],
    declared: Declared,
    captured: AdapterTensors,
    name: str,
    parts: Sequence[nn.Module],
    component: str,
) -> None:
    """Raise `AdapterError` unless an adapter's file is complete and its library would open it. Local."""
    specs = [as_peft(spec, component) for spec in roster.specs] if component else roster.specs
    check_adapter(specs, settings, declared.inventories, captured.layers)
    check_opens_in_peft(parts, name, [spec.name for spec in specs], settings)


def hold_extra(session: Session, captured: AdapterTensors, parts: Sequence[nn.Module]) -> tuple[HeldTensor, ...]:
    """The tensors that are trained beside the adapter, as this rank holds them."""
    named = [(entry.spec.name, entry.tensor) for entry in captured.extra]
    return hold_adapter(captured.extra, MeshRegister(session.may_differ.of_adapter(named, parts)))


def check_before_training(session: Session, model: nn.Module | Sequence[nn.Module], *, is_adapted: bool) -> None:
    """Describe and check a model's adapters as a save would, and write nothing. All ranks call.

    With ``is_adapted`` a model without an adapter is refused, too. A configuration that only saves are given (for a
    model's own LoRA) is checked there.
    """
    group = session.group
    session.base_name()  # looked for here, since all ranks have to
    parts = ModelState(model).model

    def kind_of_adapter() -> str:
        refuse_wrappers(parts)
        return "peft" if is_peft_adapted(parts) else "own" if any(find_sites(part) for part in parts) else ""

    kinds = group.gather(kind_of_adapter, "looking at the adapter")
    if not any(kinds):
        if is_adapted:
            raise AdapterError(
                "the model has no adapter, and is_peft is true",
                hint="Adapt it before it is restored, or set is_peft to false.",
            )
        return

    def describe() -> tuple[str, AdapterTensors]:
        component = diffusers_component(session, parts, None)
        return component, capture(session, parts, None) if kinds[group.rank] else AdapterTensors((), {})

    component, captured = group.attempt(describe, "describing the adapter")
    declared, what = declare(session, captured), "describing the adapter's tensors"
    if set(kinds) == {"peft"}:
        settings = adapter_settings(parts, None, group, v4_compatible=session.config.v4_compatible)
        for file in captured.files:
            roster = Agreement(group, session.stage).roster(partial(hold_adapter, file.entries, MeshRegister()), what)
            with group.together(f"checking the adapter {file.adapter_name}"):
                check_adapter_file(
                    roster, settings[file.adapter_name], declared, captured, file.adapter_name, parts, ""
                )
                if component:
                    check_opens(parts, None, file, session.logged)
    if declared.extra:
        Agreement(group, session.stage).roster(partial(hold_extra, session, captured, parts), what)
    if session.config.export_merged:
        with group.together("describing the merged model"):
            merged = merged_parts(parts)
            hub = HubNames(session.may_differ).capture(ModelState([part.model for part in merged]))
            merged_state(hub, parts, merged, session.may_differ)


def refuse_wrappers(parts: Sequence[nn.Module]) -> None:
    """Raise `MisuseError` for FSDP1, and for an average: no adapter file has a place for its count. Local."""
    refuse_fsdp1(parts)
    if any(is_average(part) for part in parts):
        raise MisuseError(
            "the model is an AveragedModel, and is_peft is true: an adapter's files have no place for the average's "
            "n_averaged, which would be lost",
            hint="Save the adapted model, and pass the average as ema; or set is_peft to false.",
        )
