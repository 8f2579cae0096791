"""prune, repair and push: what they would do, what they do, and what they leave alone."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tests.ops.checkpoints import saved

from shardwise.cli import main
from shardwise.errors import ConfigError, IntegrityError, MisuseError, StateFormatError, UnverifiableError
from shardwise.lifecycle import claim, read_pointer, set_pointer
from shardwise.ops.prune import Retention, prune_checkpoints, recorded_policy
from shardwise.ops.push import push
from shardwise.ops.repair import PointerRepair, repair

EXPORT = "model/consolidated"


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("four")
    saved(root, (1, 2, 3, 4))
    return root


@pytest.fixture
def root(four: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(four, tmp_path / "root", symlinks=True))


def names(root: Path) -> set[str]:
    return {path.name for path in root.iterdir()}


def test_prune_shows_before_it_deletes(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = names(root)
    policy = Retention(1, every_k_steps=2)
    shown = prune_checkpoints(root, policy)
    assert (shown.names, shown.deleted) == (("epoch_0_step_1", "epoch_0_step_3"), False)
    assert names(root) == before
    assert main(["prune", "--json", str(root), "--keep-last", "1", "--keep-every", "2", "--yes"]) == 0
    assert json.loads(capsys.readouterr().out)["names"] == list(shown.names)
    assert before - names(root) == set(shown.names)


def test_the_policy_of_the_run(root: Path) -> None:
    with pytest.raises(ConfigError, match="no policy says how many of the newest checkpoints to keep"):
        prune_checkpoints(root)
    config = root / "epoch_0_step_4" / "config.yaml"
    config.write_text(config.read_text().replace("max_recent_checkpoints: null", "max_recent_checkpoints: 2"))
    assert recorded_policy(root) == Retention(2)
    assert prune_checkpoints(root).names == ("epoch_0_step_1", "epoch_0_step_2")


def test_repair_shows_before_it_mends(root: Path) -> None:
    shutil.rmtree(root / "epoch_0_step_4")  # where LATEST and LOWEST_VAL led
    (root / "mine").symlink_to("epoch_0_step_4")
    for name in (
        ".saving-epoch_0_step_5",
        ".saving-epoch_0_step_6",
        ".saving-epoch_0_step_7",
        ".doomed-epoch_0_step_0",
    ):
        (root / name).mkdir()
    (root / ".owner-epoch_0_step_7").write_text("another-machine 17 token\n")
    os.truncate(root / "epoch_0_step_1" / EXPORT / "model.safetensors", 100)
    before = names(root)
    mine = claim(root, "epoch_0_step_6")
    try:
        shown = repair(root)
        assert names(root) == before | {".owner-epoch_0_step_6"}
        done = repair(root, apply=True)
    finally:
        mine.release()
    assert set(shown.leftovers) == set(done.leftovers) == {".saving-epoch_0_step_5", ".doomed-epoch_0_step_0"}
    assert shown.pointers == done.pointers
    assert done.pointers == tuple(
        PointerRepair(name, "epoch_0_step_4", "epoch_0_step_3") for name in ("LATEST", "LOWEST_VAL")
    )
    assert read_pointer(root, "LATEST") == "epoch_0_step_3"
    assert before - names(root) == set(done.leftovers)
    assert [sentence.split()[0] for sentence in done.left] == ["epoch_0_step_1", ".saving-epoch_0_step_7", "the"]


def test_a_root_in_order(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["repair", str(root)]) == 0
    assert "is in order" in capsys.readouterr().out
    (root / ".saving-epoch_0_step_5").mkdir()
    assert main(["repair", str(root)]) == 1
    assert "would remove  .saving-epoch_0_step_5" in capsys.readouterr().out
    assert main(["repair", "--yes", str(root)]) == 0
    assert main(["repair", str(root)]) == 0


class FakeHub:
    """Remembers what it is asked for, and copies what it is sent."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.repos: list[str] = []

    def create_repo(self, repo_id: str, *, private: bool | None = None, exist_ok: bool = False) -> object:
        self.repos.append(repo_id)
        return None

    def upload_folder(
        self,
        *,
        repo_id: str,
        folder_path: str | Path,
        revision: str | None = None,
        commit_message: str | None = None,
        allow_patterns: list[str] | str | None = None,
    ) -> object:
        from huggingface_hub.utils import filter_repo_objects

        found = [p.relative_to(folder_path).as_posix() for p in Path(folder_path).rglob("*") if p.is_file()]
        for name in filter_repo_objects(found, allow_patterns=allow_patterns):
            (self.place / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(Path(folder_path) / name, self.place / name)
        return None


def test_push_uploads_the_export(root: Path, tmp_path: Path) -> None:
    hub = FakeHub(tmp_path / "hub")
    export = root / "epoch_0_step_4" / EXPORT
    report = push(root, "org/model", api=hub)
    assert (report.path, hub.repos) == (export, ["org/model"])
    assert names(hub.place) == names(export) == set(report.files)


def test_push_refuses_what_verify_refuses(root: Path, tmp_path: Path) -> None:
    hub = FakeHub(tmp_path / "hub")
    last = root / "epoch_0_step_4"
    manifest = last / "manifest.json"
    content = manifest.read_bytes()
    manifest.unlink()
    with pytest.raises(UnverifiableError, match="nobody can say whether it is whole"):
        push(last, "org/model", api=hub)
    manifest.write_bytes(content)
    file = last / EXPORT / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    with pytest.raises(IntegrityError, match="damaged and was not uploaded"):
        push(last, "org/model", api=hub)
    shutil.rmtree(last / EXPORT)
    with pytest.raises(MisuseError, match="no model here in the form that others open"):
        push(last / "optim", "org/model", api=hub)
    assert hub.repos == []
    assert not hub.place.exists()


def test_push_leaves_the_checkpoints_beside_a_model(tmp_path: Path) -> None:
    """As transformers' Trainer ends: the model, and beside it the checkpoints of the run, one of them half written."""
    top, hub = tmp_path / "output", FakeHub(tmp_path / "hub")
    for place in (top, top / "onnx", top / "checkpoint-500", top / "global_step7"):
        place.mkdir(parents=True)
        save_file({"w": torch.ones(2)}, place / "model.safetensors")
    (top / "checkpoint-500" / "model.safetensors").write_bytes(b"cut")
    (top / "checkpoint-500" / "optimizer.pt").touch()
    report = push(top, "org/model", allow_unverified=True, api=hub)
    assert report.left == ("checkpoint-500", "global_step7")
    assert set(report.files) == {"model.safetensors", "onnx/model.safetensors"}
    assert names(hub.place) == {"model.safetensors", "onnx"}
    (top / "onnx" / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(IntegrityError, match="onnx/model.safetensors"):
        push(top, "org/model", allow_unverified=True, api=hub)


def test_repair_of_pointers_that_are_not_there(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "LATEST").unlink()
    assert repair(root).pointers == (PointerRepair("LATEST", None, "epoch_0_step_4"),)
    assert main(["repair", str(root)]) == 1
    assert "would set  LATEST: nothing -> epoch_0_step_4" in capsys.readouterr().out
    assert main(["repair", "--yes", "--json", str(root)]) == 0
    assert json.loads(capsys.readouterr().out)["done"] is True
    set_pointer(root, "LATEST", "epoch_0_step_2")
    (root / ".publishing").write_text("epoch_0_step_3\n")  # a publication that was cut off
    assert repair(root).pointers == (PointerRepair("LATEST", "epoch_0_step_2", "epoch_0_step_3"),)
    (root / "epoch_0_step_9").mkdir()
    assert [sentence.split()[0] for sentence in repair(root).left] == ["epoch_0_step_9"]


def test_the_policy_of_a_run_whose_settings_are_damaged_or_absent(root: Path) -> None:
    config = root / "epoch_0_step_4" / "config.yaml"
    config.write_text("a: [")
    with pytest.raises(StateFormatError, match="not YAML(?s:.*)--keep-last N"):
        recorded_policy(root)
    config.write_text("other: 1")
    assert recorded_policy(root) is None
    config.unlink()
    assert recorded_policy(root) is None
