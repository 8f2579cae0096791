"""Averages of a model: a part of the checkpoint with an export of its own, or sharded extra state."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tests.checkpointing.modes import EVERY, MODES, SHARDS
from tests.support.ranks import failure, run
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor.placement_types import Replicate, Shard
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from shardwise import Checkpointer, CheckpointingConfig
from shardwise.errors import CheckpointNotFoundError, MisuseError, UnexpectedTensorError
from shardwise.ops.verify import verify


def engine(root: Path, **settings: object) -> Checkpointer:
    config = CheckpointingConfig(checkpoint_dir=str(root), **({**SHARDS, **settings}))  # type: ignore[arg-type]
    return config.build()


def llama(seed: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": 32}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2))


def both(seed: int) -> tuple[nn.Module, AveragedModel]:
    model, averaged = llama(seed), AveragedModel(llama(seed + 1), multi_avg_fn=get_ema_multi_avg_fn(0.9))
    if dist.get_world_size() > 1:
        fully_shard(model)
        fully_shard(averaged.module)
    return model, averaged


def whole(module: nn.Module) -> dict[str, list[float]]:
    state = module.state_dict()
    return {k: (v.full_tensor() if isinstance(v, DTensor) else v).double().flatten().tolist() for k, v in state.items()}


def save(root: Path, settings: dict[str, object]) -> object:
    model, averaged = both(0)
    with engine(root, **settings) as checkpointer:
        for step in (1, 2, 3):
            averaged.update_parameters(model)
            checkpointer.save(0, step, model, ema=averaged, is_final_checkpoint=step == 3)
        saved = whole(averaged)
        with torch.no_grad():
            for param in averaged.parameters():
                param.zero_()  # what an asynchronous save must not see
    return saved


def load(root: Path, settings: dict[str, object]) -> object:
    model, averaged = both(5)
    with engine(root, **settings) as checkpointer:
        record = checkpointer.restore(model, ema=averaged, verify="digests")
        assert record is not None
        assert record.unrestored == ()
        left = checkpointer.restore(model)
        assert left is not None
        assert "ema" in left.unrestored
    return whole(averaged)


@pytest.mark.parametrize("settings", MODES)
def test_an_average_is_saved_as_the_model_is_and_comes_back_on_any_number_of_ranks(
    tmp_path: Path, settings: dict[str, object]
) -> None:
    from transformers import LlamaForCausalLM

    settings = {**settings, "max_recent_checkpoints": 2}
    [saved] = run(1, save, tmp_path, settings)
    assert saved["n_averaged"] == [3.0]  # type: ignore[index]
    assert run(2, load, tmp_path, settings) == [saved, saved]
    assert [path.name for path in sorted(tmp_path.glob("epoch*"))] == ["epoch_0_step_2", "epoch_0_step_3"]
    assert verify(tmp_path).status == "whole"
    path = tmp_path / "epoch_0_step_3" / "model_ema"
    if settings["save_consolidated"] == "every":
        files = {file.name for file in (path.parent / "model" / "consolidated").iterdir()}
        assert files == {file.name for file in (path / "consolidated").iterdir()}
        opened = {f"module.{k}": v for k, v in whole(LlamaForCausalLM.from_pretrained(path / "consolidated")).items()}
        assert opened == {k: v for k, v in saved.items() if k != "n_averaged"}  # type: ignore[attr-defined]
        damaged = next(path.glob("consolidated/*.safetensors"))
        damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
        assert verify(tmp_path).status == "damaged"


def test_an_average_of_an_adapter_is_an_adapter(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")

    def make(seed: int) -> nn.Module:
        options = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        torch.manual_seed(seed)
        return peft.get_peft_model(llama(0), options)  # type: ignore[no-any-return]

    def lora(module: nn.Module) -> dict[str, list[float]]:
        return {name: values for name, values in whole(module).items() if "lora" in name}

    averaged = AveragedModel(make(1))
    averaged.update_parameters(make(2))
    engine(tmp_path, is_peft=True).save(0, 1, make(3), ema=averaged)
    fresh = AveragedModel(make(4))
    engine(tmp_path, is_peft=True).restore(make(5), ema=fresh)
    assert (lora(fresh), int(fresh.n_averaged)) == (lora(averaged), 1)
    assert (tmp_path / "epoch_0_step_1" / "model_ema" / "adapter_model.safetensors").is_file()


def test_names_of_an_average_are_mapped_as_the_models_are(tmp_path: Path) -> None:
    saved = nn.ModuleDict({"old": nn.Linear(3, 2)}), nn.ModuleDict({"old": nn.Linear(3, 2)})
    model, average = nn.ModuleDict({"new": nn.Linear(3, 2)}), nn.ModuleDict({"new": nn.Linear(3, 2)})
    with engine(tmp_path) as checkpointer:
        checkpointer.save(step=1, model=saved[0], ema=saved[1])
        checkpointer.restore(model, ema=average, key_mapping={"^old": "new"})
    for before, after in zip(saved, (model, average), strict=True):
        assert torch.equal(before["old"].weight, after["new"].weight)  # type: ignore[arg-type]


def parts_of_one_rank(seed: int) -> tuple[list[nn.Module], list[AveragedModel]]:
    torch.manual_seed(seed)
    parts: list[nn.Module] = [nn.ModuleDict({name: nn.Linear(3, 2)}) for name in ("first", "second")]
    return parts, [AveragedModel(part) for part in parts]


def test_the_count_of_each_part_comes_back(tmp_path: Path) -> None:
    (model, averages), (other, again) = parts_of_one_rank(0), parts_of_one_rank(1)
    with engine(tmp_path) as checkpointer:
        for _ in range(3):
            for average, part in zip(averages, model, strict=True):
                average.update_parameters(part)
        checkpointer.save(step=1, model=model, ema=averages)
        checkpointer.restore(other, ema=again)
        assert [average.n_averaged.item() for average in again] == [3, 3]
        averages[1].update_parameters(model[1])
        with pytest.raises(MisuseError, match="different values of n_averaged"):
            checkpointer.save(step=2, model=model, ema=averages)


def test_an_average_that_was_not_saved(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    averaged = AveragedModel(model)
    engine(tmp_path).save(0, 1, model)
    with pytest.raises(CheckpointNotFoundError, match="saved without an ema"):
        engine(tmp_path).restore(model, ema=averaged)
    engine(tmp_path).save(0, 2, model, ema=averaged.module)
    with pytest.raises(CheckpointNotFoundError, match="no n_averaged of the averaged model"):
        engine(tmp_path).restore(model, ema=averaged)
    engine(tmp_path).restore(model, ema=nn.Linear(2, 2))


# --- as extra state -------------------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width))


class Averages:
    """Keeps averages of a model's parameters, and how many there were."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.tensors, self.count, self.loads = tensors, 0, 0

    def state_dict(self) -> dict[str, object]:
        return {"count": self.count, "averages": [dict(self.tensors)]}

    def load_state_dict(self, state: dict[str, object]) -> None:
        self.count, self.loads = int(state["count"]), self.loads + 1  # type: ignore[call-overload]
        for name, value in state["averages"][0].items():  # type: ignore[index]
            self.tensors[name].copy_(value)


def sharded(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    rows = {"a/b": (5, 2), "c": (3,), "d": ()}
    return {
        name: distribute_tensor(
            torch.randn(shape, generator=generator), mesh, [Shard(0) if shape else Replicate()], src_data_rank=None
        )
        for name, shape in rows.items()
    }


def extras(seed: int) -> dict[str, object]:
    torch.manual_seed(seed)
    net, averaged = Net(), AveragedModel(Net(), use_buffers=True)
    if dist.get_world_size() > 1:
        fully_shard(net)
        fully_shard(averaged.module)
    kept = Averages(sharded(seed + 1))
    if not seed:
        averaged.update_parameters(net)
        kept.count = 7
    mixed = {"tensors": {0: sharded(seed + 2)["c"], "x": (sharded(seed + 3)["a/b"], 4 + seed)}, "plain": torch.ones(2)}
    return {"net": net, "averaged": averaged, "kept": kept, "mixed": mixed, "number": 3 + seed}


def seen(extra: dict[str, object]) -> list[object]:
    mixed, kept = extra["mixed"], extra["kept"]
    assert isinstance(kept, Averages)
    tensors = {**kept.tensors, "0": mixed["tensors"][0], "x": mixed["tensors"]["x"][0]}  # type: ignore[index]
    found = {name: value.full_tensor().flatten().tolist() for name, value in tensors.items()}
    modules = [whole(extra[name]) for name in ("net", "averaged")]  # type: ignore[arg-type]
    return [*modules, found, kept.count, mixed["tensors"]["x"][1], mixed["plain"].tolist(), extra["number"]]  # type: ignore[index]


def extra_state(root: Path, is_async: bool, restores: bool) -> list[object]:
    model, extra = nn.Linear(2, 2), extras(9 if restores else 0)
    if dist.get_world_size() > 1:
        fully_shard(model)
    with engine(root, is_async=is_async, **(EVERY if is_async else {})) as checkpointer:
        if not restores:
            checkpointer.save(0, 1, model, extra_state=extra)
            saved = seen(extra)
            with torch.no_grad():
                for name in ("net", "averaged"):
                    for param in extra[name].parameters():  # type: ignore[attr-defined]
                        param.zero_()
                for value in extra["kept"].tensors.values():  # type: ignore[attr-defined]
                    value.zero_()
            return saved
        record = checkpointer.restore(model, extra_state=extra, verify="digests")
        assert record is not None
        assert set(record.unrestored) <= {"rng"}
        assert extra["kept"].loads == 1  # type: ignore[attr-defined]
        return seen(extra)


@pytest.mark.parametrize(("first", "second", "is_async"), [(2, 1, True), (1, 2, False), (2, 3, False)])
def test_sharded_extra_state_comes_back_on_any_number_of_ranks(
    tmp_path: Path, first: int, second: int, is_async: bool
) -> None:
    saved = run(first, extra_state, tmp_path, is_async, False)
    assert saved == [saved[0]] * first
    assert run(second, extra_state, tmp_path, False, True) == [saved[0]] * second
    assert verify(tmp_path).status == "whole"


def other_extra(root: Path, what: str) -> None:
    torch.manual_seed(0)  # other tests may have left the ranks different generators
    model, extra = nn.Linear(2, 2), extras(0)
    with engine(root) as checkpointer:
        checkpointer.save(0, 1, model, extra_state=extra)
        if what == "fewer":
            extra = {"kept": Averages({"c": sharded(0)["c"]})}
        elif what == "no module":
            extra = {"net": {"weight": 1}}
        elif what == "one rank" and dist.get_rank() == 1:
            extra = {"number": 1}
        checkpointer.restore(model, extra_state=extra)


@pytest.mark.parametrize(
    ("what", "kind", "says"),
    [
        ("fewer", UnexpectedTensorError, "averages/#0/a%2Fb"),
        ("no module", MisuseError, "extra state 'net' was saved of a module, and a dict is to be restored"),
        ("one rank", MisuseError, "is a module that all ranks restore together, and rank 1 passed none"),
    ],
)
def test_extra_state_that_does_not_fit_is_refused(tmp_path: Path, what: str, kind: type[Exception], says: str) -> None:
    error = failure(2, other_extra, tmp_path, what)
    assert isinstance(error, kind)
    assert says in str(error)


class Counter(nn.Module):
    """A metric that each rank counts for itself."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.register_buffer("value", torch.tensor(value))


def counted(root: Path, restores: bool) -> float:
    model, counter = nn.Linear(2, 2), Counter(-1.0 if restores else float(dist.get_rank()))
    nn.init.ones_(model.weight)
    nn.init.ones_(model.bias)
    with engine(root) as checkpointer:
        if restores:
            checkpointer.restore(model, extra_state={"counter": counter})
        else:
            checkpointer.save(0, 1, model, extra_state={"counter": counter})
    return counter.value.item()


def test_a_module_of_each_ranks_own_is_each_ranks_own(tmp_path: Path) -> None:
    run(2, counted, tmp_path, False)
    assert run(2, counted, tmp_path, True) == [0.0, 1.0]
