"""What an ``accelerate.Accelerator`` has prepared or been given, which no public attribute lists.

Importing this module imports accelerate.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from accelerate import Accelerator

if TYPE_CHECKING:
    from torch import nn


class Prepared(NamedTuple):
    """The accelerator's own lists."""

    models: list[nn.Module]
    optimizers: list[object]  #: Each around one of torch's, its ``optimizer``.
    schedulers: list[object]  #: Each around one of torch's, its ``scheduler``.
    dataloaders: list[object]
    objects: list[object]  #: What ``register_for_checkpointing`` was given.


def lists_of(accelerator: Accelerator) -> Prepared:
    """What it has prepared or been given."""
    return Prepared(
        accelerator._models,
        accelerator._optimizers,
        accelerator._schedulers,
        accelerator._dataloaders,
        accelerator._custom_objects,
    )
