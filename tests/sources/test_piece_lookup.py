"""Who knows which pieces of sharded tensors, between real ranks."""

from __future__ import annotations

import json
import pickle
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from tests.support.ranks import WORLDS, failure, outcomes, run
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from shardwise.comm import Group, JsonValue
from shardwise.disk.storage import LocalStorage
from shardwise.engine.load import LoadOptions, LoadSource, open_load
from shardwise.errors import HeaderError, MisuseError, ShapeMismatchError, ShardwiseError
from shardwise.format.dcp_metadata import read_dcp_metadata
from shardwise.format.header import encode_sharding_metadata
from shardwise.geometry import Box, TensorSpec
from shardwise.plan.fragments import Fragment, HeldPart, HeldTensor, Part
from shardwise.plan.reads import SourceChunk, SourceTensor
from shardwise.sources.sources import open_source

ROWS = 12


def write_shard(path: Path, tensors: dict[str, torch.Tensor], offsets: dict[str, tuple[int, ...]]) -> None:
    save_file(tensors, path, encode_sharding_metadata(offsets))


def write_shards(directory: Path, ranks: int, tensors: int = 10) -> None:
    """Each rank's rows of some tensors, a scalar from rank 0 alone, one tensor whole, one with a piece missing."""
    per_rank = ROWS // ranks
    for rank in range(ranks):
        start = rank * per_rank
        found = {f"t{n}": torch.full((per_rank, 3), float(n)) for n in range(tensors)}
        offsets: dict[str, tuple[int, ...]] = dict.fromkeys(found, (start, 0))
        if rank == 0:
            found |= {"scalar": torch.tensor(3.0), "whole": torch.ones(2, 2)}
            offsets |= {"scalar": (), "whole": (0, 0)}
        if rank != 0 or ranks == 1:
            found["holes"] = torch.zeros(per_rank)
            offsets["holes"] = (start,)
        write_shard(directory / f"shard-{rank + 1:05d}-model-00001-of-00001.safetensors", found, offsets)


def look(directory: Path) -> tuple[bool, list[int]]:
    """Whether the tensors are those that a process alone finds, and how many pieces this rank knows of each of two."""
    alone = open_source(directory, Group(None))
    spread = open_source(directory, Group.current(), spread=True)
    same = {n: t.spec for n, t in spread.tensors.items()} == {n: t.spec for n, t in alone.tensors.items()}
    same = same and all(spread.tensors[n].chunks == alone.tensors[n].chunks for n in ("scalar", "whole"))
    return same, [len(spread.tensors[name].chunks) for name in ("t0", "t9")]


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("ranks", [1, 3, 4])
def test_all_know_what_there_is_and_few_where(tmp_path: Path, world: int, ranks: int) -> None:
    write_shards(tmp_path, ranks)
    for number, (same, known) in enumerate(run(world, look, tmp_path)):
        assert same
        read = ranks * (number + 1) // world - ranks * number // world
        assert known == ([1, 1] if ranks == 1 else [read, read])


def chunks_of(tensor: SourceTensor, region: Box) -> set[SourceChunk]:
    return {chunk for chunk in tensor.chunks if chunk.box.intersect(region) is not None}


def ask(directory: Path, wanted: Sequence[dict[str, list[Box]]]) -> list[bool]:
    """Whether what this rank asks for is what a process alone finds there."""
    alone = open_source(directory, Group(None))
    group = Group.current()
    own = wanted[group.rank]
    source = open_source(directory, group, spread=True).located(lambda: own, group)
    return [
        chunks_of(source.tensors[name], region) == chunks_of(alone.tensors[name], region)
        for name, regions in own.items()
        for region in regions
    ]


@pytest.mark.parametrize("ranks", [1, 3, 4])
def test_index_ranks_answer_with_what_touches_a_region(tmp_path: Path, ranks: int) -> None:
    write_shards(tmp_path, ranks)
    wanted = [
        {"t0": [Box((0, 0), (ROWS, 3))], "t1": [Box((2, 1), (5, 1)), Box((9, 0), (1, 3))]},
        {},
        {f"t{n}": [Box((n, 0), (2, 2))] for n in range(10)} | {"holes": [Box((0,), (ROWS,))]},
    ]
    assert run(3, ask, tmp_path, wanted) == [[True] * 3, [], [True] * 11]


def ask_own(directory: Path) -> list[str]:
    """What is exchanged for what this rank has read of itself."""
    group = Counting()
    source = open_source(directory, group, spread=True)
    mine = ROWS // group.world_size
    group.said.clear()
    source.located(lambda: {f"t{n}": [Box((mine * group.rank, 0), (mine, 3))] for n in range(10)}, group)
    return group.said


def want_nothing_of_it(directory: Path) -> list[int]:
    """How many pieces of tensors a rank finds of which it holds no rows, while others ask."""
    group = Group.current()
    source = open_source(directory, group, spread=True)
    regions = [] if group.rank == 0 else [Box((0,), (ROWS,))]
    located = source.located(lambda: {"holes": regions, "t0": []}, group)
    return [len(located.tensors["holes"].chunks)]


def test_a_rank_may_want_no_rows_of_a_tensor(tmp_path: Path) -> None:
    write_shards(tmp_path, 3)
    assert run(3, want_nothing_of_it, tmp_path) == [[0], [2], [2]]


def under_two_names(directory: Path) -> list[bool]:
    """Whether this rank finds its own rows of a tensor, and another's of the same tensor under a further name."""
    group = Group.current()
    source = open_source(directory, group, spread=True)
    tensor, mine = source.tensors["t0"], ROWS // group.world_size
    further = tensor._replace(spec=tensor.spec._replace(name="further"))
    rows = [Box((mine * rank, 0), (mine, 3)) for rank in (group.rank, (group.rank + 1) % group.world_size)]
    source = replace(source, tensors={**source.tensors, "further": further})
    source = source.located(lambda: {"t0": [rows[0]], "further": [rows[1]]}, group)
    return [
        len(chunks_of(source.tensors[name], region)) == 1 for name, region in zip(("t0", "further"), rows, strict=True)
    ]


def test_of_one_tensor_under_two_names_each_has_its_own_pieces(tmp_path: Path) -> None:
    write_shards(tmp_path, 3)
    assert run(3, under_two_names, tmp_path) == [[True, True]] * 3


class Counting(Group):
    """Remembers what it told whom, and how much it was told."""

    def __init__(self) -> None:
        super().__init__(dist.group.WORLD)
        self.said: list[str] = []
        self.received = 0

    def exchange(self, messages: Sequence[bytes], what: str) -> list[bytes]:
        """As ever."""
        self.said.append(what)
        found = super().exchange(messages, what)
        self.received += sum(map(len, found))
        return found

    def gather_json(self, value: JsonValue, what: str = "gathering") -> list[JsonValue]:
        """As ever."""
        self.said.append(what)
        found = super().gather_json(value, what)
        self.received += len(json.dumps(found))
        return found


def test_a_rank_that_goes_on_where_it_stopped_has_nothing_to_ask(tmp_path: Path) -> None:
    write_shards(tmp_path, 3)
    assert run(3, ask_own, tmp_path) == [[], [], []]


def told(directory: Path) -> int:
    group = Counting()
    source = open_source(directory, group, spread=True)
    start = ROWS // group.world_size * group.rank - (1 if group.rank else 0)
    source.located(lambda: {f"t{n}": [Box((start, 0), (2, 3))] for n in range(200)}, group)
    return group.received


def test_what_a_rank_is_told_does_not_grow_with_the_ranks(tmp_path: Path) -> None:
    received = []
    for ranks in (2, 4):
        (tmp_path / str(ranks)).mkdir()
        write_shards(tmp_path / str(ranks), ranks, tensors=200)
        received.append(max(run(ranks, told, tmp_path / str(ranks))))
    assert received[1] < 1.25 * received[0]


def ask_for_copies(directory: Path) -> list[int]:
    group = Group.current()
    source = open_source(directory, group, spread=True)
    source = source.located(lambda: {"t": [Box((0, 0), (2, 3))]}, group)
    return sorted(chunk.file for chunk in source.tensors["t"].chunks)


def test_of_a_piece_in_two_files_all_ranks_take_the_same(tmp_path: Path) -> None:
    for number in (1, 2):
        path = tmp_path / f"shard-{number:05d}-model-00001-of-00001.safetensors"
        write_shard(path, {"t": torch.ones(2, 3), f"own{number}": torch.ones(1)}, {"t": (0, 0), f"own{number}": (0,)})
    write_shard(tmp_path / "shard-00003-model-00001-of-00001.safetensors", {"t": torch.ones(2, 3)}, {"t": (2, 0)})
    assert run(3, ask_for_copies, tmp_path) == [[0], [0], [0]]


def overlapping(directory: Path) -> list[int]:
    """Load each rank's own rows of a tensor of which a leftover file has one row once more."""
    group = Group.current()
    source = open_source(directory, group, spread=True)
    mine = Box((2 * group.rank, 0), (2, 3))
    return [len(source.located(lambda: {"t": [mine]}, group).tensors["t"].chunks), source.tensors["t"].knows([mine])]


def test_pieces_that_overlap_are_told_to_who_has_read_one_of_them(tmp_path: Path) -> None:
    for number, (start, rows) in enumerate([(0, 2), (2, 2), (0, 1)], start=1):
        path = tmp_path / f"shard-{number:05d}-model-00001-of-00001.safetensors"
        write_shard(path, {"t": torch.full((rows, 3), float(number))}, {"t": (start, 0)})
    assert run(2, overlapping, tmp_path) == [[2, False], [1, False]]


def two_parts(directory: Path) -> list[list[float]]:
    """What a rank loads that has read one part of a tensor and needs another as well."""
    group = Group.current()
    filled, held = [], []
    for start in (2 * group.rank, 2 - 2 * group.rank):
        memory = torch.zeros(2, 3)
        spec, box = TensorSpec("t", (4, 3), "F32"), Box((start, 0), (2, 3))
        held.append(HeldTensor(spec, spec.shape, (HeldPart(Part(spec.shape), (), (Fragment(box, memory),)),)))
        filled.append(memory)
    source = open_source(directory, group, spread=True)
    open_load(lambda: held, LoadSource(source), group, LocalStorage(), LoadOptions()).read()
    return [memory.flatten().tolist() for memory in filled]


def test_two_parts_of_one_tensor_are_loaded_where_one_is_known(tmp_path: Path) -> None:
    rows = torch.arange(12.0).view(2, 2, 3)
    for number, each in enumerate(rows, start=1):
        path = tmp_path / f"shard-{number:05d}-model-00001-of-00001.safetensors"
        write_shard(path, {"t": each.clone()}, {"t": (2 * number - 2, 0)})
    parts = [each.flatten().tolist() for each in rows]
    assert run(2, two_parts, tmp_path) == [parts, parts[::-1]]


def open_spread(directory: Path) -> None:
    open_source(directory, Group.current(), spread=True)


def test_files_that_disagree_are_an_error_on_every_rank(tmp_path: Path) -> None:
    for number, shape in ((1, (2, 3)), (2, (6,))):
        path = tmp_path / f"shard-{number:05d}-model-00001-of-00001.safetensors"
        write_shard(path, {"t": torch.ones(shape)}, {"t": (0,) * len(shape)})
    for outcome in outcomes(3, open_spread, tmp_path):
        assert isinstance(outcome.error, HeaderError)
        assert (outcome.error.tensor, Path(str(outcome.error.path)).parent) == ("t", tmp_path)


def fail_alone(directory: Path, is_late: bool) -> str:
    group = Group.current()
    source = open_source(directory, group, spread=True)

    def wanted() -> dict[str, list[Box]]:
        if group.rank == 1 and is_late:
            return {"t0": [Box((torch.tensor(0), 0), (1, 3))]}  # type: ignore[arg-type] # which no message can hold
        if group.rank == 1:
            raise MisuseError("this rank cannot say what it wants", hint="Nothing.")
        return {"t0": [Box((0, 0), (ROWS, 3))]}

    try:
        source.located(wanted, group)
    except (ShardwiseError, TypeError) as error:
        return f"{type(error).__name__} {getattr(error, 'rank', '')}"
    return "nothing"


@pytest.mark.parametrize("is_late", [False, True])
def test_what_one_rank_fails_with_all_learn(tmp_path: Path, is_late: bool) -> None:
    write_shards(tmp_path, 3)
    found = run(3, fail_alone, tmp_path, is_late)
    assert found == [found[0]] * 3
    assert str(found[0]).endswith(" 1")


def save_dcp(directory: Path) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    rows = torch.arange(21.0).view(7, 3)
    spread = DTensor.from_local(rows.chunk(dist.get_world_size())[dist.get_rank()], mesh, [Shard(0)], run_check=False,
                                shape=torch.Size((7, 3)), stride=(3, 1))  # fmt: skip
    dcp.save({"spread": spread, "whole": torch.ones(2)}, checkpoint_id=directory)


def look_dcp(directory: Path) -> list[object]:
    group = Group.current()
    alone = open_source(directory, Group(None))
    source = open_source(directory, group, spread=True)
    before = len(source.tensors["spread"].chunks)
    region = Box((3, 0), (1 + group.rank, 3))
    located = source.located(lambda: {"spread": [region]}, group)
    return [
        before,
        source.tensors["whole"].chunks == alone.tensors["whole"].chunks,
        chunks_of(located.tensors["spread"], region) == chunks_of(alone.tensors["spread"], region),
        located.files == alone.files,
    ]


def save_without_chunks(directory: Path) -> None:
    dcp.save({"t": torch.ones(4, 3)}, checkpoint_id=directory, no_dist=True)
    metadata = read_dcp_metadata(directory / ".metadata")
    saved = metadata.state_dict_metadata["t"]
    assert isinstance(saved, TensorStorageMetadata)
    saved.chunks.clear()
    (directory / ".metadata").write_bytes(pickle.dumps(metadata))


def load_other_shape(directory: Path) -> None:
    group = Group.current()
    spec, box = TensorSpec("t", (3, 4), "F32"), Box((0, 0), (3, 4))
    held = HeldTensor(spec, spec.shape, (HeldPart(Part(spec.shape), (), (Fragment(box, torch.zeros(3, 4)),)),))
    open_load(
        lambda: [held], LoadSource(open_source(directory, group, spread=True)), group, LocalStorage(), LoadOptions()
    ).read()


def test_an_error_names_the_directory_where_no_file_has_a_piece(tmp_path: Path) -> None:
    save_without_chunks(tmp_path)
    error = failure(2, load_other_shape, tmp_path)
    assert isinstance(error, ShapeMismatchError)
    assert (error.path, error.tensor) == (str(tmp_path), "t")


def test_of_a_dcp_directory_one_rank_reads_the_metadata_and_sends_it_to_the_index_ranks(tmp_path: Path) -> None:
    run(3, save_dcp, tmp_path)
    assert run(2, look_dcp, tmp_path) == [[0, True, True, True]] * 2
