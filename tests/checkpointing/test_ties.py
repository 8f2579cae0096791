"""Two names of one tensor in the model, two tensors in the file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from shardwise import CheckpointingConfig
from shardwise.errors import TensorError


class Tied(nn.Module):
    """An embedding and a head that are one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight


@pytest.mark.parametrize("equal", [True, False])
def test_a_file_with_both_is_loaded_only_if_they_are_equal(tmp_path: Path, equal: bool) -> None:
    values = torch.arange(15.0).view(5, 3)
    save_file(
        {"embed.weight": values, "head.weight": values.clone() + (0 if equal else 1)}, tmp_path / "model.safetensors"
    )
    model = Tied()
    checkpointer = CheckpointingConfig(checkpoint_dir=tmp_path / "none").build(0, 0, 0)
    if equal:
        checkpointer.load_model(model, tmp_path)
        assert torch.equal(model.embed.weight, values)
        return
    before = model.embed.weight.detach().clone()
    with pytest.raises(TensorError, match=r"head\.weight.*tie_word_embeddings"):
        checkpointer.load_model(model, tmp_path)
    assert torch.equal(model.embed.weight, before)


@pytest.mark.parametrize("equal", [True, False])
def test_two_aliases_without_the_kept_name_are_loaded_only_if_they_are_equal(tmp_path: Path, equal: bool) -> None:
    values = torch.arange(15.0).view(5, 3)
    model = Tied()
    model.second = nn.Linear(3, 5, bias=False)
    model.second.weight = model.embed.weight
    aliases = {"head.weight": values, "second.weight": values.clone() + (0 if equal else 1)}
    save_file(aliases, tmp_path / "model.safetensors")
    before = model.embed.weight.detach().clone()
    checkpointer = CheckpointingConfig(checkpoint_dir=tmp_path / "none").build(0, 0, 0)
    if equal:
        checkpointer.load_model(model, tmp_path)
        assert torch.equal(model.embed.weight, values)
        return
    with pytest.raises(TensorError, match="holds other values for it than for"):
        checkpointer.load_model(model, tmp_path)
    assert torch.equal(model.embed.weight, before)
