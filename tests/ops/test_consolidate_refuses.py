"""`consolidate` exports nothing that `verify` refuses, finds changed bytes as it reads, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.ops.checkpoints import model, optimizer, saved
from tests.ops.damaged import command, cut, describe, flip, gpt2, same_logits, shards_by_torch
from tests.support.ranks import run
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from shardwise import CheckpointingConfig
from shardwise.cli import main
from shardwise.errors import (
    IncompleteCheckpointError,
    IntegrityError,
    ManifestError,
    MissingTensorError,
    MisuseError,
    ShapeMismatchError,
    ShardwiseError,
    UnverifiableError,
)
from shardwise.format.manifest import read_manifest
from shardwise.ops.consolidate import consolidate
from shardwise.ops.convert import convert
from shardwise.ops.verify import verify


def trained() -> torch.nn.Module:
    """The model after the step that its optimizer takes."""
    net = model()
    optimizer(net)
    return net


def save_sharded(root: str) -> None:
    """On every rank: a linear model cut in three ways, saved as shards."""
    torch.manual_seed(0)
    net = model()
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    for name, dim in (("big", 1), ("small", 0)):
        whole = net.get_parameter(name).detach()
        net.register_parameter(name, torch.nn.Parameter(distribute_tensor(whole, mesh, [Shard(dim)])))
    with CheckpointingConfig(checkpoint_dir=root, save_consolidated=False).build() as engine:
        engine.save(0, 1, net, optimizer(net))


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sharded")
    run(2, save_sharded, str(root))
    return root


@pytest.fixture
def checkpoint(pristine: Path, tmp_path: Path) -> Path:
    shutil.copytree(pristine, tmp_path / "root", symlinks=True)
    return tmp_path / "root" / "epoch_0_step_1"


def shard(checkpoint: Path, rank: int) -> Path:
    return checkpoint / "model" / f"shard-{rank + 1:05d}-model-00001-of-00001.safetensors"


def refused(checkpoint: Path, output: Path, code: int, *options: str) -> None:
    """The command line says no with this code, and leaves no trace."""
    before = sorted(checkpoint.rglob("*"))
    assert main(["consolidate", str(checkpoint), "--output", str(output), *options]) == code
    assert main(["consolidate", str(checkpoint), *options]) == code
    assert not output.parent.exists()
    assert sorted(checkpoint.rglob("*")) == before


def test_what_is_whole_is_exported_and_is_whole(checkpoint: Path, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    report = consolidate(checkpoint, tmp_path / "new" / "export", progress=lambda *each: told.append(each))
    assert report.verified
    assert report.notes == ()
    found = load_file(report.path / "model.safetensors")
    for name, tensor in trained().named_parameters():
        assert torch.equal(found[name], tensor.detach())
    assert verify(report.path).status == "whole"
    total = sum(tensor.numel() * 4 for tensor in found.values())
    assert told[-1] == (total, total)


def _absent_shard(checkpoint: Path) -> None:
    shard(checkpoint, 1).unlink()


def _cut_shard(checkpoint: Path) -> None:
    cut(shard(checkpoint, 0), 100)


def _flipped_bit(checkpoint: Path) -> None:
    flip(shard(checkpoint, 1), shard(checkpoint, 1).stat().st_size - 1000)


def _flipped_header(checkpoint: Path) -> None:
    # In the record of offsets: another place of the piece, and still sound JSON.
    content = shard(checkpoint, 1).read_bytes()
    head = b'\\"saved_offsets\\": [0, '
    shard(checkpoint, 1).write_bytes(content.replace(head + b"100]", head + b"101]"))
    assert shard(checkpoint, 1).read_bytes() != content


def _more_shards(checkpoint: Path) -> None:
    shutil.copy(shard(checkpoint, 1), shard(checkpoint, 2))


def _damaged_manifest(checkpoint: Path) -> None:
    flip(checkpoint / "manifest.json", 300)


def _empty_manifest(checkpoint: Path) -> None:
    (checkpoint / "manifest.json").write_text("{}")


def _link(checkpoint: Path) -> None:
    shard(checkpoint, 1).rename(checkpoint.parent / "elsewhere")
    shard(checkpoint, 1).symlink_to(checkpoint.parent / "elsewhere")


@pytest.mark.parametrize(
    ("damage", "error"),
    [
        (_absent_shard, IntegrityError),
        (_cut_shard, IntegrityError),
        (_flipped_bit, IntegrityError),
        (_flipped_header, IntegrityError),
        (_more_shards, IntegrityError),
        (_damaged_manifest, ManifestError),
        (_empty_manifest, ManifestError),
        (_link, IntegrityError),
    ],
)
def test_what_is_damaged_is_refused_as_by_verify(
    damage: Callable[[Path], None], error: type[ShardwiseError], checkpoint: Path, tmp_path: Path
) -> None:
    damage(checkpoint)
    assert main(["verify", str(checkpoint)]) == 1
    refused(checkpoint, tmp_path / "new" / "export", 1)
    with pytest.raises(error):
        consolidate(checkpoint)
    with pytest.raises(error):
        consolidate(checkpoint / "model")


def test_a_changed_byte_is_named_by_file_and_tensor(checkpoint: Path) -> None:
    _flipped_bit(checkpoint)
    with pytest.raises(IntegrityError, match="changed since the save") as caught:
        consolidate(checkpoint)
    assert caught.value.path == str(shard(checkpoint, 1))
    assert caught.value.tensor == "big"


def test_the_metadata_that_is_copied_is_compared_too(tmp_path: Path) -> None:
    with CheckpointingConfig(checkpoint_dir=tmp_path, save_consolidated=False).build() as engine:
        engine.save(0, 1, gpt2())
    checkpoint = tmp_path / "epoch_0_step_1"
    config = checkpoint / "model" / ".hf_metadata" / "config.json"
    config.write_text(config.read_text().replace('"n_layer": 2', '"n_layer": 3'))
    with pytest.raises(IntegrityError, match="changed since the save") as caught:
        consolidate(checkpoint)
    assert caught.value.path == str(config)
    assert not (checkpoint / "model" / "consolidated").exists()


def test_an_interrupted_save_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    unfinished = checkpoint.with_name(".saving-epoch_0_step_2")
    shutil.copytree(checkpoint, unfinished)
    for place in (unfinished, unfinished / "model"):
        assert main(["verify", str(place)]) == 2
        refused(place, tmp_path / "new" / "export", 2)
        with pytest.raises(IncompleteCheckpointError):
            consolidate(place)


def test_an_interrupted_export_is_no_damage_and_is_replaced(checkpoint: Path) -> None:
    unfinished = checkpoint / "model" / ".saving-consolidated"
    unfinished.mkdir()
    save_file({"big": torch.zeros(3)}, unfinished / "model.safetensors")
    assert verify(checkpoint).status == "whole"
    report = consolidate(checkpoint)
    assert not unfinished.exists()
    assert verify(checkpoint).status == "whole"
    assert torch.equal(load_file(report.path / "model.safetensors")["big"], trained().get_parameter("big").detach())


def test_damage_elsewhere_is_refused_where_the_whole_was_named(checkpoint: Path) -> None:
    (checkpoint / "optim" / "optimizer.json").unlink()
    with pytest.raises(IntegrityError, match=r"optimizer\.json") as caught:
        consolidate(checkpoint)
    assert str(checkpoint / "model") in (caught.value.hint or "")
    assert consolidate(checkpoint / "model").verified


def test_digests_of_whole_files_are_compared_as_well(checkpoint: Path) -> None:
    # A manifest of very many chunks has one digest for each file.
    from shardwise.disk.crc import crc32c
    from shardwise.format.manifest import FileRecord, Manifest, encode_manifest

    manifest = read_manifest(checkpoint)
    files = tuple(
        FileRecord(file.path, file.size, crc32c((checkpoint / file.path).read_bytes()), None) for file in manifest.files
    )
    (checkpoint / "manifest.json").write_bytes(encode_manifest(Manifest(files, (), manifest.info)))
    assert verify(checkpoint).status == "whole"
    first = consolidate(checkpoint)
    assert torch.equal(load_file(first.path / "model.safetensors")["big"], trained().get_parameter("big").detach())
    shutil.rmtree(first.path)
    _flipped_bit(checkpoint)
    with pytest.raises(IntegrityError, match="changed since the save"):
        consolidate(checkpoint)
    assert not first.path.exists()


# --- without a manifest ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def by_torch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("by-torch") / "model"
    run(2, shards_by_torch, str(directory), 3)
    return directory


@pytest.fixture
def shards(by_torch: Path, tmp_path: Path) -> Path:
    shutil.copytree(by_torch, tmp_path / "shards")
    return tmp_path / "shards"


def test_shards_whose_size_nobody_knows_are_refused(shards: Path, tmp_path: Path) -> None:
    refused(shards, tmp_path / "new" / "export", 3)
    with pytest.raises(UnverifiableError, match="how large"):
        consolidate(shards)
    report = consolidate(shards, tmp_path / "export", assume_complete=True)
    assert not report.verified
    assert any("taken to be complete" in note for note in report.notes)
    found = load_file(report.path / "model.safetensors")
    assert torch.equal(found["transformer.wte.weight"], gpt2(3).state_dict()["transformer.wte.weight"])


def test_a_configuration_says_how_large_tensors_are(shards: Path, tmp_path: Path) -> None:
    describe(shards)
    report = consolidate(shards, tmp_path / "export")
    assert same_logits(report.path, gpt2(3))
    assert verify(report.path).status == "whole"
    last = shards / "shard-00002-model-00001-of-00001.safetensors"
    last.rename(tmp_path / "away")
    # Half of each tensor: pieces that fit together, and a tensor half as large.
    assert main(["verify", str(shards)]) == 3
    refused(shards, tmp_path / "new" / "export", 1)
    with pytest.raises(ShapeMismatchError, match="GPT2LMHeadModel"):
        consolidate(shards)


def test_a_tensor_that_is_in_no_file_is_missed(shards: Path, tmp_path: Path) -> None:
    describe(shards, n_layer=3)
    with pytest.raises(MissingTensorError, match="GPT2LMHeadModel"):
        consolidate(shards)
    refused(shards, tmp_path / "new" / "export", 1)


def test_pieces_with_a_gap_are_damage(shards: Path, tmp_path: Path) -> None:
    describe(shards)
    (shards / "shard-00001-model-00001-of-00001.safetensors").unlink()
    assert main(["verify", str(shards)]) == 1
    refused(shards, tmp_path / "new" / "export", 1, "--assume-complete")


def test_pieces_that_overlap_are_damage(shards: Path, tmp_path: Path) -> None:
    from shardwise.format.header import encode_sharding_metadata

    name = "transformer.wpe.weight"
    extra = shards / "shard-00003-model-00001-of-00001.safetensors"
    save_file({name: torch.zeros(8, 16)}, extra, encode_sharding_metadata({name: (4, 0)}))
    assert main(["verify", str(shards)]) == 1
    refused(shards, tmp_path / "new" / "export", 1, "--assume-complete")


def test_a_file_of_a_numbered_set_is_missed_by_its_name(tmp_path: Path) -> None:
    gpt2().save_pretrained(tmp_path / "model", max_shard_size="8kB")
    files = sorted((tmp_path / "model").glob("*.safetensors"))
    assert len(files) > 2
    (tmp_path / "model" / "model.safetensors.index.json").unlink()
    assert same_logits(consolidate(tmp_path / "model", tmp_path / "whole").path, gpt2())
    files[1].unlink()
    assert main(["verify", str(tmp_path / "model")]) == 1
    refused(tmp_path / "model", tmp_path / "new" / "export", 1)


def test_a_file_of_an_index_is_missed(tmp_path: Path) -> None:
    gpt2().save_pretrained(tmp_path / "model", max_shard_size="8kB")
    sorted((tmp_path / "model").glob("*.safetensors"))[-1].unlink()
    refused(tmp_path / "model", tmp_path / "new" / "export", 1)


def test_a_hugging_face_directory_keeps_what_stands_beside_the_weights(tmp_path: Path) -> None:
    source = tmp_path / "model"
    gpt2().save_pretrained(source, max_shard_size="8kB")
    (source / "tokenizer_config.json").write_text("{}")
    (source / "vocab.json").write_text("{}")
    (source / "README.md").write_text("a model")
    (source / "training_args.bin").write_bytes(b"\x80\x02what a trainer leaves")
    (source / "runs").mkdir()
    (source / "runs" / "log").write_text("")
    report = consolidate(source, tmp_path / "export")
    names = {path.name for path in report.path.iterdir()}
    weights = {"model.safetensors", "model.safetensors.index.json", "manifest.json"}
    beside = {"config.json", "generation_config.json", "tokenizer_config.json", "vocab.json", "README.md"}
    assert names == weights | beside
    assert same_logits(report.path, gpt2())


def test_a_configuration_of_another_size_is_refused(tmp_path: Path) -> None:
    gpt2().save_pretrained(tmp_path)
    describe(tmp_path, vocab_size=48)
    with pytest.raises(ShapeMismatchError) as caught:
        consolidate(tmp_path)
    assert caught.value.tensor == "transformer.wte.weight"


# --- what is no model ------------------------------------------------------------------------------------------------


def test_an_optimizer_is_refused_by_name(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(MisuseError, match="optimizer"):
        consolidate(checkpoint / "optim")
    shutil.copytree(checkpoint / "optim", tmp_path / "copy")
    with pytest.raises(MisuseError, match="optimizer"):
        consolidate(tmp_path / "copy")
    refused(checkpoint / "optim", tmp_path / "new" / "export", 2)


def test_an_adapter_is_refused_by_name(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(gpt2(), LoraConfig(target_modules=["c_attn"], r=2, fan_in_fan_out=True))
    with CheckpointingConfig(checkpoint_dir=tmp_path, is_peft=True, save_consolidated=False).build() as engine:
        engine.save(0, 1, adapted)
    refused(tmp_path / "epoch_0_step_1", tmp_path / "new" / "export", 2)
    with pytest.raises(MisuseError, match="adapter"):
        consolidate(tmp_path)


def test_a_pipeline_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text("{}")
    save_file({"w": torch.ones(2)}, tmp_path / "unet" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(MisuseError, match="pipeline") as caught:
        consolidate(tmp_path)
    assert "unet" in (caught.value.hint or "")


def test_by_the_command_line_in_a_process_of_its_own(checkpoint: Path, tmp_path: Path) -> None:
    _flipped_bit(checkpoint)
    code, printed = command("consolidate", checkpoint, "--output", tmp_path / "export")
    assert code == 1
    assert "changed since the save" in printed
    assert not (tmp_path / "export").exists()
    assert os.listdir(tmp_path) == ["root"]


def test_one_process_saves_what_one_process_exports(tmp_path: Path) -> None:
    direct = saved(tmp_path / "direct", diffusers_compatible=True)
    shards = saved(tmp_path / "shards", save_consolidated="false", diffusers_compatible=True)
    report = consolidate(shards)
    online = direct / "model" / "consolidated"
    assert report.files == ("diffusion_pytorch_model.safetensors",)
    for name in (*report.files, "diffusion_pytorch_model.safetensors.index.json"):
        assert (report.path / name).read_bytes() == (online / name).read_bytes()
    assert json.loads((report.path / "manifest.json").read_text())["info"] == {}


def test_shards_saved_in_the_background(tmp_path: Path) -> None:
    net = model()
    with CheckpointingConfig(checkpoint_dir=tmp_path, is_async=True, save_consolidated=False).build() as engine:
        engine.save(0, 1, net)
    found = load_file(consolidate(tmp_path).path / "model.safetensors")
    assert all(torch.equal(found[name], value.detach()) for name, value in net.named_parameters())
    assert verify(tmp_path).status == "whole"


def test_a_checkpoint_gets_no_file_that_its_manifest_lacks(tmp_path: Path) -> None:
    path = saved(tmp_path / "root")
    export = path / "model" / "consolidated"
    for source, output in ((export, None), (path, path / "export"), (path, path / "model" / "consolidated" / "more")):
        with pytest.raises(MisuseError, match="the place is in the checkpoint"):
            consolidate(source, output)
    for to in ("hf", "dcp", "shards"):
        with pytest.raises(MisuseError, match="the place is in the checkpoint"):
            convert(path, path / "new" / to, to)
    assert verify(path).status == "whole"
    assert not (path / "new").exists()
    (tmp_path / "manifest.json").write_text('{"name": "of a web application"}')
    assert consolidate(path, tmp_path / "made").tensors == 3
