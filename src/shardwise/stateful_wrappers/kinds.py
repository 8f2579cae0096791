"""Of which class an optimizer is, and whether a state can be of that class: one's state means nothing to another's."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch.optim import Optimizer

#: What torch's optimizers keep of a parameter. All of them have the shape of the parameter, but for `_OF_NO_SHAPE`.
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
#: Counts steps in nearly every class, and so tells none from another.
_COMMON = {"step"}
#: Options that say how to compute and not what, of which a release of torch may add some.
_FLAGS = {"foreach", "maximize", "capturable", "differentiable", "fused", "decoupled_weight_decay"}


def kind_of(optimizer: Optimizer) -> str:
    """Name of the optimizer's class; of one that only passes on to another (accelerate's), the other's."""
    return type(_inner(optimizer)).__name__


def is_foreign(optimizer: Optimizer, options: Collection[str], keys: Collection[str], own: Collection[str]) -> bool:
    """Whether a state that does not say whose it is provably is not of this optimizer's class.

    Args:
        optimizer: Into which it is to go.
        options: Names of the saved group's options.
        keys: Names under which parameters of the group have state in the checkpoint.
        own: Names under which they have some now.
    """
    inner = _inner(optimizer)
    name = type(inner).__name__
    is_torchs = type(inner) is getattr(torch.optim, name, None)
    known = {*own} | (_STATE_KEYS.get(name, set()) if is_torchs else set())
    has, expects = {*keys} - _COMMON, known - _COMMON
    if has and expects and not has & expects:
        return True
    return is_torchs and bool(set(inner.defaults) - _FLAGS - {*options})


def is_like_parameter(optimizer: Optimizer, key: str) -> bool:
    """Whether the state ``key`` is known to have its parameter's shape."""
    inner = _inner(optimizer)
    name = type(inner).__name__
    is_torchs = type(inner) is getattr(torch.optim, name, None)
    return is_torchs and key in _STATE_KEYS.get(name, set()) - _OF_NO_SHAPE


def _inner(optimizer: Optimizer) -> Optimizer:
    inner = getattr(optimizer, "optimizer", None)
    while isinstance(inner, Optimizer) and inner.param_groups is optimizer.param_groups and inner is not optimizer:
        optimizer, inner = inner, getattr(inner, "optimizer", None)
    return optimizer
