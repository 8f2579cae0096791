"""Every module class of ``torch.nn``."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable

import torch
from tests.zoo.rows import Right, Row, indices, inputs
from torch import nn

#: Those that have parameters or buffers: constructor arguments, and what one is run on.
WITH_STATE: dict[str, tuple[tuple[object, ...], Callable[[], tuple[object, ...]] | None]] = {
    "AdaptiveLogSoftmaxWithLoss": ((8, 10, [3, 6]), lambda: (torch.randn(5, 8), torch.randint(10, (5,)))),
    "BatchNorm1d": ((4,), inputs((3, 4))),
    "BatchNorm2d": ((4,), inputs((3, 4, 2, 2))),
    "BatchNorm3d": ((4,), inputs((3, 4, 2, 2, 2))),
    "Bilinear": ((4, 4, 2), inputs((3, 4), (3, 4))),
    "Conv1d": ((4, 6, 3), inputs((2, 4, 5))),
    "Conv2d": ((4, 6, 3), inputs((2, 4, 5, 5))),
    "Conv3d": ((4, 6, 3), inputs((2, 4, 5, 5, 5))),
    "ConvTranspose1d": ((4, 6, 3), inputs((2, 4, 5))),
    "ConvTranspose2d": ((4, 6, 3), inputs((2, 4, 5, 5))),
    "ConvTranspose3d": ((4, 6, 3), inputs((2, 4, 3, 3, 3))),
    "Embedding": ((6, 4), indices(2, 3)),
    "EmbeddingBag": ((6, 4), indices(2, 3)),
    "GRU": ((4, 6, 2), inputs((3, 2, 4))),
    "GRUCell": ((4, 6), inputs((2, 4))),
    "GroupNorm": ((2, 4), inputs((3, 4, 2))),
    "LSTM": ((4, 6, 2), inputs((3, 2, 4))),
    "LSTMCell": ((4, 6), inputs((2, 4))),
    "LayerNorm": ((4,), inputs((3, 4))),
    "Linear": ((4, 6), inputs((3, 4))),
    "MultiheadAttention": ((4, 2), inputs((3, 2, 4), (3, 2, 4), (3, 2, 4))),
    "PReLU": ((4,), inputs((3, 4))),
    "RMSNorm": ((4,), inputs((3, 4))),
    "RNN": ((4, 6, 2), inputs((3, 2, 4))),
    "RNNBase": (("LSTM", 4, 6), None),
    "RNNCell": ((4, 6), inputs((2, 4))),
    "RNNCellBase": ((4, 6, True, 2), None),
    "SyncBatchNorm": ((4,), None),
    "Transformer": ((4, 2, 1, 1, 8), inputs((3, 2, 4), (3, 2, 4))),
    "TransformerDecoderLayer": ((4, 2, 8), inputs((3, 2, 4), (3, 2, 4))),
    "TransformerEncoderLayer": ((4, 2, 8), inputs((3, 2, 4))),
    # A loss has what it was given.
    "BCELoss": ((torch.rand(4),), None),
    "BCEWithLogitsLoss": ((torch.rand(4), None, None, "mean", torch.rand(4)), None),
    "CrossEntropyLoss": ((torch.rand(4),), None),
    "MultiLabelSoftMarginLoss": ((torch.rand(4),), None),
    "MultiMarginLoss": ((1, 1.0, torch.rand(4)), None),
    "NLLLoss": ((torch.rand(4),), None),
    "NLLLoss2d": ((torch.rand(4),), None),
}

#: Those that have none, by constructor arguments.
WITHOUT_STATE: dict[tuple[object, ...], tuple[str, ...]] = {
    (): (
        "AlphaDropout", "CELU", "CTCLoss", "CosineEmbeddingLoss", "CosineSimilarity", "Dropout", "Dropout1d",
        "Dropout2d", "Dropout3d", "ELU", "FeatureAlphaDropout", "Flatten", "GELU", "GLU", "GaussianNLLLoss",
        "Hardshrink", "Hardsigmoid", "Hardswish", "Hardtanh", "HingeEmbeddingLoss", "HuberLoss", "Identity",
        "KLDivLoss", "L1Loss", "LeakyReLU", "LogSigmoid", "LogSoftmax", "MSELoss", "MarginRankingLoss", "Mish",
        "Module", "MultiLabelMarginLoss", "PairwiseDistance", "PoissonNLLLoss", "RReLU", "ReLU", "ReLU6", "SELU",
        "SiLU", "Sigmoid", "SmoothL1Loss", "SoftMarginLoss", "Softmax", "Softmax2d", "Softmin", "Softplus",
        "Softshrink", "Softsign", "Tanh", "Tanhshrink", "TripletMarginLoss", "TripletMarginWithDistanceLoss",
        "Upsample",
    ),
    (2,): (
        "AdaptiveAvgPool1d", "AdaptiveAvgPool2d", "AdaptiveAvgPool3d", "AdaptiveMaxPool1d", "AdaptiveMaxPool2d",
        "AdaptiveMaxPool3d", "AvgPool1d", "AvgPool2d", "AvgPool3d", "ChannelShuffle", "CircularPad1d",
        "CircularPad2d", "CircularPad3d", "CrossMapLRN2d", "InstanceNorm1d", "InstanceNorm2d", "InstanceNorm3d",
        "LocalResponseNorm", "MaxPool1d", "MaxPool2d", "MaxPool3d", "MaxUnpool1d", "MaxUnpool2d", "MaxUnpool3d",
        "PixelShuffle", "PixelUnshuffle", "ReflectionPad1d", "ReflectionPad2d", "ReflectionPad3d",
        "ReplicationPad1d", "ReplicationPad2d", "ReplicationPad3d", "Unfold", "UpsamplingBilinear2d",
        "UpsamplingNearest2d", "ZeroPad1d", "ZeroPad2d", "ZeroPad3d",
    ),
    (2, 1.0): ("ConstantPad1d", "ConstantPad2d", "ConstantPad3d", "Threshold"),
    (2, 3): ("Fold", "FractionalMaxPool2d", "FractionalMaxPool3d", "LPPool1d", "LPPool2d", "LPPool3d"),
    (1, (2, 2)): ("Unflatten",),
}  # fmt: skip

#: Those that get their sizes when they are first run.
LAZY: dict[str, tuple[tuple[object, ...], tuple[int, ...]]] = {
    "LazyBatchNorm1d": ((), (3, 4)),
    "LazyBatchNorm2d": ((), (3, 4, 2, 2)),
    "LazyBatchNorm3d": ((), (3, 4, 2, 2, 2)),
    "LazyConv1d": ((6, 2), (3, 4, 5)),
    "LazyConv2d": ((6, 2), (3, 4, 5, 5)),
    "LazyConv3d": ((6, 2), (3, 4, 5, 5, 5)),
    "LazyConvTranspose1d": ((6, 2), (3, 4, 5)),
    "LazyConvTranspose2d": ((6, 2), (3, 4, 5, 5)),
    "LazyConvTranspose3d": ((6, 2), (3, 4, 3, 3, 3)),
    "LazyInstanceNorm1d": ((1e-5, 0.1, True, True), (3, 4, 5)),
    "LazyInstanceNorm2d": ((1e-5, 0.1, True, True), (3, 4, 5, 5)),
    "LazyInstanceNorm3d": ((1e-5, 0.1, True, True), (3, 4, 3, 3, 3)),
    "LazyLinear": ((6,), (3, 4)),
}


INSTANCE_NORMS = ("InstanceNorm1d", "InstanceNorm2d", "InstanceNorm3d")


def _contained() -> list[nn.Module]:
    return [nn.Linear(4, 4), nn.BatchNorm1d(4)]


def _encoder_layer() -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(4, 2, 8)


CONTAINERS: dict[str, Callable[[], nn.Module]] = {
    "DataParallel": lambda: nn.DataParallel(nn.Sequential(*_contained())),
    "ModuleDict": lambda: nn.ModuleDict({"a": nn.Linear(4, 4)}),
    "ModuleList": lambda: nn.ModuleList(_contained()),
    "ParameterDict": lambda: nn.ParameterDict({"a": torch.randn(4, 4), "b": nn.Parameter(torch.randn(4))}),
    "ParameterList": lambda: nn.ParameterList([torch.randn(4, 4), torch.randn(4)]),
    "Sequential": lambda: nn.Sequential(*_contained()),
    "TransformerDecoder": lambda: nn.TransformerDecoder(nn.TransformerDecoderLayer(4, 2, 8), 2),
    "TransformerEncoder": lambda: nn.TransformerEncoder(_encoder_layer(), 2, enable_nested_tensor=False),
}


def _made(name: str, arguments: tuple[object, ...]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # some are deprecated
            given = [value.clone() if isinstance(value, torch.Tensor) else value for value in arguments]
            module: nn.Module = getattr(nn, name)(*given)
            return module

    return build


def _run_once(shape: tuple[int, ...]) -> Callable[[nn.Module], object]:
    return lambda module: module(torch.randn(shape))


def _lazy(name: str, arguments: tuple[object, ...], shape: tuple[int, ...]) -> list[Row]:
    def run() -> nn.Module:
        module = _made(name, arguments)()
        module(torch.randn(shape))
        return module

    return [
        Row(f"nn.{name}", run, inputs=inputs(shape)),
        Row(f"nn.{name}, not run yet", _made(name, arguments), Right.EITHER, change=False, spreads=()),
        Row(
            f"nn.{name}, run, into one not run yet", _made(name, arguments), Right.EITHER, _run_once(shape), spreads=()
        ),
    ]


def _container() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.Container(first=nn.Linear(4, 4))


def _losses_of_linear() -> list[Row]:
    """A class of newer releases."""
    if not hasattr(nn, "LinearCrossEntropyLoss"):
        return []
    return [Row("nn.LinearCrossEntropyLoss", lambda: nn.LinearCrossEntropyLoss(4, 6))]


def rows() -> list[Row]:
    """All rows."""
    found = [
        Row(f"nn.{name}", _made(name, arguments), inputs=example) for name, (arguments, example) in WITH_STATE.items()
    ]
    found += [Row(f"nn.{name}", build) for name, build in CONTAINERS.items()]
    found += [Row("nn.Container", _container)]
    found += [Row(f"nn.{name}, affine", _made(name, (4, 1e-5, 0.1, True, True))) for name in INSTANCE_NORMS]
    for arguments, names in WITHOUT_STATE.items():
        found += [Row(f"nn.{name}", _made(name, arguments), spreads=()) for name in names]
    for name, (arguments, shape) in LAZY.items():
        found += _lazy(name, arguments, shape)
    return [*found, *_losses_of_linear()]


def classes() -> set[str]:
    """The module classes that torch.nn has."""
    listed = {*dir(nn), *getattr(nn.modules, "__all__", ())}
    kinds = {name: getattr(nn, name, None) for name in listed}
    return {name for name, kind in kinds.items() if inspect.isclass(kind) and issubclass(kind, nn.Module)}
