"""DCP state dicts with values that are not tensors, through our storage classes: JSON on disk, exact in memory."""

from __future__ import annotations

import collections
import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from tests.dcp.dcp_errors import refused, told
from tests.support.ranks import failure, run
from torch import nn
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner, HuggingFaceStorageReader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import LoadPlan, SavePlan, SavePlanner, WriteItem

from shardwise import CheckpointingConfig, SafetensorsReader, SafetensorsWriter
from shardwise.dcp.items import VALUES_NAME, VALUES_TENSORS_NAME
from shardwise.disk.storage import Buffer, LocalStorage
from shardwise.errors import MissingTensorError, MisuseError, NameCollisionError, StateFormatError
from shardwise.ops.verify import verify

VALUES: dict[str, object] = {
    "int": 7,
    "big": -(2**80),
    "float": 0.1,
    "infinite": float("-inf"),
    "flag": True,
    "nothing": None,
    "text": "zwölf \N{GRINNING FACE}",
    "raw": b"\0\xff",
    "$dollar": 1,
    "pair": (0.9, 0.999),
    "names": ["a", "b"],
    "empty list": [],
    "numbers": {1, 2, 3},
    "queue": collections.deque([1, 2], 5),
    "counts": (collections.Counter("abca"), {1: "a"}),  # DCP would take a mapping apart, with text for keys
    "dtype": torch.bfloat16,
    "complex": 1 - 2j,
}


# --- values -----------------------------------------------------------------------------------------------------------


def same(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and a.dtype == b.dtype and np.array_equal(a, b)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))  # type: ignore[arg-type]
    if isinstance(a, dict):
        return type(a) is type(b) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)  # type: ignore[index]
    return type(a) is type(b) and a == b


@pytest.mark.parametrize("consolidated", [True, False], ids=["consolidated", "shards"])
def test_every_kind_of_value_comes_back_exactly(tmp_path: Path, consolidated: bool) -> None:
    saved = {"w": torch.randn(4), "inner": VALUES, "list": [{"a": 1}, {"b": torch.ones(2), "c": "x"}]}
    dcp.save(saved, storage_writer=SafetensorsWriter(tmp_path, consolidated=consolidated))
    assert json.loads((tmp_path / VALUES_NAME).read_bytes())["value"]["inner.int"] == 7
    loaded: dict[str, object] = {
        "w": torch.zeros(4),
        "inner": dict.fromkeys(VALUES),
        "list": [{"a": 0}, {"b": torch.zeros(2), "c": ""}],
    }
    dcp.load(loaded, storage_reader=SafetensorsReader(tmp_path))
    assert same(loaded, saved)


def test_tensors_that_dcp_does_not_look_into(tmp_path: Path) -> None:
    """A tuple is one value to DCP, and so is a dict where the planner does not flatten."""
    saved = {
        "w": torch.randn(4),
        "rng": ("cpu", torch.arange(5, dtype=torch.uint8), np.arange(6.0).reshape(2, 3)),
        "inner": {"t": torch.ones(2, 2), 5: (1, 2)},
    }
    # With their default for sharded tensors, torch's planners work on a copy of the state dict that has text for keys.
    options = {"flatten_state_dict": False, "flatten_sharded_tensors": False}
    dcp.save(saved, storage_writer=SafetensorsWriter(tmp_path), planner=DefaultSavePlanner(**options))
    loaded: dict[str, object] = {"w": torch.zeros(4), "rng": None, "inner": None}
    dcp.load(loaded, storage_reader=SafetensorsReader(tmp_path), planner=DefaultLoadPlanner(**options))
    assert same(loaded, saved)
    assert SafetensorsReader(tmp_path).read_metadata().state_dict_metadata.keys() == saved.keys()
    assert verify(tmp_path).status == "whole"


def test_a_state_dict_without_a_tensor(tmp_path: Path) -> None:
    for consolidated in (True, False):
        path = tmp_path / str(consolidated)
        dcp.save({"step": 3}, storage_writer=SafetensorsWriter(path, consolidated=consolidated))
        loaded = {"step": 0}
        dcp.load(loaded, storage_reader=SafetensorsReader(path))
        assert loaded == {"step": 3}


def test_what_was_loaded_belongs_to_the_caller(tmp_path: Path) -> None:
    dcp.save({"w": torch.zeros(1), "names": ["a"]}, storage_writer=SafetensorsWriter(tmp_path))
    reader = SafetensorsReader(tmp_path)
    for _ in range(2):
        loaded: dict[str, object] = {"names": []}
        dcp.load(loaded, storage_reader=reader)
        assert loaded == {"names": ["a"]}
        loaded["names"].append("b")  # type: ignore[attr-defined]


def test_parts_and_missing_keys(tmp_path: Path) -> None:
    dcp.save({"w": torch.ones(3), "a": {"x": 1, "y": 2}}, storage_writer=SafetensorsWriter(tmp_path))
    part: dict[str, object] = {"a": {"y": 0}}
    dcp.load(part, storage_reader=SafetensorsReader(tmp_path))
    assert part == {"a": {"y": 2}}
    more: dict[str, object] = {"a": {"x": 0}, "epoch": 5}
    with pytest.raises(CheckpointException, match=r"Missing key in checkpoint state_dict: epoch\."):
        dcp.load(more, storage_reader=SafetensorsReader(tmp_path))
    planner = DefaultLoadPlanner(allow_partial_load=True)
    dcp.load(more, storage_reader=SafetensorsReader(tmp_path), planner=planner)
    assert more == {"a": {"x": 1}, "epoch": 5}


class WantsMore(DefaultLoadPlanner):
    """A planner that asks for what no metadata lists."""

    def create_local_plan(self) -> LoadPlan:
        plan = super().create_local_plan()
        item = replace(plan.items[0], dest_index=MetadataIndex("epoch"), storage_index=MetadataIndex("epoch"))
        return replace(plan, items=[item])


def test_a_planner_that_asks_for_a_value_that_is_not_there(tmp_path: Path) -> None:
    dcp.save({"step": 1}, storage_writer=SafetensorsWriter(tmp_path))
    with pytest.raises(CheckpointException) as caught:
        dcp.load({"step": 0}, storage_reader=SafetensorsReader(tmp_path), planner=WantsMore())
    error = told(caught.value)
    assert isinstance(error, MissingTensorError)
    assert error.tensor == "epoch"


# --- what cannot be stored --------------------------------------------------------------------------------------------


class Anything:
    """An object that only a pickle could hold."""


def test_an_object_that_cannot_be_stored_is_named(tmp_path: Path) -> None:
    state = {"w": torch.zeros(2), "data": {"sampler": ("x", [Anything()])}}
    error = refused(state, tmp_path)
    assert isinstance(error, StateFormatError)
    assert error.tensor == "data.sampler"
    assert "data.sampler[1][0]" in str(error)
    assert "Anything" in str(error)
    assert "have state_dict() return those" in str(error)
    assert not (tmp_path / "manifest.json").exists()


class BytesOnly(SavePlanner):
    """A planner that has no objects to give, as SavePlanner allows."""

    def set_up_planner(
        self, state_dict: dict[str, object], storage_meta: StorageMeta | None = None, is_coordinator: bool = False
    ) -> None:
        self.inner = DefaultSavePlanner()
        self.inner.set_up_planner(state_dict, storage_meta, is_coordinator)

    def create_local_plan(self) -> SavePlan:
        return self.inner.create_local_plan()

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        return self.inner.create_global_plan(all_plans)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return self.inner.finish_plan(new_plan)

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        return self.inner.resolve_data(write_item)


def test_a_planner_that_gives_no_objects_out(tmp_path: Path) -> None:
    error = refused({"w": torch.zeros(2), "step": 1}, tmp_path, BytesOnly())
    assert isinstance(error, MisuseError)
    assert error.tensor == "step"
    assert "BytesOnly" in str(error)
    dcp.save({"w": torch.zeros(2)}, storage_writer=SafetensorsWriter(tmp_path), planner=BytesOnly())


class Caching(DefaultSavePlanner):
    """DCP keeps plans by the name of the planner's class."""


def test_a_planner_that_leaves_plans_out_is_refused_before_anything_is_removed(tmp_path: Path) -> None:
    state = {"w": torch.ones(2), "step": 1}
    dcp.save(state, storage_writer=SafetensorsWriter(tmp_path), planner=Caching(enable_plan_caching=True))
    error = refused(state, tmp_path, Caching(enable_plan_caching=True))
    assert isinstance(error, MisuseError)
    assert "enable_plan_caching" in str(error)
    assert verify(tmp_path).status == "whole"


class Undecided(DefaultSavePlanner):
    """Lets every rank write its own values."""

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        return all_plans, Metadata({})


def save_differently(path: Path, what: str) -> None:
    rank = dist.get_rank()
    states: dict[str, dict[str, object]] = {
        "same": {"step": 3},
        "different": {"step": rank},
        "kinds": {"step": torch.zeros(2) if rank else 3},
        "object": {"step": 3, f"of rank {rank}": Anything() if rank else 0},
    }
    writer = SafetensorsWriter(path)
    try:
        dcp.save(states[what], storage_writer=writer, planner=Undecided(dedup_save_to_lowest_rank=True))
    except CheckpointException as error:
        raise told(error) from None


def test_ranks_that_save_differently(tmp_path: Path) -> None:
    run(2, save_differently, tmp_path / "same", "same")
    assert json.loads((tmp_path / "same" / VALUES_NAME).read_bytes())["value"] == {"step": 3}
    for what in ("different", "kinds"):
        error = failure(2, save_differently, tmp_path / what, what)
        assert isinstance(error, NameCollisionError)
        assert error.tensor == "step"
        assert not (tmp_path / what / "manifest.json").exists()
    error = failure(2, save_differently, tmp_path / "object", "object")
    assert isinstance(error, StateFormatError)
    assert error.tensor == "of rank 1"


# --- on disk ----------------------------------------------------------------------------------------------------------


def test_a_later_save_leaves_nothing_of_an_earlier_one(tmp_path: Path) -> None:
    writer = SafetensorsWriter(tmp_path)
    dcp.save({"w": torch.zeros(3), "step": 1, "pair": (torch.ones(1),)}, storage_writer=writer)
    assert (tmp_path / VALUES_TENSORS_NAME).exists()
    dcp.save({"w": torch.ones(3), "step": 2}, storage_writer=writer)
    assert not (tmp_path / VALUES_TENSORS_NAME).exists()
    loaded = {"w": torch.zeros(3), "step": 0}
    dcp.load(loaded, storage_reader=SafetensorsReader(tmp_path))
    assert (loaded["step"], float(loaded["w"].sum())) == (2, 3.0)  # type: ignore[union-attr]
    dcp.save({"w": torch.ones(3)}, storage_writer=writer)
    assert not (tmp_path / VALUES_NAME).exists()
    assert verify(tmp_path).status == "whole"


class Recording(LocalStorage):
    """Remembers what was created, made durable and closed, in order."""

    def __init__(self) -> None:
        self.done: list[tuple[str, str]] = []
        self._names: dict[int, str] = {}

    def create(self, path: Path, size: int, head: Buffer) -> None:
        super().create(path, size, head)
        self.done.append(("create", path.name))

    def open(self, path: Path, *, writable: bool) -> int:
        handle = super().open(path, writable=writable)
        self._names[handle] = path.name
        return handle

    def sync(self, handle: int) -> None:
        super().sync(handle)
        self.done.append(("sync", self._names[handle]))

    def sync_directory(self, path: Path) -> None:
        super().sync_directory(path)
        self.done.append(("sync", path.name))


def save_recorded(path: Path, consolidated: bool) -> list[tuple[str, str]]:
    storage = Recording()
    state = {"w": torch.zeros(2), "a": 1, "b": (torch.ones(1),), "c": 3}
    dcp.save(state, storage_writer=SafetensorsWriter(path, consolidated=consolidated, storage=storage))
    return storage.done


@pytest.mark.parametrize("consolidated", [True, False], ids=["consolidated", "shards"])
def test_the_coordinator_writes_the_values_once_and_durably_before_the_manifest(
    tmp_path: Path, consolidated: bool
) -> None:
    first, second = run(2, save_recorded, tmp_path / "there", consolidated)
    names = [VALUES_NAME, VALUES_TENSORS_NAME]
    assert isinstance(first, list)
    assert [step for step in first if step[1] in names] == [(do, name) for name in names for do in ("create", "sync")]
    assert first[-3:] == [("create", "manifest.json"), ("sync", "manifest.json"), ("sync", "there")]
    assert isinstance(second, list)
    assert not {name for _, name in second} & {*names, "manifest.json"}
    assert SafetensorsReader(tmp_path / "there").read_metadata().state_dict_metadata.keys() == {"w", "a", "b", "c"}


def test_nothing_on_disk_is_a_pickle(tmp_path: Path) -> None:
    dcp.save({"w": torch.ones(3), "inner": VALUES, "t": (torch.ones(1),)}, storage_writer=SafetensorsWriter(tmp_path))
    names = {"manifest.json", "model.safetensors", "model.safetensors.index.json", VALUES_NAME, VALUES_TENSORS_NAME}
    assert {path.name for path in tmp_path.iterdir()} == names
    for path in tmp_path.iterdir():
        assert not path.read_bytes().startswith((b"PK", b"\x80")), path.name


@pytest.mark.parametrize("consolidated", [True, False], ids=["consolidated", "shards"])
def test_others_read_the_tensors_as_if_the_values_were_not_there(tmp_path: Path, consolidated: bool) -> None:
    model, other = nn.Linear(5, 3), nn.Linear(5, 3)
    state = {**model.state_dict(), "step": 3, "t": (torch.ones(1),)}
    dcp.save(state, storage_writer=SafetensorsWriter(tmp_path, consolidated=consolidated))
    loaded = {name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()}
    reader = HuggingFaceStorageReader(str(tmp_path))
    dcp.load(loaded, storage_reader=reader)
    assert same(loaded, dict(model.state_dict()))
    assert reader.read_metadata().state_dict_metadata.keys() == loaded.keys()
    with CheckpointingConfig(checkpoint_dir=tmp_path / "root").build() as engine:
        engine.load_model(other, tmp_path)
    assert same(dict(other.state_dict()), dict(model.state_dict()))


def test_a_changed_digit_is_found(tmp_path: Path) -> None:
    dcp.save({"w": torch.ones(3), "lr": 0.125}, storage_writer=SafetensorsWriter(tmp_path))
    path = tmp_path / VALUES_NAME
    path.write_bytes(path.read_bytes().replace(b"0.125", b"0.225"))
    report = verify(tmp_path)
    assert report.status == "damaged"
    assert [(damage.file, damage.kind) for damage in report.damages] == [(VALUES_NAME, "digest")]


@pytest.mark.parametrize("kind", [SafetensorsReader, SafetensorsWriter])
def test_a_path_is_needed(kind: type) -> None:
    with pytest.raises(TypeError):
        kind(None)
