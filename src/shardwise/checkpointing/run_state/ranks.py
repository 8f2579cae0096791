"""States that every rank has one of: one file for each data-parallel rank, or for each process."""

from __future__ import annotations

from pathlib import Path
from typing import cast

from shardwise.checkpointing.loading.restoring import Stateful
from shardwise.checkpointing.session import Session
from shardwise.disk.names import is_file
from shardwise.engine.records import write_state
from shardwise.errors import CheckpointNotFoundError, MisuseError
from shardwise.format.torch_archive import read_torch_value
from shardwise.sources.state_files import has_state, pack_state, read_file, read_state


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
