"""What a recognised checkpoint of another tool is, for whoever opens, lists or verifies it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from shardwise.sources.sources import Source


@dataclass(frozen=True, slots=True)
class OtherModel:
    """The model in another tool's checkpoint.

    Attributes:
        source: Its tensors under the model's own names; each region of a tensor once.
        world_size: The number of ranks that saved it, where the files say so.
        checked: What was compared to know that it is whole: how many of what.
        notes: Notes for a report of an export, one sentence each.
        unchecked: What could not be compared, or differs where ranks hold the same, one sentence each.
    """

    source: Source
    world_size: int | None
    checked: tuple[tuple[int, str], ...] = ()
    notes: tuple[str, ...] = ()
    unchecked: tuple[str, ...] = ()


class Layout(Protocol):
    """A kind of checkpoint, recognised by names of files or by their content. 1. `open`, by one process."""

    @property
    def tool(self) -> str:
        """Who wrote it, for reports."""
        ...

    @property
    def directory(self) -> Path:
        """The directory that has the tensors' files."""
        ...

    @property
    def side(self) -> Path:
        """The directory that has the model's configuration and tokenizer, if there are any."""
        ...

    @property
    def dcp(self) -> Path | None:
        """The DCP directory that it is made of, which is opened as such; ``None`` for any other."""
        ...

    @property
    def has_masters(self) -> bool:
        """Whether there may be master weights beside those of the model."""
        ...

    def open(self) -> OtherModel:
        """Read what all its files say of the tensors, and check that they are whole.

        Raises:
            CheckpointNotFoundError: A file is absent.
            UnsafePickleError, FormatError: A file is damaged, or names what is not read.
            TensorError: The files do not make up a tensor.
            MisuseError: Which of several models is meant is not clear.
        """
        ...
