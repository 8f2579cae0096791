"""Each rank's scheduler comes back as it was, matched by what it steers; options agree or are refused."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tests.support.ranks import failure, run
from torch import nn
from torch.optim import lr_scheduler
from torch.optim.lr_scheduler import LRScheduler

from shardwise import Checkpointer, CheckpointingConfig
from shardwise.errors import MisuseError, ReplicasDifferError

Make = Callable[[torch.optim.Optimizer], LRScheduler]


def engine(root: Path, stage: int = 0, **settings: object) -> Checkpointer:
    config = CheckpointingConfig(checkpoint_dir=str(root), save_consolidated="false", **settings)  # type: ignore[arg-type]
    return config.build(0, 0, stage)


class Stages(nn.Module):
    """Some stages of a pipeline."""

    def __init__(self, numbers: tuple[int, ...]) -> None:
        super().__init__()
        torch.manual_seed(sum(numbers))
        self.layers = nn.ModuleDict({str(number): nn.Linear(4, 4) for number in numbers})


def rate(number: int) -> float:
    return 0.1 * 0.5**number


def groups(model: Stages) -> list[dict[str, object]]:
    return [{"params": list(layer.parameters()), "lr": rate(int(n))} for n, layer in model.layers.items()]


def step(model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: LRScheduler) -> None:
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
        scheduler.step(float(scheduler.last_epoch))
    else:
        scheduler.step()


KINDS: dict[str, Make] = {
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda s: 0.9**s),
    "sequential": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.5, total_iters=2), lr_scheduler.CosineAnnealingLR(o, 5)], [2]
    ),
    "chained": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.5, 3), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "multistep": lambda o: lr_scheduler.MultiStepLR(o, [1, 3], 0.5),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
    "onecycle": lambda o: lr_scheduler.OneCycleLR(o, [group["lr"] for group in o.param_groups], 10),
}


def pipeline(root: Path, kind: str, is_async: bool, restored: tuple[tuple[int, ...], ...], saved: bool) -> list[object]:
    """Save from two stages, or restore on others; what the rates are after two more steps."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    model = Stages((rank,) if saved else restored[rank])
    optimizer = torch.optim.AdamW(groups(model))
    scheduler = KINDS[kind](optimizer)
    with engine(root, rank, is_async=is_async) as checkpointer:
        if saved:
            for _ in range(3):
                step(model, optimizer, scheduler)
            checkpointer.save(0, 3, model, optimizer, scheduler)
        else:
            checkpointer.restore(model, optimizer, scheduler)
        for _ in range(2):
            step(model, optimizer, scheduler)
    rates = {n: g["lr"] for n, g in zip(model.layers, optimizer.param_groups, strict=True)}
    weights = {n: layer.weight.sum().item() for n, layer in model.layers.items()}  # type: ignore[union-attr,operator]
    return [rates, weights]


def joined(rows: list[object]) -> list[dict[str, float]]:
    merged: list[dict[str, float]] = [{}, {}]
    for row in rows:
        for number, found in enumerate(row):  # type: ignore[arg-type]
            merged[number] |= found
    return merged


@pytest.mark.parametrize("kind", KINDS)
def test_each_stage_has_its_own_scheduler_on_any_topology(tmp_path: Path, kind: str) -> None:
    stages = ((0,), (1,))
    went_on = joined(run(2, pipeline, tmp_path, kind, kind == "lambda", stages, True))
    assert joined(run(2, pipeline, tmp_path, kind, False, stages, False)) == went_on
    assert joined(run(1, pipeline, tmp_path, kind, False, ((0, 1),), False)) == went_on
    assert joined(run(2, pipeline, tmp_path, kind, False, ((1,), (0,)), False)) == went_on


def stages_of_different_steps(root: Path, restores: bool) -> None:
    rank = dist.get_rank()
    model = Stages((0, 1) if restores else (rank,))
    optimizer = torch.optim.AdamW(groups(model))
    scheduler = KINDS["lambda"](optimizer)
    with engine(root, rank) as checkpointer:
        if restores:
            checkpointer.restore(model, optimizer, scheduler)
        else:
            for _ in range(1 + rank):
                step(model, optimizer, scheduler)
            checkpointer.save(0, 1, model, optimizer, scheduler)


def test_stages_whose_schedulers_cannot_be_one_are_refused(tmp_path: Path) -> None:
    run(2, stages_of_different_steps, tmp_path, False)
    error = failure(1, stages_of_different_steps, tmp_path, True)
    assert isinstance(error, MisuseError)
    assert "different last_epoch: 1 in LambdaLR of layers.0.bias and others on rank 0, 2 in" in str(error)


def two(seed: int) -> tuple[Stages, list[torch.optim.Optimizer], list[LRScheduler]]:
    model = Stages((0, 1))
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(layer.parameters(), lr=rate(int(n)) + seed) for n, layer in model.layers.items()
    ]
    return model, optimizers, [lr_scheduler.StepLR(o, 1, gamma=0.5 + 0.1 * n) for n, o in enumerate(optimizers)]


@pytest.mark.parametrize("which", [[1, 0], [0], [1], [0, 1, 1]])
def test_schedulers_are_told_by_their_optimizers(tmp_path: Path, which: list[int]) -> None:
    model, optimizers, schedulers = two(0)
    for _ in range(3):
        for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
            step(model, optimizer, scheduler)
    engine(tmp_path).save(0, 1, model, optimizers, schedulers)
    after, others, made = two(1)
    chosen = [made[n] for n in which]
    if sorted(which) == [0, 1]:
        engine(tmp_path).restore(after, others, chosen)
        assert [s.state_dict() for s in made] == [s.state_dict() for s in schedulers]
        return
    if len(which) == 3:
        chosen[2] = lr_scheduler.StepLR(others[1], 1)
    before = [s.state_dict() for s in made]
    with pytest.raises(MisuseError, match=rf"2 schedulers were saved and {len(which)} (is|are) to be restored"):
        engine(tmp_path).restore(after, others, chosen)
    assert [s.state_dict() for s in made] == before


def test_another_kind_within_is_refused(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine(tmp_path).save(0, 1, model, optimizer, KINDS["sequential"](optimizer))
    swapped = lr_scheduler.SequentialLR(
        optimizer, [lr_scheduler.CosineAnnealingLR(optimizer, 5), lr_scheduler.LinearLR(optimizer)], [2]
    )
    with pytest.raises(MisuseError, match=r"SequentialLR\[LinearLR, CosineAnnealingLR\] and the one to be restored is"):
        engine(tmp_path).restore(model, optimizer, swapped)


class Own:
    """A schedule of the loop's own, which knows no optimizer."""

    def __init__(self, value: int) -> None:
        self.value = value

    def state_dict(self) -> dict[str, object]:
        return {"value": self.value}

    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        self.value = state_dict["value"]  # type: ignore[assignment]


class Other(Own):
    pass


def test_objects_without_an_optimizer_are_told_by_their_class_and_order(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine(tmp_path).save(0, 1, model, optimizer, [Own(1), Other(2), Own(3)])
    first, second, third = Own(0), Own(0), Other(0)
    engine(tmp_path).restore(model, optimizer, [first, second, third])
    assert (first.value, second.value, third.value) == (1, 3, 2)


# --- replicas -------------------------------------------------------------------------------------------------------


def plateau(root: Path, losses: tuple[float, ...], restores: bool) -> dict[str, object]:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, patience=10)
    with engine(root) as checkpointer:
        if restores:
            checkpointer.restore(model, optimizer, scheduler)
        else:
            nn.init.ones_(model.weight)
            nn.init.ones_(model.bias)
            for _ in range(3):
                scheduler.step(losses[dist.get_rank()])
            checkpointer.save(0, 1, model, optimizer, scheduler)
    return {key: scheduler.state_dict()[key] for key in ("best", "num_bad_epochs")}


def one_with_warnings(root: Path) -> list[object]:
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("shardwise").addHandler(handler)
    try:
        return [plateau(root, (), True), lines]
    finally:
        logging.getLogger("shardwise").removeHandler(handler)


def test_replicas_schedulers_are_each_ranks_own(tmp_path: Path) -> None:
    saved = run(2, plateau, tmp_path, (1.0, 2.0), False)
    assert saved == [{"best": 1.0, "num_bad_epochs": 2}, {"best": 2.0, "num_bad_epochs": 2}]
    assert run(2, plateau, tmp_path, (), True) == saved
    [[state, lines]] = run(1, one_with_warnings, tmp_path)  # type: ignore[misc]
    assert state == saved[0]
    assert [line for line in lines if "different best: every rank takes the lowest rank's" in line]


def differing(root: Path, what: str, settings: dict[str, object]) -> list[object]:
    torch.manual_seed(0)
    odd = dist.get_rank() == 1
    model = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.2 if odd and what == "lr" else 0.1)
    for param in model.parameters():
        optimizer.state[param] = {"count": 2 if odd and what == "count" else 1, "nan": float("nan")}
    with engine(root, **settings) as checkpointer:
        checkpointer.save(0, 1, model, optimizer)
        again = torch.optim.AdamW(model.parameters(), lr=0.7)
        checkpointer.restore(model, again)
        return [again.param_groups[0]["lr"], next(iter(again.state.values()))["count"]]


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("lr", "lr of weight and 1 more parameters is 0.1 on ranks 0, 2 and 0.2 on rank 1"),
        ("count", "count of weight and 1 more parameters is 1 on ranks 0, 2 and 2 on rank 1"),
    ],
)
def test_options_and_values_of_replicas_agree_or_are_refused(tmp_path: Path, what: str, says: str) -> None:
    error = failure(3, differing, tmp_path, what, {})
    assert isinstance(error, ReplicasDifferError)
    assert says in str(error)
    assert not list(tmp_path.glob("epoch*"))
    assert run(3, differing, tmp_path, what, {"replicas": "first"}) == [[0.1, 1]] * 3
