"""What several ranks hold of one tensor: one rank's value is published, whole, or an error says which ranks differ."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from tests.checkpointing.modes import EVERY, MODES, SHARDS
from tests.support.ranks import failure, run
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from shardwise import Checkpointer, CheckpointingConfig
from shardwise.errors import ConfigError, MisuseError, ReplicasDifferError
from shardwise.ops.verify import verify

State = dict[str, torch.Tensor]


def engine(root: Path, settings: dict[str, object], stage: int = 0) -> Checkpointer:
    config = CheckpointingConfig(checkpoint_dir=root / "run", collective_timeout_seconds=60, **settings)  # type: ignore[arg-type]
    return config.build(dp_rank=dist.get_rank(), tp_rank=0, pp_rank=stage)


def local(model: nn.Module) -> State:
    """This rank's memory of a model, copied."""
    state = model.state_dict()
    return {name: getattr(value, "_local_tensor", value).detach().clone() for name, value in state.items()}


def same(one: State, other: State) -> bool:
    """By bits: a NaN is the same as one of the same bits."""

    def bits(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.contiguous().reshape(-1).view(torch.uint8)

    return one.keys() == other.keys() and all(torch.equal(bits(one[name]), bits(other[name])) for name in one)


def of_every_rank(value: State) -> list[State]:
    found: list[State] = [{}] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


# --- buffers ----------------------------------------------------------------------------------------------------------


def normed(width: int = 8) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(4):
        layers += [nn.Linear(width, width), nn.BatchNorm1d(width)]
    return nn.Sequential(*layers)


def train_apart(model: nn.Module) -> None:
    """One forward pass, on data of this rank's own, and as many as its number more."""
    torch.manual_seed(100 + dist.get_rank())
    for _ in range(1 + dist.get_rank()):
        model(torch.randn(5, 8) * (1 + dist.get_rank()) + dist.get_rank())


def buffers(model: nn.Module) -> State:
    return {name: buffer.detach().clone() for name, buffer in model.named_buffers()}


def save_statistics(root: Path, settings: dict[str, object]) -> None:
    for kind in ("ddp", "fsdp2"):
        model = normed()
        trained = DistributedDataParallel(model, broadcast_buffers=False) if kind == "ddp" else fully_shard(model)
        train_apart(trained)
        theirs = of_every_rank(buffers(model))
        assert not same(*theirs[:2])
        with engine(root / kind, settings) as checkpointer:
            checkpointer.save(0, 1, trained)
            for buffer in model.buffers():
                buffer.fill_(7)
            checkpointer.restore(trained)
        assert same(buffers(model), theirs[0])
        exported = root / kind / "run/epoch_0_step_1/model/consolidated"
        if dist.get_rank() == 0 and exported.exists():
            published = load_file(exported / "model.safetensors")
            assert same({name: published[name] for name in theirs[0]}, theirs[0])


@pytest.mark.parametrize("settings", MODES)
def test_all_buffers_are_those_of_the_lowest_rank(tmp_path: Path, settings: dict[str, object]) -> None:
    run(2, save_statistics, tmp_path, settings)
    for kind in ("ddp", "fsdp2"):
        assert not verify(tmp_path / kind / "run" / "epoch_0_step_1").damages


class Stage(nn.Module):
    def __init__(self, number: int) -> None:
        super().__init__()
        self.stages = nn.ModuleDict({str(number): normed()})

    def forward(self, data: torch.Tensor) -> torch.Tensor:
        for stage in self.stages.values():
            data = stage(data)
        return data


def save_stages(root: Path, settings: dict[str, object]) -> None:
    stage = dist.get_rank() // 2
    model = Stage(stage)
    train_apart(model)
    theirs = of_every_rank(buffers(model))
    with engine(root, settings, stage) as checkpointer:
        checkpointer.save(0, 1, model)
        for buffer in model.buffers():
            buffer.fill_(7)
        checkpointer.restore(model)
    assert same(buffers(model), theirs[2 * stage])


@pytest.mark.parametrize("settings", [EVERY, SHARDS, {**SHARDS, "model_save_format": "torch_save"}])
def test_buffers_that_rank_0_does_not_hold_are_those_of_the_lowest_rank_that_does(
    tmp_path: Path, settings: dict[str, object]
) -> None:
    run(4, save_stages, tmp_path, settings)


# --- parameters -------------------------------------------------------------------------------------------------------


class Apart(nn.Module):
    """Parameters that each rank starts with from a seed of its own, one of them so large that replicas share it."""

    def __init__(self, rows: int = 2048) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.alike = nn.Parameter(torch.randn(6, 4))
        self.register_buffer("kept", torch.randn(5))
        torch.manual_seed(10 + dist.get_rank())
        self.bias = nn.Parameter(torch.randn(7))
        self.big = nn.Parameter(torch.randn(rows, 1024))


def equalise(model: nn.Module) -> None:
    for parameter in model.parameters():
        dist.broadcast(parameter.data, 0)


def refused(call: Callable[[], object]) -> str:
    with pytest.raises(ReplicasDifferError) as caught:
        call()
    assert caught.value.hint is not None
    return str(caught.value)


def save_apart(root: Path, settings: dict[str, object]) -> str:
    model = Apart()
    own = local(model)
    with engine(root, settings) as checkpointer:
        equalise(model)
        checkpointer.save(0, 1, model)
        checkpointer.async_wait()
        first = local(model)
        with torch.no_grad():
            model.bias.copy_(own["bias"])
            model.big.copy_(own["big"])

        def save() -> None:
            checkpointer.save(0, 2, model)
            checkpointer.async_wait()

        text = refused(save)
        dist.barrier()
        assert [path.name for path in (root / "run").iterdir() if "epoch" in path.name] == ["epoch_0_step_1"]
        # What was saved before is untouched, and saving goes on once the ranks agree.
        checkpointer.restore(model)
        assert same(local(model), first)
        equalise(model)
        model.bias.data.add_(1)
        checkpointer.save(0, 2, model)
        second = local(model)
        model.bias.data.fill_(0)
        checkpointer.restore(model)
        assert same(local(model), second)
    return text


@pytest.mark.parametrize("settings", MODES)
def test_parameters_that_differ_are_an_error_that_names_them_and_the_ranks(
    tmp_path: Path, settings: dict[str, object]
) -> None:
    one, other = run(2, save_apart, tmp_path, settings)
    assert one == other
    assert one.startswith("2 tensors have different values on ranks that hold the same part of them: ")  # type: ignore[union-attr]
    for named in (
        "'bias' (rank 0 has one value, rank 1 another)",
        "'big' (rank 0",
        "per_rank_state",
        "replicas='first'",
    ):
        assert named in str(one)
    assert "alike" not in str(one)
    assert "'kept'" not in str(one)


def save_first(root: Path, settings: dict[str, object]) -> None:
    model = Apart()
    theirs = of_every_rank(local(model))
    with engine(root, {**settings, "replicas": "first"}) as checkpointer:
        checkpointer.save(0, 1, model)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(0)
        checkpointer.restore(model)
    assert same(local(model), theirs[0])


@pytest.mark.parametrize("settings", MODES)
def test_the_lowest_ranks_values_are_saved_whole_where_that_is_meant(
    tmp_path: Path, settings: dict[str, object]
) -> None:
    run(2, save_first, tmp_path, settings)


def save_ignored(root: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    torch.manual_seed(dist.get_rank())
    nn.init.normal_(model[1].weight)
    fully_shard(model, ignored_params={model[1].weight})
    assert not isinstance(model[1].weight, DTensor)
    with engine(root, EVERY) as checkpointer:
        checkpointer.save(0, 1, model)


def test_parameters_that_fsdp_ignores_are_compared(tmp_path: Path) -> None:
    error = failure(2, save_ignored, tmp_path)
    assert isinstance(error, ReplicasDifferError)
    assert error.tensor == "1.weight"
    assert "a tensor has different values" in str(error)


class Spread(nn.Module):
    """DTensors over two replicas of two shards: whole, by rows, by columns that are exchanged; and a buffer."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))

        def spread(*shape: int, by: Replicate | Shard) -> DTensor:
            return distribute_tensor(torch.zeros(shape), mesh, (Replicate(), by))

        self.whole = nn.Parameter(spread(3, 5, by=Replicate()))
        self.rows = nn.Parameter(spread(6, 4, by=Shard(0)))
        self.columns = nn.Parameter(spread(300, 64, by=Shard(1)))
        self.register_buffer("statistics", spread(300, 64, by=Shard(1)))
        torch.manual_seed(seed)
        for value in self.state_dict().values():
            value.to_local().normal_()


def refuse_spread(root: Path) -> str:
    # The ranks of one replica start from one seed, as does each shard: ranks 0 and 1, and 2 and 3.
    model = Spread(dist.get_rank())
    with engine(root, EVERY) as checkpointer:
        return refused(lambda: checkpointer.save(0, 1, model))


def save_spread(root: Path) -> None:
    with engine(root, {**EVERY, "replicas": "first"}) as checkpointer:
        model = Spread(dist.get_rank())
        theirs = of_every_rank(local(model))
        checkpointer.save(0, 1, model)
        for value in model.state_dict().values():
            value.to_local().fill_(0)
        checkpointer.restore(model)
    lowest = theirs[dist.get_rank() % 2]
    for name in ("rows", "columns", "statistics"):
        assert torch.equal(local(model)[name], lowest[name])
    assert torch.equal(local(model)["whole"], theirs[0]["whole"])


def test_replicas_of_shards_are_compared(tmp_path: Path) -> None:
    texts = run(4, refuse_spread, tmp_path)
    assert len(set(texts)) == 1
    assert "3 tensors have different values" in str(texts[0])
    assert "'rows' (rank 0 has one value, rank 2 another)" in str(texts[0])
    assert "'whole' (rank 0 has one value, rank 1 another, rank 2 another, rank 3 another)" in str(texts[0])
    assert "statistics" not in str(texts[0])


def test_of_replicas_of_shards_the_lowest_is_saved_where_that_is_meant(tmp_path: Path) -> None:
    run(4, save_spread, tmp_path)


def save_nan(root: Path) -> None:
    model = nn.Linear(4, 4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    with engine(root, EVERY) as checkpointer:
        checkpointer.save(0, 1, model)
        model.bias.data.view(torch.int32)[0] ^= dist.get_rank()  # another NaN on rank 1
        assert "'bias'" in refused(lambda: checkpointer.save(0, 2, model))


def test_values_are_compared_by_their_bits(tmp_path: Path) -> None:
    run(2, save_nan, tmp_path)


def save_many(root: Path) -> str:
    torch.manual_seed(max(dist.get_rank(), 1))  # ranks 0 and 1 are alike, 2 is not
    model = nn.Sequential(*[nn.Linear(2, 2) for _ in range(10)])
    with engine(root, EVERY) as checkpointer:
        return refused(lambda: checkpointer.save(0, 1, model))


def test_few_of_many_tensors_are_named(tmp_path: Path) -> None:
    [text] = set(run(3, save_many, tmp_path))
    assert "20 tensors have different values" in str(text)
    assert "'0.bias' (ranks 0-1 have one value, rank 2 another)" in str(text)
    assert "; and 15 more" in str(text)


class Transposed(nn.BatchNorm1d):
    """Gives and takes its state in a way of its own: a weight of two columns, lying the other way round."""

    def __init__(self) -> None:
        super().__init__(8)
        torch.manual_seed(2)
        self.matrix = nn.Parameter(torch.randn(4, 3))

    def _save_to_state_dict(self, destination: dict[str, object], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}matrix"] = self.matrix.detach().T

    def _load_from_state_dict(self, state_dict: State, prefix: str, *others: object) -> None:
        state_dict[f"{prefix}matrix"] = state_dict[f"{prefix}matrix"].T
        super()._load_from_state_dict(state_dict, prefix, *others)  # type: ignore[arg-type]


def save_transposed(root: Path, settings: dict[str, object]) -> str:
    model = nn.Sequential(Transposed(), nn.Linear(8, 8))
    for parameter in model.parameters():
        dist.broadcast(parameter.data, 0)
    train_apart(model)
    theirs = of_every_rank(local(model))
    with engine(root, settings) as checkpointer:
        checkpointer.save(0, 1, model)
        for value in (*model.parameters(), *model.buffers()):
            value.data.fill_(7)
        checkpointer.restore(model)
        assert same(local(model), theirs[0])
        model[0].matrix.data[0, 0] = dist.get_rank()

        def save() -> None:
            checkpointer.save(0, 2, model)
            checkpointer.async_wait()

        return refused(save)


@pytest.mark.parametrize("settings", MODES)
def test_what_modules_make_in_ways_of_their_own_is_no_exception(tmp_path: Path, settings: dict[str, object]) -> None:
    [text] = set(run(2, save_transposed, tmp_path, settings))
    assert "a tensor has different values" in str(text)
    assert "'0.matrix' (rank 0 has one value, rank 1 another)" in str(text)


class Adapted(nn.Module):
    """A trained module saved beside LoRA factors, with statistics of each rank's own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.proj = nn.Linear(4, 4)
        self.head = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))


def save_adapter(root: Path) -> str:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(Adapted(), LoraConfig(target_modules=["proj"], modules_to_save=["head"]))
    dist.barrier()
    for parameter in model.parameters():
        dist.broadcast(parameter.data, 0)
    for name, buffer in model.named_buffers():
        buffer.fill_(dist.get_rank() + len(name))
    theirs = of_every_rank(buffers(model))
    with engine(root, {"is_peft": True}) as checkpointer:
        checkpointer.save(0, 1, model)
        for buffer in model.buffers():
            buffer.fill_(77)
        checkpointer.restore(model)
        restored = {name: value for name, value in buffers(model).items() if "modules_to_save" in name}
        assert restored
        assert same(restored, {name: theirs[0][name] for name in restored})
        factor = next(value for name, value in model.named_parameters() if "lora_B" in name)
        factor.data.fill_(dist.get_rank())
        return refused(lambda: checkpointer.save(0, 2, model))


def test_adapters_are_compared_as_models_are(tmp_path: Path) -> None:
    [text] = set(run(2, save_adapter, tmp_path))
    assert "lora_B.weight' (rank 0 has one value, rank 1 another)" in str(text)


# --- optimizers -------------------------------------------------------------------------------------------------------


def step(model: nn.Module, optimizer: torch.optim.Optimizer, value: float = 1) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, value)
    optimizer.step()


def save_moments(root: Path, settings: dict[str, object]) -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(model.parameters())
    step(model, optimizer)
    moments = optimizer.state[model.weight]["exp_avg"]
    first = moments.clone()
    moments.add_(dist.get_rank())
    with engine(root, settings) as checkpointer:

        def save() -> None:
            checkpointer.save(0, 1, model, optimizer)
            checkpointer.async_wait()

        text = refused(save)
        assert "a tensor has different values" in text
        assert "'state.weight.exp_avg' (rank 0 has one value, rank 1 another)" in text
    with engine(root, {**settings, "replicas": "first"}) as checkpointer:
        checkpointer.save(0, 1, model, optimizer)
        moments.fill_(9)
        checkpointer.restore(model, optimizer)
    assert torch.equal(optimizer.state[model.weight]["exp_avg"], first)


@pytest.mark.parametrize(
    "settings", [EVERY, {**EVERY, "is_async": True}, {**SHARDS, "model_save_format": "torch_save"}]
)
def test_optimizer_state_that_differs_is_an_error(tmp_path: Path, settings: dict[str, object]) -> None:
    run(2, save_moments, tmp_path, settings)


# --- values of each rank ----------------------------------------------------------------------------------------------


class ByHand(nn.Module):
    """Experts kept by hand, beside what the ranks have in common; some of them have never been trained."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.router = nn.Linear(4, 4)
        torch.manual_seed(20 + dist.get_rank())
        self.experts = nn.ModuleList([nn.Linear(4, 4), nn.BatchNorm1d(4)])
        nn.init.normal_(self.experts[1].running_mean)

    def train_once(self, optimizer: torch.optim.Optimizer) -> None:
        for parameter in self.router.parameters():
            parameter.grad = torch.ones_like(parameter)
        if dist.get_rank() > 0:
            for parameter in self.experts.parameters():
                parameter.grad = torch.full_like(parameter, float(dist.get_rank()))
        optimizer.step()


def of_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer) -> State:
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {f"{names[p]}.{key}": value.clone() for p, state in optimizer.state.items() for key, value in state.items()}


OWN = {"per_rank_state": ["experts.*"]}


def save_by_hand(root: Path, settings: dict[str, object]) -> None:
    model = ByHand()
    optimizer = torch.optim.AdamW(model.parameters())
    model.train_once(optimizer)
    before, moments = local(model), of_optimizer(model, optimizer)
    with engine(root, settings | OWN) as checkpointer:
        checkpointer.save(0, 1, model, optimizer)
        with torch.no_grad():
            for tensor in model.state_dict().values():
                tensor.zero_()
    fresh = ByHand()
    other = torch.optim.AdamW(fresh.parameters())
    with engine(root, settings) as checkpointer:  # what was saved for each rank is restored without being asked for
        checkpointer.restore(fresh, other)
    assert same(local(fresh), before)
    assert same(of_optimizer(fresh, other), moments)


class Warnings(logging.Handler):
    """Collects what is logged as a warning while it is there."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())

    def __enter__(self) -> Warnings:
        logging.getLogger("shardwise").addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        logging.getLogger("shardwise").removeHandler(self)


def restore_by_hand(root: Path, settings: dict[str, object]) -> tuple[State, list[str]]:
    model = ByHand()
    optimizer = torch.optim.AdamW(model.parameters())
    with Warnings() as warnings, engine(root, settings | OWN | {"save_rng": False}) as checkpointer:
        checkpointer.restore(model, optimizer)
    return local(model), warnings.texts


@pytest.mark.parametrize("settings", MODES)
def test_each_rank_gets_its_own_values_back_on_as_many_ranks(tmp_path: Path, settings: dict[str, object]) -> None:
    run(2, save_by_hand, tmp_path, settings)
    assert not verify(tmp_path / "run" / "epoch_0_step_1").damages
    places = {path.parent.name for path in tmp_path.rglob("rank_00001_of_00002.safetensors")}
    assert places == {"per_rank"}
    # On another number of ranks all have the lowest rank's, and one of them says so once.
    found = run(1, restore_by_hand, tmp_path, settings)
    [(state, warnings)] = found  # type: ignore[misc]
    own = load_file(tmp_path / "run/epoch_0_step_1/model/per_rank/rank_00000_of_00002.safetensors")
    assert {name for name in state if name.startswith("experts.")} == own.keys()
    assert same({name: state[name] for name in own}, own)
    [text] = [text for text in warnings if "each of 2 ranks" in text]
    assert "these are 1" in text
    assert "experts.0" in text


def misname(root: Path, model: Callable[[], nn.Module], patterns: list[str]) -> None:
    with engine(root, {**EVERY, "per_rank_state": patterns}) as checkpointer:
        checkpointer.save(0, 1, model())


def test_a_pattern_that_matches_nothing_is_an_error(tmp_path: Path) -> None:
    error = failure(2, misname, tmp_path, ByHand, ["experts.*", "expert.*"])
    assert isinstance(error, ConfigError)
    assert str(error).startswith("per_rank_state has 'expert.*', which matches no tensor")
    assert not list((tmp_path / "run").glob("epoch*"))


def shards() -> nn.Module:
    return fully_shard(nn.Linear(4, 4))


def test_what_is_sharded_is_not_saved_for_each_rank(tmp_path: Path) -> None:
    error = failure(2, misname, tmp_path, shards, ["weight"])
    assert isinstance(error, MisuseError)
    assert error.tensor == "weight"


def save_and_misfit(root: Path) -> None:
    with engine(root, EVERY | OWN) as checkpointer:
        checkpointer.save(0, 1, ByHand())
    model = ByHand()
    if dist.get_rank() == 1:
        path = root / "run/epoch_0_step_1/model/per_rank/rank_00001_of_00002.safetensors"
        path.write_bytes(path.read_bytes()[:-4])
    dist.barrier()
    before = local(model)
    with engine(root, EVERY | OWN) as checkpointer:
        with pytest.raises(ValueError, match="rank_00001_of_00002"):
            checkpointer.load_model(model, root / "run/epoch_0_step_1/model")
        assert same(local(model), before)


def test_a_damaged_file_of_one_rank_is_found_before_anything_is_overwritten(tmp_path: Path) -> None:
    run(2, save_and_misfit, tmp_path)


class Named(nn.Module):
    """Experts by hand under names of their own, of which each is on one rank."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(dist.get_rank())
        self.experts = nn.ModuleDict({str(dist.get_rank()): nn.Linear(4, 4)})


def save_named(root: Path) -> None:
    model = Named()
    before = local(model)
    with engine(root, EVERY) as checkpointer:
        checkpointer.save(0, 1, model)
        for parameter in model.parameters():
            parameter.data.zero_()
        checkpointer.restore(model)
    assert same(local(model), before)


def test_experts_under_names_of_their_own_need_no_setting(tmp_path: Path) -> None:
    run(2, save_named, tmp_path)


# --- cost -------------------------------------------------------------------------------------------------------------


def count_exchanges(root: Path, replicas: str) -> list[int]:
    calls: list[str] = []
    for name in ("all_reduce", "all_gather", "broadcast", "send", "recv"):
        collective = getattr(dist, name)

        def counting(*args: object, _call: Callable[..., object] = collective, **kwargs: object) -> object:
            calls.append("")
            return _call(*args, **kwargs)

        setattr(dist, name, counting)
    torch.manual_seed(0)
    model = nn.Linear(4, 4)
    counts = []
    with engine(root / replicas, {**EVERY, "replicas": replicas}) as checkpointer:
        for step in range(2):
            calls.clear()
            checkpointer.save(0, step, model)
            counts.append(len(calls))
    return counts


def test_comparing_takes_no_exchange_of_its_own(tmp_path: Path) -> None:
    counts = [run(2, count_exchanges, tmp_path, replicas) for replicas in ("compare", "first")]
    assert counts[0] == counts[1]
