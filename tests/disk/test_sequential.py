"""Files that are written and read from front to back."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from tests.support.memory import MemoryStorage

from shardwise.disk.crc import crc32c
from shardwise.disk.sequential import SequentialFile, digest_file, write_file
from shardwise.disk.storage import LocalStorage
from shardwise.errors import CheckpointNotFoundError, FormatError, StateFormatError, StorageError
from shardwise.format.json_file import read_json, read_json_object

PATH = Path("/far/file")


def test_digests_of_parts_and_of_the_whole() -> None:
    storage = MemoryStorage()
    with SequentialFile(storage, PATH) as file:
        assert file.append([b"head"]) == crc32c(b"head")
        assert file.append([b"one", memoryview(b"two")], "t") == crc32c(b"onetwo")
        assert file.append([]) == 0
    assert bytes(storage.files[PATH]) == b"headonetwo"
    assert (file.size, file.crc32c) == (10, crc32c(b"headonetwo"))
    assert digest_file(storage, PATH) == (10, crc32c(b"headonetwo"))
    assert [what for what, _ in storage.log][:6] == ["create", "open", "write", "write", "write", "sync"]
    assert not storage.open_handles


def test_a_file_without_a_part_is_not_made() -> None:
    storage = MemoryStorage()
    with SequentialFile(storage, PATH):
        pass
    assert not storage.files


@pytest.mark.parametrize("operation", ["create", "open", "write", "sync", "close"])
def test_what_is_refused_names_the_file(operation: str) -> None:
    storage = MemoryStorage(fail=operation)
    with pytest.raises(StorageError) as caught, SequentialFile(storage, PATH) as file:
        file.append([b"x"], "weight")
    assert caught.value.path == str(PATH)
    assert caught.value.errno == errno.ENOSPC
    if operation == "write":
        assert caught.value.tensor == "weight"
        assert "sync" not in dict(storage.log)
    assert not storage.open_handles


def test_a_small_file_is_durable() -> None:
    storage = MemoryStorage()
    write_file(storage, PATH, b"text")
    assert bytes(storage.files[PATH]) == b"text"
    assert [what for what, _ in storage.log] == ["create", "open", "sync", "close"]


def test_a_directory_that_cannot_be_synced_is_let_be() -> None:
    handle = os.open("/proc", os.O_RDONLY)
    with pytest.raises(OSError, match="Invalid argument"):
        os.fsync(handle)
    os.close(handle)
    LocalStorage().sync_directory(Path("/proc"))


def test_a_directory_that_has_to_be_new(tmp_path: Path) -> None:
    storage = LocalStorage()
    storage.make_directory(tmp_path / "a" / "b", new=True)
    storage.make_directory(tmp_path / "a" / "b")
    with pytest.raises(StorageError) as caught:
        storage.make_directory(tmp_path / "a" / "b", new=True)
    assert caught.value.errno == errno.EEXIST


def test_json_of_other_tools(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json_object(path) == {"a": 1}
    path.write_bytes(b"[1]")
    assert read_json(path) == [1]
    with pytest.raises(FormatError, match="not a JSON object") as caught:
        read_json_object(path)
    path.write_bytes(b"{")
    with pytest.raises(StateFormatError, match="not JSON") as caught:
        read_json(path, StateFormatError)
    assert caught.value.path == str(path)
    path.unlink()
    with pytest.raises(CheckpointNotFoundError):
        read_json(path)
    os.mkfifo(path)
    with pytest.raises(FormatError, match="named pipe"):
        read_json(path)
