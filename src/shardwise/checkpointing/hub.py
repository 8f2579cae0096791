"""What of a model is exported, under which names, and in which dtypes.

A value head around a language model, or a running average, is exported as the language model alone: its files use the
model's own names, and the model's class opens them. Tensors outside that model are written to shards beside the export
under the outer module's names, and loading reads them from there.

A shared tensor is saved once, under one of its names. The manifest lists the aliases that the model does not declare as
tied, so that a model in which the modules have parameters of their own finds the values under each. Where a tie is
declared, a model without it is another model, and misses the tensor. Other libraries read files and no manifest. Of a
model that they build by themselves, a share that is not declared is therefore written under every name: transformers
would give those that are not there new random values.

A loader ties what the configuration says, whatever the files hold: transformers keeps two tensors that differ, others
(vLLM) load one and lose the other. Memory and configuration disagree where a tied model is given new memory
(``to_empty``), where head and embedding are separate FSDP units, and where the configuration is changed later.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast

import torch
from torch import nn

from shardwise.addons.hf_config import untie_configs
from shardwise.convert.adapter import adapter_of, check_adapter, conversion_of, derive_for
from shardwise.convert.derive import derive, kept_out
from shardwise.convert.rules import Conversion, HeldGroup, HubTensor, to_hub
from shardwise.dtypes import FLOATS
from shardwise.errors import ConversionError, MisuseError, NameCollisionError
from shardwise.format.manifest import TensorRecord
from shardwise.geometry import DTYPE_BYTES, TensorSpec
from shardwise.plan.deferred import deferred
from shardwise.plan.fragments import HeldTensor
from shardwise.stateful_wrappers import ModelState, wrapping
from shardwise.stateful_wrappers.memory import Memory, Snapshot
from shardwise.stateful_wrappers.names import Listing, NamedTensor, declared_ties, is_lm_head, loaders_ties
from shardwise.stateful_wrappers.replicas import MayDiffer
from shardwise.stateful_wrappers.tensors import MeshRegister, held_tensors
from shardwise.stateful_wrappers.units import StandIns
from shardwise.stateful_wrappers.wrapping import inner_model, is_pretrained, plain_name, unwrap
from shardwise.upstream.torch_modules import unsaved_buffers
from shardwise.upstream.torch_tensors import local_part


@dataclass(frozen=True)
class HubState:
    """This rank's tensors of the model, under the model's names and under those of its files.

    Attributes:
        native: The held tensors under the model's own names.
        held: The held tensors under the hub's names, as views. For a save some are listed under several names.
        groups: Tensors whose hub form has to be computed.
        absent: Names that other files of this model may have and ours do not: aliases of tied tensors, and tensors that
            the class excludes from its files.
        ties: Native alias of a tied tensor -> the native name under which it is kept.
        copies: Names in ``held`` of tensors that are in ``held`` under another name already.
        kept: Undeclared alias of a shared tensor, as files may have it -> its name in ``held``.
        outside: Names in ``held`` of tensors outside the exported model: an export has them in shards beside it.
        excluded: Tensors that the class excludes from its files and a resume needs, under the model's own names.
        listing: The listing of the model's state, where modules have their own state_dict or load_state_dict code.
        joined: Name in ``held`` of a tensor joined from several native ones -> those, one for each of its parts.
    """

    native: tuple[HeldTensor, ...]
    held: tuple[HeldTensor, ...]
    groups: tuple[HeldGroup, ...]
    absent: tuple[str, ...] = ()
    ties: Mapping[str, str] = field(default_factory=dict)
    copies: frozenset[str] = frozenset()
    kept: Mapping[str, str] = field(default_factory=dict)
    outside: frozenset[str] = frozenset()
    excluded: tuple[HeldTensor, ...] = ()
    listing: Listing | None = None
    joined: Mapping[str, tuple[HeldTensor, ...]] = field(default_factory=dict)

    @property
    def unwritten_aliases(self) -> dict[str, str]:
        """Alias that is not written -> the name under which the tensor is written."""
        return {alias: name for alias, name in self.kept.items() if alias not in self.copies}

    @property
    def native_names(self) -> frozenset[str]:
        """The model's own names."""
        return frozenset(tensor.spec.name for tensor in self.native)

    @property
    def names(self) -> frozenset[str]:
        """The names in files, also of tensors that have to be computed."""
        computed = (spec.name for group in self.groups for spec in group.computed.hub)
        return frozenset((*(tensor.spec.name for tensor in self.held), *computed))


class HubNames:
    """Derives a model's conversion once and applies it at every save and load."""

    def __init__(self, may_differ: MayDiffer | None = None) -> None:
        self._may_differ = may_differ or MayDiffer()
        self._known: dict[tuple[type[nn.Module], tuple[TensorSpec, ...]], Conversion] = {}
        #: The names, aliases and memory of a model's tensors, and what was captured of them.
        self._captured: tuple[object, Memory, HubState] | None = None
        self._last: tuple[Snapshot, HubState] | None = None
        self._stand_ins = StandIns()

    def capture(self, state: ModelState, *, load: bool = False, norms: bool = False) -> HubState:
        """The model's tensors under their names in the files. Local; no element is copied.

        The earlier result is returned while the model's tensors are the same objects at the same addresses.

        A load (``load``) captures no extra state and inspects the modules' loading code again. With ``norms`` torch's
        normalisation layers load their state by their own code.
        """
        if not load and state.is_whole and self._last is not None and self._last[0].holds(state.model):
            return self._last[1]
        listing = state.listing(self._stand_ins, values=not load, norms=norms)
        tensors, modules = listing.tensors, listing.modules
        names, own = [(named.name, named.aliases) for named in tensors], [named.tensor for named in tensors]
        known = self._captured
        if known is None or known[0] != names or not known[1].is_of(own):
            captured = self._capture(state, tensors)  # raises for tensors without memory
            known = self._captured = names, Memory(own), captured
        _, memory, hub = known
        # FSDP2 adds its hooks at the first step: an earlier snapshot is outdated then, though no tensor moved.
        if state.is_whole:
            self._last = None if modules is None else (Snapshot(state.model, memory, modules), hub)
        return hub if modules is not None else replace(hub, listing=listing)

    def _capture(self, state: ModelState, tensors: Sequence[NamedTensor]) -> HubState:
        meshes = MeshRegister(self._may_differ.of_model(tensors, state.model))
        native = held_tensors(((named.name, named.tensor) for named in tensors), meshes)
        # In the model's order: a tied tensor is not always kept under its first name.
        ordered = sorted(zip(tensors, native, strict=True), key=lambda pair: pair[0].position)
        parts = [exported_part(p, [pair for pair in ordered if pair[0].part == n]) for n, p in enumerate(state.model)]
        expected = expected_ties(parts)
        held: list[HeldTensor] = []
        groups: list[HeldGroup] = []
        absent: list[str] = []
        excluded: list[HeldTensor] = []
        copies: list[str] = []
        kept: dict[str, str] = {}
        joined: dict[str, tuple[HeldTensor, ...]] = {}
        ties = {alias: named.name for named in tensors for alias in named.aliases}
        for part in parts:
            own = [tensor for _, tensor in part.own]
            module = unwrap(part.module)
            ignored = None if adapter_of(module) is not None else kept_out(module)
            if ignored is not None:
                held += [tensor for tensor in own if tensor.spec.name not in ignored]
                absent += [tensor.spec.name for tensor in own if tensor.spec.name in ignored]
            else:
                conversion = self._conversion(part.module, own)
                converted = to_hub(conversion, own)
                held += converted.held
                groups += converted.groups
                ignored = frozenset(conversion.ignored)
                absent += conversion.ignored
                joined |= _joined(conversion, own)
            excluded += [tensor for tensor in own if tensor.spec.name in ignored] if ignored else ()
            tied = [(alias, tensor) for named, tensor in part.own for alias in named.aliases]
            again, own_kept, unwritten = shared_names(part.module, tied, expected)
            held += again
            copies += [tensor.spec.name for tensor in again]
            kept |= own_kept
            absent += unwritten
            ties |= part.outer
            ties |= {alias: named.name for named, _ in part.own for alias in named.aliases}
        outside = [tensor for part in parts for tensor in part.outside]
        # Names outside the exported models of tensors that are written under another.
        written = {tensor.spec.name for tensor in held}
        outer = {name: known for part in parts for name, known in part.outer.items()}
        kept |= {name: known for name, known in outer.items() if known in written and name not in written}
        check_outside(outside, held, absent)
        return HubState(
            tuple(native),
            (*held, *outside),
            tuple(groups),
            tuple(absent),
            ties,
            frozenset(copies),
            kept,
            frozenset(tensor.spec.name for tensor in outside),
            tuple(excluded),
            joined=joined,
        )

    def _conversion(self, part: nn.Module, own: Sequence[HeldTensor]) -> Conversion:
        specs = tuple(tensor.spec for tensor in own)
        module = unwrap(part)
        # Models of two classes may have the same tensors and different conversion rules.
        key = (type(module), specs)
        known = self._known.get(key)
        if known is None:
            known = conversion_of(module, specs)
            check_adapter(module, known, specs)
            self._known[key] = known
        return known


def _joined(conversion: Conversion, own: Sequence[HeldTensor]) -> dict[str, tuple[HeldTensor, ...]]:
    several = [hub for hub in conversion.hub if len(hub.parts) > 1]
    natives = {tensor.spec.name: tensor for tensor in own} if several else {}
    return {hub.name: tuple(natives[p.native] for p in hub.parts if p.native in natives) for hub in several}


def require_memory(tensors: Iterable[tuple[str | None, torch.Tensor]], lacking: str) -> None:
    """Raise `MisuseError` if one of a model's tensors is on the meta device and lacks values, or memory."""
    for name, tensor in tensors:
        what = deferred(local_part(tensor)) if tensor.is_meta else None
        if tensor.is_meta and (what is None or what.device.type == "meta"):
            raise MisuseError(
                f"the model is on the meta device and has no {lacking}",
                tensor=name,
                hint="Call initialize_model_weights or load_base_model first.",
            )


def memory_of(held: Iterable[HeldTensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and memory of held tensors."""
    for tensor in held:
        for part in tensor.parts:
            for fragment in part.fragments:
                yield tensor.spec.name, fragment.data


def natives_of(groups: Sequence[HeldGroup]) -> list[HeldTensor]:
    """The native tensors of groups that have to be computed."""
    return [tensor for group in groups for tensor in group.natives]


@dataclass(frozen=True, slots=True, eq=False)
class Recast:
    """This rank's tensors in the base model's dtypes.

    Attributes:
        export: The tensors to export, each in the dtype that the base has it in.
        exact: The original tensors where the base's dtype cannot hold their values exactly: a run that trains in
            float32 from a bfloat16 base exports bfloat16 and resumes from float32.
        native: Name of a tensor exported in another dtype -> its dtype in memory.
        outside: Names of tensors outside the exported model; they are in ``exact``.
    """

    export: Sequence[HeldTensor]
    exact: Sequence[HeldTensor]
    native: Mapping[str, str]
    outside: Collection[str]

    @staticmethod
    def of(held: Sequence[HeldTensor], base: Mapping[str, TensorSpec] | None, outside: Collection[str]) -> Recast:
        """Give tensors the dtypes of the base, where both are of ordinary weights; for shards there is no base."""
        if base is None or not (base or outside):
            return Recast(list(held), [], {}, outside)
        export, exact, native = [], [], {}
        for tensor in held:
            if tensor.spec.name in outside:
                exact.append(tensor)
                continue
            known = base.get(tensor.spec.name)
            have = tensor.spec.dtype
            if known is None or known.dtype == have:
                export.append(tensor)
                continue
            native[tensor.spec.name] = have
            if not {known.dtype, have} <= FLOATS.keys():
                export.append(tensor)
                continue
            export.append(tensor._replace(spec=tensor.spec._replace(dtype=known.dtype)))
            if DTYPE_BYTES[known.dtype] <= DTYPE_BYTES[have]:
                exact.append(tensor)
        return Recast(export, exact, native, outside)


_LOG = logging.getLogger(__name__)


def shared_names(
    part: nn.Module, tied: Sequence[tuple[str, HeldTensor]], expected: Collection[str]
) -> tuple[Sequence[HeldTensor], dict[str, str], Sequence[str]]:
    """How aliases, each with its tensor, are saved; ``expected`` are declared (`loaders_ties`). Local.

    Returns the tensors again, under the aliases that are written too; undeclared alias -> the name under which the
    tensor is always written; and aliases that are not written, under the model's names and under those of files.
    """
    names = tuple(alias for alias, _ in tied)
    module = unwrap(part)
    if not tied or adapter_of(module) is not None:
        return (), {}, names
    aliases = [tensor.renamed(alias) for alias, tensor in tied]
    specs = dict.fromkeys([*(tensor.spec for tensor in aliases), *(tensor.spec for _, tensor in tied)])
    try:
        conversion = derive(module, list(specs))
    except ConversionError:
        # A rule that needs more than these tensors gives them no separate names.
        return (), {}, names
    # huggingface_hub's mixin loads into a model that shares what it shares.
    is_loaded_by_others = wrapping.is_loaded_by_others(module) and not wrapping.is_hub_mixin(module)
    undeclared = {alias for alias in names if alias not in expected} if is_loaded_by_others else set()
    written = [hub for hub in conversion.hub if undeclared.issuperset(each.native for each in hub.parts)]
    natives = {each.native for hub in written for each in hub.parts}
    copies = to_hub(Conversion(tuple(written)), [t for t in aliases if t.spec.name in natives]).held
    kept: dict[str, str] = {}
    for alias, tensor in tied:
        if alias in expected:
            continue
        theirs, ours = conversion.by_native(alias), conversion.by_native(tensor.spec.name)
        if _views(theirs) == _views(ours):
            kept |= {a.name: b.name for a, b in zip(theirs, ours, strict=True)}
    there = {tensor.spec.name for tensor in copies}
    hub_names = [hub.name for alias in names for hub in conversion.by_native(alias)]
    return copies, kept, [name for name in dict.fromkeys([*names, *hub_names]) if name not in there]


def _views(tensors: Sequence[HubTensor]) -> list[object]:
    """Each tensor's view of its one native tensor; a unique object where it is made of several."""
    return [tensor.parts[0].view if len(tensor.parts) == 1 else object() for tensor in tensors]


def ties_by_config(module: nn.Module) -> dict[str, str]:
    """The ties of a transformers model's present configuration, in its own names: tied name -> what it is tied to."""
    module = unwrap(module)
    if not is_pretrained(module):
        return {}
    expand = getattr(module, "get_expanded_tied_weights_keys", None)
    known: object = None
    if callable(expand):
        try:
            known = expand(all_submodels=True)
        except ValueError:
            # A pipeline stage lacks tensors that its class ties; the ties found when the model was built are used.
            known = None
    if not isinstance(known, dict):
        known = getattr(module, "all_tied_weights_keys", None)
    ties = cast("Mapping[str, str]", known) if isinstance(known, dict) else declared_ties([module])
    return {plain_name(str(name)): plain_name(str(source)) for name, source in ties.items() if source}


def expected_ties(parts: Sequence[ExportedPart]) -> frozenset[str]:
    """Names that a loader of these parts ties to others, so that files may lack them.

    None for a model with a tie in its configuration that is not one in memory: it may have to be exported as untied,
    and then its files have to have every name.
    """
    found: set[str] = set()
    for part in parts:
        if not is_pretrained(unwrap(part.module)):
            found |= loaders_ties([part.module]).keys()
            continue
        ties = ties_by_config(part.module)
        places = {name: number for number, (named, _) in enumerate(part.own) for name in (named.name, *named.aliases)}
        there = [(name, source) for name, source in ties.items() if name in places and source in places]
        if all(places[name] == places[source] for name, source in there):
            found |= ties.keys()
    return frozenset(found)


def loose_ties(parts: Sequence[nn.Module], written: Collection[str]) -> dict[str, str]:
    """The configuration's ties with both names in the files of all ranks, ``written``: tied name -> what it is tied to.

    Pipeline stages may have one name of a tie each. A tie with one name in the files is a tie in memory as well.
    """
    found: dict[str, str] = {}
    for module in exported_modules(parts):
        for name, source in ties_by_config(module).items():
            found[file_name(module, name)] = file_name(module, source)
    return {name: source for name, source in found.items() if name in written and source in written}


def settle_ties(ties: Mapping[str, str], tensors: Iterable[TensorRecord], directory: Path) -> bool:
    """Untie a directory's configuration where tensors that it ties were written with different values. Rank 0 calls.

    Two tensors are equal where their digests are; these are of the whole tensors. Returns whether it was changed.
    """
    differ = differing_ties(ties, tensors)
    if not differ:
        return False
    untie_configs(directory)
    name, source = next(iter(differ.items()))
    _LOG.warning(
        "the configuration ties %s to %s%s, and they have different values: tie_word_embeddings is false in the "
        "export. Call model.tie_weights() after giving the model memory, if they are to be one",
        name,
        source,
        f" and {len(differ) - 1} more" if len(differ) > 1 else "",
    )
    return True


def differing_ties(ties: Mapping[str, str], tensors: Iterable[TensorRecord]) -> dict[str, str]:
    """The ties with two written tensors that have different values."""
    written = {tensor.spec.name: (tensor.crc32c, tensor.spec[1:]) for tensor in tensors} if ties else {}
    return {
        name: source
        for name, source in ties.items()
        if name in written and source in written and written[name] != written[source]
    }


def file_name(part: nn.Module, name: str) -> str:
    """Name in the model's files of a tensor that conversion only renames."""
    made = derive_for(unwrap(part), (TensorSpec(name, (1,), "F32"),))
    return made.hub[0].name if len(made.hub) == 1 else name


_Pair = tuple[NamedTensor, HeldTensor]


@dataclass(frozen=True, slots=True, eq=False)
class ExportedPart:
    """A part of the model, divided into what is exported and what is not.

    Attributes:
        module: The exported model.
        own: The exported tensors, under the exported model's names.
        outside: Tensors of the part that are not exported, under the part's names.
        outer: Name outside the exported model of a tensor that it shares -> the exported model's name.
    """

    module: nn.Module
    own: tuple[_Pair, ...]
    outside: tuple[HeldTensor, ...] = ()
    outer: Mapping[str, str] = field(default_factory=dict)


def exported_part(part: nn.Module, own: Sequence[_Pair]) -> ExportedPart:
    """Divide a part's tensors into exported ones and others. Local."""
    inner = inner_model(part)
    if not inner.has_rest and not inner.prefix:
        return ExportedPart(part, tuple(own))
    every = [name for named, _ in own for name in (named.name, *named.aliases)]
    # Names in the part that belong to the inner model -> the inner model's own names.
    theirs = {name: name[len(inner.prefix) :] for name in every if name.startswith(inner.prefix)}
    if inner.prefix and not theirs:
        # A part with its own state_dict() may leave the prefix out, as TRL's value heads do.
        inside_names = {plain_name(name) for name in inner.module.state_dict(keep_vars=True)}
        theirs = {name: name for name in every if name in inside_names}
    ties = declared_ties([inner.module])
    found: list[_Pair] = []
    outside: list[HeldTensor] = []
    outer: dict[str, str] = {}
    for named, held in own:
        names = (named.name, *named.aliases)
        inside = [theirs[name] for name in names if name in theirs]
        if not inside:
            outside.append(held)
            continue
        free = [name for name in inside if name not in ties]
        kept = next((name for name in free if not is_lm_head(name)), (free or inside)[0])
        aliases = tuple(name for name in inside if name != kept)
        found.append((named._replace(name=kept, aliases=aliases), held.renamed(kept)))
        outer |= {name: kept for name in names if name not in theirs}
    return ExportedPart(inner.module, tuple(found), tuple(outside), outer)


def exported_modules(parts: Sequence[nn.Module]) -> list[nn.Module]:
    """The exported model of each part."""
    return [unwrap(inner_model(part).module) for part in parts]


def check_outside(outside: Iterable[HeldTensor], held: Iterable[HeldTensor], absent: Iterable[str]) -> None:
    """Raise `NameCollisionError` if a tensor outside the exported model has a name that the files may have."""
    names = {tensor.spec.name for tensor in outside}
    twice = sorted(names & {*(tensor.spec.name for tensor in held), *absent}) if names else []
    if twice:
        raise NameCollisionError(
            f"a module around the model has a tensor under a name that the model's files use: {twice[0]}",
            tensor=twice[0],
            hint="Rename it in the module, or save the model inside by itself.",
        )


def recomputed_buffers(module: nn.Module) -> set[str]:
    """Names of buffers that are in no file, each with its module's name alone: releases move such modules about."""
    found: set[str] = set()
    for name, inner in module.named_modules():
        found |= {f"{name.rpartition('.')[2]}.{buffer}".removeprefix(".") for buffer in unsaved_buffers(inner)}
    return found
