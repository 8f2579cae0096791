"""Accelerate's dataloaders, with their position: which epoch, how many batches, and the random numbers of its start."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from accelerate.data_loader import DataLoaderDispatcher, DataLoaderShard
from accelerate.utils import synchronize_rng_states
from torch.utils.data import RandomSampler

from shardwise.checkpointing.run_state.data_order import DataOrder
from shardwise.checkpointing.run_state.generators import RandomState
from shardwise.errors import MisuseError
from shardwise.integrations.loaders import Pass, first_then, length

if TYPE_CHECKING:
    from torchdata.stateful_dataloader import StatefulDataLoader

_LOG = logging.getLogger(__name__)
_NAME = "loader"
_END = object()


@dataclass(frozen=True, slots=True)
class _Resumed:
    """A position that was restored and that the loop has not come to yet.

    What `Tracked.position` and `Tracked.own_state` gave (``None`` on another number of ranks), and what the process's
    generators were set to.
    """

    position: Mapping[str, object]
    own: object
    generators: dict[str, object]

    @property
    def epoch(self) -> int:
        """The epoch that was begun last."""
        return cast(int, self.position["epoch"])

    @property
    def count(self) -> int:
        """Number of its batches that the loop has had."""
        return cast(int, self.position["count"])

    @property
    def is_over(self) -> bool:
        """Whether nothing of the epoch is left."""
        ends = (0, self.position["length"])
        return self.count in ends or self.position["iteration"] != self.epoch

    @property
    def next_epoch(self) -> int:
        """The epoch that a loop begins which begins one: the same one again if it is not over."""
        iteration = cast(int, self.position["iteration"])
        return iteration + 1 if self.count and self.is_over and iteration == self.epoch else iteration


class Tracked:
    """A loader of accelerate's that notes each epoch's start and counts the batches that the loop has had.

    Mixed into a subclass of the loader's own class. Local, but for what accelerate itself synchronizes at the start of
    an epoch. A loader that keeps its own position (``use_stateful_dataloader``) is left to do so.
    """

    # Of accelerate's loader; the dispatching one has no kinds of generators.
    iteration: int
    rng_types: list[str] | None = None
    synchronized_generator: torch.Generator | None = None
    use_stateful_dataloader: bool
    base_dataloader: StatefulDataLoader

    _order: DataOrder
    _begun: dict[str, object] | None
    _start: dict[str, object] | None
    #: Whether the next epoch's iterator is there: accelerate asks torchdata's loader for its state in the beginning,
    #: which makes one, and making one draws a random number.
    _is_made: bool
    _resumed: _Resumed | None

    def __iter__(self) -> Iterator[object]:
        resumed = self._resumed
        if resumed is not None and self.use_stateful_dataloader and not resumed.is_over:
            return self._by_itself() if resumed.own is not None else self.skipping(resumed.count)
        self._resumed = None
        if resumed is not None and not resumed.is_over:
            _LOG.warning(
                "the checkpoint was saved after %d batches of epoch %d, which begins again; "
                "accelerator.skip_first_batches(dataloader, %d) goes on behind them",
                resumed.count,
                resumed.epoch,
                resumed.count,
            )
        return self._from_start(self.iteration)

    def _by_itself(self) -> Iterator[object]:
        """The rest of an epoch, where the loader itself knows the position."""
        resumed, self._resumed = cast(_Resumed, self._resumed), None
        start, count = resumed.position["generator"], resumed.count
        own = cast("Mapping[str, object]", resumed.own)
        self._set_generator(start)
        self.load_state_dict(own["loader"])  # type: ignore[attr-defined]
        if was_made := bool(resumed.position["was_made"]):
            self.base_dataloader.state_dict()  # makes it
        self._start = cast("dict[str, object]", own["start"])
        RandomState().load_state_dict(self._start)  # of which a sampler without a generator draws the order
        self._begun = {"epoch": resumed.epoch, "generator": start, "count": count, "was_made": was_made}
        for batch in first_then(self._epoch(), resumed.generators):
            count += 1
            self._begun["count"] = count
            yield batch

    def _from_start(self, epoch: int) -> Iterator[object]:
        if self.rng_types:
            synchronize_rng_states(self.rng_types, self.synchronized_generator)
        return self._counted(epoch, self._generator_state(), 0)

    def _counted(self, epoch: int, start: object, count: int) -> Iterator[object]:
        self._begun = {"epoch": epoch, "generator": start, "count": count, "was_made": self._is_made}
        self._is_made = False
        self._start = RandomState().state_dict() if self.use_stateful_dataloader else None
        for batch in self._order.batches(self._epoch(), epoch, _NAME):
            count += 1
            self._begun["count"] = count
            yield batch

    def _epoch(self) -> Pass:
        """One pass over accelerate's own loader."""
        order = {"generator": self.synchronized_generator, "batch_sampler": getattr(self, "batch_sampler", None)}
        return Pass(self, super().__iter__, **order)  # type: ignore[misc]

    def _generator_state(self) -> torch.Tensor | None:
        generator = self.synchronized_generator
        return None if generator is None else generator.get_state()

    def _set_generator(self, state: object) -> None:
        if self.synchronized_generator is not None and isinstance(state, torch.Tensor):
            self.synchronized_generator.set_state(state)

    def position(self) -> dict[str, object]:
        """The position, as far as it is the same on every rank."""
        if self._resumed is not None:
            return dict(self._resumed.position)
        begun = self._begun or {"epoch": self.iteration, "generator": None, "count": 0, "was_made": False}
        seed = getattr(self.get_sampler(), "initial_seed", None)  # type: ignore[attr-defined]
        now = {"now": self._generator_state(), "iteration": self.iteration, "length": length(self), "seed": seed}
        return begun | now

    def own_state(self, rank: int) -> object:
        """The rank's part of the position: generators at the epoch's start, or what the loader itself keeps."""
        if self._resumed is not None:
            return self._resumed.own
        if not self.use_stateful_dataloader:
            return self._order.state(rank)
        return {"loader": self.state_dict(), "start": self._start}  # type: ignore[attr-defined]

    def resume(self, position: Mapping[str, object], own: object) -> None:
        """Take in what `position` and `own_state` gave, the latter ``None`` on another number of ranks."""
        self._order, self._begun = DataOrder(), None
        if self._is_made and position["count"]:  # a run that went on would have to make one
            self.load_state_dict({})  # type: ignore[attr-defined]
            self._is_made = False
        self._resumed = _Resumed(position, own, RandomState().state_dict())
        self.iteration = self._resumed.next_epoch
        self._set_generator(position["now"])
        if own is None and position["seed"] is None and isinstance(self.get_sampler(), RandomSampler):  # type: ignore[attr-defined]
            _LOG.warning(
                "the number of ranks is not that of the checkpoint: the order of the data may be another one. "
                "DataLoaderConfiguration(use_seedable_sampler=True), from the beginning of a run, keeps it"
            )
        if position["seed"] is not None and hasattr(sampler := self.get_sampler(), "initial_seed"):  # type: ignore[attr-defined]
            sampler.initial_seed = position["seed"]

    def skipping(self, number: int) -> Iterator[object]:
        """What is behind the first batches of the epoch that the restored checkpoint was in, or of a new one."""
        if self._resumed is None or number == 0:
            yield from _behind(number, iter(self))
            return
        resumed, self._resumed = self._resumed, None
        self.iteration = resumed.epoch
        start = resumed.position["generator"]
        if resumed.own is not None and number == resumed.count and not self.use_stateful_dataloader:
            self._order.resume(resumed.generators, DataOrder.parsed(resumed.own), ())
            yield from self._counted(resumed.epoch, start, number)
        else:
            self._set_generator(start)
            rest = _behind(number, self._from_start(resumed.epoch))
            RandomState().load_state_dict(resumed.generators)
            yield from rest
        self.iteration = resumed.epoch + 1


class TrackedShard(Tracked, DataLoaderShard):  # type: ignore[misc] # accelerate is not followed by mypy
    """Batches that each rank makes."""


class TrackedDispatcher(Tracked, DataLoaderDispatcher):  # type: ignore[misc] # accelerate is not followed by mypy
    """Batches that the first rank makes for all."""


class Rest:
    """A loader whose next epoch has the batches behind those that are skipped."""

    def __init__(self, loader: Tracked, number: int) -> None:
        self._loader, self._number = loader, number

    def __iter__(self) -> Iterator[object]:
        return self._loader.skipping(self._number)

    def __len__(self) -> int:
        return max(0, len(cast("DataLoaderShard", self._loader)) - self._number)

    def __getattr__(self, name: str) -> object:
        return getattr(self._loader, name)


def tracked(loader: object) -> Tracked | None:
    """The loader with its position; ``None`` of another kind than accelerate makes."""
    cls = {DataLoaderShard: TrackedShard, DataLoaderDispatcher: TrackedDispatcher}.get(type(loader))
    if cls is None:
        return None
    made = cls.__new__(cls)
    vars(made).update(vars(loader))
    made._order, made._begun, made._start, made._resumed = DataOrder(), None, None, None
    made._is_made = made.use_stateful_dataloader
    return made


def _behind(number: int, batches: Iterator[object]) -> Iterator[object]:
    for had in range(number):
        if next(batches, _END) is _END:
            raise MisuseError(
                f"skip_first_batches was asked to skip {number} batches of an epoch that has {had}",
                hint="Count the batches of the epoch, not those of the run.",
            )
    return batches
