"""`verify` without a manifest: files against what others say of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tests.ops.damaged import cut, flip, gpt2, save_dcp

from shardwise.cli import main
from shardwise.errors import IncompleteCheckpointError
from shardwise.ops.inspect import inspect
from shardwise.ops.verify import verify


@pytest.fixture
def by_dcp(tmp_path: Path) -> Path:
    return save_dcp({"model": gpt2().state_dict(), "step": 3}, tmp_path / "dcp")


def data(directory: Path) -> Path:
    return next(directory.glob("*.distcp"))


def test_a_sound_dcp_directory_is_unverifiable_and_says_what_was_compared(
    by_dcp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = verify(by_dcp)
    assert (report.status, report.tensors) == ("unverifiable", len(gpt2().state_dict()))
    assert any(".distcp" in what for what in report.checked)
    assert any("digests" in what for what in report.unchecked)
    assert main(["verify", str(by_dcp)]) == 3
    printed = capsys.readouterr().out
    assert "checked" in printed
    assert "unchecked" in printed


def _absent_data(directory: Path) -> None:
    data(directory).unlink()


def _absent_metadata(directory: Path) -> None:
    (directory / ".metadata").unlink()


def _cut_metadata(directory: Path) -> None:
    cut(directory / ".metadata", 20)


def _zeros(directory: Path) -> None:
    file = data(directory)
    file.write_bytes(bytes(file.stat().st_size))


def _shifted(directory: Path) -> None:
    file = data(directory)
    file.write_bytes(b"x" + file.read_bytes())


@pytest.mark.parametrize(
    ("damage", "kind"),
    [
        (_absent_data, "absent"),
        (lambda directory: cut(data(directory), 1), "size"),
        (lambda directory: cut(data(directory), 5000), "size"),
        (_absent_metadata, "absent"),
        (_cut_metadata, "header"),
        (_zeros, "header"),
        (_shifted, "header"),
    ],
)
def test_a_damaged_dcp_directory(damage: Callable[[Path], None], kind: str, by_dcp: Path) -> None:
    damage(by_dcp)
    report = verify(by_dcp)
    assert kind in {each.kind for each in report.damages}
    assert main(["verify", str(by_dcp)]) == 1


def test_a_cut_file_names_the_tensors_that_are_lost(by_dcp: Path) -> None:
    cut(data(by_dcp), 1)
    (damage,) = verify(by_dcp).damages
    assert damage.file == data(by_dcp).name
    assert len(damage.tensors) == 1


def test_a_file_of_an_earlier_save_is_extra(by_dcp: Path) -> None:
    (by_dcp / "__7_0.distcp").write_bytes(b"")
    report = verify(by_dcp)
    assert (report.status, report.extra) == ("unverifiable", ("__7_0.distcp",))


@pytest.fixture
def by_pickle(tmp_path: Path) -> Path:
    for number in (1, 2):
        torch.save({f"w{number}": torch.randn(400)}, tmp_path / f"pytorch_model-{number:05d}-of-00002.bin")
    weight_map = {f"w{n}": f"pytorch_model-{n:05d}-of-00002.bin" for n in (1, 2)}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return tmp_path


def test_torch_files(by_pickle: Path) -> None:
    assert verify(by_pickle).status == "unverifiable"
    first = by_pickle / "pytorch_model-00001-of-00002.bin"
    content = first.read_bytes()
    for wrong in (content[:-1], content[:500], content[:3], b"", bytes(len(content)), b"PK\x03\x04" + bytes(2000)):
        first.write_bytes(wrong)
        assert [damage.file for damage in verify(by_pickle).damages] == [first.name]
        assert main(["verify", str(by_pickle)]) == 1
    first.unlink()
    assert {damage.kind for damage in verify(by_pickle).damages} == {"index", "absent"}
    (by_pickle / "pytorch_model.bin.index.json").unlink()
    (damage,) = verify(by_pickle).damages
    assert (damage.file, damage.kind) == (first.name, "absent")


def test_an_index_of_a_form_that_was_not_downloaded(tmp_path: Path) -> None:
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": {"w": "pytorch_model-00001-of-00002.bin"}}))
    assert [damage.file for damage in verify(tmp_path).damages] == [index.name]
    save_file({"w": torch.ones(3)}, tmp_path / "model.safetensors")
    assert verify(tmp_path).status == "unverifiable"
    assert inspect(tmp_path).damaged == ()


def test_what_a_torch_file_does_not_tell_is_said(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(3)}, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    report = verify(tmp_path)
    assert report.status == "unverifiable"
    assert any("pytorch_model.bin" in what and "1.6" in what for what in report.unchecked)


def test_a_pointer_in_a_files_place(tmp_path: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n"
    (tmp_path / "pytorch_model.bin").write_text(pointer)
    (tmp_path / "model.safetensors").write_text(pointer)
    assert {damage.file for damage in verify(tmp_path).damages} == {"pytorch_model.bin", "model.safetensors"}


def test_a_set_with_a_file_missing(tmp_path: Path) -> None:
    for number in (1, 2, 4):
        save_file({f"w{number}": torch.ones(3)}, tmp_path / f"model-{number:05d}-of-00004.safetensors")
    (damage,) = verify(tmp_path).damages
    assert (damage.file, damage.kind) == ("model-00003-of-00004.safetensors", "absent")
    assert main(["verify", str(tmp_path)]) == 1


def test_a_hub_caches_snapshot_consists_of_links(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    save_file({"w": torch.ones(3)}, blobs / "0123")
    (snapshot / "model.safetensors").symlink_to("../../blobs/0123")
    for place in (snapshot, snapshot / "model.safetensors"):
        assert (verify(place).status, verify(place).tensors) == ("unverifiable", 1)
    cut(blobs / "0123", 1)
    assert verify(snapshot / "model.safetensors").status == "damaged"
    (blobs / "0123").unlink()
    (damage,) = verify(snapshot).damages
    assert (damage.file, damage.kind) == ("model.safetensors", "absent")


def test_a_part_of_an_interrupted_save_is_one(tmp_path: Path) -> None:
    part = tmp_path / ".saving-epoch_0_step_1" / "model"
    part.mkdir(parents=True)
    save_file({"w": torch.ones(3)}, part / "model.safetensors")
    for place in (part, part / "model.safetensors"):
        with pytest.raises(IncompleteCheckpointError, match=r"\.saving-epoch_0_step_1"):
            verify(place)
    assert main(["verify", str(part)]) == 2


def test_a_flipped_bit_of_anothers_file_cannot_be_found_and_that_is_said(by_dcp: Path) -> None:
    flip(data(by_dcp), data(by_dcp).stat().st_size // 2)
    assert main(["verify", str(by_dcp)]) == 3
    assert "no manifest" in verify(by_dcp).unchecked[0]


def test_entries_that_are_not_where_the_archive_says(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(300)}, tmp_path / "pytorch_model.bin")
    content = (tmp_path / "pytorch_model.bin").read_bytes()
    local = content.index(b"PK\x03\x04", 4)
    (tmp_path / "pytorch_model.bin").write_bytes(content[:local] + b"PK__" + content[local + 4 :])
    (damage,) = verify(tmp_path).damages
    assert (damage.kind, "no entry begins where" in damage.message) == ("header", True)
    central = content.index(b"PK\x01\x02")
    longer = content[: central + 20] + (10**6).to_bytes(4, "little") + content[central + 24 :]
    (tmp_path / "pytorch_model.bin").write_bytes(longer)
    (damage,) = verify(tmp_path).damages
    assert damage.kind in ("size", "header")


def test_weights_that_are_no_file(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").symlink_to("absent")
    (tmp_path / "model.pt").mkdir()
    save_file({"w": torch.ones(3)}, tmp_path / "model.safetensors")
    assert [(damage.file, damage.kind) for damage in verify(tmp_path).damages] == [("pytorch_model.bin", "absent")]


def test_pieces_of_other_dimensions(tmp_path: Path) -> None:
    for number, shape in ((1, (2, 3)), (2, (2,))):
        offsets = {"w": {"saved_offsets": [0] * len(shape)}}
        note = {"DCP_SHARDING_INFO": json.dumps(offsets), "DCP_VERSION": "1.0"}
        save_file({"w": torch.ones(shape)}, tmp_path / f"shard-0000{number}-model-00001-of-00001.safetensors", note)
    assert "disagree about this tensor's dimensions" in verify(tmp_path).damages[0].message
