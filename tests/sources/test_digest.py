"""Digests by property: contributions add up to the digest of the whole, however it is cut."""

from __future__ import annotations

import functools
import operator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.sources.test_reader import cut_up, part_of
from tests.support.memory import MemoryStorage
from tests.support.simulate import DTYPES, raw, values

from shardwise.disk.crc import crc32c
from shardwise.engine.writer import Digests, FileSet, totals, write_all
from shardwise.errors import StorageError
from shardwise.geometry import Box, TensorSpec, runs
from shardwise.plan.schedule import WriteRun
from shardwise.sources.tensor_bytes import as_bytes, blocks, byte_blocks, contribution

shapes = st.lists(st.integers(1, 7), max_size=4).map(tuple)


@given(st.data(), shapes, st.sampled_from(DTYPES))
def test_contributions_of_boxes_make_up_the_digest(data: st.DataObject, shape: tuple[int, ...], dtype: str) -> None:
    whole = values(TensorSpec("w", shape, dtype))
    boxes = cut_up(data, Box.whole(shape))
    parts = [part_of(whole, box) for box in boxes]
    shares = [contribution(b, shape, p, crc32c(raw(p))) for b, p in zip(boxes, parts, strict=True)]
    assert functools.reduce(operator.xor, shares) == crc32c(raw(whole))


@pytest.mark.parametrize(
    ("shape", "box"), [((3000, 700), Box((0, 100), (3000, 333))), ((70, 50, 9), Box((3, 1, 2), (64, 47, 5)))]
)
def test_a_large_column_shard(shape: tuple[int, ...], box: Box) -> None:
    whole = values(TensorSpec("w", shape, "BF16"))
    rest = whole.clone()
    part_of(rest, box).zero_()
    only = torch.zeros_like(whole)
    part_of(only, box).copy_(part_of(whole, box))
    part = part_of(whole, box)
    # A piece contributes what it does among zeros, but for the digest of the zeros themselves.
    zeros = crc32c(bytes(whole.nbytes))
    assert contribution(box, shape, part, crc32c(raw(part))) == crc32c(raw(only)) ^ zeros ^ _zeros_in(box, shape, 2)


def _zeros_in(box: Box, shape: tuple[int, ...], itemsize: int) -> int:
    """What the box would contribute if it were zero."""
    part = torch.zeros(box.sizes, dtype=torch.int16)
    return contribution(box, shape, part, crc32c(raw(part)))


@given(st.data(), shapes, st.sampled_from(DTYPES), st.sampled_from([1, 3]))
def test_written_runs_make_up_the_file_and_the_digest(
    data: st.DataObject, shape: tuple[int, ...], dtype: str, threads: int
) -> None:
    spec = TensorSpec("w", shape, dtype)
    whole = values(spec)
    todo = []
    for box in cut_up(data, Box.whole(shape)):
        for first, _, index in runs(box, shape):
            start = first * spec.itemsize
            todo.append(WriteRun(0, 10 + start, spec, start, part_of(whole, box)[index]))
    storage = MemoryStorage({Path("/f"): bytearray(10 + spec.nbytes)})
    files, digests = FileSet(storage, [Path("/f")]), Digests()
    write_all(todo, files, storage, threads, digests)
    files.sync()
    files.close()
    assert bytes(storage.files[Path("/f")][10:]) == raw(whole)
    assert totals(["w", "other"], digests) == ([crc32c(raw(whole)), 0], [spec.nbytes, 0])
    assert storage.open_handles == 0
    assert [entry for entry in storage.log if entry[0] == "sync"] == [("sync", "f")]


def test_a_run_larger_than_one_thread_takes_is_cut() -> None:
    spec = TensorSpec("w", (3, 10_000_000), "U8")
    whole = torch.arange(30_000_000).to(torch.uint8).view(3, 10_000_000)
    big = whole.repeat(3, 1)
    spec = TensorSpec("w", (9, 10_000_000), "U8")
    storage = MemoryStorage({Path("/f"): bytearray(spec.nbytes)})
    files, digests = FileSet(storage, [Path("/f")]), Digests()
    write_all([WriteRun(0, 0, spec, 0, big)], files, storage, 2, digests)
    assert storage.files[Path("/f")] == raw(big)
    assert digests.crcs == {"w": crc32c(raw(big))}


@pytest.mark.parametrize("operation", ["open", "write", "sync", "close"])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_full_disk_is_an_error_that_names_the_file(operation: str, threads: int) -> None:
    spec = TensorSpec("w", (4, 4), "F32")
    todo = [WriteRun(0, 16 * row, spec, 16 * row, torch.zeros(4)) for row in range(4)]
    storage = MemoryStorage({Path("/d/f"): bytearray(64)}, fail=operation)
    files = FileSet(storage, [Path("/d/f")])

    def save() -> None:
        try:
            write_all(todo, files, storage, threads, Digests())
            files.sync()
        finally:
            files.close()

    with pytest.raises(StorageError, match="No space left") as found:
        save()
    if operation != "open":  # opening is told the path by the storage itself
        assert found.value.path == "/d/f"
    assert found.value.tensor == ("w" if operation == "write" else None)
    assert storage.open_handles == 0


@given(st.data(), shapes.filter(len), st.integers(1, 50))
def test_blocks_are_the_tensor_in_order(data: st.DataObject, shape: tuple[int, ...], most: int) -> None:
    order = data.draw(st.permutations(range(len(shape))))
    tensor = torch.arange(Box.whole(shape).numel).reshape(shape).permute(order)
    found = list(blocks(tensor, most))
    assert torch.cat([block.reshape(-1) for block in found]).tolist() == tensor.reshape(-1).tolist()
    assert all(0 < block.numel() <= most for block in found)


@given(shapes, st.sampled_from(["F32", "BF16"]), st.integers(8, 64), st.booleans())
def test_byte_blocks_cast_on_the_way(shape: tuple[int, ...], dtype: str, most: int, turned: bool) -> None:
    from shardwise.dtypes import torch_dtype

    tensor = torch.randn(shape)
    tensor = tensor.transpose(0, -1) if turned and tensor.dim() else tensor
    found = [bytes(block) for block in byte_blocks(tensor, torch_dtype(dtype), most)]
    assert b"".join(found) == raw(tensor.to(torch_dtype(dtype)))
    assert all(len(block) <= most for block in found)


def test_bytes_of_a_tensor_are_its_memory() -> None:
    tensor = torch.zeros(3, dtype=torch.int16)
    as_bytes(tensor)[:2] = b"\x01\x00"
    assert tensor.tolist() == [1, 0, 0]
    assert as_bytes(torch.zeros(0)) == b""
    assert list(byte_blocks(torch.tensor(True), torch.bool)) == [b"\x01"]
    conjugate = torch.tensor([1 + 2j]).conj()
    assert b"".join(byte_blocks(conjugate, torch.complex64)) == raw(torch.tensor([1 - 2j]))
