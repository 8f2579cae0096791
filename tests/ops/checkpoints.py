"""Small checkpoints, saved by one process."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from shardwise.checkpointing import Checkpointer
from shardwise.config import CheckpointingConfig


def model() -> nn.Module:
    """Three tensors; the first is large enough to be read in several pieces by several threads."""
    generator = torch.Generator().manual_seed(0)
    net = nn.Module()
    net.register_parameter("big", nn.Parameter(torch.randn(300, 200, generator=generator)))
    net.register_parameter("small", nn.Parameter(torch.randn(7, generator=generator)))
    net.register_parameter("empty", nn.Parameter(torch.empty(0, 3)))
    return net


def optimizer(net: nn.Module) -> torch.optim.Optimizer:
    """An optimizer that has taken a step."""
    made = torch.optim.AdamW(net.parameters())
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    made.step()
    return made


def engine(root: Path, **changes: object) -> Checkpointer:
    """A checkpointer whose saves export."""
    values: dict[str, object] = {"checkpoint_dir": str(root), "save_consolidated": "every", **changes}
    return Checkpointer(CheckpointingConfig(**values), 0, 0, 0)  # type: ignore[arg-type]


def saved(root: Path, steps: tuple[int, ...] = (1,), **changes: object) -> Path:
    """A root with checkpoints of these steps; returns the last."""
    net = model()
    optim = optimizer(net)
    with engine(root, **changes) as made:
        for step in steps:
            last = made.save(0, step, net, optim, metrics={"default": 1.0 / step}, extra_state={"seen": [step]})
    assert last is not None
    return last
