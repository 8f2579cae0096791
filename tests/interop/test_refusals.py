"""What of others' checkpoints is not understood is refused on every rank, and changes nothing."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from tests.engine.setups import checkpointer
from tests.interop.runs import Run, adamw, sgd
from tests.support.ranks import run
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from shardwise import Checkpointer
from shardwise.errors import (
    CheckpointNotFoundError,
    FormatError,
    MissingTensorError,
    MisuseError,
    ShardwiseError,
    UnexpectedTensorError,
    UnsafePickleError,
)


def save(path: Path, layout: str, change: Callable[[Run, dict[str, object]], None]) -> None:
    there = Run(seed=0)
    there.steps(0, 2)
    state = there.state(layout)
    change(there, state)
    dcp.save(state, checkpoint_id=str(path))


def refused(path: Path, optimizer: Callable[[nn.Module], torch.optim.Optimizer], how: str) -> tuple[object, ...]:
    here = Run(seed=1, optimizer=optimizer)
    here.steps(0, 1)
    before = here.everything()
    try:
        with checkpointer(path.parent) as engine:
            HOWS[how](engine, here, path)
    except ShardwiseError as error:
        assert before == here.everything()
        return type(error), str(error)
    raise AssertionError("it was restored")


def restores(engine: Checkpointer, here: Run, path: Path) -> None:
    engine.restore(here.net, here.optimizer, here.scheduler, restore_from=path)


def with_extra(engine: Checkpointer, here: Run, path: Path) -> None:
    extra: dict[str, object] = {"counters": here.counters}
    engine.restore(here.net, here.optimizer, restore_from=path, extra_state=extra)


def optimizer_alone(engine: Checkpointer, here: Run, path: Path) -> None:
    engine.load_optimizer(here.optimizer, here.net, path)


def with_another_scheduler(engine: Checkpointer, here: Run, path: Path) -> None:
    scheduler = torch.optim.lr_scheduler.StepLR(torch.optim.SGD(nn.Linear(1, 1).parameters()), 3)
    engine.restore(here.net, here.optimizer, scheduler, restore_from=path)


def with_two_schedulers(engine: Checkpointer, here: Run, path: Path) -> None:
    engine.restore(here.net, here.optimizer, [here.scheduler, here.scheduler], restore_from=path)


HOWS = {
    each.__name__: each for each in (restores, with_extra, optimizer_alone, with_another_scheduler, with_two_schedulers)
}


# --- what is saved ------------------------------------------------------------------------------------------------


def as_it_is(there: Run, state: dict[str, object]) -> None:
    pass


def without(*keys: str) -> Callable[[Run, dict[str, object]], None]:
    return functools.partial(_without, keys)


def _without(keys: tuple[str, ...], there: Run, state: dict[str, object]) -> None:
    for key in keys:
        del state[key]


class Custom:
    """Not of torch."""

    def __init__(self) -> None:
        self.value = 3


def with_an_object(there: Run, state: dict[str, object]) -> None:
    cast("dict[str, object]", state["scheduler"])["base_lrs"] = Custom()


def with_a_list_of_two(there: Run, state: dict[str, object]) -> None:
    state["optimizer"] = [state["optimizer"], state["optimizer"]]


def with_two_of_a_name(there: Run, state: dict[str, object]) -> None:
    named = get_optimizer_state_dict(there.net, there.optimizer)
    state |= {"optimizer": named, "another": named}


def with_another_name(there: Run, state: dict[str, object]) -> None:
    state["optimizer"] = {
        key.replace("layers.", "blocks."): value for key, value in cast("dict[str, object]", state["optimizer"]).items()
    }


def with_a_nested_tensor(there: Run, state: dict[str, object]) -> None:
    own = cast("dict[int, dict[str, object]]", cast("dict[str, object]", state["optimizer"])["state"])
    own[0]["history"] = [torch.ones(2)]


def with_a_state_of_its_own(there: Run, state: dict[str, object]) -> None:
    cast("dict[object, object]", cast("dict[str, object]", state["optimizer"])["state"])["k"] = 7


def with_two_models(there: Run, state: dict[str, object]) -> None:
    state["first"], state["second"] = state["model"], state.pop("model")


def with_an_average(there: Run, state: dict[str, object]) -> None:
    state |= {f"average.{name}": value for name, value in there.net.state_dict().items()}


# --- what is restored ---------------------------------------------------------------------------------------------


def other_order(net: nn.Module) -> torch.optim.Optimizer:
    """As many parameters in as many groups, in another order."""
    made = adamw(net)
    for group in made.param_groups:
        group["params"].reverse()
    return made


def one_group(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(net.parameters(), lr=0.1)


def sgd_in_groups(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([{"params": group["params"]} for group in adamw(net).param_groups], lr=0.1)


CASES = [
    ("plain", as_it_is, other_order, "restores", MisuseError, "by number alone, and these do not match: 'exp_avg'"),
    ("plain", as_it_is, one_group, "restores", MisuseError, "it has groups of 4, 3 parameters, the one to be restored"),
    ("plain", as_it_is, sgd, "restores", MisuseError, "it has groups of"),
    ("titan", as_it_is, sgd_in_groups, "restores", MisuseError, "the checkpoint's optimizer is no SGD"),
    ("plain", with_a_list_of_two, adamw, "restores", MisuseError, "the checkpoint has 2 optimizers ('optimizer.0', "),
    ("plain", with_two_of_a_name, adamw, "restores", MisuseError, "two of the checkpoint's optimizers, "),
    ("plain", with_a_nested_tensor, adamw, "restores", MisuseError, "is a tensor inside a list"),
    ("plain", with_a_state_of_its_own, adamw, "restores", MisuseError, "is state of the optimizer that belongs to no"),
    (
        "plain",
        without("optimizer"),
        adamw,
        "restores",
        CheckpointNotFoundError,
        "the checkpoint was saved without an o",
    ),
    ("plain", without("scheduler"), adamw, "restores", CheckpointNotFoundError, "the checkpoint was saved without a s"),
    (
        "plain",
        as_it_is,
        adamw,
        "with_another_scheduler",
        MisuseError,
        "the checkpoint's scheduler 'scheduler' is no St",
    ),
    ("plain", as_it_is, adamw, "with_two_schedulers", MisuseError, "1 scheduler was saved (scheduler) and 2 are"),
    ("plain", as_it_is, adamw, "with_extra", CheckpointNotFoundError, "the checkpoint has no extra state 'counters'"),
    ("plain", with_an_object, adamw, "restores", UnsafePickleError, "allow_legacy_pickle_restore"),
    (
        "plain",
        with_two_models,
        adamw,
        "restores",
        MisuseError,
        "which part of the checkpoint is the model is not clear",
    ),
    (
        "plain",
        without("model"),
        adamw,
        "restores",
        MisuseError,
        "which part of the checkpoint is the model is not clear",
    ),
    ("titan", with_an_average, adamw, "restores", UnexpectedTensorError, "average."),
    ("titan", with_another_name, adamw, "restores", MissingTensorError, "pass key_mapping"),
    ("titan", with_another_name, adamw, "optimizer_alone", MissingTensorError, "blocks.0"),
]


@pytest.mark.parametrize(
    ("layout", "change", "optimizer", "how", "kind", "text"),
    [pytest.param(*case, id=f"{number}-{case[3]}") for number, case in enumerate(CASES)],
)
def test_what_is_not_understood_changes_nothing(
    tmp_path: Path,
    layout: str,
    change: Callable[[Run, dict[str, object]], None],
    optimizer: Callable[[nn.Module], torch.optim.Optimizer],
    how: str,
    kind: type[ShardwiseError],
    text: str,
) -> None:
    path = tmp_path / "dcp"
    run(1, save, path, layout, change)
    found = run(2, refused, path, optimizer, how)
    assert found[0] == found[1]
    error, message = cast("tuple[type, str]", found[0])
    assert error is kind, message
    assert text in message


def save_uneven(path: Path) -> None:
    save(path, "plain", as_it_is)


def cut(path: Path) -> None:
    """End the files short."""
    for file in path.glob("*.distcp"):
        file.write_bytes(file.read_bytes()[:700])


def test_damaged_files_change_nothing(tmp_path: Path) -> None:
    path = tmp_path / "dcp"
    run(2, save_uneven, path)
    cut(path)
    error, _ = cast("tuple[type, str]", run(2, refused, path, adamw, "restores")[0])
    assert issubclass(error, FormatError)


def momentum(net: nn.Module, layer: int) -> torch.optim.Optimizer:
    return torch.optim.SGD(cast(nn.ModuleList, net.layers)[layer].parameters(), lr=0.1, momentum=0.9)


def save_one_layer(path: Path) -> None:
    there = Run(seed=0, optimizer=functools.partial(momentum, layer=0))
    there.steps(0, 1)
    dcp.save({"optimizer": there.optimizer.state_dict()}, checkpoint_id=str(path))


def a_layer_each(path: Path) -> str:
    here = Run(seed=1, optimizer=functools.partial(momentum, layer=dist.get_rank()))
    try:
        with checkpointer(path.parent) as engine:
            engine.load_optimizer(here.optimizer, here.net, path)
    except MisuseError as error:
        assert not here.optimizer.state
        return str(error)
    raise AssertionError("it was restored")


def test_numbers_mean_nothing_where_ranks_have_different_parameters(tmp_path: Path) -> None:
    path = tmp_path / "dcp"
    run(1, save_one_layer, path)
    found = run(2, a_layer_each, path)
    assert found[0] == found[1]
    assert "the ranks' optimizers have different parameters" in cast(str, found[0])
