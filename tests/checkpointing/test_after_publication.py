"""What happens around the commit: every byte is synced before it, and what fails after it does not undo it."""

from __future__ import annotations

import errno
import json
import logging
import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tests.checkpointing.modes import MODES
from tests.faults.layer import Tape, TapedStorage
from tests.support.ranks import run
from torch import nn

from shardwise import Checkpointer, CheckpointingConfig
from shardwise.disk.storage import LocalStorage
from shardwise.lifecycle import list_checkpoints


def kept(root: Path) -> list[int]:
    return [info.step for info in list_checkpoints(root)]


class Stubborn(LocalStorage):
    """Does not delete one checkpoint, whatever it is called."""

    name = "epoch_0_step_1"

    def remove_tree(self, path: Path) -> None:
        if self.name and path.name.endswith(self.name) and path.exists():
            raise OSError(errno.EACCES, "Permission denied", str(path))
        super().remove_tree(path)


def test_a_checkpoint_that_cannot_be_deleted_costs_no_later_save(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, fs = nn.Linear(2, 2), Stubborn()
    config = CheckpointingConfig(checkpoint_dir=tmp_path, max_recent_checkpoints=1)
    with Checkpointer(config, storage=fs) as engine:
        for step in (1, 2, 3):
            engine.save(0, step, model)
    told = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    told = [text for text in told if "config.json" not in text]  # which this module has none of
    assert len(told) == 2
    assert all("is published" in text and "step_1" in text and "Permission denied" in text for text in told)
    assert kept(tmp_path) == [3]
    # A process that starts again finds what is left, and goes on as well.
    with Checkpointer(config, storage=fs) as engine:
        engine.save(0, 4, model)
        assert kept(tmp_path) == [4]
        fs.name = ""
        engine.save(0, 5, model)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["LATEST", "epoch_0_step_5"]


def saved(root: Path, metrics: list[dict[str, float] | None], **settings: object) -> list[int]:
    config = CheckpointingConfig(checkpoint_dir=root, max_recent_checkpoints=1, keep_best=1, **settings)  # type: ignore[arg-type]
    with config.build() as engine:
        first = max(kept(root), default=-1) + 1
        for step, numbers in enumerate(metrics, start=first):
            engine.save(0, step, nn.Linear(2, 2), metrics=numbers)
    return kept(root)


def test_while_the_metric_is_unknown_nothing_is_deleted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    numbers: list[dict[str, float] | None] = [{"val_loss": 1.0}, {"val_loss": 3.0}, {"val_loss": math.nan}, None]
    assert saved(tmp_path, numbers) == [0, 1, 2, 3]
    assert "the metric 'default', which is not among its metrics ['val_loss']" in caplog.text
    assert "has the metric 'default', by which keep_best chooses the best: none is deleted" in caplog.text


def test_checkpoints_without_the_metric_do_not_cost_the_best(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    numbers: list[dict[str, float] | None] = [
        {"default": 2.0},
        {"default": 1.0},
        None,
        {"default": math.nan},
        {"a": 0.0},
    ]
    assert saved(tmp_path, numbers) == [1, 4]
    assert "the metric 'default', which is nan" in caplog.text


def test_a_checkpoint_whose_metrics_are_damaged_may_be_the_best(tmp_path: Path) -> None:
    assert saved(tmp_path, [{"default": 2.0}, {"default": 1.0}]) == [1]
    (tmp_path / "epoch_0_step_1" / "losses.json").write_text("{")
    assert saved(tmp_path, [{"default": 5.0}, {"default": 6.0}]) == [1, 2, 3]


class Several(nn.Module):
    """For several files, and with a tensor that has no bytes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(8, 8, bias=False) for _ in range(5)])
        self.nothing = nn.Parameter(torch.zeros(0, 3))


class Empty(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.nothing = nn.Parameter(torch.zeros(0, 3))


def unsynced(root: Path, settings: dict[str, object], is_empty: bool) -> list[str]:
    """Files whose last change by this rank it has not synced; everything but the commit's own."""
    tape = Tape(root)
    config = CheckpointingConfig(checkpoint_dir=root, max_file_bytes=300, **settings)  # type: ignore[arg-type]
    with Checkpointer(config, dist.get_rank(), 0, 0, storage=TapedStorage(tape)) as engine:
        engine.save(0, 1, Empty() if is_empty else Several())
    changed = {path: n for n, (kind, path) in enumerate(tape.done) if kind in ("create", "write")}
    synced = {path: n for n, (kind, path) in enumerate(tape.done) if kind == "sync"}
    assert changed or dist.get_rank()  # of what has no bytes the lowest rank writes all
    return [path for path, last in changed.items() if synced.get(path, -1) < last]


@pytest.mark.parametrize("is_empty", [False, True])
@pytest.mark.parametrize("settings", [mode for mode in MODES if mode.id not in ("torch_save", "async")])
def test_whoever_changes_a_file_syncs_it(tmp_path: Path, settings: dict[str, object], is_empty: bool) -> None:
    assert run(2, unsynced, tmp_path, settings, is_empty) == [[], []]
    assert json.loads((tmp_path / "epoch_0_step_1" / "losses.json").read_text()) == {}
