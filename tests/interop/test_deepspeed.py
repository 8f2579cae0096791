"""DeepSpeed's directories: to a model's files, listed, verified, refused by name.

`make_deepspeed.py` wrote those in `deepspeed/` with DeepSpeed itself. Other numbers of ranks are its layout by hand.
"""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.ops.damaged import cut, describe, gpt2, logits
from transformers import GPT2LMHeadModel

from shardwise.cli import main
from shardwise.errors import (
    CheckpointNotFoundError,
    FormatError,
    IncompleteTensorError,
    IntegrityError,
    MisuseError,
    UnsafePickleError,
)
from shardwise.ops.consolidate import consolidate
from shardwise.ops.inspect import inspect
from shardwise.ops.verify import verify
from shardwise.sources.others.recognise import recognise

#: Sizes that two ranks do not divide evenly.
SIZES = {"n_layer": 1, "n_embd": 6, "vocab_size": 17, "n_positions": 9}
HERE = Path(__file__).parent / "deepspeed"


def copied(stage: int, tmp_path: Path) -> Path:
    root = Path(shutil.copytree(HERE / f"zero{stage}", tmp_path / "run"))
    (root / "expected.safetensors").unlink()
    describe(root, **SIZES)
    return root


def expected(stage: int, half: bool) -> dict[str, torch.Tensor]:
    found = load_file(HERE / f"zero{stage}" / "expected.safetensors")
    kept = {name.removeprefix("half."): value for name, value in found.items() if name.startswith("half.") is half}
    return {**kept, "lm_head.weight": kept["transformer.wte.weight"]}


def states(root: Path, rank: int, what: str) -> Path:
    (found,) = root.glob(f"global_step2/*zero_pp_rank_{rank}_mp_rank_00_{what}_states.pt")
    return found


@pytest.mark.parametrize(("stage", "half"), [(2, True), (2, False), (3, False)])
@pytest.mark.parametrize("named", ["", "global_step2"])
def test_the_weights_that_the_engine_had(stage: int, half: bool, named: str, tmp_path: Path) -> None:
    root = copied(stage, tmp_path)
    report = consolidate(root / named, tmp_path / "export", master_weights=not half)
    found = load_file(report.path / "model.safetensors")
    wanted = expected(stage, half)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name], value), name
    assert any("master weights" in note for note in report.notes)

    model = gpt2(0, **SIZES).float()
    model.load_state_dict(wanted)
    opened, told = GPT2LMHeadModel.from_pretrained(report.path, output_loading_info=True, dtype=torch.float32)
    assert not any(told[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), told
    assert torch.equal(logits(opened.eval()), logits(model))


def test_master_weights_beside_a_model_that_trainer_saved(tmp_path: Path) -> None:
    root = copied(2, tmp_path)
    gpt2(3, **SIZES).save_pretrained(root)
    assert inspect(consolidate(root, tmp_path / "a").path).dtypes("model").keys() == {"F32"}
    found = load_file(consolidate(root, tmp_path / "b", master_weights=True).path / "model.safetensors")
    assert torch.equal(found["transformer.wte.weight"], expected(2, False)["transformer.wte.weight"])


@pytest.mark.parametrize("stage", [2, 3])
def test_inspect_and_verify(stage: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = copied(stage, tmp_path)
    found = inspect(root)
    assert (found.tools[0], found.world_size) == ("DeepSpeed", 2)
    assert {tensor.spec.name for tensor in found.tensors} == expected(3, False).keys()
    report = verify(root)
    assert report.status == "unverifiable"
    assert any("of DeepSpeed" in what for what in report.checked)
    assert main(["consolidate", str(root), "--output", str(tmp_path / "a"), "--master-weights"]) == 0
    assert "fp32" in capsys.readouterr().err


# --- by hand ---------------------------------------------------------------------------------------------------------

#: Of several sizes and kinds; the last group has fewer elements than some numbers of ranks.
GROUPS = [
    {"a": (3, 5, 2), "b": (7,), "c": (2, 3)},
    {"d": (1,), "e": (), "f": (1, 1)},
]


def values() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {name: torch.rand(shape, generator=generator) for group in GROUPS for name, shape in group.items()}


def write(root: Path, world: int, stage: int, behind: int = 0) -> None:
    """ZeRO's partitions; ``behind`` elements of padding behind each parameter of ZeRO-2."""
    tensors = values()
    shared = {"tied": "a"}
    shapes = [{name: torch.Size(shape) for name, shape in group.items()} for group in GROUPS]
    states: dict[str, object] = {
        "param_shapes": shapes,
        "shared_params": shared,
        "buffer_names": ["scale"],
        "frozen_param_shapes": {"frozen": torch.Size((5,))},
        "dp_world_size": world,
        "mp_world_size": 1,
    }
    frozen = torch.arange(5.0)
    part = -(-5 // world)
    for rank in range(world):
        empty = {name: torch.empty(0) for name in (*tensors, "frozen")}
        module = {**({**tensors, "frozen": frozen} if stage == 2 else empty), "scale": torch.ones(2)}
        module["tied"] = module["a"]
        piece = torch.zeros(part)
        piece[: len(frozen[rank * part : (rank + 1) * part])] = frozen[rank * part : (rank + 1) * part]
        name = "mp_rank_00_model_states.pt" if stage == 2 else f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt"
        torch.save({"module": module, "frozen_param_fragments": {"frozen": piece}, **states}, root / name)
        flat = _zero2(tensors, rank, world, behind) if stage == 2 else _zero3(tensors, rank, world)
        torch.save({"optimizer_state_dict": flat}, root / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")


def _zero2(tensors: dict[str, torch.Tensor], rank: int, world: int, behind: int) -> dict[str, object]:
    found = []
    for group in GROUPS:
        whole = torch.cat([torch.cat([tensors[name].flatten(), torch.zeros(behind)]) for name in group])
        whole = torch.cat([whole, torch.zeros(-len(whole) % (2 * world))])
        found.append(whole.view(world, -1)[rank].clone())
    return {
        "single_partition_of_fp32_groups": found,
        "param_alignment_paddings": [[behind] * len(group) for group in GROUPS],
        "zero_stage": 2,
    }


def _zero3(tensors: dict[str, torch.Tensor], rank: int, world: int) -> dict[str, object]:
    found = []
    for group in GROUPS:
        parts = []
        for name in group:
            size = -(-tensors[name].numel() // world)
            own = tensors[name].flatten()[rank * size : (rank + 1) * size]
            parts.append(torch.cat([own, torch.zeros(size - len(own))]))
        found.append(torch.cat(parts))
    return {"fp32_flat_groups": found, "zero_stage": 3}


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("world", [1, 2, 5, 8])
@pytest.mark.parametrize("behind", [0, 3])
def test_any_number_of_ranks(stage: int, world: int, behind: int, tmp_path: Path) -> None:
    write(tmp_path, world, stage, behind)
    found = load_file(consolidate(tmp_path, tmp_path / "export", master_weights=True).path / "model.safetensors")
    wanted = {**values(), "tied": values()["a"], "frozen": torch.arange(5.0), "scale": torch.ones(2)}
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


# --- refused by name -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["model", "optim"])
def test_a_missing_rank(what: str, tmp_path: Path) -> None:
    root = copied(3, tmp_path)
    states(root, 1, what).unlink()
    with pytest.raises(IntegrityError, match=f"of the {what}_states files of 2 ranks, 1 are absent: those of rank 1"):
        consolidate(root, tmp_path / "export")
    assert not (tmp_path / "export").exists()
    assert [damage.kind for damage in verify(root).damages] == ["absent"]


def test_a_truncated_file(tmp_path: Path) -> None:
    root = copied(3, tmp_path)
    cut(states(root, 0, "optim"), 100)
    with pytest.raises(IntegrityError, match="cut short"):
        consolidate(root, tmp_path / "export")


def changed(path: Path, change: dict[str, object], within: str | None = None) -> None:
    """Change entries of a file of `write`."""
    state = torch.load(path, weights_only=True)
    (state if within is None else state[within]).update(change)
    torch.save(state, path)


def test_shapes_that_do_not_fit_the_partitions(tmp_path: Path) -> None:
    write(tmp_path, 2, 3)
    other = [{**GROUPS[0], "a": (3, 6, 2)}, GROUPS[1]]
    shapes = {"param_shapes": [{name: torch.Size(shape) for name, shape in group.items()} for group in other]}
    changed(tmp_path / "zero_pp_rank_1_mp_rank_00_model_states.pt", shapes)
    with pytest.raises(IntegrityError, match="other shapes of the parameters than that of rank 0"):
        consolidate(tmp_path)
    changed(tmp_path / "zero_pp_rank_0_mp_rank_00_model_states.pt", shapes)
    with pytest.raises(IntegrityError, match="do not hold all of this tensor|has not just the"):
        consolidate(tmp_path)
    shorter = [{**GROUPS[0], "a": (2, 5, 2)}, GROUPS[1]]
    for rank in range(2):
        file = tmp_path / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt"
        changed(file, {"param_shapes": [{n: torch.Size(s) for n, s in group.items()} for group in shorter]})
    with pytest.raises(IntegrityError, match="has not just the"):
        consolidate(tmp_path)


def test_partitions_of_zero2_that_are_longer_or_elsewhere(tmp_path: Path) -> None:
    write(tmp_path, 2, 2)
    group = _zero2(values(), 1, 2, 0)["single_partition_of_fp32_groups"]
    assert isinstance(group, list)
    file = tmp_path / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    changed(file, {"single_partition_of_fp32_groups": [torch.zeros(80), group[1]]}, "optimizer_state_dict")
    with pytest.raises(FormatError, match="have 43 elements"):
        consolidate(tmp_path, master_weights=True)
    changed(file, {"single_partition_of_fp32_groups": [group[0][:9], group[1]]}, "optimizer_state_dict")
    with pytest.raises(IncompleteTensorError):
        consolidate(tmp_path, master_weights=True)
    # DeepSpeed from 0.7 on says itself where each parameter lies.
    root = copied(2, tmp_path / "own")
    kept = states(root, 0, "optim").read_bytes()
    shutil.copy(states(root, 1, "optim"), states(root, 0, "optim"))
    with pytest.raises(FormatError, match="lies at .* in its partition"):
        consolidate(root, tmp_path / "export", master_weights=True)
    states(root, 0, "optim").write_bytes(kept)
    assert consolidate(root, tmp_path / "export", master_weights=True).tensors == 17


def test_a_name_without_values(tmp_path: Path) -> None:
    write(tmp_path, 2, 3)
    for rank in range(2):
        file = tmp_path / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt"
        changed(file, {"lost": torch.empty(0)}, "module")
    with pytest.raises(IntegrityError, match="no partition has its values") as caught:
        consolidate(tmp_path)
    assert "lost" in str(caught.value)


class Unknown:
    """A class that no list has."""


def test_an_unknown_class_is_named_and_not_run(tmp_path: Path) -> None:
    write(tmp_path, 2, 3)
    torch.save({"optimizer_state_dict": {"x": Unknown()}}, tmp_path / "zero_pp_rank_1_mp_rank_00_optim_states.pt")
    with pytest.raises(UnsafePickleError, match=r"test_deepspeed\.Unknown"):
        consolidate(tmp_path)
    assert verify(tmp_path).status == "unverifiable"


@pytest.mark.parametrize("name", ["mp_rank_01_model_states.pt", "layer_00-model_states.pt"])
def test_parts_of_a_model(name: str, tmp_path: Path) -> None:
    write(tmp_path, 1, 2)
    torch.save({}, tmp_path / name)
    with pytest.raises(MisuseError, match="a part of a model"):
        consolidate(tmp_path)


def test_latest_leads_nowhere_or_out(tmp_path: Path) -> None:
    root = copied(2, tmp_path)
    (root / "latest").write_text("global_step3")
    with pytest.raises(CheckpointNotFoundError, match="latest names global_step3"):
        consolidate(root)
    (root / "latest").write_text(os.path.join("..", "run", "global_step2"))
    assert recognise(root) is None


def test_master_weights_of_what_has_none(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(math.prod((2, 2)))}, tmp_path / "pytorch_model_fsdp.bin")
    with pytest.raises(MisuseError, match="master_weights is for directories of DeepSpeed"):
        consolidate(tmp_path, master_weights=True)
