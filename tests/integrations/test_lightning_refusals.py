"""What shardwise's strategies for Lightning refuse, by name."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from shardwise import CheckpointingConfig
from shardwise.errors import CheckpointNotFoundError, ConfigError, MisuseError

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("lightning") is None, reason="Lightning is not installed: pip install lightning"
)


def module(**hooks: Any) -> Any:
    import lightning as L

    def training_step(self: Any, batch: Any, index: int) -> Any:
        return self.layer(batch).sum()

    def configure_optimizers(self: Any) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    steps = {"training_step": training_step, "configure_optimizers": configure_optimizers}
    made: Any = type("Lit", (L.LightningModule,), steps | hooks)()
    made.layer = torch.nn.Linear(2, 1)
    return made


def trainer(**settings: Any) -> Any:
    import lightning as L

    from shardwise.integrations.lightning import ShardwiseSingleDeviceStrategy

    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    return L.Trainer(accelerator="cpu", strategy=ShardwiseSingleDeviceStrategy(), max_steps=1, **quiet, **settings)


def fit(lit: Any, **settings: Any) -> Any:
    made = trainer()
    made.fit(lit, torch.utils.data.DataLoader(torch.ones(4, 2)), **settings)
    return made


def test_settings_and_plugins() -> None:
    from lightning.fabric.plugins import TorchCheckpointIO

    from shardwise.integrations.lightning import ShardwiseSingleDeviceStrategy

    with pytest.raises(ConfigError, match="checkpointing sets max_recent_checkpoints, which Lightning decides"):
        ShardwiseSingleDeviceStrategy(checkpointing=CheckpointingConfig(max_recent_checkpoints=1))
    with pytest.raises(ConfigError, match="does not support checkpoint_io"):
        ShardwiseSingleDeviceStrategy(checkpoint_io=TorchCheckpointIO())
    with pytest.raises(ConfigError, match="does not support the plugin TorchCheckpointIO"):
        trainer(plugins=[TorchCheckpointIO()])


def test_modules() -> None:
    lit = module()
    lit.strict_loading = False
    with pytest.raises(ConfigError, match="does not support strict_loading=False"):
        fit(lit)
    lit = module()
    lit.save_hyperparameters({"model": torch.nn.Linear(1, 1)})
    with pytest.raises(ConfigError, match="a hyper-parameter of Lit cannot be saved"):
        fit(lit)


def test_hooks_that_change_the_state(tmp_path: Path) -> None:
    def on_save_checkpoint(self: Any, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"]["more"] = 1

    made = fit(module(on_save_checkpoint=on_save_checkpoint))
    with pytest.raises(MisuseError, match="on_save_checkpoint has put more into the state of the model"):
        made.save_checkpoint(tmp_path / "a.ckpt")


def test_checkpoints_that_cannot_be_resumed_from(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match="there is no checkpoint of shardwise at this path"):
        fit(module(), ckpt_path=str(tmp_path / "none.ckpt"))
    made = fit(module())
    made.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    with pytest.raises(MisuseError, match="the checkpoint was saved with save_weights_only"):
        fit(module(), ckpt_path=str(tmp_path / "weights.ckpt"))
    with pytest.raises(ConfigError, match="does not support storage_options"):
        made.save_checkpoint(tmp_path / "b.ckpt", storage_options={"a": 1})


def test_a_path_is_written_again_and_read_for_the_model_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    made = fit(module())
    made.save_checkpoint(path)
    made.save_checkpoint(path)
    assert sorted(each.name for each in path.iterdir()) == ["LATEST", f"epoch_{made.current_epoch}_step_2"]
    saved = made.lightning_module.layer.weight.detach().clone()

    def test_step(self: Any, batch: Any, index: int) -> None:
        pass

    lit = module(test_step=test_step)
    trainer().test(lit, torch.utils.data.DataLoader(torch.ones(4, 2)), ckpt_path=str(path))
    assert torch.equal(lit.layer.weight, saved)
    made.strategy.remove_checkpoint(path)
    assert not path.exists()


def test_fabric(tmp_path: Path) -> None:
    import lightning as L

    from shardwise.integrations.lightning import ShardwiseFabricSingleDeviceStrategy

    fabric = L.Fabric(accelerator="cpu", strategy=ShardwiseFabricSingleDeviceStrategy())
    state = {"model": fabric.setup_module(torch.nn.Linear(2, 1)), "step": 3}
    with pytest.raises(ConfigError, match="does not support filter"):
        fabric.save(tmp_path / "a.ckpt", state, filter={"model": lambda name, value: True})
    with pytest.raises(MisuseError, match="there is no model in the state"):
        fabric.save(tmp_path / "a.ckpt", {"step": 3})
    fabric.save(tmp_path / "a.ckpt", state)
    with pytest.raises(ConfigError, match="does not support strict=False"):
        fabric.load(tmp_path / "a.ckpt", state, strict=False)
    with pytest.raises(MisuseError, match="load was given no state"):
        fabric.load(tmp_path / "a.ckpt")
    state["step"] = 0
    assert fabric.load(tmp_path / "a.ckpt", state) == {}
    assert state["step"] == 3
