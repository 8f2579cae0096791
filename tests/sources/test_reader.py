"""Reading by property: random chunks and random fragments in random grids come together exactly."""

from __future__ import annotations

import itertools
import math
import os
import pickle
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given
from hypothesis import strategies as st
from tests.support.memory import MemoryStorage, RowsStorage
from tests.support.simulate import DTYPES, raw, values

from shardwise.comm import Group
from shardwise.disk.storage import LocalStorage
from shardwise.dtypes import torch_dtype
from shardwise.errors import CheckpointNotFoundError, FormatError, IntegrityError, MisuseError, StorageError
from shardwise.geometry import Box, TensorSpec
from shardwise.plan.fragments import Fragment, HeldPart, HeldTensor, Part
from shardwise.plan.reads import Read, SourceChunk, SourceTensor, plan_reads
from shardwise.sources.reader import SMALL_GAP_BYTES, Reader
from shardwise.sources.sources import open_source


def cut_up(data: st.DataObject, box: Box) -> list[Box]:
    """Random disjoint boxes that tile a box."""
    dims = [d for d, n in enumerate(box.sizes) if n > 1]
    if not dims or not data.draw(st.booleans()):
        return [box]
    dim = data.draw(st.sampled_from(dims))
    at = data.draw(st.integers(1, box.sizes[dim] - 1))
    low = Box(box.offsets, (*box.sizes[:dim], at, *box.sizes[dim + 1 :]))
    offsets = (*box.offsets[:dim], box.offsets[dim] + at, *box.offsets[dim + 1 :])
    high = Box(offsets, (*box.sizes[:dim], box.sizes[dim] - at, *box.sizes[dim + 1 :]))
    return cut_up(data, low) + cut_up(data, high)


def part_of(whole: torch.Tensor, box: Box) -> torch.Tensor:
    return whole[tuple(slice(o, e) for o, e in zip(box.offsets, box.ends, strict=True))]


def strided(data: st.DataObject, box: Box, dtype: torch.dtype) -> torch.Tensor:
    """Zeros of the box's shape, contiguous or with random strides."""
    if not data.draw(st.booleans()):
        return torch.zeros(box.sizes, dtype=dtype)
    order = data.draw(st.permutations(range(len(box.sizes))))
    wide = torch.zeros([box.sizes[d] + data.draw(st.integers(0, 2)) for d in order], dtype=dtype)
    narrow = wide[tuple(slice(0, box.sizes[d]) for d in order)]
    return narrow.permute([order.index(d) for d in range(len(order))])


@given(st.data(), st.sampled_from(DTYPES), st.sampled_from([1, 3]))
def test_any_chunks_fill_any_fragments(data: st.DataObject, dtype: str, threads: int) -> None:
    factors = [
        tuple(data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
        for _ in range(data.draw(st.integers(0, 3)))
    ]
    shape = tuple(math.prod(f) for f in factors)
    refined = data.draw(st.booleans())
    grid = tuple(n for f in factors for n in f) if refined else shape
    spec = TensorSpec("w", shape, dtype)
    whole = values(spec, data.draw(st.integers(0, 9)))
    storage: MemoryStorage = MemoryStorage()
    if data.draw(st.booleans()):
        storage = RowsStorage()
    chunks = []
    for number, box in enumerate(cut_up(data, Box.whole(shape))):
        pad = data.draw(st.integers(0, 5))
        storage.files[Path(f"/f{number}")] = bytearray(b"x" * pad + raw(part_of(whole, box)) + b"y")
        chunks.append(SourceChunk(box, number, pad))
    boxes = cut_up(data, Box.whole(grid))
    into = torch_dtype(dtype)
    fragments = tuple(Fragment(box, strided(data, box, into)) for box in boxes)
    wanted = HeldTensor(spec, grid, (HeldPart(Part(shape), (), fragments),))
    reader = Reader(storage, list(storage.files), threads)
    reader.execute(list(plan_reads(SourceTensor(spec, tuple(chunks)), wanted)))
    reader.close()
    assert storage.open_handles == 0
    for fragment in fragments:
        assert raw(fragment.data) == raw(part_of(whole.reshape(grid), fragment.box))
    assert reader.counts.wanted == spec.nbytes


@given(st.sampled_from(["F32", "BF16", "F16", "F8_E4M3", "I64"]), st.sampled_from(["F32", "BF16", "F64"]))
def test_values_are_cast_as_torch_casts(saved: str, dtype: str) -> None:
    spec = TensorSpec("w", (5, 7), saved)
    whole = torch.randn(5, 7).mul(4).to(torch_dtype(saved))
    storage = MemoryStorage({Path("/f"): bytearray(raw(whole))})
    for box in (Box.whole((5, 7)), Box((1, 2), (3, 4))):
        fragment = Fragment(box, torch.zeros(box.sizes, dtype=torch_dtype(dtype)))
        wanted = HeldTensor(spec, spec.shape, (HeldPart(Part(spec.shape), (), (fragment,)),))
        reader = Reader(storage, [Path("/f")])
        reader.execute(list(plan_reads(SourceTensor(spec, (SourceChunk(Box.whole((5, 7)), 0, 0),)), wanted)))
        assert torch.equal(fragment.data, part_of(whole, box).to(torch_dtype(dtype)))


@pytest.mark.parametrize("storage_class", [MemoryStorage, RowsStorage])
@pytest.mark.parametrize("threads", [1, 4])
def test_large_tensors_pass_in_pieces(threads: int, storage_class: type[MemoryStorage]) -> None:
    spec = TensorSpec("w", (3000, 2000), "F32")  # 24 MB: more than a buffer, more than one thread's share
    whole = torch.arange(3000 * 2000, dtype=torch.int32).view(torch.float32).reshape(3000, 2000)
    storage = storage_class({Path("/f"): bytearray(raw(whole))})
    source = SourceTensor(spec, (SourceChunk(Box.whole(spec.shape), 0, 0),))
    for box, memory in (
        (Box.whole(spec.shape), torch.zeros(3000, 2000)),
        (Box.whole(spec.shape), torch.zeros(2000, 3000).t()),
        (Box((0, 100), (3000, 1500)), torch.zeros(3000, 1500)),
        (Box((0, 100), (3000, 50)), torch.zeros(3000, 50)),
    ):
        seen: list[int] = []
        reader = Reader(storage, [Path("/f")], threads, observe=lambda file, at, n, seen=seen: seen.append(n))  # type: ignore[misc]
        fragment = Fragment(box, memory)
        wanted = HeldTensor(spec, spec.shape, (HeldPart(Part(spec.shape), (), (fragment,)),))
        reader.execute(list(plan_reads(source, wanted)))
        assert raw(memory) == raw(part_of(whole, box))
        assert sum(seen) == reader.counts.read
        assert reader.counts.wanted == memory.nbytes
        assert reader.counts.read <= memory.nbytes + 3000 * SMALL_GAP_BYTES


def read_of(width: int, rows: int, period: int) -> Read:
    spec = TensorSpec("layers.0.w", (rows, period), "U8")
    return Read(0, 0, rows, period, width, torch.zeros(rows, width, dtype=torch.uint8), spec)


def test_wide_gaps_are_not_read() -> None:
    period = 10 * SMALL_GAP_BYTES
    storage = MemoryStorage({Path("/f"): bytearray(range(256)) * (period * 5 // 256)})
    reader = Reader(storage, [Path("/f")])
    read = read_of(16, 5, period)
    reader.execute([read])
    assert reader.counts.read == reader.counts.wanted == 80
    assert read.dest.tolist() == [[(row * period + i) % 256 for i in range(16)] for row in range(5)]


def test_a_file_that_ends_early_is_an_error_with_file_and_tensor() -> None:
    storage = MemoryStorage({Path("/some/f"): bytearray(99)})
    with pytest.raises(IntegrityError, match="ends 1 bytes before") as found:
        Reader(storage, [Path("/some/f")]).execute([read_of(100, 1, 100)])
    assert (found.value.path, found.value.tensor) == ("/some/f", "layers.0.w")


@pytest.mark.parametrize("threads", [1, 2])
def test_a_failing_device_is_an_error_with_file_and_tensor(threads: int) -> None:
    storage = MemoryStorage({Path("/some/f"): bytearray(500)}, fail="read")
    with pytest.raises(StorageError) as found:
        Reader(storage, [Path("/some/f")], threads).execute([read_of(100, 1, 100), read_of(50, 1, 50)])
    assert (found.value.path, found.value.tensor) == ("/some/f", "layers.0.w")


def test_a_file_that_has_gone_is_an_error() -> None:
    with pytest.raises(CheckpointNotFoundError) as found:
        Reader(MemoryStorage(), [Path("/some/f")]).execute([read_of(100, 1, 100)])
    assert found.value.path == "/some/f"


def columns(path: Path, rows: int, width: int, dtype: torch.dtype, offset: int) -> Read:
    """The second half of every row of a matrix in a real file, in which it stands at ``offset``."""
    whole = torch.arange(rows * width).remainder(251).to(dtype).reshape(rows, width)
    path.write_bytes(bytes(offset) + raw(whole))
    item, spec = dtype.itemsize, TensorSpec("w", (rows, width), {4: "F32", 2: "BF16", 1: "U8"}[dtype.itemsize])
    half = width // 2
    dest = torch.zeros(rows, width - half, dtype=dtype)
    return Read(0, offset + half * item, rows, width * item, (width - half) * item, dest, spec)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("offset", [0, 8, 4096, 4104, 13])
def test_columns_of_a_real_file(tmp_path: Path, dtype: torch.dtype, offset: int) -> None:
    # 24 MB in float32: more than one window. An odd offset cannot be a tensor of wider elements in place.
    read = columns(tmp_path / "f", 6000, 1001, dtype, offset)
    reader = Reader(LocalStorage(), [tmp_path / "f"])
    reader.execute([read])
    reader.close()
    expected = torch.arange(6000 * 1001).remainder(251).to(dtype).reshape(6000, 1001)[:, 500:]
    assert torch.equal(read.dest, expected)


def test_columns_of_a_truncated_file_are_an_error_and_not_a_signal(tmp_path: Path) -> None:
    read = columns(tmp_path / "f", 6000, 1000, torch.float32, 0)
    os.truncate(tmp_path / "f", 20_000_001)
    reader = Reader(LocalStorage(), [tmp_path / "f"])
    with pytest.raises(IntegrityError, match="ends within row 5000 of the 6000") as found:
        reader.execute([read])
    reader.close()
    assert (found.value.path, found.value.tensor) == (str(tmp_path / "f"), "w")


@given(
    rows=st.integers(1, 1200),
    width=st.integers(1, 40),
    gap=st.integers(0, 40),
    pad=st.integers(0, 9),
    cut=st.booleans(),
)
def test_rows_of_a_real_file_go_to_their_places_and_nowhere_else(
    rows: int, width: int, gap: int, pad: int, cut: bool
) -> None:
    # More rows than one call of the system takes places for (1,024 on Linux).
    period, pitch, offset = width + gap, width + pad, 5
    content = bytes((7 * i + i // 256) % 251 for i in range(offset + (rows - 1) * period + width))
    into = bytearray(b"\xff") * ((rows - 1) * pitch + width)
    with tempfile.NamedTemporaryFile() as file:
        file.write(content[:-1] if cut else content)
        file.flush()
        storage = LocalStorage()
        handle = storage.open(Path(file.name), writable=False)
        got = storage.read_rows(handle, memoryview(into), rows, width, pitch, period, offset)
        storage.close(handle)
    assert got == (rows - 1 if cut else rows)
    for row in range(got):
        start = offset + row * period
        assert into[row * pitch : row * pitch + width] == content[start : start + width]
        assert into[row * pitch + width : (row + 1) * pitch] in (b"\xff" * pad, b"")


def test_rows_that_do_not_fit_the_memory_are_refused(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(bytes(100))
    storage = LocalStorage()
    handle = storage.open(tmp_path / "f", writable=False)
    for into, width, pitch, period in ((29, 10, 10, 20), (30, 10, 9, 20), (30, 10, 10, 9)):
        with pytest.raises(ValueError, match="do not fit"):
            storage.read_rows(handle, memoryview(bytearray(into)), 3, width, pitch, period, 0)
    with pytest.raises(ValueError, match="read-only"):
        storage.read_rows(handle, memoryview(bytes(30)), 3, 10, 10, 20, 0)
    storage.close(handle)
    with pytest.raises(StorageError):
        storage.read_rows(handle, memoryview(bytearray(30)), 3, 10, 10, 20, 0)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_column_ranges_of_the_same_rows_are_read_once(threads: int, dtype: torch.dtype, tmp_path: Path) -> None:
    """A packed placement along columns: each row of the file has a part of several fragments."""
    rows, columns = 9000, 300  # more rows than fit into a buffer
    whole = torch.arange(rows * columns, dtype=torch.float32).view(rows, columns)
    path = tmp_path / "data"
    path.write_bytes(bytes(64) + whole.numpy().tobytes())
    spec = TensorSpec("w", (rows, columns), "F32")
    source = SourceTensor(spec, (SourceChunk(Box.whole(spec.shape), 0, 64),))
    boxes = [Box((0, 10), (rows, 40)), Box((0, 110), (rows, 45)), Box((0, 299), (rows, 1))]
    fragments = tuple(Fragment(box, torch.zeros(box.sizes, dtype=dtype)) for box in boxes)
    ranges: list[tuple[int, int]] = []
    reader = Reader(LocalStorage(), [path], threads, lambda _, offset, length: ranges.append((offset, offset + length)))
    reader.execute(list(plan_reads(source, HeldTensor(spec, spec.shape, (HeldPart(Part(spec.shape), (), fragments),)))))
    reader.close()
    for box, fragment in zip(boxes, fragments, strict=True):
        assert torch.equal(fragment.data, part_of(whole, box).to(dtype))
    assert reader.counts.wanted == sum(box.numel for box in boxes) * 4
    ranges.sort()
    assert len(ranges) > 1
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(ranges))


@pytest.mark.parametrize(("shape", "dtype"), [((3, 2), torch.float32), ((2, 3), torch.int32)])
def test_an_item_of_dcp_that_is_another_tensor_is_refused(
    shape: tuple[int, ...], dtype: torch.dtype, tmp_path: Path
) -> None:
    dcp.save({"weight": torch.ones(2, 3)}, checkpoint_id=str(tmp_path / "said"))
    dcp.save({"weight": torch.ones(shape, dtype=dtype)}, checkpoint_id=str(tmp_path / "there"))
    (tmp_path / "said" / ".metadata").rename(tmp_path / "there" / ".metadata")
    source = open_source(tmp_path / "there", Group(None))
    into = torch.zeros(2, 3)
    whole = (Fragment(Box.whole((2, 3)), into),)
    wanted = HeldTensor(source.tensors["weight"].spec, (2, 3), (HeldPart(Part((2, 3)), (), whole),))
    reader = Reader(LocalStorage(), source.files)
    with pytest.raises(FormatError, match="metadata says"):
        reader.execute(plan_reads(source.tensors["weight"], wanted))
    reader.close()
    assert not into.any()


def test_a_tensor_that_dcp_compressed_is_refused_by_name(tmp_path: Path) -> None:
    dcp.save({"weight": torch.ones(2, 3)}, checkpoint_id=str(tmp_path))
    metadata = dcp.FileSystemReader(tmp_path).read_metadata()
    for index, info in metadata.storage_data.items():
        metadata.storage_data[index] = replace(info, transform_descriptors=["stream.zstd"])
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(MisuseError, match=r"through stream\.zstd") as caught:
        open_source(tmp_path, Group(None))
    assert caught.value.tensor == "weight"
