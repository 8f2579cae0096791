"""The class of an optimizer, and whether a saved state can belong to it: another class cannot use the state."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import torch
from torch.optim import Optimizer

#: The state that torch's optimizers keep of a parameter. All have its shape, except `_OF_NO_SHAPE`.
#: Source: the `step` methods in `torch.optim`. A class that is not listed here is judged by its options alone.
_STATE_KEYS = {
    "ASGD": {"ax", "eta", "mu"},
    "Adadelta": {"square_avg", "acc_delta"},
    "Adagrad": {"sum"},
    "Adam": {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"},
    "AdamW": {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"},
    "Adamax": {"exp_avg", "exp_inf"},
    "NAdam": {"exp_avg", "exp_avg_sq", "mu_product"},
    "RAdam": {"exp_avg", "exp_avg_sq"},
    "RMSprop": {"square_avg", "momentum_buffer", "grad_avg"},
    "Rprop": {"prev", "step_size"},
    "SGD": {"momentum_buffer"},
}
_OF_NO_SHAPE = {"eta", "mu", "mu_product"}
#: Counts steps in nearly every class, and so identifies none.
_COMMON = {"step"}
#: Options that choose the implementation, not the result; a release of torch may add some.
_FLAGS = {"foreach", "maximize", "capturable", "differentiable", "fused", "decoupled_weight_decay"}


def is_torchs_own(optimizer: Optimizer) -> bool:
    """Whether the optimizer's class is one of torch's."""
    return type(optimizer) is getattr(torch.optim, type(optimizer).__name__, None)


def is_foreign(optimizer: Optimizer, options: Collection[str], keys: Collection[str], own: Collection[str]) -> bool:
    """Whether a state without a recorded class provably belongs to another class than this optimizer's.

    Given are the names of the saved group's options, of its parameters' state in the checkpoint, and of their own now.
    """
    name, is_torchs = type(optimizer).__name__, is_torchs_own(optimizer)
    known = {*own} | (_STATE_KEYS.get(name, set()) if is_torchs else set())
    has, expects = {*keys} - _COMMON, known - _COMMON
    if has and expects and not has & expects:
        return True
    return is_torchs and bool(set(optimizer.defaults) - _FLAGS - {*options})


def is_like_parameter(optimizer: Optimizer, key: str) -> bool:
    """Whether the state ``key`` is known to have its parameter's shape."""
    return is_torchs_own(optimizer) and key in _STATE_KEYS.get(type(optimizer).__name__, set()) - _OF_NO_SHAPE


def equal(a: object, b: object) -> bool:
    """Whether two options, or two dictionaries of them, are the same."""
    return alike(a, b, torch.equal, lambda x, y: bool(x == y))


def alike(
    a: object,
    b: object,
    tensors: Callable[[torch.Tensor, torch.Tensor], bool],
    values: Callable[[object, object], bool],
) -> bool:
    """Whether containers have the same structure, and tensors and other values that are the same by two criteria."""
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        return isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and tensors(a, b)
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(alike(a[key], b[key], tensors, values) for key in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(alike(x, y, tensors, values) for x, y in zip(a, b, strict=True))
    return values(a, b)
