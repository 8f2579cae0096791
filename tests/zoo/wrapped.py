"""Modules that other things are done to: parametrized, pruned, compiled, averaged, wrapped, with state of their own."""

from __future__ import annotations

import copy
import json
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping

import torch
from tests.zoo.rows import Right, Row, inputs
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrizations, parametrize, prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


def linear() -> nn.Linear:
    return nn.Linear(4, 6)


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 4))


# --- parametrizations and pruning -----------------------------------------------------------------------------------


class Symmetric(nn.Module):
    """A parametrization of a user's own."""

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.triu() + weight.triu(1).mT

    def right_inverse(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.triu()


def two_parametrizations() -> nn.Module:
    module = nn.Linear(4, 4)
    parametrize.register_parametrization(module, "weight", Symmetric())
    return parametrizations.spectral_norm(module)


def old(which: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made: nn.Module = getattr(nn.utils, which)(linear())
            return made

    return build


def with_mask() -> nn.Module:
    return prune.custom_from_mask(linear(), "weight", torch.arange(24).view(6, 4) % 2)


def pruned(which: Callable[..., nn.Module], *arguments: object) -> Callable[[], nn.Module]:
    return lambda: which(linear(), "weight", *arguments)


def pruned_twice() -> nn.Module:
    return prune.ln_structured(prune.l1_unstructured(linear(), "weight", 0.3), "weight", 0.5, 2, 0)


def removed() -> nn.Module:
    return prune.remove(prune.l1_unstructured(linear(), "weight", 0.3), "weight")


PARAMETRIZED: dict[str, Callable[[], nn.Module]] = {
    "parametrizations.weight_norm": lambda: parametrizations.weight_norm(linear()),
    "parametrizations.weight_norm of nn.LSTM": lambda: parametrizations.weight_norm(nn.LSTM(4, 4), "weight_hh_l0"),
    "parametrizations.spectral_norm": lambda: parametrizations.spectral_norm(linear()),
    "parametrizations.orthogonal": lambda: parametrizations.orthogonal(linear()),
    "parametrizations.orthogonal, cayley": lambda: parametrizations.orthogonal(
        nn.Linear(4, 4), orthogonal_map="cayley"
    ),
    "parametrize: two of them": two_parametrizations,
    "nn.utils.weight_norm": old("weight_norm"),
    "nn.utils.spectral_norm": old("spectral_norm"),
    "prune.l1_unstructured": pruned(prune.l1_unstructured, 0.3),
    "prune.random_unstructured": pruned(prune.random_unstructured, 0.3),
    "prune.ln_structured": pruned(prune.ln_structured, 0.5, 2, 0),
    "prune.random_structured": pruned(prune.random_structured, 0.5, 0),
    "prune.identity": pruned(prune.identity),
    "prune.custom_from_mask": with_mask,
    "prune, twice": pruned_twice,
    "prune.remove": removed,
}


# --- state of their own ---------------------------------------------------------------------------------------------


class History(nn.Linear):
    """As TransformerEngine's modules: scales outside of parameters, given out as bytes, empty before the first step."""

    def __init__(self) -> None:
        super().__init__(4, 6)
        self.amax: list[float] = []
        self.installed = 0

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        return super().forward(given) * (1 + sum(self.amax))

    def get_extra_state(self) -> torch.Tensor:
        text = json.dumps(self.amax).encode() if self.amax else b""
        return (
            torch.frombuffer(bytearray(text), dtype=torch.uint8).clone() if text else torch.empty(0, dtype=torch.uint8)
        )

    def set_extra_state(self, state: torch.Tensor) -> None:
        self.installed += 1
        self.amax = json.loads(bytes(state.tolist())) if state.numel() else []


def record(module: nn.Module) -> None:
    for inner in module.modules():
        if isinstance(inner, History):
            inner.amax = [0.25, 3.5]


class Counter(nn.Linear):
    """Extra state that is no tensor."""

    def __init__(self) -> None:
        super().__init__(4, 6)
        self.seen = 0

    def get_extra_state(self) -> dict[str, int]:
        return {"seen": self.seen}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.seen = state["seen"]


def count(module: nn.Module) -> None:
    assert isinstance(module, Counter)
    module.seen = 17


class Halved(nn.Linear):
    """Gives its weight out in another dtype, transposed, and takes it in again."""

    def __init__(self) -> None:
        super().__init__(4, 6)

    def _save_to_state_dict(self, destination: dict[str, object], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = self.weight.detach().to(torch.bfloat16).t()

    def _load_from_state_dict(self, state: dict[str, torch.Tensor], prefix: str, *rest: object) -> None:
        state = {**state, prefix + "weight": state[prefix + "weight"].t().float()}
        super()._load_from_state_dict(state, prefix, *rest)


class Renamed(nn.Linear):
    """Hooks of its own, as older releases of a model have them."""

    def __init__(self) -> None:
        super().__init__(4, 6)
        self.register_state_dict_post_hook(self._rename)
        self.register_load_state_dict_pre_hook(self._back)

    @staticmethod
    def _rename(module: nn.Module, state: dict[str, torch.Tensor], prefix: str, metadata: object) -> None:
        state[prefix + "kernel"] = state.pop(prefix + "weight")

    @staticmethod
    def _back(module: nn.Module, state: dict[str, torch.Tensor], prefix: str, *rest: object) -> None:
        if prefix + "kernel" in state:
            state[prefix + "weight"] = state.pop(prefix + "kernel")


class Derived(nn.Linear):
    """Keeps what it computed of its weight, and computes it anew after loading."""

    def __init__(self) -> None:
        super().__init__(4, 6)
        self.register_load_state_dict_post_hook(self._derive)
        self._derive(self, None)

    @staticmethod
    def _derive(module: nn.Module, keys: object) -> None:
        assert isinstance(module, Derived)
        module.doubled = module.weight.detach() * 2

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        return given @ self.doubled.t()


class Growing(nn.Module):
    """A buffer whose size is that of the state which is loaded."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4))
        self.register_buffer("seen", torch.empty(0))

    def _load_from_state_dict(self, state: dict[str, torch.Tensor], prefix: str, *rest: object) -> None:
        self.seen = torch.empty_like(state[prefix + "seen"])
        super()._load_from_state_dict(state, prefix, *rest)

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        return given * self.weight + self.seen.sum()


def grow(module: nn.Module) -> None:
    module.seen = torch.randn(5)


class Whole(nn.Module):
    """Says in ``state_dict`` itself what its state is."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = linear()

    def state_dict(self, *args: object, **kwargs: object) -> dict[str, object]:  # type: ignore[override]
        return OrderedDict((f"model.{name}", value.clone()) for name, value in self.inner.state_dict().items())

    def load_state_dict(self, state: Mapping[str, torch.Tensor], *args: object, **kwargs: object) -> object:  # type: ignore[override]
        return self.inner.load_state_dict({name.removeprefix("model."): value for name, value in state.items()})


def swapped_in() -> nn.Module:
    """A hook put into an instance, as libraries do."""
    module = net()
    module[0].register_state_dict_post_hook(lambda m, state, prefix, meta: state.update(
        {prefix + "weight": state[prefix + "weight"].detach().clone()}
    ))  # fmt: skip
    return module


OWN_STATE: list[Row] = [
    Row("extra state: a tensor that grows (as TransformerEngine's)", History, use=record, inputs=inputs((3, 4))),
    Row("extra state, in a part of the model", lambda: nn.Sequential(History(), nn.Linear(6, 2)), use=record),
    Row("extra state: not a tensor", Counter, Right.EITHER, use=count),
    Row("_save_to_state_dict that casts and transposes", Halved, inputs=inputs((3, 4))),
    Row("a state dict hook that renames", Renamed, inputs=inputs((3, 4))),
    Row("a state dict hook that clones", swapped_in, inputs=inputs((3, 4))),
    Row("a load hook that computes copies anew", Derived, inputs=inputs((3, 4)), spreads=("ddp",)),
    Row("a buffer that takes the size that is loaded", Growing, use=grow, inputs=inputs((3, 4))),
    Row("state_dict of its own", Whole, spreads=()),
]


# --- wrappers -------------------------------------------------------------------------------------------------------


class Config:
    """What wrappers hand out of the model inside."""

    hidden_size = 4

    def to_dict(self) -> dict[str, object]:
        return {"hidden_size": 4}


class ValueHead(nn.Module):
    """As trl's and others': the backbone beside a head, and the backbone's config for one's own."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = net()
        self.v_head = nn.Linear(4, 1)

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        return self.v_head(self.backbone(given))


class LlamaValueHead(nn.Module):
    """The same around a transformers model."""

    def __init__(self) -> None:
        from transformers import LlamaConfig, LlamaModel

        super().__init__()
        config = LlamaConfig(
            vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=2,
        )  # fmt: skip
        self.pretrained_model = LlamaModel(config)
        self.v_head = nn.Linear(8, 1)

    @property
    def config(self) -> object:
        return self.pretrained_model.config

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.v_head(self.pretrained_model(input_ids=ids).last_hidden_state)


def averaged(**settings: object) -> Callable[[], nn.Module]:
    return lambda: AveragedModel(net(), **settings)


def average(module: nn.Module) -> None:
    assert isinstance(module, AveragedModel)
    other = copy.deepcopy(module.module)
    for _ in range(2):
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.add_(torch.rand(parameter.shape))
        module.update_parameters(other)


def tied() -> nn.Module:
    module = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 6, bias=False))
    module[1].weight = module[0].weight
    return module


def frozen() -> nn.Module:
    module = net()
    module[0].requires_grad_(False)
    return module


def shared() -> nn.Module:
    part = nn.Linear(4, 4)
    return nn.Sequential(part, nn.ReLU(), part)


def doubled() -> nn.Module:
    return net().to(torch.float64)


def mixed() -> nn.Module:
    module = net()
    module[0].to(torch.bfloat16)
    return module


def complex_numbers() -> nn.Module:
    return nn.Linear(4, 4, dtype=torch.complex64)


def forgetful() -> nn.Module:
    module = net()
    module.register_buffer("table", torch.ones(3), persistent=False)
    module.register_buffer("absent", None)
    module.register_parameter("none", None)
    return module


WRAPPED: list[Row] = [
    Row("torch.compile", lambda: torch.compile(net()), spreads=("ddp", "fsdp2")),  # type: ignore[arg-type, return-value]
    Row("nn.Module.compile", lambda: _compiled(net())),
    Row("activation checkpointing", lambda: nn.Sequential(checkpoint_wrapper(linear()), nn.Linear(6, 2))),
    Row("AveragedModel", averaged(), use=average, inputs=inputs((3, 4))),
    Row("AveragedModel: EMA", averaged(multi_avg_fn=get_ema_multi_avg_fn(0.9)), use=average),
    Row("AveragedModel: buffers too", averaged(use_buffers=True), use=average),
    Row("a value head", ValueHead, inputs=inputs((3, 4))),
    Row("a value head around a transformers model", LlamaValueHead, Right.EITHER),
    Row("tied parameters", tied),
    Row("one module in two places", shared, inputs=inputs((3, 4))),
    Row("frozen parameters", frozen),
    Row("float64", doubled),
    Row("several dtypes", mixed),
    Row("complex numbers", complex_numbers),
    Row("buffers that are not saved", forgetful, inputs=inputs((3, 4))),
    Row("one inside the other: compiled EMA", lambda: torch.compile(AveragedModel(net()))),  # type: ignore[arg-type, return-value]
]


def _compiled(module: nn.Module) -> nn.Module:
    module.compile()
    return module


def rows() -> list[Row]:
    """All rows."""
    return [*(Row(name, build, inputs=inputs((3, 4)) if "LSTM" not in name and "4, 4" not in name else None)
              for name, build in PARAMETRIZED.items()), *OWN_STATE, *WRAPPED]  # fmt: skip
