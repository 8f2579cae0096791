"""Adapters merged on the way: byte for byte what peft's ``merge_and_unload()`` and ``save_pretrained`` give."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file
from tests.addons.peft_models import causal, logits
from tests.clients.adapters_whole import two_alone
from tests.clients.merged import ADAPTERS, adapted, checkpointer, save
from tests.support.ranks import fresh, run
from torch import nn

WEIGHTS = "adapter_model.safetensors"


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(directory.glob("*.safetensors")) for name, t in load_file(file).items()}


def same_export(ours: Path, reference: nn.Module, directory: Path, dtype: torch.dtype | None = None) -> None:
    """The export is that of the merged model, and opens as it without peft."""
    merged = reference.merge_and_unload()
    if dtype is not None:
        merged = merged.to(dtype)
    merged.save_pretrained(directory)
    found, expected = tensors(ours), tensors(directory)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name
    config, theirs = (json.loads((path / "config.json").read_text()) for path in (ours, directory))
    assert {key: config.get(key) for key in theirs} == theirs
    assert not (ours / "adapter_config.json").exists()
    opened, report = tf.AutoModelForCausalLM.from_pretrained(ours, output_loading_info=True)
    assert not any(report.values())
    assert type(opened) is type(merged)
    assert torch.equal(logits(opened.eval()), logits(merged.eval()))


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_merged_export_is_the_one_that_peft_makes(name: str, tmp_path: Path) -> None:
    base = tmp_path / "base"
    causal(ADAPTERS[name][0]).save_pretrained(base)
    model = adapted(name).eval()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    expected = logits(model)
    with checkpointer(tmp_path / "run", model_repo_id=str(base)) as saver:
        saver.restore(model)
        saver.save(0, 1, model)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert torch.equal(logits(model), expected)
    saved = tmp_path / "run/LATEST/model"
    assert (saved / WEIGHTS).is_file()
    same_export(saved / "consolidated", model, tmp_path / "reference")


def gathered(name: str, root: Path) -> nn.Module:
    """The trained model in one process."""
    model = adapted(name)
    trained: dict[str, torch.Tensor] = {}
    for path in sorted(root.glob("saved_[0-9].pt")):
        trained |= {key.removeprefix("module."): found[0] for key, found in torch.load(path).items()}
    assert set(trained) == {key for key, p in model.named_parameters() if p.requires_grad}
    model.load_state_dict(trained, strict=False)
    return model.eval()


CASES = [
    ("lora", 1, "fsdp", {}),
    ("lora", 2, "fsdp", {}),
    ("lora", 2, "ddp", {}),
    ("lora", 2, "pipeline", {}),
    ("lora", 4, "fsdp+tp", {}),
    ("dora", 2, "fsdp", {}),
    ("dora", 4, "fsdp", {"single_rank_consolidation": True}),
    ("experts", 2, "fsdp", {}),
    ("experts", 4, "fsdp", {"random_writes": False}),
    ("copies, tied", 2, "fsdp", {}),
    ("both ends of a tie", 2, "fsdp", {}),
    ("tokens", 2, "fsdp", {}),
    ("more", 2, "pipeline", {}),
    ("VeRA", 2, "fsdp", {}),
]


@pytest.mark.parametrize(("name", "world", "how", "settings"), CASES)
def test_ranks_merge_what_they_hold_parts_of(
    name: str, world: int, how: str, settings: dict[str, object], tmp_path: Path
) -> None:
    base = tmp_path / "base"
    causal(ADAPTERS[name][0]).save_pretrained(base)
    run(world, save, name, how, str(tmp_path), {"model_repo_id": str(base), **settings})
    same_export(tmp_path / "run/LATEST/model/consolidated", gathered(name, tmp_path), tmp_path / "reference")


@pytest.mark.parametrize(("name", "how"), [("lora", "fsdp"), ("experts", "fsdp"), ("dora", "pipeline")])
def test_merging_in_the_background(name: str, how: str, tmp_path: Path) -> None:
    output, settings = tmp_path / "output", {"is_async": True}
    code = fresh(
        two_alone, str(tmp_path / "store"), save, name, how, str(tmp_path), settings, output=output, seconds=200
    )
    assert code == 0, output.with_name("output.err").read_text()
    same_export(tmp_path / "run/LATEST/model/consolidated", gathered(name, tmp_path), tmp_path / "reference")
