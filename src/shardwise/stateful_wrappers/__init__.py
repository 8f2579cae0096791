"""Capturing a training run's state, and putting it back: models, optimizers, schedulers, random number generators."""

from shardwise.stateful_wrappers.model import ModelState
from shardwise.stateful_wrappers.optimizer import OptimizerState

__all__ = ["ModelState", "OptimizerState"]
