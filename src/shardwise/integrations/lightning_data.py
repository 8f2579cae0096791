"""Lightning's dataloaders, with their position: which epoch, how many batches, and the random numbers of its start."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from typing import cast

from torch.utils.data import DataLoader

from shardwise.checkpointing.run_state.data_order import DataOrder
from shardwise.checkpointing.run_state.generators import RandomState
from shardwise.comm import Group
from shardwise.integrations.loaders import Pass, first_then, length

_LOG = logging.getLogger(__name__)
_NAME = "loader"
#: The key by which a position is found among what Lightning saves.
_MARK = "shardwise.position"
_END = object()


class Resumable:
    """A ``DataLoader`` whose state is its position. Mixed into a subclass of the loader's own class; local.

    What the loader itself keeps (torchdata's ``StatefulDataLoader``) is part of the state.
    """

    _order: DataOrder
    _epoch: int
    _sets_epoch: bool
    _saved: Mapping[str, object] | None
    _generators: dict[str, object] | None

    def __iter__(self) -> Iterator[object]:
        # Nothing happens before the first batch: by then Lightning has told the sampler its epoch.
        saved, self._saved = self._saved, None
        generators, self._generators = self._generators, None
        self._epoch += saved is None
        set_epoch = getattr(getattr(self, "sampler", None), "set_epoch", None)
        if self._sets_epoch and set_epoch is not None:
            set_epoch(self._epoch)
        if saved is not None and generators is None:
            generators = RandomState().state_dict()
        if saved is None or generators is None:
            yield from self._order.batches(self._pass(), self._epoch, _NAME)
        elif self.keeps_position:
            yield from first_then(self._pass(), generators)
        elif saved["own"] is not None:
            self._order.resume(generators, DataOrder.parsed(saved["own"]), ())
            yield from self._order.batches(self._pass(), self._epoch, _NAME)
        else:
            rest = self._order.batches(self._pass(), self._epoch, _NAME)
            for _ in range(cast(int, saved["count"])):
                next(rest, _END)
            RandomState().load_state_dict(generators)
            yield from rest

    def _pass(self) -> Pass:
        """One pass over the loader itself."""
        order = {name: getattr(self, name, None) for name in ("generator", "sampler", "batch_sampler")}
        return Pass(self, super().__iter__, **order)  # type: ignore[misc]

    @property
    def keeps_position(self) -> bool:
        """Whether the loader has a position of its own."""
        return hasattr(super(), "state_dict")

    def state_dict(self) -> dict[str, object]:
        """The position."""
        return {_MARK: self._saved or self._position()}

    def _position(self) -> dict[str, object]:
        group = Group.current()
        order = self._order.state(group.rank)
        found = cast("dict[str, dict[str, object]]", order["loaders"])[_NAME] if order is not None else {}
        count = found.get("count", 0)
        is_over = not count or bool(found.get("is_over")) or count == length(self)
        own = super().state_dict() if self.keeps_position else order  # type: ignore[misc]
        return {"epoch": self._epoch, "count": count, "is_over": is_over, "world": group.world_size, "own": own}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Go on at a position. What the loader keeps by itself is taken in on the same number of ranks only."""
        saved = dict(cast("Mapping[str, object]", state[_MARK]))
        self._order, self._epoch, self._saved = DataOrder(), cast(int, saved["epoch"]), None
        if saved["is_over"]:
            return
        if saved["world"] != Group.current().world_size:
            saved["own"] = None
            _LOG.warning(
                "the checkpoint was saved on another number of ranks, after %s batches of an epoch: %s",
                saved["count"],
                "this loader begins it again" if self.keeps_position else "so many of each rank are skipped",
            )
        if self.keeps_position:
            if saved["own"] is None:
                return
            super().load_state_dict(saved["own"])  # type: ignore[misc]
        self._saved = saved

    def go_on_with(self, generators: dict[str, object]) -> None:
        """Say what the process's generators are to be when the first batch after a restored position is there."""
        self._generators = generators


def resumable(loader: object, sets_epoch: bool) -> object:
    """The loader with its position; anything but a ``DataLoader`` as it is.

    If it ``sets_epoch``, it tells the sampler its epoch: for a host that counts from 0 in every process.
    """
    if not isinstance(loader, DataLoader) or isinstance(loader, Resumable):
        return loader
    cls = type(loader)
    made = cast("Resumable", object.__new__(type(cls.__name__, (Resumable, cls), {})))
    vars(made).update(vars(loader))
    vars(made).update(_order=DataOrder(), _epoch=-1, _sets_epoch=sets_epoch, _saved=None, _generators=None)
    return made


def without_own(state: object, is_over: bool) -> tuple[object, list[object]]:
    """A state tree whose positions have lost what is each rank's own, and that, in the order of the tree.

    If ``is_over``, all positions count as those of epochs that are over.
    """
    own: list[object] = []

    def strip(position: Mapping[str, object]) -> Mapping[str, object]:
        own.append(position["own"])
        return {**position, "own": None, "is_over": is_over or position["is_over"]}

    return _mapped(state, strip), own


def with_own(state: object, own: list[object]) -> object:
    """What `without_own` has taken apart; positions without an own part where there are none."""
    rest = iter(own)
    return _mapped(state, lambda position: {**position, "own": next(rest, None)})


def _mapped(state: object, change: Callable[[Mapping[str, object]], Mapping[str, object]]) -> object:
    if isinstance(state, Mapping):
        return {key: change(value) if key == _MARK else _mapped(value, change) for key, value in state.items()}
    return [_mapped(each, change) for each in state] if isinstance(state, list) else state
