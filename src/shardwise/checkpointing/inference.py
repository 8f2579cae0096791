"""Calls made inside ``torch.inference_mode``, by an evaluation function that also saves or loads."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")


def outside_inference_mode(function: Callable[P, T]) -> Callable[P, T]:
    """Let a function run as it would outside of ``torch.inference_mode``.

    Every tensor that is made inside of that mode refuses for good to be changed in place outside of it: staging memory
    that the next save fills, an optimizer's state that the next step updates, a parameter that was given its memory.
    """

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        if not torch.is_inference_mode_enabled():
            return function(*args, **kwargs)
        with torch.inference_mode(False):
            return function(*args, **kwargs)

    return call
