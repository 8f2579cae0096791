"""A checkpoint's model under the names in files that other tools wrote; `shardwise.base.names` finds them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from torch import nn

from shardwise.base.names import names_in_files, under_names_of_files
from shardwise.checkpointing.hub import HubState
from shardwise.convert import HeldGroup
from shardwise.plan.fragments import HeldTensor
from shardwise.stateful_wrappers.wrapping import is_pretrained, plain_name, unwrap
from shardwise.upstream.torch_modules import unsaved_buffers
from shardwise.upstream.transformers import may_be_unexpected


def in_names_of_files(
    parts: Sequence[nn.Module], hub: HubState, ties: Mapping[str, str], names: Sequence[str]
) -> tuple[HubState, dict[str, str]]:
    """Give this rank's tensors of a model the names that the files have. Local.

    Args:
        parts: This rank's parts.
        hub: The tensors that this rank holds.
        ties: Native alias of a tied tensor -> the native name under which it is kept.
        names: All names in the files.

    Returns:
        ``hub`` and ``ties`` in the names of the files; as they are where the files have the hub's names, or the
        model's own, or where the parts are not of transformers. A tensor that is not there keeps its hub name.

    Raises:
        ConversionError: Two tensors would be read from one.
    """
    available = set(names)
    hub_names = {t.spec.name for t in hub.held} | {s.name for g in hub.groups for s in g.computed.hub}
    has_natives = all(tensor.spec.name in available for tensor in hub.native)
    if hub_names <= available or has_natives or not any(is_pretrained(unwrap(part)) for part in parts):
        return hub, dict(ties)
    by_name = {tensor.spec.name: tensor for tensor in hub.native}
    held: list[HeldTensor] = []
    groups: list[HeldGroup] = []
    found_ties = dict(ties)
    for part in parts:
        module = unwrap(part)
        own = [by_name.pop(name) for name in _names_of(part, parts, hub) if name in by_name]
        _, converted = under_names_of_files(module, own, names)
        own_names = {tensor.spec.name for tensor in own}
        found_ties |= _ties_in_files(module, {a: name for a, name in ties.items() if name in own_names}, names)
        held += converted.held
        groups += converted.groups
    return replace(hub, held=tuple(held), groups=tuple(groups)), found_ties


def _names_of(part: nn.Module, parts: Sequence[nn.Module], hub: HubState) -> list[str]:
    """The names of a part's tensors, in its order."""
    if len(parts) == 1:
        return [tensor.spec.name for tensor in hub.native]
    return [plain_name(name) for name in unwrap(part).state_dict(keep_vars=True)]


def expected_unused(parts: Sequence[nn.Module], names: Iterable[str]) -> list[str]:
    """Names in files that a model expects but does not load: those its class lists, and buffers that it recomputes."""
    patterns: list[str] = []
    for part in parts:
        module = unwrap(part)
        patterns += may_be_unexpected(module)
        if is_pretrained(module):
            # Releases place the module that recomputes them differently, but do not rename it.
            patterns += [rf"(^|\.){re.escape(tail)}$" for tail in sorted(_recomputed(module))]
    if not patterns:
        return []
    search = re.compile("|".join(f"(?:{pattern})" for pattern in patterns)).search
    return [name for name in names if search(name)]


def _recomputed(module: nn.Module) -> set[str]:
    """Names of buffers that are in no file, each with its module's name."""
    found: set[str] = set()
    for name, inner in module.named_modules():
        found |= {f"{name.rpartition('.')[2]}.{buffer}".removeprefix(".") for buffer in unsaved_buffers(inner)}
    return found


def _ties_in_files(module: nn.Module, ties: Mapping[str, str], names: Sequence[str]) -> dict[str, str]:
    """The ties for which the files have the alias, under the files' names."""
    if not ties:
        return {}
    found = names_in_files(module, [*ties, *ties.values()], names)
    return {found[alias]: found.get(name, name) for alias, name in ties.items() if alias in found}
