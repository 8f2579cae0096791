"""The order of the data of accelerate's loaders on another number of ranks, all of which are made in this process."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from accelerate.state import AcceleratorState, PartialState
from torch.utils.data import DataLoader

from shardwise.integrations.accelerate import Rest, Tracked, tracked

SAMPLES, SAMPLES_OF_A_STEP = 40, 4
STEPS = SAMPLES // SAMPLES_OF_A_STEP


@pytest.fixture(autouse=True)
def fresh_state() -> Iterator[None]:
    """accelerate's loaders ask it for the process, and it keeps that for whoever is next."""
    PartialState(cpu=True)
    yield
    AcceleratorState._reset_state(True)


def loaders_of(world: int, seedable: bool = True) -> list[Tracked]:
    """Each rank's loader, in a run that has begun with the same seed."""
    loader = DataLoader(range(SAMPLES), batch_size=SAMPLES_OF_A_STEP // world, shuffle=True)  # type: ignore[arg-type]
    made = [
        tracked(
            prepare_data_loader(
                loader,
                device=torch.device("cpu"),
                num_processes=world,
                process_index=rank,
                use_seedable_sampler=seedable,
                data_seed=3 if seedable else None,
            )
        )
        for rank in range(world)
    ]
    return [each for each in made if each is not None]


def steps_of(ranks: list[Iterator[object]]) -> Iterator[list[int]]:
    """The samples of each step, of all ranks together."""
    for batches in zip(*ranks, strict=True):
        yield sorted(int(sample) for batch in batches for sample in batch)  # type: ignore[attr-defined]


def epoch_of(loaders: list[Tracked]) -> list[list[int]]:
    return list(steps_of([iter(each) for each in loaders]))


@pytest.mark.parametrize(("first", "then"), [(2, 1), (1, 2), (4, 2)])
@pytest.mark.parametrize("epochs", [0, 1])
def test_each_step_has_the_samples_that_it_would_have_had(first: int, then: int, epochs: int) -> None:
    uninterrupted = loaders_of(first)
    whole = [epoch_of(uninterrupted) for _ in range(epochs + 2)]
    assert whole[0] != whole[1]
    stopped = loaders_of(first)
    for _ in range(epochs):
        epoch_of(stopped)
    begun = steps_of([iter(each) for each in stopped])
    assert list(islice(begun, 3)) == whole[epochs][:3]
    resumed = loaders_of(then)
    assert len(resumed) == then
    for each in resumed:
        each.resume(stopped[0].position(), None)
    assert list(steps_of([iter(Rest(each, 3)) for each in resumed])) == whole[epochs][3:]
    assert epoch_of(resumed) == whole[epochs + 1]


@pytest.mark.parametrize("seedable", [True, False])
def test_an_order_that_may_differ_is_warned_of(seedable: bool, caplog: pytest.LogCaptureFixture) -> None:
    (stopped, _), (resumed,) = loaders_of(2, seedable), loaders_of(1, seedable)
    resumed.resume(stopped.position(), None)
    assert ("the order of the data may be another one" in caplog.text) is not seedable
