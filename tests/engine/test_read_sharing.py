"""Passing on by property: whatever is spread however over whatever mesh comes out as if each rank had read it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.sources.test_reader import strided
from tests.support.memory import MemoryStorage
from tests.support.simulate import Simulation, ThreadGroup, in_threads, raw, simulations

from shardwise.disk.storage import LocalStorage, file_system_type
from shardwise.dtypes import torch_dtype
from shardwise.engine import sharing
from shardwise.engine.sharing import Made, PlannedReads, Replicas, Wanted, cut_read, is_remote
from shardwise.errors import StorageError
from shardwise.geometry import Box, TensorSpec
from shardwise.plan.fragments import HeldTensor
from shardwise.plan.reads import Read, SourceChunk, SourceTensor
from shardwise.sources.reader import Reader


@pytest.fixture(autouse=True, scope="module")
def small() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sharing, "ROUND_BYTES", 256)
        patched.setattr(sharing, "LARGEST_SHARE", 64)
        patched.setattr(sharing, "SMALLEST_SHARE", 16)
        patched.setattr(sharing, "ALONE_BYTES", 24)
        yield


FILE = Path("/f")


def saved(case: Simulation) -> tuple[bytes, list[SourceTensor]]:
    """The tensors of a case one behind the other."""
    data, sources = b"", []
    for tensor, whole in zip(case.tensors, case.wholes, strict=True):
        chunk = SourceChunk(Box.whole(tensor.spec.shape), 0, len(data))
        sources.append(SourceTensor(tensor.spec, (chunk,)))
        data += raw(whole)
    return data, sources


def load(case: Simulation, storages: list[MemoryStorage], shares: bool) -> list[tuple[list[HeldTensor], Reader]]:
    """Every rank's tensors, filled, and what it read."""
    _, sources = saved(case)

    def one(group: ThreadGroup) -> tuple[list[HeldTensor], Reader, Exception | None]:
        held = case.held(group.rank, empty=True)
        replicas = Replicas(case.roster, group.rank) if shares else None
        planned = PlannedReads()
        for source, tensor in zip(sources, held, strict=True):
            planned.add(source, tensor, replicas)
        reader = Reader(storages[group.rank], [FILE])
        failure: Exception | None = None
        try:
            planned.execute(reader, group)
        except StorageError as error:
            failure = error
        reader.close()
        return held, reader, failure

    found = in_threads(case.world, one)
    for rank, storage in enumerate(storages):
        assert (found[rank][2] is not None) == (storage.fail is not None and ("read", "f") in storage.log)
    return [(held, reader) for held, reader, _ in found]


def storages_of(case: Simulation) -> list[MemoryStorage]:
    data, _ = saved(case)
    return [MemoryStorage({FILE: bytearray(data)}) for _ in range(case.world)]


@settings(max_examples=50)
@given(simulations())
def test_replicas_get_the_same_and_read_it_once(case: Simulation) -> None:
    found = load(case, storages_of(case), shares=True)
    for rank, (held, _) in enumerate(found):
        for tensor, expected in zip(held, case.held(rank), strict=True):
            for got, want in zip(tensor.fragments, expected.fragments, strict=True):
                assert raw(got.data) == raw(want.data), tensor.spec
    data, _ = saved(case)
    assert sum(reader.counts.wanted for _, reader in found) == len(data)
    held_bytes = sum(f.box.numel * t.spec.itemsize for held, _ in found for t in held for f in t.fragments)
    alone = load(case, storages_of(case), shares=False)
    assert sum(reader.counts.wanted for _, reader in alone) == held_bytes
    assert all(reader.counts.passed == 0 for _, reader in alone)
    assert sum(reader.counts.passed for _, reader in found) >= held_bytes - len(data)


@settings(max_examples=50)
@given(simulations(), st.data())
def test_a_rank_that_cannot_read_keeps_nobody_waiting(case: Simulation, data: st.DataObject) -> None:
    storages = storages_of(case)
    storages[data.draw(st.integers(0, case.world - 1))].fail = "read"
    load(case, storages, shares=True)  # which would not end, or leave messages that nobody took


class Refusing(torch.Tensor):
    """Memory that is not to be had when it is wanted, though enough of it was there before."""

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., object], types: object, args: tuple[object, ...] = (), kwargs: object = None
    ) -> object:
        if func is torch.Tensor.detach:
            raise RuntimeError("out of memory")
        return super().__torch_function__(func, types, args, kwargs)  # type: ignore[arg-type]


@pytest.mark.parametrize("refusing", [0, 1, 2])
@pytest.mark.parametrize("sizes", [(24,), (24, 2, 2), (2, 40, 100, 8, 0), (8,) * 9])
def test_a_rank_without_memory_keeps_nobody_waiting(refusing: int, sizes: tuple[int, ...]) -> None:
    """Pieces above and below what travels alone, on a rank that finds no memory for one of them."""

    def one(group: ThreadGroup) -> Exception | None:
        own = [torch.zeros(size) for size in sizes]
        if group.rank == refusing:
            own = [memory.as_subclass(Refusing) for memory in own]

        def pieces(most: int) -> Iterator[Made]:
            for memory in own:
                yield Made(memory, lambda dest, reader: None)

        planned = PlannedReads(shared={(0, 1, 2): Wanted(made=[pieces])})
        with contextlib.closing(Reader(MemoryStorage({}), [FILE])) as reader:
            try:
                planned.execute(reader, group)
            except RuntimeError as error:
                return error
        return None

    found = in_threads(3, one)  # which would not end, or leave messages that nobody took
    assert [str(error) for error in found if error is not None] == ["out of memory"]
    assert found[refusing] is not None


@given(st.data(), st.integers(1, 64))
def test_cut_reads_do_what_the_whole_does(data: st.DataObject, most: int) -> None:
    dtype = data.draw(st.sampled_from(["U8", "I16", "F32"]))
    item = torch_dtype(dtype).itemsize
    most = max(most, item)
    rows = data.draw(st.integers(1, 6))
    inner = tuple(data.draw(st.lists(st.integers(1, 5), max_size=3)))
    dest = strided(data, Box.whole((rows, *inner)), torch_dtype(dtype))
    width = dest[0].numel() * item
    period = width + item * data.draw(st.integers(0, 4)) if rows > 1 else width
    storage = MemoryStorage({FILE: bytearray(i % 251 for i in range((rows * period) + 3 * item))})
    read = Read(0, 3 * item, rows, period, width, dest, TensorSpec("t", tuple(dest.shape), dtype))
    reader = Reader(storage, [FILE])
    reader.execute([read])
    expected = raw(dest)
    dest.zero_()
    pieces = list(cut_read(read, most))
    assert all(piece.rows * piece.width <= most for piece in pieces)
    assert sum(piece.rows * piece.width for piece in pieces) == rows * width
    reader.execute(pieces)
    assert raw(dest) == expected


class Elsewhere(LocalStorage):
    def is_remote(self, path: Path) -> bool:
        return "far" in path.name


@pytest.mark.parametrize(
    ("mounted", "remote"),
    [
        ("nfs4", True),
        ("lustre", True),
        ("gpfs", True),
        ("ceph", True),
        ("fuse.s3fs", True),
        ("fuse.juicefs", True),
        ("ext4", False),
        ("xfs", False),
        ("tmpfs", False),
        ("overlay", False),
        ("fuseblk", False),
        ("fuse.fuse-overlayfs", False),
        ("", False),
    ],
)
def test_what_is_far_away(mounted: str, remote: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # The system's list of mounts is all that stands between a path and its kind.
    line = f"1 1 0:1 / / rw - {mounted} none rw\n" if mounted else ""
    mounts = tmp_path / "mountinfo"
    mounts.write_text(line)
    real = open

    def opened(path: object, *args: object, **settings: object) -> object:
        return real(mounts if path == "/proc/self/mountinfo" else path, *args, **settings)  # type: ignore[call-overload]

    monkeypatch.setattr("builtins.open", opened)
    assert file_system_type(tmp_path) == mounted
    assert is_remote(LocalStorage(), tmp_path) == remote


def test_a_storage_may_know_better() -> None:
    assert is_remote(Elsewhere(), Path("/far"))
    assert not is_remote(Elsewhere(), Path("/near"))


def test_other_devices_and_dtypes_are_converted_by_each_rank() -> None:
    """A bfloat16 file into float32 memory with gaps: what travels is the file's bytes."""
    whole = torch.randn(8, 12).to(torch.bfloat16)
    storage = MemoryStorage({FILE: bytearray(raw(whole))})
    spec = TensorSpec("w", (8, 12), "BF16")

    def one(group: ThreadGroup) -> tuple[torch.Tensor, int]:
        wide = torch.zeros(12, 9)
        dest = wide[:, :8].t() if group.rank else torch.zeros(8, 12)
        planned = PlannedReads(shared={(0, 1, 2): Wanted([Read(0, 0, 1, 192, 192, dest.unsqueeze(0), spec)])})
        reader = Reader(storage, [FILE])
        planned.execute(reader, group)
        with contextlib.closing(reader):
            return dest, reader.counts.read

    found = in_threads(3, one)
    assert all(torch.equal(dest, whole.float()) for dest, _ in found)
    assert sum(read for _, read in found) == 192
