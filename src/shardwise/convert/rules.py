"""Conversions: which native tensor, seen through which view, gives which tensor of the Hugging Face files. Pure.

`to_hub` applies one: held tensors under native names -> under the hub's, the step from capture to the engine's
currency.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch

from shardwise.errors import ConversionError
from shardwise.geometry import TensorSpec
from shardwise.plan.fragments import HeldTensor, seen_through
from shardwise.plan.views import AxisView

#: A native tensor is described as one of a file is: name (FQN), global shape, safetensors dtype code.
NativeSpec = TensorSpec


class HubPart(NamedTuple):
    """The contribution of one native tensor to a hub tensor."""

    native: str  #: FQN of the native tensor.
    #: Where its elements lie; ``None`` where the two tensors are the same but for the name.
    view: AxisView | None = None


class HubTensor(NamedTuple):
    """A tensor of the Hugging Face files that is made of views of native tensors."""

    name: str  #: Name in the files.
    shape: tuple[int, ...]  #: Global shape.
    parts: tuple[HubPart, ...]  #: Disjoint, together the whole; the views of all parts share one hub grid.


class Rule(Protocol):
    """Code that converts the whole tensors of one group. Pure, no collectives; called with whole tensors."""

    def forward(self, natives: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Native tensors by FQN to hub tensors by name."""

    def backward(self, hub: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Hub tensors by name to native tensors by FQN."""


@dataclass(frozen=True, slots=True)
class Computed:
    """A group of tensors with a conversion that no view expresses: converted whole, one group at a time."""

    natives: tuple[NativeSpec, ...]  #: The native tensors of the group.
    hub: tuple[TensorSpec, ...]  #: The hub tensors that they become.
    rule: Rule  #: The code that does it, in both directions.
    reason: str  #: Why no view expresses it.
    #: Whether loading undoes it. Without an inverse it may only be exported beside state for resuming.
    has_inverse: bool = True


@dataclass(frozen=True)
class Conversion:
    """Native tensors to hub tensors."""

    hub: tuple[HubTensor, ...]  #: Tensors that are views of native ones.
    computed: tuple[Computed, ...] = ()  #: Groups that have to be computed.
    ignored: tuple[str, ...] = ()  #: FQNs that the model keeps out of its files.
    _by_name: dict[str, HubTensor] = field(init=False, repr=False, compare=False, default_factory=dict)
    _by_native: dict[str, list[HubTensor]] = field(init=False, repr=False, compare=False, default_factory=dict)

    def __post_init__(self) -> None:
        for tensor in self.hub:
            self._by_name[tensor.name] = tensor
            for native in dict.fromkeys(part.native for part in tensor.parts):
                self._by_native.setdefault(native, []).append(tensor)
        computed = (spec.name for group in self.computed for spec in group.hub)
        counts = Counter([*(tensor.name for tensor in self.hub), *computed])
        clashes = sorted(name for name, count in counts.items() if count > 1)
        if clashes:
            raise ConversionError(
                f"several native tensors would be written as one: {', '.join(clashes[:5])}",
                tensor=clashes[0],
                hint="The conversion rules of the model type are ambiguous; give the model a state_dict_adapter, or "
                "correct the one it has.",
            )

    def by_hub(self, name: str) -> HubTensor:
        """The tensor of the files called ``name``, which is a view: one of a `Computed` group is an error."""
        found = self._by_name.get(name)
        if found is None:
            raise ConversionError(f"no native tensor is a view of {name!r}", tensor=name)
        return found

    def by_native(self, name: str) -> tuple[HubTensor, ...]:
        """The tensors of the files that look into the native tensor ``name``; none for an ignored or computed one."""
        return tuple(self._by_native.get(name, ()))

    @property
    def names(self) -> tuple[str, ...]:
        """All names in the files, those of views first."""
        return (*self._by_name, *(spec.name for group in self.computed for spec in group.hub))


@dataclass(frozen=True, slots=True, eq=False)
class HeldGroup:
    """This rank's parts of the native tensors of a computed group. Gather, convert and release one group at a time."""

    computed: Computed
    natives: tuple[HeldTensor, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Converted:
    """A rank's tensors, in the terms of the files."""

    #: Tensors whose fragments are views of the native memory: sources in saving, destinations in loading.
    held: tuple[HeldTensor, ...]
    groups: tuple[HeldGroup, ...]  #: Tensors that have to be computed.


def to_hub(conversion: Conversion, held: Sequence[HeldTensor]) -> Converted:
    """Turn tensors under native names into tensors under hub names; no element is copied, no collective.

    A hub tensor is described wherever any native tensor behind it is known, with no fragments where this rank holds
    none of its elements. Its dtype is that of the native tensor; a caller that wants another replaces the spec.
    """
    by_name = {tensor.spec.name: tensor for tensor in held}
    groups = (
        HeldGroup(computed, tuple(by_name[spec.name] for spec in computed.natives if spec.name in by_name))
        for computed in conversion.computed
    )
    elsewhere = {spec.name for computed in conversion.computed for spec in computed.natives}
    elsewhere.update(conversion.ignored)
    wanted: dict[str, HubTensor] = {}
    for name, tensor in by_name.items():
        if len(tensor.parts) != 1 or tensor.parts[0].part.view is not None:
            raise ConversionError(f"{name!r} is already converted", tensor=name, hint="Convert native tensors only.")
        found = conversion.by_native(name)
        if not found and name not in elsewhere:
            raise ConversionError(
                f"{name!r} is unknown to the conversion", tensor=name, hint="Derive it from all tensors of the model."
            )
        wanted.update((hub.name, hub) for hub in found)
    views = tuple(_convert(hub, by_name) for hub in wanted.values())
    return Converted(views, tuple(group for group in groups if group.natives))


def _convert(hub: HubTensor, held: dict[str, HeldTensor]) -> HeldTensor:
    if hub.parts == (HubPart(hub.name),):
        return held[hub.name]
    present = [(held[part.native], part.view) for part in hub.parts if part.native in held]
    spec = TensorSpec(hub.name, hub.shape, present[0][0].spec.dtype)
    grids = {hub.shape if view is None else view.hub_grid for _, view in present}
    if len(grids) != 1:
        raise ConversionError(f"the parts of {hub.name!r} are on different grids", tensor=hub.name)
    return HeldTensor(spec, grids.pop(), tuple(seen_through(view, tensor.parts[0]) for tensor, view in present))
