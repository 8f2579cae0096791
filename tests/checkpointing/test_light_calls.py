"""The short forms: a checkpointer without ranks, saves by keyword, what there is to restore."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tests.support.ranks import failure, run
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from shardwise import CheckpointInfo, CheckpointingConfig
from shardwise.errors import CheckpointNotFoundError, IncompleteCheckpointError, MisuseError, NameCollisionError
from shardwise.format.manifest import read_manifest

LAYERS = 4


class Net(nn.ModuleDict):
    """Some of the layers, under the names that they have in the whole model."""

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        for layer in self.values():
            value = layer(value)
        return value


def net(layers: range = range(LAYERS)) -> nn.Module:
    torch.manual_seed(0)
    every = [nn.Linear(8, 8, bias=False) for _ in range(LAYERS)]
    return Net({str(number): every[number] for number in layers})


def config(root: Path, **settings: object) -> CheckpointingConfig:
    return CheckpointingConfig(checkpoint_dir=root, save_consolidated="every", **settings)  # type: ignore[arg-type]


class Loader:
    """A dataloader as far as a checkpoint is concerned."""

    def __init__(self, position: int = -1) -> None:
        self.position = position

    def state_dict(self) -> dict[str, object]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, object]) -> None:
        self.position = int(state["position"])  # type: ignore[call-overload]


# --- which rank this is ----------------------------------------------------------------------------------------------


def _over_tp(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    for layer in model.values():  # type: ignore[operator]
        layer.weight = nn.Parameter(distribute_tensor(layer.weight.data, mesh, [Shard(0)], src_data_rank=None))
    return model


def plain() -> tuple[nn.Module, tuple[int, int, int]]:
    return net(), (dist.get_rank(), 0, 0)


def default_fsdp() -> tuple[nn.Module, tuple[int, int, int]]:
    return fully_shard(net()), (dist.get_rank(), 0, 0)


def hsdp() -> tuple[nn.Module, tuple[int, int, int]]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    return fully_shard(net(), mesh=mesh), (dist.get_rank(), 0, 0)


def fsdp_over_tp() -> tuple[nn.Module, tuple[int, int, int]]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    dp, tp = divmod(dist.get_rank(), 2)
    return fully_shard(_over_tp(net(), mesh["tp"]), mesh=mesh["dp"]), (dp, tp, 0)


def tp_of_replicas() -> tuple[nn.Module, tuple[int, int, int]]:
    """Two times the same tensor parallelism, of meshes that know nothing of one another."""
    dp, tp = divmod(dist.get_rank(), 2)
    meshes = [DeviceMesh("cpu", [2 * number, 2 * number + 1], mesh_dim_names=("tp",)) for number in range(2)]
    return _over_tp(net(), meshes[dp]), (dp, tp, 0)


def stages_by_mesh() -> tuple[nn.Module, tuple[int, int, int]]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp_shard"))
    pp, dp = divmod(dist.get_rank(), 2)
    return fully_shard(net(range(2 * pp, 2 * pp + 2)), mesh=mesh["dp_shard"]), (dp, 0, pp)


def stages_by_names() -> tuple[nn.Module, tuple[int, int, int]]:
    dp, pp = divmod(dist.get_rank(), 2)
    return net(range(2 * pp, 2 * pp + 2)), (dp, 0, pp)


WAYS = [plain, default_fsdp, hsdp, fsdp_over_tp, tp_of_replicas, stages_by_mesh, stages_by_names]


def positions(root: Path, way: Callable[[], tuple[nn.Module, tuple[int, int, int]]]) -> tuple[int, int]:
    """Save a state for each data-parallel rank without naming any rank; what is read back, and what it should be."""
    model, (dp, tp, pp) = way()
    with config(root).build() as checkpointer:
        checkpointer.save(step=1, model=model)
        checkpointer.save_on_dp_ranks(Loader(dp if tp == pp == 0 else 99), "dataloader", root)
        found = Loader()
        checkpointer.load_on_dp_ranks(found, "dataloader", root)
    with config(root).build(dp, tp, pp) as told:
        told.load_model(model, root / "epoch_0_step_1" / "model")  # nothing contradicts
        again = Loader()
        told.load_on_dp_ranks(again, "dataloader", root)
    return found.position - dp, again.position - dp


@pytest.mark.parametrize("way", WAYS)
def test_ranks_are_derived(tmp_path: Path, way: Callable[[], tuple[nn.Module, tuple[int, int, int]]]) -> None:
    assert run(4, positions, tmp_path, way) == [(0, 0)] * 4


def both(root: Path, way: Callable[[], tuple[nn.Module, tuple[int, int, int]]]) -> None:
    for name in ("derived", "given"):
        model, ranks = way()
        optimizer = torch.optim.AdamW(model.parameters())
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        with config(root / name).build(*(ranks if name == "given" else ())) as checkpointer:
            checkpointer.save(step=1, model=model, optimizer=optimizer)


def _files(directory: Path) -> dict[str, bytes]:
    found = {path.relative_to(directory).as_posix(): path for path in directory.rglob("*") if path.is_file()}
    others = ("manifest.json", "lineage.json", "config.yaml")
    return {name: path.read_bytes() for name, path in found.items() if name not in others and "rng" not in name}


@pytest.mark.parametrize("way", [fsdp_over_tp, stages_by_mesh, stages_by_names])
def test_a_checkpoint_is_the_same_with_given_ranks(
    tmp_path: Path, way: Callable[[], tuple[nn.Module, tuple[int, int, int]]]
) -> None:
    run(4, both, tmp_path, way)
    derived, given = (tmp_path / name / "epoch_0_step_1" for name in ("derived", "given"))
    assert _files(derived) == _files(given)
    assert _files(derived)
    tensors = [
        [(t.component, t.spec, t.crc32c) for t in read_manifest(d / "manifest.json").tensors] for d in (derived, given)
    ]
    assert tensors[0] == tensors[1]


def contradict(root: Path) -> None:
    model, (dp, _, _) = fsdp_over_tp()
    with config(root).build(dp, 0, 0) as checkpointer:
        checkpointer.save(step=1, model=model)


def test_a_given_rank_that_the_meshes_contradict(tmp_path: Path) -> None:
    error = failure(4, contradict, tmp_path)
    assert isinstance(error, MisuseError)
    assert error.rank == 1
    assert "tp_rank was given as 0" in str(error)
    assert "it is 1" in str(error)
    assert list(tmp_path.iterdir()) == []


def nothing_told(root: Path) -> None:
    with config(root).build() as checkpointer:
        checkpointer.save_on_dp_ranks(Loader(0), "dataloader", root)


def unknown_dimensions(root: Path) -> None:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("mine",))
    with config(root).build() as checkpointer:
        checkpointer.save(step=1, model=_over_tp(net(), mesh))
        checkpointer.save_on_dp_ranks(Loader(0), "dataloader", root)


def unlike_parts(root: Path) -> None:
    with config(root).build() as checkpointer:
        checkpointer.save(step=1, model=net(range(1 + dist.get_rank())))
        checkpointer.save_on_dp_ranks(Loader(0), "dataloader", root)


@pytest.mark.parametrize(
    ("way", "words"),
    [
        (nothing_told, ("dp_rank, tp_rank, pp_rank", "no model has been saved")),
        (unknown_dimensions, ("tp_rank", "mine")),
        (unlike_parts, ("pp_rank", "different tensors")),
    ],
)
def test_what_cannot_be_derived_is_asked_for(tmp_path: Path, way: Callable[[Path], None], words: tuple[str]) -> None:
    error = failure(2, way, tmp_path)
    assert isinstance(error, MisuseError)
    assert all(word in str(error) for word in (*words, "build()"))
    assert not list(tmp_path.glob("dataloader/*"))


def one_name_in_two_stages(root: Path) -> None:
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("pp", "dp"))
    with config(root).build() as checkpointer:
        checkpointer.save(step=1, model=fully_shard(net(range(1)), mesh=mesh["dp"]))


def test_stages_of_a_mesh_have_no_name_in_common(tmp_path: Path) -> None:
    assert isinstance(failure(2, one_name_in_two_stages, tmp_path), NameCollisionError)


def given_on_one(root: Path) -> None:
    with config(root).build(1 if dist.get_rank() == 0 else None) as checkpointer:
        checkpointer.save(step=1, model=net())
        checkpointer.save_on_dp_ranks(Loader(0), "dataloader", root)


def test_a_rank_that_was_given_on_one_process_and_derived_on_another(tmp_path: Path) -> None:
    error = failure(2, given_on_one, tmp_path)
    assert isinstance(error, MisuseError)
    assert "dp_rank was given on some ranks, and that of another would be the same: [1, 1]" in str(error)
    assert not (tmp_path / "dataloader").exists()


def pipeline_group(root: Path) -> None:
    with config(root).build(pp_group=dist.group.WORLD) as checkpointer:
        checkpointer.save(step=1, model=net(range(1)))


def test_stages_of_a_pipeline_group_have_no_name_in_common(tmp_path: Path) -> None:
    assert isinstance(failure(2, pipeline_group, tmp_path), NameCollisionError)


def test_one_process_needs_no_ranks(tmp_path: Path) -> None:
    with config(tmp_path).build() as checkpointer:
        checkpointer.save_on_dp_ranks(Loader(3), "dataloader", tmp_path)
        found = Loader()
        checkpointer.load_on_dp_ranks(found, "dataloader", tmp_path)
    assert found.position == 3


@pytest.mark.parametrize("rank", [-1, True, "0", 1.0])
def test_a_rank_is_a_number(tmp_path: Path, rank: object) -> None:
    with pytest.raises(MisuseError, match="tp_rank is"):
        config(tmp_path).build(tp_rank=rank)  # type: ignore[arg-type]


# --- save ------------------------------------------------------------------------------------------------------------


def test_save_by_keyword_and_by_position(tmp_path: Path) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9)
    with config(tmp_path).build() as checkpointer:
        assert checkpointer.save(step=1, model=model, optimizer=optimizer) == tmp_path / "epoch_0_step_1"
        assert checkpointer.save(2, 5, model, optimizer) == tmp_path / "epoch_2_step_5"
        # From then on the epoch is the one that was saved last.
        assert checkpointer.save(step=6, model=model) == tmp_path / "epoch_2_step_6"
        assert checkpointer.save(step=7, model=model, epoch=3) == tmp_path / "epoch_3_step_7"


def test_the_epoch_is_the_one_that_the_loop_is_in(tmp_path: Path) -> None:
    model = net()
    with config(tmp_path).build() as checkpointer:
        for step, _ in enumerate(checkpointer.batches([1, 2], epoch=4)):
            list(checkpointer.batches([1], epoch=0, name="validation"))
            checkpointer.save(step=step, model=model)
        assert [info.name for info in checkpointer.checkpoints()] == ["epoch_4_step_0", "epoch_4_step_1"]
    with config(tmp_path).build() as resumed:
        record = resumed.restore(model)
        assert record is not None
        resumed.save(step=2, model=model)
        assert resumed.checkpoints()[-1].name == "epoch_4_step_2"


def refused(root: Path, call: str) -> None:
    model = net()
    with config(root).build() as checkpointer:
        if dist.get_rank() == 0:
            eval(f"checkpointer.save({call})", {"checkpointer": checkpointer, "model": model})
        else:
            checkpointer.save(0, 20, model)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ("model=model", "save() was not given step"),
        ("step=20", "save() was not given model"),
        ("", "step and model"),
        ("20, model", "save() was not given model"),
        ("model", "the model in the place of the epoch"),
        ("0, 20, model, epoch=1", "epoch twice: 0 by position, 1 by name"),
        ("step=20, model=model, metric=1", "no argument metric"),
        ("0, 20, model, None, None, None", "6 arguments by position"),
        ("step='20', model=model", "step is '20'"),
        ("step=20, model=model, epoch=-1", "epoch is -1"),
    ],
)
def test_mistakes_are_told_to_all_ranks(tmp_path: Path, call: str, words: str) -> None:
    error = failure(2, refused, tmp_path, call)
    assert isinstance(error, MisuseError)
    assert words in str(error)
    assert error.hint
    assert list(tmp_path.iterdir()) == []


# --- what there is ---------------------------------------------------------------------------------------------------


def three(root: Path) -> nn.Module:
    model = net()
    with config(root).build() as checkpointer:
        for epoch, step in ((0, 1), (0, 2), (1, 2)):
            checkpointer.save(epoch, step, model, metrics={"loss": step / 4})
    return model


def test_checkpoints_are_listed(tmp_path: Path) -> None:
    checkpointer = config(tmp_path / "new").build()
    assert (checkpointer.checkpoints(), checkpointer.latest_step()) == ((), None)
    three(tmp_path)
    (tmp_path / "epoch_1_step_3" / "optim").mkdir(parents=True)
    checkpointer = config(tmp_path).build()
    found = checkpointer.checkpoints()
    assert all(isinstance(info, CheckpointInfo) for info in found)
    assert [(info.name, info.epoch, info.step, info.complete, dict(info.metrics), info.path) for info in found] == [
        ("epoch_0_step_1", 0, 1, True, {"loss": 0.25}, tmp_path / "epoch_0_step_1"),
        ("epoch_0_step_2", 0, 2, True, {"loss": 0.5}, tmp_path / "epoch_0_step_2"),
        ("epoch_1_step_2", 1, 2, True, {"loss": 0.5}, tmp_path / "epoch_1_step_2"),
        ("epoch_1_step_3", 1, 3, False, {}, tmp_path / "epoch_1_step_3"),
    ]
    assert checkpointer.latest_step() == 2


def ask_alone(root: Path) -> tuple[int | None, int]:
    with config(root).build() as checkpointer:
        if dist.get_rank() == 1:
            return checkpointer.latest_step(), len(checkpointer.checkpoints())
    return None, 0


def test_one_rank_may_ask(tmp_path: Path) -> None:
    three(tmp_path)
    assert run(2, ask_alone, tmp_path) == [(None, 0), (2, 3)]


def test_restore_of_a_step(tmp_path: Path) -> None:
    model = three(tmp_path)
    (tmp_path / "epoch_1_step_3" / "optim").mkdir(parents=True)
    with config(tmp_path).build() as checkpointer:
        record = checkpointer.restore(model, restore_from=1)
        assert record is not None
        assert record.path == tmp_path / "epoch_0_step_1"
        with pytest.raises(MisuseError, match=r"several checkpoints of step 2: epoch_0_step_2, epoch_1_step_2"):
            checkpointer.restore(model, restore_from=2)
        with pytest.raises(CheckpointNotFoundError, match=r"no checkpoint of step 9.*epoch_1_step_2, epoch_0_step_2"):
            checkpointer.restore(model, restore_from=9)
        with pytest.raises(IncompleteCheckpointError, match="epoch_1_step_3"):
            checkpointer.restore(model, restore_from=3)
        with pytest.raises(MisuseError, match="number of a step"):
            checkpointer.restore(model, restore_from=True)
