"""Parameters that modules share: which of their aliases a save writes, and which it records.

A shared tensor is saved once, under one of its names. The manifest lists the aliases that the model does not
declare as tied, so that a model in which the modules have parameters of their own finds the values under each. Where a
tie is declared, a model without it is another model, and misses the tensor.

Other libraries read files and no manifest. Of a model that they build by themselves, a share that is not declared is
therefore written under every name: transformers would give those that are not there new random values.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from shardwise.convert import Conversion, HubTensor, adapter_of, derive, to_hub
from shardwise.errors import ConversionError
from shardwise.plan.fragments import HeldTensor
from shardwise.stateful_wrappers import wrapping
from shardwise.stateful_wrappers.wrapping import unwrap


@dataclass(frozen=True, slots=True, eq=False)
class SharedNames:
    """How the aliases of a part's tensors are saved; names as in the files, except in ``absent``.

    Attributes:
        copies: The tensors again, under the aliases that are written too.
        kept: Undeclared alias -> the name under which the tensor is always written.
        absent: Aliases that are not written, under the model's names and under those of files.
    """

    copies: tuple[HeldTensor, ...] = ()
    kept: Mapping[str, str] = field(default_factory=dict)
    absent: tuple[str, ...] = ()


def shared_names(part: nn.Module, tied: Sequence[tuple[str, HeldTensor]], expected: Collection[str]) -> SharedNames:
    """Decide how aliases are saved. Local.

    ``tied`` has each alias with the held tensor under its kept native name; ``expected`` are declared aliases, see
    `loaders_ties`.
    """
    names = tuple(alias for alias, _ in tied)
    module = unwrap(part)
    if not tied or adapter_of(module) is not None:
        return SharedNames(absent=names)
    aliases = [tensor._replace(spec=tensor.spec._replace(name=alias)) for alias, tensor in tied]
    specs = dict.fromkeys([*(tensor.spec for tensor in aliases), *(tensor.spec for _, tensor in tied)])
    try:
        conversion = derive(module, list(specs))
    except ConversionError:
        # A rule that needs more than these tensors gives them no separate names.
        return SharedNames(absent=names)
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
    return SharedNames(copies, kept, tuple(name for name in dict.fromkeys([*names, *hub_names]) if name not in there))


def _views(tensors: Sequence[HubTensor]) -> list[object]:
    """Each tensor's view of its one native tensor; a unique object where it is made of several."""
    return [tensor.parts[0].view if len(tensor.parts) == 1 else object() for tensor in tensors]
