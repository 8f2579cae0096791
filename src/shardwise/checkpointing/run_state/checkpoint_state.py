"""Finds the checkpoint to resume from; captures and restores its state beside model and optimizer."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from shardwise.checkpointing.averages import MODEL_EMA
from shardwise.checkpointing.loading.foreign_states import filled, foreign_components, read_states, torch_leftovers
from shardwise.checkpointing.optimizers import optimizer_components
from shardwise.checkpointing.reports import RestoreRecord
from shardwise.checkpointing.run_state.data_order import (
    DATALOADER,
    RESUME_ON_AS_MANY,
    DataOrder,
    has_position,
)
from shardwise.checkpointing.run_state.extra_sharded import OpenedSharded
from shardwise.checkpointing.run_state.extras import (
    FoundValues,
    capture_steps,
    check_generators,
    find_values,
    open_spread,
    saved_names,
    state_of,
)
from shardwise.checkpointing.run_state.generators import RandomState
from shardwise.checkpointing.session import Session
from shardwise.comm import Group, JsonValue
from shardwise.disk.names import is_directory
from shardwise.engine.jobs import Step, below
from shardwise.errors import MisuseError
from shardwise.lifecycle import Start, resolve
from shardwise.lifecycle.resolve import is_verifiable
from shardwise.sources.dcp_values import is_dcp
from shardwise.sources.state_files import has_state

_LOG = logging.getLogger(__name__)
#: Name of the saved positions in data, beside the generators.
BATCHES = "batches"


def locate(session: Session, restore_from: str | Path | int, seen: Callable[[Start], None]) -> RestoreRecord | None:
    """Resolve a checkpoint on rank 0 and broadcast the result. All ranks call.

    On rank 0, ``seen`` is called with the checkpoint found.
    """

    def find() -> JsonValue:
        found = resolve(session.root, restore_from)
        if found is None:
            return None
        seen(Start.at(found.path))
        inside = found.path.is_relative_to(session.root)
        path = found.path.relative_to(session.root) if inside else found.path
        return [str(path), found.epoch, found.step, dict(found.metrics)]

    found = session.group.broadcast_result(find, f"looking for {restore_from}")
    if found is None:
        return None
    path, epoch, step, metrics = cast(tuple[str, int | None, int | None, dict[str, float]], found)
    # Below each rank's own root, which may be mounted elsewhere than rank 0's.
    return RestoreRecord(epoch, step, session.root / path, metrics)


def model_place(directory: Path, group: Group) -> Path:
    """A checkpoint's directory of the model: ``model``, or the DCP directory that holds everything. All ranks call."""
    is_one = group.broadcast_result(
        lambda: not is_directory(directory / "model") and is_dcp(directory), f"looking into {directory}"
    )
    return directory if is_one else directory / "model"


def capture_extras(
    session: Session, directory: Path, extra_state: Mapping[str, object], order: DataOrder
) -> list[Step]:
    """Capture random number generators and extra state now; returns what is left to do. All ranks call."""
    generators: dict[str, object] = {"rng": RandomState()} if session.config.save_rng else {}
    positions = order.state(session.group.rank) if generators else None
    if positions is not None:
        generators[BATCHES] = positions
    return [
        *below("rng", capture_steps(session, generators, directory / "rng")),
        *below("extra", capture_steps(session, extra_state, directory / "extra")),
    ]


@dataclass(frozen=True, slots=True)
class FoundExtras:
    """Extra state and generators that were found, read and looked at, on every rank."""

    extra: FoundValues
    generators: FoundValues
    spread: OpenedSharded

    @property
    def skipped(self) -> tuple[str, ...]:
        """Names of states that stay unchanged on this rank: they were saved for each of another number of ranks."""
        return self.extra.skipped + self.generators.skipped

    def set_generators(self, order: DataOrder) -> None:
        """Set the generators, after everything else, since other code may draw numbers. Local."""
        state = cast("dict[str, object] | None", self.generators.states.get("rng"))
        if state is not None:
            RandomState().load_state_dict(state)
        positions = self.generators.states.get(BATCHES)
        found = {} if positions is None else order.parsed(positions)
        order.resume(state, found, [self.extra.values[name] for name in self.extra.states])


def find_extras(session: Session, directory: Path, extra_state: MutableMapping[str, object]) -> FoundExtras:
    """Read generators and extra state; nothing is changed. All ranks call; a rank may have names that others lack."""
    group = session.group
    # For other tools' checkpoints; ours have a directory of extra state.
    foreign: Mapping[str, object] = {}
    if group.any(bool(extra_state) and not is_directory(directory / "extra"), "looking for extra state"):
        legacy = session.config.allow_legacy_pickle_restore
        foreign = read_states(directory, extra_state, group, legacy)

    def find() -> tuple[FoundValues, FoundValues]:
        own = {name: value for name, value in extra_state.items() if name not in foreign}
        extra = find_values(own, directory / "extra", group.rank, group.world_size)
        states = {name: filled(state_of(extra_state[name]), foreign[name]) for name in extra_state if name in foreign}
        extra = replace(extra, values=extra_state, states={**extra.states, **states})
        wanted: dict[str, object] = {}
        if session.config.save_rng:
            wanted = dict.fromkeys(name for name in saved_names(directory / "rng") if name in ("rng", BATCHES))
        generators = find_values(wanted, directory / "rng", group.rank, group.world_size)
        if group.world_size > 1 and has_state(directory / "rng" / BATCHES):  # not of each rank: there was only one
            states = {name: state for name, state in generators.states.items() if name != BATCHES}
            generators = replace(generators, states=states, skipped=(*generators.skipped, BATCHES))
        if "rng" in generators.states:
            check_generators(generators.states["rng"])
        if BATCHES in generators.states:
            DataOrder.parsed(generators.states[BATCHES])
        return extra, generators

    extra, generators = group.attempt(find, "looking for extra state")
    return FoundExtras(extra, generators, open_spread(session, extra, directory / "extra"))


def require_position(found: FoundExtras, loader: object, directory: Path, group: Group) -> None:
    """Raise `MisuseError` if a loader's position cannot be restored on some rank, and why. All ranks call."""
    with group.together("looking for the position in the data"):
        name, where = (DATALOADER, found.extra) if has_position(loader) else (BATCHES, found.generators)
        if name in where.skipped:
            raise MisuseError(
                f"the position of the {type(loader).__name__} was saved for each rank, on another number of ranks than "
                f"{group.world_size}",
                path=directory,
                hint=RESUME_ON_AS_MANY,
            )
        if name not in where.states:
            raise MisuseError(
                f"the checkpoint has no position of the {type(loader).__name__} passed as dataloader",
                path=directory,
                hint="Choose a checkpoint that was saved with dataloader=..., or leave it out: the epoch's data then "
                "begin afresh.",
            )


def unrestored(
    session: Session,
    directory: Path,
    found: FoundExtras,
    given: Sequence[str],
    partly: Sequence[str],
    model_place: str | None = None,
) -> tuple[str, ...]:
    """Names of states in the checkpoint that this run does not load; rank 0 logs them once. All ranks call.

    This rank restores what is in ``given``: ``optimizer``, ``scheduler``, ``rng``, and names of extra state. ``partly``
    has parts of restored states that no rank loads. In a DCP directory with more than a model, ``model_place`` is the
    prefix of the model's names.
    """
    group = session.group

    def describe() -> JsonValue:
        has: list[JsonValue] = [*_components(directory, model_place)] if group.is_main else []
        return [has, [*found.skipped], [*given]]

    rows = cast(list[tuple[list[str], list[str], list[str]]], group.gather(describe, "comparing what is restored"))
    wanted = {name for _, _, theirs in rows for name in theirs}
    left = [name for name in rows[0][0] if name not in wanted] + [*partly]
    skipped = list(dict.fromkeys(name for _, theirs, _ in rows for name in theirs))
    if left and group.is_main:
        _LOG.warning("%s also has %s, which restore() was not given: left as it is", directory, ", ".join(left))
    if skipped and group.is_main:
        _LOG.warning("saved on another number of ranks and left as they are: %s", ", ".join(skipped))
    return tuple(dict.fromkeys([*left, *skipped]))


def _components(directory: Path, model_place: str | None) -> list[str]:
    """Names of the states in a checkpoint beside its model."""
    others = (
        [] if is_verifiable(directory) else [*foreign_components(directory, model_place), *torch_leftovers(directory)]
    )
    return [
        *others,
        *["ema"] * is_directory(directory / MODEL_EMA),
        *optimizer_components(directory / "optim"),
        *saved_names(directory / "extra"),
        *saved_names(directory / "rng"),
    ]
