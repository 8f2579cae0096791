"""The position in the data as one argument: torchdata's loader and torch's own go on where they were."""

from __future__ import annotations

import multiprocessing
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.support.ranks import failure, run
from torch import nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from shardwise import Checkpointer, CheckpointingConfig
from shardwise.errors import CheckpointNotFoundError, MisuseError

EPOCHS, BATCHES = 3, 4


class Augmented(Dataset[torch.Tensor]):
    """Numbers, with noise that is drawn where they are made."""

    def __len__(self) -> int:
        return 2 * BATCHES * world()

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.full((2,), 10.0 * index) + torch.rand(2) + random.random()


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def engine(root: Path, **settings: Any) -> Checkpointer:
    return CheckpointingConfig(checkpoint_dir=root, save_consolidated="false", **settings).build()


def made(kind: str, workers: int, seed: int) -> tuple[nn.Module, Iterable[torch.Tensor]]:
    """A model and a loader; the seeds of a run that is resumed are other ones."""
    torch.manual_seed(seed)
    random.seed(seed)
    if kind == "stateful":
        from torchdata.stateful_dataloader import StatefulDataLoader as Loader
    else:
        Loader = DataLoader  # type: ignore[assignment,misc]
    data = Augmented()
    how: dict[str, Any] = {"multiprocessing_context": "fork"} if workers else {}
    sampler = DistributedSampler(data) if world() > 1 else None
    return nn.Linear(2, 1), Loader(data, 2, shuffle=sampler is None, sampler=sampler, num_workers=workers, **how)


def batches_of(root: Path, kind: str, workers: int, stop: int, resumes: bool) -> list[object]:
    """Each batch from step ``stop`` on, and a number that is drawn after it; saved after that step."""
    multiprocessing.current_process().daemon = False  # which may not have workers
    model, loader = made(kind, workers, seed=1 + resumes)
    seen: list[object] = []
    with engine(root) as checkpointer:
        resumed = checkpointer.restore(model, dataloader=loader) if resumes else None
        step = resumed.step if resumed and resumed.step else 0
        for epoch in range(resumed.epoch if resumed and resumed.epoch else 0, EPOCHS):
            if isinstance(getattr(loader, "sampler", None), DistributedSampler):
                loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
            for batch in checkpointer.batches(loader, epoch):
                step += 1
                if step > stop:
                    seen.append((step, batch.tolist(), torch.rand(1).item()))
                if step == stop and not resumes:
                    checkpointer.save(step=step, model=model, dataloader=loader)
    return seen


def without_noise(ranks: Any) -> list[object]:
    """The samples of each batch, without what is drawn where they are made."""
    return [[(step, [[x // 10 for x in row] for row in batch], drawn) for step, batch, drawn in seen] for seen in ranks]


CASES = [
    ("plain", 0, 2, 1),
    ("plain", 0, 6, 2),
    ("stateful", 0, 6, 1),
    ("stateful", 0, 4, 1),
    ("stateful", 0, 7, 2),
    *(
        pytest.param("stateful", workers, stop, ranks, marks=pytest.mark.slow)
        for workers in (1, 2)
        for stop in (1, 4, 6)
        for ranks in (1, 2)
    ),
    *(pytest.param("plain", 2, stop, ranks, marks=pytest.mark.slow) for stop in (4, 6) for ranks in (1, 2)),
]


@pytest.mark.parametrize(("kind", "workers", "stop", "ranks"), CASES)
def test_the_data_go_on(kind: str, workers: int, stop: int, ranks: int, tmp_path: Path) -> None:
    """In the middle of an epoch (1, 2, 6, 7) and after its last batch (4).

    What torchdata's workers draw in the middle of an epoch is another thing: torchdata does not keep their generators.
    """
    if kind == "stateful":
        pytest.importorskip("torchdata", reason="torchdata is not installed: pip install torchdata")
    went_on = run(ranks, batches_of, tmp_path, kind, workers, stop, False)
    resumed = run(ranks, batches_of, tmp_path, kind, workers, stop, True)
    if kind == "stateful" and workers and stop % BATCHES:
        resumed, went_on = without_noise(resumed), without_noise(went_on)
    assert resumed == went_on
    assert all(len(seen) == EPOCHS * BATCHES - stop for seen in went_on)  # type: ignore[arg-type]


class Counting:
    """A loader with a position of its own."""

    def __init__(self, start: int = 0) -> None:
        self.next = start

    def state_dict(self) -> dict[str, object]:
        return {"next": self.next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.next = state["next"]


def save_positions(root: Path, differ: bool) -> None:
    with engine(root) as checkpointer:
        start = dist.get_rank() if differ else 7
        checkpointer.save(step=1, model=nn.Linear(2, 1), dataloader=Counting(start))


def restore_position(root: Path) -> int:
    loader, model = Counting(), nn.Linear(2, 1)
    with engine(root) as checkpointer:
        checkpointer.restore(model, dataloader=loader)
    return loader.next


def save_batches(root: Path) -> None:
    _, loader = made("plain", 0, 1)
    with engine(root) as checkpointer:
        next(checkpointer.batches(loader, 0))
        checkpointer.save(step=1, model=nn.Linear(2, 1), dataloader=loader)


def restore_batches(root: Path) -> None:
    model, loader = made("plain", 0, 1)
    with engine(root) as checkpointer:
        checkpointer.restore(model, dataloader=loader)


def test_another_number_of_ranks(tmp_path: Path) -> None:
    """A position among so many ranks is none among another number, also where it was the same on all of them."""
    run(2, save_positions, tmp_path / "same", False)
    text = str(failure(1, restore_position, tmp_path / "same"))
    assert "position of the Counting was saved on 2 ranks, and the run has 1" in text
    assert run(2, restore_position, tmp_path / "same") == [7, 7]
    run(2, save_positions, tmp_path / "differ", True)
    assert "position of the Counting was saved for each rank" in str(failure(1, restore_position, tmp_path / "differ"))
    assert run(2, restore_position, tmp_path / "differ") == [0, 1]
    run(1, save_batches, tmp_path / "plain")
    assert "position of the DataLoader was saved for each rank" in str(failure(2, restore_batches, tmp_path / "plain"))


def test_a_loader_whose_position_is_not_known_is_refused(tmp_path: Path) -> None:
    model, loader = made("plain", 0, 1)
    checkpointer = engine(tmp_path)
    with pytest.raises(MisuseError, match="position of the DataLoader passed as dataloader is not known"):
        checkpointer.save(step=1, model=model, dataloader=loader)
    with pytest.raises(MisuseError, match="extra_state has 'dataloader' too"):
        checkpointer.save(step=1, model=model, dataloader=Counting(), extra_state={"dataloader": 1})
    without = engine(tmp_path, save_rng=False)
    next(without.batches(loader, 0))
    with pytest.raises(MisuseError, match="kept with the random numbers, which save_rng leaves out"):
        without.save(step=1, model=model, dataloader=loader)
    checkpointer.save(step=1, model=model)
    with pytest.raises(MisuseError, match="no position of the DataLoader passed as dataloader"):
        checkpointer.restore(model, dataloader=loader)
    with pytest.raises(CheckpointNotFoundError, match="no extra state 'dataloader'"):
        checkpointer.restore(model, dataloader=Counting())
