"""What a whole checkpoint has beside model and optimizer, and finding one to resume from."""

from __future__ import annotations

import logging
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from shardwise.checkpointing.context import Context
from shardwise.checkpointing.extras import (
    FoundValues,
    RandomState,
    capture_steps,
    check_generators,
    find_values,
    saved_names,
)
from shardwise.checkpointing.optimizers import optimizer_components
from shardwise.checkpointing.records import RestoreRecord
from shardwise.comm import JsonValue
from shardwise.engine.jobs import Step
from shardwise.lifecycle import resolve

_LOG = logging.getLogger(__name__)


def locate(context: Context, restore_from: str | Path) -> RestoreRecord | None:
    """Resolve a checkpoint on rank 0 and tell every rank. All ranks call."""

    def find() -> JsonValue:
        found = resolve(context.root, restore_from)
        if found is None:
            return None
        inside = found.path.is_relative_to(context.root)
        path = found.path.relative_to(context.root) if inside else found.path
        return [str(path), found.epoch, found.step, dict(found.metrics)]

    told = context.group.tell(find, f"looking for {restore_from}")
    if told is None:
        return None
    path, epoch, step, metrics = cast(tuple[str, int | None, int | None, dict[str, float]], told)
    # Below each rank's own root, which may be mounted elsewhere than rank 0's.
    return RestoreRecord(epoch, step, context.root / path, metrics)


def capture_extras(context: Context, directory: Path, extra_state: Mapping[str, object]) -> list[Step]:
    """Capture random number generators and extra state now; returns what is left to do. All ranks call."""
    generators = {"rng": RandomState()} if context.config.save_rng else {}
    return [
        *below("rng", capture_steps(context, generators, directory / "rng")),
        *below("extra", capture_steps(context, extra_state, directory / "extra")),
    ]


@dataclass(frozen=True, slots=True)
class FoundExtras:
    """Extra state and generators that were found, read and looked at, on every rank.

    Attributes:
        extra: Extra state.
        generators: The generators' states.
    """

    extra: FoundValues
    generators: FoundValues

    @property
    def skipped(self) -> tuple[str, ...]:
        """What stays as it is on this rank, because it was saved for each of another number of ranks."""
        return self.extra.skipped + self.generators.skipped

    def set_generators(self) -> None:
        """Set the generators, after everything else: what others do may draw numbers. Local."""
        for state in self.generators.states.values():
            RandomState().load_state_dict(cast(dict[str, object], state))


def find_extras(context: Context, directory: Path, extra_state: MutableMapping[str, object]) -> FoundExtras:
    """Read generators and extra state; nothing is changed. All ranks call, one perhaps with names of its own.

    Raises:
        CheckpointNotFoundError: The checkpoint has no state of a name.
        StateFormatError: A state is damaged.
    """
    group = context.group
    found: FoundExtras | None = None
    with group.together("looking for extra state"):
        extra = find_values(extra_state, directory / "extra", group.rank, group.world_size)
        wanted: dict[str, object] = {}
        if context.config.save_rng and "rng" in saved_names(directory / "rng"):
            wanted = {"rng": RandomState()}
        generators = find_values(wanted, directory / "rng", group.rank, group.world_size)
        for state in generators.states.values():
            check_generators(state)
        found = FoundExtras(extra, generators)
    assert found is not None
    return found


def unrestored(
    context: Context, directory: Path, found: FoundExtras, given: Sequence[str], partly: Sequence[str]
) -> tuple[str, ...]:
    """What the checkpoint has and stays as it is in this run, by name; said once, in the log of rank 0. All ranks call.

    Args:
        context: Settings, ranks and storage.
        directory: The checkpoint's.
        found: What was found of extra state and generators.
        given: What this rank restores: ``optimizer``, ``scheduler``, ``rng``, and names of extra state.
        partly: What no rank wants of what is restored; the same on every rank.
    """
    group = context.group

    def tell() -> JsonValue:
        has: list[JsonValue] = [*_components(directory)] if group.is_main else []
        return [has, [*found.skipped], [*given]]

    rows = cast(list[tuple[list[str], list[str], list[str]]], group.gather(tell, "comparing what is restored"))
    wanted = {name for _, _, theirs in rows for name in theirs}
    left = [name for name in rows[0][0] if name not in wanted] + [*partly]
    skipped = list(dict.fromkeys(name for _, theirs, _ in rows for name in theirs))
    if left and group.is_main:
        _LOG.warning("%s also has %s, which restore() was not given: left as it is", directory, ", ".join(left))
    if skipped and group.is_main:
        _LOG.warning("saved on another number of ranks and left as they are: %s", ", ".join(skipped))
    return tuple(dict.fromkeys([*left, *skipped]))


def _components(directory: Path) -> list[str]:
    """What a checkpoint has beside its model."""
    return [
        *optimizer_components(directory / "optim"),
        *saved_names(directory / "extra"),
        *saved_names(directory / "rng"),
    ]


def below(prefix: str, steps: Sequence[Step]) -> list[Step]:
    """The steps with the paths of their records put below ``prefix``."""

    def moved(step: Step) -> Step:
        return lambda group: step(group).below(prefix)

    return [moved(step) for step in steps]
