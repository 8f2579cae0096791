"""A model is not listed anew at every save; whatever changes in it has to be noticed all the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from tests.support.ranks import run
from torch import nn
from torch.distributed.fsdp import fully_shard

from shardwise.checkpointing import Checkpointer
from shardwise.config import CheckpointingConfig
from shardwise.convert.derive import kept_out
from shardwise.stateful_wrappers.memory import Memory, Snapshot
from shardwise.stateful_wrappers.names import list_state


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Sequential(nn.Linear(6, 3, bias=False)))


def snapshot(net: nn.Module) -> Snapshot:
    tensors, modules, *_ = list_state([net])
    assert modules is not None
    return Snapshot([net], Memory([named.tensor for named in tensors]), modules)


def is_always_listed(net: nn.Module) -> bool:
    return list_state([net]).modules is None or not snapshot(net).holds([net])


def replace_parameter(net: nn.Sequential) -> None:
    net[0].weight = nn.Parameter(torch.ones(6, 4))


def replace_parameter_by_an_equal_one(net: nn.Sequential) -> None:
    net[0].bias = nn.Parameter(net[0].bias.detach().clone())


def replace_by_nothing_and_add_another(net: nn.Sequential) -> None:
    net[0].register_parameter("offset", net[0]._parameters.pop("bias"))


def replace_memory(net: nn.Sequential) -> None:
    net[0].weight.data = torch.ones(6, 4)


def transpose_memory(net: nn.Sequential) -> None:
    net[0].weight.data = net[0].weight.data.as_strided((6, 4), (1, 6))


def reinterpret_memory(net: nn.Sequential) -> None:
    net[1].num_batches_tracked.data = net[1].num_batches_tracked.data.view(torch.float64)


def replace_dictionary(net: nn.Sequential) -> None:
    net[0]._parameters = dict(net[0]._parameters, weight=nn.Parameter(torch.ones(6, 4)))


def replace_module(net: nn.Sequential) -> None:
    net[2][0] = nn.Linear(6, 3, bias=False)


def add_module(net: nn.Sequential) -> None:
    net[2].append(nn.Linear(3, 3))


def add_buffer(net: nn.Sequential) -> None:
    net[0].register_buffer("seen", torch.zeros(2))


def rename_module(net: nn.Sequential) -> None:
    net[2]._modules["last"] = net[2]._modules.pop("0")


def tie(net: nn.Sequential) -> None:
    net[2].append(nn.Linear(6, 3, bias=False))
    net[2][1].weight = net[2][0].weight


def take_away(net: nn.Sequential) -> None:
    net[0].bias = None


CHANGES = [
    replace_parameter,
    replace_parameter_by_an_equal_one,
    replace_by_nothing_and_add_another,
    replace_memory,
    transpose_memory,
    reinterpret_memory,
    replace_dictionary,
    replace_module,
    add_module,
    add_buffer,
    rename_module,
    tie,
    take_away,
]


@pytest.mark.parametrize("mode", ["every", "false"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_noticed_and_saved(tmp_path: Path, change: Callable[[nn.Sequential], None], mode: str) -> None:
    net = model()
    before = snapshot(net)
    assert before.holds([net])
    config = CheckpointingConfig(checkpoint_dir=str(tmp_path), save_consolidated=mode)
    with Checkpointer(config) as engine:
        engine.save_model(net, tmp_path)
        change(net)
        assert not before.holds([net])
        engine.save_model(net, tmp_path)
    (file,) = (tmp_path / "model").rglob("*.safetensors")
    saved = load_file(file)
    have = net.state_dict()
    assert all(torch.equal(have[name], tensor) for name, tensor in saved.items())
    # Tied tensors are written once.
    assert len(saved) == len({tensor.data_ptr() for tensor in have.values()})


def test_values_are_not_a_change(tmp_path: Path) -> None:
    net = model()
    before = snapshot(net)
    optimizer = torch.optim.AdamW(net.parameters())
    net(torch.randn(5, 4)).sum().backward()
    optimizer.step()
    net.eval()
    assert before.holds([net])
    assert not before.holds([net, net])
    assert not before.holds([model()])
    assert snapshot(torch.compile(net)).holds([net])  # type: ignore[arg-type]


class OwnState(nn.Linear):
    """Says itself what its state is."""

    def _save_to_state_dict(self, destination: dict[str, object], prefix: str, keep_vars: bool) -> None:
        destination[prefix + "twice"] = self.weight.detach() * 2


def test_modules_with_ways_of_their_own_are_always_listed() -> None:
    assert is_always_listed(nn.Sequential(OwnState(2, 2)))
    hooked = model()
    before = snapshot(hooked)
    handle = hooked[0].register_state_dict_pre_hook(lambda *_: None)
    assert not before.holds([hooked])
    assert is_always_listed(hooked)
    handle.remove()
    assert before.holds([hooked])
    half = nn.Module()
    half.register_buffer("kept", torch.zeros(2))
    half.register_buffer("lost", torch.zeros(2), persistent=False)
    assert is_always_listed(half)


class EqualIfAlike(nn.Linear):
    """Equal to any other of its size."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, nn.Linear) and other.weight.shape == self.weight.shape

    __hash__ = nn.Linear.__hash__


class AlwaysEqual(nn.Parameter):
    def __eq__(self, other: object) -> bool:  # type: ignore[override]
        return True

    __hash__ = nn.Parameter.__hash__


def test_what_says_itself_what_is_equal_is_always_listed(tmp_path: Path) -> None:
    for net in (nn.Sequential(EqualIfAlike(2, 2)), nn.Sequential(nn.Linear(2, 2))):
        if not isinstance(net[0], EqualIfAlike):
            net[0].weight = AlwaysEqual(torch.zeros(2, 2))
        assert is_always_listed(net)
        config = CheckpointingConfig(checkpoint_dir=str(tmp_path), save_consolidated="every")
        with Checkpointer(config) as engine:
            engine.save_model(net, tmp_path)
            net[0] = type(net[0])(2, 2)
            engine.save_model(net, tmp_path)
        saved = load_file(tmp_path / "model" / "consolidated" / "model.safetensors")
        assert torch.equal(saved["0.weight"], net[0].weight)


def _sharded(root: str) -> tuple[list[bool], bool]:
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    for layer in net:
        fully_shard(layer)
    fully_shard(net, reshard_after_forward=False)
    optimizer = torch.optim.AdamW(net.parameters())
    config = CheckpointingConfig(checkpoint_dir=root, save_consolidated="every")
    held = []
    with Checkpointer(config, dist.get_rank(), 0, 0) as engine:
        for _ in range(3):
            before = snapshot(net)
            net(torch.randn(2, 8)).sum().backward()
            optimizer.step()
            held.append(before.holds([net]))
            engine.save_model(net, root)
        net.unshard()
        engine.save_model(net, root)
    saved = load_file(Path(root) / "model" / "consolidated" / "model.safetensors")
    whole = {name: tensor.full_tensor() for name, tensor in net.state_dict().items()}
    return held, all(torch.equal(whole[name], saved[name]) for name in whole)


def test_fsdp_adds_hooks_at_its_first_step_and_none_later(tmp_path: Path) -> None:
    assert run(2, _sharded, str(tmp_path)) == [([False, True, True], True)] * 2


def test_another_order_of_the_same_tensors_is_a_change() -> None:
    net = model()
    before = snapshot(net)
    net[0]._parameters["weight"] = net[0]._parameters.pop("weight")
    assert not before.holds([net])


def test_a_model_is_listed_as_torch_lists_it() -> None:
    net = model()
    net.append(net[2])  # one module under two names
    net[1].register_buffer("forgotten", torch.zeros(2), persistent=False)
    net[0].register_parameter("absent", None)
    net.append(nn.Sequential(OwnState(2, 2), nn.Linear(2, 2)))
    for listed in (net, net[:4]):
        wanted = listed.state_dict(keep_vars=True)
        found = list_state([listed]).tensors
        names = {name: named for named in found for name in (named.name, *named.aliases)}
        assert names.keys() == wanted.keys()
        assert [named.name for named in found] == [name for name in wanted if name in {n.name for n in found}]
        assert all(names[name].tensor.data_ptr() == wanted[name].data_ptr() for name in wanted if "twice" not in name)
        assert [list(wanted)[named.position] for named in found] == [named.name for named in found]


class KeepsOut(nn.Linear):
    _keys_to_ignore_on_save = ("bias",)


class Renames(nn.Linear):
    _checkpoint_conversion_mapping: ClassVar = {"^kernel": "weight"}


def test_a_model_that_converts_nothing_says_what_it_keeps_out() -> None:
    assert kept_out(model()) == frozenset()
    assert kept_out(torch.compile(KeepsOut(2, 2))) == {"bias"}  # type: ignore[arg-type]
    assert kept_out(Renames(2, 2)) is None
