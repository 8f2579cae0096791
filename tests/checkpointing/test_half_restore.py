"""A restore that is refused leaves everything as it was, on every rank: model, optimizer, generators, and the rest."""

from __future__ import annotations

import json
import logging
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tests.engine.setups import checkpointer, digest
from tests.support.faults import NamedHandles, is_tensor_data
from tests.support.ranks import run
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from shardwise import Checkpointer, CheckpointingConfig
from shardwise.errors import (
    CheckpointNotFoundError,
    DtypeMismatchError,
    MissingTensorError,
    MisuseError,
    ShapeMismatchError,
    ShardwiseError,
    StateFormatError,
    StorageError,
)

FORMATS = [
    pytest.param({"save_consolidated": "every"}, id="export"),
    pytest.param({"save_consolidated": "false"}, id="shards"),
    pytest.param({"save_consolidated": "false", "model_save_format": "torch_save"}, id="torch_save"),
]


class Loader:
    """Has a state, which it may refuse when it has taken half of it."""

    def __init__(self, position: int = 0, refuses: bool = False) -> None:
        self.position = position
        self.refuses = refuses

    def state_dict(self) -> dict[str, object]:
        return {"position": self.position}

    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        refuses, self.refuses = self.refuses, False
        self.position = state_dict["position"]  # type: ignore[assignment]
        if refuses:
            raise RuntimeError("made for another dataset")


@dataclass
class Training:
    """Everything that a run consists of."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    extra: dict[str, object] = field(default_factory=dict)

    def everything(self) -> dict[str, object]:
        """Every bit of it on this rank."""
        found: dict[str, object] = {name: _local(value) for name, value in self.model.state_dict().items()}
        for number, (param, state) in enumerate(self.optimizer.state.items()):
            assert any(param is each for group in self.optimizer.param_groups for each in group["params"])
            found |= {f"{number}.{key}": _local(value) for key, value in state.items()}
        options = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        extra = {k: v.state_dict() if isinstance(v, Loader) else v for k, v in self.extra.items()}
        drawn = (digest(torch.get_rng_state()), hash(random.getstate()))
        return found | {"": repr((options, self.scheduler.state_dict(), extra)), "drawn": drawn}


def _local(value: object) -> object:
    return digest(value.to_local() if isinstance(value, DTensor) else value) if torch.is_tensor(value) else value


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.1)


def training(
    seed: int, optimizer: Callable[[nn.Module], torch.optim.Optimizer] = adamw, dtype: torch.dtype = torch.float32
) -> Training:
    """One that has taken as many steps as its seed says."""
    torch.manual_seed(seed)
    random.seed(seed)
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 2)).to(dtype)
    if dist.get_world_size() > 1:
        fully_shard(model)
    made = optimizer(model)
    scheduler = torch.optim.lr_scheduler.StepLR(made, 1, gamma=0.9)
    for _ in range(seed):
        model(torch.ones(3, 6, dtype=dtype)).square().mean().backward()
        made.step()
        made.zero_grad()
        scheduler.step()
    extra = {"loader": Loader(seed), "notes": {"seed": seed}, "number": seed, "flags": [seed]}
    return Training(model, made, scheduler, extra)


def save(engine: Checkpointer) -> Path:
    before = training(2)
    path = engine.save(0, 2, before.model, before.optimizer, before.scheduler, extra_state=before.extra)
    assert path is not None
    return path


# --- one case after another -----------------------------------------------------------------------------------------

Call = Callable[[Checkpointer, Training, Path], object]


def plainly(engine: Checkpointer, now: Training, path: Path) -> object:
    return engine.restore(now.model, now.optimizer, now.scheduler, restore_from=path, extra_state=now.extra)


def on_rank(last: bool) -> bool:
    """Whether this rank is the one that misfits."""
    return not last or dist.get_rank() == dist.get_world_size() - 1


def copied(path: Path, name: str) -> Path:
    """A copy of the checkpoint, without its manifest, to be damaged by rank 0."""
    target = path.parent.parent / f"copy-{name}"
    if dist.get_rank() == 0:
        shutil.copytree(path, target)
        next(target.glob("*manifest*")).unlink()
    dist.barrier()
    return target


def damaged(name: str, *, damage: Callable[[Path], None], then: Call = plainly) -> Call:
    def call(engine: Checkpointer, now: Training, path: Path) -> object:
        target = copied(path, name)
        if dist.get_rank() == 0:
            damage(target)
        dist.barrier()
        return then(engine, now, target)

    return call


def rewritten(file: str, change: Callable[[dict[str, object]], None]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        document = json.loads((path / file).read_text())
        change(document["value"])
        (path / file).write_text(json.dumps(document))

    return damage


def refused_extra(last: bool) -> Call:
    def call(engine: Checkpointer, now: Training, path: Path) -> object:
        now.extra["loader"] = Loader(7, refuses=on_rank(last))
        now.extra["notes"] = {"mine": 1}
        DRAWN.append(now.everything())
        return plainly(engine, now, path)

    return call


def other_extra(engine: Checkpointer, now: Training, path: Path) -> object:
    if on_rank(True):
        now.extra["nobody"] = {}
    DRAWN.append(now.everything())
    return plainly(engine, now, path)


def other_optimizer(engine: Checkpointer, now: Training, path: Path) -> object:
    mine = now.optimizer if not on_rank(True) else sgd(now.model)
    return engine.restore(now.model, mine, restore_from=path)


def fewer_groups(engine: Checkpointer, now: Training, path: Path) -> object:
    other = training(1, lambda model: torch.optim.AdamW([{"params": [p]} for p in model.parameters()]))
    return engine.restore(now.model, now.optimizer, other.scheduler, restore_from=path, extra_state=now.extra)


def two_schedulers(engine: Checkpointer, now: Training, path: Path) -> object:
    both = [now.scheduler, torch.optim.lr_scheduler.StepLR(now.optimizer, 1)]
    return engine.restore(now.model, now.optimizer, both, restore_from=path, extra_state=now.extra)


def other_scheduler(engine: Checkpointer, now: Training, path: Path) -> object:
    had = [dict(group) for group in now.optimizer.param_groups]
    other = torch.optim.lr_scheduler.CosineAnnealingLR(now.optimizer, 10)
    for group, options in zip(now.optimizer.param_groups, had, strict=True):
        group.update(options)  # making a scheduler sets the learning rate
    return engine.restore(now.model, now.optimizer, other, restore_from=path, extra_state=now.extra)


def another_dtype(engine: Checkpointer, now: Training, path: Path) -> object:
    other = training(1, dtype=torch.bfloat16)
    now.model, now.optimizer, now.scheduler = other.model, other.optimizer, other.scheduler
    DRAWN.append(now.everything())
    return plainly(engine, now, path)


def another_shape(engine: Checkpointer, now: Training, path: Path) -> object:
    """The optimizer by itself, whose parameters have other shapes than when it was saved."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3))
    if dist.get_world_size() > 1:
        fully_shard(model)
    DRAWN.append(now.everything())
    return engine.load_optimizer(adamw(model), model, path)


#: What a case has made of the run before it asks for something.
DRAWN: list[dict[str, object]] = []


def older(document: dict[str, object]) -> None:
    """As releases wrote it that did not say which optimizer it was."""
    for key in ("shapes", "schedulers"):
        document.pop(key, None)
    for group in document["groups"]:  # type: ignore[attr-defined]
        group.pop("kind", None)


def renamed(document: dict[str, object]) -> None:
    """Says of the first parameter that it has a state which is in no file."""
    tensors: dict[str, dict[str, object]] = document["tensors"]  # type: ignore[assignment]
    state = next(iter(tensors.values()))
    state["exp_more"] = state["exp_avg"]


def gone(where: str) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        for found in path.glob(where):
            shutil.rmtree(found) if found.is_dir() else found.unlink()

    return damage


def broken(where: str) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        for found in path.glob(where):
            found.write_text(found.read_text()[:-9])

    return damage


STATE, SCHEDULE = "optim/optimizer.json", "optim/scheduler.json"

CASES: dict[str, tuple[type[ShardwiseError], str, Call]] = {
    "no optimizer": (CheckpointNotFoundError, "saved without an optimizer", damaged("a", damage=gone("optim"))),
    "no scheduler": (CheckpointNotFoundError, "saved without a scheduler", damaged("b", damage=gone(SCHEDULE))),
    "no extra state": (CheckpointNotFoundError, "no extra state 'loader'", damaged("c", damage=gone("extra/loader*"))),
    "extra state of one rank": (CheckpointNotFoundError, "no extra state 'nobody'", other_extra),
    "damaged optimizer": (StateFormatError, "", damaged("d", damage=broken(STATE))),
    "damaged scheduler": (StateFormatError, "", damaged("e", damage=broken(SCHEDULE))),
    "damaged extra state": (StateFormatError, "", damaged("f", damage=broken("extra/notes*.json"))),
    "damaged generators": (StateFormatError, "", damaged("g", damage=broken("rng/*.json"))),
    "refused extra state": (MisuseError, "made for another dataset", refused_extra(last=False)),
    "extra state that one rank refuses": (MisuseError, "made for another dataset", refused_extra(last=True)),
    "another optimizer on one rank": (
        MisuseError,
        "optimizer is AdamW and the one to be restored is SGD",
        other_optimizer,
    ),
    "another optimizer, older": (
        MisuseError,
        "optimizer is no SGD",
        damaged("h", damage=rewritten(STATE, older), then=other_optimizer),
    ),
    "absent state": (MissingTensorError, "exp_more", damaged("i", damage=rewritten(STATE, renamed))),
    "two schedulers": (MisuseError, "1 scheduler was saved and 2 are to be restored", two_schedulers),
    "another scheduler": (MisuseError, "scheduler is StepLR and the one to be restored is", other_scheduler),
    "a scheduler of other groups": (MisuseError, "1 parameter groups and the one", fewer_groups),
    "another dtype": (DtypeMismatchError, "dtype is BF16", another_dtype),
    "another shape": (ShapeMismatchError, "the parameter's shape is", another_shape),
}


def refuse_all(root: Path, settings: dict[str, object]) -> list[str]:
    """Everything that is wrong on this rank."""
    wrong: list[str] = []
    with checkpointer(root / "run", collective_timeout_seconds=60, **settings) as engine:
        path = save(engine)
        for name, (kind, says, call) in CASES.items():
            now = training(1)
            before = now.everything()
            DRAWN.clear()
            try:
                call(engine, now, path)
                wrong.append(f"{name}: nothing was refused")
            except ShardwiseError as error:
                if type(error) is not kind or says not in str(error) or "partly" in str(error):
                    wrong.append(f"{name}: {type(error).__name__}: {error}")
            wrong += _changed(name, DRAWN[0] if DRAWN else before, now.everything())
        now = training(1)
        plainly(engine, now, path)
        wrong += _changed("restored", training(2).everything(), now.everything())
    return wrong


def _changed(name: str, before: dict[str, object], after: dict[str, object]) -> list[str]:
    keys = before.keys() | after.keys()
    return [f"{name}: {key} changed" for key in sorted(keys) if before.get(key) != after.get(key)]


@pytest.mark.parametrize("settings", FORMATS)
@pytest.mark.parametrize("world", [1, 2])
def test_what_is_refused_changes_nothing(tmp_path: Path, world: int, settings: dict[str, object]) -> None:
    assert run(world, refuse_all, tmp_path, settings) == [[]] * world


# --- what cannot be foreseen, and what is left ----------------------------------------------------------------------


class Failing(NamedHandles):
    """Cannot read tensors any more once it is told so."""

    fails = False

    def read(self, handle: int, into: memoryview, offset: int) -> int:
        path = self.paths[handle]
        if self.fails and "model" in path.parts and is_tensor_data(path, offset):
            raise StorageError("Input/output error", hint="Check the disk.")
        return super().read(handle, into, offset)


def read_error(root: Path) -> str:
    storage = Failing()
    config = CheckpointingConfig(checkpoint_dir=root, save_consolidated="false")
    with Checkpointer(config, dist.get_rank(), 0, 0, storage=storage) as engine:
        path = save(engine)
        now = training(1)
        storage.fails = dist.get_rank() == 0
        try:
            plainly(engine, now, path)
        except StorageError as error:
            return str(error)
    return ""


def base_read_error(root: Path) -> str:
    storage = Failing()
    with Checkpointer(CheckpointingConfig(checkpoint_dir=root), storage=storage) as engine:
        path = save(engine)
        storage.fails = dist.get_rank() == 0
        try:
            engine.load_model(training(1).model, path / "model", is_init_step=True)
        except StorageError as error:
            return str(error)
    return ""


def left_over(root: Path) -> list[object]:
    messages: list[str] = []

    class Listening(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    logger, handler = logging.getLogger("shardwise"), Listening(logging.WARNING)
    logger.addHandler(handler)
    try:
        with checkpointer(root, save_consolidated="false") as engine:
            save(engine)
            now = training(1)
            first = engine.restore(now.model)
            second = engine.restore(now.model, now.optimizer, extra_state={"number": 0})
            third = engine.restore(now.model, now.optimizer, now.scheduler, extra_state=now.extra)
            half = training(1, lambda model: torch.optim.AdamW(list(model.parameters())[:1], lr=0.1))
            fourth = engine.restore(half.model, half.optimizer, half.scheduler, extra_state=half.extra)
    finally:
        logger.removeHandler(handler)
    told = [message for message in messages if "left as it is" in message]
    assert len(told) == (3 if dist.get_rank() == 0 else 0), messages
    assert all("optimizer, scheduler, flags, loader, notes, number" in message for message in told[:1])
    return [None if record is None else record.unrestored for record in (first, second, third, fourth)]


@pytest.mark.parametrize("world", [1, 2])
def test_what_is_not_asked_for_is_named(tmp_path: Path, world: int) -> None:
    found = run(world, left_over, tmp_path)
    assert all(each == found[0] for each in found)
    first, second, third, fourth = found[0]  # type: ignore[misc]
    assert first == ("optimizer", "scheduler", "flags", "loader", "notes", "number")
    assert second == ("scheduler", "flags", "loader", "notes")
    assert third == ()
    assert fourth == ("optimizer state of 0.bias, 1.bias, 1.weight",)


def without_optimizer(root: Path) -> bool:
    """The way to go on with another optimizer."""
    with checkpointer(root, save_consolidated="false") as engine:
        save(engine)
        now = training(1, sgd)
        had = now.everything()
        engine.restore(now.model, extra_state=now.extra)
    kept = now.everything()
    weights = all(
        torch.equal(a, b) for a, b in zip(now.model.parameters(), training(2).model.parameters(), strict=True)
    )
    return weights and all(kept[key] == had[key] for key in kept if key.endswith("momentum_buffer"))


def test_another_optimizer_starts_afresh_if_none_is_restored(tmp_path: Path) -> None:
    assert run(1, without_optimizer, tmp_path) == [True]


class Adam2(torch.optim.AdamW):
    """Of a name of its own."""


def known_again(root: Path) -> bool:
    """What an older checkpoint does not say is refused only where it is provably another's."""
    with checkpointer(root, save_consolidated="false") as engine:
        path = save(engine)
        now = training(1, lambda model: Adam2(model.parameters(), lr=0.1))
        damage = rewritten(STATE, older)
        damaged("z", damage=damage)(engine, now, path)
    return now.everything() == training(2).everything()


def test_an_older_checkpoint_that_may_be_of_this_optimizer(tmp_path: Path) -> None:
    assert run(1, known_again, tmp_path) == [True]


def test_a_file_that_cannot_be_read_is_said_to_leave_half(tmp_path: Path) -> None:
    said = run(2, read_error, tmp_path)
    assert said[0] == said[1]
    assert "the run's state is now partly overwritten" in said[0]  # type: ignore[operator]
    assert "Check the disk. Do not train on" in said[0]  # type: ignore[operator]


def uneven_schedulers(root: Path, first: int, second: int) -> list[dict[str, object]]:
    def make() -> tuple[Training, list[torch.optim.lr_scheduler.LRScheduler]]:
        now = training(1)
        count = (first, second)[dist.get_rank()]
        return now, [torch.optim.lr_scheduler.StepLR(now.optimizer, 100) for _ in range(count)]

    before, schedulers = make()
    for number, scheduler in enumerate(schedulers):
        for _ in range(number + dist.get_rank()):
            scheduler.step()
    with checkpointer(root, save_consolidated="false") as engine:
        engine.save(0, 1, before.model, before.optimizer, schedulers)
        after, restored = make()
        engine.restore(after.model, after.optimizer, restored)
    assert [each.state_dict() for each in restored] == [each.state_dict() for each in schedulers]
    return [each.state_dict() for each in restored]


@pytest.mark.parametrize(("first", "second"), [(1, 2), (0, 1)])
def test_schedulers_that_only_some_ranks_have_are_not_lost(tmp_path: Path, first: int, second: int) -> None:
    found = run(2, uneven_schedulers, tmp_path, first, second)
    assert [len(states) for states in found] == [first, second]  # type: ignore[arg-type]


def test_a_base_that_cannot_be_read_is_said_to_leave_half(tmp_path: Path) -> None:
    said = run(2, base_read_error, tmp_path)
    assert said[0] == said[1]
    assert "the model is now partly overwritten" in said[0]  # type: ignore[operator]
