"""Modules that make or take their state in a way of their own, as `nn.Module.state_dict` and its hooks let them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune


class ExtraTensor(nn.Linear):
    """Gives a tensor, as TransformerEngine's layers do: empty until there is something to say."""

    def __init__(self) -> None:
        super().__init__(4, 4)
        self.amax = 0.0
        self.calls = 0

    def get_extra_state(self) -> torch.Tensor:
        text = repr(self.amax).encode() if self.amax else b""
        return torch.tensor(list(text), dtype=torch.uint8)

    def set_extra_state(self, state: torch.Tensor) -> None:
        self.calls += 1
        self.amax = float(bytes(state.tolist()).decode() or 0)

    def train_some(self) -> None:
        self.amax = 3.25


class ExtraValues(nn.Linear):
    """Gives Python's values."""

    def __init__(self) -> None:
        super().__init__(4, 4)
        self.kept: dict[str, object] = {}
        self.calls = 0

    def get_extra_state(self) -> dict[str, object]:
        return self.kept

    def set_extra_state(self, state: dict[str, object]) -> None:
        self.calls += 1
        self.kept = state

    def train_some(self) -> None:
        self.kept = {"steps": 7, "scales": (1.5, [2, None]), "table": torch.arange(3), "dtype": torch.float16}


class HalfOnDisk(nn.Linear):
    """Float32 in memory, float16 in its state."""

    def __init__(self) -> None:
        super().__init__(4, 4)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = destination[prefix + "weight"].half()


class TransposedOnDisk(nn.Module):
    """Keeps its weight transposed."""

    def __init__(self, rows: int = 6, columns: int = 4) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(columns, rows))
        self._register_load_state_dict_pre_hook(self._back)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[prefix + "weight"] = self.weight.detach().t().contiguous()

    def _back(self, state_dict: dict[str, Any], prefix: str, *_: object) -> None:
        state_dict[prefix + "weight"] = state_dict[prefix + "weight"].t()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight


class Renamed(nn.Module):
    """A container whose hook gives its layer another name, and doubles its values, and whose pre-hook undoes it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.register_state_dict_post_hook(self._out)
        self.register_load_state_dict_pre_hook(self._back)

    @staticmethod
    def _out(module: nn.Module, state: dict[str, Any], prefix: str, metadata: object) -> None:
        for name in ("weight", "bias"):
            state[f"{prefix}inner.{name}"] = state.pop(f"{prefix}layer.{name}") * 2

    @staticmethod
    def _back(module: nn.Module, state: dict[str, Any], prefix: str, *_: object) -> None:
        for name in ("weight", "bias"):
            state[f"{prefix}layer.{name}"] = state.pop(f"{prefix}inner.{name}") / 2


class Cloned(nn.Linear):
    """Somebody's hook clones."""

    def __init__(self) -> None:
        super().__init__(4, 4)
        self._register_state_dict_hook(self._clone)

    @staticmethod
    def _clone(module: nn.Module, state: dict[str, Any], prefix: str, metadata: object) -> None:
        state[prefix + "weight"] = state[prefix + "weight"].detach().clone()


class OwnStateDict(nn.Linear):
    """Overrides `state_dict` itself; below a container torch does not call its `load_state_dict`."""

    def __init__(self) -> None:
        super().__init__(4, 4)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        state = super().state_dict(*args, **kwargs)
        prefix = kwargs.get("prefix", "")
        state[prefix + "weight"] = state[prefix + "weight"].double()
        return state


class OwnRoot(nn.Module):
    """A model that overrides both, and keeps a copy that is derived."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.derived = torch.zeros(4)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return {f"core.{name}": value + 1 for name, value in super().state_dict(*args, **kwargs).items()}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        found = super().load_state_dict({k.removeprefix("core."): v - 1 for k, v in state_dict.items()}, strict)
        self.derived = self.layer.bias.detach() * 2
        return found


class Derived(nn.Linear):
    """A copy for the kernel, made anew by a post-hook."""

    def __init__(self) -> None:
        super().__init__(4, 4)
        self.packed = self.weight.detach().t().contiguous()
        self.register_load_state_dict_post_hook(self._pack)

    @staticmethod
    def _pack(module: nn.Module, keys: object) -> None:
        assert isinstance(module, Derived)
        module.packed = module.weight.detach().t().contiguous()


class Resized(nn.Module):
    """A buffer that grows while it is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.empty(0))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        self.seen = torch.empty_like(state_dict[prefix + "seen"])
        super()._load_from_state_dict(state_dict, prefix, *args)

    def train_some(self) -> None:
        self.seen = torch.arange(5.0)


class Unlisted(nn.Module):
    """A fresh one does not list what a trained one has."""

    def __init__(self) -> None:
        super().__init__()
        self.table: torch.Tensor | None = None

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if self.table is not None:
            destination[prefix + "table"] = self.table

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        self.table = state_dict.pop(prefix + "table", None)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def train_some(self) -> None:
        self.table = torch.arange(6.0).view(2, 3)


class Versioned(nn.Linear):
    """Says in which version its state was saved."""

    _version = 3

    def __init__(self) -> None:
        super().__init__(4, 4)
        self.found: object = None

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any
    ) -> None:
        self.found = local_metadata.get("version")
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)


def fake_quantized() -> nn.Module:
    from torch.ao.quantization import FakeQuantize, MovingAveragePerChannelMinMaxObserver

    quantize = FakeQuantize(MovingAveragePerChannelMinMaxObserver, quant_min=0, quant_max=255, dtype=torch.quint8)
    return nn.Sequential(nn.Linear(4, 4), quantize)


def quantized() -> nn.Module:
    from torch.ao.nn.quantized import Linear

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer = Linear(4, 4)
        weight = torch.quantize_per_tensor(torch.randn(4, 4), 0.1, 3, torch.qint8)
        layer.set_weight_bias(weight, torch.randn(4))
        layer.scale, layer.zero_point = 0.25, 2
    return layer


def old_weight_norm() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.utils.weight_norm(nn.Linear(4, 4))


def pruned() -> nn.Module:
    layer = nn.Linear(4, 4)
    prune.l1_unstructured(layer, "weight", 0.5)
    return layer


def checkpointed() -> nn.Module:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    return nn.Sequential(checkpoint_wrapper(nn.Sequential(TransposedOnDisk(4, 4), nn.Linear(4, 4), ExtraTensor())))


def shared() -> nn.Module:
    layer = TransposedOnDisk(4, 4)
    return nn.Sequential(layer, nn.ReLU(), layer)


class Holder(nn.ModuleDict):
    """What FSDP2 takes for a model."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for module in self.values():
            x = module(x)
        return x


BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "extra_tensor": ExtraTensor,
    "extra_values": ExtraValues,
    "half_on_disk": HalfOnDisk,
    "transposed": TransposedOnDisk,
    "renamed": Renamed,
    "cloned": Cloned,
    "own_state_dict": OwnStateDict,
    "derived": Derived,
    "resized": Resized,
    "unlisted": Unlisted,
    "versioned": Versioned,
    "fake_quantized": fake_quantized,
    "quantized": quantized,
    "batch_norm": lambda: nn.BatchNorm1d(4),
    "instance_norm": lambda: nn.InstanceNorm1d(4, affine=True, track_running_stats=True),
    "weight_norm": lambda: parametrizations.weight_norm(nn.Linear(4, 4)),
    "spectral_norm": lambda: parametrizations.spectral_norm(nn.Linear(4, 4)),
    "orthogonal": lambda: parametrizations.orthogonal(nn.Linear(4, 4)),
    "old_weight_norm": old_weight_norm,
    "old_spectral_norm": lambda: nn.utils.spectral_norm(nn.Linear(4, 4)),
    "pruned": pruned,
    "checkpointed": checkpointed,
    "shared": shared,
}


def build(kind: str, seed: int) -> nn.Module:
    """A model with such a module, an ordinary one, and different values for each seed."""
    torch.manual_seed(seed)
    if kind == "own_root":
        return OwnRoot()
    return Holder({"first": nn.Linear(4, 4), "odd": BUILDERS[kind](), "last": nn.Linear(4, 2)})


def train_some(model: nn.Module) -> None:
    """Let state be what it becomes in training."""
    with torch.no_grad():
        for buffer in model.buffers():
            if buffer.dtype.is_floating_point and buffer.numel():
                buffer.add_(0.5)
    for module in model.modules():
        if module.__class__.__name__ == "FakeQuantize":
            module(torch.randn(3, 5))
        if callable(method := getattr(module, "train_some", None)):
            method()


#: Attributes in which the classes above keep what is no parameter.
_KEPT = ("amax", "calls", "kept", "packed", "derived", "found", "table", "scale", "zero_point")


def effect(model: nn.Module) -> dict[str, object]:
    """Everything that loading may have changed."""
    found: dict[str, object] = {}
    for name, module in model.named_modules():
        for key, value in (*module._parameters.items(), *module._buffers.items()):
            found[f"{name}.{key}"] = value
        found |= {f"{name}.{key}": vars(module)[key] for key in _KEPT if key in vars(module)}
        if parametrize.is_parametrized(module):
            found[f"{name}.parametrized"] = module.weight
    return found | {f"state {name}": value for name, value in model.state_dict().items()}


def equal(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        a, b = (getattr(t, "_local_tensor", t).detach() for t in (a, b))
        if a.is_quantized:
            return a.dtype == b.dtype and str(a) == str(b)
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return type(a) is type(b) and bool(a == b)


def differing(a: Mapping[str, object], b: Mapping[str, object]) -> list[str]:
    """Names under which two models are not the same."""
    return sorted(name for name in a.keys() | b.keys() if name not in a or name not in b or not equal(a[name], b[name]))
