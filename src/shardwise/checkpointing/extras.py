"""States that are neither model nor optimizer: random number generators, dataloaders, whatever the loop keeps.

A state that is the same on every rank is stored once and restored anywhere. One that differs is stored for each rank
and restored only on the same number of ranks; on another it stays as it is, and the caller is told.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol, cast, runtime_checkable
from urllib.parse import quote, unquote

from shardwise.checkpointing.context import Context
from shardwise.checkpointing.extra_values import as_stateful
from shardwise.checkpointing.generators import RandomState
from shardwise.checkpointing.restoring import Undos
from shardwise.comm import Group
from shardwise.engine.jobs import Step
from shardwise.engine.records import ComponentRecord
from shardwise.engine.statefiles import has_state, read_state, write_state
from shardwise.errors import CheckpointNotFoundError, MisuseError, ShardwiseError, StateFormatError
from shardwise.io.statefiles import pack_state


@runtime_checkable
class Stateful(Protocol):
    """Anything with DCP's two methods of a state."""

    def state_dict(self) -> dict[str, object]:
        """The state."""
        ...

    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        """Take the state in."""
        ...


def capture_steps(context: Context, values: Mapping[str, object], directory: Path) -> list[Step]:
    """Capture named values now and return what is left to do. All ranks call; one may have names of its own.

    Args:
        context: Settings, ranks and storage.
        values: Name -> a `Stateful` object, or a value that JSON and tensors can express.
        directory: Where they go.
    """
    group = context.group
    packed: dict[str, dict[str, bytes]] = {}
    with group.together("capturing extra state"):
        for name, value in values.items():
            if not isinstance(name, str) or name in ("", "."):
                raise MisuseError(f"extra_state has the name {name!r}", hint="Name each state with a word of its own.")
            value = as_stateful(value)
            try:
                packed[name] = pack_state(value.state_dict() if isinstance(value, Stateful) else value)
            except StateFormatError as error:
                error.hint = f"It is part of {name!r}. {error.hint or ''}".strip()
                raise
    digests = {name: _digest(found) for name, found in packed.items()}
    everyone = cast(list[dict[str, str]], group.gather_json(dict(digests), "comparing extra state"))
    shared = {name for name in packed if all(theirs.get(name) == digests[name] for theirs in everyone)}

    def write(group: Group) -> ComponentRecord:
        record = ComponentRecord()
        with group.together(f"writing {directory}"):
            if packed:
                context.storage.make_directory(directory)
            for name, found in packed.items():
                if name in shared and group.is_main:
                    record += write_state(context.storage, directory / quote(name, safe=""), found)
                elif name not in shared:
                    stem = rank_stem(directory, name, group.rank, group.world_size)
                    record += write_state(context.storage, stem, found)
            if packed:
                context.storage.sync_directory(directory)
        return record

    return [write] if any(everyone) else []


def _digest(packed: Mapping[str, bytes]) -> str:
    hasher = hashlib.blake2b(digest_size=16)
    for suffix, content in sorted(packed.items()):
        hasher.update(suffix.encode() + len(content).to_bytes(8, "little") + content)
    return hasher.hexdigest()


def rank_stem(directory: Path, name: str, rank: int, world_size: int) -> Path:
    """Where one rank's state of a name is.

    The number of ranks is part of it, since the state means nothing on another.
    """
    return directory / f"{quote(name, safe='')}_rank_{rank:05d}_of_{world_size:05d}"


@dataclass(frozen=True, slots=True)
class FoundValues:
    """States of named values, read and parsed; nothing has taken them in yet.

    Attributes:
        values: Where the values are, by name; what has no methods of its own is replaced in it.
        states: Name -> the state that was saved.
        skipped: Names that were saved for each rank on another number of ranks, and stay as they are.
    """

    values: MutableMapping[str, object]
    states: Mapping[str, object]
    skipped: tuple[str, ...]

    def take_in(self, undos: Undos) -> None:
        """Put the states in place. Local.

        A `Stateful` object takes its state in, a mutable mapping is refilled, anything else is replaced.

        Raises:
            MisuseError: An object refuses its state.
        """
        for name, state in self.states.items():
            value = as_stateful(self.values[name])
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
    """Read the states of named values. Local, and changes nothing; one rank may have names of its own.

    Raises:
        CheckpointNotFoundError: The checkpoint has no state of a name, or none for this rank.
        StateFormatError: A state is damaged.
    """
    states: dict[str, object] = {}
    skipped: list[str] = []
    for name in values:
        stem = directory / quote(name, safe="")
        own = rank_stem(directory, name, rank, world_size)
        found = stem if has_state(stem) else own if has_state(own) else None
        if found is not None:
            states[name] = read_state(found)
            continue
        worlds = {int(match[3]) for match in _rank_files(directory) if unquote(match[1]) == name}
        if not worlds or world_size in worlds:
            raise CheckpointNotFoundError(
                f"the checkpoint has no extra state {name!r}" + (f" of rank {rank}" if worlds else ""),
                path=directory,
                hint="Leave it out of extra_state, or choose a checkpoint that has it.",
            )
        skipped.append(name)
    return FoundValues(values, states, tuple(skipped))


_RANK_FILE = re.compile(r"(.+)_rank_(\d{5,})_of_(\d{5,})\.json")


def _rank_files(directory: Path) -> list[re.Match[str]]:
    names = sorted(path.name for path in directory.iterdir()) if directory.is_dir() else []
    return [match for match in map(_RANK_FILE.fullmatch, names) if match is not None]


def saved_names(directory: Path) -> list[str]:
    """Names of the states in a directory, of whatever rank."""
    files = sorted(path.name for path in directory.iterdir()) if directory.is_dir() else []
    of_ranks = {match[0]: match[1] for match in _rank_files(directory)}
    stems = [of_ranks.get(file, file.removesuffix(".json")) for file in files if file.endswith(".json")]
    return list(dict.fromkeys(map(unquote, stems)))


def check_generators(state: object) -> None:
    """Find out whether the generators take ``state``, and leave them as they are. Local.

    Raises:
        StateFormatError: They do not.
    """
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
