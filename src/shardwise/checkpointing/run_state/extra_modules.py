"""Which modules in extra state are saved by all ranks together, and which by each rank for itself."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import TypeAlias, cast

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from shardwise.comm import Group, JsonValue

#: A module on one rank: whether it has DTensors; a digest of its state; the names in it.
_Row: TypeAlias = tuple[bool, str, list[str]]


def shared_modules(values: Mapping[str, object], group: Group) -> list[str]:
    """Names of the modules with one state, spread over the ranks or the same on all of them. All ranks call.

    Other modules have a separate state on each rank, such as metrics that a rank counts for itself.
    """

    def describe() -> JsonValue:
        rows = {name: _row(value) for name, value in values.items() if isinstance(value, nn.Module)}
        return cast(JsonValue, {name: row for name, row in rows.items() if row is not None})

    everyone = cast(list[dict[str, _Row]], group.gather(describe, "looking at modules in extra state"))
    names = sorted({name for theirs in everyone for name in theirs})
    return [name for name in names if _is_one([theirs.get(name) for theirs in everyone])]


def _is_one(rows: Sequence[_Row | None]) -> bool:
    there = [row for row in rows if row is not None]
    if len(there) < len(rows):
        return False
    if any(has_shards for has_shards, _, _ in there) or len({digest for _, digest, _ in there}) == 1:
        return True
    # Stages of a pipeline, each with other tensors.
    names = [name for _, _, own in there for name in own]
    return len(names) == len(set(names))


def _row(module: nn.Module) -> _Row | None:
    """A module's row; ``None`` where its state has other values than tensors."""
    state = module.state_dict()
    if not all(isinstance(value, torch.Tensor) for value in state.values()):
        return None
    if any(isinstance(value, DTensor) for value in state.values()):
        return True, "", []
    hasher = hashlib.blake2b(digest_size=16)
    for name, value in state.items():
        hasher.update(f"{name} {value.dtype} {tuple(value.shape)};".encode())
        if value.device.type == "meta" or value.layout is not torch.strided or value.is_quantized:
            return True, "", []  # saving the module describes it, or refuses it
        flat = value.detach().cpu().contiguous().reshape(-1)
        if flat.numel():
            hasher.update(memoryview(flat.view(torch.uint8).numpy()))
    return False, hasher.hexdigest(), list(state)
