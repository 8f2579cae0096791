"""The places at which transformers' ``Trainer`` saves and resumes, as methods with plain names.

The Trainer documents a method for each step of its loop but those that read and write checkpoints. Importing this
module imports the Trainer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path

from transformers import Trainer

#: Methods of the Trainer that `TrainerCheckpoints` replaces as a whole, and never calls.
REPLACED = (
    "_save_checkpoint",
    "_load_from_checkpoint",
    "_load_optimizer_and_scheduler",
    "_load_scaler",
    "_load_rng_state",
    "_load_best_model",
)
#: Methods that these call in the Trainer. Nothing calls them any longer.
UNUSED = ("_save", "_save_optimizer_and_scheduler", "_save_scaler", "_save_rng_state")


class TrainerCheckpoints(Trainer, ABC):  # type: ignore[misc] # transformers is not followed by mypy
    """A Trainer whose checkpoints are written and read by the methods below. All ranks call each of them."""

    @abstractmethod
    def begin_epoch(self, epoch: int, is_begun: bool) -> None:
        """Note that the loop enters an epoch; ``is_begun`` where it skips batches that the resumed run has had."""

    @abstractmethod
    def write_checkpoint(self) -> None:
        """Write a checkpoint of the present step."""

    @abstractmethod
    def read_checkpoint(self, checkpoint: Path) -> None:
        """Fill model, optimizer and scheduler, which are prepared for training."""

    @abstractmethod
    def read_best_model(self, checkpoint: Path) -> None:
        """Fill the model."""

    @abstractmethod
    def set_generators(self) -> None:
        """Set the random number generators to what they were when the checkpoint was saved."""

    def _run_epoch(
        self, *, epoch: int, epochs_trained: int, steps_trained_in_current_epoch: int, **others: object
    ) -> object:
        self.begin_epoch(epoch, epoch == epochs_trained and steps_trained_in_current_epoch > 0)
        return super()._run_epoch(
            epoch=epoch,
            epochs_trained=epochs_trained,
            steps_trained_in_current_epoch=steps_trained_in_current_epoch,
            **others,
        )

    def _save_checkpoint(self, model: object, trial: object) -> None:
        self.store_flos()
        self.write_checkpoint()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: object = None) -> None:
        """Nothing: `read_checkpoint` fills the model too, once it is sharded."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            self.read_checkpoint(Path(checkpoint))

    def _load_scaler(self, checkpoint: str | None) -> None:
        """Nothing: `read_checkpoint` has restored the scaler."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            self.set_generators()

    def _load_best_model(self) -> None:
        self.read_best_model(Path(self.state.best_model_checkpoint))
