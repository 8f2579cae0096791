"""A `consolidate` that was killed goes on where it was, and never publishes what is no longer so."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.ops.damaged import save_dcp
from tests.support.ranks import fresh

from shardwise.disk.storage import Buffer, LocalStorage
from shardwise.errors import CheckpointBusyError, StorageError
from shardwise.lifecycle import temporary_name
from shardwise.lifecycle.ownership import claim
from shardwise.ops.consolidate import consolidate
from shardwise.ops.convert import Format, convert
from shardwise.ops.verify import verify

_TENSOR = 64 * 64 * 4


class Deadly(LocalStorage):
    """Ends the process at a write."""

    def __init__(self, writes: int) -> None:
        self._left = writes

    def write(self, handle: int, data: Buffer, offset: int) -> None:
        self._left -= 1
        if not self._left:
            os.kill(os.getpid(), signal.SIGKILL)
        super().write(handle, data, offset)


class Counting(LocalStorage):
    """Counts the bytes of tensors."""

    def __init__(self) -> None:
        self.written = 0

    def write(self, handle: int, data: Buffer, offset: int) -> None:
        self.written += memoryview(data).nbytes
        super().write(handle, data, offset)


def source(root: Path, seed: int = 0) -> Path:
    """Twelve tensors, which are six files of two."""
    torch.manual_seed(seed)
    return save_dcp({f"layer.{number:02}": torch.randn(64, 64) for number in range(12)}, root)


def killed(dcp: str, export: str, writes: int) -> None:
    consolidate(dcp, export, max_file_bytes=2 * _TENSOR, storage=Deadly(writes))


def interrupted(root: Path, writes: int) -> tuple[Path, Path]:
    """A source, and where a run was killed at a write."""
    dcp, export = source(root / "dcp"), root / "export"
    code = fresh(killed, str(dcp), str(export), writes, output=root / "output", seconds=100)
    assert code == -signal.SIGKILL
    assert (root / temporary_name("export")).is_dir()
    assert not export.exists()
    return dcp, export


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(directory.glob("*.safetensors")) for name, t in load_file(file).items()}


@pytest.mark.parametrize("writes", [1, 8, 12])
def test_what_was_written_is_not_written_again(writes: int, tmp_path: Path) -> None:
    dcp, export = interrupted(tmp_path, writes)
    storage = Counting()
    consolidate(dcp, export, max_file_bytes=2 * _TENSOR, storage=storage)
    assert (12 - writes) * _TENSOR <= storage.written <= (14 - writes) * _TENSOR  # another thread had begun one
    consolidate(dcp, tmp_path / "reference", max_file_bytes=2 * _TENSOR)
    for file in (tmp_path / "reference").iterdir():
        assert (export / file.name).read_bytes() == file.read_bytes()
    assert verify(export).status == "whole"
    assert {path.name for path in tmp_path.iterdir()} == {"dcp", "export", "reference", "output", "output.err"}


def test_a_source_that_has_changed_meanwhile(tmp_path: Path) -> None:
    dcp, export = interrupted(tmp_path, 8)
    shutil.rmtree(dcp)
    source(dcp, seed=1)
    consolidate(dcp, export, max_file_bytes=2 * _TENSOR)
    consolidate(dcp, tmp_path / "reference")
    expected, found = tensors(tmp_path / "reference"), tensors(export)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert verify(export).status == "whole"


def test_what_was_written_and_has_changed(tmp_path: Path) -> None:
    dcp, export = interrupted(tmp_path, 8)
    aside = tmp_path / temporary_name("export")
    first = sorted(aside.iterdir())[0]
    content = bytearray(first.read_bytes())
    content[-1] ^= 1
    first.write_bytes(content)
    (aside / "manifest.json").write_text("{}")
    (aside / "model-00009-of-00009.safetensors").write_text("of another run")
    last = sorted(aside.glob("model-0000?-of-00006.safetensors"))[-1]
    last.unlink()
    last.symlink_to(first)
    consolidate(dcp, export, max_file_bytes=2 * _TENSOR)
    consolidate(dcp, tmp_path / "reference", max_file_bytes=2 * _TENSOR)
    assert sorted(path.name for path in export.iterdir()) == sorted(p.name for p in (tmp_path / "reference").iterdir())
    for file in (tmp_path / "reference").iterdir():
        assert not (export / file.name).is_symlink()
        assert (export / file.name).read_bytes() == file.read_bytes()


def test_another_split_begins_anew(tmp_path: Path) -> None:
    dcp, export = interrupted(tmp_path, 8)
    storage = Counting()
    report = consolidate(dcp, export, storage=storage)
    assert report.files == ("model.safetensors",)
    assert storage.written == 12 * _TENSOR
    assert verify(export).status == "whole"


@pytest.mark.parametrize("to", ["hf", "dcp", "shards"])
def test_two_at_a_time_are_refused(to: Format, tmp_path: Path) -> None:
    dcp = source(tmp_path / "dcp")
    aside = tmp_path / temporary_name("export")
    aside.mkdir()
    (aside / "__0_0.distcp").write_text("what the other has written so far")
    mine = claim(tmp_path, "export")
    with pytest.raises(CheckpointBusyError, match="export"):
        convert(dcp, tmp_path / "export", to)
    assert [path.name for path in aside.iterdir()] == ["__0_0.distcp"]
    mine.release()
    assert convert(dcp, tmp_path / "export", to).tensors == 12


class Full(LocalStorage):
    """Takes no tensor."""

    def create(self, path: Path, size: int, head: Buffer) -> None:
        raise StorageError.from_os(OSError(28, os.strerror(28)), path=path)


@pytest.mark.parametrize("to", ["hf", "dcp", "shards"])
def test_an_error_names_the_place_that_was_asked_for(to: Format, tmp_path: Path) -> None:
    dcp = source(tmp_path / "dcp")
    with pytest.raises(StorageError) as caught:
        convert(dcp, tmp_path / "new" / "export", to, storage=Full())
    assert Path(str(caught.value.path)).is_relative_to(tmp_path / "new" / "export")
    assert [path.name for path in tmp_path.iterdir()] == ["dcp"]
    with pytest.raises(StorageError) as caught:
        convert(dcp, Path("/proc/self/task/export"), to)
    assert caught.value.path == "/proc/self/task"
