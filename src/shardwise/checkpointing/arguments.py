"""What callers hand in, looked at before anything is done with it: a mistake is named, and on every rank alike."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence

from torch import nn
from torch.optim import Optimizer

from shardwise.comm import Group
from shardwise.errors import MisuseError


def check_arguments(model: object, optimizer: object = None, scheduler: object = None) -> None:
    """Check that each is what it is called, or a sequence of such.

    Raises:
        MisuseError: One is something else.
    """
    for part in _several(model):
        if not isinstance(part, nn.Module):
            raise _not("model", part, "an nn.Module, or the list of this rank's pipeline stages")
    for each in () if optimizer is None else _several(optimizer):
        if not isinstance(each, Optimizer):
            raise _not("optimizer", each, "a torch.optim.Optimizer, or a list of them")
    for each in () if scheduler is None else _several(scheduler):
        if not (hasattr(each, "state_dict") and hasattr(each, "load_state_dict")):
            raise _not("scheduler", each, "a learning rate scheduler, or a list of them")


def check_together(group: Group, model: object, optimizer: object = None, scheduler: object = None) -> None:
    """As `check_arguments`, so that a mistake of one rank is an error on all. All ranks call."""
    with group.together("looking at what is to be saved or loaded"):
        check_arguments(model, optimizer, scheduler)


def whole_number(value: int) -> int:
    """An integer of any library as Python's own; anything else as it is, for the caller to refuse."""
    try:
        return value if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return value


def check_mapping(key: str, value: object) -> None:
    """Check that an argument that is given by name and value is that.

    Raises:
        MisuseError: It is something else.
    """
    if value is not None and not isinstance(value, Mapping):
        raise _not(key, value, "a dictionary")


def check_stateful(value: object) -> None:
    """Check that an object has the two methods of a state.

    Raises:
        MisuseError: It lacks one.
    """
    if not (hasattr(value, "state_dict") and hasattr(value, "load_state_dict")):
        raise _not("state", value, "an object with state_dict() and load_state_dict()")


def _several(value: object) -> Sequence[object]:
    return value if isinstance(value, Sequence) and not isinstance(value, str) else (value,)


def _not(label: str, value: object, wanted: str) -> MisuseError:
    return MisuseError(f"what was passed as {label} is a {type(value).__name__}", hint=f"Pass {wanted}.")
