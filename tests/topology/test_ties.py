"""A last stage's own copy of a tied head takes the embedding's values; a head of its own does not."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from tests.support.ranks import failure, run
from tests.topology.setups import EMBEDDING, HEAD, LAYERS, named, stage, value, whole
from torch import nn

from shardwise import Checkpointer, CheckpointingConfig
from shardwise.errors import MissingTensorError


def engine(root: Path, pp_rank: int = 0, **settings: object) -> Checkpointer:
    config = CheckpointingConfig(checkpoint_dir=root, **settings)  # type: ignore[arg-type]
    return config.build(dp_rank=0, tp_rank=0, pp_rank=pp_rank)


def stepped(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW after one step, its state different for each tensor."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0, foreach=False)
    for name, param in named([model]).items():
        param.grad = value("untied", "gradient", name, param.shape)
    optimizer.step()
    return optimizer


def save_whole(root: Path) -> None:
    """Every rank has the whole tied model; a checkpoint in each of the two ways."""
    model = whole("tied", "weight")
    optimizer = stepped(model)
    for mode in ("every", "false"):
        with engine(root / mode, save_consolidated=mode) as checkpointer:
            checkpointer.save(0, 1, model, optimizer)


def load_stages(root: Path, family: str) -> None:
    rank = dist.get_rank()
    layers = tuple(range(LAYERS // 2 * rank, LAYERS // 2 * (rank + 1)))
    part = stage(whole(family, "other"), layers, rank == 0, rank == 1)
    optimizer = torch.optim.AdamW(part.parameters(), foreach=False)
    with engine(root, rank) as checkpointer:
        checkpointer.restore(part, optimizer)
    params = named([part])
    assert (HEAD in params) == (rank == 1)
    assert (EMBEDDING in params) == (rank == 0)
    for name, param in params.items():
        assert torch.equal(param, value("tied", "weight", name, param.shape)), name
        origin = EMBEDDING if name == HEAD else name
        mean = 0.1 * value("untied", "gradient", origin, param.shape)
        assert torch.allclose(optimizer.state[param]["exp_avg"], mean), name


def test_a_stages_copy_takes_the_embedding_and_its_optimizer_state(tmp_path: Path) -> None:
    run(2, save_whole, tmp_path)
    for mode in ("every", "false"):
        run(2, load_stages, tmp_path / mode, "tied")


def test_a_head_that_is_not_tied_is_missed(tmp_path: Path) -> None:
    run(2, save_whole, tmp_path)
    error = failure(2, load_stages, tmp_path / "every", "untied")
    assert isinstance(error, MissingTensorError)
    assert error.tensor == HEAD
