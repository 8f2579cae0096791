"""``per_rank_state``: tensors with a different value on each rank, under the same names on all ranks."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from shardwise.checkpointing.session import Session
from shardwise.disk.names import exists
from shardwise.engine.name_suggestions import listed
from shardwise.engine.per_rank import Pair, match_own, own_file, read_own, require_whole, saved_ranks, write_own
from shardwise.engine.records import ComponentRecord, Step, local_step
from shardwise.errors import ConfigError, MisuseError, StateFormatError
from shardwise.format.header import read_header
from shardwise.plan.deferred import refuse_stand_ins
from shardwise.plan.fragments import HeldTensor
from shardwise.stateful_wrappers import ModelState, OptimizerState
from shardwise.stateful_wrappers.optimizer_restore import OptimizerRestore
from shardwise.stateful_wrappers.tensors import MeshRegister, held_tensors
from shardwise.stateful_wrappers.wrapping import unwrap
from shardwise.upstream.torch_modules import own_buffers, own_parameters

_LOG = logging.getLogger(__name__)
#: Metadata key in a rank's file of optimizer state: the parameters that have state of this rank only.
_PARAMETERS = "parameters"


def check_patterns(session: Session, state: ModelState) -> None:
    """Check that each pattern in ``per_rank_state`` names a parameter or buffer of some rank. All ranks call."""
    patterns = session.may_differ.per_rank
    if not patterns:
        return
    names: list[str] = []

    def look() -> list[bool]:
        tensors = state.listing(values=False).tensors
        # A load can fill parameters and buffers in place.
        modules = [module for part in state.model for module in unwrap(part).modules()]
        members = {id(t) for m in modules for t in (*own_parameters(m).values(), *own_buffers(m).values())}
        for named in session.may_differ.own(tensors):
            if id(named.tensor) not in members:
                raise MisuseError(
                    "per_rank_state names what is neither a parameter nor a buffer of the model",
                    tensor=named.name,
                    hint="Pass such state through extra_state, which is kept for each rank where it differs.",
                )
        names.extend([name for named in tensors for name in (named.name, *named.aliases)])
        return [session.may_differ.matches(pattern, names) for pattern in patterns]

    rows = session.group.gather(look, "looking for the tensors of per_rank_state")
    for pattern, *is_matched in zip(patterns, *rows, strict=True):
        if not any(is_matched):
            raise ConfigError(
                f"per_rank_state has {pattern!r}, which matches no tensor of the model on any rank",
                hint="Patterns are as of file names ('*.experts.*') and match whole names, those of state_dict() "
                "without what wrappers add.",
            )


def model_steps(session: Session, state: ModelState, directory: Path) -> list[Step]:
    """Capture this rank's own tensors of a model now, and return the steps that write them. All ranks call."""
    if not session.may_differ.per_rank:
        return []
    check_patterns(session, state)

    def capture() -> list[HeldTensor]:
        own = session.may_differ.own(state.listing(values=False).tensors)
        held = held_tensors(((named.name, named.tensor) for named in own), MeshRegister())
        require_whole(held)
        return session.staged("model.per_rank", held)

    held = session.group.attempt(capture, "capturing each rank's own tensors")
    return [_writing(session, held, directory, {}, bool(held))]


def optimizer_steps(session: Session, state: OptimizerState, directory: Path) -> list[Step]:
    """Do what `model_steps` does for the optimizer state of such parameters. All ranks call."""
    if not session.may_differ.per_rank:
        return []

    def capture() -> tuple[list[str], list[HeldTensor]]:
        parameters = [name for name in state.parameters() if session.may_differ.is_own(name)]
        own = {name for name, parameter in state.owners() if session.may_differ.is_own(parameter)}
        held = [tensor for tensor in state.held() if tensor.spec.name in own]
        require_whole(held)
        return parameters, session.staged("optim.per_rank", held)

    parameters, held = session.group.attempt(capture, "capturing the optimizer's state of each rank's own tensors")
    return [_writing(session, held, directory, {_PARAMETERS: json.dumps(parameters)}, bool(parameters))]


def _writing(
    session: Session, held: Sequence[HeldTensor], directory: Path, metadata: dict[str, str], has_any: bool
) -> Step:
    path = own_file(directory, session.group.rank, session.group.world_size)
    return local_step(
        "writing each rank's own tensors",
        lambda: write_own(held, path, session.storage, metadata) if has_any else ComponentRecord(),
    )


@dataclass(frozen=True, slots=True)
class OwnRead:
    """This rank's own tensors, compared and not yet read, and the parameters with optimizer state of this rank only."""

    path: Path
    pairs: Sequence[Pair] = ()
    parameters: tuple[str, ...] = ()

    def read(self, session: Session) -> None:
        """Read the tensors. Local."""
        if self.pairs:
            read_own(self.path, self.pairs, session.storage, session.threads)


def find_of_model(session: Session, state: ModelState, directory: Path, ranks: int) -> OwnRead | None:
    """Find this rank's own tensors of a model, and compare them, before anything is overwritten. All ranks call.

    Returns ``None`` on all ranks unless as many ranks saved such tensors (``ranks``) as load now.
    """
    check_patterns(session, state)
    if not _is_for(session, directory, ranks):
        return None

    def by_name() -> dict[str, HeldTensor]:
        tensors = state.listing(values=False).tensors
        found = zip(tensors, held_tensors(((each.name, each.tensor) for each in tensors), MeshRegister()), strict=True)
        return {name: tensor for each, tensor in found for name in (each.name, *each.aliases)}

    return session.group.attempt(lambda: _find(session, directory, by_name), "looking for each rank's own tensors")


def find_of_optimizer(session: Session, plan: OptimizerRestore, directory: Path) -> OwnRead | None:
    """As `find_of_model`, for the state that optimizers are about to have. Local."""
    if not _is_for(session, directory, saved_ranks(directory)):
        return None
    return _find(session, directory, lambda: {held.spec.name: held for held in plan.held_as_saved()})


def _find(session: Session, directory: Path, held: Callable[[], dict[str, HeldTensor]]) -> OwnRead:
    path = own_file(directory, session.group.rank, session.group.world_size)
    if not exists(path):
        return OwnRead(path)
    pairs, metadata = match_own(path, held())
    refuse_stand_ins(target for _, target in pairs)
    for saved, target in pairs:
        require_whole([target._replace(spec=saved.spec)])
    try:
        names = json.loads(metadata.get(_PARAMETERS, "[]"))
    except ValueError as error:
        raise StateFormatError(f"{_PARAMETERS} is not JSON: {error}", path=path, hint="Restore the file.") from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise StateFormatError(f"{_PARAMETERS} is not a list of names", path=path, hint="Restore the file.")
    return OwnRead(path, pairs, tuple(names))


def _is_for(session: Session, directory: Path, ranks: int) -> bool:
    """Whether a checkpoint has tensors of each rank for this number of ranks; warns if not."""
    world_size = session.group.world_size
    if ranks == world_size:
        return True
    whole = directory.parent
    if not session.group.is_main or whole in session.warned:
        return False
    session.warned.add(whole)  # one warning for model and optimizer together
    if ranks:
        path = own_file(directory, 0, ranks)
        names = listed([entry.spec.name for entry in read_header(path).entries]) if exists(path) else ""
        _LOG.warning(
            "%s has tensors of each of %d ranks, and these are %d: every rank takes the lowest rank's values%s",
            directory,
            ranks,
            world_size,
            f" of {names}" if names else "",
        )
    elif session.may_differ.per_rank:
        _LOG.warning(
            "%s has no tensors of each rank, which per_rank_state asks for: every rank takes the same values", directory
        )
    return False
