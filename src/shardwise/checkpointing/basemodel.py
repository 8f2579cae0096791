"""Materialising models and loading base weights into them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from shardwise.checkpointing.base import snapshot_directory
from shardwise.errors import CheckpointNotFoundError, MisuseError
from shardwise.stateful_wrappers.names import unwrap

if TYPE_CHECKING:
    from shardwise.checkpointing.checkpointer import Checkpointer


def initialize_model_weights(model: nn.Module, device: torch.device, peft_init_method: str | None) -> None:
    """Give meta-device parameters and buffers memory on ``device``, and fresh values by the model's own code."""
    module = unwrap(model)
    if any(t.device.type == "meta" for t in [*module.parameters(), *module.buffers()]):
        module.to_empty(device=device)
    else:
        module.to(device)
    initialise = getattr(module, "initialize_weights", None) or getattr(module, "init_weights", None)
    if callable(initialise):
        with torch.no_grad():
            initialise()
    tie = getattr(module, "tie_weights", None)
    if callable(tie):
        tie()


def load_base_model(
    checkpointer: Checkpointer,
    model: nn.Module | Sequence[nn.Module],
    device: torch.device,
    root_dir: str | Path | None,
    model_name: str | None,
    load: bool,
) -> None:
    """Materialise a model and fill it from its base."""
    parts = [model] if isinstance(model, nn.Module) else list(model)
    for part in parts:
        initialize_model_weights(part, device, None)
    if not load:
        return
    if model_name is None:
        raise MisuseError("no base model is named", hint="Pass model_name, a hub id or a directory.")
    path = Path(model_name)
    if not path.exists():
        found = snapshot_directory(Path(root_dir), model_name) if root_dir is not None else None
        if found is None:
            raise CheckpointNotFoundError(
                f"the base model {model_name} is not in the cache",
                path=root_dir,
                hint="Download it first (hf download), or pass a directory.",
            )
        path = found
    checkpointer.load_model(model, path, is_init_step=True)
