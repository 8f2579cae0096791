"""What a recognised checkpoint of another tool is, for whoever opens, lists or verifies it."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from shardwise.errors import CheckpointNotFoundError, some
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


@dataclass(frozen=True, slots=True)
class Layout:
    """A kind of checkpoint, recognised by names of files or by their content.

    Attributes:
        tool: Who wrote it, for reports.
        directory: The directory with the tensors' files.
        side: That with the model's configuration and tokenizer, if there are any.
        open: Reads what all its files say of the tensors, and checks that they are whole, in one process; raises
            `CheckpointNotFoundError`, `UnsafePickleError`, `FormatError`, `TensorError`, or `MisuseError`.
        dcp: The DCP directory that it is made of, which is opened as such and not by ``open``.
        has_masters: Whether there may be master weights beside those of the model.
    """

    tool: str
    directory: Path
    side: Path
    open: Callable[[], OtherModel]
    dcp: Path | None = None
    has_masters: bool = False


def require_ranks(directory: Path, world: int, found: Collection[int], what: str = "files") -> None:
    """Raise `CheckpointNotFoundError` where a rank's file is not among those ``found``, by rank."""
    missing = [rank for rank in range(world) if rank not in found]
    if missing:
        raise CheckpointNotFoundError(
            f"of the {what} of {world} ranks, {len(missing)} are absent: those of rank {some(missing, 5)}",
            path=directory,
            hint="Every rank wrote one; copy them from the nodes that the others ran on.",
        )
