"""AdaLoRA's rank allocator: its running means and the ranks that it kept decide what the next steps do.

No state dict of peft's holds them. They are saved beside the adapter, with the other values that change while it is
trained (`shardwise.peft.extra`).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn as nn

from shardwise.peft.names import join, named_modules
from shardwise.peft.tensors import PEFT_PREFIX, AdapterEntry, entry
from shardwise.stateful_wrappers.names import own_tensors
from shardwise.stateful_wrappers.wrapping import adapted_model, plain_path

if TYPE_CHECKING:
    from peft.tuners.adalora import AdaLoraModel

#: Beginning of these tensors' names in that file.
ALLOCATOR_PREFIX = "rank_allocator."

#: The allocator's running values of each parameter; ``ipt`` is recomputed before it is read. Source:
#: ``peft.tuners.adalora.layer.RankAllocator``.
_MEANS = ("exp_avg_ipt", "exp_avg_unc")

_KEPT = "rank_pattern"


@dataclass(frozen=True, slots=True, eq=False)
class _Allocator:
    """One part's allocator, with the path of the model whose parameters it names, and their plain names -> its names.

    The tuner's ``rankallocator`` holds the means, and the allocator's own configuration the kept ranks.
    """

    tuner: AdaLoraModel
    path: str
    names: Mapping[str, str]

    def kept(self) -> dict[str, list[bool]]:
        found: dict[str, list[bool]] | None = self.tuner.rankallocator.peft_config.rank_pattern
        return dict(found or {})

    def plain(self, name: str) -> str:
        """A parameter's name in the file."""
        return join(self.path, plain_path(name)).removeprefix(PEFT_PREFIX)


def _allocators(parts: Sequence[nn.Module]) -> Iterator[tuple[nn.Module, _Allocator]]:
    if "peft" not in sys.modules:
        return
    from peft.tuners.adalora import AdaLoraModel

    for part in parts:
        for path, module in named_modules(adapted_model(part)):
            if isinstance(module, AdaLoraModel) and hasattr(module, "rankallocator"):
                names = {plain_path(name): name for name, _ in module.model.named_parameters()}
                # Once peft has saved the pattern, the adapter's name is missing from it.
                middle = f".{module.rankallocator.adapter_name}"
                names |= {plain_path(name).replace(middle, ""): name.replace(middle, "") for name in names.values()}
                yield part, _Allocator(module, join(path, "model"), names)


def allocator_entries(parts: Sequence[nn.Module]) -> Iterator[AdapterEntry]:
    """The current state of the parts' allocators, for a save. Local."""
    for _, allocator in _allocators(parts):
        for kind in _MEANS:
            for name, tensor in getattr(allocator.tuner.rankallocator, kind).items():
                plain = allocator.plain(name)
                yield entry(f"{ALLOCATOR_PREFIX}{kind}.{plain}", plain, tensor)
        for name, kept in allocator.kept().items():
            plain = allocator.plain(name)
            yield entry(f"{ALLOCATOR_PREFIX}{_KEPT}.{plain}", plain, torch.tensor(kept, dtype=torch.bool))


@dataclass(frozen=True, slots=True, eq=False)
class AllocatorRestore:
    """State to be read for the parts' allocators."""

    tensors: Mapping[str, torch.Tensor]  #: Name in the file -> memory to read into; not yet the allocators'.
    #: For each allocator and kind, the allocator's names and that memory.
    _given: Sequence[tuple[_Allocator, str, Mapping[str, torch.Tensor]]]

    def install(self) -> None:
        """Replace the allocators' state by what was read. Local."""
        for allocator, kind, values in self._given:
            if kind != _KEPT:
                setattr(allocator.tuner.rankallocator, kind, dict(values))
                if kind == _MEANS[0]:
                    allocator.tuner.rankallocator.ipt = {name: torch.zeros_like(t) for name, t in values.items()}
                continue
            kept = {name: tensor.tolist() for name, tensor in values.items()}
            allocator.tuner.rankallocator.peft_config.rank_pattern = kept or None


def restore_allocators(parts: Sequence[nn.Module], shapes: Mapping[str, Sequence[int]]) -> AllocatorRestore:
    """Allocate memory for a file's allocator state; an allocator without saved state starts again. Local."""
    tensors: dict[str, torch.Tensor] = {}
    given: list[tuple[_Allocator, str, Mapping[str, torch.Tensor]]] = []
    for part, allocator in _allocators(parts):
        parameters = own_tensors(adapted_model(part))
        for kind in (*_MEANS, _KEPT):
            values: dict[str, torch.Tensor] = {}
            for plain, name in allocator.names.items():
                key = f"{ALLOCATOR_PREFIX}{kind}.{allocator.plain(plain)}"
                if key not in shapes:
                    continue
                like = parameters.get(join(allocator.path, plain))
                if kind == _KEPT or like is None:
                    values[name] = torch.zeros(tuple(shapes[key]), dtype=torch.bool)
                else:
                    values[name] = torch.zeros_like(like.detach())
                tensors[key] = values[name]
            given.append((allocator, kind, values))
    return AllocatorRestore(tensors, given)
