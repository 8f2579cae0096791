"""A row of the zoo: a kind of module, how one is made, and what is right for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parameter import is_lazy


class Right(Enum):
    """What may come of saving a module and restoring it into a fresh one.

    SAME: exactly what ``load_state_dict(state_dict())`` does, and nothing else.
    REFUSED: an error that names the module or the tensor; nothing else, since torch itself cannot do it either, or what
        a checkpoint would need is not in the state.
    EITHER: one of the two.
    """

    SAME = "same"
    REFUSED = "refused"
    EITHER = "either"


@dataclass(frozen=True, slots=True)
class Row:
    """A kind of module.

    Attributes:
        name: What it is called in the table.
        build: Makes a fresh one; random values come from torch's seed.
        right: What is right.
        use: What is done with the one that is saved, on top of other random values: a step, a calibration.
        inputs: What both are run on afterwards, to compare what comes out.
        change: Whether the saved one's parameters and buffers are set to values of their own.
        needs: What else has to be importable.
        spreads: How the module is spread over two ranks; the empty name is not at all.
        group: Whether even building it takes a process group.
    """

    name: str
    build: Callable[[], nn.Module]
    right: Right = Right.SAME
    use: Callable[[nn.Module], object] | None = None
    inputs: Callable[[], tuple[object, ...]] | None = None
    change: bool = True
    needs: str = ""
    spreads: tuple[str, ...] = ("ddp", "fsdp2")
    group: bool = False


def change(module: nn.Module) -> None:
    """Give every dense parameter and buffer of the state other values than a fresh module's."""
    seen: set[int] = set()
    with torch.no_grad():
        for value in module.state_dict(keep_vars=True).values():
            if isinstance(value, DTensor):
                value = value._local_tensor
            if not isinstance(value, torch.Tensor) or is_lazy(value) or type(value) not in (torch.Tensor, nn.Parameter):
                continue
            if id(value) in seen or value.layout != torch.strided or value.is_quantized:
                continue
            seen.add(id(value))
            if value.is_floating_point():
                value.add_(torch.rand_like(value))
            elif value.dtype == torch.int64:
                value.add_(1)


def inputs(*shapes: tuple[int, ...]) -> Callable[[], tuple[object, ...]]:
    """Random inputs of some shapes."""
    return lambda: tuple(torch.randn(shape) for shape in shapes)


def indices(*shape: int, most: int = 4) -> Callable[[], tuple[object, ...]]:
    """Random indices."""
    return lambda: (torch.randint(most, shape),)
