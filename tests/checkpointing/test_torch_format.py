"""``model_save_format="torch_save"``: what it promises, and what it does not write."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tests.support.ranks import run
from torch import nn
from torch.distributed.fsdp import fully_shard

from shardwise import Checkpointer, CheckpointingConfig
from shardwise.errors import ConfigError


@pytest.mark.parametrize("mode", ["every", True])
@pytest.mark.parametrize("build", [True, False])
def test_an_export_that_would_not_be_written_is_refused(tmp_path: Path, mode: str | bool, build: bool) -> None:
    config = CheckpointingConfig(checkpoint_dir=tmp_path, model_save_format="torch_save", save_consolidated=mode)
    with pytest.raises(ConfigError, match="'torch_save' writes no Hugging Face export. Set model_save_format to"):
        config.build() if build else Checkpointer(config)
    assert list(tmp_path.iterdir()) == []


def test_the_last_save_says_that_it_has_no_export(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    # save_consolidated is "final" where nobody sets it.
    with CheckpointingConfig(checkpoint_dir=tmp_path, model_save_format="torch_save").build() as checkpointer:
        checkpointer.save(0, 1, nn.Linear(2, 2))
        assert "export" not in caplog.text
        checkpointer.save(0, 2, nn.Linear(2, 2), is_final_checkpoint=True)
    assert caplog.text.count("this checkpoint has no Hugging Face export") == 1
    assert not (tmp_path / "epoch_0_step_2" / "model" / "consolidated").exists()


def _between_forward_and_backward(root: str, how: str, reshards: bool) -> tuple[bool, bool]:
    def built() -> nn.Module:
        torch.manual_seed(0)
        return fully_shard(nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3)), reshard_after_forward=reshards)

    model, alone = built(), built()
    before = [p.to_local().detach().clone() for p in model.parameters()]
    config = CheckpointingConfig(
        checkpoint_dir=root, model_save_format=how, save_consolidated="false", is_async=True, save_rng=False
    )
    x = torch.ones(2, 6)
    with config.build(dist.get_rank(), 0, 0) as checkpointer:
        for each in (model, alone):
            optimizer = torch.optim.SGD(each.parameters(), lr=0.5)
            loss = each(x).sum()
            if each is model:
                checkpointer.save(0, 1, model)
            loss.backward()
            optimizer.step()
        pairs = zip(model.parameters(), alone.parameters(), strict=True)
        trained = all(torch.equal(a.to_local(), b.to_local()) for a, b in pairs)
        checkpointer.restore(model)
    pairs_before = zip(model.parameters(), before, strict=True)
    return trained, all(torch.equal(p.to_local(), wanted) for p, wanted in pairs_before)


@pytest.mark.parametrize("reshards", [True, False])
@pytest.mark.parametrize("how", ["safetensors", "torch_save"])
def test_a_save_between_forward_and_backward(tmp_path: Path, how: str, reshards: bool) -> None:
    """FSDP2 frees what it gathered for the forward; neither the save nor the step sees anything of it."""
    assert run(2, _between_forward_and_backward, str(tmp_path), how, reshards) == [(True, True)] * 2
