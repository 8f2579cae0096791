"""Random numbers and data go on after a restore as if the run had never stopped."""

from __future__ import annotations

import gc
import multiprocessing
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tests.support.ranks import run
from torch import nn
from torch.utils.data import DataLoader, Dataset

from shardwise import Checkpointer, CheckpointingConfig
from shardwise.checkpointing.run_state.data_order import DataOrder
from shardwise.checkpointing.run_state.generators import RandomState
from shardwise.errors import MisuseError, StateFormatError

EPOCHS, BATCHES = 3, 4


class Noisy(Dataset[torch.Tensor]):
    """Examples with augmentation, drawn where they are made."""

    def __len__(self) -> int:
        return 2 * BATCHES

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.full((4,), float(index)) + torch.rand(4) + random.random()


class Positioned:
    """A loader that keeps its own position."""

    def __init__(self, loader: DataLoader[torch.Tensor]) -> None:
        self.loader = loader
        self.order: list[int] = []
        self.next = 0

    def __iter__(self) -> Iterator[torch.Tensor]:
        if self.next == len(self.order):
            self.order, self.next = torch.randperm(2 * BATCHES).tolist(), 0
        else:
            torch.rand(1)  # as making an iterator does
        return self._rest()

    def _rest(self) -> Iterator[torch.Tensor]:
        while self.next < len(self.order):
            self.next += 2
            yield torch.stack([torch.full((4,), float(n)) for n in self.order[self.next - 2 : self.next]])

    def state_dict(self) -> dict[str, object]:
        return {"order": self.order, "next": self.next}

    def load_state_dict(self, state: dict[str, object]) -> None:
        self.order, self.next = list(state["order"]), int(state["next"])  # type: ignore[call-overload]


class Ahead:
    """A loader that has made the next batch when it gives one."""

    def __init__(self, loader: DataLoader[torch.Tensor]) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[torch.Tensor]:
        batches = iter(self.loader)
        batch = next(batches)
        for following in batches:
            yield batch
            batch = following
        yield batch


def engine(root: Path, **settings: object) -> Checkpointer:
    config = CheckpointingConfig(checkpoint_dir=str(root), save_consolidated="false", **settings)  # type: ignore[arg-type]
    return config.build(dist.get_rank() if dist.is_initialized() else 0, 0, 0)


def make(seed: int, kind: str) -> tuple[nn.Module, torch.optim.Optimizer, object, dict[str, object]]:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    rank = dist.get_rank() if dist.is_initialized() else 0
    torch.manual_seed(seed + rank)
    if kind == "positioned":
        loader: object = Positioned(DataLoader(Noisy()))
        return model, optimizer, loader, {"loader": loader}
    generator = torch.Generator().manual_seed(seed + rank) if kind == "generator" else None
    workers = 2 if kind == "workers" else 0
    multiprocessing.current_process().daemon = False  # which may not have workers
    context = "fork" if workers else None  # a worker's process starts no servers
    if workers:
        # Garbage of earlier tests may hold process groups. Collected in a forked worker, they would wait for threads
        # that only this process has (so torch 2.13's gloo: the worker hangs).
        gc.collect()
    loader = DataLoader(
        Noisy(), 2, shuffle=True, num_workers=workers, generator=generator, multiprocessing_context=context
    )
    return model, optimizer, Ahead(loader) if kind == "ahead" else loader, {}


def average(model: nn.Module) -> None:
    for param in model.parameters():
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(param.grad)


def train(root: Path, kind: str, seed: int, stop: int, is_async: bool, between: bool) -> list[float]:
    """The losses of each step; the run saves after step ``stop``, or after the epoch that ends with it."""
    model, optimizer, loader, extra = make(seed, kind)
    losses: list[float] = []
    with engine(root, is_async=is_async) as checkpointer:
        resumed = checkpointer.restore(model, optimizer, extra_state=extra)
        step, first = (resumed.step, resumed.epoch) if resumed else (0, 0)
        for epoch in range(first or 0, EPOCHS):
            for batch in checkpointer.batches(loader, epoch):  # type: ignore[arg-type]
                loss = F.mse_loss(model(batch), batch.mean(1, keepdim=True))
                loss.backward()
                average(model)
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.item())
                step += 1  # type: ignore[operator]
                if step == stop and not between:
                    checkpointer.save(epoch, step, model, optimizer, extra_state=extra)
            if step == stop and between:
                checkpointer.save(epoch, step, model, optimizer, extra_state=extra)
    return losses


@pytest.mark.parametrize(
    ("world", "kind", "stop", "is_async", "between"),
    [
        (1, "plain", 6, False, False),
        (1, "plain", 4, False, False),
        (1, "plain", 8, True, True),
        (1, "workers", 5, True, False),
        (1, "generator", 7, False, False),
        (1, "ahead", 7, False, False),
        (1, "positioned", 6, False, False),
        (1, "positioned", 4, False, True),
        (2, "plain", 6, False, False),
        (2, "workers", 5, False, False),
    ],
)
def test_losses_are_those_of_a_run_that_was_never_stopped(
    tmp_path: Path, world: int, kind: str, stop: int, is_async: bool, between: bool
) -> None:
    went_on = run(world, train, tmp_path, kind, 1, stop, is_async, between)
    resumed = run(world, train, tmp_path, kind, 2, 0, False, between)
    assert resumed == [losses[stop:] for losses in went_on]  # type: ignore[index]
    assert all(len(losses) == EPOCHS * BATCHES - stop for losses in resumed)  # type: ignore[arg-type]


def other_number(root: Path, restores: bool) -> list[object]:
    model, optimizer, loader, _ = make(1, "plain")
    with engine(root) as checkpointer:
        if restores:
            record = checkpointer.restore(model, optimizer)
            assert record is not None
            return [record.unrestored, len(list(checkpointer.batches(loader, 0)))]  # type: ignore[arg-type]
        for number, _ in enumerate(checkpointer.batches(loader, 0), start=1):  # type: ignore[arg-type]
            if number == 2:
                checkpointer.save(0, 2, model, optimizer)
        return []


def test_positions_on_another_number_of_ranks_are_named(tmp_path: Path) -> None:
    run(2, other_number, tmp_path, False)
    assert run(1, other_number, tmp_path, True) == [[("batches", "rng"), BATCHES]]


def test_without_batches_the_call_before_the_first_step_forgets_the_iterator(tmp_path: Path) -> None:
    model, _, loader, _ = make(1, "plain")
    it = iter(loader)  # type: ignore[call-overload]
    next(it)
    engine(tmp_path).save(0, 1, model)
    drawn = torch.rand(3).tolist()
    checkpointer = engine(tmp_path)
    checkpointer.restore(model)
    next(iter(loader))  # type: ignore[call-overload]
    checkpointer.resume_rng()
    assert torch.rand(3).tolist() == drawn
    checkpointer.resume_rng()
    assert torch.rand(3).tolist() != drawn


def test_a_loader_with_its_own_position_is_to_be_restored(tmp_path: Path) -> None:
    model, _, loader, extra = make(1, "positioned")
    checkpointer = engine(tmp_path)
    next(checkpointer.batches(loader, 0))  # type: ignore[arg-type]
    checkpointer.save(0, 1, model, extra_state=extra)
    checkpointer.restore(model)
    with pytest.raises(MisuseError, match="Positioned keeps its own position"):
        checkpointer.batches(loader, 0)  # type: ignore[arg-type]


def test_less_data_than_the_loop_has_had_is_refused(tmp_path: Path) -> None:
    model, _, loader, _ = make(1, "plain")
    checkpointer = engine(tmp_path)
    iterator = checkpointer.batches(loader, 0)  # type: ignore[arg-type]
    for _ in range(3):
        next(iterator)
    checkpointer.save(0, 3, model)
    checkpointer.restore(model)
    with pytest.raises(MisuseError, match="had 3 batches of epoch 0 when it was saved, and the loader has 2"):
        checkpointer.batches(DataLoader(range(4), 2), 0)  # type: ignore[arg-type]


# --- generators -----------------------------------------------------------------------------------------------------

GENERATORS: dict[str, tuple[Callable[[], object], Callable[[object], object]]] = {
    "torch": (lambda: torch.Generator().manual_seed(3), lambda g: torch.rand(2, generator=g).tolist()),  # type: ignore[call-overload]
    "python": (lambda: random.Random(3), lambda g: g.gauss(0, 1)),  # type: ignore[attr-defined]
    "numpy": (lambda: np.random.default_rng(3), lambda g: g.normal(size=2).tolist()),  # type: ignore[attr-defined]
    "mersenne": (lambda: np.random.Generator(np.random.MT19937(3)), lambda g: g.random()),  # type: ignore[attr-defined]
    "bits": (lambda: np.random.Philox(3), lambda g: int(g.random_raw())),  # type: ignore[attr-defined]
    "old numpy": (lambda: np.random.RandomState(3), lambda g: g.normal()),  # type: ignore[attr-defined]
}


@pytest.mark.parametrize("taken", [2, BATCHES])
def test_an_epoch_is_left_early_only_where_it_has_batches_left(
    tmp_path: Path, taken: int, caplog: pytest.LogCaptureFixture
) -> None:
    """A loop that counts its batches saves after the last one without coming back for more."""
    model, loader = nn.Linear(4, 1), DataLoader(Noisy(), batch_size=2)
    with engine(tmp_path) as checkpointer:
        batches = checkpointer.batches(loader, 0)
        for _ in range(taken):
            next(batches)
        checkpointer.save(epoch=0, step=taken, model=model)
    with engine(tmp_path) as checkpointer, caplog.at_level("WARNING"):
        checkpointer.restore(model)
        assert len(list(checkpointer.batches(loader, 1))) == BATCHES
    warned = "the checkpoint was saved in epoch 0, after 2 batches; the loop leaves it for epoch 1" in caplog.messages
    assert warned == (taken == 2)
    assert len(caplog.messages) == int(warned)


@pytest.mark.parametrize("kind", GENERATORS)
def test_generators_in_extra_state(tmp_path: Path, kind: str) -> None:
    build, draw = GENERATORS[kind]
    model, generator = nn.Linear(1, 1), build()
    draw(generator)
    engine(tmp_path).save(0, 1, model, extra_state={"own": generator})
    drawn = [draw(generator) for _ in range(3)]
    fresh = build()
    engine(tmp_path).restore(model, extra_state={"own": fresh})
    assert [draw(fresh) for _ in range(3)] == drawn
    other = torch.Generator() if kind != "torch" else random.Random()
    with pytest.raises(MisuseError, match=r"does not fit|of another kind"):
        engine(tmp_path).restore(model, extra_state={"own": other})


class Devices:
    """The generators of some devices, of which a process uses some."""

    def __init__(self, used: tuple[int, ...], current: int, count: int = 4) -> None:
        self.used, self.current = used, current
        self.states = [torch.tensor([number], dtype=torch.uint8) for number in range(count)]

    def device_count(self) -> int:
        return len(self.states)

    def current_device(self) -> int:
        return self.current

    def memory_reserved(self, device: int) -> int:
        return 512 * (device in self.used)

    def get_rng_state(self, device: int) -> torch.Tensor:
        return self.states[device].clone()

    def set_rng_state(self, new_state: torch.Tensor, device: int) -> None:
        self.states[device] = new_state + 10


def test_every_device_that_the_process_uses() -> None:
    state = RandomState(("cuda", Devices((0, 2), 2))).state_dict()
    devices = Devices((), 2)
    RandomState(("cuda", devices)).load_state_dict(state)
    assert [int(each) for each in devices.states] == [10, 1, 12, 3]
    with pytest.raises(ValueError, match="beside that of 2; now 1 of 4 is current"):
        RandomState(("cuda", Devices((), 1))).load_state_dict(state)


def test_one_device_each_is_the_same_state_whatever_its_number() -> None:
    first, second = Devices((0,), 0), Devices((1,), 1)
    second.states[1] = first.states[0].clone()
    torch.manual_seed(0)
    one, other = (RandomState(("cuda", devices)).state_dict()["accelerator"] for devices in (first, second))
    assert str(one) == str(other)
    devices = Devices((3,), 3)
    RandomState(("cuda", devices)).load_state_dict(RandomState(("cuda", second)).state_dict())
    assert [int(each) for each in devices.states] == [0, 1, 2, 10]


@pytest.mark.parametrize("name", ["train", "validation"])
def test_two_loaders_of_one_name_in_an_epoch(tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    with engine(tmp_path) as checkpointer, caplog.at_level("WARNING"):
        training = checkpointer.batches(DataLoader(range(4)), 0)
        next(training)
        assert len([*checkpointer.batches(DataLoader(range(2)), 0, name=name)]) == 2
        assert len([*training]) == 3
        assert len([*checkpointer.batches(DataLoader(range(2)), 0)]) == 2  # the first has no batches left to lose
    said = [
        "two loaders of epoch 0 are called 'train': the position of the first is not saved any more" in each
        for each in caplog.messages
    ]
    assert said == [True] * (name == "train")


def test_states_of_older_releases() -> None:
    state = RandomState(None).state_dict() | {"cuda": torch.tensor([5], dtype=torch.uint8)}
    devices = Devices((), 1)
    RandomState(("cuda", devices)).load_state_dict(state)
    assert [int(each) for each in devices.states] == [0, 15, 2, 3]


def stateful(seed: int) -> tuple[nn.Module, object]:
    from torchdata.stateful_dataloader import StatefulDataLoader

    torch.manual_seed(seed)
    return nn.Linear(1, 1), StatefulDataLoader(Noisy(), 2, shuffle=True)


def with_torchdata(root: Path, restores: bool) -> list[object]:
    model, loader = stateful(1 + restores)
    with engine(root) as checkpointer:
        if restores:
            checkpointer.restore(model, extra_state={"loader": loader})
        batches = checkpointer.batches(loader, 0)  # type: ignore[arg-type]
        if not restores:
            next(batches)
            checkpointer.save(0, 1, model, extra_state={"loader": loader})
        return [(batch.tolist(), torch.rand(1).item()) for batch in batches]


def test_torchdatas_loader_goes_on_where_it_was_on_every_rank(tmp_path: Path) -> None:
    pytest.importorskip("torchdata", reason="torchdata is not installed")
    went_on = run(2, with_torchdata, tmp_path, False)
    assert run(2, with_torchdata, tmp_path, True) == went_on
    assert all(len(rest) == BATCHES - 1 for rest in went_on)  # type: ignore[arg-type]


@pytest.mark.parametrize("lost", ["epoch", "start", "loader", "count", "is_over", "now"])
def test_a_position_that_lacks_something_is_refused_and_not_completed(lost: str) -> None:
    order = DataOrder()
    iterator = order.batches([1, 2, 3], 0, "train")
    assert [next(iterator), next(iterator)] == [1, 2]
    state = order.state(rank=0)
    assert state is not None
    assert DataOrder.parsed(state)["train"].count == 2
    loaders = cast(dict[str, dict[str, object]], state["loaders"])
    del loaders["train"]["before"]  # as earlier releases wrote it
    loaders["train"]["of a later release"] = 1
    assert DataOrder.parsed(state)["train"].count == 2
    del loaders["train"][lost]
    with pytest.raises(StateFormatError, match=f"not a position in data .*{lost}"):
        DataOrder.parsed(state)
