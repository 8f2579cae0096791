from __future__ import annotations

import io
import pickle
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from shardwise.errors import CheckpointNotFoundError, FormatError, UnsafePickleError
from shardwise.format.dcp_metadata import parse_dcp_metadata, parsed_once, read_dcp_metadata


@pytest.fixture
def one_rank() -> Iterator[None]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("as_path", [False, True])
def test_a_real_checkpoint_reads_as_torch_reads_it(tmp_path: Path, as_path: bool) -> None:
    mesh = init_device_mesh("cpu", (1,))
    state = {
        "model": {"w": distribute_tensor(torch.randn(8, 4), mesh, [Shard(0)]), "s": torch.tensor(3.0)},
        "half": torch.ones(3, dtype=torch.bfloat16),
        "list": [1, {"x": torch.zeros(2, dtype=torch.int64)}],
        "step": 5,
    }
    target = tmp_path / "checkpoint"
    writer = dcp.FileSystemWriter(target if as_path else str(target))
    dcp.save(state, storage_writer=writer)
    theirs = dcp.FileSystemReader(target).read_metadata()
    mine = read_dcp_metadata(target)
    assert mine == read_dcp_metadata(target / ".metadata")
    assert mine.state_dict_metadata == theirs.state_dict_metadata
    assert mine.storage_data == theirs.storage_data
    assert (mine.planner_data, mine.version) == (theirs.planner_data, theirs.version)
    assert mine.storage_meta is not None
    assert theirs.storage_meta is not None
    assert mine.storage_meta.checkpoint_id == str(theirs.storage_meta.checkpoint_id) == str(target)


def sample(**changes: object) -> Metadata:
    fields: dict[str, object] = {
        "state_dict_metadata": {
            "w": TensorStorageMetadata(
                TensorProperties(dtype=torch.bfloat16, memory_format=torch.channels_last),
                torch.Size([4, 2]),
                [ChunkStorageMetadata(torch.Size([at, 0]), torch.Size([2, 2])) for at in (0, 2)],
            ),
            "b": BytesStorageMetadata(),
        },
        "planner_data": {"w": ("w", 0), "b": ("b",)},
        "storage_data": {
            MetadataIndex("w", torch.Size([0, 0]), 0): _StorageInfo("__0_0.distcp", 0, 10, ["zstd"]),
            MetadataIndex("b"): _StorageInfo("sub/__1_0.distcp", 10, 5),
        },
        "storage_meta": StorageMeta("/somewhere", "s", "l", ["m"]),
        "version": "1.0.0",
    }
    return Metadata(**{**fields, **changes})  # type: ignore[arg-type]


class ByName(pickle.Pickler):
    """Writes members of enumerations as Python 3.11.0 to 3.11.3 does: as attributes, or whatever is given instead."""

    instead: tuple[object, ...] | None = None

    def reducer_override(self, value: object) -> object:
        if isinstance(value, _MEM_FORMAT_ENCODING):
            return getattr, self.instead or (type(value), value.name)
        return NotImplemented


def by_name(metadata: Metadata, protocol: int, instead: tuple[object, ...] | None = None) -> bytes:
    stream = io.BytesIO()
    pickler = ByName(stream, protocol)
    pickler.instead = instead
    pickler.dump(metadata)
    return stream.getvalue()


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_members_that_are_pickled_by_name_come_back(protocol: int) -> None:
    data = by_name(sample(), protocol)
    assert b"getattr" in data
    assert parse_dcp_metadata(data, "p") == sample()


@pytest.mark.parametrize("protocol", [2, 5])
@pytest.mark.parametrize(
    "instead",
    [
        (Metadata, "__init__"),
        (torch.Size, "numel"),
        (_MEM_FORMAT_ENCODING, 0),
        ("TORCH_CHANNELS_LAST", "upper"),
        (_MEM_FORMAT_ENCODING, "TORCH_CHANNELS_LAST", None),
    ],
)
def test_no_other_attribute_is_asked_for(instead: tuple[object, ...], protocol: int) -> None:
    with pytest.raises(UnsafePickleError, match="getattr"):
        parse_dcp_metadata(by_name(sample(), protocol, instead), "p")


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_getattr_itself_is_no_value(protocol: int) -> None:
    metadata = sample(planner_data={"w": getattr})
    for data in (pickle.dumps(metadata, protocol), by_name(metadata, protocol)):
        with pytest.raises(UnsafePickleError, match="getattr"):
            parse_dcp_metadata(data, "p")


@pytest.mark.parametrize("name", ["__class__", "TORCH_NOTHING", "mro"])
def test_an_unknown_member_is_an_error(name: str) -> None:
    with pytest.raises(FormatError, match="memory format"):
        parse_dcp_metadata(by_name(sample(), 2, (_MEM_FORMAT_ENCODING, name)), "p")


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_field_comes_back(protocol: int) -> None:
    for metadata in (sample(), sample(storage_meta=None, planner_data=None, storage_data=None, version=None)):
        assert parse_dcp_metadata(pickle.dumps(metadata, protocol), "p") == metadata


def storage(path: object, offset: object = 0, length: object = 1) -> Metadata:
    info = _StorageInfo(path, offset, length)  # type: ignore[arg-type]
    return sample(storage_data={MetadataIndex("w", [0, 0]): info})


def tensor(size: object, offsets: object = (0,), sizes: object = (1,), properties: object = None) -> Metadata:
    chunk = ChunkStorageMetadata(offsets, sizes)  # type: ignore[arg-type]
    return sample(
        state_dict_metadata={"w": TensorStorageMetadata(properties or TensorProperties(), size, [chunk])}  # type: ignore[arg-type]
    )


def looped() -> list[object]:
    items: list[object] = []
    items.append({"a": items})
    return items


def bomb() -> object:
    value: object = ["x"]
    for _ in range(70):
        value = [value, value]
    return value


one = torch.Size([1])
MALFORMED = {
    "absolute path": storage("/etc/passwd"),
    "parent path": storage("../x"),
    "NUL path": storage("a\0b"),
    "path number": storage(1),
    "offset negative": storage("a", -1),
    "offset bool": storage("a", True),
    "length float": storage("a", 0, 1.0),
    "length huge": storage("a", 0, 2**70),
    "size a tuple": tensor((1,)),
    "size negative": tensor(torch.Size([-1]), one, one),
    "chunk outside": tensor(one, one, one),
    "chunk of two dimensions": tensor(one, torch.Size([0, 0]), torch.Size([1, 1])),
    "storage_data a list": sample(storage_data=[]),
    "index a string": sample(storage_data={"w": _StorageInfo("a", 0, 1)}),
    "name a number": sample(state_dict_metadata={1: BytesStorageMetadata()}),
    "items a list": sample(state_dict_metadata=[]),
    "item None": sample(state_dict_metadata={"w": None}),
    "version a number": sample(version=1),
    "planner data of objects": sample(planner_data={"w": BytesStorageMetadata()}),
    "planner data of many levels": sample(planner_data=bomb()),
    "checkpoint id a number": sample(storage_meta=StorageMeta(1)),  # type: ignore[arg-type]
    "modules of numbers": sample(storage_meta=StorageMeta(modules=[1])),  # type: ignore[list-item]
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_metadata(name: str) -> None:
    with pytest.raises(FormatError) as caught:
        parse_dcp_metadata(pickle.dumps(MALFORMED[name]), "p")
    assert caught.value.hint


def test_planner_data_that_contain_themselves_do_no_harm() -> None:
    data = pickle.dumps(sample(planner_data=looped()))
    assert parse_dcp_metadata(data, "p").version == "1.0.0"


def test_absent_metadata(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match=r"\.metadata"):
        read_dcp_metadata(tmp_path)


VALID = pickle.dumps(sample())


@given(st.binary(max_size=60))
def test_random_bytes_raise_only_typed_errors(data: bytes) -> None:
    with pytest.raises(FormatError):
        parse_dcp_metadata(b"\x80\x04" + data, "p")


@given(st.lists(st.tuples(st.integers(0, len(VALID) - 1), st.integers(0, 255)), min_size=1, max_size=4))
def test_mutated_metadata_raise_only_typed_errors(changes: list[tuple[int, int]]) -> None:
    data = bytearray(VALID)
    for position, value in changes:
        data[position] = value
    try:
        assert isinstance(parse_dcp_metadata(bytes(data), "p"), Metadata)
    except FormatError as error:
        assert error.hint  # noqa: PT017


def test_equal_files_are_parsed_once_and_a_changed_one_again(tmp_path: Path) -> None:
    path = tmp_path / ".metadata"
    path.write_bytes(pickle.dumps(sample()))
    first = read_dcp_metadata(path)
    with parsed_once():
        inside = read_dcp_metadata(path)
        assert inside is not first
        assert read_dcp_metadata(tmp_path) is inside
        path.write_bytes(pickle.dumps(sample(version="another")))
        assert read_dcp_metadata(path).version == "another"
    assert read_dcp_metadata(path) is not read_dcp_metadata(path)
