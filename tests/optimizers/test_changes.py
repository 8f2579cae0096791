"""What is refused when it is saved or looked at, and what may change between runs on purpose."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tests.optimizers import layouts
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from shardwise import Checkpointer, CheckpointingConfig
from shardwise.errors import ConversionError, MissingTensorError, MisuseError, ReplicasDifferError, StateFormatError
from shardwise.stateful_wrappers import OptimizerState
from shardwise.stateful_wrappers.optimizer import OptimizerRecord
from shardwise.stateful_wrappers.optimizer_restore import plan_restore
from shardwise.stateful_wrappers.replicas import RankRecord, agreed

ASYNC = pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])


def engine(root: Path, is_async: bool = False) -> Checkpointer:
    config = CheckpointingConfig(checkpoint_dir=str(root), save_consolidated="false", is_async=is_async)
    return config.build()


@contextlib.contextmanager
def single_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def net(first: str = "first", second: str = "second") -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({first: nn.Linear(4, 4), second: nn.Linear(4, 2)})


def step(model: nn.Module, *optimizers: torch.optim.Optimizer) -> None:
    for param in model.parameters():
        param.grad = torch.ones_like(param) if param.requires_grad else None
    for optimizer in optimizers:
        optimizer.step()


def adam(model: nn.Module, lr: float = 1e-2) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=lr)


@ASYNC
def test_two_optimizers_of_one_parameter(tmp_path: Path, is_async: bool) -> None:
    model = net()
    both = [adam(model), torch.optim.SGD(model["first"].parameters(), lr=1.0)]
    step(model, *both)
    with pytest.raises(MisuseError, match=r"two optimizers \(AdamW and SGD\) update one parameter") as caught:
        engine(tmp_path, is_async).save(0, 1, model, both)
    assert caught.value.tensor == "first.weight"
    assert not any(tmp_path.iterdir())


class Odd(torch.Tensor):
    """Values of its own, of which nobody knows what they consist of."""

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        raise NotImplementedError

    @staticmethod
    def __new__(cls, shape):  # type: ignore[no-untyped-def]
        return torch.Tensor._make_wrapper_subclass(cls, shape)


@ASYNC
@pytest.mark.parametrize("what", ["tensor", "object", "state_dict"])
def test_what_cannot_be_saved_is_named(tmp_path: Path, what: str, is_async: bool) -> None:
    model = net()
    optimizer: torch.optim.Optimizer = adam(model)
    step(model, optimizer)
    state = optimizer.state[model["first"].weight]
    if what == "tensor":
        state["odd"] = Odd((4, 4))
        message = "'odd' is a Odd, a tensor class with its own storage of values"
    elif what == "object":
        state["nested"] = {"inner": [{torch.zeros(1)}]}
        message = "'nested.inner.0' is a set with tensors in it"
    else:
        optimizer.state_dict = lambda: 1 / 0  # type: ignore[method-assign,assignment]
        message = r"AdamW.state_dict\(\) fails with ZeroDivisionError"
    with pytest.raises(MisuseError, match=message):
        engine(tmp_path, is_async).save(0, 1, model, optimizer)


def test_what_an_optimizer_refuses_changes_nothing(tmp_path: Path) -> None:
    model = net()
    optimizer = layouts.Counting(list(model.parameters()))
    step(model, optimizer)
    engine(tmp_path).save(0, 1, model, optimizer)

    class Refusing(layouts.Counting):
        def load_state_dict(self, state_dict):  # type: ignore[no-untyped-def]
            super().load_state_dict(state_dict)
            if state_dict["extra"]["history"] == [0]:
                raise ValueError("a history of one step")

    Refusing.__name__ = "Counting"
    other = net()
    fresh = Refusing(list(other.parameters()))
    step(other, fresh)
    step(other, fresh)
    weights = {name: value.clone() for name, value in other.state_dict().items()}
    moments = [fresh.state[param]["momentum_buffer"].clone() for param in other.parameters()]
    rate = fresh.param_groups[0]["lr"]
    with pytest.raises(MisuseError, match="Counting.load_state_dict refuses it with ValueError: a history of one step"):
        engine(tmp_path).restore(other, fresh)
    assert all(torch.equal(value, weights[name]) for name, value in other.state_dict().items())
    assert fresh.param_groups[0]["lr"] == rate
    assert fresh.extra["history"] == [0, 1]
    kept = [fresh.state[param]["momentum_buffer"] for param in other.parameters()]
    assert all(map(torch.equal, moments, kept))


def test_a_wrapper_is_not_lost(tmp_path: Path) -> None:
    model = net()
    wrapped = layouts.lookahead(list(model.parameters()))
    step(model, wrapped)
    engine(tmp_path).save(0, 1, model, wrapped)
    other = net()
    with pytest.raises(MisuseError, match="the checkpoint has the state of a Lookahead around the optimizer"):
        engine(tmp_path).restore(other, adam(other))
    engine(tmp_path / "plain").save(0, 1, other, adam(other))
    with pytest.raises(MisuseError, match="the checkpoint's optimizer had no Lookahead around it"):
        engine(tmp_path / "plain").restore(model, wrapped)


def test_options_follow_the_parameter(tmp_path: Path) -> None:
    model = net()
    groups = [{"params": list(model["first"].parameters()), "lr": 0.1}, {"params": list(model["second"].parameters())}]
    optimizer = torch.optim.AdamW(groups, lr=0.2)
    step(model, optimizer)
    engine(tmp_path).save(0, 1, model, optimizer)
    other = net()
    turned = torch.optim.AdamW(
        [{"params": [param]} for param in reversed(list(other.parameters()))], lr=0.7
    )  # one for each, in another order
    engine(tmp_path).restore(other, turned)
    assert [group["lr"] for group in turned.param_groups] == [0.2, 0.2, 0.1, 0.1]
    with pytest.raises(MisuseError, match=r"saved in groups with different options \(lr 0.1 and 0.2\)"):
        engine(tmp_path).restore(other, adam(other))


def test_an_unfrozen_layer(tmp_path: Path) -> None:
    model = net()
    optimizer = torch.optim.AdamW(model["first"].parameters(), lr=0.1)
    step(model, optimizer)
    engine(tmp_path).save(0, 1, model, optimizer)
    other = net()
    groups = [{"params": list(other["first"].parameters())}, {"params": list(other["second"].parameters()), "lr": 0.5}]
    larger = torch.optim.AdamW(groups, lr=0.7)
    step(other, larger)
    with pytest.raises(MissingTensorError, match="did not update 2 of these parameters") as caught:
        engine(tmp_path).restore(other, larger)
    assert "allow_new_parameters=True" in (caught.value.hint or "")
    found = engine(tmp_path).restore(other, larger, allow_new_parameters=True)
    assert found is not None
    assert found.fresh == ("second.weight", "second.bias")
    assert [group["lr"] for group in larger.param_groups] == [0.1, 0.5]
    assert set(larger.state) == set(other["first"].parameters())
    moments = larger.state[other["first"].weight]["exp_avg"]
    assert torch.equal(moments, optimizer.state[model["first"].weight]["exp_avg"])


def test_other_names(tmp_path: Path) -> None:
    model = net()
    optimizer = layouts.Shampoo(list(model.parameters()))
    step(model, optimizer)
    engine(tmp_path).save(0, 1, model, optimizer)
    other = net("lower", "upper")
    for param in other.parameters():
        nn.init.zeros_(param)
    renamed = layouts.Shampoo(list(other.parameters()))
    mapping = {"^first": "lower", "^second": "upper"}
    engine(tmp_path).restore(other, renamed, key_mapping=mapping)
    assert all(map(torch.equal, model.parameters(), other.parameters()))
    for mine, theirs in zip(other.parameters(), model.parameters(), strict=True):
        a, b = renamed.state[mine]["block", 0], optimizer.state[theirs]["block", 0]
        assert torch.equal(a["factors"][0], b["factors"][0])
    path = tmp_path / "epoch_0_step_1"
    again = layouts.Shampoo(list(other.parameters()))
    engine(tmp_path).load_optimizer(again, other, path, key_mapping=mapping)
    assert again.state[other["lower"].weight].keys() == renamed.state[other["lower"].weight].keys()
    with pytest.raises(ConversionError, match="makes one name of several"):
        engine(tmp_path).load_optimizer(again, other, path, key_mapping={"^(first|second)": "lower"})


def test_states_of_parameters_without_dimensions_are_where_the_parameter_is() -> None:
    model = nn.Module()
    model.scale = nn.Parameter(torch.tensor(2.0))
    optimizer = torch.optim.AdamW(model.parameters())
    step(model, optimizer)
    record = OptimizerRecord.from_state(OptimizerState(optimizer, model).record().to_state())
    elsewhere = model.to("meta")  # stands for an accelerator: a device that is not the CPU
    fresh = torch.optim.AdamW(elsewhere.parameters())
    plan_restore(OptimizerState(fresh, elsewhere), record).apply()
    state = fresh.state[elsewhere.scale]
    assert {key: value.device.type for key, value in state.items()} == {
        "step": "cpu",
        "exp_avg": "meta",
        "exp_avg_sq": "meta",
    }


def test_state_in_a_narrow_parameters_wider_dtype_stays_wide(tmp_path: Path) -> None:
    """torch's own ``load_state_dict`` casts state to the parameter's dtype."""
    model = net().to(torch.bfloat16)
    optimizer = layouts.Hooked(list(model.parameters()))
    step(model, optimizer)
    for state in optimizer.state.values():
        state["exp_avg"] = torch.rand_like(state["exp_avg"], dtype=torch.float32)
    engine(tmp_path).save(0, 1, model, optimizer)
    other = net().to(torch.bfloat16)
    fresh = layouts.Hooked(list(other.parameters()))
    engine(tmp_path).restore(other, fresh)
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    assert all(torch.equal(optimizer.state[a]["exp_avg"], fresh.state[b]["exp_avg"]) for a, b in pairs)
    assert fresh.seen == 1


def test_what_cannot_be_told_is_refused() -> None:
    """A row of a process is to go to shards: in the whole, as each rank's part, or as a DTensor?"""
    model = net()
    optimizer = layouts.Factored(list(model.parameters()))
    step(model, optimizer)
    record = OptimizerRecord.from_state(OptimizerState(optimizer, model).record().to_state())
    other = net()
    with single_rank():
        for part in other.children():
            fully_shard(part)
        fresh = layouts.Factored(list(other.parameters()))
        with pytest.raises(MisuseError, match=r"the saved state of shape \[4\] was a plain tensor") as caught:
            plan_restore(OptimizerState(fresh, other), record)
        assert "take one step before restoring" in (caught.value.hint or "")
        for param in other.parameters():
            param.grad = torch.ones_like(param)
        fresh.step()
        plan_restore(OptimizerState(fresh, other), record).apply()
        assert isinstance(fresh.state[other["first"].weight]["row"], DTensor)


def test_a_dtensor_without_dimensions_takes_a_step(tmp_path: Path) -> None:
    def made() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = nn.Module()
        mesh = init_device_mesh("cpu", (1,))
        model.scale = nn.Parameter(distribute_tensor(torch.tensor(2.0), mesh))
        return model, adam(model)

    with single_rank():
        model, optimizer = made()
        step(model, optimizer)
        with engine(tmp_path) as checkpointer:
            checkpointer.save(0, 1, model, optimizer)
            fresh, fresh_optimizer = made()
            checkpointer.restore(fresh, fresh_optimizer)
        kinds = [
            {key: type(value) for key, value in o.state[m.scale].items()}
            for m, o in ((model, optimizer), (fresh, fresh_optimizer))
        ]
        assert kinds[0] == kinds[1]
        for each, each_optimizer in ((model, optimizer), (fresh, fresh_optimizer)):
            step(each, each_optimizer)
        assert torch.equal(model.scale.full_tensor(), fresh.scale.full_tensor())


def test_what_ranks_have_of_one_parameter_is_one_ranks() -> None:
    """Options and values, which nobody compares, come from the first rank that has the parameter: never from two."""
    records = []
    for rank in range(2):
        model = net()
        optimizer = layouts.Prodigy(list(model.parameters()))
        optimizer.param_groups[0]["d0"] = 1e-3 * (rank + 1)
        for _ in range(rank + 1):
            step(model, optimizer)
        records.append(OptimizerState(optimizer, model).record())
    found = OptimizerRecord.merge(records)
    assert [(group.options["d0"], group.options["k"]) for group in found.groups] == [(1e-3, 1)]
    assert {values["step"] for values in found.values.values()} == {1}


class Nested(torch.optim.Optimizer):
    """Keeps its tensors in a dictionary in the state."""

    def __init__(self, params) -> None:  # type: ignore[no-untyped-def]
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure=None):  # type: ignore[no-untyped-def]
        for param in self.param_groups[0]["params"]:
            moments = self.state[param].setdefault("moments", {"first": torch.zeros_like(param), "count": 0})
            moments["first"].add_(param.grad)
            moments["count"] += 1


def test_nested_state_of_each_rank_comes_back(tmp_path: Path) -> None:
    def build() -> tuple[nn.Module, torch.optim.Optimizer, Checkpointer]:
        model = net()
        config = CheckpointingConfig(checkpoint_dir=str(tmp_path), save_consolidated="false", per_rank_state=["*"])
        return model, Nested(list(model.parameters())), config.build()

    model, optimizer, checkpointer = build()
    step(model, optimizer)
    checkpointer.save(0, 1, model, optimizer)
    other, fresh, checkpointer = build()
    checkpointer.restore(other, fresh)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(fresh.state[b]["moments"]["first"], optimizer.state[a]["moments"]["first"])


def test_a_value_in_nested_state_that_differs_between_ranks_is_an_error() -> None:
    records = []
    for rank in range(2):
        model = net()
        optimizer = Nested(list(model.parameters()))
        step(model, optimizer)
        optimizer.state[model["first"].weight]["moments"]["count"] += rank
        records.append(RankRecord(OptimizerState(optimizer, model).record(), (rank,)))
    with pytest.raises(ReplicasDifferError, match=r"moments.count of first.weight is 1 on rank 0 and 2 on rank 1"):
        agreed(records, lambda _: False)
    assert OptimizerRecord.merge(agreed(records, lambda _: True)) == records[0].record


def test_losses_of_ranks_that_lbfgs_never_reads_again_may_differ() -> None:
    records = []
    for rank in range(2):
        model = net()
        optimizer = torch.optim.LBFGS(model.parameters())
        data = torch.ones(2, 4)

        def loss(data: torch.Tensor = data, model: nn.Module = model) -> torch.Tensor:
            out: torch.Tensor = model["second"](model["first"](data)).square().mean()  # type: ignore[index]
            out.backward()
            return out

        optimizer.step(loss)  # type: ignore[no-untyped-call]
        state = next(iter(optimizer.state.values()))
        state["prev_loss"] += rank
        records.append(RankRecord(OptimizerState(optimizer, model).record(), (rank,)))
    assert OptimizerRecord.merge(agreed(records, lambda _: False)) == records[0].record
    state["func_evals"] += 1
    records[1] = RankRecord(OptimizerState(optimizer, model).record(), (1,))
    with pytest.raises(ReplicasDifferError, match="func_evals"):
        agreed(records, lambda _: False)


def test_an_outer_optimizers_state_that_this_rank_did_not_save_is_dropped() -> None:
    model = net()
    outer = layouts.lookahead(list(model.parameters()))
    step(model, outer)
    record = OptimizerRecord.from_state(OptimizerState(outer, model).record().to_state())
    other = net()
    fresh = layouts.lookahead(list(other.parameters()))
    plan = plan_restore(OptimizerState(fresh, other), record)
    every = {name for name, _ in plan.targets}
    names = {name for name in every if not name.startswith("state.<")}
    assert names != every
    plan.keep(names, [name for name, _ in other.named_parameters()])
    plan.apply()
    assert not fresh.state
    assert all("exp_avg" in fresh.base_optimizer.state[param] for param in other.parameters())


@pytest.mark.parametrize(
    "tree",
    [["dict", [1]], ["dict", [[["value", []], ["value", 1]]]], ["ordered", [[]]], ["list", [{}]], 3],
    ids=["rows", "key", "pair", "item", "number"],
)
def test_state_that_is_no_tree_is_named(tree: object) -> None:
    model = net()
    optimizer = Nested(list(model.parameters()))
    step(model, optimizer)
    state = OptimizerState(optimizer, model).record().to_state()
    state["trees"] = {name: tree if isinstance(tree, list) else [tree] for name in state["trees"]}  # type: ignore[attr-defined]
    with pytest.raises(StateFormatError, match="is no tree") as caught:
        plan_restore(OptimizerState(optimizer, model), OptimizerRecord.from_state(state))
    assert caught.value.hint
    assert caught.value.tensor == "first.weight"


class Copying(torch.optim.SGD):
    """Gives out copies of its states, in which a mask is sparse."""

    def state_dict(self) -> dict[str, object]:  # type: ignore[override]
        given = super().state_dict()
        return {**given, "state": {number: dict(state) for number, state in given["state"].items()}}


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
def test_a_sparse_state_of_an_optimizer_with_its_own_state_dict() -> None:
    model = net()
    optimizer = Copying(model.parameters(), lr=0.1, momentum=0.9)
    step(model, optimizer)
    optimizer.state[model["first"].weight]["mask"] = torch.eye(4).to_sparse_csr()
    state = OptimizerState(optimizer, model)
    assert not state.loose
    with pytest.raises(MisuseError, match="sparse"):
        state.held()
