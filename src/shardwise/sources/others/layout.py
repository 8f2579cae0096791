"""What a recognised checkpoint of another tool is, for whoever opens, lists or verifies it."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from shardwise.errors import CheckpointNotFoundError, some
from shardwise.sources.sources import Source


@dataclass(frozen=True, slots=True)
class OtherModel:
    """The model in another tool's checkpoint."""

    source: Source  #: Its tensors under the model's own names; each region of a tensor once.
    world_size: int | None  #: The number of ranks that saved it, where the files say so.
    checked: tuple[tuple[int, str], ...] = ()  #: What was compared to know that it is whole: how many of what.
    notes: tuple[str, ...] = ()  #: Notes for a report of an export, one sentence each.
    unchecked: tuple[str, ...] = ()  #: What could not be compared, or differs between replicas, one sentence each.


@dataclass(frozen=True, slots=True)
class Layout:
    """A kind of checkpoint, recognised by names of files or by their content."""

    tool: str  #: Who wrote it, for reports.
    directory: Path  #: The directory with the tensors' files.
    side: Path  #: That with the model's configuration and tokenizer, if there are any.
    #: Reads what all its files say of the tensors, and checks that they are whole, in one process; raises
    #: `CheckpointNotFoundError`, `UnsafePickleError`, `FormatError`, `TensorError`, or `MisuseError`.
    open: Callable[[], OtherModel]
    dcp: Path | None = None  #: The DCP directory that it is made of, which is opened as such and not by ``open``.
    has_masters: bool = False  #: Whether there may be master weights beside those of the model.


def require_ranks(directory: Path, world: int, found: Collection[int], what: str = "files") -> None:
    """Raise `CheckpointNotFoundError` where a rank's file is not among those ``found``, by rank."""
    missing = [rank for rank in range(world) if rank not in found]
    if missing:
        raise CheckpointNotFoundError(
            f"of the {what} of {world} ranks, {len(missing)} are absent: those of rank {some(missing, 5)}",
            path=directory,
            hint="Every rank wrote one; copy them from the nodes that the others ran on.",
        )
