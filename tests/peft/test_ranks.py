"""Adapters on two ranks: FSDP2, tensor and expert parallelism, pipeline stages give what one process saves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.peft import on_ranks as peft_ranks
from tests.peft.own_models import OwnConfig, dense, moe
from tests.peft.test_models import adapted, same_json, save
from tests.support.ranks import failure, run

from shardwise.dtypes import dtype_code
from shardwise.errors import AdapterError
from shardwise.peft.initial_values import initialise_adapters, initialise_magnitudes

pytest.importorskip("peft")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where one process saved its references, and then two ranks their fragments."""
    path = tmp_path_factory.mktemp("ranks")
    reference = path / "reference"
    adapted("llama", peft_ranks.DENSE).save_pretrained(reference / "hf_fsdp")
    adapted("qwen3_moe", peft_ranks.MOE).save_pretrained(reference / "hf_experts_fsdp")
    adapted("llama", peft_ranks.SOME_LAYERS).save_pretrained(reference / "hf_pipeline_some")
    (reference / "hf_ddp").symlink_to(reference / "hf_fsdp")
    for suffix, options in peft_ranks.VARIANTS.items():
        save(moe(OwnConfig()), reference / f"own_experts_ep{suffix}", OwnConfig(), **options)
        if suffix:
            save(adapted("qwen3_moe", peft_ranks.MOE), reference / f"hf_experts_fsdp{suffix}", None, **options)
    config = OwnConfig(use_dora=True)
    save(dense(config), reference / "own_fsdp", config)
    fresh = dense(config)
    initialise_adapters([fresh], config)
    initialise_magnitudes([fresh])
    save(fresh, reference / "fresh", config)
    for kind in ("hf", "own"):
        for how in ("tp", "pipeline"):
            (reference / f"{kind}_{how}").symlink_to(reference / f"{kind}_fsdp")
    run(2, peft_ranks.main, path)
    return path


def put_together(directory: Path) -> dict[str, torch.Tensor]:
    """The tensors of the file, every element of which some rank has to hold."""
    grids: dict[str, tuple[torch.Tensor, torch.Tensor, list[int]]] = {}
    for rank in range(2):
        for (name, shape, dtype, grid), pieces in torch.load(directory / f"rank{rank}.pt"):
            if name not in grids:
                values = next((data for _, _, data in pieces), None)
                kind = torch.float32 if values is None else values.dtype
                grids[name] = torch.zeros(grid, dtype=kind), torch.zeros(grid, dtype=torch.bool), shape
            whole, seen, known = grids[name]
            assert (known, list(whole.shape), dtype_code(whole.dtype)) == (shape, grid, dtype)
            for offsets, sizes, data in pieces:
                index = tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))
                assert torch.equal(whole[index][seen[index]], data[seen[index]]), f"{name}: ranks disagree"
                whole[index] = data
                seen[index] = True
    for name, (_, seen, _) in grids.items():
        assert bool(seen.all()), f"{name} has a hole"
    return {name: whole.reshape(shape) for name, (whole, _, shape) in grids.items()}


def compare(ours: dict[str, torch.Tensor], file: Path) -> None:
    theirs = load_file(file)
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name


SCENARIOS = [
    "hf_fsdp",
    "hf_experts_fsdp",
    "hf_experts_fsdp_v4",
    "hf_experts_fsdp_legacy",
    "hf_tp",
    "hf_pipeline",
    "hf_pipeline_some",
    "hf_ddp",
    "own_fsdp",
    "own_tp",
    "own_experts_ep",
    "own_experts_ep_v4",
    "own_experts_ep_legacy",
    "own_pipeline",
]


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_ranks_together_hold_what_one_process_saves(scenario: str, root: Path) -> None:
    reference = root / "reference" / scenario
    compare(put_together(root / scenario), reference / "adapter_model.safetensors")
    same_json(root / scenario / "adapter_config.json", reference / "adapter_config.json")


def test_fragments_are_destinations_too(root: Path) -> None:
    compare(put_together(root / "reloaded"), root / "reference/hf_fsdp/adapter_model.safetensors")


def test_fresh_adapters_are_those_of_one_process(root: Path) -> None:
    compare(put_together(root / "fresh"), root / "reference/fresh/adapter_model.safetensors")


def said(root: Path) -> list[dict[str, str]]:
    return [json.loads((root / f"said{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("scenario", ["hf_pipeline", "own_pipeline"])
def test_a_stage_alone_is_not_an_adapter(scenario: str, root: Path) -> None:
    first, second = (row[scenario] for row in said(root))
    assert first.startswith("AdapterError: the adapter is not complete")
    assert "the ranks have 1 of 2 layers" in first
    assert "no rank has model.layers.0" in second


def test_a_rank_that_fails_fails_everywhere(root: Path) -> None:
    first, second = (row["broken"] for row in said(root))
    assert first == second
    assert "has no lora_B" in first
    assert "rank 1" in first
    assert not (root / "broken").exists()


def test_ranks_of_one_stage_with_other_factors_contradict_each_other() -> None:
    error = failure(2, peft_ranks.contradicting)
    assert isinstance(error, AdapterError)
    assert "has rank_pattern {'model.layers.0.mlp.down_proj': 2} on rank 0" in str(error)
    assert "down_proj': 3} on rank 1" in str(error)


def test_settings_are_in_one_order_whichever_ranks_the_modules_are_on() -> None:
    names = [f"model.layers.{number}.mlp.down_proj" for number in range(2)]
    assert run(2, peft_ranks.ordered) == [names, names]
