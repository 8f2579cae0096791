"""What an ``accelerate.Accelerator`` has prepared or been given, which no public attribute lists.

Importing this module imports accelerate.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from accelerate import Accelerator

if TYPE_CHECKING:
    from torch import nn


def models_of(accelerator: Accelerator) -> list[nn.Module]:
    """The models that it has prepared."""
    return cast("list[nn.Module]", accelerator._models)


def optimizers_of(accelerator: Accelerator) -> list[object]:
    """The optimizers that it has prepared: each around one of torch's, its ``optimizer``."""
    return cast("list[object]", accelerator._optimizers)


def schedulers_of(accelerator: Accelerator) -> list[object]:
    """The schedulers that it has prepared: each around one of torch's, its ``scheduler``."""
    return cast("list[object]", accelerator._schedulers)


def dataloaders_of(accelerator: Accelerator) -> list[object]:
    """The dataloaders that it has prepared."""
    return cast("list[object]", accelerator._dataloaders)


def objects_of(accelerator: Accelerator) -> list[object]:
    """What ``register_for_checkpointing`` was given."""
    return cast("list[object]", accelerator._custom_objects)
