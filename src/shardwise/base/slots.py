"""The tensors of a model and where its modules keep them, each once."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

import torch
from torch import nn

from shardwise.stateful_wrappers.wrapping import plain_name, unwrap
from shardwise.upstream.torch_modules import own_buffers, own_parameters, unsaved_buffers


@dataclass(eq=False)
class Slot:
    """A tensor of the model: a parameter, a buffer, or a plain attribute of a module."""

    name: str  #: Plain name of its first occurrence.
    #: Modules and attributes that refer to this tensor.
    places: list[tuple[nn.Module, str]] = field(default_factory=list)
    kind: str = "parameter"  #: Where modules keep it.

    @property
    def persistent(self) -> bool:
        """Whether it is in the module's state."""
        return any(leaf not in unsaved_buffers(module) for module, leaf in self.places)

    @property
    def tensor(self) -> torch.Tensor:
        """The tensor as it is now."""
        module, leaf = self.places[0]
        found = getattr(module, leaf)
        assert isinstance(found, torch.Tensor)
        return found


def has_meta(slots: Iterable[Slot]) -> bool:
    """Whether one of a model's tensors is on the meta device."""
    return any(slot.tensor.device.type == "meta" for slot in slots)


def names_of(slots: Iterable[Slot], tensors: Collection[torch.Tensor]) -> frozenset[str]:
    """The names under which `initialise` knows some of a model's tensors."""
    ids = {id(tensor) for tensor in tensors}
    return frozenset(slot.name for slot in slots if id(slot.tensor) in ids)


def slots_of(module: nn.Module) -> list[Slot]:
    """Every tensor of a model, each once."""
    found: dict[int, Slot] = {}
    for prefix, inner in unwrap(module).named_modules():
        entries: list[tuple[str, object, str]] = [(k, v, "parameter") for k, v in own_parameters(inner).items()]
        entries += [(k, v, "buffer") for k, v in own_buffers(inner).items()]
        entries += [(k, v, "attribute") for k, v in vars(inner).items()]
        for leaf, value, kind in entries:
            if not isinstance(value, torch.Tensor) or (kind == "attribute" and value.device.type != "meta"):
                continue
            name = plain_name(f"{prefix}.{leaf}" if prefix else leaf)
            slot = found.get(id(value))
            if slot is None:
                slot = found[id(value)] = Slot(name, kind=kind)
            slot.places.append((inner, leaf))
    return list(found.values())
