"""Held tensors under native names -> under the hub's names: the step from capture to the engine's currency."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from shardwise.convert.rules import Computed, Conversion, HubTensor
from shardwise.errors import ConversionError
from shardwise.geometry import TensorSpec
from shardwise.plan.fragments import HeldTensor, seen_through


@dataclass(frozen=True, slots=True, eq=False)
class HeldGroup:
    """This rank's parts of a group that has to be computed. Gather, convert and release one group at a time.

    Attributes:
        computed: The group: its native and hub specs, and the rule that converts whole tensors.
        natives: Its native tensors, as far as this rank holds them.
    """

    computed: Computed
    natives: tuple[HeldTensor, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Converted:
    """A rank's tensors, in the terms of the files.

    Attributes:
        held: Tensors whose fragments are views of the native memory: sources in saving, destinations in loading.
        groups: Tensors that have to be computed.
    """

    held: tuple[HeldTensor, ...]
    groups: tuple[HeldGroup, ...]


def to_hub(conversion: Conversion, held: Sequence[HeldTensor]) -> Converted:
    """Turn tensors under native names into tensors under hub names; no element is copied, no collective.

    A hub tensor is described wherever any native tensor behind it is known, with no fragments where this rank holds
    none of its elements. Its dtype is that of the native tensor; a caller that wants another replaces the spec.

    Raises:
        ConversionError: A tensor is unknown to the conversion, or already converted.
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
    if len(hub.parts) == 1:
        [only] = hub.parts
        tensor = held[only.native]
        if only.view is None and hub.name == only.native:
            return tensor
        spec = TensorSpec(hub.name, hub.shape, tensor.spec.dtype)
        grid = hub.shape if only.view is None else only.view.hub_grid
        return HeldTensor(spec, grid, (seen_through(only.view, tensor.parts[0]),))
    present = [(held[part.native], part.view) for part in hub.parts if part.native in held]
    spec = TensorSpec(hub.name, hub.shape, present[0][0].spec.dtype)
    grids = {hub.shape if view is None else view.hub_grid for _, view in present}
    if len(grids) != 1:
        raise ConversionError(f"the parts of {hub.name!r} are on different grids", tensor=hub.name)
    return HeldTensor(spec, grids.pop(), tuple(seen_through(view, tensor.parts[0]) for tensor, view in present))
