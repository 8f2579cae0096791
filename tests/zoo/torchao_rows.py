"""Models under torchao: float8 training, quantized training, quantization-aware training, quantized weights."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
from tests.zoo.rows import Right, Row
from torch import nn

IS_HERE = importlib.util.find_spec("torchao") is not None


def net() -> nn.Module:
    """Layers of one shape, which differ in their values alone."""
    return nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32)).to(torch.bfloat16)


def float8(gathers: bool) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from torchao.float8 import Float8LinearConfig
        from torchao.float8.float8_linear_utils import convert_to_float8_training

        config = Float8LinearConfig(enable_fsdp_float8_all_gather=gathers, emulate=True)
        module: nn.Module = convert_to_float8_training(net(), config=config)
        return module

    return build


def float8_tied() -> nn.Module:
    from torchao.float8 import Float8LinearConfig
    from torchao.float8.float8_linear_utils import convert_to_float8_training

    module = nn.Sequential(nn.Embedding(32, 32), nn.Linear(32, 32), nn.Linear(32, 32, bias=False))
    module[2].weight = module[0].weight
    made: nn.Module = convert_to_float8_training(
        module, config=Float8LinearConfig(enable_fsdp_float8_all_gather=True, emulate=True)
    )
    return made


def scaled(module: nn.Module) -> None:
    """What a training loop calls after each step: the weights keep a scale for the next one."""
    for layer in module.children():
        layer.weight._precomputed_scale = torch.tensor(2.0)  # type: ignore[union-attr]


def quantized(name: str, **settings: object) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import torchao.quantization as q

        module = net()
        q.quantize_(module, getattr(q, name)(**settings))
        return module

    return build


def training(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import torchao.prototype.quantized_training as q
        from torchao.quantization import quantize_

        module = net()
        quantize_(module, getattr(q, name)())
        return module

    return build


def aware(step: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from torchao.quantization import Int8DynamicActivationIntxWeightConfig, quantize_
        from torchao.quantization.qat import QATConfig

        module = net().float()
        config = Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4)
        quantize_(module, QATConfig(config, step="prepare"))
        if step == "convert":
            quantize_(module, QATConfig(config, step="convert"))
        return module

    return build


def nf4() -> nn.Module:
    from torchao.quantization.quantize_.workflows import NF4Tensor, to_nf4

    assert NF4Tensor is not None
    module = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False))
    for layer in module:
        layer.weight = nn.Parameter(to_nf4(layer.weight.detach(), 64, 1), requires_grad=False)
    return module


def mx() -> nn.Module:
    from torchao.prototype.mx_formats.mx_tensor import MXTensor

    module = net()
    for layer in module.children():
        layer.weight = nn.Parameter(MXTensor.to_mx(layer.weight.detach(), torch.float8_e4m3fn), requires_grad=False)
    return module


def semi_sparse() -> nn.Module:
    from torchao.sparsity.training import SemiSparseLinear, swap_linear_with_semi_sparse_linear

    module = net()
    swap_linear_with_semi_sparse_linear(module, {"0": SemiSparseLinear})
    return module


def rows() -> list[Row]:
    """All rows; without torchao they are listed too, and cannot be built."""
    either = Right.EITHER
    weights: dict[str, Callable[[], nn.Module]] = {
        "Int8WeightOnlyConfig": quantized("Int8WeightOnlyConfig"),
        "Int8DynamicActivationInt8WeightConfig": quantized("Int8DynamicActivationInt8WeightConfig"),
        "Float8WeightOnlyConfig": quantized("Float8WeightOnlyConfig"),
        "IntxWeightOnlyConfig": quantized("IntxWeightOnlyConfig"),
        "Int8DynamicActivationIntxWeightConfig": quantized(
            "Int8DynamicActivationIntxWeightConfig", weight_dtype=torch.int4
        ),
        "NF4": nf4,
        "MXTensor": mx,
        "QAT, converted": aware("convert"),
    }  # fmt: skip
    found = [
        Row("torchao: float8 training", float8(False), needs="torchao", spreads=("fsdp2",)),
        Row("torchao: float8 training with float8 gathers", float8(True), change=False, needs="torchao",
            spreads=("fsdp2",)),
        Row("torchao: float8 training, after a step", float8(True), use=scaled, change=False, needs="torchao",
            spreads=()),
        Row("torchao: float8 training, tied", float8_tied, change=False, needs="torchao", spreads=()),
        Row("torchao: QAT, prepared", aware("prepare"), needs="torchao", spreads=("fsdp2",)),
        Row("torchao: semi-sparse training", semi_sparse, needs="torchao", spreads=()),
    ]  # fmt: skip
    for name, right in (
        ("bitnet_training", Right.SAME),
        ("int8_mixed_precision_training", Right.SAME),
        ("int8_weight_only_quantized_training", either),
    ):
        found.append(Row(f"torchao: {name}", training(name), right, change=False, needs="torchao", spreads=("fsdp2",)))
    found += [
        Row(f"torchao: {name}", build, either, change=False, needs="torchao", spreads=())
        for name, build in weights.items()
    ]
    return found
