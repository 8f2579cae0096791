"""One file per rank, as verl and loops of one's own write them: to a model's files, listed, verified, refused by name.

The files are torch's own, of real process groups; verl's names and what it puts beside are written by hand.
"""

from __future__ import annotations

import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.ops.damaged import cut, describe, gpt2, same_logits
from tests.sources.per_rank import (
    UNEVEN,
    forms,
    meshes,
    save_flat,
    save_forms,
    save_fsdp1,
    save_fsdp2,
    save_fsdp_and_tp,
    save_hybrid,
    save_meshes,
    save_state,
    verl_directory,
)
from tests.support.ranks import run
from transformers import MixtralConfig, MixtralForCausalLM

from shardwise.cli import main
from shardwise.errors import (
    AmbiguousFilesError,
    FormatError,
    IntegrityError,
    MissingTensorError,
    MisuseError,
    ShapeMismatchError,
    TensorError,
    UnsafePickleError,
)
from shardwise.ops.consolidate import consolidate
from shardwise.ops.inspect import inspect
from shardwise.ops.verify import verify
from shardwise.sources.others.recognise import recognise


@pytest.fixture(scope="module")
def verl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = verl_directory(tmp_path_factory.mktemp("verl") / "global_step_4" / "actor", **UNEVEN)
    run(3, save_fsdp2, str(root), 11, UNEVEN)
    return root


@pytest.fixture
def copied(verl: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(verl, tmp_path / "actor"))


def rank_file(root: Path, rank: int, world: int = 3) -> Path:
    return root / f"model_world_size_{world}_rank_{rank}.pt"


def test_what_verl_wrote_becomes_the_model(verl: Path, tmp_path: Path) -> None:
    report = consolidate(verl, tmp_path / "export")
    assert same_logits(report.path, gpt2(11, **UNEVEN))
    assert {path.name for path in report.path.iterdir()} >= {"config.json", "model.safetensors"}
    assert "fsdp_config.json" not in {path.name for path in report.path.iterdir()}
    # One directory above, and into the place that a checkpoint's own export has.
    shutil.copytree(verl.parent, tmp_path / "step")
    assert consolidate(tmp_path / "step").path == tmp_path / "step" / "consolidated"


def test_inspect_and_verify_say_what_it_is(verl: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = inspect(verl)
    assert (found.tools[0], found.world_size) == ("verl", 3)
    described = {tensor.spec.name: tensor for tensor in found.tensors}
    assert described.keys() == gpt2(11, **UNEVEN).state_dict().keys()
    assert described["transformer.wte.weight"].spec.shape == (33, 6)
    assert described["transformer.wte.weight"].files == tuple(rank_file(verl, rank).name for rank in range(3))
    assert main(["inspect", str(verl)]) == 0
    assert "verl" in capsys.readouterr().out

    report = verify(verl)
    assert report.status == "unverifiable"
    assert report.tensors == len(described)
    assert any("all that there have to be" in what for what in report.checked)
    assert main(["verify", str(verl)]) == 3


def test_fsdp2_over_tensor_parallelism(tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    run(4, save_fsdp_and_tp, str(tmp_path))
    whole = torch.load(tmp_path / "whole" / "weights.pt")
    found = load_file(consolidate(tmp_path, tmp_path / "export").path / "model.safetensors")
    assert found.keys() == whole.keys()
    assert all(torch.equal(found[name], whole[name]) for name in whole)


def test_meshes_of_all_kinds(tmp_path: Path) -> None:
    run(4, save_meshes, str(tmp_path))
    found = load_file(consolidate(tmp_path, tmp_path / "export").path / "model.safetensors")
    assert found.keys() == meshes().keys()
    assert all(torch.equal(found[name], value) for name, value in meshes().items())


def test_replicas_that_differ_are_named(tmp_path: Path) -> None:
    run(4, save_hybrid, str(tmp_path), 2)
    describe(tmp_path)
    report = consolidate(tmp_path, tmp_path / "export")
    notes = [note for note in report.notes if "differ between ranks" in note]
    assert len(notes) == 1
    assert notes[0].startswith("1 tensors differ")
    assert "transformer.wpe.weight on rank 0 and rank 2" in notes[0]
    assert same_logits(report.path, gpt2(2))
    assert any("differ between ranks" in what for what in verify(tmp_path).unchecked)


def test_every_form_of_a_distributed_tensor(tmp_path: Path) -> None:
    run(2, save_forms, str(tmp_path))
    report = consolidate(tmp_path, tmp_path / "export")
    found = load_file(report.path / "model.safetensors")
    assert found.keys() == forms().keys()
    for name, tensor in forms().items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name
    assert any("_extra_state" in note for note in report.notes)


@pytest.mark.parametrize("with_optimizer", [False, True])
def test_fsdp1s_sharded_state_dicts(with_optimizer: bool, tmp_path: Path) -> None:
    run(2, save_fsdp1, str(tmp_path), 7, UNEVEN, with_optimizer)
    describe(tmp_path, **UNEVEN)
    assert same_logits(consolidate(tmp_path, tmp_path / "export").path, gpt2(7, **UNEVEN))
    assert inspect(tmp_path).world_size == 2
    (tmp_path / "shard1.pth").unlink()
    assert "those of rank 1" in str(verify(tmp_path).damages)
    with pytest.raises(IntegrityError, match="those of rank 1"):
        consolidate(tmp_path, tmp_path / "again")


def test_names_of_the_model_become_those_of_its_files(tmp_path: Path) -> None:
    sizes = {"num_hidden_layers": 1, "hidden_size": 8, "intermediate_size": 8, "vocab_size": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 3, "tie_word_embeddings": False}
    model = MixtralForCausalLM(MixtralConfig(**sizes, **heads, architectures=["MixtralForCausalLM"])).eval()
    model.config.save_pretrained(tmp_path / "huggingface")
    run(2, save_state, str(tmp_path), dict(model.state_dict()))
    report = consolidate(tmp_path, tmp_path / "export")
    assert any("experts.2" in name for name in load_file(report.path / "model.safetensors"))
    assert same_logits(report.path, model)


@pytest.mark.parametrize("name", ["base_model.model.a.base_layer.weight", "a.lora_A.weight"])
def test_a_model_with_an_adapter_in_it(tmp_path: Path, name: str) -> None:
    run(2, save_state, str(tmp_path), {"a.weight": torch.ones(4, 2), name: torch.ones(4, 2)})
    with pytest.raises(MisuseError, match="an adapter's modules in it"):
        consolidate(tmp_path, tmp_path / "export")


# --- refused by name -------------------------------------------------------------------------------------------------


def test_a_missing_rank(copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rank_file(copied, 1).unlink()
    assert [damage.kind for damage in verify(copied).damages] == ["absent"]
    assert main(["verify", str(copied)]) == 1
    with pytest.raises(IntegrityError, match="of the files of 3 ranks, 1 are absent: those of rank 1"):
        consolidate(copied, tmp_path / "export")
    assert not (tmp_path / "export").exists()
    assert main(["inspect", str(copied)]) == 1
    assert "those of rank 1" in capsys.readouterr().out


def test_a_truncated_file(copied: Path, tmp_path: Path) -> None:
    cut(rank_file(copied, 2), 200)
    assert [damage.file for damage in verify(copied).damages] == [rank_file(copied, 2).name]
    with pytest.raises(IntegrityError, match="cut short"):
        consolidate(copied, tmp_path / "export")
    layout = recognise(copied)
    assert layout is not None
    with pytest.raises(FormatError, match="no whole archive"):
        layout.open()


def test_renamed_files_and_two_runs(copied: Path, tmp_path: Path) -> None:
    held = rank_file(copied, 0).read_bytes()
    rank_file(copied, 0).write_bytes(rank_file(copied, 1).read_bytes())
    rank_file(copied, 1).write_bytes(held)
    with pytest.raises(IntegrityError, match="says to be of rank 1, and its name that it is of rank 0"):
        consolidate(copied, tmp_path / "export")
    rank_file(copied, 0, 2).write_bytes(held)
    with pytest.raises(AmbiguousFilesError, match="runs of 2 and of 3 ranks"):
        consolidate(copied, tmp_path / "export")
    assert any("runs of 2 and of 3 ranks" in what for what in verify(copied).unchecked)


def test_several_models_below(verl: Path, tmp_path: Path) -> None:
    shutil.copytree(verl.parent, tmp_path / "step")
    shutil.copytree(verl, tmp_path / "step" / "critic")
    with pytest.raises(AmbiguousFilesError, match="actor, critic"):
        consolidate(tmp_path / "step")
    assert consolidate(tmp_path / "step" / "critic").path.parent == tmp_path / "step" / "critic"


def test_the_configuration_of_another_model(copied: Path, tmp_path: Path) -> None:
    describe(copied / "huggingface", **UNEVEN, n_layer=3)
    with pytest.raises(MissingTensorError):
        consolidate(copied, tmp_path / "export")
    describe(copied / "huggingface", **{**UNEVEN, "vocab_size": 40})
    with pytest.raises(ShapeMismatchError):
        consolidate(copied, tmp_path / "export")


class Unknown:
    """A class that no list has."""


def test_an_unknown_class_is_named_and_not_run(copied: Path, tmp_path: Path) -> None:
    torch.save({"weight": torch.ones(2), "note": Unknown()}, rank_file(copied, 0))
    with pytest.raises(UnsafePickleError, match=r"test_per_rank\.Unknown"):
        consolidate(copied, tmp_path / "export")
    report = verify(copied)
    assert report.status == "unverifiable"
    assert any("Unknown" in what for what in report.unchecked)
    assert any("Unknown" in why for _, why in inspect(copied).unread)


def rewritten(path: Path, old: bytes, new: bytes, times: int) -> None:
    """Change a file's pickle, which keeps its length."""
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    name = next(name for name in entries if name.endswith("data.pkl"))
    assert old in entries[name]
    entries[name] = entries[name].replace(old, new, times)
    with zipfile.ZipFile(path, "w") as archive:
        for each, content in entries.items():
            archive.writestr(each, content)


@pytest.mark.parametrize(
    ("old", "new", "times", "says"),
    [
        # The embedding's shape in rank 0's file: 33 by 6, then 35 by 6; in both places where it is said, and in one.
        (b"K!K\x06\x86", b"K#K\x06\x86", 2, "a local tensor of|rank 0 has it as"),
        (b"K!K\x06\x86", b"K#K\x06\x86", 1, r"says to be of \(35, 6\) and of \(33, 6\)"),
        (b"_coordinate_on_dim", b"_coordinate_on_diM", 1, "not part of the tensor's mesh"),
        (b"placement_types\nShard", b"placement_types\nThard", 1, "Thard"),
        (b"_local_tensor", b"_local_tensoR", 1, "where a tensor belongs"),
    ],
)
def test_wrong_shapes_and_forms(old: bytes, new: bytes, times: int, says: str, copied: Path, tmp_path: Path) -> None:
    rewritten(rank_file(copied, 0), old, new, times)
    with pytest.raises((IntegrityError, FormatError, TensorError), match=says):
        consolidate(copied, tmp_path / "export")
    assert not (tmp_path / "export").exists()
    assert verify(copied).status != "whole"


def test_flat_pieces_without_shapes(tmp_path: Path) -> None:
    run(2, save_flat, str(tmp_path), 3)
    with pytest.raises(MisuseError, match="LOCAL_STATE_DICT"):
        consolidate(tmp_path, tmp_path / "export")
    assert not (tmp_path / "export").exists()
    assert verify(tmp_path).status == "unverifiable"


def test_plain_tensors_that_may_be_parts(tmp_path: Path) -> None:
    for rank in range(2):
        torch.save({"same": torch.ones(3), "w": torch.full((2,), float(rank))}, rank_file(tmp_path, rank, 2))
    with pytest.raises(IntegrityError, match="1 tensors are not known to be equal in all ranks' files"):
        consolidate(tmp_path, tmp_path / "export")


def test_tensors_in_a_container_are_not_passed_over(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(3), "blocks": [torch.ones(2)], "steps": [1, 2]}, tmp_path / "pytorch_model_fsdp.bin")
    with pytest.raises(IntegrityError, match="a list with tensors in it"):
        consolidate(tmp_path, tmp_path / "export")


def test_what_is_pickled_with_protocol_4(tmp_path: Path) -> None:
    for rank in range(2):
        torch.save({"w": torch.ones(2)}, rank_file(tmp_path, rank, 2), pickle_protocol=4)
    found = load_file(consolidate(tmp_path, tmp_path / "export").path / "model.safetensors")
    assert torch.equal(found["w"], torch.ones(2))
