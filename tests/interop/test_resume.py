"""Runs of others go on here as they would have gone on there, on any number of ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.engine.setups import checkpointer
from tests.interop.runs import SAVED_AT, STEPS, Run
from tests.support.ranks import run

LAYOUTS = ["plain", "app", "titan", "automodel"]


def save_and_go_on(layout: str, path: Path) -> object:
    there = Run(seed=0)
    there.steps(0, SAVED_AT)
    there.save(layout, path)
    return there.steps(SAVED_AT, STEPS), there.everything()


def go_on_there(layout: str, path: Path) -> object:
    there = Run(seed=1)
    there.load(layout, path)
    return there.steps(SAVED_AT, STEPS), there.everything()


def go_on_here(layout: str, path: Path) -> object:
    here = Run(seed=2)
    extra: dict[str, object] = {"train_state": here.counters} if layout in ("app", "titan") else {}
    with checkpointer(path.parent) as engine:
        record = engine.restore(here.net, here.optimizer, here.scheduler, restore_from=path, extra_state=extra)
    assert record is not None
    assert record.step == 3
    left = {"plain": ("epoch",), "titan": ("dataloader",)}
    assert record.unrestored == left.get(layout, ())
    assert here.counters.tokens == (6 * SAVED_AT if extra else 0)
    assert here.counters.step == (SAVED_AT if extra else 0)
    return here.steps(SAVED_AT, STEPS), here.everything()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("writers", "readers"),
    [(2, 2), (2, 1), *(pytest.param(w, r, marks=pytest.mark.slow) for w, r in [(1, 2), (2, 3), (1, 1), (3, 2)])],
)
def test_a_run_of_others_goes_on(tmp_path: Path, layout: str, writers: int, readers: int) -> None:
    path = tmp_path / "step-3"
    there = run(writers, save_and_go_on, layout, path)
    if readers != writers:
        there = run(readers, go_on_there, layout, path)
    assert run(readers, go_on_here, layout, path) == there
