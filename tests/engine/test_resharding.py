"""Saved on N ranks, loaded on M: model and optimizer are bit-equal, and training goes on as if it had never stopped."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch.distributed as dist
from tests.engine.setups import (
    SETUPS,
    Digests,
    Spreader,
    build,
    checkpointer,
    fsdp,
    fsdp_over_tp,
    hsdp,
    plain,
    tensor_parallel,
)
from tests.support.ranks import WORLDS, run

MODES = ("every", "false")


@dataclass(frozen=True)
class Saved:
    """What was saved, and what training did afterwards."""

    digests: Digests
    options: list[tuple[float, float]]
    losses: list[float] | None


def save(spread: Spreader, root: Path) -> Saved:
    training = build(spread, seed=0)
    for _ in range(2):
        training.step()
    for mode in MODES:
        with checkpointer(root / mode, save_consolidated=mode) as engine:
            engine.save(0, 2, training.model, training.optimizer, training.scheduler)
    return Saved(training.digests(), training.options(), [training.step() for _ in range(2)])


def load(spread: Spreader, roots: list[Path], train: list[bool]) -> list[Saved]:
    found = []
    for number, (root, trains) in enumerate(zip(roots, train, strict=True)):
        training = build(spread, seed=number + 1)
        if number == 1:
            training.step()  # a used optimizer is as good as a fresh one
        with checkpointer(root) as engine:
            record = engine.restore(training.model, training.optimizer, training.scheduler)
        assert record is not None
        assert (record.epoch, record.step, record.path) == (0, 2, root / "epoch_0_step_2")
        digests, options = training.digests(), training.options()
        found.append(Saved(digests, options, [training.step() for _ in range(2)] if trains else None))
    return found


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], tuple[Path, Saved]]:
    """Checkpoints of each setup and number of ranks, with what is in them; made when first asked for."""
    return Checkpoints(tmp_path_factory.mktemp("saved"))


class Checkpoints(dict[tuple[str, int], tuple[Path, Saved]]):
    def __init__(self, root: Path) -> None:
        super().__init__()
        self._root = root

    def __missing__(self, key: tuple[str, int]) -> tuple[Path, Saved]:
        name, world = key
        spread = next(setup for setup in SETUPS if setup.__name__ == name)
        root = self._root / f"{name}-{world}"
        found = run(world, save, spread, root)
        assert all(saved == found[0] for saved in found)
        made = self[key] = (root, found[0])  # type: ignore[assignment]
        return made  # type: ignore[return-value]


def compare(before: Saved, after: Saved, same_world: bool) -> None:
    assert after.digests == before.digests
    assert after.options == before.options
    if after.losses is None:
        return
    if same_world:
        assert after.losses == before.losses
    else:
        assert after.losses == pytest.approx(before.losses, rel=1e-4)


#: These are loaded across topologies in tests/topology too.
_SLOW = ("ddp", "hsdp", "tensor_parallel", "fsdp_columns", "fsdp_over_tp")


@pytest.mark.parametrize(
    "setup", [pytest.param(s, id=s.__name__, marks=pytest.mark.slow if s.__name__ in _SLOW else ()) for s in SETUPS]
)
def test_saved_on_n_ranks_and_loaded_on_m(setup: Spreader, checkpoints: Checkpoints) -> None:
    for world in WORLDS:
        # The same number of ranks reads both kinds of checkpoint, another one reads them in turn.
        pairs = [(n, mode) for n in WORLDS for i, mode in enumerate(MODES) if n == world or (n + world // 2) % 2 == i]
        roots = [checkpoints[setup.__name__, n][0] / mode for n, mode in pairs]
        # Training goes on from one checkpoint of this number of ranks and from one of another.
        train = [n == world % 4 + 1 or (n, mode) == (world, MODES[world % 2]) for n, mode in pairs]
        found = run(world, load, setup, roots, train)
        assert all(rank == found[0] for rank in found)
        for (n, _), loaded in zip(pairs, found[0], strict=True):  # type: ignore[call-overload]
            compare(checkpoints[setup.__name__, n][1], loaded, world == n)
    state = checkpoints[setup.__name__, 4][1].digests
    assert state["count"] == checkpoints[setup.__name__, 1][1].digests["count"]
    assert "head.weight" not in state
    assert "scratch" not in state
    assert "state.embed.weight.exp_avg" in state
    assert not any(name.startswith("state.unused") for name in state)


@pytest.mark.parametrize(
    ("source", "target"),
    [(fsdp, fsdp_over_tp), (fsdp_over_tp, plain), (tensor_parallel, hsdp), (plain, fsdp_over_tp)],
    ids=lambda setup: setup.__name__,
)
def test_another_way_of_spreading_the_model(source: Spreader, target: Spreader, checkpoints: Checkpoints) -> None:
    root, saved = checkpoints[source.__name__, 4]
    for world, mode in zip((2, 4), MODES, strict=True):
        [loaded] = run(world, load, target, [root / mode], [world == 2])[0]  # type: ignore[misc]
        compare(saved, loaded, same_world=False)


def restore_nothing(root: Path) -> bool:
    training = build(fsdp, seed=0)
    before = training.digests()
    with checkpointer(root) as engine:
        return engine.restore(training.model, training.optimizer) is None and training.digests() == before


def test_there_may_be_nothing_to_resume(tmp_path: Path) -> None:
    assert run(2, restore_nothing, tmp_path / "new") == [True, True]


def process_group() -> int:
    return dist.get_world_size()


def test_every_test_has_ranks_of_its_own() -> None:
    assert run(3, process_group) == [3, 3, 3]
