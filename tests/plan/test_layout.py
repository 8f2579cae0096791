"""The layout by property: offsets tile, the base's split is kept, limits hold."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardwise.errors import MisuseError, NameCollisionError
from shardwise.format.header import parse_header
from shardwise.geometry import DTYPE_BYTES, TensorSpec
from shardwise.plan.layout import SPLIT_ABOVE_BYTES, file_limit, index_name, lay_out, shard_name


@st.composite
def some_specs(draw: st.DrawFn) -> list[TensorSpec]:
    names = draw(st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=6), max_size=8, unique=True))
    dims = st.lists(st.integers(0, 6), max_size=3).map(tuple)
    return [TensorSpec(name, draw(dims), draw(st.sampled_from(sorted(DTYPE_BYTES)))) for name in names]


@given(some_specs(), st.integers(1, 400))
def test_every_tensor_has_a_place_of_its_own(specs: list[TensorSpec], limit: int) -> None:
    layout = lay_out(specs, max_file_bytes=limit)
    taken: dict[int, list[tuple[int, int]]] = {}
    for spec in specs:
        place = layout.places[spec.name]
        taken.setdefault(place.file, []).append((place.offset, place.offset + spec.nbytes))
    for number, file in enumerate(layout.files):
        position = len(file.header)
        assert position % 8 == 0
        for begin, end in sorted(taken.get(number, [])):
            assert begin == position
            position = end
        assert position == file.size
        # What the header says is where the tensors are.
        header = parse_header(file.header, file.size, file.name)
        assert [e.spec for e in header.entries] == [e.spec for e in file.entries]
    assert layout.total_bytes == sum(file.size for file in layout.files)
    assert layout.tensor_bytes == sum(spec.nbytes for spec in specs)
    assert set(layout.weight_map) == {spec.name for spec in specs}


@given(some_specs(), st.integers(1, 400))
def test_files_hold_no_more_than_the_limit_and_keep_the_order(specs: list[TensorSpec], limit: int) -> None:
    layout = lay_out(specs, max_file_bytes=limit)
    for file in layout.files:
        nbytes = [entry.spec.nbytes for entry in file.entries]
        assert sum(nbytes) <= limit or len([n for n in nbytes if n]) == 1
    files = [layout.places[spec.name].file for spec in specs]
    assert files == sorted(files)
    count = len(layout.files)
    if count == 1:
        assert layout.files[0].name == "model.safetensors"
    else:
        assert [f.name for f in layout.files] == [
            f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)
        ]
    # Two neighbours that would fit into one file are in one.
    sizes = [sum(entry.spec.nbytes for entry in file.entries) for file in layout.files]
    firsts = [next(s.nbytes for s in specs if layout.places[s.name].file == number) for number in range(count) if specs]
    assert all(size + first > limit for size, first in zip(sizes, firsts[1:], strict=False))


@given(some_specs(), st.data())
def test_the_split_of_the_base_is_kept(specs: list[TensorSpec], data: st.DataObject) -> None:
    files = ["a-1.safetensors", "a-2.safetensors", "a-3.safetensors"]
    base = {s.name: data.draw(st.sampled_from(files)) for s in specs if data.draw(st.booleans())}
    base["only in the base"] = files[data.draw(st.integers(0, 2))]
    layout = lay_out(specs, base_files=base, max_file_bytes=1)
    if not set(base) & {s.name for s in specs}:
        assert all(file.name.startswith("model") for file in layout.files)
        return
    for spec in specs:
        assert layout.weight_map[spec.name] == base.get(spec.name, max(base.values()))


@given(some_specs(), st.randoms(use_true_random=False))
def test_the_bytes_of_a_file_do_not_depend_on_the_order_of_declaration(specs: list[TensorSpec], random) -> None:  # type: ignore[no-untyped-def]
    shuffled = list(specs)
    random.shuffle(shuffled)
    one, other = lay_out(specs), lay_out(shuffled)
    assert [f.header for f in one.files] == [f.header for f in other.files]


def test_a_name_twice_is_refused() -> None:
    spec = TensorSpec("layer.w", (2,), "F32")
    with pytest.raises(NameCollisionError, match="layer.w"):
        lay_out([spec, spec])


def test_a_limit_has_to_be_positive() -> None:
    with pytest.raises(MisuseError, match="max_file_bytes"):
        lay_out([], max_file_bytes=0)


def test_large_models_are_split_so_that_ranks_can_rotate() -> None:
    block = TensorSpec("", (64, 1024, 1024), "BF16")
    specs = [TensorSpec(f"w{i}", block.shape, "BF16") for i in range(14)]
    layout = lay_out(specs)
    assert sum(spec.nbytes for spec in specs) > SPLIT_ABOVE_BYTES
    assert len(layout.files) > 4
    assert file_limit(SPLIT_ABOVE_BYTES, 5_000) == 5_000
    assert file_limit(10**13, 5_000_000_000) == 5_000_000_000
    assert [file.name for file in lay_out(specs, max_file_bytes=None, stem="adapter").files] == ["adapter.safetensors"]


def test_metadata_and_stem() -> None:
    layout = lay_out([TensorSpec("w", (2,), "F32")], stem="adapter_model", metadata={"who": "me"})
    assert layout.files[0].name == "adapter_model.safetensors"
    assert json.loads(layout.files[0].header[8:])["__metadata__"] == {"who": "me"}
    assert index_name("x") == "x.safetensors.index.json"
    assert shard_name(1, 2, 3) == "shard-00001-model-00002-of-00003.safetensors"


def test_without_tensors_there_is_one_empty_file() -> None:
    layout = lay_out([])
    assert [file.name for file in layout.files] == ["model.safetensors"]
    assert layout.files[0].size == len(layout.files[0].header)
    assert list(itertools.chain(*(file.entries for file in layout.files))) == []
