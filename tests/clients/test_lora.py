"""Adapters from one, two and four ranks: byte for byte what peft saves, opened by peft, restored anywhere."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tests.clients.lora import (
    ADAPTERS,
    Values,
    adapted,
    restore,
    save,
    save_parallelized,
    save_variant,
    save_without_a_shard,
    save_without_a_stage,
)
from tests.peft.models import causal, logits, save_captured
from tests.peft.test_models import same_json
from tests.support.ranks import failure, outcomes, run
from torch import nn

import peft
from shardwise.errors import AdapterError, IncompleteTensorError

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


def together(root: Path, stem: str) -> Values:
    """What the ranks put aside, which agree where they have the same."""
    out: Values = {}
    for path in sorted(root.glob(f"{stem}_[0-9].pt")):
        for name, tensors in torch.load(path).items():
            assert all(torch.equal(a, b) for a, b in zip(out.setdefault(name, tensors), tensors, strict=True)), name
    return out


def unsharded(name: str, root: Path, base: str | None = None) -> nn.Module:
    """The trained model in one process."""
    model = adapted(name, base=base)
    trained = {key: tensors[0] for key, tensors in together(root, "saved").items()}
    assert set(trained) == {key for key, p in model.named_parameters() if p.requires_grad}
    model.load_state_dict(trained, strict=False)
    return model


def same_adapter(ours: Path, theirs: Path) -> None:
    with safe_open(ours / WEIGHTS, framework="pt") as one, safe_open(theirs / WEIGHTS, framework="pt") as two:
        assert set(one.keys()) == set(two.keys())
        for name in two.keys():  # noqa: SIM118 - not a mapping
            a, b = one.get_tensor(name), two.get_tensor(name)
            assert (a.dtype, a.shape) == (b.dtype, b.shape), name
            assert torch.equal(a, b), name
    same_json(ours / CONFIG, theirs / CONFIG)


CASES = [
    ("dense", 1, "fsdp", [(2, "fsdp")]),
    ("dense", 2, "fsdp", [(4, "fsdp+tp"), (2, "pipeline")]),
    ("dense", 4, "fsdp", [(1, "fsdp")]),
    ("dense", 4, "fsdp+tp", [(2, "fsdp")]),
    ("dense", 2, "pipeline", [(2, "fsdp"), (4, "fsdp+tp")]),
    ("dora", 2, "fsdp", [(1, "fsdp")]),
    ("experts", 2, "fsdp", [(4, "fsdp")]),
]


@pytest.mark.parametrize(("name", "world", "how", "elsewhere"), CASES)
def test_adapters_are_those_that_peft_saves(
    name: str, world: int, how: str, elsewhere: list[tuple[int, str]], tmp_path: Path
) -> None:
    base = tmp_path / "base"
    causal(ADAPTERS[name][0]).save_pretrained(base)
    run(world, save, name, how, str(tmp_path), str(base))
    reference = unsharded(name, tmp_path, str(base)).eval()
    reference.save_pretrained(tmp_path / "reference")
    alone, whole = tmp_path / "alone" / "model", tmp_path / "LATEST" / "model"
    for directory in (alone, whole):
        same_adapter(directory, tmp_path / "reference")

    loaded = peft.PeftModel.from_pretrained(causal(ADAPTERS[name][0]), whole).eval()
    auto = peft.AutoPeftModelForCausalLM.from_pretrained(whole).eval()
    before = logits(reference)
    assert not torch.equal(before, logits(causal(ADAPTERS[name][0]).eval()))
    assert torch.equal(logits(loaded), before)
    assert torch.equal(logits(auto), before)
    merged = logits(reference.merge_and_unload())
    assert torch.equal(logits(loaded.merge_and_unload()), merged)
    torch.testing.assert_close(merged, before, rtol=1e-4, atol=1e-5)

    saved = together(tmp_path, "saved")
    for ranks, other in elsewhere:
        run(ranks, restore, name, other, str(tmp_path))
        restored = together(tmp_path, f"restored_{other}")
        assert set(restored) == set(saved)
        for key, tensors in saved.items():
            assert len(tensors) == 4
            assert all(torch.equal(a, b) for a, b in zip(restored[key], tensors, strict=True)), key


@pytest.mark.parametrize(("world", "is_async"), [(2, False), (4, True)])
def test_what_torch_has_parallelized_is_evaluated_before_a_save_and_a_restore(
    world: int, is_async: bool, tmp_path: Path
) -> None:
    run(world, save_parallelized, str(tmp_path), world == 4, is_async)
    unsharded("plain", tmp_path).save_pretrained(tmp_path / "reference")
    same_adapter(tmp_path / "LATEST" / "model", tmp_path / "reference")


@pytest.mark.parametrize("variant", ["v4_compatible", "legacy_paramwrapper_layout"])
def test_layouts_of_expert_adapters(variant: str, tmp_path: Path) -> None:
    run(2, save_variant, "experts", str(tmp_path), {variant: True})
    reference = unsharded("experts", tmp_path)
    options = {"v4_compatible": False, "legacy_paramwrapper_layout": False, variant: True}
    save_captured([reference], None, tmp_path / "reference", **options)
    model = tmp_path / "LATEST" / "model"
    with safe_open(model / WEIGHTS, "pt") as ours, safe_open(tmp_path / "reference" / WEIGHTS, "pt") as theirs:
        assert set(ours.keys()) == set(theirs.keys())
        assert all(torch.equal(ours.get_tensor(n), theirs.get_tensor(n)) for n in theirs.keys())  # noqa: SIM118
        single = [name for name in ours.keys() if ".experts.3.gate_proj.lora_B" in name]  # noqa: SIM118
    config = json.loads((model / CONFIG).read_text())
    assert bool(single) == (variant == "v4_compatible")
    assert bool(config.get("target_parameters")) == (variant != "v4_compatible")


def test_a_stage_that_is_missing_is_an_error_and_no_smaller_file(tmp_path: Path) -> None:
    error = failure(2, save_without_a_stage, str(tmp_path))
    assert isinstance(error, AdapterError)
    assert "the ranks have 1 of 2 layers" in str(error)
    assert list(tmp_path.rglob(WEIGHTS)) == []
    assert list(tmp_path.iterdir()) == []


def test_a_shard_that_is_missing_is_an_error_and_no_smaller_file(tmp_path: Path) -> None:
    for outcome in outcomes(2, save_without_a_shard, str(tmp_path)):
        assert isinstance(outcome.error, IncompleteTensorError)
    assert list(tmp_path.rglob(WEIGHTS)) == []
