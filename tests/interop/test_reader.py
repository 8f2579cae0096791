"""`SafetensorsReader` gives DCP what is not a tensor, out of DCP's own directories and of ours."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from tests.engine.setups import checkpointer
from tests.interop.runs import FLAT, Run
from tests.support.ranks import run
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from shardwise import SafetensorsReader
from shardwise.errors import UnsafePickleError


def save(layout: str, path: Path) -> object:
    there = Run(seed=0)
    there.steps(0, 3)
    there.save(layout, path)
    return there.everything()


class Through(Run):
    """Loads through our reader."""

    def load(self, layout: str, path: Path) -> None:
        if layout == "plain":
            self.steps(50, 1)
        state = self.state(layout)
        dcp.load(state, storage_reader=SafetensorsReader(path))
        if layout == "plain":
            self.net.load_state_dict(state["model"])  # type: ignore[arg-type]
            self.optimizer.load_state_dict(state["optimizer"])  # type: ignore[arg-type]
            self.scheduler.load_state_dict(state["scheduler"])  # type: ignore[arg-type]
        if layout == "titan":
            assert state["dataloader"] == {"dp_rank_0": b"position 7", "world_size": 1}
            self._set({name: state[name] for name in self.net.state_dict()}, state["optimizer"], state["lr_scheduler"])


def load(layout: str, path: Path) -> object:
    there = Through(seed=1)
    there.load(layout, path)
    return there.everything()


@pytest.mark.parametrize("layout", ["plain", "app", "titan"])
def test_everything_of_a_dcp_directory_can_be_loaded(tmp_path: Path, layout: str) -> None:
    saved = run(1, save, layout, tmp_path / "dcp")
    assert run(1, load, layout, tmp_path / "dcp") == saved


def save_ours(root: Path, model_save_format: str) -> object:
    there = Run(seed=0)
    there.steps(0, 3)
    with checkpointer(root, model_save_format=model_save_format, save_consolidated="false") as engine:
        engine.save(0, 3, there.net, there.optimizer)
    return there.everything()


def load_ours(path: Path, flat: bool) -> object:
    here = Run(seed=0)
    options = FLAT if flat else None
    state = get_optimizer_state_dict(here.net, here.optimizer, options=options)
    # Ours merges groups by their options: the order is that of the run that saved, as DCP expects it.
    dcp.load(state, storage_reader=SafetensorsReader(path))
    set_optimizer_state_dict(here.net, here.optimizer, state, options=options)
    here.net.load_state_dict(here.net.state_dict())
    return {key: value for key, value in here.everything().items() if "/" in key or key in "01"}


@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize("model_save_format", ["torch_save", "safetensors"])
def test_our_own_optimizers_have_param_groups_for_dcp(tmp_path: Path, model_save_format: str, flat: bool) -> None:
    saved = run(1, save_ours, tmp_path, model_save_format)[0]
    loaded = run(1, load_ours, tmp_path / "epoch_0_step_3" / "optim", flat)[0]
    assert loaded == {key: value for key, value in saved.items() if key in loaded}  # type: ignore[attr-defined]
    assert {"0", "1", "head.weight/exp_avg"} <= set(loaded)  # type: ignore[call-overload]


class Payload:
    """Runs code where it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.marker,)


def test_a_value_that_runs_code_is_refused_when_it_is_asked_for(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    dcp.save({"weight": torch.ones(2), "bad": Payload(marker)}, checkpoint_id=str(tmp_path / "dcp"))
    state: dict[str, object] = {"weight": torch.zeros(2)}
    dcp.load(state, storage_reader=SafetensorsReader(tmp_path / "dcp"))
    assert torch.equal(state["weight"], torch.ones(2))  # type: ignore[arg-type]
    state["bad"] = None
    with pytest.raises(CheckpointException, match="allow_legacy_pickle_restore") as caught:
        dcp.load(state, storage_reader=SafetensorsReader(tmp_path / "dcp"))
    assert isinstance(caught.value.failures[0][0], UnsafePickleError)
    assert not marker.exists()
    dcp.load(state, storage_reader=SafetensorsReader(tmp_path / "dcp", allow_legacy_pickle_restore=True))
    assert marker.exists()
