"""Details of the layouts that others save in: what torch and its users may put where."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from tests.engine.setups import checkpointer, digest
from tests.interop.runs import Net, Run, adamw
from tests.support.ranks import run
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from shardwise import CheckpointingConfig

State = dict[str, object]


def tensor_rate(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(net.parameters(), lr=torch.tensor(0.05))


def named(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(net.named_parameters(), lr=0.05)


def backwards(net: nn.Module) -> torch.optim.Optimizer:
    """By name, in another order than the run that saved."""
    return torch.optim.AdamW([*net.named_parameters()][::-1], lr=0.05)


def nested(there: Run) -> State:
    return {"optimizer": there.optimizer.state_dict()}


def below(there: Run) -> State:
    return {"train": {"states": {"optim": get_optimizer_state_dict(there.net, there.optimizer)}}}


def alone(there: Run) -> State:
    return get_optimizer_state_dict(there.net, there.optimizer)


def listed(there: Run) -> State:
    return {"optimizers": [there.optimizer.state_dict()]}


def plain_steps(there: Run) -> State:
    """Counters as numbers, which torch's older optimizers had."""
    state = there.optimizer.state_dict()
    for each in state["state"].values():
        each["step"] = int(each["step"])
    return {"optimizer": state}


def as_one_value(there: Run) -> State:
    """As torch before 2.4 saved parameter groups: a list without tensors was one value."""
    state = there.optimizer.state_dict()
    return {"optimizer": {**state, "param_groups": tuple(state["param_groups"])}}


def beside_its_name(there: Run) -> State:
    """What is called so need not be one."""
    return {"config": {"optimizer": "adamw", "optim_steps": 3}, "optimizer": there.optimizer.state_dict()}


def wrapped(there: Run) -> State:
    """Names as torch.compile makes them."""
    state = get_optimizer_state_dict(there.net, there.optimizer)
    return {
        "optimizer": {
            "state": {f"_orig_mod.{name}": value for name, value in state["state"].items()},
            "param_groups": [
                {**group, "params": [f"_orig_mod.{name}" for name in group["params"]]}
                for group in state["param_groups"]
            ],
        }
    }


def unflattened(there: Run) -> State:
    """Nothing is recorded of how the state dict was nested."""
    state = there.state("titan")["optimizer"]
    return {f"trainer.optimizer.{name}": value for name, value in cast(State, state).items()}


def save(path: Path, optimizer: Callable[[nn.Module], torch.optim.Optimizer], state: Callable[[Run], State]) -> object:
    there = Run(seed=0, optimizer=optimizer)
    there.steps(0, 2)
    dcp.save(state(there), checkpoint_id=str(path))
    return moments(there)


def moments(there: Run) -> object:
    everything = there.everything()
    found = {key: value for key, value in everything.items() if "/" in key and not key.endswith("/step")}
    steps = {float(cast(float, state["step"])) for state in there.optimizer.state.values()}
    return found, steps, [float(group["lr"]) for group in there.optimizer.param_groups]


def load(path: Path, optimizer: Callable[[nn.Module], torch.optim.Optimizer]) -> object:
    here = Run(seed=1, optimizer=optimizer)
    with checkpointer(path.parent) as engine:
        engine.load_optimizer(here.optimizer, here.net, path)
    found = moments(here)
    here.steps(0, 1)
    return found


@pytest.mark.parametrize(
    ("saved_by", "state", "loaded_by"),
    [
        (adamw, nested, adamw),
        (adamw, below, adamw),
        (adamw, alone, adamw),
        (adamw, listed, adamw),
        (adamw, plain_steps, adamw),
        (adamw, as_one_value, adamw),
        (adamw, beside_its_name, adamw),
        (adamw, wrapped, adamw),
        (adamw, unflattened, adamw),
        (tensor_rate, nested, tensor_rate),
        (tensor_rate, below, tensor_rate),
        (named, nested, named),
        (named, nested, backwards),
    ],
)
def test_an_optimizer_is_found_in_every_layout(
    tmp_path: Path,
    saved_by: Callable[[nn.Module], torch.optim.Optimizer],
    state: Callable[[Run], State],
    loaded_by: Callable[[nn.Module], torch.optim.Optimizer],
) -> None:
    saved = run(1, save, tmp_path / "dcp", saved_by, state)
    assert run(1, load, tmp_path / "dcp", loaded_by) == saved


# --- several optimizers, one of them with no state; other names -------------------------------------------------------


def counts(path: Path) -> object:
    net = nn.Linear(2, 2)
    here, there = (torch.optim.SGD(net.parameters(), lr=0.1) for _ in range(2))
    there.param_groups[0]["counts"] = (Counter("aab"),)  # DCP would take a mapping apart
    dcp.save({"optimizer": there.state_dict()}, checkpoint_id=str(path))
    with checkpointer(path.parent) as engine:
        engine.load_optimizer(here, net, path)
    return here.param_groups[0]["counts"]


def test_an_option_that_counts_arrives(tmp_path: Path) -> None:
    assert run(2, counts, tmp_path / "there") == [(Counter("aab"),)] * 2


def in_two(net: nn.Module) -> list[torch.optim.Optimizer]:
    return [
        torch.optim.SGD(cast(Net, net).head.parameters(), lr=0.3, momentum=0.9),
        torch.optim.AdamW([p for name, p in net.named_parameters() if "head" not in name], lr=0.2),
    ]


def two(seed: int) -> tuple[Net, list[torch.optim.Optimizer]]:
    torch.manual_seed(seed)
    net = Net()
    made = in_two(net)
    for _ in range(2 - seed):
        net(torch.ones(2, 5)).square().sum().backward()
        for each in made:
            each.step()
    return net, made


def states_of(made: list[torch.optim.Optimizer]) -> object:
    return [repr(each.state_dict()) for each in made]


def save_two(path: Path, by_name: bool) -> object:
    net, made = two(0)
    states: State = {"optimizers": [each.state_dict() for each in made]}
    if by_name:
        states = {"head": get_optimizer_state_dict(net, made[0]), "rest": get_optimizer_state_dict(net, made[1])}
    dcp.save({"model": net.state_dict(), **states}, checkpoint_id=str(path))
    return states_of(made)


def load_two(path: Path) -> object:
    net, made = two(1)
    with checkpointer(path.parent) as engine:
        engine.restore(net, made, restore_from=path)
    return states_of(made)


@pytest.mark.parametrize("by_name", [True, False])
def test_several_optimizers(tmp_path: Path, by_name: bool) -> None:
    saved = run(1, save_two, tmp_path / "dcp", by_name)
    assert run(1, load_two, tmp_path / "dcp") == saved


def save_renamed(path: Path) -> object:
    there = Run(seed=0)
    there.steps(0, 2)
    state = there.state("titan")
    renamed = {name.replace("layers.", "blocks."): value for name, value in state.items()}
    optimizer = cast(State, state["optimizer"])
    renamed["optimizer"] = {name.replace("layers.", "blocks."): value for name, value in optimizer.items()}
    dcp.save(renamed, checkpoint_id=str(path))
    return there.everything()


def load_renamed(path: Path) -> object:
    here = Run(seed=1)
    with checkpointer(path.parent) as engine:
        engine.restore(
            here.net, here.optimizer, here.scheduler, restore_from=path, key_mapping={r"^blocks\.": "layers."}
        )
    return here.everything()


def test_other_names_are_mapped_for_model_and_optimizer(tmp_path: Path) -> None:
    saved = run(1, save_renamed, tmp_path / "dcp")
    assert run(1, load_renamed, tmp_path / "dcp") == saved


class Picky:
    """A state of its own making, with keys that are numbers and a part that is empty."""

    def __init__(self, filled: bool) -> None:
        self.seen: dict[int, object] = {0: 5, 3: [1, 2]} if filled else {0: 0, 3: [0, 0]}
        self.taken: State = {}

    def state_dict(self) -> State:
        return {"seen": dict(self.seen), "empty": {}}

    def load_state_dict(self, state_dict: State) -> None:
        self.taken = state_dict


def save_extra(path: Path) -> None:
    net = Net()
    state = {"model": net.state_dict(), "loop": Picky(filled=True), "best": 0.5, "tokens": torch.arange(3)}
    dcp.save(state, checkpoint_id=str(path))


def load_extra(path: Path) -> object:
    picky, values = Picky(filled=False), cast(State, {})
    extra = {"loop": picky, "best": None, "tokens": None, "model": values}
    del extra["model"]
    with checkpointer(path.parent) as engine:
        record = engine.restore(Net(), restore_from=path, extra_state=extra)
    assert record is not None
    assert record.unrestored == ()
    assert torch.equal(cast(torch.Tensor, extra["tokens"]), torch.arange(3))
    return picky.taken, extra["best"], record.epoch, record.step


def test_extra_state_is_taken_by_its_owner(tmp_path: Path) -> None:
    run(1, save_extra, tmp_path / "epoch=2-step=40")
    taken = {"seen": {0: 5, 3: [1, 2]}, "empty": {}}
    assert run(1, load_extra, tmp_path / "epoch=2-step=40") == [(taken, 0.5, 2, 40)]


# --- models beside other things, and parts of models ----------------------------------------------------------------


def save_model(path: Path) -> object:
    there = Run(seed=0)
    there.steps(0, 2)
    named = get_optimizer_state_dict(there.net, there.optimizer)
    dcp.save({"model": there.net.state_dict(), "optimizer": named}, checkpoint_id=str(path))
    return there.everything()


def load_model(path: Path, key_mapping: dict[str, str] | None) -> object:
    here = Run(seed=1)
    with checkpointer(path.parent) as engine:
        engine.load_model(here.net, path, key_mapping=key_mapping)
    return {name: value for name, value in here.everything().items() if name in here.net.state_dict()}


@pytest.mark.parametrize("key_mapping", [None, {r"^model\.": ""}, {"^nothing": ""}])
def test_a_model_is_found_beside_an_optimizer(tmp_path: Path, key_mapping: dict[str, str] | None) -> None:
    saved = cast("list[State]", run(1, save_model, tmp_path / "dcp"))[0]
    loaded = cast("list[State]", run(1, load_model, tmp_path / "dcp", key_mapping))[0]
    assert loaded == {name: value for name, value in saved.items() if name in loaded}
    assert "head.weight" in loaded


def load_stage(path: Path) -> object:
    """A rank has the layers, the other one the rest."""
    torch.manual_seed(1)
    net = Net()
    if dist.get_rank():
        del net.layers
    else:
        del net.norm, net.head, net.seen
    options = [{"params": [p for p in net.parameters() if p.ndim == 1], "lr": 0.5}]
    options += [{"params": [p for p in net.parameters() if p.ndim > 1], "lr": 0.5}]
    optimizer = torch.optim.AdamW(options)
    config = CheckpointingConfig(checkpoint_dir=path.parent)
    with config.build(dp_rank=0, tp_rank=0, pp_rank=dist.get_rank()) as engine:
        engine.restore(net, optimizer, restore_from=path)
    found: State = {name: digest(value) for name, value in net.state_dict().items()}
    for name, param in net.named_parameters():
        found |= {f"{name}/{key}": digest(cast(torch.Tensor, v)) for key, v in optimizer.state[param].items()}
    return found


def test_pipeline_stages_take_their_parts_by_name(tmp_path: Path) -> None:
    saved = cast("list[State]", run(2, save_whole, tmp_path / "dcp"))[0]
    first, second = cast("list[State]", run(2, load_stage, tmp_path / "dcp"))
    assert first | second == saved
    assert not first.keys() & second.keys()


def save_whole(path: Path) -> object:
    """Sharded on the ranks that save."""
    there = Run(seed=0)
    there.steps(0, 2)
    named = get_optimizer_state_dict(there.net, there.optimizer)
    dcp.save({"model": there.net.state_dict(), "optimizer": named}, checkpoint_id=str(path))
    found: State = {name: digest(value) for name, value in there.net.state_dict().items()}
    for name, param in there.net.named_parameters():
        found |= {f"{name}/{key}": digest(cast(torch.Tensor, v)) for key, v in there.optimizer.state[param].items()}
    return found
