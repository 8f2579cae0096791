"""What is given where a model is expected is named by its first bytes, with the way in, and nothing is overwritten."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from tests.format.test_sniff import FILES
from tests.support.ranks import failure, run
from torch import nn
from torch.distributed._shard.sharded_tensor import empty as sharded_empty
from torch.distributed._shard.sharding_spec import ChunkShardingSpec
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from shardwise import Checkpointer, CheckpointingConfig
from shardwise.errors import CheckpointNotFoundError, FormatError, HeaderError, MissingTensorError
from shardwise.ops.inspect import inspect

NOT_SAFETENSORS = [name for name in FILES if name != "safetensors"]


def engine_in(root: Path) -> Checkpointer:
    rank = dist.get_rank() if dist.is_initialized() else 0
    return Checkpointer(CheckpointingConfig(checkpoint_dir=root), rank, 0, 0)


def sevens() -> nn.Linear:
    model = nn.Linear(3, 2)
    for parameter in model.parameters():
        nn.init.constant_(parameter, 7)
    return model


def load(path: Path, how: str = "model") -> nn.Linear:
    """Load into a model of sevens; where it fails they have to be there."""
    model, engine = sevens(), engine_in(path.parent / "run")
    try:
        if how == "base":
            engine.load_base_model(model, "cpu", None, str(path))
        else:
            engine.load_model(model, path, is_init_step=how == "init")
    except Exception:
        assert all(torch.equal(own, mine) for own, mine in zip(model.parameters(), sevens().parameters(), strict=True))
        raise
    return model


def fails(path: Path, how: str) -> None:
    load(path, how)


@pytest.mark.parametrize("name", NOT_SAFETENSORS)
def test_another_format_under_the_name_of_safetensors(tmp_path: Path, name: str) -> None:
    data, _, match = FILES[name]
    (tmp_path / "model.safetensors").write_bytes(data)
    for path in (tmp_path / "model.safetensors", tmp_path):
        with pytest.raises(HeaderError, match=match) as caught:
            load(path)
        assert "not a safetensors file" in str(caught.value)
        assert caught.value.hint


@pytest.mark.parametrize("name", ["lfs", "html", "gguf", "empty"])
def test_as_a_base_model_too(tmp_path: Path, name: str) -> None:
    data, _, match = FILES[name]
    for file in ("model.safetensors", "pytorch_model.bin"):
        directory = tmp_path / file.partition(".")[0]
        directory.mkdir()
        (directory / file).write_bytes(data)
        with pytest.raises(FormatError, match=match):
            load(directory, "base")
        with pytest.raises(FormatError, match=match):
            load(directory / file, "base")


def test_every_rank_is_told(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(FILES["lfs"][0])
    for how in ("model", "base"):
        error = failure(2, fails, tmp_path, how)
        assert isinstance(error, HeaderError)
        assert "git LFS pointer" in str(error)
        assert "git lfs pull" in str(error)


def test_a_base_for_saving_that_is_a_pointer(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "model.safetensors").write_bytes(FILES["lfs"][0])
    config = CheckpointingConfig(
        checkpoint_dir=tmp_path / "run", save_consolidated="every", model_repo_id=str(tmp_path / "base")
    )
    with Checkpointer(config) as engine, pytest.raises(HeaderError, match="git LFS pointer"):
        engine.save(0, 1, sevens())
    assert not (tmp_path / "run").exists()


def test_inspect_names_it(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(FILES["torch zip"][0])
    with pytest.raises(HeaderError, match="zip archive as torch.save writes it"):
        inspect(file)
    found = inspect(tmp_path)
    assert found.damaged == ("model.safetensors",)
    assert "zip archive as torch.save writes it" in dict(found.unread)["model.safetensors"]


def test_a_directory_says_what_is_there_instead(tmp_path: Path) -> None:
    torch.save(sevens().state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(
        CheckpointNotFoundError, match=r"only pytorch_model.bin \(a zip archive as torch.save"
    ) as caught:
        load(tmp_path)
    assert "load_base_model" in str(caught.value)
    assert torch.equal(load(tmp_path, "init").weight, sevens().weight)


def test_one_file_of_a_dcp_directory(tmp_path: Path) -> None:
    torch.distributed.checkpoint.save(sevens().state_dict(), checkpoint_id=tmp_path)
    for name in ("__0_0.distcp", ".metadata"):
        with pytest.raises(FormatError, match=f"one file of a DCP directory.*Pass the directory: '{tmp_path}'"):
            load(tmp_path / name)


# --- one level below ------------------------------------------------------------------------------------------------


def test_what_is_one_level_below_is_named(tmp_path: Path) -> None:
    root = tmp_path / "run"
    with engine_in(root) as engine:
        for step in (9, 10):
            engine.save(0, step, sevens())
    for path in (root, root / "epoch_0_step_10"):
        with pytest.raises(CheckpointNotFoundError, match=f"Did you mean '{root}/epoch_0_step_10/model'"):
            load(path)


@pytest.mark.parametrize("above", ["", "models--org--name", "models--org--name/snapshots"])
def test_a_hub_cache_is_no_model(tmp_path: Path, above: str) -> None:
    snapshot = tmp_path / "models--org--name" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    save_file(sevens().state_dict(), snapshot / "model.safetensors")
    for how in ("model", "init"):
        with pytest.raises(CheckpointNotFoundError, match=f"Did you mean '{snapshot}'"):
            load(tmp_path / above, how)


# --- files of torch -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("key", ["model", "module", "model_state_dict", "state_dict"])
def test_the_entry_of_a_training_loop_is_unwrapped(tmp_path: Path, key: str, legacy: bool) -> None:
    optimizer = torch.optim.AdamW(sevens().parameters())
    state = {name: torch.full_like(value, 3) for name, value in sevens().state_dict().items()}
    whole = {key: state, "optimizer": optimizer.state_dict(), "rng": {"cpu": torch.ones(9)}, "step": torch.tensor(4)}
    torch.save({**whole, "epoch": 2}, tmp_path / "last.pt", _use_new_zipfile_serialization=not legacy)
    model = load(tmp_path / "last.pt", "base")
    assert all(bool((parameter == 3).all()) for parameter in model.parameters())


def test_which_of_two_entries_is_not_guessed(tmp_path: Path) -> None:
    state = sevens().state_dict()
    for number, (whole, named) in enumerate(
        [
            ({"model": state, "ema": state}, "'model', 'ema'"),
            ({"generator": state}, "'generator'"),
            ({"model": state, "weight": torch.ones(2, 3)}, "'model', 'weight'"),
        ]
    ):
        file = tmp_path / f"{number}.pt"
        torch.save(whole, file)
        with pytest.raises(FormatError, match=f"tensors under {named}, and nothing says which"):
            load(file, "base")
    torch.save({"epoch": 3, "args": {"lr": 1.0}, "model": {"model": state}}, tmp_path / "deep.pt")
    with pytest.raises(FormatError, match="holds no state dict; its entries are 'epoch', 'args', 'model'"):
        load(tmp_path / "deep.pt", "base")


def save_parts(root: Path, legacy: bool) -> None:
    mesh = init_device_mesh("cpu", (2,))
    state = {"weight": distribute_tensor(torch.ones(2, 3), mesh, [Shard(0)])}
    torch.save(state, root / f"dtensor-{dist.get_rank()}.pt", _use_new_zipfile_serialization=not legacy)
    spec = ChunkShardingSpec(dim=0, placements=["rank:0/cpu", "rank:1/cpu"])
    parts = {"model": {"weight": sharded_empty(spec, 2, 3)}}
    torch.save(parts, root / f"sharded-{dist.get_rank()}.pt", _use_new_zipfile_serialization=not legacy)


@pytest.mark.parametrize("legacy", [False, True])
def test_one_ranks_shards_are_named(tmp_path: Path, legacy: bool) -> None:
    run(2, save_parts, tmp_path, legacy)
    for name, cls in (("dtensor-0.pt", "DTensor"), ("sharded-1.pt", "ShardedTensor")):
        for how in ("base", "init"):
            with pytest.raises(FormatError, match=f"one rank's shards of a model.*{cls}.*full_state_dict"):
                load(tmp_path / name, how)
    error = failure(2, fails, tmp_path / "dtensor-1.pt", "base")
    assert isinstance(error, FormatError)
    assert "one rank's shards" in str(error)


# --- near names -----------------------------------------------------------------------------------------------------


def hinted(tmp_path: Path, wanted: dict[str, torch.Size], there: dict[str, tuple[int, ...]]) -> str:
    model = nn.Module()
    for name, shape in wanted.items():
        parent = model
        *path, leaf = name.split(".")
        for part in path:
            if not hasattr(parent, part):
                parent.add_module(part, nn.Module())
            parent = getattr(parent, part)
        parent.register_parameter(leaf, nn.Parameter(torch.zeros(shape)))
    save_file({name: torch.zeros(shape) for name, shape in there.items()}, tmp_path / "model.safetensors")
    with pytest.raises(MissingTensorError) as caught:
        engine_in(tmp_path / "run").load_model(model, tmp_path)
    return str(caught.value)


@pytest.mark.parametrize(
    ("wanted", "there", "close"),
    [
        ("layers.0.self_attn.q_proj.weight", "layers.0.self_attn.q_norm.weight", False),
        ("layers.0.self_attn.q_proj.weight", "layers.0.self_attn.k_proj.weight", False),
        ("layers.0.self_attn.o_proj.weight", "layers.0.attn_norm.weight", False),
        ("layers.0.mlp.fc1.weight", "layers.0.mlp.fc2.weight", False),
        ("layers.0.mlp.up_proj.weight", "layers.0.mlp.up_proj.bias", False),
        ("layers.0.self_attn.q_proj.weight", "layers.0.attn.q_proj.weight", True),
        ("layers.0.mlp.up_proj.weight", "layers.0.mlp.up_project.weight", True),
    ],
)
def test_a_hint_pairs_what_may_be_the_same_tensor(tmp_path: Path, wanted: str, there: str, close: bool) -> None:
    text = hinted(tmp_path, {wanted: torch.Size((4, 4))}, {there: (4, 4)})
    assert (f"The checkpoint has '{there}'" in text) is close
    if close:
        assert there not in hinted(tmp_path, {wanted: torch.Size((4, 4))}, {there: (4,)})
