"""torchtitan's fused attention projections, whose checkpoints have q, k and v apart, as torchtitan's own have.

``FusedQKVLinear`` divides its one tensor by hooks, which gather it whole on every rank where it is sharded. Here the
hooks are taken off, and each rank writes the rows that it holds: dividing only rearranges rows, so that it is a view.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torchtitan.models.common.attention import FusedQKVLinear

from shardwise.stateful_wrappers.wrapping import plain_name
from shardwise.upstream.torch_modules import take_off_hooks

if TYPE_CHECKING:
    from torch import nn

_FUSED, _APART = "wqkv", ("wq", "wk", "wv")


@dataclass(frozen=True, slots=True)
class Projections:
    """The fused projections of one attention: the size of a head, and the heads of q for each one of k and of v."""

    head: int
    queries: int

    def divided(self, fused: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """q, k and v of a weight or bias, whose rows are, for each head of k: its heads of q, k, v."""
        tail = fused.shape[1:]
        heads = fused.reshape(-1, self.queries + 2, self.head, *tail)
        ends = (0, self.queries, self.queries + 1, self.queries + 2)
        return tuple(heads[:, start:end].reshape(-1, *tail) for start, end in pairwise(ends))

    def fused(self, apart: Sequence[torch.Tensor]) -> torch.Tensor:
        """The tensor that `divided` has divided."""
        tail = apart[0].shape[1:]
        counts = (self.queries, 1, 1)
        heads = [each.reshape(-1, count, self.head, *tail) for each, count in zip(apart, counts, strict=True)]
        return torch.cat(heads, dim=1).reshape(-1, *tail)


@dataclass(frozen=True, slots=True)
class FusedProjections:
    """Those of a model, by the plain name of the module that has them."""

    known: Mapping[str, Projections]

    def divided(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The model's tensors by name, with q, k and v apart."""
        found: dict[str, torch.Tensor] = {}
        for name, tensor in tensors.items():
            module, of, kind = name.rpartition(f".{_FUSED}.")
            if of and module in self.known:
                apart = self.known[module].divided(tensor)
                found |= {f"{module}.{part}.{kind}": each for part, each in zip(_APART, apart, strict=True)}
            else:
                found[name] = tensor
        return found

    def fused(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The tensors by name of which `divided` has made these; whatever lacks its neighbours stays as it is."""
        found = dict(tensors)
        for name in tensors:
            module, of, kind = name.rpartition(f".{_APART[0]}.")
            apart = [f"{module}.{part}.{kind}" for part in _APART]
            if of and module in self.known and all(each in found for each in apart):
                found[f"{module}.{_FUSED}.{kind}"] = self.known[module].fused([found.pop(each) for each in apart])
        return found


def take_over(parts: Sequence[nn.Module]) -> FusedProjections:
    """The fused projections of a model, which give their one tensor from now on when they are asked for their state."""
    known: dict[str, Projections] = {}
    for part in parts:
        for name, module in part.named_modules():
            if isinstance(module, FusedQKVLinear):
                take_off_hooks(module, FusedQKVLinear.__module__)
                known[plain_name(f"{name}.")[:-1]] = Projections(module.head_dim, module.heads_per_kv)
    return FusedProjections(known)
