"""Loads of shards by several ranks: rows that lie as they are held, or not, or are not there, or are there twice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tests.support.ranks import failure, run

from shardwise.comm import Group
from shardwise.disk.storage import LocalStorage
from shardwise.engine.load import LoadOptions, LoadSource, open_load
from shardwise.errors import (
    DtypeMismatchError,
    ShapeMismatchError,
    TensorError,
    UnexpectedTensorError,
)
from shardwise.format.header import encode_sharding_metadata
from shardwise.geometry import Box, TensorSpec
from shardwise.plan.fragments import Fragment, HeldPart, HeldTensor, Part
from shardwise.sources.sources import open_source

Rows = dict[str, tuple[int, int]]  # tensor -> first row and number of rows


@dataclass(frozen=True)
class Layout:
    """Shapes of tensors, and which rows of each a rank has."""

    shapes: dict[str, tuple[int, ...]]
    ranks: Sequence[Rows]


SHAPES = {"a": (5, 3), "b": (1,), "c": (6,), "d": (2, 2, 2)}
#: Uneven rows, a tensor that one rank alone has rows of, ranks without rows of some tensors or of all.
EVEN = Layout(
    SHAPES,
    [
        {"a": (0, 2), "b": (0, 1), "c": (0, 3), "d": (0, 1)},
        {"a": (2, 2), "b": (1, 0), "c": (3, 3), "d": (1, 1)},
        {"a": (4, 1), "b": (1, 0), "c": (6, 0), "d": (2, 0)},
        {"a": (5, 0), "b": (1, 0), "c": (6, 0), "d": (2, 0)},
    ],
)


def whole(layout: Layout, name: str) -> torch.Tensor:
    shape = layout.shapes[name]
    return torch.arange(float(torch.Size(shape).numel())).view(shape) + 100 * sorted(layout.shapes).index(name)


def write(directory: Path, layout: Layout, *, empty: bool = False) -> None:
    """A file for each rank; with ``empty`` also pieces without rows stand in it."""
    for number, rows in enumerate(layout.ranks, start=1):
        own = {name: each for name, each in rows.items() if each[1] or empty}
        tensors = {name: whole(layout, name).narrow(0, *each).clone() for name, each in own.items()}
        offsets = {name: (each[0], *(0,) * (len(layout.shapes[name]) - 1)) for name, each in own.items()}
        path = directory / f"shard-{number:05d}-model-00001-of-00001.safetensors"
        save_file(tensors, path, encode_sharding_metadata(offsets))


def hold(layout: Layout, rank: int, dtype: torch.dtype = torch.float32) -> dict[str, HeldTensor]:
    codes = {torch.float32: "F32", torch.float64: "F64"}
    found = {}
    for name, (start, rows) in layout.ranks[rank].items():
        spec = TensorSpec(name, layout.shapes[name], codes[dtype])
        box = Box((start, *(0,) * (len(spec.shape) - 1)), (rows, *spec.shape[1:]))
        part = HeldPart(Part(spec.shape), (), (Fragment(box, torch.full(box.sizes, -1.0, dtype=dtype)),))
        found[name] = HeldTensor(spec, spec.shape, (part,))
    return found


def load(directory: Path, layout: Layout, options: LoadOptions, dtype: torch.dtype) -> None:
    """Loads, and checks all values."""
    group = Group.current()
    held = hold(layout, group.rank, dtype)
    source = open_source(directory, group, spread=True)
    open_load(lambda: list(held.values()), LoadSource(source), group, LocalStorage(), options).read()
    for name, tensor in held.items():
        want = whole(layout, name).narrow(0, *layout.ranks[group.rank][name]).to(dtype)
        assert torch.equal(tensor.fragments[0].data, want), name


def loaded(
    directory: Path, layout: Layout, options: LoadOptions | None = None, dtype: torch.dtype = torch.float32
) -> None:
    run(len(layout.ranks), load, directory, layout, options or LoadOptions(), dtype)


@pytest.mark.parametrize("empty", [False, True])
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_the_same_ranks_load_what_they_saved(tmp_path: Path, ranks: int, empty: bool) -> None:
    of_two = [
        {name: (0, shape[0] - 1) for name, shape in SHAPES.items()},
        {n: (s[0] - 1, 1) for n, s in SHAPES.items()},
    ]
    layout = Layout(SHAPES, of_two if ranks == 2 else EVEN.ranks[:ranks])
    write(tmp_path, layout, empty=empty)
    loaded(tmp_path, layout)


def other_rows(layout: Layout) -> Layout:
    return Layout(layout.shapes, [layout.ranks[1], layout.ranks[0], *layout.ranks[2:]])


def one_row_moved(layout: Layout) -> Layout:
    first, second, *others = layout.ranks
    return Layout(layout.shapes, [{**first, "c": (0, 2)}, {**second, "c": (2, 4)}, *others])


def one_more_holder(layout: Layout) -> Layout:
    return Layout(layout.shapes, [*layout.ranks[:3], {"a": (1, 2)}])


def several_ranks_hold_one_row(layout: Layout) -> Layout:
    return Layout(layout.shapes, [layout.ranks[0], {**layout.ranks[1], "b": (0, 1)}, *layout.ranks[2:]])


@pytest.mark.parametrize("change", [other_rows, one_row_moved, one_more_holder, several_ranks_hold_one_row])
def test_ranks_load_other_rows_than_they_saved(tmp_path: Path, change: Callable[[Layout], Layout]) -> None:
    write(tmp_path, EVEN)
    loaded(tmp_path, change(EVEN))


def test_a_cast(tmp_path: Path) -> None:
    write(tmp_path, EVEN)
    loaded(tmp_path, EVEN, LoadOptions(allow_cast=True), torch.float64)


def test_more_files_than_ranks_or_fewer(tmp_path: Path) -> None:
    *others, third, _ = EVEN.ranks
    saved = Layout(SHAPES, [*others, {**third, "a": (4, 0)}, {**third, "a": (4, 1)}])
    write(tmp_path, saved)
    loaded(tmp_path, saved)
    loaded(tmp_path, Layout(SHAPES, EVEN.ranks[:3]))
    loaded(tmp_path, Layout(SHAPES, [{}, *EVEN.ranks[:3]]))
    (tmp_path / "shard-00003-model-00001-of-00001.safetensors").unlink()
    loaded(tmp_path, saved)


def without_rows_of_last(layout: Layout) -> Layout:
    """A model of one row less, which no rank of the first two can see."""
    first, second, third, last = layout.ranks
    return Layout({**layout.shapes, "a": (4, 3)}, [first, second, {**third, "a": (4, 0)}, last])


def without_a_tensor(layout: Layout) -> Layout:
    shapes = {name: shape for name, shape in layout.shapes.items() if name != "b"}
    return Layout(shapes, [{n: r for n, r in rows.items() if n != "b"} for rows in layout.ranks])


def with_one_more(layout: Layout) -> Layout:
    first, *others = layout.ranks
    return Layout({**layout.shapes, "more": (2,)}, [{**first, "more": (0, 2)}, *others])


def with_one_without_elements(layout: Layout) -> Layout:
    return Layout({**layout.shapes, "none": (0, 3)}, [{**rows, "none": (0, 0)} for rows in layout.ranks])


@pytest.mark.parametrize(
    ("change", "dtype", "error", "tensor"),
    [
        (without_rows_of_last, torch.float32, ShapeMismatchError, "a"),
        (without_a_tensor, torch.float32, UnexpectedTensorError, "b"),
        (with_one_more, torch.float32, TensorError, "more"),
        (with_one_without_elements, torch.float32, TensorError, "none"),
        (lambda layout: layout, torch.float64, DtypeMismatchError, "a"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(
    tmp_path: Path, change: Callable[[Layout], Layout], dtype: torch.dtype, error: type[TensorError], tensor: str
) -> None:
    write(tmp_path, EVEN)
    found = failure(4, load, tmp_path, change(EVEN), LoadOptions(), dtype)
    assert isinstance(found, error)
    assert found.tensor == tensor


def write_again(directory: Path, layout: Layout, add: float, first: int) -> None:
    """What somebody left among the shards: the same tensors in files of further ranks, with other values."""
    for number, rows in enumerate(layout.ranks, start=first):
        tensors = {tensor: whole(layout, tensor).narrow(0, *each) + add for tensor, each in rows.items() if each[1]}
        offsets = {tensor: (rows[tensor][0], *(0,) * (value.dim() - 1)) for tensor, value in tensors.items()}
        path = directory / f"shard-{number:05d}-model-00001-of-00001.safetensors"
        save_file(tensors, path, encode_sharding_metadata(offsets))


def load_all(directory: Path, layout: Layout) -> dict[str, torch.Tensor]:
    group = Group.current()
    held = hold(layout, group.rank)
    source = open_source(directory, group, spread=True)
    open_load(lambda: list(held.values()), LoadSource(source), group, LocalStorage(), LoadOptions()).read()
    return {name: tensor.fragments[0].data.clone() for name, tensor in held.items()}


WHOLE = {name: (0, shape[0]) for name, shape in SHAPES.items()}


@pytest.mark.parametrize("ranks", [2, 3])
def test_copies_of_a_model_read_one_file_together(tmp_path: Path, ranks: int) -> None:
    """Each rank has read a file with all that it wants, but not the same file."""
    one = Layout(SHAPES, [WHOLE])
    write(tmp_path, one)
    for add in range(1, ranks):
        write_again(tmp_path, one, add, 10 + add)
    found = run(ranks, load_all, tmp_path, Layout(SHAPES, [WHOLE] * ranks))
    for name in SHAPES:
        assert len({values[name].sum().item() for values in found}) == 1, name


def test_two_shard_sets_in_one_directory_are_not_one_model(tmp_path: Path) -> None:
    two = Layout(SHAPES, [{n: (0, s[0] - 1) for n, s in SHAPES.items()}, {n: (s[0] - 1, 1) for n, s in SHAPES.items()}])
    write(tmp_path, two)
    write_again(tmp_path, two, 1, 10)
    found = run(4, load_all, tmp_path, Layout(SHAPES, [*two.ranks, *two.ranks]))
    for name in SHAPES:
        assert torch.equal(found[0][name], found[2][name])


@pytest.mark.parametrize("order", [["c", "b"], ["c", "b", "a"]])
def test_ranks_that_hold_different_tensors_take_one_copy_of_a_common_one(tmp_path: Path, order: list[str]) -> None:
    """Each rank has read all that it wants, in a file of its own; of what both want the files have other values."""
    first = Layout(SHAPES, [{name: WHOLE[name] for name in ("b", "c")}])
    second = Layout(SHAPES, [{name: WHOLE[name] for name in order}])
    write(tmp_path, first)
    write_again(tmp_path, second, 1, 10)
    found = run(2, load_all, tmp_path, Layout(SHAPES, [*first.ranks, *second.ranks]))
    for name in ("b", "c"):
        assert torch.equal(found[0][name], found[1][name])


def load_other_shapes(directory: Path) -> None:
    """Rank 1 takes the tensor for a longer one, and has read just what it would have of that."""
    group = Group.current()
    shapes, rows = ({"c": (4,)}, (0, 2)) if group.rank == 0 else ({"c": (6,)}, (3, 3))
    held = hold(Layout(shapes, [{"c": rows}]), 0)
    source = open_source(directory, group, spread=True)
    open_load(lambda: list(held.values()), LoadSource(source), group, LocalStorage(), LoadOptions()).read()


def test_ranks_that_disagree_about_a_shape_find_out(tmp_path: Path) -> None:
    write(tmp_path, Layout({"c": (6,)}, [{"c": (0, 2)}, {"c": (3, 3)}]))
    assert isinstance(failure(2, load_other_shapes, tmp_path), TensorError)


def load_stale(directory: Path) -> None:
    group = Group.current()
    held = hold(EVEN, group.rank)
    open_load(
        lambda: list(held.values()),
        LoadSource(open_source(directory, group, spread=True)),
        group,
        LocalStorage(),
        LoadOptions(),
    ).read()


def test_a_stale_file_beside_the_shards_is_refused(tmp_path: Path) -> None:
    """Two values for one row: which of them counts must not depend on how a rank slices."""
    write(tmp_path, EVEN)
    write_again(tmp_path, Layout(SHAPES, [{"a": (0, 3)}]), 1, 10)
    found = failure(4, load_stale, tmp_path)
    assert isinstance(found, TensorError)
    assert found.tensor == "a"
    assert "overlap" in str(found)


def load_whole(directory: Path) -> None:
    group = Group.current()
    held = hold(Layout({"t": (8, 2)}, [{"t": (0, 8)}]), 0)
    open_load(
        lambda: list(held.values()),
        LoadSource(open_source(directory, group, spread=True)),
        group,
        LocalStorage(),
        LoadOptions(),
    ).read()


@pytest.mark.parametrize("world", [1, 2])
def test_rows_that_are_there_twice_do_not_stand_in_for_such_as_are_not_there(tmp_path: Path, world: int) -> None:
    rows = torch.arange(16.0).view(8, 2)
    for number, (start, end) in enumerate(((0, 4), (2, 4), (6, 8)), start=1):
        record = encode_sharding_metadata({"t": (start, 0)})
        path = tmp_path / f"shard-{number:05d}-model-00001-of-00001.safetensors"
        save_file({"t": rows[start:end].clone()}, path, record)
    found = failure(world, load_whole, tmp_path)
    assert isinstance(found, TensorError)
    assert "overlap" in str(found)
