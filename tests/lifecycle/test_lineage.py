"""Runs that are rolled back: which checkpoints are theirs, which are kept, and what LATEST means."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from tests.lifecycle.support import Crash, FaultyStorage
from torch import nn

from shardwise import Checkpointer, CheckpointingConfig
from shardwise.disk.storage import LocalStorage
from shardwise.errors import CheckpointExistsError
from shardwise.lifecycle import (
    BEST,
    LATEST,
    LINEAGE_NAME,
    list_checkpoints,
    read_pointer,
    remove_leftovers,
    resolve,
)


class Run:
    """A training run of one number: step s leaves the number s in the model, or what it is told to."""

    def __init__(self, root: Path, storage: object = None, **settings: object) -> None:
        config = CheckpointingConfig(checkpoint_dir=root, save_consolidated="false", save_rng=False, **settings)  # type: ignore[arg-type]
        self.root = root
        self.engine = Checkpointer(config, 0, 0, 0, storage=storage)  # type: ignore[arg-type]
        self.model = nn.Linear(1, 1, bias=False)

    def save(self, *steps: int, value: float | None = None, loss: float | None = None) -> Run:
        for step in steps:
            with torch.no_grad():
                self.model.weight.fill_(step if value is None else value)
            self.engine.save(0, step, self.model, metrics={} if loss is None else {"default": loss})
        return self

    def restore(self, name: str = LATEST) -> tuple[int | None, float]:
        record = self.engine.restore(self.model, restore_from=name)
        assert record is not None
        return record.step, float(self.model.weight.detach())


def steps(root: Path) -> list[int]:
    return sorted(info.step for info in list_checkpoints(root))


def test_a_rollback_keeps_its_line_and_lets_the_abandoned_go_with_its_branch_point(tmp_path: Path) -> None:
    Run(tmp_path, max_recent_checkpoints=3).save(*range(10, 70, 10))
    assert steps(tmp_path) == [40, 50, 60]
    run = Run(tmp_path, max_recent_checkpoints=3)
    assert run.restore("epoch_0_step_40") == (40, 40.0)
    seen = []
    for step in range(41, 46):
        run.save(step)
        seen.append(steps(tmp_path))
        assert read_pointer(tmp_path, LATEST) == f"epoch_0_step_{step}"
    assert seen == [
        [40, 41, 50, 60],
        [40, 41, 42, 50, 60],
        [41, 42, 43],
        [42, 43, 44],
        [43, 44, 45],
    ]


def test_latest_falls_back_on_the_line_that_was_trained_last(tmp_path: Path) -> None:
    Run(tmp_path).save(10, 20, 30)
    run = Run(tmp_path)
    run.restore("epoch_0_step_10")
    run.save(11, 12)
    shutil.rmtree(tmp_path / "epoch_0_step_12")
    assert Run(tmp_path).restore() == (11, 11.0)
    (tmp_path / LATEST).unlink()
    assert Run(tmp_path).restore() == (11, 11.0)


@pytest.mark.parametrize("is_async", [False, True])
def test_a_step_that_was_abandoned_is_saved_again(tmp_path: Path, is_async: bool) -> None:
    Run(tmp_path).save(40, 50, 60)
    run = Run(tmp_path, is_async=is_async)
    run.restore("epoch_0_step_40")
    run.save(50, value=-1.0)
    with pytest.raises(CheckpointExistsError):
        run.save(50, value=-2.0)
    with pytest.raises(CheckpointExistsError):
        run.save(40, value=-2.0)
    run.save(60, value=-3.0)
    run.engine.finalize()
    assert [Run(tmp_path).restore(f"epoch_0_step_{step}")[1] for step in (40, 50, 60)] == [40.0, -1.0, -3.0]
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_only_what_the_run_itself_left_is_replaced(tmp_path: Path) -> None:
    Run(tmp_path).save(40, 50)
    fresh = Run(tmp_path).save(45)  # was never restored: it may be another run in the same directory
    with pytest.raises(CheckpointExistsError):
        fresh.save(50)
    other = Run(tmp_path / "other").save(10)
    other.engine.finalize()
    stranger = Run(tmp_path)
    stranger.engine.restore(stranger.model, restore_from=tmp_path / "other" / "epoch_0_step_10")
    with pytest.raises(CheckpointExistsError):
        stranger.save(50)
    assert Run(tmp_path).restore("epoch_0_step_50") == (50, 50.0)


def test_another_runs_checkpoints_are_never_pruned(tmp_path: Path) -> None:
    Run(tmp_path / "base").save(7)
    Run(tmp_path / "root").save(100, 200)
    run = Run(tmp_path / "root", max_recent_checkpoints=1)
    run.engine.restore(run.model, restore_from=tmp_path / "base" / "epoch_0_step_7")
    run.save(8, 9)
    assert steps(tmp_path / "root") == [9, 100, 200]


def test_a_run_that_only_goes_on_counts_what_was_there(tmp_path: Path) -> None:
    Run(tmp_path).save(10, 20)
    Run(tmp_path, max_recent_checkpoints=2).save(30)
    assert steps(tmp_path) == [20, 30]
    run = Run(tmp_path, max_recent_checkpoints=2)
    run.restore()
    run.save(40)
    assert steps(tmp_path) == [30, 40]


def test_checkpoints_of_an_older_release_precede_each_other_by_step(tmp_path: Path) -> None:
    Run(tmp_path).save(10, 20, 30, 40)
    for info in list_checkpoints(tmp_path):
        (tmp_path / info.name / LINEAGE_NAME).unlink()
    run = Run(tmp_path, max_recent_checkpoints=2)
    run.restore("epoch_0_step_20")
    run.save(21)
    assert steps(tmp_path) == [20, 21, 30, 40]
    run.save(30, value=-1.0)
    assert steps(tmp_path) == [21, 30]
    assert Run(tmp_path).restore() == (30, -1.0)


def test_the_best_is_the_best_of_the_present_line(tmp_path: Path) -> None:
    run = Run(tmp_path).save(10, loss=2.0).save(20, loss=0.1)
    assert read_pointer(tmp_path, BEST) == "epoch_0_step_20"
    run = Run(tmp_path)
    run.restore("epoch_0_step_10")
    run.save(11, loss=1.0)
    assert read_pointer(tmp_path, BEST) == "epoch_0_step_11"


def test_a_copy_keeps_its_line_and_its_numbers(tmp_path: Path) -> None:
    run = Run(tmp_path / "one").save(10, 20, 30)
    run.engine.finalize()
    shutil.copytree(tmp_path / "one", tmp_path / "two", symlinks=False)  # what cp -rL makes of LATEST is a directory
    again = Run(tmp_path / "two", max_recent_checkpoints=1)
    assert again.restore() == (30, 30.0)
    again.engine.restore(again.model, restore_from="epoch_0_step_10")
    again.save(20, value=-1.0)
    assert Run(tmp_path / "two").restore("epoch_0_step_20") == (20, -1.0)


@pytest.mark.parametrize("swaps", [True, False])
def test_a_crash_while_replacing_leaves_the_present_line_whole(tmp_path: Path, swaps: bool) -> None:
    class Swapping(FaultyStorage):
        def exchange(self, one: Path, other: Path) -> bool:
            if not swaps:
                return False
            self._step("exchange", other)
            return LocalStorage().exchange(one, other)

    def prepared(root: Path) -> None:
        Run(root).save(40, 50, 60)

    def replace(root: Path, storage: FaultyStorage) -> None:
        run = Run(root, storage)
        run.restore("epoch_0_step_40")
        run.save(50, value=-1.0)

    prepared(tmp_path / "whole")
    whole = Swapping()
    replace(tmp_path / "whole", whole)
    states = set()
    for at in range(len(whole.calls)):
        root = tmp_path / str(at)
        prepared(root)
        with pytest.raises(Crash):
            replace(root, Swapping(at))
        found = resolve(root, LATEST)
        assert found is not None
        resumed = Run(root).restore()
        states.add(resumed)
        assert resumed in {(60, 60.0), (50, -1.0)}
        assert Run(root).restore("epoch_0_step_40") == (40, 40.0)
        remove_leftovers(root)
        assert Run(root).restore() == resumed
        again = Run(root)
        again.restore("epoch_0_step_40")
        again.save(45, value=-2.0)
        assert Run(root).restore() == (45, -2.0)
    assert states == {(60, 60.0), (50, -1.0)}


def test_what_another_run_put_in_the_place_of_ours_is_not_where_we_come_from(tmp_path: Path) -> None:
    Run(tmp_path).save(40)
    ours, theirs = Run(tmp_path), Run(tmp_path)
    ours.restore("epoch_0_step_40")
    theirs.restore("epoch_0_step_40")
    ours.save(50)
    theirs.save(50, value=-1.0)
    ours.save(60)
    lineage = next(info.lineage for info in list_checkpoints(tmp_path) if info.step == 60)
    assert lineage is not None
    assert [origin.name for origin in lineage.ancestors] == ["epoch_0_step_40"]
