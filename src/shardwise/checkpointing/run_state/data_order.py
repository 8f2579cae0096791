"""Resumes random numbers and data at the point where a run stopped.

Making an iterator over a ``DataLoader`` draws random numbers: a seed for its workers, and with the first batch one for
the order. The run that was never stopped drew them at the start of its epoch. A run that is resumed in the middle of
one makes its iterator again, and has to go on as if it had not.

`DataOrder.batches` therefore remembers, for each epoch, what the generators were when it began, and how many batches
the loop has had. Resumed in the middle of an epoch, it sets the generators to the start of that epoch, makes the
iterator, skips what the loop has had, and sets the generators to what they were when the checkpoint was saved. Before
it skips the last batch, it sets them to what they were when the loop asked for that one: a loader that reads ahead
(those of accelerate do) then makes the next batch as it did.
"""

from __future__ import annotations

import logging
from collections import ChainMap
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from dataclasses import asdict, dataclass, field, fields, replace
from operator import length_hint
from typing import TypeVar, cast

import torch

from shardwise.checkpointing.loading.restoring import Stateful
from shardwise.checkpointing.run_state.generators import RandomState
from shardwise.errors import MisuseError, StateFormatError

_LOG = logging.getLogger(__name__)
_Batch = TypeVar("_Batch")
_State = dict[str, object]
#: Name of the loader that counts the run's epochs.
TRAIN = "train"
#: The name under which a loader with a position of its own is kept among extra state.
DATALOADER = "dataloader"
#: What to do about a position among another number of ranks.
RESUME_ON_AS_MANY = "Resume on as many ranks, or leave dataloader out: the epoch's data then begin afresh."
_USE_BATCHES = "Iterate over checkpointer.batches(loader, epoch), or use torchdata's StatefulDataLoader."


def has_position(loader: object) -> bool:
    """Whether a loader keeps its own position, as torchdata's ``StatefulDataLoader`` does."""
    return hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")


@dataclass(frozen=True, slots=True)
class OwnPosition:
    """The position that a loader keeps itself, with the number of ranks that it is a position among."""

    loader: Stateful
    world_size: int

    def state_dict(self) -> _State:
        """The position and the number of ranks."""
        return {"world_size": self.world_size, "position": self.loader.state_dict()}

    def load_state_dict(self, state_dict: _State) -> None:
        """Put the loader there; `MisuseError` if it is a position among another number of ranks."""
        if state_dict["world_size"] != self.world_size:
            raise MisuseError(
                f"the position of the {type(self.loader).__name__} was saved on {state_dict['world_size']} ranks, and "
                f"the run has {self.world_size}",
                hint=RESUME_ON_AS_MANY,
            )
        self.loader.load_state_dict(cast(_State, state_dict["position"]))


def with_loader(
    extra_state: MutableMapping[str, object], loader: object | None, world_size: int
) -> MutableMapping[str, object]:
    """Extra state, and in it the loader if it has a position of its own; `MisuseError` if its name is taken. Local."""
    if loader is None or not has_position(loader):
        return extra_state
    if DATALOADER in extra_state:
        raise MisuseError(
            f"extra_state has {DATALOADER!r} too, which is the name of what is passed as dataloader",
            hint="Pass the loader once, as dataloader.",
        )
    return ChainMap(extra_state, {DATALOADER: OwnPosition(cast(Stateful, loader), world_size)})


@dataclass(slots=True)
class Position:
    """The position of a training loop in its data.

    Attributes:
        start: States of the process's generators when the epoch began.
        loader: States of the loader's own generators at that time, by attribute.
        count: Number of batches that the loop has taken.
        is_over: Whether the epoch has no more batches.
        before: States of the process's generators when the last batch was asked for. A loader that reads ahead has made
            the next one with them, in between the draws of the steps.
        now: Of a saved position: states of the loader's own generators at the save.
    """

    epoch: int
    start: _State
    loader: dict[str, torch.Tensor] = field(default_factory=dict)
    count: int = 0
    is_over: bool = False
    before: _State | None = None
    now: dict[str, torch.Tensor] = field(default_factory=dict)

    @staticmethod
    def of(state: object) -> Position:
        """Parse a position as plain containers; `StateFormatError` if it is something else."""
        try:
            table = {"before": None, **cast(_State, state)}  # earlier releases kept no state before the last batch
            # By name: a field that is absent is an error, its default would be another position.
            position = Position(**{each.name: table[each.name] for each in fields(Position)})  # type: ignore[arg-type]
            position.loader, position.now = dict(position.loader), dict(position.now)
            if type(position.epoch) is not int or type(position.count) is not int or position.count < 0:
                raise ValueError("an epoch and a number of batches are whole numbers")
            return position
        except (KeyError, TypeError, ValueError) as error:
            raise StateFormatError(
                f"this is not a position in data ({type(error).__name__}: {error})", hint="Restore the file."
            ) from error


class DataOrder:
    """Tracks a loop's epoch, random numbers and data positions. Local; each rank has its own."""

    def __init__(self) -> None:
        self.epoch = 0
        self._positions: dict[str, tuple[Position, object]] = {}
        self._saved: dict[str, Position] = {}
        self._generators: _State | None = None
        self._is_pending = False
        self._restored: list[object] = []

    def state(self, rank: int) -> _State | None:
        """The positions of all loaders, if any; with the rank, since they mean nothing on another number of ranks."""
        found = {n: replace(place, now=_generators_of(loader)) for n, (place, loader) in self._positions.items()}
        # A loader that the resumed loop has not reached yet keeps its position.
        loaders = {name: asdict(place) for name, place in (self._saved | found).items()}
        return {"rank": rank, "loaders": loaders} if loaders else None

    def check_saved(self, loader: object, save_rng: bool) -> None:
        """Raise `MisuseError` if the position of a loader is not known, or would not be saved. Local."""
        name = type(loader).__name__
        if has_position(loader):
            return
        if not any(each is loader for _, each in self._positions.values()):
            raise MisuseError(f"the position of the {name} passed as dataloader is not known", hint=_USE_BATCHES)
        if not save_rng:
            raise MisuseError(
                f"the position of the {name} passed as dataloader is kept with the random numbers, which save_rng "
                "leaves out",
                hint="Set save_rng to true, or use torchdata's StatefulDataLoader.",
            )

    @staticmethod
    def parsed(state: object) -> dict[str, Position]:
        """Parse what `state` gave; `StateFormatError` if it is something else."""
        loaders = state.get("loaders") if isinstance(state, Mapping) else None
        if not isinstance(loaders, Mapping):
            raise StateFormatError("these are no positions in data", hint="Restore the file.")
        return {str(name): Position.of(each) for name, each in loaders.items()}

    def resume(self, generators: _State | None, positions: dict[str, Position], restored: Iterable[object]) -> None:
        """Continue with restored positions; generators and these objects have been set to their states."""
        self._positions = {}
        self._saved = positions
        self._generators, self._is_pending = generators, generators is not None
        self._restored = [each.loader if isinstance(each, OwnPosition) else each for each in restored]

    def set_generators(self) -> None:
        """Set the generators to what they were when the checkpoint was saved; once after a restore."""
        if self._is_pending and self._generators is not None:
            RandomState().load_state_dict(self._generators)
        self._is_pending = False

    def batches(self, loader: Iterable[_Batch], epoch: int, name: str) -> Iterator[_Batch]:
        """The remaining batches of an epoch; see `Checkpointer.batches`."""
        if name == TRAIN:
            self.epoch = epoch
        before, other = self._positions.get(name, (None, loader))
        if before is not None and other is not loader and before.epoch == epoch and not before.is_over:
            _LOG.warning(
                "two loaders of epoch %d are called %r: the position of the first is not saved any more. Call batches "
                "with another name for one of them",
                epoch,
                name,
            )
        saved = self._saved.pop(name, None)
        if saved is None or saved.epoch != epoch:
            if saved is not None and not saved.is_over and saved.count != length_hint(loader, -1):
                _LOG.warning(
                    "the checkpoint was saved in epoch %d, after %d batches; the loop leaves it for epoch %d",
                    saved.epoch,
                    saved.count,
                    epoch,
                )
            position = Position(epoch, RandomState().state_dict(), _generators_of(loader))
            self._positions[name] = (position, loader)
            return self._counted(iter(loader), position)
        self._positions[name] = (saved, loader)
        if saved.is_over:
            _LOG.debug("the checkpoint was saved after the last batch of epoch %d: no batch of it is left", epoch)
            return iter(())
        return self._counted(self._again(loader, saved), saved)

    def _again(self, loader: Iterable[_Batch], position: Position) -> Iterator[_Batch]:
        """The iterator of an epoch that was begun, at its saved position."""
        if has_position(loader):
            if not any(loader is each for each in self._restored):
                raise MisuseError(
                    f"the {type(loader).__name__} keeps its own position, which restore() was not given",
                    hint="Pass it as dataloader, when saving and when restoring.",
                )
            iterator = iter(loader)
        else:
            if self._generators is not None:
                RandomState().load_state_dict(position.start)
            _set_generators(loader, position.loader)
            iterator = iter(loader)
            for number in range(position.count):
                if number + 1 == position.count and None not in (self._generators, position.before):
                    RandomState().load_state_dict(cast(_State, position.before))
                if next(iterator, _END) is _END:
                    raise MisuseError(
                        f"the loop had {position.count} batches of epoch {position.epoch} when it was saved, and the "
                        f"loader has {number}",
                        hint="Resume with the data, the batch size and the sampler that the checkpoint was saved with.",
                    )
        _set_generators(loader, position.now)
        if self._generators is not None:
            RandomState().load_state_dict(self._generators)
        self._is_pending = False
        return iterator

    @staticmethod
    def _counted(iterator: Iterator[_Batch], position: Position) -> Iterator[_Batch]:
        while True:
            position.before = RandomState().state_dict()
            try:
                batch = next(iterator)
            except StopIteration:
                break
            position.count += 1
            yield batch
        position.is_over = True


_END = object()


def _own_generators(loader: object) -> dict[str, torch.Generator]:
    inner = getattr(getattr(loader, "batch_sampler", None), "sampler", None)
    owners = {"loader": loader, "sampler": getattr(loader, "sampler", None), "batch_sampler": inner}
    found: dict[str, torch.Generator] = {}
    for name, owner in owners.items():
        generator = getattr(owner, "generator", None)
        if isinstance(generator, torch.Generator) and not any(generator is each for each in found.values()):
            found[name] = generator
    return found


def _generators_of(loader: object) -> dict[str, torch.Tensor]:
    return {name: generator.get_state() for name, generator in _own_generators(loader).items()}


def _set_generators(loader: object, states: Mapping[str, torch.Tensor]) -> None:
    for name, generator in _own_generators(loader).items():
        if name in states:
            generator.set_state(states[name])
