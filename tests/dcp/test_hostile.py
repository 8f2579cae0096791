"""Files of values that are damaged or forged: one typed error on every rank, whatever they hold."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from tests.dcp.dcp_errors import refused, told, unreadable
from tests.support.ranks import failure
from torch.distributed.checkpoint.api import CheckpointException

from shardwise import SafetensorsReader, SafetensorsWriter
from shardwise.dcp.items import VALUES_NAME, VALUES_TENSORS_NAME
from shardwise.errors import CheckpointNotFoundError, HeaderError, StateFormatError, StorageError
from shardwise.format.state_json import encode_state


def _record(value: object) -> bytes:
    return encode_state(value)[0]


class Evil:
    """Unpickling this fails the test."""

    def __reduce__(self) -> tuple[object, ...]:
        return pytest.fail, ("a pickle from disk was run",)


#: Contents of the file of values that are no table of values.
HOSTILE: dict[str, bytes] = {
    "empty": b"",
    "zeros": bytes(4096),
    "cut": _record({"step": 1})[:-8],
    "not text": bytes(range(256)),
    "deep": b"[" * 300_000,
    "another record": b'{"format":"shardwise-manifest","version":1,"value":{}}',
    "another version": _record({"step": 1}).replace(b'"version":1', b'"version":2'),
    "a key twice": _record({"step": 1}).replace(b'"step":1', b'"step":1,"step":2'),
    "a number": _record(7),
    "a list": _record([1, 2]),
    "names that are numbers": _record({1: 2}),
    "an unknown tag": _record({"step": 1}).replace(b":1}}", b':{"$os.system":"true"}}}'),
    "a tensor that is not there": _record({"step": torch.ones(1)}),
    "a million digits": _record({"step": 1}).replace(b":1}}", b":" + b"9" * 1_000_000 + b"}}"),
    "NaN": _record({"step": 1}).replace(b":1}}", b":NaN}}"),
    "a name of a tensor": _record({"w": 1}),
    "a pickle": pickle.dumps(Evil()),
}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    dcp.save({"w": torch.ones(3), "step": 1}, storage_writer=SafetensorsWriter(tmp_path))
    return tmp_path


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_values(saved: Path, name: str) -> None:
    (saved / VALUES_NAME).write_bytes(HOSTILE[name])
    error = unreadable(saved)
    assert isinstance(error, StateFormatError)
    assert error.path == str(saved / VALUES_NAME)
    assert error.hint
    with pytest.raises(StateFormatError):
        SafetensorsReader(saved).read_metadata()


def test_hostile_kinds_of_files(saved: Path) -> None:
    path = saved / VALUES_NAME
    for make in (path.mkdir, lambda: os.mkfifo(path), lambda: path.symlink_to("/dev/zero")):
        path.unlink()
        make()
        assert isinstance(unreadable(saved), (StateFormatError, StorageError))
        if path.is_dir():
            assert isinstance(refused({"step": 1}, saved), StorageError)
            path.rmdir()
            path.touch()
    path.unlink()
    path.symlink_to("absent")
    assert isinstance(unreadable(saved), CheckpointNotFoundError)


def test_damaged_tensors_inside_values(saved: Path) -> None:
    dcp.save({"w": torch.ones(3), "t": (torch.ones(100),)}, storage_writer=SafetensorsWriter(saved))
    path = saved / VALUES_TENSORS_NAME
    content = path.read_bytes()
    for damaged in (b"", content[:-8], content[:20], bytes(100), pickle.dumps(Evil())):
        path.write_bytes(damaged)
        assert isinstance(unreadable(saved, {"t": None}), StateFormatError)
    path.unlink()
    assert isinstance(unreadable(saved, {"t": None}), StateFormatError)


def load_damaged(path: Path) -> None:
    try:
        dcp.load({"w": torch.zeros(3), "step": 0}, storage_reader=SafetensorsReader(path))
    except CheckpointException as error:
        raise told(error) from None


def test_every_rank_is_told(saved: Path) -> None:
    (saved / VALUES_NAME).write_bytes(b"{")
    assert isinstance(failure(2, load_damaged, saved), StateFormatError)


def test_what_dcp_says_of_an_absent_or_damaged_checkpoint_is_our_error(saved: Path) -> None:
    assert isinstance(unreadable(saved / "absent"), CheckpointNotFoundError)
    content = (saved / "model.safetensors").read_bytes()
    (saved / "model.safetensors").write_bytes(content[:-4])
    reader, loaded = SafetensorsReader(saved), {"w": torch.zeros(3), "step": 0}
    for _ in range(2):
        with pytest.raises(CheckpointException) as caught:
            dcp.load(loaded, storage_reader=reader)
        assert isinstance(told(caught.value), HeaderError)
    (saved / "model.safetensors").write_bytes(content)
    dcp.load(loaded, storage_reader=reader)
    assert loaded["step"] == 1
