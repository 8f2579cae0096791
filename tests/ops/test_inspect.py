"""What `inspect` and `consolidate` tell and write."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.ops.checkpoints import engine, model, optimizer, saved
from tests.ops.damaged import gpt2, save_dcp, stepped
from tests.ops.pages import data_of

from shardwise.cli import main
from shardwise.errors import CheckpointExistsError, CheckpointNotFoundError
from shardwise.ops.consolidate import consolidate
from shardwise.ops.inspect import inspect
from shardwise.ops.page import EQUAL, write_page


def test_a_checkpoint(tmp_path: Path) -> None:
    saved(tmp_path, (1, 7))
    found = inspect(tmp_path)
    assert (found.epoch, found.step, found.world_size, found.verifiable) == (0, 7, 1, True)
    assert dict(found.metrics) == {"default": pytest.approx(1 / 7)}
    assert found.components == ("model", "optim")
    assert found.dtypes("model") == {"F32": 60_007}
    sizes = {file.path: file.size for file in found.files}
    assert sizes == {path: (found.path / path).stat().st_size for path in sizes}
    big = next(t for t in found.tensors if t.spec.name == "big")
    assert (big.spec.shape, big.files) == ((300, 200), ("model/consolidated/model.safetensors",))


def test_a_part(tmp_path: Path) -> None:
    directory = saved(tmp_path)
    found = inspect(directory / "optim")
    assert found.components == ("optim",)
    assert all(file.path.startswith("optim/") for file in found.files)


def test_anothers_directory(tmp_path: Path) -> None:
    save_file({"w": torch.ones(3, 2, dtype=torch.bfloat16)}, tmp_path / "model.safetensors")
    found = inspect(tmp_path)
    assert not found.verifiable
    assert found.dtypes("model") == {"BF16": 6}


def test_nothing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError):
        inspect(tmp_path)


def test_consolidating_shards_gives_the_bytes_of_a_direct_export(tmp_path: Path) -> None:
    direct = saved(tmp_path / "direct")
    shards = saved(tmp_path / "shards", save_consolidated="false")
    report = consolidate(shards / "model")
    assert report.path == shards / "model" / "consolidated"
    for name in ("model.safetensors", "model.safetensors.index.json"):
        assert (report.path / name).read_bytes() == (direct / "model" / "consolidated" / name).read_bytes()
    with pytest.raises(CheckpointExistsError):
        consolidate(shards)


def test_consolidating_elsewhere(tmp_path: Path) -> None:
    shards = saved(tmp_path / "shards", save_consolidated="false")
    report = consolidate(shards, tmp_path / "export", max_file_bytes=1000)
    assert len(report.files) == 2
    found = {name: t for file in report.files for name, t in load_file(report.path / file).items()}
    for name, tensor in model().named_parameters():
        assert found[name].shape == tensor.shape


def test_a_hub_caches_snapshot(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    save_file({"w": torch.ones(3, 2)}, blobs / "0123")
    (snapshot / "model.safetensors").symlink_to("../../blobs/0123")
    for place in (snapshot, snapshot / "model.safetensors"):
        (tensor,) = inspect(place).tensors
        assert (tensor.component, tensor.spec.shape, tensor.files) == ("model", (3, 2), ("model.safetensors",))
    (tensor,) = inspect(tmp_path).tensors
    assert tensor.files == ("snapshots/abc/model.safetensors",)


def test_the_tensors_of_dcp(tmp_path: Path) -> None:
    net = gpt2()
    found = inspect(save_dcp({"model": net.state_dict(), "step": 3}, tmp_path / "dcp"))
    told = {tensor.spec.name: tensor.spec.shape for tensor in found.tensors}
    assert told == {f"model.{name}": tuple(value.shape) for name, value in net.state_dict().items()}
    assert {file for tensor in found.tensors for file in tensor.files} == {"__0_0.distcp"}
    counts = {file.path: file.tensors for file in found.files}
    assert counts["__0_0.distcp"] == len(told)


def test_the_tensors_of_torch_save(tmp_path: Path) -> None:
    saved(tmp_path, save_consolidated="false", model_save_format="torch_save")
    found = inspect(tmp_path)
    assert found.verifiable
    assert found.components == ("model", "optim")
    assert found.dtypes("model") == {"F32": 60_007}


def test_torch_files_and_what_cannot_be_read(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2, 3)}, tmp_path / "pytorch_model.bin")
    torch.save({"f": print}, tmp_path / "model.pt")
    found = inspect(tmp_path)
    assert [(tensor.spec.name, tensor.spec.shape) for tensor in found.tensors] == [("w", (2, 3))]
    ((path, why),) = found.unread
    assert path == "model.pt"
    assert "print" in why


def test_a_pipelines_models_are_told_apart(tmp_path: Path) -> None:
    for number, name in enumerate(("unet", "vae"), start=1):
        (tmp_path / name).mkdir()
        save_file({"w": torch.ones(number)}, tmp_path / name / "diffusion_pytorch_model.safetensors")
    found = inspect(tmp_path)
    assert [(tensor.component, tensor.spec.shape) for tensor in found.tensors] == [("unet", (1,)), ("vae", (2,))]
    assert found.components == ("unet", "vae")


def test_files_that_others_name_and_that_are_absent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gpt2().save_pretrained(tmp_path, max_shard_size="10kB")
    assert inspect(tmp_path).damaged == ()
    absent = min(tmp_path.glob("model-00002-*"))
    absent.unlink()
    found = inspect(tmp_path)
    assert set(found.damaged) == {"model.safetensors.index.json", absent.name}
    assert absent.name in dict(found.unread)["model.safetensors.index.json"]
    assert found.tensors
    assert main(["inspect", str(tmp_path)]) == 1
    assert f"DAMAGED: {absent.name}" in capsys.readouterr().out
    (tmp_path / "model.safetensors.index.json").unlink()
    assert inspect(tmp_path).damaged == (absent.name,)


def test_an_index_that_names_what_a_file_does_not_have(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "model.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": {"w": "model.safetensors", "v": "model.safetensors"}}))
    assert inspect(tmp_path).damaged == (index.name,)


def test_a_file_of_dcp_that_is_absent(tmp_path: Path) -> None:
    directory = save_dcp({"w": torch.ones(2)}, tmp_path / "dcp")
    assert inspect(directory).damaged == ()
    (directory / "__0_0.distcp").unlink()
    assert inspect(directory).damaged == ("__0_0.distcp",)


def test_an_optimizer_beside_the_model(tmp_path: Path) -> None:
    net = gpt2()
    state = {"model": net.state_dict(), "optimizer": stepped(net).state_dict(), "step": 3}
    found = inspect(save_dcp(state, tmp_path / "dcp"))
    assert found.components == ("model", "optimizer")
    names = {component: {t.spec.name for t in found.tensors if t.component == component} for component in state}
    assert names["model"] == {f"model.{name}" for name in net.state_dict()}
    assert all(name.startswith("optimizer.state.") for name in names["optimizer"])
    page = data_of(write_page(tmp_path / "dcp", tmp_path / "page.html", against=tmp_path / "dcp").html)
    assert set(page["change"]["status"]) == {EQUAL}
    torch.save(state, tmp_path / "run.pt")
    ((path, why),) = inspect(tmp_path / "run.pt").unread
    assert (path, "optimizer, step" in why) == ("run.pt", True)
    torch.save(state["optimizer"], tmp_path / "weights.pt")
    assert inspect(tmp_path / "weights.pt").unread == (
        ("weights.pt", "it is an optimizer's state, whose tensors are not listed"),
    )


def test_a_models_own_module_of_an_optimizers_name(tmp_path: Path) -> None:
    state = {"app": {"model": {"scaler": {"weight": torch.ones(2)}}, "optim": {"state": {"w": torch.ones(3)}}}}
    found = inspect(save_dcp(state, tmp_path / "dcp"))
    assert [(t.component, t.spec.shape) for t in found.tensors] == [("model", (2,)), ("optim", (3,))]


def test_components_that_stand_alone_side_by_side(tmp_path: Path) -> None:
    net = model()
    steps = optimizer(net)
    with engine(tmp_path / "unused") as made:
        made.save_model(net, tmp_path / "alone")
        made.save_optimizer(steps, net, tmp_path / "alone")
    found = inspect(tmp_path / "alone")
    assert (found.path, found.verifiable) == (tmp_path / "alone", True)
    assert found.components == ("model", "optim")
    for file in found.files:
        assert (found.path / file.path).stat().st_size == file.size
    [big] = [tensor for tensor in found.tensors if tensor.spec.name == "big"]
    content = (found.path / big.pieces[0].file).read_bytes()[big.pieces[0].offset :][: big.pieces[0].nbytes]
    assert content == bytes(net.big.detach().numpy().tobytes())
    (found.path / big.files[0]).unlink()
    assert inspect(tmp_path / "alone").damaged == big.files


def test_pieces_of_one_tensor_are_put_together(tmp_path: Path) -> None:
    for number, offset in enumerate((0, 2), start=1):
        note = {"DCP_SHARDING_INFO": json.dumps({"w": {"saved_offsets": [offset, 0]}})}
        name = f"shard-0000{number}-model-00001-of-00001.safetensors"
        save_file({"w": torch.ones(2, 3)}, tmp_path / name, {"DCP_VERSION": "1.0", **note})
    [tensor] = inspect(tmp_path).tensors
    assert (tensor.spec.shape, len(tensor.pieces), len(tensor.files)) == ((4, 3), 2, 2)
    save_file({"w": torch.ones(2)}, tmp_path / "other.safetensors")
    assert set(inspect(tmp_path).damaged) == {path.name for path in tmp_path.glob("shard-*")}
