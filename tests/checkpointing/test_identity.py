"""Which tensors are the same, and which tensor it is that is written: class, inner tensors, conjugates, overlaps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from tests.checkpointing.modes import EVERY, MODES
from tests.checkpointing.wrappers import Casting, Negated, Quantized
from tests.support.ranks import run
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from shardwise import Checkpointer, CheckpointingConfig
from shardwise.errors import MisuseError, ShardwiseError, TensorError
from shardwise.sources.tensor_bytes import flat_bytes
from shardwise.stateful_wrappers import ModelState
from shardwise.stateful_wrappers.model_parts import has_quantized_parameters
from shardwise.stateful_wrappers.names import list_state

Mode = dict[str, object]


def checkpointer(root: Path, mode: Mode, rank: int = 0) -> Checkpointer:
    return Checkpointer(CheckpointingConfig(checkpoint_dir=root, **mode), rank, 0, 0)


def save(root: Path, model: nn.Module, mode: Mode, step: int = 1) -> None:
    with checkpointer(root, mode) as engine:
        engine.save(0, step, model)


def restore(root: Path, model: nn.Module, mode: Mode) -> None:
    with checkpointer(root, mode) as engine:
        assert engine.restore(model) is not None


def exported(root: Path, step: int = 1) -> dict[str, torch.Tensor]:
    return load_file(root / f"epoch_0_step_{step}" / "model" / "consolidated" / "model.safetensors")


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    """What the state holds, as plain tensors."""

    def plain(tensor: torch.Tensor) -> torch.Tensor:
        tensor = getattr(tensor, "_local_tensor", tensor)
        tensor = getattr(tensor, "kept", tensor)
        return tensor.detach().clone().resolve_conj().resolve_neg()

    return {name: plain(tensor) for name, tensor in model.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def layers(seed: int, cls: type[Casting] = Casting) -> nn.Sequential:
    """Layers of one shape, which differ in their values alone."""
    torch.manual_seed(seed)
    net = nn.Sequential(*[nn.Linear(4, 4) for _ in range(3)])
    for layer in net:
        layer.weight = nn.Parameter(cls(layer.weight.detach().clone()))
    return net


@pytest.mark.parametrize("mode", MODES)
def test_wrappers_of_one_shape_are_not_ties(tmp_path: Path, mode: Mode) -> None:
    model = layers(0)
    assert len(list_state([model]).tensors) == 6
    save(tmp_path, model, mode)
    fresh = layers(1)
    restore(tmp_path, fresh, mode)
    assert same(values(fresh), values(model))
    assert all(isinstance(layer.weight, Casting) for layer in fresh)
    if mode.get("save_consolidated") == "every":
        assert same(exported(tmp_path), values(model))


def _sharded(root: Path, mode: Mode) -> bool:
    def build(seed: int) -> nn.Sequential:
        net = layers(seed)
        for layer in net:
            fully_shard(layer)
        return net

    model, fresh = build(0), build(1)
    with checkpointer(root, mode, dist.get_rank()) as engine:
        engine.save(0, 1, model)
    with checkpointer(root, mode, dist.get_rank()) as engine:
        engine.restore(fresh)
    weight = fresh[0].weight
    assert isinstance(weight, DTensor)
    assert isinstance(weight._local_tensor, Casting)
    if mode.get("save_consolidated") == "every" and dist.get_rank() == 0:
        assert same(exported(root), values(layers(0)))
    return same(values(model), values(fresh))


@pytest.mark.parametrize("mode", MODES)
def test_sharded_wrappers_are_not_ties(tmp_path: Path, mode: Mode) -> None:
    assert run(2, _sharded, tmp_path, mode) == [True, True]


def test_one_wrapper_under_two_names_is_a_tie(tmp_path: Path) -> None:
    model = layers(0)
    model[2].weight = model[0].weight
    model[1].weight = nn.Parameter(Casting(model[0].weight.kept))  # another object around the same memory
    assert [named.aliases for named in list_state([model]).tensors if named.aliases] == [("1.weight", "2.weight")]
    model[1].weight = nn.Parameter(Casting(model[0].weight.kept, "e5m2"))
    assert [named.aliases for named in list_state([model]).tensors if named.aliases] == [("2.weight",)]
    save(tmp_path, model, EVERY)
    fresh = layers(1)
    fresh[2].weight = fresh[0].weight
    restore(tmp_path, fresh, EVERY)
    assert same(values(fresh), values(model))


def replace_inner(layer: nn.Linear) -> None:
    assert isinstance(layer.weight, Casting)
    layer.weight.kept = torch.full((4, 4), 7.0)


def replace_wrapper(layer: nn.Linear) -> None:
    layer.weight = nn.Parameter(Casting(torch.full((4, 4), 7.0)))


def reinterpret(layer: nn.Linear) -> None:
    assert isinstance(layer.weight, Casting)
    layer.weight.kept = layer.weight.kept.t()


@pytest.mark.parametrize("mode", [{}, {"is_async": True}])
@pytest.mark.parametrize("change", [replace_inner, replace_wrapper, reinterpret])
def test_what_changes_inside_a_wrapper_is_saved(
    tmp_path: Path, change: Callable[[nn.Linear], None], mode: Mode
) -> None:
    model = layers(0)
    with checkpointer(tmp_path, EVERY | mode) as engine:
        engine.save(0, 1, model)
        engine.save(0, 2, model)
        change(model[1])
        engine.save(0, 3, model)
    assert same(exported(tmp_path, 3), values(model))
    assert not same(exported(tmp_path, 2), values(model))


class Turning(nn.Module):
    """Parameters that share memory and read it in different ways."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        memory = torch.randn(4, 4, dtype=torch.complex64)
        self.plain = nn.Parameter(memory)
        self.conjugate = nn.Parameter(memory.conj())
        self.negative = nn.Parameter(memory.conj().imag)
        self.imaginary = nn.Parameter(memory.imag)
        self.real = nn.Parameter(torch.randn(4, 4))
        self.transposed = nn.Parameter(self.real.detach().t())
        self.rows = nn.Parameter(self.real.detach()[1:3])
        self.flat = nn.Parameter(self.real.detach().flatten())
        self.bits = nn.Parameter(self.real.detach().view(torch.int32), requires_grad=False)


@pytest.mark.parametrize("mode", [*MODES, pytest.param({**EVERY, "share_replica_reads": "always"}, id="shared reads")])
def test_views_of_one_memory_are_not_ties(tmp_path: Path, mode: Mode) -> None:
    model, fresh = Turning(0), Turning(1)
    assert all(not named.aliases for named in list_state([model]).tensors)
    assert model.conjugate.is_conj()
    assert model.negative.is_neg()
    save(tmp_path, model, mode)
    restore(tmp_path, fresh, mode)
    assert same(values(fresh), values(model))
    if mode.get("save_consolidated") == "every":
        assert same(exported(tmp_path), values(model))


def _replicas(root: Path, mode: Mode) -> bool:
    model, fresh = Turning(0), Turning(1)
    with checkpointer(root, mode, dist.get_rank()) as engine:
        engine.save(0, 1, model)
        engine.restore(fresh)
    return same(values(model), values(fresh))


@pytest.mark.parametrize("mode", [EVERY, {**EVERY, "share_replica_reads": "always"}])
def test_replicas_share_views_of_one_memory(tmp_path: Path, mode: Mode) -> None:
    assert run(2, _replicas, tmp_path, mode) == [True, True]


def test_a_conjugate_in_the_place_of_what_it_is_of_is_noticed(tmp_path: Path) -> None:
    model = Turning(0)
    del model.conjugate, model.negative  # the others will be the same as these
    with checkpointer(tmp_path, EVERY) as engine:
        engine.save(0, 1, model)
        model.plain.data = model.plain.data.conj()
        model.imaginary.data = torch._neg_view(model.imaginary.data)
        engine.save(0, 2, model)
    assert same(exported(tmp_path, 2), values(model))
    assert not torch.equal(exported(tmp_path, 1)["plain"], exported(tmp_path, 2)["plain"])


class Holding(nn.Module):
    """A weight, and another parameter of an unusual kind."""

    def __init__(self, odd: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))
        self.odd = odd if isinstance(odd, nn.Parameter) else nn.Parameter(odd, requires_grad=False)


def quantized() -> torch.Tensor:
    return Quantized(torch.ones(4, 4, dtype=torch.int8), torch.tensor(0.5))


def jagged() -> torch.Tensor:
    return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)


REFUSED: list[tuple[str, Callable[[], torch.Tensor], type[ShardwiseError], str]] = [
    ("wrapper", quantized, TensorError, "Quantized around data8, scale has no exact form"),
    ("negated", lambda: Negated(torch.ones(4, 4)), TensorError, "Negated around kept has no exact form"),
    ("within", lambda: Casting(quantized()), TensorError, "Casting around kept has no exact form"),
    ("sparse", lambda: torch.eye(4).to_sparse(), MisuseError, "layout torch.sparse_coo"),
    ("jagged", jagged, MisuseError, "layout nested"),
    ("lazy", nn.UninitializedParameter, MisuseError, "has no shape yet"),
    ("complex128", lambda: torch.ones(4, dtype=torch.complex128), MisuseError, "complex128 cannot be stored"),
    ("meta", lambda: torch.ones(4, device="meta"), MisuseError, "meta device"),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("odd", "error", "message"), [pytest.param(*row, id=name) for name, *row in REFUSED])
def test_what_has_no_exact_form_is_refused_before_anything_is_written(
    tmp_path: Path, odd: Callable[[], torch.Tensor], error: type[ShardwiseError], message: str, mode: Mode
) -> None:
    with checkpointer(tmp_path, mode) as engine:
        with pytest.raises(error, match=message) as caught:
            engine.save(0, 1, Holding(odd()))
        assert caught.value.tensor == "odd"
        assert not [path for path in tmp_path.rglob("*") if path.is_file()]
        engine.save(0, 2, Holding(torch.ones(4, 4)))
        model = Holding(odd())
        before = model.weight.detach().clone()
        with pytest.raises(error, match=message):
            engine.restore(model)
    assert torch.equal(model.weight, before)


@pytest.mark.parametrize("mode", MODES)
def test_an_expanded_tensor_is_saved_and_not_loaded_into(tmp_path: Path, mode: Mode) -> None:
    def expanded() -> torch.Tensor:
        return torch.arange(4.0).expand(4, 4)

    with checkpointer(tmp_path, mode) as engine:
        engine.save(0, 1, Holding(expanded()))
        apart = Holding(torch.zeros(4, 4))
        engine.restore(apart)
        assert torch.equal(apart.odd, expanded())
        model = Holding(expanded())
        before = model.weight.detach().clone()
        with pytest.raises(TensorError, match="several elements of this expanded tensor") as caught:
            engine.restore(model)
        assert caught.value.tensor == "odd"
        assert torch.equal(model.weight, before)


def test_wrappers_are_initialised_as_what_they_wrap(tmp_path: Path) -> None:
    def build(wraps: bool) -> nn.Sequential:
        with torch.device("meta"):
            made = nn.Sequential(*[nn.Linear(4, 4) for _ in range(3)])
        for layer in made if wraps else ():
            layer.weight = nn.Parameter(Casting(layer.weight.detach()))
        return made

    with checkpointer(tmp_path, EVERY) as engine:
        made = [build(wraps) for wraps in (False, True)]
        for model in made:
            engine.load_base_model(model, "cpu", None, None, load_base_model=False)
    assert same(*map(values, made))
    assert not torch.equal(made[1][0].weight, made[1][1].weight)


def test_training_in_float8_is_not_quantization() -> None:
    pytest.importorskip("torchao")
    from torchao.float8 import Float8LinearConfig
    from torchao.float8.float8_linear_utils import convert_to_float8_training
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    def build() -> nn.Sequential:
        return nn.Sequential(nn.Linear(32, 32))

    config = Float8LinearConfig(enable_fsdp_float8_all_gather=True, emulate=True)
    assert not has_quantized_parameters(convert_to_float8_training(build(), config=config).modules())
    quantized_for_good = build()
    quantize_(quantized_for_good, Int8WeightOnlyConfig())
    assert has_quantized_parameters(quantized_for_good.modules())


def test_the_state_for_dcp_is_plain_memory() -> None:
    model, fresh = layers(0), layers(1)
    state = ModelState(model).state_dict()
    assert {type(tensor) for tensor in state.values()} == {torch.Tensor}
    ModelState(fresh).load_state_dict(state)
    assert same(values(fresh), values(model))
    ModelState(fresh).load_state_dict(layers(2).state_dict())
    assert same(values(fresh), values(layers(2)))
    with pytest.raises(TensorError, match="no exact form"):
        ModelState(Holding(quantized())).state_dict()


# --- inference mode -------------------------------------------------------------------------------------------------


def net(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    torch.manual_seed(3)
    model(torch.randn(5, 4)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.fixture(params=[torch.inference_mode, torch.no_grad])
def evaluating(request: pytest.FixtureRequest) -> Callable[[], torch.inference_mode]:
    mode: Callable[[], torch.inference_mode] = request.param
    return mode


@pytest.mark.parametrize("mode", [*MODES, pytest.param({**EVERY, "share_replica_reads": "always"}, id="shared reads")])
def test_calls_while_evaluating_leave_nothing_behind(
    tmp_path: Path, mode: Mode, evaluating: Callable[[], torch.inference_mode]
) -> None:
    model, fresh = net(0), net(1)
    pair = [torch.optim.AdamW(each.parameters()) for each in (model, fresh)]
    train(model, pair[0])
    scheduler = torch.optim.lr_scheduler.StepLR(pair[0], 1)
    with checkpointer(tmp_path, mode) as engine:
        with evaluating():
            engine.save(0, 1, model, pair[0], scheduler)
            engine.async_wait()
        train(model, pair[0])
        engine.save(0, 2, model, pair[0], scheduler)
        train(model, pair[0])
        with evaluating():
            engine.save(0, 3, model, pair[0], scheduler)
            engine.restore(fresh, pair[1], torch.optim.lr_scheduler.StepLR(pair[1], 1))
        assert all(not tensor.is_inference() for state in pair[1].state.values() for tensor in state.values())
        for each, optimizer in zip((model, fresh), pair, strict=True):
            train(each, optimizer)
        engine.save(0, 4, fresh, pair[1])
        engine.restore(model, pair[0], restore_from="epoch_0_step_2")
        engine.restore(model, pair[0], restore_from="epoch_0_step_4")
    assert same(values(model), values(fresh))
    assert all(parameter.requires_grad for parameter in fresh.parameters())


def test_a_base_model_loaded_while_evaluating_trains(
    tmp_path: Path, evaluating: Callable[[], torch.inference_mode]
) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    base = LlamaForCausalLM(config)
    base.save_pretrained(tmp_path / "base")
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    with checkpointer(tmp_path, EVERY) as engine, evaluating():
        engine.load_base_model(model, "cpu", tmp_path, str(tmp_path / "base"))
    assert same(dict(model.state_dict()), dict(base.state_dict()))
    optimizer = torch.optim.AdamW(model.parameters())
    model(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
    optimizer.step()
    assert not any(tensor.is_inference() for tensor in model.state_dict().values())


def _tensors(model: nn.Module) -> Iterator[torch.Tensor]:
    return iter(model.state_dict().values())


@pytest.mark.parametrize("mode", MODES)
def test_a_model_made_in_inference_mode_is_saved_and_filled(tmp_path: Path, mode: Mode) -> None:
    with torch.inference_mode():
        model, fresh = net(0), net(1)
        fresh[0].weight = nn.Parameter(fresh[0].weight.detach().t().clone().t())  # not filled byte by byte
    assert all(tensor.is_inference() for tensor in _tensors(fresh))
    with checkpointer(tmp_path, mode) as engine:
        engine.save(0, 1, model)
        engine.restore(fresh)
    with torch.inference_mode():
        assert same(values(fresh), values(model))
    assert all(flat_bytes(tensor).numel() for tensor in _tensors(fresh) if tensor.is_contiguous())
