"""Results that the checkpointer returns to its caller."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, slots=True)
class RestoreRecord:
    """The checkpoint that was resumed.

    Attributes:
        epoch: Epoch of the checkpoint; ``None`` where its directory is not called ``epoch_E_step_S``.
        step: Step of the checkpoint; ``None`` in the same case.
        path: Its directory.
        metrics: The metrics it was saved with.
        unrestored: Names of states in the checkpoint that the run did not load, the same on every rank: ``optimizer``,
            ``scheduler``, ``rng`` and extra state that `restore` was not given, and per-rank states (random number
            generators, entries of ``extra_state``) that differed between ranks and were saved on another number of
            ranks.
        fresh: Parameters of this rank's optimizers that the saved one did not update, and that start without state
            (``allow_new_parameters``).
    """

    epoch: int | None
    step: int | None
    path: Path
    metrics: Mapping[str, float] = field(default_factory=dict, hash=False)
    unrestored: tuple[str, ...] = ()
    fresh: tuple[str, ...] = ()
