"""`verify` says what is damaged, by file and tensor, and nothing on what is whole."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tests.ops.checkpoints import engine, model, optimizer, saved

from shardwise.errors import (
    CheckpointNotFoundError,
    IncompleteCheckpointError,
    IntegrityError,
    ManifestError,
    MisuseError,
)
from shardwise.format.manifest import read_manifest
from shardwise.ops.consolidate import consolidate
from shardwise.ops.verify import verify

EXPORT = "model/consolidated/model.safetensors"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pristine")
    saved(root / "root", (1, 2))
    return root / "root"


@pytest.fixture
def root(pristine: Path, tmp_path: Path) -> Path:
    shutil.copytree(pristine, tmp_path / "root", symlinks=True)
    return tmp_path / "root"


def chunk(directory: Path, name: str, component: str = "model") -> tuple[str, int]:
    """File and first byte of a tensor."""
    tensor = next(t for t in read_manifest(directory).tensors if (t.component, t.spec.name) == (component, name))
    return tensor.chunks[0].file, tensor.chunks[0].offset


def flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize("threads", [1, 5])
def test_whole(root: Path, threads: int) -> None:
    told: list[tuple[int, int]] = []
    report = verify(root / "epoch_0_step_2", threads=threads, progress=lambda *each: told.append(each))
    assert report.status == "whole"
    assert report.verifiable
    manifest = read_manifest(root / "epoch_0_step_2")
    assert (report.files, report.tensors) == (len(manifest.files), len(manifest.tensors))
    assert report.bytes_read == sum(file.size for file in manifest.files)
    assert told[-1] == (report.bytes_read, report.bytes_read)
    assert [done for done, _ in told] == sorted(done for done, _ in told)


def test_a_flipped_bit_names_file_and_tensor(root: Path) -> None:
    directory = root / "epoch_0_step_2"
    file, offset = chunk(directory, "big")
    flip(directory / file, offset + 100_000)
    (damage,) = verify(directory).damages
    assert (damage.file, damage.kind, damage.component, damage.tensors) == (file, "digest", "model", ("big",))
    assert verify(directory, digests=False).status == "whole"


def test_a_flipped_bit_in_a_header(root: Path) -> None:
    directory = root / "epoch_0_step_2"
    flip(directory / EXPORT, 9)
    (damage,) = verify(directory).damages
    assert (damage.file, damage.kind, damage.tensors) == (EXPORT, "header", ())


def test_a_flipped_bit_in_a_plain_file(root: Path) -> None:
    directory = root / "epoch_0_step_2"
    flip(directory / "losses.json", 3)
    (damage,) = verify(directory).damages
    assert (damage.file, damage.kind, damage.tensors) == ("losses.json", "digest", ())


def test_a_flipped_bit_in_the_manifest(root: Path) -> None:
    directory = root / "epoch_0_step_2"
    flip(directory / "manifest.json", 300)
    (damage,) = verify(directory).damages
    assert (damage.file, damage.kind) == ("manifest.json", "manifest")


def test_a_cut_file_names_the_tensors_that_are_lost(root: Path) -> None:
    directory = root / "epoch_0_step_2"
    file, offset = chunk(directory, "small")
    os.truncate(directory / file, offset)
    (damage,) = verify(directory, digests=False).damages
    assert (damage.kind, damage.tensors) == ("size", ("small",))
    os.truncate(directory / file, 10)
    (damage,) = verify(directory, digests=False).damages
    assert set(damage.tensors) == {"big", "small"}


def test_an_absent_file(root: Path) -> None:
    directory = root / "epoch_0_step_2"
    (directory / EXPORT).unlink()
    (damage,) = verify(directory).damages
    assert (damage.file, damage.kind) == (EXPORT, "absent")
    assert {"big", "small"} <= set(damage.tensors)


def test_a_file_that_a_load_would_read_is_damage_and_notes_are_not(root: Path) -> None:
    directory = root / "epoch_0_step_2"
    (directory / "README.md").write_text("good run")
    (directory / "model" / "notes.txt").write_text("x")
    report = verify(directory)
    assert report.status == "whole"
    assert report.extra == ("README.md", "model/notes.txt")
    save_file({"big": torch.zeros(300, 200)}, directory / "model" / "shard-00001-model-00001-of-00001.safetensors")
    (damage,) = verify(directory).damages
    assert (damage.file, damage.kind) == ("model/shard-00001-model-00001-of-00001.safetensors", "unexpected")


def test_a_root_means_its_latest(root: Path) -> None:
    assert verify(root).path.name == "epoch_0_step_2"
    assert verify(root / "LATEST").path.name == "epoch_0_step_2"
    (root / "LATEST").unlink()
    (root / "LATEST.txt").write_text("epoch_0_step_1\n")
    assert verify(root).path.name == "epoch_0_step_1"
    assert verify(root / "LATEST").path.name == "epoch_0_step_1"


def test_a_part_is_judged_by_the_whole_manifest(root: Path) -> None:
    directory = root / "epoch_0_step_2"
    file, offset = chunk(directory, "big")
    flip(directory / file, offset)
    assert verify(directory / "optim").status == "whole"
    assert verify(directory / "model").status == "damaged"
    assert verify(directory / EXPORT).status == "damaged"


def test_components_that_stand_alone(tmp_path: Path) -> None:
    net = model()
    with engine(tmp_path) as made:
        made.save_model(net, tmp_path / "alone")
        made.save_optimizer(optimizer(net), net, tmp_path / "alone")
    assert verify(tmp_path / "alone" / "model").status == "whole"
    assert verify(tmp_path / "alone").status == "whole"
    target = tmp_path / "alone" / "optim" / "optimizer.json"
    flip(target, 5)
    assert [damage.file for damage in verify(tmp_path / "alone").damages] == ["optim/optimizer.json"]
    assert verify(tmp_path / "alone" / "model").status == "whole"


def test_without_a_manifest_headers_are_checked(tmp_path: Path) -> None:
    save_file({"w": torch.ones(10)}, tmp_path / "model.safetensors")
    report = verify(tmp_path)
    assert (report.status, report.verifiable, report.tensors) == ("unverifiable", False, 1)
    os.truncate(tmp_path / "model.safetensors", (tmp_path / "model.safetensors").stat().st_size - 1)
    (damage,) = verify(tmp_path).damages
    assert (damage.file, damage.tensors) == ("model.safetensors", ("w",))


def test_without_a_manifest_the_index_is_checked(tmp_path: Path) -> None:
    save_file({"w": torch.ones(10)}, tmp_path / "a.safetensors")
    index = '{"metadata":{"total_size":44},"weight_map":{"w":"a.safetensors","v":"a.safetensors","u":"b.safetensors"}}'
    (tmp_path / "model.safetensors.index.json").write_text(index)
    found = {damage.tensors: damage.kind for damage in verify(tmp_path).damages}
    assert found == {("v",): "index", ("u",): "index"}


def test_a_consolidated_export_made_later_is_verified_too(tmp_path: Path) -> None:
    directory = saved(tmp_path, save_consolidated="false")
    assert verify(directory).status == "whole"
    report = consolidate(directory)
    assert verify(directory).status == "whole"
    flip(report.path / "model.safetensors", 200)
    (damage,) = verify(directory).damages
    assert damage.file == "model/consolidated/model.safetensors"


def test_what_cannot_be_verified(root: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError):
        verify(tmp_path / "nowhere")
    (root / ".saving-epoch_0_step_9").mkdir()
    with pytest.raises(IncompleteCheckpointError):
        verify(root / ".saving-epoch_0_step_9")
    with pytest.raises(MisuseError, match="threads"):
        verify(root, threads=0)


# --- restoring -------------------------------------------------------------------------------------------------------


def test_restore_checks_sizes_always(root: Path) -> None:
    directory = root / "epoch_0_step_2"
    os.truncate(directory / EXPORT, 300)
    with engine(root) as made, pytest.raises(IntegrityError, match=r"cut short") as caught:
        made.restore(model())
    assert caught.value.path == str(directory / EXPORT)


def test_restore_checks_digests_when_asked_and_changes_nothing_before(root: Path) -> None:
    directory = root / "epoch_0_step_2"
    file, offset = chunk(directory, "small")
    flip(directory / file, offset)
    net = model()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.fill_(0.5)
    with engine(root) as made:
        with pytest.raises(IntegrityError) as caught:
            made.restore(net, verify="digests")
        assert caught.value.tensor == "small"
        assert all(bool((parameter == 0.5).all()) for parameter in net.parameters())
        assert made.restore(net) is not None


def test_restore_looks_only_at_what_it_reads(root: Path) -> None:
    shutil.rmtree(root / "epoch_0_step_2" / "optim")
    with engine(root) as made:
        assert made.restore(model(), verify="digests") is not None
        net = model()
        with pytest.raises(IntegrityError, match="absent"):
            made.restore(net, optimizer(net))


def test_restore_refuses_a_damaged_manifest_and_an_unknown_level(root: Path) -> None:
    with engine(root) as made, pytest.raises(MisuseError, match="verify"):
        made.restore(model(), verify="all")  # type: ignore[arg-type]
    flip(root / "epoch_0_step_2" / "manifest.json", 300)
    with engine(root) as made, pytest.raises(ManifestError):
        made.restore(model())


def test_restore_without_a_manifest_warns(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    (root / "epoch_0_step_2" / "manifest.json").unlink()
    with engine(root) as made, caplog.at_level("WARNING"):
        assert made.restore(model(), verify="digests") is not None
    assert "cannot be verified" in caplog.text


def test_a_file_that_the_manifest_does_not_list_is_not_whole(tmp_path: Path) -> None:
    path = saved(tmp_path)
    (path / "notes.txt").write_text("a note")
    report = verify(path / "notes.txt")
    assert (report.status, report.files) == ("unverifiable", 1)
    whole = verify(path / "manifest.json")
    assert (whole.status, whole.path, whole.files) == ("whole", path, verify(path).files)
