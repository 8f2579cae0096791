"""A checkpoint that NeMo AutoModel 0.7.0 wrote on two ranks, as files in `automodel/`, is gone on from on any number.

That the losses are those of going on there was compared where AutoModel is installed; see `make_automodel.py`.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tests.engine.setups import checkpointer
from tests.interop.automodel_run import build, everything
from tests.support.ranks import run

FILES = Path(__file__).parent / "automodel"


def restore(root: Path) -> object:
    model, optimizer, scheduler = build(seed=1)
    with checkpointer(root) as engine:
        record = engine.restore(model, optimizer, scheduler)
    assert record is not None
    assert (record.epoch, record.step, record.unrestored) == (0, 3, ("dataloader",))
    assert scheduler.last_epoch == 3
    return everything(model, optimizer)


@pytest.mark.parametrize("readers", [1, 2, 3])
def test_automodels_checkpoint_is_restored(tmp_path: Path, readers: int) -> None:
    shutil.copytree(FILES / "epoch_0_step_3", tmp_path / "epoch_0_step_3")
    saved = json.loads((FILES / "saved.json").read_text())
    for found in run(readers, restore, tmp_path):
        assert json.loads(json.dumps(found)) == saved


class Position:
    """A dataloader's state."""

    def __init__(self) -> None:
        self.state: dict[str, object] = {}

    def state_dict(self) -> dict[str, object]:
        return self.state

    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        self.state = state_dict


def load_parts(path: Path) -> object:
    model, optimizer, scheduler = build(seed=1)
    loader = Position()
    with checkpointer(path) as engine:
        engine.load_model(model, path / "model")
        engine.load_on_dp_ranks(loader, "dataloader", path)
        assert loader.state == {"position": 7}
        engine.load_optimizer(optimizer, model, path, scheduler)
    return everything(model, optimizer)


def test_its_parts_are_loaded_one_by_one(tmp_path: Path) -> None:
    saved = json.loads((FILES / "saved.json").read_text())
    for found in run(2, load_parts, FILES / "epoch_0_step_3"):
        assert json.loads(json.dumps(found)) == saved
