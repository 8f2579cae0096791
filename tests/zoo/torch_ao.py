"""Observed and quantized modules of ``torch.ao``."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from functools import partial
from types import ModuleType

import torch
import torch.ao.nn.intrinsic as nni
import torch.ao.nn.intrinsic.qat as nniqat
import torch.ao.nn.intrinsic.quantized as nniq
import torch.ao.nn.qat as nnqat
import torch.ao.nn.qat.dynamic as nnqatd
import torch.ao.nn.quantizable as nnqz
import torch.ao.nn.quantized as nnq
import torch.ao.nn.quantized.dynamic as nnqd
import torch.ao.quantization as ao
from tests.zoo.rows import Right, Row
from torch import nn

_PACKAGES: dict[str, ModuleType] = {
    "qat": nnqat,
    "qat.dynamic": nnqatd,
    "intrinsic": nni,
    "intrinsic.qat": nniqat,
    "intrinsic.quantized": nniq,
    "quantizable": nnqz,
    "quantized": nnq,
    "quantized.dynamic": nnqd,
    "quantization": ao,
}


def nni_of(name: str) -> type[nn.Module]:
    found: type[nn.Module] = getattr(nni, name)
    return found


class Net(nn.Module):
    """What can be observed, and quantized eagerly."""

    def __init__(self) -> None:
        super().__init__()
        self.quant, self.dequant = ao.QuantStub(), ao.DeQuantStub()
        self.conv, self.norm, self.relu = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()
        self.linear = nn.Linear(16, 4)

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        found = self.relu(self.norm(self.conv(self.quant(given))))
        return self.dequant(self.linear(found.flatten(1)))


def calibrate(module: nn.Module) -> None:
    for _ in range(2):
        module(torch.randn(2, 3, 4, 4) * 3)


def observed() -> nn.Module:
    module = Net().eval()
    module.qconfig = ao.get_default_qconfig("x86")
    return ao.prepare(ao.fuse_modules(module, [["conv", "norm", "relu"]]))


def training() -> nn.Module:
    module = Net().train()
    module.qconfig = ao.get_default_qat_qconfig("x86")
    return ao.prepare_qat(ao.fuse_modules_qat(module, [["conv", "norm", "relu"]]))


def converted() -> nn.Module:
    module = observed()
    calibrate(module)
    return ao.convert(module)


def dynamic(*kinds: type[nn.Module]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        parts = {"linear": nn.Linear(4, 4), "lstm": nn.LSTM(4, 4), "gru": nn.GRU(4, 4), "cell": nn.LSTMCell(4, 4)}
        return ao.quantize_dynamic(nn.ModuleDict(parts), set(kinds))

    return build


def observe(module: nn.Module) -> None:
    for _ in range(2):
        module(torch.randn(3, 4))


OBSERVERS: dict[str, Callable[[], nn.Module]] = {
    "MinMaxObserver": ao.MinMaxObserver,
    "MovingAverageMinMaxObserver": ao.MovingAverageMinMaxObserver,
    "PerChannelMinMaxObserver": ao.PerChannelMinMaxObserver,
    "MovingAveragePerChannelMinMaxObserver": ao.MovingAveragePerChannelMinMaxObserver,
    "HistogramObserver": ao.HistogramObserver,
    "FixedQParamsObserver": lambda: ao.FixedQParamsObserver(0.5, 1),
    "PlaceholderObserver": ao.PlaceholderObserver,
    "NoopObserver": ao.NoopObserver,
    "ReuseInputObserver": ao.ReuseInputObserver,
    "RecordingObserver": ao.RecordingObserver,
    "FakeQuantize": ao.FakeQuantize,
    "FakeQuantize, per channel": ao.default_per_channel_weight_fake_quant,
    "FixedQParamsFakeQuantize": lambda: ao.FixedQParamsFakeQuantize(
        ao.FixedQParamsObserver.with_args(scale=0.5, zero_point=1)
    ),
    "FusedMovingAvgObsFakeQuantize": ao.FusedMovingAvgObsFakeQuantize,
    "QuantStub": ao.QuantStub,
    "DeQuantStub": ao.DeQuantStub,
    "QuantWrapper": lambda: ao.QuantWrapper(nn.Linear(4, 4)),
}

#: Quantized modules, by constructor arguments.
QUANTIZED: dict[str, tuple[object, ...]] = {
    "BatchNorm2d": (4,),
    "BatchNorm3d": (4,),
    "Conv1d": (4, 6, 3),
    "Conv2d": (4, 6, 3),
    "Conv3d": (4, 6, 3),
    "ConvTranspose1d": (4, 6, 3),
    "ConvTranspose2d": (4, 6, 3),
    "ConvTranspose3d": (4, 6, 3),
    "FXFloatFunctional": (),
    "MaxPool2d": (2,),
    "DeQuantize": (),
    "ELU": (0.5, 1),
    "Embedding": (6, 4),
    "EmbeddingBag": (6, 4),
    "GroupNorm": (2, 4, torch.ones(4), torch.zeros(4), 0.5, 1),
    "Hardswish": (0.5, 1),
    "InstanceNorm1d": (4, torch.ones(4), torch.zeros(4), 0.5, 1),
    "InstanceNorm2d": (4, torch.ones(4), torch.zeros(4), 0.5, 1),
    "InstanceNorm3d": (4, torch.ones(4), torch.zeros(4), 0.5, 1),
    "LayerNorm": ([4], torch.ones(4), torch.zeros(4), 0.5, 1),
    "LeakyReLU": (0.5, 1),
    "Linear": (4, 6),
    "PReLU": (0.5, 1),
    "QFunctional": (),
    "FloatFunctional": (),
    "Quantize": (0.5, 1, torch.quint8),
    "ReLU6": (),
    "Sigmoid": (0.5, 1),
    "Softmax": (),
    "Dropout": (),
}

DYNAMIC: dict[str, tuple[object, ...]] = {
    "Linear": (4, 6),
    "LSTM": (4, 4),
    "GRU": (4, 4),
    "LSTMCell": (4, 4),
    "GRUCell": (4, 4),
    "RNNCell": (4, 4),
    "Conv1d": (4, 6, 3),
    "Conv2d": (4, 6, 3),
    "Conv3d": (4, 6, 3),
    "ConvTranspose1d": (4, 6, 3),
    "ConvTranspose2d": (4, 6, 3),
    "ConvTranspose3d": (4, 6, 3),
}

#: Quantized modules with what follows them folded in.
FOLDED: dict[str, tuple[object, ...]] = {
    "LinearReLU": (4, 6),
    "LinearLeakyReLU": (4, 6, 0.1),
    "LinearTanh": (4, 6),
    "ConvReLU1d": (4, 6, 3),
    "ConvReLU2d": (4, 6, 3),
    "ConvReLU3d": (4, 6, 3),
    "ConvAdd2d": (4, 6, 3),
    "ConvAddReLU2d": (4, 6, 3),
    "BNReLU2d": (4,),
    "BNReLU3d": (4,),
}

#: Of these there is no module: bases, protocols, and what other modules consist of.
NO_MODULES = {
    "quantized": {"LSTM", "MultiheadAttention"},  # made by converting the quantizable ones, below
    "quantization": {"FakeQuantizeBase", "ObserverBase", "UniformQuantizationObserverBase",
                     "AffineQuantizedObserverBase", "_DerivedObserverOrFakeQuantize"},
    "intrinsic": {"_FusedModule"},
}  # fmt: skip

#: Modules whose weights are quantized for show while they train; all take a qconfig.
IN_TRAINING: dict[str, tuple[object, ...]] = {
    "qat.Linear": (4, 6),
    "qat.Conv1d": (4, 6, 3),
    "qat.Conv2d": (4, 6, 3),
    "qat.Conv3d": (4, 6, 3),
    "qat.Embedding": (6, 4),
    "qat.EmbeddingBag": (6, 4),
    "qat.dynamic.Linear": (4, 6),
    "intrinsic.qat.LinearReLU": (4, 6),
    "intrinsic.qat.LinearBn1d": (4, 6),
    "intrinsic.qat.ConvReLU1d": (4, 6, 3),
    "intrinsic.qat.ConvReLU2d": (4, 6, 3),
    "intrinsic.qat.ConvReLU3d": (4, 6, 3),
    "intrinsic.qat.ConvBn1d": (4, 6, 3),
    "intrinsic.qat.ConvBn2d": (4, 6, 3),
    "intrinsic.qat.ConvBn3d": (4, 6, 3),
    "intrinsic.qat.ConvBnReLU1d": (4, 6, 3),
    "intrinsic.qat.ConvBnReLU2d": (4, 6, 3),
    "intrinsic.qat.ConvBnReLU3d": (4, 6, 3),
}

_CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def _conv(dims: int) -> nn.Module:
    return _CONVOLUTIONS[dims](4, 6, 3)


def _norm(dims: int) -> nn.Module:
    return _NORMS[dims](6)


#: Modules that are put together before they are observed.
FUSED: dict[str, Callable[[], nn.Module]] = {
    **{f"ConvBn{n}d": partial(lambda n: nni_of(f"ConvBn{n}d")(_conv(n), _norm(n)), n) for n in (1, 2, 3)},
    **{f"ConvReLU{n}d": partial(lambda n: nni_of(f"ConvReLU{n}d")(_conv(n), nn.ReLU()), n) for n in (1, 2, 3)},
    **{
        f"ConvBnReLU{n}d": partial(lambda n: nni_of(f"ConvBnReLU{n}d")(_conv(n), _norm(n), nn.ReLU()), n)
        for n in (1, 2, 3)
    },
    **{f"BNReLU{n}d": partial(lambda n: nni_of(f"BNReLU{n}d")(_norm(n), nn.ReLU()), n) for n in (2, 3)},
    "LinearReLU": lambda: nni.LinearReLU(nn.Linear(4, 6), nn.ReLU()),
    "LinearLeakyReLU": lambda: nni.LinearLeakyReLU(nn.Linear(4, 6), nn.LeakyReLU()),
    "LinearTanh": lambda: nni.LinearTanh(nn.Linear(4, 6), nn.Tanh()),
    "LinearBn1d": lambda: nni.LinearBn1d(nn.Linear(4, 6), nn.BatchNorm1d(6)),
    "ConvAdd2d": lambda: nni.ConvAdd2d(nn.Conv2d(4, 6, 3), torch.add),
    "ConvAddReLU2d": lambda: nni.ConvAddReLU2d(nn.Conv2d(4, 6, 3), torch.add, nn.ReLU()),
}

FLOAT: dict[str, Callable[[], nn.Module]] = {
    **{f"intrinsic.{name}": build for name, build in FUSED.items()},
    "quantizable.LSTM": lambda: nnqz.LSTM(4, 4),
    "quantizable.LSTMCell": lambda: nnqz.LSTMCell(4, 4),
    "quantizable.MultiheadAttention": lambda: nnqz.MultiheadAttention(4, 2),
}


def _quietly(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def made() -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # eager quantization is deprecated
            return build()

    return made


def _of(package: object, name: str, arguments: tuple[object, ...]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        given = [nn.Parameter(value.clone()) if isinstance(value, torch.Tensor) else value for value in arguments]
        module: nn.Module = getattr(package, name)(*given)
        return module

    return _quietly(build)


def _in_training(name: str, arguments: tuple[object, ...]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        package, _, kind = name.rpartition(".")
        config = ao.get_default_qat_qconfig("x86")
        if "Embedding" in name:
            config = ao.default_embedding_qat_qconfig
        if "dynamic" in name:
            config = ao.QConfig(activation=ao.default_dynamic_fake_quant, weight=ao.default_fake_quant)
        module: nn.Module = getattr(_PACKAGES[package], kind)(*arguments, qconfig=config)
        return module

    return _quietly(build)


def recurrent() -> nn.Module:
    module = nn.Sequential(ao.QuantStub(), nnqz.LSTM(4, 4)).eval()
    module.qconfig = ao.get_default_qconfig("x86")
    ao.prepare(module, inplace=True)
    module(torch.randn(3, 2, 4))
    return ao.convert(module)


def attention() -> nn.Module:
    module = nn.ModuleDict({"attention": nnqz.MultiheadAttention(4, 2)}).eval()
    module.qconfig = ao.get_default_qconfig("x86")
    ao.prepare(module, inplace=True)
    module["attention"](*(torch.randn(3, 2, 4) for _ in range(3)))
    return ao.convert(module)


def classes() -> set[str]:
    """The names in the table of the module classes that torch.ao has, but for `NO_MODULES`."""
    found: set[str] = set()
    for title, package in _PACKAGES.items():
        prefix = "ao." if title == "quantization" else f"ao.nn.{title}."
        names = {
            kind.__name__ for kind in vars(package).values() if inspect.isclass(kind) and issubclass(kind, nn.Module)
        }
        found |= {prefix + name for name in names - NO_MODULES.get(title, set())}
    return found


def rows() -> list[Row]:
    """All rows."""
    found = [
        Row(f"ao.{name}", _quietly(build), use=None if "Wrapper" in name else observe, change=False, spreads=())
        for name, build in OBSERVERS.items()
    ]
    found += [
        Row("ao: prepared", _quietly(observed), use=calibrate, change=False, spreads=("ddp",)),
        Row("ao: prepared for training", _quietly(training), use=calibrate, change=False, spreads=("ddp",)),
        Row("ao: converted", _quietly(converted), Right.EITHER, change=False, spreads=()),
        Row("ao: quantizable.LSTM, converted", _quietly(recurrent), Right.EITHER, change=False, spreads=()),
        Row("ao: quantizable.MultiheadAttention, converted", _quietly(attention), Right.EITHER, change=False,
            spreads=()),
        Row("ao: nn.Linear, dynamic", _quietly(dynamic(nn.Linear)), Right.EITHER, change=False, spreads=()),
        Row("ao: nn.LSTM and more, dynamic", _quietly(dynamic(nn.LSTM, nn.GRU, nn.LSTMCell)), Right.EITHER,
            change=False, spreads=()),
    ]  # fmt: skip
    found += [Row(f"ao.nn.{name}", _quietly(build)) for name, build in FLOAT.items()]
    found += [Row(f"ao.nn.{name}", _in_training(name, made)) for name, made in IN_TRAINING.items()]
    for title, package, table in (
        ("quantized", nnq, QUANTIZED),
        ("quantized.dynamic", nnqd, DYNAMIC),
        ("intrinsic.quantized", nniq, FOLDED),
    ):
        found += [
            Row(f"ao.nn.{title}.{name}", _of(package, name, arguments), Right.EITHER, change=False, spreads=())
            for name, arguments in table.items()
        ]
    return found
