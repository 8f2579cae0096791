"""Whole checkpoints: what is restored beside weights, what is kept, what is refused."""

from __future__ import annotations

import json
import random
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from tests.engine.setups import Run, build, checkpointer, fsdp, plain
from tests.support.ranks import failure, run

from shardwise import Checkpointer, CheckpointingConfig
from shardwise.errors import (
    CheckpointExistsError,
    CheckpointNotFoundError,
    MisuseError,
    StateFormatError,
)


class Loader:
    """A dataloader with a state."""

    def __init__(self, position: int = 0) -> None:
        self.position = position

    def state_dict(self) -> dict[str, object]:
        return {"position": self.position, "seen": torch.arange(self.position)}

    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        self.position = state_dict["position"]  # type: ignore[assignment]
        assert torch.equal(state_dict["seen"], torch.arange(self.position))  # type: ignore[arg-type]


def fresh(seed: int = 0) -> Run:
    return build(plain, seed)


# --- extra state and random numbers ---------------------------------------------------------------------------------


def save_extra(root: Path) -> None:
    rank = dist.get_rank()
    extra = {"loader": Loader(5), "own": {"rank": rank, "half": 0.5}, "same": {"list": [1, (2, 3)]}, "number": 41}
    with checkpointer(root, save_consolidated="false") as engine:
        engine.save(1, 2, fresh().model, extra_state=extra)


def load_extra(root: Path) -> tuple[object, ...]:
    loader, own = Loader(), {"old": True}
    extra: dict[str, object] = {"loader": loader, "own": own, "same": {}, "number": 0}
    with checkpointer(root) as engine:
        record = engine.restore(fresh(1).model, extra_state=extra)
    assert record is not None
    return loader.position, own, extra["same"], extra["number"], [n for n in record.unrestored if n != "rng"]


def test_extra_state_comes_back(tmp_path: Path) -> None:
    run(3, save_extra, tmp_path)
    same = {"list": [1, (2, 3)]}
    want = [(5, {"rank": rank, "half": 0.5}, same, 41, []) for rank in range(3)]
    assert run(3, load_extra, tmp_path) == want
    # On another number of ranks, what differed between ranks stays as it is, and the caller is told.
    assert run(2, load_extra, tmp_path) == [(5, {"old": True}, same, 41, ["own"])] * 2


def load_absent(root: Path) -> None:
    with checkpointer(root) as engine:
        engine.restore(fresh().model, extra_state={"nobody": {}})


def test_extra_state_that_was_not_saved(tmp_path: Path) -> None:
    run(2, save_extra, tmp_path)
    error = failure(2, load_absent, tmp_path)
    assert isinstance(error, CheckpointNotFoundError)
    assert "'nobody'" in str(error)


def save_odd(root: Path, kind: str) -> None:
    odd: object = [len] if kind == "function" else defaultdict(list, {"a": [1]})
    value = {"fine": 1, "deep": odd} if dist.get_rank() == 1 else {"fine": 1}
    with checkpointer(root) as engine:
        engine.save(0, 0, fresh().model, extra_state={"odd": value})


@pytest.mark.parametrize("kind", ["function", "defaultdict"])
def test_what_cannot_be_stored_is_refused_on_every_rank(tmp_path: Path, kind: str) -> None:
    error = failure(2, save_odd, tmp_path, kind)
    assert isinstance(error, StateFormatError)
    assert "'odd'" in str(error)
    assert "deep" in str(error)
    assert [p.name for p in tmp_path.iterdir()] == []


def draws() -> tuple[float, float, float]:
    return float(torch.rand(())), random.random(), float(np.random.rand())


def save_random(root: Path) -> tuple[float, ...]:
    torch.manual_seed(dist.get_rank())
    random.seed(dist.get_rank())
    np.random.seed(dist.get_rank())
    model = fresh().model
    torch.manual_seed(dist.get_rank() + 100)
    with checkpointer(root) as engine:
        engine.save(0, 0, model)
    return draws()


def load_random(root: Path) -> tuple[tuple[float, ...], tuple[str, ...]]:
    with checkpointer(root) as engine:
        record = engine.restore(fresh(1).model)
    assert record is not None
    return draws(), record.unrestored


def test_random_numbers_go_on_where_they_were(tmp_path: Path) -> None:
    want = run(2, save_random, tmp_path)
    assert want[0] != want[1]
    assert run(2, load_random, tmp_path) == [(drawn, ()) for drawn in want]
    assert [unrestored for _, unrestored in run(3, load_random, tmp_path)] == [("rng",)] * 3  # type: ignore[misc]


def rank_states(root: Path) -> tuple[object, ...]:
    """Two data-parallel ranks of two tensor-parallel ranks each."""
    dp, tp = divmod(dist.get_rank(), 2)
    config = CheckpointingConfig(checkpoint_dir=root)
    with config.build(dp_rank=dp, tp_rank=tp, pp_rank=0) as engine:
        engine.save_on_dp_ranks(Loader(10 + dp if tp == 0 else 99), "dataloader", root)
        engine.save_on_global_ranks(Loader(dist.get_rank()), "rng", root)
        mine, own = Loader(), Loader()
        engine.load_on_dp_ranks(mine, "dataloader", root)
        engine.load_on_global_ranks(own, "rng", root)
    return mine.position, own.position


def test_states_of_ranks(tmp_path: Path) -> None:
    assert run(4, rank_states, tmp_path) == [(10, 0), (10, 1), (11, 2), (11, 3)]
    assert len(list((tmp_path / "dataloader").glob("*.json"))) == 2
    assert len(list((tmp_path / "rng").glob("*.json"))) == 4


def load_too_many(root: Path) -> None:
    with CheckpointingConfig(checkpoint_dir=root).build(dist.get_rank(), 0, 0) as engine:
        engine.load_on_dp_ranks(Loader(), "dataloader", root)


def test_a_rank_state_that_was_not_saved(tmp_path: Path) -> None:
    run(4, rank_states, tmp_path)
    error = failure(3, load_too_many, tmp_path)
    assert isinstance(error, CheckpointNotFoundError)
    assert error.rank == 2


# --- optimizers and schedulers --------------------------------------------------------------------------------------


def sgd(momentum: float, root: Path) -> bool:
    def optimizer(model: torch.nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=0.01, momentum=momentum)

    before = build(fsdp, 0, optimizer)
    before.step()
    with checkpointer(root) as engine:
        engine.save(0, 1, before.model, before.optimizer, before.scheduler)
        after = build(fsdp, 1, optimizer)
        engine.restore(after.model, after.optimizer, after.scheduler)
    same = after.digests() == before.digests()
    return same and [before.step(), before.step()] == [after.step(), after.step()]


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_resumes(tmp_path: Path, momentum: float) -> None:
    assert run(3, sgd, momentum, tmp_path) == [True] * 3


def two_optimizers(root: Path) -> object:
    def make(seed: int) -> tuple[torch.nn.Module, list[torch.optim.Optimizer], list[object]]:
        torch.manual_seed(seed)
        model = fsdp(fresh(seed).model)  # type: ignore[arg-type]
        matrices = [p for p in model.parameters() if p.dim() > 1]
        vectors = [p for p in model.parameters() if p.dim() <= 1]
        optimizers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(matrices, lr=0.01),
            torch.optim.SGD(vectors, lr=0.1, momentum=0.5),
        ]
        schedulers = [
            torch.optim.lr_scheduler.StepLR(optimizers[0], 1, gamma=0.5),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizers[1], 10),
        ]
        return model, optimizers, schedulers  # type: ignore[return-value]

    def step(model: torch.nn.Module, optimizers: list[torch.optim.Optimizer], schedulers: list[object]) -> list[float]:
        loss = model(torch.arange(20).view(2, 10))
        loss.backward()
        for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()  # type: ignore[attr-defined]
        return [float(loss), *(o.param_groups[0]["lr"] for o in optimizers)]

    before, after = make(0), make(1)
    step(*before)
    with checkpointer(root) as engine:
        engine.save(0, 1, *before)  # type: ignore[arg-type]
        engine.restore(*after)  # type: ignore[arg-type]
    return [step(*before) for _ in range(2)] == [step(*after) for _ in range(2)]


def test_several_optimizers_and_schedulers(tmp_path: Path) -> None:
    assert run(2, two_optimizers, tmp_path) == [True, True]


def other_groups(root: Path, what: str) -> None:
    training = build(fsdp, 0)
    training.step()
    with checkpointer(root) as engine:
        engine.save(0, 1, training.model, training.optimizer)
        model = build(fsdp, 1).model
        parameters = list(model.parameters())
        if what == "joined":
            engine.restore(model, torch.optim.AdamW(parameters))
        elif what == "scheduler":
            optimizer = build(fsdp, 1).optimizer
            engine.restore(training.model, training.optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 1))
        else:
            engine.restore(build(fsdp, 2).model, torch.optim.AdamW(parameters))


@pytest.mark.parametrize(
    ("what", "kind", "says"),
    [
        ("joined", MisuseError, "different options"),
        ("scheduler", CheckpointNotFoundError, "without a scheduler"),
        ("foreign", MisuseError, "does not have"),
    ],
)
def test_an_optimizer_that_does_not_fit(tmp_path: Path, what: str, kind: type[Exception], says: str) -> None:
    error = failure(2, other_groups, tmp_path, what)
    assert isinstance(error, kind)
    assert says in str(error)


# --- names, pointers, retention -------------------------------------------------------------------------------------


def several(root: Path, losses: list[float]) -> list[object]:
    model = fresh().model
    with checkpointer(root, best_metric_key="loss", max_recent_checkpoints=2, save_consolidated="false") as engine:
        paths = [engine.save(0, step, model, metrics={"loss": loss}) for step, loss in enumerate(losses)]
        found = [engine.restore(model, restore_from=where) for where in ("LATEST", "LOWEST_VAL", "epoch_0_step_3")]
        found.append(engine.restore(model, restore_from=root / "epoch_0_step_3"))
    assert paths == [root / f"epoch_0_step_{step}" for step in range(len(losses))]
    return [(record.step, dict(record.metrics)) for record in found if record is not None]


def test_pointers_metrics_and_retention(tmp_path: Path) -> None:
    losses = [4.0, 1.0, 3.0, 2.0, 5.0]
    want = [(4, {"loss": 5.0}), (1, {"loss": 1.0}), (3, {"loss": 2.0}), (3, {"loss": 2.0})]
    assert run(2, several, tmp_path, losses) == [want, want]
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["LATEST", "LOWEST_VAL", "epoch_0_step_1", "epoch_0_step_3", "epoch_0_step_4"]
    assert (tmp_path / "LATEST").readlink() == Path("epoch_0_step_4")
    assert json.loads((tmp_path / "LATEST" / "losses.json").read_text()) == {"loss": 5.0}
    again = CheckpointingConfig.from_yaml(tmp_path / "LATEST" / "config.yaml")
    assert (again.best_metric_key, again.max_recent_checkpoints) == ("loss", 2)


def save_again(root: Path) -> None:
    with checkpointer(root) as engine:
        engine.save(0, 7, fresh().model)
        engine.save(0, 7, fresh(1).model)


def test_a_published_checkpoint_is_never_overwritten(tmp_path: Path) -> None:
    error = failure(3, save_again, tmp_path)
    assert isinstance(error, CheckpointExistsError)
    assert isinstance(error, FileExistsError)
    assert "epoch_0_step_7" in str(error)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["LATEST", "epoch_0_step_7"]


def save_once(root: Path) -> None:
    with checkpointer(root) as engine:
        engine.save(0, 7, fresh().model)


def test_leftovers_of_an_interrupted_save_are_replaced(tmp_path: Path) -> None:
    for name in (".saving-epoch_0_step_7", ".saving-epoch_0_step_3", ".doomed-epoch_0_step_1"):
        (tmp_path / name / "model").mkdir(parents=True)
        (tmp_path / name / "model" / "shard-00009-model-00001-of-00001.safetensors").write_bytes(b"half")
    (tmp_path / "epoch_0_step_7" / "optim").mkdir(parents=True)  # published by nobody
    run(2, save_once, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["LATEST", "epoch_0_step_7"]
    assert not list(tmp_path.rglob("shard-00009*"))


def bad_metrics(root: Path) -> None:
    with checkpointer(root) as engine:
        engine.save(0, 7, fresh().model, metrics={"loss": "low"})  # type: ignore[dict-item]


def test_metrics_are_numbers(tmp_path: Path) -> None:
    error = failure(2, bad_metrics, tmp_path)
    assert isinstance(error, MisuseError)
    assert "'low'" in str(error)
    assert list(tmp_path.iterdir()) == []


def not_finite(root: Path) -> dict[str, float]:
    with checkpointer(root, best_metric_key="loss") as engine:
        engine.save(0, 1, fresh().model, metrics={"loss": float("nan"), "lr": 0.1})
        record = engine.restore(fresh().model)
    assert record is not None
    return dict(record.metrics)


def test_metrics_that_are_not_finite_do_not_make_the_best(tmp_path: Path) -> None:
    assert run(1, not_finite, tmp_path) == [{"lr": 0.1}]
    assert not (tmp_path / "LOWEST_VAL").exists()


@pytest.mark.parametrize(("epoch", "step"), [(-1, 0), (0, -1), (0, 1.5), (True, 1)])
def test_epochs_and_steps_are_whole_numbers(tmp_path: Path, epoch: int, step: int) -> None:
    engine = Checkpointer(CheckpointingConfig(checkpoint_dir=tmp_path))
    with pytest.raises(MisuseError):
        engine.save(epoch, step, torch.nn.Linear(2, 2))


# --- life of the object ---------------------------------------------------------------------------------------------


def disabled(root: Path) -> object:
    with checkpointer(root, enabled=False) as engine:
        saved = engine.save(0, 1, fresh().model)
        engine.save_model(fresh().model, root)
        engine.save_optimizer(fresh().optimizer, fresh().model, root)
    return saved


def test_disabled_means_no_files(tmp_path: Path) -> None:
    assert run(2, disabled, tmp_path / "root") == [None, None]
    assert not (tmp_path / "root").exists()


def finalize_twice(root: Path) -> bool:
    engine = checkpointer(root)
    engine.finalize()
    engine.save(0, 1, fresh().model)
    engine.finalize()
    engine.close()
    engine.save(0, 2, fresh().model)  # it may be used again
    engine.close()
    return engine.restore(fresh().model) is not None


def test_finalize_twice(tmp_path: Path) -> None:
    assert run(2, finalize_twice, tmp_path) == [True, True]


def test_without_a_process_group(tmp_path: Path) -> None:
    """One process that never heard of torch.distributed."""
    model, other = torch.nn.Linear(3, 4), torch.nn.Linear(3, 4)
    with CheckpointingConfig(checkpoint_dir=tmp_path, save_consolidated="every").build() as engine:
        engine.save(0, 1, model)
        engine.restore(other)
    assert torch.equal(model.weight, other.weight)
    assert torch.equal(model.bias, other.bias)


def components(root: Path) -> bool:
    before, after = build(fsdp, 0), build(fsdp, 1)
    before.step()
    with checkpointer(root, save_consolidated="every") as engine:
        for _ in range(2):  # a second save of a component replaces the first
            engine.save_model(before.model, root)
            engine.save_optimizer(before.optimizer, before.model, root, before.scheduler)
        engine.load_model(after.model, root / "model")
        engine.load_optimizer(after.optimizer, after.model, root, after.scheduler)
    return before.digests() == after.digests() and before.options() == after.options()


def test_components_by_themselves(tmp_path: Path) -> None:
    assert run(2, components, tmp_path) == [True, True]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "optim"]


def mapped(root: Path) -> bool:
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 3)})
    other = torch.nn.ModuleDict({"b": torch.nn.Linear(2, 3), "head": torch.nn.Linear(3, 3)})
    kept = other["head"].weight.detach().clone()
    with checkpointer(root, save_consolidated="every") as engine:
        engine.save_model(model, root)
        engine.load_model(other, root / "model", key_mapping={r"^a\.": "b."}, allow_checkpoint_key_subset=True)
    return torch.equal(model["a"].weight, other["b"].weight) and torch.equal(kept, other["head"].weight)


def test_key_mapping_and_a_subset(tmp_path: Path) -> None:
    assert run(1, mapped, tmp_path) == [True]


def skipped(root: Path) -> bool:
    torch.manual_seed(0)
    base = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 3), "gone": torch.nn.Linear(1, 1)})
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 3, dtype=torch.bfloat16), "head": torch.nn.Linear(3, 3)})
    kept = model["head"].weight.detach().clone()
    with checkpointer(root, save_consolidated="every", skip_task_head_prefixes_for_base_model=["head."]) as engine:
        engine.save_model(base, root)
        engine.load_model(model, root / "model" / "consolidated", is_init_step=True)
    cast = base["a"].weight.to(torch.bfloat16)
    return torch.equal(cast, model["a"].weight) and torch.equal(kept, model["head"].weight)


def test_a_base_model_is_cast_and_task_heads_keep_their_values(tmp_path: Path) -> None:
    assert run(1, skipped, tmp_path) == [True]


def meta_model(root: Path) -> None:
    torch.manual_seed(0)
    with checkpointer(root) as engine:
        engine.save_model(torch.nn.Linear(2, 2), root)
        with torch.device("meta"):
            model = torch.nn.Linear(2, 2)
        engine.load_model(model, root / "model")


def test_a_model_without_memory_is_refused(tmp_path: Path) -> None:
    error = failure(2, meta_model, tmp_path)
    assert isinstance(error, MisuseError)
    assert "meta" in str(error)
