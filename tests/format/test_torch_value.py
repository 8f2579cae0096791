"""Values that DCP pickled are read as data; what is no data is refused and not run."""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path

import pytest
import torch

from shardwise.errors import FormatError, UnsafePickleError
from shardwise.format.torch_archive import read_torch_value


def saved(value: object) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def archive(pickled: bytes, compression: int = zipfile.ZIP_STORED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as made:
        made.writestr("archive/data.pkl", pickled)
    return stream.getvalue()


@pytest.mark.parametrize(
    "value",
    [
        0.1,
        3,
        True,
        None,
        "text",
        b"bytes",
        [1, [2]],
        (0.9, 0.999),
        {"a": {1: None}},
        {1, 2},
        torch.bfloat16,
        2**70,
        -1.5,
    ],
)
def test_plain_values_come_back(value: object) -> None:
    found = read_torch_value(saved(value), "file", "name")
    assert found == value
    assert type(found) is type(value)


def test_what_is_shared_is_read_in_linear_time() -> None:
    value: list[object] = []
    for _ in range(50):
        value = [value, value]
    found = read_torch_value(saved(value), "file", "name")
    for _ in range(50):
        assert isinstance(found, list)
        assert found[0] is found[1]
        found = found[0]


def test_tensors_inside_values_are_read() -> None:
    found = read_torch_value(saved((1, torch.arange(3))), "file", "name")
    assert isinstance(found, tuple)
    assert torch.equal(found[1], torch.arange(3))


class Payload:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.marker,)


def test_code_does_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    with pytest.raises(UnsafePickleError, match="allow_legacy_pickle_restore"):
        read_torch_value(saved({"lr": Payload(marker)}), "file", "name")
    assert not marker.exists()


def _endless() -> bytes:
    value: list[object] = []
    value.append(value)
    return pickle.dumps(value, 2)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"PK\x03\x04 and no more",
        pickle.dumps(3),
        saved(0.1)[:-30],
        archive(pickle.dumps([0] * 1000, 2), zipfile.ZIP_DEFLATED),
        archive(pickle.dumps(3, 2)[:-1]),
        archive(_endless()),
    ],
)
def test_what_is_damaged_is_an_error(data: bytes) -> None:
    with pytest.raises(FormatError):
        read_torch_value(data, "file", "name")
