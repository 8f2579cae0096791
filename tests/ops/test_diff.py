"""Comparing checkpoints, exports, shards, DCP directories and files with each other."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from tests.ops.checkpoints import engine, model, optimizer, saved

from shardwise.cli import main
from shardwise.errors import IntegrityError, MisuseError
from shardwise.ops.diff import diff

EXPORT = "model/consolidated/model.safetensors"


def moved(root: Path, by: float) -> Path:
    """A checkpoint of the same model with one element of ``small`` moved."""
    net = model()
    optim = optimizer(net)
    with torch.no_grad():
        net.small[2] += by
    with engine(root) as made:
        path = made.save(0, 1, net, optim)
    assert path is not None
    return path


def test_checkpoints_are_compared_by_digest_and_where_these_differ_by_value(tmp_path: Path) -> None:
    a, b = saved(tmp_path / "a"), moved(tmp_path / "b", 0.5)
    for place in (a, b):  # that what has equal digests is not read shows where it has changed since
        file = place / "optim" / "shard-00001-optim-00001-of-00001.safetensors"
        file.write_bytes(file.read_bytes()[:-4] + place.parent.name.encode() * 4)
    report = diff(a, b)
    [found] = report.tensors
    assert (found.component, found.a.name, found.elements) == ("model", "small", 1)
    old = load_file(a / EXPORT)["small"].double()
    new = load_file(b / EXPORT)["small"].double()
    assert found.largest == float((old - new).abs().max())
    assert found.relative == pytest.approx(float((old - new).norm() / old.norm()), rel=1e-12)
    assert report.same == report.by_digest > 5
    assert {config.key for config in report.configs} == {"checkpoint.checkpoint_dir"}
    quick = diff(a, b, values=False)
    assert [(each.a.name, each.relative) for each in quick.tensors] == [("small", None)]
    assert not diff(a, a.parent).differs


def test_every_form_of_one_model_is_the_same(tmp_path: Path) -> None:
    export = saved(tmp_path / "export") / "model"
    shards = saved(tmp_path / "shards", save_consolidated="false") / "model"
    own_dcp = saved(tmp_path / "own", model_save_format="torch_save", save_consolidated="false") / "model"
    foreign = tmp_path / "foreign"
    dcp.save(load_file(export / "consolidated" / "model.safetensors"), checkpoint_id=foreign, no_dist=True)
    for other in (shards, own_dcp, foreign, tmp_path / "export" / "LATEST" / EXPORT):
        report = diff(export, other)
        assert (report.same, report.differs) == (3, False), other
    assert diff(export.parent, foreign).notes[0] == "optim is in one of them alone, and was not compared"


def test_names_shapes_dtypes_and_configurations(tmp_path: Path) -> None:
    left, right = tmp_path / "left", tmp_path / "right"
    big = torch.linspace(-3, 3, 3_000_000)
    for directory, extra, config in (
        (left, {"gone": torch.ones(2), "shape": torch.ones(2, 3)}, {"layers": 2, "rope": {"theta": 1e4}}),
        (right, {"new": torch.ones(2), "shape": torch.ones(3, 2)}, {"layers": 2, "rope": {"theta": 1e6}, "more": [1]}),
    ):
        directory.mkdir()
        cast = big if directory == left else big.bfloat16()
        save_file({"cast": cast, "same": torch.arange(5), **extra}, directory / "model.safetensors")
        (directory / "config.json").write_text(json.dumps(config))
    report = diff(left, right)
    assert (report.same, report.only_a, report.only_b) == (1, (("model", "gone"),), (("model", "new"),))
    cast_found, shape = report.tensors
    assert (cast_found.a.dtype, cast_found.b.dtype) == ("F32", "BF16")
    error = (big.double() - big.bfloat16().double()).abs()
    assert cast_found.largest == float(error.max())
    assert cast_found.relative == pytest.approx(float(error.norm() / big.double().norm()), rel=1e-9)
    assert (shape.a.shape, shape.b.shape, shape.relative) == ((2, 3), (3, 2), None)
    assert [(c.key, c.a, c.b) for c in report.configs] == [("more", None, [1]), ("rope.theta", 1e4, 1e6)]
    quick = diff(left, right, values=False)
    assert quick.uncompared == (("model", "same"),)


def test_values_that_are_no_numbers(tmp_path: Path) -> None:
    nan, inf = math.nan, math.inf
    save_file({"x": torch.tensor([nan, inf, 0.0]), "y": torch.tensor([1.0, 0.0])}, tmp_path / "a.safetensors")
    save_file({"x": torch.tensor([nan, inf, -0.0]), "y": torch.tensor([nan, 0.0])}, tmp_path / "b.safetensors")
    x, y = diff(tmp_path / "a.safetensors", tmp_path / "b.safetensors").tensors
    assert (x.elements, x.largest, x.relative) == (1, 0.0, 0.0)  # 0 and -0 are different bits and one value
    assert (y.elements, y.largest, y.relative) == (1, inf, inf)


def test_what_has_nothing_in_common_is_refused(tmp_path: Path) -> None:
    pipeline = tmp_path / "pipeline"
    for name in ("unet", "vae"):
        (pipeline / name).mkdir(parents=True)
        save_file({"x": torch.ones(1)}, pipeline / name / "diffusion_pytorch_model.safetensors")
    (pipeline / "model_index.json").write_text("{}")
    assert not diff(pipeline, pipeline).differs
    with pytest.raises(MisuseError, match="nothing in common"):
        diff(saved(tmp_path / "root"), pipeline)


def test_many_differences_are_shown_by_layer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [f"model.layers.{layer}.mlp.{part}.weight" for layer in range(12) for part in ("up", "down", "gate", "x")]
    a = {name: torch.ones(4) for name in [*names, "model.norm.weight", "model.norm.bias", "lm_head.weight"]}
    b = {name: torch.full((4,), 1.5) if ".0." not in name and "x" not in name else a[name] for name in a}
    b["model.layers.1.mlp.up.weight"] = torch.ones(3)
    b["model.layers.2.mlp.up.weight"] = torch.full((4,), 3.0)
    b |= {f"model.layers.11.more.{number}": torch.ones(1) for number in range(20)}
    del b["model.norm.bias"], b["lm_head.weight"]
    save_file(a, tmp_path / "a.safetensors")
    save_file(b, tmp_path / "b.safetensors")
    files = [str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors")]
    layers = {each.layer: each for each in diff(*files).layers}
    assert "model.layers.0" not in layers
    assert list(layers)[-2:] == ["model.layers.11", "model.norm"]  # 10 and 11 come after 9
    second, first, last = (layers[f"model.layers.{number}"] for number in (2, 1, 11))
    assert (second.tensors, second.different, second.relative, second.largest) == (4, 3, 2.0, 2.0)
    assert (first.different, first.relative) == (3, 0.5)
    assert (last.different, last.only_a, last.only_b) == (3, 0, 20)
    assert (layers["model.norm"].different, layers["model.norm"].only_a) == (1, 1)
    assert main(["diff", *files]) == 1
    out = capsys.readouterr().out.splitlines()
    assert len(out) == len(layers) + 1
    assert "~  model  model.layers.2   3 of 4 tensors differ, relative at most 2, largest 2" in out
    assert out[-1].endswith("--tensors lists each")
    assert main(["diff", "--tensors", *files]) == 1
    assert "+ model  model.layers.11.more.7" in capsys.readouterr().out.splitlines()


def test_a_checkpoint_whose_model_is_gone_is_damaged(tmp_path: Path) -> None:
    path = saved(tmp_path / "root")
    shutil.rmtree(path / "model")
    with pytest.raises(IntegrityError, match="model"):
        diff(path, path)
