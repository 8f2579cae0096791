"""State beside model and optimizer: random number generators, dataloaders, values that the loop keeps.

A state that is the same on every rank is stored once and restored anywhere. One that differs is stored for each rank
and restored only on the same number of ranks; on another number it is left alone, and the caller gets its name.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import cast
from urllib.parse import quote, unquote

from torch import nn
from torch.distributed.tensor import DTensor

from shardwise.checkpointing.averages import MODEL_EMA
from shardwise.checkpointing.loading.foreign_optimizers import filled, foreign_components, read_states, torch_leftovers
from shardwise.checkpointing.loading.restoring import Stateful, Undos
from shardwise.checkpointing.optimizers import optimizer_components
from shardwise.checkpointing.reports import RestoreRecord
from shardwise.checkpointing.run_state.data_order import (
    DATALOADER,
    RESUME_ON_AS_MANY,
    DataOrder,
    has_position,
)
from shardwise.checkpointing.run_state.extra_sharded import (
    SHARDS,
    OpenedSharded,
    directory_of,
    fill_tree,
    module_steps,
    open_module,
    open_tensors,
    shared_modules,
    split_tree,
    tensor_steps,
)
from shardwise.checkpointing.run_state.generators import RandomState, as_stateful
from shardwise.checkpointing.session import Session
from shardwise.comm import Group, JsonValue
from shardwise.disk.names import is_directory, is_file, names_in
from shardwise.engine.records import ComponentRecord, Step, below, write_state
from shardwise.errors import CheckpointNotFoundError, MisuseError, ShardwiseError, StateFormatError
from shardwise.format.torch_archive import read_torch_value
from shardwise.lifecycle import Start, resolve
from shardwise.lifecycle.resolve import is_verifiable
from shardwise.sources.dcp_values import is_dcp
from shardwise.sources.state_files import has_state, joined, pack_state, read_file, read_state

_LOG = logging.getLogger(__name__)
#: Name of the saved positions in data, beside the generators.
BATCHES = "batches"


def capture_steps(session: Session, values: Mapping[str, object], directory: Path) -> list[Step]:
    """Capture named values now, and return the steps that write them. All ranks call; names may differ between them."""
    group = session.group
    packed, spread, modules = _captured(values, group)
    digests = {name: hashlib.blake2b(joined(found), digest_size=16).hexdigest() for name, found in packed.items()}
    own = {name: [digest, name in spread] for name, digest in digests.items()}
    everyone = cast(list[dict[str, tuple[str, bool]]], group.gather_json(cast(JsonValue, own), "comparing extra state"))
    shared = {n for n, digest in digests.items() if all(theirs.get(n, ("",))[0] == digest for theirs in everyone)}

    def write(group: Group) -> ComponentRecord:
        record = ComponentRecord()
        with group.together(f"writing {directory}"):
            if packed:
                session.storage.make_directory(directory)
            for name, found in packed.items():
                if name in shared and group.is_main:
                    record += write_state(session.storage, directory / quote(name, safe=""), found)
                elif name not in shared:
                    stem = rank_stem(directory, name, group.rank, group.world_size)
                    record += write_state(session.storage, stem, found)
            if packed:
                session.storage.sync_directory(directory)
        return record

    steps: list[Step] = [write] if any(everyone) else []
    for name in sorted({name for theirs in everyone for name, (_, is_spread) in theirs.items() if is_spread}):
        steps += tensor_steps(session, name, spread.get(name, {}), directory)
    for name in modules:
        steps += module_steps(session, name, cast(nn.Module, values[name]), directory)
    return steps


def _captured(
    values: Mapping[str, object], group: Group
) -> tuple[dict[str, dict[str, bytes]], dict[str, dict[str, DTensor]], list[str]]:
    """Each name's encoded state, its DTensors, and the names of modules that all save together. All ranks call."""
    packed: dict[str, dict[str, bytes]] = {}
    spread: dict[str, dict[str, DTensor]] = {}

    def take(name: str, value: object) -> None:
        rest, found = split_tree(state_of(as_stateful(value)))
        if found:
            spread[name] = found
        try:
            packed[name] = pack_state(rest)
        except StateFormatError as error:
            error.hint = f"It is part of {name!r}. {error.hint or ''}".strip()
            raise

    with group.together("capturing extra state") as has_modules:
        for name, value in values.items():
            if not isinstance(name, str) or name in ("", "."):
                raise MisuseError(f"extra_state has the name {name!r}", hint="Use a word as the name of each state.")
            if isinstance(value, nn.Module):
                has_modules.flag = True
            else:
                take(name, value)
    if not has_modules.any:
        return packed, spread, []
    modules = shared_modules(values, group)
    with group.together("capturing modules in extra state"):
        for name, value in values.items():
            if isinstance(value, nn.Module) and name not in modules:
                take(name, value)
    return packed, spread, modules


def rank_stem(directory: Path, name: str, rank: int, world_size: int) -> Path:
    """The stem of one rank's state; with the number of ranks, since the state is meaningless on another number."""
    return directory / f"{quote(name, safe='')}_rank_{rank:05d}_of_{world_size:05d}"


@dataclass(frozen=True, slots=True)
class FoundValues:
    """States of named values, read and parsed, not yet loaded.

    Attributes:
        values: The values by name; those without methods are replaced in this mapping.
        skipped: Names of states that were saved for each of another number of ranks, and stay unchanged.
        spread: Names of modules that were saved by all ranks together, and are restored by them.
        tensors: Name -> its DTensors, read after the other states have been loaded.
    """

    values: MutableMapping[str, object]
    states: Mapping[str, object]
    skipped: tuple[str, ...]
    spread: tuple[str, ...] = ()
    tensors: Mapping[str, Mapping[str, DTensor]] = field(default_factory=dict)

    def load_spread(self) -> None:
        """Load the state of objects with DTensors, once these have been read. Local."""
        for name, tensors in self.tensors.items():
            value = self.values[name]
            if isinstance(value, Stateful):
                value.load_state_dict(cast(dict[str, object], fill_tree(self.states[name], tensors)))

    def take_in(self, undos: Undos) -> None:
        """Put the states in place; an object may refuse its own (`MisuseError`). Local.

        A `Stateful` object loads its state, a mutable mapping is refilled, anything else is replaced.
        """
        for name, state in self.states.items():
            value = as_stateful(self.values[name])
            if name in self.tensors:
                if isinstance(value, Stateful):
                    continue  # when its tensors have been read
                state = fill_tree(state, self.tensors[name])
            if isinstance(value, Stateful):
                try:
                    undos.load(f"extra state {name!r}", value, cast(dict[str, object], state))
                except ShardwiseError:
                    raise
                except Exception as error:
                    raise MisuseError(
                        f"the saved extra state {name!r} does not fit: its {type(value).__name__} refuses it with "
                        f"{type(error).__name__}: {error}",
                        hint="Leave it out of extra_state, or pass what the checkpoint was saved with.",
                    ) from error
            elif isinstance(value, MutableMapping) and isinstance(state, Mapping):
                undos.refill(f"extra state {name!r}", value, dict(state))
            else:
                undos.add(f"extra state {name!r}", partial(self.values.__setitem__, name, value))
                self.values[name] = state


def find_values(values: MutableMapping[str, object], directory: Path, rank: int, world_size: int) -> FoundValues:
    """Read the states of named values. Local, and changes nothing; a rank may have names that others lack."""
    states: dict[str, object] = {}
    skipped: list[str] = []
    spread: list[str] = []
    tensors: dict[str, dict[str, DTensor]] = {}
    for name, value in values.items():
        stem = directory / quote(name, safe="")
        own = rank_stem(directory, name, rank, world_size)
        found = stem if has_state(stem) else own if has_state(own) else None
        if found is not None:
            states[name] = read_state(found)
            if is_directory(directory_of(directory, name)):
                tensors[name] = split_tree(state_of(value))[1]
            continue
        if is_directory(directory_of(directory, name)) and not _of_ranks(directory, name):
            if not isinstance(value, nn.Module):
                raise MisuseError(
                    f"extra state {name!r} was saved of a module, and a {type(value).__name__} is to be restored",
                    path=directory_of(directory, name),
                    hint="Pass the module.",
                )
            spread.append(name)
            continue
        worlds = _of_ranks(directory, name)
        if not worlds or world_size in worlds:
            raise CheckpointNotFoundError(
                f"the checkpoint has no extra state {name!r}" + (f" of rank {rank}" if worlds else ""),
                path=directory,
                hint="Leave it out of extra_state, or choose a checkpoint that has it.",
            )
        skipped.append(name)
    return FoundValues(values, states, tuple(skipped), tuple(spread), tensors)


def _of_ranks(directory: Path, name: str) -> set[int]:
    """By how many ranks a state was saved for each of them."""
    return {int(match[3]) for match in _rank_files(directory) if unquote(match[1]) == name}


def state_of(value: object) -> object:
    """The state that a named value has now."""
    return value.state_dict() if isinstance(value, Stateful) else value


_RANK_FILE = re.compile(r"(.+)_rank_(\d{5,})_of_(\d{5,})\.json")


def _rank_files(directory: Path) -> list[re.Match[str]]:
    names = names_in(directory) if is_directory(directory) else []
    return [match for match in map(_RANK_FILE.fullmatch, names) if match is not None]


def saved_names(directory: Path) -> list[str]:
    """Names of the states in a directory, of whatever rank."""
    files = names_in(directory) if is_directory(directory) else []
    of_ranks = {match[0]: match[1] for match in _rank_files(directory)}
    stems = [of_ranks.get(file, file.removesuffix(".json")) for file in files if file.endswith(".json")]
    stems += [file.removesuffix(SHARDS) for file in files if file.endswith(SHARDS)]
    return list(dict.fromkeys(map(unquote, stems)))


def open_spread(session: Session, found: FoundValues, directory: Path) -> OpenedSharded:
    """Open what is spread over the ranks, and compare it. All ranks call; nothing is changed."""
    group = session.group
    own: JsonValue = [cast(JsonValue, list(found.spread)), cast(JsonValue, list(found.tensors))]
    everyone = cast(list[tuple[list[str], list[str]]], group.gather_json(own, "comparing extra state"))
    modules = sorted({name for names, _ in everyone for name in names})
    tensors = sorted({name for _, names in everyone for name in names})
    for name in modules:
        lacking = [rank for rank, (names, _) in enumerate(everyone) if name not in names]
        if lacking:
            raise MisuseError(
                f"extra state {name!r} is a module that all ranks restore together, and rank {lacking[0]} passed none",
                path=directory_of(directory, name),
                hint="Pass the module on every rank.",
            )
    opened = [open_module(session, name, cast(nn.Module, found.values[name]), directory) for name in modules]
    loads = [open_tensors(session, name, found.tensors.get(name, {}), directory) for name in tensors]
    return OpenedSharded(opened, loads, found.load_spread)


def check_generators(state: object) -> None:
    """Raise `StateFormatError` unless the generators can load ``state``; they stay unchanged. Local."""
    generators = RandomState()
    had = generators.state_dict()
    try:
        generators.load_state_dict(cast(dict[str, object], state))
    except Exception as error:
        raise StateFormatError(
            f"the saved state of the random number generators cannot be used ({type(error).__name__}: {error})",
            hint="Choose another checkpoint, or set save_rng to false to go on with fresh generators.",
        ) from error
    finally:
        generators.load_state_dict(had)


def _stem(path: Path, state_name: str, rank: str) -> Path:
    if not state_name or "/" in state_name or state_name.startswith("."):
        raise MisuseError(f"{state_name!r} cannot be the name of a state", hint="Use a plain word.")
    return path / state_name / f"{state_name}_{rank}"


def save_rank_state(session: Session, state: Stateful, state_name: str, path: Path, rank: str, writes: bool) -> None:
    """Write ``path/state_name/state_name_<rank>.json``. All ranks call; those with ``writes`` write."""
    with session.group.together(f"writing {state_name} of every rank"):
        stem = _stem(path, state_name, rank)
        if writes:
            session.storage.make_directory(stem.parent)
            write_state(session.storage, stem, pack_state(state.state_dict()))
            session.storage.sync_directory(stem.parent)


def load_rank_state(session: Session, state: Stateful, state_name: str, path: Path, rank: str) -> None:
    """Read what `save_rank_state` wrote for ``rank``, or another tool by ``torch.save`` (``.pt``). All ranks call."""
    with session.group.together(f"reading {state_name} of every rank"):
        stem = _stem(path, state_name, rank)
        theirs = stem.with_name(f"{stem.name}.pt")
        if not has_state(stem) and is_file(theirs):
            legacy = session.config.allow_legacy_pickle_restore
            found = read_torch_value(read_file(theirs), str(theirs), state_name, legacy=legacy)
            state.load_state_dict(cast("dict[str, object]", found))
            return
        if not has_state(stem):
            raise CheckpointNotFoundError(
                f"no {state_name} was saved for {rank.replace('_', ' ')}",
                path=stem.with_name(stem.name + ".json"),
                hint="It was saved on fewer ranks; restore on the same number, or start this state afresh.",
            )
        state.load_state_dict(cast(dict[str, object], read_state(stem)))


def locate(session: Session, restore_from: str | Path | int, seen: Callable[[Start], None]) -> RestoreRecord | None:
    """Resolve a checkpoint on rank 0, which calls ``seen`` with it, and broadcast the result. All ranks call."""

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
    with group.together("looking for extra state") as vote:
        vote.flag = bool(extra_state) and not is_directory(directory / "extra")
    if vote.any:
        legacy = session.config.allow_legacy_pickle_restore
        foreign = read_states(directory, extra_state, group, legacy)

    def find() -> tuple[FoundValues, FoundValues]:
        own = {name: value for name, value in extra_state.items() if name not in foreign}
        extra = find_values(own, directory / "extra", group.rank, group.world_size)
        states = {name: filled(state_of(extra_state[name]), foreign[name]) for name in extra_state if name in foreign}
        extra = replace(extra, values=extra_state, states={**extra.states, **states})
        saved = saved_names(directory / "rng") if session.config.save_rng else []
        wanted: dict[str, object] = dict.fromkeys(name for name in saved if name in ("rng", BATCHES))
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
        return [has, [*found.extra.skipped, *found.generators.skipped], [*given]]

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
    is_ours = is_verifiable(directory)
    return [
        *([] if is_ours else [*foreign_components(directory, model_place), *torch_leftovers(directory)]),
        *["ema"] * is_directory(directory / MODEL_EMA),
        *optimizer_components(directory / "optim"),
        *saved_names(directory / "extra"),
        *saved_names(directory / "rng"),
    ]
