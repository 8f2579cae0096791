"""A run on storages that are no disk of this machine: a save and a load that touch one beside the storage fail here.

Where the checkpoints seem to be stands a file, below which nothing can be made or found.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Unpack

import pytest
import torch
from tests.support.memory import MemoryStorage, MovedStorage
from tests.support.ranks import run
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM

from shardwise import Checkpointer, CheckpointingConfig
from shardwise.addons import ConsolidatedHFAddon, SaveHookArgs
from shardwise.disk.names import is_directory, is_file, is_link
from shardwise.disk.storage import Storage, using
from shardwise.ops.verify import verify

TOKENS = torch.arange(24).view(2, 12)
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "vocab_size": 64}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


class Tokenizer:
    """A library's object, which knows of no storage."""

    def save_pretrained(self, save_directory: str | os.PathLike[str], /) -> object:
        (Path(save_directory) / "tokenizer.json").write_text("{}")
        return None


class Card:
    """An addon of somebody's own, which knows of none either."""

    def pre_save(self, **kwargs: Unpack[SaveHookArgs]) -> None:
        """Nothing."""

    def post_save(self, **kwargs: Unpack[SaveHookArgs]) -> None:
        group = kwargs["group"]
        assert group is not None
        if group.is_main:
            (Path(kwargs["model_path"]) / "card.md").write_text("a model")


def values(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    found = {}
    for name, parameter in model.named_parameters():
        for kind, tensor in {"": parameter.detach(), **optimizer.state[parameter]}.items():
            found[f"{name} {kind}"] = (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()
    return found


def train(root: Path, storage: Storage, consolidated: str, is_async: bool) -> None:
    """Three saves, of which retention keeps two; then everything is found, verified and restored."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, **HEADS))
    if torch.distributed.is_initialized():
        fully_shard(model, mesh=init_device_mesh("cpu", (torch.distributed.get_world_size(),)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    config = CheckpointingConfig(
        checkpoint_dir=str(root), save_consolidated=consolidated, max_recent_checkpoints=2, is_async=is_async
    )
    addons = [ConsolidatedHFAddon(), Card()]
    with Checkpointer(config, addons=addons, storage=storage) as checkpointer:
        for step in (1, 2, 3):
            model(input_ids=TOKENS, labels=TOKENS).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            checkpointer.save(
                step=step,
                model=model,
                optimizer=optimizer,
                scheduler=scheduler,
                tokenizer=Tokenizer(),
                metrics={"val_loss": 1.0 / step},
                extra_state={"seen": {"samples": step}},
            )
            checkpointer.async_wait()
        wanted = values(model, optimizer)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        restored = checkpointer.restore(model, optimizer, scheduler)
        assert restored is not None
        assert restored.step == 3
        found = values(model, optimizer)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
        assert checkpointer.latest_step() == 3
        assert [info.step for info in checkpointer.checkpoints()] == [2, 3]
        assert checkpointer.checkpoints()[1].metrics == {"val_loss": 1.0 / 3}
    assert verify(root / "epoch_0_step_3", storage=storage).status == "whole"
    model_directory = root / "epoch_0_step_3" / "model"
    with using(storage):
        files = ["card.md", ".hf_metadata/config.json", ".hf_metadata/tokenizer.json"]
        files += ["consolidated/config.json", "consolidated/tokenizer.json"] if consolidated == "every" else []
        assert [name for name in files if not is_file(model_directory / name)] == []
        assert not is_directory(root / "epoch_0_step_1")


@pytest.mark.parametrize(("consolidated", "is_async"), [("every", False), ("false", True)])
def test_a_run_in_memory(tmp_path: Path, consolidated: str, is_async: bool) -> None:
    root, storage = tmp_path / "run", MemoryStorage()
    root.write_text("")
    train(root, storage, consolidated, is_async)
    assert storage.open_handles == 0
    assert bytes(storage.files[root / "LATEST.txt"]) == b"epoch_0_step_3\n"
    assert [path.name for path in tmp_path.rglob("*")] == ["run"]


def run_moved(root: Path, kept: Path) -> bool:
    storage = MovedStorage(root, kept)
    train(root, storage, "every", True)
    assert verify(root, storage=storage).status == "whole"
    with using(storage):
        return is_link(root / "LATEST")


def test_a_run_of_two_ranks_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    assert run(2, run_moved, tmp_path / "run", tmp_path / "kept") == [True, True]
    assert (tmp_path / "run").read_text() == ""
