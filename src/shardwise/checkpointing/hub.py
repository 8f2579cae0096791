"""A model's tensors under the names of its Hugging Face files, and in the dtypes of an export."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from shardwise.checkpointing.shared_names import check_outside, expected_ties, exported_part, outer_names, shared_names
from shardwise.convert import Conversion, HeldGroup, adapter_of, check_adapter, conversion_of, kept_out, to_hub
from shardwise.dtypes import FLOATS
from shardwise.errors import MisuseError
from shardwise.geometry import DTYPE_BYTES, TensorSpec
from shardwise.plan.deferred import deferred
from shardwise.plan.fragments import HeldTensor
from shardwise.stateful_wrappers import ModelState
from shardwise.stateful_wrappers.memory import Memory, Snapshot
from shardwise.stateful_wrappers.names import Listing, NamedTensor
from shardwise.stateful_wrappers.replicas import MayDiffer
from shardwise.stateful_wrappers.tensors import MeshRegister, held_tensors
from shardwise.stateful_wrappers.units import StandIns
from shardwise.stateful_wrappers.wrapping import unwrap
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

    @property
    def once(self) -> HubState:
        """The same state with each tensor once, for loading."""
        if not self.copies:
            return self
        return replace(self, held=tuple(t for t in self.held if t.spec.name not in self.copies), copies=frozenset())


@dataclass(frozen=True, slots=True, eq=False)
class _Captured:
    """A captured state, and the tensors and names it was captured from."""

    names: list[str]
    aliases: list[tuple[str, tuple[str, ...]]]
    memory: Memory
    state: HubState


class HubNames:
    """Derives a model's conversion once and applies it at every save and load."""

    def __init__(self, may_differ: MayDiffer | None = None) -> None:
        self._may_differ = may_differ or MayDiffer()
        self._known: dict[tuple[type[nn.Module], tuple[TensorSpec, ...]], Conversion] = {}
        self._captured: _Captured | None = None
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
        names, own = [named.name for named in tensors], [named.tensor for named in tensors]
        aliases = [(named.name, named.aliases) for named in tensors if named.aliases]
        known = self._captured
        if known is None or known.names != names or known.aliases != aliases or not known.memory.is_of(own):
            captured = self._capture(state, tensors)  # raises for tensors without memory
            known = self._captured = _Captured(names, aliases, Memory(own), captured)
        # FSDP2 adds its hooks at the first step: an earlier snapshot is outdated then, though no tensor moved.
        if state.is_whole:
            self._last = None if modules is None else (Snapshot(state.model, known.memory, modules), known.state)
        return known.state if modules is not None else replace(known.state, listing=listing)

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
            shared = shared_names(part.module, tied, expected)
            held += shared.copies
            copies += [tensor.spec.name for tensor in shared.copies]
            kept |= shared.kept
            absent += shared.absent
            ties |= part.ties
        outside = [tensor for part in parts for tensor in part.outside]
        kept |= outer_names(parts, held)
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
