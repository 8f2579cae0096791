"""A pipeline stage's own copy of a tied tensor.

One process has one tensor for the embedding and the head, and its files have one; two pipeline stages have one each. So
the last stage may find nothing under its head's name in the files, and is meant to take the embedding.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

from torch import nn

from shardwise.convert import StateDictAdapter, derive, derive_from_adapter
from shardwise.plan.fragments import HeldTensor
from shardwise.stateful_wrappers.names import promised_ties, unwrap
from shardwise.types import TensorSpec


def under_saved_names(
    parts: Sequence[nn.Module], held: Sequence[HeldTensor], available: Collection[str]
) -> list[HeldTensor]:
    """Put copies of tied tensors that the files lack under the name that they are tied to. Local.

    Args:
        parts: This rank's parts.
        held: What it holds, under the names of files.
        available: Names in the files.
    """
    lacking = {tensor.spec.name: tensor.spec for tensor in held if tensor.spec.name not in available}
    found: dict[str, str] = {}
    for part in parts if lacking else ():
        for name, other in promised_ties([part]).items():
            own = _file_name(part, name)
            if own in lacking:
                found[own] = _file_name(part, other)
    return [
        replace(tensor, spec=replace(tensor.spec, name=found[tensor.spec.name]))
        if found.get(tensor.spec.name) in available
        else tensor
        for tensor in held
    ]


def _file_name(part: nn.Module, name: str) -> str:
    """What a tensor that is only renamed is called in the model's files."""
    module = unwrap(part)
    adapter = getattr(module, "state_dict_adapter", None)
    spec = (TensorSpec(name, (1,), "F32"),)
    made = derive_from_adapter(adapter, spec) if isinstance(adapter, StateDictAdapter) else derive(module, spec)
    return made.hub[0].name if len(made.hub) == 1 else name
