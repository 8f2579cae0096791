"""Private names of sentence-transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from torch import nn


def model_settings(model: nn.Module) -> object | None:
    """The settings that a SentenceTransformer writes beside its modules; ``None`` where its release has none."""
    settings = getattr(model, "_get_model_config", None)
    return cast("Callable[[], object]", settings)() if callable(settings) else None
